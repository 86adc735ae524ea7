//! Which model is meant: the run's result, a checkpoint, an adapter, a model elsewhere, or the base.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use crate::checkpoint;
use crate::config::settings::{ModelSettings, TrainingSettings};
use crate::data::hub;
use crate::model::peft::{AdapterConfig, CONFIG_FILE};
use crate::model::source::read_json;
use crate::train::results::{self, StartsFrom, is_same_place};
use crate::train::session;

/// The word for the configuration's model without an adapter.
pub(super) const BASE: &str = "base";

/// A model to evaluate.
#[derive(Clone, Debug)]
pub(super) struct Choice {
    /// How it is opened.
    pub(super) settings: ModelSettings,
    /// What it is, for people.
    pub(super) described: String,
    /// Why it is this one, where nobody named it.
    pub(super) note: Option<String>,
    /// Optimizer steps behind a checkpoint.
    step: Option<u64>,
}

impl Choice {
    /// The model that the option `flag` names; without a name the run's result, or if there is none the model it starts from.
    ///
    /// # Errors
    /// If there is nothing of this name, a checkpoint is damaged, or an adapter was made for another model.
    pub(super) fn of(
        name: Option<&str>,
        flag: &str,
        model: &ModelSettings,
        training: &TrainingSettings,
        progress: &mut hub::Progress<'_>,
    ) -> anyhow::Result<Self> {
        match name {
            None => Self::of_run(model, training),
            Some(BASE) => Ok(Self::base(model)),
            Some(name) => {
                let revision = if name == model.model_name_or_path { model.model_revision.as_str() } else { "main" };
                let path = session::local_path(name, revision, progress)
                    .with_context(|| format!("cannot get the model `{name}` (`{flag}`)"))?;
                if !path.exists() {
                    bail!(
                        "`{flag} {name}`: there is nothing of this name; give a folder with an adapter, a `checkpoint-N`, a \
                         model folder, a .gguf file, a hub id, or `{BASE}`"
                    );
                }
                Self::at(name, &path, flag, model)
            }
        }
    }

    /// What the run left in `output_dir`, else what it starts from.
    fn of_run(model: &ModelSettings, training: &TrainingSettings) -> anyhow::Result<Self> {
        let folder = &training.output_dir;
        if !results::final_model(folder, StartsFrom::of(folder, model)).is_empty() {
            let note = "the run's result, in `output_dir`".to_string();
            let choice = Self::at(&folder.display().to_string(), folder, "output_dir", model)?;
            return Ok(Self { note: Some(note), ..choice });
        }
        let saved = checkpoint::newest_step(folder).map_or_else(String::new, |step| {
            format!("; `--model_path {}` is the newest checkpoint", folder.join(format!("checkpoint-{step}")).display())
        });
        let note = format!("the configuration's: `{}` has no result of a run{saved}", folder.display());
        let choice = match &model.adapter_name_or_path {
            Some(adapter) => Self::adapter(adapter, model),
            None => Self::base(model),
        };
        Ok(Self { note: Some(note), ..choice })
    }

    fn base(model: &ModelSettings) -> Self {
        let settings = ModelSettings { lora: None, adapter_name_or_path: None, ..model.clone() };
        let described = format!("`{}` without an adapter", model.model_name_or_path);
        Self { settings, described, note: None, step: None }
    }

    fn adapter(folder: &Path, model: &ModelSettings) -> Self {
        let settings = ModelSettings { adapter_name_or_path: Some(folder.into()), ..Self::base(model).settings };
        let described = format!("the adapter in `{}` on `{}`", folder.display(), model.model_name_or_path);
        Self { settings, described, note: None, step: None }
    }

    /// What lies at `path`, which `name` led to.
    fn at(name: &str, path: &Path, flag: &str, model: &ModelSettings) -> anyhow::Result<Self> {
        let is_checkpoint = path.join("manifest.json").is_file();
        let step = is_checkpoint.then(|| checkpoint::open(path).map(|whole| whole.step())).transpose()?;
        if path.join(CONFIG_FILE).is_file() {
            check_base(path, model)?;
            return Ok(Self { step, ..Self::adapter(path, model) });
        }
        let has_gguf = || {
            let mut files = std::fs::read_dir(path).into_iter().flatten().flatten();
            files.any(|file| file.path().extension().is_some_and(|ending| ending == "gguf"))
        };
        if path.is_dir() && !path.join("config.json").is_file() && !has_gguf() {
            let newest = checkpoint::newest_step(path).map_or_else(String::new, |step| {
                format!("; its newest checkpoint is `{}`", path.join(format!("checkpoint-{step}")).display())
            });
            bail!(
                "`{flag} {name}` holds no model: neither adapter_config.json nor config.json nor a .gguf file{newest}"
            );
        }
        let settings = ModelSettings {
            model_name_or_path: path.display().to_string(),
            model_revision: "main".into(),
            init_random: false,
            ..Self::base(model).settings
        };
        Ok(Self { settings, described: format!("`{name}`"), note: None, step })
    }

    pub(super) fn to_json(&self) -> Value {
        json!({
            "model": self.settings.model_name_or_path,
            "adapter": self.settings.adapter_name_or_path.as_ref().map(|path: &PathBuf| path.display().to_string()),
            "step": self.step,
            "described": self.described,
        })
    }
}

/// Refuses an adapter that says it was made for another model than the configuration's.
fn check_base(adapter: &Path, model: &ModelSettings) -> anyhow::Result<()> {
    let path = adapter.join(CONFIG_FILE);
    let config = AdapterConfig::from_json(&path, &read_json(&path)?)?;
    let wanted = &model.model_name_or_path;
    let Some(base) = config.base_model_name_or_path.filter(|base| !is_one_model(base, wanted)) else { return Ok(()) };
    bail!(
        "the adapter in `{}` was made for `{base}`, and the configuration's model is `{wanted}`; give its own with \
         `--set model_name_or_path={base}`, or, if the two are one model, write this name into `{}`",
        adapter.display(),
        path.display()
    );
}

/// Whether two names may be those of one model: one place, or the same last part.
fn is_one_model(one: &str, other: &str) -> bool {
    is_same_place(Path::new(one), Path::new(other)) || own_name(one) == own_name(other)
}

/// The last part of a path or hub id, in lower case and without an ending; a snapshot in the hub's cache has its folder's.
fn own_name(name: &str) -> String {
    let parts: Vec<&str> = name.split('/').filter(|part| !part.is_empty()).collect();
    let cached = parts.iter().find_map(|part| part.strip_prefix("models--")?.rsplit("--").next());
    let last = cached.or_else(|| parts.last().copied()).unwrap_or(name).to_lowercase();
    last.strip_suffix(".gguf").unwrap_or(&last).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_known_under_its_hub_id_its_folder_and_its_file() {
        for (one, other, is_one) in [
            ("Qwen/Qwen2.5-0.5B", "/models/qwen2.5-0.5b/", true),
            ("Qwen/Qwen2.5-0.5B", "models/Qwen2.5-0.5B.gguf", true),
            ("Qwen/Qwen2.5-0.5B", "/cache/models--Qwen--Qwen2.5-0.5B/snapshots/0123abcd", true),
            ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct", false),
            ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B", false),
        ] {
            assert_eq!(is_one_model(one, other), is_one, "{one} {other}");
        }
    }
}
