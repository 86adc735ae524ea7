//! How much of a layer waits in host memory between forward and backward, and what is then computed again.
//!
//! Copies run beside the products, as long as a layer's copies take no longer than the layer. Whether they do depends on the
//! model (a small one has more activations a FLOP), on the batch and on the card, so each batch gets the amount with which
//! the estimated time of a layer is the least. The estimate is from the shapes and from constants of the card's generation,
//! not from a clock: the same run parks the same on every machine of a kind.

use std::ops::RangeInclusive;
use std::sync::atomic::Ordering;

use candle_core::{DType, Device};

use super::{Activations, Engine, Types};
use crate::model::batch::Batch;
use crate::model::config::ModelConfig;
use crate::model::layer::Retaining;
use crate::zero::LayerBytes;

/// Tokens of a batch from which and up to which the last layer, needed again at once, keeps its activations: while the head
/// works they take what the MLP's backward takes later. With fewer tokens the head needs that memory itself; with more it is
/// much, and one layer's recomputation little beside attention.
pub(super) const LAST_LAYER_KEPT_TOKENS: RangeInclusive<usize> = 4096..=16384;

/// Tokens of a batch up to which the products before attention may go to host memory: they are a quarter more of it, and with
/// more tokens making them again is little beside attention.
const MOST_TOKENS_WITH_PRODUCTS: usize = 16384;

/// Gate and up of one row in so many may go to host memory too, in batches of so many tokens.
const MLP_ROWS_PART: usize = 8;
const MLP_ROWS_TOKENS: RangeInclusive<usize> = 4096..=16384;

/// Times that the forward pass of a layer takes longer than the layer's gather from other cards, at least: gathers take
/// multiprocessors and memory from the products that they run beside.
const FORWARD_OF_GATHERS: f64 = 10.0;

/// How much of a layer waits in host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Parked {
    /// Its input and the adapters' low-rank products: all else is computed again. It is little beside every layer's products.
    Input,
    /// And the results of attention and of the product after it.
    Attention,
    /// And the products before attention.
    Products,
    /// And gate and up of one row in eight.
    MlpRows,
}

impl Parked {
    /// Each, from the least to the most.
    pub const ALL: [Self; 4] = [Self::Input, Self::Attention, Self::Products, Self::MlpRows];

    /// What it is, for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Input => "inputs of layers",
            Self::Attention => "inputs of layers and attention's results",
            Self::Products => "inputs of layers, attention's inputs and results",
            Self::MlpRows => "inputs of layers, attention's inputs and results, an eighth of gate and up",
        }
    }

    /// What a layer is to retain of a batch of `tokens`.
    pub(super) fn retaining(self, tokens: usize) -> Retaining {
        match self {
            Self::Input => Retaining::Input,
            more => Retaining::Attention {
                with_products: more >= Self::Products,
                mlp_rows: if more == Self::MlpRows { tokens / MLP_ROWS_PART } else { 0 },
            },
        }
    }
}

/// The parts of the model that are computed again for a backward, from 0 for none to 1 for all layers and rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ComputedAgain {
    /// Of the projections gate and up.
    pub gate_up: f64,
    /// Of the projections q, k and v.
    pub qkv: f64,
    /// Of attention and its output projection.
    pub attention: f64,
}

/// What a card reaches.
#[derive(Clone, Copy, Debug)]
struct Rates {
    /// FLOP/s of large products.
    flops: f64,
    /// Bytes per second of a copy between the card and page-locked memory, while another goes the other way.
    bus: f64,
    /// Bytes per second that come from other cards of the machine.
    link: f64,
}

impl Rates {
    /// Those of the fastest card that was measured.
    const FASTEST: Self = Self { flops: 620e12, bus: 52e9, link: 225e9 };

    /// By generation: large 16-bit products and the bus of the fastest cards of it. 9.0 is measured (an H200), the others are
    /// three quarters of the vendor's dense rate and nine tenths of what PCI Express 3, 4 or 5 carries in 16 lanes. The link is not
    /// measured: half of what NVLink carries one way, or the bus.
    fn of(device: &Device, compute: DType) -> Self {
        let capability = crate::device::compute_capability(device).unwrap_or((9, 0));
        let (flops, bus, link) = match capability {
            (..=7, _) => (80e12, 12e9, 12e9),
            (8, 0) => (230e12, 24e9, 150e9),
            (8, 9) => (250e12, 24e9, 24e9),
            (8, _) => (110e12, 24e9, 24e9),
            (9, _) => (Self::FASTEST.flops, Self::FASTEST.bus, Self::FASTEST.link),
            (10 | 11, _) => (1700e12, 52e9, 450e9),
            _ => (310e12, 52e9, 52e9),
        };
        // Without the 16-bit units an H200 multiplies at a twelfth of their rate.
        Self { flops: if compute == DType::F32 { flops / 12.0 } else { flops }, bus, link }
    }
}

