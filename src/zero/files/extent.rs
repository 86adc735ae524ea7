//! Stretches of a file, read and written by its threads.

use std::io;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};

use super::{Shelf, lock};
use crate::device::{Buffer, Ticket};
use crate::zero::Error;

/// Host memory whose bytes come from a file or go there.
pub(in crate::zero) trait Memory: Send + 'static {
    /// Runs `visit` on all of its bytes, which may lie in several parts.
    ///
    /// # Errors
    /// If the host does not reach them.
    fn with_bytes(&mut self, visit: &mut dyn FnMut(Vec<&mut [u8]>) -> io::Result<()>) -> Result<io::Result<()>, Error>;
}

impl Memory for Vec<u8> {
    fn with_bytes(&mut self, visit: &mut dyn FnMut(Vec<&mut [u8]>) -> io::Result<()>) -> Result<io::Result<()>, Error> {
        Ok(visit(vec![self.as_mut_slice()]))
    }
}

impl Memory for Buffer {
    fn with_bytes(&mut self, visit: &mut dyn FnMut(Vec<&mut [u8]>) -> io::Result<()>) -> Result<io::Result<()>, Error> {
        Ok(visit(vec![self.bytes_mut()?]))
    }
}

/// A stretch of a file that is one owner's.
#[derive(Debug)]
pub(in crate::zero) struct Extent {
    shelf: Arc<Shelf>,
    start: u64,
    len: usize,
    /// When the last write is done.
    written: Mutex<Ticket>,
}

impl Shelf {
    /// Writes bytes behind all that lies in the file, and waits for it: where there is no room, this says so.
    pub(in crate::zero) fn put(self: &Arc<Self>, mut memory: impl Memory) -> Result<Extent, Error> {
        let mut len = 0;
        let counted = memory.with_bytes(&mut |parts| {
            len = parts.iter().map(|part| part.len()).sum();
            Ok(())
        })?;
        counted.map_err(|source| self.file.failed("write", Arc::new(source)))?;
        let start = self.reserve(len);
        self.file.write(&mut memory, start)?;
        Ok(Extent { shelf: self.clone(), start, len, written: Mutex::new(Ticket::done()) })
    }
}

impl Extent {
    /// Its length in bytes.
    pub(in crate::zero) fn len(&self) -> usize {
        self.len
    }

    /// The file that it is a stretch of.
    pub(in crate::zero) fn shelf(&self) -> &Arc<Shelf> {
        &self.shelf
    }

    /// Starts to fill memory, as long as this is, with the bytes that were written last.
    pub(in crate::zero) fn read<T: Memory>(&self, mut memory: T) -> Reading<T> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let (file, start, written) = (self.shelf.file.clone(), self.start, lock(&self.written).clone());
        self.shelf.reads.ask(move || {
            let is_there = written.wait(None).map_err(|error| file.problem(error));
            let done = is_there.and_then(|()| file.read(&mut memory, start));
            // A walk that was left waits for nothing.
            let _ = sender.send(done.map(|()| memory));
        });
        Reading(receiver)
    }

    /// Starts to write memory, as long as this is, and gives it back when it is written. Waits where many writes are on their way.
    ///
    /// # Errors
    /// If an earlier write failed.
    pub(in crate::zero) fn write<T: Memory>(
        &self,
        mut memory: T,
        give_back: impl FnOnce(T) + Send + 'static,
    ) -> Result<(), Error> {
        let before = self.shelf.file.clone();
        lock(&self.written).clone().wait(None).map_err(|error| before.problem(error))?;
        let (work, ticket) = Ticket::promise();
        *lock(&self.written) = ticket.clone();
        let (file, start) = (before.clone(), self.start);
        self.shelf.writes.ask(move || match file.write(&mut memory, start) {
            Ok(()) => {
                give_back(memory);
                work.done();
            }
            Err(error) => tracing::error!("{error}"),
        });
        if before.writes_at_a_time == 0 {
            ticket.wait(None).map_err(|error| before.problem(error))?;
        }
        Ok(())
    }
}

/// Memory that is being filled.
#[derive(Debug)]
pub(in crate::zero) struct Reading<T>(Receiver<Result<T, Error>>);

impl<T> Reading<T> {
    /// Lets the host wait until it is filled.
    ///
    /// # Errors
    /// If the file cannot be read, or what was to be read could not be written.
    pub(in crate::zero) fn wait(self) -> Result<T, Error> {
        self.0.recv().unwrap_or_else(|_| Err(crate::device::Error::GivenUp.into()))
    }
}
