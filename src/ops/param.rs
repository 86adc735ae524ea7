//! A dense parameter and where its gradient goes.

use candle_core::Tensor;

use super::{Error, view};
use crate::kernels::cpu::vector;

/// A parameter with, if it is trained, the place in its block's gradient bucket. Cloning shares both.
#[derive(Clone, Debug)]
pub struct Param {
    /// The values, f32.
    pub value: Tensor,
    /// Gradients are added here; `None`: frozen.
    pub grad: Option<Tensor>,
}

impl Param {
    /// A parameter that is not trained.
    pub fn frozen(value: Tensor) -> Self {
        Self { value, grad: None }
    }

    /// Adds `gradient` (as many values as the parameter, row-major) to the bucket; nothing if frozen.
    ///
    /// # Errors
    /// If the bucket is not f32 on the CPU.
    pub(crate) fn accumulate(&self, op: &'static str, gradient: &[f32]) -> Result<(), Error> {
        match &self.grad {
            Some(bucket) => view::change(op, bucket, |values| vector::add_scaled(values, 1.0, gradient)),
            None => Ok(()),
        }
    }
}
