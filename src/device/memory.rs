//! Views of device tensors that launchers take, and small copies between host and device.

use std::ops::Range;

use candle_core::cuda_backend::{CudaStorageSlice, cudarc::driver::DevicePtr};
use candle_core::{CudaDevice, CudaStorage, DType, Device, Shape, Storage, Tensor};

use super::pinned::Pinned;
use super::{Error, argument, failed};

/// A matrix on the device: contiguous columns, rows `stride` elements apart.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    pub(crate) address: u64,
    pub(crate) dtype: DType,
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    /// Elements from one row to the next.
    pub stride: usize,
}

impl Pointer {
    /// Elements from `first` on, each of `element_bytes`.
    #[must_use]
    pub fn from_element(self, first: usize, element_bytes: usize) -> Self {
        self.elements(first..self.len, element_bytes)
    }

    /// The elements `range`, each of `element_bytes`.
    #[must_use]
    pub fn elements(self, range: Range<usize>, element_bytes: usize) -> Self {
        debug_assert!(range.start <= range.end && range.end <= self.len, "elements {range:?} of {}", self.len);
        Self { address: self.address + (range.start * element_bytes) as u64, len: range.len() }
    }
}

impl Matrix {
    /// Columns `first .. first + cols` of every row.
    #[must_use]
    pub fn columns(self, first: usize, cols: usize) -> Self {
        debug_assert!(first + cols <= self.cols, "columns {first}+{cols} of {}", self.cols);
        Self { address: self.address + (first * self.dtype.size_in_bytes()) as u64, cols, ..self }
    }

    /// Rows `first .. first + rows`.
    #[must_use]
    pub fn rows(self, first: usize, rows: usize) -> Self {
        debug_assert!(first + rows <= self.rows, "rows {first}+{rows} of {}", self.rows);
        Self { address: self.address + (first * self.stride * self.dtype.size_in_bytes()) as u64, rows, ..self }
    }

    /// The type of the values.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Whether `next` continues each row of this matrix, so that both are columns of one.
    pub fn is_followed_by(&self, next: &Self) -> bool {
        let end = self.address + (self.cols * self.dtype.size_in_bytes()) as u64;
        self.dtype == next.dtype && self.rows == next.rows && self.stride == next.stride && end == next.address
    }

    /// This matrix and `cols` more columns of the same rows.
    #[must_use]
    pub fn widened(self, cols: usize) -> Self {
        Self { cols: self.cols + cols, ..self }
    }
}

/// A flat array on the device.
#[derive(Clone, Copy, Debug)]
pub struct Pointer {
    pub(crate) address: u64,
    /// Number of elements.
    pub len: usize,
}

/// A float tensor as a matrix: a vector is one row, higher ranks are rows of their last dimension.
///
/// # Errors
/// If it is not a float tensor on a GPU with contiguous columns and evenly spaced rows.
pub fn matrix(tensor: &Tensor) -> Result<Matrix, Error> {
    let refused = || argument("view", "tensor", (tensor.dtype(), tensor.layout()), "float rows on a GPU");
    if !matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::BF16) {
        return Err(refused());
    }
    let (rows, cols, stride) = match (tensor.dims(), tensor.stride()) {
        ([], _) => (1, 1, 1),
        (&[n], &[step]) if step == 1 || n <= 1 => (1, n, n),
        (&[rows, cols], &[stride, step]) if step == 1 || cols <= 1 => (rows, cols, stride),
        (dims, _) if tensor.is_contiguous() => {
            let cols = dims.last().copied().unwrap_or(1);
            (tensor.elem_count() / cols.max(1), cols, cols)
        }
        _ => return Err(refused()),
    };
    let stride = if rows <= 1 { stride.max(cols) } else { stride };
    Ok(Matrix { address: address(tensor)?, dtype: tensor.dtype(), rows, cols, stride })
}

/// A contiguous tensor of any type as a flat array.
///
/// # Errors
/// If it is not contiguous or not on a GPU.
pub fn array(tensor: &Tensor) -> Result<Pointer, Error> {
    if !tensor.is_contiguous() {
        return Err(argument("view", "tensor", tensor.layout(), "contiguous values"));
    }
    Ok(Pointer { address: address(tensor)?, len: tensor.elem_count() })
}

