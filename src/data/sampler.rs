//! The order in which a run sees its data.
//!
//! Each pass over the data has a permutation of its own, a pure function of (seed, epoch); which part of it a step takes is
//! counted by [`super::epoch`]. The order does not depend on the number of ranks, and a resumed run goes on exactly where it
//! stopped.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::Error;
use crate::rng::Stream;

/// A place in the data.
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
    /// The pass that `order` is the permutation of.
    epoch: u64,
    order: Vec<usize>,
}

impl Sampler {
    /// A sampler of `len` items. Without `shuffle` the order is the data's.
    ///
    /// # Errors
    /// If there is nothing to sample.
    pub fn new(len: usize, seed: u64, shuffle: bool) -> Result<Self, Error> {
        if len == 0 {
            return Err(Error::Empty { what: "the data to sample from".into() });
        }
        Ok(Self { len, seed, shuffle, epoch: 0, order: permutation(len, seed, shuffle, 0) })
    }

    /// Number of items in one pass.
    #[expect(clippy::len_without_is_empty, reason = "a sampler of nothing cannot be made")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The items at some places in the order of a pass.
    ///
    /// # Panics
    /// If a place lies outside the data.
    pub fn items(&mut self, epoch: u64, places: Range<usize>) -> &[usize] {
        if self.epoch != epoch {
            self.epoch = epoch;
            self.order = permutation(self.len, self.seed, self.shuffle, epoch);
        }
        &self.order[places]
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

    #[test]
    fn every_epoch_has_every_item_once_in_an_order_of_its_own() {
        let mut sampler = Sampler::new(10, 3, true).unwrap();
        let (first, second) = (sampler.items(0, 0..10).to_vec(), sampler.items(1, 0..10).to_vec());
        assert_ne!(first, second);
        // Any part of any pass, asked for in any order.
        assert_eq!(sampler.items(0, 3..5), &first[3..5]);
        assert_eq!(Sampler::new(10, 3, true).unwrap().items(1, 0..10), second);
        for mut order in [first, second] {
            order.sort_unstable();
            assert_eq!(order, (0..10).collect::<Vec<_>>());
        }
        let mut plain = Sampler::new(3, 3, false).unwrap();
        assert_eq!(plain.items(4, 1..3), [1, 2]);
        assert!(Sampler::new(0, 1, true).is_err());
    }
}
