//! The files behind a data set's name, by split.
//!
//! A name is a file, a folder or a hub id. Which files make up a split is said by, in this order: the files asked for
//! (`data_files`), what `save_to_disk` left beside them, the configurations in the README, the files' names.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::Error;
use super::card;
use super::formats::{EXPECTED, Format};
use super::hub::{self, Access, Kind, Progress};
use super::rows::Dataset;
use super::split_names;
use super::split_spec::{self, Part};

/// What is looked for.
#[derive(Clone, Debug)]
pub(super) struct Wanted<'a> {
    /// A file, a folder, a hub id; or a format (`json`, `csv`) with `data_files`.
    pub(super) name: &'a str,
    /// Configuration: of the README, or a sub-folder.
    pub(super) config: Option<&'a str>,
    pub(super) revision: &'a str,
    /// Folder inside of the data set.
    pub(super) folder: Option<&'a str>,
    /// Splits and the patterns of their files; empty to find them by name.
    pub(super) data_files: &'a [(String, Vec<String>)],
    /// The key of the configuration file that named it, for messages.
    pub(super) key: &'static str,
}

/// Formats that stand where a name is expected, as `datasets.load_dataset` takes them.
const BUILDERS: [&str; 5] = ["json", "csv", "parquet", "arrow", "text"];

/// JSON files beside data that are not data.
const NOT_DATA: [&str; 8] = [
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "config.json",
    "package.json",
    "requirements.txt",
    "license.txt",
];

/// Largest README that is read.
const MOST_README_BYTES: u64 = 4 << 20;

/// The data files of a data set, before any is read.
pub(super) struct Source<'a> {
    wanted: Wanted<'a>,
    root: Root,
    /// Files by split where something else than their names says so, in the order it says.
    table: Option<Vec<(String, Vec<String>)>>,
    /// All data files, sorted: paths relative to the root.
    files: Vec<String>,
}

enum Root {
    /// The name is one file, which is any split.
    File(PathBuf),
    Folder(PathBuf),
    Hub(Access),
}

impl<'a> Source<'a> {
    /// Finds the files.
    ///
    /// # Errors
    /// If the name leads to none, or the configuration is not there.
    pub(super) fn locate(wanted: Wanted<'a>, access: Access, progress: &mut Progress<'_>) -> Result<Self, Error> {
        let name = wanted.name;
        let path = Path::new(name);
        if BUILDERS.contains(&name) && !path.exists() {
            if wanted.data_files.is_empty() {
                return Err(Error::Setting(format!(
                    "`{}: {name}` is a format, not a data set; give its path as the name, or `data_files` beside it",
                    wanted.key
                )));
            }
            return Self::with_files(wanted, Root::Folder(PathBuf::new()), Vec::new());
        }
        if path.is_file() {
            if let Some(config) = wanted.config {
                return Err(Error::Setting(format!(
                    "`dataset_config: {config}` names a sub-folder, but `{}: {name}` is a file; leave it out",
                    wanted.key
                )));
            }
            return Ok(Self { wanted, root: Root::File(path.into()), table: None, files: Vec::new() });
        }
        if path.is_dir() {
            let mut files = Vec::new();
            list_files(path, "", 0, &mut files)?;
            return Self::with_files(wanted, Root::Folder(path.into()), files);
        }
        if !hub::is_repo_id(name) || Format::of(path).is_some() {
            return Err(Error::Content {
                path: path.into(),
                problem: format!("no such file or folder, and not a hub id (`owner/name`); check `{}`", wanted.key),
            });
        }
        let mut access = access;
        let files = access.list(name, Kind::Dataset, wanted.revision)?;
        let has_card = files.iter().any(|file| file == "README.md");
        let mut source = Self { wanted, root: Root::Hub(access), table: None, files };
        let card = if has_card { source.fetch(&["README.md".to_string()], progress)?.pop() } else { None };
        let files = std::mem::take(&mut source.files);
        source.settle(files, card.as_deref())?;
        Ok(source)
    }

