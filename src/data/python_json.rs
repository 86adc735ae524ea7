//! JSON as Python's `json.dumps` writes it, which is what models saw in their tool prompts.

use std::fmt::Write;

use serde_json::{Number, Value};

/// The arguments of `json.dumps` that templates use.
#[derive(Clone, Debug, Default)]
pub(super) struct JsonStyle {
    pub(super) ensure_ascii: bool,
    pub(super) indent: Option<usize>,
    /// Item and key separator; by default `", "` (`","` with an indent) and `": "`.
    pub(super) separators: Option<(String, String)>,
    pub(super) sort_keys: bool,
}

/// `json.dumps(value, ...)`.
pub(super) fn to_python_json(value: &Value, style: &JsonStyle) -> String {
    let mut out = String::new();
    let default_item = if style.indent.is_some() { "," } else { ", " };
    let (item, key) = style.separators.as_ref().map_or((default_item, ": "), |(i, k)| (i.as_str(), k.as_str()));
    write_value(&mut out, value, style, (item, key), 0);
    out
}

fn write_value(out: &mut String, value: &Value, style: &JsonStyle, separators: (&str, &str), depth: usize) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(flag) => out.push_str(if *flag { "true" } else { "false" }),
        Value::Number(number) => write_number(out, number),
        Value::String(text) => write_string(out, text, style.ensure_ascii),
        Value::Array(items) if items.is_empty() => out.push_str("[]"),
        Value::Object(fields) if fields.is_empty() => out.push_str("{}"),
        Value::Array(items) => {
            out.push('[');
            for (index, entry) in items.iter().enumerate() {
                between(out, index, style, separators.0, depth + 1);
                write_value(out, entry, style, separators, depth + 1);
            }
            line(out, style, depth);
            out.push(']');
        }
        Value::Object(fields) => {
            out.push('{');
            let mut entries: Vec<(&String, &Value)> = fields.iter().collect();
            if style.sort_keys {
                entries.sort_by_key(|(name, _)| *name);
            }
            for (index, (name, entry)) in entries.into_iter().enumerate() {
                between(out, index, style, separators.0, depth + 1);
                write_string(out, name, style.ensure_ascii);
                out.push_str(separators.1);
                write_value(out, entry, style, separators, depth + 1);
            }
            line(out, style, depth);
            out.push('}');
        }
    }
}

fn between(out: &mut String, index: usize, style: &JsonStyle, separator: &str, depth: usize) {
    if index > 0 {
        out.push_str(separator);
    }
    line(out, style, depth);
}

fn line(out: &mut String, style: &JsonStyle, depth: usize) {
    if let Some(indent) = style.indent {
        out.push('\n');
        out.extend(std::iter::repeat_n(' ', indent * depth));
    }
}

fn write_string(out: &mut String, text: &str, ensure_ascii: bool) {
    out.push('"');
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if (c as u32) < 0x20 || (ensure_ascii && !c.is_ascii()) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    // Writing to a string cannot fail.
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// Integers as they are; floats as Python's `repr`: shortest digits, scientific below 1e-4 and from 1e16.
fn write_number(out: &mut String, number: &Number) {
    let Some(float) = number.as_f64().filter(|_| number.is_f64()) else {
        let _ = write!(out, "{number}");
        return;
    };
    let scientific = format!("{float:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if float != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        let _ = write!(out, "{mantissa}e{sign}{:02}", exponent.abs());
    } else {
        let plain = format!("{float}");
        out.push_str(&plain);
        if !plain.contains('.') {
            out.push_str(".0");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{JsonStyle, to_python_json};
    use serde_json::{Value, json};

    #[test]
    fn floats_are_written_as_python_writes_them() {
        let cases = [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (3.5, "3.5"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (-2.5e-7, "-2.5e-07"),
            (123_456_789.125, "123456789.125"),
        ];
        for (float, text) in cases {
            assert_eq!(to_python_json(&json!(float), &JsonStyle::default()), text);
        }
        assert_eq!(to_python_json(&json!(u64::MAX), &JsonStyle::default()), "18446744073709551615");
    }

    #[test]
    fn control_and_astral_characters_are_escaped_as_in_python() {
        let value: Value = json!("\u{1}\u{7f}\n🌍");
        assert_eq!(to_python_json(&value, &JsonStyle::default()), "\"\\u0001\u{7f}\\n🌍\"");
        let ascii = JsonStyle { ensure_ascii: true, ..JsonStyle::default() };
        assert_eq!(to_python_json(&value, &ascii), "\"\\u0001\u{7f}\\n\\ud83c\\udf0d\"");
    }
}
