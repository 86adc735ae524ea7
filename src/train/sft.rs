//! Supervised fine-tuning.

use std::sync::Arc;

use anyhow::bail;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::continuation::Continuation;
use super::estimate::Work;
use super::gathered;
use super::inputs::Inputs;
use super::material::{Making, Material};
use super::output_dir;
use super::placing;
use super::plan;
use super::run::Run;
use super::session::{self, Session, Text};
use super::state::{LoopState, State, find_checkpoint, restore};
use super::turns;
use super::{Backend, Cadence, Context, Due, Outcome};
use crate::algo::{Metrics, SftInputs, SftOutput, sft_loss};
use crate::config;
use crate::config::settings::{SftLossType, SftSettings};
use crate::data::{Dataset, IGNORE, Part, RowBatches, Sampler, Sequences, hub};
use crate::engine::{DropoutKey, Speaker, StepLoss};
use crate::model::HeadGradient;
use crate::model::batch::{Batch, BatchBuilder};
use crate::model::load::Purpose;
use crate::ops::head;
use crate::telemetry::Section;
use crate::zero::ShardedOptimizer;

/// The sequences of one split that training draws from.
pub(super) struct Split {
    pub(super) sequences: Sequences,
    /// What the rows were taken from, if from several data sets.
    parts: Vec<Part>,
}

