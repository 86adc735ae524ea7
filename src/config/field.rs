//! The parts a key is made of: its entry in the table, its range, and the field that holds what a file says for it.

use std::fmt;

use super::diagnose::{Place, Problem, Problems};
use super::value::{Parse, describe};
use super::yaml::{self, Entry, Value};

/// A command that reads a config.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// `trainer sft`.
    Sft,
    /// `trainer grpo`.
    Grpo,
}

impl Command {
    /// The other of the two.
    pub(super) const fn other(self) -> Self {
        match self {
            Self::Sft => Self::Grpo,
            Self::Grpo => Self::Sft,
        }
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sft => "trainer sft",
            Self::Grpo => "trainer grpo",
        })
    }
}

/// The commands that know a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Commands {
    /// Both.
    Both,
    /// `trainer sft` only.
    Sft,
    /// `trainer grpo` only.
    Grpo,
}

impl Commands {
    /// Whether a command is among them.
    #[must_use]
    pub fn include(self, command: Command) -> bool {
        matches!((self, command), (Self::Both, _) | (Self::Sft, Command::Sft) | (Self::Grpo, Command::Grpo))
    }
}

/// What a key is when a file does not name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DefaultValue {
    /// The file must name it.
    Required,
    /// This YAML text.
    Text(&'static str),
    /// This YAML text, by command.
    PerCommand {
        /// For `trainer sft`.
        sft: &'static str,
        /// For `trainer grpo`.
        grpo: &'static str,
    },
    /// Worked out from other keys, as described.
    Derived(&'static str),
}

impl DefaultValue {
    /// The YAML text that stands for the key when the file is silent, if it is not required.
    pub(super) fn text(self, command: Command) -> Option<&'static str> {
        match (self, command) {
            (Self::Required, _) => None,
            (Self::Text(text), _)
            | (Self::PerCommand { sft: text, .. }, Command::Sft)
            | (Self::PerCommand { grpo: text, .. }, Command::Grpo) => Some(text),
            (Self::Derived(_), _) => Some("null"),
        }
    }
}

/// The numbers a key accepts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bounds {
    low: f64,
    is_low_open: bool,
    high: f64,
    is_high_open: bool,
}

impl Bounds {
    /// Every number.
    pub const ANY: Self = Self { low: f64::NEG_INFINITY, is_low_open: false, high: f64::INFINITY, is_high_open: false };
    /// From `low` to `high`, both included.
    #[must_use]
    pub const fn between(low: f64, high: f64) -> Self {
        Self { low, high, ..Self::ANY }
    }

    /// The same without the lower end.
    #[must_use]
    pub const fn above_low(self) -> Self {
        Self { is_low_open: true, ..self }
    }

    /// The same without the upper end.
    #[must_use]
    pub const fn below_high(self) -> Self {
        Self { is_high_open: true, ..self }
    }

    /// Whether a number is inside.
    #[must_use]
    pub fn contain(&self, value: f64) -> bool {
        let is_above = if self.is_low_open { value > self.low } else { value >= self.low };
        let is_below = if self.is_high_open { value < self.high } else { value <= self.high };
        is_above && is_below
    }
}

impl fmt::Display for Bounds {
    /// In words, e.g. "at least 0 and less than 1"; nothing for [`Bounds::ANY`].
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (has_low, has_high) = (self.low.is_finite(), self.high.is_finite());
        if has_low {
            write!(f, "{} {}", if self.is_low_open { "greater than" } else { "at least" }, Plain(self.low))?;
        }
        if has_low && has_high {
            f.write_str(" and ")?;
        }
        if has_high {
            write!(f, "{} {}", if self.is_high_open { "less than" } else { "at most" }, Plain(self.high))?;
        }
        Ok(())
    }
}

/// A number as people write it: `65536`, and `1e9` instead of its zeros.
struct Plain(f64);

impl fmt::Display for Plain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let short = format!("{:e}", self.0);
        if self.0.abs() >= 1e5 && short.len() <= 4 { f.write_str(&short) } else { write!(f, "{}", self.0) }
    }
}

/// One key of a config file, as the reference page shows it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Key {
    /// Its name.
    pub name: &'static str,
    /// The heading it stands under.
    pub group: &'static str,
    /// The commands that know it.
    pub commands: Commands,
    /// What it takes: "an integer", "one of".
    pub kind: &'static str,
    /// The words it takes, where there is a list of them.
    pub values: &'static [&'static str],
    /// Its value when the file is silent.
    pub default: DefaultValue,
    /// The numbers it takes.
    pub range: Bounds,
    /// What its number counts; empty for none.
    pub unit: &'static str,
    /// What it does.
    pub doc: &'static str,
}

/// What a file says for a key: the raw side of the two steps.
#[derive(Clone, Debug)]
pub(super) struct Field<T> {
    key: &'static Key,
    value: Option<T>,
    default: Option<T>,
    default_text: Option<&'static str>,
    given: Option<Place>,
    is_broken: bool,
}

impl<T: Parse + PartialEq> Field<T> {
    /// A field with its default in place.
    pub(super) fn new(key: &'static Key, command: Command) -> Self {
        let default_text = key.default.text(command);
        let default = default_text.map(|text| {
            let node = yaml::parse(text).expect("defaults are YAML: a test reads every one");
            T::parse(&node).unwrap_or_else(|wrong| panic!("the default of `{}` {}", key.name, wrong[0].what))
        });
        Self { key, value: None, default, default_text, given: None, is_broken: false }
    }

