//! In-place work on flat f32 buffers: what the parameter store and the optimizer do to values, gradients and moments.
//!
//! Tensors that share a buffer's storage see every change. Buffers may lie on a GPU.

use candle_core::Tensor;

use super::view::{change, view};
use super::{Error, shape_error};
use crate::kernels::cpu::vector;

/// The values of a float buffer, copied to the host as f32. On a GPU this waits.
///
/// # Errors
/// If it is not contiguous f32 (on the CPU) or the device failed.
pub fn to_vec(buffer: &Tensor) -> Result<Vec<f32>, Error> {
    if buffer.device().is_cuda() {
        return Ok(crate::device::download(buffer)?);
    }
    Ok(view("read a buffer", buffer)?.to_vec())
}

/// Runs `read` on the values of a contiguous f32 buffer in host memory.
///
/// # Errors
/// If it is not contiguous f32 on the CPU.
pub fn read<T>(buffer: &Tensor, read: impl FnOnce(&[f32]) -> T) -> Result<T, Error> {
    Ok(read(&view("read a buffer", buffer)?))
}

/// Whether all values are finite. On a GPU this waits.
///
/// # Errors
/// If it is no float tensor with contiguous columns.
pub fn is_finite(tensor: &Tensor) -> Result<bool, Error> {
    if tensor.device().is_cuda() {
        return super::cuda::buffer::is_finite(tensor);
    }
    read(tensor, |values| values.iter().all(|v| v.is_finite()))
}

/// Sets every value.
///
/// # Errors
/// If it is not contiguous f32.
pub fn fill(buffer: &Tensor, value: f32) -> Result<(), Error> {
    if buffer.device().is_cuda() {
        return super::cuda::buffer::fill(buffer, value);
    }
    change("fill", buffer, |values| values.fill(value))
}

/// Replaces all values.
///
/// # Errors
/// If the lengths differ.
pub fn write(buffer: &Tensor, from: &[f32]) -> Result<(), Error> {
    if buffer.elem_count() != from.len() {
        return Err(shape_error("write a buffer", "from", from.len(), buffer.elem_count()));
    }
    if buffer.device().is_cuda() {
        return super::cuda::buffer::write(buffer, from);
    }
    change("write a buffer", buffer, |values| values.copy_from_slice(from))
}

/// `buffer += other`.
///
/// # Errors
/// If the lengths differ.
pub fn add(buffer: &Tensor, other: &Tensor) -> Result<(), Error> {
    combine("add to a buffer", buffer, other, (1.0, 1.0))
}

/// `to = from`.
///
/// # Errors
/// If the lengths differ.
pub fn copy(from: &Tensor, to: &Tensor) -> Result<(), Error> {
    combine("copy a buffer", to, from, (0.0, 1.0))
}

/// `buffer = alpha * other + (1 - alpha) * buffer`.
///
/// # Errors
/// If the lengths differ.
pub fn mix(buffer: &Tensor, other: &Tensor, alpha: f32) -> Result<(), Error> {
    combine("mix", buffer, other, (1.0 - alpha, alpha))
}

/// `buffer = keep * buffer + take * other`; with `keep` 0 what was there is not read.
fn combine(op: &'static str, buffer: &Tensor, other: &Tensor, (keep, take): (f32, f32)) -> Result<(), Error> {
    if buffer.elem_count() != other.elem_count() {
        return Err(shape_error(op, "other", other.elem_count(), buffer.elem_count()));
    }
    if buffer.device().is_cuda() {
        return super::cuda::buffer::combine(buffer, other, (keep, take));
    }
    let other = view(op, other)?;
    change(op, buffer, |values| match (keep, take) {
        (0.0, 1.0) => values.copy_from_slice(&other),
        (1.0, 1.0) => vector::add_scaled(values, 1.0, &other),
        _ => values.iter_mut().zip(other.iter()).for_each(|(value, &other)| *value = take * other + keep * *value),
    })
}

/// Runs `change` on the values of a contiguous f32 buffer in host memory, which it may replace.
///
/// # Errors
/// If it is not contiguous f32 on the CPU.
pub fn with_values<T>(buffer: &Tensor, run: impl FnOnce(&mut [f32]) -> T) -> Result<T, Error> {
    let (run, result) = (std::cell::Cell::new(Some(run)), std::cell::Cell::new(None));
    change("change a buffer", buffer, |values| result.set(run.take().map(|run| run(values))))?;
    Ok(result.into_inner().unwrap_or_else(|| unreachable!("a change that is made has run")))
}

/// Runs `update` on values and gradients of one length in host memory, of which it may change the first.
///
/// # Errors
/// If the lengths differ.
pub fn update(values: &Tensor, grads: &Tensor, update: impl FnMut(&mut [f32], &[f32])) -> Result<(), Error> {
    if grads.elem_count() != values.elem_count() {
        return Err(shape_error("optimizer update", "grads", grads.elem_count(), values.elem_count()));
    }
    let grads = view("optimizer update", grads)?;
    let update = std::sync::Mutex::new(update);
    change("optimizer update", values, |values| {
        let mut update = update.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        update(values, &grads);
    })
}
