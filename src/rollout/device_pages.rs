//! The cache's pages on a GPU.
//!
//! [`super::kv_cache`] is the only caller. Copies that the scheduler asks for while it plans a step are done together
//! before the step; one that depends on another that still waits does not wait with it.

use candle_core::{Device, Tensor};

use super::Error;
use super::decode_model::StepBatch;
use super::kv_cache::{KvShape, sequences};
use super::pages::{PAGE_TOKENS, PageId};
use crate::device::free_memory;
use crate::ops;
use crate::ops::Wide;
pub(super) use crate::ops::cuda::paged_attention::LayerPages;
use crate::ops::cuda::paged_attention::{Pages, PagesShape, Step};

/// Pages on a GPU and the copies that wait for the next step.
#[derive(Debug)]
pub(super) struct DevicePages {
    device: Device,
    pages: Pages,
    /// Source and destination; no destination is another copy's source or destination.
    waiting: Vec<[PageId; 2]>,
}

/// Pages for which a GPU has room beside what a step takes.
pub(super) fn most_pages(shape: KvShape, step_bytes: u64, device: &Device) -> Result<usize, Error> {
    let free_bytes = free_memory(device).map_err(ops::Error::from)?.saturating_sub(step_bytes);
    Ok((free_bytes / shape.page_bytes().max(1) as u64) as usize)
}

impl DevicePages {
    /// For a device on which a step takes `step_bytes` besides.
    pub(super) fn new(shape: KvShape, num_pages: usize, step_bytes: u64, device: &Device) -> Result<Self, Error> {
        let KvShape { layers, kv_heads, head_dim, dtype } = shape;
        let bytes = shape.page_bytes().saturating_mul(num_pages) as u64;
        let free_bytes = free_memory(device).map_err(ops::Error::from)?;
        if bytes.saturating_add(step_bytes) > free_bytes {
            return Err(Error::KvDeviceMemory { bytes, step_bytes, free_bytes });
        }
        let shape = PagesShape { layers, pages: num_pages, page_tokens: PAGE_TOKENS, kv_heads, head_dim };
        let pages = Pages::new(device, shape, dtype)?;
        Ok(Self { device: device.clone(), pages, waiting: Vec::new() })
    }

    pub(super) fn copy(&mut self, from: PageId, to: PageId) -> Result<(), Error> {
        let depends = |&[source, destination]: &[PageId; 2]| from == destination || to == source || to == destination;
        if self.waiting.iter().any(depends) {
            self.copy_waiting()?;
        }
        self.waiting.push([from, to]);
        Ok(())
    }

    /// The pages of all layers, which share the memory.
    pub(super) fn layers(&self) -> Result<Vec<LayerPages>, Error> {
        (0..self.pages.shape().layers).map(|layer| Ok(self.pages.layer(layer)?)).collect()
    }

    /// Does the copies that wait.
    pub(super) fn copy_waiting(&mut self) -> Result<(), Error> {
        Ok(self.pages.copy(&std::mem::take(&mut self.waiting))?)
    }

    pub(super) fn begin_step(&mut self, batch: &StepBatch) -> Result<Step, Error> {
        self.copy_waiting()?;
        Ok(Step::new(&self.device, self.pages.shape(), &sequences(batch))?)
    }

    pub(super) fn attend(
        &self,
        layer: usize,
        step: &Step,
        qkv: [&Tensor; 3],
        scale: f32,
        room: usize,
    ) -> Result<Wide, Error> {
        Ok(self.pages.attend(layer, step, qkv, scale, room)?)
    }
}
