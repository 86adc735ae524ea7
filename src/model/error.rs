//! What can go wrong with a model: its files, its configuration, its adapters.
//!
//! Every message names the file, and the tensor or key inside it, what was found, what was expected and the next
//! action.

use std::path::PathBuf;

use crate::fs;

/// An error of the room `model`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] fs::Error),
    /// A path holds nothing that can be opened as a model.
    #[error(
        "no model at `{}`: {found}; give a folder with config.json and model.safetensors (or \
         model.safetensors.index.json and its shards), or a .gguf file", path.display()
    )]
    NoModel {
        /// The path given.
        path: PathBuf,
        /// What is there instead.
        found: String,
    },
    /// A path holds no adapter.
    #[error(
        "no adapter at `{}`: {found}; give a folder with adapter_config.json and adapter_model.safetensors",
        path.display()
    )]
    NoAdapter {
        /// The path given.
        path: PathBuf,
        /// What is there instead.
        found: String,
    },
    /// A JSON file is not JSON.
    #[error("`{}` is not valid JSON: {source}; copy or download it again", path.display())]
    Json {
        /// Which file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A key of a configuration file, or of GGUF metadata, is absent, of the wrong type or has a value that cannot be.
    #[error("`{}`: `{key}` is {found}, expected {expected}", path.display())]
    Key {
        /// Which file.
        path: PathBuf,
        /// Which key.
        key: String,
        /// Its value, or `absent`.
        found: String,
        /// What would be right.
        expected: String,
    },
    /// Something a file asks for that this program does not do.
    #[error("`{}`: {found} is not supported; supported: {supported}", path.display())]
    Unsupported {
        /// Which file.
        path: PathBuf,
        /// What it asks for.
        found: String,
        /// What would work, and what to do instead.
        supported: String,
    },
    /// A file does not hold what its format demands.
    #[error("`{}` is damaged or incomplete: {reason}; copy or download it again", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong in it.
        reason: String,
    },
    /// A weight is not there.
    #[error(
        "`{}` has no tensor `{name}`{}{}; check that config.json belongs to these weights",
        path.display(),
        nearest.as_ref().map(|n| format!(" (the nearest name is `{n}`)")).unwrap_or_default(),
        if *others == 0 { String::new() } else { format!(" and lacks {others} more") }
    )]
    MissingTensor {
        /// The model's folder or file.
        path: PathBuf,
        /// Which tensor.
        name: String,
        /// The most similar name that is there.
        nearest: Option<String>,
        /// How many other tensors are not there.
        others: usize,
    },
    /// A weight has another shape than the configuration says.
    #[error(
        "tensor `{name}` in `{}` has shape {found:?}, the configuration asks for {expected:?}; check that it \
         belongs to these weights", path.display()
    )]
    Shape {
        /// The file that holds it.
        path: PathBuf,
        /// Which tensor.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape asked for.
        expected: Vec<usize>,
    },
    /// A weight is stored in a type that cannot be used.
    #[error("tensor `{name}` in `{}` is stored as {found}; supported: {supported}", path.display())]
    Dtype {
        /// The file that holds it.
        path: PathBuf,
        /// Which tensor.
        name: String,
        /// Its type.
        found: String,
        /// What would work.
        supported: &'static str,
    },
    /// A packed weight does not hold what its type demands.
    #[error("tensor `{name}` in `{}`: {source}", path.display())]
    Packing {
        /// The file that holds it.
        path: PathBuf,
        /// Which tensor.
        name: String,
        /// What is wrong with it.
        source: Box<crate::quant::Error>,
    },
    /// What was read back after a save is not what was written.
    #[error("`{}` does not read back as it was written: {reason}; check the disk and save again", path.display())]
    ReadBack {
        /// Which file.
        path: PathBuf,
        /// The difference.
        reason: String,
    },
    /// A block was handed parameters without one that it needs.
    #[error("no parameter `{name}` among those of its block")]
    MissingParameter {
        /// Which.
        name: String,
    },
    /// A vector is stored in a packed type.
    #[error("parameter `{name}` is packed, a dense one is needed")]
    NotDense {
        /// Which.
        name: String,
    },
    /// Names or a pattern that mean no module of the model.
    #[error("`{key}`: {found} is no module of this model; there are {there_are}")]
    NoModule {
        /// The key of an adapter's configuration.
        key: &'static str,
        /// What it says.
        found: String,
        /// What it could say.
        there_are: String,
    },
    /// An adapter with a part that no kernel of a GPU computes.
    #[error(
        "{what} is computed on the CPU only; set `device: cpu`, take it out of the adapter, or train that module whole \
         (`lora_modules_to_save`)"
    )]
    NeedsCpu {
        /// What part.
        what: &'static str,
    },
    /// A weight that cannot be trained as it is stored.
    #[error(
        "`modules_to_save` holds `{name}`, which `load_in_4bit` packs to 4 bits that cannot be trained; leave it out, put an \
         adapter on it, or remove `load_in_4bit`"
    )]
    PackedModule {
        /// Which weight.
        name: String,
    },
    /// Numbers that no run can start from.
    #[error(
        "tensor `{name}` in `{}` holds {count} values that are not finite (NaN or infinite); the run that wrote it had \
         diverged, take an earlier checkpoint", path.display()
    )]
    NotFinite {
        /// The file that holds it.
        path: PathBuf,
        /// Which tensor.
        name: String,
        /// How many values.
        count: usize,
    },
    /// An operation failed.
    #[error(transparent)]
    Op(#[from] crate::ops::Error),
    /// Reshaping failed.
    #[error(transparent)]
    Shaping(#[from] candle_core::Error),
    /// The tensor library failed.
    #[error("{action} `{name}` failed: {source}")]
    Tensor {
        /// What was tried.
        action: &'static str,
        /// On which tensor.
        name: String,
        /// What the library said.
        source: Box<candle_core::Error>,
    },
}

impl Error {
    /// Names the action and the tensor of a tensor library error.
    pub fn tensor(action: &'static str, name: &str) -> impl FnOnce(candle_core::Error) -> Self {
        let name = name.to_string();
        move |source| Self::Tensor { action, name, source: Box::new(source) }
    }
}
