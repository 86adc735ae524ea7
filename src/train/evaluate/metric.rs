//! One number that a model is measured by, with what each unit (prompt or sequence) has to do with it.

use serde_json::{Value, json};

use super::statistics::{Interval, Paired, paired, ratio, share_interval, t_interval};

/// A metric of one model.
#[derive(Clone, Debug)]
pub(super) struct Metric {
    /// As in metrics.jsonl where a run has it.
    pub(super) name: String,
    pub(super) estimate: f64,
    /// Of 95%; `None` where there are too few units.
    pub(super) interval: Option<Interval>,
    /// The unit's own value; `None` where the metric does not apply to it.
    pub(super) of_units: Vec<Option<f64>>,
    /// Values whose mean is the estimate, for differences.
    contributions: Vec<Option<f64>>,
}

impl Metric {
    /// `Σ sums / Σ counts`; a unit with a count of 0 is left out.
    pub(super) fn ratio(name: impl Into<String>, sums: &[f64], counts: &[f64]) -> Self {
        Self::of_counted(name, sums, counts, t_interval)
    }

    /// As [`Metric::ratio`], of outcomes that are 0 or 1.
    pub(super) fn share(name: impl Into<String>, sums: &[f64], counts: &[f64]) -> Self {
        let trials = counts.iter().sum();
        Self::of_counted(name, sums, counts, |values| share_interval(values, trials))
    }

    /// The mean of one value in [0, 1] a unit, made of so many outcomes each.
    pub(super) fn mean_share(name: impl Into<String>, of_units: &[Option<f64>], outcomes: usize) -> Self {
        let counts: Vec<f64> = of_units.iter().map(|value| f64::from(u8::from(value.is_some()))).collect();
        let sums: Vec<f64> = of_units.iter().map(|value| value.unwrap_or(0.0)).collect();
        let trials = outcomes as f64 * counts.iter().sum::<f64>();
        Self::of_counted(name, &sums, &counts, |values| share_interval(values, trials))
    }

    fn of_counted(
        name: impl Into<String>,
        sums: &[f64],
        counts: &[f64],
        interval: impl Fn(&[f64]) -> Option<Interval>,
    ) -> Self {
        let is_counted: Vec<bool> = counts.iter().map(|&count| count > 0.0).collect();
        let counted = |values: &[f64]| -> Vec<f64> {
            values.iter().zip(&is_counted).filter(|(_, is_counted)| **is_counted).map(|(&value, _)| value).collect()
        };
        let (estimate, values) = ratio(&counted(sums), &counted(counts));
        let interval = interval(&values);
        let mut values = values.into_iter();
        let contributions = is_counted.iter().map(|&is| if is { values.next() } else { None }).collect();
        let own = sums.iter().zip(counts).map(|(sum, &count)| (count > 0.0).then(|| sum / count));
        Self { name: name.into(), estimate, interval, of_units: own.collect(), contributions }
    }

    /// The exponential: the perplexity of a mean negative log-probability.
    pub(super) fn exp(&self, name: impl Into<String>) -> Self {
        let estimate = self.estimate.exp();
        let interval = self.interval.map(|i| Interval { low: i.low.exp(), high: i.high.exp(), ..i });
        let of_units = self.of_units.iter().map(|value| value.map(f64::exp)).collect();
        // To first order, as everywhere.
        let moved = |value: f64| estimate * (1.0 + value - self.estimate);
        let contributions = self.contributions.iter().map(|value| value.map(moved)).collect();
        Self { name: name.into(), estimate, interval, of_units, contributions }
    }

    /// Units to which it applies.
    pub(super) fn num_units(&self) -> usize {
        self.contributions.iter().flatten().count()
    }

    /// How far it is above `other`'s, over the units that both have; `None` if there are none.
    pub(super) fn minus(&self, other: &Self, seed: u64) -> Option<Difference> {
        let both = self.contributions.iter().zip(&other.contributions);
        let differences: Vec<f64> = both.filter_map(|(own, other)| Some((*own)? - (*other)?)).collect();
        let paired = paired(&differences, seed)?;
        Some(Difference { name: self.name.clone(), units: differences.len(), paired })
    }

    /// Estimate and interval, for people.
    pub(super) fn shown(&self) -> String {
        format!("{}{}", number(self.estimate), shown_interval(self.interval, number))
    }

