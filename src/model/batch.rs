//! A ragged batch: tokens one after another, without padding.
//!
//! Packed examples, GRPO groups and shared prompts are the same thing to the model: segments of tokens, some with a
//! prefix that other segments share. What is asked of the head is a list of `(row, target)`: the log-probability of
//! `target` as the token after `row`.

use std::ops::Range;

use crate::ops;
use crate::ops::attention::{Layout, Segment};
use crate::rng;

/// One micro-batch.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Token ids: `[N]`.
    pub tokens: Vec<u32>,
    /// Position of each token in its sequence: `[N]`.
    pub positions: Vec<u32>,
    /// Which tokens attend to which.
    pub layout: Layout,
    /// One key per token for dropout, made of its sample and its position.
    pub token_keys: Vec<u64>,
    /// Rows of the hidden states that predict a token: `[R]`, not necessarily distinct.
    pub head_rows: Vec<u32>,
    /// The token each of them predicts: `[R]`.
    pub targets: Vec<u32>,
    /// Whether the head is also asked for the mean over the vocabulary of the log-probabilities.
    pub wants_means: bool,
}

impl Batch {
    /// How many tokens the sequence of each token has, up to its own segment's end: `[N]`.
    pub fn sequence_lengths(&self) -> Vec<usize> {
        let mut lengths = Vec::with_capacity(self.tokens.len());
        for segment in self.layout.segments() {
            let length = segment.prefix.as_ref().map_or(0, Range::len) + segment.tokens.len();
            lengths.resize(lengths.len() + segment.tokens.len(), length);
        }
        lengths
    }
}

/// Puts a [`Batch`] together.
#[derive(Clone, Debug, Default)]
pub struct BatchBuilder {
    batch: Batch,
    segments: Vec<Segment>,
}

impl BatchBuilder {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a sequence that starts at position 0; `sample` keys its random draws. Returns its rows.
    pub fn push(&mut self, tokens: &[u32], sample: u64) -> Range<usize> {
        self.append(tokens, 0, None, sample)
    }

    /// Appends a sequence that goes on after `prefix`, the rows of an earlier [`Self::push`].
    pub fn push_after(&mut self, prefix: Range<usize>, tokens: &[u32], sample: u64) -> Range<usize> {
        let start = prefix.len() as u32;
        self.append(tokens, start, Some(prefix), sample)
    }

    fn append(&mut self, tokens: &[u32], position: u32, prefix: Option<Range<usize>>, sample: u64) -> Range<usize> {
        let start = self.batch.tokens.len();
        let rows = start..start + tokens.len();
        let sample_key = rng::mix(sample);
        let positions = position..position + tokens.len() as u32;
        self.batch.token_keys.extend(positions.clone().map(|p| rng::mix(sample_key ^ u64::from(p))));
        self.batch.positions.extend(positions);
        self.batch.tokens.extend_from_slice(tokens);
        self.segments.push(Segment { tokens: rows.clone(), prefix });
        rows
    }

    /// Asks for the log-probability of `target` after the token in `row`.
    pub fn predict(&mut self, row: usize, target: u32) {
        self.batch.head_rows.push(row as u32);
        self.batch.targets.push(target);
    }

    /// Asks for the log-probability of every token of `rows` but the first, each after the one before it.
    pub fn predict_within(&mut self, rows: Range<usize>) {
        for row in rows.start..rows.end.saturating_sub(1) {
            let target = self.batch.tokens[row + 1];
            self.predict(row, target);
        }
    }

    /// Asks for the mean over the vocabulary of the log-probabilities in each row that predicts.
    pub fn want_means(&mut self) {
        self.batch.wants_means = true;
    }

    /// Tokens so far.
    pub fn num_tokens(&self) -> usize {
        self.batch.tokens.len()
    }

    /// The batch.
    ///
    /// # Errors
    /// If a prefix given to [`Self::push_after`] is not the beginning of an earlier sequence.
    pub fn build(mut self) -> Result<Batch, ops::Error> {
        self.batch.layout = Layout::new(self.segments)?;
        Ok(self.batch)
    }
}
