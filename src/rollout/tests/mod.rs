//! The engine as a whole, on a tiny attention model.

mod attention_model;
mod drawing;

use std::cell::Cell;

use candle_core::{DType, Device};

use super::sampler::{DrawJob, Sampler, Scratch};
use super::*;
use crate::config::settings::SamplingSettings;
use crate::rng::Stream;
use attention_model::AttentionModel;

const VOCAB: usize = 40;
const EOS: u32 = 7;
const PAGE_BYTES: usize = KvShape { layers: 2, kv_heads: 2, head_dim: 8, dtype: DType::F32 }.page_bytes();

fn settings() -> RolloutSettings {
    RolloutSettings {
        max_num_seqs: 8,
        max_batch_tokens: 64,
        kv_cache_bytes: 1_000 * PAGE_BYTES,
        max_new_tokens: 30,
        eos_token_ids: vec![EOS],
    }
}

fn with_pages(pages: usize) -> RolloutSettings {
    RolloutSettings { kv_cache_bytes: pages * PAGE_BYTES, ..settings() }
}

/// `groups` prompts of the given lengths, `samples` requests each.
fn requests(lengths: &[usize], samples: usize) -> Vec<Request> {
    let mut requests = Vec::new();
    for (group, &length) in lengths.iter().enumerate() {
        let mut stream = Stream::new(8, "prompts", 0, group as u64);
        let prompt_ids: Vec<u32> = (0..length).map(|_| stream.below(VOCAB as u64) as u32).collect();
        requests.extend((0..samples).map(|sample| Request {
            sample_id: (group * samples + sample) as u64,
            prompt_ids: prompt_ids.clone(),
            group,
        }));
    }
    requests
}

struct Run {
    completions: Vec<Completion>,
    statistics: Statistics,
    events: Vec<Event>,
    model: AttentionModel,
}

fn detokenize(ids: &[u32]) -> String {
    ids.iter().map(|id| format!("<{id}>")).collect()
}

fn try_run(settings: RolloutSettings, requests: &[Request], sampling: &SamplingSettings) -> Result<Run, Error> {
    let mut model = AttentionModel::new(VOCAB);
    let mut rollout = Rollout::new(settings)?;
    let mut events = Vec::new();
    let completions = {
        let mut on_event = |event| events.push(event);
        let mut caller = Caller { on_event: &mut on_event, is_cancelled: &|| false, detokenize: Some(&detokenize) };
        rollout.generate(&mut model, requests, sampling, 5, 2, &mut caller)?
    };
    Ok(Run { completions, statistics: rollout.statistics(), events, model })
}

fn run(settings: RolloutSettings, requests: &[Request], sampling: &SamplingSettings) -> Run {
    try_run(settings, requests, sampling).unwrap()
}

/// One request after the other, every token from nothing, no cache.
fn without_engine(settings: &RolloutSettings, requests: &[Request], sampling: &SamplingSettings) -> Vec<Completion> {
    let model = AttentionModel::new(VOCAB);
    let sampler = Sampler::new(sampling).unwrap();
    let generate = |request: &Request| {
        let mut stream = Stream::new(5, "sampling", 2, request.sample_id);
        let mut tokens = request.prompt_ids.clone();
        let (mut logprobs, mut sampling_logprobs) = (Vec::new(), Vec::new());
        loop {
            let logits = model.logits_without_cache(&tokens);
            let mut seen = tokens.clone();
            seen.sort_unstable();
            seen.dedup();
            let job = DrawJob { logits: &logits, seen: &seen, uniform: stream.uniform() };
            let draw = sampler.draw(job, &mut Scratch::default()).unwrap();
            tokens.push(draw.token);
            logprobs.push(draw.logprob);
            sampling_logprobs.push(draw.sampling_logprob);
            let token_ids = tokens[request.prompt_ids.len()..].to_vec();
            let text = detokenize(&token_ids);
            let finish = if settings.eos_token_ids.contains(&draw.token) {
                Finish::Eos
            } else if sampling.stop_strings.iter().any(|stop| text.contains(stop)) {
                Finish::StopString
            } else if token_ids.len() == settings.max_new_tokens {
                Finish::Length
            } else {
                continue;
            };
            let Request { sample_id, group, .. } = *request;
            return Completion { sample_id, group, token_ids, logprobs, sampling_logprobs, finish };
        }
    };
    requests.iter().map(generate).collect()
}

