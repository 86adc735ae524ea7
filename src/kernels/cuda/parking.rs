//! Activations parked in page-locked host memory while they are not needed, copied on a stream of their own.
//!
//! Copies out start when the compute stream has made the values and run beside it; copies back are asked for ahead of their
//! use. The two streams are ordered by events: a device buffer is freed on the compute stream only after the copy out has
//! read it, and used there only after the copy back has filled it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use cudarc::driver::result::{memcpy_dtoh_async, memcpy_htod_async};
use cudarc::driver::{CudaEvent, CudaStream};

use super::memory::{array, cuda, empty};
use super::pinned::Pinned;
use super::{Error, argument};

/// Copies out that may be under way before the compute stream waits for the oldest: those of a layer.
const UNDER_WAY: usize = 10;

fn failed(what: &'static str) -> impl FnOnce(cudarc::driver::DriverError) -> Error {
    move |source| Error::Driver { what, source }
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

/// Values on their way back to the device.
pub struct Returning {
    tensor: Tensor,
    arrived: CudaEvent,
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

    /// Starts the copy of a contiguous tensor to host memory. The device buffer lives until that is done, and no longer if
    /// nobody else holds it.
    ///
    /// # Errors
    /// If host memory cannot be locked or the driver refuses.
    pub fn park(&self, tensor: Tensor) -> Result<Parked, Error> {
        let from = array(&tensor)?;
        let dtype = tensor.dtype();
        let bytes = from.len * dtype.size_in_bytes();
        let free = lock(&self.state).free.get_mut(&bytes).and_then(Vec::pop);
        let mut memory = if let Some(memory) = free {
            memory
        } else {
            let memory = Pinned::new(&self.device, bytes)?;
            lock(&self.state).locked += bytes;
            memory
        };
        let made = self.compute.record_event(None).map_err(failed("recording an event"))?;
        self.copies.wait(&made).map_err(failed("waiting for an event"))?;
        // SAFETY: the source is `tensor`, which `leaving` keeps alive until the compute stream has waited for `left`; the
        // target is page-locked memory of that size, owned by the returned `Parked`.
        unsafe { memcpy_dtoh_async(memory.bytes_mut(bytes), from.address, self.copies.cu_stream()) }
            .map_err(failed("copying activations to the host"))?;
        let left = Arc::new(self.copies.record_event(None).map_err(failed("recording an event"))?);
        let dims = tensor.dims().to_vec();
        let oldest = {
            let mut state = lock(&self.state);
            state.leaving.push_back((tensor, left.clone()));
            if state.leaving.len() > UNDER_WAY { state.leaving.pop_front() } else { None }
        };
        if let Some((tensor, left)) = oldest {
            self.compute.wait(&left).map_err(failed("waiting for an event"))?;
            drop(tensor);
        }
        Ok(Parked { memory: Some(memory), left, dtype, dims, state: self.state.clone() })
    }

    /// Lets the compute stream wait for all copies out, and frees their buffers.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn settle(&self) -> Result<(), Error> {
        let leaving = std::mem::take(&mut lock(&self.state).leaving);
        for (tensor, left) in leaving {
            self.compute.wait(&left).map_err(failed("waiting for an event"))?;
            drop(tensor);
        }
        Ok(())
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
        let arrived = self.copies.record_event(None).map_err(failed("recording an event"))?;
        Ok(Returning { tensor, arrived, parked })
    }

    /// The values, ready for the compute stream.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn take(&self, returning: Returning) -> Result<Tensor, Error> {
        let Returning { tensor, arrived, mut parked } = returning;
        self.compute.wait(&arrived).map_err(failed("waiting for an event"))?;
        // The next copy out into this memory is on the same stream as the copy back, and so comes after it.
        if let Some(memory) = parked.memory.take() {
            lock(&self.state).free.entry(memory.len()).or_default().push(memory);
        }
        Ok(tensor)
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
