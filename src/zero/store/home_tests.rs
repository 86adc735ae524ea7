use std::sync::Arc;
use std::time::Duration;

use candle_core::Device;

use super::*;
use crate::config::settings::{OptimizerKind, OptimizerSettings, RankSettings, ZeroStage};
use crate::model::params::{BlockInit, BlockParams, Trainable};
use crate::quant::Weight;
use crate::ranks::Ranks;
use crate::ranks::local::Threads;
use crate::zero::{Files, Needs, Offload, ShardedOptimizer, Sharing, Speaker, Sums, Visit, Walk};

const DEADLINE: Duration = Duration::from_secs(20);
/// Values of the parameters of each block; the last has fewer than there are ranks.
const COUNTS: [&[usize]; 3] = [&[5, 3, 4, 8], &[7, 2, 9], &[1]];

fn store(sharing: Sharing) -> ParamStore {
    store_with(sharing, Files::default())
}

/// As [`store`], with some of it in files.
fn store_with(sharing: Sharing, files: Files) -> ParamStore {
    let block = |(number, counts): (usize, &&[usize])| {
        let trainable = |(index, &count): (usize, &usize)| {
            let values = (0..count).map(|value| (100 * number + 10 * index + value) as f32).collect();
            Trainable { name: format!("{number}.{index}"), shape: vec![count], values, has_decay: true }
        };
        let trainable = counts.iter().enumerate().map(trainable).collect();
        Ok::<_, Error>(BlockInit { trainable, ..BlockInit::default() })
    };
    let offload = Offload { optimizer: true, files, ..Offload::default() };
    ParamStore::placed(COUNTS.iter().enumerate().map(block), &Device::Cpu, sharing, offload).unwrap()
}

fn walk(store: &ParamStore) -> Walk<'_> {
    let visit = |block| Visit { block, needs: Needs::Values };
    store.walk((0..COUNTS.len()).map(visit).collect(), Speaker::Policy, Sums::running(0, 0, 1))
}

fn values_of(params: &BlockParams) -> Vec<f32> {
    let values = |weight: &Weight| match weight {
        Weight::Dense(tensor) => buffer::to_vec(tensor).unwrap(),
        packed => panic!("{packed:?} is trained, and so dense"),
    };
    params.iter().flat_map(|(_, slot)| values(&slot.weight)).collect()
}

/// What a step of the tests does to values.
fn negate(flat: &FlatBlock) -> Result<(), Error> {
    let own = flat.own_values()?;
    let negated: Vec<f32> = buffer::to_vec(&own)?.iter().map(|value| -value).collect();
    Ok(buffer::write(&own, &negated)?)
}

/// All values of a block before any step.
fn at_first(block: usize) -> Vec<f32> {
    values_of(walk(&store(Sharing::alone())).nth(block).params())
}

impl<'s> Walk<'s> {
    fn nth(mut self, block: usize) -> crate::zero::Lease<'s> {
        (0..block).for_each(|_| drop(self.advance().unwrap()));
        self.advance().unwrap()
    }
}

#[test]
fn what_keeps_the_optimizer_from_moving_values_is_the_error_of_who_waits_for_them() {
    let store = store(Sharing::alone());
    let [first, second, third] = [0, 1, 2].map(|block| store.errand(block).unwrap().unwrap());
    assert!(first.run(negate));
    assert!(!second.run(|_| Err(Error::IsCut { block: 77 })));
    // Its thread has ended.
    drop(third);
    let mut walk = walk(&store);
    assert!(values_of(walk.advance().unwrap().params()).iter().all(|value| *value <= 0.0));
    assert!(walk.advance().unwrap_err().to_string().contains("block 77"));
    assert!(walk.advance().unwrap_err().to_string().contains("given up"));
    // Values that were not moved are not to be had, and not to be saved.
    assert!(store.settle().unwrap_err().to_string().contains("given up"));
    assert!(store.collect_values().is_err());
}

#[test]
fn what_is_wrong_with_a_file_of_the_optimizer_is_the_error_of_who_waits_for_the_values() {
    let folder = tempfile::tempdir().unwrap();
    let files = Files { optimizer: Some(folder.path().into()), run: "errands".into(), ..Files::default() };
    let store = store_with(Sharing::alone(), files);
    let settings = OptimizerSettings {
        kind: OptimizerKind::AdamW,
        weight_decay: 0.1,
        adam_beta1: 0.9,
        adam_beta2: 0.999,
        adam_epsilon: 1e-8,
    };
    let mut optimizer = ShardedOptimizer::new(settings, &store).unwrap();
    let mut step = || optimizer.step(&store, 0.5, 0.0, 1.0);
    // Without gradients values decay.
    step().unwrap();
    let decayed: Vec<f32> = at_first(0).iter().map(|value| value * (1.0 - 0.5 * 0.1)).collect();
    assert_eq!(values_of(walk(&store).nth(0).params()), decayed);
    let (path, bytes) = store.files().into_iter().next().unwrap();
    assert!(bytes > 0);
    store.settle().unwrap();
    // What the step before still wrote may come after the cut.
    let error = (0..100).find_map(|_| {
        std::fs::File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
        step().unwrap();
        walk(&store).advance().err()
    });
    let error = error.unwrap().to_string();
    assert!(error.contains("cannot read") && error.contains("cut short"), "{error}");
}

