//! Metrics that can be joined over micro-batches and ranks without losing exactness.
//!
//! A mean over tokens of two ranks is not the mean of their means, so a metric carries what is needed to join it. The
//! loops merge the ranks' metrics of one micro-step, then average the values over the steps of a logging interval, as
//! TRL does.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// One metric of one micro-batch.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Metric {
    /// A mean: the sum and the number of what was summed. Its value is `sum / max(count, 1)`.
    Mean {
        /// Sum over tokens or rows.
        #[serde(with = "bits")]
        sum: f64,
        /// Number of tokens or rows.
        #[serde(with = "bits")]
        count: f64,
    },
    /// The smallest value over rows; NaN where no row has one.
    Min(#[serde(with = "bits")] f64),
    /// The largest value over rows; NaN where no row has one.
    Max(#[serde(with = "bits")] f64),
}

/// Numbers as their bits, because JSON has no NaN and metrics travel between ranks.
mod bits {
    use serde::{Deserialize, Deserializer, Serializer};

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes the field by reference")]
    pub(super) fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(value.to_bits())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        u64::deserialize(deserializer).map(f64::from_bits)
    }
}

impl Metric {
    /// The number to log.
    pub fn value(self) -> f64 {
        match self {
            Self::Mean { sum, count } => sum / count.max(1.0),
            Self::Min(value) | Self::Max(value) => value,
        }
    }

    /// Both together. Two kinds under one name do not happen; the first wins.
    #[must_use]
    pub fn join(self, other: Self) -> Self {
        match (self, other) {
            (Self::Mean { sum, count }, Self::Mean { sum: more, count: others }) => {
                Self::Mean { sum: sum + more, count: count + others }
            }
            // `f64::min` and `max` prefer the number where one side is NaN.
            (Self::Min(left), Self::Min(right)) => Self::Min(left.min(right)),
            (Self::Max(left), Self::Max(right)) => Self::Max(left.max(right)),
            (first, _) => first,
        }
    }
}

/// Metrics by the name they are logged under, in the order of the names, which is the same on every rank.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Metrics(BTreeMap<String, Metric>);

impl Metrics {
    /// Adds a mean.
    pub fn mean(&mut self, name: &str, sum: f64, count: f64) {
        self.0.insert(name.into(), Metric::Mean { sum, count });
    }

    /// Adds a smallest value over `values`, NaN ignored.
    pub fn min(&mut self, name: &str, values: impl IntoIterator<Item = f64>) {
        self.0.insert(name.into(), Metric::Min(values.into_iter().fold(f64::NAN, f64::min)));
    }

    /// Adds a largest value over `values`, NaN ignored.
    pub fn max(&mut self, name: &str, values: impl IntoIterator<Item = f64>) {
        self.0.insert(name.into(), Metric::Max(values.into_iter().fold(f64::NAN, f64::max)));
    }

    /// The metric of this name.
    pub fn get(&self, name: &str) -> Option<Metric> {
        self.0.get(name).copied()
    }

    /// Joins another micro-batch's or rank's metrics into these; a name that only one side has is kept.
    pub fn merge(&mut self, other: &Self) {
        for (name, &metric) in &other.0 {
            self.0.entry(name.clone()).and_modify(|mine| *mine = mine.join(metric)).or_insert(metric);
        }
    }

    /// The numbers to log.
    pub fn values(&self) -> BTreeMap<String, f64> {
        self.0.iter().map(|(name, metric)| (name.clone(), metric.value())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joined_means_weigh_by_count_and_extremes_ignore_what_is_not_a_number() {
        let (mut left, mut right) = (Metrics::default(), Metrics::default());
        left.mean("kl", 3.0, 3.0);
        right.mean("kl", 10.0, 1.0);
        left.min("low", [f64::NAN, 2.0]);
        right.min("low", [f64::NAN]);
        left.max("high", [f64::NAN]);
        right.max("high", [1.0, 4.0]);
        right.mean("only", 1.0, 2.0);
        left.merge(&right);
        let values = left.values();
        assert_eq!(values.keys().collect::<Vec<_>>(), ["high", "kl", "low", "only"]);
        assert_eq!(values.values().copied().collect::<Vec<_>>(), [4.0, 3.25, 2.0, 0.5]);
        assert!(Metric::Mean { sum: 0.0, count: 0.0 }.value().abs() < 1e-12);
        left.min("none", []);
        let text = serde_json::to_string(&left).unwrap();
        let back = serde_json::from_str::<Metrics>(&text).unwrap().values();
        let bits = |values: BTreeMap<String, f64>| -> Vec<(String, u64)> {
            values.into_iter().map(|(name, value)| (name, value.to_bits())).collect()
        };
        assert!(back["none"].is_nan());
        assert_eq!(bits(back), bits(left.values()));
    }
}
