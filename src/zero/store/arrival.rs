//! What of a block is not where it computes, on its way there.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::{Block, ParamStore, Shared, on_host};
use crate::device::{Buffer, Ticket, empty};
use crate::model::params::{BlockParams, Slot};
use crate::quant::{self, Weight};
use crate::zero::files::Reading;
use crate::zero::frozen::{self, RunsAhead};
use crate::zero::values::{Staged, Values};
use crate::zero::{Coming, Error, FlatBlock, Needs, Speaker, gradients::Bucket};

/// A block that has been asked for.
#[derive(Debug, Default)]
pub(in crate::zero) struct Arriving {
    frozen: frozen::Arriving,
    /// All trained values of the block, f32 `[n]`.
    values: Option<Tensor>,
    coming: Vec<Coming>,
}

impl Arriving {
    /// Has what computes wait until all is there.
    pub(in crate::zero) fn arrive(&self) -> Result<(), Error> {
        self.coming.iter().try_for_each(Coming::arrive)?;
        self.frozen.arrive()
    }

    /// Overwrites everything for whoever still reads it.
    pub(super) fn spoil(self) -> Result<(), (String, quant::Error)> {
        self.frozen.spoil()?;
        match self.values {
            Some(values) => Weight::Dense(values).spoil().map_err(|error| ("its trained values".into(), error)),
            None => Ok(()),
        }
    }
}

/// What of a block is being read from a file, before its way begins.
#[derive(Debug)]
pub(in crate::zero) struct Ahead {
    frozen: RunsAhead,
    values: Option<Reading<Staged>>,
}

impl ParamStore {
    /// Starts to read what lies in files of a block, if something does; values only once the optimizer is done with them.
    pub(in crate::zero) fn read_ahead(&self, block: usize, speaker: Speaker) -> Result<Option<Ahead>, Error> {
        let Some(own) = self.blocks.get(block) else { return Ok(None) };
        let values = own.values_of(speaker);
        let is_moved = own.home.as_ref().is_none_or(|home| home.is_moved());
        let has_values = !own.flat.is_empty() && values.is_in_file() && is_moved;
        if !own.frozen.is_in_file() && !has_values {
            return Ok(None);
        }
        let device = self.device();
        let frozen = own.frozen.read_ahead(&self.sharing, (&self.link, device))?;
        let values = if has_values { values.start(!device.is_cuda())? } else { None };
        Ok(Some(Ahead { frozen, values }))
    }

    /// Starts the way of what is not on `device` of a block, of which something may have been read `ahead`.
    pub(in crate::zero) fn start(
        &self,
        block: usize,
        ahead: Option<Ahead>,
        speaker: Speaker,
        device: &Device,
    ) -> Result<Arriving, Error> {
        let own = &self.blocks[block];
        let (frozen, values) = ahead.map_or((None, None), |ahead| (Some(ahead.frozen), ahead.values));
        let frozen = own.frozen.fetch(frozen, &self.sharing, (&self.link, device))?;
        let mut arriving = Arriving { frozen, ..Arriving::default() };
        if !own.flat.is_empty() {
            arriving.values = self.values_on_their_way(own, values, speaker, device, &mut arriving.coming)?;
        }
        Ok(arriving)
    }

    /// The parameters of a block, of what is on `device` and what comes there now.
    pub(super) fn fetched(
        &self,
        block: usize,
        speaker: Speaker,
        needs: Needs,
        device: &Device,
    ) -> Result<BlockParams, Error> {
        let arriving = self.start(block, None, speaker, device)?;
        arriving.arrive()?;
        self.bind_on(device, block, speaker, needs, &arriving)
    }

    /// The parameters of a block, with what came for the visit.
    pub(in crate::zero) fn bind(
        &self,
        block: usize,
        speaker: Speaker,
        needs: Needs,
        arriving: &Arriving,
    ) -> Result<BlockParams, Error> {
        self.bind_on(self.device(), block, speaker, needs, arriving)
    }

