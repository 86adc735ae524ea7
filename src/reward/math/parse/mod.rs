//! The grammar of answers: recursive descent over the tokens of `lex`.
//!
//! Lenient where models are: `\frac12`, `2^10`, `3 1/2`, units and words after a value, missing multiplication signs.
//! Whatever does not fit is an error, and the answer is then compared as text.

mod atom;
mod clock;
mod command;
mod name;
mod number;
mod unit;

use super::expression::{Expression, Function, Relation};
use super::lex::{Kind, Token};
use number::{mixed, whole};

/// A whole number as an expression.
pub(super) fn whole_number(value: i64) -> Expression {
    Expression::Number(whole(value))
}

/// Deepest nesting.
const DEEPEST: usize = 48;
/// Most operations of one answer that nest to the left, as in `1/2/3` or `5!!!`.
const MOST_WRAPS: usize = 128;

/// Why a text is not read as mathematics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// It is not.
    NotMathematics,
    /// It is beyond a limit.
    TooLarge,
}

type Parsed = Result<Expression, Failure>;

/// Reads a whole answer.
pub(super) fn parse(tokens: Vec<Token>) -> Parsed {
    if clock::is_date(&tokens) {
        return Err(Failure::NotMathematics);
    }
    let mut parser = Parser { tokens, at: 0, depth: 0, wraps: 0, in_bars: false };
    // `= 5` and `\approx 5` go on from a left side that stands outside the box.
    while parser.eat_sign('=') || parser.eat_command("approx") {}
    let answer = parser.answer()?;
    if parser.at < parser.tokens.len() { Err(Failure::NotMathematics) } else { Ok(answer) }
}

struct Parser {
    tokens: Vec<Token>,
    at: usize,
    depth: usize,
    /// Operations so far that put what stands left of them one level deeper.
    wraps: usize,
    /// Inside `|...|`, where a bar closes and does not open.
    in_bars: bool,
}

/// What stands between two items.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Joint {
    Comma,
    And,
    Or,
}

impl Parser {
    fn peek(&self) -> Option<&Kind> {
        self.peek_at(0)
    }

    fn peek_at(&self, ahead: usize) -> Option<&Kind> {
        self.tokens.get(self.at + ahead).map(|t| &t.kind)
    }

    fn is_sign(&self, sign: char) -> bool {
        self.peek() == Some(&Kind::Sign(sign))
    }

    fn is_command(&self, name: &str) -> bool {
        matches!(self.peek(), Some(Kind::Command(n)) if n == name)
    }

    fn eat_sign(&mut self, sign: char) -> bool {
        let found = self.is_sign(sign);
        self.at += usize::from(found);
        found
    }

    fn eat_command(&mut self, name: &str) -> bool {
        let found = self.is_command(name);
        self.at += usize::from(found);
        found
    }

    fn expect_sign(&mut self, sign: char) -> Result<(), Failure> {
        if self.eat_sign(sign) { Ok(()) } else { Err(Failure::NotMathematics) }
    }

    fn nested(&mut self, read: impl FnOnce(&mut Self) -> Parsed) -> Parsed {
        if self.depth >= DEEPEST {
            return Err(Failure::TooLarge);
        }
        self.depth += 1;
        let result = read(self);
        self.depth -= 1;
        result
    }

    fn wrap(&mut self, wrapped: Expression) -> Parsed {
        self.wraps += 1;
        if self.wraps > MOST_WRAPS { Err(Failure::TooLarge) } else { Ok(wrapped) }
    }

    /// `item, item and item`: one item stands for itself.
    fn answer(&mut self) -> Parsed {
        let (mut items, mut joints) = (vec![self.item()?], Vec::new());
        while let Some(joint) = self.eat_separator() {
            items.push(self.item()?);
            joints.push(joint);
        }
        if items.len() == 1 {
            return items.pop().ok_or(Failure::NotMathematics);
        }
        let signs = |e: &Expression| -> Vec<Relation> {
            match e {
                Expression::Relation(_, rest) => rest.iter().map(|(r, _)| *r).collect(),
                _ => Vec::new(),
            }
        };
        let is_order = |e: &Expression| signs(e).iter().any(|r| r.is_order());
        let is_exclusion = |e: &Expression| signs(e).as_slice() == [Relation::NotEqual];
        let is_or = joints.iter().all(|j| *j == Joint::Or);
        if items.iter().all(|e| is_order(e) || is_exclusion(e)) && is_or {
            return Ok(Expression::Union(items));
        }
        if items.iter().all(|e| is_order(e) || is_exclusion(e)) && joints.iter().all(|j| *j == Joint::And)
            || items.iter().all(is_exclusion)
        {
            return Ok(Expression::Intersection(items));
        }
        if !is_or && let Some(whole) = unit::compound(&items) {
            return Ok(whole);
        }
        Ok(Expression::List(spread_relation(items)))
    }

