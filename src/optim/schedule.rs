//! Learning-rate schedules, by transformers' names and arguments.
//!
//! A schedule is a pure function of the optimizer step, so nothing of it needs to be saved: a resumed run asks for the
//! rate of the step it is at. Arguments are checked once, when the schedule is made.

use std::f64::consts::PI;

use serde_json::{Map, Value};

use super::Error;
use crate::config::settings::LrSchedulerType;

/// The course of the learning rate over a run.
#[derive(Clone, Debug, PartialEq)]
pub struct LrSchedule {
    base_lr: f64,
    warmup_steps: f64,
    total_steps: f64,
    curve: Curve,
}

/// What follows (or replaces) the warm-up, with its arguments.
#[derive(Clone, Debug, PartialEq)]
enum Curve {
    Constant,
    ConstantWithWarmup,
    Linear,
    Cosine { cycles: f64, floor: f64 },
    CosineWithRestarts { cycles: f64 },
    CosineWarmupWithMinLr { cycles: f64, floor: f64, warmup_from: Option<f64> },
    Polynomial { lr_end: f64, power: f64 },
    InverseSqrt { timescale: f64 },
    WarmupStableDecay { stable: f64, decay: f64, warmup_shape: Shape, decay_shape: Shape, floor: f64, cycles: f64 },
}

/// Shape of a rise or fall between 0 and 1.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Shape {
    Linear,
    Cosine,
    OneMinusSqrt,
}

impl LrSchedule {
    /// A schedule over `total_steps` optimizer steps, the first `warmup_steps` of which raise the rate to `base_lr`.
    /// `arguments` is transformers' `lr_scheduler_kwargs`.
    ///
    /// # Errors
    /// If an argument is unknown to the schedule, missing, or outside its range. transformers drops what `constant` and
    /// `constant_with_warmup` are given; here that is an error as well.
    pub fn new(
        kind: LrSchedulerType,
        base_lr: f64,
        warmup_steps: usize,
        total_steps: usize,
        arguments: &Map<String, Value>,
    ) -> Result<Self, Error> {
        let (warmup, total) = (warmup_steps as f64, total_steps as f64);
        let arguments = Arguments { schedule: kind, base_lr, given: arguments };
        let curve = match kind {
            LrSchedulerType::Constant => {
                arguments.accept(&[])?;
                Curve::Constant
            }
            LrSchedulerType::ConstantWithWarmup => {
                arguments.accept(&[])?;
                Curve::ConstantWithWarmup
            }
            LrSchedulerType::Linear => {
                arguments.accept(&[])?;
                Curve::Linear
            }
            LrSchedulerType::Cosine => {
                arguments.accept(&["num_cycles"])?;
                Curve::Cosine { cycles: arguments.number("num_cycles", 0.5)?, floor: 0.0 }
            }
            LrSchedulerType::CosineWithRestarts => {
                arguments.accept(&["num_cycles"])?;
                Curve::CosineWithRestarts { cycles: arguments.number("num_cycles", 1.0)? }
            }
            LrSchedulerType::CosineWithMinLr => {
                arguments.accept(&["num_cycles", "min_lr", "min_lr_rate"])?;
                Curve::Cosine { cycles: arguments.number("num_cycles", 0.5)?, floor: arguments.floor()? }
            }
            LrSchedulerType::CosineWarmupWithMinLr => {
                arguments.accept(&["num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"])?;
                Curve::CosineWarmupWithMinLr {
                    cycles: arguments.number("num_cycles", 0.5)?,
                    floor: arguments.floor()?,
                    warmup_from: arguments.optional("warmup_lr_rate")?,
                }
            }
            LrSchedulerType::Polynomial => {
                arguments.accept(&["lr_end", "power"])?;
                let (lr_end, power) = (arguments.number("lr_end", 1e-7)?, arguments.number("power", 1.0)?);
                if lr_end >= base_lr {
                    return Err(arguments.wrong("lr_end", &lr_end, format!("less than the learning rate {base_lr}")));
                }
                Curve::Polynomial { lr_end, power }
            }
            LrSchedulerType::InverseSqrt => {
                arguments.accept(&["timescale"])?;
                let default = if warmup_steps == 0 { 10_000.0 } else { warmup };
                let timescale = arguments.number("timescale", default)?;
                if timescale <= 0.0 {
                    return Err(arguments.wrong("timescale", &timescale, "a positive number of steps".into()));
                }
                Curve::InverseSqrt { timescale }
            }
            LrSchedulerType::WarmupStableDecay => arguments.warmup_stable_decay(warmup, total)?,
        };
        Ok(Self { base_lr, warmup_steps: warmup, total_steps: total, curve })
    }

