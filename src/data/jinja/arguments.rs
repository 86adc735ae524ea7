//! Arguments of a call, and their assignment to parameters.

use std::sync::Arc;

use super::Error;
use super::value::Value;

#[derive(Clone, Debug, Default)]
pub(super) struct Arguments {
    pub(super) positional: Vec<Value>,
    pub(super) named: Vec<(Arc<str>, Value)>,
}

impl Arguments {
    /// The argument of each parameter.
    ///
    /// # Errors
    /// If there are more than parameters, one is given twice, or a name is not a parameter's.
    pub(super) fn bind<const N: usize>(
        self,
        function: &str,
        parameters: [&str; N],
    ) -> Result<[Option<Value>; N], Error> {
        if self.positional.len() > N {
            return Err(Error::new(format!(
                "{function}() takes at most {N} arguments ({} given)",
                self.positional.len()
            )));
        }
        let mut bound = [const { None }; N];
        for (slot, value) in bound.iter_mut().zip(self.positional) {
            *slot = Some(value);
        }
        for (name, value) in self.named {
            match parameters.iter().position(|parameter| *parameter == &*name) {
                Some(at) if bound[at].is_none() => bound[at] = Some(value),
                Some(_) => {
                    return Err(Error::new(format!("{function}() got multiple values for argument '{name}'")));
                }
                None => {
                    return Err(Error::new(format!("{function}() got an unexpected keyword argument '{name}'")));
                }
            }
        }
        Ok(bound)
    }

    /// Fails if there is any argument.
    pub(super) fn none(self, function: &str) -> Result<(), Error> {
        self.bind::<0>(function, []).map(|_| ())
    }
}

/// An argument that must be there.
pub(super) fn required(value: Option<Value>, function: &str, name: &str) -> Result<Value, Error> {
    value.ok_or_else(|| Error::new(format!("{function}() missing required argument: '{name}'")))
}

/// A whole number, or the default where there is none.
pub(super) fn integer(value: Option<&Value>, default: i128) -> Result<i128, Error> {
    match value {
        None => Ok(default),
        Some(value) => value
            .as_int()
            .ok_or_else(|| Error::new(format!("'{}' object cannot be interpreted as an integer", value.type_name()))),
    }
}

/// A string.
pub(super) fn string<'v>(value: &'v Value, function: &str) -> Result<&'v str, Error> {
    value.as_str().ok_or_else(|| Error::new(format!("{function}() argument must be str, not {}", value.type_name())))
}

/// Whether an optional argument is true.
pub(super) fn flag(value: Option<&Value>) -> bool {
    value.is_some_and(Value::is_true)
}
