//! Page-locked host memory: copies at full speed, and kernels read it in place.

use std::sync::Arc;

use candle_core::{DType, Device};
use cudarc::driver::CudaContext;
use cudarc::driver::sys::{CU_MEMHOSTALLOC_DEVICEMAP, CU_MEMHOSTALLOC_PORTABLE, cuMemFreeHost, cuMemHostAlloc};
use half::{bf16, f16};

use super::Error;
use super::memory::{Matrix, cuda};

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
        let driver = |source| Error::Driver { what: "locking host memory", source };
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

    /// Writes floats as values of `dtype`, from element `first` on. No kernel may be reading them.
    ///
    /// # Panics
    /// If they do not fit.
    pub fn write_floats(&self, dtype: DType, first: usize, values: &[f32]) {
        let size = dtype.size_in_bytes();
        assert!((first + values.len()) * size <= self.bytes, "{} floats from {first} on", values.len());
        let start = self.address as usize + first * size;
        // SAFETY: the range lies within the block, as just checked; the block is aligned to a page; this is the time before
        // the block is handed to kernels, and `Pinned` gives out no other reference to its values.
        unsafe {
            match dtype {
                DType::BF16 => {
                    let out = std::slice::from_raw_parts_mut(start as *mut bf16, values.len());
                    out.iter_mut().zip(values).for_each(|(o, &v)| *o = bf16::from_f32(v));
                }
                DType::F16 => {
                    let out = std::slice::from_raw_parts_mut(start as *mut f16, values.len());
                    out.iter_mut().zip(values).for_each(|(o, &v)| *o = f16::from_f32(v));
                }
                _ => std::slice::from_raw_parts_mut(start as *mut f32, values.len()).copy_from_slice(values),
            }
        }
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
