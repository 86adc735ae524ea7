//! How fast a step is and what it is made of: whole steps on a model of a given shape, against the floor that the shape
//! sets.
//!
//! Weights are random: speed and memory depend on shapes, not on values, and random 4-bit codes are as evenly spread as
//! those of a trained model. A step is what the loops do: forward, head, backward, clipping, AdamW.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, bail};

use super::tuning::Tuning;
use super::{Backend, card_rates};
use crate::config::settings::{LoraSettings, ModuleSet, OptimizerKind, OptimizerSettings};
use crate::engine::{self, Activations, BatchSize, Engine, Order, Parked, Plan, Rates, StepLoss};
use crate::model::HeadGradient;
use crate::model::ModelConfig;
use crate::model::batch::{Batch, BatchBuilder};
use crate::model::load::{RandomStorage, random_packed};
use crate::ops::head;
use crate::rng::Stream;
use crate::zero::{Offload, ParamStore, ShardedOptimizer, Sharing};

/// AdamW as transformers sets it.
const OPTIMIZER: OptimizerSettings = OptimizerSettings {
    kind: OptimizerKind::AdamW,
    weight_decay: 0.0,
    adam_beta1: 0.9,
    adam_beta2: 0.999,
    adam_epsilon: 1e-8,
};

/// Sequences of one micro-batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// SFT: this many sequences of this many tokens, every token a target.
    Sequences {
        /// How many.
        count: usize,
        /// Tokens of each.
        tokens: usize,
    },
    /// GRPO's training phase: groups of completions that share their prompt.
    Groups {
        /// Prompts.
        prompts: usize,
        /// Completions of each.
        samples: usize,
        /// Tokens of a prompt.
        prompt_tokens: usize,
        /// Tokens of a completion.
        completion_tokens: usize,
    },
}

impl std::str::FromStr for Work {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "`{text}`: expected SEQUENCESxTOKENS, e.g. 4x2048, or PROMPTSxSAMPLESxPROMPT+COMPLETION, e.g. 4x4x128+256"
            )
        };
        let number = |text: &str| text.parse::<usize>().ok().filter(|&n| n > 0).ok_or_else(wrong);
        let parts: Vec<&str> = text.split('x').collect();
        match parts.as_slice() {
            [count, tokens] => Ok(Self::Sequences { count: number(count)?, tokens: number(tokens)? }),
            [prompts, samples, lengths] => {
                let (prompt, completion) = lengths.split_once('+').ok_or_else(wrong)?;
                Ok(Self::Groups {
                    prompts: number(prompts)?,
                    samples: number(samples)?,
                    prompt_tokens: number(prompt)?,
                    completion_tokens: number(completion)?,
                })
            }
            _ => Err(wrong()),
        }
    }
}

impl std::fmt::Display for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sequences { count, tokens } => write!(f, "{count}x{tokens}"),
            Self::Groups { prompts, samples, prompt_tokens, completion_tokens } => {
                write!(f, "{prompts}x{samples}x{prompt_tokens}+{completion_tokens}")
            }
        }
    }
}

impl Work {
    /// A batch of random tokens.
    fn batch(self, vocabulary: usize, seed: u64) -> anyhow::Result<Batch> {
        let mut builder = BatchBuilder::new();
        let draw = |count: usize, item: u64| -> Vec<u32> {
            let mut stream = Stream::new(seed, "bench tokens", 0, item);
            (0..count).map(|_| stream.below(vocabulary as u64) as u32).collect()
        };
        match self {
            Self::Sequences { count, tokens } => {
                for item in 0..count as u64 {
                    let rows = builder.push(&draw(tokens, item), item);
                    builder.predict_within(rows);
                }
            }
            Self::Groups { prompts, samples, prompt_tokens, completion_tokens } => {
                for prompt in 0..prompts as u64 {
                    let rows = builder.push(&draw(prompt_tokens, prompt), prompt);
                    for sample in 0..samples as u64 {
                        let item = (prompt + 1) << 32 | sample;
                        let completion = draw(completion_tokens, item);
                        builder.predict(rows.end - 1, completion[0]);
                        let inputs = builder.push_after(rows.clone(), &completion[..completion_tokens - 1], item);
                        for (row, &target) in inputs.zip(&completion[1..]) {
                            builder.predict(row, target);
                        }
                    }
                }
            }
        }
        Ok(builder.build()?)
    }

    /// Tokens as users count them: with a prompt for each of its completions.
    fn tokens(self) -> usize {
        match self {
            Self::Sequences { count, tokens } => count * tokens,
            Self::Groups { prompts, samples, prompt_tokens, completion_tokens } => {
                prompts * samples * (prompt_tokens + completion_tokens)
            }
        }
    }
}

