//! Flat buffers on the device.

use candle_core::{DType, Tensor};

use super::row;
use crate::device::{array, download_u32, empty, matrix, overwrite};
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

pub(crate) fn swap(left: &Tensor, right: &Tensor) -> Result<(), Error> {
    let device = left.device();
    let kept = empty(device, left.elem_count(), DType::F32)?;
    let (kept_row, left, right) = (row(&kept)?, row(left)?, row(right)?);
    axpby(device, kept_row, 1.0, left, 0.0)?;
    axpby(device, left, 1.0, right, 0.0)?;
    Ok(axpby(device, right, 1.0, kept_row, 0.0)?)
}

pub(crate) fn mix(buffer: &Tensor, other: &Tensor, alpha: f32) -> Result<(), Error> {
    Ok(axpby(buffer.device(), row(buffer)?, alpha, row(other)?, 1.0 - alpha)?)
}
