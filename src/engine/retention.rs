//! What becomes of a layer's activations between forward and backward, half by half: kept on the device, parked in host memory, or
//! made again.
//!
//! A plan is made for each batch from bytes, FLOPs, the card's rates and free memory. Copies run beside the products, as long as a
//! layer's copies take no longer than the layer. Whether they do depends on the model (a small one has more activations a FLOP), on
//! the batch and on the card, so of what may be parked the amount is taken with which a layer takes the least time. What stays of
//! the last layer, which is needed again at once, follows from what the head and a layer's backward take ([`super::moments`]).
//!
//! Rates are measured ([`Rates`]), and a plan must not change the bits of training. It does not: what is not kept is made again by the
//! same kernels from the same values in the same shapes, so that it makes no difference to gradients whether and where it waited.
//! Two things are not so on a GPU: without the rows of gate and up that were parked a product has fewer rows, and in a layer that keeps
//! everything the activation lies in a buffer of another width; either may be summed in another order. Whether they come about
//! follows from the shapes and the card's generation alone, never from a clock or from free memory.

use std::sync::atomic::Ordering;

use candle_core::Device;

use super::moments::{Strips, of_head, of_layer};
use super::rates::Rates;
use super::{Activations, Engine, Types};
use crate::model::batch::Batch;
use crate::model::config::ModelConfig;
use crate::model::layer::{AdapterRanks, Half, LayerCosts, Leaf, OfMixer, Retaining, TypeBytes, Work};
use crate::zero::{FlatBlock, LayerBytes, ParamStore};

/// What may be parked is worth its host memory where it saves so much of a layer's time, at least.
const LEAST_SAVED: f64 = 1.0 / 60.0;

/// Gate and up of one row in so many may be parked. More of them would be most of what waits in host memory.
const GATE_UP_PART: usize = 8;
/// Such rows at least, which are whole tiles of a product; a copy of fewer is not worth its launches.
const LEAST_GATE_UP_ROWS: usize = 512;

/// Times that the forward pass of a layer takes longer than the layer's gather from other cards, at least: gathers take
/// multiprocessors and memory from the products that they run beside.
const FORWARD_OF_GATHERS: f64 = 10.0;

/// Amounts of a layer that may wait in host memory, each with those before it: to force one, and to measure it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Parked {
    /// Its input and the adapters' low-rank products: all else is made again. It is little beside every layer's products.
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
        name_of(self.mixer(), self == Self::MlpRows)
    }

    fn mixer(self) -> OfMixer {
        match self {
            Self::Input => OfMixer::Nothing,
            Self::Attention => OfMixer::Attention,
            Self::Products | Self::MlpRows => OfMixer::Products,
        }
    }
}

fn name_of(mixer: OfMixer, has_rows: bool) -> &'static str {
    match (mixer, has_rows) {
        (OfMixer::Nothing, false) => "inputs of layers",
        (OfMixer::Nothing, true) => "inputs of layers, an eighth of gate and up",
        (OfMixer::Attention, false) => "inputs of layers and attention's results",
        (OfMixer::Attention, true) => "inputs of layers and attention's results, an eighth of gate and up",
        (OfMixer::Products, false) => "inputs of layers, attention's inputs and results",
        (OfMixer::Products, true) => "inputs of layers, attention's inputs and results, an eighth of gate and up",
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

/// A batch as far as a plan depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchSize {
    /// Its tokens.
    pub tokens: usize,
    /// Pairs of tokens of which the one attends to the other.
    pub pairs: usize,
    /// Targets of the loss.
    pub targets: usize,
    /// Whether the loss's gradient is known before the head, so that logits are made once.
    pub is_known: bool,
}

impl BatchSize {
    /// The size of a batch.
    pub fn of(batch: &Batch, is_known: bool) -> Self {
        let (tokens, targets) = (batch.tokens.len(), batch.targets.len());
        Self { tokens, pairs: batch.layout.num_pairs(), targets, is_known }
    }
}

