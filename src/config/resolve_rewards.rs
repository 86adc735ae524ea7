//! The rewards of a GRPO run: what the file's other keys give them, and whether they can be.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::diagnose::{Place, Problem, Problems};
use super::field::{Field, Named};
use super::home;
use super::keys::RawConfig;
use super::resolve::{Context, warn_idle};
use super::resolve_grpo::counted;
use super::settings::{CodeSettings, RewardSettings, RewardSpec};

/// A reward with a leading `~` of its program's words undone, which no shell does.
pub(super) fn at_home(spec: RewardSpec) -> RewardSpec {
    match spec {
        RewardSpec::Command { name, command, timeout_secs } => {
            let command = command.iter().map(|word| home::expand(word)).collect();
            RewardSpec::Command { name, command, timeout_secs }
        }
        RewardSpec::Python { target, name, parameters, timeout_secs } => {
            RewardSpec::Python { target: home::expand(&target), name, parameters, timeout_secs }
        }
        other @ RewardSpec::Builtin { .. } => other,
    }
}

/// Where functions in Python are looked for: the folder of the file travels with the settings, since the resolved
/// configuration lies elsewhere.
pub(super) fn build_rewards(raw: &RawConfig, context: &Context<'_>, output_dir: &Path) -> RewardSettings {
    let mut path: Vec<PathBuf> =
        raw.reward_path.value().iter().map(|folder| PathBuf::from(home::expand(folder))).collect();
    let has_python = raw.reward_funcs.value().0.iter().any(|one| matches!(one.spec, RewardSpec::Python { .. }));
    if let Some(folder) = context.config_folder.filter(|folder| has_python && !path.iter().any(|one| one == folder)) {
        path.push(folder.to_path_buf());
    }
    let code = CodeSettings {
        sandbox: *raw.code_sandbox.value(),
        parallel: *raw.parallel_code_exec_per_proc.value(),
        language: raw.code_language.value().clone(),
        test_batch_size: raw.code_eval_test_batch_size.value().0,
        scoring: *raw.code_eval_scoring_mode.value(),
        hidden: vec![output_dir.to_path_buf()],
    };
    RewardSettings { python: raw.reward_python.value().clone(), path, code }
}

pub(super) fn check_rewards(raw: &RawConfig, context: &Context<'_>, problems: &mut Problems) {
    let Some(list) = raw.reward_funcs.known() else { return };
    if raw.reward_funcs.is_broken() {
        return;
    }
    let functions = list.0.len();
    if let Some(weights) = raw.reward_weights.value()
        && weights.len() != functions
    {
        let (weights, functions) = (counted(weights.len(), "weight"), counted(functions, "reward function"));
        problems.clash(
            &[(&raw.reward_funcs, functions.clone()), (&raw.reward_weights, weights.clone())],
            format!("`reward_weights` has {weights} for {functions}"),
            "give one weight per reward function, in their order",
        );
    }
    check_shared_parameters(raw, problems);
    let (Some(place), Some(check)) = (raw.reward_funcs.place(), context.check_reward) else { return };
    for reward in list.0.iter().filter(|reward| !matches!(reward.spec, RewardSpec::Command { .. })) {
        if let Err(message) = check(&with_shared_parameters(raw, &reward.spec)) {
            // A message about a parameter names it in backticks.
            let parameter = reward.parameter_spans.iter().find(|(key, _)| message.contains(&format!("`{key}`")));
            let span = parameter.map_or(&reward.name_span, |(_, span)| span);
            problems.error(Problem::new(format!("`reward_funcs`: {message}")).at(Place::new(place.source, span), ""));
        }
    }
}

type SharedParameter<'a> = (&'a dyn Named, Option<Value>, &'static [&'static str], &'static str);

/// open-r1's keys for the parameters of rewards: the key, its value, the rewards that take it and the parameter's other
/// name.
fn shared_parameters(raw: &RawConfig) -> [SharedParameter<'_>; 9] {
    const COSINE: &[&str] = &["cosine", "cosine_scaled", "get_cosine_scaled"];
    const REPETITION: &[&str] = &["repetition_penalty", "token_repetition_penalty", "get_repetition_penalty"];
    const OVERLONG: &[&str] = &["length_penalty", "soft_overlong_punishment", "get_soft_overlong_punishment"];
    let number = |field: &Field<Option<f64>>| field.value().map(Value::from);
    let count = |field: &Field<Option<usize>>| field.value().map(Value::from);
    [
        (&raw.cosine_min_value_wrong, number(&raw.cosine_min_value_wrong), COSINE, "min_value_wrong"),
        (&raw.cosine_max_value_wrong, number(&raw.cosine_max_value_wrong), COSINE, "max_value_wrong"),
        (&raw.cosine_min_value_correct, number(&raw.cosine_min_value_correct), COSINE, "min_value_correct"),
        (&raw.cosine_max_value_correct, number(&raw.cosine_max_value_correct), COSINE, "max_value_correct"),
        (&raw.cosine_max_len, count(&raw.cosine_max_len), COSINE, "max_len"),
        (&raw.repetition_n_grams, count(&raw.repetition_n_grams), REPETITION, "ngram_size"),
        (&raw.repetition_max_penalty, number(&raw.repetition_max_penalty), REPETITION, "max_penalty"),
        (&raw.max_completion_len, count(&raw.max_completion_len), OVERLONG, "max_completion_len"),
        (&raw.soft_punish_cache, count(&raw.soft_punish_cache), OVERLONG, "soft_punish_cache"),
    ]
}

/// Whether a built-in takes the parameter that a key of the file gives.
fn takes(spec: &RewardSpec, rewards: &[&str]) -> bool {
    matches!(spec, RewardSpec::Builtin { name, .. }
        if rewards.contains(&name.strip_suffix("_reward").unwrap_or(name)))
}

/// A reward with the parameters that the file gives as keys of its own, where the reward itself does not.
pub(super) fn with_shared_parameters(raw: &RawConfig, spec: &RewardSpec) -> RewardSpec {
    let mut spec = spec.clone();
    for (field, value, rewards, other_name) in shared_parameters(raw) {
        let is_taken = takes(&spec, rewards);
        if let (Some(value), RewardSpec::Builtin { parameters, .. }, true) = (value, &mut spec, is_taken)
            && !parameters.contains_key(other_name)
        {
            parameters.entry(field.name()).or_insert(value);
        }
    }
    spec
}

/// A key for a reward that is not there has no effect.
fn check_shared_parameters(raw: &RawConfig, problems: &mut Problems) {
    for (field, value, rewards, _) in shared_parameters(raw) {
        let is_idle = value.is_some() && !raw.reward_funcs.value().0.iter().any(|reward| takes(&reward.spec, rewards));
        let reason = format!("`reward_funcs` has no `{}`", rewards[0]);
        warn_idle(problems, field, is_idle, &reason, "add the reward, or remove the key");
    }
}
