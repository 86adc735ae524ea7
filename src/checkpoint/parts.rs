//! Files of named f32 values, whole or in parts: each rank writes what it has into a file of its own, and who reads takes the
//! ranges that it needs, from as many files as there are.
//!
//! A file is a safetensors file. A tensor that is not all in it is a row of values there, and the file's metadata say under
//! `parts` where in the tensor they begin and which shape that has. Neither side holds more of a file in memory than what it is
//! asked to write or read, and a few MiB.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::manifest::FileEntry;
use super::write::Place;
use super::{Checkpoint, Error};
use crate::fs::{self, io_error};

/// Values that are converted, read or written at a time.
const PIECE: usize = 1 << 20;
/// The key of the metadata with what files hold of tensors that are not all in them.
const PARTS: &str = "parts";

/// Values of a tensor that are in one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The tensor's name.
    pub name: String,
    /// The tensor's shape.
    pub shape: Vec<usize>,
    /// Which of its values, row-major.
    pub range: Range<usize>,
}

impl Part {
    /// All of a tensor.
    pub fn whole(name: String, shape: Vec<usize>) -> Self {
        let range = 0..shape.iter().product();
        Self { name, shape, range }
    }

    fn is_whole(&self) -> bool {
        self.range == (0..self.shape.iter().product())
    }
}

/// What the metadata say of a tensor that is not all in a file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stretch {
    /// The first value of those in the file.
    start: usize,
    /// The shape of the tensor.
    shape: Vec<usize>,
}

/// A file that is written from its first value to its last.
#[derive(Debug)]
pub struct PartsWriter {
    name: String,
    /// Where the file will be: the path that messages name.
    shown: PathBuf,
    file: BufWriter<File>,
    hasher: blake3::Hasher,
    bytes: u64,
    /// Values that are still to come.
    left: usize,
}

/// A file that is whole and durable inside a checkpoint in the making.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// Its name inside the checkpoint.
    pub name: String,
    /// Its length and checksum.
    pub entry: FileEntry,
}

impl PartsWriter {
    /// Begins the file `name` of a checkpoint in the making; `parts` say what will be written, in this order.
    ///
    /// # Errors
    /// If a name comes twice, a range is not inside its tensor, the checkpoint's folder is not there, or the file cannot be
    /// written.
    pub fn create(place: &Place, name: &str, parts: &[Part]) -> Result<Self, Error> {
        let path = place.file(name)?;
        let shown = place.final_path(name);
        let wrong = |reason| Error::Tensors { action: "write", path: shown.clone(), reason };
        let (mut header, mut stretches) = (serde_json::Map::new(), BTreeMap::new());
        let mut offset = 0;
        for part in parts {
            let Part { name, shape, range } = part;
            let count: usize = shape.iter().product();
            if range.start > range.end || range.end > count {
                return Err(Error::Shape { name: name.clone(), values: range.end, shape: shape.clone() });
            }
            let stored = if part.is_whole() { shape.clone() } else { vec![range.len()] };
            let end = offset + size_of::<f32>() * range.len();
            let entry = json!({"dtype": "F32", "shape": stored, "data_offsets": [offset, end]});
            if header.insert(name.clone(), entry).is_some() {
                return Err(wrong(format!("the name `{name}` comes twice")));
            }
            if !part.is_whole() {
                stretches.insert(name.clone(), Stretch { start: range.start, shape: shape.clone() });
            }
            offset = end;
        }
        let mut metadata = json!({"format": "pt"});
        let to_json = |source| Error::ToJson { path: shown.clone(), source };
        if !stretches.is_empty() {
            metadata[PARTS] = serde_json::to_string(&stretches).map_err(to_json)?.into();
        }
        header.insert("__metadata__".into(), metadata);
        let mut header = serde_json::to_vec(&header).map_err(to_json)?;
        // Values begin at a multiple of 8, as the format has it.
        header.resize(header.len().next_multiple_of(8), b' ');
        let file = File::create(&path).map_err(io_error("create", &shown))?;
        let file = BufWriter::with_capacity(1 << 20, file);
        let hasher = blake3::Hasher::new();
        let mut begun = Self { name: name.into(), shown, file, hasher, bytes: 0, left: offset / size_of::<f32>() };
        begun.put(&(header.len() as u64).to_le_bytes())?;
        begun.put(&header)?;
        Ok(begun)
    }

