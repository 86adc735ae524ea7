//! Losses, advantages, KL estimators and masks: numbers in, numbers out.
//!
//! Nothing here knows a model, a device or a rank. The loops in `train` hand over log-probabilities and get back the
//! loss, its gradient with respect to those log-probabilities (and entropies), and metrics under TRL's names; the head
//! turns that gradient into one of the hidden states.
//!
//! Shape legend: `B` rows (completions) of a micro-batch, `N` tokens of all rows in a flat array, `row_starts` `[B+1]`
//! where row `i` is `row_starts[i]..row_starts[i+1]`; `G` group size, `F` reward functions.
//!
//! Invariants: inputs are f32, sums are f64 in the order of the tokens, gradients are rounded to f32 once; a masked
//! token has gradient 0 and its log-probability is never read. Gradients are meant to be **averaged** over ranks, as
//! data-parallel trainers do; where a normaliser is global, the number of ranks is therefore a factor.

mod advantages;
mod completions;
mod entropy;
mod error;
mod grpo;
mod grpo_inputs;
mod kl;
mod metrics;
mod policy;
mod rollout_correction;
mod rows;
mod sft;

pub use advantages::{AdvantageInputs, AdvantageOutput, advantages};
pub use completions::{CompletionStatistics, completion_mask, completion_statistics, is_truncated};
pub use entropy::{EntropyControl, entropy_threshold};
pub use error::Error;
pub use grpo::grpo_loss;
pub use grpo_inputs::{GrpoBatch, GrpoInputs, GrpoLossSettings, GrpoOutput, ImportanceRatio};
pub use kl::{k1, k2, k3};
pub use metrics::{Metric, Metrics};
pub use rollout_correction::{RolloutCorrectionOutput, rollout_correction};
pub use sft::{SftInputs, SftOutput, sft_loss};
