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

use crate::fs;
use crate::model::Error;
use crate::model::config::ModelConfig;
use crate::model::save::{little_endian, tensor_bytes, write_json};
use crate::model::source::{RawTensor, dense_to_f32, read_json, read_safetensors};
use crate::rng::Stream;

mod config;
mod modules;

pub use crate::config::settings::ModuleSet;
pub use config::{AdapterBias, AdapterConfig};
pub use modules::{EMBED_TOKENS, LM_HEAD};

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
    /// type they are stored in. A head replaced here is its own matrix, even where the base model ties it. Empty for a fresh
    /// adapter, whose copies start as the base's weights.
    pub full_replacements: BTreeMap<String, Tensor>,
    /// Base weights that a file holds beside the adapter, which are not trained: PEFT adds the embedding and the head where one
    /// of them is adapted or resized. They take the place of the base's.
    pub base_replacements: BTreeMap<String, Tensor>,
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

/// What PEFT calls the two factors of a module. Those of an embedding, whose input is a token, have names of their own.
pub(crate) fn factor_names(module: &str) -> [String; 2] {
    let parts = if module == EMBED_TOKENS {
        ["lora_embedding_A", "lora_embedding_B"]
    } else {
        ["lora_A.weight", "lora_B.weight"]
    };
    parts.map(|part| format!("{module}.{part}"))
}

impl AdapterSpec {
    /// A fresh adapter for every module that `config` targets: A uniform in `±1/sqrt(in)` (PEFT's Kaiming initialisation),
    /// B zero, so that the model computes what it did before; an embedding's A zero and its B normal, as PEFT has it. Does not
    /// make `DoRA` magnitudes or replacements.
    ///
    /// # Errors
    /// If `config` targets no module of the model, or saves one that it does not have.
    pub fn init(config: AdapterConfig, model: &ModelConfig, seed: u64) -> Result<Self, Error> {
        let mut modules = BTreeMap::new();
        config.saved_whole(model)?;
        for (path, (out_features, in_features)) in modules::adaptable(model) {
            if !config.targets(&path)? {
                continue;
            }
            refuse_decomposed_ends(&config, &path)?;
            let (r, scaling) = config.rank_and_scaling(&path)?;
            let bound = 1.0 / (in_features as f64).sqrt();
            let mut key = [0; 8];
            key.copy_from_slice(&blake3::hash(path.as_bytes()).as_bytes()[..8]);
            let mut stream = Stream::new(seed, "lora_a", 0, u64::from_le_bytes(key));
            let (a, b) = if path == EMBED_TOKENS {
                (vec![0.0; r * in_features], (0..out_features * r).map(|_| stream.normal() as f32).collect())
            } else {
                let a = (0..r * in_features).map(|_| ((2.0 * stream.uniform() - 1.0) * bound) as f32).collect();
                (a, vec![0.0; out_features * r])
            };
            modules.insert(path, ModuleAdapter { r, in_features, out_features, scaling, a, b, magnitude: None });
        }
        if modules.is_empty() {
            let found = match config.modules_to_save.as_slice() {
                [] => config.target_modules.to_string(),
                saved => format!(
                    "{} without what `modules_to_save` trains whole ({})",
                    config.target_modules,
                    saved.join(", ")
                ),
            };
            return Err(Error::NoModule { key: "target_modules", found, there_are: modules::described(model) });
        }
        Ok(Self { config, modules, full_replacements: BTreeMap::new(), base_replacements: BTreeMap::new() })
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
        let is_tied = config.ensure_weight_tying && model.tie_word_embeddings;
        for (module, shape) in modules::adaptable(model) {
            if let Some(adapter) = reader.module(&config, &module, shape)? {
                modules.insert(module, adapter);
            }
        }
        let (mut full_replacements, mut base_replacements) = (BTreeMap::new(), reader.replacements(model)?);
        let saved = config.saved_whole(model)?;
        let is_trained = |name: &str| {
            let module = name.strip_suffix(".bias");
            saved.iter().any(|tensor| tensor.name == name)
                || match config.bias {
                    AdapterBias::None => false,
                    AdapterBias::All => module.is_some(),
                    AdapterBias::LoraOnly => module.is_some_and(|module| modules.contains_key(module)),
                }
        };
        full_replacements.extend(base_replacements.extract_if(.., |name, _| is_trained(name)));
        if let Some(missing) = saved.iter().find(|tensor| !full_replacements.contains_key(&tensor.name)) {
            let others = saved.iter().filter(|tensor| !full_replacements.contains_key(&tensor.name)).count() - 1;
            let (name, nearest) = (format!("{PREFIX}{}", missing.name), None);
            return Err(Error::MissingTensor { path, name, nearest, others });
        }
        let is_end = |name: &str| [LM_HEAD, EMBED_TOKENS].contains(&name.trim_end_matches(".weight"));
        if is_tied && (full_replacements.keys().any(|name| is_end(name)) || modules.keys().any(|name| is_end(name))) {
            return Err(Error::Unsupported {
                path: config_path,
                found: "`ensure_weight_tying: true` with an adapted or saved embedding or head".into(),
                supported: "`ensure_weight_tying: false`, with which they are two matrices".into(),
            });
        }
        if modules.is_empty() && full_replacements.is_empty() {
            return Err(Error::Damaged { path, reason: "it holds no adapter weights".into() });
        }
        Ok(Self { config, modules, full_replacements, base_replacements })
    }

