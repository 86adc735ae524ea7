//! Python's operators on values.

use std::sync::Arc;

use super::Error;
use super::ast::{Comparison, Operator};
use super::budget::Budget;
use super::percent;
use super::value::Value;

/// `left OPERATOR right`.
pub(super) fn binary(operator: Operator, left: &Value, right: &Value, budget: &Budget) -> Result<Value, Error> {
    left.defined()?;
    // A format prints an undefined value as nothing; every other operator refuses it.
    if !matches!((operator, left), (Operator::Modulo, Value::Str(_))) {
        right.defined()?;
    }
    match (operator, left, right) {
        (Operator::Add, Value::Str(a), Value::Str(b)) => {
            budget.make(a.len() + b.len())?;
            Ok(Value::Str(Arc::from([&**a, &**b].concat())))
        }
        (Operator::Add, Value::List(a), Value::List(b)) => Value::list(joined(a.items(), b.items(), budget)?),
        (Operator::Add, Value::Tuple(a), Value::Tuple(b)) => Value::tuple(joined(a.items(), b.items(), budget)?),
        (Operator::Multiply, Value::Str(text), count) | (Operator::Multiply, count, Value::Str(text))
            if count.as_int().is_some() =>
        {
            let count = repetitions(count, text.len(), budget)?;
            Ok(Value::str(text.repeat(count)))
        }
        (Operator::Multiply, Value::List(items), count) | (Operator::Multiply, count, Value::List(items))
            if count.as_int().is_some() =>
        {
            let count = repetitions(count, size_of_val(items.items()), budget)?;
            Value::list(repeated(items.items(), count))
        }
        (Operator::Multiply, Value::Tuple(items), count) | (Operator::Multiply, count, Value::Tuple(items))
            if count.as_int().is_some() =>
        {
            let count = repetitions(count, size_of_val(items.items()), budget)?;
            Value::tuple(repeated(items.items(), count))
        }
        (Operator::Modulo, Value::Str(format), _) => Ok(Value::str(percent::format(format, right, budget)?)),
        _ => match (left.as_int(), right.as_int(), left.as_float(), right.as_float()) {
            (Some(a), Some(b), ..) => integers(operator, a, b),
            (_, _, Some(a), Some(b)) => floats(operator, a, b),
            _ => Err(unsupported(operator, left, right)),
        },
    }
}

fn joined(left: &[Value], right: &[Value], budget: &Budget) -> Result<Vec<Value>, Error> {
    budget.make(size_of_val(left) + size_of_val(right))?;
    Ok([left, right].concat())
}

fn repeated(items: &[Value], count: usize) -> Vec<Value> {
    (0..count).flat_map(|_| items.iter().cloned()).collect()
}

/// How often something of `bytes` is repeated, paid for.
fn repetitions(count: &Value, bytes: usize, budget: &Budget) -> Result<usize, Error> {
    if bytes == 0 {
        return Ok(0);
    }
    let count = usize::try_from(count.as_int().unwrap_or(0).max(0)).unwrap_or(usize::MAX);
    budget.make(count.saturating_mul(bytes))?;
    Ok(count)
}

fn symbol(operator: Operator) -> &'static str {
    match operator {
        Operator::Add => "+",
        Operator::Subtract => "-",
        Operator::Multiply => "*",
        Operator::Divide => "/",
        Operator::FloorDivide => "//",
        Operator::Modulo => "%",
        Operator::Power => "** or pow()",
    }
}

fn unsupported(operator: Operator, left: &Value, right: &Value) -> Error {
    let (a, b) = (left.type_name(), right.type_name());
    Error::new(match (operator, left) {
        (Operator::Add, Value::Str(_)) => format!("can only concatenate str (not \"{b}\") to str"),
        (Operator::Add, Value::List(_)) => format!("can only concatenate list (not \"{b}\") to list"),
        (Operator::Add, Value::Tuple(_)) => format!("can only concatenate tuple (not \"{b}\") to tuple"),
        _ => format!("unsupported operand type(s) for {}: '{a}' and '{b}'", symbol(operator)),
    })
}

fn integers(operator: Operator, a: i128, b: i128) -> Result<Value, Error> {
    let too_large = || Error::new("makes a number of more than 128 bits");
    let by_zero = || Error::new("divides by zero");
    let whole = |value: Option<i128>| value.map(Value::Int).ok_or_else(too_large);
    match operator {
        Operator::Add => whole(a.checked_add(b)),
        Operator::Subtract => whole(a.checked_sub(b)),
        Operator::Multiply => whole(a.checked_mul(b)),
        Operator::Divide if b == 0 => Err(by_zero()),
        Operator::Divide => Ok(Value::Float(a as f64 / b as f64)),
        Operator::FloorDivide | Operator::Modulo => {
            let quotient = a.checked_div(b).ok_or_else(by_zero)?;
            let rest = a.checked_rem(b).ok_or_else(by_zero)?;
            let is_below = rest != 0 && (rest < 0) != (b < 0);
            if operator == Operator::FloorDivide {
                Ok(Value::Int(quotient - i128::from(is_below)))
            } else {
                Ok(Value::Int(if is_below { rest + b } else { rest }))
            }
        }
        Operator::Power if b < 0 => floats(operator, a as f64, b as f64),
        Operator::Power => match (a, u32::try_from(b)) {
            (0 | 1, _) => Ok(Value::Int(if b == 0 { 1 } else { a })),
            (-1, _) => Ok(Value::Int(if b % 2 == 0 { 1 } else { -1 })),
            (_, Ok(exponent)) => whole(a.checked_pow(exponent)),
            _ => Err(too_large()),
        },
    }
}

