//! Generation on the GPU: the CPU's completions in f32, the trainer's log-probabilities in 16 bits.

use candle_core::{DType, Device};
use trainer::config::settings::{Projection, SamplingSettings};
use trainer::engine::{Engine, Speaker, Types};
use trainer::model::batch::BatchBuilder;
use trainer::rng::Stream;
use trainer::rollout::forward::{EngineModel, kv_shape};
use trainer::rollout::sizes::pass_bytes;
use trainer::rollout::{
    Caller, Completion, DecodeModel as _, Error, Finish, KvCache, Request, Rollout, RolloutSettings, Statistics,
};

use crate::family::smallest;
use crate::support::{device, seed};
use crate::tiny::{Tiny, VOCABULARY};

/// Log-probabilities of f32 sums in another order.
const F32: f32 = 1e-4;
/// Log-probabilities of two passes that round activations to 16 bits (8 bits of mantissa in bf16, 11 in f16) at the same
/// places but sum in another order: the largest and the mean distance. Logits have a deviation near 1.
const BF16: (f32, f32) = (0.15, 0.03);
const F16: (f32, f32) = (0.03, 0.005);

/// The same of logits of recorded steps of the smallest shape of the family.
const RECORDED: f32 = 0.2;

/// Pages that hold the longest sequence of the f32 test, but not five of them.
const FEW_PAGES: usize = 13;

/// A model with adapters on all of its 4-bit projections, or with dense weights.
fn tiny(architecture: &'static str, head_dim: usize, has_adapter: bool) -> Tiny {
    let adapters: &[Projection] = if has_adapter { &Projection::ALL } else { &[] };
    Tiny { architecture, head_dim, adapters, dropout: 0.0 }
}

/// Prompts around page borders, three requests each.
fn requests(lengths: &[usize]) -> Vec<Request> {
    let prompt = |item: usize, length: usize| -> Vec<u32> {
        let mut stream = Stream::new(seed(), "rollout prompts", 0, item as u64);
        (0..length).map(|_| stream.below(VOCABULARY) as u32).collect()
    };
    let prompts: Vec<Vec<u32>> = lengths.iter().enumerate().map(|(item, &length)| prompt(item, length)).collect();
    (0..3 * prompts.len())
        .map(|i| Request { sample_id: i as u64, prompt_ids: prompts[i / 3].clone(), group: i / 3 })
        .collect()
}

fn settings(kv_cache_bytes: usize) -> RolloutSettings {
    RolloutSettings {
        max_num_seqs: 5,
        max_batch_tokens: 32,
        kv_cache_bytes,
        max_new_tokens: 40,
        eos_token_ids: vec![1],
    }
}

pub(crate) fn generate(
    engine: &Engine,
    settings: RolloutSettings,
    requests: &[Request],
    temperature: f64,
) -> (Vec<Completion>, Statistics) {
    let mut rollout = Rollout::new(settings).unwrap();
    let sampling = SamplingSettings { temperature, ..SamplingSettings::default() };
    let mut model = EngineModel::new(engine, true).unwrap();
    let mut run = |rollout: &mut Rollout| {
        let mut caller = Caller { on_event: &mut |_| (), is_cancelled: &|| false, detokenize: None };
        rollout.generate(&mut model, requests, &sampling, 3, 0, &mut caller).unwrap()
    };
    let completions = run(&mut rollout);
    let statistics = rollout.statistics();
    // Again in the same pages, and in new ones.
    assert_eq!(run(&mut rollout), completions, "TRAINER_TEST_SEED={}", seed());
    assert!(rollout.cache_bytes() > 0);
    rollout.release_cache();
    assert_eq!(rollout.cache_bytes(), 0);
    assert_eq!(run(&mut rollout), completions, "TRAINER_TEST_SEED={}", seed());
    (completions, statistics)
}