    /// Whether a weight of the base model has another in its place.
    pub fn replaces(&self, name: &str) -> bool {
        self.full_replacements.contains_key(name) || self.base_replacements.contains_key(name)
    }

    /// Whether it trains weights of the base model whole, so that leaving the factors out does not give the base model.
    pub fn trains_whole_weights(&self) -> bool {
        !self.config.modules_to_save.is_empty() || self.config.bias != AdapterBias::None
    }

    /// Takes the values of a trained parameter, by its name in a block: a factor, a magnitude, or a weight trained whole.
    ///
    /// # Errors
    /// If `shape` is not that of as many values.
    pub fn set(&mut self, name: &str, shape: &[usize], values: &[f32]) -> Result<(), Error> {
        let of = |suffixes: &[&str]| suffixes.iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap_or_default();
        if let Some(adapter) = self.modules.get_mut(of(&[".lora_A.weight", ".lora_embedding_A"])) {
            adapter.a = values.to_vec();
        } else if let Some(adapter) = self.modules.get_mut(of(&[".lora_B.weight", ".lora_embedding_B"])) {
            adapter.b = values.to_vec();
        } else if let Some(adapter) = self.modules.get_mut(of(&[".lora_magnitude_vector"])) {
            adapter.magnitude = Some(values.to_vec());
        } else {
            let tensor = Tensor::from_slice(values, shape, &Device::Cpu).map_err(Error::tensor("saving", name))?;
            self.full_replacements.insert(name.into(), tensor);
        }
        Ok(())
    }

    /// What of it only the CPU computes, if something.
    pub fn needs_cpu(&self) -> Option<&'static str> {
        if self.config.use_dora {
            return Some("a weight-decomposed adapter (DoRA, `use_dora: true`)");
        }
        let on_head = self.modules.contains_key(LM_HEAD).then_some("an adapter on `lm_head`");
        on_head.or_else(|| self.modules.contains_key(EMBED_TOKENS).then_some("an adapter on `embed_tokens`"))
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
            let [name_a, name_b] = factor_names(module).map(|factor| format!("{PREFIX}{factor}"));
            tensors.push((name_a, Dtype::F32, vec![*r, *in_features], bytes(a)));
            tensors.push((name_b, Dtype::F32, vec![*out_features, *r], bytes(b)));
            if let Some(magnitude) = magnitude {
                tensors.push((name("lora_magnitude_vector"), Dtype::F32, vec![*out_features], bytes(magnitude)));
            }
        }
        for (name, tensor) in self.full_replacements.iter().chain(&self.base_replacements) {
            let dtype = match tensor.dtype() {
                DType::BF16 => Dtype::BF16,
                DType::F16 => Dtype::F16,
                _ => Dtype::F32,
            };
            let key = match name.rsplit_once('.') {
                // PEFT keeps the base module of an adapted one under another name.
                Some((module, part)) if self.modules.contains_key(module) => {
                    format!("{PREFIX}{module}.base_layer.{part}")
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

/// `DoRA` is computed in the projections only.
fn refuse_decomposed_ends(config: &AdapterConfig, module: &str) -> Result<(), Error> {
    if config.use_dora && [LM_HEAD, EMBED_TOKENS].contains(&module) {
        return Err(Error::Unsupported {
            path: CONFIG_FILE.into(),
            found: format!("DoRA (`use_dora: true`) on `{module}`"),
            supported: "DoRA on the projections of the layers; leave it out of the target modules".into(),
        });
    }
    Ok(())
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
        let [name_a, name_b] = factor_names(module).map(|factor| format!("{PREFIX}{factor}"));
        let is_stored = [&name_a, &name_b].into_iter().any(|name| self.tensors.contains_key(name));
        match (is_stored, config.targets(module)?) {
            (false, false) => return Ok(None),
            (true, false) => {
                return Err(self.damaged(format!("it adapts `{module}`, which adapter_config.json does not target")));
            }
            (_, true) => {}
        }
        let (r, scaling) = config.rank_and_scaling(module)?;
        refuse_decomposed_ends(config, module)?;
        let a = self.values(&name_a, &[r, in_features])?;
        let b = self.values(&name_b, &[out_features, r])?;
        let magnitude = if config.use_dora {
            let mut name = format!("{PREFIX}{module}.lora_magnitude_vector");
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
            others: 0,
        })?;
        if tensor.shape != shape {
            return Err(Error::Shape {
                path: self.path.into(),
                name: name.into(),
                found: tensor.shape,
                expected: shape.into(),
            });
        }
        let values = dense_to_f32(&tensor.read()?, self.dtype(name, tensor.dtype)?);
        match values.iter().filter(|value| !value.is_finite()).count() {
            0 => Ok(values),
            count => Err(Error::NotFinite { path: self.path.into(), name: name.into(), count }),
        }
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

    /// What is left must be weights of the base model.
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
