//! Draws the next token from a row of logits.
//!
//! The engine calls it for every row of a step, in parallel. A draw is a pure function of the logits, the tokens seen
//! and one uniform number; the number itself is a pure function of (seed, step, sample id, position), see
//! [`crate::rng`]. So a completion depends neither on the batch it was decoded in nor on the number of threads.
//!
//! Order and rules of the processors are those of transformers' `generate`: repetition penalty, temperature, top-k,
//! top-p, min-p. Shapes: `V` vocabulary size.

use rayon::prelude::*;

use super::{Error, filters};
use crate::config::settings::SamplingSettings;
use crate::kernels::cpu::vector;
use crate::kernels::cuda::DrawSettings;

/// A drawn token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Its id.
    pub token: u32,
    /// Its log-probability under the plain distribution `softmax(logits / temperature)` over the whole vocabulary,
    /// which is what the trainer computes. Greedy decoding (temperature 0) takes the logits as they are.
    pub logprob: f32,
    /// Its log-probability under the distribution it was drawn from: penalised, filtered and renormalised.
    pub sampling_logprob: f32,
}

/// One row to draw from.
#[derive(Clone, Copy, Debug)]
pub struct DrawJob<'a> {
    /// f32 `[V]`.
    pub logits: &'a [f32],
    /// Distinct ids of the prompt and the completion so far; only the repetition penalty looks at them.
    pub seen: &'a [u32],
    /// Uniform in `[0, 1)`.
    pub uniform: f64,
}

/// Sampling settings that were checked.
#[derive(Clone, Debug)]
pub struct Sampler {
    repetition_penalty: f32,
    temperature: f32,
    top_k: usize,
    top_p: f64,
    min_p: f64,
}

/// Weights that are summed in f32 before the sums are added in f64: few enough for f32, and many enough that a draw
/// passes over most of the vocabulary in large steps.
const CHUNK: usize = 512;

/// Buffers of one thread, kept between draws.
#[derive(Debug, Default)]
pub struct Scratch {
    /// Logits after penalty and temperature, `[V]`.
    scaled: Vec<f32>,
    /// `exp(scaled - largest)`, `[V]`.
    weights: Vec<f32>,
    /// The sum of each [`CHUNK`] weights.
    sums: Vec<f64>,
    /// Ids kept by the filters, ascending; unused without filters.
    kept: Vec<u32>,
    keys: Vec<u64>,
    numbers: Vec<f32>,
}

impl Sampler {
    /// Checks the settings.
    ///
    /// # Errors
    /// If one is out of its range.
    pub fn new(settings: &SamplingSettings) -> Result<Self, Error> {
        let SamplingSettings { repetition_penalty, temperature, top_k, top_p, min_p, .. } = *settings;
        let check = |name, value: f64, is_valid: bool, expected| {
            if is_valid { Ok(()) } else { Err(Error::Setting { name, value: value.to_string(), expected }) }
        };
        let is_positive = |x: f64| x.is_finite() && x as f32 > 0.0;
        check("temperature", temperature, temperature == 0.0 || is_positive(temperature), "a number, 0 or larger")?;
        check("top_p", top_p, top_p > 0.0 && top_p <= 1.0, "a number above 0 and at most 1 (1 switches it off)")?;
        check("min_p", min_p, (0.0..=1.0).contains(&min_p), "a number from 0 (off) to 1")?;
        check(
            "repetition_penalty",
            repetition_penalty,
            is_positive(repetition_penalty),
            "a number above 0 (1 is off)",
        )?;
        Ok(Self { repetition_penalty: repetition_penalty as f32, temperature: temperature as f32, top_k, top_p, min_p })
    }

    /// Whether draws take the largest logit and no random number.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// What a model that draws itself is told.
    pub fn settings(&self) -> DrawSettings {
        let Self { repetition_penalty, temperature, top_k, top_p, min_p } = *self;
        DrawSettings { repetition_penalty, temperature, top_k, top_p, min_p }
    }

    /// Whether draws look at the tokens seen before.
    pub fn needs_seen_tokens(&self) -> bool {
        self.repetition_penalty != 1.0
    }

