//! YAML text to a tree that knows where everything stands.
//!
//! The only file that names the YAML library. A scalar keeps its text as written, so that `1e-5`, `010`, `no` and the
//! revision `1234567e8` are read by whoever knows what the key means, and not by the rules of one YAML version.
//! Repeated keys are kept: the caller reports them.

use std::fmt;
use std::ops::Range;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

/// A value and the bytes of the text it was read from.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Node {
    /// What it is.
    pub(super) value: Value,
    /// Where it stands, in bytes of the text.
    pub(super) span: Range<usize>,
}

/// What a node holds.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    /// `null`, `~` or nothing at all.
    Null,
    /// One value, as written (escapes and block styles undone).
    Scalar {
        /// Its text.
        text: String,
        /// In quotes, or a block of text: a string whatever it looks like.
        is_quoted: bool,
    },
    /// A list.
    List(Vec<Node>),
    /// A map, in the order of the file, repeated keys included.
    Map(Vec<Entry>),
}

/// One key of a map and its value.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    /// The key's text.
    pub(super) key: String,
    /// Where the key stands.
    pub(super) key_span: Range<usize>,
    /// Its value.
    pub(super) node: Node,
}

/// Text that is not YAML.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct SyntaxError {
    /// What the parser says.
    pub(super) message: String,
    /// Where, if it knows.
    pub(super) span: Option<Range<usize>>,
}

/// Reads one YAML document.
///
/// # Errors
/// If the text is not YAML, or holds more than one document.
pub(super) fn parse(text: &str) -> Result<Node, SyntaxError> {
    let options = serde_saphyr::options! {
        duplicate_keys: serde_saphyr::DuplicateKeyPolicy::PassThrough,
        non_finite_float_policy: serde_saphyr::options::NonFiniteFloatPolicy::AsString,
        with_snippet: false,
    };
    match serde_saphyr::from_str_with_options::<Located>(text, options) {
        Ok(located) => Ok(located.into_node(text)),
        Err(error) => {
            let error = error.without_snippet();
            let span = error.location().and_then(|location| byte_range(location, text));
            let message = error.to_string();
            // The parser repeats the place, which the report shows anyway.
            let message = message.split(" at line ").next().unwrap_or(&message).trim().to_owned();
            Err(SyntaxError { message, span })
        }
    }
}

fn byte_range(location: serde_saphyr::Location, text: &str) -> Option<Range<usize>> {
    let span = location.span();
    let start = match span.byte_offset() {
        Some(offset) => usize::try_from(offset).ok()?.min(text.len()),
        None => line_start(text, location.line())? + column_offset(text, location.line(), location.column())?,
    };
    let end = start.saturating_add(usize::try_from(span.byte_len().unwrap_or(0)).ok()?).min(text.len());
    Some(start..end)
}

/// Byte at which a line (from 1) begins.
fn line_start(text: &str, line: u64) -> Option<usize> {
    let line = usize::try_from(line.checked_sub(1)?).ok()?;
    Some(text.split_inclusive('\n').take(line).map(str::len).sum())
}

/// Bytes before a column (from 1, in characters) of a line (from 1).
fn column_offset(text: &str, line: u64, column: u64) -> Option<usize> {
    let rest = text.get(line_start(text, line)?..)?;
    let column = usize::try_from(column.checked_sub(1)?).ok()?;
    Some(rest.chars().take(column).take_while(|&c| c != '\n').map(char::len_utf8).sum())
}

/// What the library hands over; becomes a [`Node`] once the text is at hand.
struct Located(Spanned<Guess>);

/// A value typed by the library's reading of it.
enum Guess {
    Null,
    /// A plain scalar that looks like something else than a string; the text is the library's spelling.
    Plain(String),
    Text(String),
    List(Vec<Located>),
    Map(Vec<(Spanned<String>, Located)>),
}

impl Located {
    fn into_node(self, text: &str) -> Node {
        let mut span = byte_range(self.0.defined, text).unwrap_or(0..0);
        let written = text.get(span.clone()).unwrap_or("").trim_end();
        if !written.is_empty() {
            span.end = span.start + written.len();
        }
        let is_styled = written.starts_with(['"', '\'', '|', '>']);
        let is_decorated = written.starts_with(['&', '!', '*']);
        let value = match self.0.value {
            Guess::Null => Value::Null,
            Guess::Plain(spelling) => {
                let text = if written.is_empty() || is_decorated { spelling } else { written.to_owned() };
                Value::Scalar { text, is_quoted: false }
            }
            Guess::Text(content) => {
                // A plain scalar on one line is taken as written; quotes, blocks and folded lines as the library undid
                // them.
                let is_plain_line = !is_styled && !is_decorated && !written.is_empty() && !written.contains('\n');
                let content = if is_plain_line { written.to_owned() } else { content };
                let is_quoted = is_styled || content.contains('\n');
                Value::Scalar { text: content, is_quoted }
            }
            Guess::List(items) => {
                let items: Vec<Node> = items.into_iter().map(|item| item.into_node(text)).collect();
                span.end = container_end(text, &span, items.last(), ']');
                Value::List(items)
            }
            Guess::Map(entries) => {
                let entry = |(key, value): (Spanned<String>, Self)| Entry {
                    key_span: byte_range(key.defined, text).unwrap_or(0..0),
                    key: key.value,
                    node: value.into_node(text),
                };
                let entries: Vec<Entry> = entries.into_iter().map(entry).collect();
                span.end = container_end(text, &span, entries.last().map(|entry| &entry.node), '}');
                Value::Map(entries)
            }
        };
        Node { value, span }
    }
}

