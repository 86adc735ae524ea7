//! Random Qwen2 and Qwen3 models: logits, loss, gradients of every weight, greedy continuation, recomputation.

use std::path::Path;

use anyhow::Context;
use trainer::engine::{self, Engine, Speaker};
use trainer::model::HeadGradient;
use trainer::model::batch::BatchBuilder;
use trainer::ops::{buffer, head};

use crate::model_files::{Tensors, Unpadded, engine, folders, name, unpad};
use crate::report::{Report, max_difference};

/// As the group's README advises.
const LOGITS: f64 = 2e-4;
const LOSS: f64 = 1e-5;
const GRADIENT: f64 = 1e-4;
/// A greedy choice closer than this may fall either way.
const MARGIN: f32 = 1e-3;

pub(crate) fn run(folder: &Path, report: &mut Report) -> anyhow::Result<()> {
    for model in folders(folder)? {
        let case = name(&model);
        check_model(&model, &case, report).with_context(|| case.clone())?;
    }
    Ok(())
}

/// All logits of a batch: `[N, V]`.
fn logits(engine: &Engine, batch: &trainer::model::batch::Batch) -> anyhow::Result<Vec<Vec<f32>>> {
    Ok(engine.logits(batch, Speaker::Policy)?.to_vec2()?)
}

/// The largest difference of logits at real tokens.
fn logit_error(got: &[Vec<f32>], expected: &[Vec<Vec<f32>>], places: &[(usize, usize)]) -> f64 {
    got.iter()
        .zip(places)
        .fold(0.0, |worst: f64, (got, &(row, column))| worst.max(max_difference(got, &expected[row][column])))
}

fn check_model(model: &Path, case: &str, report: &mut Report) -> anyhow::Result<()> {
    let io = Tensors::read(&model.join("io.safetensors"))?;
    let expected_grads = Tensors::read(&model.join("grads.safetensors"))?;
    let Unpadded { batch, places, target_places } = unpad(&io.integers("input_ids")?, &io.integers("attention_mask")?)?;
    let labels = io.integers("labels")?;
    let expected_logps: Vec<Vec<f32>> = io.get("token_logps")?.to_vec2()?;
    let expected_loss = f64::from(io.floats("loss")?[0]);
    let mut gradients_of_first = None;
    for recompute in [false, true] {
        let engine = engine(model, None, None, recompute)?;
        let case = format!("{case} recompute={recompute}");
        let got = logits(&engine, &batch)?;
        report.check(&format!("{case} logits"), logit_error(&got, &io.get("logits")?.to_vec3()?, &places), LOGITS);
        let is_target: Vec<bool> = target_places.iter().map(|&(r, c)| labels[r][c] != -100).collect();
        let count = is_target.iter().filter(|&&t| t).count() as f64;
        let (mut loss, mut logps) = (0.0, vec![]);
        let step = std::slice::from_ref(&batch);
        engine.accumulate(step, 1.0, None, &mut |_: usize, output: &head::Output| {
            let taken = output.logprobs.iter().zip(&is_target).filter(|(_, t)| **t);
            loss = taken.map(|(l, _)| -f64::from(*l)).sum::<f64>() / count;
            logps.clone_from(&output.logprobs);
            let d_logprobs = is_target.iter().map(|&t| if t { (-1.0 / count) as f32 } else { 0.0 }).collect();
            Ok::<_, engine::Error>(HeadGradient { d_logprobs, ..HeadGradient::default() })
        })?;
        let wanted: Vec<f32> = target_places.iter().map(|&(r, c)| expected_logps[r][c - 1]).collect();
        report.check(&format!("{case} token_logps"), max_difference(&logps, &wanted), LOGITS);
        report.check(&format!("{case} loss"), (loss - expected_loss).abs(), LOSS);
        let mut all = vec![];
        for flat in engine.store().flats() {
            let grads = buffer::to_vec(flat.grads())?;
            for entry in flat.entries() {
                let expected = expected_grads.floats(&format!("grad.{}", entry.name))?;
                let largest = expected.iter().fold(1e-12f32, |m, v| m.max(v.abs()));
                let error = max_difference(&grads[entry.range.clone()], &expected) / f64::from(largest);
                report.check(&format!("{case} grad {}", entry.name), error, GRADIENT);
            }
            all.push(grads);
        }
        match &gradients_of_first {
            None => gradients_of_first = Some(all),
            Some(first) => report.expect(&format!("{case} bit-equal gradients"), *first == all, || {
                "gradients with recomputation differ from those without".into()
            }),
        }
    }
    let engine = engine(model, None, None, false)?;
    let left = unpad(&io.integers("left.input_ids")?, &io.integers("left.attention_mask")?)?;
    let got = logits(&engine, &left.batch)?;
    let error = logit_error(&got, &io.get("left.logits")?.to_vec3()?, &left.places);
    report.check(&format!("{case} left-padded logits"), error, LOGITS);
    check_generation(&engine, &io, case, report)
}

/// Greedy continuation by whole forward passes; the cached decoder is checked against the same files by `rollout`.
fn check_generation(engine: &Engine, io: &Tensors, case: &str, report: &mut Report) -> anyhow::Result<()> {
    let (ids, mask) = (io.integers("left.input_ids")?, io.integers("left.attention_mask")?);
    let continuations = io.integers("gen.continuation_ids")?;
    let margins: Vec<Vec<f32>> = io.get("gen.margin_top1_top2")?.to_vec2()?;
    let expected_logps: Vec<Vec<f32>> = io.get("gen.token_logps")?.to_vec2()?;
    for (row, continuation) in continuations.iter().enumerate() {
        let prompt: Vec<u32> =
            ids[row].iter().zip(&mask[row]).filter(|(_, m)| **m == 1).map(|(i, _)| *i as u32).collect();
        // One pass over prompt and continuation gives every step's choice as long as the ids agree.
        let sequence: Vec<u32> = prompt.iter().copied().chain(continuation.iter().map(|&i| i as u32)).collect();
        let mut builder = BatchBuilder::new();
        let rows = builder.push(&sequence, 0);
        builder.predict_within(rows);
        let batch = builder.build()?;
        let output = engine.logprobs(std::slice::from_ref(&batch), Speaker::Policy, 1.0)?.remove(0);
        let safe = margins[row].iter().position(|&m| m <= MARGIN).unwrap_or(margins[row].len());
        let first = prompt.len() - 1;
        let agrees = output.is_argmax[first..first + safe].iter().all(|&is| is);
        report.expect(&format!("{case} greedy row {row}"), agrees, || "another token has the largest logit".into());
        let error = max_difference(&output.logprobs[first..], &expected_logps[row]);
        report.check(&format!("{case} greedy logps row {row}"), error, LOGITS);
    }
    Ok(())
}
