//! Generation on the GPU: the CPU's completions in f32, the trainer's log-probabilities in 16 bits.

use candle_core::{DType, Device};
use trainer::config::settings::{Projection, SamplingSettings};
use trainer::engine::{Engine, Speaker, Types};
use trainer::model::batch::BatchBuilder;
use trainer::rng::Stream;
use trainer::rollout::forward::{EngineModel, kv_shape};
use trainer::rollout::{Caller, Completion, Error, KvCache, Request, Rollout, RolloutSettings, Statistics};

use crate::support::{device, seed};
use crate::tiny::{Tiny, VOCABULARY};

/// Log-probabilities of f32 sums in another order.
const F32: f32 = 1e-4;
/// Log-probabilities of two passes that round activations to 16 bits (8 bits of mantissa in bf16, 11 in f16) at the same
/// places but sum in another order: the largest and the mean distance. Logits have a deviation near 1.
const BF16: (f32, f32) = (0.15, 0.03);
const F16: (f32, f32) = (0.03, 0.005);

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
    let error = KvCache::new(shape, pages, engine.device()).unwrap_err();
    assert!(matches!(error, Error::KvDeviceMemory { .. }));
    let message = error.to_string();
    for part in ["8.00 TiB", "free on the GPU", "max_num_seqs", "max_completion_length"] {
        assert!(message.contains(part), "{message}");
    }
    let small = KvCache::new(shape, 3, engine.device()).unwrap();
    assert_eq!(small.bytes(), 3 * shape.page_bytes());
    assert!(small.fits(shape, 2, engine.device()) && !small.fits(shape, 2, &Device::Cpu));
    assert!(small.layer(0).unwrap_err().to_string().contains("pages on a GPU"));
}
