//! The driver's calls. Without the feature `cuda` the file `no_gpu.rs` stands in the place of this one.

use std::ffi::c_void;
use std::sync::Arc;

use candle_core::cuda_backend::CudaStorageSlice;
use candle_core::{CpuStorage, CudaDevice, CudaStorage, DType, Device, Shape, Storage, Tensor};
use cudarc::driver::sys::{
    CU_MEMHOSTALLOC_DEVICEMAP, CU_MEMHOSTALLOC_PORTABLE, CU_MEMHOSTREGISTER_PORTABLE, CUdevice_attribute,
    CUevent_flags, CUgraphInstantiate_flags, CUlimit, CUmemAllocationHandleType, CUmemAllocationType,
    CUmemLocationType, CUmemPool_attribute, CUmemPoolProps, CUmemoryPool, CUstreamCaptureMode, cuCtxSetLimit,
    cuDeviceGetMemPool, cuDeviceSetMemPool, cuMemFreeHost, cuMemHostAlloc, cuMemHostRegister_v2, cuMemHostUnregister,
    cuMemPoolCreate, cuMemPoolGetAttribute, cuMemPoolSetAttribute, cuMemPoolTrimTo, cuMemcpyAsync, cudaError_enum,
};
use cudarc::driver::{CudaContext, CudaEvent, CudaGraph, CudaSlice, CudaStream, DevicePtr, DeviceRepr, DriverError};

use super::{Error, MemoryUse, argument, failed};

/// Whether the program was built for GPUs.
pub(super) const IS_BUILT: bool = true;

/// The CUDA device of `device`.
pub(crate) fn cuda(device: &Device) -> Result<&CudaDevice, Error> {
    match device {
        Device::Cuda(device) => Ok(device),
        other => Err(argument("device", "device", other.location(), "a GPU")),
    }
}

/// GPUs of this machine.
pub(super) fn count() -> usize {
    CudaContext::device_count().map_or(0, |count| count.max(0) as usize)
}

/// The compute capability of a GPU that need not be open.
pub(super) fn capability_of(ordinal: usize) -> Option<(i32, i32)> {
    CudaContext::new(ordinal).and_then(|context| context.compute_capability()).ok()
}

/// Bytes of stack that the driver holds for each thread that a GPU could run at a time. For a kernel that needs more it takes
/// more by itself; its default of 1,024 holds 0.2 GiB of an H200 that no kernel uses.
const STACK_BYTES: usize = 256;

/// Opens a GPU with a stream of its own and a pool that keeps what is freed.
pub(super) fn open(ordinal: usize) -> Result<Device, Error> {
    let device = Device::new_cuda_with_stream(ordinal)?;
    let inner = cuda(&device)?;
    inner.cuda_stream().context().bind_to_thread().map_err(failed("using the device"))?;
    // SAFETY: a number is set for the context that was just made current.
    let limited = unsafe { cuCtxSetLimit(CUlimit::CU_LIMIT_STACK_SIZE, STACK_BYTES) };
    limited.result().map_err(failed("setting the size of stacks"))?;
    // SAFETY: tensors are used on the device's one compute stream; copies on other streams are ordered by events.
    unsafe { inner.disable_event_tracking() };
    Stream::of(&device)?.keep_freed_memory()?;
    Ok(device)
}

/// Free bytes and all bytes of the current GPU.
pub(super) fn memory_info() -> Result<(usize, usize), Error> {
    cudarc::driver::result::mem_get_info().map_err(failed("reading the device's memory"))
}

/// A stream of the driver.
#[derive(Clone, Debug)]
pub(crate) struct Stream(Arc<CudaStream>);

impl Stream {
    /// The stream on which the tensors of `device` are made, used and freed.
    pub(super) fn of(device: &Device) -> Result<Self, Error> {
        Ok(Self(cuda(device)?.cuda_stream()))
    }

    /// Another stream of the same GPU, which waits for nothing by itself.
    pub(super) fn beside(&self) -> Result<Self, Error> {
        self.0.context().new_stream().map(Self).map_err(failed("making a stream"))
    }

    /// Which one it is among all that are alive.
    pub(super) fn id(&self) -> (usize, usize) {
        (self.0.context().ordinal(), self.0.cu_stream().addr())
    }

