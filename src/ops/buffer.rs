//! In-place work on flat f32 buffers: what the parameter store and the optimizer do to values, gradients and moments.
//!
//! Tensors that share a buffer's storage see every change.

use candle_core::Tensor;

use super::view::{change, view};
use super::{Error, shape_error};

/// The values of a contiguous f32 buffer, copied to the host.
///
/// # Errors
/// If it is not contiguous f32.
pub fn to_vec(buffer: &Tensor) -> Result<Vec<f32>, Error> {
    Ok(view("read a buffer", buffer)?.to_vec())
}

/// Runs `read` on the values of a contiguous f32 buffer.
///
/// # Errors
/// If it is not contiguous f32.
pub fn read<T>(buffer: &Tensor, read: impl FnOnce(&[f32]) -> T) -> Result<T, Error> {
    Ok(read(&view("read a buffer", buffer)?))
}

/// Sets every value.
///
/// # Errors
/// If it is not contiguous f32.
pub fn fill(buffer: &Tensor, value: f32) -> Result<(), Error> {
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
    change("write a buffer", buffer, |values| values.copy_from_slice(from))
}

/// Exchanges the values of two buffers.
///
/// # Errors
/// If the lengths differ.
pub fn swap(left: &Tensor, right: &Tensor) -> Result<(), Error> {
    let kept = to_vec(left)?;
    write(left, &to_vec(right)?)?;
    write(right, &kept)
}

/// `buffer = alpha * other + (1 - alpha) * buffer`.
///
/// # Errors
/// If the lengths differ.
pub fn mix(buffer: &Tensor, other: &Tensor, alpha: f32) -> Result<(), Error> {
    let other = view("mix", other)?;
    if buffer.elem_count() != other.len() {
        return Err(shape_error("mix", "other", other.len(), buffer.elem_count()));
    }
    change("mix", buffer, |values| {
        for (value, &other) in values.iter_mut().zip(other.iter()) {
            *value = alpha * other + (1.0 - alpha) * *value;
        }
    })
}

/// Runs `update` on four buffers of one length, of which it may change all but the second: an optimizer's values,
/// gradients, first and second moments.
///
/// # Errors
/// If the lengths differ.
///
/// # Panics
/// If `update` panics.
pub fn update(
    values: &Tensor,
    grads: &Tensor,
    first: &mut [f32],
    second: &mut [f32],
    update: impl Fn(&mut [f32], &[f32], &mut [f32], &mut [f32]),
) -> Result<(), Error> {
    let length = values.elem_count();
    if grads.elem_count() != length || first.len() != length || second.len() != length {
        return Err(shape_error("optimizer update", "grads", [grads.elem_count(), first.len(), second.len()], length));
    }
    let grads = view("optimizer update", grads)?;
    let moments = std::sync::Mutex::new((first, second));
    change("optimizer update", values, |values| {
        let mut moments = moments.lock().expect("only this closure locks it");
        let (first, second) = &mut *moments;
        update(values, &grads, first, second);
    })
}
