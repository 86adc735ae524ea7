//! Sets of real numbers as unions of intervals: what inequalities, unions and `\mathbb{R} \setminus \{0\}` mean.

use num_rational::BigRational;
use num_traits::{Signed, Zero};

use super::expression::{Expression, Function, Number, Relation};
use super::scalar::Scalars;

/// Most intervals of a set.
const MOST_PIECES: usize = 64;

/// One end of an interval.
#[derive(Clone, Debug)]
struct End {
    /// For the order; infinite for none.
    value: f64,
    is_in: bool,
    expression: Expression,
}

/// An interval that is not empty.
#[derive(Clone, Debug)]
struct Piece {
    low: End,
    high: End,
}

/// A set of real numbers: disjoint intervals from left to right.
#[derive(Clone, Debug)]
pub(super) struct RealSet {
    pieces: Vec<Piece>,
    /// The variable it is a condition on, if it was written as one.
    variable: Option<String>,
}

/// Two conditions are about different variables.
struct Disagreement;

fn infinite(sign: f64) -> End {
    End { value: sign * f64::INFINITY, is_in: false, expression: Expression::Symbol("infinity".to_owned()) }
}

impl RealSet {
    /// Whether the set is what an expression means only as a set: a condition or something made of sets.
    pub(super) fn is_condition(expression: &Expression) -> bool {
        match expression {
            Expression::Union(_) | Expression::Intersection(_) | Expression::Difference(..) => true,
            Expression::Domain(letter) => *letter == 'R',
            Expression::Relation(_, rest) => rest.iter().any(|(r, _)| r.is_order() || *r == Relation::NotEqual),
            _ => false,
        }
    }

    /// The set that an expression means; `None` if it means none, or its ends are no numbers.
    pub(super) fn of(expression: &Expression, scalars: &mut Scalars) -> Option<Self> {
        match expression {
            Expression::Domain('R') => Some(Self::all()),
            Expression::Sequence { open, items, close } if items.len() == 2 => {
                Self::interval(end(&items[0], *open == '[', scalars)?, end(&items[1], *close == ']', scalars)?)
            }
            Expression::Set(items) => {
                if items.len() > MOST_PIECES {
                    return None;
                }
                let mut set = Self { pieces: Vec::new(), variable: None };
                for item in items {
                    let point = end(item, true, scalars).filter(|p| p.value.is_finite())?;
                    set =
                        set.union(Self { pieces: vec![Piece { low: point.clone(), high: point }], variable: None })?;
                }
                Some(set)
            }
            Expression::Union(parts) => {
                let sets: Option<Vec<Self>> = parts.iter().map(|p| Self::of(p, scalars)).collect();
                sets?.into_iter().map(Some).reduce(|a, b| a?.union(b?))?
            }
            Expression::Intersection(parts) => {
                let sets: Vec<Self> = parts.iter().map(|p| Self::of(p, scalars)).collect::<Option<_>>()?;
                let both = sets.iter().cloned().map(Some).reduce(|a, b| a?.intersection(&b?))??;
                if both.pieces.is_empty() && !sets.iter().any(|s| s.pieces.is_empty()) {
                    // Nobody answers "x < 1 and x > 3" and means no number.
                    return sets.into_iter().map(Some).reduce(|a, b| a?.union(b?))?;
                }
                Some(both)
            }
            Expression::Difference(set, without) => {
                Self::of(set, scalars)?.intersection(&Self::of(without, scalars)?.complement())
            }
            Expression::Relation(first, rest) => match rest.as_slice() {
                [(Relation::In | Relation::Equal, set)] if matches!(**first, Expression::Symbol(_)) && is_set(set) => {
                    let set = Self::of(set, scalars)?;
                    Some(Self { variable: first.symbols().first().map(|n| (*n).to_owned()), ..set })
                }
                [(relation, second)] => Self::condition(first, *relation, second, scalars),
                [(left, middle), (right, last)] if left.is_order() && right.is_order() => {
                    let one = Self::condition(first, *left, middle, scalars)?;
                    one.intersection(&Self::condition(middle, *right, last, scalars)?)
                }
                _ => None,
            },
            _ => None,
        }
    }

