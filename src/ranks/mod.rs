//! Ranks: what they say to each other, where they run, which device each one has.
//!
//! There are two planes. [`Ranks`] is for control: what is small and lies on the host, with a wait. [`Exchange`] is for data: what
//! lies on a device or the host, without one. [`Alone`] is one rank and has both at no cost; [`local::Threads`] are several in
//! one process, [`tcp::Tcp`] several processes; [`host::OnHost`] is an exchange over any control plane, `nccl` (feature) one between GPUs. [`launch`] reads a
//! rank's place from the environment of `srun`, `torchrun` or `mpirun`; [`device`] finds out which GPU a rank has and that no two
//! have the same one. Both are pure functions over what they are given: only the command line reads the environment of the
//! process.
//!
//! Invariants: a reduction adds in an order that is the same on every rank (on the CPU that of the ranks), so that all
//! ranks hold the same bits; every wait has a deadline; a failure names the rank, the operation and what to do.

mod control;
pub mod device;
mod error;
mod exchange;
pub mod host;
pub mod hostlist;
pub mod launch;
pub mod local;
#[cfg(feature = "nccl")]
pub mod nccl;
pub mod tcp;

pub use control::{Alone, Ranks, host_name, join};
pub use error::Error;
pub use exchange::{Exchange, Sum};
