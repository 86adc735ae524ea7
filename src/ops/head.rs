//! Log-probability and entropy of tokens from hidden states, without ever holding all logits.
//!
//! The logits of a panel of vocabulary rows are made, used and dropped; backward makes them again. A batch of `R` rows
//! holds `R × PANEL` logits instead of `R × V`. Every loss of SFT and GRPO is a function of these two numbers per
//! token, so this is the only place where the vocabulary is summed over.
//!
//! Shapes: `R` rows of hidden states that predict a token, `D` hidden, `V` vocabulary.

use candle_core::Tensor;
use rayon::prelude::*;

use super::linear::{Adapter, Dropout};
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
    /// The mean over the vocabulary of the log-probabilities, in nats: `[R]`; empty unless asked for.
    pub mean_logprobs: Vec<f32>,
}

/// What a pass over the head has besides the weight. Only the CPU computes with any of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Extra<'a> {
    /// A low-rank update of the weight, and the dropout of its input.
    pub adapter: Option<(&'a Adapter, Option<Dropout<'a>>)>,
    /// Whether [`Output::mean_logprobs`] is asked for.
    pub has_means: bool,
}

/// How a loss depends on an [`Output`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Gradient<'a> {
    /// d loss / d logprobs: `[R]`.
    pub d_logprobs: &'a [f32],
    /// d loss / d entropies: `[R]`; empty means zeros.
    pub d_entropies: &'a [f32],
    /// d loss / d `mean_logprobs`: `[R]`; empty means zeros.
    pub d_mean_logprobs: &'a [f32],
}

/// What [`backward_with`] needs besides the operands: `drop(h) Aᵀ`, where there is an adapter.
#[derive(Clone, Debug, Default)]
pub struct Saved {
    low_rank: Option<Vec<f32>>,
}

impl Extra<'_> {
    /// Whether there is nothing besides the weight.
    pub fn is_none(&self) -> bool {
        self.adapter.is_none() && !self.has_means
    }

    fn refuse_on_gpu(&self, op: &'static str) -> Result<(), Error> {
        if self.is_none() {
            return Ok(());
        }
        let what = if self.has_means { "label smoothing" } else { "an adapter on the head" };
        Err(Error::Unsupported { op, what: what.into(), instead: "compute on the CPU (`device: cpu`)" })
    }
}

/// Running sums of one row over the panels.
#[derive(Clone, Copy)]
struct Running {
    max: f32,
    sum: f64,
    weighted: f64,
    target: f32,
    total: f64,
}

/// Log-probabilities and entropies of `targets`.
///
/// # Shapes
/// `hidden`: f32 `[R, D]`; `weight`: `[V, D]`; `targets`: `[R]`. Logits are divided by `temperature`.
///
/// # Errors
/// If the shapes do not fit or a target is outside the vocabulary.
pub fn forward(hidden: &Tensor, weight: &Weight, targets: &[u32], temperature: f64) -> Result<Output, Error> {
    Ok(forward_with(hidden, weight, Extra::default(), targets, temperature)?.0)
}

