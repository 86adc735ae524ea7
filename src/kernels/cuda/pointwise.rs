//! Work on every value of a matrix: sums, casts, copies, dropout; sums of columns; a check for infinities.
//!
//! Legend: `R` rows, `C` columns. Matrices are of any of f32, f16 and bf16, each its own unless said otherwise; the
//! arithmetic is f32. Results may lie on operands, value on value.

use candle_core::{DType, Device};

use super::checks::{column_splits, expect_array, expect_shape};
use super::launch::{RawMatrix, RawStream, kernels, launched, stream};
use crate::device::{Error, Matrix, Pointer, argument};

kernels! {
    // Of `pointwise.cu`.
    fn trainer_axpby(y: RawMatrix, alpha: f32, x: RawMatrix, beta: f32, stream: RawStream) -> i32;
    fn trainer_dropout(
        y: RawMatrix,
        x: RawMatrix,
        token_keys: u64,
        key: u64,
        least_kept: u64,
        scale: f32,
        is_added: i32,
        stream: RawStream,
    ) -> i32;
    fn trainer_fill(y: RawMatrix, value: f32, stream: RawStream) -> i32;
    fn trainer_count_non_finite(count: u64, x: RawMatrix, stream: RawStream) -> i32;
    fn trainer_column_sums(sums: u64, x: RawMatrix, workspace: u64, splits: i32, stream: RawStream) -> i32;
}

/// Where pieces of `cols` columns begin, and how many they have: few enough for the kernels to count, so that flat
/// buffers of any length are one row.
fn pieces(cols: usize) -> impl Iterator<Item = (usize, usize)> {
    const MOST: usize = 1 << 30;
    (0..cols).step_by(MOST).map(move |first| (first, MOST.min(cols - first)))
}

fn expect_like(kernel: &'static str, name: &'static str, m: &Matrix, like: &Matrix) -> Result<(), Error> {
    if (m.rows, m.cols) == (like.rows, like.cols) {
        return Ok(());
    }
    Err(argument(kernel, name, [m.rows, m.cols], [like.rows, like.cols]))
}

/// `y = alpha * x + beta * y`; with `beta` 0 the old `y` is not read: a cast, a copy into another stride, a scaling.
///
/// # Shapes
/// `y`, `x`: `[R, C]`.
///
/// # Errors
/// If the shapes differ.
pub fn axpby(device: &Device, y: Matrix, alpha: f32, x: Matrix, beta: f32) -> Result<(), Error> {
    const KERNEL: &str = "axpby";
    expect_like(KERNEL, "x", &x, &y)?;
    for (first, cols) in pieces(y.cols) {
        let (y, x) = (y.columns(first, cols), x.columns(first, cols));
        expect_shape(KERNEL, "y", &y, y.rows, cols)?;
        // SAFETY: the arguments are views of live device memory whose shapes were checked above; the work is ordered by
        // the device's one compute stream.
        let code = unsafe { trainer_axpby(y.into(), alpha, x.into(), beta, stream(device)?) };
        launched(KERNEL, code)?;
    }
    Ok(())
}

/// Sets every value of `y`.
///
/// # Shapes
/// `y`: `[R, C]`.
///
/// # Errors
/// If the launch fails.
pub fn fill(device: &Device, y: Matrix, value: f32) -> Result<(), Error> {
    const KERNEL: &str = "fill";
    for (first, cols) in pieces(y.cols) {
        let y = y.columns(first, cols);
        expect_shape(KERNEL, "y", &y, y.rows, cols)?;
        // SAFETY: as in `axpby`.
        let code = unsafe { trainer_fill(y.into(), value, stream(device)?) };
        launched(KERNEL, code)?;
    }
    Ok(())
}

/// Length of the workspace, in f32, of [`column_sums`] for a matrix of this shape.
pub fn column_sums_workspace(rows: usize, cols: usize) -> usize {
    column_splits(rows, cols) * cols
}

/// Adds the sum of the rows of `x`. The order of the sums depends on the shape alone.
///
/// # Shapes
/// `sums`: f32 `[C]`; `x`: `[R, C]`; `workspace`: f32 of [`column_sums_workspace`].
///
/// # Errors
/// If the shapes do not fit.
pub fn column_sums(device: &Device, sums: Pointer, x: Matrix, workspace: Pointer) -> Result<(), Error> {
    const KERNEL: &str = "column_sums";
    expect_shape(KERNEL, "x", &x, x.rows, x.cols)?;
    expect_array(KERNEL, "sums", sums, DType::F32, x.cols)?;
    expect_array(KERNEL, "workspace", workspace, DType::F32, column_sums_workspace(x.rows, x.cols))?;
    let splits = column_splits(x.rows, x.cols) as i32;
    // SAFETY: as in `axpby`.
    let code = unsafe { trainer_column_sums(sums.address, x.into(), workspace.address, splits, stream(device)?) };
    launched(KERNEL, code)
}

