//! One YAML value to one typed value, whatever the key.
//!
//! A [`Parse`] type says what it accepts (for messages and the reference page) and reads a [`Node`]. It knows nothing
//! of other keys. Numbers and booleans in quotes are accepted: `"8"` can only mean 8 where a number is wanted.

use std::ops::Range;
use std::path::PathBuf;

use serde_json::{Map, Number};

use super::home;
use super::settings::{
    CodeSandbox, CodeScoring, GrpoLossType, ImportanceSamplingLevel, LrSchedulerType, PackingStrategy, QuantType,
    RewardAggregation, RolloutCorrectionMode, SftLossType, TruncationMode, WeightDtype,
};
use super::yaml::{Entry, Node, Value};

/// A value that is not what its key takes.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Mismatch {
    /// Goes on after the key's name: "expects an integer, got `x`".
    pub(super) what: String,
    /// What to do, if there is more to say.
    pub(super) help: Option<String>,
    /// Where.
    pub(super) span: Range<usize>,
}

impl Mismatch {
    pub(super) fn new(node: &Node, what: impl Into<String>) -> Self {
        Self { what: what.into(), help: None, span: node.span.clone() }
    }

    pub(super) fn expected(node: &Node, kind: &str) -> Self {
        Self::new(node, format!("expects {kind}, got {}", describe(node)))
    }

    pub(super) fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}

/// A type that a key can have.
pub(super) trait Parse: Sized {
    /// What is accepted, with its article: "an integer".
    const KIND: &'static str;
    /// The accepted words, where there is a list of them.
    const VALUES: &'static [&'static str] = &[];

    /// Reads a value.
    ///
    /// # Errors
    /// Everything that is wrong with it, one entry per place.
    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>>;

    /// The numbers in it that the key's range applies to.
    fn numbers(&self) -> Vec<f64> {
        Vec::new()
    }
}

/// A value in words, for "got ...".
pub(super) fn describe(node: &Node) -> String {
    match &node.value {
        Value::Null => "nothing (null)".into(),
        Value::Scalar { text, is_quoted: true } if text.is_empty() => "an empty string".into(),
        Value::Scalar { text, is_quoted: true } => format!("the string {:?}", shorten(text)),
        Value::Scalar { text, is_quoted: false } => format!("`{}`", shorten(text)),
        Value::List(items) if items.is_empty() => "an empty list".into(),
        Value::List(_) => "a list".into(),
        Value::Map(_) => "a map".into(),
    }
}

fn shorten(text: &str) -> String {
    if text.chars().count() <= 60 {
        return text.to_owned();
    }
    let mut short: String = text.chars().take(57).collect();
    short.push_str("...");
    short
}

/// The entry of `names` that `text` most likely means, if any comes near.
pub(super) fn nearest<'a>(text: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let text = text.to_lowercase().replace('-', "_");
    names
        .into_iter()
        .map(|name| {
            let lower = name.to_lowercase();
            let mut score =
                strsim::normalized_damerau_levenshtein(&text, &lower).max(0.98 * word_overlap(&text, &lower));
            if text.len() >= 4 && (lower.starts_with(&text) || text.starts_with(&lower)) {
                score = score.max(0.75);
            }
            (score, name)
        })
        .filter(|(score, _)| *score >= 0.6)
        .max_by(|a, b| a.0.total_cmp(&b.0).then(b.1.len().cmp(&a.1.len())))
        .map(|(_, name)| name)
}

/// Share of common words of two names in snake case, whatever their order (`train_batch_size_per_device`).
fn word_overlap(a: &str, b: &str) -> f64 {
    let words = |text: &str| text.split('_').filter(|word| !word.is_empty()).map(str::to_owned).collect::<Vec<_>>();
    let (a, mut b) = (words(a), words(b));
    let total = a.len() + b.len();
    let mut common = 0;
    for word in a {
        if let Some(at) = b.iter().position(|other| *other == word) {
            b.swap_remove(at);
            common += 2;
        }
    }
    if total == 0 { 0.0 } else { f64::from(common) / total as f64 }
}

