//! Memory and time: queues of a device and what has been asked of them, owned memory and views of it, copies between any
//! places, timers; the GPU itself.
//!
//! A [`Queue`] does its work in the order in which it is asked for. A device has a main queue, on which tensors are made,
//! kernels run and memory is freed; queues beside it copy and exchange, ordered by [`Ticket`]s. A [`Buffer`] owns bytes and is
//! freed after everything that was asked of it; a [`Matrix`] or [`Pointer`] is lent by what owns the memory. [`Parking`] is a
//! policy over copies. Launchers of `kernels` take the views, `ops` and `quant` make them of tensors.
//!
//! In a program that was built without GPUs the same names stand for the host: its work is done when the call returns, every
//! place is host memory, and what only a GPU has is an error. So nobody above asks how the program was built.
#![expect(unsafe_code, reason = "raw memory")]

mod arena;
mod buffer;
mod captured;
mod card;
mod error;
#[cfg(feature = "cuda")]
mod gpu;
#[cfg(not(feature = "cuda"))]
#[path = "no_gpu.rs"]
mod gpu;
mod host;
mod memory;
mod parking;
mod queue;
mod ticket;
pub mod timers;
mod view;

pub use arena::Arena;
pub use buffer::{Buffer, Part, Place, Plain, bytes_of_mut};
pub use captured::Captured;
pub use card::{
    Footprint, IS_BUILT_FOR_GPUS, MemoryUse, compute_capability, device_memory_used, device_name, device_uuid,
    footprint, free_memory, free_memory_shared, has_bf16, is_cuda_device, limit_memory, memory_use, multiprocessors,
    open, reset_peak, synchronize,
};
pub use error::Error;
pub(crate) use error::argument;
pub use host::free_host_memory;
pub use memory::{
    download, download_f64, download_u8, download_u32, empty, overwrite, upload_f32, upload_i32, upload_u8, upload_u32,
    upload_u64,
};
pub use parking::{Parked, Parking, Returning};
pub use queue::Queue;
pub use ticket::{Ticket, Work};
pub use view::{Matrix, Pointer, array, matrix};
#[cfg(feature = "cuda")]
pub(crate) use {error::failed, gpu::cuda};

/// The stream of a device's main queue, as the kernels' interface names it.
///
/// # Errors
/// If `device` is no GPU.
pub(crate) fn raw_stream(device: &candle_core::Device) -> Result<*mut std::ffi::c_void, Error> {
    Ok(gpu::Stream::of(device)?.raw())
}
