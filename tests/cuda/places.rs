//! Steps of the optimizer with what waits in host memory or lies with other ranks, against everything in one place: the same bits.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use candle_core::Device;
use trainer::config::settings::{
    ModelSettings, OptimizerKind, OptimizerSettings, Projection, RankSettings, WeightDtype, ZeroStage,
};
use trainer::engine::{self, Activations, DropoutKey, Engine, Order, Types};
use trainer::kernels::cuda::set_deterministic;
use trainer::model::HeadGradient;
use trainer::model::batch::{Batch, BatchBuilder};
use trainer::model::load::{Purpose, load};
use trainer::ops::head;
use trainer::quant::Weight;
use trainer::ranks::host::OnHost;
use trainer::ranks::local::Threads;
use trainer::ranks::{Exchange, Ranks};
use trainer::rng::Stream;
use trainer::zero::{Files, Offload, ParamStore, ShardedOptimizer, Sharing};

use crate::support::{device, download, seed};
use crate::tiny::{Tiny, VOCABULARY};

const STEPS: u64 = 3;
const MICRO_BATCHES: usize = 8;
const DEADLINE: Duration = Duration::from_secs(60);
const STAGES: [ZeroStage; 4] =
    [ZeroStage::Replicated, ZeroStage::Optimizer, ZeroStage::Gradients, ZeroStage::Parameters];

fn settings_of_adamw() -> OptimizerSettings {
    settings(OptimizerKind::AdamW)
}

fn settings(kind: OptimizerKind) -> OptimizerSettings {
    OptimizerSettings { kind, weight_decay: 0.1, adam_beta1: 0.9, adam_beta2: 0.999, adam_epsilon: 1e-8 }
}

fn micro_batch(step: u64, index: usize) -> Batch {
    let mut builder = BatchBuilder::new();
    for sequence in 0..2 {
        let item = step * 100 + index as u64 * 10 + sequence;
        let mut stream = Stream::new(seed(), "place tests", 0, item);
        let length = 5 + stream.below(40) as usize;
        let tokens: Vec<u32> = (0..length).map(|_| stream.below(VOCABULARY) as u32).collect();
        let rows = builder.push(&tokens, item);
        builder.predict_within(rows);
    }
    builder.build().unwrap()
}

/// What steps come to: trained values by block, norms of gradients, and log-probabilities after them.
type Results = (Vec<Vec<f32>>, Vec<f32>, Vec<f32>);

/// Some steps on this rank's micro-batches; the values are with the first rank alone.
fn train(mut engine: Engine, order: Order, kind: OptimizerKind) -> Results {
    set_deterministic(engine.device(), true).unwrap();
    engine.force_order(Some(order));
    engine.fix_sums();
    let sharing = engine.store().sharing().clone();
    let (rank, each) = (sharing.rank(), MICRO_BATCHES / sharing.world_size());
    let mut optimizer = ShardedOptimizer::new(settings(kind), engine.store()).unwrap();
    let mut norms = Vec::new();
    for step in 0..STEPS {
        let batches: Vec<Batch> = (each * rank..each * (rank + 1)).map(|index| micro_batch(step, index)).collect();
        let gradient = |output: &head::Output| HeadGradient {
            d_logprobs: vec![-0.01; output.logprobs.len()],
            ..HeadGradient::default()
        };
        let mut loss = |_: usize, output: &head::Output| Ok::<_, engine::Error>(gradient(output));
        engine.accumulate(&batches, 1.0, Some(DropoutKey { seed: 4, step }), &mut loss).unwrap();
        let report = optimizer.step(engine.store(), 1e-2, 0.5, 1.0).unwrap();
        assert!(!report.is_skipped);
        norms.push(report.grad_norm);
    }
    // What is saved right after a step is what the step made.
    let saved = engine.store().collect_params().unwrap();
    let outputs = engine.logprobs(&[micro_batch(99, 0)], engine::Speaker::Policy, 1.0).unwrap();
    engine.store().settle().unwrap();
    let values = engine.store().collect_values().unwrap().unwrap_or_default();
    for (block, (flat, values)) in engine.store().flats().zip(&values).enumerate() {
        for entry in flat.entries() {
            let weight = &saved.as_ref().unwrap()[block].get(&entry.name).unwrap().weight;
            let Weight::Dense(tensor) = weight else { panic!("{} is trained, and so dense", entry.name) };
            assert!(download(tensor) == values[entry.range.clone()], "{} as it was saved", entry.name);
        }
    }
    (values, norms, outputs[0].logprobs.clone())
}

