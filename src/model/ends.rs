//! The two ends of the model: the token embedding and the final norm with the head.

use candle_core::{DType, Device, Tensor};

use super::Error;
use super::config::ModelConfig;
use super::params::{BlockParams, Slot};
use crate::ops::{Param, embedding, head, rms_norm};

/// Name of the token embedding.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// Name of the head of an untied model.
pub const LM_HEAD: &str = "lm_head.weight";
/// Name of the final norm.
pub const FINAL_NORM: &str = "model.norm.weight";

/// The token embedding.
#[derive(Clone, Debug)]
pub struct Embedding {
    table: Slot,
}

impl Embedding {
    /// Binds the table.
    ///
    /// # Errors
    /// If it is missing.
    pub fn bind(params: &BlockParams) -> Result<Self, Error> {
        Ok(Self { table: params.slot(EMBEDDING)?.clone() })
    }

    /// The embeddings of `tokens` on `device`, the start of the residual stream: `[N, D]` of type `dtype` (on the CPU
    /// f32).
    ///
    /// # Errors
    /// If a token is outside the vocabulary.
    pub fn forward(&self, tokens: &[u32], device: &Device, dtype: DType) -> Result<Tensor, Error> {
        Ok(embedding::forward(tokens, &self.table.weight, device, dtype)?)
    }

    /// Whether the table is trained, so that [`Self::backward`] has something to do.
    pub fn is_trained(&self) -> bool {
        self.table.grad.is_some()
    }

    /// Adds the table's gradient to its bucket.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn backward(&self, dy: &Tensor, tokens: &[u32]) -> Result<(), Error> {
        match &self.table.grad {
            Some(grad) => Ok(embedding::backward(dy, tokens, grad)?),
            None => Ok(()),
        }
    }
}

/// The final norm and the head.
#[derive(Clone, Debug)]
pub struct Head {
    norm: Param,
    table: Slot,
    eps: f64,
}

/// What the head keeps for backward.
#[derive(Clone, Debug)]
pub struct SavedHead {
    input: Tensor,
    norm: rms_norm::Saved,
    normed: Tensor,
}

/// How a loss depends on the head's output.
#[derive(Clone, Debug, Default)]
pub struct HeadGradient {
    /// d loss / d logprobs: `[R]`.
    pub d_logprobs: Vec<f32>,
    /// d loss / d entropies: `[R]`, or empty for zeros.
    pub d_entropies: Vec<f32>,
}

impl HeadGradient {
    /// All gradients times `factor`: fp16's loss scale.
    #[must_use]
    pub fn scaled(mut self, factor: f64) -> Self {
        if factor != 1.0 {
            let values = self.d_logprobs.iter_mut().chain(&mut self.d_entropies);
            values.for_each(|v| *v = (f64::from(*v) * factor) as f32);
        }
        self
    }
}

impl Head {
    /// Binds the norm and the head, which a tied model takes from the embedding's parameters.
    ///
    /// # Errors
    /// If one is missing.
    pub fn bind(params: &BlockParams, embedding: &BlockParams, config: &ModelConfig) -> Result<Self, Error> {
        let table = match params.get(LM_HEAD) {
            Some(slot) => slot,
            None => embedding.slot(EMBEDDING)?,
        };
        Ok(Self { norm: params.dense(FINAL_NORM)?, table: table.clone(), eps: config.rms_norm_eps })
    }

    /// Log-probabilities and entropies of `targets` after the rows of `x`; activations are of type `compute`.
    ///
    /// # Shapes
    /// `x`: `[R, D]`; `targets`: `[R]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn forward(
        &self,
        x: &Tensor,
        targets: &[u32],
        temperature: f64,
        compute: DType,
    ) -> Result<(head::Output, SavedHead), Error> {
        let (normed, norm) = rms_norm::forward_wide(x, &self.norm, self.eps, compute, 0)?;
        let normed = normed.values()?;
        let output = head::forward(&normed, &self.table.weight, targets, temperature)?;
        Ok((output, SavedHead { input: x.clone(), norm, normed }))
    }

    /// The gradient of `x`: `[R, D]` of its type.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn backward(
        &self,
        gradient: &HeadGradient,
        targets: &[u32],
        temperature: f64,
        output: &head::Output,
        saved: &SavedHead,
    ) -> Result<Tensor, Error> {
        let d_normed = head::backward(
            &gradient.d_logprobs,
            &gradient.d_entropies,
            &saved.normed,
            &self.table.weight,
            self.table.grad.as_ref(),
            targets,
            temperature,
            output,
        )?;
        Ok(rms_norm::backward(&d_normed, &saved.input, &self.norm, &saved.norm)?)
    }

    /// [`Self::forward`] and [`Self::backward`] in one, for a gradient that does not depend on the output: the output and the
    /// gradient of `x`.
    ///
    /// # Shapes
    /// `x`: `[R, D]`; `targets`: `[R]`; returns `[R, D]` of the type of `x`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn forward_backward(
        &self,
        x: &Tensor,
        targets: &[u32],
        temperature: f64,
        gradient: &HeadGradient,
        compute: DType,
    ) -> Result<(head::Output, Tensor), Error> {
        let (normed, norm) = rms_norm::forward_wide(x, &self.norm, self.eps, compute, 0)?;
        let (output, d_normed) = head::forward_backward(
            &gradient.d_logprobs,
            &gradient.d_entropies,
            &normed.values()?,
            &self.table.weight,
            self.table.grad.as_ref(),
            targets,
            temperature,
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
        Ok(head::logits(&normed.values()?, &self.table.weight)?)
    }
}
