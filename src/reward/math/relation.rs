//! Equations: what they say about a name, and what they stand for beside something that is no equation.

use super::expression::{Expression, Relation};
use super::scalar::{Scalars, literal};

/// `name = value`, read off an equation or a chain of them.
pub(super) struct Assignment<'a> {
    /// The name on the left.
    pub(super) name: &'a str,
    /// The value, and roundings of it that are given beside it.
    pub(super) values: Vec<&'a Expression>,
}

impl<'a> Assignment<'a> {
    /// Reads `x = 5`, `5 = x`, `f(x) = 2x + 1`, `x = 2 + 3 = 5`, `x \approx 0.33`, `x = 1/3 \approx 0.33`; `None` for any
    /// other relation, and for a chain of numbers that contradict each other.
    pub(super) fn of(expression: &'a Expression, scalars: &mut Scalars) -> Option<Self> {
        let Expression::Relation(first, rest) = expression else { return None };
        if !rest.iter().all(|(r, _)| r.is_assigning()) {
            return None;
        }
        if let Some(name) = name_of(first) {
            let sides: Vec<(Relation, &Expression)> = rest.iter().map(|(r, side)| (*r, side)).collect();
            return Some(Self { name, values: values(&sides, scalars)? });
        }
        // `5 = x`
        match rest.as_slice() {
            [(Relation::Equal, side)] => {
                let name = name_of(side).filter(|_| first.is_constant())?;
                Some(Self { name, values: vec![first.as_ref()] })
            }
            _ => None,
        }
    }
}

/// The value of `2 + 3 = 5`: a chain of numbers that agree.
pub(super) fn value_of_chain<'a>(expression: &'a Expression, scalars: &mut Scalars) -> Option<Vec<&'a Expression>> {
    let Expression::Relation(first, rest) = expression else { return None };
    let is_chain = rest.iter().all(|(r, e)| matches!(r, Relation::Equal | Relation::Approximately) && e.is_constant());
    if !is_chain || !first.is_constant() {
        return None;
    }
    let sides: Vec<(Relation, &Expression)> =
        std::iter::once((Relation::Equal, first.as_ref())).chain(rest.iter().map(|(r, side)| (*r, side))).collect();
    values(&sides, scalars)
}

/// The last side that is exact, and the sides after it that are roundings of it.
fn values<'a>(sides: &[(Relation, &'a Expression)], scalars: &mut Scalars) -> Option<Vec<&'a Expression>> {
    let exact: Vec<&Expression> =
        sides.iter().take_while(|(r, _)| *r != Relation::Approximately).map(|(_, side)| *side).collect();
    let Some((last, before)) = exact.split_last() else { return sides.first().map(|(_, side)| vec![*side]) };
    let is_number = |e: &Expression| e.is_constant() && scalars_can_compare(e);
    if is_number(last) && before.iter().any(|e| is_number(e) && !scalars.equal(e, last)) {
        return None;
    }
    let mut values = vec![*last];
    for (_, side) in &sides[exact.len()..] {
        if literal(side).is_some() && scalars.is_rounded(side, last) {
            values.push(*side);
        }
    }
    Some(values)
}

fn scalars_can_compare(expression: &Expression) -> bool {
    !expression.any(&|e| {
        matches!(
            e,
            Expression::Sequence { .. }
                | Expression::Set(_)
                | Expression::List(_)
                | Expression::Union(_)
                | Expression::Intersection(_)
                | Expression::Difference(..)
                | Expression::Domain(_)
                | Expression::Matrix(_)
                | Expression::Text(_)
                | Expression::PlusMinus(..)
                | Expression::Quantity(..)
                | Expression::Clock(_)
        )
    })
}

/// The name that a left side is: a variable, `f(x)`, `\sin A`, words. A number or a sum of variables is none.
fn name_of(expression: &Expression) -> Option<&str> {
    match expression {
        Expression::Symbol(name) if !matches!(name.as_str(), "pi" | "infinity") => Some(name),
        Expression::Text(words) => Some(words),
        Expression::Call(_, inner) => match &**inner {
            Expression::Symbol(name) if name.as_str() != "pi" => Some(name),
            _ => None,
        },
        _ => None,
    }
}

/// The value of `m + n = 113`: one number for a sum of different variables, each of them once.
pub(super) fn named_sum(expression: &Expression) -> Option<&Expression> {
    let Expression::Relation(first, rest) = expression else { return None };
    let (Expression::Sum(terms), [(Relation::Equal, value)]) = (&**first, rest.as_slice()) else { return None };
    let is_variable = |e: &Expression| matches!(e, Expression::Symbol(_)) && !e.is_constant();
    let is_sum = terms.iter().all(is_variable) && first.symbols().len() == terms.len();
    (is_sum && value.is_constant()).then_some(value)
}

/// The letter and the number of `x_1`.
pub(super) fn indexed(name: &str) -> Option<(&str, u32)> {
    let (base, index) = name.split_once('_')?;
    Some((base, index.parse().ok()?))
}

/// Whether two names say the same thing about what they name.
pub(super) fn is_same_name(one: &str, two: &str) -> bool {
    let is_curve = |a: &str, b: &str| a == "y" && matches!(b, "f(x)" | "y(x)");
    one == two || is_curve(one, two) || is_curve(two, one)
}
