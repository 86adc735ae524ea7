//! Whether two expressions are the same answer.

use std::sync::LazyLock;

use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::Zero;

use super::evaluate::{Exact, Stop, approximate, float};
use super::expression::{Expression, Number, Relation};
use crate::rng::Stream;

/// Points at which expressions with variables are evaluated exactly.
const EXACT_POINTS: u64 = 3;
/// Points at which expressions are evaluated in f64.
const FLOAT_POINTS: u64 = 6;
/// Largest relative difference of equal values in f64: the rounding of some hundred operations stays far below it.
const RELATIVE: f64 = 1e-10;
/// Largest value that counts as zero beside an exact zero.
const ABSOLUTE: f64 = 1e-12;
/// Significant digits from which on a decimal may stand for the value it is a rounding of.
const ROUNDED_DIGITS: u32 = 6;
/// Most items of lists and sets that are compared without regard to order.
const MOST_ITEMS: usize = 64;

/// One comparison with its budget of work.
pub(super) struct Comparison {
    exact: Exact,
}

impl Comparison {
    pub(super) fn new() -> Self {
        Self { exact: Exact::new() }
    }

    /// Whether two answers are the same.
    pub(super) fn equal(&mut self, one: &Expression, two: &Expression) -> bool {
        use Expression as E;
        if one == two {
            return true;
        }
        match (one, two) {
            (E::Relation(first, rest), E::Relation(second, others)) => self.relations((first, rest), (second, others)),
            (E::Relation(first, rest), other) | (other, E::Relation(first, rest)) => match stands_for(first, rest) {
                Some(side) => self.equal(&side, other),
                None => false,
            },
            _ if one.has_plus_minus() || two.has_plus_minus() => {
                let (one, two) = (both_signs(one), both_signs(two));
                self.same_items(&one, &two)
            }
            (E::List(items) | E::Set(items), E::List(others) | E::Set(others))
            | (E::Union(items), E::Union(others)) => self.same_items(items, others),
            (E::Set(items), other) | (other, E::Set(items)) if items.len() == 1 && !is_collection(other) => {
                self.equal(&items[0], other)
            }
            (E::Sequence { items, .. }, E::List(others)) | (E::List(others), E::Sequence { items, .. }) => {
                self.same_order(items, others)
            }
            (E::Sequence { open, items, close }, E::Sequence { open: start, items: others, close: end }) => {
                open == start && close == end && self.same_order(items, others)
            }
            (E::Matrix(rows), E::Matrix(others)) => {
                rows.len() == others.len() && rows.iter().zip(others).all(|(r, o)| self.same_order(r, o))
            }
            (E::Matrix(rows), E::Sequence { open: '(', items, close: ')' })
            | (E::Sequence { open: '(', items, close: ')' }, E::Matrix(rows)) => {
                let is_vector = rows.len() == 1 || rows.iter().all(|r| r.len() == 1);
                let cells: Vec<E> = rows.iter().flatten().cloned().collect();
                is_vector && self.same_order(&cells, items)
            }
            (E::Text(words), E::Text(others)) => words == others,
            (E::Percent(inner), E::Percent(other)) => self.scalars(inner, other),
            (E::Percent(inner), other) | (other, E::Percent(inner)) => {
                let hundredth = E::Percent(inner.clone());
                self.scalars(&hundredth, other) || self.scalars(inner, other)
            }
            _ => !is_collection(one) && !is_collection(two) && self.scalars(one, two),
        }
    }

    /// The value of an expression that is one real number.
    pub(super) fn value(expression: &Expression) -> Option<f64> {
        if let Expression::Relation(first, rest) = expression {
            return stands_for(first, rest).and_then(|side| Self::value(&side));
        }
        if !expression.symbols().iter().all(|s| constant(s).is_some()) {
            return None;
        }
        let value = if expression.symbols().is_empty() {
            Exact::new().value(expression, &|_| BigRational::zero()).map(|v| approximate(&v))
        } else {
            Err(Stop::Irrational)
        };
        let value = value.unwrap_or_else(|_| float(expression, &|name| constant(name).unwrap_or(f64::NAN)));
        value.is_finite().then_some(value)
    }

    fn same_order(&mut self, items: &[Expression], others: &[Expression]) -> bool {
        items.len() == others.len() && items.iter().zip(others).all(|(i, o)| self.equal(i, o))
    }

    /// Whether each item of one is among the others and the other way round.
    fn same_items(&mut self, items: &[Expression], others: &[Expression]) -> bool {
        if items.len().max(others.len()) > MOST_ITEMS {
            return self.same_order(items, others);
        }
        items.iter().all(|i| others.iter().any(|o| self.equal(i, o)))
            && others.iter().all(|o| items.iter().any(|i| self.equal(i, o)))
    }

