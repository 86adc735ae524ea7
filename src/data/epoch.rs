//! How a pass over the data is cut into micro-batches and optimizer steps.
//!
//! Counting is that of transformers 5.24 (`Trainer.set_initial_training_values`, `Trainer._run_epoch`) over accelerate's
//! `BatchSamplerShard`, and for prompts that of TRL 1.16 (`RepeatSampler`): nothing reaches over the end of an epoch, whose
//! last micro-batch may be smaller and whose last optimizer step may take fewer micro-batches. Everything is a function of
//! the number of a step, so a resumed run finds its place by the steps it has taken. `tests/golden/steps` holds what the
//! reference counts.

use std::ops::Range;

use super::Error;
use super::sampler::SamplerState;

/// The length of a pass. A micro-step is one micro-batch on every rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Epoch {
    /// Micro-steps of a pass: transformers' `len(dataloader)`.
    micro_steps: u64,
    /// Micro-steps of an optimizer step, but for the last of a pass.
    accumulation: u64,
}

/// An optimizer step's place in the data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The pass, counted from 0.
    pub epoch: u64,
    /// Its micro-steps within the pass.
    pub micro_steps: Range<u64>,
}

impl Epoch {
    fn new(micro_steps: usize, accumulation: usize) -> Result<Self, Error> {
        if accumulation == 0 {
            return Err(Error::Setting("`gradient_accumulation_steps: 0`; expected at least 1".into()));
        }
        Ok(Self { micro_steps: micro_steps as u64, accumulation: accumulation as u64 })
    }

    /// Micro-steps of a pass.
    pub fn micro_steps(&self) -> u64 {
        self.micro_steps
    }

    /// Optimizer steps of a pass.
    pub fn steps(&self) -> u64 {
        self.micro_steps.div_ceil(self.accumulation)
    }

    /// Optimizer steps of a run: `max_steps`, or else so many passes, rounded up to whole steps.
    pub fn total_steps(&self, epochs: f64, max_steps: Option<usize>) -> u64 {
        max_steps.map_or_else(|| (epochs * self.steps() as f64).ceil() as u64, |steps| steps as u64)
    }

    /// The place of the optimizer step with this index, counted from 0.
    pub fn place(&self, step: u64) -> Place {
        let (epoch, step) = (step / self.steps(), step % self.steps());
        let start = step * self.accumulation;
        Place { epoch, micro_steps: start..(start + self.accumulation).min(self.micro_steps) }
    }

    /// Passes that `steps` optimizer steps make, with the share of the last one: `epoch` in the metrics.
    pub fn after(&self, steps: u64) -> f64 {
        let Some(last) = steps.checked_sub(1) else { return 0.0 };
        let place = self.place(last);
        place.epoch as f64 + place.micro_steps.end as f64 / self.micro_steps as f64
    }

    /// Whether a pass ends with the last of `steps` optimizer steps.
    pub fn ends_after(&self, steps: u64) -> bool {
        steps > 0 && steps.is_multiple_of(self.steps())
    }
}

/// Rows (or packed sequences) in micro-batches, for SFT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowBatches {
    rows: usize,
    per_rank: usize,
    world_size: usize,
    epoch: Epoch,
}

impl RowBatches {
    /// `rows` in micro-batches of `per_rank` on each of `world_size` ranks, in order: the first batch goes to the first
    /// rank, the second to the second. The last may be smaller, or missing on some ranks, unless `drop_last` leaves out
    /// what does not fill a batch on every rank. accelerate fills up with rows from the start of the pass instead, which
    /// are then learnt twice; the number of micro-steps is the same.
    ///
    /// # Errors
    /// If no micro-batch results.
    pub fn new(
        rows: usize,
        per_rank: usize,
        world_size: usize,
        drop_last: bool,
        accumulation: usize,
    ) -> Result<Self, Error> {
        if rows == 0 {
            return Err(Error::Empty { what: "the data to sample from".into() });
        }
        if per_rank == 0 || world_size == 0 {
            return Err(Error::Setting(format!(
                "batches of {per_rank} rows on {world_size} ranks; expected 1 or more"
            )));
        }
        let micro_steps =
            if drop_last { rows / per_rank / world_size } else { rows.div_ceil(per_rank).div_ceil(world_size) };
        if micro_steps == 0 {
            return Err(Error::Setting(format!(
                "`dataloader_drop_last: true` leaves nothing to train on: {rows} sequences do not fill a batch of \
                 {per_rank} on each of {world_size} ranks; lower `per_device_train_batch_size`, or remove the key"
            )));
        }
        Ok(Self { rows, per_rank, world_size, epoch: Epoch::new(micro_steps, accumulation)? })
    }

