//! What stands in the place of the products in a program that was built without GPUs.

use candle_core::Device;

use super::products::{Accumulate, Side, Taken, Tried};
use crate::device::{Error, Matrix, Pointer, raw_stream};

/// The reason why there is nothing to multiply on.
fn no_gpu<T>(device: &Device, never: T) -> Result<T, Error> {
    raw_stream(device).map(|_| never)
}

/// There is no GPU to multiply on.
///
/// # Errors
/// Always.
pub fn gemm(
    device: &Device,
    _d: Matrix<'_>,
    _a: (Matrix<'_>, Side),
    _b: (Matrix<'_>, Side),
    _alpha: f32,
    _accumulate: Accumulate<'_>,
    _bias: Option<Pointer<'_>>,
) -> Result<(), Error> {
    no_gpu(device, ())
}

/// There is no GPU.
///
/// # Errors
/// Always.
pub fn is_deterministic(device: &Device) -> Result<bool, Error> {
    no_gpu(device, true)
}

/// There is no GPU.
///
/// # Errors
/// Always.
pub fn set_deterministic(device: &Device, _is_deterministic: bool) -> Result<(), Error> {
    no_gpu(device, ())
}

/// There are no products to choose for.
///
/// # Errors
/// Always.
pub fn start_choices(device: &Device, _is_noting: bool) -> Result<(), Error> {
    no_gpu(device, ())
}

/// There are no products to choose for.
///
/// # Errors
/// Always.
pub fn begin_step(device: &Device, _step: u64) -> Result<(), Error> {
    no_gpu(device, ())
}

/// There are no products that wait.
///
/// # Errors
/// Always.
pub fn num_noted(device: &Device) -> Result<usize, Error> {
    no_gpu(device, 0)
}

/// There are no products to try.
///
/// # Errors
/// Always.
pub fn try_noted(device: &Device, _step: u64, _should_stop: &dyn Fn() -> bool) -> Result<Tried, Error> {
    no_gpu(device, Tried::default())
}

/// There are no choices.
///
/// # Errors
/// Always.
pub fn choices_text(device: &Device) -> Result<Option<String>, Error> {
    no_gpu(device, None)
}

/// There is nothing to take choices for.
///
/// # Errors
/// Always.
pub fn take_choices(device: &Device, _text: &[u8], _are_valid_at_once: bool) -> Result<Taken, Error> {
    no_gpu(device, Taken::Choices(0))
}

/// There is nothing that counts for a card.
///
/// # Errors
/// Always.
pub fn origin_name(device: &Device) -> Result<String, Error> {
    no_gpu(device, String::new())
}
