//! Group relative policy optimisation (`DeepSeekMath`, 2402.03300, algorithm 1).

use std::sync::Arc;

use anyhow::bail;
use serde_json::Value;

use super::continuation::Continuation;
use super::estimate::Work;
use super::gathered;
use super::generation::{GenerationBatch, Generator, MicroBatch};
use super::inputs::Inputs;
use super::material::Material;
use super::notices;
use super::output_dir;
use super::placing;
use super::plan;
use super::policy_loss::{Drawn, Parts, PolicyLoss, Scale, Term};
use super::run::Run;
use super::sample::sample;
use super::session::{self, Session, Text};
use super::state::{LoopState, State, find_checkpoint, restore};
use super::turns;
use super::{Backend, Cadence, Context, Due, Outcome};
use crate::algo::{EntropyControl, Metrics};
use crate::config;
use crate::config::settings::GrpoSettings;
use crate::data::{Part, PromptBatches, Prompts, Sampler, hub};
use crate::engine::{DropoutKey, Speaker};
use crate::model::batch::Batch;
use crate::model::load::Purpose;
use crate::model::peft::AdapterSpec;
use crate::ops::head;
use crate::reward::{self, Rewards};
use crate::telemetry::Section;
use crate::zero::ShardedOptimizer;

/// Trains on the prompts that `settings` name.
///
/// For each generation batch: sample a group of completions per prompt, reward them, take the rewards relative to their
/// group as advantages. For each optimizer step: sum the gradients of the clipped policy loss (and of the KL to the
/// reference) over the next `gradient_accumulation_steps` micro-batches of the epoch, or as many as are left of it, clip, and
/// move the trained parameters by AdamW.
///
/// # Errors
/// If the input is unusable, a reward fails, the loss stops being finite, or a file cannot be written.
#[expect(clippy::too_many_lines, reason = "the loop reads from top to bottom as the algorithm")]
pub fn run(settings: &GrpoSettings, context: Context<'_>) -> anyhow::Result<Outcome> {
    let training = &settings.training;
    let backend = Backend::of_rank(training, &context)?;
    let ranks = Arc::clone(&context.ranks);
    let mut folder = output_dir::claim(training, &settings.model, &settings.data, &*ranks)?;
    let continuation = Continuation::new("grpo", config::grpo_texts(settings));
    let checkpoint = find_checkpoint(training, &continuation, folder.as_mut(), &*ranks)?;
    // Before the model, which takes longer: an import that fails is said at once.
    let rewards = match Rewards::start(&settings.reward_funcs, &settings.rewards, &*context.is_interrupted) {
        Err(reward::Error::Interrupted { .. }) => return Ok(Outcome::Interrupted),
        started => started?,
    };
    let mut progress = plan::downloads(&context.terminal);
    let work = Work::of_grpo(settings);
    let (place, stage_note) = placing::of(training, &settings.model, work, &ranks, &backend)?;
    let rows = |text: Text<'_>, progress: &mut hub::Progress<'_>| {
        let material = Material::of_grpo(settings, text, progress)?;
        let made = material.prompts(settings, text)?;
        Ok((material, made))
    };
    let (mut session, (material, (prompts, eval_prompts))) = session::open(
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
    drop(progress);
    let inputs = Inputs::of(&settings.model, &session, &material, continuation.value("reward_funcs"))?;
    check_prompts(settings, &session, "training", &prompts)?;
    if let Some(eval) = &eval_prompts {
        check_prompts(settings, &session, "evaluation", eval)?;
    }
    if prompts.summary().is_conversational {
        session.adopt_end_of_turn(settings.model.eos_token.is_some())?;
    }
    let settings = &close_length(settings, &session, [Some(&prompts), eval_prompts.as_ref()]);
    keep_reference(settings, &mut session)?;
    let mut generator = Generator::new(settings, &session, rewards)?;

    let batches = prompt_batches(settings, prompts.len(), ranks.world_size())?;
    let epoch = batches.epoch();
    let total = epoch.total_steps(training.num_train_epochs, training.max_steps);
    let schedule = plan::schedule(training, total)?;
    let mut optimizer = ShardedOptimizer::new(training.optimizer, session.engine.store())?;
    let mut scaler = plan::loss_scaler(&backend)?;
    let mut entropy = settings.adaptive_entropy.map(|_| EntropyControl::new(settings.entropy_coef));
    let sampler = Sampler::new(prompts.len(), training.data_seed, settings.shuffle_dataset)?;
    let mut resumed: Option<State<GenerationBatch>> =
        checkpoint.map(|c| restore(&c, training, &session, &mut optimizer, (&inputs, &material))).transpose()?;
    let mut source = Source { sampler, batches, generation: resumed.as_mut().and_then(|state| state.buffer.take()) };
    if let Some(state) = &resumed {
        source.count_for(ranks.world_size(), state);
        state.check_place(batches.state_after(state.step), prompts.len())?;
        source.check(settings, state, session.engine.config().vocab_size)?;
        scaler = scaler.map(|fresh| state.loss_scaler.clone().unwrap_or(fresh));
        entropy = entropy.map(|fresh| state.entropy_control.unwrap_or(fresh));
    }
    let memory = plan::Memory::new(
        &session,
        &optimizer,
        training.gradient_accumulation_steps,
        generator.most_cache_bytes(&session, &prompts, eval_prompts.as_ref()),
    );
    let cadence = Cadence::new(training, epoch, total);
    let mut run = Run::begin(folder, (continuation, inputs), training, context, cadence, memory, resumed.as_ref())?;
    run.open(
        &session,
        &optimizer,
        work,
        show_plan(settings, &session, &prompts, material.parts(), &generator, &batches, total),
    )?;

    let mut due = run.due_at_first(resumed.as_ref());
    loop {
        if let Some(eval) = eval_prompts.as_ref().filter(|_| due.evaluate)
            && let Some(values) =
                run.unless_interrupted(evaluate(settings, &mut generator, &mut session, eval, &run))?
        {
            run.log_evaluation(values)?;
            due = Due { evaluate: false, save: due.save || run.is_evaluation_saved(), ..due };
        }
        let is_interrupted = run.is_any_interrupted()?;
        if due.save || is_interrupted || run.is_over() {
            let own = LoopState {
                sampler: batches.state_after(run.step),
                buffer: source.unfinished().cloned(),
                loss_scaler: scaler.clone(),
                entropy_control: entropy,
                is_evaluation_due: due.evaluate && eval_prompts.is_some(),
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
        let generation_before = source.unfinished().cloned();
        let scale = Scale {
            loss_scale: plan::loss_scale(scaler.as_ref()),
            entropy_coef: entropy.zip(settings.adaptive_entropy).map(|(control, adaptive)| control.applied(&adaptive)),
        };
        let loss = gradients(settings, &mut generator, &mut session, &prompts, &mut source, scale, &mut run);
        let Some((loss, metrics, attended_entropy)) = run.unless_interrupted(loss)? else {
            source.generation = generation_before;
            run.abandon_step();
            due = Due::default();
            continue;
        };
        let lr = schedule.lr(step);
        let report =
            optimizer.step(session.engine.store(), lr, training.max_grad_norm, plan::loss_scale(scaler.as_ref()))?;
        plan::check_step(report, step + 1, scaler.as_mut(), &mut run)?;
        if settings.sync_ref_model && (step + 1).is_multiple_of(settings.ref_model_sync_steps as u64) {
            session.engine.store().mix_reference(settings.ref_model_mixup_alpha)?;
        }

        run.accumulator.mean("loss", loss);
        run.accumulator.mean("grad_norm", f64::from(report.grad_norm));
        run.accumulator.latest("learning_rate", lr);
        if let (Some(control), Some(adaptive)) = (&mut entropy, &settings.adaptive_entropy) {
            control.update(adaptive, attended_entropy);
            run.accumulator.mean("entropy_coef", control.coef());
        }
        metrics.values().into_iter().for_each(|(name, value)| run.accumulator.mean(&name, value));
        due = run.finish_step(&format!("loss {loss:.4}"))?;
    }
}

/// Where micro-batches come from: the prompts in their order, and the generation batch that is used up now.
struct Source {
    sampler: Sampler,
    batches: PromptBatches,
    generation: Option<GenerationBatch>,
}

impl Source {
    /// The generation batch, if it is not used up.
    fn unfinished(&self) -> Option<&GenerationBatch> {
        self.generation.as_ref().filter(|batch| batch.micro_steps < self.batches.micro_steps_of_batch())
    }

    /// Counts what is taken of a checkpoint's generation batch in micro-steps of this run, which another number of ranks may
    /// share.
    fn count_for(&mut self, world_size: usize, state: &State<GenerationBatch>) {
        if let Some(batch) = &mut self.generation {
            batch.micro_steps = batch.micro_steps * state.world_size() / world_size;
        }
    }

    /// Refuses the generation batch of a checkpoint that does not fit this run.
    fn check(&self, settings: &GrpoSettings, state: &State<GenerationBatch>, vocab_size: usize) -> anyhow::Result<()> {
        let taken = self.generation.as_ref().map(|batch| batch.micro_steps);
        let expected = self.batches.taken_after(state.step);
        // The rest of a batch of other rows was thrown away and is made anew.
        if taken != expected && !state.has_other_rows {
            let at =
                |taken: Option<usize>| taken.map_or_else(|| "its end".into(), |taken| format!("micro-step {taken}"));
            bail!(
                "`{}` stands at {} of its generation batch, where its {} steps lead to {}; resume with the settings of that \
                 run, or from another checkpoint",
                state.place.display(),
                at(taken),
                state.step,
                at(expected)
            );
        }
        let Some(batch) = &self.generation else { return Ok(()) };
        let completions = self.batches.per_batch() * settings.num_generations;
        batch.check(completions, self.batches.micro_steps_of_batch(), self.sampler.len(), vocab_size)
    }
}

/// The counts of a run over so many prompts; says which an epoch leaves out.
fn prompt_batches(settings: &GrpoSettings, num_prompts: usize, world_size: usize) -> anyhow::Result<PromptBatches> {
    let training = &settings.training;
    let batches = PromptBatches::new(
        num_prompts,
        (settings.generation_batch_size, settings.num_generations),
        training.per_device_train_batch_size,
        world_size,
        settings.num_iterations,
        training.gradient_accumulation_steps,
    )?;
    let wanted = settings.generation_batch_size / settings.num_generations;
    if batches.per_batch() < wanted {
        tracing::warn!(
            "a generation batch takes {wanted} prompts (`generation_batch_size` / `num_generations`), and there are {num_prompts}: \
             each epoch is one smaller batch of all of them (TRL would not train at all); lower \
             `per_device_train_batch_size`, `gradient_accumulation_steps` or `steps_per_generation` for the usual size"
        );
    }
    if batches.left_out() > 0 {
        let which = if settings.shuffle_dataset { "others in each, as the shuffle has it" } else { "the last ones" };
        tracing::warn!(
            "each epoch leaves out {} of {num_prompts} prompts, {which}: they fill no generation batch of {wanted} (as in TRL)",
            batches.left_out()
        );
    }
    Ok(batches)
}

/// Sums the gradients of a step's micro-batches over all ranks. Generation batches are made as they are needed (the policy does
/// not move within a step), by all ranks together; each trains on neighbouring micro-batches. Returns the loss and its metrics.
fn gradients(
    settings: &GrpoSettings,
    generator: &mut Generator<'_>,
    session: &mut Session,
    prompts: &Prompts,
    source: &mut Source,
    scale: Scale,
    run: &mut Run<'_>,
) -> anyhow::Result<(f64, Metrics, (f64, f64))> {
    let training = &settings.training;
    let (step, batches, ranks) = (run.step, source.batches, run.ranks());
    let place = batches.epoch().place(step);
    let world_size = ranks.world_size();
    // Of all ranks.
    let micro_steps = (place.micro_steps.end - place.micro_steps.start) as usize * world_size;
    // The generation batches of the step's micro-steps that are used up before the last one.
    let mut used_up: Vec<GenerationBatch> = Vec::new();
    let mut batch_of: Vec<usize> = Vec::with_capacity(micro_steps / world_size);
    for (index, micro_step) in place.micro_steps.clone().enumerate() {
        let slice = batches.slice(micro_step);
        if slice.micro_steps_before == 0 || source.generation.is_none() {
            used_up.extend(source.generation.take().filter(|_| index > 0));
            let taken = source.sampler.items(place.epoch, slice.prompts).iter();
            let groups: Vec<usize> = taken.flat_map(|&p| std::iter::repeat_n(p, settings.num_generations)).collect();
            // One step may take several generation batches; each draws numbers of its own.
            let key = (step * training.gradient_accumulation_steps as u64 + index as u64) * world_size as u64;
            let life = batches.micro_steps_of_batch();
            source.generation = Some(generate(settings, generator, session, prompts, &groups, (key, life), run)?);
        }
        batch_of.push(used_up.len());
        if let Some(batch) = &mut source.generation {
            batch.micro_steps = slice.micro_steps_before + 1;
        }
    }
    let size = training.per_device_train_batch_size;
    let mut drawn: Vec<Drawn> = Vec::with_capacity(micro_steps / world_size);
    let mut num_tokens = 0;
    for (micro_step, turn) in batches.of_step(&place.micro_steps, ranks.rank()) {
        let batch = batch_of[(micro_step - place.micro_steps.start) as usize];
        let Some(batch) = used_up.get(batch).or(source.generation.as_ref()) else {
            bail!("a generation batch was just made")
        };
        // Every rank has the whole batch and takes its own share.
        let first = (batches.slice(micro_step).index * world_size + turn) * size;
        let place = |sample: usize| sample.min(batch.samples.len());
        let samples = &batch.samples[place(first)..place(first + size)];
        let micro = GenerationBatch::micro_batch(samples, prompts, settings.mask_truncated_completions)?;
        num_tokens += micro.batch.tokens.len();
        drawn.push(Drawn::new(settings, samples, micro, batch.num_items)?);
    }
    run.num_tokens += ranks.sum_of_counts(num_tokens)? as u64;
    let step_batches: Vec<Batch> = drawn.iter_mut().map(|drawn| std::mem::take(&mut drawn.micro.batch)).collect();
    let parts = Parts { micro_steps, slices: batches.slices() * world_size };
    let mut loss =
        PolicyLoss { settings, session, batches: &step_batches, drawn: &drawn, parts, scale, step, terms: Vec::new() };
    let dropout = Some(DropoutKey { seed: training.seed, step });
    session.engine.accumulate(&step_batches, temperature(settings), dropout, &mut loss)?;
    let terms = gathered::in_order(loss.terms, &*ranks)?;
    let mut metrics = Metrics::default();
    terms.iter().for_each(|term| metrics.merge(&term.metrics));
    let attended = terms.iter().map(Term::attended_entropy);
    let attended_entropy = attended.fold((0.0, 0.0), |(sum, count), (more, others)| (sum + more, count + others));
    Ok((terms.iter().map(|term| term.loss).sum(), metrics, attended_entropy))
}

/// Says what was found in the prompts of a split.
///
/// # Errors
/// If the longest leaves no room for a completion.
pub(super) fn check_prompts(
    settings: &GrpoSettings,
    session: &Session,
    split: &str,
    prompts: &Prompts,
) -> anyhow::Result<()> {
    turns::warn(split, &prompts.summary().notes);
    let limit = session.engine.config().max_position_embeddings;
    let longest = prompts.longest();
    let room = settings.max_completion_length.unwrap_or(1);
    if longest + room > limit {
        bail!(
            "the longest prompt has {longest} tokens and `max_completion_length` is {room}, together more than the {limit} \
             that the model holds; lower `max_completion_length`, or set `max_prompt_length`"
        );
    }
    Ok(())
}

/// The settings with a longest completion: where they name none, what the model holds after the longest prompt.
pub(super) fn close_length(settings: &GrpoSettings, session: &Session, prompts: [Option<&Prompts>; 2]) -> GrpoSettings {
    let longest = prompts.into_iter().flatten().map(Prompts::longest).max().unwrap_or(0);
    let room = session.engine.config().max_position_embeddings.saturating_sub(longest);
    let length = settings.max_completion_length.unwrap_or(room);
    GrpoSettings { max_completion_length: Some(length), ..settings.clone() }
}

/// Keeps a copy of the parameters where switching the adapter off does not give the reference policy.
fn keep_reference(settings: &GrpoSettings, session: &mut Session) -> anyhow::Result<()> {
    // The start of an adapter that trains whole weights is the reference, as TRL's copy of a loaded adapter is.
    let trains_whole_weights = session.adapter_spec.as_ref().is_none_or(AdapterSpec::trains_whole_weights);
    if settings.beta != 0.0 && (trains_whole_weights || settings.sync_ref_model) {
        session.engine.store_mut().keep_reference()?;
    }
    Ok(())
}

/// Samples, rewards and scores a generation batch, and adds the log-probabilities that the loss will need.
fn generate(
    settings: &GrpoSettings,
    generator: &mut Generator<'_>,
    session: &mut Session,
    prompts: &Prompts,
    indices: &[usize],
    (key, life): (u64, usize),
    run: &mut Run<'_>,
) -> anyhow::Result<GenerationBatch> {
    let started = std::time::Instant::now();
    let completions = sample(settings, generator, session, prompts, indices, key, run)?;
    let session = &*session;
    run.memory.set_kv_cache(generator.cache_bytes());
    generator.make_room(session);
    run.memory.set_kv_cache(generator.cache_bytes());
    let statistics = generator.statistics();
    let (beside_secs, left_secs) = generator.early_reward_secs();
    run.accumulator.mean("rollout/time", started.elapsed().as_secs_f64() - left_secs);
    let rollout_secs = statistics.prefill_secs + statistics.decode_secs + statistics.sampling_secs;
    let mut rate = [statistics.generated_tokens as f64 / rollout_secs.max(f64::MIN_POSITIVE)];
    run.ranks().all_reduce_sum_f64(&mut rate)?;
    run.accumulator.mean("rollout/tokens_per_second", rate[0]);
    generator.show_progress(run.step, run.total());
    let scoring = std::time::Instant::now();
    let scored = generator.score(
        session,
        prompts,
        &completions,
        settings.num_generations,
        Some(run.step + 1),
        &run.surroundings(),
    )?;
    run.accumulator.mean("rollout/rewards_beside_time", beside_secs - left_secs.min(beside_secs));
    run.accumulator.mean("rollout/rewards_time", left_secs + scoring.elapsed().as_secs_f64());
    for (name, value) in &scored.metrics {
        run.accumulator.mean(name, *value);
    }
    run.log_completions(&scored.records)?;
    if settings.log_completions {
        // Evenly over the batch, so that a few of them are of different prompts.
        let count = settings.num_completions_to_print.unwrap_or(scored.shown.len()).min(scored.shown.len());
        run.samples = (0..count).map(|i| scored.shown[i * scored.shown.len() / count].clone()).collect();
    }
    let truncated = completions.iter().filter(|completion| completion.is_truncated()).count();
    let mut batch = GenerationBatch::new(completions, &scored.outcome, settings.mask_truncated_completions);
    let notice = notices::Generation {
        completions: batch.samples.len(),
        truncated,
        num_items: batch.num_items,
        advantages: &scored.outcome.advantages,
        rewards: &scored.outcome.rewards,
    };
    if let Some(text) = run.notices.generation(run.step + 1, notice) {
        tracing::warn!("{text}");
    }
    add_logprobs(settings, session, prompts, life, &mut batch)?;
    Ok(batch)
}

/// Log-probabilities under the old policy, where the batch will be trained on after the policy has moved or the rollout
/// is corrected, and under the reference, where the loss has a KL term.
fn add_logprobs(
    settings: &GrpoSettings,
    session: &Session,
    prompts: &Prompts,
    life: usize,
    batch: &mut GenerationBatch,
) -> anyhow::Result<()> {
    let accumulation = settings.training.gradient_accumulation_steps;
    // As TRL: the batch stays on policy if it is used up within whole optimizer steps that each see it once.
    let needs_old = !accumulation.is_multiple_of(life) || settings.rollout_importance_sampling.is_some();
    let needs_ref = settings.beta != 0.0;
    if !needs_old && !needs_ref {
        return Ok(());
    }
    let size = settings.training.per_device_train_batch_size;
    let micros: Vec<MicroBatch> = (batch.samples.chunks(size))
        .map(|samples| GenerationBatch::micro_batch(samples, prompts, false))
        .collect::<Result<_, _>>()?;
    // Each rank computes those of its share.
    let ranks = session.engine.store().sharing().ranks();
    let start = |rank: usize| micros.len() * rank / ranks.world_size();
    let own = start(ranks.rank())..start(ranks.rank() + 1);
    let micros: Vec<MicroBatch> = micros.into_iter().skip(own.start).take(own.len()).collect();
    let row_starts: Vec<Vec<usize>> = micros.iter().map(|micro| micro.row_starts.clone()).collect();
    let batches: Vec<Batch> = micros.into_iter().map(|micro| micro.batch).collect();
    let speak = |speaker: Speaker| -> anyhow::Result<Vec<Vec<f32>>> {
        let outputs = session.engine.logprobs(&batches, speaker, temperature(settings))?;
        // As their bits: JSON has no infinity.
        let rows = |(output, starts): (&head::Output, &Vec<usize>)| -> Vec<Vec<u32>> {
            let bits = |row: &[f32]| row.iter().map(|value| value.to_bits()).collect();
            starts.windows(2).map(|w| bits(&output.logprobs[w[0]..w[1]])).collect()
        };
        let rows = gathered::in_order(outputs.iter().zip(&row_starts).flat_map(rows).collect(), ranks)?;
        Ok(rows.into_iter().map(|row: Vec<u32>| row.into_iter().map(f32::from_bits).collect()).collect())
    };
    if needs_old {
        let rows = speak(Speaker::Policy)?;
        batch.samples.iter_mut().zip(rows).for_each(|(sample, row)| sample.old_logprobs = Some(row));
    }
    if needs_ref {
        let rows = speak(Speaker::Reference)?;
        batch.samples.iter_mut().zip(rows).for_each(|(sample, row)| sample.ref_logprobs = Some(row));
    }
    Ok(())
}

/// The temperature by which logits are divided in training: the sampling temperature, 1 for greedy sampling.
fn temperature(settings: &GrpoSettings) -> f64 {
    if settings.sampling.temperature > 0.0 { settings.sampling.temperature } else { 1.0 }
}

/// Keeps evaluation's random draws apart from training's, whose keys are optimizer steps.
pub(super) const EVALUATION_KEY: u64 = 1 << 63;

/// Rewards of the evaluation prompts, `num_generations_eval` completions each.
fn evaluate(
    settings: &GrpoSettings,
    generator: &mut Generator<'_>,
    session: &mut Session,
    prompts: &Prompts,
    run: &Run<'_>,
) -> anyhow::Result<Vec<(String, Value)>> {
    let started = std::time::Instant::now();
    let group = settings.num_generations_eval;
    let indices: Vec<usize> = (0..prompts.len()).flat_map(|p| std::iter::repeat_n(p, group)).collect();
    let completions = sample(settings, generator, session, prompts, &indices, EVALUATION_KEY | run.step, run)?;
    generator.make_room(session);
    generator.show_progress(run.step, run.total());
    let scored = generator.score(session, prompts, &completions, group, Some(run.step), &run.surroundings())?;
    let secs = started.elapsed().as_secs_f64();
    let mut values: Vec<(String, Value)> =
        scored.metrics.iter().map(|(name, &value)| (format!("eval_{name}"), Value::from(value))).collect();
    values.push(("eval_runtime".into(), secs.into()));
    values.push(("eval_samples_per_second".into(), (indices.len() as f64 / secs).into()));
    Ok(values)
}

fn show_plan(
    settings: &GrpoSettings,
    session: &Session,
    prompts: &Prompts,
    parts: &[Part],
    generator: &Generator<'_>,
    batches: &PromptBatches,
    total: u64,
) -> Vec<Section> {
    let training = &settings.training;
    let batch = format!(
        "{} x {} completions, {} per prompt; {} generated at once",
        training.per_device_train_batch_size,
        training.gradient_accumulation_steps,
        settings.num_generations,
        batches.per_batch() * settings.num_generations
    );
    let rewards: Vec<String> = generator
        .rewards()
        .names()
        .iter()
        .zip(&settings.reward_weights)
        .map(|(name, weight)| format!("{name} x {weight}"))
        .collect();
    let mut policy = Section::new("Policy").row("rewards", rewards.join(", "));
    for (what, how) in generator.rewards().surroundings() {
        policy.push(what, how);
    }
    let mut policy = policy
        .row(
            "loss",
            format!("{}, clipped to [1 - {}, 1 + {}]", settings.loss_type, settings.epsilon, settings.epsilon_high),
        )
        .row(
            "sampling",
            format!(
                "temperature {}, at most {} new tokens",
                settings.sampling.temperature,
                settings.longest_completion()
            ),
        );
    if settings.beta != 0.0 {
        let reference = match (session.engine.store().has_reference(), settings.sync_ref_model) {
            (true, true) => "a copy that follows the policy",
            (true, false) => "a copy of the start",
            _ => "the base model",
        };
        policy.push("KL", format!("beta {} against {reference}", settings.beta));
    }
    let summary = prompts.summary();
    let mut data = plan::data_section(&settings.data, parts, &summary.statistics);
    turns::show_adapted(&mut data, &summary.notes);
    if summary.duplicates > 0 {
        data.push("duplicates", format!("{} rows left out when they were preprocessed", summary.duplicates));
    }
    vec![
        plan::run_section("grpo", training, session, (batches.epoch(), total), &batch),
        plan::model_section(&settings.model, session),
        data,
        policy,
    ]
}
