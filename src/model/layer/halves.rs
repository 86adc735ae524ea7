//! A layer as two halves, and what each costs and leaves: the mixer (norm, q/k/v, rotation, attention, output projection) and the
//! feed-forward half (norm, gate and up, SwiGLU, down).
//!
//! Counted from shapes alone. Who decides what becomes of activations (`engine`) weighs bytes that are left against the work of
//! making them again; `train::estimate` counts the same bytes.

use std::ops::{Add, AddAssign, Mul};

use crate::model::config::ModelConfig;

/// A half of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Half {
    /// Attention with its norm and projections.
    Mixer,
    /// The MLP with its norm.
    FeedForward,
}

/// What a half may leave for its backward, or have made again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Leaf {
    /// The layer's input and the low-rank products of all projections: they always stay.
    Input,
    /// The mixer's: attention's result and its log-sums, and the residual stream after the output projection.
    Attention,
    /// The mixer's: queries, keys and values as they enter attention (before the norm of the heads, where there is one).
    Products,
    /// The feed-forward half's: gate and up.
    GateUp,
    /// The rest of a layer that keeps everything: what the norms made. It costs next to nothing to make again.
    Norms,
}

impl Leaf {
    /// All of them, which together are what a layer that keeps everything leaves.
    pub const ALL: [Self; 5] = [Self::Input, Self::Attention, Self::Products, Self::GateUp, Self::Norms];
}

/// What a piece of a layer asks of a card.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Of products and attention.
    pub flops: f64,
    /// Bytes that norms, rotations, SwiGLU, low-rank products and unpacking read and write.
    pub moved_bytes: f64,
}

impl Add for Work {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { flops: self.flops + other.flops, moved_bytes: self.moved_bytes + other.moved_bytes }
    }
}

impl AddAssign for Work {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Mul<f64> for Work {
    type Output = Self;

    fn mul(self, factor: f64) -> Self {
        Self { flops: self.flops * factor, moved_bytes: self.moved_bytes * factor }
    }
}

/// Bytes of the two types of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TypeBytes {
    /// Of activations.
    pub compute: usize,
    /// Of the residual stream.
    pub residual: usize,
}

/// Ranks of a layer's adapters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AdapterRanks {
    /// Of all projections together.
    pub all: usize,
    /// Of those but the last of the MLP: the inputs of these lie there with room for the low-rank products.
    pub carried: usize,
}

/// A layer as far as its costs depend on it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerCosts {
    hidden: usize,
    inside: usize,
    query_heads: usize,
    kv_heads: usize,
    head_dim: usize,
    has_qk_norm: bool,
    types: TypeBytes,
    ranks: AdapterRanks,
    /// Whether its weights are unpacked for every product.
    is_packed: bool,
}

/// Bytes that unpacking reads of 4-bit storage for each value.
const PACKED_BYTES: f64 = 0.53;
/// Attention's backward takes so many times the FLOPs of its forward: five products where that has two.
const ATTENTION_BACKWARD: f64 = 2.5;

impl LayerCosts {
    /// Those of a layer of the model.
    pub fn new(config: &ModelConfig, types: TypeBytes, ranks: AdapterRanks, is_packed: bool) -> Self {
        Self {
            hidden: config.hidden_size,
            inside: config.intermediate_size,
            query_heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            has_qk_norm: config.has_qk_norm,
            types,
            ranks,
            is_packed,
        }
    }

    /// Width of the residual stream.
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// Width of the MLP.
    pub fn inside(&self) -> usize {
        self.inside
    }

    /// Width of the queries.
    pub fn queries(&self) -> usize {
        self.query_heads * self.head_dim
    }

    /// Width of queries, keys and values.
    pub fn qkv(&self) -> usize {
        self.queries() + 2 * self.kv_heads * self.head_dim
    }

    /// Bytes of the types.
    pub fn types(&self) -> TypeBytes {
        self.types
    }

