//! Ranks in processes of their own, each connected with each other over TCP.
//!
//! [`connect`] meets the others at rank 0 and returns the group. A collective is one frame to every other rank and one from each;
//! a thread per connection reads frames as they come, so that nobody's writing waits for somebody's computing. A further thread
//! tells the others every second that this process runs. What ranks take in turn the first rank gives out, on the thread that reads
//! who asks: no rank waits for what another computes.
//!
//! No wait is for ever. A connection that ends, a rank that says that it failed, a rank of which nothing is heard, and a rank that
//! computes beyond the deadline are errors of their own, which name the rank, its host and the collective. Time is counted in
//! beats of this process: a job that is suspended as a whole and goes on has lost nothing.

mod frame;
mod inbox;
mod meeting;

use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::control::check_root;
use super::{Error, Ranks};
use frame::{Frame, Kind, Operation};
use inbox::{End, Inboxes, TakenTurn, Turn, Turns};
pub use meeting::{Meeting, connect, free_port};

/// Time between two looks at what has come and who is there.
const TICK: Duration = Duration::from_millis(100);
/// Time between two signs of life.
const BEAT: Duration = Duration::from_secs(1);
/// Without a sign of life for so long a rank is taken for stopped, or its host for gone.
const LONGEST_SILENCE: Duration = Duration::from_mins(1);

/// One rank of a group of processes.
pub struct Tcp {
    shared: Arc<Shared>,
    /// Of this rank's next collective.
    round: Mutex<u64>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

/// What the threads of a rank share.
struct Shared {
    rank: usize,
    deadline: Duration,
    silence: Duration,
    peers: Vec<Option<Peer>>,
    inboxes: Inboxes,
    /// Those that the first rank gives out.
    turns: Mutex<Turns>,
    /// Ticks of this process so far.
    ticks: AtomicU64,
    is_over: AtomicBool,
}

/// The connection with another rank.
struct Peer {
    host: String,
    /// Frames are written whole.
    writer: Mutex<TcpStream>,
    /// For the end: it ends the thread that reads.
    stream: TcpStream,
    /// The tick at which something was read last.
    heard: AtomicU64,
}

impl std::fmt::Debug for Tcp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {} of {}", self.rank(), self.world_size())
    }
}

impl Tcp {
    /// A group over connections, one for each other rank and none for this one, with the hosts that the ranks are on.
    fn new(rank: usize, streams: Vec<Option<(TcpStream, String)>>, deadline: Duration) -> Result<Self, std::io::Error> {
        let mut peers = Vec::with_capacity(streams.len());
        let mut readers = Vec::new();
        for (peer, stream) in streams.into_iter().enumerate() {
            let Some((stream, host)) = stream else {
                peers.push(None);
                continue;
            };
            stream.set_nodelay(true)?;
            stream.set_read_timeout(None)?;
            stream.set_write_timeout(Some(TICK))?;
            readers.push((peer, stream.try_clone()?));
            let writer = Mutex::new(stream.try_clone()?);
            peers.push(Some(Peer { host, writer, stream, heard: AtomicU64::new(0) }));
        }
        let shared = Arc::new(Shared {
            rank,
            deadline,
            silence: LONGEST_SILENCE.min(deadline),
            inboxes: Inboxes::new(peers.len()),
            peers,
            turns: Mutex::default(),
            ticks: AtomicU64::new(0),
            is_over: AtomicBool::new(false),
        });
        let mut threads = Vec::new();
        for (peer, stream) in readers {
            let shared = Arc::clone(&shared);
            let read = move || shared.read(peer, stream);
            threads.push(std::thread::Builder::new().name(format!("from rank {peer}")).spawn(read)?);
        }
        // Two threads: a beat may wait for who takes nothing, time may not.
        let (counting, beating) = (Arc::clone(&shared), Arc::clone(&shared));
        threads.push(std::thread::Builder::new().name("ticks".into()).spawn(move || counting.count())?);
        threads.push(std::thread::Builder::new().name("beats".into()).spawn(move || beating.beat())?);
        Ok(Self { shared, round: Mutex::new(0), threads })
    }

