//! f32 values of a flat buffer, in memory or in a file, and the host memory that they pass through.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Tensor};

use super::Error;
use super::files::{Extent, Memory, Reading, Shelf};
use crate::device::{Buffer, Queue, bytes_of_mut};
use crate::ops::buffer;

/// The values of a flat buffer: f32 `[n]`.
#[derive(Clone, Debug)]
pub struct Values(Place);

#[derive(Clone, Debug)]
enum Place {
    Memory(Tensor),
    File(Arc<Filed>),
}

/// Values in a file.
#[derive(Debug)]
struct Filed {
    extent: Extent,
    count: usize,
    stage: Arc<Stage>,
    /// While they are worked on.
    loaded: Mutex<Option<Staged>>,
}

/// Host memory that values from a file pass through, page-locked beside a GPU; it is used again.
#[derive(Debug)]
pub(super) struct Stage {
    /// The queue of the GPU for which it is page-locked.
    queue: Option<Queue>,
    most: usize,
    staged: Mutex<Vec<Staged>>,
    buffers: Mutex<Vec<Buffer>>,
}

/// Values in host memory.
#[derive(Debug)]
pub(super) struct Staged {
    pub(super) values: Tensor,
    /// Their memory, where it is page-locked.
    pub(super) locked: Option<Arc<Buffer>>,
}

impl Memory for Staged {
    fn with_bytes(&mut self, visit: &mut dyn FnMut(Vec<&mut [u8]>) -> io::Result<()>) -> Result<io::Result<()>, Error> {
        if self.values.elem_count() == 0 {
            return Ok(visit(Vec::new()));
        }
        Ok(buffer::with_values(&self.values, |values| visit(vec![bytes_of_mut(values)]))?)
    }
}

impl Stage {
    /// Memory of which up to `most` pieces are kept for the next use; for copies to `device`'s GPU with `is_pinned`.
    pub(super) fn new(device: &Device, is_pinned: bool, most: usize) -> Result<Self, Error> {
        let queue = (device.is_cuda() && is_pinned).then(|| Queue::of(device)).transpose()?;
        Ok(Self { queue, most, staged: Mutex::default(), buffers: Mutex::default() })
    }

    /// Memory for so many values that nobody else uses.
    pub(super) fn take(&self, count: usize) -> Result<Staged, Error> {
        let kept = take_first(&self.staged, |staged| staged.values.elem_count() == count);
        if let Some(staged) = kept {
            // Copies out of it may still be on their way.
            staged.locked.as_ref().map_or(Ok(()), |locked| locked.wait())?;
            return Ok(staged);
        }
        let values = Tensor::zeros(count, DType::F32, &Device::Cpu)?;
        let lock = |queue: &Queue| Buffer::of_host_tensor(values.clone(), queue).map(Arc::new);
        let locked = self.queue.as_ref().filter(|_| count > 0).map(lock).transpose()?;
        Ok(Staged { values, locked })
    }

    /// Takes memory back that nobody computes with.
    pub(super) fn give(&self, staged: Staged) {
        keep(&self.staged, staged, self.most);
    }

    /// So many bytes that nobody else uses, and from which copies to the device are made.
    pub(super) fn take_buffer(&self, bytes: usize) -> Result<Buffer, Error> {
        match (take_first(&self.buffers, |buffer| buffer.len() == bytes), &self.queue) {
            (Some(buffer), _) => Ok(buffer),
            (None, Some(queue)) => Ok(Buffer::pinned(queue, bytes)?),
            (None, None) => Ok(Buffer::host(bytes)),
        }
    }

    /// Takes bytes back.
    pub(super) fn give_buffer(&self, buffer: Buffer) {
        keep(&self.buffers, buffer, self.most);
    }

    /// The same of bytes that nobody else holds; copies out of them may still be on their way.
    pub(super) fn give_shared(&self, buffer: Arc<Buffer>) {
        if let Some(buffer) = Arc::into_inner(buffer) {
            self.give_buffer(buffer);
        }
    }
}

fn take_first<T>(all: &Mutex<Vec<T>>, fits: impl Fn(&T) -> bool) -> Option<T> {
    let mut all = lock(all);
    all.iter().position(fits).map(|index| all.swap_remove(index))
}

fn keep<T>(all: &Mutex<Vec<T>>, one: T, most: usize) {
    let mut all = lock(all);
    if all.len() >= most && !all.is_empty() {
        all.remove(0);
    }
    all.push(one);
}

impl Values {
    /// Values that lie in a tensor.
    pub(super) fn in_memory(values: Tensor) -> Self {
        Self(Place::Memory(values))
    }

