//! GRPO against TRL: losses and gradients, advantages and completion metrics, whole runs on a tiny model.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Context, bail};
use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use serde_json::{Map, Value};
use trainer::algo::{
    AdvantageInputs, GrpoBatch, GrpoInputs, GrpoLossSettings, ImportanceRatio, advantages, completion_mask,
    completion_statistics, grpo_loss, is_truncated,
};
use trainer::config::settings::{ScaleRewards, VespoSettings};

use crate::grpo_run;
use crate::report::Report;

/// f32 sums in another order.
const LOSS_RELATIVE: f64 = 1e-5;
/// Below this the reference's own f32 rounding is larger than the relative tolerance.
const LOSS_FLOOR: f64 = 1e-2;
/// Of the largest gradient of the case.
const GRADIENT_RELATIVE: f64 = 1e-5;
const METRIC_RELATIVE: f64 = 1e-5;
const METRIC_FLOOR: f64 = 1e-2;
/// Of the largest advantage of the case. With rewards around 1e6 the reference's f32 keeps three digits less.
const ADVANTAGE_RELATIVE: f64 = 1e-4;
const ADVANTAGE_RELATIVE_LARGE: f64 = 1e-3;
const LARGE_REWARD: f64 = 1e4;

pub(crate) fn run(folder: &Path, report: &mut Report) -> anyhow::Result<()> {
    losses(folder, report).context("loss")?;
    advantage_cases(folder, report).context("advantages")?;
    sparse_advantages(folder, report).context("sparse advantages")?;
    let mut runs: Vec<_> = std::fs::read_dir(folder)?.flatten().map(|e| e.path()).filter(|p| p.is_dir()).collect();
    runs.sort();
    for run in runs {
        grpo_run::run(&run, report).with_context(|| run.display().to_string())?;
    }
    Ok(())
}

struct Tensors(HashMap<String, Tensor>);

impl Tensors {
    fn load(path: &Path) -> anyhow::Result<Self> {
        Ok(Self(candle_core::safetensors::load(path, &Device::Cpu)?))
    }

    fn tensor(&self, name: &str) -> anyhow::Result<&Tensor> {
        self.0.get(name).with_context(|| format!("no tensor `{name}`"))
    }

    fn floats(&self, name: &str) -> anyhow::Result<Vec<f32>> {
        Ok(self.tensor(name)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
    }

    fn bytes(&self, name: &str) -> anyhow::Result<Vec<u8>> {
        Ok(self.tensor(name)?.to_dtype(DType::U8)?.flatten_all()?.to_vec1()?)
    }
}

fn read(folder: &Path, name: &str) -> anyhow::Result<Value> {
    let text = std::fs::read_to_string(folder.join(name)).with_context(|| format!("reading {name}"))?;
    Ok(serde_json::from_str(&text)?)
}

/// Parameters of a case on top of the file's defaults.
struct Params<'a> {
    case: &'a Map<String, Value>,
    defaults: &'a Map<String, Value>,
}

impl Params<'_> {
    fn get(&self, key: &str) -> anyhow::Result<&Value> {
        self.case.get(key).or_else(|| self.defaults.get(key)).with_context(|| format!("no parameter `{key}`"))
    }

    fn optional(&self, key: &str) -> anyhow::Result<Option<f64>> {
        match self.get(key)? {
            Value::Null => Ok(None),
            value => Ok(Some(value.as_f64().with_context(|| format!("`{key}` is {value}"))?)),
        }
    }

    fn number(&self, key: &str) -> anyhow::Result<f64> {
        self.optional(key)?.with_context(|| format!("`{key}` is null"))
    }

    fn count(&self, key: &str) -> anyhow::Result<usize> {
        Ok(self.number(key)? as usize)
    }

    fn text(&self, key: &str) -> anyhow::Result<&str> {
        self.get(key)?.as_str().with_context(|| format!("`{key}` is not a text"))
    }

    fn flag(&self, key: &str) -> anyhow::Result<bool> {
        self.get(key)?.as_bool().with_context(|| format!("`{key}` is not a boolean"))
    }

    fn choice<T: std::str::FromStr>(&self, key: &str) -> anyhow::Result<T> {
        let text = self.text(key)?;
        text.parse().ok().with_context(|| format!("`{key}` is `{text}`"))
    }

    fn settings(&self, tokens_per_row: usize) -> anyhow::Result<GrpoLossSettings> {
        let epsilon = self.number("epsilon")?;
        Ok(GrpoLossSettings {
            loss_type: self.choice("loss_type")?,
            importance_sampling_level: self.choice("importance_sampling_level")?,
            beta: self.number("beta")?,
            use_bias_correction_kl: self.flag("use_bias_correction_kl")?,
            epsilon,
            epsilon_high: self.optional("epsilon_high")?.unwrap_or(epsilon),
            delta: self.optional("delta")?,
            top_entropy_quantile: self.number("top_entropy_quantile")?,
            entropy_coef: self.number("entropy_coef")?,
            is_entropy_adaptive: false,
            off_policy_mask_threshold: self.optional("off_policy_mask_threshold")?,
            sapo_temperature_neg: self.number("sapo_temperature_neg")?,
            sapo_temperature_pos: self.number("sapo_temperature_pos")?,
            vespo: VespoSettings {
                k_pos: self.number("vespo_k_pos")?,
                lambda_pos: self.number("vespo_lambda_pos")?,
                k_neg: self.number("vespo_k_neg")?,
                lambda_neg: self.number("vespo_lambda_neg")?,
            },
            max_completion_length: self.optional("max_completion_length")?.map_or(tokens_per_row, |l| l as usize),
        })
    }
}

