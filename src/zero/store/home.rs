//! Trained values, gradients and the optimizer's state in host memory, or values and state in a file, beside blocks that compute with a copy.
//!
//! Gradients go home when they are final, while backward goes on with the blocks before; values come back when the optimizer has
//! moved them, rounded by the host where blocks would round them. Both are copied on a queue of their own. Another thread moves a block's values, or this rank's part of them, while
//! the next step begins; who asks for the block waits for them, and gathers them then where other ranks move the rest.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::Tensor;

use super::ParamStore;
use crate::device::{Buffer, Queue, Ticket, Work};
use crate::ops::buffer;
use crate::zero::flat::bytes_of;
use crate::zero::gradients::Bucket;
use crate::zero::packed::{Packed, pack};
use crate::zero::read::{ReadLayout, ReadValues};
use crate::zero::values::Stage;
use crate::zero::{Error, FlatBlock, Link};

/// The ways of one block's flat buffers.
#[derive(Debug)]
pub(super) struct Home {
    /// Unless the values come for each visit.
    working: Option<Working>,
    /// What comes for each visit, if that is not the values as they are.
    packed: Option<Packed>,
    /// The memory through which rounded values go to where the block computes.
    stage: Arc<Stage>,
    /// The memory of the flat buffers, where it is page-locked.
    values: Option<Arc<Buffer>>,
    grads: Option<Arc<Buffer>>,
    /// When the optimizer has moved the values and sent them, if another thread does it.
    moved: Mutex<Ticket>,
    /// What kept it from that.
    problem: Mutex<Option<Error>>,
    /// When this rank's part of the values is where the block computes.
    sent: Mutex<Ticket>,
    /// Whether ranks have moved their parts of the values, and nobody has asked for them since.
    is_apart: AtomicBool,
}

/// The trained values where a block computes, as it reads them.
#[derive(Debug)]
struct Working {
    values: ReadValues,
    /// The memory of each run on a GPU; none on the CPU.
    memory: Vec<Arc<Buffer>>,
}

impl Working {
    fn new(layout: &ReadLayout, link: &Link) -> Result<Self, Error> {
        let values = layout.empty(link.device())?;
        let lock = |run: &Tensor| Ok::<_, Error>(Arc::new(Buffer::of_tensor(run.clone())?));
        let runs = values.runs().iter().filter(|run| run.device().is_cuda());
        Ok(Self { memory: runs.map(lock).collect::<Result<_, _>>()?, values })
    }

    /// Replaces bytes of a run from `first` on, in the order of what computes.
    fn write(&self, run: usize, first: usize, bytes: &[u8]) -> Result<(), Error> {
        let target = &self.values.runs()[run];
        if bytes.is_empty() {
            return Ok(());
        }
        if let Some(memory) = self.memory.get(run) {
            let mut host = Buffer::host(bytes.len());
            host.write(0, bytes)?;
            let place = memory.part(first..first + bytes.len())?;
            Queue::of(target.device())?.copy(&Arc::new(host).whole(), &place, &Ticket::done())?;
            return Ok(());
        }
        let size = target.dtype().size_in_bytes();
        let values = Tensor::from_raw_buffer(bytes, target.dtype(), &[bytes.len() / size], target.device())?;
        Ok(target.slice_set(&values, 0, first / size)?)
    }
}

impl Home {
    /// Where values `stay` where the block computes, unless parameters wait too. They are not sent yet.
    pub(super) fn new(flat: &FlatBlock, link: &Link, stays: bool) -> Result<Self, Error> {
        let stays = !link.offload().params && stays && !flat.is_empty();
        let lock = |tensor: &Tensor| Ok::<_, Error>(link.lock(tensor)?.map(Arc::new));
        let (is_flat, stage) = (flat.layout().is_flat(), link.stage().clone());
        // Rounded values pass through memory of their own.
        let values = flat.stored().memory().filter(|_| is_flat).map(lock).transpose()?.flatten();
        let packed = (!stays && !is_flat).then(|| Packed::new(flat, flat.stored(), &stage)).transpose()?;
        Ok(Self {
            working: stays.then(|| Working::new(flat.layout(), link)).transpose()?,
            packed,
            stage,
            values,
            grads: lock(flat.grads())?,
            moved: Mutex::new(Ticket::done()),
            problem: Mutex::default(),
            sent: Mutex::new(Ticket::done()),
            is_apart: AtomicBool::new(false),
        })
    }

