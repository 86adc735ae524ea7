//! Which files a data set name means.
//!
//! `dataset_name` is a file, a folder of files, or a hub id. Files belong to a split by name: the split's name stands,
//! delimited, in the file's name or in a folder above it (`train-00000-of-00002.parquet`, `data/test.jsonl`,
//! `train/part1.json`). A folder in which no file names any split is a training set as a whole.

use std::path::{Path, PathBuf};

use super::Error;
use super::hub::{self, Access, Kind, Progress};
use super::rows::{Dataset, extension};
use crate::config::settings::DataSettings;

/// What a run trains and evaluates on.
#[derive(Clone, Debug)]
pub struct Splits {
    /// Rows to train on.
    pub train: Dataset,
    /// Rows to evaluate on: the test split, or the share held out by `eval_fraction`.
    pub eval: Option<Dataset>,
}

/// Words that name splits, grouped by meaning.
const SPLIT_WORDS: [&[&str]; 3] =
    [&["train", "training"], &["test", "testing", "eval", "evaluation"], &["validation", "valid", "val", "dev"]];

const EXTENSIONS: [&str; 4] = ["jsonl", "ndjson", "json", "parquet"];

/// JSON files beside data that are not data.
const NOT_DATA: [&str; 4] = ["dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"];

/// Reads the training rows and, where there are any, the evaluation rows.
///
/// # Errors
/// If the name leads to no file, a file is broken, or a split has no rows.
pub fn load(settings: &DataSettings, seed: u64, progress: &mut Progress<'_>) -> Result<Splits, Error> {
    let mut source = Source::locate(settings, Access::from_environment())?;
    let mut train = Dataset::read(&source.train(&settings.dataset_train_split, progress)?)?;
    let test = source.split(&settings.dataset_test_split);
    let test = source.fetch(&test, progress)?;
    let mut eval = match settings.eval_fraction {
        _ if !test.is_empty() => Some(Dataset::read(&test)?),
        Some(fraction) => {
            let (rest, share) = train.split_off(fraction, seed)?;
            train = rest;
            Some(share)
        }
        None => None,
    };
    if let Some(count) = settings.max_train_samples {
        train.truncate(count);
    }
    if let (Some(eval), Some(count)) = (&mut eval, settings.max_eval_samples) {
        eval.truncate(count);
    }
    let empty = |what: &str| Err(Error::Empty { what: format!("`{}`: the {what} split", settings.dataset_name) });
    match &eval {
        _ if train.is_empty() => empty("training"),
        Some(eval) if eval.is_empty() => empty("evaluation"),
        _ => Ok(Splits { train, eval }),
    }
}

/// The data files behind a name, before any is read.
struct Source<'a> {
    settings: &'a DataSettings,
    /// Paths relative to the root, sorted.
    files: Vec<String>,
    root: Root,
}

enum Root {
    /// The name is one file.
    File(PathBuf),
    Folder(PathBuf),
    Hub(Access),
}

impl<'a> Source<'a> {
    fn locate(settings: &'a DataSettings, mut access: Access) -> Result<Self, Error> {
        let name = &settings.dataset_name;
        let path = Path::new(name);
        let config = settings.dataset_config.as_deref();
        let source = |files, root| Self { settings, files, root };
        if path.is_file() {
            if let Some(config) = config {
                return Err(Error::Setting(format!(
                    "`dataset_config: {config}` names a sub-folder, but `dataset_name: {name}` is a file; leave it out"
                )));
            }
            return Ok(source(Vec::new(), Root::File(path.into())));
        }
        if path.is_dir() {
            let root = config.map_or_else(|| path.to_path_buf(), |config| path.join(config));
            if !root.is_dir() {
                return Err(Error::Content { path: root, problem: "`dataset_config` names no folder here".into() });
            }
            let mut files = Vec::new();
            list_files(&root, "", &mut files)?;
            if files.is_empty() {
                return Err(Error::Content {
                    path: root,
                    problem: "no data file in this folder; expected .jsonl, .json or .parquet".into(),
                });
            }
            return Ok(source(files, Root::Folder(root)));
        }
        if !hub::is_repo_id(name) || EXTENSIONS.contains(&extension(path).as_str()) {
            return Err(Error::Content {
                path: path.into(),
                problem: "no such file or folder, and not a hub id (`owner/name`); check `dataset_name`".into(),
            });
        }
        let mut files = access.list(name, Kind::Dataset, &settings.dataset_revision)?;
        files.retain(|file| is_data_file(file));
        files.sort();
        let files = in_config(files, settings)?;
        Ok(source(files, Root::Hub(access)))
    }

    /// Files of a split by name; empty where none carries it.
    fn split(&self, split: &str) -> Vec<String> {
        split_files(&self.files, split)
    }

