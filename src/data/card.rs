//! The configurations that a data set's README names.
//!
//! A `README.md` may begin with YAML, of which `configs` says which files belong to which split of which configuration;
//! `datasets` calls it metadata configs (`MetadataConfigs`).

use glob::{MatchOptions, Pattern};
use serde_json::Value;

/// One configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Config {
    pub(super) name: String,
    is_default: bool,
    /// Splits and the patterns of their files, in the order of the README.
    pub(super) splits: Vec<(String, Vec<String>)>,
    /// The folder that files are looked for in.
    pub(super) folder: Option<String>,
}

/// The configurations of a README; none if it has no such part.
///
/// # Errors
/// If its YAML or its `configs` cannot be understood.
pub(super) fn configs(readme: &str) -> Result<Vec<Config>, String> {
    let mut lines = readme.trim_start_matches('\u{FEFF}').lines();
    if lines.next().map(str::trim_end) != Some("---") {
        return Ok(Vec::new());
    }
    let mut yaml = String::new();
    let mut is_closed = false;
    for line in lines {
        if line.trim_end() == "---" {
            is_closed = true;
            break;
        }
        yaml.push_str(line);
        yaml.push('\n');
    }
    if !is_closed {
        return Ok(Vec::new());
    }
    let card: Value = serde_saphyr::from_str(&yaml).map_err(|e| format!("its YAML is broken: {e}"))?;
    match card.get("configs") {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(entries)) => entries
            .iter()
            .map(|entry| {
                config(entry).ok_or_else(|| format!("its `configs` has an entry that is not understood: {entry}"))
            })
            .collect(),
        Some(_) => Err("its `configs` is not a list".into()),
    }
}

fn config(entry: &Value) -> Option<Config> {
    let text = |value: &Value| value.as_str().map(str::to_string);
    let splits = match entry.get("data_files") {
        None | Some(Value::Null) => Vec::new(),
        Some(files) => data_files(files)?,
    };
    let folder = match entry.get("data_dir") {
        None | Some(Value::Null) => None,
        Some(folder) => Some(text(folder)?.trim_start_matches("./").trim_matches('/').to_string()),
    };
    let is_default = entry.get("default") == Some(&Value::Bool(true));
    Some(Config { name: text(entry.get("config_name")?)?, is_default, splits, folder })
}

/// `data_files`: a pattern, a list of patterns, a list of `{split, path}`, or a map of splits.
pub(super) fn data_files(value: &Value) -> Option<Vec<(String, Vec<String>)>> {
    let patterns = |value: &Value| -> Option<Vec<String>> {
        match value {
            Value::String(pattern) => Some(vec![pattern.clone()]),
            Value::Array(patterns) => patterns.iter().map(|p| p.as_str().map(str::to_string)).collect(),
            _ => None,
        }
    };
    match value {
        Value::Array(entries) if entries.iter().any(Value::is_object) => entries
            .iter()
            .map(|entry| Some((entry.get("split")?.as_str()?.to_string(), patterns(entry.get("path")?)?)))
            .collect(),
        Value::Object(splits) => splits.iter().map(|(split, files)| Some((split.clone(), patterns(files)?))).collect(),
        other => Some(vec![("train".into(), patterns(other)?)]),
    }
}

/// The configuration that is meant: the named one, else the one marked as default, the only one, or `default`.
///
/// # Errors
/// If there is none of that name, or none is named and there are several.
pub(super) fn choose<'a>(configs: &'a [Config], wanted: Option<&str>) -> Result<&'a Config, String> {
    let found = match wanted {
        Some(name) => configs.iter().find(|config| config.name == name),
        None if configs.len() == 1 => configs.first(),
        None => {
            let default = configs.iter().find(|config| config.is_default);
            default.or_else(|| configs.iter().find(|config| config.name == "default"))
        }
    };
    let names = || configs.iter().map(|config| config.name.as_str()).collect::<Vec<_>>().join(", ");
    found.ok_or_else(|| match wanted {
        Some(name) => format!("has no configuration `{name}`; it has {}", names()),
        None => format!("has several configurations; choose one with `dataset_config`: {}", names()),
    })
}

