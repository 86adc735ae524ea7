//! Jinja2's tests: what stands behind `is` (`jinja2/tests.py`).

use super::Error;
use super::arguments::{Arguments, required};
use super::arithmetic::{compares, contains};
use super::ast::Comparison;
use super::budget::Budget;
use super::filters;
use super::text::display;
use super::value::Value;

/// `value is NAME(arguments)`.
pub(super) fn apply(name: &str, value: &Value, arguments: Arguments, budget: &Budget) -> Result<bool, Error> {
    let comparison = match name {
        "eq" | "equalto" | "==" => Some(Comparison::Equal),
        "ne" | "!=" => Some(Comparison::NotEqual),
        "lt" | "lessthan" | "<" => Some(Comparison::Less),
        "le" | "<=" => Some(Comparison::LessOrEqual),
        "gt" | "greaterthan" | ">" => Some(Comparison::Greater),
        "ge" | ">=" => Some(Comparison::GreaterOrEqual),
        _ => None,
    };
    if let Some(comparison) = comparison {
        let [other] = arguments.bind(name, ["other"])?;
        return compares(comparison, value, &required(other, name, "other")?, budget);
    }
    match name {
        "in" => {
            let [holder] = arguments.bind(name, ["seq"])?;
            return contains(&required(holder, name, "seq")?, value, budget);
        }
        "divisibleby" => {
            let [divisor] = arguments.bind(name, ["num"])?;
            let divisor = required(divisor, name, "num")?;
            return match (value.as_int(), divisor.as_int()) {
                (Some(_), Some(0)) => Err(Error::new("divides by zero")),
                (Some(value), Some(divisor)) => Ok(value % divisor == 0),
                _ => match (value.defined()?.as_float(), divisor.defined()?.as_float()) {
                    (Some(_), Some(0.0)) => Err(Error::new("divides by zero")),
                    (Some(value), Some(divisor)) => Ok(value % divisor == 0.0),
                    _ => Err(Error::new("`divisibleby` needs numbers")),
                },
            };
        }
        "sameas" => {
            let [other] = arguments.bind(name, ["other"])?;
            return is_same(value, &required(other, name, "other")?, budget);
        }
        _ => {}
    }
    arguments.none(name)?;
    let remainder = |rest: i128| match value.as_int() {
        Some(number) => Ok(number.rem_euclid(2) == rest),
        None => match value.defined()?.as_float() {
            Some(number) => Ok(number.rem_euclid(2.0) == rest as f64),
            None => Err(Error::new(format!("`{name}` needs a number, not {}", value.type_name()))),
        },
    };
    Ok(match name {
        "defined" => !matches!(value, Value::Undefined(_)),
        "undefined" => matches!(value, Value::Undefined(_)),
        "none" => matches!(value, Value::None),
        "boolean" => matches!(value, Value::Bool(_)),
        "true" => matches!(value, Value::Bool(true)),
        "false" => matches!(value, Value::Bool(false)),
        "integer" => matches!(value, Value::Int(_)),
        "float" => matches!(value, Value::Float(_)),
        "number" => matches!(value, Value::Int(_) | Value::Float(_) | Value::Bool(_)),
        "string" => matches!(value, Value::Str(_)),
        "mapping" => matches!(value, Value::Dict(_)),
        "iterable" => value.is_iterable(),
        "sequence" => matches!(
            value,
            Value::Undefined(_) | Value::Str(_) | Value::List(_) | Value::Tuple(_) | Value::Dict(_) | Value::Range(_)
        ),
        "callable" => matches!(
            value,
            Value::Undefined(_)
                | Value::Function(_)
                | Value::Method(_)
                | Value::Macro(_)
                | Value::Loop(_)
                | Value::Joiner(_)
        ),
        "odd" => remainder(1)?,
        "even" => remainder(0)?,
        "lower" => is_cased(&display(value, budget)?, char::is_lowercase, char::is_uppercase),
        "upper" => is_cased(&display(value, budget)?, char::is_uppercase, char::is_lowercase),
        "escaped" => false,
        "filter" => value.as_str().is_some_and(filters::is_known),
        "test" => value.as_str().is_some_and(is_known),
        _ => return Err(Error::new(format!("No test named '{name}'."))),
    })
}

fn is_cased(text: &str, wanted: fn(char) -> bool, other: fn(char) -> bool) -> bool {
    text.chars().any(wanted) && !text.chars().any(other)
}

/// Whether there is a test of that name.
fn is_known(name: &str) -> bool {
    const NAMES: [&str; 39] = [
        "boolean",
        "callable",
        "defined",
        "divisibleby",
        "eq",
        "equalto",
        "==",
        "escaped",
        "even",
        "false",
        "filter",
        "float",
        "ge",
        ">=",
        "gt",
        "greaterthan",
        ">",
        "in",
        "integer",
        "iterable",
        "le",
        "<=",
        "lower",
        "lt",
        "lessthan",
        "<",
        "mapping",
        "ne",
        "!=",
        "none",
        "number",
        "odd",
        "sameas",
        "sequence",
        "string",
        "test",
        "true",
        "undefined",
        "upper",
    ];
    NAMES.contains(&name)
}

/// Python's `is`, where chat templates can tell: constants and small numbers.
fn is_same(left: &Value, right: &Value, budget: &Budget) -> Result<bool, Error> {
    if std::mem::discriminant(left) != std::mem::discriminant(right) {
        return Ok(false);
    }
    Ok(match (left, right) {
        (Value::List(a), Value::List(b)) | (Value::Tuple(a), Value::Tuple(b)) => std::rc::Rc::ptr_eq(a, b),
        (Value::Dict(a), Value::Dict(b)) => std::rc::Rc::ptr_eq(a, b),
        _ => left.equals(right, budget)?,
    })
}
