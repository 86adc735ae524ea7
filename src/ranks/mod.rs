//! Ranks: what they say to each other, where they run, which device each one has.
//!
//! [`Ranks`] is the control plane that the rooms above talk to, for what is small and on the host; [`Collective`] is for
//! values. [`Alone`] is one rank, [`local::Threads`] are several in one process, `nccl` (feature) several GPUs. [`launch`] reads a rank's place from the environment of `srun`, `torchrun` or
//! `mpirun`; [`device`] finds out which GPU a rank has and that no two have the same one. Both are pure functions over
//! what they are given: only the command line reads the environment of the process.
//!
//! Invariants: a reduction adds in an order that is the same on every rank (on the CPU that of the ranks), so that all
//! ranks hold the same bits; every wait has a deadline; a failure names the rank, the operation and what to do.

mod collective;
mod control;
pub mod device;
mod error;
pub mod hostlist;
pub mod launch;
pub mod local;
#[cfg(feature = "nccl")]
pub mod nccl;

pub use collective::Collective;
pub use control::{Alone, Ranks, join};
pub use error::Error;
