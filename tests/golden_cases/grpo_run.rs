//! A whole GRPO run of TRL on a tiny model, micro-batch by micro-batch: log-probabilities, losses, weights.

use std::path::Path;

use anyhow::Context;
use serde_json::Value;
use trainer::algo::{GrpoBatch, GrpoInputs, GrpoLossSettings, GrpoOutput, grpo_loss};
use trainer::config::settings::{
    GrpoLossType, ImportanceSamplingLevel, LrSchedulerType, OptimizerKind, OptimizerSettings, VespoSettings,
};
use trainer::model::HeadGradient;
use trainer::model::batch::{Batch, BatchBuilder};
use trainer::ops::{buffer, head};
use trainer::optim::LrSchedule;
use trainer::zero::ShardedOptimizer;

use crate::model_files::{Tensors, engine, name};
use crate::report::{Report, max_difference};

/// As the group's README advises for the first micro-batch; each step of Adam adds to it.
const LOSS: f64 = 1e-4;
const LOGPS: f64 = 1e-4;
const GRAD_NORM: f64 = 1e-3;
/// A learning rate is a few f64 operations in both.
const LEARNING_RATE_RELATIVE: f64 = 1e-9;

/// Settings of the recorded run.
struct Config {
    loss: GrpoLossSettings,
    optimizer: OptimizerSettings,
    learning_rate: f64,
    schedule: LrSchedule,
    max_grad_norm: f64,
    temperature: f64,
    steps: usize,
    accumulation: usize,
    steps_per_generation: usize,
}

impl Config {
    fn read(run: &Value) -> anyhow::Result<Self> {
        let (config, resolved) = (&run["config"], &run["config"]["resolved"]);
        let number = |key: &str| {
            let value = resolved.get(key).or_else(|| config.get(key));
            value.and_then(Value::as_f64).with_context(|| format!("no number `{key}`"))
        };
        let loss_type: GrpoLossType = config["loss_type"].as_str().and_then(|t| t.parse().ok()).context("loss_type")?;
        let (learning_rate, steps) = (number("learning_rate")?, number("steps")? as usize);
        Ok(Self {
            loss: GrpoLossSettings {
                loss_type,
                importance_sampling_level: ImportanceSamplingLevel::Token,
                beta: number("beta")?,
                use_bias_correction_kl: resolved["use_bias_correction_kl"]
                    .as_bool()
                    .context("use_bias_correction_kl")?,
                epsilon: number("epsilon")?,
                epsilon_high: number("epsilon_high")?,
                delta: None,
                top_entropy_quantile: 1.0,
                entropy_coef: 0.0,
                is_entropy_adaptive: false,
                off_policy_mask_threshold: None,
                sapo_temperature_neg: 1.05,
                sapo_temperature_pos: 1.0,
                vespo: VespoSettings { k_pos: 2.0, lambda_pos: 3.0, k_neg: 3.0, lambda_neg: 2.0 },
                max_completion_length: number("max_completion_length")? as usize,
            },
            optimizer: OptimizerSettings {
                kind: OptimizerKind::AdamW,
                weight_decay: number("weight_decay")?,
                adam_beta1: number("adam_beta1")?,
                adam_beta2: number("adam_beta2")?,
                adam_epsilon: number("adam_epsilon")?,
            },
            learning_rate,
            schedule: schedule(config, learning_rate, steps)?,
            max_grad_norm: number("max_grad_norm")?,
            temperature: number("temperature")?,
            steps,
            accumulation: number("gradient_accumulation_steps")? as usize,
            steps_per_generation: number("steps_per_generation")? as usize,
        })
    }
}

/// The schedule of the recorded run; its name may be written as Python prints transformers' enum (`SchedulerType.COSINE`).
fn schedule(config: &Value, learning_rate: f64, steps: usize) -> anyhow::Result<LrSchedule> {
    let value = |key: &str| config["resolved"].get(key).or_else(|| config.get(key)).filter(|value| !value.is_null());
    let name = value("lr_scheduler_type").and_then(Value::as_str).unwrap_or("linear");
    let word = name.rsplit('.').next().unwrap_or(name).to_lowercase();
    let kind: LrSchedulerType = word.parse().ok().with_context(|| format!("no schedule `{name}`"))?;
    let share = |key: &str| value(key).and_then(Value::as_f64).unwrap_or(0.0);
    let warmup = match (share("warmup_steps"), share("warmup_ratio")) {
        (count, _) if count >= 1.0 => count,
        (share, ratio) => (steps as f64 * share.max(ratio)).ceil(),
    };
    let arguments = value("lr_scheduler_kwargs").and_then(Value::as_object).cloned().unwrap_or_default();
    Ok(LrSchedule::new(kind, learning_rate, warmup as usize, steps, &arguments)?)
}

