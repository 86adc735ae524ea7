//! Numbers as they are written.

use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::{One, Zero};

use super::{Failure, Parsed};
use crate::reward::math::evaluate::MOST_BITS;
use crate::reward::math::expression::{Expression, Number};

/// A whole number.
pub(super) fn whole(value: i64) -> Number {
    Number { value: BigRational::from_integer(value.into()), is_decimal: false, last_place: 0, significant: 1 }
}

/// A mixed number: `3 1/2`.
pub(super) fn mixed(whole: Expression, above: Number, below: Number) -> Parsed {
    if below.value.is_zero() || !above.value.is_integer() || !below.value.is_integer() {
        return Err(Failure::NotMathematics);
    }
    let fraction = Expression::Quotient(Box::new(Expression::Number(above)), Box::new(Expression::Number(below)));
    Ok(Expression::Sum(vec![whole, fraction]))
}

/// Reads `12`, `1.5`, `.5`, `1.5e-3`.
pub(super) fn number(text: &str) -> Parsed {
    let (mantissa, exponent) = text.split_once('e').unwrap_or((text, "0"));
    let (before, after) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let exponent: i64 = exponent.parse().map_err(|_| Failure::TooLarge)?;
    let digits = format!("{before}{after}");
    let shift = exponent - after.len() as i64;
    let most_digits = MOST_BITS / 4; // a decimal digit has 3.3 bits
    if digits.len() as u64 > most_digits || shift.unsigned_abs() > most_digits {
        return Err(Failure::TooLarge);
    }
    let integer = BigInt::parse_bytes(digits.as_bytes(), 10).ok_or(Failure::NotMathematics)?;
    let power = BigInt::from(10).pow(shift.unsigned_abs() as u32);
    let value = if shift >= 0 {
        BigRational::from_integer(integer * power)
    } else if after.is_empty() && power.is_one() {
        BigRational::from_integer(integer)
    } else {
        BigRational::new(integer, power)
    };
    let significant = digits.trim_start_matches('0').len() as u32;
    Ok(Expression::Number(Number { value, is_decimal: !after.is_empty(), last_place: shift as i32, significant }))
}

/// Reads the digits of one number in the base another one names: `1010_2`.
pub(super) fn in_base(digits: &Expression, base: &Expression) -> Parsed {
    let (Expression::Number(digits), Expression::Number(base)) = (digits, base) else {
        return Err(Failure::NotMathematics);
    };
    let is_whole = digits.value.is_integer() && base.value.is_integer();
    let radix = u32::try_from(base.value.to_integer()).ok().filter(|b| is_whole && (2..=10).contains(b));
    let digits = digits.value.to_integer().to_string();
    let value = radix.and_then(|radix| BigInt::parse_bytes(digits.as_bytes(), radix));
    let value = value.ok_or(Failure::NotMathematics)?.into();
    Ok(Expression::Number(Number { value, is_decimal: false, last_place: 0, significant: 1 }))
}