/// A model as far as plans depend on it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Planned {
    pub(crate) costs: LayerCosts,
    pub(crate) vocabulary: usize,
    pub(crate) layers: usize,
    pub(crate) activations: Activations,
    /// The first so many layers follow `activations`, the others keep theirs.
    pub(crate) recomputed_layers: usize,
    /// Whether there is a device beside the host, with memory and rates of its own.
    pub(crate) is_on_gpu: bool,
}

/// What stays of the last layer where its backward follows its forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Last {
    /// As much as of the others; what waits in host memory elsewhere stays on the device.
    AsOthers,
    /// So much of its mixer, or as much as of the others where that is more.
    Mixer(OfMixer),
    /// Everything.
    Whole,
}

/// What becomes of the activations of a batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plan {
    model: Planned,
    batch: BatchSize,
    /// What stays of the mixer of a layer that does not keep everything.
    mixer: OfMixer,
    /// Whether gate and up of some rows do.
    has_rows: bool,
    /// Whether what stays of a layer waits in host memory.
    is_parked: bool,
    last: Last,
    /// Whether what waits of a layer comes back while the mixer of the layer after it computes, and not with its MLP already, which
    /// takes more memory.
    comes_late: bool,
}

impl Planned {
    /// Seconds of a layer's forward and backward, each as long as it computes or as its copies take, whichever takes longer.
    fn secs(&self, batch: BatchSize, (mixer, has_rows): (OfMixer, bool), rates: &Rates) -> f64 {
        let copy = self.parked_bytes(batch.tokens, (mixer, has_rows)) / rates.bus;
        let forward = rates.secs(self.forward(batch)).max(copy);
        forward + rates.secs(self.backward(batch) + self.again(batch, (mixer, has_rows))).max(copy)
    }

    fn forward(&self, BatchSize { tokens, pairs, .. }: BatchSize) -> Work {
        self.costs.forward(Half::Mixer, tokens, pairs) + self.costs.forward(Half::FeedForward, tokens, pairs)
    }

    fn backward(&self, BatchSize { tokens, pairs, .. }: BatchSize) -> Work {
        self.costs.backward(Half::Mixer, tokens, pairs) + self.costs.backward(Half::FeedForward, tokens, pairs)
    }

    /// The work that is done again where so much stays of a layer.
    fn again(&self, BatchSize { tokens, pairs, .. }: BatchSize, (mixer, has_rows): (OfMixer, bool)) -> Work {
        let again = |leaf| self.costs.again(leaf, tokens, pairs);
        let mut work = again(Leaf::GateUp) + again(Leaf::Norms);
        if has_rows {
            work += self.costs.gate_up_rows_again(tokens / GATE_UP_PART) * -1.0;
        }
        if mixer < OfMixer::Products {
            work += again(Leaf::Products);
        }
        if mixer < OfMixer::Attention {
            work += again(Leaf::Attention);
        }
        work
    }

    /// Bytes of a leaf of a layer.
    fn bytes(&self, leaf: Leaf, tokens: usize) -> f64 {
        (tokens * self.costs.bytes(leaf)) as f64
    }

    /// Bytes of what stays of a layer's mixer, without its input.
    fn mixer_bytes(&self, tokens: usize, mixer: OfMixer) -> f64 {
        let attention = if mixer >= OfMixer::Attention { self.bytes(Leaf::Attention, tokens) } else { 0.0 };
        attention + if mixer >= OfMixer::Products { self.bytes(Leaf::Products, tokens) } else { 0.0 }
    }

    fn parked_bytes(&self, tokens: usize, (mixer, has_rows): (OfMixer, bool)) -> f64 {
        let rows = if has_rows { self.bytes(Leaf::GateUp, tokens / GATE_UP_PART) } else { 0.0 };
        self.bytes(Leaf::Input, tokens) + self.mixer_bytes(tokens, mixer) + rows
    }