    /// The learning rate of the optimizer step with this index, counted from 0; defined past the end as well.
    pub fn lr(&self, step: u64) -> f64 {
        self.base_lr * self.factor(step as f64)
    }

    fn factor(&self, step: f64) -> f64 {
        let (warmup, total) = (self.warmup_steps, self.total_steps);
        let is_warming = step < warmup;
        let rise = step / warmup.max(1.0);
        let span = (total - warmup).max(1.0);
        let progress = (step - warmup) / span;
        match self.curve {
            Curve::Constant => 1.0,
            Curve::CosineWarmupWithMinLr { cycles, floor, warmup_from } => {
                if is_warming {
                    match warmup_from {
                        None => (step + 1.0) / warmup.max(1.0),
                        Some(from) => from + (1.0 - from) * step / (warmup - 1.0).max(1.0),
                    }
                } else {
                    lifted(cosine(cycles, (step - warmup + 1.0) / span), floor)
                }
            }
            Curve::WarmupStableDecay { stable, decay, warmup_shape, decay_shape, floor, cycles } => {
                if is_warming {
                    lifted(warmup_shape.rise(rise), floor)
                } else if step < warmup + stable {
                    1.0
                } else if step < warmup + stable + decay {
                    lifted(decay_shape.fall((step - warmup - stable) / decay.max(1.0), cycles), floor)
                } else {
                    floor
                }
            }
            _ if is_warming => rise,
            Curve::ConstantWithWarmup => 1.0,
            Curve::Linear => ((total - step) / span).max(0.0),
            Curve::Cosine { cycles, floor } => lifted(cosine(cycles, progress), floor),
            Curve::CosineWithRestarts { .. } if progress >= 1.0 => 0.0,
            Curve::CosineWithRestarts { cycles } => (0.5 * (1.0 + (PI * ((cycles * progress) % 1.0)).cos())).max(0.0),
            Curve::Polynomial { lr_end, .. } if step > total => lr_end / self.base_lr,
            Curve::Polynomial { lr_end, power } => {
                let remaining = 1.0 - (step - warmup) / span;
                ((self.base_lr - lr_end) * remaining.powf(power) + lr_end) / self.base_lr
            }
            Curve::InverseSqrt { timescale } => 1.0 / ((step + timescale - warmup) / timescale).sqrt(),
        }
    }
}

/// `cycles` waves of a cosine from 1; half a wave ends at 0.
fn cosine(cycles: f64, progress: f64) -> f64 {
    0.5 * (1.0 + (PI * cycles * 2.0 * progress).cos())
}

/// A factor in [0, 1] moved into [floor, 1].
fn lifted(factor: f64, floor: f64) -> f64 {
    (factor * (1.0 - floor) + floor).max(0.0)
}

impl Shape {
    fn rise(self, progress: f64) -> f64 {
        match self {
            Self::Linear => progress,
            Self::Cosine => 0.5 * (1.0 - (PI * progress).cos()),
            Self::OneMinusSqrt => 1.0 - (1.0 - progress).sqrt(),
        }
    }

    fn fall(self, progress: f64, cycles: f64) -> f64 {
        match self {
            Self::Linear => 1.0 - progress,
            Self::Cosine => cosine(cycles, progress),
            Self::OneMinusSqrt => 1.0 - progress.sqrt(),
        }
    }
}

/// The arguments as given, and whose they are.
struct Arguments<'a> {
    schedule: LrSchedulerType,
    base_lr: f64,
    given: &'a Map<String, Value>,
}

