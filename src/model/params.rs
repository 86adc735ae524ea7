//! The parameters of one block, by Hugging Face's weight names.
//!
//! A block asks for its parameters and does not know where they live: `zero` hands them out, `model` binds them to
//! layers by name. Both sides share this type and nothing else.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::Tensor;

use super::Error;
use crate::ops::Param;
use crate::quant::Weight;

/// A parameter before it has a place to live.
#[derive(Clone, Debug)]
pub struct Trainable {
    /// Its name, e.g. `model.layers.0.self_attn.q_proj.lora_A.weight`.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values, row-major.
    pub values: Vec<f32>,
    /// Whether weight decay applies: not to biases and norms.
    pub has_decay: bool,
}

/// A block as it is loaded: frozen weights as they are, trained ones as f32 values.
#[derive(Clone, Debug, Default)]
pub struct BlockInit {
    /// Frozen weights by name.
    pub frozen: BTreeMap<String, Weight>,
    /// Names of frozen weights that stay in host memory where blocks compute on a GPU: tables of which a step reads few
    /// rows.
    pub stays_on_host: BTreeSet<String>,
    /// Trained parameters in the order of the flat buffers.
    pub trainable: Vec<Trainable>,
    /// Parameters of blocks before that this one reads too, under a name of its own.
    pub shared: Vec<SharedParam>,
}

/// A parameter of another block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedParam {
    /// Its name in the block that reads it.
    pub name: String,
    /// The block that has it.
    pub of_block: usize,
    /// Its name there.
    pub of_name: String,
}

/// One parameter as a block sees it.
#[derive(Clone, Debug)]
pub struct Slot {
    /// The values: a matrix, or a vector as a dense tensor.
    pub weight: Weight,
    /// Where its gradient goes, if it is trained.
    pub grad: Option<Tensor>,
}

/// The parameters of one block, ready to compute with.
#[derive(Clone, Debug, Default)]
pub struct BlockParams {
    slots: BTreeMap<String, Slot>,
}

impl BlockParams {
    /// Collects slots by name.
    pub fn new(slots: BTreeMap<String, Slot>) -> Self {
        Self { slots }
    }

    /// The parameter `name`, if the block has it.
    pub fn get(&self, name: &str) -> Option<&Slot> {
        self.slots.get(name)
    }

    /// The parameter `name`.
    ///
    /// # Errors
    /// If the block has none of that name.
    pub fn slot(&self, name: &str) -> Result<&Slot, Error> {
        self.slots.get(name).ok_or_else(|| Error::MissingParameter { name: name.into() })
    }

    /// The dense parameter `name`.
    ///
    /// # Errors
    /// If there is none, or it is not dense.
    pub fn dense(&self, name: &str) -> Result<Param, Error> {
        let slot = self.slot(name)?;
        match &slot.weight {
            Weight::Dense(value) => Ok(Param { value: value.clone(), grad: slot.grad.clone() }),
            _ => Err(Error::NotDense { name: name.into() }),
        }
    }

    /// Takes the slots out.
    pub fn into_slots(self) -> BTreeMap<String, Slot> {
        self.slots
    }

    /// All names and slots, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Slot)> {
        self.slots.iter().map(|(name, slot)| (name.as_str(), slot))
    }
}
