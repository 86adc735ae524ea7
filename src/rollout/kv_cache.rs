//! Keys and values of all layers, in pages.
//!
//! The model writes the keys and values of a step's tokens into the pages that the scheduler chose and attends over
//! them; the scheduler copies a page before the first write to a shared one. The pages lie where the model computes: in
//! host memory, f32, or on a GPU in the type of the activations. Invariant: a page's content is only changed through
//! [`KvCache::write`], [`KvCache::attention`] and [`KvCache::copy_page`].
//!
//! Shapes: `P` pages, `T` = [`PAGE_TOKENS`] tokens in a page, `N` tokens of the step, `H` query heads, `K` key-value
//! heads, `D` head size.

use candle_core::{DType, Device, Tensor};

use super::Error;
use super::decode_model::{Span, StepBatch};
use super::device_pages::{DevicePages, LayerPages};
use super::pages::{PAGE_TOKENS, PageId};
use crate::ops::paged_attention::{PagedKv, PagedSequence, PagedShape, paged_attention};
use crate::ops::{Wide, buffer};

/// What one token leaves in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Decoder layers.
    pub layers: usize,
    /// `K`.
    pub kv_heads: usize,
    /// `D`.
    pub head_dim: usize,
    /// Type of keys and values: f32 in host memory, that of the activations on a GPU.
    pub dtype: DType,
}

impl KvShape {
    /// Numbers in one token's keys of one layer.
    pub const fn token_len(self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Bytes of one number.
    pub const fn element_bytes(self) -> usize {
        match self.dtype {
            DType::F16 | DType::BF16 => 2,
            _ => 4,
        }
    }

    /// Bytes of one page over all layers, keys and values.
    pub const fn page_bytes(self) -> usize {
        2 * self.layers * PAGE_TOKENS * self.token_len() * self.element_bytes()
    }
}

/// The paged cache.
#[derive(Debug)]
pub struct KvCache {
    shape: KvShape,
    num_pages: usize,
    device: Device,
    store: Store,
}

/// Where the pages lie.
#[derive(Debug)]
enum Store {
    Host(HostPages),
    Device(DevicePages),
}

/// Pages in host memory, f32.
#[derive(Debug)]
struct HostPages {
    /// Per layer `[P, T, K, D]`.
    keys: Vec<Vec<f32>>,
    /// Per layer `[P, T, K, D]`.
    values: Vec<Vec<f32>>,
}

/// A step's tokens with their places in the cache, on its device.
#[derive(Debug)]
pub struct CacheStep<'a> {
    batch: &'a StepBatch,
    on_device: Option<crate::ops::cuda::paged_attention::Step>,
}

/// The sequences of a step as attention takes them.
pub(super) fn sequences(batch: &StepBatch) -> Vec<PagedSequence<'_>> {
    let spans = batch.spans.iter();
    spans.map(|s| PagedSequence { rows: s.tokens.clone(), pages: &s.pages, context: s.context }).collect()
}

impl HostPages {
    /// The system gives the memory when a page is first written.
    fn new(shape: KvShape, num_pages: usize) -> Result<Self, Error> {
        let bytes = shape.page_bytes().saturating_mul(num_pages);
        // Only asks: zeroed memory is taken page by page, and would end the process where there is none.
        if Vec::<u8>::new().try_reserve_exact(bytes).is_err() {
            return Err(Error::KvMemory { bytes });
        }
        let layer = || vec![0.0; num_pages * PAGE_TOKENS * shape.token_len()];
        Ok(Self {
            keys: (0..shape.layers).map(|_| layer()).collect(),
            values: (0..shape.layers).map(|_| layer()).collect(),
        })
    }
}

/// Pages for which a device has room beside the `step_bytes` that a step takes; on the CPU that is not asked.
pub(super) fn most_pages(shape: KvShape, step_bytes: u64, device: &Device) -> Result<usize, Error> {
    match device {
        Device::Cuda(_) => super::device_pages::most_pages(shape, step_bytes, device),
        _ => Ok(usize::MAX),
    }
}

