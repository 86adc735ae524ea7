//! The policy term of one token: its value and its two slopes.
//!
//! Every policy loss is a function of the importance ratio `r` (of the token or of its row) and of the token's
//! log-probability. The loss joins the slopes by the chain rule: `dr/dlogprob` is `r` at token level, `r m_t / L` at
//! sequence level.

use super::grpo_inputs::GrpoLossSettings;
use crate::config::settings::{GrpoLossType, VespoSettings};

/// Smallest weight that VESPO distinguishes, and the largest logarithm.
const VESPO_LOG_WEIGHT: (f64, f64) = (-18.420_680_743_952_367, 20.0); // ln(1e-8)
const VESPO_MIN_LAMBDA: f64 = 1e-4;

/// Value and slopes of a policy term.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct PolicyTerm {
    pub(super) value: f64,
    /// Derivative with respect to the importance ratio.
    pub(super) by_ratio: f64,
    /// Derivative with respect to the log-probability with the ratio held fixed.
    pub(super) by_logprob: f64,
}

impl PolicyTerm {
    /// The term with a constant factor; nothing at all for a factor of 0, whatever the term.
    pub(super) fn times(self, factor: f64) -> Self {
        if factor == 0.0 {
            return Self::default();
        }
        Self { value: factor * self.value, by_ratio: factor * self.by_ratio, by_logprob: factor * self.by_logprob }
    }
}

/// The policy term of a token; `phi` is the row's VESPO weight.
pub(super) fn policy_term(
    settings: &GrpoLossSettings,
    ratio: f64,
    advantage: f64,
    logprob: f64,
    phi: f64,
) -> PolicyTerm {
    match settings.loss_type {
        GrpoLossType::Grpo | GrpoLossType::Bnpo | GrpoLossType::DrGrpo | GrpoLossType::Dapo | GrpoLossType::Luspo => {
            clipped(settings, ratio, advantage)
        }
        GrpoLossType::Cispo => weighted(ratio.min(settings.epsilon_high), advantage, logprob),
        GrpoLossType::Vespo => weighted(phi, advantage, logprob),
        GrpoLossType::Sapo => soft(settings, ratio, advantage),
    }
}

/// `-min(min(r, delta) A, clamp(r, 1 - eps, 1 + eps_high) A)`.
/// PPO (1707.06347) eq. 7; an upper range of its own as DAPO (2503.14476) sec. 3.1; `delta` bounds it on the other side as
/// well, as INTELLECT-2 (2505.07291).
fn clipped(settings: &GrpoLossSettings, ratio: f64, advantage: f64) -> PolicyTerm {
    let (low, high) = (1.0 - settings.epsilon, 1.0 + settings.epsilon_high);
    let cap = settings.delta.unwrap_or(f64::INFINITY);
    let (free, bounded) = (ratio.min(cap) * advantage, ratio.clamp(low, high) * advantage);
    let slope = |is_free: bool| if is_free { -advantage } else { 0.0 };
    let (free_slope, bounded_slope) = (slope(ratio <= cap), slope((low..=high).contains(&ratio)));
    let (value, by_ratio) = if free < bounded {
        (free, free_slope)
    } else if bounded < free {
        (bounded, bounded_slope)
    } else {
        // A tie inside the clip range, where both slopes are the same; at its edges torch takes the mean as well.
        (free, 0.5 * (free_slope + bounded_slope))
    };
    PolicyTerm { value: -value, by_ratio, by_logprob: 0.0 }
}

/// `-w A logprob` with a weight that passes no gradient: CISPO (MiniMax-M1, 2506.13585) and VESPO.
fn weighted(weight: f64, advantage: f64, logprob: f64) -> PolicyTerm {
    let by_logprob = -weight * advantage;
    PolicyTerm { value: by_logprob * logprob, by_ratio: 0.0, by_logprob }
}

/// `-A 4/tau sigmoid(tau (r - 1))`: SAPO's soft gate in place of a clip range.
fn soft(settings: &GrpoLossSettings, ratio: f64, advantage: f64) -> PolicyTerm {
    let temperature = if advantage > 0.0 { settings.sapo_temperature_pos } else { settings.sapo_temperature_neg };
    let gate = 1.0 / (1.0 + (-temperature * (ratio - 1.0)).exp());
    PolicyTerm {
        value: -advantage * 4.0 / temperature * gate,
        by_ratio: -advantage * 4.0 * gate * (1.0 - gate),
        by_logprob: 0.0,
    }
}