    fn all() -> Self {
        Self { pieces: vec![Piece { low: infinite(-1.0), high: infinite(1.0) }], variable: None }
    }

    fn interval(low: End, high: End) -> Option<Self> {
        let is_there = low.value < high.value || (low.value == high.value && low.is_in && high.is_in);
        is_there.then(|| Self { pieces: vec![Piece { low, high }], variable: None })
    }

    /// `left relation right` for one variable, linear in it or the absolute value of something linear.
    fn condition(left: &Expression, relation: Relation, right: &Expression, scalars: &mut Scalars) -> Option<Self> {
        let variable = variable_of(left, right)?;
        if let Expression::Call(Function::Absolute, inner) = left
            && right.is_constant()
        {
            return Self::absolute(inner, relation, right, scalars);
        }
        let (bound, is_flipped) = match (left, right) {
            (Expression::Symbol(_), bound) if bound.is_constant() => (bound.clone(), false),
            (bound, Expression::Symbol(_)) if bound.is_constant() => (bound.clone(), true),
            _ => linear_bound(left, right, scalars)?,
        };
        let relation = if is_flipped { relation.flipped() } else { relation };
        let end = end(&bound, matches!(relation, Relation::LessOrEqual | Relation::GreaterOrEqual), scalars)?;
        let ray = |low: End, high: End| Piece { low, high };
        let outside = End { is_in: false, ..end.clone() };
        let pieces = match relation {
            Relation::Less | Relation::LessOrEqual => vec![ray(infinite(-1.0), end)],
            Relation::Greater | Relation::GreaterOrEqual => vec![ray(end, infinite(1.0))],
            Relation::NotEqual => vec![ray(infinite(-1.0), outside.clone()), ray(outside, infinite(1.0))],
            _ => return None,
        };
        Some(Self { pieces, variable: Some(variable) })
    }

    fn absolute(inner: &Expression, relation: Relation, bound: &Expression, scalars: &mut Scalars) -> Option<Self> {
        let below = Expression::Negative(Box::new(bound.clone()));
        if scalars.value(bound)? <= 0.0 {
            return None;
        }
        match relation {
            Relation::Less | Relation::LessOrEqual => {
                let high = Self::condition(inner, relation, bound, scalars)?;
                high.intersection(&Self::condition(inner, relation.flipped(), &below, scalars)?)
            }
            Relation::Greater | Relation::GreaterOrEqual => {
                let high = Self::condition(inner, relation, bound, scalars)?;
                high.union(Self::condition(inner, relation.flipped(), &below, scalars)?)
            }
            _ => None,
        }
    }

    /// The variable of both, where they do not disagree about it.
    fn common_variable(&self, other: &Self) -> Result<Option<String>, Disagreement> {
        match (&self.variable, &other.variable) {
            (Some(one), Some(two)) if one != two => Err(Disagreement),
            (one, two) => Ok(one.clone().or_else(|| two.clone())),
        }
    }

    fn union(self, other: Self) -> Option<Self> {
        let variable = self.common_variable(&other).ok()?;
        let mut pieces: Vec<Piece> = self.pieces.into_iter().chain(other.pieces).collect();
        if pieces.len() > MOST_PIECES {
            return None;
        }
        pieces.sort_by(|a, b| a.low.value.total_cmp(&b.low.value).then(b.low.is_in.cmp(&a.low.is_in)));
        let mut merged: Vec<Piece> = Vec::new();
        for piece in pieces {
            match merged.last_mut() {
                Some(last)
                    if piece.low.value < last.high.value
                        || (piece.low.value == last.high.value && (piece.low.is_in || last.high.is_in)) =>
                {
                    let is_further =
                        piece.high.value > last.high.value || (piece.high.value == last.high.value && piece.high.is_in);
                    if is_further {
                        last.high = piece.high;
                    }
                }
                _ => merged.push(piece),
            }
        }
        Some(Self { pieces: merged, variable })
    }