/// Trains on the examples that `settings` name.
///
/// Each optimizer step takes the next `gradient_accumulation_steps` micro-batches of the epoch, or as many as are left of it,
/// sums the gradients of `-log p(token | tokens before)` over their target tokens, divides by the number of targets in the
/// whole step, clips, and moves the trained parameters by AdamW.
///
/// # Errors
/// If the input is unusable, the loss stops being finite, or a file cannot be written.
#[expect(clippy::too_many_lines, reason = "the loop reads from top to bottom as the algorithm")]
pub fn run(settings: &SftSettings, context: Context<'_>) -> anyhow::Result<Outcome> {
    let training = &settings.training;
    let backend = Backend::of_rank(training, &context)?;
    check_smoothing(settings, &backend)?;
    let ranks = Arc::clone(&context.ranks);
    let mut folder = output_dir::claim(training, &settings.model, &settings.data, &*ranks)?;
    let continuation = Continuation::new("sft", config::sft_texts(settings));
    let checkpoint = find_checkpoint(training, &continuation, folder.as_mut(), &*ranks)?;
    let mut progress = plan::downloads(&context.terminal);
    let work = Work::of_sft(settings);
    let (place, stage_note) = placing::of(training, &settings.model, work, &ranks, &backend)?;
    let rows = |text: Text<'_>, progress: &mut hub::Progress<'_>| {
        let material = Material::of_sft(settings, text, progress)?;
        let made = material.sequences(settings, text)?;
        Ok((material, made))
    };
    let (mut session, (material, made)) = session::open(
        &settings.model,
        training.seed,
        Purpose::Training,
        session::activations(training),
        &backend,
        place,
        (&mut progress, rows),
    )?;
    session.stage_note = stage_note;
    session.engine.ask_whether_interrupted(context.is_interrupted.clone());
    session.engine.set_neftune_noise_alpha(training.neftune_noise_alpha);
    if training.full_determinism {
        session.engine.fix_sums();
    }
    let smoothing = settings.label_smoothing_factor;
    drop(progress);
    let inputs = Inputs::of(&settings.model, &session, &material, None)?;
    let (train, eval) = prepare(settings, &mut session, made, &material)?;

    let batches = RowBatches::new(
        train.len(),
        training.per_device_train_batch_size,
        ranks.world_size(),
        settings.dataloader_drop_last,
        training.gradient_accumulation_steps,
    )?;
    let epoch = batches.epoch();
    let total = epoch.total_steps(training.num_train_epochs, training.max_steps);
    let schedule = plan::schedule(training, total)?;
    let mut optimizer = ShardedOptimizer::new(training.optimizer, session.engine.store())?;
    let mut scaler = plan::loss_scaler(&backend)?;
    let mut sampler = Sampler::new(train.len(), training.data_seed, true)?;
    let resumed: Option<State<()>> =
        checkpoint.map(|c| restore(&c, training, &session, &mut optimizer, (&inputs, &material))).transpose()?;
    if let Some(state) = &resumed {
        state.check_place(batches.state_after(state.step), train.len())?;
        scaler = scaler.map(|fresh| state.loss_scaler.clone().unwrap_or(fresh));
    }
    let memory = plan::Memory::new(&session, &optimizer, training.gradient_accumulation_steps, 0);
    let cadence = Cadence::new(training, epoch, total);
    let mut run = Run::begin(folder, (continuation, inputs), training, context, cadence, memory, resumed.as_ref())?;
    run.open(&session, &optimizer, work, show_plan(settings, &session, &train, eval.as_ref(), &batches, total))?;

    let mut due = run.due_at_first(resumed.as_ref());
    loop {
        if let Some(eval) = eval.as_ref().filter(|_| due.evaluate)
            && let Some(values) = run.unless_interrupted(evaluate(eval, &session, settings, &run))?
        {
            run.log_evaluation(values)?;
            due = Due { evaluate: false, save: due.save || run.is_evaluation_saved(), ..due };
        }
        let is_interrupted = run.is_any_interrupted()?;
        if due.save || is_interrupted || run.is_over() {
            let own = LoopState::<()> {
                sampler: batches.state_after(run.step),
                buffer: None,
                loss_scaler: scaler.clone(),
                entropy_control: None,
                is_evaluation_due: due.evaluate && eval.is_some(),
            };
            run.save(&session, &optimizer, own)?;
        }
        if is_interrupted && (due.evaluate || !run.is_over()) {
            return Ok(run.stop());
        }
        if run.is_over() {
            return run.finish(&session);
        }

        let step = run.step;
        run.begin_step();
        let place = epoch.place(step);
        let micro_batches: Vec<Batch> = (batches.of_step(&place.micro_steps, ranks.rank()).into_iter())
            .map(|rows| train.batch(sampler.items(place.epoch, rows), smoothing > 0.0))
            .collect::<anyhow::Result<_>>()?;
        let loss = gradients(settings, &session, &micro_batches, plan::loss_scale(scaler.as_ref()), &mut run);
        due = match run.unless_interrupted(loss)? {
            None => {
                run.abandon_step();
                Due::default()
            }
            // Nothing to learn: the step counts and changes nothing.
            Some(None) => {
                run.accumulator.latest("learning_rate", schedule.lr(step));
                run.finish_step("no token to learn")?
            }
            Some(Some((loss, metrics))) => {
                let (lr, scale) = (schedule.lr(step), plan::loss_scale(scaler.as_ref()));
                let report = optimizer.step(session.engine.store(), lr, training.max_grad_norm, scale)?;
                plan::check_step(report, step + 1, scaler.as_mut(), &mut run)?;
                run.accumulator.mean("loss", loss);
                run.accumulator.mean("grad_norm", f64::from(report.grad_norm));
                run.accumulator.latest("learning_rate", lr);
                metrics.values().into_iter().for_each(|(name, value)| run.accumulator.mean(&name, value));
                run.finish_step(&format!("loss {loss:.4}"))?
            }
        };
    }
}

/// Refuses smoothed labels where nothing computes them.
pub(super) fn check_smoothing(settings: &SftSettings, backend: &Backend) -> anyhow::Result<()> {
    if settings.label_smoothing_factor > 0.0 && !backend.device.is_cpu() {
        bail!(
            "`label_smoothing_factor: {}` is computed on the CPU only; set `device: cpu`, or remove it",
            settings.label_smoothing_factor
        );
    }
    Ok(())
}

