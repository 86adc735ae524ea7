//! What stands after a value: percent, `million`, degrees, units and the names of things.

use super::number::whole;
use super::{Expression, Failure, Kind, Parser, has_number, multiply};
use crate::reward::math::expression::Function;
use crate::reward::math::text;
use crate::reward::math::unit::{self, Sense, Unit};

/// Most words after a value.
const MOST_WORDS: usize = 6;

/// A part of what stands after a value.
enum Piece {
    Word(String),
    Over,
    Power(i32),
}

impl Parser {
    /// Whether words that may belong to `value` come next.
    pub(super) fn is_unit_next(&self, value: &Expression) -> bool {
        match self.peek() {
            Some(Kind::Text(_)) => self.joining_word().is_none(),
            Some(Kind::Currency(_)) => has_number(value),
            Some(Kind::Word(word)) => has_number(value) && self.joining_word().is_none() && self.is_unit_word(word),
            Some(Kind::Sign('/')) => {
                let is_word = |w: &str| w.chars().count() > 1 && self.is_unit_word(w);
                has_number(value)
                    && match self.peek_at(1) {
                        Some(Kind::Text(word)) => !word.contains(|c: char| c.is_ascii_digit()),
                        Some(Kind::Word(word)) => is_word(word),
                        _ => false,
                    }
            }
            _ => false,
        }
    }

    fn is_unit_word(&self, word: &str) -> bool {
        let is_long = word.chars().count() > 1;
        if Function::named(word).is_some() || matches!(word, "log" | "lg" | "sqrt") {
            return false;
        }
        let is_ideograph = word.chars().any(|c| c > '\u{2e80}');
        is_ideograph || text::is_word(word) || (is_long && unit::is_known(word)) || self.is_single_unit(word)
    }

    /// `5 m` and `5 m/s`, but not `5m` nor `5 m + 1`: a spaced letter that is a unit, right after a number, at the end.
    fn is_single_unit(&self, word: &str) -> bool {
        let is_after_number = self.at > 0 && matches!(self.tokens[self.at - 1].kind, Kind::Number(_));
        let is_spaced = self.tokens.get(self.at).is_some_and(|t| t.is_spaced);
        let rest = self.tokens.get(self.at + 1..).unwrap_or_default();
        let is_unit_rest = rest.iter().all(|t| match &t.kind {
            Kind::Sign('/' | '^' | '{' | '}' | '-') | Kind::Number(_) => true,
            Kind::Word(w) => unit::is_unit_letter(w),
            _ => false,
        });
        unit::is_unit_letter(word) && is_after_number && is_spaced && is_unit_rest
    }

    /// `value` with what stands after it, if something does.
    pub(super) fn measured(&mut self, value: &Expression) -> Result<Option<Expression>, Failure> {
        if !self.is_unit_next(value) {
            return Ok(None);
        }
        let pieces = self.pieces()?;
        if pieces.is_empty() {
            return Err(Failure::NotMathematics);
        }
        interpret(value, &pieces).map(Some)
    }

    fn pieces(&mut self) -> Result<Vec<Piece>, Failure> {
        let mut pieces = Vec::new();
        loop {
            let is_first = pieces.is_empty();
            match self.peek().cloned() {
                Some(Kind::Text(text)) if self.joining_word().is_none() => {
                    self.at += 1;
                    text_pieces(&text, &mut pieces)?;
                }
                Some(Kind::Word(word))
                    if self.joining_word().is_none()
                        && (self.is_unit_word(&word) || !is_first && unit::is_known(&word)) =>
                {
                    self.at += 1;
                    pieces.push(Piece::Word(word));
                }
                Some(Kind::Currency(name)) => {
                    self.at += 1;
                    pieces.push(Piece::Word(name));
                }
                Some(Kind::Sign('/')) if matches!(self.peek_at(1), Some(Kind::Word(_) | Kind::Text(_))) => {
                    self.at += 1;
                    pieces.push(Piece::Over);
                }
                Some(Kind::Sign('.')) if !is_first => self.at += 1,
                Some(Kind::Command(name))
                    if matches!(name.as_str(), "cdot" | "times")
                        && !is_first
                        && matches!(self.peek_at(1), Some(Kind::Word(_) | Kind::Text(_))) =>
                {
                    self.at += 1;
                }
                Some(Kind::Sign('^')) if !is_first => match self.unit_exponent() {
                    Some(power) => pieces.push(Piece::Power(power)),
                    None => return Err(Failure::NotMathematics),
                },
                _ => break,
            }
        }
        if pieces.iter().filter(|p| matches!(p, Piece::Word(_))).count() > MOST_WORDS {
            return Err(Failure::NotMathematics);
        }
        Ok(pieces)
    }

