//! A training pass on the GPU against the CPU's in f32: every type, with adapters on all projections, on some and on none, and
//! whatever becomes of activations.

use candle_core::Device;
use trainer::config::settings::Projection;
use trainer::engine::{self, Activations, DropoutKey, Engine, Order, StepLoss, Types};
use trainer::kernels::cuda::{set_deterministic, start_choices, try_noted};
use trainer::model::HeadGradient;
use trainer::model::batch::{Batch, BatchBuilder};
use trainer::ops::{buffer, head};
use trainer::rng::Stream;
use trainer::zero::Slots;

use crate::support::{assert_close, device, seed};
use crate::tiny::{Tiny, VOCABULARY};

/// Relative errors of a block's gradients: sums in another order; activations and gradients rounded to 16 bits (8 bits of
/// mantissa in bf16, 11 in f16) some ten times on their way through three layers.
const TOLERANCES: [(Types, f32); 3] = [(Types::F32, 1e-4), (Types::BF16, 8e-2), (Types::F16, 1e-2)];
/// Lifts f16's small gradients above its smallest numbers, as the loss scaler does.
pub(crate) const LOSS_SCALE: f64 = 256.0;

/// Packed sequences and a group that shares its prompt.
pub(crate) fn batch() -> Batch {
    let tokens = |length: usize, item: u64| -> Vec<u32> {
        let mut stream = Stream::new(seed(), "gradient tests", 0, item);
        (0..length).map(|_| stream.below(VOCABULARY) as u32).collect()
    };
    let mut builder = BatchBuilder::new();
    for (item, length) in [(0, 33), (1, 1), (2, 70)] {
        let rows = builder.push(&tokens(length, item), item);
        builder.predict_within(rows);
    }
    let prompt = builder.push(&tokens(20, 3), 3);
    for item in 4..7 {
        let rows = builder.push_after(prompt.clone(), &tokens(9, item), item);
        builder.predict_within(rows);
    }
    builder.build().unwrap()
}

/// Gradients of the mean log-probability, by block; once with the gradient known before and once without.
pub(crate) fn gradients(engine: &Engine, batch: &Batch, scale: f64) -> [Vec<Vec<f32>>; 2] {
    let count = batch.targets.len();
    let gradient =
        || HeadGradient { d_logprobs: vec![1.0 / count as f32; count], ..HeadGradient::default() }.scaled(scale);
    let dropout = Some(DropoutKey { seed: 9, step: 2 });
    let read = || -> Vec<Vec<f32>> {
        let unscaled = |grads: Vec<f32>| grads.into_iter().map(|g| (f64::from(g) / scale) as f32).collect();
        engine.store().flats().map(|flat| unscaled(buffer::to_vec(flat.grads()).unwrap())).collect()
    };
    let step = std::slice::from_ref(batch);
    engine.accumulate(step, 0.9, dropout, &mut Known(gradient())).unwrap();
    let known = read();
    let mut asked = |_: usize, _: &head::Output| Ok::<_, engine::Error>(gradient());
    engine.accumulate(step, 0.9, dropout, &mut asked).unwrap();
    [known, read()]
}

/// A loss whose gradient is known before the forward pass.
struct Known(HeadGradient);

impl StepLoss<engine::Error> for Known {
    fn known(&self, _micro_step: usize) -> Option<HeadGradient> {
        Some(self.0.clone())
    }

    fn gradient(&mut self, _micro_step: usize, _output: &head::Output) -> Result<HeadGradient, engine::Error> {
        Ok(self.0.clone())
    }
}

#[test]
#[ignore = "gpu"]
fn gradients_are_those_of_the_cpu() {
    let batch = batch();
    let some: &[Projection] = &[Projection::QProj, Projection::VProj];
    for (architecture, head_dim, adapters, dropout) in [
        ("qwen2", 64, &Projection::ALL[..], 0.0),
        ("qwen3", 24, &Projection::ALL[..], 0.3),
        ("qwen2", 16, some, 0.0),
        ("qwen3", 64, some, 0.3),
        ("qwen2", 64, &[], 0.0),
        ("qwen3", 16, &[], 0.0),
    ] {
        let tiny = Tiny { architecture, head_dim, adapters, dropout };
        let [want, _] = gradients(&tiny.engine(&Device::Cpu, Types::F32), &batch, 1.0);
        for (types, tolerance) in TOLERANCES {
            let mut engine = tiny.engine(&device(), types);
            for (activations, layers) in [
                (Activations::Keep, usize::MAX),
                (Activations::Recompute, usize::MAX),
                (Activations::Offload, usize::MAX),
                (Activations::Offload, 1),
            ] {
                engine.set_activations(activations);
                engine.set_recomputed_layers(layers);
                for (kind, got) in ["known", "asked for"].iter().zip(gradients(&engine, &batch, LOSS_SCALE)) {
                    for (block, (got, want)) in got.iter().zip(&want).enumerate().filter(|(_, (_, w))| !w.is_empty()) {
                        let what = format!("{tiny:?} in {types:?}, {activations:?} of {layers}, {kind}, block {block}");
                        assert_close(&what, got, want, tolerance);
                    }
                }
            }
        }
    }
}

