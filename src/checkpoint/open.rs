//! Opens checkpoints and finds the newest whole one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::de::DeserializeOwned;

use super::manifest::{FORMAT_VERSION, Manifest, Version};
use super::{Error, MANIFEST, list, stays_inside};
use crate::fs::{self, io_error};

/// A manifest lists some ten files; a larger one than this is not read.
const MOST_MANIFEST_BYTES: u64 = 16 << 20;

/// Beyond this a state is not one: that of a generation batch takes some hundred bytes a token.
const MOST_JSON_BYTES: u64 = 4 << 30;

/// A whole checkpoint: every file was compared with the manifest when it was opened.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    path: PathBuf,
    manifest: Manifest,
}

/// One tensor read back from a checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredTensor {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values, row-major.
    pub values: Vec<f32>,
}

/// The newest whole checkpoint of a run, and newer ones that are not whole.
#[derive(Debug, Default)]
pub struct Found {
    /// The newest whole one; `None` if there is none.
    pub checkpoint: Option<Checkpoint>,
    /// Newer folders that were passed over, newest first.
    pub skipped: Vec<Skipped>,
}

/// A folder that was passed over.
#[derive(Debug)]
pub struct Skipped {
    /// Which folder.
    pub path: PathBuf,
    /// Why.
    pub reason: Error,
}

