//! What can be wrong with the numbers that a loss is given.

/// An error of the room `algo`.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// Two arrays that belong together differ in length.
    #[error("{operation}: `{what}` has {got} elements, expected {expected}")]
    Length {
        /// Which function.
        operation: &'static str,
        /// Which array.
        what: &'static str,
        /// Its length.
        got: usize,
        /// The length that fits the others.
        expected: usize,
    },
    /// Row starts that do not describe rows of the token arrays.
    #[error("{operation}: row_starts must begin with 0, never fall and end with {tokens} (the tokens); {problem}")]
    RowStarts {
        /// Which function.
        operation: &'static str,
        /// Tokens in the arrays.
        tokens: usize,
        /// What is wrong, with the values.
        problem: String,
    },
    /// An option needs an array that is not there.
    #[error("{operation}: {option} needs `{what}`, which was not given")]
    Missing {
        /// Which function.
        operation: &'static str,
        /// The option, with its value.
        option: String,
        /// Which array.
        what: &'static str,
    },
    /// A mask with something else than 0 and 1.
    #[error("{operation}: `{what}` is {value} at token {index}, a mask holds 0 and 1 only")]
    Mask {
        /// Which function.
        operation: &'static str,
        /// Which mask.
        what: &'static str,
        /// Where.
        index: usize,
        /// The value there.
        value: u8,
    },
    /// A number outside its range.
    #[error("{operation}: `{what}` is {value}, expected {expected}")]
    Value {
        /// Which function.
        operation: &'static str,
        /// Which number.
        what: &'static str,
        /// Its value.
        value: f64,
        /// The range in words.
        expected: &'static str,
    },
}
