//! Parameters are lent: a walk announces which blocks it will visit and in which order, the store decides when they are there,
//! and a lease is how long they are.
//!
//! What is bound to a lease borrows from it, so that nothing reads a slot that has been given to another block.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::store::{Ahead, Arriving, ParamStore};
use super::{Error, Sums};
use crate::model::params::BlockParams;

/// Who speaks: the policy that is trained, or the reference it is held against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speaker {
    /// The model as trained so far.
    Policy,
    /// The frozen base (adapters off), or the kept copy if the store has one.
    Reference,
}

/// What a visit does with a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// It computes with the parameters.
    Values,
    /// And it adds gradients to the trained ones.
    Gradients,
}

/// One stop of a walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Visit {
    /// Which block.
    pub block: usize,
    /// What for.
    pub needs: Needs,
}

/// A walk over blocks in an order that was announced.
#[derive(Debug)]
pub struct Walk<'s> {
    store: &'s ParamStore,
    order: Arc<[Visit]>,
    at: usize,
    speaker: Speaker,
    sums: Sums,
    /// Blocks that were lent and stay for a later visit, and those on their way for the next.
    live: BTreeMap<usize, Arriving>,
    /// Blocks of which something is being read from a file for a later visit.
    ahead: BTreeMap<usize, Ahead>,
}

impl<'s> Walk<'s> {
    pub(super) fn new(store: &'s ParamStore, order: Arc<[Visit]>, speaker: Speaker, sums: Sums) -> Self {
        Self { store, order, at: 0, speaker, sums, live: BTreeMap::new(), ahead: BTreeMap::new() }
    }

    /// The next block of the order, ready to compute with.
    ///
    /// # Errors
    /// If the order has no more, more blocks are asked for at a time than there are slots, or the device fails.
    pub fn advance(&mut self) -> Result<Lease<'s>, Error> {
        let visit = *self.order.get(self.at).ok_or(Error::WalkIsOver { visits: self.order.len() })?;
        self.at += 1;
        let params = self.lend(visit)?;
        Ok(Lease { store: self.store, visit, params, sums: self.sums })
    }

    fn lend(&mut self, Visit { block, needs }: Visit) -> Result<Lent<'s>, Error> {
        let store = self.store;
        store.begin_visit(block)?;
        if let Some(params) = store.resident(block, self.speaker, needs) {
            self.look_ahead(block)?;
            return Ok(Lent::Resident(params));
        }
        store.take_slot(block)?;
        let bound = self.live.remove(&block).map_or_else(|| self.start(block), Ok);
        let bound = bound.and_then(|arriving| {
            arriving.arrive()?;
            Ok((store.bind(block, self.speaker, needs, &arriving)?, arriving))
        });
        let (params, arriving) = match bound {
            Ok(bound) => bound,
            Err(error) => {
                if store.has_slots() {
                    store.take_back(block, BlockParams::default(), Arriving::default());
                }
                return Err(error);
            }
        };
        if store.has_slots() {
            return Ok(Lent::Slot(params, arriving));
        }
        if store.comes_ahead() {
            self.live.insert(block, arriving);
        }
        self.look_ahead(block)?;
        Ok(Lent::Bound(params))
    }

    /// Starts the way of a block, of what was read ahead of it.
    fn start(&mut self, block: usize) -> Result<Arriving, Error> {
        let ahead = self.ahead.remove(&block);
        self.store.start(block, ahead, self.speaker)
    }

    /// Starts to read what lies in files of the blocks that are asked for next.
    fn read_ahead(&mut self) -> Result<(), Error> {
        let store = self.store;
        let most = store.blocks_ahead();
        // What is not found among as many visits as there are blocks lies in no file, or is asked for late.
        for visit in self.order[self.at..].iter().take(store.num_blocks()) {
            if self.ahead.len() >= most {
                break;
            }
            if !self.live.contains_key(&visit.block)
                && !self.ahead.contains_key(&visit.block)
                && let Some(reading) = store.read_ahead(visit.block, self.speaker)?
            {
                self.ahead.insert(visit.block, reading);
            }
        }
        Ok(())
    }

    /// Lets go of blocks that others need the memory of, and starts the way of the next that has one, so that it comes while
    /// block `now` computes.
    ///
    /// What stays is what is asked for soonest, as far as it fits (Belady's rule: the order is known).
    fn look_ahead(&mut self, now: usize) -> Result<(), Error> {
        let store = self.store;
        if !store.comes_ahead() {
            return self.read_ahead();
        }
        if let Some(next) = self.order.get(self.at) {
            store.gather_ahead(next.block)?;
        }
        let mut live = if self.live.contains_key(&now) { store.values_away(now) } else { 0 };
        let mut stays = vec![now];
        let mut next = None;
        for visit in &self.order[self.at..] {
            let own = store.values_away(visit.block);
            if stays.contains(&visit.block) || own == 0 {
                continue;
            }
            if next.is_some() && live + own > store.offload().most_live {
                break;
            }
            live += own;
            stays.push(visit.block);
            next.get_or_insert(visit.block);
        }
        self.live.retain(|block, _| stays.contains(block));
        if let Some(next) = next.filter(|next| !self.live.contains_key(next)) {
            let arriving = self.start(next)?;
            self.live.insert(next, arriving);
        }
        self.read_ahead()
    }
}

