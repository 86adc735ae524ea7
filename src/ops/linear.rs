//! A projection with an optional low-rank adapter: `y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ` (Hu et al., 2106.09685, eq. 3).
//!
//! The base weight may be 4-bit, 16-bit or f32; it is frozen unless it has a gradient bucket. A frozen weight costs no
//! weight gradient. The adapter is never merged, so the base keeps its exact values. With a magnitude vector the
//! adapter is weight-decomposed (`DoRA`, Liu et al., 2402.09353, eq. 5): `y = m / ‖W + s B A‖ · x (W + s B A)ᵀ + b`,
//! the norm of each output row taken as a constant in backward (sec. 4.3 there).
//!
//! Shapes: `N` tokens, `I` inputs, `O` outputs, `r` the adapter's rank.

mod group;

use candle_core::Tensor;
use rayon::prelude::*;

use super::view::{change, dims2, tensor, view};
use super::{Error, Param, shape_error};
use crate::kernels::cpu::matmul::{Matrix, Threads, multiply};
use crate::kernels::cpu::vector;
use crate::quant::Weight;
use crate::rng;
pub use group::{
    CarriedGroup, InputGradient, Mode, Outputs, SavedGroup, backward_input, backward_weights, forward, forward_again,
    room, saved_only,
};

const OP: &str = "linear";
const OP_BACKWARD: &str = "linear backward";

/// A projection and its adapter. Cloning shares all values.
#[derive(Clone, Debug)]
pub struct Linear {
    /// `[O, I]`
    pub weight: Weight,
    /// Where the weight's gradient goes if it is trained: f32 `[O, I]`.
    pub weight_grad: Option<Tensor>,
    /// `[O]`
    pub bias: Option<Param>,
    /// The low-rank update, if this projection has one.
    pub adapter: Option<Adapter>,
}

/// A low-rank update of a projection.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// `[r, I]`
    pub a: Param,
    /// `[O, r]`
    pub b: Param,
    /// `alpha / r`, or `alpha / sqrt(r)`.
    pub scaling: f32,
    /// `[O]`; with it the adapter is weight-decomposed.
    pub magnitude: Option<Param>,
}

/// Dropout of the adapter's input in one projection of one pass.
#[derive(Clone, Copy, Debug)]
pub struct Dropout<'a> {
    /// Probability of dropping an element, in (0, 1).
    pub probability: f64,
    /// Distinguishes projections.
    pub key: u64,
    /// One key per token, made of its sample and its position, so that a token drops the same elements however the
    /// batch is cut.
    pub token_keys: &'a TokenKeys,
}

/// The keys of a batch's tokens, copied to the device once.
#[derive(Clone, Debug, Default)]
pub struct TokenKeys {
    host: Vec<u64>,
    pub(super) on_device: std::sync::OnceLock<Tensor>,
}

impl From<&[u64]> for TokenKeys {
    fn from(keys: &[u64]) -> Self {
        Self { host: keys.to_vec(), on_device: std::sync::OnceLock::new() }
    }
}

impl TokenKeys {
    /// The keys.
    pub fn host(&self) -> &[u64] {
        &self.host
    }
}

impl Dropout<'_> {
    /// `x` with dropped elements set to 0 and the others scaled by `1 / (1 - p)`.
    fn apply(&self, x: &[f32], cols: usize) -> Vec<f32> {
        let keep = (1.0 / (1.0 - self.probability)) as f32;
        let mut out = vec![0.0; x.len()];
        out.par_chunks_mut(cols).zip(x.par_chunks(cols)).zip(self.token_keys.host.par_iter()).for_each(
            |((out, x), &token)| {
                let row = rng::mix(self.key ^ token);
                for (col, (out, &x)) in out.iter_mut().zip(x).enumerate() {
                    if rng::is_kept(row, col as u64, self.probability) {
                        *out = x * keep;
                    }
                }
            },
        );
        out
    }
}

/// What backward needs besides the input.
#[derive(Clone, Debug, Default)]
pub struct Saved {
    /// `drop(x) Aᵀ`: `[N, r]`.
    low_rank: Option<Vec<f32>>,
    /// `DoRA`: the output before the bias and `m / ‖W + s B A‖` per output.
    decomposed: Option<(Tensor, Vec<f32>)>,
}

impl Saved {
    /// Bytes held for backward.
    pub fn size_bytes(&self) -> usize {
        let low_rank = self.low_rank.as_ref().map_or(0, Vec::len);
        4 * (low_rank + self.decomposed.as_ref().map_or(0, |(y, scale)| y.elem_count() + scale.len()))
    }
}

