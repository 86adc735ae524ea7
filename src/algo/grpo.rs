//! The GRPO family of policy losses and their gradients by hand.
//!
//! Called by `train/grpo` once per micro-batch, after the head has computed log-probabilities (and entropies) of the
//! completion tokens. Formulas and the order of the factors are TRL's; the golden group `grpo` checks each against it.

use super::entropy::entropy_threshold;
use super::grpo_inputs::{GrpoInputs, GrpoLossSettings, GrpoOutput, ImportanceRatio, OPERATION};
use super::kl::{k3, k3_slope};
use super::policy::{PolicyTerm, policy_term, vespo_weight};
use super::rows::Rows;
use super::{Error, Metrics};
use crate::config::settings::{GrpoLossType, ImportanceSamplingLevel};

/// The policy loss of a micro-batch with its gradient.
///
/// # Shapes
/// See [`GrpoInputs`] and [`GrpoOutput`].
/// # Errors
/// If lengths differ, an array that a setting needs is missing, a mask holds something else than 0 and 1, or a setting
/// is outside its range. Numbers that are not finite pass through: check the loss.
/// # Equation
/// Per token `l = policy * off_policy_mask * entropy_mask * importance_ratio + beta * kl`, with the policy term of
/// DeepSeekMath (2402.03300) eq. 3 and its descendants, KL by k3 (eq. 4), times the ratio with
/// `use_bias_correction_kl`. Sums over unmasked tokens are normalised per loss type:
/// `grpo`, `sapo`: mean over rows of the row's token mean; `bnpo`: token mean of the micro-batch; `dr_grpo`: by
/// `B * max_completion_length` (2503.20783); `luspo`: mean over rows of the row's token sum; each divided by the
/// accumulation steps. `dapo`, `cispo`, `vespo`: by the tokens of the generation batch per rank (2503.14476 sec. 3.3),
/// times `gradient_accumulation_steps / steps_per_generation`, so that the scale does not depend on how many
/// optimizer steps a generation batch is cut into.
pub fn grpo_loss(inputs: &GrpoInputs<'_>, settings: &GrpoLossSettings) -> Result<GrpoOutput, Error> {
    settings.check()?;
    inputs.batch.check()?;
    let batch = Batch::new(inputs, settings)?;
    let normaliser = batch.normaliser();
    let mut output = GrpoOutput {
        loss: 0.0,
        d_logprobs: vec![0.0; inputs.logprobs.len()],
        d_entropies: None,
        attended_entropy: batch.attended_entropy(),
        metrics: Metrics::default(),
    };
    let mut tally = Tally::default();
    for row in 0..batch.rows.count() {
        output.loss += batch.row(row, &normaliser, &mut output.d_logprobs, &mut tally);
    }
    let policy_loss = output.loss * normaliser.accumulation;
    if settings.has_entropy_bonus() {
        let (bonus, slopes) = batch.entropy_bonus(normaliser.accumulation_of_bonus);
        output.loss -= settings.entropy_coef * bonus;
        output.d_entropies = Some(slopes);
        output.metrics.mean("policy_loss", policy_loss, 1.0);
        // The loop logs a weight that follows the entropy once it has moved.
        if inputs.batch.is_training && !settings.is_entropy_adaptive {
            output.metrics.mean("entropy_coef", settings.entropy_coef, 1.0);
        }
    }
    batch.report(&tally, &mut output.metrics);
    Ok(output)
}

/// Checked inputs with everything that does not depend on the loop over rows.
struct Batch<'a> {
    inputs: &'a GrpoInputs<'a>,
    settings: &'a GrpoLossSettings,
    rows: Rows<'a>,
    mask: Vec<bool>,
    /// Tokens that the policy term and the bonus look at; a subset of `mask`.
    attended: Vec<bool>,
}

/// How the sum over a row's tokens enters the loss.
struct Normaliser {
    /// Factor on every token; for the row means, before the division by the row's tokens.
    factor: f64,
    is_row_mean: bool,
    /// What the loss was divided by for accumulation alone.
    accumulation: f64,
    accumulation_of_bonus: f64,
}

/// What the metrics need of the rows.
#[derive(Default)]
struct Tally {
    kl: f64,
    phi: f64,
    low: Vec<f64>,
    high: Vec<f64>,
    /// Tokens of each row, as the denominators of its clip shares.
    tokens: Vec<f64>,
}

