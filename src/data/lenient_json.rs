//! JSON as people's files hold it, beside what the standard allows.
//!
//! Python writes `NaN` and `Infinity`, cut strings hold half a surrogate pair, integers have more than 64 bits. A strict
//! parser refuses the whole row for a value that nobody reads. [`parse`] takes the strict parser's answer where there is
//! one, and otherwise reads on: what JSON cannot hold becomes null (broken text: U+FFFD) and is a *fault* of its column,
//! which is an error as soon as the column is used (`Dataset::require_sound`).

use serde_json::{Map, Number, Value};

/// Levels of nesting that are read; what is deeper is a fault.
const MOST_LEVELS: usize = 128;

/// Integers from here on may have been rounded by the strict parser.
const EXACT_BELOW: f64 = 9.2e18;

/// Why a text is not JSON.
#[derive(Debug)]
pub(super) struct Broken {
    pub(super) line: usize,
    pub(super) column: usize,
    pub(super) reason: String,
}

/// What was not kept of a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Loss {
    /// Something that JSON cannot hold: "is NaN, ...".
    Fault(String),
    /// Null fields of objects in objects.
    NullFields,
}

/// A value, and what was lost of it, by column of the outermost object (empty outside of one).
pub(super) type Found = (Value, Vec<(String, Loss)>);

/// Parses one JSON text.
///
/// Null fields of nested objects are left out, see [`drop_nulls`].
///
/// # Errors
/// If it is not JSON even when read leniently; the reason is the strict parser's.
pub(super) fn parse(bytes: &[u8]) -> Result<Found, Broken> {
    let mut error = None;
    match serde_json::from_slice::<Value>(bytes) {
        Ok(mut value) => {
            let (is_exact, losses) = clean(&mut value);
            if is_exact {
                return Ok((value, losses));
            }
        }
        Err(e) => error = Some(e),
    }
    let mut reader = Reader { bytes, at: 0, fault: None };
    reader.document().ok_or_else(|| broken(error))
}

/// Parses a JSON array, entry by entry as [`parse`].
///
/// # Errors
/// As [`parse`].
pub(super) fn parse_list(bytes: &[u8]) -> Result<Vec<Found>, Broken> {
    let strict = serde_json::from_slice::<Vec<Value>>(bytes);
    let error = match strict {
        Ok(mut entries) => {
            let cleaned: Vec<(bool, Vec<(String, Loss)>)> = entries.iter_mut().map(clean).collect();
            if cleaned.iter().all(|(is_exact, _)| *is_exact) {
                return Ok(entries.into_iter().zip(cleaned).map(|(entry, (_, losses))| (entry, losses)).collect());
            }
            None
        }
        Err(e) => Some(e),
    };
    let mut reader = Reader { bytes, at: 0, fault: None };
    reader.list().ok_or_else(|| broken(error))
}

/// Parses JSON texts that follow one another, each with the byte it starts at; `None` if they are not all whole.
pub(super) fn parse_stream(bytes: &[u8]) -> Option<Vec<(usize, Found)>> {
    let mut reader = Reader { bytes, at: 0, fault: None };
    let mut texts = Vec::new();
    reader.space();
    while reader.at < bytes.len() {
        texts.push((reader.at, reader.entry()?));
        reader.space();
    }
    Some(texts)
}

fn broken(error: Option<serde_json::Error>) -> Broken {
    error.map_or_else(
        || Broken { line: 1, column: 1, reason: "not a JSON value".into() },
        |e| Broken { line: e.line(), column: e.column(), reason: reason(&e) },
    )
}

/// Cleans each column of a row with [`drop_nulls`]; returns whether all numbers are as they were written, and the columns
/// that lost fields of inner objects.
fn clean(value: &mut Value) -> (bool, Vec<(String, Loss)>) {
    let mut losses = Vec::new();
    let mut is_exact = true;
    let Value::Object(fields) = value else { return (!drop_nulls(value, 0, &mut false), losses) };
    for (name, column) in fields {
        let mut has_lost = false;
        is_exact &= !drop_nulls(column, 0, &mut has_lost);
        if has_lost {
            losses.push((name.clone(), Loss::NullFields));
        }
    }
    (is_exact, losses)
}

