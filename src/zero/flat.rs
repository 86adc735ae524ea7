//! The flat buffers of one block: values and gradients of its trained parameters, one behind the other.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use super::Error;
use crate::model::params::Trainable;

/// One parameter inside a flat buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values in the buffer.
    pub range: Range<usize>,
    /// Whether weight decay applies.
    pub has_decay: bool,
}

/// Values and gradients of a block's trained parameters.
#[derive(Clone, Debug)]
pub struct FlatBlock {
    entries: Vec<Entry>,
    /// f32 `[n]`
    values: Tensor,
    /// f32 `[n]`
    grads: Tensor,
}

impl FlatBlock {
    /// Lays the parameters out in their order on `device`.
    ///
    /// # Errors
    /// If the buffers cannot be allocated.
    pub fn new(trainable: Vec<Trainable>, device: &Device) -> Result<Self, Error> {
        let mut entries = Vec::with_capacity(trainable.len());
        let mut values = Vec::with_capacity(trainable.iter().map(|t| t.values.len()).sum());
        for Trainable { name, shape, values: own, has_decay } in trainable {
            let start = values.len();
            values.extend(own);
            entries.push(Entry { name, shape, range: start..values.len(), has_decay });
        }
        let count = values.len();
        let values = Tensor::from_vec(values, count, device)?;
        let grads = Tensor::zeros(count, DType::F32, device)?;
        Ok(Self { entries, values, grads })
    }

    /// The parameters in order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// All values: f32 `[n]`.
    pub fn values(&self) -> &Tensor {
        &self.values
    }

    /// All gradients: f32 `[n]`.
    pub fn grads(&self) -> &Tensor {
        &self.grads
    }

    /// Number of trained values.
    pub fn len(&self) -> usize {
        self.values.elem_count()
    }

    /// Whether nothing of the block is trained.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The parameter `name`, if it is one of them.
    pub fn entry(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.name == name)
    }

    /// The part of a buffer of `[n]` that is `entry`'s, in its shape, sharing the buffer's memory.
    ///
    /// # Errors
    /// If the entry is of another buffer.
    pub fn view(flat: &Tensor, entry: &Entry) -> Result<Tensor, Error> {
        Ok(flat.narrow(0, entry.range.start, entry.range.len())?.reshape(entry.shape.as_slice())?)
    }
}
