//! What the policy loss is given and what it gives back.

use super::{Error, Metrics};
use crate::config::settings::{GrpoLossType, GrpoSettings, ImportanceSamplingLevel, VespoSettings};

/// Name of the loss in errors.
pub(super) const OPERATION: &str = "GRPO loss";

/// What of [`GrpoSettings`] the loss depends on.
#[derive(Clone, Debug, PartialEq)]
pub struct GrpoLossSettings {
    /// Which policy loss.
    pub loss_type: GrpoLossType,
    /// Level of the importance ratio.
    pub importance_sampling_level: ImportanceSamplingLevel,
    /// Weight of the KL term; 0 needs no reference log-probabilities.
    pub beta: f64,
    /// Multiply the KL term by the importance ratio, gradient through the ratio included.
    pub use_bias_correction_kl: bool,
    /// Lower clip range, 0 or more.
    pub epsilon: f64,
    /// Upper clip range, 0 or more; for `cispo` the cap itself.
    pub epsilon_high: f64,
    /// Cap of the unclipped ratio.
    pub delta: Option<f64>,
    /// Share of the tokens, by entropy from the top, that the policy term looks at, in [0, 1]; 1 is all.
    pub top_entropy_quantile: f64,
    /// Weight of the entropy bonus; 0 is off.
    pub entropy_coef: f64,
    /// Whether that weight follows the entropy, so that there is a bonus even where it is 0 now.
    pub is_entropy_adaptive: bool,
    /// Rows with a negative advantage whose policy moved further than this are left out.
    pub off_policy_mask_threshold: Option<f64>,
    /// SAPO's temperature for advantages of 0 and less.
    pub sapo_temperature_neg: f64,
    /// SAPO's temperature for positive advantages.
    pub sapo_temperature_pos: f64,
    /// VESPO's shape.
    pub vespo: VespoSettings,
    /// Longest completion in tokens; the normaliser of `dr_grpo`.
    pub max_completion_length: usize,
}

impl From<&GrpoSettings> for GrpoLossSettings {
    fn from(settings: &GrpoSettings) -> Self {
        Self {
            loss_type: settings.loss_type,
            importance_sampling_level: settings.importance_sampling_level,
            beta: settings.beta,
            use_bias_correction_kl: settings.use_bias_correction_kl,
            epsilon: settings.epsilon,
            epsilon_high: settings.epsilon_high,
            delta: settings.delta,
            top_entropy_quantile: settings.top_entropy_quantile,
            entropy_coef: settings.entropy_coef,
            is_entropy_adaptive: settings.adaptive_entropy.is_some(),
            off_policy_mask_threshold: settings.off_policy_mask_threshold,
            sapo_temperature_neg: settings.sapo_temperature_neg,
            sapo_temperature_pos: settings.sapo_temperature_pos,
            vespo: settings.vespo,
            max_completion_length: settings.longest_completion(),
        }
    }
}

impl GrpoLossSettings {
    /// Whether the loss reads [`GrpoInputs::entropies`] (else they only feed the metric `entropy`).
    pub fn needs_entropies(&self) -> bool {
        self.top_entropy_quantile < 1.0 || self.has_entropy_bonus()
    }

    /// Whether there is an entropy bonus.
    pub(super) fn has_entropy_bonus(&self) -> bool {
        self.entropy_coef != 0.0 || self.is_entropy_adaptive
    }

    pub(super) fn check(&self) -> Result<(), Error> {
        let check = |what, value: f64, is_inside, expected| {
            if is_inside { Ok(()) } else { Err(Error::Value { operation: OPERATION, what, value, expected }) }
        };
        check("epsilon", self.epsilon, self.epsilon >= 0.0, "0 or more")?;
        check("epsilon_high", self.epsilon_high, self.epsilon_high >= 0.0, "0 or more")?;
        let quantile = self.top_entropy_quantile;
        check("top_entropy_quantile", quantile, (0.0..=1.0).contains(&quantile), "in [0, 1]")?;
        let (low, high) = (self.sapo_temperature_neg, self.sapo_temperature_pos);
        check("sapo_temperature_neg", low, low > 0.0, "more than 0")?;
        check("sapo_temperature_pos", high, high > 0.0, "more than 0")?;
        let longest = self.max_completion_length;
        check("max_completion_length", longest as f64, longest > 0, "1 or more")
    }
}

