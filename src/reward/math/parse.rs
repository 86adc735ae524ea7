//! The grammar of answers: recursive descent over the tokens of `lex`.
//!
//! Lenient where models are: `\frac12`, `2^10`, `3 1/2`, units and words after a value, missing multiplication signs.
//! Whatever does not fit is an error, and the answer is then compared as text.

mod atom;
mod number;
mod unit;

use super::expression::{Expression, Function, Relation};
use super::lex::{Kind, Token};
use atom::is_symbol;
use number::{mixed, whole};

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
    let mut parser = Parser { tokens, at: 0, depth: 0, wraps: 0, in_bars: false };
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

impl Parser {
    fn peek(&self) -> Option<&Kind> {
        self.tokens.get(self.at).map(|t| &t.kind)
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
        let mut items = vec![self.item()?];
        while self.eat_separator() {
            items.push(self.item()?);
        }
        if items.len() > 1 {
            return Ok(Expression::List(spread_relation(items)));
        }
        items.pop().ok_or(Failure::NotMathematics)
    }

    fn eat_separator(&mut self) -> bool {
        let start = self.at;
        while self.eat_sign(',') || self.eat_sign(';') || self.eat_joining_word() {}
        self.at > start && self.at < self.tokens.len()
    }

    fn eat_joining_word(&mut self) -> bool {
        let joins = match self.peek() {
            Some(Kind::Text(word) | Kind::Word(word)) => matches!(word.trim_matches(','), "and" | "or" | ""),
            Some(Kind::Command(name)) => matches!(name.as_str(), "land" | "lor"),
            _ => false,
        };
        self.at += usize::from(joins);
        joins
    }

    /// A chain of relations, or what stands alone.
    fn item(&mut self) -> Parsed {
        let first = self.union()?;
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
                "eq" | "approx" | "equiv" | "simeq" => Relation::Equal,
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
        let mut parts = vec![self.sum()?];
        while self.eat_command("cup") {
            parts.push(self.sum()?);
        }
        if parts.len() > 1 { Ok(Expression::Union(parts)) } else { parts.pop().ok_or(Failure::NotMathematics) }
    }

    fn sum(&mut self) -> Parsed {
        self.nested(|p| {
            let mut sum =
                if p.is_command("pm") || p.is_command("mp") { Expression::Number(whole(0)) } else { p.product()? };
            loop {
                if p.eat_sign('+') {
                    sum = add(sum, p.product()?);
                } else if p.eat_sign('-') {
                    sum = add(sum, Expression::Negative(Box::new(p.product()?)));
                } else if p.is_command("pm") || p.is_command("mp") {
                    let is_minus_plus = p.is_command("mp");
                    p.at += 1;
                    let change = p.product()?;
                    sum = p.wrap(Expression::PlusMinus(Box::new(sum), Box::new(change), is_minus_plus))?;
                } else {
                    return Ok(sum);
                }
            }
        })
    }

    fn product(&mut self) -> Parsed {
        let mut result = self.signed()?;
        loop {
            if self.eat_sign('*') || self.eat_command("times") || self.eat_command("cdot") {
                result = multiply(result, self.signed()?);
            } else if self.eat_sign('/') || self.eat_sign(':') || self.eat_command("div") {
                if self.is_unit() {
                    self.skip_units(); // 5 km/h
                } else {
                    let below = self.signed()?;
                    result = self.wrap(Expression::Quotient(Box::new(result), Box::new(below)))?;
                }
            } else if self.is_unit() && (has_number(&result) || matches!(self.peek(), Some(Kind::Text(_)))) {
                if self.is_percent_word() {
                    self.at += 1;
                    result = self.wrap(Expression::Percent(Box::new(result)))?;
                } else {
                    self.skip_units();
                }
            } else if self.starts_factor() {
                result = self.juxtaposed(result)?;
            } else {
                return Ok(result);
            }
        }
    }

    /// A factor without a multiplication sign before it: a mixed number or a product.
    fn juxtaposed(&mut self, left: Expression) -> Parsed {
        let is_whole = matches!(&left, Expression::Number(n) if n.value.is_integer() && !n.is_decimal);
        let before = self.at;
        let is_number = matches!(self.peek(), Some(Kind::Number(_)));
        let right = self.power()?;
        if is_number {
            // `3 1/2`: a whole number, a space, a fraction of two whole numbers. Any other number here is an error.
            if !is_whole || !self.tokens[before].is_spaced || !self.eat_sign('/') {
                return Err(Failure::NotMathematics);
            }
            let below = self.power()?;
            let (Expression::Number(above), Expression::Number(below)) = (right, below) else {
                return Err(Failure::NotMathematics);
            };
            return mixed(left, above, below);
        }
        match right {
            Expression::Quotient(above, below) if is_whole => match (*above, *below) {
                (Expression::Number(above), Expression::Number(below)) => mixed(left, above, below),
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
                let inner = if p.starts_factor() { p.juxtaposed(inner)? } else { inner };
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
            Some(Kind::Word(word)) => !matches!(word.as_str(), "and" | "or"),
            Some(Kind::Sign('|')) => !self.in_bars,
            Some(Kind::Command(name)) => {
                is_symbol(name)
                    || Function::named(name).is_some()
                    || matches!(name.as_str(), "frac" | "sqrt" | "log" | "binom" | "lfloor" | "lceil" | "infty")
            }
            _ => false,
        }
    }

    /// A primary with its postfixes.
    fn power(&mut self) -> Parsed {
        let mut base = self.primary()?;
        loop {
            if self.eat_sign('^') {
                if self.eat_degree() {
                    continue;
                }
                let exponent = self.nested(Self::exponent)?;
                base = self.wrap(Expression::Power(Box::new(base), Box::new(exponent)))?;
            } else if self.eat_command("circ") {
            } else if self.eat_sign('!') {
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

    /// `^\circ` and `^{\circ}`, with an optional C or F.
    fn eat_degree(&mut self) -> bool {
        let start = self.at;
        let is_braced = self.eat_sign('{');
        if self.eat_command("circ") && (!is_braced || self.eat_sign('}')) {
            if matches!(self.peek(), Some(Kind::Word(w) | Kind::Text(w)) if matches!(w.as_str(), "C" | "F")) {
                self.at += 1;
            }
            return true;
        }
        self.at = start;
        false
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
    if let Expression::Relation(_, rest) = &mut items[0]
        && rest.len() == 1
        && matches!(rest[0].0, Relation::Equal | Relation::In)
        && let Some((_, side)) = rest.pop()
    {
        items[0] = side;
    }
    items
}

/// Words count something only after a number; after letters they make a sentence.
fn has_number(expression: &Expression) -> bool {
    let mut found = false;
    expression.walk(&mut |e| found |= matches!(e, Expression::Number(_)));
    found
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
