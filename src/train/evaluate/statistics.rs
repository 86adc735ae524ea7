//! Estimates over units (prompts, or sequences), their intervals, and tests of paired differences.
//!
//! Units are independent of each other; samples of one prompt and tokens of one sequence are not. So everything here is a
//! function of one value a unit. A ratio of sums becomes such values by linearisation (the delta method): their mean is the
//! ratio, and their variance is that of the ratio.

use super::student;
use crate::rng::Stream;

/// The normal quantile of an interval of 95%.
const Z: f64 = 1.959_963_984_540_054;
/// Proportions over fewer units have Wilson's interval.
const FEW_UNITS: usize = 30;
/// Up to so many differences every combination of signs is looked at.
const MOST_EXACT: usize = 14;
/// Combinations of signs that are drawn of more differences.
const DRAWN_FLIPS: u32 = 9_999;

/// How an interval was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    /// Student's t of the units' values.
    T,
    /// Wilson's score (1927).
    Wilson,
}

impl Method {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::T => "t",
            Self::Wilson => "wilson",
        }
    }
}

/// An interval of 95%.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Interval {
    pub(super) low: f64,
    pub(super) high: f64,
    pub(super) method: Method,
}

/// Mean; NaN of nothing.
pub(super) fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The standard error of a mean; `None` of fewer than two values.
fn standard_error(values: &[f64]) -> Option<f64> {
    let (count, mean) = (values.len() as f64, mean(values));
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (values.len() > 1).then(|| (squares / (count - 1.0) / count).sqrt())
}

/// The interval of a mean by Student's t; `None` of fewer than two values.
pub(super) fn t_interval(values: &[f64]) -> Option<Interval> {
    let half = student::critical(values.len() as f64 - 1.0) * standard_error(values)?;
    let mean = mean(values);
    Some(Interval { low: mean - half, high: mean + half, method: Method::T })
}

/// Wilson's interval of a share of `count` trials.
///
/// # Equation
/// Wilson (1927): the shares `q` with `|share - q| <= z sqrt(q (1 - q) / count)`.
pub(super) fn wilson(share: f64, count: f64) -> Interval {
    let square = Z * Z / count;
    let center = (share + square / 2.0) / (1.0 + square);
    let half = Z / (1.0 + square) * (share * (1.0 - share) / count + square / (4.0 * count)).sqrt();
    // Exactly 0 and 1 where nothing or everything is right.
    let low = if share <= 0.0 { 0.0 } else { (center - half).max(0.0) };
    let high = if share >= 1.0 { 1.0 } else { (center + half).min(1.0) };
    Interval { low, high, method: Method::Wilson }
}

/// The interval of a share that is the mean of the units' values, made of `trials` outcomes in all: Student's t, but Wilson's
/// where there are few units or the former leaves [0, 1].
///
/// Wilson's number of trials is the effective one (Kish): that of independent outcomes whose share would vary as much as the
/// units' mean does. It is at least the number of units (outcomes of one unit may all be alike) and at most that of outcomes.
pub(super) fn share_interval(values: &[f64], trials: f64) -> Option<Interval> {
    let (share, units) = (mean(values), values.len() as f64);
    if values.is_empty() {
        return None;
    }
    let by_t = t_interval(values);
    if let Some(interval) = by_t.filter(|interval| {
        let is_inside = interval.low >= 0.0 && interval.high <= 1.0 && interval.low < interval.high;
        is_inside && values.len() >= FEW_UNITS
    }) {
        return Some(interval);
    }
    let effective = standard_error(values).map_or(units, |error| share * (1.0 - share) / (error * error));
    let effective = if effective.is_finite() { effective } else { units };
    Some(wilson(share.clamp(0.0, 1.0), effective.min(trials).max(units)))
}

/// The ratio of two sums, and values of the units of which it is the mean.
///
/// # Equation
/// `R = Σx / Σn`, values `R + (x - R n) / mean(n)`; their variance over the number of units is the ratio's to first order
/// (Cochran, Sampling Techniques, sec. 6.4).
pub(super) fn ratio(sums: &[f64], counts: &[f64]) -> (f64, Vec<f64>) {
    let ratio = sums.iter().sum::<f64>() / counts.iter().sum::<f64>();
    let mean_count = mean(counts);
    (ratio, sums.iter().zip(counts).map(|(sum, count)| ratio + (sum - ratio * count) / mean_count).collect())
}

/// The chance that one of `k` samples is right, of `samples` of which `right` are: without bias, over all choices of `k`.
///
/// # Equation
/// Chen et al. (2107.03374) eq. 1: `1 - C(samples - right, k) / C(samples, k)`, as the product that does not overflow.
pub(super) fn pass_at_k(samples: usize, right: usize, k: usize) -> f64 {
    if samples - right < k {
        return 1.0;
    }
    1.0 - (samples - right + 1..=samples).map(|i| 1.0 - k as f64 / i as f64).product::<f64>()
}

