//! The choices of trials as text, for a file: algorithms have a meaning for one card, driver and library only.

use candle_core::{DType, Device};
use cudarc::driver::sys::cuDriverGetVersion;
use serde::{Deserialize, Serialize};

use super::choose::{Choice, Key};
use super::lt::{Algorithm, Library, library};
use super::product::Kind;
use crate::device::{Error, compute_capability, device_name, failed};
use crate::kernels::cuda::products::{Side, Taken};

const FORMAT: u32 = 1;

/// Where algorithms are the same.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Origin {
    card: String,
    driver: i32,
    cublaslt: usize,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    format: u32,
    origin: Origin,
    /// Of the products' text.
    checksum: String,
    products: Vec<Entry>,
}

/// A choice; see [`Key`] and [`Choice`].
#[derive(Debug, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    sizes: [usize; 3],
    types: [String; 2],
    is_transposed: [bool; 2],
    strides: [usize; 4],
    alignments: [u32; 4],
    /// `nothing`, `itself` or `another`.
    added_to: String,
    has_bias: bool,
    since: u64,
    micros: f32,
    /// The library's own numbers, as 128 hexadecimal digits.
    algorithm: String,
}

impl Entry {
    fn new(key: &Key, choice: &Choice) -> Self {
        let added_to = match key.kind {
            Kind::No => "nothing",
            Kind::Into => "itself",
            Kind::Onto => "another",
        };
        Self {
            sizes: key.sizes,
            types: key.types.map(|dtype| dtype.as_str().to_string()),
            is_transposed: key.sides.map(|side| side == Side::Transposed),
            strides: key.strides,
            alignments: key.alignments,
            added_to: added_to.into(),
            has_bias: key.has_bias,
            since: choice.since,
            micros: choice.micros,
            algorithm: choice.algorithm.data.map(|word| format!("{word:016x}")).concat(),
        }
    }

    /// `None` if it describes no product or no algorithm.
    fn read(&self) -> Option<(Key, Choice)> {
        let dtype = |name: &str| [DType::F32, DType::F16, DType::BF16].into_iter().find(|dtype| dtype.as_str() == name);
        let kind = match self.added_to.as_str() {
            "nothing" => Kind::No,
            "itself" => Kind::Into,
            "another" => Kind::Onto,
            _ => return None,
        };
        let key = Key {
            sizes: self.sizes,
            types: [dtype(&self.types[0])?, dtype(&self.types[1])?],
            sides: self.is_transposed.map(|is| if is { Side::Transposed } else { Side::Plain }),
            strides: self.strides,
            alignments: self.alignments,
            kind,
            has_bias: self.has_bias,
        };
        if self.algorithm.len() != 128 || !self.algorithm.is_ascii() {
            return None;
        }
        let mut data = [0; 8];
        for (index, word) in data.iter_mut().enumerate() {
            *word = u64::from_str_radix(&self.algorithm[16 * index..16 * (index + 1)], 16).ok()?;
        }
        Some((key, Choice { algorithm: Algorithm { data }, micros: self.micros, since: self.since }))
    }
}

impl Origin {
    /// For people.
    fn name(&self) -> String {
        format!("{}, driver {}, cuBLASLt {}", self.card, self.driver, self.cublaslt)
    }
}

/// The card, the driver and the library's version: what is measured with these counts for these alone.
///
/// # Errors
/// If `device` is no GPU or the driver refuses.
pub fn origin_name(device: &Device) -> Result<String, Error> {
    Ok(origin(device)?.name())
}

fn checksum(products: &[Entry]) -> Result<String, serde_json::Error> {
    Ok(blake3::hash(&serde_json::to_vec(products)?).to_hex().to_string())
}

fn origin(device: &Device) -> Result<Origin, Error> {
    let (major, minor) = compute_capability(device)?;
    let mut driver = 0;
    // SAFETY: a number is written to a live variable.
    let asked = unsafe { cuDriverGetVersion(&raw mut driver) };
    asked.result().map_err(failed("asking for the driver's version"))?;
    Ok(Origin { card: format!("{} ({major}.{minor})", device_name(device)?), driver, cublaslt: Library::version() })
}

/// The choices that trials made on `device`, to be given to [`take_choices`] by a later run; `None` if there are none.
///
/// # Errors
/// If `device` is no GPU or the driver refuses.
pub fn choices_text(device: &Device) -> Result<Option<String>, Error> {
    let mut products: Vec<Entry> =
        library(device)?.choices().chosen().map(|(key, choice)| Entry::new(key, choice)).collect();
    if products.is_empty() {
        return Ok(None);
    }
    products.sort_by(|a, b| a.partial_cmp(b).unwrap_or(std::cmp::Ordering::Equal));
    let origin = origin(device)?;
    let text = checksum(&products)
        .and_then(|checksum| serde_json::to_string_pretty(&File { format: FORMAT, origin, checksum, products }));
    text.map(Some).map_err(failed("writing choices down"))
}

/// Takes choices that an earlier run kept. With `are_valid_at_once` those that came in the middle of that run count from the
/// start, else from the step on at which they came, as in the run itself.
///
/// # Errors
/// If `device` is no GPU or the driver refuses.
pub fn take_choices(device: &Device, text: &[u8], are_valid_at_once: bool) -> Result<Taken, Error> {
    let file: File = match serde_json::from_slice(text) {
        Ok(file) => file,
        Err(error) => return Ok(Taken::Damaged(error.to_string())),
    };
    if file.format != FORMAT {
        return Ok(Taken::Damaged(format!("its format is {}, expected {FORMAT}", file.format)));
    }
    if !checksum(&file.products).is_ok_and(|checksum| checksum == file.checksum) {
        return Ok(Taken::Damaged("its checksum does not fit".into()));
    }
    let own = origin(device)?;
    if file.origin != own {
        return Ok(Taken::Foreign(format!("of {}, and this is {}", file.origin.name(), own.name())));
    }
    let Some(kept) = file.products.iter().map(Entry::read).collect::<Option<Vec<_>>>() else {
        return Ok(Taken::Damaged("a product in it is none".into()));
    };
    let count = kept.len();
    let since = |choice: Choice| if are_valid_at_once { Choice { since: 0, ..choice } } else { choice };
    library(device)?.choices().take(kept.into_iter().map(|(key, choice)| (key, since(choice))));
    Ok(Taken::Choices(count))
}
