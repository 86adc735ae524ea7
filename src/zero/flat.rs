//! The flat buffers of one block: values and gradients of its trained parameters, one behind the other, or this rank's part of
//! them.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::read::{ReadLayout, ReadTypes};
use super::values::Values;
use super::{Error, Link, Sharing};
use crate::config::settings::ZeroStage;
use crate::model::params::Trainable;
use crate::ops::buffer;
use crate::optim::{Layout, NORM_CHUNK};

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

/// A stretch of this rank's part that belongs to one parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where it lies, counted from the start of this rank's part.
    pub range: Range<usize>,
    /// Whether weight decay applies.
    pub has_decay: bool,
    /// What a rule of the optimizer needs to know of it.
    pub layout: Layout,
}

impl Entry {
    /// Rows and columns of a matrix that multiplies; a table of tokens does not.
    pub fn matrix(&self) -> Option<(usize, usize)> {
        let is_table = ["embed_tokens", "lm_head"].iter().any(|table| self.name.contains(table));
        match *self.shape.as_slice() {
            [rows, cols] if !is_table => Some((rows, cols)),
            _ => None,
        }
    }

    /// What of it each of the block's `shards` has, counted from its own start.
    pub(super) fn parts_in(&self, shards: &[Range<usize>]) -> Vec<Range<usize>> {
        let inside = |place: usize| place.clamp(self.range.start, self.range.end) - self.range.start;
        shards.iter().map(|shard| inside(shard.start)..inside(shard.end)).collect()
    }

    /// Where it begins in a shard that has some of it, counted from the shard's start.
    pub(super) fn start_in(&self, shard: &Range<usize>) -> usize {
        self.range.start.clamp(shard.start, shard.end) - shard.start
    }
}

/// Values and gradients of a block's trained parameters. Cloning shares all.
#[derive(Clone, Debug)]
pub struct FlatBlock {
    entries: Arc<[Entry]>,
    /// Of each rank, the values that its optimizer moves.
    shards: Arc<[Range<usize>]>,
    rank: usize,
    /// Whether every rank has its shard of the values alone. A shard may be all of them, or none.
    is_cut: bool,
    /// How blocks read them.
    layout: Arc<ReadLayout>,
    /// f32 `[n]`, or where parameters are cut into shards this rank's.
    values: Values,
    /// f32 `[n]`, or where gradients are cut into shards this rank's.
    grads: Tensor,
}

impl FlatBlock {
    /// Lays the parameters out in their order where they wait, as far as this rank keeps them: where optimizer state is cut into
    /// shards and works elsewhere than blocks compute, the values are too.
    ///
    /// # Errors
    /// If the buffers cannot be allocated, or a file cannot be written.
    pub(super) fn new(trainable: Vec<Trainable>, link: &Link, sharing: &Sharing) -> Result<Self, Error> {
        let device = link.home();
        let mut entries = Vec::with_capacity(trainable.len());
        let mut values = Vec::with_capacity(trainable.iter().map(|t| t.values.len()).sum());
        for Trainable { name, shape, values: own, has_decay } in trainable {
            let start = values.len();
            values.extend(own);
            entries.push(Entry { name, shape, range: start..values.len(), has_decay });
        }
        let (count, rank) = (values.len(), sharing.rank());
        let all: Range<usize> = 0..count;
        let shards = match sharing.stage() {
            ZeroStage::Replicated => vec![all; sharing.world_size()],
            _ => shards(
                &entries,
                count,
                sharing.world_size(),
                if sharing.keeps_whole() { usize::MAX } else { NORM_CHUNK },
            ),
        };
        let own = shards[rank].clone();
        let is_cut =
            sharing.cuts_values(count) || (link.has_home_elsewhere() && sharing.stage() >= ZeroStage::Optimizer);
        if is_cut {
            values = values[own.clone()].to_vec();
        }
        // Where the optimizer moves what blocks compute with, a rounded copy would come on top.
        let types = if is_cut || link.has_home_elsewhere() { link.offload().types } else { ReadTypes::default() };
        let layout = Arc::new(ReadLayout::new(&entries, &shards, rank, types));
        let num_grads = if sharing.stage() >= ZeroStage::Gradients { own.len() } else { count };
        let values = link.keep_values(values)?;
        let grads = Tensor::zeros(num_grads, DType::F32, device)?;
        Ok(Self { entries: entries.into(), shards: shards.into(), rank, is_cut, layout, values, grads })
    }

