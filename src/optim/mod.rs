//! What turns gradients into new parameters: AdamW, also with moments in 8 bits, Lion, Muon; learning-rate schedules, gradient clipping, dynamic loss scaling.
//!
//! Everything here works on flat `f32` slices and plain numbers. The owner of the parameters (`zero`) says which
//! slices it holds, `engine` runs the step, `checkpoint` stores [`OptimizerProgress`] and the moments.
//!
//! Invariants: results do not depend on the number of threads (elementwise work, and sums over chunks of a fixed
//! size added in a fixed order), and each rule is the reference implementation's, checked by the golden group `optim`.

mod adamw;
mod blocks;
mod clip;
mod error;
mod lion;
mod loss_scale;
mod muon;
mod progress;
mod rule;
mod schedule;

pub use adamw::{AdamWStep, ParamGroup, adamw_step, adamw_step_groups};
pub use clip::{
    NORM_CHUNK, clip_coefficient, clip_gradients, global_norm, norm_of_parts, scale_gradients, sums_of_squares,
};
pub use error::Error;
pub use loss_scale::{LossScaler, LossScalerSettings, ScaleUpdate};
pub use progress::OptimizerProgress;
pub use rule::{Layout, State};
pub use schedule::LrSchedule;
