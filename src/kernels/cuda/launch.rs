//! What every launcher needs: matrices in C's layout, the stream, the check of a launch's return code.

use std::ffi::{CStr, c_char};

use candle_core::{DType, Device};
use cudarc::driver::sys::CUstream;

use crate::device::{Error, Matrix, Pointer, cuda};

/// `Matrix` of `common.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct RawMatrix {
    data: u64,
    stride: i64,
    rows: i32,
    cols: i32,
    dtype: i32,
    unused: i32,
}

impl From<Matrix> for RawMatrix {
    fn from(m: Matrix) -> Self {
        Self {
            data: m.address,
            stride: m.stride as i64,
            rows: m.rows as i32,
            cols: m.cols as i32,
            dtype: type_code(m.dtype()),
            unused: 0,
        }
    }
}

impl RawMatrix {
    /// Stands for an argument that is left out.
    pub(super) const NONE: Self = Self { data: 0, stride: 0, rows: 0, cols: 0, dtype: 0, unused: 0 };

    pub(super) fn or_none(matrix: Option<Matrix>) -> Self {
        matrix.map_or(Self::NONE, Self::from)
    }
}

/// The number of a type in the kernels' interface.
pub(super) fn type_code(dtype: DType) -> i32 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        _ => 2,
    }
}

/// The address of an array that may be left out.
pub(super) fn address_or_none(pointer: Option<Pointer>) -> u64 {
    pointer.map_or(0, |p| p.address)
}

/// The device's one compute stream.
pub(super) fn stream(device: &Device) -> Result<CUstream, Error> {
    Ok(cuda(device)?.cuda_stream().cu_stream())
}

// SAFETY: these are the signatures of the runtime's own header.
unsafe extern "C" {
    fn cudaGetErrorString(code: i32) -> *const c_char;
}

/// Turns a launcher's return code into a result.
pub(super) fn launched(kernel: &'static str, code: i32) -> Result<(), Error> {
    if code == 0 {
        return Ok(());
    }
    // SAFETY: the runtime returns a pointer to a string that lives as long as the process.
    let meaning = unsafe { CStr::from_ptr(cudaGetErrorString(code)) };
    Err(Error::Launch { kernel, code, meaning: meaning.to_str().unwrap_or("unknown") })
}
