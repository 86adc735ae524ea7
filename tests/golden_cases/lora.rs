//! PEFT adapters: logits and loss with the adapter on, off and merged, and gradients of every trained tensor.

use std::path::Path;

use anyhow::Context;
use trainer::engine::{self, Engine, Speaker};
use trainer::model::HeadGradient;
use trainer::ops::buffer;

use crate::model_files::{Tensors, Unpadded, engine, name, unpad};
use crate::report::{Report, max_difference};

/// As the group's README advises.
const LOGITS: f64 = 2e-4;
const LOSS: f64 = 1e-5;
const GRADIENT: f64 = 1e-4;

pub(crate) fn run(folder: &Path, report: &mut Report) -> anyhow::Result<()> {
    let meta: serde_json::Value = serde_json::from_slice(&std::fs::read(folder.join("meta.json"))?)?;
    let variants = meta["variants"].as_object().context("meta.json has no `variants`")?;
    for (variant, about) in variants {
        let base = about["base"].as_str().context("a variant names no `base`")?;
        check(&folder.join(base), &folder.join(variant), report).with_context(|| variant.clone())?;
    }
    Ok(())
}

fn logit_error(
    engine: &Engine,
    speaker: Speaker,
    unpadded: &Unpadded,
    expected: &candle_core::Tensor,
) -> anyhow::Result<f64> {
    let got: Vec<Vec<f32>> = engine.logits(&unpadded.batch, speaker)?.to_vec2()?;
    let expected: Vec<Vec<Vec<f32>>> = expected.to_vec3()?;
    let errors = got.iter().zip(&unpadded.places).map(|(got, &(r, c))| max_difference(got, &expected[r][c]));
    Ok(errors.fold(0.0, f64::max))
}

fn check(base: &Path, variant: &Path, report: &mut Report) -> anyhow::Result<()> {
    let case = name(variant);
    let io = Tensors::read(&variant.join("io.safetensors"))?;
    let unpadded = unpad(&io.integers("input_ids")?, &io.integers("attention_mask")?)?;
    let labels = io.integers("labels")?;
    let adapted = engine(base, Some(variant), None, false)?;
    let error = logit_error(&adapted, Speaker::Policy, &unpadded, io.get("logits_on")?)?;
    report.check(&format!("{case} logits on"), error, LOGITS);
    let error = logit_error(&adapted, Speaker::Policy, &unpadded, io.get("logits_merged")?)?;
    report.check(&format!("{case} logits merged"), error, LOGITS);
    let plain = engine(base, None, None, false)?;
    let error = logit_error(&plain, Speaker::Policy, &unpadded, io.get("logits_off")?)?;
    report.check(&format!("{case} logits of the base"), error, LOGITS);
    let replaces_weights =
        adapted.store().flats().flat_map(trainer::zero::FlatBlock::entries).any(|e| !e.name.contains(".lora_"));
    if !replaces_weights {
        let error = logit_error(&adapted, Speaker::Reference, &unpadded, io.get("logits_off")?)?;
        report.check(&format!("{case} logits off"), error, LOGITS);
    }
    let is_target: Vec<bool> = unpadded.target_places.iter().map(|&(r, c)| labels[r][c] != -100).collect();
    let count = is_target.iter().filter(|&&t| t).count() as f64;
    let loss = adapted.forward_backward(&unpadded.batch, 1.0, None, |output| {
        let loss: f64 = output.logprobs.iter().zip(&is_target).filter(|(_, t)| **t).map(|(l, _)| -f64::from(*l)).sum();
        let d_logprobs = is_target.iter().map(|&t| if t { (-1.0 / count) as f32 } else { 0.0 }).collect();
        Ok::<_, engine::Error>((HeadGradient { d_logprobs, d_entropies: vec![] }, loss / count))
    })?;
    report.check(&format!("{case} loss"), (loss - f64::from(io.floats("loss_on")?[0])).abs(), LOSS);
    let mut expected_names = io.names("grad.");
    if expected_names.is_empty() {
        return Ok(());
    }
    for flat in adapted.store().flats() {
        let grads = buffer::to_vec(flat.grads())?;
        for entry in flat.entries() {
            let wanted = format!("grad.base_model.model.{}", entry.name);
            expected_names.retain(|n| *n != wanted);
            let expected = io.floats(&wanted)?;
            let largest = expected.iter().fold(1e-12f32, |m, v| m.max(v.abs()));
            let error = max_difference(&grads[entry.range.clone()], &expected) / f64::from(largest);
            report.check(&format!("{case} grad {}", entry.name), error, GRADIENT);
        }
    }
    report.expect(&format!("{case} trains all"), expected_names.is_empty(), || {
        format!("no gradient of {expected_names:?}")
    });
    Ok(())
}
