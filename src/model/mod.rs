//! Qwen2 and Qwen3 as lists of blocks: the embedding, the decoder layers, the head; weights in and out.
//!
//! Each block has an explicit `forward` and `backward`. Nothing here knows where parameters live: blocks are bound from
//! named parameters ([`params::BlockParams`]) that somebody hands in. Called by `engine`, `rollout` and `train`.

pub mod adapter;
pub mod batch;
mod blocks;
pub mod config;
mod ends;
mod error;
mod fields;
pub mod layer;
pub mod load;
mod noise;
pub mod params;
pub mod peft;
pub mod save;
pub mod source;

pub use blocks::Blocks;
pub use config::ModelConfig;
pub use ends::{EMBEDDING, Embedding, FINAL_NORM, Head, HeadGradient, LM_HEAD, Question};
pub use error::Error;
pub use source::WeightSource;
