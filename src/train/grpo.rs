//! Group relative policy optimisation (`DeepSeekMath`, 2402.03300, algorithm 1).

use anyhow::bail;
use serde_json::Value;

use super::continuation::Continuation;
use super::generation::{GenerationBatch, Generator, MicroBatch, Sampled};
use super::inputs::Inputs;
use super::output_dir;
use super::plan;
use super::run::Run;
use super::session::{self, Session};
use super::state::{LoopState, State, find_checkpoint, restore};
use super::turns;
use super::{Backend, Context, Outcome};
use crate::algo::{
    GrpoBatch, GrpoInputs, GrpoLossSettings, Metrics, RolloutCorrectionOutput, grpo_loss, rollout_correction,
};
use crate::config;
use crate::config::settings::{GrpoSettings, Interval};
use crate::data::{self, Dataset, Findings, Part, PromptData, PromptExample, PromptOptions, Sampler, TokenStatistics};
use crate::engine::{DropoutKey, Speaker};
use crate::model::HeadGradient;
use crate::model::load::Purpose;
use crate::optim::LossScaler;
use crate::telemetry::Section;
use crate::zero::ShardedAdamW;

/// Trains on the prompts that `settings` name.
///
/// For each generation batch: sample a group of completions per prompt, reward them, take the rewards relative to their
/// group as advantages. For each optimizer step: sum the gradients of the clipped policy loss (and of the KL to the
/// reference) over `gradient_accumulation_steps` micro-batches, clip, and move the trained parameters by AdamW.
///
/// # Errors
/// If the input is unusable, a reward fails, the loss stops being finite, or a file cannot be written.
pub fn run(settings: &GrpoSettings, context: Context<'_>) -> anyhow::Result<Outcome> {
    let training = &settings.training;
    let backend = Backend::open(training.device, training.precision)?;
    backend.tune(!training.full_determinism)?;
    let mut folder = output_dir::claim(training, &settings.model, &settings.data)?;
    let continuation = Continuation::new("grpo", config::grpo_texts(settings));
    let checkpoint = find_checkpoint(training, &continuation, &mut folder)?;
    let mut progress = plan::downloads(&context.terminal);
    let mut session = session::open(
        &settings.model,
        training.seed,
        Purpose::Training,
        session::activations(training),
        &backend,
        &mut progress,
    )?;
    let evaluates = training.eval_strategy != Interval::No;
    let splits = data::load(&settings.data, training.seed, evaluates, &mut progress)?;
    drop(progress);
    let inputs = Inputs::of(&settings.model, &session, &splits, continuation.value("reward_funcs"))?;
    let PromptData { prompts, is_conversational, findings } = prepare(settings, &session, "training", &splits.train)?;
    let eval_prompts = splits.eval.as_ref().map(|rows| prepare(settings, &session, "evaluation", rows)).transpose()?;
    let eval_prompts = eval_prompts.map(|data| data.prompts);
    if is_conversational {
        session.adopt_end_of_turn(settings.model.eos_token.is_some())?;
    }
    let settings = &close_length(settings, &session, prompts.iter().chain(eval_prompts.iter().flatten()));
    keep_reference(settings, &mut session)?;
    let mut generator = Generator::new(settings, &session)?;

    let total = total_steps(settings, prompts.len());
    let schedule = plan::schedule(training, total)?;
    let mut optimizer = ShardedAdamW::new(training.optimizer, session.engine.store())?;
    let mut scaler = plan::loss_scaler(&backend)?;
    let mut sampler = Sampler::new(prompts.len(), training.data_seed, settings.shuffle_dataset, 1, 0)?;
    let mut resumed: Option<State<GenerationBatch>> =
        checkpoint.map(|c| restore(&c, training, &session, &mut optimizer, (&inputs, &splits))).transpose()?;
    let mut generation = resumed.as_mut().and_then(|state| state.buffer.take());
    if let Some(batch) = &generation {
        batch.check(settings, prompts.len(), session.engine.config().vocab_size)?;
    }
    if let Some(state) = &resumed {
        sampler.resume(state.place_in(sampler.len()))?;
        scaler = scaler.map(|fresh| state.loss_scaler.clone().unwrap_or(fresh));
    }
    let memory = plan::Memory::new(&session, &optimizer, generator.most_cache_bytes(&session, &prompts));
    let mut run = Run::begin(folder, (continuation, inputs), training, context, total, memory, resumed.as_ref())?;
    run.open(show_plan(settings, &session, (&prompts, &findings), &splits.parts, &generator, total));

    let num_prompts = settings.generation_batch_size / settings.num_generations;
    while run.step < run.total && !run.is_stopped_early() {
        let (step, epoch_before) = (run.step, sampler.epochs());
        session.engine.store().zero_gradients()?;
        let (mut loss, mut metrics) = (0.0, Metrics::default());
        for micro_step in 0..training.gradient_accumulation_steps as u64 {
            if generation.as_ref().is_none_or(|batch| batch.micro_steps == batch_life(settings)) {
                let indices = sampler.next_groups(num_prompts, settings.num_generations);
                // One step may take several generation batches; each draws numbers of its own.
                let key = step * training.gradient_accumulation_steps as u64 + micro_step;
                generation = Some(generate(settings, &mut generator, &session, &prompts, &indices, key, &mut run)?);
            }
            let Some(batch) = &mut generation else { bail!("a generation batch was just made") };
            let cut = batch.micro_steps % settings.steps_per_generation * training.per_device_train_batch_size;
            let samples = &batch.samples[cut..cut + training.per_device_train_batch_size];
            let micro_batch = GenerationBatch::micro_batch(samples, &prompts, settings.mask_truncated_completions)?;
            let scale = plan::loss_scale(scaler.as_ref());
            let output = policy_gradient(settings, &session, samples, &micro_batch, batch.num_items, step, scale)?;
            batch.micro_steps += 1;
            run.num_tokens += micro_batch.batch.tokens.len() as u64;
            loss += output.0;
            metrics.merge(&output.1);
        }
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
        metrics.values().into_iter().for_each(|(name, value)| run.accumulator.mean(&name, value));
        let epoch = sampler.epochs();
        run.finish_step(epoch_before, epoch, &format!("loss {loss:.4}"))?;

        if let Some(eval) = eval_prompts.as_ref().filter(|_| run.is_due(training.eval_strategy, epoch_before, epoch)) {
            let values = evaluate(settings, &mut generator, &session, eval, &run)?;
            run.log_evaluation(values)?;
        }
        let is_interrupted = run.is_interrupted();
        if is_interrupted || run.is_save_due(epoch_before, epoch) {
            run.save(&session, &optimizer, loop_state(settings, &sampler, generation.as_ref(), scaler.as_ref()))?;
        }
        if is_interrupted && run.step < run.total {
            return Ok(run.stop());
        }
    }
    run.save(&session, &optimizer, loop_state(settings, &sampler, generation.as_ref(), scaler.as_ref()))?;
    run.finish(&session)
}

