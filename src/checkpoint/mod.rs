//! Checkpoints: folders that are either whole or absent.
//!
//! `output_dir/checkpoint-N` is written beside its place as `.checkpoint-N.partial-*`, every file is synced and listed
//! with its size and blake3 checksum in `manifest.json`, and the folder is renamed and its parent synced. A kill, a full
//! disk or a power cut at any moment leaves the earlier checkpoints as they were and at most a hidden folder, which
//! [`clean_up`] removes at the next start.
//!
//! [`Aside`] moves checkpoints and other files of a run that is replaced, or of a course that is left, out of the way as
//! one act.
//!
//! The ranks of a run write one checkpoint together: the first begins it and commits it, and each puts a file with its part of
//! the tensors there in between ([`PartsWriter`]). A checkpoint is read by any number of ranks, each of which takes the ranges that
//! it needs ([`Tensors`]).
//!
//! The training loops decide what is in a checkpoint; this room decides that it is all there. It knows files, JSON and
//! named f32 tensors, and no model.

mod aside;
mod manifest;
mod open;
mod parts;
mod rotate;
mod write;

pub use aside::{Aside, Fate, is_left_course, settle_earlier};
pub use manifest::{FORMAT_VERSION, FileEntry, Manifest};
pub use open::{Checkpoint, Found, Skipped, find_latest, open, open_compared};
pub use parts::{Part, PartsWriter, Tensors, Written};
pub use rotate::{CleanedUp, clean_up, keep_only, newest_step, num_written};
pub use write::{Committed, Place, Writer};

use std::path::{Component, Path, PathBuf};

/// What went wrong with a checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder could not be read or written.
    #[error(transparent)]
    File(#[from] crate::fs::Error),
    /// Something could not be turned into JSON.
    #[error("cannot write `{}` of the checkpoint as JSON: {source}", path.display())]
    ToJson {
        /// The file it was for.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// A JSON file is not what it should be.
    #[error("`{}` of the checkpoint cannot be read as JSON ({source}); resume from another checkpoint", path.display())]
    FromJson {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// A tensor file is not what it should be.
    #[error("cannot {action} the tensors of `{}`: {reason}", path.display())]
    Tensors {
        /// What was tried: `write` or `read`.
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A tensor's shape does not hold as many values as there are.
    #[error("tensor `{name}` has {values} values, its shape {shape:?} holds another number")]
    Shape {
        /// The tensor.
        name: String,
        /// Values given.
        values: usize,
        /// Shape given.
        shape: Vec<usize>,
    },
    /// A file name that cannot be one of a checkpoint.
    #[error("`{name}` cannot be a file of a checkpoint: {reason}")]
    Name {
        /// The name.
        name: String,
        /// Why not.
        reason: &'static str,
    },
    /// The journal of what is to be moved aside names something else.
    #[error(
        "`{}` names `{name}`, which is nothing that a run would move; delete the file, and then the folders of runs that you \
         do not want to go on from", path.display()
    )]
    Journal {
        /// The journal.
        path: PathBuf,
        /// What it names.
        name: String,
    },
    /// The manifest names a file outside of the checkpoint.
    #[error("`{}` lists `{name}`, which is not inside the checkpoint; resume from another checkpoint", path.display())]
    Outside {
        /// The manifest.
        path: PathBuf,
        /// The name.
        name: String,
    },
    /// The folder is not a checkpoint.
    #[error(
        "`{}` is not a checkpoint: it has no manifest.json; give a folder `checkpoint-N` that a run wrote",
        path.display()
    )]
    NoManifest {
        /// The folder.
        path: PathBuf,
    },
    /// The manifest is of another format.
    #[error("`{}` has checkpoint format {found}, this program reads {FORMAT_VERSION}; use the version that wrote it", path.display())]
    Format {
        /// The manifest.
        path: PathBuf,
        /// The version found.
        found: u32,
    },
    /// A file of the checkpoint is not as the manifest says.
    #[error("checkpoint `{}` is damaged: `{name}` {problem}; resume from another checkpoint or restore the file", path.display())]
    Damaged {
        /// The checkpoint.
        path: PathBuf,
        /// The file in it.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Ranks do not see the same folder.
    #[error(
        "`{}`, which another rank has written, is not there on this machine: every rank writes and reads a part of a checkpoint, so \
         `output_dir: {}` must be a folder that all nodes share; set it to one, or use `zero_stage: 0`, where the first rank \
         writes everything", missing.display(), path.display()
    )]
    NotShared {
        /// The folder that ranks should share.
        path: PathBuf,
        /// What is not there.
        missing: PathBuf,
    },
    /// A rank finds another checkpoint where the first has one.
    #[error(
        "`{}` is not the checkpoint that rank 0 goes on from: the machines have folders of their own there; give one that all \
         nodes share", path.display()
    )]
    Other {
        /// The checkpoint.
        path: PathBuf,
    },
    /// The checkpoint holds no file of this name.
    #[error("checkpoint `{}` holds no `{name}`; it was saved by another kind of run", path.display())]
    NoFile {
        /// The checkpoint.
        path: PathBuf,
        /// The file.
        name: String,
    },
}

const MANIFEST: &str = "manifest.json";
const PREFIX: &str = "checkpoint-";

/// The folder of the checkpoint of one step.
fn folder(output_dir: &Path, step: u64) -> PathBuf {
    output_dir.join(format!("{PREFIX}{step}"))
}

/// The step in the name of a checkpoint's folder.
fn step_of(name: &str) -> Option<u64> {
    let step = name.strip_prefix(PREFIX)?.parse().ok()?;
    // Not `checkpoint-+5` or `checkpoint-05`, which no run writes.
    (name.len() == PREFIX.len() + u64::to_string(&step).len()).then_some(step)
}

/// Whether a name that a file gives stays inside the folder it is joined to.
fn stays_inside(name: &str) -> bool {
    let is_plain = Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
    is_plain && !name.is_empty() && !name.contains(['\\', '\0'])
}

/// The folders of `output_dir` that are named as checkpoints, by step, ascending, whole or not.
fn list(output_dir: &Path) -> Result<Vec<(u64, PathBuf)>, Error> {
    let entries = entries(output_dir)?.into_iter().filter(|(_, path)| path.is_dir());
    let mut found: Vec<(u64, PathBuf)> = entries.filter_map(|(name, path)| Some((step_of(&name)?, path))).collect();
    found.sort();
    Ok(found)
}

/// Whether a run wrote the folder as a checkpoint, whole or damaged.
pub fn is_written(path: &Path) -> bool {
    path.join(MANIFEST).is_file()
}

/// The checkpoints in `output_dir` that a run wrote, whole or damaged, by step, ascending: folders with a manifest.
///
/// # Errors
/// If the folder cannot be listed.
pub fn written(output_dir: &Path) -> Result<Vec<(u64, PathBuf)>, Error> {
    Ok(list(output_dir)?.into_iter().filter(|(_, path)| is_written(path)).collect())
}

/// What is in `output_dir`, with names; nothing if it does not exist.
fn entries(output_dir: &Path) -> Result<Vec<(String, PathBuf)>, Error> {
    let reading = match std::fs::read_dir(output_dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        reading => reading.map_err(crate::fs::io_error("list", output_dir))?,
    };
    let mut found = Vec::new();
    for entry in reading {
        let entry = entry.map_err(crate::fs::io_error("list", output_dir))?;
        found.push((entry.file_name().to_string_lossy().into_owned(), entry.path()));
    }
    Ok(found)
}