    /// As the kernels' interface names it.
    pub(crate) fn raw(&self) -> *mut c_void {
        self.0.cu_stream().cast()
    }

    pub(super) fn capability(&self) -> Result<(i32, i32), Error> {
        self.0.context().compute_capability().map_err(failed("asking for the GPU's compute capability"))
    }

    pub(super) fn multiprocessors(&self) -> Result<u32, Error> {
        let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let count = self.0.context().attribute(attribute);
        count.map(i32::cast_unsigned).map_err(failed("asking for the number of multiprocessors"))
    }

    pub(super) fn uuid(&self) -> Result<[u8; 16], Error> {
        let uuid = self.0.context().uuid().map_err(failed("asking for the UUID of the GPU"))?;
        // C's `char` has a sign on some machines.
        Ok(uuid.bytes.map(|byte| byte as u8))
    }

    pub(super) fn name(&self) -> Result<String, Error> {
        self.0.context().name().map_err(failed("asking for the name of the GPU"))
    }

    /// Makes its GPU the one that the thread's calls are for.
    pub(super) fn bind(&self) -> Result<(), Error> {
        self.0.context().bind_to_thread().map_err(failed("using the GPU"))
    }

    pub(super) fn synchronize(&self) -> Result<(), Error> {
        self.0.synchronize().map_err(failed("waiting for the GPU"))
    }

    /// Begins to record what is asked of the stream by this thread instead of doing it.
    pub(super) fn begin_capture(&self) -> Result<(), Error> {
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.0.begin_capture(mode).map_err(failed("recording work"))
    }

    /// What was recorded since, ready to be repeated.
    pub(super) fn end_capture(&self) -> Result<Graph, Error> {
        let graph = self.0.end_capture(CUgraphInstantiate_flags(0)).map_err(failed("recording work"))?;
        graph.map(Graph).ok_or_else(|| argument("recording", "work", "none", "work on this queue"))
    }

    /// Marks what has been asked of the stream so far. Only `is_timed` events tell times.
    pub(super) fn record(&self, is_timed: bool) -> Result<Event, Error> {
        let flags = if is_timed { CUevent_flags::CU_EVENT_DEFAULT } else { CUevent_flags::CU_EVENT_DISABLE_TIMING };
        self.0.record_event(Some(flags)).map(Event).map_err(failed("recording an event"))
    }

    /// Lets what is asked from now on wait for an event, on the device.
    pub(super) fn wait(&self, event: &Event) -> Result<(), Error> {
        self.0.wait(&event.0).map_err(failed("waiting for an event"))
    }

