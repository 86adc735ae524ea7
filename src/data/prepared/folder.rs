//! A prepared folder, which is whole or absent: written beside its place, synced and renamed.

use std::path::{Path, PathBuf};

use super::AGAIN;
use super::fingerprint::Fingerprint;
use super::manifest::{MANIFEST, Manifest, SplitEntry};
use super::prompts::Prompts;
use super::records::{FileEntry, Kind, RecordWriter};
use super::sequences::Sequences;
use crate::data::Error;
use crate::fs::{self, io_error};

/// Files of the splits.
const TRAIN: &str = "train.bin";
const EVAL: &str = "eval.bin";
/// What a folder of this kind may hold.
const NAMES: [&str; 3] = [MANIFEST, TRAIN, EVAL];

/// A folder that a run reads.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    manifest: Manifest,
}

impl Folder {
    /// Opens a folder; no record is read.
    ///
    /// # Errors
    /// If it is not there, or its manifest is damaged.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Ok(Self { path: path.into(), manifest: Manifest::read(path)? })
    }

    /// What it holds.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Makes sure that a run would have made the same of the raw files.
    ///
    /// # Errors
    /// If not; all that differs is named.
    pub fn check(&self, now: &Fingerprint) -> Result<(), Error> {
        let lines = self.manifest.fingerprint.differences(now);
        if lines.is_empty() {
            return Ok(());
        }
        Err(Error::Setting(format!(
            "`preprocessed: {}` holds rows that were made otherwise than this run would make them:\n  {}\n{AGAIN} with this \
             configuration, set it as it was, or remove `preprocessed`",
            self.path.display(),
            lines.join("\n  ")
        )))
    }

    /// What changed in the raw files, as far as they are there.
    pub fn changed_sources(&self) -> Vec<String> {
        self.manifest.sources.iter().filter_map(super::SourceFile::change).collect()
    }

    /// The training and evaluation sequences.
    ///
    /// # Errors
    /// If a file is damaged or made for another task.
    pub fn sequences(&self) -> Result<(Sequences, Option<Sequences>), Error> {
        self.splits(|SplitEntry { file, summary, .. }| Sequences::open(&self.path, file, summary.clone()))
    }

    /// The training and evaluation prompts.
    ///
    /// # Errors
    /// If a file is damaged or made for another task.
    pub fn prompts(&self) -> Result<(Prompts, Option<Prompts>), Error> {
        self.splits(|SplitEntry { file, summary, .. }| Prompts::open(&self.path, file, summary.clone()))
    }

    fn splits<T>(&self, open: impl Fn(&SplitEntry) -> Result<T, Error>) -> Result<(T, Option<T>), Error> {
        let Manifest { train, eval, .. } = &self.manifest;
        if (train.file.name.as_str(), eval.as_ref().map_or(EVAL, |eval| &eval.file.name)) != (TRAIN, EVAL) {
            let problem = format!("names files that are not of this program; {AGAIN}");
            return Err(Error::Content { path: self.path.join(MANIFEST), problem });
        }
        Ok((open(train)?, eval.as_ref().map(open).transpose()?))
    }
}

/// A folder that is being written. Dropped before [`FolderWriter::finish`], it leaves nothing.
#[derive(Debug)]
pub struct FolderWriter {
    target: PathBuf,
    folder: tempfile::TempDir,
}

impl FolderWriter {
    /// Begins beside `target`, which is replaced at the end if it is such a folder.
    ///
    /// # Errors
    /// If `target` is something else, or nothing can be written beside it.
    pub fn begin(target: &Path) -> Result<Self, Error> {
        Self::require_free(target)?;
        let parent = fs::parent(target);
        std::fs::create_dir_all(parent).map_err(io_error("create the folder", parent))?;
        Ok(Self { target: target.into(), folder: temporary(parent)? })
    }

    /// Makes sure that nothing but an earlier folder of this kind is at `target`.
    ///
    /// # Errors
    /// If something else is.
    pub fn require_free(target: &Path) -> Result<(), Error> {
        let names = match std::fs::read_dir(target) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            entries => entries.map_err(io_error("read the folder", target))?,
        };
        for entry in names {
            let name = entry.map_err(io_error("read the folder", target))?.file_name();
            if !NAMES.iter().any(|own| *own == name) {
                return Err(Error::Content {
                    path: target.into(),
                    problem: format!(
                        "holds `{}`, which is nothing that `trainer preprocess` writes; choose another folder (`--output`)",
                        name.to_string_lossy()
                    ),
                });
            }
        }
        Ok(())
    }

    /// Writes sequences; `is_evaluation` says of which split. `None` if `goes_on`, which gets the number of records so far,
    /// says no.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn sequences(
        &self,
        sequences: &Sequences,
        is_evaluation: bool,
        goes_on: &dyn Fn(usize) -> bool,
    ) -> Result<Option<FileEntry>, Error> {
        let put = |index: usize, body: &mut Vec<u8>| sequences.put(index, body);
        self.records(is_evaluation, Kind::Sequences, sequences.len(), put, goes_on)
    }

    /// As [`FolderWriter::sequences`], for prompts.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn prompts(
        &self,
        prompts: &Prompts,
        is_evaluation: bool,
        goes_on: &dyn Fn(usize) -> bool,
    ) -> Result<Option<FileEntry>, Error> {
        let put = |index: usize, body: &mut Vec<u8>| prompts.put(index, body);
        self.records(is_evaluation, Kind::Prompts, prompts.len(), put, goes_on)
    }

    fn records(
        &self,
        is_evaluation: bool,
        kind: Kind,
        count: usize,
        put: impl Fn(usize, &mut Vec<u8>) -> Result<(), Error>,
        goes_on: &dyn Fn(usize) -> bool,
    ) -> Result<Option<FileEntry>, Error> {
        let name = if is_evaluation { EVAL } else { TRAIN };
        let mut writer = RecordWriter::create(&self.folder.path().join(name), kind)?;
        let mut body = Vec::new();
        for index in 0..count {
            if !goes_on(index) {
                return Ok(None);
            }
            body.clear();
            put(index, &mut body)?;
            writer.push(&body)?;
        }
        writer.finish().map(Some)
    }

    /// Writes the manifest and gives the folder its name.
    ///
    /// # Errors
    /// If that fails; an earlier folder of that name is then still there.
    pub fn finish(self, manifest: &Manifest) -> Result<(), Error> {
        let Self { target, folder } = self;
        manifest.write(folder.path())?;
        let parent = fs::parent(&target);
        let rename = |from: &Path, to: &Path| std::fs::rename(from, to).map_err(io_error("rename to", &target));
        let replaced = temporary(parent)?;
        let old = replaced.path().join("old");
        let has_old = target.exists();
        if has_old {
            rename(&target, &old)?;
        }
        if let Err(error) = rename(folder.path(), &target) {
            if has_old {
                rename(&old, &target)?;
            }
            return Err(error.into());
        }
        // It has its name; there is nothing left to remove under the old one.
        let _ = folder.keep();
        Ok(fs::sync_folder(parent)?)
    }
}

