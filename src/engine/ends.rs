//! The two ends of a pass: the embedding with its noise, and what is asked of the head.

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use super::{DropoutKey, Engine, Error, in_block};
use crate::config::settings::Projection;
use crate::model::adapter::AdapterSettings;
use crate::model::batch::Batch;
use crate::model::params::BlockParams;
use crate::model::{Embedding, Head, Question};
use crate::ops::linear::{Dropout, TokenKeys};
use crate::rng::{self, Stream};

/// Dropout of the head's adapter in one pass: probability, key, and the keys of the rows that predict.
pub(super) struct HeadDropout(f64, u64, TokenKeys);

impl Engine {
    /// Binds the embedding to its lent parameters; without `use_adapter` that of the base model.
    ///
    /// # Errors
    /// If a parameter is missing.
    pub fn bind_embedding<'l>(&self, params: &'l BlockParams, use_adapter: bool) -> Result<Embedding<'l>, Error> {
        Embedding::bind(params, self.adapter_if(use_adapter)).map_err(in_block("embedding"))
    }

    /// Binds the final norm and the head to their lent parameters; without `use_adapter` those of the base model.
    ///
    /// # Errors
    /// If a parameter is missing.
    pub fn bind_head<'l>(&self, params: &'l BlockParams, use_adapter: bool) -> Result<Head<'l>, Error> {
        Head::bind(params, &self.config, self.adapter_if(use_adapter)).map_err(in_block("head"))
    }

    fn adapter_if(&self, use_adapter: bool) -> Option<&AdapterSettings> {
        self.adapter.as_ref().filter(|_| use_adapter)
    }

    /// What a batch asks of the head at a temperature.
    pub(super) fn question<'a>(
        &self,
        batch: &'a Batch,
        temperature: f64,
        dropout: Option<&'a HeadDropout>,
    ) -> Question<'a> {
        let dropout = dropout.map(|HeadDropout(probability, key, token_keys)| Dropout {
            probability: *probability,
            key: *key,
            token_keys,
        });
        let compute = self.types.compute;
        Question { targets: &batch.targets, temperature, compute, has_means: batch.wants_means, dropout }
    }

    /// Dropout of the head's adapter, if it has one and drops; `key` is that of the pass.
    pub(super) fn head_dropout(
        &self,
        head: &Head<'_>,
        batch: &Batch,
        probability: f64,
        key: u64,
    ) -> Option<HeadDropout> {
        (head.has_adapter() && probability > 0.0).then(|| {
            let keys: Vec<u64> = batch.head_rows.iter().map(|&row| batch.token_keys[row as usize]).collect();
            // After the projections of the last layer.
            let index = self.config.num_hidden_layers * Projection::ALL.len();
            HeadDropout(probability, rng::mix(key ^ rng::mix(index as u64)), TokenKeys::from(keys.as_slice()))
        })
    }

    /// The embeddings of a training pass: with [`neftune_noise`], where that was asked for.
    ///
    /// # Shapes
    /// `hidden`: `[N, D]`; returns the same.
    ///
    /// # Errors
    /// If the device fails.
    pub(super) fn with_noise(
        &self,
        hidden: Tensor,
        batch: &Batch,
        dropout: Option<DropoutKey>,
    ) -> Result<Tensor, Error> {
        let (Some(alpha), Some(key)) = (self.neftune_noise_alpha, dropout) else { return Ok(hidden) };
        let d = self.config.hidden_size;
        let noise = neftune_noise(batch, d, alpha, key);
        let noise = Tensor::from_vec(noise, (batch.tokens.len(), d), &Device::Cpu).map_err(crate::ops::Error::from)?;
        let added = || {
            let noise = noise.to_device(self.device())?.to_dtype(DType::F32)?;
            (hidden.to_dtype(DType::F32)? + noise)?.to_dtype(hidden.dtype())
        };
        Ok(added().map_err(crate::ops::Error::from)?)
    }
}

/// Uniform noise of at most `alpha / sqrt(L D)` for each embedding of a batch.
///
/// `L` is the length of the token's own sequence. A number depends on the seed, the step, the token's sample and position,
/// and its column alone, so that neither the cut of a batch nor a resumed run changes it.
///
/// # Shapes
/// Returns f32 `[N, D]`, row-major.
///
/// # Equation
/// NEFTune (Jain et al., 2310.05914), algorithm 1, as transformers' `neftune_post_forward_hook` applies it.
pub fn neftune_noise(batch: &Batch, d: usize, alpha: f64, DropoutKey { seed, step }: DropoutKey) -> Vec<f32> {
    let key = Stream::new(seed, "neftune", step, 0).bits();
    let mut noise = vec![0f32; batch.tokens.len() * d];
    let lengths = batch.sequence_lengths();
    noise.par_chunks_exact_mut(d).zip(&batch.token_keys).zip(&lengths).for_each(|((row, &token), &length)| {
        let largest = alpha / (length as f64 * d as f64).sqrt();
        let row_key = rng::mix(key ^ token);
        for (col, value) in row.iter_mut().enumerate() {
            *value = ((2.0 * rng::unit(row_key, col as u64) - 1.0) * largest) as f32;
        }
    });
    noise
}
