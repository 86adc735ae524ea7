//! What the ranks of a run do together in the memory of their GPUs: as `together`, without a wait of the host.
//!
//! Gradients go to the rank that keeps them, from each rank as it has them, and are added there in the order of one rank: the bits
//! are those of ranks on CPUs. They travel while backward goes on with the block before.

use std::cell::Cell;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Tensor};

use super::{ParamStore, Shared};
use crate::device::{Buffer, Part, Queue, Ticket, empty};
use crate::ops::buffer;
use crate::zero::flat::bytes_of;
use crate::zero::read::ReadValues;
use crate::zero::{Coming, Error, FlatBlock, Node, Sums};

/// Gradients that are not yet where the optimizer takes them.
#[derive(Debug, Default)]
pub(super) struct OnTheirWay {
    /// Of the block whose gradients were final last.
    reducing: Option<(usize, Parts)>,
    /// Sums that come from other ranks.
    gathering: Vec<Coming>,
}

/// The parts of a sum: this rank's stretch of what each rank has.
#[derive(Debug)]
struct Parts {
    nodes: Vec<(Node, Tensor)>,
    coming: Vec<Coming>,
}

impl Parts {
    /// Their sum, in the order of the ranks; `None` if this rank's stretch is empty.
    fn total(self) -> Result<Option<Tensor>, Error> {
        self.coming.iter().try_for_each(Coming::arrive)?;
        let problem = Cell::new(None);
        let add = |left: Tensor, right: Tensor| {
            if let Err(error) = buffer::add(&left, &right) {
                problem.set(Some(error));
            }
            left
        };
        let total = Sums::total(self.nodes, add);
        problem.into_inner().map_or(Ok(total), |error| Err(error.into()))
    }
}

impl ParamStore {
    /// Starts the way of a block's gradients to the ranks that keep them, and ends that of the block before.
    pub(super) fn exchange_gradients(&self, block: usize, sums: Sums) -> Result<(), Error> {
        let own = &self.blocks[block];
        self.end_reducing()?;
        for shared in &own.shared {
            self.exchange_shared(shared, sums)?;
        }
        if own.flat.is_empty() {
            return Ok(());
        }
        let parts = self.start_reducing(sums, &own.bucket.take_sums()?, &self.reduced_shards(&own.flat))?;
        lock(&self.on_their_way).reducing = Some((block, parts));
        Ok(())
    }

    /// The gradients of a parameter of another block, as that block is cut.
    fn exchange_shared(&self, shared: &Shared, sums: Sums) -> Result<(), Error> {
        let Some(bucket) = &shared.bucket else { return Ok(()) };
        let source = &self.blocks[shared.param.of_block].flat;
        let Some(entry) = source.entry(&shared.param.of_name) else { return Ok(()) };
        let shards = entry.parts_in(&self.reduced_shards(source));
        let total = self.start_reducing(sums, &bucket.take_sums()?, &shards)?.total()?;
        *lock(&shared.exchanged) = total;
        Ok(())
    }

    /// Sends each rank its stretch of the sums that this one has, and asks for this one's of every other.
    fn start_reducing(&self, sums: Sums, own: &[Tensor], shards: &[Range<usize>]) -> Result<Parts, Error> {
        let (rank, device) = (self.sharing.rank(), self.device());
        let mine = shards[rank].clone();
        let (mut nodes, mut buffers) = (Vec::new(), Vec::new());
        let mut to: Vec<Vec<Part>> = vec![Vec::new(); shards.len()];
        let mut from: Vec<Vec<Part>> = vec![Vec::new(); shards.len()];
        for sum in own {
            let buffer = Arc::new(Buffer::of_tensor(sum.clone())?);
            for (to, shard) in to.iter_mut().zip(shards) {
                to.push(buffer.part(bytes_of(shard))?);
            }
            buffers.push(buffer);
        }
        for (peer, from) in from.iter_mut().enumerate().filter(|_| !mine.is_empty()) {
            for (index, node) in sums.on_rank(peer).nodes().into_iter().enumerate() {
                if peer == rank {
                    nodes.push((node, own[index].narrow(0, mine.start, mine.len())?));
                    continue;
                }
                let there = empty(device, mine.len(), DType::F32)?;
                let buffer = Arc::new(Buffer::of_tensor(there.clone())?);
                from.push(buffer.whole());
                buffers.push(buffer);
                nodes.push((node, there));
            }
        }
        let made = Queue::of(device)?.ticket()?;
        let came = match self.sharing.exchange() {
            Some(exchange) => exchange.all_to_all(&to, &from, &made)?,
            None => made,
        };
        let coming = buffers.into_iter().map(|buffer| Coming::new(buffer, came.clone())).collect();
        Ok(Parts { nodes, coming })
    }

