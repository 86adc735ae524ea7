//! The checks across GRPO's keys, and its settings.

use super::diagnose::Problems;
use super::field::Named;
use super::keys::RawConfig;
use super::resolve::{Context, build_data, build_model, build_training, check_shared, warn_idle};
use super::resolve_rewards::{at_home, build_rewards, check_rewards, with_shared_parameters};
use super::settings::{
    AdaptiveEntropy, GrpoLossType, GrpoSettings, ImportanceSamplingLevel, RolloutCorrection, RolloutCorrectionMode,
    SamplingSettings, VespoSettings,
};
use super::special::Recurrence;

/// Checks and builds the settings of `trainer grpo`; `None` if anything was reported.
///
/// `uses_vllm` is what the file says for `use_vllm`, if it does: it decides whether a correction that TRL makes only with
/// vLLM is made.
pub(super) fn grpo(
    raw: &RawConfig,
    context: &Context<'_>,
    uses_vllm: Option<bool>,
    problems: &mut Problems,
) -> Option<GrpoSettings> {
    let ranks = check_shared(raw, context, problems);
    let batch = Batch::new(raw, ranks.world_size);
    check_generation_size(raw, &batch, problems);
    check_generation_batch(raw, &batch, problems);
    check_evaluation_batch(raw, ranks.world_size, problems);
    check_rewards(raw, context, problems);
    check_loss(raw, problems);
    let correction = rollout_correction(raw, uses_vllm, problems);
    check_reference(raw, problems);
    check_prompts(raw, problems);
    problems.is_clean().then(|| {
        let num_generations = *raw.num_generations.value();
        let reward_funcs: Vec<_> = raw
            .reward_funcs
            .value()
            .0
            .iter()
            .map(|reward| at_home(with_shared_parameters(raw, &reward.spec)))
            .collect();
        let epsilon = *raw.epsilon.value();
        let training = build_training(raw, context, ranks);
        let rewards = build_rewards(raw, context, &training.output_dir);
        GrpoSettings {
            model: build_model(raw),
            data: build_data(raw),
            training,
            num_generations,
            num_generations_eval: raw.num_generations_eval.value().unwrap_or(num_generations),
            max_prompt_length: *raw.max_prompt_length.value(),
            truncate_prompts: *raw.truncate_prompts.value(),
            max_completion_length: *raw.max_completion_length.value(),
            sampling: SamplingSettings {
                repetition_penalty: *raw.repetition_penalty.value(),
                temperature: *raw.temperature.value(),
                top_k: raw.top_k.value().0,
                top_p: *raw.top_p.value(),
                min_p: raw.min_p.value().unwrap_or(0.0),
                stop_strings: raw.stop_strings.value().clone(),
            },
            reward_weights: raw.reward_weights.value().clone().unwrap_or_else(|| vec![1.0; reward_funcs.len()]),
            reward_funcs,
            rewards,
            scale_rewards: *raw.scale_rewards.value(),
            multi_objective_aggregation: *raw.multi_objective_aggregation.value(),
            loss_type: *raw.grpo_loss_type.value(),
            beta: *raw.beta.value(),
            use_bias_correction_kl: *raw.use_bias_correction_kl.value(),
            epsilon,
            epsilon_high: raw.epsilon_high.value().unwrap_or(epsilon),
            delta: *raw.delta.value(),
            importance_sampling_level: *raw.importance_sampling_level.value(),
            num_iterations: *raw.num_iterations.value(),
            steps_per_generation: batch.steps,
            generation_batch_size: batch.completions,
            mask_truncated_completions: *raw.mask_truncated_completions.value(),
            top_entropy_quantile: *raw.top_entropy_quantile.value(),
            entropy_coef: *raw.entropy_coef.value(),
            adaptive_entropy: raw.use_adaptive_entropy.value().then(|| AdaptiveEntropy {
                coef_min: *raw.entropy_coef_min.value(),
                coef_max: *raw.entropy_coef_max.value(),
                coef_delta: *raw.entropy_coef_delta.value(),
                target: *raw.entropy_target.value(),
            }),
            off_policy_mask_threshold: *raw.off_policy_mask_threshold.value(),
            sapo_temperature_neg: *raw.sapo_temperature_neg.value(),
            sapo_temperature_pos: *raw.sapo_temperature_pos.value(),
            vespo: VespoSettings {
                k_pos: *raw.vespo_k_pos.value(),
                lambda_pos: *raw.vespo_lambda_pos.value(),
                k_neg: *raw.vespo_k_neg.value(),
                lambda_neg: *raw.vespo_lambda_neg.value(),
            },
            rollout_importance_sampling: correction,
            sync_ref_model: *raw.sync_ref_model.value(),
            ref_model_mixup_alpha: *raw.ref_model_mixup_alpha.value(),
            ref_model_sync_steps: *raw.ref_model_sync_steps.value(),
            shuffle_dataset: *raw.shuffle_dataset.value(),
            log_completions: *raw.log_completions.value(),
            num_completions_to_print: *raw.num_completions_to_print.value(),
            max_num_seqs: *raw.max_num_seqs.value(),
        }
    })
}

