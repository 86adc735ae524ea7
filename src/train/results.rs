//! What a run leaves at the top of its `output_dir`: which names are its own, and how the final model comes there.
//!
//! Only what is named here is ever moved or removed; everything else in the folder is somebody else's and stays.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use super::save;
use super::session::Session;
use super::shards::is_tensors_file;
use super::state::STATE_FILE;
use crate::checkpoint::{self, Checkpoint};
use crate::config::settings::ModelSettings;
use crate::fs::{self, io_error};

const ADAPTER: &[&str] = &["adapter_config.json", "adapter_model.safetensors"];
const WEIGHTS: &[&str] = &["model.safetensors", "model.safetensors.index.json"];
const MODEL_CONFIG: &str = "config.json";
const GENERATION_CONFIG: &str = "generation_config.json";
const TOKENIZER: &[&str] =
    &["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"];
/// What a run writes while it goes on.
const RECORDS: &[&str] = &["metrics.jsonl", "completions.jsonl", "config.resolved.yaml"];
pub(super) const CURVES: &str = "curves.svg";
const EVENTS_FOLDER: &str = "runs";
const EVENTS_PREFIX: &str = "events.out.tfevents.";

/// Which of an `output_dir`'s files a run starts from, where it is also the place of the model or the adapter.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct StartsFrom {
    model: bool,
    adapter: bool,
    tokenizer: bool,
}

impl StartsFrom {
    pub(super) fn of(output_dir: &Path, model: &ModelSettings) -> Self {
        let is_here = |place: &Path| is_same_place(output_dir, place);
        Self {
            model: is_here(Path::new(&model.model_name_or_path)),
            adapter: model.adapter_name_or_path.as_deref().is_some_and(is_here),
            tokenizer: model.tokenizer_name_or_path.as_deref().is_some_and(|place| is_here(Path::new(place))),
        }
    }
}

/// Whether two paths lead to one place.
pub(super) fn is_same_place(one: &Path, other: &Path) -> bool {
    let is_one_folder = || matches!((one.canonicalize(), other.canonicalize()), (Ok(one), Ok(other)) if one == other);
    one == other || is_one_folder()
}

