//! Dynamic loss scaling for fp16, by DeepSpeed's rules.
//!
//! The loss is multiplied by [`LossScaler::scale`] before backward, the gradients divided by it before the optimizer
//! step. When a scaled gradient overflows, the step is skipped and the scale halved (after `hysteresis` overflows);
//! after `loss_scale_window` clean steps it is doubled.
//!
//! Every rank must call [`LossScaler::update`] with the same flag, so that the scale stays the same everywhere.

use serde::{Deserialize, Serialize};

use super::Error;

/// Settings of the dynamic scaler, with DeepSpeed's names and defaults (`runtime/fp16/loss_scaler.py`).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossScalerSettings {
    /// First scale (`2^initial_scale_power`).
    pub initial_scale: f64,
    /// Steps without an overflow before the scale is doubled.
    pub loss_scale_window: u64,
    /// Smallest scale.
    pub min_loss_scale: f64,
    /// Overflows that are tolerated before the scale is halved; 1 halves at once.
    pub hysteresis: u64,
    /// Refill the tolerance at every clean step instead of only when the scale grows.
    pub consecutive_hysteresis: bool,
    /// Treat an overflow at the smallest scale as an error.
    pub raise_error_at_min_scale: bool,
}

impl Default for LossScalerSettings {
    fn default() -> Self {
        Self {
            initial_scale: 65_536.0,
            loss_scale_window: 1000,
            min_loss_scale: 1.0,
            hysteresis: 2,
            consecutive_hysteresis: false,
            raise_error_at_min_scale: true,
        }
    }
}

/// What is to be done with the step whose gradients were just checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleUpdate {
    /// Make it; the scale stays.
    Step,
    /// Make it; the scale was doubled for the next one.
    StepAndGrow,
    /// Skip it: the gradients overflowed.
    Skip,
}

/// The scaler and where it stands; serialise it into checkpoints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossScaler {
    settings: LossScalerSettings,
    /// False for a fixed scale (`loss_scale` above 0 in DeepSpeed's config).
    is_dynamic: bool,
    scale: f64,
    tolerance: u64,
    iteration: u64,
    /// Iteration after the last overflow; 0 when there was none.
    clean_since: u64,
}

impl LossScaler {
    /// A scaler that finds its scale.
    ///
    /// # Errors
    /// If a setting is outside its range.
    pub fn dynamic(settings: LossScalerSettings) -> Result<Self, Error> {
        let setting = |name, value: f64, is_inside, expected| {
            if is_inside { Ok(()) } else { Err(Error::LossScaleSetting { name, value, expected }) }
        };
        let LossScalerSettings { initial_scale, loss_scale_window, min_loss_scale, hysteresis, .. } = settings;
        let is_positive = |value: f64| value > 0.0 && value.is_finite();
        setting("initial_scale", initial_scale, is_positive(initial_scale), "positive and finite")?;
        setting("min_loss_scale", min_loss_scale, is_positive(min_loss_scale), "positive and finite")?;
        setting("loss_scale_window", loss_scale_window as f64, loss_scale_window > 0, "1 or more")?;
        setting("hysteresis", hysteresis as f64, hysteresis > 0, "1 or more")?;
        Ok(Self {
            settings,
            is_dynamic: true,
            scale: initial_scale,
            tolerance: hysteresis,
            iteration: 0,
            clean_since: 0,
        })
    }

    /// A scaler that keeps its scale; overflowing steps are skipped.
    ///
    /// # Errors
    /// If `scale` is not positive and finite.
    pub fn fixed(scale: f64) -> Result<Self, Error> {
        let settings = LossScalerSettings { initial_scale: scale, ..LossScalerSettings::default() };
        Ok(Self { is_dynamic: false, ..Self::dynamic(settings)? })
    }

    /// Whether updates can have led here: false for a state that was damaged on its way through a file.
    pub fn is_plausible(&self) -> bool {
        const MOST: u64 = 1 << 53;
        Self::dynamic(self.settings).is_ok()
            && self.scale > 0.0
            && self.scale.is_finite()
            && (1..=self.settings.hysteresis).contains(&self.tolerance)
            && self.clean_since <= self.iteration
            && self.iteration <= MOST
    }