/// Sizes of a generation batch.
struct Batch {
    /// Completions of one micro-step over all ranks.
    micro: usize,
    /// Micro-batches per rank.
    steps: usize,
    /// Completions at once over all ranks.
    completions: usize,
}

impl Batch {
    fn new(raw: &RawConfig, world_size: usize) -> Self {
        let micro = raw.per_device_train_batch_size.value().saturating_mul(world_size).max(1);
        let accumulation = *raw.gradient_accumulation_steps.value();
        let (steps, completions) = match (*raw.steps_per_generation.value(), *raw.generation_batch_size.value()) {
            (None, Some(completions)) => (completions / micro, completions),
            (steps, _) => {
                let steps = steps.unwrap_or(accumulation);
                (steps, micro.saturating_mul(steps))
            }
        };
        Self { micro, steps, completions }
    }
}

/// Most completions, and tokens of them, generated at once.
const MOST_COMPLETIONS: usize = 1 << 24;
const MOST_TOKENS: usize = 1 << 36;

/// Numbers that are in their range, and whose product is not.
fn check_generation_size(raw: &RawConfig, batch: &Batch, problems: &mut Problems) {
    let (completions, steps) = (batch.completions, &raw.steps_per_generation);
    if completions > MOST_COMPLETIONS {
        problems.clash(
            &[(&raw.per_device_train_batch_size, "sequences".into()), (steps, "micro-steps".into())],
            format!("a generation batch of {completions} completions is more than {MOST_COMPLETIONS}"),
            "lower `per_device_train_batch_size` or `steps_per_generation`",
        );
        return;
    }
    let longest = raw.max_completion_length.value().unwrap_or(0);
    if longest == 0 && *raw.grpo_loss_type.value() == GrpoLossType::DrGrpo {
        problems.clash(
            &[(&raw.max_completion_length, "no length".into()), (&raw.grpo_loss_type, "divides by it".into())],
            "`loss_type: dr_grpo` divides by `max_completion_length`, and there is none",
            "set `max_completion_length`",
        );
    }
    if completions.saturating_mul(longest) > MOST_TOKENS {
        problems.clash(
            &[(&raw.max_completion_length, "tokens each".into()), (&raw.generation_batch_size, "completions".into())],
            format!(
                "a generation batch of {completions} completions of up to {longest} tokens is more than any run holds"
            ),
            "lower `max_completion_length` or the generation batch",
        );
    }
}

