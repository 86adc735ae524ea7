//! What a checkpoint keeps of a run: found, taken back, written.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use super::best::Best;
use super::continuation::{self, Continuation, Values};
use super::inputs::Inputs;
use super::material::Material;
use super::output_dir::{OutputDir, comes_into_view};
use super::save;
use super::session::Session;
use super::shards;
use crate::algo::EntropyControl;
use crate::checkpoint::{self, Checkpoint};
use crate::config::settings::{Resume, TrainingSettings};
use crate::data::SamplerState;
use crate::fs::io_error;
use crate::optim::LossScaler;
use crate::ranks::Ranks;
use crate::telemetry::Accumulator;
use crate::zero::ShardedOptimizer;

/// File of a checkpoint with the state below.
pub(super) const STATE_FILE: &str = "trainer_state.json";
/// Version of it where one file has all tensors, and where each rank has written its part: programs that know the first alone must
/// not take a part for all.
const STATE_VERSIONS: [u32; 2] = [1, 2];

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
    /// The weight of an entropy bonus that follows the entropy (GRPO).
    #[serde(default)]
    pub(super) entropy_control: Option<EntropyControl>,
    /// Metrics recorded since the last logged row.
    pub(super) accumulator: Accumulator,
    /// What the evaluations so far came to.
    #[serde(flatten)]
    pub(super) best: Best,
    /// What was read; none in checkpoints of programs that did not note it.
    #[serde(default)]
    inputs: Option<Inputs>,
    /// The files with trained values and moments; none in checkpoints of programs that wrote one of a fixed name.
    #[serde(default)]
    tensor_files: Vec<String>,
    /// Whether the model is all there is beside this.
    #[serde(default)]
    is_model_only: bool,
    /// Whether the evaluation that is due after these steps was cut short by a signal.
    #[serde(default)]
    pub(super) is_evaluation_due: bool,
    /// Where the checkpoint lies.
    #[serde(skip)]
    pub(super) place: PathBuf,
    /// Whether the rows are others than they were.
    #[serde(skip)]
    pub(super) has_other_rows: bool,
}

/// What a loop's own state adds to a checkpoint.
pub(super) struct LoopState<B> {
    /// Place in the data.
    pub(super) sampler: SamplerState,
    /// What is left of a generation batch (GRPO).
    pub(super) buffer: Option<B>,
    /// The loss scaler of an fp16 run.
    pub(super) loss_scaler: Option<LossScaler>,
    /// The weight of an entropy bonus that follows the entropy (GRPO).
    pub(super) entropy_control: Option<EntropyControl>,
    /// Whether an evaluation is still to be made.
    pub(super) is_evaluation_due: bool,
}

/// The checkpoint to resume from, if the settings ask for one; its state is that of a run which this one can continue, and
/// what `folder` holds beyond it is moved aside. The first rank, which has the folder, finds it for all.
pub(super) fn find_checkpoint(
    settings: &TrainingSettings,
    continuation: &Continuation,
    folder: Option<&mut OutputDir>,
    ranks: &dyn Ranks,
) -> anyhow::Result<Option<Checkpoint>> {
    let found = folder.map(|folder| find(settings, continuation, folder)).transpose()?.flatten();
    let place = found.as_ref().map(|checkpoint| {
        let path = checkpoint.path().canonicalize().map_err(io_error("find", &settings.output_dir))?;
        Ok::<_, crate::fs::Error>((path, checkpoint.identity()))
    });
    let place = place.transpose()?;
    let mut message = serde_json::to_vec(&place)?;
    ranks.broadcast(&mut message, 0)?;
    if ranks.is_first() {
        return Ok(found);
    }
    let place: Option<(PathBuf, String)> = serde_json::from_slice(&message)?;
    let opened = place.map(|(place, identity)| {
        checkpoint::open_compared(&place, &identity).with_context(|| {
            format!(
                "rank {} cannot read the checkpoint that rank 0 goes on from; it must lie on a shared disk",
                ranks.rank()
            )
        })
    });
    opened.transpose()
}

