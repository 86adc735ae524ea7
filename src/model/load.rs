//! From files to blocks: which weights stay frozen, which are trained, how adapters start.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use half::bf16;
use rayon::prelude::*;

use super::Error;
use super::adapter::AdapterSettings;
use super::config::{ModelConfig, TensorRole};
use super::ends::{EMBEDDING, LM_HEAD};
use super::params::{BlockInit, Trainable};
use super::peft::{AdapterConfig, AdapterSpec, ModuleAdapter};
use super::source::{LinearStorage, WeightSource};
use crate::config::settings::{LoraSettings, ModelSettings};
use crate::ops::buffer;
use crate::quant::{Nf4Matrix, Weight};
use crate::rng;

/// The module of the head in an adapter.
const LM_HEAD_MODULE: &str = "lm_head";

/// What the blocks are loaded for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Adapters (or, without any, all weights) are trained.
    Training,
    /// Nothing is trained.
    Inference,
}

/// A model in blocks: the embedding, the layers, the head.
#[derive(Debug)]
pub struct LoadedModel {
    /// Sizes.
    pub config: ModelConfig,
    /// Adapters, if there are some.
    pub adapter: Option<AdapterSettings>,
    /// The adapter as PEFT describes it, to save it again.
    pub adapter_spec: Option<AdapterSpec>,
    /// One entry per block, in the order of the walk.
    pub blocks: Vec<BlockInit>,
}

impl LoadedModel {
    /// Marks the token embedding to stay in host memory where blocks compute on a GPU, since a step reads a few of its rows;
    /// a tied head then has the table to itself. Nothing changes where the table is trained.
    pub fn keep_embedding_on_host(&mut self) {
        let Some((first, rest)) = self.blocks.split_first_mut() else { return };
        let Some(table) = first.frozen.get(EMBEDDING) else { return };
        if let Some(last) = rest.last_mut().filter(|_| self.config.tie_word_embeddings) {
            last.frozen.entry(LM_HEAD.into()).or_insert_with(|| table.clone());
        }
        first.stays_on_host.insert(EMBEDDING.into());
    }
}

/// Loads the model at `path` (a local folder or file) as `settings` say, one matrix at a time, into host memory; what
/// is quantised on the way from a file is quantised by `device`, and stays there if it is a GPU.
///
/// # Errors
/// If a file is missing, damaged or does not fit the configuration.
pub fn load(
    path: &Path,
    settings: &ModelSettings,
    seed: u64,
    purpose: Purpose,
    device: &Device,
) -> Result<LoadedModel, Error> {
    let (config, source) = WeightSource::open(path, settings.init_random.then_some(seed))?;
    let source = source.quantizing_on(device);
    let spec = match (&settings.adapter_name_or_path, &settings.lora) {
        (Some(folder), _) => Some(AdapterSpec::load(folder, &config)?),
        (None, Some(lora)) => {
            let described = AdapterConfig::new(lora, Some(&settings.model_name_or_path));
            Some(AdapterSpec::init(described, &config, seed)?)
        }
        (None, None) => None,
    };
    let trains_everything = purpose == Purpose::Training && spec.is_none();
    let storage = LinearStorage { quantization: settings.quantization, dtype: settings.dtype };
    let mut blocks = vec![BlockInit::default(); config.num_hidden_layers + 2];
    for shape in config.tensors() {
        let block = &mut blocks[block_of(&shape.name, &config)];
        if trains_everything {
            block.trainable.push(Trainable {
                values: values(&source, &shape.name)?,
                has_decay: matches!(shape.role, TensorRole::Embedding | TensorRole::Linear | TensorRole::Head),
                name: shape.name,
                shape: shape.shape,
            });
            continue;
        }
        let weight = match (shape.role, shape.shape.as_slice()) {
            (TensorRole::Linear, &[rows, cols]) => source.linear(&shape.name, (rows, cols), storage)?,
            (_, &[rows, cols]) => source.embedding(&shape.name, (rows, cols), settings.dtype)?,
            _ => Weight::Dense(source.vector(&shape.name)?),
        };
        block.frozen.insert(shape.name, weight);
    }
    let adapter = match &spec {
        None => None,
        Some(spec) => Some(attach(spec, &config, &mut blocks, purpose)?),
    };
    Ok(LoadedModel { config, adapter, adapter_spec: spec, blocks })
}

