use std::sync::Arc;
use std::time::Duration;

use candle_core::{DType, Device, Tensor};

use super::*;
use crate::config::settings::{OptimizerKind, RankSettings, ZeroStage};
use crate::model::params::{BlockInit, BlockParams, Trainable};
use crate::quant::Weight;
use crate::ranks::Ranks;
use crate::ranks::local::Threads;
use crate::zero::{Files, Needs, Offload, ReadTypes, Sharing, Speaker, Sums, Visit};

const DEADLINE: Duration = Duration::from_secs(20);
const EMBEDDING: &str = "model.embed_tokens.weight";

/// Parameters of each block; the last shares the first's table.
fn shapes() -> [Vec<(&'static str, Vec<usize>)>; 3] {
    [
        vec![(EMBEDDING, vec![9, 5])],
        vec![
            ("model.layers.0.input_layernorm.weight", vec![7]),
            ("model.layers.0.self_attn.q_proj.weight", vec![6, 5]),
            ("model.layers.0.self_attn.q_proj.bias", vec![6]),
            ("model.layers.0.mlp.up_proj.weight", vec![11, 3]),
        ],
        vec![("model.norm.weight", vec![3])],
    ]
}

/// The values of a parameter at first, none of which a 16-bit type has.
fn at_first(name: &str, count: usize) -> Vec<f32> {
    (0..count).map(|index| 1.001 + name.len() as f32 + index as f32 * 0.3001).collect()
}

fn store(sharing: Sharing, offload: Offload) -> ParamStore {
    let block = |(number, shapes): (usize, Vec<(&str, Vec<usize>)>)| {
        let trainable = shapes.into_iter().map(|(name, shape)| Trainable {
            name: name.into(),
            values: at_first(name, shape.iter().product()),
            shape,
            has_decay: true,
        });
        let shared = SharedParam { name: "lm_head.weight".into(), of_block: 0, of_name: EMBEDDING.into() };
        let shared = if number == 2 { vec![shared] } else { vec![] };
        Ok::<_, Error>(BlockInit { trainable: trainable.collect(), shared, ..BlockInit::default() })
    };
    ParamStore::placed(shapes().into_iter().enumerate().map(block), &Device::Cpu, sharing, offload).unwrap()
}

/// What a parameter is, times `factor`, in `dtype` if that is given.
fn expected(name: &str, factor: f32, dtype: Option<DType>) -> Vec<f32> {
    let name = if name == "lm_head.weight" { EMBEDDING } else { name };
    let all = shapes().concat();
    let (_, shape) = all.iter().find(|(other, _)| *other == name).unwrap();
    let values: Vec<f32> = at_first(name, shape.iter().product()).iter().map(|value| value * factor).collect();
    rounded(&values, dtype.unwrap_or(DType::F32))
}

fn rounded(values: &[f32], dtype: DType) -> Vec<f32> {
    let tensor = Tensor::from_slice(values, values.len(), &Device::Cpu).unwrap();
    tensor.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

/// Checks every parameter that a block lends: in which type and which values.
#[track_caller]
fn check(params: &BlockParams, types: ReadTypes, factor: f32, what: &str) {
    for (name, slot) in params.iter() {
        let Weight::Dense(tensor) = &slot.weight else { panic!("{name} is trained, and so dense") };
        let dtype = match name {
            EMBEDDING | "lm_head.weight" => types.embedding,
            _ if name.contains("_proj.weight") => types.matrices,
            _ => DType::F32,
        };
        assert_eq!(tensor.dtype(), dtype, "{what}: {name}");
        let got: Vec<f32> = tensor.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap();
        assert_eq!(got, expected(name, factor, Some(dtype)), "{what}: {name}");
    }
    assert!(params.iter().next().is_some());
}

fn check_walk(store: &ParamStore, speaker: Speaker, types: ReadTypes, factor: f32, what: &str) {
    let visit = |block| Visit { block, needs: Needs::Values };
    let mut walk = store.walk((0..3).map(visit).collect(), speaker, Sums::running(0, 0, 1));
    for block in 0..3 {
        check(walk.advance().unwrap().params(), types, factor, &format!("{what}, {speaker:?}, block {block}"));
    }
}

/// A step of an optimizer in its own home: every value times -2.
fn step(store: &ParamStore) {
    let change = |flat: &FlatBlock| {
        flat.stored().load(None)?;
        let own = flat.own_values()?;
        if own.elem_count() > 0 {
            let changed: Vec<f32> = buffer::to_vec(&own)?.iter().map(|value| -2.0 * value).collect();
            buffer::write(&own, &changed)?;
        }
        Ok(())
    };
    for block in 0..3 {
        if let Some(errand) = store.errand(block).unwrap() {
            assert!(errand.run(change));
        }
    }
}

/// Everything that a run does with values, in the order of a run.
fn live(mut store: ParamStore, types: ReadTypes, what: &str) {
    let factor_after = if store.offload().optimizer { -2.0 } else { 1.0 };
    check_walk(&store, Speaker::Policy, types, 1.0, what);
    store.keep_reference().unwrap();
    step(&store);
    check_walk(&store, Speaker::Policy, types, factor_after, what);
    check_walk(&store, Speaker::Reference, types, 1.0, what);
    // What is saved is not rounded.
    let (values, params) = (store.collect_values().unwrap(), store.collect_params().unwrap());
    if let (Some(values), Some(params)) = (values, params) {
        for (block, shapes) in shapes().iter().enumerate() {
            let all: Vec<f32> = shapes.iter().flat_map(|(name, _)| expected(name, factor_after, None)).collect();
            assert_eq!(values[block], all, "{what}");
            check(&params[block], ReadTypes::default(), factor_after, &format!("{what}, saved"));
        }
    }
    check_walk(&store, Speaker::Policy, types, factor_after, what);
    // Where a reference moves it is rounded anew; and what a checkpoint brings is as if it had been there.
    store.mix_reference(1.0).unwrap();
    check_walk(&store, Speaker::Reference, types, factor_after, what);
    for (block, shapes) in shapes().iter().enumerate() {
        let all = |factor| shapes.iter().flat_map(|(name, _)| expected(name, factor, None)).collect::<Vec<f32>>();
        store.write_values(block, &all(3.0)).unwrap();
        store.write_reference(block, &all(5.0)).unwrap();
    }
    check_walk(&store, Speaker::Policy, types, 3.0, what);
    check_walk(&store, Speaker::Reference, types, 5.0, what);
    if store.gather_all(Room::default()).unwrap() {
        let held = store.hold().unwrap().unwrap();
        held.iter().for_each(|params| check(params, types, 3.0, what));
        store.let_go();
    }
}

fn places(folder: &std::path::Path, types: ReadTypes) -> Vec<Offload> {
    let files = |run: &str, parameters: bool| Files {
        optimizer: Some(folder.into()),
        parameters: parameters.then(|| folder.into()),
        run: run.into(),
        buffer_count: 3,
    };
    let optimizer = Offload { optimizer: true, types, ..Offload::default() };
    let both = Offload { params: true, ..optimizer.clone() };
    vec![
        optimizer.clone(),
        both.clone(),
        Offload { files: files("apart", false), ..optimizer },
        Offload { files: files("waits", true), ..both },
    ]
}

fn types() -> [ReadTypes; 3] {
    [
        ReadTypes::default(),
        ReadTypes::of(DType::BF16, DType::BF16),
        // The embedding begins a stream in f32, and is not rounded.
        ReadTypes::of(DType::F16, DType::F32),
    ]
}

#[test]
fn blocks_read_rounded_values_and_what_is_saved_is_not_rounded() {
    let folder = tempfile::tempdir().unwrap();
    for types in types() {
        for place in places(folder.path(), types) {
            let what = format!("{place:?}");
            let store = store(Sharing::alone(), place);
            live(store, types, &what);
        }
    }
}

#[test]
fn ranks_gather_rounded_values() {
    let folder = tempfile::tempdir().unwrap();
    for types in types() {
        let mut all = places(folder.path(), types);
        // Nobody has another home: of stage 3 what is gathered is rounded.
        all.push(Offload { types, ..Offload::default() });
        for place in all {
            for (world_size, stage) in [
                (2, ZeroStage::Replicated),
                (3, ZeroStage::Optimizer),
                (2, ZeroStage::Gradients),
                (2, ZeroStage::Parameters),
                (4, ZeroStage::Parameters),
            ] {
                let place = &place;
                std::thread::scope(|scope| {
                    for ranks in Threads::group(world_size, DEADLINE).unwrap() {
                        scope.spawn(move || {
                            let what = format!("{stage:?}, rank {} of {world_size}, {place:?}", ranks.rank());
                            let ranks: Arc<dyn Ranks> = Arc::new(ranks);
                            let settings =
                                RankSettings { stage, param_persistence_threshold: 4, ..RankSettings::default() };
                            let sharing = Sharing::new(ranks, None, &settings, OptimizerKind::AdamW);
                            let store = store(sharing, place.clone());
                            // What stays where the optimizer moves it is what blocks compute with.
                            let rests = !place.optimizer && stage != ZeroStage::Parameters;
                            live(store, if rests { ReadTypes::default() } else { types }, &what);
                        });
                    }
                });
            }
        }
    }
}

#[test]
fn sizes_are_those_of_the_types_that_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = |types: ReadTypes| {
        let places = places(folder.path(), types);
        places.into_iter().map(|place| {
            let store = store(Sharing::alone(), place);
            let layer = store.layer_bytes();
            let sizes = [store.computed_bytes(), store.visiting_bytes(), store.packed_bytes(), layer.from_host];
            (sizes, store.largest_read_bytes(), store.files().iter().map(|(_, bytes)| *bytes).sum::<u64>())
        })
    };
    let [floats, halves, _] = types();
    // 45 of the table, 7 + 30 + 6 + 33 of the layer, 3 of the norm.
    let full: Vec<_> = bytes(floats).collect();
    assert_eq!(full[0].0, [4 * 124, 0, 0, 0]);
    assert_eq!(full[1].0, [0, 4 * (76 + 45), 0, 4 * 76]);
    assert_eq!((full[2].0, full[2].1), (full[0].0, 4 * 76));
    assert_eq!((full[3].0, full[3].1), (full[1].0, 4 * 76));
    let half: Vec<_> = bytes(halves).collect();
    // Of the layer's matrices the second begins where 128 values end.
    let layer = 2 * (128 + 33) + 4 * (128 + 6);
    assert_eq!(half[0].0, [2 * 45 + layer + 4 * 3, 0, 0, 0]);
    let [computed, visiting, packed, from_host] = half[1].0;
    assert_eq!((computed, visiting), (0, layer + 2 * 45));
    let aligned = (2 * (128 + 33_usize)).max(4 * (128 + 6)).next_multiple_of(64) + layer;
    assert!((layer..=aligned).contains(&from_host), "{from_host}, {layer}");
    assert!(packed >= from_host + 2 * 45 && packed < aligned + 2 * 45 + 64, "{packed}");
    // In files, what is read for a visit is that, beside the f32 values, which the optimizer reads.
    assert_eq!(half[3].0[2], 0);
    assert!(half[3].2 > full[3].2 && half[2].2 == full[2].2);
}
