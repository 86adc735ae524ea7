//! `json.dumps` of Python, which is what models saw in their tool prompts.

use super::Error;
use super::budget::Budget;
use super::text::{float_text, write_to};
use super::value::Value;

/// The arguments of `json.dumps` that templates use.
#[derive(Clone, Debug)]
pub(super) struct Style {
    pub(super) ensure_ascii: bool,
    /// What one level is indented by.
    pub(super) indent: Option<String>,
    pub(super) item_separator: String,
    pub(super) key_separator: String,
    pub(super) sort_keys: bool,
}

/// `json.dumps(value, ...)`.
pub(super) fn dumps(value: &Value, style: &Style, budget: &Budget) -> Result<String, Error> {
    let mut writer = Writer { out: String::new(), paid: 0, style, budget };
    writer.value(value, 0)?;
    writer.pay()?;
    Ok(writer.out)
}

struct Writer<'a> {
    out: String,
    paid: usize,
    style: &'a Style,
    budget: &'a Budget,
}

impl Writer<'_> {
    fn pay(&mut self) -> Result<(), Error> {
        let made = self.out.len() - self.paid;
        self.paid = self.out.len();
        self.budget.make(made)
    }

    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        self.budget.nest()?;
        self.budget.steps(1)?;
        match value {
            Value::None => self.out.push_str("null"),
            Value::Bool(flag) => self.out.push_str(if *flag { "true" } else { "false" }),
            Value::Int(number) => self.out.push_str(&number.to_string()),
            Value::Float(number) => self.out.push_str(&json_float(*number)),
            Value::Str(text) => self.string(text),
            Value::List(items) | Value::Tuple(items) => {
                self.out.push('[');
                for (index, item) in items.items().iter().enumerate() {
                    self.between(index, depth + 1)?;
                    self.value(item, depth + 1)?;
                }
                self.close(items.items().is_empty(), depth, ']')?;
            }
            Value::Dict(dict) => {
                self.out.push('{');
                let mut entries: Vec<(&Value, &Value)> =
                    dict.entries().iter().map(|(key, value)| (key, value)).collect();
                if self.style.sort_keys {
                    sort(&mut entries, self.budget)?;
                }
                for (index, (key, value)) in entries.iter().enumerate() {
                    self.between(index, depth + 1)?;
                    self.key(key)?;
                    self.out.push_str(&self.style.key_separator);
                    self.value(value, depth + 1)?;
                }
                self.close(entries.is_empty(), depth, '}')?;
            }
            Value::Undefined(message) => {
                return Err(Error::new(format!("Object of type Undefined is not JSON serializable ({message})")));
            }
            other => {
                return Err(Error::new(format!("Object of type {} is not JSON serializable", other.type_name())));
            }
        }
        self.pay()
    }

    fn key(&mut self, key: &Value) -> Result<(), Error> {
        match key {
            Value::Str(text) => self.string(text),
            Value::None => self.out.push_str("\"null\""),
            Value::Bool(flag) => self.out.push_str(if *flag { "\"true\"" } else { "\"false\"" }),
            Value::Int(number) => write_to(&mut self.out, format_args!("\"{number}\"")),
            Value::Float(number) => write_to(&mut self.out, format_args!("\"{}\"", json_float(*number))),
            other => {
                return Err(Error::new(format!(
                    "keys must be str, int, float, bool or None, not {}",
                    other.type_name()
                )));
            }
        }
        Ok(())
    }

    fn between(&mut self, index: usize, depth: usize) -> Result<(), Error> {
        if index > 0 {
            self.out.push_str(&self.style.item_separator);
        }
        self.line(depth)
    }

    fn close(&mut self, is_empty: bool, depth: usize, end: char) -> Result<(), Error> {
        if !is_empty {
            self.line(depth)?;
        }
        self.out.push(end);
        Ok(())
    }

    fn line(&mut self, depth: usize) -> Result<(), Error> {
        if let Some(indent) = &self.style.indent {
            self.budget.make(indent.len() * depth)?;
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(indent.as_str(), depth));
        }
        Ok(())
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for character in text.chars() {
            match character {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if (c as u32) < 0x20 || (self.style.ensure_ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        write_to(&mut self.out, format_args!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

fn json_float(value: f64) -> String {
    match float_text(value).as_str() {
        "nan" => "NaN".into(),
        "inf" => "Infinity".into(),
        "-inf" => "-Infinity".into(),
        text => text.into(),
    }
}

/// Python sorts the keys before it turns them into strings.
fn sort(entries: &mut [(&Value, &Value)], budget: &Budget) -> Result<(), Error> {
    let mut failure = None;
    entries.sort_by(|(left, _), (right, _)| match left.compare(right, "<", budget) {
        Ok(order) => order.unwrap_or(std::cmp::Ordering::Equal),
        Err(error) => {
            failure.get_or_insert(error);
            std::cmp::Ordering::Equal
        }
    });
    failure.map_or(Ok(()), Err)
}
