//! What a run takes of a GPU's memory and of the host's, before anything is loaded: bytes of parameters, gradients and the
//! optimizer's state from the shapes, of activations from what a layer keeps and what it makes on the way.
//!
//! Parameters and what waits for backward are counted exactly, by the plan that a run makes of its activations on a card with an
//! H200's rates. What a pass makes on its way is counted as that plan counts it (`engine`): within 5% of measured peaks.

use crate::config::settings::{
    GrpoSettings, LoraSettings, ModelSettings, OffloadDevice, OptimizerKind, Projection, Quantization, RankSettings,
    SftSettings, WeightDtype, ZeroStage,
};
use crate::engine::{Activations, BatchSize, Plan, Planned, Rates, Strips, Types, of_head, of_layer};
use crate::model::config::{ModelConfig, TensorRole};
use crate::model::layer::{AdapterRanks, LayerCosts, Leaf};
use crate::model::peft::AdapterConfig;
use crate::model::source::{Kept, StoredSizes};
use crate::rollout::sizes::Stored as Generated;
use crate::zero::LayerBytes;
pub use rollouts::Rollouts;

#[path = "estimate_rollout.rs"]
mod rollouts;

/// What the driver and libraries hold of a GPU beside tensors; that with NCCL's kernels and the few channels of an exchange that is to
/// be small; and with all that it likes: measured on an H200, driver 580, NCCL 2.28.
const CONTEXT_BYTES: [u64; 3] = [670 << 20, 1480 << 20, 2040 << 20];

/// Ranks that exchange the memory of their GPUs.
pub fn exchanging(settings: &RankSettings) -> usize {
    if settings.backend.may_share_gpus() { 1 } else { settings.world_size }
}

/// Bytes of a GPU that are not for tensors of a rank alone.
pub const CONTEXT_ALONE: u64 = CONTEXT_BYTES[0];

/// Bytes of a GPU that are not for tensors of one of these ranks.
pub fn context_bytes(settings: &RankSettings) -> u64 {
    CONTEXT_BYTES[if exchanging(settings) == 1 { 0 } else { 2 - usize::from(saves_memory(settings)) }]
}

/// Whether an exchange between GPUs is to take little of their memory, at some of its speed: where weights wait in host memory for want
/// of it.
pub(super) fn saves_memory(settings: &RankSettings) -> bool {
    settings.offload.params != OffloadDevice::None
}
/// The library's workspace for products.
const WORKSPACE: f64 = (32 << 20) as f64;

/// The work of one rank in a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Work {
    /// Tokens of a micro-batch.
    pub tokens: usize,
    /// Pairs of them of which the one attends to the other.
    pub pairs: usize,
    /// Of the tokens, targets of the loss.
    pub targets: usize,
    /// Whether the loss's gradient is known before the head (SFT), so that logits are made once.
    pub is_known: bool,
    /// Micro-batches of a step.
    pub micro_batches: usize,
    /// What rollouts compute.
    pub rollouts: Rollouts,
    /// Whether a copy of the trained values is kept as the reference policy.
    pub has_reference: bool,
}

impl Work {
    /// A step of SFT: rows of `max_length` tokens, which is the most that a row has.
    pub fn of_sft(settings: &SftSettings) -> Self {
        const USUAL_LENGTH: usize = 1024;
        let SftSettings { training, max_length, .. } = settings;
        let (rows, length) = (training.per_device_train_batch_size, max_length.unwrap_or(USUAL_LENGTH));
        let (tokens, pairs) = (rows * length, rows * length * length.div_ceil(2));
        let micro_batches = training.gradient_accumulation_steps;
        Self {
            tokens,
            pairs,
            targets: tokens,
            is_known: true,
            micro_batches,
            rollouts: Rollouts::default(),
            has_reference: false,
        }
    }

