//! Data sets as rows of named columns.
//!
//! [`Dataset`] holds the rows of JSONL, JSON and Parquet files in the order of the files, and knows for each row the
//! file and line it comes from, so that every complaint about a row can name its place.

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::{Map, Value};

use super::Error;
use super::parquet::read_parquet;
use crate::rng::Stream;

/// One row: columns by name, in the order of the file.
pub type Row = Map<String, Value>;

/// Rows with their places.
#[derive(Clone, Debug, Default)]
pub struct Dataset {
    rows: Vec<Row>,
    /// File (index into `files`) and line or row of each row, from 1.
    places: Vec<(u32, u32)>,
    files: Vec<PathBuf>,
}

impl Dataset {
    /// Reads files by their extension: `.jsonl`, `.json` (an array of objects, or lines), `.parquet`.
    ///
    /// # Errors
    /// If a file cannot be read, a row is not an object, or there is no row at all.
    pub fn read(files: &[PathBuf]) -> Result<Self, Error> {
        let mut dataset = Self::default();
        for path in files {
            let rows = match extension(path).as_str() {
                "jsonl" | "ndjson" => read_lines(path, &crate::fs::read(path)?)?,
                "json" => read_json(path)?,
                "parquet" => number(read_parquet(path)?),
                _ => {
                    return Err(Error::Content {
                        path: path.clone(),
                        problem: "not a data file; expected .jsonl, .json or .parquet".into(),
                    });
                }
            };
            let file = dataset.files.len() as u32;
            dataset.files.push(path.clone());
            for (line, row) in rows {
                dataset.rows.push(row);
                dataset.places.push((file, line));
            }
        }
        if dataset.rows.is_empty() {
            let names: Vec<String> = files.iter().map(|f| format!("`{}`", f.display())).collect();
            return Err(Error::Empty { what: names.join(", ") });
        }
        Ok(dataset)
    }

    /// A data set from rows made in memory; places read `name, row N`.
    pub fn from_rows(name: &str, rows: Vec<Row>) -> Self {
        let places = (1..=rows.len() as u32).map(|line| (0, line)).collect();
        Self { rows, places, files: vec![PathBuf::from(name)] }
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// All rows.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// The files the rows come from.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Where row `index` comes from, e.g. ``row 12 (`data/train.jsonl`, line 13)``.
    pub fn place(&self, index: usize) -> String {
        match self.places.get(index) {
            Some(&(file, line)) => {
                let path = &self.files[file as usize];
                let unit = if extension(path) == "jsonl" { "line" } else { "row" };
                format!("row {index} (`{}`, {unit} {line})", path.display())
            }
            None => format!("row {index}"),
        }
    }

    /// Column names of the first row, in order.
    pub fn columns(&self) -> Vec<String> {
        self.rows.first().map(|row| row.keys().cloned().collect()).unwrap_or_default()
    }

    /// Whether the first row has a column with a value.
    pub fn has(&self, column: &str) -> bool {
        self.rows.first().is_some_and(|row| row.get(column).is_some_and(|value| !value.is_null()))
    }

    /// Keeps the first `count` rows.
    pub fn truncate(&mut self, count: usize) {
        self.rows.truncate(count);
        self.places.truncate(count);
    }

    /// Takes a random share of the rows out, at least one: returns (the rest, the share), each in the old order. The
    /// choice depends on `seed` only.
    ///
    /// # Errors
    /// If `fraction` is not inside (0, 1) or nothing would be left.
    pub fn split_off(self, fraction: f64, seed: u64) -> Result<(Self, Self), Error> {
        let count = ((self.len() as f64 * fraction).round() as usize).max(1);
        if !(fraction > 0.0 && fraction < 1.0) || count >= self.len() {
            return Err(Error::Setting(format!(
                "`eval_fraction: {fraction}` of {} rows would hold out {count}; it must be inside (0, 1) and leave \
                 rows to train on",
                self.len()
            )));
        }
        let mut order: Vec<usize> = (0..self.len()).collect();
        Stream::new(seed, "eval split", 0, 0).shuffle(&mut order);
        let mut is_held_out = vec![false; self.len()];
        order[..count].iter().for_each(|&index| is_held_out[index] = true);
        let empty = || Self { files: self.files.clone(), ..Self::default() };
        let (mut rest, mut share) = (empty(), empty());
        for ((row, place), held_out) in self.rows.into_iter().zip(self.places).zip(is_held_out) {
            let target = if held_out { &mut share } else { &mut rest };
            target.rows.push(row);
            target.places.push(place);
        }
        Ok((rest, share))
    }
}

/// The extension in lower case, or nothing.
pub(super) fn extension(path: &Path) -> String {
    path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default()
}

fn number(rows: Vec<Row>) -> Vec<(u32, Row)> {
    (1..).zip(rows).collect()
}

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

fn read_json(path: &Path) -> Result<Vec<(u32, Row)>, Error> {
    let bytes = crate::fs::read(path)?;
    let text = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&bytes);
    if text.iter().find(|b| !b.is_ascii_whitespace()) != Some(&b'[') {
        return read_lines(path, &bytes);
    }
    let values: Vec<Value> = serde_json::from_slice(text).map_err(|e| Error::Line {
        path: path.into(),
        line: e.line(),
        problem: format!("not valid JSON at column {}: {}", e.column(), reason(&e)),
    })?;
    let rows = values.into_iter().enumerate().map(|(index, value)| match value {
        Value::Object(row) => Ok((index as u32 + 1, row)),
        other => Err(Error::Content {
            path: path.into(),
            problem: format!("entry {} of the array is {}, expected an object per row", index + 1, kind(&other)),
        }),
    });
    rows.collect()
}

