//! The best checkpoint so far, and whether the run has stopped getting better.
//!
//! Follows transformers 5.24: `Trainer._determine_best_metric` and `_save_checkpoint`, and `EarlyStoppingCallback`, which
//! looks at a value before it may become the best one. What is known of the best goes into every checkpoint, so that a
//! resumed run decides as one that was never stopped.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::checkpoint;
use crate::config::settings::BestSettings;

/// What a checkpoint keeps of the evaluations so far, under the names that transformers' `trainer_state.json`
/// has for it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Best {
    /// The metric that decided.
    #[serde(rename = "metric_for_best_model")]
    metric_name: String,
    /// The best value; `None` while there is none, not a number included.
    #[serde(rename = "best_metric")]
    metric: Option<f64>,
    /// The step that had it.
    #[serde(rename = "best_global_step")]
    step: Option<u64>,
    /// The newest checkpoint that was the best when it was saved: its name in `output_dir`, or a path elsewhere.
    #[serde(rename = "best_model_checkpoint")]
    checkpoint: Option<PathBuf>,
    /// Whether there was an evaluation.
    is_evaluated: bool,
    /// Evaluations in a row without an improvement.
    #[serde(rename = "early_stopping_patience_counter")]
    num_without_improvement: u64,
}

/// Follows the evaluations of a run.
#[derive(Debug)]
pub(super) struct BestTracker<'a> {
    settings: Option<&'a BestSettings>,
    output_dir: &'a Path,
    best: Best,
    /// The step whose evaluation was the last new best of this process.
    new_at: Option<u64>,
}

impl<'a> BestTracker<'a> {
    /// Goes on from what a checkpoint in the folder `from` kept.
    pub(super) fn new(settings: Option<&'a BestSettings>, output_dir: &'a Path, kept: Option<(&Best, &Path)>) -> Self {
        let mut best = Best::default();
        let is_same = |kept: &Best| settings.is_some_and(|settings| settings.metric == kept.metric_name);
        if let Some((kept, from)) = kept.filter(|(kept, _)| is_same(kept)) {
            best = kept.clone();
            best.checkpoint = kept.checkpoint.as_deref().and_then(|name| find(name, output_dir, from));
        }
        best.metric_name = settings.map(|settings| settings.metric.clone()).unwrap_or_default();
        Self { settings, output_dir, best, new_at: None }
    }

    /// Takes the results of an evaluation after `step`.
    ///
    /// # Errors
    /// If the metric that decides is not among them; the message lists those that are.
    pub(super) fn observe(&mut self, step: u64, values: &[(String, Value)]) -> Result<(), String> {
        let Some(settings) = self.settings else { return Ok(()) };
        let Some((_, value)) = values.iter().find(|(name, _)| *name == settings.metric) else {
            let names: Vec<&str> = values.iter().map(|(name, _)| name.as_str()).collect();
            return Err(format!(
                "`metric_for_best_model` is `{}`, and evaluation has no such metric; it has {}",
                settings.metric,
                names.join(", ")
            ));
        };
        // A value that is not a number is written as null; it is never better.
        let value = value.as_f64().unwrap_or(f64::NAN);
        let worst = if settings.greater_is_better { f64::NEG_INFINITY } else { f64::INFINITY };
        let best = self.best.metric.unwrap_or(worst);
        let is_better = if settings.greater_is_better { value > best } else { value < best };
        if let Some(stopping) = settings.early_stopping {
            let is_improved = is_better && (value - best).abs() > stopping.threshold;
            let count = &mut self.best.num_without_improvement;
            *count = if is_improved || !self.best.is_evaluated { 0 } else { *count + 1 };
        }
        self.best.is_evaluated = true;
        if is_better {
            (self.best.metric, self.best.step) = (Some(value), Some(step));
            self.new_at = Some(step);
        }
        Ok(())
    }

    /// Whether the evaluation after `step` was a new best.
    pub(super) fn is_new(&self, step: u64) -> bool {
        self.new_at == Some(step)
    }

