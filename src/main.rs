//! The `trainer` binary: starts the command line on a thread with room for deep recursion and maps its end to an exit
//! code. Started by a run as the keeper of a program, it does that instead.

use std::process::ExitCode;
use std::thread;

use trainer::cli::{self, Exit};
use trainer::reward;

/// Templates and answers of a model are parsed recursively; the main thread's 8 MiB depend on the shell's limits.
const STACK_BYTES: usize = 64 << 20;

fn main() -> ExitCode {
    if let Some(code) = reward::run_if_asked() {
        return code;
    }
    let exit = thread::Builder::new()
        .name("trainer".into())
        .stack_size(STACK_BYTES)
        .spawn(cli::main)
        .ok()
        // A panic has printed its message where it happened.
        .and_then(|thread| thread.join().ok())
        .unwrap_or(Exit::Failed);
    ExitCode::from(exit.code())
}
