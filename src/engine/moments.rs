//! Device memory of a pass at its two moments that take most: while the head works, and while a layer's backward does.
//!
//! Called by the plan of what stays ([`super::retention`]) and by the estimate of a run's memory, so that both count alike. What
//! waits for backward is not in it. What a layer's backward makes on its way is a sum over its widths whose factors are fitted to
//! measured peaks of the 0.5B to 32B shapes (512 to 65,536 tokens, 16-bit types).

use super::retention::BatchSize;
use crate::model::layer::{LayerCosts, TypeBytes};

/// What a layer's backward makes on its way, in values a token: for each of the MLP's, the model's, and attention's width (queries,
/// keys, values).
const ON_THE_WAY: [f64; 3] = [2.9, 6.25, 2.08];
/// The part of it that a layer makes which has kept everything.
const OF_WHOLE: f64 = 0.6;

/// How much the head takes for its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Strips {
    /// As it works: large strips of logits are faster.
    AsTheyAre,
    /// The least that it could do with.
    Least,
}

/// Bytes on the device while the head works on a batch: logits, the hidden states of targets and their gradients.
pub(crate) fn of_head(costs: &LayerCosts, vocabulary: usize, batch: BatchSize, strips: Strips) -> f64 {
    let TypeBytes { compute, residual } = costs.types();
    let (compute, residual) = (compute as f64, residual as f64);
    let (hidden, vocabulary, targets) = (costs.hidden() as f64, vocabulary as f64, batch.targets as f64);
    // A gradient in the type of the activations beside f32 logits.
    let each = if compute < 4.0 { 4.0 + compute } else { 4.0 };
    let logits = if batch.is_known {
        let most = if strips == Strips::Least { 256 } else { 1024 };
        let height = (batch.targets / 8).next_multiple_of(128).clamp(256, most).min(batch.targets.max(1));
        height as f64 * vocabulary * each
    } else {
        let most = if strips == Strips::Least { 256.0 } else { 16384.0 };
        let width = (f64::from(192 << 20) / (6.0 * targets.max(1.0))).clamp(256.0, most).min(vocabulary);
        targets * width * each + 4.0 * targets * hidden
    };
    logits + (residual + 2.0 * compute) * hidden * targets
}

/// Bytes on the device while a layer's backward makes what it needs again, or, of a layer that kept everything (`is_whole`), without.
pub(crate) fn of_layer(costs: &LayerCosts, tokens: usize, is_whole: bool) -> f64 {
    let compute = costs.types().compute as f64;
    let [of_mlp, of_hidden, of_attention] = ON_THE_WAY;
    let (hidden, inside, rows) = (costs.hidden() as f64, costs.inside() as f64, tokens as f64);
    let widths = of_mlp * inside + of_hidden * hidden + of_attention * costs.qkv() as f64;
    let unpacked = (rows * f64::from(24 << 10)).clamp(f64::from(48 << 20), f64::from(192 << 20));
    compute * rows * widths * if is_whole { OF_WHOLE } else { 1.0 } + unpacked.min(compute * hidden * inside)
}