    /// Takes commas and joining words; `None` if there are none or nothing follows them.
    fn eat_separator(&mut self) -> Option<Joint> {
        let mut joint = None;
        loop {
            let next =
                if self.eat_sign(',') || self.eat_sign(';') { Some(Joint::Comma) } else { self.eat_joining_word() };
            match next {
                None => break,
                Some(Joint::Comma) => joint = joint.or(Some(Joint::Comma)),
                word => joint = word,
            }
        }
        let is_over = match self.peek() {
            None | Some(Kind::Sign('&')) => true,
            Some(Kind::Command(name)) => matches!(name.as_str(), "newline" | "end"),
            _ => false,
        };
        joint.filter(|_| !is_over)
    }

    fn eat_joining_word(&mut self) -> Option<Joint> {
        let joint = self.joining_word()?;
        self.at += 1;
        Some(joint)
    }

    fn joining_word(&self) -> Option<Joint> {
        match self.peek()? {
            Kind::Text(word) | Kind::Word(word) => match word.trim_matches(|c: char| c == ',' || c.is_whitespace()) {
                "and" | "和" | "与" | "且" | "及" => Some(Joint::And),
                "or" | "或" | "或者" => Some(Joint::Or),
                "" => Some(Joint::Comma),
                _ => None,
            },
            Kind::Command(name) => match name.as_str() {
                "land" => Some(Joint::And),
                "lor" => Some(Joint::Or),
                _ => None,
            },
            _ => None,
        }
    }

    /// A chain of relations, or what stands alone.
    fn item(&mut self) -> Parsed {
        if let Some(clock) = self.clock() {
            return Ok(clock);
        }
        let first = match self.named_left_side() {
            Some(name) => Expression::Symbol(name),
            None => self.union()?,
        };
        let mut rest = Vec::new();
        while let Some(relation) = self.eat_relation() {
            rest.push((relation, self.union()?));
        }
        if rest.is_empty() { Ok(first) } else { Ok(Expression::Relation(Box::new(first), rest)) }
    }

    fn eat_relation(&mut self) -> Option<Relation> {
        let relation = match self.peek()? {
            Kind::Sign('=') => Relation::Equal,
            Kind::Sign('<') => Relation::Less,
            Kind::Sign('>') => Relation::Greater,
            Kind::Command(name) => match name.as_str() {
                "eq" | "equiv" => Relation::Equal,
                "approx" | "simeq" => Relation::Approximately,
                "ne" => Relation::NotEqual,
                "le" => Relation::LessOrEqual,
                "ge" => Relation::GreaterOrEqual,
                "in" => Relation::In,
                _ => return None,
            },
            _ => return None,
        };
        self.at += 1;
        Some(relation)
    }

    fn union(&mut self) -> Parsed {
        let mut result = self.sum()?;
        loop {
            let right = if self.eat_command("cup") {
                match &mut result {
                    Expression::Union(parts) => parts.push(self.sum()?),
                    _ => result = Expression::Union(vec![result, self.sum()?]),
                }
                continue;
            } else if self.eat_command("cap") {
                Expression::Intersection(vec![result, self.sum()?])
            } else if self.eat_command("setminus") {
                Expression::Difference(Box::new(result), Box::new(self.sum()?))
            } else {
                return Ok(result);
            };
            result = self.wrap(right)?;
        }
    }

    fn sum(&mut self) -> Parsed {
        self.nested(|p| {
            let mut sum =
                if p.is_command("pm") || p.is_command("mp") { Expression::Number(whole(0)) } else { p.ratio()? };
            loop {
                if p.eat_sign('+') {
                    sum = add(sum, p.ratio()?);
                } else if p.eat_sign('-') {
                    sum = add(sum, Expression::Negative(Box::new(p.ratio()?)));
                } else if p.is_command("pm") || p.is_command("mp") {
                    let is_minus_plus = p.is_command("mp");
                    p.at += 1;
                    let change = p.ratio()?;
                    sum = p.wrap(Expression::PlusMinus(Box::new(sum), Box::new(change), is_minus_plus))?;
                } else if matches!(sum, Expression::Quantity(..)) && matches!(p.peek(), Some(Kind::Number(_))) {
                    // `5 hours 30 minutes`
                    let next = p.product()?;
                    sum = unit::compound(&[sum, next]).ok_or(Failure::NotMathematics)?;
                } else {
                    return Ok(sum);
                }
            }
        })
    }

