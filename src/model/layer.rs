//! A decoder layer of Qwen2 and Qwen3: attention and a gated MLP, each behind a norm and added to the residual stream.
//!
//! `forward` returns the output and what `backward` needs; `backward` returns the input's gradient and has by then added
//! every trained parameter's gradient to its bucket. `attention_inputs` and `after_attention` are the two halves around
//! attention, which the rollout shares.
//!
//! Projections that read one input are applied together, the residual sums ride in the products before them, and a
//! block that is computed again for its backward leaves out its last product, which backward does not need.
//!
//! Shapes: `N` tokens, `D` hidden, `H` query heads, `K` key-value heads, `d` head size, `I` intermediate. The residual
//! stream is `[N, D]`; its type and that of the activations are f32 on the CPU.

use candle_core::{DType, Tensor};

use super::adapter::AdapterSettings;
use super::config::ModelConfig;
use super::params::BlockParams;
use super::{Error, adapter};
use crate::config::settings::Projection;
use crate::ops::attention::{self, Heads, Layout};
use crate::ops::linear::{self, Dropout, Linear, Mode, TokenKeys, room};
use crate::ops::rope::Rotation;
use crate::ops::{Param, Wide, rms_norm, swiglu};
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

/// A decoder layer with its parameters.
#[derive(Clone, Debug)]
pub struct DecoderLayer {
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

/// The MLP's part of [`SavedOutputs`].
struct SavedMlp {
    norm: rms_norm::Saved,
    normed: Wide,
    gate: Tensor,
    up: Tensor,
    gate_up: linear::SavedGroup,
}

impl SavedMlp {
    fn join(self, attended: Wide, o: linear::SavedGroup, stream: Tensor, down: linear::SavedGroup) -> SavedOutputs {
        let Self { norm, normed, gate, up, gate_up } = self;
        SavedOutputs { attended, o, stream, norm, normed, gate, up, gate_up, down }
    }
}

/// What stays of a layer until its backward when the rest is computed again. `T` is where the large tensors are.
#[derive(Debug)]
pub struct Retained<T = Tensor> {
    /// The layer's input: `[N, D]`.
    pub input: T,
    /// The results of attention and of the products beside it, where they are kept.
    pub middle: Option<Middle<T>>,
}

/// Attention's results and the residual stream after it.
#[derive(Debug)]
pub struct Middle<T> {
    attended: T,
    cols: usize,
    stream: T,
    o: linear::SavedGroup,
    attention: attention::Saved,
}

impl Retained {
    /// Bytes of the large tensors.
    pub fn size_bytes(&self) -> usize {
        let bytes = |x: &Tensor| x.elem_count() * x.dtype().size_in_bytes();
        bytes(&self.input) + self.middle.as_ref().map_or(0, |m| bytes(&m.attended) + bytes(&m.stream))
    }
}

impl<T> Retained<T> {
    /// The same with every large tensor moved by `place`.
    ///
    /// # Errors
    /// If `place` fails.
    pub fn map<U, E>(self, mut place: impl FnMut(T) -> Result<U, E>) -> Result<Retained<U>, E> {
        let input = place(self.input)?;
        let middle = match self.middle {
            None => None,
            Some(Middle { attended, cols, stream, o, attention }) => {
                Some(Middle { attended: place(attended)?, cols, stream: place(stream)?, o, attention })
            }
        };
        Ok(Retained { input, middle })
    }
}

impl Saved {
    /// The layer's input alone, or with the results of attention.
    pub fn retain(self, with_attention: bool) -> Retained {
        let SavedOutputs { attended, o, stream, .. } = self.outputs;
        let (cols, attention) = (attended.cols(), self.attention);
        let middle = Middle { attended: attended.into_buffer(), cols, stream, o, attention };
        Retained { input: self.input, middle: with_attention.then_some(middle) }
    }

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

/// A layer's backward between its MLP and its attention.
#[derive(Debug)]
pub struct Halfway {
    input: Tensor,
    /// The gradient of the residual stream between the two.
    d_stream: Tensor,
    /// Queries, keys, values and what they left, where they are there already.
    heads: Option<(Tensor, Tensor, Tensor, SavedInputs)>,
    attention: attention::Saved,
    attended: Wide,
    o: linear::SavedGroup,
}

/// The projections of the keys, values and queries, of the output, and the two halves of the MLP.
const QKV: [Projection; 3] = [Projection::QProj, Projection::KProj, Projection::VProj];
const OUTPUT: [Projection; 1] = [Projection::OProj];
const GATE_UP: [Projection; 2] = [Projection::GateProj, Projection::UpProj];
const DOWN: [Projection; 1] = [Projection::DownProj];

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