    /// How much to park: with which a layer takes the least time, of equals the larger; of the mixer what `fits`.
    fn best(&self, batch: BatchSize, rates: &Rates, fits: &dyn Fn(OfMixer) -> bool) -> (OfMixer, bool) {
        let ladder = [
            (OfMixer::Nothing, false),
            (OfMixer::Attention, false),
            (OfMixer::Products, false),
            (OfMixer::Products, true),
        ];
        // What is computed, whatever the copies take.
        let computed = |amount| rates.secs(self.forward(batch) + self.backward(batch) + self.again(batch, amount));
        let mut best = ladder[0];
        for pair in ladder.windows(2) {
            let (before, amount) = (pair[0], pair[1]);
            let is_worth = computed(before) - computed(amount) >= LEAST_SAVED * computed(before);
            let has_tiles = !amount.1 || batch.tokens / GATE_UP_PART >= LEAST_GATE_UP_ROWS;
            if !(is_worth && has_tiles && fits(amount.0)) {
                break;
            }
            if self.secs(batch, amount, rates) <= self.secs(batch, best, rates) {
                best = amount;
            }
        }
        best
    }

    /// Layers that keep everything because the settings say so.
    fn whole_layers(&self) -> usize {
        match self.activations {
            Activations::Keep => self.layers,
            _ => self.layers.saturating_sub(self.recomputed_layers),
        }
    }

    /// Bytes of a layer that come back while the layer behind it computes, where so much of its mixer is parked; and whether they come
    /// after the MLP's backward of that one, which takes most memory: where the mixer's takes as long as they do.
    fn coming(&self, batch: BatchSize, mixer: OfMixer, rates: &Rates) -> (f64, bool) {
        let mixer = mixer.min(OfMixer::Attention);
        let bytes = self.bytes(Leaf::Input, batch.tokens) + self.mixer_bytes(batch.tokens, mixer);
        let of_mixer = rates.secs(self.costs.backward(Half::Mixer, batch.tokens, batch.pairs));
        (bytes, bytes / rates.bus <= of_mixer)
    }

    /// What stays of the last layer: the most that takes no more, beside the least that the head can do with, than the pass takes at
    /// its other moments; what the head takes beyond that it takes for speed as well. `beside` comes back while the last layer's MLP
    /// computes.
    fn last(&self, batch: BatchSize, beside: f64) -> Last {
        let head = |strips| of_head(&self.costs, self.vocabulary, batch, strips);
        let otherwise = head(Strips::AsTheyAre).max(of_layer(&self.costs, batch.tokens, false) + beside);
        // What is left of the last layer in any case is in all of these.
        let whole = batch.tokens * (self.costs.whole_bytes() - self.costs.bytes(Leaf::Input));
        let fits = |bytes: f64| head(Strips::Least) + bytes <= otherwise;
        if fits(whole as f64) {
            return Last::Whole;
        }
        let more = [OfMixer::Products, OfMixer::Attention].into_iter();
        let mut more = more.filter(|&more| fits(self.mixer_bytes(batch.tokens, more)));
        more.next().map_or(Last::AsOthers, Last::Mixer)
    }

    /// The plan of a batch whose backward `is_next` after its own forward, or after that of others. `free` are the bytes of device
    /// memory that the pass may take, `forced` is what is parked whatever it takes. What could change bits follows from `assumed`.
    pub(crate) fn plan(
        &self,
        batch: BatchSize,
        is_next: bool,
        (rates, assumed): (&Rates, &Rates),
        free: Option<f64>,
        forced: Option<Parked>,
    ) -> Plan {
        let is_parked = self.activations == Activations::Offload && self.is_on_gpu;
        // Two layers are on their way at a time, where the head or a layer's backward is at work.
        let least = of_head(&self.costs, self.vocabulary, batch, Strips::AsTheyAre).max(of_layer(
            &self.costs,
            batch.tokens,
            false,
        ));
        let has_room =
            |mixer| free.is_none_or(|free| least + 2.0 * self.parked_bytes(batch.tokens, (mixer, false)) <= free);
        let usual = if is_parked { self.best(batch, assumed, &|_| true) } else { (OfMixer::Nothing, false) };
        let (mixer, has_rows) = match forced {
            Some(forced) if is_parked => (forced.mixer(), forced == Parked::MlpRows),
            None if is_parked => (self.best(batch, rates, &has_room).0, usual.1),
            _ => usual,
        };
        let (usual_bytes, usually_late) = self.coming(batch, usual.0, assumed);
        let beside = if is_parked && !usually_late { usual_bytes } else { 0.0 };
        let is_last_free = is_next && self.activations != Activations::Keep && self.whole_layers() == 0;
        let last = if is_last_free { self.last(batch, beside) } else { Last::AsOthers };
        // Also where inputs of many micro-batches wait in host memory, for which there is no room.
        let comes_late = self.is_on_gpu && self.coming(batch, mixer, rates).1;
        Plan { model: *self, batch, mixer, has_rows, is_parked, last, comes_late }
    }

