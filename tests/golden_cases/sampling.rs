//! Filtered and renormalised next-token distributions, against transformers' own processors.

use std::path::Path;

use anyhow::{Context, bail, ensure};
use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use trainer::config::settings::SamplingSettings;
use trainer::rollout::sampler::{DrawJob, Sampler, Scratch};

use crate::report::{Report, max_difference};

/// Tolerance of probabilities and, relative to their size, of processed logits: the group's README.
const TOLERANCE: f64 = 1e-5;

/// Transformers' processors in the order in which the sampler applies them.
const ORDER: [&str; 5] = [
    "RepetitionPenaltyLogitsProcessor",
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
];

pub(crate) fn run(folder: &Path, report: &mut Report) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(folder.join("sampling.json")).context("sampling.json")?;
    let file: Value = serde_json::from_str(&text)?;
    let tensors = candle_core::safetensors::load(folder.join("sampling.safetensors"), &Device::Cpu)?;
    let floats = |name: &str| -> anyhow::Result<Vec<f32>> {
        Ok(tensors.get(name).with_context(|| format!("no tensor `{name}`"))?.to_vec1::<f32>()?)
    };
    let mut seen = distinct(tensors.get("history").context("no tensor `history`")?)?;
    // The order of the ids must not matter.
    seen.reverse();
    for case in file["cases"].as_array().context("no `cases`")? {
        let key = case["key"].as_str().context("a case without `key`")?;
        let name = key.split_once('.').with_context(|| format!("`{key}` names no logits"))?.1;
        let logits = floats(&format!("logits.{name}"))?;
        let expected = Expected {
            kept: case["kept"].as_u64().context("`kept`")? as usize,
            processed: floats(&format!("{key}.processed_logits"))?,
            probabilities: floats(&format!("{key}.probs"))?,
        };
        let sampler = Sampler::new(&settings(&case["params"])?)?;
        report.expect(&format!("{key} order"), is_in_order(&case["order"]), || {
            format!("transformers applies {}, the sampler {ORDER:?}", case["order"])
        });
        compare(key, &sampler, &logits, &seen, expected, report)?;
    }
    Ok(())
}

struct Expected {
    kept: usize,
    processed: Vec<f32>,
    probabilities: Vec<f32>,
}

fn compare(
    key: &str,
    sampler: &Sampler,
    logits: &[f32],
    seen: &[u32],
    mut expected: Expected,
    report: &mut Report,
) -> anyhow::Result<()> {
    let mut processed = sampler.process(logits, seen)?;
    let mut probabilities = softmax(&processed);
    let kept = processed.iter().filter(|l| l.is_finite()).count();
    report.expect(&format!("{key} kept"), kept == expected.kept, || format!("{kept}, expected {}", expected.kept));

    // Every draw comes from this distribution and knows its probability.
    let mut worst = 0.0_f64;
    let mut scratch = Scratch::default();
    for step in 0..64 {
        let draw = sampler.draw(DrawJob { logits, seen, uniform: (f64::from(step) + 0.5) / 64.0 }, &mut scratch)?;
        let probability = probabilities[draw.token as usize];
        ensure!(probability > 0.0, "{key}: token {} was drawn and has probability 0", draw.token);
        worst = worst.max((f64::from(draw.sampling_logprob).exp() - f64::from(probability)).abs());
    }
    report.check(&format!("{key} draws"), worst, TOLERANCE);

    if has_tie_at_border(&expected.processed, logits, seen) {
        for list in [&mut processed, &mut probabilities, &mut expected.processed, &mut expected.probabilities] {
            list.sort_by(f32::total_cmp);
        }
    }
    report.check(&format!("{key} probs"), max_difference(&probabilities, &expected.probabilities), TOLERANCE);
    let size = processed.iter().filter(|l| l.is_finite()).fold(1.0_f32, |size, l| size.max(l.abs()));
    let error = max_difference(&processed, &expected.processed);
    report.check(&format!("{key} logits"), error, TOLERANCE * f64::from(size));
    Ok(())
}

/// Whether a kept and a removed token had the same logit, so that the choice between them is the sort's.
fn has_tie_at_border(processed: &[f32], logits: &[f32], seen: &[u32]) -> bool {
    // The penalty separates seen tokens from others with the same logit.
    let class = |id: usize| (logits[id].to_bits(), seen.contains(&(id as u32)));
    (0..logits.len())
        .filter(|&id| processed[id] == f32::NEG_INFINITY)
        .any(|removed| (0..logits.len()).any(|id| processed[id] > f32::NEG_INFINITY && class(id) == class(removed)))
}

fn settings(parameters: &Value) -> anyhow::Result<SamplingSettings> {
    let mut settings = SamplingSettings::default();
    for (name, value) in parameters.as_object().context("`params`")? {
        let number = value.as_f64().with_context(|| format!("`{name}` is {value}"))?;
        match name.as_str() {
            "temperature" => settings.temperature = number,
            "top_k" => settings.top_k = number as usize,
            "top_p" => settings.top_p = number,
            "min_p" => settings.min_p = number,
            "repetition_penalty" => settings.repetition_penalty = number,
            _ => bail!("unknown parameter `{name}`"),
        }
    }
    Ok(settings)
}

fn is_in_order(processors: &Value) -> bool {
    let mut ours = ORDER.iter();
    processors.as_array().is_some_and(|list| list.iter().all(|name| ours.any(|our| name.as_str() == Some(our))))
}

fn distinct(history: &Tensor) -> anyhow::Result<Vec<u32>> {
    let mut ids = history.to_dtype(DType::U32)?.to_vec1::<u32>()?;
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

fn softmax(logits: &[f32]) -> Vec<f32> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from(l - largest).exp()).sum();
    logits.iter().map(|&l| (f64::from(l - largest).exp() / sum) as f32).collect()
}
