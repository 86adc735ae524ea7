//! What can go wrong between ranks.

use super::launch::{self, Launcher};

/// An error of the room `ranks`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not every rank came to a collective in time.
    #[error(
        "rank {rank} waited {secs} s in `{operation}` for {}; see the logs of those ranks for an earlier error, \
         or allow more time",
        ranks(missing)
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
    },
    /// Another rank is gone.
    #[error("rank {rank} lost rank {peer} in `{operation}`; see the log of rank {peer} for the first error")]
    PeerLost {
        /// The rank that noticed.
        rank: usize,
        /// The rank that is gone.
        peer: usize,
        /// Which collective.
        operation: &'static str,
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
    /// More than one rank.
    #[error(
        "{launcher} started this process as rank {rank} of {world_size}, and a run is one process; start one, and for the \
         same batch multiply `gradient_accumulation_steps` by {world_size}"
    )]
    Several {
        /// Who started them.
        launcher: Launcher,
        /// This one.
        rank: usize,
        /// How many there are.
        world_size: usize,
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

fn ranks(missing: &[usize]) -> String {
    let list = |ranks: &[usize]| ranks.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    match missing {
        [] => "the other ranks".into(),
        [one] => format!("rank {one}"),
        many if many.len() > 16 => format!("{} ranks, first {}", many.len(), list(&many[..16])),
        many => format!("ranks {}", list(many)),
    }
}
