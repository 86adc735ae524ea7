//! A model by the texts it is shown: loss, perplexity and accuracy per target token.

use std::ops::Range;
use std::time::Instant;

use super::metric::Metric;
use super::{Measured, Speed};
use crate::config::settings::SftSettings;
use crate::data::Dataset;
use crate::engine::Speaker;
use crate::ops::head;
use crate::train::generation::Surroundings;
use crate::train::session::Session;
use crate::train::sft::{Split, loss_of};

/// Sums over the target tokens of each sequence.
#[derive(Default)]
struct Sums {
    indices: Vec<usize>,
    targets: Vec<usize>,
    loss: Vec<f64>,
    nll: Vec<f64>,
    correct: Vec<f64>,
    entropy: Vec<f64>,
}

/// Shows the model the sequences of `rows`, as an evaluation within the run does.
///
/// # Errors
/// If a row is unusable or the model fails.
pub(super) fn measure(
    settings: &SftSettings,
    session: &mut Session,
    (rows, split, packing): (&Dataset, &str, bool),
    (surroundings, ready): (&Surroundings<'_>, &dyn Fn()),
) -> anyhow::Result<Measured> {
    let split = Split::prepare(settings, session, split, rows, packing)?;
    if split.sequences.summary().is_conversational {
        session.adopt_end_of_turn(settings.model.eos_token.is_some())?;
    }
    ready();
    let started = Instant::now();
    let bar = surroundings.console.progress("eval", split.sequences.len() as u64, "sequences");
    let indices: Vec<usize> = (0..split.sequences.len()).collect();
    let (mut sums, mut tokens, mut sequences) = (Sums::default(), 0, 0);
    for chunk in indices.chunks(settings.training.per_device_eval_batch_size) {
        let batch = split.batch(chunk, settings.label_smoothing_factor > 0.0)?;
        let counts = split.target_counts(chunk)?;
        tokens += batch.tokens.len();
        if !batch.targets.is_empty() {
            for head in session.engine.logprobs(std::slice::from_ref(&batch), Speaker::Policy, 1.0)? {
                sums.add(settings, &head, &counts, sequences)?;
            }
        }
        sequences += counts.len();
        bar.set(chunk.last().map_or(0, |&last| last as u64 + 1), tokens as u64);
    }
    drop(bar);
    let speed = Speed { tokens, secs: started.elapsed().as_secs_f64() };
    Ok(sums.measured(speed))
}

impl Sums {
    /// Adds a batch of sequences with so many targets each, of which the first is number `first`.
    fn add(
        &mut self,
        settings: &SftSettings,
        head: &head::Output,
        counts: &[usize],
        first: usize,
    ) -> anyhow::Result<()> {
        let mut start = 0;
        for (sequence, &count) in counts.iter().enumerate() {
            let range = start..start + count;
            start += count;
            if range.is_empty() {
                continue;
            }
            let own = part(head, range);
            let sum = |values: &[f32]| values.iter().map(|&value| f64::from(value)).sum::<f64>();
            self.indices.push(first + sequence);
            self.targets.push(count);
            self.loss.push(loss_of(settings, &own, 1)?.loss);
            self.nll.push(-sum(&own.logprobs));
            self.entropy.push(sum(&own.entropies));
            self.correct.push(own.is_argmax.iter().filter(|&&is| is).count() as f64);
        }
        Ok(())
    }

    fn measured(self, speed: Speed) -> Measured {
        let counts: Vec<f64> = self.targets.iter().map(|&count| count as f64).collect();
        let metrics = vec![
            Metric::ratio("loss", &self.loss, &counts),
            Metric::ratio("nll", &self.nll, &counts).exp("perplexity"),
            Metric::share("mean_token_accuracy", &self.correct, &counts),
            Metric::ratio("entropy", &self.entropy, &counts),
        ];
        Measured { metrics, indices: self.indices, targets: self.targets, records: Vec::new(), speed }
    }
}

/// What the head says of some of its rows.
fn part(head: &head::Output, range: Range<usize>) -> head::Output {
    head::Output {
        logprobs: head.logprobs[range.clone()].to_vec(),
        entropies: head.entropies[range.clone()].to_vec(),
        is_argmax: head.is_argmax[range.clone()].to_vec(),
        log_sums: Vec::new(),
        mean_logprobs: head.mean_logprobs.get(range).unwrap_or_default().to_vec(),
    }
}