fn temporary(parent: &Path) -> Result<tempfile::TempDir, Error> {
    let mut builder = tempfile::Builder::new();
    let folder = fs::shared(&mut builder, 0o777).prefix(".partial-preprocessed-").tempdir_in(parent);
    Ok(folder.map_err(io_error("create a folder in", parent))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::fingerprint::RowsFingerprint;
    use crate::data::rows::Dataset;
    use crate::data::sft::{SftData, SftExample};

    /// Two examples of `length` tokens as the folder `target`.
    fn write(target: &Path, length: u32) -> Result<(), Error> {
        let example = SftExample { input_ids: (0..length).collect(), labels_mask: vec![true; length as usize] };
        let data = SftData { examples: vec![example; 2], num_rows: 2, ..SftData::default() };
        let sequences = Sequences::new(data, None)?;
        let writer = FolderWriter::begin(target)?;
        let file = writer.sequences(&sequences, false, &|_| true)?.unwrap();
        let rows = RowsFingerprint::of(&Dataset::default());
        let train = SplitEntry { file, summary: sequences.summary().clone(), rows };
        let fingerprint = serde_json::json!({
            "task": "sft", "settings": {}, "evaluates": false, "tokenizer": "t", "template": null
        });
        let fingerprint = serde_json::from_value(fingerprint).unwrap();
        writer.finish(&Manifest::new(fingerprint, vec![], vec![], train, None))
    }

    fn names(folder: &Path) -> Vec<String> {
        let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_folder_is_whole_or_absent_and_replaces_only_its_like() {
        let parent = tempfile::tempdir().unwrap();
        let target = parent.path().join("a/b");
        for length in [3, 5] {
            write(&target, length).unwrap();
            assert_eq!(
                (names(&target), names(target.parent().unwrap())),
                (vec![MANIFEST.into(), TRAIN.into()], vec!["b".to_string()])
            );
            let folder = Folder::open(&target).unwrap();
            let (train, eval) = folder.sequences().unwrap();
            assert_eq!(train.collate(&[1]).unwrap().tokens, (0..length).collect::<Vec<_>>());
            assert!(eval.is_none() && folder.check(&folder.manifest().fingerprint).is_ok());
            assert!(folder.prompts().unwrap_err().to_string().contains("made for another task"));
        }
        std::fs::write(target.join("notes.txt"), "mine").unwrap();
        assert!(write(&target, 3).unwrap_err().to_string().contains("holds `notes.txt`"));
        assert!(write(&target.join("notes.txt"), 3).is_err());
        drop(FolderWriter::begin(&parent.path().join("c")).unwrap());
        let writer = FolderWriter::begin(&parent.path().join("c")).unwrap();
        let sequences = Folder::open(&parent.path().join("a/b")).unwrap().sequences().unwrap().0;
        let file = writer.sequences(&sequences, false, &|done| done < 1).unwrap();
        assert!(file.is_none(), "it was told to stop");
        drop(writer);
        assert_eq!(names(parent.path()), ["a"], "what is given up leaves nothing");
        assert_eq!(names(&target), [MANIFEST, "notes.txt", TRAIN]);
    }

    #[test]
    fn an_edited_or_missing_manifest_is_an_error_with_its_name() {
        let parent = tempfile::tempdir().unwrap();
        let target = parent.path().join("b");
        let message = || Folder::open(&target).unwrap_err().to_string();
        assert!(message().contains("holds no preprocessed data"), "{}", message());
        write(&target, 3).unwrap();
        let path = target.join(MANIFEST);
        let text = std::fs::read_to_string(&path).unwrap();
        for (edited, expected) in [
            (text.replace("\"max\": 3", "\"max\": 4"), "was edited"),
            (text[..text.len() / 2].to_string(), "is damaged"),
            ("[]".into(), "was edited"),
        ] {
            std::fs::write(&path, edited).unwrap();
            assert!(message().contains(expected) && message().contains(MANIFEST), "{}", message());
        }
    }
}
