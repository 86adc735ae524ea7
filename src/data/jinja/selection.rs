//! Filters that choose, order and group the items of a sequence.

use super::Error;
use super::arguments::{Arguments, flag, integer, required, string};
use super::budget::Budget;
use super::filters::{self, by_attribute, sorted};
use super::value::{Sequence, Value};
use super::{checks, percent::limited};

/// `value | NAME(arguments)`.
#[expect(clippy::too_many_lines, reason = "one arm a filter")]
pub(super) fn apply(name: &str, value: &Value, arguments: Arguments, budget: &Budget) -> Result<Value, Error> {
    match name {
        "map" => map(value, arguments, budget),
        "select" | "reject" | "selectattr" | "rejectattr" => select(name, value, arguments, budget),
        "sort" => {
            let [reverse, case_sensitive, attribute] =
                arguments.bind(name, ["reverse", "case_sensitive", "attribute"])?;
            let fold = !flag(case_sensitive.as_ref());
            let mut keyed = Vec::new();
            for item in value.items(budget)? {
                let key = match attribute.as_ref().filter(|attribute| !matches!(attribute, Value::None)) {
                    Some(Value::Str(paths)) if paths.contains(',') => {
                        let parts = paths.split(',').map(|path| by_attribute(&item, &Value::str(path), budget));
                        Value::list(parts.map(|part| Ok(folded(&part?, fold))).collect::<Result<_, Error>>()?)?
                    }
                    Some(attribute) => folded(&by_attribute(&item, attribute, budget)?, fold),
                    None => folded(&item, fold),
                };
                keyed.push((key, item));
            }
            sorted(&mut keyed, flag(reverse.as_ref()), budget)?;
            Value::list(keyed.into_iter().map(|(_, item)| item).collect())
        }
        "dictsort" => {
            let [case_sensitive, by, reverse] = arguments.bind(name, ["case_sensitive", "by", "reverse"])?;
            let fold = !flag(case_sensitive.as_ref());
            let by = by.unwrap_or_else(|| Value::str("key"));
            let is_by_key = match string(&by, name)? {
                "key" => true,
                "value" => false,
                _ => return Err(Error::new("You can only sort by either \"key\" or \"value\"")),
            };
            let Value::Dict(dict) = value.defined()? else {
                return Err(Error::new(format!("'{}' object has no attribute 'items'", value.type_name())));
            };
            let mut keyed = Vec::new();
            for (key, item) in dict.entries() {
                let by = folded(if is_by_key { key } else { item }, fold);
                keyed.push((by, Value::tuple(vec![key.clone(), item.clone()])?));
            }
            sorted(&mut keyed, flag(reverse.as_ref()), budget)?;
            Value::list(keyed.into_iter().map(|(_, pair)| pair).collect())
        }
        "unique" => {
            let [case_sensitive, attribute] = arguments.bind(name, ["case_sensitive", "attribute"])?;
            let fold = !flag(case_sensitive.as_ref());
            let mut seen: Vec<Value> = Vec::new();
            let mut kept = Vec::new();
            'items: for item in value.items(budget)? {
                let key = folded(&key_of(&item, attribute.as_ref(), budget)?, fold);
                for known in &seen {
                    if known.equals(&key, budget)? {
                        continue 'items;
                    }
                }
                seen.push(key);
                kept.push(item);
            }
            Value::iterator(kept)
        }
        "min" | "max" => {
            let [case_sensitive, attribute] = arguments.bind(name, ["case_sensitive", "attribute"])?;
            let fold = !flag(case_sensitive.as_ref());
            let mut best: Option<(Value, Value)> = None;
            for item in value.items(budget)? {
                let key = folded(&key_of(&item, attribute.as_ref(), budget)?, fold);
                let is_better = match &best {
                    None => true,
                    Some((known, _)) => {
                        let order = key.compare(known, if name == "min" { "<" } else { ">" }, budget)?;
                        order
                            == Some(if name == "min" { std::cmp::Ordering::Less } else { std::cmp::Ordering::Greater })
                    }
                };
                if is_better {
                    best = Some((key, item));
                }
            }
            Ok(best.map_or_else(|| Value::undefined("No aggregated item, sequence was empty."), |(_, item)| item))
        }
        "groupby" => group(value, arguments, budget),
        "batch" => {
            let [size, fill] = arguments.bind(name, ["linecount", "fill_with"])?;
            let size = limited(integer(Some(&required(size, name, "linecount")?), 1)?.max(1))?;
            let mut rows = Vec::new();
            for chunk in value.items(budget)?.chunks(size) {
                let mut row = chunk.to_vec();
                if let Some(fill) = fill.as_ref().filter(|fill| !matches!(fill, Value::None)) {
                    budget.make(size * size_of::<Value>())?;
                    row.resize(size, fill.clone());
                }
                rows.push(Value::list(row)?);
            }
            Value::iterator(rows)
        }
        _ => {
            let [count, fill] = arguments.bind(name, ["slices", "fill_with"])?;
            let count = limited(integer(Some(&required(count, name, "slices")?), 1)?)?;
            if count == 0 {
                return Err(Error::new("divides by zero"));
            }
            let items = value.items(budget)?;
            let (each, longer) = (items.len() / count, items.len() % count);
            budget.make(count * size_of::<Value>())?;
            let (mut slices, mut rest) = (Vec::new(), &items[..]);
            for number in 0..count {
                let (slice, after) = rest.split_at(each + usize::from(number < longer));
                rest = after;
                let mut slice = slice.to_vec();
                if number >= longer
                    && let Some(fill) = fill.as_ref().filter(|fill| !matches!(fill, Value::None))
                {
                    slice.push(fill.clone());
                }
                slices.push(Value::list(slice)?);
            }
            Value::iterator(slices)
        }
    }
}

