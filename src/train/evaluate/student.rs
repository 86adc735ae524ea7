//! Student's t distribution: the quantile of intervals and the tail of tests.
//!
//! Both come from the regularised incomplete beta function (Press et al., Numerical Recipes, sec. 6.4): of a t with `df`
//! degrees of freedom, P(|T| > t) = I(df / 2, 1 / 2; df / (df + t²)).

/// The share outside of an interval of 95%.
const OUTSIDE: f64 = 0.05;

/// P(|T| > |t|) with `df` degrees of freedom, at least 1.
pub(super) fn two_sided(t: f64, df: f64) -> f64 {
    let square = t * t;
    if square.is_infinite() {
        return 0.0;
    }
    incomplete_beta(df / 2.0, 0.5, df / (df + square), square / (df + square))
}

/// The t of which 95% of the distribution is nearer to 0.
pub(super) fn critical(df: f64) -> f64 {
    let (mut low, mut high) = (0.0, 16.0);
    for _ in 0..100 {
        let middle = f64::midpoint(low, high);
        if two_sided(middle, df) > OUTSIDE { low = middle } else { high = middle }
    }
    f64::midpoint(low, high)
}

/// The regularised incomplete beta function at `x`, which is given with `1 - x` so that neither loses digits.
fn incomplete_beta(a: f64, b: f64, x: f64, rest: f64) -> f64 {
    if x <= 0.0 || rest <= 0.0 {
        return f64::from(u8::from(rest <= 0.0));
    }
    let front = (ln_gamma(a + b) - ln_gamma(a) - ln_gamma(b) + a * x.ln() + b * rest.ln()).exp();
    // The fraction converges fast on the nearer side of the mean.
    if x < (a + 1.0) / (a + b + 2.0) { front * fraction(a, b, x) / a } else { 1.0 - front * fraction(b, a, rest) / b }
}

/// The continued fraction of the incomplete beta function, by Lentz's method.
fn fraction(a: f64, b: f64, x: f64) -> f64 {
    const MOST: u32 = 100_000;
    const TINY: f64 = 1e-300;
    let kept = |value: f64| if value.abs() < TINY { TINY } else { value };
    let mut c = 1.0;
    let mut d = 1.0 / kept(1.0 - (a + b) * x / (a + 1.0));
    let mut value = d;
    for step in 1..MOST {
        let m = f64::from(step);
        let even = m * (b - m) * x / ((a + 2.0 * m - 1.0) * (a + 2.0 * m));
        let odd = -(a + m) * (a + b + m) * x / ((a + 2.0 * m) * (a + 2.0 * m + 1.0));
        let before = value;
        for term in [even, odd] {
            d = 1.0 / kept(1.0 + term * d);
            c = kept(1.0 + term / c);
            value *= c * d;
        }
        if (value / before - 1.0).abs() < 1e-15 {
            break;
        }
    }
    value
}

/// The logarithm of the gamma function for positive numbers (Lanczos, g = 7, n = 9).
fn ln_gamma(x: f64) -> f64 {
    const FIRST: f64 = 0.999_999_999_999_809_9;
    const COEFFICIENTS: [f64; 8] = [
        676.520_368_121_885_1,
        -1_259.139_216_722_402_8,
        771.323_428_777_653_1,
        -176.615_029_162_140_6,
        12.507_343_278_686_905,
        -0.138_571_095_265_720_12,
        9.984_369_578_019_572e-6,
        1.505_632_735_149_311_6e-7,
    ];
    if x < 0.5 {
        // Reflection: the series is for the right half.
        return (std::f64::consts::PI / (std::f64::consts::PI * x).sin()).ln() - ln_gamma(1.0 - x);
    }
    let x = x - 1.0;
    let base = x + 7.5;
    let series = (1..).zip(COEFFICIENTS).fold(FIRST, |sum, (index, factor)| sum + factor / (x + f64::from(index)));
    0.5 * std::f64::consts::TAU.ln() + (x + 0.5) * base.ln() - base + series.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// scipy 1.17: `stats.t.ppf(0.975, df)`.
    #[test]
    fn quantiles_are_scipys() {
        for (df, expected) in [
            (1.0, 12.706_204_736_174_694),
            (2.0, 4.302_652_729_749_462),
            (4.0, 2.776_445_105_197_793_4),
            (9.0, 2.262_157_162_798_205),
            (29.0, 2.045_229_642_132_703),
            (199.0, 1.971_956_544_251_753_3),
            (1e6, 1.959_966_356_814_107),
        ] {
            let found = critical(df);
            assert!((found - expected).abs() < 1e-9 * expected, "df {df}: {found}, expected {expected}");
        }
    }

    /// scipy 1.17: `2 * stats.t.sf(abs(t), df)`.
    #[test]
    fn tails_are_scipys() {
        for (df, t, expected) in [
            (1.0, 1.0, 0.5),
            (3.0, 2.5, 0.087_706_647_008_065_56),
            (9.0, 0.3, 0.770_990_703_741_524_8),
            (9.0, -0.3, 0.770_990_703_741_524_8),
            (30.0, 4.0, 0.000_381_845_636_083_756_4),
            (199.0, 1.7, 0.090_693_289_638_240_42),
            (4.0, 0.0, 1.0),
            (4.0, f64::INFINITY, 0.0),
        ] {
            let found = two_sided(t, df);
            assert!((found - expected).abs() < 1e-11, "df {df}, t {t}: {found}, expected {expected}");
        }
    }
}
