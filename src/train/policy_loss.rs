//! The policy loss of one optimizer step: what each of its micro-batches needs, and the sum over them.

use serde::{Deserialize, Serialize};

use super::generation::{MicroBatch, Sampled};
use super::plan;
use super::session::Session;
use crate::algo::{
    GrpoBatch, GrpoInputs, GrpoLossSettings, Metrics, RolloutCorrectionOutput, grpo_loss, rollout_correction,
};
use crate::config::settings::GrpoSettings;
use crate::engine::StepLoss;
use crate::model::HeadGradient;
use crate::model::batch::Batch;
use crate::ops::head;

/// What the losses of a step are multiplied by.
#[derive(Clone, Copy)]
pub(super) struct Scale {
    /// Of fp16's gradients.
    pub(super) loss_scale: f64,
    /// Weight of the entropy bonus in this step, where it follows the entropy.
    pub(super) entropy_coef: Option<f64>,
}

/// What a step's micro-batches are parts of. They are counted over all ranks, whose gradients are added, where TRL counts those of
/// a process and takes the mean.
#[derive(Clone, Copy)]
pub(super) struct Parts {
    /// Micro-batches of the optimizer step.
    pub(super) micro_steps: usize,
    /// Micro-batches of a generation batch.
    pub(super) slices: usize,
}

/// What a micro-batch adds to the loss of a step.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Term {
    pub(super) loss: f64,
    pub(super) metrics: Metrics,
    /// As the bits of its numbers: JSON has no infinity.
    attended_entropy: (u64, u64),
}

impl Term {
    /// Sum and count of the entropies that count.
    pub(super) fn attended_entropy(&self) -> (f64, f64) {
        (f64::from_bits(self.attended_entropy.0), f64::from_bits(self.attended_entropy.1))
    }
}

/// A micro-batch of a step, and what its loss needs.
pub(super) struct Drawn {
    pub(super) micro: MicroBatch,
    samples: usize,
    /// Unmasked tokens of its generation batch.
    num_items: usize,
    old: Option<Vec<f32>>,
    reference: Option<Vec<f32>>,
    sampling: Option<Vec<f32>>,
    correction: Option<RolloutCorrectionOutput>,
}

impl Drawn {
    pub(super) fn new(
        settings: &GrpoSettings,
        samples: &[Sampled],
        micro: MicroBatch,
        num_items: usize,
    ) -> anyhow::Result<Self> {
        let joined = |pick: fn(&Sampled) -> Option<&Vec<f32>>| -> Option<Vec<f32>> {
            let rows = samples.iter().map(pick).collect::<Option<Vec<_>>>()?;
            Some(rows.into_iter().flatten().copied().collect())
        };
        let old = joined(|s| s.old_logprobs.as_ref());
        let sampling = joined(|s| Some(&s.sampling_logprobs));
        let correction = match (&settings.rollout_importance_sampling, &old, &sampling) {
            (Some(correction), Some(old), Some(sampling)) => {
                Some(rollout_correction(&micro.row_starts, old, sampling, &micro.mask, None, correction)?)
            }
            _ => None,
        };
        let reference = joined(|s| s.ref_logprobs.as_ref());
        Ok(Self { micro, samples: samples.len(), num_items, old, reference, sampling, correction })
    }
}

/// The policy loss of a step's micro-batches on this rank.
pub(super) struct PolicyLoss<'a> {
    pub(super) settings: &'a GrpoSettings,
    pub(super) session: &'a Session,
    pub(super) batches: &'a [Batch],
    pub(super) drawn: &'a [Drawn],
    pub(super) parts: Parts,
    pub(super) scale: Scale,
    pub(super) step: u64,
    pub(super) terms: Vec<Term>,
}

impl StepLoss<anyhow::Error> for PolicyLoss<'_> {
    fn gradient(&mut self, micro_step: usize, head: &head::Output) -> anyhow::Result<HeadGradient> {
        let (settings, drawn) = (self.settings, &self.drawn[micro_step]);
        let Drawn { micro, correction, .. } = drawn;
        let mut loss_settings = GrpoLossSettings::from(settings);
        loss_settings.entropy_coef = self.scale.entropy_coef.unwrap_or(loss_settings.entropy_coef);
        let sampling = drawn.sampling.as_deref().filter(|_| settings.off_policy_mask_threshold.is_some());
        let output = grpo_loss(
            &GrpoInputs {
                row_starts: &micro.row_starts,
                logprobs: &head.logprobs,
                old_logprobs: drawn.old.as_deref(),
                ref_logprobs: drawn.reference.as_deref(),
                sampling_logprobs: sampling,
                entropies: Some(&head.entropies),
                mask: &micro.mask,
                tool_mask: None,
                advantages: &micro.advantages,
                importance_ratio: correction
                    .as_ref()
                    .and_then(|c| c.importance_ratio(0..drawn.samples, 0..micro.mask.len())),
                entropy_threshold: None,
                batch: GrpoBatch {
                    num_items_in_batch: drawn.num_items,
                    num_processes: 1,
                    gradient_accumulation_steps: self.parts.micro_steps,
                    steps_per_generation: self.parts.slices,
                    is_training: true,
                },
            },
            &loss_settings,
        )?;
        let batch = &self.batches[micro_step];
        plan::check_loss(output.loss, self.step + 1, self.session, batch, &settings.training.output_dir)?;
        let mut metrics = output.metrics;
        if let Some(correction) = correction {
            metrics.merge(&correction.metrics);
        }
        let (sum, count) = output.attended_entropy;
        self.terms.push(Term { loss: output.loss, metrics, attended_entropy: (sum.to_bits(), count.to_bits()) });
        let gradient = HeadGradient {
            d_logprobs: output.d_logprobs,
            d_entropies: output.d_entropies.unwrap_or_default(),
            d_mean_logprobs: vec![],
        };
        Ok(gradient.scaled(self.scale.loss_scale))
    }
}
