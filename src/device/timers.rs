//! Where a step's time on the device goes: a pair of events around each piece of work, added up by phase.
//!
//! Off unless [`start`] was called; then a span costs two event records, and nothing waits.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::Device;
use cudarc::driver::CudaEvent;
use cudarc::driver::sys::CUevent_flags;

use super::memory::cuda;
use super::{Error, failed};

/// What a piece of work is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Unpacking weights.
    Dequantize,
    /// Products with base weights.
    Multiply,
    /// Products of the adapters alone.
    LowRank,
    /// Attention.
    Attention,
    /// Norms, rotations, activations, residuals.
    Pointwise,
    /// The head's products and losses.
    Head,
    /// Norms of gradients, the optimizer.
    Optimizer,
}

impl Phase {
    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dequantize => "dequantise",
            Self::Multiply => "multiply",
            Self::LowRank => "low rank",
            Self::Attention => "attention",
            Self::Pointwise => "pointwise",
            Self::Head => "head",
            Self::Optimizer => "optimizer",
        }
    }
}

static IS_ON: AtomicBool = AtomicBool::new(false);
static SPANS: Mutex<Vec<(Phase, CudaEvent, CudaEvent)>> = Mutex::new(Vec::new());

/// Work of one phase, from its making to its drop.
pub struct Span<'a> {
    open: Option<(Phase, CudaEvent, &'a Device)>,
}

/// Begins a piece of work.
///
/// # Errors
/// If the device fails.
pub fn span(device: &Device, phase: Phase) -> Result<Span<'_>, Error> {
    if !IS_ON.load(Ordering::Relaxed) {
        return Ok(Span { open: None });
    }
    Ok(Span { open: Some((phase, record(device)?, device)) })
}

fn record(device: &Device) -> Result<CudaEvent, Error> {
    let stream = cuda(device)?.cuda_stream();
    let event = stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
    event.map_err(failed("recording an event"))
}

impl Drop for Span<'_> {
    fn drop(&mut self) {
        let Some((phase, begin, device)) = self.open.take() else { return };
        // A failed record loses one measurement; the launch that follows reports the device's error.
        if let (Ok(end), Ok(mut spans)) = (record(device), SPANS.lock()) {
            spans.push((phase, begin, end));
        }
    }
}

/// Starts measuring.
pub fn start() {
    IS_ON.store(true, Ordering::Relaxed);
}

/// Stops measuring and adds up the seconds of each phase since [`start`]; waits for the device.
///
/// # Errors
/// If the device fails.
pub fn stop(device: &Device) -> Result<BTreeMap<Phase, f64>, Error> {
    IS_ON.store(false, Ordering::Relaxed);
    device.synchronize()?;
    let spans = SPANS.lock().map(|mut spans| std::mem::take(&mut *spans)).unwrap_or_default();
    let mut seconds = BTreeMap::new();
    for (phase, begin, end) in spans {
        let milliseconds = begin.elapsed_ms(&end).map_err(failed("reading an event"))?;
        *seconds.entry(phase).or_insert(0.0) += f64::from(milliseconds) / 1e3;
    }
    Ok(seconds)
}
