//! A bucket of gradients and the sums of micro-batches that are laid aside while others are added.

use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};

use super::sums::Next;
use super::{Error, Sums};
use crate::ops::buffer;

/// Gradients of some parameters, to which the micro-batches of a step are added.
#[derive(Debug)]
pub(super) struct Bucket {
    /// f32 `[n]`; what parameters are bound to.
    grads: Tensor,
    sums: Mutex<Aside>,
}

/// Sums that are laid aside in a step, and buffers that held such.
#[derive(Debug, Default)]
struct Aside {
    sums: Vec<Tensor>,
    free: Vec<Tensor>,
}

impl Bucket {
    /// A bucket over a buffer: f32 `[n]`.
    pub(super) fn new(grads: Tensor) -> Self {
        Self { grads, sums: Mutex::default() }
    }

    pub(super) fn zeros(count: usize, device: &Device) -> Result<Self, Error> {
        Ok(Self::new(Tensor::zeros(count, DType::F32, device)?))
    }

    pub(super) fn grads(&self) -> &Tensor {
        &self.grads
    }

    fn is_empty(&self) -> bool {
        self.grads.elem_count() == 0
    }

    /// Starts a step.
    pub(super) fn clear(&self) -> Result<(), Error> {
        if self.is_empty() {
            return Ok(());
        }
        // A step that failed may have left some.
        *self.sums.lock().unwrap_or_else(PoisonError::into_inner) = Aside::default();
        Ok(buffer::fill(&self.grads, 0.0)?)
    }

    /// Lays aside, or adds to what was, the gradients up to micro-batch `index` of the step.
    pub(super) fn end_micro_step(&self, sums: Sums, index: usize) -> Result<(), Error> {
        let Next::Merge { count, is_last } = sums.after(index) else { return Ok(()) };
        if self.is_empty() {
            return Ok(());
        }
        let mut aside = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..count {
            let sum = aside.sums.pop().ok_or(Error::MicroStepsOutOfOrder { index })?;
            buffer::add(&self.grads, &sum)?;
            aside.free.push(sum);
        }
        if is_last {
            // Breadth first this is one block's memory at a time, not all blocks'.
            aside.free.clear();
            return Ok(());
        }
        let sum = match aside.free.pop() {
            Some(free) => {
                buffer::copy(&self.grads, &free)?;
                free
            }
            None => self.grads.copy()?,
        };
        aside.sums.push(sum);
        Ok(buffer::fill(&self.grads, 0.0)?)
    }
}
