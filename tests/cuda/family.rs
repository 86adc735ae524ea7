//! The shapes of the whole family, two layers each, on the GPU against the CPU: gradients and decoding. Biases, panels of
//! unpacked weights, strips of the head and work lists depend on sizes that no tiny model has.

use candle_core::Device;
use trainer::config::settings::SamplingSettings;
use trainer::engine::{Activations, BatchSize, Engine, Parked, Rates, Types};
use trainer::kernels::cuda::set_deterministic;
use trainer::model::batch::{Batch, BatchBuilder};
use trainer::model::load::{RandomStorage, random_packed};
use trainer::ops::buffer;
use trainer::rng::Stream;
use trainer::rollout::forward::EngineModel;
use trainer::rollout::{Caller, Completion, Request, Rollout, RolloutSettings};
use trainer::train::bench::lora;
use trainer::zero::{self, ParamStore};

use crate::gradients::{LOSS_SCALE, gradients};
use crate::rollout::trainer_logprobs;
use crate::support::{device, seed};

/// Sizes of a model of the family; every other one follows from its architecture.
#[derive(Clone, Copy, Debug)]
struct Shape {
    /// Models of this shape.
    name: &'static str,
    architecture: &'static str,
    hidden: usize,
    intermediate: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    vocabulary: usize,
    is_tied: bool,
}

#[rustfmt::skip]
const SHAPES: [Shape; 16] = [
    qwen2("Qwen2.5-0.5B", 896, 4864, 14, 2, 151_936, true),
    qwen2("Qwen2.5-1.5B", 1536, 8960, 12, 2, 151_936, true),
    qwen2("R1-Distill-Qwen-1.5B", 1536, 8960, 12, 2, 151_936, false),
    qwen2("Qwen2.5-3B", 2048, 11_008, 16, 2, 151_936, true),
    qwen2("Qwen2.5-7B, R1-Distill-Qwen-7B", 3584, 18_944, 28, 4, 152_064, false),
    qwen2("Qwen2.5-14B, R1-Distill-Qwen-14B", 5120, 13_824, 40, 8, 152_064, false),
    qwen2("Qwen2.5-32B, QwQ-32B, R1-Distill-Qwen-32B", 5120, 27_648, 40, 8, 152_064, false),
    qwen2("Qwen2.5-72B", 8192, 29_568, 64, 8, 152_064, false),
    qwen2("Qwen2-72B", 8192, 24_576, 64, 8, 152_064, false),
    qwen3("Qwen3-0.6B", 1024, 3072, 16, 8, true),
    qwen3("Qwen3-1.7B", 2048, 6144, 16, 8, true),
    qwen3("Qwen3-4B", 2560, 9728, 32, 8, true),
    qwen3("Qwen3-8B, R1-0528-Qwen3-8B", 4096, 12_288, 32, 8, false),
    qwen3("Qwen3-14B", 5120, 17_408, 40, 8, false),
    qwen3("Qwen3-32B", 5120, 25_600, 64, 8, false),
    // Nothing is a multiple of anything: rows of the last panel, odd strips.
    Shape { name: "none", architecture: "qwen2", hidden: 5184, intermediate: 14_016, heads: 81, kv_heads: 27, head_dim: 64,
            vocabulary: 10_007, is_tied: false },
];

const fn qwen2(
    name: &'static str,
    hidden: usize,
    intermediate: usize,
    heads: usize,
    kv_heads: usize,
    vocabulary: usize,
    is_tied: bool,
) -> Shape {
    let (architecture, head_dim) = ("qwen2", hidden / heads);
    Shape { name, architecture, hidden, intermediate, heads, kv_heads, head_dim, vocabulary, is_tied }
}

const fn qwen3(
    name: &'static str,
    hidden: usize,
    intermediate: usize,
    heads: usize,
    kv_heads: usize,
    is_tied: bool,
) -> Shape {
    let (architecture, head_dim, vocabulary) = ("qwen3", 128, 151_936);
    Shape { name, architecture, hidden, intermediate, heads, kv_heads, head_dim, vocabulary, is_tied }
}

