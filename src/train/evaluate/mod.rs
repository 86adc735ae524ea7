//! Evaluation of a model outside of a run: on the run's data, with the run's rewards or loss, beside another model or alone.
//!
//! [`grpo`] draws completions and rewards them (`samples.rs`, `votes.rs`), [`sft`] shows texts (`texts.rs`); both open models one
//! after the other (`choice.rs`) with the settings of the run, and make of what they measure metrics with intervals
//! (`metric.rs`, `statistics.rs`, `student.rs`) and a report (`report.rs`).
//!
//! Invariants: nothing is written before everything is computed; two models of one evaluation get the same rows in the same
//! order and the same random numbers; the numbers are those of an evaluation within the run where it computes the same.

mod choice;
mod metric;
mod report;
mod samples;
mod statistics;
mod student;
mod texts;
mod votes;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde_json::{Map, Value, json};

use self::choice::Choice;
use self::metric::Metric;
use self::report::Report;
use super::generation::Surroundings;
use super::run::is_of_interrupt;
use super::session::{self, Session};
use super::{Backend, Context, Outcome, placing, plan, sft as supervised};
use crate::config::settings::{DataSettings, GrpoSettings, ModelSettings, RankSettings, SftSettings, TrainingSettings};
use crate::data::{self, Dataset, hub};
use crate::engine::Activations;
use crate::fs::io_error;
use crate::model::load::Purpose;
use crate::reward::Rewards;
use crate::telemetry::{Console, Section, units};
use crate::zero::{Offload, Sharing};

/// What is asked for beside the settings of the run.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// What the configuration is called.
    pub config: String,
    /// The model: a path, a hub id or `base`; `None`: the result of the run, else what it starts from.
    pub model_path: Option<String>,
    /// A second one to compare it with.
    pub against: Option<String>,
    /// Which rows; `None`: those for evaluation, else those for training.
    pub split: Option<SplitChoice>,
    /// The `k` of pass@k and majority@k, each at most the number of samples (`num_generations_eval`).
    pub ks: Vec<usize>,
    /// At most so many of the rows.
    pub max_samples: Option<usize>,
    /// Folder of the results; `None`: `evaluation` in `output_dir`.
    pub output: Option<PathBuf>,
}

/// Rows of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SplitChoice {
    /// Those that it trains on.
    Train,
    /// Those that it evaluates on.
    Test,
}

/// What one model came to.
struct Measured {
    metrics: Vec<Metric>,
    /// What each unit of the metrics is: the row of a prompt, or the number of a sequence.
    indices: Vec<usize>,
    /// Target tokens of each sequence; none of prompts.
    targets: Vec<usize>,
    /// Lines of completions.jsonl.
    records: Vec<Value>,
    speed: Speed,
}

/// Tokens computed, and the seconds that took.
struct Speed {
    tokens: usize,
    secs: f64,
}

/// The rows that models are shown.
struct Rows {
    dataset: Dataset,
    is_for_evaluation: bool,
}

impl Rows {
    fn name(&self) -> &'static str {
        if self.is_for_evaluation { "evaluation" } else { "training" }
    }
}

/// What both tasks have of the run.
struct Shared<'a> {
    task: &'static str,
    model: &'a ModelSettings,
    data: &'a DataSettings,
    training: &'a TrainingSettings,
    /// Ranks of the run, which evaluation does without.
    world_size: usize,
    /// How models are measured, for the record and for people.
    facts: Map<String, Value>,
    shown: Vec<(&'static str, String)>,
}