fn check_generation_batch(raw: &RawConfig, batch: &Batch, problems: &mut Problems) {
    let group = *raw.num_generations.value();
    let (per_device, size, steps) =
        (&raw.per_device_train_batch_size, &raw.generation_batch_size, &raw.steps_per_generation);
    if steps.value().is_some() && size.value().is_some() {
        problems.clash(
            &[(steps, "one way".into()), (size, "the other way".into())],
            "`steps_per_generation` and `generation_batch_size` both say how many completions are generated at once",
            format!("keep one: `generation_batch_size` is {} times `steps_per_generation`", batch.micro),
        );
        return;
    }
    if group < 2 {
        return; // out of range, reported where it was read
    }
    let ranks = counted(batch.micro / (*per_device.value()).max(1), "rank");
    if size.value().is_some() {
        let unit = least_common_multiple(batch.micro, group);
        let works = around(batch.completions, unit);
        if !batch.completions.is_multiple_of(batch.micro) {
            problems.clash(
                &[(size, "completions at once".into()), (per_device, "sequences per rank and micro-step".into())],
                format!(
                    "`generation_batch_size` {} does not divide into micro-batches of {} sequences \
                     (`per_device_train_batch_size` {} x {ranks})",
                    batch.completions,
                    batch.micro,
                    per_device.value(),
                ),
                format!("`generation_batch_size` {works} works"),
            );
        } else if !batch.completions.is_multiple_of(group) {
            problems.clash(
                &[(size, "completions at once".into()), (&raw.num_generations, "completions per prompt".into())],
                format!(
                    "`generation_batch_size` {} does not divide into groups of `num_generations` {group}",
                    batch.completions
                ),
                format!(
                    "`generation_batch_size` {works} works; so does `num_generations` {}",
                    divisors(batch.completions)
                ),
            );
        }
    } else if !batch.completions.is_multiple_of(group) {
        let (field, name): (&dyn Named, _) = if steps.value().is_some() {
            (steps, "steps_per_generation")
        } else {
            (&raw.gradient_accumulation_steps, "gradient_accumulation_steps")
        };
        let unit = group / greatest_common_divisor(batch.micro, group);
        problems.clash(
            &[
                (&raw.num_generations, "completions per prompt".into()),
                (per_device, "sequences per rank and micro-step".into()),
                (field, "micro-steps".into()),
            ],
            format!(
                "a generation batch of {} completions (`per_device_train_batch_size` {} x {ranks} x `{name}` {}) \
                 does not divide into groups of `num_generations` {group}",
                batch.completions,
                per_device.value(),
                batch.steps,
            ),
            format!(
                "`{name}` {} works; so does `num_generations` {}",
                around(batch.steps, unit),
                divisors(batch.completions)
            ),
        );
    }
}

fn check_evaluation_batch(raw: &RawConfig, world_size: usize, problems: &mut Problems) {
    if *raw.eval_strategy.value() == Recurrence::No && !*raw.eval_on_start.value() {
        return;
    }
    let (per_device, train_group) = (*raw.per_device_eval_batch_size.value(), *raw.num_generations.value());
    let group = raw.num_generations_eval.value().unwrap_or(train_group);
    let batch = per_device.saturating_mul(world_size);
    if group == 0 || batch.is_multiple_of(group) {
        return;
    }
    let (group_field, name): (&dyn Named, _) = if raw.num_generations_eval.value().is_some() {
        (&raw.num_generations_eval, "num_generations_eval")
    } else {
        (&raw.num_generations, "num_generations")
    };
    let unit = group / greatest_common_divisor(world_size, group);
    let eval_divisors = divisors_from(batch, 1);
    problems.clash(
        &[
            (&raw.per_device_eval_batch_size, "sequences per rank and evaluation step".into()),
            (group_field, "completions per prompt".into()),
        ],
        format!(
            "an evaluation batch of {batch} completions (`per_device_eval_batch_size` {per_device} x {}) does not \
             divide into groups of `{name}` {group}",
            counted(world_size, "rank"),
        ),
        format!(
            "`per_device_eval_batch_size` {} works; so does `num_generations_eval` {eval_divisors}",
            around(per_device, unit)
        ),
    );
}

