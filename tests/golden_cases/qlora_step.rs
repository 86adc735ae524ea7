//! A few AdamW steps of an adapter over an NF4 base: losses, gradient norms, gradients, weights.

use std::path::Path;

use anyhow::Context;
use serde_json::Value;
use trainer::config::settings::{LrSchedulerType, OptimizerKind, OptimizerSettings, QuantType, Quantization};
use trainer::engine::{self, Engine};
use trainer::model::HeadGradient;
use trainer::ops::{buffer, head};
use trainer::optim::LrSchedule;
use trainer::zero::ShardedOptimizer;

use crate::model_files::{Tensors, engine, folders, name, unpad};
use crate::report::{Report, max_difference};

/// As the group's README advises.
const LOSS: f64 = 1e-5;
const GRAD_NORM: f64 = 1e-5;
const GRADIENT: f64 = 1e-4;

pub(crate) fn run(folder: &Path, report: &mut Report) -> anyhow::Result<()> {
    for case in folders(folder)? {
        let run: Value = serde_json::from_slice(&std::fs::read(case.join("run.json"))?)?;
        let double_quant = run["config"]["dq"].as_bool().context("`dq`")?;
        let quantization = Quantization { quant_type: QuantType::Nf4, double_quant };
        // Quantised here, and quantised by bitsandbytes: both must give the same run.
        for (base, quantization) in [("base", Some(quantization)), ("base_bnb4bit", None)] {
            let label = format!("{} {base}", name(&case));
            let engine = engine(&case.join(base), Some(&case.join("adapter_start")), quantization, true)?;
            check(&engine, &case, &run, &label, report).with_context(|| label.clone())?;
        }
    }
    Ok(())
}

fn check(engine: &Engine, case: &Path, run: &Value, label: &str, report: &mut Report) -> anyhow::Result<()> {
    let io = Tensors::read(&case.join("io.safetensors"))?;
    let config = &run["config"];
    let number = |key: &str| config[key].as_f64().with_context(|| format!("`{key}`"));
    let count = |key: &str| config[key].as_u64().map(|c| c as usize).with_context(|| format!("`{key}`"));
    let settings = OptimizerSettings {
        kind: OptimizerKind::AdamW,
        weight_decay: number("wd")?,
        adam_beta1: run["betas"][0].as_f64().context("betas")?,
        adam_beta2: run["betas"][1].as_f64().context("betas")?,
        adam_epsilon: run["eps"].as_f64().context("eps")?,
    };
    let lr = number("lr")?;
    let schedule =
        LrSchedule::new(LrSchedulerType::Cosine, lr, count("warmup")?, count("total")?, &serde_json::Map::new())?;
    let mut optimizer = ShardedOptimizer::new(settings, engine.store())?;
    let max_grad_norm = run["max_grad_norm"].as_f64().context("max_grad_norm")?;
    for (step, expected) in run["steps"].as_array().context("steps")?.iter().enumerate() {
        let losses = expected["losses"].as_array().context("losses")?;
        let (mut batches, mut targets) = (Vec::new(), Vec::new());
        for micro in 0..losses.len() {
            let prefix = format!("step{step}.micro{micro}");
            let unpadded = unpad(
                &io.integers(&format!("{prefix}.input_ids"))?,
                &io.integers(&format!("{prefix}.attention_mask"))?,
            )?;
            let labels = io.integers(&format!("{prefix}.labels"))?;
            let is_target: Vec<bool> = unpadded.target_places.iter().map(|&(r, c)| labels[r][c] != -100).collect();
            batches.push(unpadded.batch);
            targets.push(is_target);
        }
        let mut found = Vec::new();
        engine.accumulate(&batches, 1.0, None, &mut |micro: usize, output: &head::Output| {
            let is_target = &targets[micro];
            let tokens = is_target.iter().filter(|&&t| t).count() as f64;
            let share = -1.0 / (tokens * losses.len() as f64);
            let taken = output.logprobs.iter().zip(is_target).filter(|(_, t)| **t);
            found.push(taken.map(|(l, _)| -f64::from(*l)).sum::<f64>() / tokens);
            let d_logprobs = is_target.iter().map(|&t| if t { share as f32 } else { 0.0 }).collect();
            Ok::<_, engine::Error>(HeadGradient { d_logprobs, ..HeadGradient::default() })
        })?;
        for (loss, expected) in found.iter().zip(losses) {
            let error = (loss - expected.as_f64().context("loss")?).abs();
            report.check(&format!("{label} step {step} loss"), error, LOSS * (1.0 + step as f64));
        }
        check_tensors(
            engine,
            &io,
            &format!("step{step}.grad."),
            label,
            report,
            |flat| Ok(flat.grads().clone()),
            |expected| GRADIENT * f64::from(expected.iter().fold(1e-12f32, |m, v| m.max(v.abs()))),
        )?;
        let rate = schedule.lr(step as u64);
        let expected_rate = expected["learning_rate"].as_f64().context("learning_rate")?;
        report.check(&format!("{label} step {step} learning rate"), (rate - expected_rate).abs(), 1e-12);
        let done = optimizer.step(engine.store(), rate, max_grad_norm, 1.0)?;
        let norm = expected["grad_norm_before_clip"].as_f64().context("grad_norm_before_clip")?;
        let error = (f64::from(done.grad_norm) - norm).abs() / norm;
        report.check(&format!("{label} step {step} grad norm"), error, GRAD_NORM * (1.0 + step as f64));
        check_tensors(
            engine,
            &io,
            &format!("step{step}.after."),
            label,
            report,
            trainer::zero::FlatBlock::values,
            |_| 1e-6 + 2e-3 * lr * step as f64,
        )?;
    }
    Ok(())
}

/// Compares every tensor that the file has under `prefix`.
fn check_tensors(
    engine: &Engine,
    io: &Tensors,
    prefix: &str,
    label: &str,
    report: &mut Report,
    pick: impl Fn(&trainer::zero::FlatBlock) -> Result<candle_core::Tensor, trainer::zero::Error>,
    tolerance: impl Fn(&[f32]) -> f64,
) -> anyhow::Result<()> {
    if io.names(prefix).is_empty() {
        return Ok(());
    }
    for flat in engine.store().flats() {
        let values = buffer::to_vec(&pick(flat)?)?;
        for entry in flat.entries() {
            let expected = io.floats(&format!("{prefix}base_model.model.{}", entry.name))?;
            let error = max_difference(&values[entry.range.clone()], &expected);
            report.check(&format!("{label} {prefix}{}", entry.name), error, tolerance(&expected));
        }
    }
    Ok(())
}
