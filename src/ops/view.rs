//! f32 slices of CPU tensors: reading, making, changing in place.

use std::ops::{Deref, Range};

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Shape, Storage, StorageRef, Tensor};

use super::Error;

/// The values of a contiguous f32 tensor on the CPU.
pub(crate) struct View<'a> {
    storage: StorageRef<'a>,
    range: Range<usize>,
}

impl Deref for View<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.range.clone()],
            _ => unreachable!("`view` makes views of f32 tensors on the CPU only"),
        }
    }
}

/// Reads a tensor's values; it must be contiguous.
pub(crate) fn view<'a>(op: &'static str, tensor: &'a Tensor) -> Result<View<'a>, Error> {
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(_)), Some((start, end))) => Ok(View { storage, range: start..end }),
        _ => Err(placement(op, tensor)),
    }
}

fn placement(op: &'static str, tensor: &Tensor) -> Error {
    let order = if tensor.is_contiguous() { "" } else { ", not contiguous" };
    Error::Placement { op, got: format!("{:?} on {:?}{order}", tensor.dtype(), tensor.device().location()) }
}

/// Wraps values as a CPU tensor without a copy.
pub(crate) fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor, Error> {
    Ok(Tensor::from_vec(values, shape.into(), &Device::Cpu)?)
}

struct InPlace<F>(&'static str, F);

impl<F: Fn(&mut [f32])> InplaceOp1 for InPlace<F> {
    fn name(&self) -> &'static str {
        self.0
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        match (storage, layout.contiguous_offsets()) {
            (CpuStorage::F32(values), Some((start, end))) => {
                self.1(&mut values[start..end]);
                Ok(())
            }
            _ => Err(candle_core::Error::Msg(format!("{}: needs a contiguous f32 tensor", self.0))),
        }
    }
}

/// Changes a contiguous f32 CPU tensor in place. Every tensor that shares its storage sees the change; `change` must
/// not read one of those.
pub(crate) fn change(op: &'static str, tensor: &Tensor, change: impl Fn(&mut [f32])) -> Result<(), Error> {
    if tensor.dtype() != DType::F32 || !tensor.device().is_cpu() {
        return Err(placement(op, tensor));
    }
    Ok(tensor.inplace_op1(&InPlace(op, change))?)
}

/// The two sizes of a matrix.
pub(crate) fn dims2(op: &'static str, argument: &'static str, tensor: &Tensor) -> Result<(usize, usize), Error> {
    tensor.dims2().map_err(|_| super::shape_error(op, argument, tensor.dims(), "a matrix"))
}
