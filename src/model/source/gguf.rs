//! Weights of a GGUF file.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::DType;
use candle_core::quantized::GgmlDType;

use super::gguf_header::Header;
use super::gguf_names::hf_name;
use super::stored::{Packing, Stored};
use crate::fs;
use crate::model::Error;
use crate::model::config::ModelConfig;

/// Reads the header of a GGUF file; the weights stay in the file. A weight that these models do not know keeps
/// the file's name.
pub(super) fn open(path: &Path) -> Result<(ModelConfig, BTreeMap<String, Stored>), Error> {
    let all = fs::Region::open(path)?;
    let header = Header::read(path, &all)?;
    let config = ModelConfig::from_gguf(path, &header)?;
    let file: Arc<Path> = path.into();
    let mut stored = BTreeMap::new();
    for (name, entry) in header.tensors {
        let hf_name = hf_name(&name).unwrap_or_else(|| name.clone());
        let region = all.slice(entry.range.clone());
        let region =
            region.ok_or_else(|| fs::Error::Short { path: path.into(), range: entry.range, length: all.len() })?;
        let packing = match entry.kind {
            GgmlDType::F32 => Packing::Dense(DType::F32),
            GgmlDType::F16 => Packing::Dense(DType::F16),
            GgmlDType::BF16 => Packing::Dense(DType::BF16),
            kind => Packing::Gguf(kind),
        };
        stored.insert(hf_name, Stored { file: file.clone(), name, shape: entry.shape, region, packing });
    }
    Ok((config, stored))
}
