//! Token counts of a data set, for the plan that a run opens with.

use serde::{Deserialize, Serialize};

/// One bar of the histogram.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bucket {
    /// Lengths up to this many tokens, and above the bucket before.
    pub up_to: usize,
    /// Number of examples.
    pub count: usize,
}

/// Lengths of examples, in tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TokenStatistics {
    /// Number of examples.
    pub count: usize,
    /// Tokens of all examples together.
    pub total: usize,
    /// Mean length.
    pub mean: f64,
    /// Shortest.
    pub min: usize,
    /// 5% of the examples are at most this long.
    pub p5: usize,
    /// A quarter of the examples is at most this long.
    pub p25: usize,
    /// Half of the examples are at most this long.
    pub median: usize,
    /// Three quarters of the examples are at most this long.
    pub p75: usize,
    /// 95% of the examples are at most this long.
    pub p95: usize,
    /// 99% of the examples are at most this long.
    pub p99: usize,
    /// Longest.
    pub max: usize,
    /// Histogram over powers of two, from the first to the last that has an example.
    pub buckets: Vec<Bucket>,
}

impl TokenStatistics {
    /// Counts.
    pub fn of(lengths: impl IntoIterator<Item = usize>) -> Self {
        let mut lengths: Vec<usize> = lengths.into_iter().collect();
        lengths.sort_unstable();
        let (Some(&min), Some(&max)) = (lengths.first(), lengths.last()) else { return Self::default() };
        let (count, total) = (lengths.len(), lengths.iter().sum());
        let quantile = |share: f64| lengths[((count as f64 * share).ceil() as usize).clamp(1, count) - 1];
        let mut buckets = Vec::new();
        let (mut up_to, mut before) = (min.next_power_of_two(), 0);
        while before < count {
            let below = lengths.partition_point(|&length| length <= up_to);
            buckets.push(Bucket { up_to, count: below - before });
            (before, up_to) = (below, up_to * 2);
        }
        Self {
            count,
            total,
            mean: total as f64 / count as f64,
            min,
            p5: quantile(0.05),
            p25: quantile(0.25),
            median: quantile(0.5),
            p75: quantile(0.75),
            p95: quantile(0.95),
            p99: quantile(0.99),
            max,
            buckets,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Bucket, TokenStatistics};

    #[test]
    fn counts_quantiles_and_buckets_add_up() {
        let statistics = TokenStatistics::of([5, 3, 100, 8, 9]);
        assert_eq!((statistics.count, statistics.total, statistics.min, statistics.max), (5, 125, 3, 100));
        assert_eq!((statistics.p5, statistics.p25, statistics.median), (3, 5, 8));
        assert_eq!((statistics.p75, statistics.p95, statistics.p99), (9, 100, 100));
        assert!((statistics.mean - 25.0).abs() < 1e-12);
        let bucket = |up_to, count| Bucket { up_to, count };
        let expected = [bucket(4, 1), bucket(8, 2), bucket(16, 1), bucket(32, 0), bucket(64, 0), bucket(128, 1)];
        assert_eq!(statistics.buckets, expected);
        assert_eq!(TokenStatistics::of([]), TokenStatistics::default());
        assert_eq!(TokenStatistics::of([0, 1]).buckets, [bucket(1, 2)]);
    }
}
