//! The gated activation of the MLP: `silu(gate) * up` (Shazeer, 2002.05202, sec. 2).

use candle_core::Tensor;
use rayon::prelude::*;

use super::linear::{InputGradient, Linear, Mode, Outputs, SavedGroup};
use super::view::{tensor, view};
use super::{Error, Wide, shape_error};
use crate::kernels::cpu::vector;

/// Values one task works on.
const CHUNK: usize = 1 << 14;

/// `silu(gate) * up`, element by element.
///
/// # Shapes
/// `gate`, `up`: f32 of one shape, which is returned.
///
/// # Errors
/// If the shapes differ.
pub fn forward(gate: &Tensor, up: &Tensor) -> Result<Tensor, Error> {
    const OP: &str = "swiglu";
    if gate.dims() != up.dims() {
        return Err(shape_error(OP, "up", up.dims(), gate.dims()));
    }
    let (g, u) = (view(OP, gate)?, view(OP, up)?);
    let mut out = vec![0.0; g.len()];
    out.par_chunks_mut(CHUNK)
        .zip(g.par_chunks(CHUNK))
        .zip(u.par_chunks(CHUNK))
        .for_each(|((out, g), u)| vector::swiglu(out, g, u));
    tensor(out, gate.shape().clone())
}

/// [`forward`] with `room` more columns (on a GPU).
///
/// # Shapes
/// `gate`, `up`: `[N, I]` of one type, which is returned.
///
/// # Errors
/// If the shapes differ.
pub fn forward_wide(gate: &Tensor, up: &Tensor, room: usize) -> Result<Wide, Error> {
    if gate.device().is_cuda() {
        return super::cuda::swiglu::forward(gate, up, room);
    }
    Wide::plain(forward(gate, up)?)
}

/// [`forward`] of the outputs of gate and up, which on a GPU it takes the place of: nothing else may need them. There the
/// outputs of the first `rows` are copied before, `[rows, 2 I]`, if that is not 0.
///
/// # Shapes
/// `outputs`: `[N, I]` each; returns `[N, I]`.
///
/// # Errors
/// If the shapes differ.
pub fn forward_over(outputs: Outputs, rows: usize) -> Result<(Wide, Option<Tensor>), Error> {
    if let Some(whole) = outputs.whole().cloned() {
        let [gate, up] = outputs.into_each();
        return super::cuda::swiglu::forward_over(whole, &gate, &up, rows);
    }
    let [gate, up] = outputs.into_each();
    Ok((Wide::plain(forward(&gate, &up)?)?, None))
}

/// The projections around the activation, whose adapters' gradients can be made on the way.
#[derive(Clone, Copy, Debug)]
pub struct Around<'a> {
    /// Takes the activation.
    pub down: &'a Linear,
    /// Gives `gate`.
    pub gate: &'a Linear,
    /// Gives `up`.
    pub up: &'a Linear,
    /// What the group of `gate` and `up` saved.
    pub saved: &'a SavedGroup,
    /// How `down` was applied.
    pub mode: Mode<'a>,
}

/// What [`backward_between`] leaves.
#[derive(Debug)]
pub struct Between {
    /// The gradient of `gate`.
    pub d_gate: Tensor,
    /// The gradient of `up`.
    pub d_up: Tensor,
    /// The activation. Without it the gradients of `down`'s `A` and of the `B`s of `gate` and `up` have been added to their
    /// buckets.
    pub activated: Option<Wide>,
}

/// The gradients with respect to `gate` and `up`, and the activation made again; or, on a GPU, in its stead what it is needed
/// for. There the gradients take the places of `gate` and `up`, the activation that of `dy`: nothing else may need them.
///
/// # Shapes
/// All `[N, I]` of one type.
///
/// # Errors
/// If the shapes differ.
pub fn backward_between(dy: InputGradient, gate: Tensor, up: Tensor, around: &Around<'_>) -> Result<Between, Error> {
    if gate.device().is_cuda() {
        return super::cuda::swiglu::backward(dy, gate, up, around);
    }
    let dy = &dy.into_values()?;
    let (d_gate, d_up) = backward(dy, &gate, &up)?;
    Ok(Between { d_gate, d_up, activated: Some(Wide::plain(forward(&gate, &up)?)?) })
}

/// The gradients of [`forward`] with respect to `gate` and `up`.
///
/// # Shapes
/// All f32 of one shape.
///
/// # Errors
/// If the shapes differ.
pub fn backward(dy: &Tensor, gate: &Tensor, up: &Tensor) -> Result<(Tensor, Tensor), Error> {
    const OP: &str = "swiglu backward";
    if dy.dims() != gate.dims() || up.dims() != gate.dims() {
        return Err(shape_error(OP, "dy", dy.dims(), gate.dims()));
    }
    let (d, g, u) = (view(OP, dy)?, view(OP, gate)?, view(OP, up)?);
    let (mut d_gate, mut d_up) = (vec![0.0; g.len()], vec![0.0; g.len()]);
    d_gate
        .par_chunks_mut(CHUNK)
        .zip(d_up.par_chunks_mut(CHUNK))
        .zip(d.par_chunks(CHUNK))
        .zip(g.par_chunks(CHUNK))
        .zip(u.par_chunks(CHUNK))
        .for_each(|((((dg, du), d), g), u)| vector::swiglu_backward(dg, du, d, g, u));
    Ok((tensor(d_gate, gate.shape().clone())?, tensor(d_up, gate.shape().clone())?))
}