    fn intersection(self, other: &Self) -> Option<Self> {
        let variable = self.common_variable(other).ok()?;
        if self.pieces.len() * other.pieces.len() > MOST_PIECES * MOST_PIECES {
            return None;
        }
        let mut pieces = Vec::new();
        for one in &self.pieces {
            for two in &other.pieces {
                let is_low_first = one.low.value > two.low.value || (one.low.value == two.low.value && !one.low.is_in);
                let is_high_first =
                    one.high.value < two.high.value || (one.high.value == two.high.value && !one.high.is_in);
                let low = if is_low_first { &one.low } else { &two.low };
                let high = if is_high_first { &one.high } else { &two.high };
                pieces.extend(Self::interval(low.clone(), high.clone()).map(|s| s.pieces).unwrap_or_default());
            }
        }
        Some(Self { pieces, variable })
    }

    fn complement(self) -> Self {
        let mut pieces = Vec::new();
        let mut low = infinite(-1.0);
        for piece in self.pieces {
            let high = End { is_in: !piece.low.is_in, ..piece.low };
            if high.value.is_finite() {
                pieces.extend(Self::interval(low, high).map(|s| s.pieces).unwrap_or_default());
            }
            low = End { is_in: !piece.high.is_in, ..piece.high };
        }
        if low.value < f64::INFINITY {
            pieces.push(Piece { low, high: infinite(1.0) });
        }
        Self { pieces, variable: self.variable }
    }

    /// Whether two sets have the same numbers, and are conditions on the same variable if both are on one.
    pub(super) fn equals(&self, other: &Self, scalars: &mut Scalars) -> bool {
        let mut is_same_end = |one: &End, two: &End| {
            let is_infinite = one.value.is_infinite() || two.value.is_infinite();
            one.is_in == two.is_in
                && if is_infinite { one.value == two.value } else { scalars.equal(&one.expression, &two.expression) }
        };
        self.common_variable(other).is_ok()
            && self.pieces.len() == other.pieces.len()
            && self
                .pieces
                .iter()
                .zip(&other.pieces)
                .all(|(a, b)| is_same_end(&a.low, &b.low) && is_same_end(&a.high, &b.high))
    }
}

fn is_set(expression: &Expression) -> bool {
    use Expression as E;
    matches!(expression, E::Sequence { .. } | E::Set(_)) || RealSet::is_condition(expression)
}

/// The end at an expression that is a number or infinite.
fn end(expression: &Expression, is_in: bool, scalars: &mut Scalars) -> Option<End> {
    match expression {
        Expression::Symbol(name) if name == "infinity" => Some(infinite(1.0)),
        Expression::Negative(inner) if matches!(&**inner, Expression::Symbol(name) if name == "infinity") => {
            Some(infinite(-1.0))
        }
        other => Some(End { value: scalars.value(other)?, is_in, expression: other.clone() }),
    }
}

/// The only variable of both sides.
fn variable_of(left: &Expression, right: &Expression) -> Option<String> {
    let mut names: Vec<&str> = left.symbols();
    names.extend(right.symbols());
    names.retain(|n| !matches!(*n, "pi" | "e" | "i" | "infinity"));
    names.dedup();
    (names.len() == 1 || names.windows(2).all(|n| n[0] == n[1])).then(|| names.first().map(|n| (*n).to_owned()))?
}

/// Where `left - right` is 0, if it is linear with rational coefficients, and whether it falls.
fn linear_bound(left: &Expression, right: &Expression, scalars: &mut Scalars) -> Option<(Expression, bool)> {
    let mut names = left.symbols();
    names.extend(right.symbols());
    if names.iter().any(|n| matches!(*n, "pi" | "e" | "i" | "infinity")) {
        return None;
    }
    let difference = Expression::Sum(vec![left.clone(), Expression::Negative(Box::new(right.clone()))]);
    let values: Vec<BigRational> =
        [0, 1, 2, 5, -7].into_iter().map(|point| scalars.value_at(&difference, point)).collect::<Option<_>>()?;
    let slope = &values[1] - &values[0];
    let is_linear = [(2, 2), (3, 5), (4, -7)]
        .into_iter()
        .all(|(index, point)| values[index] == &values[0] + &slope * BigRational::from_integer(point.into()));
    if slope.is_zero() || !is_linear {
        return None;
    }
    let value = -&values[0] / &slope;
    let number = Number { value, is_decimal: false, last_place: 0, significant: 1 };
    Some((Expression::Number(number), slope.is_negative()))
}
