//! A decoder layer of Qwen2 and Qwen3: attention and a gated MLP, each behind a norm and added to the residual stream.
//!
//! `forward` returns the output and what `backward` needs; `backward` returns the input's gradient and has by then added
//! every trained parameter's gradient to its bucket. `attention_inputs` and `after_attention` are the two halves around
//! attention, which the rollout shares.
//!
//! Shapes: `N` tokens, `D` hidden, `H` query heads, `K` key-value heads, `d` head size, `I` intermediate.

use candle_core::Tensor;

use super::adapter::AdapterSettings;
use super::config::ModelConfig;
use super::params::BlockParams;
use super::{Error, adapter};
use crate::config::settings::Projection;
use crate::ops::attention::{self, Layout};
use crate::ops::linear::{self, Dropout, Linear};
use crate::ops::rope::Rotation;
use crate::ops::{Param, residual, rms_norm, swiglu};
use crate::rng;

/// What a pass through the layers needs to know besides the hidden states.
#[derive(Clone, Copy, Debug)]
pub struct Pass<'a> {
    /// Which tokens attend to which.
    pub layout: &'a Layout,
    /// Rotations of the batch's positions.
    pub rotation: &'a Rotation,
    /// Whether adapters take part; without them the base model speaks.
    pub use_adapter: bool,
    /// Dropout of adapter inputs; `None` outside of training.
    pub dropout: Option<PassDropout<'a>>,
}

/// Dropout of one pass.
#[derive(Clone, Copy, Debug)]
pub struct PassDropout<'a> {
    /// Probability of dropping an element.
    pub probability: f64,
    /// Key of the pass: of the seed and the optimizer step.
    pub key: u64,
    /// One key per token.
    pub token_keys: &'a [u64],
}

/// A decoder layer with its parameters.
#[derive(Clone, Debug)]
pub struct DecoderLayer {
    index: usize,
    eps: f64,
    head_dim: usize,
    input_norm: Param,
    post_attention_norm: Param,
    /// In the order of [`Projection::ALL`].
    projections: [Linear; 7],
    q_norm: Option<Param>,
    k_norm: Option<Param>,
}

/// Queries and keys before their norm (Qwen3), and the norm's own residue.
#[derive(Clone, Debug)]
struct SavedNorm {
    input: Tensor,
    norm: rms_norm::Saved,
}

/// What the first half keeps for backward.
#[derive(Clone, Debug)]
pub struct SavedInputs {
    norm: rms_norm::Saved,
    normed: Tensor,
    linears: [linear::Saved; 3],
    q_norm: Option<SavedNorm>,
    k_norm: Option<SavedNorm>,
}

/// What the second half keeps for backward.
#[derive(Clone, Debug)]
pub struct SavedOutputs {
    attended: Tensor,
    o_linear: linear::Saved,
    stream: Tensor,
    norm: rms_norm::Saved,
    normed: Tensor,
    gate: Tensor,
    up: Tensor,
    linears: [linear::Saved; 3],
}

/// What a layer keeps for backward.
#[derive(Clone, Debug)]
pub struct Saved {
    input: Tensor,
    inputs: SavedInputs,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention: attention::Saved,
    attended: Tensor,
    outputs: SavedOutputs,
}

impl DecoderLayer {
    /// Binds the parameters of layer `index`.
    ///
    /// # Errors
    /// If one is missing.
    pub fn bind(
        params: &BlockParams,
        index: usize,
        config: &ModelConfig,
        adapter: Option<&AdapterSettings>,
    ) -> Result<Self, Error> {
        let prefix = format!("model.layers.{index}");
        let dense = |name: &str| params.dense(&format!("{prefix}.{name}.weight"));
        let projection = |p: Projection| adapter::bind_linear(params, &format!("{prefix}.{}", p.path()), adapter);
        let qk_norm = |name| config.has_qk_norm.then(|| dense(name)).transpose();
        Ok(Self {
            index,
            eps: config.rms_norm_eps,
            head_dim: config.head_dim,
            input_norm: dense("input_layernorm")?,
            post_attention_norm: dense("post_attention_layernorm")?,
            projections: {
                let [q, k, v, o, gate, up, down] = Projection::ALL.map(projection);
                [q?, k?, v?, o?, gate?, up?, down?]
            },
            q_norm: qk_norm("self_attn.q_norm")?,
            k_norm: qk_norm("self_attn.k_norm")?,
        })
    }

