//! A paged key-value cache on the device, and attention over it.

use candle_core::{DType, Device, Tensor};

use crate::device::timers::{Phase, span};
use crate::device::{Matrix, array, empty, matrix};
use crate::kernels::cuda::{
    PageStores, PagedCache, PagedLists, PagedSize, PagedStep, copy_pages, paged_attention, paged_attention_workspace,
    write_pages,
};
use crate::ops::paged_attention::{PagedSequence, check_sequences};
use crate::ops::{Error, Wide, shape_error};

/// Sizes of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PagesShape {
    pub(crate) layers: usize,
    /// `P`.
    pub(crate) pages: usize,
    /// `T`.
    pub(crate) page_tokens: usize,
    /// `K`.
    pub(crate) kv_heads: usize,
    /// `D`.
    pub(crate) head_dim: usize,
}

/// Keys and values of all layers.
#[derive(Debug)]
pub(crate) struct Pages {
    shape: PagesShape,
    dtype: DType,
    /// Per layer `[P, T, K, D]`.
    keys: Vec<Tensor>,
    /// Per layer `[P, T, K, D]`.
    values: Vec<Tensor>,
    /// All of them, for copies.
    stores: PageStores,
}

/// Where a step's tokens go and what they see, on the device.
#[derive(Debug)]
pub(crate) struct Step(PagedStep);

impl Step {
    /// Copies the places of the sequences' new tokens, their page lists and contexts to the device.
    ///
    /// # Errors
    /// If rows or pages do not fit a cache of `shape`, or memory runs out.
    pub(crate) fn new(device: &Device, shape: PagesShape, sequences: &[PagedSequence<'_>]) -> Result<Self, Error> {
        let PagesShape { pages: num_pages, page_tokens, .. } = shape;
        let tokens = check_sequences(sequences, page_tokens, num_pages)?;
        let mut lists = PagedLists::default();
        lists.rows.reserve(tokens);
        lists.slots.reserve(tokens);
        for PagedSequence { rows: new, pages, context } in sequences {
            let end = context + new.len();
            for position in *context..end {
                lists.rows.push([lists.tables.len() as u32, position as u32 + 1]);
                lists.slots.push(pages[position / page_tokens] * page_tokens as u32 + (position % page_tokens) as u32);
            }
            lists.tables.extend_from_slice(&pages[..end.div_ceil(page_tokens)]);
        }
        Ok(Self(PagedStep::new(device, PagedSize { pages: num_pages, page_tokens }, &lists)?))
    }
}

/// Keys and values of one layer.
#[derive(Clone, Debug)]
pub(crate) struct LayerPages {
    shape: PagesShape,
    dtype: DType,
    keys: Tensor,
    values: Tensor,
}

impl LayerPages {
    /// As kernels take them.
    pub(crate) fn cache(&self) -> Result<PagedCache<'_>, Error> {
        let PagesShape { page_tokens, kv_heads, head_dim, .. } = self.shape;
        let (keys, values) = (array(&self.keys)?, array(&self.values)?);
        Ok(PagedCache { keys, values, dtype: self.dtype, kv_heads, head_dim, page_tokens })
    }

    /// Whether it is the same memory.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.keys.id() == other.keys.id()
    }
}

impl Pages {
    /// A cache whose content is not defined until it is written.
    ///
    /// # Errors
    /// If there are more tokens than 32 bits count, or memory runs out.
    pub(crate) fn new(device: &Device, shape: PagesShape, dtype: DType) -> Result<Self, Error> {
        let PagesShape { layers, pages, page_tokens, kv_heads, head_dim } = shape;
        if pages.saturating_mul(page_tokens) > i32::MAX as usize {
            return Err(shape_error("key-value cache", "pages", pages, format!("below 2^31 / {page_tokens}")));
        }
        let store = || empty(device, (pages, page_tokens, kv_heads, head_dim), dtype);
        let keys = (0..layers).map(|_| store()).collect::<Result<Vec<_>, _>>()?;
        let values = (0..layers).map(|_| store()).collect::<Result<Vec<_>, _>>()?;
        let all: Vec<Tensor> = keys.iter().chain(&values).cloned().collect();
        let stores = PageStores::new(device, &all, pages)?;
        Ok(Self { shape, dtype, keys, values, stores })
    }

    pub(crate) fn shape(&self) -> PagesShape {
        self.shape
    }

    /// The pages of a layer, which share the memory.
    pub(crate) fn layer(&self, layer: usize) -> Result<LayerPages, Error> {
        let (Some(keys), Some(values)) = (self.keys.get(layer), self.values.get(layer)) else {
            return Err(shape_error("key-value cache", "layer", layer, format!("below {}", self.shape.layers)));
        };
        Ok(LayerPages { shape: self.shape, dtype: self.dtype, keys: keys.clone(), values: values.clone() })
    }

    /// Copies whole pages in every layer; no destination may be another copy's source or destination.
    ///
    /// # Errors
    /// If a page does not exist, or the device fails.
    pub(crate) fn copy(&self, pairs: &[[u32; 2]]) -> Result<(), Error> {
        let Some(first) = self.keys.first() else { return Ok(()) };
        Ok(copy_pages(first.device(), &self.stores, pairs)?)
    }

    /// Stores the step's keys and values in `layer`, then lets its queries attend over what is cached for their
    /// sequences, the step's own tokens included. `room` columns are left behind each row of the result.
    ///
    /// # Shapes
    /// `q`: `[N, H · D]`; `k`, `v`: `[N, K · D]`, columns of one buffer or not; returns `[N, H · D]` of `q`'s type.
    ///
    /// # Errors
    /// If the shapes do not fit, or the device fails.
    pub(crate) fn attend(
        &self,
        layer: usize,
        step: &Step,
        [q, k, v]: [&Tensor; 3],
        scale: f32,
        room: usize,
    ) -> Result<Wide, Error> {
        let device = q.device();
        let layer = self.layer(layer)?;
        let cache = layer.cache()?;
        let PagesShape { kv_heads, head_dim, .. } = self.shape;
        let _span = span(device, Phase::Attention)?;
        let from = matrix(q)?;
        write_pages(device, cache, matrix(k)?, matrix(v)?, &step.0)?;
        let out = Wide::empty(device, (from.rows, from.cols), room, q.dtype())?;
        let to: Matrix = matrix(out.buffer())?.columns(0, from.cols);
        let max_context = step.0.max_context();
        let floats = paged_attention_workspace(from.rows, from.cols / head_dim.max(1), kv_heads, head_dim, max_context);
        let workspace = (floats > 0).then(|| empty(device, floats, DType::F32)).transpose()?;
        let workspace = workspace.as_ref().map(array).transpose()?;
        paged_attention(device, to, from, cache, &step.0, scale, workspace)?;
        Ok(out)
    }
}
