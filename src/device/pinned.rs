//! Page-locked host memory: copies at full speed, and kernels read it in place.

use std::sync::Arc;

use candle_core::{DType, Device};
use cudarc::driver::CudaContext;
use cudarc::driver::sys::{CU_MEMHOSTALLOC_DEVICEMAP, CU_MEMHOSTALLOC_PORTABLE, cuMemFreeHost, cuMemHostAlloc};
use rayon::prelude::*;

use super::memory::{Matrix, cuda};
use super::{Error, failed};

/// A block of page-locked memory; its address is the same for the host and for every GPU.
#[derive(Debug)]
pub struct Pinned {
    address: u64,
    bytes: usize,
    /// Keeps the context alive in which the memory was locked.
    context: Arc<CudaContext>,
}

impl Pinned {
    /// Locks `bytes` of host memory.
    ///
    /// # Errors
    /// If the system does not allow it.
    pub fn new(device: &Device, bytes: usize) -> Result<Self, Error> {
        let context = cuda(device)?.cuda_stream().context().clone();
        let driver = failed("locking host memory");
        context.bind_to_thread().map_err(driver)?;
        let mut memory = std::ptr::null_mut();
        let flags = CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: `memory` outlives the call; a size of 0 is not asked for.
        unsafe { cuMemHostAlloc(&raw mut memory, bytes.max(1), flags) }.result().map_err(driver)?;
        Ok(Self { address: memory as u64, bytes, context })
    }

    /// Its length.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// All of it as a matrix that kernels read.
    pub fn matrix(&self, dtype: DType, rows: usize, cols: usize) -> Matrix {
        debug_assert!(rows * cols * dtype.size_in_bytes() <= self.bytes, "[{rows}, {cols}] in {} bytes", self.bytes);
        Matrix { address: self.address, dtype, rows, cols, stride: cols }
    }

    /// The first `count` bytes; a copy may be reading them, nothing may be writing them.
    pub(super) fn bytes(&self, count: usize) -> &[u8] {
        assert!(count <= self.bytes, "{count} of {} bytes", self.bytes);
        // SAFETY: the block is that long and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.address as *const u8, count) }
    }

    /// The first `count` bytes, as the target of a copy.
    pub(super) fn bytes_mut(&mut self, count: usize) -> &mut [u8] {
        assert!(count <= self.bytes, "{count} of {} bytes", self.bytes);
        // SAFETY: the block is that long, lives as long as `self`, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.address as *mut u8, count) }
    }

    /// Copies values into the block, on all cores. No kernel may be reading it.
    ///
    /// # Panics
    /// If they do not fit.
    pub fn fill_with<T: Copy + Send + Sync>(&mut self, values: &[T]) {
        const CHUNK: usize = 1 << 20;
        assert!(size_of_val(values) <= self.bytes, "{} bytes in a block of {}", size_of_val(values), self.bytes);
        // SAFETY: the range lies within the block, as just checked; the block is aligned to a page and mutably borrowed; any
        // bits are a value of the plain numbers that are copied.
        let target = unsafe { std::slice::from_raw_parts_mut(self.address as *mut T, values.len()) };
        target.par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK)).for_each(|(to, from)| to.copy_from_slice(from));
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: the address came from `cuMemHostAlloc` and is freed once; the driver waits for kernels that read it.
            let _ = unsafe { cuMemFreeHost(self.address as *mut std::ffi::c_void) };
        }
    }
}
