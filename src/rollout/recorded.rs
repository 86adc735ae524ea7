//! Decoding steps of the engine's model that are recorded once and repeated: embedding, layers, head and drawing as one launch,
//! with everything they need to know in the device's memory.
//!
//! A recording is for a number of lanes (what is missing to the next such number are empty lanes) and a longest context. It works
//! on the trainer's own weights, where all blocks are there for the length of a rollout; what the kernels do not read (a format,
//! a type, a weight-decomposed adapter) goes step by step as before, and a run says so. Where memory is missing, fewer lanes are
//! drawn for at a time, one part after the other, or none.

use std::cell::RefCell;
use std::rc::Rc;

use candle_core::{DType, Device, Tensor};

use super::Error;
use super::kv_cache::KvCache;
use super::sizes::{Generating, Stored};
use crate::config::settings::Projection;
use crate::device::{Arena, Captured, Matrix, Queue, array, empty, free_memory, matrix, upload_f32};
use crate::engine::{self, Types};
use crate::kernels::cuda::{
    Accumulate, DrawSettings, Drawn, Lane, Lanes, LanesSize, LanesView, MOST_DRAW_VOCABULARY, PageSharing, PagedCache,
    PagedSize, ProductCard, ProductOutput, Rows, Side, WeightKind, decode_draw, decode_draw_workspace, decode_norm,
    gather_rows, gemm, rope_table,
};
use crate::model::layer::{DecoderLayer, LaneBuffers, LaneLayer};
use crate::model::{Embedding, Head};
use crate::ops;
use crate::ops::cuda::lanes::{Projections, Room, Scratch, vector};
use crate::quant::Weight;

/// Tokens that are drawn between two visits of the host.
pub(super) const STEPS: usize = 16;
/// Most lanes: the kernels multiply so many rows at a time.
pub(super) const MOST_LANES: usize = 256;
/// Lanes beyond which the head is a product of the library, which reads a dense table as fast.
const MOST_HEAD_ROWS: usize = 32;
/// Contexts are rounded up to this many tokens, longer ones to an eighth of themselves.
const CONTEXT_STEP: usize = 512;

/// The model's parts for lanes.
struct Parts {
    table: Weight,
    layers: Vec<LaneLayer>,
    norm: Tensor,
    eps: f32,
    head: Projections,
    frequencies: Tensor,
    rotation_scale: f32,
    types: Types,
    vocabulary: usize,
}

/// Memory of the steps: for so many lanes and such contexts.
struct Memory {
    parts: Rc<Parts>,
    arena: RefCell<Arena>,
    /// f32 `[lanes, V]`.
    logits: Tensor,
    /// Counters that every product leaves at zero.
    arrived: Tensor,
    lanes: RefCell<Lanes>,
    cache: Vec<CacheTensors>,
    size: Size,
}

/// Keys and values of a layer, kept as long as a recording names them.
type CacheTensors = super::device_pages::LayerPages;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Size {
    lanes: usize,
    context: usize,
}

impl Size {
    fn of_lanes(self, sharing: PageSharing) -> LanesSize {
        let Self { lanes, context } = self;
        LanesSize { lanes, steps: STEPS, pages: lanes * super::pages::pages_for(context), sharing }
    }
}

struct Recording {
    size: Size,
    settings: DrawSettings,
    work: Captured<Rc<Memory>>,
}

/// The recorded steps of a rollout.
pub(super) struct RecordedSteps {
    device: Device,
    parts: Rc<Parts>,
    recordings: Vec<Recording>,
    memory: Option<Rc<Memory>>,
    /// Lanes at a time for which there was memory so far.
    most_lanes: usize,
    /// Bytes that may be taken at all.
    most_bytes: usize,
}

impl std::fmt::Debug for RecordedSteps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RecordedSteps").field("recordings", &self.recordings.len()).finish_non_exhaustive()
    }
}

/// A number of lanes for which a step is recorded.
fn bucket(lanes: usize) -> usize {
    match lanes {
        0..=16 => lanes.max(1).next_power_of_two(),
        17..=64 => lanes.next_multiple_of(8),
        _ => lanes.next_multiple_of(32),
    }
}

/// A longest context for which it is recorded.
fn context_bucket(context: usize) -> usize {
    let step = CONTEXT_STEP.max((context / 8).next_power_of_two());
    context.next_multiple_of(step)
}