/// How two models differ over the same units.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Paired {
    /// Mean difference.
    pub(super) difference: f64,
    /// By Student's t; `None` of fewer than two units.
    pub(super) interval: Option<Interval>,
    /// Chance of a mean at least as far from 0 if each difference had either sign with equal chance (Fisher, 1935).
    pub(super) p_flip: f64,
    /// The same by the paired t-test; NaN of fewer than two units.
    pub(super) p_t: f64,
}

impl Paired {
    /// Whether the interval leaves out 0.
    pub(super) fn is_seen(&self) -> bool {
        self.interval.is_some_and(|interval| interval.low > 0.0 || interval.high < 0.0)
    }
}

/// Tests differences of the units; `None` if there are none. Signs that are not all looked at are drawn from `seed`.
pub(super) fn paired(differences: &[f64], seed: u64) -> Option<Paired> {
    if differences.is_empty() {
        return None;
    }
    let difference = mean(differences);
    let p_t = match standard_error(differences) {
        None => f64::NAN,
        Some(_) if difference == 0.0 => 1.0,
        Some(error) => student::two_sided(difference / error, differences.len() as f64 - 1.0),
    };
    Some(Paired { difference, interval: t_interval(differences), p_flip: sign_flip(differences, seed), p_t })
}

fn sign_flip(differences: &[f64], seed: u64) -> f64 {
    let moved: Vec<f64> = differences.iter().copied().filter(|&difference| difference != 0.0).collect();
    let observed = moved.iter().sum::<f64>().abs();
    // Sums that differ by rounding alone count as equal.
    let least = observed - 1e-12 * moved.iter().map(|d| d.abs()).sum::<f64>();
    let sum = |sign: &mut dyn FnMut(usize) -> bool| -> f64 {
        moved.iter().enumerate().map(|(at, &d)| if sign(at) { d } else { -d }).sum::<f64>().abs()
    };
    if moved.len() <= MOST_EXACT {
        let all = 1_u32 << moved.len();
        let as_far = (0..all).filter(|signs| sum(&mut |at| signs >> at & 1 == 1) >= least).count();
        return as_far as f64 / f64::from(all);
    }
    let as_far = (0..DRAWN_FLIPS).filter(|&flip| {
        let mut stream = Stream::new(seed, "sign_flip", 0, u64::from(flip));
        let mut bits = 0;
        let far = sum(&mut |at| {
            if at % 64 == 0 {
                bits = stream.bits();
            }
            bits >> (at % 64) & 1 == 1
        });
        far >= least
    });
    // What was observed is one of the combinations.
    (as_far.count() + 1) as f64 / f64::from(DRAWN_FLIPS + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_near(found: f64, expected: f64) -> bool {
        (found - expected).abs() < 1e-9
    }

    #[track_caller]
    fn assert_interval(found: Interval, (low, high): (f64, f64), method: Method) {
        assert!(is_near(found.low, low) && is_near(found.high, high), "{found:?}, expected {low} to {high}");
        assert_eq!(found.method, method);
    }

    /// Every choice of `k` of the samples, counted.
    fn pass_by_counting(samples: usize, right: usize, k: usize) -> f64 {
        let choices = (0_u32..1 << samples).filter(|chosen| chosen.count_ones() as usize == k);
        let (mut passed, mut all) = (0.0, 0.0);
        for chosen in choices {
            all += 1.0;
            // The first `right` samples are the right ones.
            passed += f64::from(u8::from(chosen.trailing_zeros() < right as u32));
        }
        passed / all
    }

    #[test]
    fn pass_at_k_is_the_share_of_all_choices_that_hold_a_right_sample() {
        for samples in 1..=9 {
            for (right, k) in (0..=samples).flat_map(|right| (1..=samples).map(move |k| (right, k))) {
                let (found, counted) = (pass_at_k(samples, right, k), pass_by_counting(samples, right, k));
                assert!((found - counted).abs() < 1e-12, "{right} of {samples} at {k}: {found}, counted {counted}");
            }
        }
        assert!((pass_at_k(200, 3, 100) - (1.0 - (100.0 * 99.0 * 98.0) / (200.0 * 199.0 * 198.0))).abs() < 1e-12);
    }

    /// scipy 1.17: `stats.t.interval(0.95, n - 1, mean, sem)`.
    #[test]
    fn t_intervals_are_scipys() {
        let found = t_interval(&[0.25, 0.5, 1.0, 0.0, 0.75, 0.5]).unwrap();
        assert_interval(found, (0.128_968_471_305_352_83, 0.871_031_528_694_646_7), Method::T);
        assert_eq!((t_interval(&[1.0]), t_interval(&[])), (None, None));
    }

    /// scipy 1.17: `stats.binomtest(k, n).proportion_ci(method="wilson")`.
    #[test]
    fn wilson_intervals_are_scipys() {
        for (right, count, low, high) in [
            (0.0, 10.0, 0.0, 0.277_532_799_862_889_26),
            (3.0, 10.0, 0.107_791_267_406_301_02, 0.603_221_852_538_854_6),
            (10.0, 10.0, 0.722_467_200_137_110_9, 1.0),
            (1.0, 1.0, 0.206_549_314_377_237_45, 1.0),
            (47.0, 200.0, 0.181_574_334_152_325_9, 0.298_413_688_827_625_4),
        ] {
            assert_interval(wilson(right / count, count), (low, high), Method::Wilson);
        }
    }

    #[test]
    fn shares_of_few_units_or_at_an_end_have_wilsons_interval() {
        let outcomes =
            |right: usize, count: usize| (0..count).map(|i| f64::from(u8::from(i < right))).collect::<Vec<_>>();
        // One sample a prompt: the effective number is that of the prompts.
        assert_interval(
            share_interval(&outcomes(3, 10), 10.0).unwrap(),
            (0.107_791_267_406_301_02, 0.603_221_852_538_854_6),
            Method::Wilson,
        );
        assert_eq!(share_interval(&outcomes(0, 200), 800.0).unwrap(), wilson(0.0, 200.0));
        assert_eq!(share_interval(&outcomes(1, 200), 200.0).unwrap().method, Method::Wilson);
        assert_eq!(share_interval(&outcomes(60, 200), 200.0), t_interval(&outcomes(60, 200)));
        assert_eq!(share_interval(&[1.0], 4.0).unwrap(), wilson(1.0, 1.0));
        assert_eq!(share_interval(&[], 0.0), None);
        // Samples that are alike within a prompt are worth one; those that are not are worth more, up to all of them.
        assert_eq!(share_interval(&outcomes(5, 10), 80.0).unwrap(), wilson(0.5, 10.0));
        assert_eq!(share_interval(&[0.5; 10], 80.0).unwrap(), wilson(0.5, 10.0));
        let mixed = [0.5, 0.375, 0.5, 0.625, 0.5, 0.5, 0.375, 0.625, 0.5, 0.5];
        assert_eq!(share_interval(&mixed, 80.0).unwrap(), wilson(0.5, 80.0));
    }

    /// numpy and scipy 1.17: the linearised variance with `stats.t.interval`.
    #[test]
    fn a_ratio_is_the_mean_of_its_values_and_has_their_interval() {
        let (found, values) = ratio(&[3.0, 8.0, 2.0, 10.0], &[2.0, 5.0, 1.0, 9.0]);
        assert!(is_near(found, 23.0 / 17.0) && is_near(mean(&values), found));
        assert_interval(t_interval(&values).unwrap(), (0.790_577_792_390_779_5, 1.915_304_560_550_397), Method::T);
    }

    /// scipy 1.17: `stats.ttest_1samp`, and `stats.permutation_test(permutation_type="samples")` over all signs.
    #[test]
    fn paired_tests_are_scipys() {
        let found = paired(&[0.5, -0.25, 0.25, 1.0, 0.0, 0.75, 0.25], 1).unwrap();
        assert!(is_near(found.difference, 2.5 / 7.0));
        assert_interval(found.interval.unwrap(), (-0.040_136_052_647_895_49, 0.754_421_766_933_609_3), Method::T);
        assert!(is_near(found.p_t, 0.070_130_514_451_899_48), "{}", found.p_t);
        assert!(is_near(found.p_flip, 0.125), "{}", found.p_flip);
        assert!(!found.is_seen());
    }

    #[test]
    fn drawn_signs_agree_with_all_of_them_and_with_themselves() {
        let few: Vec<f64> = (0..14).map(|i| if i % 4 == 0 { -1.0 } else { 0.5 + f64::from(i) / 20.0 }).collect();
        let exact = sign_flip(&few, 1);
        // A difference of 0 has no sign; one of almost 0 makes the count too large to look at all.
        let many = [&few[..], &[1e-13]].concat();
        let drawn = sign_flip(&many, 1);
        assert!((drawn - exact).abs() < 0.02, "{drawn}, exactly {exact}");
        assert!((sign_flip(&many, 1) - drawn).abs() < 1e-15);
    }

    #[test]
    fn equal_models_do_not_differ_and_one_unit_tells_nothing() {
        let found = paired(&[0.0; 40], 1).unwrap();
        assert!(is_near(found.p_t, 1.0) && is_near(found.p_flip, 1.0) && !found.is_seen());
        let one = paired(&[0.5], 1).unwrap();
        assert!(one.interval.is_none() && one.p_t.is_nan() && is_near(one.p_flip, 1.0) && !one.is_seen());
        assert!(paired(&[], 1).is_none());
        assert!(paired(&[0.5, 0.4, 0.6, 0.5], 1).unwrap().is_seen());
    }
}
