//! Correction of the mismatch between the rollout engine's and the trainer's log-probabilities.
//!
//! The rollout samples from slightly other numbers than the trainer computes (quantised cache, other kernels). The
//! ratio of the two, bounded, multiplies the policy term. Called once per generation batch.

use std::ops::Range;

use super::rows::Rows;
use super::{Error, ImportanceRatio, Metrics};
use crate::config::settings::{RolloutCorrection, RolloutCorrectionMode};

const OPERATION: &str = "rollout correction";

/// The ratios of a batch and what is logged about them.
#[derive(Clone, Debug, PartialEq)]
pub struct RolloutCorrectionOutput {
    ratios: Vec<f32>,
    is_sequence_level: bool,
    /// `sampling/...` metrics under TRL's names.
    pub metrics: Metrics,
}

impl RolloutCorrectionOutput {
    /// All ratios: f32 `[N]` in the token modes, `[B]` in the sequence modes.
    pub fn ratios(&self) -> &[f32] {
        &self.ratios
    }

    /// Whether there is one ratio per row.
    pub fn is_sequence_level(&self) -> bool {
        self.is_sequence_level
    }

    /// The ratios as [`super::grpo_loss`] takes them, for a micro-batch cut out of this batch: the rows `rows`, whose
    /// tokens are `tokens`. `None` where the batch does not have them.
    pub fn importance_ratio(&self, rows: Range<usize>, tokens: Range<usize>) -> Option<ImportanceRatio<'_>> {
        if self.is_sequence_level {
            self.ratios.get(rows).map(ImportanceRatio::Sequence)
        } else {
            self.ratios.get(tokens).map(ImportanceRatio::Token)
        }
    }
}

/// Importance ratios `trainer / rollout`, bounded.
///
/// # Shapes
/// `old_logprobs` (trainer), `sampling_logprobs` (rollout): f32 `[N]`; `mask`, `tool_mask`: u8 `[N]`.
/// # Errors
/// If lengths differ or the bounds contradict each other.
/// # Equation
/// Token modes: `exp(old - sampling)`, 1 for masked tokens; sequence modes: `exp(sum of the differences)`, which is the
/// ratio of the sequences' probabilities (not a mean). Truncation clamps into `[clip_min, clip_max]` (truncated
/// importance sampling); masking sets to 0 what is outside.
pub fn rollout_correction(
    row_starts: &[usize],
    old_logprobs: &[f32],
    sampling_logprobs: &[f32],
    mask: &[u8],
    tool_mask: Option<&[u8]>,
    settings: &RolloutCorrection,
) -> Result<RolloutCorrectionOutput, Error> {
    let rows = Rows::new(OPERATION, row_starts, old_logprobs.len())?;
    rows.tokens("sampling_logprobs", sampling_logprobs)?;
    let mask = rows.mask(mask, tool_mask)?;
    let (low, high) = (settings.clip_min.unwrap_or(f64::NEG_INFINITY), settings.clip_max.unwrap_or(f64::INFINITY));
    if high.is_nan() || low.is_nan() || low > high {
        return Err(Error::Value {
            operation: OPERATION,
            what: "clip_max",
            value: high,
            expected: "a number not less than `clip_min`",
        });
    }
    let (is_sequence_level, is_mask) = match settings.mode {
        RolloutCorrectionMode::TokenTruncate => (false, false),
        RolloutCorrectionMode::TokenMask => (false, true),
        RolloutCorrectionMode::SequenceTruncate => (true, false),
        RolloutCorrectionMode::SequenceMask => (true, true),
    };
    let difference = |token: usize| f64::from(old_logprobs[token]) - f64::from(sampling_logprobs[token]);
    let bound = |log_ratio: f64| {
        let ratio = log_ratio.exp();
        if !is_mask {
            ratio.clamp(low, high)
        } else if ratio < low || ratio > high {
            0.0
        } else {
            ratio
        }
    };
    let ratios: Vec<f64> = if is_sequence_level {
        let log_ratio = |range: Range<usize>| range.filter(|&t| mask[t]).map(difference).sum();
        rows.iter().map(log_ratio).map(bound).collect()
    } else {
        mask.iter().enumerate().map(|(token, &m)| bound(if m { difference(token) } else { 0.0 })).collect()
    };

    let mut metrics = Metrics::default();
    let unmasked: Vec<usize> = (0..mask.len()).filter(|&t| mask[t]).collect();
    let gaps = unmasked.iter().map(|&t| difference(t).abs());
    metrics.mean("sampling/sampling_logp_difference/mean", gaps.clone().sum(), unmasked.len() as f64);
    metrics.max("sampling/sampling_logp_difference/max", or_zero(gaps));
    let logged: Vec<f64> =
        if is_sequence_level { ratios.clone() } else { unmasked.iter().map(|&t| ratios[t]).collect() };
    metrics.mean("sampling/importance_sampling_ratio/mean", logged.iter().sum(), logged.len() as f64);
    metrics.min("sampling/importance_sampling_ratio/min", or_zero(logged.iter().copied()));
    metrics.max("sampling/importance_sampling_ratio/max", or_zero(logged.iter().copied()));
    Ok(RolloutCorrectionOutput { ratios: ratios.into_iter().map(|r| r as f32).collect(), is_sequence_level, metrics })
}