    /// Normalises heads (Qwen3) and turns them by their positions.
    fn heads(
        &self,
        x: Tensor,
        norm: Option<&Param>,
        rotation: &Rotation,
    ) -> Result<(Tensor, Option<SavedNorm>), Error> {
        let Some(norm) = norm else { return Ok((rotation.forward_rows(&x)?, None)) };
        let (normed, saved) = rms_norm::forward_heads(&x, norm, self.eps)?;
        Ok((rotation.forward_rows(&normed)?, Some(SavedNorm { input: x, norm: saved })))
    }

    fn heads_backward(
        dy: &Tensor,
        norm: Option<&Param>,
        saved: Option<&SavedNorm>,
        rotation: &Rotation,
    ) -> Result<Tensor, Error> {
        let turned = rotation.backward_rows(dy)?;
        match (norm, saved) {
            (Some(norm), Some(saved)) => Ok(rms_norm::backward_heads(&turned, &saved.input, norm, &saved.norm)?),
            _ => Ok(turned),
        }
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
        let (normed, norm) = rms_norm::forward_wide(x, &self.input_norm, self.eps, pass.compute, self.room(QKV, pass))?;
        let (outputs, qkv) = self.with_group(QKV, pass, |group, mode| linear::forward(group, &normed, mode, None))?;
        let [q, k, v] = exactly(outputs);
        let (q, q_norm) = self.heads(q, self.q_norm.as_ref(), pass.rotation)?;
        let (k, k_norm) = self.heads(k, self.k_norm.as_ref(), pass.rotation)?;
        Ok((q, k, v, SavedInputs { norm, normed, qkv, q_norm, k_norm }))
    }

    /// The rest of the layer: output projection, residual, MLP, residual.
    ///
    /// # Shapes
    /// `x`: `[N, D]`, the layer's input; `attended`: `[N, H · d]`; returns `[N, D]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn after_attention(
        &self,
        x: &Tensor,
        attended: Wide,
        pass: &Pass<'_>,
    ) -> Result<(Tensor, SavedOutputs), Error> {
        let (stream, o) = self.output_projection(x, &attended, pass)?;
        let (activated, half) = self.mlp(&stream, pass)?;
        let (outputs, down) =
            self.with_group(DOWN, pass, |group, mode| linear::forward(group, &activated, mode, Some(&stream)))?;
        let [y] = exactly(outputs);
        Ok((y, half.join(attended, o, stream, down)))
    }

    /// The residual stream after attention.
    fn output_projection(
        &self,
        x: &Tensor,
        attended: &Wide,
        pass: &Pass<'_>,
    ) -> Result<(Tensor, linear::SavedGroup), Error> {
        let (outputs, o) =
            self.with_group(OUTPUT, pass, |group, mode| linear::forward(group, attended, mode, Some(x)))?;
        let [stream] = exactly(outputs);
        Ok((stream, o))
    }

    /// The MLP up to its last product, which reads the returned activation.
    fn mlp(&self, stream: &Tensor, pass: &Pass<'_>) -> Result<(Wide, SavedMlp), Error> {
        let room = self.room(GATE_UP, pass);
        let (normed, norm) = rms_norm::forward_wide(stream, &self.post_attention_norm, self.eps, pass.compute, room)?;
        let (outputs, gate_up) =
            self.with_group(GATE_UP, pass, |group, mode| linear::forward(group, &normed, mode, None))?;
        let [gate, up] = exactly(outputs);
        let activated = swiglu::forward_wide(&gate, &up, self.room(DOWN, pass))?;
        Ok((activated, SavedMlp { norm, normed, gate, up, gate_up }))
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
        let (y, outputs) = self.after_attention(x, attended, pass)?;
        Ok((y, Saved { input: x.clone(), inputs, q, k, v, attention, outputs }))
    }

