//! Opening a model: files, tokenizer, chat template, blocks, engine.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, bail};
use candle_core::quantized::gguf_file::Content;

use super::Backend;
use crate::config::settings::{ModelSettings, TrainingSettings};
use crate::data::hub;
use crate::data::{ChatTemplate, Tokenizer};
use crate::engine::{Activations, Engine};
use crate::model::ModelConfig;
use crate::model::load::{LoadedModel, Purpose, load};
use crate::model::peft::AdapterSpec;
use crate::model::source::{StoredSizes, check_gguf_header, gguf_file_of};
use crate::telemetry::units;
use crate::zero::{Offload, ParamStore, Sharing};

/// A model ready to train or to speak.
pub struct Session {
    /// The model.
    pub engine: Engine,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its chat template, if it has one.
    pub template: Option<ChatTemplate>,
    /// Its adapter as PEFT describes it; the values are those at the start.
    pub adapter_spec: Option<AdapterSpec>,
    /// Where it lies on this machine.
    pub folder: PathBuf,
    /// What is to be said about the token that ends the assistant's turns, where it is not the tokenizer's own.
    pub end_of_turn: Option<String>,
    /// What is to be said about the stage of ZeRO.
    pub stage_note: Option<String>,
}

/// What turns rows into tokens.
#[derive(Clone, Copy)]
pub struct Text<'a> {
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Its chat template, if it has one.
    pub template: Option<&'a ChatTemplate>,
}

impl Session {
    /// What turns rows into tokens.
    pub fn text(&self) -> Text<'_> {
        Text { tokenizer: &self.tokenizer, template: self.template.as_ref() }
    }

    /// Where the model computes and in which types.
    pub fn backend(&self) -> Backend {
        Backend { device: self.engine.device().clone(), types: self.engine.types() }
    }
}

/// What the settings say about activations, and how many of the first layers it is for.
pub fn activations(settings: &TrainingSettings) -> (Activations, usize) {
    let activations = match (settings.gradient_checkpointing, settings.activation_offloading) {
        (false, _) => Activations::Keep,
        (true, false) => Activations::Recompute,
        (true, true) => Activations::Offload,
    };
    (activations, settings.gradient_checkpointing_layers.unwrap_or(usize::MAX))
}