impl KvCache {
    /// An empty cache on the device that the model computes on, where a step takes `step_bytes` besides.
    ///
    /// # Errors
    /// If there is not so much memory, or the device does not hold keys and values of this type.
    pub fn new(shape: KvShape, num_pages: usize, step_bytes: u64, device: &Device) -> Result<Self, Error> {
        let store = match device {
            Device::Cpu if shape.dtype == DType::F32 => Store::Host(HostPages::new(shape, num_pages)?),
            Device::Cuda(_) => Store::Device(DevicePages::new(shape, num_pages, step_bytes, device)?),
            _ => return Err(Error::KvPlace { what: format!("{:?} pages on {:?}", shape.dtype, device.location()) }),
        };
        Ok(Self { shape, num_pages, device: device.clone(), store })
    }

    /// What one token leaves here.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// `P`.
    pub fn num_pages(&self) -> usize {
        self.num_pages
    }

    /// Bytes of the whole cache.
    pub fn bytes(&self) -> usize {
        self.num_pages * self.shape.page_bytes()
    }

    /// Whether it can serve in the place of a new one.
    pub fn fits(&self, shape: KvShape, num_pages: usize, device: &Device) -> bool {
        self.shape == shape && self.num_pages >= num_pages && self.device.same_device(device)
    }

    fn host(&self) -> Result<&HostPages, Error> {
        match &self.store {
            Store::Host(pages) => Ok(pages),
            Store::Device(_) => Err(Error::KvPlace { what: "host slices for pages on a GPU".into() }),
        }
    }

    fn host_mut(&mut self) -> Result<&mut HostPages, Error> {
        match &mut self.store {
            Store::Host(pages) => Ok(pages),
            Store::Device(_) => Err(Error::KvPlace { what: "host slices for pages on a GPU".into() }),
        }
    }

