//! The walk over the blocks: forward, head, backward, with recomputation.
//!
//! Called by the training loops for gradients and log-probabilities. Parameters come from the store block by block; a
//! block's gradients are final when its backward returns. With recomputation only the blocks' inputs are kept and each
//! block runs forward again just before its backward, which changes no bit of the result.

use std::sync::Arc;

use candle_core::Tensor;

use crate::model::adapter::AdapterSettings;
use crate::model::batch::Batch;
use crate::model::config::ModelConfig;
use crate::model::layer::{self, DecoderLayer, Pass, PassDropout};
use crate::model::params::BlockParams;
use crate::model::{self, Embedding, Head, HeadGradient};
use crate::ops::rope::Rotation;
use crate::ops::{head, rows};
use crate::zero::{self, ParamStore};

/// What went wrong in a pass.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A block failed.
    #[error("{block}: {source}")]
    Block {
        /// Which block.
        block: String,
        /// Why.
        source: model::Error,
    },
    /// An operation between blocks failed.
    #[error(transparent)]
    Op(#[from] crate::ops::Error),
    /// The parameter store failed.
    #[error(transparent)]
    Store(#[from] zero::Error),
}

/// Who speaks: the policy that is trained, or the reference it is held against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speaker {
    /// The model as trained so far.
    Policy,
    /// The frozen base (adapters off), or the kept copy if the store has one.
    Reference,
}

/// Dropout of a training pass; its masks depend on these and on each token's sample and position only.
#[derive(Clone, Copy, Debug)]
pub struct DropoutKey {
    /// The run's seed.
    pub seed: u64,
    /// The optimizer step.
    pub step: u64,
}

/// A model and its parameters, ready to walk.
#[derive(Debug)]
pub struct Engine {
    config: ModelConfig,
    adapter: Option<AdapterSettings>,
    store: ParamStore,
    recompute: bool,
    frequencies: Vec<f32>,
    rotation_scale: f32,
}

/// What a layer leaves for backward.
enum Kept {
    Input(Tensor),
    Everything(Box<layer::Saved>),
}

impl Engine {
    /// An engine over the store's blocks: the embedding, the layers, the head.
    pub fn new(config: ModelConfig, adapter: Option<AdapterSettings>, store: ParamStore, recompute: bool) -> Self {
        let (frequencies, rotation_scale) = config.inv_freq();
        Self { config, adapter, store, recompute, frequencies, rotation_scale }
    }

    /// The model's sizes.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The adapters, if the model has some.
    pub fn adapter(&self) -> Option<&AdapterSettings> {
        self.adapter.as_ref()
    }

    /// The parameters.
    pub fn store(&self) -> &ParamStore {
        &self.store
    }

    /// The parameters, to keep or move the reference.
    pub fn store_mut(&mut self) -> &mut ParamStore {
        &mut self.store
    }

    /// The rotations of these positions.
    pub fn rotation(&self, positions: &[u32]) -> Rotation {
        Rotation::new(positions, &self.frequencies, self.rotation_scale)
    }

    /// The embedding block.
    ///
    /// # Errors
    /// If a parameter is missing.
    pub fn embedding(&self) -> Result<Embedding, Error> {
        Embedding::bind(&self.store.fetch(0)).map_err(in_block("embedding"))
    }

    /// Decoder layer `index`.
    ///
    /// # Errors
    /// If a parameter is missing.
    pub fn layer(&self, index: usize) -> Result<DecoderLayer, Error> {
        let params: Arc<BlockParams> = self.store.fetch(1 + index);
        DecoderLayer::bind(&params, index, &self.config, self.adapter.as_ref()).map_err(in_layer(index))
    }

    /// The final norm and the head.
    ///
    /// # Errors
    /// If a parameter is missing.
    pub fn head(&self) -> Result<Head, Error> {
        let params = self.store.fetch(1 + self.config.num_hidden_layers);
        Head::bind(&params, &self.store.fetch(0), &self.config).map_err(in_block("head"))
    }

    /// Log-probabilities and entropies of the batch's targets, without gradients. Logits are divided by `temperature`.
    ///
    /// # Errors
    /// If a block fails.
    pub fn logprobs(&self, batch: &Batch, speaker: Speaker, temperature: f64) -> Result<head::Output, Error> {
        self.speak(speaker, |use_adapter| {
            let rotation = self.rotation(&batch.positions);
            let pass = Pass { layout: &batch.layout, rotation: &rotation, use_adapter, dropout: None };
            let hidden = self.walk(batch, &pass, |_, _| ())?;
            let picked = rows::gather(&hidden, &batch.head_rows)?;
            let (output, _) = self.head()?.forward(&picked, &batch.targets, temperature).map_err(in_block("head"))?;
            Ok(output)
        })
    }

    /// The logits after every token of the batch: f32 `[N, V]`. For tests and short prompts only: it holds them all.
    ///
    /// # Errors
    /// If a block fails.
    pub fn logits(&self, batch: &Batch, speaker: Speaker) -> Result<Tensor, Error> {
        self.speak(speaker, |use_adapter| {
            let rotation = self.rotation(&batch.positions);
            let pass = Pass { layout: &batch.layout, rotation: &rotation, use_adapter, dropout: None };
            let hidden = self.walk(batch, &pass, |_, _| ())?;
            self.head()?.logits(&hidden).map_err(in_block("head"))
        })
    }