    /// Copies bytes between any two places that the driver knows or, with a wait for the stream by the caller, the host's.
    ///
    /// # Safety
    /// Both ranges are valid until the copy is done, and nothing that is not ordered with it writes to them meanwhile, or
    /// reads the target.
    pub(super) unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), Error> {
        self.bind()?;
        // SAFETY: the caller's promise.
        unsafe { cuMemcpyAsync(to, from, bytes, self.0.cu_stream()) }.result().map_err(failed("copying"))
    }

    /// Bytes on the device, freed in the order of this stream.
    pub(super) fn allocate(&self, bytes: usize) -> Result<Bytes, Error> {
        // SAFETY: bytes, for which any bits are a value.
        unsafe { self.take::<u8>(bytes.max(1)) }.map(Bytes)
    }

    /// So many values on the device. Where the pool has no room for them in one piece it gives back what nobody uses, and they are asked
    /// for once more.
    ///
    /// # Safety
    /// Any bits are a value of `T`, or it is written before it is read.
    unsafe fn take<T: DeviceRepr>(&self, count: usize) -> Result<CudaSlice<T>, Error> {
        let is_full = |error: &DriverError| error.0 == cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY;
        // SAFETY: the caller's promise.
        let ask = || unsafe { self.0.alloc::<T>(count) };
        let taken = match ask() {
            Err(error) if is_full(&error) => {
                self.0.synchronize().map_err(failed("waiting for the device"))?;
                // SAFETY: the pool is the one of an open device.
                unsafe { cuMemPoolTrimTo(self.pool()?, 0) }.result().map_err(failed("giving device memory back"))?;
                ask()
            }
            taken => taken,
        };
        taken.map_err(|error| match self.memory_use() {
            Ok(MemoryUse { used, .. }) if is_full(&error) => {
                let free = memory_info().map_or(0, |(free, _)| free as u64);
                Error::Full { bytes: (count * size_of::<T>()) as u64, used, free }
            }
            _ => failed("allocating device memory")(error),
        })
    }

    /// Locks host memory, whose address is the same for the host and for every GPU.
    pub(super) fn lock_host(&self, bytes: usize) -> Result<Locked, Error> {
        self.bind()?;
        let mut memory = std::ptr::null_mut();
        let flags = CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: `memory` outlives the call; a size of 0 is not asked for.
        let done = unsafe { cuMemHostAlloc(&raw mut memory, bytes.max(1), flags) };
        done.result().map_err(failed("locking host memory"))?;
        Ok(Locked { address: memory as u64, context: self.0.context().clone() })
    }

    /// Locks the memory of a contiguous f32 tensor on the host.
    pub(super) fn lock_tensor(&self, tensor: Tensor) -> Result<LockedTensor, Error> {
        self.bind()?;
        let address = {
            let (storage, layout) = tensor.storage_and_layout();
            match (&*storage, layout.contiguous_offsets()) {
                (Storage::Cpu(CpuStorage::F32(values)), Some((start, end))) => values[start..end].as_ptr() as u64,
                _ => return Err(argument("locking", "tensor", tensor.dtype(), "contiguous f32 values on the host")),
            }
        };
        let bytes = tensor.elem_count() * size_of::<f32>();
        // SAFETY: the memory is that long and lives as long as the tensor, which is kept until it is unlocked.
        let done = unsafe { cuMemHostRegister_v2(address as *mut c_void, bytes.max(1), CU_MEMHOSTREGISTER_PORTABLE) };
        done.result().map_err(failed("locking host memory"))?;
        Ok(LockedTensor { address, context: self.0.context().clone(), _kept: tensor })
    }

    /// The pool that memory is taken from.
    fn pool(&self) -> Result<CUmemoryPool, Error> {
        let mut pool = std::ptr::null_mut();
        // SAFETY: the device handle comes from an open context, and `pool` outlives the call.
        let result = unsafe { cuDeviceGetMemPool(&raw mut pool, self.0.context().cu_device()) };
        result.result().map_err(failed("finding the device's memory pool"))?;
        Ok(pool)
    }

    /// From now on this process takes memory from a pool that does not grow beyond `bytes`.
    pub(super) fn limit_pool(&self, bytes: usize) -> Result<(), Error> {
        let device = self.0.context().cu_device();
        // SAFETY: numbers and null pointers, for which zeros are a value.
        let mut properties: CUmemPoolProps = unsafe { std::mem::zeroed() };
        properties.allocType = CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        properties.handleTypes = CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE;
        properties.location.type_ = CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
        properties.location.id = self.0.context().ordinal() as i32;
        properties.maxSize = bytes;
        let mut pool = std::ptr::null_mut();
        // SAFETY: `pool` and `properties` outlive the calls; the pool lives as long as the process.
        let made = unsafe { cuMemPoolCreate(&raw mut pool, &raw const properties) };
        made.result().map_err(failed("making a pool of limited memory"))?;
        // SAFETY: as above.
        let set = unsafe { cuDeviceSetMemPool(device, pool) };
        set.result().map_err(failed("limiting the device's memory"))?;
        self.keep_freed_memory()
    }

    /// What is freed stays with the pool.
    fn keep_freed_memory(&self) -> Result<(), Error> {
        let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        self.set_pool(attribute, u64::MAX, "keeping freed device memory")
    }

    fn pool_number(&self, attribute: CUmemPool_attribute) -> Result<u64, Error> {
        let mut value = 0u64;
        // SAFETY: the attributes asked for are 64-bit numbers, and `value` is one.
        let result = unsafe { cuMemPoolGetAttribute(self.pool()?, attribute, (&raw mut value).cast()) };
        result.result().map_err(failed("reading the memory pool's use"))?;
        Ok(value)
    }

    fn set_pool(&self, attribute: CUmemPool_attribute, mut value: u64, what: &'static str) -> Result<(), Error> {
        // SAFETY: the attributes that are set are 64-bit numbers, and `value` is one.
        let result = unsafe { cuMemPoolSetAttribute(self.pool()?, attribute, (&raw mut value).cast()) };
        result.result().map_err(failed(what))
    }

    pub(super) fn memory_use(&self) -> Result<MemoryUse, Error> {
        Ok(MemoryUse {
            used: self.pool_number(CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?,
            peak: self.pool_number(CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?,
            reserved: self.pool_number(CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?,
        })
    }

    pub(super) fn reset_peak(&self) -> Result<(), Error> {
        self.set_pool(CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH, 0, "resetting the memory peak")
    }
}

/// Recorded work.
pub(super) struct Graph(CudaGraph);

impl Graph {
    pub(super) fn launch(&self) -> Result<(), Error> {
        self.0.launch().map_err(failed("repeating recorded work"))
    }
}

/// A moment of a stream.
#[derive(Debug)]
pub(super) struct Event(CudaEvent);

impl Event {
    pub(super) fn is_done(&self) -> Result<bool, Error> {
        self.0.try_is_complete().map_err(failed("looking at an event"))
    }

    pub(super) fn synchronize(&self) -> Result<(), Error> {
        self.0.synchronize().map_err(failed("waiting for an event"))
    }

    /// From this event to a later one; both are timed, and the later one is done.
    pub(super) fn secs_until(&self, end: &Self) -> Result<f64, Error> {
        self.0.elapsed_ms(&end.0).map(|ms| f64::from(ms) / 1e3).map_err(failed("reading an event"))
    }
}

/// Bytes on the device.
#[derive(Debug)]
pub(super) struct Bytes(CudaSlice<u8>);

impl Bytes {
    pub(super) fn address(&self) -> u64 {
        self.0.device_ptr(self.0.stream()).0
    }
}

/// Page-locked host memory; its maker sees to it that nothing uses it any more when it is dropped.
#[derive(Debug)]
pub(super) struct Locked {
    address: u64,
    /// Keeps the context alive in which the memory was locked.
    context: Arc<CudaContext>,
}

impl Locked {
    pub(super) fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: the address came from `cuMemHostAlloc` and is freed once; nothing uses it any more.
            let _ = unsafe { cuMemFreeHost(self.address as *mut c_void) };
        }
    }
}