/// Sums the gradients of a step's micro-batches over all ranks; returns the loss and its metrics, or `None` where no token is to
/// be learnt.
fn gradients(
    settings: &SftSettings,
    session: &Session,
    micro_batches: &[Batch],
    scale: f64,
    run: &mut Run<'_>,
) -> anyhow::Result<Option<(f64, Metrics)>> {
    let training = &settings.training;
    let step = run.step;
    let ranks = run.ranks();
    let num_targets = ranks.sum_of_counts(micro_batches.iter().map(|b| b.targets.len()).sum())?;
    run.num_tokens += ranks.sum_of_counts(micro_batches.iter().map(|b| b.tokens.len()).sum())? as u64;
    if num_targets == 0 {
        let sequences = micro_batches.iter().flat_map(|b| &b.positions).filter(|&&position| position == 0).count();
        let sequences = ranks.sum_of_counts(sequences)?;
        if let Some(text) = run.notices.step_without_target(step + 1, sequences) {
            tracing::warn!("{text}");
        }
        return Ok(None);
    }
    let mut loss = StepSum { settings, session, micro_batches, num_targets, scale, step, terms: Vec::new() };
    let dropout = Some(DropoutKey { seed: training.seed, step });
    session.engine.accumulate(micro_batches, 1.0, dropout, &mut loss)?;
    let terms = gathered::in_order(loss.terms, &*ranks)?;
    let mut metrics = Metrics::default();
    terms.iter().for_each(|term| metrics.merge(&term.metrics));
    Ok(Some((terms.iter().map(Term::loss).sum(), metrics)))
}

/// What a micro-batch adds to the loss of a step or an evaluation, with its metrics.
#[derive(Clone, Serialize, Deserialize)]
struct Term {
    /// As its bits: JSON has no infinity.
    loss: u64,
    targets: usize,
    metrics: Metrics,
}

impl Term {
    fn new(loss: f64, targets: usize, metrics: Metrics) -> Self {
        Self { loss: loss.to_bits(), targets, metrics }
    }

    fn loss(&self) -> f64 {
        f64::from_bits(self.loss)
    }
}

/// The loss of a step's micro-batches on this rank.
struct StepSum<'a> {
    settings: &'a SftSettings,
    session: &'a Session,
    micro_batches: &'a [Batch],
    /// Of the whole step, on all ranks.
    num_targets: usize,
    /// Of fp16's gradients.
    scale: f64,
    step: u64,
    terms: Vec<Term>,
}

impl StepLoss<anyhow::Error> for StepSum<'_> {
    fn known(&self, micro_step: usize) -> Option<HeadGradient> {
        let gradient = known_gradient(self.settings, &self.micro_batches[micro_step], self.num_targets);
        gradient.map(|gradient| gradient.scaled(self.scale))
    }

    fn gradient(&mut self, micro_step: usize, head: &head::Output) -> anyhow::Result<HeadGradient> {
        let output = loss_of(self.settings, head, self.num_targets)?;
        let batch = &self.micro_batches[micro_step];
        plan::check_loss(output.loss, self.step + 1, self.session, batch, &self.settings.training.output_dir)?;
        self.terms.push(Term::new(output.loss, batch.targets.len(), output.metrics));
        let (d_logprobs, d_mean_logprobs) = (output.d_logprobs, output.d_mean_logprobs);
        Ok(HeadGradient { d_logprobs, d_entropies: vec![], d_mean_logprobs }.scaled(self.scale))
    }
}

/// The loss of all targets that the head was asked for, divided by `num_targets` of all ranks. Ranks' gradients are added, where
/// TRL multiplies by the number of processes and takes the mean.
pub(super) fn loss_of(settings: &SftSettings, head: &head::Output, num_targets: usize) -> anyhow::Result<SftOutput> {
    let inputs = SftInputs {
        logprobs: &head.logprobs,
        mean_logprobs: Some(&head.mean_logprobs),
        mask: None,
        entropies: Some(&head.entropies),
        is_correct: Some(&head.is_argmax),
        num_items_in_batch: num_targets,
        num_processes: 1,
    };
    Ok(sft_loss(&inputs, settings.loss_type, settings.label_smoothing_factor)?)
}

/// Cross-entropy's gradient, which is the same for every target whatever the model says; `None` for a loss whose gradient
/// depends on the output.
fn known_gradient(settings: &SftSettings, batch: &Batch, num_targets: usize) -> Option<HeadGradient> {
    let (smoothing, count) = (settings.label_smoothing_factor, batch.targets.len());
    let each = |weight: f64| (-weight / num_targets as f64) as f32;
    (settings.loss_type != SftLossType::Dft).then(|| HeadGradient {
        d_logprobs: vec![each(1.0 - smoothing); count],
        d_entropies: vec![],
        d_mean_logprobs: if smoothing > 0.0 { vec![each(smoothing); count] } else { vec![] },
    })
}

