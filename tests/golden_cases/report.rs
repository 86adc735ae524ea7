//! Counts cases and keeps the worst error of a golden group.

/// What a group's cases came to.
#[derive(Clone, Copy, Default)]
pub(crate) struct Counts {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) skipped: usize,
}

/// The results of one group.
pub(crate) struct Report {
    group: String,
    counts: Counts,
    worst: Option<(f64, String)>,
    failures: Vec<String>,
    skips: Vec<String>,
}

impl Report {
    pub(crate) fn new(group: &str) -> Self {
        Self { group: group.into(), counts: Counts::default(), worst: None, failures: vec![], skips: vec![] }
    }

    /// Records one case whose `error` must not exceed `tolerance`; a tolerance of 0 asks for equality.
    pub(crate) fn check(&mut self, case: &str, error: f64, tolerance: f64) {
        let share = if tolerance > 0.0 { error / tolerance } else { error };
        if error <= tolerance {
            self.counts.passed += 1;
        } else {
            // Also where the error is NaN.
            self.fail(case, &format!("error {error:.3e}, tolerance {tolerance:.3e}"));
        }
        if self.worst.as_ref().is_none_or(|(w, _)| share > *w || share.is_nan()) {
            self.worst = Some((share, format!("{case}: error {error:.3e}, tolerance {tolerance:.1e}")));
        }
    }

    /// Records one case that must be exactly so.
    pub(crate) fn expect(&mut self, case: &str, is_equal: bool, message: impl FnOnce() -> String) {
        if is_equal {
            self.counts.passed += 1;
        } else {
            self.fail(case, &message());
        }
    }

    /// Records a failed case.
    pub(crate) fn fail(&mut self, case: &str, message: &str) {
        self.counts.failed += 1;
        self.failures.push(format!("{case}: {message}"));
    }

    /// Records a case that cannot run here, with the reason.
    pub(crate) fn skip(&mut self, case: &str, reason: &str) {
        self.counts.skipped += 1;
        self.skips.push(format!("{case}: {reason}"));
    }

    /// Prints the group's line, its failures and skips.
    pub(crate) fn print(self) -> Counts {
        let Counts { passed, failed, skipped } = self.counts;
        let worst = self.worst.map_or_else(|| "exact".into(), |(_, text)| format!("worst {text}"));
        println!("{:<12} {passed:>5} passed {failed:>3} failed {skipped:>3} skipped   {worst}", self.group);
        for line in self.failures.iter().take(20) {
            println!("    FAILED {line}");
        }
        if self.failures.len() > 20 {
            println!("    ... and {} more", self.failures.len() - 20);
        }
        for line in &self.skips {
            println!("    skipped {line}");
        }
        self.counts
    }
}

/// The largest absolute difference of two slices; infinite where their lengths differ, NaN where one has a NaN.
pub(crate) fn max_difference(left: &[f32], right: &[f32]) -> f64 {
    if left.len() != right.len() {
        return f64::INFINITY;
    }
    left.iter().zip(right).fold(0.0, |worst: f64, (&l, &r)| {
        let difference = if l == r { 0.0 } else { f64::from(l) - f64::from(r) };
        if difference.is_nan() || worst.is_nan() { f64::NAN } else { worst.max(difference.abs()) }
    })
}
