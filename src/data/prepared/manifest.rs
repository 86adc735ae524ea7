//! `manifest.json` of a prepared folder: what its rows depend on, what became of them, which files they are in.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::AGAIN;
use super::fingerprint::{Fingerprint, SourceFile};
use super::records::FileEntry;
use super::summary::Summary;
use crate::data::Error;
use crate::data::fingerprint::RowsFingerprint;
use crate::data::mixture::Part;
use crate::fs;

/// Name of the file.
pub(super) const MANIFEST: &str = "manifest.json";
const VERSION: u32 = 1;
/// The field with the blake3 of all others.
const CHECKSUM: &str = "blake3";
/// The largest that is read.
const MOST_BYTES: u64 = 64 << 20;

/// One split.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SplitEntry {
    /// Where its records are.
    pub file: FileEntry,
    /// What became of its rows.
    pub summary: Summary,
    /// The rows, without those that were left out as duplicates.
    pub rows: RowsFingerprint,
}

/// What a prepared folder holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    version: u32,
    /// What the rows depend on.
    pub fingerprint: Fingerprint,
    /// The raw files that were read.
    pub sources: Vec<SourceFile>,
    /// What was taken of which data set, if there are several.
    pub parts: Vec<Part>,
    /// The training split.
    pub train: SplitEntry,
    /// The evaluation split, if there is one.
    pub eval: Option<SplitEntry>,
}

impl Manifest {
    /// A manifest of this version.
    pub fn new(
        fingerprint: Fingerprint,
        sources: Vec<SourceFile>,
        parts: Vec<Part>,
        train: SplitEntry,
        eval: Option<SplitEntry>,
    ) -> Self {
        Self { version: VERSION, fingerprint, sources, parts, train, eval }
    }

    /// Writes it into a folder.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(super) fn write(&self, folder: &Path) -> Result<(), Error> {
        let path = folder.join(MANIFEST);
        let failed = |e: serde_json::Error| Error::Content { path: path.clone(), problem: e.to_string() };
        let mut value = serde_json::to_value(self).map_err(failed)?;
        let checksum = checksum(&value);
        value[CHECKSUM] = checksum.into();
        let text = serde_json::to_vec_pretty(&value).map_err(failed)?;
        Ok(fs::write_atomic(&path, &text)?)
    }

    /// Reads that of a folder.
    ///
    /// # Errors
    /// If there is none, or it is damaged or of another version.
    pub(super) fn read(folder: &Path) -> Result<Self, Error> {
        let path = folder.join(MANIFEST);
        let problem = |problem: String| Error::Content { path: path.clone(), problem };
        let Some(bytes) = fs::read_bounded(&path, MOST_BYTES)? else {
            return Err(Error::Content {
                path: folder.into(),
                problem: format!(
                    "holds no preprocessed data (`{MANIFEST}` is not there); run `trainer preprocess`, or remove \
                     `preprocessed`"
                ),
            });
        };
        let mut value: Value =
            serde_json::from_slice(&bytes).map_err(|e| problem(format!("is damaged ({e}); {AGAIN}")))?;
        let written = value.as_object_mut().and_then(|fields| fields.shift_remove(CHECKSUM));
        if written != Some(checksum(&value).into()) {
            return Err(problem(format!("is damaged or was edited; {AGAIN}")));
        }
        if value.get("version") != Some(&VERSION.into()) {
            return Err(problem(format!("was written by another version of this program; {AGAIN}")));
        }
        serde_json::from_value(value).map_err(|e| problem(format!("is no manifest of this version ({e}); {AGAIN}")))
    }
}

fn checksum(value: &Value) -> String {
    blake3::hash(value.to_string().as_bytes()).to_hex().to_string()
}
