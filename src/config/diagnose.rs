//! What is wrong with a config: collected, sorted and rendered with the lines it is about.
//!
//! Every check of this room adds to one [`Problems`]; nothing stops at the first. [`ConfigError`] is the finished
//! report. The invariant: a problem that concerns a value whose own problem is already reported is left out, so that
//! one mistake gives one message.

use std::fmt;
use std::io::Read;
use std::ops::Range;
use std::path::Path;

use miette::{GraphicalReportHandler, GraphicalTheme, LabeledSpan, NamedSource};

/// A text that settings are read from: a file, or what stood behind `--set`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    name: String,
    text: String,
}

/// Largest file that is read as a configuration.
const MOST_BYTES: u64 = 4 << 20;

/// The bytes of a file, or of its beginning if it has more than `most`.
fn read_at_most(path: &Path, most: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(most + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

impl Source {
    /// Reads a config file.
    ///
    /// # Errors
    /// If the file cannot be read or is not UTF-8.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let name = path.display().to_string();
        match read_at_most(path, MOST_BYTES) {
            Ok(bytes) if bytes.len() as u64 > MOST_BYTES => Err(ConfigError::of_file(
                &name,
                &format!("is larger than {} MiB, which no configuration is", MOST_BYTES >> 20),
                "name the configuration; data and models are named inside it",
            )),
            Ok(bytes) => match String::from_utf8(bytes) {
                Ok(text) => Ok(Self { name, text }),
                Err(error) => Err(ConfigError::of_file(
                    &name,
                    &format!("is not UTF-8 text: byte {} is the first that is not", error.utf8_error().valid_up_to()),
                    "save it as UTF-8",
                )),
            },
            Err(error) => {
                let help = if error.kind() == std::io::ErrorKind::NotFound {
                    "check the path; it is relative to the working directory"
                } else {
                    "check that it is a file and that you may read it"
                };
                Err(ConfigError::of_file(&name, &format!("cannot be read: {error}"), help))
            }
        }
    }

    /// A text that is at hand already; `name` is shown in diagnostics.
    #[must_use]
    pub fn new(name: impl Into<String>, text: impl Into<String>) -> Self {
        Self { name: name.into(), text: text.into() }
    }

    /// What diagnostics call it: the path, or `--set`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The text.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The line (from 1) a byte stands in.
    fn line(&self, offset: usize) -> usize {
        1 + self.text.bytes().take(offset).filter(|&byte| byte == b'\n').count()
    }
}

/// A stretch of one source.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    /// Index of the source: 0 is the file, then the overrides.
    pub(super) source: usize,
    /// First byte.
    pub(super) start: usize,
    /// Byte after the last.
    pub(super) end: usize,
}

impl Place {
    pub(super) fn new(source: usize, range: &Range<usize>) -> Self {
        Self { source, start: range.start, end: range.end }
    }
}

/// One violation.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Problem {
    /// What was found, and what was expected.
    pub(super) message: String,
    /// Where, each with a word on it; the first is the one the report leads with.
    pub(super) labels: Vec<(Place, String)>,
    /// What to do.
    pub(super) help: Option<String>,
}

impl Problem {
    pub(super) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), labels: Vec::new(), help: None }
    }

    pub(super) fn at(mut self, place: Place, label: impl Into<String>) -> Self {
        self.labels.push((place, label.into()));
        self
    }

    pub(super) fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}

/// Everything that was found while reading one config.
#[derive(Debug, Default)]
pub(super) struct Problems {
    errors: Vec<Problem>,
    warnings: Vec<Problem>,
}

impl Problems {
    pub(super) fn error(&mut self, problem: Problem) {
        self.errors.push(problem);
    }

    pub(super) fn warn(&mut self, problem: Problem) {
        self.warnings.push(problem);
    }

    pub(super) fn is_clean(&self) -> bool {
        self.errors.is_empty()
    }

    /// The report if there is any error, else the warnings as one line each, in the order of the file.
    pub(super) fn finish(mut self, sources: &[Source]) -> Result<Vec<String>, ConfigError> {
        if self.errors.is_empty() {
            sort(&mut self.warnings);
            return Ok(self.warnings.iter().map(|warning| warning_line(warning, sources)).collect());
        }
        sort(&mut self.errors);
        Err(ConfigError { sources: sources.to_vec(), problems: self.errors })
    }
}

/// By place; what has no place (a missing key) comes last.
fn sort(problems: &mut [Problem]) {
    problems.sort_by(|a, b| match (a.labels.first(), b.labels.first()) {
        (Some((a, _)), Some((b, _))) => a.cmp(b),
        (Some(_), None) => std::cmp::Ordering::Less,
        (None, Some(_)) => std::cmp::Ordering::Greater,
        (None, None) => std::cmp::Ordering::Equal,
    });
}

