//! The processes below one: who they are, what they use, and their end.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// A process as the system's table shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    parent: i32,
    is_dead: bool,
    threads: u64,
    resident_pages: u64,
}

/// What a tree of processes uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::reward) struct Usage {
    /// Threads of all processes.
    pub(in crate::reward) threads: u64,
    pub(in crate::reward) resident_pages: u64,
}

/// Kills everything below `root`, which is the calling process or one whose children it takes over, and waits until it
/// is gone.
pub(in crate::reward) fn kill_below(root: Pid) {
    // A process may start another between the look and the kill; what is left is seen in the next round.
    for round in 0..2000_u64 {
        while matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(status) if status != WaitStatus::StillAlive) {}
        let living = below(&table(Path::new("/proc")), root.as_raw());
        if living.is_empty() {
            return;
        }
        for pid in living {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        thread::sleep(Duration::from_millis(round.min(5)));
    }
}

/// What the processes below `root` use, by the table in `proc`.
pub(in crate::reward) fn usage_below(proc: &Path, root: i32) -> Usage {
    let table = table(proc);
    below(&table, root).iter().filter_map(|pid| table.get(pid)).fold(Usage::default(), |sum, entry| Usage {
        threads: sum.threads + entry.threads,
        resident_pages: sum.resident_pages + entry.resident_pages,
    })
}

/// Threads of all processes of a user, by the table in `proc`.
pub(in crate::reward) fn threads_of_user(proc: &Path, user: u32) -> u64 {
    let is_theirs = |pid: &i32| {
        let owner = std::fs::metadata(proc.join(pid.to_string()));
        owner.is_ok_and(|metadata| metadata.uid() == user)
    };
    table(proc).iter().filter(|(pid, _)| is_theirs(pid)).map(|(_, entry)| entry.threads).sum()
}

/// The living processes below `root`, dead ones between them and it counting as links.
fn below(table: &HashMap<i32, Entry>, root: i32) -> Vec<i32> {
    let is_below = |pid: i32| {
        let (mut at, mut steps) = (pid, 0);
        // The table is not of one moment, so that a chain may run in a circle.
        while let Some(entry) = table.get(&at).filter(|_| steps < 10_000) {
            if entry.parent == root {
                return true;
            }
            (at, steps) = (entry.parent, steps + 1);
        }
        false
    };
    table
        .iter()
        .filter(|(pid, entry)| !entry.is_dead && **pid != root && is_below(**pid))
        .map(|(pid, _)| *pid)
        .collect()
}

fn table(proc: &Path) -> HashMap<i32, Entry> {
    let Ok(entries) = proc.read_dir() else { return HashMap::new() };
    let read = |name: &str| {
        let pid: i32 = name.parse().ok()?;
        // It may have ended since.
        Some((pid, parse_stat(&std::fs::read_to_string(proc.join(name).join("stat")).ok()?)?))
    };
    entries.flatten().filter_map(|entry| read(entry.file_name().to_str()?)).collect()
}

/// Reads `/proc/PID/stat`; the name in brackets may hold anything, brackets too.
fn parse_stat(text: &str) -> Option<Entry> {
    let (_, rest) = text.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let is_dead = matches!(*fields.first()?, "Z" | "X" | "x");
    Some(Entry {
        parent: fields.get(1)?.parse().ok()?,
        is_dead,
        threads: fields.get(17)?.parse().ok()?,
        resident_pages: fields.get(21)?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_table_is_read_whatever_the_program_is_called() {
        let tail = "7 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 12 1000 250 18446744073709551615";
        for name in ["sh", "a) Z 9 (b", "two words"] {
            let entry = parse_stat(&format!("12 ({name}) S {tail}"));
            assert_eq!(entry, Some(Entry { parent: 7, is_dead: false, threads: 1, resident_pages: 250 }), "{name}");
        }
        assert!(parse_stat(&format!("12 (sh) Z {tail}")).is_some_and(|entry| entry.is_dead));
        assert_eq!(parse_stat("12 (sh) S"), None);
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn everything_below_a_process_is_found_and_nothing_else() {
        let entry = |parent, is_dead| Entry { parent, is_dead, threads: 1, resident_pages: 1 };
        let table: HashMap<i32, Entry> = [
            (2, entry(1, false)),
            (3, entry(2, true)),
            (4, entry(3, false)),
            (5, entry(4, false)),
            (6, entry(1, false)),
            (7, entry(8, false)),
            (8, entry(7, false)),
        ]
        .into();
        let sorted = |root| {
            let mut found = below(&table, root);
            found.sort_unstable();
            found
        };
        assert_eq!(sorted(2), [4, 5]);
        assert_eq!(sorted(1), [2, 4, 5, 6]);
        assert_eq!(sorted(5), [0; 0]);
    }
}