/// One JSON object per line; blank lines are skipped. Lines are parsed on all cores.
fn read_lines(path: &Path, bytes: &[u8]) -> Result<Vec<(u32, Row)>, Error> {
    let text = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes);
    let lines: Vec<(u32, &[u8])> =
        (1..).zip(text.split(|&b| b == b'\n')).filter(|(_, line)| !line.iter().all(u8::is_ascii_whitespace)).collect();
    let parse = |&(number, line): &(u32, &[u8])| match serde_json::from_slice(line) {
        Ok(Value::Object(row)) => Ok((number, row)),
        Ok(other) => Err((number, format!("{}, expected one JSON object per line", kind(&other)))),
        Err(e) => Err((number, format!("not valid JSON at column {}: {}", e.column(), reason(&e)))),
    };
    let parsed: Vec<Result<(u32, Row), (u32, String)>> = lines.par_iter().map(parse).collect();
    let rows: Result<Vec<(u32, Row)>, (u32, String)> = parsed.into_iter().collect();
    rows.map_err(|(line, problem)| Error::Line { path: path.into(), line: line as usize, problem })
}

/// serde's message without the position, which our own message has.
fn reason(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.split(" at line ").next().unwrap_or(&text).to_string()
}

/// What a value is, for messages.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn write(folder: &Path, name: &str, text: &[u8]) -> PathBuf {
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    #[test]
    fn lines_arrays_blank_lines_and_byte_order_marks_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let a = write(folder.path(), "a.jsonl", b"\xef\xbb\xbf{\"x\": 1}\r\n\n  \n{\"x\": 2, \"y\": [null]}");
        let b = write(folder.path(), "b.json", b" [{\"x\": 3}, {\"x\": 4}]\n");
        let c = write(folder.path(), "c.json", b"{\"x\": 5}\n{\"x\": 6}\n");
        let dataset = Dataset::read(&[a, b, c]).unwrap();
        let xs: Vec<i64> = dataset.rows().iter().map(|row| row["x"].as_i64().unwrap()).collect();
        assert_eq!(xs, [1, 2, 3, 4, 5, 6]);
        assert_eq!(dataset.columns(), ["x"]);
        assert!(dataset.place(1).contains("a.jsonl`, line 4"), "{}", dataset.place(1));
        assert!(dataset.place(3).contains("b.json`, row 2"), "{}", dataset.place(3));
    }

    #[test]
    fn broken_lines_are_named_with_their_number_and_the_fault() {
        let folder = tempfile::tempdir().unwrap();
        let message =
            |name: &str, text: &[u8]| Dataset::read(&[write(folder.path(), name, text)]).unwrap_err().to_string();
        let text = message("a.jsonl", b"{\"x\": 1}\n\n{\"x\": 1\n{\"x\": \n");
        assert!(text.contains("a.jsonl`, line 3: not valid JSON at column 7: EOF"), "{text}");
        let text = message("b.jsonl", b"{\"x\": 1}\n[1]\n");
        assert!(text.ends_with("line 2: an array, expected one JSON object per line"), "{text}");
        let text = message("c.jsonl", b"{\"x\": \"\xff\"}\n");
        assert!(text.contains("line 1: not valid JSON"), "{text}");
        let text = message("d.json", b"[{\"x\": 1},\n 7]");
        assert!(text.contains("entry 2 of the array is a number"), "{text}");
        let text = message("e.json", b"[{\"x\": 1},\n {]");
        assert!(text.contains("e.json`, line 2: not valid JSON at column"), "{text}");
        let text = message("f.csv", b"x\n1\n");
        assert!(text.contains("not a data file; expected .jsonl, .json or .parquet"), "{text}");
        for (name, content) in [("g.jsonl", &b"\n\n"[..]), ("h.jsonl", b""), ("i.json", b"[]")] {
            let text = message(name, content);
            assert!(text.contains(&format!("{name}` has no rows")), "{text}");
        }
        let text = Dataset::read(&[folder.path().join("absent.jsonl")]).unwrap_err().to_string();
        assert!(text.contains("cannot open") && text.contains("absent.jsonl"), "{text}");
    }

    #[test]
    fn a_held_out_share_is_disjoint_repeatable_and_keeps_the_order() {
        let rows = |n: i64| (0..n).map(|x| json!({ "x": x }).as_object().unwrap().clone()).collect::<Vec<_>>();
        let xs = |d: &Dataset| d.rows().iter().map(|r| r["x"].as_i64().unwrap()).collect::<Vec<_>>();
        let (rest, share) = Dataset::from_rows("memory", rows(100)).split_off(0.1, 7).unwrap();
        assert_eq!((rest.len(), share.len()), (90, 10));
        let mut all = [xs(&rest), xs(&share)].concat();
        assert!(xs(&rest).is_sorted() && xs(&share).is_sorted());
        all.sort_unstable();
        assert_eq!(all, (0..100).collect::<Vec<_>>());
        assert_eq!(xs(&Dataset::from_rows("memory", rows(100)).split_off(0.1, 7).unwrap().1), xs(&share));
        assert_ne!(xs(&Dataset::from_rows("memory", rows(100)).split_off(0.1, 8).unwrap().1), xs(&share));
        assert!(share.place(0).contains(&format!("row {}", xs(&share)[0] + 1)));
        for fraction in [0.0, 1.0, 0.999, f64::NAN] {
            assert!(Dataset::from_rows("memory", rows(100)).split_off(fraction, 7).is_err(), "{fraction}");
        }
    }
}
