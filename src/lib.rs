//! Fine-tuning and reinforcement learning of Qwen-family language models in one binary.
#![deny(unsafe_code)]

pub mod algo;
pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod data;
pub mod device;
pub mod engine;
pub mod fs;
pub mod kernels;
pub mod model;
pub mod ops;
pub mod optim;
pub mod quant;
pub mod ranks;
pub mod reward;
pub mod rng;
pub mod rollout;
pub mod telemetry;
pub mod train;
pub mod zero;
