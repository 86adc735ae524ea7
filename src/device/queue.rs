//! Queues: work is done in the order in which it is asked for, one queue beside another.

#[cfg(feature = "cuda")]
use std::any::{Any, TypeId};
#[cfg(feature = "cuda")]
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::Device;

use super::gpu::Stream;
use super::timers::Timers;
use super::{Error, Part, Ticket};

/// A stream of a GPU; on the CPU work is done when the call returns. Clones are the same queue.
///
/// A GPU has one queue on which its tensors are made, used and freed ([`Queue::of`]), on which all kernels run. Queues beside
/// it copy and exchange; they are ordered with it, and with each other, by [`Ticket`]s.
#[derive(Clone)]
pub struct Queue(Arc<Inner>);

struct Inner {
    device: Device,
    /// `None`: the host.
    stream: Option<Stream>,
    is_main: bool,
    timers: Timers,
    /// Bytes of the device that were in use when it was opened.
    at_opening: AtomicU64,
    #[cfg(feature = "cuda")]
    attached: Mutex<HashMap<TypeId, Arc<dyn Any + Send + Sync>>>,
}

/// The main queues by their streams. They live as long as the process, so that no other stream gets the same id; there is
/// one for each GPU that a process opens.
static MAIN: Mutex<Vec<((usize, usize), Queue)>> = Mutex::new(Vec::new());
static HOST: std::sync::LazyLock<Queue> = std::sync::LazyLock::new(|| Queue::new(&Device::Cpu, None, true));

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is guarded is changed by single insertions, so a panic elsewhere leaves it whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("device", &self.0.device.location()).field("stream", &self.0.stream).finish()
    }
}

impl Queue {
    fn new(device: &Device, stream: Option<Stream>, is_main: bool) -> Self {
        Self(Arc::new(Inner {
            device: device.clone(),
            stream,
            is_main,
            timers: Timers::default(),
            at_opening: AtomicU64::new(0),
            #[cfg(feature = "cuda")]
            attached: Mutex::default(),
        }))
    }

    /// The main queue of a device.
    ///
    /// # Errors
    /// If it is neither the CPU nor a GPU that the program was built for.
    pub fn of(device: &Device) -> Result<Self, Error> {
        if device.is_cpu() {
            return Ok(Self::host());
        }
        let stream = Stream::of(device)?;
        let id = stream.id();
        let mut known = lock(&MAIN);
        if let Some((_, queue)) = known.iter().find(|(known, _)| *known == id) {
            return Ok(queue.clone());
        }
        let queue = Self::new(device, Some(stream), true);
        known.push((id, queue.clone()));
        Ok(queue)
    }

    pub(super) fn host() -> Self {
        HOST.clone()
    }

    /// Whether both are one queue.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Another queue of the same device, ordered with nothing; on the CPU it is as the first.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn beside(&self) -> Result<Self, Error> {
        let stream = self.0.stream.as_ref().map(Stream::beside).transpose()?;
        Ok(Self::new(&self.0.device, stream, false))
    }

    /// The device whose queue it is.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// Whether kernels run on it.
    pub fn is_main(&self) -> bool {
        self.0.is_main
    }

    /// Makes its GPU the one that the thread's calls of a library are for.
    #[cfg(feature = "nccl")]
    pub(crate) fn bind(&self) -> Result<(), Error> {
        self.stream().map_or(Ok(()), Stream::bind)
    }

    /// The stream of a GPU's queue.
    pub(crate) fn stream(&self) -> Option<&Stream> {
        self.0.stream.as_ref()
    }

    pub(super) fn note_opening(&self, bytes: u64) {
        self.0.at_opening.store(bytes, Ordering::Relaxed);
    }

    pub(super) fn at_opening(&self) -> u64 {
        self.0.at_opening.load(Ordering::Relaxed)
    }

    pub(super) fn timers(&self) -> &Timers {
        &self.0.timers
    }

    /// Everything asked of this queue so far.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn ticket(&self) -> Result<Ticket, Error> {
        match self.stream() {
            None => Ok(Ticket::done()),
            Some(stream) => Ok(Ticket::event(stream.record(false)?, stream.id())),
        }
    }

    /// What is asked of this queue from now on comes after `ticket`. A GPU waits by itself for another queue; for the work of a
    /// thread the host waits.
    ///
    /// # Errors
    /// If the driver refuses, or the work of a thread was given up.
    pub fn after(&self, ticket: &Ticket) -> Result<(), Error> {
        match (self.stream(), ticket.as_event()) {
            (Some(stream), Some((_, id))) if stream.id() == id => Ok(()),
            (Some(stream), Some((event, _))) => stream.wait(event),
            _ => ticket.wait(None),
        }
    }

    /// Lets the host wait for everything asked of this queue.
    ///
    /// # Errors
    /// If the device failed.
    pub fn synchronize(&self) -> Result<(), Error> {
        self.stream().map_or(Ok(()), Stream::synchronize)
    }

    /// Copies from any place to any place, after `after` and what was asked of this queue. Values that another queue writes
    /// are there if `after` says so. With pageable host memory at one end the host waits.
    ///
    /// # Errors
    /// If the parts differ in length, are of one buffer, or the device refuses.
    pub fn copy(&self, from: &Part, to: &Part, after: &Ticket) -> Result<Ticket, Error> {
        self.after(after)?;
        super::buffer::copy(self, from, to)
    }

    /// What a library keeps for this queue, made on first use.
    ///
    /// # Errors
    /// If it cannot be made.
    #[cfg(feature = "cuda")]
    pub(crate) fn attached<T: Any + Send + Sync>(
        &self,
        make: impl FnOnce(&Self) -> Result<T, Error>,
    ) -> Result<Arc<T>, Error> {
        let mut attached = lock(&self.0.attached);
        if let Some(known) = attached.get(&TypeId::of::<T>()).cloned().and_then(|known| known.downcast().ok()) {
            return Ok(known);
        }
        let made = Arc::new(make(self)?);
        attached.insert(TypeId::of::<T>(), made.clone());
        Ok(made)
    }
}
