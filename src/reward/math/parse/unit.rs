//! Units and other words after a value, which are left out.

use super::Parser;
use crate::reward::math::expression::Function;
use crate::reward::math::lex::Kind;
use crate::reward::math::text;

impl Parser {
    /// Whether a unit or another word that says what is counted comes next.
    pub(super) fn is_unit(&self) -> bool {
        match self.peek() {
            // A number in the text would be part of the answer: `5\text{ or 6}`.
            Some(Kind::Text(word)) => {
                !matches!(word.trim_matches(','), "and" | "or" | "") && !word.contains(|c: char| c.is_ascii_digit())
            }
            Some(Kind::Word(word)) => {
                text::is_word(word) && Function::named(word).is_none() && !matches!(word.as_str(), "and" | "or")
            }
            _ => false,
        }
    }

    pub(super) fn is_percent_word(&self) -> bool {
        matches!(self.peek(), Some(Kind::Text(w) | Kind::Word(w)) if matches!(w.as_str(), "percent" | "pct" | "%" | r"\%"))
    }

    /// `square cm`, `cm^2`, `miles per hour`, `km/h`.
    pub(super) fn skip_units(&mut self) {
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
