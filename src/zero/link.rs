//! The way between where values wait and where blocks compute.

use std::path::PathBuf;
use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::files::{Extent, Files, Kind, Reading, Shelf};
use super::values::{Stage, Values};
use super::{Error, ReadTypes};
use crate::config::settings::{OffloadDevice, OffloadSettings, RankSettings};
use crate::device::{Buffer, Queue, Ticket};

/// What waits elsewhere until a walk asks for it.
#[derive(Clone, Debug, PartialEq)]
pub struct Offload {
    /// Whether parameters wait in host memory or in a file: frozen ones, and trained ones if their optimizer works there too.
    pub params: bool,
    /// Whether trained values, their gradients and the optimizer's state lie in host memory, or values and state in a file, apart
    /// from what blocks compute with. The optimizer works in host memory then.
    pub optimizer: bool,
    /// What of it lies in files.
    pub files: Files,
    /// Whether that memory is page-locked.
    pub is_pinned: bool,
    /// Values of blocks that may be where they compute at a time; two blocks always may.
    pub most_live: usize,
    /// Parameters of at most so many values do not wait.
    pub persistence_threshold: usize,
    /// Types to which blocks round trained values: in those they come from where the optimizer moves them.
    pub types: ReadTypes,
}

impl Default for Offload {
    /// Nothing waits.
    fn default() -> Self {
        Self {
            params: false,
            optimizer: false,
            files: Files::default(),
            is_pinned: true,
            most_live: 0,
            persistence_threshold: 0,
            types: ReadTypes::default(),
        }
    }
}

impl Offload {
    /// What the settings say for a run of that name, which no other run on the machine has, that computes on `device` and rounds
    /// trained values to `types`. The CPU's memory holds everything that does not lie in files, and is where its optimizer works
    /// anyway.
    pub fn of(settings: &RankSettings, device: &Device, types: ReadTypes, run: &str) -> Self {
        let OffloadSettings { optimizer, params, pin_memory, max_live_parameters, .. } = settings.offload;
        let in_file = |place| place == OffloadDevice::Nvme;
        let files = Files {
            optimizer: settings.offload.optimizer_path.clone().filter(|_| in_file(optimizer)),
            parameters: settings.offload.params_path.clone().filter(|_| in_file(params)),
            run: run.into(),
            buffer_count: settings.offload.buffer_count,
        };
        Self {
            params: in_file(params) || (device.is_cuda() && params != OffloadDevice::None),
            optimizer: device.is_cuda() && optimizer != OffloadDevice::None,
            files,
            is_pinned: pin_memory,
            most_live: max_live_parameters.unwrap_or(0),
            persistence_threshold: settings.param_persistence_threshold,
            types,
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
    /// The files of this rank.
    parameters: Option<Arc<Shelf>>,
    optimizer: Option<Arc<Shelf>>,
    stage: Arc<Stage>,
}

/// Bytes where they wait.
#[derive(Debug)]
pub(super) enum Waiting {
    Memory(Arc<Buffer>),
    File(Extent),
}

impl Waiting {
    /// How many.
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Memory(buffer) => buffer.len(),
            Self::File(extent) => extent.len(),
        }
    }
}

impl Link {
    /// Of a store of `rank` on `device`. Where ranks exchange memory of GPUs, what they share `stays_on_device` unless it is
    /// offloaded.
    pub(super) fn new(device: &Device, offload: Offload, stays_on_device: bool, rank: usize) -> Result<Self, Error> {
        let main = Queue::of(device)?;
        let is_on_gpu = device.is_cuda();
        let copies = if is_on_gpu { main.beside()? } else { main };
        let files = &offload.files;
        let open = |folder: &Option<PathBuf>, kind| {
            let writes = writes_a_block(kind, &offload);
            folder.as_deref().map(|folder| Shelf::open(folder, kind, rank, (files, writes))).transpose()
        };
        let parameters = open(&files.parameters, Kind::Parameters)?;
        let optimizer = open(&files.optimizer, Kind::Optimizer)?;
        let stage = Arc::new(Stage::new(device, offload.is_pinned, files.buffer_count)?);
        let device = device.clone();
        Ok(Self { device, copies, is_on_gpu, stays_on_device, offload, parameters, optimizer, stage })
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

    /// The file in which the optimizer's state lies.
    pub(super) fn optimizer_file(&self) -> Option<&Arc<Shelf>> {
        self.optimizer.as_ref()
    }

    /// The files of this rank.
    pub(super) fn files(&self) -> impl Iterator<Item = &Arc<Shelf>> {
        self.parameters.iter().chain(&self.optimizer)
    }

    /// Blocks that are read ahead of a walk.
    pub(super) fn blocks_ahead(&self) -> usize {
        if self.files().next().is_some() { self.offload.files.buffer_count.saturating_sub(1) } else { 0 }
    }

    /// Trained values where they wait. Where the CPU computes with those that the optimizer moves, they are parameters.
    pub(super) fn keep_values(&self, values: Vec<f32>) -> Result<Values, Error> {
        let parameters = self.parameters.as_ref().filter(|_| !self.is_on_gpu);
        let file = if self.has_home_elsewhere() { self.optimizer.as_ref() } else { parameters };
        if let Some(file) = file.filter(|_| !values.is_empty()) {
            return Values::in_file(values, file, &self.stage);
        }
        let count = values.len();
        Ok(Values::in_memory(Tensor::from_vec(values, count, self.home())?))
    }

    /// Starts to read bytes from a file, into memory from which copies to the device are made.
    pub(super) fn read(&self, extent: &Extent) -> Result<Reading<Buffer>, Error> {
        Ok(extent.read(self.stage.take_buffer(extent.len())?))
    }

    /// Takes memory of [`Self::read`] back, once the copies out of it were asked for.
    pub(super) fn give(&self, buffer: Arc<Buffer>) {
        self.stage.give_shared(buffer);
    }

    /// The host memory that values pass through.
    pub(super) fn stage(&self) -> &Arc<Stage> {
        &self.stage
    }

    /// Bytes in the place where they wait.
    pub(super) fn put_away(&self, bytes: Vec<u8>) -> Result<Waiting, Error> {
        match &self.parameters {
            Some(file) => Ok(Waiting::File(file.put(bytes)?)),
            None => Ok(Waiting::Memory(Arc::new(self.keep(&bytes)?))),
        }
    }

    fn keep(&self, bytes: &[u8]) -> Result<Buffer, Error> {
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

/// Stretches of a block that the optimizer may write to one file: its state, and where it works apart from blocks the values, with
/// what blocks read of them.
fn writes_a_block(kind: Kind, offload: &Offload) -> usize {
    match kind {
        Kind::Optimizer if offload.optimizer && offload.types != ReadTypes::default() => 3,
        Kind::Optimizer if offload.optimizer => 2,
        Kind::Optimizer | Kind::Parameters => 1,
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
