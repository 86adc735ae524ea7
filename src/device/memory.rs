//! Tensors of a GPU: making them, and small copies between host and device.

use std::sync::Arc;

use candle_core::{DType, Device, Shape, Tensor, WithDType};

use super::{Buffer, Error, Queue, Ticket, argument, gpu};

/// A tensor whose values are not defined until a kernel writes them.
///
/// # Errors
/// If `device` is no GPU or memory runs out.
pub fn empty(device: &Device, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor, Error> {
    gpu::empty(device, shape.into(), dtype)
}

fn upload<T: WithDType>(device: &Device, values: &[T]) -> Result<Tensor, Error> {
    if !device.is_cuda() {
        return Err(argument("upload", "device", device.location(), "a GPU"));
    }
    if values.is_empty() {
        return Ok(Tensor::zeros(0, T::DTYPE, device)?);
    }
    Ok(Tensor::from_slice(values, values.len(), device)?)
}

macro_rules! upload {
    ($name:ident, $type:ty, $what:literal) => {
        #[doc = concat!("Copies ", $what, " to the device.")]
        ///
        /// # Errors
        /// If `device` is no GPU or memory runs out.
        pub fn $name(device: &Device, values: &[$type]) -> Result<Tensor, Error> {
            upload(device, values)
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
    upload(device, &bits)
}

/// Copies 64-bit keys to the device, kept under their bits.
///
/// # Errors
/// If `device` is no GPU or memory runs out.
pub fn upload_u64(device: &Device, values: &[u64]) -> Result<Tensor, Error> {
    let bits: Vec<i64> = values.iter().map(|v| v.cast_signed()).collect();
    upload(device, &bits)
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
    if tensor.dtype() != DType::F32 || tensor.elem_count() != values.len() {
        let expected = (tensor.elem_count(), DType::F32);
        return Err(argument("overwrite", "values", (values.len(), tensor.dtype()), expected));
    }
    let queue = Queue::of(tensor.device())?;
    let mut from = Buffer::host(size_of_val(values));
    from.write(0, values)?;
    let (from, to) = (Arc::new(from), Arc::new(Buffer::of_tensor(tensor.clone())?));
    queue.copy(&from.whole(), &to.whole(), &Ticket::done())?;
    Ok(())
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
