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

use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::device::Queue;

/// Whether the program was built with an exchange between GPUs.
pub const HAS_NCCL: bool = cfg!(feature = "nccl");

/// The exchange between ranks that have a GPU each, beside its queue `main`. Every rank must call it. No piece of work may take
/// longer than `deadline`. With `saves_memory` it takes little of the GPUs, at some of its speed.
///
/// # Errors
/// If the program was built without, or the GPUs do not find each other.
pub fn between_gpus(
    ranks: Arc<dyn Ranks>,
    main: &Queue,
    (deadline, saves_memory): (Duration, bool),
) -> Result<Arc<Mutex<dyn Exchange>>, Error> {
    #[cfg(feature = "nccl")]
    {
        Ok(Arc::new(Mutex::new(nccl::Nccl::connect(ranks, main, (deadline, saves_memory))?)))
    }
    #[cfg(not(feature = "nccl"))]
    {
        let rank = ranks.rank();
        drop((ranks, main, deadline, saves_memory));
        Err(exchange::device_error(rank, "NCCL", "this program was built without it (`--features cuda,nccl`)"))
    }
}

pub use control::{Alone, Ranks, host_name, join};
pub use error::Error;
pub use exchange::{Exchange, Sum};
