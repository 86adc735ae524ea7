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
pub struct Queue {
    device: Device,
    inner: Arc<Inner>,
}

struct Inner {
    /// Which one it is among all that there have been.
    number: u64,
    /// `None`: the host.
    stream: Option<Stream>,
    is_main: bool,
    timers: Timers,
    /// Bytes of the device that were in use when it was opened.
    at_opening: AtomicU64,
    /// Most bytes for tensors.
    limit: AtomicU64,
    #[cfg(feature = "cuda")]
    attached: Mutex<HashMap<TypeId, Arc<dyn Any + Send + Sync>>>,
}

/// The main queues. They live as long as the process, so that no other stream gets the same id; there is
/// one for each GPU that a process opens.
static MAIN: Mutex<Vec<Arc<Inner>>> = Mutex::new(Vec::new());
static NEXT_NUMBER: AtomicU64 = AtomicU64::new(0);
static HOST: std::sync::LazyLock<Queue> =
    std::sync::LazyLock::new(|| Queue { device: Device::Cpu, inner: Arc::new(Inner::new(None, true)) });

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is guarded is changed by single insertions, so a panic elsewhere leaves it whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("device", &self.device.location()).field("number", &self.inner.number).finish()
    }
}

impl Inner {
    fn new(stream: Option<Stream>, is_main: bool) -> Self {
        Self {
            number: NEXT_NUMBER.fetch_add(1, Ordering::Relaxed),
            stream,
            is_main,
            timers: Timers::default(),
            at_opening: AtomicU64::new(0),
            limit: AtomicU64::new(u64::MAX),
            #[cfg(feature = "cuda")]
            attached: Mutex::default(),
        }
    }
}

impl Queue {
    fn of_inner(device: &Device, inner: Arc<Inner>) -> Self {
        Self { device: device.clone(), inner }
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
        if let Some(inner) = known.iter().find(|inner| inner.stream.as_ref().is_some_and(|stream| stream.id() == id)) {
            return Ok(Self::of_inner(device, inner.clone()));
        }
        let inner = Arc::new(Inner::new(Some(stream), true));
        known.push(inner.clone());
        Ok(Self::of_inner(device, inner))
    }

    pub(super) fn host() -> Self {
        HOST.clone()
    }

    /// Whether both are one queue.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// Another queue of the same device, ordered with nothing; on the CPU it is as the first.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn beside(&self) -> Result<Self, Error> {
        let stream = self.stream().map(Stream::beside).transpose()?;
        Ok(Self::of_inner(&self.device, Arc::new(Inner::new(stream, false))))
    }

    /// The device whose queue it is.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether kernels run on it.
    pub fn is_main(&self) -> bool {
        self.inner.is_main
    }

    /// Which one it is among all that there have been.
    pub(super) fn number(&self) -> u64 {
        self.inner.number
    }

    /// Makes its GPU the one that the thread's calls of a library are for.
    #[cfg(feature = "nccl")]
    pub(crate) fn bind(&self) -> Result<(), Error> {
        self.stream().map_or(Ok(()), Stream::bind)
    }

    /// The stream of a GPU's queue.
    pub(crate) fn stream(&self) -> Option<&Stream> {
        self.inner.stream.as_ref()
    }

    pub(super) fn note_opening(&self, bytes: u64) {
        self.inner.at_opening.store(bytes, Ordering::Relaxed);
    }

    pub(super) fn at_opening(&self) -> u64 {
        self.inner.at_opening.load(Ordering::Relaxed)
    }

    pub(super) fn note_limit(&self, bytes: u64) {
        self.inner.limit.store(bytes, Ordering::Relaxed);
    }

    pub(super) fn limit(&self) -> u64 {
        self.inner.limit.load(Ordering::Relaxed)
    }

    pub(super) fn timers(&self) -> &Timers {
        &self.inner.timers
    }

    /// Everything asked of this queue so far.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn ticket(&self) -> Result<Ticket, Error> {
        match self.stream() {
            None => Ok(Ticket::done()),
            Some(stream) => Ok(Ticket::event(stream.record(false)?, self.number())),
        }
    }

    /// What is asked of this queue from now on comes after `ticket`. A GPU waits by itself for another queue; for the work of a
    /// thread the host waits.
    ///
    /// # Errors
    /// If the driver refuses, or the work of a thread was given up.
    pub fn after(&self, ticket: &Ticket) -> Result<(), Error> {
        match (self.stream(), ticket.as_event()) {
            (Some(_), Some((_, number))) if self.number() == number => Ok(()),
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
        let mut attached = lock(&self.inner.attached);
        if let Some(known) = attached.get(&TypeId::of::<T>()).cloned().and_then(|known| known.downcast().ok()) {
            return Ok(known);
        }
        let made = Arc::new(make(self)?);
        attached.insert(TypeId::of::<T>(), made.clone());
        Ok(made)
    }
}