    fn ratio(&mut self) -> Parsed {
        let first = self.product()?;
        if !self.is_sign(':') {
            return Ok(first);
        }
        let mut terms = vec![first];
        while self.eat_sign(':') {
            terms.push(self.product()?);
        }
        Ok(Expression::Ratio(terms))
    }

    fn product(&mut self) -> Parsed {
        let mut result = self.signed()?;
        loop {
            if matches!(result, Expression::Text(_)) {
                return Ok(result); // words are no factor
            }
            if self.eat_sign('*') || self.eat_command("times") || self.eat_command("cdot") {
                result = multiply(result, self.signed()?);
            } else if let Some(measured) = self.measured(&result)? {
                result = self.wrap(measured)?;
            } else if self.eat_sign('/') || self.eat_command("div") {
                let below = self.signed()?;
                result = self.wrap(Expression::Quotient(Box::new(result), Box::new(below)))?;
            } else if matches!(result, Expression::Quantity(..)) {
                return Ok(result);
            } else if self.is_letter_times() {
                self.at += 1;
                result = multiply(result, self.signed()?);
            } else if self.starts_factor() {
                result = self.juxtaposed(result)?;
            } else {
                return Ok(result);
            }
        }
    }

    /// The letter x between two numbers with spaces around it, as in `3 x 10^8`.
    fn is_letter_times(&self) -> bool {
        let is_spaced = |ahead: usize| self.tokens.get(self.at + ahead).is_some_and(|t| t.is_spaced);
        let before = self.at.checked_sub(1).map(|at| &self.tokens[at].kind);
        matches!(self.peek(), Some(Kind::Word(w)) if w == "x")
            && is_spaced(0)
            && is_spaced(1)
            && matches!(before, Some(Kind::Number(_)))
            && matches!(self.peek_at(1), Some(Kind::Number(_)))
    }

    /// A factor without a multiplication sign before it: a mixed number or a product.
    fn juxtaposed(&mut self, left: Expression) -> Parsed {
        let is_whole = matches!(&left, Expression::Number(n) if n.value.is_integer() && !n.is_decimal);
        let before = self.at;
        let is_number = matches!(self.peek(), Some(Kind::Number(_)));
        let is_after_factorial = before > 0 && self.tokens[before - 1].kind == Kind::Sign('!');
        let right = self.power()?;
        if is_number && !is_after_factorial {
            // `3 1/2`: a whole number, a space, a fraction of two whole numbers. Any other number here is an error.
            if !is_whole || !self.tokens[before].is_spaced || !self.eat_sign('/') {
                return Err(Failure::NotMathematics);
            }
            let (below, is_percent) = without_percent(self.power()?);
            let (Expression::Number(above), Expression::Number(below)) = (right, below) else {
                return Err(Failure::NotMathematics);
            };
            let number = mixed(left, above, below).ok_or(Failure::NotMathematics)?;
            return Ok(if is_percent { Expression::Percent(Box::new(number)) } else { number });
        }
        if is_whole
            && let Expression::Percent(inner) = &right
            && let Expression::Quotient(above, below) = &**inner
            && let (Expression::Number(above), Expression::Number(below)) = (&**above, &**below)
            && let Some(number) = mixed(left.clone(), above.clone(), below.clone())
        {
            return Ok(Expression::Percent(Box::new(number)));
        }
        match right {
            Expression::Quotient(above, below) if is_whole => match (*above, *below) {
                (Expression::Number(above), Expression::Number(below)) => {
                    let product = |left| {
                        let fraction = Expression::Quotient(
                            Box::new(Expression::Number(above.clone())),
                            Box::new(Expression::Number(below.clone())),
                        );
                        multiply(left, fraction)
                    };
                    Ok(mixed(left.clone(), above.clone(), below.clone()).unwrap_or_else(|| product(left)))
                }
                (above, below) => Ok(multiply(left, Expression::Quotient(Box::new(above), Box::new(below)))),
            },
            right => Ok(multiply(left, right)),
        }
    }

