//! What an evaluation tells: tables on the console and in Markdown, everything in JSON, completions line by line.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context as _;
use serde_json::{Map, Value, json};

use super::choice::Choice;
use super::metric::{Difference, Metric};
use super::{Measured, Request, Rows, Shared};
use crate::config::settings::DataSettings;
use crate::fs::write_atomic;
use crate::telemetry::{Section, units};
use crate::train::Backend;

/// What the two models are called.
pub(super) const COLUMNS: [&str; 2] = ["model", "against"];
/// Form of evaluation.json.
const FORMAT_VERSION: u32 = 1;
const NOT_ALIKE: &str = "the two models cut the rows into different tokens, so there are no differences";

/// Everything that is reported of an evaluation.
pub(super) struct Report<'a> {
    choices: &'a [Choice],
    measured: &'a [Measured],
    differences: Vec<Difference>,
    /// What was done, for evaluation.json.
    facts: Map<String, Value>,
    title: String,
    /// What a unit of the metrics is.
    unit: &'static str,
}

/// The name of the data set, or that there are several.
pub(super) fn data_name(data: &DataSettings) -> String {
    match &data.mixture {
        Some(mixture) => {
            let names: Vec<&str> = mixture.parts.iter().map(|part| part.path.as_str()).collect();
            names.join(" + ")
        }
        None => data.dataset_name.clone(),
    }
}

impl<'a> Report<'a> {
    pub(super) fn new(
        shared: &Shared<'_>,
        request: &Request,
        rows: &Rows,
        backend: &Backend,
        choices: &'a [Choice],
        measured: &'a [Measured],
    ) -> Self {
        let data = json!({
            "name": data_name(shared.data), "split": rows.name(), "rows": rows.dataset.len(),
        });
        let mut facts: Map<String, Value> = [
            ("format_version", json!(FORMAT_VERSION)),
            ("trainer_version", json!(env!("CARGO_PKG_VERSION"))),
            ("commit", json!(option_env!("TRAINER_GIT_COMMIT"))),
            ("config", json!(request.config)),
            ("task", json!(shared.task)),
            ("data", data),
            ("device", json!(backend.describe())),
            ("seed", json!(shared.training.seed)),
            ("confidence", json!(0.95)),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_string(), value))
        .collect();
        facts.insert("settings".into(), Value::Object(shared.facts.clone()));
        let unit = if shared.task == "grpo" { "prompt" } else { "sequence" };
        let title = format!("Evaluation of {}", request.config);
        Self { choices, measured, differences: differences(measured, shared.training.seed), facts, title, unit }
    }

    /// Writes evaluation.md, completions.jsonl if there are completions, and evaluation.json, each whole or not at all.
    ///
    /// # Errors
    /// If one of them cannot be written.
    pub(super) fn write(&self, folder: &Path) -> anyhow::Result<()> {
        let completions = self.completions().context("cannot write the completions as JSON")?;
        if !completions.is_empty() {
            write_atomic(&folder.join("completions.jsonl"), completions.as_bytes())?;
        }
        write_atomic(&folder.join("evaluation.md"), self.markdown().as_bytes())?;
        let mut text = serde_json::to_string_pretty(&self.to_json()).context("cannot write the results as JSON")?;
        text.push('\n');
        Ok(write_atomic(&folder.join("evaluation.json"), text.as_bytes())?)
    }

    /// The results for the console.
    pub(super) fn sections(&self, folder: &Path) -> Vec<Section> {
        let names = self.metric_names();
        let mut cells: Vec<Vec<String>> = vec![self.columns().map(Into::into).collect()];
        cells.extend(names.iter().map(|name| self.row(name)));
        let lines = aligned(&cells);
        let mut results = Section::new(format!("Results, with intervals of 95% over {}s", self.unit));
        // One column needs no heading.
        let headings = std::iter::once("").chain(names.iter().map(String::as_str));
        headings
            .zip(&lines)
            .skip(usize::from(self.measured.len() == 1))
            .for_each(|(name, line)| results.push(name, line));
        let mut sections = vec![results];
        if self.measured.len() == 2 {
            sections.push(self.difference_section());
        }
        let mut end = Section::new("Evaluated");
        for (column, measured) in self.columns().zip(self.measured) {
            let (tokens, secs) = (measured.speed.tokens, measured.speed.secs);
            let rate = tokens as f64 / secs.max(f64::MIN_POSITIVE);
            end.push(column, format!("{} tokens at {rate:.0} tokens/s", units::count(tokens as u64)));
        }
        sections.push(end.row("results", folder.join("evaluation.json").display()));
        sections
    }

    fn difference_section(&self) -> Section {
        let mut section = Section::new(format!("{} less {}, paired by {}", COLUMNS[0], COLUMNS[1], self.unit));
        if self.differences.is_empty() {
            return section.row("note", NOT_ALIKE);
        }
        let cells: Vec<Vec<String>> =
            self.differences.iter().map(|difference| difference.shown().into()).map(<[String; 2]>::into).collect();
        self.differences
            .iter()
            .zip(aligned(&cells))
            .for_each(|(difference, line)| section.push(&difference.name, line));
        section
    }

    fn columns(&self) -> impl Iterator<Item = &'static str> + use<> {
        COLUMNS.into_iter().take(self.measured.len())
    }

    /// Names of the metrics of any model, those of the first in its order before others.
    fn metric_names(&self) -> Vec<String> {
        let mut names: Vec<String> = Vec::new();
        for metric in self.measured.iter().flat_map(|measured| &measured.metrics) {
            if !names.contains(&metric.name) {
                names.push(metric.name.clone());
            }
        }
        names
    }

    /// A metric of each model.
    fn row(&self, name: &str) -> Vec<String> {
        let of = |measured: &Measured| find(measured, name).map_or_else(|| "none".into(), Metric::shown);
        self.measured.iter().map(of).collect()
    }

    fn markdown(&self) -> String {
        let mut text = format!("# {}\n\n", self.title);
        for (column, choice) in self.columns().zip(self.choices) {
            let _ = writeln!(text, "- {column}: {}", choice.described);
        }
        let data = &self.facts["data"];
        let name = data["name"].as_str().unwrap_or_default();
        let _ = writeln!(
            text,
            "- data: `{name}`, {} rows of the {} split",
            data["rows"],
            data["split"].as_str().unwrap_or_default()
        );
        let heading: Vec<String> = self.columns().map(Into::into).collect();
        let rows: Vec<(String, Vec<String>)> = self
            .metric_names()
            .into_iter()
            .map(|name| {
                let row = self.row(&name);
                (name, row)
            })
            .collect();
        let _ = write!(
            text,
            "\nEstimates with intervals of 95% over {}s:\n\n{}",
            self.unit,
            markdown_table(&heading, &rows)
        );
        if self.measured.len() == 2 {
            let rows: Vec<(String, Vec<String>)> = self
                .differences
                .iter()
                .map(|difference| {
                    let (change, verdict) = difference.shown();
                    (difference.name.clone(), vec![change, verdict])
                })
                .collect();
            let table = if rows.is_empty() {
                format!("{NOT_ALIKE}.\n")
            } else {
                markdown_table(&["difference".into(), "sign-flip test".into()], &rows)
            };
            let _ = write!(text, "\n{} less {}, paired by {}:\n\n{table}", COLUMNS[0], COLUMNS[1], self.unit);
        }
        text
    }

    fn to_json(&self) -> Value {
        let mut all = self.facts.clone();
        for ((column, choice), measured) in self.columns().zip(self.choices).zip(self.measured) {
            let mut own = choice.to_json();
            let metrics = measured.metrics.iter().map(|metric| (metric.name.clone(), metric.to_json()));
            own["metrics"] = Value::Object(metrics.collect());
            own[format!("per_{}", self.unit)] = per_unit(measured);
            own["speed"] = json!({
                "tokens": measured.speed.tokens,
                "secs": measured.speed.secs,
                "tokens_per_second": measured.speed.tokens as f64 / measured.speed.secs.max(f64::MIN_POSITIVE),
            });
            all.insert(column.into(), own);
        }
        if self.measured.len() == 2 {
            let differences = self.differences.iter().map(|difference| (difference.name.clone(), difference.to_json()));
            all.insert("difference".into(), Value::Object(differences.collect()));
        }
        Value::Object(all)
    }

    /// completions.jsonl.
    fn completions(&self) -> serde_json::Result<String> {
        let mut text = String::new();
        for (column, measured) in self.columns().zip(self.measured) {
            for record in &measured.records {
                let mut named: Map<String, Value> = Map::new();
                named.insert("model".into(), column.into());
                named.extend(record.as_object().cloned().unwrap_or_default());
                text += &serde_json::to_string(&named)?;
                text.push('\n');
            }
        }
        Ok(text)
    }
}