fn prepare(
    settings: &SftSettings,
    session: &mut Session,
    (train, eval): (Sequences, Option<Sequences>),
    material: &Material,
) -> anyhow::Result<(Split, Option<Split>)> {
    let mut train = Split::of(session, "training", train, settings.packing)?;
    train.parts = material.parts().to_vec();
    let eval = eval.map(|eval| Split::of(session, "evaluation", eval, settings.eval_packing)).transpose()?;
    if train.sequences.summary().is_conversational {
        session.adopt_end_of_turn(settings.model.eos_token.is_some())?;
    }
    Ok((train, eval))
}

impl Split {
    /// Rows that are not those of a run, in sequences.
    ///
    /// # Errors
    /// If a row is unusable, an example is longer than the model holds, or there is nothing to learn.
    pub(super) fn prepare(
        settings: &SftSettings,
        session: &Session,
        name: &str,
        rows: &Dataset,
        packing: bool,
    ) -> anyhow::Result<Self> {
        let (sequences, _) = Making::of(session.text()).sequences(settings, rows, packing)?;
        Self::of(session, name, sequences, packing)
    }

    /// Sequences, after a look at their lengths.
    fn of(session: &Session, name: &str, sequences: Sequences, packing: bool) -> anyhow::Result<Self> {
        let limit = session.engine.config().max_position_embeddings;
        let longest = sequences.summary().statistics.max;
        if longest > limit && !packing {
            bail!("an example has {longest} tokens, the model holds {limit}; set `max_length: {limit}` or less");
        }
        turns::warn(name, &sequences.summary().notes);
        Ok(Self { sequences, parts: Vec::new() })
    }

    /// Targets of each of the sequences `indices`, in the order of [`Split::batch`].
    ///
    /// # Errors
    /// If they have to be read, and cannot be.
    pub(super) fn target_counts(&self, indices: &[usize]) -> anyhow::Result<Vec<usize>> {
        let collated = self.sequences.collate(indices)?;
        let targets = collated.targets();
        let count = |ends: &[u32]| targets[ends[0] as usize..ends[1] as usize].iter().filter(|&&t| t != IGNORE).count();
        Ok(collated.cu_seqlens.windows(2).map(count).collect())
    }

    /// The sequences `indices` as one ragged batch with a target for every learnt token.
    ///
    /// # Errors
    /// If they have to be read, and cannot be.
    pub(super) fn batch(&self, indices: &[usize], wants_means: bool) -> anyhow::Result<Batch> {
        let collated = self.sequences.collate(indices)?;
        let targets = collated.targets();
        let mut builder = BatchBuilder::new();
        if wants_means {
            builder.want_means();
        }
        for (sequence, ends) in collated.cu_seqlens.windows(2).enumerate() {
            let range = ends[0] as usize..ends[1] as usize;
            // The index is the same in every epoch and on every rank; its sequences follow one another.
            let sample = (indices[sequence.min(indices.len() - 1)] as u64) << 20 | sequence as u64;
            let rows = builder.push(&collated.tokens[range.clone()], sample);
            for (row, &target) in rows.zip(&targets[range]) {
                if target != IGNORE {
                    builder.predict(row, target as u32);
                }
            }
        }
        Ok(builder.build()?)
    }

    fn len(&self) -> usize {
        self.sequences.len()
    }
}

