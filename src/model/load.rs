//! From files to blocks: which weights stay frozen, which are trained, how adapters start.

use std::path::Path;

use candle_core::Device;

use super::Error;
use super::adapter::AdapterSettings;
use super::blocks::{Blocks, Values};
use super::config::{ModelConfig, TensorRole, TensorShape};
use super::ends::{EMBEDDING, LM_HEAD};
pub use super::noise::RandomStorage;
use super::peft::{AdapterConfig, AdapterSpec};
use super::source::{LinearStorage, WeightSource};
use crate::config::settings::{LoraSettings, ModelSettings};
use crate::kernels::cpu::vector;

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
    /// The blocks in the order of the walk, each made when it is asked for.
    pub blocks: Blocks,
}

impl LoadedModel {
    /// See [`Blocks::keep_embedding_on_host`].
    pub fn keep_embedding_on_host(&mut self) {
        self.blocks.keep_embedding_on_host();
    }
}

/// Opens the model at `path` (a local folder or file) and prepares its blocks as `settings` say. They are read one after the
/// other, one matrix at a time, into host memory; what is quantised on the way from a file is quantised by `device`, and
/// stays there if it is a GPU.
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
    let storage = LinearStorage { quantization: settings.quantization, dtype: settings.dtype };
    if let Some(what) = spec.as_ref().filter(|_| !device.is_cpu()).and_then(AdapterSpec::needs_cpu) {
        return Err(Error::NeedsCpu { what });
    }
    if let Some(spec) = spec.as_mut().filter(|spec| spec.config.use_dora) {
        decompose(spec, &source, storage)?;
    }
    let adapter = spec.as_ref().map(settings_of);
    let replacements = spec.clone();
    if let Some(spec) = spec.as_mut().filter(|_| purpose == Purpose::Training) {
        // Their values are in the blocks, and change there.
        spec.full_replacements.clear();
    }
    let values = Values::Files { source: Box::new(source), storage };
    let blocks = Blocks::new(&config, values, replacements, purpose);
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

/// A model of the shape of a configuration, for measuring: projections of random packed values, a fresh adapter, and norms, biases
/// and what else the storage leaves dense of small random values. No weights are read.
///
/// # Errors
/// If the configuration is unusable.
pub fn random_packed(
    path: &Path,
    lora: &LoraSettings,
    seed: u64,
    storage: RandomStorage,
) -> Result<LoadedModel, Error> {
    let (config, _) = WeightSource::open(path, Some(seed))?;
    let spec = AdapterSpec::init(AdapterConfig::new(lora, None), &config, seed)?;
    let blocks = Blocks::new(&config, Values::Noise { seed, storage }, Some(spec.clone()), Purpose::Training);
    Ok(LoadedModel { config, adapter: Some(settings_of(&spec)), adapter_spec: Some(spec), blocks })
}

/// What the layers need to know of an adapter.
fn settings_of(spec: &AdapterSpec) -> AdapterSettings {
    let scaling = spec.modules.iter().map(|(module, adapter)| (module.clone(), adapter.scaling)).collect();
    AdapterSettings { dropout: spec.config.lora_dropout, scaling }
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
/// (2402.09353 eq. 5). The base's matrices are read for it, one at a time, and once more when their block is made.
fn decompose(spec: &mut AdapterSpec, source: &WeightSource, storage: LinearStorage) -> Result<(), Error> {
    const PANEL: usize = 64;
    for (module, adapter) in spec.modules.iter_mut().filter(|(_, adapter)| adapter.magnitude.is_none()) {
        let shape = (adapter.out_features, adapter.in_features);
        let weight = source.linear(&format!("{module}.weight"), shape, storage)?;
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
