//! Generates completions: the loop of admitting, planning, computing, drawing and retiring.
//!
//! `train` calls it for GRPO's completions and for evaluation, `cli/generate.rs` for a person. The result depends on the
//! model, the requests, the sampling settings, the seed and the step, and on nothing else: neither on
//! [`RolloutSettings::max_num_seqs`], the token budget, preemptions or threads. On a GPU the same call gives the same
//! result, while another limit may change the last bits of the logits.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use candle_core::{DType, Device, Tensor};

use super::Error;
use super::decode_model::DecodeModel;
use super::kv_cache::{KvCache, KvShape};
use super::pages::{PAGE_TOKENS, pages_for};
use super::sampler::{Draw, DrawJob, Sampler};
use super::scheduler::{Limits, Outcome, Scheduler};
use super::sequence::{Completion, EndRules, Finish, Request, Sequence};
use super::settings::RolloutSettings;
use super::sizes::{cache_pages, least_pages};
use super::stop::Detokenize;
use crate::config::settings::SamplingSettings;
use crate::ranks;
use crate::rng::Stream;

/// The random stream of sampling; a sample's n-th completion token takes its n-th number.
pub const SAMPLING_STREAM: &str = "sampling";

/// What the caller of [`Rollout::generate`] hears and decides while it runs.
pub struct Caller<'a> {
    /// Hears of every token, finished completion and step.
    pub on_event: &'a mut dyn FnMut(Event),
    /// Asked before every step; true ends the call with [`Error::Cancelled`].
    pub is_cancelled: &'a dyn Fn() -> bool,
    /// Needed where stop strings are set.
    pub detokenize: Option<&'a dyn Detokenize>,
}

/// Requests that are made here only if nobody else takes them.
pub struct Reserve<'a> {
    /// The requests before this one are made here anyway.
    pub first: usize,
    /// Most of them that are taken at once.
    pub most_taken: usize,
    /// Some are taken where no more are unfinished after it.
    pub most_unfinished: usize,
    /// Takes some of those from `first` on, all of a prompt at once; `None` when there are no more.
    pub take: &'a mut dyn FnMut() -> Result<Option<Range<usize>>, ranks::Error>,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Event {
    /// A token was drawn.
    Token {
        /// Index of the request.
        request: usize,
        /// Its id.
        sample_id: u64,
        /// The token.
        token: u32,
        /// Its log-probability under the plain distribution.
        logprob: f32,
    },
    /// A completion ended.
    Finished {
        /// Index of the request.
        request: usize,
        /// Its id.
        sample_id: u64,
        /// Why.
        finish: Finish,
        /// Its length in tokens.
        tokens: usize,
    },
    /// A step was computed.
    Step {
        /// Sequences in the step.
        running: usize,
        /// Completions still to come.
        unfinished: usize,
        /// Counts and times so far.
        statistics: Statistics,
    },
}

/// Counts and times of one call.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Statistics {
    /// Prompt tokens computed, each distinct prompt once.
    pub prefill_tokens: usize,
    /// Tokens computed one after another; the first token of a completion comes from the prompt's logits.
    pub decode_tokens: usize,
    /// Tokens computed a second time after a preemption.
    pub recomputed_tokens: usize,
    /// Tokens drawn: the length of all completions.
    pub generated_tokens: usize,
    /// Seconds of forward steps for prompts and recomputed tokens. A step with both kinds is shared out by tokens.
    pub prefill_secs: f64,
    /// Seconds of forward steps for decoded tokens.
    pub decode_secs: f64,
    /// Seconds of drawing tokens and looking for stop strings.
    pub sampling_secs: f64,
    /// Forward steps.
    pub steps: usize,
    /// Most pages of the KV cache in use at the same time.
    pub peak_pages: usize,
    /// Bytes of those pages.
    pub peak_bytes: usize,
    /// Times a sequence gave its pages back to others.
    pub preemptions: usize,
}

