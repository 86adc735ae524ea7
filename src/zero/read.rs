//! Trained values as blocks read them: in f32, or, where they wait apart from the optimizer, rounded to the type that a block would
//! round them to in any case.
//!
//! What every product rounds before it multiplies (projections, tables of tokens, the `A`s of adapters) is rounded where the f32
//! values lie, so that half the bytes are sent, gathered and held. What kernels read as f32 (norms, biases, and the `B`s of
//! adapters, which are scaled before they are rounded) stays as it is. The f32 values stay with the optimizer; the rounding is to
//! the nearest, ties to even, wherever it is made.
//!
//! A block's values lie in runs, one for each type, entries in their order; a rank's shard of the flat buffer is a range of each run.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::{Entry, Error};
use crate::device::empty;
use crate::kernels::cpu::half_float::f32_to_bf16;
use crate::ops::buffer;

/// Values at a multiple of which an entry begins in a run that is not the flat buffer itself: as aligned as memory of its own.
const ALIGNMENT: usize = 128;
/// Bytes at a multiple of which a run begins among all that a rank keeps.
const RUN_ALIGNMENT: usize = 64;
/// Values that one core rounds at a time.
const CHUNK: usize = 1 << 16;

/// Types to which blocks round trained values before they compute with them; f32: not at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadTypes {
    /// Of matrices that multiply.
    pub matrices: DType,
    /// Of the embedding, whose rows begin the residual stream; a tied head multiplies with it too.
    pub embedding: DType,
}

impl Default for ReadTypes {
    fn default() -> Self {
        Self { matrices: DType::F32, embedding: DType::F32 }
    }
}

impl ReadTypes {
    /// Those of passes with activations and a residual stream of these types.
    pub fn of(compute: DType, residual: DType) -> Self {
        Self { matrices: compute, embedding: if residual == compute { compute } else { DType::F32 } }
    }

    /// The type in which a block reads the trained parameter `name`, which has so many dimensions.
    pub fn of_parameter(self, name: &str, dimensions: usize) -> DType {
        let is_scaled_factor = name.contains(".lora_") && !name.ends_with(".lora_A.weight");
        match dimensions {
            2 if is_scaled_factor => DType::F32,
            2 if name.contains("embed_tokens") => self.embedding,
            2 => self.matrices,
            _ => DType::F32,
        }
    }

    fn of_entry(self, entry: &Entry) -> DType {
        self.of_parameter(&entry.name, entry.shape.len())
    }
}

/// Values of one type.
#[derive(Debug)]
struct Run {
    dtype: DType,
    len: usize,
    /// Of each entry in it: its values in the flat buffer, and where it begins in the run.
    places: Vec<(Range<usize>, usize)>,
    /// Of each rank, the values that are in its shard.
    shards: Vec<Range<usize>>,
}

/// Where a block's values lie as it reads them.
#[derive(Debug)]
pub(super) struct ReadLayout {
    runs: Vec<Run>,
    /// Of each entry: its run, and where it begins there.
    entries: Vec<(usize, usize)>,
    /// Whether that is the flat buffer.
    is_flat: bool,
    own: Range<usize>,
    rank: usize,
}

impl Run {
    /// The first place that values of the flat buffer from `at` on have in the run.
    fn place(&self, at: usize) -> usize {
        let after = self.places.partition_point(|(range, _)| range.start <= at);
        match after.checked_sub(1).map(|index| &self.places[index]) {
            Some((range, start)) if at < range.end => start + at - range.start,
            _ => self.places.get(after).map_or(self.len, |(_, start)| *start),
        }
    }

    fn bytes(&self, values: &Range<usize>) -> Range<usize> {
        let size = self.dtype.size_in_bytes();
        size * values.start..size * values.end
    }
}

