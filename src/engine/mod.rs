//! The walk over the blocks: forward, head, backward, with recomputation and activations in host memory.
//!
//! Called by the training loops for gradients and log-probabilities. Parameters come from the store block by block; a
//! block's gradients are final when its backward returns. With recomputation only the blocks' inputs and low-rank products
//! are kept (the last block keeps everything where that costs nothing) and each block runs forward again just before its
//! backward, which on the CPU changes no bit of the result. (On a GPU a product of fewer rows may be summed in another order.)

mod ends;
mod host;
mod interrupt;
mod retention;

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use candle_core::{DType, Device, Tensor};

use crate::model::adapter::AdapterSettings;
use crate::model::batch::Batch;
use crate::model::config::ModelConfig;
use crate::model::layer::{self, DecoderLayer, Pass, PassDropout, Retained, Retaining};
use crate::model::params::BlockParams;
use crate::model::{self, Head, HeadGradient, Question};
use crate::ops::linear::TokenKeys;
use crate::ops::rope::Rotation;
use crate::ops::{buffer, head, rows};
use crate::zero::{self, ParamStore};
pub use ends::neftune_noise;
use host::{Held, Host};
use interrupt::Interrupt;
pub use interrupt::IsInterrupted;
use retention::LAST_LAYER_KEPT_TOKENS;
pub use retention::{ComputedAgain, Parked};

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
    /// The run is to stop.
    #[error("given up between two blocks: the run was asked to stop")]
    Interrupted,
}

/// Who speaks: the policy that is trained, or the reference it is held against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speaker {
    /// The model as trained so far.
    Policy,
    /// The frozen base (adapters off), or the kept copy if the store has one.
    Reference,
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
    /// Size of the noise on embeddings in training passes.
    neftune_noise_alpha: Option<f64>,
    /// What waits in host memory, if that is not to be estimated.
    forced: Option<Parked>,
    /// Whether the run was told that little is offloaded.
    has_said_little: AtomicBool,
    /// Made by the first pass that needs it and kept: locking host memory takes longer than a step.
    host: OnceLock<Host>,
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
    /// As `Recompute`; on a GPU these, attention's results, and in batches of up to some thousand tokens its inputs and a part
    /// of gate and up, wait in page-locked host memory, so that they are not computed again. On the CPU the same as
    /// `Recompute`.
    Offload,
}

/// What may come back from host memory while the MLP before it still needs its own: with few tokens a layer is done before a
/// copy that starts later.
const MOST_BESIDE_MLP_BYTES: usize = 256 << 20;

/// What a layer leaves for backward.
enum Kept {
    Everything(Box<layer::Saved>),
    Retained(Box<KeptRetained>),
}