/// The generation engine. Keeps the memory of its cache between calls.
#[derive(Debug)]
pub struct Rollout {
    settings: RolloutSettings,
    cache: Option<KvCache>,
    /// Tokens of a step for which there is room beside the cache.
    batch_tokens: usize,
    statistics: Statistics,
    /// Whether the run was told that the cache is smaller than wanted.
    has_said_small: AtomicBool,
}

/// What stays the same during one call.
struct Call<'a> {
    requests: &'a [Request],
    sampler: Sampler,
    rules: EndRules<'a>,
    seed: u64,
    step: u64,
    /// Most tokens of a completion, per request.
    limits: Vec<usize>,
}

impl Rollout {
    /// Checks the settings.
    ///
    /// # Errors
    /// If a count is 0.
    pub fn new(settings: RolloutSettings) -> Result<Self, Error> {
        for (name, value) in [
            ("max_num_seqs", settings.max_num_seqs),
            ("max_batch_tokens", settings.max_batch_tokens),
            ("max_new_tokens", settings.max_new_tokens),
        ] {
            if value == 0 {
                return Err(Error::Setting { name, value: "0".into(), expected: "1 or more" });
            }
        }
        let batch_tokens = settings.max_batch_tokens;
        Ok(Self {
            settings,
            cache: None,
            batch_tokens,
            statistics: Statistics::default(),
            has_said_small: AtomicBool::new(false),
        })
    }

    /// The settings.
    pub fn settings(&self) -> &RolloutSettings {
        &self.settings
    }

    /// Counts and times of the last call, also of one that failed.
    pub fn statistics(&self) -> Statistics {
        self.statistics
    }

    /// Gives the cache's memory back, for training in between.
    pub fn release_cache(&mut self) {
        self.cache = None;
    }

    /// Bytes of the cache held between calls.
    pub fn cache_bytes(&self) -> usize {
        self.cache.as_ref().map_or(0, KvCache::bytes)
    }

    /// Generates one completion per request and returns them in the order of the requests.
    ///
    /// # Errors
    /// If a request or a setting is unusable (before anything is computed), the model fails, its logits are not
    /// numbers, or the caller cancels.
    pub fn generate(
        &mut self,
        model: &mut dyn DecodeModel,
        requests: &[Request],
        sampling: &SamplingSettings,
        seed: u64,
        step: u64,
        caller: &mut Caller<'_>,
    ) -> Result<Vec<Completion>, Error> {
        let take = &mut || Ok(None);
        let none = Reserve { first: requests.len(), most_taken: 0, most_unfinished: 0, take };
        self.generate_with(model, (requests, none), sampling, seed, step, caller)
    }