/// Where a list or map ends, for showing it: at its bracket if that stands on the same line, else with its first line.
fn container_end(text: &str, span: &Range<usize>, last: Option<&Node>, bracket: char) -> usize {
    let line = text[span.start..].lines().next().map_or(span.start, |line| span.start + line.trim_end().len());
    let inside = last.map_or(span.end, |node| node.span.end).max(span.start);
    let end = match text.get(inside..line).and_then(|rest| rest.find(bracket)) {
        Some(at) if text[span.start..].starts_with(['[', '{']) => inside + at + 1,
        _ => line,
    };
    end.max(span.end)
}

impl<'de> Deserialize<'de> for Located {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Spanned::<Guess>::deserialize(deserializer).map(Self)
    }
}

impl<'de> Deserialize<'de> for Guess {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(GuessVisitor)
    }
}

struct GuessVisitor;

impl<'de> Visitor<'de> for GuessVisitor {
    type Value = Guess;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Guess, E> {
        Ok(Guess::Null)
    }

    fn visit_none<E: de::Error>(self) -> Result<Guess, E> {
        Ok(Guess::Null)
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Guess, E> {
        Ok(Guess::Plain(value.to_string()))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Guess, E> {
        Ok(Guess::Plain(value.to_string()))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Guess, E> {
        Ok(Guess::Plain(value.to_string()))
    }

    fn visit_i128<E: de::Error>(self, value: i128) -> Result<Guess, E> {
        Ok(Guess::Plain(value.to_string()))
    }

    fn visit_u128<E: de::Error>(self, value: u128) -> Result<Guess, E> {
        Ok(Guess::Plain(value.to_string()))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Guess, E> {
        Ok(Guess::Plain(value.to_string()))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Guess, E> {
        Ok(Guess::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Guess, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Guess::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Guess, A::Error> {
        let mut map = Vec::new();
        while let Some(entry) = entries.next_entry()? {
            map.push(entry);
        }
        Ok(Guess::Map(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scalar(text: &str) -> (String, bool) {
        match parse(text).expect("valid YAML").value {
            Value::Scalar { text, is_quoted } => (text, is_quoted),
            other => panic!("not a scalar: {other:?}"),
        }
    }

    #[test]
    fn scalars_keep_their_spelling() {
        for text in [
            "1e-5",
            "010",
            "no",
            "1_000",
            "0x10",
            "1234567e8",
            "true",
            ".inf",
            "-.nan",
            "Off",
            "99999999999999999999999999999999999999999999",
        ] {
            assert_eq!(scalar(text), (text.to_owned(), false));
        }
        assert_eq!(scalar("\"8\""), ("8".to_owned(), true));
        assert_eq!(scalar("'a''b'"), ("a'b".to_owned(), true));
        assert_eq!(scalar("|\n  two\n  lines\n"), ("two\nlines\n".to_owned(), true));
        assert_eq!(scalar("plain words"), ("plain words".to_owned(), false));
        assert_eq!(scalar("!!str 5"), ("5".to_owned(), false));
    }

    #[test]
    fn spans_cover_keys_and_values() {
        let text = "é: 1\nlist: [1, \"x\"]\nmap:\n  inner: 2.50 # note\nempty:\n";
        let Value::Map(entries) = parse(text).expect("valid YAML").value else { panic!("not a map") };
        let at = |span: &Range<usize>| &text[span.clone()];
        assert_eq!(at(&entries[0].key_span), "é");
        assert_eq!(at(&entries[0].node.span), "1");
        let Value::List(items) = &entries[1].node.value else { panic!("not a list") };
        assert_eq!(at(&items[1].span), "\"x\"");
        assert_eq!(at(&entries[1].node.span), "[1, \"x\"]");
        let Value::Map(inner) = &entries[2].node.value else { panic!("not a map") };
        assert_eq!(at(&inner[0].key_span), "inner");
        assert_eq!(at(&inner[0].node.span), "2.50");
        assert_eq!(entries[3].node.value, Value::Null);
    }

    #[test]
    fn repeated_keys_are_kept_and_anchors_followed() {
        let Value::Map(entries) = parse("a: &x [1]\na: *x\n").expect("valid YAML").value else { panic!("not a map") };
        assert_eq!(entries.len(), 2);
        assert!(matches!(&entries[1].node.value, Value::List(items) if items.len() == 1));
    }

    #[test]
    fn broken_text_says_where() {
        let error = parse("a: 1\nb: [1, 2\nc: 3\n").expect_err("the list is not closed");
        assert!(error.span.is_some(), "{error:?}");
        assert!(!error.message.is_empty());
        parse("a: 1\n---\nb: 2\n").expect_err("two documents");
    }
}
