//! Penalties for length and repetition.

use std::collections::HashSet;

use super::error::Error;
use super::parameters::Parameters;
use super::registry::Scorer;

/// `length_penalty`: the soft overlong punishment of DAPO (2503.14476, eq. 13), TRL's `get_soft_overlong_punishment`.
/// With y tokens, the longest length L and the cache C: 0 for y <= L - C; (L - C - y) / C up to L; -1 beyond.
///
/// Parameters: `max_completion_len` (L in tokens; default: the run's `max_completion_length`), `soft_punish_cache` (C
/// in tokens, at most L; default a fifth of L, as in the paper).
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

/// `repetition_penalty`: open-r1's `get_repetition_penalty_reward` (2502.03373, appendix C.2): (1 - distinct n-grams /
/// all n-grams) * `max_penalty`, over the words of the completion in lower case; 0 for fewer than n words. (TRL's
/// function of the same name counts tokens.)
///
/// Parameters: `ngram_size` (default 3, at least 1), `max_penalty` (default -1, at most 0).
pub(super) fn repetition_penalty(parameters: &mut Parameters<'_>) -> Result<Scorer, Error> {
    let size = parameters.count("ngram_size", 1)?.unwrap_or(3);
    let penalty = parameters.number("max_penalty", -1.0, "a number of at most 0", |p| p <= 0.0)?;
    Ok(Box::new(move |_, sample| {
        let text = sample.completion.to_lowercase();
        let words: Vec<&str> = text.split_whitespace().collect();
        let all = (words.len() + 1).saturating_sub(size);
        if all == 0 {
            return Ok(Some(0.0));
        }
        let distinct: HashSet<&[&str]> = words.windows(size).collect();
        let repeated = 1.0 - distinct.len() as f64 / all as f64;
        Ok(Some(if repeated == 0.0 { 0.0 } else { repeated * penalty }))
    }))
}
