//! What a store takes, and what of it comes for a visit.

use std::path::Path;

use super::{Block, ParamStore};
use crate::zero::gradients::Bucket;
use crate::zero::packed::Packed;
use crate::zero::read::ReadValues;
use crate::zero::{FlatBlock, Sums};

/// Bytes of a layer that come for a visit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerBytes {
    /// From this rank's host memory or file.
    pub from_host: usize,
    /// From other ranks.
    pub from_ranks: usize,
}

impl ParamStore {
    /// Bytes of the two largest blocks that come for a visit: with each step of a walk so many are there.
    pub fn visiting_bytes(&self) -> usize {
        let mut all: Vec<usize> = self.blocks.iter().map(|block| self.visit_bytes(block)).collect();
        all.sort_unstable();
        all.iter().rev().take(2).sum()
    }

    /// Bytes of a block that come for a visit.
    pub(super) fn visit_bytes(&self, block: &Block) -> usize {
        let values = if self.values_come(block) { block.flat.layout().size_bytes() } else { 0 };
        block.frozen.away_bytes() + values
    }

    /// Number of trained values over all blocks.
    pub fn num_trainable(&self) -> usize {
        self.flats().map(FlatBlock::len).sum()
    }

    /// Bytes of gradients that are there between steps.
    pub fn gradient_bytes(&self) -> usize {
        let lasting = |bucket: &Bucket| if bucket.is_lasting() { bucket.len() } else { 0 };
        let shared = |block: &Block| -> usize {
            block.shared.iter().filter_map(|shared| shared.bucket.as_ref()).map(lasting).sum()
        };
        let own: usize = self.flats().map(|flat| flat.grads().elem_count()).sum();
        size_of::<f32>() * (own + self.blocks.iter().map(shared).sum::<usize>())
    }

    /// Bytes of trained values that are where blocks compute for longer than a visit.
    pub fn computed_bytes(&self) -> usize {
        let of_block = |block: &Block| match &block.home {
            Some(home) => home.working_values().map_or(0, ReadValues::size_bytes),
            None => size_of::<f32>() * block.flat.stored().len_in_memory(),
        };
        self.blocks.iter().map(of_block).sum()
    }

    /// Bytes of this rank's trained values as blocks read them that wait in host memory for visits, beside the values themselves.
    pub fn packed_bytes(&self) -> usize {
        self.packed().map(Packed::bytes_in_memory).sum()
    }

    /// What waits for visits as blocks read it, of the policy and of the reference.
    fn packed(&self) -> impl Iterator<Item = &Packed> {
        self.blocks.iter().flat_map(|block| {
            let policy = block.home.as_ref().and_then(|home| home.packed());
            policy.into_iter().chain(block.reference.as_ref().and_then(|reference| reference.packed.as_ref()))
        })
    }

    /// Trained values that this rank keeps in memory.
    pub fn num_kept(&self) -> usize {
        self.flats().map(|flat| flat.stored().len_in_memory()).sum()
    }

    /// This rank's files, each with the bytes that lie in it.
    pub fn files(&self) -> Vec<(&Path, u64)> {
        self.link.files().map(|file| (file.path(), file.len())).collect()
    }

    /// Bytes of the largest block that come from files for its visit.
    pub fn largest_read_bytes(&self) -> usize {
        let of_block = |block: &Block| {
            let own = block.flat.stored();
            let flat = if own.is_in_file() { size_of::<f32>() * own.len() } else { 0 };
            let packed = block.home.as_ref().and_then(|home| home.packed());
            block.frozen.bytes_in_file() + packed.map_or(flat, Packed::bytes_in_file)
        };
        self.blocks.iter().map(of_block).max().unwrap_or(0)
    }

    /// Bytes of gradients that a step of so many micro-batches takes beside those of the buckets.
    pub fn bytes_aside(&self, sums: Sums) -> usize {
        size_of::<f32>() * sums.most_aside() * self.num_trainable()
    }

    /// Bytes of frozen weights over all blocks, as far as they are on this rank.
    pub fn frozen_bytes(&self) -> usize {
        self.blocks.iter().map(|block| block.frozen.size_bytes()).sum()
    }

    /// Those of them that wait in host memory.
    pub fn offloaded_bytes(&self) -> usize {
        self.blocks.iter().map(|block| block.frozen.offloaded_bytes()).sum()
    }

    /// Those of them that lie in a file.
    pub fn bytes_in_file(&self) -> usize {
        self.blocks.iter().map(|block| block.frozen.bytes_in_file()).sum()
    }

    /// Bytes that come for a visit of the largest layer: a block between the first and the last.
    pub fn layer_bytes(&self) -> LayerBytes {
        let last = self.blocks.len().saturating_sub(1);
        let layers = self.blocks.get(1..last).unwrap_or_default();
        let from_host = |block: &Block| {
            let is_copied = self.values_come(block) && self.home().is_cpu();
            let values = if is_copied { block.flat.layout().own_bytes() } else { 0 };
            block.frozen.offloaded_bytes() + block.frozen.bytes_in_file() + values
        };
        let from_ranks = |block: &Block| {
            let is_gathered = self.values_come(block) && !block.flat.has_all_values();
            let layout = block.flat.layout();
            let values = if is_gathered { layout.size_bytes().saturating_sub(layout.own_bytes()) } else { 0 };
            block.frozen.bytes_of_others() + values
        };
        LayerBytes {
            from_host: layers.iter().map(from_host).max().unwrap_or(0),
            from_ranks: layers.iter().map(from_ranks).max().unwrap_or(0),
        }
    }

    /// Values of a block that come for a visit.
    pub(in crate::zero) fn values_away(&self, block: usize) -> usize {
        let own = &self.blocks[block];
        own.frozen.values_away() + if self.values_come(own) { own.flat.len() } else { 0 }
    }

    /// Whether a block's trained values come for a visit.
    pub(super) fn values_come(&self, block: &Block) -> bool {
        self.values_wait() || (self.sharing.cuts_parameters() && !block.flat.has_all_values())
    }
}
