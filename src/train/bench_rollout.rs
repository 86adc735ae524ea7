//! How fast a rollout is: whole rollouts of a model of random weights, against the bytes that its steps have to read.

use std::time::Instant;

use anyhow::bail;
use candle_core::{DType, Tensor};

use super::bench::{Bench, Work};
use crate::config::settings::SamplingSettings;
use crate::device::empty;
use crate::engine::Engine;
use crate::rng::Stream;
use crate::rollout::forward::{EngineModel, kv_shape};
use crate::rollout::{Caller, Request, Rollout, RolloutSettings, Statistics};

/// Bytes of a copy that measures what the memory gives.
const COPIED: usize = 1 << 30;

/// What was measured.
#[derive(Clone, Debug)]
pub struct MeasuredRollout {
    /// Prompts, samples and lengths.
    pub work: Work,
    /// Seconds of each rollout, from nothing to all completions.
    pub rollout_secs: Vec<f64>,
    /// Counts and times of the fastest.
    pub statistics: Statistics,
    /// Bytes that its decoding steps read at least: weights once a step, keys and values of each sequence.
    pub decode_bytes: f64,
    /// Bytes a second that the device's memory gives.
    pub bandwidth: f64,
    /// Whether decoding steps were recorded and repeated.
    pub is_recorded: bool,
    /// Most device memory in use, bytes; 0 on the CPU.
    pub peak_bytes: u64,
}

impl MeasuredRollout {
    /// Seconds of the fastest rollout.
    pub fn secs(&self) -> f64 {
        self.rollout_secs.iter().copied().fold(f64::INFINITY, f64::min)
    }

    /// Tokens a second while decoding.
    pub fn decode_rate(&self) -> f64 {
        self.statistics.decode_tokens as f64 / (self.statistics.decode_secs + self.statistics.sampling_secs)
    }

    /// Seconds that the decoding steps take at least.
    pub fn floor_secs(&self) -> f64 {
        self.decode_bytes / self.bandwidth
    }
}

impl Bench {
    /// Measures rollouts of `work`, which is groups of completions that all reach their length; with `max_num_seqs` sequences at
    /// a time.
    ///
    /// # Errors
    /// If the work is no groups, does not fit the model, or a step fails.
    pub fn rollout(&mut self, work: Work, max_num_seqs: usize, temperature: f64) -> anyhow::Result<MeasuredRollout> {
        let Work::Groups { prompts, samples, prompt_tokens, completion_tokens } = work else {
            bail!("`{work}`: a rollout is PROMPTSxSAMPLESxPROMPT+COMPLETION, e.g. 4x4x128+256");
        };
        if completion_tokens < 2 {
            bail!("`{work}`: a completion's first token comes of its prompt; decoding begins with two");
        }
        let (engine, settings) = (self.engine(), self.settings());
        if engine.store().sharing().world_size() > 1 {
            bail!("`--rollout` measures one rank; leave `--num-processes` out");
        }
        let vocabulary = engine.config().vocab_size as u64;
        let requests: Vec<Request> = (0..prompts * samples)
            .map(|sample| {
                let group = sample / samples;
                let mut stream = Stream::new(settings.seed, "bench prompts", 0, group as u64);
                let prompt_ids = (0..prompt_tokens).map(|_| stream.below(vocabulary) as u32).collect();
                Request { sample_id: sample as u64, prompt_ids, group }
            })
            .collect();
        let limits = RolloutSettings {
            max_num_seqs,
            max_batch_tokens: RolloutSettings::batch_tokens(engine.device()).max(max_num_seqs),
            kv_cache_bytes: usize::MAX,
            max_new_tokens: completion_tokens,
            eos_token_ids: Vec::new(),
        };
        let mut rollout = Rollout::new(limits)?;
        let sampling = SamplingSettings { temperature, ..SamplingSettings::default() };
        let mut model = EngineModel::new(engine, true)?.recorded()?;
        let (mut rollout_secs, mut best): (Vec<f64>, Option<Statistics>) = (Vec::new(), None);
        self.reset_peak()?;
        for round in 0..=settings.steps as u64 {
            let mut caller = Caller { on_event: &mut |_| (), is_cancelled: &|| false, detokenize: None };
            let started = Instant::now();
            rollout.generate(&mut model, &requests, &sampling, settings.seed, round, &mut caller)?;
            let secs = started.elapsed().as_secs_f64();
            // The first one loads kernels and records steps.
            if round > 0 {
                if rollout_secs.iter().all(|&other| secs < other) {
                    best = Some(rollout.statistics());
                }
                rollout_secs.push(secs);
            }
        }
        let (peak_bytes, _) = self.memory()?;
        let waves = (prompts * samples).div_ceil(max_num_seqs) as f64;
        let token_bytes = kv_shape(engine).page_bytes() as f64 / crate::rollout::PAGE_TOKENS as f64;
        // A completion's first token comes of its prompt.
        let steps = (completion_tokens - 1) as f64;
        let contexts = steps * f64::midpoint(2.0 * prompt_tokens as f64, steps + 1.0);
        let decode_bytes =
            waves * steps * model.weight_bytes() as f64 + (prompts * samples) as f64 * contexts * token_bytes;
        Ok(MeasuredRollout {
            work,
            rollout_secs,
            statistics: best.unwrap_or_default(),
            decode_bytes,
            bandwidth: bandwidth(engine)?,
            is_recorded: model.is_recorded(),
            peak_bytes,
        })
    }
}

/// Bytes a second of a large copy, read and written.
fn bandwidth(engine: &Engine) -> anyhow::Result<f64> {
    let device = engine.device();
    let from = if device.is_cuda() {
        empty(device, COPIED / 4, DType::F32)?
    } else {
        Tensor::zeros(COPIED / 16, DType::F32, device)?
    };
    let bytes = 2 * 4 * from.elem_count();
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        device.synchronize()?;
        let started = Instant::now();
        let _copy = from.copy()?;
        device.synchronize()?;
        best = best.min(started.elapsed().as_secs_f64());
    }
    Ok(bytes as f64 / best)
}
