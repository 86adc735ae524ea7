//! One optimizer step as a walk: forward, head and backward of all its micro-batches, in the order that ranks agreed on.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;

use super::kept::{Keeping, Queue};
use super::order::Course;
use super::retention::BatchSize;
use super::{DropoutKey, Engine, Error, Speaker, in_block};
use crate::model::HeadGradient;
use crate::model::batch::Batch;
use crate::model::layer::{Pass, PassDropout};
use crate::ops::linear::TokenKeys;
use crate::ops::rope::Rotation;
use crate::ops::{head, rows};
use crate::rng::Stream;
use crate::zero::{Needs, Sums, Visit, Walk};

/// How a step's loss depends on the head's output.
pub trait StepLoss<E> {
    /// The gradient of micro-batch `micro_step`, where it is known before the forward pass: the head's logits are then made
    /// once instead of twice.
    fn known(&self, micro_step: usize) -> Option<HeadGradient> {
        let _ = micro_step;
        None
    }

    /// Looks at the head's output of a micro-batch, each once and in their order, and says how the loss depends on it. Where
    /// that was known before, what this returns is not used.
    ///
    /// # Errors
    /// Whatever ends the step.
    fn gradient(&mut self, micro_step: usize, output: &head::Output) -> Result<HeadGradient, E>;
}

impl<E, F: FnMut(usize, &head::Output) -> Result<HeadGradient, E>> StepLoss<E> for F {
    fn gradient(&mut self, micro_step: usize, output: &head::Output) -> Result<HeadGradient, E> {
        self(micro_step, output)
    }
}

/// A micro-batch on its way through the blocks.
struct Micro<'a> {
    index: usize,
    batch: &'a Batch,
    rotation: Rotation,
    token_keys: TokenKeys,
    keeping: Keeping,
}

impl Micro<'_> {
    fn pass(&self, engine: &Engine, dropout: Option<(f64, u64)>) -> Pass<'_> {
        let token_keys = &self.token_keys;
        let dropout = dropout.map(|(probability, key)| PassDropout { probability, key, token_keys });
        engine.pass(self.batch, &self.rotation, true, dropout)
    }
}

impl Engine {
    /// Forward and backward of all micro-batches of an optimizer step. Every block's gradients, which start at zero, are final
    /// when this returns. A micro-batch without targets adds nothing, and `loss` is not asked for it. All ranks call this together,
    /// whether they have micro-batches or not.
    ///
    /// Logits are divided by `temperature`.
    ///
    /// # Errors
    /// If a block or `loss` fails, or a rank is lost.
    pub fn accumulate<E: From<Error>>(
        &self,
        step: &[Batch],
        temperature: f64,
        dropout: Option<DropoutKey>,
        loss: &mut dyn StepLoss<E>,
    ) -> Result<(), E> {
        self.store.zero_gradients().map_err(Error::from)?;
        let Course { micro_steps, at_a_time, .. } = self.course(step)?;
        let sweeps: Vec<Range<usize>> =
            (0..micro_steps).step_by(at_a_time).map(|first| first..(first + at_a_time).min(micro_steps)).collect();
        let sums = self.sums(micro_steps);
        let mut walk = self.store.walk(self.visits(sweeps.len()), Speaker::Policy, sums);
        for sweep in sweeps {
            let is_last = sweep.end == micro_steps;
            self.sweep((step, sweep), is_last, (temperature, dropout), &mut walk, loss)?;
        }
        Ok(())
    }

    /// How the micro-batches of a step are added.
    pub fn sums(&self, micro_steps: usize) -> Sums {
        let (rank, world_size) = (self.store.sharing().rank(), self.store.sharing().world_size());
        let sums = if self.has_fixed_sums { Sums::tree } else { Sums::running };
        sums(micro_steps, rank, world_size)
    }

    /// The blocks in the order of so many sweeps: embedding, layers, head, layers, embedding.
    fn visits(&self, sweeps: usize) -> Arc<[Visit]> {
        let head = 1 + self.config.num_hidden_layers;
        let visit = |needs: Needs| move |block: usize| Visit { block, needs };
        let forward = (0..head).map(visit(Needs::Values));
        let backward = (0..=head).rev().map(visit(Needs::Gradients));
        let sweep: Vec<Visit> = forward.chain(backward).collect();
        sweep.repeat(sweeps).into()
    }

