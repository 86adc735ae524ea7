//! A whole model in Hugging Face's form: `config.json`, and `model.safetensors` or its shards and their index.
//!
//! Called at the end of full fine-tuning and by `trainer export`. Weights are asked for one at a time, in the order of
//! the forward pass, converted in pieces and written straight to the file: the model is never in memory twice. Each
//! file is written beside and renamed, then opened again and held against what was meant.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::{Map, Value, json};

use crate::fs;
use crate::model::Error;
use crate::model::config::{ModelConfig, TensorShape};
use crate::model::source::{RawTensor, read_json, read_safetensors};

/// A shard holds at most this many bytes of weights, as transformers has it, unless a single weight is larger.
pub const SHARD_BYTES: usize = 5_000_000_000;
/// Values converted at a time.
const PIECE: usize = 1 << 22;

/// The files of a saved model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedModel {
    /// `model.safetensors` or the shards.
    pub files: Vec<PathBuf>,
    /// Bytes of weights in them, headers not counted.
    pub weight_bytes: usize,
}

/// Writes a model into `folder`. `fetch` is asked for each weight of `config` by name, once, in order; it may return
/// any float type, on any device, in the weight's shape.
///
/// Weights are written as `dtype`: f32, bf16 or f16. Files of an earlier save that the new one does not replace are removed
/// once it is whole. The caller's folder becomes whole or absent as the caller arranges it.
///
/// # Errors
/// If `dtype` is none of the three, `fetch` fails or returns another shape, a file cannot be written, or a file does not
/// read back as written.
pub fn save_model<E: From<Error>>(
    folder: &Path,
    config: &ModelConfig,
    dtype: DType,
    shard_bytes: usize,
    mut fetch: impl FnMut(&str) -> Result<Tensor, E>,
) -> Result<SavedModel, E> {
    let file_dtype = match dtype {
        DType::F32 => Dtype::F32,
        DType::BF16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        other => {
            return Err(E::from(Error::Unsupported {
                path: folder.into(),
                found: format!("saving weights as {other:?}"),
                supported: "float32, bfloat16 and float16".into(),
            }));
        }
    };
    let shards = split(config.tensors(), dtype.size_in_bytes(), shard_bytes);
    let num_shards = shards.len();
    let mut saved = SavedModel { files: vec![], weight_bytes: 0 };
    let mut weight_map = Map::new();
    for (number, tensors) in (1..).zip(&shards) {
        let name = shard_name(number, num_shards);
        let path = folder.join(&name);
        let plan = plan(tensors, dtype, file_dtype);
        write_file(&path, &plan, dtype, &mut fetch)?;
        read_back(&path, &plan)?;
        saved.weight_bytes += plan.last().map_or(0, |(_, info)| info.data_offsets.1);
        saved.files.push(path);
        weight_map.extend(tensors.iter().map(|t| (t.name.clone(), Value::String(name.clone()))));
    }
    if num_shards > 1 {
        let total = saved.weight_bytes;
        let index = json!({
            "metadata": { "total_parameters": total / dtype.size_in_bytes(), "total_size": total },
            "weight_map": weight_map,
        });
        write_json(&folder.join("model.safetensors.index.json"), &index)?;
    }
    write_json(&folder.join("config.json"), &config.to_hf(dtype))?;
    remove_leftovers(folder, &saved.files, num_shards > 1)?;
    Ok(saved)
}

