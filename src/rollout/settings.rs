//! How much is generated at the same time.

use candle_core::Device;

/// Limits of generation. Except for the last two, they change speed and memory, never the result (on a GPU: up to the
/// last bits of the logits).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RolloutSettings {
    /// Most sequences computed at the same time, at least 1.
    pub max_num_seqs: usize,
    /// Tokens per step that decoding and prefilling share, at least 1. A long prompt is cut into chunks that fit, so
    /// that it does not hold up the sequences that decode.
    pub max_batch_tokens: usize,
    /// Bytes the KV cache may take. When they are used up, the youngest sequences wait and are computed again.
    pub kv_cache_bytes: usize,
    /// Most tokens of a completion, at least 1. A completion also ends, truncated, at the model's own limit.
    pub max_new_tokens: usize,
    /// Tokens that end a completion. May be empty.
    pub eos_token_ids: Vec<u32>,
}

impl RolloutSettings {
    /// Usual for [`RolloutSettings::max_batch_tokens`]: with 512 rows a multiply is bound by arithmetic and no longer
    /// by reading the weights, and a chunk stays short beside a decode step.
    pub const DEFAULT_BATCH_TOKENS: usize = 512;

    /// The same on a GPU, whose products want more rows.
    pub const DEFAULT_BATCH_TOKENS_GPU: usize = 2048;

    /// Where a GPU has no room for as many sequences as are wanted at once, steps get as short as this before their number does.
    pub const LEAST_BATCH_TOKENS: usize = 512;

    /// Usual for [`RolloutSettings::max_batch_tokens`] where a device computes.
    pub fn batch_tokens(device: &Device) -> usize {
        if device.is_cuda() { Self::DEFAULT_BATCH_TOKENS_GPU } else { Self::DEFAULT_BATCH_TOKENS }
    }
}