/// Evaluates by completions of the prompts that `settings` name, `num_generations_eval` of each.
///
/// # Errors
/// If a model or the rows are not there or unusable, a reward fails, or a file cannot be written.
pub fn grpo(settings: &GrpoSettings, request: &Request, context: &Context<'_>) -> anyhow::Result<Outcome> {
    let world_size = settings.training.ranks.world_size;
    let settings = &GrpoSettings { training: alone(&settings.training), ..settings.clone() };
    // Before the model, which takes longer: an import that fails is said at once.
    let rewards = Rewards::start(&settings.reward_funcs, &settings.rewards, &*context.is_interrupted)?;
    let (samples, temperature) = (settings.num_generations_eval, settings.sampling.temperature);
    let same =
        if settings.sampling.top_k == 1 && samples > 1 { ", `top_k: 1`, which makes them all alike" } else { "" };
    let length = settings.max_completion_length.map_or_else(|| "as many".into(), |length| format!("at most {length}"));
    let mut shown = vec![
        ("samples", format!("{samples} of each prompt, temperature {temperature}{same}, {length} new tokens")),
        ("rewards", rewards.names().join(", ")),
    ];
    shown.extend(rewards.surroundings());
    let shared = Shared {
        task: "grpo",
        model: &settings.model,
        data: &settings.data,
        training: &settings.training,
        world_size,
        facts: samples::settings_to_json(settings, &request.ks, rewards.names()),
        shown,
    };
    let mut kept = Some(rewards);
    run(&shared, request, context, &mut |session, rows, surroundings| {
        let rewards = kept.take().context("the rewards were lost with the model before")?;
        let rows = (&rows.dataset, rows.name());
        let (measured, rewards) =
            samples::measure(settings, &request.ks, session, rows, rewards, (surroundings, context.ready))?;
        kept = Some(rewards);
        Ok(measured)
    })
}

/// Evaluates by the loss of the texts that `settings` name.
///
/// # Errors
/// If a model or the rows are not there or unusable, or a file cannot be written.
pub fn sft(settings: &SftSettings, request: &Request, context: &Context<'_>) -> anyhow::Result<Outcome> {
    let world_size = settings.training.ranks.world_size;
    let settings = &SftSettings { training: alone(&settings.training), ..settings.clone() };
    let loss = match settings.label_smoothing_factor {
        0.0 => settings.loss_type.to_string(),
        factor => format!("{}, labels smoothed by {factor}; perplexity is without", settings.loss_type),
    };
    let shared = Shared {
        task: "sft",
        model: &settings.model,
        data: &settings.data,
        training: &settings.training,
        world_size,
        facts: [
            ("loss_type".to_string(), json!(settings.loss_type.to_string())),
            ("label_smoothing_factor".to_string(), json!(settings.label_smoothing_factor)),
            ("max_length".to_string(), json!(settings.max_length)),
        ]
        .into_iter()
        .collect(),
        shown: vec![("loss", loss)],
    };
    run(&shared, request, context, &mut |session, rows, surroundings| {
        supervised::check_smoothing(settings, &session.backend())?;
        let packing = if rows.is_for_evaluation { settings.eval_packing } else { settings.packing };
        texts::measure(settings, session, (&rows.dataset, rows.name(), packing), (surroundings, context.ready))
    })
}

/// The settings for one rank.
fn alone(training: &TrainingSettings) -> TrainingSettings {
    let ranks = RankSettings { offload: training.ranks.offload.clone(), ..RankSettings::default() };
    TrainingSettings { ranks, ..training.clone() }
}

/// Measures a model once it is open.
type Measure<'a> = dyn FnMut(&mut Session, &Rows, &Surroundings<'_>) -> anyhow::Result<Measured> + 'a;

/// Opens the models one after the other, measures them, and reports.
fn run(
    shared: &Shared<'_>,
    request: &Request,
    context: &Context<'_>,
    measure: &mut Measure<'_>,
) -> anyhow::Result<Outcome> {
    let mut progress = plan::downloads(&context.terminal);
    let choices = choices(shared, request, &mut progress)?;
    let backend = Backend::open(shared.training.device, shared.training.precision)?;
    if let Some(bytes) = shared.training.device_memory_limit {
        backend.limit_memory(bytes, super::estimate::CONTEXT_ALONE)?;
    }
    let rows = rows(shared, request, &mut progress)?;
    let folder = request.output.clone().unwrap_or_else(|| shared.training.output_dir.join("evaluation"));
    check_writable(&folder)?;
    let console = Console::new(context.terminal.clone(), shared.training.disable_tqdm);
    console.sections(&[plan_section(shared, request, &choices, &rows, &backend, &folder)]);
    for warning in context.warnings {
        console.note(&format!("warning: {warning}"));
    }
    let is_interrupted = &*context.is_interrupted;
    let surroundings = Surroundings { ranks: context.ranks.clone(), console: &console, is_interrupted };
    let mut measured = Vec::with_capacity(choices.len());
    for choice in &choices {
        let one = open(choice, shared, &backend, context, &mut progress)
            .and_then(|mut session| measure(&mut session, &rows, &surroundings));
        match one {
            Err(error) if is_of_interrupt(&error, is_interrupted) => tracing::debug!("given up: {error:#}"),
            one => measured.push(one?),
        }
        if is_interrupted() {
            console.note("interrupted: nothing was written");
            return Ok(Outcome::Interrupted);
        }
    }
    let report = Report::new(shared, request, &rows, &backend, &choices, &measured);
    report.write(&folder)?;
    console.sections(&report.sections(&folder));
    Ok(Outcome::Finished)
}

