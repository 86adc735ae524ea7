//! Rewards for length, steps and repetition.

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::LazyLock;

use fancy_regex::Regex;

use super::Sample;
use super::answer::Accuracy;
use super::error::Error;
use super::parameters::Parameters;
use super::registry::{Scorer, Together};

/// `length_penalty`: the soft overlong punishment of DAPO (2503.14476, eq. 13), TRL's `get_soft_overlong_punishment`
/// and open-r1's `soft_overlong_punishment`. With y tokens, the longest length L and the cache C: 0 for y <= L - C;
/// (L - C - y) / C up to L; -1 beyond.
///
/// Parameters: `max_completion_len` (L in tokens; default: the run's `max_completion_length`), `soft_punish_cache` (C
/// in tokens, at most L; default a fifth of L, as in the paper). (open-r1's own defaults are 16384 and 4096.)
pub(super) fn length_penalty(parameters: &mut Parameters<'_>) -> Result<Scorer, Error> {
    let longest = parameters.count("max_completion_len", 1)?;
    let cache = parameters.count("soft_punish_cache", 0)?;
    if let (Some(longest), Some(cache)) = (longest, cache)
        && cache > longest
    {
        return Err(parameters.wrong("soft_punish_cache", &format!("at most `max_completion_len`, which is {longest}")));
    }
    Ok(Box::new(move |_, sample| {
        let longest = longest.unwrap_or(sample.max_completion_length);
        let cache = cache.unwrap_or(longest / 5).min(longest);
        let (tokens, soft) = (sample.completion_tokens, longest - cache);
        Ok(Some(if tokens <= soft {
            0.0
        } else if tokens <= longest {
            -((tokens - soft) as f64) / cache as f64
        } else {
            -1.0
        }))
    }))
}

/// `cosine`: open-r1's `get_cosine_scaled_reward` (2502.03373, appendix C.1). With n characters and the longest length
/// L, c = cos(π n / L): low + (high - low) (1 + c) / 2, where (low, high) are the values of a right answer at length L
/// and at length 0, or those of a wrong one; `None` where the right answer cannot be read (open-r1 gives 1). As in
/// open-r1 the curve turns back beyond L: set L above every completion, or use `cosine_scaled`.
///
/// Parameters: those of `accuracy`; `cosine_min_value_wrong` (a wrong answer at length 0, default 0),
/// `cosine_max_value_wrong` (at L, default -0.5), `cosine_min_value_correct` (a right answer at L, default 0.5),
/// `cosine_max_value_correct` (at length 0, default 1), `cosine_max_len` (L in characters, default 1000), each also
/// without `cosine_`.
pub(super) fn cosine(parameters: &mut Parameters<'_>) -> Result<Scorer, Error> {
    let accuracy = Accuracy::from_parameters(parameters)?;
    let values = CosineValues::from_parameters(parameters, 0.0)?;
    let longest = parameters.count_of(["cosine_max_len", "max_len"], 1)?.unwrap_or(1000);
    Ok(Box::new(move |index, sample| {
        let progress = sample.completion.chars().count() as f64 / longest as f64;
        Ok(accuracy.score(index, sample)?.map(|right| values.at(right > 0.0, progress)))
    }))
}

/// `cosine_scaled`: TRL's `get_cosine_scaled_reward`. As `cosine`, with n and L in tokens, and n at most L.
///
/// Parameters: those of `cosine`, with `min_value_wrong` -1 by default; `max_len` (L in tokens; default: the run's
/// `max_completion_length`).
pub(super) fn cosine_scaled(parameters: &mut Parameters<'_>) -> Result<Scorer, Error> {
    let accuracy = Accuracy::from_parameters(parameters)?;
    let values = CosineValues::from_parameters(parameters, -1.0)?;
    let longest = parameters.count_of(["max_len", "cosine_max_len"], 1)?;
    Ok(Box::new(move |index, sample| {
        let longest = longest.unwrap_or(sample.max_completion_length);
        let progress = (sample.completion_tokens as f64 / longest as f64).min(1.0);
        Ok(accuracy.score(index, sample)?.map(|right| values.at(right > 0.0, progress)))
    }))
}

/// The ends of the two curves.
struct CosineValues {
    shortest_wrong: f64,
    longest_wrong: f64,
    longest_right: f64,
    shortest_right: f64,
}

impl CosineValues {
    fn from_parameters(parameters: &mut Parameters<'_>, shortest_wrong: f64) -> Result<Self, Error> {
        let mut value = |keys, default| parameters.number_of(keys, default, "a number", |_| true);
        Ok(Self {
            shortest_wrong: value(["cosine_min_value_wrong", "min_value_wrong"], shortest_wrong)?,
            longest_wrong: value(["cosine_max_value_wrong", "max_value_wrong"], -0.5)?,
            longest_right: value(["cosine_min_value_correct", "min_value_correct"], 0.5)?,
            shortest_right: value(["cosine_max_value_correct", "max_value_correct"], 1.0)?,
        })
    }

