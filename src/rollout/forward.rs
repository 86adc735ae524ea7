//! The trainer's own blocks as a model that can continue cached sequences: no copy of the weights, no merge.

use candle_core::{DType, Device, Tensor};

use super::Error;
use super::decode_model::{DecodeModel, DrawSettings, Drawn, Lane, StepBatch};
use super::kv_cache::{CacheStep, KvCache, KvShape};
use super::recorded::{MOST_LANES, RecordedSteps, STEPS};
use super::settings::RolloutSettings;
use super::sizes::pass_bytes;
use crate::engine::{self, Engine, Speaker, Types};
use crate::model::layer::{DecoderLayer, Pass};
use crate::model::params::BlockParams;
use crate::model::{Embedding, Head};
use crate::ops::attention::Layout;
use crate::ops::rows;

/// An engine's model with its blocks bound for the length of a rollout, or, where they are not all there at a time, for the
/// length of each one's part of a step.
#[derive(Debug)]
pub struct EngineModel<'a> {
    engine: &'a Engine,
    bound: Option<Bound<'a>>,
    recorded: Option<RecordedSteps>,
    use_adapter: bool,
}

/// All blocks of a model.
#[derive(Debug)]
struct Bound<'a> {
    embedding: Embedding<'a>,
    layers: Vec<DecoderLayer<'a>>,
    head: Head<'a>,
}

impl<'a> EngineModel<'a> {
    /// Binds the engine's blocks; with `use_adapter` false the base model speaks.
    ///
    /// # Errors
    /// If a parameter is missing.
    pub fn new(engine: &'a Engine, use_adapter: bool) -> Result<Self, engine::Error> {
        let bind = |blocks: Vec<&'a BlockParams>| {
            let layers = engine.config().num_hidden_layers;
            let bound: Result<Vec<_>, _> =
                (0..layers).map(|index| engine.bind_layer(blocks[1 + index], index)).collect();
            Ok::<_, engine::Error>(Bound {
                embedding: engine.bind_embedding(blocks[0], use_adapter)?,
                layers: bound?,
                head: engine.bind_head(blocks[1 + layers], use_adapter)?,
            })
        };
        let bound = engine.store().hold()?.map(bind).transpose()?;
        Ok(Self { engine, bound, recorded: None, use_adapter })
    }

    /// The same, with decoding steps that are recorded and repeated, where the kernels for them read the model's weights.
    ///
    /// # Errors
    /// If the device has too little memory for the adapters in the type of the activations.
    pub fn recorded(self) -> Result<Self, Error> {
        let recorded = match &self.bound {
            Some(Bound { embedding, layers, head }) => {
                RecordedSteps::new(self.engine, embedding, layers, head, self.use_adapter)?
            }
            None => None,
        };
        if recorded.is_none() && self.engine.device().is_cuda() {
            static SAID: std::sync::Once = std::sync::Once::new();
            SAID.call_once(|| {
                tracing::warn!(
                    "tokens are generated step by step, which is several times slower than recorded steps: those read \
                     4-bit (NF4, FP4), GGUF or 16-bit weights that are all on the GPU, in rows of a multiple of 128 values, \
                     with 16-bit activations, a plain embedding and adapters without DoRA"
                );
            });
        }
        Ok(Self { recorded, ..self })
    }

    /// Lets recorded steps take no more memory than `bytes`: where that is too little, fewer sequences are drawn for at a time, or
    /// tokens are generated step by step.
    pub fn limit_recorded(&mut self, bytes: usize) {
        if let Some(recorded) = &mut self.recorded {
            recorded.limit(bytes);
        }
    }

    /// Whether decoding steps are recorded.
    pub fn is_recorded(&self) -> bool {
        self.recorded.is_some()
    }

    /// Bytes of weights that a step of the model reads.
    pub fn weight_bytes(&self) -> usize {
        self.bound.as_ref().map_or(0, |Bound { layers, head, .. }| {
            layers.iter().map(DecoderLayer::weight_bytes).sum::<usize>() + head.projection().weight.size_bytes()
        })
    }

    fn attend(
        &self,
        layer: &DecoderLayer<'_>,
        index: usize,
        hidden: &Tensor,
        (cache, cached): (&mut KvCache, &CacheStep<'_>),
        pass: &Pass<'_>,
    ) -> Result<Tensor, Error> {
        self.engine.check_interrupt()?;
        let (q, k, v, _) = layer.attention_inputs(hidden, pass)?;
        let attended = cache.attention(index, cached, [&q, &k, &v], layer.attended_room(pass))?;
        Ok(layer.after_attention(hidden, &attended, 0, pass)?.0)
    }
}