/// From some thousand tokens on more is kept (the last layer, gate and up of some rows), from some more on less (the products
/// before attention).
#[test]
#[ignore = "gpu"]
fn what_becomes_of_the_activations_of_large_batches_changes_no_gradient() {
    for (tokens, architecture) in [(4100, "qwen2"), (4100, "qwen3"), (16_400, "qwen2")] {
        let mut builder = BatchBuilder::new();
        for item in 0..10 {
            let mut stream = Stream::new(seed(), "large gradient tests", tokens, item);
            let sequence: Vec<u32> = (0..tokens / 10).map(|_| stream.below(VOCABULARY) as u32).collect();
            let rows = builder.push(&sequence, item);
            builder.predict_within(rows);
        }
        let batch = builder.build().unwrap();
        let tiny = Tiny { architecture, head_dim: 16, adapters: &Projection::ALL, dropout: 0.0 };
        let mut engine = tiny.engine(&device(), Types::F32);
        engine.set_activations(Activations::Keep);
        let [want, _] = gradients(&engine, &batch, 1.0);
        for activations in [Activations::Recompute, Activations::Offload] {
            engine.set_activations(activations);
            let [got, _] = gradients(&engine, &batch, 1.0);
            for (block, (got, want)) in got.iter().zip(&want).enumerate().filter(|(_, (_, w))| !w.is_empty()) {
                let what = format!("{tokens} tokens, {architecture}, {activations:?}, block {block}");
                assert_close(&what, got, want, 1e-5);
            }
        }
    }
}

/// What a run does by default on a large batch: algorithms by timing, attention's gradients in no fixed order, 16 bits.
#[test]
#[ignore = "gpu"]
fn gradients_of_large_batches_in_16_bits_are_those_in_f32() {
    let mut builder = BatchBuilder::new();
    for item in 0..4 {
        let mut stream = Stream::new(seed(), "large 16-bit gradient tests", 0, item);
        let sequence: Vec<u32> = (0..1100).map(|_| stream.below(VOCABULARY) as u32).collect();
        let rows = builder.push(&sequence, item);
        builder.predict_within(rows);
    }
    let batch = builder.build().unwrap();
    let some: &[Projection] = &[Projection::QProj, Projection::DownProj];
    let gate: &[Projection] = &[Projection::GateProj];
    for (adapters, dropout) in [(&Projection::ALL[..], 0.0), (&Projection::ALL[..], 0.3), (some, 0.0), (gate, 0.0)] {
        let tiny = Tiny { architecture: "qwen2", head_dim: 128, adapters, dropout };
        let mut exact = tiny.engine(&device(), Types::F32);
        exact.set_activations(Activations::Keep);
        let [want, _] = gradients(&exact, &batch, 1.0);
        for (types, tolerance) in TOLERANCES.into_iter().skip(1) {
            let mut engine = tiny.engine(&device(), types);
            set_deterministic(engine.device(), false).unwrap();
            start_choices(engine.device(), true).unwrap();
            for (activations, layers) in [(Activations::Keep, 9), (Activations::Offload, 9), (Activations::Offload, 1)]
            {
                engine.set_activations(activations);
                engine.set_recomputed_layers(layers);
                let [got, _] = gradients(&engine, &batch, LOSS_SCALE);
                try_noted(engine.device(), 0, &|| false).unwrap();
                for (block, (got, want)) in got.iter().zip(&want).enumerate().filter(|(_, (_, w))| !w.is_empty()) {
                    let what = format!("{tiny:?} in {types:?}, {activations:?} of {layers}, block {block}");
                    assert_close(&what, got, want, tolerance);
                }
            }
            start_choices(engine.device(), false).unwrap();
            set_deterministic(engine.device(), true).unwrap();
        }
    }
}

/// Layers are copied into a slot for each visit, from host memory or from the device's own, and made NaN after it.
#[test]
#[ignore = "gpu"]
fn layers_in_slots_have_the_gradients_of_resident_ones() {
    let (batch, slots) = (batch(), Some(Slots { most_live: 1, is_spoiled: true }));
    for adapters in [&Projection::ALL[..], &[]] {
        let tiny = Tiny { architecture: "qwen2", head_dim: 64, adapters, dropout: 0.0 };
        for (types, _) in TOLERANCES {
            let want = gradients(&tiny.engine(&device(), types), &batch, LOSS_SCALE);
            for home in [Device::Cpu, device()] {
                let mut lent = tiny.engine_in(&device(), types, &home, slots);
                for order in [Order::DepthFirst, Order::BreadthFirst] {
                    lent.force_order(Some(order));
                    // The second pass reads what the first would have spoiled.
                    let got = gradients(&lent, &batch, LOSS_SCALE);
                    assert!(got == want, "{tiny:?} in {types:?}, {order:?}, from {:?}", home.location());
                }
            }
        }
    }
}

/// Threads with a stream each launch the same kernels at the same time, with other sizes of shared memory.
#[test]
#[ignore = "gpu"]
fn passes_of_several_threads_do_not_disturb_each_other() {
    let batch = batch();
    std::thread::scope(|scope| {
        for head_dim in [16, 24, 64, 128] {
            let batch = &batch;
            scope.spawn(move || {
                let tiny = Tiny { architecture: "qwen3", head_dim, adapters: &Projection::ALL, dropout: 0.0 };
                for types in [Types::F32, Types::BF16] {
                    let engine = tiny.engine(&device(), types);
                    let [want, _] = gradients(&engine, batch, LOSS_SCALE);
                    for _ in 0..50 {
                        assert!(gradients(&engine, batch, LOSS_SCALE)[0] == want, "{tiny:?} in {types:?}");
                    }
                }
            });
        }
    });
}
