//! Arguments of the learning-rate schedules: which each takes, and what they must be.
//!
//! Names and rules are those of transformers 5.24, `optimization.py` (`get_*_schedule*`).

use serde_json::Value;

use super::diagnose::Problems;
use super::keys::RawConfig;
use super::settings::{LrSchedulerType, Warmup};
use super::value::{listed, nearest};

/// What an argument takes.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// A number, zero or more.
    Number,
    /// A whole number, zero or more.
    Count,
    /// One of these words.
    Word(&'static [&'static str]),
}

const CURVES: Kind = Kind::Word(&["linear", "cosine", "1-sqrt"]);

/// The arguments of a schedule.
fn arguments(schedule: LrSchedulerType) -> &'static [(&'static str, Kind)] {
    match schedule {
        LrSchedulerType::Linear | LrSchedulerType::Constant | LrSchedulerType::ConstantWithWarmup => &[],
        LrSchedulerType::Cosine => &[("num_cycles", Kind::Number)],
        LrSchedulerType::CosineWithRestarts => &[("num_cycles", Kind::Count)],
        LrSchedulerType::Polynomial => &[("lr_end", Kind::Number), ("power", Kind::Number)],
        LrSchedulerType::InverseSqrt => &[("timescale", Kind::Count)],
        LrSchedulerType::CosineWithMinLr => {
            &[("num_cycles", Kind::Number), ("min_lr", Kind::Number), ("min_lr_rate", Kind::Number)]
        }
        LrSchedulerType::CosineWarmupWithMinLr => &[
            ("num_cycles", Kind::Number),
            ("min_lr", Kind::Number),
            ("min_lr_rate", Kind::Number),
            ("warmup_lr_rate", Kind::Number),
        ],
        LrSchedulerType::WarmupStableDecay => &[
            ("num_decay_steps", Kind::Count),
            ("num_stable_steps", Kind::Count),
            ("warmup_type", CURVES),
            ("decay_type", CURVES),
            ("min_lr_ratio", Kind::Number),
            ("num_cycles", Kind::Number),
        ],
    }
}

/// Checks `lr_scheduler_kwargs` against `lr_scheduler_type`, and the warm-up keys against each other.
pub(super) fn check(raw: &RawConfig, problems: &mut Problems) {
    let schedule = *raw.lr_scheduler_type.value();
    let kwargs = raw.lr_scheduler_kwargs.value();
    let known = arguments(schedule);
    let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
    let mut wrong = |message: String, help: String| {
        problems.clash(
            &[(&raw.lr_scheduler_kwargs, String::new()), (&raw.lr_scheduler_type, String::new())],
            message,
            help,
        );
    };
    for (name, value) in kwargs {
        let Some((_, kind)) = known.iter().find(|(known, _)| known == name) else {
            let help = match nearest(name, names.iter().copied()) {
                _ if names.is_empty() => format!("`{schedule}` takes none; remove it"),
                Some(near) => format!("did you mean `{near}`? `{schedule}` takes {}", listed(&names)),
                None => format!("`{schedule}` takes {}", listed(&names)),
            };
            wrong(
                format!("`lr_scheduler_kwargs` holds `{name}`, which `lr_scheduler_type: {schedule}` does not take"),
                help,
            );
            continue;
        };
        let (is_right, expected) = match kind {
            Kind::Number => (value.as_f64().is_some_and(|number| number >= 0.0), "a number of at least 0".to_owned()),
            Kind::Count => (value.is_null() || value.as_u64().is_some(), "a whole number of at least 0".to_owned()),
            Kind::Word(words) => (value.as_str().is_some_and(|word| words.contains(&word)), listed(words)),
        };
        if !is_right {
            wrong(format!("`lr_scheduler_kwargs` has `{name}: {value}`"), format!("it takes {expected}"));
        }
    }
    let has = |name: &str| kwargs.get(name).is_some_and(|value| !value.is_null());
    match schedule {
        LrSchedulerType::CosineWithMinLr | LrSchedulerType::CosineWarmupWithMinLr
            if has("min_lr") == has("min_lr_rate") =>
        {
            let count = if has("min_lr") { "both" } else { "neither" };
            wrong(
                format!("`lr_scheduler_type: {schedule}` needs either `min_lr` or `min_lr_rate`, and has {count}"),
                "write e.g. `lr_scheduler_kwargs: {min_lr_rate: 0.1}`".into(),
            );
        }
        LrSchedulerType::WarmupStableDecay if !has("num_decay_steps") => wrong(
            format!("`lr_scheduler_type: {schedule}` needs `num_decay_steps`"),
            "write e.g. `lr_scheduler_kwargs: {num_decay_steps: 100}`".into(),
        ),
        LrSchedulerType::Polynomial => {
            let (start, end) =
                (*raw.learning_rate.value(), kwargs.get("lr_end").and_then(Value::as_f64).unwrap_or(1e-7));
            if start <= end {
                problems.clash(
                    &[(&raw.learning_rate, "the start".into()), (&raw.lr_scheduler_kwargs, "the end".into())],
                    format!(
                        "`learning_rate` {start} must be greater than the `lr_end` {end} of the polynomial schedule"
                    ),
                    "lower `lr_end` in `lr_scheduler_kwargs`",
                );
            }
        }
        _ => {}
    }
    check_warmup(raw, schedule, problems);
}

fn check_warmup(raw: &RawConfig, schedule: LrSchedulerType, problems: &mut Problems) {
    let (steps, ratio) = (*raw.warmup_steps.value(), raw.warmup_ratio.value().unwrap_or(0.0));
    if steps > 0.0 && ratio > 0.0 {
        problems.clash(
            &[(&raw.warmup_ratio, "a share of all steps".into()), (&raw.warmup_steps, "a number of steps".into())],
            format!("`warmup_ratio` {ratio} and `warmup_steps` {steps} both say how long the warm-up is"),
            "keep one of the two",
        );
    }
    if steps >= 1.0 && steps.fract() != 0.0 {
        problems.clash(
            &[(&raw.warmup_steps, String::new())],
            format!("`warmup_steps` is a whole number of steps or a share below 1, got {steps}"),
            "write a whole number, or a share such as 0.1",
        );
    }
    if schedule == LrSchedulerType::Constant && (steps > 0.0 || ratio > 0.0) {
        problems.caution(
            &[(&raw.lr_scheduler_type, String::new())],
            "`lr_scheduler_type: constant` has no warm-up, so `warmup_steps` and `warmup_ratio` have no effect",
            "use `constant_with_warmup`",
        );
    }
}

/// The warm-up that checked keys describe.
pub(super) fn warmup(raw: &RawConfig) -> Warmup {
    let (steps, ratio) = (*raw.warmup_steps.value(), raw.warmup_ratio.value().unwrap_or(0.0));
    if ratio > 0.0 {
        Warmup::Ratio(ratio)
    } else if steps > 0.0 && steps < 1.0 {
        Warmup::Ratio(steps)
    } else {
        Warmup::Steps(steps as usize)
    }
}