fn tinies() -> Vec<Tiny> {
    let some: &[Projection] = &[Projection::QProj, Projection::VProj];
    let tiny = |architecture, head_dim, adapters, dropout| Tiny { architecture, head_dim, adapters, dropout };
    vec![
        tiny("qwen2", 64, &Projection::ALL[..], 0.0),
        tiny("qwen3", 64, some, 0.3),
        tiny("qwen2", 16, &[], 0.0),
        tiny("qwen3 untied", 64, &[], 0.0),
    ]
}

/// Files with a name that no other test has.
fn files(optimizer: bool, parameters: bool, buffer_count: usize) -> Files {
    static MADE: AtomicUsize = AtomicUsize::new(0);
    let folder = |is_there: bool| is_there.then(std::env::temp_dir);
    let run = format!("places-{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
    Files { optimizer: folder(optimizer), parameters: folder(parameters), run, buffer_count }
}

fn places() -> Vec<Offload> {
    let nothing = Offload::default();
    let mut all = in_memory(&nothing);
    all.extend([
        Offload { params: true, files: files(false, true, 3), ..nothing.clone() },
        Offload { optimizer: true, files: files(true, false, 3), ..nothing.clone() },
        Offload { params: true, optimizer: true, files: files(true, true, 5), ..nothing.clone() },
        Offload { params: true, optimizer: true, files: files(true, false, 1), ..nothing.clone() },
        Offload { params: true, optimizer: true, is_pinned: false, files: files(true, true, 2), ..nothing },
    ]);
    all
}

fn in_memory(nothing: &Offload) -> Vec<Offload> {
    vec![
        nothing.clone(),
        Offload { params: true, ..nothing.clone() },
        Offload { params: true, most_live: usize::MAX, persistence_threshold: 100, ..nothing.clone() },
        Offload { optimizer: true, ..nothing.clone() },
        Offload { params: true, optimizer: true, persistence_threshold: 100, ..nothing.clone() },
        Offload { params: true, optimizer: true, is_pinned: false, ..nothing.clone() },
    ]
}

fn sharing(ranks: Arc<dyn Ranks>, exchange: Option<Arc<Mutex<dyn Exchange>>>, stage: ZeroStage) -> Sharing {
    let settings = RankSettings { stage, param_persistence_threshold: 100, ..RankSettings::default() };
    Sharing::new(ranks, exchange, &settings, OptimizerKind::AdamW)
}

#[track_caller]
fn assert_same(what: &str, got: &Results, want: &Results) {
    assert_eq!(got.1, want.1, "{what}: norms");
    assert_eq!(got.2, want.2, "{what}: log-probabilities");
    for (block, (got, want)) in got.0.iter().zip(&want.0).enumerate() {
        let unlike = got.iter().zip(want).position(|(got, want)| got.to_bits() != want.to_bits());
        assert!(got.len() == want.len() && unlike.is_none(), "{what}: value {unlike:?} of block {block}");
    }
    assert_eq!(got.0.len(), want.0.len(), "{what}");
}

#[test]
#[ignore = "gpu"]
fn what_waits_in_host_memory_changes_no_bit() {
    let device = device();
    for tiny in tinies() {
        for types in [Types::F32, Types::BF16, Types::F16] {
            for order in [Order::DepthFirst, Order::Grouped(3), Order::BreadthFirst] {
                let want = train(tiny.engine(&device, types), order, OptimizerKind::AdamW);
                for place in places() {
                    let engine = tiny.engine_placed(&device, types, Sharing::alone(), place.clone());
                    let got = train(engine, order, OptimizerKind::AdamW);
                    assert_same(&format!("{tiny:?} in {types:?}, {order:?}, {place:?}"), &got, &want);
                }
            }
        }
    }
}

/// The reference is that of the start, moved when it is told to, and not what the policy has become meanwhile.
#[test]
#[ignore = "gpu"]
fn the_reference_is_the_same_wherever_values_are() {
    let device = device();
    let outputs = |mut engine: Engine| -> [Vec<f32>; 3] {
        set_deterministic(engine.device(), true).unwrap();
        engine.fix_sums();
        engine.store_mut().keep_reference().unwrap();
        let mut optimizer = ShardedOptimizer::new(settings(OptimizerKind::AdamW), engine.store()).unwrap();
        let step = [micro_batch(0, 0), micro_batch(0, 1), micro_batch(0, 2)];
        let of = |engine: &Engine| -> Vec<f32> {
            let outputs = engine.logprobs(&step, engine::Speaker::Reference, 1.0).unwrap();
            outputs.into_iter().flat_map(|output| output.logprobs).collect()
        };
        let before = of(&engine);
        let mut loss = |_: usize, output: &head::Output| {
            let d_logprobs = vec![-0.01; output.logprobs.len()];
            Ok::<_, engine::Error>(HeadGradient { d_logprobs, ..HeadGradient::default() })
        };
        engine.accumulate(&step, 1.0, None, &mut loss).unwrap();
        optimizer.step(engine.store(), 1e-2, 0.5, 1.0).unwrap();
        let after = of(&engine);
        engine.store().mix_reference(0.6).unwrap();
        let mixed = of(&engine);
        [before, after, mixed]
    };
    for tiny in tinies() {
        for types in [Types::F32, Types::BF16, Types::F16] {
            let want = outputs(tiny.engine(&device, types));
            assert!(want[0] == want[1] && want[1] != want[2], "{tiny:?} in {types:?}");
            for place in places() {
                let engine = tiny.engine_placed(&device, types, Sharing::alone(), place.clone());
                let got = outputs(engine);
                for (when, (got, want)) in ["before", "after a step", "moved"].iter().zip(got.iter().zip(&want)) {
                    assert_eq!(got, want, "{when}: {tiny:?} in {types:?}, {place:?}");
                }
            }
        }
    }
}

/// Where the optimizer works elsewhere, what blocks only ever round is on the GPU, and comes there, in 16 bits.
#[test]
#[ignore = "gpu"]
fn what_is_rounded_takes_two_bytes_on_the_gpu_and_on_the_way() {
    let device = device();
    for tiny in tinies().into_iter().filter(|tiny| tiny.adapters.is_empty()) {
        for types in [Types::BF16, Types::F16] {
            let of = |params, types| {
                let place = Offload { optimizer: true, params, ..Offload::default() };
                let engine = tiny.engine_placed(&device, types, Sharing::alone(), place);
                let store = engine.store();
                let matrix = store.kind_of(2, "model.layers.1.mlp.up_proj.weight").unwrap();
                let norm = store.kind_of(2, "model.layers.1.input_layernorm.weight").unwrap();
                (store.computed_bytes(), store.layer_bytes().from_host, store.packed_bytes(), [matrix, norm])
            };
            let (floats, halves) = (of(false, Types::F32), of(false, types));
            let embedding = tiny.engine(&device, types).store().flats().next().unwrap().len();
            // Beside a residual stream in f32 the embedding is not rounded.
            let apart = if types.residual == types.compute { 0 } else { 4 * embedding };
            let share = (halves.0 - apart) as f64 / (floats.0 - apart) as f64;
            // Norms and biases stay in f32, and matrices are aligned.
            assert!((0.5..0.6).contains(&share), "{tiny:?} in {types:?}: {halves:?} of {floats:?}");
            assert_eq!((halves.1, halves.2), (0, 0));
            assert!(halves.3[0].contains(types.compute.as_str()) && halves.3[1] == "f32", "{halves:?}");
            let (floats, halves) = (of(true, Types::F32), of(true, types));
            let share = halves.1 as f64 / floats.1 as f64;
            assert!((0.5..0.6).contains(&share), "{tiny:?} in {types:?}: {halves:?} of {floats:?}");
            assert!(floats.2 == 0 && halves.2 > 0 && (halves.0, floats.0) == (0, 0));
        }
    }
}

/// All weights of the shape of a 0.5B model in bf16, the optimizer in host memory alone. To be run by itself: the peak is that of
/// the GPU's pool.
#[test]
#[ignore = "gpu"]
fn all_weights_of_half_a_billion_train_in_three_gibibytes() {
    let device = device();
    let settings = ModelSettings {
        model_name_or_path: String::new(),
        model_revision: "main".into(),
        tokenizer_name_or_path: None,
        chat_template: None,
        chat_template_path: None,
        eos_token: None,
        init_random: true,
        dtype: WeightDtype::Auto,
        quantization: None,
        lora: None,
        adapter_name_or_path: None,
    };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/bench/qwen25-05b");
    let loaded = load(&folder, &settings, 5, Purpose::Training, &Device::Cpu).unwrap();
    let types = Types::BF16;
    let place = Offload { optimizer: true, types: types.read(), ..Offload::default() };
    let blocks = loaded.blocks.map(|block| Ok::<_, trainer::zero::Error>(block.unwrap()));
    let store = ParamStore::placed(blocks, &device, Sharing::alone(), place).unwrap();
    let computed = store.computed_bytes();
    assert!(computed < 2 * store.num_trainable() + (8 << 20), "{computed} of {}", store.num_trainable());
    let engine = Engine::new(loaded.config, None, store, types, Activations::Recompute);
    let mut optimizer = ShardedOptimizer::new(settings_of_adamw(), engine.store()).unwrap();
    let mut builder = BatchBuilder::new();
    let tokens: Vec<u32> = (0..512).map(|index| index * 37 % 50_000).collect();
    let rows = builder.push(&tokens, 0);
    builder.predict_within(rows);
    let batch = builder.build().unwrap();
    let mut losses = Vec::new();
    for step in 0..3 {
        let mut loss = |_: usize, output: &head::Output| {
            losses.push(-output.logprobs.iter().sum::<f32>());
            let d_logprobs = vec![-1.0 / 511.0; output.logprobs.len()];
            Ok::<_, engine::Error>(HeadGradient { d_logprobs, ..HeadGradient::default() })
        };
        let key = DropoutKey { seed: 4, step };
        engine.accumulate(std::slice::from_ref(&batch), 1.0, Some(key), &mut loss).unwrap();
        assert!(!optimizer.step(engine.store(), 1e-3, 1.0, 1.0).unwrap().is_skipped);
    }
    engine.store().settle().unwrap();
    let footprint = trainer::device::footprint(&device).unwrap();
    println!("{computed} bytes of weights; {footprint:?}; losses {losses:?}");
    assert!(losses[2] < losses[0], "{losses:?}");
    let taken = footprint.tensors + trainer::train::estimate::CONTEXT_ALONE;
    assert!(taken < 3 << 30, "{taken}: {footprint:?}");
}

/// With the optimizer in host memory there is every rule of it.
#[test]
#[ignore = "gpu"]
fn every_rule_of_the_optimizer_works_beside_a_gpu() {
    let (device, place) = (device(), Offload { optimizer: true, ..Offload::default() });
    for kind in [OptimizerKind::AdamW8bit, OptimizerKind::Lion, OptimizerKind::Muon] {
        for tiny in tinies() {
            let engine = || tiny.engine_placed(&device, Types::F32, Sharing::alone(), place.clone());
            let (first, again) = (train(engine(), Order::DepthFirst, kind), train(engine(), Order::BreadthFirst, kind));
            assert_same(&format!("{kind:?}"), &first, &again);
            let before = engine().store().collect_values().unwrap().unwrap();
            assert!(before != first.0 && first.1.iter().all(|norm| norm.is_finite() && *norm > 0.0));
        }
    }
}

/// What a run is made of besides its ranks.
#[derive(Clone, Debug)]
struct Case {
    tiny: Tiny,
    types: Types,
    order: Order,
    stage: ZeroStage,
    place: Offload,
}

/// Runs with everything in one place and, for each, all stages with all places, or one place that is another for each stage.
fn cases(has_all_places: bool) -> Vec<(Results, Vec<Case>)> {
    let mut all = Vec::new();
    for tiny in tinies() {
        let ways = [
            (Types::F32, Order::DepthFirst),
            (Types::F32, Order::Grouped(3)),
            (Types::BF16, Order::BreadthFirst),
            (Types::F16, Order::DepthFirst),
        ];
        for (types, order) in ways {
            let want = train(tiny.engine(&device(), types), order, OptimizerKind::AdamW);
            let mut cases = Vec::new();
            for (number, stage) in STAGES.into_iter().enumerate() {
                let places = places().into_iter().enumerate();
                let chosen = places.filter(|(place, _)| has_all_places || (number + place).is_multiple_of(3));
                cases.extend(chosen.map(|(_, place)| Case { tiny, types, order, stage, place }));
            }
            all.push((want, cases));
        }
    }
    all
}

/// Runs every case on every rank, a thread each with two groups to talk over, and compares with what is wanted.
fn check_ranks<E: Exchange + 'static>(
    world_size: usize,
    cases: &[(Results, Vec<Case>)],
    gpu: impl Fn(usize) -> Device + Sync,
    connect: impl Fn(Threads, &Device) -> E + Sync,
) {
    let (gpu, connect) = (&gpu, &connect);
    let groups = || Threads::group(world_size, DEADLINE).unwrap();
    std::thread::scope(|scope| {
        for (own, ranks) in groups().into_iter().zip(groups()) {
            scope.spawn(move || {
                let device = gpu(ranks.rank());
                let ranks: Arc<dyn Ranks> = Arc::new(ranks);
                let exchange: Arc<Mutex<dyn Exchange>> = Arc::new(Mutex::new(connect(own, &device)));
                for (want, cases) in cases {
                    for case in cases {
                        let Case { tiny, types, order, stage, place } = case.clone();
                        let sharing = sharing(ranks.clone(), Some(exchange.clone()), stage);
                        let engine = tiny.engine_placed(&device, types, sharing, place);
                        let got = train(engine, order, OptimizerKind::AdamW);
                        let what = format!("{case:?} on rank {} of {world_size}", ranks.rank());
                        if ranks.is_first() {
                            assert_same(&what, &got, want);
                        }
                        assert!(got.1 == want.1 && got.2 == want.2, "{what}: {got:?}");
                    }
                }
            });
        }
    });
}