fn check_loss(raw: &RawConfig, problems: &mut Problems) {
    let loss = *raw.grpo_loss_type.value();
    let level = *raw.importance_sampling_level.value();
    let (epsilon, beta) = (*raw.epsilon.value(), *raw.beta.value());
    if loss == GrpoLossType::Cispo && raw.epsilon_high.value().is_none() {
        problems.caution(
            &[(&raw.grpo_loss_type, String::new())],
            format!(
                "`loss_type: cispo` takes `epsilon_high` as the cap of the ratio itself, and it falls back to \
                 `epsilon` {epsilon}"
            ),
            "set `epsilon_high`, e.g. 5.0 as in ScaleRL (2510.13786)",
        );
    }
    if let Some(delta) = *raw.delta.value()
        && delta <= 1.0 + raw.epsilon_high.value().unwrap_or(epsilon)
        && loss != GrpoLossType::Cispo
    {
        problems.caution(
            &[(&raw.delta, String::new())],
            format!("`delta` {delta} is not above 1 + `epsilon_high`, so it cuts the ratio before the upper clip does"),
            "a common value is 4.0 (INTELLECT-2, 2505.07291)",
        );
    }
    let is_sequence = level == ImportanceSamplingLevel::Sequence;
    let both: [(&dyn Named, String); 2] =
        [(&raw.importance_sampling_level, String::new()), (&raw.grpo_loss_type, String::new())];
    match loss {
        GrpoLossType::Luspo if !is_sequence => problems.caution(
            &both,
            "`loss_type: luspo` is meant for `importance_sampling_level: sequence`",
            "add `importance_sampling_level: sequence`",
        ),
        GrpoLossType::Vespo if is_sequence => problems.caution(
            &both,
            "`loss_type: vespo` weighs whole sequences by itself and is meant for `importance_sampling_level: token`",
            "remove `importance_sampling_level`",
        ),
        GrpoLossType::Bnpo | GrpoLossType::DrGrpo | GrpoLossType::Dapo | GrpoLossType::Cispo if is_sequence => problems
            .caution(
                &both,
                format!(
                    "with `importance_sampling_level: sequence`, `loss_type: {loss}` weighs each sequence by its length"
                ),
                "GSPO (2507.18071) goes with `loss_type: grpo`",
            ),
        _ => {}
    }
    let sapo: [(&dyn Named, bool); 2] = [
        (&raw.sapo_temperature_neg, raw.sapo_temperature_neg.is_changed()),
        (&raw.sapo_temperature_pos, raw.sapo_temperature_pos.is_changed()),
    ];
    for (field, is_changed) in sapo {
        warn_idle(problems, field, is_changed && loss != GrpoLossType::Sapo, "`loss_type` is not `sapo`", "remove it");
    }
    let vespo: [(&dyn Named, bool); 4] = [
        (&raw.vespo_k_pos, raw.vespo_k_pos.is_changed()),
        (&raw.vespo_lambda_pos, raw.vespo_lambda_pos.is_changed()),
        (&raw.vespo_k_neg, raw.vespo_k_neg.is_changed()),
        (&raw.vespo_lambda_neg, raw.vespo_lambda_neg.is_changed()),
    ];
    for (field, is_changed) in vespo {
        warn_idle(
            problems,
            field,
            is_changed && loss != GrpoLossType::Vespo,
            "`loss_type` is not `vespo`",
            "remove it",
        );
    }
    let adaptive: [(&dyn Named, bool); 4] = [
        (&raw.entropy_coef_min, raw.entropy_coef_min.is_changed()),
        (&raw.entropy_coef_max, raw.entropy_coef_max.is_changed()),
        (&raw.entropy_coef_delta, raw.entropy_coef_delta.is_changed()),
        (&raw.entropy_target, raw.entropy_target.is_changed()),
    ];
    let is_adaptive = *raw.use_adaptive_entropy.value();
    for (field, is_changed) in adaptive {
        let reason = "`use_adaptive_entropy` is false";
        warn_idle(problems, field, is_changed && !is_adaptive, reason, "add `use_adaptive_entropy: true`");
    }
    if is_adaptive && raw.entropy_coef_min.value() > raw.entropy_coef_max.value() {
        problems.clash(
            &[
                (&raw.entropy_coef_min, "the lowest weight".into()),
                (&raw.entropy_coef_max, "the highest weight".into()),
            ],
            "`entropy_coef_min` is above `entropy_coef_max`",
            "lower one or raise the other",
        );
    }
    let is_idle = beta == 0.0 && raw.use_bias_correction_kl.is_changed();
    warn_idle(
        problems,
        &raw.use_bias_correction_kl,
        is_idle,
        "`beta` is 0, so there is no KL term",
        "set `beta`, or remove it",
    );
}

