//! What a run keeps beside the algorithm: metrics, console, and the cadence of logging, evaluation and saving.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::bail;
use serde::Serialize;
use serde_json::Value;

use super::best::{Best, BestTracker};
use super::cadence::{Cadence, Due};
use super::continuation::Continuation;
use super::estimate::Work;
use super::generation::Surroundings;
use super::inputs::Inputs;
use super::notices::Notices;
use super::output_dir::OutputDir;
use super::plan::Memory;
use super::results;
use super::save_room::SaveRoom;
use super::session::Session;
use super::state::{LoopState, RunState, State, write_checkpoint};
use super::tuning::Tuning;
use super::{Context, Outcome, card_rates, plan, save};
use crate::checkpoint;
use crate::config::settings::{Interval, ReportTo, TrainingSettings};
use crate::ranks::{self, Ranks};
use crate::telemetry::{self, Accumulator, Console, Metrics, Row, Sample, Section, read_rows, units, write_curves};
use crate::zero::ShardedOptimizer;

/// A run in progress.
pub(super) struct Run<'a> {
    continuation: Continuation,
    inputs: Inputs,
    best: BestTracker<'a>,
    cadence: Cadence,
    /// What there is to say of steps that teach nothing.
    pub(super) notices: Notices,
    /// What was wrong with the last evaluation; the run ends with it once it has saved.
    evaluation_problem: Option<String>,
    // Held as long as the run lasts, by the first rank.
    _folder: Option<OutputDir>,
    /// What there is to say of the folder.
    folder_note: Option<String>,
    settings: &'a TrainingSettings,
    context: Context<'a>,
    pub(super) console: Console,
    pub(super) memory: Memory,
    /// The first rank's.
    metrics: Option<Metrics>,
    pub(super) accumulator: Accumulator,
    /// Completions of the newest generation batch, for the console at the next log line.
    pub(super) samples: Vec<Sample>,
    /// Optimizer steps taken.
    pub(super) step: u64,
    pub(super) num_tokens: u64,
    /// Metrics and tokens before the step that is under way.
    before_step: (Accumulator, u64),
    started: Instant,
    step_started: Instant,
    /// Seconds of all steps together, without what is between them: evaluations and saving.
    stepping: f64,
    first_step: u64,
    first_tokens: u64,
    last_saved: Option<u64>,
    /// The checkpoint that the run goes on from.
    resumed_from: Option<PathBuf>,
    tuning: Option<Tuning>,
}

impl<'a> Run<'a> {
    /// Opens the run's files and console; `resumed` is the state of the checkpoint it goes on from.
    pub(super) fn begin<B>(
        mut folder: Option<OutputDir>,
        (continuation, inputs): (Continuation, Inputs),
        settings: &'a TrainingSettings,
        context: Context<'a>,
        cadence: Cadence,
        memory: Memory,
        resumed: Option<&State<B>>,
    ) -> anyhow::Result<Self> {
        let (step, num_tokens) = resumed.map_or((0, 0), |state| (state.step, state.num_tokens));
        if step > cadence.total {
            bail!(
                "the checkpoint stands at step {step}, this run ends at {}; raise `max_steps` or `num_train_epochs`",
                cadence.total
            );
        }
        // From here on all of them have something to save.
        context.ranks.barrier()?;
        (context.ready)();
        let folder_note = folder.as_mut().map(OutputDir::settle).transpose()?.flatten();
        let is_first = context.ranks.is_first();
        let console =
            if is_first { Console::new(context.terminal.clone(), settings.disable_tqdm) } else { Console::silent() };
        let has_tensorboard = settings.report_to.contains(&ReportTo::Tensorboard);
        let open = || Metrics::open(&settings.output_dir, resumed.map(|state| state.step), has_tensorboard);
        let metrics = is_first.then(open).transpose()?;
        if is_first {
            let path = settings.output_dir.join("config.resolved.yaml");
            crate::fs::write_atomic(&path, context.resolved_yaml.as_bytes())?;
        }
        let kept: Option<(&Best, &Path)> = resumed.map(|state| (&state.best, state.place.as_path()));
        let best = BestTracker::new(settings.best.as_ref(), &settings.output_dir, kept);
        let accumulator = resumed.map(|state| state.accumulator.clone()).unwrap_or_default();
        let now = Instant::now();
        Ok(Self {
            continuation,
            inputs,
            best,
            cadence,
            notices: Notices::default(),
            evaluation_problem: None,
            _folder: folder,
            folder_note,
            settings,
            context,
            console,
            memory,
            metrics,
            before_step: (accumulator.clone(), num_tokens),
            accumulator,
            samples: Vec::new(),
            step,
            num_tokens,
            started: now,
            step_started: now,
            stepping: 0.0,
            first_step: step,
            first_tokens: num_tokens,
            // A checkpoint that still waits for its evaluation is written again after it.
            last_saved: resumed.filter(|state| !state.is_evaluation_due).map(|state| state.step),
            resumed_from: resumed.map(|state| state.place.clone()),
            tuning: None,
        })
    }

