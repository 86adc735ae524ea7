//! Real kills at every change that a process makes to a folder.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Lets `command` be killed with SIGKILL just before its `at`-th change (from 1) to what is below `folder`.
pub(crate) fn kill_at<'a>(command: &'a mut Command, folder: &Path, at: usize) -> &'a mut Command {
    let folder = folder.canonicalize().unwrap();
    command.env("LD_PRELOAD", library()).env("TRAINER_TEST_KILL_IN", folder).env("TRAINER_TEST_KILL_AT", at.to_string())
}

/// The preloaded library, built once by this process.
fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/kill.c");
        let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("kill-{}.so", std::process::id()));
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(source).arg("-ldl");
        assert!(compiler.status().unwrap().success(), "the library that kills could not be built");
        library
    })
}