    /// The number of the collective that begins.
    fn begin(&self) -> MutexGuard<'_, u64> {
        let mut round = self.round.lock().unwrap_or_else(PoisonError::into_inner);
        *round += 1;
        round
    }

    /// Sends `to(peer)` to every other rank and returns what each of them sent, in the order of the ranks with nothing in this
    /// rank's place.
    fn exchange<'b>(&self, operation: Operation, to: impl Fn(usize) -> &'b [u8]) -> Result<Vec<Vec<u8>>, Error> {
        let round = self.begin();
        let shared = &self.shared;
        let since = shared.ticks.load(Ordering::Relaxed);
        // Each rank begins with the one after it, so that not all write to rank 0 at first.
        let world = shared.peers.len();
        for peer in (1..world).map(|offset| (shared.rank + offset) % world) {
            shared.send(peer, Kind::Data, operation, *round, to(peer), since)?;
        }
        let mut all = vec![Vec::new(); world];
        for peer in (0..world).filter(|&peer| peer != shared.rank) {
            // Who has sent its share may have ended since.
            let waits_for = |other: usize| other >= peer && other != shared.rank;
            all[peer] = shared.take(peer, operation, *round, (since, &waits_for))?;
        }
        Ok(all)
    }
}

impl Shared {
    fn peer(&self, peer: usize) -> Result<&Peer, Error> {
        let none = Error::Root { operation: "a connection", root: peer, world_size: self.peers.len() };
        self.peers.get(peer).and_then(Option::as_ref).ok_or(none)
    }

    fn host(&self, peer: usize) -> String {
        self.peers[peer].as_ref().map(|peer| peer.host.clone()).unwrap_or_default()
    }

    /// Reads frames until the connection ends.
    fn read(&self, peer: usize, mut stream: TcpStream) {
        let Ok(connection) = self.peer(peer) else { return };
        let heard = || connection.heard.store(self.ticks.load(Ordering::Relaxed), Ordering::Relaxed);
        loop {
            match Frame::read(&mut stream, &heard) {
                Ok(Frame { kind: Kind::Beat, .. }) => {}
                Ok(Frame { kind: Kind::Failure, bytes, .. }) => {
                    self.inboxes.end(peer, End::Failed(String::from_utf8_lossy(&bytes).into_owned()));
                    return;
                }
                Ok(frame) if frame.kind == Kind::Turn => self.pass_turn(peer, &frame),
                Ok(frame) => self.inboxes.put(peer, frame),
                Err(_) => {
                    self.inboxes.end(peer, End::Gone);
                    return;
                }
            }
        }
    }

    /// The first rank is asked for a number, and another gets it.
    fn pass_turn(&self, peer: usize, frame: &Frame) {
        if self.rank > 0 {
            let (numbers, _) = frame.bytes.as_chunks::<8>();
            if let [generation, number] = *numbers {
                let (generation, number) = (u64::from_le_bytes(generation) as u32, u64::from_le_bytes(number));
                self.inboxes.put_turn(Turn { after: (generation, frame.round), number });
            }
            return;
        }
        let turn = self.give_turn((frame.generation, frame.round));
        let bytes = [u64::from(turn.after.0), turn.number].map(u64::to_le_bytes).concat();
        let since = self.ticks.load(Ordering::Relaxed);
        // Who is gone needs none, and who takes nothing any more is found out by a collective.
        let _ = self.send(peer, Kind::Turn, Operation::NextTurn, frame.round, &bytes, since);
    }