    /// Adds what came of the block whose gradients were final last, and takes the sum to where the optimizer has it.
    fn end_reducing(&self) -> Result<(), Error> {
        let Some((block, parts)) = lock(&self.on_their_way).reducing.take() else { return Ok(()) };
        let own = &self.blocks[block];
        let shards = self.reduced_shards(&own.flat);
        let shard = shards[self.sharing.rank()].clone();
        let total = parts.total()?;
        for (shared, entry) in self.sharers(block) {
            if let (Some(total), Some(more)) = (&total, lock(&shared.exchanged).take()) {
                buffer::add(&total.narrow(0, entry.start_in(&shard), more.elem_count())?, &more)?;
            }
        }
        if !own.flat.is_whole() {
            return match (total, &own.home) {
                (None, _) => Ok(()),
                (Some(total), Some(home)) => home.send_gradients(total, &own.flat, &self.link),
                (Some(total), None) => Ok(buffer::copy(&total, &own.flat.own_grads()?)?),
            };
        }
        // Every rank moves all values.
        let all = match &own.home {
            Some(_) => empty(self.device(), own.flat.len(), DType::F32)?,
            None => own.flat.grads().clone(),
        };
        if let Some(total) = total {
            buffer::copy(&total, &all.narrow(0, shard.start, shard.len())?)?;
        }
        let (target, made) = (Arc::new(Buffer::of_tensor(all.clone())?), Queue::of(self.device())?.ticket()?);
        let bytes: Vec<_> = shards.iter().map(bytes_of).collect();
        let coming = self.gather_in(target, &bytes, made)?;
        match &own.home {
            Some(home) => {
                coming.arrive()?;
                home.send_gradients(all, &own.flat, &self.link)?;
            }
            None => lock(&self.on_their_way).gathering.push(coming),
        }
        Ok(())
    }

    /// Starts the gathering of what each rank has of a buffer, by its bytes, after `made`.
    fn gather_in(&self, target: Arc<Buffer>, bytes: &[Range<usize>], made: Ticket) -> Result<Coming, Error> {
        let came = match self.sharing.exchange() {
            Some(exchange) => exchange.all_gather_ranges(&target.whole(), bytes, &made)?,
            None => made,
        };
        Ok(Coming::new(target, came))
    }

    /// Has what computes wait for all gradients that come from other ranks.
    pub(super) fn gradients_arrive(&self) -> Result<(), Error> {
        self.end_reducing()?;
        let gathering = std::mem::take(&mut lock(&self.on_their_way).gathering);
        gathering.iter().try_for_each(Coming::arrive)
    }

    /// Starts the way of a block's values to all ranks from those that moved them.
    pub(super) fn exchange_values(&self, block: usize) -> Result<(), Error> {
        let own = &self.blocks[block];
        let of_flat;
        let (runs, moved) = match &own.home {
            Some(home) => match home.sent_values() {
                Some(sent) => sent,
                None => return Ok(()),
            },
            None if own.flat.has_all_values() => {
                of_flat = [Arc::new(Buffer::of_tensor(own.flat.values()?)?)];
                (&of_flat[..], Queue::of(self.device())?.ticket()?)
            }
            None => return Ok(()),
        };
        let layout = own.flat.layout();
        let gather =
            |(run, target): (usize, &Arc<Buffer>)| self.gather_in(target.clone(), &layout.shards(run), moved.clone());
        *lock(&own.values_coming) = runs.iter().enumerate().map(gather).collect::<Result<_, _>>()?;
        Ok(())
    }

    /// All values of a block that is cut into shards, as it reads them, on their way to this rank's GPU: of what each rank has,
    /// f32 `[own]`, or host memory in which it lies as blocks read it.
    pub(super) fn exchange_cut_values(
        &self,
        flat: &FlatBlock,
        (values, locked): (Option<&Tensor>, Option<&Arc<Buffer>>),
        coming: &mut Vec<Coming>,
    ) -> Result<ReadValues, Error> {
        let (layout, device) = (flat.layout(), self.device());
        let all = layout.empty(device)?;
        let is_none = flat.own().is_empty();
        // From the host it comes once, whatever types it is rounded to.
        let own = values.filter(|_| !is_none && locked.is_none()).map(|values| values.to_device(device)).transpose()?;
        let mut targets = Vec::new();
        for (run, part) in layout.own_parts().into_iter().enumerate() {
            let target = Arc::new(Buffer::of_tensor(all.runs()[run].clone())?);
            let mut placed = Queue::of(device)?.ticket()?;
            if let (Some(locked), false) = (locked, is_none) {
                let place = target.part(layout.own_shard(run))?;
                placed = self.link.copies().copy(&locked.part(part)?, &place, &placed)?;
            } else if let Some(own) = &own {
                layout.round_onto(run, own, &all.runs()[run])?;
                placed = Queue::of(device)?.ticket()?;
            }
            targets.push((target, placed));
        }
        for (run, (target, placed)) in targets.into_iter().enumerate() {
            coming.push(self.gather_in(target, &layout.shards(run), placed)?);
        }
        Ok(all)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