#[derive(Deserialize)]
struct LossCase {
    set: String,
    params: Map<String, Value>,
    metrics: BTreeMap<String, Option<f64>>,
}

fn losses(folder: &Path, report: &mut Report) -> anyhow::Result<()> {
    #[derive(Deserialize)]
    struct File {
        defaults: Map<String, Value>,
        cases: BTreeMap<String, LossCase>,
    }
    let file: File = serde_json::from_value(read(folder, "loss.json")?)?;
    let tensors = Tensors::load(&folder.join("loss.safetensors"))?;
    for (name, case) in &file.cases {
        let params = Params { case: &case.params, defaults: &file.defaults };
        if let Err(error) = loss_case(name, case, &params, &tensors, report) {
            report.fail(name, &format!("{error:#}"));
        }
    }
    Ok(())
}

fn loss_case(
    name: &str,
    case: &LossCase,
    params: &Params<'_>,
    tensors: &Tensors,
    report: &mut Report,
) -> anyhow::Result<()> {
    let key = |what: &str| format!("set{}.{what}", case.set);
    let (rows, length) = tensors.tensor(&key("logps"))?.dims2()?;
    let row_starts: Vec<usize> = (0..=rows).map(|row| row * length).collect();
    let old = match params.get("old")? {
        Value::Null => None,
        Value::String(which) => Some(tensors.floats(&key(which))?),
        other => bail!("`old` is {other}"),
    };
    let ratio = match params.get("is_ratio")? {
        Value::Null => None,
        Value::String(which) => Some((which.as_str(), tensors.floats(&key(&format!("is_ratio_{which}")))?)),
        other => bail!("`is_ratio` is {other}"),
    };
    let importance_ratio = match &ratio {
        None => None,
        Some(("token", values)) => Some(ImportanceRatio::Token(values)),
        Some(("seq", values)) => Some(ImportanceRatio::Sequence(values)),
        Some((other, _)) => bail!("`is_ratio` is {other}"),
    };
    let (logprobs, reference) = (tensors.floats(&key("logps"))?, tensors.floats(&key("ref"))?);
    let (entropies, mask) = (tensors.floats(&key("entropies"))?, tensors.bytes(&key("mask"))?);
    let (tool_mask, advantages) = (tensors.bytes(&key("tool_mask"))?, tensors.floats(&key("advantages"))?);
    let tokens = mask.iter().filter(|&&m| m == 1).count();
    let inputs = GrpoInputs {
        row_starts: &row_starts,
        logprobs: &logprobs,
        old_logprobs: old.as_deref(),
        ref_logprobs: Some(&reference),
        sampling_logprobs: None,
        entropies: Some(&entropies),
        mask: &mask,
        tool_mask: params.flag("tool_mask")?.then_some(&tool_mask[..]),
        advantages: &advantages,
        importance_ratio,
        entropy_threshold: None,
        batch: GrpoBatch {
            // Losses that do not read it may leave it out.
            num_items_in_batch: params.optional("num_items_in_batch")?.map_or(tokens, |items| items as usize),
            num_processes: 1,
            gradient_accumulation_steps: params.count("gradient_accumulation_steps")?,
            steps_per_generation: params.count("steps_per_generation")?,
            is_training: params.text("mode")? == "train",
        },
    };
    let output = grpo_loss(&inputs, &params.settings(length)?)?;

    let expected = f64::from(tensors.floats(&format!("{name}.loss"))?[0]);
    let tolerance = LOSS_RELATIVE * expected.abs().max(LOSS_FLOOR);
    report.check(&format!("{name}.loss"), (output.loss - expected).abs(), tolerance);
    compare_gradient(&format!("{name}.grad_logps"), &output.d_logprobs, tensors, report)?;
    let entropy_gradient = format!("{name}.grad_entropies");
    if tensors.0.contains_key(&entropy_gradient) {
        let got = output.d_entropies.as_deref().context("no gradient of the entropies")?;
        compare_gradient(&entropy_gradient, got, tensors, report)?;
    }
    compare_metrics(name, &output.metrics.values(), &case.metrics, report);
    for metric in output.metrics.values().keys() {
        if !case.metrics.contains_key(metric) {
            report.fail(name, &format!("metric `{metric}` is not one that the reference logs"));
        }
    }
    Ok(())
}