/// By types: a factor on the loss, the largest relative error of a block's gradients and distance of a log-probability. Sums of
/// thousands of products are in another order; in 16 bits activations and gradients are rounded (8 bits of mantissa in bf16, 11
/// in f16) on their way through the layers, and once more where the sum over a group's outputs is cut into panels.
const TOLERANCES: [(Types, f64, f64, f32); 3] =
    [(Types::F32, 1.0, 2e-4, 1e-3), (Types::BF16, LOSS_SCALE, 8e-2, 0.2), (Types::F16, LOSS_SCALE, 1e-2, 0.03)];

impl Shape {
    fn config(&self) -> String {
        let class = if self.architecture == "qwen2" { "Qwen2ForCausalLM" } else { "Qwen3ForCausalLM" };
        // Products of a normed row keep their size, so that softmax stays soft.
        let deviation = 0.8 / (self.hidden as f64).sqrt();
        let Self { architecture, hidden, intermediate, heads, kv_heads, head_dim, vocabulary, is_tied, .. } = self;
        format!(
            r#"{{"architectures": ["{class}"], "model_type": "{architecture}", "hidden_size": {hidden},
            "intermediate_size": {intermediate}, "num_hidden_layers": 2, "num_attention_heads": {heads},
            "num_key_value_heads": {kv_heads}, "head_dim": {head_dim}, "vocab_size": {vocabulary}, "hidden_act": "silu",
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
            "tie_word_embeddings": {is_tied}, "use_sliding_window": false, "sliding_window": null,
            "max_window_layers": 2, "attention_bias": false, "initializer_range": {deviation},
            "torch_dtype": "bfloat16", "bos_token_id": null, "eos_token_id": 1}}"#
        )
    }

    /// The same weights on every device.
    fn engine(&self, device: &Device, types: Types) -> Engine {
        self.engine_of(device, types, RandomStorage::Nf4)
    }

    fn engine_of(&self, device: &Device, types: Types, storage: RandomStorage) -> Engine {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), self.config()).unwrap();
        let mut loaded = random_packed(folder.path(), &lora(8), 5, storage).unwrap();
        if device.is_cuda() {
            loaded.keep_embedding_on_host();
        }
        let store = ParamStore::new(loaded.blocks.map(Result::unwrap).map(Ok::<_, zero::Error>), device).unwrap();
        let engine = Engine::new(loaded.config, loaded.adapter, store, types, Activations::Recompute);
        for (block, flat) in engine.store().flats().enumerate().filter(|(_, flat)| !flat.is_empty()) {
            let mut values = buffer::to_vec(&flat.values().unwrap()).unwrap();
            let mut stream = Stream::new(5, "family tests", 0, block as u64);
            values.iter_mut().for_each(|v| *v += 0.02 * stream.normal() as f32);
            buffer::write(&flat.values().unwrap(), &values).unwrap();
        }
        engine
    }

    fn tokens(&self, length: usize, item: u64) -> Vec<u32> {
        let mut stream = Stream::new(seed(), "family tokens", 0, item);
        (0..length).map(|_| stream.below(self.vocabulary as u64) as u32).collect()
    }

    /// A sequence, one of one token, and a group that shares its prompt.
    fn small_batch(&self) -> Batch {
        let mut builder = BatchBuilder::new();
        for (item, length) in [(0, 37), (1, 1)] {
            let rows = builder.push(&self.tokens(length, item), item);
            builder.predict_within(rows);
        }
        let prompt = builder.push(&self.tokens(20, 3), 3);
        for item in 4..6 {
            let rows = builder.push_after(prompt.clone(), &self.tokens(9, item), item);
            builder.predict_within(rows);
        }
        builder.build().unwrap()
    }

    fn large_batch(&self) -> Batch {
        let mut builder = BatchBuilder::new();
        for item in 0..2 {
            let rows = builder.push(&self.tokens(2050, item), item);
            // All targets would keep the test at the head.
            builder.predict_within(rows.end - 100..rows.end);
        }
        builder.build().unwrap()
    }
}