#[test]
fn a_block_waits_for_its_own_values_and_for_no_others() {
    let store = store(Sharing::alone());
    let [first, second] = [0, 1].map(|block| store.errand(block).unwrap().unwrap());
    assert!(first.run(negate));
    let mut walk = walk(&store);
    assert_eq!(values_of(walk.advance().unwrap().params()), at_first(0).iter().map(|v| -v).collect::<Vec<_>>());
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            assert!(second.run(negate));
        });
        let lease = walk.advance().unwrap();
        assert_eq!(values_of(lease.params()), at_first(1).iter().map(|v| -v).collect::<Vec<_>>());
    });
    assert_eq!(values_of(walk.advance().unwrap().params()), at_first(2));
}

fn on_ranks(world_size: usize, stage: ZeroStage, work: impl Fn(&ParamStore) + Sync) {
    let work = &work;
    std::thread::scope(|scope| {
        for ranks in Threads::group(world_size, DEADLINE).unwrap() {
            scope.spawn(move || {
                let ranks: Arc<dyn Ranks> = Arc::new(ranks);
                let settings = RankSettings { stage, param_persistence_threshold: 2, ..RankSettings::default() };
                work(&store(Sharing::new(ranks, None, &settings, OptimizerKind::AdamW)));
            });
        }
    });
}

#[test]
fn values_that_ranks_moved_apart_are_gathered_when_a_walk_asks_for_them() {
    let moved = |block: usize| at_first(block).iter().map(|value| -value).collect::<Vec<_>>();
    for (world_size, stage) in [(2, ZeroStage::Optimizer), (3, ZeroStage::Gradients), (4, ZeroStage::Gradients)] {
        on_ranks(world_size, stage, |store| {
            assert!(store.holds_all_of(Speaker::Policy));
            let errands: Vec<Option<Errand>> = (0..COUNTS.len()).map(|block| store.errand(block).unwrap()).collect();
            // One value of one block is for one rank alone.
            let is_alone = store.flats().nth(2).unwrap().own().is_empty();
            assert_eq!(errands[2].is_none(), is_alone);
            assert!(store.has_values_apart() && !store.holds_all_of(Speaker::Policy));
            let mut walk = walk(store);
            for (block, errand) in errands.into_iter().enumerate() {
                let lent = store.blocks[block].home.as_ref().unwrap().working_values().unwrap();
                assert_eq!(buffer::to_vec(&lent.runs()[0]).unwrap(), at_first(block), "nobody has asked yet");
                assert!(errand.is_none_or(|errand| errand.run(negate)));
                assert_eq!(values_of(walk.advance().unwrap().params()), moved(block), "block {block}");
                assert_eq!(store.has_values_apart(), block + 1 < COUNTS.len());
            }
            assert!(store.holds_all_of(Speaker::Policy));
            store.settle().unwrap();
        });
    }
}

#[test]
fn whoever_settles_has_all_values_wherever_the_walk_was_left() {
    for stage in [ZeroStage::Replicated, ZeroStage::Optimizer, ZeroStage::Gradients, ZeroStage::Parameters] {
        on_ranks(2, stage, |store| {
            let mut errands = (0..COUNTS.len()).filter_map(|block| store.errand(block).unwrap());
            assert!(errands.all(|errand| errand.run(negate)));
            // What comes for each visit, and what every rank has moved as a whole, is not apart.
            let is_apart = stage == ZeroStage::Optimizer || stage == ZeroStage::Gradients;
            assert_eq!(store.has_values_apart(), is_apart, "{stage:?}");
            drop(walk(store).nth(1));
            assert_eq!(store.has_values_apart(), is_apart, "{stage:?}: the last block was not asked for");
            store.settle().unwrap();
            assert!(!store.has_values_apart());
            let mut all = walk(store);
            for block in 0..COUNTS.len() {
                let want: Vec<f32> = at_first(block).iter().map(|value| -value).collect();
                assert_eq!(values_of(all.advance().unwrap().params()), want, "{stage:?}, block {block}");
            }
        });
    }
}
