//! Data sets as rows of named columns.
//!
//! [`Dataset`] holds the rows of files in the order of the files, and knows for each row the file and line it comes from,
//! so that every complaint about a row can name its place. A value that a row cannot hold (`NaN`, half a surrogate pair)
//! does not stop a run unless its column is used.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::{Map, Value};

use super::Error;
use super::formats;
use crate::rng::Stream;

/// One row: columns by name, in the order of the file.
pub type Row = Map<String, Value>;

/// A value that a row cannot hold and that was read as null, or with U+FFFD in its text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) column: String,
    /// Goes on after the column's name: "is `NaN`, ...".
    pub(super) problem: String,
}

/// One row as a reader gives it.
#[derive(Debug)]
pub(super) struct ReadRow {
    /// Line or row of the file, from 1.
    pub(super) number: u32,
    pub(super) row: Row,
    pub(super) faults: Vec<Fault>,
    /// A column in which objects inside of objects had null fields, which are left out.
    pub(super) null_fields: Option<String>,
}

impl ReadRow {
    /// A row that was read as it stands.
    pub(super) fn sound(number: u32, row: Row) -> Self {
        Self { number, row, faults: Vec::new(), null_fields: None }
    }
}

/// Rows with their places.
#[derive(Clone, Debug, Default)]
pub struct Dataset {
    rows: Vec<Row>,
    /// File (index into `files`) and line or row of each row, from 1.
    places: Vec<(u32, u32)>,
    /// What could not be read, by place.
    faults: BTreeMap<(u32, u32), Vec<Fault>>,
    files: Vec<PathBuf>,
    /// Per file: whether its rows are lines.
    are_lines: Vec<bool>,
}

impl Dataset {
    /// Reads files by their extension, see [`formats`](super::formats).
    ///
    /// # Errors
    /// If a file cannot be read, a row is not an object, or there is no row at all.
    pub fn read(files: &[PathBuf]) -> Result<Self, Error> {
        let mut dataset = Self::default();
        let mut nulls = (0, None);
        for path in files {
            let (rows, are_lines) = formats::read(path)?;
            let file = dataset.files.len() as u32;
            dataset.files.push(path.clone());
            dataset.are_lines.push(are_lines);
            for ReadRow { number, row, faults, null_fields } in rows {
                if let Some(column) = null_fields {
                    nulls.0 += 1;
                    nulls.1.get_or_insert(((file, number), column));
                }
                dataset.rows.push(row);
                dataset.places.push((file, number));
                if !faults.is_empty() {
                    dataset.faults.insert((file, number), faults);
                }
            }
        }
        if dataset.rows.is_empty() {
            let names: Vec<String> = files.iter().map(|f| format!("`{}`", f.display())).collect();
            return Err(Error::Empty { what: names.join(", ") });
        }
        dataset.warn_of_faults();
        if let (count, Some((place, column))) = nulls {
            tracing::warn!(
                "{}: objects inside of `{column}` have null fields; they are left out, here and in {} other rows: tables \
                 fill with null what a row lacks, so that the two cannot be told apart",
                dataset.at(place),
                count - 1
            );
        }
        Ok(dataset)
    }

    /// Says once per column that some of its values could not be read.
    fn warn_of_faults(&self) {
        let mut by_column: BTreeMap<&str, (usize, (u32, u32), &str)> = BTreeMap::new();
        for (place, faults) in &self.faults {
            for Fault { column, problem } in faults {
                by_column.entry(column).or_insert((0, *place, problem)).0 += 1;
            }
        }
        for (column, (count, place, problem)) in by_column {
            tracing::warn!(
                "{}: `{column}` {problem}; {count} such values of the column are read as null or with U+FFFD, which is \
                 an error only if the column is used",
                self.at(place)
            );
        }
    }

    /// Checks that every value of some columns could be read.
    ///
    /// # Errors
    /// If one could not; the message names its place.
    pub fn require_sound(&self, columns: &[&str]) -> Result<(), Error> {
        if self.faults.is_empty() {
            return Ok(());
        }
        for (index, place) in self.places.iter().enumerate() {
            let fault = self.faults.get(place).into_iter().flatten().find(|f| columns.contains(&f.column.as_str()));
            if let Some(Fault { column, problem }) = fault {
                return Err(Error::Row {
                    place: self.place(index),
                    problem: format!("`{column}` {problem}; the column is used here, so mend or remove the row"),
                });
            }
        }
        Ok(())
    }

