//! A file of records that are read one at a time, by number.
//!
//! | part | bytes |
//! | --- | --- |
//! | head | 8 of magic, version `u32`, kind `u32` |
//! | records | their bodies, one after another |
//! | index | per record 16: where its body ends `u64`, its checksum `u64` |
//! | foot | number of records `u64`, where the index starts `u64`, blake3 of all before the foot (32), checksum of the foot so far `u64`, 8 of magic |
//!
//! All numbers are little-endian. A record's checksum is the beginning of the blake3 of its number and its body.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::AGAIN;
use crate::data::Error;
use crate::fs::{Bytes, Region, io_error};

const MAGIC: [u8; 8] = *b"trnrrows";
const VERSION: u32 = 1;
const HEAD: usize = 16;
const ENTRY: usize = 16;
const FOOT: usize = 64;

/// What the records of a file are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    /// Sequences to learn.
    Sequences = 1,
    /// Prompts to answer.
    Prompts = 2,
}

/// A file as a manifest knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its name in the folder.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// Its records.
    pub records: u64,
    /// The blake3 of all of it but the last 64 bytes, where it stands as well.
    pub blake3: String,
}

fn first_word(hash: blake3::Hash) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *hash.as_bytes();
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

fn checksum(record: u64, body: &[u8]) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&record.to_le_bytes()).update(body);
    first_word(hasher.finalize())
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let word = bytes.get(at..).and_then(|rest| rest.first_chunk());
    word.map_or(0, |&word| u64::from_le_bytes(word))
}

/// Writes a file of records.
pub(super) struct RecordWriter {
    path: PathBuf,
    file: BufWriter<File>,
    hasher: blake3::Hasher,
    at: u64,
    /// End and checksum of each record.
    entries: Vec<(u64, u64)>,
}

impl RecordWriter {
    /// Begins a file that was not there.
    ///
    /// # Errors
    /// If it cannot be created or written to.
    pub(super) fn create(path: &Path, kind: Kind) -> Result<Self, Error> {
        let file = File::create_new(path).map_err(io_error("create", path))?;
        let file = BufWriter::with_capacity(1 << 20, file);
        let mut writer = Self { path: path.into(), file, hasher: blake3::Hasher::new(), at: 0, entries: Vec::new() };
        writer.put(&MAGIC)?;
        writer.put(&VERSION.to_le_bytes())?;
        writer.put(&(kind as u32).to_le_bytes())?;
        Ok(writer)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.hasher.update(bytes);
        self.at += bytes.len() as u64;
        Ok(self.file.write_all(bytes).map_err(io_error("write", &self.path))?)
    }

    /// Appends a record.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(super) fn push(&mut self, body: &[u8]) -> Result<(), Error> {
        self.put(body)?;
        self.entries.push((self.at, checksum(self.entries.len() as u64, body)));
        Ok(())
    }

    /// Ends the file and makes it durable.
    ///
    /// # Errors
    /// If it cannot be written or synced.
    pub(super) fn finish(mut self) -> Result<FileEntry, Error> {
        let (entries, index) = (std::mem::take(&mut self.entries), self.at);
        for (end, checksum) in &entries {
            self.put(&end.to_le_bytes())?;
            self.put(&checksum.to_le_bytes())?;
        }
        let hash = self.hasher.finalize();
        let mut foot = Vec::with_capacity(FOOT);
        foot.extend((entries.len() as u64).to_le_bytes());
        foot.extend(index.to_le_bytes());
        foot.extend(hash.as_bytes());
        foot.extend(first_word(blake3::hash(&foot)).to_le_bytes());
        foot.extend(MAGIC);
        self.put(&foot)?;
        let file = self.file.into_inner().map_err(|e| io_error("write", &self.path)(e.into_error()))?;
        file.sync_all().map_err(io_error("sync", &self.path))?;
        let name = self.path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(FileEntry { name, bytes: self.at, records: entries.len() as u64, blake3: hash.to_hex().to_string() })
    }
}

/// A file of records that is open.
#[derive(Clone, Debug)]
pub(super) struct RecordFile {
    path: PathBuf,
    all: Region,
    records: usize,
    index: usize,
    blake3: String,
}

impl RecordFile {
    /// Opens a file and looks at its head and foot.
    ///
    /// # Errors
    /// If it cannot be read, is cut short, or is something else.
    pub(super) fn open(path: &Path, kind: Kind) -> Result<Self, Error> {
        let all = Region::open(path)?;
        let damaged = |what: &str| Error::Content { path: path.into(), problem: format!("{what}; {AGAIN}") };
        let short = || damaged("is cut short");
        let read = |start: Option<usize>, count: usize| {
            let range = start.and_then(|start| Some(start..start.checked_add(count)?));
            range.and_then(|range| all.slice(range)).ok_or_else(short)?.read().map_err(Error::from)
        };
        let head = read(Some(0), HEAD)?;
        if head[..8] != MAGIC {
            return Err(damaged("is no file of `trainer preprocess`"));
        }
        if head[8..12] != VERSION.to_le_bytes() {
            return Err(damaged("was written by another version of this program"));
        }
        if head[12..] != (kind as u32).to_le_bytes() {
            return Err(damaged("was made for another task"));
        }
        let foot = read(all.len().checked_sub(FOOT), FOOT)?;
        if foot[56..] != MAGIC || word(&foot, 48) != first_word(blake3::hash(&foot[..48])) {
            return Err(damaged("is cut short or damaged at its end"));
        }
        let (records, index) = (word(&foot, 0), word(&foot, 8));
        let length = records.checked_mul(ENTRY as u64).and_then(|bytes| bytes.checked_add(index));
        if index < HEAD as u64 || length.and_then(|end| end.checked_add(FOOT as u64)) != Some(all.len() as u64) {
            return Err(damaged("has another length than it was written with"));
        }
        let hash: [u8; 32] = foot[16..48].try_into().unwrap_or_default();
        let blake3 = blake3::Hash::from_bytes(hash).to_hex().to_string();
        Ok(Self { path: path.into(), all, records: records as usize, index: index as usize, blake3 })
    }

