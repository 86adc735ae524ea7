//! The walk over the blocks: forward, head, backward, with recomputation and activations in host memory.
//!
//! Called by the training loops for gradients and log-probabilities. A walk announces its order to the store and borrows one
//! block's parameters after the other. With recomputation only the blocks' inputs and low-rank products are kept (the last
//! block keeps everything where that costs nothing) and each block runs forward again just before its backward, which on the
//! CPU changes no bit of the result. (On a GPU a product of fewer rows may be summed in another order.)

mod ends;
mod host;
mod interrupt;
mod kept;
mod moments;
mod order;
mod rates;
mod retention;
mod step;
mod values;

use std::sync::OnceLock;
use std::sync::atomic::AtomicBool;

use candle_core::{DType, Device};

use crate::model;
use crate::model::adapter::AdapterSettings;
use crate::model::batch::Batch;
use crate::model::config::ModelConfig;
use crate::model::layer::{DecoderLayer, LayerCosts, Pass, PassDropout};
use crate::model::params::BlockParams;
use crate::ops::rope::Rotation;
pub use crate::zero::Speaker;
use crate::zero::{self, ParamStore, ReadTypes};
pub use ends::neftune_noise;
use host::Host;
use interrupt::Interrupt;
pub use interrupt::IsInterrupted;
pub(crate) use moments::{Strips, of_head, of_layer};
pub use order::Order;
pub use rates::Rates;
pub(crate) use retention::Planned;
pub use retention::{BatchSize, ComputedAgain, Parked, Plan};
pub use step::StepLoss;

/// What went wrong in a pass.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A block failed.
    #[error("{block}: {source}")]
    Block {
        /// Which block.
        block: String,
        /// Why.
        source: model::Error,
    },
    /// An operation between blocks failed.
    #[error(transparent)]
    Op(#[from] crate::ops::Error),
    /// The parameter store failed.
    #[error(transparent)]
    Store(#[from] zero::Error),
    /// A backward pass asked for more than its forward pass kept.
    #[error("nothing was kept for this backward pass")]
    NothingKept,
    /// The run is to stop.
    #[error("given up between two blocks: the run was asked to stop")]
    Interrupted,
}

/// Dropout and noise of a training pass; they depend on these and on each token's sample and position only.
#[derive(Clone, Copy, Debug)]
pub struct DropoutKey {
    /// The run's seed.
    pub seed: u64,
    /// The optimizer step.
    pub step: u64,
}

/// Types of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Types {
    /// Of activations.
    pub compute: DType,
    /// Of the residual stream and its gradient.
    pub residual: DType,
}

impl Types {
    /// f32 everywhere, the only choice on the CPU.
    pub const F32: Self = Self { compute: DType::F32, residual: DType::F32 };
    /// bf16 everywhere; sums are f32.
    pub const BF16: Self = Self { compute: DType::BF16, residual: DType::BF16 };
    /// f16 activations, f32 residual stream: Qwen2.5's outgrows f16.
    pub const F16: Self = Self { compute: DType::F16, residual: DType::F32 };

    /// To which trained values are rounded before a pass computes with them.
    pub fn read(self) -> ReadTypes {
        ReadTypes::of(self.compute, self.residual)
    }
}

/// A model and its parameters, ready to walk.
#[derive(Debug)]
pub struct Engine {
    config: ModelConfig,
    adapter: Option<AdapterSettings>,
    store: ParamStore,
    types: Types,
    activations: Activations,
    /// The first so many layers follow `activations`, the others keep theirs.
    recomputed_layers: usize,
    /// What a layer costs.
    costs: LayerCosts,
    /// What the card reaches, if it was measured.
    rates: OnceLock<Rates>,
    /// Size of the noise on embeddings in training passes.
    neftune_noise_alpha: Option<f64>,
    /// What waits in host memory, if that is not to be planned.
    forced: Option<Parked>,
    /// The order of a step's micro-batches, if that is not to be chosen by what it takes.
    forced_order: Option<Order>,
    /// Whether the sums over a step's micro-batches do not depend on the number of ranks.
    has_fixed_sums: bool,
    /// Whether the run was told that little is offloaded.
    has_said_little: AtomicBool,
    /// Made by the first pass that needs it and kept: locking host memory takes longer than a step.
    host: OnceLock<Host>,
    /// As `host`, for passes that park nothing.
    nowhere: OnceLock<Host>,
    interrupt: Interrupt,
    frequencies: Vec<f32>,
    rotation_scale: f32,
}

