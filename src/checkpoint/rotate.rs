//! Keeps the number of checkpoints within its limit and tidies up after runs that were killed.
//!
//! A folder about to be deleted is first renamed to a hidden name, so that a kill in between leaves no half checkpoint
//! under a name that [`super::find_latest`] looks at.

use std::path::{Path, PathBuf};

use super::{Error, MANIFEST, PREFIX, entries, folder, list};
use crate::fs::{self, io_error};

const REPLACED: &str = ".replaced";
const REMOVED: &str = ".removed";
const PARTIAL: &str = ".partial-";

/// What [`clean_up`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CleanedUp {
    /// Unfinished or half-deleted folders that were removed.
    pub removed: Vec<PathBuf>,
    /// Checkpoints that were put back: a kill fell between setting the old one aside and moving the new one in.
    pub restored: Vec<PathBuf>,
}

/// Removes what killed runs left in `output_dir`. Call once when a run starts, on rank 0, before any other use.
///
/// # Errors
/// If the folder cannot be listed or a leftover cannot be removed.
pub fn clean_up(output_dir: &Path) -> Result<CleanedUp, Error> {
    let mut cleaned = CleanedUp::default();
    for (name, path) in entries(output_dir)? {
        let Some((step, rest)) = hidden(&name) else { continue };
        let place = folder(output_dir, step);
        if rest == REPLACED && !place.exists() {
            std::fs::rename(&path, &place).map_err(io_error("rename to its place", &place))?;
            cleaned.restored.push(place);
        } else if rest == REPLACED || rest == REMOVED || rest.starts_with(PARTIAL) {
            std::fs::remove_dir_all(&path).map_err(io_error("remove the leftover", &path))?;
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
    let entries = entries(output_dir).ok()?;
    entries.iter().filter_map(|(name, _)| name.strip_prefix(PREFIX)?.parse().ok()).max()
}

/// Deletes every checkpoint of `output_dir`, for a run that starts anew there. Folders without a manifest are not ours and
/// stay.
///
/// # Errors
/// If one cannot be deleted.
pub fn remove_all(output_dir: &Path) -> Result<(), Error> {
    for (name, path) in entries(output_dir)? {
        let is_checkpoint = name.strip_prefix(PREFIX).is_some_and(|step| step.parse::<u64>().is_ok());
        if is_checkpoint && path.join(MANIFEST).is_file() {
            std::fs::remove_dir_all(&path).map_err(io_error("remove the checkpoint", &path))?;
        }
    }
    Ok(())
}

/// Splits `.checkpoint-12.partial-x` into 12 and `.partial-x`.
fn hidden(name: &str) -> Option<(u64, &str)> {
    let rest = name.strip_prefix('.')?.strip_prefix(PREFIX)?;
    let (step, _) = rest.split_once('.')?;
    Some((step.parse().ok()?, &rest[step.len()..]))
}

/// Moves a checkpoint that is in the way to a hidden name, and returns that.
pub(super) fn set_aside(path: &Path) -> Result<Option<PathBuf>, Error> {
    if !path.exists() {
        return Ok(None);
    }
    let aside = hidden_beside(path, REPLACED);
    if aside.exists() {
        std::fs::remove_dir_all(&aside).map_err(io_error("remove", &aside))?;
    }
    std::fs::rename(path, &aside).map_err(io_error("set aside", path))?;
    Ok(Some(aside))
}

/// Deletes the oldest checkpoints beyond `limit`, by step; never `newest`. Returns what was deleted.
pub(super) fn keep_newest(output_dir: &Path, limit: Option<usize>, newest: &Path) -> Vec<PathBuf> {
    let Some(limit) = limit else { return Vec::new() };
    let all = match list(output_dir) {
        Ok(all) => all,
        Err(error) => {
            tracing::warn!("old checkpoints stay: {error}");
            return Vec::new();
        }
    };
    let surplus = all.len().saturating_sub(limit.max(1));
    let oldest = all.into_iter().map(|(_, path)| path).filter(|path| path != newest).take(surplus);
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

/// Deletes a hidden folder; if that fails, the next start does it.
pub(super) fn discard(hidden: &Path) {
    if let Err(error) = std::fs::remove_dir_all(hidden) {
        tracing::warn!("cannot delete `{}`: {error}", hidden.display());
    }
}

fn hidden_beside(path: &Path, suffix: &str) -> PathBuf {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    path.with_file_name(format!(".{name}{suffix}"))
}
