//! Whether two expressions are the same answer.

use super::expression::{Clock, Expression, Relation};
use super::intervals::RealSet;
use super::matrix;
use super::relation::{Assignment, indexed, is_same_name, value_of_chain};
use super::scalar::Scalars;
use super::unit::Unit;

/// Most items of lists and sets that are compared without regard to order.
const MOST_ITEMS: usize = 64;
/// Largest expression with signs to choose: both choices are made everywhere in it.
const MOST_SIGNED: usize = 2000;

/// One comparison with its budget of work.
pub(super) struct Comparison {
    scalars: Scalars,
}

impl Comparison {
    pub(super) fn new() -> Self {
        Self { scalars: Scalars::new() }
    }

    /// The value of an answer that is one real number.
    pub(super) fn value(&mut self, expression: &Expression) -> Option<f64> {
        match expression {
            Expression::Relation(..) => {
                let value = self.stands_for(expression)?.into_iter().next()?.clone();
                self.value(&value)
            }
            Expression::Quantity(value, _) | Expression::Degrees(value) => self.value(value),
            other => self.scalars.value(other),
        }
    }

    /// Whether two answers are the same.
    pub(super) fn equal(&mut self, one: &Expression, two: &Expression) -> bool {
        use Expression as E;
        if one == two {
            return true;
        }
        if RealSet::is_condition(one) || RealSet::is_condition(two) {
            return self.sets(one, two);
        }
        match (one, two) {
            (E::Relation(..), E::Relation(..)) => self.relations(one, two),
            // `x = \pm 2` beside `x = 2, x = -2`, or a list of equations beside plain values.
            (E::List(_) | E::Set(_), _) | (_, E::List(_) | E::Set(_)) => self.collections(one, two),
            (E::Relation(..), other) => self.is_value(one, other),
            (other, E::Relation(..)) => self.is_value(two, other),
            _ if one.has_plus_minus() || two.has_plus_minus() => self.with_signs(one, two),
            (E::Clock(a), E::Clock(b)) => is_same_time(*a, *b),
            (E::Clock(_), E::Ratio(_)) | (E::Ratio(_), E::Clock(_)) => false,
            (E::Clock(clock), other) | (other, E::Clock(clock)) => {
                as_ratio(*clock).is_some_and(|ratio| self.equal(&ratio, other))
            }
            (E::Ratio(terms), E::Ratio(others)) => self.same_ratio(terms, others),
            (E::Quantity(a, u), E::Quantity(b, v)) => {
                u.is_same_kind(v) && (self.equal(a, b) && u.factor == v.factor || self.scalars.equal(one, two))
            }
            (E::Quantity(value, unit), other) | (other, E::Quantity(value, unit)) => {
                self.equal(value, other) || self.is_product_of_letters(value, unit, other)
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
            _ if matrix::is_operation(one) || matrix::is_operation(two) => {
                match (matrix::evaluated(one), matrix::evaluated(two)) {
                    (Some(a), Some(b)) => self.equal(&E::Matrix(a), &E::Matrix(b)),
                    _ => false,
                }
            }
            (E::Percent(inner), E::Percent(other)) | (E::Degrees(inner), E::Degrees(other)) => {
                self.scalars.equal(inner, other)
            }
            (E::Percent(inner), other) | (other, E::Percent(inner)) => {
                let hundredth = E::Percent(inner.clone());
                !is_collection(other)
                    && (self.scalars.equal(&hundredth, other)
                        || self.is_many_percent(inner) && self.scalars.equal(inner, other))
            }
            (E::Degrees(inner), other) | (other, E::Degrees(inner)) => {
                let radians = E::Degrees(inner.clone());
                !is_collection(other) && (self.scalars.equal(inner, other) || self.scalars.equal(&radians, other))
            }
            _ => !is_collection(one) && !is_collection(two) && self.scalars.equal(one, two),
        }
    }

    /// Whether a number of percent can stand without its sign: `20\%` is also 20, but `0.5\%` is not 0.5.
    fn is_many_percent(&mut self, number: &Expression) -> bool {
        self.scalars.value(number).is_none_or(|value| value.abs() > 1.0)
    }

    /// Sets of real numbers, one of them written as a condition or made of sets.
    fn sets(&mut self, one: &Expression, two: &Expression) -> bool {
        use Expression as E;
        let sets = (RealSet::of(one, &mut self.scalars), RealSet::of(two, &mut self.scalars));
        if let (Some(a), Some(b)) = sets {
            return a.equals(&b, &mut self.scalars);
        }
        match (one, two) {
            // `D = \mathbb{R}`, `x \in A \cup B`
            (E::Relation(_, rest), other) | (other, E::Relation(_, rest))
                if !matches!(other, E::Relation(..))
                    && matches!(rest.as_slice(), [(Relation::In | Relation::Equal, _)]) =>
            {
                self.equal(&rest[0].1, other)
            }
            (E::Relation(..), E::Relation(..)) => self.inequalities(one, two),
            (E::Union(parts), E::Union(others)) | (E::Intersection(parts), E::Intersection(others)) => {
                self.same_items(parts, others)
            }
            (E::Difference(a, b), E::Difference(c, d)) => self.equal(a, c) && self.equal(b, d),
            _ => false,
        }
    }

    /// Inequalities that are no intervals: the same sides in the same or the opposite order, or multiples.
    fn inequalities(&mut self, one: &Expression, two: &Expression) -> bool {
        let (Some((sides, signs)), Some((others, other_signs))) = (chain(one), chain(two)) else { return false };
        if sides.len() != others.len() {
            return false;
        }
        if signs == other_signs && self.same_order(&sides, &others) {
            return true;
        }
        let backwards: Vec<Expression> = others.iter().rev().cloned().collect();
        let flipped: Vec<Relation> = other_signs.iter().rev().map(|s| s.flipped()).collect();
        if signs == flipped && self.same_order(&sides, &backwards) {
            return true;
        }
        let ([sign], [other_sign]) = (signs.as_slice(), other_signs.as_slice()) else { return false };
        let difference = |sides: &[Expression]| {
            Expression::Sum(vec![sides[0].clone(), Expression::Negative(Box::new(sides[1].clone()))])
        };
        let (first, second) = (difference(&sides), difference(&others));
        if sign == other_sign && (*sign == Relation::NotEqual || sign.is_order()) {
            return self.scalars.proportional(&first, &second, sign.is_order());
        }
        let negated = Expression::Negative(Box::new(second));
        *sign == other_sign.flipped() && self.scalars.proportional(&first, &negated, true)
    }

    /// Two equations: about the same name with the same value, or multiples of each other.
    fn relations(&mut self, one: &Expression, two: &Expression) -> bool {
        let (Expression::Relation(first, rest), Expression::Relation(second, others)) = (one, two) else {
            return false;
        };
        let assignments = (Assignment::of(one, &mut self.scalars), Assignment::of(two, &mut self.scalars));
        if let (Some(a), Some(b)) = assignments {
            let is_worded = |e: &Expression| matches!(e, Expression::Text(_));
            if is_same_name(a.name, b.name) || is_worded(first) || is_worded(second) {
                return a.values.iter().any(|v| b.values.iter().any(|w| self.equal(v, w)));
            }
        }
        if let ([(Relation::Equal, side)], [(Relation::Equal, other)]) = (rest.as_slice(), others.as_slice()) {
            if first == second {
                return self.equal(side, other);
            }
            let difference = |left: &Expression, right: &Expression| {
                Expression::Sum(vec![left.clone(), Expression::Negative(Box::new(right.clone()))])
            };
            return self.scalars.proportional(&difference(first, side), &difference(second, other), false);
        }
        self.inequalities(one, two)
    }

    /// What an equation stands for beside something that is none.
    fn stands_for<'a>(&mut self, relation: &'a Expression) -> Option<Vec<&'a Expression>> {
        match Assignment::of(relation, &mut self.scalars) {
            Some(assignment) => Some(assignment.values),
            None => value_of_chain(relation, &mut self.scalars),
        }
    }

    fn is_value(&mut self, relation: &Expression, other: &Expression) -> bool {
        self.stands_for(relation).is_some_and(|values| values.into_iter().any(|v| self.equal(v, other)))
    }

    /// Lists and sets, and a list beside a tuple.
    fn collections(&mut self, one: &Expression, two: &Expression) -> bool {
        use Expression as E;
        let (named, other_named) = (self.named_values(one), self.named_values(two));
        match (named, other_named) {
            (Some(a), Some(b)) => return self.same_assignments(&a, &b),
            (Some(a), None) => return self.has_values(&a, two) || self.is_tuple_of(&a, two),
            (None, Some(b)) => return self.has_values(&b, one) || self.is_tuple_of(&b, one),
            (None, None) => {}
        }
        if one.has_plus_minus() || two.has_plus_minus() {
            return self.with_signs(one, two);
        }
        match (one, two) {
            (E::List(items) | E::Set(items), E::List(others) | E::Set(others)) => self.same_items(items, others),
            (E::Sequence { items, .. }, E::List(others)) | (E::List(others), E::Sequence { items, .. }) => {
                self.same_order(items, others)
            }
            (E::Set(items), other) | (other, E::Set(items)) if items.len() == 1 && !is_collection(other) => {
                self.equal(&items[0], other)
            }
            // `x \in \{1, 2\}`, `x = 1, 2`
            (E::Relation(..), other) => self.is_value(one, other),
            (other, E::Relation(..)) => self.is_value(two, other),
            _ => false,
        }
    }

    /// The names and values of a list in which every item is an equation with a name on its left.
    fn named_values(&mut self, list: &Expression) -> Option<Vec<(String, Vec<Expression>)>> {
        let Expression::List(items) = list else { return None };
        items
            .iter()
            .map(|item| {
                let assignment = Assignment::of(item, &mut self.scalars)?;
                Some((assignment.name.to_owned(), assignment.values.into_iter().cloned().collect()))
            })
            .collect()
    }

    fn same_assignments(&mut self, one: &[Named], two: &[Named]) -> bool {
        if one.len() > MOST_ITEMS || two.len() > MOST_ITEMS {
            return false;
        }
        // Solutions of one unknown, numbered on one side only, have no order.
        if is_one_unknown(one) && is_one_unknown(two) && !(is_numbered(one) && is_numbered(two)) {
            return unknown(one) == unknown(two) && self.same_values(one, two);
        }
        let mut includes = |these: &[Named], those: &[Named]| {
            these.iter().all(|(name, values)| {
                those.iter().any(|(n, others)| {
                    is_same_name(name, n) && values.iter().any(|v| others.iter().any(|o| self.equal(v, o)))
                })
            })
        };
        includes(one, two) && includes(two, one)
    }

    fn same_values(&mut self, one: &[Named], two: &[Named]) -> bool {
        let flat = |named: &[Named]| named.iter().filter_map(|(_, values)| values.first().cloned()).collect::<Vec<_>>();
        let (one, two) = (flat(one), flat(two));
        self.same_items(&one, &two)
    }

    /// Whether named values are what a list, a set or a tuple without names has.
    fn has_values(&mut self, named: &[Named], other: &Expression) -> bool {
        use Expression as E;
        if named.len() > MOST_ITEMS {
            return false;
        }
        let first = |(_, values): &Named| values.first().cloned().unwrap_or_else(|| E::List(Vec::new()));
        let is_list = matches!(other, E::List(_) | E::Set(_) | E::PlusMinus(..) | E::Relation(..));
        if is_one_unknown(named) && is_list {
            let values: Vec<E> = named.iter().map(first).collect();
            return match other {
                // `x = \pm 2`, `x \in \{1, 2\}`
                E::Relation(name, _) => {
                    let is_named = matches!(&**name, E::Symbol(n) if unknown(named) == *n);
                    is_named && self.is_value(other, &E::Set(values))
                }
                other => self.equal(&E::Set(values), other),
            };
        }
        // Several unknowns: in the order of their names.
        let mut sorted: Vec<&Named> = named.iter().collect();
        sorted.sort_by_key(|named| order(&named.0));
        let values: Vec<E> = sorted.into_iter().map(first).collect();
        match other {
            E::Sequence { open: '(', items, close: ')' } | E::List(items) => self.same_order(&values, items),
            _ => false,
        }
    }

    /// `a = 1, b = 2` and `(a, b) = (1, 2)`.
    fn is_tuple_of(&mut self, named: &[Named], other: &Expression) -> bool {
        let names = named.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(",");
        let Some(Assignment { name, values }) = Assignment::of(other, &mut self.scalars) else { return false };
        let items: Option<Vec<Expression>> = named.iter().map(|(_, values)| values.first().cloned()).collect();
        match (values.as_slice(), items) {
            ([Expression::Sequence { items: others, .. }], Some(items)) => {
                let others = others.clone();
                name == format!("({names})") && self.same_order(&items, &others)
            }
            _ => false,
        }
    }

    /// Both choices of every `±`.
    fn with_signs(&mut self, one: &Expression, two: &Expression) -> bool {
        if one.size() + two.size() > MOST_SIGNED {
            return false;
        }
        let (one, two) = (both_signs(one), both_signs(two));
        self.same_items(&one, &two)
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

    /// `1:2:3` and `2:4:6`.
    fn same_ratio(&mut self, terms: &[Expression], others: &[Expression]) -> bool {
        let product = |a: &Expression, b: &Expression| Expression::Product(vec![a.clone(), b.clone()]);
        terms.len() == others.len()
            && (1..terms.len())
                .all(|i| self.scalars.equal(&product(&terms[0], &others[i]), &product(&terms[i], &others[0])))
    }

    /// Whether `other` has the letters of the unit as variables: `100 m/s` where no unit was seen.
    fn is_product_of_letters(&mut self, value: &Expression, unit: &Unit, other: &Expression) -> bool {
        let Some(letters) = unit.letters().filter(|_| !is_collection(other) && !is_collection(value)) else {
            return false;
        };
        let power = |(letter, exponent): &(String, i32)| {
            let size = super::parse::whole_number(i64::from(exponent.unsigned_abs()));
            let power = Expression::Power(Box::new(Expression::Symbol(letter.clone())), Box::new(size));
            let one = super::parse::whole_number(1);
            if *exponent < 0 { Expression::Quotient(Box::new(one), Box::new(power)) } else { power }
        };
        let factors = std::iter::once(value.clone()).chain(letters.iter().map(power)).collect();
        self.scalars.equal(&Expression::Product(factors), other)
    }
}

