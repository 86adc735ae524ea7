//! An exchange over the control plane: bytes go through the host and a thread of their own, for ranks without NCCL.

use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use half::{bf16, f16};
use rayon::prelude::*;

use super::exchange::{check_parts, check_ranks, check_values, device_error, ranges_of};
use super::{Error, Exchange, Ranks, Sum};
use crate::device::{Buffer, Part, Queue, Ticket, Work};

/// Values that one core adds at a time.
const CHUNK: usize = 1 << 16;

/// An exchange whose thread does what it is asked for in order. Dropped, it does the rest first.
#[derive(Debug)]
pub struct OnHost {
    rank: usize,
    world_size: usize,
    /// `None` only while it is dropped.
    jobs: Option<Sender<Job>>,
    problem: Arc<Mutex<Option<Error>>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
enum Job {
    Gather {
        shard: Part,
        full: Part,
        after: Ticket,
        work: Work,
    },
    Reduce {
        full: Part,
        shard: Part,
        sum: Sum,
        after: Ticket,
        work: Work,
    },
    ToAll {
        to: Vec<Vec<Part>>,
        from: Vec<Vec<Part>>,
        after: Ticket,
        work: Work,
    },
    /// The end of a group.
    Mark(Work),
}

impl OnHost {
    /// An exchange between `ranks`, which nobody else may talk over: its calls would come between others. `queue` copies what
    /// lies on its device; of host memory it is the host's own.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub fn over(ranks: Arc<dyn Ranks>, queue: Queue) -> Result<Self, Error> {
        let (rank, world_size) = (ranks.rank(), ranks.world_size());
        let problem = Arc::new(Mutex::new(None));
        let (jobs, received) = channel();
        let worker = Worker { ranks, queue, problem: Arc::clone(&problem) };
        let thread = std::thread::Builder::new().name("exchange".into()).spawn(move || worker.run(&received));
        let thread = thread.map_err(|error| device_error(rank, "starting the exchange's thread", error))?;
        Ok(Self { rank, world_size, jobs: Some(jobs), problem, thread: Some(thread) })
    }

    fn ask(&self, job: impl FnOnce(Work) -> Job) -> Result<Ticket, Error> {
        self.check()?;
        let (work, ticket) = Ticket::promise();
        let sent = self.jobs.as_ref().map(|jobs| jobs.send(job(work)));
        match sent {
            Some(Ok(())) => Ok(ticket),
            _ => Err(device_error(self.rank, "exchange", "its thread has ended")),
        }
    }
}

impl Drop for OnHost {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so itself.
            let _ = thread.join();
        }
    }
}

impl Exchange for OnHost {
    fn all_gather(&self, shard: &Part, full: &Part, after: &Ticket) -> Result<Ticket, Error> {
        check_parts("all_gather", self.world_size, shard, full)?;
        self.ask(|work| Job::Gather { shard: shard.clone(), full: full.clone(), after: after.clone(), work })
    }

    fn reduce_scatter(&self, full: &Part, shard: &Part, sum: Sum, after: &Ticket) -> Result<Ticket, Error> {
        check_parts("reduce_scatter", self.world_size, shard, full)?;
        check_values("reduce_scatter", self.world_size, shard, sum)?;
        self.ask(|work| Job::Reduce { full: full.clone(), shard: shard.clone(), sum, after: after.clone(), work })
    }

    fn all_gather_ranges(&self, full: &Part, ranges: &[Range<usize>], after: &Ticket) -> Result<Ticket, Error> {
        let parts = ranges_of("all_gather_ranges", self.world_size, full, ranges)?;
        let own = &parts[self.rank];
        let of_others = |part: &Part, rank: usize| if rank == self.rank { Vec::new() } else { vec![part.clone()] };
        let to: Vec<_> = (0..self.world_size).map(|rank| of_others(own, rank)).collect();
        let from: Vec<_> = parts.iter().enumerate().map(|(rank, part)| of_others(part, rank)).collect();
        self.all_to_all(&to, &from, after)
    }

    fn all_to_all(&self, to: &[Vec<Part>], from: &[Vec<Part>], after: &Ticket) -> Result<Ticket, Error> {
        check_ranks("all_to_all", self.world_size, to.len())?;
        check_ranks("all_to_all", self.world_size, from.len())?;
        self.ask(|work| Job::ToAll { to: to.to_vec(), from: from.to_vec(), after: after.clone(), work })
    }

    fn grouped(&self, work: &mut dyn FnMut(&dyn Exchange) -> Result<(), Error>) -> Result<Ticket, Error> {
        work(self)?;
        self.ask(Job::Mark)
    }

    fn check(&self) -> Result<(), Error> {
        let problem = self.problem.lock().unwrap_or_else(PoisonError::into_inner);
        problem.clone().map_or(Ok(()), Err)
    }
}

/// The thread's side.
struct Worker {
    ranks: Arc<dyn Ranks>,
    queue: Queue,
    problem: Arc<Mutex<Option<Error>>>,
}

impl Worker {
    /// Does one job after another. After an error the ranks are at different ones, and all that come are given up.
    fn run(self, jobs: &Receiver<Job>) {
        for job in jobs {
            let (result, work) = match job {
                Job::Gather { shard, full, after, work } => (self.gather(&shard, &full, &after), work),
                Job::Reduce { full, shard, sum, after, work } => (self.reduce(&full, &shard, sum, &after), work),
                Job::ToAll { to, from, after, work } => (self.to_all(&to, &from, &after), work),
                Job::Mark(work) => (Ok(()), work),
            };
            match result {
                Ok(()) => work.done(),
                Err(error) => {
                    // Before the ticket is given up, so that who sees that finds the reason.
                    *self.problem.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                    break;
                }
            }
        }
        // The other ranks are told at once that this one comes no more.
        drop(self);
        jobs.iter().for_each(drop);
    }

