//! Child processes that never outlive the trainer.
//!
//! A program of the user is not started by the trainer itself but by a keeper: this program again, under a hidden first
//! argument, which [`run_if_asked`] answers before anything else happens in `main`. The keeper
//!
//! - gets a signal of the system when the trainer dies in whatever way, `kill -9` and the out-of-memory killer included;
//! - adopts what the program leaves behind, so that processes which detach themselves stay below it;
//! - kills everything below it when the program ends, when it is asked to (SIGTERM), or when the trainer is dead, and
//!   then ends as the program did.
//!
//! The program itself is tied to the keeper in the same way. A keeper has a process group of its own, so that Ctrl-C
//! reaches only the trainer.

pub(super) mod tree;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::prctl;
use nix::sys::signal::{Signal, raise};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, dup2_stderr, dup2_stdin, dup2_stdout, getppid};
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::sandbox;

/// First argument of a keeper; the trainer's process id and the program follow.
const KEEP: &str = "__keep";
/// First argument of the process that becomes the program; the keeper's process id and the program follow.
const TIE: &str = "__tie";

/// Whether this program answers to the arguments above.
static IS_KEEPER: AtomicBool = AtomicBool::new(false);

/// The program that is started as a keeper: this one, or, in programs that use this library without handing their
/// arguments to [`run_if_asked`] first, as tests do, the trainer's binary beside them.
pub(super) fn launcher() -> &'static Path {
    static LAUNCHER: OnceLock<PathBuf> = OnceLock::new();
    LAUNCHER.get_or_init(|| {
        // Not the path of this binary: another may lie there by now, or none.
        let own = PathBuf::from("/proc/self/exe");
        if IS_KEEPER.load(Ordering::Relaxed) {
            return own;
        }
        let here = std::env::current_exe().unwrap_or_default();
        let binaries = here.ancestors().skip(1).take(2).map(|folder| folder.join("trainer"));
        binaries.into_iter().find(|path| path.is_file()).unwrap_or(own)
    })
}

/// Does the work of a keeper if the command line asks for it. To be called first in `main`, before there are threads.
pub fn run_if_asked() -> Option<ExitCode> {
    IS_KEEPER.store(true, Ordering::Relaxed);
    let mut arguments = std::env::args_os().skip(1);
    let role = arguments.next()?;
    let work: fn(Pid, &[OsString]) -> io::Result<ExitStatus> = match role.to_str()? {
        KEEP => keep,
        TIE => tie,
        sandbox::WARDEN => |trainer, plan| sandbox::warden::run(trainer, only_text(plan)?),
        sandbox::CELL => |warden, plan| sandbox::cell::run(warden, only_text(plan)?),
        _ => return None,
    };
    let is_sandbox = role == sandbox::WARDEN || role == sandbox::CELL;
    let parent = arguments.next()?.to_str()?.parse().map(Pid::from_raw).ok()?;
    let command: Vec<OsString> = arguments.collect();
    let code = match work(parent, &command) {
        Ok(status) if is_sandbox => status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default()) as u8,
        Ok(status) => end_like(status),
        Err(error) if is_sandbox => {
            complain(&format!("sandbox: {error}"));
            sandbox::SETUP_FAILED
        }
        Err(error) => {
            let program = command.first().map(|p| p.display().to_string()).unwrap_or_default();
            complain(&format!("cannot run `{program}`: {error}"));
            127
        }
    };
    Some(ExitCode::from(code))
}

fn only_text(arguments: &[OsString]) -> io::Result<&str> {
    arguments.first().and_then(|text| text.to_str()).ok_or_else(|| io::Error::other("no plan was given"))
}

/// The command of a keeper for `program`.
pub(super) fn kept(program: &str, arguments: &[String]) -> Command {
    let mut command = Command::new(launcher());
    command.arg0("trainer").arg(KEEP).arg(std::process::id().to_string()).arg(program).args(arguments);
    command.process_group(0);
    command
}

/// Writes to standard error, where the reader of a program's messages finds it.
#[expect(clippy::print_stderr, reason = "a keeper has no console; this ends among the program's own messages")]
fn complain(message: &str) {
    eprintln!("{message}");
}

/// Asks for `signal` when the parent dies, and makes sure that it has not died already.
pub(super) fn die_with(parent: Pid, signal: Signal) -> io::Result<()> {
    prctl::set_pdeathsig(signal)?;
    if getppid() == parent { Ok(()) } else { Err(io::Error::other("the process that asked for it is gone")) }
}

fn keep(trainer: Pid, command: &[OsString]) -> io::Result<ExitStatus> {
    let mut signals = Signals::new([SIGCHLD, SIGTERM, SIGINT, SIGHUP])?;
    die_with(trainer, Signal::SIGTERM)?;
    prctl::set_child_subreaper(true)?;
    let mut program = Command::new("/proc/self/exe");
    program.arg0("trainer").arg(TIE).arg(std::process::id().to_string()).args(command);
    let program = Pid::from_raw(program.process_group(0).spawn()?.id() as i32);
    // The program's pipes must end when it does.
    let null = File::options().read(true).write(true).open("/dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    dup2_stderr(&null)?;
    for signal in signals.forever() {
        let ended = if signal == SIGCHLD { reap(program) } else { Some(ExitStatus::from_raw(signal)) };
        if let Some(status) = ended {
            tree::kill_below(Pid::this());
            return Ok(status);
        }
    }
    Err(io::Error::other("signals ended"))
}

/// Takes what has ended; returns how `program` ended, if it was among them.
pub(super) fn reap(program: Pid) -> Option<ExitStatus> {
    let mut ended = None;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) if pid == program => ended = Some(ExitStatus::from_raw(code << 8)),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == program => {
                ended = Some(ExitStatus::from_raw(signal as i32));
            }
            Ok(WaitStatus::StillAlive) | Err(_) => return ended,
            Ok(_) => {}
        }
    }
}

fn tie(keeper: Pid, command: &[OsString]) -> io::Result<ExitStatus> {
    die_with(keeper, Signal::SIGKILL)?;
    let (program, arguments) = command.split_first().ok_or_else(|| io::Error::other("no program was named"))?;
    Err(Command::new(program).args(arguments).exec())
}

/// Ends this process by the signal that ended the program, or returns its exit code.
fn end_like(status: ExitStatus) -> u8 {
    if let Some(signal) = status.signal() {
        let _ = signal_hook::low_level::emulate_default_handler(signal);
        let _ = Signal::try_from(signal).map(raise);
        return 128_u8.wrapping_add(signal as u8);
    }
    status.code().unwrap_or(1) as u8
}

/// Where the system would find `program`, so that a wrong name is known before anything is started.
///
/// # Errors
/// What the system would say: not found, or not executable.
pub(super) fn find_program(program: &str) -> io::Result<()> {
    let not_found = || io::Error::from_raw_os_error(libc::ENOENT);
    let check = |path: &Path| {
        let metadata = path.metadata()?;
        let is_executable = std::os::unix::fs::PermissionsExt::mode(&metadata.permissions()) & 0o111 != 0;
        if metadata.is_file() && is_executable { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EACCES)) }
    };
    if program.contains('/') {
        return check(Path::new(program));
    }
    let path = std::env::var_os("PATH").unwrap_or_else(|| OsStr::new("/usr/local/bin:/usr/bin:/bin").to_owned());
    let mut result = Err(not_found());
    for folder in std::env::split_paths(&path) {
        match check(&folder.join(program)) {
            Ok(()) => return Ok(()),
            // As a shell: what is there but cannot be run is the better reason.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => result = Err(error),
            Err(_) => {}
        }
    }
    result
}
