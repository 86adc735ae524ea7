//! Weights of random values, which take no time to quantise: for measuring a model of any shape without its files.

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use half::bf16;
use rayon::prelude::*;

use super::Error;
use super::config::{TensorRole, TensorShape};
use crate::quant::{GgufMatrix, Nf4Matrix, Weight};
use crate::rng;

/// How random weights are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RandomStorage {
    /// Projections in NF4, double quantised; embedding and head in bf16.
    #[default]
    Nf4,
    /// All matrices in a GGUF type; where rows are no whole blocks, in the type of 32 values that llama.cpp takes in its place.
    Gguf(GgmlDType),
    /// As files named `Q4_K_M`: `Q4_K`, and `Q6_K` for values and down projections of every second layer, embedding and head.
    Mixed,
    /// Every projection of a layer in another GGUF type, also of one group, which no file has.
    Unlike,
}

/// The types of [`RandomStorage::Unlike`]; embedding and head are `Q8_0`.
const UNLIKE: [(&str, GgmlDType); 7] = [
    (".q_proj.", GgmlDType::Q4K),
    (".k_proj.", GgmlDType::Q8_0),
    (".v_proj.", GgmlDType::Q6K),
    (".o_proj.", GgmlDType::Q5K),
    (".gate_proj.", GgmlDType::Q3K),
    (".up_proj.", GgmlDType::Q4_1),
    (".down_proj.", GgmlDType::Q2K),
];

impl RandomStorage {
    /// Their names.
    pub const NAMES: [&str; 13] =
        ["nf4", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_k_m", "unlike"];
    const ALL: [Self; 13] = [
        Self::Nf4,
        Self::Gguf(GgmlDType::Q4_0),
        Self::Gguf(GgmlDType::Q4_1),
        Self::Gguf(GgmlDType::Q5_0),
        Self::Gguf(GgmlDType::Q5_1),
        Self::Gguf(GgmlDType::Q8_0),
        Self::Gguf(GgmlDType::Q2K),
        Self::Gguf(GgmlDType::Q3K),
        Self::Gguf(GgmlDType::Q4K),
        Self::Gguf(GgmlDType::Q5K),
        Self::Gguf(GgmlDType::Q6K),
        Self::Mixed,
        Self::Unlike,
    ];

    /// The GGUF type of a matrix with rows of `cols` values.
    fn kind(self, name: &str, cols: usize) -> Option<GgmlDType> {
        let kind = match self {
            Self::Nf4 => return None,
            Self::Gguf(kind) => kind,
            Self::Unlike => {
                UNLIKE.iter().find(|(module, _)| name.contains(module)).map_or(GgmlDType::Q8_0, |(_, kind)| *kind)
            }
            Self::Mixed => {
                let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse().ok());
                let is_wide = name.contains(".v_proj.") || name.contains(".down_proj.");
                if layer.is_none_or(|layer: usize| layer.is_multiple_of(2) && is_wide) {
                    GgmlDType::Q6K
                } else {
                    GgmlDType::Q4K
                }
            }
        };
        if cols.is_multiple_of(kind.block_size()) {
            return Some(kind);
        }
        Some(match kind {
            GgmlDType::Q4K => GgmlDType::Q5_0,
            GgmlDType::Q5K => GgmlDType::Q5_1,
            GgmlDType::Q6K => GgmlDType::Q8_0,
            _ => GgmlDType::Q4_0,
        })
    }
}

impl std::str::FromStr for RandomStorage {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::NAMES.iter().zip(Self::ALL).find(|(name, _)| **name == text);
        found.map(|(_, storage)| storage).ok_or_else(|| format!("expected one of {}", Self::NAMES.join(", ")))
    }
}

impl std::fmt::Display for RandomStorage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let found = Self::NAMES.iter().zip(Self::ALL).find(|(_, storage)| storage == self);
        match (found, self) {
            (Some((name, _)), _) => f.write_str(name),
            (None, Self::Gguf(kind)) => write!(f, "{kind:?}"),
            (None, Self::Nf4 | Self::Mixed | Self::Unlike) => Err(std::fmt::Error),
        }
    }
}

/// A weight of random values, a pure function of its arguments.
pub(super) fn noise(shape: &TensorShape, key: u64, deviation: f32, storage: RandomStorage) -> Result<Weight, Error> {
    let values = |count: usize| -> Vec<bf16> {
        // Sums of four bytes are near enough to normal.
        let value = |i: u64| {
            let bytes = rng::mix(key ^ i).to_le_bytes();
            bytes[..4].iter().map(|&b| f32::from(b) - 127.5).sum::<f32>() * (deviation / 148.0)
        };
        (0..count as u64).into_par_iter().map(|i| bf16::from_f32(value(i))).collect()
    };
    if let &[rows, cols] = shape.shape.as_slice()
        && let Some(kind) = storage.kind(&shape.name, cols)
    {
        let matrix = GgufMatrix::noise(kind, rows, cols, deviation, key).map_err(crate::ops::Error::from)?;
        return Ok(Weight::Gguf(matrix));
    }
    Ok(match (shape.role, shape.shape.as_slice()) {
        (TensorRole::Linear, &[rows, cols]) => Weight::Nf4(Nf4Matrix::noise(rows, cols, deviation, key)),
        (TensorRole::Norm, _) => Weight::Dense(Tensor::ones(shape.shape.as_slice(), DType::F32, &Device::Cpu)?),
        (TensorRole::Bias, &[length]) => {
            Weight::Dense(Tensor::from_vec(values(length), length, &Device::Cpu)?.to_dtype(DType::F32)?)
        }
        _ => {
            let values = values(shape.shape.iter().product());
            Weight::Dense(Tensor::from_vec(values, shape.shape.as_slice(), &Device::Cpu)?)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for (name, storage) in RandomStorage::NAMES.into_iter().zip(RandomStorage::ALL) {
            assert_eq!(name.parse(), Ok(storage));
            assert_eq!(storage.to_string(), name);
        }
        assert!("q8_k".parse::<RandomStorage>().unwrap_err().contains("q4_k_m"));
    }

    #[test]
    fn types_follow_a_matrix_s_name_and_rows() {
        let mixed = |name, cols| RandomStorage::Mixed.kind(name, cols).unwrap();
        assert_eq!(mixed("model.layers.0.self_attn.v_proj.weight", 3584), GgmlDType::Q6K);
        assert_eq!(mixed("model.layers.1.self_attn.v_proj.weight", 3584), GgmlDType::Q4K);
        assert_eq!(mixed("model.layers.0.self_attn.q_proj.weight", 3584), GgmlDType::Q4K);
        assert_eq!(mixed("model.layers.2.mlp.down_proj.weight", 29_568), GgmlDType::Q8_0);
        assert_eq!(mixed("model.layers.0.self_attn.q_proj.weight", 896), GgmlDType::Q5_0);
        assert_eq!(mixed("lm_head.weight", 3584), GgmlDType::Q6K);
        assert_eq!(RandomStorage::Nf4.kind("lm_head.weight", 3584), None);
        let unlike = |name| RandomStorage::Unlike.kind(name, 896).unwrap();
        assert_eq!(unlike("model.layers.0.mlp.gate_proj.weight"), GgmlDType::Q4_0);
        assert_eq!(unlike("model.layers.0.mlp.up_proj.weight"), GgmlDType::Q4_1);
    }
}