    /// A micro-batch of it.
    pub(super) fn batch(&self) -> BatchSize {
        let Self { tokens, pairs, targets, is_known, .. } = *self;
        BatchSize { tokens, pairs, targets, is_known }
    }

    /// A step of GRPO with the longest prompts and completions; `world_size` ranks share the completions.
    pub fn of_grpo(settings: &GrpoSettings) -> Self {
        const USUAL_PROMPT: usize = 512;
        let GrpoSettings { training, num_generations, .. } = settings;
        let completions = training.per_device_train_batch_size;
        let prompt = settings.max_prompt_length.unwrap_or(USUAL_PROMPT);
        let longest = settings.max_completion_length.unwrap_or(2048);
        let prompts = completions.div_ceil(*num_generations);
        let at_once = settings.max_num_seqs.min(settings.generation_batch_size.div_ceil(training.ranks.world_size));
        Self {
            tokens: prompts * prompt + completions * longest,
            pairs: prompts * prompt * prompt.div_ceil(2) + completions * longest * (prompt + longest.div_ceil(2)),
            targets: completions * longest,
            is_known: false,
            micro_batches: training.gradient_accumulation_steps,
            // The last token drawn is never computed.
            rollouts: Rollouts { at_once, longest: prompt + longest.saturating_sub(1) },
            // With an adapter alone the base is the reference.
            has_reference: settings.beta != 0.0
                && (settings.sync_ref_model
                    || settings.model.lora.as_ref().is_none_or(|lora| !lora.modules_to_save.is_empty())),
        }
    }
}

/// A model as far as memory depends on it.
#[derive(Clone, Debug)]
pub struct Shape {
    config: ModelConfig,
    types: Types,
    /// Frozen bytes on the GPU of each block: the embedding, the layers, the head.
    frozen: Vec<u64>,
    /// Frozen bytes of tables that stay in host memory beside a GPU.
    table: u64,
    /// Values trained of each block.
    trained: Vec<u64>,
    /// Bytes of these as blocks read them where the optimizer works elsewhere, or ranks gather them.
    read: Vec<u64>,
    /// Values of a table that two blocks train together, each with gradients of its own.
    shared: u64,
    /// How frozen projections lie.
    kind: Generated,
    /// Of a layer's projections, in their order.
    adapter_ranks: [usize; Projection::ALL.len()],
    /// Of a layer.
    costs: LayerCosts,
    has_adapter: bool,
}

/// Bytes on each GPU, and in host memory for each rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Estimate {
    /// Weights that are not trained.
    pub weights: u64,
    /// Trained values where blocks compute: adapters, or all weights, in f32 or as blocks read them.
    pub trained: u64,
    /// Their gradients.
    pub gradients: u64,
    /// The optimizer's state.
    pub optimizer: u64,
    /// Activations and what is made on the way, at the moment that takes most.
    pub activations: u64,
    /// Those of the gradients that are there between steps.
    pub kept_gradients: u64,
    /// The rollout's cache, in the place of activations and of the other gradients while it generates, and what else gives way.
    pub kv_cache: u64,
    /// Of that, what one sequence needs.
    pub least_cache: u64,
    /// `rollout` where the cache has no more room than that.
    pub least_rollout: u64,
    /// What it cannot do without beside the cache: its steps' own, and with several ranks all weights.
    pub rollout: u64,
    /// Context and libraries.
    pub context: u64,
    /// Host memory: weights, trained values, gradients, the optimizer's state, what passes through it from and to files.
    pub host: u64,
    /// Files: weights, trained values, the optimizer's state.
    pub files: u64,
}

impl Estimate {
    /// Bytes of a GPU at the moment that takes most.
    pub fn device(&self) -> u64 {
        self.training().max(self.generating())
    }

    fn lasting(&self) -> u64 {
        self.weights + self.trained + self.optimizer + self.context
    }

    /// The same while gradients are made.
    pub fn training(&self) -> u64 {
        self.lasting() + self.gradients + self.activations
    }