impl<'a> Batch<'a> {
    fn new(inputs: &'a GrpoInputs<'a>, settings: &'a GrpoLossSettings) -> Result<Self, Error> {
        let rows = Rows::new(OPERATION, inputs.row_starts, inputs.logprobs.len())?;
        for (what, values) in [
            ("old_logprobs", inputs.old_logprobs),
            ("ref_logprobs", inputs.ref_logprobs),
            ("sampling_logprobs", inputs.sampling_logprobs),
            ("entropies", inputs.entropies),
        ] {
            rows.optional(what, values)?;
        }
        rows.per_row("advantages", inputs.advantages)?;
        match inputs.importance_ratio {
            Some(ImportanceRatio::Token(ratios)) => rows.tokens("importance_ratio", ratios)?,
            Some(ImportanceRatio::Sequence(ratios)) => rows.per_row("importance_ratio", ratios)?,
            None => {}
        }
        let missing = |option, what| Err(Error::Missing { operation: OPERATION, option, what });
        if settings.beta != 0.0 && inputs.ref_logprobs.is_none() {
            return missing(format!("`beta` = {}", settings.beta), "ref_logprobs");
        }
        if settings.needs_entropies() && inputs.entropies.is_none() {
            return missing("`top_entropy_quantile` below 1 or an `entropy_coef`".into(), "entropies");
        }
        let mask = rows.mask(inputs.mask, inputs.tool_mask)?;
        let attended = attended(inputs, settings, &mask);
        Ok(Self { inputs, settings, rows, mask, attended })
    }

    fn normaliser(&self) -> Normaliser {
        let batch = &self.inputs.batch;
        let steps = if batch.is_training { batch.gradient_accumulation_steps as f64 } else { 1.0 };
        let rows = self.rows.count() as f64;
        let per_step = |divisor: f64, is_row_mean| Normaliser {
            factor: 1.0 / (divisor * steps),
            is_row_mean,
            accumulation: steps,
            accumulation_of_bonus: steps,
        };
        match self.settings.loss_type {
            GrpoLossType::Grpo | GrpoLossType::Sapo => per_step(rows, true),
            GrpoLossType::Luspo => per_step(rows, false),
            GrpoLossType::Bnpo => per_step(self.tokens().max(1.0), false),
            GrpoLossType::DrGrpo => per_step(rows * self.settings.max_completion_length as f64, false),
            GrpoLossType::Dapo | GrpoLossType::Cispo | GrpoLossType::Vespo => {
                let share = if batch.is_training { steps / batch.steps_per_generation as f64 } else { 1.0 };
                let tokens = batch.num_items_in_batch.max(1) as f64 / batch.num_processes as f64 * share;
                Normaliser { factor: 1.0 / tokens, is_row_mean: false, accumulation: 1.0, accumulation_of_bonus: steps }
            }
        }
    }

    fn tokens(&self) -> f64 {
        self.mask.iter().filter(|&&m| m).count() as f64
    }

    /// `logprob - old_logprob`.
    fn log_ratio(&self, token: usize) -> f64 {
        self.inputs.old_logprobs.map_or(0.0, |old| f64::from(self.inputs.logprobs[token]) - f64::from(old[token]))
    }