/// Writes `generation_config.json`, by which transformers and vLLM know when to stop: that of the base model in `base`
/// (a folder; where it has none, or is a file, a new one) with `eos` as the tokens that end generation.
///
/// # Errors
/// If the base model's file is not a JSON object, or the file cannot be written.
pub fn save_generation_config(folder: &Path, base: &Path, eos: &[u32], pad: Option<u32>) -> Result<(), Error> {
    let path = base.join("generation_config.json");
    let mut content = match read_json(&path) {
        Ok(Value::Object(content)) if path.is_file() => content,
        Ok(_) => return Err(Error::Damaged { path, reason: "it is not a JSON object".into() }),
        Err(error) if path.is_file() => return Err(error),
        Err(_) => Map::new(),
    };
    let ids = match eos {
        [] => Value::Null,
        [one] => json!(one),
        several => json!(several),
    };
    content.insert("eos_token_id".into(), ids);
    if let (Some(pad), None) = (pad, content.get("pad_token_id").filter(|id| !id.is_null())) {
        content.insert("pad_token_id".into(), json!(pad));
    }
    write_json(&folder.join("generation_config.json"), &Value::Object(content))
}

/// The name of a file of weights, as transformers gives it.
fn shard_name(number: usize, num_shards: usize) -> String {
    if num_shards == 1 {
        "model.safetensors".into()
    } else {
        format!("model-{number:05}-of-{num_shards:05}.safetensors")
    }
}

/// Cuts the list of weights into shards of at most `shard_bytes`.
fn split(tensors: Vec<TensorShape>, element_bytes: usize, shard_bytes: usize) -> Vec<Vec<TensorShape>> {
    let mut shards = vec![vec![]];
    let mut filled = 0;
    for tensor in tensors {
        let bytes = tensor.shape.iter().product::<usize>() * element_bytes;
        if filled > 0 && filled + bytes > shard_bytes {
            shards.push(vec![]);
            filled = 0;
        }
        filled += bytes;
        if let Some(shard) = shards.last_mut() {
            shard.push(tensor);
        }
    }
    shards
}

/// Where each weight of a file comes to lie.
fn plan(tensors: &[TensorShape], dtype: DType, file_dtype: Dtype) -> Vec<(String, TensorInfo)> {
    let mut offset = 0;
    let place = |tensor: &TensorShape| {
        let start = offset;
        offset += tensor.shape.iter().product::<usize>() * dtype.size_in_bytes();
        let info = TensorInfo { dtype: file_dtype, shape: tensor.shape.clone(), data_offsets: (start, offset) };
        (tensor.name.clone(), info)
    };
    tensors.iter().map(place).collect()
}

fn write_file<E: From<Error>>(
    path: &Path,
    plan: &[(String, TensorInfo)],
    dtype: DType,
    fetch: &mut impl FnMut(&str) -> Result<Tensor, E>,
) -> Result<(), E> {
    let header = header(path, plan)?;
    // The writer's closure can only return an I/O error; any other error waits here.
    let mut failure: Option<E> = None;
    let written = fs::write_atomic_with(path, |writer| {
        writer.write_all(&header)?;
        for (name, info) in plan {
            let outcome = fetch(name).and_then(|tensor| {
                if tensor.dims() == info.shape {
                    Ok(tensor)
                } else {
                    let (found, expected) = (tensor.dims().to_vec(), info.shape.clone());
                    Err(E::from(Error::Shape { path: path.into(), name: name.clone(), found, expected }))
                }
            });
            let written = outcome.map(|tensor| write_tensor(writer, name, &tensor, dtype));
            match written {
                Ok(Ok(())) => {}
                Ok(Err(Interruption::Io(error))) => return Err(error),
                Ok(Err(Interruption::Tensor(error))) => {
                    failure = Some(E::from(error));
                    return Err(std::io::Error::other("converting a weight failed"));
                }
                Err(error) => {
                    failure = Some(error);
                    return Err(std::io::Error::other("no weight to write"));
                }
            }
        }
        Ok(())
    });
    match (failure, written) {
        (Some(error), _) => Err(error),
        (None, written) => written.map_err(|error| E::from(Error::from(error))),
    }
}

/// The length and the header that stand before the weights.
fn header(path: &Path, plan: &[(String, TensorInfo)]) -> Result<Vec<u8>, Error> {
    let format = [("format".to_string(), "pt".to_string())].into_iter().collect();
    let metadata = Metadata::new(Some(format), plan.to_vec())
        .map_err(|error| Error::ReadBack { path: path.into(), reason: error.to_string() })?;
    let mut json = serde_json::to_vec(&metadata).map_err(|source| Error::Json { path: path.into(), source })?;
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    Ok(header)
}