    fn gather(&self, shard: &Part, full: &Part, after: &Ticket) -> Result<(), Error> {
        const OPERATION: &str = "all_gather";
        let all = self.all_bytes(OPERATION, shard, after)?;
        self.write(OPERATION, &all.concat(), full)
    }

    fn reduce(&self, full: &Part, shard: &Part, sum: Sum, after: &Ticket) -> Result<(), Error> {
        const OPERATION: &str = "reduce_scatter";
        let all = self.all_bytes(OPERATION, full, after)?;
        let own = self.ranks.rank() * shard.len()..(self.ranks.rank() + 1) * shard.len();
        let parts: Vec<&[u8]> = all.iter().map(|bytes| &bytes[own.clone()]).collect();
        let bytes = match sum {
            Sum::F32 => added(&parts, f32::from_le_bytes, f32::to_le_bytes),
            Sum::Bf16 => added(&parts, |b| bf16::from_le_bytes(b).to_f32(), |v| bf16::from_f32(v).to_le_bytes()),
            Sum::F16 => added(&parts, |b| f16::from_le_bytes(b).to_f32(), |v| f16::from_f32(v).to_le_bytes()),
        };
        self.write(OPERATION, &bytes, shard)
    }

    fn to_all(&self, to: &[Vec<Part>], from: &[Vec<Part>], after: &Ticket) -> Result<(), Error> {
        const OPERATION: &str = "all_to_all";
        let own = self.ranks.rank();
        let message = |(rank, parts): (usize, &Vec<Part>)| {
            let others = parts.iter().filter(|_| rank != own);
            let bytes = others.map(|part| self.read(OPERATION, part, after)).collect::<Result<Vec<_>, _>>()?;
            Ok::<_, Error>(bytes.concat())
        };
        let messages = to.iter().enumerate().map(message).collect::<Result<Vec<_>, _>>()?;
        let received = self.ranks.all_to_all_bytes(messages)?;
        for (peer, (bytes, parts)) in received.iter().zip(from).enumerate().filter(|(peer, _)| *peer != own) {
            let expected: usize = parts.iter().map(Part::len).sum();
            if bytes.len() != expected {
                return Err(Error::Mismatch {
                    rank: own,
                    operation: OPERATION,
                    got: format!("{expected} bytes expected"),
                    peer,
                    peer_operation: OPERATION,
                    expected: format!("{} bytes sent", bytes.len()),
                });
            }
            let mut rest = bytes.as_slice();
            for part in parts {
                let (now, later) = rest.split_at(part.len());
                self.write(OPERATION, now, part)?;
                rest = later;
            }
        }
        Ok(())
    }

    /// The bytes of a part.
    fn read(&self, operation: &'static str, part: &Part, after: &Ticket) -> Result<Vec<u8>, Error> {
        let failed = |error| device_error(self.ranks.rank(), operation, error);
        let staging = Arc::new(Buffer::host(part.len()));
        self.queue.copy(part, &staging.whole(), after).and_then(|copied| copied.wait(None)).map_err(failed)?;
        staging.with_bytes(<[u8]>::to_vec).map_err(failed)
    }

    /// Every rank's bytes of a part, in the order of the ranks and all of one length.
    fn all_bytes(&self, operation: &'static str, part: &Part, after: &Ticket) -> Result<Vec<Vec<u8>>, Error> {
        let rank = self.ranks.rank();
        let own = self.read(operation, part, after)?;
        let all = self.ranks.all_gather_bytes(&own)?;
        match all.iter().position(|bytes| bytes.len() != own.len()) {
            None => Ok(all),
            Some(peer) => Err(Error::Mismatch {
                rank,
                operation,
                got: format!("{} bytes", own.len()),
                peer,
                peer_operation: operation,
                expected: format!("{} bytes", all[peer].len()),
            }),
        }
    }

    fn write(&self, operation: &'static str, bytes: &[u8], to: &Part) -> Result<(), Error> {
        let failed = |error| device_error(self.ranks.rank(), operation, error);
        let mut staging = Buffer::host(bytes.len());
        staging.write(0, bytes).map_err(failed)?;
        let staging = Arc::new(staging).whole();
        self.queue.copy(&staging, to, &Ticket::done()).and_then(|copied| copied.wait(None)).map_err(failed)
    }
}

/// The sum of values, the first part's first, in f32.
fn added<const N: usize>(
    parts: &[&[u8]],
    read: impl Fn([u8; N]) -> f32 + Sync,
    write: impl Fn(f32) -> [u8; N] + Sync,
) -> Vec<u8> {
    let mut bytes = vec![0; parts.first().map_or(0, |part| part.len())];
    bytes.par_chunks_mut(CHUNK * N).enumerate().for_each(|(index, chunk)| {
        for (value, place) in chunk.as_chunks_mut::<N>().0.iter_mut().zip(index * CHUNK..) {
            let of_rank = |part: &&[u8]| read(std::array::from_fn(|byte| part[place * N + byte]));
            let mut terms = parts.iter().map(of_rank);
            let first = terms.next().unwrap_or(0.0);
            *value = write(terms.fold(first, |sum, term| sum + term));
        }
    });
    bytes
}

#[cfg(test)]
#[path = "host_tests.rs"]
mod tests;