/// Files that a pattern means, in their order: a path, a folder, or a glob whose `**` goes through folders.
///
/// # Errors
/// If the pattern is no glob.
pub(super) fn matching(files: &[String], pattern: &str) -> Result<Vec<String>, String> {
    let pattern = pattern.trim_start_matches("./");
    let exact: Vec<String> = files.iter().filter(|file| *file == pattern).cloned().collect();
    if !exact.is_empty() {
        return Ok(exact);
    }
    let glob = Pattern::new(pattern).map_err(|e| format!("`{pattern}` is no pattern of files: {e}"))?;
    let options = MatchOptions { require_literal_separator: true, ..MatchOptions::new() };
    let folder = format!("{}/", pattern.trim_end_matches('/'));
    Ok(files.iter().filter(|file| glob.matches_with(file, options) || file.starts_with(&folder)).cloned().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const README: &str = "---\nlicense: mit\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: en/a-*\n  - split: test\n    path:\n    - en/t1.jsonl\n    - en/t2.jsonl\n- config_name: de\n  default: true\n  data_files: de/**\n- config_name: fr\n  data_dir: ./french/\n---\n# Text\n---\n";

    #[test]
    fn configurations_are_read_and_chosen() {
        let configs = configs(README).unwrap();
        let names: Vec<&str> = configs.iter().map(|config| config.name.as_str()).collect();
        assert_eq!(names, ["en", "de", "fr"]);
        assert_eq!(configs[0].splits[1], ("test".into(), vec!["en/t1.jsonl".into(), "en/t2.jsonl".into()]));
        assert_eq!(configs[1].splits, [("train".to_string(), vec!["de/**".to_string()])]);
        assert_eq!(configs[2].folder.as_deref(), Some("french"));
        assert_eq!(choose(&configs, None).unwrap().name, "de");
        assert_eq!(choose(&configs, Some("fr")).unwrap().name, "fr");
        assert!(choose(&configs, Some("it")).unwrap_err().contains("no configuration `it`; it has en, de, fr"));
        let two = [configs[0].clone(), configs[2].clone()];
        assert!(choose(&two, None).unwrap_err().contains("several configurations"));
    }

    #[test]
    fn readmes_without_configurations_have_none_and_broken_ones_are_errors() {
        for text in ["", "# Title\n", "---\nlicense: mit\n---\n", "---\nopen: yes\n"] {
            assert_eq!(configs(text).unwrap(), []);
        }
        assert!(configs("---\nconfigs: 3\n---\n").is_err());
        assert!(configs("---\nconfigs:\n- data_files: x\n---\n").is_err());
        assert!(configs("---\n: [\n---\n").unwrap_err().contains("YAML"));
    }

    #[test]
    fn patterns_match_paths_folders_and_globs() {
        let files: Vec<String> = ["a.jsonl", "d/b.jsonl", "d/e/c.jsonl", "d/c-1.csv"].map(String::from).into();
        let found = |pattern: &str| matching(&files, pattern).unwrap();
        assert_eq!(found("a.jsonl"), ["a.jsonl"]);
        assert_eq!(found("*.jsonl"), ["a.jsonl"]);
        assert_eq!(found("**/*.jsonl"), ["a.jsonl", "d/b.jsonl", "d/e/c.jsonl"]);
        assert_eq!(found("./d/*"), ["d/b.jsonl", "d/c-1.csv"]);
        assert_eq!(found("d"), ["d/b.jsonl", "d/e/c.jsonl", "d/c-1.csv"]);
        assert_eq!(found("d/c-[0-9].csv"), ["d/c-1.csv"]);
        assert!(matching(&files, "a**").is_err());
    }
}