/// What the gradients of the weights need from that of the input.
#[derive(Debug)]
struct Carried {
    /// The gradient of the output, scaled by the magnitudes where there are some.
    dy: Tensor,
    /// The gradient of `drop(x) Aᵀ`: `[N, r]`.
    d_low_rank: Option<Vec<f32>>,
}

impl Linear {
    /// A frozen projection without bias or adapter.
    pub fn frozen(weight: Weight) -> Self {
        Self { weight, weight_grad: None, bias: None, adapter: None }
    }

    /// Projects `x`; with `use_adapter` false the base alone.
    ///
    /// # Shapes
    /// `x`: f32 `[N, I]`; returns f32 `[N, O]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn forward(
        &self,
        x: &Tensor,
        use_adapter: bool,
        dropout: Option<Dropout<'_>>,
    ) -> Result<(Tensor, Saved), Error> {
        let shape = dims2(OP, "x", x)?;
        let adapter = self.adapter.as_ref().filter(|_| use_adapter);
        let low_rank = adapter.map(|a| a.low_rank(&view(OP, x)?, shape, self.weight.rows(), dropout)).transpose()?;
        self.forward_from(x, low_rank)
    }

    /// [`Self::forward`] from `drop(x) Aᵀ`, where the adapter takes part.
    fn forward_from(&self, x: &Tensor, low_rank: Option<Vec<f32>>) -> Result<(Tensor, Saved), Error> {
        let (n, inputs) = dims2(OP, "x", x)?;
        let outputs = self.weight.rows();
        let y = self.weight.forward(x)?;
        let mut saved = Saved::default();
        if let (Some(adapter), Some(low_rank)) = (&self.adapter, low_rank) {
            let rank = adapter.rank(inputs, outputs)?;
            if low_rank.len() != n * rank {
                return Err(shape_error(OP, "low_rank", low_rank.len(), n * rank));
            }
            let b = view(OP, &adapter.b.value)?;
            change(OP, &y, |y| {
                let b_t = Matrix::new(&b, outputs, rank).t();
                multiply(y, outputs, 1.0, adapter.scaling, Matrix::new(&low_rank, n, rank), b_t, Threads::All);
            })?;
            saved.low_rank = Some(low_rank);
            if let Some(magnitude) = &adapter.magnitude {
                let norms = self.decomposed_norms(adapter, rank)?;
                let m = view(OP, &magnitude.value)?;
                let scale: Vec<f32> = m.iter().zip(&norms).map(|(m, n)| m / n).collect();
                let plain = y.copy()?;
                change(OP, &y, |y| {
                    y.par_chunks_mut(outputs).for_each(|row| row.iter_mut().zip(&scale).for_each(|(y, s)| *y *= s));
                })?;
                saved.decomposed = Some((plain, scale));
            }
        }
        if let Some(bias) = &self.bias {
            let bias = view(OP, &bias.value)?;
            if bias.len() != outputs {
                return Err(shape_error(OP, "bias", bias.len(), outputs));
            }
            change(OP, &y, |y| y.par_chunks_mut(outputs).for_each(|row| vector::add_scaled(row, 1.0, &bias)))?;
        }
        Ok((y, saved))
    }

    /// The gradient with respect to `x`; gradients of trained parameters go to their buckets.
    ///
    /// # Shapes
    /// `dy`: f32 `[N, O]`; `x`: f32 `[N, I]`, as given to [`Self::forward`]; returns f32 `[N, I]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    ///
    /// # Equation
    /// `dx = dy W + s · drop(dy B A)`, `dA = s (dy B)ᵀ drop(x)`, `dB = s dyᵀ (drop(x) Aᵀ)`, `dW = dyᵀ x`, `db = Σ dy`.
    pub fn backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        saved: &Saved,
        dropout: Option<Dropout<'_>>,
    ) -> Result<Tensor, Error> {
        let (dx, carried) = self.backward_input(dy, saved, dropout)?;
        self.backward_weights(&carried, Some(x), Some(saved), dropout)?;
        Ok(dx)
    }

    /// The part of [`Self::backward`] that does not need `x`.
    fn backward_input(
        &self,
        dy: &Tensor,
        saved: &Saved,
        dropout: Option<Dropout<'_>>,
    ) -> Result<(Tensor, Carried), Error> {
        let (n, outputs) = dims2(OP_BACKWARD, "dy", dy)?;
        if outputs != self.weight.rows() {
            return Err(shape_error(OP_BACKWARD, "dy", dy.dims(), [n, self.weight.rows()]));
        }
        if let Some(bias) = self.bias.as_ref().filter(|b| b.grad.is_some()) {
            let dy = view(OP_BACKWARD, dy)?;
            let mut sum = vec![0.0; outputs];
            dy.chunks_exact(outputs).for_each(|row| vector::add_scaled(&mut sum, 1.0, row));
            bias.accumulate(OP_BACKWARD, &sum)?;
        }
        let dy = match (&saved.decomposed, self.adapter.as_ref().and_then(|a| a.magnitude.as_ref())) {
            (Some((plain, scale)), Some(magnitude)) => decomposed_backward(dy, plain, scale, magnitude)?,
            _ => dy.clone(),
        };
        let dx = self.weight.backward_input(&dy)?;
        let d_low_rank = match (&self.adapter, &saved.low_rank) {
            (Some(adapter), Some(_)) => Some(adapter.backward_input(&dx, &view(OP_BACKWARD, &dy)?, dropout)?),
            _ => None,
        };
        Ok((dx, Carried { dy, d_low_rank }))
    }

    /// Adds the gradients of the weight and of the adapter to their buckets.
    fn backward_weights(
        &self,
        carried: &Carried,
        x: Option<&Tensor>,
        saved: Option<&Saved>,
        dropout: Option<Dropout<'_>>,
    ) -> Result<(), Error> {
        let (n, outputs) = dims2(OP_BACKWARD, "dy", &carried.dy)?;
        let dy = view(OP_BACKWARD, &carried.dy)?;
        let low_rank = saved.and_then(|saved| saved.low_rank.as_ref());
        if let (Some(adapter), Some(low_rank)) = (&self.adapter, low_rank)
            && let Some(grad) = &adapter.b.grad
        {
            let rank = adapter.b.value.dims()[1];
            change(OP_BACKWARD, grad, |grad| {
                let low = Matrix::new(low_rank, n, rank);
                multiply(grad, rank, 1.0, adapter.scaling, Matrix::new(&dy, n, outputs).t(), low, Threads::All);
            })?;
        }
        let Some(x) = x else { return Ok(()) };
        let (rows, inputs) = dims2(OP_BACKWARD, "x", x)?;
        if rows != n || outputs != self.weight.rows() {
            return Err(shape_error(OP_BACKWARD, "x", [rows, inputs], [n, inputs]));
        }
        let x = view(OP_BACKWARD, x)?;
        if let Some(grad) = &self.weight_grad {
            change(OP_BACKWARD, grad, |grad| {
                let dy_t = Matrix::new(&dy, n, outputs).t();
                multiply(grad, inputs, 1.0, 1.0, dy_t, Matrix::new(&x, n, inputs), Threads::All);
            })?;
        }
        if let (Some(adapter), Some(d_low)) = (&self.adapter, &carried.d_low_rank) {
            adapter.backward_a(&x, (n, inputs), d_low, dropout)?;
        }
        Ok(())
    }

    /// The norm of each row of `W + s B A`.
    fn decomposed_norms(&self, adapter: &Adapter, rank: usize) -> Result<Vec<f32>, Error> {
        const PANEL: usize = 64;
        let (outputs, inputs) = (self.weight.rows(), self.weight.cols());
        let (a, b) = (view(OP, &adapter.a.value)?, view(OP, &adapter.b.value)?);
        let mut panel = vec![0.0; PANEL * inputs];
        let mut norms = Vec::with_capacity(outputs);
        for start in (0..outputs).step_by(PANEL) {
            let rows = PANEL.min(outputs - start);
            let panel = &mut panel[..rows * inputs];
            self.weight.dequantize_rows_into(start..start + rows, panel)?;
            let b = Matrix::new(&b[start * rank..(start + rows) * rank], rows, rank);
            multiply(panel, inputs, 1.0, adapter.scaling, b, Matrix::new(&a, rank, inputs), Threads::All);
            norms.extend(panel.chunks_exact(inputs).map(|row| vector::dot(row, row).sqrt()));
        }
        Ok(norms)
    }
}

