//! What a matrix product is made of, and what trials of its algorithms come to.

use crate::device::Matrix;

/// How an operand stands in a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// As stored.
    Plain,
    /// Transposed.
    Transposed,
}

/// What a product is added to.
#[derive(Clone, Copy, Debug)]
pub enum Accumulate<'b> {
    /// Nothing: the result is written over.
    No,
    /// The result's own old values.
    Into,
    /// That matrix, which has the shape and type of the result and lies elsewhere.
    Onto(Matrix<'b>),
}

/// What a phase of trials did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tried {
    /// Kinds of products that were tried.
    pub products: usize,
    /// How long it took.
    pub secs: f64,
}

/// What became of choices that were kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Taken {
    /// So many are taken.
    Choices(usize),
    /// They are of another card, driver or library, in words; none is taken.
    Foreign(String),
    /// The text is not what [`choices_text`](super::choices_text) wrote; none is taken.
    Damaged(String),
}
