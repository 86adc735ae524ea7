//! Opening a GPU: its stream, its memory pool, how much of it is in use.

use candle_core::Device;
use cudarc::driver::CudaContext;
use cudarc::driver::sys::{
    CUmemPool_attribute, CUmemoryPool, cuDeviceGetDefaultMemPool, cuMemPoolGetAttribute, cuMemPoolSetAttribute,
};

use super::memory::cuda;
use super::{Error, argument, failed};

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

/// Whether this machine has a GPU of that number.
pub fn is_cuda_device(ordinal: usize) -> bool {
    CudaContext::device_count().is_ok_and(|count| ordinal < count as usize)
}

/// Whether that GPU computes in bfloat16 (compute capability 8.0).
pub fn has_bf16(ordinal: usize) -> bool {
    let capability = CudaContext::new(ordinal).and_then(|context| context.compute_capability());
    capability.is_ok_and(|(major, _)| major >= 8)
}

/// The compute capability of an open GPU, e.g. `(9, 0)`.
///
/// # Errors
/// If `device` is no GPU or the driver refuses.
pub fn compute_capability(device: &Device) -> Result<(i32, i32), Error> {
    let capability = cuda(device)?.cuda_stream().context().compute_capability();
    capability.map_err(failed("asking for the GPU's compute capability"))
}

/// The name of an open GPU.
///
/// # Errors
/// If `device` is no GPU.
pub fn device_name(device: &Device) -> Result<String, Error> {
    let name = cuda(device)?.cuda_stream().context().name();
    name.map_err(failed("asking for the name of the GPU"))
}

/// Opens GPU `ordinal` with a stream of its own and a pool that keeps what is freed.
///
/// Event tracking is off: there is one compute stream, and every other stream is ordered by hand.
///
/// # Errors
/// If there is no such GPU or the driver refuses.
pub fn open(ordinal: usize) -> Result<Device, Error> {
    let device = Device::new_cuda_with_stream(ordinal)?;
    let inner = cuda(&device)?;
    // SAFETY: tensors are used on the device's one compute stream; copies on other streams are ordered by events.
    unsafe { inner.disable_event_tracking() };
    let mut threshold = u64::MAX;
    let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the attribute is a 64-bit number, and `threshold` is one.
    let result = unsafe { cuMemPoolSetAttribute(pool(&device)?, attribute, (&raw mut threshold).cast()) };
    result.result().map_err(failed("keeping freed device memory"))?;
    Ok(device)
}

fn pool(device: &Device) -> Result<CUmemoryPool, Error> {
    let context = cuda(device)?.cuda_stream().context().clone();
    let mut pool = std::ptr::null_mut();
    // SAFETY: the device handle comes from an open context, and `pool` outlives the call.
    let result = unsafe { cuDeviceGetDefaultMemPool(&raw mut pool, context.cu_device()) };
    result.result().map_err(failed("finding the device's memory pool"))?;
    Ok(pool)
}

fn attribute(device: &Device, attribute: CUmemPool_attribute) -> Result<u64, Error> {
    let mut value = 0u64;
    // SAFETY: the attributes asked for are 64-bit numbers, and `value` is one.
    let result = unsafe { cuMemPoolGetAttribute(pool(device)?, attribute, (&raw mut value).cast()) };
    result.result().map_err(failed("reading the memory pool's use"))?;
    Ok(value)
}

/// What the device's pool holds.
///
/// # Errors
/// If `device` is no GPU.
pub fn memory_use(device: &Device) -> Result<MemoryUse, Error> {
    Ok(MemoryUse {
        used: attribute(device, CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?,
        peak: attribute(device, CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?,
        reserved: attribute(device, CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?,
    })
}

/// Bytes of the current GPU's memory that are in use, by this process and others: contexts and libraries included.
///
/// # Errors
/// If the driver refuses.
pub fn device_memory_used() -> Result<u64, Error> {
    let (free, total) = cudarc::driver::result::mem_get_info().map_err(failed("reading the device's memory"))?;
    Ok((total - free) as u64)
}

/// Bytes that could still be allocated on `device`: what nobody uses, and what its pool holds without use.
///
/// # Errors
/// If `device` is no GPU or the driver refuses.
pub fn free_memory(device: &Device) -> Result<u64, Error> {
    let refused = failed("reading the device's memory");
    cuda(device)?.cuda_stream().context().bind_to_thread().map_err(refused)?;
    let (free, _) = cudarc::driver::result::mem_get_info().map_err(refused)?;
    let MemoryUse { used, reserved, .. } = memory_use(device)?;
    Ok(free as u64 + reserved.saturating_sub(used))
}

/// Starts a new peak from what is in use now.
///
/// # Errors
/// If `device` is no GPU.
pub fn reset_peak(device: &Device) -> Result<(), Error> {
    let mut zero = 0u64;
    let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
    // SAFETY: the attribute is a 64-bit number that may only be set to 0, and `zero` is that.
    let result = unsafe { cuMemPoolSetAttribute(pool(device)?, attribute, (&raw mut zero).cast()) };
    result.result().map_err(failed("resetting the memory peak"))
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
