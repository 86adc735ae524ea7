//! Strided views and the f32 matrix product.
//!
//! The product runs on the calling thread; callers split the destination into disjoint [`TileMut`]s and give one to each
//! task. Whatever the number of threads, a tile is then computed by the same instructions in the same order.

use std::marker::PhantomData;

/// A read-only strided matrix.
#[derive(Clone, Copy)]
pub struct Operand<'a> {
    data: &'a [f32],
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Operand<'a> {
    /// Rows one after another, `columns` apart.
    pub fn row_major(data: &'a [f32], columns: usize) -> Self {
        Self { data, row_stride: columns, column_stride: 1 }
    }

    /// The transpose.
    #[must_use]
    pub fn t(self) -> Self {
        Self { row_stride: self.column_stride, column_stride: self.row_stride, ..self }
    }

    /// Where row `row` starts, and the floats between rows and between columns.
    pub(crate) fn at_row(&self, row: usize) -> (*const f32, usize, usize) {
        (self.data[row * self.row_stride..].as_ptr(), self.row_stride, self.column_stride)
    }

    pub(crate) fn check(&self, rows: usize, columns: usize, name: &str) {
        if rows > 0 && columns > 0 {
            let last = (rows - 1) * self.row_stride + (columns - 1) * self.column_stride;
            assert!(last < self.data.len(), "{name} [{rows}, {columns}] does not fit {} values", self.data.len());
        }
    }
}

/// A rectangle of a row-major matrix that one task owns.
pub struct TileMut<'a> {
    start: *mut f32,
    rows: usize,
    columns: usize,
    row_stride: usize,
    owner: PhantomData<&'a mut [f32]>,
}

// SAFETY: a tile is an exclusive borrow of its elements, as `&mut [f32]` is; tiles of one matrix are disjoint because
// they come from `split_rows` and `split_columns`, which consume the tile that they cut.
unsafe impl Send for TileMut<'_> {}

impl<'a> TileMut<'a> {
    /// The whole of a row-major matrix with `columns` columns.
    ///
    /// # Panics
    /// If `data` is not `rows * columns` long.
    pub fn new(data: &'a mut [f32], rows: usize, columns: usize) -> Self {
        assert_eq!(data.len(), rows * columns, "a matrix [{rows}, {columns}]");
        Self { start: data.as_mut_ptr(), rows, columns, row_stride: columns, owner: PhantomData }
    }

    /// The same tile for a while.
    pub fn reborrow(&mut self) -> TileMut<'_> {
        let Self { start, rows, columns, row_stride, .. } = *self;
        TileMut { start, rows, columns, row_stride, owner: PhantomData }
    }

    /// Its number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Its number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Where row `row` starts, and the floats between the starts of two rows.
    pub(crate) fn row_pointer(&mut self, row: usize) -> (*mut f32, usize) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: the row lies inside the matrix that the tile borrows.
        (unsafe { self.start.add(row * self.row_stride) }, self.row_stride)
    }

    /// Cuts it into tiles of at most `width` columns, left to right.
    pub fn split_columns(self, width: usize) -> Vec<TileMut<'a>> {
        let cut = |first: usize| TileMut {
            // SAFETY: `first` is below `columns`, so the offset stays inside the rows that this tile borrows.
            start: unsafe { self.start.add(first) },
            rows: self.rows,
            columns: width.min(self.columns - first),
            row_stride: self.row_stride,
            owner: PhantomData,
        };
        if self.rows == 0 { Vec::new() } else { (0..self.columns).step_by(width.max(1)).map(cut).collect() }
    }

    /// Cuts it into tiles of at most `height` rows, top to bottom.
    pub fn split_rows(self, height: usize) -> Vec<TileMut<'a>> {
        let cut = |first: usize| TileMut {
            // SAFETY: `first` is below `rows`, so the offset stays inside the rows that this tile borrows.
            start: unsafe { self.start.add(first * self.row_stride) },
            rows: height.min(self.rows - first),
            columns: self.columns,
            row_stride: self.row_stride,
            owner: PhantomData,
        };
        if self.columns == 0 { Vec::new() } else { (0..self.rows).step_by(height.max(1)).map(cut).collect() }
    }

    /// One of its rows.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: the row lies inside the matrix that the tile borrows, and `&mut self` makes the borrow exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.row_stride), self.columns) }
    }
}

/// `tile = keep * tile + alpha * left right`, with `left` `[rows, depth]` and `right` `[depth, columns]`, on this thread.
/// With `keep` 0 what the tile held before is not read.
///
/// # Panics
/// If an operand is too short for its shape.
pub fn gemm(tile: &mut TileMut<'_>, depth: usize, left: Operand<'_>, right: Operand<'_>, alpha: f32, keep: f32) {
    left.check(tile.rows, depth, "the left operand");
    right.check(depth, tile.columns, "the right operand");
    if tile.rows == 0 || tile.columns == 0 {
        return;
    }
    // SAFETY: both operands were just checked to hold every element that their shape and strides reach; the tile is
    // an exclusive borrow of `rows` x `columns` elements at its stride, and cannot overlap the shared borrows.
    unsafe {
        gemm::gemm(
            tile.rows,
            tile.columns,
            depth,
            tile.start,
            1,
            tile.row_stride as isize,
            keep != 0.0,
            left.data.as_ptr(),
            left.column_stride as isize,
            left.row_stride as isize,
            right.data.as_ptr(),
            right.column_stride as isize,
            right.row_stride as isize,
            keep,
            alpha,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
