//! Log-probabilities and entropies, a strip of the vocabulary at a time: the strip's weights are unpacked once, its logits
//! (f32) of all rows are made, used and dropped.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use crate::device::timers::{Phase, span};
use crate::device::{Matrix, Pointer, array, download, download_u8, empty, matrix, upload_f32, upload_u32};
use crate::kernels::cuda::{
    Accumulate, HeadState, Side, axpby, fill, gemm, head_backward_chunk, head_finish, head_forward_chunk, head_start,
};
use crate::ops::Error;
use crate::ops::head::Output;
use crate::quant::Weight;

/// Bytes of a strip's logits and their gradients.
const STRIP_BYTES: usize = 192 << 20;

/// Calls `work(first column, weights [width, D], room for [R, width] f32 logits)` for each strip.
fn for_each_strip(
    device: &Device,
    weight: &Weight,
    rows: usize,
    dtype: DType,
    mut work: impl FnMut(usize, Matrix, Matrix) -> Result<(), Error>,
) -> Result<(), Error> {
    let vocabulary = weight.rows();
    let width = (STRIP_BYTES / (6 * rows.max(1))).next_multiple_of(256).clamp(256, 16_384).min(vocabulary);
    let logits = empty(device, rows * width, DType::F32)?;
    for first in (0..vocabulary).step_by(width) {
        let width = width.min(vocabulary - first);
        let logits = logits.narrow(0, 0, rows * width)?.reshape((rows, width))?;
        let strip = strip(device, weight, first, width, dtype)?;
        work(first, matrix(&strip)?, matrix(&logits)?)?;
    }
    Ok(())
}

/// Rows of the head in the type of the activations.
fn strip(device: &Device, weight: &Weight, first: usize, width: usize, dtype: DType) -> Result<Tensor, Error> {
    if let Weight::Dense(table) = weight
        && table.dtype() == dtype
        && table.device().is_cuda()
    {
        return Ok(table.narrow(0, first, width)?);
    }
    let out = empty(device, (width, weight.cols()), dtype)?;
    weight.unpack_into(device, matrix(&out)?, first)?;
    Ok(out)
}

pub(crate) fn forward(hidden: &Tensor, weight: &Weight, targets: &[u32], temperature: f64) -> Result<Output, Error> {
    let device = hidden.device();
    let rows = targets.len();
    if rows == 0 {
        return Ok(Output::default());
    }
    let span = span(device, Phase::Head)?;
    let buffer = empty(device, HeadState::buffer_len(rows), DType::F64)?;
    let state = HeadState::new(array(&buffer)?, rows)?;
    head_start(device, state)?;
    let targets = upload_u32(device, targets)?;
    let x = matrix(hidden)?;
    for_each_strip(device, weight, rows, hidden.dtype(), |first, strip, logits| {
        let alpha = temperature.recip() as f32;
        gemm(device, logits, (x, Side::Plain), (strip, Side::Transposed), alpha, Accumulate::No, None)?;
        Ok(head_forward_chunk(device, state, logits, first, array(&targets)?)?)
    })?;
    let floats = empty(device, (3, rows), DType::F32)?;
    let flags = empty(device, rows, DType::U8)?;
    let [logprobs, entropies, log_sums] = [0, 1, 2].map(|i| floats.narrow(0, i, 1));
    head_finish(device, state, array(&logprobs?)?, array(&entropies?)?, array(&log_sums?)?, array(&flags)?)?;
    drop(span);
    read(&floats, &flags, rows)
}

pub(crate) fn backward(
    (d_logprobs, d_entropies): (&[f32], &[f32]),
    hidden: &Tensor,
    weight: &Weight,
    weight_grad: Option<&Tensor>,
    targets: &[u32],
    temperature: f64,
    output: &Output,
) -> Result<Tensor, Error> {
    let device = hidden.device();
    let (rows, dtype) = (targets.len(), hidden.dtype());
    let _span = span(device, Phase::Head)?;
    let x = matrix(hidden)?;
    let out = empty(device, (rows, x.cols), dtype)?;
    if rows == 0 {
        return Ok(out);
    }
    let targets = upload_u32(device, targets)?;
    let (log_sums, entropies) = (upload_f32(device, &output.log_sums)?, upload_f32(device, &output.entropies)?);
    let d_logprobs = upload_f32(device, d_logprobs)?;
    let d_entropies = (!d_entropies.is_empty()).then(|| upload_f32(device, d_entropies)).transpose()?;
    let d_entropies = d_entropies.as_ref().map(array).transpose()?;
    let sums = empty(device, (rows, x.cols), DType::F32)?;
    let d_hidden = matrix(&sums)?;
    fill(device, d_hidden, 0.0)?;
    let scale = temperature.recip() as f32;
    for_each_strip(device, weight, rows, dtype, |first, strip, logits| {
        gemm(device, logits, (x, Side::Plain), (strip, Side::Transposed), scale, Accumulate::No, None)?;
        let d_logits = if dtype == DType::F32 { None } else { Some(empty(device, (rows, logits.cols), dtype)?) };
        let d_logits_matrix = d_logits.as_ref().map_or(Ok(logits), matrix)?;
        let saved = (array(&log_sums)?, array(&entropies)?);
        head_backward_chunk(
            device,
            d_logits_matrix,
            logits,
            first,
            array(&targets)?,
            saved.0,
            saved.1,
            array(&d_logprobs)?,
            d_entropies,
            scale,
        )?;
        let d_logits = (d_logits_matrix, Side::Plain);
        gemm(device, d_hidden, d_logits, (strip, Side::Plain), 1.0, Accumulate::Into, None)?;
        if let Some(grad) = weight_grad {
            let grad = matrix(grad)?.rows(first, logits.cols);
            let d_logits = (d_logits_matrix, Side::Transposed);
            gemm(device, grad, d_logits, (x, Side::Plain), 1.0, Accumulate::Into, None)?;
        }
        Ok(())
    })?;
    axpby(device, matrix(&out)?, 1.0, d_hidden, 0.0)?;
    Ok(out)
}

