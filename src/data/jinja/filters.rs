//! Jinja2's filters (`jinja2/filters.py`), with transformers' `tojson`. What needs randomness, other packages or HTML
//! is an error by name.

use std::cmp::Ordering;

use super::Error;
use super::arguments::{Arguments, flag, integer, required, string};
use super::arithmetic::binary;
use super::ast::Operator;
use super::attributes::{get_attribute, get_item};
use super::budget::Budget;
use super::json::{Style, dumps};
use super::percent::{self, limited};
use super::selection;
use super::strings;
use super::text::{display, is_space, write_to};
use super::value::{Dict, Value};

const NAMES: [&str; 52] = [
    "abs",
    "attr",
    "batch",
    "capitalize",
    "center",
    "count",
    "d",
    "default",
    "dictsort",
    "e",
    "escape",
    "filesizeformat",
    "first",
    "float",
    "forceescape",
    "format",
    "groupby",
    "indent",
    "int",
    "items",
    "join",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "pprint",
    "random",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "slice",
    "sort",
    "string",
    "striptags",
    "sum",
    "title",
    "tojson",
    "trim",
    "truncate",
    "unique",
    "upper",
    "urlencode",
    "wordcount",
    "wordwrap",
];

/// Whether there is a filter of that name.
pub(super) fn is_known(name: &str) -> bool {
    NAMES.contains(&name) || ["xmlattr", "urlize"].contains(&name)
}