    /// The parameters in order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The values: f32 `[n]`, or where parameters are cut into shards this rank's. Where they lie in a file, a copy of them.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn values(&self) -> Result<Tensor, Error> {
        self.values.tensor()
    }

    /// The values, wherever they lie.
    pub(super) fn stored(&self) -> &Values {
        &self.values
    }

    /// How blocks read the values.
    pub(super) fn layout(&self) -> &ReadLayout {
        &self.layout
    }

    /// In which type blocks read the parameter `name`, if it is one of them.
    pub(super) fn dtype_of(&self, name: &str) -> Option<DType> {
        self.place_of(name).map(|(index, _)| self.layout.dtype_of(index))
    }

    /// The gradients: f32 `[n]`, or where gradients are cut into shards this rank's.
    pub fn grads(&self) -> &Tensor {
        &self.grads
    }

    /// Number of trained values over all ranks.
    pub fn len(&self) -> usize {
        self.entries.last().map_or(0, |entry| entry.range.end)
    }

    /// Whether nothing of the block is trained.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Of each rank, the values that its optimizer moves; each has all where optimizer state is not cut into shards.
    pub fn shards(&self) -> &[Range<usize>] {
        &self.shards
    }

    /// The values that this rank's optimizer moves.
    pub fn own(&self) -> Range<usize> {
        self.shards[self.rank].clone()
    }

    /// Whether every rank's optimizer moves all values.
    pub fn is_whole(&self) -> bool {
        self.shards.iter().all(|shard| *shard == (0..self.len()))
    }

    /// Whether every rank has all values.
    pub fn has_all_values(&self) -> bool {
        !self.is_cut
    }

    /// The values that this rank's optimizer moves: f32 `[own]`, sharing memory with [`Self::values`].
    ///
    /// # Errors
    /// Of the tensor library, or if they lie in a file that cannot be read.
    pub fn own_values(&self) -> Result<Tensor, Error> {
        self.own_part(&self.values()?)
    }

    /// Their gradients: f32 `[own]`, sharing memory with [`Self::grads`].
    ///
    /// # Errors
    /// Of the tensor library.
    pub fn own_grads(&self) -> Result<Tensor, Error> {
        self.own_part(&self.grads)
    }

    /// As [`Self::own_values`], of a buffer like [`Self::values`].
    ///
    /// # Errors
    /// Of the tensor library.
    pub fn own_part(&self, buffer: &Tensor) -> Result<Tensor, Error> {
        let own = self.own();
        if buffer.elem_count() == own.len() {
            return Ok(buffer.clone());
        }
        Ok(buffer.narrow(0, own.start, own.len())?)
    }

    /// The parameters in this rank's part.
    pub fn own_pieces(&self) -> impl Iterator<Item = Piece> {
        let own = self.own();
        self.entries.iter().filter_map(move |entry| {
            let (start, end) = (entry.range.start.max(own.start), entry.range.end.min(own.end));
            let piece = || {
                let is_whole = (start..end) == entry.range;
                let matrix = entry.matrix().filter(|_| is_whole);
                let layout = Layout { count: end - start, of: entry.range.len(), matrix };
                Piece { range: start - own.start..end - own.start, has_decay: entry.has_decay, layout }
            };
            (start < end).then(piece)
        })
    }

    /// The parameters of which values are in `range` of the buffer of all ranks, each with those that are.
    pub fn entries_in(&self, range: &Range<usize>) -> impl Iterator<Item = (&Entry, Range<usize>)> {
        let (first, end) = (range.start, range.end);
        self.entries.iter().filter_map(move |entry| {
            let inside = entry.range.start.max(first)..entry.range.end.min(end);
            (inside.start < inside.end).then_some((entry, inside))
        })
    }

    /// Replaces the values by those of all parameters, as far as they are on this rank: `all` is `[n]`.
    ///
    /// # Errors
    /// If the lengths differ, or they lie in a file that fails.
    pub fn write_values(&self, all: &[f32]) -> Result<(), Error> {
        self.values.change(|values| self.write(values, all))
    }

    /// Puts values of all parameters into a buffer like that of the values.
    pub(super) fn write(&self, values: &Tensor, all: &[f32]) -> Result<(), Error> {
        let part = if values.elem_count() == all.len() { all } else { all.get(self.own()).unwrap_or(all) };
        Ok(buffer::write(values, part)?)
    }

    /// The parameter `name`, if it is one of them.
    pub fn entry(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.name == name)
    }

    /// The parameter `name` and its number, if it is one of them.
    pub(super) fn place_of(&self, name: &str) -> Option<(usize, &Entry)> {
        self.entries.iter().enumerate().find(|(_, entry)| entry.name == name)
    }

    /// The part of a buffer of `[n]` that is `entry`'s, in its shape, sharing the buffer's memory.
    ///
    /// # Errors
    /// If the entry is of another buffer.
    pub fn view(flat: &Tensor, entry: &Entry) -> Result<Tensor, Error> {
        Ok(flat.narrow(0, entry.range.start, entry.range.len())?.reshape(entry.shape.as_slice())?)
    }
}

