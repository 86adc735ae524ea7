//! The two ends of the model: the token embedding and the final norm with the head.

use candle_core::{DType, Device, Tensor};

use super::Error;
use super::adapter::{AdapterSettings, bind_adapter};
use super::config::ModelConfig;
use super::params::{BlockParams, Slot};
use super::peft::{EMBED_TOKENS, LM_HEAD as HEAD_MODULE};
use crate::ops::linear::{Adapter, Dropout, Linear};
use crate::ops::{Param, embedding, head, rms_norm};
use crate::quant::Weight;

/// Name of the token embedding.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// Name of the head of an untied model.
pub const LM_HEAD: &str = "lm_head.weight";
/// Name of the final norm.
pub const FINAL_NORM: &str = "model.norm.weight";

/// The token embedding, for as long as its parameters are lent.
#[derive(Clone, Debug)]
pub struct Embedding<'l> {
    table: &'l Slot,
    adapter: Option<Adapter>,
}

impl<'l> Embedding<'l> {
    /// Binds the table, and its adapter if `adapter` has one for it.
    ///
    /// # Errors
    /// If one is missing.
    pub fn bind(params: &'l BlockParams, adapter: Option<&AdapterSettings>) -> Result<Self, Error> {
        Ok(Self { table: params.slot(EMBEDDING)?, adapter: bind_adapter(params, EMBED_TOKENS, adapter)? })
    }

    /// The embeddings of `tokens` on `device`, the start of the residual stream: `[N, D]` of type `dtype` (on the CPU
    /// f32).
    ///
    /// # Errors
    /// If a token is outside the vocabulary.
    pub fn forward(&self, tokens: &[u32], device: &Device, dtype: DType) -> Result<Tensor, Error> {
        let rows = embedding::forward(tokens, &self.table.weight, device, dtype)?;
        if let Some(adapter) = &self.adapter {
            embedding::add_update(&rows, tokens, adapter)?;
        }
        Ok(rows)
    }

    /// The table, where it is all there is: no adapter.
    pub fn plain_table(&self) -> Option<&'l Weight> {
        self.adapter.is_none().then_some(&self.table.weight)
    }

    /// Whether something of it is trained, so that [`Self::backward`] has something to do.
    pub fn is_trained(&self) -> bool {
        self.table.grad.is_some() || self.adapter.is_some()
    }

    /// Adds the gradients of the table and of the adapter to their buckets.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn backward(&self, dy: &Tensor, tokens: &[u32]) -> Result<(), Error> {
        if let Some(grad) = &self.table.grad {
            embedding::backward(dy, tokens, grad)?;
        }
        if let Some(adapter) = &self.adapter {
            embedding::backward_update(dy, tokens, adapter)?;
        }
        Ok(())
    }
}

/// The final norm and the head, for as long as their parameters are lent.
#[derive(Clone, Debug)]
pub struct Head<'l> {
    norm: Param,
    table: &'l Slot,
    adapter: Option<Adapter>,
    eps: f64,
}

/// What is asked of the head.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// The token after each row: `[R]`.
    pub targets: &'a [u32],
    /// Divides the logits.
    pub temperature: f64,
    /// Type of the activations; on the CPU always f32.
    pub compute: DType,
    /// Whether mean log-probabilities are asked for as well.
    pub has_means: bool,
    /// Dropout of the adapter's input; `None` outside of training.
    pub dropout: Option<Dropout<'a>>,
}

/// What the head keeps for backward.
#[derive(Clone, Debug)]
pub struct SavedHead {
    input: Tensor,
    norm: rms_norm::Saved,
    normed: Tensor,
    head: head::Saved,
}

/// How a loss depends on the head's output.
#[derive(Clone, Debug, Default)]
pub struct HeadGradient {
    /// d loss / d logprobs: `[R]`.
    pub d_logprobs: Vec<f32>,
    /// d loss / d entropies: `[R]`, or empty for zeros.
    pub d_entropies: Vec<f32>,
    /// d loss / d mean log-probabilities: `[R]`, or empty for zeros.
    pub d_mean_logprobs: Vec<f32>,
}

impl HeadGradient {
    /// All gradients times `factor`: fp16's loss scale.
    #[must_use]
    pub fn scaled(mut self, factor: f64) -> Self {
        if factor != 1.0 {
            let values = self.d_logprobs.iter_mut().chain(&mut self.d_entropies).chain(&mut self.d_mean_logprobs);
            values.for_each(|v| *v = (f64::from(*v) * factor) as f32);
        }
        self
    }
}

