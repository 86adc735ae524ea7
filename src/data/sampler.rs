//! The order in which a run sees its data.
//!
//! The data is an endless stream: one permutation after another, each a pure function of (seed, epoch). A run's place in
//! it is [`SamplerState`], two numbers; ranks read the same stream and take their shares, so the order does not depend on
//! the number of ranks, and a resumed run goes on exactly where it stopped. A batch may reach over the end of an epoch.

use serde::{Deserialize, Serialize};

use super::Error;
use crate::rng::Stream;

/// A place in the stream of items.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SamplerState {
    /// Complete passes over the data.
    pub epoch: u64,
    /// Items of the current pass already given out, below the number of items.
    pub position: usize,
}

/// Gives out item indices.
#[derive(Clone, Debug)]
pub struct Sampler {
    len: usize,
    seed: u64,
    shuffle: bool,
    world_size: usize,
    rank: usize,
    state: SamplerState,
    /// The permutation of `state.epoch`.
    order: Vec<usize>,
}

impl Sampler {
    /// A sampler at the start of the data, for one of `world_size` ranks. Without `shuffle` the order is the data's.
    ///
    /// # Errors
    /// If there is nothing to sample, or the rank is not one of the ranks.
    pub fn new(len: usize, seed: u64, shuffle: bool, world_size: usize, rank: usize) -> Result<Self, Error> {
        if len == 0 {
            return Err(Error::Empty { what: "the data to sample from".into() });
        }
        if rank >= world_size {
            return Err(Error::Setting(format!("sampler of rank {rank}, but there are {world_size} ranks")));
        }
        let state = SamplerState::default();
        Ok(Self { len, seed, shuffle, world_size, rank, state, order: permutation(len, seed, shuffle, 0) })
    }

    /// Number of items in one pass.
    #[expect(clippy::len_without_is_empty, reason = "a sampler of nothing cannot be made")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Where the stream stands.
    pub fn state(&self) -> SamplerState {
        self.state
    }

    /// Goes to a place in the stream.
    ///
    /// # Errors
    /// If the place is beyond the data, which then is not the data the state was saved with.
    pub fn resume(&mut self, state: SamplerState) -> Result<(), Error> {
        if state.position >= self.len {
            return Err(Error::Setting(format!(
                "the checkpoint stands at item {} of its data, this data has {}; resume with the data set, packing and \
                 sample limits of the first run",
                state.position, self.len
            )));
        }
        self.state = state;
        self.order = permutation(self.len, self.seed, self.shuffle, state.epoch);
        Ok(())
    }

    /// Passes over the data so far, with the share of the current one.
    pub fn epochs(&self) -> f64 {
        self.state.epoch as f64 + self.state.position as f64 / self.len as f64
    }

    /// The next `count` items of the stream: the same on every rank.
    pub fn next_items(&mut self, count: usize) -> Vec<usize> {
        let mut items = Vec::with_capacity(count);
        while items.len() < count {
            let take = (count - items.len()).min(self.len - self.state.position);
            items.extend_from_slice(&self.order[self.state.position..self.state.position + take]);
            self.state.position += take;
            if self.state.position == self.len {
                self.state = SamplerState { epoch: self.state.epoch + 1, position: 0 };
                self.order = permutation(self.len, self.seed, self.shuffle, self.state.epoch);
            }
        }
        items
    }

    /// This rank's share of the next `world_size * per_rank` items.
    pub fn next_share(&mut self, per_rank: usize) -> Vec<usize> {
        let items = self.next_items(per_rank * self.world_size);
        items[self.rank * per_rank..(self.rank + 1) * per_rank].to_vec()
    }

    /// The next generation batch of GRPO: `num_prompts` prompts, each `num_generations` times in a row; the same on
    /// every rank, of which [`Sampler::share`] takes a part.
    pub fn next_groups(&mut self, num_prompts: usize, num_generations: usize) -> Vec<usize> {
        let prompts = self.next_items(num_prompts);
        prompts.into_iter().flat_map(|prompt| std::iter::repeat_n(prompt, num_generations)).collect()
    }

    /// This rank's part of something that all ranks have whole: equal consecutive parts in the order of the ranks.
    ///
    /// # Errors
    /// If it does not divide by the number of ranks.
    pub fn share<'a, T>(&self, items: &'a [T]) -> Result<&'a [T], Error> {
        if !items.len().is_multiple_of(self.world_size) {
            return Err(Error::Setting(format!(
                "a batch of {} does not divide by {} ranks; change `generation_batch_size` or `num_generations`",
                items.len(),
                self.world_size
            )));
        }
        let part = items.len() / self.world_size;
        Ok(&items[self.rank * part..(self.rank + 1) * part])
    }
}

fn permutation(len: usize, seed: u64, shuffle: bool, epoch: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..len).collect();
    if shuffle {
        Stream::new(seed, "data", epoch, 0).shuffle(&mut order);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_epoch_has_every_item_once_in_another_order() {
        let mut sampler = Sampler::new(10, 3, true, 1, 0).unwrap();
        let (first, second) = (sampler.next_items(10), sampler.next_items(10));
        assert_ne!(first, second);
        for mut order in [first, second] {
            order.sort_unstable();
            assert_eq!(order, (0..10).collect::<Vec<_>>());
        }
        assert_eq!(sampler.state(), SamplerState { epoch: 2, position: 0 });
        let mut plain = Sampler::new(3, 3, false, 1, 0).unwrap();
        assert_eq!(plain.next_items(7), [0, 1, 2, 0, 1, 2, 0]);
        assert!((plain.epochs() - 7.0 / 3.0).abs() < 1e-12);
    }

    #[test]
    fn groups_are_contiguous_and_divide_among_ranks() {
        let mut sampler = Sampler::new(4, 3, false, 2, 1).unwrap();
        let groups = sampler.next_groups(3, 2);
        assert_eq!(groups, [0, 0, 1, 1, 2, 2]);
        assert_eq!(sampler.share(&groups).unwrap(), [1, 2, 2]);
        assert!(sampler.share(&[1, 2, 3]).is_err());
        assert_eq!(sampler.next_groups(2, 2), [3, 3, 0, 0]);
    }

    #[test]
    fn bad_arguments_are_errors() {
        assert!(Sampler::new(0, 1, true, 1, 0).is_err());
        assert!(Sampler::new(5, 1, true, 2, 2).is_err());
        let mut sampler = Sampler::new(5, 1, true, 1, 0).unwrap();
        assert!(sampler.resume(SamplerState { epoch: 0, position: 5 }).unwrap_err().to_string().contains("has 5"));
    }

    proptest! {
        #[test]
        fn the_order_is_the_same_for_any_world_size_and_across_a_resume(
            len in 1usize..40, seed: u64, per_rank in 1usize..5, steps in 1usize..12, stop in 0usize..12,
        ) {
            let world_size = 3;
            let global = Sampler::new(len, seed, true, 1, 0).unwrap().next_items(world_size * per_rank * steps);
            let mut ranks: Vec<Sampler> =
                (0..world_size).map(|rank| Sampler::new(len, seed, true, world_size, rank).unwrap()).collect();
            let mut seen = Vec::new();
            for step in 0..steps {
                for sampler in &mut ranks {
                    if step == stop {
                        let state = sampler.state();
                        let mut fresh = Sampler::new(len, seed, true, world_size, sampler.rank).unwrap();
                        fresh.resume(state).unwrap();
                        *sampler = fresh;
                    }
                    seen.extend(sampler.next_share(per_rank));
                }
            }
            prop_assert_eq!(seen, global);
        }
    }
}