    /// Bytes of a leaf for each token.
    pub fn bytes(&self, leaf: Leaf) -> usize {
        let TypeBytes { compute, residual } = self.types;
        match leaf {
            Leaf::Input => residual * self.hidden + compute * self.ranks.all,
            Leaf::Attention => residual * self.hidden + compute * self.queries() + size_of::<f32>() * self.query_heads,
            Leaf::Products => compute * self.qkv(),
            Leaf::GateUp => compute * 2 * self.inside,
            Leaf::Norms => {
                let of_heads = if self.has_qk_norm {
                    compute * (self.queries() + self.kv_heads * self.head_dim)
                        + size_of::<f32>() * (self.query_heads + self.kv_heads)
                } else {
                    0
                };
                compute * (2 * self.hidden + self.ranks.carried) + 2 * size_of::<f32>() + of_heads
            }
        }
    }

    /// Bytes of all leaves for each token.
    pub fn whole_bytes(&self) -> usize {
        Leaf::ALL.iter().map(|&leaf| self.bytes(leaf)).sum()
    }

    /// The products of `[N, inputs]` with `weights` weights, which are unpacked before.
    fn product(&self, tokens: f64, weights: usize) -> Work {
        let unpacking = if self.is_packed { PACKED_BYTES + self.types.compute as f64 } else { 0.0 };
        Work { flops: 2.0 * tokens * weights as f64, moved_bytes: unpacking * weights as f64 }
    }

    /// Reading or writing rows of so many values.
    fn rows(&self, tokens: f64, values: usize) -> Work {
        Work { flops: 0.0, moved_bytes: tokens * (self.types.compute * values) as f64 }
    }

    /// Passes over the residual stream.
    fn streams(&self, tokens: f64, passes: usize) -> Work {
        Work { flops: 0.0, moved_bytes: tokens * (passes * self.types.residual * self.hidden) as f64 }
    }

    /// Reading the inputs of adapters, where there are some.
    fn low_rank(&self, tokens: f64, values: usize) -> Work {
        if self.ranks.all == 0 { Work::default() } else { self.rows(tokens, values) }
    }

    fn attention(&self, pairs: f64) -> Work {
        Work { flops: 4.0 * pairs * self.queries() as f64, moved_bytes: 0.0 }
    }

    /// Forward of a half for `tokens` that attend to `pairs`.
    pub fn forward(&self, half: Half, tokens: usize, pairs: usize) -> Work {
        let rows = tokens as f64;
        let norm = self.streams(rows, 1) + self.rows(rows, self.hidden);
        match half {
            Half::Mixer => {
                let turned = self.qkv() - self.kv_heads * self.head_dim;
                norm + self.product(rows, self.hidden * (self.qkv() + self.queries()))
                    + self.rows(rows, 2 * turned)
                    + self.attention(pairs as f64)
                    + self.low_rank(rows, self.hidden + self.queries())
            }
            Half::FeedForward => {
                norm + self.product(rows, 3 * self.hidden * self.inside)
                    + self.rows(rows, 3 * self.inside)
                    + self.low_rank(rows, self.hidden + self.inside)
            }
        }
    }

    /// Backward of a half whose leaves are all there, with frozen weights.
    pub fn backward(&self, half: Half, tokens: usize, pairs: usize) -> Work {
        let rows = tokens as f64;
        match half {
            Half::Mixer => {
                let turned = self.qkv() - self.kv_heads * self.head_dim;
                self.streams(rows, 3)
                    + self.rows(rows, self.hidden)
                    + self.product(rows, self.hidden * (self.qkv() + self.queries()))
                    + self.rows(rows, 2 * turned)
                    + self.attention(pairs as f64) * ATTENTION_BACKWARD
                    + self.low_rank(rows, 2 * self.hidden + self.queries() + self.qkv())
            }
            Half::FeedForward => {
                self.streams(rows, 3)
                    + self.rows(rows, self.hidden)
                    + self.product(rows, 3 * self.hidden * self.inside)
                    + self.rows(rows, 5 * self.inside)
                    + self.low_rank(rows, 2 * self.hidden)
            }
        }
    }

