//! `'%s' % value` of Python, and the number formats that it shares with `str.format`.

use super::Error;
use super::budget::Budget;
use super::text::{ascii_repr, display, repr};
use super::value::Value;

/// Widest field and longest precision.
const MOST_WIDTH: usize = 1 << 20;

/// `format % values`.
pub(super) fn format(format: &str, values: &Value, budget: &Budget) -> Result<String, Error> {
    let positional: Vec<Value> = match values {
        Value::Tuple(items) => items.items().to_vec(),
        other => vec![other.clone()],
    };
    let mut next = positional.iter();
    let mut out = String::new();
    let mut has_names = false;
    let mut rest = format.chars().peekable();
    let incomplete = || Error::new("incomplete format");
    while let Some(character) = rest.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        let mut named = None;
        if rest.next_if_eq(&'(').is_some() {
            let (mut name, mut depth) = (String::new(), 1);
            for character in rest.by_ref() {
                depth += match character {
                    '(' => 1,
                    ')' => -1,
                    _ => 0,
                };
                if depth == 0 {
                    break;
                }
                name.push(character);
            }
            let Value::Dict(dict) = values else { return Err(Error::new("format requires a mapping")) };
            let value = dict.get_str(&name).ok_or_else(|| Error::new(format!("format has no value for `{name}`")))?;
            named = Some(value.clone());
            has_names = true;
        }
        let mut flags = Flags::default();
        while let Some(flag) = rest.next_if(|c| "-+ 0#".contains(*c)) {
            match flag {
                '-' => flags.is_left = true,
                '+' => flags.sign = Some('+'),
                ' ' => flags.sign = flags.sign.or(Some(' ')),
                '0' => flags.is_zero = true,
                _ => flags.is_alternate = true,
            }
        }
        let missing = || Error::new("not enough arguments for format string");
        let mut number = |rest: &mut std::iter::Peekable<std::str::Chars<'_>>| -> Result<Option<i128>, Error> {
            if rest.next_if_eq(&'*').is_some() {
                let value = next.next().ok_or_else(missing)?;
                return value.as_int().map(Some).ok_or_else(|| Error::new("* wants int"));
            }
            let mut digits = String::new();
            while let Some(digit) = rest.next_if(char::is_ascii_digit) {
                digits.push(digit);
            }
            if digits.is_empty() {
                return Ok(None);
            }
            digits.parse().map(Some).map_err(|_| Error::new("has a field that is too wide"))
        };
        let width = number(&mut rest)?;
        let precision = if rest.next_if_eq(&'.').is_some() { Some(number(&mut rest)?.unwrap_or(0)) } else { None };
        flags.is_left |= width.is_some_and(|width| width < 0);
        let width = limited(width.unwrap_or(0).abs())?;
        let precision = precision.map(|precision| limited(precision.max(0))).transpose()?;
        while rest.next_if(|c| "hlL".contains(*c)).is_some() {}
        let conversion = rest.next().ok_or_else(incomplete)?;
        if conversion == '%' {
            out.push('%');
            continue;
        }
        let value = match named {
            Some(value) => value,
            None => next.next().cloned().ok_or_else(missing)?,
        };
        let field = converted(conversion, &value, &flags, precision, width, budget)?;
        budget.make(field.len())?;
        out.push_str(&field);
    }
    // What can be asked for items by key may be left over.
    let is_mapping = matches!(values, Value::Dict(_) | Value::List(_) | Value::Range(_) | Value::Undefined(_));
    if !has_names && next.next().is_some() && !is_mapping {
        return Err(Error::new("not all arguments converted during string formatting"));
    }
    budget.make(out.len())?;
    Ok(out)
}

/// A width or a precision that is not absurd.
pub(super) fn limited(width: i128) -> Result<usize, Error> {
    usize::try_from(width)
        .ok()
        .filter(|&width| width <= MOST_WIDTH)
        .ok_or_else(|| Error::new(format!("has a field {width} wide; the limit is {MOST_WIDTH}")))
}

#[derive(Default)]
struct Flags {
    is_left: bool,
    is_zero: bool,
    is_alternate: bool,
    sign: Option<char>,
}