    /// Files to train on: the split's, else those that name no split at all.
    fn train(&mut self, split: &str, progress: &mut Progress<'_>) -> Result<Vec<PathBuf>, Error> {
        if let Root::File(path) = &self.root {
            return Ok(vec![path.clone()]);
        }
        let mut wanted = self.split(split);
        if wanted.is_empty() {
            wanted = self.files.iter().filter(|file| named_split(file).is_none()).cloned().collect();
        }
        if wanted.is_empty() {
            return Err(Error::Setting(format!(
                "`{}` has no files of the split `{split}` (`dataset_train_split`); its files are {}",
                self.settings.dataset_name,
                self.files.iter().take(8).map(|f| format!("`{f}`")).collect::<Vec<_>>().join(", ")
            )));
        }
        self.fetch(&wanted, progress)
    }

    fn fetch(&mut self, files: &[String], progress: &mut Progress<'_>) -> Result<Vec<PathBuf>, Error> {
        let root = match &mut self.root {
            Root::File(_) => return Ok(Vec::new()),
            Root::Folder(root) => root.clone(),
            Root::Hub(_) if files.is_empty() => return Ok(Vec::new()),
            Root::Hub(access) => {
                let (name, revision) = (&self.settings.dataset_name, &self.settings.dataset_revision);
                access.fetch(name, Kind::Dataset, revision, |file| files.iter().any(|f| f == file), progress)?
            }
        };
        Ok(files.iter().map(|file| root.join(file)).collect())
    }
}

/// Narrows a hub data set's files to the wanted configuration (a folder, or the start of file names).
fn in_config(files: Vec<String>, settings: &DataSettings) -> Result<Vec<String>, Error> {
    let name = &settings.dataset_name;
    if files.is_empty() {
        return Err(Error::Setting(format!(
            "hub data set `{name}` at `{}` has no .jsonl, .json or .parquet file; many data sets have a converted copy: \
             `dataset_revision: refs/convert/parquet`",
            settings.dataset_revision
        )));
    }
    let mut configs: Vec<String> = files
        .iter()
        .filter_map(|file| Some(file.split_once('/')?.0.to_string()))
        .filter(|folder| folder != "data" && named_split(folder).is_none())
        .collect();
    configs.dedup();
    let Some(config) = &settings.dataset_config else {
        if configs.len() > 1 {
            return Err(Error::Setting(format!(
                "hub data set `{name}` has several configurations; choose one with `dataset_config`: {}",
                configs.join(", ")
            )));
        }
        return Ok(files);
    };
    let wanted: Vec<String> = files
        .into_iter()
        .filter(|file| {
            Path::new(file).components().any(|part| names(part.as_os_str().to_string_lossy().as_ref(), config))
        })
        .collect();
    if wanted.is_empty() {
        return Err(Error::Setting(format!(
            "hub data set `{name}` has no files of `dataset_config: {config}`; it has {}",
            configs.join(", ")
        )));
    }
    Ok(wanted)
}

fn list_files(root: &Path, prefix: &str, files: &mut Vec<String>) -> Result<(), Error> {
    let folder = root.join(prefix);
    let entries = std::fs::read_dir(&folder).map_err(crate::fs::io_error("read the folder", &folder))?;
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    for name in names.iter().filter(|name| !name.starts_with('.')) {
        let relative = if prefix.is_empty() { name.clone() } else { format!("{prefix}/{name}") };
        if root.join(&relative).is_dir() {
            list_files(root, &relative, files)?;
        } else if is_data_file(&relative) {
            files.push(relative);
        }
    }
    Ok(())
}

fn is_data_file(file: &str) -> bool {
    let path = Path::new(file);
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    EXTENSIONS.contains(&extension(path).as_str()) && !NOT_DATA.contains(&name.as_str())
}

/// Files that carry a split's name; those that carry exactly it win over those whose name goes on (`train_gen`).
fn split_files(files: &[String], split: &str) -> Vec<String> {
    let with = |matches: &dyn Fn(&str, &str) -> bool, word: &str| -> Vec<String> {
        let carries = |file: &&String| parts(file).any(|part| matches(part, word));
        files.iter().filter(carries).cloned().collect()
    };
    let synonyms = SPLIT_WORDS.iter().find(|words| words.contains(&split)).copied().unwrap_or_default();
    let words = std::iter::once(split).chain(synonyms.iter().copied().filter(|word| *word != split));
    for word in words {
        for matches in [&is_exactly as &dyn Fn(&str, &str) -> bool, &names] {
            let found = with(matches, word);
            if !found.is_empty() {
                return found;
            }
        }
    }
    Vec::new()
}

/// The parts of a path that may name a split: folders, and the file name without its extension.
fn parts(file: &str) -> impl Iterator<Item = &str> {
    let stem = file.rsplit_once('.').map_or(file, |(stem, _)| stem);
    stem.split('/')
}

