//! Picking rows of a matrix, and adding up rows that belong together.
//!
//! Legend: `R` rows picked, `U` distinct ones among them, `V` rows of the table, `D` columns. Matrices are of any of
//! f32, f16 and bf16, each its own; sums are f32.

use candle_core::{DType, Device};

use super::checks::{expect_array, expect_shape};
use super::launch::{RawMatrix, RawStream, kernels, launched, stream};
use crate::device::{Error, Matrix, Pointer, argument};

kernels! {
    // Of `rows.cu`.
    fn trainer_gather_rows(y: RawMatrix, table: RawMatrix, rows: u64, stream: RawStream) -> i32;
    fn trainer_sum_rows(
        grad: RawMatrix,
        dy: RawMatrix,
        targets: u64,
        offsets: u64,
        sources: u64,
        num_sources: u32,
        num_targets: i32,
        is_added: i32,
        stream: RawStream,
    ) -> i32;
}

/// `y[i] = table[rows[i]]`. A row outside of the table reads as "not a number".
///
/// # Shapes
/// `y`: `[R, D]`; `table`: `[V, D]`, on the device or in host memory that is mapped into its addresses; `rows`: u32
/// `[R]`.
///
/// # Errors
/// If the shapes do not fit.
pub fn gather_rows(device: &Device, y: Matrix, table: Matrix, rows: Pointer) -> Result<(), Error> {
    const KERNEL: &str = "gather_rows";
    expect_shape(KERNEL, "y", &y, y.rows, table.cols)?;
    expect_shape(KERNEL, "table", &table, table.rows, table.cols)?;
    expect_array(KERNEL, "rows", rows, DType::U32, y.rows)?;
    // SAFETY: the arguments are views of live device memory whose shapes were checked above, and the kernel checks each
    // row; the work is ordered by the device's one compute stream.
    let code = unsafe { trainer_gather_rows(y.into(), table.into(), rows.address, stream(device)?) };
    launched(KERNEL, code)
}

/// `grad[targets[u]]` becomes, or with `is_added` grows by, the sum of `dy[sources[s]]` over `s` in
/// `offsets[u] .. offsets[u + 1]`, in order: the gradient of [`gather_rows`]. Other rows of `grad` are left.
///
/// # Shapes
/// `grad`: `[V, D]`; `dy`: `[R, D]`; `targets`: u32 `[U]`, distinct; `offsets`: u32 `[U + 1]`; `sources`: u32 `[R]`;
/// the three as [`group_rows`] makes them.
///
/// # Errors
/// If the shapes do not fit.
pub fn sum_rows(
    device: &Device,
    grad: Matrix,
    dy: Matrix,
    targets: Pointer,
    offsets: Pointer,
    sources: Pointer,
    is_added: bool,
) -> Result<(), Error> {
    const KERNEL: &str = "sum_rows";
    expect_shape(KERNEL, "dy", &dy, dy.rows, grad.cols)?;
    expect_shape(KERNEL, "grad", &grad, grad.rows, grad.cols)?;
    expect_array(KERNEL, "targets", targets, DType::U32, 0)?;
    expect_array(KERNEL, "sources", sources, DType::U32, 0)?;
    if targets.len == 0 {
        return Ok(());
    }
    expect_array(KERNEL, "offsets", offsets, DType::U32, targets.len + 1)?;
    let (Ok(num_sources), Ok(num_targets)) = (u32::try_from(sources.len), i32::try_from(targets.len)) else {
        return Err(argument(KERNEL, "sources", [sources.len, targets.len], "less than 2^31"));
    };
    if dy.rows == 0 && num_sources > 0 {
        return Err(argument(KERNEL, "dy", [dy.rows, dy.cols], "a row for each source"));
    }
    // SAFETY: as in `gather_rows`; the kernel checks targets, offsets and sources too.
    let code = unsafe {
        trainer_sum_rows(
            grad.into(),
            dy.into(),
            targets.address,
            offsets.address,
            sources.address,
            num_sources,
            num_targets,
            i32::from(is_added),
            stream(device)?,
        )
    };
    launched(KERNEL, code)
}

/// Which places of a list of rows name the same row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RowGroups {
    /// The distinct rows, ascending.
    pub targets: Vec<u32>,
    /// Where the places of each begin in `sources`, and the end of the last.
    pub offsets: Vec<u32>,
    /// The places, grouped by row, ascending within each.
    pub sources: Vec<u32>,
}

/// Groups the places of a list by the row that they name.
pub fn group_rows(rows: &[u32]) -> RowGroups {
    let mut sources: Vec<u32> = (0..rows.len() as u32).collect();
    // A stable sort keeps the order of the places.
    sources.sort_by_key(|&place| rows[place as usize]);
    let (mut groups, mut end) = (RowGroups { offsets: vec![0], ..RowGroups::default() }, 0);
    for same in sources.chunk_by(|&left, &right| rows[left as usize] == rows[right as usize]) {
        groups.targets.push(rows[same[0] as usize]);
        end += same.len() as u32;
        groups.offsets.push(end);
    }
    groups.sources = sources;
    groups
}

#[cfg(test)]
mod tests {
    use super::group_rows;

    #[test]
    fn places_are_grouped_by_row_in_their_order() {
        let groups = group_rows(&[7, 2, 7, 0, 2, 7]);
        assert_eq!(groups.targets, [0, 2, 7]);
        assert_eq!(groups.offsets, [0, 1, 3, 6]);
        assert_eq!(groups.sources, [3, 1, 4, 0, 2, 5]);
    }

    #[test]
    fn no_rows_make_no_groups_and_distinct_rows_one_each() {
        let none = group_rows(&[]);
        assert!(none.targets.is_empty() && none.sources.is_empty());
        assert_eq!(none.offsets, [0]);
        let groups = group_rows(&[3, u32::MAX, 1]);
        assert_eq!(groups.targets, [1, 3, u32::MAX]);
        assert_eq!(groups.offsets, [0, 1, 2, 3]);
        assert_eq!(groups.sources, [2, 0, 1]);
    }
}