/// The largest relative error of a block's gradients; not a number if a gradient is none.
fn error_of(got: &[Vec<f32>], want: &[Vec<f32>]) -> f64 {
    assert_eq!(got.len(), want.len());
    let of_block = |(got, want): (&Vec<f32>, &Vec<f32>)| {
        assert_eq!(got.len(), want.len());
        let square = |x: f64| x * x;
        let difference: f64 = got.iter().zip(want).map(|(&g, &w)| square(f64::from(g) - f64::from(w))).sum();
        let norm: f64 = want.iter().map(|&w| square(f64::from(w))).sum();
        (difference / norm).sqrt()
    };
    let errors = got.iter().zip(want).filter(|(_, want)| !want.is_empty()).map(of_block);
    errors.fold(0.0, |most, error| if most.is_nan() || error <= most { most } else { error })
}

/// Two layers of the smallest shape, which recorded steps read.
pub(crate) fn smallest(device: &Device, types: Types) -> Engine {
    SHAPES[0].engine(device, types)
}

fn completions(engine: &Engine, requests: &[Request], is_recorded: bool, lanes: usize) -> Vec<Completion> {
    let settings = RolloutSettings {
        max_num_seqs: lanes,
        max_batch_tokens: 32,
        kv_cache_bytes: 1 << 30,
        max_new_tokens: 5,
        eos_token_ids: vec![1],
    };
    let mut rollout = Rollout::new(settings).unwrap();
    let model = EngineModel::new(engine, true).unwrap();
    let mut model = if is_recorded { model.recorded().unwrap() } else { model };
    let is_readable = engine.types() != Types::F32 && engine.config().hidden_size.is_multiple_of(128);
    assert_eq!(model.is_recorded(), is_recorded && is_readable);
    let mut caller = Caller { on_event: &mut |_| (), is_cancelled: &|| false, detokenize: None };
    rollout.generate(&mut model, requests, &SamplingSettings::default(), 3, 0, &mut caller).unwrap()
}

/// The largest distance of two lists of log-probabilities.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, |most, d| if most.is_nan() || d <= most { most } else { d })
}

#[test]
#[ignore = "gpu"]
#[expect(clippy::print_stdout, reason = "errors and seconds for the reader")]
fn gradients_and_decoding_of_every_shape_are_those_of_the_cpu() {
    let mut wrong = Vec::new();
    for shape in SHAPES {
        let started = std::time::Instant::now();
        let batch = shape.small_batch();
        let requests: Vec<Request> = (0..4)
            .map(|i| Request { sample_id: i, prompt_ids: shape.tokens(18, 10 + i / 2), group: i as usize / 2 })
            .collect();
        let host = shape.engine(&Device::Cpu, Types::F32);
        let [want, _] = gradients(&host, &batch, 1.0);
        let mut line = String::new();
        for (types, scale, tolerance, most) in TOLERANCES {
            let mut engine = shape.engine(&device(), types);
            let mut error = 0f64;
            for activations in [Activations::Keep, Activations::Recompute, Activations::Offload] {
                engine.set_activations(activations);
                for (kind, got) in ["known", "asked for"].iter().zip(gradients(&engine, &batch, scale)) {
                    let own = error_of(&got, &want);
                    if own.is_nan() || own > tolerance {
                        wrong.push(format!("{}, {types:?}, {activations:?}, {kind}: error {own:.2e}", shape.name));
                    }
                    error = error.max(own);
                }
            }
            let mut distances = (0f32, 0f32);
            let both = [false, true].map(|is_recorded| completions(&engine, &requests, is_recorded, 4));
            for (request, got) in requests.iter().chain(&requests).zip(both.iter().flatten()) {
                distances.0 = distances.0.max(distance(&got.logprobs, &trainer_logprobs(&engine, request, got, 1.0)));
                if types == Types::F32 {
                    distances.1 = distances.1.max(distance(&got.logprobs, &trainer_logprobs(&host, request, got, 1.0)));
                }
            }
            if !(distances.0 < most && distances.1 < most) {
                wrong.push(format!("{}, {types:?}: log-probabilities differ by {distances:?}", shape.name));
            }
            line += &format!("  {:?} {error:.1e} {:.1e}", types.compute, distances.0.max(distances.1));
        }
        println!("{}:{line}  {:.1} s", shape.name, started.elapsed().as_secs_f64());
    }
    assert!(wrong.is_empty(), "TRAINER_TEST_SEED={}\n{}", seed(), wrong.join("\n"));
}