    /// Prints the plan of micro-batches as long as those of `work`, and starts the clock. Products are made as they were made by the
    /// run that this one goes on from, and activations planned with the rates that it measured.
    pub(super) fn open(
        &mut self,
        session: &Session,
        optimizer: &ShardedOptimizer,
        work: Work,
        mut sections: Vec<Section>,
    ) -> anyhow::Result<()> {
        let backend = &session.backend();
        let is_deterministic = self.settings.full_determinism;
        let folder = &self.settings.output_dir;
        let from = self.resumed_from.as_deref().and_then(Path::parent).unwrap_or(folder);
        let (sharing, say) = (session.engine.store().sharing(), |text: &str| self.console.note(text));
        if let Some(rates) = card_rates::of_run(backend, sharing, Some((from, folder)), is_deterministic, &say)? {
            session.engine.set_rates(rates);
        }
        self.tuning = Tuning::new(backend, is_deterministic, self.context.ranks.is_first())?;
        if let Some(tuning) = &mut self.tuning {
            tuning.keep(from, folder, self.resumed_from.is_some().then_some(self.step))?;
        }
        sections.push(plan::activations_section(session, work));
        let room = SaveRoom::of(session, optimizer, self.settings, &self.cadence, self.step);
        if let Some(section) = sections.first_mut() {
            if let Some(place) = &self.resumed_from {
                section.push("goes on from", place.display());
            }
            section.push("checkpoints", room.describe());
        }
        sections.push(self.memory.planned());
        self.console.sections(&sections);
        for warning in self.context.warnings {
            self.console.note(&format!("warning: {warning}"));
        }
        if let Some(warning) = room.warning(folder) {
            self.console.note(&format!("warning: {warning}"));
        }
        if let Some(note) = self.folder_note.take() {
            self.console.note(&note);
        }
        self.console.start_steps(self.step, self.cadence.total);
        self.started = Instant::now();
        self.step_started = self.started;
        Ok(())
    }

    /// What is due before the first step: an evaluation of the start, or the one that a signal cut short.
    pub(super) fn due_at_first<B>(&self, resumed: Option<&State<B>>) -> Due {
        match resumed {
            Some(state) => Due { evaluate: state.is_evaluation_due, save: state.is_evaluation_due, log: false },
            None => Due { evaluate: self.settings.eval_on_start, ..Due::default() },
        }
    }

    /// The ranks of the run.
    pub(super) fn ranks(&self) -> Arc<dyn Ranks> {
        Arc::clone(&self.context.ranks)
    }