impl ReadLayout {
    /// The layout of `entries` in `types`, of which each rank has one of `shards` of the flat buffer and this one that of `rank`.
    pub(super) fn new(entries: &[Entry], shards: &[Range<usize>], rank: usize, types: ReadTypes) -> Self {
        let is_flat = entries.iter().all(|entry| types.of_entry(entry) == DType::F32);
        let mut runs: Vec<Run> = Vec::new();
        let mut places = Vec::with_capacity(entries.len());
        for entry in entries {
            let dtype = types.of_entry(entry);
            let index = runs.iter().position(|run| run.dtype == dtype).unwrap_or_else(|| {
                runs.push(Run { dtype, len: 0, places: Vec::new(), shards: Vec::new() });
                runs.len() - 1
            });
            let run = &mut runs[index];
            let start = if is_flat { entry.range.start } else { run.len.next_multiple_of(ALIGNMENT) };
            run.len = start + entry.range.len();
            run.places.push((entry.range.clone(), start));
            places.push((index, start));
        }
        for run in &mut runs {
            run.shards = shards.iter().map(|shard| run.place(shard.start)..run.place(shard.end)).collect();
        }
        Self { runs, entries: places, is_flat, own: shards[rank].clone(), rank }
    }

    /// Whether blocks read the flat buffer as it is.
    pub(super) fn is_flat(&self) -> bool {
        self.is_flat
    }

    /// Bytes of all values.
    pub(super) fn size_bytes(&self) -> usize {
        self.runs.iter().map(|run| run.dtype.size_in_bytes() * run.len).sum()
    }

    /// Of each rank, its bytes of a run.
    pub(super) fn shards(&self, run: usize) -> Vec<Range<usize>> {
        let run = &self.runs[run];
        run.shards.iter().map(|shard| run.bytes(shard)).collect()
    }

    /// The bytes of this rank's part of a run.
    pub(super) fn own_shard(&self, run: usize) -> Range<usize> {
        self.runs[run].bytes(&self.runs[run].shards[self.rank])
    }

    /// Where the runs of a rank's part lie among all that it keeps.
    fn parts_of(&self, rank: usize) -> Vec<Range<usize>> {
        let mut end = 0usize;
        let place = |run: &Run| {
            let start = end.next_multiple_of(RUN_ALIGNMENT);
            end = start + run.bytes(&run.shards[rank]).len();
            start..end
        };
        self.runs.iter().map(place).collect()
    }

    /// Where the runs of this rank's part lie among the bytes that [`Self::pack`] makes.
    pub(super) fn own_parts(&self) -> Vec<Range<usize>> {
        self.parts_of(self.rank)
    }

    /// Bytes that [`Self::pack`] makes.
    pub(super) fn own_bytes(&self) -> usize {
        self.own_parts().last().map_or(0, |part| part.end)
    }

    /// The same of each rank.
    pub(super) fn bytes_by_rank(&self) -> impl Iterator<Item = usize> {
        let ranks = self.runs.first().map_or(0, |run| run.shards.len());
        (0..ranks).map(|rank| self.parts_of(rank).last().map_or(0, |part| part.end))
    }

    /// The stretches of this rank's part that are in a run: values of the part, and where they begin in its part of the run.
    fn pieces(&self, run: &Run) -> Vec<(Range<usize>, usize)> {
        let (own, first) = (&self.own, run.shards[self.rank].start);
        let inside = |(range, start): &(Range<usize>, usize)| {
            let (from, end) = (range.start.max(own.start), range.end.min(own.end));
            (from < end).then(|| (from - own.start..end - own.start, start + from - range.start - first))
        };
        run.places.iter().filter_map(inside).collect()
    }

    /// Rounds this rank's part of the values: `own` has as many as the shard, `out` [`Self::own_bytes`].
    pub(super) fn pack(&self, own: &[f32], out: &mut [u8]) {
        for (run, part) in self.runs.iter().zip(self.own_parts()) {
            let size = run.dtype.size_in_bytes();
            let out = &mut out[part];
            for (values, start) in self.pieces(run) {
                let place = size * start..size * (start + values.len());
                let pairs = out[place].par_chunks_mut(size * CHUNK).zip(own[values].par_chunks(CHUNK));
                pairs.for_each(|(out, values)| round(values, run.dtype, out));
            }
        }
    }