fn find(
    settings: &TrainingSettings,
    continuation: &Continuation,
    folder: &mut OutputDir,
) -> anyhow::Result<Option<Checkpoint>> {
    let checkpoint = match &settings.resume_from_checkpoint {
        Resume::No => return Ok(None),
        Resume::Auto if checkpoint::newest_step(&settings.output_dir).is_none() => return Ok(None),
        Resume::Path(path) => checkpoint::open(path)?,
        Resume::Latest | Resume::Auto => {
            let found = checkpoint::find_latest(&settings.output_dir)?;
            for skipped in &found.skipped {
                tracing::warn!("passed over `{}`: {}", skipped.path.display(), skipped.reason);
            }
            found.checkpoint.with_context(|| {
                format!(
                    "`resume_from_checkpoint` asks for the newest checkpoint, but `{}` holds no whole checkpoint; leave the \
                     key out to start anew",
                    settings.output_dir.display()
                )
            })?
        }
    };
    if !checkpoint.contains(STATE_FILE) {
        bail!(
            "`{}` holds no `{STATE_FILE}`: it was not saved by a training run; resume from another checkpoint",
            checkpoint.path().display()
        );
    }
    let state: State<IgnoredAny> = checkpoint.json(STATE_FILE)?;
    let task = continuation.task;
    if !STATE_VERSIONS.contains(&state.version) || state.task != task {
        bail!(
            "`{}` holds state of `trainer {}` (format {}), not of `trainer {task}`",
            checkpoint.path().display(),
            state.task,
            state.version
        );
    }
    state.check(&checkpoint)?;
    let mut saved = state.settings;
    saved.entry("seed".into()).or_insert_with(|| state.seed.to_string());
    let is_changed = continuation.check(&checkpoint, &saved)?;
    folder.leave_other_courses(&checkpoint, is_changed)?;
    Ok(Some(checkpoint))
}

impl<B> State<B> {
    /// Checks that the place in data of `len` items is the one that the steps lead to, unless the rows are others than they
    /// were.
    pub(super) fn check_place(&self, counted: SamplerState, len: usize) -> anyhow::Result<()> {
        if self.has_other_rows || self.sampler == counted {
            return Ok(());
        }
        bail!(
            "`{}` stands at item {} of pass {} over its data; with this data, which has {len} items, its {} steps lead to item \
             {} of pass {}. Resume with the data set, packing and sample limits of the first run. (A checkpoint of a program \
             whose batches reached over the end of a pass cannot go on: start a new run from its weights)",
            self.place.display(),
            self.sampler.position,
            self.sampler.epoch + 1,
            self.step,
            counted.position,
            counted.epoch + 1
        )
    }

    /// Ranks of the run that saved it.
    pub(super) fn world_size(&self) -> usize {
        continuation::ranks_of(&self.settings)
    }

    /// Refuses counts that no run can have come to.
    fn check(&self, checkpoint: &Checkpoint) -> anyhow::Result<()> {
        /// Beyond this a count would be that of centuries.
        const MOST: u64 = 1 << 53;
        let place = checkpoint.path().display();
        if self.is_model_only {
            let key =
                if checkpoint.contains("adapter_config.json") { "adapter_name_or_path" } else { "model_name_or_path" };
            bail!(
                "`{place}` was saved with `save_only_model: true` and holds no state of the optimizer, so no run can go on from \
                 it; start a new run from its model, with `{key}: {place}` and another `output_dir`, or resume from an \
                 earlier checkpoint that was saved whole"
            );
        }
        let wrong = [
            ("step", self.step, self.step != checkpoint.step() || self.step > MOST),
            ("optimizer_steps", self.optimizer_steps, self.optimizer_steps > self.step),
            ("sampler.epoch", self.sampler.epoch, self.sampler.epoch > MOST),
            ("num_tokens", self.num_tokens, self.num_tokens > MOST),
        ];
        if !self.accumulator.is_plausible() || !self.loss_scaler.as_ref().is_none_or(LossScaler::is_plausible) {
            bail!(
                "`{STATE_FILE}` of `{place}` has a loss scaler or an accumulator that no run comes to; resume from another \
                 checkpoint"
            );
        }
        if let Some((name, value, _)) = wrong.into_iter().find(|(.., is_wrong)| *is_wrong) {
            bail!(
                "`{STATE_FILE}` of `{place}` (step {}) has `{name}` {value}, which no run comes to; resume from another \
                 checkpoint",
                checkpoint.step()
            );
        }
        Ok(())
    }
}

