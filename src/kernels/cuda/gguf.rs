//! GGUF's block formats.

use candle_core::{DType, Device};

use super::checks::expect_array;
use super::launch::{RawMatrix, RawStream, kernels, launched, stream};
use crate::device::{Error, Matrix, Pointer, argument};
pub use crate::kernels::cpu::BlockFormat as GgufKind;

kernels! {
    // Of `gguf.cu`.
    fn trainer_dequantize_gguf(out: RawMatrix, kind: i32, blocks: u64, first_row: i64, stream: RawStream) -> i32;
}

/// The number of a format in the kernel's interface; `None` for plain floats.
pub(super) fn kind_code(kind: GgufKind) -> Option<i32> {
    Some(match kind {
        GgufKind::F32 | GgufKind::F16 | GgufKind::Bf16 => return None,
        GgufKind::Q4_0 => 0,
        GgufKind::Q4_1 => 1,
        GgufKind::Q5_0 => 2,
        GgufKind::Q5_1 => 3,
        GgufKind::Q8_0 => 4,
        GgufKind::Q2K => 5,
        GgufKind::Q3K => 6,
        GgufKind::Q4K => 7,
        GgufKind::Q5K => 8,
        GgufKind::Q6K => 9,
    })
}

/// Dequantises rows `first_row ..` of a matrix of `cols` columns, as many as `out` has; bitwise the CPU's values,
/// rounded to the type of `out`.
///
/// # Shapes
/// `out`: f32, f16 or bf16 `[rows, cols]`, any stride; `blocks`: u8, the whole matrix as stored, at a multiple of 16
/// bytes. Fast where the rows of `out` lie at multiples of 16 bytes.
///
/// # Errors
/// If `kind` is a plain float type, `out` has other columns, a row is no whole number of blocks, or `blocks` ends
/// before the rows do.
pub fn dequantize_gguf(
    device: &Device,
    out: Matrix,
    kind: GgufKind,
    blocks: Pointer,
    first_row: usize,
    cols: usize,
) -> Result<(), Error> {
    const KERNEL: &str = "dequantize_gguf";
    let Some(number) = kind_code(kind) else {
        return Err(argument(KERNEL, "kind", kind, "a format of quantised blocks"));
    };
    let row_bytes = kind.bytes_of(cols).filter(|_| out.cols == cols);
    let Some(row_bytes) = row_bytes else {
        let expected = format!("{cols} columns, a multiple of {}", kind.block_len());
        return Err(argument(KERNEL, "out", [out.rows, out.cols], expected));
    };
    let needed = (first_row + out.rows) * row_bytes;
    expect_array(KERNEL, "blocks", blocks, DType::U8, needed)?;
    // SAFETY: both addresses are views of live device memory that is long enough, as checked above; the work is ordered
    // by the device's one compute stream.
    let code =
        unsafe { trainer_dequantize_gguf(out.into(), number, blocks.address, first_row as i64, stream(device)?) };
    launched(KERNEL, code)
}