/// A layer's bytes and FLOPs for one batch.
#[derive(Clone, Copy, Debug)]
struct Layer {
    /// What [`Parked::Input`] parks, and what each next amount adds to it.
    bytes: [f64; 4],
    qkv: f64,
    /// Attention and the projection after it.
    attention: f64,
    gate_up: f64,
    down: f64,
}

impl Layer {
    fn of(config: &ModelConfig, types: Types, (tokens, pairs): (usize, usize)) -> Self {
        let ModelConfig { hidden_size: hidden, intermediate_size: intermediate, head_dim, .. } = *config;
        let attended = config.num_attention_heads * head_dim;
        let qkv = attended + 2 * config.num_key_value_heads * head_dim;
        let (compute, residual) = (types.compute.size_in_bytes(), types.residual.size_in_bytes());
        let rows = tokens as f64;
        let bytes = [
            hidden * residual,
            hidden * residual + attended * compute + config.num_attention_heads * size_of::<f32>(),
            qkv * compute,
            2 * intermediate * compute / MLP_ROWS_PART,
        ];
        let flops = |inputs: usize, outputs: usize| 2.0 * rows * (inputs * outputs) as f64;
        Self {
            bytes: bytes.map(|each| rows * each as f64),
            qkv: flops(hidden, qkv),
            attention: flops(attended, hidden) + 4.0 * pairs as f64 * attended as f64,
            gate_up: flops(hidden, 2 * intermediate),
            down: flops(intermediate, hidden),
        }
    }

    /// Seconds of forward and backward, each as long as its products or as its copies, whichever takes longer.
    fn secs(&self, parked: Parked, rates: Rates) -> f64 {
        let Self { bytes, qkv, attention, gate_up, down } = self;
        let copied: f64 = bytes[..=parked as usize].iter().sum();
        let forward = qkv + attention + gate_up + down;
        let again = match parked {
            Parked::Input => qkv + attention + gate_up,
            Parked::Attention => qkv + gate_up,
            Parked::Products => *gate_up,
            Parked::MlpRows => gate_up * (1.0 - 1.0 / MLP_ROWS_PART as f64),
        };
        let copy = copied / rates.bus;
        (forward / rates.flops).max(copy) + ((forward + again) / rates.flops).max(copy)
    }
}

/// The amount with which a layer takes the least time; of equals the larger.
fn best(layer: &Layer, tokens: usize, rates: Rates) -> Parked {
    let may_be = |parked: &Parked| match parked {
        Parked::Input | Parked::Attention => true,
        Parked::Products => tokens <= MOST_TOKENS_WITH_PRODUCTS,
        Parked::MlpRows => MLP_ROWS_TOKENS.contains(&tokens),
    };
    let candidates = Parked::ALL.into_iter().rev().filter(may_be);
    candidates.min_by(|&a, &b| layer.secs(a, rates).total_cmp(&layer.secs(b, rates))).unwrap_or(Parked::Input)
}

/// Batches with whose forward pass a layer takes as long as the next one's way to the device, and, where that is a gather and it
/// `spares` gathers, so much longer that a step is little slower for them.
fn group_size(layer: &Layer, bytes: LayerBytes, rates: Rates, spares: bool) -> usize {
    let forward = (layer.qkv + layer.attention + layer.gate_up + layer.down) / rates.flops;
    let (copy, gather) = (bytes.from_host as f64 / rates.bus, bytes.from_ranks as f64 / rates.link);
    // A rank's part is copied to its card before it is gathered.
    let least = (copy + gather).max(if spares { FORWARD_OF_GATHERS * gather } else { 0.0 });
    if forward > 0.0 { ((least / forward).ceil() as usize).max(1) } else { 1 }
}

