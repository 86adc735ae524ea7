//! Owns every block's parameters, lends them to the walk and gathers their gradients.
//!
//! A store either keeps all blocks where blocks compute, or keeps the layers at rest and copies each into one of a few slots
//! for as long as it is lent, or keeps this rank's part of every block and gathers each from all ranks for as long as it is
//! lent. All answer the same calls. Where ranks share anything, all of them must ask for the same blocks in the same order.

mod together;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Device, Tensor};

use super::frozen::Frozen;
use super::gradients::Bucket;
use super::lease::Lent;
use super::{Entry, Error, FlatBlock, Needs, Sharing, Speaker, Sums, Visit, Walk};
use crate::config::settings::ZeroStage;
use crate::model::params::{BlockInit, BlockParams, SharedParam, Slot};
use crate::ops::buffer;
use crate::quant::Weight;

/// How many layers are where blocks compute at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slots {
    /// Most layers at a time.
    pub most_live: usize,
    /// Whether a slot's values are overwritten with NaN when it is given back, so that a late read is seen.
    pub is_spoiled: bool,
}

/// Parameters of all blocks.
#[derive(Debug)]
pub struct ParamStore {
    device: Device,
    blocks: Vec<Block>,
    /// `None`: all blocks stay where blocks compute.
    slots: Option<Slots>,
    sharing: Sharing,
    live: AtomicUsize,
    fetches: AtomicU64,
    /// What went wrong when a slot was given back, told by the next call.
    spoiled: Mutex<Option<Error>>,
}

#[derive(Debug)]
struct Block {
    frozen: Frozen,
    /// Those of them that a GPU reads in host memory.
    stays_on_host: BTreeSet<String>,
    flat: FlatBlock,
    bucket: Bucket,
    /// Parameters of other blocks that this one reads too.
    shared: Vec<Shared>,
    /// Bound to the trained values, and to the buckets that last; `None` where the block is at rest.
    policy: Option<BlockParams>,
    reference: Option<Reference>,
}

/// A parameter of another block, with gradients of its own.
#[derive(Debug)]
struct Shared {
    param: SharedParam,
    /// f32, as many as the parameter has, if that is trained.
    bucket: Option<Bucket>,
    /// This rank's part of the step's sum, until the block that has the parameter adds it.
    reduced: Mutex<Option<Vec<f32>>>,
}

/// A second set of trained values.
#[derive(Debug)]
struct Reference {
    /// As the trained ones: f32 `[n]`, or this rank's.
    values: Tensor,
    params: Option<BlockParams>,
}

impl ParamStore {
    /// Takes the loaded blocks in the order of the walk to `device`; one block at a time is in both memories.
    ///
    /// # Errors
    /// If a block cannot be loaded, a name stands twice in a block, a shared parameter is not there, or memory runs out.
    pub fn new<E: From<Error>>(
        blocks: impl IntoIterator<Item = Result<BlockInit, E>>,
        device: &Device,
    ) -> Result<Self, E> {
        Self::build(blocks, device, None, Sharing::alone())
    }