impl<'l> Head<'l> {
    /// Binds the norm, the head (in a tied model the embedding's table, which the block shares), and its adapter if `adapter`
    /// has one for it.
    ///
    /// # Errors
    /// If one is missing.
    pub fn bind(
        params: &'l BlockParams,
        config: &ModelConfig,
        adapter: Option<&AdapterSettings>,
    ) -> Result<Self, Error> {
        let (table, adapter) = (params.slot(LM_HEAD)?, bind_adapter(params, HEAD_MODULE, adapter)?);
        Ok(Self { norm: params.dense(FINAL_NORM)?, table, adapter, eps: config.rms_norm_eps })
    }

    /// The final norm's weight: f32 `[D]`.
    pub fn norm(&self) -> &Tensor {
        &self.norm.value
    }

    /// The head as a projection of the normed stream.
    pub fn projection(&self) -> Linear {
        Linear { weight: self.table.weight.clone(), weight_grad: None, bias: None, adapter: self.adapter.clone() }
    }

    /// Whether it has an adapter, whose dropout a training pass needs.
    pub fn has_adapter(&self) -> bool {
        self.adapter.is_some()
    }

    fn extra<'a>(&'a self, question: &Question<'a>) -> head::Extra<'a> {
        let adapter = self.adapter.as_ref().map(|adapter| (adapter, question.dropout));
        head::Extra { adapter, has_means: question.has_means }
    }

    /// Log-probabilities and entropies of the targets after the rows of `x`.
    ///
    /// # Shapes
    /// `x`: `[R, D]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn forward(&self, x: &Tensor, question: &Question<'_>) -> Result<(head::Output, SavedHead), Error> {
        let (normed, norm) = rms_norm::forward_wide(x, &self.norm, self.eps, question.compute, 0)?;
        let normed = normed.values()?;
        let Question { targets, temperature, .. } = *question;
        let (output, head) =
            head::forward_with(&normed, &self.table.weight, self.extra(question), targets, temperature)?;
        Ok((output, SavedHead { input: x.clone(), norm, normed, head }))
    }

    /// The gradient of `x`: `[R, D]` of its type.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn backward(
        &self,
        gradient: &HeadGradient,
        question: &Question<'_>,
        output: &head::Output,
        saved: &SavedHead,
    ) -> Result<Tensor, Error> {
        let HeadGradient { d_logprobs, d_entropies, d_mean_logprobs } = gradient;
        let d_normed = head::backward_with(
            head::Gradient { d_logprobs, d_entropies, d_mean_logprobs },
            &saved.normed,
            &self.table.weight,
            self.table.grad.as_ref(),
            self.extra(question),
            &saved.head,
            question.targets,
            question.temperature,
            output,
        )?;
        Ok(rms_norm::backward(&d_normed, &saved.input, &self.norm, &saved.norm)?)
    }

    /// [`Self::forward`] and [`Self::backward`] in one, for a gradient that does not depend on the output: the output and the
    /// gradient of `x`.
    ///
    /// # Shapes
    /// `x`: `[R, D]`; returns `[R, D]` of the type of `x`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn forward_backward(
        &self,
        x: &Tensor,
        question: &Question<'_>,
        gradient: &HeadGradient,
    ) -> Result<(head::Output, Tensor), Error> {
        if !self.extra(question).is_none() {
            let (output, saved) = self.forward(x, question)?;
            let d_x = self.backward(gradient, question, &output, &saved)?;
            return Ok((output, d_x));
        }
        let (normed, norm) = rms_norm::forward_wide(x, &self.norm, self.eps, question.compute, 0)?;
        let (output, d_normed) = head::forward_backward(
            &gradient.d_logprobs,
            &gradient.d_entropies,
            &normed.values()?,
            &self.table.weight,
            self.table.grad.as_ref(),
            question.targets,
            question.temperature,
        )?;
        Ok((output, rms_norm::backward(&d_normed, x, &self.norm, &norm)?))
    }

    /// All logits after the rows of `x`.
    ///
    /// # Shapes
    /// `x`: `[R, D]`; returns f32 `[R, V]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn logits(&self, x: &Tensor, compute: DType) -> Result<Tensor, Error> {
        let (normed, _) = rms_norm::forward_wide(x, &self.norm, self.eps, compute, 0)?;
        Ok(head::logits_with(&normed.values()?, &self.table.weight, self.adapter.as_ref())?)
    }
}