/// A tensor's memory on the host, page-locked for as long as this lives.
#[derive(Debug)]
pub(super) struct LockedTensor {
    address: u64,
    context: Arc<CudaContext>,
    _kept: Tensor,
}

impl LockedTensor {
    pub(super) fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for LockedTensor {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: it was registered once, and nothing uses it any more.
            let _ = unsafe { cuMemHostUnregister(self.address as *mut c_void) };
        }
    }
}

/// Where a tensor of a GPU begins.
pub(super) fn address(tensor: &Tensor) -> Result<u64, Error> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        return Err(argument("view", "tensor", tensor.device().location(), "a tensor on a GPU"));
    };
    let stream = storage.device.cuda_stream();
    let base = match &storage.slice {
        CudaStorageSlice::U8(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::U32(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::I64(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::BF16(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::F16(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::F32(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::F64(s) => s.device_ptr(&stream).0,
        _ => return Err(argument("view", "tensor", tensor.dtype(), "u8, u32, i64, f16, bf16, f32 or f64")),
    };
    Ok(base + (layout.start_offset() * tensor.dtype().size_in_bytes()) as u64)
}

/// A tensor whose values are not defined until a kernel writes them.
pub(super) fn empty(device: &Device, shape: Shape, dtype: DType) -> Result<Tensor, Error> {
    let (stream, device, count) = (Stream::of(device)?, cuda(device)?, shape.elem_count());
    macro_rules! storage {
        ($type:ty) => {{
            // SAFETY: every type here is plain numbers, for which any bits are a value; kernels write before they read.
            let slice = unsafe { stream.take::<$type>(count)? };
            CudaStorage::wrap_cuda_slice(slice, device.clone())
        }};
    }
    let storage = match dtype {
        DType::U8 => storage!(u8),
        DType::U32 => storage!(u32),
        DType::I64 => storage!(i64),
        DType::BF16 => storage!(half::bf16),
        DType::F16 => storage!(half::f16),
        DType::F64 => storage!(f64),
        _ => storage!(f32),
    };
    Ok(Tensor::from((Storage::Cuda(storage), shape)))
}
