//! Picking rows of the hidden states for the head, and adding their gradients back.

use candle_core::Tensor;

use super::view::{dims2, tensor, view};
use super::{Error, shape_error};
use crate::kernels::cpu::vector;

/// The rows `rows` of `x`, which may repeat.
///
/// # Shapes
/// `x`: f32 `[N, D]`; `rows`: `[R]`; returns `[R, D]` of the same type.
///
/// # Errors
/// If a row is outside of `x`.
pub fn gather(x: &Tensor, rows: &[u32]) -> Result<Tensor, Error> {
    const OP: &str = "gather rows";
    let (n, d) = dims2(OP, "x", x)?;
    if let Some(row) = rows.iter().find(|&&row| row as usize >= n) {
        return Err(shape_error(OP, "rows", row, format!("less than {n}")));
    }
    if x.device().is_cuda() {
        return super::cuda::rows::gather(x, rows);
    }
    let x = view(OP, x)?;
    let mut out = Vec::with_capacity(rows.len() * d);
    rows.iter().for_each(|&row| out.extend_from_slice(&x[row as usize * d..][..d]));
    tensor(out, (rows.len(), d))
}

/// The gradient of [`gather`]: the sum over the places each row was picked for, in their order.
///
/// # Shapes
/// `dy`: f32 `[R, D]`; `rows`: `[R]`, each less than `num_rows`; returns `[num_rows, D]` of the same type.
///
/// # Errors
/// If a row is outside, or the lengths differ.
pub fn scatter_add(dy: &Tensor, rows: &[u32], num_rows: usize) -> Result<Tensor, Error> {
    const OP: &str = "scatter rows";
    let (r, d) = dims2(OP, "dy", dy)?;
    if r != rows.len() || rows.iter().any(|&row| row as usize >= num_rows) {
        return Err(shape_error(OP, "rows", rows.len(), format!("{r} rows below {num_rows}")));
    }
    if dy.device().is_cuda() {
        return super::cuda::rows::scatter_add(dy, rows, num_rows);
    }
    let dy = view(OP, dy)?;
    let mut out = vec![0.0; num_rows * d];
    for (&row, dy) in rows.iter().zip(dy.chunks_exact(d)) {
        vector::add_scaled(&mut out[row as usize * d..][..d], 1.0, dy);
    }
    tensor(out, (num_rows, d))
}
