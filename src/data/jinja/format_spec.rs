//! `str.format` of Python: replacement fields and the mini-language of format specifications.

use super::Error;
use super::attributes::{get_attribute, get_item};
use super::budget::Budget;
use super::percent::{float_digits, limited, pad};
use super::text::{ascii_repr, display, float_text, repr};
use super::value::Value;

/// What the fields of a format draw on.
pub(super) struct Fields<'a> {
    pub(super) positional: &'a [Value],
    pub(super) named: &'a dyn Fn(&str) -> Option<Value>,
    pub(super) budget: &'a Budget,
}

/// `text.format(...)`.
pub(super) fn format(text: &str, fields: &Fields<'_>) -> Result<String, Error> {
    let mut next = Some(0);
    expand(text, fields, &mut next, 2)
}

fn expand(text: &str, fields: &Fields<'_>, next: &mut Option<usize>, depth: u32) -> Result<String, Error> {
    let Some(depth) = depth.checked_sub(1) else { return Err(Error::new("Max string recursion exceeded")) };
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(['{', '}']) {
        out.push_str(&rest[..at]);
        let brace = &rest[at..=at];
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix(brace) {
            out.push_str(brace);
            rest = after;
            continue;
        }
        if brace == "}" {
            return Err(Error::new("Single '}' encountered in format string"));
        }
        let end = field_end(rest).ok_or_else(|| Error::new("expected '}' before end of string"))?;
        let field = replaced(&rest[..end], fields, next, depth)?;
        fields.budget.make(field.len())?;
        out.push_str(&field);
        rest = &rest[end + 1..];
    }
    out.push_str(rest);
    fields.budget.make(out.len())?;
    Ok(out)
}

fn field_end(text: &str) -> Option<usize> {
    let (mut depth, mut in_brackets) = (0, false);
    text.char_indices().find_map(|(at, character)| {
        match character {
            '[' => in_brackets = true,
            ']' => in_brackets = false,
            '{' if !in_brackets => depth += 1,
            '}' if !in_brackets && depth == 0 => return Some(at),
            '}' if !in_brackets => depth -= 1,
            _ => {}
        }
        None
    })
}

fn replaced(field: &str, fields: &Fields<'_>, next: &mut Option<usize>, depth: u32) -> Result<String, Error> {
    let in_brackets = |at: usize| field[..at].rfind('[') > field[..at].rfind(']');
    let name_end = field.char_indices().find(|&(at, c)| (c == '!' || c == ':') && !in_brackets(at));
    let (name, rest) = field.split_at(name_end.map_or(field.len(), |(at, _)| at));
    let (conversion, spec) = match rest.strip_prefix('!') {
        Some(rest) => {
            let conversion = rest.chars().next();
            let rest = conversion.map_or(rest, |c| &rest[c.len_utf8()..]);
            (conversion, rest.strip_prefix(':').unwrap_or(rest))
        }
        None => (None, rest.strip_prefix(':').unwrap_or(rest)),
    };
    let value = field_value(name, fields, next)?;
    let value = match conversion {
        None => value,
        Some('s') => Value::str(display(&value, fields.budget)?),
        Some('r') => Value::str(repr(&value, fields.budget)?),
        Some('a') => Value::str(match &value {
            Value::Str(text) => ascii_repr(text),
            other => repr(other, fields.budget)?,
        }),
        Some(other) => return Err(Error::new(format!("Unknown conversion specifier {other}"))),
    };
    let spec = if spec.contains(['{', '}']) { expand(spec, fields, next, depth)? } else { spec.to_string() };
    formatted(&value, &spec, fields.budget)
}

