//! What a rollout takes of a device, from a model's shape alone: by the functions with which it sizes its memory itself.

use super::Error;
use super::kv_cache::KvShape;
use super::pages::pages_for;
use super::recorded::{MOST_LANES, RecordedSteps};
use super::settings::RolloutSettings;
use crate::config::settings::Projection;
use crate::engine::Types;
use crate::kernels::cuda::ProductCard;
use crate::model::config::ModelConfig;
use crate::ops::cuda::linear::most_unpacked_bytes;

/// Cards whose products are cut as differently as any are: a Hopper, and one of its size without warp groups.
const CARDS: [ProductCard; 2] = [
    ProductCard { multiprocessors: 132, has_groups: true, has_large_blocks: true },
    ProductCard { multiprocessors: 132, has_groups: false, has_large_blocks: true },
];

/// How a model's projections lie where decoding multiplies them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// In 4 bits.
    Packed,
    /// In GGUF blocks.
    Blocks,
    /// In 16 bits.
    Dense,
    /// As recorded steps do not read them.
    Otherwise,
}

/// A model as far as a rollout's memory depends on it.
#[derive(Clone, Copy, Debug)]
pub struct Generating<'a> {
    /// Its sizes.
    pub config: &'a ModelConfig,
    /// Of its passes.
    pub types: Types,
    /// Its projections; the head of what is recorded is in 16 bits, or in blocks as they are.
    pub stored: Stored,
    /// The rank of the adapter of each projection, in the order of [`Projection::ALL`]; 0: none.
    pub adapter_ranks: [usize; Projection::ALL.len()],
}

/// Bytes of a device that a rollout takes beside the model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RolloutBytes {
    /// Its cache of keys and values, if there is room.
    pub cache: u64,
    /// The cache at the least: of one sequence.
    pub least_cache: u64,
    /// What its steps work on: prefilling as many tokens as where there is room, and recorded steps of decoding.
    pub steps: u64,
    /// The same where there is room for the shortest prefilling steps alone.
    pub least_steps: u64,
    /// Adapters in the type of the activations, for recorded steps.
    pub adapters: u64,
}

/// Pages of a cache that so many sequences use at most: besides them, one ready prompt may hold pages, and the scheduler likes a
/// spare page for each.
pub const fn cache_pages(lanes: usize, longest: usize) -> usize {
    lanes.saturating_add(1).saturating_mul(pages_for(longest) + 2)
}

/// Pages without which the longest sequence cannot be computed.
pub const fn least_pages(longest: usize) -> usize {
    pages_for(longest) + 2
}

/// Bytes of a GPU that a pass of `tokens` takes which draws for up to `lanes` of its sequences: the activations of the half of a
/// layer that has most, weights that are unpacked, logits.
pub fn pass_bytes(config: &ModelConfig, types: Types, lanes: usize, tokens: usize) -> u64 {
    /// Columns of adapters beside an input, at most.
    const RANKS: usize = 128;
    /// The library's workspace, and gaps between tensors that are too small for others.
    const SPARE: usize = 192 << 20;
    let (compute, residual) = (types.compute.size_in_bytes(), types.residual.size_in_bytes());
    let (hidden, gate_up) = (config.hidden_size, 2 * config.intermediate_size);
    let attended = config.num_attention_heads * config.head_dim;
    let qkv = attended + 2 * config.num_key_value_heads * config.head_dim;
    // Queries, keys and values before and after the rotation, or gate, up and their product.
    let half = (2 * qkv + attended).max(gate_up + gate_up / 2) + hidden;
    let rows = 2 * residual * hidden + compute * (hidden + half + 2 * RANKS);
    let unpacked = (compute * gate_up * (hidden + RANKS)).min(most_unpacked_bytes(tokens));
    let logits = (4 + compute) * config.vocab_size * lanes.min(tokens);
    rows.saturating_mul(tokens).saturating_add(unpacked + logits + SPARE) as u64
}

impl KvShape {
    /// What one token of a model leaves in the cache.
    pub fn of(config: &ModelConfig, types: Types) -> Self {
        Self {
            layers: config.num_hidden_layers,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            dtype: types.compute,
        }
    }
}

impl Generating<'_> {
    /// Of a rollout of up to `sequences` at once, of up to `longest` tokens each.
    ///
    /// # Errors
    /// If the shape is none of a model.
    pub fn bytes(&self, sequences: usize, longest: usize) -> Result<RolloutBytes, Error> {
        let page = KvShape::of(self.config, self.types).page_bytes();
        let pass = |lanes| {
            [RolloutSettings::DEFAULT_BATCH_TOKENS_GPU, RolloutSettings::LEAST_BATCH_TOKENS]
                .map(|tokens| pass_bytes(self.config, self.types, lanes, tokens.max(lanes)))
        };
        let mut passes = pass(sequences);
        let mut decoding = 0;
        let (mut lanes, mut adapters) = (sequences, 0);
        for card in CARDS {
            if let Some(recorded) = RecordedSteps::sizes(self, card)? {
                lanes = sequences.min(MOST_LANES);
                passes = pass(lanes);
                decoding = decoding.max(recorded.bytes(lanes, longest) as u64);
                adapters =
                    adapters.max(recorded.adapter_bytes(self.config.num_hidden_layers, &self.adapter_ranks) as u64);
            }
        }
        Ok(RolloutBytes {
            cache: page.saturating_mul(cache_pages(lanes, longest)) as u64,
            least_cache: page.saturating_mul(least_pages(longest)) as u64,
            steps: passes[0] + decoding,
            least_steps: passes[1] + decoding,
            adapters,
        })
    }
}