/// The least hash that [`crate::rng::is_kept`] keeps: it compares the upper 53 bits with `2^53 p` as real numbers, and
/// a whole number is not below a real one exactly if it is not below the next whole number from there.
fn least_kept(probability: f64) -> u64 {
    let threshold = (probability * (1u64 << 53) as f64).ceil() as u64;
    threshold << 11
}

/// `y = drop(x)` or `y += drop(x)`: values that a row's key does not keep become 0, the others are scaled by `1 / (1 -
/// p)`. The mask is that of [`crate::rng::is_kept`] with the row's key `mix(key ^ token_keys[row])`, to the bit.
///
/// # Shapes
/// `y`, `x`: `[N, C]`; `token_keys`: u64 `[N]`.
///
/// # Errors
/// If the shapes do not fit, or `probability` is outside [0, 1).
pub fn dropout(
    device: &Device,
    y: Matrix,
    x: Matrix,
    token_keys: Pointer,
    key: u64,
    probability: f64,
    is_added: bool,
) -> Result<(), Error> {
    const KERNEL: &str = "dropout";
    if !(0.0..1.0).contains(&probability) {
        return Err(argument(KERNEL, "probability", probability, "in [0, 1)"));
    }
    expect_shape(KERNEL, "x", &x, y.rows, y.cols)?;
    expect_array(KERNEL, "token_keys", token_keys, DType::I64, y.rows)?;
    let scale = (1.0 / (1.0 - probability)) as f32;
    // SAFETY: as in `axpby`.
    let code = unsafe {
        trainer_dropout(
            y.into(),
            x.into(),
            token_keys.address,
            key,
            least_kept(probability),
            scale,
            i32::from(is_added),
            stream(device)?,
        )
    };
    launched(KERNEL, code)
}

/// Adds the number of values that are infinite or not a number.
///
/// # Shapes
/// `count`: u32 `[1]`; `x`: `[R, C]`.
///
/// # Errors
/// If the shapes do not fit.
pub fn count_non_finite(device: &Device, count: Pointer, x: Matrix) -> Result<(), Error> {
    const KERNEL: &str = "count_non_finite";
    expect_array(KERNEL, "count", count, DType::U32, 1)?;
    for (first, cols) in pieces(x.cols) {
        let x = x.columns(first, cols);
        expect_shape(KERNEL, "x", &x, x.rows, cols)?;
        // SAFETY: as in `axpby`.
        let code = unsafe { trainer_count_non_finite(count.address, x.into(), stream(device)?) };
        launched(KERNEL, code)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{least_kept, pieces};
    use crate::rng::Stream;

    #[test]
    fn the_least_kept_hash_decides_as_the_comparison_of_real_numbers() {
        let mut stream = Stream::new(3, "least kept", 0, 0);
        let two_53 = (1u64 << 53) as f64;
        let whole = (1u64 << 40) as f64 / two_53;
        for p in [0.0, 1e-300, 1e-17, whole, 0.05, 0.1, 0.3, 0.5, 1.0 - f64::EPSILON, 1.0 - f64::EPSILON / 2.0] {
            let near = (p * two_53) as u64;
            let close = (0..5).map(|i| (near.saturating_sub(2) + i).min((1 << 53) - 1) << 11);
            let others: Vec<u64> = close.chain((0..1000).map(|_| stream.bits())).chain([0, u64::MAX]).collect();
            for bits in others.into_iter().flat_map(|b| [b, b | 0x7ff]) {
                assert_eq!(bits >= least_kept(p), (bits >> 11) as f64 >= p * two_53, "{bits} at {p}");
            }
        }
    }

    #[test]
    fn pieces_cover_all_columns_once() {
        assert_eq!(pieces(0).count(), 0);
        assert_eq!(pieces(7).collect::<Vec<_>>(), [(0, 7)]);
        assert_eq!(pieces((1 << 31) + 5).collect::<Vec<_>>(), [(0, 1 << 30), (1 << 30, 1 << 30), (1 << 31, 5)]);
    }
}