#[track_caller]
fn assert_same(got: &[Completion], expected: &[Completion], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (got, expected) in got.iter().zip(expected) {
        assert_eq!(got.token_ids, expected.token_ids, "{what}: sample {}", got.sample_id);
        assert_eq!(
            (got.sample_id, got.group, got.finish),
            (expected.sample_id, expected.group, expected.finish),
            "{what}"
        );
        for (got, expected) in
            [(&got.logprobs, &expected.logprobs), (&got.sampling_logprobs, &expected.sampling_logprobs)]
        {
            assert_eq!(got.len(), expected.len(), "{what}");
            assert!(got.iter().zip(expected).all(|(g, e)| (g - e).abs() < 1e-4), "{what}: {got:?}, {expected:?}");
        }
    }
}

#[test]
fn completions_are_those_of_computing_every_token_from_nothing() {
    // Prompts below, at and above page borders.
    let requests = requests(&[1, 15, 16, 17, 33, 48, 5], 3);
    let filtered = SamplingSettings {
        repetition_penalty: 1.1,
        temperature: 0.9,
        top_k: 20,
        top_p: 0.95,
        min_p: 0.01,
        stop_strings: vec!["3><1".into(), "<25>".into()],
    };
    for sampling in
        [SamplingSettings::default(), SamplingSettings { temperature: 0.0, ..SamplingSettings::default() }, filtered]
    {
        let expected = without_engine(&settings(), &requests, &sampling);
        assert_same(&run(settings(), &requests, &sampling).completions, &expected, &format!("{sampling:?}"));
    }
}

#[test]
fn the_result_does_not_depend_on_lanes_chunks_pages_or_threads() {
    let requests = requests(&[20, 3, 40, 16, 31, 64, 9], 4);
    let sampling = SamplingSettings::default();
    let expected = run(settings(), &requests, &sampling);
    assert!(expected.statistics.preemptions == 0);
    let finishes = |finish| expected.completions.iter().filter(|c| c.finish == finish).count();
    assert!(finishes(Finish::Eos) > 3 && finishes(Finish::Length) > 3, "the case is not varied enough");
    let mut preemptions = 0;
    for max_num_seqs in [1, 3, 64] {
        for max_batch_tokens in [1, 16, 1_000] {
            for pages in [6, 9, 500] {
                let settings = RolloutSettings { max_num_seqs, max_batch_tokens, ..with_pages(pages) };
                let got = run(settings.clone(), &requests, &sampling);
                assert_eq!(got.completions, expected.completions, "{settings:?}");
                assert!(got.model.most_spans <= max_num_seqs, "{settings:?}");
                assert!(got.statistics.peak_pages <= pages, "{settings:?}");
                let most = got.model.step_tokens.iter().copied().max().unwrap();
                assert!(most <= max_batch_tokens.max(max_num_seqs), "{settings:?}: {most}");
                let statistics = got.statistics;
                let computed: usize = got.model.step_tokens.iter().sum();
                let counted = statistics.prefill_tokens + statistics.decode_tokens + statistics.recomputed_tokens;
                assert_eq!(counted, computed, "{settings:?}");
                assert_eq!(statistics.prefill_tokens, expected.statistics.prefill_tokens, "{settings:?}");
                assert_eq!(statistics.decode_tokens, expected.statistics.decode_tokens, "{settings:?}");
                assert_eq!(statistics.recomputed_tokens > 0, statistics.preemptions > 0, "{settings:?}");
                preemptions += statistics.preemptions;
            }
        }
    }
    assert!(preemptions > 100, "the case never runs out of pages");
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    assert_eq!(pool.install(|| run(settings(), &requests, &sampling)).completions, expected.completions);
}

