//! What a model's weights will take, from its configuration and the headers of its files alone.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::DType;

use super::stored::{Packing, Stored};
use super::{Place, bnb, folder, gguf};
use crate::config::settings::{QuantType, Quantization, WeightDtype};
use crate::model::Error;
use crate::model::config::{ModelConfig, TensorRole};

/// How a layer's projections lie in a model's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// One or more in a GGUF block type.
    Blocks,
    /// In 4 bits.
    Codes,
    /// In values of this type, which are quantised on the way if a run asks for it.
    Dense(DType),
}

/// The weights of a model as its files have them; of one that has no files here, nothing.
#[derive(Clone, Debug, Default)]
pub struct StoredSizes {
    /// Bytes of weights that stay as they are.
    packed: BTreeMap<String, u64>,
    dense: BTreeMap<String, DType>,
    projections: Option<Kept>,
    /// How the configuration says that projections are stored, where there are no files.
    quantization: Option<Quantization>,
}

impl StoredSizes {
    /// Reads the configuration of a model and, unless its weights are drawn, the headers of its files. A folder may have no weights, or
    /// not all of them: their sizes are those of the configuration then.
    ///
    /// # Errors
    /// If nothing there is a model, or a file is damaged.
    pub fn read(path: &Path, is_random: bool) -> Result<(ModelConfig, Self), Error> {
        let (config, stored) = match Place::find(path, is_random)? {
            Place::Gguf(file) => gguf::open(&file)?,
            Place::Folder(folder) => {
                let (config, quantized) = folder::read_config(&folder)?;
                // A hub's index comes with the configuration, its shards do not.
                let has_all = || Ok::<_, Error>(folder::weight_files(&folder)?.iter().all(|file| file.is_file()));
                if is_random || !folder::has_weights(&folder) || !has_all()? {
                    let quantization =
                        quantized.filter(|_| !is_random).map(|bnb::StoredQuantization { double_quant }| Quantization {
                            quant_type: QuantType::Nf4,
                            double_quant,
                        });
                    let projections = quantization.map(|_| Kept::Codes);
                    return Ok((config, Self { projections, quantization, ..Self::default() }));
                }
                (config, folder::open(&folder, quantized)?)
            }
        };
        let sizes = Self::of(&config, &stored);
        Ok((config, sizes))
    }

    fn of(config: &ModelConfig, stored: &BTreeMap<String, Stored>) -> Self {
        let mut sizes = Self::default();
        let (mut blocks, mut codes, mut values) = (0, 0, None);
        for tensor in config.tensors() {
            let Some(found) = stored.get(&tensor.name) else { continue };
            let is_projection = tensor.role == TensorRole::Linear;
            if let Packing::Dense(dtype) = found.packing {
                values = values.or(Some(dtype).filter(|_| is_projection));
                sizes.dense.insert(tensor.name, dtype);
                continue;
            }
            let is_blocks = matches!(found.packing, Packing::Gguf(_));
            blocks += usize::from(is_projection && is_blocks);
            codes += usize::from(is_projection && !is_blocks);
            sizes.packed.insert(tensor.name, found.num_bytes() as u64);
        }
        sizes.projections = match (blocks, codes) {
            (1.., _) => Some(Kept::Blocks),
            (0, 1..) => Some(Kept::Codes),
            (0, 0) => values.map(Kept::Dense),
        };
        sizes
    }

    /// Bytes of a weight that stays packed as it is stored.
    pub fn packed(&self, name: &str) -> Option<u64> {
        self.packed.get(name).copied()
    }

    /// Bytes of each value of a weight that is not packed, if a run keeps the type that is stored.
    pub fn dense(&self, name: &str, dtype: WeightDtype) -> Option<u64> {
        let stored = self.dense.get(name).filter(|_| dtype == WeightDtype::Auto)?;
        Some(stored.size_in_bytes() as u64)
    }

    /// How the configuration of a model without files says that projections are stored; their type in 4 bits is a guess.
    pub fn quantization(&self) -> Option<Quantization> {
        self.quantization
    }

    /// How the projections lie; `None` of a model without files, unless its configuration says it.
    pub fn projections(&self) -> Option<Kept> {
        self.projections
    }
}