    fn unit_exponent(&mut self) -> Option<i32> {
        self.at += 1;
        let is_braced = self.eat_sign('{');
        let is_negative = self.eat_sign('-');
        let Some(Kind::Number(text)) = self.peek() else { return None };
        let power: i32 = text.parse().ok().filter(|p| (1..=4).contains(p))?;
        self.at += 1;
        (!is_braced || self.eat_sign('}')).then_some(if is_negative { -power } else { power })
    }
}

/// The words of `\text{...}`: `cm^2`, `miles per hour`, `m/s`, `cm2`.
fn text_pieces(text: &str, pieces: &mut Vec<Piece>) -> Result<(), Failure> {
    let chars: Vec<char> = text.chars().collect();
    let mut at = 0;
    while at < chars.len() {
        let c = chars[at];
        at += 1;
        if c.is_alphabetic() {
            let mut word = c.to_string();
            while let Some(next) = chars.get(at).filter(|c| c.is_alphabetic() || **c == '\'') {
                word.push(*next);
                at += 1;
            }
            if matches!(word.as_str(), "or" | "and") {
                return Err(Failure::NotMathematics);
            }
            pieces.push(Piece::Word(word));
            // `cm2`
            if matches!(chars.get(at), Some('2' | '3')) && !chars.get(at + 1).is_some_and(|c| c.is_alphanumeric()) {
                pieces.push(Piece::Power(if chars[at] == '2' { 2 } else { 3 }));
                at += 1;
            }
            continue;
        }
        match c {
            '/' => pieces.push(Piece::Over),
            '%' => pieces.push(Piece::Word("percent".to_owned())),
            '°' | 'º' => pieces.push(Piece::Word("degree".to_owned())),
            '^' => {
                while chars.get(at) == Some(&'{') {
                    at += 1;
                }
                let is_negative = chars.get(at) == Some(&'-');
                at += usize::from(is_negative);
                let digit = chars.get(at).and_then(|c| c.to_digit(10)).filter(|d| (1..=4).contains(d));
                let power = digit.ok_or(Failure::NotMathematics)? as i32;
                pieces.push(Piece::Power(if is_negative { -power } else { power }));
                at += 1;
            }
            '.' | ',' | '-' | '}' | '\\' | '$' | '(' | ')' | '~' => {}
            c if c.is_whitespace() => {}
            _ => return Err(Failure::NotMathematics),
        }
    }
    Ok(())
}

