//! Rotary position embedding in place.

use candle_core::{DType, Device, Tensor};

use crate::device::timers::{Phase, span};
use crate::device::{array, empty, matrix, upload_f32, upload_u32};
use crate::kernels::cuda::{rope, rope_table};
use crate::ops::{Error, shape_error};

/// Cosines and sines of positions: f32 `[N, d / 2, 2]`.
pub(crate) fn table(device: &Device, positions: &[u32], frequencies: &[f32], scale: f32) -> Result<Tensor, Error> {
    let table = empty(device, (positions.len(), frequencies.len(), 2), DType::F32)?;
    let (positions, frequencies) = (upload_u32(device, positions)?, upload_f32(device, frequencies)?);
    rope_table(device, array(&table)?, array(&positions)?, array(&frequencies)?, scale)?;
    Ok(table)
}

/// Turns `x` where it is.
pub(crate) fn turn(tensor: Tensor, table: &Tensor, d: usize, is_backward: bool) -> Result<Tensor, Error> {
    let device = tensor.device();
    let _span = span(device, Phase::Pointwise)?;
    let x = matrix(&tensor)?;
    if x.cols % d != 0 || table.dims()[0] != x.rows {
        return Err(shape_error("rope", "x", [x.rows, x.cols], format!("[{}, a multiple of {d}]", table.dims()[0])));
    }
    rope(device, x, array(table)?, x.cols / d, d, is_backward)?;
    Ok(tensor)
}