    /// Factor on the loss for the next backward.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// Updates so far.
    pub fn iteration(&self) -> u64 {
        self.iteration
    }

    /// Overflows that are still tolerated before the scale is halved, the halving one included.
    pub fn tolerance(&self) -> u64 {
        self.tolerance
    }

    /// Iteration of the last overflow.
    pub fn last_overflow(&self) -> Option<u64> {
        self.clean_since.checked_sub(1)
    }

    /// Takes note of whether the gradients just computed overflowed, and moves the scale.
    ///
    /// # Errors
    /// If they did, the scale is at its minimum and `raise_error_at_min_scale` is set. Nothing changes then.
    pub fn update(&mut self, has_overflow: bool) -> Result<ScaleUpdate, Error> {
        if !self.is_dynamic {
            self.iteration += 1;
            return Ok(if has_overflow { ScaleUpdate::Skip } else { ScaleUpdate::Step });
        }
        let settings = &self.settings;
        let mut result = if has_overflow { ScaleUpdate::Skip } else { ScaleUpdate::Step };
        if has_overflow {
            if settings.hysteresis == 1 || self.tolerance == 1 {
                let minimum = settings.min_loss_scale;
                if self.scale <= minimum && settings.raise_error_at_min_scale {
                    return Err(Error::LossScaleAtMinimum { minimum, iteration: self.iteration });
                }
                self.scale = (self.scale / 2.0).max(minimum);
            } else {
                self.tolerance -= 1;
            }
            self.clean_since = self.iteration + 1;
        } else {
            if settings.consecutive_hysteresis {
                self.tolerance = settings.hysteresis;
            }
            let clean = self.iteration - self.clean_since;
            if clean > 0 && clean.is_multiple_of(settings.loss_scale_window) {
                self.tolerance = settings.hysteresis;
                self.scale *= 2.0;
                result = ScaleUpdate::StepAndGrow;
            }
        }
        self.iteration += 1;
        Ok(result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_at_the_minimum_changes_nothing_and_says_what_to_do() {
        let settings = LossScalerSettings {
            initial_scale: 2.0,
            hysteresis: 1,
            raise_error_at_min_scale: true,
            ..LossScalerSettings::default()
        };
        let mut scaler = LossScaler::dynamic(settings).unwrap();
        assert_eq!(scaler.update(true), Ok(ScaleUpdate::Skip));
        let before = scaler.clone();
        let error = scaler.update(true).unwrap_err();
        assert_eq!(error, Error::LossScaleAtMinimum { minimum: 1.0, iteration: 1 });
        assert!(error.to_string().contains("bf16"), "{error}");
        assert_eq!(scaler, before);
    }

    #[test]
    fn a_fixed_scale_stays_and_still_skips() {
        let mut scaler = LossScaler::fixed(128.0).unwrap();
        for _ in 0..3000 {
            assert_eq!(scaler.update(false), Ok(ScaleUpdate::Step));
        }
        assert_eq!(scaler.update(true), Ok(ScaleUpdate::Skip));
        assert!((scaler.scale() - 128.0).abs() < 1e-12);
    }

    #[test]
    fn settings_outside_their_range_are_refused() {
        for settings in [
            LossScalerSettings { initial_scale: 0.0, ..LossScalerSettings::default() },
            LossScalerSettings { min_loss_scale: f64::INFINITY, ..LossScalerSettings::default() },
            LossScalerSettings { loss_scale_window: 0, ..LossScalerSettings::default() },
            LossScalerSettings { hysteresis: 0, ..LossScalerSettings::default() },
        ] {
            assert!(matches!(LossScaler::dynamic(settings), Err(Error::LossScaleSetting { .. })), "{settings:?}");
        }
        assert!(LossScaler::fixed(-1.0).is_err());
    }
}
