//! Opening a GPU, what it is, how much of its memory is in use.

use candle_core::Device;

use super::gpu::{self, Stream};
use super::{Error, Queue, argument};

/// Whether the program was built for GPUs.
pub const IS_BUILT_FOR_GPUS: bool = gpu::IS_BUILT;

/// Bytes of the stream-ordered pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Handed out now.
    pub used: u64,
    /// The most that was handed out at one time since the start or [`reset_peak`].
    pub peak: u64,
    /// Held by the pool, in use or not.
    pub reserved: u64,
}

/// What holds a GPU's memory, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Tensors and workspaces, at their most since the start or [`reset_peak`].
    pub tensors: u64,
    /// What the pool keeps beside that most: pieces between tensors, and what is free for the next step.
    pub slack: u64,
    /// What was in use when the GPU was opened: the context, and other processes.
    pub opening: u64,
    /// What came since, outside of the pool: code of kernels, what libraries keep for themselves, other processes.
    pub loaded: u64,
}

impl Footprint {
    fn of(pool: MemoryUse, in_use: u64, at_opening: u64) -> Self {
        let outside = in_use.saturating_sub(pool.reserved);
        let opening = at_opening.min(outside);
        let slack = pool.reserved.saturating_sub(pool.peak);
        Self { tensors: pool.peak, slack, opening, loaded: outside - opening }
    }

    /// All but the tensors.
    pub fn beside_tensors(&self) -> u64 {
        self.slack + self.opening + self.loaded
    }
}

/// Whether this machine has a GPU of that number, and the program was built for it.
pub fn is_cuda_device(ordinal: usize) -> bool {
    ordinal < gpu::count()
}

/// Whether that GPU computes in bfloat16 (compute capability 8.0).
pub fn has_bf16(ordinal: usize) -> bool {
    gpu::capability_of(ordinal).is_some_and(|(major, _)| major >= 8)
}

/// The compute capability of an open GPU, e.g. `(9, 0)`.
///
/// # Errors
/// If `device` is no GPU or the driver refuses.
pub fn compute_capability(device: &Device) -> Result<(i32, i32), Error> {
    Stream::of(device)?.capability()
}

/// The multiprocessors of an open GPU.
///
/// # Errors
/// If `device` is no GPU or the driver refuses.
pub fn multiprocessors(device: &Device) -> Result<u32, Error> {
    Stream::of(device)?.multiprocessors()
}

/// The name of an open GPU.
///
/// # Errors
/// If `device` is no GPU.
pub fn device_name(device: &Device) -> Result<String, Error> {
    Stream::of(device)?.name()
}

/// The UUID of an open GPU, as `nvidia-smi -L` shows it: `GPU-...`.
///
/// # Errors
/// If `device` is no GPU or the driver refuses.
pub fn device_uuid(device: &Device) -> Result<String, Error> {
    Ok(uuid_text(Stream::of(device)?.uuid()?))
}

fn uuid_text(bytes: [u8; 16]) -> String {
    let byte = |(index, byte): (usize, &u8)| {
        let dash = if [0, 4, 6, 8, 10].contains(&index) { "-" } else { "" };
        format!("{dash}{byte:02x}")
    };
    std::iter::once("GPU".to_string()).chain(bytes.iter().enumerate().map(byte)).collect()
}

/// Opens GPU `ordinal` with a stream of its own and a pool that keeps what is freed.
///
/// Event tracking is off: there is one compute stream, and every other stream is ordered by hand.
///
/// # Errors
/// If there is no such GPU or the driver refuses.
pub fn open(ordinal: usize) -> Result<Device, Error> {
    let device = gpu::open(ordinal)?;
    let outside = device_memory_used()?.saturating_sub(memory_use(&device)?.reserved);
    Queue::of(&device)?.note_opening(outside);
    Ok(device)
}

/// What the device's pool holds.
///
/// # Errors
/// If `device` is no GPU.
pub fn memory_use(device: &Device) -> Result<MemoryUse, Error> {
    Stream::of(device)?.memory_use()
}

/// Bytes of the current GPU's memory that are in use, by this process and others: contexts and libraries included.
///
/// # Errors
/// If the driver refuses.
pub fn device_memory_used() -> Result<u64, Error> {
    let (free, total) = gpu::memory_info()?;
    Ok((total - free) as u64)
}

