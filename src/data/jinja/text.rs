//! Python's view of text: white space, kinds of characters, `str()`, `repr()`, and how numbers are written.

use std::sync::LazyLock;

use fancy_regex::Regex;

use super::Error;
use super::budget::Budget;
use super::value::{Value, View};

/// `str.isspace` of one character.
pub(super) fn is_space(character: char) -> bool {
    character.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&character)
}

/// Where `str.splitlines` splits.
pub(super) fn is_line_break(character: char) -> bool {
    matches!(character, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}')
}

fn is_all(text: &str, pattern: &Regex) -> bool {
    pattern.is_match(text).unwrap_or(false)
}

fn constant(pattern: &str) -> Regex {
    Regex::new(pattern).expect("the pattern is a constant that a test compiles")
}

static ALPHABETIC: LazyLock<Regex> = LazyLock::new(|| constant(r"\A\p{L}+\z"));
static ALPHANUMERIC: LazyLock<Regex> = LazyLock::new(|| constant(r"\A[\p{L}\p{N}]+\z"));
static DECIMAL: LazyLock<Regex> = LazyLock::new(|| constant(r"\A\p{Nd}+\z"));
static DIGIT: LazyLock<Regex> = LazyLock::new(|| constant(r"\A[\p{Nd}²³¹⁰⁴-⁹₀-₉①-⑨⑴-⑼⒈-⒐⓪⓵-⓽⓿❶-❾➀-➈➊-➒]+\z"));
static NUMERIC: LazyLock<Regex> = LazyLock::new(|| constant(r"\A\p{N}+\z"));
static HIDDEN: LazyLock<Regex> = LazyLock::new(|| constant(r"\A[\p{C}\p{Z}]\z"));

/// Which characters a text must consist of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    Alphabetic,
    Alphanumeric,
    Decimal,
    Digit,
    Numeric,
}

/// Whether a text is not empty and all of the class.
pub(super) fn is_of(text: &str, class: Class) -> bool {
    if text.is_ascii() {
        let is_right = |byte: u8| match class {
            Class::Alphabetic => byte.is_ascii_alphabetic(),
            Class::Alphanumeric => byte.is_ascii_alphanumeric(),
            Class::Decimal | Class::Digit | Class::Numeric => byte.is_ascii_digit(),
        };
        return !text.is_empty() && text.bytes().all(is_right);
    }
    let pattern = match class {
        Class::Alphabetic => &ALPHABETIC,
        Class::Alphanumeric => &ALPHANUMERIC,
        Class::Decimal => &DECIMAL,
        Class::Digit => &DIGIT,
        Class::Numeric => &NUMERIC,
    };
    is_all(text, pattern)
}

/// Whether Python prints the character as it is.
pub(super) fn is_printable(character: char) -> bool {
    match character {
        ' '..='~' => true,
        '\0'..='\u{a0}' => false,
        _ => !is_all(character.encode_utf8(&mut [0; 4]), &HIDDEN),
    }
}

