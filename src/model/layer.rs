//! A decoder layer of Qwen2 and Qwen3: attention and a gated MLP, each behind a norm and added to the residual stream.
//!
//! `forward` returns the output and what `backward` needs; `backward` returns the input's gradient and has by then added
//! every trained parameter's gradient to its bucket. `attention_inputs` and `after_attention` are the two halves around
//! attention, which the rollout shares.
//!
//! Projections that read one input are applied together, and the residual sums ride in the products before them. Of a
//! block that is computed again for its backward the low-rank products are kept: they are small, and with them the
//! last activation is not needed again. Its last product, which backward does not need, is left out.
//!
//! Shapes: `N` tokens, `D` hidden, `H` query heads, `K` key-value heads, `d` head size, `I` intermediate. The residual
//! stream is `[N, D]`; its type and that of the activations are f32 on the CPU.

mod backward;
mod halves;
mod lanes;
mod retained;

use std::marker::PhantomData;

use candle_core::{DType, Tensor};

use super::adapter::AdapterSettings;
use super::config::ModelConfig;
use super::params::BlockParams;
use super::{Error, adapter};
use crate::config::settings::Projection;
use crate::ops::attention::{self, Heads, Layout};
use crate::ops::linear::{self, Dropout, Linear, Mode, Outputs, TokenKeys, room};
use crate::ops::rope::Rotation;
use crate::ops::{Param, Wide, rms_norm, swiglu};
use crate::rng;
pub use backward::{Halfway, InsideMlp};
pub use halves::{AdapterRanks, Half, LayerCosts, Leaf, TypeBytes, Work};
pub use lanes::{LaneBuffers, LaneLayer, LaneWidths};
pub use retained::{OfMixer, Retained, Retaining};

/// What a pass through the layers needs to know besides the hidden states.
#[derive(Clone, Copy, Debug)]
pub struct Pass<'a> {
    /// Which tokens attend to which.
    pub layout: &'a Layout,
    /// Rotations of the batch's positions.
    pub rotation: &'a Rotation,
    /// Whether adapters take part; without them the base model speaks.
    pub use_adapter: bool,
    /// Type of activations between the residual sums; on the CPU always f32.
    pub compute: DType,
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
    pub token_keys: &'a TokenKeys,
}

/// A decoder layer with its parameters, for as long as they are lent.
#[derive(Clone, Debug)]
pub struct DecoderLayer<'l> {
    lent: PhantomData<&'l BlockParams>,
    index: usize,
    eps: f64,
    heads: Heads,
    input_norm: Param,
    post_attention_norm: Param,
    /// In the order of [`Projection::ALL`].
    projections: [Linear; 7],
    q_norm: Option<Param>,
    k_norm: Option<Param>,
}

/// Queries or keys before their norm (Qwen3), and the norm's own residue.
#[derive(Clone, Debug)]
struct SavedNorm {
    input: Tensor,
    norm: rms_norm::Saved,
}

/// What the first half keeps for backward.
#[derive(Clone, Debug)]
pub struct SavedInputs {
    norm: rms_norm::Saved,
    normed: Wide,
    /// The outputs of the projections as columns of one buffer, on a GPU: the memory of the values.
    products: Option<Tensor>,
    qkv: linear::SavedGroup,
    q_norm: Option<SavedNorm>,
    k_norm: Option<SavedNorm>,
}

/// What the second half keeps for backward.
#[derive(Clone, Debug)]
pub struct SavedOutputs {
    attended: Wide,
    o: linear::SavedGroup,
    stream: Tensor,
    norm: rms_norm::Saved,
    normed: Wide,
    gate: Tensor,
    up: Tensor,
    gate_up: linear::SavedGroup,
    down: linear::SavedGroup,
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
    outputs: SavedOutputs,
}

/// What of a layer's second half is not computed again.
#[derive(Debug)]
pub struct AfterAttention {
    o: linear::SavedGroup,
    stream: Tensor,
    gate_up: linear::SavedGroup,
    /// Gate and up of the first rows.
    mlp_outputs: Option<Tensor>,
    down: linear::SavedGroup,
}

