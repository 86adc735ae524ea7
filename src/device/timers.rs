//! Where a step's time goes: a pair of moments of the queue around each piece of work, added up by phase.
//!
//! Off unless [`Queue::start_timing`] was called; then a span costs two records of events, and nothing waits.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use candle_core::Device;

use super::gpu::Event;
use super::{Error, Queue};

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

/// The measurements of a queue.
#[derive(Debug, Default)]
pub(super) struct Timers {
    is_on: AtomicBool,
    spans: Mutex<Vec<(Phase, Moment, Moment)>>,
}

#[derive(Debug)]
enum Moment {
    Host(Instant),
    Device(Event),
}

impl Moment {
    fn now(queue: &Queue) -> Result<Self, Error> {
        match queue.stream() {
            None => Ok(Self::Host(Instant::now())),
            Some(stream) => Ok(Self::Device(stream.record(true)?)),
        }
    }

    fn secs_until(&self, end: &Self) -> Result<f64, Error> {
        match (self, end) {
            (Self::Device(begin), Self::Device(end)) => begin.secs_until(end),
            (Self::Host(begin), Self::Host(end)) => Ok(end.duration_since(*begin).as_secs_f64()),
            _ => Ok(0.0),
        }
    }
}

/// Work of one phase, from its making to its drop.
#[derive(Debug)]
pub struct Span {
    open: Option<(Phase, Moment, Queue)>,
}

/// Begins a piece of work of a device's main queue.
///
/// # Errors
/// If the device fails.
pub fn span(device: &Device, phase: Phase) -> Result<Span, Error> {
    Queue::of(device)?.span(phase)
}

impl Drop for Span {
    fn drop(&mut self) {
        let Some((phase, begin, queue)) = self.open.take() else { return };
        // A failed record loses one measurement; the launch that follows reports the device's error.
        if let Ok(end) = Moment::now(&queue) {
            let mut spans = queue.timers().spans.lock().unwrap_or_else(PoisonError::into_inner);
            spans.push((phase, begin, end));
        }
    }
}

impl Queue {
    /// Begins a piece of work.
    ///
    /// # Errors
    /// If the device fails.
    pub fn span(&self, phase: Phase) -> Result<Span, Error> {
        if !self.timers().is_on.load(Ordering::Relaxed) {
            return Ok(Span { open: None });
        }
        Ok(Span { open: Some((phase, Moment::now(self)?, self.clone())) })
    }

    /// Starts measuring the spans of this queue.
    pub fn start_timing(&self) {
        self.timers().is_on.store(true, Ordering::Relaxed);
    }

    /// Stops measuring and adds up the seconds of each phase since [`Self::start_timing`]; waits for the queue.
    ///
    /// # Errors
    /// If the device fails.
    pub fn stop_timing(&self) -> Result<BTreeMap<Phase, f64>, Error> {
        self.timers().is_on.store(false, Ordering::Relaxed);
        self.synchronize()?;
        let spans = std::mem::take(&mut *self.timers().spans.lock().unwrap_or_else(PoisonError::into_inner));
        let mut seconds = BTreeMap::new();
        for (phase, begin, end) in spans {
            *seconds.entry(phase).or_insert(0.0) += begin.secs_until(&end)?;
        }
        Ok(seconds)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use candle_core::Device;

    use super::Phase;
    use crate::device::Queue;

    #[test]
    fn spans_are_added_up_by_phase_while_timing_is_on() {
        let queue = Queue::of(&Device::Cpu).unwrap().beside().unwrap();
        let work = |phase| {
            let _span = queue.span(phase).unwrap();
            std::thread::sleep(Duration::from_millis(2));
        };
        work(Phase::Head);
        assert!(queue.stop_timing().unwrap().is_empty());
        queue.start_timing();
        work(Phase::Attention);
        work(Phase::Attention);
        work(Phase::Multiply);
        let seconds = queue.stop_timing().unwrap();
        assert_eq!(seconds.keys().copied().collect::<Vec<_>>(), [Phase::Multiply, Phase::Attention]);
        assert!(seconds[&Phase::Multiply] >= 2e-3 && seconds[&Phase::Attention] >= 4e-3, "{seconds:?}");
        work(Phase::Head);
        assert!(queue.stop_timing().unwrap().is_empty());
    }
}
