//! What of a block is not where it computes, on its way there.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::home::Home;
use super::{Block, ParamStore, Shared, on_host};
use crate::device::{Buffer, Ticket, empty};
use crate::model::params::{BlockParams, Slot};
use crate::quant::{self, Weight};
use crate::zero::files::Reading;
use crate::zero::frozen::{self, RunsAhead};
use crate::zero::packed::{Held, Packed};
use crate::zero::read::ReadValues;
use crate::zero::values::{Staged, Values};
use crate::zero::{Coming, Error, FlatBlock, Needs, Speaker, gradients::Bucket};

/// Where and as what a block is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum For {
    /// As blocks read it, where they compute.
    Computing,
    /// In host memory, with trained values in f32: to be saved.
    Saving,
}

/// A block that has been asked for.
#[derive(Debug, Default)]
pub(in crate::zero) struct Arriving {
    frozen: frozen::Arriving,
    /// All trained values of the block.
    values: Option<ReadValues>,
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
        let runs = self.values.iter().flat_map(ReadValues::runs).cloned();
        runs.into_iter()
            .try_for_each(|run| Weight::Dense(run).spoil())
            .map_err(|error| ("its trained values".into(), error))
    }
}

/// What of a block is being read from a file, before its way begins.
#[derive(Debug)]
pub(in crate::zero) struct Ahead {
    frozen: RunsAhead,
    values: Option<ValuesAhead>,
}

/// The same of trained values.
#[derive(Debug)]
pub(in crate::zero) enum ValuesAhead {
    /// As they are.
    Flat(Reading<Staged>),
    /// As blocks read them.
    Packed(Reading<Buffer>),
}

impl ParamStore {
    /// Starts to read what lies in files of a block, if something does; values only once the optimizer is done with them.
    pub(in crate::zero) fn read_ahead(&self, block: usize, speaker: Speaker) -> Result<Option<Ahead>, Error> {
        let Some(own) = self.blocks.get(block) else { return Ok(None) };
        let is_moved = own.home.as_ref().is_none_or(|home| home.is_moved());
        let has_values = !own.flat.is_empty() && own.is_in_file(speaker) && is_moved;
        if !own.frozen.is_in_file() && !has_values {
            return Ok(None);
        }
        let frozen = own.frozen.read_ahead(&self.sharing, (&self.link, self.device()))?;
        let values = if has_values { own.start_reading(speaker, self.device())? } else { None };
        Ok(Some(Ahead { frozen, values }))
    }

    /// Starts the way of what is not where blocks compute of a block, of which something may have been read `ahead`.
    pub(in crate::zero) fn start(
        &self,
        block: usize,
        ahead: Option<Ahead>,
        speaker: Speaker,
    ) -> Result<Arriving, Error> {
        self.start_for(For::Computing, block, ahead, speaker)
    }

    fn start_for(&self, purpose: For, block: usize, ahead: Option<Ahead>, speaker: Speaker) -> Result<Arriving, Error> {
        let own = &self.blocks[block];
        let (frozen, values) = ahead.map_or((None, None), |ahead| (Some(ahead.frozen), ahead.values));
        let frozen = own.frozen.fetch(frozen, &self.sharing, (&self.link, self.place_of(purpose)))?;
        let mut arriving = Arriving { frozen, ..Arriving::default() };
        if !own.flat.is_empty() {
            arriving.values = match purpose {
                For::Computing => self.values_on_their_way(own, values, speaker, &mut arriving.coming)?,
                For::Saving => Some(self.saved_values(own, speaker)?),
            };
        }
        Ok(arriving)
    }

    fn place_of(&self, purpose: For) -> &Device {
        match purpose {
            For::Computing => self.device(),
            For::Saving => &Device::Cpu,
        }
    }

    /// The parameters of a block, of what is there and what comes there now.
    pub(super) fn fetched(
        &self,
        purpose: For,
        block: usize,
        speaker: Speaker,
        needs: Needs,
    ) -> Result<BlockParams, Error> {
        let arriving = self.start_for(purpose, block, None, speaker)?;
        arriving.arrive()?;
        self.bind_for(purpose, block, speaker, needs, &arriving)
    }

    /// The parameters of a block, with what came for the visit.
    pub(in crate::zero) fn bind(
        &self,
        block: usize,
        speaker: Speaker,
        needs: Needs,
        arriving: &Arriving,
    ) -> Result<BlockParams, Error> {
        self.bind_for(For::Computing, block, speaker, needs, arriving)
    }