    /// Batches with whose forward pass a layer takes as long as the next one's way to the device, and, where that is a gather and
    /// activations leave little, so much longer that a step is little slower for them.
    pub(crate) fn group_size(&self, batch: BatchSize, bytes: LayerBytes, rates: &Rates) -> usize {
        let forward = rates.secs(self.forward(batch));
        let (copy, gather) = (bytes.from_host as f64 / rates.bus, bytes.from_ranks as f64 / rates.link);
        // More micro-batches at a time take little memory where each layer leaves little for backward.
        let spares = self.activations != Activations::Keep && self.whole_layers() == 0;
        // A rank's part is copied to its card before it is gathered.
        let least = (copy + gather).max(if spares { FORWARD_OF_GATHERS * gather } else { 0.0 });
        let count = if forward > 0.0 { ((least / forward).ceil() as usize).max(1) } else { 1 };
        // What comes both ways takes each other's time on the host and of the card's memory: twice as many made 93% of the speed of
        // two resident H200s instead of 89%.
        if spares && copy > 0.0 && gather > 0.0 && count > 1 { 2 * count } else { count }
    }
}

impl Plan {
    /// What stays of a layer; `None`: everything. `is_last` is of the last layer, whose backward follows.
    pub(super) fn retaining(&self, is_last: bool) -> Option<Retaining> {
        let gate_up_rows = if self.has_rows { self.batch.tokens / GATE_UP_PART } else { 0 };
        match self.last {
            Last::Whole if is_last => None,
            Last::Mixer(mixer) if is_last => Some(Retaining { mixer: mixer.max(self.mixer), gate_up_rows }),
            _ => Some(Retaining { mixer: self.mixer, gate_up_rows }),
        }
    }

    /// Whether what stays of a layer waits in host memory.
    pub fn is_parked(&self) -> bool {
        self.is_parked
    }

