//! Where weights come from: a Hugging Face folder, a GGUF file, or a seed.
//!
//! [`WeightSource::open`] finds out which it is, reads the configuration and the files' headers and holds the name, shape and
//! type of every weight that the configuration asks for against what is there, so that a wrong or damaged model
//! fails before anything is loaded. After that the blocks ask for one weight at a time, by Hugging Face's name, and
//! the source quantises on the way: at any moment at most one matrix exists unquantised beside its packed form.
//!
//! Called by the constructors of the blocks and by `cli`. Everything lands on the CPU; moving to a device is the
//! caller's.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

use crate::config::settings::{Quantization, WeightDtype};
use crate::model::Error;
use crate::model::config::ModelConfig;
use crate::quant::Quantizer;
use crate::quant::{Nf4Matrix, Weight};

mod bnb;
mod folder;
mod gguf;
pub(crate) mod gguf_header;
pub(crate) mod gguf_names;
mod random;
mod sizes;
mod stored;

use random::RandomWeights;
use stored::Stored;

pub use sizes::{Kept, StoredSizes};

pub(crate) use folder::{RawTensor, read_json, read_safetensors};
pub(crate) use stored::dense_to_f32;

/// How a linear weight is to lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearStorage {
    /// Quantise to 4 bits on the way. Weights that are stored quantised stay as they are.
    pub quantization: Option<Quantization>,
    /// The type of a weight that is not quantised; `Auto` keeps what is stored.
    pub dtype: WeightDtype,
}

/// The weights of one model.
#[derive(Debug)]
pub struct WeightSource {
    path: PathBuf,
    /// Shape of every weight the configuration asks for.
    expected: BTreeMap<String, Vec<usize>>,
    backing: Backing,
    /// Names that are stored and that no block asks for.
    unused: Vec<String>,
    /// What quantises, if it is not the CPU.
    quantizer: Option<Quantizer>,
}

#[derive(Debug)]
enum Backing {
    Stored(BTreeMap<String, Stored>),
    Random(RandomWeights),
}

impl WeightSource {
    /// Opens a model: a folder with `config.json` and safetensors, a folder with one `.gguf` file, or a `.gguf` file.
    /// With `init_random` only the configuration is read and weights are drawn from that seed.
    ///
    /// # Errors
    /// If nothing there is a model, a file is damaged, the architecture is not supported, or a weight is missing or
    /// has another shape or type than the configuration asks for.
    pub fn open(path: &Path, init_random: Option<u64>) -> Result<(ModelConfig, Self), Error> {
        let (config, stored) = match Place::find(path, init_random.is_some())? {
            Place::Gguf(file) => {
                let (config, stored) = gguf::open(&file)?;
                (config, Some(stored))
            }
            Place::Folder(folder) => {
                let (config, quantized) = folder::read_config(&folder)?;
                let stored = if init_random.is_none() { Some(folder::open(&folder, quantized)?) } else { None };
                (config, stored)
            }
        };
        let expected: BTreeMap<_, _> = config.tensors().into_iter().map(|t| (t.name, t.shape)).collect();
        let (backing, unused) = match (init_random, stored) {
            (None, Some(stored)) => {
                check(path, &expected, &stored)?;
                let (stored, unused): (BTreeMap<_, _>, BTreeMap<_, _>) =
                    stored.into_iter().partition(|(name, _)| expected.contains_key(name));
                (Backing::Stored(stored), unused.into_keys().collect())
            }
            (seed, _) => {
                random::check_memory(path, &config)?;
                (Backing::Random(RandomWeights::new(&config, seed.unwrap_or(0))), vec![])
            }
        };
        let source = Self { path: path.into(), expected, backing, unused, quantizer: None };
        Ok((config, source))
    }

    /// Lets `device` quantise: a GPU does so as fast as files are read, to the same bits, and keeps the matrices.
    #[must_use]
    pub fn quantizing_on(self, device: &Device) -> Self {
        Self { quantizer: device.is_cuda().then(|| Quantizer::new(device)), ..self }
    }