    /// Writes the next values, of one part or of several that follow each other.
    ///
    /// # Errors
    /// If there are more than were announced, or they cannot be written.
    pub fn write(&mut self, values: &[f32]) -> Result<(), Error> {
        let Some(left) = self.left.checked_sub(values.len()) else { return Err(self.other_number(values.len())) };
        self.left = left;
        for piece in values.chunks(PIECE) {
            let bytes: Vec<u8> = piece.iter().flat_map(|value| value.to_le_bytes()).collect();
            self.put(&bytes)?;
        }
        Ok(())
    }

    /// Makes the file durable.
    ///
    /// # Errors
    /// If values are missing, or it cannot be written.
    pub fn finish(mut self) -> Result<Written, Error> {
        if self.left > 0 {
            return Err(self.other_number(0));
        }
        self.file.flush().map_err(io_error("write", &self.shown))?;
        self.file.get_ref().sync_all().map_err(io_error("sync", &self.shown))?;
        let blake3 = self.hasher.finalize().to_hex().to_string();
        Ok(Written { name: self.name, entry: FileEntry { bytes: self.bytes, blake3 } })
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(self.file.write_all(bytes).map_err(io_error("write", &self.shown))?)
    }

    fn other_number(&self, got: usize) -> Error {
        let reason = format!("{got} values were given where {} were to come", self.left);
        Error::Tensors { action: "write", path: self.shown.clone(), reason }
    }
}

/// The tensors of some files of a checkpoint, each put together from its parts.
#[derive(Debug)]
pub struct Tensors {
    of: BTreeMap<String, Tensor>,
}

#[derive(Debug)]
struct Tensor {
    shape: Vec<usize>,
    /// Ascending and without holes.
    parts: Vec<StoredPart>,
}

#[derive(Debug)]
struct StoredPart {
    range: Range<usize>,
    bytes: fs::Region,
    path: PathBuf,
}

impl Tensors {
    /// Reads what the files `names` hold, and none of the values.
    pub(super) fn open(checkpoint: &Checkpoint, names: &[String]) -> Result<Self, Error> {
        let mut of: BTreeMap<String, Tensor> = BTreeMap::new();
        for name in names {
            let path = checkpoint.file(name)?;
            for (tensor, shape, part) in stored(&path)? {
                let known = of.entry(tensor.clone()).or_insert_with(|| Tensor { shape: shape.clone(), parts: vec![] });
                if known.shape != shape {
                    let reason = format!("`{tensor}` has shape {shape:?} here and {:?} elsewhere", known.shape);
                    return Err(Error::Tensors { action: "read", path, reason });
                }
                known.parts.push(part);
            }
        }
        for (name, tensor) in &mut of {
            tensor.parts.sort_by_key(|part| (part.range.start, part.range.end));
            let mut end = 0;
            for StoredPart { range, path, .. } in &tensor.parts {
                if range.start != end {
                    let reason = format!("`{name}` goes on with value {} after {end}", range.start);
                    return Err(Error::Tensors { action: "read", path: path.clone(), reason });
                }
                end = range.end;
            }
            if end != tensor.count()
                && let Some(last) = tensor.parts.last()
            {
                let reason = format!("`{name}` ends with value {end} of {}", tensor.count());
                return Err(Error::Tensors { action: "read", path: last.path.clone(), reason });
            }
        }
        Ok(Self { of })
    }

    /// Names of the tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.of.keys().map(String::as_str)
    }

    /// The shape of a tensor, if there is one of this name.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.of.get(name).map(|tensor| tensor.shape.as_slice())
    }

    /// Reads the values of a tensor from the value `start` on into `target`. Returns false where there is no tensor of this name or
    /// it has not so many values.
    ///
    /// # Errors
    /// If a file cannot be read, or was changed since it was opened.
    pub fn read(&self, name: &str, start: usize, target: &mut [f32]) -> Result<bool, Error> {
        let Some(tensor) = self.of.get(name) else { return Ok(false) };
        let Some(end) = start.checked_add(target.len()).filter(|&end| end <= tensor.count()) else { return Ok(false) };
        for part in &tensor.parts {
            let (from, to) = (part.range.start.max(start), part.range.end.min(end));
            if from < to {
                part.read(from - part.range.start, &mut target[from - start..to - start])?;
            }
        }
        Ok(true)
    }
}

