//! Owned memory: on a device, page-locked, or the host's.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use super::gpu::{self, Bytes, Locked, LockedTensor};
use super::view::{self, Matrix, Pointer};
use super::{Error, Queue, Ticket, argument};

/// Bytes that one core copies at a time.
const CHUNK: usize = 1 << 20;

/// Where a buffer lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A GPU's memory.
    Device,
    /// Page-locked host memory: copies at full speed, and kernels read it in place.
    Pinned,
    /// Host memory.
    Host,
}

/// Owned bytes. Dropped, they are freed when everything that was asked of them is done: device memory in the order of its
/// queue, page-locked memory after a wait.
#[derive(Debug)]
pub struct Buffer {
    /// Taken by the drop alone.
    memory: Option<Memory>,
    len: usize,
    /// Where it was made and is freed.
    home: Queue,
    /// When the memory is there for other queues.
    born: Ticket,
    /// The last copy of each queue that the order of `home` does not cover.
    uses: Mutex<Vec<Use>>,
    /// Held for writing while a copy into the bytes is asked for, for reading while one out of them is, or the host reads.
    access: RwLock<()>,
    /// Whether kernels may be reading or writing page-locked memory.
    is_viewed: AtomicBool,
}

#[derive(Debug)]
struct Use {
    queue: u64,
    ticket: Ticket,
}

#[derive(Debug)]
enum Memory {
    Host(Lines),
    Pinned(Locked),
    /// Of a tensor on the host.
    PinnedTensor(LockedTensor),
    Device(Bytes),
    /// Of a tensor on a GPU, and where it begins.
    Tensor {
        _kept: Tensor,
        address: u64,
    },
}

/// Host memory at a multiple of 64 bytes.
struct Lines(Box<[Line]>);

#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([u8; 64]);

impl std::fmt::Debug for Lines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} lines", self.0.len())
    }
}

mod sealed {
    pub trait Sealed {}
}

/// Numbers without padding, of which any bits are a value.
pub trait Plain: sealed::Sealed + Copy + Send + Sync {}

macro_rules! plain {
    ($($type:ty),*) => { $(impl sealed::Sealed for $type {} impl Plain for $type {})* };
}
plain!(u8, i32, u32, i64, u64, f32, f64, half::bf16, half::f16);

/// The bytes of numbers.
fn bytes_of<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: plain numbers have no padding, and bytes no alignment.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// The bytes of numbers, to be read and replaced.
pub fn bytes_of_mut<T: Plain>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: as in `bytes_of`; and any bits are a value, so whatever is written is one.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

/// A range of a buffer's bytes; keeps the buffer alive.
#[derive(Clone, Debug)]
pub struct Part {
    buffer: Arc<Buffer>,
    bytes: Range<usize>,
}

impl Part {
    /// The buffer.
    pub fn buffer(&self) -> &Arc<Buffer> {
        &self.buffer
    }

    /// Which of its bytes.
    pub fn bytes(&self) -> Range<usize> {
        self.bytes.clone()
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    fn address(&self) -> u64 {
        self.buffer.address() + self.bytes.start as u64
    }

    /// The address of device memory, for work of a library on `queue`, which is told to come after the memory was made. What
    /// is asked there is to be noted by [`Self::is_used_until`] before the part is dropped.
    ///
    /// # Errors
    /// If it is other memory, or the driver refuses.
    #[cfg(feature = "nccl")]
    pub(crate) fn lend_to(&self, queue: &Queue) -> Result<u64, Error> {
        if self.buffer.place() != Place::Device {
            return Err(argument("exchange", "part", self.buffer.place(), "device memory"));
        }
        if !self.buffer.home.is_same(queue) {
            queue.after(&self.buffer.born)?;
        }
        Ok(self.address())
    }

    /// Keeps the memory until the work of `queue` that `ticket` marks is done.
    #[cfg(feature = "nccl")]
    pub(crate) fn is_used_until(&self, queue: &Queue, ticket: &Ticket) {
        self.buffer.note(queue, ticket);
    }
}

impl Buffer {
    fn new(memory: Memory, len: usize, home: Queue, born: Ticket) -> Self {
        let (uses, access) = (Mutex::default(), RwLock::default());
        Self { memory: Some(memory), len, home, born, uses, access, is_viewed: AtomicBool::new(false) }
    }

