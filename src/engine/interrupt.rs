//! The question whether a pass is to be given up, asked between blocks: a signal must not wait for a long batch.

use std::sync::Arc;

use super::{Engine, Error};

/// Whether the run is to stop; asked from anywhere.
pub type IsInterrupted = Arc<dyn Fn() -> bool + Send + Sync>;

/// Who is asked, if anybody.
#[derive(Default)]
pub(super) struct Interrupt(Option<IsInterrupted>);

impl Interrupt {
    pub(super) fn ask(&mut self, is_interrupted: IsInterrupted) {
        self.0 = Some(is_interrupted);
    }

    /// # Errors
    /// If the run is to stop.
    pub(super) fn check(&self) -> Result<(), Error> {
        match &self.0 {
            Some(is_interrupted) if is_interrupted() => Err(Error::Interrupted),
            _ => Ok(()),
        }
    }
}

impl Engine {
    /// Asks between blocks whether a pass is to be given up.
    pub fn ask_whether_interrupted(&mut self, is_interrupted: IsInterrupted) {
        self.interrupt.ask(is_interrupted);
    }

    /// As [`Self::check_interrupt`] in the engine's own walks. Where ranks exchange the memory of GPUs a step is gone through: what
    /// was asked of the GPUs cannot be taken back on one rank alone.
    ///
    /// # Errors
    /// If a pass is to be given up.
    pub(super) fn check_between_blocks(&self) -> Result<(), Error> {
        let sharing = self.store.sharing();
        if sharing.world_size() > 1 && sharing.exchanges_on_device() { Ok(()) } else { self.interrupt.check() }
    }

    /// For walks outside of the engine.
    ///
    /// # Errors
    /// If a pass is to be given up.
    pub fn check_interrupt(&self) -> Result<(), Error> {
        self.interrupt.check()
    }
}

impl std::fmt::Debug for Interrupt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() { "Interrupt(asked)" } else { "Interrupt(never)" })
    }
}
