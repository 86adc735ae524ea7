//! Python's methods of strings.

use super::Error;
use super::arguments::{Arguments, flag, integer, required, string};
use super::attributes::text_bounds;
use super::budget::Budget;
use super::format_spec::{self, Fields};
use super::percent::{limited, pad};
use super::text::{Class, is_line_break, is_of, is_printable, is_space};
use super::value::Value;

/// `text.NAME(arguments)`.
#[expect(clippy::too_many_lines, reason = "one arm a method")]
pub(super) fn call(text: &str, name: &str, arguments: Arguments, budget: &Budget) -> Result<Value, Error> {
    budget.look(text.len())?;
    let made = |out: String| {
        budget.make(out.len())?;
        Ok(Value::str(out))
    };
    let truth = |value: bool| Ok(Value::Bool(value));
    match name {
        "upper" => arguments.none(name).and_then(|()| made(text.to_uppercase())),
        "lower" => arguments.none(name).and_then(|()| made(text.to_lowercase())),
        "casefold" => arguments.none(name).and_then(|()| made(text.to_lowercase().replace('ß', "ss"))),
        "capitalize" => arguments.none(name).and_then(|()| made(capitalized(text))),
        "title" => arguments.none(name).and_then(|()| made(titled(text))),
        "swapcase" => arguments.none(name).and_then(|()| made(swapped(text))),
        "isalnum" => truth(is_of(text, Class::Alphanumeric)),
        "isalpha" => truth(is_of(text, Class::Alphabetic)),
        "isdecimal" => truth(is_of(text, Class::Decimal)),
        "isdigit" => truth(is_of(text, Class::Digit)),
        "isnumeric" => truth(is_of(text, Class::Numeric)),
        "isascii" => truth(text.is_ascii()),
        "isspace" => truth(!text.is_empty() && text.chars().all(is_space)),
        "isprintable" => truth(text.chars().all(is_printable)),
        "isidentifier" => truth(is_identifier(text)),
        "islower" => truth(text.chars().any(char::is_lowercase) && !text.chars().any(char::is_uppercase)),
        "isupper" => truth(text.chars().any(char::is_uppercase) && !text.chars().any(char::is_lowercase)),
        "istitle" => truth(text.chars().any(is_cased) && titled(text) == text),
        "strip" | "lstrip" | "rstrip" => {
            let [characters] = arguments.bind(name, ["chars"])?;
            made(stripped(text, characters.as_ref(), name)?.to_string())
        }
        "startswith" | "endswith" => affix(text, name, arguments),
        "removeprefix" | "removesuffix" => {
            let [affix] = arguments.bind(name, ["affix"])?;
            let affix = required(affix, name, "affix")?;
            let affix = string(&affix, name)?;
            let rest = if name == "removeprefix" { text.strip_prefix(affix) } else { text.strip_suffix(affix) };
            made(rest.unwrap_or(text).to_string())
        }
        "find" | "rfind" | "index" | "rindex" | "count" => search(text, name, arguments, budget),
        "replace" => {
            let [old, new, count] = arguments.bind(name, ["old", "new", "count"])?;
            let (old, new) = (required(old, name, "old")?, required(new, name, "new")?);
            made(replaced(text, string(&old, name)?, string(&new, name)?, integer(count.as_ref(), -1)?, budget)?)
        }
        "split" | "rsplit" => {
            let [separator, limit] = arguments.bind(name, ["sep", "maxsplit"])?;
            let limit = usize::try_from(integer(limit.as_ref(), -1)?).unwrap_or(usize::MAX);
            parts(split(text, separator.as_ref(), limit, name == "rsplit")?, budget)
        }
        "splitlines" => {
            let [keep] = arguments.bind(name, ["keepends"])?;
            parts(lines(text, flag(keep.as_ref())), budget)
        }
        "partition" | "rpartition" => {
            let [separator] = arguments.bind(name, ["sep"])?;
            let separator = required(separator, name, "sep")?;
            let separator = string(&separator, name)?;
            if separator.is_empty() {
                return Err(Error::new("empty separator"));
            }
            budget.make(text.len())?;
            let is_first = name == "partition";
            let found = if is_first { text.split_once(separator) } else { text.rsplit_once(separator) };
            let (before, middle, after) = match found {
                Some((before, after)) => (before, separator, after),
                None if is_first => (text, "", ""),
                None => ("", "", text),
            };
            Value::tuple(vec![Value::str(before), Value::str(middle), Value::str(after)])
        }
        "join" => {
            let [items] = arguments.bind(name, ["iterable"])?;
            let items = required(items, name, "iterable")?.items(budget)?;
            let mut out = String::new();
            for (index, item) in items.iter().enumerate() {
                let item = item.as_str().ok_or_else(|| {
                    Error::new(format!("sequence item {index}: expected str instance, {} found", item.type_name()))
                })?;
                budget.make(item.len() + text.len())?;
                out.push_str(if index > 0 { text } else { "" });
                out.push_str(item);
            }
            Ok(Value::str(out))
        }
        "center" | "ljust" | "rjust" => {
            let [width, fill] = arguments.bind(name, ["width", "fillchar"])?;
            let width = limited(integer(Some(&required(width, name, "width")?), 0)?.max(0))?;
            let fill = fill.map_or(Ok(' '), |fill| {
                let mut characters = fill.as_str().unwrap_or_default().chars();
                match (characters.next(), characters.next()) {
                    (Some(one), None) => Ok(one),
                    _ => Err(Error::new("The fill character must be exactly one character long")),
                }
            })?;
            budget.make(width)?;
            made(match name {
                "ljust" => pad(text, fill, '<', width),
                "rjust" => pad(text, fill, '>', width),
                _ => centered(text, fill, width),
            })
        }
        "zfill" => {
            let [width] = arguments.bind(name, ["width"])?;
            let width = limited(integer(Some(&required(width, name, "width")?), 0)?.max(0))?;
            budget.make(width)?;
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['+', '-'])));
            made(format!("{sign}{}", pad(digits, '0', '>', width.saturating_sub(sign.len()))))
        }
        "expandtabs" => {
            let [size] = arguments.bind(name, ["tabsize"])?;
            let size = limited(integer(size.as_ref(), 8)?.max(0))?;
            budget.make(text.matches('\t').count().saturating_mul(size))?;
            made(with_tabs_expanded(text, size))
        }
        "format" | "format_map" => {
            let (positional, named) = if name == "format_map" {
                let [mapping] = arguments.bind(name, ["mapping"])?;
                (Vec::new(), vec![required(mapping, name, "mapping")?])
            } else {
                let named = arguments.named.into_iter().map(|(name, value)| (Value::Str(name), value));
                (arguments.positional, vec![Value::Dict(super::value::Dict::new(named, budget)?)])
            };
            let lookup = |name: &str| match named.first() {
                Some(Value::Dict(dict)) => dict.get_str(name).cloned(),
                _ => None,
            };
            made(format_spec::format(text, &Fields { positional: &positional, named: &lookup, budget })?)
        }
        _ => Err(Error::new(format!("calls `str.{name}`, which is not supported"))),
    }
}