type Named = (String, Vec<Expression>);

/// Whether all names are one, or one letter with different numbers.
fn is_one_unknown(named: &[Named]) -> bool {
    let name = unknown(named);
    let is_numbered = is_numbered(named);
    named.iter().all(|(n, _)| if is_numbered { indexed(n).is_some_and(|(base, _)| base == name) } else { *n == name })
}

fn is_numbered(named: &[Named]) -> bool {
    named.iter().all(|(name, _)| indexed(name).is_some())
}

fn unknown(named: &[Named]) -> String {
    let name = named.first().map_or("", |(name, _)| name.as_str());
    let base = if is_numbered(named) { indexed(name).map_or(name, |(base, _)| base) } else { name };
    base.to_owned()
}

/// By letter, then by number.
fn order(name: &str) -> (String, u32) {
    indexed(name).map_or_else(|| (name.to_owned(), 0), |(base, index)| (base.to_owned(), index))
}

fn chain(relation: &Expression) -> Option<(Vec<Expression>, Vec<Relation>)> {
    let Expression::Relation(first, rest) = relation else { return None };
    let sides = std::iter::once(first.as_ref().clone()).chain(rest.iter().map(|(_, side)| side.clone())).collect();
    Some((sides, rest.iter().map(|(r, _)| *r).collect()))
}