    /// Draws for several rows in parallel, each as [`Sampler::draw`] does.
    pub fn draw_rows(&self, jobs: &[DrawJob<'_>]) -> Vec<Result<Draw, Error>> {
        jobs.par_iter().map_init(Scratch::default, |scratch, job| self.draw(*job, scratch)).collect()
    }

    /// Draws one token.
    ///
    /// # Errors
    /// If the logits have NaN or plus infinity, or nothing but minus infinity.
    /// # Equation
    /// Inversion: the first id, in ascending order, whose cumulative probability exceeds the uniform number.
    pub fn draw(&self, job: DrawJob<'_>, scratch: &mut Scratch) -> Result<Draw, Error> {
        self.scale(job.logits, job.seen, &mut scratch.scaled);
        let (largest, sum) = exponentials(&scratch.scaled, &mut scratch.weights, &mut scratch.sums)?;
        if self.is_greedy() {
            let token = scratch.scaled.iter().position(|&l| l == largest).map_or(0, |index| index as u32);
            return Ok(Draw { token, logprob: self.plain(token, job.logits, scratch)?, sampling_logprob: 0.0 });
        }
        let is_filtered = self.filter(sum, scratch);
        let Scratch { weights, kept, sums, .. } = &*scratch;
        let (token, total) = if is_filtered {
            let total: f64 = kept.iter().map(|&id| f64::from(weights[id as usize])).sum();
            let pairs = kept.iter().map(|&id| (id, weights[id as usize]));
            (invert(pairs, job.uniform * total), total)
        } else {
            (invert_in_chunks(weights, sums, job.uniform * sum), sum)
        };
        let above = f64::from(scratch.scaled[token as usize] - largest);
        let sampling_logprob = (above - total.ln()) as f32;
        let is_plain = !self.needs_seen_tokens();
        let logprob = if is_plain { (above - sum.ln()) as f32 } else { self.plain(token, job.logits, scratch)? };
        Ok(Draw { token, logprob, sampling_logprob })
    }

    /// [`Draw::logprob`] of a token, from the logits as the model gave them.
    fn plain(&self, token: u32, logits: &[f32], scratch: &mut Scratch) -> Result<f32, Error> {
        let Scratch { scaled, weights, sums, .. } = scratch;
        scaled.clear();
        scaled.extend_from_slice(logits);
        if !self.is_greedy() && self.temperature != 1.0 {
            scaled.iter_mut().for_each(|logit| *logit /= self.temperature);
        }
        let (largest, sum) = exponentials(scaled, weights, sums)?;
        Ok((f64::from(scaled[token as usize] - largest) - sum.ln()) as f32)
    }

    /// The logits after every processor, removed tokens at minus infinity, as transformers' processors return them.
    /// For greedy decoding only the penalty applies.
    ///
    /// # Errors
    /// As [`Sampler::draw`].
    pub fn process(&self, logits: &[f32], seen: &[u32]) -> Result<Vec<f32>, Error> {
        let mut scratch = Scratch::default();
        self.scale(logits, seen, &mut scratch.scaled);
        let (_, sum) = exponentials(&scratch.scaled, &mut scratch.weights, &mut scratch.sums)?;
        if self.is_greedy() || !self.filter(sum, &mut scratch) {
            return Ok(scratch.scaled);
        }
        let mut processed = vec![f32::NEG_INFINITY; logits.len()];
        for &id in &scratch.kept {
            processed[id as usize] = scratch.scaled[id as usize];
        }
        Ok(processed)
    }

    /// Repetition penalty and temperature.
    fn scale(&self, logits: &[f32], seen: &[u32], scaled: &mut Vec<f32>) {
        scaled.clear();
        scaled.extend_from_slice(logits);
        if self.needs_seen_tokens() {
            for &id in seen {
                if let Some(logit) = scaled.get_mut(id as usize) {
                    *logit =
                        if *logit > 0.0 { *logit / self.repetition_penalty } else { *logit * self.repetition_penalty };
                }
            }
        }
        if !self.is_greedy() && self.temperature != 1.0 {
            scaled.iter_mut().for_each(|logit| *logit /= self.temperature);
        }
    }

    /// Puts the ids that top-k, top-p and min-p keep into `scratch.kept`; false if none of them is on.
    fn filter(&self, sum: f64, scratch: &mut Scratch) -> bool {
        let Scratch { scaled, weights, kept, keys, numbers, .. } = scratch;
        let is_top_k = self.top_k > 0 && self.top_k < scaled.len();
        let is_top_p = self.top_p < 1.0;
        if !is_top_k && !is_top_p && self.min_p == 0.0 {
            return false;
        }
        kept.clear();
        let mut sum = sum;
        if is_top_k {
            let threshold = filters::top_k_threshold(scaled, self.top_k, numbers);
            kept.extend((0..).zip(scaled.iter()).filter(|&(_, &logit)| logit >= threshold).map(|(id, _)| id));
            sum = kept.iter().map(|&id| f64::from(weights[id as usize])).sum();
        } else {
            kept.extend(0..scaled.len() as u32);
        }
        if is_top_p {
            filters::top_p(kept, scaled, self.top_p, weights, sum, keys);
            sum = kept.iter().map(|&id| f64::from(weights[id as usize])).sum();
        }
        if self.min_p > 0.0 {
            filters::min_p(kept, self.min_p, |id| (f64::from(weights[id as usize]) / sum) as f32);
        }
        true
    }
}

/// `exp(scaled - largest)`, its sum over each chunk, the largest and the sum of all; an error where no token can be drawn.
fn exponentials(scaled: &[f32], weights: &mut Vec<f32>, sums: &mut Vec<f64>) -> Result<(f32, f64), Error> {
    let largest = vector::max(scaled);
    if !largest.is_finite() {
        return Err(unusable(scaled));
    }
    weights.clear();
    weights.extend_from_slice(scaled);
    sums.clear();
    sums.extend(weights.chunks_mut(CHUNK).map(|chunk| f64::from(vector::exp_in_place(chunk, 1.0, largest))));
    let sum: f64 = sums.iter().sum();
    // A NaN is not the largest, but it is in the sum.
    if sum.is_finite() { Ok((largest, sum)) } else { Err(unusable(scaled)) }
}

/// What is wrong with the logits.
fn unusable(logits: &[f32]) -> Error {
    let find = |reason, test: fn(f32) -> bool| {
        let index = logits.iter().position(|&logit| test(logit))?;
        Some(Error::Logits { reason, index })
    };
    find("a NaN", f32::is_nan)
        .or_else(|| find("an infinity", |logit| logit == f32::INFINITY))
        .unwrap_or(Error::Logits { reason: "nothing above minus infinity", index: 0 })
}

/// As [`invert`] for all weights, of which the sums over chunks are known.
fn invert_in_chunks(weights: &[f32], sums: &[f64], target: f64) -> u32 {
    let mut before = 0.0;
    let mut chosen = (0, 0.0);
    for (chunk, &sum) in sums.iter().enumerate() {
        if sum > 0.0 {
            chosen = (chunk, before);
            before += sum;
            if before > target {
                break;
            }
        }
    }
    let (chunk, before) = chosen;
    let first = chunk * CHUNK;
    let chunk = &weights[first..(first + CHUNK).min(weights.len())];
    invert((first as u32..).zip(chunk.iter().copied()), target - before)
}

/// The first id whose cumulative weight exceeds `target`; the last with a weight where rounding leaves none.
fn invert(weights: impl Iterator<Item = (u32, f32)>, target: f64) -> u32 {
    let mut cumulative = 0.0;
    let mut last = 0;
    for (id, weight) in weights {
        if weight > 0.0 {
            cumulative += f64::from(weight);
            last = id;
            if cumulative > target {
                break;
            }
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    fn settings() -> SamplingSettings {
        SamplingSettings::default()
    }

    fn normal_logits(len: usize, scale: f64) -> Vec<f32> {
        let mut stream = Stream::new(4, "sampler test", len as u64, 0);
        (0..len).map(|_| (scale * stream.normal()) as f32).collect()
    }

    /// Exact probabilities of a row of processed logits.
    fn probabilities(processed: &[f32]) -> Vec<f64> {
        let weights: Vec<f64> = processed.iter().map(|&l| f64::from(l).exp()).collect();
        let sum: f64 = weights.iter().sum();
        weights.iter().map(|w| w / sum).collect()
    }

    #[test]
    fn sampled_frequencies_follow_the_exact_distribution() {
        let logits = normal_logits(50, 1.5);
        let seen = [3, 17, 20];
        let filtered = SamplingSettings {
            repetition_penalty: 1.2,
            temperature: 1.4,
            top_k: 30,
            top_p: 0.95,
            min_p: 0.01,
            ..settings()
        };
        for settings in [settings(), filtered] {
            let sampler = Sampler::new(&settings).unwrap();
            let expected = probabilities(&sampler.process(&logits, &seen).unwrap());
            let draws = 100_000;
            let mut counts = vec![0.0_f64; logits.len()];
            let mut scratch = Scratch::default();
            for sample in 0..draws / 10 {
                let mut stream = Stream::new(9, "sampling", 0, sample);
                for _ in 0..10 {
                    let job = DrawJob { logits: &logits, seen: &seen, uniform: stream.uniform() };
                    counts[sampler.draw(job, &mut scratch).unwrap().token as usize] += 1.0;
                }
            }
            let mut chi_squared = 0.0;
            let mut degrees = -1.0;
            for (count, share) in counts.iter().zip(&expected) {
                if *share == 0.0 {
                    assert!(*count == 0.0, "a removed token was drawn");
                } else {
                    let mean = share * draws as f64;
                    chi_squared += (count - mean).powi(2) / mean;
                    degrees += 1.0;
                }
            }
            // Mean `degrees`, variance `2 degrees`: four standard deviations up, about one in 10,000 by chance; the
            // seed is fixed, so it is not by chance. Far too small would mean numbers that are not random.
            let deviation = (chi_squared - degrees) / (2.0_f64 * degrees).sqrt();
            assert!(deviation.abs() < 4.0, "chi-squared {chi_squared} with {degrees} degrees of freedom");
        }
    }

    #[test]
    fn logprobs_are_those_of_the_plain_and_of_the_filtered_distribution() {
        let logits = normal_logits(200, 2.0);
        let seen = [0, 5, 199];
        for repetition_penalty in [1.0, 1.3] {
            let settings =
                SamplingSettings { repetition_penalty, temperature: 0.8, top_k: 20, top_p: 0.9, ..settings() };
            let sampler = Sampler::new(&settings).unwrap();
            let plain = probabilities(&logits.iter().map(|l| l / 0.8).collect::<Vec<_>>());
            let filtered = probabilities(&sampler.process(&logits, &seen).unwrap());
            let mut scratch = Scratch::default();
            for step in 0..50 {
                let job = DrawJob { logits: &logits, seen: &seen, uniform: f64::from(step) / 50.0 };
                let draw = sampler.draw(job, &mut scratch).unwrap();
                let token = draw.token as usize;
                assert!((f64::from(draw.logprob) - plain[token].ln()).abs() < 1e-5);
                assert!((f64::from(draw.sampling_logprob) - filtered[token].ln()).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn temperature_zero_takes_the_first_of_the_largest_after_the_penalty() {
        let logits = [1.0, 3.0, 2.9, 3.0];
        let greedy = SamplingSettings { temperature: 0.0, ..settings() };
        let job = DrawJob { logits: &logits, seen: &[1, 3], uniform: 0.99 };
        let draw = |settings| Sampler::new(&settings).unwrap().draw(job, &mut Scratch::default()).unwrap();
        let first = draw(greedy.clone());
        assert_eq!((first.token, first.sampling_logprob), (1, 0.0));
        assert!((f64::from(first.logprob) - probabilities(&logits)[1].ln()).abs() < 1e-6);
        assert_eq!(draw(SamplingSettings { repetition_penalty: 1.1, ..greedy }).token, 2);
    }

    #[test]
    fn extreme_uniforms_draw_tokens_that_were_kept() {
        let mut logits = normal_logits(100, 3.0);
        logits[0] = f32::NEG_INFINITY;
        logits[99] = f32::NEG_INFINITY;
        for top_k in [0, 7] {
            let sampler = Sampler::new(&SamplingSettings { top_k, ..settings() }).unwrap();
            let processed = sampler.process(&logits, &[]).unwrap();
            for uniform in [0.0, 1.0 - f64::EPSILON / 2.0] {
                let job = DrawJob { logits: &logits, seen: &[], uniform };
                let draw = sampler.draw(job, &mut Scratch::default()).unwrap();
                assert!(processed[draw.token as usize] > f32::NEG_INFINITY);
                assert!(draw.sampling_logprob.is_finite());
            }
        }
    }

    #[test]
    fn unusable_logits_and_settings_are_errors() {
        let sampler = Sampler::new(&settings()).unwrap();
        for (logits, reason) in [
            (vec![0.0, f32::NAN], "a NaN at token id 1"),
            (vec![f32::INFINITY, 0.0], "an infinity at token id 0"),
            (vec![f32::NEG_INFINITY; 3], "nothing above minus infinity"),
            (vec![], "nothing above minus infinity"),
        ] {
            let job = DrawJob { logits: &logits, seen: &[], uniform: 0.5 };
            let error = sampler.draw(job, &mut Scratch::default()).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        for (settings, name) in [
            (SamplingSettings { temperature: -1.0, ..settings() }, "temperature"),
            (SamplingSettings { temperature: f64::NAN, ..settings() }, "temperature"),
            (SamplingSettings { top_p: 0.0, ..settings() }, "top_p"),
            (SamplingSettings { min_p: 1.5, ..settings() }, "min_p"),
            (SamplingSettings { repetition_penalty: 0.0, ..settings() }, "repetition_penalty"),
        ] {
            assert!(Sampler::new(&settings).unwrap_err().to_string().contains(name));
        }
    }
}