    /// Hugging Face's names of all weights, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.expected.keys().map(String::as_str)
    }

    /// Whether there is such a weight. `lm_head.weight` is absent where the head is tied.
    pub fn has(&self, name: &str) -> bool {
        self.expected.contains_key(name)
    }

    /// The shape of a weight: `[out, in]` or `[length]`.
    ///
    /// # Errors
    /// If there is no such weight.
    pub fn shape(&self, name: &str) -> Result<&[usize], Error> {
        self.expected.get(name).map(Vec::as_slice).ok_or_else(|| missing(&self.path, name, self.expected.keys(), 0))
    }

    /// Bytes that a weight takes in the files; what it takes as f32 where weights are drawn.
    ///
    /// # Errors
    /// If there is no such weight.
    pub fn stored_bytes(&self, name: &str) -> Result<usize, Error> {
        let elements: usize = self.shape(name)?.iter().product();
        Ok(match &self.backing {
            Backing::Stored(stored) => stored.get(name).map_or(0, Stored::num_bytes),
            Backing::Random(_) => elements * size_of::<f32>(),
        })
    }

    /// Names that are stored and that the model does not use, e.g. the head of a tied model.
    pub fn unused(&self) -> &[String] {
        &self.unused
    }

    /// A norm's weight or a bias.
    ///
    /// # Shapes
    /// f32 `[length]`, on the CPU.
    ///
    /// # Errors
    /// If there is no such weight, or it is not a vector.
    pub fn vector(&self, name: &str) -> Result<Tensor, Error> {
        let shape = self.shape(name)?;
        if shape.len() != 1 {
            let expected = vec![shape.iter().product()];
            return Err(Error::Shape { path: self.path.clone(), name: name.into(), found: shape.into(), expected });
        }
        let values = self.values(name)?;
        match values.iter().filter(|value| !value.is_finite()).count() {
            0 => Tensor::from_vec(values, shape, &Device::Cpu).map_err(Error::tensor("reading", name)),
            count => Err(Error::NotFinite { path: self.path.clone(), name: name.into(), count }),
        }
    }

    /// Any weight as f32, dequantised if need be.
    ///
    /// # Shapes
    /// f32 in the weight's own shape, on the CPU.
    ///
    /// # Errors
    /// If there is no such weight.
    pub fn tensor_f32(&self, name: &str) -> Result<Tensor, Error> {
        let shape = self.shape(name)?;
        Tensor::from_vec(self.values(name)?, shape, &Device::Cpu).map_err(Error::tensor("reading", name))
    }

    /// The weight of a projection, quantised on the way if `storage` asks for it.
    ///
    /// A weight that is stored in 4 bits or in a GGUF block type stays as it is stored, whatever `storage` says.
    ///
    /// # Shapes
    /// `[rows, cols]`: outputs and inputs.
    ///
    /// # Errors
    /// If there is no such weight, or it has another shape.
    pub fn linear(&self, name: &str, shape: (usize, usize), storage: LinearStorage) -> Result<Weight, Error> {
        let (rows, cols) = self.check_shape(name, shape)?;
        if let Some(packed) = self.stored(name).and_then(Stored::packed) {
            return packed;
        }
        let Some(quantization) = storage.quantization else {
            return self.dense(name, storage.dtype).map(Weight::Dense);
        };
        if let Some(stored) = self.stored(name) {
            if let Some(weight) = self.quantizer.as_ref().and_then(|by| stored.quantize_on(by, quantization)) {
                return weight;
            }
            if let Some(matrix) = stored.quantize(quantization) {
                return matrix.map(Weight::Nf4);
            }
        }
        let Quantization { quant_type, double_quant } = quantization;
        Ok(Weight::Nf4(Nf4Matrix::quantize(&self.values(name)?, rows, cols, quant_type, double_quant)))
    }

    /// The token embedding or the head: never quantised here, 16-bit stays 16-bit, GGUF stays packed.
    ///
    /// # Shapes
    /// `[V, D]`.
    ///
    /// # Errors
    /// If there is no such weight, or it has another shape.
    pub fn embedding(&self, name: &str, shape: (usize, usize), dtype: WeightDtype) -> Result<Weight, Error> {
        self.linear(name, shape, LinearStorage { quantization: None, dtype })
    }

    fn check_shape(&self, name: &str, shape: (usize, usize)) -> Result<(usize, usize), Error> {
        let found = self.shape(name)?;
        if found != [shape.0, shape.1] {
            let expected = vec![shape.0, shape.1];
            return Err(Error::Shape { path: self.path.clone(), name: name.into(), found: found.into(), expected });
        }
        Ok(shape)
    }

    fn stored(&self, name: &str) -> Option<&Stored> {
        match &self.backing {
            Backing::Stored(stored) => stored.get(name),
            Backing::Random(_) => None,
        }
    }

    /// All values of a weight in f32.
    fn values(&self, name: &str) -> Result<Vec<f32>, Error> {
        let shape = self.shape(name)?;
        match &self.backing {
            Backing::Random(random) => Ok(random.values(name, shape)),
            Backing::Stored(stored) => match stored.get(name) {
                Some(stored) => stored.values(),
                None => Err(missing(&self.path, name, stored.keys(), 0)),
            },
        }
    }

    /// A weight that is not packed, in the type asked for.
    fn dense(&self, name: &str, dtype: WeightDtype) -> Result<Tensor, Error> {
        let shape = self.shape(name)?;
        let own = match &self.backing {
            Backing::Stored(stored) => stored.get(name).and_then(Stored::dense_dtype),
            Backing::Random(random) => Some(random.dtype),
        };
        let wanted = match dtype {
            WeightDtype::Auto => own.unwrap_or(DType::F32),
            WeightDtype::Float32 => DType::F32,
            WeightDtype::Bfloat16 => DType::BF16,
            WeightDtype::Float16 => DType::F16,
        };
        if let (Some(stored), Some(own)) = (self.stored(name), own)
            && own == wanted
        {
            return Tensor::from_raw_buffer(&stored.region.read()?, own, shape, &Device::Cpu)
                .map_err(Error::tensor("reading", name));
        }
        self.tensor_f32(name)?.to_dtype(wanted).map_err(Error::tensor("converting", name))
    }
}

