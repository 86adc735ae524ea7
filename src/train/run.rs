//! What a run keeps beside the algorithm: its folder, metrics, console, cadence of logging, evaluation and saving, and
//! the state it resumes from.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, bail};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::continuation::{Continuation, Values};
use super::lock::Lock;
use super::plan::Memory;
use super::session::Session;
use super::{Context, Outcome, save};
use crate::checkpoint;
use crate::config::settings::{Interval, ModelSettings, ReportTo, Resume, TrainingSettings};
use crate::data::SamplerState;
use crate::ops::buffer;
use crate::optim::LossScaler;
use crate::telemetry::{Accumulator, Console, Metrics, Row, Section, read_rows, units, write_curves};
use crate::zero::{FlatBlock, ParamStore, ShardedAdamW};

/// File of a checkpoint with the state below.
const STATE_FILE: &str = "trainer_state.json";
/// File of a checkpoint with trained values and optimizer moments, f32.
const TENSORS_FILE: &str = "trainer_state.safetensors";
/// Version of the two.
const STATE_VERSION: u32 = 1;
/// What follows a parameter's name in the tensors file for the reference policy's values.
const REFERENCE_SUFFIX: &str = ".reference";
/// What may follow a parameter's name in the tensors file.
const SUFFIXES: [&str; 3] = [REFERENCE_SUFFIX, ".exp_avg", ".exp_avg_sq"];

/// Everything a resumed run needs besides tensors.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct State<B> {
    version: u32,
    /// `sft` or `grpo`.
    task: String,
    seed: u64,
    /// The settings that the state depends on; none in checkpoints of programs that did not note them.
    #[serde(default)]
    settings: Values,
    /// Optimizer steps taken by the loop.
    pub(super) step: u64,
    /// Steps the optimizer really took (skipped ones left out).
    optimizer_steps: u64,
    /// Place in the data.
    pub(super) sampler: SamplerState,
    /// Tokens trained on.
    pub(super) num_tokens: u64,
    /// What is left of a generation batch (GRPO).
    pub(super) buffer: Option<B>,
    /// The loss scaler of an fp16 run.
    #[serde(default)]
    pub(super) loss_scaler: Option<LossScaler>,
    /// Metrics recorded since the last logged row.
    accumulator: Accumulator,
}

/// A run in progress.
pub(super) struct Run<'a> {
    continuation: Continuation,
    settings: &'a TrainingSettings,
    context: Context<'a>,
    pub(super) console: Console,
    pub(super) memory: Memory,
    metrics: Metrics,
    pub(super) accumulator: Accumulator,
    /// Optimizer steps taken.
    pub(super) step: u64,
    /// Optimizer steps to take.
    pub(super) total: u64,
    pub(super) num_tokens: u64,
    started: Instant,
    step_started: Instant,
    first_step: u64,
    first_tokens: u64,
    last_saved: Option<u64>,
}

/// What a loop's own state adds to a checkpoint.
pub(super) struct LoopState<B> {
    /// Place in the data.
    pub(super) sampler: SamplerState,
    /// What is left of a generation batch (GRPO).
    pub(super) buffer: Option<B>,
    /// The loss scaler of an fp16 run.
    pub(super) loss_scaler: Option<LossScaler>,
}

/// Makes sure, before anything is loaded, that the output folder can be used, and takes it for this run.
pub(super) fn claim_output_dir(settings: &TrainingSettings, model: &ModelSettings) -> anyhow::Result<Lock> {
    let folder = &settings.output_dir;
    if model.lora.is_none() && is_same_place(folder, Path::new(&model.model_name_or_path)) {
        bail!(
            "`output_dir: {}` is the folder of `model_name_or_path`, and full fine-tuning would write over the model it \
             starts from; choose another `output_dir`, or train an adapter (`use_peft: true`)",
            folder.display()
        );
    }
    std::fs::create_dir_all(folder).map_err(crate::fs::io_error("create the folder", folder))?;
    // First of all: what follows looks at what another run may be writing, and removes what looks left over.
    let lock = Lock::take(folder)?;
    // A run that ended before its first row and checkpoint left nothing to lose.
    let has_rows = folder.join("metrics.jsonl").metadata().is_ok_and(|metadata| metadata.len() > 0);
    let holds_a_run = has_rows || checkpoint::newest_step(folder).is_some();
    if holds_a_run && settings.resume_from_checkpoint == Resume::No && !settings.overwrite_output_dir {
        bail!(
            "`output_dir: {}` already holds a run; set `resume_from_checkpoint: true` (or `--resume`) to go on, \
             `overwrite_output_dir: true` to start anew, or choose another folder",
            folder.display()
        );
    }
    checkpoint::clean_up(folder)?;
    Ok(lock)
}