/// Micro-steps that a generation batch serves.
fn batch_life(settings: &GrpoSettings) -> usize {
    settings.steps_per_generation * settings.num_iterations
}

/// Optimizer steps of the run: each generation batch takes `generation_batch_size / num_generations` prompts and serves
/// `steps_per_generation * num_iterations` micro-steps.
fn total_steps(settings: &GrpoSettings, num_prompts: usize) -> u64 {
    let training = &settings.training;
    let batches = num_prompts as f64 * settings.num_generations as f64 / settings.generation_batch_size as f64;
    let steps = batches * batch_life(settings) as f64 / training.gradient_accumulation_steps as f64;
    let from_epochs = (training.num_train_epochs * steps).ceil().max(1.0) as u64;
    training.max_steps.map_or(from_epochs, |steps| steps as u64)
}

fn prepare(settings: &GrpoSettings, session: &Session, split: &str, rows: &Dataset) -> anyhow::Result<PromptData> {
    let options = PromptOptions::from_settings(settings);
    let data = data::prepare_prompts(rows, &session.tokenizer, session.template.as_ref(), &options, &|_| ())?;
    turns::warn(split, &data.findings);
    let limit = session.engine.config().max_position_embeddings;
    let longest = data.prompts.iter().map(|p| p.prompt_ids.len()).max().unwrap_or(0);
    let room = settings.max_completion_length.unwrap_or(1);
    if longest + room > limit {
        bail!(
            "the longest prompt has {longest} tokens and `max_completion_length` is {room}, together more than the {limit} \
             that the model holds; lower `max_completion_length`, or set `max_prompt_length`"
        );
    }
    Ok(data)
}

