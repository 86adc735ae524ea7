//! An exchange between GPUs, through NCCL.
//!
//! Work goes to a queue of its own beside the main one, in the order in which it is asked for, and the host waits for nothing.
//! NCCL itself would wait for a lost rank for ever, and whoever waits for the GPU with it. So a thread looks after the work that
//! is under way: if a rank is lost, or one piece takes longer than the deadline, the group is given up, the GPU goes on, and the
//! next call says why.
//!
//! NCCL adds in an order of its own. It is the same on every rank and for every call with the same number of ranks and values,
//! so all ranks hold the same bits, but they are not those of the host.
#![expect(unsafe_code, reason = "calls of the library")]

use std::cell::{Cell, RefCell};
use std::ffi::c_char;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cudarc::nccl::result::{self, NcclError};
use cudarc::nccl::sys;

use super::exchange::{check_parts, check_ranks, check_values, device_error, ranges_of};
use super::{Error, Exchange, Ranks, Sum};
use crate::device::{Part, Queue, Ticket, Work};

const BYTES: sys::ncclDataType_t = sys::ncclDataType_t::ncclUint8;

/// Time between two looks at the work under way.
const TICK: Duration = Duration::from_millis(100);
/// A call of the library that takes longer waits for a rank that does not come.
const LONGEST_CALL: Duration = Duration::from_secs(5);

/// Blocks that a collective may take of a GPU where memory is to be saved, unless the variable `NCCL_MAX_CTAS` says otherwise. Each has
/// 25 MiB of buffers for a neighbour; the library takes 24 between two H200s, which gather at 178 GB/s with them and at 100 with these.
const FEW_CTAS: i32 = 8;

/// The library's configuration of a group as of NCCL 2.18, which later ones take as well.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: i32,
    cga_cluster_size: i32,
    min_ctas: i32,
    max_ctas: i32,
    net_name: *const c_char,
    split_share: i32,
}

impl Config {
    /// Everything as the library likes, but for the number of blocks where memory is to be saved.
    fn new(saves_memory: bool) -> Self {
        const UNDEFINED: i32 = i32::MIN;
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: 21_801,
            blocking: UNDEFINED,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: if saves_memory { FEW_CTAS } else { UNDEFINED },
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
        }
    }
}

/// One rank of a group of GPUs.
#[derive(Debug)]
pub struct Nccl {
    group: Arc<Group>,
    queue: Queue,
    rank: usize,
    world_size: usize,
    /// Groups that are open now.
    depth: Cell<usize>,
    /// What was asked for and has no ticket yet.
    held: RefCell<Vec<Part>>,
    watch: Option<JoinHandle<()>>,
}

/// The group, as its user and who looks after it share it.
#[derive(Debug)]
struct Group {
    comm: Comm,
    /// Whether it is of no use any more.
    is_over: AtomicBool,
    /// Held by whoever has seen that it is of use and calls the library.
    calls: Mutex<()>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The piece that was asked for last, when it will have been done, and when it was asked for.
    last: Option<(&'static str, Ticket, Instant)>,
    problem: Option<Error>,
}

#[derive(Debug)]
struct Comm(sys::ncclComm_t);

// SAFETY: every call of the library with it is under `Group::calls`, of the thread that asks for work and of the one beside it
// that gives the group up. Only a call that hangs is ended without it, which the library allows.
unsafe impl Send for Comm {}
// SAFETY: as above.
unsafe impl Sync for Comm {}

impl Group {
    fn state(&self) -> MutexGuard<'_, State> {
        // Single values are set, so a panic elsewhere leaves it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the group up, once: whatever is under way ends. A call that is about to be made is waited for; one that hangs is
    /// ended, which the library allows.
    fn give_up(&self) {
        let since = Instant::now();
        let _call = loop {
            match self.calls.try_lock() {
                Err(TryLockError::WouldBlock) if since.elapsed() < LONGEST_CALL => std::thread::sleep(TICK / 10),
                Err(TryLockError::WouldBlock) => break None,
                Ok(call) => break Some(call),
                Err(TryLockError::Poisoned(call)) => break Some(call.into_inner()),
            }
        };
        if !self.is_over.swap(true, Ordering::AcqRel) {
            // SAFETY: it was made by the library and is given back once. This does not wait for ranks that are lost.
            let _ = unsafe { result::comm_abort(self.comm.0) };
        }
    }

