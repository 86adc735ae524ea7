//! What the engine asks of a model: one forward step over new tokens of several sequences.

use std::ops::Range;

use candle_core::{Device, Tensor};

use super::Error;
use super::kv_cache::{KvCache, KvShape};
use super::pages::PageId;
pub use crate::kernels::cuda::{DrawSettings, Drawn, Lane};

/// One forward step over a ragged set of tokens of several sequences.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepBatch {
    /// `[N]` token ids.
    pub tokens: Vec<u32>,
    /// `[N]` position of each token in its sequence.
    pub positions: Vec<u32>,
    /// The sequences, in the order of their tokens, without gaps.
    pub spans: Vec<Span>,
    /// Ascending indices into `tokens` of those whose next-token logits are wanted.
    pub logit_rows: Vec<usize>,
}

/// The tokens of one sequence in a step, and its pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Its tokens, as indices into [`StepBatch::tokens`].
    pub tokens: Range<usize>,
    /// Its pages in order of position, with room for the tokens of this step.
    pub pages: Vec<PageId>,
    /// Tokens cached before this step.
    pub context: usize,
}

/// A language model that can continue cached sequences.
pub trait DecodeModel {
    /// `V`.
    fn vocab_size(&self) -> usize;

    /// What one token leaves in the cache.
    fn kv_shape(&self) -> KvShape;

    /// Where it computes, and so where the cache lies.
    fn device(&self) -> &Device {
        &Device::Cpu
    }

    /// Bytes of the device that steps of up to `lanes` sequences of up to `longest` tokens take, of which up to `tokens` are computed
    /// in one: blocks that come for it, memory that it works on.
    fn step_bytes(&self, lanes: usize, longest: usize, tokens: usize) -> u64 {
        let _ = (lanes, longest, tokens);
        0
    }

    /// Most sequences that it is best computed with at a time: more wait for others.
    fn most_lanes(&self) -> usize {
        usize::MAX
    }

    /// Most tokens that the model draws for each sequence without the host; 0 if it does not draw.
    fn most_steps(&self) -> usize {
        0
    }

    /// Makes ready what [`Self::draw`] takes for these lanes; false if it cannot, as for want of memory: the tokens are then drawn
    /// elsewhere.
    ///
    /// # Errors
    /// If the computation fails.
    fn prepare_draw(
        &mut self,
        lanes: &[Lane<'_>],
        steps: usize,
        settings: &DrawSettings,
        cache: &mut KvCache,
    ) -> Result<bool, Error> {
        let _ = (lanes, steps, settings, cache);
        Ok(self.most_steps() > 0)
    }

    /// Draws `steps` tokens for each lane, at most [`Self::most_steps`], as the host's sampler does: `uniforms` is `[steps, lanes]`.
    ///
    /// # Errors
    /// If the computation fails, or the model does not draw.
    fn draw(
        &mut self,
        lanes: &[Lane<'_>],
        steps: usize,
        uniforms: &[f64],
        settings: &DrawSettings,
        cache: &mut KvCache,
    ) -> Result<Drawn, Error> {
        let _ = (lanes, steps, uniforms, settings, cache);
        Err(Error::NoSteps)
    }

    /// Longest sequence the model can hold, prompt and completion, in tokens.
    fn max_positions(&self) -> usize;

    /// Computes the step's tokens, stores their keys and values in `cache`, and returns the logits of
    /// [`StepBatch::logit_rows`]: f32 `[logit_rows, V]`, on any device.
    ///
    /// A row's logits should not depend on what else is in the step; then a completion does not either.
    ///
    /// # Errors
    /// If the computation fails.
    fn step(&mut self, batch: &StepBatch, cache: &mut KvCache) -> Result<Tensor, Error>;
}
