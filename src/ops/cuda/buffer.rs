//! Flat buffers on the device.

use candle_core::{DType, Tensor};

use super::row;
use crate::device::{array, download_u32, matrix, overwrite};
use crate::kernels::cuda::{axpby, count_non_finite, fill as fill_matrix};
use crate::ops::Error;

pub(crate) fn is_finite(tensor: &Tensor) -> Result<bool, Error> {
    let device = tensor.device();
    let count = Tensor::zeros(1, DType::U32, device)?;
    count_non_finite(device, array(&count)?, matrix(tensor)?)?;
    Ok(download_u32(&count)?.iter().all(|&n| n == 0))
}

pub(crate) fn fill(buffer: &Tensor, value: f32) -> Result<(), Error> {
    Ok(fill_matrix(buffer.device(), row(buffer)?, value)?)
}

pub(crate) fn write(buffer: &Tensor, from: &[f32]) -> Result<(), Error> {
    Ok(overwrite(buffer, from)?)
}

/// `buffer = keep * buffer + take * other`.
pub(crate) fn combine(buffer: &Tensor, other: &Tensor, (keep, take): (f32, f32)) -> Result<(), Error> {
    Ok(axpby(buffer.device(), row(buffer)?, take, row(other)?, keep)?)
}
