//! The parameters of one built-in reward: typed, with defaults, and none left unread.

use serde_json::{Map, Value};

use super::error::{Error, excerpt, nearest};

/// Reads the parameters of one reward; [`Parameters::finish`] refuses those nobody asked for.
pub(super) struct Parameters<'a> {
    reward: &'a str,
    values: &'a Map<String, Value>,
    known: Vec<&'static str>,
}

impl<'a> Parameters<'a> {
    pub(super) fn new(reward: &'a str, values: &'a Map<String, Value>) -> Self {
        Self { reward, values, known: Vec::new() }
    }

    /// The name of the reward, for messages.
    pub(super) fn reward(&self) -> &'a str {
        self.reward
    }

    fn value(&mut self, key: &'static str) -> Option<&'a Value> {
        if !self.known.contains(&key) {
            self.known.push(key);
        }
        self.values.get(key).filter(|v| !v.is_null())
    }

    /// The error that says what `key` should have been.
    pub(super) fn wrong(&self, key: &'static str, expected: &str) -> Error {
        let got = self.values.get(key).map_or_else(|| "missing".to_owned(), |v| excerpt(&v.to_string()));
        Error::Parameter { reward: self.reward.to_owned(), key, got, expected: expected.to_owned() }
    }

    /// A truth value.
    pub(super) fn flag(&mut self, key: &'static str, default: bool) -> Result<bool, Error> {
        match self.value(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(self.wrong(key, "true or false")),
        }
    }

    /// A finite number that `is_valid` accepts; `expected` says which those are.
    pub(super) fn number(
        &mut self,
        key: &'static str,
        default: f64,
        expected: &str,
        is_valid: impl Fn(f64) -> bool,
    ) -> Result<f64, Error> {
        match self.value(key).map(Value::as_f64) {
            None => Ok(default),
            Some(Some(number)) if number.is_finite() && is_valid(number) => Ok(number),
            Some(_) => Err(self.wrong(key, expected)),
        }
    }

    /// A whole number of at least `least`, if there is one.
    pub(super) fn count(&mut self, key: &'static str, least: usize) -> Result<Option<usize>, Error> {
        match self.value(key).map(Value::as_u64) {
            None => Ok(None),
            Some(Some(count)) if count as usize >= least => Ok(Some(count as usize)),
            Some(_) => Err(self.wrong(key, &format!("a whole number of at least {least}"))),
        }
    }

    /// The one of two keys for the same thing that the file has.
    fn given(&mut self, keys: [&'static str; 2]) -> Result<&'static str, Error> {
        match keys.map(|key| self.value(key)) {
            [Some(_), Some(_)] => Err(self.wrong(keys[1], &format!("nothing, since `{}` is given too", keys[0]))),
            [None, Some(_)] => Ok(keys[1]),
            _ => Ok(keys[0]),
        }
    }

    /// [`Parameters::number`] under either of two names.
    pub(super) fn number_of(
        &mut self,
        keys: [&'static str; 2],
        default: f64,
        expected: &str,
        is_valid: impl Fn(f64) -> bool,
    ) -> Result<f64, Error> {
        let key = self.given(keys)?;
        self.number(key, default, expected, is_valid)
    }

    /// [`Parameters::count`] under either of two names.
    pub(super) fn count_of(&mut self, keys: [&'static str; 2], least: usize) -> Result<Option<usize>, Error> {
        let key = self.given(keys)?;
        self.count(key, least)
    }

    /// A text, if there is one.
    pub(super) fn text(&mut self, key: &'static str) -> Result<Option<String>, Error> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(_) => Err(self.wrong(key, "a text")),
        }
    }

    /// A text or a list of texts, if there is one; never an empty list.
    pub(super) fn texts(&mut self, key: &'static str) -> Result<Option<Vec<String>>, Error> {
        let texts: Option<Vec<String>> = match self.value(key) {
            None => return Ok(None),
            Some(Value::String(text)) => Some(vec![text.clone()]),
            Some(Value::Array(items)) => items.iter().map(|i| i.as_str().map(str::to_owned)).collect(),
            Some(_) => None,
        };
        match texts {
            Some(texts) if !texts.is_empty() => Ok(Some(texts)),
            _ => Err(self.wrong(key, "a text or a list of texts")),
        }
    }

    /// Ends the reading.
    ///
    /// # Errors
    /// If the file gives a parameter that was not read.
    pub(super) fn finish(self) -> Result<(), Error> {
        match self.values.keys().find(|k| !self.known.contains(&k.as_str())) {
            None => Ok(()),
            Some(key) => Err(Error::UnknownParameter {
                reward: self.reward.to_owned(),
                key: key.clone(),
                nearest: nearest(key, self.known.iter().copied()),
                known: self.known,
            }),
        }
    }
}
