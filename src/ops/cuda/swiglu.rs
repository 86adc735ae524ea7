//! The gated activation.

use candle_core::{DType, Tensor};

use crate::device::timers::{Phase, span};
use crate::device::{array, empty, matrix};
use crate::kernels::cuda::{
    DownAdapter, MOST_SHARE_RANKS, MlpAdapters, OutAdapter, axpby, swiglu, swiglu_adapters_fit, swiglu_backward,
    swiglu_backward_adapters, swiglu_backward_adapters_workspace,
};
use crate::ops::linear::InputGradient;
use crate::ops::swiglu::{Around, Between};
use crate::ops::{Error, Wide};

pub(crate) fn forward(gate: &Tensor, up: &Tensor, room: usize) -> Result<Wide, Error> {
    let device = gate.device();
    let _span = span(device, Phase::Pointwise)?;
    let from = matrix(gate)?;
    let y = Wide::empty(device, (from.rows, from.cols), room, gate.dtype())?;
    swiglu(device, matrix(y.buffer())?.columns(0, from.cols), from, matrix(up)?)?;
    Ok(y)
}

/// `gate`, the first columns of `whole`, becomes the activation; the columns behind it are its room. The first `rows` of
/// `whole` are copied before.
pub(crate) fn forward_over(
    whole: Tensor,
    gate: &Tensor,
    up: &Tensor,
    rows: usize,
) -> Result<(Wide, Option<Tensor>), Error> {
    let device = whole.device();
    let _span = span(device, Phase::Pointwise)?;
    let from = matrix(&whole)?;
    let copy = match rows {
        0 => None,
        _ => Some(empty(device, (rows, from.cols), whole.dtype())?),
    };
    if let Some(copy) = &copy {
        axpby(device, matrix(copy)?, 1.0, from.rows(0, rows), 0.0)?;
    }
    let (on_gate, on_up) = (matrix(gate)?, matrix(up)?);
    swiglu(device, on_gate, on_gate, on_up)?;
    let cols = on_gate.cols;
    Ok((Wide::with_cols(whole, cols)?, copy))
}

/// `gate` and `up` become their gradients; where a kernel does not take the adapters along, `dy` becomes the activation.
pub(crate) fn backward(dy: InputGradient, gate: Tensor, up: Tensor, around: &Around<'_>) -> Result<Between, Error> {
    let activated = backward_onto(dy, &gate, &up, around)?.map(Wide::plain).transpose()?;
    Ok(Between { d_gate: gate, d_up: up, activated })
}

fn backward_onto(dy: InputGradient, gate: &Tensor, up: &Tensor, around: &Around<'_>) -> Result<Option<Tensor>, Error> {
    let device = gate.device();
    let (to_gate, to_up) = (matrix(gate)?, matrix(up)?);
    if let Some(adapters) = adapters_around(&dy, around)? {
        let from = matrix(dy.parts().0)?;
        if swiglu_adapters_fit(device, &to_gate, &to_up, &from, &to_gate, &to_up, &adapters) {
            let _span = span(device, Phase::Pointwise)?;
            let floats = swiglu_backward_adapters_workspace(from.rows, from.cols, adapters.most_ranks());
            let workspace = empty(device, floats, DType::F32)?;
            let workspace = array(&workspace)?;
            swiglu_backward_adapters(device, to_gate, to_up, from, to_gate, to_up, adapters, workspace)?;
            return Ok(None);
        }
    }
    let is_ready = dy.parts().1.is_none_or(|(d_low, _)| d_low.dims()[1] <= MOST_SHARE_RANKS);
    let dy = if is_ready { dy } else { InputGradient::whole(dy.into_values()?) };
    let _span = span(device, Phase::Pointwise)?;
    let (values, share) = dy.parts();
    let share = share.map(|(d_low, a)| Ok::<_, Error>((matrix(d_low)?, matrix(a)?))).transpose()?;
    let from = matrix(values)?;
    swiglu_backward(device, to_gate, to_up, from, to_gate, to_up, Some(from), share)?;
    Ok(Some(values.clone()))
}

/// The adapters for the kernel that takes them along; `None` where there are none, or where more than their products needs
/// the activation: dropout, or a gradient of the whole weight.
fn adapters_around<'b>(dy: &'b InputGradient, around: &'b Around<'_>) -> Result<Option<MlpAdapters<'b>>, Error> {
    if !around.mode.dropouts.is_empty() || around.down.weight_grad.is_some() {
        return Ok(None);
    }
    if dy.parts().1.is_some() && around.down.adapter.is_none() {
        return Ok(None);
    }
    let mut adapters = MlpAdapters::default();
    if let (Some((d_low, a)), Some(adapter)) = (dy.parts().1, &around.down.adapter) {
        let grad_a = adapter.a.grad.as_ref().map(matrix).transpose()?;
        adapters.down = Some(DownAdapter { d_low: matrix(d_low)?, a: matrix(a)?, grad_a });
    }
    if let Some(low_rank) = around.saved.on_device.as_ref().and_then(|saved| saved.low_rank.as_ref()) {
        let low_rank = matrix(low_rank)?;
        let mut start = 0;
        for (linear, place) in [(around.gate, &mut adapters.gate), (around.up, &mut adapters.up)] {
            let Some(adapter) = &linear.adapter else { continue };
            let ranks = adapter.a.value.dims()[0];
            if let Some(grad) = &adapter.b.grad {
                let low = low_rank.columns(start, ranks);
                *place = Some(OutAdapter { low, grad_b: matrix(grad)?, factor: adapter.scaling });
            }
            start += ranks;
        }
    }
    Ok((adapters.most_ranks() > 0).then_some(adapters))
}
