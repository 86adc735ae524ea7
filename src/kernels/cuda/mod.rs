//! CUDA kernels: `.cu` files built by `build.rs`, one safe launcher for each, cuBLAS products, the device itself.
//!
//! Launchers take [`Matrix`] and [`Pointer`] views of device tensors, check shapes and types, and put the work on the
//! device's one compute stream. Nothing here waits for the device unless its name says so.
#![expect(unsafe_code, reason = "kernel launches and raw device memory")]

mod assemble;
mod attention;
mod checks;
mod device;
mod gemm;
mod gguf;
mod head;
mod launch;
mod memory;
mod nf4;
mod norm;
mod optimizer;
mod paged_attention;
mod parking;
mod pinned;
mod pointwise;
pub mod profile;
mod rope;
mod rows;
mod swiglu;
mod swiglu_adapters;

pub use assemble::{Part, assemble};
pub use attention::{
    AttentionPlan, AttentionVariant, SegmentRange, attention_backward, attention_backward_with, attention_forward,
    attention_forward_with,
};
pub use device::{
    MemoryUse, compute_capability, device_memory_used, device_name, free_memory, has_bf16, is_cuda_device, memory_use,
    open, reset_peak, synchronize,
};
pub use gemm::{Accumulate, Side, gemm, is_tuned, tune};
pub use gguf::{GgufKind, dequantize_gguf};
pub use head::{HeadState, head_backward_chunk, head_finish, head_forward_chunk, head_start};
pub use memory::{
    Matrix, Pointer, array, download, download_f64, download_u8, download_u32, empty, matrix, overwrite,
    overwrite_from_pinned, upload_f32, upload_i32, upload_u8, upload_u32, upload_u64,
};
pub use nf4::{Nf4Absmax, Nf4View, dequantize_nf4, quantize_maxima, quantize_nf4};
pub use norm::{rms_norm, rms_norm_backward, rms_norm_weight_gradient, rms_norm_workspace};
pub use optimizer::{AdamWFactors, adamw, sums_of_squares, sums_of_squares_workspace};
pub use paged_attention::{
    NO_SLOT, PagedCache, PagedRows, copy_pages, page_stores, paged_attention, paged_attention_workspace, write_pages,
};
pub use parking::{Parked, Parking, Returning};
pub use pinned::Pinned;
pub use pointwise::{axpby, column_sums, column_sums_workspace, count_non_finite, dropout, fill};
pub use rope::{rope, rope_table};
pub use rows::{RowGroups, gather_rows, group_rows, sum_rows};
pub use swiglu::{MOST_SHARE_RANKS, swiglu, swiglu_backward};
pub use swiglu_adapters::{
    DownAdapter, MOST_SWIGLU_RANKS, MlpAdapters, OutAdapter, swiglu_adapters_fit, swiglu_backward_adapters,
    swiglu_backward_adapters_workspace,
};

/// What went wrong on the device.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A kernel could not be launched, or an earlier one failed.
    #[error("{kernel}: CUDA error {code} ({meaning})")]
    Launch {
        /// Which kernel.
        kernel: &'static str,
        /// CUDA's error number.
        code: i32,
        /// What it means.
        meaning: &'static str,
    },
    /// The driver reported an error.
    #[error("{what}: {source}")]
    Driver {
        /// What was asked of it.
        what: &'static str,
        /// Its answer.
        source: cudarc::driver::DriverError,
    },
    /// cuBLAS reported an error.
    #[error("matrix product [{m}, {k}] x [{k}, {n}]: {source:?}")]
    Blas {
        /// Rows of the result.
        m: usize,
        /// Columns of the result.
        n: usize,
        /// Length of the sums.
        k: usize,
        /// Its answer.
        source: cudarc::cublas::result::CublasError,
    },
    /// An argument of a launcher has the wrong shape, type or place.
    #[error("{kernel}: `{argument}` is {got}, expected {expected}")]
    Argument {
        /// Which kernel.
        kernel: &'static str,
        /// Which argument.
        argument: &'static str,
        /// What was given.
        got: String,
        /// What fits.
        expected: String,
    },
    /// The tensor library failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

pub(crate) fn argument(
    kernel: &'static str,
    argument: &'static str,
    got: impl std::fmt::Debug,
    expected: impl std::fmt::Debug,
) -> Error {
    Error::Argument { kernel, argument, got: format!("{got:?}"), expected: format!("{expected:?}") }
}