fn is_same_place(one: &Path, other: &Path) -> bool {
    let is_one_folder = || matches!((one.canonicalize(), other.canonicalize()), (Ok(one), Ok(other)) if one == other);
    one == other || is_one_folder()
}

/// The checkpoint to resume from, if the settings ask for one; its state is that of a run which this one can continue.
pub(super) fn find_checkpoint(
    settings: &TrainingSettings,
    continuation: &Continuation,
) -> anyhow::Result<Option<checkpoint::Checkpoint>> {
    let checkpoint = match &settings.resume_from_checkpoint {
        Resume::No => return Ok(None),
        Resume::Path(path) => checkpoint::open(path)?,
        Resume::Latest => {
            let found = checkpoint::find_latest(&settings.output_dir)?;
            for skipped in &found.skipped {
                tracing::warn!("passed over `{}`: {}", skipped.path.display(), skipped.reason);
            }
            found.checkpoint.with_context(|| {
                format!(
                    "`resume_from_checkpoint: true`, but `{}` holds no whole checkpoint; leave the key out to start anew",
                    settings.output_dir.display()
                )
            })?
        }
    };
    let state: State<IgnoredAny> = checkpoint.json(STATE_FILE)?;
    let task = continuation.task;
    if state.version != STATE_VERSION || state.task != task {
        bail!(
            "`{}` holds state of `trainer {}` (format {}), not of `trainer {task}`",
            checkpoint.path().display(),
            state.task,
            state.version
        );
    }
    let mut saved = state.settings;
    saved.entry("seed".into()).or_insert_with(|| state.seed.to_string());
    continuation.check(&checkpoint, &saved)?;
    Ok(Some(checkpoint))
}

/// Takes a checkpoint's tensors into the session and the optimizer and returns its state.
pub(super) fn restore<B: for<'de> Deserialize<'de>>(
    checkpoint: &checkpoint::Checkpoint,
    session: &Session,
    optimizer: &mut ShardedAdamW,
) -> anyhow::Result<State<B>> {
    let place = checkpoint.path().display().to_string();
    let state: State<B> = checkpoint.json(STATE_FILE)?;
    let tensors: std::collections::BTreeMap<String, Vec<f32>> =
        checkpoint.tensors(TENSORS_FILE)?.into_iter().map(|t| (t.name, t.values)).collect();
    let store = session.engine.store();
    for flat in store.flats().filter(|flat| !flat.is_empty()) {
        let mut values = buffer::to_vec(flat.values())?;
        for entry in flat.entries() {
            let saved = tensors.get(&entry.name).filter(|v| v.len() == entry.range.len()).with_context(|| {
                format!(
                    "`{place}` has no fitting `{}`; resume with the model and adapter settings of that run",
                    entry.name
                )
            })?;
            values[entry.range.clone()].copy_from_slice(saved);
        }
        buffer::write(flat.values(), &values)?;
    }
    for (flat, reference) in store.flats().zip(store.reference().into_iter().flatten()) {
        let mut values = buffer::to_vec(reference)?;
        for entry in flat.entries() {
            let name = format!("{}{REFERENCE_SUFFIX}", entry.name);
            let saved = tensors.get(&name).filter(|v| v.len() == entry.range.len());
            values[entry.range.clone()].copy_from_slice(
                saved.with_context(|| format!("`{place}` has no `{name}`; was it saved without a reference?"))?,
            );
        }
        buffer::write(reference, &values)?;
    }
    let own: BTreeSet<&str> = store.flats().flat_map(FlatBlock::entries).map(|e| e.name.as_str()).collect();
    let is_known = |name: &str| {
        SUFFIXES.iter().find_map(|s| name.strip_suffix(s)).map_or_else(|| own.contains(name), |n| own.contains(n))
    };
    if let Some(name) = tensors.keys().find(|name| !is_known(name)) {
        bail!(
            "`{place}` holds `{name}`, which this run does not train; resume with the model and adapter settings of that run"
        );
    }
    optimizer.load_state(store, state.optimizer_steps, |name| tensors.get(name).cloned())?;
    Ok(state)
}

