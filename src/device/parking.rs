//! Activations parked in page-locked host memory while they are not needed, copied on a stream of their own.
//!
//! Copies out start when the compute stream has made the values and run beside it; copies back are asked for ahead of their
//! use. The two streams are ordered by events: a device buffer is freed on the compute stream only after the copy out has
//! read it, and used there only after the copy back has filled it.

use std::collections::{BTreeMap, VecDeque};
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use cudarc::driver::result::{memcpy_dtoh_async, memcpy_htod_async};
use cudarc::driver::{CudaEvent, CudaStream};

use super::memory::{array, cuda, empty};
use super::pinned::Pinned;
use super::{Error, argument, failed};

/// The size of the host memory for so many bytes, an eighth more at most: batches are ragged, and a little more than the last
/// one is not to be locked anew.
fn size_class(bytes: usize) -> usize {
    let step = (bytes.next_power_of_two() / 16).max(4096);
    bytes.next_multiple_of(step)
}

/// The stream of the copies and the host memory they go to. Host memory is kept for the next step.
pub struct Parking {
    device: Device,
    compute: Arc<CudaStream>,
    copies: Arc<CudaStream>,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// Free host memory by size.
    free: BTreeMap<usize, Vec<Pinned>>,
    /// Device buffers that a copy out still reads, with the event of its end.
    leaving: VecDeque<(Tensor, Arc<CudaEvent>)>,
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
    memory: Option<Pinned>,
    left: Arc<CudaEvent>,
    dtype: DType,
    dims: Vec<usize>,
    state: Arc<Mutex<State>>,
}

/// Values on their way back to the device. Dropped before [`Parking::take`], it lets the compute stream wait for them, so that
/// their buffer is not used again while they arrive.
pub struct Returning {
    tensor: Tensor,
    arrived: CudaEvent,
    compute: Arc<CudaStream>,
    /// Read by the copy until it has arrived.
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
    fn pop(&mut self, sizes: RangeInclusive<usize>) -> Option<Pinned> {
        let size = self.free.range(sizes).find(|(_, blocks)| !blocks.is_empty()).map(|(&size, _)| size)?;
        self.free.get_mut(&size).and_then(Vec::pop)
    }
}