/// Rows whose logits of the whole vocabulary are held at a time.
fn rows_at_a_time(rows: usize) -> usize {
    (rows / 8).next_multiple_of(128).clamp(256, 1024)
}

/// Output and gradient from one making of the logits, some rows at a time.
pub(crate) fn forward_backward(
    (d_logprobs, d_entropies): (&[f32], &[f32]),
    hidden: &Tensor,
    table: &Tensor,
    targets: &[u32],
    temperature: f64,
) -> Result<(Output, Tensor), Error> {
    let device = hidden.device();
    let (rows, dtype) = (targets.len(), hidden.dtype());
    let span = span(device, Phase::Head)?;
    let (x, table) = (matrix(hidden)?, matrix(table)?);
    let d_hidden = empty(device, (rows, x.cols), dtype)?;
    if rows == 0 {
        return Ok((Output::default(), d_hidden));
    }
    let height = rows_at_a_time(rows).min(rows);
    let (targets, d_logprobs) = (upload_u32(device, targets)?, upload_f32(device, d_logprobs)?);
    let d_entropies = (!d_entropies.is_empty()).then(|| upload_f32(device, d_entropies)).transpose()?;
    let floats = empty(device, (3, rows), DType::F32)?;
    let flags = empty(device, rows, DType::U8)?;
    let buffer = empty(device, HeadState::buffer_len(height), DType::F64)?;
    let logits = empty(device, (height, table.rows), DType::F32)?;
    let d_logits = if dtype == DType::F32 { logits.clone() } else { empty(device, (height, table.rows), dtype)? };
    let scale = temperature.recip() as f32;
    for first in (0..rows).step_by(height) {
        let count = height.min(rows - first);
        let lines = [0, 1, 2].map(|index| index * rows + first..index * rows + first + count);
        let [logprobs, entropies, log_sums] = lines.map(|line| part(&floats, line));
        let (logprobs, entropies, log_sums) = (logprobs?, entropies?, log_sums?);
        let (logits, d_logits) = (matrix(&logits)?.rows(0, count), matrix(&d_logits)?.rows(0, count));
        let x = (x.rows(first, count), Side::Plain);
        gemm(device, logits, x, (table, Side::Transposed), scale, Accumulate::No, None)?;
        let state = HeadState::new(array(&buffer)?, count)?;
        let rows = first..first + count;
        let targets = part(&targets, rows.clone())?;
        head_start(device, state)?;
        head_forward_chunk(device, state, logits, 0, targets)?;
        head_finish(device, state, logprobs, entropies, log_sums, part(&flags, rows.clone())?)?;
        let d_entropies = d_entropies.as_ref().map(|all| part(all, rows.clone())).transpose()?;
        let d_logprobs = part(&d_logprobs, rows)?;
        head_backward_chunk(device, d_logits, logits, 0, targets, log_sums, entropies, d_logprobs, d_entropies, scale)?;
        let out = matrix(&d_hidden)?.rows(first, count);
        gemm(device, out, (d_logits, Side::Plain), (table, Side::Plain), 1.0, Accumulate::No, None)?;
    }
    drop(span);
    Ok((read(&floats, &flags, rows)?, d_hidden))
}

/// Some elements of a contiguous tensor.
fn part(tensor: &Tensor, range: Range<usize>) -> Result<Pointer<'_>, Error> {
    Ok(array(tensor)?.elements(range))
}

/// The head's output on the host; waits for the device.
fn read(floats: &Tensor, flags: &Tensor, rows: usize) -> Result<Output, Error> {
    let floats = download(floats)?;
    let part = |i: usize| floats[i * rows..(i + 1) * rows].to_vec();
    Ok(Output {
        logprobs: part(0),
        entropies: part(1),
        log_sums: part(2),
        is_argmax: download_u8(flags)?.into_iter().map(|f| f != 0).collect(),
        mean_logprobs: vec![],
    })
}

/// All logits of a few rows: f32 `[R, V]`.
pub(crate) fn logits(hidden: &Tensor, weight: &Weight) -> Result<Tensor, Error> {
    let device = hidden.device();
    let x = matrix(hidden)?;
    let out = empty(device, (x.rows, weight.rows()), DType::F32)?;
    let all = matrix(&out)?;
    let width = 16_384;
    for first in (0..weight.rows()).step_by(width) {
        let width = width.min(weight.rows() - first);
        let strip = strip(device, weight, first, width, hidden.dtype())?;
        let strip = (matrix(&strip)?, Side::Transposed);
        gemm(device, all.columns(first, width), (x, Side::Plain), strip, 1.0, Accumulate::No, None)?;
    }
    Ok(out)
}
