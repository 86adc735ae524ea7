//! The way between where values wait and where blocks compute.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::Error;
use crate::config::settings::{OffloadDevice, OffloadSettings, RankSettings};
use crate::device::{Buffer, Queue, Ticket};

/// What waits elsewhere until a walk asks for it.
#[derive(Clone, Debug, PartialEq)]
pub struct Offload {
    /// Whether parameters wait in host memory: frozen ones, and trained ones if their optimizer works there too.
    pub params: bool,
    /// Whether trained values, their gradients and the optimizer's state lie in host memory, where the optimizer works, apart from
    /// what blocks compute with.
    pub optimizer: bool,
    /// Whether that memory is page-locked.
    pub is_pinned: bool,
    /// Values of blocks that may be where they compute at a time; two blocks always may.
    pub most_live: usize,
    /// Parameters of at most so many values do not wait.
    pub persistence_threshold: usize,
}

impl Default for Offload {
    /// Nothing waits.
    fn default() -> Self {
        Self { params: false, optimizer: false, is_pinned: true, most_live: 0, persistence_threshold: 0 }
    }
}

impl Offload {
    /// What the settings say for a run that computes on `device`. The CPU's memory holds everything anyway.
    pub fn of(settings: &RankSettings, device: &Device) -> Self {
        let OffloadSettings { optimizer, params, pin_memory, max_live_parameters } = settings.offload;
        let waits = |place| device.is_cuda() && place != OffloadDevice::None;
        Self {
            params: waits(params),
            optimizer: waits(optimizer),
            is_pinned: pin_memory,
            most_live: max_live_parameters.unwrap_or(0),
            persistence_threshold: settings.param_persistence_threshold,
        }
    }
}

/// Queues and places of a store.
#[derive(Debug)]
pub(super) struct Link {
    device: Device,
    /// Beside the one on which kernels run.
    copies: Queue,
    is_on_gpu: bool,
    stays_on_device: bool,
    offload: Offload,
}

impl Link {
    /// Of a store on `device`. Where ranks exchange memory of GPUs, what they share `stays_on_device` unless it is offloaded.
    pub(super) fn new(device: &Device, offload: Offload, stays_on_device: bool) -> Result<Self, Error> {
        let main = Queue::of(device)?;
        let is_on_gpu = device.is_cuda();
        let copies = if is_on_gpu { main.beside()? } else { main };
        Ok(Self { device: device.clone(), copies, is_on_gpu, stays_on_device, offload })
    }

    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    /// The queue of the copies.
    pub(super) fn copies(&self) -> &Queue {
        &self.copies
    }

    pub(super) fn offload(&self) -> &Offload {
        &self.offload
    }

    /// Where trained values, gradients and the optimizer's state lie.
    pub(super) fn home(&self) -> &Device {
        if self.offload.optimizer { &Device::Cpu } else { &self.device }
    }

    /// Whether blocks compute with a copy of the values that the optimizer moves.
    pub(super) fn has_home_elsewhere(&self) -> bool {
        self.offload.optimizer
    }

    /// Bytes in the place where they wait.
    pub(super) fn keep(&self, bytes: &[u8]) -> Result<Buffer, Error> {
        let main = Queue::of(&self.device)?;
        let mut host = match (self.is_on_gpu, self.offload.is_pinned) {
            (true, true) if self.offload.params || self.stays_on_device => Buffer::pinned(&main, bytes.len())?,
            _ => Buffer::host(bytes.len()),
        };
        host.write(0, bytes)?;
        if self.offload.params || !self.stays_on_device {
            return Ok(host);
        }
        let (host, there) = (Arc::new(host), Arc::new(Buffer::device(&main, bytes.len())?));
        main.copy(&host.whole(), &there.whole(), &Ticket::done())?;
        Arc::into_inner(there).ok_or_else(|| crate::device::Error::GivenUp.into())
    }

    /// The memory of a tensor on the host for copies from and to the device.
    pub(super) fn lock(&self, tensor: &Tensor) -> Result<Option<Buffer>, Error> {
        if !(self.is_on_gpu && self.offload.is_pinned && tensor.device().is_cpu() && tensor.elem_count() > 0) {
            return Ok(None);
        }
        Ok(Some(Buffer::of_host_tensor(tensor.clone(), &Queue::of(&self.device)?)?))
    }
}

/// Memory of a device that copies or exchanges fill.
#[derive(Debug)]
pub(super) struct Coming {
    buffer: Arc<Buffer>,
    after: Ticket,
}

impl Coming {
    /// What is there after `after`, and after the copies that were asked of it.
    pub(super) fn new(buffer: Arc<Buffer>, after: Ticket) -> Self {
        Self { buffer, after }
    }

    /// Has what computes wait until it is there. Work of another thread the host waits for.
    pub(super) fn arrive(&self) -> Result<(), Error> {
        Queue::of(self.buffer.of_device())?.after(&self.after)?;
        Ok(self.buffer.come_home()?)
    }
}
