//! What a run says of steps and generation batches that teach nothing.
//!
//! Each kind is counted, said the first three times and then at every power of ten, and summed up at the end.

/// Generation batches in a row without a signal after which that is said.
const FLAT_IN_A_ROW: u64 = 10;

/// Counts of what taught nothing.
#[derive(Debug, Default)]
pub(super) struct Notices {
    steps_without_target: u64,
    generations: u64,
    all_masked: u64,
    without_signal: u64,
    without_signal_in_a_row: u64,
}

/// What a generation batch came to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Generation<'a> {
    /// Completions in it.
    pub(super) completions: usize,
    /// Those that ran into the length limit.
    pub(super) truncated: usize,
    /// Tokens that the loss counts.
    pub(super) num_items: usize,
    /// One per completion; 0 where nothing is to be learnt.
    pub(super) advantages: &'a [f32],
    /// NaN where no function scored.
    pub(super) rewards: &'a [f64],
}

impl Notices {
    /// Notes a step whose micro-batches have no token to learn; what is to be said of it.
    pub(super) fn step_without_target(&mut self, step: u64, sequences: usize) -> Option<String> {
        self.steps_without_target += 1;
        let count = self.steps_without_target;
        is_said(count).then(|| {
            format!(
                "step {step} has no token to learn in its {sequences} sequences (an empty text, or a prompt as long as \
                 `max_length`): no parameter was changed; {count} such steps so far"
            )
        })
    }

    /// Notes a generation batch made for `step`; what is to be said of it.
    pub(super) fn generation(&mut self, step: u64, batch: Generation<'_>) -> Option<String> {
        let Generation { completions, truncated, num_items, advantages, rewards } = batch;
        self.generations += 1;
        let total = self.generations;
        if num_items == 0 {
            self.all_masked += 1;
            let count = self.all_masked;
            return is_said(count).then(|| {
                format!(
                    "step {step}: {truncated} of {completions} completions ran into `max_completion_length`, and \
                     `mask_truncated_completions: true` leaves them out, so nothing is learnt from this generation batch \
                     ({count} of {total} so far); raise `max_completion_length`, or let the model end its answers"
                )
            });
        }
        if advantages.iter().any(|&advantage| advantage != 0.0) {
            self.without_signal_in_a_row = 0;
            return None;
        }
        self.without_signal += 1;
        self.without_signal_in_a_row += 1;
        let count = self.without_signal_in_a_row;
        if count < FLAT_IN_A_ROW || !is_said(count) {
            return None;
        }
        let why = if rewards.iter().all(|reward| reward.is_nan()) {
            "no reward function scored any completion"
        } else {
            "within each group all rewards are equal"
        };
        Some(format!(
            "step {step}: in {count} generation batches in a row {why}, so advantages are 0 and nothing is learnt; look at \
             completions.jsonl, and make the rewards finer, the prompts easier or harder, or `num_generations` larger"
        ))
    }

    /// Rows of the summary.
    pub(super) fn summary(&self) -> Vec<(&'static str, String)> {
        let rows = [
            ("no token to learn", self.steps_without_target, "steps"),
            ("all truncated", self.all_masked, "generation batches, from which nothing was learnt"),
            ("equal rewards", self.without_signal, "generation batches, from which nothing was learnt"),
        ];
        let of_total = |unit: &str| if unit == "steps" { String::new() } else { format!(" of {}", self.generations) };
        let rows = rows.into_iter().filter(|(_, count, _)| *count > 0);
        rows.map(|(name, count, unit)| (name, format!("{count}{} {unit}", of_total(unit)))).collect()
    }
}

fn is_said(count: u64) -> bool {
    count <= 3 || 10u64.checked_pow(count.ilog10()) == Some(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_said_a_few_times_and_summed_up() {
        let mut notices = Notices::default();
        let said: Vec<u64> = (1..=120).filter(|&step| notices.step_without_target(step, 2).is_some()).collect();
        assert_eq!(said, [1, 2, 3, 10, 100]);
        assert_eq!(notices.summary(), [("no token to learn", "120 steps".to_string())]);

        let mut notices = Notices::default();
        let batch = |num_items, advantages, rewards| Generation {
            completions: 2,
            truncated: 2,
            num_items,
            advantages,
            rewards,
        };
        let masked = notices.generation(1, batch(0, &[1.0, -1.0], &[0.0, 1.0])).unwrap();
        assert!(masked.contains("2 of 2 completions") && masked.contains("1 of 1 so far"), "{masked}");
        let mut flat = |rewards| notices.generation(2, batch(4, &[0.0, 0.0], rewards));
        assert!((1..10).all(|_| flat(&[0.5, 0.5]).is_none()));
        assert!(flat(&[0.5, 0.5]).unwrap().contains("10 generation batches in a row within each group"));
        assert!((11..100).all(|_| flat(&[0.5, 0.5]).is_none()));
        assert!(flat(&[f64::NAN, f64::NAN]).unwrap().contains("no reward function scored"));
        assert!(notices.generation(3, batch(4, &[1.0, -1.0], &[0.0, 1.0])).is_none());
        assert!(notices.generation(4, batch(4, &[0.0, 0.0], &[1.0, 1.0])).is_none());
        let rows = notices.summary();
        assert_eq!(rows[0].1, "1 of 103 generation batches, from which nothing was learnt");
        assert_eq!(rows[1].1, "101 of 103 generation batches, from which nothing was learnt");
    }
}