    /// The work of making a leaf again from those before it, which is what keeping or parking it saves.
    pub fn again(&self, leaf: Leaf, tokens: usize, pairs: usize) -> Work {
        let rows = tokens as f64;
        match leaf {
            Leaf::Input => Work::default(),
            Leaf::Attention => {
                self.attention(pairs as f64) + self.product(rows, self.hidden * self.queries()) + self.streams(rows, 2)
            }
            Leaf::Products => {
                let turned = self.qkv() - self.kv_heads * self.head_dim;
                // Norms of heads and the rotation behind them are done again in any case.
                let turning = if self.has_qk_norm { 0 } else { 2 * turned };
                self.product(rows, self.hidden * self.qkv()) + self.rows(rows, turning)
            }
            Leaf::GateUp => self.product(rows, 2 * self.hidden * self.inside),
            Leaf::Norms => (self.streams(rows, 1) + self.rows(rows, self.hidden)) * 2.0,
        }
    }

    /// As [`Self::again`] of gate and up, of the first `rows` of `tokens`: the weights are unpacked for the others all the same.
    pub fn gate_up_rows_again(&self, rows: usize) -> Work {
        Work { flops: 4.0 * rows as f64 * (self.hidden * self.inside) as f64, moved_bytes: 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 7B of Qwen2 with an adapter of rank 16 on all projections.
    fn costs() -> LayerCosts {
        LayerCosts {
            hidden: 3584,
            inside: 18_944,
            query_heads: 28,
            kv_heads: 4,
            head_dim: 128,
            has_qk_norm: false,
            types: TypeBytes { compute: 2, residual: 2 },
            ranks: AdapterRanks { all: 112, carried: 96 },
            is_packed: true,
        }
    }

    #[test]
    fn the_halves_have_the_flops_of_the_layer() {
        let (tokens, pairs) = (8192, 4 * 2048 * 2049 / 2);
        let costs = costs();
        let forward: Work = costs.forward(Half::Mixer, tokens, pairs) + costs.forward(Half::FeedForward, tokens, pairs);
        let weights = 3584 * (4608 + 3584 + 3 * 18_944);
        let attention = 4.0 * pairs as f64 * 3584.0;
        assert_eq!(forward.flops, 2.0 * 8192.0 * f64::from(weights) + attention);
        let backward = costs.backward(Half::Mixer, tokens, pairs) + costs.backward(Half::FeedForward, tokens, pairs);
        assert_eq!(backward.flops - forward.flops, 1.5 * attention);
    }

    #[test]
    fn what_a_leaf_saves_is_no_more_than_the_half_takes_and_down_is_never_made_again() {
        let (tokens, pairs) = (4096, 4096 * 4097 / 2);
        for has_qk_norm in [false, true] {
            let costs = LayerCosts { has_qk_norm, ..costs() };
            let again = |leaves: &[Leaf]| {
                leaves.iter().fold(Work::default(), |sum, &leaf| sum + costs.again(leaf, tokens, pairs))
            };
            let mixer = again(&[Leaf::Attention, Leaf::Products]);
            assert_eq!(mixer.flops, costs.forward(Half::Mixer, tokens, pairs).flops);
            let feed_forward = again(&[Leaf::GateUp]).flops;
            assert_eq!(feed_forward * 1.5, costs.forward(Half::FeedForward, tokens, pairs).flops);
            assert_eq!(costs.gate_up_rows_again(tokens).flops, feed_forward);
        }
    }

    #[test]
    fn the_bytes_of_the_leaves_are_those_of_their_tensors() {
        let costs = costs();
        assert_eq!(costs.bytes(Leaf::Input), 2 * 3584 + 2 * 112);
        assert_eq!(costs.bytes(Leaf::Attention), 2 * 3584 + 2 * 3584 + 4 * 28);
        assert_eq!(costs.bytes(Leaf::Products), 2 * 4608);
        assert_eq!(costs.bytes(Leaf::GateUp), 4 * 18_944);
        assert_eq!(costs.bytes(Leaf::Norms), 2 * (2 * 3584 + 96) + 8);
        assert_eq!(costs.whole_bytes(), 4 * 3584 + 2 * (2 * 3584 + 3584 + 4608 + 2 * 18_944 + 96) + 4 * 28 + 8 + 224);
        let normed = LayerCosts { has_qk_norm: true, ..costs };
        assert_eq!(normed.bytes(Leaf::Norms) - costs.bytes(Leaf::Norms), 2 * (3584 + 512) + 4 * 32);
    }
}