/// `value | NAME(arguments)`.
#[expect(clippy::too_many_lines, reason = "one arm a filter")]
pub(super) fn apply(name: &str, value: &Value, arguments: Arguments, budget: &Budget) -> Result<Value, Error> {
    budget.steps(1)?;
    if let Value::Str(text) = value {
        budget.look(text.len())?;
    }
    if let Some(done) = on_sequences(name, value, &arguments, budget)? {
        return Ok(done);
    }
    let text = || display(value, budget);
    let made = |out: String| {
        budget.make(out.len())?;
        Ok(Value::str(out))
    };
    match name {
        "upper" => arguments.none(name).and_then(|()| made(text()?.to_uppercase())),
        "lower" => arguments.none(name).and_then(|()| made(text()?.to_lowercase())),
        "capitalize" => arguments.none(name).and_then(|()| made(strings::capitalized(&text()?))),
        "title" => arguments.none(name).and_then(|()| made(titled(&text()?))),
        "string" | "safe" => arguments.none(name).and_then(|()| made(text()?)),
        "trim" => {
            let [characters] = arguments.bind(name, ["chars"])?;
            made(strings::stripped(&text()?, characters.as_ref(), "strip")?.to_string())
        }
        "replace" => {
            let [old, new, count] = arguments.bind(name, ["old", "new", "count"])?;
            let (old, new) = (required(old, name, "old")?, required(new, name, "new")?);
            let count = count.filter(|count| !matches!(count, Value::None));
            let (old, new) = (display(&old, budget)?, display(&new, budget)?);
            made(strings::replaced(&text()?, &old, &new, integer(count.as_ref(), -1)?, budget)?)
        }
        "center" => {
            let [width] = arguments.bind(name, ["width"])?;
            let width = limited(integer(width.as_ref(), 80)?.max(0))?;
            budget.make(width)?;
            made(strings::centered(&text()?, ' ', width))
        }
        "indent" => made(indented(value, arguments, budget)?),
        "truncate" => truncated(value, arguments),
        "wordwrap" => made(wrapped(value, arguments, budget)?),
        "wordcount" => {
            arguments.none(name)?;
            let is_word = |c: char| c == '_' || c.is_alphanumeric();
            let text = text()?;
            Ok(Value::Int(text.split(|c| !is_word(c)).filter(|word| !word.is_empty()).count() as i128))
        }
        "format" => {
            let text = text()?;
            if arguments.named.is_empty() {
                return made(percent::format(&text, &Value::tuple(arguments.positional)?, budget)?);
            }
            if !arguments.positional.is_empty() {
                return Err(Error::new("can't handle positional and keyword arguments at the same time"));
            }
            let named = arguments.named.into_iter().map(|(name, value)| (Value::Str(name), value));
            made(percent::format(&text, &Value::Dict(Dict::new(named, budget)?), budget)?)
        }
        "tojson" => made(to_json(value, arguments, budget)?),
        "default" | "d" => {
            let [other, boolean] = arguments.bind(name, ["default_value", "boolean"])?;
            let is_absent = matches!(value, Value::Undefined(_)) || (flag(boolean.as_ref()) && !value.is_true());
            Ok(if is_absent { other.unwrap_or_else(|| Value::str("")) } else { value.clone() })
        }
        "int" => {
            let [default, base] = arguments.bind(name, ["default", "base"])?;
            Ok(to_int(value, integer(base.as_ref(), 10)?)?.unwrap_or_else(|| default.unwrap_or(Value::Int(0))))
        }
        "float" => {
            let [default] = arguments.bind(name, ["default"])?;
            value.defined()?;
            Ok(to_float(value).map_or_else(|| default.unwrap_or(Value::Float(0.0)), Value::Float))
        }
        "abs" => {
            arguments.none(name)?;
            match (value.defined()?, value.as_int()) {
                (Value::Float(number), _) => Ok(Value::Float(number.abs())),
                (_, Some(number)) => Ok(Value::Int(number.checked_abs().unwrap_or(i128::MAX))),
                _ => Err(Error::new(format!("bad operand type for abs(): '{}'", value.type_name()))),
            }
        }
        "round" => rounded(value, arguments),
        "attr" => {
            let [attribute] = arguments.bind(name, ["name"])?;
            let attribute = required(attribute, name, "name")?;
            match value {
                // An attribute only, no item.
                Value::Dict(dict) if dict.get_str(string(&attribute, name)?).is_some() => {
                    let empty = Value::Dict(Dict::new([], budget)?);
                    get_attribute(&empty, string(&attribute, name)?, budget)
                }
                _ => get_attribute(value, string(&attribute, name)?, budget),
            }
        }
        "escape" | "e" | "forceescape" => {
            arguments.none(name)?;
            let escapes = [("&", "&amp;"), (">", "&gt;"), ("<", "&lt;"), ("'", "&#39;"), ("\"", "&#34;")];
            let mut out = text()?;
            for (from, to) in escapes {
                out = strings::replaced(&out, from, to, -1, budget)?;
            }
            made(out)
        }
        "filesizeformat" => made(file_size(value, arguments)?),
        "pprint" => arguments.none(name).and_then(|()| made(super::text::repr(value, budget)?)),
        "urlencode" => {
            arguments.none(name)?;
            made(url_encoded(value, budget)?)
        }
        "striptags" | "xmlattr" | "urlize" | "random" => {
            Err(Error::new(format!("uses the filter `{name}`, which is not supported")))
        }
        _ => Err(Error::new(format!("No filter named '{name}'."))),
    }
}