/// Where lent parameters are.
#[derive(Debug)]
pub(super) enum Lent<'s> {
    /// In the store: they stay.
    Resident(&'s BlockParams),
    /// Put together for this visit.
    Bound(BlockParams),
    /// In a slot, until the lease ends.
    Slot(BlockParams, Arriving),
}

/// The parameters of a block, for as long as this lives.
#[derive(Debug)]
pub struct Lease<'s> {
    store: &'s ParamStore,
    visit: Visit,
    params: Lent<'s>,
    sums: Sums,
}

impl Lease<'_> {
    /// Which block it is.
    pub fn block(&self) -> usize {
        self.visit.block
    }

    /// The parameters.
    pub fn params(&self) -> &BlockParams {
        match &self.params {
            Lent::Resident(params) => params,
            Lent::Bound(params) | Lent::Slot(params, _) => params,
        }
    }

    /// Tells that the gradients of a step's micro-batch `index` are in this block's bucket. Micro-batches follow one another.
    ///
    /// # Errors
    /// If the visit was announced without gradients, or the device fails.
    pub fn end_micro_step(&self, index: usize) -> Result<(), Error> {
        self.expect_gradients()?;
        self.store.end_micro_step(self.visit.block, self.sums, index)
    }

    /// Tells that this block's gradients are final on this rank: they are added to those of the other ranks.
    ///
    /// # Errors
    /// If the visit was announced without gradients, the device fails or a rank is lost.
    pub fn finish_gradients(self) -> Result<(), Error> {
        self.expect_gradients()?;
        self.store.finish_gradients(self.visit.block, self.sums)
    }

    fn expect_gradients(&self) -> Result<(), Error> {
        match self.visit.needs {
            Needs::Gradients => Ok(()),
            Needs::Values => Err(Error::UnannouncedGradients { block: self.visit.block }),
        }
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        if let Lent::Slot(params, arriving) = &mut self.params {
            self.store.take_back(self.visit.block, std::mem::take(params), std::mem::take(arriving));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use candle_core::{Device, Tensor};

    use super::*;
    use crate::model::params::{BlockInit, Trainable};
    use crate::quant::Weight;
    use crate::zero::{Files, Offload, Sharing};

    /// Four blocks of a frozen matrix and a trained vector, in files of `folder`.
    fn store(folder: &std::path::Path, buffer_count: usize) -> ParamStore {
        let block = |index: usize| {
            let values = Tensor::full(index as f32, (4, 8), &Device::Cpu).unwrap();
            let trained = Trainable {
                name: format!("b{index}"),
                shape: vec![3],
                values: vec![0.5 + index as f32; 3],
                has_decay: false,
            };
            let frozen = [(format!("w{index}"), Weight::Dense(values))].into_iter().collect();
            Ok(BlockInit { frozen, stays_on_host: BTreeSet::new(), trainable: vec![trained], shared: Vec::new() })
        };
        let files = Files { parameters: Some(folder.into()), run: "walk".into(), buffer_count, ..Files::default() };
        let place = Offload { params: true, files, ..Offload::default() };
        ParamStore::placed::<Error>((0..4).map(block), &Device::Cpu, Sharing::alone(), place).unwrap()
    }

    #[test]
    fn the_next_blocks_are_being_read_before_the_one_at_hand_computes() {
        let folder = tempfile::tempdir().unwrap();
        for (buffers, after_first) in [(1, vec![]), (2, vec![1]), (3, vec![1, 2]), (9, vec![1, 2, 3])] {
            let store = store(folder.path(), buffers);
            let order = [0, 1, 2, 3, 2, 1].map(|block| Visit { block, needs: Needs::Values });
            let mut walk = store.walk(order.into(), Speaker::Policy, Sums::running(0, 0, 1));
            let read = |lease: &Lease<'_>, name: String| match &lease.params().get(&name).unwrap().weight {
                Weight::Dense(tensor) => tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap()[0],
                other => panic!("{other:?}"),
            };
            for (at, Visit { block, .. }) in order.iter().enumerate() {
                let lease = walk.advance().unwrap();
                if at == 0 {
                    assert_eq!(walk.ahead.keys().copied().collect::<Vec<_>>(), after_first, "{buffers} buffers");
                }
                assert!(walk.ahead.len() < buffers);
                assert_eq!(read(&lease, format!("w{block}")), *block as f32);
                assert_eq!(read(&lease, format!("b{block}")), 0.5 + *block as f32);
            }
        }
    }
}