/// How to measure.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The adapter, which is what is trained.
    pub lora: LoraSettings,
    /// How the random weights are stored.
    pub weights: RandomStorage,
    /// Steps before the clock starts.
    pub warmup: usize,
    /// Steps measured.
    pub steps: usize,
    /// What becomes of activations between forward and backward.
    pub activations: Activations,
    /// Micro-batches of a step.
    pub micro_batches: usize,
    /// Try several algorithms for each product and keep the fastest.
    pub tune: bool,
    /// Seed of weights and tokens.
    pub seed: u64,
    /// What waits in host memory.
    pub offload: Offload,
}

/// An adapter of rank `r` on all projections, `alpha = 2 r`, without dropout.
pub fn lora(r: usize) -> LoraSettings {
    LoraSettings {
        r,
        alpha: 2.0 * r as f64,
        dropout: 0.0,
        target_modules: ModuleSet::AllLinear,
        modules_to_save: vec![],
        use_rslora: false,
        use_dora: false,
    }
}

/// What was measured.
#[derive(Clone, Debug)]
pub struct Measured {
    /// The work of a micro-batch.
    pub work: Work,
    /// Micro-batches of a step.
    pub micro_batches: usize,
    /// The order in which they pass through the blocks.
    pub order: Order,
    /// Seconds of each step.
    pub step_secs: Vec<f64>,
    /// Tokens of a step, as users count them.
    pub tokens: usize,
    /// Seconds of one more step by phase; empty on the CPU.
    pub phases: BTreeMap<String, f64>,
    /// Seconds of the floor: the multiplies at the rate that this device reached on a large product.
    pub floor_secs: f64,
    /// Most device memory in use, bytes; 0 on the CPU.
    pub peak_bytes: u64,
    /// What the process holds of the device's memory, bytes; 0 on the CPU.
    pub device_bytes: u64,
    /// Frozen weights that waited in host memory, bytes; 0 on the CPU.
    pub host_bytes: u64,
    /// What became of the activations of the first micro-batch.
    pub plan: Option<Plan>,
}

impl Measured {
    /// Median seconds of a step.
    pub fn median_secs(&self) -> f64 {
        let mut sorted = self.step_secs.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
    }
}

/// A model of random weights, ready to be measured.
pub struct Bench {
    engine: Engine,
    optimizer: ShardedOptimizer,
    settings: Settings,
    tuning: Option<Tuning>,
    /// Steps made so far, measured or not.
    num_steps: u64,
    /// FLOP/s of a large product.
    pub peak_flops: f64,
}

impl Bench {
    /// Makes the model that `config` describes (a `config.json` or its folder), of random packed weights, as far as this rank of
    /// `sharing` keeps it.
    ///
    /// # Errors
    /// If the configuration is unusable or memory runs out.
    pub fn new(config: &Path, backend: &Backend, sharing: Sharing, settings: Settings) -> anyhow::Result<Self> {
        let mut loaded = random_packed(config, &settings.lora, settings.seed, settings.weights)
            .with_context(|| format!("cannot make a model of `{}`", config.display()))?;
        if !backend.device.is_cpu() {
            loaded.keep_embedding_on_host();
        }
        let is_first = sharing.ranks().is_first();
        let rates = card_rates::of_run(backend, &sharing, None, !settings.tune, &|_| ())?;
        let tuning = Tuning::new(backend, !settings.tune, is_first)?;
        let blocks = loaded.blocks.map(|block| block.map_err(anyhow::Error::from));
        let store = ParamStore::placed(blocks, &backend.device, sharing, settings.offload.clone())?;
        let engine = Engine::new(loaded.config, loaded.adapter, store, backend.types, settings.activations);
        let optimizer = ShardedOptimizer::new(OPTIMIZER, engine.store())?;
        if let Some(rates) = rates {
            engine.set_rates(rates);
        }
        let peak_flops = peak_flops(backend)?;
        Ok(Self { engine, optimizer, settings, tuning, num_steps: 0, peak_flops })
    }