    fn at(&self, is_right: bool, progress: f64) -> f64 {
        let (longest, shortest) = if is_right {
            (self.longest_right, self.shortest_right)
        } else {
            (self.longest_wrong, self.shortest_wrong)
        };
        longest + 0.5 * (shortest - longest) * (1.0 + (progress * std::f64::consts::PI).cos())
    }
}

/// `length`: open-r1's `len_reward`, the length reward of Kimi k1.5 (2501.12599, section 2.3.3). With n characters, m
/// and M the least and the most of the completions scored together, l = 0.5 - (n - m) / (M - m): l for a right answer,
/// min(0, l) for a wrong one, 0 for all where M = m. As in open-r1 a right answer that cannot be read counts as right,
/// and the completions scored together are those of one generation batch on one process.
///
/// Parameters: those of `accuracy`.
pub(super) fn length(parameters: &mut Parameters<'_>) -> Result<Together, Error> {
    let accuracy = Accuracy::from_parameters(parameters)?;
    Ok(Box::new(move |samples: &[Sample<'_>]| {
        let lengths: Vec<f64> = samples.iter().map(|s| s.completion.chars().count() as f64).collect();
        let least = lengths.iter().copied().fold(f64::INFINITY, f64::min);
        let most = lengths.iter().copied().fold(0.0, f64::max);
        samples
            .iter()
            .zip(lengths)
            .enumerate()
            .map(|(index, (sample, length))| {
                let is_right = accuracy.score(index, sample)?.is_none_or(|right| right > 0.0);
                if most <= least {
                    return Ok(Some(0.0));
                }
                let value = 0.5 - (length - least) / (most - least);
                Ok(Some(if is_right { value } else { value.min(0.0) }))
            })
            .collect()
    }))
}

static STEP: LazyLock<Regex> = LazyLock::new(|| {
    let pattern = r"Step \d+:|\A\d+\.|\n-|\n\*|First,|Second,|Next,|Finally,";
    Regex::new(pattern).expect("the pattern is a constant that a test compiles")
});

/// `reasoning_steps`: open-r1's `reasoning_steps_reward`. A third for each sign of a step, 1 at most: `Step 1:`, a
/// number and a full stop at the very start, a line that starts with `-` or `*`, `First,`, `Second,`, `Next,`,
/// `Finally,`.
#[expect(clippy::unnecessary_wraps, reason = "every built-in is made by a function of one type")]
pub(super) fn reasoning_steps(_: &mut Parameters<'_>) -> Result<Scorer, Error> {
    Ok(Box::new(|_, sample| {
        let steps = STEP.find_iter(sample.completion).flatten().count();
        Ok(Some((steps as f64 / 3.0).min(1.0)))
    }))
}

/// `repetition_penalty`: open-r1's `get_repetition_penalty_reward` (2502.03373, appendix C.2): (1 - distinct n-grams /
/// all n-grams) * `max_penalty`, over the words of the completion in lower case; 0 for fewer than n words. (TRL's
/// function of the same name counts tokens: see [`token_repetition_penalty`].)
///
/// Parameters: `ngram_size` (default 3, at least 1), `max_penalty` (default -1, at most 0); open-r1's
/// `repetition_n_grams` and `repetition_max_penalty` are the same.
pub(super) fn repetition_penalty(parameters: &mut Parameters<'_>) -> Result<Scorer, Error> {
    let (size, penalty) = repetition_parameters(parameters)?;
    Ok(Box::new(move |_, sample| {
        let text = sample.completion.to_lowercase();
        let words: Vec<&str> = text.split_whitespace().collect();
        Ok(Some(repeated_share(&words, size, penalty)))
    }))
}

/// `token_repetition_penalty`: TRL's `get_repetition_penalty_reward`. As `repetition_penalty`, over tokens.
///
/// Parameters: those of `repetition_penalty`.
pub(super) fn token_repetition_penalty(parameters: &mut Parameters<'_>) -> Result<Scorer, Error> {
    let (size, penalty) = repetition_parameters(parameters)?;
    Ok(Box::new(move |_, sample| Ok(Some(repeated_share(sample.completion_ids, size, penalty)))))
}

fn repetition_parameters(parameters: &mut Parameters<'_>) -> Result<(usize, f64), Error> {
    let size = parameters.count_of(["ngram_size", "repetition_n_grams"], 1)?.unwrap_or(3);
    let keys = ["max_penalty", "repetition_max_penalty"];
    Ok((size, parameters.number_of(keys, -1.0, "a number of at most 0", |p| p <= 0.0)?))
}

/// The share of n-grams that have occurred before, times the penalty; 0, not -0, without any.
fn repeated_share<T: Eq + Hash>(items: &[T], size: usize, penalty: f64) -> f64 {
    let all = (items.len() + 1).saturating_sub(size);
    let distinct: HashSet<&[T]> = items.windows(size).collect();
    if all == 0 || distinct.len() == all { 0.0 } else { (1.0 - distinct.len() as f64 / all as f64) * penalty }
}
