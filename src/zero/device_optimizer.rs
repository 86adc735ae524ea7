//! The optimizer step on a GPU.

use candle_core::{DType, Tensor};

use super::{Error, FlatBlock, ParamStore};
use crate::device::timers::{Phase, span};
use crate::device::{array, download_f64, empty, upload_u32};
use crate::kernels::cuda::{AdamWFactors, adamw, sums_of_squares, sums_of_squares_workspace};
use crate::optim::{AdamWStep, Factors, ParamGroup};

/// The norm of every parameter's gradient in the order of the store, each rounded to f32. Waits for the device once.
pub(super) fn norms(store: &ParamStore) -> Result<Vec<f32>, Error> {
    let device = store.device();
    let span = span(device, Phase::Optimizer)?;
    let flats: Vec<&FlatBlock> = store.flats().filter(|f| !f.is_empty()).collect();
    let total: usize = flats.iter().map(|f| f.entries().len()).sum();
    let sums = empty(device, total.max(1), DType::F64)?;
    let all = array(&sums)?;
    let mut first = 0;
    for flat in flats {
        let entries = flat.entries();
        let offsets: Vec<u32> = std::iter::once(0).chain(entries.iter().map(|e| e.range.end as u32)).collect();
        let offsets = upload_u32(device, &offsets)?;
        let workspace = empty(device, sums_of_squares_workspace(entries.len(), flat.len()), DType::F64)?;
        let grads = array(flat.grads())?;
        sums_of_squares(device, all.from_element(first, 8), grads, array(&offsets)?, array(&workspace)?)?;
        first += entries.len();
    }
    drop(span);
    Ok(download_f64(&sums)?.into_iter().take(total).map(|s| s.sqrt() as f32).collect())
}

/// One step of AdamW on a block.
pub(super) fn step(
    flat: &FlatBlock,
    first: &Tensor,
    second: &Tensor,
    groups: &[ParamGroup],
    hyper: &AdamWStep,
) -> Result<(), Error> {
    let device = flat.values().device();
    let _span = span(device, Phase::Optimizer)?;
    let (values, grads) = (array(flat.values())?, array(flat.grads())?);
    let (first, second) = (array(first)?, array(second)?);
    let mut start = 0;
    while let Some(group) = groups.get(start) {
        // Neighbours with one decay are one launch.
        let same = groups[start..].iter().take_while(|g| g.weight_decay == group.weight_decay).count();
        let range = group.range.start..groups[start + same - 1].range.end;
        let factors = Factors::checked(&AdamWStep { weight_decay: group.weight_decay, ..*hyper })?;
        let factors = AdamWFactors {
            grad_scale: factors.grad_scale,
            keep: factors.keep,
            first_weight: factors.first_weight,
            second_decay: factors.second_decay,
            second_weight: factors.second_weight,
            step_size: factors.step_size,
            root_correction: factors.root_correction,
            eps: factors.eps,
        };
        adamw(device, values, grads, first, second, range, factors)?;
        start += same;
    }
    Ok(())
}