    /// The same on a GPU that has the values: into this rank's part of a run of all values.
    ///
    /// # Shapes
    /// `own`: f32 `[own]`; `all`: the run, of its type.
    ///
    /// # Errors
    /// If the device fails.
    pub(super) fn round_onto(&self, run: usize, own: &Tensor, all: &Tensor) -> Result<(), Error> {
        let run = &self.runs[run];
        let first = run.shards[self.rank].start;
        let pieces = if self.is_flat { vec![(0..self.own.len(), 0)] } else { self.pieces(run) };
        for (values, start) in pieces.into_iter().filter(|(values, _)| !values.is_empty()) {
            let place = all.narrow(0, first + start, values.len())?;
            buffer::copy(&own.narrow(0, values.start, values.len())?, &place)?;
        }
        Ok(())
    }

    /// Of bytes that all ranks packed, one behind the other: those of each run.
    pub(super) fn join(&self, all: &[u8]) -> Vec<Vec<u8>> {
        let mut runs: Vec<Vec<u8>> =
            self.runs.iter().map(|run| Vec::with_capacity(run.dtype.size_in_bytes() * run.len)).collect();
        let mut rest = all;
        for (rank, bytes) in self.bytes_by_rank().enumerate() {
            let (of_rank, later) = rest.split_at(bytes.min(rest.len()));
            for (run, part) in runs.iter_mut().zip(self.parts_of(rank)) {
                run.extend_from_slice(of_rank.get(part).unwrap_or_default());
            }
            rest = later;
        }
        runs
    }

    /// Values in the bytes of each run, on `device`.
    ///
    /// # Errors
    /// If memory runs out.
    pub(super) fn values(&self, runs: &[Vec<u8>], device: &Device) -> Result<ReadValues, Error> {
        let run = |(run, bytes): (&Run, &Vec<u8>)| Tensor::from_raw_buffer(bytes, run.dtype, &[run.len], device);
        let runs = self.runs.iter().zip(runs).map(run).collect::<Result<_, _>>()?;
        Ok(ReadValues { runs, is_flat: self.is_flat })
    }

    /// Memory for all values, with zeros on the CPU and with anything on a GPU.
    ///
    /// # Errors
    /// If memory runs out.
    pub(super) fn empty(&self, device: &Device) -> Result<ReadValues, Error> {
        let run = |run: &Run| {
            if device.is_cpu() {
                return Ok::<_, Error>(Tensor::zeros(run.len, run.dtype, device)?);
            }
            Ok(empty(device, run.len, run.dtype)?)
        };
        Ok(ReadValues { runs: self.runs.iter().map(run).collect::<Result<_, _>>()?, is_flat: self.is_flat })
    }

    /// The values of entry `index` in its shape, sharing memory with all.
    ///
    /// # Errors
    /// If there is no such entry.
    pub(super) fn view(&self, values: &ReadValues, index: usize, entry: &Entry) -> Result<Tensor, Error> {
        let (run, start) = if values.is_flat { (0, entry.range.start) } else { self.entries[index] };
        Ok(values.runs[run].narrow(0, start, entry.range.len())?.reshape(entry.shape.as_slice())?)
    }

    /// In which type an entry is read.
    pub(super) fn dtype_of(&self, index: usize) -> DType {
        self.entries.get(index).map_or(DType::F32, |(run, _)| self.runs[*run].dtype)
    }
}

/// All values of a block as it reads them, or in f32 as in the flat buffer.
#[derive(Clone, Debug)]
pub(super) struct ReadValues {
    runs: Vec<Tensor>,
    is_flat: bool,
}

impl ReadValues {
    /// Those of a flat buffer: f32 `[n]`.
    pub(super) fn flat(values: Tensor) -> Self {
        Self { runs: vec![values], is_flat: true }
    }

    /// One tensor for each type.
    pub(super) fn runs(&self) -> &[Tensor] {
        &self.runs
    }

