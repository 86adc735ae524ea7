//! Whether two expressions without brackets of items have one value wherever both have one.

use std::sync::LazyLock;

use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::{Signed, Zero};

use super::approximate::{Approximate, Ball, Field};
use super::evaluate::{Exact, Gauss, Stop, nearest};
use super::expression::{Expression, Function, Number};
use crate::rng::Stream;

/// Points at which expressions with variables are evaluated exactly.
const EXACT_POINTS: u64 = 3;
/// Points at which expressions are evaluated in f64.
const FLOAT_POINTS: u64 = 6;
/// Significant digits from which on a decimal may stand for the value it is a rounding of.
const ROUNDED_DIGITS: u32 = 6;

/// Compares scalars with a budget of work for all comparisons of two answers.
pub(super) struct Scalars {
    exact: Exact,
    approximate: Approximate,
}

impl Scalars {
    pub(super) fn new() -> Self {
        Self { exact: Exact::new(), approximate: Approximate::new() }
    }

    /// Whether two expressions have the same value wherever both have one.
    pub(super) fn equal(&mut self, one: &Expression, two: &Expression) -> bool {
        if let (Expression::Number(a), Expression::Number(b)) = (one, two)
            && a.value == b.value
        {
            return true;
        }
        let names = union(one, two);
        let is_equal = match self.exactly(one, two, &names) {
            Ok(is_equal) => is_equal,
            Err(_) => self.in_floats(one, two, &names) || self.at_whole_numbers(one, two, &names),
        };
        is_equal || self.is_rounding(one, two) || self.is_rounding(two, one)
    }

    /// The value of an expression that is one real number.
    pub(super) fn value(&mut self, expression: &Expression) -> Option<f64> {
        if !expression.is_constant() {
            return None;
        }
        let names = expression.symbols();
        let exact = if names.iter().all(|n| *n == "i") { self.constant(expression) } else { None };
        exact
            .map(|v| nearest(&v))
            .or_else(|| self.approximate.value(expression, Field::Complex, &constant_value)?.as_real())
            .filter(|v| v.is_finite())
    }

    /// The rational value of an expression without variables and transcendental constants.
    pub(super) fn constant(&mut self, expression: &Expression) -> Option<BigRational> {
        if !expression.symbols().into_iter().all(|n| n == "i") {
            return None;
        }
        let value = self.exact.value(expression, &|_| BigRational::zero()).ok()?;
        value.im.is_zero().then_some(value.re)
    }

    /// The rational value of an expression in one variable at a point.
    pub(super) fn value_at(&mut self, expression: &Expression, point: i64) -> Option<BigRational> {
        let value = self.exact.value(expression, &|_| BigRational::from_integer(point.into())).ok()?;
        value.im.is_zero().then_some(value.re)
    }