/// As the engine's order of a step, on the fastest card, of a model with so much of a layer on its way, where so many layers are
/// computed again.
pub(crate) fn micro_batches_at_a_time(
    config: &ModelConfig,
    types: Types,
    tokens: usize,
    bytes: LayerBytes,
    activations: (Activations, usize),
) -> usize {
    group_size(&Layer::of(config, types, (tokens, 0)), bytes, Rates::FASTEST, leaves_little(config, activations))
}

/// Whether each layer leaves little for backward, so that more micro-batches at a time take little memory.
fn leaves_little(config: &ModelConfig, (activations, recomputed_layers): (Activations, usize)) -> bool {
    activations != Activations::Keep && recomputed_layers >= config.num_hidden_layers
}

/// Bytes of the device's memory that are free; `None` where nobody knows.
fn free_bytes(device: &Device) -> Option<u64> {
    crate::device::free_memory(device).ok()
}

impl Engine {
    /// How much of a layer waits in host memory in a pass of the batch; `None` if nothing does.
    pub fn parked(&self, batch: &Batch) -> Option<Parked> {
        self.parked_of(batch.tokens.len(), batch.layout.num_pairs())
    }

    /// As [`Self::parked`], of a batch of so many tokens that attend to so many pairs.
    pub fn parked_of(&self, tokens: usize, pairs: usize) -> Option<Parked> {
        if self.activations != Activations::Offload || !self.device().is_cuda() {
            return None;
        }
        if self.forced.is_some() {
            return self.forced;
        }
        let rates = Rates::of(self.device(), self.types.compute);
        let layer = Layer::of(&self.config, self.types, (tokens, pairs));
        Some(best(&layer, tokens, rates))
    }

