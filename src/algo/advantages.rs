//! Rewards into advantages.
//!
//! Called once per generation batch with the rewards of **all** ranks, because groups and the batch statistics may
//! span them; each rank then keeps its own stretch of the result.

use std::collections::BTreeMap;

use super::Error;
use super::rows::length;
use crate::config::settings::{RewardAggregation, ScaleRewards};

const OPERATION: &str = "advantages";
/// Added to a standard deviation before dividing by it.
const STD_EPS: f64 = 1e-4;
/// A standard deviation up to this counts as zero in `frac_reward_zero_std`.
const ZERO_STD: f64 = 1e-8;

/// Rewards of a generation batch.
#[derive(Clone, Copy, Debug)]
pub struct AdvantageInputs<'a> {
    /// Rewards f64 `[N, F]`, row by row; NaN where a function gave none. Groups are contiguous.
    pub rewards: &'a [f64],
    /// One weight per reward function, `[F]`.
    pub weights: &'a [f64],
    /// Completions per prompt, `G`.
    pub group_size: usize,
    /// How several rewards become one advantage.
    pub aggregation: RewardAggregation,
    /// What the centred reward is divided by; read by `sum_then_normalize` only.
    pub scale: ScaleRewards,
}

/// Advantages and the statistics that are logged with them.
#[derive(Clone, Debug, PartialEq)]
pub struct AdvantageOutput {
    /// One per completion, f32 `[N]`; 0 for a completion that no function scored.
    pub advantages: Vec<f32>,
    /// Weighted sum per completion, `[N]`; NaN for one that no function scored.
    pub rewards: Vec<f64>,
    /// Mean of each function over the completions it scored, `[F]`.
    pub function_mean: Vec<f64>,
    /// Unbiased standard deviation of the same, `[F]`; NaN with fewer than two.
    pub function_std: Vec<f64>,
    /// Mean of `rewards`.
    pub reward: f64,
    /// Unbiased standard deviation of `rewards` over the whole batch.
    pub reward_std: f64,
    /// Share of completions whose standard deviation (of the group or of the batch, as `scale` says) is zero.
    pub frac_reward_zero_std: f64,
}

impl AdvantageOutput {
    /// The metrics under TRL's names; `names` are those of the reward functions.
    pub fn metrics(&self, names: &[impl AsRef<str>]) -> BTreeMap<String, f64> {
        let mut metrics = BTreeMap::from([
            ("reward".to_owned(), self.reward),
            ("reward_std".to_owned(), self.reward_std),
            ("frac_reward_zero_std".to_owned(), self.frac_reward_zero_std),
        ]);
        for ((name, &mean), &std) in names.iter().zip(&self.function_mean).zip(&self.function_std) {
            metrics.insert(format!("rewards/{}/mean", name.as_ref()), mean);
            metrics.insert(format!("rewards/{}/std", name.as_ref()), std);
        }
        metrics
    }
}