/// What becomes of a block's activations between forward and backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activations {
    /// They stay where they are.
    Keep,
    /// The block's input and the adapters' low-rank products stay, the rest is computed again in backward.
    Recompute,
    /// As `Recompute`; on a GPU these, and what the plan takes of attention's results, its inputs, and gate and up, wait in
    /// page-locked host memory, so that they are not computed again. On the CPU the same as `Recompute`.
    Offload,
}

impl Engine {
    /// An engine over the store's blocks: the embedding, the layers, the head.
    pub fn new(
        config: ModelConfig,
        adapter: Option<AdapterSettings>,
        store: ParamStore,
        types: Types,
        activations: Activations,
    ) -> Self {
        let (frequencies, rotation_scale) = config.inv_freq();
        let costs = retention::costs_of(&config, &store, types);
        Self {
            config,
            adapter,
            store,
            types,
            activations,
            recomputed_layers: usize::MAX,
            costs,
            rates: OnceLock::new(),
            neftune_noise_alpha: None,
            forced: None,
            forced_order: None,
            has_fixed_sums: types.compute == DType::F32,
            has_said_little: AtomicBool::new(false),
            host: OnceLock::new(),
            nowhere: OnceLock::new(),
            interrupt: Interrupt::default(),
            frequencies,
            rotation_scale,
        }
    }

    /// Changes what becomes of activations.
    pub fn set_activations(&mut self, activations: Activations) {
        self.activations = activations;
        self.host = OnceLock::new();
    }

    /// Keeps the activations of all layers but the first `count`, whatever becomes of those.
    pub fn set_recomputed_layers(&mut self, count: usize) {
        self.recomputed_layers = count;
    }

    /// Parks so much of a layer in passes that offload, instead of what the plan says: to measure it.
    pub fn force_parked(&mut self, parked: Option<Parked>) {
        self.forced = parked;
    }

    /// Takes a step's micro-batches in this order, instead of the one that follows from what all ranks have; they are told the same.
    pub fn force_order(&mut self, order: Option<Order>) {
        self.forced_order = order;
    }

    /// Adds a step's micro-batches so that the sums do not depend on the number of ranks, whatever the types; f32 always does.
    pub fn fix_sums(&mut self) {
        self.has_fixed_sums = true;
    }

    /// Adds noise to the embeddings of training passes that have a key for it; `None`: none.
    pub fn set_neftune_noise_alpha(&mut self, alpha: Option<f64>) {
        self.neftune_noise_alpha = alpha;
    }

    /// Where activations wait; in host memory if a pass parks some.
    fn host(&self, is_parked: bool) -> Result<&Host, Error> {
        let host = if is_parked { &self.host } else { &self.nowhere };
        if let Some(host) = host.get() {
            return Ok(host);
        }
        let made = Host::new(self.device(), is_parked)?;
        Ok(host.get_or_init(|| made))
    }

    /// Where blocks compute.
    pub fn device(&self) -> &Device {
        self.store.device()
    }

    /// Types of a pass.
    pub fn types(&self) -> Types {
        self.types
    }

    /// The model's sizes.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The adapters, if the model has some.
    pub fn adapter(&self) -> Option<&AdapterSettings> {
        self.adapter.as_ref()
    }

    /// The parameters.
    pub fn store(&self) -> &ParamStore {
        &self.store
    }

    /// The parameters, to keep or move the reference.
    pub fn store_mut(&mut self) -> &mut ParamStore {
        &mut self.store
    }

    /// The rotations of these positions.
    ///
    /// # Errors
    /// If the device fails.
    pub fn rotation(&self, positions: &[u32]) -> Result<Rotation, Error> {
        Ok(Rotation::on(self.device(), positions, &self.frequencies, self.rotation_scale)?)
    }

    /// Binds decoder layer `index` to its lent parameters.
    ///
    /// # Errors
    /// If a parameter is missing.
    pub fn bind_layer<'l>(&self, params: &'l BlockParams, index: usize) -> Result<DecoderLayer<'l>, Error> {
        DecoderLayer::bind(params, index, &self.config, self.adapter.as_ref()).map_err(in_layer(index))
    }

    /// What a pass over a batch needs to know.
    fn pass<'a>(
        &self,
        batch: &'a Batch,
        rotation: &'a Rotation,
        use_adapter: bool,
        dropout: Option<PassDropout<'a>>,
    ) -> Pass<'a> {
        Pass { layout: &batch.layout, rotation, use_adapter, compute: self.types.compute, dropout }
    }
}

fn in_block(block: &'static str) -> impl FnOnce(model::Error) -> Error {
    move |source| Error::Block { block: block.into(), source }
}

fn in_layer(index: usize) -> impl FnOnce(model::Error) -> Error {
    move |source| Error::Block { block: format!("decoder layer {index}"), source }
}
