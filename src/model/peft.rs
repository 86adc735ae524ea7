//! Low-rank adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! An [`AdapterSpec`] is an adapter outside a model: the blocks are made from it, merged with it, or turned back into
//! one to be saved. Module paths are Hugging Face's (`model.layers.0.self_attn.q_proj`), without PEFT's prefix. A loaded
//! adapter has been held against the model: every module exists there and every shape fits.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::config::settings::Projection;
use crate::fs;
use crate::model::Error;
use crate::model::config::ModelConfig;
use crate::model::save::{little_endian, tensor_bytes, write_json};
use crate::model::source::{RawTensor, dense_to_f32, read_json, read_safetensors};
use crate::rng::Stream;

mod config;

pub use config::{AdapterBias, AdapterConfig, ModuleSet};

/// The settings of an adapter.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The weights of an adapter.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// What PEFT puts before the base model's names.
const PREFIX: &str = "base_model.model.";

/// An adapter: its settings, the low-rank factors of each module, and weights it replaces whole.
#[derive(Clone, Debug)]
pub struct AdapterSpec {
    /// The settings as in `adapter_config.json`.
    pub config: AdapterConfig,
    /// Factors by module path, e.g. `model.layers.0.self_attn.q_proj`.
    pub modules: BTreeMap<String, ModuleAdapter>,
    /// Weights trained whole (`modules_to_save`, trained biases) by the base model's name, e.g. `lm_head.weight`, in the
    /// type they are stored in. A head replaced here is its own matrix, even where the base model ties it.
    pub full_replacements: BTreeMap<String, Tensor>,
}

/// The factors of one module: `y = x W^T + scaling * (x A^T) B^T` (Hu et al., 2106.09685, eq. 3).
#[derive(Clone, Debug, PartialEq)]
pub struct ModuleAdapter {
    /// Rank.
    pub r: usize,
    /// Columns of A: the module's inputs.
    pub in_features: usize,
    /// Rows of B: the module's outputs.
    pub out_features: usize,
    /// What multiplies B A.
    pub scaling: f64,
    /// A, row-major `[r, in_features]`.
    pub a: Vec<f32>,
    /// B, row-major `[out_features, r]`.
    pub b: Vec<f32>,
    /// `DoRA`'s magnitude `[out_features]` (Liu et al., 2402.09353).
    pub magnitude: Option<Vec<f32>>,
}

/// Every module that can carry a low-rank adapter, with `(out, in)`, sorted by path.
fn modules_of(model: &ModelConfig) -> BTreeMap<String, (usize, usize)> {
    let mut modules = BTreeMap::new();
    for layer in 0..model.num_hidden_layers {
        for projection in Projection::ALL {
            modules.insert(format!("model.layers.{layer}.{}", projection.path()), model.projection_shape(projection));
        }
    }
    modules.insert("lm_head".into(), (model.vocab_size, model.hidden_size));
    modules
}

impl AdapterSpec {
    /// A fresh adapter for every module that `config` targets: A uniform in `±1/sqrt(in)` (PEFT's Kaiming initialisation),
    /// B zero, so that the model computes what it did before. Does not make `DoRA` magnitudes or replacements.
    ///
    /// # Errors
    /// If `config` targets no module of the model.
    pub fn init(config: AdapterConfig, model: &ModelConfig, seed: u64) -> Result<Self, Error> {
        let mut modules = BTreeMap::new();
        for (path, (out_features, in_features)) in modules_of(model) {
            if !config.targets(&path)? {
                continue;
            }
            let (r, scaling) = config.rank_and_scaling(&path)?;
            let bound = 1.0 / (in_features as f64).sqrt();
            let mut key = [0; 8];
            key.copy_from_slice(&blake3::hash(path.as_bytes()).as_bytes()[..8]);
            let mut stream = Stream::new(seed, "lora_a", 0, u64::from_le_bytes(key));
            let a = (0..r * in_features).map(|_| ((2.0 * stream.uniform() - 1.0) * bound) as f32).collect();
            let b = vec![0.0; out_features * r];
            modules.insert(path, ModuleAdapter { r, in_features, out_features, scaling, a, b, magnitude: None });
        }
        if modules.is_empty() {
            return Err(Error::Unsupported {
                path: CONFIG_FILE.into(),
                found: format!("an adapter on {}", config.target_modules),
                supported: "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj and lm_head".into(),
            });
        }
        Ok(Self { config, modules, full_replacements: BTreeMap::new() })
    }

