//! What GRPO's rollouts take of a GPU, as `rollout` sizes their memory.

use super::Shape;
use crate::config::settings::Projection;
use crate::rollout::sizes::{Generating, RolloutBytes, Stored};

/// Sequences that a rank computes at once, and tokens of the longest in the cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rollouts {
    /// At most; 0 without rollouts.
    pub at_once: usize,
    /// Of prompt and completion.
    pub longest: usize,
}

impl Shape {
    /// What rollouts take beside the model, whose trained values are `rounded` to 16 bits where it generates, or are in f32.
    pub(super) fn rollout(&self, rollouts: Rollouts, is_rounded: bool) -> RolloutBytes {
        if rollouts.at_once == 0 {
            return RolloutBytes::default();
        }
        // The head reads the table of a tied embedding, which is not rounded beside a residual stream in f32.
        let table = if self.config.tie_word_embeddings && !self.has_adapter { "embed_tokens" } else { "lm_head" };
        let has_head = self.has_adapter || self.types.read().of_parameter(table, 2).size_in_bytes() == 2;
        let stored = match self.has_adapter {
            true => self.kind,
            false if is_rounded && has_head => Stored::Dense,
            false => Stored::Otherwise,
        };
        let generating =
            Generating { config: &self.config, types: self.types, stored, adapter_ranks: self.adapter_ranks };
        // A shape that no kernel takes is one without recorded steps, and not an error.
        generating.bytes(rollouts.at_once, rollouts.longest).unwrap_or_default()
    }
}

/// The projection that a module is.
pub(super) fn projection_of(module: &str) -> Option<usize> {
    Projection::ALL.iter().position(|projection| module.ends_with(projection.path()))
}