    /// Bytes in the memory of a queue's device, of no defined value there; on the CPU as [`Self::host`].
    ///
    /// # Errors
    /// If memory runs out.
    pub fn device(queue: &Queue, bytes: usize) -> Result<Self, Error> {
        let Some(stream) = queue.stream() else { return Ok(Self::host(bytes)) };
        let memory = Memory::Device(stream.allocate(bytes)?);
        Ok(Self::new(memory, bytes, queue.clone(), queue.ticket()?))
    }

    /// Page-locked bytes of no defined value; on the CPU as [`Self::host`].
    ///
    /// # Errors
    /// If the system does not allow so much.
    pub fn pinned(queue: &Queue, bytes: usize) -> Result<Self, Error> {
        let Some(stream) = queue.stream() else { return Ok(Self::host(bytes)) };
        Ok(Self::new(Memory::Pinned(stream.lock_host(bytes)?), bytes, queue.clone(), Ticket::done()))
    }

    /// Zeros in host memory.
    pub fn host(bytes: usize) -> Self {
        let lines = Lines(vec![Line([0; 64]); bytes.div_ceil(64)].into_boxed_slice());
        Self::new(Memory::Host(lines), bytes, Queue::host(), Ticket::done())
    }

    /// The bytes of a contiguous tensor on a GPU.
    ///
    /// # Errors
    /// If it is another one.
    pub fn of_tensor(tensor: Tensor) -> Result<Self, Error> {
        if !tensor.is_contiguous() {
            return Err(argument("buffer", "tensor", tensor.layout(), "contiguous values"));
        }
        let (address, bytes) = (gpu::address(&tensor)?, tensor.elem_count() * tensor.dtype().size_in_bytes());
        let home = Queue::of(tensor.device())?;
        let born = home.ticket()?;
        Ok(Self::new(Memory::Tensor { _kept: tensor, address }, bytes, home, born))
    }

    /// The bytes of a contiguous f32 tensor on the host, page-locked in their place for a queue of a GPU. Who reads or writes
    /// the tensor waits for the copies first that were asked of the buffer ([`Self::wait`]): they are not in its order.
    ///
    /// # Errors
    /// If it is another one, or the system does not allow so much.
    pub fn of_host_tensor(tensor: Tensor, queue: &Queue) -> Result<Self, Error> {
        let Some(stream) = queue.stream() else {
            return Err(argument("buffer", "queue", "the host's", "a GPU's"));
        };
        let bytes = tensor.elem_count() * tensor.dtype().size_in_bytes();
        Ok(Self::new(Memory::PinnedTensor(stream.lock_tensor(tensor)?), bytes, queue.clone(), Ticket::done()))
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where it lies.
    pub fn place(&self) -> Place {
        match self.memory() {
            Memory::Host(_) => Place::Host,
            Memory::Pinned(_) | Memory::PinnedTensor(_) => Place::Pinned,
            Memory::Device(_) | Memory::Tensor { .. } => Place::Device,
        }
    }

    /// The device whose memory it is, or that reads it.
    pub fn of_device(&self) -> &Device {
        self.home.device()
    }

    /// Some of its bytes.
    ///
    /// # Errors
    /// If it has fewer.
    pub fn part(self: &Arc<Self>, bytes: Range<usize>) -> Result<Part, Error> {
        if bytes.start > bytes.end || bytes.end > self.len {
            return Err(argument("buffer", "bytes", bytes, format!("a part of {}", self.len)));
        }
        Ok(Part { buffer: self.clone(), bytes })
    }

    /// All of its bytes.
    pub fn whole(self: &Arc<Self>) -> Part {
        Part { buffer: self.clone(), bytes: 0..self.len }
    }

    /// A matrix that kernels read and write, rows one behind the other.
    ///
    /// # Errors
    /// If it leaves the buffer, does not begin at a multiple of its type's size, or no kernel reaches the memory.
    pub fn matrix(&self, first_byte: usize, (rows, cols): (usize, usize), dtype: DType) -> Result<Matrix<'_>, Error> {
        let address = self.view(first_byte, rows.saturating_mul(cols), dtype)?;
        Ok(view::matrix_at(address, (rows, cols), dtype))
    }

    /// An array that kernels read and write.
    ///
    /// # Errors
    /// As [`Self::matrix`].
    pub fn array(&self, first_byte: usize, len: usize, dtype: DType) -> Result<Pointer<'_>, Error> {
        Ok(view::array_at(self.view(first_byte, len, dtype)?, dtype, len))
    }

