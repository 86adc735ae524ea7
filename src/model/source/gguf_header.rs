//! The header of a GGUF file: metadata and where each tensor lies.
//!
//! Format: ggml's `docs/gguf.md`, versions 2 and 3, little-endian. Read by [`super::gguf`] from the start of the file. Nothing
//! the header claims is believed before it is held against the length of the file: a count, a length or an offset
//! out of a damaged file gives an error that says where, never a huge allocation or a panic. Lists (the tokenizer's
//! vocabulary) are stepped over, not copied.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use candle_core::quantized::GgmlDType;

use crate::fs::Region;
use crate::model::Error;

/// The most dimensions ggml knows.
const MOST_DIMS: u32 = 4;
/// Lists in lists deeper than this are refused.
const DEEPEST_LIST: usize = 8;
/// Entries of all lists together. Those of a tokenizer have some hundred thousand, and its reader makes a value of each.
const MOST_ENTRIES: usize = 1 << 23;

/// The metadata and the tensors of a GGUF file.
#[derive(Debug)]
pub(crate) struct Header {
    /// Values by key; lists are left out.
    pub(crate) metadata: BTreeMap<String, Scalar>,
    /// Tensors by the file's own name.
    pub(crate) tensors: BTreeMap<String, Entry>,
}

/// One value of the metadata.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Scalar {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed integer.
    Signed(i64),
    /// Either float.
    Float(f64),
    /// A boolean.
    Bool(bool),
    /// A string.
    Text(String),
}

/// Type, shape and place of one tensor.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    /// How its blocks are packed.
    pub(crate) kind: GgmlDType,
    /// Slowest dimension first, as everywhere in this program (the file has it the other way round).
    pub(crate) shape: Vec<usize>,
    /// Its bytes in the file.
    pub(crate) range: Range<usize>,
}

impl Header {
    /// Reads the header of an open file.
    pub(crate) fn read(path: &Path, file: &Region) -> Result<Self, Error> {
        let mut reader = Reader { path, file, loaded: Vec::new(), position: 0, entries: 0 };
        if reader.take(4, "the magic number")? != b"GGUF" {
            return Err(reader.damaged("it does not begin with `GGUF`"));
        }
        let version = reader.u32("the version")?;
        if version != 2 && version != 3 {
            return Err(Error::Unsupported {
                path: path.into(),
                found: format!("GGUF version {version}"),
                supported: "versions 2 and 3, little-endian; convert the model again with a current llama.cpp".into(),
            });
        }
        let num_tensors = reader.count("the number of tensors", 8 + 4 + 4 + 8)?;
        let num_values = reader.count("the number of metadata values", 8 + 4 + 1)?;
        let mut metadata = BTreeMap::new();
        for _ in 0..num_values {
            let key = reader.string("a metadata key")?;
            let kind = reader.u32(&key)?;
            if let Some(value) = reader.value(kind, &key)? {
                metadata.insert(key, value);
            }
        }
        let mut found = Vec::with_capacity(num_tensors);
        for _ in 0..num_tensors {
            found.push(reader.tensor()?);
        }
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            // The format demands a multiple of 8; blocks are read in place and rely on it.
            Some(Scalar::Unsigned(n)) if *n > 0 && *n <= 1 << 20 && n.is_multiple_of(8) => *n as usize,
            Some(other) => return Err(reader.damaged(&format!("`general.alignment` is {other:?}, no multiple of 8"))),
        };
        let data_start = reader.position.next_multiple_of(alignment);
        let mut tensors = BTreeMap::new();
        for (name, kind, shape, offset) in found {
            let range = range_of(kind, &shape, data_start, offset)
                .filter(|range| range.end <= file.len() && range.start.is_multiple_of(alignment))
                .ok_or_else(|| {
                    reader.damaged(&format!(
                        "tensor `{name}` ({kind:?} {shape:?}, offset {offset}) reaches beyond the file's {} bytes, does \
                         not lie on a multiple of {alignment}, or its rows are not whole blocks of {}",
                        file.len(),
                        kind.block_size()
                    ))
                })?;
            if tensors.insert(name.clone(), Entry { kind, shape, range }).is_some() {
                return Err(reader.damaged(&format!("tensor `{name}` is listed twice")));
            }
        }
        Ok(Self { metadata, tensors })
    }
}

/// Where a tensor lies in the file; `None` if that cannot be.
fn range_of(kind: GgmlDType, shape: &[usize], data_start: usize, offset: u64) -> Option<Range<usize>> {
    let row = *shape.last()?;
    if !row.is_multiple_of(kind.block_size()) {
        return None;
    }
    let elements = shape.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim))?;
    let length = (elements / kind.block_size()).checked_mul(kind.type_size())?;
    let start = data_start.checked_add(usize::try_from(offset).ok()?)?;
    Some(start..start.checked_add(length)?)
}

