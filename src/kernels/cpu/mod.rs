//! CPU kernels: block formats, few-row products straight from packed bytes, and panel products.
//!
//! Called by `quant` (packed weights) and `ops` (everything else). Which instructions are used is decided at run time
//! ([`Level`]); every level gives the same dequantised values to the last bit, and sums of products differ between
//! levels by their order only. No result depends on the number of threads: a task owns its outputs and computes each in
//! a fixed order.
#![expect(unsafe_code, reason = "vector instructions, and tiles of one matrix that several tasks write")]
#![expect(clippy::inline_always, reason = "a function must be inlined to be compiled with its caller's instructions")]

pub mod activations;
pub mod blocks;
pub mod codebook;
pub mod dot;
#[cfg(target_arch = "x86_64")]
mod dot_avx2;
#[cfg(target_arch = "x86_64")]
mod dot_avx512;
pub mod half_float;
pub mod k_blocks;
pub mod level;
pub mod matmul;
pub mod matrix;
pub mod packed_dot;
pub mod paged;
pub mod tile;
#[cfg(target_arch = "x86_64")]
mod unpack;
pub mod vector;

pub use activations::Activations;
pub use blocks::BlockFormat;
pub use level::Level;
pub use matrix::{Operand, TileMut, gemm};