/// Names of files, links included, in a folder.
fn file_names(folder: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let files = entries.filter(|entry| entry.file_type().is_ok_and(|kind| !kind.is_dir()));
    files.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// `model-00001-of-00003.safetensors`.
fn is_shard(name: &str) -> bool {
    let numbers = name.strip_prefix("model-").and_then(|rest| rest.strip_suffix(".safetensors"));
    let is_number = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    numbers.and_then(|numbers| numbers.split_once("-of-")).is_some_and(|(one, all)| is_number(one) && is_number(all))
}

fn is_weights(name: &str) -> bool {
    WEIGHTS.contains(&name) || is_shard(name)
}

/// Names of the final model or adapter of an earlier run, with what belongs to it. A configuration or a tokenizer
/// without weights beside it is not one.
pub(super) fn final_model(output_dir: &Path, starts_from: StartsFrom) -> Vec<String> {
    let names = file_names(output_dir);
    let has_adapter = !starts_from.adapter && names.iter().any(|name| ADAPTER.contains(&name.as_str()));
    let has_model = !starts_from.model && names.iter().any(|name| is_weights(name));
    let is_result = |name: &str| {
        has_adapter && ADAPTER.contains(&name)
            || has_model && (is_weights(name) || name == MODEL_CONFIG)
            || (has_adapter || has_model)
                && !starts_from.model
                && (name == GENERATION_CONFIG || !starts_from.tokenizer && TOKENIZER.contains(&name))
    };
    names.into_iter().filter(|name| is_result(name)).collect()
}

/// Names of the logs, the resolved configuration and TensorBoard's files.
pub(super) fn records(output_dir: &Path) -> Vec<String> {
    let names = file_names(output_dir);
    let mut found: Vec<String> =
        RECORDS.iter().filter(|name| names.contains(**name)).map(ToString::to_string).collect();
    let folder = output_dir.join(EVENTS_FOLDER);
    // Behind a link is somebody else's folder.
    if folder.symlink_metadata().is_ok_and(|metadata| metadata.is_dir()) {
        let events = file_names(&folder).into_iter().filter(|name| name.starts_with(EVENTS_PREFIX));
        found.extend(events.map(|name| format!("{EVENTS_FOLDER}/{name}")));
    }
    found
}

/// Names of the checkpoints for which `is_wanted` holds.
pub(super) fn checkpoints(
    output_dir: &Path,
    is_wanted: impl Fn(u64, &Path) -> bool,
) -> Result<Vec<String>, checkpoint::Error> {
    let all = checkpoint::written(output_dir)?.into_iter();
    let wanted = all.filter(|(step, path)| is_wanted(*step, path));
    Ok(wanted.filter_map(|(_, path)| Some(path.file_name()?.to_str()?.to_string())).collect())
}

/// Names of the folders with courses that earlier runs left.
pub(super) fn left_courses(output_dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(output_dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).filter(|n| checkpoint::is_left_course(n)).collect()
}

/// The model that a run leaves.
#[derive(Clone, Copy)]
pub(super) enum Final<'a> {
    /// That of a checkpoint.
    Best(&'a Path),
    /// What is trained now.
    Now,
}

/// Puts the final model into `output_dir`, on the first rank; the others are in [`save::help_to_write`] meanwhile if it is that of
/// now. It is written beside and moved in
/// when it is whole; weights of an earlier end that it does not replace are removed.
///
/// # Errors
/// If a file cannot be written, or the best checkpoint is damaged.
pub(super) fn publish(output_dir: &Path, session: &Session, which: Final<'_>) -> anyhow::Result<()> {
    let mut builder = tempfile::Builder::new();
    let staged = fs::shared(&mut builder, 0o777)
        .prefix(".partial-results-")
        .tempdir_in(output_dir)
        .map_err(io_error("create a folder in", output_dir))?;
    match which {
        Final::Best(best) => {
            copy_model(&checkpoint::open(best).context("the best model cannot be taken")?, staged.path())?;
        }
        Final::Now => save::write_model(staged.path(), session)?,
    }
    let mut names: Vec<String> = file_names(staged.path()).into_iter().collect();
    // What tells a reader which weights there are comes last.
    names.sort_by_key(|name| Path::new(name).extension().is_some_and(|extension| extension == "json"));
    for name in &names {
        let (from, to) = (staged.path().join(name), output_dir.join(name));
        fs::give_ordinary_permissions(&from)?;
        std::fs::rename(&from, &to).map_err(io_error("rename to", &to))?;
    }
    if session.adapter_spec.is_none() {
        for name in file_names(output_dir).iter().filter(|name| is_weights(name) && !names.contains(name)) {
            let path = output_dir.join(name);
            std::fs::remove_file(&path).map_err(io_error("remove the old", &path))?;
        }
    }
    Ok(fs::sync_folder(output_dir)?)
}

/// Copies the model of a checkpoint without the state of its run.
fn copy_model(checkpoint: &Checkpoint, folder: &Path) -> anyhow::Result<()> {
    let files = checkpoint.manifest().files.keys();
    for name in files.filter(|name| *name != STATE_FILE && !is_tensors_file(name)) {
        fs::copy(&checkpoint.path().join(name), &folder.join(name))?;
    }
    Ok(())
}

/// Brings the records of a course that was left back to the top, for a run that goes on from it.
pub(super) fn take_records(from: &Path, output_dir: &Path) -> anyhow::Result<()> {
    for name in records(from) {
        let to: PathBuf = output_dir.join(&name);
        if to.symlink_metadata().is_err() {
            fs::copy(&from.join(&name), &to)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder_with(names: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for name in names {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        folder
    }

    #[test]
    fn a_final_model_is_known_by_its_weights_and_nothing_else_is() {
        let foreign = [
            "README.md",
            "model-final.safetensors",
            "model-1-of-2.safetensors",
            "my_adapter_config.json",
            "adapter_config.json.bak",
            "vocab.json",
        ];
        let found = |own: &[&str], starts_from| {
            let folder = folder_with(&[own, &foreign].concat());
            final_model(folder.path(), starts_from)
        };
        let nothing = StartsFrom::default();
        let adapter = ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"];
        assert_eq!(found(&adapter, nothing), adapter);
        // A model's configuration beside an adapter is the user's.
        assert_eq!(found(&[&adapter[..], &["config.json"]].concat(), nothing), adapter);
        let shards =
            ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"];
        assert_eq!(found(&shards, nothing), shards);
        assert_eq!(found(&["config.json", "tokenizer.json", "chat_template.jinja"], nothing), [""; 0]);
        // An adapter trained in the folder of its base model.
        let from_model = StartsFrom { model: true, ..nothing };
        let both =
            ["adapter_config.json", "adapter_model.safetensors", "config.json", "model.safetensors", "tokenizer.json"];
        assert_eq!(found(&both, from_model), adapter[..2]);
        let from_adapter = StartsFrom { adapter: true, ..nothing };
        assert_eq!(found(&adapter, from_adapter), [""; 0]);
    }

    #[test]
    fn records_behind_a_link_are_somebody_elses() {
        let own = ["metrics.jsonl", "config.resolved.yaml", "runs/events.out.tfevents.1.host.2.0"];
        let folder = folder_with(&[&own[..], &["runs/notes.txt", "metrics.jsonl.old"]].concat());
        assert_eq!(records(folder.path()), own);
        #[cfg(unix)]
        {
            let other = folder_with(&[]);
            std::os::unix::fs::symlink(folder.path().join("runs"), other.path().join("runs")).unwrap();
            assert_eq!(records(other.path()), [""; 0]);
        }
    }
}