/// The filters on sequences; `None` for a name that is none of them.
fn on_sequences(name: &str, value: &Value, arguments: &Arguments, budget: &Budget) -> Result<Option<Value>, Error> {
    let arguments = || arguments.clone();
    Ok(Some(match name {
        "length" | "count" => {
            arguments().none(name)?;
            Value::Int(value.len()? as i128)
        }
        "list" => {
            arguments().none(name)?;
            Value::list(value.items(budget)?)?
        }
        "first" => {
            arguments().none(name)?;
            match value {
                Value::Iterator(iterator) => iterator.next(),
                _ => value.items(budget)?.into_iter().next(),
            }
            .unwrap_or_else(|| Value::undefined("No first item, sequence was empty."))
        }
        "last" => {
            arguments().none(name)?;
            if matches!(value, Value::Iterator(_)) {
                return Err(Error::new("'generator' object is not reversible"));
            }
            let last = value.items(budget)?.pop();
            last.unwrap_or_else(|| Value::undefined("No last item, sequence was empty."))
        }
        "reverse" => {
            arguments().none(name)?;
            let mut items = value.items(budget)?;
            items.reverse();
            match value {
                Value::Str(text) => Value::str(text.chars().rev().collect::<String>()),
                _ => Value::iterator(items)?,
            }
        }
        "join" => {
            let [separator, attribute] = arguments().bind(name, ["d", "attribute"])?;
            let separator = separator.map_or_else(|| Ok(String::new()), |d| display(&d, budget))?;
            let mut out = String::new();
            for (index, item) in value.items(budget)?.iter().enumerate() {
                let item = match &attribute {
                    Some(attribute) if !matches!(attribute, Value::None) => by_attribute(item, attribute, budget)?,
                    _ => item.clone(),
                };
                let item = display(&item, budget)?;
                budget.make(item.len() + separator.len())?;
                out.push_str(if index > 0 { &separator } else { "" });
                out.push_str(&item);
            }
            Value::str(out)
        }
        "items" => {
            arguments().none(name)?;
            match value {
                Value::Undefined(_) => Value::iterator(Vec::new())?,
                Value::Dict(dict) => {
                    Value::iterator(Value::View(super::value::View::Items, dict.clone()).items(budget)?)?
                }
                _ => return Err(Error::new("Can only get item pairs from a mapping.")),
            }
        }
        "sum" => {
            let [attribute, start] = arguments().bind(name, ["attribute", "start"])?;
            let mut total = start.unwrap_or(Value::Int(0));
            for item in value.items(budget)? {
                let item = match &attribute {
                    Some(attribute) if !matches!(attribute, Value::None) => by_attribute(&item, attribute, budget)?,
                    _ => item,
                };
                total = binary(Operator::Add, &total, &item, budget)?;
            }
            total
        }
        "map" | "select" | "reject" | "selectattr" | "rejectattr" | "sort" | "dictsort" | "unique" | "min" | "max"
        | "groupby" | "batch" | "slice" => selection::apply(name, value, arguments(), budget)?,
        _ => return Ok(None),
    }))
}

/// What a path of attributes and indices leads to, e.g. `function.name` or `0`.
pub(super) fn by_attribute(item: &Value, attribute: &Value, budget: &Budget) -> Result<Value, Error> {
    let Value::Str(path) = attribute else { return get_item(item, attribute, budget) };
    let mut found = item.clone();
    for part in path.split('.') {
        let is_number = !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        let key = part.parse().ok().filter(|_| is_number).map_or_else(|| Value::str(part), Value::Int);
        found = get_item(&found, &key, budget)?;
    }
    Ok(found)
}

/// Order by `compare`, keeping the first error.
pub(super) fn sorted(items: &mut [(Value, Value)], is_reversed: bool, budget: &Budget) -> Result<(), Error> {
    let mut failure = None;
    items.sort_by(|(left, _), (right, _)| {
        let order = left.compare(right, "<", budget).unwrap_or_else(|error| {
            failure.get_or_insert(error);
            None
        });
        let order = order.unwrap_or(Ordering::Equal);
        if is_reversed { order.reverse() } else { order }
    });
    failure.map_or(Ok(()), Err)
}

/// Jinja2's `title`: words begin behind blanks, hyphens and opening brackets.
fn titled(text: &str) -> String {
    let mut is_first = true;
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        if is_space(character) || "-({[<".contains(character) {
            out.push(character);
            is_first = true;
        } else {
            if is_first {
                out.extend(character.to_uppercase());
            } else {
                out.extend(character.to_lowercase());
            }
            is_first = false;
        }
    }
    out
}