impl<'a> Run<'a> {
    /// Opens the run's files and console; `resumed` is the state of the checkpoint it goes on from.
    pub(super) fn begin<B>(
        continuation: Continuation,
        settings: &'a TrainingSettings,
        context: Context<'a>,
        total: u64,
        memory: Memory,
        resumed: Option<&State<B>>,
    ) -> anyhow::Result<Self> {
        if resumed.is_none() {
            // A later `--resume` must not find checkpoints of the run that this one replaces.
            checkpoint::remove_all(&settings.output_dir)?;
        }
        let console = Console::new(context.terminal.clone(), settings.disable_tqdm);
        let has_tensorboard = settings.report_to.contains(&ReportTo::Tensorboard);
        let metrics = Metrics::open(&settings.output_dir, resumed.map(|state| state.step), has_tensorboard)?;
        let path = settings.output_dir.join("config.resolved.yaml");
        crate::fs::write_atomic(&path, context.resolved_yaml.as_bytes())?;
        let (step, num_tokens) = resumed.map_or((0, 0), |state| (state.step, state.num_tokens));
        if step > total {
            bail!(
                "the checkpoint stands at step {step}, this run ends at {total}; raise `max_steps` or `num_train_epochs`"
            );
        }
        let accumulator = resumed.map(|state| state.accumulator.clone()).unwrap_or_default();
        let now = Instant::now();
        Ok(Self {
            continuation,
            settings,
            context,
            console,
            memory,
            metrics,
            accumulator,
            step,
            total,
            num_tokens,
            started: now,
            step_started: now,
            first_step: step,
            first_tokens: num_tokens,
            last_saved: resumed.map(|state| state.step),
        })
    }

    /// Prints the plan and starts the clock.
    pub(super) fn open(&mut self, mut sections: Vec<Section>) {
        sections.push(self.memory.planned());
        self.console.sections(&sections);
        for warning in self.context.warnings {
            self.console.note(&format!("warning: {warning}"));
        }
        self.console.start_steps(self.step, self.total);
        self.started = Instant::now();
        self.step_started = self.started;
    }

    /// Whether a signal asked the run to stop.
    pub(super) fn is_interrupted(&self) -> bool {
        (self.context.is_interrupted)()
    }

    /// Ends an optimizer step: counts it and writes a row if one is due. `message` stands beside the progress bar.
    pub(super) fn finish_step(&mut self, epoch: f64, message: &str) -> anyhow::Result<()> {
        self.step += 1;
        let now = Instant::now();
        self.accumulator.mean("step_time", (now - self.step_started).as_secs_f64());
        self.step_started = now;
        self.accumulator.latest("num_tokens", self.num_tokens);
        self.accumulator.latest("epoch", epoch);
        self.console.step(self.step, message);
        let is_due = self.step.is_multiple_of(self.settings.logging_steps as u64) || self.step == self.total;
        if is_due {
            let row = self.accumulator.drain(self.step);
            self.metrics.log(&row)?;
            self.console.log(&row);
        }
        Ok(())
    }

    /// Writes a row outside of the cadence, e.g. of an evaluation.
    pub(super) fn log_now(&mut self, values: impl IntoIterator<Item = (String, Value)>) -> anyhow::Result<()> {
        let mut row = Row::new();
        row.insert("step".into(), self.step.into());
        row.extend(values);
        self.metrics.log(&row)?;
        self.console.log(&row);
        // Evaluation is no part of the next step's time.
        self.step_started = Instant::now();
        Ok(())
    }

    /// Writes completions of the current step.
    pub(super) fn log_completions(&mut self, completions: &[impl Serialize]) -> anyhow::Result<()> {
        Ok(self.metrics.log_completions(completions)?)
    }

    /// Whether something with this cadence is due after the step just finished, which ended in `epoch` and began in
    /// `epoch_before`.
    pub(super) fn is_due(&self, interval: Interval, epoch_before: f64, epoch: f64) -> bool {
        match interval {
            Interval::No => false,
            Interval::Steps(steps) => self.step.is_multiple_of(steps as u64),
            Interval::Epoch => epoch.floor() > epoch_before.floor(),
        }
    }

