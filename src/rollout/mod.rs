//! Generation: sequences, scheduler, paged key-value cache, sampler.
//!
//! `train` and `cli` make a [`Rollout`] and call [`Rollout::generate`] with a [`DecodeModel`], which is the trainer's
//! own model with its own weights. Sequences are computed in one ragged batch that changes every step (continuous
//! batching, Orca, Yu et al., OSDI 2022): finished ones leave, waiting ones enter, long prompts are prefilled in chunks
//! beside those that decode. A prompt is prefilled once for all its samples and its pages are shared.
//!
//! Invariant: a completion is a function of the model, its prompt, the sampling settings and (seed, step, sample id).
//! On a GPU the last bits of the logits also depend on what else is in a step.
//! [`pages`] and the scheduler know no memory and no device; [`kv_cache`] and [`sampler`] are the two places that touch
//! numbers. Keys and values lie where the model computes. Tokens are drawn on the host, or, a few at a time for all sequences, by
//! a model that can: the engine's on a GPU, whose steps are recorded and repeated.

pub mod decode_model;
mod device_pages;
mod error;
mod filters;
pub mod forward;
pub mod generate;
pub mod kv_cache;
pub mod pages;
mod recorded;
pub mod sampler;
mod scheduler;
mod sequence;
mod settings;
pub mod sizes;
mod stop;

#[cfg(test)]
mod tests;

pub use decode_model::{DecodeModel, Span, StepBatch};
pub use error::Error;
pub use generate::{Caller, Event, Reserve, Rollout, Statistics};
pub use kv_cache::{CacheStep, KvCache, KvShape};
pub use pages::{BlockAllocator, PAGE_TOKENS, PageId};
pub use sequence::{Completion, Finish, Request};
pub use settings::RolloutSettings;
pub use stop::Detokenize;