/// Checks completions in f32 against the CPU's.
fn check_completions(architecture: &'static str, head_dim: usize, has_adapter: bool) {
    let requests = requests(&[1, 15, 16, 17, 40, 150, 5]);
    let tiny = tiny(architecture, head_dim, has_adapter);
    let (host, gpu) = (tiny.engine(&Device::Cpu, Types::F32), tiny.engine(&device(), Types::F32));
    let page_bytes = kv_shape(&gpu).page_bytes();
    assert_eq!(page_bytes, kv_shape(&host).page_bytes());
    for temperature in [0.0, 1.0] {
        for pages in [FEW_PAGES, 500] {
            let (want, _) = generate(&host, settings(pages * page_bytes), &requests, temperature);
            let (got, statistics) = generate(&gpu, settings(pages * page_bytes), &requests, temperature);
            let case = format!("{tiny:?} at {temperature}, {pages} pages, TRAINER_TEST_SEED={}", seed());
            assert_eq!(statistics.preemptions > 0, pages == FEW_PAGES, "{case}: {statistics:?}");
            for (got, want) in got.iter().zip(&want) {
                assert_eq!(got.token_ids, want.token_ids, "{case}: sample {}", got.sample_id);
                assert_eq!(got.finish, want.finish, "{case}: sample {}", got.sample_id);
                for (got, want) in got.logprobs.iter().zip(&want.logprobs) {
                    assert!((got - want).abs() < F32, "{case}: {got}, on the CPU {want}");
                }
            }
            assert_eq!(got.len(), requests.len());
        }
    }
}

#[test]
#[ignore = "gpu"]
fn completions_in_f32_are_those_of_the_cpu() {
    check_completions("qwen2", 16, false);
}

#[test]
#[ignore = "gpu"]
fn completions_in_f32_with_adapters_are_those_of_the_cpu() {
    check_completions("qwen2", 16, true);
}

#[test]
#[ignore = "gpu"]
fn completions_in_f32_of_qwen3_are_those_of_the_cpu() {
    check_completions("qwen3", 64, false);
}

#[test]
#[ignore = "gpu"]
fn completions_in_f32_of_qwen3_with_adapters_are_those_of_the_cpu() {
    check_completions("qwen3", 24, true);
}

/// The trainer's log-probabilities of a completion.
pub(crate) fn trainer_logprobs(
    engine: &Engine,
    request: &Request,
    completion: &Completion,
    temperature: f64,
) -> Vec<f32> {
    let mut builder = BatchBuilder::new();
    let whole = builder.push(&[request.prompt_ids.as_slice(), &completion.token_ids].concat(), 0);
    builder.predict_within(whole.start + request.prompt_ids.len() - 1..whole.end);
    engine.logprobs(&[builder.build().unwrap()], Speaker::Policy, temperature).unwrap().remove(0).logprobs
}

#[test]
#[ignore = "gpu"]
#[expect(clippy::print_stdout, reason = "distances for the reader")]
fn rollout_logprobs_in_16_bits_are_near_the_trainers() {
    // A long prompt, so that contexts are split over blocks.
    let requests = requests(&[1, 16, 33, 300]);
    for (types, (most, mean)) in [(Types::BF16, BF16), (Types::F16, F16)] {
        // Head sizes with and without tensor cores.
        for (architecture, head_dim, has_adapter) in
            [("qwen2", 64, true), ("qwen3", 64, true), ("qwen3", 24, true), ("qwen2", 64, false)]
        {
            let tiny = tiny(architecture, head_dim, has_adapter);
            let engine = tiny.engine(&device(), types);
            let (completions, _) = generate(&engine, settings(usize::MAX), &requests, 0.8);
            let mut distances = Vec::new();
            for (request, completion) in requests.iter().zip(&completions) {
                let trainer = trainer_logprobs(&engine, request, completion, 0.8);
                assert_eq!(trainer.len(), completion.logprobs.len());
                distances.extend(trainer.iter().zip(&completion.logprobs).map(|(t, r)| (t - r).abs()));
            }
            let case = format!("{tiny:?} in {types:?}, TRAINER_TEST_SEED={}", seed());
            let largest = distances.iter().copied().fold(0.0, f32::max);
            let average = distances.iter().sum::<f32>() / distances.len() as f32;
            println!("{case}: largest distance {largest:.2e}, mean {average:.2e} of {}", distances.len());
            assert!(distances.iter().all(|d| d.is_finite()), "{case}");
            assert!(largest < most && average < mean, "{case}: largest {largest}, mean {average}");
        }
    }
}

