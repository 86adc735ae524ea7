//! Products of dense matrices: trainable weights, adapters, and frozen weights in 16 or 32 bits.
//!
//! The slice functions are what `ops` calls for trainable matrices and adapters. All split their result into tiles by
//! shape alone, so that no result depends on the number of threads.

use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use super::Error;
use super::multiply::{FEW_ROWS, RowSource};
use crate::kernels::cpu::activations::Order;
use crate::kernels::cpu::packed_dot::{self, PackedRows};
use crate::kernels::cpu::{Activations, BlockFormat, Level, Operand, TileMut, dot, gemm};

/// Multiply-adds below which a product stays on the calling thread.
const SERIAL_WORK: usize = 1 << 18;

/// Values dequantised at a time by the format-independent few-row product; a multiple of every block length.
const DOT_CHUNK: usize = 512;

/// `y = x W^T`.
///
/// # Shapes
/// `x`: f32 `[m, k]`; `w`: f32 `[n, k]`; `y`: f32 `[m, n]`.
///
/// # Errors
/// If a slice has another length.
pub fn matmul_nt(x: &[f32], w: &[f32], m: usize, n: usize, k: usize, y: &mut [f32]) -> Result<(), Error> {
    accumulate_nt(x, w, m, n, k, 1.0, 0.0, y)
}

/// `y = keep * y + alpha * x W^T`; with `keep` 0 the old `y` is not read.
///
/// # Shapes
/// As [`matmul_nt`].
///
/// # Errors
/// If a slice has another length.
#[expect(clippy::too_many_arguments, reason = "three matrices, their three dimensions and two factors")]
pub fn accumulate_nt(
    x: &[f32],
    w: &[f32],
    m: usize,
    n: usize,
    k: usize,
    alpha: f32,
    keep: f32,
    y: &mut [f32],
) -> Result<(), Error> {
    check("matmul_nt x", x.len(), m, k)?;
    check("matmul_nt w", w.len(), n, k)?;
    check("matmul_nt y", y.len(), m, n)?;
    for_tiles(y, m, n, k, |first_row, first_column, tile| {
        let left = Operand::row_major(&x[first_row * k..], k);
        gemm(tile, k, left, Operand::row_major(&w[first_column * k..], k).t(), alpha, keep);
    });
    Ok(())
}

/// `y = a B`, for example `dx = dy W`.
///
/// # Shapes
/// `a`: f32 `[m, n]`; `b`: f32 `[n, k]`; `y`: f32 `[m, k]`.
///
/// # Errors
/// If a slice has another length.
pub fn matmul_nn(a: &[f32], b: &[f32], m: usize, n: usize, k: usize, y: &mut [f32]) -> Result<(), Error> {
    accumulate_nn(a, b, m, n, k, 1.0, 0.0, y)
}

/// `y = keep * y + alpha * a B`; with `keep` 0 the old `y` is not read.
///
/// # Shapes
/// As [`matmul_nn`].
///
/// # Errors
/// If a slice has another length.
#[expect(clippy::too_many_arguments, reason = "three matrices, their three dimensions and two factors")]
pub fn accumulate_nn(
    a: &[f32],
    b: &[f32],
    m: usize,
    n: usize,
    k: usize,
    alpha: f32,
    keep: f32,
    y: &mut [f32],
) -> Result<(), Error> {
    check("matmul_nn a", a.len(), m, n)?;
    check("matmul_nn b", b.len(), n, k)?;
    check("matmul_nn y", y.len(), m, k)?;
    for_tiles(y, m, k, n, |first_row, first_column, tile| {
        let left = Operand::row_major(&a[first_row * n..], n);
        gemm(tile, n, left, Operand::row_major(&b[first_column.min(b.len())..], k), alpha, keep);
    });
    Ok(())
}

/// The weight gradient `dW += dy^T x`.
///
/// # Shapes
/// `dy`: f32 `[m, n]`; `x`: f32 `[m, k]`; `dw`: f32 `[n, k]`.
///
/// # Errors
/// If a slice has another length.
pub fn accumulate_weight_grad(
    dy: &[f32],
    x: &[f32],
    m: usize,
    n: usize,
    k: usize,
    dw: &mut [f32],
) -> Result<(), Error> {
    check("accumulate_weight_grad dy", dy.len(), m, n)?;
    check("accumulate_weight_grad x", x.len(), m, k)?;
    check("accumulate_weight_grad dw", dw.len(), n, k)?;
    for_tiles(dw, n, k, m, |first_row, first_column, tile| {
        let left = Operand::row_major(&dy[first_row.min(dy.len())..], n).t();
        gemm(tile, m, left, Operand::row_major(&x[first_column.min(x.len())..], k), 1.0, 1.0);
    });
    Ok(())
}