/// The types of ggml that candle's kernels know, by their number in the file.
fn kind_of(number: u32) -> Option<GgmlDType> {
    Some(match number {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}

/// A cursor that knows what it is reading.
struct Reader<'a> {
    path: &'a Path,
    file: &'a Region,
    /// The start of the file, as far as it was read.
    loaded: Vec<u8>,
    position: usize,
    /// Entries of lists that were stepped over.
    entries: usize,
}

impl Reader<'_> {
    /// Bytes read ahead.
    const AHEAD: usize = 1 << 20;

    fn damaged(&self, reason: &str) -> Error {
        Error::Damaged { path: self.path.into(), reason: format!("{reason} (at byte {})", self.position) }
    }

    fn left(&self) -> usize {
        self.file.len() - self.position
    }

    fn take(&mut self, length: usize, what: &str) -> Result<&[u8], Error> {
        if length > self.left() {
            let left = self.left();
            return Err(self.damaged(&format!("{what} needs {length} bytes and the file has {left} left")));
        }
        let end = self.position + length;
        if end > self.loaded.len() {
            let until = end.max(2 * self.loaded.len()).max(Self::AHEAD).min(self.file.len());
            if let Some(more) = self.file.slice(self.loaded.len()..until) {
                self.loaded.extend_from_slice(&more.read()?);
            }
        }
        let taken = &self.loaded[self.position..end];
        self.position = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Error> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N, what)?);
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32, Error> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, Error> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A count of things that take at least `smallest` bytes each.
    fn count(&mut self, what: &str, smallest: usize) -> Result<usize, Error> {
        let count = self.u64(what)?;
        let left = self.left();
        match usize::try_from(count) {
            Ok(count) if count <= left / smallest => Ok(count),
            _ => Err(self.damaged(&format!("{what} is {count}, which cannot fit in the {left} bytes left"))),
        }
    }

    fn string(&mut self, what: &str) -> Result<String, Error> {
        let length = self.count(what, 1)?;
        Ok(String::from_utf8_lossy(self.take(length, what)?).trim_end_matches('\0').into())
    }

    /// A value of the given type; `None` for a list, which is stepped over.
    fn value(&mut self, kind: u32, key: &str) -> Result<Option<Scalar>, Error> {
        Ok(Some(match kind {
            0 => Scalar::Unsigned(u64::from(self.array::<1>(key)?[0])),
            1 => Scalar::Signed(i64::from(i8::from_le_bytes(self.array(key)?))),
            2 => Scalar::Unsigned(u64::from(u16::from_le_bytes(self.array(key)?))),
            3 => Scalar::Signed(i64::from(i16::from_le_bytes(self.array(key)?))),
            4 => Scalar::Unsigned(u64::from(self.u32(key)?)),
            5 => Scalar::Signed(i64::from(i32::from_le_bytes(self.array(key)?))),
            6 => Scalar::Float(f64::from(f32::from_le_bytes(self.array(key)?))),
            7 => Scalar::Bool(self.array::<1>(key)?[0] != 0),
            8 => Scalar::Text(self.string(key)?),
            9 => {
                self.skip_list(key, 0)?;
                return Ok(None);
            }
            10 => Scalar::Unsigned(self.u64(key)?),
            11 => Scalar::Signed(i64::from_le_bytes(self.array(key)?)),
            12 => Scalar::Float(f64::from_le_bytes(self.array(key)?)),
            other => return Err(self.damaged(&format!("`{key}` has the unknown value type {other}"))),
        }))
    }

    fn skip_list(&mut self, key: &str, depth: usize) -> Result<(), Error> {
        if depth == DEEPEST_LIST {
            return Err(self.damaged(&format!("`{key}` has lists in lists in lists")));
        }
        let kind = self.u32(key)?;
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => 12,
            other => return Err(self.damaged(&format!("`{key}` is a list of the unknown value type {other}"))),
        };
        let count = self.count(key, size)?;
        self.entries += count;
        if self.entries > MOST_ENTRIES {
            return Err(self.damaged(&format!("with `{key}` its lists have more than {MOST_ENTRIES} entries")));
        }
        match kind {
            8 => {
                for _ in 0..count {
                    let length = self.count(key, 1)?;
                    self.take(length, key)?;
                }
            }
            9 => {
                for _ in 0..count {
                    self.skip_list(key, depth + 1)?;
                }
            }
            _ => {
                self.take(count * size, key)?;
            }
        }
        Ok(())
    }

    fn tensor(&mut self) -> Result<(String, GgmlDType, Vec<usize>, u64), Error> {
        let name = self.string("a tensor's name")?;
        let num_dims = self.u32(&name)?;
        if num_dims == 0 || num_dims > MOST_DIMS {
            return Err(self.damaged(&format!("tensor `{name}` has {num_dims} dimensions")));
        }
        let mut shape = Vec::with_capacity(num_dims as usize);
        for _ in 0..num_dims {
            let dim = self.u64(&name)?;
            shape.push(usize::try_from(dim).map_err(|_| self.damaged(&format!("tensor `{name}` is {dim} long")))?);
        }
        shape.reverse();
        let number = self.u32(&name)?;
        let kind = kind_of(number).ok_or_else(|| Error::Dtype {
            path: self.path.into(),
            name: name.clone(),
            found: format!("ggml type {number}"),
            supported: "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K and Q6_K; use a file \
                        quantised to one of these",
        })?;
        Ok((name, kind, shape, self.u64("a tensor's offset")?))
    }
}