    /// The length of a pass.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// What `rank` takes in a micro-step of a pass: places in the order of the pass.
    pub fn of_rank(&self, micro_step: u64, rank: usize) -> Range<usize> {
        let place = |batch: usize| (batch * self.per_rank).min(self.rows);
        let batch = micro_step as usize * self.world_size + rank;
        place(batch)..place(batch + 1)
    }

    /// What `rank` takes in an optimizer step over these micro-steps of a pass, one range for each: neighbouring batches, so that
    /// the ranks' sums are parts of one sum over the step. Together the ranks take what accelerate deals out in turns.
    pub fn of_step(&self, micro_steps: &Range<u64>, rank: usize) -> Vec<Range<usize>> {
        let own = neighbours(micro_steps, self.world_size, rank);
        own.map(|(micro_step, turn)| self.of_rank(micro_step, turn)).collect()
    }

    /// Rows that each pass leaves out.
    pub fn left_out(&self) -> usize {
        self.rows - self.seen(self.epoch.micro_steps)
    }

    /// The place after so many optimizer steps.
    pub fn state_after(&self, steps: u64) -> SamplerState {
        state_after(&self.epoch, steps, |micro_steps| self.seen(micro_steps))
    }

    fn seen(&self, micro_steps: u64) -> usize {
        (micro_steps as usize * self.world_size * self.per_rank).min(self.rows)
    }
}

/// Prompts in generation batches, for GRPO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PromptBatches {
    prompts: usize,
    per_batch: usize,
    slices: usize,
    iterations: usize,
    world_size: usize,
    epoch: Epoch,
}

/// What a micro-step of GRPO trains on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// The prompts of its generation batch: places in the order of the pass.
    pub prompts: Range<usize>,
    /// Micro-steps of the same generation batch before it.
    pub micro_steps_before: usize,
    /// Which of the generation batch's slices it takes.
    pub index: usize,
}

impl PromptBatches {
    /// Generation batches of `generation_batch_size` completions, `num_generations` for each prompt, of which each of
    /// `world_size` ranks trains on `per_rank` in a micro-step, and on the whole batch `iterations` times. An incomplete
    /// last generation batch is left out. Where the data have fewer prompts than one batch takes, a pass is one smaller
    /// batch of all of them; TRL has no batch then and does not train.
    ///
    /// # Errors
    /// If a number is 0, or the batch is not made of whole groups.
    pub fn new(
        prompts: usize,
        (generation_batch_size, num_generations): (usize, usize),
        per_rank: usize,
        world_size: usize,
        iterations: usize,
        accumulation: usize,
    ) -> Result<Self, Error> {
        if prompts == 0 {
            return Err(Error::Empty { what: "the data to sample from".into() });
        }
        let is_whole = num_generations > 0 && generation_batch_size.is_multiple_of(num_generations);
        if !is_whole || generation_batch_size == 0 || per_rank == 0 || world_size == 0 || iterations == 0 {
            return Err(Error::Setting(format!(
                "a generation batch of {generation_batch_size} in groups of {num_generations}, {per_rank} at a time on \
                 {world_size} ranks, {iterations} times; expected whole groups and numbers of 1 or more"
            )));
        }
        let per_batch = (generation_batch_size / num_generations).min(prompts);
        let slices = (per_batch * num_generations).div_ceil(per_rank * world_size);
        let micro_steps = prompts / per_batch * slices * iterations;
        let epoch = Epoch::new(micro_steps, accumulation)?;
        Ok(Self { prompts, per_batch, slices, iterations, world_size, epoch })
    }