fn compare_gradient(name: &str, got: &[f32], tensors: &Tensors, report: &mut Report) -> anyhow::Result<()> {
    let expected = tensors.floats(name)?;
    let largest = expected.iter().fold(0.0f64, |most, g| most.max(f64::from(g.abs())));
    // Where every gradient is 0, so must ours be.
    report.check(name, crate::report::max_difference(got, &expected), GRADIENT_RELATIVE * largest.max(1e-12));
    Ok(())
}

/// Every expected metric; null stands for a NaN.
fn compare_metrics(
    case: &str,
    got: &BTreeMap<String, f64>,
    expected: &BTreeMap<String, Option<f64>>,
    report: &mut Report,
) {
    for (metric, expected) in expected {
        let name = format!("{case} {metric}");
        match (got.get(metric), expected) {
            (None, _) => report.fail(&name, "not computed"),
            (Some(got), None) => report.expect(&name, got.is_nan(), || format!("{got}, expected NaN")),
            (Some(got), Some(expected)) => {
                report.check(&name, (got - expected).abs(), METRIC_RELATIVE * expected.abs().max(METRIC_FLOOR));
            }
        }
    }
}

#[derive(Deserialize)]
struct AdvantageCase {
    rewards: String,
    weights: Vec<f64>,
    multi_objective_aggregation: String,
    scale_rewards: String,
    metrics: BTreeMap<String, Option<f64>>,
}

#[derive(Deserialize)]
struct Rollouts {
    prompt_ids: Vec<Vec<u32>>,
    completion_ids: Vec<Vec<u32>>,
    eos_token_id: u32,
    pad_token_id: u32,
}

#[derive(Deserialize)]
struct AdvantageFile {
    num_generations: usize,
    cases: Map<String, Value>,
    rollouts: Rollouts,
    #[serde(flatten)]
    rest: BTreeMap<String, Value>,
}

fn advantage_cases(folder: &Path, report: &mut Report) -> anyhow::Result<()> {
    let file: AdvantageFile = serde_json::from_value(read(folder, "advantages.json")?)?;
    let tensors = Tensors::load(&folder.join("advantages.safetensors"))?;
    // The cases were run one after the other on one trainer, so the count of tokens goes on from case to case.
    let mut seen_tokens = 0;
    for (name, case) in &file.cases {
        let case: AdvantageCase = serde_json::from_value(case.clone()).with_context(|| name.clone())?;
        seen_tokens +=
            file.rollouts.prompt_ids.iter().chain(&file.rollouts.completion_ids).map(Vec::len).sum::<usize>();
        if let Err(error) = advantage_case(name, &case, &file, seen_tokens, &tensors, report) {
            report.fail(name, &format!("{error:#}"));
        }
    }
    truncation_masks(&file, &tensors, report)
}

/// A batch in which functions score few completions or none; absent where a group of cases has no such file.
#[derive(Deserialize)]
struct SparseCase {
    functions: Vec<String>,
    num_generations: usize,
    weights: Vec<f64>,
    aggregation: String,
    scale: String,
    rewards: Vec<Vec<Option<f64>>>,
    advantages: Vec<f32>,
    metrics: BTreeMap<String, Option<f64>>,
}

