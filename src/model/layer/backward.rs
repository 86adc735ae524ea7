//! A layer's backward, whole or from what was retained of it.

use candle_core::Tensor;

use super::retained::{LowRank, LowRanks, Middle, Retained};
use super::{DOWN, DecoderLayer, GATE_UP, OUTPUT, Pass, QKV, Saved, SavedInputs, SavedNorm, SavedOutputs};
use crate::model::Error;
use crate::ops::linear::{self, Outputs};
use crate::ops::rope::Rotation;
use crate::ops::swiglu::{self, Around, Between};
use crate::ops::{Param, Wide, attention, rms_norm};

/// A layer's backward behind the last projection of its MLP.
#[derive(Debug)]
pub struct InsideMlp {
    front: Front,
    mlp: MlpGradients,
}

/// A layer's backward between its MLP and its attention.
#[derive(Debug)]
pub struct Halfway {
    front: Front,
    /// The gradient of the residual stream between the two.
    d_stream: Tensor,
}

/// What the backward of attention and of what is before it needs.
#[derive(Debug)]
struct Front {
    input: Tensor,
    /// The low-rank products of queries, keys and values, where they were kept.
    qkv: Option<linear::SavedGroup>,
    /// Queries, keys, values and what they left, where they are there already.
    heads: Option<(Tensor, Tensor, Tensor, SavedInputs)>,
    attention: attention::Saved,
    attended: Wide,
    o: linear::SavedGroup,
}

/// The gradients of gate and up, and what the backward of what is before them needs.
#[derive(Debug)]
struct MlpGradients {
    d_gate: Tensor,
    d_up: Tensor,
    stream: Tensor,
    norm: rms_norm::Saved,
    normed: Wide,
    gate_up: linear::SavedGroup,
    /// Whether the gradients of the adapters' `B`s are in their buckets already.
    has_b_gradients: bool,
}