    /// The same of rollouts; 0 without.
    pub fn generating(&self) -> u64 {
        match self.kv_cache + self.rollout {
            0 => 0,
            bytes => self.lasting() + self.kept_gradients + bytes,
        }
    }

    /// The same at the least: the rollout's cache gives way, and what it works on.
    #[must_use]
    pub fn at_least(self) -> Self {
        Self { kv_cache: self.least_cache, rollout: self.least_rollout, ..self }
    }

    /// As [`Self::device`], without context and libraries.
    pub fn tensors(&self) -> u64 {
        self.device() - self.context
    }
}

/// How weights are to lie in memory, and what their files say.
#[derive(Clone, Copy, Debug)]
struct Storing<'a> {
    quantization: Option<Quantization>,
    dtype: WeightDtype,
    /// Of a value, where no file says it.
    dtype_bytes: u64,
    stored: &'a StoredSizes,
}

impl Storing<'_> {
    /// Bytes of a matrix of so many values; projections alone are quantised on the way.
    fn bytes(&self, name: &str, values: u64, is_projection: bool) -> u64 {
        if let Some(bytes) = self.stored.packed(name) {
            return bytes;
        }
        match self.stored.quantization().or(self.quantization).filter(|_| is_projection) {
            Some(Quantization { double_quant: true, .. }) => values / 2 + values / 64 + values / 4096,
            Some(_) => values / 2 + values / 16,
            None => values * self.stored.dense(name, self.dtype).unwrap_or(self.dtype_bytes),
        }
    }

    /// How projections that are not trained lie where decoding multiplies them.
    fn kind(&self) -> Generated {
        let stored_bytes = || match self.stored.projections() {
            Some(Kept::Dense(dtype)) if self.dtype == WeightDtype::Auto => dtype.size_in_bytes() as u64,
            _ => self.dtype_bytes,
        };
        match self.stored.projections() {
            Some(Kept::Blocks) => Generated::Blocks,
            Some(Kept::Codes) => Generated::Packed,
            _ if self.quantization.is_some() => Generated::Packed,
            _ if stored_bytes() == 2 => Generated::Dense,
            _ => Generated::Otherwise,
        }
    }
}

impl Shape {
    /// The shape of a model with the storage and the adapter that `settings` name, computed with in `types`. What is packed in its files
    /// stays so.
    ///
    /// # Errors
    /// If the adapter's targets are not those of this model.
    pub fn new(
        config: ModelConfig,
        stored: &StoredSizes,
        settings: &ModelSettings,
        types: Types,
    ) -> anyhow::Result<Self> {
        let dtype_bytes = match settings.dtype {
            WeightDtype::Float32 => 4,
            WeightDtype::Bfloat16 | WeightDtype::Float16 => 2,
            WeightDtype::Auto => config.torch_dtype.map_or(4, |dtype| dtype.size_in_bytes() as u64),
        };
        let storing = Storing { quantization: settings.quantization, dtype: settings.dtype, dtype_bytes, stored };
        Self::stored_as(config, settings.lora.as_ref(), storing, types)
    }