/// What holds the memory of a GPU.
///
/// # Errors
/// If `device` is no GPU or the driver refuses.
pub fn footprint(device: &Device) -> Result<Footprint, Error> {
    Stream::of(device)?.bind()?;
    Ok(Footprint::of(memory_use(device)?, device_memory_used()?, Queue::of(device)?.at_opening()))
}

/// Bytes that could still be allocated on `device`: what nobody uses, and what its pool holds without use.
///
/// # Errors
/// If `device` is no GPU or the driver refuses.
pub fn free_memory(device: &Device) -> Result<u64, Error> {
    free_memory_shared(device, 1)
}

/// As [`free_memory`], for one of so many processes that come for what nobody uses together. Its own limit and pool it shares with
/// nobody.
///
/// # Errors
/// If `device` is no GPU or the driver refuses.
pub fn free_memory_shared(device: &Device, processes: u64) -> Result<u64, Error> {
    let stream = Stream::of(device)?;
    stream.bind()?;
    let (free, _) = gpu::memory_info()?;
    Ok(share_of_free(free as u64, processes, stream.memory_use()?, Queue::of(device)?.limit()))
}

fn share_of_free(free: u64, processes: u64, MemoryUse { used, reserved, .. }: MemoryUse, limit: u64) -> u64 {
    (free / processes.max(1) + reserved.saturating_sub(used)).min(limit.saturating_sub(used))
}

/// Limits what this process takes of a GPU's memory to `bytes`, of which `beside` are for the context and libraries: tensors have
/// the rest. Work that needs more gets the error of a smaller card. To be called before the first tensor is made.
///
/// # Errors
/// If `device` is no GPU, the limit leaves nothing for tensors, or the driver refuses.
pub fn limit_memory(device: &Device, bytes: u64, beside: u64) -> Result<(), Error> {
    let Some(tensors) = bytes.checked_sub(beside).filter(|tensors| *tensors > 0) else {
        let expected = format!("more than the {beside} bytes that context and libraries take");
        return Err(argument("limit_memory", "bytes", bytes, expected));
    };
    Stream::of(device)?.limit_pool(tensors as usize)?;
    Queue::of(device)?.note_limit(tensors);
    Ok(())
}

/// Starts a new peak from what is in use now.
///
/// # Errors
/// If `device` is no GPU.
pub fn reset_peak(device: &Device) -> Result<(), Error> {
    Stream::of(device)?.reset_peak()
}

/// Waits until the device has done everything that was asked of it.
///
/// # Errors
/// If an earlier launch failed.
pub fn synchronize(device: &Device) -> Result<(), Error> {
    if !device.is_cuda() {
        return Err(argument("synchronize", "device", device.location(), "a GPU"));
    }
    Ok(device.synchronize()?)
}

#[cfg(test)]
mod tests {
    use super::{Footprint, MemoryUse, share_of_free, uuid_text};

    #[test]
    fn a_uuid_is_written_as_the_driver_writes_it() {
        let bytes = std::array::from_fn(|index| index as u8 * 17);
        assert_eq!(uuid_text(bytes), "GPU-00112233-4455-6677-8899-aabbccddeeff");
    }

    #[test]
    fn processes_share_what_is_free_but_not_the_limit_or_the_pool_of_each() {
        let pool = MemoryUse { used: 10, reserved: 16, ..MemoryUse::default() };
        assert_eq!(share_of_free(100, 1, pool, u64::MAX), 106);
        assert_eq!(share_of_free(100, 2, pool, u64::MAX), 56);
        assert_eq!(share_of_free(100, 2, pool, 50), 40);
        assert_eq!(share_of_free(100, 4, pool, 50), 31);
        assert_eq!(share_of_free(100, 0, pool, 5), 0);
    }

    #[test]
    fn what_holds_the_memory_adds_up_to_what_is_in_use() {
        let pool = MemoryUse { used: 10, peak: 60, reserved: 100 };
        let of = Footprint::of(pool, 175, 30);
        assert_eq!(of, Footprint { tensors: 60, slack: 40, opening: 30, loaded: 45 });
        assert_eq!(of.tensors + of.beside_tensors(), 175);
        // Another process that was there at the opening may be gone.
        let less = Footprint::of(pool, 120, 30);
        assert_eq!((less.opening, less.loaded, less.tensors + less.beside_tensors()), (20, 0, 120));
    }
}
