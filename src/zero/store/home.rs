//! Trained values, gradients and the optimizer's state in host memory, beside a GPU that computes with a copy.
//!
//! Gradients go home when they are final, while backward goes on with the blocks before; values come back when the optimizer has
//! moved them. Both are copied on a queue of their own.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Tensor};

use super::ParamStore;
use crate::device::{Buffer, Queue, Ticket, Work, empty};
use crate::ops::buffer;
use crate::zero::gradients::Bucket;
use crate::zero::{Error, FlatBlock, Link};

/// The ways of one block's flat buffers.
#[derive(Debug)]
pub(super) struct Home {
    /// The trained values where the block computes, unless they come for each visit: f32 `[n]`.
    working: Option<(Tensor, Arc<Buffer>)>,
    /// The memory of the flat buffers, where it is page-locked.
    values: Option<Arc<Buffer>>,
    grads: Option<Arc<Buffer>>,
    /// When the optimizer has moved the values and sent them, if another thread does it.
    moved: Mutex<Ticket>,
}

impl Home {
    /// Where values `stay` where the block computes, unless parameters wait too. They are not sent yet.
    pub(super) fn new(flat: &FlatBlock, link: &Link, stays: bool) -> Result<Self, Error> {
        let working = || {
            let values = empty(link.device(), flat.len(), DType::F32)?;
            let buffer = Arc::new(Buffer::of_tensor(values.clone())?);
            Ok::<_, Error>((values, buffer))
        };
        let stays = !link.offload().params && stays && !flat.is_empty();
        let lock = |tensor: &Tensor| Ok::<_, Error>(link.lock(tensor)?.map(Arc::new));
        let (values, grads) = (flat.stored().memory().map(lock).transpose()?.flatten(), lock(flat.grads())?);
        Ok(Self { working: stays.then(working).transpose()?, values, grads, moved: Mutex::new(Ticket::done()) })
    }

    pub(super) fn working_values(&self) -> Option<&Tensor> {
        self.working.as_ref().map(|(values, _)| values)
    }

    pub(super) fn locked_values(&self) -> Option<&Arc<Buffer>> {
        self.values.as_ref()
    }

    /// Has what computes wait for the values that were sent last.
    pub(super) fn arrive(&self) -> Result<(), Error> {
        self.wait_for_optimizer()?;
        match &self.working {
            Some((_, buffer)) => Ok(buffer.come_home()?),
            None => Ok(()),
        }
    }

    /// Lets the host wait until the optimizer has moved the values.
    pub(super) fn wait_for_optimizer(&self) -> Result<(), Error> {
        let moved = self.moved.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Ok(moved.wait(None)?)
    }

    /// Whether the optimizer has moved the values. Who waits for them is told what kept it from that.
    pub(super) fn is_moved(&self) -> bool {
        self.moved.lock().unwrap_or_else(PoisonError::into_inner).is_done().unwrap_or(false)
    }

    /// Starts the way of the values to where the block computes, after what computes with the old ones.
    fn send_values(&self, flat: &FlatBlock, copies: &Queue, computed: &Ticket) -> Result<(), Error> {
        let Some((working, target)) = &self.working else { return Ok(()) };
        match self.values.clone().or_else(|| flat.stored().locked()) {
            Some(values) => {
                copies.copy(&values.whole(), &target.whole(), computed)?;
            }
            None => buffer::write(working, &buffer::to_vec(&flat.values()?)?)?,
        }
        Ok(())
    }

    /// Starts the way of this rank's part of the values to its place among all where the block computes, if they are there.
    pub(super) fn send_own_values(&self, flat: &FlatBlock, link: &Link) -> Result<Option<Arc<Buffer>>, Error> {
        let Some((working, target)) = &self.working else { return Ok(None) };
        let own = flat.own();
        match self.values.clone().or_else(|| flat.stored().locked()) {
            _ if own.is_empty() => {}
            Some(values) => {
                let computed = Queue::of(link.device())?.ticket()?;
                let place = target.part(size_of::<f32>() * own.start..size_of::<f32>() * own.end)?;
                link.copies().copy(&values.whole(), &place, &computed)?;
                target.come_home()?;
            }
            None => buffer::write(&working.narrow(0, own.start, own.len())?, &buffer::to_vec(&flat.values()?)?)?,
        }
        Ok(Some(target.clone()))
    }

    /// Replaces all values where the block computes.
    pub(super) fn write_working(&self, all: &[f32]) -> Result<(), Error> {
        match &self.working {
            Some((working, _)) => Ok(buffer::write(working, all)?),
            None => Ok(()),
        }
    }

    /// Starts the way of a block's gradients, which are all made, to where the optimizer works.
    pub(super) fn send_gradients(&self, grads: Tensor, flat: &FlatBlock, link: &Link) -> Result<(), Error> {
        match &self.grads {
            Some(home) => {
                // Freed after the copy, in the order of the queue on which it was made.
                let from = Arc::new(Buffer::of_tensor(grads)?);
                let place = if from.len() == home.len() {
                    home.whole()
                } else {
                    home.part(flat.shard_bytes()[flat.rank()].clone())?
                };
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

/// A step of the optimizer on one block, for another thread. Dropped before it is done, who waits for the values gets an error.
#[derive(Debug)]
pub(in crate::zero) struct Errand {
    home: Arc<Home>,
    flat: FlatBlock,
    copies: Queue,
    /// When nothing computes with the old values any more.
    computed: Ticket,
    work: Work,
}

impl Errand {
    /// Does `step` on the flat buffers, and starts the way of the values.
    pub(in crate::zero) fn run(&self, step: impl FnOnce(&FlatBlock) -> Result<(), Error>) -> Result<(), Error> {
        step(&self.flat)?;
        self.home.send_values(&self.flat, &self.copies, &self.computed)?;
        self.flat.stored().unload()
    }

    /// Says that it is done.
    pub(in crate::zero) fn done(self) {
        self.work.done();
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

    /// Lets the host wait until values and gradients that are on their way from or to the optimizer have come: to be called
    /// before it, or anyone on the host, reads or writes the flat buffers.
    ///
    /// # Errors
    /// If the device failed.
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

    /// Starts the way of a block's values, which the host has changed and all of which are on this rank, to where it computes.
    pub(super) fn send_values(&self, block: usize) -> Result<(), Error> {
        let own = &self.blocks[block];
        let Some(home) = &own.home else { return Ok(()) };
        home.send_values(&own.flat, self.link.copies(), &Queue::of(self.device())?.ticket()?)
    }

    /// Whether the optimizer works on the host beside a GPU, and may do so while the next step begins.
    pub(in crate::zero) fn may_run_errands(&self) -> bool {
        self.link.has_home_elsewhere() && self.sharing.world_size() == 1 && !self.sharing.exchanges_on_device()
    }

    /// An errand of the optimizer on a block: nobody computes with its values before it is done.
    pub(in crate::zero) fn errand(&self, block: usize) -> Result<Option<Errand>, Error> {
        let own = &self.blocks[block];
        let Some(home) = &own.home else { return Ok(None) };
        let (work, moved) = Ticket::promise();
        *home.moved.lock().unwrap_or_else(PoisonError::into_inner) = moved;
        Ok(Some(Errand {
            home: home.clone(),
            flat: own.flat.clone(),
            copies: self.link.copies().clone(),
            computed: Queue::of(self.device())?.ticket()?,
            work,
        }))
    }
}