    fn view(&self, first_byte: usize, count: usize, dtype: DType) -> Result<u64, Error> {
        let size = dtype.size_in_bytes();
        let end = count.checked_mul(size).and_then(|bytes| bytes.checked_add(first_byte));
        if !first_byte.is_multiple_of(size) || end.is_none_or(|end| end > self.len) {
            let expected = format!("values at multiples of {size} bytes within {} bytes", self.len);
            return Err(argument("buffer", "view", (first_byte, count, dtype), expected));
        }
        if self.place() == Place::Host || !self.home.is_main() {
            return Err(argument("buffer", "view", self.place(), "memory of the queue on which kernels run"));
        }
        // Nobody on the host reads meanwhile, and later readers are refused.
        let _exclusive = self.access.write().unwrap_or_else(PoisonError::into_inner);
        self.is_viewed.store(true, Ordering::Release);
        Ok(self.address() + first_byte as u64)
    }

    /// Runs `read` on the bytes, after the copies that were asked for.
    ///
    /// # Errors
    /// If the host does not reach them, kernels may be writing them, or the device failed.
    pub fn with_bytes<T>(&self, read: impl FnOnce(&[u8]) -> T) -> Result<T, Error> {
        let _shared = self.access.read().unwrap_or_else(PoisonError::into_inner);
        if self.place() == Place::Device || self.is_viewed.load(Ordering::Acquire) {
            return Err(argument("buffer", "bytes", self.place(), "host memory that no kernel has a view of"));
        }
        self.settle()?;
        // SAFETY: the host's memory is that long and lives as long as `self`; copies into it were waited for, and the lock
        // keeps others from being asked for.
        Ok(read(unsafe { std::slice::from_raw_parts(self.address() as *const u8, self.len) }))
    }

    /// The bytes, after everything that was asked of them. On a buffer that kernels have had views of, this waits for its
    /// queue.
    ///
    /// # Errors
    /// If the host does not reach them, or the device failed.
    pub fn bytes_mut(&mut self) -> Result<&mut [u8], Error> {
        if self.place() == Place::Device {
            return Err(argument("buffer", "bytes", self.place(), "host memory"));
        }
        self.settle()?;
        if self.is_viewed.swap(false, Ordering::AcqRel) {
            self.home.synchronize()?;
        }
        // SAFETY: the host's memory is that long and lives as long as `self`, which is borrowed mutably: there are no parts
        // that could be copied and no views; what was asked before is done.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.address() as *mut u8, self.len) })
    }

    /// Replaces bytes from `first_byte` on by those of `values`, on all cores, after everything that was asked of them.
    ///
    /// # Errors
    /// If they do not fit, the host does not reach them, or the device failed.
    pub fn write<T: Plain>(&mut self, first_byte: usize, values: &[T]) -> Result<(), Error> {
        let (from, len) = (bytes_of(values), self.len);
        let target = self.bytes_mut()?.get_mut(first_byte..first_byte.saturating_add(from.len()));
        let Some(target) = target else {
            return Err(argument("buffer", "values", (first_byte, from.len()), format!("bytes within {len}")));
        };
        target.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK)).for_each(|(to, from)| to.copy_from_slice(from));
        Ok(())
    }

    /// Lets the buffer's own queue come after the copies that other queues were asked for.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn come_home(&self) -> Result<(), Error> {
        let mut uses = self.uses();
        while let Some(last) = uses.last() {
            self.home.after(&last.ticket)?;
            uses.pop();
        }
        Ok(())
    }

    fn memory(&self) -> &Memory {
        self.memory.as_ref().unwrap_or_else(|| unreachable!("only the drop takes the memory"))
    }

    fn address(&self) -> u64 {
        match self.memory() {
            Memory::Host(lines) => lines.0.as_ptr().expose_provenance() as u64,
            Memory::Pinned(locked) => locked.address(),
            Memory::PinnedTensor(locked) => locked.address(),
            Memory::Device(bytes) => bytes.address(),
            Memory::Tensor { address, .. } => *address,
        }
    }

    fn uses(&self) -> MutexGuard<'_, Vec<Use>> {
        self.uses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the host wait for the copies that were asked for.
    ///
    /// # Errors
    /// If the device failed.
    pub fn wait(&self) -> Result<(), Error> {
        self.settle()
    }

    fn settle(&self) -> Result<(), Error> {
        let uses = std::mem::take(&mut *self.uses());
        for index in 0..uses.len() {
            if let Err(error) = uses[index].ticket.wait(None) {
                self.uses().extend(uses.into_iter().skip(index));
                return Err(error);
            }
        }
        Ok(())
    }

    /// Notes a copy of a queue unless the order of `home` covers it.
    fn note(&self, queue: &Queue, ticket: &Ticket) {
        let is_covered = self.place() == Place::Device && self.home.is_same(queue);
        if is_covered || self.place() == Place::Host {
            return;
        }
        let mut uses = self.uses();
        // What comes later on a queue is done later.
        uses.retain(|other| other.queue != queue.number());
        uses.push(Use { queue: queue.number(), ticket: ticket.clone() });
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Some(memory) = self.memory.take() else { return };
        let uses = std::mem::take(&mut *self.uses());
        let is_ordered = match &memory {
            Memory::Host(_) => true,
            Memory::Device(_) | Memory::Tensor { .. } => uses.iter().all(|one| self.home.after(&one.ticket).is_ok()),
            Memory::Pinned(_) | Memory::PinnedTensor(_) => {
                let is_free = uses.iter().all(|one| one.ticket.wait(None).is_ok());
                is_free && (!*self.is_viewed.get_mut() || self.home.synchronize().is_ok())
            }
        };
        if !is_ordered {
            // A device that has failed does not say when it is done with the memory.
            std::mem::forget(memory);
        }
    }
}

