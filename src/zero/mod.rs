//! Where parameters, gradients and optimizer state live: the `ParamStore` between the engine and the blocks.
//!
//! The engine asks for the parameters of a block and says when its gradients are final; which rank or memory holds them
//! in between is decided here and nowhere else. No layer type is named in this room: a block is a set of named
//! parameters. Trained parameters of a block lie in one flat f32 buffer, its gradients in another of the same layout.

#[cfg(feature = "cuda")]
mod device_optimizer;
mod flat;
mod optimizer;
mod store;

pub use flat::{Entry, FlatBlock};
pub use optimizer::{ShardedAdamW, StepReport};
pub use store::ParamStore;

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
    /// The same name stands twice in a block.
    #[error("parameter `{name}` stands twice in one block")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// Saved state does not fit this model.
    #[error(
        "saved state has {found} for `{name}`, this run needs {expected}; resume with the settings of the saved run"
    )]
    State {
        /// Which parameter or number.
        name: String,
        /// What the file holds.
        found: String,
        /// What fits.
        expected: String,
    },
}