    /// A data set from rows made in memory; places read `name, row N`.
    pub fn from_rows(name: &str, rows: Vec<Row>) -> Self {
        let places = (1..=rows.len() as u32).map(|line| (0, line)).collect();
        Self { rows, places, files: vec![PathBuf::from(name)], ..Self::default() }
    }

    /// A data set from rows of the lines of a file, each with its number from 1; places read as those of [`Dataset::read`].
    pub fn from_lines(path: &Path, lines: Vec<(u32, Row)>) -> Self {
        let (places, rows) = lines.into_iter().map(|(line, row)| ((0, line), row)).unzip();
        Self { rows, places, files: vec![path.to_path_buf()], are_lines: vec![true], ..Self::default() }
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
            Some(&place) => format!("row {index} ({})", self.at(place)),
            None => format!("row {index}"),
        }
    }

    fn at(&self, (file, number): (u32, u32)) -> String {
        let unit = if self.are_lines.get(file as usize) == Some(&true) { "line" } else { "row" };
        format!("`{}`, {unit} {number}", self.files[file as usize].display())
    }

    /// Column names of the first row, in order.
    pub fn columns(&self) -> Vec<String> {
        self.rows.first().map(|row| row.keys().cloned().collect()).unwrap_or_default()
    }

    /// Whether the first row has a column with a value.
    pub fn has(&self, column: &str) -> bool {
        self.rows.first().is_some_and(|row| row.get(column).is_some_and(|value| !value.is_null()))
    }

    /// Some of the rows.
    pub(super) fn slice(&self, range: Range<usize>) -> Self {
        let rows = self.rows[range.clone()].to_vec();
        Self { rows, places: self.places[range].to_vec(), ..self.without_rows() }
    }

    /// The rows `order`, each at most once, in that order.
    pub(super) fn pick(mut self, order: &[usize]) -> Self {
        let rows = order.iter().map(|&index| std::mem::take(&mut self.rows[index])).collect();
        let places = order.iter().map(|&index| self.places[index]).collect();
        Self { rows, places, ..self.without_rows() }
    }

    /// Leaves out all columns but some.
    ///
    /// # Errors
    /// If the first row lacks one of them.
    pub(super) fn keep_columns(&mut self, columns: &[String]) -> Result<(), Error> {
        self.require_columns(columns.iter().map(String::as_str), "columns")?;
        self.rows.par_iter_mut().for_each(|row| row.retain(|name, _| columns.contains(name)));
        Ok(())
    }

    /// Gives columns other names.
    ///
    /// # Errors
    /// If the first row lacks one of them.
    pub(super) fn rename_columns(&mut self, names: &[(String, String)]) -> Result<(), Error> {
        self.require_columns(names.iter().map(|(old, _)| old.as_str()), "dataset_columns")?;
        let renamed = |name: &str| names.iter().find(|(old, _)| old == name).map(|(_, new)| new.clone());
        self.rows.par_iter_mut().for_each(|row| {
            // A column that is already called so makes way.
            row.retain(|name, _| renamed(name).is_some() || !names.iter().any(|(_, new)| new == name));
            *row =
                std::mem::take(row).into_iter().map(|(name, value)| (renamed(&name).unwrap_or(name), value)).collect();
        });
        for fault in self.faults.values_mut().flatten() {
            fault.column = renamed(&fault.column).unwrap_or_else(|| std::mem::take(&mut fault.column));
        }
        Ok(())
    }

    /// Makes a column the prompt, as open-r1's `make_conversation` does: a text is one turn of a user.
    ///
    /// # Errors
    /// If the first row lacks it.
    pub fn prompt_from(&mut self, column: &str) -> Result<(), Error> {
        self.require_columns(std::iter::once(column), "dataset_prompt_column")?;
        self.rows.par_iter_mut().for_each(|row| {
            let prompt = match row.get(column).cloned().unwrap_or_default() {
                Value::String(text) => serde_json::json!([{"role": "user", "content": text}]),
                other => other,
            };
            row.insert("prompt".into(), prompt);
        });
        let of_prompt = |fault: &Fault| Fault { column: "prompt".into(), problem: fault.problem.clone() };
        for faults in self.faults.values_mut() {
            let copies: Vec<Fault> = faults.iter().filter(|fault| fault.column == column).map(of_prompt).collect();
            faults.extend(copies);
        }
        Ok(())
    }

    /// Gives every row another value of a column.
    pub(super) fn replace_column(&mut self, column: &str, values: impl Iterator<Item = Value>) {
        for (row, value) in self.rows.iter_mut().zip(values) {
            if let Some(old) = row.get_mut(column) {
                *old = value;
            }
        }
    }

    fn require_columns<'a>(&self, mut columns: impl Iterator<Item = &'a str>, key: &str) -> Result<(), Error> {
        let Some(first) = self.rows.first() else { return Ok(()) };
        match columns.find(|column| !first.contains_key(*column)) {
            Some(column) => Err(Error::MissingColumn {
                place: self.place(0),
                wanted: format!("column `{column}` (`{key}`)"),
                columns: self.columns(),
                hint: String::new(),
            }),
            None => Ok(()),
        }
    }

    /// The rows of several data sets, one after the other.
    pub(super) fn concat(parts: Vec<Self>) -> Self {
        let mut all = Self::default();
        for part in parts {
            let shift = all.files.len() as u32;
            all.rows.extend(part.rows);
            all.places.extend(part.places.into_iter().map(|(file, number)| (file + shift, number)));
            all.faults.extend(part.faults.into_iter().map(|((file, number), faults)| ((file + shift, number), faults)));
            all.files.extend(part.files);
            all.are_lines.extend(part.are_lines);
        }
        all
    }

    fn without_rows(&self) -> Self {
        Self {
            files: self.files.clone(),
            are_lines: self.are_lines.clone(),
            faults: self.faults.clone(),
            ..Self::default()
        }
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
        self.hold_out(count, seed, "eval_fraction")
    }

    /// As [`Dataset::split_off`], by number; `key` is the key that says so.
    pub(super) fn hold_out(self, count: usize, seed: u64, key: &str) -> Result<(Self, Self), Error> {
        if count == 0 || count >= self.len() {
            return Err(Error::Setting(format!(
                "`{key}` would hold out {count} of {} rows; hold out some and leave rows to train on",
                self.len()
            )));
        }
        let mut order: Vec<usize> = (0..self.len()).collect();
        Stream::new(seed, "eval split", 0, 0).shuffle(&mut order);
        let mut is_held_out = vec![false; self.len()];
        order[..count].iter().for_each(|&index| is_held_out[index] = true);
        let (mut rest, mut share) = (self.without_rows(), self.without_rows());
        for ((row, place), held_out) in self.rows.into_iter().zip(self.places).zip(is_held_out) {
            let target = if held_out { &mut share } else { &mut rest };
            target.rows.push(row);
            target.places.push(place);
        }
        Ok((rest, share))
    }
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
    use std::path::Path;

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
        assert!(dataset.place(5).contains("c.json`, line 2"), "{}", dataset.place(5));
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
        let text = message("d.json", b"[{\"x\": 1},\n 7]");
        assert!(text.contains("entry 2 of the array is a number"), "{text}");
        let text = message("e.json", b"[{\"x\": 1},\n {]");
        assert!(text.contains("e.json`, line 2: not valid JSON at column"), "{text}");
        let text = message("f.xlsx", b"x\n1\n");
        assert!(text.contains("not a data file; expected .jsonl, .json, .parquet"), "{text}");
        for (name, content) in [("g.jsonl", &b"\n\n"[..]), ("h.jsonl", b""), ("i.json", b"[]")] {
            let text = message(name, content);
            assert!(text.contains(&format!("{name}` has no rows")), "{text}");
        }
        let text = Dataset::read(&[folder.path().join("absent.jsonl")]).unwrap_err().to_string();
        assert!(text.contains("cannot open") && text.contains("absent.jsonl"), "{text}");
    }

    #[test]
    fn values_that_json_cannot_hold_stop_only_those_who_use_their_column() {
        let folder = tempfile::tempdir().unwrap();
        let text = b"{\"text\": \"a\", \"score\": NaN}\n{\"text\": \"b \\ud83d\", \"score\": 1.0}\n{\"text\": \"c\", \"score\": 1}\n";
        let dataset = Dataset::read(&[write(folder.path(), "a.jsonl", text)]).unwrap();
        assert_eq!((dataset.len(), &dataset.rows()[0]["score"]), (3, &Value::Null));
        assert!(dataset.require_sound(&["messages", "tools"]).is_ok());
        let text = dataset.require_sound(&["score"]).unwrap_err().to_string();
        assert!(text.contains("row 0 (`") && text.contains("line 1): `score` is NaN"), "{text}");
        let text = dataset.require_sound(&["text"]).unwrap_err().to_string();
        assert!(text.contains("line 2): `text` has half of a surrogate pair"), "{text}");
        let mut first = dataset;
        first.truncate(1);
        assert!(first.require_sound(&["text"]).is_ok(), "rows that are left out do not count");
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