    /// As [`Self::new`], with what the ranks of `sharing` share: of a block that is cut into shards this rank keeps its own as
    /// soon as the block is loaded.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn shared<E: From<Error>>(
        blocks: impl IntoIterator<Item = Result<BlockInit, E>>,
        device: &Device,
        sharing: Sharing,
    ) -> Result<Self, E> {
        Self::build(blocks, device, None, sharing)
    }

    /// As [`Self::new`], but the frozen weights of all blocks between the first and the last stay in host memory, and their
    /// values are copied to `device` for each visit.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_slots<E: From<Error>>(
        blocks: impl IntoIterator<Item = Result<BlockInit, E>>,
        device: &Device,
        slots: Slots,
    ) -> Result<Self, E> {
        Self::build(blocks, device, Some(slots), Sharing::alone())
    }

    fn build<E: From<Error>>(
        inits: impl IntoIterator<Item = Result<BlockInit, E>>,
        device: &Device,
        slots: Option<Slots>,
        sharing: Sharing,
    ) -> Result<Self, E> {
        let mut blocks: Vec<Block> = Vec::new();
        for init in inits {
            let mut block = Block::new(init?, &blocks, device, &sharing)?;
            // What others may share does not come and go.
            if sharing.stage() == ZeroStage::Parameters {
                block.frozen.cut(&sharing, &block.stays_on_host, device)?;
            } else if slots.is_none() || blocks.is_empty() {
                block.frozen.move_to(&block.stays_on_host, device)?;
            }
            blocks.push(block);
        }
        if let Some(last) = blocks.last_mut().filter(|_| slots.is_some()) {
            last.frozen.move_to(&last.stays_on_host, device)?;
        }
        let mut store = Self {
            device: device.clone(),
            blocks,
            slots,
            sharing,
            live: AtomicUsize::new(0),
            fetches: AtomicU64::new(0),
            spoiled: Mutex::new(None),
        };
        for block in 0..store.blocks.len() {
            if store.is_resident(block) {
                store.blocks[block].policy =
                    Some(store.bind(block, Speaker::Policy, store.bound_at_rest(), &mut here)?);
            }
        }
        Ok(store)
    }

    /// The ranks and what they share.
    pub fn sharing(&self) -> &Sharing {
        &self.sharing
    }

    /// Where blocks compute.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Number of blocks.
    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Whether all blocks are where blocks compute.
    pub fn holds_all(&self) -> bool {
        self.slots.is_none() && self.blocks.iter().all(|block| block.policy.is_some())
    }

    /// Whether a step should finish with one block before it takes the next, so that gradients of one block take memory at a
    /// time; `None` where that is not asked.
    pub fn passing_gradient_bytes(&self) -> Option<usize> {
        (self.sharing.stage() >= ZeroStage::Gradients).then(|| size_of::<f32>() * self.num_trainable())
    }

    fn is_resident(&self, block: usize) -> bool {
        match (self.sharing.stage(), self.slots) {
            (ZeroStage::Parameters, _) => false,
            (_, slots) => slots.is_none() || block == 0 || block + 1 == self.blocks.len(),
        }
    }

    /// Announces a walk: the blocks in the order in which they will be asked for, and how the gradients of the step's
    /// micro-batches are added.
    pub fn walk(&self, order: Arc<[Visit]>, speaker: Speaker, sums: Sums) -> Walk<'_> {
        Walk::new(self, order, speaker, sums)
    }

    /// The policy's parameters of all blocks, for as long as the store is borrowed; `None` where they are not all there at a
    /// time.
    pub fn hold(&self) -> Option<Vec<&BlockParams>> {
        self.blocks.iter().map(|block| block.policy.as_ref()).collect()
    }

    /// Blocks that were asked for so far.
    pub fn fetches(&self) -> u64 {
        self.fetches.load(Ordering::Relaxed)
    }

    pub(super) fn lend(&self, block: usize, speaker: Speaker, needs: Needs) -> Result<Lent<'_>, Error> {
        if let Some(error) = self.spoiled.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(error);
        }
        self.fetches.fetch_add(1, Ordering::Relaxed);
        let own = self.blocks.get(block).ok_or(Error::NoBlock { block, blocks: self.blocks.len() })?;
        let resident = match (speaker, &own.reference) {
            (Speaker::Reference, Some(reference)) => reference.params.as_ref(),
            _ => own.policy.as_ref(),
        };
        let Some(slots) = self.slots else {
            // What is resident has no place for gradients where those come and go.
            return match resident {
                Some(params) if needs == Needs::Values || own.bucket.is_lasting() => Ok(Lent::Resident(params)),
                _ => Ok(Lent::Bound(self.bind(block, speaker, needs, &mut here)?)),
            };
        };
        if let Some(params) = resident {
            return Ok(Lent::Resident(params));
        }
        if self.live.fetch_add(1, Ordering::Relaxed) >= slots.most_live {
            self.live.fetch_sub(1, Ordering::Relaxed);
            return Err(Error::NoSlot { block, slots: slots.most_live });
        }
        let params = self.bind(block, speaker, needs, &mut |weight| Ok(weight.copy_to(&self.device)?));
        if params.is_err() {
            self.live.fetch_sub(1, Ordering::Relaxed);
        }
        Ok(Lent::Slot(params?))
    }

    /// Ends the use of a slot.
    pub(super) fn take_back(&self, block: usize, params: BlockParams) {
        self.live.fetch_sub(1, Ordering::Relaxed);
        if self.slots.is_some_and(|slots| slots.is_spoiled) {
            for (name, slot) in params.into_slots() {
                if let Err(source) = slot.weight.spoil() {
                    let mut spoiled = self.spoiled.lock().unwrap_or_else(PoisonError::into_inner);
                    *spoiled = Some(Error::StillRead { block, name, source });
                }
            }
        }
    }

    /// The parameters of a block with every weight given out by `place`. What is cut into shards is gathered, to where blocks
    /// compute.
    fn bind(
        &self,
        block: usize,
        speaker: Speaker,
        needs: Needs,
        place: &mut dyn FnMut(&Weight) -> Result<Weight, Error>,
    ) -> Result<BlockParams, Error> {
        self.bind_on(&self.device, block, speaker, needs, place)
    }

    /// As [`Self::bind`], with what is gathered on `device`.
    fn bind_on(
        &self,
        device: &Device,
        block: usize,
        speaker: Speaker,
        needs: Needs,
        place: &mut dyn FnMut(&Weight) -> Result<Weight, Error>,
    ) -> Result<BlockParams, Error> {
        let own = &self.blocks[block];
        let mut slots: BTreeMap<String, Slot> = BTreeMap::new();
        let mut add = |name: &str, weight: Weight, grad: Option<Tensor>| match slots
            .insert(name.to_string(), Slot { weight, grad })
        {
            None => Ok(()),
            Some(_) => Err(Error::Duplicate { name: name.into() }),
        };
        for (name, weight) in own.frozen.all(&self.sharing, &own.stays_on_host, device)?.iter() {
            add(name, place(weight)?, None)?;
        }
        let (values, trains) = self.values_of(own, speaker, device)?;
        let binds_grads = trains && (own.bucket.is_lasting() || needs == Needs::Gradients);
        let grads = |bucket: &Bucket| binds_grads.then(|| bucket.grads()).transpose();
        let own_grads = if own.flat.is_empty() { None } else { grads(&own.bucket)? };
        for entry in own.flat.entries() {
            let value = FlatBlock::view(&values, entry)?;
            let grad = own_grads.as_ref().map(|grads| FlatBlock::view(grads, entry)).transpose()?;
            add(&entry.name, place(&Weight::Dense(value))?, grad)?;
        }
        for Shared { param, bucket, .. } in &own.shared {
            let source = &self.blocks[param.of_block];
            let frozen = source.frozen.one(&param.of_name, &self.sharing, &source.stays_on_host, device)?;
            if let Some(weight) = frozen {
                add(&param.name, weight, None)?;
                continue;
            }
            let entry =
                source.flat.entry(&param.of_name).ok_or_else(|| Error::NotShared { name: param.of_name.clone() })?;
            let (values, _) = self.values_of(source, speaker, device)?;
            let grad = bucket.as_ref().map(&grads).transpose()?.flatten();
            let grad = grad.map(|grads| grads.reshape(entry.shape.as_slice()));
            add(&param.name, Weight::Dense(FlatBlock::view(&values, entry)?), grad.transpose()?)?;
        }
        Ok(BlockParams::new(slots))
    }

    /// All trained values of a block as a speaker has them, and whether gradients are gathered for them.
    fn values_of(&self, block: &Block, speaker: Speaker, device: &Device) -> Result<(Tensor, bool), Error> {
        let (values, trains) = match (speaker, &block.reference) {
            (Speaker::Reference, Some(reference)) => (&reference.values, false),
            _ => (block.flat.values(), true),
        };
        if block.flat.has_all_values() {
            return Ok((values.clone(), trains));
        }
        let all = self.sharing.gather(&on_host(values)?, block.flat.shards())?;
        let count = all.len();
        Ok((Tensor::from_vec(all, count, device)?, trains))
    }

    /// The parameters of a block where they rest, to be read and not computed with.
    ///
    /// # Errors
    /// If there is no such block, or it is cut into shards.
    pub fn at_rest(&self, block: usize) -> Result<BlockParams, Error> {
        let own = self.blocks.get(block).ok_or(Error::NoBlock { block, blocks: self.blocks.len() })?;
        if self.sharing.stage() == ZeroStage::Parameters {
            return own.policy.clone().ok_or(Error::IsCut { block });
        }
        self.bind(block, Speaker::Policy, self.bound_at_rest(), &mut here)
    }

    /// What is bound for longer than a visit: gradients too, unless their places come and go.
    fn bound_at_rest(&self) -> Needs {
        if self.sharing.stage() >= ZeroStage::Gradients { Needs::Values } else { Needs::Gradients }
    }

    /// The name of how the frozen weight `name` of a block is stored, if it has it.
    pub fn kind_of(&self, block: usize, name: &str) -> Option<String> {
        let own = self.blocks.get(block)?;
        let trained = || own.flat.entry(name).map(|_| "f32".to_string());
        own.frozen.kind_name(name).or_else(trained)
    }

    /// The flat buffers of every block.
    pub fn flats(&self) -> impl Iterator<Item = &FlatBlock> {
        self.blocks.iter().map(|block| &block.flat)
    }

    /// Number of trained values over all blocks.
    pub fn num_trainable(&self) -> usize {
        self.flats().map(FlatBlock::len).sum()
    }

    /// Bytes of gradients that are there between steps.
    pub fn gradient_bytes(&self) -> usize {
        let lasting = |bucket: &Bucket| if bucket.is_lasting() { bucket.len() } else { 0 };
        let shared = |block: &Block| -> usize {
            block.shared.iter().filter_map(|shared| shared.bucket.as_ref()).map(lasting).sum()
        };
        let own: usize = self.flats().map(|flat| flat.grads().elem_count()).sum();
        size_of::<f32>() * (own + self.blocks.iter().map(shared).sum::<usize>())
    }

    /// Trained values that this rank keeps.
    pub fn num_kept(&self) -> usize {
        self.flats().map(|flat| flat.values().elem_count()).sum()
    }

    /// Bytes of gradients that a step of so many micro-batches takes beside those of the buckets.
    pub fn bytes_aside(&self, sums: Sums) -> usize {
        size_of::<f32>() * sums.most_aside() * self.num_trainable()
    }

    /// Bytes of frozen weights over all blocks, as far as they are on this rank.
    pub fn frozen_bytes(&self) -> usize {
        self.blocks.iter().map(|block| block.frozen.size_bytes()).sum()
    }

    /// Sets all gradients to zero.
    ///
    /// # Errors
    /// If the device fails.
    pub fn zero_gradients(&self) -> Result<(), Error> {
        self.blocks.iter().try_for_each(|block| {
            block.bucket.clear()?;
            block.shared.iter().filter_map(|shared| shared.bucket.as_ref()).try_for_each(Bucket::clear)
        })
    }

    pub(super) fn end_micro_step(&self, block: usize, sums: Sums, index: usize) -> Result<(), Error> {
        let own = &self.blocks[block];
        own.bucket.end_micro_step(sums, index)?;
        own.shared.iter().filter_map(|s| s.bucket.as_ref()).try_for_each(|bucket| bucket.end_micro_step(sums, index))
    }

    /// Adds the ranks' gradients, and what other blocks gathered for this one's parameters. Those are before it in the order of
    /// backward.
    pub(super) fn finish_gradients(&self, block: usize, sums: Sums) -> Result<(), Error> {
        let own = &self.blocks[block];
        if self.sharing.world_size() > 1 {
            return self.reduce_gradients(block, sums);
        }
        for (Shared { bucket, .. }, entry) in self.sharers(block) {
            if let Some(bucket) = bucket {
                let grads = own.flat.grads().narrow(0, entry.range.start, entry.range.len())?;
                buffer::add(&grads, &bucket.grads()?)?;
            }
        }
        Ok(())
    }

    /// What other blocks have of a block's parameters.
    fn sharers(&self, block: usize) -> impl Iterator<Item = (&Shared, &Entry)> {
        let flat = &self.blocks[block].flat;
        let shared = self.blocks.iter().flat_map(|other| &other.shared).filter(move |s| s.param.of_block == block);
        shared.filter_map(|shared| Some((shared, flat.entry(&shared.param.of_name)?)))
    }

    /// Keeps a copy of the trained values as the reference policy.
    ///
    /// # Errors
    /// If memory runs out.
    pub fn keep_reference(&mut self) -> Result<(), Error> {
        for block in &mut self.blocks {
            block.reference = Some(Reference { values: block.flat.values().copy()?, params: None });
        }
        for block in 0..self.blocks.len() {
            if self.is_resident(block) {
                let params = self.bind(block, Speaker::Reference, Needs::Values, &mut here)?;
                if let Some(reference) = &mut self.blocks[block].reference {
                    reference.params = Some(params);
                }
            }
        }
        Ok(())
    }

    /// Whether a reference was kept.
    pub fn has_reference(&self) -> bool {
        self.references().next().is_some()
    }

    /// The reference's flat values by block; none if no reference was kept.
    pub fn references(&self) -> impl Iterator<Item = &Tensor> {
        self.blocks.iter().filter_map(|block| block.reference.as_ref()).map(|reference| &reference.values)
    }

    /// Moves the reference towards the trained values: `ref = alpha * policy + (1 - alpha) * ref` (TRL's
    /// `ref_model_mixup_alpha`; Gorbatovski et al., 2404.09656).
    ///
    /// # Errors
    /// If the device fails.
    pub fn mix_reference(&self, alpha: f64) -> Result<(), Error> {
        for (flat, reference) in self.flats().zip(self.references()) {
            if flat.values().elem_count() > 0 {
                buffer::mix(reference, flat.values(), alpha as f32)?;
            }
        }
        Ok(())
    }
}