    /// What completions are made in.
    pub(super) fn surroundings(&self) -> Surroundings<'_> {
        Surroundings { ranks: self.ranks(), console: &self.console, is_interrupted: &*self.context.is_interrupted }
    }

    /// Whether all steps are taken, or the results of evaluations no longer get better.
    pub(super) fn is_over(&self) -> bool {
        self.step >= self.cadence.total || self.best.stops().is_some()
    }

    /// Optimizer steps to take.
    pub(super) fn total(&self) -> u64 {
        self.cadence.total
    }

    /// Whether a signal asked this rank to stop.
    pub(super) fn is_interrupted(&self) -> bool {
        (self.context.is_interrupted)()
    }

    /// Whether a signal asked any rank to stop: all of them save and stop then.
    pub(super) fn is_any_interrupted(&self) -> anyhow::Result<bool> {
        Ok(self.context.ranks.any(self.is_interrupted())?)
    }

    /// The result of work that a signal cuts short; `None` if it did, on this rank or on another. What is given up is done anew
    /// by the run that goes on, and so is what failed when the run was to stop: a program may have got the same signal.
    pub(super) fn unless_interrupted<T>(&self, result: anyhow::Result<T>) -> anyhow::Result<Option<T>> {
        let Err(error) = result else { return result.map(Some) };
        let of_ranks = || error.chain().filter_map(|cause| cause.downcast_ref::<ranks::Error>());
        if of_ranks().any(ranks::Error::is_of_peer) {
            return Err(error);
        }
        if is_of_interrupt(&error, &*self.context.is_interrupted)
            || of_ranks().any(|error| matches!(error, ranks::Error::StartOver { .. }))
        {
            tracing::debug!("given up: {error:#}");
            self.context.ranks.start_over()?;
            return Ok(None);
        }
        Err(error)
    }

    /// Begins an optimizer step.
    pub(super) fn begin_step(&mut self) {
        self.before_step = (self.accumulator.clone(), self.num_tokens);
    }

    /// Leaves a step that a signal cut short as if it had not begun.
    pub(super) fn abandon_step(&mut self) {
        (self.accumulator, self.num_tokens) = std::mem::take(&mut self.before_step);
    }

    /// Ends an optimizer step: counts it and writes a row if one is due. `message` stands beside the progress bar. Returns
    /// what is due after it.
    pub(super) fn finish_step(&mut self, message: &str) -> anyhow::Result<Due> {
        self.step += 1;
        let now = Instant::now();
        let secs = (now - self.step_started).as_secs_f64();
        self.accumulator.mean("step_time", secs);
        self.stepping += secs;
        self.step_started = now;
        self.accumulator.latest("num_tokens", self.num_tokens);
        self.accumulator.latest("epoch", self.cadence.epoch.after(self.step));
        self.console.step(self.step, message);
        let due = self.cadence.after(self.step);
        if due.log {
            let row = self.accumulator.drain(self.step);
            self.write(|metrics| metrics.log(&row))?;
            self.console.log(&row);
            let samples = std::mem::take(&mut self.samples);
            if !samples.is_empty() {
                self.console.completions(self.step, &samples);
            }
        }
        self.tune()?;
        Ok(due)
    }

    /// Tries algorithms for the products that were new in the step, if any were and there are steps left to gain by it.
    fn tune(&mut self) -> anyhow::Result<()> {
        let Some(tuning) = self.tuning.as_mut().filter(|_| self.step < self.cadence.total) else { return Ok(()) };
        let should_stop = || (self.context.is_interrupted)();
        if tuning.after_step(self.step, &|text| self.console.note(text), &should_stop)?.is_some() {
            // Trials are no part of the next step's time.
            self.step_started = Instant::now();
        }
        Ok(())
    }

    /// Writes a row outside of the cadence.
    pub(super) fn log_now(&mut self, values: impl IntoIterator<Item = (String, Value)>) -> anyhow::Result<()> {
        let mut row = Row::new();
        row.insert("step".into(), self.step.into());
        row.insert("epoch".into(), self.cadence.epoch.after(self.step).into());
        row.extend(values);
        self.write(|metrics| metrics.log(&row))?;
        self.console.log(&row);
        // Evaluation is no part of the next step's time.
        self.step_started = Instant::now();
        Ok(())
    }

    /// Writes the results of an evaluation, which may be the best so far.
    pub(super) fn log_evaluation(&mut self, values: Vec<(String, Value)>) -> anyhow::Result<()> {
        // Times are each rank's own, and what follows from them must not be.
        let mut message = serde_json::to_vec(&values)?;
        self.context.ranks.broadcast(&mut message, 0)?;
        let values = if self.context.ranks.is_first() { values } else { serde_json::from_slice(&message)? };
        // What is wrong with them is said once the step is saved: training until here is not lost for it.
        self.evaluation_problem = self.best.observe(self.step, &values).err();
        self.log_now(values)
    }

    /// Writes completions of the current step.
    pub(super) fn log_completions(&mut self, completions: &[impl Serialize]) -> anyhow::Result<()> {
        self.write(|metrics| metrics.log_completions(completions))
    }

    /// Writes to the run's files, which the first rank has.
    fn write(&mut self, write: impl FnOnce(&mut Metrics) -> Result<(), telemetry::Error>) -> anyhow::Result<()> {
        Ok(self.metrics.as_mut().map(write).transpose().map(drop)?)
    }

    /// Whether the evaluation just made asks for a checkpoint.
    pub(super) fn is_evaluation_saved(&self) -> bool {
        let is_best = self.settings.save_strategy == Interval::Best && self.best.is_new(self.step);
        is_best || self.evaluation_problem.is_some()
    }

    /// Writes a checkpoint of the current step, unless there is one.
    pub(super) fn save<B: Serialize + Clone>(
        &mut self,
        session: &Session,
        optimizer: &ShardedOptimizer,
        own: LoopState<B>,
    ) -> anyhow::Result<()> {
        if self.last_saved == Some(self.step) {
            return Ok(());
        }
        let best = self.best.saving(self.step);
        let state = RunState {
            continuation: &self.continuation,
            inputs: &self.inputs,
            best,
            kept_step: self.best.kept_step(),
            step: self.step,
            num_tokens: self.num_tokens,
            world_size: self.context.ranks.world_size(),
            accumulator: &self.accumulator,
        };
        let done = write_checkpoint(self.settings, session, optimizer, state, own, &*self.context.ranks)?;
        self.last_saved = Some(self.step);
        let place = self.settings.output_dir.join(format!("checkpoint-{}", self.step));
        if let Some(done) = done {
            self.console.note(&format!("saved {} ({})", done.path.display(), units::bytes(done.bytes)));
        }
        // Nobody goes on, or ends, before the checkpoint is whole.
        self.context.ranks.barrier()?;
        self.step_started = Instant::now();
        if let Some(problem) = self.evaluation_problem.take() {
            bail!("{problem}; correct it and go on with `--resume` from `{}`", place.display());
        }
        Ok(())
    }

    /// Ends a run that took all its steps or no longer gets better: final model, curves, summary.
    pub(super) fn finish(mut self, session: &Session) -> anyhow::Result<Outcome> {
        let output_dir = &self.settings.output_dir;
        self.console.finish_steps();
        let best = self.best.checkpoint().filter(|_| self.best.is_loaded());
        // The first rank's word: it has the checkpoints.
        let mut is_now = vec![u8::from(best.is_none())];
        self.context.ranks.broadcast(&mut is_now, 0)?;
        if !self.context.ranks.is_first() {
            if is_now == [1] {
                save::help_to_write(session)?;
            }
            return Ok(Outcome::Finished);
        }
        let mut summary = Section::new("Summary");
        if let Some(reason) = self.best.stops() {
            self.console.note(&format!("stopped early after step {} of {}: {reason}", self.step, self.cadence.total));
        }
        if best.is_none() && self.best.is_loaded() {
            tracing::warn!("`load_best_model_at_end`: no evaluation came with a checkpoint, so the last model is left");
        }
        results::publish(output_dir, session, best.as_deref().map_or(results::Final::Now, results::Final::Best))?;
        if let Some(step) = self.best.kept_step().filter(|_| self.settings.save_total_limit == Some(1)) {
            checkpoint::keep_only(output_dir, step);
        }
        let curves = output_dir.join(results::CURVES);
        let has_curves = write_curves(
            &curves,
            &title(self.continuation.task, output_dir),
            &read_rows(&output_dir.join("metrics.jsonl"))?,
        )?;
        let steps = self.step - self.first_step;
        let tokens = self.num_tokens - self.first_tokens;
        let rate = tokens as f64 / self.stepping.max(f64::MIN_POSITIVE);
        summary.push("steps", format!("{steps} in {}", units::duration(self.stepping)));
        let all = units::duration(self.started.elapsed().as_secs_f64());
        summary.push("in all", format!("{all}, with evaluations and saving"));
        summary.push("throughput", format!("{rate:.0} tokens/s of the steps ({} tokens)", units::count(tokens)));
        for (name, count) in self.notices.summary() {
            summary.push(name, count);
        }
        let kind = if session.adapter_spec.is_some() { "adapter" } else { "model" };
        let whose = if best.is_some() { " (of the best checkpoint)" } else { "" };
        summary.push(kind, format!("{}{whose}", output_dir.display()));
        if let Some(best) = self.best.describe() {
            summary.push("best", best);
        }
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
        if self.settings.save_only_model {
            self.console.note(&format!(
                "interrupted after step {} of {}; the model is in checkpoint-{} of {}, from which no run can go on \
                 (`save_only_model: true`)",
                self.step,
                self.cadence.total,
                self.step,
                self.settings.output_dir.display()
            ));
            return Outcome::Interrupted;
        }
        self.console.note(&format!(
            "interrupted after step {} of {}; go on with `--resume` (checkpoint-{} in {})",
            self.step,
            self.cadence.total,
            self.step,
            self.settings.output_dir.display()
        ));
        Outcome::Interrupted
    }
}

/// Whether work failed because it was to stop.
pub(super) fn is_of_interrupt(error: &anyhow::Error, is_interrupted: &dyn Fn() -> bool) -> bool {
    /// A signal to all processes of a job may come to a reward program first.
    const GRACE: Duration = Duration::from_millis(300);
    let is_program = |cause: &(dyn std::error::Error + 'static)| {
        use crate::reward::Error::{Program, Python};
        matches!(cause.downcast_ref(), Some(Program { .. } | Python { .. }))
    };
    if error.chain().any(is_program) && !is_interrupted() {
        std::thread::sleep(GRACE);
    }
    is_interrupted()
}

fn title(task: &str, output_dir: &Path) -> String {
    format!("trainer {task} · {}", output_dir.display())
}