/// The first model less the second, metric by metric; nothing where their units are not the same.
fn differences(measured: &[Measured], seed: u64) -> Vec<Difference> {
    let [one, other] = measured else { return Vec::new() };
    if one.indices != other.indices || one.targets != other.targets {
        return Vec::new();
    }
    let minus = |metric: &Metric| metric.minus(find(other, &metric.name)?, seed);
    one.metrics.iter().filter_map(minus).collect()
}

fn find<'m>(measured: &'m Measured, name: &str) -> Option<&'m Metric> {
    measured.metrics.iter().find(|metric| metric.name == name)
}

/// The units with their values of every metric.
fn per_unit(measured: &Measured) -> Value {
    let unit = |(place, &index): (usize, &usize)| {
        let mut values = Map::new();
        values.insert("index".into(), json!(index));
        if let Some(targets) = measured.targets.get(place) {
            values.insert("targets".into(), json!(targets));
        }
        values.extend(measured.metrics.iter().map(|metric| (metric.name.clone(), json!(metric.of_units[place]))));
        Value::Object(values)
    };
    measured.indices.iter().enumerate().map(unit).collect()
}

/// Rows of cells as lines whose columns begin below each other.
fn aligned(rows: &[Vec<String>]) -> Vec<String> {
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let line = |row: &Vec<String>| {
        let cells =
            row.iter().enumerate().map(|(column, cell)| format!("{cell:<width$}", width = width(column).unwrap_or(0)));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_string()
    };
    rows.iter().map(line).collect()
}

fn markdown_table(heading: &[String], rows: &[(String, Vec<String>)]) -> String {
    let line = |first: &str, cells: &[String]| format!("| {first} | {} |\n", cells.join(" | "));
    let rule = format!("| --- |{}\n", " --- |".repeat(heading.len()));
    let body: String = rows.iter().map(|(name, cells)| line(name, cells)).collect();
    line("metric", heading) + &rule + &body
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_aligned_and_in_markdown() {
        let cells = |row: [&str; 2]| row.map(String::from).to_vec();
        assert_eq!(aligned(&[cells(["a", "b"]), cells(["ccc", "d"])]), ["a    b", "ccc  d"]);
        let table = markdown_table(&cells(["x", "y"]), &[("m".into(), cells(["1", "2"]))]);
        assert_eq!(table, "| metric | x | y |\n| --- | --- | --- |\n| m | 1 | 2 |\n");
    }
}