fn choices(shared: &Shared<'_>, request: &Request, progress: &mut hub::Progress<'_>) -> anyhow::Result<Vec<Choice>> {
    let mut choice = |name: Option<&str>, flag: &str| Choice::of(name, flag, shared.model, shared.training, progress);
    let mut choices = vec![choice(request.model_path.as_deref(), "--model_path")?];
    if let Some(against) = &request.against {
        choices.push(choice(Some(against), "--against")?);
    }
    Ok(choices)
}

fn open(
    choice: &Choice,
    shared: &Shared<'_>,
    backend: &Backend,
    context: &Context<'_>,
    progress: &mut hub::Progress<'_>,
) -> anyhow::Result<Session> {
    let activations = (Activations::Keep, 0);
    let run = placing::run_name(&shared.training.output_dir, &crate::ranks::Alone)?;
    let (seed, purpose) = (shared.training.seed, Purpose::Inference);
    let (mut session, ()) = session::open(
        &choice.settings,
        seed,
        purpose,
        activations,
        backend,
        (Sharing::alone(), Offload::of(&shared.training.ranks, &backend.device, backend.types.read(), &run)),
        (progress, |_, _| Ok(())),
    )?;
    session.engine.ask_whether_interrupted(context.is_interrupted.clone());
    Ok(session)
}

/// The rows of the split that is asked for; else those for evaluation, and where there are none those for training.
fn rows(shared: &Shared<'_>, request: &Request, progress: &mut hub::Progress<'_>) -> anyhow::Result<Rows> {
    let (settings, seed) = (shared.data, shared.training.seed);
    let splits = match request.split {
        Some(SplitChoice::Test) => data::load(settings, seed, Some("--split test"), progress)?,
        Some(SplitChoice::Train) => data::load(settings, seed, plan::evaluation_key(shared.training), progress)?,
        None => data::load_all(settings, seed, progress)?,
    };
    let eval = splits.eval.filter(|_| request.split != Some(SplitChoice::Train));
    let is_for_evaluation = eval.is_some();
    let mut dataset = eval.unwrap_or(splits.train);
    if let Some(most) = request.max_samples {
        dataset.truncate(most);
    }
    Ok(Rows { dataset, is_for_evaluation })
}

/// Refuses a place for results, which come after long work, where no folder can be. Leaves nothing there.
fn check_writable(folder: &Path) -> anyhow::Result<()> {
    let there = folder.ancestors().map(|place| if place.as_os_str().is_empty() { Path::new(".") } else { place });
    let Some(place) = there.into_iter().find(|place| place.exists()) else { return Ok(()) };
    if !place.is_dir() {
        bail!(
            "the results cannot go into `{}`: `{}` is no folder; give another with `--output`",
            folder.display(),
            place.display()
        );
    }
    tempfile::tempfile_in(place).map_err(io_error("create a file in", place))?;
    Ok(())
}

fn plan_section(
    shared: &Shared<'_>,
    request: &Request,
    choices: &[Choice],
    rows: &Rows,
    backend: &Backend,
    folder: &Path,
) -> Section {
    let mut section = Section::new("Evaluation").row("config", &request.config).row("task", shared.task);
    for (choice, name) in choices.iter().zip(report::COLUMNS) {
        let note = choice.note.as_ref().map_or_else(String::new, |note| format!(" ({note})"));
        section.push(name, format!("{}{note}", choice.described));
    }
    let which = match (rows.is_for_evaluation, request.split) {
        (true, _) => "of the evaluation split",
        (false, Some(_)) => "of the training split",
        (false, None) => "of the training split, for want of rows for evaluation",
    };
    let count = units::count(rows.dataset.len() as u64);
    section.push("data", format!("{}: {count} rows {which}", report::data_name(shared.data)));
    for (name, value) in &shared.shown {
        section.push(*name, value);
    }
    section.push("device", backend.describe());
    if shared.world_size > 1 {
        section.push(
            "ranks",
            format!("1: evaluation is one process; the {} of the configuration are for training", shared.world_size),
        );
    }
    section.row("seed", shared.training.seed).row("output", folder.display())
}