/// Mean loss, accuracy and entropy over the evaluation split, of which each rank takes its turns.
fn evaluate(
    eval: &Split,
    session: &Session,
    settings: &SftSettings,
    run: &Run<'_>,
) -> anyhow::Result<Vec<(String, Value)>> {
    let started = std::time::Instant::now();
    let bar = run.console.progress("eval", eval.len() as u64, "sequences");
    let ranks = run.ranks();
    let (mut terms, mut tokens) = (Vec::new(), 0);
    let indices: Vec<usize> = (0..eval.len()).collect();
    let chunks: Vec<&[usize]> = indices.chunks(settings.training.per_device_eval_batch_size).collect();
    for turn in chunks.chunks(ranks.world_size()) {
        let chunk = turn.get(ranks.rank()).copied().unwrap_or_default();
        let batch = eval.batch(chunk, settings.label_smoothing_factor > 0.0)?;
        tokens += batch.tokens.len() as u64;
        bar.set(turn.iter().copied().flatten().last().map_or(0, |&last| last as u64 + 1), tokens);
        // Without a target there is nothing to compute but what other ranks need this one for.
        let batches = if batch.targets.is_empty() { [].as_slice() } else { std::slice::from_ref(&batch) };
        let mut term = Term::new(0.0, 0, Metrics::default());
        if let Some(head) = session.engine.logprobs(batches, Speaker::Policy, 1.0)?.first() {
            // The sum over the targets, which are counted below.
            let output = loss_of(settings, head, 1)?;
            term = Term::new(output.loss, batch.targets.len(), output.metrics);
        }
        terms.push(term);
    }
    let terms = gathered::in_turns(terms, &*ranks)?;
    let mut metrics = Metrics::default();
    terms.iter().for_each(|term| metrics.merge(&term.metrics));
    let (sum, count) = terms.iter().fold((0.0, 0), |(sum, count), term| (sum + term.loss(), count + term.targets));
    let secs = started.elapsed().as_secs_f64();
    let mut values = vec![("eval_loss".to_string(), Value::from(sum / count.max(1) as f64))];
    values.extend(metrics.values().into_iter().map(|(name, value)| (format!("eval_{name}"), Value::from(value))));
    values.push(("eval_runtime".into(), secs.into()));
    values.push(("eval_samples_per_second".into(), (eval.sequences.summary().statistics.count as f64 / secs).into()));
    Ok(values)
}

fn show_plan(
    settings: &SftSettings,
    session: &Session,
    train: &Split,
    eval: Option<&Split>,
    batches: &RowBatches,
    total: u64,
) -> Vec<Section> {
    let (training, summary) = (&settings.training, train.sequences.summary());
    let mut data = plan::data_section(&settings.data, &train.parts, &summary.statistics);
    turns::show_adapted(&mut data, &summary.notes);
    if summary.dropped > 0 {
        data.push("left out", format!("{} rows without a token to learn", summary.dropped));
    }
    if summary.duplicates > 0 {
        data.push("duplicates", format!("{} rows left out when they were preprocessed", summary.duplicates));
    }
    if summary.truncated > 0 {
        data.push("cut", format!("{} examples at `max_length`", summary.truncated));
    }
    if settings.packing {
        let fill = summary.tokens as f64 / (train.len() * settings.max_length.unwrap_or(1)) as f64;
        data.push("packing", format!("{} sequences, {:.1}% full", train.len(), 100.0 * fill));
    }
    if summary.without_target > 0 {
        data.push(
            "nothing to learn",
            format!(
                "{} of {} sequences have no token to predict; a step of such alone changes nothing",
                summary.without_target,
                train.len()
            ),
        );
    }
    if batches.left_out() > 0 {
        let unit = "sequences of each epoch, which fill no batch (`dataloader_drop_last`)";
        data.push("dropped", format!("{} {unit}", batches.left_out()));
    }
    if let Some(eval) = eval {
        data.push("evaluation", format!("{} examples", eval.sequences.summary().statistics.count));
    }
    let of_rank = training.per_device_train_batch_size * training.gradient_accumulation_steps;
    let sequences = (of_rank * training.ranks.world_size).min(train.len());
    let mean = summary.tokens as f64 / train.len() as f64;
    let world_size = training.ranks.world_size;
    let batch = format!(
        "{}{} x {} sequences, about {:.0} tokens",
        if world_size > 1 { format!("{world_size} ranks x ") } else { String::new() },
        training.per_device_train_batch_size,
        training.gradient_accumulation_steps,
        mean * sequences as f64
    );
    vec![
        plan::run_section("sft", training, session, (batches.epoch(), total), &batch),
        plan::model_section(&settings.model, session),
        data,
    ]
}