    pub(super) fn engine(&self) -> &Engine {
        &self.engine
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The model's sizes.
    pub fn config(&self) -> &ModelConfig {
        self.engine.config()
    }

    /// The rates by which activations are planned.
    pub fn rates(&self) -> Rates {
        self.engine.rates()
    }

    /// Changes what becomes of activations.
    pub fn set_activations(&mut self, activations: Activations) {
        self.settings.activations = activations;
        self.engine.set_activations(activations);
    }

    /// What waits in host memory where activations are offloaded; `None` leaves it to the plan.
    pub fn force_parked(&mut self, parked: Option<Parked>) {
        self.engine.force_parked(parked);
    }

    /// The order of a step's micro-batches; `None` leaves it to the engine.
    pub fn force_order(&mut self, order: Option<Order>) {
        self.engine.force_order(order);
    }

    /// Measures steps of `work`. Algorithms of new products are tried before, which `say` announces.
    ///
    /// # Errors
    /// If a step fails.
    pub fn measure(&mut self, work: Work, say: &dyn Fn(&str)) -> anyhow::Result<Measured> {
        let config = self.engine.config();
        let longest = match work {
            Work::Sequences { tokens, .. } => tokens,
            Work::Groups { prompt_tokens, completion_tokens, .. } => prompt_tokens + completion_tokens,
        };
        if longest > config.max_position_embeddings {
            bail!("`{work}`: the model holds {} tokens", config.max_position_embeddings);
        }
        let micro_batches = self.settings.micro_batches;
        let batch = |index: usize| work.batch(config.vocab_size, self.settings.seed + index as u64);
        let step: Vec<Batch> = (0..micro_batches).map(batch).collect::<anyhow::Result<_>>()?;
        // Without a step no product is known.
        let warmup = self.settings.warmup.max(usize::from(self.tuning.is_some() && self.settings.tune));
        for _ in 0..warmup {
            self.step(&step, work)?;
            if let Some(tuning) = &mut self.tuning {
                tuning.after_step(self.num_steps, say, &|| false)?;
            }
        }
        self.synchronize()?;
        self.reset_peak()?;
        let sharing = self.engine.store().sharing().clone();
        let mut step_secs = Vec::with_capacity(self.settings.steps);
        for _ in 0..self.settings.steps {
            sharing.ranks().barrier()?;
            let started = Instant::now();
            self.step(&step, work)?;
            self.synchronize()?;
            sharing.ranks().barrier()?;
            step_secs.push(started.elapsed().as_secs_f64());
        }
        let (peak_bytes, device_bytes) = self.memory()?;
        let phases = self.phases(&step, work)?;
        let order = self.engine.order_of(&step)?;
        let floor: f64 = step.iter().map(|batch| floor_flops(&self.engine, batch, (step.len(), order), work)).sum();
        let floor_secs = floor / self.peak_flops;
        let plan = step.first().map(|batch| plan_of(&self.engine, batch, (step.len(), order), work));
        let tokens = micro_batches * work.tokens() * sharing.world_size();
        let store = self.engine.store();
        let host_bytes = if store.device().is_cuda() { store.offloaded_bytes() as u64 } else { 0 };
        Ok(Measured {
            work,
            micro_batches,
            order,
            step_secs,
            tokens,
            phases,
            floor_secs,
            peak_bytes,
            device_bytes,
            host_bytes,
            plan,
        })
    }

    /// One optimizer step: what the loops do, with a loss whose gradient is `-1 / R` for every target.
    fn step(&mut self, step: &[Batch], work: Work) -> anyhow::Result<()> {
        self.num_steps += 1;
        let loss = &mut Known { work, counts: step.iter().map(|batch| batch.targets.len()).collect() };
        self.engine.accumulate::<engine::Error>(step, 1.0, None, loss)?;
        let report = self.optimizer.step(self.engine.store(), 1e-5, 1.0, 1.0)?;
        if report.is_skipped {
            bail!("a gradient of the measured step is not finite (norm {})", report.grad_norm);
        }
        Ok(())
    }

    fn synchronize(&self) -> anyhow::Result<()> {
        Ok(self.engine.device().synchronize()?)
    }

    pub(super) fn reset_peak(&self) -> anyhow::Result<()> {
        if self.engine.device().is_cuda() {
            crate::device::reset_peak(self.engine.device())?;
        }
        Ok(())
    }

    pub(super) fn memory(&self) -> anyhow::Result<(u64, u64)> {
        if !self.engine.device().is_cuda() {
            return Ok((0, 0));
        }
        let pool = crate::device::memory_use(self.engine.device())?;
        Ok((pool.peak, crate::device::device_memory_used()?))
    }

    fn phases(&mut self, step: &[Batch], work: Work) -> anyhow::Result<BTreeMap<String, f64>> {
        if !self.engine.device().is_cuda() {
            return Ok(BTreeMap::new());
        }
        let queue = crate::device::Queue::of(self.engine.device())?;
        let mut timed = || {
            self.synchronize()?;
            let started = Instant::now();
            queue.start_timing();
            self.step(step, work)?;
            let by_phase = queue.stop_timing()?;
            Ok::<_, anyhow::Error>((started.elapsed().as_secs_f64(), by_phase))
        };
        // The shortest of three, for another process may have been at work in the others.
        let mut shortest = timed()?;
        for _ in 1..3 {
            let next = timed()?;
            if next.0 < shortest.0 {
                shortest = next;
            }
        }
        let (all, by_phase) = shortest;
        let mut phases: BTreeMap<String, f64> =
            by_phase.iter().map(|(phase, &secs)| (phase.name().to_string(), secs)).collect();
        phases.insert("rest and gaps".into(), (all - by_phase.values().sum::<f64>()).max(0.0));
        Ok(phases)
    }
}

/// What becomes of the activations of a batch of `work`, one of so many of a step in an order.
fn plan_of(engine: &Engine, batch: &Batch, (micro_batches, order): (usize, Order), work: Work) -> Plan {
    let is_known = matches!(work, Work::Sequences { .. });
    engine.plan(BatchSize::of(batch, is_known), order.at_a_time(micro_batches) == 1)
}

/// FLOPs of the multiplies that a step of a frozen model with an adapter cannot do without: forward and input gradients of
/// the projections and the head, what is computed again, and attention's.
fn floor_flops(engine: &Engine, batch: &Batch, order: (usize, Order), work: Work) -> f64 {
    let config = engine.config();
    let (tokens, rows) = (batch.tokens.len() as f64, batch.targets.len() as f64);
    let layers = config.num_hidden_layers as f64;
    let hidden = config.hidden_size as f64;
    let down = (config.hidden_size * config.intermediate_size) as f64;
    let attention_width = (config.num_attention_heads * config.head_dim) as f64;
    let output = hidden * attention_width;
    let qkv = output + 2.0 * hidden * (config.num_key_value_heads * config.head_dim) as f64;
    let again = plan_of(engine, batch, order, work).computed_again();
    let projections =
        2.0 * (qkv + output + 3.0 * down) + again.gate_up * 2.0 * down + again.qkv * qkv + again.attention * output;
    let pairs = batch.layout.num_pairs() as f64;
    let head = hidden * config.vocab_size as f64;
    let head_passes = if matches!(work, Work::Sequences { .. }) { 2.0 } else { 3.0 };
    2.0 * tokens * layers * projections
        + 4.0 * pairs * attention_width * layers * (1.0 + again.attention + 2.5)
        + 2.0 * rows * head * head_passes
}

/// FLOP/s of a large product in the run's types.
fn peak_flops(backend: &Backend) -> anyhow::Result<f64> {
    let is_cpu = backend.device.is_cpu();
    let (size, repeats) = if is_cpu { (1024, 5) } else { (8192, 20) };
    let host = |name: &str| {
        let mut stream = Stream::new(1, name, 0, 0);
        let row: Vec<f32> = (0..size).map(|_| stream.normal() as f32).collect();
        let values: Vec<f32> = (0..size).flat_map(|i| row[i % 97..].iter().chain(&row[..i % 97]).copied()).collect();
        candle_core::Tensor::from_vec(values, (size, size), &candle_core::Device::Cpu)
    };
    let place = |x: candle_core::Tensor| x.to_dtype(backend.types.compute)?.to_device(&backend.device);
    let (a, b) = (place(host("peak a")?)?, place(host("peak b")?)?);
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        backend.device.synchronize()?;
        let started = Instant::now();
        for _ in 0..repeats {
            a.matmul(&b)?;
        }
        backend.device.synchronize()?;
        best = best.min(started.elapsed().as_secs_f64() / f64::from(repeats));
    }
    Ok(2.0 * (size as f64).powi(3) / best)
}

