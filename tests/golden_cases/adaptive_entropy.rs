//! The entropy bonus whose weight follows the entropy: losses, gradients and weights over a run of steps.

use std::path::Path;

use anyhow::Context;
use serde_json::Value;
use trainer::algo::{EntropyControl, GrpoBatch, GrpoInputs, GrpoLossSettings, grpo_loss};
use trainer::config::settings::{AdaptiveEntropy, GrpoLossType, ImportanceSamplingLevel, VespoSettings};

use crate::report::{Report, max_difference};

/// As the group's README advises.
const LOSS: f64 = 1e-5;
const WEIGHT: f64 = 1e-9;

pub(crate) fn run(folder: &Path, report: &mut Report) -> anyhow::Result<()> {
    let content: Value = serde_json::from_slice(&std::fs::read(folder.join("cases.json"))?)?;
    for case in content["cases"].as_array().context("cases.json has no `cases`")? {
        check(case, report)?;
    }
    Ok(())
}

fn number(value: &Value, key: &str) -> anyhow::Result<f64> {
    value[key].as_f64().with_context(|| format!("`{key}` is no number"))
}

fn list<'a>(value: &'a Value, key: &str) -> anyhow::Result<&'a [Value]> {
    Ok(value[key].as_array().with_context(|| format!("`{key}` is no list"))?)
}

/// The values of all rows one after another, and where each row starts.
fn rows(value: &Value, key: &str) -> anyhow::Result<(Vec<f32>, Vec<usize>)> {
    let (mut values, mut starts) = (vec![], vec![0]);
    for row in list(value, key)? {
        values
            .extend(row.as_array().context("a row is no list")?.iter().map(|v| v.as_f64().unwrap_or(f64::NAN) as f32));
        starts.push(values.len());
    }
    Ok((values, starts))
}

fn check(case: &Value, report: &mut Report) -> anyhow::Result<()> {
    let name = case["name"].as_str().context("a case has no name")?;
    let adaptive = AdaptiveEntropy {
        coef_min: number(case, "entropy_coef_min")?,
        coef_max: number(case, "entropy_coef_max")?,
        coef_delta: number(case, "entropy_coef_delta")?,
        target: number(case, "entropy_target")?,
    };
    let accumulation = number(case, "gradient_accumulation_steps")? as usize;
    let mut control = EntropyControl::new(number(case, "entropy_coef")?);
    for (index, step) in list(case, "steps")?.iter().enumerate() {
        let settings = GrpoLossSettings {
            loss_type: GrpoLossType::Dapo,
            importance_sampling_level: ImportanceSamplingLevel::Token,
            beta: 0.0,
            use_bias_correction_kl: true,
            epsilon: 0.2,
            epsilon_high: 0.2,
            delta: None,
            top_entropy_quantile: number(case, "top_entropy_quantile")?,
            entropy_coef: control.applied(&adaptive),
            is_entropy_adaptive: true,
            off_policy_mask_threshold: None,
            sapo_temperature_neg: 1.05,
            sapo_temperature_pos: 1.0,
            vespo: VespoSettings { k_pos: 2.0, lambda_pos: 3.0, k_neg: 3.0, lambda_neg: 2.0 },
            max_completion_length: 1,
        };
        let mut attended = (0.0, 0.0);
        for (micro, inputs) in list(step, "micro_steps")?.iter().enumerate() {
            let (logprobs, row_starts) = rows(inputs, "logprobs")?;
            let (old, entropies) = (rows(inputs, "old_logprobs")?.0, rows(inputs, "entropies")?.0);
            let advantages: Vec<f32> =
                list(inputs, "advantages")?.iter().map(|v| v.as_f64().unwrap_or(f64::NAN) as f32).collect();
            let output = grpo_loss(
                &GrpoInputs {
                    row_starts: &row_starts,
                    logprobs: &logprobs,
                    old_logprobs: Some(&old),
                    ref_logprobs: None,
                    sampling_logprobs: None,
                    entropies: Some(&entropies),
                    mask: &vec![1; logprobs.len()],
                    tool_mask: None,
                    advantages: &advantages,
                    importance_ratio: None,
                    entropy_threshold: None,
                    batch: GrpoBatch {
                        num_items_in_batch: number(inputs, "num_items_in_batch")? as usize,
                        num_processes: 1,
                        gradient_accumulation_steps: accumulation,
                        steps_per_generation: accumulation,
                        is_training: true,
                    },
                },
                &settings,
            )?;
            let place = format!("{name} step {index} micro-step {micro}");
            report.check(&format!("{place} loss"), (output.loss - number(inputs, "loss")?).abs(), LOSS);
            let slopes = output.d_entropies.context("no gradient by the entropies")?;
            let error = max_difference(&slopes, &rows(inputs, "d_entropies")?.0);
            report.check(&format!("{place} d_entropies"), error, LOSS);
            attended = (attended.0 + output.attended_entropy.0, attended.1 + output.attended_entropy.1);
        }
        control.update(&adaptive, attended);
        report.check(
            &format!("{name} step {index} weight"),
            (control.coef() - number(step, "entropy_coef")?).abs(),
            WEIGHT,
        );
    }
    Ok(())
}
