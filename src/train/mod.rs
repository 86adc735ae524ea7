//! The two training loops and what they share.
//!
//! `sft.rs` and `grpo.rs` read top to bottom as the algorithms they run; everything that is not the algorithm is beside
//! them: `backend.rs` picks the device, `session.rs` opens a model, `run.rs` keeps a run's metrics, console and cadence,
//! `output_dir.rs`, `lock.rs` and `results.rs` its folder, `state.rs` its checkpoints, `continuation.rs` and `inputs.rs` what a resumed run has in
//! common with the first, `save.rs` writes models, `generation.rs` samples, rewards and scores a generation batch.

mod backend;
pub mod bench;
mod best;
mod continuation;
mod generation;
pub mod grpo;
mod inputs;
mod lock;
mod output_dir;
mod plan;
mod results;
mod run;
mod save;
pub mod session;
pub mod sft;
mod state;
mod turns;

pub use backend::{Backend, has_bf16, has_gpu};
pub use plan::downloads;

use crate::telemetry::Terminal;

/// What a loop is given by the command line.
pub struct Context<'a> {
    /// Where to print.
    pub terminal: Terminal,
    /// Whether a signal asked the run to save and stop; looked at between steps.
    pub is_interrupted: &'a dyn Fn() -> bool,
    /// The resolved configuration, written beside the results.
    pub resolved_yaml: &'a str,
    /// Warnings of the configuration, shown with the plan.
    pub warnings: &'a [String],
}

/// How a loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps were taken.
    Finished,
    /// A signal stopped it after a clean save.
    Interrupted,
}