/// Group-relative advantages.
///
/// # Shapes
/// See [`AdvantageInputs`] and [`AdvantageOutput`].
/// # Errors
/// If the rewards are not `[N, F]` with whole groups.
/// # Equation
/// `sum_then_normalize`: `R = sum_f w_f r_f`, `A = (R - mean(R)) / (std(R) + 1e-4)` within the group (DeepSeekMath
/// 2402.03300 sec. 4.1.2), with the standard deviation of the batch, or without it (Dr. GRPO, 2503.20783).
/// `normalize_then_sum` (GDPO): each function is normalised within its group, the weighted sum over the batch.
/// All means and (unbiased) standard deviations leave out rewards that are NaN.
pub fn advantages(inputs: &AdvantageInputs<'_>) -> Result<AdvantageOutput, Error> {
    let AdvantageInputs { rewards, weights, group_size, aggregation, scale } = *inputs;
    let functions = weights.len();
    let value =
        |what, value: usize| Error::Value { operation: OPERATION, what, value: value as f64, expected: "1 or more" };
    if functions == 0 {
        return Err(value("reward functions", 0));
    }
    if group_size == 0 {
        return Err(value("group_size", 0));
    }
    if rewards.is_empty() {
        return Err(value("completions", 0));
    }
    length(OPERATION, "rewards", rewards.len(), rewards.len() / functions * functions)?;
    let count = rewards.len() / functions;
    length(OPERATION, "rewards (completions)", count, count / group_size * group_size)?;

    let totals = weighted_sums(rewards, weights);
    let (centred, deviations) = match aggregation {
        RewardAggregation::SumThenNormalize => {
            let groups: Vec<Moments> = totals.chunks(group_size).map(Moments::of).collect();
            let batch = Moments::of(&totals);
            let centred: Vec<f64> =
                totals.iter().enumerate().map(|(i, total)| total - groups[i / group_size].mean).collect();
            let deviations: Vec<f64> = (0..count)
                .map(|i| match scale {
                    ScaleRewards::Group | ScaleRewards::None => groups[i / group_size].std_or_zero(group_size),
                    ScaleRewards::Batch => batch.std_or_zero(count),
                })
                .collect();
            (centred, deviations)
        }
        RewardAggregation::NormalizeThenSum => {
            let normalised = normalise_within_groups(rewards, functions, group_size);
            // A completion that some function scored counts, with 0 where that function scored no other of its group.
            let is_scored = totals.iter().map(|total| !total.is_nan());
            let sums: Vec<f64> = (weighted_sums(&normalised, weights).into_iter().zip(is_scored))
                .map(|(sum, is_scored)| if sum.is_nan() && is_scored { 0.0 } else { sum })
                .collect();
            let batch = Moments::of(&sums);
            (sums.iter().map(|sum| sum - batch.mean).collect(), vec![batch.std_or_zero(count); count])
        }
    };
    let is_scaled = aggregation == RewardAggregation::NormalizeThenSum || scale != ScaleRewards::None;
    let advantages = centred
        .iter()
        .zip(&deviations)
        .map(|(centred, std)| if is_scaled { centred / (std + STD_EPS) } else { *centred })
        .map(|advantage| if advantage.is_nan() { 0.0 } else { advantage as f32 })
        .collect();
    let per_function: Vec<Moments> = (0..functions)
        .map(|f| Moments::of(&rewards.iter().skip(f).step_by(functions).copied().collect::<Vec<_>>()))
        .collect();
    let batch = Moments::of(&totals);
    let zeros = deviations.iter().filter(|std| std.abs() <= ZERO_STD).count();
    Ok(AdvantageOutput {
        advantages,
        rewards: totals,
        function_mean: per_function.iter().map(|m| m.mean).collect(),
        function_std: per_function.iter().map(|m| m.std).collect(),
        reward: batch.mean,
        reward_std: batch.std,
        frac_reward_zero_std: zeros as f64 / count as f64,
    })
}

/// Mean and unbiased standard deviation of the values that are not NaN; NaN where there are too few.
#[derive(Clone, Copy)]
struct Moments {
    mean: f64,
    std: f64,
}

impl Moments {
    fn of(values: &[f64]) -> Self {
        let known = || values.iter().filter(|v| !v.is_nan());
        let count = known().count() as f64;
        let mean = known().sum::<f64>() / count;
        let squares: f64 = known().map(|v| (v - mean).powi(2)).sum();
        let std = if count > 1.0 { (squares / (count - 1.0)).sqrt() } else { f64::NAN };
        Self { mean, std }
    }

    /// The deviation among `size` places; 0 where there is only one place, as in evaluation with one completion.
    fn std_or_zero(self, size: usize) -> f64 {
        if size > 1 { self.std } else { 0.0 }
    }
}

/// Weighted sum over the functions of each completion, NaN left out; NaN where every function gave none.
fn weighted_sums(rewards: &[f64], weights: &[f64]) -> Vec<f64> {
    rewards
        .chunks(weights.len())
        .map(|row| {
            if row.iter().all(|r| r.is_nan()) {
                return f64::NAN;
            }
            row.iter().zip(weights).map(|(r, w)| r * w).filter(|product| !product.is_nan()).sum()
        })
        .collect()
}

