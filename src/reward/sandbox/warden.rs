//! Stage one: takes namespaces, starts the cell, and watches what everything below it uses.

use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getgid, getuid};

use super::plan::{Namespaces, Plan};
use super::{CELL, LAST_WORDS};
use crate::reward::keeper::{self, tree};

/// How often usage is looked at.
const LOOK: Duration = Duration::from_millis(20);
/// What a cell itself takes, besides its program.
const CELL_BYTES: u64 = 32 << 20;

/// Runs a plan for `trainer` and returns how its program ended.
pub(in crate::reward) fn run(trainer: Pid, text: &str) -> io::Result<ExitStatus> {
    // The cell is told to die with the warden in turn.
    keeper::die_with(trainer, Signal::SIGKILL)?;
    let plan: Plan = serde_json::from_str(text)?;
    // The first to go where memory is short; refused only where nobody may choose.
    let _ = std::fs::write("/proc/self/oom_score_adj", "1000");
    take_namespaces(plan.layers.namespaces).map_err(told("namespaces"))?;
    prctl::set_child_subreaper(true)?;
    let mut cell = Command::new("/proc/self/exe");
    cell.arg0("trainer").arg(CELL).arg(std::process::id().to_string()).arg(text);
    let cell = Pid::from_raw(cell.spawn()?.id() as i32);
    let status = watch(cell, &plan);
    // In a process namespace the kernel has done this already.
    tree::kill_below(Pid::this());
    Ok(status)
}

/// Says what failed.
pub(super) fn told(what: &str) -> impl FnOnce(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{what}: {error}"))
}

fn take_namespaces(namespaces: Namespaces) -> io::Result<()> {
    let flags =
        CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    match namespaces {
        Namespaces::None => Ok(()),
        Namespaces::Root => Ok(unshare(flags)?),
        Namespaces::User => {
            let (user, group) = (getuid(), getgid());
            unshare(CloneFlags::CLONE_NEWUSER | flags)?;
            std::fs::write("/proc/self/setgroups", "deny")?;
            std::fs::write("/proc/self/uid_map", format!("0 {user} 1"))?;
            std::fs::write("/proc/self/gid_map", format!("0 {group} 1"))
        }
    }
}

/// Bytes of a page, as the kernel told this process when it started it: pairs of a key and a value.
fn page_bytes() -> u64 {
    const AT_PAGESZ: u64 = 6;
    let vector = std::fs::read("/proc/self/auxv").unwrap_or_default();
    let words: Vec<u64> =
        vector.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap_or_default())).collect();
    words.chunks_exact(2).find(|pair| pair[0] == AT_PAGESZ).map_or(4096, |pair| pair[1])
}

/// Waits for the cell; stops it when its program uses more than it may.
fn watch(cell: Pid, plan: &Plan) -> ExitStatus {
    let deadline = Instant::now() + Duration::from_secs_f64(plan.limits.wall_secs) + LAST_WORDS;
    let me = Pid::this().as_raw();
    let page = page_bytes();
    let (mut pause, mut looked) = (Duration::from_micros(500), Instant::now());
    loop {
        if let Some(status) = keeper::reap(cell) {
            return status;
        }
        if looked.elapsed() >= LOOK {
            looked = Instant::now();
            let usage = tree::usage_below(Path::new("/proc"), me);
            let is_too_much = usage.resident_pages * page > plan.limits.memory_bytes + CELL_BYTES
                || usage.threads > plan.limits.processes + 2;
            // The trainer has the same deadline; this one is for the case that it does not live to see it.
            if is_too_much || Instant::now() > deadline {
                let _ = kill(cell, Signal::SIGKILL);
                return ExitStatus::from_raw(Signal::SIGKILL as i32);
            }
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(5));
    }
}
