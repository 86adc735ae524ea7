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

/// A mixed number, `3 1/2`; `None` if the fraction is none, or not below 1.
pub(super) fn mixed(whole: Expression, above: Number, below: Number) -> Option<Expression> {
    if !above.value.is_integer() || !below.value.is_integer() || above.value >= below.value {
        return None;
    }
    let fraction = Expression::Quotient(Box::new(Expression::Number(above)), Box::new(Expression::Number(below)));
    Some(Expression::Sum(vec![whole, fraction]))
}

/// Reads `12`, `1.5`, `.5`, `1.5e-3`, and `0.1(6)` with digits that repeat.
pub(super) fn number(text: &str) -> Parsed {
    let (mantissa, exponent) = text.split_once('e').unwrap_or((text, "0"));
    let (mantissa, repeated) = mantissa.split_once('(').unwrap_or((mantissa, ""));
    let repeated = repeated.trim_end_matches(')');
    let (before, after) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let exponent: i64 = exponent.parse().map_err(|_| Failure::TooLarge)?;
    let digits = format!("{before}{after}");
    let shift = exponent - after.len() as i64;
    let most_digits = MOST_BITS / 4; // a decimal digit has 3.3 bits
    if (digits.len() + repeated.len()) as u64 > most_digits || shift.unsigned_abs() > most_digits {
        return Err(Failure::TooLarge);
    }
    let integer = BigInt::parse_bytes(digits.as_bytes(), 10).ok_or(Failure::NotMathematics)?;
    let power = BigInt::from(10).pow(shift.unsigned_abs() as u32);
    let scaled = |value: BigRational| if shift >= 0 { value * &power } else { value / &power };
    let significant = digits.trim_start_matches('0').len() as u32;
    if !repeated.is_empty() {
        // The period p of k digits adds p / (10^k - 1) of the last place.
        let period = BigInt::parse_bytes(repeated.as_bytes(), 10).ok_or(Failure::NotMathematics)?;
        let nines = BigInt::from(10).pow(repeated.len() as u32) - BigInt::one();
        let value = scaled(BigRational::from_integer(integer) + BigRational::new(period, nines));
        return Ok(Expression::Number(Number { value, is_decimal: false, last_place: shift as i32, significant }));
    }
    let value = scaled(BigRational::from_integer(integer));
    Ok(Expression::Number(Number { value, is_decimal: !after.is_empty(), last_place: shift as i32, significant }))
}

/// Reads digits in the base another number names: `1010_2`, `2F_{16}`.
pub(super) fn in_base(digits: &str, base: &Number) -> Parsed {
    let is_whole = base.value.is_integer() && !base.value.is_zero();
    let radix = u32::try_from(base.value.to_integer()).ok().filter(|b| is_whole && (2..=36).contains(b));
    let value = radix.and_then(|radix| BigInt::parse_bytes(digits.as_bytes(), radix));
    let value = value.ok_or(Failure::NotMathematics)?.into();
    Ok(Expression::Number(Number { value, is_decimal: false, last_place: 0, significant: 1 }))
}
