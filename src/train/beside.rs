//! Rewards that are computed beside the generation: of completions that are finished, while others are made.
//!
//! Only functions that look at one sample at a time are asked so early; whatever looks at a batch (a command, a function in Python,
//! `length`) is asked once, when the batch is there. A score is the same whenever it is made, and a function that fails is asked again
//! for the whole batch, which says what it says without this.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::data::{self, Prompts, Tokenizer};
use crate::reward::{OfEach, Sample};
use crate::rollout::{Event, Finish, Request};

/// What scores are made of beside the completions.
pub(super) struct Material<'a> {
    pub(super) examples: &'a Prompts,
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) max_completion_length: usize,
}

/// Scores that are there before the batch is.
#[derive(Debug, Default)]
pub(super) struct Early {
    /// Of each completion, by function.
    of_sample: HashMap<u64, BTreeMap<usize, Option<f64>>>,
    /// Seconds that it took to make them.
    pub(super) secs: f64,
    /// Of those, seconds after the last completion.
    pub(super) left_secs: f64,
}

/// A completion's early scores as they travel: numbers as their bits, because JSON has no infinity.
#[derive(Serialize, Deserialize)]
pub(super) struct Share {
    sample_id: u64,
    by_function: BTreeMap<usize, Option<u64>>,
}

impl Early {
    /// This rank's, to be shared.
    pub(super) fn shares(&self) -> Vec<Share> {
        let bits = |(&function, &score): (&usize, &Option<f64>)| (function, score.map(f64::to_bits));
        let share = |(&sample_id, scores): (&u64, &BTreeMap<usize, Option<f64>>)| Share {
            sample_id,
            by_function: scores.iter().map(bits).collect(),
        };
        self.of_sample.iter().map(share).collect()
    }

    /// The same with those of all ranks.
    pub(super) fn joined(self, shares: Vec<Share>) -> Self {
        let number = |(function, score): (usize, Option<u64>)| (function, score.map(f64::from_bits));
        let scores = |share: Share| (share.sample_id, share.by_function.into_iter().map(number).collect());
        Self { of_sample: shares.into_iter().map(scores).collect(), ..self }
    }

    /// Scores of these completions, by the functions that have one for each of them.
    pub(super) fn of(&self, sample_ids: &[u64]) -> BTreeMap<usize, Vec<Option<f64>>> {
        let first = sample_ids.first().and_then(|sample| self.of_sample.get(sample));
        let whole = |&function: &usize| {
            let score = |sample| self.of_sample.get(sample)?.get(&function).copied();
            Some((function, sample_ids.iter().map(score).collect::<Option<Vec<_>>>()?))
        };
        first.into_iter().flat_map(BTreeMap::keys).filter_map(whole).collect()
    }
}

/// A completion as events tell of it.
struct Made {
    request: usize,
    token_ids: Vec<u32>,
    is_truncated: bool,
}

/// Follows the events of a rollout and sends on what is finished.
struct Listener {
    tokens: Vec<Vec<u32>>,
    finished: Sender<Made>,
}

impl Listener {
    fn hear(&mut self, event: Event) {
        match event {
            Event::Token { request, token, .. } => self.tokens[request].push(token),
            Event::Finished { request, finish, .. } => {
                let token_ids = std::mem::take(&mut self.tokens[request]);
                let made = Made { request, token_ids, is_truncated: finish == Finish::Length };
                // Who scored may have ended: then nobody needs it.
                let _ = self.finished.send(made);
            }
            Event::Step { .. } => {}
        }
    }
}

/// Generates, and scores what is finished meanwhile in a thread. `generate` hands every event to the function that it is given.
///
/// # Errors
/// Those of `generate`.
pub(super) fn score_beside<T, E>(
    mut functions: OfEach<'_>,
    material: &Material<'_>,
    requests: &[Request],
    is_interrupted: &(dyn Fn() -> bool + Sync),
    generate: impl FnOnce(&mut dyn FnMut(Event)) -> Result<T, E>,
) -> Result<(T, Early), E> {
    if functions.is_empty() {
        return Ok((generate(&mut |_| ())?, Early::default()));
    }
    let (finished, coming) = channel();
    let is_given_up = AtomicBool::new(false);
    let is_over = || is_given_up.load(Ordering::Relaxed) || is_interrupted();
    thread::scope(|scope| {
        let (functions, is_over) = (&mut functions, &is_over);
        let scorer = scope.spawn(move || score_what_comes(functions, material, requests, &coming, is_over));
        let mut listener = Listener { tokens: vec![Vec::new(); requests.len()], finished };
        let generated = generate(&mut |event| listener.hear(event));
        is_given_up.store(generated.is_err(), Ordering::Relaxed);
        let ended = Instant::now();
        drop(listener);
        let mut early = scorer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        early.left_secs = ended.elapsed().as_secs_f64();
        Ok((generated?, early))
    })
}

