//! The smallest parts of an answer: numbers, letters, brackets and what commands stand for.

use super::number::{in_base, number, whole};
use super::{Failure, Parsed, Parser, parse};
use crate::reward::math::expression::{Expression, Function};
use crate::reward::math::lex::Kind;
use crate::reward::math::text;

impl Parser {
    /// A number in another base: `1010_2`.
    pub(super) fn number_in_base(&mut self, digits: &Expression) -> Parsed {
        let base = self.argument()?;
        in_base(digits, &base)
    }

    pub(super) fn group(&mut self) -> Parsed {
        self.nested(|p| {
            p.expect_sign('{')?;
            let inner = p.answer()?;
            p.expect_sign('}')?;
            Ok(inner)
        })
    }

    /// The argument of a command: a group, or one digit, letter or command.
    pub(super) fn argument(&mut self) -> Parsed {
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

    pub(super) fn primary(&mut self) -> Parsed {
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
}

/// The content of `\text{...}` where a value is due: mathematics if it can be read as such, else words.
fn parse_text(content: &str) -> Parsed {
    if content.chars().any(|c| c.is_ascii_digit()) && !content.contains('\\') {
        return parse(text::answer_tokens(content).ok_or(Failure::TooLarge)?);
    }
    let tokens = text::answer_tokens(content).ok_or(Failure::TooLarge)?;
    Ok(Expression::Text(text::written_form(&tokens)))
}

pub(super) fn is_symbol(name: &str) -> bool {
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
