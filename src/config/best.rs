//! The best checkpoint: which metric decides, what is done with it, and what has to go with it.
//!
//! The rules are transformers' (`TrainingArguments.__post_init__`, `Trainer.__init__`, `EarlyStoppingCallback`).

use super::diagnose::Problems;
use super::field::Named;
use super::keys::RawConfig;
use super::resolve::warn_idle;
use super::settings::{BestSettings, EarlyStopping};
use super::special::{Cadence, Recurrence, Saving};

/// What every metric of an evaluation begins with.
const PREFIX: &str = "eval_";

/// Whether something asks for a best checkpoint.
fn is_asked_for(raw: &RawConfig) -> bool {
    *raw.load_best_model_at_end.value() || raw.metric_for_best_model.value().is_some()
}

/// Reports settings that do not go together.
pub(super) fn check(raw: &RawConfig, problems: &mut Problems) {
    let (evaluates, saves) = (*raw.eval_strategy.value(), *raw.save_strategy.value());
    let patience: &dyn Named = &raw.early_stopping_patience;
    let asking: [(&dyn Named, bool, &str); 3] = [
        (&raw.load_best_model_at_end, *raw.load_best_model_at_end.value(), "`load_best_model_at_end: true`"),
        (&raw.save_strategy, saves == Saving::Best, "`save_strategy: best`"),
        (patience, raw.early_stopping_patience.value().is_some(), "`early_stopping_patience`"),
    ];
    for (field, is_set, name) in asking {
        if is_set && evaluates == Recurrence::No {
            problems.clash(
                &[(field, "needs evaluations".into()), (&raw.eval_strategy, "none".into())],
                format!("{name} goes by the results of evaluations, and there are none (`eval_strategy: no`)"),
                "add `eval_strategy: steps` or `eval_strategy: epoch`",
            );
        } else if is_set && !is_asked_for(raw) {
            problems.clash(
                &[(field, "by which metric?".into())],
                format!("{name} needs `metric_for_best_model`"),
                "add e.g. `metric_for_best_model: loss`, or `reward` for GRPO",
            );
        }
    }
    check_cadence(raw, problems);
    let reason = "neither `load_best_model_at_end` nor `metric_for_best_model` is set";
    let is_idle = !is_asked_for(raw) && raw.greater_is_better.value().is_some();
    warn_idle(problems, &raw.greater_is_better, is_idle, reason, "add `metric_for_best_model`");
    let is_idle = raw.metric_for_best_model.value().is_some() && evaluates == Recurrence::No;
    warn_idle(problems, &raw.metric_for_best_model, is_idle, "`eval_strategy` is `no`", "add `eval_strategy: steps`");
    let is_idle = raw.early_stopping_patience.value().is_none() && raw.early_stopping_threshold.is_changed();
    let reason = "`early_stopping_patience` is not set";
    warn_idle(problems, &raw.early_stopping_threshold, is_idle, reason, "add `early_stopping_patience`");
    if raw.early_stopping_patience.value().is_some() && is_asked_for(raw) && !*raw.load_best_model_at_end.value() {
        problems.caution(
            &[(patience, "stops".into())],
            "a run that stops early leaves its last model, not its best",
            "add `load_best_model_at_end: true`",
        );
    }
}

/// The best model can only be loaded if every evaluation that may find it comes with a checkpoint.
fn check_cadence(raw: &RawConfig, problems: &mut Problems) {
    let (evaluates, saves) = (*raw.eval_strategy.value(), *raw.save_strategy.value());
    if !*raw.load_best_model_at_end.value() || saves == Saving::Best || evaluates == Recurrence::No {
        return;
    }
    if saves != Saving::At(evaluates) {
        problems.clash(
            &[
                (&raw.load_best_model_at_end, "the best checkpoint".into()),
                (&raw.eval_strategy, "evaluated".into()),
                (&raw.save_strategy, "saved".into()),
            ],
            "`load_best_model_at_end: true` needs `eval_strategy` and `save_strategy` to be the same",
            "set them alike, or `save_strategy: best`",
        );
        return;
    }
    let saved = *raw.save_steps.value();
    let evaluated = raw.eval_steps.value().0.unwrap_or(*raw.logging_steps.value());
    if evaluates != Recurrence::Steps {
        return;
    }
    let fields: [(&dyn Named, String); 2] = [(&raw.save_steps, "saved".into()), (&raw.eval_steps, "evaluated".into())];
    // As transformers, shares are compared to six digits.
    let digits = |share: f64| (share * 1e6).round() as u64;
    match (saved, evaluated) {
        (Cadence::Steps(saved), Cadence::Steps(evaluated)) if saved.is_multiple_of(evaluated.max(1)) => {}
        (Cadence::Share(saved), Cadence::Share(evaluated))
            if digits(saved).is_multiple_of(digits(evaluated).max(1)) => {}
        (Cadence::Steps(saved), Cadence::Steps(evaluated)) => {
            let below = saved / evaluated * evaluated;
            let works = if below == 0 { evaluated } else { below };
            problems.clash(
                &fields,
                format!(
                    "`load_best_model_at_end: true` needs `save_steps` {saved} to be a multiple of `eval_steps` {evaluated}"
                ),
                format!("`save_steps` {works} works, and `save_strategy: best`"),
            );
        }
        (Cadence::Share(saved), Cadence::Share(evaluated)) => problems.clash(
            &fields,
            format!(
                "`load_best_model_at_end: true` needs `save_steps` {saved} to be a multiple of `eval_steps` {evaluated}"
            ),
            format!("`save_steps: {evaluated}` works, and `save_strategy: best`"),
        ),
        _ => problems.clash(
            &fields,
            "`load_best_model_at_end: true` needs `save_steps` and `eval_steps` both as steps, or both as shares",
            "write them alike, or `save_strategy: best`",
        ),
    }
}

/// What is done about the best checkpoint.
pub(super) fn build(raw: &RawConfig) -> Option<BestSettings> {
    if !is_asked_for(raw) {
        return None;
    }
    let name = raw.metric_for_best_model.value().as_deref().unwrap_or("loss");
    let metric = if name.starts_with(PREFIX) { name.to_string() } else { format!("{PREFIX}{name}") };
    let early_stopping = raw
        .early_stopping_patience
        .value()
        .map(|patience| EarlyStopping { patience, threshold: *raw.early_stopping_threshold.value() });
    Some(BestSettings {
        greater_is_better: raw.greater_is_better.value().unwrap_or(!metric.ends_with("loss")),
        metric,
        load_at_end: *raw.load_best_model_at_end.value(),
        early_stopping,
    })
}