    /// Some of a step's micro-batches through all blocks and back; those that this rank does not have, as those of others, with
    /// nothing.
    fn sweep<E: From<Error>>(
        &self,
        (step, sweep): (&[Batch], Range<usize>),
        is_last: bool,
        (temperature, key): (f64, Option<DropoutKey>),
        walk: &mut Walk<'_>,
        loss: &mut dyn StepLoss<E>,
    ) -> Result<(), E> {
        let micros = self.micros(step, sweep.clone(), &|micro_step| loss.known(micro_step).is_some())?;
        let probability = self.adapter.as_ref().map_or(0.0, |a| a.dropout);
        let key_of = |DropoutKey { seed, step }: DropoutKey| Stream::new(seed, "dropout", step, 0).bits();
        let dropout = key.filter(|_| probability > 0.0).map(|key| (probability, key_of(key)));
        let host = self.host(micros.iter().any(|micro| micro.keeping.is_parked))?;
        let layers = self.config.num_hidden_layers;

        let lease = walk.advance().map_err(Error::from)?;
        let embedding = self.bind_embedding(lease.params(), true)?;
        let mut hidden: Vec<Tensor> = Vec::with_capacity(micros.len());
        for Micro { batch, .. } in &micros {
            let start = embedding.forward(&batch.tokens, self.device(), self.types.residual);
            hidden.push(self.with_noise(start.map_err(in_block("embedding"))?, batch, key)?);
        }
        drop(lease);
        let mut kept: Vec<_> = micros.iter().map(|_| Vec::with_capacity(layers)).collect();
        for index in 0..layers {
            self.check_between_blocks()?;
            let lease = walk.advance().map_err(Error::from)?;
            let layer = self.bind_layer(lease.params(), index)?;
            for ((micro, hidden), kept) in micros.iter().zip(&mut hidden).zip(&mut kept) {
                let pass = micro.pass(self, dropout);
                let (output, left) = self.forward_keeping(&layer, index, hidden, micro.keeping, &pass, host)?;
                *hidden = output;
                kept.push(left);
            }
        }
        self.check_between_blocks()?;
        // The head needs the memory of what is still on its way out, and it is out by now.
        host.settle()?;

        let lease = walk.advance().map_err(Error::from)?;
        let head = self.bind_head(lease.params(), true)?;
        let mut at = micros.iter().zip(hidden).peekable();
        let mut gradients: Vec<Tensor> = Vec::with_capacity(micros.len());
        for micro_step in sweep.clone() {
            if let Some((micro, hidden)) = at.next_if(|(micro, _)| micro.index == micro_step) {
                let Micro { batch, .. } = micro;
                let head_dropout = dropout.and_then(|(p, key)| self.head_dropout(&head, batch, p, key));
                let question = self.question(batch, temperature, head_dropout.as_ref());
                let picked = rows::gather(&hidden, &batch.head_rows).map_err(Error::from)?;
                drop(hidden);
                let d_picked = if let Some(gradient) = loss.known(micro_step) {
                    let both = head.forward_backward(&picked, &question, &gradient);
                    let (output, d_picked) = both.map_err(in_block("head"))?;
                    loss.gradient(micro_step, &output)?;
                    d_picked
                } else {
                    let (output, saved) = head.forward(&picked, &question).map_err(in_block("head"))?;
                    let gradient = loss.gradient(micro_step, &output)?;
                    head.backward(&gradient, &question, &output, &saved).map_err(in_block("head"))?
                };
                drop(picked);
                let spread = rows::scatter_add(&d_picked, &batch.head_rows, batch.tokens.len());
                gradients.push(spread.map_err(Error::from)?);
            }
            lease.end_micro_step(micro_step).map_err(Error::from)?;
        }
        drop((at, head));
        finish(lease, is_last)?;

        let mut queue = Queue::new(kept, host)?;
        for index in (0..layers).rev() {
            self.check_between_blocks()?;
            let lease = walk.advance().map_err(Error::from)?;
            let layer = self.bind_layer(lease.params(), index)?;
            let mut at = micros.iter().zip(&mut gradients).peekable();
            for micro_step in sweep.clone() {
                if let Some((micro, gradient)) = at.next_if(|(micro, _)| micro.index == micro_step) {
                    let pass = micro.pass(self, dropout);
                    let comes_late = micro.keeping.plan.comes_late();
                    *gradient = queue.backward(&layer, index, gradient, comes_late, &pass)?;
                }
                lease.end_micro_step(micro_step).map_err(Error::from)?;
            }
            drop((at, layer));
            finish(lease, is_last)?;
        }

        let lease = walk.advance().map_err(Error::from)?;
        let embedding = self.bind_embedding(lease.params(), true)?;
        let mut at = micros.iter().zip(&gradients).peekable();
        for micro_step in sweep {
            if let Some((micro, gradient)) = at.next_if(|(micro, _)| micro.index == micro_step)
                && embedding.is_trained()
            {
                embedding.backward(gradient, &micro.batch.tokens).map_err(in_block("embedding"))?;
            }
            lease.end_micro_step(micro_step).map_err(Error::from)?;
        }
        drop(at);
        finish(lease, is_last)?;
        Ok(())
    }

    /// The micro-batches of a sweep that have something to learn; `is_known` says of which the loss's gradient is.
    fn micros<'a>(
        &self,
        step: &'a [Batch],
        sweep: Range<usize>,
        is_known: &dyn Fn(usize) -> bool,
    ) -> Result<Vec<Micro<'a>>, Error> {
        let own: Vec<(usize, &Batch)> = step
            .iter()
            .enumerate()
            .filter(|(index, batch)| sweep.contains(index) && !batch.targets.is_empty())
            .collect();
        let is_alone = own.len() == 1;
        let has_room = is_alone || self.has_room_for_inputs(own.iter().map(|(_, batch)| batch.tokens.len()).sum());
        let micro = |(index, batch): (usize, &'a Batch)| {
            let plan = self.plan_said(BatchSize::of(batch, is_known(index)), is_alone);
            let is_parked = plan.is_parked() || !has_room;
            let keeping = Keeping { plan, is_parked, is_last_next: is_alone };
            let (rotation, token_keys) = (self.rotation(&batch.positions)?, batch.token_keys.as_slice().into());
            Ok(Micro { index, batch, rotation, token_keys, keeping })
        };
        own.into_iter().map(micro).collect()
    }
}

/// Ends a visit of backward; in the last sweep the block's gradients are final.
fn finish(lease: crate::zero::Lease<'_>, is_last: bool) -> Result<(), Error> {
    if is_last {
        lease.finish_gradients()?;
    }
    Ok(())
}