fn field_value(name: &str, fields: &Fields<'_>, next: &mut Option<usize>) -> Result<Value, Error> {
    let first_end = name.find(['.', '[']).unwrap_or(name.len());
    let (first, mut rest) = name.split_at(first_end);
    let by_position = |index: usize| {
        fields
            .positional
            .get(index)
            .cloned()
            .ok_or_else(|| Error::new(format!("Replacement index {index} out of range for positional args tuple")))
    };
    let mut value = if first.is_empty() {
        let index = next
            .ok_or_else(|| Error::new("cannot switch from manual field specification to automatic field numbering"))?;
        *next = Some(index + 1);
        by_position(index)?
    } else if let Ok(index) = first.parse() {
        if next.is_some_and(|next| next > 0) {
            return Err(Error::new("cannot switch from automatic field numbering to manual field specification"));
        }
        *next = None;
        by_position(index)?
    } else {
        (fields.named)(first).ok_or_else(|| Error::new(format!("format has no value for `{first}`")))?
    };
    while !rest.is_empty() {
        if let Some(after) = rest.strip_prefix('.') {
            let end = after.find(['.', '[']).unwrap_or(after.len());
            value = get_attribute(&value, &after[..end], fields.budget)?;
            rest = &after[end..];
        } else if let Some((index, after)) = rest.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            let key = index.parse().map_or_else(|_| Value::str(index), Value::Int);
            value = get_item(&value, &key, fields.budget)?;
            rest = after;
        } else {
            return Err(Error::new("Missing ']' in format string"));
        }
    }
    Ok(value)
}

#[derive(Default)]
struct Spec {
    fill: Option<char>,
    align: Option<char>,
    sign: Option<char>,
    is_alternate: bool,
    is_zero: bool,
    width: usize,
    grouping: Option<char>,
    precision: Option<usize>,
    kind: Option<char>,
}

fn parsed(spec: &str) -> Result<Spec, Error> {
    let mut found = Spec::default();
    let characters: Vec<char> = spec.chars().collect();
    let mut at = 0;
    let is_align = |c: Option<&char>| c.is_some_and(|c| "<>=^".contains(*c));
    if is_align(characters.get(1)) {
        (found.fill, found.align, at) = (characters.first().copied(), characters.get(1).copied(), 2);
    } else if is_align(characters.first()) {
        (found.align, at) = (characters.first().copied(), 1);
    }
    let mut take = |wanted: &str| {
        let one = characters.get(at).copied().filter(|c| wanted.contains(*c));
        at += usize::from(one.is_some());
        one
    };
    found.sign = take("+- ");
    take("z");
    found.is_alternate = take("#").is_some();
    found.is_zero = take("0").is_some();
    let number = |take: &mut dyn FnMut(&str) -> Option<char>| {
        let digits: String = std::iter::from_fn(|| take("0123456789")).collect();
        (!digits.is_empty()).then(|| limited(digits.parse().unwrap_or(i128::MAX))).transpose()
    };
    found.width = number(&mut take)?.unwrap_or(0);
    found.grouping = take(",_");
    if take(".").is_some() {
        let precision = number(&mut take)?;
        found.precision = Some(precision.ok_or_else(|| Error::new("Format specifier missing precision"))?);
    }
    found.kind = characters.get(at).copied();
    if characters.len() > at + 1 {
        return Err(Error::new(format!("Invalid format specifier '{spec}'")));
    }
    Ok(found)
}

