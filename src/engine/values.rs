//! Passes without gradients: log-probabilities, logits, and the search for values that are not finite.

use std::sync::Arc;

use candle_core::Tensor;

use super::{Engine, Error, Speaker, in_block, in_layer};
use crate::model::batch::Batch;
use crate::model::layer::Retaining;
use crate::ops::{buffer, head, rows};
use crate::zero::{Needs, Sums, Visit, Walk};

impl Engine {
    /// Log-probabilities and entropies of the targets of each batch. Logits are divided by `temperature`.
    ///
    /// Batches pass one after the other where all blocks are there, and together, block by block, where each has to come first.
    ///
    /// # Errors
    /// If a block fails.
    pub fn logprobs(&self, batches: &[Batch], speaker: Speaker, temperature: f64) -> Result<Vec<head::Output>, Error> {
        // Where ranks gather blocks together, one that has no batch helps the others.
        let parts: Vec<&[Batch]> =
            if self.store.holds_all_of(speaker) { batches.chunks(1).collect() } else { vec![batches] };
        let mut outputs = Vec::with_capacity(batches.len());
        for batches in parts {
            let (hidden, mut walk) = self.walk_only(batches, speaker)?;
            let lease = walk.advance()?;
            let head = self.bind_head(lease.params(), self.uses_adapter(speaker))?;
            for (batch, hidden) in batches.iter().zip(hidden) {
                let picked = rows::gather(&hidden, &batch.head_rows)?;
                let question = self.question(batch, temperature, None);
                outputs.push(head.forward(&picked, &question).map_err(in_block("head"))?.0);
            }
        }
        Ok(outputs)
    }

    /// The logits after every token of the batch: f32 `[N, V]`. For tests and short prompts only: it holds them all.
    ///
    /// # Errors
    /// If a block fails.
    pub fn logits(&self, batch: &Batch, speaker: Speaker) -> Result<Tensor, Error> {
        let (hidden, mut walk) = self.walk_only(std::slice::from_ref(batch), speaker)?;
        let lease = walk.advance()?;
        let head = self.bind_head(lease.params(), self.uses_adapter(speaker))?;
        head.logits(&hidden[0], self.types.compute).map_err(in_block("head"))
    }

    /// Whether adapters take part when `speaker` speaks.
    fn uses_adapter(&self, speaker: Speaker) -> bool {
        speaker == Speaker::Policy || self.store.has_reference()
    }

    /// A walk through all blocks once.
    pub fn walk_once(&self, speaker: Speaker) -> Walk<'_> {
        let order: Arc<[Visit]> =
            (0..self.store.num_blocks()).map(|block| Visit { block, needs: Needs::Values }).collect();
        self.store.walk(order, speaker, Sums::running(0, 0, 1))
    }

    /// The hidden states of each batch after the last layer, and the walk, which has come to the head.
    fn walk_only(&self, batches: &[Batch], speaker: Speaker) -> Result<(Vec<Tensor>, Walk<'_>), Error> {
        let use_adapter = self.uses_adapter(speaker);
        let mut walk = self.walk_once(speaker);
        let lease = walk.advance()?;
        let embedding = self.bind_embedding(lease.params(), use_adapter)?;
        let embed = |batch: &Batch| embedding.forward(&batch.tokens, self.device(), self.types.residual);
        let mut hidden: Vec<Tensor> =
            batches.iter().map(embed).collect::<Result<_, _>>().map_err(in_block("embedding"))?;
        drop(lease);
        let rotations: Vec<_> =
            batches.iter().map(|batch| self.rotation(&batch.positions)).collect::<Result<_, _>>()?;
        for index in 0..self.config.num_hidden_layers {
            self.check_between_blocks()?;
            let lease = walk.advance()?;
            let layer = self.bind_layer(lease.params(), index)?;
            for ((batch, rotation), hidden) in batches.iter().zip(&rotations).zip(&mut hidden) {
                let pass = self.pass(batch, rotation, use_adapter, None);
                *hidden = layer.forward_retaining(hidden, Retaining::default(), &pass).map_err(in_layer(index))?.0;
            }
        }
        self.check_between_blocks()?;
        Ok((hidden, walk))
    }

    /// Where this batch's values first stop being finite, if they do: the block and the tensor in it.
    ///
    /// # Errors
    /// If a block fails.
    pub fn first_non_finite(&self, batch: &Batch) -> Result<Option<String>, Error> {
        let mut walk = self.walk_once(Speaker::Policy);
        let rotation = self.rotation(&batch.positions)?;
        let pass = self.pass(batch, &rotation, true, None);
        let lease = walk.advance()?;
        let embedding = self.bind_embedding(lease.params(), true)?;
        let start = embedding.forward(&batch.tokens, self.device(), self.types.residual);
        let mut hidden = start.map_err(in_block("embedding"))?;
        if !buffer::is_finite(&hidden)? {
            return Ok(Some("the token embedding".into()));
        }
        drop(lease);
        for index in 0..self.config.num_hidden_layers {
            let lease = walk.advance()?;
            let layer = self.bind_layer(lease.params(), index)?;
            let (output, saved) = layer.forward(&hidden, &pass).map_err(in_layer(index))?;
            for (name, tensor) in saved.tensors() {
                if !buffer::is_finite(&tensor)? {
                    return Ok(Some(format!("decoder layer {index}, {name}")));
                }
            }
            if !buffer::is_finite(&output)? {
                return Ok(Some(format!("decoder layer {index}, mlp.down_proj")));
            }
            hidden = output;
        }
        let picked = rows::gather(&hidden, &batch.head_rows)?;
        let lease = walk.advance()?;
        let head = self.bind_head(lease.params(), true)?;
        let question = self.question(batch, 1.0, None);
        let (output, _) = head.forward(&picked, &question).map_err(in_block("head"))?;
        Ok(output.logprobs.iter().any(|p| !p.is_finite()).then(|| "the head's log-probabilities".into()))
    }
}