/// The MLP's part of [`SavedOutputs`].
struct SavedMlp {
    norm: rms_norm::Saved,
    normed: Wide,
    outputs: Outputs,
    gate_up: linear::SavedGroup,
}

impl SavedMlp {
    fn join(self, attended: Wide, o: linear::SavedGroup, stream: Tensor, down: linear::SavedGroup) -> SavedOutputs {
        let Self { norm, normed, outputs, gate_up } = self;
        let [gate, up] = outputs.into_each();
        SavedOutputs { attended, o, stream, norm, normed, gate, up, gate_up, down }
    }
}

impl Saved {
    /// The tensors of the layer in the order in which they are computed, by name: to find where values stop being finite.
    pub fn tensors(&self) -> Vec<(&'static str, Tensor)> {
        let SavedOutputs { attended, stream, normed, gate, up, .. } = &self.outputs;
        let wide = |x: &Wide| x.values().unwrap_or_else(|_| x.buffer().clone());
        vec![
            ("the layer's input", self.input.clone()),
            ("input_layernorm", wide(&self.inputs.normed)),
            ("self_attn.q_proj", self.q.clone()),
            ("self_attn.k_proj", self.k.clone()),
            ("self_attn.v_proj", self.v.clone()),
            ("attention", wide(attended)),
            ("self_attn.o_proj", stream.clone()),
            ("post_attention_layernorm", wide(normed)),
            ("mlp.gate_proj", gate.clone()),
            ("mlp.up_proj", up.clone()),
        ]
    }
}

/// The projections of the keys, values and queries, of the output, and the two halves of the MLP.
const QKV: [Projection; 3] = [Projection::QProj, Projection::KProj, Projection::VProj];
const OUTPUT: [Projection; 1] = [Projection::OProj];
const GATE_UP: [Projection; 2] = [Projection::GateProj, Projection::UpProj];
const DOWN: [Projection; 1] = [Projection::DownProj];