fn indented(value: &Value, arguments: Arguments, budget: &Budget) -> Result<String, Error> {
    let [width, first, blank] = arguments.bind("indent", ["width", "first", "blank"])?;
    let indent = match width {
        Some(Value::Str(text)) => text.to_string(),
        width => " ".repeat(limited(integer(width.as_ref(), 4)?.max(0))?),
    };
    let text = string(value.defined()?, "indent")?;
    let with_end = format!("{text}\n");
    let lines = strings::lines(&with_end, false);
    budget.make(text.len() + lines.len() * (indent.len() + 1))?;
    let mut out = if flag(first.as_ref()) { indent.clone() } else { String::new() };
    for (index, line) in lines.iter().enumerate() {
        if index > 0 {
            out.push('\n');
            if flag(blank.as_ref()) || !line.is_empty() {
                out.push_str(&indent);
            }
        }
        out.push_str(line);
    }
    Ok(out)
}

fn truncated(value: &Value, arguments: Arguments) -> Result<Value, Error> {
    let [length, kills_words, end, leeway] = arguments.bind("truncate", ["length", "killwords", "end", "leeway"])?;
    let text = string(value.defined()?, "truncate")?;
    let end = end.unwrap_or_else(|| Value::str("..."));
    let end = string(&end, "truncate")?;
    let (length, leeway) = (integer(length.as_ref(), 255)?, integer(leeway.as_ref(), 5)?);
    let end_length = end.chars().count() as i128;
    if length < end_length || leeway < 0 {
        return Err(Error::new(format!("truncate expects length >= {end_length} and leeway >= 0")));
    }
    if text.chars().count() as i128 <= length + leeway {
        return Ok(value.clone());
    }
    let kept: String = text.chars().take((length - end_length) as usize).collect();
    let kept = if flag(kills_words.as_ref()) { &kept } else { kept.rsplit_once(' ').map_or(&*kept, |(kept, _)| kept) };
    Ok(Value::str(format!("{kept}{end}")))
}

/// Lines of at most `width` characters, broken at blanks; longer words are cut.
fn wrapped(value: &Value, arguments: Arguments, budget: &Budget) -> Result<String, Error> {
    let [width, breaks_words, wrap, _] =
        arguments.bind("wordwrap", ["width", "break_long_words", "wrapstring", "break_on_hyphens"])?;
    let width = limited(integer(width.as_ref(), 79)?.max(1))?;
    let breaks_words = breaks_words.is_none_or(|flag| flag.is_true());
    let wrap = wrap.filter(|wrap| !matches!(wrap, Value::None)).unwrap_or_else(|| Value::str("\n"));
    let wrap = string(&wrap, "wordwrap")?;
    let text = string(value.defined()?, "wordwrap")?;
    budget.make(text.len() * 4 * (wrap.len() + 1))?;
    let wrap_line = |line: &str| -> Vec<String> {
        let (mut lines, mut current, mut length) = (Vec::new(), String::new(), 0);
        let mut rest = line;
        while !rest.is_empty() {
            let is_blank = rest.starts_with(is_space);
            let end = rest.find(|c| is_space(c) != is_blank).unwrap_or(rest.len());
            let (mut chunk, after) = rest.split_at(end);
            rest = after;
            let mut size = chunk.chars().count();
            if is_blank && current.is_empty() && !lines.is_empty() {
                continue;
            }
            if length + size > width {
                if breaks_words && size > width && !is_blank {
                    while size > width - length.min(width) {
                        let room = width - length.min(width);
                        let at = chunk.char_indices().nth(room).map_or(chunk.len(), |(at, _)| at);
                        current.push_str(&chunk[..at]);
                        lines.push(std::mem::take(&mut current).trim_end_matches(is_space).to_string());
                        (chunk, size, length) = (&chunk[at..], size - room, 0);
                    }
                } else {
                    if !current.is_empty() {
                        lines.push(std::mem::take(&mut current).trim_end_matches(is_space).to_string());
                    }
                    length = 0;
                    if is_blank {
                        continue;
                    }
                }
            }
            current.push_str(chunk);
            length += size;
        }
        let last = current.trim_end_matches(is_space);
        lines.extend(Some(last.to_string()).filter(|last| !last.is_empty()));
        lines
    };
    let lines: Vec<String> = strings::lines(text, false).into_iter().map(|line| wrap_line(line).join(wrap)).collect();
    Ok(lines.join(wrap))
}

