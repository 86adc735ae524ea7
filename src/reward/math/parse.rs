//! The grammar of answers: recursive descent over the tokens of `lex`.
//!
//! Lenient where models are: `\frac12`, `2^10`, `3 1/2`, units and words after a value, missing multiplication signs.
//! Whatever does not fit is an error, and the answer is then compared as text.

use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::{One, Zero};

use super::evaluate::MOST_BITS;
use super::expression::{Expression, Function, Number, Relation};
use super::lex::{Kind, Token, tokens};
use super::text;

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
pub(super) fn parse(text: &str) -> Parsed {
    let tokens = tokens(text::without_decoration(text)).ok_or(Failure::TooLarge)?;
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
            Some(Kind::Number(_)) => true,
            Some(Kind::Word(word)) => !matches!(word.as_str(), "and" | "or"),
            Some(Kind::Sign('(' | '{')) => true,
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
                base = self.in_base(&base)?;
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

    /// A number in another base: `1010_2`.
    fn in_base(&mut self, digits: &Expression) -> Parsed {
        let base = self.argument()?;
        let (Expression::Number(digits), Expression::Number(base)) = (digits, base) else {
            return Err(Failure::NotMathematics);
        };
        let radix =
            u32::try_from(base.value.to_integer()).ok().filter(|b| base.value.is_integer() && (2..=10).contains(b));
        let value = radix
            .filter(|_| digits.value.is_integer())
            .and_then(|radix| BigInt::parse_bytes(digits.value.to_integer().to_string().as_bytes(), radix));
        Ok(Expression::Number(Number {
            value: value.ok_or(Failure::NotMathematics)?.into(),
            is_decimal: false,
            last_place: 0,
            significant: 1,
        }))
    }

    fn group(&mut self) -> Parsed {
        self.nested(|p| {
            p.expect_sign('{')?;
            let inner = p.answer()?;
            p.expect_sign('}')?;
            Ok(inner)
        })
    }

    /// The argument of a command: a group, or one digit, letter or command.
    fn argument(&mut self) -> Parsed {
        if self.is_sign('{') {
            return self.group();
        }
        match self.tokens.get_mut(self.at).map(|t| &mut t.kind) {
            Some(Kind::Number(text)) if text.len() > 1 => {
                let first = text.remove(0);
                number(&first.to_string())
            }
            Some(Kind::Word(word)) if word.chars().count() > 1 => {
                let first = word.remove(0);
                Ok(Expression::Symbol(first.to_string()))
            }
            _ => self.nested(Self::primary),
        }
    }

    fn primary(&mut self) -> Parsed {
        let kind = self.peek().cloned().ok_or(Failure::NotMathematics)?;
        match kind {
            Kind::Number(text) => {
                self.at += 1;
                number(&text)
            }
            Kind::Word(word) => {
                self.at += 1;
                self.word(&word)
            }
            Kind::Text(text) => {
                self.at += 1;
                parse_text(&text)
            }
            Kind::Sign('{') => self.group(),
            Kind::Sign(open @ ('(' | '[')) => self.bracket(open),
            Kind::Sign('|') if !self.in_bars => self.bars(),
            Kind::Command(name) => {
                self.at += 1;
                self.command(&name)
            }
            Kind::Sign(_) => Err(Failure::NotMathematics),
        }
    }

    fn bracket(&mut self, open: char) -> Parsed {
        self.at += 1;
        let outside = std::mem::replace(&mut self.in_bars, false);
        let inner = self.nested(Self::answer)?;
        self.in_bars = outside;
        let close = match self.peek() {
            Some(Kind::Sign(close @ (')' | ']'))) => *close,
            _ => return Err(Failure::NotMathematics),
        };
        self.at += 1;
        match inner {
            Expression::List(items) => Ok(Expression::Sequence { open, items, close }),
            inner if (open == '(') == (close == ')') => Ok(inner),
            _ => Err(Failure::NotMathematics),
        }
    }

    fn bars(&mut self) -> Parsed {
        self.at += 1;
        self.in_bars = true;
        let inner = self.nested(Self::sum);
        self.in_bars = false;
        let inner = inner?;
        self.expect_sign('|')?;
        Ok(Expression::Call(Function::Absolute, Box::new(inner)))
    }

    /// Letters: a function, a constant, or a product of one-letter variables.
    fn word(&mut self, word: &str) -> Parsed {
        const MOST_VARIABLES: usize = 3;
        match word {
            "pi" | "Pi" => return Ok(Expression::Symbol("pi".to_owned())),
            "infinity" | "Infinity" | "inf" | "oo" => return Ok(Expression::Symbol("infinity".to_owned())),
            "sqrt" => return Ok(Expression::Root(Box::new(self.argument()?), 2)),
            "log" => return self.logarithm(),
            _ => {}
        }
        if let Some(function) = Function::named(word) {
            return self.call(function);
        }
        let letters = word.chars().count();
        if letters > MOST_VARIABLES || (letters > 1 && text::is_word(word)) {
            return Err(Failure::NotMathematics);
        }
        let mut factors: Vec<Expression> = word.chars().map(|c| Expression::Symbol(c.to_string())).collect();
        if self.is_sign('_') {
            let last = factors.pop().ok_or(Failure::NotMathematics)?;
            factors.push(self.subscript(last)?);
        }
        // `ab^2` is a·b^2: the exponent belongs to the last letter.
        while factors.len() > 1 && self.is_sign('^') {
            self.at += 1;
            let exponent = self.nested(Self::exponent)?;
            let last = factors.pop().ok_or(Failure::NotMathematics)?;
            factors.push(Expression::Power(Box::new(last), Box::new(exponent)));
        }
        // `f(x)` as the left side of an equation is a name.
        if letters == 1 && matches!(word, "f" | "g" | "h" | "P" | "p" | "Q" | "q") && self.names_a_function() {
            return Ok(Expression::Symbol(format!("{word}()")));
        }
        Ok(if factors.len() > 1 { Expression::Product(factors) } else { factors.remove(0) })
    }

    /// Whether `(letter) =` comes next; takes the bracket if so.
    fn names_a_function(&mut self) -> bool {
        let kinds: Vec<&Kind> = self.tokens[self.at..].iter().take(4).map(|t| &t.kind).collect();
        let found = matches!(kinds.as_slice(), [Kind::Sign('('), Kind::Word(w), Kind::Sign(')'), Kind::Sign('=')]
            if w.chars().count() == 1);
        self.at += if found { 3 } else { 0 };
        found
    }

    fn subscript(&mut self, base: Expression) -> Parsed {
        let Expression::Symbol(name) = base else { return Err(Failure::NotMathematics) };
        self.expect_sign('_')?;
        let start = self.at;
        self.argument()?;
        let mut index = String::new();
        for token in &self.tokens[start..self.at] {
            match &token.kind {
                Kind::Number(text) | Kind::Word(text) | Kind::Command(text) | Kind::Text(text) => index.push_str(text),
                Kind::Sign('{' | '}') => {}
                Kind::Sign(sign) => index.push(*sign),
            }
        }
        Ok(Expression::Symbol(format!("{name}_{index}")))
    }

    fn command(&mut self, name: &str) -> Parsed {
        if let Some(function) = Function::named(name) {
            return self.call(function);
        }
        match name {
            "frac" => {
                let above = self.argument()?;
                let below = self.argument()?;
                Ok(Expression::Quotient(Box::new(above), Box::new(below)))
            }
            "sqrt" => {
                let mut index = 2;
                if self.eat_sign('[') {
                    let Some(Kind::Number(text)) = self.peek() else { return Err(Failure::NotMathematics) };
                    index = text.parse().ok().filter(|i| (2..=64).contains(i)).ok_or(Failure::NotMathematics)?;
                    self.at += 1;
                    self.expect_sign(']')?;
                }
                Ok(Expression::Root(Box::new(self.argument()?), index))
            }
            "log" => self.logarithm(),
            "binom" => Ok(Expression::Binomial(Box::new(self.argument()?), Box::new(self.argument()?))),
            "infty" => Ok(Expression::Symbol("infinity".to_owned())),
            "emptyset" => Ok(Expression::Set(Vec::new())),
            "lfloor" => self.closed_by("rfloor", Function::Floor),
            "lceil" => self.closed_by("rceil", Function::Ceiling),
            "|" => self.closed_by("|", Function::Absolute),
            "{" => {
                if self.eat_command("}") {
                    return Ok(Expression::Set(Vec::new()));
                }
                let inner = self.nested(Self::answer)?;
                if !self.eat_command("}") {
                    return Err(Failure::NotMathematics);
                }
                Ok(Expression::Set(if let Expression::List(items) = inner { items } else { vec![inner] }))
            }
            "begin" => self.matrix(),
            name if is_symbol(name) => {
                let symbol = Expression::Symbol(name.trim_start_matches("var").to_owned());
                if self.is_sign('_') { self.subscript(symbol) } else { Ok(symbol) }
            }
            _ => Err(Failure::NotMathematics),
        }
    }

    fn closed_by(&mut self, close: &str, function: Function) -> Parsed {
        let inner = self.nested(Self::sum)?;
        if self.eat_command(close) {
            Ok(Expression::Call(function, Box::new(inner)))
        } else {
            Err(Failure::NotMathematics)
        }
    }

    /// `\sin x`, `\sin(x)`, `\sin^2 x`.
    fn call(&mut self, function: Function) -> Parsed {
        let exponent = if self.eat_sign('^') { Some(self.nested(Self::exponent)?) } else { None };
        let call = Expression::Call(function, Box::new(self.operand()?));
        Ok(match exponent {
            Some(exponent) => Expression::Power(Box::new(call), Box::new(exponent)),
            None => call,
        })
    }

    fn logarithm(&mut self) -> Parsed {
        let base = if self.eat_sign('_') { self.argument()? } else { Expression::Number(whole(10)) };
        Ok(Expression::Logarithm(Box::new(base), Box::new(self.operand()?)))
    }

    /// What a function without brackets applies to: a bracket, or a product without signs such as `2x`.
    fn operand(&mut self) -> Parsed {
        self.nested(|p| {
            let is_closed = p.is_sign('(') || p.is_sign('{');
            let mut operand = p.power()?;
            while !is_closed && p.starts_factor() && !p.is_sign('(') && !p.is_unit() && !p.starts_function() {
                operand = p.juxtaposed(operand)?;
            }
            Ok(operand)
        })
    }

    fn starts_function(&self) -> bool {
        matches!(self.peek(), Some(Kind::Command(n) | Kind::Word(n)) if Function::named(n).is_some() || n == "log")
    }

    fn matrix(&mut self) -> Parsed {
        let environment = self.environment()?;
        if !matches!(environment.as_str(), "pmatrix" | "bmatrix" | "matrix" | "Bmatrix" | "smallmatrix" | "array") {
            return Err(Failure::NotMathematics);
        }
        if environment == "array" {
            self.group()?;
        }
        let mut rows = vec![Vec::new()];
        loop {
            let cell = self.nested(Self::sum)?;
            rows.last_mut().ok_or(Failure::NotMathematics)?.push(cell);
            if self.eat_sign('&') {
                continue;
            }
            let is_row_over = self.eat_command("newline");
            if self.eat_command("end") {
                if self.environment()? != environment || rows.iter().any(|r| r.len() != rows[0].len()) {
                    return Err(Failure::NotMathematics);
                }
                return Ok(Expression::Matrix(rows));
            }
            if !is_row_over {
                return Err(Failure::NotMathematics);
            }
            rows.push(Vec::new());
        }
    }

    fn environment(&mut self) -> Result<String, Failure> {
        self.expect_sign('{')?;
        let Some(Kind::Word(name)) = self.peek().cloned() else { return Err(Failure::NotMathematics) };
        self.at += 1;
        self.expect_sign('}')?;
        Ok(name)
    }

    /// Whether a unit or another word that says what is counted comes next.
    fn is_unit(&self) -> bool {
        match self.peek() {
            Some(Kind::Text(word)) => !matches!(word.trim_matches(','), "and" | "or" | ""),
            Some(Kind::Word(word)) => {
                text::is_word(word) && Function::named(word).is_none() && !matches!(word.as_str(), "and" | "or")
            }
            _ => false,
        }
    }

    fn is_percent_word(&self) -> bool {
        matches!(self.peek(), Some(Kind::Text(w) | Kind::Word(w)) if matches!(w.as_str(), "percent" | "pct" | "%" | r"\%"))
    }

    /// `square cm`, `cm^2`, `miles per hour`, `km/h`.
    fn skip_units(&mut self) {
        while self.is_unit() && !self.is_percent_word() {
            self.at += 1;
            if self.is_sign('^') {
                let before = self.at;
                self.at += 1;
                if self.argument().is_err() {
                    self.at = before;
                    return;
                }
            }
            if self.is_sign('/')
                && matches!(self.tokens.get(self.at + 1).map(|t| &t.kind), Some(Kind::Word(_) | Kind::Text(_)))
            {
                self.at += 2;
            }
        }
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

/// The content of `\text{...}` where a value is due: mathematics if it can be read as such, else words.
fn parse_text(content: &str) -> Parsed {
    if content.chars().any(|c| c.is_ascii_digit()) && !content.contains('\\') {
        return parse(content);
    }
    Ok(Expression::Text(text::written_form(content)))
}

fn is_symbol(name: &str) -> bool {
    matches!(
        name.trim_start_matches("var"),
        "alpha"
            | "beta"
            | "gamma"
            | "delta"
            | "epsilon"
            | "zeta"
            | "eta"
            | "theta"
            | "iota"
            | "kappa"
            | "lambda"
            | "mu"
            | "nu"
            | "xi"
            | "pi"
            | "rho"
            | "sigma"
            | "tau"
            | "upsilon"
            | "phi"
            | "chi"
            | "psi"
            | "omega"
            | "Gamma"
            | "Delta"
            | "Theta"
            | "Lambda"
            | "Xi"
            | "Pi"
            | "Sigma"
            | "Phi"
            | "Psi"
            | "Omega"
            | "ell"
            | "hbar"
    )
}

/// Words count something only after a number; after letters they make a sentence.
fn has_number(expression: &Expression) -> bool {
    let mut found = false;
    expression.walk(&mut |e| found |= matches!(e, Expression::Number(_)));
    found
}

fn whole(value: i64) -> Number {
    Number { value: BigRational::from_integer(value.into()), is_decimal: false, last_place: 0, significant: 1 }
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

fn mixed(whole: Expression, above: Number, below: Number) -> Parsed {
    if below.value.is_zero() || !above.value.is_integer() || !below.value.is_integer() {
        return Err(Failure::NotMathematics);
    }
    let fraction = Expression::Quotient(Box::new(Expression::Number(above)), Box::new(Expression::Number(below)));
    Ok(Expression::Sum(vec![whole, fraction]))
}

/// Reads `12`, `1.5`, `.5`, `1.5e-3`.
fn number(text: &str) -> Parsed {
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