#[test]
fn the_result_does_not_depend_on_the_other_requests_but_on_seed_step_and_sample() {
    let requests = requests(&[20, 3, 40], 4);
    let sampling = SamplingSettings::default();
    let all = run(settings(), &requests, &sampling).completions;
    for (request, expected) in requests.iter().zip(&all) {
        assert_eq!(run(settings(), std::slice::from_ref(request), &sampling).completions, [expected.clone()]);
    }
    let mut model = AttentionModel::new(VOCAB);
    let mut rollout = Rollout::new(settings()).unwrap();
    let mut generate = |seed, step| {
        let mut caller = Caller { on_event: &mut |_| (), is_cancelled: &|| false, detokenize: None };
        rollout.generate(&mut model, &requests, &sampling, seed, step, &mut caller).unwrap()
    };
    // The cache is used again, so this also shows that nothing is left in it.
    assert_eq!(generate(5, 2), all);
    let other_step = generate(5, 3);
    assert_ne!(other_step, all);
    assert_ne!(generate(6, 2), all);
    assert_eq!(generate(5, 2), all);
    let texts: std::collections::BTreeSet<_> = all.iter().map(|c| &c.token_ids).collect();
    assert_eq!(texts.len(), all.len(), "samples of a group draw different numbers");
}

#[test]
fn a_group_prefills_its_prompt_once_and_shares_its_pages() {
    let sampling = SamplingSettings::default();
    let settings = RolloutSettings { eos_token_ids: vec![], max_num_seqs: 16, ..settings() };
    let length = 100; // six pages and four tokens
    let alone = run(settings.clone(), &requests(&[length], 1), &sampling).statistics;
    let group = run(settings.clone(), &requests(&[length], 16), &sampling).statistics;
    assert_eq!((alone.prefill_tokens, group.prefill_tokens), (length, length));
    assert_eq!(alone.decode_tokens, 29);
    assert_eq!(group.decode_tokens, 16 * 29);
    assert_eq!(group.generated_tokens, 16 * 30);
    // Alone: 129 tokens. In a group: six shared pages and three of its own for each.
    assert_eq!((alone.peak_pages, group.peak_pages), (9, 6 + 16 * 3));
    assert_eq!(group.peak_bytes, 54 * PAGE_BYTES);

    // Equal prompts of different groups, in any order, and samples that wait for a lane, share as well.
    let mut mixed = requests(&[length, 20], 8);
    mixed.sort_by_key(|request| request.sample_id % 8);
    mixed.iter_mut().for_each(|request| request.group = request.sample_id as usize);
    let narrow = run(RolloutSettings { max_num_seqs: 3, ..settings }, &mixed, &sampling).statistics;
    assert_eq!((narrow.prefill_tokens, narrow.recomputed_tokens), (length + 20, 0));
}

#[test]
fn samples_computed_again_share_only_pages_that_are_filled() {
    // Chunks of a few tokens, so that a sample comes back while another one of its prompt is half computed.
    let requests = requests(&[64], 6);
    let sampling = SamplingSettings::default();
    let settings = RolloutSettings { eos_token_ids: vec![], ..settings() };
    let expected = run(settings.clone(), &requests, &sampling).completions;
    let mut preemptions = 0;
    for pages in 6..30 {
        let settings = RolloutSettings { max_batch_tokens: 7, kv_cache_bytes: pages * PAGE_BYTES, ..settings.clone() };
        let got = run(settings, &requests, &sampling);
        assert_eq!(got.completions, expected, "{pages} pages");
        preemptions += got.statistics.preemptions;
    }
    assert!(preemptions > 20, "only {preemptions} preemptions");
}

