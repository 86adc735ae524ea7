//! What became of the rows of a split: the counts that a run shows in its plan.

use serde::{Deserialize, Serialize};

use crate::data::findings::Note;
use crate::data::statistics::TokenStatistics;

/// Counts of a split.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Rows that were read.
    pub rows: usize,
    /// Rows left out because an earlier one gives the same example.
    pub duplicates: usize,
    /// Rows left out because no token of theirs is learnt.
    pub dropped: usize,
    /// Those of them whose tokens to learn all lie beyond the length limit.
    pub beyond_limit: usize,
    /// Examples or prompts cut to the length limit.
    pub truncated: usize,
    /// Whether the rows went through the chat template.
    pub is_conversational: bool,
    /// Lengths of the examples or prompts.
    pub statistics: TokenStatistics,
    /// Sequences: packed examples, examples or prompts.
    pub sequences: usize,
    /// Their tokens.
    pub tokens: usize,
    /// Sequences without a token that has another before it to be predicted from.
    pub without_target: usize,
    /// What was lost, guessed or adapted.
    pub notes: Vec<Note>,
}
