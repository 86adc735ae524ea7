//! Memory and time of a device: the GPU itself, its tensors' memory and views of it, page-locked memory, copies beside the
//! computation, timers.
//!
//! Launchers of `kernels` take the views, `ops` and `quant` make them of tensors, `engine` parks activations. All work of a
//! device goes to its one compute stream in the order in which it is asked for; what goes elsewhere is ordered by events.
#![cfg_attr(feature = "cuda", expect(unsafe_code, reason = "raw device memory"))]

#[cfg(feature = "cuda")]
mod card;
mod error;
#[cfg(feature = "cuda")]
mod memory;
#[cfg(feature = "cuda")]
mod parking;
#[cfg(feature = "cuda")]
mod pinned;
#[cfg(feature = "cuda")]
pub mod timers;

#[cfg(feature = "cuda")]
pub use card::{
    MemoryUse, compute_capability, device_memory_used, device_name, free_memory, has_bf16, is_cuda_device, memory_use,
    open, reset_peak, synchronize,
};
pub use error::Error;
#[cfg(feature = "cuda")]
pub(crate) use error::{argument, failed};
#[cfg(feature = "cuda")]
pub(crate) use memory::cuda;
#[cfg(feature = "cuda")]
pub use memory::{
    Matrix, Pointer, array, download, download_f64, download_u8, download_u32, empty, matrix, overwrite,
    overwrite_from_pinned, upload_f32, upload_i32, upload_u8, upload_u32, upload_u64,
};
#[cfg(feature = "cuda")]
pub use parking::{Parked, Parking, Returning};
#[cfg(feature = "cuda")]
pub use pinned::Pinned;