/// The bytes of a range of values.
pub(super) fn bytes_of(values: &Range<usize>) -> Range<usize> {
    size_of::<f32>() * values.start..size_of::<f32>() * values.end
}

/// Cuts a buffer of `count` values into a shard for each rank, between parameters or chunks of `chunk` values of one. Chunks are
/// those of which a norm is made: a rank that has all of a chunk makes the same part of the norm as one that has everything.
fn shards(entries: &[Entry], count: usize, world_size: usize, chunk: usize) -> Vec<Range<usize>> {
    let starts: Vec<usize> = entries.iter().flat_map(|entry| entry.range.clone().step_by(chunk)).collect();
    // The cut that is nearest to an equal share.
    let cut = |rank: usize| {
        let wanted = count * rank / world_size;
        let after = starts.partition_point(|&start| start < wanted);
        let candidates = [after.checked_sub(1), Some(after)].into_iter().flatten();
        let places = candidates.map(|at| starts.get(at).copied().unwrap_or(count));
        places.min_by_key(|place| place.abs_diff(wanted)).unwrap_or(count)
    };
    let cuts: Vec<usize> = (1..world_size).map(cut).collect();
    let ends = cuts.iter().copied().chain([count]);
    std::iter::once(0).chain(cuts.iter().copied()).zip(ends).map(|(start, end)| start..end).collect()
}

#[cfg(test)]
mod tests {
    use super::shards as shards_of;
    use super::*;

    #[test]
    fn a_parameter_is_cut_as_its_block_is() {
        let entry = Entry { name: String::new(), shape: vec![], range: 10..30, has_decay: true };
        let shards = [0..5, 5..12, 12..12, 12..30, 30..40];
        let parts = entry.parts_in(&shards);
        assert_eq!(parts, [0..0, 0..2, 2..2, 2..20, 20..20]);
        for (shard, part) in shards.iter().zip(parts).filter(|(_, part)| !part.is_empty()) {
            assert_eq!(shard.start + entry.start_in(shard), entry.range.start + part.start, "{shard:?}");
        }
        assert_eq!(bytes_of(&(3..5)), 12..20);
    }

    #[test]
    fn shards_cover_everything_and_end_where_chunks_do() {
        let lengths = [100, NORM_CHUNK, 3 * NORM_CHUNK + 7, 1, 5 * NORM_CHUNK];
        let mut entries: Vec<Entry> = Vec::new();
        for length in lengths {
            let start = entries.last().map_or(0, |entry| entry.range.end);
            entries.push(Entry { name: String::new(), shape: vec![], range: start..start + length, has_decay: true });
        }
        let count = lengths.iter().sum();
        for world_size in [1, 2, 3, 4, 7, 16] {
            let shards = shards_of(&entries, count, world_size, NORM_CHUNK);
            assert_eq!(shards.len(), world_size);
            assert_eq!((shards[0].start, shards[world_size - 1].end), (0, count));
            assert!(shards.windows(2).all(|pair| pair[0].end == pair[1].start), "{shards:?}");
            for shard in &shards {
                let of = entries.iter().find(|entry| entry.range.contains(&shard.start));
                assert!(
                    of.is_none_or(|entry| (shard.start - entry.range.start).is_multiple_of(NORM_CHUNK)),
                    "{shard:?}"
                );
                assert!(shard.len() <= count / world_size + NORM_CHUNK, "{shard:?} of {count} over {world_size}");
            }
        }
        assert_eq!(shards_of(&[], 0, 3, NORM_CHUNK), [0..0, 0..0, 0..0]);
        // Whole parameters.
        let starts: Vec<usize> = entries.iter().map(|entry| entry.range.start).collect();
        for shard in shards_of(&entries, count, 3, usize::MAX) {
            assert!(starts.contains(&shard.start) || shard.start == count, "{shard:?}");
        }
    }
}