    /// Looks after the work under way until the group is over.
    fn watch(&self, ranks: &dyn Ranks, queue: &Queue, deadline: Duration) {
        let rank = ranks.rank();
        if let Err(error) = queue.bind() {
            self.state().problem = Some(device_error(rank, "using the GPU", error));
            return self.give_up();
        }
        while !self.is_over.load(Ordering::Acquire) {
            std::thread::sleep(TICK);
            let last = self.state().last.clone();
            let Some((operation, ticket, asked)) = last else { continue };
            let failed = match ticket.is_done() {
                Ok(true) => {
                    self.state().last.take_if(|(_, _, later)| *later == asked);
                    continue;
                }
                Ok(false) => None,
                Err(error) => Some(device_error(rank, operation, error)),
            };
            let late = || {
                let (secs, missing, hosts) = (deadline.as_secs(), Vec::new(), Vec::new());
                (asked.elapsed() > deadline).then_some(Error::Timeout { rank, operation, secs, missing, hosts })
            };
            if let Some(problem) = ranks.lost().or(failed).or_else(late) {
                self.state().problem = Some(problem);
                self.give_up();
            }
        }
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        self.group.give_up();
        if let Some(watch) = self.watch.take() {
            // A thread that panicked has said so itself.
            let _ = watch.join();
        }
    }
}

impl Nccl {
    /// Joins the group, on a queue beside `main`, the rank's own. Rank 0's id travels over `ranks`. Check with
    /// [`super::device::exchange`] first that no two ranks have one GPU. No piece of work may take longer than `deadline`. With
    /// `saves_memory` it takes little of the GPU, at some of its speed.
    ///
    /// # Errors
    /// If the ranks, the device or NCCL fail.
    pub fn connect(
        ranks: Arc<dyn Ranks>,
        main: &Queue,
        (deadline, saves_memory): (Duration, bool),
    ) -> Result<Self, Error> {
        let (rank, world_size) = (ranks.rank(), ranks.world_size());
        let mut bytes = Vec::new();
        if rank == 0 {
            let id = result::get_uniqueid().map_err(|error| failed(rank, "ncclGetUniqueId", &error))?;
            bytes = id.internal.iter().map(|&c| c as u8).collect();
        }
        ranks.broadcast(&mut bytes, 0)?;
        let internal: [u8; 128] = bytes.as_slice().try_into().map_err(|_| Error::Message {
            peer: 0,
            what: "the id of the NCCL group",
            problem: format!("it has {} bytes, expected 128", bytes.len()),
        })?;
        let queue = main.beside().map_err(|error| device_error(rank, "making a queue", error))?;
        queue.bind().map_err(|error| device_error(rank, "using the GPU", error))?;
        let id = sys::ncclUniqueId { internal: internal.map(|b| b as c_char) };
        let (mut comm, mut config) = (std::ptr::null_mut(), Config::new(saves_memory));
        let config = (&raw mut config).cast();
        // SAFETY: `comm`, which the call makes, and the configuration, of which it reads as many bytes as that says, outlive it;
        // the GPU is that of the thread.
        let made = unsafe { result::comm_init_rank_config(&raw mut comm, world_size as i32, id, rank as i32, config) };
        made.map_err(|error| failed(rank, "ncclCommInitRankConfig", &error))?;
        let (calls, state) = (Mutex::default(), Mutex::default());
        let group = Arc::new(Group { comm: Comm(comm), is_over: AtomicBool::new(false), calls, state });
        let (watched, watched_queue) = (group.clone(), queue.clone());
        let watch = std::thread::Builder::new()
            .name("nccl".into())
            .spawn(move || watched.watch(&*ranks, &watched_queue, deadline));
        let watch =
            Some(watch.map_err(|error| device_error(rank, "starting the thread that looks after NCCL", error))?);
        Ok(Self { group, queue, rank, world_size, depth: Cell::new(0), held: RefCell::default(), watch })
    }

    /// Tells who looks after the work that a call is made, which may wait for others; dropped, it has been made.
    fn calling(&self, operation: &'static str) -> (MutexGuard<'_, ()>, Work) {
        let call = self.group.calls.lock().unwrap_or_else(PoisonError::into_inner);
        let (work, made) = Ticket::promise();
        self.group.state().last = Some((operation, made, Instant::now()));
        (call, work)
    }