    fn give_turn(&self, after: (u32, u64)) -> Turn {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner).next(after)
    }

    /// Counts time.
    fn count(&self) {
        while !self.is_over.load(Ordering::Acquire) {
            std::thread::sleep(TICK);
            self.ticks.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Shows the others that this process runs.
    fn beat(&self) {
        let mut since = 0;
        while !self.is_over.load(Ordering::Acquire) {
            std::thread::sleep(TICK);
            if self.waited(since) < BEAT {
                continue;
            }
            since = self.ticks.load(Ordering::Relaxed);
            for (peer, connection) in self.peers.iter().enumerate() {
                // Who is writing shows it by that.
                let Some(Ok(mut writer)) = connection.as_ref().map(|connection| connection.writer.try_lock()) else {
                    continue;
                };
                // Where nothing goes through, a collective says so.
                let _ = frame::write_if_taken(&mut *writer, self.inboxes.generation(), &|| !self.is_lost(peer, since));
            }
        }
    }

    /// Writes a frame, for as long as there is somebody who reads.
    fn send(
        &self,
        peer: usize,
        kind: Kind,
        operation: Operation,
        round: u64,
        bytes: &[u8],
        since: u64,
    ) -> Result<(), Error> {
        let connection = self.peer(peer)?;
        let header = Frame::header(kind, operation, self.inboxes.generation(), round);
        let mut writer = connection.writer.lock().unwrap_or_else(PoisonError::into_inner);
        // A frame that was begun is finished, whatever else goes wrong: what follows it must be readable. Only a peer that
        // takes no more ends it.
        let goes_on = || !self.is_lost(peer, since);
        let written = frame::write(&mut *writer, header, bytes, &goes_on);
        drop(writer);
        match written {
            Ok(()) => Ok(()),
            Err(_) => Err(self.why_lost(peer, operation, since)),
        }
    }

    fn is_lost(&self, peer: usize, since: u64) -> bool {
        self.inboxes.ended(peer).is_some() || self.is_silent(peer) || self.waited(since) > self.deadline
    }

    fn why_lost(&self, peer: usize, operation: Operation, since: u64) -> Error {
        let (rank, host, operation) = (self.rank, self.host(peer), operation.name());
        match self.inboxes.ended(peer) {
            Some(End::Failed(reason)) => Error::PeerFailed { rank, peer, host, operation, reason },
            None if self.is_silent(peer) => Error::Silent { rank, peer, host, operation, secs: self.silence.as_secs() },
            None if self.waited(since) > self.deadline => {
                let (missing, hosts) = (vec![peer], vec![host]);
                Error::Timeout { rank, operation, secs: self.deadline.as_secs(), missing, hosts }
            }
            Some(End::Gone) | None => Error::PeerLost { rank, peer, host, operation },
        }
    }

    fn waited(&self, since: u64) -> Duration {
        TICK * self.ticks.load(Ordering::Relaxed).saturating_sub(since) as u32
    }

    fn is_silent(&self, peer: usize) -> bool {
        let heard = self.peers[peer].as_ref().map_or(0, |peer| peer.heard.load(Ordering::Relaxed));
        self.waited(heard) > self.silence
    }

    /// The frame of a collective that a rank sends, when it has come.
    fn take(
        &self,
        peer: usize,
        operation: Operation,
        round: u64,
        (since, waits_for): (u64, &dyn Fn(usize) -> bool),
    ) -> Result<Vec<u8>, Error> {
        loop {
            match self.inboxes.take(peer, round, TICK) {
                inbox::Taken::Frame(Frame { operation: other, round: theirs, bytes, .. }) => {
                    if (other, theirs) == (operation, round) {
                        return Ok(bytes);
                    }
                    return Err(Error::Mismatch {
                        rank: self.rank,
                        operation: operation.name(),
                        got: format!("its collective number {round}"),
                        peer,
                        peer_operation: other.name(),
                        expected: format!("its number {theirs}"),
                    });
                }
                inbox::Taken::StartOver => {
                    return Err(Error::StartOver { rank: self.rank, operation: operation.name() });
                }
                inbox::Taken::Nothing => self.check_others(operation, since, waits_for)?,
            }
        }
    }

    /// Looks at all ranks that this one waits for.
    fn check_others(&self, operation: Operation, since: u64, waits_for: &dyn Fn(usize) -> bool) -> Result<(), Error> {
        let others = || (0..self.peers.len()).filter(|&peer| waits_for(peer));
        // Who says why it ends comes first, then who is gone without a word.
        let failed = |peer: &usize| matches!(self.inboxes.ended(*peer), Some(End::Failed(_)));
        let gone = |peer: &usize| self.inboxes.ended(*peer).is_some() && !self.inboxes.has_frame(*peer);
        let silent = |peer: &usize| self.is_silent(*peer) && !self.inboxes.has_frame(*peer);
        if let Some(peer) = others().find(failed).or_else(|| others().find(gone)).or_else(|| others().find(silent)) {
            return Err(self.why_lost(peer, operation, since));
        }
        if self.waited(since) > self.deadline {
            let missing: Vec<usize> = others().filter(|&peer| !self.inboxes.has_frame(peer)).collect();
            let hosts = missing.iter().map(|&peer| self.host(peer)).collect();
            let secs = self.deadline.as_secs();
            return Err(Error::Timeout { rank: self.rank, operation: operation.name(), secs, missing, hosts });
        }
        Ok(())
    }
}

impl Ranks for Tcp {
    fn rank(&self) -> usize {
        self.shared.rank
    }

    fn world_size(&self) -> usize {
        self.shared.peers.len()
    }

    fn broadcast(&self, bytes: &mut Vec<u8>, root: usize) -> Result<(), Error> {
        check_root(self.world_size(), root)?;
        // Everybody hears from everybody, so that nobody runs ahead.
        let own: &[u8] = if self.rank() == root { bytes } else { &[] };
        let mut all = self.exchange(Operation::Broadcast, |_| own)?;
        if self.rank() != root {
            *bytes = std::mem::take(&mut all[root]);
        }
        Ok(())
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        let mut all = self.exchange(Operation::AllGather, |_| bytes)?;
        all[self.rank()] = bytes.to_vec();
        Ok(all)
    }

    fn all_to_all_bytes(&self, mut parts: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>, Error> {
        super::control::check_count("all_to_all_bytes", self.world_size(), parts.len())?;
        let mut all = self.exchange(Operation::AllToAll, |peer| &parts[peer])?;
        all[self.rank()] = std::mem::take(&mut parts[self.rank()]);
        Ok(all)
    }

    fn barrier(&self) -> Result<(), Error> {
        self.exchange(Operation::Barrier, |_| &[]).map(drop)
    }

    fn start_over(&self) -> Result<(), Error> {
        let mut round = self.round.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &self.shared;
        let since = shared.ticks.load(Ordering::Relaxed);
        shared.inboxes.next_generation();
        let others: Vec<usize> = (0..self.world_size()).filter(|&peer| peer != shared.rank).collect();
        for &peer in &others {
            shared.send(peer, Kind::StartOver, Operation::StartOver, *round, &[], since)?;
        }
        for &peer in &others {
            while !shared.inboxes.has_started_over(peer) {
                shared.inboxes.wait(TICK);
                let waits_for = |other: usize| other != shared.rank && !shared.inboxes.has_started_over(other);
                shared.check_others(Operation::StartOver, since, &waits_for)?;
            }
        }
        *round = 0;
        Ok(())
    }

    fn next_turn(&self, _taken: u64) -> Result<u64, Error> {
        let round = self.round.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &self.shared;
        let (since, operation) = (shared.ticks.load(Ordering::Relaxed), Operation::NextTurn);
        let after = (shared.inboxes.generation(), *round);
        if self.rank() == 0 {
            shared.inboxes.put_turn(shared.give_turn(after));
        } else {
            shared.send(0, Kind::Turn, operation, *round, &[], since)?;
        }
        loop {
            match shared.inboxes.take_turn(after, TICK) {
                TakenTurn::Number(number) => return Ok(number),
                TakenTurn::StartOver => {
                    return Err(Error::StartOver { rank: self.rank(), operation: operation.name() });
                }
                TakenTurn::Nothing => shared.check_others(operation, since, &|peer| peer == 0)?,
            }
        }
    }

    fn lost(&self) -> Option<Error> {
        let shared = &self.shared;
        let others = || (0..self.world_size()).filter(|&peer| peer != shared.rank);
        let failed = |peer: &usize| matches!(shared.inboxes.ended(*peer), Some(End::Failed(_)));
        let gone = |peer: &usize| shared.inboxes.ended(*peer).is_some() || shared.is_silent(*peer);
        let peer = others().find(failed).or_else(|| others().find(gone))?;
        Some(shared.why_lost(peer, Operation::Exchange, shared.ticks.load(Ordering::Relaxed)))
    }

    fn abandon(&self, reason: &str) {
        let since = self.shared.ticks.load(Ordering::Relaxed);
        for peer in (0..self.world_size()).filter(|&peer| peer != self.rank()) {
            // Who is gone needs no reason any more.
            let _ = self.shared.send(peer, Kind::Failure, Operation::Barrier, 0, reason.as_bytes(), since);
        }
    }
}

impl Drop for Tcp {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Release);
        for peer in self.shared.peers.iter().flatten() {
            // What is written is still sent; the reading thread ends.
            let _ = peer.stream.shutdown(Shutdown::Both);
        }
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so itself.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests;
