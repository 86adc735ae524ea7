//! AdamW, schedules, clipping and loss scaling against torch, transformers and DeepSpeed.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, ensure};
use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use serde_json::{Map, Value};
use trainer::config::settings::LrSchedulerType;
use trainer::optim::{AdamWStep, LossScaler, LossScalerSettings, LrSchedule, ScaleUpdate, adamw_step, clip_gradients};

use crate::report::{Report, max_difference};

/// torch's own f32 run is up to 2e-6 off a f64 run.
const ADAMW_TOLERANCE: f64 = 5e-6;
const SCHEDULE_ABSOLUTE: f64 = 1e-12;
const SCHEDULE_RELATIVE: f64 = 1e-9;
const CLIP_RELATIVE: f64 = 1e-6;

pub(crate) fn run(folder: &Path, report: &mut Report) -> anyhow::Result<()> {
    adamw(folder, report).context("adamw")?;
    schedules(folder, report).context("schedules")?;
    clip(folder, report).context("clip")?;
    loss_scale(folder, report).context("loss_scale")
}

struct Tensors(HashMap<String, Tensor>);

impl Tensors {
    fn load(path: &Path) -> anyhow::Result<Self> {
        Ok(Self(candle_core::safetensors::load(path, &Device::Cpu)?))
    }

    fn values(&self, name: &str) -> anyhow::Result<Vec<f32>> {
        let tensor = self.0.get(name).with_context(|| format!("no tensor `{name}`"))?;
        Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
    }

    fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }
}

fn read(folder: &Path, name: &str) -> anyhow::Result<Value> {
    let text = std::fs::read_to_string(folder.join(name)).with_context(|| format!("reading {name}"))?;
    Ok(serde_json::from_str(&text)?)
}

#[derive(Deserialize)]
struct AdamWCase {
    betas: (f64, f64),
    eps: f64,
    weight_decay: f64,
    amsgrad: bool,
    lr_per_step: Vec<f64>,
    shapes: Vec<Vec<usize>>,
    steps: usize,
}

fn adamw(folder: &Path, report: &mut Report) -> anyhow::Result<()> {
    let tensors = Tensors::load(&folder.join("adamw.safetensors"))?;
    let cases: HashMap<String, AdamWCase> = serde_json::from_value(read(folder, "adamw.json")?)?;
    for (name, case) in cases {
        if case.amsgrad {
            report.skip(&name, "amsgrad is not a setting of this program");
            continue;
        }
        ensure!(case.lr_per_step.len() >= case.steps, "{name}: too few learning rates");
        for index in 0..case.shapes.len() {
            let key = |what: &str| format!("{name}.p{index}.{what}");
            let mut params = tensors.values(&key("start"))?;
            let (mut first, mut second) = (vec![0.0; params.len()], vec![0.0; params.len()]);
            for step in 0..case.steps {
                let hyper = AdamWStep {
                    lr: case.lr_per_step[step],
                    beta1: case.betas.0,
                    beta2: case.betas.1,
                    eps: case.eps,
                    weight_decay: case.weight_decay,
                    step: step as u64 + 1,
                    grad_scale: 1.0,
                };
                let grads = tensors.values(&key(&format!("grad{step}")))?;
                adamw_step(&mut params, &grads, &mut first, &mut second, &hyper)?;
                let expected = tensors.values(&key(&format!("after{step}")))?;
                report.check(&key(&format!("after{step}")), max_difference(&params, &expected), ADAMW_TOLERANCE);
            }
            for (what, got) in [("exp_avg", &first), ("exp_avg_sq", &second)] {
                // Moments may be large: the tolerance is relative to the largest where that is above 1.
                let expected = tensors.values(&key(what))?;
                let largest = expected.iter().fold(1.0f64, |most, v| most.max(f64::from(v.abs())));
                report.check(&key(what), max_difference(got, &expected), ADAMW_TOLERANCE * largest);
            }
        }
    }
    Ok(())
}

#[derive(Deserialize)]
struct ScheduleCase {
    scheduler: String,
    base_lr: f64,
    num_warmup_steps: usize,
    num_training_steps: usize,
    #[serde(default)]
    kwargs: Map<String, Value>,
    #[serde(default)]
    lr: Vec<f64>,
    error: Option<Value>,
}

fn schedules(folder: &Path, report: &mut Report) -> anyhow::Result<()> {
    let cases: Vec<ScheduleCase> = serde_json::from_value(read(folder, "schedules.json")?)?;
    for case in cases {
        let name = format!(
            "schedule {} warmup {} of {} {}",
            case.scheduler,
            case.num_warmup_steps,
            case.num_training_steps,
            Value::Object(case.kwargs.clone())
        );
        let Ok(kind) = case.scheduler.parse::<LrSchedulerType>() else {
            report.expect(&name, case.error.is_some(), || "unknown schedule".into());
            continue;
        };
        let made = LrSchedule::new(kind, case.base_lr, case.num_warmup_steps, case.num_training_steps, &case.kwargs);
        match (made, case.error) {
            (Ok(schedule), None) => {
                let share = case.lr.iter().enumerate().fold(0.0f64, |worst, (step, &expected)| {
                    let tolerance = SCHEDULE_ABSOLUTE + SCHEDULE_RELATIVE * expected.abs();
                    worst.max((schedule.lr(step as u64) - expected).abs() / tolerance)
                });
                ensure!(!case.lr.is_empty(), "{name}: no rates");
                report.check(&name, share, 1.0);
            }
            (Err(_), Some(_)) => report.expect(&name, true, String::new),
            (Ok(_), Some(error)) => report.fail(&name, &format!("should be refused: {error}")),
            (Err(error), None) => report.fail(&name, &error.to_string()),
        }
    }
    Ok(())
}