/// What one token of the engine's model leaves in the cache.
pub fn kv_shape(engine: &Engine) -> KvShape {
    KvShape::of(engine.config(), engine.types())
}

/// Bytes of the device that a rollout of so many sequences takes at least beside the weights.
pub fn room_bytes(engine: &Engine, sequences: usize, tokens: usize) -> usize {
    let pages = sequences.saturating_mul(super::pages::pages_for(tokens) + 2);
    let step = pass_bytes(engine.config(), engine.types(), sequences, RolloutSettings::LEAST_BATCH_TOKENS);
    step as usize + kv_shape(engine).page_bytes().saturating_mul(pages)
}

impl DecodeModel for EngineModel<'_> {
    fn vocab_size(&self) -> usize {
        self.engine.config().vocab_size
    }

    fn kv_shape(&self) -> KvShape {
        kv_shape(self.engine)
    }

    fn device(&self) -> &Device {
        self.engine.device()
    }

    fn step_bytes(&self, lanes: usize, longest: usize, tokens: usize) -> u64 {
        let recorded = self.recorded.as_ref().map_or(0, |recorded| recorded.bytes(lanes, longest));
        let visiting = if self.bound.is_some() { 0 } else { self.engine.store().visiting_bytes() };
        (recorded + visiting) as u64 + pass_bytes(self.engine.config(), self.engine.types(), lanes, tokens)
    }

    fn most_lanes(&self) -> usize {
        if self.recorded.is_some() { MOST_LANES } else { usize::MAX }
    }

    fn most_steps(&self) -> usize {
        if self.recorded.is_some() { STEPS } else { 0 }
    }

    fn prepare_draw(
        &mut self,
        lanes: &[Lane<'_>],
        steps: usize,
        settings: &DrawSettings,
        cache: &mut KvCache,
    ) -> Result<bool, Error> {
        let Some(recorded) = &mut self.recorded else { return Ok(false) };
        let is_ready = recorded.make_ready(lanes, steps, settings, cache)?;
        if !is_ready {
            self.recorded = None;
        }
        Ok(is_ready)
    }

    fn draw(
        &mut self,
        lanes: &[Lane<'_>],
        steps: usize,
        uniforms: &[f64],
        settings: &DrawSettings,
        _: &mut KvCache,
    ) -> Result<Drawn, Error> {
        self.engine.check_interrupt()?;
        let Some(recorded) = &mut self.recorded else { return Err(Error::NoSteps) };
        recorded.draw(lanes, steps, uniforms, settings)
    }

    fn max_positions(&self) -> usize {
        self.engine.config().max_position_embeddings
    }

    fn step(&mut self, batch: &StepBatch, cache: &mut KvCache) -> Result<Tensor, Error> {
        let (engine, use_adapter) = (self.engine, self.use_adapter);
        let rotation = engine.rotation(&batch.positions)?;
        let Types { compute, residual } = engine.types();
        // The halves of a layer around attention read no layout: attention runs over the cache.
        let layout = Layout::default();
        let pass = Pass { layout: &layout, rotation: &rotation, use_adapter, compute, dropout: None };
        let cached = cache.begin_step(batch)?;
        let logit_rows: Vec<u32> = batch.logit_rows.iter().map(|&row| row as u32).collect();
        let none = || Ok(Tensor::zeros((0, engine.config().vocab_size), DType::F32, &Device::Cpu)?);
        if let Some(Bound { embedding, layers, head }) = &self.bound {
            let mut hidden = embedding.forward(&batch.tokens, engine.device(), residual)?;
            for (index, layer) in layers.iter().enumerate() {
                hidden = self.attend(layer, index, &hidden, (cache, &cached), &pass)?;
            }
            let picked = if logit_rows.is_empty() { return none() } else { rows::gather(&hidden, &logit_rows)? };
            return Ok(head.logits(&picked, compute)?);
        }
        let mut walk = engine.walk_once(Speaker::Policy);
        let lease = walk.advance().map_err(engine::Error::from)?;
        let embedding = engine.bind_embedding(lease.params(), use_adapter)?;
        let mut hidden = embedding.forward(&batch.tokens, engine.device(), residual)?;
        drop(lease);
        for index in 0..engine.config().num_hidden_layers {
            let lease = walk.advance().map_err(engine::Error::from)?;
            let layer = engine.bind_layer(lease.params(), index)?;
            hidden = self.attend(&layer, index, &hidden, (cache, &cached), &pass)?;
        }
        let picked = if logit_rows.is_empty() { return none() } else { rows::gather(&hidden, &logit_rows)? };
        let lease = walk.advance().map_err(engine::Error::from)?;
        Ok(engine.bind_head(lease.params(), use_adapter)?.logits(&picked, compute)?)
    }
}
