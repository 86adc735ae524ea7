//! Rotary position embedding (Su et al., 2104.09864), in the half-split layout of Hugging Face's Qwen.
//!
//! Legend: `N` tokens, `H` heads, `d` columns of a head.

use candle_core::{DType, Device};

use super::checks::{expect_array, expect_shape};
use super::launch::{RawMatrix, RawStream, kernels, launched, stream};
use crate::device::{Error, Matrix, Pointer, argument};

kernels! {
    // Of `rope.cu`.
    fn trainer_rope_table(
        table: u64,
        positions: u64,
        frequencies: u64,
        rows: i64,
        half: i32,
        scale: f32,
        stream: RawStream,
    ) -> i32;
    fn trainer_rope(x: RawMatrix, table: u64, heads: i32, d: i32, is_backward: i32, stream: RawStream) -> i32;
}

/// Cosines and sines of the angles `position * frequency`, in f32 as the reference computes them, times `scale`
/// (`YaRN`'s attention factor, else 1).
///
/// # Shapes
/// `positions`: u32 `[N]`; `frequencies`: f32 `[d / 2]`; `table`: f32 `[N, d / 2, 2]`, the cosine first.
///
/// # Errors
/// If the table has another length.
pub fn rope_table(
    device: &Device,
    table: Pointer,
    positions: Pointer,
    frequencies: Pointer,
    scale: f32,
) -> Result<(), Error> {
    const KERNEL: &str = "rope_table";
    let needed = positions.len * frequencies.len * 2;
    expect_array(KERNEL, "positions", positions, DType::U32, 0)?;
    expect_array(KERNEL, "frequencies", frequencies, DType::F32, 0)?;
    expect_array(KERNEL, "table", table, DType::F32, needed)?;
    if table.len != needed {
        return Err(argument(KERNEL, "table", table.len, needed));
    }
    // SAFETY: the arguments are views of live device memory whose lengths were checked above; the work is ordered by
    // the device's one compute stream.
    let code = unsafe {
        trainer_rope_table(
            table.address,
            positions.address,
            frequencies.address,
            positions.len as i64,
            frequencies.len as i32,
            scale,
            stream(device)?,
        )
    };
    launched(KERNEL, code)
}

/// Rotates each head of each token by its position, in place; with `is_backward` by the opposite angle, which is the
/// gradient.
///
/// # Shapes
/// `x`: any float type `[N, H d]`; `table`: f32 `[N, d / 2, 2]`, as [`rope_table`] makes it.
///
/// # Errors
/// If the shapes do not fit, or `d` is odd.
pub fn rope(
    device: &Device,
    x: Matrix,
    table: Pointer,
    heads: usize,
    d: usize,
    is_backward: bool,
) -> Result<(), Error> {
    const KERNEL: &str = "rope";
    expect_shape(KERNEL, "x", &x, x.rows, heads * d)?;
    if !d.is_multiple_of(2) || u32::try_from(x.rows * heads).is_err() {
        let fits = "even columns of a head, and less than 2^32 heads over all rows";
        return Err(argument(KERNEL, "heads", (x.rows, heads, d), fits));
    }
    expect_array(KERNEL, "table", table, DType::F32, x.rows * d)?;
    // SAFETY: as in `rope_table`.
    let code = unsafe {
        trainer_rope(x.into(), table.address, heads as i32, d as i32, i32::from(is_backward), stream(device)?)
    };
    launched(KERNEL, code)
}
