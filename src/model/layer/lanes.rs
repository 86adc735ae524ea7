//! A layer as decoding steps apply it: the equations of [`super::DecoderLayer`] for one new token of each lane, over memory that
//! is lent.

use candle_core::{DType, Device, Tensor};

use super::{DOWN, DecoderLayer, GATE_UP, OUTPUT, QKV};
use crate::config::settings::Projection;
use crate::device::{Matrix, Pointer};
use crate::kernels::cuda::{
    DecodeHeads, LanesView, PageSharing, PagedCache, ProductCard, ProductOutput, WeightKind, decode_attention,
    decode_attention_workspace, decode_combine, decode_heads, decode_norm, page_sharing,
};
use crate::model::Error;
use crate::model::config::ModelConfig;
use crate::ops::cuda::lanes::{Projections, Room, Scratch, vector};
use crate::ops::linear::Linear;

/// See the module's documentation.
#[derive(Debug)]
pub struct LaneLayer {
    input_norm: Tensor,
    post_attention_norm: Tensor,
    /// Of queries and keys.
    head_norms: Option<[Tensor; 2]>,
    eps: f32,
    head_dim: usize,
    qkv: Projections,
    output: Projections,
    gate_up: Projections,
    down: Projections,
}

/// Columns of what a layer makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaneWidths {
    /// Of the residual stream.
    pub hidden: usize,
    /// Of queries, keys and values.
    pub qkv: usize,
    /// Of the queries, and of attention's result.
    pub attended: usize,
    /// Of the MLP's activation.
    pub activated: usize,
}

/// Memory that a layer works on: rows for each lane.
#[derive(Clone, Copy, Debug)]
pub struct LaneBuffers<'b> {
    /// The residual stream, which the layer changes.
    pub stream: Matrix<'b>,
    /// For as many rows as a layout has.
    pub(crate) normed: Matrix<'b>,
    pub(crate) qkv: Matrix<'b>,
    pub(crate) attended: Matrix<'b>,
    pub(crate) activated: Matrix<'b>,
    /// Cosines and sines of the lanes' positions.
    pub(crate) rotations: Pointer<'b>,
    pub(crate) attention: Pointer<'b>,
    pub(crate) scratch: Scratch<'b>,
}

/// Whether kernels take heads of this size.
fn has_kernels(head_dim: usize) -> bool {
    matches!(head_dim, 64 | 128 | 192 | 256)
}

impl DecoderLayer<'_> {
    /// The layer for lanes; `None` where the kernels do not read its weights or heads.
    ///
    /// # Errors
    /// If the device has too little memory for the adapters in the type of the activations.
    pub fn for_lanes(
        &self,
        use_adapter: bool,
        compute: DType,
        device: &Device,
        card: ProductCard,
    ) -> Result<Option<LaneLayer>, Error> {
        let projections = |linears: &[&Linear]| Projections::new(linears, use_adapter, compute, device, card);
        let head_dim = self.projections[0].weight.rows() / self.heads.query.max(1);
        if !has_kernels(head_dim) {
            return Ok(None);
        }
        let (Some(qkv), Some(output), Some(gate_up), Some(down)) = (
            projections(&self.group(QKV))?,
            projections(&self.group(OUTPUT))?,
            projections(&self.group(GATE_UP))?,
            projections(&self.group(DOWN))?,
        ) else {
            return Ok(None);
        };
        let head_norms = match (&self.q_norm, &self.k_norm) {
            (Some(q), Some(k)) => Some([q.value.clone(), k.value.clone()]),
            _ => None,
        };
        Ok(Some(LaneLayer {
            input_norm: self.input_norm.value.clone(),
            post_attention_norm: self.post_attention_norm.value.clone(),
            head_norms,
            eps: self.eps as f32,
            head_dim,
            qkv,
            output,
            gate_up,
            down,
        }))
    }
}

impl LaneLayer {
    /// A layer without values, which tells what steps of such a one would need: `ranks` are those of its adapters in the order of
    /// [`Projection::ALL`], 0 for none. `None` where the kernels do not take its heads.
    ///
    /// # Errors
    /// Never.
    pub fn sizes(
        config: &ModelConfig,
        ranks: &[usize; Projection::ALL.len()],
        weights: WeightKind,
        card: ProductCard,
    ) -> Result<Option<Self>, Error> {
        if !has_kernels(config.head_dim) {
            return Ok(None);
        }
        let projections = |group: &[Projection]| {
            let rows: Vec<usize> = group.iter().map(|&p| config.projection_shape(p).0).collect();
            let ranks: Vec<usize> = group.iter().map(|&p| ranks[p as usize]).collect();
            let cols = group.first().map_or(0, |&p| config.projection_shape(p).1);
            Projections::sizes((&rows, &ranks), cols, weights, card)
        };
        let none = Tensor::zeros(0, DType::F32, &Device::Cpu)?;
        Ok(Some(Self {
            input_norm: none.clone(),
            post_attention_norm: none,
            head_norms: None,
            eps: config.rms_norm_eps as f32,
            head_dim: config.head_dim,
            qkv: projections(&QKV)?,
            output: projections(&OUTPUT)?,
            gate_up: projections(&GATE_UP)?,
            down: projections(&DOWN)?,
        }))
    }

