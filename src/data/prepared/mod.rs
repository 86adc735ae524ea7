//! Rows made ready for training once, by `trainer preprocess`, and read by every run after it.
//!
//! A folder has a file of records for each split and `manifest.json`, which says what they were made from ([`Manifest`]).
//! A run opens it in a time that does not depend on the number of rows: it looks at the manifest, and at the head and the
//! foot of each file. A record is read when a batch needs it, and compared with its checksum then. Files are read, not
//! mapped, as everywhere here: one that is cut short under a run is an error with its name.
//!
//! | file | what it has |
//! | --- | --- |
//! | `records` | the file of records: layout, writing, reading |
//! | `sequences`, `prompts` | what the loops draw from, made now or read back; what a record is |
//! | `summary` | counts that a run's plan shows |
//! | `fingerprint` | what the content depends on, and how it differs from a run's |
//! | `manifest`, `folder` | the manifest; the folder, which is whole or absent |

mod bytes;
mod fingerprint;
mod folder;
mod manifest;
mod prompts;
mod records;
mod sequences;
mod summary;

pub use fingerprint::{Fingerprint, SourceFile};
pub use folder::{Folder, FolderWriter};
pub use manifest::{Manifest, SplitEntry};
pub use prompts::Prompts;
pub use records::FileEntry;
pub use sequences::Sequences;
pub use summary::Summary;

/// What to do about a file that is not as it was written.
const AGAIN: &str = "run `trainer preprocess` again";
