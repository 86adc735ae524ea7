//! Weight matrices as they lie in memory: dense, NF4/FP4, or a GGUF type; quantise, dequantise, multiply.
//!
//! `model` holds every frozen matrix as a [`Weight`] and calls its `forward` and `backward_input`; `ops` calls the
//! dense products of [`dense`] for trainable matrices and adapters. Legend: `N` rows (outputs), `K` columns (inputs),
//! `M` rows of activations. A weight is `[N, K]`, row-major; activations are `x` `[M, K]`; `y = x W^T`.
//!
//! Invariants: packed bytes are never changed and never expanded as a whole; a dequantised value is exact (bitwise
//! what bitsandbytes and ggml compute); sums are f32, and no result depends on the number of threads.

pub mod bitsandbytes;
mod cuda;
pub mod dense;
mod double_quant;
mod error;
pub mod gguf;
mod lend;
mod multiply;
pub mod nf4;
mod parts;
#[cfg(test)]
mod tests;
mod weight;

pub use bitsandbytes::BitsandbytesParts;
pub use cuda::{DeviceForm, DeviceMatrix, Quantizer};
pub use error::Error;
pub use gguf::GgufMatrix;
pub use nf4::Nf4Matrix;
pub use parts::{Array, Form};
pub use weight::Weight;
