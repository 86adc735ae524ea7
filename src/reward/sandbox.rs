//! Running untrusted programs: each in a process tree of its own, with as little around it as the system can take away.
//!
//! A program is started through two processes of this binary. The *warden* (stage one) dies with the trainer, takes new
//! namespaces, starts the *cell* and watches what everything below it uses. The cell (stage two) builds the file system,
//! sets limits, gives up every right, filters system calls, starts the program and ends with it. In a process namespace
//! the end of the cell is the end of everything the program started.
//!
//! What a system offers differs: user namespaces may be switched off, a container may forbid them to root. [`Sandbox::open`]
//! tries the strongest protection first and runs a program in it; [`Sandbox::protection`] says in words what came of it.
//!
//! The program gets bytes on standard input and gives bytes on standard output; nothing it writes elsewhere is ever read.

pub(super) mod cell;
mod filter;
mod plan;
pub(super) mod warden;

use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::keeper;
pub(super) use plan::Limits;
use plan::{Layers, Namespaces, Plan};

/// First argument of a warden; the trainer's process id and the plan follow.
pub(super) const WARDEN: &str = "__sandbox";
/// First argument of a cell; the warden's process id and the plan follow.
pub(super) const CELL: &str = "__cell";
/// Exit code of a warden or cell that could not do its work; it has said why on standard error.
pub(super) const SETUP_FAILED: u8 = 121;
/// Folders of the system that programs may read.
const SYSTEM: &[&str] = &["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", "/gnu/store"];
/// Files of the system that programs may read.
const SYSTEM_FILES: &[&str] = &["/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives"];
/// The user and group of programs started by root: their process id on top of this, so that no two share one.
const FIRST_USER: u32 = 2_000_000_000;
/// `nobody`, where a container has no more than 65,536 users.
const NOBODY: u32 = 65_534;
/// How long a dead tree may take to be gone.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// A way to run programs that was tried on this machine.
#[derive(Clone, Debug)]
pub(super) struct Sandbox {
    layers: Layers,
    readable: Vec<PathBuf>,
    hidden: Vec<PathBuf>,
    /// Why stronger protection is not there.
    refused: Vec<String>,
}

/// A program to run.
#[derive(Clone, Debug)]
pub(super) struct Job<'a> {
    /// Program and arguments, by its full path or a name found in `/usr/bin` and `/bin`.
    pub(super) program: &'a [String],
    /// Files in its working directory: names and contents.
    pub(super) files: &'a [(&'a str, &'a [u8])],
    /// What it reads from standard input.
    pub(super) input: &'a [u8],
    /// Its limits.
    pub(super) limits: Limits,
    /// Bytes of output beyond which it is stopped.
    pub(super) most_output: usize,
}

/// How a program ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Finished {
    /// Its exit code, 128 and more after a signal; `None` if it was stopped.
    pub(super) code: Option<i32>,
    /// What it wrote to standard output.
    pub(super) output: Vec<u8>,
}

/// Why a program was not run.
#[derive(Debug, thiserror::Error)]
pub(super) enum SandboxError {
    /// The system refused something.
    #[error("cannot start a sandbox: {0}")]
    System(#[from] io::Error),
    /// The warden or cell failed.
    #[error("{0}")]
    Setup(String),
    /// The caller gave the wait up.
    #[error("was stopped")]
    Interrupted,
}

impl Sandbox {
    /// Finds the strongest protection under which `trial` runs and gives `expected`.
    ///
    /// `readable` are folders that programs need besides the system's; `hidden` are never seen, wherever they lie.
    ///
    /// # Errors
    /// If it runs under none.
    pub(super) fn open(
        readable: &[PathBuf],
        hidden: &[PathBuf],
        trial: &Job<'_>,
        expected: &[u8],
    ) -> Result<Self, SandboxError> {
        let mut refused = Vec::new();
        for layers in Layers::candidates() {
            let sandbox = Self {
                layers,
                readable: readable_paths(readable),
                hidden: hidden.iter().filter_map(|path| path.canonicalize().ok()).collect(),
                refused: refused.clone(),
            };
            match sandbox.run(trial, &|| false) {
                Ok(finished) if finished.output == expected => return Ok(sandbox),
                Ok(finished) => refused.push(format!(
                    "{layers}: a trial run of `{}` {}",
                    trial.program.join(" "),
                    finished.code.map_or_else(|| "did not end".to_owned(), |code| format!("ended with code {code}"))
                )),
                Err(error) => refused.push(format!("{layers}: {error}")),
            }
        }
        Err(SandboxError::Setup(refused.join("; ")))
    }

    /// Whether files, network and processes of the machine are all out of reach.
    pub(super) fn is_full(&self) -> bool {
        self.layers.namespaces != Namespaces::None && self.layers.filter
    }

    /// The protection in words.
    pub(super) fn protection(&self) -> String {
        self.layers.to_string()
    }