/// Names in backticks with commas.
pub(super) fn listed(names: &[&str]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// `valid values are ...`, with the nearest first where there is one.
pub(super) fn valid_values(text: &str, names: &[&str]) -> String {
    match nearest(text, names.iter().copied()) {
        Some(name) => format!("did you mean `{name}`? Valid values: {}", listed(names)),
        None => format!("valid values: {}", listed(names)),
    }
}

/// The boolean a scalar means, by YAML 1.1's words as well (which is what Python reads).
pub(super) fn as_bool(text: &str) -> Option<bool> {
    match text {
        "true" | "True" | "TRUE" | "yes" | "Yes" | "YES" | "on" | "On" | "ON" => Some(true),
        "false" | "False" | "FALSE" | "no" | "No" | "NO" | "off" | "Off" | "OFF" => Some(false),
        _ => None,
    }
}

/// The number a scalar means: decimal, with exponent, with `_` between digits. `None` if it is none or not finite.
pub(super) fn as_float(text: &str) -> Option<f64> {
    let digits = without_underscores(text)?;
    if !digits.bytes().any(|byte| byte.is_ascii_digit())
        || digits.bytes().any(|b| b.is_ascii_alphabetic() && b != b'e' && b != b'E')
    {
        return None;
    }
    digits.parse().ok().filter(|value: &f64| value.is_finite())
}

/// The integer a scalar means, if it is written as one.
pub(super) fn as_integer(text: &str) -> Option<i128> {
    without_underscores(text)?.parse().ok()
}

fn without_underscores(text: &str) -> Option<String> {
    let bytes = text.as_bytes();
    let is_digit = |at: Option<usize>| at.and_then(|at| bytes.get(at)).is_some_and(u8::is_ascii_digit);
    let is_misplaced = |at: usize| !is_digit(at.checked_sub(1)) || !is_digit(Some(at + 1));
    if (0..bytes.len()).any(|at| bytes[at] == b'_' && is_misplaced(at)) {
        return None;
    }
    Some(text.replace('_', ""))
}

/// `010` is 8 in YAML 1.1 and 10 in YAML 1.2.
fn has_leading_zero(text: &str) -> bool {
    let digits = text.trim_start_matches(['+', '-']);
    digits.len() > 1 && digits.starts_with('0') && digits.bytes().all(|byte| byte.is_ascii_digit() || byte == b'_')
}

pub(super) fn parse_integer(node: &Node, kind: &str) -> Result<i128, Vec<Mismatch>> {
    let Value::Scalar { text, .. } = &node.value else { return Err(vec![Mismatch::expected(node, kind)]) };
    if has_leading_zero(text) {
        return Err(vec![
            Mismatch::new(
                node,
                format!("is written with a leading zero, `{text}`: YAML 1.1 reads that as octal, YAML 1.2 as decimal"),
            )
            .help("write it without the zero"),
        ]);
    }
    if let Some(value) = as_integer(text) {
        return Ok(value);
    }
    match as_float(text) {
        // 1e3 and 8.0 can only mean one integer.
        Some(value) if value.fract() == 0.0 && value.abs() < 9e15 => Ok(value as i128),
        Some(_) => Err(vec![Mismatch::expected(node, kind).help("fractions are not supported here")]),
        None => Err(vec![Mismatch::expected(node, kind)]),
    }
}

macro_rules! parse_integers {
    ($($type:ty),+) => { $(
        impl Parse for $type {
            const KIND: &'static str = "an integer";
            fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
                let value = parse_integer(node, Self::KIND)?;
                Self::try_from(value).map_err(|_| {
                    let limit = if value < 0 { "negative".into() } else { format!("greater than {}", Self::MAX) };
                    vec![Mismatch::new(node, format!("must not be {limit}, got {value}"))]
                })
            }
            fn numbers(&self) -> Vec<f64> {
                vec![*self as f64]
            }
        }
    )+ };
}
parse_integers!(usize, u64);

impl Parse for f64 {
    const KIND: &'static str = "a number";

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        let Value::Scalar { text, .. } = &node.value else { return Err(vec![Mismatch::expected(node, Self::KIND)]) };
        as_float(text).ok_or_else(|| {
            let lower = text.trim_start_matches(['+', '-', '.']).to_lowercase();
            let kind =
                if ["inf", "nan", "infinity"].contains(&lower.as_str()) { "a finite number" } else { Self::KIND };
            vec![Mismatch::expected(node, kind)]
        })
    }

    fn numbers(&self) -> Vec<f64> {
        vec![*self]
    }
}

impl Parse for bool {
    const KIND: &'static str = "true or false";

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        match &node.value {
            Value::Scalar { text, .. } => as_bool(text).ok_or_else(|| vec![Mismatch::expected(node, Self::KIND)]),
            _ => Err(vec![Mismatch::expected(node, Self::KIND)]),
        }
    }
}

impl Parse for String {
    const KIND: &'static str = "text";

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        match &node.value {
            Value::Scalar { text, .. } if !text.is_empty() => Ok(text.clone()),
            _ => Err(vec![Mismatch::expected(node, Self::KIND)]),
        }
    }
}

impl Parse for PathBuf {
    const KIND: &'static str = "a path";

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        match &node.value {
            Value::Scalar { text, .. } if !text.is_empty() => Ok(Self::from(home::expand(text))),
            _ => Err(vec![Mismatch::expected(node, Self::KIND)]),
        }
    }
}