    fn bind_for(
        &self,
        purpose: For,
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
            let values = arriving.values.clone().map_or_else(|| own.values_there(speaker), Ok)?;
            for (index, entry) in own.flat.entries().iter().enumerate() {
                let grad = own_grads.as_ref().map(|grads| FlatBlock::view(grads, entry)).transpose()?;
                add(&entry.name, Weight::Dense(own.flat.layout().view(&values, index, entry)?), grad)?;
            }
        }
        for Shared { param, bucket, .. } in &own.shared {
            let source = &self.blocks[param.of_block];
            let Some((index, entry)) = source.flat.place_of(&param.of_name) else {
                let place = (&self.link, self.place_of(purpose));
                let coming = || source.frozen.fetch(None, &self.sharing, place);
                let weight = match source.frozen.here().get(&param.of_name) {
                    Some(weight) => Some(weight.clone()),
                    None => coming()?.into_weights()?.remove(&param.of_name),
                };
                let missing = || Error::NotShared { name: param.of_name.clone() };
                add(&param.name, weight.ok_or_else(missing)?, None)?;
                continue;
            };
            let mut coming = Vec::new();
            let values = match purpose {
                For::Computing => self.values_on_their_way(source, None, speaker, &mut coming)?,
                For::Saving => Some(self.saved_values(source, speaker)?),
            };
            coming.iter().try_for_each(Coming::arrive)?;
            self.values_arrive(param.of_block)?;
            let values = values.map_or_else(|| source.values_there(speaker), Ok)?;
            let grad = bucket.as_ref().map(&grads).transpose()?.flatten();
            let grad = grad.map(|grads| grads.reshape(entry.shape.as_slice()));
            add(&param.name, Weight::Dense(source.flat.layout().view(&values, index, entry)?), grad.transpose()?)?;
        }
        Ok(BlockParams::new(slots))
    }

    /// All trained values of a block as a speaker has them, in f32 in host memory; ranks that have parts of them gather them together.
    fn saved_values(&self, block: &Block, speaker: Speaker) -> Result<ReadValues, Error> {
        let home = block.home_of(speaker);
        home.map_or(Ok(()), |home| home.wait_for_optimizer())?;
        // What every rank has as it is need not be gathered.
        if let Some(working) = home.and_then(|home| home.working_values()).filter(|_| block.flat.layout().is_flat()) {
            return Ok(ReadValues::flat(working.runs()[0].to_device(&Device::Cpu)?));
        }
        let own = block.stored(speaker).tensor()?;
        if block.flat.has_all_values() {
            return Ok(ReadValues::flat(own.to_device(&Device::Cpu)?));
        }
        let all = self.sharing.gather(&on_host(&own)?, block.flat.shards())?;
        let count = all.len();
        Ok(ReadValues::flat(Tensor::from_vec(all, count, &Device::Cpu)?))
    }

    /// All trained values of a block as a speaker has them, on their way to where blocks compute; `None` if they are there. Of those
    /// in a file, the reading may have begun.
    fn values_on_their_way(
        &self,
        block: &Block,
        ahead: Option<ValuesAhead>,
        speaker: Speaker,
        coming: &mut Vec<Coming>,
    ) -> Result<Option<ReadValues>, Error> {
        let home = block.home_of(speaker);
        home.map_or(Ok(()), |home| home.wait_for_optimizer())?;
        if let Some(packed) = block.packed_of(speaker) {
            let reading = match ahead {
                Some(ValuesAhead::Packed(reading)) => Some(reading),
                _ => None,
            };
            let held = packed.held(reading)?;
            let there = self.packed_on_their_way(&block.flat, &held, coming)?;
            packed.give(held);
            return Ok(Some(there));
        }
        let (stored, device) = (block.stored(speaker), self.device());
        if home.is_some_and(|home| home.working_values().is_some()) {
            return self.there(&block.values_there(speaker)?);
        }
        let reading = match ahead {
            Some(ValuesAhead::Flat(reading)) => Some(reading),
            _ => stored.start(!device.is_cuda())?,
        };
        let Some(staged) = reading.map(Reading::wait).transpose()? else {
            let locked = home.and_then(|home| home.locked_values());
            return self.on_their_way(block, (&stored.tensor()?, locked), coming);
        };
        let there = self.on_their_way(block, (&staged.values, staged.locked.as_ref()), coming)?;
        let there = there.unwrap_or_else(|| ReadValues::flat(staged.values.clone()));
        if device.is_cuda() {
            stored.give(staged);
        }
        Ok(Some(there))
    }

    /// Values that are where blocks compute: `None`, or a copy, which can be overwritten.
    fn there(&self, values: &ReadValues) -> Result<Option<ReadValues>, Error> {
        (self.has_slots() && self.values_wait()).then(|| values.copy()).transpose()
    }

    /// The way of values from memory.
    fn on_their_way(
        &self,
        block: &Block,
        (values, locked): (&Tensor, Option<&Arc<Buffer>>),
        coming: &mut Vec<Coming>,
    ) -> Result<Option<ReadValues>, Error> {
        let (flat, device) = (&block.flat, self.device());
        // Asked of the block and not of the values: a rank's shard may be all there is, and the others ask it.
        if !flat.has_all_values() {
            if self.sharing.exchanges_on_device() && device.is_cuda() {
                return Ok(Some(self.exchange_cut_values(flat, (Some(values), locked), coming)?));
            }
            let mut own = vec![0; flat.layout().own_bytes()];
            flat.layout().pack(&on_host(values)?, &mut own);
            return Ok(Some(self.gather_packed(flat, &own)?));
        }
        if values.device().same_device(device) {
            return self.there(&ReadValues::flat(values.clone()));
        }
        let Some(locked) = locked.filter(|_| device.is_cuda()) else {
            return Ok(Some(ReadValues::flat(values.to_device(device)?)));
        };
        let there = empty(device, values.elem_count(), DType::F32)?;
        let target = Arc::new(Buffer::of_tensor(there.clone())?);
        let copied = self.link.copies().copy(&locked.whole(), &target.whole(), &Ticket::done())?;
        coming.push(Coming::new(target, copied));
        Ok(Some(ReadValues::flat(there)))
    }

    /// The way of values that wait as blocks read them.
    fn packed_on_their_way(
        &self,
        flat: &FlatBlock,
        held: &Held,
        coming: &mut Vec<Coming>,
    ) -> Result<ReadValues, Error> {
        let (layout, device) = (flat.layout(), self.device());
        if !flat.has_all_values() && self.sharing.exchanges_on_device() && device.is_cuda() {
            return self.exchange_cut_values(flat, (None, Some(held.buffer())), coming);
        }
        if !flat.has_all_values() {
            let own = held.buffer().with_bytes(<[u8]>::to_vec)?;
            return self.gather_packed(flat, &own);
        }
        if device.is_cpu() {
            let runs = held.buffer().with_bytes(|bytes| layout.join(bytes))?;
            return layout.values(&runs, device);
        }
        let there = layout.empty(device)?;
        for (run, part) in there.runs().iter().zip(layout.own_parts()) {
            let target = Arc::new(Buffer::of_tensor(run.clone())?);
            let copied = self.link.copies().copy(&held.buffer().part(part)?, &target.whole(), &Ticket::done())?;
            coming.push(Coming::new(target, copied));
        }
        Ok(there)
    }

    /// All values of a block, gathered through host memory from what each rank packed.
    fn gather_packed(&self, flat: &FlatBlock, own: &[u8]) -> Result<ReadValues, Error> {
        let layout = flat.layout();
        let all = self.sharing.gather_bytes(own, layout.bytes_by_rank())?;
        layout.values(&layout.join(&all), self.device())
    }
}