    /// The gradient of the layer's input.
    ///
    /// # Shapes
    /// `dy`: `[N, D]`; returns `[N, D]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn backward(&self, dy: &Tensor, saved: Saved, pass: &Pass<'_>) -> Result<Tensor, Error> {
        let Saved { input, inputs, q, k, v, attention, outputs } = saved;
        let (d_stream, attended, o) = self.mlp_backward(dy, outputs, pass)?;
        self.attention_backward(&d_stream, &input, (q, k, v, inputs), attention, attended, &o, pass)
    }

    /// The first part of [`Self::backward`] from what was retained: through the MLP. The rest is computed again, without the
    /// layer's last product; where the results of attention were retained, neither it nor the product after it is repeated,
    /// and queries, keys and values are not there yet while the MLP needs its memory.
    ///
    /// # Shapes
    /// `dy`: `[N, D]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn backward_mlp(&self, dy: &Tensor, retained: Retained, pass: &Pass<'_>) -> Result<Halfway, Error> {
        let Retained { input, middle } = retained;
        let (heads, attention, attended, stream, o) =
            if let Some(Middle { attended, cols, stream, o, attention }) = middle {
                (None, attention, Wide::with_cols(attended, cols)?, stream, o)
            } else {
                let (q, k, v, inputs) = self.attention_inputs(&input, pass)?;
                let room = self.attended_room(pass);
                let (attended, attention) = attention::forward_rows(&q, &k, &v, pass.layout, self.heads, room)?;
                let (stream, o) = self.output_projection(&input, &attended, pass)?;
                (Some((q, k, v, inputs)), attention, attended, stream, o)
            };
        let outputs = self.outputs_again(attended, o, stream, pass)?;
        let (d_stream, attended, o) = self.mlp_backward(dy, outputs, pass)?;
        Ok(Halfway { input, d_stream, heads, attention, attended, o })
    }

    /// The rest: the gradient of the layer's input.
    ///
    /// # Shapes
    /// Returns `[N, D]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn backward_rest(&self, halfway: Halfway, pass: &Pass<'_>) -> Result<Tensor, Error> {
        let Halfway { input, d_stream, heads, attention, attended, o } = halfway;
        let heads = match heads {
            Some(heads) => heads,
            None => self.attention_inputs(&input, pass)?,
        };
        self.attention_backward(&d_stream, &input, heads, attention, attended, &o, pass)
    }

    /// What the second half keeps for backward, from the residual stream after attention, without its last product.
    fn outputs_again(
        &self,
        attended: Wide,
        o: linear::SavedGroup,
        stream: Tensor,
        pass: &Pass<'_>,
    ) -> Result<SavedOutputs, Error> {
        let (activated, half) = self.mlp(&stream, pass)?;
        let down = self.with_group(DOWN, pass, |group, mode| linear::saved_only(group, &activated, mode))?;
        Ok(half.join(attended, o, stream, down))
    }

    /// The gradient of the layer's input from that of the residual stream after attention.
    #[expect(clippy::too_many_arguments, reason = "everything that the first half left")]
    fn attention_backward(
        &self,
        d_stream: &Tensor,
        input: &Tensor,
        (q, k, v, inputs): (Tensor, Tensor, Tensor, SavedInputs),
        attention: attention::Saved,
        attended: Wide,
        o: &linear::SavedGroup,
        pass: &Pass<'_>,
    ) -> Result<Tensor, Error> {
        let d_attended = self.with_group(OUTPUT, pass, |group, mode| {
            let (dx, carried) = linear::backward_input(group, std::slice::from_ref(d_stream), o, mode)?;
            linear::backward_weights(group, &carried, &attended, o, mode)?;
            Ok(dx)
        })?;
        let [dq, dk, dv] =
            attention::backward_rows(&d_attended, &q, &k, &v, &attended, pass.layout, self.heads, &attention)?;
        drop((d_attended, attended, attention, q, k, v));
        let dq = Self::heads_backward(&dq, self.q_norm.as_ref(), inputs.q_norm.as_ref(), pass.rotation)?;
        let dk = Self::heads_backward(&dk, self.k_norm.as_ref(), inputs.k_norm.as_ref(), pass.rotation)?;
        let d_normed = self.with_group(QKV, pass, |group, mode| {
            let (dx, carried) = linear::backward_input(group, &[dq, dk, dv], &inputs.qkv, mode)?;
            linear::backward_weights(group, &carried, &inputs.normed, &inputs.qkv, mode)?;
            Ok(dx)
        })?;
        Ok(rms_norm::backward_onto(&d_normed, input, &self.input_norm, &inputs.norm, d_stream)?)
    }

    /// The gradient of the residual stream between the halves, and what the first half needs of the second's residue.
    fn mlp_backward(
        &self,
        dy: &Tensor,
        saved: SavedOutputs,
        pass: &Pass<'_>,
    ) -> Result<(Tensor, Wide, linear::SavedGroup), Error> {
        let SavedOutputs { attended, o, stream, norm, normed, gate, up, gate_up, down } = saved;
        // The activation is made again: it is as large as the gate and costs nothing beside the multiplies.
        let (d_gate, d_up) = self.with_group(DOWN, pass, |group, mode| {
            let (d_activated, carried) = linear::backward_input(group, std::slice::from_ref(dy), &down, mode)?;
            let (d_gate, d_up, activated) = swiglu::backward_again(&d_activated, &gate, &up)?;
            linear::backward_weights(group, &carried, &activated, &down, mode)?;
            Ok((d_gate, d_up))
        })?;
        let d_normed = self.with_group(GATE_UP, pass, |group, mode| {
            let (dx, carried) = linear::backward_input(group, &[d_gate, d_up], &gate_up, mode)?;
            linear::backward_weights(group, &carried, &normed, &gate_up, mode)?;
            Ok(dx)
        })?;
        let d_stream = rms_norm::backward_onto(&d_normed, &stream, &self.post_attention_norm, &norm, dy)?;
        Ok((d_stream, attended, o))
    }
}

/// The outputs of a group, one for each of its projections.
fn exactly<const G: usize>(outputs: Vec<Tensor>) -> [Tensor; G] {
    outputs.try_into().unwrap_or_else(|_| unreachable!("a group has one output for each of its projections"))
}
