//! JSON to the values of the template engine and back.

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value as TemplateValue};
use serde_json::{Map, Value};

/// A JSON value as templates see it; objects keep the order of their fields.
pub(super) fn from_json(value: &Value) -> TemplateValue {
    match value {
        Value::Null => TemplateValue::from(()),
        Value::Bool(flag) => TemplateValue::from(*flag),
        Value::Number(number) => {
            let integer = number.as_i64().map(TemplateValue::from).or_else(|| number.as_u64().map(TemplateValue::from));
            integer.unwrap_or_else(|| TemplateValue::from(number.as_f64().unwrap_or(f64::NAN)))
        }
        Value::String(text) => TemplateValue::from(text.as_str()),
        Value::Array(items) => items.iter().map(from_json).collect(),
        Value::Object(fields) => {
            TemplateValue::from_pairs(fields.iter().map(|(name, field)| (name.as_str(), from_json(field))))
        }
    }
}

/// A template's value as JSON.
///
/// # Errors
/// As Python's `json.dumps`: for undefined values, bytes, functions, and objects with keys that are no strings.
pub(super) fn to_json(value: &TemplateValue) -> Result<Value, Error> {
    let refuse = || Error::new(ErrorKind::InvalidOperation, format!("{} has no JSON form", value.kind()));
    Ok(match value.kind() {
        ValueKind::None => Value::Null,
        ValueKind::Bool => Value::Bool(value.is_true()),
        ValueKind::Number if value.is_integer() => {
            let signed = i64::try_from(value.clone()).map(Value::from);
            signed.or_else(|_| u64::try_from(value.clone()).map(Value::from))?
        }
        ValueKind::Number => Value::from(f64::try_from(value.clone())?),
        ValueKind::String => Value::from(value.as_str().ok_or_else(refuse)?),
        ValueKind::Seq | ValueKind::Iterable => {
            Value::Array(value.try_iter()?.map(|item| to_json(&item)).collect::<Result<_, _>>()?)
        }
        ValueKind::Map => {
            let mut fields = Map::new();
            for name in value.try_iter()? {
                let field = to_json(&value.get_item(&name)?)?;
                fields.insert(name.as_str().ok_or_else(refuse)?.to_string(), field);
            }
            Value::Object(fields)
        }
        _ => return Err(refuse()),
    })
}
