//! Supervised losses from the log-probabilities of the target tokens.
//!
//! Called by `train/sft` once per micro-batch, after the head has computed the log-probability of each target.

use super::rows::length;
use super::{Error, Metrics};
use crate::config::settings::SftLossType;

const OPERATION: &str = "SFT loss";

/// One micro-batch. Arrays hold one element per position that has a target.
#[derive(Clone, Copy, Debug)]
pub struct SftInputs<'a> {
    /// Log-probabilities of the targets, f32 `[N]`.
    pub logprobs: &'a [f32],
    /// Mean over the vocabulary of the log-probabilities, f32 `[N]`; needed where labels are smoothed.
    pub mean_logprobs: Option<&'a [f32]>,
    /// 1 for targets that count, u8 `[N]`; `None` counts all.
    pub mask: Option<&'a [u8]>,
    /// Entropies at each position in nats, f32 `[N]`, for the metric.
    pub entropies: Option<&'a [f32]>,
    /// Whether the target is the likeliest token, `[N]`, for the metric.
    pub is_correct: Option<&'a [bool]>,
    /// Unmasked targets of all micro-batches of this optimizer step, over all ranks.
    pub num_items_in_batch: usize,
    /// Ranks over which gradients are averaged.
    pub num_processes: usize,
}

/// The loss of a micro-batch and its gradient.
#[derive(Clone, Debug, PartialEq)]
pub struct SftOutput {
    /// The loss: the step's loss is the sum over its micro-batches (and the mean over ranks).
    pub loss: f64,
    /// d loss / d logprobs, f32 `[N]`.
    pub d_logprobs: Vec<f32>,
    /// d loss / d mean log-probabilities, f32 `[N]`; empty where labels are not smoothed.
    pub d_mean_logprobs: Vec<f32>,
    /// `mean_token_accuracy` and `entropy`, as far as their inputs were given.
    pub metrics: Metrics,
}