    pub(super) fn working_values(&self) -> Option<&ReadValues> {
        self.working.as_ref().map(|working| &working.values)
    }

    /// What comes for each visit, if that is not the values as they are.
    pub(super) fn packed(&self) -> Option<&Packed> {
        self.packed.as_ref()
    }

    pub(super) fn locked_values(&self) -> Option<&Arc<Buffer>> {
        self.values.as_ref()
    }

    /// Has what computes wait for the values that were sent last.
    pub(super) fn arrive(&self) -> Result<(), Error> {
        self.wait_for_optimizer()?;
        self.working.iter().flat_map(|working| &working.memory).try_for_each(|memory| Ok(memory.come_home()?))
    }

    /// Lets the host wait until the optimizer has moved the values.
    ///
    /// # Errors
    /// What kept it from that, to the first who waits.
    pub(super) fn wait_for_optimizer(&self) -> Result<(), Error> {
        let moved = lock(&self.moved).clone();
        moved.wait(None).map_err(|given_up| lock(&self.problem).take().unwrap_or_else(|| given_up.into()))
    }

    /// Whether it has. Who waits for the values is told what kept it from that.
    pub(super) fn is_moved(&self) -> bool {
        lock(&self.moved).is_done().unwrap_or(false)
    }

    /// Rounds the values anew for visits, if they come rounded.
    fn pack_values(&self, flat: &FlatBlock) -> Result<(), Error> {
        match &self.packed {
            Some(packed) => packed.replace(flat.layout(), &flat.own_values()?),
            None => Ok(()),
        }
    }

    /// Starts the way of this rank's part of the values to its place where the block computes, after `computed`, if all are there.
    fn send_values(&self, flat: &FlatBlock, copies: &Queue, computed: &Ticket) -> Result<(), Error> {
        let Some(working) = &self.working else { return Ok(()) };
        let layout = flat.layout();
        if flat.own().is_empty() {
            *lock(&self.sent) = computed.clone();
            return Ok(());
        }
        let as_they_are = self.values.clone().or_else(|| flat.stored().locked()).filter(|_| layout.is_flat());
        let (from, is_staged) = match as_they_are {
            Some(values) => (values, false),
            None => (Arc::new(pack(layout, &flat.own_values()?, &self.stage)?), true),
        };
        let mut sent = computed.clone();
        // What of a run is other ranks' alone sends nothing, and is not waited for.
        for (run, part) in layout.own_parts().into_iter().enumerate().filter(|(_, part)| !part.is_empty()) {
            let place = layout.own_shard(run);
            match working.memory.get(run) {
                Some(memory) => sent = copies.copy(&from.part(part)?, &memory.part(place)?, computed)?,
                None => from.with_bytes(|bytes| working.write(run, place.start, &bytes[part]))??,
            }
        }
        if is_staged {
            self.stage.give_shared(from);
        }
        *lock(&self.sent) = sent;
        Ok(())
    }

    /// The memory of each run of all values where a GPU computes with them, and when this rank's part is there; `None` if they come
    /// for each visit.
    pub(super) fn sent_values(&self) -> Option<(&[Arc<Buffer>], Ticket)> {
        let memory = &self.working.as_ref()?.memory;
        (!memory.is_empty()).then(|| (memory.as_slice(), lock(&self.sent).clone()))
    }

    /// Replaces all values where the block computes by the bytes of each run.
    pub(super) fn write_working(&self, runs: &[Vec<u8>]) -> Result<(), Error> {
        let Some(working) = &self.working else { return Ok(()) };
        runs.iter().enumerate().try_for_each(|(run, bytes)| working.write(run, 0, bytes))
    }