/// What a path turned out to be.
enum Place {
    Folder(PathBuf),
    Gguf(PathBuf),
}

impl Place {
    /// `config_is_enough` where weights are drawn.
    fn find(path: &Path, config_is_enough: bool) -> Result<Self, Error> {
        let nothing = |found: String| Err(Error::NoModel { path: path.into(), found });
        if path.is_file() {
            if path.file_name().is_some_and(|name| name == "config.json") {
                return Ok(Self::Folder(path.parent().unwrap_or(Path::new("")).into()));
            }
            return match path.extension().and_then(|e| e.to_str()) {
                Some("gguf") => Ok(Self::Gguf(path.into())),
                Some("safetensors") => nothing("a single safetensors file: give the folder that holds it".into()),
                _ => nothing("a file of another kind".into()),
            };
        }
        if !path.is_dir() {
            return nothing("nothing".into());
        }
        let has_config = path.join("config.json").is_file();
        if has_config && (config_is_enough || folder::has_weights(path)) {
            return Ok(Self::Folder(path.into()));
        }
        let entries = std::fs::read_dir(path).map_err(crate::fs::io_error("list", path))?;
        let mut files: Vec<PathBuf> =
            entries.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "gguf")).collect();
        files.sort();
        match files.as_slice() {
            [] if has_config => Ok(Self::Folder(path.into())),
            [] => nothing("a folder without config.json".into()),
            // Repositories of GGUF files often carry the original's config.json.
            [one] => Ok(Self::Gguf(one.clone())),
            several => {
                let names: Vec<_> = several.iter().filter_map(|p| p.file_name()?.to_str()).collect();
                nothing(format!("a folder with several GGUF files ({}): give one of them", names.join(", ")))
            }
        }
    }
}

/// The files that a model is read from: its weights, and of a folder also the configuration. With `init_random` the
/// configuration alone.
///
/// # Errors
/// If the path holds no model or its index cannot be read.
pub fn files_of(path: &Path, init_random: bool) -> Result<Vec<PathBuf>, Error> {
    match Place::find(path, init_random)? {
        Place::Gguf(file) => Ok(vec![file]),
        Place::Folder(folder) => {
            let mut files = vec![folder.join("config.json")];
            if !init_random {
                files.extend(folder::weight_files(&folder)?);
            }
            Ok(files)
        }
    }
}

/// The GGUF file that a model path means, if it means one.
///
/// # Errors
/// If the path holds no model.
pub fn gguf_file_of(path: &Path) -> Result<Option<PathBuf>, Error> {
    Ok(match Place::find(path, true)? {
        Place::Gguf(file) => Some(file),
        Place::Folder(_) => None,
    })
}

/// Holds what the header of a GGUF file claims against the file's length, before others read it.
///
/// # Errors
/// If the header is damaged.
pub fn check_gguf_header(path: &Path) -> Result<(), Error> {
    gguf_header::Header::read(path, &crate::fs::Region::open(path)?).map(|_| ())
}

/// Holds what is stored against what the configuration asks for.
fn check(path: &Path, expected: &BTreeMap<String, Vec<usize>>, stored: &BTreeMap<String, Stored>) -> Result<(), Error> {
    for (name, shape) in expected {
        let found = stored.get(name).ok_or_else(|| {
            let others = expected.keys().filter(|other| *other != name && !stored.contains_key(*other)).count();
            missing(path, name, stored.keys(), others)
        })?;
        if found.shape != *shape {
            return Err(Error::Shape {
                path: found.file.to_path_buf(),
                name: found.name.clone(),
                found: found.shape.clone(),
                expected: shape.clone(),
            });
        }
        if shape.len() == 1 && found.dense_dtype().is_none() {
            return Err(Error::Dtype {
                path: found.file.to_path_buf(),
                name: found.name.clone(),
                found: "a quantised type".into(),
                supported: "F32, F16 and BF16 for vectors",
            });
        }
    }
    Ok(())
}

fn missing<'a>(path: &Path, name: &str, names: impl Iterator<Item = &'a String>, others: usize) -> Error {
    let nearest = names.max_by(|a, b| strsim::jaro(name, a).total_cmp(&strsim::jaro(name, b))).cloned();
    Error::MissingTensor { path: path.into(), name: name.into(), nearest, others }
}