    /// The loss of one row, its gradient added to `d_logprobs`.
    fn row(&self, row: usize, normaliser: &Normaliser, d_logprobs: &mut [f32], tally: &mut Tally) -> f64 {
        let (inputs, settings) = (self.inputs, self.settings);
        let tokens: Vec<usize> = self.rows.range(row).filter(|&t| self.mask[t]).collect();
        let count = tokens.len() as f64;
        let advantage = f64::from(inputs.advantages[row]);
        let is_sequence_level = settings.importance_sampling_level == ImportanceSamplingLevel::Sequence;
        let row_ratio = (tokens.iter().map(|&t| self.log_ratio(t)).sum::<f64>() / count.max(1.0)).exp();
        let keep = self.keep_row(&tokens, advantage);
        let is_vespo = settings.loss_type == GrpoLossType::Vespo;
        let phi = if is_vespo { self.vespo_weight(row, &tokens, advantage) } else { 1.0 };
        let factor = if normaliser.is_row_mean { normaliser.factor / count.max(1.0) } else { normaliser.factor };

        let (mut sum, mut by_row_ratio) = (0.0, 0.0);
        let (mut low, mut high) = (0.0, 0.0);
        let mut gradients = Vec::with_capacity(tokens.len());
        for &token in &tokens {
            let logprob = f64::from(inputs.logprobs[token]);
            let ratio = if is_sequence_level { row_ratio } else { self.log_ratio(token).exp() };
            let weight = keep * share(self.attended[token]) * self.correction(row, token);
            let term = policy_term(settings, ratio, advantage, logprob, phi).times(weight);
            let kl = self.kl(token, logprob, ratio);
            sum += term.value + kl.value;
            // d ratio = ratio d(log ratio), and d(log ratio) is 1 for the token, 1/count for each token of the row.
            let by_log_ratio = (term.by_ratio + kl.by_ratio) * ratio;
            gradients.push(term.by_logprob + kl.by_logprob + if is_sequence_level { 0.0 } else { by_log_ratio });
            by_row_ratio += by_log_ratio;
            if settings.beta != 0.0 {
                tally.kl += kl.value / settings.beta;
            }
            let (is_low, is_high) = self.is_clipped(ratio, advantage);
            low += share(is_low);
            high += share(is_high);
        }
        let spread = if is_sequence_level { by_row_ratio / count.max(1.0) } else { 0.0 };
        for (&token, gradient) in tokens.iter().zip(gradients) {
            d_logprobs[token] = (factor * (gradient + spread)) as f32;
        }
        if is_sequence_level {
            // One ratio per row: the row as a whole is clipped or not, also where it has no token.
            let (is_low, is_high) = self.is_clipped(row_ratio, advantage);
            (low, high) = (share(is_low), share(is_high));
        }
        tally.phi += phi;
        tally.low.push(low);
        tally.high.push(high);
        tally.tokens.push(if is_sequence_level { 1.0 } else { count });
        factor * sum
    }

    /// 0 for a row that the off-policy mask leaves out (DeepSeek-V3.2, 2512.02556), else 1.
    fn keep_row(&self, tokens: &[usize], advantage: f64) -> f64 {
        let Some(threshold) = self.settings.off_policy_mask_threshold else { return 1.0 };
        let sampled = self.inputs.sampling_logprobs.or(self.inputs.old_logprobs).unwrap_or(self.inputs.logprobs);
        let drift: f64 = tokens.iter().map(|&t| f64::from(sampled[t]) - f64::from(self.inputs.logprobs[t])).sum();
        let is_near = drift / (tokens.len() as f64).max(1.0) <= threshold;
        share(advantage >= 0.0 || is_near)
    }

    /// Ratio between trainer and rollout on the policy term; VESPO has it in its weight instead.
    fn correction(&self, row: usize, token: usize) -> f64 {
        match self.inputs.importance_ratio {
            _ if self.settings.loss_type == GrpoLossType::Vespo => 1.0,
            None => 1.0,
            Some(ImportanceRatio::Token(ratios)) => f64::from(ratios[token]),
            Some(ImportanceRatio::Sequence(ratios)) => f64::from(ratios[row]),
        }
    }

    fn vespo_weight(&self, row: usize, tokens: &[usize], advantage: f64) -> f64 {
        let correction: &[f32] = match self.inputs.importance_ratio {
            None => &[],
            Some(ImportanceRatio::Token(ratios)) => &ratios[self.rows.range(row)],
            Some(ImportanceRatio::Sequence(ratios)) => &ratios[row..=row],
        };
        let log_ratios = tokens.iter().map(|&t| self.log_ratio(t));
        vespo_weight(&self.settings.vespo, advantage, log_ratios, correction.iter().map(|&r| f64::from(r)))
    }

    /// `beta * kl` of a token with its slopes.
    fn kl(&self, token: usize, logprob: f64, ratio: f64) -> PolicyTerm {
        let beta = self.settings.beta;
        let Some(reference) = self.inputs.ref_logprobs.filter(|_| beta != 0.0) else { return PolicyTerm::default() };
        let reference = f64::from(reference[token]);
        let (value, slope) = (beta * k3(logprob, reference), beta * k3_slope(logprob, reference));
        if self.settings.use_bias_correction_kl {
            PolicyTerm { value: value * ratio, by_ratio: value, by_logprob: slope * ratio }
        } else {
            PolicyTerm { value, by_ratio: 0.0, by_logprob: slope }
        }
    }