pub(crate) fn run(folder: &Path, report: &mut Report) -> anyhow::Result<()> {
    let case = name(folder);
    let run: Value = serde_json::from_slice(&std::fs::read(folder.join("run.json"))?)?;
    let config = Config::read(&run)?;
    let io = Tensors::read(&folder.join("io.safetensors"))?;
    let weights = Tensors::read(&folder.join("weights_after_step.safetensors"))?;
    let engine = engine(folder, None, None, true)?;
    let mut optimizer = ShardedOptimizer::new(config.optimizer, engine.store())?;
    let logs = run["logs"].as_array().context("logs")?;
    for step in 0..config.steps {
        let slack = 1.0 + step as f64;
        let micro_steps = step * config.accumulation..(step + 1) * config.accumulation;
        let recorded: Vec<Recorded> =
            micro_steps.clone().map(|micro| Recorded::read(&io, micro)).collect::<anyhow::Result<_>>()?;
        let batches: Vec<Batch> = recorded.iter().map(|one| one.batch.clone()).collect();
        let mut found = Vec::new();
        engine.accumulate(&batches, config.temperature, None, &mut |index: usize, head: &head::Output| {
            let output = recorded[index].loss(head, &config)?;
            let gradient = HeadGradient { d_logprobs: output.d_logprobs.clone(), ..HeadGradient::default() };
            found.push((max_difference(&head.logprobs, &recorded[index].expected), output.loss));
            Ok::<_, anyhow::Error>(gradient)
        })?;
        for (micro, (logp_error, loss)) in micro_steps.zip(found) {
            let label = format!("{case} micro {micro}");
            report.check(&format!("{label} logps"), logp_error, LOGPS * slack);
            let expected = f64::from(io.floats(&format!("micro{micro}.loss"))?[0]);
            report.check(&format!("{label} loss"), (loss - expected).abs(), LOSS * slack);
        }
        let lr = config.schedule.lr(step as u64);
        let expected = logs[step]["learning_rate"].as_f64().context("learning_rate")?;
        let label = format!("{case} step {} learning rate", step + 1);
        report.check(&label, (lr - expected).abs(), LEARNING_RATE_RELATIVE * config.learning_rate);
        let done = optimizer.step(engine.store(), lr, config.max_grad_norm, 1.0)?;
        let expected = logs[step]["grad_norm"].as_f64().context("grad_norm")?;
        let error = (f64::from(done.grad_norm) - expected).abs() / expected;
        report.check(&format!("{case} step {} grad norm", step + 1), error, GRAD_NORM * slack);
        let tolerance = 1e-5 * slack + 1e-3 * config.learning_rate * slack;
        for flat in engine.store().flats() {
            let values = buffer::to_vec(&flat.values()?)?;
            for entry in flat.entries() {
                let expected = weights.floats(&format!("step{}.{}", step + 1, entry.name))?;
                let error = max_difference(&values[entry.range.clone()], &expected);
                report.check(&format!("{case} step {} {}", step + 1, entry.name), error, tolerance);
            }
        }
    }
    Ok(())
}

/// A recorded micro-batch.
struct Recorded {
    batch: Batch,
    row_starts: Vec<usize>,
    old: Option<Vec<f32>>,
    reference: Option<Vec<f32>>,
    /// Log-probabilities.
    expected: Vec<f32>,
    num_items: usize,
    advantages: Vec<f32>,
}

impl Recorded {
    fn read(io: &Tensors, micro: usize) -> anyhow::Result<Self> {
        let field = |part: &str| format!("micro{micro}.{part}");
        let (prompts, prompt_mask) = (io.integers(&field("prompt_ids"))?, io.integers(&field("prompt_mask"))?);
        let (completions, mask) = (io.integers(&field("completion_ids"))?, io.integers(&field("completion_mask"))?);
        let unmasked = |ids: &[i64], mask: &[i64]| -> Vec<u32> {
            ids.iter().zip(mask).filter(|(_, m)| **m == 1).map(|(i, _)| *i as u32).collect()
        };
        // The values of unmasked completion tokens, row by row.
        let tokens_of = |part: &str| -> anyhow::Result<Option<Vec<f32>>> {
            if !io.has(&field(part)) {
                return Ok(None);
            }
            let values = io.floats(&field(part))?;
            Ok(Some(values.iter().zip(mask.iter().flatten()).filter(|(_, m)| **m == 1).map(|(v, _)| *v).collect()))
        };
        let mut builder = BatchBuilder::new();
        let mut row_starts = vec![0];
        for row in 0..prompts.len() {
            let prompt = unmasked(&prompts[row], &prompt_mask[row]);
            let completion = unmasked(&completions[row], &mask[row]);
            let sequence = [prompt.as_slice(), &completion].concat();
            let rows = builder.push(&sequence, row as u64);
            for (index, &token) in completion.iter().enumerate() {
                builder.predict(rows.start + prompt.len() - 1 + index, token);
            }
            row_starts.push(row_starts[row] + completion.len());
        }
        Ok(Self {
            batch: builder.build()?,
            row_starts,
            old: tokens_of("old_per_token_logps")?,
            reference: tokens_of("ref_per_token_logps")?,
            expected: tokens_of("logps")?.context("logps")?,
            num_items: io.integers(&field("num_items_in_batch"))?[0][0] as usize,
            advantages: io.floats(&field("advantages"))?,
        })
    }

    fn loss(&self, head: &head::Output, config: &Config) -> anyhow::Result<GrpoOutput> {
        let ones = vec![1; self.expected.len()];
        let inputs = GrpoInputs {
            row_starts: &self.row_starts,
            logprobs: &head.logprobs,
            old_logprobs: self.old.as_deref(),
            ref_logprobs: self.reference.as_deref(),
            sampling_logprobs: None,
            entropies: Some(&head.entropies),
            mask: &ones,
            tool_mask: None,
            advantages: &self.advantages,
            importance_ratio: None,
            entropy_threshold: None,
            batch: GrpoBatch {
                num_items_in_batch: self.num_items,
                num_processes: 1,
                gradient_accumulation_steps: config.accumulation,
                steps_per_generation: config.steps_per_generation,
                is_training: true,
            },
        };
        Ok(grpo_loss(&inputs, &config.loss)?)
    }
}