fn parts(parts: Vec<&str>, budget: &Budget) -> Result<Value, Error> {
    budget.make(parts.iter().map(|part| part.len() + size_of::<Value>()).sum())?;
    Value::list(parts.into_iter().map(Value::str).collect())
}

pub(super) fn capitalized(text: &str) -> String {
    let mut characters = text.chars();
    characters.next().map_or_else(String::new, |first| {
        first.to_uppercase().collect::<String>() + &characters.as_str().to_lowercase()
    })
}

fn is_cased(character: char) -> bool {
    character.is_lowercase() || character.is_uppercase()
}

fn titled(text: &str) -> String {
    let mut is_inside = false;
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        if is_inside {
            out.extend(character.to_lowercase());
        } else {
            out.extend(character.to_uppercase());
        }
        is_inside = is_cased(character);
    }
    out
}

fn swapped(text: &str) -> String {
    let swap =
        |c: char| -> String { if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() } };
    text.chars().map(swap).collect()
}

fn is_identifier(text: &str) -> bool {
    let mut characters = text.chars();
    characters.next().is_some_and(|first| first == '_' || first.is_alphabetic())
        && characters.all(|c| c == '_' || c.is_alphanumeric())
}

/// Python's `center` puts the odd blank to the left of a text with an odd width.
pub(super) fn centered(text: &str, fill: char, width: usize) -> String {
    let length = text.chars().count();
    let missing = width.saturating_sub(length);
    let before = missing / 2 + (missing & width & 1);
    pad(&pad(text, fill, '>', length + before), fill, '<', width.max(length))
}

pub(super) fn stripped<'t>(text: &'t str, characters: Option<&Value>, name: &str) -> Result<&'t str, Error> {
    let set = match characters {
        None | Some(Value::None) => None,
        Some(value) => Some(string(value, name)?),
    };
    let is_stripped = |c: char| set.map_or_else(|| is_space(c), |set| set.contains(c));
    Ok(match name {
        "lstrip" => text.trim_start_matches(is_stripped),
        "rstrip" => text.trim_end_matches(is_stripped),
        _ => text.trim_matches(is_stripped),
    })
}

/// The part of a text between two bounds in characters, with the number of its first character.
fn between<'t>(text: &'t str, start: Option<&Value>, end: Option<&Value>) -> Result<Option<(&'t str, usize)>, Error> {
    if start.is_none() && end.is_none() {
        return Ok(Some((text, 0)));
    }
    let length = text.chars().count();
    let (start, end) = text_bounds(start, end, length)?;
    if start > end {
        return Ok(None);
    }
    let at = |count: usize| text.char_indices().nth(count).map_or(text.len(), |(at, _)| at);
    Ok(Some((&text[at(start)..at(end)], start)))
}