/// Importance ratios between trainer and rollout, from [`super::rollout_correction`].
#[derive(Clone, Copy, Debug)]
pub enum ImportanceRatio<'a> {
    /// One per token, f32 `[N]`.
    Token(&'a [f32]),
    /// One per row, f32 `[B]`.
    Sequence(&'a [f32]),
}

/// Where the micro-batch stands in its optimizer step and generation batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrpoBatch {
    /// Unmasked completion tokens of the whole generation batch, over all ranks.
    pub num_items_in_batch: usize,
    /// Ranks.
    pub num_processes: usize,
    /// Micro-batches of this optimizer step (fewer than configured at the end of an epoch).
    pub gradient_accumulation_steps: usize,
    /// Micro-batches per rank cut from one generation batch.
    pub steps_per_generation: usize,
    /// False in evaluation, where nothing is accumulated.
    pub is_training: bool,
}

impl GrpoBatch {
    pub(super) fn check(&self) -> Result<(), Error> {
        for (what, value) in [
            ("num_processes", self.num_processes),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps),
            ("steps_per_generation", self.steps_per_generation),
        ] {
            if value == 0 {
                return Err(Error::Value { operation: OPERATION, what, value: 0.0, expected: "1 or more" });
            }
        }
        Ok(())
    }
}

/// One micro-batch. Log-probabilities are those of logits already divided by the temperature.
#[derive(Clone, Copy, Debug)]
pub struct GrpoInputs<'a> {
    /// Where each row's tokens begin, `[B+1]`.
    pub row_starts: &'a [usize],
    /// Log-probabilities of the tokens under the policy, f32 `[N]`.
    pub logprobs: &'a [f32],
    /// The same when the rollout was made, f32 `[N]`; `None` on policy, where they are `logprobs` themselves.
    pub old_logprobs: Option<&'a [f32]>,
    /// The same under the reference policy, f32 `[N]`; needed where `beta` is not 0.
    pub ref_logprobs: Option<&'a [f32]>,
    /// The same as the rollout engine saw them, f32 `[N]`; for the off-policy mask, in place of `old_logprobs`.
    pub sampling_logprobs: Option<&'a [f32]>,
    /// Entropies of the policy at each token in nats, f32 `[N]`.
    pub entropies: Option<&'a [f32]>,
    /// 1 for tokens of the completion that count, u8 `[N]`.
    pub mask: &'a [u8],
    /// 0 for tokens that a tool wrote, u8 `[N]`.
    pub tool_mask: Option<&'a [u8]>,
    /// Advantages, f32 `[B]`.
    pub advantages: &'a [f32],
    /// Correction of the rollout-trainer mismatch.
    pub importance_ratio: Option<ImportanceRatio<'a>>,
    /// Entropy from which on a token counts, from [`super::entropy_threshold`] over all ranks; `None` takes it from this
    /// micro-batch. Read only where `top_entropy_quantile` is below 1.
    pub entropy_threshold: Option<f32>,
    /// Normalisers.
    pub batch: GrpoBatch,
}

/// The loss of a micro-batch and its gradients.
#[derive(Clone, Debug, PartialEq)]
pub struct GrpoOutput {
    /// The loss, already divided for accumulation: the step's loss is the sum over its micro-batches.
    pub loss: f64,
    /// d loss / d logprobs, f32 `[N]`.
    pub d_logprobs: Vec<f32>,
    /// d loss / d entropies, f32 `[N]`; with an entropy bonus only.
    pub d_entropies: Option<Vec<f32>>,
    /// Sum of the entropies of the tokens that the policy term looks at, and their number: for [`super::EntropyControl`].
    pub attended_entropy: (f64, f64),
    /// Metrics of this micro-batch under TRL's names.
    pub metrics: Metrics,
}