    /// The length of a pass.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Prompts of a generation batch.
    pub fn per_batch(&self) -> usize {
        self.per_batch
    }

    /// Slices of a generation batch: micro-steps in which it is seen once.
    pub fn slices(&self) -> usize {
        self.slices
    }

    /// Micro-steps that a generation batch serves.
    pub fn micro_steps_of_batch(&self) -> usize {
        self.slices * self.iterations
    }

    /// What a micro-step of a pass trains on.
    pub fn slice(&self, micro_step: u64) -> Slice {
        let life = self.micro_steps_of_batch();
        let (batch, micro_steps_before) = (micro_step as usize / life, micro_step as usize % life);
        let prompts = batch * self.per_batch..(batch + 1) * self.per_batch;
        Slice { prompts, micro_steps_before, index: micro_steps_before % self.slices }
    }

    /// What `rank` takes in an optimizer step over these micro-steps of a pass: for each, the micro-step and which of its shares,
    /// as [`RowBatches::of_step`].
    pub fn of_step(&self, micro_steps: &Range<u64>, rank: usize) -> impl Iterator<Item = (u64, usize)> {
        neighbours(micro_steps, self.world_size, rank)
    }

    /// Prompts that each pass leaves out, others in each where the data are shuffled.
    pub fn left_out(&self) -> usize {
        self.prompts % self.per_batch
    }

    /// The place after so many optimizer steps; the prompts of a generation batch count from its first micro-step.
    pub fn state_after(&self, steps: u64) -> SamplerState {
        let life = self.micro_steps_of_batch();
        state_after(&self.epoch, steps, |micro_steps| (micro_steps as usize).div_ceil(life) * self.per_batch)
    }

    /// Micro-steps taken of the generation batch in which the last of so many optimizer steps ended; `None` where it was
    /// used up.
    pub fn taken_after(&self, steps: u64) -> Option<usize> {
        let end = self.epoch.place(steps.checked_sub(1)?).micro_steps.end;
        Some(end as usize % self.micro_steps_of_batch()).filter(|&taken| taken > 0)
    }
}

/// The shares of micro-steps that fall to `rank` where each of `world_size` ranks takes as many neighbours: the micro-step, and
/// whose share it would be if they were dealt out in turns.
fn neighbours(micro_steps: &Range<u64>, world_size: usize, rank: usize) -> impl Iterator<Item = (u64, usize)> + use<> {
    let (start, count) = (micro_steps.start, (micro_steps.end - micro_steps.start) as usize);
    (rank * count..(rank + 1) * count).map(move |share| (start + (share / world_size) as u64, share % world_size))
}

