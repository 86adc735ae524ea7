//! What can go wrong between ranks.

use super::launch::{self, Launcher};

/// An error of the room `ranks`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not every rank came to a collective in time.
    #[error(
        "rank {rank} waited {secs} s in `{operation}` for {}; see the logs of those ranks for an earlier error, \
         or allow more time (`ddp_timeout`)",
        ranks(missing, hosts)
    )]
    Timeout {
        /// The rank that waited.
        rank: usize,
        /// Which collective.
        operation: &'static str,
        /// The deadline in seconds.
        secs: u64,
        /// Ranks that did not come; empty where the transport cannot tell.
        missing: Vec<usize>,
        /// The hosts of those; empty where all ranks are in one process.
        hosts: Vec<String>,
    },
    /// Another rank is gone.
    #[error(
        "rank {rank} lost rank {peer}{} in `{operation}`: its process is gone; see the log of rank {peer} for the first error",
        on(host)
    )]
    PeerLost {
        /// The rank that noticed.
        rank: usize,
        /// The rank that is gone.
        peer: usize,
        /// Its host; empty where all ranks are in one process.
        host: String,
        /// Which collective.
        operation: &'static str,
    },
    /// Another rank said that it failed.
    #[error("rank {peer}{} failed while rank {rank} was in `{operation}`: {reason}", on(host))]
    PeerFailed {
        /// The rank that was told.
        rank: usize,
        /// The rank that failed.
        peer: usize,
        /// Its host.
        host: String,
        /// Which collective.
        operation: &'static str,
        /// What it said.
        reason: String,
    },
    /// Another rank shows no sign of life.
    #[error(
        "rank {rank} heard nothing of rank {peer}{} for {secs} s in `{operation}`: its process is stopped, or its host or the \
         network is gone",
        on(host)
    )]
    Silent {
        /// The rank that noticed.
        rank: usize,
        /// The silent rank.
        peer: usize,
        /// Its host.
        host: String,
        /// Which collective.
        operation: &'static str,
        /// For how many seconds.
        secs: u64,
    },
    /// Another rank has left the work at hand, because it was asked to stop.
    #[error("rank {rank} leaves `{operation}`: another rank was asked to stop")]
    StartOver {
        /// The rank that noticed.
        rank: usize,
        /// Which collective.
        operation: &'static str,
    },
    /// Ranks did not find each other.
    #[error("rank {rank} cannot meet the others at {place}: {problem}")]
    Meeting {
        /// Which rank.
        rank: usize,
        /// Where rank 0 listens.
        place: String,
        /// Why not.
        problem: String,
    },
    /// Ranks did not come to the meeting.
    #[error(
        "{} did not come to {place} within {secs} s; see the logs of those ranks, and check that their hosts reach it",
        ranks(missing, &[])
    )]
    NotMet {
        /// Where rank 0 listens.
        place: String,
        /// The deadline in seconds.
        secs: u64,
        /// Who is missing.
        missing: Vec<usize>,
    },
    /// Two ranks disagree about which collective comes next, or about its size.
    #[error(
        "rank {rank} is in `{operation}` with {got}, rank {peer} in `{peer_operation}` with {expected}; \
         the ranks took different paths: check that all have the same configuration and data"
    )]
    Mismatch {
        /// The rank that noticed.
        rank: usize,
        /// Its collective.
        operation: &'static str,
        /// Its size, in words.
        got: String,
        /// The first rank that differs.
        peer: usize,
        /// That rank's collective.
        peer_operation: &'static str,
        /// Its size, in words.
        expected: String,
    },
    /// A buffer of the wrong length for the number of ranks.
    #[error("`{operation}` over {world_size} ranks: `{what}` has {got} bytes, expected {expected}")]
    Length {
        /// Which collective.
        operation: &'static str,
        /// Number of ranks.
        world_size: usize,
        /// Which buffer.
        what: &'static str,
        /// Its length in bytes.
        got: usize,
        /// The length that fits.
        expected: usize,
    },
    /// A rank that does not exist.
    #[error("`{operation}`: root is rank {root}, ranks are 0..{world_size}")]
    Root {
        /// Which collective.
        operation: &'static str,
        /// The root asked for.
        root: usize,
        /// Number of ranks.
        world_size: usize,
    },
    /// A group needs at least one rank.
    #[error("a group of 0 ranks has no collective; `num_processes` must be 1 or more")]
    NoRanks,
    /// The launch environment cannot be read.
    #[error(transparent)]
    Launch(#[from] launch::Error),
    /// A launcher that says how many ranks there are and not where they meet.
    #[error(
        "{launcher} started rank {rank} of {world_size} and does not say where the ranks meet; set MASTER_ADDR (the host of \
         rank 0) and MASTER_PORT for all of them"
    )]
    NoPlace {
        /// Who started them.
        launcher: Launcher,
        /// This one.
        rank: usize,
        /// How many there are.
        world_size: usize,
    },
    /// A collective was given another number of parts than there are ranks.
    #[error("`{operation}` over {world_size} ranks was given {got} parts")]
    Parts {
        /// Which collective.
        operation: &'static str,
        /// Number of ranks.
        world_size: usize,
        /// Number of parts.
        got: usize,
    },
    /// A message of another rank cannot be read.
    #[error("rank {peer} sent `{what}` that cannot be read: {problem}; check that all ranks run the same version")]
    Message {
        /// Who sent it.
        peer: usize,
        /// What it should be.
        what: &'static str,
        /// Why not.
        problem: String,
    },
    /// The device library failed.
    #[error("`{operation}` failed on rank {rank}: {problem}")]
    Device {
        /// Which rank.
        rank: usize,
        /// Which collective or call.
        operation: &'static str,
        /// What the library said.
        problem: String,
    },
}

impl Error {
    /// Whether it is another rank that is the cause, so that this one has nothing more to say.
    pub fn is_of_peer(&self) -> bool {
        matches!(self, Self::PeerLost { .. } | Self::PeerFailed { .. } | Self::Silent { .. } | Self::Timeout { .. })
    }
}

fn on(host: &str) -> String {
    if host.is_empty() { String::new() } else { format!(" (on {host})") }
}

fn ranks(missing: &[usize], hosts: &[String]) -> String {
    let name = |(index, rank): (usize, &usize)| format!("{rank}{}", on(hosts.get(index).map_or("", String::as_str)));
    let list = |ranks: &[usize]| ranks.iter().enumerate().map(name).collect::<Vec<_>>().join(", ");
    match missing {
        [] => "the other ranks".into(),
        [_] => format!("rank {}", list(missing)),
        many if many.len() > 16 => format!("{} ranks, first {}", many.len(), list(&many[..16])),
        many => format!("ranks {}", list(many)),
    }
}
