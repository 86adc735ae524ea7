//! Moves what an `output_dir` holds out of the way, as one act.
//!
//! What is to be moved is first written to a journal, in one rename. From then on the old things are out of reach,
//! wherever a kill falls: the next start reads the journal before it looks at anything else and carries it out. A run that
//! fails before it began puts everything back.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::rotate::PARTIAL;
use super::{Error, stays_inside};
use crate::fs::{self, io_error};

const JOURNAL: &str = ".moving-aside.json";
/// No journal comes near this; a larger one is not one of ours.
const MOST_JOURNAL_BYTES: u64 = 16 << 20;
/// Where an older run lies until it is deleted.
pub(super) const REPLACED_RUN: &str = ".replaced-run";
/// What the name of a folder with a course that was left begins with; a number follows.
const LEFT_COURSE: &str = "abandoned-course-";

/// What becomes of what is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// An older run that a new one replaces: it is deleted.
    Deleted,
    /// A course that a run leaves: it is kept in a folder `abandoned-course-N`.
    Kept,
}

/// The journal.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Journal {
    fate: Fate,
    /// The folder inside `output_dir` that things are moved to.
    place: String,
    /// Paths inside `output_dir`, with `/` between folders.
    moved: Vec<String>,
    /// The same, of which a copy is kept.
    copied: Vec<String>,
}

/// Things that were moved aside. Dropped without [`Aside::settle`], they are put back.
#[derive(Debug)]
pub struct Aside {
    output_dir: PathBuf,
    journal: Journal,
    is_settled: bool,
}

impl Aside {
    /// Moves `moved` and copies `copied`, paths inside `output_dir`, into one folder; names that are not there are left out.
    ///
    /// # Errors
    /// If a name leaves the folder, or something cannot be moved; all is then where it was.
    pub fn begin(output_dir: &Path, fate: Fate, moved: Vec<String>, copied: Vec<String>) -> Result<Self, Error> {
        let place = match fate {
            Fate::Deleted => REPLACED_RUN.to_string(),
            Fate::Kept => first_free(output_dir),
        };
        let journal = Journal { fate, place, moved, copied };
        check(&journal, &output_dir.join(JOURNAL))?;
        let path = output_dir.join(JOURNAL);
        let text = serde_json::to_vec(&journal).map_err(|source| Error::ToJson { path: path.clone(), source })?;
        fs::write_atomic(&path, &text)?;
        // From here on dropping puts everything back.
        let aside = Self { output_dir: output_dir.into(), journal, is_settled: false };
        aside.carry_out()?;
        Ok(aside)
    }

    /// The folder that things were moved to.
    pub fn place(&self) -> PathBuf {
        self.output_dir.join(&self.journal.place)
    }

    /// Makes it final: what is to be deleted is deleted.
    ///
    /// # Errors
    /// If the journal cannot be removed. What cannot be deleted is a warning; the next start tries again.
    pub fn settle(mut self) -> Result<(), Error> {
        self.is_settled = true;
        let journal = self.output_dir.join(JOURNAL);
        std::fs::remove_file(&journal).map_err(io_error("remove", &journal))?;
        fs::sync_folder(&self.output_dir)?;
        if self.journal.fate == Fate::Deleted {
            super::rotate::discard(&self.place());
        }
        Ok(())
    }

    fn carry_out(&self) -> Result<(), Error> {
        let place = self.place();
        std::fs::create_dir_all(&place).map_err(io_error("create the folder", &place))?;
        for name in &self.journal.copied {
            let (from, to) = (self.output_dir.join(name), place.join(name));
            if is_there(&from) && !is_there(&to) {
                remove_half_copies(&to)?;
                fs::copy(&from, &to)?;
            }
        }
        for name in &self.journal.moved {
            let (from, to) = (self.output_dir.join(name), place.join(name));
            if is_there(&from) {
                create_parent(&to)?;
                std::fs::rename(&from, &to).map_err(io_error("move aside", &from))?;
                remove_empty_parent(&self.output_dir, name);
            }
        }
        fs::sync_folder(&place)?;
        Ok(fs::sync_folder(&self.output_dir)?)
    }