impl RecordedSteps {
    /// The steps of a model whose blocks are all there; `None` where its kernels do not read them.
    ///
    /// # Errors
    /// If the device has too little memory for the adapters in the type of the activations.
    pub(super) fn new(
        engine: &engine::Engine,
        embedding: &Embedding<'_>,
        layers: &[DecoderLayer<'_>],
        head: &Head<'_>,
        use_adapter: bool,
    ) -> Result<Option<Self>, Error> {
        let (device, types) = (engine.device(), engine.types());
        if engine.config().vocab_size > MOST_DRAW_VOCABULARY {
            return Ok(None);
        }
        if !device.is_cuda() || !matches!(types.compute, DType::BF16 | DType::F16) {
            return Ok(None);
        }
        let card = ProductCard::of(device)?;
        let Some(table) = embedding.plain_table().filter(|table| matches!(table.table(), Ok(Some(_)))) else {
            return Ok(None);
        };
        let Some(projection) = Projections::new(&[&head.projection()], use_adapter, types.compute, device, card)?
        else {
            return Ok(None);
        };
        let mut parts = Vec::with_capacity(layers.len());
        for layer in layers {
            match layer.for_lanes(use_adapter, types.compute, device, card)? {
                Some(layer) => parts.push(layer),
                None => return Ok(None),
            }
        }
        let (frequencies, rotation_scale) = engine.config().inv_freq();
        let parts = Parts {
            table: table.clone(),
            layers: parts,
            norm: head.norm().clone(),
            eps: engine.config().rms_norm_eps as f32,
            head: projection,
            frequencies: upload_f32(device, &frequencies)?,
            rotation_scale,
            types,
            vocabulary: engine.config().vocab_size,
        };
        Ok(Some(Self {
            device: device.clone(),
            parts: Rc::new(parts),
            recordings: Vec::new(),
            memory: None,
            most_lanes: MOST_LANES,
            most_bytes: usize::MAX,
        }))
    }

    /// The steps of a model without values, which tell what such would take: they cannot be repeated. `None` where the kernels do not
    /// read such a model.
    ///
    /// # Errors
    /// Never.
    pub(super) fn sizes(model: &Generating<'_>, card: ProductCard) -> Result<Option<Self>, Error> {
        let Generating { config, types, stored, adapter_ranks } = model;
        if *stored == Stored::Otherwise || !matches!(types.compute, DType::BF16 | DType::F16) {
            return Ok(None);
        }
        let (weights, head) = match stored {
            Stored::Blocks => (WeightKind::Blocks, WeightKind::Blocks),
            Stored::Packed => (WeightKind::Codes, WeightKind::Dense),
            _ => (WeightKind::Dense, WeightKind::Dense),
        };
        let layer = LaneLayer::sizes(config, adapter_ranks, weights, card)?;
        let Some(layer) = layer else { return Ok(None) };
        let none = Tensor::zeros(0, DType::F32, &Device::Cpu)?;
        let parts = Parts {
            table: Weight::Dense(none.clone()),
            layers: vec![layer],
            norm: none,
            eps: config.rms_norm_eps as f32,
            head: Projections::sizes((&[config.vocab_size], &[0]), config.hidden_size, head, card)?,
            frequencies: Tensor::zeros(config.inv_freq().0.len(), DType::F32, &Device::Cpu)?,
            rotation_scale: 1.0,
            types: *types,
            vocabulary: config.vocab_size,
        };
        Ok(Some(Self {
            device: Device::Cpu,
            parts: Rc::new(parts),
            recordings: Vec::new(),
            memory: None,
            most_lanes: MOST_LANES,
            most_bytes: usize::MAX,
        }))
    }

    /// Bytes of adapters of such ranks in every layer of a model of [`Self::sizes`].
    pub(super) fn adapter_bytes(&self, layers: usize, ranks: &[usize; Projection::ALL.len()]) -> usize {
        let values = self.parts.layers.first().map_or(0, |layer| layer.adapter_values(ranks));
        layers * values * self.parts.types.compute.size_in_bytes()
    }

    /// Takes no more memory than `bytes` from now on.
    pub(super) fn limit(&mut self, bytes: usize) {
        self.most_bytes = bytes;
        self.recordings.clear();
        self.memory = None;
    }

    /// Makes ready what draws up to `steps` tokens for each lane, for as many lanes at a time as there is memory for. False where
    /// there is none for one, or the driver does not record: a run says so once, and goes on without.
    ///
    /// # Errors
    /// If the cache is not one of a GPU.
    pub(super) fn make_ready(
        &mut self,
        lanes: &[Lane<'_>],
        steps: usize,
        settings: &DrawSettings,
        cache: &mut KvCache,
    ) -> Result<bool, Error> {
        let wanted = lanes.len().min(self.most_lanes);
        let mut reason = None;
        while self.most_lanes > 0 {
            let size = self.size_of(lanes, steps);
            let ready = self.prepare(size, cache).and_then(|()| self.record(size, settings));
            match ready {
                Ok(()) => break,
                Err(
                    error @ (Error::Device(_)
                    | Error::StepMemory { .. }
                    | Error::Tensor(_)
                    | Error::Op(_)
                    | Error::Block(_)),
                ) => {
                    self.recordings.clear();
                    self.memory = None;
                    self.most_lanes = lanes.len().min(self.most_lanes) / 2;
                    reason = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
        if let Some(reason) = reason {
            static SAID: std::sync::Once = std::sync::Once::new();
            SAID.call_once(|| match self.most_lanes {
                0 => tracing::warn!("tokens are generated step by step, for steps could not be recorded: {reason}"),
                most => tracing::warn!(
                    "tokens are drawn for {most} sequences at a time instead of {wanted}, for steps could not be recorded for \
                     more: {reason}; lower `max_num_seqs` or `max_completion_length`"
                ),
            });
        }
        Ok(self.most_lanes > 0)
    }

    /// Draws up to [`STEPS`] tokens for each lane, after [`Self::make_ready`] for the same.
    ///
    /// # Errors
    /// If the lanes do not fit the cache, nothing was made ready, or the device fails.
    pub(super) fn draw(
        &mut self,
        lanes: &[Lane<'_>],
        steps: usize,
        uniforms: &[f64],
        settings: &DrawSettings,
    ) -> Result<Drawn, Error> {
        let size = self.size_of(lanes, steps);
        let is_it = |one: &&Recording| one.size == size && one.settings == *settings;
        let Some(Recording { work, .. }) = self.recordings.iter().find(is_it) else { return Err(Error::NoSteps) };
        let mut state = work.kept().lanes.borrow_mut();
        let count = lanes.len();
        let mut all = Drawn::empty(steps * count);
        for (index, part) in lanes.chunks(self.most_lanes.max(1)).enumerate() {
            let first = index * self.most_lanes;
            let numbers: Vec<f64> =
                (0..steps).flat_map(|step| &uniforms[step * count + first..][..part.len()]).copied().collect();
            state.begin(part, size.lanes, steps, &numbers)?;
            for _ in 0..steps {
                work.repeat()?;
            }
            all.put(&state.finish(part.len())?, (first, part.len()), count);
        }
        Ok(all)
    }

    /// Bytes of the device that steps of up to `lanes` take, with contexts of up to `longest` tokens.
    pub(super) fn bytes(&self, lanes: usize, longest: usize) -> usize {
        let lanes = bucket(lanes.min(self.most_lanes));
        self.parts.step_bytes(Size { lanes, context: context_bucket(longest + STEPS) })
    }

    /// The one for which steps of these lanes, or of a part of them, are recorded.
    fn size_of(&self, lanes: &[Lane<'_>], steps: usize) -> Size {
        let longest = lanes.iter().map(|lane| lane.context + steps).max().unwrap_or(1);
        Size { lanes: bucket(lanes.len().min(self.most_lanes)), context: context_bucket(longest) }
    }

    /// Memory that holds `size` over this cache; recordings on other memory go.
    fn prepare(&mut self, size: Size, cache: &mut KvCache) -> Result<(), Error> {
        cache.settle_copies()?;
        let pages = cache.layer_pages()?;
        let is_enough = |memory: &Rc<Memory>| {
            let has = memory.size;
            let is_same = pages.first().zip(memory.cache.first()).is_some_and(|(new, old)| new.is_same(old));
            is_same && has.lanes >= size.lanes && has.context >= size.context
        };
        if self.memory.as_ref().is_some_and(is_enough) {
            return Ok(());
        }
        let before = self.memory.take().map_or(size, |memory| memory.size);
        // What is not enough is gone before there is more.
        self.recordings.clear();
        let size = Size { lanes: size.lanes.max(before.lanes), context: size.context.max(before.context) };
        let (device, parts) = (&self.device, &self.parts);
        let queue = Queue::of(device)?;
        let (bytes, free_bytes) = (parts.step_bytes(size) as u64, free_memory(device)?.min(self.most_bytes as u64));
        if bytes > free_bytes {
            return Err(Error::StepMemory { lanes: size.lanes, bytes, free_bytes });
        }
        let cache_size = PagedSize { pages: cache.num_pages(), page_tokens: super::PAGE_TOKENS };
        let room = parts.rooms(size.lanes);
        let sharing = parts.layers.first().map_or(Ok(PageSharing::NONE), |layer| layer.sharing(device))?;
        let lanes_size = size.of_lanes(sharing);
        let make = || {
            Ok::<_, crate::device::Error>((
                Arena::new(&queue, parts.arena_bytes(size))?,
                empty(device, (size.lanes, parts.vocabulary), DType::F32)?,
                Lanes::new(&queue, lanes_size, cache_size, parts.vocabulary)?,
            ))
        };
        let (arena, logits, lanes) = make()?;
        let arrived = Tensor::zeros(room.arrived.max(1), DType::U32, device)?;
        self.memory = Some(Rc::new(Memory {
            parts: parts.clone(),
            arena: RefCell::new(arena),
            logits,
            arrived,
            lanes: RefCell::new(lanes),
            cache: pages,
            size,
        }));
        Ok(())
    }

    /// Records a step, if it was not.
    fn record(&mut self, size: Size, settings: &DrawSettings) -> Result<(), Error> {
        if self.recordings.iter().any(|one| one.size == size && one.settings == *settings) {
            return Ok(());
        }
        let Some(memory) = self.memory.clone() else { return Err(Error::NoSteps) };
        let (device, queue) = (&self.device, Queue::of(&self.device)?);
        // Once without a recording and with empty lanes: the driver loads its kernels.
        memory.lanes.borrow_mut().begin(&[], size.lanes, 1, &[])?;
        memory.step(device, size, settings)?;
        let capture = || queue.capture(memory.clone(), |memory: &Rc<Memory>| memory.step(device, size, settings));
        // What another thread asks of the driver may end a recording; a second one then goes through.
        let work = capture().or_else(|error: Error| {
            tracing::debug!("recording a step once more: {error}");
            capture()
        })?;
        self.recordings.push(Recording { size, settings: *settings, work });
        Ok(())
    }
}

impl Parts {
    fn room(&self, lanes: usize) -> Room {
        self.layers.iter().fold(self.head.room(lanes, false), |room, layer| room.or(layer.room(lanes)))
    }

    /// Enough for up to so many lanes: fewer may take more workspace than many.
    fn rooms(&self, lanes: usize) -> Room {
        (1..=lanes).filter(|&n| n == bucket(n)).map(|n| self.room(n)).fold(Room::default(), Room::or)
    }

    /// Bytes of the device that steps of a size take.
    fn step_bytes(&self, size: Size) -> usize {
        let lanes = Lanes::state_bytes(size.of_lanes(PageSharing::NONE), super::PAGE_TOKENS);
        self.arena_bytes(size)
            + 4 * size.lanes * self.vocabulary
            + lanes
            + Lanes::seen_bytes(size.lanes, self.vocabulary)
    }

    /// Bytes of everything that [`Memory::step`] takes, with what aligning them may cost.
    fn arena_bytes(&self, size: Size) -> usize {
        const SPARE: usize = 64 << 10;
        let Some(layer) = self.layers.first() else { return SPARE };
        let (lanes, widths) = (size.lanes, layer.widths());
        let padded = lanes.next_power_of_two().max(8);
        let rooms = self.rooms(lanes);
        let attention = layer.attention_floats(lanes, size.context);
        let (compute, residual) = (self.types.compute.size_in_bytes(), self.types.residual.size_in_bytes());
        let rows = residual * widths.hidden
            + compute * (2 * widths.hidden + widths.qkv + widths.attended + widths.activated)
            + 4 * 2 * self.frequencies.elem_count();
        let draw = decode_draw_workspace(lanes, self.vocabulary);
        padded * rows + 4 * (rooms.low + rooms.partial + attention + draw) + SPARE
    }
}

impl Memory {
    /// One token for each lane.
    fn step(&self, device: &Device, size: Size, settings: &DrawSettings) -> Result<(), Error> {
        let lanes = self.lanes.borrow();
        let view = lanes.view(size.lanes)?;
        let logits = matrix(&self.logits)?.rows(0, size.lanes);
        self.arena.borrow_mut().reset();
        let arena = self.arena.borrow();
        self.forward(device, &arena, size, &view, logits)?;
        let workspace = arena.take_array(decode_draw_workspace(size.lanes, self.parts.vocabulary), DType::F32)?;
        Ok(decode_draw(device, logits, &view, settings, workspace)?)
    }

    fn forward(
        &self,
        device: &Device,
        arena: &Arena,
        size: Size,
        lanes: &LanesView<'_>,
        logits: Matrix<'_>,
    ) -> Result<(), Error> {
        let parts = &*self.parts;
        let Some(first) = parts.layers.first() else { return Err(Error::NoSteps) };
        let (widths, count, room) = (first.widths(), size.lanes, parts.room(size.lanes));
        let Types { compute, residual } = parts.types;
        let take = |cols, dtype| arena.take((count, cols), dtype);
        let rows = |cols| arena.take((count.next_power_of_two().max(8), cols), compute);
        let floats = |len: usize| arena.take_array(len.max(1), DType::F32);
        let prepare = || {
            let buffers = LaneBuffers {
                stream: take(widths.hidden, residual)?,
                normed: rows(widths.hidden)?,
                qkv: take(widths.qkv, compute)?,
                attended: rows(widths.attended)?,
                activated: rows(widths.activated)?,
                rotations: floats(count * 2 * parts.frequencies.elem_count())?,
                attention: floats(first.attention_floats(count, size.context))?,
                scratch: Scratch {
                    low: arena.take_array(room.low.max(1), compute)?,
                    partial: floats(room.partial)?,
                    arrived: array(&self.arrived)?,
                },
            };
            let frequencies = array(&parts.frequencies)?;
            rope_table(device, buffers.rotations, lanes.positions, frequencies, parts.rotation_scale)?;
            Ok::<_, crate::device::Error>(buffers)
        };
        let buffers = prepare()?;
        let Some(table) = parts.table.table().map_err(ops::Error::from)? else { return Err(Error::NoSteps) };
        gather_rows(device, buffers.stream, table, lanes.tokens)?;
        for (layer, pages) in parts.layers.iter().zip(&self.cache) {
            let cache: PagedCache<'_> = pages.cache()?;
            layer.step(device, &buffers, cache, lanes, size.context)?;
        }
        let norm = vector(&parts.norm)?;
        if let (true, Some(table)) = (count > MOST_HEAD_ROWS, parts.head.as_dense(compute)?) {
            // So many rows want a product of the library.
            let rows = arena.take((count, widths.hidden), compute)?;
            decode_norm(device, Rows::plain(rows), buffers.stream, norm, parts.eps)?;
            let (left, right) = ((rows, Side::Plain), (table, Side::Transposed));
            return Ok(gemm(device, logits, left, right, 1.0, Accumulate::No, None)?);
        }
        let normed = parts.head.rows(buffers.normed, count)?;
        decode_norm(device, normed, buffers.stream, norm, parts.eps)?;
        let to = ProductOutput::Sum { out: logits, onto: None };
        Ok(parts.head.apply(device, normed, to, &buffers.scratch)?)
    }
}

#[cfg(test)]
mod tests {
    use super::{bucket, context_bucket};

    #[test]
    fn buckets_hold_what_they_are_for_and_are_few() {
        for lanes in 1..=600 {
            let held = bucket(lanes);
            assert!(held >= lanes && bucket(held) == held && held <= lanes.max(4) * 2);
        }
        let buckets: std::collections::BTreeSet<usize> = (1..=256).map(bucket).collect();
        assert!(buckets.len() <= 20, "{buckets:?}");
        for context in [1, 511, 512, 513, 5_000, 32_000, 131_072] {
            let held = context_bucket(context);
            assert!(held >= context && held <= context + context / 4 + 512, "{context}: {held}");
        }
    }
}
