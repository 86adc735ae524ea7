//! Log-probability and entropy of tokens from hidden states, without ever holding all logits.
//!
//! The logits of a panel of vocabulary rows are made, used and dropped; backward makes them again. A batch of `R` rows
//! holds `R × PANEL` logits instead of `R × V`. Every loss of SFT and GRPO is a function of these two numbers per
//! token, so this is the only place where the vocabulary is summed over.
//!
//! Shapes: `R` rows of hidden states that predict a token, `D` hidden, `V` vocabulary.

use candle_core::Tensor;
use rayon::prelude::*;

use super::view::{change, dims2, tensor, view};
use super::{Error, shape_error};
use crate::kernels::cpu::matmul::{Matrix, Threads, multiply};
use crate::kernels::cpu::vector;
use crate::quant::Weight;

/// Vocabulary rows whose logits are held at a time.
const PANEL: usize = 2048;

/// What the head says about each row's target.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Output {
    /// `log softmax(h Wᵀ / temperature)[target]`: `[R]`, in nats.
    pub logprobs: Vec<f32>,
    /// Entropy of the distribution: `[R]`, in nats.
    pub entropies: Vec<f32>,
    /// Whether the target has the largest logit.
    pub is_argmax: Vec<bool>,
    /// Log-sum-exp of the scaled logits, kept for backward: `[R]`.
    pub log_sums: Vec<f32>,
}

/// Running sums of one row over the panels.
#[derive(Clone, Copy)]
struct Running {
    max: f32,
    sum: f64,
    weighted: f64,
    target: f32,
}

/// Log-probabilities and entropies of `targets`.
///
/// # Shapes
/// `hidden`: f32 `[R, D]`; `weight`: `[V, D]`; `targets`: `[R]`. Logits are divided by `temperature`.
///
/// # Errors
/// If the shapes do not fit or a target is outside the vocabulary.
pub fn forward(hidden: &Tensor, weight: &Weight, targets: &[u32], temperature: f64) -> Result<Output, Error> {
    const OP: &str = "head";
    let (rows, d, vocabulary) = check(OP, hidden, weight, targets)?;
    #[cfg(feature = "cuda")]
    if hidden.device().is_cuda() {
        return super::cuda::head::forward(hidden, weight, targets, temperature);
    }
    let hidden = view(OP, hidden)?;
    let hidden = Matrix::new(&hidden, rows, d);
    let start = Running { max: f32::NEG_INFINITY, sum: 0.0, weighted: 0.0, target: f32::NAN };
    let mut running = vec![start; rows];
    for_each_panel(weight, rows, |first, panel, logits| {
        let width = panel.len() / d;
        let panel = Matrix::new(panel, width, d).t();
        multiply(logits, width, 0.0, temperature.recip() as f32, hidden, panel, Threads::All);
        logits.par_chunks_exact(width).zip(&mut running).zip(targets).for_each(|((logits, running), &target)| {
            let max = vector::max(logits).max(running.max);
            let (sum, weighted) = vector::exp_sums(logits, max);
            let keep = f64::from(running.max - max).exp();
            running.sum = running.sum * keep + f64::from(sum);
            running.weighted = running.weighted * keep + f64::from(weighted);
            running.max = max;
            if let Some(&logit) = (target as usize).checked_sub(first).and_then(|i| logits.get(i)) {
                running.target = logit;
            }
        });
        Ok(())
    })?;
    debug_assert!(vocabulary > 0);
    let mut output = Output::default();
    for row in running {
        let log_sum = f64::from(row.max) + row.sum.ln();
        output.log_sums.push(log_sum as f32);
        output.logprobs.push((f64::from(row.target) - log_sum) as f32);
        output.entropies.push((log_sum - row.weighted / row.sum) as f32);
        output.is_argmax.push(row.target >= row.max);
    }
    Ok(output)
}