#[test]
fn all_pages_are_free_at_the_end() {
    let requests = requests(&[20, 16, 40], 4);
    let sampler = Sampler::new(&SamplingSettings::default()).unwrap();
    for num_pages in [5, 9, 100] {
        let mut model = AttentionModel::new(VOCAB);
        let limits = scheduler::Limits { max_num_seqs: 5, max_batch_tokens: 16 };
        let mut scheduler = scheduler::Scheduler::new(limits, num_pages, &requests);
        scheduler.add(0..requests.len());
        let mut cache = KvCache::new(model.kv_shape(), num_pages, 0, &Device::Cpu).unwrap();
        let rules = sequence::EndRules { eos_token_ids: &[EOS], stop_strings: &[], detokenize: None };
        let mut finished = 0;
        let open = |request: usize, prompt| {
            let stream = Stream::new(5, "sampling", 2, request as u64);
            sequence::Sequence::new(request, prompt, stream, 30)
        };
        let draw = |scheduler: &mut scheduler::Scheduler<'_>, lane: usize, logits: &[f32]| {
            let Some(sequence) = scheduler.sequence_mut(lane) else {
                return scheduler::Outcome::Prefilled(logits.to_vec());
            };
            let job = DrawJob { logits, seen: &[], uniform: sequence.uniform() };
            let draw = sampler.draw(job, &mut Scratch::default()).unwrap();
            sequence.push(draw, rules).map_or(scheduler::Outcome::Stays, scheduler::Outcome::Finished)
        };
        let mut settle = |scheduler: &mut scheduler::Scheduler<'_>, found: Vec<(usize, scheduler::Outcome)>| {
            let mut outcomes: Vec<_> = (0..scheduler.num_lanes()).map(|_| scheduler::Outcome::Stays).collect();
            for (lane, outcome) in found {
                outcomes[lane] = outcome;
            }
            finished += scheduler.settle(outcomes).unwrap().len();
        };
        while scheduler.unfinished() > 0 {
            loop {
                let forks = scheduler.admit(open).unwrap();
                scheduler.check_pages();
                if forks.is_empty() {
                    break;
                }
                let found = forks.iter().map(|f| (f.lane, draw(&mut scheduler, f.lane, &f.logits))).collect();
                settle(&mut scheduler, found);
            }
            if scheduler.unfinished() == 0 {
                break;
            }
            let plan = scheduler.plan(false, &mut cache).unwrap();
            scheduler.check_pages();
            let logits = model.step(&plan.batch, &mut cache).unwrap().to_vec2::<f32>().unwrap();
            let lanes = scheduler.advance(&plan);
            let found = lanes.iter().map(|&(lane, row)| (lane, draw(&mut scheduler, lane, &logits[row]))).collect();
            settle(&mut scheduler, found);
            scheduler.check_pages();
        }
        assert_eq!(finished, 12);
        assert_eq!(scheduler.allocator().free_pages(), num_pages);
        assert!((0..num_pages as u32).all(|page| scheduler.allocator().references(page) == 0));
        assert_eq!(scheduler.preemptions() > 0, num_pages < 100);
    }
}

#[test]
fn end_of_sequence_as_first_token_ends_at_once() {
    let requests = requests(&[20], 6);
    let sampling = SamplingSettings { temperature: 0.0, ..SamplingSettings::default() };
    let first = run(settings(), &requests, &sampling).completions[0].token_ids[0];
    let settings = RolloutSettings { eos_token_ids: vec![first], max_num_seqs: 2, ..settings() };
    let got = run(settings, &requests, &sampling);
    for completion in &got.completions {
        assert_eq!((&completion.token_ids[..], completion.finish), (&[first][..], Finish::Eos));
        assert!(!completion.is_truncated());
    }
    assert_eq!((got.statistics.decode_tokens, got.statistics.steps), (0, 1));
}

#[test]
fn a_stop_string_across_a_token_boundary_ends_the_completion_with_its_token() {
    let requests = requests(&[20], 1);
    let settings = RolloutSettings { eos_token_ids: vec![], ..settings() };
    let whole = run(settings.clone(), &requests, &SamplingSettings::default()).completions.remove(0).token_ids;
    // The end of one token's text and the beginning of the next one's.
    let text = detokenize(&whole[9..11]);
    let stop = text[1..text.len() - 1].to_string();
    let end = (1..).find(|&count| detokenize(&whole[..count]).contains(&stop)).unwrap();
    let sampling = SamplingSettings { stop_strings: vec!["none".into(), stop], ..SamplingSettings::default() };
    let got = run(settings.clone(), &requests, &sampling).completions.remove(0);
    assert_eq!((&got.token_ids[..], got.finish), (&whole[..end], Finish::StopString));
    assert_eq!(got.logprobs.len(), end);
    // At the last token allowed it is still a stop string, not a truncation.
    let settings = RolloutSettings { max_new_tokens: end, ..settings };
    assert_eq!(run(settings, &requests, &sampling).completions[0].finish, Finish::StopString);
}