    /// Why the run is to stop, if it is.
    pub(super) fn stops(&self) -> Option<String> {
        let settings = self.settings?;
        let stopping = settings.early_stopping?;
        let count = self.best.num_without_improvement;
        (count >= stopping.patience as u64).then(|| {
            format!(
                "`{}` has not improved on {} in {count} evaluations (`early_stopping_patience: {}`)",
                settings.metric,
                self.best.metric.map_or_else(|| "any number".into(), |best| best.to_string()),
                stopping.patience
            )
        })
    }

    /// Notes that the checkpoint of `step` is about to be written; returns what it is to keep.
    pub(super) fn saving(&mut self, step: u64) -> Best {
        if self.best.step == Some(step) {
            self.best.checkpoint = Some(name_of(step));
        }
        self.best.checkpoint = self.found();
        self.best.clone()
    }

    /// The best checkpoint as it is noted: that of the best step, once it is there.
    fn found(&self) -> Option<PathBuf> {
        let newest = self.best.step.map(name_of).filter(|name| checkpoint::is_written(&self.output_dir.join(name)));
        newest.or_else(|| self.best.checkpoint.clone())
    }

    /// The step of the best checkpoint, if it lies in `output_dir`: no limit on their number deletes it.
    pub(super) fn kept_step(&self) -> Option<u64> {
        self.found()?.to_str()?.strip_prefix("checkpoint-")?.parse().ok()
    }

    /// The best checkpoint, if there is one.
    pub(super) fn checkpoint(&self) -> Option<PathBuf> {
        Some(self.output_dir.join(self.found()?))
    }

    /// Whether its model is what the run is to leave.
    pub(super) fn is_loaded(&self) -> bool {
        self.settings.is_some_and(|settings| settings.load_at_end)
    }

    /// The best checkpoint and its value, for the summary.
    pub(super) fn describe(&self) -> Option<String> {
        let (settings, checkpoint) = (self.settings?, self.checkpoint()?);
        let value = match self.best.metric {
            // A later and better value may have had no checkpoint.
            Some(value) if self.kept_step() == self.best.step => format!(" ({} {value:.4})", settings.metric),
            _ => String::new(),
        };
        Some(format!("{}{value}", checkpoint.display()))
    }
}

fn name_of(step: u64) -> PathBuf {
    format!("checkpoint-{step}").into()
}