/// Decodes for several numbers of lanes, and notes where log-probabilities are further from the trainer's than `most`.
#[expect(clippy::print_stdout, reason = "distances for the reader")]
fn compare_recorded(shape: &Shape, engine: &Engine, (storage, most): (RandomStorage, f32), wrong: &mut Vec<String>) {
    let (types, mut line) = (engine.types(), String::new());
    for lanes in [1, 4, 12, 24, 40, 100] {
        let requests: Vec<Request> = (0..lanes as u64)
            .map(|i| Request { sample_id: i, prompt_ids: shape.tokens(18, 10 + i / 4), group: i as usize / 4 })
            .collect();
        let (mut largest, mut sum, mut count) = (0f32, 0f64, 0);
        for (request, got) in requests.iter().zip(&completions(engine, &requests, true, lanes)).step_by(7) {
            let want = trainer_logprobs(engine, request, got, 1.0);
            largest = largest.max(distance(&got.logprobs, &want));
            sum += got.logprobs.iter().zip(&want).map(|(a, b)| f64::from((a - b).abs())).sum::<f64>();
            count += want.len();
        }
        line += &format!("  {lanes}: {largest:.1e} ({:.1e})", sum / f64::from(count as u32));
        if largest.is_nan() || largest > most {
            wrong.push(format!("{}, {storage}, {types:?}, {lanes} lanes: differ by {largest}", shape.name));
        }
    }
    println!("{} {storage} {:?}:{line}", shape.name, types.compute);
}

/// Few lanes and many take other forms of every product.
#[test]
#[ignore = "gpu"]
fn recorded_steps_of_every_shape_have_the_trainer_s_log_probabilities() {
    let mut wrong = Vec::new();
    let readable = SHAPES.iter().filter(|shape| shape.hidden.is_multiple_of(128));
    for (index, shape) in readable.enumerate() {
        for (types, _, _, most) in TOLERANCES.into_iter().skip(1).take(if index < 2 { 2 } else { 1 }) {
            let engine = shape.engine(&device(), types);
            compare_recorded(shape, &engine, (RandomStorage::Nf4, most), &mut wrong);
        }
    }
    assert!(wrong.is_empty(), "TRAINER_TEST_SEED={}\n{}", seed(), wrong.join("\n"));
}

/// Every GGUF type, and unlike types in every group, in one shape whose rows are whole blocks of 256 values and one whose are not;
/// the mix of `Q4_K_M` in every shape.
#[test]
#[ignore = "gpu"]
fn recorded_steps_of_gguf_types_have_the_trainer_s_log_probabilities() {
    let mut wrong = Vec::new();
    let (_, _, _, bf16) = TOLERANCES[1];
    let (_, _, _, f16) = TOLERANCES[2];
    for shape in SHAPES.iter().filter(|shape| shape.hidden.is_multiple_of(128)) {
        let engine = shape.engine_of(&device(), Types::BF16, RandomStorage::Mixed);
        compare_recorded(shape, &engine, (RandomStorage::Mixed, bf16), &mut wrong);
    }
    let packed = RandomStorage::NAMES.iter().filter(|name| **name != "nf4");
    for (name, shape) in packed.flat_map(|name| [&SHAPES[0], &SHAPES[9]].map(|shape| (name, shape))) {
        let storage: RandomStorage = name.parse().unwrap();
        for (types, most) in [(Types::BF16, bf16), (Types::F16, f16)] {
            let engine = shape.engine_of(&device(), types, storage);
            compare_recorded(shape, &engine, (storage, most), &mut wrong);
        }
    }
    assert!(wrong.is_empty(), "TRAINER_TEST_SEED={}\n{}", seed(), wrong.join("\n"));
}