fn affix(text: &str, name: &str, arguments: Arguments) -> Result<Value, Error> {
    let [affix, start, end] = arguments.bind(name, ["affix", "start", "end"])?;
    let affix = required(affix, name, "affix")?;
    let Some((part, _)) = between(text, start.as_ref(), end.as_ref())? else { return Ok(Value::Bool(false)) };
    let is_there = |affix: &Value| match affix {
        Value::Str(affix) if name == "startswith" => Ok(part.starts_with(&**affix)),
        Value::Str(affix) => Ok(part.ends_with(&**affix)),
        other => Err(Error::new(format!("{name} first arg must be str or a tuple of str, not {}", other.type_name()))),
    };
    let Value::Tuple(all) = &affix else { return is_there(&affix).map(Value::Bool) };
    for affix in all.items() {
        if is_there(affix)? {
            return Ok(Value::Bool(true));
        }
    }
    Ok(Value::Bool(false))
}

fn search(text: &str, name: &str, arguments: Arguments, budget: &Budget) -> Result<Value, Error> {
    let [wanted, start, end] = arguments.bind(name, ["sub", "start", "end"])?;
    let wanted = required(wanted, name, "sub")?;
    let wanted = string(&wanted, name)?;
    budget.look(wanted.len())?;
    let part = between(text, start.as_ref(), end.as_ref())?;
    if name == "count" {
        let count = part.map_or(0, |(part, _)| part.matches(wanted).count());
        return Ok(Value::Int(count as i128));
    }
    let found = part.and_then(|(part, first)| {
        let at = if name.starts_with('r') { part.rfind(wanted) } else { part.find(wanted) }?;
        Some(first + part[..at].chars().count())
    });
    match found {
        Some(at) => Ok(Value::Int(at as i128)),
        None if name.ends_with("find") => Ok(Value::Int(-1)),
        None => Err(Error::new("substring not found")),
    }
}

/// `str.replace`; a negative count replaces all.
pub(super) fn replaced(text: &str, old: &str, new: &str, count: i128, budget: &Budget) -> Result<String, Error> {
    let limit = usize::try_from(count).unwrap_or(usize::MAX);
    let count = if old.is_empty() { text.chars().count() + 1 } else { text.matches(old).count() }.min(limit);
    budget.make(text.len() + count.saturating_mul(new.len()))?;
    Ok(text.replacen(old, new, limit))
}

fn split<'t>(text: &'t str, separator: Option<&Value>, limit: usize, is_reversed: bool) -> Result<Vec<&'t str>, Error> {
    let separator = match separator {
        None | Some(Value::None) => return Ok(split_blank(text, limit, is_reversed)),
        Some(separator) => string(separator, "split")?,
    };
    if separator.is_empty() {
        return Err(Error::new("empty separator"));
    }
    let most = limit.saturating_add(1);
    Ok(if is_reversed {
        let mut parts: Vec<&str> = text.rsplitn(most, separator).collect();
        parts.reverse();
        parts
    } else {
        text.splitn(most, separator).collect()
    })
}

fn split_blank(text: &str, limit: usize, is_reversed: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text;
    if is_reversed {
        rest = rest.trim_end_matches(is_space);
        while !rest.is_empty() && parts.len() < limit {
            let Some((at, blank)) = rest.char_indices().rev().find(|(_, c)| is_space(*c)) else { break };
            parts.push(&rest[at + blank.len_utf8()..]);
            rest = rest[..at].trim_end_matches(is_space);
        }
        // What is left keeps the blanks at its beginning only if the limit was reached.
        let last = if parts.len() < limit { rest.trim_start_matches(is_space) } else { rest };
        parts.extend(Some(last).filter(|last| !last.is_empty()));
        parts.reverse();
        return parts;
    }
    rest = rest.trim_start_matches(is_space);
    while !rest.is_empty() && parts.len() < limit {
        let Some(at) = rest.find(is_space) else { break };
        parts.push(&rest[..at]);
        rest = rest[at..].trim_start_matches(is_space);
    }
    parts.extend(Some(rest).filter(|rest| !rest.is_empty()));
    parts
}

/// `str.splitlines`.
pub(super) fn lines(text: &str, keeps_ends: bool) -> Vec<&str> {
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some((at, end)) = rest.char_indices().find(|(_, c)| is_line_break(*c)) {
        let length = if rest[at..].starts_with("\r\n") { 2 } else { end.len_utf8() };
        lines.push(&rest[..if keeps_ends { at + length } else { at }]);
        rest = &rest[at + length..];
    }
    lines.extend(Some(rest).filter(|rest| !rest.is_empty()));
    lines
}

fn with_tabs_expanded(text: &str, size: usize) -> String {
    let (mut out, mut column) = (String::new(), 0);
    for character in text.chars() {
        match character {
            '\t' => {
                let blanks = if size == 0 { 0 } else { size - column % size };
                out.extend(std::iter::repeat_n(' ', blanks));
                column += blanks;
            }
            '\n' | '\r' => {
                out.push(character);
                column = 0;
            }
            _ => {
                out.push(character);
                column += 1;
            }
        }
    }
    out
}