impl<T: Parse> Parse for Option<T> {
    const KIND: &'static str = T::KIND;
    const VALUES: &'static [&'static str] = T::VALUES;

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        if node.value == Value::Null { Ok(None) } else { T::parse(node).map(Some) }
    }

    fn numbers(&self) -> Vec<f64> {
        self.as_ref().map(T::numbers).unwrap_or_default()
    }
}

/// A list; one value alone is a list of one.
fn parse_list<T: Parse>(node: &Node) -> Result<Vec<T>, Vec<Mismatch>> {
    let items = match &node.value {
        Value::List(items) => items.as_slice(),
        Value::Scalar { .. } => std::slice::from_ref(node),
        Value::Null | Value::Map(_) => return Err(vec![Mismatch::expected(node, "a list")]),
    };
    all(items.iter().map(T::parse))
}

/// Every value, or every mismatch.
pub(super) fn all<T>(results: impl Iterator<Item = Result<T, Vec<Mismatch>>>) -> Result<Vec<T>, Vec<Mismatch>> {
    let (mut values, mut wrong) = (Vec::new(), Vec::new());
    for result in results {
        match result {
            Ok(value) => values.push(value),
            Err(mismatches) => wrong.extend(mismatches),
        }
    }
    if wrong.is_empty() { Ok(values) } else { Err(wrong) }
}

impl Parse for Vec<String> {
    const KIND: &'static str = "a list of strings";

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        parse_list(node)
    }
}

impl Parse for Vec<f64> {
    const KIND: &'static str = "a list of numbers";

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        parse_list(node)
    }

    fn numbers(&self) -> Vec<f64> {
        self.clone()
    }
}

impl Parse for Map<String, serde_json::Value> {
    const KIND: &'static str = "a map";

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        match &node.value {
            Value::Map(entries) => json_map(entries),
            // TRL's command line takes maps as JSON text.
            Value::Scalar { text, .. } if text.trim_start().starts_with('{') => {
                let inner = super::yaml::parse(text)
                    .map_err(|error| vec![Mismatch::new(node, format!("is not a map: {}", error.message))])?;
                match &inner.value {
                    Value::Map(entries) => json_map(entries).map_err(|wrong| {
                        wrong.into_iter().map(|mismatch| Mismatch { span: node.span.clone(), ..mismatch }).collect()
                    }),
                    _ => Err(vec![Mismatch::expected(node, Self::KIND)]),
                }
            }
            Value::Null => Ok(Self::new()),
            _ => Err(vec![Mismatch::expected(node, Self::KIND)]),
        }
    }
}

fn json_map(entries: &[Entry]) -> Result<Map<String, serde_json::Value>, Vec<Mismatch>> {
    let (mut map, mut wrong) = (Map::new(), Vec::new());
    for entry in entries {
        match json(&entry.node) {
            Ok(value) => {
                if map.insert(entry.key.clone(), value).is_some() {
                    wrong.push(Mismatch {
                        what: format!("holds `{}` twice", entry.key),
                        help: Some("keep one of the two".into()),
                        span: entry.key_span.clone(),
                    });
                }
            }
            Err(mismatches) => wrong.extend(mismatches),
        }
    }
    if wrong.is_empty() { Ok(map) } else { Err(wrong) }
}

/// A free-form value; a plain scalar is what Python's YAML reader makes of it, and `1e-5` a number as well.
pub(super) fn json(node: &Node) -> Result<serde_json::Value, Vec<Mismatch>> {
    Ok(match &node.value {
        Value::Null => serde_json::Value::Null,
        Value::Scalar { text, is_quoted: true } => text.as_str().into(),
        Value::Scalar { text, is_quoted: false } => {
            let integer = as_integer(text).filter(|_| !has_leading_zero(text)).and_then(|value| {
                Number::from_i128(value).filter(|_| i64::try_from(value).is_ok() || u64::try_from(value).is_ok())
            });
            match (as_bool(text), integer, as_float(text)) {
                (Some(value), ..) => value.into(),
                (_, Some(value), _) => value.into(),
                (_, _, Some(value)) if !has_leading_zero(text) => value.into(),
                _ => text.as_str().into(),
            }
        }
        Value::List(items) => all(items.iter().map(json))?.into(),
        Value::Map(entries) => json_map(entries)?.into(),
    })
}

