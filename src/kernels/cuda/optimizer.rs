//! The optimizer over flat arrays: AdamW, and sums of squares for norms.

use std::ops::Range;

use candle_core::{DType, Device};

use super::checks::expect_array;
use super::launch::{RawStream, kernels, launched, stream};
use crate::device::{Error, Pointer, argument};
use crate::kernels::AdamWFactors;

kernels! {
    // Of `optimizer.cu`.
    fn trainer_adamw(
        values: u64,
        grads: u64,
        first: u64,
        second: u64,
        count: i64,
        factors: AdamWFactors,
        stream: RawStream,
    ) -> i32;
    fn trainer_sums_of_squares(sums: u64, values: u64, count: i64, offsets: u64, entries: i32, stream: RawStream)
    -> i32;
}

/// Moves the elements `range` of `values` by one step of AdamW and updates both moments in place. Operations and their
/// order are those of the CPU, so that results agree to the bit.
///
/// # Shapes
/// `values`, `grads`, `first`, `second`: f32 of at least `range.end` elements.
///
/// # Errors
/// If the range is not inside of all four.
///
/// # Equation
/// Loshchilov and Hutter (1711.05101), algorithm 2, in the form of `torch.optim.AdamW`:
/// `g *= grad_scale; m += (g - m) first_weight; v = v second_decay + second_weight g g;
/// p = p keep - step_size m / (sqrt(v) / root_correction + eps)`.
pub fn adamw(
    device: &Device,
    values: Pointer,
    grads: Pointer,
    first: Pointer,
    second: Pointer,
    range: Range<usize>,
    factors: AdamWFactors,
) -> Result<(), Error> {
    const KERNEL: &str = "adamw";
    if range.start > range.end {
        return Err(argument(KERNEL, "range", range, "a start before the end"));
    }
    for (name, pointer) in [("values", values), ("grads", grads), ("first", first), ("second", second)] {
        expect_array(KERNEL, name, pointer, DType::F32, range.end)?;
    }
    let part = |pointer: Pointer| pointer.from_element(range.start).address;
    // SAFETY: the arguments are views of live device memory whose lengths were checked above; the work is ordered by
    // the device's one compute stream.
    let code = unsafe {
        trainer_adamw(
            part(values),
            part(grads),
            part(first),
            part(second),
            range.len() as i64,
            factors,
            stream(device)?,
        )
    };
    launched(KERNEL, code)
}

/// The sum of squares of each entry of a flat array, accumulated in f64. The order of a sum depends on the entry's length
/// alone, not on where it lies.
///
/// # Shapes
/// `sums`: f64 `[E]` or longer; `values`: f32 `[n]`; `offsets`: u32 `[E + 1]`, where the entries begin and the last
/// ends.
///
/// # Errors
/// If the shapes do not fit, or the array is too long for its offsets.
pub fn sums_of_squares(device: &Device, sums: Pointer, values: Pointer, offsets: Pointer) -> Result<(), Error> {
    const KERNEL: &str = "sums_of_squares";
    let entries = offsets.len.saturating_sub(1);
    if u32::try_from(values.len).is_err() || i32::try_from(entries).is_err() {
        return Err(argument(KERNEL, "values", values.len, "less than 2^32 elements"));
    }
    expect_array(KERNEL, "sums", sums, DType::F64, entries)?;
    expect_array(KERNEL, "values", values, DType::F32, 0)?;
    expect_array(KERNEL, "offsets", offsets, DType::U32, 0)?;
    // SAFETY: as in `adamw`; the kernel keeps the entries inside the array.
    let code = unsafe {
        trainer_sums_of_squares(
            sums.address,
            values.address,
            values.len as i64,
            offsets.address,
            entries as i32,
            stream(device)?,
        )
    };
    launched(KERNEL, code)
}