    /// What is not protected, in words, and why; empty if nothing is missing.
    pub(super) fn gaps(&self) -> Vec<String> {
        let mut gaps = self.layers.gaps();
        if !gaps.is_empty() {
            gaps.extend(self.refused.iter().map(|reason| format!("not to be had was {reason}")));
        }
        gaps
    }

    /// Runs a program to its end, its limits, or until `is_interrupted`.
    ///
    /// # Errors
    /// If the sandbox could not be set up; never because of what the program does.
    pub(super) fn run(&self, job: &Job<'_>, is_interrupted: &dyn Fn() -> bool) -> Result<Finished, SandboxError> {
        let folder = tempfile::Builder::new().prefix("trainer-code-").tempdir()?;
        let files = folder.path().join("files");
        for inner in ["files", "root"] {
            std::fs::create_dir(folder.path().join(inner))?;
        }
        for (name, content) in job.files {
            let path = files.join(name);
            std::fs::write(&path, content)?;
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
        }
        let plan = Plan {
            layers: self.layers,
            limits: job.limits,
            readable: self.readable.clone(),
            hidden: self.hidden.clone(),
            folder: folder.path().to_path_buf(),
            program: job.program.to_vec(),
        };
        let mut child = warden_of(&plan).spawn()?;
        let deadline = Instant::now() + Duration::from_secs_f64(job.limits.wall_secs);
        let result = converse(&mut child, job, deadline, is_interrupted);
        // By now it has ended or was killed; its end is awaited so that the folder is free.
        let _ = child.wait();
        result
    }
}

fn warden_of(plan: &Plan) -> Command {
    let mut command = Command::new(keeper::launcher());
    command.arg0("trainer").arg(WARDEN).arg(std::process::id().to_string()).arg(plan.to_text());
    command.env_clear().current_dir("/").process_group(0);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Gives a program its input and takes its output until it ends or has to be stopped.
fn converse(
    child: &mut Child,
    job: &Job<'_>,
    deadline: Instant,
    is_interrupted: &dyn Fn() -> bool,
) -> Result<Finished, SandboxError> {
    let missing = || io::Error::other("the system gave it no pipe");
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let (mut stdin, stdout) = (stdin.ok_or_else(missing)?, stdout.ok_or_else(missing)?);
    let stderr = stderr.ok_or_else(missing)?;
    let warden = Pid::from_raw(child.id() as i32);
    thread::scope(|scope| {
        // A program that does not read its input breaks the pipe when it ends.
        scope.spawn(move || drop(stdin.write_all(job.input)));
        let output = scope.spawn(move || read_up_to(stdout, job.most_output));
        let words = scope.spawn(move || read_up_to(stderr, 4096));
        let mut was_interrupted = false;
        let mut pause = Duration::from_micros(500);
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break Some(status);
            }
            was_interrupted = is_interrupted();
            // The output may have ended because the program has; one that wrote too much has not.
            let is_cut = output.is_finished() && wait_a_little(child)?.is_none();
            if let Some(status) = child.try_wait()? {
                break Some(status);
            }
            if is_cut || was_interrupted || Instant::now() >= deadline {
                // Its death is the death of all below it.
                let _ = kill(warden, Signal::SIGKILL);
                break None;
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        };
        if status.is_none() {
            child.wait()?;
        }
        let output = output.join().unwrap_or_default();
        let words = String::from_utf8_lossy(&words.join().unwrap_or_default()).trim().to_owned();
        if was_interrupted {
            return Err(SandboxError::Interrupted);
        }
        let code = status.and_then(|status| status.code());
        if (code == Some(i32::from(SETUP_FAILED)) || code.is_none()) && words.starts_with("sandbox: ") {
            return Err(SandboxError::Setup(words));
        }
        let is_whole = output.len() <= job.most_output;
        Ok(Finished { code: code.filter(|_| is_whole), output })
    })
}

/// A program that closed its output may go on for its limits; one that ended is soon known to have.
fn wait_a_little(child: &mut Child) -> io::Result<Option<std::process::ExitStatus>> {
    let until = Instant::now() + Duration::from_millis(200);
    loop {
        match child.try_wait()? {
            None if Instant::now() < until => thread::sleep(Duration::from_millis(2)),
            ended => return Ok(ended),
        }
    }
}

/// Reads to the end, or one byte beyond `most`.
fn read_up_to(from: impl Read, most: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    // An error is the end of what can be read.
    let _ = from.take(most as u64 + 1).read_to_end(&mut bytes);
    bytes
}

/// What of the system and of `more` is there.
fn readable_paths(more: &[PathBuf]) -> Vec<PathBuf> {
    let system = SYSTEM.iter().chain(SYSTEM_FILES).map(Path::new);
    let mut paths: Vec<PathBuf> = Vec::new();
    for path in system.chain(more.iter().map(PathBuf::as_path)) {
        let is_inside = |outer: &PathBuf| path.starts_with(outer) && !outer.is_symlink();
        if path.is_absolute() && path.symlink_metadata().is_ok() && !paths.iter().any(is_inside) {
            paths.push(path.to_path_buf());
        }
    }
    paths
}