    fn put_back(&self) -> Result<(), Error> {
        let place = self.place();
        for name in &self.journal.moved {
            let (from, to) = (place.join(name), self.output_dir.join(name));
            if is_there(&from) && !is_there(&to) {
                create_parent(&to)?;
                std::fs::rename(&from, &to).map_err(io_error("put back", &to))?;
            }
        }
        // What is left are copies.
        std::fs::remove_dir_all(&place).map_err(io_error("remove", &place))?;
        let journal = self.output_dir.join(JOURNAL);
        std::fs::remove_file(&journal).map_err(io_error("remove", &journal))?;
        Ok(fs::sync_folder(&self.output_dir)?)
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        if self.is_settled {
            return;
        }
        if let Err(error) = self.put_back() {
            tracing::warn!("what was moved to `{}` could not all be put back: {error}", self.place().display());
        }
    }
}

/// Carries out what a killed run left in its journal; returns the folder of a course that is kept.
///
/// # Errors
/// If the journal is not one, or something cannot be moved.
pub fn settle_earlier(output_dir: &Path) -> Result<Option<PathBuf>, Error> {
    let path = output_dir.join(JOURNAL);
    let Some(text) = fs::read_bounded(&path, MOST_JOURNAL_BYTES)? else { return Ok(None) };
    let journal: Journal =
        serde_json::from_slice(&text).map_err(|source| Error::FromJson { path: path.clone(), source })?;
    check(&journal, &path)?;
    // Nothing is put back here: the run that wrote the journal had asked for it.
    let aside = Aside { output_dir: output_dir.into(), journal, is_settled: true };
    aside.carry_out()?;
    let kept = (aside.journal.fate == Fate::Kept).then(|| aside.place());
    aside.settle()?;
    Ok(kept)
}

/// Whether this is the name of a folder that [`Fate::Kept`] makes.
pub fn is_left_course(name: &str) -> bool {
    name.strip_prefix(LEFT_COURSE).is_some_and(|number| number.parse::<u64>().is_ok())
}

/// Refuses a journal that would move something that is not in the folder.
fn check(journal: &Journal, path: &Path) -> Result<(), Error> {
    let is_place = match journal.fate {
        Fate::Deleted => journal.place == REPLACED_RUN,
        Fate::Kept => is_left_course(&journal.place),
    };
    let names = journal.moved.iter().chain(&journal.copied);
    let wrong = names.filter(|name| !stays_inside(name)).chain((!is_place).then_some(&journal.place)).next();
    match wrong {
        None => Ok(()),
        Some(name) => Err(Error::Journal { path: path.into(), name: name.clone() }),
    }
}

/// The first folder of its kind that is not there.
fn first_free(output_dir: &Path) -> String {
    let mut number = 1;
    while is_there(&output_dir.join(format!("{LEFT_COURSE}{number}"))) {
        number += 1;
    }
    format!("{LEFT_COURSE}{number}")
}

/// Whether something has this name, a link that leads nowhere included.
fn is_there(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// Removes what a killed run left of a copy beside `path`.
fn remove_half_copies(path: &Path) -> Result<(), Error> {
    for (name, half) in path.parent().map(super::entries).transpose()?.unwrap_or_default() {
        if name.starts_with(PARTIAL) {
            std::fs::remove_file(&half).map_err(io_error("remove the leftover", &half))?;
        }
    }
    Ok(())
}

fn create_parent(path: &Path) -> Result<(), Error> {
    let Some(parent) = path.parent() else { return Ok(()) };
    Ok(std::fs::create_dir_all(parent).map_err(io_error("create the folder", parent))?)
}

/// A folder whose last file was moved goes too; one that holds something else stays.
fn remove_empty_parent(output_dir: &Path, name: &str) {
    if let Some((parent, _)) = name.rsplit_once('/') {
        // Fails where it is not empty.
        let _ = std::fs::remove_dir(output_dir.join(parent));
    }
}
