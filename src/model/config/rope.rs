//! Rotary position frequencies, as transformers derives them from a model's configuration.

use std::f64::consts::TAU;

/// How positions turn into angles.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSettings {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// How the series is stretched beyond the trained context.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are stretched beyond the trained context.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every frequency divided by `factor` (Chen et al., 2306.15595).
    Linear {
        /// At least 1.
        factor: f64,
    },
    /// `YaRN` (Peng et al., 2309.00071).
    Yarn(Yarn),
}

/// The parameters of `YaRN` (Peng et al., 2309.00071), under the names transformers gives them.
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    /// Longest context divided by the trained one, at least 1.
    pub factor: f64,
    /// The trained context in tokens.
    pub original_max_position_embeddings: usize,
    /// Frequencies with more rotations than this over the trained context stay as they are (32).
    pub beta_fast: f64,
    /// Frequencies with fewer rotations than this are divided by `factor` (1).
    pub beta_slow: f64,
    /// Multiplies cos and sin; `None` derives it from `factor`, or from the two below.
    pub attention_factor: Option<f64>,
    /// `DeepSeek`'s numerator coefficient of the attention factor.
    pub mscale: Option<f64>,
    /// `DeepSeek`'s denominator coefficient of the attention factor.
    pub mscale_all_dim: Option<f64>,
    /// Round the borders of the ramp to whole dimensions (true).
    pub truncate: bool,
}

impl RopeSettings {
    /// The angular frequency of each pair of dimensions, and the factor that multiplies cos and sin.
    ///
    /// # Shapes
    /// Returns f32 `[head_dim / 2]`.
    ///
    /// # Equation
    /// `RoFormer` (2104.09864) eq. 15: `theta^(-2i/head_dim)`; position interpolation (2306.15595) eq. 4; `YaRN`
    /// (2309.00071) eq. 18 to 23, the ramp over dimensions instead of wavelengths as its published code has it.
    /// Powers are taken in f32, as transformers does, so that the values are its to the last bit or two.
    pub fn inv_freq(&self, head_dim: usize) -> (Vec<f32>, f32) {
        let inverse: Vec<f32> =
            (0..head_dim / 2).map(|i| 1.0 / (self.theta as f32).powf((2 * i) as f32 / head_dim as f32)).collect();
        match &self.scaling {
            RopeScaling::None => (inverse, 1.0),
            RopeScaling::Linear { factor } => (inverse.iter().map(|f| f / *factor as f32).collect(), 1.0),
            RopeScaling::Yarn(yarn) => {
                let (low, high) = yarn.ramp(self.theta, head_dim);
                let stretched = inverse
                    .iter()
                    .enumerate()
                    .map(|(i, &frequency)| {
                        let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0) as f32;
                        let keep = 1.0 - ramp;
                        frequency / yarn.factor as f32 * (1.0 - keep) + frequency * keep
                    })
                    .collect();
                (stretched, yarn.attention_scaling() as f32)
            }
        }
    }
}

impl Yarn {
    /// The pair of dimensions where the ramp begins and where it ends.
    fn ramp(&self, theta: f64, head_dim: usize) -> (f64, f64) {
        let dim = head_dim as f64;
        let trained = self.original_max_position_embeddings as f64;
        let border = |rotations: f64| dim * (trained / (rotations * TAU)).ln() / (2.0 * theta.ln());
        let (mut low, mut high) = (border(self.beta_fast), border(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, high) = (low.max(0.0), high.min(dim - 1.0));
        (low, if (high - low).abs() > 0.0 { high } else { high + 0.001 })
    }

    /// What multiplies cos and sin: 2309.00071 eq. 22, or the configured value.
    fn attention_scaling(&self) -> f64 {
        let scale = |coefficient: f64| {
            if self.factor <= 1.0 { 1.0 } else { 0.1 * coefficient * self.factor.ln() + 1.0 }
        };
        match (self.attention_factor, self.mscale, self.mscale_all_dim) {
            (Some(factor), _, _) => factor,
            (None, Some(numerator), Some(denominator)) if numerator != 0.0 && denominator != 0.0 => {
                scale(numerator) / scale(denominator)
            }
            _ => scale(1.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{RopeScaling, RopeSettings, Yarn};

    #[test]
    fn the_default_series_starts_at_one_and_falls_geometrically() {
        let (frequencies, scaling) = RopeSettings { theta: 10_000.0, scaling: RopeScaling::None }.inv_freq(8);
        assert_eq!(scaling.to_bits(), 1.0f32.to_bits());
        for (found, wanted) in frequencies.iter().zip([1.0, 0.1, 0.01, 0.001]) {
            assert!((found - wanted).abs() <= wanted * 1e-6, "{found} {wanted}");
        }
    }

    #[test]
    fn linear_scaling_divides_every_frequency() {
        let plain = RopeSettings { theta: 1e6, scaling: RopeScaling::None }.inv_freq(16).0;
        let scaled = RopeSettings { theta: 1e6, scaling: RopeScaling::Linear { factor: 4.0 } }.inv_freq(16).0;
        assert!(plain.iter().zip(&scaled).all(|(p, s)| (p / 4.0 - s).abs() < f32::EPSILON), "{scaled:?}");
    }

    #[test]
    fn yarn_keeps_the_fast_pairs_and_divides_the_slow_ones() {
        let yarn = Yarn {
            factor: 4.0,
            original_max_position_embeddings: 32_768,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: None,
            mscale: None,
            mscale_all_dim: None,
            truncate: true,
        };
        let settings = |yarn| RopeSettings { theta: 1e6, scaling: RopeScaling::Yarn(yarn) };
        let plain = RopeSettings { theta: 1e6, scaling: RopeScaling::None }.inv_freq(128).0;
        let (scaled, scaling) = settings(yarn.clone()).inv_freq(128);
        assert!((scaled[0] - plain[0]).abs() < f32::EPSILON);
        assert!((scaled[63] * 4.0 / plain[63] - 1.0).abs() < 1e-6);
        assert!((f64::from(scaling) - (0.1 * 4.0f64.ln() + 1.0)).abs() < 1e-7);
        let fixed = settings(Yarn { attention_factor: Some(1.5), ..yarn.clone() }).inv_freq(128).1;
        assert!((fixed - 1.5).abs() < f32::EPSILON);
        let equal = settings(Yarn { mscale: Some(1.0), mscale_all_dim: Some(1.0), ..yarn }).inv_freq(128).1;
        assert!((equal - 1.0).abs() < f32::EPSILON);
    }
}