fn check(operation: &'static str, got: usize, rows: usize, columns: usize) -> Result<(), Error> {
    if got == rows * columns {
        return Ok(());
    }
    let expected = format!("{} values for [{rows}, {columns}]", rows * columns);
    Err(Error::Shape { operation, got: vec![got], expected })
}

/// Cuts a row-major `[rows, columns]` result into tiles and computes them in parallel; `work` gets a tile's first row
/// and first column.
fn for_tiles(
    result: &mut [f32],
    rows: usize,
    columns: usize,
    depth: usize,
    work: impl Fn(usize, usize, &mut TileMut<'_>) + Sync,
) {
    if rows == 0 || columns == 0 {
        return;
    }
    let mut whole = TileMut::new(result, rows, columns);
    if rows * columns * depth <= SERIAL_WORK {
        return work(0, 0, &mut whole);
    }
    let width = columns.div_ceil(16).next_multiple_of(16).clamp(32, 128);
    let bands = 16usize.div_ceil(columns.div_ceil(width));
    let height = rows.div_ceil(bands).next_multiple_of(16).clamp(32, 512);
    let mut tiles = Vec::new();
    for (band, strip) in whole.split_rows(height).into_iter().enumerate() {
        tiles.extend(strip.split_columns(width).into_iter().enumerate().map(|(i, t)| (band * height, i * width, t)));
    }
    tiles.into_par_iter().for_each(|(first_row, first_column, mut tile)| work(first_row, first_column, &mut tile));
}

/// The few-row product of any storage: dequantises a piece of a row that stays in the first-level cache, then
/// multiplies it with every row of activations.
pub(super) fn dot_dequantized(
    source: &dyn RowSource,
    rows: Range<usize>,
    activations: &Activations,
    tile: &mut TileMut<'_>,
) {
    let k = source.cols();
    let mut piece = [0f32; DOT_CHUNK];
    let mut sums = [0f32; FEW_ROWS];
    for (column, row) in rows.enumerate() {
        let sums = &mut sums[..activations.rows()];
        sums.fill(0.0);
        for first in (0..k).step_by(DOT_CHUNK) {
            let columns = first..k.min(first + DOT_CHUNK);
            let piece = &mut piece[..columns.len()];
            source.dequantize(row..row + 1, columns, piece);
            dot::accumulate(Level::best(), piece, &activations.plain_rows()[first..], k, sums);
        }
        for (m, &sum) in sums.iter().enumerate() {
            tile.row_mut(m)[column] = sum;
        }
    }
}

/// The values of a dense matrix.
#[derive(Clone, Copy)]
pub(super) enum DenseValues<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
}

/// A dense matrix `[rows, cols]`.
#[derive(Clone, Copy)]
pub(super) struct DenseRows<'a> {
    pub(super) values: DenseValues<'a>,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

impl RowSource for DenseRows<'_> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn column_step(&self) -> usize {
        1
    }

    fn stored_bytes(&self) -> usize {
        self.rows * self.cols * if matches!(self.values, DenseValues::F32(_)) { 4 } else { 2 }
    }

    fn dequantize(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        if columns.is_empty() {
            return;
        }
        for (row, out) in rows.zip(out.chunks_exact_mut(columns.len())) {
            let range = row * self.cols + columns.start..row * self.cols + columns.end;
            match self.values {
                DenseValues::F32(values) => out.copy_from_slice(&values[range]),
                DenseValues::Bf16(values) => values[range].convert_to_f32_slice(out),
                DenseValues::F16(values) => values[range].convert_to_f32_slice(out),
            }
        }
    }

    fn dot(&self, rows: Range<usize>, activations: &Activations, tile: &mut TileMut<'_>) {
        if activations.order() == Order::Plain {
            return dot_dequantized(self, rows, activations, tile);
        }
        let range = rows.start * self.cols..rows.end * self.cols;
        let rows = match self.values {
            DenseValues::F32(values) => PackedRows::F32(&values[range]),
            DenseValues::Bf16(values) => PackedRows::Bf16(values[range].reinterpret_cast()),
            DenseValues::F16(values) => PackedRows::F16(values[range].reinterpret_cast()),
        };
        packed_dot::dot(Level::best(), rows, activations, tile);
    }

    fn activations(&self, x: &[f32], m: usize) -> Activations {
        let format = match self.values {
            DenseValues::F32(_) => BlockFormat::F32,
            DenseValues::Bf16(_) => BlockFormat::Bf16,
            DenseValues::F16(_) => BlockFormat::F16,
        };
        match packed_dot::order_of_blocks(Level::best(), format, self.cols) {
            Some(order) => Activations::ordered(Level::best(), order, false, x, m, self.cols),
            None => Activations::plain(x, m, self.cols),
        }
    }
}
