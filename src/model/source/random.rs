//! Fresh weights out of a seed.

use std::path::Path;

use candle_core::DType;
use rayon::prelude::*;

use crate::model::Error;
use crate::model::config::{ModelConfig, TensorRole};
use crate::rng::Stream;

/// Values drawn from one stream.
const CHUNK: usize = 1 << 14;

/// Refuses a model that even in 4 bits would not fit into this machine's memory; where that is not known, none.
pub(super) fn check_memory(path: &Path, config: &ModelConfig) -> Result<(), Error> {
    let Some(memory) = memory_bytes() else { return Ok(()) };
    let weights = config.num_parameters() as u64;
    if weights / 2 <= memory {
        return Ok(());
    }
    Err(Error::Key {
        path: path.into(),
        key: "init_random".into(),
        found: format!("true for {weights} weights, which are {} bytes in 4 bits", weights / 2),
        expected: format!("a model that fits into the {memory} bytes of this machine; check the sizes in config.json"),
    })
}

/// The memory of this machine, as Linux says it.
fn memory_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Fresh weights, as transformers initialises these models: matrices normal with standard deviation
/// `initializer_range`, norms one, biases zero.
///
/// Each weight has streams of its own, keyed by its name: the value of a weight depends on the seed, its name and
/// the place in it, not on the other weights of the model nor on the number of threads.
#[derive(Debug)]
pub(super) struct RandomWeights {
    seed: u64,
    deviation: f64,
    /// The type that `auto` stands for.
    pub(super) dtype: DType,
    norms: Vec<String>,
    biases: Vec<String>,
}

impl RandomWeights {
    pub(super) fn new(config: &ModelConfig, seed: u64) -> Self {
        let names = |role| config.tensors().into_iter().filter(|t| t.role == role).map(|t| t.name).collect();
        Self {
            seed,
            deviation: config.initializer_range,
            dtype: config.torch_dtype.unwrap_or(DType::F32),
            norms: names(TensorRole::Norm),
            biases: names(TensorRole::Bias),
        }
    }

    /// The values of a weight, row-major.
    pub(super) fn values(&self, name: &str, shape: &[usize]) -> Vec<f32> {
        let mut values = vec![0f32; shape.iter().product()];
        if self.norms.iter().any(|n| n == name) {
            values.fill(1.0);
        } else if !self.biases.iter().any(|n| n == name) {
            let mut key = [0; 8];
            key.copy_from_slice(&blake3::hash(name.as_bytes()).as_bytes()[..8]);
            let item = u64::from_le_bytes(key);
            values.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, values)| {
                let mut stream = Stream::new(self.seed, "init", chunk as u64, item);
                for value in values {
                    *value = (stream.normal() * self.deviation) as f32;
                }
            });
        }
        values
    }
}