    fn exactly(&mut self, one: &Expression, two: &Expression, names: &[&str]) -> Result<bool, Stop> {
        let points = if names.iter().all(|n| *n == "i") { 1 } else { EXACT_POINTS };
        for point in 0..points {
            let at = exact_point(names, point);
            if self.exact.value(one, &at)? != self.exact.value(two, &at)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Compares in f64 at several points, the first half of them positive.
    fn in_floats(&mut self, one: &Expression, two: &Expression, names: &[&str]) -> bool {
        if names.contains(&"infinity") {
            return false;
        }
        let variables: Vec<&str> = names.iter().copied().filter(|n| !is_constant_name(n)).collect();
        let points = if variables.is_empty() { 1 } else { FLOAT_POINTS };
        let field = field_of(names, &variables);
        let mut agreeing = 0;
        for point in 0..points {
            let at = float_point(&variables, point);
            let (Some(a), Some(b)) = (self.approximate.value(one, field, &at), self.approximate.value(two, field, &at))
            else {
                continue;
            };
            if !a.agrees(&b) {
                return false;
            }
            agreeing += 1;
        }
        agreeing >= points.min(2)
    }

    /// Compares exactly at small whole numbers, where `n!` and `(-1)^n` have values that they do not have elsewhere.
    fn at_whole_numbers(&mut self, one: &Expression, two: &Expression, names: &[&str]) -> bool {
        const POINTS: i64 = 8;
        let is_discrete = |e: &Expression| match e {
            Expression::Call(Function::Factorial | Function::Floor | Function::Ceiling, _)
            | Expression::Binomial(..) => true,
            Expression::Power(_, exponent) => !exponent.is_constant(),
            _ => false,
        };
        let is_wanted = one.any(&is_discrete) || two.any(&is_discrete);
        if !is_wanted || names.is_empty() || names.iter().any(|n| is_constant_name(n)) {
            return false;
        }
        let mut agreeing = 0;
        for point in 0..POINTS {
            // The variables take different values in different orders.
            let at = |name: &str| {
                let index = names.iter().position(|n| *n == name).unwrap_or(0) as i64;
                BigRational::from_integer((3 + (point * (2 * index + 1) + 4 * index) % 11).into())
            };
            match (self.exact.value(one, &at), self.exact.value(two, &at)) {
                (Ok(a), Ok(b)) if a == b => agreeing += 1,
                (Ok(_), Ok(_)) => return false,
                _ => {}
            }
        }
        agreeing >= POINTS / 2
    }

    /// Whether two differences are multiples of each other: a ratio that is the same at all points, above 0 if
    /// `is_positive` says so. Neither is 0 everywhere.
    pub(super) fn proportional(&mut self, one: &Expression, two: &Expression, is_positive: bool) -> bool {
        let names = union(one, two);
        if names.contains(&"infinity") {
            return false;
        }
        match self.exact_ratio(one, two, &names) {
            Ok(ratio) => ratio.is_some_and(|r| !is_positive || (r.im.is_zero() && r.re.is_positive())),
            Err(_) => self.float_ratio(one, two, &names).is_some_and(|r| !is_positive || r > 0.0),
        }
    }

    fn exact_ratio(&mut self, one: &Expression, two: &Expression, names: &[&str]) -> Result<Option<Gauss>, Stop> {
        let mut values = Vec::new();
        for point in 0..EXACT_POINTS {
            let at = exact_point(names, point);
            values.push((self.exact.value(one, &at)?, self.exact.value(two, &at)?));
        }
        let (first, second) = values[0].clone();
        let is_one_ratio = values.iter().all(|(a, b)| a.times(&second) == b.times(&first));
        if first.is_zero() || !is_one_ratio {
            return Ok(None);
        }
        Ok(second.inverse().map(|inverse| first.times(&inverse)))
    }

    fn float_ratio(&mut self, one: &Expression, two: &Expression, names: &[&str]) -> Option<f64> {
        let variables: Vec<&str> = names.iter().copied().filter(|n| !is_constant_name(n)).collect();
        let mut ratios: Vec<Ball> = Vec::new();
        for point in 0..FLOAT_POINTS {
            let at = float_point(&variables, point);
            let a = self.approximate.value(one, Field::Real, &at);
            let b = self.approximate.value(two, Field::Real, &at);
            if let (Some(a), Some(b)) = (a, b) {
                ratios.push(a.over(b)?);
            }
        }
        let first = ratios.first()?;
        let is_same = ratios.len() >= 3 && ratios.iter().all(|r| r.agrees(first));
        first.as_real().filter(|r| is_same && *r != 0.0)
    }

    /// Whether `one` is a decimal of enough digits that is a rounding or truncation of `two`.
    fn is_rounding(&mut self, one: &Expression, two: &Expression) -> bool {
        let Some(decimal) = literal(one).filter(|n| n.is_decimal && n.significant >= ROUNDED_DIGITS) else {
            return false;
        };
        match literal(two) {
            None => {}
            // Two decimals: the coarser one may be a rounding of the finer one.
            Some(other)
                if other.is_decimal
                    && decimal.last_place >= other.last_place
                    && decimal.last_place <= -(ROUNDED_DIGITS as i32) => {}
            // A decimal with digits that repeat never ends.
            Some(other) if !other.is_decimal && !other.value.is_integer() => {}
            Some(_) => return false,
        }
        self.is_near(one, decimal.last_place, two)
    }

    /// Whether the decimal `one` is a rounding of `two` to the digits it has, however few.
    pub(super) fn is_rounded(&mut self, one: &Expression, two: &Expression) -> bool {
        literal(one).map(|n| n.last_place).is_some_and(|place| self.is_near(one, place, two))
    }

    fn is_near(&mut self, one: &Expression, last_place: i32, two: &Expression) -> bool {
        const SLACK: f64 = 1e-10;
        let unit = 10f64.powi(last_place);
        match (self.value(one), self.value(two)) {
            (Some(a), Some(b)) => {
                let is_rounded = (a - b).abs() <= 0.5 * unit * (1.0 + SLACK);
                let is_truncated = (a - b).abs() < unit && a.abs() <= b.abs();
                is_rounded || is_truncated
            }
            _ => false,
        }
    }
}

/// Principal values where the answers are plain numbers or have the imaginary unit; with variables only real ones.
fn field_of(names: &[&str], variables: &[&str]) -> Field {
    if variables.is_empty() || names.contains(&"i") { Field::Complex } else { Field::Real }
}

fn union<'a>(one: &'a Expression, two: &'a Expression) -> Vec<&'a str> {
    let mut names = one.symbols();
    names.extend(two.symbols());
    names.sort_unstable();
    names.dedup();
    names
}

fn is_constant_name(name: &str) -> bool {
    matches!(name, "pi" | "e" | "i")
}

/// The value of a constant that is kept as a symbol.
fn constant_value(name: &str) -> f64 {
    match name {
        "pi" => std::f64::consts::PI,
        "e" => std::f64::consts::E,
        "infinity" => f64::INFINITY,
        _ => f64::NAN,
    }
}

/// Symbols whose random values are kept; more of them are drawn when they are needed.
const KEPT_SYMBOLS: u64 = 8;

/// The random integers of up to 2^32 in size, none of them 0, by point and symbol; the same for every comparison.
static INTEGERS: LazyLock<Vec<Vec<BigRational>>> =
    LazyLock::new(|| (0..EXACT_POINTS).map(|p| (0..KEPT_SYMBOLS).map(|s| draw_integer(p, s)).collect()).collect());

fn draw_integer(point: u64, symbol: u64) -> BigRational {
    let size = BigInt::from(1 + Stream::new(0, "reward/math/exact", point, symbol).below(1 << 32));
    // Every symbol is negative at some point, so that |x| is not x.
    BigRational::from_integer(if (point + symbol).is_multiple_of(2) { size } else { -size })
}

/// The values of the symbols `names` at an exact point.
fn exact_point(names: &[&str], point: u64) -> impl Fn(&str) -> BigRational {
    move |name| match names.iter().position(|n| *n == name) {
        Some(symbol) => match INTEGERS[point as usize].get(symbol) {
            Some(integer) => integer.clone(),
            None => draw_integer(point, symbol as u64),
        },
        None => BigRational::zero(),
    }
}

/// The random numbers in [0, 1) behind the points in f64.
static UNIFORMS: LazyLock<Vec<Vec<f64>>> =
    LazyLock::new(|| (0..FLOAT_POINTS).map(|p| (0..KEPT_SYMBOLS).map(|s| draw_uniform(p, s)).collect()).collect());

fn draw_uniform(point: u64, symbol: u64) -> f64 {
    Stream::new(0, "reward/math/float", point, symbol).uniform()
}

/// The values of variables and constants at a point in f64.
fn float_point(variables: &[&str], point: u64) -> impl Fn(&str) -> f64 {
    let values: Vec<f64> = (0..variables.len())
        .map(|index| {
            let kept = UNIFORMS[point as usize].get(index).copied();
            let uniform = kept.unwrap_or_else(|| draw_uniform(point, index as u64));
            if point < FLOAT_POINTS / 2 { 0.5 + 3.0 * uniform } else { 6.0 * uniform - 3.0 }
        })
        .collect();
    move |name| variables.iter().position(|v| *v == name).map_or_else(|| constant_value(name), |i| values[i])
}

/// The number that an expression is but for its sign.
pub(super) fn literal(expression: &Expression) -> Option<&Number> {
    match expression {
        Expression::Number(number) => Some(number),
        Expression::Negative(inner) => literal(inner),
        _ => None,
    }
}