    /// Whether the ratio is below or above the clip range on the side where the clip acts. `delta` comes first.
    fn is_clipped(&self, ratio: f64, advantage: f64) -> (bool, bool) {
        let settings = self.settings;
        match settings.loss_type {
            GrpoLossType::Sapo | GrpoLossType::Vespo => (false, false),
            GrpoLossType::Cispo => (false, ratio > settings.epsilon_high && advantage > 0.0),
            _ => {
                let ratio = ratio.min(settings.delta.unwrap_or(f64::INFINITY));
                let is_low = ratio < 1.0 - settings.epsilon && advantage < 0.0;
                (is_low, ratio > 1.0 + settings.epsilon_high && advantage > 0.0)
            }
        }
    }

    /// Sum of the entropies of the attended tokens, and how many there are.
    fn attended_entropy(&self) -> (f64, f64) {
        let entropies = self.inputs.entropies.unwrap_or(&[]);
        let attended = entropies.iter().zip(&self.attended).filter(|(_, is_attended)| **is_attended);
        attended.fold((0.0, 0.0), |(sum, count), (&entropy, _)| (sum + f64::from(entropy), count + 1.0))
    }

    /// Mean entropy of the attended tokens over `accumulation`, and its gradient times minus the coefficient.
    fn entropy_bonus(&self, accumulation: f64) -> (f64, Vec<f32>) {
        let (sum, count) = self.attended_entropy();
        let divisor = count.max(1.0) * accumulation;
        let slope = (-self.settings.entropy_coef / divisor) as f32;
        (sum / divisor, self.attended.iter().map(|&is_attended| if is_attended { slope } else { 0.0 }).collect())
    }

    fn report(&self, tally: &Tally, metrics: &mut Metrics) {
        let (tokens, rows) = (self.tokens(), self.rows.count() as f64);
        let units = match self.settings.importance_sampling_level {
            ImportanceSamplingLevel::Token => tokens,
            ImportanceSamplingLevel::Sequence => rows,
        };
        if self.settings.beta != 0.0 {
            metrics.mean("kl", tally.kl, tokens);
        }
        if let Some(entropies) = self.inputs.entropies {
            let sum = entropies.iter().zip(&self.mask).filter(|(_, m)| **m).map(|(&e, _)| f64::from(e)).sum();
            metrics.mean("entropy", sum, tokens);
        }
        let (low, high) = (tally.low.iter().sum::<f64>(), tally.high.iter().sum::<f64>());
        match self.settings.loss_type {
            GrpoLossType::Sapo => {}
            GrpoLossType::Cispo => metrics.mean("cispo_clip_ratio", high, units),
            GrpoLossType::Vespo => metrics.mean("vespo/phi_seq_mean", tally.phi, rows),
            _ => {
                metrics.mean("clip_ratio/low_mean", low, units);
                metrics.mean("clip_ratio/high_mean", high, units);
                metrics.mean("clip_ratio/region_mean", low + high, units);
                // A row without tokens is 0/0 and is left out.
                let shares = |counts: &[f64]| -> Vec<f64> {
                    counts.iter().zip(&tally.tokens).map(|(clipped, tokens)| clipped / tokens).collect()
                };
                metrics.min("clip_ratio/low_min", shares(&tally.low));
                metrics.max("clip_ratio/high_max", shares(&tally.high));
            }
        }
    }
}

/// 1 for true, 0 for false.
fn share(is_so: bool) -> f64 {
    f64::from(u8::from(is_so))
}

/// The tokens whose entropy is high enough; all unmasked ones where the setting is off.
fn attended(inputs: &GrpoInputs<'_>, settings: &GrpoLossSettings, mask: &[bool]) -> Vec<bool> {
    let Some(entropies) = inputs.entropies.filter(|_| settings.top_entropy_quantile < 1.0) else {
        return mask.to_vec();
    };
    let own = || {
        let unmasked = entropies.iter().zip(mask).filter(|(_, m)| **m).map(|(&entropy, _)| entropy);
        entropy_threshold(unmasked, settings.top_entropy_quantile)
    };
    let Some(threshold) = inputs.entropy_threshold.or_else(own) else { return mask.to_vec() };
    entropies.iter().zip(mask).map(|(&entropy, &m)| m && entropy >= threshold).collect()
}

#[cfg(test)]
#[path = "grpo_tests.rs"]
pub(super) mod tests;