/// Removes null fields of objects, at any depth, as TRL's `remove_none_values` does. Arrow gives every row of a file the
/// same fields and fills with null what a row lacks, so that a null cannot be told from a field that is not there.
/// `has_lost` is set where an object in an object lost one: those of messages themselves mean nothing.
/// Returns whether a number was met that the strict parser may have changed: an integer too large, or `-0`.
fn drop_nulls(value: &mut Value, objects: usize, has_lost: &mut bool) -> bool {
    match value {
        Value::Object(fields) => {
            if fields.values().any(Value::is_null) {
                *has_lost |= objects > 0;
                fields.retain(|_, field| !field.is_null());
            }
            fields.values_mut().fold(false, |is_changed, field| drop_nulls(field, objects + 1, has_lost) | is_changed)
        }
        Value::Array(items) => {
            items.iter_mut().fold(false, |is_changed, item| drop_nulls(item, objects, has_lost) | is_changed)
        }
        Value::Number(number) if number.is_f64() => {
            number.as_f64().is_some_and(|x| x.abs() >= EXACT_BELOW || (x == 0.0 && x.is_sign_negative()))
        }
        _ => false,
    }
}

/// [`drop_nulls`] of a column.
pub(super) fn without_nulls(mut column: Value) -> Value {
    drop_nulls(&mut column, 0, &mut false);
    column
}

/// serde's message without the position, which our own messages have.
pub(super) fn reason(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.split(" at line ").next().unwrap_or(&text).to_string()
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    /// The first fault since it was last taken.
    fault: Option<String>,
}

