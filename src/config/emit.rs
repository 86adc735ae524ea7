//! Values as texts of YAML.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::Value;

use super::value::{as_bool, as_float};

pub(super) fn optional<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "null".into(), |value| value.to_string())
}

pub(super) fn optional_float(value: Option<f64>) -> String {
    value.map_or_else(|| "null".into(), float)
}

pub(super) fn optional_string(value: Option<&str>) -> String {
    value.map_or_else(|| "null".into(), string)
}

pub(super) fn optional_path(value: Option<&Path>) -> String {
    value.map_or_else(|| "null".into(), |path| string(&path.to_string_lossy()))
}

/// The shortest text that reads back as the same number, with the point that YAML 1.1 wants: `1.0e-6`.
pub(super) fn float(value: f64) -> String {
    let text = format!("{value:?}");
    match text.split_once('e') {
        Some((digits, exponent)) => {
            let point = if digits.contains('.') { "" } else { ".0" };
            let sign = if exponent.starts_with('-') { "" } else { "+" };
            format!("{digits}{point}e{sign}{exponent}")
        }
        None => text,
    }
}

/// Whether a path lies directly in a folder, by their texts.
pub(super) fn is_inside(path: &Path, folder: &Path) -> bool {
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    absolute(path).parent() == Some(&absolute(folder))
}

/// Plain where that is safe in YAML 1.1 and 1.2, else in quotes.
pub(super) fn string(text: &str) -> String {
    let is_word = text.chars().all(|c| c.is_ascii_alphanumeric() || "_-./".contains(c));
    let starts_well = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/');
    let lower = text.to_lowercase();
    let is_special = as_bool(text).is_some()
        || as_float(text).is_some()
        || ["null", "y", "n", "yes", "no", "true", "false", "on", "off"].contains(&lower.as_str());
    if is_word && starts_well && !is_special { text.to_owned() } else { quoted(text) }
}

/// In double quotes, with everything escaped that YAML might not take as it is.
pub(super) fn quoted(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for c in text.chars() {
        match c {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\t' => quoted.push_str("\\t"),
            ' '..='~' => quoted.push(c),
            _ if c.is_alphanumeric() => quoted.push(c),
            _ if u32::from(c) <= 0xFFFF => {
                let _ = write!(quoted, "\\u{:04X}", u32::from(c));
            }
            _ => {
                let _ = write!(quoted, "\\U{:08X}", u32::from(c));
            }
        }
    }
    quoted.push('"');
    quoted
}

pub(super) fn map(map: &serde_json::Map<String, Value>) -> String {
    format!("{{{}}}", entries(map))
}

pub(super) fn entries(map: &serde_json::Map<String, Value>) -> String {
    map.iter().map(|(key, value)| format!("{}: {}", quoted(key), json(value))).collect::<Vec<_>>().join(", ")
}

pub(super) fn json(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(value) => value.to_string(),
        Value::Number(number) if number.is_f64() => float(number.as_f64().unwrap_or_default()),
        Value::Number(number) => number.to_string(),
        Value::String(text) => quoted(text),
        Value::Array(items) => format!("[{}]", items.iter().map(json).collect::<Vec<_>>().join(", ")),
        Value::Object(entries) => map(entries),
    }
}