/// Adds the magnitude's gradient to its bucket and returns `dy` times `m / ‖·‖`.
fn decomposed_backward(dy: &Tensor, plain: &Tensor, scale: &[f32], magnitude: &Param) -> Result<Tensor, Error> {
    let outputs = scale.len();
    let (dy_view, plain) = (view(OP_BACKWARD, dy)?, view(OP_BACKWARD, plain)?);
    if magnitude.grad.is_some() {
        let mut sum = vec![0.0; outputs];
        for (dy, plain) in dy_view.chunks_exact(outputs).zip(plain.chunks_exact(outputs)) {
            for ((sum, &dy), &plain) in sum.iter_mut().zip(dy).zip(plain) {
                *sum += dy * plain;
            }
        }
        {
            let m = view(OP_BACKWARD, &magnitude.value)?;
            // scale / m is 1 / norm.
            sum.iter_mut().zip(scale).zip(m.iter()).for_each(|((sum, s), m)| *sum *= s / m);
        }
        magnitude.accumulate(OP_BACKWARD, &sum)?;
    }
    let mut scaled = dy_view.to_vec();
    scaled.par_chunks_mut(outputs).for_each(|row| row.iter_mut().zip(scale).for_each(|(v, s)| *v *= s));
    tensor(scaled, dy.shape().clone())
}

