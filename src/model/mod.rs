//! (room)

pub mod config;
mod error;
mod fields;
pub mod peft;
pub mod save;
pub mod source;

pub use config::ModelConfig;
pub use error::Error;
pub use source::WeightSource;
