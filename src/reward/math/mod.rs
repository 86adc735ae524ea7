//! Equality of mathematical answers: text in, true or false out.
//!
//! Owns reading answers (plain text and the LaTeX that models and data sets write), comparing them exactly, and
//! finding the final answer in a completion. The `accuracy` rewards call it; nothing here knows about rewards.
//!
//! How two answers are compared:
//! - Numbers are exact rationals: `0.5`, `1/2`, `\frac12`, `5\times 10^{-1}` are one value. A decimal with at least six
//!   significant digits also equals a value it is a rounding of (`0.333333` and `1/3`, `3.14159` and `\pi`).
//! - `50\%` equals `0.5`, and also `50`, because the question often asks for the number of percent.
//! - Expressions with variables are evaluated exactly at three points of random integers of 32 bits, with both signs.
//!   Two different rational functions of total degree d agree at one such point with probability at most d / 2^32
//!   (Schwartz, 1980), so at all three with at most (d / 2^32)^3; values are limited to 8192 bits, so d stays below
//!   about 8192 / 32 and a false "equal" has a probability below 1e-21. `\pi` counts as a variable there, which is
//!   exact since it is transcendental.
//! - Roots and functions that are not rational are evaluated in f64 at six points; there "equal" means a relative
//!   difference below 1e-10. A point where a side is undefined is skipped, two points at least must remain.
//! - Lists without brackets (`1, 2`, `1 \text{ and } 2`, `x = \pm 3`) and sets have no order; tuples and intervals do.
//!   A bare list equals a tuple of the same order. `x > 3` equals the interval `(3, \infty)`.
//! - Units, currency signs, degree signs and `\text{...}` after a value are left out; `x = 5` equals `5`.
//! - What is not mathematics is compared as text, ignoring case, spaces and punctuation at the ends.
//!
//! Limits: 4096 characters, 48 levels of nesting, 8192 bits per value and a budget of work per comparison; beyond them
//! only the written forms are compared (so `9^{9^9}` equals itself at no cost). The longest comparison takes
//! milliseconds, a usual one some microseconds.
//!
//! Not understood: decimal commas, matrices with operations, inequalities in several variables other than as written,
//! complex numbers beyond `i` as a symbol, derivatives and integrals.

mod compare;
mod evaluate;
mod expression;
mod extract;
mod lex;
mod parse;
mod text;

pub use extract::{Extraction, final_answer};

use compare::Comparison;
use expression::Expression;

/// An answer that was read.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The written form without spaces and decoration.
    written: String,
    /// What it means, where it is mathematics.
    meaning: Option<Expression>,
    /// The letter, where it is a multiple-choice letter.
    choice: Option<char>,
}

/// Why a text is not an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// Nothing is left once spaces and decoration are gone.
    #[error("it is empty")]
    Empty,
    /// Longer than 4096 characters.
    #[error("it has more than 4096 characters")]
    TooLong,
    /// Neither mathematics nor a text of at most eight words.
    #[error("it is neither mathematics nor a short text")]
    NotAnAnswer,
}

impl Answer {
    /// Reads an answer: mathematics, or else a text of at most eight words.
    ///
    /// # Errors
    /// If it is neither, or beyond the limits.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        const MOST_WORDS: usize = 8;
        let tokens = text::answer_tokens(text).ok_or(ParseError::TooLong)?;
        if tokens.is_empty() {
            return Err(ParseError::Empty);
        }
        let (written, choice) = (text::written_form(&tokens), text::choice_letter(&tokens));
        let meaning = match parse::parse(tokens) {
            Ok(meaning) => Some(meaning),
            // Equal to what is written in the same way only.
            Err(parse::Failure::TooLarge) => None,
            Err(parse::Failure::NotMathematics) => {
                if choice.is_none() && text.split_whitespace().count() > MOST_WORDS {
                    return Err(ParseError::NotAnAnswer);
                }
                None
            }
        };
        Ok(Self { written, meaning, choice })
    }

    /// Whether it was understood as mathematics, not only as text.
    pub fn is_mathematics(&self) -> bool {
        self.meaning.is_some()
    }

    /// Whether two answers are the same; symmetric.
    pub fn equals(&self, other: &Self) -> bool {
        if self.written == other.written {
            return true;
        }
        if let (Some(one), Some(two)) = (self.choice, other.choice) {
            return one == two;
        }
        match (&self.meaning, &other.meaning) {
            (Some(one), Some(two)) => Comparison::new().equal(one, two),
            _ => false,
        }
    }

    /// Its value, where it is one real number (an equation stands for its last side).
    pub fn value(&self) -> Option<f64> {
        self.meaning.as_ref().and_then(Comparison::value)
    }
}

/// Whether two written answers are the same; false if one of them cannot be read.
pub fn is_equal(gold: &str, answer: &str) -> bool {
    match (Answer::parse(gold), Answer::parse(answer)) {
        (Ok(gold), Ok(answer)) => gold.equals(&answer),
        _ => false,
    }
}