    /// As [`Self::generate`], of the requests that are made here anyway and of those that are taken from the reserve meanwhile:
    /// whenever there is room for more, and when all others are done.
    ///
    /// # Errors
    /// As [`Self::generate`], or if nothing can be taken from the reserve.
    pub fn generate_with(
        &mut self,
        model: &mut dyn DecodeModel,
        (requests, reserve): (&[Request], Reserve<'_>),
        sampling: &SamplingSettings,
        seed: u64,
        step: u64,
        caller: &mut Caller<'_>,
    ) -> Result<Vec<Completion>, Error> {
        self.statistics = Statistics::default();
        let rules = end_rules(&self.settings, sampling, caller.detokenize)?;
        let sampler = Sampler::new(sampling)?;
        let (limits, longest) = self.check_requests(model, requests)?;
        let call = Call { requests, sampler, rules, seed, step, limits };
        let at_once = reserve.first.max(reserve.most_unfinished).max(reserve.most_taken).min(requests.len());
        let num_pages = self.num_pages(model, at_once, longest);
        let (shape, device) = (model.kv_shape(), model.device().clone());
        let most_lanes = self.settings.max_num_seqs.min(model.most_lanes());
        let lanes = most_lanes.min(requests.len());
        // One that does not fit is gone before a new one is made.
        let kept = self.cache.take().filter(|cache| cache.fits(shape, num_pages, &device));
        let mut cache = if let Some(cache) = kept {
            cache
        } else {
            let step_bytes = |tokens| model.step_bytes(lanes, longest, tokens);
            let (pages, tokens) = self.pages_with_room(num_pages, (lanes, longest), (shape, &step_bytes), &device)?;
            self.batch_tokens = tokens;
            // Steps for several sequences at a time give way where memory is short.
            KvCache::new(shape, pages, model.step_bytes(1, longest, tokens), &device)?
        };
        let limits = Limits { max_num_seqs: most_lanes, max_batch_tokens: self.batch_tokens };
        let mut scheduler = Scheduler::new(limits, cache.num_pages(), requests);
        scheduler.add(0..reserve.first);
        let result = call.run(model, &mut cache, (&mut scheduler, reserve), caller, &mut self.statistics);
        self.cache = Some(cache);
        result
    }

    /// Checks that every sequence can be computed at all. Returns each completion's limit and the most tokens that one
    /// sequence may have in the cache.
    fn check_requests(&self, model: &dyn DecodeModel, requests: &[Request]) -> Result<(Vec<usize>, usize), Error> {
        let (vocab_size, max_positions) = (model.vocab_size(), model.max_positions());
        let budget_bytes = self.settings.kv_cache_bytes;
        let budget_pages = budget_bytes.checked_div(model.kv_shape().page_bytes()).unwrap_or(usize::MAX);
        let mut ids = HashSet::with_capacity(requests.len());
        let mut limits = Vec::with_capacity(requests.len());
        let mut longest = 0;
        for Request { sample_id, prompt_ids, .. } in requests {
            let (sample_id, prompt_tokens) = (*sample_id, prompt_ids.len());
            if !ids.insert(sample_id) {
                return Err(Error::DuplicateSample { sample_id });
            }
            if prompt_tokens == 0 {
                return Err(Error::EmptyPrompt { sample_id });
            }
            if let Some(&token) = prompt_ids.iter().find(|&&token| token as usize >= vocab_size) {
                return Err(Error::UnknownToken { sample_id, token, vocab_size });
            }
            if prompt_tokens >= max_positions {
                return Err(Error::PromptTooLong { sample_id, prompt_tokens, max_positions });
            }
            let completion_tokens = self.settings.max_new_tokens.min(max_positions - prompt_tokens);
            // The last token drawn is never computed.
            let cached = prompt_tokens + completion_tokens - 1;
            let needed_pages = pages_for(cached);
            if needed_pages > budget_pages {
                return Err(Error::KvBudget {
                    sample_id,
                    prompt_tokens,
                    completion_tokens,
                    needed_pages,
                    budget_pages,
                    budget_bytes,
                });
            }
            limits.push(completion_tokens);
            longest = longest.max(cached);
        }
        Ok((limits, longest))
    }

    /// As many pages as the device has room for, at least those of the longest sequence, and the tokens of a step beside them: where
    /// there is room for fewer than wanted, first steps get shorter, then sequences wait for others, which changes none of them.
    fn pages_with_room(
        &self,
        wanted: usize,
        (lanes, longest): (usize, usize),
        (shape, step_bytes): (KvShape, &dyn Fn(usize) -> u64),
        device: &Device,
    ) -> Result<(usize, usize), Error> {
        let (mut tokens, least) = (self.settings.max_batch_tokens, RolloutSettings::LEAST_BATCH_TOKENS.max(lanes));
        let room = loop {
            let room = super::kv_cache::most_pages(shape, step_bytes(tokens), device)?;
            if room >= wanted || tokens / 2 < least {
                break room;
            }
            tokens /= 2;
        };
        let pages = wanted.min(room.max(least_pages(longest)));
        if pages < wanted && !self.has_said_small.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "the device has room for a KV cache of {} tokens, {} of the longest sequences at once; up to {} were to be \
                 generated at once, and some wait for others. `max_num_seqs` says how many, `max_completion_length` how long",
                pages * PAGE_TOKENS,
                (pages / pages_for(longest).max(1)).max(1),
                (wanted / (pages_for(longest) + 2)).saturating_sub(1)
            );
        }
        Ok((pages, tokens))
    }

    /// Pages of the cache: what the budget allows, but not more than can be used.
    fn num_pages(&self, model: &dyn DecodeModel, num_requests: usize, longest: usize) -> usize {
        let budget = self.settings.kv_cache_bytes.checked_div(model.kv_shape().page_bytes()).unwrap_or(usize::MAX);
        let lanes = self.settings.max_num_seqs.min(model.most_lanes()).min(num_requests);
        budget.min(cache_pages(lanes, longest))
    }
}

