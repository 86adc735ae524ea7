//! Data files by their format.
//!
//! | extension | read as |
//! | --- | --- |
//! | `.jsonl`, `.ndjson`, `.json` | JSON: an object per line, an array, or a layout of [`json`] |
//! | `.parquet`, `.arrow` | Parquet; Arrow streams and files, as `save_to_disk` writes them |
//! | `.csv`, `.tsv` | the first record names the columns |
//! | `.txt` | a row per line, in the column `text` |
//!
//! JSON, CSV and text files may be packed: `.jsonl.gz`, `.csv.zst`.

use std::path::Path;

use serde_json::{Map, Value};

use super::rows::ReadRow;
use super::{Error, bytes, csv, json, parquet};

/// A format of data files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Format {
    Json,
    Parquet,
    Arrow,
    Csv,
    Text,
}

/// Extensions and what they mean.
const EXTENSIONS: [(&str, Format); 8] = [
    ("jsonl", Format::Json),
    ("ndjson", Format::Json),
    ("json", Format::Json),
    ("parquet", Format::Parquet),
    ("arrow", Format::Arrow),
    ("csv", Format::Csv),
    ("tsv", Format::Csv),
    ("txt", Format::Text),
];

/// Extensions of packed files, which stand behind the others.
const PACKED: [&str; 3] = ["gz", "zst", "zstd"];

/// What is expected of a data file, for messages.
pub(super) const EXPECTED: &str = ".jsonl, .json, .parquet, .arrow, .csv, .tsv or .txt, also packed as .gz or .zst";

impl Format {
    /// The format that a file's name says, and its extension without packing.
    pub(super) fn of(path: &Path) -> Option<(Self, &'static str)> {
        let name = path.file_name()?.to_string_lossy().to_lowercase();
        let (stem, last) = name.rsplit_once('.')?;
        let is_packed = PACKED.contains(&last);
        let last = if is_packed { stem.rsplit_once('.')?.1 } else { last };
        let &(extension, format) = EXTENSIONS.iter().find(|(extension, _)| *extension == last)?;
        // Parquet and Arrow pack inside.
        (!is_packed || !matches!(format, Self::Parquet | Self::Arrow)).then_some((format, extension))
    }
}

/// Rows of a file, and whether their numbers are lines.
///
/// # Errors
/// If it is no data file, or broken.
pub(super) fn read(path: &Path) -> Result<(Vec<ReadRow>, bool), Error> {
    let Some((format, extension)) = Format::of(path) else {
        return Err(Error::Content { path: path.into(), problem: format!("not a data file; expected {EXPECTED}") });
    };
    let text = || bytes::as_utf8(path, bytes::read(path)?);
    match format {
        Format::Json => json::rows(path, &text()?, extension != "json"),
        Format::Parquet => Ok((parquet::read_parquet(path)?, false)),
        Format::Arrow => Ok((parquet::read_arrow(path)?, false)),
        Format::Csv => {
            let delimiter = if extension == "tsv" { b'\t' } else { b',' };
            Ok((csv::rows(path, &text()?, delimiter)?, true))
        }
        Format::Text => Ok((lines_of_text(path, &text()?)?, true)),
    }
}

fn lines_of_text(path: &Path, bytes: &[u8]) -> Result<Vec<ReadRow>, Error> {
    let text = std::str::from_utf8(bytes).map_err(|e| Error::Line {
        path: path.into(),
        line: bytes::line_at(bytes, e.valid_up_to()),
        problem: "bytes that are not UTF-8; save the file as UTF-8".into(),
    })?;
    let row = |(number, line): (u32, &str)| {
        ReadRow::sound(number, Map::from_iter([("text".to_string(), Value::String(line.to_string()))]))
    };
    Ok((1..).zip(text.lines()).map(row).collect())
}