    fn relations(&mut self, one: Sides<'_>, two: Sides<'_>) -> bool {
        if let (Some(interval), Some(other)) = (interval(one), interval(two)) {
            return interval.0 == other.0 && self.equal(&interval.1, &other.1);
        }
        if let ([(Relation::Equal | Relation::In, side)], [(Relation::Equal | Relation::In, other)]) = (one.1, two.1) {
            let (first, second) = (one.0, two.0);
            if matches!(first, Expression::Text(_)) || matches!(second, Expression::Text(_)) || first == second {
                return self.equal(side, other);
            }
            return self.proportional((first, side), (second, other));
        }
        if one.1.len() != two.1.len() {
            return false;
        }
        let forwards = sides(one);
        let mut backwards = sides(two);
        let signs: Vec<Relation> = one.1.iter().map(|(r, _)| *r).collect();
        let mut others: Vec<Relation> = two.1.iter().map(|(r, _)| *r).collect();
        if signs == others && self.same_order(&forwards, &backwards) {
            return true;
        }
        backwards.reverse();
        others.reverse();
        signs.iter().zip(&others).all(|(s, o)| *s == o.flipped()) && self.same_order(&forwards, &backwards)
    }

    /// Whether two equations are multiples of each other: left minus right of both have one ratio at all points.
    fn proportional(&mut self, one: (&Expression, &Expression), two: (&Expression, &Expression)) -> bool {
        let difference = |(left, right): (&Expression, &Expression)| {
            Expression::Sum(vec![left.clone(), Expression::Negative(Box::new(right.clone()))])
        };
        let (one, two) = (difference(one), difference(two));
        let names = union(&one, &two);
        let mut values = Vec::new();
        for point in 0..EXACT_POINTS {
            let at = exact_point(&names, point);
            let (Ok(first), Ok(second)) = (self.exact.value(&one, &at), self.exact.value(&two, &at)) else {
                return false;
            };
            values.push((first, second));
        }
        let (first, second) = values[0].clone();
        !first.is_zero() && !second.is_zero() && values.iter().all(|(a, b)| a * &second == b * &first)
    }

    /// Whether two expressions without brackets of items have the same value wherever both have one.
    fn scalars(&mut self, one: &Expression, two: &Expression) -> bool {
        if let (Expression::Number(a), Expression::Number(b)) = (one, two)
            && a.value == b.value
        {
            return true;
        }
        let names = union(one, two);
        match self.exactly(one, two, &names) {
            Ok(true) => true,
            Ok(false) => is_rounding(one, two) || is_rounding(two, one),
            Err(_) => in_floats(one, two, &names) || is_rounding(one, two) || is_rounding(two, one),
        }
    }