    /// The group, while it is of use.
    fn comm(&self) -> Result<sys::ncclComm_t, Error> {
        if self.group.is_over.load(Ordering::Acquire) {
            let problem = self.group.state().problem.clone();
            return Err(problem.unwrap_or_else(|| device_error(self.rank, "exchange", "the group was given up")));
        }
        Ok(self.group.comm.0)
    }

    /// Asks for `work`, which is given the addresses of the parts, after `after`.
    fn ask(
        &self,
        operation: &'static str,
        parts: &[&Part],
        after: &Ticket,
        work: impl FnOnce(&[u64], sys::cudaStream_t) -> Result<(), NcclError>,
    ) -> Result<Ticket, Error> {
        let device = |error| device_error(self.rank, operation, error);
        let Some(stream) = self.queue.stream() else {
            return Err(device_error(self.rank, operation, "its queue is the host's"));
        };
        self.comm()?;
        self.queue.after(after).map_err(device)?;
        let addresses = parts.iter().map(|part| part.lend_to(&self.queue)).collect::<Result<Vec<_>, _>>();
        let addresses = addresses.map_err(device)?;
        self.queue.bind().map_err(device)?;
        // A group holds the lock from its beginning to its end.
        let calling = (self.depth.get() == 0).then(|| self.calling(operation));
        self.comm()?;
        let asked = work(&addresses, stream.raw().cast());
        self.held.borrow_mut().extend(parts.iter().map(|&part| part.clone()));
        let asked = asked.map_err(|error| failed(self.rank, operation, &error));
        // What a group asks for begins at its end.
        if self.depth.get() > 0 {
            return asked.map(|()| Ticket::done());
        }
        let ticket = self.settle(operation);
        calling.into_iter().for_each(|(_, work)| work.done());
        asked.and(ticket)
    }

    /// The ticket of all that was asked for, which keeps its memory until then.
    fn settle(&self, operation: &'static str) -> Result<Ticket, Error> {
        let parts = self.held.take();
        match self.queue.ticket() {
            Ok(ticket) => {
                self.group.state().last = Some((operation, ticket.clone(), Instant::now()));
                parts.iter().for_each(|part| part.is_used_until(&self.queue, &ticket));
                Ok(ticket)
            }
            Err(error) => {
                // What cannot be waited for must not be freed.
                std::mem::forget(parts);
                Err(device_error(self.rank, operation, error))
            }
        }
    }
}

/// NCCL does what `work` asks for as one.
fn together(work: impl FnOnce() -> Result<(), NcclError>) -> Result<(), NcclError> {
    result::group_start()?;
    let asked = work();
    let ended = result::group_end();
    asked.and(ended.map(drop))
}

fn failed(rank: usize, operation: &'static str, error: &NcclError) -> Error {
    device_error(rank, operation, format!("NCCL: {:?}", error.0))
}

impl Exchange for Nccl {
    fn all_gather(&self, shard: &Part, full: &Part, after: &Ticket) -> Result<Ticket, Error> {
        const OPERATION: &str = "all_gather";
        check_parts(OPERATION, self.world_size, shard, full)?;
        self.ask(OPERATION, &[shard, full], after, |at, stream| {
            let (from, to) = (at[0] as *const _, at[1] as *mut _);
            // SAFETY: both are device memory of the checked lengths, which lives until the queue is done with it.
            unsafe { result::all_gather(from, to, shard.len(), BYTES, self.group.comm.0, stream) }.map(drop)
        })
    }

    fn reduce_scatter(&self, full: &Part, shard: &Part, sum: Sum, after: &Ticket) -> Result<Ticket, Error> {
        const OPERATION: &str = "reduce_scatter";
        check_parts(OPERATION, self.world_size, shard, full)?;
        check_values(OPERATION, self.world_size, shard, sum)?;
        let kind = match sum {
            Sum::F32 => sys::ncclDataType_t::ncclFloat32,
            Sum::Bf16 => sys::ncclDataType_t::ncclBfloat16,
            Sum::F16 => sys::ncclDataType_t::ncclFloat16,
        };
        self.ask(OPERATION, &[full, shard], after, |at, stream| {
            let (from, to, count) = (at[0] as *const _, at[1] as *mut _, shard.len() / sum.size_in_bytes());
            let operation = sys::ncclRedOp_t::ncclSum;
            // SAFETY: as above.
            unsafe { result::reduce_scatter(from, to, count, kind, operation, self.group.comm.0, stream) }.map(drop)
        })
    }