/// A model of the shape of a configuration, for measuring: projections of random 4-bit codes (NF4, double quantised), a fresh
/// adapter, and embedding, head, norms and biases of small random values. No weights are read.
///
/// # Errors
/// If the configuration is unusable.
pub fn random_packed(path: &Path, lora: &LoraSettings, seed: u64) -> Result<LoadedModel, Error> {
    let (config, _) = WeightSource::open(path, Some(seed))?;
    let spec = AdapterSpec::init(AdapterConfig::new(lora, None), &config, seed)?;
    let mut blocks = vec![BlockInit::default(); config.num_hidden_layers + 2];
    for (index, shape) in config.tensors().into_iter().enumerate() {
        let noise = |count: usize| -> Vec<bf16> {
            let key = rng::mix(seed ^ rng::mix(index as u64));
            // Sums of four bytes are near enough to normal.
            let value = |i: u64| {
                let bytes = rng::mix(key ^ i).to_le_bytes();
                bytes[..4].iter().map(|&b| f32::from(b) - 127.5).sum::<f32>()
                    * (config.initializer_range as f32 / 148.0)
            };
            (0..count as u64).into_par_iter().map(|i| bf16::from_f32(value(i))).collect()
        };
        let weight = match (shape.role, shape.shape.as_slice()) {
            (TensorRole::Linear, &[rows, cols]) => {
                let deviation = config.initializer_range as f32;
                Weight::Nf4(Nf4Matrix::noise(rows, cols, deviation, rng::mix(seed ^ rng::mix(index as u64))))
            }
            (TensorRole::Norm, _) => Weight::Dense(Tensor::ones(shape.shape.as_slice(), DType::F32, &Device::Cpu)?),
            (TensorRole::Bias, &[length]) => {
                Weight::Dense(Tensor::from_vec(noise(length), length, &Device::Cpu)?.to_dtype(DType::F32)?)
            }
            _ => {
                let values = noise(shape.shape.iter().product());
                Weight::Dense(Tensor::from_vec(values, shape.shape.as_slice(), &Device::Cpu)?)
            }
        };
        blocks[block_of(&shape.name, &config)].frozen.insert(shape.name, weight);
    }
    let adapter = Some(attach(&spec, &config, &mut blocks, Purpose::Training)?);
    Ok(LoadedModel { config, adapter, adapter_spec: Some(spec), blocks })
}

fn values(source: &WeightSource, name: &str) -> Result<Vec<f32>, Error> {
    Ok(buffer::to_vec(&source.tensor_f32(name)?)?)
}

/// The block a weight belongs to: 0 the embedding, then the layers, last the head.
fn block_of(name: &str, config: &ModelConfig) -> usize {
    if name == EMBEDDING {
        return 0;
    }
    let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
    layer.map_or(config.num_hidden_layers + 1, |layer| layer + 1)
}

/// Puts the adapter's tensors, and weights that it replaces whole, into the blocks.
fn attach(
    spec: &AdapterSpec,
    config: &ModelConfig,
    blocks: &mut [BlockInit],
    purpose: Purpose,
) -> Result<AdapterSettings, Error> {
    let mut settings = AdapterSettings { dropout: spec.config.lora_dropout, ..AdapterSettings::default() };
    for (module, adapter) in &spec.modules {
        if module == LM_HEAD_MODULE {
            return Err(Error::HeadAdapter);
        }
        let block = &mut blocks[block_of(module, config)];
        let ModuleAdapter { r, in_features, out_features, scaling, a, b, magnitude } = adapter;
        settings.scaling.insert(module.clone(), *scaling);
        put(block, format!("{module}.lora_A.weight"), vec![*r, *in_features], a.clone(), purpose)?;
        put(block, format!("{module}.lora_B.weight"), vec![*out_features, *r], b.clone(), purpose)?;
        if let Some(magnitude) = magnitude {
            let name = format!("{module}.lora_magnitude_vector");
            put(block, name, vec![*out_features], magnitude.clone(), purpose)?;
        }
    }
    let replaces = |name: &str| spec.full_replacements.contains_key(name);
    if config.tie_word_embeddings && replaces(EMBEDDING) && !replaces(LM_HEAD) {
        // The head of a tied model keeps the stored table when only the embedding is replaced.
        if let Some(table) = blocks[0].frozen.get(EMBEDDING).cloned() {
            blocks[config.num_hidden_layers + 1].frozen.insert(LM_HEAD.into(), table);
        }
    }
    for (name, tensor) in &spec.full_replacements {
        let values = buffer::to_vec(&tensor.to_dtype(DType::F32)?)?;
        put(&mut blocks[block_of(name, config)], name.clone(), tensor.dims().to_vec(), values, purpose)?;
    }
    Ok(settings)
}

/// Adds a tensor of the adapter to its block, in the place of a frozen one of that name.
fn put(
    block: &mut BlockInit,
    name: String,
    shape: Vec<usize>,
    values: Vec<f32>,
    purpose: Purpose,
) -> Result<(), Error> {
    block.frozen.remove(&name);
    match purpose {
        Purpose::Training => block.trainable.push(Trainable { name, shape, values, has_decay: true }),
        Purpose::Inference => {
            let tensor = Tensor::from_vec(values, shape, &Device::Cpu)?;
            block.frozen.insert(name, Weight::Dense(tensor));
        }
    }
    Ok(())
}