/// VESPO's weight of a row, `phi(w) = exp(lambda + k ln w - lambda w)`, which is 1 at `w = 1`.
///
/// `log_ratios` are `logprob - old_logprob` of the row's unmasked tokens; `correction` the importance ratios between
/// trainer and rollout of all its tokens, whose logarithms are added without a mask.
pub(super) fn vespo_weight(
    settings: &VespoSettings,
    advantage: f64,
    log_ratios: impl Iterator<Item = f64>,
    correction: impl Iterator<Item = f64>,
) -> f64 {
    let (low, high) = VESPO_LOG_WEIGHT;
    let ratio: f64 = log_ratios.map(|r| r.clamp(-high, high)).sum();
    let correction: f64 = correction.map(|r| r.ln().clamp(low, high)).sum();
    let log_weight = (ratio + correction).clamp(low, high);
    let (k, lambda) =
        if advantage >= 0.0 { (settings.k_pos, settings.lambda_pos) } else { (settings.k_neg, settings.lambda_neg) };
    let lambda = lambda.max(VESPO_MIN_LAMBDA);
    let phi = (lambda + k * log_weight - lambda * log_weight.exp()).exp();
    // A weight that f32 cannot hold is dropped, as the reference does. A NaN stays one: it is the caller's to find.
    if phi > f64::from(f32::MAX) { 0.0 } else { phi }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::algo::grpo::tests::settings;

    fn slope_by_differences(settings: &GrpoLossSettings, ratio: f64, advantage: f64) -> f64 {
        let h = 1e-6;
        let value = |r| policy_term(settings, r, advantage, -1.0, 1.0).value;
        (value(ratio + h) - value(ratio - h)) / (2.0 * h)
    }

    #[test]
    fn slopes_by_ratio_are_derivatives_on_every_side_of_every_bound() {
        for loss_type in [GrpoLossType::Grpo, GrpoLossType::Sapo] {
            for delta in [None, Some(1.1), Some(3.0)] {
                let settings = GrpoLossSettings { loss_type, delta, epsilon_high: 0.28, ..settings() };
                for advantage in [-1.5, 0.0, 0.7] {
                    for ratio in [0.3, 0.79, 0.81, 1.0, 1.05, 1.15, 1.27, 1.29, 2.9, 3.1] {
                        let term = policy_term(&settings, ratio, advantage, -1.0, 1.0);
                        let expected = slope_by_differences(&settings, ratio, advantage);
                        assert!((term.by_ratio - expected).abs() < 1e-6, "{loss_type} {delta:?} {advantage} {ratio}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_weights_of_cispo_and_vespo_pass_no_gradient() {
        for (loss_type, weight) in [(GrpoLossType::Cispo, 2.0), (GrpoLossType::Vespo, 0.3)] {
            let settings = GrpoLossSettings { loss_type, epsilon_high: 2.0, ..settings() };
            let term = policy_term(&settings, 2.5, 0.5, -3.0, 0.3);
            assert_eq!(term, PolicyTerm { value: weight * 1.5, by_ratio: 0.0, by_logprob: -weight * 0.5 });
        }
    }

    #[test]
    fn vespo_weighs_on_policy_rows_by_one_and_drops_hopeless_ones() {
        let vespo = settings().vespo;
        for advantage in [-1.0, 1.0] {
            let weight = |ratios: &[f64]| vespo_weight(&vespo, advantage, ratios.iter().copied(), std::iter::empty());
            assert!((weight(&[0.0, 0.0]) - 1.0).abs() < 1e-12);
            assert!(weight(&[50.0]) < 1e-12 && weight(&[-50.0]) < 1e-12);
        }
        let corrected = vespo_weight(&vespo, 1.0, [0.2].into_iter(), [0.5f64, 1.0].into_iter());
        let joined = vespo_weight(&vespo, 1.0, [0.2 + 0.5f64.ln()].into_iter(), std::iter::empty());
        assert!((corrected - joined).abs() < 1e-12);
    }
}
