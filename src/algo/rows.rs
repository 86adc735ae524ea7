//! Checks of ragged arrays that every loss makes before it reads them.

use std::ops::Range;

use super::Error;

/// Rows of flat token arrays, and whose operation asks.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    operation: &'static str,
    starts: &'a [usize],
}

impl<'a> Rows<'a> {
    /// Rows over arrays of `tokens` elements.
    pub(super) fn new(operation: &'static str, starts: &'a [usize], tokens: usize) -> Result<Self, Error> {
        let wrong = |problem: String| Err(Error::RowStarts { operation, tokens, problem });
        let (Some(&first), Some(&last)) = (starts.first(), starts.last()) else {
            return wrong("it is empty".into());
        };
        if starts.len() < 2 {
            return wrong("it describes no row".into());
        }
        if first != 0 || last != tokens {
            return wrong(format!("it begins with {first} and ends with {last}"));
        }
        match starts.windows(2).position(|pair| pair[0] > pair[1]) {
            Some(row) => wrong(format!("row {row} is {}..{}", starts[row], starts[row + 1])),
            None => Ok(Self { operation, starts }),
        }
    }

    /// Number of rows, at least 1.
    pub(super) fn count(self) -> usize {
        self.starts.len() - 1
    }

    /// Tokens of row `row`.
    pub(super) fn range(self, row: usize) -> Range<usize> {
        self.starts[row]..self.starts[row + 1]
    }

    /// The token ranges in order.
    pub(super) fn iter(self) -> impl Iterator<Item = Range<usize>> + 'a {
        self.starts.windows(2).map(|pair| pair[0]..pair[1])
    }

    /// An array with one element per token.
    pub(super) fn tokens<T>(self, what: &'static str, values: &[T]) -> Result<(), Error> {
        length(self.operation, what, values.len(), self.starts[self.count()])
    }

    /// As [`Self::tokens`], where the array may be absent.
    pub(super) fn optional<T>(self, what: &'static str, values: Option<&[T]>) -> Result<(), Error> {
        values.map_or(Ok(()), |values| self.tokens(what, values))
    }

    /// An array with one element per row.
    pub(super) fn per_row<T>(self, what: &'static str, values: &[T]) -> Result<(), Error> {
        length(self.operation, what, values.len(), self.count())
    }

    /// The product of a mask and an optional second one, as booleans.
    pub(super) fn mask(self, mask: &[u8], tool_mask: Option<&[u8]>) -> Result<Vec<bool>, Error> {
        for (what, values) in [("mask", Some(mask)), ("tool_mask", tool_mask)] {
            let Some(values) = values else { continue };
            self.tokens(what, values)?;
            if let Some(index) = values.iter().position(|&v| v > 1) {
                return Err(Error::Mask { operation: self.operation, what, index, value: values[index] });
            }
        }
        Ok(match tool_mask {
            None => mask.iter().map(|&m| m == 1).collect(),
            Some(tools) => mask.iter().zip(tools).map(|(&m, &t)| m == 1 && t == 1).collect(),
        })
    }
}

/// An error where `got` is not `expected`.
pub(super) fn length(operation: &'static str, what: &'static str, got: usize, expected: usize) -> Result<(), Error> {
    if got == expected { Ok(()) } else { Err(Error::Length { operation, what, got, expected }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_do_not_fit_the_tokens_are_refused() {
        for starts in [&[][..], &[0], &[1, 4], &[0, 3], &[0, 3, 2, 4]] {
            assert!(matches!(Rows::new("test", starts, 4), Err(Error::RowStarts { .. })), "{starts:?}");
        }
        let rows = Rows::new("test", &[0, 3, 3, 4], 4).unwrap();
        assert_eq!(rows.iter().collect::<Vec<_>>(), [0..3, 3..3, 3..4]);
        assert_eq!(rows.mask(&[1, 1, 0, 1], Some(&[1, 0, 1, 1])).unwrap(), [true, false, false, true]);
        assert!(matches!(rows.mask(&[1, 1, 2, 1], None), Err(Error::Mask { index: 2, value: 2, .. })));
        assert!(matches!(rows.mask(&[1; 3], None), Err(Error::Length { got: 3, expected: 4, .. })));
    }
}