/// Ranks that share a GPU, each with a stream of its own, exchange as ranks with a GPU each do, through the host.
#[test]
#[ignore = "gpu"]
fn ranks_have_the_bits_of_one() {
    let cases = cases(false);
    for world_size in [2, 4] {
        check_ranks(
            world_size,
            &cases,
            |_| trainer::device::open(0).unwrap(),
            |ranks, device| {
                let queue = trainer::device::Queue::of(device).unwrap().beside().unwrap();
                OnHost::over(Arc::new(ranks), queue).unwrap()
            },
        );
    }
}

/// As many ranks as there are GPUs, and one.
#[cfg(feature = "nccl")]
#[test]
#[ignore = "gpu"]
fn ranks_that_speak_nccl_have_the_bits_of_one() {
    let gpus = (0..4).take_while(|&ordinal| trainer::device::is_cuda_device(ordinal)).count();
    let cases = cases(true);
    for world_size in [1, 2, 4].into_iter().filter(|&count| count <= gpus) {
        check_ranks(
            world_size,
            &cases,
            |rank| trainer::device::open(rank).unwrap(),
            |ranks, device| {
                let main = trainer::device::Queue::of(device).unwrap();
                trainer::ranks::nccl::Nccl::connect(Arc::new(ranks), &main, (DEADLINE, false)).unwrap()
            },
        );
    }
}
