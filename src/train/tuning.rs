//! How a run's matrix products are made on a GPU: the first steps try algorithms, announced, and the run's folder keeps what was
//! chosen, so that a run which goes on makes the same products with the same bits.

use std::path::{Path, PathBuf};

use candle_core::Device;

use super::Backend;
use crate::kernels::cuda::{
    Taken, begin_step, choices_text, num_noted, set_deterministic, start_choices, take_choices, try_noted,
};

/// File of an `output_dir` with the choices.
const CHOICES: &str = "choices.json";
/// More than choices come to.
const MOST_BYTES: u64 = 64 << 20;

/// The products of a run on a GPU.
#[derive(Debug)]
pub(super) struct Tuning {
    device: Device,
    /// Where choices are kept, if they are.
    file: Option<PathBuf>,
    /// Whether this rank keeps its own there.
    writes: bool,
}

impl Tuning {
    /// Begins to note products for trials, or with `is_deterministic` makes all sums in one order and leaves each product to the
    /// library's choice or to one that was kept; `None` on the CPU, which has one way for each.
    ///
    /// # Errors
    /// If the device refuses.
    pub(super) fn new(backend: &Backend, is_deterministic: bool, writes: bool) -> anyhow::Result<Option<Self>> {
        if !backend.device.is_cuda() {
            return Ok(None);
        }
        set_deterministic(&backend.device, is_deterministic)?;
        start_choices(&backend.device, !is_deterministic)?;
        Ok(Some(Self { device: backend.device.clone(), file: None, writes }))
    }

    /// Takes the choices in that `from`, the folder of a run, holds, and keeps those to come in `folder`. Those of a run that is
    /// gone on from after `resumed` steps count from where they came, others from the start.
    ///
    /// # Errors
    /// If the file cannot be read or the device refuses.
    pub(super) fn keep(&mut self, from: &Path, folder: &Path, resumed: Option<u64>) -> anyhow::Result<()> {
        begin_step(&self.device, resumed.unwrap_or(0))?;
        self.file = Some(folder.join(CHOICES));
        let kept = from.join(CHOICES);
        if !kept.is_file() {
            return Ok(());
        }
        let taken = match crate::fs::read_bounded(&kept, MOST_BYTES)? {
            Some(text) => take_choices(&self.device, &text, resumed.is_none())?,
            None => Taken::Damaged(format!("it is larger than {MOST_BYTES} bytes")),
        };
        match taken {
            Taken::Choices(count) => {
                tracing::info!("{count} matrix products are made as `{}` says", kept.display());
                // As they count here: a run that goes on from this one finds them so.
                self.write()?;
            }
            Taken::Foreign(whose) => {
                tracing::warn!("`{}` holds choices {whose}; they are not used", kept.display());
            }
            Taken::Damaged(reason) => {
                tracing::warn!("`{}` cannot be read ({reason}); its choices are not used", kept.display());
            }
        }
        Ok(())
    }

    fn write(&self) -> anyhow::Result<()> {
        if let (Some(file), Some(text), true) = (&self.file, choices_text(&self.device)?, self.writes) {
            crate::fs::write_atomic(file, text.as_bytes())?;
        }
        Ok(())
    }

    /// Tries algorithms for the products that were new in the steps so far, of which `step` were taken, and keeps what it chose.
    /// `say` announces it; `should_stop` asks whether to leave the rest for later. Returns the number of products and the seconds
    /// that it took, or `None` if nothing was new.
    ///
    /// # Errors
    /// If the device fails or the file cannot be written.
    pub(super) fn after_step(
        &mut self,
        step: u64,
        say: &dyn Fn(&str),
        should_stop: &dyn Fn() -> bool,
    ) -> anyhow::Result<Option<(usize, f64)>> {
        begin_step(&self.device, step)?;
        let count = num_noted(&self.device)?;
        if count == 0 {
            return Ok(None);
        }
        let products = |count: usize| format!("{count} matrix product{}", if count == 1 { "" } else { "s" });
        say(&format!("tuning {}", products(count)));
        let tried = try_noted(&self.device, step, should_stop)?;
        if tried.products > 0 {
            say(&format!("tuned {} in {:.1} s", products(tried.products), tried.secs));
            self.write()?;
        }
        Ok(Some((tried.products, tried.secs)))
    }
}
