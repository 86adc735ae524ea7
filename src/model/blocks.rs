//! A model's blocks as they are loaded: one after the other, so that no place ever holds them all twice.

use std::collections::VecDeque;

use candle_core::{DType, Device, Tensor};

use super::Error;
use super::config::{ModelConfig, TensorRole, TensorShape};
use super::ends::{EMBEDDING, LM_HEAD};
use super::load::Purpose;
use super::noise::{RandomStorage, noise};
use super::params::{BlockInit, SharedParam, Trainable};
use super::peft::{AdapterSpec, ModuleAdapter, factor_names};
use super::source::{LinearStorage, WeightSource};
use crate::ops::buffer;
use crate::quant::Weight;
use crate::rng;

/// Where a model's values come from.
#[derive(Debug)]
pub(super) enum Values {
    /// Files, or draws in their place.
    Files { source: Box<WeightSource>, storage: LinearStorage },
    /// Random packed weights, and small random values for the rest: for measuring.
    Noise { seed: u64, storage: RandomStorage },
}

/// The blocks of a model in the order of the walk: the embedding, the layers, the head. Each is read when it is asked for.
#[derive(Debug)]
pub struct Blocks {
    values: Values,
    num_layers: usize,
    is_tied: bool,
    deviation: f32,
    /// Tensors of each block that is to come, with their place among all.
    rest: VecDeque<Vec<(usize, TensorShape)>>,
    next: usize,
    spec: Option<AdapterSpec>,
    purpose: Purpose,
    is_embedding_on_host: bool,
    /// The embedding's table, for the head of a tied model that does not share it.
    table: Option<Weight>,
}

impl Blocks {
    pub(super) fn new(config: &ModelConfig, values: Values, spec: Option<AdapterSpec>, purpose: Purpose) -> Self {
        let num_layers = config.num_hidden_layers;
        let mut rest: VecDeque<Vec<(usize, TensorShape)>> = vec![Vec::new(); num_layers + 2].into();
        for (index, shape) in config.tensors().into_iter().enumerate() {
            rest[block_of(&shape.name, num_layers)].push((index, shape));
        }
        Self {
            values,
            num_layers,
            is_tied: config.tie_word_embeddings,
            deviation: config.initializer_range as f32,
            rest,
            next: 0,
            spec,
            purpose,
            is_embedding_on_host: false,
            table: None,
        }
    }

    /// Marks the token embedding to stay in host memory where blocks compute on a GPU, since a step reads a few of its rows;
    /// a tied head then has the table to itself. Nothing changes where the table is trained.
    pub fn keep_embedding_on_host(&mut self) {
        self.is_embedding_on_host = true;
    }

    fn is_replaced(&self, name: &str) -> bool {
        self.spec.as_ref().is_some_and(|spec| spec.replaces(name))
    }

    /// Whether the head of a tied model keeps the stored table because only the embedding is replaced.
    fn head_keeps_table(&self) -> bool {
        self.is_tied && self.is_replaced(EMBEDDING) && !self.is_replaced(LM_HEAD)
    }

    fn block(&mut self, index: usize, shapes: Vec<(usize, TensorShape)>) -> Result<BlockInit, Error> {
        let mut block = BlockInit::default();
        let trains_everything = self.purpose == Purpose::Training && self.spec.is_none();
        for (place, shape) in shapes {
            if trains_everything {
                block.trainable.push(Trainable {
                    values: self.values.floats(&shape.name)?,
                    has_decay: has_decay(&shape.name),
                    name: shape.name,
                    shape: shape.shape,
                });
                continue;
            }
            let is_kept_for_head = shape.name == EMBEDDING && self.head_keeps_table();
            if is_kept_for_head {
                self.table = Some(self.values.weight(&shape, place, self.deviation)?);
            } else if !self.is_replaced(&shape.name) {
                let weight = self.values.weight(&shape, place, self.deviation)?;
                block.frozen.insert(shape.name, weight);
            }
        }
        self.attach(index, &mut block)?;
        if index == 0
            && self.is_embedding_on_host
            && let Some(table) = block.frozen.get(EMBEDDING)
        {
            block.stays_on_host.insert(EMBEDDING.into());
            self.table = Some(table.clone());
        }
        if index == self.num_layers + 1 && self.is_tied {
            self.tie(&mut block);
        }
        Ok(block)
    }

