//! Root-mean-square normalisation (Zhang and Sennrich, 1910.07467, eq. 4).

use candle_core::{DType, Tensor};
use rayon::prelude::*;

use super::view::{dims2, tensor, view};
use super::{Error, Param, Wide, shape_error};
use crate::kernels::cpu::vector;

/// Rows one task works on; also the unit in which the weight's gradient is summed, so that the sum's order is fixed.
const ROWS_PER_TASK: usize = 32;

/// The reciprocal root mean square of each row, kept for backward.
#[derive(Clone, Debug)]
pub struct Saved {
    /// f32, one per row and head.
    pub(super) reciprocals: Tensor,
}

/// [`forward`] into an activation of type `dtype` (on the CPU always f32) with `room` more columns (on a GPU).
///
/// # Shapes
/// `x`: `[N, D]`; `weight`: f32 `[D]`; returns `[N, D]`.
///
/// # Errors
/// If the shapes do not fit.
pub fn forward_wide(x: &Tensor, weight: &Param, eps: f64, dtype: DType, room: usize) -> Result<(Wide, Saved), Error> {
    if x.device().is_cuda() {
        return super::cuda::norm::forward(x, weight, eps, dtype, room, 1);
    }
    let (y, saved) = forward(x, weight, eps)?;
    Ok((Wide::plain(y)?, saved))
}

/// [`backward`] plus the gradient that reaches the input on another path.
///
/// # Shapes
/// `dy`: `[N, D]`; `x`, `other`: `[N, D]` of one type, which is returned.
///
/// # Errors
/// If the shapes do not fit.
pub fn backward_onto(dy: &Tensor, x: &Tensor, weight: &Param, saved: &Saved, other: &Tensor) -> Result<Tensor, Error> {
    if x.device().is_cuda() {
        return super::cuda::norm::backward(dy, x, weight, saved, Some(other));
    }
    super::residual::add(backward(dy, x, weight, saved)?, other)
}

/// Each head of each row normed by itself (Qwen3's query and key norms).
///
/// # Shapes
/// `x`: `[N, heads · d]`; `weight`: f32 `[d]`; returns the shape and type of `x`.
///
/// # Errors
/// If the shapes do not fit.
pub fn forward_heads(x: &Tensor, weight: &Param, eps: f64) -> Result<(Tensor, Saved), Error> {
    let (n, heads, d) = heads_of(x, weight)?;
    if x.device().is_cuda() {
        let (y, saved) = super::cuda::norm::forward(x, weight, eps, x.dtype(), 0, heads)?;
        return Ok((y.values()?, saved));
    }
    let (y, saved) = forward(&x.reshape((n * heads, d))?, weight, eps)?;
    Ok((y.reshape((n, heads * d))?, saved))
}

/// The gradient of [`forward_heads`]. On a GPU it takes the place of `dy`, which nothing else may need.
///
/// # Shapes
/// `dy`, `x`: `[N, heads · d]`; returns the same.
///
/// # Errors
/// If the shapes do not fit.
pub fn backward_heads(dy: Tensor, x: &Tensor, weight: &Param, saved: &Saved) -> Result<Tensor, Error> {
    let (n, heads, d) = heads_of(x, weight)?;
    if x.device().is_cuda() {
        return super::cuda::norm::backward_heads(dy, x, weight, saved, heads);
    }
    let dx = backward(&dy.reshape((n * heads, d))?, &x.reshape((n * heads, d))?, weight, saved)?;
    Ok(dx.reshape((n, heads * d))?)
}

fn heads_of(x: &Tensor, weight: &Param) -> Result<(usize, usize, usize), Error> {
    let (n, width) = dims2("rms_norm of heads", "x", x)?;
    let d = weight.value.elem_count();
    if d == 0 || width % d != 0 {
        return Err(shape_error("rms_norm of heads", "x", x.dims(), format!("[N, a multiple of {d}]")));
    }
    Ok((n, width / d, d))
}