    /// Brings what every layer of a step needs to the cache's device, after the copies that were asked for.
    ///
    /// # Errors
    /// If the pages do not fit, or the device fails.
    pub fn begin_step<'a>(&mut self, batch: &'a StepBatch) -> Result<CacheStep<'a>, Error> {
        let on_device = match &mut self.store {
            Store::Device(pages) => Some(pages.begin_step(batch)?),
            Store::Host(_) => None,
        };
        Ok(CacheStep { batch, on_device })
    }

    /// Does the copies of pages that were asked for.
    ///
    /// # Errors
    /// If the device fails.
    pub(super) fn settle_copies(&mut self) -> Result<(), Error> {
        match &mut self.store {
            Store::Device(pages) => pages.copy_waiting(),
            Store::Host(_) => Ok(()),
        }
    }

    /// The pages of all layers on a GPU.
    ///
    /// # Errors
    /// If they are in host memory.
    pub(super) fn layer_pages(&self) -> Result<Vec<LayerPages>, Error> {
        match &self.store {
            Store::Device(pages) => pages.layers(),
            Store::Host(_) => Err(Error::KvPlace { what: "pages of a GPU for pages in host memory".into() }),
        }
    }

    /// Stores a step's keys and values in `layer`, then lets its queries attend over what is cached for their sequences,
    /// the step's own tokens included.
    ///
    /// # Shapes
    /// `q`: `[N, H · D]`; `k`, `v`: `[N, K · D]`, on the cache's device; returns `[N, H · D]`, on a GPU with `room` columns
    /// behind each row.
    ///
    /// # Errors
    /// If the layer, the shapes or the pages do not fit, or the device fails.
    ///
    /// # Equation
    /// As [`paged_attention`], with a scale of `1 / sqrt(D)`.
    pub fn attention(
        &mut self,
        layer: usize,
        step: &CacheStep<'_>,
        [q, k, v]: [&Tensor; 3],
        room: usize,
    ) -> Result<Wide, Error> {
        let head_dim = self.shape.head_dim;
        let scale = (head_dim as f32).sqrt().recip();
        if let (Store::Device(pages), Some(step)) = (&self.store, &step.on_device) {
            return pages.attend(layer, step, [q, k, v], scale, room);
        }
        // On the CPU there is no room, see `Wide`.
        let _ = room;
        let heads = q.dim(1)? / head_dim;
        let mut attended = vec![0.0; q.elem_count()];
        buffer::read(k, |k| buffer::read(v, |v| self.write_step(layer, step.batch, k, v)))???;
        buffer::read(q, |q| self.attend(layer, step.batch, heads, scale, q, &mut attended))??;
        Ok(Wide::plain(Tensor::from_vec(attended, q.shape(), &Device::Cpu)?)?)
    }

    /// Stores the keys and values of one sequence's new tokens in `layer`; the cache is in host memory.
    ///
    /// # Shapes
    /// `keys`, `values`: f32 `[span.tokens.len(), K, D]`, only this span's rows.
    /// # Errors
    /// If the layer, the lengths or the pages do not fit, or the pages are on a GPU.
    pub fn write(&mut self, layer: usize, span: &Span, keys: &[f32], values: &[f32]) -> Result<(), Error> {
        let token_len = self.shape.token_len();
        let expected = span.tokens.len() * token_len;
        for (name, got) in [("keys", keys.len()), ("values", values.len())] {
            if got != expected {
                return Err(Error::KvLength { name, got, expected });
            }
        }
        let (num_layers, num_pages) = (self.shape.layers, self.num_pages);
        let HostPages { keys: all_keys, values: all_values } = self.host_mut()?;
        let (Some(layer_keys), Some(layer_values)) = (all_keys.get_mut(layer), all_values.get_mut(layer)) else {
            return Err(Error::KvLayer { layer, num_layers });
        };
        let mut done = 0;
        while done < span.tokens.len() {
            let position = span.context + done;
            let slot = position % PAGE_TOKENS;
            let count = (PAGE_TOKENS - slot).min(span.tokens.len() - done);
            let page = span.pages.get(position / PAGE_TOKENS).copied().filter(|&p| (p as usize) < num_pages);
            let Some(page) = page else {
                return Err(Error::KvPage { position, pages: span.pages.clone(), num_pages });
            };
            let to = (page as usize * PAGE_TOKENS + slot) * token_len;
            let (from, len) = (done * token_len, count * token_len);
            layer_keys[to..to + len].copy_from_slice(&keys[from..from + len]);
            layer_values[to..to + len].copy_from_slice(&values[from..from + len]);
            done += count;
        }
        Ok(())
    }

    /// As [`KvCache::write`], for all sequences of a step.
    ///
    /// # Shapes
    /// `keys`, `values`: f32 `[N, K, D]`.
    /// # Errors
    /// If the layer, the lengths or the pages do not fit, or the pages are on a GPU.
    pub fn write_step(&mut self, layer: usize, batch: &StepBatch, keys: &[f32], values: &[f32]) -> Result<(), Error> {
        let token_len = self.shape.token_len();
        let expected = batch.tokens.len() * token_len;
        for (name, got) in [("keys", keys.len()), ("values", values.len())] {
            if got != expected {
                return Err(Error::KvLength { name, got, expected });
            }
        }
        for span in &batch.spans {
            let rows = span.tokens.start * token_len..span.tokens.end * token_len;
            self.write(layer, span, &keys[rows.clone()], &values[rows])?;
        }
        Ok(())
    }

    /// Attention of a step's queries over what is cached for their sequences, the step's own tokens included: call
    /// [`KvCache::write_step`] first.
    ///
    /// # Shapes
    /// `queries`, `out`: f32 `[N, H, D]`, `H` being `heads`.
    /// # Errors
    /// If the layer, the lengths or the pages do not fit, or the pages are on a GPU.
    pub fn attend(
        &self,
        layer: usize,
        batch: &StepBatch,
        heads: usize,
        scale: f32,
        queries: &[f32],
        out: &mut [f32],
    ) -> Result<(), Error> {
        let (keys, values) = self.layer(layer)?;
        let KvShape { kv_heads, head_dim, .. } = self.shape;
        let shape = PagedShape { heads, kv_heads, head_dim, page_tokens: PAGE_TOKENS };
        Ok(paged_attention(shape, scale, queries, PagedKv { keys, values }, &sequences(batch), out)?)
    }

    /// Keys and values of one layer, each `[P, T, K, D]`.
    ///
    /// # Errors
    /// If there is no such layer, or the pages are on a GPU.
    pub fn layer(&self, layer: usize) -> Result<(&[f32], &[f32]), Error> {
        let HostPages { keys, values } = self.host()?;
        match (keys.get(layer), values.get(layer)) {
            (Some(keys), Some(values)) => Ok((keys, values)),
            _ => Err(Error::KvLayer { layer, num_layers: self.shape.layers }),
        }
    }

    /// Copies a page's content in every layer; on a GPU before the next step.
    ///
    /// # Errors
    /// If one of the pages does not exist, or the device fails.
    pub fn copy_page(&mut self, from: PageId, to: PageId) -> Result<(), Error> {
        let page_len = PAGE_TOKENS * self.shape.token_len();
        for page in [from, to] {
            if page as usize >= self.num_pages {
                return Err(Error::KvPage { position: 0, pages: vec![from, to], num_pages: self.num_pages });
            }
        }
        match &mut self.store {
            Store::Host(HostPages { keys, values }) => {
                for store in keys.iter_mut().chain(values) {
                    let start = from as usize * page_len;
                    store.copy_within(start..start + page_len, to as usize * page_len);
                }
                Ok(())
            }
            Store::Device(pages) => pages.copy(from, to),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: KvShape = KvShape { layers: 2, kv_heads: 2, head_dim: 3, dtype: DType::F32 };

    fn numbers(count: usize, start: f32) -> Vec<f32> {
        (0..count).map(|i| start + i as f32).collect()
    }

    #[test]
    fn tokens_land_in_their_pages_and_copies_are_whole() {
        let mut cache = KvCache::new(SHAPE, 4, 0, &Device::Cpu).unwrap();
        assert_eq!(cache.bytes(), 4 * 2 * 2 * 16 * 6 * 4);
        // Tokens 14 .. 19 of a sequence in pages 3 and 1.
        let span = Span { tokens: 0..5, pages: vec![3, 1], context: 14 };
        let (keys, values) = (numbers(30, 1.0), numbers(30, 100.0));
        cache.write(1, &span, &keys, &values).unwrap();
        let (stored, stored_values) = cache.layer(1).unwrap();
        let page = 16 * 6;
        assert_eq!(stored[3 * page + 14 * 6..4 * page], keys[..12]);
        assert_eq!(stored[page..page + 18], keys[12..]);
        assert_eq!(stored_values[page..page + 18], values[12..]);
        assert!(cache.layer(0).unwrap().0.iter().all(|&x| x == 0.0));
        cache.copy_page(3, 0).unwrap();
        let (stored, _) = cache.layer(1).unwrap();
        assert_eq!(stored[..page], stored[3 * page..4 * page]);
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let mut cache = KvCache::new(SHAPE, 2, 0, &Device::Cpu).unwrap();
        let span = Span { tokens: 0..2, pages: vec![0], context: 15 };
        let rows = numbers(12, 0.0);
        assert!(matches!(cache.write(0, &span, &rows, &rows), Err(Error::KvPage { position: 16, .. })));
        assert!(matches!(cache.write(0, &span, &rows[..11], &rows), Err(Error::KvLength { got: 11, .. })));
        assert!(matches!(cache.write(2, &span, &rows, &rows), Err(Error::KvLayer { layer: 2, num_layers: 2 })));
        assert!(matches!(cache.copy_page(0, 2), Err(Error::KvPage { .. })));
        assert!(matches!(KvCache::new(SHAPE, usize::MAX / 4096, 0, &Device::Cpu), Err(Error::KvMemory { .. })));
        let shape = KvShape { dtype: DType::BF16, ..SHAPE };
        assert_eq!(2 * shape.page_bytes(), SHAPE.page_bytes());
        let message = KvCache::new(shape, 2, 0, &Device::Cpu).unwrap_err().to_string();
        assert!(message.contains("BF16 pages on Cpu"), "{message}");
    }
}
