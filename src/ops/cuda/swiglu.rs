//! The gated activation.

use candle_core::Tensor;

use crate::kernels::cuda::profile::{Phase, span};
use crate::kernels::cuda::{MOST_SHARE_RANKS, matrix, swiglu, swiglu_backward};
use crate::ops::linear::InputGradient;
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
pub(crate) fn backward(dy: InputGradient, gate: &Tensor, up: &Tensor) -> Result<Tensor, Error> {
    let device = gate.device();
    let is_ready = dy.parts().1.is_none_or(|(d_low, _)| d_low.dims()[1] <= MOST_SHARE_RANKS);
    let dy = if is_ready { dy } else { InputGradient::whole(dy.into_values()?) };
    let _span = span(device, Phase::Pointwise)?;
    let (values, share) = dy.parts();
    let share = share.map(|(d_low, a)| Ok::<_, Error>((matrix(d_low)?, matrix(a)?))).transpose()?;
    let (from, gate, up) = (matrix(values)?, matrix(gate)?, matrix(up)?);
    swiglu_backward(device, gate, up, from, gate, up, Some(from), share)?;
    Ok(values.clone())
}