    fn with_files(wanted: Wanted<'a>, root: Root, files: Vec<String>) -> Result<Self, Error> {
        let card = match &root {
            Root::Folder(folder) if !folder.as_os_str().is_empty() => Some(folder.join("README.md")),
            _ => None,
        };
        let mut source = Self { wanted, root, table: None, files: Vec::new() };
        source.settle(files, card.filter(|card| card.is_file()).as_deref())?;
        Ok(source)
    }

    /// Decides what says which files belong to which split.
    fn settle(&mut self, mut files: Vec<String>, card: Option<&Path>) -> Result<(), Error> {
        files.retain(|file| is_data_file(file));
        files.sort();
        if !self.wanted.data_files.is_empty() {
            return self.settle_by_data_files(files);
        }
        if self.settle_by_saved_state(&files)? {
            return Ok(());
        }
        let configs = card.map(|card| self.configs(card)).transpose()?.unwrap_or_default();
        if !configs.is_empty() && self.wanted.folder.is_none() {
            let config = card::choose(&configs, self.wanted.config).map_err(|what| self.problem(&what))?;
            if let Some(folder) = &config.folder {
                files = inside(files, folder);
            }
            if !config.splits.is_empty() {
                let splits = config.splits.clone();
                let base = config.folder.as_ref().map_or_else(String::new, |folder| format!("{folder}/"));
                return self.settle_by_patterns(&files, &splits, &base);
            }
        } else {
            if let Some(folder) = self.wanted.folder {
                files = inside(files, folder.trim_matches('/'));
            }
            files = self.in_config(files)?;
        }
        if files.is_empty() {
            return Err(self.problem(&self.nothing_here()));
        }
        self.files = files;
        Ok(())
    }

    fn nothing_here(&self) -> String {
        let advice = match self.root {
            Root::Hub(_) => {
                "; many data sets on the hub have a converted copy: `dataset_revision: refs/convert/parquet`"
            }
            _ => "",
        };
        format!("has no data file; expected {EXPECTED}{advice}")
    }

    fn configs(&self, card: &Path) -> Result<Vec<card::Config>, Error> {
        let size = std::fs::metadata(card).map_err(crate::fs::io_error("read", card))?.len();
        if size > MOST_README_BYTES {
            return Ok(Vec::new());
        }
        let bytes = std::fs::read(card).map_err(crate::fs::io_error("read", card))?;
        match card::configs(&String::from_utf8_lossy(&bytes)) {
            // Nobody but its owner can mend a README on the hub.
            Err(problem) if matches!(self.root, Root::Hub(_)) => {
                tracing::warn!("the README of {}: {problem}; files are sorted by their names", self.place());
                Ok(Vec::new())
            }
            found => found.map_err(|problem| Error::Content {
                path: card.into(),
                problem: format!("{problem}; mend or remove it"),
            }),
        }
    }

    fn settle_by_data_files(&mut self, files: Vec<String>) -> Result<(), Error> {
        let files = match self.wanted.folder {
            Some(folder) => inside(files, folder.trim_matches('/')),
            None => files,
        };
        let base = self.wanted.folder.map_or_else(String::new, |folder| format!("{}/", folder.trim_matches('/')));
        let splits = self.wanted.data_files;
        let is_anywhere = matches!(&self.root, Root::Folder(root) if root.as_os_str().is_empty());
        if is_anywhere {
            let expanded: Result<Vec<(String, Vec<String>)>, Error> = splits
                .iter()
                .map(|(split, patterns)| {
                    let found: Result<Vec<Vec<String>>, Error> =
                        patterns.iter().map(|pattern| self.paths(&format!("{base}{pattern}"))).collect();
                    Ok((split.clone(), found?.concat()))
                })
                .collect();
            self.table = Some(expanded?);
            return Ok(());
        }
        self.settle_by_patterns(&files, splits, &base)
    }

