//! The scalars of a step of AdamW, as the CPU's loop and the GPU's kernel take them.

/// The scalars of a step, computed in f64 and rounded once, as torch does. Its layout is that of `cuda/optimizer.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWFactors {
    /// Multiplies the gradient.
    pub grad_scale: f32,
    /// `1 - lr * weight_decay`.
    pub keep: f32,
    /// `1 - beta1`.
    pub first_weight: f32,
    /// `beta2`.
    pub second_decay: f32,
    /// `1 - beta2`.
    pub second_weight: f32,
    /// `lr / (1 - beta1^step)`.
    pub step_size: f32,
    /// `sqrt(1 - beta2^step)`.
    pub root_correction: f32,
    /// Added to the corrected root of the second moment.
    pub eps: f32,
}
