//! Steps of ranks that are threads, in every order, stage and place of what they share, against one rank: the same bits.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use candle_core::Device;
use trainer::config::settings::{LoraSettings, OptimizerKind, OptimizerSettings, RankSettings, ZeroStage};
use trainer::engine::{self, DropoutKey, Engine, Order, Speaker};
use trainer::model::HeadGradient;
use trainer::model::batch::Batch;
use trainer::ops::{buffer, head};
use trainer::quant::Weight;
use trainer::ranks::local::Threads;
use trainer::ranks::{self, Ranks, tcp};
use trainer::zero::{self, Files, Offload, ParamStore, ShardedOptimizer, Sharing};

use super::{engine_of, engine_with, kinds, packed, sequence};

const DEADLINE: Duration = Duration::from_mins(1);
/// Of all ranks together.
const MICRO_BATCHES: usize = 12;
const STEPS: u64 = 3;
const OPTIMIZER: OptimizerSettings = OptimizerSettings {
    kind: OptimizerKind::AdamW,
    weight_decay: 0.1,
    adam_beta1: 0.9,
    adam_beta2: 0.999,
    adam_epsilon: 1e-8,
};
const STAGES: [ZeroStage; 4] =
    [ZeroStage::Replicated, ZeroStage::Optimizer, ZeroStage::Gradients, ZeroStage::Parameters];
const ORDERS: [Order; 4] = [Order::DepthFirst, Order::Grouped(2), Order::Grouped(5), Order::BreadthFirst];

/// Micro-batches of several lengths, one in six of them without a target.
fn micro_batch(step: u64, index: usize) -> Batch {
    let item = 100 * step + index as u64;
    let length = if index % 6 == 1 { 1 } else { 4 + (7 * index + step as usize) % 17 };
    packed(&[(item, sequence(length, item))])
}

fn places() -> Vec<Offload> {
    let nothing = Offload::default();
    let optimizer = Offload { optimizer: true, ..nothing.clone() };
    let both = Offload { params: true, persistence_threshold: 100, ..optimizer.clone() };
    let filed = Offload { files: files(false), ..optimizer.clone() };
    let all_filed = Offload { files: files(true), persistence_threshold: 0, ..both.clone() };
    vec![nothing.clone(), Offload { params: true, ..nothing }, optimizer, both, filed, all_filed]
}

