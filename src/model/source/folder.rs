//! Weights of a Hugging Face folder: `model.safetensors`, or the shards that `model.safetensors.index.json` lists.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use super::bnb;
use super::stored::Stored;
use crate::fs::{self, Bytes};
use crate::model::Error;
use crate::model::config::ModelConfig;

/// The weights in one file.
const SINGLE: &str = "model.safetensors";
/// The list of the shards.
const INDEX: &str = "model.safetensors.index.json";
/// The bytes before a safetensors header: its length.
const LENGTH_BYTES: usize = 8;

/// One tensor of a safetensors file.
#[derive(Clone, Debug)]
pub(crate) struct RawTensor {
    /// The file that holds it.
    pub(crate) file: Arc<Path>,
    /// How its elements are stored.
    pub(crate) dtype: Dtype,
    /// Slowest dimension first.
    pub(crate) shape: Vec<usize>,
    /// Its elements, little-endian.
    pub(crate) bytes: Bytes,
}

/// Reads a JSON file.
pub(crate) fn read_json(path: &Path) -> Result<Value, Error> {
    let text = std::fs::read(path).map_err(fs::io_error("read", path))?;
    serde_json::from_slice(&text).map_err(|source| Error::Json { path: path.into(), source })
}

/// Reads the configuration of a folder: `config.json`, and the ends of text out of `generation_config.json`.
pub(super) fn read_config(folder: &Path) -> Result<(ModelConfig, Option<bnb::StoredQuantization>), Error> {
    let path = folder.join("config.json");
    let content = read_json(&path)?;
    let mut config = ModelConfig::from_hf(&path, &content)?;
    let generation = folder.join("generation_config.json");
    if generation.is_file() {
        config = config.with_generation_config(&generation, &read_json(&generation)?)?;
    }
    Ok((config, bnb::StoredQuantization::from_config(&path, &content)?))
}

/// Whether a folder has weights in safetensors.
pub(super) fn has_weights(folder: &Path) -> bool {
    [SINGLE, INDEX].iter().any(|name| folder.join(name).is_file())
}

/// Maps the weights of a folder.
pub(super) fn open(
    folder: &Path,
    quantized: Option<bnb::StoredQuantization>,
) -> Result<BTreeMap<String, Stored>, Error> {
    let tensors = if folder.join(SINGLE).is_file() {
        read_safetensors(&folder.join(SINGLE))?
    } else if folder.join(INDEX).is_file() {
        read_shards(folder)?
    } else {
        let found =
            if folder.join("pytorch_model.bin").is_file() || folder.join("pytorch_model.bin.index.json").is_file() {
                "config.json and a pickled pytorch_model.bin, which is not read: save it as safetensors"
            } else {
                "config.json without weights (`init_random: true` takes random ones)"
            };
        return Err(Error::NoModel { path: folder.into(), found: found.into() });
    };
    bnb::gather(tensors, quantized)
}

/// Maps one safetensors file and reads its header.
pub(crate) fn read_safetensors(path: &Path) -> Result<BTreeMap<String, RawTensor>, Error> {
    let bytes = fs::map(path)?;
    let damaged = |reason: String| Error::Damaged { path: path.into(), reason };
    let (header, metadata) = SafeTensors::read_metadata(&bytes).map_err(|e| damaged(describe(&e, &bytes)))?;
    let start = LENGTH_BYTES + header;
    let file: Arc<Path> = path.into();
    let mut tensors = BTreeMap::new();
    for (name, info) in metadata.tensors() {
        let (from, to) = info.data_offsets;
        let range = from.checked_add(start).zip(to.checked_add(start)).map(|(from, to)| from..to);
        let slice = range.and_then(|range| bytes.slice(range));
        let slice = slice.ok_or_else(|| damaged(format!("tensor `{name}` reaches beyond the end of the file")))?;
        let tensor = RawTensor { file: file.clone(), dtype: info.dtype, shape: info.shape.clone(), bytes: slice };
        tensors.insert(name, tensor);
    }
    Ok(tensors)
}

fn describe(error: &safetensors::SafeTensorError, bytes: &[u8]) -> String {
    use safetensors::SafeTensorError as E;
    match error {
        E::HeaderTooSmall => format!("it has only {} bytes", bytes.len()),
        E::InvalidHeaderLength | E::HeaderTooLarge => {
            format!("its first eight bytes are not the length of a header that fits into its {} bytes", bytes.len())
        }
        E::MetadataIncompleteBuffer => format!("its {} bytes are not as many as its header lists", bytes.len()),
        other => other.to_string(),
    }
}

/// Maps the shards of an index, and checks that each holds what the index says.
fn read_shards(folder: &Path) -> Result<BTreeMap<String, RawTensor>, Error> {
    let path = folder.join(INDEX);
    let index = read_json(&path)?;
    let wrong = |found: &str| Error::Key {
        path: path.clone(),
        key: "weight_map".into(),
        found: found.into(),
        expected: "an object of tensor names and file names in the same folder".into(),
    };
    let map = index.get("weight_map").and_then(Value::as_object).ok_or_else(|| wrong("absent or no object"))?;
    let mut shards = BTreeSet::new();
    for file in map.values() {
        let name = file.as_str().ok_or_else(|| wrong(&file.to_string()))?;
        // A file name only: an index must not reach outside its folder.
        if Path::new(name).file_name().is_none_or(|n| n != name) {
            return Err(wrong(&format!("{name:?}")));
        }
        shards.insert(name);
    }
    let mut tensors = BTreeMap::new();
    for shard in shards {
        let shard_path: PathBuf = folder.join(shard);
        if !shard_path.is_file() {
            return Err(Error::Damaged {
                path: path.clone(),
                reason: format!("it lists `{shard}`, which is not there"),
            });
        }
        for (name, tensor) in read_safetensors(&shard_path)? {
            if map.get(&name).and_then(Value::as_str) == Some(shard) {
                tensors.insert(name, tensor);
            }
        }
    }
    if let Some((name, shard)) = map.iter().find(|(name, _)| !tensors.contains_key(name.as_str())) {
        return Err(Error::Damaged {
            path,
            reason: format!("it places tensor `{name}` in {shard}, which does not hold it"),
        });
    }
    Ok(tensors)
}