/// The gradient with respect to `hidden`; the weight's gradient goes to `weight_grad` if it is trained.
///
/// # Shapes
/// `d_logprobs`, `d_entropies`: `[R]` (an empty `d_entropies` means zeros); `weight_grad`: f32 `[V, D]`; returns f32
/// `[R, D]`.
///
/// # Errors
/// If the shapes do not fit.
///
/// # Equation
/// With `z = h Wᵀ / t`, `p = softmax(z)`: `∂ log p_target / ∂z = 1[target] - p`, `∂ entropy / ∂z = -p (log p + entropy)`.
#[expect(clippy::too_many_arguments, reason = "the operands of the head's backward")]
pub fn backward(
    d_logprobs: &[f32],
    d_entropies: &[f32],
    hidden: &Tensor,
    weight: &Weight,
    weight_grad: Option<&Tensor>,
    targets: &[u32],
    temperature: f64,
    output: &Output,
) -> Result<Tensor, Error> {
    const OP: &str = "head backward";
    let (rows, d, _) = check(OP, hidden, weight, targets)?;
    if d_logprobs.len() != rows || !(d_entropies.is_empty() || d_entropies.len() == rows) {
        return Err(shape_error(OP, "d_logprobs", [d_logprobs.len(), d_entropies.len()], rows));
    }
    #[cfg(feature = "cuda")]
    if hidden.device().is_cuda() {
        let gradients = (d_logprobs, d_entropies);
        return super::cuda::head::backward(gradients, hidden, weight, weight_grad, targets, temperature, output);
    }
    let hidden = view(OP, hidden)?;
    let hidden = Matrix::new(&hidden, rows, d);
    let inverse = temperature.recip() as f32;
    let mut d_hidden = vec![0.0; rows * d];
    for_each_panel(weight, rows, |first, panel, logits| {
        let width = panel.len() / d;
        let panel = Matrix::new(panel, width, d);
        multiply(logits, width, 0.0, inverse, hidden, panel.t(), Threads::All);
        logits.par_chunks_exact_mut(width).enumerate().for_each(|(row, logits)| {
            let d_entropy = d_entropies.get(row).copied().unwrap_or(0.0);
            vector::head_gradient(logits, output.log_sums[row], d_logprobs[row], d_entropy, output.entropies[row]);
            if let Some(logit) = (targets[row] as usize).checked_sub(first).and_then(|i| logits.get_mut(i)) {
                *logit += d_logprobs[row];
            }
        });
        let d_logits = Matrix::new(logits, rows, width);
        multiply(&mut d_hidden, d, 1.0, inverse, d_logits, panel, Threads::All);
        if let Some(grad) = weight_grad {
            change(OP, grad, |grad| {
                let grad = &mut grad[first * d..(first + width) * d];
                multiply(grad, d, 1.0, inverse, d_logits.t(), hidden, Threads::All);
            })?;
        }
        Ok(())
    })?;
    tensor(d_hidden, (rows, d))
}

/// [`forward`] and [`backward`] in one, where the gradients are known before the log-probabilities. On a GPU with a dense
/// frozen weight the logits are made once, for some rows at a time; else this is the one after the other.
///
/// # Shapes
/// As those of the two.
///
/// # Errors
/// If the shapes do not fit.
pub fn forward_backward(
    d_logprobs: &[f32],
    d_entropies: &[f32],
    hidden: &Tensor,
    weight: &Weight,
    weight_grad: Option<&Tensor>,
    targets: &[u32],
    temperature: f64,
) -> Result<(Output, Tensor), Error> {
    const OP: &str = "head";
    let (rows, ..) = check(OP, hidden, weight, targets)?;
    if d_logprobs.len() != rows || !(d_entropies.is_empty() || d_entropies.len() == rows) {
        return Err(shape_error(OP, "d_logprobs", [d_logprobs.len(), d_entropies.len()], rows));
    }
    #[cfg(feature = "cuda")]
    if let Weight::Dense(table) = weight
        && table.device().is_cuda()
        && table.dtype() == hidden.dtype()
        && weight_grad.is_none()
    {
        return super::cuda::head::forward_backward((d_logprobs, d_entropies), hidden, table, targets, temperature);
    }
    let output = forward(hidden, weight, targets, temperature)?;
    let d_hidden = backward(d_logprobs, d_entropies, hidden, weight, weight_grad, targets, temperature, &output)?;
    Ok((output, d_hidden))
}

/// All logits of a few rows, for generation and tests.
///
/// # Shapes
/// `hidden`: f32 `[R, D]`; `weight`: `[V, D]`; returns f32 `[R, V]`.
///
/// # Errors
/// If the shapes do not fit.
pub fn logits(hidden: &Tensor, weight: &Weight) -> Result<Tensor, Error> {
    #[cfg(feature = "cuda")]
    if hidden.device().is_cuda() {
        return super::cuda::head::logits(hidden, weight);
    }
    Ok(weight.forward(hidden)?)
}

fn check(op: &'static str, hidden: &Tensor, weight: &Weight, targets: &[u32]) -> Result<(usize, usize, usize), Error> {
    let (rows, d) = dims2(op, "hidden", hidden)?;
    if weight.cols() != d {
        return Err(shape_error(op, "weight", [weight.rows(), weight.cols()], ["V".to_string(), d.to_string()]));
    }
    if targets.len() != rows {
        return Err(shape_error(op, "targets", targets.len(), rows));
    }
    match targets.iter().find(|&&id| id as usize >= weight.rows()) {
        Some(&id) => Err(Error::Token { op, id, vocabulary: weight.rows() }),
        None => Ok((rows, d, weight.rows())),
    }
}

/// Calls `work(first row, panel [width, D], room for [R, width] logits)` for each panel of the vocabulary in order.
fn for_each_panel(
    weight: &Weight,
    rows: usize,
    mut work: impl FnMut(usize, &[f32], &mut [f32]) -> Result<(), Error>,
) -> Result<(), Error> {
    let (vocabulary, d) = (weight.rows(), weight.cols());
    let width = PANEL.min(vocabulary);
    let mut panel = vec![0.0; width * d];
    let mut logits = vec![0.0; rows * width];
    if rows == 0 {
        return Ok(());
    }
    for first in (0..vocabulary).step_by(width) {
        let width = width.min(vocabulary - first);
        weight.dequantize_rows_into(first..first + width, &mut panel[..width * d])?;
        work(first, &panel[..width * d], &mut logits[..rows * width])?;
    }
    Ok(())
}
