//! A completion in the making: what is asked for, what was drawn so far, and when it ends.

use serde::{Deserialize, Serialize};

use std::collections::BTreeSet;

use super::sampler::Draw;
use super::stop::{Detokenize, StopMatcher};
use crate::rng::Stream;

/// One completion to generate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Identity of the completion; its random numbers are keyed by it. Unique within a call.
    pub sample_id: u64,
    /// The prompt. Requests with equal prompts share its keys and values.
    pub prompt_ids: Vec<u32>,
    /// Which group the completion belongs to; handed back in the completion.
    pub group: usize,
}

/// Why a completion ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Finish {
    /// With an end-of-sequence token, which is its last token.
    Eos,
    /// With the token that completed a stop string.
    StopString,
    /// At the length limit: it is truncated.
    Length,
}

/// A finished completion.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Completion {
    /// Whose.
    pub sample_id: u64,
    /// As in the request.
    pub group: usize,
    /// Its tokens, the one that ended it included.
    pub token_ids: Vec<u32>,
    /// Per token, the log-probability under the plain distribution, see [`Draw::logprob`].
    pub logprobs: Vec<f32>,
    /// Per token, the log-probability under the distribution it was drawn from.
    pub sampling_logprobs: Vec<f32>,
    /// Why it ended.
    pub finish: Finish,
}

impl Completion {
    /// Whether it was cut off by the length limit.
    pub fn is_truncated(&self) -> bool {
        self.finish == Finish::Length
    }
}

/// What ends completions of one call.
#[derive(Clone, Copy)]
pub(super) struct EndRules<'a> {
    pub(super) eos_token_ids: &'a [u32],
    pub(super) stop_strings: &'a [String],
    /// Present if there are stop strings.
    pub(super) detokenize: Option<&'a dyn Detokenize>,
}

/// A sequence that is being generated. It holds all that a preempted sequence needs to go on: only keys and values
/// are computed again, draws never.
#[derive(Debug)]
pub(super) struct Sequence {
    /// Index of the request.
    pub(super) request: usize,
    /// Index of the prompt.
    pub(super) prompt: usize,
    pub(super) generated: Vec<u32>,
    /// Distinct tokens so far; empty if nobody asks.
    pub(super) seen: Vec<u32>,
    logprobs: Vec<f32>,
    sampling_logprobs: Vec<f32>,
    stream: Stream,
    stop: StopMatcher,
    /// Most tokens it may have.
    limit: usize,
}

impl Sequence {
    pub(super) fn new(request: usize, prompt: usize, stream: Stream, limit: usize) -> Self {
        Self {
            request,
            prompt,
            generated: Vec::new(),
            seen: Vec::new(),
            logprobs: Vec::new(),
            sampling_logprobs: Vec::new(),
            stream,
            stop: StopMatcher::default(),
            limit,
        }
    }

    /// Remembers the prompt's tokens for the repetition penalty.
    pub(super) fn see_prompt(&mut self, prompt_ids: &[u32]) {
        self.seen = prompt_ids.iter().copied().collect::<BTreeSet<_>>().into_iter().collect();
    }

    /// The uniform number of the next position.
    pub(super) fn uniform(&mut self) -> f64 {
        self.stream.uniform()
    }

    /// Tokens that it may still have.
    pub(super) fn left(&self) -> usize {
        self.limit.saturating_sub(self.generated.len())
    }

    /// Appends a drawn token; says whether the completion ends with it.
    pub(super) fn push(&mut self, draw: Draw, rules: EndRules<'_>) -> Option<Finish> {
        self.generated.push(draw.token);
        self.logprobs.push(draw.logprob);
        self.sampling_logprobs.push(draw.sampling_logprob);
        if !self.seen.is_empty()
            && let Err(place) = self.seen.binary_search(&draw.token)
        {
            self.seen.insert(place, draw.token);
        }
        if rules.eos_token_ids.contains(&draw.token) {
            return Some(Finish::Eos);
        }
        if let Some(detokenize) = rules.detokenize
            && self.stop.push(&self.generated, rules.stop_strings, detokenize)
        {
            return Some(Finish::StopString);
        }
        (self.generated.len() >= self.limit).then_some(Finish::Length)
    }

    /// The completion.
    pub(super) fn finish(self, request: &Request, finish: Finish) -> Completion {
        Completion {
            sample_id: request.sample_id,
            group: request.group,
            token_ids: self.generated,
            logprobs: self.logprobs,
            sampling_logprobs: self.sampling_logprobs,
            finish,
        }
    }
}