    /// Gives the head of a tied model a table, unless it has one of its own: one that was kept for it, or the embedding's.
    fn tie(&mut self, head: &mut BlockInit) {
        if head.frozen.contains_key(LM_HEAD) || head.trainable.iter().any(|t| t.name == LM_HEAD) {
            return;
        }
        match self.table.take() {
            Some(table) => {
                head.frozen.insert(LM_HEAD.into(), table);
            }
            None => head.shared.push(SharedParam { name: LM_HEAD.into(), of_block: 0, of_name: EMBEDDING.into() }),
        }
    }

    /// Puts the adapter's tensors of a block, and weights that it replaces whole, into it.
    fn attach(&mut self, index: usize, block: &mut BlockInit) -> Result<(), Error> {
        let (num_layers, purpose) = (self.num_layers, self.purpose);
        let Some(spec) = &mut self.spec else { return Ok(()) };
        let is_own = |name: &str| block_of(name, num_layers) == index;
        for (module, adapter) in spec.modules.extract_if(.., |module, _| is_own(module)) {
            let ModuleAdapter { r, in_features, out_features, a, b, magnitude, .. } = adapter;
            let [name_a, name_b] = factor_names(&module);
            put(block, name_a, vec![r, in_features], a, purpose)?;
            put(block, name_b, vec![out_features, r], b, purpose)?;
            if let Some(magnitude) = magnitude {
                put(block, format!("{module}.lora_magnitude_vector"), vec![out_features], magnitude, purpose)?;
            }
        }
        for (name, tensor) in spec.full_replacements.iter().filter(|(name, _)| is_own(name)) {
            let values = buffer::to_vec(&tensor.to_dtype(DType::F32)?)?;
            put(block, name.clone(), tensor.dims().to_vec(), values, purpose)?;
        }
        for (name, tensor) in spec.base_replacements.iter().filter(|(name, _)| is_own(name)) {
            let weight = Weight::dense(tensor).map_err(crate::ops::Error::from)?;
            block.frozen.insert(name.clone(), weight);
        }
        Ok(())
    }
}

impl Iterator for Blocks {
    type Item = Result<BlockInit, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let shapes = self.rest.pop_front()?;
        let index = self.next;
        self.next += 1;
        Some(self.block(index, shapes))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.rest.len(), Some(self.rest.len()))
    }
}

impl Values {
    fn floats(&self, name: &str) -> Result<Vec<f32>, Error> {
        match self {
            Self::Files { source, .. } => Ok(buffer::to_vec(&source.tensor_f32(name)?)?),
            Self::Noise { .. } => Err(Error::MissingParameter { name: name.into() }),
        }
    }

    /// A frozen weight; `place` is that of its tensor among all of the model.
    fn weight(&self, shape: &TensorShape, place: usize, deviation: f32) -> Result<Weight, Error> {
        match self {
            Self::Files { source, storage } => match (shape.role, shape.shape.as_slice()) {
                (TensorRole::Linear, &[rows, cols]) => source.linear(&shape.name, (rows, cols), *storage),
                (_, &[rows, cols]) => source.embedding(&shape.name, (rows, cols), storage.dtype),
                _ => Ok(Weight::Dense(source.vector(&shape.name)?)),
            },
            Self::Noise { seed, storage } => noise(shape, rng::mix(seed ^ rng::mix(place as u64)), deviation, *storage),
        }
    }
}

/// The block a weight, or its adapter, belongs to: 0 the embedding, then the layers, last the head.
fn block_of(name: &str, num_layers: usize) -> usize {
    if name.starts_with("model.embed_tokens") {
        return 0;
    }
    let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
    layer.map_or(num_layers + 1, |layer| layer + 1)
}

/// Whether weight decay applies: not to biases and norms, as transformers' `get_decay_parameter_names` has it.
fn has_decay(name: &str) -> bool {
    !name.contains("norm") && name.rsplit('.').next() != Some("bias")
}

/// Adds a tensor of the adapter to its block, in the place of a frozen one of that name.
fn put(
    block: &mut BlockInit,
    name: String,
    shape: Vec<usize>,
    values: Vec<f32>,
    purpose: Purpose,
) -> Result<(), Error> {
    block.frozen.remove(&name);
    match purpose {
        Purpose::Training => {
            let has_decay = has_decay(&name);
            block.trainable.push(Trainable { name, shape, values, has_decay });
        }
        Purpose::Inference => {
            let tensor = Tensor::from_vec(values, shape, &Device::Cpu)?;
            block.frozen.insert(name, Weight::Dense(tensor));
        }
    }
    Ok(())
}