/// `train`, `train-00000-of-00003`, `train.part1`.
fn is_exactly(part: &str, split: &str) -> bool {
    part.strip_prefix(split).is_some_and(|rest| rest.is_empty() || rest.starts_with(['-', '.']))
}

/// Whether `word` stands in `part` with no letter or digit directly before or after it.
fn names(part: &str, word: &str) -> bool {
    let is_border = |c: Option<char>| c.is_none_or(|c| !c.is_alphanumeric());
    let found = |(at, _): (usize, &str)| {
        is_border(part[..at].chars().next_back()) && is_border(part[at + word.len()..].chars().next())
    };
    !word.is_empty() && part.match_indices(word).any(found)
}

/// The split word that a path carries, if any.
fn named_split(file: &str) -> Option<&'static str> {
    SPLIT_WORDS.iter().flat_map(|words| words.iter()).find(|word| parts(file).any(|part| names(part, word))).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(names: &[&str]) -> Vec<String> {
        names.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn splits_are_found_in_file_names_and_folders() {
        let cases: [(&[&str], &str, &[&str]); 9] = [
            (
                &["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"],
                "train",
                &["data/train-00000-of-00001.parquet"],
            ),
            (&["train/a.jsonl", "test/a.jsonl"], "test", &["test/a.jsonl"]),
            (
                &["train_sft-0.parquet", "train_gen-0.parquet", "test_sft-0.parquet"],
                "train_sft",
                &["train_sft-0.parquet"],
            ),
            (&["train.jsonl", "train_extra.jsonl"], "train", &["train.jsonl"]),
            (&["gsm8k_train.jsonl", "gsm8k_test.jsonl"], "train", &["gsm8k_train.jsonl"]),
            (&["trained.jsonl", "contest.jsonl"], "test", &[]),
            (&["val.json", "train.json"], "validation", &["val.json"]),
            (&["part1.jsonl", "part2.jsonl"], "train", &[]),
            (&["my.train.jsonl"], "train", &["my.train.jsonl"]),
        ];
        for (files, split, expected) in cases {
            assert_eq!(split_files(&strings(files), split), strings(expected), "{files:?} {split}");
        }
    }

    fn settings(name: &Path) -> DataSettings {
        DataSettings {
            dataset_name: name.to_string_lossy().into_owned(),
            dataset_config: None,
            dataset_revision: "main".into(),
            dataset_train_split: "train".into(),
            dataset_test_split: "test".into(),
            dataset_text_field: "text".into(),
            eval_fraction: None,
            max_train_samples: None,
            max_eval_samples: None,
            chat_template_kwargs: serde_json::Map::new(),
            system_prompt: None,
        }
    }

    fn load_from(settings: &DataSettings) -> Result<(usize, Option<usize>), String> {
        let splits = load(settings, 1, &mut |_| {}).map_err(|e| e.to_string())?;
        Ok((splits.train.len(), splits.eval.map(|eval| eval.len())))
    }

    #[test]
    fn a_file_a_folder_and_a_folder_without_split_names_are_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, rows: usize| {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, "{\"x\": 1}\n".repeat(rows)).unwrap();
            path
        };
        let file = write("both/train.jsonl", 10);
        write("both/test.jsonl", 4);
        write("both/.hidden/train.jsonl", 100);
        write("both/dataset_info.json", 1);
        write("parts/b/2.jsonl", 3);
        write("parts/a/1.jsonl", 2);
        let both = folder.path().join("both");
        assert_eq!(load_from(&settings(&file)), Ok((10, None)));
        assert_eq!(load_from(&settings(&both)), Ok((10, Some(4))));
        assert_eq!(load_from(&settings(&folder.path().join("parts"))), Ok((5, None)));
        let mut limited = settings(&both);
        (limited.max_train_samples, limited.max_eval_samples) = (Some(3), Some(2));
        assert_eq!(load_from(&limited), Ok((3, Some(2))));
        let mut held_out = settings(&file);
        held_out.eval_fraction = Some(0.2);
        assert_eq!(load_from(&held_out), Ok((8, Some(2))));
        let mut sub = settings(&folder.path().join("parts"));
        sub.dataset_config = Some("a".into());
        assert_eq!(load_from(&sub), Ok((2, None)));

        let mut zero = settings(&file);
        zero.max_train_samples = Some(0);
        assert!(load_from(&zero).unwrap_err().contains("the training split has no rows"));
        std::fs::remove_file(&file).unwrap();
        assert!(load_from(&settings(&both)).unwrap_err().contains("no files of the split `train`"));
        assert!(load_from(&settings(&file)).unwrap_err().contains("no such file or folder"));
        sub.dataset_config = Some("c".into());
        assert!(load_from(&sub).unwrap_err().contains("names no folder here"));
        let empty = folder.path().join("empty");
        std::fs::create_dir(&empty).unwrap();
        assert!(load_from(&settings(&empty)).unwrap_err().contains("no data file in this folder"));
    }
}