    /// Files of this machine that a pattern means.
    fn paths(&self, pattern: &str) -> Result<Vec<String>, Error> {
        if Path::new(pattern).is_file() {
            return Ok(vec![pattern.to_string()]);
        }
        if pattern.contains("://") {
            return Err(self.problem(&format!(
                "has `{pattern}` in `data_files`; addresses are not read: give a path, or a hub id as the name"
            )));
        }
        let paths =
            glob::glob(pattern).map_err(|e| self.problem(&format!("has a broken pattern in `data_files`: {e}")))?;
        let mut found: Vec<String> =
            paths.flatten().filter(|path| path.is_file()).map(|path| path.to_string_lossy().into_owned()).collect();
        found.sort();
        if found.is_empty() {
            return Err(self.problem(&format!("has no file `{pattern}` (`data_files`)")));
        }
        Ok(found)
    }

    fn settle_by_patterns(
        &mut self,
        files: &[String],
        splits: &[(String, Vec<String>)],
        base: &str,
    ) -> Result<(), Error> {
        let mut table = Vec::new();
        for (split, patterns) in splits {
            let mut found = Vec::new();
            for pattern in patterns {
                let matched = card::matching(files, &format!("{base}{}", pattern.trim_start_matches("./")))
                    .map_err(|what| self.problem(&format!("has a broken pattern: {what}")))?;
                found.extend(matched);
            }
            let mut seen = BTreeSet::new();
            found.retain(|file| seen.insert(file.clone()));
            table.push((split.clone(), found));
        }
        self.table = Some(table);
        Ok(())
    }

    /// What `Dataset.save_to_disk` and `DatasetDict.save_to_disk` leave beside the files of a folder.
    fn settle_by_saved_state(&mut self, files: &[String]) -> Result<bool, Error> {
        let Root::Folder(root) = &self.root else { return Ok(false) };
        let root = match (self.wanted.config, self.wanted.folder) {
            (None, None) => root.clone(),
            _ => return Ok(false),
        };
        let read = |file: &str| -> Result<Option<Value>, Error> {
            let path = root.join(file);
            if !path.is_file() {
                return Ok(None);
            }
            let bytes = std::fs::read(&path).map_err(crate::fs::io_error("read", &path))?;
            serde_json::from_slice(&bytes).map(Some).map_err(|e| Error::Content {
                path,
                problem: format!("is not what `save_to_disk` writes: {e}; save the data set again"),
            })
        };
        let of_state = |state: &Value, prefix: &str| -> Vec<String> {
            let names = state.get("_data_files").and_then(Value::as_array).into_iter().flatten();
            let names = names.filter_map(|entry| entry.get("filename")?.as_str());
            // Only what is listed is read, so that no name leads out of the folder.
            names.map(|name| format!("{prefix}{name}")).filter(|name| files.contains(name)).collect()
        };
        if let Some(dictionary) = read("dataset_dict.json")? {
            let splits = dictionary.get("splits").and_then(Value::as_array).into_iter().flatten();
            let mut table = Vec::new();
            for split in splits.filter_map(Value::as_str).filter(|split| !split.contains(['/', '\\'])) {
                if let Some(state) = read(&format!("{split}/state.json"))? {
                    table.push((split.to_string(), of_state(&state, &format!("{split}/"))));
                }
            }
            self.table = Some(table);
            return Ok(true);
        }
        let Some(state) = read("state.json")?.filter(|state| state.get("_data_files").is_some()) else {
            return Ok(false);
        };
        let split = state.get("_split").and_then(Value::as_str).unwrap_or("train").to_string();
        self.table = Some(vec![(split, of_state(&state, ""))]);
        Ok(true)
    }

