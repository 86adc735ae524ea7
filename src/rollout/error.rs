//! What can go wrong while generating.

use super::pages::{PAGE_TOKENS, PageId};
use crate::ops::paged_attention;
use crate::telemetry::units;

/// Errors of the rollout.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A setting is out of its range.
    #[error("rollout: `{name}` is {value}, expected {expected}")]
    Setting {
        /// Which.
        name: &'static str,
        /// What it is.
        value: String,
        /// What it may be.
        expected: &'static str,
    },
    /// Ranks could not agree who makes what.
    // Not transparent: who handles errors looks for this one among the causes.
    #[error("{0}")]
    Reserve(#[source] crate::ranks::Error),
    /// A prompt has no tokens.
    #[error(
        "rollout: the prompt of sample {sample_id} has no tokens; a prompt needs at least one (for example the beginning-of-sequence token)"
    )]
    EmptyPrompt {
        /// Whose prompt.
        sample_id: u64,
    },
    /// A prompt has a token the model does not know.
    #[error(
        "rollout: the prompt of sample {sample_id} has token id {token}, the model knows ids below {vocab_size}; check that the tokenizer belongs to the model"
    )]
    UnknownToken {
        /// Whose prompt.
        sample_id: u64,
        /// The id.
        token: u32,
        /// Ids the model knows.
        vocab_size: usize,
    },
    /// Two requests have the same id, so they would draw the same random numbers.
    #[error(
        "rollout: two requests have the sample id {sample_id}; give each its own, or both draw the same random numbers"
    )]
    DuplicateSample {
        /// The id.
        sample_id: u64,
    },
    /// A prompt leaves no room for a completion.
    #[error(
        "rollout: the prompt of sample {sample_id} has {prompt_tokens} tokens, the model can hold {max_positions} with the completion; shorten the prompt (`max_prompt_length`)"
    )]
    PromptTooLong {
        /// Whose prompt.
        sample_id: u64,
        /// Its length.
        prompt_tokens: usize,
        /// The model's limit.
        max_positions: usize,
    },
    /// One sequence alone does not fit into the cache.
    #[error(
        "rollout: the prompt of sample {sample_id} ({prompt_tokens} tokens) with a completion of up to {completion_tokens} tokens needs {needed_pages} pages of {PAGE_TOKENS} tokens, the KV cache budget of {budget_bytes} bytes holds {budget_pages}; raise the budget, or lower `max_completion_length` or `max_prompt_length`"
    )]
    KvBudget {
        /// Whose prompt.
        sample_id: u64,
        /// Its length.
        prompt_tokens: usize,
        /// Longest completion allowed.
        completion_tokens: usize,
        /// Pages needed.
        needed_pages: usize,
        /// Pages there are.
        budget_pages: usize,
        /// The budget.
        budget_bytes: usize,
    },
    /// Stop strings need text.
    #[error("rollout: `stop_strings` are set, but nothing was given that turns tokens into text")]
    NoDetokenizer,
    /// A token could not be drawn.
    #[error("rollout: token {position} of the completion of sample {sample_id}: {source}")]
    Draw {
        /// Whose completion.
        sample_id: u64,
        /// Tokens it has so far.
        position: usize,
        /// Why.
        source: Box<Error>,
    },
    /// The model's logits are unusable.
    #[error(
        "the logits have {reason} at token id {index}, so no token can be drawn; the weights or the adapter have diverged, go back to an earlier checkpoint or lower the learning rate"
    )]
    Logits {
        /// What was found.
        reason: &'static str,
        /// Where.
        index: usize,
    },
    /// The device failed.
    #[error(transparent)]
    Device(#[from] crate::device::Error),
    /// Steps were asked for that were not prepared.
    #[error("rollout: a model without layers, or steps without memory; this is a fault of the program")]
    NoSteps,
    /// The model returned logits of another shape.
    #[error("rollout: the model returned logits of shape {got:?}, expected {expected:?}")]
    LogitsShape {
        /// Returned.
        got: Vec<usize>,
        /// Asked for.
        expected: Vec<usize>,
    },
    /// Keys or values of another length than the step's tokens.
    #[error("rollout: `{name}` for the KV cache hold {got} numbers, expected {expected}")]
    KvLength {
        /// Keys or values.
        name: &'static str,
        /// Their length.
        got: usize,
        /// The length the step asks for.
        expected: usize,
    },
    /// A layer the cache does not have.
    #[error("rollout: layer {layer} of a KV cache with {num_layers} layers was asked for")]
    KvLayer {
        /// Asked for.
        layer: usize,
        /// There are.
        num_layers: usize,
    },
    /// A page the cache or the sequence does not have.
    #[error("rollout: no page for position {position} among {pages:?} of a KV cache with {num_pages} pages")]
    KvPage {
        /// The token's position.
        position: usize,
        /// The sequence's pages.
        pages: Vec<PageId>,
        /// Pages in the cache.
        num_pages: usize,
    },
    /// The system has no memory for the cache.
    #[error(
        "rollout: no memory for a KV cache of {bytes} bytes; lower `max_num_seqs`, `max_completion_length` or the KV cache budget"
    )]
    KvMemory {
        /// What was asked for.
        bytes: usize,
    },
    /// The GPU has no memory for the cache.
    #[error(
        "rollout: a KV cache of {} and {} for a step do not fit into the {} that are free on the GPU; lower `max_num_seqs`, `max_completion_length` or `max_prompt_length`",
        units::bytes(*.bytes), units::bytes(*.step_bytes), units::bytes(*.free_bytes)
    )]
    KvDeviceMemory {
        /// What was asked for.
        bytes: u64,
        /// What a step takes besides.
        step_bytes: u64,
        /// What is free.
        free_bytes: u64,
    },
    /// The GPU has no memory for recorded steps.
    #[error(
        "recorded steps of {lanes} sequences take {}, and {} are free on the GPU",
        units::bytes(*.bytes), units::bytes(*.free_bytes)
    )]
    StepMemory {
        /// Sequences at a time.
        lanes: usize,
        /// What their steps take.
        bytes: u64,
        /// What is free.
        free_bytes: u64,
    },
    /// Keys and values are not where, or not of the type, that was asked for.
    #[error("rollout: {what} was asked of a KV cache; it holds f32 in host memory, or the activations' type on a GPU")]
    KvPlace {
        /// Type and place asked for.
        what: String,
    },
    /// A page was used by somebody after it was freed.
    #[error("rollout: KV page {page} is in a page list but free; this is a bug in the scheduler")]
    FreePage {
        /// Which.
        page: PageId,
    },
    /// No sequence can go on.
    #[error(
        "rollout: none of {waiting} unfinished sequences fits into {num_pages} KV pages; this is a bug in the scheduler"
    )]
    Stuck {
        /// Unfinished sequences.
        waiting: usize,
        /// Pages in the cache.
        num_pages: usize,
    },
    /// The caller asked to stop.
    #[error("rollout: cancelled after {finished} of {total} completions")]
    Cancelled {
        /// Finished until then.
        finished: usize,
        /// Asked for.
        total: usize,
    },
    /// Attention refused its arguments.
    #[error(transparent)]
    Attention(#[from] paged_attention::Error),
    /// The tensor library failed.
    #[error("rollout: the model's forward step failed: {0}")]
    Tensor(#[from] candle_core::Error),
    /// A block of the model failed.
    #[error("rollout: {0}")]
    Block(#[from] crate::model::Error),
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] crate::engine::Error),
    /// An operation between blocks failed.
    #[error("rollout: {0}")]
    Op(#[from] crate::ops::Error),
}