impl Block {
    fn is_of_reference(&self, speaker: Speaker) -> bool {
        speaker == Speaker::Reference && self.reference.is_some()
    }

    /// Where the values of a speaker come from, if the optimizer has another home and they are those that it moves.
    fn home_of(&self, speaker: Speaker) -> Option<&Arc<Home>> {
        self.home.as_ref().filter(|_| !self.is_of_reference(speaker))
    }

    /// The f32 values of a speaker.
    fn stored(&self, speaker: Speaker) -> &Values {
        match &self.reference {
            Some(reference) if speaker == Speaker::Reference => &reference.values,
            _ => self.flat.stored(),
        }
    }

    /// What comes for each visit, if that is not the values as they are.
    fn packed_of(&self, speaker: Speaker) -> Option<&Packed> {
        match &self.reference {
            Some(reference) if speaker == Speaker::Reference => reference.packed.as_ref(),
            _ => self.home.as_ref().and_then(|home| home.packed()),
        }
    }

    /// Whether what comes for a visit lies in a file.
    fn is_in_file(&self, speaker: Speaker) -> bool {
        let is_there = || self.home_of(speaker).is_some_and(|home| home.working_values().is_some());
        let as_they_are = || !is_there() && self.stored(speaker).is_in_file();
        self.packed_of(speaker).map_or_else(as_they_are, |packed| packed.bytes_in_file() > 0)
    }

    /// Starts to read it.
    fn start_reading(&self, speaker: Speaker, device: &Device) -> Result<Option<ValuesAhead>, Error> {
        match self.packed_of(speaker) {
            Some(packed) => Ok(packed.start()?.map(ValuesAhead::Packed)),
            None => Ok(self.stored(speaker).start(!device.is_cuda())?.map(ValuesAhead::Flat)),
        }
    }

    /// The trained values as a speaker has them, of a block that has them where it computes.
    fn values_there(&self, speaker: Speaker) -> Result<ReadValues, Error> {
        match self.home_of(speaker).and_then(|home| home.working_values()) {
            Some(working) => Ok(working.clone()),
            None => Ok(ReadValues::flat(self.stored(speaker).tensor()?)),
        }
    }
}