    pub(super) fn to_json(&self) -> Value {
        json!({
            "estimate": self.estimate,
            "low": self.interval.map(|interval| interval.low),
            "high": self.interval.map(|interval| interval.high),
            "interval": self.interval.map(|interval| interval.method.name()),
            "units": self.num_units(),
        })
    }
}

/// A metric of one model less that of another.
#[derive(Clone, Debug)]
pub(super) struct Difference {
    pub(super) name: String,
    units: usize,
    paired: Paired,
}

impl Difference {
    /// Difference, interval and what follows, for people.
    pub(super) fn shown(&self) -> (String, String) {
        let Paired { difference, interval, p_flip, .. } = self.paired;
        let change = format!("{}{}", signed(difference), shown_interval(interval, signed));
        let verdict = match interval {
            None => "one unit tells nothing".into(),
            Some(_) if self.paired.is_seen() => format!("p {}", chance(p_flip)),
            Some(_) => format!("no difference seen (p {})", chance(p_flip)),
        };
        (change, verdict)
    }

    pub(super) fn to_json(&self) -> Value {
        let interval = self.paired.interval;
        json!({
            "difference": self.paired.difference,
            "low": interval.map(|interval| interval.low),
            "high": interval.map(|interval| interval.high),
            "p_sign_flip": self.paired.p_flip,
            "p_t": self.paired.p_t,
            "is_seen": self.paired.is_seen(),
            "units": self.units,
        })
    }
}

fn shown_interval(interval: Option<Interval>, number: impl Fn(f64) -> String) -> String {
    interval.map_or_else(String::new, |i| format!(" [{}, {}]", number(i.low), number(i.high)))
}

/// Four decimals, fewer of large numbers.
fn number(value: f64) -> String {
    if value.is_nan() {
        return "none".into();
    }
    let decimals = match value.abs() {
        size if size >= 1000.0 => 1,
        size if size >= 10.0 => 2,
        _ => 4,
    };
    // Adding 0 takes the sign off a zero.
    format!("{:.decimals$}", value + 0.0)
}

fn signed(value: f64) -> String {
    let text = number(value);
    if text.starts_with('-') || value.is_nan() { text } else { format!("+{text}") }
}

fn chance(p: f64) -> String {
    if p < 0.001 { "< 0.001".into() } else { format!("{p:.3}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_that_counts_nothing_is_left_out() {
        let metric = Metric::ratio("m", &[1.0, 0.0, 3.0], &[2.0, 0.0, 2.0]);
        assert!((metric.estimate - 1.0).abs() < 1e-12);
        assert_eq!(metric.of_units, [Some(0.5), None, Some(1.5)]);
        assert_eq!(metric.num_units(), 2);
        let none = Metric::share("m", &[0.0], &[0.0]);
        assert_eq!((none.estimate.is_nan(), none.interval, none.shown().as_str()), (true, None, "none"));
    }

    #[test]
    fn a_difference_is_that_of_the_estimates_where_both_have_all_units() {
        let counts = [2.0, 5.0, 1.0, 9.0];
        let one = Metric::ratio("m", &[3.0, 8.0, 2.0, 10.0], &counts);
        let other = Metric::ratio("m", &[2.0, 8.5, 1.0, 9.0], &counts);
        let difference = one.minus(&other, 1).unwrap();
        assert!((difference.paired.difference - (one.estimate - other.estimate)).abs() < 1e-12);
        let (one, other) = (one.exp("p"), other.exp("p"));
        let difference = one.minus(&other, 1).unwrap();
        assert!((difference.paired.difference - (one.estimate - other.estimate)).abs() < 1e-12);
        let (change, verdict) = difference.shown();
        assert!(change.starts_with("+0.") && verdict.starts_with("no difference seen (p "), "{change} {verdict}");
    }

    #[test]
    fn numbers_are_short_and_differences_have_signs() {
        assert_eq!([0.123_45, 12.345, 1234.56, f64::NAN].map(number), ["0.1235", "12.35", "1234.6", "none"]);
        assert_eq!([0.5, -0.5, 0.0].map(signed), ["+0.5000", "-0.5000", "+0.0000"]);
        assert_eq!([0.000_1, 0.25].map(chance), ["< 0.001", "0.250"]);
    }
}