/// The settings with a longest completion: where they name none, what the model holds after the longest prompt.
fn close_length<'a>(
    settings: &GrpoSettings,
    session: &Session,
    prompts: impl Iterator<Item = &'a PromptExample>,
) -> GrpoSettings {
    let longest = prompts.map(|prompt| prompt.prompt_ids.len()).max().unwrap_or(0);
    let room = session.engine.config().max_position_embeddings.saturating_sub(longest);
    let length = settings.max_completion_length.unwrap_or(room);
    GrpoSettings { max_completion_length: Some(length), ..settings.clone() }
}

/// Keeps a copy of the parameters where switching the adapter off does not give the reference policy.
fn keep_reference(settings: &GrpoSettings, session: &mut Session) -> anyhow::Result<()> {
    let replaces_weights = session.adapter_spec.as_ref().is_some_and(|spec| !spec.full_replacements.is_empty());
    if settings.beta != 0.0 && replaces_weights {
        bail!(
            "`beta: {}` needs the base model beside the policy, but this adapter replaces whole weights \
             (modules_to_save); set `beta: 0`, or use an adapter without them",
            settings.beta
        );
    }
    if settings.beta != 0.0 && (session.adapter_spec.is_none() || settings.sync_ref_model) {
        session.engine.store_mut().keep_reference()?;
    }
    Ok(())
}

/// Samples, rewards and scores a generation batch, and adds the log-probabilities that the loss will need.
fn generate(
    settings: &GrpoSettings,
    generator: &mut Generator<'_>,
    session: &Session,
    prompts: &[PromptExample],
    indices: &[usize],
    key: u64,
    run: &mut Run<'_>,
) -> anyhow::Result<GenerationBatch> {
    let started = std::time::Instant::now();
    let completions = generator.sample(session, prompts, indices, key, &settings.sampling, run)?;
    run.memory.set_kv_cache(generator.cache_bytes());
    generator.make_room(session);
    run.memory.set_kv_cache(generator.cache_bytes());
    let statistics = generator.statistics();
    run.accumulator.mean("rollout/time", started.elapsed().as_secs_f64());
    let rollout_secs = statistics.prefill_secs + statistics.decode_secs + statistics.sampling_secs;
    run.accumulator.mean("rollout/tokens_per_second", statistics.generated_tokens as f64 / rollout_secs);
    let scored = generator.score(session, prompts, &completions, settings.num_generations, run.step + 1)?;
    for (name, value) in &scored.metrics {
        run.accumulator.mean(name, *value);
    }
    run.log_completions(&scored.records)?;
    if settings.log_completions {
        // Evenly over the batch, so that a few of them are of different prompts.
        let count = settings.num_completions_to_print.unwrap_or(scored.shown.len()).min(scored.shown.len());
        run.samples = (0..count).map(|i| scored.shown[i * scored.shown.len() / count].clone()).collect();
    }
    let mut batch = GenerationBatch::new(completions, &scored.outcome, settings.mask_truncated_completions);
    add_logprobs(settings, session, prompts, &mut batch)?;
    Ok(batch)
}