#[test]
fn completions_end_at_the_length_limits() {
    let settings = RolloutSettings { eos_token_ids: vec![], ..settings() };
    let sampling = SamplingSettings::default();
    let got = run(settings.clone(), &requests(&[10], 2), &sampling).completions;
    assert!(got.iter().all(|c| c.token_ids.len() == 30 && c.is_truncated()));
    let mut model = AttentionModel::new(VOCAB);
    model.max_positions = 25;
    let mut rollout = Rollout::new(settings).unwrap();
    let mut generate = |lengths: &[usize]| {
        let mut caller = Caller { on_event: &mut |_| (), is_cancelled: &|| false, detokenize: None };
        rollout.generate(&mut model, &requests(lengths, 1), &sampling, 0, 0, &mut caller)
    };
    let got = generate(&[10, 24]).unwrap();
    assert_eq!(got.iter().map(|c| c.token_ids.len()).collect::<Vec<_>>(), [15, 1]);
    let error = generate(&[10, 25]).unwrap_err();
    assert!(matches!(error, Error::PromptTooLong { sample_id: 1, prompt_tokens: 25, max_positions: 25 }));
}

#[test]
fn a_prompt_longer_than_the_budget_is_one_clear_error_and_nothing_is_computed() {
    let sampling = SamplingSettings::default();
    // 50 + 30 - 1 tokens need five pages.
    assert!(try_run(with_pages(5), &requests(&[10, 50], 2), &sampling).is_ok());
    let Err(error) = try_run(with_pages(4), &requests(&[10, 50], 2), &sampling) else { panic!("it fits") };
    let message = error.to_string();
    for part in ["sample 2 (50 tokens)", "up to 30 tokens", "5 pages", "holds 4", "max_completion_length"] {
        assert!(message.contains(part), "{message}");
    }
    assert!(matches!(
        try_run(with_pages(0), &requests(&[1], 1), &sampling),
        Err(Error::KvBudget { budget_pages: 0, .. })
    ));
}

#[test]
fn unusable_requests_and_settings_are_refused() {
    let sampling = SamplingSettings::default();
    let request = |sample_id, prompt_ids: &[u32]| Request { sample_id, prompt_ids: prompt_ids.to_vec(), group: 0 };
    let refused = |requests: &[Request]| try_run(settings(), requests, &sampling).err().map(|e| e.to_string()).unwrap();
    assert!(refused(&[request(4, &[])]).contains("sample 4 has no tokens"));
    assert!(refused(&[request(4, &[1, 40])]).contains("token id 40"));
    assert!(refused(&[request(4, &[1]), request(4, &[2])]).contains("two requests have the sample id 4"));
    assert!(run(settings(), &[], &sampling).completions.is_empty());
    for (settings, name) in [
        (RolloutSettings { max_num_seqs: 0, ..settings() }, "max_num_seqs"),
        (RolloutSettings { max_batch_tokens: 0, ..settings() }, "max_batch_tokens"),
        (RolloutSettings { max_new_tokens: 0, ..settings() }, "max_new_tokens"),
    ] {
        assert!(Rollout::new(settings).unwrap_err().to_string().contains(name));
    }
    let mut model = AttentionModel::new(VOCAB);
    let mut caller = Caller { on_event: &mut |_| (), is_cancelled: &|| false, detokenize: None };
    for (stop, message) in [("x", "turns tokens into text"), ("", "one or more characters")] {
        let sampling = SamplingSettings { stop_strings: vec![stop.into()], ..SamplingSettings::default() };
        let error =
            Rollout::new(settings()).unwrap().generate(&mut model, &[request(0, &[1])], &sampling, 0, 0, &mut caller);
        assert!(error.unwrap_err().to_string().contains(message));
    }
}

#[test]
fn events_tell_every_token_and_end() {
    let got = run(settings(), &requests(&[20, 3], 3), &SamplingSettings::default());
    for (index, completion) in got.completions.iter().enumerate() {
        let told: Vec<(u32, f32)> = got
            .events
            .iter()
            .filter_map(|event| match *event {
                Event::Token { request, sample_id, token, logprob } if request == index => {
                    assert_eq!(sample_id, completion.sample_id);
                    Some((token, logprob))
                }
                _ => None,
            })
            .collect();
        let expected: Vec<_> = completion.token_ids.iter().copied().zip(completion.logprobs.iter().copied()).collect();
        assert_eq!(told, expected);
        let end = Event::Finished {
            request: index,
            sample_id: completion.sample_id,
            finish: completion.finish,
            tokens: completion.token_ids.len(),
        };
        assert_eq!(got.events.iter().filter(|event| **event == end).count(), 1);
    }
    let Some(Event::Step { unfinished: 0, statistics, .. }) = got.events.last() else {
        panic!("{:?}", got.events.last())
    };
    assert_eq!(*statistics, got.statistics);
    assert_eq!(statistics.steps, got.model.step_tokens.len());
}

