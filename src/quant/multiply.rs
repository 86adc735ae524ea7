//! The products `y = x W^T` and `dx = dy W` over any row storage.
//!
//! Many rows: the weight is cut into panels; a task dequantises one panel into its thread's scratch and multiplies it
//! into the columns of the result that it owns, so each weight is dequantised once. Few rows (decode): the bound is
//! the memory, and each task reads its rows straight from the packed bytes.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use crate::kernels::cpu::{Activations, Operand, TileMut, gemm};

/// Up to so many rows of activations the packed bytes are multiplied directly.
pub(crate) const FEW_ROWS: usize = 8;

/// Packed bytes below which a few-row product is not worth waking another thread.
const SERIAL_BYTES: usize = 64 << 10;

/// Columns of a gradient tile.
const GRADIENT_COLUMNS: usize = 128;

/// Rows of a panel in the gradient product: 256 rows of 128 columns are 128 KiB of scratch.
const GRADIENT_ROWS: usize = 256;

/// A weight matrix that can be read row by row.
pub(crate) trait RowSource: Sync {
    /// Number of rows, `N`.
    fn rows(&self) -> usize;
    /// Number of columns, `K`.
    fn cols(&self) -> usize;
    /// A range of columns must begin and end at a multiple of this, or at the end of the row.
    fn column_step(&self) -> usize;
    /// Bytes of the stored matrix.
    fn stored_bytes(&self) -> usize;
    /// Writes the values of `rows` and `columns`, row-major, to `out`.
    fn dequantize(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]);
    /// `tile[m, i] = x[m] . W[rows.start + i]` for every row of activations.
    fn dot(&self, rows: Range<usize>, activations: &Activations, tile: &mut TileMut<'_>);
    /// Lays out activations for [`RowSource::dot`].
    fn activations(&self, x: &[f32], m: usize) -> Activations;
}

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Calls `work` with `len` floats that this thread keeps between calls; what they hold is not defined.
pub(crate) fn with_scratch<R>(len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    SCRATCH.with(|cell| {
        let mut kept = cell.take();
        if kept.len() < len {
            kept.resize(len, 0.0);
        }
        let result = work(&mut kept[..len]);
        cell.replace(kept);
        result
    })
}

/// Rows of a panel: enough panels to keep many threads busy, tall enough for the product to run at its full speed.
/// A function of the shape only, so that results do not depend on the number of threads.
pub(crate) fn panel_rows(rows: usize) -> usize {
    (rows.div_ceil(16)).next_multiple_of(16).clamp(32, 128)
}

/// `y[M, N] = x[M, K] W^T`.
pub(crate) fn forward(source: &dyn RowSource, x: &[f32], m: usize, y: &mut [f32]) {
    let (n, k) = (source.rows(), source.cols());
    if m == 0 || n == 0 {
        return;
    }
    let tile = TileMut::new(y, m, n);
    if m <= FEW_ROWS {
        return forward_few(source, x, m, tile);
    }
    let height = panel_rows(n);
    let panel = |(index, mut tile): (usize, TileMut<'_>)| {
        let rows = index * height..index * height + tile.columns();
        with_scratch(rows.len() * k, |weights| {
            source.dequantize(rows, 0..k, weights);
            gemm(&mut tile, k, Operand::row_major(x, k), Operand::row_major(weights, k).t(), 1.0, 0.0);
        });
    };
    tile.split_columns(height).into_par_iter().enumerate().for_each(panel);
}

fn forward_few(source: &dyn RowSource, x: &[f32], m: usize, mut tile: TileMut<'_>) {
    let n = source.rows();
    let activations = source.activations(x, m);
    if source.stored_bytes() <= SERIAL_BYTES {
        return source.dot(0..n, &activations, &mut tile);
    }
    // How rows are shared out does not touch the result: each product of two rows is computed alone.
    let height = n.div_ceil(4 * rayon::current_num_threads()).next_multiple_of(16);
    tile.split_columns(height).into_par_iter().enumerate().for_each(|(index, mut tile)| {
        let rows = index * height..index * height + tile.columns();
        source.dot(rows, &activations, &mut tile);
    });
}

/// `dx[M, K] = dy[M, N] W`.
pub(crate) fn backward_input(source: &dyn RowSource, dy: &[f32], m: usize, dx: &mut [f32]) {
    let (n, k) = (source.rows(), source.cols());
    if m == 0 || k == 0 {
        return;
    }
    if n == 0 {
        return dx.fill(0.0);
    }
    let width = GRADIENT_COLUMNS.next_multiple_of(source.column_step()).min(k);
    TileMut::new(dx, m, k).split_columns(width).into_par_iter().enumerate().for_each(|(index, mut tile)| {
        let columns = index * width..index * width + tile.columns();
        with_scratch(GRADIENT_ROWS.min(n) * columns.len(), |scratch| {
            for first in (0..n).step_by(GRADIENT_ROWS) {
                let rows = first..n.min(first + GRADIENT_ROWS);
                let weights = &mut scratch[..rows.len() * columns.len()];
                source.dequantize(rows.clone(), columns.clone(), weights);
                let keep = if first == 0 { 0.0 } else { 1.0 };
                let left = Operand::row_major(&dy[first..], n);
                gemm(&mut tile, rows.len(), left, Operand::row_major(weights, columns.len()), 1.0, keep);
            }
        });
    });
}
