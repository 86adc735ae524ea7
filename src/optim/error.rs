//! What can be wrong with what the optimizer is given.

use crate::config::settings::LrSchedulerType;

/// An error of the room `optim`.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// Two slices that belong together differ in length.
    #[error(
        "AdamW step: `{what}` has {got} elements, the parameters have {expected}; all four slices must be one shard"
    )]
    Length {
        /// Which slice.
        what: &'static str,
        /// Its length.
        got: usize,
        /// The length of the parameters.
        expected: usize,
    },
    /// The step counter starts at 1.
    #[error("AdamW step: step 0 has no bias correction; count optimizer steps from 1")]
    StepZero,
    /// A hyperparameter is outside its range.
    #[error("AdamW step: `{name}` is {value}, it must be {expected}; correct it in the config file")]
    Hyperparameter {
        /// Name in the config file.
        name: &'static str,
        /// Its value.
        value: f64,
        /// The range in words.
        expected: &'static str,
    },
    /// Parameter groups leave a gap or overlap.
    #[error(
        "AdamW step: parameter groups must cover 0..{total} in order; group {index} is {start}..{end} but {expected} comes next"
    )]
    Groups {
        /// Which group.
        index: usize,
        /// Where it starts.
        start: usize,
        /// Where it ends.
        end: usize,
        /// Where it should start.
        expected: usize,
        /// Number of parameters.
        total: usize,
    },
    /// An argument that the schedule does not take.
    #[error("schedule `{schedule}` takes no argument `{key}` in `lr_scheduler_kwargs`; it takes {accepted}")]
    UnknownArgument {
        /// Which schedule.
        schedule: LrSchedulerType,
        /// The argument.
        key: String,
        /// What it takes, in words.
        accepted: String,
    },
    /// An argument of the wrong type or outside its range.
    #[error("schedule `{schedule}`: `{key}` is {value}, expected {expected}; correct it in `lr_scheduler_kwargs`")]
    Argument {
        /// Which schedule.
        schedule: LrSchedulerType,
        /// The argument.
        key: &'static str,
        /// Its value as written.
        value: String,
        /// What was expected, in words.
        expected: String,
    },
    /// An argument without a default is not there, or two exclude each other.
    #[error("schedule `{schedule}` {problem}; set it in `lr_scheduler_kwargs`")]
    Arguments {
        /// Which schedule.
        schedule: LrSchedulerType,
        /// What is missing or too much, in words.
        problem: &'static str,
    },
    /// Dynamic loss scaling has nothing left to lower.
    #[error(
        "loss scale is at its minimum {minimum} and the gradients still overflow at iteration {iteration}; \
         use `bf16: true` if the GPU has it, lower the learning rate, or lower `min_loss_scale`"
    )]
    LossScaleAtMinimum {
        /// The smallest allowed scale.
        minimum: f64,
        /// Which update.
        iteration: u64,
    },
    /// A loss scale that is not a positive number.
    #[error("loss scaling: `{name}` is {value}, it must be {expected}; correct it in the fp16 settings")]
    LossScaleSetting {
        /// Name in the config file.
        name: &'static str,
        /// Its value.
        value: f64,
        /// The range in words.
        expected: &'static str,
    },
}
