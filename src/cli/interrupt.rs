//! Signals that ask a run to save and stop: SIGINT (Ctrl-C), SIGTERM (Slurm, kill) and SIGUSR1 (Slurm before a limit).
//!
//! The first signal sets a flag which the training loops read at step edges; they save a checkpoint and return
//! [`super::Exit::Interrupted`]. A second SIGINT ends the process at once with code 130, without saving.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};

use super::Exit;

/// A handle on the flag; cheap to clone and to ask.
#[derive(Clone, Debug)]
pub struct Interrupt {
    signal: Arc<AtomicUsize>,
}

impl Interrupt {
    /// Starts listening. Called by the subcommands that save; the others keep the system's default, which is to end.
    ///
    /// # Errors
    /// If the system refuses a handler.
    pub fn listen() -> io::Result<Self> {
        let signal = Arc::new(AtomicUsize::new(0));
        let is_second = Arc::new(AtomicBool::new(false));
        // In this order: the first SIGINT finds the flag unset, then sets it.
        let code = i32::from(Exit::Interrupted.code());
        signal_hook::flag::register_conditional_shutdown(SIGINT, code, Arc::clone(&is_second))?;
        signal_hook::flag::register(SIGINT, is_second)?;
        for number in [SIGINT, SIGTERM, SIGUSR1] {
            signal_hook::flag::register_usize(number, Arc::clone(&signal), number as usize)?;
        }
        Ok(Self { signal })
    }

    /// Whether a signal has come.
    pub fn requested(&self) -> bool {
        self.signal.load(Ordering::Relaxed) != 0
    }

    /// The name of the signal that came last; `None` while none has.
    pub fn signal_name(&self) -> Option<&'static str> {
        match self.signal.load(Ordering::Relaxed) as i32 {
            SIGINT => Some("SIGINT"),
            SIGTERM => Some("SIGTERM"),
            SIGUSR1 => Some("SIGUSR1"),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use signal_hook::low_level::raise;

    /// Signals are the whole process's business: the cases run in children of this test, each one this test again.
    #[test]
    fn the_first_signal_sets_the_flag_and_a_second_ctrl_c_ends_at_once() {
        const CASE: &str = "TRAINER_TEST_SIGNALS";
        if let Ok(case) = std::env::var(CASE) {
            let interrupt = Interrupt::listen().unwrap();
            assert!(!interrupt.requested() && interrupt.signal_name().is_none());
            for (count, name) in case.split(' ').enumerate() {
                let number = [("SIGINT", SIGINT), ("SIGTERM", SIGTERM), ("SIGUSR1", SIGUSR1)]
                    .iter()
                    .find(|(known, _)| *known == name)
                    .unwrap()
                    .1;
                raise(number).unwrap();
                assert!(interrupt.requested(), "signal {count}");
                assert_eq!(interrupt.signal_name(), Some(name));
            }
            return;
        }
        let run = |case: &str| {
            let test = "cli::interrupt::tests::the_first_signal_sets_the_flag_and_a_second_ctrl_c_ends_at_once";
            let mut child = std::process::Command::new(std::env::current_exe().unwrap());
            child.args(["--exact", test]).env(CASE, case).output().unwrap().status.code()
        };
        for once in ["SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR1 SIGTERM", "SIGTERM SIGINT"] {
            assert_eq!(run(once), Some(0), "{once}");
        }
        assert_eq!(run("SIGINT SIGINT"), Some(130));
        assert_eq!(run("SIGTERM SIGINT SIGINT"), Some(130));
    }
}