fn converted(
    conversion: char,
    value: &Value,
    flags: &Flags,
    precision: Option<usize>,
    width: usize,
    budget: &Budget,
) -> Result<String, Error> {
    budget.make(width + precision.unwrap_or(0))?;
    let text = match conversion {
        's' => Some(display(value, budget)?),
        'r' => Some(repr(value, budget)?),
        'a' => Some(match value {
            Value::Str(text) => ascii_repr(text),
            other => repr(other, budget)?,
        }),
        'c' => Some(match value {
            Value::Str(text) if text.chars().count() == 1 => text.to_string(),
            Value::Int(code) => u32::try_from(*code)
                .ok()
                .and_then(char::from_u32)
                .ok_or_else(|| Error::new("%c arg not in range(0x110000)"))?
                .to_string(),
            _ => return Err(Error::new("%c requires int or char")),
        }),
        _ => None,
    };
    if let Some(text) = text {
        let text: String = text.chars().take(precision.unwrap_or(usize::MAX)).collect();
        return Ok(pad(&text, ' ', if flags.is_left { '<' } else { '>' }, width));
    }
    let needs = |what: &str| Error::new(format!("%{conversion} format: {what} is required, not {}", value.type_name()));
    value.defined()?;
    let (is_negative, prefix, digits) = match conversion {
        'd' | 'i' | 'u' => {
            let number = match value {
                Value::Float(number) if number.is_finite() => *number as i128,
                _ => value.as_int().ok_or_else(|| needs("a real number"))?,
            };
            (number < 0, "", zero_extended(&number.unsigned_abs().to_string(), precision))
        }
        'o' | 'x' | 'X' => {
            let number = value.as_int().ok_or_else(|| needs("an integer"))?;
            let size = number.unsigned_abs();
            let (prefix, digits) = match conversion {
                'o' => ("0o", format!("{size:o}")),
                'x' => ("0x", format!("{size:x}")),
                _ => ("0X", format!("{size:X}")),
            };
            (number < 0, if flags.is_alternate { prefix } else { "" }, zero_extended(&digits, precision))
        }
        'e' | 'E' | 'f' | 'F' | 'g' | 'G' => {
            let number = value.as_float().ok_or_else(|| needs("a real number"))?;
            let digits = float_digits(number.abs(), conversion, precision.unwrap_or(6), flags.is_alternate);
            (number.is_sign_negative() && !number.is_nan(), "", digits)
        }
        other => return Err(Error::new(format!("unsupported format character '{other}'"))),
    };
    let sign = if is_negative { "-".to_string() } else { flags.sign.map(String::from).unwrap_or_default() };
    let head = format!("{sign}{prefix}");
    if flags.is_zero && !flags.is_left {
        let zeros = width.saturating_sub(head.len() + digits.len());
        return Ok(format!("{head}{}{digits}", "0".repeat(zeros)));
    }
    Ok(pad(&format!("{head}{digits}"), ' ', if flags.is_left { '<' } else { '>' }, width))
}

fn zero_extended(digits: &str, precision: Option<usize>) -> String {
    format!("{}{digits}", "0".repeat(precision.unwrap_or(0).saturating_sub(digits.len())))
}

/// Puts `fill` around a text up to `width` characters. `align` is `<`, `>` or `^`.
pub(super) fn pad(text: &str, fill: char, align: char, width: usize) -> String {
    let missing = width.saturating_sub(text.chars().count());
    let before = match align {
        '<' => 0,
        '^' => missing / 2,
        _ => missing,
    };
    let fills = |count: usize| std::iter::repeat_n(fill, count);
    fills(before).chain(text.chars()).chain(fills(missing - before)).collect()
}

/// The digits of a float that is not negative, in the formats `e`, `f` and `g`, or in capitals.
pub(super) fn float_digits(number: f64, format: char, precision: usize, is_alternate: bool) -> String {
    let is_upper = format.is_ascii_uppercase();
    let cased = |text: String| if is_upper { text.to_uppercase() } else { text };
    if !number.is_finite() {
        return cased(if number.is_nan() { "nan".into() } else { "inf".into() });
    }
    let with_exponent =
        |digits: &str, exponent: i32| format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs());
    let split = |precision: usize| {
        let text = format!("{number:.precision$e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        (digits.to_string(), exponent.parse::<i32>().unwrap_or(0))
    };
    let dotted = |digits: String| if is_alternate && !digits.contains('.') { format!("{digits}.") } else { digits };
    cased(match format.to_ascii_lowercase() {
        'f' => dotted(format!("{number:.precision$}")),
        'e' => {
            let (digits, exponent) = split(precision);
            with_exponent(&dotted(digits), exponent)
        }
        _ => {
            let precision = precision.max(1);
            let (digits, exponent) = split(precision - 1);
            let is_plain = exponent >= -4 && i64::from(exponent) < precision as i64;
            let text = if is_plain {
                format!("{number:.*}", (precision as i64 - 1 - i64::from(exponent)) as usize)
            } else {
                digits
            };
            let text = match (is_alternate, text.contains('.')) {
                (false, true) => text.trim_end_matches('0').trim_end_matches('.').to_string(),
                _ => dotted(text),
            };
            if is_plain { text } else { with_exponent(&text, exponent) }
        }
    })
}
