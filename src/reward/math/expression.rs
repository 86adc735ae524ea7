//! What an answer means: a tree of numbers, symbols and operations.

use num_rational::BigRational;

use super::unit::Unit;

/// A mathematical expression or a collection of them.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Expression {
    /// A number as written.
    Number(Number),
    /// A variable, a name such as `f(x)`, or a constant kept as a symbol: `pi`, `e`, `i`, `infinity`.
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
    /// So many degrees of an angle.
    Degrees(Box<Expression>),
    /// A value with what is counted or measured.
    Quantity(Box<Expression>, Unit),
    /// `a : b` or `a : b : c`.
    Ratio(Vec<Expression>),
    /// A time of day.
    Clock(Clock),
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
    /// A union of sets, or conditions of which one holds.
    Union(Vec<Expression>),
    /// An intersection of sets, or conditions that all hold.
    Intersection(Vec<Expression>),
    /// The first set without the second.
    Difference(Box<Expression>, Box<Expression>),
    /// `R`, `Z`, `Q`, `N` or `C`: all numbers of a kind.
    Domain(char),
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
    /// Whether it has a decimal point and ends.
    pub(super) is_decimal: bool,
    /// The power of ten of its last digit.
    pub(super) last_place: i32,
    /// Digits from the first one that is not zero.
    pub(super) significant: u32,
}

/// A time of day as written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Clock {
    pub(super) hour: u32,
    pub(super) minute: u32,
    pub(super) second: Option<u32>,
    /// Whether it says a.m. or p.m.; true for the latter.
    pub(super) is_afternoon: Option<bool>,
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
            "cot" | "ctg" => Self::Cot,
            "sec" => Self::Sec,
            "csc" | "cosec" => Self::Csc,
            "arcsin" | "asin" => Self::Arcsin,
            "arccos" | "acos" => Self::Arccos,
            "arctan" | "atan" | "arctg" => Self::Arctan,
            "sinh" => Self::Sinh,
            "cosh" => Self::Cosh,
            "tanh" => Self::Tanh,
            _ => return None,
        })
    }

    /// The inverse that the exponent -1 stands for.
    pub(super) fn inverse(self) -> Option<Self> {
        Some(match self {
            Self::Sin => Self::Arcsin,
            Self::Cos => Self::Arccos,
            Self::Tan => Self::Arctan,
            _ => return None,
        })
    }
}

/// Relation signs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Relation {
    Equal,
    Approximately,
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

    /// Whether it is one of `<`, `≤`, `>`, `≥`.
    pub(super) fn is_order(self) -> bool {
        matches!(self, Self::Less | Self::LessOrEqual | Self::Greater | Self::GreaterOrEqual)
    }

    /// Whether it says what the left side is: `=`, `≈`, `∈`.
    pub(super) fn is_assigning(self) -> bool {
        matches!(self, Self::Equal | Self::Approximately | Self::In)
    }
}

impl Expression {
    /// The expressions directly under this one.
    pub(super) fn children(&self) -> Vec<&Self> {
        match self {
            Self::Number(_) | Self::Symbol(_) | Self::Text(_) | Self::Clock(_) | Self::Domain(_) => Vec::new(),
            Self::Sum(items)
            | Self::Product(items)
            | Self::Set(items)
            | Self::List(items)
            | Self::Union(items)
            | Self::Intersection(items)
            | Self::Ratio(items)
            | Self::Sequence { items, .. } => items.iter().collect(),
            Self::Negative(inner)
            | Self::Root(inner, _)
            | Self::Call(_, inner)
            | Self::Percent(inner)
            | Self::Degrees(inner)
            | Self::Quantity(inner, _) => vec![inner],
            Self::Quotient(one, two)
            | Self::Power(one, two)
            | Self::Logarithm(one, two)
            | Self::Binomial(one, two)
            | Self::Difference(one, two)
            | Self::PlusMinus(one, two, _) => vec![one, two],
            Self::Matrix(rows) => rows.iter().flatten().collect(),
            Self::Relation(first, rest) => {
                std::iter::once(first.as_ref()).chain(rest.iter().map(|(_, side)| side)).collect()
            }
        }
    }