/// `y = x / sqrt(mean(x²) + eps) * weight`, row by row.
///
/// # Shapes
/// `x`: f32 `[N, D]`; `weight`: f32 `[D]`; returns f32 `[N, D]`.
///
/// # Errors
/// If the shapes do not fit.
pub fn forward(x: &Tensor, weight: &Param, eps: f64) -> Result<(Tensor, Saved), Error> {
    const OP: &str = "rms_norm";
    let (n, d) = dims2(OP, "x", x)?;
    if weight.value.dims() != [d] {
        return Err(shape_error(OP, "weight", weight.value.dims(), [d]));
    }
    let x = x.contiguous()?;
    let (x, w) = (view(OP, &x)?, view(OP, &weight.value)?);
    let mut out = vec![0.0; n * d];
    let mut reciprocals = vec![0.0; n];
    out.par_chunks_mut(d * ROWS_PER_TASK)
        .zip(x.par_chunks(d * ROWS_PER_TASK))
        .zip(reciprocals.par_chunks_mut(ROWS_PER_TASK))
        .for_each(|((out, x), reciprocals)| {
            for ((out, x), reciprocal) in out.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(reciprocals) {
                *reciprocal = (f64::from(vector::dot(x, x)) / d as f64 + eps).sqrt().recip() as f32;
                vector::scale_by_weight(out, x, *reciprocal, &w);
            }
        });
    Ok((tensor(out, (n, d))?, Saved { reciprocals: tensor(reciprocals, n)? }))
}

/// The gradient of [`forward`] with respect to `x`; the weight's gradient goes to its bucket.
///
/// # Shapes
/// `dy`, `x`: f32 `[N, D]`; returns f32 `[N, D]`.
///
/// # Errors
/// If the shapes do not fit.
///
/// # Equation
/// With `r = 1 / sqrt(mean(x²) + eps)`: `dx = r (w dy - x r² mean(w dy x))`, `dw = Σ_n dy x r`.
pub fn backward(dy: &Tensor, x: &Tensor, weight: &Param, saved: &Saved) -> Result<Tensor, Error> {
    const OP: &str = "rms_norm backward";
    if x.device().is_cuda() {
        return super::cuda::norm::backward(dy, x, weight, saved, None);
    }
    let (n, d) = dims2(OP, "x", x)?;
    if dy.dims() != [n, d] {
        return Err(shape_error(OP, "dy", dy.dims(), [n, d]));
    }
    let (dy, x) = (dy.contiguous()?, x.contiguous()?);
    let (dy, x, w) = (view(OP, &dy)?, view(OP, &x)?, view(OP, &weight.value)?);
    let reciprocals = view(OP, &saved.reciprocals)?;
    let mut dx = vec![0.0; n * d];
    let is_trained = weight.grad.is_some();
    let partial_sums: Vec<Vec<f32>> = dx
        .par_chunks_mut(d * ROWS_PER_TASK)
        .zip(dy.par_chunks(d * ROWS_PER_TASK))
        .zip(x.par_chunks(d * ROWS_PER_TASK))
        .zip(reciprocals.par_chunks(ROWS_PER_TASK))
        .map(|(((dx, dy), x), reciprocals)| {
            let mut weight_sum = vec![0.0; if is_trained { d } else { 0 }];
            let rows = dx.chunks_exact_mut(d).zip(dy.chunks_exact(d)).zip(x.chunks_exact(d)).zip(reciprocals);
            for (((dx, dy), x), &r) in rows {
                vector::scale_by_weight(dx, dy, 1.0, &w);
                let projection = vector::dot(dx, x) / d as f32;
                for (dx, &x) in dx.iter_mut().zip(x) {
                    *dx = r * (*dx - x * (r * r * projection));
                }
                if is_trained {
                    for ((sum, &dy), &x) in weight_sum.iter_mut().zip(dy).zip(x) {
                        *sum += dy * x * r;
                    }
                }
            }
            weight_sum
        })
        .collect();
    drop(w);
    for partial in &partial_sums {
        weight.accumulate(OP, partial)?;
    }
    tensor(dx, (n, d))
}