    /// Takes what an entry of a file says.
    pub(super) fn read(&mut self, entry: &Entry, source: usize, problems: &mut Problems) {
        let key_place = Place::new(source, &entry.key_span);
        let node = &entry.node;
        // An empty value has no extent to point at.
        let place =
            |span: &std::ops::Range<usize>| if span.is_empty() { key_place.clone() } else { Place::new(source, span) };
        let parsed = T::parse(node);
        if node.value == Value::Null
            && parsed.is_err()
            && let Some(default) = &self.default_text
        {
            // What TRL would stop at; a program that writes files may mean it as "not given".
            let message = format!("`{}` is null, which it cannot be: its default {default} is taken", self.key.name);
            problems.warn(Problem::new(message).at(key_place, ""));
            return;
        }
        self.given = Some(place(&node.span));
        match parsed {
            Ok(value) => {
                if let Some(number) = value.numbers().into_iter().find(|number| !self.key.range.contain(*number)) {
                    self.is_broken = true;
                    let unit = if self.key.unit.is_empty() { String::new() } else { format!(" ({})", self.key.unit) };
                    let problem = Problem::new(format!(
                        "`{}` must be {}{unit}, got {}",
                        self.key.name,
                        self.key.range,
                        Plain(number)
                    ));
                    problems.error(problem.at(place(&node.span), "out of range"));
                }
                self.value = Some(value);
            }
            Err(wrong) => {
                self.is_broken = true;
                for mismatch in wrong {
                    let mut problem = Problem::new(format!("`{}` {}", self.key.name, mismatch.what)).at(
                        place(&mismatch.span),
                        if mismatch.span == node.span { label_for(node) } else { String::new() },
                    );
                    problem.help = mismatch.help;
                    problems.error(problem);
                }
            }
        }
    }

    /// Reports a required key that is not there.
    pub(super) fn require(&mut self, command: Command, problems: &mut Problems) {
        if self.default.is_none() && self.given.is_none() {
            self.is_broken = true;
            let problem = Problem::new(format!("`{}` is missing; `{command}` needs it", self.key.name));
            problems.error(problem.help(format!("add `{}: ...`: {}", self.key.name, self.key.doc)));
        }
    }

    /// The value of the file, or the default.
    ///
    /// # Panics
    /// If the key is required and missing or broken, which [`Field::require`] and [`Field::read`] have then reported:
    /// settings are only built from a config without problems.
    pub(super) fn value(&self) -> &T {
        self.known().expect("a required field without a value is a reported problem")
    }

    /// The value, if there is one.
    pub(super) fn known(&self) -> Option<&T> {
        self.value.as_ref().or(self.default.as_ref())
    }

    /// Whether the file names the key with another value than the default.
    pub(super) fn is_changed(&self) -> bool {
        self.value.is_some() && self.value != self.default
    }
}

fn label_for(node: &yaml::Node) -> String {
    match &node.value {
        Value::Scalar { .. } => String::new(),
        _ => describe(node),
    }
}

/// A field whatever its type, for messages about several of them.
pub(super) trait Named {
    /// The key's name.
    fn name(&self) -> &'static str;
    /// Where the file gives it.
    fn place(&self) -> Option<&Place>;
    /// Whether its value could not be read.
    fn is_broken(&self) -> bool;
    /// Whether the file names it.
    fn is_given(&self) -> bool {
        self.place().is_some()
    }
}

impl<T> Named for Field<T> {
    fn name(&self) -> &'static str {
        self.key.name
    }

    fn place(&self) -> Option<&Place> {
        self.given.as_ref()
    }

    fn is_broken(&self) -> bool {
        self.is_broken
    }
}

impl Problems {
    /// Reports values that do not go together, each with a word on it; silent if one of them is broken already.
    pub(super) fn clash(
        &mut self,
        fields: &[(&dyn Named, String)],
        message: impl Into<String>,
        help: impl Into<String>,
    ) {
        if let Some(problem) = about(fields, message.into(), help.into()) {
            self.error(problem);
        }
    }

    /// As [`Problems::clash`], for what works but likely not as meant.
    pub(super) fn caution(
        &mut self,
        fields: &[(&dyn Named, String)],
        message: impl Into<String>,
        help: impl Into<String>,
    ) {
        if let Some(problem) = about(fields, message.into(), help.into()) {
            self.warn(problem);
        }
    }
}

fn about(fields: &[(&dyn Named, String)], message: String, help: String) -> Option<Problem> {
    if fields.iter().any(|(field, _)| field.is_broken()) {
        return None;
    }
    let mut problem = Problem::new(message).help(help);
    for (field, label) in fields {
        if let Some(place) = field.place() {
            problem = problem.at(place.clone(), label.clone());
        }
    }
    Some(problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_in_words_and_numbers() {
        for (bounds, words, inside, outside) in [
            (Bounds::between(1.0, 1e9), "at least 1 and at most 1e9", vec![1.0, 1e9], vec![0.0, 1e10]),
            (Bounds::between(2.0, 65536.0), "at least 2 and at most 65536", vec![2.0], vec![1.0, 65537.0]),
            (Bounds::between(0.0, 1.0).below_high(), "at least 0 and less than 1", vec![0.0, 0.9], vec![1.0]),
            (Bounds::between(0.0, 1.0).above_low(), "greater than 0 and at most 1", vec![1.0], vec![0.0, 1.1]),
        ] {
            assert_eq!(bounds.to_string(), words);
            assert!(inside.iter().all(|value| bounds.contain(*value)), "{words}");
            assert!(outside.iter().all(|value| !bounds.contain(*value)), "{words}");
        }
        assert_eq!(Bounds::ANY.to_string(), "");
        assert!(Bounds::ANY.contain(-1e300));
    }
}