fn sparse_advantages(folder: &Path, report: &mut Report) -> anyhow::Result<()> {
    if !folder.join("sparse_advantages.json").is_file() {
        return Ok(());
    }
    let cases: Vec<SparseCase> = serde_json::from_value(read(folder, "sparse_advantages.json")?)?;
    for (index, case) in cases.iter().enumerate() {
        let name = format!("sparse {index} ({}: {})", case.aggregation, case.functions.join(", "));
        let rewards: Vec<f64> = case.rewards.iter().flatten().map(|reward| reward.unwrap_or(f64::NAN)).collect();
        let output = advantages(&AdvantageInputs {
            rewards: &rewards,
            weights: &case.weights,
            group_size: case.num_generations,
            aggregation: case.aggregation.parse().ok().context("aggregation")?,
            scale: case.scale.parse::<ScaleRewards>().ok().context("scale")?,
        })?;
        let largest = case.advantages.iter().fold(1e-3f64, |most, a| most.max(f64::from(a.abs())));
        let error = crate::report::max_difference(&output.advantages, &case.advantages);
        report.check(&name, error, ADVANTAGE_RELATIVE * largest);
        let names: Vec<String> = (0..case.weights.len()).map(|f| format!("f{f}")).collect();
        compare_metrics(&name, &output.metrics(&names), &case.metrics, report);
    }
    Ok(())
}

fn advantage_case(
    name: &str,
    case: &AdvantageCase,
    file: &AdvantageFile,
    seen_tokens: usize,
    tensors: &Tensors,
    report: &mut Report,
) -> anyhow::Result<()> {
    let rewards: Vec<f64> =
        tensors.floats(&format!("rewards.{}", case.rewards))?.iter().map(|&r| f64::from(r)).collect();
    let output = advantages(&AdvantageInputs {
        rewards: &rewards,
        weights: &case.weights,
        group_size: file.num_generations,
        aggregation: case.multi_objective_aggregation.parse().ok().context("aggregation")?,
        scale: case.scale_rewards.parse::<ScaleRewards>().ok().context("scale_rewards")?,
    })?;
    let expected = tensors.floats(&format!("adv.{name}"))?;
    let largest = expected.iter().fold(1e-3f64, |most, a| most.max(f64::from(a.abs())));
    let is_large = rewards.iter().any(|r| r.abs() > LARGE_REWARD);
    let relative = if is_large { ADVANTAGE_RELATIVE_LARGE } else { ADVANTAGE_RELATIVE };
    let error = crate::report::max_difference(&output.advantages, &expected);
    report.check(&format!("adv {name}"), error, relative * largest);

    let names: Vec<String> = (0..case.weights.len()).map(|f| format!("rf{f}")).collect();
    let mut metrics = output.metrics(&names);
    let completions = &file.rollouts.completion_ids;
    let lengths: Vec<usize> = completions.iter().map(Vec::len).collect();
    metrics.extend(completion_statistics(&lengths, &truncated(&file.rollouts))?.metrics());
    metrics.insert("num_tokens".into(), seen_tokens as f64);
    compare_metrics(name, &metrics, &case.metrics, report);
    Ok(())
}

fn truncated(rollouts: &Rollouts) -> Vec<bool> {
    let end_ids = [rollouts.eos_token_id, rollouts.pad_token_id];
    rollouts.completion_ids.iter().map(|ids| is_truncated(ids, &end_ids)).collect()
}

/// The masks of `batch_mask_truncated_{false,true}`: padded in the file, ragged here.
fn truncation_masks(file: &AdvantageFile, tensors: &Tensors, report: &mut Report) -> anyhow::Result<()> {
    let lengths: Vec<usize> = file.rollouts.completion_ids.iter().map(Vec::len).collect();
    for mask_truncated in [false, true] {
        let name = format!("batch_mask_truncated_{mask_truncated}");
        let mask = completion_mask(&lengths, &truncated(&file.rollouts), mask_truncated)?;
        let (_, width) = tensors.tensor(&format!("{name}.completion_mask"))?.dims2()?;
        let expected = tensors.bytes(&format!("{name}.completion_mask"))?;
        let mut padded = Vec::with_capacity(expected.len());
        let mut start = 0;
        for &length in &lengths {
            padded.extend_from_slice(&mask[start..start + length]);
            padded.resize(padded.len() + width - length, 0);
            start += length;
        }
        report.expect(&name, padded == expected, || format!("{padded:?}, expected {expected:?}"));
        let items: u64 = mask.iter().map(|&m| u64::from(m)).sum();
        let expected = file.rest.get(&format!("{name}.num_items_in_batch")).and_then(Value::as_u64);
        report.expect(&format!("{name} items"), Some(items) == expected, || format!("{items}, expected {expected:?}"));
    }
    Ok(())
}
