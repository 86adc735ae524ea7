//! Keeps the number of checkpoints within its limit and tidies up after runs that were killed.
//!
//! A folder about to be deleted is first renamed to a hidden name, so that a kill in between leaves no half checkpoint
//! under a name that [`super::find_latest`] looks at.

use std::path::{Path, PathBuf};

use super::aside::REPLACED_RUN;
use super::{Error, PREFIX, entries, folder, list, written};
use crate::fs::{self, io_error};

const REPLACED: &str = ".replaced";
const REMOVED: &str = ".removed";
pub(super) const PARTIAL: &str = ".partial-";

/// What [`clean_up`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CleanedUp {
    /// Unfinished or half-deleted folders that were removed.
    pub removed: Vec<PathBuf>,
    /// Checkpoints that were put back: a kill fell between setting the old one aside and moving the new one in.
    pub restored: Vec<PathBuf>,
}

/// Removes what killed runs left in `output_dir`. Call once when a run starts, on rank 0, after
/// [`super::settle_earlier`] and before any other use.
///
/// # Errors
/// If the folder cannot be listed or a leftover cannot be removed.
pub fn clean_up(output_dir: &Path) -> Result<CleanedUp, Error> {
    let mut cleaned = CleanedUp::default();
    for (name, path) in entries(output_dir)? {
        let is_leftover = match hidden(&name) {
            Some((step, REPLACED)) if path.is_dir() && !folder(output_dir, step).exists() => {
                let place = folder(output_dir, step);
                std::fs::rename(&path, &place).map_err(io_error("rename to its place", &place))?;
                cleaned.restored.push(place);
                false
            }
            Some((_, rest)) => rest == REPLACED || rest == REMOVED || rest.starts_with(PARTIAL),
            None => name.starts_with(PARTIAL) || name == REPLACED_RUN,
        };
        if is_leftover {
            remove(&path).map_err(io_error("remove the leftover", &path))?;
            cleaned.removed.push(path);
        }
    }
    if cleaned != CleanedUp::default() {
        fs::sync_folder(output_dir)?;
    }
    Ok(cleaned)
}

/// The step of the newest checkpoint by name, whole or not; `None` where there is none or the folder cannot be read.
pub fn newest_step(output_dir: &Path) -> Option<u64> {
    list(output_dir).ok()?.last().map(|(step, _)| *step)
}

/// Splits `.checkpoint-12.partial-x` into 12 and `.partial-x`.
fn hidden(name: &str) -> Option<(u64, &str)> {
    let rest = name.strip_prefix('.')?.strip_prefix(PREFIX)?;
    let (step, _) = rest.split_once('.')?;
    Some((step.parse().ok()?, &rest[step.len()..]))
}

/// Moves a checkpoint that is in the way to a hidden name, and returns that.
pub(super) fn set_aside(path: &Path) -> Result<Option<PathBuf>, Error> {
    // A link counts, even one that leads nowhere.
    if path.symlink_metadata().is_err() {
        return Ok(None);
    }
    let aside = hidden_beside(path, REPLACED);
    if aside.symlink_metadata().is_ok() {
        remove(&aside).map_err(io_error("remove", &aside))?;
    }
    std::fs::rename(path, &aside).map_err(io_error("set aside", path))?;
    Ok(Some(aside))
}

/// Deletes the oldest checkpoints beyond `limit`, by step; never one of `kept`. Returns what was deleted.
pub(super) fn keep_newest(output_dir: &Path, limit: Option<usize>, kept: &[PathBuf]) -> Vec<PathBuf> {
    let Some(limit) = limit else { return Vec::new() };
    let all = match written(output_dir) {
        Ok(all) => all,
        Err(error) => {
            tracing::warn!("old checkpoints stay: {error}");
            return Vec::new();
        }
    };
    let num_kept = all.iter().filter(|(_, path)| kept.contains(path)).count();
    let surplus = all.len().saturating_sub(limit.max(num_kept));
    let oldest = all.into_iter().map(|(_, path)| path).filter(|path| !kept.contains(path)).take(surplus);
    let mut removed = Vec::new();
    for path in oldest {
        let going = hidden_beside(&path, REMOVED);
        if let Err(error) = std::fs::rename(&path, &going) {
            tracing::warn!("cannot delete the old checkpoint `{}`: {error}", path.display());
            continue;
        }
        discard(&going);
        removed.push(path);
    }
    removed
}

/// Checkpoints that are there.
pub fn num_written(output_dir: &Path) -> usize {
    written(output_dir).map_or(0, |all| all.len())
}

/// Deletes every checkpoint but that of one step.
pub fn keep_only(output_dir: &Path, step: u64) {
    keep_newest(output_dir, Some(1), &[folder(output_dir, step)]);
}

/// Removes a folder, a file, or a link as a link: nothing behind it is touched.
fn remove(path: &Path) -> std::io::Result<()> {
    if path.symlink_metadata()?.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) }
}

/// Deletes what was renamed to a hidden name; if that fails, the next start does it.
pub(super) fn discard(hidden: &Path) {
    if let Err(error) = remove(hidden) {
        tracing::warn!("cannot delete `{}`: {error}", hidden.display());
    }
}

fn hidden_beside(path: &Path, suffix: &str) -> PathBuf {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    path.with_file_name(format!(".{name}{suffix}"))
}
