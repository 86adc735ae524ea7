//! Owns every block's parameters, lends them to the walk and gathers their gradients.
//!
//! A store keeps blocks where they compute, or what of them waits elsewhere comes for as long as it is lent: from this machine's
//! host memory, from all ranks, or both. All answer the same calls. Where ranks share anything, all of them must ask for the same
//! blocks in the same order.

mod arrival;
mod exchanged;
mod home;
mod sizes;
mod together;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};

use super::files::Shelf;
use super::frozen::Frozen;
use super::gradients::Bucket;
use super::packed::Packed;
use super::{Coming, Entry, Error, FlatBlock, Link, Needs, Offload, Sharing, Speaker, Sums, Values, Visit, Walk};
use crate::config::settings::ZeroStage;
use crate::model::params::{BlockInit, BlockParams, SharedParam};
use crate::ops::buffer;
use arrival::For;
pub(super) use arrival::{Ahead, Arriving};
use exchanged::OnTheirWay;
pub(super) use home::Errand;
use home::Home;
pub use sizes::LayerBytes;
pub use together::Room;

/// How many of the blocks that wait elsewhere are lent at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slots {
    /// Most at a time.
    pub most_live: usize,
    /// Whether values are overwritten with NaN when a block is given back, so that a late read is seen.
    pub is_spoiled: bool,
}

/// Parameters of all blocks.
#[derive(Debug)]
pub struct ParamStore {
    link: Link,
    blocks: Vec<Block>,
    slots: Option<Slots>,
    sharing: Sharing,
    live: AtomicUsize,
    fetches: AtomicU64,
    /// Between GPUs.
    on_their_way: Mutex<OnTheirWay>,
    /// What went wrong when a slot was given back, told by the next call.
    spoiled: Mutex<Option<Error>>,
}

#[derive(Debug)]
struct Block {
    frozen: Frozen,
    /// Those of them that a GPU reads in host memory.
    stays_on_host: BTreeSet<String>,
    flat: FlatBlock,
    /// Where the flat buffers lie elsewhere than the block computes.
    home: Option<Arc<Home>>,
    /// The values where the block computes, while those of other ranks come.
    values_coming: Mutex<Vec<Coming>>,
    bucket: Bucket,
    /// Parameters of other blocks that this one reads too.
    shared: Vec<Shared>,
    /// Bound to the trained values, and to the buckets that last; `None` where something of the block waits elsewhere.
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
    /// The same on a GPU.
    exchanged: Mutex<Option<Tensor>>,
}

/// A second set of trained values.
#[derive(Debug)]
struct Reference {
    /// As the trained ones: f32 `[n]`, or this rank's.
    values: Values,
    /// The same as it comes for visits, if that is not as they are.
    packed: Option<Packed>,
    params: Option<BlockParams>,
}