    /// Starts the way of a block's gradients, which are all made, to where the optimizer works.
    pub(super) fn send_gradients(&self, grads: Tensor, flat: &FlatBlock, link: &Link) -> Result<(), Error> {
        match &self.grads {
            Some(home) => {
                // Freed after the copy, in the order of the queue on which it was made.
                let from = Arc::new(Buffer::of_tensor(grads)?);
                let place = if from.len() == home.len() { home.whole() } else { home.part(bytes_of(&flat.own()))? };
                link.copies().copy(&from.whole(), &place, &Ticket::done())?;
            }
            None if grads.elem_count() == flat.own().len() => {
                buffer::write(&flat.own_grads()?, &buffer::to_vec(&grads)?)?;
            }
            None => buffer::write(flat.grads(), &buffer::to_vec(&grads)?)?,
        }
        Ok(())
    }

    /// Lets the host wait until the flat buffers are its own.
    fn wait(&self) -> Result<(), Error> {
        self.wait_for_optimizer()?;
        [&self.values, &self.grads].into_iter().flatten().try_for_each(|buffer| Ok(buffer.wait()?))
    }
}

/// A step of the optimizer on this rank's part of one block, for another thread. Dropped before it is done, who waits for the
/// values gets an error.
#[derive(Debug)]
pub(in crate::zero) struct Errand {
    home: Arc<Home>,
    flat: FlatBlock,
    copies: Queue,
    /// When nothing computes with the old values any more.
    computed: Ticket,
    /// Whether this rank's part is to be where the block computes: else it comes there with those of the other ranks.
    sends: bool,
    work: Work,
}

impl Errand {
    /// The block's flat buffers.
    pub(in crate::zero) fn flat(&self) -> &FlatBlock {
        &self.flat
    }

    /// Does `step` on the flat buffers, and starts the way of the values to where the block computes and to the file that they are
    /// in. Returns whether it could; who waits for them gets the error.
    pub(in crate::zero) fn run(self, step: impl FnOnce(&FlatBlock) -> Result<(), Error>) -> bool {
        let Self { home, flat, copies, computed, sends, work } = self;
        let sent = || if sends { home.send_values(&flat, &copies, &computed) } else { Ok(()) };
        match step(&flat)
            .and_then(|()| home.pack_values(&flat))
            .and_then(|()| sent())
            .and_then(|()| flat.stored().unload())
        {
            Ok(()) => {
                work.done();
                true
            }
            Err(error) => {
                // Before the work is given up, so that who sees that finds the reason.
                *lock(&home.problem) = Some(error);
                false
            }
        }
    }
}

impl ParamStore {
    /// Adds what other blocks have of a block's gradients, and starts the way of all to where the optimizer works.
    pub(super) fn send_gradients_home(&self, block: usize) -> Result<(), Error> {
        let own = &self.blocks[block];
        let Some(home) = own.home.as_ref().filter(|_| !own.flat.is_empty()) else { return Ok(()) };
        let mut sums = own.bucket.take_sums()?;
        let Some(grads) = sums.pop() else { return Ok(()) };
        for (shared, entry) in self.sharers(block) {
            if let Some(more) = shared.bucket.as_ref().map(Bucket::take_sums).transpose()? {
                let place = grads.narrow(0, entry.range.start, entry.range.len())?;
                more.iter().try_for_each(|more| buffer::add(&place, more))?;
            }
        }
        home.send_gradients(grads, &own.flat, &self.link)
    }

    /// Lets the host wait until values and gradients that are on their way from or to the optimizer have come: to be called by all
    /// ranks, before it, or anyone on the host, reads or writes the flat buffers.
    ///
    /// # Errors
    /// If the device or the optimizer failed, or a rank is lost.
    pub fn settle(&self) -> Result<(), Error> {
        self.sharing.check_exchange()?;
        self.gradients_arrive()?;
        (0..self.blocks.len()).try_for_each(|block| self.values_arrive(block))?;
        self.blocks.iter().filter_map(|block| block.home.as_ref()).try_for_each(|home| home.wait())
    }

