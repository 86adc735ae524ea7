//! Where parameters, gradients and optimizer state live: the `ParamStore` between the engine and the blocks.
//!
//! The engine announces the order in which it will visit the blocks, borrows each one's parameters for as long as it needs
//! them, and says when its gradients are final; which rank or memory holds them in between is decided here and nowhere else.
//! No layer type is named in this room: a block is a set of named parameters. Trained parameters of a block lie in one flat
//! f32 buffer, its gradients in another of the same layout; blocks compute with those values, or with a copy that has them rounded
//! where products would round them anyway (`read`).

mod device_optimizer;
mod files;
mod flat;
mod frozen;
mod gradients;
mod lease;
mod link;
mod optimizer;
mod packed;
mod read;
mod sharing;
mod state;
mod store;
mod sums;
mod values;

pub use files::Files;
pub use flat::{Entry, FlatBlock, Piece};
pub use lease::{Lease, Needs, Speaker, Visit, Walk};
pub use link::Offload;
use link::{Coming, Link};
pub use optimizer::{ShardedOptimizer, StepReport};
pub use read::ReadTypes;
pub use sharing::{Sharing, ranks_at};
pub use store::{LayerBytes, ParamStore, Room, Slots};
pub use sums::{Next, Node, Sums};
pub use values::Values;

/// What went wrong with parameters or optimizer state.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The tensor library failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// An operation on a buffer failed.
    #[error(transparent)]
    Op(#[from] crate::ops::Error),
    /// A weight could not be moved to the device.
    #[error(transparent)]
    Weight(#[from] crate::quant::Error),
    /// The optimizer refused.
    #[error(transparent)]
    Optimizer(#[from] crate::optim::Error),
    /// A kernel of the GPU failed.
    #[error(transparent)]
    Cuda(#[from] crate::device::Error),
    /// A file in which something waits cannot be used.
    #[error("cannot {action} `{}` for {kind}: {source}; {help}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file or its folder.
        path: std::path::PathBuf,
        /// What waits, or is to wait, there.
        kind: &'static str,
        /// What the system said.
        source: std::sync::Arc<std::io::Error>,
        /// What to do.
        help: String,
    },
    /// The same name stands twice in a block.
    #[error("parameter `{name}` stands twice in one block")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// A block reads a parameter of another that has none of that name.
    #[error("a block shares the parameter `{name}` of another block, which has none of that name")]
    NotShared {
        /// The name.
        name: String,
    },
    /// A walk was announced for other blocks than there are.
    #[error("there is no block {block} in a model of {blocks}")]
    NoBlock {
        /// Which was asked for.
        block: usize,
        /// How many there are.
        blocks: usize,
    },
    /// More was asked of a walk than was announced.
    #[error("the walk over {visits} blocks is over")]
    WalkIsOver {
        /// Length of the announced order.
        visits: usize,
    },
    /// Gradients were told of in a visit that was announced without.
    #[error("the visit of block {block} was announced without gradients")]
    UnannouncedGradients {
        /// Which block.
        block: usize,
    },
    /// More blocks were asked for at a time than there are slots.
    #[error("block {block} has no slot: all {slots} are lent")]
    NoSlot {
        /// Which block.
        block: usize,
        /// How many slots there are.
        slots: usize,
    },
    /// Something of a slot outlived its lease.
    #[error("block {block} was given back while `{name}` was still held: {source}")]
    StillRead {
        /// Which block.
        block: usize,
        /// Which parameter.
        name: String,
        /// What is shared.
        source: crate::quant::Error,
    },
    /// A thread of the optimizer or for files could not be started.
    #[error("cannot start a thread: {0}")]
    Thread(#[source] std::io::Error),
    /// Several ranks cannot have all blocks on their devices at a time.
    #[error(
        "all weights and a rollout take {needed} bytes of memory, and {free} are free on this rank: ranks that generate have all of \
         them; lower `max_completion_length` or `max_num_seqs`, raise `device_memory_limit`, quantise with `load_in_4bit`, or run \
         one rank with `offload_param_device`, which brings them step by step"
    )]
    NoRoom {
        /// Bytes that all blocks take, with what a rollout needs.
        needed: u64,
        /// Bytes that are free.
        free: u64,
    },
    /// Ranks could not come together.
    #[error("{0}")]
    Ranks(#[source] crate::ranks::Error),
    /// A block was asked for as a whole where ranks have parts of it.
    #[error("block {block} is cut into shards; it must be gathered first")]
    IsCut {
        /// Which block.
        block: usize,
    },
    /// Micro-batches of a step ended in another order than they count.
    #[error("micro-batch {index} of the step ended before one that is before it")]
    MicroStepsOutOfOrder {
        /// Which.
        index: usize,
    },
}

impl From<crate::ranks::Error> for Error {
    fn from(error: crate::ranks::Error) -> Self {
        // Not transparent: who handles errors looks for this one among the causes.
        Self::Ranks(error)
    }
}
