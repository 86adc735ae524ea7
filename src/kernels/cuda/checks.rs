//! Checks that launchers of memory-bound kernels share.

use candle_core::DType;

use crate::device::{Error, Matrix, Pointer, argument};

/// That a matrix has a shape, and that the kernels can count its rows and columns.
pub(super) fn expect_shape(
    kernel: &'static str,
    name: &'static str,
    m: &Matrix,
    rows: usize,
    cols: usize,
) -> Result<(), Error> {
    if (m.rows, m.cols) != (rows, cols) {
        return Err(argument(kernel, name, [m.rows, m.cols], [rows, cols]));
    }
    if i32::try_from(rows).is_err() || i32::try_from(cols).is_err() {
        return Err(argument(kernel, name, [rows, cols], "less than 2^31 rows and columns"));
    }
    Ok(())
}

/// That a matrix has a type.
pub(super) fn expect_type(kernel: &'static str, name: &'static str, m: &Matrix, dtype: DType) -> Result<(), Error> {
    if m.dtype() == dtype { Ok(()) } else { Err(argument(kernel, name, m.dtype(), dtype)) }
}

/// That an array has a type, and at least as many elements as the kernel touches.
pub(super) fn expect_array(
    kernel: &'static str,
    name: &'static str,
    pointer: Pointer<'_>,
    dtype: DType,
    needed: usize,
) -> Result<(), Error> {
    if pointer.dtype() == dtype && pointer.len >= needed {
        return Ok(());
    }
    let got = format!("{} of {:?}", pointer.len, pointer.dtype());
    Err(argument(kernel, name, got, format!("at least {needed} elements of {dtype:?}")))
}

/// Into how many shares the rows of a sum over rows are cut: enough for a few blocks on every multiprocessor, with at
/// least 64 rows each. Depends on the shape alone, so that a sum's order does.
pub(super) fn column_splits(rows: usize, cols: usize) -> usize {
    const BLOCKS: usize = 1024;
    const ROWS: usize = 64;
    const COLUMNS: usize = 256;
    let by_blocks = BLOCKS.div_ceil(cols.div_ceil(COLUMNS).max(1));
    by_blocks.min(rows.div_ceil(ROWS)).max(1)
}

#[cfg(test)]
mod tests {
    use super::column_splits;

    #[test]
    fn sums_over_rows_are_cut_into_at_least_one_share_and_not_too_many() {
        assert_eq!(column_splits(0, 0), 1);
        assert_eq!(column_splits(1, 4096), 1);
        assert_eq!(column_splits(8192, 4096), 64);
        assert_eq!(column_splits(8192 * 32, 128), 1024);
        assert_eq!(column_splits(8192, 1 << 20), 1);
    }
}