fn interpret(value: &Expression, pieces: &[Piece]) -> Result<Expression, Failure> {
    let (mut value, mut unit) = match value {
        Expression::Quantity(inner, unit) => ((**inner).clone(), unit.clone()),
        value => (value.clone(), Unit::none()),
    };
    let (mut sign, mut next_power, mut is_measured, mut at) = (1, 1, unit != Unit::none(), 0);
    while at < pieces.len() {
        let piece = &pieces[at];
        at += 1;
        let word = match piece {
            Piece::Over => {
                sign = -1;
                continue;
            }
            Piece::Power(_) => return Err(Failure::NotMathematics),
            Piece::Word(word) => word.as_str(),
        };
        let lower = word.to_lowercase();
        let follows = |wanted: &[&str]| matches!(pieces.get(at), Some(Piece::Word(w)) if wanted.contains(&w.to_lowercase().as_str()));
        match lower.as_str() {
            "percent" | "pct" | "percentage" if !is_measured && at == pieces.len() => {
                return Ok(Expression::Percent(Box::new(value)));
            }
            "degree" | "degrees" | "deg" | "度" if !is_measured => {
                let scale = if follows(&["celsius", "c"]) {
                    "celsius"
                } else if follows(&["fahrenheit", "f"]) {
                    "fahrenheit"
                } else if at == pieces.len() {
                    return Ok(Expression::Degrees(Box::new(value)));
                } else {
                    return Err(Failure::NotMathematics);
                };
                at += 1;
                unit.multiply(scale, 1);
                is_measured = true;
            }
            "square" | "sq" => next_power = 2,
            "cubic" => next_power = 3,
            "per" => sign = -1,
            _ => {
                if let Some(times) = unit::multiplier(word).filter(|_| !is_measured || sign == 1) {
                    value = multiply(value, Expression::Number(whole(times)));
                    continue; // `\$5 million`
                }
                let name = without_power_prefix(word, &mut next_power);
                let is_inch = lower == "in" && !is_measured && !matches!(pieces.get(at), Some(Piece::Word(_)));
                match unit::sense(name) {
                    _ if is_inch => unit.multiply("inch", sign * trailing_power(pieces, &mut at)),
                    // One letter is a unit or nothing.
                    Sense::Naming if name.chars().count() == 1 && name.is_ascii() && !unit::is_known(name) => {
                        return Err(Failure::NotMathematics);
                    }
                    Sense::Naming => unit.multiply(name, sign * next_power * trailing_power(pieces, &mut at)),
                    Sense::Empty => continue,
                    Sense::Changing => return Err(Failure::NotMathematics),
                }
                (next_power, is_measured) = (1, true);
            }
        }
    }
    // `square` of nothing, and words that say nothing at all.
    if next_power != 1 {
        return Err(Failure::NotMathematics);
    }
    if unit == Unit::none() { Ok(value) } else { Ok(Expression::Quantity(Box::new(value), unit)) }
}

/// The exponent that follows a unit: `^2`, `squared`.
fn trailing_power(pieces: &[Piece], at: &mut usize) -> i32 {
    let power = match pieces.get(*at) {
        Some(Piece::Power(power)) => *power,
        Some(Piece::Word(word)) if word == "squared" => 2,
        Some(Piece::Word(word)) if word == "cubed" => 3,
        _ => return 1,
    };
    *at += 1;
    power
}

/// Chinese writes square and cubic in front, without a space, and units as the table does not have them.
fn without_power_prefix<'a>(word: &'a str, power: &mut i32) -> &'a str {
    let name = if let Some(rest) = word.strip_prefix("平方") {
        *power = 2;
        rest
    } else if let Some(rest) = word.strip_prefix("立方") {
        *power = 3;
        rest
    } else {
        word
    };
    match name {
        "厘米" => "cm",
        "米" => "m",
        "毫米" => "mm",
        "千米" | "公里" => "km",
        "千克" | "公斤" => "kg",
        "克" => "g",
        "小时" => "hour",
        "分钟" => "minute",
        "秒" => "second",
        "天" => "day",
        "升" => "liter",
        "毫升" => "ml",
        name => name,
    }
}

/// `5 hours, 30 minutes`: quantities of one kind from the larger unit to the smaller one are one quantity.
pub(super) fn compound(items: &[Expression]) -> Option<Expression> {
    let parts: Vec<(&Expression, &Unit)> = items
        .iter()
        .map(|item| match item {
            Expression::Quantity(value, unit) if unit.is_measure() => Some((value.as_ref(), unit)),
            _ => None,
        })
        .collect::<Option<_>>()?;
    let is_falling = parts.windows(2).all(|p| p[0].1.is_same_kind(p[1].1) && p[0].1.factor > p[1].1.factor);
    let (_, last) = parts.last()?;
    if !is_falling {
        return None;
    }
    let terms = parts.iter().map(|(value, unit)| {
        let ratio = &unit.factor / &last.factor;
        let mut number = whole(1);
        number.value = ratio;
        multiply((*value).clone(), Expression::Number(number))
    });
    Some(Expression::Quantity(Box::new(Expression::Sum(terms.collect())), (*last).clone()))
}
