//! Whether rows are those of an earlier run: a checksum per row as it was read, in order.
//!
//! A resumed run stands at a place in its data, which means nothing if the rows are others. [`RowsFingerprint`] goes into
//! checkpoints; [`RowsFingerprint::difference`] says what changed since.

use std::collections::BTreeSet;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::rows::{Dataset, Row};

/// Checksums kept at most; with more rows each stands for several.
const MOST_CHECKSUMS: usize = 2048;

/// What rows were.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowsFingerprint {
    /// How many.
    rows: usize,
    /// Sum of the rows' checksums, which does not depend on their order.
    sum: u64,
    /// Rows that one of `checksums` stands for; the last may stand for fewer.
    rows_per_checksum: usize,
    checksums: Vec<u64>,
}

/// Rows that a run has.
#[derive(Clone, Copy, Debug)]
pub enum Rows<'a> {
    /// They were read.
    Read(&'a Dataset),
    /// They were read when they were prepared.
    Known(&'a RowsFingerprint),
}

impl Rows<'_> {
    /// What they are.
    pub fn fingerprint(self) -> RowsFingerprint {
        match self {
            Self::Read(dataset) => RowsFingerprint::of(dataset),
            Self::Known(fingerprint) => fingerprint.clone(),
        }
    }
}

impl RowsFingerprint {
    /// Of the rows of a data set, in their order.
    pub fn of(dataset: &Dataset) -> Self {
        Self::without(dataset, &[])
    }

    /// Of the rows of a data set but some.
    pub fn without(dataset: &Dataset, left_out: &[usize]) -> Self {
        let left_out: BTreeSet<usize> = left_out.iter().copied().collect();
        let mut own = row_checksums(dataset.rows());
        let mut row = 0..own.len();
        own.retain(|_| row.next().is_some_and(|row| !left_out.contains(&row)));
        let rows_per_checksum = own.len().div_ceil(MOST_CHECKSUMS).max(1);
        Self {
            rows: own.len(),
            sum: own.iter().fold(0, |sum, &row| sum.wrapping_add(row)),
            rows_per_checksum,
            checksums: own.chunks(rows_per_checksum).map(joined).collect(),
        }
    }

    /// What is different about the rows of a run: `None` if they are these in this order.
    pub fn difference_from(&self, rows: Rows<'_>) -> Option<String> {
        let now = match rows {
            Rows::Read(dataset) => return self.difference(dataset),
            Rows::Known(now) => now,
        };
        if now == self {
            return None;
        }
        Some(match (self.rows, now.rows) {
            (then, count) if then != count => format!("there were {then} rows, there are {count}"),
            (_, count) if now.sum == self.sum => format!("the same {count} rows stand in another order"),
            (_, count) => format!("there are still {count} rows, and some were edited"),
        })
    }

    /// What is different about `dataset`: `None` if it has these rows in this order.
    pub fn difference(&self, dataset: &Dataset) -> Option<String> {
        let own = row_checksums(dataset.rows());
        let chunk = self.rows_per_checksum.max(1);
        let sum = own.iter().fold(0u64, |sum, &row| sum.wrapping_add(row));
        let now: Vec<u64> = own.chunks(chunk).map(joined).collect();
        if own.len() == self.rows && now == self.checksums {
            return None;
        }
        let what = match own.len() {
            count if count != self.rows => format!("there were {} rows, there are {count}", self.rows),
            count if sum == self.sum => format!("the same {count} rows stand in another order"),
            count => format!("there are still {count} rows, and some were edited"),
        };
        let same = now.iter().zip(&self.checksums).take_while(|(now, then)| now == then).count();
        let first = same.saturating_mul(chunk).min(own.len());
        // A chunk that ends with the data is no other one for that.
        let last = first.saturating_add(chunk).min(own.len().max(first + 1));
        let place = match (dataset.rows().get(first), chunk) {
            (None, _) => format!("the rows after number {first} are gone"),
            (Some(_), 1) => format!("the first difference is at {}", dataset.place(first)),
            (Some(_), _) => format!("the first difference is in rows {} to {last}", first + 1),
        };
        Some(format!("{what}; {place}"))
    }
}

fn row_checksums(rows: &[Row]) -> Vec<u64> {
    let checksum = |row: &Row| {
        let mut hasher = blake3::Hasher::new();
        // A map of JSON values always has a JSON form, and a hasher takes everything.
        let _ = serde_json::to_writer(&mut hasher, row);
        first_word(hasher.finalize())
    };
    rows.par_iter().map(checksum).collect()
}

