//! The smallest parts of an answer: numbers, letters and brackets.

use super::number::{in_base, number, whole};
use super::{Failure, Parsed, Parser, has_number, parse};
use crate::reward::math::expression::{Expression, Function};
use crate::reward::math::lex::Kind;
use crate::reward::math::text;
use crate::reward::math::unit::Unit;

impl Parser {
    /// A number in another base: `1010_2`.
    pub(super) fn number_in_base(&mut self, digits: &Expression) -> Parsed {
        let base = self.argument()?;
        let (Expression::Number(digits), Expression::Number(base)) = (digits, &base) else {
            return Err(Failure::NotMathematics);
        };
        if !digits.value.is_integer() {
            return Err(Failure::NotMathematics);
        }
        in_base(&digits.value.to_integer().to_string(), base)
    }

    /// Digits beyond 9 with their base, as in `2F_{16}`; nothing is taken without the base.
    fn digits_with_base(&mut self) -> Option<Expression> {
        let start = self.at;
        let mut digits = String::new();
        while let Some(Kind::Number(text) | Kind::Word(text)) = self.peek() {
            let is_part = text.chars().all(|c| matches!(c, '0'..='9' | 'A'..='F'))
                && (self.at == start || !self.tokens[self.at].is_spaced);
            if !is_part {
                break;
            }
            digits.push_str(text);
            self.at += 1;
        }
        let has_letter = digits.contains(|c: char| c.is_ascii_alphabetic());
        if has_letter
            && self.eat_sign('_')
            && let Some(base) = self.whole_index()
            && let Ok(Expression::Number(base)) = number(&base)
            && let Ok(value) = in_base(&digits, &base)
        {
            return Some(value);
        }
        self.at = start;
        None
    }

    /// A number or a number in braces, as its digits.
    fn whole_index(&mut self) -> Option<String> {
        let is_braced = self.eat_sign('{');
        let Some(Kind::Number(text)) = self.peek().cloned() else { return None };
        self.at += 1;
        (!is_braced || self.eat_sign('}')).then_some(text)
    }