    /// Narrows files to the wanted configuration (a folder, or a part of the names).
    fn in_config(&self, files: Vec<String>) -> Result<Vec<String>, Error> {
        let folders: BTreeSet<&str> = files.iter().filter_map(|file| Some(file.split_once('/')?.0)).collect();
        let configs: Vec<&str> =
            folders.into_iter().filter(|folder| *folder != "data" && !split_names::names_a_split(folder)).collect();
        let Some(config) = self.wanted.config else {
            if configs.len() > 1 && matches!(self.root, Root::Hub(_)) {
                return Err(self.problem(&format!(
                    "has several configurations; choose one with `dataset_config`: {}",
                    configs.join(", ")
                )));
            }
            return Ok(files);
        };
        let in_folder: Vec<String> =
            files.iter().filter(|file| file.starts_with(&format!("{config}/"))).cloned().collect();
        if !in_folder.is_empty() {
            return Ok(in_folder);
        }
        let has = |part: &str| {
            part.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == config) || part == config
        };
        let named: Vec<String> = files.iter().filter(|file| file.split('/').any(has)).cloned().collect();
        if named.is_empty() {
            return Err(self.problem(&format!(
                "has no folder or files of `dataset_config: {config}`; it has {}",
                if configs.is_empty() { "no configurations".into() } else { configs.join(", ") }
            )));
        }
        Ok(named)
    }

    fn problem(&self, what: &str) -> Error {
        Error::Setting(format!("{} {what}", self.place()))
    }

    fn place(&self) -> String {
        match &self.root {
            Root::Hub(_) => format!("hub data set `{}` at `{}`", self.wanted.name, self.wanted.revision),
            _ => format!("`{}`", self.wanted.name),
        }
    }

    /// Files of a split; empty where there is none of that name.
    fn files_of(&self, split: &str) -> Vec<String> {
        if let Some(table) = &self.table {
            let all = || table.iter().flat_map(|(_, files)| files.clone()).collect();
            let named = table.iter().find(|(name, _)| name == split).map(|(_, files)| files.clone());
            return named.unwrap_or_else(|| if split == "all" { all() } else { Vec::new() });
        }
        if split == "all" {
            return self.files.clone();
        }
        let named = split_names::of_split(&self.files, split);
        // A folder in which no file names a split is a training set as a whole.
        let is_nameless = !self.files.iter().any(|file| split_names::names_a_split(file));
        if named.is_empty() && split == "train" && is_nameless { self.files.clone() } else { named }
    }

    /// The splits there are, for messages.
    fn splits(&self) -> Vec<String> {
        if let Some(table) = &self.table {
            return table.iter().map(|(split, _)| split.clone()).collect();
        }
        let labels: BTreeSet<String> = self.files.iter().filter_map(|f| split_names::label(f)).collect();
        labels.into_iter().collect()
    }

    /// That a split is not there, and which are.
    pub(super) fn missing(&self, split: &str, key: &str) -> String {
        let quoted = |names: &[String]| names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        let splits = self.splits();
        let there = match &self.root {
            Root::File(_) => "it is one file".into(),
            _ if splits.iter().any(|name| name == split) => "none of the files it is made of is there".into(),
            _ if splits.is_empty() => format!("its files are {}", quoted(&self.files[..self.files.len().min(8)])),
            _ => format!("its splits are {}", quoted(&splits)),
        };
        format!("{} has no split `{split}` (`{key}`); {there}", self.place())
    }

    /// Whether all splits of a specification are there.
    ///
    /// # Errors
    /// If it is no specification.
    pub(super) fn has(&self, spec: &str) -> Result<bool, Error> {
        let parts = split_spec::parse(spec)?;
        Ok(!matches!(self.root, Root::File(_)) && parts.iter().all(|part| !self.files_of(&part.split).is_empty()))
    }

    /// Reads the rows that a specification of splits means. `key` is the key that holds it.
    ///
    /// # Errors
    /// If a split is not there, or a file is broken.
    pub(super) fn read(&mut self, spec: &str, key: &str, progress: &mut Progress<'_>) -> Result<Dataset, Error> {
        let parts = split_spec::parse(spec)?;
        if let [part] = parts.as_slice()
            && part.is_whole()
        {
            return self.read_split(part, key, progress);
        }
        let mut read: BTreeMap<String, Dataset> = BTreeMap::new();
        let mut found = Vec::new();
        for part in &parts {
            if !read.contains_key(&part.split) {
                let rows = self.read_split(part, key, progress)?;
                read.insert(part.split.clone(), rows);
            }
            let rows = &read[&part.split];
            found.push(if part.is_whole() { rows.clone() } else { rows.slice(part.range(rows.len())) });
        }
        let dataset = if found.len() == 1 { found.remove(0) } else { Dataset::concat(found) };
        if dataset.is_empty() {
            return Err(Error::Empty { what: format!("`{}`: `{spec}` (`{key}`)", self.wanted.name) });
        }
        Ok(dataset)
    }

    fn read_split(&mut self, part: &Part, key: &str, progress: &mut Progress<'_>) -> Result<Dataset, Error> {
        if let Root::File(path) = &self.root {
            return Dataset::read(std::slice::from_ref(path));
        }
        let files = self.files_of(&part.split);
        if files.is_empty() {
            return Err(Error::Setting(format!(
                "{}. Name one of them, or add several: `a+b`",
                self.missing(&part.split, key)
            )));
        }
        let files = self.of_one_format(files);
        let paths = self.fetch(&files, progress)?;
        Dataset::read(&paths)
    }

    /// Keeps the files of the most common format, as `datasets` does: others beside them are notes, or copies.
    fn of_one_format(&self, files: Vec<String>) -> Vec<String> {
        let format = |file: &String| Format::of(Path::new(file)).map(|(format, _)| format);
        let mut counts: BTreeMap<Format, usize> = BTreeMap::new();
        files.iter().filter_map(format).for_each(|format| *counts.entry(format).or_insert(0) += 1);
        if counts.len() < 2 {
            return files;
        }
        counts.remove(&Format::Text);
        let best = counts
            .iter()
            .max_by_key(|&(&format, &count)| (count, std::cmp::Reverse(format)))
            .map(|(&format, _)| format);
        let (kept, left): (Vec<String>, Vec<String>) = files.into_iter().partition(|file| format(file) == best);
        tracing::warn!(
            "`{}`: files of several formats; {} are read, {} are not, e.g. `{}`",
            self.wanted.name,
            kept.len(),
            left.len(),
            left.first().map_or("", String::as_str)
        );
        kept
    }

    fn fetch(&mut self, files: &[String], progress: &mut Progress<'_>) -> Result<Vec<PathBuf>, Error> {
        let root = match &mut self.root {
            Root::File(path) => return Ok(vec![path.clone()]),
            Root::Folder(root) => root.clone(),
            Root::Hub(access) => {
                let wanted = |file: &str| files.iter().any(|f| f == file);
                access.fetch(self.wanted.name, Kind::Dataset, self.wanted.revision, wanted, progress)?
            }
        };
        Ok(files.iter().map(|file| root.join(file)).collect())
    }
}