    /// Replaces a block's values by those of all parameters, as far as they are on this rank: `all` is `[n]`.
    ///
    /// # Errors
    /// If the lengths differ, or the device failed.
    pub fn write_values(&self, block: usize, all: &[f32]) -> Result<(), Error> {
        self.settle()?;
        self.blocks[block].flat.write_values(all)?;
        self.share_values(block)
    }

    /// Starts the way of this rank's part of a block's values, which the host has changed, to where it computes.
    pub(super) fn send_values(&self, block: usize) -> Result<(), Error> {
        let own = &self.blocks[block];
        let Some(home) = &own.home else { return Ok(()) };
        home.pack_values(&own.flat)?;
        if self.sends_own(&own.flat) {
            home.send_values(&own.flat, self.link.copies(), &Queue::of(self.device())?.ticket()?)?;
        }
        Ok(())
    }

    /// Whether this rank's part of the values goes to where the block computes by itself. Through host memory it comes there with
    /// those of the other ranks.
    fn sends_own(&self, flat: &FlatBlock) -> bool {
        flat.is_whole() || self.sharing.exchanges_on_device()
    }

    /// Whether the optimizer works on the host beside blocks that compute with a copy, and may do so while the next step begins.
    pub(in crate::zero) fn may_run_errands(&self) -> bool {
        self.link.has_home_elsewhere()
    }

    /// An errand of the optimizer on a block: nobody computes with its values before it is done, here and on every other rank that
    /// has a part of them. `None` if this one has none.
    pub(in crate::zero) fn errand(&self, block: usize) -> Result<Option<Errand>, Error> {
        let own = &self.blocks[block];
        let Some(home) = own.home.as_ref().filter(|_| !own.flat.is_empty()) else { return Ok(None) };
        let computed = Queue::of(self.device())?.ticket()?;
        let is_apart = home.working.is_some() && !own.flat.is_whole();
        home.is_apart.store(is_apart, Ordering::Relaxed);
        if own.flat.own().is_empty() {
            *lock(&home.sent) = computed;
            return Ok(None);
        }
        let (work, moved) = Ticket::promise();
        *lock(&home.moved) = moved;
        Ok(Some(Errand {
            home: home.clone(),
            flat: own.flat.clone(),
            copies: self.link.copies().clone(),
            computed,
            sends: self.sends_own(&own.flat),
            work,
        }))
    }

    /// Whether ranks have moved their parts of some values apart from each other, and these are gathered when a walk asks for them.
    pub(super) fn has_values_apart(&self) -> bool {
        let is_apart = |home: &Arc<Home>| home.is_apart.load(Ordering::Relaxed);
        self.blocks.iter().filter_map(|block| block.home.as_ref()).any(is_apart)
    }

    /// Gathers a block's values if ranks have moved their parts apart from each other.
    pub(super) fn gather_apart(&self, block: usize) -> Result<(), Error> {
        let Some(home) = self.blocks[block].home.as_ref().filter(|home| home.is_apart.load(Ordering::Relaxed)) else {
            return Ok(());
        };
        home.wait_for_optimizer()?;
        self.gather_values(block)?;
        // After it: ranks that leave a walk leave it after the same collective, and gather the same blocks later.
        home.is_apart.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// The same between GPUs for the block that a walk asks for next, if this rank's part is moved: it comes while another computes.
    /// If it is not, it is gathered when it is asked for, which is no other place in the order of what ranks exchange.
    pub(in crate::zero) fn gather_ahead(&self, block: usize) -> Result<(), Error> {
        let Some(home) = self.blocks.get(block).and_then(|block| block.home.as_ref()) else { return Ok(()) };
        let is_beside = self.sharing.exchanges_on_device();
        if is_beside && home.is_apart.load(Ordering::Relaxed) && home.is_moved() {
            self.gather_apart(block)?;
        }
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[path = "home_tests.rs"]
mod tests;
