//! What an answer means: a tree of numbers, symbols and operations.

use num_rational::BigRational;

/// A mathematical expression or a collection of them.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Expression {
    /// A number as written.
    Number(Number),
    /// A variable, or a constant kept as a symbol: `pi`, `e`, `i`, `infinity`.
    Symbol(String),
    /// A sum of terms.
    Sum(Vec<Expression>),
    /// A product of factors.
    Product(Vec<Expression>),
    /// A sign change.
    Negative(Box<Expression>),
    /// A quotient.
    Quotient(Box<Expression>, Box<Expression>),
    /// A power: base, exponent.
    Power(Box<Expression>, Box<Expression>),
    /// A root: radicand, index.
    Root(Box<Expression>, u32),
    /// A named function of one argument.
    Call(Function, Box<Expression>),
    /// A logarithm: base, argument.
    Logarithm(Box<Expression>, Box<Expression>),
    /// A binomial coefficient.
    Binomial(Box<Expression>, Box<Expression>),
    /// `±` of the second to the first; `true` for `∓`.
    PlusMinus(Box<Expression>, Box<Expression>, bool),
    /// So many percent.
    Percent(Box<Expression>),
    /// Items in brackets, in order: a tuple or an interval.
    Sequence {
        /// `(` or `[`.
        open: char,
        /// The items.
        items: Vec<Expression>,
        /// `)` or `]`.
        close: char,
    },
    /// Items in braces.
    Set(Vec<Expression>),
    /// Items without brackets.
    List(Vec<Expression>),
    /// A union of sets or intervals.
    Union(Vec<Expression>),
    /// Rows of a matrix, all of one length.
    Matrix(Vec<Vec<Expression>>),
    /// A chain of relations: the first side, then each sign with its side.
    Relation(Box<Expression>, Vec<(Relation, Expression)>),
    /// Words.
    Text(String),
}

/// A number and how it was written.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Number {
    /// Its value.
    pub(super) value: BigRational,
    /// Whether it has a decimal point.
    pub(super) is_decimal: bool,
    /// The power of ten of its last digit.
    pub(super) last_place: i32,
    /// Digits from the first one that is not zero.
    pub(super) significant: u32,
}

/// Functions of one argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Function {
    Absolute,
    Factorial,
    Floor,
    Ceiling,
    Exp,
    Ln,
    Sin,
    Cos,
    Tan,
    Cot,
    Sec,
    Csc,
    Arcsin,
    Arccos,
    Arctan,
    Sinh,
    Cosh,
    Tanh,
}

impl Function {
    /// The function of a name in text or LaTeX.
    pub(super) fn named(name: &str) -> Option<Self> {
        Some(match name {
            "abs" => Self::Absolute,
            "floor" => Self::Floor,
            "ceil" => Self::Ceiling,
            "exp" => Self::Exp,
            "ln" => Self::Ln,
            "sin" => Self::Sin,
            "cos" => Self::Cos,
            "tan" | "tg" => Self::Tan,
            "cot" => Self::Cot,
            "sec" => Self::Sec,
            "csc" => Self::Csc,
            "arcsin" | "asin" => Self::Arcsin,
            "arccos" | "acos" => Self::Arccos,
            "arctan" | "atan" => Self::Arctan,
            "sinh" => Self::Sinh,
            "cosh" => Self::Cosh,
            "tanh" => Self::Tanh,
            _ => return None,
        })
    }
}

/// Relation signs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Relation {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    In,
}

impl Relation {
    /// The sign with its sides exchanged.
    pub(super) fn flipped(self) -> Self {
        match self {
            Self::Less => Self::Greater,
            Self::LessOrEqual => Self::GreaterOrEqual,
            Self::Greater => Self::Less,
            Self::GreaterOrEqual => Self::LessOrEqual,
            same => same,
        }
    }
}

impl Expression {
    /// Calls `visit` on this expression and everything under it.
    pub(super) fn walk<'a>(&'a self, visit: &mut dyn FnMut(&'a Self)) {
        visit(self);
        match self {
            Self::Number(_) | Self::Symbol(_) | Self::Text(_) => {}
            Self::Sum(items)
            | Self::Product(items)
            | Self::Set(items)
            | Self::List(items)
            | Self::Union(items)
            | Self::Sequence { items, .. } => items.iter().for_each(|i| i.walk(visit)),
            Self::Negative(inner) | Self::Root(inner, _) | Self::Call(_, inner) | Self::Percent(inner) => {
                inner.walk(visit);
            }
            Self::Quotient(one, two)
            | Self::Power(one, two)
            | Self::Logarithm(one, two)
            | Self::Binomial(one, two)
            | Self::PlusMinus(one, two, _) => {
                one.walk(visit);
                two.walk(visit);
            }
            Self::Matrix(rows) => {
                for cell in rows.iter().flatten() {
                    cell.walk(visit);
                }
            }
            Self::Relation(first, rest) => {
                first.walk(visit);
                for (_, side) in rest {
                    side.walk(visit);
                }
            }
        }
    }

    /// The names of all symbols, sorted and without repetition.
    pub(super) fn symbols(&self) -> Vec<&str> {
        let mut names = Vec::new();
        self.walk(&mut |e| {
            if let Self::Symbol(name) = e {
                names.push(name.as_str());
            }
        });
        names.sort_unstable();
        names.dedup();
        names
    }

    /// Whether a `±` is somewhere in it.
    pub(super) fn has_plus_minus(&self) -> bool {
        let mut found = false;
        self.walk(&mut |e| found |= matches!(e, Self::PlusMinus(..)));
        found
    }

    /// The same with every `±` read as plus (`∓` as minus), or the other way round.
    pub(super) fn with_sign(&self, is_plus: bool) -> Self {
        let all = |items: &[Self]| items.iter().map(|i| i.with_sign(is_plus)).collect::<Vec<_>>();
        let boxed = |inner: &Self| Box::new(inner.with_sign(is_plus));
        match self {
            Self::Number(_) | Self::Symbol(_) | Self::Text(_) => self.clone(),
            Self::Sum(items) => Self::Sum(all(items)),
            Self::Product(items) => Self::Product(all(items)),
            Self::Set(items) => Self::Set(all(items)),
            Self::List(items) => Self::List(all(items)),
            Self::Union(items) => Self::Union(all(items)),
            Self::Sequence { open, items, close } => Self::Sequence { open: *open, items: all(items), close: *close },
            Self::Negative(inner) => Self::Negative(boxed(inner)),
            Self::Root(inner, index) => Self::Root(boxed(inner), *index),
            Self::Call(function, inner) => Self::Call(*function, boxed(inner)),
            Self::Percent(inner) => Self::Percent(boxed(inner)),
            Self::Quotient(one, two) => Self::Quotient(boxed(one), boxed(two)),
            Self::Power(one, two) => Self::Power(boxed(one), boxed(two)),
            Self::Logarithm(one, two) => Self::Logarithm(boxed(one), boxed(two)),
            Self::Binomial(one, two) => Self::Binomial(boxed(one), boxed(two)),
            Self::PlusMinus(one, two, is_minus_plus) => {
                let second = two.with_sign(is_plus);
                let second = if is_plus == *is_minus_plus { Self::Negative(Box::new(second)) } else { second };
                Self::Sum(vec![one.with_sign(is_plus), second])
            }
            Self::Matrix(rows) => Self::Matrix(rows.iter().map(|r| all(r)).collect()),
            Self::Relation(first, rest) => {
                Self::Relation(boxed(first), rest.iter().map(|(r, s)| (*r, s.with_sign(is_plus))).collect())
            }
        }
    }
}
