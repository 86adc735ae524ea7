//! The gated activation.

use candle_core::Tensor;

use crate::kernels::cuda::profile::{Phase, span};
use crate::kernels::cuda::{matrix, swiglu, swiglu_backward};
use crate::ops::{Error, Wide};

pub(crate) fn forward(gate: &Tensor, up: &Tensor, room: usize) -> Result<Wide, Error> {
    let device = gate.device();
    let _span = span(device, Phase::Pointwise)?;
    let from = matrix(gate)?;
    let y = Wide::empty(device, (from.rows, from.cols), room, gate.dtype())?;
    swiglu(device, matrix(y.buffer())?.columns(0, from.cols), from, matrix(up)?)?;
    Ok(y)
}

/// `gate`, the first columns of `whole`, becomes the activation; the columns behind it are its room.
pub(crate) fn forward_over(whole: Tensor, gate: &Tensor, up: &Tensor) -> Result<Wide, Error> {
    let device = gate.device();
    let _span = span(device, Phase::Pointwise)?;
    let (gate, up) = (matrix(gate)?, matrix(up)?);
    swiglu(device, gate, gate, up)?;
    Wide::with_cols(whole, gate.cols)
}

/// `gate` and `up` become their gradients, `dy` the activation.
pub(crate) fn backward(dy: &Tensor, gate: &Tensor, up: &Tensor) -> Result<(), Error> {
    let device = gate.device();
    let _span = span(device, Phase::Pointwise)?;
    let (dy, gate, up) = (matrix(dy)?, matrix(gate)?, matrix(up)?);
    Ok(swiglu_backward(device, gate, up, dy, gate, up, Some(dy), None)?)
}
