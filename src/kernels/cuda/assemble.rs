//! A matrix put together from parts of other matrices in one launch: the adapters of a group side by side.

use candle_core::Device;

use super::checks::expect_shape;
use super::launch::{RawMatrix, RawStream, kernels, launched, stream, type_code};
use crate::device::{Error, Matrix, argument};

/// Most parts of one launch.
const MOST_PARTS: usize = 8;

/// `Part` of `assemble.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct RawPart {
    data: u64,
    stride: i64,
    first_row: i32,
    first_col: i32,
    rows: i32,
    cols: i32,
    dtype: i32,
    factor: f32,
}

kernels! {
    // Of `assemble.cu`.
    fn trainer_assemble(out: RawMatrix, parts: *const RawPart, count: i32, stream: RawStream) -> i32;
}

/// What [`assemble`] writes at one place.
#[derive(Clone, Copy, Debug)]
pub struct Part<'b> {
    /// The first of its rows in the result.
    pub rows: usize,
    /// The first of its columns in the result.
    pub cols: usize,
    /// The values, as many rows and columns as it takes in the result.
    pub source: Matrix<'b>,
    /// What the values are multiplied by.
    pub factor: f64,
}

/// `out` becomes `factor * source` where a part lies, 0 elsewhere. Where parts overlap the last one counts.
///
/// # Shapes
/// `out`: `[R, C]`; a part's `source`: `[r, c]` with `rows + r <= R` and `cols + c <= C`. All of any of f32, f16 and
/// bf16, each its own; the products are f32, rounded once. `out` lies on no source.
///
/// # Errors
/// If a part leaves `out`, or there are more than 8.
pub fn assemble(device: &Device, out: Matrix, parts: &[Part]) -> Result<(), Error> {
    const KERNEL: &str = "assemble";
    expect_shape(KERNEL, "out", &out, out.rows, out.cols)?;
    if parts.len() > MOST_PARTS {
        return Err(argument(KERNEL, "parts", parts.len(), format!("at most {MOST_PARTS} parts")));
    }
    for Part { rows, cols, source, .. } in parts {
        if rows + source.rows > out.rows || cols + source.cols > out.cols {
            let place = format!("[{rows} + {}, {cols} + {}]", source.rows, source.cols);
            return Err(argument(KERNEL, "parts", place, format!("inside of [{}, {}]", out.rows, out.cols)));
        }
    }
    let raw: Vec<RawPart> = parts
        .iter()
        .map(|part| RawPart {
            data: part.source.address,
            stride: part.source.stride as i64,
            first_row: part.rows as i32,
            first_col: part.cols as i32,
            rows: part.source.rows as i32,
            cols: part.source.cols as i32,
            dtype: type_code(part.source.dtype()),
            factor: part.factor as f32,
        })
        .collect();
    // SAFETY: the matrices are views of live device memory, the parts were checked to lie inside of `out`, and the list
    // of parts is read before the call returns; the work is ordered by the device's one compute stream.
    let code = unsafe { trainer_assemble(out.into(), raw.as_ptr(), raw.len() as i32, stream(device)?) };
    launched(KERNEL, code)
}
