//! Equality of mathematical answers: text in, true or false out.
//!
//! Owns reading answers (plain text and the LaTeX that models and data sets write), comparing them exactly, and
//! finding the final answer in a completion. The `accuracy` rewards call it; nothing here knows about rewards.
//!
//! How two answers are compared:
//! - Numbers are exact rationals: `0.5`, `1/2`, `\frac12`, `5\times 10^{-1}` are one value. A decimal with at least six
//!   significant digits also equals a value it is a rounding of (`0.333333` and `1/3`, `3.14159` and `\pi`).
//! - `50\%` equals `0.5`, and also `50`, because the question often asks for the number of percent; `0.5\%` is not 0.5.
//! - `0.1\overline{6}`, `0.1\dot{6}`, `0.1(6)` and `0.1666...` are one sixth; `2\frac{1}{2}` and `2 1/2` are 2.5.
//! - Expressions with variables are evaluated exactly at three points of random integers of 32 bits, with both signs.
//!   Two different rational functions of total degree d agree at one such point with probability at most d / 2^32
//!   (Schwartz, 1980), so at all three with at most (d / 2^32)^3; values are limited to 8192 bits, so d stays below
//!   about 8192 / 32 and a false "equal" has a probability below 1e-21. `\pi` counts as a variable there, which is
//!   exact since it is transcendental.
//! - Roots and functions that are not rational are evaluated in f64 at six points with bounds on their errors; there
//!   "equal" means that the errors explain the difference. Without variables, and with `i`, values are complex; `i` is
//!   exact where the rest is rational. A point where a side is undefined or out of range is skipped, two points at
//!   least must remain; `n!` and `(-1)^n` are compared exactly at whole numbers.
//! - Lists without brackets (`1, 2`, `1 \text{ and } 2`, `x = \pm 3`) and sets have no order; tuples and intervals do.
//!   A bare list equals a tuple of the same order. `x = 1, y = 2` is in the order of the names.
//! - Inequalities, unions, `\mathbb{R} \setminus \{0\}` and set builders are compared as sets of real numbers.
//! - A value with a unit equals the value alone, and another one of the same kind in any unit: 3 m is 3 and 300 cm, not
//!   3 cm nor 3 kg. Names of things (`5 apples`) are units; words that may change the value make it no value.
//! - `x = 5` equals `5`, since `x` is a name; `2x = 6` does not equal `6`. A chain of numbers must agree.
//! - `12:30` is a time beside a time and a ratio beside a number; `2020-01-15` is a text.
//! - What is not mathematics is compared as text, ignoring case, spaces and punctuation at the ends.
//!
//! Limits: 4096 characters, 48 levels of nesting, 8192 bits per value and a budget of work per comparison; beyond them
//! only the written forms are compared (so `9^{9^9}` equals itself at no cost). The longest comparison takes
//! milliseconds, a usual one some microseconds.
//!
//! Not understood, and therefore compared as written: decimal commas, sums and integrals, `\ldots` in lists.

mod approximate;
mod compare;
mod evaluate;
mod expression;
mod extract;
mod intervals;
mod lex;
mod matrix;
mod normalize;
mod parse;
mod relation;
mod scalar;
mod text;
mod unit;

pub use extract::{Extraction, final_answer};
pub(super) use extract::{closes_reasoning, opens_reasoning};

use compare::Comparison;
use expression::Expression;
use text::Choice;

/// An answer that was read.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The written form without spaces and decoration.
    written: String,
    /// Its words, where it has nothing else.
    words: Option<String>,
    /// What it means, where it is mathematics.
    meaning: Option<Expression>,
    /// The letter, where it is a multiple-choice letter, and what the text beside it is.
    choice: Option<(char, Option<Box<Answer>>)>,
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
        let written = text::written_form(&tokens);
        let choice = text::choice(text)
            .map(|Choice { letter, content }| (letter, content.and_then(|c| Self::parse(&c).ok()).map(Box::new)));
        let words = match tokens.as_slice() {
            [lex::Token { kind: lex::Kind::Text(inner), .. }] => text::plain_words(inner),
            _ => text::plain_words(text),
        };
        let meaning = match parse::parse(tokens) {
            Ok(meaning) => Some(meaning),
            // Equal to what is written in the same way only.
            Err(parse::Failure::TooLarge) => None,
            Err(parse::Failure::NotMathematics) => {
                if choice.is_none() && text.split_whitespace().count() > MOST_WORDS {
                    return Err(ParseError::NotAnAnswer);
                }
                text::meaning_of_words(text)
            }
        };
        // `x` and `X` are two variables, `No` and `no` one word.
        let words = words.filter(|_| matches!(meaning, None | Some(Expression::Text(_))));
        Ok(Self { written, words, meaning, choice })
    }

    /// Whether it was understood as mathematics, not only as text.
    pub fn is_mathematics(&self) -> bool {
        self.meaning.is_some()
    }

    /// Whether it is the letter of a multiple-choice answer.
    fn is_choice(&self) -> bool {
        self.choice.is_some()
    }

    /// Whether it is a value with a unit of measure, a percentage or an angle.
    fn is_measured(&self) -> bool {
        match &self.meaning {
            Some(Expression::Quantity(_, unit)) => unit.is_measure(),
            Some(Expression::Percent(_) | Expression::Degrees(_)) => true,
            _ => false,
        }
    }

    /// Whether two answers are the same; symmetric.
    pub fn equals(&self, other: &Self) -> bool {
        if self.written == other.written || (self.words.is_some() && self.words == other.words) {
            return true;
        }
        match (&self.choice, &other.choice) {
            (Some((one, content)), Some((two, other_content))) => {
                let is_same_content = match (content, other_content) {
                    (Some(a), Some(b)) => a.equals(b),
                    _ => true,
                };
                return one == two && is_same_content;
            }
            // `(B) 12` is also 12.
            (Some((_, Some(content))), None) => return content.equals(other),
            (None, Some((_, Some(content)))) => return self.equals(content),
            _ => {}
        }
        match (&self.meaning, &other.meaning) {
            (Some(one), Some(two)) => Comparison::new().equal(one, two),
            _ => false,
        }
    }

    /// Whether `answer` is an answer to the question that this one is right for. Besides what is equal that is the sum
    /// a question asks for, named: `m + n = 113` where 113 is right.
    pub fn is_answered_by(&self, answer: &Self) -> bool {
        self.equals(answer)
            || match (&self.meaning, &answer.meaning) {
                (Some(right @ Expression::Number(_)), Some(named)) => {
                    relation::named_sum(named).is_some_and(|value| Comparison::new().equal(right, value))
                }
                _ => false,
            }
    }

    /// Its value, where it is one real number (an equation stands for its last side).
    pub fn value(&self) -> Option<f64> {
        self.meaning.as_ref().and_then(|meaning| Comparison::new().value(meaning))
    }
}

/// Whether two written answers are the same; false if one of them cannot be read.
pub fn is_equal(gold: &str, answer: &str) -> bool {
    match (Answer::parse(gold), Answer::parse(answer)) {
        (Ok(gold), Ok(answer)) => gold.equals(&answer),
        _ => false,
    }
}