    /// Writes a checkpoint of the current step, unless there is one.
    pub(super) fn save<B: Serialize + Clone>(
        &mut self,
        session: &Session,
        optimizer: &ShardedAdamW,
        own: LoopState<B>,
    ) -> anyhow::Result<()> {
        if self.last_saved == Some(self.step) {
            return Ok(());
        }
        let output_dir = &self.settings.output_dir;
        let mut writer = checkpoint::Writer::begin(output_dir, self.step)?;
        save::write_model(writer.path(), session)?;
        let state = State {
            version: STATE_VERSION,
            task: self.continuation.task.to_string(),
            seed: self.settings.seed,
            settings: self.continuation.values.clone(),
            step: self.step,
            optimizer_steps: optimizer.steps(),
            sampler: own.sampler,
            num_tokens: self.num_tokens,
            buffer: own.buffer,
            loss_scaler: own.loss_scaler,
            accumulator: self.accumulator.clone(),
        };
        writer.add_json(STATE_FILE, &state)?;
        let store = session.engine.store();
        let copies =
            |tensors: &mut dyn Iterator<Item = &candle_core::Tensor>| -> Result<Vec<Vec<f32>>, crate::ops::Error> {
                tensors.map(buffer::to_vec).collect()
            };
        let values = copies(&mut store.flats().map(FlatBlock::values))?;
        let moments = optimizer.to_host()?;
        let references = copies(&mut store.reference().into_iter().flatten())?;
        let tensors = named(store, &values, "")
            .into_iter()
            .chain(named(store, &references, REFERENCE_SUFFIX))
            .chain(ShardedAdamW::state(store, &moments));
        writer.add_tensors(TENSORS_FILE, tensors)?;
        let done = writer.commit(self.settings.save_total_limit)?;
        self.last_saved = Some(self.step);
        self.console.note(&format!("saved {} ({})", done.path.display(), units::bytes(done.bytes)));
        self.step_started = Instant::now();
        Ok(())
    }

    /// Ends a run that took all its steps: final model, curves, summary.
    pub(super) fn finish(mut self, session: &Session) -> anyhow::Result<Outcome> {
        let output_dir = &self.settings.output_dir;
        self.console.finish_steps();
        let mut summary = Section::new("Summary");
        save::write_model(output_dir, session)?;
        let curves = output_dir.join("curves.svg");
        let has_curves = write_curves(
            &curves,
            &title(self.continuation.task, output_dir),
            &read_rows(&output_dir.join("metrics.jsonl"))?,
        )?;
        let secs = self.started.elapsed().as_secs_f64();
        let steps = self.step - self.first_step;
        let tokens = self.num_tokens - self.first_tokens;
        summary.push("steps", format!("{steps} in {}", units::duration(secs)));
        summary.push("throughput", format!("{:.0} tokens/s ({} tokens)", tokens as f64 / secs, units::count(tokens)));
        let kind = if session.adapter_spec.is_some() { "adapter" } else { "model" };
        summary.push(kind, output_dir.display());
        summary.push("metrics", output_dir.join("metrics.jsonl").display());
        if has_curves {
            summary.push("curves", curves.display());
        }
        let memory = self.memory.measured(session)?;
        self.console.sections(&[memory, summary]);
        Ok(Outcome::Finished)
    }

    /// Ends a run that a signal stopped; its state is saved.
    pub(super) fn stop(mut self) -> Outcome {
        self.console.finish_steps();
        self.console.note(&format!(
            "interrupted after step {} of {}; go on with `--resume` (checkpoint-{} in {})",
            self.step,
            self.total,
            self.step,
            self.settings.output_dir.display()
        ));
        Outcome::Interrupted
    }
}

/// The parameters of every block with their values in `flats`, a copy of the flat buffers; `suffix` follows each name.
fn named<'a>(store: &ParamStore, flats: &'a [Vec<f32>], suffix: &str) -> Vec<(String, &'a [f32], Vec<usize>)> {
    let of_block = |(flat, values): (&FlatBlock, &'a Vec<f32>)| {
        let entries = flat.entries().iter();
        entries.map(|e| (format!("{}{suffix}", e.name), &values[e.range.clone()], e.shape.clone())).collect::<Vec<_>>()
    };
    store.flats().zip(flats).flat_map(of_block).collect()
}

fn title(task: &str, output_dir: &Path) -> String {
    format!("trainer {task} · {}", output_dir.display())
}
