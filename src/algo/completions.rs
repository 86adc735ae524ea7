//! Which completions were cut off, what that does to the loss mask, and how long they are.

use std::collections::BTreeMap;

use super::Error;
use super::rows::length;

const OPERATION: &str = "completion statistics";

/// Whether a completion ran into the length limit: its last token is none of `end_ids` (the end-of-sequence and padding
/// tokens). A completion without tokens has not ended either.
pub fn is_truncated(completion_ids: &[u32], end_ids: &[u32]) -> bool {
    completion_ids.last().is_none_or(|last| !end_ids.contains(last))
}

/// The loss mask of completions of these lengths, u8 `[N]`: all ones, or zeros for the truncated ones where
/// `mask_truncated_completions` is set (DAPO, 2503.14476, sec. 3.4). The sum of it over all ranks is
/// `num_items_in_batch`.
///
/// # Errors
/// If the slices differ in length.
pub fn completion_mask(
    lengths: &[usize],
    is_truncated: &[bool],
    mask_truncated_completions: bool,
) -> Result<Vec<u8>, Error> {
    length("completion mask", "is_truncated", is_truncated.len(), lengths.len())?;
    let rows = lengths.iter().zip(is_truncated);
    Ok(rows
        .flat_map(|(&tokens, &is_cut)| std::iter::repeat_n(u8::from(!(is_cut && mask_truncated_completions)), tokens))
        .collect())
}

/// Lengths of a generation batch in tokens, over all ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CompletionStatistics {
    /// Mean length.
    pub mean_length: f64,
    /// Shortest.
    pub min_length: f64,
    /// Longest.
    pub max_length: f64,
    /// Share that ran into the limit.
    pub clipped_ratio: f64,
    /// Mean length of those that ended by themselves; 0 where none did.
    pub mean_terminated_length: f64,
    /// Shortest of those.
    pub min_terminated_length: f64,
    /// Longest of those.
    pub max_terminated_length: f64,
}

impl CompletionStatistics {
    /// The metrics under TRL's names.
    pub fn metrics(&self) -> BTreeMap<String, f64> {
        [
            ("mean_length", self.mean_length),
            ("min_length", self.min_length),
            ("max_length", self.max_length),
            ("clipped_ratio", self.clipped_ratio),
            ("mean_terminated_length", self.mean_terminated_length),
            ("min_terminated_length", self.min_terminated_length),
            ("max_terminated_length", self.max_terminated_length),
        ]
        .into_iter()
        .map(|(name, value)| (format!("completions/{name}"), value))
        .collect()
    }
}

/// Statistics of the completions of all ranks.
///
/// # Errors
/// If there is none or the slices differ in length.
pub fn completion_statistics(lengths: &[usize], is_truncated: &[bool]) -> Result<CompletionStatistics, Error> {
    length(OPERATION, "is_truncated", is_truncated.len(), lengths.len())?;
    if lengths.is_empty() {
        return Err(Error::Value { operation: OPERATION, what: "completions", value: 0.0, expected: "1 or more" });
    }
    let ended: Vec<usize> = lengths.iter().zip(is_truncated).filter(|(_, cut)| !**cut).map(|(&l, _)| l).collect();
    let (mean_length, min_length, max_length) = spread(lengths);
    let (mean_terminated_length, min_terminated_length, max_terminated_length) = spread(&ended);
    Ok(CompletionStatistics {
        mean_length,
        min_length,
        max_length,
        clipped_ratio: (lengths.len() - ended.len()) as f64 / lengths.len() as f64,
        mean_terminated_length,
        min_terminated_length,
        max_terminated_length,
    })
}

/// Mean, smallest and largest; zeros where there is none.
fn spread(lengths: &[usize]) -> (f64, f64, f64) {
    let (Some(&least), Some(&most)) = (lengths.iter().min(), lengths.iter().max()) else { return (0.0, 0.0, 0.0) };
    (lengths.iter().sum::<usize>() as f64 / lengths.len() as f64, least as f64, most as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_completion_is_truncated_unless_it_ends_with_an_end_token() {
        assert!(!is_truncated(&[5, 1], &[1, 0]));
        assert!(!is_truncated(&[5, 0], &[1, 0]));
        assert!(is_truncated(&[1, 5], &[1, 0]));
        assert!(is_truncated(&[], &[1, 0]));
    }

    #[test]
    fn truncated_completions_are_masked_only_on_demand() {
        assert_eq!(completion_mask(&[2, 1], &[true, false], false).unwrap(), [1, 1, 1]);
        assert_eq!(completion_mask(&[2, 1], &[true, false], true).unwrap(), [0, 0, 1]);
        assert!(completion_mask(&[2, 1], &[true], true).is_err());
    }

    #[test]
    fn statistics_where_nothing_ended_are_zero_not_missing() {
        let statistics = completion_statistics(&[4, 8], &[true, true]).unwrap();
        let values: Vec<f64> = statistics.metrics().into_values().collect();
        assert_eq!(values, [1.0, 8.0, 0.0, 6.0, 0.0, 4.0, 0.0]);
        assert!(completion_statistics(&[], &[]).is_err());
    }
}