    fn all_gather_ranges(&self, full: &Part, ranges: &[Range<usize>], after: &Ticket) -> Result<Ticket, Error> {
        const OPERATION: &str = "all_gather_ranges";
        let parts = ranges_of(OPERATION, self.world_size, full, ranges)?;
        let parts: Vec<&Part> = parts.iter().collect();
        // NCCL makes one kernel of a group's broadcasts.
        self.ask(OPERATION, &parts, after, |at, stream| {
            together(|| {
                (parts.iter().zip(at).enumerate()).filter(|(_, (part, _))| !part.is_empty()).try_for_each(
                    |(root, (part, &at))| {
                        let (from, to, root) = (at as *const _, at as *mut _, root as i32);
                        // SAFETY: as above; in place.
                        unsafe { result::broadcast(from, to, part.len(), BYTES, root, self.group.comm.0, stream) }
                            .map(drop)
                    },
                )
            })
        })
    }

    fn all_to_all(&self, to: &[Vec<Part>], from: &[Vec<Part>], after: &Ticket) -> Result<Ticket, Error> {
        const OPERATION: &str = "all_to_all";
        check_ranks(OPERATION, self.world_size, to.len())?;
        check_ranks(OPERATION, self.world_size, from.len())?;
        let of_others = |all: &[Vec<Part>]| -> Vec<(usize, Part)> {
            let others = all.iter().enumerate().filter(|(peer, _)| *peer != self.rank);
            let parts = others.flat_map(|(peer, parts)| parts.iter().map(move |part| (peer, part.clone())));
            parts.filter(|(_, part)| !part.is_empty()).collect()
        };
        let (to, from) = (of_others(to), of_others(from));
        let parts: Vec<&Part> = to.iter().chain(&from).map(|(_, part)| part).collect();
        self.ask(OPERATION, &parts, after, |at, stream| {
            let (sent, received) = at.split_at(to.len());
            together(|| {
                for ((peer, part), &at) in to.iter().zip(sent) {
                    // SAFETY: as above.
                    unsafe {
                        result::send(at as *const _, part.len(), BYTES, *peer as i32, self.group.comm.0, stream)?
                    };
                }
                for ((peer, part), &at) in from.iter().zip(received) {
                    // SAFETY: as above.
                    unsafe { result::recv(at as *mut _, part.len(), BYTES, *peer as i32, self.group.comm.0, stream)? };
                }
                Ok(())
            })
        })
    }

    fn grouped(&self, work: &mut dyn FnMut(&dyn Exchange) -> Result<(), Error>) -> Result<Ticket, Error> {
        const OPERATION: &str = "grouped";
        let calling = (self.depth.get() == 0).then(|| self.calling(OPERATION));
        self.comm()?;
        result::group_start().map_err(|error| failed(self.rank, OPERATION, &error))?;
        self.depth.set(self.depth.get() + 1);
        let asked = work(self);
        self.depth.set(self.depth.get() - 1);
        let ended = result::group_end().map_err(|error| failed(self.rank, OPERATION, &error));
        if self.depth.get() > 0 {
            return asked.and(ended).map(|_| Ticket::done());
        }
        let ticket = self.settle(OPERATION);
        calling.into_iter().for_each(|(_, work)| work.done());
        asked.and(ended).and(ticket)
    }

    fn check(&self) -> Result<(), Error> {
        let _call = self.group.calls.lock().unwrap_or_else(PoisonError::into_inner);
        let (comm, mut state) = (self.comm()?, sys::ncclResult_t::ncclSuccess);
        // SAFETY: the communicator is live and `state` outlives the call.
        let asked = unsafe { sys::ncclCommGetAsyncError(comm, &raw mut state) };
        let status = asked.result().and_then(|_| state.result());
        status.map(drop).map_err(|error| failed(self.rank, "exchange", &error))
    }
}