    fn dropout<'a>(&self, projection: Projection, pass: &Pass<'a>) -> Option<Dropout<'a>> {
        let PassDropout { probability, key, token_keys } = pass.dropout?;
        let key = rng::mix(key ^ rng::mix((self.index * Projection::ALL.len() + projection as usize) as u64));
        Some(Dropout { probability, key, token_keys })
    }

    fn project(&self, p: Projection, x: &Tensor, pass: &Pass<'_>) -> Result<(Tensor, linear::Saved), Error> {
        Ok(self.projections[p as usize].forward(x, pass.use_adapter, self.dropout(p, pass))?)
    }

    fn project_backward(
        &self,
        p: Projection,
        dy: &Tensor,
        x: &Tensor,
        saved: &linear::Saved,
        pass: &Pass<'_>,
    ) -> Result<Tensor, Error> {
        Ok(self.projections[p as usize].backward(dy, x, saved, self.dropout(p, pass))?)
    }

    /// Splits a projection into heads, normalises them (Qwen3) and turns them by their positions.
    fn heads(
        &self,
        x: &Tensor,
        norm: Option<&Param>,
        rotation: &Rotation,
    ) -> Result<(Tensor, Option<SavedNorm>), Error> {
        let (n, width) = x.dims2()?;
        let heads = width / self.head_dim;
        let Some(norm) = norm else {
            return Ok((rotation.forward(&x.reshape((n, heads, self.head_dim))?)?, None));
        };
        let input = x.reshape((n * heads, self.head_dim))?;
        let (normed, saved) = rms_norm::forward(&input, norm, self.eps)?;
        let turned = rotation.forward(&normed.reshape((n, heads, self.head_dim))?)?;
        Ok((turned, Some(SavedNorm { input, norm: saved })))
    }

    fn heads_backward(
        dy: &Tensor,
        norm: Option<&Param>,
        saved: Option<&SavedNorm>,
        rotation: &Rotation,
    ) -> Result<Tensor, Error> {
        let (n, heads, d) = dy.dims3()?;
        let turned = rotation.backward(dy)?;
        let dx = match (norm, saved) {
            (Some(norm), Some(saved)) => {
                rms_norm::backward(&turned.reshape((n * heads, d))?, &saved.input, norm, &saved.norm)?
            }
            _ => turned,
        };
        Ok(dx.reshape((n, heads * d))?)
    }

    /// Queries, keys and values of the layer's input, ready for attention.
    ///
    /// # Shapes
    /// `x`: f32 `[N, D]`; returns `[N, H, d]`, `[N, K, d]`, `[N, K, d]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn attention_inputs(
        &self,
        x: &Tensor,
        pass: &Pass<'_>,
    ) -> Result<(Tensor, Tensor, Tensor, SavedInputs), Error> {
        let (normed, norm) = rms_norm::forward(x, &self.input_norm, self.eps)?;
        let (q, q_saved) = self.project(Projection::QProj, &normed, pass)?;
        let (k, k_saved) = self.project(Projection::KProj, &normed, pass)?;
        let (v, v_saved) = self.project(Projection::VProj, &normed, pass)?;
        let (n, width) = v.dims2()?;
        let v = v.reshape((n, width / self.head_dim, self.head_dim))?;
        let (q, q_norm) = self.heads(&q, self.q_norm.as_ref(), pass.rotation)?;
        let (k, k_norm) = self.heads(&k, self.k_norm.as_ref(), pass.rotation)?;
        Ok((q, k, v, SavedInputs { norm, normed, linears: [q_saved, k_saved, v_saved], q_norm, k_norm }))
    }

    /// The rest of the layer: output projection, residual, MLP, residual.
    ///
    /// # Shapes
    /// `x`: f32 `[N, D]`, the layer's input; `attended`: f32 `[N, H, d]`; returns f32 `[N, D]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn after_attention(
        &self,
        x: &Tensor,
        attended: &Tensor,
        pass: &Pass<'_>,
    ) -> Result<(Tensor, SavedOutputs), Error> {
        let (n, heads, d) = attended.dims3()?;
        let attended = attended.reshape((n, heads * d))?;
        let (projected, o_linear) = self.project(Projection::OProj, &attended, pass)?;
        let stream = residual::add(projected, x)?;
        let (normed, norm) = rms_norm::forward(&stream, &self.post_attention_norm, self.eps)?;
        let (gate, gate_saved) = self.project(Projection::GateProj, &normed, pass)?;
        let (up, up_saved) = self.project(Projection::UpProj, &normed, pass)?;
        let (down, down_saved) = self.project(Projection::DownProj, &swiglu::forward(&gate, &up)?, pass)?;
        let y = residual::add(down, &stream)?;
        let linears = [gate_saved, up_saved, down_saved];
        Ok((y, SavedOutputs { attended, o_linear, stream, norm, normed, gate, up, linears }))
    }

    /// The layer's output and what backward needs.
    ///
    /// # Shapes
    /// `x`: f32 `[N, D]`; returns f32 `[N, D]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn forward(&self, x: &Tensor, pass: &Pass<'_>) -> Result<(Tensor, Saved), Error> {
        let (q, k, v, inputs) = self.attention_inputs(x, pass)?;
        let (attended, attention) = attention::forward(&q, &k, &v, pass.layout)?;
        let (y, outputs) = self.after_attention(x, &attended, pass)?;
        Ok((y, Saved { input: x.clone(), inputs, q, k, v, attention, attended, outputs }))
    }

    /// The gradient of the layer's input.
    ///
    /// # Shapes
    /// `dy`: f32 `[N, D]`; returns f32 `[N, D]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn backward(&self, dy: &Tensor, saved: Saved, pass: &Pass<'_>) -> Result<Tensor, Error> {
        let Saved { input, inputs, q, k, v, attention, attended, outputs } = saved;
        let d_stream = self.mlp_backward(dy, &outputs, pass)?;
        let d_attended =
            self.project_backward(Projection::OProj, &d_stream, &outputs.attended, &outputs.o_linear, pass)?;
        drop(outputs);
        let d_attended = d_attended.reshape(q.shape())?;
        let (dq, dk, dv) = attention::backward(&d_attended, &q, &k, &v, &attended, pass.layout, &attention)?;
        let dq = Self::heads_backward(&dq, self.q_norm.as_ref(), inputs.q_norm.as_ref(), pass.rotation)?;
        let dk = Self::heads_backward(&dk, self.k_norm.as_ref(), inputs.k_norm.as_ref(), pass.rotation)?;
        let (n, kv_heads, d) = dv.dims3()?;
        let dv = dv.reshape((n, kv_heads * d))?;
        let [q_saved, k_saved, v_saved] = &inputs.linears;
        let from_q = self.project_backward(Projection::QProj, &dq, &inputs.normed, q_saved, pass)?;
        let from_k = self.project_backward(Projection::KProj, &dk, &inputs.normed, k_saved, pass)?;
        let from_v = self.project_backward(Projection::VProj, &dv, &inputs.normed, v_saved, pass)?;
        let d_normed = residual::add(residual::add(from_q, &from_k)?, &from_v)?;
        let through = rms_norm::backward(&d_normed, &input, &self.input_norm, &inputs.norm)?;
        Ok(residual::add(through, &d_stream)?)
    }

    fn mlp_backward(&self, dy: &Tensor, saved: &SavedOutputs, pass: &Pass<'_>) -> Result<Tensor, Error> {
        let [gate_saved, up_saved, down_saved] = &saved.linears;
        // The activation is made again: it is as large as the gate and costs nothing beside the multiplies.
        let activated = swiglu::forward(&saved.gate, &saved.up)?;
        let d_activated = self.project_backward(Projection::DownProj, dy, &activated, down_saved, pass)?;
        let (d_gate, d_up) = swiglu::backward(&d_activated, &saved.gate, &saved.up)?;
        let from_gate = self.project_backward(Projection::GateProj, &d_gate, &saved.normed, gate_saved, pass)?;
        let from_up = self.project_backward(Projection::UpProj, &d_up, &saved.normed, up_saved, pass)?;
        let d_normed = residual::add(from_gate, &from_up)?;
        let through = rms_norm::backward(&d_normed, &saved.stream, &self.post_attention_norm, &saved.norm)?;
        Ok(residual::add(through, dy)?)
    }
}