fn lock(state: &Mutex<State>) -> std::sync::MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Parking {
    /// A parking of a device, with a stream for its copies.
    ///
    /// # Errors
    /// If `device` is no GPU or the driver refuses.
    pub fn new(device: &Device) -> Result<Self, Error> {
        let compute = cuda(device)?.cuda_stream();
        let copies = compute.context().new_stream().map_err(failed("making a stream for copies"))?;
        Ok(Self { device: device.clone(), compute, copies, state: Arc::default() })
    }

    /// Bytes of host memory locked so far.
    pub fn locked_bytes(&self) -> usize {
        lock(&self.state).locked
    }

    /// Locks host memory in the place of free memory that is somewhat too small, so that batches of growing sizes do not lock
    /// more and more of it.
    fn lock_memory(&self, size: usize) -> Result<Pinned, Error> {
        let too_small = {
            let mut state = lock(&self.state);
            let memory = state.pop(size / 2..=size);
            state.locked -= memory.as_ref().map_or(0, Pinned::len);
            memory
        };
        if too_small.is_some() {
            // A copy back may still be reading it.
            self.copies.synchronize().map_err(failed("waiting for copies"))?;
        }
        drop(too_small);
        let memory = Pinned::new(&self.device, size)?;
        let mut state = lock(&self.state);
        state.locked += size;
        tracing::debug!("locked {size} bytes of host memory for activations, {} in all", state.locked);
        drop(state);
        Ok(memory)
    }

    /// Starts the copy of a contiguous tensor to host memory. The device buffer lives until that is done, and until the second
    /// [`Self::end_layer`] from now or [`Self::settle`].
    ///
    /// # Errors
    /// If host memory cannot be locked or the driver refuses.
    pub fn park(&self, tensor: Tensor) -> Result<Parked, Error> {
        let from = array(&tensor)?;
        let dtype = tensor.dtype();
        let bytes = from.len * dtype.size_in_bytes();
        let size = size_class(bytes);
        let free = lock(&self.state).pop(size..=2 * size);
        let mut memory = match free {
            Some(memory) => memory,
            None => self.lock_memory(size)?,
        };
        let made = self.compute.record_event(None).map_err(failed("recording an event"))?;
        self.copies.wait(&made).map_err(failed("waiting for an event"))?;
        // SAFETY: the source is `tensor`, which `leaving` keeps alive until the compute stream has waited for `left`; the
        // target is page-locked memory of that size, owned by the returned `Parked`.
        unsafe { memcpy_dtoh_async(memory.bytes_mut(bytes), from.address, self.copies.cu_stream()) }
            .map_err(failed("copying activations to the host"))?;
        let left = match self.copies.record_event(None) {
            Ok(left) => Arc::new(left),
            Err(source) => {
                // The copy must not outlive what it reads and writes.
                let _ = self.copies.synchronize();
                return Err(failed("recording an event")(source));
            }
        };
        let dims = tensor.dims().to_vec();
        lock(&self.state).leaving.push_back((tensor, left.clone()));
        Ok(Parked { memory: Some(memory), left, dtype, dims, state: self.state.clone() })
    }

    /// Tells that what was parked since the last call belongs together: the compute stream waits for the copies out that were
    /// started before that, and frees their buffers.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn end_layer(&self) -> Result<(), Error> {
        let before: Vec<_> = {
            let mut state = lock(&self.state);
            let count = state.left_before.min(state.leaving.len());
            let before = state.leaving.drain(..count).collect();
            state.left_before = state.leaving.len();
            before
        };
        self.wait_for(before)
    }

    /// Lets the compute stream wait for copies out, and frees their buffers.
    fn wait_for(&self, leaving: impl IntoIterator<Item = (Tensor, Arc<CudaEvent>)>) -> Result<(), Error> {
        for (tensor, left) in leaving {
            self.compute.wait(&left).map_err(failed("waiting for an event"))?;
            drop(tensor);
        }
        Ok(())
    }

    /// Lets the compute stream wait for all copies out, and frees their buffers.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn settle(&self) -> Result<(), Error> {
        let leaving = {
            let mut state = lock(&self.state);
            state.left_before = 0;
            std::mem::take(&mut state.leaving)
        };
        self.wait_for(leaving)
    }

    /// Starts the copy back into a new buffer.
    ///
    /// # Errors
    /// If device memory runs out or the driver refuses.
    pub fn bring_back(&self, parked: Parked) -> Result<Returning, Error> {
        let tensor = empty(&self.device, parked.dims.as_slice(), parked.dtype)?;
        let target = array(&tensor)?;
        let bytes = target.len * parked.dtype.size_in_bytes();
        // The buffer may have been freed by work that the compute stream has still to do.
        let is_free = self.compute.record_event(None).map_err(failed("recording an event"))?;
        self.copies.wait(&is_free).map_err(failed("waiting for an event"))?;
        self.copies.wait(&parked.left).map_err(failed("waiting for an event"))?;
        let Some(memory) = &parked.memory else {
            return Err(argument("bring_back", "parked", "nothing", "values in host memory"));
        };
        // SAFETY: the source is page-locked memory that `parked` owns and that returns to the free list only after `arrived`;
        // the target is a new buffer of that size, which the compute stream uses only after it has waited for `arrived`.
        unsafe { memcpy_htod_async(target.address, memory.bytes(bytes), self.copies.cu_stream()) }
            .map_err(failed("copying activations to the device"))?;
        match self.copies.record_event(None) {
            Ok(arrived) => Ok(Returning { tensor, arrived, compute: self.compute.clone(), parked }),
            Err(source) => {
                let _ = self.copies.synchronize();
                Err(failed("recording an event")(source))
            }
        }
    }

    /// The values, ready for the compute stream.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn take(&self, returning: Returning) -> Result<Tensor, Error> {
        self.compute.wait(&returning.arrived).map_err(failed("waiting for an event"))?;
        let tensor = returning.tensor.clone();
        // The next copy out into the host memory is on the same stream as the copy back, and so comes after it.
        drop(returning);
        Ok(tensor)
    }
}

impl Drop for Returning {
    fn drop(&mut self) {
        // After `take` this waits for what has been waited for.
        let _ = self.compute.wait(&self.arrived);
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            lock(&self.state).free.entry(memory.len()).or_default().push(memory);
        }
    }
}

impl Drop for Parking {
    fn drop(&mut self) {
        // Host memory must outlive the copies that use it.
        let _ = self.copies.synchronize();
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