    fn exactly(&mut self, one: &Expression, two: &Expression, names: &[&str]) -> Result<bool, Stop> {
        let points = if names.is_empty() { 1 } else { EXACT_POINTS };
        for point in 0..points {
            let at = exact_point(names, point);
            if self.exact.value(one, &at)? != self.exact.value(two, &at)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

type Sides<'a> = (&'a Expression, &'a [(Relation, Expression)]);

fn sides((first, rest): Sides<'_>) -> Vec<Expression> {
    std::iter::once(first.clone()).chain(rest.iter().map(|(_, side)| side.clone())).collect()
}

fn is_collection(expression: &Expression) -> bool {
    use Expression as E;
    matches!(
        expression,
        E::Sequence { .. } | E::Set(_) | E::List(_) | E::Union(_) | E::Matrix(_) | E::Relation(..) | E::Text(_)
    )
}

/// What a relation stands for beside something that is none: `x = 5` for 5, `x > 3` for an interval.
fn stands_for(first: &Expression, rest: &[(Relation, Expression)]) -> Option<Expression> {
    if rest.iter().all(|(r, _)| matches!(r, Relation::Equal | Relation::In)) {
        let (_, last) = rest.last()?;
        let is_name = |e: &Expression| matches!(e, Expression::Symbol(name) if constant(name).is_none());
        return Some(if is_name(last) && !is_name(first) { first.clone() } else { last.clone() });
    }
    interval((first, rest)).map(|(_, interval)| interval)
}

/// An inequality for one symbol as that symbol and its interval.
fn interval((first, rest): Sides<'_>) -> Option<(String, Expression)> {
    use Relation::{Greater, GreaterOrEqual, Less, LessOrEqual};
    let infinity = || Expression::Symbol("infinity".to_owned());
    let is_order = |r: Relation| matches!(r, Less | LessOrEqual | Greater | GreaterOrEqual);
    let build = |low: Expression, is_low_in: bool, high: Expression, is_high_in: bool| Expression::Sequence {
        open: if is_low_in { '[' } else { '(' },
        items: vec![low, high],
        close: if is_high_in { ']' } else { ')' },
    };
    match (first, rest) {
        (Expression::Symbol(name), [(relation, bound)]) if is_order(*relation) && bound.symbols().is_empty() => {
            let is_in = matches!(relation, LessOrEqual | GreaterOrEqual);
            let interval = if matches!(relation, Less | LessOrEqual) {
                build(Expression::Negative(Box::new(infinity())), false, bound.clone(), is_in)
            } else {
                build(bound.clone(), is_in, infinity(), false)
            };
            Some((name.clone(), interval))
        }
        (bound, [(relation, Expression::Symbol(name))]) if is_order(*relation) && bound.symbols().is_empty() => {
            let flipped = [(relation.flipped(), bound.clone())];
            interval((&Expression::Symbol(name.clone()), &flipped))
        }
        (low, [(left, Expression::Symbol(name)), (right, high)]) => {
            let is_rising = |r: &Relation| matches!(r, Less | LessOrEqual);
            let is_in = |r: &Relation| matches!(r, LessOrEqual | GreaterOrEqual);
            let interval = match (is_order(*left) && is_order(*right), is_rising(left), is_rising(right)) {
                (true, true, true) => build(low.clone(), is_in(left), high.clone(), is_in(right)),
                (true, false, false) => build(high.clone(), is_in(right), low.clone(), is_in(left)),
                _ => return None,
            };
            Some((name.clone(), interval))
        }
        _ => None,
    }
}

fn both_signs(expression: &Expression) -> Vec<Expression> {
    match expression {
        Expression::List(items) | Expression::Set(items) => items.iter().flat_map(both_signs).collect(),
        one if one.has_plus_minus() => vec![one.with_sign(true), one.with_sign(false)],
        one => vec![one.clone()],
    }
}

fn union<'a>(one: &'a Expression, two: &'a Expression) -> Vec<&'a str> {
    let mut names = one.symbols();
    names.extend(two.symbols());
    names.sort_unstable();
    names.dedup();
    names
}

/// The value of a constant that is kept as a symbol.
fn constant(name: &str) -> Option<f64> {
    match name {
        "pi" => Some(std::f64::consts::PI),
        "e" => Some(std::f64::consts::E),
        _ => None,
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

/// Compares in f64 at several points, the first half of them positive.
fn in_floats(one: &Expression, two: &Expression, names: &[&str]) -> bool {
    if names.contains(&"infinity") {
        return false;
    }
    let variables: Vec<&str> = names.iter().copied().filter(|n| constant(n).is_none()).collect();
    let points = if variables.is_empty() { 1 } else { FLOAT_POINTS };
    let mut agreeing = 0;
    for point in 0..points {
        let values: Vec<f64> = (0..variables.len())
            .map(|index| {
                let kept = UNIFORMS[point as usize].get(index).copied();
                let uniform = kept.unwrap_or_else(|| draw_uniform(point, index as u64));
                if point < FLOAT_POINTS / 2 { 0.5 + 3.0 * uniform } else { 6.0 * uniform - 3.0 }
            })
            .collect();
        let at = |name: &str| {
            constant(name).or_else(|| variables.iter().position(|v| *v == name).map(|i| values[i])).unwrap_or(f64::NAN)
        };
        let (a, b) = (float(one, &at), float(two, &at));
        if !a.is_finite() || !b.is_finite() {
            continue;
        }
        let is_close = if a == 0.0 || b == 0.0 {
            (a - b).abs() <= ABSOLUTE
        } else {
            (a - b).abs() <= RELATIVE * a.abs().max(b.abs())
        };
        if !is_close {
            return false;
        }
        agreeing += 1;
    }
    agreeing >= points.min(2)
}

/// Whether `one` is a decimal of enough digits that is a rounding or truncation of `two`.
fn is_rounding(one: &Expression, two: &Expression) -> bool {
    let Some(decimal) = literal(one).filter(|n| n.is_decimal && n.significant >= ROUNDED_DIGITS) else { return false };
    match literal(two) {
        None => {}
        // Two decimals: the coarser one may be a rounding of the finer one.
        Some(other)
            if other.is_decimal
                && decimal.last_place >= other.last_place
                && decimal.last_place <= -(ROUNDED_DIGITS as i32) => {}
        Some(_) => return false,
    }
    let unit = 10f64.powi(decimal.last_place);
    match (Comparison::value(one), Comparison::value(two)) {
        (Some(a), Some(b)) => {
            let is_rounded = (a - b).abs() <= 0.5 * unit * (1.0 + RELATIVE);
            let is_truncated = (a - b).abs() < unit && a.abs() <= b.abs();
            is_rounded || is_truncated
        }
        _ => false,
    }
}

fn literal(expression: &Expression) -> Option<&Number> {
    match expression {
        Expression::Number(number) => Some(number),
        Expression::Negative(inner) => literal(inner),
        _ => None,
    }
}