fn rollout_correction(raw: &RawConfig, uses_vllm: Option<bool>, problems: &mut Problems) -> Option<RolloutCorrection> {
    let is_wanted = raw.vllm_importance_sampling_correction.value().unwrap_or(uses_vllm == Some(true));
    warn_idle(
        problems,
        &raw.vllm_importance_sampling_correction,
        is_wanted && uses_vllm == Some(false),
        "`use_vllm` is false, with which TRL makes no correction",
        "remove `use_vllm` to correct for the built-in rollout",
    );
    let is_on = is_wanted && uses_vllm != Some(false);
    let mode = *raw.vllm_importance_sampling_mode.value();
    let (clip_max, clip_min) =
        (*raw.vllm_importance_sampling_clip_max.value(), *raw.vllm_importance_sampling_clip_min.value());
    if !is_on {
        let fields: [(&dyn Named, bool); 3] = [
            (&raw.vllm_importance_sampling_mode, raw.vllm_importance_sampling_mode.is_changed()),
            (&raw.vllm_importance_sampling_clip_max, raw.vllm_importance_sampling_clip_max.is_changed()),
            (&raw.vllm_importance_sampling_clip_min, raw.vllm_importance_sampling_clip_min.is_changed()),
        ];
        for (field, is_changed) in fields {
            let reason = "`vllm_importance_sampling_correction` is false";
            warn_idle(problems, field, is_changed, reason, "add `vllm_importance_sampling_correction: true`");
        }
        return None;
    }
    if let (Some(low), Some(high)) = (clip_min, clip_max)
        && low >= high
    {
        problems.clash(
            &[
                (&raw.vllm_importance_sampling_clip_min, "the lower bound".into()),
                (&raw.vllm_importance_sampling_clip_max, "the upper bound".into()),
            ],
            format!(
                "`vllm_importance_sampling_clip_min` {low} must be less than `vllm_importance_sampling_clip_max` {high}"
            ),
            "lower one or raise the other",
        );
    }
    let is_truncating = matches!(mode, RolloutCorrectionMode::TokenTruncate | RolloutCorrectionMode::SequenceTruncate);
    if is_truncating && clip_min.is_none() && clip_max.is_none() {
        problems.clash(
            &[
                (&raw.vllm_importance_sampling_mode, "truncates".into()),
                (&raw.vllm_importance_sampling_clip_max, "no upper bound".into()),
            ],
            format!("`vllm_importance_sampling_mode: {mode}` needs a bound to truncate at"),
            "set `vllm_importance_sampling_clip_max`, e.g. 3.0, or `vllm_importance_sampling_clip_min`",
        );
    }
    let is_per_token = matches!(mode, RolloutCorrectionMode::TokenTruncate | RolloutCorrectionMode::TokenMask);
    if *raw.grpo_loss_type.value() == GrpoLossType::Vespo && !is_per_token {
        problems.clash(
            &[(&raw.grpo_loss_type, String::new()), (&raw.vllm_importance_sampling_mode, String::new())],
            format!(
                "`loss_type: vespo` does not go with `vllm_importance_sampling_mode: {mode}`: it multiplies the \
                 ratios of the tokens itself"
            ),
            "use `token_truncate` or `token_mask`, or `vllm_importance_sampling_correction: false`",
        );
    }
    Some(RolloutCorrection { mode, clip_max, clip_min })
}

