//! When a run logs, evaluates and saves.
//!
//! The rules are transformers' (`DefaultFlowCallback` of 5.24): a strategy by steps evaluates and saves after the last step
//! too, one by epochs also where the run ends inside an epoch. Two things are added: the last step is always logged, and the
//! loops save the end of a run whatever the strategy.

use crate::config::settings::{Interval, TrainingSettings};
use crate::data::Epoch;

/// The occasions of a run.
#[derive(Clone, Copy, Debug)]
pub struct Cadence {
    /// When a row of metrics is written.
    pub logging: Interval,
    /// Whether one is written after the first step in any case.
    pub logging_first_step: bool,
    /// When the evaluation data are gone through.
    pub evaluation: Interval,
    /// Optimizer steps, or with evaluation by epochs passes over the data, before the first evaluation.
    pub eval_delay: f64,
    /// When a checkpoint is written.
    pub saving: Interval,
    /// The length of a pass over the data.
    pub epoch: Epoch,
    /// Optimizer steps of the run.
    pub total: u64,
}

/// What is to be done after a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Due {
    /// Write a row of metrics.
    pub log: bool,
    /// Evaluate.
    pub evaluate: bool,
    /// Write a checkpoint.
    pub save: bool,
}

impl Cadence {
    /// The occasions that `settings` ask for, in a run of `total` steps.
    pub fn new(settings: &TrainingSettings, epoch: Epoch, total: u64) -> Self {
        Self {
            logging: settings.logging_strategy.in_steps(total),
            logging_first_step: settings.logging_first_step,
            evaluation: settings.eval_strategy.in_steps(total),
            eval_delay: settings.eval_delay,
            saving: settings.save_strategy.in_steps(total),
            epoch,
            total,
        }
    }

    /// What is due after so many optimizer steps.
    pub fn after(&self, steps: u64) -> Due {
        let is_last = steps == self.total;
        let is_due = |interval: Interval| match interval {
            Interval::No | Interval::Best | Interval::Share(_) => false,
            Interval::Steps(every) => steps.is_multiple_of(every as u64) || is_last,
            Interval::Epoch => self.epoch.ends_after(steps) || is_last,
        };
        let passed = if self.evaluation == Interval::Epoch { self.epoch.after(steps) } else { steps as f64 };
        Due {
            log: is_due(self.logging) || is_last || (steps == 1 && self.logging_first_step),
            evaluate: is_due(self.evaluation) && self.eval_delay <= passed,
            save: is_due(self.saving),
        }
    }
}
