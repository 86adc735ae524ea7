//! `value.name` and `value[key]`, as Jinja2's sandbox looks them up: an attribute first for a dot, an item first for
//! brackets, and nothing that changes a value or begins with an underscore.

use super::Error;
use super::arguments::integer;
use super::budget::Budget;
use super::text::repr;
use super::value::{Loop, Value};

/// Methods by type: those that only read, and those that the sandbox refuses.
const STRING_METHODS: [&str; 43] = [
    "capitalize",
    "casefold",
    "center",
    "count",
    "encode",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "format_map",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
];
const MORE_STRING_METHODS: [&str; 4] = ["upper", "zfill", "translate", "maketrans"];
const LIST_METHODS: [&str; 3] = ["count", "index", "copy"];
const DICT_METHODS: [&str; 6] = ["get", "items", "keys", "values", "copy", "fromkeys"];
const LIST_CHANGES: [&str; 8] = ["append", "clear", "pop", "reverse", "insert", "sort", "extend", "remove"];
const DICT_CHANGES: [&str; 5] = ["clear", "pop", "popitem", "setdefault", "update"];

enum Member {
    Value(Value),
    Refused,
    Missing,
}

/// What Python's `getattr` finds.
fn member(value: &Value, name: &str, budget: &Budget) -> Result<Member, Error> {
    if name.starts_with("__") && name.ends_with("__") {
        return Ok(Member::Refused);
    }
    let method = |names: &[&'static str]| names.iter().find(|known| **known == name).copied();
    let (reading, changes): (Option<&'static str>, &[&str]) = match value {
        Value::Str(_) => (method(&STRING_METHODS).or_else(|| method(&MORE_STRING_METHODS)), &[]),
        Value::List(_) => (method(&LIST_METHODS), &LIST_CHANGES),
        Value::Tuple(items) if items.by_name(name).is_some() => {
            return Ok(items.by_name(name).cloned().map_or(Member::Missing, Member::Value));
        }
        Value::Tuple(_) | Value::Range(_) => (method(&LIST_METHODS[..2]), &[]),
        Value::Dict(_) => (method(&DICT_METHODS), &DICT_CHANGES),
        Value::Float(_) => (method(&["is_integer"]), &[]),
        Value::Int(_) | Value::Bool(_) => (method(&["is_integer", "bit_length"]), &[]),
        Value::Loop(of) => {
            return Ok(match loop_attribute(of, name) {
                Some(found) => Member::Value(found),
                None => match method(&["cycle", "changed"]) {
                    Some(name) => Member::Value(bound(value, name)),
                    None => Member::Missing,
                },
            });
        }
        Value::Namespace(namespace) => return Ok(namespace.get(name).map_or(Member::Missing, Member::Value)),
        Value::Macro(of) => {
            let definition = &of.definition;
            return Ok(match name {
                "name" => Member::Value(Value::Str(definition.name.clone())),
                "arguments" => {
                    let names = definition.parameters.iter().map(|(_, name, _)| Value::Str(name.clone()));
                    Member::Value(Value::tuple(names.collect())?)
                }
                "catch_kwargs" => Member::Value(Value::Bool(definition.takes_kwargs)),
                "catch_varargs" => Member::Value(Value::Bool(definition.takes_varargs)),
                "caller" => Member::Value(Value::Bool(definition.takes_caller)),
                _ => Member::Missing,
            });
        }
        Value::Cycler(cycler) => {
            return Ok(match name {
                "current" => Member::Value(cycler.0[cycler.1.get()].clone()),
                _ => method(&["next", "reset"]).map_or(Member::Missing, |name| Member::Value(bound(value, name))),
            });
        }
        _ => (None, &[]),
    };
    budget.steps(1)?;
    Ok(match reading {
        Some(name) => Member::Value(bound(value, name)),
        None if changes.contains(&name) => Member::Refused,
        None => Member::Missing,
    })
}

fn bound(value: &Value, name: &'static str) -> Value {
    Value::Method(std::rc::Rc::new((value.clone(), name)))
}

fn loop_attribute(of: &Loop, name: &str) -> Option<Value> {
    let (index, length) = (of.index.get(), of.items.items().len());
    let number = |value: usize| Some(Value::Int(value as i128));
    match name {
        "index" => number(index + 1),
        "index0" => number(index),
        "revindex" => number(length - index),
        "revindex0" => number(length - index - 1),
        "first" => Some(Value::Bool(index == 0)),
        "last" => Some(Value::Bool(index + 1 == length)),
        "length" => number(length),
        "depth" => number(of.depth0 + 1),
        "depth0" => number(of.depth0),
        "previtem" => Some(match index.checked_sub(1) {
            Some(before) => of.items.items()[before].clone(),
            None => Value::undefined("there is no previous item"),
        }),
        "nextitem" => {
            Some(of.items.items().get(index + 1).cloned().unwrap_or_else(|| Value::undefined("there is no next item")))
        }
        _ => None,
    }
}

fn refused(value: &Value, name: &str) -> Value {
    Value::undefined(format!("access to attribute '{name}' of '{}' object is unsafe.", value.type_name()))
}

/// `value.name`.
pub(super) fn get_attribute(value: &Value, name: &str, budget: &Budget) -> Result<Value, Error> {
    value.defined()?;
    Ok(match member(value, name, budget)? {
        Member::Value(found) => found,
        Member::Refused => refused(value, name),
        Member::Missing => match value {
            Value::Dict(dict) => dict.get_str(name).cloned().unwrap_or_else(|| absent(value, name)),
            _ => absent(value, name),
        },
    })
}

fn absent(value: &Value, name: &str) -> Value {
    let kind = value.type_name();
    Value::undefined(match value {
        Value::None => format!("'None' has no attribute '{name}'"),
        _ => format!("'{kind} object' has no attribute '{name}'"),
    })
}

/// `value[key]`.
pub(super) fn get_item(value: &Value, key: &Value, budget: &Budget) -> Result<Value, Error> {
    value.defined()?;
    let found = match (value, key.as_int()) {
        (Value::List(items) | Value::Tuple(items), Some(index)) => {
            place(index, items.items().len()).map(|at| items.items()[at].clone())
        }
        (Value::Range(range), Some(index)) => place(index, range.len()).map(|at| range.get(at)),
        (Value::Str(text), Some(index)) => {
            budget.look(text.len())?;
            character(text, index).map(Value::str)
        }
        (Value::Dict(dict), _) => match key {
            Value::List(_) | Value::Dict(_) => None,
            _ => dict.get(key, budget)?.cloned(),
        },
        _ => None,
    };
    if let Some(found) = found {
        return Ok(found);
    }
    let Value::Str(name) = key else {
        return Ok(Value::undefined(format!("{} object has no element {}", value.type_name(), repr(key, budget)?)));
    };
    Ok(match member(value, name, budget)? {
        Member::Value(found) => found,
        Member::Refused => refused(value, name),
        Member::Missing => absent(value, name),
    })
}

/// The place that an index means; negative ones count from the end.
fn place(index: i128, length: usize) -> Option<usize> {
    let at = if index < 0 { index + length as i128 } else { index };
    usize::try_from(at).ok().filter(|&at| at < length)
}

fn character(text: &str, index: i128) -> Option<&str> {
    let (at, _) = if index >= 0 {
        text.char_indices().nth(usize::try_from(index).ok()?)?
    } else {
        text.char_indices().rev().nth(usize::try_from(-(index + 1)).ok()?)?
    };
    text[at..].chars().next().map(|c| &text[at..at + c.len_utf8()])
}

/// `value[start:stop:step]`.
pub(super) fn get_slice(value: &Value, bounds: &[Option<Value>; 3], budget: &Budget) -> Result<Value, Error> {
    value.defined()?;
    let bound = |value: &Option<Value>| match value {
        None | Some(Value::None) => Ok(None),
        Some(value) => value.as_int().map(Some).ok_or_else(|| {
            value
                .defined()
                .err()
                .unwrap_or_else(|| Error::new("slice indices must be integers or None or have an __index__ method"))
        }),
    };
    let [start, stop, step] = bounds;
    let (start, stop, step) = (bound(start)?, bound(stop)?, bound(step)?.unwrap_or(1));
    if step == 0 {
        return Err(Error::new("slice step cannot be zero"));
    }
    match value {
        Value::List(items) => Value::list(sliced(items.items(), start, stop, step, budget)?),
        Value::Tuple(items) => Value::tuple(sliced(items.items(), start, stop, step, budget)?),
        Value::Str(text) => {
            budget.make(text.len())?;
            if text.is_ascii() {
                let bytes = sliced(text.as_bytes(), start, stop, step, budget)?;
                return Ok(Value::str(String::from_utf8_lossy(&bytes)));
            }
            budget.make(text.len() * size_of::<char>())?;
            let characters: Vec<char> = text.chars().collect();
            Ok(Value::str(sliced(&characters, start, stop, step, budget)?.into_iter().collect::<String>()))
        }
        Value::Range(range) => {
            let items: Vec<Value> = (0..range.len()).map(|index| range.get(index)).collect();
            Value::list(sliced(&items, start, stop, step, budget)?)
        }
        _ => Err(Error::new(format!("'{}' object cannot be sliced", value.type_name()))),
    }
}

fn sliced<T: Clone>(
    items: &[T],
    start: Option<i128>,
    stop: Option<i128>,
    step: i128,
    budget: &Budget,
) -> Result<Vec<T>, Error> {
    let length = items.len() as i128;
    let (low, high) = if step > 0 { (0, length) } else { (-1, length - 1) };
    let clamped = |bound: i128| (if bound < 0 { bound.saturating_add(length) } else { bound }).clamp(low, high);
    let (first, last) = if step > 0 { (0, length) } else { (length - 1, -1) };
    let mut at = start.map_or(first, clamped);
    let stop = stop.map_or(last, clamped);
    let mut out = Vec::new();
    while (step > 0 && at < stop) || (step < 0 && at > stop) {
        out.push(items[at as usize].clone());
        at = at.saturating_add(step);
    }
    budget.make(out.len() * size_of::<T>())?;
    Ok(out)
}

/// `start` and `end` of methods like `find`, in characters of a text of `length`.
pub(super) fn text_bounds(start: Option<&Value>, end: Option<&Value>, length: usize) -> Result<(usize, usize), Error> {
    let length = length as i128;
    let bound = |value: Option<&Value>, default: i128| -> Result<i128, Error> {
        let value = match value {
            Some(Value::None) => default,
            value => integer(value, default)?,
        };
        Ok(if value < 0 { value.saturating_add(length).max(0) } else { value })
    };
    Ok((
        usize::try_from(bound(start, 0)?).unwrap_or(usize::MAX),
        usize::try_from(bound(end, length)?.min(length)).unwrap_or(0),
    ))
}
