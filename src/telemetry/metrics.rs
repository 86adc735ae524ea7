//! The metric sinks of a run under its `output_dir`: `metrics.jsonl`, `completions.jsonl`, `runs/` for TensorBoard.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{Error, EventWriter, JsonLines, Row};
use crate::fs::io_error;

/// All sinks of one run. Only rank 0 has one.
#[derive(Debug)]
pub struct Metrics {
    rows: JsonLines,
    /// Made with the first completions: only GRPO has some.
    completions: Option<JsonLines>,
    completions_path: PathBuf,
    events: Option<EventWriter>,
}

impl Metrics {
    /// Opens the sinks. With `resumed_from` the files are cut back to that step and TensorBoard is told to forget later
    /// ones; without, they are started anew.
    ///
    /// # Errors
    /// If a file cannot be read or written.
    pub fn open(output_dir: &Path, resumed_from: Option<u64>, has_tensorboard: bool) -> Result<Self, Error> {
        let open = |name: &str| -> Result<JsonLines, Error> {
            let path = output_dir.join(name);
            let Some(step) = resumed_from else { return JsonLines::create(&path) };
            let (file, cut) = JsonLines::resume(&path, step)?;
            if cut.unreadable > 0 {
                tracing::warn!("left out {} unreadable lines of `{}`", cut.unreadable, path.display());
            }
            Ok(file)
        };
        let completions_path = output_dir.join("completions.jsonl");
        let has_completions = completions_path.symlink_metadata().is_ok();
        let completions = match resumed_from {
            Some(_) if has_completions => Some(open("completions.jsonl")?),
            None if has_completions => {
                std::fs::remove_file(&completions_path).map_err(io_error("remove the old", &completions_path))?;
                None
            }
            _ => None,
        };
        Ok(Self {
            rows: open("metrics.jsonl")?,
            completions,
            completions_path,
            events: if has_tensorboard {
                Some(EventWriter::open(&output_dir.join("runs"), resumed_from)?)
            } else {
                None
            },
        })
    }

    /// Writes one row to every sink. The row carries its `step`.
    ///
    /// # Errors
    /// If a sink cannot be written.
    pub fn log(&mut self, row: &Row) -> Result<(), Error> {
        self.rows.append(row)?;
        if let Some(events) = &mut self.events {
            events.write_row(row)?;
        }
        Ok(())
    }

    /// Writes the completions of one step; each carries its `step`.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn log_completions(&mut self, completions: &[impl Serialize]) -> Result<(), Error> {
        let file = match self.completions.take() {
            Some(file) => file,
            None => JsonLines::create(&self.completions_path)?,
        };
        self.completions.insert(file).append_all(completions)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn row(value: &serde_json::Value) -> Row {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn a_resumed_run_leaves_the_files_of_a_straight_one() {
        let folder = tempfile::tempdir().unwrap();
        let run = |name: &str, resumed_from: Option<u64>, steps: std::ops::RangeInclusive<u64>| {
            let mut metrics = Metrics::open(&folder.path().join(name), resumed_from, true).unwrap();
            for step in steps {
                metrics.log(&row(&json!({"step": step, "loss": 1.0 / step as f64}))).unwrap();
                metrics.log_completions(&[json!({"step": step, "completion": "x"})]).unwrap();
            }
        };
        run("straight", None, 1..=6);
        run("resumed", None, 1..=4);
        run("resumed", Some(3), 4..=6);
        for file in ["metrics.jsonl", "completions.jsonl"] {
            let read = |name: &str| std::fs::read_to_string(folder.path().join(name).join(file)).unwrap();
            assert_eq!(read("straight"), read("resumed"), "{file}");
        }
        assert_eq!(std::fs::read_dir(folder.path().join("resumed/runs")).unwrap().count(), 2);
    }
}