/// `format(value, spec)`.
pub(super) fn formatted(value: &Value, spec: &str, budget: &Budget) -> Result<String, Error> {
    if spec.is_empty() {
        return display(value, budget);
    }
    let found = parsed(spec)?;
    budget.make(found.width + found.precision.unwrap_or(0))?;
    let unknown =
        |kind: char| Error::new(format!("Unknown format code '{kind}' for object of type '{}'", value.type_name()));
    let (is_negative, prefix, digits) = match value {
        Value::Str(text) => {
            if let Some(kind) = found.kind.filter(|kind| *kind != 's') {
                return Err(unknown(kind));
            }
            let text: String = text.chars().take(found.precision.unwrap_or(usize::MAX)).collect();
            let align = found.align.unwrap_or('<');
            return Ok(pad(&text, found.fill.unwrap_or(if found.is_zero { '0' } else { ' ' }), align, found.width));
        }
        Value::Int(_) | Value::Bool(_) => match found.kind {
            Some('e' | 'E' | 'f' | 'F' | 'g' | 'G' | '%') => float_parts(value.as_float().unwrap_or(0.0), &found),
            Some('c') => {
                let character = value.as_int().and_then(|code| char::from_u32(u32::try_from(code).ok()?));
                let text = character.ok_or_else(|| Error::new("%c arg not in range(0x110000)"))?.to_string();
                return Ok(pad(&text, found.fill.unwrap_or(' '), found.align.unwrap_or('<'), found.width));
            }
            kind => {
                if found.precision.is_some() {
                    return Err(Error::new("Precision not allowed in integer format specifier"));
                }
                let number = value.as_int().unwrap_or(0);
                let size = number.unsigned_abs();
                let (prefix, digits) = match kind {
                    None | Some('d' | 'n') => ("", size.to_string()),
                    Some('b') => ("0b", format!("{size:b}")),
                    Some('o') => ("0o", format!("{size:o}")),
                    Some('x') => ("0x", format!("{size:x}")),
                    Some('X') => ("0X", format!("{size:X}")),
                    Some(other) => return Err(unknown(other)),
                };
                (number < 0, if found.is_alternate { prefix } else { "" }, digits)
            }
        },
        Value::Float(number) => match found.kind {
            None | Some('e' | 'E' | 'f' | 'F' | 'g' | 'G' | 'n' | '%') => float_parts(*number, &found),
            Some(other) => return Err(unknown(other)),
        },
        other => {
            return Err(Error::new(format!("unsupported format string passed to {}.__format__", other.type_name())));
        }
    };
    let sign = match (is_negative, found.sign) {
        (true, _) => "-",
        (false, Some('+')) => "+",
        (false, Some(' ')) => " ",
        _ => "",
    };
    let fill = found.fill.unwrap_or(if found.is_zero { '0' } else { ' ' });
    let align = found.align.unwrap_or(if found.is_zero { '=' } else { '>' });
    let every = if matches!(found.kind, Some('b' | 'o' | 'x' | 'X')) { 4 } else { 3 };
    let head = format!("{sign}{prefix}");
    let room = if align == '=' { found.width.saturating_sub(head.len()) } else { 0 };
    let digits = match found.grouping {
        Some(separator) => grouped(&digits, separator, every, if fill == '0' { room } else { 0 }),
        None => digits,
    };
    if align == '=' {
        return Ok(format!("{head}{}", pad(&digits, fill, '>', room)));
    }
    Ok(pad(&format!("{head}{digits}"), fill, align, found.width))
}

fn float_parts(number: f64, spec: &Spec) -> (bool, &'static str, String) {
    let size = number.abs();
    let is_negative = number.is_sign_negative() && !number.is_nan();
    let digits = match (spec.kind, spec.precision) {
        (Some('%'), precision) => {
            format!("{}%", float_digits(size * 100.0, 'f', precision.unwrap_or(6), spec.is_alternate))
        }
        (None, None) => float_text(size),
        (None, Some(precision)) => {
            // As `g`, but with a digit behind the point at least, and the exponent from one digit earlier.
            let exponent = format!("{size:.*e}", precision.max(1) - 1);
            let exponent: i64 = exponent.split_once('e').and_then(|(_, e)| e.parse().ok()).unwrap_or(0);
            let text = float_digits(size, 'g', precision, spec.is_alternate);
            if !size.is_finite() || text.contains(['.', 'e']) {
                text
            } else if exponent + 1 >= precision.max(1) as i64 {
                float_digits(size, 'e', precision.max(1) - 1, spec.is_alternate)
            } else {
                format!("{text}.0")
            }
        }
        (Some('n'), precision) => float_digits(size, 'g', precision.unwrap_or(6), spec.is_alternate),
        (Some(kind), precision) => float_digits(size, kind, precision.unwrap_or(6), spec.is_alternate),
    };
    (is_negative, "", digits)
}

/// Separators between groups of digits of the whole part, with zeros in front up to `width`.
fn grouped(digits: &str, separator: char, every: usize, width: usize) -> String {
    let end = digits.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(digits.len());
    let end = digits.find('e').filter(|_| every == 3).map_or(end, |e| e.min(end));
    let (whole, rest) = digits.split_at(end);
    let mut out: Vec<char> = Vec::new();
    let mut count = 0;
    let mut whole = whole.chars().rev().peekable();
    while whole.peek().is_some() || out.len() + rest.len() < width {
        if count > 0 && count % every == 0 {
            out.push(separator);
        }
        out.push(whole.next().unwrap_or('0'));
        count += 1;
    }
    out.into_iter().rev().chain(rest.chars()).collect()
}