    /// The same with `change` applied to everything directly under it.
    pub(super) fn map(&self, change: &dyn Fn(&Self) -> Self) -> Self {
        let all = |items: &[Self]| items.iter().map(change).collect::<Vec<_>>();
        let boxed = |inner: &Self| Box::new(change(inner));
        match self {
            Self::Number(_) | Self::Symbol(_) | Self::Text(_) | Self::Clock(_) | Self::Domain(_) => self.clone(),
            Self::Sum(items) => Self::Sum(all(items)),
            Self::Product(items) => Self::Product(all(items)),
            Self::Set(items) => Self::Set(all(items)),
            Self::List(items) => Self::List(all(items)),
            Self::Union(items) => Self::Union(all(items)),
            Self::Intersection(items) => Self::Intersection(all(items)),
            Self::Ratio(items) => Self::Ratio(all(items)),
            Self::Sequence { open, items, close } => Self::Sequence { open: *open, items: all(items), close: *close },
            Self::Negative(inner) => Self::Negative(boxed(inner)),
            Self::Root(inner, index) => Self::Root(boxed(inner), *index),
            Self::Call(function, inner) => Self::Call(*function, boxed(inner)),
            Self::Percent(inner) => Self::Percent(boxed(inner)),
            Self::Degrees(inner) => Self::Degrees(boxed(inner)),
            Self::Quantity(inner, unit) => Self::Quantity(boxed(inner), unit.clone()),
            Self::Quotient(one, two) => Self::Quotient(boxed(one), boxed(two)),
            Self::Power(one, two) => Self::Power(boxed(one), boxed(two)),
            Self::Logarithm(one, two) => Self::Logarithm(boxed(one), boxed(two)),
            Self::Binomial(one, two) => Self::Binomial(boxed(one), boxed(two)),
            Self::Difference(one, two) => Self::Difference(boxed(one), boxed(two)),
            Self::PlusMinus(one, two, is_minus_plus) => Self::PlusMinus(boxed(one), boxed(two), *is_minus_plus),
            Self::Matrix(rows) => Self::Matrix(rows.iter().map(|r| all(r)).collect()),
            Self::Relation(first, rest) => {
                Self::Relation(boxed(first), rest.iter().map(|(r, s)| (*r, change(s))).collect())
            }
        }
    }

    /// Calls `visit` on this expression and everything under it.
    pub(super) fn walk<'a>(&'a self, visit: &mut dyn FnMut(&'a Self)) {
        visit(self);
        for child in self.children() {
            child.walk(visit);
        }
    }

    /// Whether `is_wanted` holds for this expression or something under it.
    pub(super) fn any(&self, is_wanted: &dyn Fn(&Self) -> bool) -> bool {
        let mut found = false;
        self.walk(&mut |e| found |= is_wanted(e));
        found
    }

    /// How many expressions it is made of.
    pub(super) fn size(&self) -> usize {
        let mut size = 0;
        self.walk(&mut |_| size += 1);
        size
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

    /// Whether it holds no variable.
    pub(super) fn is_constant(&self) -> bool {
        self.symbols().into_iter().all(|name| matches!(name, "pi" | "e" | "i" | "infinity"))
    }

    /// Whether a `±` is somewhere in it.
    pub(super) fn has_plus_minus(&self) -> bool {
        self.any(&|e| matches!(e, Self::PlusMinus(..)))
    }

    /// The same with every `±` read as plus (`∓` as minus), or the other way round.
    pub(super) fn with_sign(&self, is_plus: bool) -> Self {
        let mapped = self.map(&|e| e.with_sign(is_plus));
        match mapped {
            Self::PlusMinus(one, two, is_minus_plus) => {
                let second = if is_plus == is_minus_plus { Self::Negative(two) } else { *two };
                Self::Sum(vec![*one, second])
            }
            other => other,
        }
    }
}