/// Each function's rewards centred and divided by their deviation within each group.
fn normalise_within_groups(rewards: &[f64], functions: usize, group_size: usize) -> Vec<f64> {
    let mut normalised = rewards.to_vec();
    for group in normalised.chunks_mut(group_size * functions) {
        for function in 0..functions {
            let values: Vec<f64> = group.iter().skip(function).step_by(functions).copied().collect();
            let moments = Moments::of(&values);
            let std = moments.std_or_zero(group_size);
            for value in group.iter_mut().skip(function).step_by(functions) {
                *value = (*value - moments.mean) / (std + STD_EPS);
            }
        }
    }
    normalised
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs<'a>(rewards: &'a [f64], weights: &'a [f64], group_size: usize) -> AdvantageInputs<'a> {
        AdvantageInputs {
            rewards,
            weights,
            group_size,
            aggregation: RewardAggregation::SumThenNormalize,
            scale: ScaleRewards::Group,
        }
    }

    #[test]
    fn a_group_of_two_is_centred_and_divided_by_its_unbiased_deviation() {
        let output = advantages(&inputs(&[0.0, 1.0, 3.0, 3.0], &[1.0], 2)).unwrap();
        let expected = 0.5 / (0.5f64.sqrt() + 1e-4);
        let expected = [-expected as f32, expected as f32, 0.0, 0.0];
        assert_eq!(output.advantages, expected);
        assert!((output.frac_reward_zero_std - 0.5).abs() < 1e-12);
        assert!((output.reward - 1.75).abs() < 1e-12);
        let metrics = output.metrics(&["accuracy"]);
        let names: Vec<_> = metrics.keys().map(String::as_str).collect();
        let known = ["frac_reward_zero_std", "reward", "reward_std", "rewards/accuracy/mean", "rewards/accuracy/std"];
        assert_eq!(names, known);
    }

    #[test]
    fn a_completion_without_any_reward_moves_nothing_and_biases_nobody() {
        let nan = f64::NAN;
        for aggregation in [RewardAggregation::SumThenNormalize, RewardAggregation::NormalizeThenSum] {
            for scale in [ScaleRewards::Group, ScaleRewards::Batch, ScaleRewards::None] {
                let with = [1.0, nan, nan, nan, 2.0, 5.0];
                let output =
                    advantages(&AdvantageInputs { aggregation, scale, ..inputs(&with, &[1.0, 0.5], 3) }).unwrap();
                assert!(output.advantages[1].abs() < 1e-12);
                assert!(output.rewards[1].is_nan());
                assert!((output.reward - 2.75).abs() < 1e-12);
                assert!(output.advantages[0] < 0.0 && output.advantages[2] > 0.0, "{aggregation} {scale}");
            }
        }
    }

    #[test]
    fn advantages_do_not_change_when_rewards_are_shifted_and_groups_sum_to_zero() {
        let rewards = [0.25, 1.0, -2.0, 0.5, 7.0, 7.5];
        let shifted: Vec<f64> = rewards.iter().map(|r| r + 4.0).collect();
        let plain = advantages(&inputs(&rewards, &[1.0], 3)).unwrap().advantages;
        let moved = advantages(&inputs(&shifted, &[1.0], 3)).unwrap().advantages;
        assert!(plain.iter().zip(&moved).all(|(l, r)| (l - r).abs() < 1e-6));
        assert!(plain.chunks(3).all(|group| group.iter().sum::<f32>().abs() < 1e-6));
    }

    #[test]
    fn one_completion_per_prompt_gives_zero_and_broken_groups_are_refused() {
        let output = advantages(&inputs(&[1.0, 2.0], &[1.0], 1)).unwrap();
        assert_eq!(output.advantages, [0.0, 0.0]);
        assert!((output.frac_reward_zero_std - 1.0).abs() < 1e-12);
        assert!(advantages(&inputs(&[1.0, 2.0, 3.0], &[1.0], 2)).is_err());
        assert!(advantages(&inputs(&[1.0, 2.0, 3.0], &[1.0, 1.0], 1)).is_err());
        assert!(advantages(&inputs(&[], &[1.0], 2)).is_err());
        assert!(advantages(&inputs(&[1.0], &[], 1)).is_err());
        assert!(advantages(&inputs(&[1.0], &[1.0], 0)).is_err());
    }
}