impl Tensor {
    fn count(&self) -> usize {
        self.shape.iter().product()
    }
}

impl StoredPart {
    /// Reads values from `first` on, counted from the part's own first.
    fn read(&self, first: usize, target: &mut [f32]) -> Result<(), Error> {
        target.par_chunks_mut(PIECE).enumerate().try_for_each(|(piece, target)| {
            let start = size_of::<f32>() * (first + piece * PIECE);
            let region = self.bytes.slice(start..start + size_of_val(target));
            let short = || wrong(&self.path, format!("value {first} is not there"));
            let bytes = region.ok_or_else(short)?.read()?;
            let values = bytes.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes));
            target.iter_mut().zip(values).for_each(|(target, value)| *target = value);
            Ok(())
        })
    }
}

fn wrong(path: &Path, reason: String) -> Error {
    Error::Tensors { action: "read", path: path.into(), reason }
}

/// What a file holds: of each tensor its name, its shape and the part that is there.
fn stored(path: &Path) -> Result<Vec<(String, Vec<usize>, StoredPart)>, Error> {
    let all = fs::Region::open(path)?;
    let (header, data) = split(&all).ok_or_else(|| wrong(path, "it does not begin with a header".into()))?;
    let metadata: Metadata = serde_json::from_slice(&header.read()?).map_err(|error| wrong(path, error.to_string()))?;
    let text = metadata.metadata().as_ref().and_then(|map: &HashMap<String, String>| map.get(PARTS));
    let mut stretches: BTreeMap<String, Stretch> = match text {
        Some(text) => serde_json::from_str(text).map_err(|error| wrong(path, format!("`{PARTS}`: {error}")))?,
        None => BTreeMap::new(),
    };
    let tensors: BTreeMap<_, _> = metadata.tensors().into_iter().collect();
    if tensors.values().map(|info| info.data_offsets.1).max().unwrap_or(0) != data.len() {
        return Err(wrong(path, format!("its {} bytes are not as many as its header lists", all.len())));
    }
    let mut found = Vec::with_capacity(tensors.len());
    for (name, info) in tensors {
        if info.dtype != Dtype::F32 {
            return Err(wrong(path, format!("`{name}` is {:?}, f32 was expected", info.dtype)));
        }
        let (from, to) = info.data_offsets;
        let bytes = data.slice(from..to).ok_or_else(|| wrong(path, format!("`{name}` is not all there")))?;
        let count = bytes.len() / size_of::<f32>();
        let Stretch { start, shape } =
            stretches.remove(&name).unwrap_or_else(|| Stretch { start: 0, shape: info.shape.clone() });
        let of = shape.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim));
        let end = start.checked_add(count).filter(|&end| of.is_some_and(|of| end <= of));
        let Some(end) = end else {
            return Err(wrong(path, format!("`{name}` of shape {shape:?} has no values {start} and {count} after it")));
        };
        found.push((name, shape, StoredPart { range: start..end, bytes, path: path.into() }));
    }
    match stretches.keys().next() {
        Some(name) => Err(wrong(path, format!("`{PARTS}` names `{name}`, which is not there"))),
        None => Ok(found),
    }
}

/// The header of a safetensors file and what it describes: eight bytes of length come first.
fn split(all: &fs::Region) -> Option<(fs::Region, fs::Region)> {
    const LENGTH: usize = 8;
    const MOST_HEADER_BYTES: usize = 100_000_000;
    let length = all.slice(0..LENGTH)?.read().ok()?;
    let length = u64::from_le_bytes(*length.as_chunks::<LENGTH>().0.first()?);
    let end = LENGTH + usize::try_from(length).ok().filter(|&length| length <= MOST_HEADER_BYTES)?;
    Some((all.slice(LENGTH..end)?, all.slice(end..all.len())?))
}