/// Log-probabilities under the old policy, where the batch will be trained on after the policy has moved or the rollout
/// is corrected, and under the reference, where the loss has a KL term.
fn add_logprobs(
    settings: &GrpoSettings,
    session: &Session,
    prompts: &[PromptExample],
    batch: &mut GenerationBatch,
) -> anyhow::Result<()> {
    let accumulation = settings.training.gradient_accumulation_steps;
    // As TRL: the batch stays on policy if it is used up within whole optimizer steps that each see it once.
    let needs_old =
        !accumulation.is_multiple_of(batch_life(settings)) || settings.rollout_importance_sampling.is_some();
    let needs_ref = settings.beta != 0.0;
    for samples in batch.samples.chunks_mut(settings.training.per_device_train_batch_size) {
        if !needs_old && !needs_ref {
            break;
        }
        let micro = GenerationBatch::micro_batch(samples, prompts, false)?;
        let speak = |speaker: Speaker| -> anyhow::Result<Vec<Vec<f32>>> {
            let output = session.engine.logprobs(&micro.batch, speaker, temperature(settings))?;
            Ok(micro.row_starts.windows(2).map(|w| output.logprobs[w[0]..w[1]].to_vec()).collect())
        };
        if needs_old {
            let rows = speak(Speaker::Policy)?;
            samples.iter_mut().zip(rows).for_each(|(sample, row)| sample.old_logprobs = Some(row));
        }
        if needs_ref {
            let rows = speak(Speaker::Reference)?;
            samples.iter_mut().zip(rows).for_each(|(sample, row)| sample.ref_logprobs = Some(row));
        }
    }
    Ok(())
}

/// The temperature by which logits are divided in training: the sampling temperature, 1 for greedy sampling.
fn temperature(settings: &GrpoSettings) -> f64 {
    if settings.sampling.temperature > 0.0 { settings.sampling.temperature } else { 1.0 }
}

/// Adds the policy gradient of one micro-batch; returns its loss and metrics.
fn policy_gradient(
    settings: &GrpoSettings,
    session: &Session,
    samples: &[Sampled],
    micro: &MicroBatch,
    num_items: usize,
    step: u64,
    loss_scale: f64,
) -> anyhow::Result<(f64, Metrics)> {
    let training = &settings.training;
    let joined = |pick: fn(&Sampled) -> Option<&Vec<f32>>| -> Option<Vec<f32>> {
        samples.iter().map(pick).collect::<Option<Vec<_>>>().map(|rows| rows.into_iter().flatten().copied().collect())
    };
    let old = joined(|s| s.old_logprobs.as_ref());
    let reference = joined(|s| s.ref_logprobs.as_ref());
    let sampling = joined(|s| Some(&s.sampling_logprobs));
    let correction: Option<RolloutCorrectionOutput> = match (&settings.rollout_importance_sampling, &old, &sampling) {
        (Some(correction), Some(old), Some(sampling)) => {
            Some(rollout_correction(&micro.row_starts, old, sampling, &micro.mask, None, correction)?)
        }
        _ => None,
    };
    let loss_settings = GrpoLossSettings::from(settings);
    let dropout = Some(DropoutKey { seed: training.seed, step });
    session.engine.forward_backward(&micro.batch, temperature(settings), dropout, |head| {
        let output = grpo_loss(
            &GrpoInputs {
                row_starts: &micro.row_starts,
                logprobs: &head.logprobs,
                old_logprobs: old.as_deref(),
                ref_logprobs: reference.as_deref(),
                sampling_logprobs: sampling.as_deref().filter(|_| settings.off_policy_mask_threshold.is_some()),
                entropies: Some(&head.entropies),
                mask: &micro.mask,
                tool_mask: None,
                advantages: &micro.advantages,
                importance_ratio: correction
                    .as_ref()
                    .and_then(|c| c.importance_ratio(0..samples.len(), 0..micro.mask.len())),
                entropy_threshold: None,
                batch: GrpoBatch {
                    num_items_in_batch: num_items,
                    num_processes: 1,
                    gradient_accumulation_steps: training.gradient_accumulation_steps,
                    steps_per_generation: settings.steps_per_generation,
                    is_training: true,
                },
            },
            &loss_settings,
        )?;
        plan::check_loss(output.loss, step + 1, session, &micro.batch, &training.output_dir)?;
        let mut metrics = output.metrics;
        if let Some(correction) = &correction {
            metrics.merge(&correction.metrics);
        }
        let gradient =
            HeadGradient { d_logprobs: output.d_logprobs, d_entropies: output.d_entropies.unwrap_or_default() };
        let gradient = gradient.scaled(loss_scale);
        Ok::<_, anyhow::Error>((gradient, (output.loss, metrics)))
    })
}

