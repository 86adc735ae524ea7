//! The trainer's own blocks as a model that can continue cached sequences: no copy of the weights, no merge.

use candle_core::{DType, Device, Tensor};

use super::Error;
use super::decode_model::{DecodeModel, StepBatch};
use super::kv_cache::{KvCache, KvShape};
use crate::engine::{self, Engine};
use crate::model::Head;
use crate::model::layer::{DecoderLayer, Pass};
use crate::ops::attention::Layout;
use crate::ops::rows;

/// An engine's model with its blocks bound for the length of a rollout.
#[derive(Debug)]
pub struct EngineModel<'a> {
    engine: &'a Engine,
    layers: Vec<DecoderLayer>,
    head: Head,
    use_adapter: bool,
}

impl<'a> EngineModel<'a> {
    /// Binds the engine's blocks; with `use_adapter` false the base model speaks.
    ///
    /// # Errors
    /// If a parameter is missing.
    pub fn new(engine: &'a Engine, use_adapter: bool) -> Result<Self, engine::Error> {
        let layers =
            (0..engine.config().num_hidden_layers).map(|index| engine.layer(index)).collect::<Result<_, _>>()?;
        Ok(Self { engine, layers, head: engine.head(use_adapter)?, use_adapter })
    }
}

/// What one token of the engine's model leaves in the cache.
pub fn kv_shape(engine: &Engine) -> KvShape {
    let config = engine.config();
    KvShape {
        layers: config.num_hidden_layers,
        kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        dtype: engine.types().compute,
    }
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

    fn max_positions(&self) -> usize {
        self.engine.config().max_position_embeddings
    }

    fn step(&mut self, batch: &StepBatch, cache: &mut KvCache) -> Result<Tensor, Error> {
        let rotation = self.engine.rotation(&batch.positions)?;
        let compute = self.engine.types().compute;
        // The halves of a layer around attention read no layout: attention runs over the cache.
        let layout = Layout::default();
        let pass = Pass { layout: &layout, rotation: &rotation, use_adapter: self.use_adapter, compute, dropout: None };
        let cached = cache.begin_step(batch)?;
        let mut hidden = self.engine.embed(&batch.tokens, self.use_adapter)?;
        for (index, layer) in self.layers.iter().enumerate() {
            self.engine.check_interrupt()?;
            let (q, k, v, _) = layer.attention_inputs(&hidden, &pass)?;
            let attended = cache.attention(index, &cached, [&q, &k, &v], layer.attended_room(&pass))?;
            hidden = layer.after_attention(&hidden, &attended, 0, &pass)?.0;
        }
        if batch.logit_rows.is_empty() {
            return Ok(Tensor::zeros((0, self.vocab_size()), DType::F32, &Device::Cpu)?);
        }
        let logit_rows: Vec<u32> = batch.logit_rows.iter().map(|&row| row as u32).collect();
        Ok(self.head.logits(&rows::gather(&hidden, &logit_rows)?, compute)?)
    }
}
