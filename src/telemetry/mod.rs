//! What a run tells about itself: the console, metric files, TensorBoard events, curves and the memory ledger.
//!
//! The training loops build one [`Row`] per logged step with an [`Accumulator`], hand it to [`Metrics`] (files) and to
//! [`Console`] (people). Nothing here decides anything: a run with a silent console and no sinks computes the same.
//! All writes to standard output go through [`Terminal`].

mod accumulator;
mod console;
mod curves;
mod jsonl;
mod ledger;
mod line;
mod logs;
mod metrics;
mod plan;
mod samples;
mod tensorboard;
mod terminal;
pub mod units;

pub use accumulator::{Accumulator, Row};
pub use console::{Console, Progress};
pub use curves::write_curves;
pub use jsonl::{CutBack, JsonLines, read_rows};
pub use ledger::{Allocation, Kind, Ledger, peak_resident_bytes};
pub use logs::init_logs;
pub use metrics::Metrics;
pub use plan::Section;
pub use samples::Sample;
pub use tensorboard::EventWriter;
pub use terminal::Terminal;

use std::path::PathBuf;

/// What went wrong while reporting.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error(transparent)]
    File(#[from] crate::fs::Error),
    /// A row could not be turned into JSON.
    #[error("cannot write a row of `{}` as JSON: {source}", path.display())]
    Json {
        /// The file it was for.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// The log filter cannot be read.
    #[error(
        "`TRAINER_LOG={value}` is not a log filter ({reason}); write for example `TRAINER_LOG=info` or `TRAINER_LOG=warn,trainer=debug`"
    )]
    Filter {
        /// What was given.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The curves could not be drawn.
    #[error("cannot draw `{}`: {reason}", path.display())]
    Draw {
        /// The picture's file.
        path: PathBuf,
        /// What the plotter said.
        reason: String,
    },
}