/// Rewards of the evaluation prompts, `num_generations_eval` completions each.
fn evaluate(
    settings: &GrpoSettings,
    generator: &mut Generator<'_>,
    session: &Session,
    prompts: &[PromptExample],
    run: &Run<'_>,
) -> anyhow::Result<Vec<(String, Value)>> {
    /// Keeps evaluation's random draws apart from training's, whose keys are optimizer steps.
    const EVALUATION_KEY: u64 = 1 << 63;
    let started = std::time::Instant::now();
    let group = settings.num_generations_eval;
    let indices: Vec<usize> = (0..prompts.len()).flat_map(|p| std::iter::repeat_n(p, group)).collect();
    let completions =
        generator.sample(session, prompts, &indices, EVALUATION_KEY | run.step, &settings.sampling, run)?;
    generator.make_room(session);
    let scored = generator.score(session, prompts, &completions, group, run.step)?;
    let secs = started.elapsed().as_secs_f64();
    let mut values: Vec<(String, Value)> =
        scored.metrics.iter().map(|(name, &value)| (format!("eval_{name}"), Value::from(value))).collect();
    values.push(("eval_runtime".into(), secs.into()));
    values.push(("eval_samples_per_second".into(), (indices.len() as f64 / secs).into()));
    Ok(values)
}

fn loop_state(
    settings: &GrpoSettings,
    sampler: &Sampler,
    generation: Option<&GenerationBatch>,
    scaler: Option<&LossScaler>,
) -> LoopState<GenerationBatch> {
    let unfinished = generation.filter(|batch| batch.micro_steps < batch_life(settings));
    LoopState { sampler: sampler.state(), buffer: unfinished.cloned(), loss_scaler: scaler.cloned() }
}

fn show_plan(
    settings: &GrpoSettings,
    session: &Session,
    (prompts, findings): (&[PromptExample], &Findings),
    parts: &[Part],
    generator: &Generator<'_>,
    total: u64,
) -> Vec<Section> {
    let training = &settings.training;
    let batch = format!(
        "{} x {} completions, {} per prompt; {} generated at once",
        training.per_device_train_batch_size,
        training.gradient_accumulation_steps,
        settings.num_generations,
        settings.generation_batch_size
    );
    let rewards: Vec<String> = generator
        .reward_names()
        .iter()
        .zip(&settings.reward_weights)
        .map(|(name, weight)| format!("{name} x {weight}"))
        .collect();
    let mut policy = Section::new("Policy")
        .row("rewards", rewards.join(", "))
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
    let mut data =
        plan::data_section(&settings.data, parts, &TokenStatistics::of(prompts.iter().map(|p| p.prompt_ids.len())));
    turns::show_adapted(&mut data, findings);
    vec![
        plan::run_section("grpo", training, session, total, &batch),
        plan::model_section(&settings.model, session),
        data,
        policy,
    ]
}