#[test]
#[ignore = "gpu"]
fn a_cache_beyond_the_devices_memory_is_one_clear_error() {
    let engine = tiny("qwen2", 16, false).engine(&device(), Types::BF16);
    let shape = kv_shape(&engine);
    assert_eq!((shape.dtype, shape.element_bytes()), (DType::BF16, 2));
    let pages = (8 << 40) / shape.page_bytes();
    let error = KvCache::new(shape, pages, 0, engine.device()).unwrap_err();
    assert!(matches!(error, Error::KvDeviceMemory { .. }));
    let message = error.to_string();
    for part in ["8.00 TiB", "free on the GPU", "max_num_seqs", "max_completion_length"] {
        assert!(message.contains(part), "{message}");
    }
    let small = KvCache::new(shape, 3, 0, engine.device()).unwrap();
    assert_eq!(small.bytes(), 3 * shape.page_bytes());
    assert!(small.fits(shape, 2, engine.device()) && !small.fits(shape, 2, &Device::Cpu));
    assert!(small.layer(0).unwrap_err().to_string().contains("pages on a GPU"));
}

/// Completions of recorded steps that may take so many bytes; whether steps were recorded to the end.
fn recorded(
    engine: &Engine,
    settings: RolloutSettings,
    requests: &[Request],
    sampling: &SamplingSettings,
    most_bytes: Option<usize>,
) -> (Vec<Completion>, Statistics, bool) {
    let detokenize = |ids: &[u32]| ids.iter().map(|id| format!("<{id}>")).collect::<String>();
    let mut rollout = Rollout::new(settings).unwrap();
    let mut model = EngineModel::new(engine, true).unwrap().recorded().unwrap();
    assert!(model.is_recorded());
    if let Some(bytes) = most_bytes {
        model.limit_recorded(bytes);
    }
    let mut caller = Caller { on_event: &mut |_| (), is_cancelled: &|| false, detokenize: Some(&detokenize) };
    let completions = rollout.generate(&mut model, requests, sampling, 3, 0, &mut caller).unwrap();
    (completions, rollout.statistics(), model.is_recorded())
}

/// That all requests have a completion, with log-probabilities near the trainer's.
fn check_recorded(case: &str, engine: &Engine, requests: &[Request], completions: &[Completion], temperature: f64) {
    assert_eq!(completions.len(), requests.len(), "{case}");
    for (request, completion) in requests.iter().zip(completions) {
        assert_eq!(completion.sample_id, request.sample_id, "{case}");
        let trainer = trainer_logprobs(engine, request, completion, temperature);
        let distances = trainer.iter().zip(&completion.logprobs).map(|(t, r)| (t - r).abs());
        let largest = distances.fold(0.0, |most: f32, d| if most.is_nan() || d <= most { most } else { d });
        let seed = seed();
        assert!(
            largest < RECORDED / temperature as f32,
            "{case}, sample {}: {largest} TRAINER_TEST_SEED={seed}",
            request.sample_id
        );
    }
}

