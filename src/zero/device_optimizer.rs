//! The optimizer step on a GPU.

use candle_core::{DType, Tensor};

use super::{Error, FlatBlock, ParamStore};
use crate::device::timers::{Phase, span};
use crate::device::{array, download_f64, empty, upload_u32};
use crate::kernels::AdamWFactors;
use crate::kernels::cuda::{adamw, sums_of_squares};
use crate::optim::{AdamWStep, NORM_CHUNK, ParamGroup};

/// The parts of the norm of this rank's gradients, by block, in the order of the store. Waits for the device once.
pub(super) fn gradient_parts(store: &ParamStore) -> Result<Vec<Vec<f64>>, Error> {
    let device = store.device();
    let span = span(device, Phase::Optimizer)?;
    let offsets: Vec<(&FlatBlock, Vec<u32>)> =
        store.flats().filter(|f| !f.is_empty()).map(|flat| (flat, chunk_offsets(flat))).collect();
    let counts: Vec<usize> = offsets.iter().map(|(_, offsets)| offsets.len() - 1).collect();
    let total: usize = counts.iter().sum();
    let sums = empty(device, total.max(1), DType::F64)?;
    let all = array(&sums)?;
    let mut first = 0;
    for ((flat, offsets), count) in offsets.into_iter().zip(&counts).filter(|(_, count)| **count > 0) {
        let (chunks, grads) = (upload_u32(device, &offsets)?, flat.own_grads()?);
        sums_of_squares(device, all.from_element(first), array(&grads)?, array(&chunks)?)?;
        first += count;
    }
    drop(span);
    let parts = download_f64(&sums)?;
    let mut rest = parts.as_slice();
    let of_block = |count: &usize| {
        let (own, later) = rest.split_at(*count);
        rest = later;
        own.to_vec()
    };
    Ok(counts.iter().map(of_block).collect())
}

/// Where the chunks of this rank's part of a block's parameters begin, and the last ends.
fn chunk_offsets(flat: &FlatBlock) -> Vec<u32> {
    let starts = flat.own_pieces().flat_map(|piece| piece.range.step_by(NORM_CHUNK));
    starts.chain([flat.own().len()]).map(|offset| offset as u32).collect()
}

/// One step of AdamW on this rank's part of a block.
pub(super) fn step(
    values: &Tensor,
    grads: &Tensor,
    first: &Tensor,
    second: &Tensor,
    groups: &[ParamGroup],
    hyper: &AdamWStep,
) -> Result<(), Error> {
    let device = values.device();
    let _span = span(device, Phase::Optimizer)?;
    let (values, grads) = (array(values)?, array(grads)?);
    let (first, second) = (array(first)?, array(second)?);
    let mut start = 0;
    while let Some(group) = groups.get(start) {
        // Neighbours with one decay are one launch.
        let same = groups[start..].iter().take_while(|g| g.weight_decay == group.weight_decay).count();
        let range = group.range.start..groups[start + same - 1].range.end;
        let factors = AdamWFactors::checked(&AdamWStep { weight_decay: group.weight_decay, ..*hyper })?;
        adamw(device, values, grads, first, second, range, factors)?;
        start += same;
    }
    Ok(())
}
