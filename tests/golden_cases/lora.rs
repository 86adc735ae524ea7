//! PEFT adapters: logits and loss with the adapter on, off and merged, with smoothed labels where the file has them, and
//! gradients of every trained tensor.

use std::path::Path;

use anyhow::Context;
use trainer::algo::{SftInputs, SftOutput, sft_loss};
use trainer::config::settings::SftLossType;
use trainer::engine::{Engine, Speaker};
use trainer::model::HeadGradient;
use trainer::ops::{buffer, head};

use crate::model_files::{Tensors, Unpadded, device, engine, name, unpad};
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
    let mut unpadded = unpad(&io.integers("input_ids")?, &io.integers("attention_mask")?)?;
    let labels = io.integers("labels")?;
    let adapted = match engine(base, Some(variant), None, false) {
        Err(error) if !device()?.is_cpu() && error.to_string().contains("computed on the CPU only") => {
            report.expect(&format!("{case} is refused on a GPU"), true, String::new);
            return Ok(());
        }
        other => other?,
    };
    let error = logit_error(&adapted, Speaker::Policy, &unpadded, io.get("logits_on")?)?;
    report.check(&format!("{case} logits on"), error, LOGITS);
    if io.has("logits_merged") {
        let error = logit_error(&adapted, Speaker::Policy, &unpadded, io.get("logits_merged")?)?;
        report.check(&format!("{case} logits merged"), error, LOGITS);
    }
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
    let loss = loss(&adapted, &unpadded, &is_target, 0.0)?;
    report.check(&format!("{case} loss"), (loss - f64::from(io.floats("loss_on")?[0])).abs(), LOSS);
    check_gradients(&adapted, &case, &io, "grad.", report)?;
    if io.has("loss_smoothed") {
        let smoothing = f64::from(io.floats("smoothing")?[0]);
        unpadded.batch.wants_means = true;
        let loss = self::loss(&adapted, &unpadded, &is_target, smoothing)?;
        let error = (loss - f64::from(io.floats("loss_smoothed")?[0])).abs();
        report.check(&format!("{case} smoothed loss"), error, LOSS);
        check_gradients(&adapted, &format!("{case} smoothed"), &io, "grad_smoothed.", report)?;
    }
    Ok(())
}

/// The mean loss of the targets with smoothed labels; its gradients are in the store.
fn loss(engine: &Engine, unpadded: &Unpadded, is_target: &[bool], smoothing: f64) -> anyhow::Result<f64> {
    let mask: Vec<u8> = is_target.iter().map(|&t| u8::from(t)).collect();
    let count = is_target.iter().filter(|&&t| t).count();
    let mut mean = f64::NAN;
    engine.accumulate(std::slice::from_ref(&unpadded.batch), 1.0, None, &mut |_: usize, output: &head::Output| {
        let inputs = SftInputs {
            logprobs: &output.logprobs,
            mean_logprobs: Some(&output.mean_logprobs),
            mask: Some(&mask),
            entropies: None,
            is_correct: None,
            num_items_in_batch: count,
            num_processes: 1,
        };
        let SftOutput { loss, d_logprobs, d_mean_logprobs, .. } = sft_loss(&inputs, SftLossType::Nll, smoothing)?;
        mean = loss;
        Ok::<_, anyhow::Error>(HeadGradient { d_logprobs, d_entropies: vec![], d_mean_logprobs })
    })?;
    Ok(mean)
}

/// Holds the store's gradients against those of the file whose names begin with `prefix`, where it has some.
fn check_gradients(engine: &Engine, case: &str, io: &Tensors, prefix: &str, report: &mut Report) -> anyhow::Result<()> {
    let mut expected_names = io.names(prefix);
    if expected_names.is_empty() {
        return Ok(());
    }
    for flat in engine.store().flats() {
        let grads = buffer::to_vec(flat.grads())?;
        for entry in flat.entries() {
            let wanted = format!("{prefix}base_model.model.{}", entry.name);
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