    /// As [`Self::new`], of what it depends on, without files.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn of(
        config: ModelConfig,
        lora: Option<&LoraSettings>,
        quantization: Option<Quantization>,
        dtype_bytes: u64,
        types: Types,
    ) -> anyhow::Result<Self> {
        let stored = StoredSizes::default();
        let storing = Storing { quantization, dtype: WeightDtype::Auto, dtype_bytes, stored: &stored };
        Self::stored_as(config, lora, storing, types)
    }

    fn stored_as(
        config: ModelConfig,
        lora: Option<&LoraSettings>,
        storing: Storing<'_>,
        types: Types,
    ) -> anyhow::Result<Self> {
        let layers = config.num_hidden_layers;
        let block_of = |name: &str| {
            let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse().ok());
            match layer {
                Some(layer) => 1 + std::cmp::min::<usize>(layer, layers),
                None if name.starts_with("model.embed_tokens") => 0,
                None => layers + 1,
            }
        };
        let (mut frozen, mut trained, mut read) = (vec![0; layers + 2], vec![0; layers + 2], vec![0; layers + 2]);
        let read_bytes = |name: &str, dimensions: usize, values: u64| {
            types.read().of_parameter(name, dimensions).size_in_bytes() as u64 * values
        };
        let (mut table, mut shared) = (0, 0);
        for tensor in config.tensors() {
            let values = tensor.shape.iter().product::<usize>() as u64;
            let block = block_of(&tensor.name);
            if lora.is_none() {
                trained[block] += values;
                read[block] += read_bytes(&tensor.name, tensor.shape.len(), values);
                if tensor.role == TensorRole::Embedding && config.tie_word_embeddings {
                    shared = values;
                }
                continue;
            }
            match tensor.role {
                TensorRole::Linear => frozen[block] += storing.bytes(&tensor.name, values, true),
                TensorRole::Bias | TensorRole::Norm => frozen[block] += 4 * values,
                TensorRole::Head => frozen[block] += storing.bytes(&tensor.name, values, false),
                TensorRole::Embedding => {
                    let bytes = storing.bytes(&tensor.name, values, false);
                    table += bytes;
                    // The head of a tied model has the table to itself.
                    if config.tie_word_embeddings {
                        frozen[layers + 1] += bytes;
                    }
                }
            }
        }
        let (mut ranks, mut adapter_ranks) = (AdapterRanks::default(), [0; Projection::ALL.len()]);
        if let Some(lora) = lora {
            let adapter = AdapterConfig::new(lora, None);
            for (module, (outputs, inputs)) in adapter.adapted(&config)? {
                let block = block_of(&module);
                for (factor, values) in [("A", lora.r * inputs), ("B", lora.r * outputs)] {
                    trained[block] += values as u64;
                    read[block] += read_bytes(&format!("{module}.lora_{factor}.weight"), 2, values as u64);
                }
                if module.starts_with("model.layers.0.")
                    && let Some(projection) = rollouts::projection_of(&module)
                {
                    adapter_ranks[projection] = lora.r;
                }
                if module.starts_with("model.layers.0.") {
                    ranks.all += lora.r;
                    ranks.carried += if module.contains("down_proj") { 0 } else { lora.r };
                }
            }
            for tensor in adapter.saved_whole(&config)? {
                let (block, values) = (block_of(&tensor.name), tensor.shape.iter().product::<usize>() as u64);
                trained[block] += values;
                read[block] += read_bytes(&tensor.name, tensor.shape.len(), values);
            }
        }
        let (kind, has_adapter) = (storing.kind(), lora.is_some());
        let is_packed = matches!(kind, Generated::Packed | Generated::Blocks);
        let costs = LayerCosts::new(&config, types.bytes(), ranks, has_adapter && is_packed);
        let shape =
            Self { config, types, frozen, table, trained, read, shared, kind, adapter_ranks, costs, has_adapter };
        Ok(shape)
    }

    /// Values that are trained.
    pub fn num_trained(&self) -> u64 {
        self.trained.iter().sum()
    }

    /// The model as far as plans depend on it, with `activations` and how many of the first layers it is for.
    fn planned(&self, (activations, recomputed_layers): (Activations, usize)) -> Planned {
        Planned {
            costs: self.costs,
            vocabulary: self.config.vocab_size,
            layers: self.config.num_hidden_layers,
            activations,
            recomputed_layers,
            is_on_gpu: true,
        }
    }

    /// What becomes of the activations of a micro-batch of `work`, of which so many pass together, on a card of these rates with room.
    pub fn plan(&self, work: Work, activations: (Activations, usize), at_a_time: usize, rates: &Rates) -> Plan {
        self.planned(activations).plan(work.batch(), at_a_time == 1, (rates, rates), None, None)
    }

    /// Activations by a plan at the moment that takes most, with `waiting` bytes of blocks that are there for a visit of the head, and of a
    /// layer.
    fn activations(
        &self,
        plan: &Plan,
        work: Work,
        (activations, recomputed_layers): (Activations, usize),
        at_a_time: usize,
        waiting: [f64; 2],
    ) -> f64 {
        let layers = self.config.num_hidden_layers;
        let tokens = work.tokens as f64;
        // The layers after these keep all of theirs.
        let again = recomputed_layers.min(layers);
        let whole_layers = (layers - again) as f64;
        let (whole, left) = (self.costs.whole_bytes() as f64, self.costs.bytes(Leaf::Input) as f64);
        let all_tokens = tokens * at_a_time as f64;
        let parked = plan.parked_bytes();
        let kept_before = match activations {
            Activations::Keep => layers as f64 * whole * all_tokens,
            Activations::Recompute => (again as f64 * left + whole_layers * whole) * all_tokens,
            // The last layer's stays, since it is needed next.
            Activations::Offload if plan.is_last_whole() || plan.comes_late() => whole_layers * whole * all_tokens,
            Activations::Offload => parked + whole_layers * whole * all_tokens,
        };
        // On their way out and back, two layers at a time; the head waits for them. What comes late is part of what the layer makes.
        let on_their_way = if plan.comes_late() { 0.0 } else { 2.0 * parked };
        // What is left of the last layer in any case is among the others'.
        let left = match activations {
            Activations::Offload if plan.is_last_whole() => 0.0,
            Activations::Offload => parked,
            _ => left * tokens,
        };
        let last = plan.last_bytes().map_or(0.0, |bytes| (bytes - left).max(0.0));
        let residual = self.types.residual.size_in_bytes() as f64;
        let others = residual * self.config.hidden_size as f64 * (all_tokens - tokens);
        let head = of_head(&self.costs, self.config.vocab_size, work.batch(), Strips::AsTheyAre) + others;
        // With everything kept nothing is made again.
        let layer = of_layer(&self.costs, work.tokens, activations == Activations::Keep) + others;
        let before_last = if plan.is_last_whole() { (kept_before - left).max(0.0) } else { kept_before };
        WORKSPACE + (kept_before + last + head + waiting[0]).max(before_last + on_their_way + layer + waiting[1])
    }

    /// What a run takes of each GPU, and of the host's memory for each rank; `activations` with how many of the first layers it
    /// is for.
    pub fn estimate(
        &self,
        work: Work,
        activations: (Activations, usize),
        ranks: &RankSettings,
        optimizer: OptimizerKind,
    ) -> Estimate {
        let world = ranks.world_size as u64;
        let stage = if world > 1 { ranks.stage } else { ZeroStage::Replicated };
        let share = |from: ZeroStage, bytes: u64| if stage >= from { bytes.div_ceil(world) } else { bytes };
        let offloads = |place| place != OffloadDevice::None;
        let (params, at_home) = (offloads(ranks.offload.params), offloads(ranks.offload.optimizer));
        let trained = 4 * self.num_trained();
        let state_bytes = match optimizer {
            OptimizerKind::AdamW8bit if at_home => trained / 2,
            OptimizerKind::AdamW | OptimizerKind::AdamW8bit => 2 * trained,
            OptimizerKind::Lion | OptimizerKind::Muon => trained,
        };
        let state = share(ZeroStage::Optimizer, state_bytes);
        let own_gradients = share(ZeroStage::Gradients, trained);
        let passes = stage >= ZeroStage::Gradients || at_home;
        let frozen: u64 = self.frozen.iter().sum();
        let is_away = params || stage == ZeroStage::Parameters;
        let values_come = stage == ZeroStage::Parameters || (params && at_home);
        // Of what comes for a visit, the block that computes and the one after it are there.
        let size = |block: usize| {
            let values = if values_come { self.read[block] } else { 0 };
            (if is_away { self.frozen[block] } else { 0 }) + values
        };
        let layers = self.config.num_hidden_layers;
        // More of them where that is asked for, the values counted as if all blocks had as many bytes a value.
        let all_that_comes = (1..=layers + 1).map(size).sum::<u64>() as f64;
        let values = self.config.num_parameters().max(1);
        let live = ranks.offload.max_live_parameters.unwrap_or(0).min(values);
        let asked = all_that_comes * live as f64 / values as f64;
        let waiting =
            [size(layers + 1) + size(layers), size(layers) + size(layers - 1)].map(|bytes| (bytes as f64).max(asked));
        // With trained weights as large as the model it is block by block; else as the engine's order has it.
        let largest_layer = |size: &dyn Fn(usize) -> u64| (1..=layers).map(size).max().unwrap_or(0);
        let frozen_layer = if is_away { largest_layer(&|block| self.frozen[block]) } else { 0 };
        let values_layer = if values_come { largest_layer(&|block| self.read[block]) } else { 0 };
        let [own_frozen, own_values] = [frozen_layer.div_ceil(world), share(ZeroStage::Optimizer, values_layer)];
        let bytes = LayerBytes {
            from_host: (if params { own_frozen } else { 0 } + if at_home { own_values } else { 0 }) as usize,
            from_ranks: (frozen_layer + values_layer - own_frozen - own_values) as usize,
        };
        // Of tokens that attend to few others: those compute the least while a layer comes.
        let least = BatchSize { pairs: 0, ..work.batch() };
        let at_a_time = self.planned(activations).group_size(least, bytes, &Rates::H200).min(work.micro_batches);
        let inputs = (self.costs.bytes(Leaf::Input) * layers * work.tokens * work.micro_batches) as f64;
        // Through host memory ranks gather one block after the other.
        let comes_alone = bytes.from_ranks > 0 && exchanging(ranks) == 1;
        let is_breadth_first = work.micro_batches > 1 && (comes_alone || (passes && trained as f64 > inputs));
        let at_a_time = if is_breadth_first { work.micro_batches } else { at_a_time };
        let plan = self.plan(work, activations, at_a_time, &Rates::H200);
        let activations_at_most = self.activations(&plan, work, activations, at_a_time, waiting) as u64;
        let is_whole_step = is_breadth_first || work.micro_batches == at_a_time;
        let own_at_device = if at_home { 0 } else { own_gradients };
        let [gradients, kept_gradients] = if passes {
            [self.passing_gradients(is_whole_step, activations_at_most) + own_at_device, own_at_device]
        } else {
            [trained + 4 * self.shared; 2]
        };
        let own_frozen = if stage == ZeroStage::Parameters { frozen.div_ceil(world) } else { frozen };
        let weights = if params { 0 } else { own_frozen };
        let read: u64 = self.read.iter().sum();
        let values = match (values_come, at_home) {
            (true, true) => 0,
            (true, false) => trained.div_ceil(world),
            (false, true) => read,
            (false, false) => trained,
        };
        let own_values = share(ZeroStage::Optimizer, trained);
        // What comes for visits other than in f32 waits as it comes.
        let own_read = share(ZeroStage::Optimizer, self.rounded().sum());
        let reference = match (work.has_reference, at_home) {
            (false, _) => [0, 0],
            (true, true) => [0, own_values + own_read],
            (true, false) => [values, 0],
        };
        let packed = if at_home && values_come { own_read } else { 0 };
        // What waits is cut over ranks in every stage.
        let own_params = if params { frozen.div_ceil(world) } else { 0 };
        let own_state = if at_home { state + own_values + packed + reference[1] } else { 0 };
        let in_files = |place: OffloadDevice, bytes: u64| if place == OffloadDevice::Nvme { bytes } else { 0 };
        let files = in_files(ranks.offload.params, own_params) + in_files(ranks.offload.optimizer, own_state);
        let host = self.table + own_params + own_state - files
            + if at_home { own_gradients } else { 0 }
            + if at_home { self.rounding(ranks, stage) } else { 0 }
            + self.staged(ranks, [own_params, own_state]);
        let rollout = self.rollout(work.rollouts, at_home || values_come);
        let is_rollout = work.rollouts.at_once > 0;
        // While it generates all weights are there, and a step's own. One rank alone can have them come for each step.
        let gathered = if is_away { frozen - weights } else { 0 } + if values_come { read } else { 0 };
        let working = |steps| {
            let beside = rollout.adapters + if world > 1 { gathered } else { 0 };
            if is_rollout { steps + beside } else { 0 }
        };
        Estimate {
            weights,
            trained: values + reference[0],
            gradients,
            optimizer: if at_home { 0 } else { state },
            activations: activations_at_most,
            kept_gradients,
            kv_cache: if is_rollout { rollout.cache + if world > 1 { 0 } else { gathered } } else { 0 },
            least_cache: rollout.least_cache
                + if is_rollout && world == 1 { gathered.min(waiting[0].max(waiting[1]) as u64) } else { 0 },
            rollout: working(rollout.steps),
            least_rollout: working(rollout.least_steps),
            context: context_bytes(ranks),
            host,
            files,
        }
    }

    /// Host memory that `waiting` parameters and optimizer's state pass through from and to files: of each of the two, as many
    /// neighbouring blocks as may be on their way.
    fn staged(&self, ranks: &RankSettings, waiting: [u64; 2]) -> u64 {
        let places = [ranks.offload.params, ranks.offload.optimizer];
        let of = |((blocks, waiting), place): ((&Vec<u64>, u64), OffloadDevice)| {
            let count = ranks.offload.buffer_count.clamp(1, blocks.len());
            let most = blocks.windows(count).map(|some| some.iter().sum::<u64>()).max().unwrap_or(0);
            let share = most as f64 / blocks.iter().sum::<u64>().max(1) as f64;
            if place == OffloadDevice::Nvme { (share * waiting as f64) as u64 } else { 0 }
        };
        [&self.frozen, &self.trained].into_iter().zip(waiting).zip(places).map(of).sum()
    }

    /// Gradients that take memory from the first of a step until they are final, at the moment that takes most with `activations`:
    /// those of one block at a time where a step goes through the blocks once, and a tied head's beside them.
    fn passing_gradients(&self, is_whole_step: bool, activations: u64) -> u64 {
        let one_block = || {
            let later = self.trained[1..].iter().max().copied().unwrap_or(0);
            // Those of the embedding come last, when there are no activations any more.
            (4 * later).max((4 * self.trained[0]).saturating_sub(activations))
        };
        4 * self.shared + if is_whole_step { one_block() } else { 4 * self.num_trained() }
    }

    /// Bytes of the trained values of each block of which some are rounded.
    fn rounded(&self) -> impl Iterator<Item = u64> {
        self.read.iter().zip(&self.trained).filter(|(read, trained)| **read < 4 * **trained).map(|(read, _)| *read)
    }

    /// Host memory that values which are rounded pass through on their way to where blocks compute: of the largest blocks.
    fn rounding(&self, ranks: &RankSettings, stage: ZeroStage) -> u64 {
        let mut all: Vec<u64> = self.rounded().collect();
        all.sort_unstable();
        let most: u64 = all.iter().rev().take(ranks.offload.buffer_count).sum();
        if stage >= ZeroStage::Optimizer { most.div_ceil(ranks.world_size as u64) } else { most }
    }

    /// Whether an adapter is trained, and not all weights.
    pub fn has_adapter(&self) -> bool {
        self.has_adapter
    }
}

#[cfg(test)]
#[path = "estimate_tests.rs"]
mod tests;