#[test]
fn cancelling_ends_before_the_next_step() {
    let mut model = AttentionModel::new(VOCAB);
    let mut rollout = Rollout::new(RolloutSettings { max_num_seqs: 2, ..settings() }).unwrap();
    let steps = Cell::new(0);
    let mut on_event = |event| {
        if let Event::Step { .. } = event {
            steps.set(steps.get() + 1);
        }
    };
    let is_cancelled = || steps.get() == 40;
    let mut caller = Caller { on_event: &mut on_event, is_cancelled: &is_cancelled, detokenize: None };
    let requests = requests(&[4; 20], 1);
    let sampling = SamplingSettings::default();
    let error = rollout.generate(&mut model, &requests, &sampling, 0, 0, &mut caller).unwrap_err();
    assert!(matches!(error, Error::Cancelled { finished: 1..20, total: 20 }), "{error}");
    assert_eq!(model.step_tokens.len(), 40);
    // The engine is as good as new.
    let mut caller = Caller { on_event: &mut |_| (), is_cancelled: &|| false, detokenize: None };
    let again = rollout.generate(&mut model, &requests, &sampling, 5, 2, &mut caller).unwrap();
    assert_eq!(again, run(settings(), &requests, &sampling).completions);
    rollout.release_cache();
    assert_eq!(rollout.cache_bytes(), 0);
}

/// What is taken meanwhile is what it would have been, comes when there is room, and keeps to the limits.
#[test]
fn requests_that_are_taken_while_others_are_made_come_out_the_same() {
    // Five groups of three, of which the last has the prompt of the second.
    let mut all = requests(&[9, 14, 5, 21, 14], 3);
    let twin = all[3].prompt_ids.clone();
    all[12..].iter_mut().for_each(|request| request.prompt_ids.clone_from(&twin));
    let sampling = SamplingSettings::default();
    let expected = run(settings(), &all, &sampling).completions;
    // First, most unfinished, and which of the groups from the first on are taken.
    let cases: [(usize, usize, &[usize]); 5] =
        [(6, 6, &[2, 3, 4]), (6, 3, &[4, 2]), (0, 3, &[0, 1, 2, 3, 4]), (3, 12, &[1]), (6, 6, &[])];
    for (first, most_unfinished, taken) in cases {
        let settings = RolloutSettings { max_num_seqs: 6, ..settings() };
        let (mut model, mut rollout) = (AttentionModel::new(VOCAB), Rollout::new(settings).unwrap());
        let unfinished = Cell::new(first);
        let mut left = taken.iter();
        let mut take = || {
            let group = left.next().map(|group| 3 * group..3 * group + 3);
            let would_be = unfinished.get() + group.as_ref().map_or(0, |_| 3);
            assert!(unfinished.get() == 0 || unfinished.get() + 3 <= most_unfinished, "{would_be}");
            unfinished.set(would_be);
            Ok(group)
        };
        let mut on_event = |event| match event {
            Event::Finished { .. } => unfinished.set(unfinished.get() - 1),
            Event::Step { unfinished: counted, running, .. } => {
                assert_eq!(counted, unfinished.get());
                assert!(running <= 6);
            }
            Event::Token { .. } => {}
        };
        let mut caller = Caller { on_event: &mut on_event, is_cancelled: &|| false, detokenize: None };
        let reserve = Reserve { first, most_taken: 3, most_unfinished, take: &mut take };
        let made = rollout.generate_with(&mut model, (&all, reserve), &sampling, 5, 2, &mut caller).unwrap();
        let is_made = |request: &usize| *request < first || taken.contains(&(request / 3));
        let wanted: Vec<Completion> = (0..15).filter(is_made).map(|request| expected[request].clone()).collect();
        assert_same(&made, &wanted, &format!("{first} and {taken:?}"));
        assert!(left.next().is_none() && unfinished.get() == 0);
    }
}