fn floats(operator: Operator, a: f64, b: f64) -> Result<Value, Error> {
    let is_division = matches!(operator, Operator::Divide | Operator::FloorDivide | Operator::Modulo);
    if is_division && b == 0.0 {
        return Err(Error::new("divides by zero"));
    }
    // Python's `float_divmod`: the rest has the divisor's sign.
    let divided = || {
        let rest = a % b;
        let quotient = (a - rest) / b;
        let (rest, quotient) = if rest != 0.0 && (rest < 0.0) != (b < 0.0) {
            (rest + b, quotient - 1.0)
        } else {
            (if rest == 0.0 { 0.0_f64.copysign(b) } else { rest }, quotient)
        };
        let floor = quotient.floor();
        let floor = if quotient == 0.0 {
            0.0_f64.copysign(a / b)
        } else if quotient - floor > 0.5 {
            floor + 1.0
        } else {
            floor
        };
        (floor, rest)
    };
    Ok(Value::Float(match operator {
        Operator::Add => a + b,
        Operator::Subtract => a - b,
        Operator::Multiply => a * b,
        Operator::Divide => a / b,
        Operator::FloorDivide => divided().0,
        Operator::Modulo => divided().1,
        Operator::Power => {
            if a == 0.0 && b < 0.0 {
                return Err(Error::new("0.0 cannot be raised to a negative power"));
            }
            if a < 0.0 && b.fract() != 0.0 && b.is_finite() {
                return Err(Error::new("a power of a negative number with a fraction is a complex number"));
            }
            let power = a.powf(b);
            if power.is_infinite() && a.is_finite() && b.is_finite() {
                return Err(Error::new("a power is too large for a float"));
            }
            power
        }
    }))
}

/// `-value`.
pub(super) fn negative(value: &Value) -> Result<Value, Error> {
    match (value.defined()?, value.as_int()) {
        (Value::Float(number), _) => Ok(Value::Float(-number)),
        (_, Some(number)) => integers(Operator::Subtract, 0, number),
        _ => Err(Error::new(format!("bad operand type for unary -: '{}'", value.type_name()))),
    }
}

/// `+value`.
pub(super) fn positive(value: &Value) -> Result<Value, Error> {
    match (value.defined()?, value.as_int()) {
        (Value::Float(number), _) => Ok(Value::Float(*number)),
        (_, Some(number)) => Ok(Value::Int(number)),
        _ => Err(Error::new(format!("bad operand type for unary +: '{}'", value.type_name()))),
    }
}

/// `left COMPARISON right`.
pub(super) fn compares(comparison: Comparison, left: &Value, right: &Value, budget: &Budget) -> Result<bool, Error> {
    let ordered = |symbol: &str, is_right: fn(std::cmp::Ordering) -> bool| {
        Ok(left.compare(right, symbol, budget)?.is_some_and(is_right))
    };
    match comparison {
        Comparison::Equal => left.equals(right, budget),
        Comparison::NotEqual => Ok(!left.equals(right, budget)?),
        Comparison::Less => ordered("<", std::cmp::Ordering::is_lt),
        Comparison::LessOrEqual => ordered("<=", std::cmp::Ordering::is_le),
        Comparison::Greater => ordered(">", std::cmp::Ordering::is_gt),
        Comparison::GreaterOrEqual => ordered(">=", std::cmp::Ordering::is_ge),
        Comparison::In => contains(right, left, budget),
        Comparison::NotIn => Ok(!contains(right, left, budget)?),
    }
}

/// `item in holder`.
pub(super) fn contains(holder: &Value, item: &Value, budget: &Budget) -> Result<bool, Error> {
    match holder {
        Value::Str(text) => match item {
            Value::Str(part) => {
                budget.look(text.len() + part.len())?;
                Ok(text.contains(&**part))
            }
            _ => Err(Error::new(format!("'in <string>' requires string as left operand, not {}", item.type_name()))),
        },
        Value::Dict(dict) | Value::View(super::value::View::Keys, dict) => {
            if matches!(item, Value::List(_) | Value::Dict(_)) {
                return Err(Error::new(format!("unhashable type: '{}'", item.type_name())));
            }
            Ok(dict.get(item, budget)?.is_some())
        }
        Value::Iterator(iterator) => {
            while let Some(one) = iterator.next() {
                if one.equals(item, budget)? {
                    return Ok(true);
                }
            }
            Ok(false)
        }
        _ if holder.is_iterable() => {
            for one in holder.items(budget)? {
                if one.equals(item, budget)? {
                    return Ok(true);
                }
            }
            Ok(false)
        }
        _ => Err(Error::new(format!("argument of type '{}' is not iterable", holder.type_name()))),
    }
}