fn inside(files: Vec<String>, folder: &str) -> Vec<String> {
    let prefix = format!("{folder}/");
    files.into_iter().filter(|file| folder.is_empty() || file.starts_with(&prefix)).collect()
}

/// Deepest folder that is looked into; a link may lead back to where it stands.
const MOST_FOLDERS: usize = 16;

fn list_files(root: &Path, prefix: &str, level: usize, files: &mut Vec<String>) -> Result<(), Error> {
    let folder = root.join(prefix);
    let entries = std::fs::read_dir(&folder).map_err(crate::fs::io_error("read the folder", &folder))?;
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    for name in names.iter().filter(|name| !name.starts_with('.') && !name.starts_with("__")) {
        let relative = if prefix.is_empty() { name.clone() } else { format!("{prefix}/{name}") };
        if root.join(&relative).is_dir() {
            if level < MOST_FOLDERS {
                list_files(root, &relative, level + 1, files)?;
            }
        } else {
            files.push(relative);
        }
    }
    Ok(())
}

fn is_data_file(file: &str) -> bool {
    let path = Path::new(file);
    let name = path.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
    let is_hidden = file.split('/').any(|part| part.starts_with('.') || part.starts_with("__"));
    Format::of(path).is_some() && !NOT_DATA.contains(&name.as_str()) && !is_hidden
}
