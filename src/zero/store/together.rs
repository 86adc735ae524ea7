//! What the ranks of a run do together with a store: gather blocks and values, add gradients.

use std::ops::Range;
use std::sync::PoisonError;

use super::arrival::For;
use super::{Block, ParamStore, on_host};
use crate::model::params::BlockParams;
use crate::ops::buffer;
use crate::zero::sharing::ranks_at;
use crate::zero::{Error, FlatBlock, Needs, Speaker, Sums, Values};

/// Bytes for which there is to be room beside all blocks.
#[derive(Clone, Copy, Debug, Default)]
pub struct Room {
    /// For having them there to be worth it.
    pub wanted: usize,
    /// For the work to be possible.
    pub least: usize,
}

impl ParamStore {
    /// Gathers all blocks on every rank, until [`Self::let_go`]: for work in which ranks do not go in step. Nothing to do where
    /// they are there anyway. With one rank what waits elsewhere stays there if the device has no room for it beside `room.wanted`
    /// bytes: it comes block by block then, and this says so. Several cannot do that, and need `room.least`.
    ///
    /// # Errors
    /// If a rank is lost, or the device of one of several has no room.
    pub fn gather_all(&mut self, room: Room) -> Result<bool, Error> {
        (0..self.blocks.len()).try_for_each(|block| self.values_arrive(block))?;
        let free = self.free_bytes()?.filter(|_| self.blocks.iter().any(|block| block.policy.is_none()));
        if let Some(free) = free {
            let is_alone = self.sharing.world_size() == 1;
            let needed = self.bytes_to_gather() + if is_alone { room.wanted } else { room.least };
            let is_too_much = needed as u64 > free;
            if is_alone && is_too_much {
                return Ok(false);
            }
            // Ranks that do not go in step cannot gather block by block.
            if !is_alone && self.sharing.ranks().any(is_too_much)? {
                return Err(Error::NoRoom { needed: needed as u64, free });
            }
        }
        for block in 0..self.blocks.len() {
            if self.blocks[block].policy.is_none() {
                let bound = self.fetched(For::Computing, block, Speaker::Policy, Needs::Values)?;
                self.blocks[block].policy = Some(bound);
            }
        }
        Ok(true)
    }

    /// Bytes that [`Self::gather_all`] brings to where blocks compute.
    pub fn bytes_to_gather(&self) -> usize {
        let waiting = self.blocks.iter().filter(|block| block.policy.is_none());
        waiting.map(|block| self.visit_bytes(block)).sum()
    }

    /// Memory that is free where blocks compute, if they are not held there anyway.
    fn free_bytes(&self) -> Result<Option<u64>, Error> {
        // Ranks of one machine, or of one GPU, come for it together.
        if self.device().is_cuda() {
            let sharers = ranks_at(self.sharing.ranks(), &crate::device::device_uuid(self.device())?)?;
            return Ok(Some(crate::device::free_memory_shared(self.device(), sharers)?));
        }
        if self.files().is_empty() {
            return Ok(None);
        }
        let sharers = ranks_at(self.sharing.ranks(), &crate::ranks::host_name())?;
        Ok(crate::device::free_host_memory().map(|free| free / sharers))
    }

    /// Ends [`Self::gather_all`].
    pub fn let_go(&mut self) {
        for block in 0..self.blocks.len() {
            if !self.is_resident(block) {
                self.blocks[block].policy = None;
            }
        }
    }

    /// All blocks' parameters for the first rank, to be read; the others help to gather them and get nothing.
    ///
    /// # Errors
    /// If a rank is lost or memory runs out.
    pub fn collect_params(&self) -> Result<Option<Vec<BlockParams>>, Error> {
        self.settle()?;
        let is_first = self.sharing.ranks().is_first();
        let mut all = Vec::new();
        for block in 0..self.blocks.len() {
            if self.is_gathered(block) || is_first {
                // In host memory: a device that holds a part may not hold all.
                let params = self.fetched(For::Saving, block, Speaker::Policy, Needs::Values)?;
                all.extend(is_first.then_some(params));
            }
        }
        Ok(is_first.then_some(all))
    }

    /// Whether ranks have to fetch a block together.
    fn is_gathered(&self, block: usize) -> bool {
        let is_cut = |block: &Block| {
            let has_working = block.home.as_ref().is_some_and(|home| home.working_values().is_some());
            // A copy that is rounded is not what is saved.
            let has_all = block.flat.has_all_values() || (has_working && block.flat.layout().is_flat());
            block.frozen.is_away() || !has_all
        };
        let own = &self.blocks[block];
        let sources = own.shared.iter().map(|shared| &self.blocks[shared.param.of_block]);
        self.sharing.world_size() > 1 && std::iter::once(own).chain(sources).any(is_cut)
    }

    /// All trained values by block for the first rank; the others help to gather them and get nothing.
    ///
    /// # Errors
    /// If a rank is lost or the device failed.
    pub fn collect_values(&self) -> Result<Option<Vec<Vec<f32>>>, Error> {
        self.collect(self.flats().map(|flat| (flat, flat.stored())))
    }

