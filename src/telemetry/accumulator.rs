//! Gathers the numbers of the micro-steps between two log lines into one row.
//!
//! Averaging follows TRL's `GRPOTrainer.log`: the mean over everything recorded since the last row, leaving out NaN, and
//! null where nothing but NaN came. Keys keep the order in which they first appeared, in every later row as well.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// One logged row: keys in insertion order.
pub type Row = serde_json::Map<String, Value>;

/// Collects metrics until [`Accumulator::drain`] makes a row of them.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Accumulator {
    entries: Vec<(String, Entry)>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
enum Entry {
    Mean { sum: f64, count: u64, has_nan: bool },
    Latest(Option<Value>),
}

impl Accumulator {
    /// Records one value of a metric that is averaged over the steps between two rows, e.g. `loss`.
    pub fn mean(&mut self, key: &str, value: f64) {
        let empty = Entry::Mean { sum: 0.0, count: 0, has_nan: false };
        let entry = self.entry(key, empty.clone());
        if matches!(entry, Entry::Latest(_)) {
            *entry = empty;
        }
        if let Entry::Mean { sum, count, has_nan } = entry {
            if value.is_nan() {
                *has_nan = true;
            } else {
                *sum += value;
                *count += 1;
            }
        }
    }

    /// Records the state of a metric of which only the newest value counts, e.g. `learning_rate`, `num_tokens`.
    pub fn latest(&mut self, key: &str, value: impl Into<Value>) {
        *self.entry(key, Entry::Latest(None)) = Entry::Latest(Some(value.into()));
    }

    /// The row of everything recorded since the last one, with `step` in front; the accumulator is empty after.
    ///
    /// JSON has no NaN and no infinity: such values become null, which pandas reads as NaN.
    pub fn drain(&mut self, step: u64) -> Row {
        let mut row = Row::new();
        row.insert("step".into(), step.into());
        for (key, entry) in &mut self.entries {
            match entry {
                Entry::Mean { sum, count, has_nan } => {
                    if *count > 0 {
                        row.insert(key.clone(), Value::from(*sum / *count as f64));
                    } else if *has_nan {
                        row.insert(key.clone(), Value::Null);
                    }
                    *entry = Entry::Mean { sum: 0.0, count: 0, has_nan: false };
                }
                Entry::Latest(value) => {
                    if let Some(value) = value.take() {
                        row.insert(key.clone(), value);
                    }
                }
            }
        }
        row
    }

    /// Whether recording can have led here: false for a state that was damaged on its way through a file.
    pub fn is_plausible(&self) -> bool {
        const MOST: u64 = 1 << 53;
        self.entries.iter().all(|(_, entry)| !matches!(entry, Entry::Mean { count, .. } if *count > MOST))
    }

    /// Whether nothing was recorded since the last row.
    pub fn is_empty(&self) -> bool {
        self.entries.iter().all(|(_, entry)| match entry {
            Entry::Mean { count, has_nan, .. } => *count == 0 && !has_nan,
            Entry::Latest(value) => value.is_none(),
        })
    }

    fn entry(&mut self, key: &str, empty: Entry) -> &mut Entry {
        let index = self.entries.iter().position(|(known, _)| known == key).unwrap_or_else(|| {
            self.entries.push((key.into(), empty));
            self.entries.len() - 1
        });
        &mut self.entries[index].1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(row: &Row) -> String {
        serde_json::to_string(row).unwrap()
    }

    #[test]
    fn means_leave_out_nan_and_states_keep_the_newest() {
        let mut metrics = Accumulator::default();
        for (loss, lr) in [(1.0, 0.1), (f64::NAN, 0.2), (2.0, 0.3)] {
            metrics.mean("loss", loss);
            metrics.latest("learning_rate", lr);
            metrics.mean("kl", f64::NAN);
        }
        metrics.latest("num_tokens", 4096_u64);
        assert_eq!(json(&metrics.drain(3)), r#"{"step":3,"loss":1.5,"learning_rate":0.3,"kl":null,"num_tokens":4096}"#);
        assert!(metrics.is_empty());
    }

    #[test]
    fn a_later_row_keeps_the_order_of_the_first_and_carries_nothing_over() {
        let mut metrics = Accumulator::default();
        metrics.mean("b", 1.0);
        metrics.mean("a", 2.0);
        metrics.drain(1);
        metrics.mean("a", 5.0);
        metrics.mean("b", 4.0);
        metrics.latest("c", f64::INFINITY);
        assert!(!metrics.is_empty());
        assert_eq!(json(&metrics.drain(2)), r#"{"step":2,"b":4.0,"a":5.0,"c":null}"#);
        assert_eq!(json(&metrics.drain(3)), r#"{"step":3}"#);
    }
}
