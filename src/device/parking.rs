//! Activations parked in page-locked host memory while they are not needed, copied on a queue of their own.
//!
//! Copies out start when the compute queue has made the values and run beside it; copies back are asked for ahead of their
//! use. When memory is free again is the business of [`Buffer`]; here it is decided when the compute queue waits: it frees a
//! device buffer a layer after the copy out was asked for, and waits for a copy back when the values are taken.

use std::collections::{BTreeMap, VecDeque};
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};

use super::{Buffer, Error, Queue, Ticket, argument, empty};

/// The size of the host memory for so many bytes, an eighth more at most: batches are ragged, and a little more than the last
/// one is not to be locked anew.
fn size_class(bytes: usize) -> usize {
    let step = (bytes.next_power_of_two() / 16).max(4096);
    bytes.next_multiple_of(step)
}

/// The queue of the copies and the host memory they go to. Host memory is kept for the next step.
pub struct Parking {
    compute: Queue,
    copies: Queue,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// Free host memory by size.
    free: BTreeMap<usize, Vec<Arc<Buffer>>>,
    /// Device buffers that a copy out may still read.
    leaving: VecDeque<Arc<Buffer>>,
    /// How many of them were there at the last [`Parking::end_layer`].
    left_before: usize,
    /// Bytes of host memory locked so far.
    locked: usize,
}

impl std::fmt::Debug for Parking {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Parking").field("locked_bytes", &self.locked_bytes()).finish_non_exhaustive()
    }
}

/// Values in host memory. Dropping it gives the memory back to its parking.
pub struct Parked {
    memory: Option<Arc<Buffer>>,
    left: Ticket,
    dtype: DType,
    dims: Vec<usize>,
    state: Arc<Mutex<State>>,
}

/// Values on their way back to the device. Dropped before [`Parking::take`], its buffer is not used again while they arrive.
pub struct Returning {
    tensor: Tensor,
    /// Knows of the copy that fills it.
    buffer: Arc<Buffer>,
    /// Read by the copy until it has arrived; what is copied into it next is on the same queue, and so comes after.
    parked: Parked,
}

impl std::fmt::Debug for Parked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Parked").field("dtype", &self.dtype).field("dims", &self.dims).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Returning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Returning").field(&self.parked).finish()
    }
}

impl State {
    /// Takes free memory out, the smallest of a range of sizes.
    fn pop(&mut self, sizes: RangeInclusive<usize>) -> Option<Arc<Buffer>> {
        let size = self.free.range(sizes).find(|(_, blocks)| !blocks.is_empty()).map(|(&size, _)| size)?;
        self.free.get_mut(&size).and_then(Vec::pop)
    }
}

fn lock(state: &Mutex<State>) -> std::sync::MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lets the compute queue wait for the copies out of buffers, and frees them.
fn free(leaving: VecDeque<Arc<Buffer>>) -> Result<(), Error> {
    leaving.into_iter().try_for_each(|buffer| buffer.come_home())
}

impl Parking {
    /// A parking of a device, with a queue for its copies.
    ///
    /// # Errors
    /// If `device` is no GPU or the driver refuses.
    pub fn new(device: &Device) -> Result<Self, Error> {
        if !device.is_cuda() {
            return Err(argument("parking", "device", device.location(), "a GPU"));
        }
        let compute = Queue::of(device)?;
        let copies = compute.beside()?;
        Ok(Self { compute, copies, state: Arc::default() })
    }

    /// Bytes of host memory locked so far.
    pub fn locked_bytes(&self) -> usize {
        lock(&self.state).locked
    }

    /// Locks host memory in the place of free memory that is somewhat too small, so that batches of growing sizes do not lock
    /// more and more of it.
    fn lock_memory(&self, size: usize) -> Result<Arc<Buffer>, Error> {
        let too_small = {
            let mut state = lock(&self.state);
            let memory = state.pop(size / 2..=size);
            state.locked -= memory.as_ref().map_or(0, |memory| memory.len());
            memory
        };
        drop(too_small);
        let memory = Buffer::pinned(&self.compute, size)?;
        let mut state = lock(&self.state);
        state.locked += size;
        tracing::debug!("locked {size} bytes of host memory for activations, {} in all", state.locked);
        drop(state);
        Ok(Arc::new(memory))
    }

    /// Starts the copy of a contiguous tensor to host memory. The device buffer lives until the second [`Self::end_layer`] from
    /// now or [`Self::settle`], after which the compute queue frees it when the copy is done.
    ///
    /// # Errors
    /// If host memory cannot be locked or the driver refuses.
    pub fn park(&self, tensor: Tensor) -> Result<Parked, Error> {
        let (dtype, dims) = (tensor.dtype(), tensor.dims().to_vec());
        let bytes = tensor.elem_count() * dtype.size_in_bytes();
        let size = size_class(bytes);
        let free = lock(&self.state).pop(size..=2 * size);
        let memory = match free {
            Some(memory) => memory,
            None => self.lock_memory(size)?,
        };
        // The copies wait until the compute queue has come to this buffer's making, and so for its values.
        let from = Arc::new(Buffer::of_tensor(tensor)?);
        let left = self.copies.copy(&from.whole(), &memory.part(0..bytes)?, &Ticket::done())?;
        lock(&self.state).leaving.push_back(from);
        Ok(Parked { memory: Some(memory), left, dtype, dims, state: self.state.clone() })
    }

    /// Tells that what was parked since the last call belongs together: the compute queue waits for the copies out that were
    /// started before that, and frees their buffers.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn end_layer(&self) -> Result<(), Error> {
        let before: VecDeque<_> = {
            let mut state = lock(&self.state);
            let count = state.left_before.min(state.leaving.len());
            let before = state.leaving.drain(..count).collect();
            state.left_before = state.leaving.len();
            before
        };
        free(before)
    }

    /// Lets the compute queue wait for all copies out, and frees their buffers.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn settle(&self) -> Result<(), Error> {
        let leaving = {
            let mut state = lock(&self.state);
            state.left_before = 0;
            std::mem::take(&mut state.leaving)
        };
        free(leaving)
    }

    /// Starts the copy back into a new buffer.
    ///
    /// # Errors
    /// If device memory runs out or the driver refuses.
    pub fn bring_back(&self, parked: Parked) -> Result<Returning, Error> {
        let Some(memory) = &parked.memory else {
            return Err(argument("bring_back", "parked", "nothing", "values in host memory"));
        };
        let tensor = empty(self.compute.device(), parked.dims.as_slice(), parked.dtype)?;
        let buffer = Arc::new(Buffer::of_tensor(tensor.clone())?);
        self.copies.copy(&memory.part(0..buffer.len())?, &buffer.whole(), &parked.left)?;
        Ok(Returning { tensor, buffer, parked })
    }

    /// The values, ready for the compute queue.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn take(&self, returning: Returning) -> Result<Tensor, Error> {
        returning.buffer.come_home()?;
        Ok(returning.tensor)
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            lock(&self.state).free.entry(memory.len()).or_default().push(memory);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::size_class;

    #[test]
    fn sizes_of_like_batches_are_one_class_and_little_is_lost() {
        for tokens in 1000..1100 {
            let bytes = tokens * 7168;
            let class = size_class(bytes);
            assert!(class >= bytes && class <= bytes + bytes / 8, "{bytes}: {class}");
        }
        let classes: std::collections::BTreeSet<usize> = (4096..8192).map(|tokens| size_class(tokens * 7168)).collect();
        assert!(classes.len() <= 10, "{classes:?}");
        assert_eq!(size_class(1), 4096);
    }
}
