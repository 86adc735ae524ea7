//! 4-bit codes with block maxima, as bitsandbytes defines them.

use candle_core::{DType, Device};

use super::checks::expect_array;
use super::launch::{RawMatrix, RawStream, kernels, launched, stream, type_code};
use crate::device::{Error, Matrix, Pointer, argument};
use crate::kernels::cpu::codebook::BLOCK_LEN;

/// Maxima that share one nested maximum.
pub(super) const NESTED_BLOCK: usize = 256;

/// Values of the map of 8-bit maxima.
pub(super) const MAP_LEN: usize = 256;

kernels! {
    // Of `nf4.cu`.
    fn trainer_dequantize_nf4(
        out: RawMatrix,
        packed: u64,
        absmax: u64,
        codes: u64,
        nested_absmax: u64,
        map: u64,
        offset: f32,
        values: u64,
        first_row: i64,
        stream: RawStream,
    ) -> i32;
    fn trainer_quantize_nf4(
        packed: u64,
        absmax: u64,
        x: u64,
        dtype: i32,
        count: i64,
        is_fp4: i32,
        stream: RawStream,
    ) -> i32;
    fn trainer_quantize_maxima(
        codes: u64,
        nested_absmax: u64,
        maxima: u64,
        map: u64,
        offset: f32,
        count: i64,
        stream: RawStream,
    ) -> i32;
}

/// The block maxima of a 4-bit matrix on the device.
#[derive(Clone, Copy, Debug)]
pub enum Nf4Absmax<'b> {
    /// f32 `[blocks]`.
    Plain(Pointer<'b>),
    /// `map[codes[i]] * absmax[i / 256] + offset`.
    Nested {
        /// u8 `[blocks]`.
        codes: Pointer<'b>,
        /// f32 `[ceil(blocks / 256)]`.
        absmax: Pointer<'b>,
        /// f32 `[256]`.
        map: Pointer<'b>,
        /// The mean that was subtracted.
        offset: f32,
    },
}

/// A 4-bit matrix on the device.
#[derive(Clone, Copy, Debug)]
pub struct Nf4View<'b> {
    /// u8 `[ceil(rows * cols / 2)]`: two codes a byte, the first in the high nibble.
    pub packed: Pointer<'b>,
    /// Maxima of blocks of 64 over the flattened matrix.
    pub absmax: Nf4Absmax<'b>,
    /// f32 `[16]`: value of each code.
    pub values: Pointer<'b>,
}

/// Dequantises rows `first_row ..` of a 4-bit matrix of `cols` columns, as many as `out` has; bitwise the CPU's values,
/// rounded to the type of `out`.
///
/// # Shapes
/// `out`: f32, f16 or bf16 `[rows, cols]`, any stride. Fast where `cols` is a multiple of 64 and the rows of `out` lie
/// at multiples of 16 bytes.
///
/// # Errors
/// If `out` has other columns or a part of `view` ends before the rows do.
pub fn dequantize_nf4(
    device: &Device,
    out: Matrix,
    view: &Nf4View,
    first_row: usize,
    cols: usize,
) -> Result<(), Error> {
    const KERNEL: &str = "dequantize_nf4";
    if out.cols != cols {
        return Err(argument(KERNEL, "out", [out.rows, out.cols], format!("{cols} columns")));
    }
    let length = (first_row + out.rows) * cols;
    let blocks = length.div_ceil(BLOCK_LEN);
    expect_array(KERNEL, "packed", view.packed, DType::U8, length.div_ceil(2))?;
    expect_array(KERNEL, "values", view.values, DType::F32, 16)?;
    let (plain, codes, nested_absmax, map, offset) = match view.absmax {
        Nf4Absmax::Plain(absmax) => {
            expect_array(KERNEL, "absmax", absmax, DType::F32, blocks)?;
            (absmax.address, 0, 0, 0, 0.0)
        }
        Nf4Absmax::Nested { codes, absmax, map, offset } => {
            expect_array(KERNEL, "codes", codes, DType::U8, blocks)?;
            expect_array(KERNEL, "nested absmax", absmax, DType::F32, blocks.div_ceil(NESTED_BLOCK))?;
            expect_array(KERNEL, "map", map, DType::F32, MAP_LEN)?;
            (0, codes.address, absmax.address, map.address, offset)
        }
    };
    // SAFETY: all addresses are views of live device arrays that are long enough, as checked above; the work is ordered
    // by the device's one compute stream.
    let code = unsafe {
        trainer_dequantize_nf4(
            out.into(),
            view.packed.address,
            plain,
            codes,
            nested_absmax,
            map,
            offset,
            view.values.address,
            first_row as i64,
            stream(device)?,
        )
    };
    launched(KERNEL, code)
}

/// Quantises `count` values to 4 bits; bitwise what the CPU makes of them.
///
/// # Shapes
/// `x`: `dtype` (f32, f16 or bf16) `[count]`; `packed`: u8 `[ceil(count / 2)]`; `absmax`: f32 `[ceil(count / 64)]`.
///
/// # Errors
/// If an array is too short or `dtype` is no float type.
pub fn quantize_nf4(
    device: &Device,
    packed: Pointer,
    absmax: Pointer,
    x: Pointer,
    dtype: DType,
    count: usize,
    is_fp4: bool,
) -> Result<(), Error> {
    const KERNEL: &str = "quantize_nf4";
    if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
        return Err(argument(KERNEL, "dtype", dtype, "f32, f16 or bf16"));
    }
    expect_array(KERNEL, "packed", packed, DType::U8, count.div_ceil(2))?;
    expect_array(KERNEL, "absmax", absmax, DType::F32, count.div_ceil(BLOCK_LEN))?;
    expect_array(KERNEL, "x", x, dtype, count)?;
    // SAFETY: the three addresses are views of live device arrays that are long enough, as checked above; the work is
    // ordered by the device's one compute stream.
    let code = unsafe {
        trainer_quantize_nf4(
            packed.address,
            absmax.address,
            x.address,
            type_code(dtype),
            count as i64,
            i32::from(is_fp4),
            stream(device)?,
        )
    };
    launched(KERNEL, code)
}

/// Quantises `count` block maxima to 8 bits after subtracting `offset`, in blocks of 256; bitwise what the CPU makes of
/// them for that offset.
///
/// # Shapes
/// `maxima`: f32 `[count]`; `map`: f32 `[256]`, ascending; `codes`: u8 `[count]`; `nested_absmax`: f32
/// `[ceil(count / 256)]`.
///
/// # Errors
/// If an array is too short.
pub fn quantize_maxima(
    device: &Device,
    codes: Pointer,
    nested_absmax: Pointer,
    maxima: Pointer,
    map: Pointer,
    offset: f32,
    count: usize,
) -> Result<(), Error> {
    const KERNEL: &str = "quantize_maxima";
    expect_array(KERNEL, "codes", codes, DType::U8, count)?;
    expect_array(KERNEL, "nested_absmax", nested_absmax, DType::F32, count.div_ceil(NESTED_BLOCK))?;
    expect_array(KERNEL, "maxima", maxima, DType::F32, count)?;
    expect_array(KERNEL, "map", map, DType::F32, MAP_LEN)?;
    // SAFETY: the four addresses are views of live device arrays that are long enough, as checked above; the work is
    // ordered by the device's one compute stream.
    let code = unsafe {
        trainer_quantize_maxima(
            codes.address,
            nested_absmax.address,
            maxima.address,
            map.address,
            offset,
            count as i64,
            stream(device)?,
        )
    };
    launched(KERNEL, code)
}