/// Opens a checkpoint and compares every file with the manifest.
///
/// # Errors
/// If it is not a checkpoint, is of another format, or a file is missing, cut short or changed; the message names it.
pub fn open(path: &Path) -> Result<Checkpoint, Error> {
    let manifest_path = path.join(MANIFEST);
    if path.is_dir() && !manifest_path.exists() {
        return Err(Error::NoManifest { path: path.into() });
    }
    let Some(text) = fs::read_bounded(&manifest_path, MOST_MANIFEST_BYTES)? else {
        return Err(Error::NoManifest { path: path.into() });
    };
    let not_json = |source| Error::FromJson { path: manifest_path.clone(), source };
    let Version { format_version } = serde_json::from_slice(&text).map_err(not_json)?;
    if format_version != FORMAT_VERSION {
        return Err(Error::Format { path: manifest_path, found: format_version });
    }
    let manifest: Manifest = serde_json::from_slice(&text).map_err(not_json)?;
    if let Some(name) = manifest.files.keys().find(|name| !stays_inside(name)) {
        return Err(Error::Outside { path: manifest_path, name: name.clone() });
    }
    for (name, entry) in &manifest.files {
        let damaged = |problem: String| Error::Damaged { path: path.into(), name: name.clone(), problem };
        let file = path.join(name);
        let length = match std::fs::metadata(&file) {
            Ok(metadata) if metadata.is_file() => metadata.len(),
            Ok(_) => return Err(damaged("is no ordinary file".into())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(damaged("is missing".into())),
            Err(error) => return Err(io_error("read", &file)(error).into()),
        };
        if length != entry.bytes {
            return Err(damaged(format!("has {length} bytes, the manifest says {}", entry.bytes)));
        }
        if fs::checksum(&file)?.0 != entry.blake3 {
            return Err(damaged("has other content than when it was saved (checksums differ)".into()));
        }
    }
    Ok(Checkpoint { path: path.into(), manifest })
}

/// Looks for the newest whole checkpoint in `output_dir`; damaged newer ones are passed over and listed.
///
/// # Errors
/// If the folder cannot be listed.
pub fn find_latest(output_dir: &Path) -> Result<Found, Error> {
    let mut found = Found::default();
    for (_, path) in list(output_dir)?.into_iter().rev() {
        match open(&path) {
            Ok(checkpoint) => {
                found.checkpoint = Some(checkpoint);
                break;
            }
            Err(reason) => found.skipped.push(Skipped { path, reason }),
        }
    }
    Ok(found)
}

/// The header of a safetensors file and what it describes: eight bytes of length come first.
fn split(all: &fs::Region) -> Option<(fs::Region, fs::Region)> {
    const LENGTH: usize = 8;
    const MOST_HEADER_BYTES: usize = 100_000_000;
    let length = all.slice(0..LENGTH)?.read().ok()?;
    let length = u64::from_le_bytes(*length.as_chunks::<LENGTH>().0.first()?);
    let end = LENGTH + usize::try_from(length).ok().filter(|&length| length <= MOST_HEADER_BYTES)?;
    Some((all.slice(LENGTH..end)?, all.slice(end..all.len())?))
}

impl Checkpoint {
    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Optimizer steps behind it.
    pub fn step(&self) -> u64 {
        self.manifest.step
    }

    /// What it consists of.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Whether it holds a file of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.manifest.files.contains_key(name)
    }

    /// The path of one of its files.
    ///
    /// # Errors
    /// If the manifest does not list it.
    pub fn file(&self, name: &str) -> Result<PathBuf, Error> {
        if !self.contains(name) {
            return Err(Error::NoFile { path: self.path.clone(), name: name.into() });
        }
        Ok(self.path.join(name))
    }

    /// Reads a JSON file.
    ///
    /// # Errors
    /// If there is none of this name or it does not have the form of `T`.
    pub fn json<T: DeserializeOwned>(&self, name: &str) -> Result<T, Error> {
        let path = self.file(name)?;
        let no_file = || Error::NoFile { path: self.path.clone(), name: name.into() };
        let text = fs::read_bounded(&path, MOST_JSON_BYTES)?.ok_or_else(no_file)?;
        serde_json::from_slice(&text).map_err(|source| Error::FromJson { path, source })
    }

    /// Reads a file of f32 tensors one by one, in the order of their names.
    ///
    /// # Errors
    /// If there is none of this name, it is not a safetensors file, or a tensor is not f32; or what `visit` returns.
    pub fn read_tensors<E: From<Error>>(
        &self,
        name: &str,
        mut visit: impl FnMut(StoredTensor) -> Result<(), E>,
    ) -> Result<(), E> {
        let path = self.file(name)?;
        let wrong = |reason: String| Error::Tensors { action: "read", path: path.clone(), reason };
        let all = fs::Region::open(&path).map_err(Error::from)?;
        let (header, data) = split(&all).ok_or_else(|| wrong("it does not begin with a header".into()))?;
        let header = header.read().map_err(Error::from)?;
        let metadata: Metadata = serde_json::from_slice(&header).map_err(|error| wrong(error.to_string()))?;
        let tensors: BTreeMap<_, _> = metadata.tensors().into_iter().collect();
        if tensors.values().map(|info| info.data_offsets.1).max().unwrap_or(0) != data.len() {
            return Err(wrong(format!("its {} bytes are not as many as its header lists", all.len())).into());
        }
        for (name, info) in tensors {
            if info.dtype != Dtype::F32 {
                return Err(wrong(format!("`{name}` is {:?}, f32 was expected", info.dtype)).into());
            }
            let (from, to) = info.data_offsets;
            let region = data.slice(from..to).ok_or_else(|| wrong(format!("`{name}` is not all there")))?;
            let bytes = region.read().map_err(Error::from)?;
            let (chunks, _) = bytes.as_chunks::<4>();
            let values = chunks.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
            visit(StoredTensor { name, shape: info.shape.clone(), values })?;
        }
        Ok(())
    }

    /// Reads all f32 tensors of a file, in the order of their names.
    ///
    /// # Errors
    /// As [`Checkpoint::read_tensors`].
    pub fn tensors(&self, name: &str) -> Result<Vec<StoredTensor>, Error> {
        let mut all = Vec::new();
        self.read_tensors(name, |tensor| {
            all.push(tensor);
            Ok::<(), Error>(())
        })?;
        Ok(all)
    }
}