/// The values, or one 0 where there is none.
fn or_zero(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let values: Vec<f64> = values.collect();
    if values.is_empty() { vec![0.0] } else { values }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROWS: [usize; 3] = [0, 3, 5];
    const OLD: [f32; 5] = [-1.0, -1.0, -1.0, -2.0, -2.0];
    const SAMPLING: [f32; 5] = [-1.0, -3.0, -9.0, -1.0, -2.5];
    const MASK: [u8; 5] = [1, 1, 0, 1, 1];

    fn correct(mode: RolloutCorrectionMode, clip_min: Option<f64>) -> RolloutCorrectionOutput {
        let settings = RolloutCorrection { mode, clip_max: Some(3.0), clip_min };
        rollout_correction(&ROWS, &OLD, &SAMPLING, &MASK, None, &settings).unwrap()
    }

    fn assert_close(got: &[f32], expected: &[f64]) {
        assert_eq!(got.len(), expected.len());
        assert!(got.iter().zip(expected).all(|(g, e)| (f64::from(*g) - e).abs() < 1e-6), "{got:?} {expected:?}");
    }

    #[test]
    fn each_mode_bounds_its_ratios_its_way() {
        let (third, half) = ((-1.0f64).exp(), 0.5f64.exp());
        // Token differences: 0, 2, masked, -1, 0.5; row sums 2 and -0.5. The bound is 3, and e^2 is above it.
        assert_close(correct(RolloutCorrectionMode::TokenTruncate, None).ratios(), &[1.0, 3.0, 1.0, third, half]);
        assert_close(correct(RolloutCorrectionMode::TokenMask, None).ratios(), &[1.0, 0.0, 1.0, third, half]);
        assert_close(correct(RolloutCorrectionMode::TokenTruncate, Some(0.5)).ratios(), &[1.0, 3.0, 1.0, 0.5, half]);
        assert_close(correct(RolloutCorrectionMode::TokenMask, Some(0.5)).ratios(), &[1.0, 0.0, 1.0, 0.0, half]);
        let row = (-0.5f64).exp();
        assert_close(correct(RolloutCorrectionMode::SequenceTruncate, None).ratios(), &[3.0, row]);
        assert_close(correct(RolloutCorrectionMode::SequenceMask, None).ratios(), &[0.0, row]);
        let rows = correct(RolloutCorrectionMode::SequenceMask, None);
        let second = rows.importance_ratio(1..2, 3..5);
        assert!(matches!(second, Some(ImportanceRatio::Sequence(ratios)) if ratios.len() == 1 && ratios[0] > 0.0));
        let tokens = correct(RolloutCorrectionMode::TokenMask, None);
        let second = tokens.importance_ratio(1..2, 3..5);
        assert!(matches!(second, Some(ImportanceRatio::Token(ratios)) if ratios.len() == 2));
        assert!(tokens.importance_ratio(1..3, 3..6).is_none());
        assert!(rows.is_sequence_level() && !tokens.is_sequence_level());
    }

    #[test]
    fn metrics_leave_masked_tokens_out() {
        let values = correct(RolloutCorrectionMode::TokenTruncate, None).metrics.values();
        for (name, expected) in [
            ("sampling/sampling_logp_difference/mean", 3.5 / 4.0),
            ("sampling/sampling_logp_difference/max", 2.0),
            ("sampling/importance_sampling_ratio/min", (-1.0f64).exp()),
            ("sampling/importance_sampling_ratio/max", 3.0),
            ("sampling/importance_sampling_ratio/mean", (4.0 + (-1.0f64).exp() + 0.5f64.exp()) / 4.0),
        ] {
            assert!((values[name] - expected).abs() < 1e-6, "{name}: {}", values[name]);
        }
        let settings =
            RolloutCorrection { mode: RolloutCorrectionMode::TokenMask, clip_max: Some(3.0), clip_min: None };
        let empty = rollout_correction(&ROWS, &OLD, &SAMPLING, &[0; 5], None, &settings).unwrap();
        assert!(empty.metrics.values().values().all(|v| v.abs() < 1e-12));
    }

    #[test]
    fn without_an_upper_bound_only_the_lower_one_acts() {
        for (mode, below) in [(RolloutCorrectionMode::TokenMask, 0.0), (RolloutCorrectionMode::TokenTruncate, 0.5)] {
            let settings = RolloutCorrection { mode, clip_max: None, clip_min: Some(0.5) };
            let ratios = rollout_correction(&ROWS, &OLD, &SAMPLING, &MASK, None, &settings).unwrap();
            assert_close(ratios.ratios(), &[1.0, 2f64.exp(), 1.0, below, 0.5f64.exp()]);
        }
    }

    #[test]
    fn contradicting_bounds_are_refused() {
        let settings =
            RolloutCorrection { mode: RolloutCorrectionMode::TokenMask, clip_max: Some(1.0), clip_min: Some(2.0) };
        assert!(rollout_correction(&ROWS, &OLD, &SAMPLING, &MASK, None, &settings).is_err());
    }
}
