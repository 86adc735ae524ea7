//! Work that is recorded once and repeated: a launch of the whole instead of one for each kernel.

use super::gpu::Graph;
use super::{Error, Queue, Ticket, argument};

/// Recorded work of a queue. It names memory by address: what owns that memory must outlive it, and is therefore kept by it.
pub struct Captured<K> {
    graph: Graph,
    queue: Queue,
    kept: K,
}

impl<K> std::fmt::Debug for Captured<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Captured").field("queue", &self.queue).finish_non_exhaustive()
    }
}

impl Queue {
    /// Records what `work` asks of the queue; nothing of it is done. `kept` owns all memory that the work names, and `work` asks
    /// for no other: neither allocates, waits nor copies from memory of the host.
    ///
    /// # Errors
    /// If the queue is the host's, `work` fails, or the driver cannot record it.
    pub fn capture<K, E: From<Error>>(
        &self,
        kept: K,
        work: impl FnOnce(&K) -> Result<(), E>,
    ) -> Result<Captured<K>, E> {
        let Some(stream) = self.stream() else {
            return Err(argument("recording", "queue", "the host's", "a GPU's").into());
        };
        stream.begin_capture()?;
        let done = work(&kept);
        // Recording ends in any case: the queue is of no use before.
        let graph = stream.end_capture();
        done?;
        Ok(Captured { graph: graph?, queue: self.clone(), kept })
    }
}

impl<K> Captured<K> {
    /// Asks the queue for the work once more.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn repeat(&self) -> Result<(), Error> {
        self.graph.launch()
    }

    /// What it keeps.
    pub fn kept(&self) -> &K {
        &self.kept
    }
}

impl<K> Drop for Captured<K> {
    fn drop(&mut self) {
        // A graph is not destroyed while it runs. A device that has failed runs nothing.
        let _ = self.queue.ticket().and_then(|ticket: Ticket| ticket.wait(None));
    }
}