    /// As [`Self::collect_values`], of the reference; empty if none was kept.
    ///
    /// # Errors
    /// As [`Self::collect_values`].
    pub fn collect_references(&self) -> Result<Option<Vec<Vec<f32>>>, Error> {
        self.collect(self.flats().zip(self.references()))
    }

    fn collect<'a>(
        &'a self,
        buffers: impl Iterator<Item = (&'a FlatBlock, &'a Values)>,
    ) -> Result<Option<Vec<Vec<f32>>>, Error> {
        let is_first = self.sharing.ranks().is_first();
        self.settle()?;
        let mut all = Vec::new();
        for (flat, values) in buffers {
            if !flat.has_all_values() {
                all.extend(self.sharing.collect(&on_host(&values.tensor()?)?, flat.shards())?);
            } else if is_first {
                all.push(buffer::to_vec(&values.tensor()?)?);
            }
        }
        Ok(is_first.then_some(all))
    }

    /// Replaces the reference's values by those of all parameters, by block.
    ///
    /// # Errors
    /// If the lengths differ.
    pub fn write_reference(&self, block: usize, all: &[f32]) -> Result<(), Error> {
        match &self.blocks[block].reference {
            Some(reference) => {
                reference.values.change(|values| self.blocks[block].flat.write(values, all))?;
                reference.pack(&self.blocks[block].flat)
            }
            None => Ok(()),
        }
    }

    /// After the optimizer, here and on the other ranks, moved a block's values: has them come to where every rank computes.
    pub(in crate::zero) fn share_values(&self, block: usize) -> Result<(), Error> {
        self.send_values(block)?;
        self.gather_values(block)
    }

    /// Gathers a block's values from the ranks that moved them, where all are to compute with them: between GPUs this starts their
    /// way, else they are there. What comes for each visit is gathered then.
    pub(super) fn gather_values(&self, block: usize) -> Result<(), Error> {
        let (flat, home) = (&self.blocks[block].flat, &self.blocks[block].home);
        if flat.is_whole() || flat.is_empty() {
            return Ok(());
        }
        if self.sharing.exchanges_on_device() {
            return self.exchange_values(block);
        }
        if let Some(home) = home.as_ref().filter(|home| home.working_values().is_some()) {
            let layout = flat.layout();
            let mut own = vec![0; layout.own_bytes()];
            layout.pack(&on_host(&flat.own_values()?)?, &mut own);
            let all = self.sharing.gather_bytes(&own, layout.bytes_by_rank())?;
            return home.write_working(&layout.join(&all));
        }
        if flat.has_all_values() {
            flat.write_values(&self.sharing.gather(&on_host(&flat.own_values()?)?, flat.shards())?)?;
        }
        Ok(())
    }

    /// The same over all ranks: each gets its part of the sums, or all of them where every rank moves everything.
    pub(super) fn reduce_gradients(&self, block: usize, sums: Sums) -> Result<(), Error> {
        let own = &self.blocks[block];
        // As soon as it is there: its memory is free then.
        for shared in &own.shared {
            let Some(bucket) = &shared.bucket else { continue };
            let source = &self.blocks[shared.param.of_block].flat;
            let Some(entry) = source.entry(&shared.param.of_name) else { continue };
            let shards = entry.parts_in(&self.reduced_shards(source));
            let reduced = self.sharing.reduce(sums, &bucket.take_sums()?, &shards)?;
            *shared.reduced.lock().unwrap_or_else(PoisonError::into_inner) = Some(reduced);
        }
        if own.flat.is_empty() {
            return Ok(());
        }
        let shards = self.reduced_shards(&own.flat);
        let shard = shards[self.sharing.rank()].clone();
        let mut reduced = self.sharing.reduce(sums, &own.bucket.take_sums()?, &shards)?;
        for (shared, entry) in self.sharers(block) {
            let more = shared.reduced.lock().unwrap_or_else(PoisonError::into_inner).take();
            reduced[entry.start_in(&shard)..]
                .iter_mut()
                .zip(more.unwrap_or_default())
                .for_each(|(sum, more)| *sum += more);
        }
        if own.flat.is_whole() {
            let all = self.sharing.gather(&reduced, &shards)?;
            return Ok(buffer::write(own.flat.grads(), &all)?);
        }
        if reduced.is_empty() {
            return Ok(());
        }
        Ok(buffer::write(&own.flat.own_grads()?, &reduced)?)
    }

    /// Which rank adds what of a block's gradients.
    pub(super) fn reduced_shards(&self, flat: &FlatBlock) -> Vec<Range<usize>> {
        if !flat.is_whole() {
            return flat.shards().to_vec();
        }
        let (count, ranks) = (flat.len(), self.sharing.world_size());
        (0..ranks).map(|rank| count * rank / ranks..count * (rank + 1) / ranks).collect()
    }
}
