//! Weights of a Hugging Face folder: `model.safetensors`, or the shards that `model.safetensors.index.json` lists.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde_json::Value;

use super::bnb;
use super::stored::Stored;
use crate::fs::{self, Bytes, Region};
use crate::model::Error;
use crate::model::config::ModelConfig;

/// The weights in one file.
const SINGLE: &str = "model.safetensors";
/// The list of the shards.
const INDEX: &str = "model.safetensors.index.json";
/// The bytes before a safetensors header: its length.
const LENGTH_BYTES: usize = 8;
/// The longest header, as the format has it.
const MOST_HEADER_BYTES: usize = 100_000_000;

/// One tensor of a safetensors file.
#[derive(Clone, Debug)]
pub(crate) struct RawTensor {
    /// The file that holds it.
    pub(crate) file: Arc<Path>,
    /// How its elements are stored.
    pub(crate) dtype: Dtype,
    /// Slowest dimension first.
    pub(crate) shape: Vec<usize>,
    /// Where its elements lie, little-endian.
    pub(crate) region: Region,
}

impl RawTensor {
    /// Its elements.
    pub(crate) fn read(&self) -> Result<Bytes, Error> {
        Ok(self.region.read()?)
    }
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

/// Opens the weights of a folder.
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

/// Opens one safetensors file and reads its header.
pub(crate) fn read_safetensors(path: &Path) -> Result<BTreeMap<String, RawTensor>, Error> {
    let all = Region::open(path)?;
    let damaged = |reason: String| Error::Damaged { path: path.into(), reason };
    let length =
        all.slice(0..LENGTH_BYTES).ok_or_else(|| damaged(format!("it has only {} bytes", all.len())))?.read()?;
    let length = length.as_chunks::<LENGTH_BYTES>().0.first().map_or(0, |&bytes| u64::from_le_bytes(bytes));
    let header = usize::try_from(length).ok().filter(|&length| length <= MOST_HEADER_BYTES);
    let header = header.and_then(|length| all.slice(LENGTH_BYTES..LENGTH_BYTES + length)).ok_or_else(|| {
        damaged(format!("its first eight bytes are not the length of a header that fits into its {} bytes", all.len()))
    })?;
    let data_start = LENGTH_BYTES + header.len();
    let data = all.slice(data_start..all.len()).unwrap_or_else(|| header.clone());
    let metadata: Metadata =
        serde_json::from_slice(&header.read()?).map_err(|error| damaged(format!("its header is wrong: {error}")))?;
    let infos = metadata.tensors();
    if infos.values().map(|info| info.data_offsets.1).max().unwrap_or(0) != data.len() {
        return Err(damaged(format!("its {} bytes are not as many as its header lists", all.len())));
    }
    let file: Arc<Path> = path.into();
    let mut tensors = BTreeMap::new();
    for (name, info) in infos {
        let (from, to) = info.data_offsets;
        let region = data.slice(from..to);
        let region = region.ok_or_else(|| damaged(format!("tensor `{name}` reaches beyond the end of the file")))?;
        let tensor = RawTensor { file: file.clone(), dtype: info.dtype, shape: info.shape.clone(), region };
        tensors.insert(name, tensor);
    }
    Ok(tensors)
}

/// The files that hold the weights of a folder.
pub(super) fn weight_files(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    if folder.join(SINGLE).is_file() {
        return Ok(vec![folder.join(SINGLE)]);
    }
    let shards = Index::read(folder)?.shards;
    Ok(shards.iter().map(|shard| folder.join(shard)).collect())
}

/// `model.safetensors.index.json`.
struct Index {
    path: PathBuf,
    /// The file of each tensor.
    map: serde_json::Map<String, Value>,
    /// The files, each once.
    shards: BTreeSet<String>,
}

impl Index {
    fn read(folder: &Path) -> Result<Self, Error> {
        let path = folder.join(INDEX);
        let wrong = |found: &str| Error::Key {
            path: path.clone(),
            key: "weight_map".into(),
            found: found.into(),
            expected: "an object of tensor names and file names in the same folder".into(),
        };
        let Some(Value::Object(map)) = read_json(&path)?.get_mut("weight_map").map(Value::take) else {
            return Err(wrong("absent or no object"));
        };
        let mut shards = BTreeSet::new();
        for file in map.values() {
            let name = file.as_str().ok_or_else(|| wrong(&file.to_string()))?;
            // A file name only: an index must not reach outside its folder.
            if Path::new(name).file_name().is_none_or(|n| n != name) || name.contains('\\') {
                return Err(wrong(&format!("{name:?}")));
            }
            shards.insert(name.to_string());
        }
        Ok(Self { path, map, shards })
    }
}

/// Opens the shards of an index, and checks that each holds what the index says.
fn read_shards(folder: &Path) -> Result<BTreeMap<String, RawTensor>, Error> {
    let Index { path, map, shards } = Index::read(folder)?;
    let mut tensors = BTreeMap::new();
    for shard in &shards {
        let shard_path: PathBuf = folder.join(shard);
        if !shard_path.is_file() {
            return Err(Error::Damaged {
                path: path.clone(),
                reason: format!("it lists `{shard}`, which is not there"),
            });
        }
        for (name, tensor) in read_safetensors(&shard_path)? {
            if map.get(&name).and_then(Value::as_str) == Some(shard.as_str()) {
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
