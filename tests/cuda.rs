//! The GPU's kernels against the CPU's results, on fresh random data, every type, odd shapes, strided operands.
//!
//! All are ignored by default: `cargo test --release --features cuda --test cuda -- --ignored` runs them where a GPU is.
#![cfg(feature = "cuda")]

#[path = "cuda/assemble.rs"]
mod assemble;
#[path = "cuda/attention.rs"]
mod attention;
#[path = "cuda/device.rs"]
mod device;
#[path = "cuda/drawing.rs"]
mod drawing;
#[path = "cuda/exchange.rs"]
mod exchange;
#[path = "cuda/family.rs"]
mod family;
#[path = "cuda/gemm.rs"]
mod gemm;
#[path = "cuda/gguf.rs"]
mod gguf;
#[path = "cuda/gradients.rs"]
mod gradients;
#[path = "cuda/head.rs"]
mod head;
#[path = "cuda/lanes.rs"]
mod lanes;
#[path = "cuda/lanes_gguf.rs"]
mod lanes_gguf;
#[path = "cuda/nf4.rs"]
mod nf4;
#[path = "cuda/norm.rs"]
mod norm;
#[path = "cuda/optimizer.rs"]
mod optimizer;
#[path = "cuda/padded.rs"]
mod padded;
#[path = "cuda/paged_attention.rs"]
mod paged_attention;
#[path = "cuda/places.rs"]
mod places;
#[path = "cuda/pointwise.rs"]
mod pointwise;
#[path = "cuda/rollout.rs"]
mod rollout;
#[path = "cuda/rope.rs"]
mod rope;
#[path = "cuda/rows.rs"]
mod rows;
#[path = "cuda/support.rs"]
mod support;
#[path = "cuda/swiglu.rs"]
mod swiglu;
#[path = "cuda/swiglu_adapters.rs"]
mod swiglu_adapters;
#[path = "cuda/tiny.rs"]
mod tiny;
#[path = "cuda/tuning.rs"]
mod tuning;
