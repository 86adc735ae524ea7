//! Root-mean-square norms of rows and of heads.

use candle_core::{DType, Tensor};

use super::row;
use crate::device::timers::{Phase, span};
use crate::device::{array, empty, matrix};
use crate::kernels::cuda::{rms_norm, rms_norm_backward, rms_norm_weight_gradient, rms_norm_workspace};
use crate::ops::rms_norm::Saved;
use crate::ops::{Error, Param, Wide};

pub(crate) fn forward(
    x: &Tensor,
    weight: &Param,
    eps: f64,
    dtype: DType,
    room: usize,
    heads: usize,
) -> Result<(Wide, Saved), Error> {
    let device = x.device();
    let _span = span(device, Phase::Pointwise)?;
    let from = matrix(x)?;
    let y = Wide::empty(device, (from.rows, from.cols), room, dtype)?;
    let reciprocals = empty(device, from.rows * heads, DType::F32)?;
    let to = matrix(y.buffer())?.columns(0, from.cols);
    rms_norm(device, to, array(&reciprocals)?, from, row(&weight.value)?, heads, eps as f32)?;
    Ok((y, Saved { reciprocals }))
}

/// The gradient of the input, in its type, plus `other`.
pub(crate) fn backward(
    dy: &Tensor,
    x: &Tensor,
    weight: &Param,
    saved: &Saved,
    other: Option<&Tensor>,
) -> Result<Tensor, Error> {
    let device = x.device();
    let _span = span(device, Phase::Pointwise)?;
    let from = matrix(x)?;
    weight_gradient(dy, x, weight, saved, 1)?;
    let dx = empty(device, (from.rows, from.cols), x.dtype())?;
    let other = other.map(matrix).transpose()?;
    let reciprocals = array(&saved.reciprocals)?;
    rms_norm_backward(device, matrix(&dx)?, matrix(dy)?, from, row(&weight.value)?, reciprocals, other, 1)?;
    Ok(dx)
}

/// The gradient of normed heads, in the place of `dy`.
pub(crate) fn backward_heads(
    dy: Tensor,
    x: &Tensor,
    weight: &Param,
    saved: &Saved,
    heads: usize,
) -> Result<Tensor, Error> {
    let device = x.device();
    let _span = span(device, Phase::Pointwise)?;
    weight_gradient(&dy, x, weight, saved, heads)?;
    let (on_dy, reciprocals) = (matrix(&dy)?, array(&saved.reciprocals)?);
    rms_norm_backward(device, on_dy, on_dy, matrix(x)?, row(&weight.value)?, reciprocals, None, heads)?;
    Ok(dy)
}

fn weight_gradient(dy: &Tensor, x: &Tensor, weight: &Param, saved: &Saved, heads: usize) -> Result<(), Error> {
    let Some(grad) = &weight.grad else { return Ok(()) };
    let (device, from) = (x.device(), matrix(x)?);
    let workspace = empty(device, rms_norm_workspace(from.rows, from.cols, heads), DType::F32)?;
    let reciprocals = array(&saved.reciprocals)?;
    Ok(rms_norm_weight_gradient(device, array(grad)?, matrix(dy)?, from, reciprocals, array(&workspace)?, heads)?)
}