/// Opens the model that `settings` name, as far as this rank keeps it. `first` is done when its tokenizer is there and before its
/// weights are read, which takes longest: what is wrong with a run's rows is said then.
///
/// # Errors
/// If a file is missing, damaged or does not fit the others, or as `first`.
pub fn open<T>(
    settings: &ModelSettings,
    seed: u64,
    purpose: Purpose,
    (activations, recomputed_layers): (Activations, usize),
    backend: &Backend,
    (sharing, offload): (Sharing, Offload),
    (progress, first): (&mut hub::Progress<'_>, impl FnOnce(Text<'_>, &mut hub::Progress<'_>) -> anyhow::Result<T>),
) -> anyhow::Result<(Session, T)> {
    let folder = local_path(&settings.model_name_or_path, &settings.model_revision, progress)
        .with_context(|| format!("cannot get the model `{}`", settings.model_name_or_path))?;
    let tokenizer_place = tokenizer_place(settings, progress)?.unwrap_or_else(|| folder.clone());
    let mut loaded = load(&folder, settings, seed, purpose, &backend.device)?;
    if !backend.device.is_cpu() {
        loaded.keep_embedding_on_host();
    }
    let LoadedModel { config, adapter, adapter_spec, blocks } = loaded;
    let mut tokenizer = open_tokenizer(&tokenizer_place)?;
    let template = super::turns::open_template(settings, &tokenizer_place, &mut tokenizer, progress)?;
    if tokenizer.vocab_size() > config.vocab_size {
        bail!(
            "the tokenizer in `{}` has {} tokens, the model `{}` only {}; they do not belong together",
            tokenizer_place.display(),
            tokenizer.vocab_size(),
            folder.display(),
            config.vocab_size
        );
    }
    if let (Some(folder), Some(lora), Some(spec)) = (&settings.adapter_name_or_path, &settings.lora, &adapter_spec) {
        let mut kept: Vec<String> = lora.modules_to_save.clone();
        kept.retain(|name| !spec.config.modules_to_save.contains(name));
        if !kept.is_empty() || (lora.use_dora && !spec.config.use_dora) {
            let kept =
                if kept.is_empty() { "use_dora".into() } else { format!("lora_modules_to_save: {}", kept.join(", ")) };
            tracing::warn!("the adapter in `{}` is as it was made; `{kept}` has no effect on it", folder.display());
        }
        let stored = (spec.config.r, spec.config.lora_alpha);
        if stored != (lora.r, lora.alpha) {
            tracing::warn!(
                "the adapter in `{}` has r={} alpha={}, which it keeps; `lora_r: {}` and `lora_alpha: {}` have no effect",
                folder.display(),
                stored.0,
                stored.1,
                lora.r,
                lora.alpha
            );
        }
    }
    let done = first(Text { tokenizer: &tokenizer, template: template.as_ref() }, progress)?;
    let started = Instant::now();
    let store =
        ParamStore::placed(blocks.map(|block| block.map_err(anyhow::Error::from)), &backend.device, sharing, offload)?;
    let mut engine = Engine::new(config, adapter, store, backend.types, activations);
    engine.set_recomputed_layers(recomputed_layers);
    let secs = started.elapsed().as_secs_f64();
    tracing::info!(
        "the model was read and packed, and is ready on {}, after {}",
        backend.describe(),
        units::duration(secs)
    );
    let session = Session { engine, tokenizer, template, adapter_spec, folder, end_of_turn: None, stage_note: None };
    Ok((session, done))
}

/// The sizes of the model that `settings` name, and what its files have of its weights if they are here; no weights are read, and none
/// downloaded.
///
/// # Errors
/// If there is no configuration, or it is not of a model of the family, or a file is damaged.
pub fn model_sizes(
    settings: &ModelSettings,
    progress: &mut hub::Progress<'_>,
) -> anyhow::Result<(ModelConfig, StoredSizes)> {
    let (name, revision) = (&settings.model_name_or_path, &settings.model_revision);
    let folder = fetched(name, revision, &["json"], progress)
        .with_context(|| format!("cannot get the configuration of the model `{name}`"))?;
    Ok(StoredSizes::read(&folder, settings.init_random)?)
}

/// The tokenizer and the chat template that a run with these settings has; no weights are read, and none downloaded where
/// the tokenizer has files of its own.
pub(super) fn open_text(
    settings: &ModelSettings,
    progress: &mut hub::Progress<'_>,
) -> anyhow::Result<(Tokenizer, Option<ChatTemplate>)> {
    let place = if let Some(place) = tokenizer_place(settings, progress)? {
        place
    } else {
        let (name, revision) = (&settings.model_name_or_path, &settings.model_revision);
        let of_text = fetched(name, revision, &["json", "jinja", "txt"], progress).ok();
        let place = match of_text.filter(|place| place.join("tokenizer.json").is_file()) {
            Some(place) => Ok(place),
            None => local_path(name, revision, progress),
        };
        place.with_context(|| format!("cannot get the model `{name}`"))?
    };
    let mut tokenizer = open_tokenizer(&place)?;
    let template = super::turns::open_template(settings, &place, &mut tokenizer, progress)?;
    Ok((tokenizer, template))
}

/// Where the tokenizer lies, if elsewhere than beside the model.
fn tokenizer_place(settings: &ModelSettings, progress: &mut hub::Progress<'_>) -> anyhow::Result<Option<PathBuf>> {
    let Some(name) = &settings.tokenizer_name_or_path else { return Ok(None) };
    let mut place = local_path(name, "main", progress).with_context(|| format!("cannot get the tokenizer `{name}`"))?;
    if place.is_file() && place.file_name().is_some_and(|name| name == "tokenizer.json") {
        place.pop();
    }
    Ok(Some(place))
}

/// A local path as it is; a hub id through the cache.
pub(super) fn local_path(name: &str, revision: &str, progress: &mut hub::Progress<'_>) -> anyhow::Result<PathBuf> {
    fetched(name, revision, &["json", "safetensors", "jinja", "txt", "gguf"], progress)
}

/// As [`local_path`], of a hub id only files with some extensions.
fn fetched(
    name: &str,
    revision: &str,
    extensions: &[&str],
    progress: &mut hub::Progress<'_>,
) -> anyhow::Result<PathBuf> {
    let path = Path::new(name);
    if path.exists() || !hub::is_repo_id(name) {
        return Ok(path.to_path_buf());
    }
    let is_wanted = |file: &str| {
        let extension = Path::new(file).extension().and_then(|e| e.to_str()).unwrap_or_default();
        !file.contains('/') && extensions.contains(&extension)
    };
    Ok(hub::fetch(name, hub::Kind::Model, revision, is_wanted, progress)?)
}

/// The tokenizer of a model folder or a GGUF file.
pub(super) fn open_tokenizer(place: &Path) -> anyhow::Result<Tokenizer> {
    if place.is_dir() && place.join("tokenizer.json").is_file() {
        return Ok(Tokenizer::from_folder(place)?);
    }
    let Some(file) = gguf_file_of(place)? else { return Ok(Tokenizer::from_folder(place)?) };
    check_gguf_header(&file)?;
    let opened = std::fs::File::open(&file).map_err(crate::fs::io_error("open", &file))?;
    let content = Content::read(&mut std::io::BufReader::new(opened))
        .with_context(|| format!("cannot read the tokenizer in `{}`", file.display()))?;
    Ok(Tokenizer::from_gguf(&content)?)
}