fn is_collection(expression: &Expression) -> bool {
    use Expression as E;
    matches!(
        expression,
        E::Sequence { .. }
            | E::Set(_)
            | E::List(_)
            | E::Union(_)
            | E::Intersection(_)
            | E::Difference(..)
            | E::Domain(_)
            | E::Matrix(_)
            | E::Relation(..)
            | E::Text(_)
            | E::Clock(_)
    )
}

fn both_signs(expression: &Expression) -> Vec<Expression> {
    match expression {
        Expression::List(items) | Expression::Set(items) => items.iter().flat_map(both_signs).collect(),
        one if one.has_plus_minus() => vec![one.with_sign(true), one.with_sign(false)],
        one => vec![one.clone()],
    }
}

/// Whether two times are one; without a.m. or p.m. on one side either will do, and 22:30 is 10:30 p.m.
fn is_same_time(one: Clock, two: Clock) -> bool {
    let hour = |clock: Clock| match clock.is_afternoon {
        Some(is_afternoon) => clock.hour % 12 + if is_afternoon { 12 } else { 0 },
        None => clock.hour,
    };
    let is_same_hour = if one.is_afternoon.is_some() == two.is_afternoon.is_some() {
        hour(one) == hour(two)
    } else {
        one.hour == two.hour || hour(one) == hour(two)
    };
    is_same_hour && one.minute == two.minute && one.second.unwrap_or(0) == two.second.unwrap_or(0)
}

/// `3:40` beside something that is no time.
fn as_ratio(clock: Clock) -> Option<Expression> {
    let number = |n: u32| super::parse::whole_number(i64::from(n));
    (clock.is_afternoon.is_none() && clock.second.is_none())
        .then(|| Expression::Ratio(vec![number(clock.hour), number(clock.minute)]))
}
