//! Signals that ask a run to save and stop: SIGINT (Ctrl-C), SIGTERM (Slurm, kill), SIGUSR1 (Slurm before a limit) and SIGHUP
//! (a closed terminal).
//!
//! While a run prepares there is nothing to save, and the first signal ends the process at once with code 130. From
//! [`Interrupt::ready`] on it sets a flag, which the training loops ask wherever they would wait for long: they give up what
//! they are at, save a checkpoint and return [`super::Exit::Interrupted`]. A second SIGINT ends the process at once with code
//! 130, without saving. A SIGHUP that was ignored when the process started, as under `nohup`, stays ignored; where the system
//! does not say so (it is Linux that does), SIGHUP is left as it is.

use std::io::{self, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

use super::Exit;

/// A handle on the flag; cheap to clone and to ask.
#[derive(Clone, Debug)]
pub struct Interrupt {
    signal: Arc<AtomicUsize>,
    is_preparing: Arc<AtomicBool>,
}

impl Interrupt {
    /// Starts listening. Called by the subcommands that save; the others keep the system's default, which is to end.
    ///
    /// # Errors
    /// If the system refuses a handler.
    pub fn listen() -> io::Result<Self> {
        let signal = Arc::new(AtomicUsize::new(0));
        let is_preparing = Arc::new(AtomicBool::new(true));
        let is_second = Arc::new(AtomicBool::new(false));
        // In this order: the first SIGINT finds the flag unset, then sets it.
        let code = i32::from(Exit::Interrupted.code());
        signal_hook::flag::register_conditional_shutdown(SIGINT, code, Arc::clone(&is_second))?;
        signal_hook::flag::register(SIGINT, is_second)?;
        let numbers = heeded();
        for &number in &numbers {
            signal_hook::flag::register_usize(number, Arc::clone(&signal), number as usize)?;
        }
        let interrupt = Self { signal, is_preparing };
        let (watched, mut signals) = (interrupt.clone(), Signals::new(&numbers)?);
        // A thread of its own: preparing waits for files, the network and long computations, and asks nobody.
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            for number in signals.forever() {
                watched.leave_if_preparing(number);
            }
        })?;
        Ok(interrupt)
    }

    /// From here on there is something to save, and a signal only sets the flag.
    pub fn ready(&self) {
        self.is_preparing.store(false, Ordering::SeqCst);
    }

    /// Whether a signal has come.
    pub fn requested(&self) -> bool {
        self.signal.load(Ordering::Relaxed) != 0
    }

    /// The name of the signal that came last; `None` while none has.
    pub fn signal_name(&self) -> Option<&'static str> {
        name(self.signal.load(Ordering::Relaxed) as i32)
    }

    fn leave_if_preparing(&self, number: i32) {
        if self.is_preparing.load(Ordering::SeqCst) {
            let name = name(number).unwrap_or("a signal");
            let _ =
                writeln!(io::stderr(), "interrupted by {name} while preparing: no step was taken, nothing is saved");
            // Without the libraries' clean-up, which may wait for what other threads are at.
            signal_hook::low_level::exit(i32::from(Exit::Interrupted.code()));
        }
    }
}

/// The signals that ask a run to stop: SIGHUP only where it was not ignored when the process started.
pub(super) fn heeded() -> Vec<i32> {
    let mut numbers = vec![SIGINT, SIGTERM, SIGUSR1];
    if ignored_signals().is_some_and(|mask| mask >> (SIGHUP - 1) & 1 == 0) {
        numbers.push(SIGHUP);
    }
    numbers
}

fn name(number: i32) -> Option<&'static str> {
    match number {
        SIGINT => Some("SIGINT"),
        SIGTERM => Some("SIGTERM"),
        SIGUSR1 => Some("SIGUSR1"),
        SIGHUP => Some("SIGHUP"),
        _ => None,
    }
}

/// The signals that this process ignores, one bit each from the first on; `None` where the system does not say.
fn ignored_signals() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    ignored_in(&status)
}

fn ignored_in(status: &str) -> Option<u64> {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"))?;
    u64::from_str_radix(mask.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use signal_hook::low_level::raise;
    use std::process::Command;

    const CASE: &str = "TRAINER_TEST_SIGNALS";
    const TEST: &str = "cli::interrupt::tests::the_first_signal_sets_the_flag_and_a_second_ctrl_c_ends_at_once";

    /// Raises the signals of a case, which begins with whether the run is ready.
    fn child(case: &str) {
        let interrupt = Interrupt::listen().unwrap();
        assert!(!interrupt.requested() && interrupt.signal_name().is_none());
        let (state, signals) = case.split_once(' ').unwrap();
        if state == "ready" {
            interrupt.ready();
        }
        for (count, wanted) in signals.split(' ').enumerate() {
            let number = [SIGINT, SIGTERM, SIGUSR1, SIGHUP].into_iter().find(|&n| name(n) == Some(wanted)).unwrap();
            raise(number).unwrap();
            if state != "ready" {
                // Whoever prepares does not ask.
                std::thread::sleep(std::time::Duration::from_secs(20));
            }
            assert!(interrupt.requested(), "signal {count}");
            assert_eq!(interrupt.signal_name(), Some(wanted));
        }
    }

    /// Signals are the whole process's business: the cases run in children of this test, each one this test again.
    #[test]
    fn the_first_signal_sets_the_flag_and_a_second_ctrl_c_ends_at_once() {
        if let Ok(case) = std::env::var(CASE) {
            return child(&case);
        }
        let run = |case: &str| {
            let mut child = Command::new(std::env::current_exe().unwrap());
            child.args(["--exact", TEST, "--nocapture"]).env(CASE, case).output().unwrap()
        };
        let code = |case: &str| run(case).status.code();
        // Tests that `nohup` started: their children ignore it as well, as the other test has it.
        let is_hangup_ignored = ignored_signals().is_none_or(|mask| mask >> (SIGHUP - 1) & 1 == 1);
        let heard = |case: &&str| !(is_hangup_ignored && case.contains("SIGHUP"));
        let once = ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP", "SIGUSR1 SIGTERM", "SIGTERM SIGINT"];
        for once in once.into_iter().filter(heard) {
            assert_eq!(code(&format!("ready {once}")), Some(0), "{once}");
        }
        assert_eq!(code("ready SIGINT SIGINT"), Some(130));
        assert_eq!(code("ready SIGTERM SIGINT SIGINT"), Some(130));
        for once in ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"].into_iter().filter(heard) {
            let output = run(&format!("preparing {once}"));
            assert_eq!(output.status.code(), Some(130), "{once}");
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(said.contains(&format!("interrupted by {once} while preparing")), "{said}");
        }
    }

    #[test]
    fn an_inherited_ignore_of_hangups_stays() {
        assert_eq!(ignored_in("Name:\tx\nSigIgn:\t0000000000001001\n"), Some(0x1001));
        assert!(ignored_in("Name:\tx\n").is_none() && ignored_in("SigIgn:\tq\n").is_none());
        // The shell ignores SIGHUP for what it starts; the flag then stays unset.
        let script = format!("trap '' HUP; exec \"$0\" --exact {TEST} --nocapture");
        let mut shell = Command::new("sh");
        shell.args(["-c", &script]).arg(std::env::current_exe().unwrap()).env(CASE, "ready SIGHUP");
        let output = shell.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(101), "{said}");
        assert!(said.contains("signal 0"), "{said}");
    }
}
