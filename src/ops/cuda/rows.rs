//! Picking rows: the embedding, the rows that the head looks at.

use candle_core::{DType, Device, Tensor};

use crate::device::timers::{Phase, span};
use crate::device::{Matrix, array, empty, matrix, upload_u32};
use crate::kernels::cuda::{fill, gather_rows, group_rows, sum_rows};
use crate::ops::{Error, shape_error};
use crate::quant::Weight;

pub(crate) fn gather(x: &Tensor, rows: &[u32]) -> Result<Tensor, Error> {
    let device = x.device();
    let _span = span(device, Phase::Pointwise)?;
    let from = matrix(x)?;
    let out = empty(device, (rows.len(), from.cols), x.dtype())?;
    let rows = upload_u32(device, rows)?;
    gather_rows(device, matrix(&out)?, from, array(&rows)?)?;
    Ok(out)
}

pub(crate) fn scatter_add(dy: &Tensor, rows: &[u32], num_rows: usize) -> Result<Tensor, Error> {
    let device = dy.device();
    let _span = span(device, Phase::Pointwise)?;
    let from = matrix(dy)?;
    let out = empty(device, (num_rows, from.cols), dy.dtype())?;
    let to = matrix(&out)?;
    fill(device, to, 0.0)?;
    sum(device, to, dy, rows, false)?;
    Ok(out)
}

/// The embeddings of `tokens`, from a dense table on the device or in pinned host memory.
pub(crate) fn embed(tokens: &[u32], table: &Weight, device: &Device, dtype: DType) -> Result<Tensor, Error> {
    let _span = span(device, Phase::Pointwise)?;
    let rows = match table {
        Weight::Dense(table) if table.device().is_cuda() => matrix(table)?,
        Weight::Device(matrix) => matrix.pinned()?.ok_or_else(|| Error::Unsupported {
            op: "embedding",
            what: format!("a table stored as {}", matrix.kind_name()),
            instead: "keep the table dense, or in host memory",
        })?,
        _ => return Err(shape_error("embedding", "table", table.kind_name(), "a table that the GPU can read")),
    };
    let out = empty(device, (tokens.len(), rows.cols), dtype)?;
    let tokens = upload_u32(device, tokens)?;
    gather_rows(device, matrix(&out)?, rows, array(&tokens)?)?;
    Ok(out)
}

pub(crate) fn embed_backward(dy: &Tensor, tokens: &[u32], table_grad: &Tensor) -> Result<(), Error> {
    let device = dy.device();
    let _span = span(device, Phase::Pointwise)?;
    sum(device, matrix(table_grad)?, dy, tokens, true)
}

fn sum(device: &Device, to: Matrix, dy: &Tensor, rows: &[u32], is_added: bool) -> Result<(), Error> {
    let groups = group_rows(rows);
    let targets = upload_u32(device, &groups.targets)?;
    let offsets = upload_u32(device, &groups.offsets)?;
    let sources = upload_u32(device, &groups.sources)?;
    let (targets, offsets, sources) = (array(&targets)?, array(&offsets)?, array(&sources)?);
    Ok(sum_rows(device, to, matrix(dy)?, targets, offsets, sources, is_added)?)
}