fn address(tensor: &Tensor) -> Result<u64, Error> {
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

/// The CUDA device of `device`.
pub(crate) fn cuda(device: &Device) -> Result<&CudaDevice, Error> {
    match device {
        Device::Cuda(device) => Ok(device),
        other => Err(argument("device", "device", other.location(), "a GPU")),
    }
}

/// A tensor whose values are not defined until a kernel writes them.
///
/// # Errors
/// If `device` is no GPU or memory runs out.
pub fn empty(device: &Device, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor, Error> {
    let (device, shape) = (cuda(device)?, shape.into());
    let count = shape.elem_count();
    macro_rules! storage {
        ($type:ty) => {{
            // SAFETY: every type here is plain numbers, for which any bits are a value; kernels write before they read.
            let slice = unsafe { device.alloc::<$type>(count)? };
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

macro_rules! upload {
    ($name:ident, $type:ty, $what:literal) => {
        #[doc = concat!("Copies ", $what, " to the device.")]
        ///
        /// # Errors
        /// If `device` is no GPU or memory runs out.
        pub fn $name(device: &Device, values: &[$type]) -> Result<Tensor, Error> {
            let cuda = cuda(device)?;
            if values.is_empty() {
                return Ok(Tensor::zeros(0, <$type as candle_core::WithDType>::DTYPE, device)?);
            }
            let slice = cuda.clone_htod(values)?;
            let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, cuda.clone()));
            Ok(Tensor::from((storage, Shape::from(values.len()))))
        }
    };
}

upload!(upload_f32, f32, "floats");
upload!(upload_u32, u32, "numbers");
upload!(upload_u8, u8, "bytes");

/// Copies signed numbers to the device, kept under their bits.
///
/// # Errors
/// If `device` is no GPU or memory runs out.
pub fn upload_i32(device: &Device, values: &[i32]) -> Result<Tensor, Error> {
    let bits: Vec<u32> = values.iter().map(|v| v.cast_unsigned()).collect();
    upload_u32(device, &bits)
}

/// Copies 64-bit keys to the device, kept under their bits.
///
/// # Errors
/// If `device` is no GPU or memory runs out.
pub fn upload_u64(device: &Device, values: &[u64]) -> Result<Tensor, Error> {
    let cuda = cuda(device)?;
    let bits: Vec<i64> = values.iter().map(|v| v.cast_signed()).collect();
    let slice = cuda.clone_htod(&bits)?;
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, cuda.clone()));
    Ok(Tensor::from((storage, Shape::from(values.len()))))
}

macro_rules! download {
    ($name:ident, $type:ty, $what:literal) => {
        #[doc = concat!($what, " of a contiguous tensor on the host; waits for the device.")]
        ///
        /// # Errors
        /// If the tensor is of another type, or the device failed.
        pub fn $name(tensor: &Tensor) -> Result<Vec<$type>, Error> {
            Ok(tensor.flatten_all()?.to_vec1()?)
        }
    };
}

download!(download_u8, u8, "The bytes");
download!(download_u32, u32, "The numbers");
download!(download_f64, f64, "The doubles");

/// Replaces the values of a contiguous f32 tensor; waits until they are copied.
///
/// # Errors
/// If the tensor is of another type or length, or the device failed.
pub fn overwrite(tensor: &Tensor, values: &[f32]) -> Result<(), Error> {
    let target = array(tensor)?;
    if tensor.dtype() != DType::F32 || target.len != values.len() {
        return Err(argument("overwrite", "values", (values.len(), tensor.dtype()), (target.len, DType::F32)));
    }
    let stream = cuda(tensor.device())?.cuda_stream();
    let copied = failed("copying to the device");
    // SAFETY: the address and length are those of a live tensor, and the host's values outlive the copy, which is waited for.
    unsafe { cudarc::driver::result::memcpy_htod_async(target.address, values, stream.cu_stream()) }.map_err(copied)?;
    stream.synchronize().map_err(copied)
}

/// Replaces the values of a contiguous tensor by the first bytes of page-locked memory, which must stay as they are until
/// the device has been waited for.
///
/// # Errors
/// If there are too few bytes or the device failed.
pub fn overwrite_from_pinned(tensor: &Tensor, from: &Pinned) -> Result<(), Error> {
    let target = array(tensor)?;
    let bytes = target.len * tensor.dtype().size_in_bytes();
    if from.len() < bytes {
        return Err(argument("overwrite_from_pinned", "from", from.len(), format!("at least {bytes} bytes")));
    }
    let stream = cuda(tensor.device())?.cuda_stream();
    // SAFETY: the target is a live tensor of that size; the source is page-locked memory that long, which the caller leaves
    // alone until the copy is done.
    unsafe { cudarc::driver::result::memcpy_htod_async(target.address, from.bytes(bytes), stream.cu_stream()) }
        .map_err(failed("copying to the device"))
}

/// The values of a tensor as floats on the host; waits for the device.
///
/// # Errors
/// If the device failed.
pub fn download(tensor: &Tensor) -> Result<Vec<f32>, Error> {
    let tensor = match tensor.dtype() {
        DType::F32 => tensor.contiguous()?.flatten_all()?,
        _ => tensor.contiguous()?.flatten_all()?.to_device(&Device::Cpu)?.to_dtype(DType::F32)?,
    };
    Ok(tensor.to_vec1()?)
}
