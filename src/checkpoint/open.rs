//! Opens checkpoints and finds the newest whole one.

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::de::DeserializeOwned;

use super::manifest::{FORMAT_VERSION, FileEntry, Manifest, Version};
use super::parts::Tensors;
use super::{Error, MANIFEST, list, stays_inside};
use crate::fs::{self, io_error};

/// A manifest lists some ten files, and one a rank; a larger one than this is not read.
const MOST_MANIFEST_BYTES: u64 = 16 << 20;

/// Beyond this a state is not one: that of a generation batch takes some hundred bytes a token.
const MOST_JSON_BYTES: u64 = 4 << 30;

/// A whole checkpoint: every file was compared with the manifest when it was opened.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    path: PathBuf,
    manifest: Manifest,
    /// Checksum of the manifest itself.
    identity: String,
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
    let checkpoint = read_manifest(path)?;
    // One reader rarely keeps a disk busy. The first by name that is damaged is told.
    let files: Vec<(&String, &FileEntry)> = checkpoint.manifest.files.iter().collect();
    let compared: Vec<_> = files.into_par_iter().map(|(name, entry)| compare(path, name, entry, true)).collect();
    compared.into_iter().collect::<Result<(), Error>>()?;
    Ok(checkpoint)
}

/// Opens a checkpoint that another rank has compared with its manifest, and of which it says [`Checkpoint::identity`]: only the
/// lengths of files are compared again.
///
/// # Errors
/// If it is not the same checkpoint, or a file is missing or cut short.
pub fn open_compared(path: &Path, identity: &str) -> Result<Checkpoint, Error> {
    let checkpoint = read_manifest(path)?;
    if checkpoint.identity != identity {
        return Err(Error::Other { path: path.into() });
    }
    checkpoint.manifest.files.iter().try_for_each(|(name, entry)| compare(path, name, entry, false))?;
    Ok(checkpoint)
}

fn read_manifest(path: &Path) -> Result<Checkpoint, Error> {
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
    Ok(Checkpoint { path: path.into(), manifest, identity: blake3::hash(&text).to_hex().to_string() })
}

/// Compares a file with what the manifest says of it.
fn compare(path: &Path, name: &str, entry: &FileEntry, with_content: bool) -> Result<(), Error> {
    let damaged = |problem: String| Error::Damaged { path: path.into(), name: name.into(), problem };
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
    if with_content && fs::checksum(&file)?.0 != entry.blake3 {
        return Err(damaged("has other content than when it was saved (checksums differ)".into()));
    }
    Ok(())
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

impl Checkpoint {
    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Optimizer steps behind it.
    pub fn step(&self) -> u64 {
        self.manifest.step
    }

    /// By which ranks know that they have opened the same one.
    pub fn identity(&self) -> &str {
        &self.identity
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

    /// The f32 tensors of some of its files, of which each may hold parts; values are read when they are asked for.
    ///
    /// # Errors
    /// If there is none of such a name, it is not a safetensors file of f32 tensors, or a tensor is not all there.
    pub fn tensors(&self, names: &[String]) -> Result<Tensors, Error> {
        Tensors::open(self, names)
    }
}
