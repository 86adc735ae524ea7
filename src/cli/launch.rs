//! The ranks that a run starts itself on this machine: one process for each, and this one, which passes signals on and sees to
//! it that none outlives the others.

use std::io::Write as _;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;
use signal_hook::iterator::Signals;

use super::{Exit, interrupt};
use crate::ranks::{launch, tcp};

/// Time between two looks at the ranks.
const PAUSE: Duration = Duration::from_millis(20);
/// Ranks notice by themselves that one is lost; those that still run after this are ended.
const GRACE: Duration = Duration::from_secs(20);
/// Ranks end together; those that still run so long after one that ended as it should are ended too.
const GRACE_AFTER_END: Duration = Duration::from_mins(2);

/// A rank and how it ended.
struct Started {
    rank: usize,
    child: Child,
    ended: Option<ExitStatus>,
}

/// Runs this program once for each of `world_size` ranks, with the arguments of this process, and waits for them.
///
/// # Errors
/// If a process cannot be started or waited for.
pub(super) fn run(world_size: usize) -> anyhow::Result<Exit> {
    // What was ignored when this process started stays ignored, here and by the ranks, which inherit it.
    let mut signals = Signals::new(interrupt::heeded())?;
    let port = tcp::free_port().context("no port for the ranks to meet at")?;
    let mut ranks = Vec::with_capacity(world_size);
    for rank in 0..world_size {
        match start(rank, world_size, port) {
            Ok(child) => ranks.push(Started { rank, child, ended: None }),
            Err(error) => {
                end(&mut ranks, Signal::SIGKILL);
                return Err(error).context(format!("cannot start rank {rank}"));
            }
        }
    }
    let mut patience: Option<Instant> = None;
    let mut is_ended = false;
    while ranks.iter().any(|rank| rank.ended.is_none()) {
        for number in signals.pending() {
            if let Ok(signal) = Signal::try_from(number) {
                end(&mut ranks, signal);
            }
        }
        for Started { rank, child, ended } in ranks.iter_mut().filter(|rank| rank.ended.is_none()) {
            *ended = child.try_wait().with_context(|| format!("cannot wait for rank {rank}"))?;
            if let Some(status) = ended {
                let grace = if is_fine(*status) { GRACE_AFTER_END } else { GRACE };
                let until = Instant::now() + grace;
                patience = Some(patience.map_or(until, |patience: Instant| patience.min(until)));
            }
        }
        if patience.is_some_and(|until| Instant::now() > until) {
            // SIGKILL also reaches a rank that is stopped.
            end(&mut ranks, if is_ended { Signal::SIGKILL } else { Signal::SIGTERM });
            patience = Some(Instant::now() + GRACE);
            is_ended = true;
        }
        std::thread::sleep(PAUSE);
    }
    Ok(exit_of(&ranks))
}

fn start(rank: usize, world_size: usize, port: u16) -> std::io::Result<Child> {
    use std::os::unix::process::CommandExt as _;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(std::env::args_os().skip(1)).envs(launch::own_place(rank, world_size, port));
    // A group of its own: Ctrl-C comes to this process alone, which passes it on once.
    command.process_group(0);
    if rank > 0 {
        command.stdin(std::process::Stdio::null());
    }
    // In the environment: candle splits its products by this variable, not by the pool that a rank makes for itself.
    if std::env::var_os("RAYON_NUM_THREADS").is_none() {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        command.env("RAYON_NUM_THREADS", (cores / world_size).max(1).to_string());
    }
    command.spawn()
}

/// Sends a signal to the ranks that run.
fn end(ranks: &mut [Started], signal: Signal) {
    for Started { child, .. } in ranks.iter_mut().filter(|rank| rank.ended.is_none()) {
        // Who has just ended needs none.
        let _ = signal::kill(Pid::from_raw(child.id() as i32), signal);
    }
}

fn is_fine(status: ExitStatus) -> bool {
    let fine = [Exit::Done, Exit::Interrupted].map(|exit| i32::from(exit.code()));
    status.code().is_some_and(|code| fine.contains(&code))
}

/// How the run ended: as the ranks did, and where they differ as the one that has the cause.
fn exit_of(ranks: &[Started]) -> Exit {
    use std::os::unix::process::ExitStatusExt as _;
    let codes = || ranks.iter().filter_map(|rank| rank.ended?.code());
    let has = |exit: Exit| codes().any(|code| code == i32::from(exit.code()));
    for Started { rank, ended, .. } in ranks {
        if let Some(number) = ended.and_then(|status| status.signal()) {
            let name = Signal::try_from(number).map_or("a signal", Signal::as_str);
            // With standard error gone there is nobody left to tell; the exit code still says it.
            let _ = writeln!(
                std::io::stderr(),
                "error: rank {rank} was ended by {name}; resume from the newest checkpoint with `--resume`"
            );
        }
    }
    let was_killed = ranks.iter().any(|rank| rank.ended.is_some_and(|status| status.signal().is_some()));
    match () {
        () if has(Exit::Usage) => Exit::Usage,
        () if has(Exit::Failed) => Exit::Failed,
        () if was_killed => Exit::PeerLost,
        // A signal that comes while ranks prepare ends one at once, which the others lose.
        () if has(Exit::Interrupted) => Exit::Interrupted,
        () if has(Exit::PeerLost) => Exit::PeerLost,
        () if codes().all(|code| code == 0) => Exit::Done,
        () => Exit::Failed,
    }
}