    /// What waits in host memory, for people; `None` if nothing does.
    pub fn parked_name(&self) -> Option<&'static str> {
        self.is_parked.then(|| name_of(self.mixer, self.has_rows))
    }

    /// Whether what waits of a layer comes back after the MLP's backward of the layer behind it.
    pub(crate) fn comes_late(&self) -> bool {
        self.comes_late
    }

    /// Bytes of a layer that wait in host memory.
    pub(crate) fn parked_bytes(&self) -> f64 {
        if self.is_parked { self.model.parked_bytes(self.batch.tokens, (self.mixer, self.has_rows)) } else { 0.0 }
    }

    /// Bytes on the device of what stays of the last layer because its backward follows, with its input and low-rank products;
    /// `None` if it is as the others.
    pub(crate) fn last_bytes(&self) -> Option<f64> {
        let Planned { costs, .. } = &self.model;
        let tokens = self.batch.tokens;
        match self.last {
            Last::AsOthers => None,
            Last::Mixer(mixer) => Some(self.model.parked_bytes(tokens, (mixer.max(self.mixer), self.has_rows))),
            Last::Whole => Some((tokens * costs.whole_bytes()) as f64),
        }
    }

    /// Whether the last layer keeps everything because its backward follows.
    pub fn is_last_whole(&self) -> bool {
        self.last == Last::Whole
    }

    /// The same but for the last layer, which keeps everything or as much as the others.
    #[cfg(test)]
    #[must_use]
    pub(crate) fn with_last_whole(&self, is_whole: bool) -> Self {
        let is_free = is_whole && self.model.activations != Activations::Keep;
        Self { last: if is_free { Last::Whole } else { Last::AsOthers }, ..*self }
    }

    /// What is computed again.
    pub fn computed_again(&self) -> ComputedAgain {
        let layers = self.model.layers;
        let again = layers - self.model.whole_layers().min(layers);
        // Of all layers but the last, and of that one.
        let parts = |of: &dyn Fn(Retaining) -> f64| {
            let [others, last] = [false, true].map(|is_last| self.retaining(is_last).map_or(0.0, of));
            let is_last_other = self.last != Last::AsOthers;
            let others_count = again.saturating_sub(usize::from(is_last_other));
            let sum = others_count as f64 * others + if is_last_other && again > 0 { last } else { 0.0 };
            sum / layers.max(1) as f64
        };
        let tokens = self.batch.tokens.max(1) as f64;
        ComputedAgain {
            gate_up: parts(&|retaining| 1.0 - retaining.gate_up_rows as f64 / tokens),
            qkv: parts(&|retaining| f64::from(u8::from(!self.keeps_products(retaining)))),
            attention: parts(&|retaining| f64::from(u8::from(retaining.mixer < OfMixer::Attention))),
        }
    }

    /// On the CPU products are not kept.
    fn keeps_products(&self, retaining: Retaining) -> bool {
        self.model.is_on_gpu && retaining.mixer >= OfMixer::Products
    }

    /// What becomes of each half of a layer and of the last layer, for people: what and text.
    pub fn describe(&self) -> Vec<(&'static str, String)> {
        let costs = &self.model.costs;
        let bytes = |leaf| crate::telemetry::units::bytes(costs.bytes(leaf) as u64);
        let whole = crate::telemetry::units::bytes(costs.whole_bytes() as u64);
        let (layers, kept) = (self.model.layers, self.model.whole_layers());
        if kept >= layers {
            return vec![("activations", format!("all stay on the device, {whole} a token and layer"))];
        }
        let place = if self.is_parked { "in host memory" } else { "kept" };
        let again =
            |leaf| costs.again(leaf, self.batch.tokens, self.batch.pairs).flops / self.batch.tokens.max(1) as f64;
        let again = |leaf| format!("{:.0} MFLOP a token", again(leaf) / 1e6);
        let mut kept_of_mixer = vec![format!("its input ({} a token)", bytes(Leaf::Input))];
        if self.mixer >= OfMixer::Attention {
            kept_of_mixer.push(format!("attention's results ({})", bytes(Leaf::Attention)));
        }
        if self.mixer >= OfMixer::Products {
            kept_of_mixer.push(format!("queries, keys and values ({})", bytes(Leaf::Products)));
        }
        let made = match self.mixer {
            OfMixer::Nothing => format!(
                "; made again: queries, keys and values ({}) and attention ({})",
                again(Leaf::Products),
                again(Leaf::Attention)
            ),
            OfMixer::Attention => format!("; made again: queries, keys and values ({})", again(Leaf::Products)),
            OfMixer::Products => "; nothing is made again".into(),
        };
        let mixer = format!("{place}: {}{made}", kept_of_mixer.join(", "));
        let feed_forward = if self.has_rows {
            format!(
                "{place}: gate and up of one row in {GATE_UP_PART} ({} a row); made again: those of the others ({})",
                bytes(Leaf::GateUp),
                again(Leaf::GateUp)
            )
        } else {
            format!("made again: gate and up ({} a token, {})", bytes(Leaf::GateUp), again(Leaf::GateUp))
        };
        let last = match self.last {
            Last::Whole => Some(format!("keeps everything ({whole} a token): its backward is next")),
            Last::Mixer(mixer) if mixer <= self.mixer && !self.is_parked => None,
            Last::Mixer(OfMixer::Products) => {
                Some("keeps attention's results, queries, keys and values on the device: its backward is next".into())
            }
            Last::Mixer(_) => Some("keeps attention's results on the device: its backward is next".into()),
            Last::AsOthers if kept > 0 => {
                Some(format!("the last {kept} of {layers} keep everything ({whole} a token)"))
            }
            Last::AsOthers => None,
        };
        let halves = vec![("mixer", mixer), ("feed-forward", feed_forward)];
        halves.into_iter().chain(last.map(|text| ("last layer", text))).collect()
    }
}