#[test]
#[ignore = "gpu"]
fn recorded_steps_draw_by_filters_and_penalties_and_lose_nothing_without_pages() {
    let engine = smallest(&device(), Types::BF16);
    let requests = requests(&[1, 15, 16, 17, 40, 150, 5]);
    let page_bytes = kv_shape(&engine).page_bytes();
    for sampling in [
        SamplingSettings { temperature: 0.6, top_p: 0.95, ..SamplingSettings::default() },
        SamplingSettings { temperature: 0.8, top_k: 20, min_p: 0.05, ..SamplingSettings::default() },
        SamplingSettings { repetition_penalty: 1.3, ..SamplingSettings::default() },
        SamplingSettings { repetition_penalty: 1.3, temperature: 0.0, ..SamplingSettings::default() },
        SamplingSettings { repetition_penalty: 1.1, top_k: 50, top_p: 0.9, min_p: 0.01, ..SamplingSettings::default() },
    ] {
        for pages in [FEW_PAGES, 500] {
            let settings = settings(pages * page_bytes);
            let (completions, statistics, is_recorded) =
                recorded(&engine, settings.clone(), &requests, &sampling, None);
            let case = format!("{sampling:?}, {pages} pages, {statistics:?}");
            assert!(is_recorded, "{case}");
            assert_eq!(statistics.preemptions > 0, pages == FEW_PAGES, "{case}");
            let temperature = if sampling.temperature > 0.0 { sampling.temperature } else { 1.0 };
            check_recorded(&case, &engine, &requests, &completions, temperature);
            for completion in &completions {
                // What was drawn from has fewer tokens, and so larger probabilities, unless a penalty moves them.
                let pairs = completion.logprobs.iter().zip(&completion.sampling_logprobs);
                let is_fewer = |(plain, drawn): (&f32, &f32)| *drawn >= plain - 1e-4 && *drawn <= 1e-6;
                assert!(sampling.repetition_penalty != 1.0 || pairs.clone().all(is_fewer), "{case}: {completion:?}");
                assert!(completion.token_ids.len() <= 40 && completion.sampling_logprobs.iter().all(|l| *l <= 1e-6));
            }
            // The same call has the same result.
            assert_eq!(recorded(&engine, settings, &requests, &sampling, None).0, completions, "{case}");
        }
    }
}

#[test]
#[ignore = "gpu"]
fn a_strong_penalty_in_recorded_steps_repeats_no_token() {
    let engine = smallest(&device(), Types::BF16);
    let requests = requests(&[7, 20]);
    let sampling = SamplingSettings { repetition_penalty: 1000.0, temperature: 0.0, ..SamplingSettings::default() };
    let settings = RolloutSettings { eos_token_ids: vec![], ..settings(usize::MAX) };
    let (completions, ..) = recorded(&engine, settings, &requests, &sampling, None);
    for (request, completion) in requests.iter().zip(&completions) {
        assert_eq!(completion.token_ids.len(), 40);
        let mut all = request.prompt_ids.clone();
        all.sort_unstable();
        all.dedup();
        // Some token has a positive logit and was not seen.
        for token in &completion.token_ids {
            assert!(!all.contains(token), "{token} again in {completion:?}, TRAINER_TEST_SEED={}", seed());
            all.push(*token);
        }
    }
}

#[test]
#[ignore = "gpu"]
fn memory_that_recorded_steps_lack_costs_speed_only() {
    let engine = smallest(&device(), Types::BF16);
    let requests = requests(&[1, 15, 16, 17, 40, 150, 5]);
    let settings = RolloutSettings { max_num_seqs: 21, ..settings(usize::MAX) };
    let sampling = SamplingSettings { top_p: 0.95, repetition_penalty: 1.1, ..SamplingSettings::default() };
    let model = EngineModel::new(&engine, true).unwrap().recorded().unwrap();
    let passes = |lanes| pass_bytes(engine.config(), engine.types(), lanes, 0);
    let bytes = |lanes| (model.step_bytes(lanes, 150 + 40, 0) - passes(lanes)) as usize;
    assert!(bytes(2) < bytes(8) && bytes(8) < bytes(21));
    for (most_bytes, stays_recorded) in
        [(None, true), (Some(bytes(8)), true), (Some(bytes(2)), true), (Some(bytes(1)), true), (Some(0), false)]
    {
        let (completions, _, is_recorded) = recorded(&engine, settings.clone(), &requests, &sampling, most_bytes);
        let case = format!("at most {most_bytes:?} bytes");
        assert_eq!(is_recorded, stays_recorded, "{case}");
        check_recorded(&case, &engine, &requests, &completions, 1.0);
    }
}

