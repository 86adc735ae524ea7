//! The two training loops and what they share.
//!
//! `sft.rs` and `grpo.rs` read top to bottom as the algorithms they run; everything that is not the algorithm is beside
//! them: `backend.rs` picks the device, `session.rs` opens a model, `run.rs` keeps a run's metrics and console,
//! `cadence.rs` says when it logs, evaluates and saves, `notices.rs` what it says of steps that teach nothing,
//! `material.rs` has the rows, read or prepared by `preprocess.rs`, `output_dir.rs`, `lock.rs` and `results.rs` keep its folder, `state.rs` its checkpoints, `continuation.rs` and `inputs.rs`
//! what a resumed run has in common with the first, `best.rs` finds the best checkpoint, `tuning.rs` tries and keeps how
//! products are made, `card_rates.rs` what the card reaches, `save.rs` writes models, `save_room.rs` looks whether there is room for
//! what is saved,
//! `gathered.rs` puts together what the ranks have, `generation.rs` samples, rewards and scores a generation batch, `beside.rs`
//! computes rewards while others are sampled.
//! `evaluate/` measures models outside of a run.

mod backend;
pub mod bench;
pub mod bench_rollout;
mod beside;
mod best;
mod cadence;
mod card_rates;
mod continuation;
mod dealing;
pub mod estimate;
pub mod evaluate;
mod gathered;
mod generation;
pub mod grpo;
mod inputs;
mod lock;
mod material;
mod notices;
mod output_dir;
mod placing;
mod plan;
mod policy_loss;
pub mod preprocess;
mod results;
mod run;
mod sample;
mod save;
mod save_room;
pub mod session;
pub mod sft;
mod shards;
mod state;
mod tuning;
mod turns;

pub use backend::{Backend, has_bf16, has_gpu, visible_gpus};
pub use cadence::{Cadence, Due};
pub use plan::downloads;

use std::sync::Arc;

use crate::engine::IsInterrupted;
use crate::ranks::Ranks;
use crate::telemetry::Terminal;

/// What a loop is given by the command line.
pub struct Context<'a> {
    /// Where to print.
    pub terminal: Terminal,
    /// The ranks of the run.
    pub ranks: Arc<dyn Ranks>,
    /// The number of this rank on its machine.
    pub local_rank: usize,
    /// What `CUDA_VISIBLE_DEVICES` is.
    pub visible_devices: Option<String>,
    /// Called when the run has prepared: from here on there is something to save, before a signal may end the process.
    pub ready: &'a dyn Fn(),
    /// Whether a signal asked the run to save and stop.
    pub is_interrupted: IsInterrupted,
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
