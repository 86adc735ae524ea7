//! One run at a time in an `output_dir`.
//!
//! The lock belongs to the process and not to the file: a run that was killed leaves the file and no lock.

use std::fs::{File, TryLockError};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};

use anyhow::bail;

use crate::fs::{io_error, is_at, open_own};

/// The file in `output_dir` that a run holds locked; it says which process that is.
const LOCK_FILE: &str = "run.lock";

/// An `output_dir` that is this run's until the value is dropped.
#[derive(Debug)]
pub(super) struct Lock {
    path: PathBuf,
    // Held open: closing it unlocks it, after `drop` has removed it.
    _file: File,
}

impl Lock {
    /// Takes `folder`, which is there.
    ///
    /// # Errors
    /// If another run has it, or the lock file cannot be written.
    pub(super) fn take(folder: &Path) -> anyhow::Result<Self> {
        let path = folder.join(LOCK_FILE);
        loop {
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(false);
            let mut file = open_own(&path, &mut options)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let mut process = String::new();
                    // Who has it is worth a word, and nothing is lost without.
                    let _ = file.read_to_string(&mut process);
                    let owner = match process.trim() {
                        "" => String::new(),
                        process => format!(" (process {process})"),
                    };
                    bail!(
                        "another run{owner} is writing to `output_dir: {}`; wait until it ends, stop it, or choose another \
                         folder",
                        folder.display()
                    );
                }
                Err(TryLockError::Error(error)) => tracing::warn!(
                    "`{}` cannot be locked here ({error}); see to it that no other run writes to this folder",
                    path.display()
                ),
            }
            // The run that had it may have removed the file after it was opened here.
            if is_at(&file, &path) {
                let process = format!("{}\n", std::process::id());
                file.set_len(0).and_then(|()| file.write_all(process.as_bytes())).map_err(io_error("write", &path))?;
                return Ok(Self { path, _file: file });
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // What stays behind says nothing without the lock.
        let _ = std::fs::remove_file(&self.path);
    }
}