fn to_json(value: &Value, arguments: Arguments, budget: &Budget) -> Result<String, Error> {
    let names = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let [ensure_ascii, indent, separators, sort_keys] = arguments.bind("tojson", names)?;
    let indent = match indent {
        None | Some(Value::None) => None,
        Some(Value::Str(text)) => Some(text.to_string()),
        Some(width) => Some(" ".repeat(limited(integer(Some(&width), 0)?.max(0))?)),
    };
    let separators = match separators {
        None | Some(Value::None) => None,
        Some(pair) => match pair.items(budget)?.as_slice() {
            [Value::Str(item), Value::Str(key)] => Some((item.to_string(), key.to_string())),
            _ => return Err(Error::new("tojson: separators must be two strings")),
        },
    };
    let default = (if indent.is_some() { "," } else { ", " }.to_string(), ": ".to_string());
    let (item_separator, key_separator) = separators.unwrap_or(default);
    let (ensure_ascii, sort_keys) = (flag(ensure_ascii.as_ref()), flag(sort_keys.as_ref()));
    dumps(value, &Style { ensure_ascii, indent, item_separator, key_separator, sort_keys }, budget)
}

/// `int(value, base)`, and `int(float(value))` where that fails.
fn to_int(value: &Value, base: i128) -> Result<Option<Value>, Error> {
    value.defined()?;
    let truncated = |number: f64| number.is_finite().then_some(Value::Int(number as i128));
    Ok(match value {
        Value::Str(text) => int_of(text, base)?.map(Value::Int).or_else(|| to_float(value).and_then(truncated)),
        Value::Float(number) => truncated(*number),
        _ => value.as_int().map(Value::Int),
    })
}

fn int_of(text: &str, base: i128) -> Result<Option<i128>, Error> {
    let trimmed = text.trim_matches(is_space);
    let (is_negative, digits) = match trimmed.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, trimmed.strip_prefix('+').unwrap_or(trimmed)),
    };
    let lower = digits.to_lowercase();
    let prefixed = [("0x", 16), ("0o", 8), ("0b", 2)].into_iter().find_map(|(prefix, of)| {
        (base == of || base == 0).then(|| lower.strip_prefix(prefix).map(|rest| (rest, of)))?
    });
    let (digits, base) = prefixed.unwrap_or((&lower, if base == 0 { 10 } else { base }));
    let radix = u32::try_from(base).ok().filter(|radix| (2..=36).contains(radix));
    let Some(radix) = radix else { return Ok(None) };
    let is_well_formed = !digits.is_empty()
        && !digits.starts_with('_')
        && !digits.ends_with('_')
        && !digits.contains("__")
        && !digits.starts_with(['+', '-']);
    if !is_well_formed {
        return Ok(None);
    }
    let digits: String = digits.chars().filter(|c| *c != '_').map(|c| c.to_digit(36).map_or(c, |_| c)).collect();
    match i128::from_str_radix(&digits, radix) {
        Ok(number) => Ok(Some(if is_negative { -number } else { number })),
        Err(error) if matches!(error.kind(), std::num::IntErrorKind::PosOverflow) => {
            Err(Error::new("makes a number of more than 128 bits"))
        }
        Err(_) => Ok(None),
    }
}

fn to_float(value: &Value) -> Option<f64> {
    let Value::Str(text) = value else { return value.as_float() };
    let trimmed = text.trim_matches(is_space);
    let between_digits = |at: usize| {
        let is_digit = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_digit);
        at > 0 && is_digit(trimmed.as_bytes().get(at - 1)) && is_digit(trimmed.as_bytes().get(at + 1))
    };
    if trimmed.match_indices('_').any(|(at, _)| !between_digits(at)) {
        return None;
    }
    trimmed.replace('_', "").parse().ok()
}

