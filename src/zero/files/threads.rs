//! Threads that read and write files while others compute.

use std::io;
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;

/// Bytes that one thread reads or writes at a time.
const PIECE: usize = 8 << 20;
/// Pieces that are read or written at a time: what keeps a disk busy.
const AT_A_TIME: usize = 4;
/// More than anyone asks for.
const MOST_WAITING: usize = 4096;

type Job = Box<dyn FnOnce() + Send>;

/// A thread that does one job after the other, in the order in which they are asked for.
#[derive(Debug)]
pub(super) struct Thread {
    jobs: Option<SyncSender<Job>>,
    handle: Option<JoinHandle<()>>,
}

impl Thread {
    /// A thread for which so many jobs may wait; who asks for another one waits as well.
    pub(super) fn new(name: &str, waiting: usize) -> io::Result<Self> {
        let (jobs, next) = mpsc::sync_channel::<Job>(waiting.min(MOST_WAITING));
        let all = move || next.into_iter().for_each(|job| job());
        let handle = std::thread::Builder::new().name(name.into()).spawn(all)?;
        Ok(Self { jobs: Some(jobs), handle: Some(handle) })
    }

    /// Asks for a job. It is dropped undone where the thread has ended.
    pub(super) fn ask(&self, job: impl FnOnce() + Send + 'static) {
        if let Some(jobs) = &self.jobs {
            // What waits for the job sees that it was dropped.
            let _ = jobs.send(Box::new(job));
        }
    }

    /// Waits until all jobs are done and ends the thread.
    pub(super) fn end(&mut self) {
        self.jobs = None;
        if let Some(Err(_)) = self.handle.take().map(JoinHandle::join) {
            tracing::error!("a thread for files panicked");
        }
    }
}

/// Runs `work` on the pieces of memory that lies in a file from `start` on, several at a time.
pub(super) fn in_pieces(
    parts: Vec<&mut [u8]>,
    start: u64,
    work: impl Fn(&mut [u8], u64) -> io::Result<()> + Sync,
) -> io::Result<()> {
    let mut at = start;
    let mut pieces = Vec::new();
    for piece in parts.into_iter().flat_map(|part| part.chunks_mut(PIECE)) {
        let next = at + piece.len() as u64;
        pieces.push((piece, at));
        at = next;
    }
    let bytes = at - start;
    let threads = AT_A_TIME.min(bytes.div_ceil(PIECE as u64) as usize);
    let pieces = Mutex::new(pieces.into_iter());
    let one_after_the_other = || {
        loop {
            let next = pieces.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((piece, at)) = next else { return Ok(()) };
            work(piece, at)?;
        }
    };
    if threads <= 1 {
        return one_after_the_other();
    }
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(one_after_the_other)).collect();
        let own = one_after_the_other();
        let panicked = |_| Err(io::Error::other("a thread for files panicked"));
        others.into_iter().fold(own, |done, other| done.and(other.join().unwrap_or_else(panicked)))
    })
}
