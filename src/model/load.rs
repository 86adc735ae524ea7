//! From files to blocks: which weights stay frozen, which are trained, how adapters start.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use half::bf16;
use rayon::prelude::*;

use super::Error;
use super::adapter::AdapterSettings;
use super::config::{ModelConfig, TensorRole, TensorShape};
use super::ends::{EMBEDDING, LM_HEAD};
use super::params::{BlockInit, SharedParam, Trainable};
use super::peft::{AdapterConfig, AdapterSpec, ModuleAdapter, factor_names};
use super::source::{LinearStorage, WeightSource};
use crate::config::settings::{LoraSettings, ModelSettings};
use crate::kernels::cpu::vector;
use crate::ops::buffer;
use crate::quant::{Nf4Matrix, Weight};
use crate::rng;

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
    /// The adapter as PEFT describes it, to save it again with the values that the blocks have then.
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
        for block in rest {
            for SharedParam { name, .. } in block.shared.extract_if(.., |s| s.of_block == 0 && s.of_name == EMBEDDING) {
                block.frozen.insert(name, table.clone());
            }
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
    warn_of_unused(path, &config, source.unused());
    let mut spec = match (&settings.adapter_name_or_path, &settings.lora) {
        (Some(folder), lora) => {
            let mut spec = AdapterSpec::load(folder, &config)?;
            if lora.as_ref().is_some_and(|lora| lora.dropout == 0.0) {
                spec.config.lora_dropout = 0.0;
            }
            Some(spec)
        }
        (None, Some(lora)) => {
            let described = AdapterConfig::new(lora, Some(&settings.model_name_or_path));
            let idle = described.idle_targets(&config)?;
            let mut spec = AdapterSpec::init(described, &config, seed)?;
            if purpose == Purpose::Training {
                copy_saved(&mut spec, &source, &config, settings.quantization.is_some())?;
            }
            if !idle.is_empty() {
                tracing::warn!("`lora_target_modules`: this model has no module {}", idle.join(", "));
            }
            Some(spec)
        }
        (None, None) => None,
    };
    let trains_everything = purpose == Purpose::Training && spec.is_none();
    let storage = LinearStorage { quantization: settings.quantization, dtype: settings.dtype };
    if let Some(what) = spec.as_ref().filter(|_| !device.is_cpu()).and_then(AdapterSpec::needs_cpu) {
        return Err(Error::NeedsCpu { what });
    }
    let is_replaced = |name: &str| spec.as_ref().is_some_and(|spec| spec.replaces(name));
    // The head of a tied model keeps the stored table when only the embedding is replaced.
    let head_keeps_table = config.tie_word_embeddings && is_replaced(EMBEDDING) && !is_replaced(LM_HEAD);
    let mut blocks = vec![BlockInit::default(); config.num_hidden_layers + 2];
    for shape in config.tensors() {
        let block = &mut blocks[block_of(&shape.name, &config)];
        if trains_everything {
            block.trainable.push(Trainable {
                values: values(&source, &shape.name)?,
                has_decay: has_decay(&shape.name),
                name: shape.name,
                shape: shape.shape,
            });
            continue;
        }
        if is_replaced(&shape.name) && !(head_keeps_table && shape.name == EMBEDDING) {
            continue;
        }
        let weight = match (shape.role, shape.shape.as_slice()) {
            (TensorRole::Linear, &[rows, cols]) => source.linear(&shape.name, (rows, cols), storage)?,
            (_, &[rows, cols]) => source.embedding(&shape.name, (rows, cols), settings.dtype)?,
            _ => Weight::Dense(source.vector(&shape.name)?),
        };
        block.frozen.insert(shape.name, weight);
    }
    if head_keeps_table && let Some(table) = blocks[0].frozen.remove(EMBEDDING) {
        blocks[config.num_hidden_layers + 1].frozen.insert(LM_HEAD.into(), table);
    }
    if let Some(spec) = spec.as_mut().filter(|spec| spec.config.use_dora) {
        decompose(spec, &blocks, &config)?;
    }
    let adapter = match &spec {
        None => None,
        Some(spec) => Some(attach(spec, &config, &mut blocks, purpose)?),
    };
    tie(&config, &mut blocks);
    if let Some(spec) = spec.as_mut().filter(|_| purpose == Purpose::Training) {
        // Their values are in the blocks now, and change there.
        spec.full_replacements.clear();
    }
    Ok(LoadedModel { config, adapter, adapter_spec: spec, blocks })
}

/// Says which stored tensors are left out, but for those that the model's form makes useless.
fn warn_of_unused(path: &Path, config: &ModelConfig, names: &[String]) {
    let is_meant =
        |name: &str| (name == LM_HEAD && config.tie_word_embeddings) || name.ends_with("rotary_emb.inv_freq");
    let unused: Vec<&str> = names.iter().map(String::as_str).filter(|name| !is_meant(name)).collect();
    if let [first, ..] = unused.as_slice() {
        tracing::warn!(
            "`{}`: {} stored tensors are not used by this model (first: `{first}`); check that config.json belongs to them",
            path.display(),
            unused.len()
        );
    }
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
    tie(&config, &mut blocks);
    Ok(LoadedModel { config, adapter, adapter_spec: Some(spec), blocks })
}