/// Scores completions until no more come; all that wait together, so that a function has some to share out over its threads.
fn score_what_comes(
    functions: &mut OfEach<'_>,
    material: &Material<'_>,
    requests: &[Request],
    coming: &Receiver<Made>,
    is_over: &dyn Fn() -> bool,
) -> Early {
    let mut early = Early::default();
    while let Ok(first) = coming.recv() {
        let made: Vec<Made> = std::iter::once(first).chain(coming.try_iter()).collect();
        if is_over() || functions.is_empty() {
            break;
        }
        let started = Instant::now();
        // What cannot be read now cannot be read later, where it is said.
        let Ok(texts) = material.texts(&made) else { break };
        let Ok(samples) = material.samples(requests, &made, &texts) else { break };
        for (function, scores) in functions.score(&samples, is_over) {
            for (made, score) in made.iter().zip(scores) {
                early.of_sample.entry(requests[made.request].sample_id).or_default().insert(function, score);
            }
        }
        early.secs += started.elapsed().as_secs_f64();
    }
    early
}

impl Material<'_> {
    fn texts(&self, made: &[Made]) -> Result<Vec<String>, data::Error> {
        made.iter().map(|made| completion_text(self.tokenizer, &made.token_ids)).collect()
    }

    fn samples<'s>(
        &'s self,
        requests: &[Request],
        made: &'s [Made],
        texts: &'s [String],
    ) -> Result<Vec<Sample<'s>>, data::Error> {
        let sample = |(made, text): (&'s Made, &'s String)| {
            self.sample(requests[made.request].group, (&made.token_ids, text), made.is_truncated)
        };
        made.iter().zip(texts).map(sample).collect()
    }

    /// A completion of a prompt with all that a reward may look at.
    ///
    /// # Errors
    /// If the prompt cannot be read.
    pub(super) fn sample<'s>(
        &'s self,
        prompt: usize,
        (token_ids, text): (&'s [u32], &'s str),
        is_truncated: bool,
    ) -> Result<Sample<'s>, data::Error> {
        let example = self.examples.get(prompt)?;
        Ok(Sample {
            prompt: &example.prompt,
            prompt_text: &example.prompt_text,
            completion: text,
            completion_ids: token_ids,
            completion_tokens: token_ids.len(),
            max_completion_length: self.max_completion_length,
            is_truncated,
            row: &example.row,
        })
    }
}

/// A completion as reward functions see it: without special tokens.
pub(super) fn completion_text(tokenizer: &Tokenizer, ids: &[u32]) -> Result<String, data::Error> {
    tokenizer.decode(ids, true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn early(scores: &[(u64, &[(usize, Option<f64>)])]) -> Early {
        let of_sample = scores.iter().map(|(sample, of)| (*sample, of.iter().copied().collect())).collect();
        Early { of_sample, ..Early::default() }
    }

    #[test]
    fn functions_that_lack_a_score_are_asked_again() {
        let early = early(&[
            (4, &[(0, Some(1.0)), (2, None)]),
            (5, &[(0, Some(2.0)), (2, Some(f64::INFINITY))]),
            (6, &[(0, Some(3.0))]),
        ]);
        let both = early.of(&[5, 4]);
        assert_eq!(both, BTreeMap::from([(0, vec![Some(2.0), Some(1.0)]), (2, vec![Some(f64::INFINITY), None])]));
        assert_eq!(early.of(&[4, 6]), BTreeMap::from([(0, vec![Some(1.0), Some(3.0)])]));
        assert!(early.of(&[4, 7]).is_empty() && early.of(&[]).is_empty());
    }

    #[test]
    fn scores_travel_with_their_bits() {
        let one = early(&[(4, &[(0, Some(f64::NAN)), (1, None)])]);
        let two = early(&[(9, &[(0, Some(f64::NEG_INFINITY)), (1, Some(0.1))])]);
        let text = serde_json::to_vec(&one.shares().into_iter().chain(two.shares()).collect::<Vec<_>>()).unwrap();
        let all = Early::default().joined(serde_json::from_slice(&text).unwrap());
        let of = all.of(&[9, 4]);
        assert_eq!(of[&1], [Some(0.1), None]);
        let bits = |score: Option<f64>| score.map(f64::to_bits);
        assert_eq!(
            of[&0].iter().copied().map(bits).collect::<Vec<_>>(),
            [f64::NEG_INFINITY, f64::NAN].map(|x| bits(Some(x)))
        );
    }
}