    /// Reads an adapter and holds it against the model it is for.
    ///
    /// # Errors
    /// If a file is missing or damaged, the adapter needs something that is not supported, targets modules the model does
    /// not have, lacks weights for modules it targets, or has shapes that do not fit.
    pub fn load(folder: &Path, model: &ModelConfig) -> Result<Self, Error> {
        let config_path = folder.join(CONFIG_FILE);
        if !config_path.is_file() {
            let found = if folder.is_dir() { "a folder without adapter_config.json" } else { "nothing" };
            return Err(Error::NoAdapter { path: folder.into(), found: found.into() });
        }
        let path = folder.join(WEIGHTS_FILE);
        if !path.is_file() {
            let found = if folder.join("adapter_model.bin").is_file() {
                "a pickled adapter_model.bin, which is not read: save it with `safe_serialization=True`"
            } else {
                "adapter_config.json without adapter_model.safetensors"
            };
            return Err(Error::NoAdapter { path: folder.into(), found: found.into() });
        }
        let config = AdapterConfig::from_json(&config_path, &read_json(&config_path)?)?;
        let mut reader = Reader { path: &path, tensors: read_safetensors(&path)? };
        let mut modules = BTreeMap::new();
        for (module, shape) in modules_of(model) {
            if let Some(adapter) = reader.module(&config, &module, shape)? {
                modules.insert(module, adapter);
            }
        }
        let full_replacements = reader.replacements(model)?;
        for module in &config.modules_to_save {
            let is_there = full_replacements.keys().any(|name| {
                let path = name.rsplit_once('.').map_or(name.as_str(), |(path, _)| path);
                path == module || path.ends_with(&format!(".{module}"))
            });
            if !is_there {
                let name = format!("{PREFIX}…{module}.weight");
                return Err(Error::MissingTensor { path: path.clone(), name, nearest: None });
            }
        }
        if modules.is_empty() && full_replacements.is_empty() {
            return Err(Error::Damaged { path, reason: "it holds no adapter weights".into() });
        }
        Ok(Self { config, modules, full_replacements })
    }

    /// Writes the adapter as PEFT does; each file is whole or absent. Factors are written as f32.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn save(&self, folder: &Path) -> Result<(), Error> {
        let path = folder.join(WEIGHTS_FILE);
        let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = vec![];
        let bytes = |values: &[f32]| little_endian(values, f32::to_le_bytes);
        for (module, adapter) in &self.modules {
            let ModuleAdapter { r, in_features, out_features, a, b, magnitude, .. } = adapter;
            let name = |part: &str| format!("{PREFIX}{module}.{part}");
            tensors.push((name("lora_A.weight"), Dtype::F32, vec![*r, *in_features], bytes(a)));
            tensors.push((name("lora_B.weight"), Dtype::F32, vec![*out_features, *r], bytes(b)));
            if let Some(magnitude) = magnitude {
                tensors.push((name("lora_magnitude_vector"), Dtype::F32, vec![*out_features], bytes(magnitude)));
            }
        }
        for (name, tensor) in &self.full_replacements {
            let dtype = match tensor.dtype() {
                DType::BF16 => Dtype::BF16,
                DType::F16 => Dtype::F16,
                _ => Dtype::F32,
            };
            let key = match name.rsplit_once('.') {
                // PEFT keeps the base module of an adapted one under another name.
                Some((module, "bias")) if self.modules.contains_key(module) => {
                    format!("{PREFIX}{module}.base_layer.bias")
                }
                _ => format!("{PREFIX}{name}"),
            };
            let bytes = tensor_bytes(tensor, tensor.dtype()).map_err(Error::tensor("saving", name))?;
            tensors.push((key, dtype, tensor.dims().to_vec(), bytes));
        }
        let failed =
            |error: safetensors::SafeTensorError| Error::ReadBack { path: path.clone(), reason: error.to_string() };
        let views: Vec<_> = tensors
            .iter()
            .map(|(name, dtype, shape, bytes)| {
                Ok((name, TensorView::new(*dtype, shape.clone(), bytes).map_err(failed)?))
            })
            .collect::<Result<_, Error>>()?;
        let format = [("format".to_string(), "pt".to_string())].into_iter().collect();
        fs::write_atomic(&path, &safetensors::serialize(views, Some(format)).map_err(failed)?)?;
        write_json(&folder.join(CONFIG_FILE), &self.config.to_json())
    }
}

/// The tensors of an adapter file that nobody has taken yet.
struct Reader<'a> {
    path: &'a Path,
    tensors: BTreeMap<String, RawTensor>,
}