    /// Opens the file of a manifest in `folder`.
    ///
    /// # Errors
    /// As [`RecordFile::open`], and if the file is not the one that the manifest was written with.
    pub(super) fn open_entry(folder: &Path, entry: &FileEntry, kind: Kind) -> Result<Self, Error> {
        let path = folder.join(&entry.name);
        let file = Self::open(&path, kind)?;
        let is_same =
            (file.all.len() as u64, file.records as u64, &file.blake3) == (entry.bytes, entry.records, &entry.blake3);
        if !is_same {
            let problem = format!("is not the file that `manifest.json` beside it was written with; {AGAIN}");
            return Err(Error::Content { path, problem });
        }
        Ok(file)
    }

    /// Number of records.
    pub(super) fn len(&self) -> usize {
        self.records
    }

    /// The body of a record.
    ///
    /// # Errors
    /// If there is no such record, it cannot be read, or it is not what was written.
    pub(super) fn read(&self, record: usize) -> Result<Bytes, Error> {
        let damaged = || self.damaged(record);
        let range = self.range(record)?;
        let body = self.all.slice(range.0..range.1).ok_or_else(damaged)?.read()?;
        if checksum(record as u64, &body) != range.2 {
            return Err(damaged());
        }
        Ok(body)
    }

    /// Start, end and checksum of a record.
    fn range(&self, record: usize) -> Result<(usize, usize, u64), Error> {
        let damaged = || self.damaged(record);
        if record >= self.records {
            return Err(damaged());
        }
        // The entry before says where it starts.
        let (first, count) = if record == 0 { (0, 1) } else { (record - 1, 2) };
        let at = self.index + first * ENTRY;
        let entries = self.all.slice(at..at + count * ENTRY).ok_or_else(damaged)?.read()?;
        let own = (count - 1) * ENTRY;
        let start = if record == 0 { HEAD as u64 } else { word(&entries, 0) };
        let (end, checksum) = (word(&entries, own), word(&entries, own + 8));
        if start < HEAD as u64 || start > end || end > self.index as u64 {
            return Err(damaged());
        }
        Ok((start as usize, end as usize, checksum))
    }

    /// The error of a record that is not what was written.
    pub(super) fn damaged(&self, record: usize) -> Error {
        let problem = format!("record {record} of {} is damaged; {AGAIN}", self.records);
        Error::Content { path: self.path.clone(), problem }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn write(path: &Path, bodies: &[Vec<u8>]) -> FileEntry {
        let _ = std::fs::remove_file(path);
        let mut writer = RecordWriter::create(path, Kind::Prompts).unwrap();
        bodies.iter().for_each(|body| writer.push(body).unwrap());
        writer.finish().unwrap()
    }

    /// All records, or what is wrong.
    fn read(path: &Path) -> Result<Vec<Vec<u8>>, String> {
        let file = RecordFile::open(path, Kind::Prompts).map_err(|e| e.to_string())?;
        (0..file.len()).map(|i| file.read(i).map(|body| body.to_vec()).map_err(|e| e.to_string())).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn records_come_back_and_any_change_of_a_byte_or_the_length_is_noticed(
            bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..12),
            places in prop::collection::vec(any::<prop::sample::Index>(), 8),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("rows.bin");
            let entry = write(&path, &bodies);
            prop_assert_eq!(read(&path), Ok(bodies));
            let whole = std::fs::read(&path).unwrap();
            prop_assert_eq!(entry.bytes, whole.len() as u64);
            prop_assert_eq!(entry.blake3, blake3::hash(&whole[..whole.len() - FOOT]).to_hex().to_string());
            for place in places {
                let at = place.index(whole.len());
                let mut changed = whole.clone();
                changed[at] ^= 1 << (at % 8);
                std::fs::write(&path, &changed).unwrap();
                let error = read(&path).unwrap_err();
                prop_assert!(error.contains("rows.bin") && error.contains("trainer preprocess"), "{}", error);
                std::fs::write(&path, &whole[..at]).unwrap();
                prop_assert!(read(&path).is_err());
            }
        }
    }

    #[test]
    fn a_file_that_is_whole_but_another_one_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.bin");
        let entry = write(&path, &[vec![1, 2, 3]]);
        assert!(RecordFile::open_entry(folder.path(), &entry, Kind::Prompts).is_ok());
        let message = |result: Result<RecordFile, Error>| result.unwrap_err().to_string();
        let text = message(RecordFile::open_entry(folder.path(), &entry, Kind::Sequences));
        assert!(text.contains("made for another task"), "{text}");
        write(&path, &[vec![1, 2, 4]]);
        let text = message(RecordFile::open_entry(folder.path(), &entry, Kind::Prompts));
        assert!(text.contains("is not the file that `manifest.json`"), "{text}");
        let file = RecordFile::open(&path, Kind::Prompts).unwrap();
        assert!(file.read(1).unwrap_err().to_string().contains("record 1 of 1"));
    }
}
