//! The counters of an optimizer, as a checkpoint keeps them.

use serde::{Deserialize, Serialize};

use super::{Error, LossScaler, ScaleUpdate};

/// How far an optimizer has come. The moments are stored beside it, by whoever owns them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerProgress {
    /// Steps that moved the parameters: `t` of AdamW's bias correction and the position of the schedule.
    pub steps: u64,
    /// Steps that an overflow skipped.
    pub skipped_steps: u64,
    /// The dynamic loss scaler, with fp16.
    pub loss_scaler: Option<LossScaler>,
}

impl OptimizerProgress {
    /// Records the end of one attempt at a step and tells whether the parameters are to be moved; if so, `steps` is
    /// already the number of the step to make (counted from 1).
    ///
    /// # Errors
    /// If the loss scale cannot be lowered any further.
    pub fn advance(&mut self, has_overflow: bool) -> Result<bool, Error> {
        let should_step = match &mut self.loss_scaler {
            Some(scaler) => scaler.update(has_overflow)? != ScaleUpdate::Skip,
            None => !has_overflow,
        };
        if should_step {
            self.steps += 1;
        } else {
            self.skipped_steps += 1;
        }
        Ok(should_step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::LossScalerSettings;

    #[test]
    fn progress_counts_and_survives_a_round_trip() {
        let scaler = LossScaler::dynamic(LossScalerSettings::default()).unwrap();
        let mut progress = OptimizerProgress { loss_scaler: Some(scaler), ..OptimizerProgress::default() };
        assert!(!progress.advance(true).unwrap());
        assert!(progress.advance(false).unwrap());
        assert!(!progress.advance(true).unwrap());
        assert_eq!((progress.steps, progress.skipped_steps), (1, 2));
        assert!((progress.loss_scaler.as_ref().unwrap().scale() - 32_768.0).abs() < 1e-9);
        let text = serde_json::to_string(&progress).unwrap();
        assert_eq!(serde_json::from_str::<OptimizerProgress>(&text).unwrap(), progress);
    }

    #[test]
    fn without_a_scaler_an_overflow_skips_the_step() {
        let mut progress = OptimizerProgress::default();
        assert!(!progress.advance(true).unwrap());
        assert!(progress.advance(false).unwrap());
        assert_eq!((progress.steps, progress.skipped_steps), (1, 1));
    }
}
