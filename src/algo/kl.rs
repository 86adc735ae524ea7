//! Estimators of the KL divergence of the policy from the reference, from one sampled token.
//!
//! Schulman, "Approximating KL Divergence" (2020): with `x` sampled from the policy and `d = ref_logprob - logprob`,
//! all three have the expectation `KL(policy || reference)` or approximate it; k3 is unbiased, never negative and has
//! the lowest variance, and is the one in the loss.

/// `logprob - ref_logprob`: unbiased, may be negative.
pub fn k1(logprob: f64, ref_logprob: f64) -> f64 {
    logprob - ref_logprob
}

/// `(logprob - ref_logprob)^2 / 2`: biased, never negative, low variance.
pub fn k2(logprob: f64, ref_logprob: f64) -> f64 {
    0.5 * (logprob - ref_logprob).powi(2)
}

/// `exp(d) - d - 1` with `d = ref_logprob - logprob`: unbiased and never negative (DeepSeekMath 2402.03300, eq. 4).
pub fn k3(logprob: f64, ref_logprob: f64) -> f64 {
    let difference = ref_logprob - logprob;
    difference.exp_m1() - difference
}

/// Derivative of [`k3`] with respect to `logprob`: `1 - exp(ref_logprob - logprob)`.
pub(super) fn k3_slope(logprob: f64, ref_logprob: f64) -> f64 {
    -(ref_logprob - logprob).exp_m1()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_estimators_agree_with_the_divergence_of_two_distributions() {
        let (policy, reference) = ([0.5f64, 0.3, 0.2], [0.4f64, 0.4, 0.2]);
        let divergence: f64 = policy.iter().zip(reference).map(|(p, r)| p * (p / r).ln()).sum();
        let expectation = |estimator: fn(f64, f64) -> f64| -> f64 {
            policy.iter().zip(reference).map(|(p, r)| p * estimator(p.ln(), r.ln())).sum()
        };
        assert!((expectation(k1) - divergence).abs() < 1e-12);
        assert!((expectation(k3) - divergence).abs() < 1e-12);
        assert!((expectation(k2) - divergence).abs() < 0.1 * divergence);
    }

    #[test]
    fn the_slope_of_k3_is_its_derivative() {
        for (logprob, ref_logprob) in [(-1.0, -1.0), (-2.0, -0.5), (-0.1, -4.0)] {
            let h = 1e-6;
            let difference = (k3(logprob + h, ref_logprob) - k3(logprob - h, ref_logprob)) / (2.0 * h);
            assert!((k3_slope(logprob, ref_logprob) - difference).abs() < 1e-8);
        }
    }
}