impl Arguments<'_> {
    fn accept(&self, keys: &[&str]) -> Result<(), Error> {
        match self.given.keys().find(|key| !keys.contains(&key.as_str())) {
            None => Ok(()),
            Some(key) => {
                let accepted = if keys.is_empty() { "none".into() } else { format!("`{}`", keys.join("`, `")) };
                Err(Error::UnknownArgument { schedule: self.schedule, key: key.clone(), accepted })
            }
        }
    }

    fn wrong(&self, key: &'static str, value: &impl ToString, expected: String) -> Error {
        Error::Argument { schedule: self.schedule, key, value: value.to_string(), expected }
    }

    /// A finite number; `None` where it is absent or null.
    fn optional(&self, key: &'static str) -> Result<Option<f64>, Error> {
        match self.given.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) if number.is_finite() => Ok(Some(number)),
                _ => Err(self.wrong(key, value, "a number".into())),
            },
        }
    }

    fn number(&self, key: &'static str, default: f64) -> Result<f64, Error> {
        Ok(self.optional(key)?.unwrap_or(default))
    }

    fn steps(&self, key: &'static str) -> Result<Option<f64>, Error> {
        match self.optional(key)? {
            Some(number) if number < 0.0 || number.fract() != 0.0 => {
                Err(self.wrong(key, &number, "a whole number of steps, 0 or more".into()))
            }
            steps => Ok(steps),
        }
    }

    fn shape(&self, key: &'static str, default: Shape) -> Result<Shape, Error> {
        match self.given.get(key) {
            None => Ok(default),
            Some(value) => match value.as_str() {
                Some("linear") => Ok(Shape::Linear),
                Some("cosine") => Ok(Shape::Cosine),
                Some("1-sqrt") => Ok(Shape::OneMinusSqrt),
                _ => Err(self.wrong(key, value, "`linear`, `cosine` or `1-sqrt`".into())),
            },
        }
    }

    /// The lowest rate as a share of the base rate.
    fn floor(&self) -> Result<f64, Error> {
        match (self.optional("min_lr")?, self.optional("min_lr_rate")?) {
            (Some(_), Some(_)) => Err(Error::Arguments {
                schedule: self.schedule,
                problem: "takes one of `min_lr` and `min_lr_rate`, not both",
            }),
            (Some(min_lr), None) => Ok(min_lr / self.base_lr),
            (None, Some(rate)) => Ok(rate),
            (None, None) => {
                Err(Error::Arguments { schedule: self.schedule, problem: "needs `min_lr` or `min_lr_rate`" })
            }
        }
    }

    fn warmup_stable_decay(&self, warmup: f64, total: f64) -> Result<Curve, Error> {
        self.accept(&[
            "num_decay_steps",
            "num_stable_steps",
            "warmup_type",
            "decay_type",
            "min_lr_ratio",
            "num_cycles",
        ])?;
        let Some(decay) = self.steps("num_decay_steps")? else {
            return Err(Error::Arguments { schedule: self.schedule, problem: "needs `num_decay_steps`" });
        };
        Ok(Curve::WarmupStableDecay {
            // May be negative where warm-up and decay together are longer than the run: the decay then starts late.
            stable: self.steps("num_stable_steps")?.unwrap_or(total - warmup - decay),
            decay,
            warmup_shape: self.shape("warmup_type", Shape::Linear)?,
            decay_shape: self.shape("decay_type", Shape::Cosine)?,
            floor: self.number("min_lr_ratio", 0.0)?,
            cycles: self.number("num_cycles", 0.5)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn schedule(kind: LrSchedulerType, warmup: usize, arguments: &Value) -> Result<LrSchedule, Error> {
        LrSchedule::new(kind, 1.0, warmup, 10, arguments.as_object().unwrap())
    }

    fn rates(kind: LrSchedulerType, warmup: usize, arguments: &Value) -> Vec<f64> {
        let schedule = schedule(kind, warmup, arguments).unwrap();
        (0..=12).map(|step| schedule.lr(step)).collect()
    }

    fn close(left: &[f64], right: &[f64]) -> bool {
        left.len() == right.len() && left.iter().zip(right).all(|(l, r)| (l - r).abs() < 1e-12)
    }

    #[test]
    fn the_min_lr_schedule_with_its_own_warm_up_starts_above_zero_and_ends_at_its_floor() {
        // No golden case has this schedule: values by hand from get_cosine_with_min_lr_schedule_with_warmup_lr_rate.
        let kind = LrSchedulerType::CosineWarmupWithMinLr;
        let plain = rates(kind, 2, &json!({"min_lr_rate": 0.1}));
        assert!(close(&plain[..2], &[0.5, 1.0]), "{plain:?}");
        assert!((plain[9] - 0.1).abs() < 1e-12, "{plain:?}");
        let half_way = 0.1 + 0.9 * 0.5;
        assert!((plain[5] - half_way).abs() < 1e-12, "{plain:?}");
        let from = rates(kind, 3, &json!({"min_lr": 0.1, "warmup_lr_rate": 0.2}));
        assert!(close(&from[..3], &[0.2, 0.6, 1.0]), "{from:?}");
    }

    #[test]
    fn warm_up_stable_decay_takes_every_shape() {
        let kind = LrSchedulerType::WarmupStableDecay;
        let cosine = rates(kind, 4, &json!({"num_decay_steps": 2, "warmup_type": "cosine"}));
        assert!(close(&[cosine[0], cosine[2], cosine[4], cosine[7], cosine[9]], &[0.0, 0.5, 1.0, 1.0, 0.5]));
        let root = rates(
            kind,
            4,
            &json!({"num_decay_steps": 4, "num_stable_steps": 1, "warmup_type": "1-sqrt",
            "decay_type": "1-sqrt", "min_lr_ratio": 0.5}),
        );
        assert!(close(&[root[0], root[3], root[4], root[6], root[9]], &[0.5, 0.75, 1.0, 0.75, 0.5]), "{root:?}");
    }

    #[test]
    fn arguments_that_a_schedule_does_not_take_are_errors_that_name_those_it_does() {
        let error = schedule(LrSchedulerType::Linear, 0, &json!({"num_cycles": 2})).unwrap_err();
        assert!(error.to_string().contains("`num_cycles`") && error.to_string().contains("it takes none"), "{error}");
        let error = schedule(LrSchedulerType::Polynomial, 0, &json!({"powr": 2})).unwrap_err();
        assert!(error.to_string().contains("`lr_end`, `power`"), "{error}");
        for kind in [LrSchedulerType::Constant, LrSchedulerType::ConstantWithWarmup] {
            assert!(schedule(kind, 0, &json!({"x": 1})).is_err());
        }
    }

    #[test]
    fn contradictions_and_values_outside_their_range_are_refused() {
        for (kind, arguments) in [
            (LrSchedulerType::CosineWithMinLr, json!({})),
            (LrSchedulerType::CosineWithMinLr, json!({"min_lr": 0.1, "min_lr_rate": 0.1})),
            (LrSchedulerType::Polynomial, json!({"lr_end": 1.0})),
            (LrSchedulerType::Cosine, json!({"num_cycles": "two"})),
            (LrSchedulerType::InverseSqrt, json!({"timescale": 0})),
            (LrSchedulerType::WarmupStableDecay, json!({})),
            (LrSchedulerType::WarmupStableDecay, json!({"num_decay_steps": 2.5})),
            (LrSchedulerType::WarmupStableDecay, json!({"num_decay_steps": 2, "decay_type": "steep"})),
        ] {
            assert!(schedule(kind, 0, &arguments).is_err(), "{kind} {arguments}");
        }
    }

    #[test]
    fn a_warm_up_as_long_as_the_run_divides_by_nothing() {
        for kind in [LrSchedulerType::Linear, LrSchedulerType::Cosine, LrSchedulerType::Polynomial] {
            assert!(rates(kind, 10, &json!({})).iter().all(|rate| rate.is_finite()), "{kind}");
        }
    }
}
