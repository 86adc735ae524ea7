//! Which tokens have high entropy, and how strongly entropy is rewarded.
//!
//! "Beyond the 80/20 Rule" (2506.01939): the policy loss looks at the tokens with the highest entropy only. The
//! threshold is a quantile over the tokens of all ranks, so the loop may gather the entropies first and hand the
//! threshold to the loss.

use serde::{Deserialize, Serialize};

use crate::config::settings::AdaptiveEntropy;

/// The entropy from which on a token belongs to the top share `top_quantile` of `entropies` (masked tokens left out).
/// `None` without any token. The order of `entropies` does not matter.
///
/// Linear interpolation between neighbours in f32, as `torch.quantile(entropies, 1 - top_quantile)`: a token exactly
/// at the threshold must fall on the same side.
pub fn entropy_threshold(entropies: impl IntoIterator<Item = f32>, top_quantile: f64) -> Option<f32> {
    let mut sorted: Vec<f32> = entropies.into_iter().collect();
    if sorted.is_empty() {
        return None;
    }
    sorted.sort_unstable_by(f32::total_cmp);
    let rank = (1.0 - top_quantile) as f32 * (sorted.len() - 1) as f32;
    let below = (rank.max(0.0) as usize).min(sorted.len() - 1);
    let above = (rank.ceil().max(0.0) as usize).min(sorted.len() - 1);
    let weight = rank - below as f32;
    let (start, end) = (sorted[below], sorted[above]);
    Some(if weight < 0.5 { start + weight * (end - start) } else { end - (end - start) * (1.0 - weight) })
}

/// The weight of the entropy bonus where it follows the policy's entropy; its state is part of a checkpoint.
///
/// # Equation
/// Skywork-OR1 (He et al., 2505.22312), sec. 3.2.4, as TRL's `GRPOTrainer` has it: a step applies the weight that the step
/// before left, and only if that step's mean entropy was at most the target; then the weight grows by `coef_delta` if its own
/// mean is at most the target, else it shrinks by as much, within its bounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct EntropyControl {
    coef: f64,
    /// Mean entropy of the last step, in nats; `None` before the first.
    last_entropy: Option<f64>,
}

impl EntropyControl {
    /// Before the first step.
    pub fn new(coef: f64) -> Self {
        Self { coef, last_entropy: None }
    }

    /// The weight as it is now.
    pub fn coef(&self) -> f64 {
        self.coef
    }

    /// The weight that the next step applies.
    pub fn applied(&self, settings: &AdaptiveEntropy) -> f64 {
        if self.last_entropy.is_some_and(|entropy| entropy <= settings.target) { self.coef } else { 0.0 }
    }

    /// After a step whose attended tokens, `count` over all micro-batches and ranks, had the entropies that sum to `sum`.
    pub fn update(&mut self, settings: &AdaptiveEntropy, (sum, count): (f64, f64)) {
        let entropy = sum / count.max(1.0);
        self.coef = if entropy <= settings.target {
            (self.coef + settings.coef_delta).min(settings.coef_max)
        } else {
            (self.coef - settings.coef_delta).max(settings.coef_min)
        };
        self.last_entropy = Some(entropy);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_weight_follows_the_entropy_within_its_bounds_and_acts_one_step_later() {
        let settings = AdaptiveEntropy { coef_min: 0.01, coef_max: 0.02, coef_delta: 0.005, target: 0.5 };
        let mut control = EntropyControl::new(0.012);
        let mut seen = vec![(control.applied(&settings), control.coef())];
        for step in [(4.0, 10.0), (5.0, 10.0), (3.0, 10.0), (6.0, 10.0), (7.0, 10.0), (0.0, 0.0)] {
            control.update(&settings, step);
            seen.push((control.applied(&settings), control.coef()));
        }
        let expected =
            [(0.0, 0.012), (0.017, 0.017), (0.02, 0.02), (0.02, 0.02), (0.0, 0.015), (0.0, 0.01), (0.015, 0.015)];
        for ((applied, coef), (want_applied, want)) in seen.into_iter().zip(expected) {
            assert!((applied - want_applied).abs() < 1e-12 && (coef - want).abs() < 1e-12, "{applied} {coef} {want}");
        }
        let text = serde_json::to_string(&control).unwrap();
        assert_eq!(serde_json::from_str::<EntropyControl>(&text).unwrap(), control);
    }

    #[test]
    fn the_threshold_interpolates_between_neighbours() {
        let values = [3.0f32, 0.0, 1.0, 2.0, 4.0];
        for (top, expected) in [(1.0, 0.0), (0.2, 3.2), (0.5, 2.0), (0.1, 3.6), (0.0, 4.0)] {
            let threshold = entropy_threshold(values, top).unwrap();
            assert!((threshold - expected).abs() < 1e-6, "{top}: {threshold}");
        }
        assert_eq!(entropy_threshold([], 0.5), None);
        assert_eq!(entropy_threshold([7.0], 0.5), Some(7.0));
    }
}