/// A float as Python writes it: the shortest digits that read back as it, with an exponent below 1e-4 and from 1e16.
pub(super) fn float_text(value: f64) -> String {
    if !value.is_finite() {
        return match (value.is_nan(), value > 0.0) {
            (true, _) => "nan".into(),
            (_, true) => "inf".into(),
            _ => "-inf".into(),
        };
    }
    let text = format!("{value:e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if value != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = format!("{value}");
    if plain.contains('.') { plain } else { format!("{plain}.0") }
}

/// `repr` of a string.
pub(super) fn string_repr(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::with_capacity(text.len() + 2);
    out.push(quote);
    for character in text.chars() {
        match character {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if is_printable(c) => out.push(c),
            c => out.push_str(&escaped(c)),
        }
    }
    out.push(quote);
    out
}

/// A character by its number, as Python escapes it.
fn escaped(character: char) -> String {
    match character as u32 {
        code @ 0..=0xff => format!("\\x{code:02x}"),
        code @ 0..=0xffff => format!("\\u{code:04x}"),
        code => format!("\\U{code:08x}"),
    }
}

/// `ascii()` of a string.
pub(super) fn ascii_repr(text: &str) -> String {
    string_repr(text).chars().map(|c| if c.is_ascii() { c.to_string() } else { escaped(c) }).collect()
}

/// Appends formatted text.
pub(super) fn write_to(out: &mut String, text: std::fmt::Arguments<'_>) {
    use std::fmt::Write as _;
    // Writing to a string cannot fail.
    let _ = out.write_fmt(text);
}

/// `str()`.
pub(super) fn display(value: &Value, budget: &Budget) -> Result<String, Error> {
    match value {
        Value::Str(text) => {
            budget.make(text.len())?;
            Ok(text.to_string())
        }
        Value::Undefined(_) => Ok(String::new()),
        _ => repr(value, budget),
    }
}

/// `repr()`.
pub(super) fn repr(value: &Value, budget: &Budget) -> Result<String, Error> {
    let mut out = String::new();
    write_repr(&mut out, value, budget)?;
    Ok(out)
}

fn write_repr(out: &mut String, value: &Value, budget: &Budget) -> Result<(), Error> {
    budget.nest()?;
    let before = out.len();
    match value {
        Value::Undefined(_) => out.push_str("Undefined"),
        Value::None => out.push_str("None"),
        Value::Bool(true) => out.push_str("True"),
        Value::Bool(false) => out.push_str("False"),
        Value::Int(number) => out.push_str(&number.to_string()),
        Value::Float(number) => out.push_str(&float_text(*number)),
        Value::Str(text) => {
            budget.make(text.len())?;
            out.push_str(&string_repr(text));
        }
        Value::List(items) => write_items(out, ("[", "]"), items.items(), budget)?,
        Value::Tuple(items) => {
            let end = if items.items().len() == 1 { ",)" } else { ")" };
            write_items(out, ("(", end), items.items(), budget)?;
        }
        Value::Dict(dict) => write_pairs(out, dict.entries().iter(), budget)?,
        Value::View(view, _) => {
            let name = match view {
                View::Keys => "dict_keys",
                View::Values => "dict_values",
                View::Items => "dict_items",
            };
            out.push_str(name);
            write_items(out, ("([", "])"), &value.items(budget)?, budget)?;
        }
        Value::Range(range) if range.step == 1 => write_to(out, format_args!("range({}, {})", range.start, range.stop)),
        Value::Range(range) => write_to(out, format_args!("range({}, {}, {})", range.start, range.stop, range.step)),
        Value::Namespace(namespace) => {
            let attributes = namespace.attributes.borrow();
            let pairs: Vec<(Value, Value)> =
                attributes.iter().map(|(name, value)| (Value::Str(name.clone()), value.clone())).collect();
            drop(attributes);
            out.push_str("<Namespace ");
            write_pairs(out, pairs.iter(), budget)?;
            out.push('>');
        }
        Value::Macro(of) => write_to(out, format_args!("<Macro {}>", string_repr(&of.definition.name))),
        Value::Loop(of) => {
            write_to(out, format_args!("<LoopContext {}/{}>", of.index.get() + 1, of.items.items().len()));
        }
        other => {
            return Err(Error::new(format!(
                "prints a {}, which Python writes with an address in memory",
                other.type_name()
            )));
        }
    }
    budget.make(out.len() - before)
}

fn write_items(out: &mut String, (begin, end): (&str, &str), items: &[Value], budget: &Budget) -> Result<(), Error> {
    out.push_str(begin);
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            out.push_str(", ");
        }
        write_repr(out, item, budget)?;
    }
    out.push_str(end);
    Ok(())
}

fn write_pairs<'a>(
    out: &mut String,
    pairs: impl IntoIterator<Item = &'a (Value, Value)>,
    budget: &Budget,
) -> Result<(), Error> {
    out.push('{');
    for (index, (key, value)) in pairs.into_iter().enumerate() {
        if index > 0 {
            out.push_str(", ");
        }
        write_repr(out, key, budget)?;
        out.push_str(": ");
        write_repr(out, value, budget)?;
    }
    out.push('}');
    Ok(())
}
