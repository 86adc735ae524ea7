//! What a card reaches: measured once at the start of a run, or assumed by its generation.

use candle_core::{DType, Device};

use crate::model::layer::Work;

/// Rates of a card, for weighing what is computed against what is copied.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// FLOP/s of large products, one after the other, in the type of activations.
    pub products: f64,
    /// Bytes per second that kernels read and write in the card's own memory.
    pub memory: f64,
    /// Bytes per second of a copy between the card and page-locked memory, while another goes the other way.
    pub bus: f64,
    /// Bytes per second that come from other ranks.
    pub link: f64,
    /// Whether they are of this card, and not assumed.
    pub is_measured: bool,
}

/// Without its 16-bit units an H200 multiplies at a twelfth of their rate.
const F32_PART: f64 = 1.0 / 12.0;

impl Rates {
    /// Those of an H200 that works without a pause: the fastest card that was measured.
    pub const H200: Self = Self { products: 700e12, memory: 4.0e12, bus: 52e9, link: 225e9, is_measured: false };

    /// By generation, where nothing was measured: large 16-bit products, the memory, and the bus of the fastest cards of it. 9.0 is
    /// an H200, the others are three quarters of the vendor's dense rate and nine tenths of what the memory and PCI Express 3, 4
    /// or 5 in 16 lanes carry. The link is half of what NVLink carries one way, or the bus.
    pub fn assumed(device: &Device, compute: DType) -> Self {
        Self::of_generation(crate::device::compute_capability(device).unwrap_or((9, 0)), compute)
    }

    fn of_generation(capability: (i32, i32), compute: DType) -> Self {
        let (products, memory, bus, link) = match capability {
            (..=7, _) => (80e12, 0.5e12, 12e9, 12e9),
            (8, 0) => (230e12, 1.7e12, 24e9, 150e9),
            (8, 9) => (250e12, 0.9e12, 24e9, 24e9),
            (8, _) => (110e12, 0.7e12, 24e9, 24e9),
            (9, _) => return Self::H200.in_type(compute),
            (10 | 11, _) => (1700e12, 7.0e12, 52e9, 450e9),
            _ => (310e12, 1.6e12, 52e9, 52e9),
        };
        Self { products, memory, bus, link, is_measured: false }.in_type(compute)
    }

    fn in_type(self, compute: DType) -> Self {
        Self { products: if compute == DType::F32 { self.products * F32_PART } else { self.products }, ..self }
    }

    /// Seconds that work takes.
    pub(super) fn secs(&self, work: Work) -> f64 {
        work.flops / self.products + work.moved_bytes / self.memory
    }

    /// For people, of a run of so many ranks.
    pub fn describe(&self, world_size: usize) -> String {
        let link = match world_size {
            1 => String::new(),
            _ => format!(", {:.0} GB/s from other ranks", self.link / 1e9),
        };
        format!(
            "{:.0} TFLOP/s in products, {:.2} TB/s of device memory, {:.0} GB/s each way to host memory{link} ({})",
            self.products / 1e12,
            self.memory / 1e12,
            self.bus / 1e9,
            if self.is_measured { "measured" } else { "assumed by the card's generation" }
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_generation_has_rates_and_f32_is_slower() {
        for capability in [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)] {
            let [half, full] = [DType::BF16, DType::F32].map(|dtype| Rates::of_generation(capability, dtype));
            assert!(full.products < half.products && full.bus == half.bus, "{capability:?}");
            // A product is worth far more FLOPs than bytes everywhere.
            assert!(half.products / half.memory > 50.0 && half.memory / half.bus > 10.0, "{capability:?}");
            assert!(half.link >= half.bus && !half.is_measured);
        }
        assert_eq!(Rates::of_generation((9, 0), DType::BF16), Rates::H200);
    }

    #[test]
    fn work_takes_its_flops_and_its_bytes() {
        let rates = Rates { products: 10.0, memory: 2.0, ..Rates::H200 };
        assert!((rates.secs(Work { flops: 20.0, moved_bytes: 3.0 }) - 3.5).abs() < 1e-12);
    }
}