    pub(super) fn group(&mut self) -> Parsed {
        self.nested(|p| {
            p.expect_sign('{')?;
            let inner = p.answer()?;
            let inner =
                if p.eat_command("choose") { Expression::Binomial(Box::new(inner), Box::new(p.sum()?)) } else { inner };
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
        if let Some(value) = self.digits_with_base() {
            return Ok(value);
        }
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
            Kind::Currency(name) => {
                self.at += 1;
                let value = self.nested(Self::signed)?;
                let value = if self.starts_number_part(&value) { self.juxtaposed(value)? } else { value };
                Ok(Expression::Quantity(Box::new(value), Unit::named(&name)))
            }
            Kind::Sign('{') => self.group(),
            Kind::Sign(open @ ('(' | '[')) => self.bracket(open),
            Kind::Sign(']') => self.bracket('('), // ]1, 2[
            Kind::Sign('|') if !self.in_bars => self.bars(),
            Kind::Command(name) => {
                self.at += 1;
                self.command(&name)
            }
            Kind::Sign(_) => Err(Failure::NotMathematics),
        }
    }

    /// Whether a fraction or a variable goes on the amount of money.
    fn starts_number_part(&self, value: &Expression) -> bool {
        matches!(value, Expression::Number(_))
            && (self.is_command("frac") || matches!(self.peek(), Some(Kind::Number(_))))
    }

    fn bracket(&mut self, open: char) -> Parsed {
        self.at += 1;
        let outside = std::mem::replace(&mut self.in_bars, false);
        let inner = self.nested(Self::answer)?;
        self.in_bars = outside;
        let close = match self.peek() {
            Some(Kind::Sign('[')) => ')', // [1, 2[
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
            "log" | "lg" => return self.logarithm(),
            "C" if self.is_sign('_') => {
                if let Some(value) = self.combinations() {
                    return Ok(value);
                }
            }
            _ => {}
        }
        if let Some(function) = Function::named(word) {
            return self.call(function);
        }
        let letters = word.chars().count();
        let is_ideograph = word.chars().any(|c| c > '\u{2e80}');
        if letters > MOST_VARIABLES || is_ideograph || (letters > 1 && text::is_word(word)) {
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
        Ok(if factors.len() > 1 { Expression::Product(factors) } else { factors.remove(0) })
    }

    /// `C_5^2` and `C_{10}^{3}`: the number of combinations, where both are numbers.
    fn combinations(&mut self) -> Option<Expression> {
        let start = self.at;
        self.at += 1;
        if let Some(n) = self.whole_index()
            && self.eat_sign('^')
            && let Some(k) = self.whole_index()
            && let (Ok(n), Ok(k)) = (number(&n), number(&k))
        {
            return Some(Expression::Binomial(Box::new(n), Box::new(k)));
        }
        self.at = start;
        None
    }

    pub(super) fn subscript(&mut self, base: Expression) -> Parsed {
        let Expression::Symbol(name) = base else { return Err(Failure::NotMathematics) };
        self.expect_sign('_')?;
        let start = self.at;
        let argument = self.argument()?;
        let mut index = String::new();
        for token in &self.tokens[start..self.at] {
            match &token.kind {
                Kind::Number(text)
                | Kind::Word(text)
                | Kind::Command(text)
                | Kind::Text(text)
                | Kind::Currency(text) => index.push_str(text),
                Kind::Sign('{' | '}') => {}
                Kind::Sign(sign) => index.push(*sign),
            }
        }
        if index.is_empty() {
            // A digit or letter that was cut off a longer token is not among the tokens any more.
            index = match argument {
                Expression::Number(digit) => digit.value.to_string(),
                Expression::Symbol(letter) => letter,
                _ => return Err(Failure::NotMathematics),
            };
        }
        Ok(Expression::Symbol(format!("{name}_{index}")))
    }

    /// Whether an exponent comes next that is a sign of degrees: `^\circ`, `^{\circ}`.
    pub(super) fn is_degree_exponent(&self) -> bool {
        let is_circle = |kind: Option<&Kind>| matches!(kind, Some(Kind::Command(name)) if name == "circ");
        is_circle(self.peek_at(1))
            || (self.peek_at(1) == Some(&Kind::Sign('{'))
                && is_circle(self.peek_at(2))
                && self.peek_at(3) == Some(&Kind::Sign('}')))
    }

    pub(super) fn eat_degree_exponent(&mut self) {
        self.at += if self.peek_at(1) == Some(&Kind::Sign('{')) { 4 } else { 2 };
    }

    /// What follows a sign of degrees: a scale of temperature, or minutes and seconds of an angle.
    pub(super) fn degrees(&mut self, value: Expression) -> Parsed {
        if !has_number(&value) && !matches!(value, Expression::Symbol(_)) {
            return Err(Failure::NotMathematics);
        }
        let scale = match self.peek() {
            Some(Kind::Word(w) | Kind::Text(w)) if w == "C" => Some("celsius"),
            Some(Kind::Word(w) | Kind::Text(w)) if w == "F" => Some("fahrenheit"),
            _ => None,
        };
        if let Some(scale) = scale {
            self.at += 1;
            return self.wrap(Expression::Quantity(Box::new(value), Unit::named(scale)));
        }
        let mut terms = vec![value];
        for (primes, parts) in [(1, 60), (2, 3600)] {
            let is_prime = |ahead: usize| self.peek_at(ahead) == Some(&Kind::Sign('\''));
            let Some(Kind::Number(text)) = self.peek().cloned() else { break };
            let count = (1..=2).take_while(|ahead| is_prime(*ahead)).count();
            if count != primes {
                continue;
            }
            self.at += 1 + count;
            terms.push(Expression::Quotient(Box::new(number(&text)?), Box::new(Expression::Number(whole(parts)))));
        }
        let value = if terms.len() > 1 { Expression::Sum(terms) } else { terms.remove(0) };
        self.wrap(Expression::Degrees(Box::new(value)))
    }
}

/// The content of `\text{...}` where a value is due: mathematics if it can be read as such, else words.
fn parse_text(content: &str) -> Parsed {
    let tokens = text::answer_tokens(content).ok_or(Failure::TooLarge)?;
    if content.chars().any(|c| c.is_ascii_digit()) && !content.contains('\\') {
        return parse(tokens);
    }
    Ok(text::meaning_of_words(content).unwrap_or_else(|| Expression::Text(text::written_form(&tokens))))
}