/// Cross-entropy, with labels smoothed by `label_smoothing`, or cross-entropy weighted by the token's own probability.
///
/// # Shapes
/// See [`SftInputs`] and [`SftOutput`].
/// # Errors
/// If lengths differ, a mask holds something else than 0 and 1, or a count is 0.
/// # Equation
/// `nll`: `-logprob`; `dft` (2508.05629): `-stop_gradient(exp(logprob)) logprob`. Both are summed and divided by the
/// targets of the **whole** optimizer step, so that cutting a step into micro-batches does not change it; times the
/// number of ranks, because their gradients are averaged. Smoothing by `e` (Szegedy et al., 1512.00567, sec. 7, as
/// transformers' `LabelSmoother`): `-(1 - e) logprob - e mean_logprob`; `dft` has none.
pub fn sft_loss(inputs: &SftInputs<'_>, loss_type: SftLossType, label_smoothing: f64) -> Result<SftOutput, Error> {
    let count = inputs.logprobs.len();
    let means = match (label_smoothing > 0.0, inputs.mean_logprobs) {
        (false, _) => None,
        (true, Some(means)) => Some(means),
        (true, None) => {
            let option = format!("`label_smoothing_factor` = {label_smoothing}");
            return Err(Error::Missing { operation: OPERATION, option, what: "mean_logprobs" });
        }
    };
    for (what, got) in [
        ("mean_logprobs", means.map(<[f32]>::len)),
        ("mask", inputs.mask.map(<[u8]>::len)),
        ("entropies", inputs.entropies.map(<[f32]>::len)),
        ("is_correct", inputs.is_correct.map(<[bool]>::len)),
    ] {
        length(OPERATION, what, got.unwrap_or(count), count)?;
    }
    for (what, value) in [("num_items_in_batch", inputs.num_items_in_batch), ("num_processes", inputs.num_processes)] {
        if value == 0 {
            return Err(Error::Value { operation: OPERATION, what, value: 0.0, expected: "1 or more" });
        }
    }
    if let Some(mask) = inputs.mask
        && let Some(index) = mask.iter().position(|&m| m > 1)
    {
        return Err(Error::Mask { operation: OPERATION, what: "mask", index, value: mask[index] });
    }
    let is_counted = |index: usize| inputs.mask.is_none_or(|mask| mask[index] == 1);
    let factor = inputs.num_processes as f64 / inputs.num_items_in_batch as f64;
    let mut d_logprobs = vec![0.0; count];
    let mut d_mean_logprobs = vec![0.0; means.map_or(0, <[f32]>::len)];
    let (mut sum, mut counted, mut correct, mut entropy) = (0.0, 0.0, 0.0, 0.0);
    for index in (0..count).filter(|&i| is_counted(i)) {
        let logprob = f64::from(inputs.logprobs[index]);
        let weight = match loss_type {
            SftLossType::Nll | SftLossType::ChunkedNll => 1.0 - label_smoothing,
            SftLossType::Dft => logprob.exp(),
        };
        if let Some(means) = means {
            sum -= label_smoothing * f64::from(means[index]);
            d_mean_logprobs[index] = (-label_smoothing * factor) as f32;
        }
        sum -= weight * logprob;
        d_logprobs[index] = (-weight * factor) as f32;
        counted += 1.0;
        correct += f64::from(u8::from(inputs.is_correct.is_some_and(|c| c[index])));
        entropy += inputs.entropies.map_or(0.0, |e| f64::from(e[index]));
    }
    let mut metrics = Metrics::default();
    if inputs.is_correct.is_some() {
        metrics.mean("mean_token_accuracy", correct, counted);
    }
    if inputs.entropies.is_some() {
        metrics.mean("entropy", entropy, counted);
    }
    Ok(SftOutput { loss: sum * factor, d_logprobs, d_mean_logprobs, metrics })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    const LOGPROBS: [f32; 4] = [-0.5, -2.0, -0.1, -4.0];

    fn inputs<'a>(logprobs: &'a [f32], mask: Option<&'a [u8]>) -> SftInputs<'a> {
        SftInputs {
            logprobs,
            mean_logprobs: None,
            mask,
            entropies: None,
            is_correct: None,
            num_items_in_batch: 3,
            num_processes: 1,
        }
    }

    #[test]
    fn cross_entropy_is_the_mean_over_unmasked_targets() {
        for loss_type in [SftLossType::Nll, SftLossType::ChunkedNll] {
            let output = sft_loss(&inputs(&LOGPROBS, Some(&[1, 0, 1, 1])), loss_type, 0.0).unwrap();
            assert!((output.loss - 4.6 / 3.0).abs() < 1e-6);
            let third = -1.0 / 3.0;
            assert_eq!(output.d_logprobs, [third, 0.0, third, third]);
        }
    }

    #[test]
    fn dft_weighs_by_the_probability_and_passes_no_gradient_through_the_weight() {
        let output = sft_loss(&inputs(&LOGPROBS, Some(&[1, 0, 1, 1])), SftLossType::Dft, 0.0).unwrap();
        let expected: f64 = [0.5f64, 0.1, 4.0].iter().map(|l| (-l).exp() * l).sum::<f64>() / 3.0;
        assert!((output.loss - expected).abs() < 1e-6);
        for (gradient, logprob) in output.d_logprobs.iter().zip(LOGPROBS) {
            let weight = -f64::from(logprob).exp() / 3.0;
            assert!(*gradient == 0.0 || (f64::from(*gradient) - weight).abs() < 1e-6);
        }
        assert!(output.d_logprobs[1].abs() < 1e-12);
    }

    #[test]
    fn cutting_a_step_into_micro_batches_or_ranks_changes_nothing() {
        let mut stream = Stream::new(1, "sft", 0, 0);
        let logprobs: Vec<f32> = (0..12).map(|_| -stream.uniform() as f32 * 5.0).collect();
        let whole = SftInputs { num_items_in_batch: 12, ..inputs(&logprobs, None) };
        let whole = sft_loss(&whole, SftLossType::Dft, 0.0).unwrap();
        for ranks in [1, 2] {
            let (mut loss, mut gradient) = (0.0, Vec::new());
            for part in logprobs.chunks(5) {
                let part = SftInputs { num_items_in_batch: 12, num_processes: ranks, ..inputs(part, None) };
                let output = sft_loss(&part, SftLossType::Dft, 0.0).unwrap();
                loss += output.loss / ranks as f64;
                gradient.extend(output.d_logprobs.iter().map(|g| g / ranks as f32));
            }
            assert!((loss - whole.loss).abs() < 1e-12);
            assert!(gradient.iter().zip(&whole.d_logprobs).all(|(l, r)| (l - r).abs() < 1e-9));
        }
    }

    #[test]
    fn smoothed_labels_share_the_loss_between_the_target_and_the_vocabulary() {
        let means = [-3.0f32, -2.5, -4.0, -3.5];
        let smooth = |factor| {
            let inputs = SftInputs { mean_logprobs: Some(&means), ..inputs(&LOGPROBS, Some(&[1, 0, 1, 1])) };
            sft_loss(&inputs, SftLossType::Nll, factor).unwrap()
        };
        let output = smooth(0.1);
        assert!((output.loss - (0.9 * 4.6 + 0.1 * 10.5) / 3.0).abs() < 1e-6);
        assert_eq!(output.d_logprobs, [-0.3, 0.0, -0.3, -0.3]);
        let (share, third) = ((-0.1f64 / 3.0) as f32, (-1.0f64 / 3.0) as f32);
        assert_eq!(output.d_mean_logprobs, [share, 0.0, share, share]);
        assert!(smooth(0.0).d_mean_logprobs.is_empty());
        assert_eq!(smooth(1.0).d_mean_logprobs[0], third);
        assert!(matches!(
            sft_loss(&inputs(&LOGPROBS, None), SftLossType::Nll, 0.1),
            Err(Error::Missing { what: "mean_logprobs", .. })
        ));
    }

    #[test]
    fn metrics_are_means_over_unmasked_targets() {
        let output = sft_loss(
            &SftInputs {
                entropies: Some(&[1.0, 9.0, 2.0, 3.0]),
                is_correct: Some(&[true, true, false, true]),
                ..inputs(&LOGPROBS, Some(&[1, 0, 1, 1]))
            },
            SftLossType::Nll,
            0.0,
        )
        .unwrap();
        let values = output.metrics.values();
        assert!((values["entropy"] - 2.0).abs() < 1e-12);
        assert!((values["mean_token_accuracy"] - 2.0 / 3.0).abs() < 1e-12);
    }

    #[test]
    fn inputs_that_do_not_fit_are_refused() {
        assert!(sft_loss(&inputs(&LOGPROBS, Some(&[1, 1])), SftLossType::Nll, 0.0).is_err());
        assert!(sft_loss(&inputs(&LOGPROBS, Some(&[1, 1, 1, 3])), SftLossType::Nll, 0.0).is_err());
        let none = SftInputs { num_items_in_batch: 0, ..inputs(&LOGPROBS, None) };
        assert!(matches!(sft_loss(&none, SftLossType::Nll, 0.0), Err(Error::Value { what: "num_items_in_batch", .. })));
    }
}