    /// As [`Self::parked`], and says once where it is less than people expect of offloading.
    pub(super) fn park(&self, batch: &Batch) -> Option<Parked> {
        let parked = self.parked(batch)?;
        if parked == Parked::Input && !self.has_said_little.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "`activation_offloading`: in a batch of {} tokens copies of attention's inputs and results would take longer than \
                 the layers; the {} wait in host memory, the rest is computed again",
                batch.tokens.len(),
                parked.name()
            );
        }
        Some(parked)
    }

    /// Whether the inputs of all layers of batches with so many tokens together have room where blocks compute: half of what is
    /// free there. On the CPU they always have.
    pub(super) fn has_room_for_inputs(&self, tokens: usize) -> bool {
        if self.activations == Activations::Keep || self.device().is_cpu() {
            return true;
        }
        free_bytes(self.device()).is_none_or(|free| self.input_bytes(tokens) as u64 <= free / 2)
    }

    /// Bytes of the inputs of all layers.
    pub(super) fn input_bytes(&self, tokens: usize) -> usize {
        let ModelConfig { num_hidden_layers, hidden_size, .. } = self.config;
        tokens * num_hidden_layers * hidden_size * self.types.residual.size_in_bytes()
    }

    /// Micro-batches like these with whose forward pass a layer hides what comes of the next one; `None` if none of them has anything
    /// to learn. The largest counts, for which the others wait.
    pub(super) fn group_size(&self, step: &[Batch]) -> Option<usize> {
        let learning = step.iter().filter(|batch| !batch.targets.is_empty());
        let largest = learning.max_by_key(|batch| batch.tokens.len())?;
        let rates = Rates::of(self.device(), self.types.compute);
        let layer = Layer::of(&self.config, self.types, (largest.tokens.len(), largest.layout.num_pairs()));
        let spares = leaves_little(&self.config, (self.activations, self.recomputed_layers));
        Some(group_size(&layer, self.store.layer_bytes(), rates, spares))
    }

    /// What is computed again for the backward of a batch, which follows its own forward (`is_alone`) or that of others.
    pub fn computed_again(&self, batch: &Batch, is_alone: bool) -> ComputedAgain {
        let layers = self.config.num_hidden_layers;
        let is_last_kept = is_alone && LAST_LAYER_KEPT_TOKENS.contains(&batch.tokens.len());
        let kept = usize::from(is_last_kept).max(layers.saturating_sub(self.recomputed_layers));
        let all = (layers - kept.min(layers)) as f64 / layers.max(1) as f64;
        let parked = match self.activations {
            Activations::Keep => return ComputedAgain { gate_up: 0.0, qkv: 0.0, attention: 0.0 },
            Activations::Recompute | Activations::Offload => self.parked(batch).unwrap_or(Parked::Input),
        };
        let mlp_rows = if parked == Parked::MlpRows { 1.0 - 1.0 / MLP_ROWS_PART as f64 } else { 1.0 };
        ComputedAgain {
            gate_up: all * mlp_rows,
            qkv: if parked >= Parked::Products { 0.0 } else { all },
            attention: if parked >= Parked::Attention { 0.0 } else { all },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An H200's.
    const RATES: Rates = Rates { flops: 600e12, bus: 52e9, link: 225e9 };

    fn layer(hidden: usize, intermediate: usize, qkv: usize, tokens: usize) -> Layer {
        let bytes = [2 * hidden, 4 * hidden, 2 * qkv, 4 * intermediate / MLP_ROWS_PART];
        let flops = |weights: usize| 2.0 * (tokens * weights) as f64;
        Layer {
            bytes: bytes.map(|each| (tokens * each) as f64),
            qkv: flops(hidden * qkv),
            attention: flops(hidden * hidden),
            gate_up: flops(2 * hidden * intermediate),
            down: flops(hidden * intermediate),
        }
    }

    #[test]
    fn small_models_park_less_and_never_more_than_a_layer_hides() {
        let chosen = |hidden, intermediate, qkv| best(&layer(hidden, intermediate, qkv, 8192), 8192, RATES);
        assert_eq!(chosen(896, 4864, 1152), Parked::Input);
        assert!(chosen(1536, 8960, 2048) <= Parked::Attention);
        assert_eq!(chosen(3584, 18_944, 4608), Parked::MlpRows);
        for (hidden, intermediate, qkv) in
            [(896, 4864, 1152), (1536, 8960, 2048), (4096, 12_288, 6144), (8192, 29_568, 10_240)]
        {
            let layer = layer(hidden, intermediate, qkv, 8192);
            let parked = best(&layer, 8192, RATES);
            let recomputed = Rates { bus: f64::INFINITY, ..RATES };
            assert!(layer.secs(parked, RATES) <= 1.02 * layer.secs(Parked::Input, recomputed), "{hidden}: {parked:?}");
        }
    }

    #[test]
    fn as_many_batches_go_together_as_hide_the_next_layer() {
        let size = |tokens, bytes, rates| group_size(&layer(3584, 18_944, 4608, tokens), bytes, rates, true);
        let bytes = LayerBytes { from_host: 115_000_000, from_ranks: 0 };
        assert_eq!(size(2048, bytes, RATES), 2);
        assert_eq!(size(2048, bytes, Rates { bus: 1e15, ..RATES }), 1);
        assert_eq!(size(2048, bytes, Rates { bus: 5e9, ..RATES }), 15);
        assert_eq!(size(2048, LayerBytes::default(), RATES), 1);
        // Two ranks have a half each: on its card, or in host memory, from where it is copied first.
        let halves = [0, 57_500_000].map(|from_host| LayerBytes { from_host, from_ranks: 57_500_000 });
        assert_eq!(halves.map(|bytes| size(2048, bytes, RATES)), [2, 2]);
        assert_eq!(halves.map(|bytes| size(8192, bytes, RATES)), [1, 1]);
        assert_eq!(halves.map(|bytes| size(2048, bytes, Rates { link: 1e15, ..RATES })), [1, 1]);
        // Where activations stay a gather is only to be hidden.
        let alone = |bytes, link| group_size(&layer(3584, 18_944, 4608, 2048), bytes, Rates { link, ..RATES }, false);
        assert_eq!(halves.map(|bytes| alone(bytes, RATES.link)), [1, 1]);
        assert_eq!(alone(halves[0], 25e9), 2);
    }

    #[test]
    fn a_slow_bus_parks_the_least_and_a_fast_one_the_most_that_a_batch_may() {
        let layer = layer(3584, 18_944, 4608, 8192);
        assert_eq!(best(&layer, 8192, Rates { bus: 1e9, ..RATES }), Parked::Input);
        assert_eq!(best(&layer, 8192, Rates { bus: 1e15, ..RATES }), Parked::MlpRows);
        assert_eq!(best(&layer, 2048, Rates { bus: 1e15, ..RATES }), Parked::Products);
        assert_eq!(best(&layer, 65_536, Rates { bus: 1e15, ..RATES }), Parked::Attention);
    }
}