enum Interruption {
    Io(std::io::Error),
    Tensor(Error),
}

/// Writes the elements of a weight, a piece at a time.
fn write_tensor(writer: &mut impl Write, name: &str, tensor: &Tensor, dtype: DType) -> Result<(), Interruption> {
    let failed = |source| Interruption::Tensor(Error::tensor("saving", name)(source));
    let flat = tensor.flatten_all().map_err(failed)?;
    let mut start = 0;
    while start < flat.elem_count() {
        let length = PIECE.min(flat.elem_count() - start);
        let bytes = flat.narrow(0, start, length).and_then(|piece| tensor_bytes(&piece, dtype)).map_err(failed)?;
        writer.write_all(&bytes).map_err(Interruption::Io)?;
        start += length;
    }
    Ok(())
}

/// The elements of a tensor as `dtype` (f32, bf16 or f16), row-major, little-endian.
pub(crate) fn tensor_bytes(tensor: &Tensor, dtype: DType) -> candle_core::Result<Vec<u8>> {
    let flat = tensor.flatten_all()?.to_device(&Device::Cpu)?.to_dtype(dtype)?;
    Ok(match dtype {
        DType::BF16 => little_endian(&flat.to_vec1()?, half::bf16::to_le_bytes),
        DType::F16 => little_endian(&flat.to_vec1()?, half::f16::to_le_bytes),
        _ => little_endian(&flat.to_dtype(DType::F32)?.to_vec1()?, f32::to_le_bytes),
    })
}

/// The bytes of values one after the other.
pub(crate) fn little_endian<T: Copy, const N: usize>(values: &[T], bytes_of: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * N];
    bytes.as_chunks_mut::<N>().0.iter_mut().zip(values).for_each(|(bytes, &value)| *bytes = bytes_of(value));
    bytes
}

/// Opens a written file again and holds its header and its length against the plan.
fn read_back(path: &Path, plan: &[(String, TensorInfo)]) -> Result<(), Error> {
    let found: BTreeMap<String, RawTensor> = read_safetensors(path)?;
    let differs = |reason| Error::ReadBack { path: path.into(), reason };
    if found.len() != plan.len() {
        return Err(differs(format!("{} tensors instead of {}", found.len(), plan.len())));
    }
    for (name, info) in plan {
        let length = info.data_offsets.1 - info.data_offsets.0;
        let same =
            found.get(name).is_some_and(|t| t.shape == info.shape && t.dtype == info.dtype && t.region.len() == length);
        if !same {
            return Err(differs(format!("tensor `{name}`")));
        }
    }
    Ok(())
}

/// Writes JSON with a line break at the end.
pub(crate) fn write_json(path: &Path, content: &Value) -> Result<(), Error> {
    let mut text = serde_json::to_vec_pretty(content).map_err(|source| Error::Json { path: path.into(), source })?;
    text.push(b'\n');
    Ok(fs::write_atomic(path, &text)?)
}

/// Removes weights of an earlier save, which a reader would take instead of or besides the new ones.
fn remove_leftovers(folder: &Path, files: &[PathBuf], is_sharded: bool) -> Result<(), Error> {
    let entries = std::fs::read_dir(folder).map_err(fs::io_error("list", folder))?;
    for path in entries.flatten().map(|entry| entry.path()) {
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        let is_weights = name == "model.safetensors"
            || (name == "model.safetensors.index.json" && !is_sharded)
            || (name.starts_with("model-") && name.ends_with(".safetensors"));
        if is_weights && !files.contains(&path) {
            std::fs::remove_file(&path).map_err(fs::io_error("remove", &path))?;
        }
    }
    Ok(fs::sync_folder(folder)?)
}
