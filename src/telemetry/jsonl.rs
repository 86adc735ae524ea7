//! Files of JSON lines that a run appends to: `metrics.jsonl`, `completions.jsonl`.
//!
//! Every append is one write of whole lines, so a kill leaves at most a torn last line. A resumed run first cuts the
//! file back to the step it goes on from, in one atomic replacement, so that no step appears twice.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use super::{Error, Row};
use crate::fs::{self, io_error};

/// An open file of JSON lines.
#[derive(Debug)]
pub struct JsonLines {
    path: PathBuf,
    file: File,
}

/// What cutting back a file removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CutBack {
    /// Rows that stay.
    pub kept: usize,
    /// Rows of later steps that were removed.
    pub removed: usize,
    /// Lines that were not JSON objects with a `step` and were removed; a kill while writing leaves one.
    pub unreadable: usize,
}

impl JsonLines {
    /// Starts the file anew.
    ///
    /// # Errors
    /// If it cannot be created.
    pub fn create(path: &Path) -> Result<Self, Error> {
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).map_err(io_error("create the folder", folder))?;
        }
        Ok(Self { path: path.into(), file: fs::create_anew(path)? })
    }

    /// Opens the file to go on after `step`: rows with a larger `step` are removed. A missing file is started anew.
    ///
    /// # Errors
    /// If it cannot be read or replaced; it is then unchanged.
    pub fn resume(path: &Path, step: u64) -> Result<(Self, CutBack), Error> {
        if path.symlink_metadata().is_err() {
            return Ok((Self::create(path)?, CutBack::default()));
        }
        // Before anything is read: a link is refused, not replaced by what it leads to.
        drop(fs::open_own(path, OpenOptions::new().append(true))?);
        let mut cut = CutBack::default();
        let mut kept = Vec::new();
        for_each_line(path, |line| match step_of(line) {
            Some(row_step) if row_step <= step => {
                cut.kept += 1;
                kept.extend_from_slice(line);
                kept.push(b'\n');
            }
            Some(_) => cut.removed += 1,
            None => cut.unreadable += 1,
        })?;
        if cut.removed + cut.unreadable > 0 || std::fs::metadata(path).is_ok_and(|m| m.len() != kept.len() as u64) {
            fs::write_atomic(path, &kept)?;
        }
        let file = fs::open_own(path, OpenOptions::new().append(true))?;
        Ok((Self { path: path.into(), file }, cut))
    }

    /// Appends one row.
    ///
    /// # Errors
    /// If the row has no JSON form or the file cannot be written.
    pub fn append(&mut self, row: &impl Serialize) -> Result<(), Error> {
        self.append_all(std::slice::from_ref(row))
    }

    /// Appends rows in one write.
    ///
    /// # Errors
    /// If a row has no JSON form or the file cannot be written.
    pub fn append_all(&mut self, rows: &[impl Serialize]) -> Result<(), Error> {
        let mut lines = Vec::new();
        for row in rows {
            serde_json::to_writer(&mut lines, row).map_err(|source| Error::Json { path: self.path.clone(), source })?;
            lines.push(b'\n');
        }
        self.file.write_all(&lines).and_then(|()| self.file.flush()).map_err(io_error("append to", &self.path))?;
        Ok(())
    }
}

/// The rows of a file of JSON objects; a torn last line is left out.
///
/// # Errors
/// If the file cannot be read.
pub fn read_rows(path: &Path) -> Result<Vec<Row>, Error> {
    let mut rows = Vec::new();
    for_each_line(path, |line| {
        if let Ok(Value::Object(row)) = serde_json::from_slice(line) {
            rows.push(row);
        }
    })?;
    Ok(rows)
}

fn for_each_line(path: &Path, mut visit: impl FnMut(&[u8])) -> Result<(), Error> {
    let file = File::open(path).map_err(io_error("open", path))?;
    for line in BufReader::new(file).split(b'\n') {
        let line = line.map_err(io_error("read", path))?;
        if !line.iter().all(u8::is_ascii_whitespace) {
            visit(&line);
        }
    }
    Ok(())
}

fn step_of(line: &[u8]) -> Option<u64> {
    let row: Row = serde_json::from_slice(line).ok()?;
    row.get("step")?.as_u64()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_resumed_file_holds_every_step_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/metrics.jsonl");
        let mut file = JsonLines::create(&path).unwrap();
        for step in 1..=5 {
            file.append(&json!({"step": step, "loss": f64::from(step) / 3.0})).unwrap();
        }
        file.append(&json!({"step": 3, "eval_loss": 1.0})).unwrap();
        drop(file);
        let mut torn = OpenOptions::new().append(true).open(&path).unwrap();
        torn.write_all(br#"{"step": 6, "lo"#).unwrap();

        let (mut file, cut) = JsonLines::resume(&path, 3).unwrap();
        assert_eq!(cut, CutBack { kept: 4, removed: 2, unreadable: 1 });
        file.append_all(&[json!({"step": 4}), json!({"step": 5})]).unwrap();
        let steps: Vec<u64> = read_rows(&path).unwrap().iter().map(|row| row["step"].as_u64().unwrap()).collect();
        assert_eq!(steps, [1, 2, 3, 3, 4, 5]);
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(
            text.lines().next().unwrap(),
            r#"{"step":1,"loss":0.3333333333333333}"#,
            "kept rows keep every digit"
        );
    }

    #[test]
    fn a_whole_last_line_without_its_newline_does_not_swallow_the_next_row() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        std::fs::write(&path, r#"{"step": 1}"#).unwrap();
        let (mut file, cut) = JsonLines::resume(&path, 9).unwrap();
        assert_eq!(cut, CutBack { kept: 1, removed: 0, unreadable: 0 });
        file.append(&json!({"step": 2})).unwrap();
        assert_eq!(read_rows(&path).unwrap().len(), 2);
    }

    #[test]
    fn a_full_disk_is_named_with_the_file() {
        let mut file = JsonLines {
            path: "out/metrics.jsonl".into(),
            file: OpenOptions::new().write(true).open("/dev/full").unwrap(),
        };
        let message = file.append(&json!({"step": 1})).unwrap_err().to_string();
        assert!(message.contains("cannot append to `out/metrics.jsonl`"), "{message}");
        assert!(message.contains("free some space"), "{message}");
    }
}
