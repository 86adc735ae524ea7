//! Times of day and dates.

use super::{Expression, Kind, Parser, Token};
use crate::reward::math::expression::Clock;

impl Parser {
    /// `12:30`, `10:30 AM`, `3 p.m.`, where nothing but a separator follows; else nothing is taken.
    pub(super) fn clock(&mut self) -> Option<Expression> {
        let start = self.at;
        let clock = self.read_clock();
        let is_over = matches!(self.peek(), None | Some(Kind::Sign(',' | ';' | ')' | ']' | '}')))
            || self.joining_word().is_some();
        if clock.is_none() || !is_over {
            self.at = start;
            return None;
        }
        clock.map(Expression::Clock)
    }

    fn read_clock(&mut self) -> Option<Clock> {
        let hour = self.digits(1..=2)?;
        let mut clock = Clock { hour, minute: 0, second: None, is_afternoon: None };
        if self.is_sign(':') {
            self.at += 1;
            clock.minute = self.digits(2..=2)?;
            if self.is_sign(':') {
                self.at += 1;
                clock.second = Some(self.digits(2..=2)?);
            }
            clock.is_afternoon = self.half_of_day();
        } else {
            clock.is_afternoon = Some(self.half_of_day()?);
        }
        let most = if clock.is_afternoon.is_some() { 12 } else { 24 };
        (clock.hour <= most && clock.minute < 60 && clock.second.unwrap_or(0) < 60).then_some(clock)
    }

    fn digits(&mut self, count: std::ops::RangeInclusive<usize>) -> Option<u32> {
        let Some(Kind::Number(text)) = self.peek() else { return None };
        let value = text.parse().ok().filter(|_| count.contains(&text.len()))?;
        self.at += 1;
        Some(value)
    }

    /// Takes `AM`, `p.m.` and the like; true for the afternoon.
    fn half_of_day(&mut self) -> Option<bool> {
        let mut letters = String::new();
        let mut length = 0;
        while let Some(kind) = self.peek_at(length) {
            match kind {
                Kind::Word(word) | Kind::Text(word) if word.len() <= 4 => letters.push_str(word),
                Kind::Sign('.') => {}
                _ => break,
            }
            length += 1;
        }
        letters.retain(|c| c != '.' && c != ' ');
        let is_afternoon = match letters.to_lowercase().as_str() {
            "am" => false,
            "pm" => true,
            _ => return None,
        };
        self.at += length;
        Some(is_afternoon)
    }
}

/// Whether the answer is a date or another row of three whole numbers in one piece, as in `2020-01-15`; or two of which
/// one starts with a zero. Nobody subtracts or divides like that.
pub(super) fn is_date(tokens: &[Token]) -> bool {
    let mut numbers = Vec::new();
    let mut separator = None;
    for (at, token) in tokens.iter().enumerate() {
        match &token.kind {
            Kind::Number(text) if at % 2 == 0 && text.bytes().all(|b| b.is_ascii_digit()) => {
                numbers.push(text.as_str());
            }
            Kind::Sign(sign @ ('-' | '/')) if at % 2 == 1 && separator.is_none_or(|s| s == *sign) => {
                separator = Some(*sign);
            }
            _ => return false,
        }
        if at > 0 && token.is_spaced {
            return false;
        }
    }
    let is_padded = numbers.iter().any(|n| n.len() > 1 && n.starts_with('0'));
    tokens.len() == 5 && numbers.iter().all(|n| n.len() <= 4) || tokens.len() == 3 && is_padded
}