/// Takes a checkpoint's tensors into the session and the optimizer and returns its state, after what the run reads was
/// compared with what it read then.
pub(super) fn restore<B: for<'de> Deserialize<'de>>(
    checkpoint: &Checkpoint,
    settings: &TrainingSettings,
    session: &Session,
    optimizer: &mut ShardedOptimizer,
    (inputs, material): (&Inputs, &Material),
) -> anyhow::Result<State<B>> {
    let place = checkpoint.path().display();
    let mut state: State<B> = checkpoint.json(STATE_FILE)?;
    state.place = checkpoint.path().to_path_buf();
    let has_other_rows =
        inputs.check(checkpoint, state.inputs.as_ref(), material, settings.resume_with_changed_inputs)?;
    if has_other_rows && state.buffer.take().is_some() {
        // Its completions answer prompts that may not be there any more.
        tracing::warn!("the generation batch in `{place}` is thrown away, since the rows have changed");
    }
    state.has_other_rows = has_other_rows;
    let mut files = std::mem::take(&mut state.tensor_files);
    if files.is_empty() {
        files.push(shards::TENSORS_FILE.into());
    }
    shards::read(checkpoint, &files, session, optimizer, state.optimizer_steps)?;
    Ok(state)
}

/// What a run's own counts add to a checkpoint.
pub(super) struct RunState<'a> {
    pub(super) continuation: &'a Continuation,
    pub(super) inputs: &'a Inputs,
    /// What the evaluations so far came to.
    pub(super) best: Best,
    /// The step of a checkpoint that is not deleted.
    pub(super) kept_step: Option<u64>,
    pub(super) step: u64,
    pub(super) num_tokens: u64,
    pub(super) world_size: usize,
    pub(super) accumulator: &'a Accumulator,
}

/// Writes the checkpoint of a step: every rank its part of the tensors, the first the rest, which the others help to gather.
pub(super) fn write_checkpoint<B: Serialize + Clone>(
    settings: &TrainingSettings,
    session: &Session,
    optimizer: &ShardedOptimizer,
    run: RunState<'_>,
    own: LoopState<B>,
    ranks: &dyn Ranks,
) -> anyhow::Result<Option<checkpoint::Committed>> {
    let begin = || checkpoint::Writer::begin(&settings.output_dir, run.step, run.world_size);
    let mut writer = ranks.is_first().then(begin).transpose()?.map(|writer| writer.keeping(run.kept_step));
    let mut partial = writer.as_ref().map(|writer| writer.place().partial().into()).unwrap_or_default();
    ranks.broadcast(&mut partial, 0)?;
    let model = match &writer {
        Some(writer) => save::write_model(writer.path(), session),
        None => save::help_to_write(session),
    };
    let write = || {
        model?;
        if settings.save_only_model {
            return Ok(None);
        }
        let place = || {
            let partial = String::from_utf8_lossy(&partial);
            // If it does not, the place says so.
            comes_into_view(&settings.output_dir.join(partial.as_ref()));
            checkpoint::Place::of(&settings.output_dir, run.step, &partial)
        };
        shards::write(place, session, optimizer)
    };
    // Nobody takes the folder away while another writes there.
    let written = shards::agree(write(), ranks)?;
    let Some(mut writer) = writer.take() else { return Ok(None) };
    let tensor_files: Vec<String> = written.iter().map(|file| file.name.clone()).collect();
    let is_one_file = tensor_files.iter().all(|name| name == shards::TENSORS_FILE);
    let state = State {
        version: STATE_VERSIONS[usize::from(!is_one_file)],
        task: run.continuation.task.to_string(),
        seed: settings.seed,
        settings: run.continuation.values.clone(),
        step: run.step,
        optimizer_steps: optimizer.steps(),
        sampler: own.sampler,
        num_tokens: run.num_tokens,
        buffer: own.buffer.filter(|_| !settings.save_only_model),
        loss_scaler: own.loss_scaler,
        entropy_control: own.entropy_control,
        accumulator: run.accumulator.clone(),
        best: run.best,
        inputs: Some(run.inputs.clone()),
        tensor_files,
        is_model_only: settings.save_only_model,
        is_evaluation_due: own.is_evaluation_due,
        place: PathBuf::new(),
        has_other_rows: false,
    };
    writer.add_json(STATE_FILE, &state)?;
    written.into_iter().try_for_each(|file| writer.take(file))?;
    Ok(Some(writer.commit(settings.save_total_limit)?))
}