/// What was retained of a layer, in the order in which backward needs it.
struct KeptRetained {
    /// Gate and up of the first rows. Large, they come back once the layer after has given back its own.
    mlp_outputs: Option<Held>,
    most: Retained<Held>,
    /// The products before attention, which come back in the middle of the layer's own MLP.
    products: Option<Held>,
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
        Self {
            config,
            adapter,
            store,
            types,
            activations,
            recomputed_layers: usize::MAX,
            neftune_noise_alpha: None,
            forced: None,
            has_said_little: AtomicBool::new(false),
            host: OnceLock::new(),
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

    /// Parks so much of a layer in passes that offload, instead of what is estimated to take the least time: to measure it.
    pub fn force_parked(&mut self, parked: Option<Parked>) {
        self.forced = parked;
    }

    /// Adds noise to the embeddings of training passes that have a key for it; `None`: none.
    pub fn set_neftune_noise_alpha(&mut self, alpha: Option<f64>) {
        self.neftune_noise_alpha = alpha;
    }

    fn host(&self) -> Result<&Host, Error> {
        if let Some(host) = self.host.get() {
            return Ok(host);
        }
        let host = Host::new(self.device(), self.activations)?;
        Ok(self.host.get_or_init(|| host))
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

    /// Decoder layer `index`.
    ///
    /// # Errors
    /// If a parameter is missing.
    pub fn layer(&self, index: usize) -> Result<DecoderLayer, Error> {
        let params: Arc<BlockParams> = self.store.fetch(1 + index);
        DecoderLayer::bind(&params, index, &self.config, self.adapter.as_ref()).map_err(in_layer(index))
    }

    /// Log-probabilities and entropies of the batch's targets, without gradients. Logits are divided by `temperature`.
    ///
    /// # Errors
    /// If a block fails.
    pub fn logprobs(&self, batch: &Batch, speaker: Speaker, temperature: f64) -> Result<head::Output, Error> {
        self.speak(speaker, |use_adapter| {
            let rotation = self.rotation(&batch.positions)?;
            let pass = Pass {
                layout: &batch.layout,
                rotation: &rotation,
                use_adapter,
                compute: self.types.compute,
                dropout: None,
            };
            let hidden = self.walk_only(batch, &pass)?;
            let picked = rows::gather(&hidden, &batch.head_rows)?;
            let question = self.question(batch, temperature, None);
            let (output, _) = self.head(use_adapter)?.forward(&picked, &question).map_err(in_block("head"))?;
            Ok(output)
        })
    }

    /// The logits after every token of the batch: f32 `[N, V]`. For tests and short prompts only: it holds them all.
    ///
    /// # Errors
    /// If a block fails.
    pub fn logits(&self, batch: &Batch, speaker: Speaker) -> Result<Tensor, Error> {
        self.speak(speaker, |use_adapter| {
            let rotation = self.rotation(&batch.positions)?;
            let pass = Pass {
                layout: &batch.layout,
                rotation: &rotation,
                use_adapter,
                compute: self.types.compute,
                dropout: None,
            };
            let hidden = self.walk_only(batch, &pass)?;
            self.head(use_adapter)?.logits(&hidden, self.types.compute).map_err(in_block("head"))
        })
    }

    /// Runs `work` with the speaker's parameters in place; tells it whether adapters take part.
    ///
    /// # Errors
    /// If `work` fails or the store does.
    pub fn speak<T>(&self, speaker: Speaker, work: impl FnOnce(bool) -> Result<T, Error>) -> Result<T, Error> {
        match speaker {
            Speaker::Policy => work(true),
            Speaker::Reference if self.store.has_reference() => {
                self.store.swap_reference()?;
                let result = work(true);
                self.store.swap_reference()?;
                result
            }
            Speaker::Reference => work(false),
        }
    }

    /// Runs the batch forward, asks `loss` how the loss depends on each target, and adds the gradients of every trained
    /// parameter to the store. Returns what `loss` returned.
    ///
    /// # Errors
    /// If a block or `loss` fails.
    pub fn forward_backward<T, E: From<Error>>(
        &self,
        batch: &Batch,
        temperature: f64,
        dropout: Option<DropoutKey>,
        loss: impl FnOnce(&head::Output) -> Result<(HeadGradient, T), E>,
    ) -> Result<T, E> {
        self.pass(batch, temperature, dropout, |head, picked, question| {
            let (output, saved) = head.forward(picked, question).map_err(in_block("head"))?;
            let (gradient, result) = loss(&output)?;
            let d_picked = head.backward(&gradient, question, &output, &saved).map_err(in_block("head"))?;
            Ok((d_picked, result))
        })
    }

    /// As [`Self::forward_backward`] where `gradient`, how the loss depends on each target, is known before the forward pass:
    /// the head's logits are then made once instead of twice. `look` sees the head's output.
    ///
    /// # Errors
    /// If a block or `look` fails.
    pub fn forward_backward_known<T, E: From<Error>>(
        &self,
        batch: &Batch,
        temperature: f64,
        dropout: Option<DropoutKey>,
        gradient: &HeadGradient,
        look: impl FnOnce(&head::Output) -> Result<T, E>,
    ) -> Result<T, E> {
        self.pass(batch, temperature, dropout, |head, picked, question| {
            let (output, d_picked) = head.forward_backward(picked, question, gradient).map_err(in_block("head"))?;
            Ok((d_picked, look(&output)?))
        })
    }

    /// Forward through the layers, `at_head` with the rows that predict, backward from the gradient it returns.
    fn pass<T, E: From<Error>>(
        &self,
        batch: &Batch,
        temperature: f64,
        key: Option<DropoutKey>,
        at_head: impl FnOnce(&Head, &Tensor, &Question<'_>) -> Result<(Tensor, T), E>,
    ) -> Result<T, E> {
        let rotation = self.rotation(&batch.positions)?;
        let probability = self.adapter.as_ref().map_or(0.0, |a| a.dropout);
        let token_keys = TokenKeys::from(batch.token_keys.as_slice());
        let dropout = key.filter(|_| probability > 0.0).map(|DropoutKey { seed, step }| PassDropout {
            probability,
            key: crate::rng::Stream::new(seed, "dropout", step, 0).bits(),
            token_keys: &token_keys,
        });
        let pass = Pass {
            layout: &batch.layout,
            rotation: &rotation,
            use_adapter: true,
            compute: self.types.compute,
            dropout,
        };
        let host = self.host()?;
        let with = self.park(batch).map_or(Retaining::Input, |parked| parked.retaining(batch.tokens.len()));
        let mut kept = Vec::with_capacity(self.config.num_hidden_layers);
        let start = self.with_noise(self.embed(&batch.tokens, true)?, batch, key)?;
        let hidden = self.walk(start, |layer, index, hidden| {
            let (output, left) = self.forward_keeping(layer, index, hidden, with, &pass, host)?;
            kept.push(left);
            Ok(output)
        })?;
        // The head needs the memory of what is still on its way out, and it is out by now.
        host.settle()?;
        let head_block = self.head(true)?;
        let head_dropout = dropout.and_then(|d| self.head_dropout(&head_block, batch, probability, d.key));
        let question = self.question(batch, temperature, head_dropout.as_ref());
        let picked = rows::gather(&hidden, &batch.head_rows).map_err(Error::from)?;
        let (d_picked, result) = at_head(&head_block, &picked, &question)?;
        drop((picked, hidden));
        let mut gradient = rows::scatter_add(&d_picked, &batch.head_rows, batch.tokens.len()).map_err(Error::from)?;
        let mut next = kept.pop().map(|kept| kept.bring_back(host)).transpose()?;
        for index in (0..self.config.num_hidden_layers).rev() {
            let Some(current) = next.take() else { break };
            self.interrupt.check()?;
            let layer = self.layer(index)?;
            gradient = match current {
                Kept::Everything(saved) => {
                    next = kept.pop().map(|kept| kept.bring_back(host)?.bring_back_mlp(host)).transpose()?;
                    layer.backward(&gradient, *saved, &pass).map_err(in_layer(index))?
                }
                Kept::Retained(retained) => {
                    let KeptRetained { mlp_outputs, most, products } = *retained;
                    let most = most.map(|held| host.take(held))?;
                    let mlp_outputs = mlp_outputs.map(|held| host.take(held)).transpose()?;
                    // The layer before comes back while this one computes: from the start, or, where that is much memory,
                    // once the MLP has given back its own.
                    let is_large = most.size_bytes() > MOST_BESIDE_MLP_BYTES;
                    if !is_large {
                        next = kept.pop().map(|kept| kept.bring_back(host)).transpose()?;
                    }
                    let inside = layer.backward_down(&gradient, most, mlp_outputs, &pass).map_err(in_layer(index))?;
                    let products = products.map(|held| host.bring_back(held)).transpose()?;
                    let halfway = layer.backward_mlp(&gradient, inside, &pass).map_err(in_layer(index))?;
                    let products = products.map(|held| host.take(held)).transpose()?;
                    if is_large {
                        next = kept.pop().map(|kept| kept.bring_back(host)).transpose()?;
                    }
                    next = next.map(|kept| kept.bring_back_mlp(host)).transpose()?;
                    layer.backward_attention(halfway, products, &pass).map_err(in_layer(index))?
                }
            };
        }
        let embedding = self.embedding(true)?;
        if embedding.is_trained() {
            embedding.backward(&gradient, &batch.tokens).map_err(in_block("embedding"))?;
        }
        Ok(result)
    }

    /// The output of layer `index`, and what it leaves for backward: `with` if it is computed again.
    fn forward_keeping(
        &self,
        layer: &DecoderLayer,
        index: usize,
        hidden: &Tensor,
        with: Retaining,
        pass: &Pass<'_>,
        host: &Host,
    ) -> Result<(Tensor, Kept), Error> {
        let tokens = hidden.dims()[0];
        let is_last = index + 1 == self.config.num_hidden_layers;
        let is_whole = self.activations == Activations::Keep
            || index >= self.recomputed_layers
            || (is_last && LAST_LAYER_KEPT_TOKENS.contains(&tokens));
        if is_whole {
            let (output, saved) = layer.forward(hidden, pass).map_err(in_layer(index))?;
            return Ok((output, Kept::Everything(Box::new(saved))));
        }
        let (output, mut retained) = layer.forward_retaining(hidden, with, pass).map_err(in_layer(index))?;
        // The last layer is needed again at once.
        let place = |tensor| if is_last { Ok(Held::Here(tensor)) } else { host.park(tensor) };
        let (products, mlp_outputs) = (retained.take_products(), retained.take_mlp_outputs());
        let kept = KeptRetained {
            mlp_outputs: mlp_outputs.map(place).transpose()?,
            most: retained.map(place)?,
            products: products.map(place).transpose()?,
        };
        host.end_layer()?;
        Ok((output, Kept::Retained(Box::new(kept))))
    }

    /// The hidden states after the last layer, from the embeddings; `forward` runs a layer and keeps what it wants of it.
    fn walk(
        &self,
        mut hidden: Tensor,
        mut forward: impl FnMut(&DecoderLayer, usize, &Tensor) -> Result<Tensor, Error>,
    ) -> Result<Tensor, Error> {
        for index in 0..self.config.num_hidden_layers {
            self.interrupt.check()?;
            hidden = forward(&self.layer(index)?, index, &hidden)?;
        }
        self.interrupt.check()?;
        Ok(hidden)
    }

    /// [`Self::walk`] that keeps nothing.
    fn walk_only(&self, batch: &Batch, pass: &Pass<'_>) -> Result<Tensor, Error> {
        self.walk(self.embed(&batch.tokens, pass.use_adapter)?, |layer, index, hidden| {
            let (output, _) = layer.forward_retaining(hidden, Retaining::Input, pass).map_err(in_layer(index))?;
            Ok(output)
        })
    }

    /// Where this batch's values first stop being finite, if they do: the block and the tensor in it.
    ///
    /// # Errors
    /// If a block fails.
    pub fn first_non_finite(&self, batch: &Batch) -> Result<Option<String>, Error> {
        let rotation = self.rotation(&batch.positions)?;
        let compute = self.types.compute;
        let pass = Pass { layout: &batch.layout, rotation: &rotation, use_adapter: true, compute, dropout: None };
        let mut hidden = self.embed(&batch.tokens, true)?;
        if !buffer::is_finite(&hidden)? {
            return Ok(Some("the token embedding".into()));
        }
        for index in 0..self.config.num_hidden_layers {
            let (output, saved) = self.layer(index)?.forward(&hidden, &pass).map_err(in_layer(index))?;
            for (name, tensor) in saved.tensors() {
                if !buffer::is_finite(&tensor)? {
                    return Ok(Some(format!("decoder layer {index}, {name}")));
                }
            }
            if !buffer::is_finite(&output)? {
                return Ok(Some(format!("decoder layer {index}, mlp.down_proj")));
            }
            hidden = output;
        }
        let picked = rows::gather(&hidden, &batch.head_rows)?;
        let question = self.question(batch, 1.0, None);
        let (output, _) = self.head(true)?.forward(&picked, &question).map_err(in_block("head"))?;
        Ok(output.logprobs.iter().any(|p| !p.is_finite()).then(|| "the head's log-probabilities".into()))
    }
}

impl Kept {
    /// Starts the way back of most that was retained.
    fn bring_back(self, host: &Host) -> Result<Self, Error> {
        self.change(|KeptRetained { mlp_outputs, most, products }| {
            Ok(KeptRetained { mlp_outputs, most: most.map(|held| host.bring_back(held))?, products })
        })
    }

    /// Starts the way back of gate and up.
    fn bring_back_mlp(self, host: &Host) -> Result<Self, Error> {
        self.change(|KeptRetained { mlp_outputs, most, products }| {
            let mlp_outputs = mlp_outputs.map(|held| host.bring_back(held)).transpose()?;
            Ok(KeptRetained { mlp_outputs, most, products })
        })
    }

    fn change(self, change: impl FnOnce(KeptRetained) -> Result<KeptRetained, Error>) -> Result<Self, Error> {
        match self {
            Self::Retained(retained) => Ok(Self::Retained(Box::new(change(*retained)?))),
            everything @ Self::Everything(_) => Ok(everything),
        }
    }
}

fn in_block(block: &'static str) -> impl FnOnce(model::Error) -> Error {
    move |source| Error::Block { block: block.into(), source }
}

fn in_layer(index: usize) -> impl FnOnce(model::Error) -> Error {
    move |source| Error::Block { block: format!("decoder layer {index}"), source }
}