impl Reader<'_> {
    fn damaged(&self, reason: String) -> Error {
        Error::Damaged { path: self.path.into(), reason }
    }

    /// The factors of one module; `None` where the adapter leaves it alone.
    fn module(
        &mut self,
        config: &AdapterConfig,
        module: &str,
        (out_features, in_features): (usize, usize),
    ) -> Result<Option<ModuleAdapter>, Error> {
        let key = |part: &str| format!("{PREFIX}{module}.{part}");
        let is_stored = ["lora_A.weight", "lora_B.weight"].iter().any(|part| self.tensors.contains_key(&key(part)));
        match (is_stored, config.targets(module)?) {
            (false, false) => return Ok(None),
            (true, false) => {
                return Err(self.damaged(format!("it adapts `{module}`, which adapter_config.json does not target")));
            }
            (_, true) => {}
        }
        let (r, scaling) = config.rank_and_scaling(module)?;
        let a = self.values(&key("lora_A.weight"), &[r, in_features])?;
        let b = self.values(&key("lora_B.weight"), &[out_features, r])?;
        let magnitude = if config.use_dora {
            let mut name = key("lora_magnitude_vector");
            if !self.tensors.contains_key(&name) {
                name.push_str(".weight");
            }
            Some(self.values(&name, &[out_features])?)
        } else {
            None
        };
        Ok(Some(ModuleAdapter { r, in_features, out_features, scaling, a, b, magnitude }))
    }

    fn values(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        let tensor = self.tensors.remove(name).ok_or_else(|| Error::MissingTensor {
            path: self.path.into(),
            name: name.into(),
            nearest: None,
        })?;
        if tensor.shape != shape {
            return Err(Error::Shape {
                path: self.path.into(),
                name: name.into(),
                found: tensor.shape,
                expected: shape.into(),
            });
        }
        Ok(dense_to_f32(&tensor.read()?, self.dtype(name, tensor.dtype)?))
    }

    fn dtype(&self, name: &str, dtype: Dtype) -> Result<DType, Error> {
        match dtype {
            Dtype::F32 => Ok(DType::F32),
            Dtype::F16 => Ok(DType::F16),
            Dtype::BF16 => Ok(DType::BF16),
            other => Err(Error::Dtype {
                path: self.path.into(),
                name: name.into(),
                found: format!("{other:?}"),
                supported: "F32, F16 and BF16",
            }),
        }
    }

    /// What is left must be weights of the base model, trained whole.
    fn replacements(&mut self, model: &ModelConfig) -> Result<BTreeMap<String, Tensor>, Error> {
        let mut shapes: BTreeMap<String, Vec<usize>> = model.tensors().into_iter().map(|t| (t.name, t.shape)).collect();
        shapes.insert("lm_head.weight".into(), vec![model.vocab_size, model.hidden_size]);
        let mut replacements = BTreeMap::new();
        for (key, tensor) in std::mem::take(&mut self.tensors) {
            let name = key.strip_prefix(PREFIX).unwrap_or(&key);
            let name = name
                .replace(".base_layer.", ".")
                .replace(".modules_to_save.default.", ".")
                .replace(".modules_to_save.", ".");
            let Some(shape) = shapes.get(&name) else {
                let what = if key.contains("lora_") { "an adapter weight" } else { "a weight" };
                return Err(self.damaged(format!("`{key}` is {what} of a module that this model does not have")));
            };
            if tensor.shape != *shape {
                let (found, expected) = (tensor.shape, shape.clone());
                return Err(Error::Shape { path: self.path.into(), name: key, found, expected });
            }
            let dtype = self.dtype(&key, tensor.dtype)?;
            let tensor = Tensor::from_raw_buffer(&tensor.read()?, dtype, shape, &Device::Cpu);
            replacements.insert(name, tensor.map_err(Error::tensor("reading", &key))?);
        }
        Ok(replacements)
    }
}

impl ModuleAdapter {
    /// Adds the adapter to a weight of its module, in place.
    ///
    /// # Shapes
    /// `weight`: f32 row-major `[out_features, in_features]`.
    ///
    /// # Panics
    /// If `weight` has another length.
    ///
    /// # Equation
    /// `W' = W + scaling * B A` (2106.09685 eq. 3); with a magnitude `m`, `W' = m / ||V||_row * V` where
    /// `V = W + scaling * B A` (`DoRA`, 2402.09353 eq. 5; its norm runs over the inputs of each output, as PEFT computes it).
    pub fn merge(&self, weight: &mut [f32]) {
        assert_eq!(weight.len(), self.out_features * self.in_features, "elements of the weight to merge into");
        weight.par_chunks_mut(self.in_features).enumerate().for_each(|(row, weight)| {
            let mut delta = vec![0f32; self.in_features];
            for (&b, a) in self.b[row * self.r..][..self.r].iter().zip(self.a.chunks(self.in_features)) {
                delta.iter_mut().zip(a).for_each(|(delta, a)| *delta += b * a);
            }
            let scaling = self.scaling as f32;
            weight.iter_mut().zip(&delta).for_each(|(weight, delta)| *weight += scaling * delta);
            if let Some(magnitude) = &self.magnitude {
                let norm = weight.iter().map(|w| f64::from(*w) * f64::from(*w)).sum::<f64>().sqrt();
                let factor = (f64::from(magnitude[row]) / norm) as f32;
                for weight in weight {
                    *weight *= factor;
                }
            }
        });
    }
}
