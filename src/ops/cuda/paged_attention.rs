//! A paged key-value cache on the device, and attention over it.

use candle_core::{DType, Device, Tensor};

use crate::device::timers::{Phase, span};
use crate::device::{Matrix, array, empty, matrix, upload_u32};
use crate::kernels::cuda::{
    PagedCache, PagedRows, copy_pages, page_stores, paged_attention, paged_attention_workspace, write_pages,
};
use crate::ops::paged_attention::{PagedSequence, check_sequences};
use crate::ops::{Error, Wide, shape_error};

/// Pages that one launch copies.
const MOST_COPIES: usize = 4096;

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
    /// The addresses of all of them.
    stores: Tensor,
}

/// Where a step's tokens go and what they see, on the device.
#[derive(Debug)]
pub(crate) struct Step {
    /// u32 `[2 N + N + pages]`: the parts below, which thus come in one copy.
    numbers: Tensor,
    tokens: usize,
    max_context: usize,
}

impl Step {
    /// Copies the places of the sequences' new tokens, their page lists and contexts to the device.
    ///
    /// # Errors
    /// If rows or pages do not fit a cache of `shape`, or memory runs out.
    pub(crate) fn new(device: &Device, shape: PagesShape, sequences: &[PagedSequence<'_>]) -> Result<Self, Error> {
        let page_tokens = shape.page_tokens;
        let tokens = check_sequences(sequences, page_tokens, shape.pages)?;
        let (mut rows, mut slots) = (Vec::with_capacity(3 * tokens), Vec::with_capacity(tokens));
        let (mut tables, mut max_context) = (Vec::new(), 0);
        for PagedSequence { rows: new, pages, context } in sequences {
            let end = context + new.len();
            for position in *context..end {
                rows.extend([tables.len() as u32, position as u32 + 1]);
                slots.push(pages[position / page_tokens] * page_tokens as u32 + (position % page_tokens) as u32);
            }
            tables.extend_from_slice(&pages[..end.div_ceil(page_tokens)]);
            max_context = max_context.max(end);
        }
        rows.append(&mut slots);
        rows.append(&mut tables);
        Ok(Self { numbers: upload_u32(device, &rows)?, tokens, max_context })
    }

    fn rows(&self) -> Result<Tensor, Error> {
        Ok(self.numbers.narrow(0, 0, 2 * self.tokens)?)
    }

    fn slots(&self) -> Result<Tensor, Error> {
        Ok(self.numbers.narrow(0, 2 * self.tokens, self.tokens)?)
    }

    fn tables(&self) -> Result<Tensor, Error> {
        let first = 3 * self.tokens;
        Ok(self.numbers.narrow(0, first, self.numbers.elem_count() - first)?)
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
        let stores = keys.iter().chain(&values).map(array).collect::<Result<Vec<_>, _>>()?;
        let stores = page_stores(device, &stores)?;
        Ok(Self { shape, dtype, keys, values, stores })
    }

    pub(crate) fn shape(&self) -> PagesShape {
        self.shape
    }

    fn layer(&self, layer: usize) -> Result<PagedCache, Error> {
        let (Some(keys), Some(values)) = (self.keys.get(layer), self.values.get(layer)) else {
            return Err(shape_error("key-value cache", "layer", layer, format!("below {}", self.shape.layers)));
        };
        let PagesShape { page_tokens, kv_heads, head_dim, .. } = self.shape;
        Ok(PagedCache {
            keys: array(keys)?,
            values: array(values)?,
            dtype: self.dtype,
            kv_heads,
            head_dim,
            page_tokens,
        })
    }

    /// Copies whole pages in every layer; no destination may be another copy's source or destination.
    ///
    /// # Errors
    /// If a page does not exist, or the device fails.
    pub(crate) fn copy(&self, pairs: &[[u32; 2]]) -> Result<(), Error> {
        if let Some(pair) = pairs.iter().find(|pair| pair.iter().any(|&page| page as usize >= self.shape.pages)) {
            return Err(shape_error("copy pages", "pair", pair, format!("pages below {}", self.shape.pages)));
        }
        if self.shape.layers == 0 {
            return Ok(());
        }
        let (device, page_bytes) = (self.stores.device(), self.layer(0)?.page_bytes());
        for pairs in pairs.chunks(MOST_COPIES) {
            let pairs = upload_u32(device, pairs.as_flattened())?;
            copy_pages(device, array(&self.stores)?, array(&pairs)?, page_bytes)?;
        }
        Ok(())
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
        let cache = self.layer(layer)?;
        let PagesShape { kv_heads, head_dim, .. } = self.shape;
        let _span = span(device, Phase::Attention)?;
        let from = matrix(q)?;
        let (rows, slots, tables) = (step.rows()?, step.slots()?, step.tables()?);
        write_pages(device, cache, matrix(k)?, matrix(v)?, array(&slots)?)?;
        let out = Wide::empty(device, (from.rows, from.cols), room, q.dtype())?;
        let to: Matrix = matrix(out.buffer())?.columns(0, from.cols);
        let max_context = step.max_context;
        let floats = paged_attention_workspace(from.rows, from.cols / head_dim.max(1), kv_heads, head_dim, max_context);
        let workspace = (floats > 0).then(|| empty(device, floats, DType::F32)).transpose()?;
        let workspace = workspace.as_ref().map(array).transpose()?;
        let step = PagedRows { tables: array(&tables)?, rows: array(&rows)?, max_context };
        paged_attention(device, to, from, cache, step, scale, workspace)?;
        Ok(out)
    }
}
