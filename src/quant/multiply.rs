//! The products `y = x W^T` and `dx = dy W` over any row storage.
//!
//! Many rows: the weight is cut into panels; a task dequantises one panel into its thread's scratch and multiplies it
//! into the columns of the result that it owns, so each weight is dequantised once. Few rows (decode): the bound is
//! the memory, and each task reads its rows straight from the packed bytes.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use crate::kernels::cpu::tile::{STRIP, multiply_strips, pack_strip};
use crate::kernels::cpu::{Activations, Level, Operand, TileMut};

/// Up to so many rows of activations the packed bytes are multiplied directly.
pub(crate) const FEW_ROWS: usize = 16;

/// Packed bytes below which a few-row product is not worth waking another thread.
const SERIAL_BYTES: usize = 64 << 10;

/// Packed bytes that stay in the second-level cache beside the activations.
const CACHED_BYTES: usize = 128 << 10;

/// Columns that a task dequantises before it multiplies; with a panel of 64 rows that is 256 KiB of scratch. A multiple
/// of every block length.
const DEPTH: usize = 1024;

/// Columns dequantised at a time, 16 rows of which stay in the first-level cache until they are transposed.
const PIECE: usize = 256;

/// Columns of a gradient tile, if the storage's blocks are not longer.
const GRADIENT_COLUMNS: usize = 64;

/// Values of a panel in the gradient product: 128 KiB of scratch.
const GRADIENT_VALUES: usize = 1 << 15;

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

/// Rows of a panel: enough panels to keep many threads busy, tall enough that activations are not read too often.
/// A function of the shape only, so that results do not depend on the number of threads.
pub(crate) fn panel_rows(rows: usize) -> usize {
    rows.div_ceil(16).next_multiple_of(STRIP).clamp(STRIP, 4 * STRIP)
}

/// `y[M, N] = x[M, K] W^T`.
pub(crate) fn forward(source: &dyn RowSource, x: &[f32], m: usize, y: &mut [f32]) {
    let (n, k) = (source.rows(), source.cols());
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        return y.fill(0.0);
    }
    let tile = TileMut::new(y, m, n);
    if m <= FEW_ROWS {
        return forward_few(source, x, m, tile);
    }
    let height = panel_rows(n);
    tile.split_columns(height).into_par_iter().enumerate().for_each(|(index, mut tile)| {
        let rows = index * height..index * height + tile.columns();
        let depth = DEPTH.min(k);
        with_scratch(STRIP * PIECE + rows.len().next_multiple_of(STRIP) * depth, |scratch| {
            let (piece, panel) = scratch.split_at_mut(STRIP * PIECE);
            for first in (0..k).step_by(DEPTH) {
                let columns = first..k.min(first + DEPTH);
                let strips = &mut panel[..rows.len().next_multiple_of(STRIP) * columns.len()];
                pack(source, rows.clone(), columns.clone(), piece, strips);
                let keep = if first == 0 { 0.0 } else { 1.0 };
                let left = Operand::row_major(&x[first..], k);
                multiply_strips(Level::best(), left, strips, columns.len(), keep, &mut tile);
            }
        });
    });
}

/// Dequantises `rows` and `columns` into strips of 16 rows.
fn pack(source: &dyn RowSource, rows: Range<usize>, columns: Range<usize>, piece: &mut [f32], strips: &mut [f32]) {
    for (strip, first_row) in strips.chunks_exact_mut(STRIP * columns.len()).zip(rows.clone().step_by(STRIP)) {
        let rows = first_row..rows.end.min(first_row + STRIP);
        for first in columns.clone().step_by(PIECE) {
            let part = first..columns.end.min(first + PIECE);
            let piece = &mut piece[..rows.len() * part.len()];
            source.dequantize(rows.clone(), part.clone(), piece);
            let inside = first - columns.start..part.end - columns.start;
            pack_strip(Level::best(), piece, part.len(), &mut strip[inside.start * STRIP..inside.end * STRIP]);
        }
    }
}

fn forward_few(source: &dyn RowSource, x: &[f32], m: usize, mut tile: TileMut<'_>) {
    let n = source.rows();
    let activations = source.activations(x, m);
    if source.stored_bytes() <= SERIAL_BYTES {
        return source.dot(0..n, &activations, &mut tile);
    }
    // How rows are shared out does not touch the result: each product of two rows is computed alone.
    let height = n.div_ceil(4 * rayon::current_num_threads()).next_multiple_of(16);
    tile.split_columns(height).into_par_iter().enumerate().for_each(|(index, tile)| {
        // Packed rows are read once for each 4 rows of activations: after the first time from the cache.
        let part = (CACHED_BYTES * n / source.stored_bytes()).next_multiple_of(16);
        for (piece, mut tile) in tile.split_columns(part).into_iter().enumerate() {
            let first = index * height + piece * part;
            source.dot(first..first + tile.columns(), &activations, &mut tile);
        }
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
    let height = GRADIENT_VALUES / width;
    TileMut::new(dx, m, k).split_columns(width).into_par_iter().enumerate().for_each(|(index, mut tile)| {
        let columns = index * width..index * width + tile.columns();
        let padded = columns.len().next_multiple_of(STRIP);
        with_scratch(STRIP * columns.len() + height.min(n) * padded, |scratch| {
            let (piece, panel) = scratch.split_at_mut(STRIP * columns.len());
            for first in (0..n).step_by(height) {
                let rows = first..n.min(first + height);
                let strips = &mut panel[..rows.len() * padded];
                for first in rows.clone().step_by(STRIP) {
                    let part = first..rows.end.min(first + STRIP);
                    let piece = &mut piece[..part.len() * columns.len()];
                    source.dequantize(part, columns.clone(), piece);
                    split_strips(piece, columns.len(), first - rows.start, rows.len(), strips);
                }
                let keep = if first == 0 { 0.0 } else { 1.0 };
                let left = Operand::row_major(&dy[first..], n);
                multiply_strips(Level::best(), left, strips, rows.len(), keep, &mut tile);
            }
        });
    });
}

/// Copies rows of `columns` values into strips of 16 columns and `depth` rows, from row `first` of them on. What lies
/// beyond the last column is not read by the product.
fn split_strips(rows: &[f32], columns: usize, first: usize, depth: usize, strips: &mut [f32]) {
    for (row, values) in rows.chunks_exact(columns).enumerate() {
        for (strip, values) in values.chunks(STRIP).enumerate() {
            let at = (strip * depth + first + row) * STRIP;
            strips[at..at + values.len()].copy_from_slice(values);
        }
    }
}