impl Reader<'_> {
    fn document(&mut self) -> Option<Found> {
        let found = self.entry()?;
        self.space();
        (self.at == self.bytes.len()).then_some(found)
    }

    /// One value, with its faults by column.
    fn entry(&mut self) -> Option<Found> {
        self.space();
        let mut losses = Vec::new();
        let mut value = if self.peek()? == b'{' {
            let mut note = |column: &str, fault: String| losses.push((column.to_string(), Loss::Fault(fault)));
            self.object(1, &mut note)?
        } else {
            let value = self.value(1)?;
            losses.extend(self.fault.take().map(|fault| (String::new(), Loss::Fault(fault))));
            value
        };
        losses.extend(clean(&mut value).1);
        Some((value, losses))
    }

    fn list(&mut self) -> Option<Vec<Found>> {
        self.space();
        if !self.take("[") {
            return None;
        }
        let mut entries = Vec::new();
        self.space();
        if !self.take("]") {
            loop {
                entries.push(self.entry()?);
                self.space();
                if self.take("]") {
                    break;
                }
                if !self.take(",") {
                    return None;
                }
            }
        }
        self.space();
        (self.at == self.bytes.len()).then_some(entries)
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn take(&mut self, word: &str) -> bool {
        let is_there = self.bytes[self.at..].starts_with(word.as_bytes());
        self.at += if is_there { word.len() } else { 0 };
        is_there
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn note(&mut self, fault: impl Into<String>) {
        self.fault.get_or_insert_with(|| fault.into());
    }

    fn value(&mut self, level: usize) -> Option<Value> {
        self.space();
        match self.peek()? {
            b'{' | b'[' if level > MOST_LEVELS => {
                self.note(format!("is nested more than {MOST_LEVELS} levels deep"));
                self.skip_nested()?;
                Some(Value::Null)
            }
            b'{' => {
                let mut first = None;
                let value = self.object(level, &mut |_, fault| {
                    first.get_or_insert(fault);
                });
                first.into_iter().for_each(|fault| self.note(fault));
                value
            }
            b'[' => self.array(level),
            b'"' => Some(Value::String(self.string()?)),
            b't' => self.take("true").then_some(Value::Bool(true)),
            b'f' => self.take("false").then_some(Value::Bool(false)),
            b'n' => self.take("null").then_some(Value::Null),
            _ => self.number(),
        }
    }

    /// An object; `note` gets the key and the fault of each field that has one.
    fn object(&mut self, level: usize, note: &mut dyn FnMut(&str, String)) -> Option<Value> {
        self.at += 1;
        let mut fields = Map::new();
        self.space();
        if self.take("}") {
            return Some(Value::Object(fields));
        }
        loop {
            self.space();
            if self.peek()? != b'"' {
                return None;
            }
            let outer = self.fault.take();
            let key = self.string()?;
            self.space();
            if !self.take(":") {
                return None;
            }
            let value = self.value(level + 1)?;
            if let Some(fault) = self.fault.take() {
                note(&key, fault);
            }
            self.fault = outer;
            fields.insert(key, value);
            self.space();
            if self.take("}") {
                return Some(Value::Object(fields));
            }
            if !self.take(",") {
                return None;
            }
        }
    }

    fn array(&mut self, level: usize) -> Option<Value> {
        self.at += 1;
        let mut items = Vec::new();
        self.space();
        if self.take("]") {
            return Some(Value::Array(items));
        }
        loop {
            items.push(self.value(level + 1)?);
            self.space();
            if self.take("]") {
                return Some(Value::Array(items));
            }
            if !self.take(",") {
                return None;
            }
        }
    }

    /// Goes past an object or array without recursion.
    fn skip_nested(&mut self) -> Option<()> {
        let mut open = Vec::new();
        loop {
            match self.peek()? {
                b'"' => {
                    self.string()?;
                    continue;
                }
                byte @ (b'{' | b'[') => open.push(byte),
                b'}' => (open.pop()? == b'{').then_some(())?,
                b']' => (open.pop()? == b'[').then_some(())?,
                _ => {}
            }
            self.at += 1;
            if open.is_empty() {
                return Some(());
            }
        }
    }

    fn string(&mut self) -> Option<String> {
        self.at += 1;
        let mut text = Vec::new();
        loop {
            let start = self.at;
            while !matches!(self.peek()?, b'"' | b'\\' | 0..0x20) {
                self.at += 1;
            }
            text.extend_from_slice(&self.bytes[start..self.at]);
            match self.peek()? {
                b'"' => break,
                b'\\' => {
                    self.at += 1;
                    let character = self.escape()?;
                    text.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
                }
                // A raw control character, which Python's reader refuses as well.
                _ => return None,
            }
        }
        self.at += 1;
        Some(String::from_utf8(text).unwrap_or_else(|e| {
            self.note("has bytes that are not UTF-8");
            String::from_utf8_lossy(e.as_bytes()).into_owned()
        }))
    }

    fn escape(&mut self) -> Option<char> {
        let byte = self.peek()?;
        self.at += 1;
        Some(match byte {
            b'"' | b'\\' | b'/' => char::from(byte),
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => {
                let first = self.hex()?;
                let mut units = vec![first];
                if (0xD800..0xDC00).contains(&first) && self.bytes[self.at..].starts_with(b"\\u") {
                    let back = self.at;
                    self.at += 2;
                    let second = self.hex()?;
                    if (0xDC00..0xE000).contains(&second) {
                        units.push(second);
                    } else {
                        self.at = back;
                    }
                }
                char::decode_utf16(units).next()?.unwrap_or_else(|_| {
                    self.note(format!("has half of a surrogate pair (\\u{first:04x})"));
                    char::REPLACEMENT_CHARACTER
                })
            }
            _ => return None,
        })
    }

    fn hex(&mut self) -> Option<u16> {
        let digits = self.bytes.get(self.at..self.at + 4)?;
        if !digits.iter().all(u8::is_ascii_hexdigit) {
            return None;
        }
        self.at += 4;
        u16::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
    }

    fn number(&mut self) -> Option<Value> {
        for word in ["NaN", "Infinity", "-Infinity"] {
            if self.take(word) {
                self.note(format!("is {word}, which JSON has no value for"));
                return Some(Value::Null);
            }
        }
        let start = self.at;
        let digits = |reader: &mut Self| {
            let from = reader.at;
            while reader.peek().is_some_and(|b| b.is_ascii_digit()) {
                reader.at += 1;
            }
            reader.at - from
        };
        self.take("-");
        let leading_zero = self.peek() == Some(b'0');
        let count = digits(self);
        if count == 0 || (leading_zero && count > 1) {
            return None;
        }
        let mut is_integer = true;
        if self.take(".") {
            is_integer = false;
            (digits(self) > 0).then_some(())?;
        }
        if self.take("e") || self.take("E") {
            is_integer = false;
            if !self.take("+") {
                self.take("-");
            }
            (digits(self) > 0).then_some(())?;
        }
        let text = std::str::from_utf8(&self.bytes[start..self.at]).ok()?;
        if is_integer {
            let number = text.parse::<i64>().map(Number::from).or_else(|_| text.parse::<u64>().map(Number::from));
            return Some(number.map_or_else(
                |_| {
                    self.note("is an integer of more than 64 bits");
                    Value::Null
                },
                Value::Number,
            ));
        }
        if let Some(number) = text.parse::<f64>().ok().and_then(Number::from_f64) {
            return Some(Value::Number(number));
        }
        self.note("is a number beyond what 64 bits hold");
        Some(Value::Null)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn faults(text: &[u8]) -> (Value, Vec<String>) {
        let (value, losses) = parse(text).unwrap();
        let fault = |(column, loss)| match loss {
            Loss::Fault(fault) => Some(format!("{column} {fault}")),
            Loss::NullFields => None,
        };
        (value, losses.into_iter().filter_map(fault).collect())
    }

    #[test]
    fn what_json_cannot_hold_is_a_fault_of_its_column() {
        let text = br#"{"a": 1, "b": NaN, "c": [1, -Infinity], "d": {"e": Infinity}, "f": "cut \ud83d", "g": "ok"}"#;
        let (value, found) = faults(text);
        assert_eq!(value, json!({"a": 1, "b": null, "c": [1, null], "d": {}, "f": "cut \u{FFFD}", "g": "ok"}));
        let columns: Vec<&str> = found.iter().map(|f| f.split(' ').next().unwrap()).collect();
        assert_eq!(columns, ["b", "c", "d", "f"]);
        assert!(found[3].contains("half of a surrogate pair (\\ud83d)"), "{found:?}");
        for (number, word) in
            [("1e400", "beyond"), ("1180591620717411303424", "more than 64 bits"), ("-9223372036854775809", "64 bits")]
        {
            let (value, found) = faults(format!("{{\"x\": {number}, \"y\": 2}}").as_bytes());
            assert_eq!(value, json!({"x": null, "y": 2}));
            assert!(found.len() == 1 && found[0].starts_with("x ") && found[0].contains(word), "{found:?}");
        }
        let (_, found) = faults(b"{\"x\": \"\xff\", \"k\\ud800\": 1}");
        assert!(found[0].contains("not UTF-8") && found[1].contains("surrogate"), "{found:?}");
        let (_, found) = faults(&[b"{\"x\": ".as_slice(), &b"[".repeat(100_000), &b"]".repeat(100_000), b"}"].concat());
        assert!(found[0].contains("levels deep"), "{found:?}");
    }

    #[test]
    fn numbers_keep_their_kind_and_nested_nulls_are_left_out() {
        let (value, found) = faults(
            br#"{"a": -0, "b": -0.0, "c": 18446744073709551615, "d": 1e3, "n": null, "o": {"p": null, "q": [null]}}"#,
        );
        assert!(found.is_empty(), "{found:?}");
        let text = serde_json::to_string(&value).unwrap();
        assert_eq!(text, r#"{"a":0,"b":-0.0,"c":18446744073709551615,"d":1000.0,"n":null,"o":{"q":[null]}}"#);
        assert_eq!(faults(br#"{"a": 1, "a": 2}"#).0, json!({"a": 2}));
    }

    #[test]
    fn what_is_not_json_is_refused_with_the_strict_parser_s_reason() {
        for text in [
            "{\"x\": nan}",
            "{\"x\": 01}",
            "{\"x\": 1.}",
            "{\"x\": -}",
            "{'x': 1}",
            "{\"x\": 1,}",
            "{\"x\": \"\t\"}",
            "{\"x\": +1}",
            "NaN}",
            "{\"x\": \"\\ud83\"}",
            "",
            "{\"x\": NaN",
        ] {
            assert!(parse(text.as_bytes()).is_err(), "{text}");
        }
        assert!(parse(b"{\"x\": 1").unwrap_err().reason.starts_with("EOF"));
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            ".{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(".{0,4}", inner, 0..4)
                    .prop_map(|fields| Value::Object(fields.into_iter().filter(|(_, v)| !v.is_null()).collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn the_lenient_reader_agrees_with_the_strict_one(value in any_value()) {
            let text = serde_json::to_string(&json!({ "x": value })).unwrap();
            let mut reader = Reader { bytes: text.as_bytes(), at: 0, fault: None };
            let (found, losses) = reader.document().unwrap();
            prop_assert!(losses.is_empty());
            prop_assert_eq!(serde_json::to_string(&found).unwrap(), text);
        }

        #[test]
        fn damaged_text_never_panics(text in "[\\[\\]{}\",:\\\\ud8NaIfinity0-9eE.+ \n-]{0,60}") {
            let _ = parse(text.as_bytes());
        }
    }
}