    fn bind_on(
        &self,
        device: &Device,
        block: usize,
        speaker: Speaker,
        needs: Needs,
        arriving: &Arriving,
    ) -> Result<BlockParams, Error> {
        let own = &self.blocks[block];
        let mut slots: BTreeMap<String, Slot> = BTreeMap::new();
        let mut add = |name: &str, weight: Weight, grad: Option<Tensor>| match slots
            .insert(name.to_string(), Slot { weight, grad })
        {
            None => Ok(()),
            Some(_) => Err(Error::Duplicate { name: name.into() }),
        };
        for (name, weight) in own.frozen.here().iter().chain(arriving.frozen.weights()) {
            add(name, weight.clone(), None)?;
        }
        let trains = !(speaker == Speaker::Reference && own.reference.is_some());
        let binds_grads = trains && (own.bucket.is_lasting() || needs == Needs::Gradients);
        let grads = |bucket: &Bucket| binds_grads.then(|| bucket.grads()).transpose();
        if !own.flat.is_empty() {
            let own_grads = grads(&own.bucket)?;
            let values = arriving.values.clone().map_or_else(|| own.values_of(speaker).tensor(), Ok)?;
            for entry in own.flat.entries() {
                let grad = own_grads.as_ref().map(|grads| FlatBlock::view(grads, entry)).transpose()?;
                add(&entry.name, Weight::Dense(FlatBlock::view(&values, entry)?), grad)?;
            }
        }
        for Shared { param, bucket, .. } in &own.shared {
            let source = &self.blocks[param.of_block];
            let Some(entry) = source.flat.entry(&param.of_name) else {
                let coming = || source.frozen.fetch(None, &self.sharing, (&self.link, device));
                let weight = match source.frozen.here().get(&param.of_name) {
                    Some(weight) => Some(weight.clone()),
                    None => coming()?.into_weights()?.remove(&param.of_name),
                };
                let missing = || Error::NotShared { name: param.of_name.clone() };
                add(&param.name, weight.ok_or_else(missing)?, None)?;
                continue;
            };
            let mut coming = Vec::new();
            let values = self.values_on_their_way(source, None, speaker, device, &mut coming)?;
            coming.iter().try_for_each(Coming::arrive)?;
            self.values_arrive(param.of_block)?;
            let values = values.map_or_else(|| source.values_of(speaker).tensor(), Ok)?;
            let grad = bucket.as_ref().map(&grads).transpose()?.flatten();
            let grad = grad.map(|grads| grads.reshape(entry.shape.as_slice()));
            add(&param.name, Weight::Dense(FlatBlock::view(&values, entry)?), grad.transpose()?)?;
        }
        Ok(BlockParams::new(slots))
    }

    /// All trained values of a block as a speaker has them, on their way to `device`; `None` if they are there. Of those in a file,
    /// `reading` may have begun.
    fn values_on_their_way(
        &self,
        block: &Block,
        reading: Option<Reading<Staged>>,
        speaker: Speaker,
        device: &Device,
        coming: &mut Vec<Coming>,
    ) -> Result<Option<Tensor>, Error> {
        let stored = block.values_of(speaker);
        let home = block.home.as_ref().filter(|_| !block.is_of_reference(speaker));
        home.map_or(Ok(()), |home| home.wait_for_optimizer())?;
        let reading = reading.map_or_else(|| stored.start(!device.is_cuda()), |reading| Ok(Some(reading)))?;
        let Some(staged) = reading.map(Reading::wait).transpose()? else {
            let locked = home.and_then(|home| home.locked_values());
            return self.on_their_way(block, (&stored.tensor()?, locked), speaker, device, coming);
        };
        let there = self.on_their_way(block, (&staged.values, staged.locked.as_ref()), speaker, device, coming)?;
        let there = there.unwrap_or_else(|| staged.values.clone());
        if device.is_cuda() {
            stored.give(staged);
        }
        Ok(Some(there))
    }

    /// The same of values in memory.
    fn on_their_way(
        &self,
        block: &Block,
        (values, locked): (&Tensor, Option<&Arc<Buffer>>),
        speaker: Speaker,
        device: &Device,
        coming: &mut Vec<Coming>,
    ) -> Result<Option<Tensor>, Error> {
        let home = block.home.as_ref().filter(|_| !block.is_of_reference(speaker));
        // Asked of the block and not of the values: a rank's shard may be all there is, and the others ask it.
        let has_working = home.is_some_and(|home| home.working_values().is_some());
        if !block.flat.has_all_values() && !has_working {
            if self.sharing.exchanges_on_device() && device.is_cuda() {
                return Ok(Some(self.exchange_cut_values(&block.flat, values, locked, coming)?));
            }
            let all = self.sharing.gather(&on_host(values)?, block.flat.shards())?;
            let count = all.len();
            return Ok(Some(Tensor::from_vec(all, count, device)?));
        }
        let is_there = values.device().same_device(device);
        if is_there && !self.has_slots() {
            return Ok(None);
        }
        if is_there {
            // A copy, which can be overwritten.
            return Ok((self.values_wait()).then(|| values.copy()).transpose()?);
        }
        let Some(locked) = locked.filter(|_| device.is_cuda()) else { return Ok(Some(values.to_device(device)?)) };
        let there = empty(device, values.elem_count(), DType::F32)?;
        let target = Arc::new(Buffer::of_tensor(there.clone())?);
        let copied = self.link.copies().copy(&locked.whole(), &target.whole(), &Ticket::done())?;
        coming.push(Coming::new(target, copied));
        Ok(Some(there))
    }
}

impl Block {
    fn is_of_reference(&self, speaker: Speaker) -> bool {
        speaker == Speaker::Reference && self.reference.is_some()
    }

    /// The trained values as a speaker has them, where they are.
    pub(super) fn values_of(&self, speaker: Speaker) -> Values {
        match &self.reference {
            Some(reference) if speaker == Speaker::Reference => reference.values.clone(),
            _ => match self.home.as_ref().and_then(|home| home.working_values()) {
                Some(working) => Values::in_memory(working.clone()),
                None => self.flat.stored().clone(),
            },
        }
    }
}
