//! Root-mean-square normalisation (Zhang and Sennrich, 1910.07467, eq. 4).

use candle_core::Tensor;
use rayon::prelude::*;

use super::view::{dims2, tensor, view};
use super::{Error, Param, shape_error};
use crate::kernels::cpu::vector;

/// Rows one task works on; also the unit in which the weight's gradient is summed, so that the sum's order is fixed.
const ROWS_PER_TASK: usize = 32;

/// The reciprocal root mean square of each row, kept for backward.
#[derive(Clone, Debug)]
pub struct Saved {
    reciprocals: Vec<f32>,
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
    Ok((tensor(out, (n, d))?, Saved { reciprocals }))
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
    let (n, d) = dims2(OP, "x", x)?;
    if dy.dims() != [n, d] {
        return Err(shape_error(OP, "dy", dy.dims(), [n, d]));
    }
    let (dy, x) = (dy.contiguous()?, x.contiguous()?);
    let (dy, x, w) = (view(OP, &dy)?, view(OP, &x)?, view(OP, &weight.value)?);
    let mut dx = vec![0.0; n * d];
    let is_trained = weight.grad.is_some();
    let partial_sums: Vec<Vec<f32>> = dx
        .par_chunks_mut(d * ROWS_PER_TASK)
        .zip(dy.par_chunks(d * ROWS_PER_TASK))
        .zip(x.par_chunks(d * ROWS_PER_TASK))
        .zip(saved.reciprocals.par_chunks(ROWS_PER_TASK))
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
