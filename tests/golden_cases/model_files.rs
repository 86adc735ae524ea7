//! What the groups with models share: tensors by name, engines from a folder, padded batches as ragged ones.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::Context;
use candle_core::{DType, Device, Tensor};
use trainer::config::settings::{ModelSettings, Quantization, WeightDtype};
use trainer::engine::{Activations, Engine, Types};
use trainer::model::batch::{Batch, BatchBuilder};
use trainer::model::load::{LoadedModel, Purpose, load};
use trainer::zero::ParamStore;

/// The tensors of a safetensors file by name.
pub(crate) struct Tensors(HashMap<String, Tensor>);

impl Tensors {
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        Ok(Self(candle_core::safetensors::load(path, &Device::Cpu).with_context(|| path.display().to_string())?))
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    pub(crate) fn get(&self, name: &str) -> anyhow::Result<&Tensor> {
        self.0.get(name).with_context(|| format!("no tensor `{name}`"))
    }

    pub(crate) fn floats(&self, name: &str) -> anyhow::Result<Vec<f32>> {
        Ok(self.get(name)?.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?)
    }

    pub(crate) fn integers(&self, name: &str) -> anyhow::Result<Vec<Vec<i64>>> {
        let tensor = self.get(name)?;
        let tensor = if tensor.rank() == 1 { tensor.unsqueeze(0)? } else { tensor.clone() };
        Ok(tensor.to_dtype(DType::I64)?.to_vec2()?)
    }

    /// Names that start with `prefix`, sorted.
    pub(crate) fn names<'a>(&'a self, prefix: &'a str) -> Vec<&'a str> {
        let mut names: Vec<&str> = self.0.keys().filter(|n| n.starts_with(prefix)).map(String::as_str).collect();
        names.sort_unstable();
        names
    }
}

/// The folders inside `folder`, sorted.
pub(crate) fn folders(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> =
        std::fs::read_dir(folder)?.flatten().map(|e| e.path()).filter(|p| p.is_dir()).collect();
    found.sort();
    Ok(found)
}

/// The last part of a path.
pub(crate) fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

pub(crate) fn settings(adapter: Option<&Path>, quantization: Option<Quantization>) -> ModelSettings {
    ModelSettings {
        model_name_or_path: String::new(),
        model_revision: "main".into(),
        tokenizer_name_or_path: None,
        chat_template: None,
        chat_template_path: None,
        eos_token: None,
        init_random: false,
        dtype: WeightDtype::Auto,
        quantization,
        lora: None,
        adapter_name_or_path: adapter.map(Path::to_path_buf),
    }
}

/// An engine that trains the adapter, or everything if there is none.
pub(crate) fn engine(
    model: &Path,
    adapter: Option<&Path>,
    quantization: Option<Quantization>,
    recompute: bool,
) -> anyhow::Result<Engine> {
    let device = device()?;
    let mut loaded = load(model, &settings(adapter, quantization), 0, Purpose::Training, &device)?;
    if !device.is_cpu() {
        loaded.keep_embedding_on_host();
    }
    // On a GPU what recomputation starts from goes to host memory and back as well.
    let activations = match (recompute, device.is_cpu()) {
        (false, _) => Activations::Keep,
        (true, true) => Activations::Recompute,
        (true, false) => Activations::Offload,
    };
    let LoadedModel { config, adapter, blocks, .. } = loaded;
    let store = ParamStore::new(blocks.map(|block| block.map_err(anyhow::Error::from)), &device)?;
    Ok(Engine::new(config, adapter, store, Types::F32, activations))
}

/// Where models compute: the CPU, or with `TRAINER_GOLDEN_DEVICE=cuda` the first GPU, in f32.
pub(crate) fn device() -> anyhow::Result<Device> {
    match std::env::var("TRAINER_GOLDEN_DEVICE").as_deref() {
        Err(_) | Ok("cpu") => Ok(Device::Cpu),
        #[cfg(feature = "cuda")]
        Ok("cuda") => {
            // One device for all groups: tensors of two do not mix.
            static DEVICE: std::sync::OnceLock<Device> = std::sync::OnceLock::new();
            if let Some(device) = DEVICE.get() {
                return Ok(device.clone());
            }
            let device = trainer::device::open(0)?;
            Ok(DEVICE.get_or_init(|| device).clone())
        }
        Ok(other) => anyhow::bail!("TRAINER_GOLDEN_DEVICE={other}: this build has cpu, and cuda with that feature"),
    }
}

/// A padded batch without its padding, and where each real token stands in the padded one.
pub(crate) struct Unpadded {
    pub(crate) batch: Batch,
    /// `(row, column)` of every token of the ragged batch.
    pub(crate) places: Vec<(usize, usize)>,
    /// `(row, column)` of every target of the head.
    pub(crate) target_places: Vec<(usize, usize)>,
}

/// Takes the padding away. Asks the head for every token but the first of each row.
pub(crate) fn unpad(ids: &[Vec<i64>], mask: &[Vec<i64>]) -> anyhow::Result<Unpadded> {
    let mut builder = BatchBuilder::new();
    let (mut places, mut target_places) = (vec![], vec![]);
    for (row, (ids, mask)) in ids.iter().zip(mask).enumerate() {
        let columns: Vec<usize> = (0..ids.len()).filter(|&c| mask[c] == 1).collect();
        let tokens: Vec<u32> = columns.iter().map(|&c| ids[c] as u32).collect();
        let rows = builder.push(&tokens, row as u64);
        builder.predict_within(rows);
        target_places.extend(columns.iter().skip(1).map(|&c| (row, c)));
        places.extend(columns.iter().map(|&c| (row, c)));
    }
    Ok(Unpadded { batch: builder.build()?, places, target_places })
}
