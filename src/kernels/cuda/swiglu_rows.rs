//! The gated activation of a few rows, in the order in which products read them.

use candle_core::{DType, Device};

use super::launch::{RawMatrix, RawStream, kernels, launched, stream};
use super::row_layout::Rows;
use crate::device::{Error, Matrix, argument};

kernels! {
    // Of `swiglu_rows.cu`.
    fn trainer_swiglu_rows(y: RawMatrix, gate: RawMatrix, up: RawMatrix, stream: RawStream) -> i32;
}

/// `y = silu(gate) * up`, of sums that are first rounded to the type of `y`: what [`super::packed_product`] makes of two matrices
/// of one format.
///
/// # Shapes
/// `gate`, `up`: f32 `[M, O]`, without gaps between rows, O a multiple of 8; `y`: f16 or bf16 `[M, O]`.
///
/// # Errors
/// If shapes or types differ, or addresses are no multiples of 32 bytes.
pub fn swiglu_rows(device: &Device, y: Rows<'_>, gate: Matrix<'_>, up: Matrix<'_>) -> Result<(), Error> {
    const KERNEL: &str = "swiglu_rows";
    let fits = |m: Matrix<'_>| {
        m.shape() == y.shape() && m.dtype() == DType::F32 && m.stride == m.cols && m.address.is_multiple_of(32)
    };
    let is_type = matches!(y.dtype(), DType::F16 | DType::BF16);
    if !fits(gate) || !fits(up) || !is_type || !y.shape().1.is_multiple_of(8) {
        return Err(argument(KERNEL, "gate and up", (gate, up), format!("f32 rows of a 16-bit {:?}", y.shape())));
    }
    // SAFETY: the arguments are views of live device memory whose shapes were checked above; the work is ordered by the
    // device's one compute stream.
    let code = unsafe { trainer_swiglu_rows(y.raw(), gate.into(), up.into(), stream(device)?) };
    launched(KERNEL, code)
}