fn state_after(epoch: &Epoch, steps: u64, seen: impl Fn(u64) -> usize) -> SamplerState {
    let Some(last) = steps.checked_sub(1) else { return SamplerState::default() };
    let place = epoch.place(last);
    if place.micro_steps.end == epoch.micro_steps {
        return SamplerState { epoch: place.epoch + 1, position: 0 };
    }
    SamplerState { epoch: place.epoch, position: seen(place.micro_steps.end) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_last_batch_and_the_last_step_of_an_epoch_are_smaller() {
        let rows = RowBatches::new(10, 3, 1, false, 3).unwrap();
        let epoch = rows.epoch();
        assert_eq!((epoch.micro_steps(), epoch.steps(), rows.left_out()), (4, 2, 0));
        let sizes = |step| epoch.place(step).micro_steps.map(|m| rows.of_rank(m, 0)).collect::<Vec<_>>();
        assert_eq!(sizes(0), [0..3, 3..6, 6..9]);
        assert_eq!(sizes(1), [9..10]);
        assert_eq!(sizes(2), [0..3, 3..6, 6..9]);
        assert_eq!((epoch.place(2).epoch, epoch.total_steps(1.3, None), epoch.total_steps(9.0, Some(5))), (1, 3, 5));
        assert!((epoch.after(1) - 0.75).abs() < 1e-12 && (epoch.after(4) - 2.0).abs() < 1e-12);
        let states: Vec<SamplerState> = (0..=3).map(|steps| rows.state_after(steps)).collect();
        let state = |epoch, position| SamplerState { epoch, position };
        assert_eq!(states, [state(0, 0), state(0, 9), state(1, 0), state(1, 9)]);
        let dropped = RowBatches::new(10, 3, 1, true, 1).unwrap();
        assert_eq!((dropped.epoch().steps(), dropped.left_out()), (3, 1));
        let message = RowBatches::new(2, 3, 1, true, 1).unwrap_err().to_string();
        assert!(message.contains("2 sequences do not fill a batch of 3"), "{message}");
        assert!(RowBatches::new(0, 3, 1, false, 1).is_err() && RowBatches::new(2, 0, 1, false, 1).is_err());
        assert!(RowBatches::new(2, 1, 1, false, 0).is_err());
    }

    #[test]
    fn prompts_that_fill_no_generation_batch_are_left_out_unless_there_are_no_others() {
        // 5 prompts, 2 to a batch of 4 completions, which is seen twice in 2 slices of 2.
        let prompts = PromptBatches::new(5, (4, 2), 2, 1, 2, 3).unwrap();
        let epoch = prompts.epoch();
        assert_eq!((epoch.micro_steps(), epoch.steps(), prompts.left_out()), (8, 3, 1));
        let slice = |prompts, micro_steps_before, index| Slice { prompts, micro_steps_before, index };
        assert_eq!(prompts.slice(0), slice(0..2, 0, 0));
        assert_eq!(prompts.slice(3), slice(0..2, 3, 1));
        assert_eq!(prompts.slice(6), slice(2..4, 2, 0));
        let taken: Vec<Option<usize>> = (0..=4).map(|steps| prompts.taken_after(steps)).collect();
        assert_eq!(taken, [None, Some(3), Some(2), None, Some(3)]);
        let positions: Vec<usize> = (0..=4).map(|steps| prompts.state_after(steps).position).collect();
        assert_eq!(positions, [0, 2, 4, 0, 2]);

        let few = PromptBatches::new(3, (32, 2), 4, 1, 1, 4).unwrap();
        assert_eq!((few.per_batch(), few.slices(), few.epoch().steps(), few.left_out()), (3, 2, 1, 0));
        assert!(
            PromptBatches::new(3, (5, 2), 1, 1, 1, 1).is_err() && PromptBatches::new(0, (4, 2), 1, 1, 1, 1).is_err()
        );
    }

    proptest! {
        #[test]
        fn an_epoch_gives_every_row_once_to_one_rank(
            rows in 1usize..60, per_rank in 1usize..7, world_size in 1usize..4, accumulation in 1usize..5,
        ) {
            let batches = RowBatches::new(rows, per_rank, world_size, false, accumulation).unwrap();
            let epoch = batches.epoch();
            let mut seen = Vec::new();
            for step in 0..epoch.steps() {
                let place = epoch.place(step);
                prop_assert!(!place.micro_steps.is_empty() && place.epoch == 0);
                let dealt: Vec<usize> = (0..world_size)
                    .flat_map(|rank| batches.of_step(&place.micro_steps, rank).into_iter().flatten())
                    .collect();
                for micro_step in place.micro_steps {
                    (0..world_size).for_each(|rank| seen.extend(batches.of_rank(micro_step, rank)));
                }
                prop_assert_eq!(&dealt[..], &seen[seen.len() - dealt.len()..]);
            }
            prop_assert_eq!(seen, (0..rows).collect::<Vec<_>>());
            prop_assert!(epoch.ends_after(epoch.steps()) && epoch.place(epoch.steps()).epoch == 1);
        }
    }
}