/// [`forward`] with what else there is.
///
/// # Shapes
/// As [`forward`].
///
/// # Errors
/// As [`forward`]; on a GPU if there is anything else.
pub fn forward_with(
    hidden: &Tensor,
    weight: &Weight,
    extra: Extra<'_>,
    targets: &[u32],
    temperature: f64,
) -> Result<(Output, Saved), Error> {
    const OP: &str = "head";
    let (rows, d, vocabulary) = check(OP, hidden, weight, targets)?;
    if hidden.device().is_cuda() {
        extra.refuse_on_gpu(OP)?;
        return Ok((super::cuda::head::forward(hidden, weight, targets, temperature)?, Saved::default()));
    }
    let values = view(OP, hidden)?;
    let update = extra.adapter.map(|(adapter, dropout)| Update::new(adapter, &values, (rows, d), vocabulary, dropout));
    let update = update.transpose()?;
    let hidden = Matrix::new(&values, rows, d);
    let start = Running { max: f32::NEG_INFINITY, sum: 0.0, weighted: 0.0, target: f32::NAN, total: 0.0 };
    let mut running = vec![start; rows];
    let inverse = temperature.recip() as f32;
    for_each_panel(weight, rows, |first, panel, logits| {
        let width = panel.len() / d;
        let panel = Matrix::new(panel, width, d).t();
        multiply(logits, width, 0.0, inverse, hidden, panel, Threads::All);
        if let Some(update) = &update {
            update.add_to(logits, first, inverse)?;
        }
        logits.par_chunks_exact(width).zip(&mut running).zip(targets).for_each(|((logits, running), &target)| {
            let max = vector::max(logits).max(running.max);
            let (sum, weighted) = vector::exp_sums(logits, max);
            let keep = f64::from(running.max - max).exp();
            running.sum = running.sum * keep + f64::from(sum);
            running.weighted = running.weighted * keep + f64::from(weighted);
            running.max = max;
            if extra.has_means {
                running.total += logits.iter().map(|&logit| f64::from(logit)).sum::<f64>();
            }
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
        if extra.has_means {
            output.mean_logprobs.push((row.total / vocabulary as f64 - log_sum) as f32);
        }
    }
    Ok((output, Saved { low_rank: update.map(|update| update.low_rank) }))
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
    let gradient = Gradient { d_logprobs, d_entropies, d_mean_logprobs: &[] };
    let (extra, saved) = (Extra::default(), Saved::default());
    backward_with(gradient, hidden, weight, weight_grad, extra, &saved, targets, temperature, output)
}

/// [`backward`] with what else there is; gradients of an adapter go to their buckets.
///
/// # Shapes
/// As [`backward`].
///
/// # Errors
/// As [`backward`]; on a GPU if there is anything else.
///
/// # Equation
/// Besides those of [`backward`]: `∂ mean(log p) / ∂z = 1/V - p`; those of a low-rank update are [`super::linear`]'s.
#[expect(clippy::too_many_arguments, reason = "the operands of the head's backward")]
pub fn backward_with(
    gradient: Gradient<'_>,
    hidden: &Tensor,
    weight: &Weight,
    weight_grad: Option<&Tensor>,
    extra: Extra<'_>,
    saved: &Saved,
    targets: &[u32],
    temperature: f64,
    output: &Output,
) -> Result<Tensor, Error> {
    const OP: &str = "head backward";
    let Gradient { d_logprobs, d_entropies, d_mean_logprobs } = gradient;
    let (rows, d, vocabulary) = check(OP, hidden, weight, targets)?;
    let fits = |values: &[f32]| values.is_empty() || values.len() == rows;
    if d_logprobs.len() != rows || !fits(d_entropies) || !fits(d_mean_logprobs) {
        return Err(shape_error(OP, "d_logprobs", [d_logprobs.len(), d_entropies.len(), d_mean_logprobs.len()], rows));
    }
    if hidden.device().is_cuda() {
        extra.refuse_on_gpu(OP)?;
        let gradients = (d_logprobs, d_entropies);
        return super::cuda::head::backward(gradients, hidden, weight, weight_grad, targets, temperature, output);
    }
    let values = view(OP, hidden)?;
    let update = match (extra.adapter, &saved.low_rank) {
        (Some((adapter, _)), Some(low_rank)) => Some(Update { adapter, low_rank: low_rank.clone(), rows }),
        _ => None,
    };
    let mut d_low_rank = update.as_ref().map(|update| vec![0.0; update.low_rank.len()]);
    let hidden = Matrix::new(&values, rows, d);
    let inverse = temperature.recip() as f32;
    let mut d_hidden = vec![0.0; rows * d];
    for_each_panel(weight, rows, |first, panel, logits| {
        let width = panel.len() / d;
        let panel = Matrix::new(panel, width, d);
        multiply(logits, width, 0.0, inverse, hidden, panel.t(), Threads::All);
        if let Some(update) = &update {
            update.add_to(logits, first, inverse)?;
        }
        logits.par_chunks_exact_mut(width).enumerate().for_each(|(row, logits)| {
            let d_entropy = d_entropies.get(row).copied().unwrap_or(0.0);
            let d_mean = d_mean_logprobs.get(row).copied().unwrap_or(0.0);
            let d_sum = d_logprobs[row] + d_mean;
            vector::head_gradient(logits, output.log_sums[row], d_sum, d_entropy, output.entropies[row]);
            if d_mean != 0.0 {
                let share = d_mean / vocabulary as f32;
                logits.iter_mut().for_each(|logit| *logit += share);
            }
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
        if let (Some(update), Some(d_low_rank)) = (&update, &mut d_low_rank) {
            update.backward(logits, first, inverse, d_low_rank)?;
        }
        Ok(())
    })?;
    let d_hidden = tensor(d_hidden, (rows, d))?;
    if let (Some((adapter, dropout)), Some(d_low_rank)) = (extra.adapter, &d_low_rank) {
        adapter.spread(&d_hidden, d_low_rank, dropout)?;
        adapter.backward_a(&values, (rows, d), d_low_rank, dropout)?;
    }
    Ok(d_hidden)
}

/// A low-rank update of the head and what it made of a batch.
struct Update<'a> {
    adapter: &'a Adapter,
    /// `drop(h) Aᵀ`: `[R, r]`.
    low_rank: Vec<f32>,
    rows: usize,
}

impl<'a> Update<'a> {
    fn new(
        adapter: &'a Adapter,
        hidden: &[f32],
        (rows, d): (usize, usize),
        vocabulary: usize,
        dropout: Option<Dropout<'_>>,
    ) -> Result<Self, Error> {
        Ok(Self { adapter, low_rank: adapter.low_rank(hidden, (rows, d), vocabulary, dropout)?, rows })
    }

    fn rank(&self) -> usize {
        self.adapter.b.value.dims()[1]
    }

    /// Adds its share to the logits of the panel that begins with row `first`.
    fn add_to(&self, logits: &mut [f32], first: usize, inverse: f32) -> Result<(), Error> {
        let (rank, width) = (self.rank(), logits.len() / self.rows.max(1));
        let b = view("head", &self.adapter.b.value)?;
        let b = Matrix::new(&b[first * rank..(first + width) * rank], width, rank).t();
        let low_rank = Matrix::new(&self.low_rank, self.rows, rank);
        multiply(logits, width, 1.0, self.adapter.scaling * inverse, low_rank, b, Threads::All);
        Ok(())
    }

    /// Adds the panel's part of the gradient of `B` to its bucket and of the low-rank product to `d_low_rank`.
    fn backward(&self, d_logits: &[f32], first: usize, inverse: f32, d_low_rank: &mut [f32]) -> Result<(), Error> {
        const OP: &str = "head backward";
        let (rank, width) = (self.rank(), d_logits.len() / self.rows.max(1));
        let factor = self.adapter.scaling * inverse;
        let d_logits = Matrix::new(d_logits, self.rows, width);
        {
            let b = view(OP, &self.adapter.b.value)?;
            let b = Matrix::new(&b[first * rank..(first + width) * rank], width, rank);
            multiply(d_low_rank, rank, 1.0, factor, d_logits, b, Threads::All);
        }
        let Some(grad) = &self.adapter.b.grad else { return Ok(()) };
        let low_rank = Matrix::new(&self.low_rank, self.rows, rank);
        change(OP, grad, |grad| {
            let grad = &mut grad[first * rank..(first + width) * rank];
            multiply(grad, rank, 1.0, factor, d_logits.t(), low_rank, Threads::All);
        })
    }
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
    logits_with(hidden, weight, None)
}

/// [`logits`] with a low-rank update of the weight.
///
/// # Shapes
/// As [`logits`].
///
/// # Errors
/// As [`logits`]; on a GPU if there is an update.
pub fn logits_with(hidden: &Tensor, weight: &Weight, adapter: Option<&Adapter>) -> Result<Tensor, Error> {
    if hidden.device().is_cuda() {
        Extra { adapter: adapter.map(|adapter| (adapter, None)), has_means: false }.refuse_on_gpu("head")?;
        return super::cuda::head::logits(hidden, weight);
    }
    let logits = weight.forward(hidden)?;
    if let Some(adapter) = adapter {
        let shape = dims2("head", "hidden", hidden)?;
        let update = Update::new(adapter, &view("head", hidden)?, shape, weight.rows(), None)?;
        let added = std::sync::Mutex::new(Ok(()));
        change("head", &logits, |logits| {
            if let (Err(error), Ok(mut added)) = (update.add_to(logits, 0, 1.0), added.lock()) {
                *added = Err(error);
            }
        })?;
        added.into_inner().unwrap_or(Ok(()))?;
    }
    Ok(logits)
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
