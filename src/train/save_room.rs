//! Whether what a run will save has room where it goes: said when the run begins, not hours later at a checkpoint that does not fit.

use std::path::Path;

use candle_core::DType;

use super::cadence::Cadence;
use super::session::Session;
use super::shards;
use crate::checkpoint;
use crate::config::settings::{Interval, TrainingSettings};
use crate::fs;
use crate::telemetry::units;
use crate::zero::ShardedOptimizer;

/// Bytes that a run will write, without what is small beside them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SaveRoom {
    /// The model, in each checkpoint and once more at the end.
    model: u64,
    /// Trained values and the optimizer's state of a checkpoint.
    state: u64,
    /// Checkpoints that are there at a time beside those that were there before, at most.
    checkpoints: u64,
    /// What is free where they go, if the system says so.
    free: Option<u64>,
}

impl SaveRoom {
    /// Of a run that goes on after `step`.
    pub(super) fn of(
        session: &Session,
        optimizer: &ShardedOptimizer,
        settings: &TrainingSettings,
        cadence: &Cadence,
        step: u64,
    ) -> Self {
        let (engine, folder) = (&session.engine, settings.output_dir.as_path());
        let model = if session.adapter_spec.is_some() {
            DType::F32.size_in_bytes() * engine.store().num_trainable()
        } else {
            let tensors = engine.config().tensors();
            let values: usize = tensors.iter().map(|tensor| tensor.shape.iter().product::<usize>()).sum();
            values * engine.config().torch_dtype.unwrap_or(DType::F32).size_in_bytes()
        };
        let state = if settings.save_only_model { 0 } else { shards::all_bytes(engine.store(), optimizer) };
        let kept = settings.save_total_limit.map(|limit| limit + usize::from(settings.best.is_some()));
        let checkpoints = at_a_time(cadence, step, kept, checkpoint::num_written(folder)) as u64;
        Self { model: model as u64, state, checkpoints, free: fs::free_bytes(folder) }
    }

    fn needed(&self) -> u64 {
        self.checkpoints.saturating_mul(self.model + self.state).saturating_add(self.model)
    }

    /// For the plan.
    pub(super) fn describe(&self) -> String {
        let each = units::bytes(self.model + self.state);
        let model = units::bytes(self.model);
        let free = self.free.map_or_else(String::new, |free| format!("; {} are free there", units::bytes(free)));
        format!("{} at a time, {each} each, and the model, {model}{free}", self.checkpoints)
    }

    /// What is said where there is too little room.
    pub(super) fn warning(&self, folder: &Path) -> Option<String> {
        let free = self.free.filter(|&free| free < self.needed())?;
        let few = if self.state > 0 {
            "lower `save_total_limit`, set `save_only_model: true`"
        } else {
            "lower `save_total_limit`"
        };
        Some(format!(
            "what this run saves takes up to {} ({} checkpoints of {} at a time and the model), and where `output_dir: {}` is there are \
             {} free: free some, {few} or choose another `output_dir`",
            units::bytes(self.needed()),
            self.checkpoints,
            units::bytes(self.model + self.state),
            folder.display(),
            units::bytes(free)
        ))
    }
}

/// Checkpoints that a run writes after `step` and that are there at a time beside `existing` ones: a new one is whole before an old one
/// goes.
fn at_a_time(cadence: &Cadence, step: u64, kept: Option<usize>, existing: usize) -> usize {
    // With a strategy by the best value any evaluation may bring one.
    let is_saved = |step: u64| {
        let due = cadence.after(step);
        due.save || step == cadence.total || cadence.saving == Interval::Best && due.evaluate
    };
    let written = (step + 1..=cadence.total).filter(|&step| is_saved(step)).count();
    kept.map_or(written, |kept| written.min((kept + 1).saturating_sub(existing.min(kept))))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{SaveRoom, at_a_time};
    use crate::config::settings::Interval;
    use crate::data::RowBatches;
    use crate::train::cadence::Cadence;

    fn cadence(saving: Interval, evaluation: Interval, total: u64) -> Cadence {
        // Seven steps of one row each.
        let epoch = RowBatches::new(7, 1, 1, false, 1).unwrap().epoch();
        Cadence { logging: Interval::No, logging_first_step: false, evaluation, eval_delay: 0.0, saving, epoch, total }
    }

    #[test]
    fn checkpoints_are_counted_as_they_are_written_and_deleted() {
        let every_ten = cadence(Interval::Steps(10), Interval::No, 95);
        assert_eq!(at_a_time(&every_ten, 0, None, 0), 10);
        assert_eq!(at_a_time(&every_ten, 50, None, 5), 5);
        // One more than are kept, until the oldest is gone.
        assert_eq!(at_a_time(&every_ten, 0, Some(2), 0), 3);
        assert_eq!(at_a_time(&every_ten, 50, Some(2), 2), 1);
        assert_eq!(at_a_time(&every_ten, 50, Some(2), 5), 1);
        assert_eq!(at_a_time(&every_ten, 91, Some(9), 0), 1);
        assert_eq!(at_a_time(&every_ten, 95, None, 9), 0);
        // The end is saved whatever the strategy.
        assert_eq!(at_a_time(&cadence(Interval::No, Interval::No, 95), 0, None, 0), 1);
        assert_eq!(at_a_time(&cadence(Interval::Epoch, Interval::No, 20), 0, None, 0), 3);
        assert_eq!(at_a_time(&cadence(Interval::Best, Interval::Steps(30), 95), 0, None, 0), 4);
    }

    #[test]
    fn too_little_room_is_said_with_what_to_do() {
        let room = SaveRoom { model: 1 << 20, state: 3 << 20, checkpoints: 3, free: Some(13 << 20) };
        assert_eq!(room.warning(Path::new("out")), None);
        assert_eq!(room.describe(), "3 at a time, 4.00 MiB each, and the model, 1.00 MiB; 13.0 MiB are free there");
        let text = SaveRoom { free: Some((13 << 20) - 1), ..room }.warning(Path::new("out")).unwrap();
        assert!(
            text.contains("takes up to 13.0 MiB (3 checkpoints of 4.00 MiB at a time")
                && text.contains("`output_dir: out`")
        );
        assert!(text.contains("save_only_model"), "{text}");
        let text = SaveRoom { state: 0, free: Some(0), ..room }.warning(Path::new("out")).unwrap();
        assert!(!text.contains("save_only_model") && text.contains("save_total_limit"), "{text}");
        assert_eq!(SaveRoom { free: None, ..room }.warning(Path::new("out")), None);
    }
}