/// Reads one of a list of words. `no`, which YAML 1.1 reads as false, is a word where the list has it.
pub(super) fn parse_word(node: &Node, names: &[&'static str]) -> Result<&'static str, Vec<Mismatch>> {
    let Value::Scalar { text, is_quoted } = &node.value else {
        return Err(vec![Mismatch::expected(node, "one word").help(format!("valid values: {}", listed(names)))]);
    };
    if let Some(name) = names.iter().find(|name| *name == text) {
        return Ok(name);
    }
    if let Some(name) = names.iter().find(|name| **name == "no" && !is_quoted && as_bool(text) == Some(false)) {
        return Ok(name);
    }
    Err(vec![Mismatch::new(node, format!("does not know {}", describe(node))).help(valid_values(text, names))])
}

macro_rules! parse_choices {
    ($($type:ty),+ $(,)?) => { $(
        impl Parse for $type {
            const KIND: &'static str = "one of";
            const VALUES: &'static [&'static str] = Self::NAMES;
            fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
                let name = parse_word(node, Self::NAMES)?;
                Ok(name.parse().expect("every name of a choice is read by its from_str"))
            }
        }
    )+ };
}
parse_choices!(
    WeightDtype,
    QuantType,
    PackingStrategy,
    SftLossType,
    TruncationMode,
    GrpoLossType,
    ImportanceSamplingLevel,
    RewardAggregation,
    RolloutCorrectionMode,
    LrSchedulerType,
    CodeSandbox,
    CodeScoring,
);

#[cfg(test)]
mod tests {
    use super::super::yaml;
    use super::*;

    fn read<T: Parse>(text: &str) -> Result<T, String> {
        T::parse(&yaml::parse(text).expect("valid YAML")).map_err(|wrong| wrong[0].what.clone())
    }

    #[test]
    fn numbers_are_read_whatever_the_yaml_version() {
        for (text, value) in [
            ("1e-5", 1e-5),
            ("1E-5", 1e-5),
            ("+2.", 2.0),
            (".5", 0.5),
            ("\"3\"", 3.0),
            ("1_000.5", 1000.5),
            ("-1", -1.0),
        ] {
            assert_eq!(read::<f64>(text), Ok(value), "{text}");
        }
        for text in ["abc", ".inf", "nan", "1e999", "[1]", "_1", "1_", "true", "", "0x10", "infinity"] {
            assert!(read::<f64>(text).is_err(), "{text}");
        }
        for (text, value) in [("8", 8), ("\"8\"", 8), ("8.0", 8), ("1e3", 1000), ("1_000", 1000), ("+4", 4)] {
            assert_eq!(read::<usize>(text), Ok(value), "{text}");
        }
        for text in ["8.5", "-1", "010", "0x10", "eight", "[8]", "", "99999999999999999999999"] {
            assert!(read::<usize>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn booleans_and_words() {
        assert_eq!(read::<bool>("yes"), Ok(true));
        assert_eq!(read::<bool>("\"false\""), Ok(false));
        assert!(read::<bool>("1").is_err());
        assert_eq!(read::<QuantType>("nf4"), Ok(QuantType::Nf4));
        assert!(read::<QuantType>("NF5").is_err());
        let no = ["no", "steps"];
        for text in ["no", "false", "off", "\"no\""] {
            assert_eq!(parse_word(&yaml::parse(text).expect("valid YAML"), &no), Ok("no"), "{text}");
        }
        assert!(parse_word(&yaml::parse("\"false\"").expect("valid YAML"), &no).is_err());
    }

    #[test]
    fn text_keeps_what_looks_like_a_number() {
        for text in ["1234567e8", "0123", "true", "2024"] {
            assert_eq!(read::<String>(text), Ok(text.to_owned()));
        }
        assert!(read::<String>("\"\"").is_err());
        assert!(read::<String>("null").is_err());
        assert_eq!(read::<Option<String>>("~"), Ok(None));
    }

    #[test]
    fn maps_become_json() {
        let expected: serde_json::Value =
            serde_json::json!({"a": 1, "b": 0.1, "c": "x", "d": [true, null], "e": {"f": "010"}, "g": 1.0});
        for text in [
            "{a: 1, b: 1e-1, c: x, d: [yes, ~], e: {f: 010}, g: 1.0}",
            "'{\"a\": 1, \"b\": 0.1, \"c\": \"x\", \"d\": [true, null], \"e\": {\"f\": \"010\"}, \"g\": 1.0}'",
        ] {
            assert_eq!(read::<Map<_, _>>(text).map(serde_json::Value::Object), Ok(expected.clone()), "{text}");
        }
        assert!(read::<Map<_, _>>("{a: 1, a: 2}").is_err());
        assert!(read::<Map<_, _>>("5").is_err());
    }

    #[test]
    fn nearest_finds_typing_errors_and_shuffled_words() {
        let names = ["per_device_train_batch_size", "learning_rate", "lora_r", "max_length", "num_generations"];
        for (text, name) in [
            ("learning_rte", Some("learning_rate")),
            ("train_batch_size_per_device", Some("per_device_train_batch_size")),
            ("max-length", Some("max_length")),
            ("num_generation", Some("num_generations")),
            ("zebra", None),
        ] {
            assert_eq!(nearest(text, names), name, "{text}");
        }
    }
}