/// With thousands of tokens panels are larger, the last layer is kept, gate and up of some rows are parked.
#[test]
#[ignore = "gpu"]
fn what_becomes_of_the_activations_of_large_batches_of_every_shape_changes_no_gradient() {
    let mut wrong = Vec::new();
    for shape in SHAPES {
        let batch = shape.large_batch();
        let mut engine = shape.engine(&device(), Types::BF16);
        set_deterministic(engine.device(), false).unwrap();
        engine.set_activations(Activations::Keep);
        let [want, _] = gradients(&engine, &batch, LOSS_SCALE);
        engine.set_activations(Activations::Recompute);
        let [recomputed, _] = gradients(&engine, &batch, LOSS_SCALE);
        let mut check = |what: &str, got: &[Vec<f32>]| {
            let error = error_of(got, &want);
            // Products of fewer rows are rounded to 16 bits after another order of sums.
            if error.is_nan() || error > 2e-2 {
                wrong.push(format!("{}, {what}: error {error:.2e}", shape.name));
            }
        };
        check("recomputed", &recomputed);
        engine.set_activations(Activations::Offload);
        for parked in Parked::ALL {
            engine.force_parked(Some(parked));
            let [got, _] = gradients(&engine, &batch, LOSS_SCALE);
            check(parked.name(), &got);
        }
    }
    assert!(wrong.is_empty(), "TRAINER_TEST_SEED={}\n{}", seed(), wrong.join("\n"));
}

/// What is parked of the mixer follows from measured rates and free memory, so it may make no difference at all.
#[test]
#[ignore = "gpu"]
fn what_of_the_mixer_is_parked_and_by_which_rates_changes_no_bit() {
    let mut wrong = Vec::new();
    for shape in SHAPES {
        let batch = shape.large_batch();
        let mut engine = shape.engine(&device(), Types::BF16);
        set_deterministic(engine.device(), true).unwrap();
        engine.set_activations(Activations::Offload);
        // Rates once given stay: ways without come first.
        let mut gradients_of = |parked: Option<Parked>, rates: Option<Rates>| {
            engine.force_parked(parked);
            if let Some(rates) = rates {
                engine.set_rates(rates);
            }
            let plan = engine.plan(BatchSize::of(&batch, true), true);
            let what = format!("{:?}, last layer whole: {}", plan.parked_name(), plan.is_last_whole());
            (what, gradients(&engine, &batch, LOSS_SCALE))
        };
        let measured =
            |bus: f64, products: f64| (None, Some(Rates { bus, products, is_measured: true, ..Rates::H200 }));
        for ways in [
            vec![(Some(Parked::Input), None), (Some(Parked::Attention), None), (Some(Parked::Products), None)],
            vec![(None, None), measured(1e9, 700e12), measured(1e15, 700e12), measured(25e9, 300e12)],
        ] {
            let [(first, want), rest @ ..] = &ways.into_iter().map(|(p, r)| gradients_of(p, r)).collect::<Vec<_>>()[..]
            else {
                unreachable!("there are some ways")
            };
            for (what, got) in rest {
                for (kind, (got, want)) in ["known", "asked for"].iter().zip(got.iter().zip(want)) {
                    for (block, (got, want)) in got.iter().zip(want).enumerate() {
                        let differing = got.iter().zip(want).filter(|(g, w)| g.to_bits() != w.to_bits()).count();
                        if differing > 0 || got.len() != want.len() {
                            wrong.push(format!(
                                "{}, {what} beside {first}, {kind}, block {block}: {differing} of {} values differ",
                                shape.name,
                                want.len()
                            ));
                        }
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "TRAINER_TEST_SEED={}\n{}", seed(), wrong.join("\n"));
}