    /// Runs `work` with the speaker's parameters in place; tells it whether adapters take part.
    ///
    /// # Errors
    /// If `work` fails or the store does.
    pub fn speak<T>(&self, speaker: Speaker, work: impl FnOnce(bool) -> Result<T, Error>) -> Result<T, Error> {
        match speaker {
            Speaker::Policy => work(true),
            Speaker::Reference if self.store.has_reference() => {
                self.store.swap_reference()?;
                let result = work(true);
                self.store.swap_reference()?;
                result
            }
            Speaker::Reference => work(false),
        }
    }

    /// Runs the batch forward, asks `loss` how the loss depends on each target, and adds the gradients of every trained
    /// parameter to the store. Returns what `loss` returned.
    ///
    /// # Errors
    /// If a block or `loss` fails.
    pub fn forward_backward<T, E: From<Error>>(
        &self,
        batch: &Batch,
        temperature: f64,
        dropout: Option<DropoutKey>,
        loss: impl FnOnce(&head::Output) -> Result<(HeadGradient, T), E>,
    ) -> Result<T, E> {
        let rotation = self.rotation(&batch.positions);
        let probability = self.adapter.as_ref().map_or(0.0, |a| a.dropout);
        let dropout = dropout.filter(|_| probability > 0.0).map(|DropoutKey { seed, step }| PassDropout {
            probability,
            key: crate::rng::Stream::new(seed, "dropout", step, 0).bits(),
            token_keys: &batch.token_keys,
        });
        let pass = Pass { layout: &batch.layout, rotation: &rotation, use_adapter: true, dropout };
        let mut kept = Vec::with_capacity(self.config.num_hidden_layers);
        let hidden = self.walk(batch, &pass, |input, saved| {
            kept.push(if self.recompute { Kept::Input(input.clone()) } else { Kept::Everything(Box::new(saved)) });
        })?;
        let head_block = self.head()?;
        let picked = rows::gather(&hidden, &batch.head_rows).map_err(Error::from)?;
        let (output, saved) = head_block.forward(&picked, &batch.targets, temperature).map_err(in_block("head"))?;
        let (gradient, result) = loss(&output)?;
        let d_picked =
            head_block.backward(&gradient, &batch.targets, temperature, &output, &saved).map_err(in_block("head"))?;
        drop((saved, picked, hidden));
        let mut gradient = rows::scatter_add(&d_picked, &batch.head_rows, batch.tokens.len()).map_err(Error::from)?;
        for (index, kept) in kept.into_iter().enumerate().rev() {
            let layer = self.layer(index)?;
            let saved = match kept {
                Kept::Everything(saved) => *saved,
                Kept::Input(input) => layer.forward(&input, &pass).map_err(in_layer(index))?.1,
            };
            gradient = layer.backward(&gradient, saved, &pass).map_err(in_layer(index))?;
        }
        let embedding = self.embedding()?;
        embedding.backward(&gradient, &batch.tokens).map_err(in_block("embedding"))?;
        Ok(result)
    }

    /// The hidden states after the last layer; `keep` sees each layer's input and what it left for backward.
    fn walk(
        &self,
        batch: &Batch,
        pass: &Pass<'_>,
        mut keep: impl FnMut(&Tensor, layer::Saved),
    ) -> Result<Tensor, Error> {
        let mut hidden = self.embedding()?.forward(&batch.tokens).map_err(in_block("embedding"))?;
        for index in 0..self.config.num_hidden_layers {
            let (output, saved) = self.layer(index)?.forward(&hidden, pass).map_err(in_layer(index))?;
            keep(&hidden, saved);
            hidden = output;
        }
        Ok(hidden)
    }

    /// The first block whose output is not finite for this batch, if there is one: where a NaN loss comes from.
    ///
    /// # Errors
    /// If a block fails.
    pub fn first_non_finite(&self, batch: &Batch) -> Result<Option<String>, Error> {
        let rotation = self.rotation(&batch.positions);
        let pass = Pass { layout: &batch.layout, rotation: &rotation, use_adapter: true, dropout: None };
        let is_finite = |x: &Tensor| crate::ops::buffer::read(x, |v| v.iter().all(|v| v.is_finite()));
        let mut hidden = self.embedding()?.forward(&batch.tokens).map_err(in_block("embedding"))?;
        if !is_finite(&hidden)? {
            return Ok(Some("the token embedding".into()));
        }
        for index in 0..self.config.num_hidden_layers {
            hidden = self.layer(index)?.forward(&hidden, &pass).map_err(in_layer(index))?.0;
            if !is_finite(&hidden)? {
                return Ok(Some(format!("decoder layer {index}")));
            }
        }
        let logits = self.head()?.logits(&hidden).map_err(in_block("head"))?;
        Ok((!is_finite(&logits)?).then(|| "the head".into()))
    }
}

fn in_block(block: &'static str) -> impl FnOnce(model::Error) -> Error {
    move |source| Error::Block { block: block.into(), source }
}

fn in_layer(index: usize) -> impl FnOnce(model::Error) -> Error {
    move |source| Error::Block { block: format!("decoder layer {index}"), source }
}