/// Strings are compared in lower case unless asked otherwise.
fn folded(value: &Value, fold: bool) -> Value {
    match value {
        Value::Str(text) if fold => Value::str(text.to_lowercase()),
        other => other.clone(),
    }
}

fn key_of(item: &Value, attribute: Option<&Value>, budget: &Budget) -> Result<Value, Error> {
    match attribute {
        Some(attribute) if !matches!(attribute, Value::None) => by_attribute(item, attribute, budget),
        _ => Ok(item.clone()),
    }
}

fn map(value: &Value, mut arguments: Arguments, budget: &Budget) -> Result<Value, Error> {
    if !value.is_true() {
        return Value::iterator(Vec::new());
    }
    let mut mapped = Vec::new();
    if arguments.positional.is_empty() {
        let [attribute, default] = arguments.bind("map", ["attribute", "default"])?;
        let attribute = attribute.ok_or_else(|| Error::new("map requires a filter argument"))?;
        for item in value.items(budget)? {
            let found = by_attribute(&item, &attribute, budget)?;
            mapped.push(match (&found, &default) {
                (Value::Undefined(_), Some(default)) if !matches!(default, Value::None) => default.clone(),
                _ => found,
            });
        }
    } else {
        let name = arguments.positional.remove(0);
        let name = string(&name, "map")?;
        for item in value.items(budget)? {
            mapped.push(filters::apply(name, &item, arguments.clone(), budget)?);
        }
    }
    Value::iterator(mapped)
}

fn select(name: &str, value: &Value, mut arguments: Arguments, budget: &Budget) -> Result<Value, Error> {
    if !value.is_true() {
        return Value::iterator(Vec::new());
    }
    let attribute = if name.ends_with("attr") {
        if arguments.positional.is_empty() {
            return Err(Error::new("Missing parameter for attribute name"));
        }
        Some(arguments.positional.remove(0))
    } else {
        None
    };
    let test = if arguments.positional.is_empty() { None } else { Some(arguments.positional.remove(0)) };
    let mut kept = Vec::new();
    for item in value.items(budget)? {
        let tested = key_of(&item, attribute.as_ref(), budget)?;
        let is_so = match &test {
            Some(test) => checks::apply(string(test, name)?, &tested, arguments.clone(), budget)?,
            None => tested.is_true(),
        };
        if is_so == name.starts_with("select") {
            kept.push(item);
        }
    }
    Value::iterator(kept)
}

fn group(value: &Value, arguments: Arguments, budget: &Budget) -> Result<Value, Error> {
    let [attribute, default, case_sensitive] = arguments.bind("groupby", ["attribute", "default", "case_sensitive"])?;
    let attribute = required(attribute, "groupby", "attribute")?;
    let fold = !flag(case_sensitive.as_ref());
    let key = |item: &Value| -> Result<Value, Error> {
        let found = by_attribute(item, &attribute, budget)?;
        Ok(match (&found, &default) {
            (Value::Undefined(_), Some(default)) if !matches!(default, Value::None) => default.clone(),
            _ => found,
        })
    };
    let mut keyed = Vec::new();
    for item in value.items(budget)? {
        keyed.push((folded(&key(&item)?, fold), item));
    }
    sorted(&mut keyed, false, budget)?;
    let mut groups: Vec<(Value, Vec<Value>)> = Vec::new();
    for (by, item) in keyed {
        match groups.last_mut() {
            Some((known, items)) if known.equals(&by, budget)? => items.push(item),
            _ => groups.push((by, vec![item])),
        }
    }
    let mut out = Vec::new();
    for (by, items) in groups {
        // The group's key is that of its first item as it stands there.
        let by = if fold { key(&items[0])? } else { by };
        out.push(Value::Tuple(Sequence::named(vec![by, Value::list(items)?], &["grouper", "list"])?));
    }
    Value::list(out)
}