/// A layer of the store's model: its adapters, and whether its weights are packed.
pub(super) fn costs_of(config: &ModelConfig, store: &ParamStore, types: Types) -> LayerCosts {
    // Block 0 is the embedding.
    const FIRST_LAYER: usize = 1;
    let entries = store.flats().nth(FIRST_LAYER).into_iter().flat_map(FlatBlock::entries);
    let mut ranks = AdapterRanks::default();
    for entry in entries.filter(|entry| entry.name.ends_with(".lora_A.weight")) {
        let rank = entry.shape.first().copied().unwrap_or(0);
        ranks.all += rank;
        ranks.carried += if entry.name.contains("down_proj") { 0 } else { rank };
    }
    let kind = store.kind_of(FIRST_LAYER, "model.layers.0.mlp.up_proj.weight");
    let is_packed = kind.is_some_and(|kind| !["f32", "f16", "bf16"].contains(&kind.as_str()));
    LayerCosts::new(config, types.bytes(), ranks, is_packed)
}

impl Types {
    /// Bytes of a value of each.
    pub(crate) fn bytes(self) -> TypeBytes {
        TypeBytes { compute: self.compute.size_in_bytes(), residual: self.residual.size_in_bytes() }
    }
}

/// Bytes of the device's memory that are free; `None` where nobody knows.
fn free_bytes(device: &Device) -> Option<u64> {
    crate::device::free_memory(device).ok()
}

impl Engine {
    /// The model as far as plans depend on it.
    fn planned(&self) -> Planned {
        Planned {
            costs: self.costs,
            vocabulary: self.config.vocab_size,
            layers: self.config.num_hidden_layers,
            activations: self.activations,
            recomputed_layers: self.recomputed_layers,
            is_on_gpu: self.device().is_cuda(),
        }
    }

    /// The rates that plans are made with: those of [`Self::set_rates`], or what is assumed of the card.
    pub fn rates(&self) -> Rates {
        self.rates.get().copied().unwrap_or_else(|| Rates::assumed(self.device(), self.types.compute))
    }

    /// Makes plans with measured rates from now on. To be called once, before the first pass.
    pub fn set_rates(&self, rates: Rates) {
        // Another plan in the middle of a run would be as right.
        self.rates.get_or_init(|| rates);
    }

    /// What becomes of the activations of a batch whose backward `is_next` after its own forward, or after that of others.
    pub fn plan(&self, batch: BatchSize, is_next: bool) -> Plan {
        let assumed = Rates::assumed(self.device(), self.types.compute);
        let free = free_bytes(self.device()).map(|free| free as f64);
        self.planned().plan(batch, is_next, (&self.rates(), &assumed), free, self.forced)
    }

    /// As [`Self::plan`], and says once where it is less than people expect of offloading.
    pub(super) fn plan_said(&self, batch: BatchSize, is_next: bool) -> Plan {
        let plan = self.plan(batch, is_next);
        if plan.is_parked && plan.mixer == OfMixer::Nothing && !self.has_said_little.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "`activation_offloading`: in a batch of {} tokens copies of attention's inputs and results would take longer than \
                 the layers; the {} wait in host memory, the rest is computed again",
                batch.tokens,
                name_of(plan.mixer, plan.has_rows)
            );
        }
        plan
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
        let size = BatchSize::of(largest, false);
        Some(self.planned().group_size(size, self.store.layer_bytes(), &self.rates()))
    }
}

#[cfg(test)]
#[path = "retention_tests.rs"]
mod tests;