/// Copies between parts of two buffers on a queue; returns the ticket of the copy.
pub(super) fn copy(queue: &Queue, from: &Part, to: &Part) -> Result<Ticket, Error> {
    if from.len() != to.len() {
        return Err(argument("copy", "to", to.len(), format!("{} bytes", from.len())));
    }
    if from.is_empty() {
        return Ok(Ticket::done());
    }
    if Arc::ptr_eq(&from.buffer, &to.buffer) {
        return Err(argument("copy", "to", "the buffer that is copied from", "another buffer"));
    }
    // In the order of the addresses, so that two copies the other way round do not wait for each other.
    let read = || from.buffer.access.read().unwrap_or_else(PoisonError::into_inner);
    let write = || to.buffer.access.write().unwrap_or_else(PoisonError::into_inner);
    let _both = if Arc::as_ptr(&from.buffer) < Arc::as_ptr(&to.buffer) {
        let reading = read();
        (reading, write())
    } else {
        let writing = write();
        (read(), writing)
    };
    let Some(stream) = queue.stream() else { return copy_on_host(from, to) };
    for buffer in [&from.buffer, &to.buffer] {
        if !buffer.home.is_same(queue) {
            queue.after(&buffer.born)?;
        }
    }
    // SAFETY: the ranges lie in buffers, which see to it that they are freed after their uses: those of their home queue,
    // those noted below, and those that are waited for; the host's accesses wait for the uses as well.
    unsafe { stream.copy(to.address(), from.address(), from.len())? };
    if [from, to].iter().any(|part| part.buffer.place() == Place::Host) {
        stream.synchronize()?;
        return Ok(Ticket::done());
    }
    let ticket = match queue.ticket() {
        Ok(ticket) => ticket,
        Err(error) => {
            // The copy must not outlive what it reads and writes.
            stream.synchronize()?;
            return Err(error);
        }
    };
    for buffer in [&from.buffer, &to.buffer] {
        buffer.note(queue, &ticket);
    }
    Ok(ticket)
}

fn copy_on_host(from: &Part, to: &Part) -> Result<Ticket, Error> {
    for buffer in [&from.buffer, &to.buffer] {
        if buffer.place() == Place::Device || buffer.is_viewed.load(Ordering::Acquire) {
            let expected = "host memory that no kernel has a view of, or a GPU's queue";
            return Err(argument("copy", "place", buffer.place(), expected));
        }
        buffer.settle()?;
    }
    // SAFETY: both ranges are host memory of two buffers, which are locked; earlier copies were waited for.
    unsafe {
        std::ptr::copy_nonoverlapping(from.address() as *const u8, to.address() as *mut u8, from.len());
    }
    Ok(Ticket::done())
}

#[cfg(test)]
#[path = "buffer_tests.rs"]
mod tests;