impl DecoderLayer<'_> {
    /// The gradient of the layer's input.
    ///
    /// # Shapes
    /// `dy`: `[N, D]`; returns `[N, D]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn backward(&self, dy: &Tensor, saved: Saved, pass: &Pass<'_>) -> Result<Tensor, Error> {
        let inside = self.backward_down_of_whole(dy, saved, pass)?;
        let halfway = self.backward_mlp(dy, inside, pass)?;
        self.backward_attention(halfway, None, pass)
    }

    /// The first part of [`Self::backward`]: through the last projection of the MLP.
    ///
    /// # Shapes
    /// `dy`: `[N, D]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn backward_down_of_whole(&self, dy: &Tensor, saved: Saved, pass: &Pass<'_>) -> Result<InsideMlp, Error> {
        let Saved { input, inputs, q, k, v, attention, outputs } = saved;
        let (mlp, attended, o) = self.down_backward(dy, outputs, pass)?;
        let front = Front { input, qkv: None, heads: Some((q, k, v, inputs)), attention, attended, o };
        Ok(InsideMlp { front, mlp })
    }

    /// The first part of [`Self::backward`] from what was retained: through the last projection of the MLP. The rest is
    /// computed again, without the layer's last product; where the results of attention were retained, neither it nor the
    /// product after it is repeated, and queries, keys and values are not there yet while the MLP needs its memory.
    ///
    /// `mlp_outputs` are those that were taken out of what was retained.
    ///
    /// # Shapes
    /// `dy`: `[N, D]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn backward_down(
        &self,
        dy: &Tensor,
        retained: Retained,
        mlp_outputs: Option<Tensor>,
        pass: &Pass<'_>,
    ) -> Result<InsideMlp, Error> {
        let Retained { input, low_ranks: LowRanks { qkv, o, gate_up, down }, middle, .. } = retained;
        let [mut qkv, o, gate_up, down] = [qkv, o, gate_up, down].map(|group| group.map(LowRank::into_group));
        let (heads, attention, attended, stream, o) = match (middle, o) {
            (Some(Middle { attended, cols, log_sums, stream }), Some(o)) => {
                let attention = attention::Saved::from_log_sums(log_sums);
                (None, attention, Wide::with_cols(attended, cols)?, stream, o)
            }
            (_, o) => {
                let (q, k, v, inputs) = self.attention_inputs_from(&input, qkv.take().as_ref(), pass)?;
                let room = self.attended_room(pass);
                let (attended, attention) = attention::forward_rows(&q, &k, &v, pass.layout, self.heads, room)?;
                let (stream, o) = self.output_projection(&input, &attended, o.as_ref(), pass)?;
                (Some((q, k, v, inputs)), attention, attended, stream, o)
            }
        };
        let half = self.gate_up(&stream, gate_up.as_ref(), mlp_outputs.as_ref(), pass)?;
        drop(mlp_outputs);
        let down = if let Some(down) = down {
            down
        } else {
            let activated = self.activation(&half, pass)?;
            self.with_group(DOWN, pass, |group, mode| linear::saved_only(group, &activated, mode))?
        };
        let (mlp, attended, o) = self.down_backward(dy, half.join(attended, o, stream, down), pass)?;
        Ok(InsideMlp { front: Front { input, qkv, heads, attention, attended, o }, mlp })
    }

    /// The second part: through the rest of the MLP and its norm.
    ///
    /// # Shapes
    /// `dy`: `[N, D]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn backward_mlp(&self, dy: &Tensor, inside: InsideMlp, pass: &Pass<'_>) -> Result<Halfway, Error> {
        let InsideMlp { front, mlp } = inside;
        let MlpGradients { d_gate, d_up, stream, norm, normed, gate_up, has_b_gradients } = mlp;
        let d_normed = self.with_group(GATE_UP, pass, |group, mode| {
            let (dx, carried) = linear::backward_input(group, &[d_gate, d_up], &gate_up, mode)?;
            let saved = (!has_b_gradients).then_some(&gate_up);
            linear::backward_weights(group, &carried, Some(&normed), saved, mode)?;
            dx.into_values()
        })?;
        let d_stream = rms_norm::backward_onto(&d_normed, &stream, &self.post_attention_norm, &norm, dy)?;
        Ok(Halfway { front, d_stream })
    }

    /// The rest: the gradient of the layer's input. `products` are those that were taken out of what was retained.
    ///
    /// # Shapes
    /// Returns `[N, D]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn backward_attention(
        &self,
        halfway: Halfway,
        products: Option<Tensor>,
        pass: &Pass<'_>,
    ) -> Result<Tensor, Error> {
        let Halfway { front: Front { input, qkv, heads, attention, attended, o }, d_stream } = halfway;
        let heads = match (heads, products, qkv) {
            (Some(heads), ..) => heads,
            (None, Some(products), Some(qkv)) => self.attention_inputs_again(&input, products, qkv, pass)?,
            (None, _, qkv) => self.attention_inputs_from(&input, qkv.as_ref(), pass)?,
        };
        self.attention_backward(&d_stream, &input, heads, attention, attended, &o, pass)
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
            linear::backward_weights(group, &carried, Some(&attended), Some(o), mode)?;
            dx.into_values()
        })?;
        let [dq, dk, dv] =
            attention::backward_rows(&d_attended, &q, &k, &v, &attended, pass.layout, self.heads, &attention)?;
        drop((d_attended, attended, attention, q, k, v));
        let dq = Self::heads_backward(dq, self.q_norm.as_ref(), inputs.q_norm.as_ref(), pass.rotation)?;
        let dk = Self::heads_backward(dk, self.k_norm.as_ref(), inputs.k_norm.as_ref(), pass.rotation)?;
        let d_normed = self.with_group(QKV, pass, |group, mode| {
            let (dx, carried) = linear::backward_input(group, &[dq, dk, dv], &inputs.qkv, mode)?;
            linear::backward_weights(group, &carried, Some(&inputs.normed), Some(&inputs.qkv), mode)?;
            dx.into_values()
        })?;
        Ok(rms_norm::backward_onto(&d_normed, input, &self.input_norm, &inputs.norm, d_stream)?)
    }

    /// The gradients of gate and up, and what the first half needs of the second's residue.
    fn down_backward(
        &self,
        dy: &Tensor,
        saved: SavedOutputs,
        pass: &Pass<'_>,
    ) -> Result<(MlpGradients, Wide, linear::SavedGroup), Error> {
        let SavedOutputs { attended, o, stream, norm, normed, gate, up, gate_up, down } = saved;
        // The activation is not kept: it is as large as the gate and costs nothing beside the multiplies to make again, if a
        // kernel does not do what it is for.
        let [gate_proj, up_proj] = self.group(GATE_UP);
        let (d_gate, d_up, has_b_gradients) = self.with_group(DOWN, pass, |group, mode| {
            let (d_activated, carried) = linear::backward_input(group, std::slice::from_ref(dy), &down, mode)?;
            let around = Around { down: group[0], gate: gate_proj, up: up_proj, saved: &gate_up, mode };
            let Between { d_gate, d_up, activated } = swiglu::backward_between(d_activated, gate, up, &around)?;
            linear::backward_weights(group, &carried, activated.as_ref(), Some(&down), mode)?;
            Ok((d_gate, d_up, activated.is_none()))
        })?;
        Ok((MlpGradients { d_gate, d_up, stream, norm, normed, gate_up, has_b_gradients }, attended, o))
    }

    /// As [`Self::attention_inputs`], from the products and the low-rank products that it left.
    fn attention_inputs_again(
        &self,
        x: &Tensor,
        products: Tensor,
        qkv: linear::SavedGroup,
        pass: &Pass<'_>,
    ) -> Result<(Tensor, Tensor, Tensor, SavedInputs), Error> {
        // With room for the low-rank products, which are not made again: the gradients of `A` come from rows of the same width, and
        // so by the same product, whatever was kept.
        let room = self.room(QKV, pass);
        let (normed, norm) = rms_norm::forward_wide(x, &self.input_norm, self.eps, pass.compute, room)?;
        let [q, k, v] = Outputs::of_whole(&self.group(QKV), products)?.into_each();
        // Without a norm the products were turned where they are.
        let again = |x, norm: Option<&Param>| match norm {
            Some(_) => self.heads(x, norm, pass.rotation),
            None => Ok((x, None)),
        };
        let (q, q_norm) = again(q, self.q_norm.as_ref())?;
        let (k, k_norm) = again(k, self.k_norm.as_ref())?;
        Ok((q, k, v, SavedInputs { norm, normed, products: None, qkv, q_norm, k_norm }))
    }

    fn heads_backward(
        dy: Tensor,
        norm: Option<&Param>,
        saved: Option<&SavedNorm>,
        rotation: &Rotation,
    ) -> Result<Tensor, Error> {
        let turned = rotation.backward_rows(dy)?;
        match (norm, saved) {
            (Some(norm), Some(saved)) => Ok(rms_norm::backward_heads(turned, &saved.input, norm, &saved.norm)?),
            _ => Ok(turned),
        }
    }
}
