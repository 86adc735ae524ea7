//! Weight matrices as they lie in memory: dense, NF4/FP4, or a GGUF type; quantise, dequantise, multiply.
//!
//! `N` rows (outputs), `K` columns (inputs), `M` rows of activations. A weight is `[N, K]`, row-major.

use candle_core::Tensor;

pub mod gguf;
pub mod nf4;

pub use gguf::GgufMatrix;
pub use nf4::Nf4Matrix;

/// A weight matrix `[N, K]`.
#[derive(Clone, Debug)]
pub enum Weight {
    /// f32, bf16 or f16.
    Dense(Tensor),
    /// 4 bits, bitsandbytes' layout.
    Nf4(Nf4Matrix),
    /// A GGUF tensor as stored.
    Gguf(GgufMatrix),
}