    fn signed(&mut self) -> Parsed {
        if self.eat_sign('-') {
            // `-3^2` is -(3^2), and `-3\frac12` is -(3 + 1/2): the sign waits for the whole product.
            return self.nested(|p| {
                let inner = p.signed()?;
                let is_measured = p.is_unit_next(&inner);
                let is_factor = !is_measured && !p.is_letter_times() && p.starts_factor();
                let inner = if is_factor { p.juxtaposed(inner)? } else { inner };
                Ok(Expression::Negative(Box::new(inner)))
            });
        }
        if self.eat_sign('+') {
            return self.nested(Self::signed);
        }
        self.power()
    }

    fn starts_factor(&self) -> bool {
        match self.peek() {
            Some(Kind::Number(_) | Kind::Sign('(' | '{')) => true,
            Some(Kind::Word(_)) => self.joining_word().is_none(),
            Some(Kind::Sign('|')) => !self.in_bars,
            Some(Kind::Command(name)) => command::starts_factor(name),
            _ => false,
        }
    }

    /// A primary with its postfixes.
    fn power(&mut self) -> Parsed {
        let mut base = self.primary()?;
        loop {
            if self.is_sign('^') && self.is_degree_exponent() {
                self.eat_degree_exponent();
                base = self.degrees(base)?;
            } else if self.eat_sign('^') {
                let exponent = self.nested(Self::exponent)?;
                base = match (base, exponent) {
                    (Expression::Matrix(rows), Expression::Symbol(name)) if matches!(name.as_str(), "T" | "top") => {
                        let columns = rows.first().map_or(0, Vec::len);
                        let row = |c: usize| rows.iter().map(|r| r[c].clone()).collect();
                        Expression::Matrix((0..columns).map(row).collect())
                    }
                    (base, exponent) => self.wrap(Expression::Power(Box::new(base), Box::new(exponent)))?,
                };
            } else if self.eat_command("circ") {
                base = self.degrees(base)?;
            } else if self.is_sign('\'') {
                let Expression::Symbol(name) = base else { return Err(Failure::NotMathematics) };
                self.at += 1;
                base = Expression::Symbol(name + "'");
            } else if self.eat_sign('!') {
                // `5!!` is another function.
                if self.is_sign('!') {
                    return Err(Failure::NotMathematics);
                }
                base = self.wrap(Expression::Call(Function::Factorial, Box::new(base)))?;
            } else if self.eat_sign('%') {
                base = self.wrap(Expression::Percent(Box::new(base)))?;
            } else if matches!(base, Expression::Number(_)) && self.eat_sign('_') {
                base = self.number_in_base(&base)?;
            } else {
                return Ok(base);
            }
        }
    }

    fn exponent(&mut self) -> Parsed {
        if self.is_sign('{') {
            return self.group();
        }
        if self.eat_sign('-') {
            return Ok(Expression::Negative(Box::new(self.nested(Self::exponent)?)));
        }
        // Models write 2^10 and mean 2^{10}, and 9^9^9 associates to the right.
        let exponent = self.primary()?;
        if self.eat_sign('^') {
            return Ok(Expression::Power(Box::new(exponent), Box::new(self.nested(Self::exponent)?)));
        }
        Ok(exponent)
    }
}

/// `x = 1, 2` means that x is 1 or 2: the left side of the first relation is dropped where only it has one.
fn spread_relation(mut items: Vec<Expression>) -> Vec<Expression> {
    let later_has_relation = items[1..].iter().any(|i| matches!(i, Expression::Relation(..)));
    if later_has_relation {
        return items;
    }
    if let Expression::Relation(first, rest) = &mut items[0]
        && matches!(**first, Expression::Symbol(_) | Expression::Text(_))
        && rest.len() == 1
        && matches!(rest[0].0, Relation::Equal | Relation::In)
        && let Some((_, side)) = rest.pop()
    {
        items[0] = side;
    }
    items
}

/// What so many percent are of, and whether they are percent.
fn without_percent(expression: Expression) -> (Expression, bool) {
    match expression {
        Expression::Percent(inner) => (*inner, true),
        other => (other, false),
    }
}

/// Words count something only after a number; after letters they make a sentence.
fn has_number(expression: &Expression) -> bool {
    expression.any(&|e| matches!(e, Expression::Number(_)))
}

fn add(left: Expression, right: Expression) -> Expression {
    match left {
        Expression::Sum(mut terms) => {
            terms.push(right);
            Expression::Sum(terms)
        }
        left => Expression::Sum(vec![left, right]),
    }
}

fn multiply(left: Expression, right: Expression) -> Expression {
    match left {
        Expression::Product(mut factors) => {
            factors.push(right);
            Expression::Product(factors)
        }
        left => Expression::Product(vec![left, right]),
    }
}
