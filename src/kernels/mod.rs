//! Kernels: SIMD routines for the CPU, `.cu` files for the GPU, and one safe launcher for each.
//!
//! This is the floor below `quant` and `ops`: routines here see raw slices, strides and storage formats, never a
//! tensor, a layer or a configuration. Every function that leaves this room is safe to call: it checks its lengths
//! first, and the `unsafe` inside carries the reason why that is enough.

mod adamw;
pub mod cpu;
pub mod cuda;

pub use adamw::AdamWFactors;
