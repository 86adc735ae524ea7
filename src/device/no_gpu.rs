//! What stands in the place of the driver's calls in a program that was built without GPUs: types that have no value, so
//! that nothing above needs to know.

use std::ffi::c_void;

use candle_core::{DType, Device, Shape, Tensor};

use super::{Error, MemoryUse, argument};

/// Whether the program was built for GPUs.
pub(super) const IS_BUILT: bool = false;

fn no_gpu(device: &Device) -> Error {
    argument("device", "device", device.location(), "a GPU, and a program that was built with `--features cuda`")
}

pub(super) fn count() -> usize {
    0
}

pub(super) fn capability_of(_ordinal: usize) -> Option<(i32, i32)> {
    None
}

pub(super) fn open(ordinal: usize) -> Result<Device, Error> {
    Err(argument("device", "GPU", ordinal, "the CPU: this program was built without `--features cuda`"))
}

pub(super) fn memory_info() -> Result<(usize, usize), Error> {
    Err(no_gpu(&Device::Cpu))
}

pub(super) fn address(tensor: &Tensor) -> Result<u64, Error> {
    Err(no_gpu(tensor.device()))
}

pub(super) fn empty(device: &Device, _shape: Shape, _dtype: DType) -> Result<Tensor, Error> {
    Err(no_gpu(device))
}

/// There is no stream.
#[derive(Clone, Debug)]
pub(crate) enum Stream {}

impl Stream {
    pub(super) fn of(device: &Device) -> Result<Self, Error> {
        Err(no_gpu(device))
    }

    pub(super) fn beside(&self) -> Result<Self, Error> {
        match *self {}
    }

    pub(super) fn id(&self) -> (usize, usize) {
        match *self {}
    }

    pub(crate) fn raw(&self) -> *mut c_void {
        match *self {}
    }

    pub(super) fn capability(&self) -> Result<(i32, i32), Error> {
        match *self {}
    }

    pub(super) fn multiprocessors(&self) -> Result<u32, Error> {
        match *self {}
    }

    pub(super) fn uuid(&self) -> Result<[u8; 16], Error> {
        match *self {}
    }

    pub(super) fn name(&self) -> Result<String, Error> {
        match *self {}
    }

    pub(super) fn bind(&self) -> Result<(), Error> {
        match *self {}
    }

    pub(super) fn synchronize(&self) -> Result<(), Error> {
        match *self {}
    }

    pub(super) fn begin_capture(&self) -> Result<(), Error> {
        match *self {}
    }

    pub(super) fn end_capture(&self) -> Result<Graph, Error> {
        match *self {}
    }

    pub(super) fn record(&self, _is_timed: bool) -> Result<Event, Error> {
        match *self {}
    }

    pub(super) fn wait(&self, _event: &Event) -> Result<(), Error> {
        match *self {}
    }

    /// # Safety
    /// It cannot be called.
    pub(super) unsafe fn copy(&self, _to: u64, _from: u64, _bytes: usize) -> Result<(), Error> {
        match *self {}
    }

    pub(super) fn allocate(&self, _bytes: usize) -> Result<Bytes, Error> {
        match *self {}
    }

    pub(super) fn lock_host(&self, _bytes: usize) -> Result<Locked, Error> {
        match *self {}
    }

    pub(super) fn lock_tensor(&self, _tensor: Tensor) -> Result<LockedTensor, Error> {
        match *self {}
    }

    pub(super) fn limit_pool(&self, _bytes: usize) -> Result<(), Error> {
        match *self {}
    }

    pub(super) fn memory_use(&self) -> Result<MemoryUse, Error> {
        match *self {}
    }

    pub(super) fn reset_peak(&self) -> Result<(), Error> {
        match *self {}
    }
}

/// As [`Event`], of recorded work.
pub(super) enum Graph {}

impl Graph {
    pub(super) fn launch(&self) -> Result<(), Error> {
        match *self {}
    }
}

/// There is no event.
#[derive(Debug)]
pub(super) enum Event {}

impl Event {
    pub(super) fn is_done(&self) -> Result<bool, Error> {
        match *self {}
    }

    pub(super) fn synchronize(&self) -> Result<(), Error> {
        match *self {}
    }

    pub(super) fn secs_until(&self, _end: &Self) -> Result<f64, Error> {
        match *self {}
    }
}

/// There is no device memory.
#[derive(Debug)]
pub(super) enum Bytes {}

impl Bytes {
    pub(super) fn address(&self) -> u64 {
        match *self {}
    }
}

/// There is no page-locked memory.
#[derive(Debug)]
pub(super) enum Locked {}

impl Locked {
    pub(super) fn address(&self) -> u64 {
        match *self {}
    }
}

/// There is no page-locked memory.
#[derive(Debug)]
pub(super) enum LockedTensor {}

impl LockedTensor {
    pub(super) fn address(&self) -> u64 {
        match *self {}
    }
}
