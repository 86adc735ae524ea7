//! A bucket of gradients and the sums of micro-batches that are laid aside while others are added.

use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Tensor};

use super::sums::Next;
use super::{Error, Sums};
use crate::ops::buffer;

/// Gradients of some parameters, to which the micro-batches of a step are added.
#[derive(Debug)]
pub(super) struct Bucket {
    count: usize,
    device: Device,
    /// Whether it is there between steps as well.
    is_lasting: bool,
    inside: Mutex<Inside>,
}

#[derive(Debug, Default)]
struct Inside {
    /// f32 `[n]`; what parameters are bound to. `None` while a bucket that does not last is not used.
    grads: Option<Tensor>,
    /// Sums that are laid aside in a step, and buffers that held such.
    aside: Vec<Tensor>,
    free: Vec<Tensor>,
}

impl Bucket {
    /// A bucket over a buffer: f32 `[n]`.
    pub(super) fn new(grads: &Tensor) -> Self {
        let inside = Inside { grads: Some(grads.clone()), ..Inside::default() };
        let (count, device) = (grads.elem_count(), grads.device().clone());
        Self { count, device, is_lasting: true, inside: Mutex::new(inside) }
    }

    pub(super) fn zeros(count: usize, device: &Device) -> Result<Self, Error> {
        Ok(Self::new(&Tensor::zeros(count, DType::F32, device)?))
    }

    /// A bucket that takes memory from the first gradient of a step until its sums are taken.
    pub(super) fn passing(count: usize, device: &Device) -> Self {
        Self { count, device: device.clone(), is_lasting: false, inside: Mutex::default() }
    }

    /// Number of values.
    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// Whether it takes memory between steps.
    pub(super) fn is_lasting(&self) -> bool {
        self.is_lasting
    }

    fn inside(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where gradients are added: f32 `[n]`.
    pub(super) fn grads(&self) -> Result<Tensor, Error> {
        let mut inside = self.inside();
        if let Some(grads) = &inside.grads {
            return Ok(grads.clone());
        }
        let grads = Tensor::zeros(self.count, DType::F32, &self.device)?;
        inside.grads = Some(grads.clone());
        Ok(grads)
    }

    /// Starts a step.
    pub(super) fn clear(&self) -> Result<(), Error> {
        let mut inside = self.inside();
        // A step that failed may have left some.
        let grads = std::mem::take(&mut *inside).grads.filter(|_| self.is_lasting);
        if let Some(grads) = grads {
            if self.count > 0 {
                buffer::fill(&grads, 0.0)?;
            }
            inside.grads = Some(grads);
        }
        Ok(())
    }

    /// Lays aside, or adds to what was, the gradients up to micro-batch `index` of the step.
    pub(super) fn end_micro_step(&self, sums: Sums, index: usize) -> Result<(), Error> {
        let Next::Merge { count, is_last } = sums.after(index) else { return Ok(()) };
        if self.count == 0 {
            return Ok(());
        }
        let grads = self.grads()?;
        let mut inside = self.inside();
        for _ in 0..count {
            let sum = inside.aside.pop().ok_or(Error::MicroStepsOutOfOrder { index })?;
            buffer::add(&grads, &sum)?;
            inside.free.push(sum);
        }
        if is_last {
            // Breadth first this is one block's memory at a time, not all blocks'.
            inside.free.clear();
            return Ok(());
        }
        let sum = match inside.free.pop() {
            Some(free) => {
                buffer::copy(&grads, &free)?;
                free
            }
            None => grads.copy()?,
        };
        inside.aside.push(sum);
        Ok(buffer::fill(&grads, 0.0)?)
    }

    /// The sums of the step, in the order of [`Sums::nodes`]. A bucket that does not last gives its memory with them.
    pub(super) fn take_sums(&self) -> Result<Vec<Tensor>, Error> {
        let last = self.grads()?;
        let mut inside = self.inside();
        if !self.is_lasting {
            inside.grads = None;
        }
        let mut sums = std::mem::take(&mut inside.aside);
        sums.push(last);
        Ok(sums)
    }
}