    /// Values that lie in a file.
    pub(super) fn in_file(values: Vec<f32>, shelf: &Arc<Shelf>, stage: &Arc<Stage>) -> Result<Self, Error> {
        let count = values.len();
        let staged = Staged { values: Tensor::from_vec(values, count, &Device::Cpu)?, locked: None };
        let extent = shelf.put(staged)?;
        Ok(Self(Place::File(Arc::new(Filed { extent, count, stage: stage.clone(), loaded: Mutex::default() }))))
    }

    /// The same values once more, in a place of the same kind.
    pub(super) fn copy(&self) -> Result<Self, Error> {
        match &self.0 {
            Place::Memory(values) => Ok(Self::in_memory(values.copy()?)),
            Place::File(filed) => {
                let values = buffer::to_vec(&self.tensor()?)?;
                Self::in_file(values, filed.extent.shelf(), &filed.stage)
            }
        }
    }

    /// How many.
    pub fn len(&self) -> usize {
        match &self.0 {
            Place::Memory(values) => values.elem_count(),
            Place::File(filed) => filed.count,
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many lie in memory between the times at which they are worked on.
    pub fn len_in_memory(&self) -> usize {
        if self.is_in_file() { 0 } else { self.len() }
    }

    /// Whether they lie in a file.
    pub fn is_in_file(&self) -> bool {
        matches!(self.0, Place::File(_))
    }

    /// Where they are worked on.
    pub(super) fn device(&self) -> &Device {
        match &self.0 {
            Place::Memory(values) => values.device(),
            Place::File(_) => &Device::Cpu,
        }
    }

    /// The file in which they lie, if they do.
    pub(super) fn shelf(&self) -> Option<&Arc<Shelf>> {
        match &self.0 {
            Place::Memory(_) => None,
            Place::File(filed) => Some(filed.extent.shelf()),
        }
    }

    /// The memory in which they lie, if it is not a file.
    pub(super) fn memory(&self) -> Option<&Tensor> {
        match &self.0 {
            Place::Memory(values) => Some(values),
            Place::File(_) => None,
        }
    }

    /// The values: their own memory, or a copy of what lies in the file.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn tensor(&self) -> Result<Tensor, Error> {
        match &self.0 {
            Place::Memory(values) => Ok(values.clone()),
            Place::File(filed) => match &*lock(&filed.loaded) {
                Some(staged) => Ok(staged.values.clone()),
                None => Ok(filed.start(false)?.wait()?.values),
            },
        }
    }

    /// Starts to read them if they lie in a file: into memory that is given back to [`Stage`], or with `is_kept` into memory
    /// that is anybody's.
    pub(super) fn start(&self, is_kept: bool) -> Result<Option<Reading<Staged>>, Error> {
        match &self.0 {
            Place::Memory(_) => Ok(None),
            Place::File(filed) => filed.start(!is_kept).map(Some),
        }
    }

    /// Has them in memory, as `reading` brings them, until [`Self::unload`]. What is changed meanwhile counts.
    pub(super) fn load(&self, reading: Option<Reading<Staged>>) -> Result<(), Error> {
        if let Place::File(filed) = &self.0 {
            let staged = reading.map_or_else(|| filed.start(true), Ok)?.wait()?;
            *lock(&filed.loaded) = Some(staged);
        }
        Ok(())
    }

    /// Starts to write them to the file they are in.
    pub(super) fn unload(&self) -> Result<(), Error> {
        let Place::File(filed) = &self.0 else { return Ok(()) };
        let Some(staged) = lock(&filed.loaded).take() else { return Ok(()) };
        let stage = filed.stage.clone();
        filed.extent.write(staged, move |staged| stage.give(staged))
    }

    /// The page-locked memory in which they are while they are loaded.
    pub(super) fn locked(&self) -> Option<Arc<Buffer>> {
        match &self.0 {
            Place::Memory(_) => None,
            Place::File(filed) => lock(&filed.loaded).as_ref().and_then(|staged| staged.locked.clone()),
        }
    }

    /// Takes back memory that was read into, once the copies out of it were asked for.
    pub(super) fn give(&self, staged: Staged) {
        if let Place::File(filed) = &self.0 {
            filed.stage.give(staged);
        }
    }

    /// Runs `change` on their memory, and writes it to the file they are in.
    pub(super) fn change(&self, change: impl FnOnce(&Tensor) -> Result<(), Error>) -> Result<(), Error> {
        let is_loaded = match &self.0 {
            Place::Memory(_) => true,
            Place::File(filed) => lock(&filed.loaded).is_some(),
        };
        if is_loaded {
            return change(&self.tensor()?);
        }
        self.load(None)?;
        let changed = self.tensor().and_then(|values| change(&values));
        self.unload()?;
        changed
    }
}

impl Filed {
    fn start(&self, is_given_back: bool) -> Result<Reading<Staged>, Error> {
        let staged = if is_given_back {
            self.stage.take(self.count)?
        } else {
            Staged { values: Tensor::zeros(self.count, DType::F32, &Device::Cpu)?, locked: None }
        };
        Ok(self.extent.read(staged))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