#[test]
#[ignore = "gpu"]
fn a_stop_string_across_two_visits_ends_a_recorded_completion() {
    let engine = smallest(&device(), Types::BF16);
    let settings = RolloutSettings { eos_token_ids: vec![], ..settings(usize::MAX) };
    for request in requests(&[5, 18, 33]) {
        let one = std::slice::from_ref(&request);
        let sampling = SamplingSettings::default();
        let whole = recorded(&engine, settings.clone(), one, &sampling, None).0.remove(0).token_ids;
        // The first token comes of the prompt, 16 of the first visit.
        let stop = format!("{}><{}", whole[16], whole[17]);
        let text = |count: usize| whole[..count].iter().map(|id| format!("<{id}>")).collect::<String>();
        let end = (1..=40).find(|&count| text(count).contains(&stop)).unwrap();
        let sampling = SamplingSettings { stop_strings: vec![stop], ..sampling };
        for (max_new_tokens, finish) in [(40, Finish::StopString), (end, Finish::StopString), (end - 1, Finish::Length)]
        {
            let settings = RolloutSettings { max_new_tokens, ..settings.clone() };
            let got = recorded(&engine, settings, one, &sampling, None).0.remove(0);
            assert_eq!(got.token_ids, whole[..end.min(max_new_tokens)], "TRAINER_TEST_SEED={}", seed());
            assert_eq!((got.finish, got.is_truncated()), (finish, finish == Finish::Length));
        }
    }
}

#[test]
#[ignore = "gpu"]
fn a_prompt_longer_than_the_budget_is_one_clear_error_on_the_gpu() {
    let engine = smallest(&device(), Types::BF16);
    let budget = 4 * kv_shape(&engine).page_bytes();
    let mut rollout = Rollout::new(settings(budget)).unwrap();
    let mut model = EngineModel::new(&engine, true).unwrap().recorded().unwrap();
    let events = std::cell::Cell::new(0);
    let mut on_event = |_| events.set(events.get() + 1);
    let mut caller = Caller { on_event: &mut on_event, is_cancelled: &|| false, detokenize: None };
    let requests = requests(&[10, 50]);
    let error = rollout.generate(&mut model, &requests, &SamplingSettings::default(), 3, 0, &mut caller).unwrap_err();
    let message = error.to_string();
    for part in ["sample 3 (50 tokens)", "up to 40 tokens", "6 pages", "holds 4", "max_completion_length"] {
        assert!(message.contains(part), "{message}");
    }
    assert_eq!((events.get(), rollout.cache_bytes()), (0, 0));
}

#[test]
#[ignore = "gpu"]
fn ten_thousand_prompts_wait_for_their_turn_in_recorded_steps() {
    let engine = smallest(&device(), Types::BF16);
    let requests: Vec<Request> = (0..10_000u32)
        .map(|index| {
            let prompt_ids = (0..3).map(|digit| 10 + (index >> (5 * digit)) % 32).collect();
            Request { sample_id: u64::from(index), prompt_ids, group: index as usize }
        })
        .collect();
    let settings = RolloutSettings {
        max_num_seqs: 256,
        max_batch_tokens: 2048,
        kv_cache_bytes: 300 * kv_shape(&engine).page_bytes(),
        max_new_tokens: 6,
        eos_token_ids: vec![],
    };
    let (completions, ..) = recorded(&engine, settings, &requests, &SamplingSettings::default(), None);
    assert_eq!(completions.len(), requests.len());
    assert!(completions.iter().zip(0..).all(|(one, id)| one.sample_id == id && one.token_ids.len() == 6));
    let some: Vec<usize> = (0..10_000).step_by(997).collect();
    let picked: Vec<Request> = some.iter().map(|&index| requests[index].clone()).collect();
    let made: Vec<Completion> = some.iter().map(|&index| completions[index].clone()).collect();
    check_recorded("ten thousand", &engine, &picked, &made, 1.0);
}