/// A loss whose gradient is `-1 / R` for every target; as in the loops, cross-entropy's gradient is known before the forward
/// pass and the policy loss's is not.
struct Known {
    work: Work,
    /// Targets of each micro-batch.
    counts: Vec<usize>,
}

impl Known {
    fn of(&self, micro_step: usize) -> HeadGradient {
        let (count, all) = (self.counts[micro_step], self.counts.iter().sum::<usize>());
        HeadGradient { d_logprobs: vec![-1.0 / all as f32; count], ..HeadGradient::default() }
    }
}

impl StepLoss<engine::Error> for Known {
    fn known(&self, micro_step: usize) -> Option<HeadGradient> {
        matches!(self.work, Work::Sequences { .. }).then(|| self.of(micro_step))
    }

    fn gradient(&mut self, micro_step: usize, _head: &head::Output) -> Result<HeadGradient, engine::Error> {
        Ok(self.of(micro_step))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_read_and_written_alike() {
        for text in ["4x2048", "1x1", "4x4x128+256"] {
            assert_eq!(text.parse::<Work>().unwrap().to_string(), text);
        }
        for text in ["", "4", "0x5", "4x", "1x2x3", "1x2x3+0", "ax3"] {
            assert!(text.parse::<Work>().is_err(), "{text}");
        }
    }

    #[test]
    fn prompts_of_a_group_stand_in_the_batch_once() {
        let work: Work = "2x3x5+4".parse().unwrap();
        let batch = work.batch(100, 1).unwrap();
        assert_eq!(batch.tokens.len(), 2 * (5 + 3 * 3));
        assert_eq!(batch.targets.len(), 2 * 3 * 4);
        assert_eq!(work.tokens(), 2 * 3 * 9);
    }
}