impl<'l> DecoderLayer<'l> {
    /// Binds the parameters of layer `index`.
    ///
    /// # Errors
    /// If one is missing.
    pub fn bind(
        params: &'l BlockParams,
        index: usize,
        config: &ModelConfig,
        adapter: Option<&AdapterSettings>,
    ) -> Result<Self, Error> {
        let prefix = format!("model.layers.{index}");
        let dense = |name: &str| params.dense(&format!("{prefix}.{name}.weight"));
        let projection = |p: Projection| adapter::bind_linear(params, &format!("{prefix}.{}", p.path()), adapter);
        let qk_norm = |name| config.has_qk_norm.then(|| dense(name)).transpose();
        Ok(Self {
            lent: PhantomData,
            index,
            eps: config.rms_norm_eps,
            heads: Heads { query: config.num_attention_heads, kv: config.num_key_value_heads },
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

    fn group<const G: usize>(&self, projections: [Projection; G]) -> [&Linear; G] {
        projections.map(|p| &self.projections[p as usize])
    }

    /// Columns behind the input of a group that its adapters use in this pass.
    fn room<const G: usize>(&self, projections: [Projection; G], pass: &Pass<'_>) -> usize {
        if pass.use_adapter { room(&self.group(projections)) } else { 0 }
    }

    /// Calls `work` with the projections and how they are applied in this pass.
    fn with_group<const G: usize, T>(
        &self,
        projections: [Projection; G],
        pass: &Pass<'_>,
        work: impl FnOnce(&[&Linear], Mode<'_>) -> Result<T, crate::ops::Error>,
    ) -> Result<T, Error> {
        let dropouts: Vec<Dropout<'_>> = match pass.dropout {
            None => vec![],
            Some(PassDropout { probability, key, token_keys }) => {
                let key_of =
                    |p: Projection| rng::mix(key ^ rng::mix((self.index * Projection::ALL.len() + p as usize) as u64));
                projections.iter().map(|&p| Dropout { probability, key: key_of(p), token_keys }).collect()
            }
        };
        let mode = Mode { use_adapter: pass.use_adapter, dropouts: &dropouts };
        Ok(work(&self.group(projections), mode)?)
    }

    /// Normalises heads (Qwen3) and turns them by their positions; on a GPU a norm has its own result, and a turn has not.
    fn heads(
        &self,
        x: Tensor,
        norm: Option<&Param>,
        rotation: &Rotation,
    ) -> Result<(Tensor, Option<SavedNorm>), Error> {
        let Some(norm) = norm else { return Ok((rotation.forward_rows(x)?, None)) };
        let (normed, saved) = rms_norm::forward_heads(&x, norm, self.eps)?;
        Ok((rotation.forward_rows(normed)?, Some(SavedNorm { input: x, norm: saved })))
    }

    /// Bytes of the projections' weights.
    pub fn weight_bytes(&self) -> usize {
        self.projections.iter().map(|linear| linear.weight.size_bytes()).sum()
    }

    /// Query heads and key-value heads.
    pub fn num_heads(&self) -> Heads {
        self.heads
    }

    /// Columns behind the attention's result that [`Self::after_attention`] would use.
    pub fn attended_room(&self, pass: &Pass<'_>) -> usize {
        self.room(OUTPUT, pass)
    }

    /// Queries, keys and values of the layer's input, ready for attention.
    ///
    /// # Shapes
    /// `x`: `[N, D]`; returns `[N, H · d]`, `[N, K · d]`, `[N, K · d]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn attention_inputs(
        &self,
        x: &Tensor,
        pass: &Pass<'_>,
    ) -> Result<(Tensor, Tensor, Tensor, SavedInputs), Error> {
        self.attention_inputs_from(x, None, pass)
    }

    /// As [`Self::attention_inputs`], with the low-rank products that it left, if they were kept.
    fn attention_inputs_from(
        &self,
        x: &Tensor,
        first: Option<&linear::SavedGroup>,
        pass: &Pass<'_>,
    ) -> Result<(Tensor, Tensor, Tensor, SavedInputs), Error> {
        let (normed, norm) = rms_norm::forward_wide(x, &self.input_norm, self.eps, pass.compute, self.room(QKV, pass))?;
        let (outputs, qkv) = self.with_group(QKV, pass, |group, mode| match first {
            Some(first) => linear::forward_again(group, &normed, mode, None, first, None),
            None => linear::forward(group, &normed, mode, None),
        })?;
        self.turned(outputs, norm, normed, qkv, pass)
    }

    /// Normalises and turns the heads of queries and keys.
    fn turned(
        &self,
        outputs: Outputs,
        norm: rms_norm::Saved,
        normed: Wide,
        qkv: linear::SavedGroup,
        pass: &Pass<'_>,
    ) -> Result<(Tensor, Tensor, Tensor, SavedInputs), Error> {
        let products = outputs.whole().cloned();
        let [q, k, v] = outputs.into_each();
        let (q, q_norm) = self.heads(q, self.q_norm.as_ref(), pass.rotation)?;
        let (k, k_norm) = self.heads(k, self.k_norm.as_ref(), pass.rotation)?;
        Ok((q, k, v, SavedInputs { norm, normed, products, qkv, q_norm, k_norm }))
    }

    /// The rest of the layer: output projection, residual, MLP, residual. Of the MLP only the low-rank products stay and, on a
    /// GPU, gate and up of the first `mlp_rows`.
    ///
    /// # Shapes
    /// `x`: `[N, D]`, the layer's input; `attended`: `[N, H · d]`; returns `[N, D]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn after_attention(
        &self,
        x: &Tensor,
        attended: &Wide,
        mlp_rows: usize,
        pass: &Pass<'_>,
    ) -> Result<(Tensor, AfterAttention), Error> {
        let (stream, o) = self.output_projection(x, attended, None, pass)?;
        let SavedMlp { outputs, gate_up, .. } = self.gate_up(&stream, None, None, pass)?;
        let (activated, mlp_outputs) = swiglu::forward_over(outputs, mlp_rows)?;
        let (y, down) = self.down(&activated, &stream, pass)?;
        Ok((y, AfterAttention { o, stream, gate_up, mlp_outputs, down }))
    }

    fn activation(&self, half: &SavedMlp, pass: &Pass<'_>) -> Result<Wide, Error> {
        let [gate, up] = half.outputs.clone().into_each();
        Ok(swiglu::forward_wide(&gate, &up, self.room(DOWN, pass))?)
    }

    /// The MLP's last projection onto the residual stream.
    fn down(&self, activated: &Wide, stream: &Tensor, pass: &Pass<'_>) -> Result<(Tensor, linear::SavedGroup), Error> {
        let (outputs, down) =
            self.with_group(DOWN, pass, |group, mode| linear::forward(group, activated, mode, Some(stream)))?;
        let [y] = outputs.into_each();
        Ok((y, down))
    }

    /// The residual stream after attention; `first` is what the same left before.
    fn output_projection(
        &self,
        x: &Tensor,
        attended: &Wide,
        first: Option<&linear::SavedGroup>,
        pass: &Pass<'_>,
    ) -> Result<(Tensor, linear::SavedGroup), Error> {
        let (outputs, o) = self.with_group(OUTPUT, pass, |group, mode| match first {
            Some(first) => linear::forward_again(group, attended, mode, Some(x), first, None),
            None => linear::forward(group, attended, mode, Some(x)),
        })?;
        let [stream] = outputs.into_each();
        Ok((stream, o))
    }

    /// The MLP up to its activation; `first` is what the projections left before, `known` their outputs of the first rows.
    fn gate_up(
        &self,
        stream: &Tensor,
        first: Option<&linear::SavedGroup>,
        known: Option<&Tensor>,
        pass: &Pass<'_>,
    ) -> Result<SavedMlp, Error> {
        let room = self.room(GATE_UP, pass);
        let (normed, norm) = rms_norm::forward_wide(stream, &self.post_attention_norm, self.eps, pass.compute, room)?;
        let (outputs, gate_up) = self.with_group(GATE_UP, pass, |group, mode| match first {
            Some(first) => linear::forward_again(group, &normed, mode, None, first, known),
            None => linear::forward(group, &normed, mode, None),
        })?;
        Ok(SavedMlp { norm, normed, outputs, gate_up })
    }

    /// The layer's output and what backward needs.
    ///
    /// # Shapes
    /// `x`: `[N, D]`; returns `[N, D]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn forward(&self, x: &Tensor, pass: &Pass<'_>) -> Result<(Tensor, Saved), Error> {
        let (q, k, v, inputs) = self.attention_inputs(x, pass)?;
        let room = self.attended_room(pass);
        let (attended, attention) = attention::forward_rows(&q, &k, &v, pass.layout, self.heads, room)?;
        let (stream, o) = self.output_projection(x, &attended, None, pass)?;
        let half = self.gate_up(&stream, None, None, pass)?;
        let activated = self.activation(&half, pass)?;
        let (y, down) = self.down(&activated, &stream, pass)?;
        let outputs = half.join(attended, o, stream, down);
        Ok((y, Saved { input: x.clone(), inputs, q, k, v, attention, outputs }))
    }

    /// The layer's output and what [`Self::backward_down`] needs, in less memory than [`Self::forward`].
    ///
    /// # Shapes
    /// `x`: `[N, D]`; returns `[N, D]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn forward_retaining(&self, x: &Tensor, with: Retaining, pass: &Pass<'_>) -> Result<(Tensor, Retained), Error> {
        let (q, k, v, SavedInputs { products, qkv, .. }) = self.attention_inputs(x, pass)?;
        let room = self.attended_room(pass);
        let (attended, attention) = attention::forward_rows(&q, &k, &v, pass.layout, self.heads, room)?;
        drop((q, k, v));
        let Retaining { mixer, gate_up_rows } = with;
        let products = products.filter(|_| mixer >= OfMixer::Products);
        let (y, rest) = self.after_attention(x, &attended, gate_up_rows, pass)?;
        let middle = (mixer >= OfMixer::Attention).then_some((attended, attention));
        Ok((y, Retained::new(x.clone(), qkv, rest, middle, products)))
    }
}
