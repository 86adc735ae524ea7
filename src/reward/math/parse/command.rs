//! What LaTeX commands stand for: fractions, roots, functions, sets, matrices, systems.

use super::number::whole;
use super::{Failure, Parsed, Parser, parse};
use crate::reward::math::expression::{Expression, Function, Relation};
use crate::reward::math::lex::Kind;
use crate::reward::math::text;

/// Accents that make another name of their argument.
const ACCENTS: &[&str] = &["overline", "vec", "overrightarrow", "hat", "widehat", "bar", "tilde", "widetilde"];

/// Whether a command starts a factor of a product without a sign before it.
pub(super) fn starts_factor(name: &str) -> bool {
    is_symbol(name)
        || Function::named(name).is_some()
        || ACCENTS.contains(&name)
        || matches!(name, "frac" | "sqrt" | "log" | "lg" | "binom" | "lfloor" | "lceil" | "infty" | "begin")
}

impl Parser {
    pub(super) fn command(&mut self, name: &str) -> Parsed {
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
            "log" | "lg" => self.logarithm(),
            "binom" => Ok(Expression::Binomial(Box::new(self.argument()?), Box::new(self.argument()?))),
            "infty" => Ok(Expression::Symbol("infinity".to_owned())),
            "emptyset" => Ok(Expression::Set(Vec::new())),
            "reals" => Ok(Expression::Domain('R')),
            "integers" => Ok(Expression::Domain('Z')),
            "rationals" => Ok(Expression::Domain('Q')),
            "naturals" => Ok(Expression::Domain('N')),
            "complexes" => Ok(Expression::Domain('C')),
            "lfloor" => self.closed_by("rfloor", Function::Floor),
            "lceil" => self.closed_by("rceil", Function::Ceiling),
            "|" => self.closed_by("|", Function::Absolute),
            "{" => self.set(),
            "begin" => self.environment_body(),
            "imath" => Ok(Expression::Symbol("i".to_owned())),
            name if ACCENTS.contains(&name) => {
                let start = self.at;
                self.argument()?;
                let inner = text::written_form(&self.tokens[start..self.at]);
                if inner.contains(|c: char| c.is_ascii_digit()) {
                    return Err(Failure::NotMathematics);
                }
                Ok(Expression::Symbol(format!("{name} {}", inner.trim_matches(['{', '}']))))
            }
            name if is_symbol(name) => {
                let symbol = Expression::Symbol(name.trim_start_matches("var").to_owned());
                if self.is_sign('_') { self.subscript(symbol) } else { Ok(symbol) }
            }
            _ => Err(Failure::NotMathematics),
        }
    }

    /// What follows `\{`: items, or a condition as in `\{x : x > 3\}`.
    fn set(&mut self) -> Parsed {
        if self.eat_command("}") {
            return Ok(Expression::Set(Vec::new()));
        }
        let is_separator = |kind: Option<&Kind>| match kind {
            Some(Kind::Sign(':' | '|')) => true,
            Some(Kind::Command(name)) => name == "mid",
            _ => false,
        };
        let is_variable = matches!(self.peek(), Some(Kind::Word(w)) if w.chars().count() == 1);
        let is_real = matches!(self.peek_at(1), Some(Kind::Command(name)) if name == "in")
            && matches!(self.peek_at(2), Some(Kind::Command(name)) if name == "reals");
        let is_condition = if is_variable && is_separator(self.peek_at(1)) {
            self.at += 2;
            true
        } else if is_variable && is_real && is_separator(self.peek_at(3)) {
            self.at += 4;
            true
        } else {
            false
        };
        let inner = self.nested(Self::answer)?;
        if !self.eat_command("}") {
            return Err(Failure::NotMathematics);
        }
        if is_condition {
            // `x = 3` in a condition is the set of one number.
            return match inner {
                Expression::Relation(_, mut rest) if rest.len() == 1 && rest[0].0 == Relation::Equal => {
                    Ok(Expression::Set(rest.pop().into_iter().map(|(_, side)| side).collect()))
                }
                Expression::Relation(..) | Expression::Union(_) | Expression::Intersection(_) => Ok(inner),
                Expression::List(items) if items.iter().all(|i| matches!(i, Expression::Relation(..))) => {
                    Ok(Expression::Intersection(items))
                }
                _ => Err(Failure::NotMathematics),
            };
        }
        Ok(Expression::Set(if let Expression::List(items) = inner { items } else { vec![inner] }))
    }

    fn closed_by(&mut self, close: &str, function: Function) -> Parsed {
        let inner = self.nested(Self::sum)?;
        if self.eat_command(close) {
            Ok(Expression::Call(function, Box::new(inner)))
        } else {
            Err(Failure::NotMathematics)
        }
    }

    /// `\sin x`, `\sin(x)`, `\sin^2 x`, and `\sin^{-1} x` for the inverse.
    pub(super) fn call(&mut self, function: Function) -> Parsed {
        let exponent = if self.eat_sign('^') { Some(self.nested(Self::exponent)?) } else { None };
        let operand = Box::new(self.operand()?);
        let is_minus_one = |e: &Expression| {
            matches!(e, Expression::Negative(inner)
                if matches!(&**inner, Expression::Number(n) if *n == whole(1)))
        };
        Ok(match (exponent, function.inverse()) {
            (Some(exponent), Some(inverse)) if is_minus_one(&exponent) => Expression::Call(inverse, operand),
            (Some(exponent), _) => Expression::Power(Box::new(Expression::Call(function, operand)), Box::new(exponent)),
            (None, _) => Expression::Call(function, operand),
        })
    }

    pub(super) fn logarithm(&mut self) -> Parsed {
        let base = if self.eat_sign('_') { self.argument()? } else { Expression::Number(whole(10)) };
        Ok(Expression::Logarithm(Box::new(base), Box::new(self.operand()?)))
    }

    /// What a function without brackets applies to: a bracket, or a product without signs such as `2x`.
    fn operand(&mut self) -> Parsed {
        self.nested(|p| {
            let is_closed = p.is_sign('(') || p.is_sign('{');
            let mut operand = p.power()?;
            while !is_closed
                && p.starts_factor()
                && !p.is_sign('(')
                && !p.is_unit_next(&operand)
                && !p.starts_function()
            {
                operand = p.juxtaposed(operand)?;
            }
            Ok(operand)
        })
    }

    fn starts_function(&self) -> bool {
        matches!(self.peek(), Some(Kind::Command(n) | Kind::Word(n)) if Function::named(n).is_some() || n == "log" || n == "lg")
    }

    fn environment_body(&mut self) -> Parsed {
        let environment = self.environment()?;
        match environment.as_str() {
            "pmatrix" | "bmatrix" | "matrix" | "Bmatrix" | "smallmatrix" => self.matrix(&environment),
            "array" => {
                self.skip_group()?;
                self.matrix(&environment)
            }
            "cases" => self.cases(&environment),
            _ => Err(Failure::NotMathematics),
        }
    }

    fn matrix(&mut self, environment: &str) -> Parsed {
        let mut rows = vec![Vec::new()];
        loop {
            let cell = self.nested(Self::sum)?;
            rows.last_mut().ok_or(Failure::NotMathematics)?.push(cell);
            if self.eat_sign('&') {
                continue;
            }
            if self.is_row_over(environment)? {
                if rows.iter().any(|r| r.len() != rows[0].len()) {
                    return Err(Failure::NotMathematics);
                }
                return Ok(Expression::Matrix(rows));
            }
            rows.push(Vec::new());
        }
    }

    /// Takes the end of a row; true if the environment ends with it.
    fn is_row_over(&mut self, environment: &str) -> Result<bool, Failure> {
        let is_row_over = self.eat_command("newline");
        if self.eat_command("end") {
            return if self.environment()? == environment { Ok(true) } else { Err(Failure::NotMathematics) };
        }
        if is_row_over { Ok(false) } else { Err(Failure::NotMathematics) }
    }

    /// A system of equations as a list, or the pieces of a function as a set of pairs.
    fn cases(&mut self, environment: &str) -> Parsed {
        let mut rows = Vec::new();
        loop {
            let value = self.nested(Self::answer)?;
            let condition = if self.eat_sign('&') { Some(self.condition()?) } else { None };
            rows.push((value, condition));
            if self.is_row_over(environment)? {
                break;
            }
        }
        if rows.iter().all(|(_, condition)| condition.is_none()) {
            return Ok(Expression::List(rows.into_iter().map(|(value, _)| value).collect()));
        }
        let pair = |(value, condition): (Expression, Option<Expression>)| -> Parsed {
            let condition = condition.ok_or(Failure::NotMathematics)?;
            Ok(Expression::Sequence { open: '(', items: vec![value, condition], close: ')' })
        };
        rows.into_iter().map(pair).collect::<Result<_, _>>().map(Expression::Set)
    }

    /// The condition of a piece: `x > 0`, `\text{if } x > 0`, `\text{if $x > 0$}`, `\text{otherwise}`.
    fn condition(&mut self) -> Parsed {
        while let Some(Kind::Text(word) | Kind::Word(word)) = self.peek().cloned() {
            let word = word.trim_matches(|c: char| c == ',' || c.is_whitespace());
            let inside = ["if", "for", "when"].into_iter().find_map(|w| word.strip_prefix(w)).map(str::trim);
            match inside {
                Some("") => self.at += 1,
                Some(inside) => {
                    self.at += 1;
                    return parse(text::answer_tokens(inside).ok_or(Failure::TooLarge)?);
                }
                None => break,
            }
        }
        self.eat_sign(',');
        self.nested(Self::answer)
    }

    fn environment(&mut self) -> Result<String, Failure> {
        self.expect_sign('{')?;
        let Some(Kind::Word(name)) = self.peek().cloned() else { return Err(Failure::NotMathematics) };
        self.at += 1;
        self.expect_sign('}')?;
        Ok(name)
    }

    fn skip_group(&mut self) -> Result<(), Failure> {
        self.expect_sign('{')?;
        while !self.eat_sign('}') {
            if self.at >= self.tokens.len() {
                return Err(Failure::NotMathematics);
            }
            self.at += 1;
        }
        Ok(())
    }
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