fn rounded(value: &Value, arguments: Arguments) -> Result<Value, Error> {
    let [precision, method] = arguments.bind("round", ["precision", "method"])?;
    let precision = integer(precision.as_ref(), 0)?.clamp(-400, 400) as i32;
    let method = method.unwrap_or_else(|| Value::str("common"));
    let number = value
        .defined()?
        .as_float()
        .ok_or_else(|| Error::new(format!("type {} doesn't define __round__ method", value.type_name())))?;
    match string(&method, "round")? {
        "common" => {
            if let Some(whole) = value.as_int() {
                return Ok(Value::Int(round_whole(whole, precision)));
            }
            if precision >= 0 {
                let text = format!("{number:.*}", precision as usize);
                return Ok(Value::Float(text.parse().unwrap_or(number)));
            }
            // Python writes the digits to the left of the point exactly, and rounds those.
            let scale = 10f64.powi(-precision);
            Ok(Value::Float((number / scale).round_ties_even() * scale))
        }
        name @ ("ceil" | "floor") => {
            let scale = 10f64.powi(precision);
            let scaled = number * scale;
            Ok(Value::Float(if name == "ceil" { scaled.ceil() } else { scaled.floor() } / scale))
        }
        _ => Err(Error::new("method must be common, ceil or floor")),
    }
}

/// Half goes to the even neighbour.
fn round_whole(number: i128, precision: i32) -> i128 {
    let Some(unit) = u32::try_from(-precision).ok().map(|exponent| 10i128.checked_pow(exponent)) else { return number };
    let Some(unit) = unit else { return 0 };
    let (below, rest) = (number.div_euclid(unit), number.rem_euclid(unit));
    let is_up = match (rest * 2).cmp(&unit) {
        Ordering::Less => false,
        Ordering::Greater => true,
        Ordering::Equal => below % 2 != 0,
    };
    (below + i128::from(is_up)) * unit
}

fn file_size(value: &Value, arguments: Arguments) -> Result<String, Error> {
    let [binary] = arguments.bind("filesizeformat", ["binary"])?;
    let bytes = to_float(value).ok_or_else(|| Error::new("filesizeformat needs a number"))?;
    let is_binary = flag(binary.as_ref());
    let base: f64 = if is_binary { 1024.0 } else { 1000.0 };
    if bytes == 1.0 {
        return Ok("1 Byte".into());
    }
    if bytes < base {
        return Ok(format!("{} Bytes", bytes as i128));
    }
    let prefixes = ["k", "M", "G", "T", "P", "E", "Z", "Y"];
    let mut unit = base;
    let mut name = "";
    for prefix in prefixes {
        name = prefix;
        unit *= base;
        if bytes < unit {
            break;
        }
    }
    let name = if is_binary { format!("{}iB", name.to_uppercase()) } else { format!("{name}B") };
    Ok(format!("{:.1} {name}", base * bytes / unit))
}

fn url_encoded(value: &Value, budget: &Budget) -> Result<String, Error> {
    let quote = |text: &str, is_query: bool| -> String {
        let mut out = String::new();
        for byte in text.bytes() {
            match byte {
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' => out.push(byte.into()),
                b'/' if !is_query => out.push('/'),
                b' ' if is_query => out.push('+'),
                _ => write_to(&mut out, format_args!("%{byte:02X}")),
            }
        }
        out
    };
    let pairs = match value {
        Value::Str(text) => {
            budget.make(text.len() * 3)?;
            return Ok(quote(text, false));
        }
        Value::Dict(dict) => dict.entries().to_vec(),
        _ if value.is_iterable() => {
            let mut pairs = Vec::new();
            for item in value.items(budget)? {
                match item.items(budget)?.as_slice() {
                    [key, value] => pairs.push((key.clone(), value.clone())),
                    _ => return Err(Error::new("urlencode needs pairs")),
                }
            }
            pairs
        }
        other => return Ok(quote(&display(other, budget)?, false)),
    };
    let mut out = Vec::new();
    for (key, value) in pairs {
        let (key, value) = (display(&key, budget)?, display(&value, budget)?);
        budget.make((key.len() + value.len()) * 3)?;
        out.push(format!("{}={}", quote(&key, true), quote(&value, true)));
    }
    Ok(out.join("&"))
}