/// A file for the optimizer of each rank, and one for parameters if they lie in files too, with a name that no other test has.
fn files(parameters: bool) -> Files {
    static MADE: AtomicUsize = AtomicUsize::new(0);
    let folder = Some(std::env::temp_dir());
    let run = format!("equal-{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
    Files { optimizer: folder.clone(), parameters: folder.filter(|_| parameters), run, buffer_count: 3 }
}

/// What is the same on all ranks of a run.
#[derive(Clone, Debug)]
struct Case {
    kind: (&'static str, Option<LoraSettings>),
    stage: ZeroStage,
    place: Offload,
    order: Option<Order>,
}

impl Case {
    /// An engine over this rank's part of the blocks, with the values of [`engine_of`].
    fn engine(&self, ranks: Arc<dyn Ranks>) -> Engine {
        let (architecture, lora) = self.kind.clone();
        let whole = engine_of(architecture, lora.clone(), true);
        let settings = RankSettings { stage: self.stage, param_persistence_threshold: 100, ..RankSettings::default() };
        let sharing = Sharing::new(ranks, None, &settings, OptimizerKind::AdamW);
        let mut engine = engine_with(architecture, lora, true, |blocks| {
            ParamStore::placed(blocks, &Device::Cpu, sharing, self.place.clone())
        });
        for (block, flat) in whole.store().flats().enumerate().filter(|(_, flat)| !flat.is_empty()) {
            engine.store().write_values(block, &buffer::to_vec(&flat.values().unwrap()).unwrap()).unwrap();
        }
        engine.force_order(self.order);
        engine
    }
}

/// What a run comes to on a rank: trained values by block (on the first rank), and whatever all of them see.
#[derive(Clone, Debug, Default, PartialEq)]
struct Results {
    values: Vec<Vec<f32>>,
    norms: Vec<f32>,
    logprobs: Vec<f32>,
}

/// Forward and backward of a step, with gradients as large as `size`.
fn accumulate(engine: &Engine, step: u64, batches: &[Batch], size: f32) -> Result<(), engine::Error> {
    let mut loss = |_: usize, output: &head::Output| {
        let d_logprobs = vec![size; output.logprobs.len()];
        Ok::<_, engine::Error>(HeadGradient { d_logprobs, ..HeadGradient::default() })
    };
    engine.accumulate(batches, 1.0, Some(DropoutKey { seed: 4, step }), &mut loss)
}

/// This rank's share of so many micro-batches.
fn share(ranks: &dyn Ranks, count: usize) -> Range<usize> {
    let each = count / ranks.world_size();
    each * ranks.rank()..each * (ranks.rank() + 1)
}

/// Log-probabilities of three batches on the first rank, of fewer on others: one has none, and helps with blocks alone.
fn logprobs(engine: &Engine, speaker: Speaker) -> Vec<f32> {
    let (rank, batches) = (engine.store().sharing().rank(), [0, 2, 3].map(|index| micro_batch(99, index)));
    let own = &batches[..[3, 0, 2, 1][rank]];
    let outputs = engine.logprobs(own, speaker, 1.0).unwrap();
    outputs.iter().flat_map(|output| output.logprobs.clone()).collect()
}

/// What another rank sees of log-probabilities that the first one sees all of.
#[track_caller]
fn assert_starts_alike(own: &[f32], all: &[f32], what: &str) {
    assert!(own.len() <= all.len() && own == &all[..own.len()], "{what}");
}

/// Some steps, of which one is left out because a gradient is not finite and one is first given up among the blocks.
fn train(mut engine: Engine) -> Results {
    let asked = Arc::new(AtomicUsize::new(usize::MAX));
    let left = asked.clone();
    // As often as was said, on all ranks alike.
    engine.ask_whether_interrupted(Arc::new(move || left.fetch_sub(1, Ordering::Relaxed) == 1));
    let sharing = engine.store().sharing().clone();
    let own = share(sharing.ranks(), MICRO_BATCHES);
    let mut optimizer = ShardedOptimizer::new(OPTIMIZER, engine.store()).unwrap();
    let mut results = Results::default();
    for step in 0..STEPS {
        let batches: Vec<Batch> = own.clone().map(|index| micro_batch(step, index)).collect();
        if step == 1 {
            accumulate(&engine, step, &batches, f32::INFINITY).unwrap();
            let report = optimizer.step(engine.store(), 1e-2, 0.5, 1.0).unwrap();
            assert!(report.is_skipped && optimizer.steps() == 1);
        }
        if step == 2 {
            // After the second layer, when the values of the first blocks have come and those of the last have not.
            asked.store(2, Ordering::Relaxed);
            let given_up = accumulate(&engine, step, &batches, -0.01).unwrap_err();
            assert!(matches!(given_up, engine::Error::Interrupted), "{given_up}");
            asked.store(usize::MAX, Ordering::Relaxed);
        }
        accumulate(&engine, step, &batches, -0.01).unwrap();
        let report = optimizer.step(engine.store(), 1e-2, 0.5, 1.0).unwrap();
        assert!(!report.is_skipped);
        results.norms.push(report.grad_norm);
        if step == 1 {
            results.logprobs.extend(logprobs(&engine, Speaker::Policy));
        }
    }
    // What is saved right after a step is what the step made.
    let saved = engine.store().collect_params().unwrap();
    results.values = engine.store().collect_values().unwrap().unwrap_or_default();
    for (block, (flat, values)) in engine.store().flats().zip(&results.values).enumerate() {
        for entry in flat.entries() {
            let weight = &saved.as_ref().unwrap()[block].get(&entry.name).unwrap().weight;
            let Weight::Dense(tensor) = weight else { panic!("{} is trained, and so dense", entry.name) };
            let tensor = tensor.flatten_all().unwrap();
            assert!(buffer::to_vec(&tensor).unwrap() == values[entry.range.clone()], "{} as it was saved", entry.name);
        }
    }
    results
}

/// Runs `work` on every rank of a group, and returns what it comes to in their order.
fn on_ranks<T: Send>(world_size: usize, work: impl Fn(Arc<dyn Ranks>) -> T + Sync) -> Vec<T> {
    let work = &work;
    std::thread::scope(|scope| {
        let group = Threads::group(world_size, DEADLINE).unwrap();
        let handles: Vec<_> =
            group.into_iter().map(|ranks| scope.spawn(move || work(Arc::new(ranks) as Arc<dyn Ranks>))).collect();
        handles.into_iter().map(|handle| handle.join().unwrap()).collect()
    })
}

/// Every stage with every place, each with another order and number of ranks.
fn cases(kind: &(&'static str, Option<LoraSettings>)) -> Vec<(usize, Case)> {
    let mut cases = Vec::new();
    for (number, stage) in STAGES.into_iter().enumerate() {
        for (index, place) in places().into_iter().enumerate() {
            let order = Some(ORDERS[(number + index) % ORDERS.len()]);
            let world_size = 2 + (2 * number + index) % 3;
            cases.push((world_size, Case { kind: kind.clone(), stage, place, order }));
        }
    }
    cases
}

fn alone() -> Arc<dyn Ranks> {
    Arc::new(ranks::Alone)
}

fn in_one_place(kind: &(&'static str, Option<LoraSettings>)) -> Case {
    Case { kind: kind.clone(), stage: ZeroStage::Replicated, place: Offload::default(), order: Some(Order::DepthFirst) }
}

#[test]
fn ranks_have_the_bits_of_one_in_every_order_stage_and_place() {
    for kind in kinds() {
        let want = train(in_one_place(&kind).engine(alone()));
        assert!(want.norms.iter().all(|norm| *norm > 0.0) && !want.logprobs.is_empty());
        for (world_size, case) in cases(&kind) {
            let got = on_ranks(world_size, |ranks| train(case.engine(ranks)));
            for (rank, got) in got.iter().enumerate() {
                let what = format!("{case:?} on rank {rank} of {world_size}");
                assert_eq!(got.norms, want.norms, "{what}");
                assert_starts_alike(&got.logprobs, &want.logprobs, &what);
                assert!(got.values == if rank == 0 { want.values.clone() } else { Vec::new() }, "{what}: values");
            }
            assert_eq!(got[0].logprobs, want.logprobs, "{case:?}");
        }
        // One rank whose optimizer has a home elsewhere.
        for place in places() {
            let case = Case { place, ..in_one_place(&kind) };
            assert!(train(case.engine(alone())) == want, "{case:?}");
        }
    }
}

/// After a step ranks speak, or not, and none waits for another: all is there before.
#[test]
fn ranks_that_generate_do_not_wait_for_each_other() {
    /// Longer than it takes to speak, and less than ranks wait for each other.
    const MOST: Duration = Duration::from_secs(20);
    for kind in &kinds()[..2] {
        for (world_size, case) in cases(kind) {
            let has_spoken = AtomicBool::new(false);
            let speaks = on_ranks(world_size, |ranks| {
                let mut engine = case.engine(ranks);
                let own = share(engine.store().sharing().ranks(), MICRO_BATCHES);
                let mut optimizer = ShardedOptimizer::new(OPTIMIZER, engine.store()).unwrap();
                let batches: Vec<Batch> = own.map(|index| micro_batch(0, index)).collect();
                accumulate(&engine, 0, &batches, -0.01).unwrap();
                optimizer.step(engine.store(), 1e-2, 0.5, 1.0).unwrap();
                engine.store_mut().gather_all(zero::Room::default()).unwrap();
                let is_first = engine.store().sharing().rank() == 0;
                let said = is_first.then(|| {
                    assert!(engine.store().hold().unwrap().is_some());
                    engine.logits(&micro_batch(9, 0), Speaker::Policy).unwrap().to_vec2::<f32>().unwrap()
                });
                has_spoken.fetch_or(is_first, Ordering::Relaxed);
                let started = Instant::now();
                while !has_spoken.load(Ordering::Relaxed) {
                    assert!(started.elapsed() < MOST, "the first rank waits for this one");
                    std::thread::sleep(Duration::from_millis(1));
                }
                engine.store_mut().let_go();
                let rest = logprobs(&engine, Speaker::Policy);
                (said, rest)
            });
            let (said, all) = &speaks[0];
            assert!(said.as_ref().unwrap().iter().flatten().all(|logit| logit.is_finite()), "{case:?}");
            speaks.iter().for_each(|(_, own)| assert_starts_alike(own, all, &format!("{case:?}")));
        }
    }
}

/// The reference is that of the start, moved when it is told to, wherever values are.
#[test]
fn a_kept_reference_is_the_same_on_ranks() {
    let run = |mut engine: Engine| {
        engine.store_mut().keep_reference().unwrap();
        let mut optimizer = ShardedOptimizer::new(OPTIMIZER, engine.store()).unwrap();
        let own = share(engine.store().sharing().ranks(), MICRO_BATCHES);
        let mut said = Vec::new();
        for step in 0..2 {
            let batches: Vec<Batch> = own.clone().map(|index| micro_batch(step, index)).collect();
            accumulate(&engine, step, &batches, -0.01).unwrap();
            optimizer.step(engine.store(), 1e-2, 0.5, 1.0).unwrap();
            said.push(logprobs(&engine, Speaker::Reference));
            engine.store().mix_reference(0.6).unwrap();
        }
        said.push(logprobs(&engine, Speaker::Reference));
        said.push(logprobs(&engine, Speaker::Policy));
        (said, engine.store().collect_references().unwrap())
    };
    for kind in [&kinds()[0], &kinds()[2]] {
        let (want, references) = run(in_one_place(kind).engine(alone()));
        assert!(want[0] != want[1] && want[2] != want[3]);
        for (world_size, case) in cases(kind) {
            let got = on_ranks(world_size, |ranks| run(case.engine(ranks)));
            assert_eq!(got[0].0, want, "{case:?}");
            assert_eq!(got[0].1, references, "{case:?}");
            for (own, _) in &got[1..] {
                own.iter().zip(&want).for_each(|(own, all)| assert_starts_alike(own, all, &format!("{case:?}")));
            }
        }
    }
}

/// A signal comes to one rank between two blocks, while values of the optimizer's last step still come with the walk.
#[test]
fn ranks_leave_a_walk_while_values_come_with_it_and_go_on_as_if_they_had_not() {
    const WORLD_SIZE: usize = 3;
    let optimizer = Offload { optimizer: true, ..Offload::default() };
    let run = |case: &Case, ranks: Arc<dyn Ranks>, after: Option<usize>| {
        let mut engine = case.engine(ranks.clone());
        let asked = Arc::new(AtomicUsize::new(usize::MAX));
        let left = asked.clone();
        engine.ask_whether_interrupted(Arc::new(move || left.fetch_sub(1, Ordering::Relaxed) == 1));
        let mut optimizer = ShardedOptimizer::new(OPTIMIZER, engine.store()).unwrap();
        for step in 0..2 {
            let own = share(&*ranks, MICRO_BATCHES);
            let batches: Vec<Batch> = own.map(|index| micro_batch(step, index)).collect();
            if let Some(after) = after.filter(|_| step == 1) {
                // The others are not asked to stop, and hear of it where they wait for this rank.
                asked.store(if ranks.rank() == 1 { after } else { usize::MAX }, Ordering::Relaxed);
                match accumulate(&engine, step, &batches, -0.01).unwrap_err() {
                    engine::Error::Interrupted => assert_eq!(ranks.rank(), 1),
                    engine::Error::Store(zero::Error::Ranks(ranks::Error::StartOver { .. })) => {
                        assert_ne!(ranks.rank(), 1);
                    }
                    other => panic!("{other}"),
                }
                asked.store(usize::MAX, Ordering::Relaxed);
                ranks.start_over().unwrap();
                // What was made is saved, and another run goes on.
                engine.store().collect_values().unwrap();
            }
            accumulate(&engine, step, &batches, -0.01).unwrap();
            optimizer.step(engine.store(), 1e-2, 0.5, 1.0).unwrap();
        }
        engine.store().collect_values().unwrap()
    };
    let kind = &kinds()[1];
    for (stage, order) in [
        (ZeroStage::Optimizer, Order::DepthFirst),
        (ZeroStage::Gradients, Order::BreadthFirst),
        (ZeroStage::Parameters, Order::Grouped(2)),
    ] {
        let case = Case { kind: kind.clone(), stage, place: optimizer.clone(), order: Some(order) };
        let want = on_ranks(WORLD_SIZE, |ranks| run(&case, ranks, None));
        assert!(want[0].is_some());
        for after in [1, 2, 4, 6] {
            let port = tcp::free_port().unwrap();
            let got: Vec<_> = std::thread::scope(|scope| {
                let of_rank = |rank| {
                    let (address, host, case) = (("127.0.0.1".into(), port), format!("node{rank}"), &case);
                    let meeting = tcp::Meeting { rank, world_size: WORLD_SIZE, address, host, deadline: DEADLINE };
                    scope.spawn(move || run(case, Arc::new(tcp::connect(&meeting).unwrap()), Some(after)))
                };
                let handles: Vec<_> = (0..WORLD_SIZE).map(of_rank).collect();
                handles.into_iter().map(|handle| handle.join().unwrap()).collect()
            });
            assert!(got == want, "{case:?} after {after}");
        }
    }
}

/// Ranks agree on a step in which each has another number of micro-batches, and one has none.
#[test]
fn a_rank_with_fewer_micro_batches_or_none_goes_through_the_blocks_with_the_others() {
    let counts = [4, 1, 0];
    let own = |rank: usize, count: usize| -> Vec<Batch> {
        (0..count).map(|index| micro_batch(rank as u64, 2 * index)).collect()
    };
    for kind in &kinds()[..2] {
        let gradients = |case: &Case, world_size: usize, count: &(dyn Fn(usize) -> usize + Sync)| {
            let norms = on_ranks(world_size, |ranks| {
                let rank = ranks.rank();
                let engine = case.engine(ranks);
                let batches = own(rank, count(rank));
                let order = engine.order_of(&batches).unwrap();
                accumulate(&engine, 0, &batches, -0.01).unwrap();
                let mut optimizer = ShardedOptimizer::new(OPTIMIZER, engine.store()).unwrap();
                let norm = optimizer.step(engine.store(), 1e-2, 0.0, 1.0).unwrap().grad_norm;
                (order, norm, engine.store().collect_values().unwrap())
            });
            assert!(norms.iter().all(|(order, norm, _)| (*order, *norm) == (norms[0].0, norms[0].1)), "{norms:?}");
            assert!(norms[0].1 > 0.0);
            norms.into_iter().next().unwrap()
        };
        // The order that they agree on is the same, and so are the sums, in every stage.
        let mut all = Vec::new();
        for stage in STAGES {
            for order in [None, Some(Order::DepthFirst), Some(Order::Grouped(3)), Some(Order::BreadthFirst)] {
                let case = Case { kind: kind.clone(), stage, place: Offload::default(), order };
                let (taken, norm, values) = gradients(&case, 3, &|rank| counts[rank]);
                if let Some(order) = order {
                    assert_eq!(taken, order);
                }
                if stage == ZeroStage::Parameters && order.is_none() {
                    assert_eq!(taken, Order::BreadthFirst, "blocks come one at a time");
                }
                all.push((norm, values));
            }
        }
        assert!(all.iter().all(|one| *one == all[0]));
        // Micro-batches that are missing at the end change nothing, and all that are there count.
        let case = Case { stage: ZeroStage::Gradients, order: Some(Order::Grouped(3)), ..in_one_place(kind) };
        let fewer = gradients(&case, 2, &|rank| counts[rank]);
        assert!(all[0] == (fewer.1, fewer.2), "a rank with none changes nothing");
        let engine = in_one_place(kind).engine(alone());
        let step: Vec<Batch> = [(0, 4), (1, 1)].into_iter().flat_map(|(rank, count)| own(rank, count)).collect();
        accumulate(&engine, 0, &step, -0.01).unwrap();
        let mut optimizer = ShardedOptimizer::new(OPTIMIZER, engine.store()).unwrap();
        let norm = optimizer.step(engine.store(), 1e-2, 0.0, 1.0).unwrap().grad_norm;
        assert!(all[0] == (norm, engine.store().collect_values().unwrap()), "one rank has the same of them all");
    }
}
