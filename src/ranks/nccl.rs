//! Ranks with a GPU each, through NCCL.
//!
//! The operations of [`Collective`] copy to the device and back, on the stream given at the start. A wait for the device has
//! the deadline of the group: NCCL itself would wait for a lost rank for ever. What is small goes over [`Ranks`], which is
//! also how the group is made.
//!
//! NCCL adds in an order of its own. It is the same on every rank and for every call with the same number of ranks and
//! elements, so all ranks hold the same bits, but they are not those of the CPU implementations.
#![expect(unsafe_code, reason = "moving a communicator to another thread")]

use std::ffi::c_char;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::driver::{CudaSlice, CudaStream};
use cudarc::nccl::result::NcclError;
use cudarc::nccl::{Comm, Id, ReduceOp};

use super::collective::check_shards;
use super::{Collective, Error, Ranks};

/// First wait between two looks at the device; doubled up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_micros(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(1);

/// One rank of a group of GPUs.
pub struct Nccl {
    comm: Comm,
    stream: Arc<CudaStream>,
    rank: usize,
    world_size: usize,
    deadline: Duration,
}

// SAFETY: a communicator may be used from any thread as long as one thread at a time does; `Nccl` is not `Sync` (its
// `Comm` holds a raw pointer), so a shared reference never leaves the thread that owns it. The stream is `Send`.
unsafe impl Send for Nccl {}

impl Nccl {
    /// Joins the group. `over` is a CPU transport of the same ranks; rank 0's id travels over it. Check with
    /// [`super::device::exchange`] first that no two ranks have one GPU.
    ///
    /// # Errors
    /// If the transport or NCCL fails.
    pub fn connect(over: &dyn Ranks, stream: Arc<CudaStream>, deadline: Duration) -> Result<Self, Error> {
        let (rank, world_size) = (over.rank(), over.world_size());
        let failed = |operation| move |error: NcclError| device_error(rank, operation, error.0);
        let mut bytes = Vec::new();
        if rank == 0 {
            let id = Id::new().map_err(failed("ncclGetUniqueId"))?;
            bytes = id.internal().iter().map(|&c| c as u8).collect();
        }
        over.broadcast(&mut bytes, 0)?;
        let internal: [u8; 128] = bytes.as_slice().try_into().map_err(|_| Error::Message {
            peer: 0,
            what: "the id of the NCCL group",
            problem: format!("it has {} bytes, expected 128", bytes.len()),
        })?;
        let id = Id::uninit(internal.map(|b| b as c_char));
        let comm = Comm::from_rank(Arc::clone(&stream), rank, world_size, id).map_err(failed("ncclCommInitRank"))?;
        Ok(Self { comm, stream, rank, world_size, deadline })
    }

    /// Waits until the device has done everything that was put on the stream.
    ///
    /// # Errors
    /// If it takes longer than the deadline, or the device reports an error.
    pub fn wait(&self, operation: &'static str) -> Result<(), Error> {
        let failed = |error| device_error(self.rank, operation, error);
        let event = self.stream.record_event(None).map_err(failed)?;
        let until = Instant::now() + self.deadline;
        let mut pause = FIRST_PAUSE;
        while !event.try_is_complete().map_err(failed)? {
            if Instant::now() >= until {
                let secs = self.deadline.as_secs();
                return Err(Error::Timeout { rank: self.rank, operation, secs, missing: Vec::new() });
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        Ok(())
    }

    fn upload<T: cudarc::driver::DeviceRepr>(
        &self,
        operation: &'static str,
        values: &[T],
    ) -> Result<CudaSlice<T>, Error> {
        self.stream.clone_htod(values).map_err(|error| device_error(self.rank, operation, error))
    }

    fn zeros<T: cudarc::driver::DeviceRepr + cudarc::driver::ValidAsZeroBits>(
        &self,
        operation: &'static str,
        count: usize,
    ) -> Result<CudaSlice<T>, Error> {
        self.stream.alloc_zeros(count).map_err(|error| device_error(self.rank, operation, error))
    }

    /// Waits for the device, then copies its values to the host.
    fn download<T: cudarc::driver::DeviceRepr>(
        &self,
        operation: &'static str,
        device: &CudaSlice<T>,
        host: &mut [T],
    ) -> Result<(), Error> {
        self.wait(operation)?;
        self.stream.memcpy_dtoh(device, host).map_err(|error| device_error(self.rank, operation, error))
    }
}

fn device_error(rank: usize, operation: &'static str, problem: impl std::fmt::Debug) -> Error {
    Error::Device { rank, operation, problem: format!("{problem:?}") }
}

impl Collective for Nccl {
    fn all_reduce_sum(&self, values: &mut [f32]) -> Result<(), Error> {
        let operation = "all_reduce_sum";
        if values.is_empty() {
            return Ok(());
        }
        let mut device = self.upload(operation, values)?;
        let reduced = self.comm.all_reduce_in_place(&mut device, &ReduceOp::Sum);
        reduced.map_err(|error| device_error(self.rank, operation, error.0))?;
        self.download(operation, &device, values)
    }

    fn all_gather(&self, shard: &[f32], full: &mut [f32]) -> Result<(), Error> {
        let operation = "all_gather";
        check_shards(operation, self.world_size, shard.len(), full.len())?;
        if shard.is_empty() {
            return Ok(());
        }
        let own = self.upload(operation, shard)?;
        let mut all = self.zeros::<f32>(operation, full.len())?;
        self.comm.all_gather(&own, &mut all).map_err(|error| device_error(self.rank, operation, error.0))?;
        self.download(operation, &all, full)
    }

    fn reduce_scatter_sum(&self, full: &[f32], shard: &mut [f32]) -> Result<(), Error> {
        let operation = "reduce_scatter_sum";
        check_shards(operation, self.world_size, shard.len(), full.len())?;
        if shard.is_empty() {
            return Ok(());
        }
        let all = self.upload(operation, full)?;
        let mut own = self.zeros::<f32>(operation, shard.len())?;
        let reduced = self.comm.reduce_scatter(&all, &mut own, &ReduceOp::Sum);
        reduced.map_err(|error| device_error(self.rank, operation, error.0))?;
        self.download(operation, &own, shard)
    }
}