#[test]
fn a_reserve_that_nothing_can_be_taken_from_ends_the_call_with_its_reason() {
    let lost = || Error::Reserve(crate::ranks::Error::StartOver { rank: 1, operation: "next_turn" });
    let (mut model, mut rollout) = (AttentionModel::new(VOCAB), Rollout::new(settings()).unwrap());
    let mut take = || Err(crate::ranks::Error::StartOver { rank: 1, operation: "next_turn" });
    let mut caller = Caller { on_event: &mut |_| (), is_cancelled: &|| false, detokenize: None };
    let reserve = Reserve { first: 2, most_taken: 1, most_unfinished: 2, take: &mut take };
    let (all, sampling) = (requests(&[4, 6, 5], 1), SamplingSettings::default());
    let error = rollout.generate_with(&mut model, (&all, reserve), &sampling, 5, 2, &mut caller).unwrap_err();
    assert_eq!(error.to_string(), lost().to_string());
    let source = std::error::Error::source(&error).and_then(|source| source.downcast_ref());
    assert!(matches!(source, Some(crate::ranks::Error::StartOver { .. })));
}

#[test]
fn logits_that_are_not_numbers_name_the_sample_and_the_token() {
    let mut model = AttentionModel::new(VOCAB);
    model.poisoned_position = Some(12);
    let mut caller = Caller { on_event: &mut |_| (), is_cancelled: &|| false, detokenize: None };
    let settings = RolloutSettings { eos_token_ids: vec![], ..settings() };
    let mut rollout = Rollout::new(settings).unwrap();
    let sampling = SamplingSettings::default();
    let error = rollout.generate(&mut model, &requests(&[10], 1), &sampling, 0, 0, &mut caller).unwrap_err();
    let message = error.to_string();
    assert!(message.contains("token 3 of the completion of sample 0: the logits have a NaN"), "{message}");
}

/// A model without arithmetic, so that the time is the scheduler's.
struct Counter;

impl DecodeModel for Counter {
    fn vocab_size(&self) -> usize {
        4
    }
    fn kv_shape(&self) -> KvShape {
        KvShape { layers: 1, kv_heads: 1, head_dim: 1, dtype: DType::F32 }
    }
    fn max_positions(&self) -> usize {
        1_000
    }
    fn step(&mut self, batch: &StepBatch, _: &mut KvCache) -> Result<candle_core::Tensor, Error> {
        Ok(candle_core::Tensor::zeros((batch.logit_rows.len(), 4), DType::F32, &Device::Cpu)?)
    }
}

#[test]
fn ten_thousand_queued_prompts_cost_no_more_each_than_a_thousand() {
    let sampling = SamplingSettings::default();
    let generate = |count: u32| {
        let requests: Vec<Request> = (0..count)
            .map(|index| {
                let prompt_ids = (0..8).map(|digit| (index >> (2 * digit)) & 3).collect();
                Request { sample_id: u64::from(index), prompt_ids, group: index as usize }
            })
            .collect();
        let settings = RolloutSettings { max_num_seqs: 32, max_new_tokens: 4, eos_token_ids: vec![], ..settings() };
        let mut caller = Caller { on_event: &mut |_| (), is_cancelled: &|| false, detokenize: None };
        let start = std::time::Instant::now();
        let mut rollout = Rollout::new(settings).unwrap();
        let completions = rollout.generate(&mut Counter, &requests, &sampling, 0, 0, &mut caller).unwrap();
        assert_eq!(completions.len(), count as usize);
        assert!(completions.iter().zip(0..).all(|(c, id)| c.sample_id == id && c.token_ids.len() == 4));
        start.elapsed().as_secs_f64()
    };
    // Ten times as much takes ten times as long, a hundred times where something is quadratic. Other programs may
    // disturb one measurement, hardly three.
    let times: Vec<(f64, f64)> = (0..3).map(|_| (generate(1_000), generate(10_000))).collect();
    assert!(times.iter().any(|(few, many)| *many < 30.0 * few), "seconds for 1,000 and 10,000: {times:?}");
}