fn warning_line(warning: &Problem, sources: &[Source]) -> String {
    let place = warning.labels.first().map_or_else(String::new, |(place, _)| {
        let source = &sources[place.source];
        if place.source == 0 {
            format!("{}:{}: ", source.name, source.line(place.start))
        } else {
            format!("{}: ", source.name)
        }
    });
    let help = warning.help.as_ref().map_or_else(String::new, |help| format!("; {help}"));
    format!("{place}{}{help}", warning.message)
}

/// Everything that is wrong with a config, as one report.
///
/// `Display` gives the report without colours; [`ConfigError::render`] lets the caller choose.
#[derive(Clone, PartialEq)]
pub struct ConfigError {
    sources: Vec<Source>,
    problems: Vec<Problem>,
}

impl ConfigError {
    fn of_file(name: &str, message: &str, help: &str) -> Self {
        Self {
            sources: vec![Source::new(name, "")],
            problems: vec![Problem::new(format!("config file `{name}` {message}")).help(help)],
        }
    }

    /// How many violations the report lists.
    #[must_use]
    pub fn count(&self) -> usize {
        self.problems.len()
    }

    /// The message of each violation, without the lines it is about.
    pub fn messages(&self) -> impl Iterator<Item = &str> {
        self.problems.iter().map(|problem| problem.message.as_str())
    }

    /// The whole report, with ANSI colours or without.
    #[must_use]
    pub fn render(&self, has_colours: bool) -> String {
        let theme = if has_colours { GraphicalTheme::unicode() } else { GraphicalTheme::unicode_nocolor() };
        let handler = GraphicalReportHandler::new_themed(theme).with_width(100).with_links(false).with_context_lines(1);
        let name = self.sources.first().map_or("", Source::name);
        let count = self.problems.len();
        let mut report = format!("{name}: {count} {}\n", if count == 1 { "problem" } else { "problems" });
        for problem in &self.problems {
            report.push('\n');
            for part in parts(problem, &self.sources) {
                // Writing to a string cannot fail.
                let _ = handler.render_report(&mut report, &part);
            }
        }
        report
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.render(false).trim_end())
    }
}

impl fmt::Debug for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for ConfigError {}

/// The part of a problem that concerns one source, as miette wants it.
#[derive(Debug)]
struct Part {
    message: String,
    help: Option<String>,
    severity: miette::Severity,
    source: Option<NamedSource<String>>,
    labels: Vec<LabeledSpan>,
}

/// One part per source that a problem points into, the leading one first; the help stands under the last.
fn parts(problem: &Problem, sources: &[Source]) -> Vec<Part> {
    let mut order: Vec<usize> = Vec::new();
    for (place, _) in &problem.labels {
        if !order.contains(&place.source) {
            order.push(place.source);
        }
    }
    let mut parts: Vec<Part> = order.iter().map(|&index| part_of(problem, index, sources)).collect();
    if parts.is_empty() {
        parts.push(Part {
            message: String::new(),
            help: None,
            severity: miette::Severity::Error,
            source: None,
            labels: Vec::new(),
        });
    }
    parts[0].message.clone_from(&problem.message);
    parts[0].severity = miette::Severity::Error;
    if let Some(last) = parts.last_mut() {
        last.help.clone_from(&problem.help);
    }
    parts
}

fn part_of(problem: &Problem, source: usize, sources: &[Source]) -> Part {
    let labels = problem.labels.iter().filter(|(place, _)| place.source == source).map(|(place, label)| {
        // A place of no width, as at the end of the text, still needs something to point at.
        let length = place.end.saturating_sub(place.start).max(1);
        LabeledSpan::new((!label.is_empty()).then(|| label.clone()), place.start, length)
    });
    Part {
        message: format!("together with `{}`", sources[source].name),
        help: None,
        severity: miette::Severity::Advice,
        labels: labels.collect(),
        source: Some(NamedSource::new(&sources[source].name, sources[source].text.clone())),
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Part {}

impl miette::Diagnostic for Part {
    fn severity(&self) -> Option<miette::Severity> {
        Some(self.severity)
    }

    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        self.help.as_ref().map(|help| Box::new(help) as Box<dyn fmt::Display>)
    }

    fn source_code(&self) -> Option<&dyn miette::SourceCode> {
        self.source.as_ref().map(|source| source as &dyn miette::SourceCode)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        Some(Box::new(self.labels.iter().cloned()))
    }
}