fn values(source: &WeightSource, name: &str) -> Result<Vec<f32>, Error> {
    Ok(buffer::to_vec(&source.tensor_f32(name)?)?)
}

/// The block a weight belongs to: 0 the embedding, then the layers, last the head.
fn block_of(name: &str, config: &ModelConfig) -> usize {
    // And its adapter.
    if name.starts_with("model.embed_tokens") {
        return 0;
    }
    let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
    layer.map_or(config.num_hidden_layers + 1, |layer| layer + 1)
}

/// Lets the head of a tied model read the embedding's table, unless it has one of its own.
fn tie(config: &ModelConfig, blocks: &mut [BlockInit]) {
    let Some(head) = blocks.last_mut().filter(|_| config.tie_word_embeddings) else { return };
    let has_own = head.frozen.contains_key(LM_HEAD) || head.trainable.iter().any(|t| t.name == LM_HEAD);
    if !has_own {
        head.shared.push(SharedParam { name: LM_HEAD.into(), of_block: 0, of_name: EMBEDDING.into() });
    }
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
        let block = &mut blocks[block_of(module, config)];
        let ModuleAdapter { r, in_features, out_features, scaling, a, b, magnitude } = adapter;
        settings.scaling.insert(module.clone(), *scaling);
        let [name_a, name_b] = factor_names(module);
        put(block, name_a, vec![*r, *in_features], a.clone(), purpose)?;
        put(block, name_b, vec![*out_features, *r], b.clone(), purpose)?;
        if let Some(magnitude) = magnitude {
            let name = format!("{module}.lora_magnitude_vector");
            put(block, name, vec![*out_features], magnitude.clone(), purpose)?;
        }
    }
    for (name, tensor) in &spec.full_replacements {
        let values = buffer::to_vec(&tensor.to_dtype(DType::F32)?)?;
        put(&mut blocks[block_of(name, config)], name.clone(), tensor.dims().to_vec(), values, purpose)?;
    }
    for (name, tensor) in &spec.base_replacements {
        let weight = Weight::dense(tensor).map_err(crate::ops::Error::from)?;
        blocks[block_of(name, config)].frozen.insert(name.clone(), weight);
    }
    Ok(settings)
}

/// Copies of the weights that a fresh adapter trains whole.
fn copy_saved(
    spec: &mut AdapterSpec,
    source: &WeightSource,
    config: &ModelConfig,
    is_packed: bool,
) -> Result<(), Error> {
    for TensorShape { name, role, .. } in spec.config.saved_whole(config)? {
        if role == TensorRole::Linear && is_packed {
            return Err(Error::PackedModule { name });
        }
        // The copy of a tied head starts as the table.
        let stored = if name == LM_HEAD && config.tie_word_embeddings { EMBEDDING } else { &name };
        spec.full_replacements.insert(name.clone(), source.tensor_f32(stored)?);
    }
    Ok(())
}

/// Gives a fresh weight-decomposed adapter its magnitudes: the norms of the rows of the base, to which B A adds nothing yet
/// (2402.09353 eq. 5).
fn decompose(spec: &mut AdapterSpec, blocks: &[BlockInit], config: &ModelConfig) -> Result<(), Error> {
    const PANEL: usize = 64;
    for (module, adapter) in spec.modules.iter_mut().filter(|(_, adapter)| adapter.magnitude.is_none()) {
        let name = format!("{module}.weight");
        let weight = blocks[block_of(module, config)].frozen.get(&name).ok_or(Error::MissingParameter { name })?;
        let mut panel = vec![0.0; PANEL * weight.cols()];
        let mut norms = Vec::with_capacity(weight.rows());
        for start in (0..weight.rows()).step_by(PANEL) {
            let rows = PANEL.min(weight.rows() - start);
            let panel = &mut panel[..rows * weight.cols()];
            weight.dequantize_rows_into(start..start + rows, panel).map_err(crate::ops::Error::from)?;
            norms.extend(panel.chunks_exact(weight.cols()).map(|row| vector::dot(row, row).sqrt()));
        }
        adapter.magnitude = Some(norms);
    }
    Ok(())
}

/// Whether weight decay applies: not to biases and norms, as transformers' `get_decay_parameter_names` has it.
fn has_decay(name: &str) -> bool {
    !name.contains("norm") && name.rsplit('.').next() != Some("bias")
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
        Purpose::Training => {
            let has_decay = has_decay(&name);
            block.trainable.push(Trainable { name, shape, values, has_decay });
        }
        Purpose::Inference => {
            let tensor = Tensor::from_vec(values, shape, &Device::Cpu)?;
            block.frozen.insert(name, Weight::Dense(tensor));
        }
    }
    Ok(())
}