fn check_reference(raw: &RawConfig, problems: &mut Problems) {
    if !*raw.sync_ref_model.value() {
        let fields: [(&dyn Named, bool); 2] = [
            (&raw.ref_model_mixup_alpha, raw.ref_model_mixup_alpha.is_changed()),
            (&raw.ref_model_sync_steps, raw.ref_model_sync_steps.is_changed()),
        ];
        for (field, is_changed) in fields {
            warn_idle(problems, field, is_changed, "`sync_ref_model` is false", "add `sync_ref_model: true`");
        }
        return;
    }
    if *raw.beta.value() == 0.0 {
        problems.clash(
            &[(&raw.sync_ref_model, "moves the reference".into()), (&raw.beta, "no reference".into())],
            "`sync_ref_model: true` has nothing to move: with `beta` 0 there is no reference policy",
            "set `beta`, e.g. 0.04, or remove `sync_ref_model`",
        );
    }
    if *raw.use_peft.value() {
        problems.clash(
            &[
                (&raw.sync_ref_model, "moves the reference".into()),
                (&raw.use_peft, "the reference is the frozen base".into()),
            ],
            "`sync_ref_model: true` does not go with `use_peft: true`: the reference is the base without the adapter, \
             which never moves",
            "remove `sync_ref_model`, or train every weight",
        );
    }
}

fn check_prompts(raw: &RawConfig, problems: &mut Problems) {
    let is_idle = *raw.truncate_prompts.value() && raw.max_prompt_length.value().is_none();
    warn_idle(problems, &raw.truncate_prompts, is_idle, "`max_prompt_length` is not set", "set `max_prompt_length`");
    let is_idle = !*raw.log_completions.value() && raw.num_completions_to_print.is_changed();
    warn_idle(
        problems,
        &raw.num_completions_to_print,
        is_idle,
        "`log_completions` is false",
        "add `log_completions: true`",
    );
}

pub(super) fn counted(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a.max(1) } else { greatest_common_divisor(b, a % b) }
}

fn least_common_multiple(a: usize, b: usize) -> usize {
    (a / greatest_common_divisor(a, b)).saturating_mul(b).max(1)
}

/// The multiples of `unit` next to `value`: "8 or 16".
fn around(value: usize, unit: usize) -> String {
    let below = value / unit * unit;
    let above = below.saturating_add(unit);
    if below == 0 { format!("{above}") } else { format!("{below} or {above}") }
}

/// The group sizes that divide a batch: "2, 3 or 6".
fn divisors(count: usize) -> String {
    divisors_from(count, 2)
}

fn divisors_from(count: usize, least: usize) -> String {
    let found: Vec<String> =
        (least..=count.min(1024)).filter(|size| count.is_multiple_of(*size)).map(|size| size.to_string()).collect();
    match found.as_slice() {
        [] => "of no size, the batch is too small".into(),
        [one] => one.clone(),
        [rest @ .., last] => format!("{} or {last}", rest.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_work() {
        assert_eq!(around(12, 8), "8 or 16");
        assert_eq!(around(3, 8), "8");
        assert_eq!(divisors(12), "2, 3, 4, 6 or 12");
        assert_eq!(divisors(1), "of no size, the batch is too small");
        assert_eq!(divisors_from(4, 1), "1, 2 or 4");
        assert_eq!(least_common_multiple(4, 6), 12);
        assert_eq!(greatest_common_divisor(12, 18), 6);
    }
}