impl Adapter {
    fn rank(&self, inputs: usize, outputs: usize) -> Result<usize, Error> {
        let rank = self.a.value.dims().first().copied().unwrap_or(0);
        if self.a.value.dims() != [rank, inputs] {
            return Err(shape_error(OP, "lora_a", self.a.value.dims(), [rank, inputs]));
        }
        if self.b.value.dims() != [outputs, rank] {
            return Err(shape_error(OP, "lora_b", self.b.value.dims(), [outputs, rank]));
        }
        Ok(rank)
    }

    /// `drop(x) Aᵀ`: `[N, r]`.
    pub(super) fn low_rank(
        &self,
        x: &[f32],
        (n, inputs): (usize, usize),
        outputs: usize,
        dropout: Option<Dropout<'_>>,
    ) -> Result<Vec<f32>, Error> {
        let rank = self.rank(inputs, outputs)?;
        let dropped = dropout.map(|d| d.apply(x, inputs));
        let source = dropped.as_deref().unwrap_or(x);
        let mut low_rank = vec![0.0; n * rank];
        let a = view(OP, &self.a.value)?;
        let a_t = Matrix::new(&a, rank, inputs).t();
        multiply(&mut low_rank, rank, 0.0, 1.0, Matrix::new(source, n, inputs), a_t, Threads::All);
        Ok(low_rank)
    }

    /// Adds the adapter's share to `dx` and returns the gradient of `drop(x) Aᵀ`: `[N, r]`.
    fn backward_input(&self, dx: &Tensor, dy: &[f32], dropout: Option<Dropout<'_>>) -> Result<Vec<f32>, Error> {
        let (outputs, rank) = dims2(OP_BACKWARD, "lora_b", &self.b.value)?;
        let (n, _) = dims2(OP_BACKWARD, "dx", dx)?;
        let mut d_low_rank = vec![0.0; n * rank];
        {
            let b = view(OP_BACKWARD, &self.b.value)?;
            let (dy, b) = (Matrix::new(dy, n, outputs), Matrix::new(&b, outputs, rank));
            multiply(&mut d_low_rank, rank, 0.0, self.scaling, dy, b, Threads::All);
        }
        self.spread(dx, &d_low_rank, dropout)?;
        Ok(d_low_rank)
    }

    /// Adds to `dx` what it gets through the gradient of `drop(x) Aᵀ`.
    pub(super) fn spread(&self, dx: &Tensor, d_low_rank: &[f32], dropout: Option<Dropout<'_>>) -> Result<(), Error> {
        let (rank, inputs) = dims2(OP_BACKWARD, "lora_a", &self.a.value)?;
        let n = d_low_rank.len() / rank.max(1);
        let d_low = Matrix::new(d_low_rank, n, rank);
        let a = view(OP_BACKWARD, &self.a.value)?;
        let a = Matrix::new(&a, rank, inputs);
        match dropout {
            None => change(OP_BACKWARD, dx, |dx| multiply(dx, inputs, 1.0, 1.0, d_low, a, Threads::All)),
            Some(dropout) => {
                let mut through = vec![0.0; n * inputs];
                multiply(&mut through, inputs, 0.0, 1.0, d_low, a, Threads::All);
                let through = dropout.apply(&through, inputs);
                change(OP_BACKWARD, dx, |dx| vector::add_scaled(dx, 1.0, &through))
            }
        }
    }

    /// Adds the gradient of `A` to its bucket, from that of `drop(x) Aᵀ`.
    pub(super) fn backward_a(
        &self,
        x: &[f32],
        (n, inputs): (usize, usize),
        d_low_rank: &[f32],
        dropout: Option<Dropout<'_>>,
    ) -> Result<(), Error> {
        let Some(grad) = &self.a.grad else { return Ok(()) };
        let dropped = dropout.map(|d| d.apply(x, inputs));
        let source = Matrix::new(dropped.as_deref().unwrap_or(x), n, inputs);
        let d_low = Matrix::new(d_low_rank, n, self.a.value.dims()[0]);
        change(OP_BACKWARD, grad, |grad| multiply(grad, inputs, 1.0, 1.0, d_low.t(), source, Threads::All))
    }
}