    /// Values that adapters of such `ranks` take in the form in which steps read them.
    pub fn adapter_values(&self, ranks: &[usize; Projection::ALL.len()]) -> usize {
        let of = |projections: &Projections, group: &[Projection]| {
            projections.adapter_values(&group.iter().map(|&p| ranks[p as usize]).collect::<Vec<_>>())
        };
        of(&self.qkv, &QKV) + of(&self.output, &OUTPUT) + of(&self.gate_up, &GATE_UP) + of(&self.down, &DOWN)
    }

    /// Columns of what it makes.
    pub fn widths(&self) -> LaneWidths {
        LaneWidths {
            hidden: self.qkv.inputs(),
            qkv: self.qkv.outputs(),
            attended: self.output.inputs(),
            activated: self.down.inputs(),
        }
    }

    /// Bytes of weights and adapters that a step reads.
    pub fn bytes(&self) -> usize {
        [&self.qkv, &self.output, &self.gate_up, &self.down].map(Projections::bytes).iter().sum()
    }

    /// What products need beside their inputs and results.
    pub(crate) fn room(&self, lanes: usize) -> Room {
        let plain = |projections: &Projections| projections.room(lanes, false);
        plain(&self.qkv).or(plain(&self.output)).or(plain(&self.down)).or(self.gate_up.room(lanes, true))
    }

    /// Floats that attention needs for contexts up to `max_context`.
    pub fn attention_floats(&self, lanes: usize, max_context: usize) -> usize {
        decode_attention_workspace(lanes, self.output.inputs() / self.head_dim, self.head_dim, max_context)
    }

    /// When attention best reads pages that lanes share for several at once.
    ///
    /// # Errors
    /// If the device is no GPU.
    pub fn sharing(&self, device: &Device) -> Result<PageSharing, Error> {
        let LaneWidths { qkv, attended, .. } = self.widths();
        let (heads, kv_heads) = (attended / self.head_dim, (qkv - attended) / 2 / self.head_dim);
        Ok(page_sharing(device, heads, kv_heads, self.head_dim).map_err(crate::ops::Error::from)?)
    }

    /// Takes each lane's new token through the layer; its keys and values go to the cache.
    ///
    /// # Errors
    /// If the memory does not fit, or the device fails.
    pub fn step<'b>(
        &self,
        device: &Device,
        buffers: &LaneBuffers<'b>,
        cache: PagedCache<'_>,
        lanes: &LanesView<'_>,
        max_context: usize,
    ) -> Result<(), Error> {
        let LaneBuffers { stream, normed, qkv, attended, activated, rotations, attention, scratch } = *buffers;
        let rows = |memory: Matrix<'b>, of: &Projections| of.rows(memory, lanes.lanes);
        let norm = |weight: &Tensor, projections: &Projections| {
            let normed = rows(normed, projections)?;
            decode_norm(device, normed, stream, vector(weight)?, self.eps)?;
            Ok::<_, crate::ops::Error>(normed)
        };
        let onto = ProductOutput::Sum { out: stream, onto: Some(stream) };
        let steps = || {
            let normed = norm(&self.input_norm, &self.qkv)?;
            self.qkv.apply(device, normed, ProductOutput::Sum { out: qkv, onto: None }, &scratch)?;
            let norms = match &self.head_norms {
                Some([q, k]) => Some([vector(q)?, vector(k)?]),
                None => None,
            };
            let heads = DecodeHeads { qkv, norms, eps: self.eps, table: rotations };
            decode_heads(device, &heads, cache, lanes)?;
            let queries = qkv.columns(0, attended.cols);
            let scale = 1.0 / (self.head_dim as f32).sqrt();
            decode_attention(device, attention, queries, cache, lanes, max_context, scale)?;
            let attended = rows(attended, &self.output)?;
            decode_combine(device, attended, attention, lanes, (self.head_dim, max_context))?;
            self.output.apply(device, attended, onto, &scratch)?;
            let normed = norm(&self.post_attention_norm, &self.gate_up)?;
            let activated = rows(activated, &self.down)?;
            self.gate_up.apply(device, normed, ProductOutput::Swiglu(activated), &scratch)?;
            self.down.apply(device, activated, onto, &scratch)
        };
        Ok(steps()?)
    }
}
