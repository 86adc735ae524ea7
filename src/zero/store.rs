//! The parameter store: hands out the parameters of a block and keeps the flat buffers behind them.
//!
//! This is the resident policy: everything lies on the device of this rank. Blocks hold the parameters they fetched only
//! while they compute, so a policy that shards or offloads them changes this file alone.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::{Error, FlatBlock};
use crate::model::params::{BlockInit, BlockParams, Slot};
use crate::ops::buffer;
use crate::quant::Weight;

/// Parameters of all blocks, resident on this rank's device.
#[derive(Debug)]
pub struct ParamStore {
    device: Device,
    blocks: Vec<Block>,
    /// A second set of trained values that can be exchanged for the current ones: the reference policy.
    reference: Option<Vec<Tensor>>,
}

#[derive(Debug)]
struct Block {
    flat: FlatBlock,
    params: Arc<BlockParams>,
}

impl ParamStore {
    /// Takes the loaded blocks in the order of the walk to `device`; one block at a time is in both memories.
    ///
    /// # Errors
    /// If a name stands twice in a block or memory runs out.
    pub fn new(blocks: impl IntoIterator<Item = BlockInit>, device: &Device) -> Result<Self, Error> {
        let blocks = blocks.into_iter().map(|init| Block::new(init, device)).collect::<Result<_, _>>()?;
        Ok(Self { device: device.clone(), blocks, reference: None })
    }

    /// Where the parameters lie and blocks compute.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Number of blocks.
    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// The parameters of a block, ready to compute with for as long as they are held.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn fetch(&self, block: usize) -> Arc<BlockParams> {
        Arc::clone(&self.blocks[block].params)
    }

    /// The flat buffers of every block.
    pub fn flats(&self) -> impl Iterator<Item = &FlatBlock> {
        self.blocks.iter().map(|block| &block.flat)
    }

    /// Number of trained values over all blocks.
    pub fn num_trainable(&self) -> usize {
        self.flats().map(FlatBlock::len).sum()
    }

    /// Bytes of frozen weights over all blocks.
    pub fn frozen_bytes(&self) -> usize {
        let frozen = |block: &Block| -> usize {
            block.params.iter().filter(|(_, slot)| slot.grad.is_none()).map(|(_, slot)| slot.weight.size_bytes()).sum()
        };
        self.blocks.iter().map(frozen).sum()
    }

    /// Sets all gradients to zero.
    ///
    /// # Errors
    /// If the device fails.
    pub fn zero_gradients(&self) -> Result<(), Error> {
        self.flats().filter(|f| !f.is_empty()).try_for_each(|flat| Ok(buffer::fill(flat.grads(), 0.0)?))
    }

    /// Keeps a copy of the trained values as the reference policy.
    ///
    /// # Errors
    /// If memory runs out.
    pub fn keep_reference(&mut self) -> Result<(), Error> {
        self.reference = Some(self.flats().map(|flat| flat.values().copy()).collect::<Result<_, _>>()?);
        Ok(())
    }

    /// Whether a reference was kept.
    pub fn has_reference(&self) -> bool {
        self.reference.is_some()
    }

    /// The reference's flat values by block, if one was kept.
    pub fn reference(&self) -> Option<&[Tensor]> {
        self.reference.as_deref()
    }

    /// Exchanges the trained values and the reference's. Calling it twice restores both.
    ///
    /// # Errors
    /// If the device fails.
    pub fn swap_reference(&self) -> Result<(), Error> {
        for (flat, reference) in self.flats().zip(self.reference.iter().flatten()) {
            if !flat.is_empty() {
                buffer::swap(flat.values(), reference)?;
            }
        }
        Ok(())
    }

    /// Moves the reference towards the trained values: `ref = alpha * policy + (1 - alpha) * ref` (TRL's
    /// `ref_model_mixup_alpha`; Gorbatovski et al., 2404.09656).
    ///
    /// # Errors
    /// If the device fails.
    pub fn mix_reference(&self, alpha: f64) -> Result<(), Error> {
        for (flat, reference) in self.flats().zip(self.reference.iter().flatten()) {
            if !flat.is_empty() {
                buffer::mix(reference, flat.values(), alpha as f32)?;
            }
        }
        Ok(())
    }
}

impl Block {
    fn new(init: BlockInit, device: &Device) -> Result<Self, Error> {
        let flat = FlatBlock::new(init.trainable, device)?;
        let mut slots: BTreeMap<String, Slot> = BTreeMap::new();
        for (name, weight) in init.frozen {
            let stays = init.stays_on_host.contains(&name);
            let weight = if stays { weight.to_pinned(device)? } else { weight.to_device(device)? };
            slots.insert(name, Slot { weight, grad: None });
        }
        for entry in flat.entries() {
            let (value, grad) = flat.views(entry)?;
            let slot = Slot { weight: Weight::Dense(value), grad: Some(grad) };
            if slots.insert(entry.name.clone(), slot).is_some() {
                return Err(Error::Duplicate { name: entry.name.clone() });
            }
        }
        Ok(Self { flat, params: Arc::new(BlockParams::new(slots)) })
    }
}
