//! The keys of a JSON object that somebody else wrote, read with messages that name file and key.

use std::path::Path;

use serde_json::{Map, Value};

use crate::model::Error;

/// The keys of one object of a configuration file. A key whose value is null counts as absent.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a> {
    /// The file, for messages.
    pub(super) path: &'a Path,
    /// The object.
    pub(super) object: &'a Map<String, Value>,
    /// What stands before a key in messages, e.g. `rope_scaling.`.
    pub(super) prefix: &'a str,
}

impl<'a> Fields<'a> {
    /// The keys of a whole file.
    pub(super) fn of_file(path: &'a Path, content: &'a Value) -> Result<Self, Error> {
        let object = content.as_object().ok_or_else(|| Error::Key {
            path: path.into(),
            key: "(the whole file)".into(),
            found: shown(content),
            expected: "an object".into(),
        })?;
        Ok(Self { path, object, prefix: "" })
    }

    /// The value of a key.
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|v| !v.is_null())
    }

    /// The error of a key that is absent or has a wrong value.
    pub(super) fn wrong(&self, key: &str, expected: &str) -> Error {
        let found = self.object.get(key).map_or_else(|| "absent".into(), shown);
        Error::Key { path: self.path.into(), key: format!("{}{key}", self.prefix), found, expected: expected.into() }
    }

    /// The error of a file that asks for something that is not done here.
    pub(super) fn unsupported(&self, found: String, supported: &str) -> Error {
        Error::Unsupported { path: self.path.into(), found, supported: supported.into() }
    }

    /// A number.
    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, Error> {
        self.get(key).map(|value| value.as_f64().ok_or_else(|| self.wrong(key, "a number"))).transpose()
    }

    /// A boolean.
    pub(super) fn boolean(&self, key: &str) -> Result<Option<bool>, Error> {
        self.get(key).map(|value| value.as_bool().ok_or_else(|| self.wrong(key, "true or false"))).transpose()
    }

    /// A string.
    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, Error> {
        self.get(key).map(|value| value.as_str().ok_or_else(|| self.wrong(key, "a string"))).transpose()
    }

    /// A whole number that must be there.
    pub(super) fn size(&self, key: &str) -> Result<usize, Error> {
        self.optional_size(key)?.ok_or_else(|| self.wrong(key, "a whole number"))
    }

    /// A whole number; some writers put it as a float.
    pub(super) fn optional_size(&self, key: &str) -> Result<Option<usize>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let whole = |f: &f64| f.fract() == 0.0 && (0.0..9e15).contains(f);
        let number = value.as_u64().or_else(|| value.as_f64().filter(whole).map(|f| f as u64));
        number.map(|n| Some(n as usize)).ok_or_else(|| self.wrong(key, "a whole number"))
    }
}

/// A value as a message shows it.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 60 {
        return text;
    }
    match value {
        Value::Array(_) => "a long list".into(),
        Value::Object(_) => "an object".into(),
        _ => "a long text".into(),
    }
}