#[derive(Deserialize)]
struct ClipCase {
    key: String,
    grads: String,
    max_norm: f64,
    norm_type: Value,
    total_norm: Value,
}

/// A number, `"inf"`, or null for a NaN.
fn number(value: &Value) -> f64 {
    match value {
        Value::String(text) if text == "inf" => f64::INFINITY,
        other => other.as_f64().unwrap_or(f64::NAN),
    }
}

/// The largest difference relative to the expected value; a NaN must be a NaN and an infinity the same one.
fn relative_difference(got: &[f32], expected: &[f32]) -> f64 {
    if got.len() != expected.len() {
        return f64::INFINITY;
    }
    got.iter().zip(expected).fold(0.0f64, |worst, (&g, &e)| {
        let difference = match (g.is_nan(), e.is_nan()) {
            (true, true) => 0.0,
            _ if g == e => 0.0,
            (false, false) => f64::from((g - e).abs()) / f64::from(e.abs()).max(1e-30),
            _ => f64::INFINITY,
        };
        worst.max(difference)
    })
}

fn clip(folder: &Path, report: &mut Report) -> anyhow::Result<()> {
    let tensors = Tensors::load(&folder.join("clip.safetensors"))?;
    let cases: Vec<ClipCase> = serde_json::from_value(read(folder, "clip.json")?)?;
    for case in cases {
        let mut grads = Vec::new();
        while tensors.has(&format!("{}.g{}", case.grads, grads.len())) {
            grads.push(tensors.values(&format!("{}.g{}", case.grads, grads.len()))?);
        }
        ensure!(!grads.is_empty(), "{}: no gradients named {}", case.key, case.grads);
        let mut slices: Vec<&mut [f32]> = grads.iter_mut().map(Vec::as_mut_slice).collect();
        let total_norm = clip_gradients(&mut slices, case.max_norm, number(&case.norm_type));
        let expected = number(&case.total_norm) as f32;
        report.check(&format!("{} norm", case.key), relative_difference(&[total_norm], &[expected]), CLIP_RELATIVE);
        for (index, got) in grads.iter().enumerate() {
            let name = format!("{}.clipped{index}", case.key);
            report.check(&name, relative_difference(got, &tensors.values(&name)?), CLIP_RELATIVE);
        }
    }
    Ok(())
}

#[derive(Deserialize)]
struct ScalerCase {
    name: String,
    params: ScalerParams,
    columns: Vec<String>,
    rows: Vec<Vec<Value>>,
}

#[derive(Deserialize)]
struct ScalerParams {
    init_scale: f64,
    scale_window: u64,
    min_scale: f64,
    delayed_shift: u64,
    consecutive_hysteresis: bool,
    raise_error_at_min_scale: bool,
}

fn loss_scale(folder: &Path, report: &mut Report) -> anyhow::Result<()> {
    #[derive(Deserialize)]
    struct File {
        cases: Vec<ScalerCase>,
    }
    let file: File = serde_json::from_value(read(folder, "loss_scale.json")?)?;
    for case in file.cases {
        let name = format!("loss scale {}", case.name);
        match scaler_case(&case) {
            Ok(()) => report.expect(&name, true, String::new),
            Err(error) => report.fail(&name, &format!("{error:#}")),
        }
    }
    Ok(())
}

/// Follows the rows; iterations that are not listed had no overflow and changed nothing.
fn scaler_case(case: &ScalerCase) -> anyhow::Result<()> {
    let params = &case.params;
    let mut scaler = LossScaler::dynamic(LossScalerSettings {
        initial_scale: params.init_scale,
        loss_scale_window: params.scale_window,
        min_loss_scale: params.min_scale,
        hysteresis: params.delayed_shift,
        consecutive_hysteresis: params.consecutive_hysteresis,
        raise_error_at_min_scale: params.raise_error_at_min_scale,
    })?;
    let column =
        |name: &str| case.columns.iter().position(|c| c == name).with_context(|| format!("no column `{name}`"));
    let [iteration, overflow, used, after, tolerance, last] = [
        column("iteration")?,
        column("overflow")?,
        column("scale_used")?,
        column("scale_after")?,
        column("hysteresis_after")?,
        column("last_overflow_iter")?,
    ];
    ensure!(!case.rows.is_empty(), "no rows");
    for row in &case.rows {
        let at = row[iteration].as_u64().context("iteration")?;
        while scaler.iteration() < at {
            let before = scaler.scale();
            ensure!(
                scaler.update(false)? == ScaleUpdate::Step && scaler.scale().to_bits() == before.to_bits(),
                "the scale moved before iteration {at}"
            );
        }
        let seen =
            |scaler: &LossScaler| (scaler.scale(), scaler.tolerance(), scaler.last_overflow().map_or(-1, |i| i as i64));
        let expected =
            (number(&row[after]), row[tolerance].as_u64().context("hysteresis")?, row[last].as_i64().context("last")?);
        ensure!((scaler.scale() - number(&row[used])).abs() < 1e-9, "scale before iteration {at}: {}", scaler.scale());
        let has_overflow = row[overflow].as_u64() == Some(1);
        let result = scaler.update(has_overflow);
        let is_error = row.last().and_then(Value::as_str) == Some("error");
        ensure!(result.is_err() == is_error, "iteration {at}: {result:?}");
        if let Ok(update) = result {
            ensure!((update == ScaleUpdate::Skip) == has_overflow, "iteration {at}: {update:?}");
        }
        ensure!(seen(&scaler) == expected, "iteration {at}: {:?}, expected {expected:?}", seen(&scaler));
    }
    Ok(())
}