    /// The same in memory of their own.
    pub(super) fn copy(&self) -> Result<Self, Error> {
        let runs = self.runs.iter().map(Tensor::copy).collect::<Result<_, _>>()?;
        Ok(Self { runs, is_flat: self.is_flat })
    }

    /// Bytes.
    pub(super) fn size_bytes(&self) -> usize {
        self.runs.iter().map(|run| run.elem_count() * run.dtype().size_in_bytes()).sum()
    }
}

/// Rounds values to a type, on one core: little-endian.
fn round(values: &[f32], dtype: DType, out: &mut [u8]) {
    match dtype {
        DType::BF16 => {
            let pairs = out.as_chunks_mut::<2>().0.iter_mut().zip(values);
            pairs.for_each(|(out, value)| *out = f32_to_bf16(*value).to_le_bytes());
        }
        DType::F16 => {
            let mut block = [f16::ZERO; 512];
            for (out, values) in out.chunks_mut(2 * block.len()).zip(values.chunks(block.len())) {
                let block = &mut block[..values.len()];
                block.convert_from_f32_slice(values);
                let pairs = out.as_chunks_mut::<2>().0.iter_mut().zip(&*block);
                pairs.for_each(|(out, value)| *out = value.to_le_bytes());
            }
        }
        _ => {
            let pairs = out.as_chunks_mut::<4>().0.iter_mut().zip(values);
            pairs.for_each(|(out, value)| *out = value.to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries() -> Vec<Entry> {
        let shapes: [(&str, &[usize]); 8] = [
            ("model.embed_tokens.weight", &[7, 3]),
            ("model.layers.0.input_layernorm.weight", &[5]),
            ("model.layers.0.self_attn.q_proj.weight", &[300, 2]),
            ("model.layers.0.self_attn.q_proj.bias", &[300]),
            ("model.layers.0.self_attn.q_proj.lora_A.weight", &[2, 2]),
            ("model.layers.0.self_attn.q_proj.lora_B.weight", &[300, 2]),
            ("model.layers.0.mlp.up_proj.weight", &[1, 9]),
            ("lm_head.weight", &[7, 3]),
        ];
        let mut all: Vec<Entry> = Vec::new();
        for (name, shape) in shapes {
            let start = all.last().map_or(0, |entry| entry.range.end);
            let range = start..start + shape.iter().product::<usize>();
            all.push(Entry { name: name.into(), shape: shape.to_vec(), range, has_decay: true });
        }
        all
    }

    fn values(count: usize) -> Vec<f32> {
        (0..count).map(|index| (index as f32 * 0.37).sin() * 3.0).collect()
    }

    #[test]
    fn what_is_only_ever_rounded_is_read_rounded() {
        let (f32, bf16, f16) = (DType::F32, DType::BF16, DType::F16);
        let of = |types: ReadTypes| entries().iter().map(|entry| types.of_entry(entry)).collect::<Vec<_>>();
        assert_eq!(of(ReadTypes::of(bf16, bf16)), [bf16, f32, bf16, f32, bf16, f32, bf16, bf16]);
        // Beside a residual stream in f32 the embedding's rows are not rounded.
        assert_eq!(of(ReadTypes::of(f16, f32)), [f32, f32, f16, f32, f16, f32, f16, f16]);
        assert_eq!(of(ReadTypes::of(f32, f32)), [f32; 8]);
    }

    #[test]
    fn parts_that_ranks_round_are_the_whole_that_one_rounds() {
        let entries = entries();
        let count = entries.last().unwrap().range.end;
        let all = values(count);
        let whole = |dtype: DType, entry: &Entry| {
            let tensor = Tensor::from_slice(&all[entry.range.clone()], entry.range.len(), &Device::Cpu).unwrap();
            tensor.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap()
        };
        let cuts: [&[usize]; 5] = [&[], &[0, count], &[10, 21, 23], &[26, 400, 400, 626], &[count - 1]];
        for types in [ReadTypes::of(DType::BF16, DType::BF16), ReadTypes::of(DType::F16, DType::F32)] {
            for cuts in cuts {
                let starts = std::iter::once(0).chain(cuts.iter().copied());
                let ends = cuts.iter().copied().chain([count]);
                let shards: Vec<Range<usize>> = starts.zip(ends).map(|(start, end)| start..end).collect();
                let mut packed = Vec::new();
                for (rank, shard) in shards.iter().enumerate() {
                    let layout = ReadLayout::new(&entries, &shards, rank, types);
                    let mut bytes = vec![0xAB; layout.own_bytes()];
                    layout.pack(&all[shard.clone()], &mut bytes);
                    assert_eq!(layout.bytes_by_rank().nth(rank), Some(bytes.len()));
                    packed.extend(bytes);
                }
                let layout = ReadLayout::new(&entries, &shards, 0, types);
                assert!(!layout.is_flat());
                for run in 0..layout.runs.len() {
                    let shards = layout.shards(run);
                    assert!(shards.windows(2).all(|pair| pair[0].end == pair[1].start), "{shards:?}");
                }
                let read = layout.values(&layout.join(&packed), &Device::Cpu).unwrap();
                assert_eq!(read.size_bytes(), layout.size_bytes());
                for (index, entry) in entries.iter().enumerate() {
                    let view = layout.view(&read, index, entry).unwrap();
                    assert_eq!(view.dims(), entry.shape.as_slice());
                    assert_eq!(view.dtype(), layout.dtype_of(index));
                    let got = view.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
                    assert_eq!(got, whole(view.dtype(), entry), "{} of {shards:?}", entry.name);
                }
            }
        }
    }

    #[test]
    fn without_rounding_the_layout_is_the_flat_buffer() {
        let entries = entries();
        let count = entries.last().unwrap().range.end;
        let shards = [0..30, 30..count];
        let layout = ReadLayout::new(&entries, &shards, 1, ReadTypes::default());
        assert!(layout.is_flat());
        assert_eq!((layout.size_bytes(), layout.own_bytes()), (4 * count, 4 * (count - 30)));
        assert_eq!(layout.shards(0), [0..120, 120..4 * count]);
        assert!(entries.iter().zip(&layout.entries).all(|(entry, place)| (0, entry.range.start) == *place));
        let layout = ReadLayout::new(&[], &[0..0, 0..0], 0, ReadTypes::default());
        assert_eq!((layout.size_bytes(), layout.own_bytes()), (0, 0));
        assert!(layout.is_flat() && layout.empty(&Device::Cpu).unwrap().runs().is_empty());
    }

    #[test]
    fn rounding_is_to_the_nearest_and_ties_to_even() {
        let mut all: Vec<f32> = (0..=u16::MAX).map(|bits| f32::from_bits(u32::from(bits) << 16)).collect();
        // Halfway between neighbours, and just beside.
        let between = all.iter().flat_map(|v| [0x7fff, 0x8000, 0x8001].map(|low| f32::from_bits(v.to_bits() | low)));
        let halves = (0..=u16::MAX).map(|bits| f16::from_bits(bits).to_f32());
        let beside = halves.flat_map(|v| [0, 0xfff, 0x1000, 0x1001].map(|low| f32::from_bits(v.to_bits() | low)));
        all = all.iter().copied().chain(between).chain(beside).collect();
        for dtype in [DType::BF16, DType::F16] {
            let mut bytes = vec![0; 2 * all.len()];
            round(&all, dtype, &mut bytes);
            for (value, bytes) in all.iter().zip(bytes.as_chunks::<2>().0) {
                let got = u16::from_le_bytes(*bytes);
                let (want, is_nan) = if dtype == DType::BF16 {
                    (half::bf16::from_f32(*value).to_bits(), half::bf16::from_bits(got).is_nan())
                } else {
                    (f16::from_f32(*value).to_bits(), f16::from_bits(got).is_nan())
                };
                assert!(got == want || (value.is_nan() && is_nan), "{value:e} to {dtype:?}: {got:#06x}, {want:#06x}");
            }
        }
    }
}
