//! The differentiable operations: each a `forward` that returns what its `backward` needs, with explicit gradients.
//!
//! There is no tape. A backward adds gradients of trainable parameters straight into the gradient bucket that the
//! parameter points to and returns the gradient of its input. Activations are f32 tensors on the CPU; candle's autograd
//! is the oracle in the tests. On a GPU (`cuda/`) activations are f16, bf16 or f32 and operations work in place where
//! their docs say so. Called by `model` (blocks) and `engine`; knows no model.
//!
//! Shapes: `N` tokens of a ragged batch, `D` hidden, `H` query heads, `K` key-value heads, `d` head size, `V` vocabulary.

pub mod attention;
pub mod buffer;
pub(crate) mod cuda;
pub mod embedding;
pub mod head;
pub mod linear;
pub mod paged_attention;
pub mod param;
pub mod residual;
pub mod rms_norm;
pub mod rope;
pub mod rows;
pub mod swiglu;
pub(crate) mod view;
mod wide;

pub use param::Param;
pub use wide::Wide;

/// What went wrong in an operation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An argument has the wrong shape.
    #[error("{op}: `{argument}` is {got}, expected {expected}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// Which argument.
        argument: &'static str,
        /// Its shape.
        got: String,
        /// What fits.
        expected: String,
    },
    /// A tensor is not where, or not of the type, that the operation works on.
    #[error("{op}: needs an f32 tensor on the CPU, got {got}")]
    Placement {
        /// The operation.
        op: &'static str,
        /// Type and device found.
        got: String,
    },
    /// An id is outside the vocabulary.
    #[error(
        "{op}: token id {id} is outside the vocabulary of {vocabulary}; the tokenizer and the model do not belong together"
    )]
    Token {
        /// The operation.
        op: &'static str,
        /// The id.
        id: u32,
        /// Entries in the vocabulary.
        vocabulary: usize,
    },
    /// The tensor library failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// A kernel of the GPU failed.
    #[error(transparent)]
    Cuda(#[from] crate::device::Error),
    /// The GPU has no kernel for this.
    #[error("{op}: {what} is not there on the GPU; {instead}")]
    Unsupported {
        /// The operation.
        op: &'static str,
        /// What was asked for.
        what: String,
        /// What to do.
        instead: &'static str,
    },
    /// Attention over a paged cache refused its arguments.
    #[error(transparent)]
    Paged(#[from] paged_attention::Error),
    /// A multiply with a weight failed.
    #[error(transparent)]
    Weight(#[from] crate::quant::Error),
}

pub(crate) fn shape_error(
    op: &'static str,
    argument: &'static str,
    got: impl std::fmt::Debug,
    expected: impl std::fmt::Debug,
) -> Error {
    Error::Shape { op, argument, got: format!("{got:?}"), expected: format!("{expected:?}") }
}
