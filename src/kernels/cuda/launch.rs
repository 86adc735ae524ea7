//! What every launcher needs: matrices in C's layout, the stream, the check of a launch's return code.

use std::ffi::c_void;

use candle_core::DType;

pub(super) use crate::device::raw_stream as stream;
use crate::device::{Error, Matrix, Pointer};

/// A stream in the kernels' interface.
pub(super) type RawStream = *mut c_void;

/// Declares launchers of a `.cu` file. In a program that was built without GPUs none is ever called, for there is no device
/// to call it with; each then says so.
macro_rules! kernels {
    ($(fn $name:ident($($argument:ident: $type:ty),* $(,)?) -> $code:ty;)*) => {
        #[cfg(feature = "cuda")]
        // SAFETY: these are the signatures of the `.cu` file that the invocation names.
        unsafe extern "C" {
            $(fn $name($($argument: $type),*) -> $code;)*
        }
        $(
            // SAFETY: there is nothing to promise.
            #[cfg(not(feature = "cuda"))]
            unsafe extern "C" fn $name($($argument: $type),*) -> $code {
                let _ = ($($argument,)*);
                <$code>::from(crate::kernels::cuda::launch::NO_DEVICE)
            }
        )*
    };
}
pub(super) use kernels;

/// The runtime's error for that.
#[cfg(not(feature = "cuda"))]
pub(super) const NO_DEVICE: i8 = 100;

/// `Matrix` of `common.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct RawMatrix {
    data: u64,
    stride: i64,
    rows: i32,
    cols: i32,
    dtype: i32,
    layout: i32,
}

impl From<Matrix<'_>> for RawMatrix {
    fn from(m: Matrix<'_>) -> Self {
        Self {
            data: m.address,
            stride: m.stride as i64,
            rows: m.rows as i32,
            cols: m.cols as i32,
            dtype: type_code(m.dtype()),
            layout: 0,
        }
    }
}

impl RawMatrix {
    /// The same with another order of columns and distance of rows, as `mma.cuh` numbers them.
    pub(super) fn ordered(self, layout: i32, stride: usize) -> Self {
        Self { layout, stride: stride as i64, ..self }
    }

    /// The same with values that are scaled, as `mma.cuh` numbers their types.
    pub(super) fn scaled(self) -> Self {
        Self { dtype: self.dtype + 2, ..self }
    }

    /// Stands for an argument that is left out.
    pub(super) const NONE: Self = Self { data: 0, stride: 0, rows: 0, cols: 0, dtype: 0, layout: 0 };

    pub(super) fn or_none(matrix: Option<Matrix<'_>>) -> Self {
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
pub(super) fn address_or_none(pointer: Option<Pointer<'_>>) -> u64 {
    pointer.map_or(0, |p| p.address)
}

/// Turns a launcher's return code into a result.
pub(super) fn launched(kernel: &'static str, code: i32) -> Result<(), Error> {
    if code == 0 { Ok(()) } else { Err(Error::Launch { kernel, code, meaning: meaning(code) }) }
}

#[cfg(feature = "cuda")]
fn meaning(code: i32) -> &'static str {
    use std::ffi::{CStr, c_char};
    // SAFETY: this is the signature of the runtime's own header.
    unsafe extern "C" {
        fn cudaGetErrorString(code: i32) -> *const c_char;
    }
    // SAFETY: the runtime returns a pointer to a string that lives as long as the process.
    let meaning = unsafe { CStr::from_ptr(cudaGetErrorString(code)) };
    meaning.to_str().unwrap_or("unknown")
}

#[cfg(not(feature = "cuda"))]
fn meaning(_code: i32) -> &'static str {
    "this program was built without GPUs"
}