impl Block {
    /// A block whose frozen weights are where they were loaded.
    fn new(init: BlockInit, before: &[Self], device: &Device, sharing: &Sharing) -> Result<Self, Error> {
        let BlockInit { frozen, stays_on_host, trainable, shared: shared_params } = init;
        let flat = FlatBlock::new(trainable, device, sharing)?;
        let passes = sharing.stage() >= ZeroStage::Gradients;
        let shared = |param: SharedParam| {
            let trained = before.get(param.of_block).and_then(|source| source.flat.entry(&param.of_name));
            let bucket = trained.map(|entry| {
                let count = entry.range.len();
                if passes { Ok(Bucket::passing(count, device)) } else { Bucket::zeros(count, device) }
            });
            Ok::<_, Error>(Shared { param, bucket: bucket.transpose()?, reduced: Mutex::default() })
        };
        let shared = shared_params.into_iter().map(shared).collect::<Result<_, _>>()?;
        let bucket = if passes { Bucket::passing(flat.len(), device) } else { Bucket::new(flat.grads()) };
        Ok(Self { frozen: Frozen::new(frozen), stays_on_host, flat, bucket, shared, policy: None, reference: None })
    }
}

/// A weight where it is.
#[expect(clippy::unnecessary_wraps, reason = "the form of what places weights")]
fn here(weight: &Weight) -> Result<Weight, Error> {
    Ok(weight.clone())
}

/// The values of a buffer, which may be a rank's share of nothing.
fn on_host(buffer: &Tensor) -> Result<Vec<f32>, Error> {
    if buffer.elem_count() == 0 { Ok(Vec::new()) } else { Ok(buffer::to_vec(buffer)?) }
}