impl Reference {
    /// Rounds values that have changed for visits.
    fn pack(&self, flat: &FlatBlock) -> Result<(), Error> {
        match &self.packed {
            Some(packed) => packed.replace(flat.layout(), &flat.own_part(&self.values.tensor()?)?),
            None => Ok(()),
        }
    }
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
        Self::build(blocks, device, None, Sharing::alone(), Offload::default())
    }

    /// As [`Self::new`], with what the ranks of `sharing` share, and what waits elsewhere: of a block that is cut into shards this
    /// rank keeps its own as soon as the block is loaded.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn placed<E: From<Error>>(
        blocks: impl IntoIterator<Item = Result<BlockInit, E>>,
        device: &Device,
        sharing: Sharing,
        offload: Offload,
    ) -> Result<Self, E> {
        Self::build(blocks, device, None, sharing, offload)
    }

    /// As [`Self::new`], but the weights of all blocks stay in host memory, and their values are copied to `device` for each
    /// visit.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_slots<E: From<Error>>(
        blocks: impl IntoIterator<Item = Result<BlockInit, E>>,
        device: &Device,
        slots: Slots,
    ) -> Result<Self, E> {
        let offload = Offload { params: true, ..Offload::default() };
        Self::build(blocks, device, Some(slots), Sharing::alone(), offload)
    }

    fn build<E: From<Error>>(
        inits: impl IntoIterator<Item = Result<BlockInit, E>>,
        device: &Device,
        slots: Option<Slots>,
        sharing: Sharing,
        offload: Offload,
    ) -> Result<Self, E> {
        let link = Link::new(device, offload, sharing.exchanges_on_device(), sharing.rank())?;
        let mut blocks: Vec<Block> = Vec::new();
        for init in inits {
            let mut block = Block::new(init?, &blocks, &link, &sharing)?;
            if sharing.cuts_parameters() || link.offload().params {
                block.frozen.put_away(&sharing, &block.stays_on_host, &link)?;
            } else {
                block.frozen.move_to(&block.stays_on_host, device)?;
            }
            blocks.push(block);
        }
        let mut store = Self {
            link,
            blocks,
            slots,
            sharing,
            live: AtomicUsize::new(0),
            fetches: AtomicU64::new(0),
            on_their_way: Mutex::default(),
            spoiled: Mutex::new(None),
        };
        for block in 0..store.blocks.len() {
            if store.link.has_home_elsewhere() {
                store.share_values(block)?;
            }
            if store.is_resident(block) {
                let params = store.bind(block, Speaker::Policy, store.bound_at_rest(), &Arriving::default())?;
                store.blocks[block].policy = Some(params);
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
        self.link.device()
    }

    /// What waits elsewhere.
    pub fn offload(&self) -> &Offload {
        self.link.offload()
    }

    /// Number of blocks.
    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Whether all blocks are where blocks compute.
    pub fn holds_all(&self) -> bool {
        self.blocks.iter().all(|block| block.policy.is_some())
    }

    /// Whether all blocks of a speaker are where blocks compute, and ranks need not go through them together. After a step of an
    /// optimizer with a home elsewhere they do, once: each has moved a part of the values.
    pub fn holds_all_of(&self, speaker: Speaker) -> bool {
        if self.has_values_apart() {
            return false;
        }
        let is_there = |block: &Block| match &block.reference {
            Some(reference) => reference.params.is_some(),
            None => block.policy.is_some(),
        };
        if speaker == Speaker::Reference { self.blocks.iter().all(is_there) } else { self.holds_all() }
    }

    /// Whether a step should finish with one block before it takes the next, so that gradients of one block take memory at a
    /// time; `None` where that is not asked.
    pub fn passing_gradient_bytes(&self) -> Option<usize> {
        self.gradients_pass().then(|| size_of::<f32>() * self.num_trainable())
    }

    fn gradients_pass(&self) -> bool {
        gradients_pass(&self.sharing, &self.link)
    }

    /// Whether a block's trained values come for a visit.
    fn values_wait(&self) -> bool {
        self.link.offload().params && self.link.home().is_cpu()
    }

    fn is_resident(&self, block: usize) -> bool {
        let own = &self.blocks[block];
        let reads_values = !own.flat.is_empty() || !own.shared.is_empty();
        let comes = self.sharing.cuts_parameters() || own.frozen.is_away() || (self.values_wait() && reads_values);
        !comes
    }

    /// Announces a walk: the blocks in the order in which they will be asked for, and how the gradients of the step's
    /// micro-batches are added.
    pub fn walk(&self, order: Arc<[Visit]>, speaker: Speaker, sums: Sums) -> Walk<'_> {
        Walk::new(self, order, speaker, sums)
    }

    /// The policy's parameters of all blocks, for as long as the store is borrowed; `None` where they are not all there at a
    /// time.
    ///
    /// # Errors
    /// If the device fails.
    pub fn hold(&self) -> Result<Option<Vec<&BlockParams>>, Error> {
        (0..self.blocks.len()).try_for_each(|block| self.values_arrive(block))?;
        Ok(self.blocks.iter().map(|block| block.policy.as_ref()).collect())
    }

    /// Blocks that were asked for so far.
    pub fn fetches(&self) -> u64 {
        self.fetches.load(Ordering::Relaxed)
    }

    /// Counts a visit of a block, before anything of it is asked for.
    pub(super) fn begin_visit(&self, block: usize) -> Result<(), Error> {
        if let Some(error) = self.spoiled.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(error);
        }
        self.fetches.fetch_add(1, Ordering::Relaxed);
        if block >= self.blocks.len() {
            return Err(Error::NoBlock { block, blocks: self.blocks.len() });
        }
        self.values_arrive(block)
    }

    /// Has what computes wait for the values of a block that the optimizer, here or on other ranks, moved last.
    fn values_arrive(&self, block: usize) -> Result<(), Error> {
        self.gather_apart(block)?;
        let own = &self.blocks[block];
        own.home.as_ref().map_or(Ok(()), |home| home.arrive())?;
        let arriving = std::mem::take(&mut *own.values_coming.lock().unwrap_or_else(PoisonError::into_inner));
        arriving.iter().try_for_each(Coming::arrive)
    }

    /// The parameters of a block that is where it computes.
    pub(super) fn resident(&self, block: usize, speaker: Speaker, needs: Needs) -> Option<&BlockParams> {
        let own = &self.blocks[block];
        let params = match (speaker, &own.reference) {
            (Speaker::Reference, Some(reference)) => reference.params.as_ref(),
            _ => own.policy.as_ref(),
        };
        // What is resident has no place for gradients where those come and go.
        params.filter(|_| needs == Needs::Values || own.bucket.is_lasting())
    }

    /// Takes a slot for a block that is lent.
    pub(super) fn take_slot(&self, block: usize) -> Result<(), Error> {
        let Some(slots) = self.slots else { return Ok(()) };
        if self.live.fetch_add(1, Ordering::Relaxed) >= slots.most_live {
            self.live.fetch_sub(1, Ordering::Relaxed);
            return Err(Error::NoSlot { block, slots: slots.most_live });
        }
        Ok(())
    }

    /// Whether blocks can come while others compute.
    pub fn comes_ahead(&self) -> bool {
        let is_beside = self.sharing.world_size() == 1 || self.sharing.exchanges_on_device();
        self.device().is_cuda() && is_beside && !self.has_slots()
    }

    /// Where flat buffers lie.
    pub(super) fn home(&self) -> &Device {
        self.link.home()
    }

    /// Whether what is lent is not to be read later, and so is neither fetched ahead nor kept.
    pub(super) fn has_slots(&self) -> bool {
        self.slots.is_some()
    }

    /// Ends the use of a slot.
    pub(super) fn take_back(&self, block: usize, params: BlockParams, arriving: Arriving) {
        self.live.fetch_sub(1, Ordering::Relaxed);
        if self.slots.is_some_and(|slots| slots.is_spoiled) {
            drop(params);
            if let Err((name, source)) = arriving.spoil() {
                let mut spoiled = self.spoiled.lock().unwrap_or_else(PoisonError::into_inner);
                *spoiled = Some(Error::StillRead { block, name, source });
            }
        }
    }

    /// The parameters of a block where they rest, to be read and not computed with.
    ///
    /// # Errors
    /// If there is no such block, or it is cut into shards.
    pub fn at_rest(&self, block: usize) -> Result<BlockParams, Error> {
        let own = self.blocks.get(block).ok_or(Error::NoBlock { block, blocks: self.blocks.len() })?;
        self.settle()?;
        if self.sharing.cuts_parameters() {
            return own.policy.clone().ok_or(Error::IsCut { block });
        }
        self.fetched(For::Computing, block, Speaker::Policy, self.bound_at_rest())
    }

    /// What is bound for longer than a visit: gradients too, unless their places come and go.
    fn bound_at_rest(&self) -> Needs {
        if self.gradients_pass() { Needs::Values } else { Needs::Gradients }
    }

    /// The name of how the frozen weight `name` of a block is stored, if it has it.
    pub fn kind_of(&self, block: usize, name: &str) -> Option<String> {
        let own = self.blocks.get(block)?;
        let trained = || {
            own.flat.dtype_of(name).map(|dtype| match dtype {
                DType::F32 => "f32".to_string(),
                dtype => format!("f32, read as {}", dtype.as_str()),
            })
        };
        own.frozen.kind_name(name).or_else(trained)
    }

    /// The flat buffers of every block.
    pub fn flats(&self) -> impl Iterator<Item = &FlatBlock> {
        self.blocks.iter().map(|block| &block.flat)
    }

    /// The file of the optimizer's state.
    pub(super) fn optimizer_file(&self) -> Option<&Arc<Shelf>> {
        self.link.optimizer_file()
    }

    /// Blocks that are read ahead of a walk.
    pub(super) fn blocks_ahead(&self) -> usize {
        if self.has_slots() { 0 } else { self.link.blocks_ahead() }
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
        if self.sharing.exchanges_on_device() {
            return self.exchange_gradients(block, sums);
        }
        if self.sharing.world_size() > 1 {
            return self.reduce_gradients(block, sums);
        }
        if self.link.has_home_elsewhere() {
            return self.send_gradients_home(block);
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
        self.settle()?;
        for block in &mut self.blocks {
            let values = block.flat.stored().copy()?;
            // Beside another home they come from host memory for each visit.
            let is_packed = block.home.is_some() && !block.flat.layout().is_flat();
            let packed = || Packed::new(&block.flat, &values, self.link.stage());
            let packed = is_packed.then(packed).transpose()?;
            block.reference = Some(Reference { values, packed, params: None });
        }
        for block in 0..self.blocks.len() {
            // Beside another home its values come for each visit, as they are then.
            if self.is_resident(block) && !self.link.has_home_elsewhere() {
                let params = self.fetched(For::Computing, block, Speaker::Reference, Needs::Values)?;
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
    pub fn references(&self) -> impl Iterator<Item = &Values> {
        self.blocks.iter().filter_map(|block| block.reference.as_ref()).map(|reference| &reference.values)
    }

    /// Moves the reference towards the trained values: `ref = alpha * policy + (1 - alpha) * ref` (TRL's
    /// `ref_model_mixup_alpha`; Gorbatovski et al., 2404.09656).
    ///
    /// # Errors
    /// If the device fails.
    pub fn mix_reference(&self, alpha: f64) -> Result<(), Error> {
        self.settle()?;
        for Block { flat, reference, .. } in &self.blocks {
            if let Some(reference) = reference.as_ref().filter(|reference| !reference.values.is_empty()) {
                let values = flat.values()?;
                reference.values.change(|reference| Ok(buffer::mix(reference, &values, alpha as f32)?))?;
                reference.pack(flat)?;
            }
        }
        Ok(())
    }
}

impl Block {
    /// A block whose frozen weights are where they were loaded.
    fn new(init: BlockInit, before: &[Self], link: &Link, sharing: &Sharing) -> Result<Self, Error> {
        let BlockInit { frozen, stays_on_host, trainable, shared: shared_params } = init;
        let device = link.device();
        let flat = FlatBlock::new(trainable, link, sharing)?;
        let passes = gradients_pass(sharing, link);
        let shared = |param: SharedParam| {
            let trained = before.get(param.of_block).and_then(|source| source.flat.entry(&param.of_name));
            let bucket = trained.map(|entry| {
                let count = entry.range.len();
                if passes { Ok(Bucket::passing(count, device)) } else { Bucket::zeros(count, device) }
            });
            let (reduced, exchanged) = (Mutex::default(), Mutex::default());
            Ok::<_, Error>(Shared { param, bucket: bucket.transpose()?, reduced, exchanged })
        };
        let shared = shared_params.into_iter().map(shared).collect::<Result<_, _>>()?;
        let bucket = if passes { Bucket::passing(flat.len(), device) } else { Bucket::new(flat.grads()) };
        let stays = !sharing.cuts_parameters();
        let home = link.has_home_elsewhere().then(|| Home::new(&flat, link, stays).map(Arc::new)).transpose()?;
        let frozen = Frozen::new(frozen);
        let values_coming = Mutex::default();
        Ok(Self { frozen, stays_on_host, flat, home, values_coming, bucket, shared, policy: None, reference: None })
    }
}

/// Whether gradients take memory where blocks compute from the first of a step until they are final, and lie elsewhere then.
fn gradients_pass(sharing: &Sharing, link: &Link) -> bool {
    sharing.stage() >= ZeroStage::Gradients || link.has_home_elsewhere()
}

/// The values of a buffer, which may be a rank's share of nothing.
fn on_host(buffer: &Tensor) -> Result<Vec<f32>, Error> {
    if buffer.elem_count() == 0 { Ok(Vec::new()) } else { Ok(buffer::to_vec(buffer)?) }
}

#[cfg(test)]
#[path = "store/read_tests.rs"]
mod read_tests;