fn joined(checksums: &[u64]) -> u64 {
    let mut hasher = blake3::Hasher::new();
    checksums.iter().for_each(|checksum| _ = hasher.update(&checksum.to_le_bytes()));
    first_word(hasher.finalize())
}

fn first_word(hash: blake3::Hash) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *hash.as_bytes();
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn dataset(values: impl IntoIterator<Item = i64>) -> Dataset {
        let row = |x: i64| json!({ "x": x, "text": format!("row {x}") }).as_object().unwrap().clone();
        Dataset::from_rows("memory", values.into_iter().map(row).collect())
    }

    #[test]
    fn rows_removed_added_reordered_or_edited_are_told_apart() {
        let then = RowsFingerprint::of(&dataset(0..10));
        let difference = |values: &[i64]| then.difference(&dataset(values.iter().copied()));
        assert_eq!(difference(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]), None);
        for (values, expected) in [
            (&[0, 1, 2, 3, 5, 6, 7, 8, 9][..], ["there were 10 rows, there are 9", "row 5"]),
            (&[0, 1, 2, 3, 4, 5, 6, 7], ["there were 10 rows, there are 8", "the rows after number 8 are gone"]),
            (&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], ["there are 11", "row 11"]),
            (&[0, 1, 3, 2, 4, 5, 6, 7, 8, 9], ["the same 10 rows stand in another order", "row 3"]),
            (&[0, 1, 2, 3, 4, 5, 6, 77, 8, 9], ["still 10 rows, and some were edited", "row 8"]),
            (&[], ["there are 0", "the rows after number 0 are gone"]),
        ] {
            let text = difference(values).unwrap();
            assert!(expected.iter().all(|part| text.contains(part)), "{values:?}: {text}");
        }
    }

    #[test]
    fn with_many_rows_a_checksum_stands_for_several_and_the_state_stays_small() {
        let count = 3 * MOST_CHECKSUMS as i64 + 5;
        let then = RowsFingerprint::of(&dataset(0..count));
        assert!(then.checksums.len() <= MOST_CHECKSUMS && then.rows_per_checksum == 4);
        assert_eq!(then.difference(&dataset(0..count)), None);
        let swapped = |a: i64, b: i64| {
            (0..count).map(move |x| {
                if x == a {
                    b
                } else if x == b {
                    a
                } else {
                    x
                }
            })
        };
        let text = then.difference(&dataset(swapped(100, 101))).unwrap();
        assert!(text.contains("another order") && text.contains("rows 101 to 104"), "{text}");
        let text = then.difference(&dataset(swapped(3, count - 1))).unwrap();
        assert!(text.contains("rows 1 to 4"), "{text}");
        for shorter in [1, 4, 5, 6] {
            let text = then.difference(&dataset(0..count - shorter)).unwrap();
            assert!(text.contains(&format!("there are {}", count - shorter)), "{text}");
        }
    }

    #[test]
    fn rows_that_are_only_known_by_their_fingerprint_are_compared_as_well() {
        let then = RowsFingerprint::of(&dataset(0..10));
        let difference = |now: RowsFingerprint| then.difference_from(Rows::Known(&now));
        assert_eq!(difference(then.clone()), None);
        assert_eq!(difference(RowsFingerprint::without(&dataset((0..5).chain([3, 9]).chain(5..10)), &[5, 6])), None);
        assert!(difference(RowsFingerprint::without(&dataset(0..10), &[3])).unwrap().contains("there are 9"));
        assert!(difference(RowsFingerprint::of(&dataset((0..10).rev()))).unwrap().contains("another order"));
        assert!(difference(RowsFingerprint::of(&dataset(1..11))).unwrap().contains("some were edited"));
        assert_eq!(then.difference_from(Rows::Read(&dataset(0..10))), None);
    }

    #[test]
    fn the_order_of_columns_does_not_hide_a_change_of_values() {
        let rows = |text: &str| vec![serde_json::from_str::<Row>(text).unwrap()];
        let then = RowsFingerprint::of(&Dataset::from_rows("memory", rows(r#"{"a": "b", "c": null}"#)));
        for other in [r#"{"a": "b"}"#, r#"{"a": "b", "c": ""}"#, r#"{"a": null, "c": "b"}"#, r#"{"a": "b", "d": null}"#]
        {
            assert!(then.difference(&Dataset::from_rows("memory", rows(other))).is_some(), "{other}");
        }
    }
}