fn end_rules<'a>(
    settings: &'a RolloutSettings,
    sampling: &'a SamplingSettings,
    detokenize: Option<&'a dyn Detokenize>,
) -> Result<EndRules<'a>, Error> {
    let stop_strings = &sampling.stop_strings;
    if stop_strings.iter().any(String::is_empty) {
        return Err(Error::Setting {
            name: "stop_strings",
            value: "\"\"".into(),
            expected: "strings of one or more characters",
        });
    }
    if !stop_strings.is_empty() && detokenize.is_none() {
        return Err(Error::NoDetokenizer);
    }
    let detokenize = detokenize.filter(|_| !stop_strings.is_empty());
    Ok(EndRules { eos_token_ids: &settings.eos_token_ids, stop_strings, detokenize })
}

impl Reserve<'_> {
    fn has_room_for_more(&self, unfinished: usize) -> bool {
        unfinished == 0 || unfinished + self.most_taken <= self.most_unfinished
    }
}

impl Call<'_> {
    fn run(
        &self,
        model: &mut dyn DecodeModel,
        cache: &mut KvCache,
        (scheduler, reserve): (&mut Scheduler<'_>, Reserve<'_>),
        caller: &mut Caller<'_>,
        statistics: &mut Statistics,
    ) -> Result<Vec<Completion>, Error> {
        let mut completions: Vec<Option<Completion>> = self.requests.iter().map(|_| None).collect();
        let (mut total, mut is_reserve_empty) = (reserve.first, reserve.first == self.requests.len());
        loop {
            if (caller.is_cancelled)() {
                return Err(Error::Cancelled { finished: total - scheduler.unfinished(), total });
            }
            while !is_reserve_empty && reserve.has_room_for_more(scheduler.unfinished()) {
                match (reserve.take)().map_err(Error::Reserve)? {
                    Some(range) => {
                        total += range.len();
                        scheduler.add(range);
                    }
                    None => is_reserve_empty = true,
                }
            }
            if scheduler.unfinished() == 0 {
                break;
            }
            loop {
                let forks = scheduler.admit(|request, prompt| self.open(request, prompt))?;
                if forks.is_empty() {
                    break;
                }
                let rows: Vec<(usize, &[f32])> = forks.iter().map(|fork| (fork.lane, &*fork.logits)).collect();
                let outcomes = self.draw(scheduler, &rows, caller, statistics)?;
                self.settle(scheduler, outcomes, &mut completions, caller)?;
            }
            if scheduler.unfinished() == 0 {
                continue;
            }
            let running = scheduler.num_lanes();
            if !self.draw_steps(model, cache, scheduler, &mut completions, caller, statistics)? {
                self.step(model, cache, scheduler, &mut completions, caller, statistics)?;
            }
            statistics.peak_pages = scheduler.allocator().peak_pages();
            statistics.peak_bytes = statistics.peak_pages * cache.shape().page_bytes();
            statistics.preemptions = scheduler.preemptions();
            let unfinished = scheduler.unfinished();
            (caller.on_event)(Event::Step { running, unfinished, statistics: *statistics });
        }
        Ok(completions.into_iter().flatten().collect())
    }

    /// A sequence for a request, with its random numbers.
    fn open(&self, request: usize, prompt: usize) -> Sequence {
        let Request { sample_id, prompt_ids, .. } = &self.requests[request];
        let stream = Stream::new(self.seed, SAMPLING_STREAM, self.step, *sample_id);
        let mut sequence = Sequence::new(request, prompt, stream, self.limits[request]);
        if self.sampler.needs_seen_tokens() {
            sequence.see_prompt(prompt_ids);
        }
        sequence
    }

    /// Lets the model draw a few tokens for each lane, where it can and all lanes want some. Says whether it did.
    fn draw_steps(
        &self,
        model: &mut dyn DecodeModel,
        cache: &mut KvCache,
        scheduler: &mut Scheduler<'_>,
        completions: &mut [Option<Completion>],
        caller: &mut Caller<'_>,
        statistics: &mut Statistics,
    ) -> Result<bool, Error> {
        let most = model.most_steps();
        if most == 0 || !scheduler.is_decoding() {
            return Ok(false);
        }
        let start = Instant::now();
        let left = |lane| scheduler.sequence(lane).map_or(0, Sequence::left);
        let shortest = (0..scheduler.num_lanes()).map(left).min().unwrap_or(0);
        let steps = scheduler.reserve(most.min(shortest), cache)?;
        let settings = self.sampler.settings();
        if !model.prepare_draw(&scheduler.at(), steps, &settings, cache)? {
            return Ok(false);
        }
        // Room for the steps may have cost some their lanes.
        let lanes = scheduler.num_lanes();
        let numbers: Vec<Vec<f64>> = (0..lanes)
            .map(|lane| match scheduler.sequence_mut(lane) {
                Some(sequence) => (0..steps).map(|_| sequence.uniform()).collect(),
                None => vec![0.0; steps],
            })
            .collect();
        let uniforms: Vec<f64> = (0..steps).flat_map(|step| numbers.iter().map(move |of| of[step])).collect();
        let drawn = model.draw(&scheduler.at(), steps, &uniforms, &settings, cache)?;
        statistics.decode_secs += start.elapsed().as_secs_f64();
        statistics.steps += steps;

        let start = Instant::now();
        let mut outcomes = BTreeMap::new();
        for lane in 0..lanes {
            let mut taken = 0;
            for step in 0..steps {
                let at = step * lanes + lane;
                let (logprob, sampling_logprob) = (drawn.logprobs[at], drawn.sampling_logprobs[at]);
                let draw = if logprob.is_nan() {
                    Err(Error::Logits { reason: "a NaN or an infinity", index: drawn.tokens[at] as usize })
                } else {
                    Ok(Draw { token: drawn.tokens[at], logprob, sampling_logprob })
                };
                taken += 1;
                if let Some(finish) = self.take(scheduler, lane, draw, caller, statistics)? {
                    outcomes.insert(lane, Outcome::Finished(finish));
                    break;
                }
            }
            scheduler.advance_lane(lane, taken);
            statistics.decode_tokens += taken;
        }
        statistics.sampling_secs += start.elapsed().as_secs_f64();
        self.settle(scheduler, outcomes, completions, caller)?;
        Ok(true)
    }

    /// Gives a lane's sample a token; says whether it ends with it.
    fn take(
        &self,
        scheduler: &mut Scheduler<'_>,
        lane: usize,
        draw: Result<Draw, Error>,
        caller: &mut Caller<'_>,
        statistics: &mut Statistics,
    ) -> Result<Option<Finish>, Error> {
        let Some(sequence) = scheduler.sequence_mut(lane) else { return Ok(None) };
        let sample_id = self.requests[sequence.request].sample_id;
        let position = sequence.generated.len();
        let draw = draw.map_err(|error| Error::Draw { sample_id, position, source: Box::new(error) })?;
        let Draw { token, logprob, .. } = draw;
        let finish = sequence.push(draw, self.rules);
        statistics.generated_tokens += 1;
        (caller.on_event)(Event::Token { request: sequence.request, sample_id, token, logprob });
        Ok(finish)
    }

    /// Plans and computes one step, and draws where it gave logits.
    fn step(
        &self,
        model: &mut dyn DecodeModel,
        cache: &mut KvCache,
        scheduler: &mut Scheduler<'_>,
        completions: &mut [Option<Completion>],
        caller: &mut Caller<'_>,
        statistics: &mut Statistics,
    ) -> Result<(), Error> {
        let plan = scheduler.plan(model.most_steps() > 0, cache)?;
        let start = Instant::now();
        let logits = model.step(&plan.batch, cache)?;
        let vocab_size = model.vocab_size();
        let logits = to_rows(&logits, plan.batch.logit_rows.len(), vocab_size)?;
        let secs = start.elapsed().as_secs_f64();
        let decode_share = plan.decode_tokens as f64 / plan.batch.tokens.len() as f64;
        statistics.decode_secs += secs * decode_share;
        statistics.prefill_secs += secs * (1.0 - decode_share);
        statistics.prefill_tokens += plan.prefill_tokens;
        statistics.decode_tokens += plan.decode_tokens;
        statistics.recomputed_tokens += plan.recomputed_tokens;
        statistics.steps += 1;

        let lanes = scheduler.advance(&plan);
        let row = |index: usize| &logits[index * vocab_size..(index + 1) * vocab_size];
        let (samples, prompts): (Vec<_>, Vec<_>) = lanes
            .into_iter()
            .map(|(lane, index)| (lane, row(index)))
            .partition(|&(lane, _)| scheduler.sequence(lane).is_some());
        let mut outcomes = self.draw(scheduler, &samples, caller, statistics)?;
        for (lane, row) in prompts {
            outcomes.insert(lane, Outcome::Prefilled(row.to_vec()));
        }
        self.settle(scheduler, outcomes, completions, caller)
    }

    /// Draws the next token of each of these lanes from its row of logits.
    fn draw(
        &self,
        scheduler: &mut Scheduler<'_>,
        rows: &[(usize, &[f32])],
        caller: &mut Caller<'_>,
        statistics: &mut Statistics,
    ) -> Result<BTreeMap<usize, Outcome>, Error> {
        let start = Instant::now();
        let uniforms: Vec<f64> =
            rows.iter().map(|&(lane, _)| scheduler.sequence_mut(lane).map_or(0.0, Sequence::uniform)).collect();
        let jobs: Vec<DrawJob<'_>> = rows
            .iter()
            .zip(uniforms)
            .map(|(&(lane, logits), uniform)| {
                let seen = scheduler.sequence(lane).map_or(&[][..], |sequence| &sequence.seen);
                DrawJob { logits, seen, uniform }
            })
            .collect();
        let draws = self.sampler.draw_rows(&jobs);
        let mut outcomes = BTreeMap::new();
        for (&(lane, _), draw) in rows.iter().zip(draws) {
            if let Some(finish) = self.take(scheduler, lane, draw, caller, statistics)? {
                outcomes.insert(lane, Outcome::Finished(finish));
            }
        }
        statistics.sampling_secs += start.elapsed().as_secs_f64();
        Ok(outcomes)
    }

    /// Lets the scheduler know, and keeps what is finished.
    fn settle(
        &self,
        scheduler: &mut Scheduler<'_>,
        mut outcomes: BTreeMap<usize, Outcome>,
        completions: &mut [Option<Completion>],
        caller: &mut Caller<'_>,
    ) -> Result<(), Error> {
        let outcomes =
            (0..scheduler.num_lanes()).map(|lane| outcomes.remove(&lane).unwrap_or(Outcome::Stays)).collect();
        for (sequence, finish) in scheduler.settle(outcomes)? {
            let index = sequence.request;
            let request = &self.requests[index];
            let tokens = sequence.generated.len();
            completions[index] = Some(sequence.finish(request, finish));
            let sample_id = request.sample_id;
            (caller.on_event)(Event::Finished { request: index, sample_id, finish, tokens });
        }
        Ok(())
    }
}

/// The logits as one list of rows on the host, checked.
fn to_rows(logits: &Tensor, rows: usize, vocab_size: usize) -> Result<Vec<f32>, Error> {
    let expected = [rows, vocab_size];
    if rows == 0 && logits.elem_count() == 0 {
        return Ok(Vec::new());
    }
    if logits.dims() != expected || logits.dtype() != DType::F32 {
        return Err(Error::LogitsShape { got: logits.dims().to_vec(), expected: expected.to_vec() });
    }
    Ok(logits.flatten_all()?.to_vec1::<f32>()?)
}
