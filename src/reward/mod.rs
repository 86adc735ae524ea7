//! Verifiers, reward programs and reward functions in Python: a completion in, a number out.
//!
//! Owns every built-in reward function, the comparison of mathematical answers, and whatever runs what a user wrote: the
//! protocol of reward programs, the Python of reward functions, and the keepers under which all of these run.
//! The GRPO loop makes [`Rewards`] from `reward_funcs` and calls [`Rewards::score`] once per generation batch, or [`Rewards::score_rest`]
//! where functions that look at one sample at a time were asked before ([`Rewards::of_each`]).
//!
//! Invariants: a score is finite or `None` ("not applicable", left out of the weighted sum as in TRL); the same samples
//! give the same scores in any order and on any number of threads; no text, however long or malformed, makes a
//! built-in panic or run away.
//!
//! Names follow TRL's (`trl/rewards/`) and open-r1's (`src/open_r1/rewards.py`) functions without the suffix
//! `_reward`; a name with that suffix is understood as well and is then the name in the metrics.

mod answer;
mod code;
mod command;
mod countdown;
mod error;
mod format;
mod keeper;
mod length;
pub mod math;
mod parameters;
mod python;
mod registry;
mod sandbox;
mod set;

pub use answer::AnswerReader;
pub use error::{Error, ProgramError};
pub use keeper::run_if_asked;
pub use python::PythonError;
pub use registry::{build, builtin_names, check};
pub use set::{OfEach, Progress, Rewards, Scores};

use serde_json::{Map, Value};

/// One completion with all a reward may look at.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// The prompt as the data set has it: a string or a list of messages.
    pub prompt: &'a Value,
    /// The prompt as the model saw it, chat template applied.
    pub prompt_text: &'a str,
    /// What the model wrote, special tokens removed.
    pub completion: &'a str,
    /// Its tokens.
    pub completion_ids: &'a [u32],
    /// Its length in tokens, the end-of-sequence token included.
    pub completion_tokens: usize,
    /// The longest completion allowed, in tokens.
    pub max_completion_length: usize,
    /// Whether it ran into that limit.
    pub is_truncated: bool,
    /// The row of the data set with all its columns.
    pub row: &'a Map<String, Value>,
}

/// A reward function.
pub trait Reward: Send {
    /// Its name in the metrics (`rewards/<name>/mean`).
    fn name(&self) -> &str;

    /// Whether a sample's score depends on that sample alone, so that it can be made before the others are there.
    fn is_of_each(&self) -> bool {
        false
    }

    /// One score per sample, in order; `None` where the reward does not apply.
    ///
    /// # Errors
    /// If a sample lacks a column the reward needs, or a reward program fails.
    fn score(&mut self, samples: &[Sample<'_>]) -> Result<Vec<Option<f64>>, Error>;

    /// As [`Reward::score`], but given up as soon as `is_interrupted`, which a reward that waits for another process asks
    /// while it waits. Those that compute are done soon and go on to the end.
    ///
    /// # Errors
    /// Those of [`Reward::score`]; [`Error::Interrupted`] if it was given up.
    fn score_unless(
        &mut self,
        samples: &[Sample<'_>],
        is_interrupted: &dyn Fn() -> bool,
    ) -> Result<Vec<Option<f64>>, Error> {
        let _ = is_interrupted;
        self.score(samples)
    }
}
