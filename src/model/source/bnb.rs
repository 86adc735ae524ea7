//! 4-bit checkpoints as transformers and bitsandbytes save them.
//!
//! A quantised `X.weight` lies as packed bytes beside `X.weight.absmax`, `X.weight.quant_map`, with double quantisation
//! `X.weight.nested_absmax` and `X.weight.nested_quant_map`, and `X.weight.quant_state.bitsandbytes__nf4` (or `__fp4`): JSON
//! as bytes, with the shape, the block sizes and the offset. [`gather`] puts these together; every other tensor passes
//! through as a dense one.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::DType;
use safetensors::Dtype;
use serde_json::Value;

use super::folder::RawTensor;
use super::stored::{Packing, Stored};
use crate::fs::Region;
use crate::model::Error;
use crate::quant::{self, BitsandbytesParts};

/// What the suffix of the JSON tensor begins with.
const STATE: &str = "quant_state.bitsandbytes__";

/// That a checkpoint is stored in 4 bits, from its `quantization_config`.
#[derive(Clone, Copy, Debug)]
pub(super) struct StoredQuantization {
    /// Whether maxima of blocks are quantised too.
    pub(super) double_quant: bool,
}

impl StoredQuantization {
    /// Looks at a `config.json`.
    pub(super) fn from_config(path: &Path, content: &Value) -> Result<Option<Self>, Error> {
        let Some(config) = content.get("quantization_config").filter(|c| !c.is_null()) else { return Ok(None) };
        let unsupported = |found: String| Error::Unsupported {
            path: path.into(),
            found,
            supported: "bitsandbytes 4-bit (nf4, fp4), GGUF files and unquantised weights; use the unquantised model \
                        with `load_in_4bit: true`"
                .into(),
        };
        let method = config.get("quant_method").and_then(Value::as_str).unwrap_or("bitsandbytes");
        if method != "bitsandbytes" {
            return Err(unsupported(format!("weights quantised by `{method}`")));
        }
        let flag = |key: &str| config.get(key).and_then(Value::as_bool) == Some(true);
        if flag("load_in_4bit") || flag("_load_in_4bit") {
            return Ok(Some(Self { double_quant: flag("bnb_4bit_use_double_quant") }));
        }
        Err(unsupported("a bitsandbytes checkpoint that is not 4-bit".into()))
    }
}

/// The tensors that belong to one 4-bit matrix beside its packed codes.
#[derive(Clone, Debug)]
pub(super) struct QuantState {
    /// By the suffix of their names: `absmax`, `quant_map`, `quant_state.bitsandbytes__nf4`, ...
    parts: BTreeMap<String, RawTensor>,
}

impl QuantState {
    /// Bytes in the file.
    pub(super) fn num_bytes(&self) -> usize {
        self.parts.values().map(|part| part.region.len()).sum()
    }

    /// Reads the parts of the matrix whose packed codes are `weight`.
    pub(super) fn read(&self, weight: &Region) -> Result<Result<BitsandbytesParts, quant::Error>, Error> {
        let optional = |suffix: &str| self.parts.get(suffix).map(RawTensor::read).transpose();
        let missing = |part: &'static str| {
            let problem = "is missing; copy or download the checkpoint again".into();
            Ok(Err(quant::Error::Checkpoint { part, problem }))
        };
        let state = self.parts.iter().find(|(suffix, _)| suffix.starts_with(STATE));
        let Some((_, state)) = state else { return missing(STATE) };
        let Some(absmax) = optional("absmax")? else { return missing("absmax") };
        let Some(quant_map) = optional("quant_map")? else { return missing("quant_map") };
        Ok(Ok(BitsandbytesParts {
            weight: weight.read()?,
            absmax,
            quant_map,
            nested_absmax: optional("nested_absmax")?,
            nested_quant_map: optional("nested_quant_map")?,
            quant_state: state.read()?,
        }))
    }
}

/// Puts the parts of 4-bit weights together and takes every other tensor as dense.
pub(super) fn gather(
    mut tensors: BTreeMap<String, RawTensor>,
    quantized: Option<StoredQuantization>,
) -> Result<BTreeMap<String, Stored>, Error> {
    let mut stored = BTreeMap::new();
    if quantized.is_some() {
        let weights: BTreeSet<String> =
            tensors.keys().filter_map(|name| Some(name.split_once(STATE)?.0.strip_suffix('.')?.into())).collect();
        for weight in weights {
            let matrix = gather_one(&mut tensors, &weight)?;
            stored.insert(weight, matrix);
        }
    }
    for (name, tensor) in tensors {
        let dtype = match tensor.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            // Buffers that some releases saved, such as masks; an error only where a block asks for one.
            _ if !matches!(name.rsplit('.').next(), Some("weight" | "bias")) => continue,
            other => {
                return Err(Error::Dtype {
                    path: tensor.file.to_path_buf(),
                    name,
                    found: format!("{other:?}"),
                    supported: "F32, F16 and BF16, and U8 in 4-bit checkpoints whose config.json has a \
                                quantization_config",
                });
            }
        };
        let (file, shape, region) = (tensor.file, tensor.shape, tensor.region);
        stored.insert(name.clone(), Stored { file, name, shape, region, packing: Packing::Dense(dtype) });
    }
    Ok(stored)
}

/// Takes the tensors of one 4-bit matrix out of all.
fn gather_one(tensors: &mut BTreeMap<String, RawTensor>, weight: &str) -> Result<Stored, Error> {
    let prefix = format!("{weight}.");
    let names: Vec<String> =
        tensors.range(prefix.clone()..).map(|(n, _)| n).take_while(|n| n.starts_with(&prefix)).cloned().collect();
    let parts: BTreeMap<String, RawTensor> =
        names.iter().filter_map(|name| Some((name[prefix.len()..].to_string(), tensors.remove(name)?))).collect();
    let (suffix, state) =
        parts.iter().find(|(suffix, _)| suffix.starts_with(STATE)).expect("`gather` found the weight by this tensor");
    let file = state.file.clone();
    let shape = serde_json::from_slice::<Value>(&state.read()?).ok().and_then(|state| shape_of(&state));
    let shape = shape.ok_or_else(|| Error::Damaged {
        path: file.to_path_buf(),
        reason: format!("`{prefix}{suffix}` is not JSON with the shape of a matrix"),
    })?;
    let packed = tensors.remove(weight).ok_or_else(|| Error::MissingTensor {
        path: file.to_path_buf(),
        name: weight.into(),
        nearest: Some(format!("{prefix}{suffix}")),
        others: 0,
    })?;
    let packing = Packing::Bnb(Box::new(QuantState { parts }));
    Ok(Stored { file: packed.file, name: weight.into(), shape, region: packed.region, packing })
}

fn shape_of(state: &Value) -> Option<Vec<usize>> {
    let dims = state.get("shape")?.as_array()?;
    let dims: Vec<usize> = dims.iter().map(|d| d.as_u64().map(|d| d as usize)).collect::<Option<_>>()?;
    (dims.len() == 2 && dims.iter().all(|d| *d < 1 << 32)).then_some(dims)
}
