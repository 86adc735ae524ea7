//! The manifest: what a checkpoint consists of.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The format this program writes and reads.
pub const FORMAT_VERSION: u32 = 1;

/// `manifest.json` of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this file and of the folder's layout.
    pub format_version: u32,
    /// Version of the program that wrote it.
    pub trainer_version: String,
    /// When it was written, in UTC.
    pub created: String,
    /// Optimizer steps behind it.
    pub step: u64,
    /// Processes that wrote it.
    pub world_size: usize,
    /// Every file by its path inside the folder, with `/` between folders.
    pub files: BTreeMap<String, FileEntry>,
}

/// One file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Length in bytes.
    pub bytes: u64,
    /// Checksum in hexadecimal.
    pub blake3: String,
}

/// What every version of the manifest has: enough to say that a newer one cannot be read.
#[derive(Deserialize)]
pub(super) struct Version {
    pub(super) format_version: u32,
}