/// Where the best checkpoint is now: beside the one that names it, or in `output_dir`.
fn find(name: &Path, output_dir: &Path, from: &Path) -> Option<PathBuf> {
    let beside = from.parent().map(|parent| parent.join(name));
    let here = output_dir.join(name);
    if checkpoint::is_written(&here) {
        return Some(name.to_path_buf());
    }
    let found = beside.filter(|beside| checkpoint::is_written(beside));
    if found.is_none() {
        tracing::warn!("the best checkpoint so far, `{}`, is not there any more", here.display());
    }
    found.map(|beside| beside.canonicalize().unwrap_or(beside))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::settings::EarlyStopping;
    use serde_json::json;

    fn settings(greater_is_better: bool, patience: usize, threshold: f64) -> BestSettings {
        let early_stopping = Some(EarlyStopping { patience, threshold });
        BestSettings { metric: "eval_x".into(), greater_is_better, load_at_end: true, early_stopping }
    }

    fn values(value: f64) -> Vec<(String, Value)> {
        vec![("eval_loss".into(), json!(1.0)), ("eval_x".into(), json!(value))]
    }

    /// The counter and the best value after each evaluation, as transformers 5.24's callback and trainer have them.
    #[test]
    fn counts_and_values_are_those_of_transformers() {
        let nan = f64::NAN;
        let cases: [(bool, f64, &[f64], &[u64], Option<f64>); 6] = [
            (false, 0.0, &[3.0, 2.0, 2.0, 2.5, 1.0], &[0, 0, 1, 2, 0], Some(1.0)),
            (true, 0.0, &[3.0, 2.0, 4.0, 4.0], &[0, 1, 0, 1], Some(4.0)),
            // An improvement of no more than the threshold becomes the best and is none for the patience.
            (false, 0.5, &[3.0, 2.75, 2.5, 1.5], &[0, 1, 2, 0], Some(1.5)),
            (false, 0.0, &[nan, nan, 2.0, nan], &[0, 1, 0, 1], Some(2.0)),
            (true, 0.0, &[f64::NEG_INFINITY, 1.0], &[0, 0], Some(1.0)),
            (false, 0.0, &[nan], &[0], None),
        ];
        for (greater, threshold, evaluations, counts, best) in cases {
            let settings = settings(greater, 10, threshold);
            let mut tracker = BestTracker::new(Some(&settings), Path::new("out"), None);
            let mut found = Vec::new();
            for (step, &value) in (1..).zip(evaluations) {
                tracker.observe(step, &values(value)).unwrap();
                found.push(tracker.best.num_without_improvement);
                // What a checkpoint keeps goes through JSON.
                tracker.best = serde_json::from_value(serde_json::to_value(&tracker.best).unwrap()).unwrap();
            }
            assert_eq!((found.as_slice(), tracker.best.metric), (counts, best), "{evaluations:?}");
        }
    }

    #[test]
    fn a_run_stops_when_its_patience_is_used_up() {
        let settings = settings(false, 2, 0.0);
        let mut tracker = BestTracker::new(Some(&settings), Path::new("out"), None);
        let mut stopped = Vec::new();
        for (step, value) in (1..).zip([1.0, 2.0, 3.0]) {
            tracker.observe(step, &values(value)).unwrap();
            stopped.push(tracker.stops().is_some());
        }
        assert_eq!(stopped, [false, false, true]);
        assert!(tracker.stops().unwrap().contains("`eval_x` has not improved on 1 in 2 evaluations"));
    }

    #[test]
    fn a_metric_that_is_not_there_is_an_error_that_lists_the_others() {
        let settings = BestSettings { metric: "eval_accuracy".into(), ..settings(true, 1, 0.0) };
        let mut tracker = BestTracker::new(Some(&settings), Path::new("out"), None);
        let message = tracker.observe(1, &values(1.0)).unwrap_err();
        assert!(message.contains("`eval_accuracy`") && message.contains("it has eval_loss, eval_x"), "{message}");
        assert!(BestTracker::new(None, Path::new("out"), None).observe(1, &[]).is_ok());
    }

    #[test]
    fn the_best_checkpoint_is_the_last_one_that_was_saved_at_its_best_step() {
        let folder = tempfile::tempdir().unwrap();
        let save = |step: u64| {
            let place = folder.path().join(format!("checkpoint-{step}"));
            std::fs::create_dir(&place).unwrap();
            std::fs::write(place.join("manifest.json"), "{}").unwrap();
        };
        let settings = settings(false, 9, 0.0);
        let mut tracker = BestTracker::new(Some(&settings), folder.path(), None);
        tracker.observe(2, &values(3.0)).unwrap();
        assert_eq!(tracker.saving(2).checkpoint, Some("checkpoint-2".into()));
        save(2);
        // Better, but without a checkpoint of its own; then worse with one.
        tracker.observe(3, &values(2.0)).unwrap();
        tracker.observe(4, &values(2.5)).unwrap();
        let kept = tracker.saving(4);
        assert_eq!((kept.step, tracker.kept_step()), (Some(3), Some(2)));
        assert!(!tracker.describe().unwrap().contains("eval_x"));
        // A run that was stopped before its evaluation had the step saved, and evaluates it when it goes on.
        save(3);
        assert_eq!((tracker.kept_step(), tracker.checkpoint()), (Some(3), Some(folder.path().join("checkpoint-3"))));
        std::fs::remove_dir_all(folder.path().join("checkpoint-3")).unwrap();
        save(4);

        let resumed = |output_dir: &Path| {
            let from = folder.path().join("checkpoint-4");
            BestTracker::new(Some(&settings), output_dir, Some((&kept, &from))).best.checkpoint
        };
        assert_eq!(resumed(folder.path()), Some("checkpoint-2".into()));
        let elsewhere = tempfile::tempdir().unwrap();
        let place = folder.path().join("checkpoint-2").canonicalize().unwrap();
        assert_eq!(resumed(elsewhere.path()), Some(place.clone()));
        std::fs::remove_dir_all(place).unwrap();
        assert_eq!(resumed(folder.path()), None);
    }
}
