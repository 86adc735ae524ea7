//! Ranks as threads of one process: for tests, and for CPU ranks that share a machine.
//!
//! Each collective is one round: every rank leaves its contribution, waits until all are there, and reads them all.
//! Each rank does the arithmetic for itself in the order of the ranks, so the results agree to the bit. A rank that is
//! dropped (its thread returned or panicked) is lost to the others at once, not only at the deadline.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::control::{check_count, check_root};
use super::{Error, Ranks};

/// One rank of a group of threads.
#[derive(Debug)]
pub struct Threads {
    rank: usize,
    world_size: usize,
    deadline: Duration,
    /// Number of this rank's next round.
    round: Mutex<u64>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    rounds: BTreeMap<u64, Round>,
    /// Ranks that were dropped or gave up.
    is_gone: Vec<bool>,
    /// The round before which numbers are given out, and the next of them.
    turns: (u64, u64),
}

#[derive(Debug)]
struct Round {
    contributions: Vec<Option<Arc<Contribution>>>,
    readers: usize,
}

/// What one rank brings to a round.
#[derive(Debug)]
struct Contribution {
    operation: &'static str,
    bytes: Vec<u8>,
}

impl Threads {
    /// All ranks of a group; give one to each thread. `deadline` bounds every wait for the others.
    ///
    /// # Errors
    /// If `world_size` is 0.
    pub fn group(world_size: usize, deadline: Duration) -> Result<Vec<Self>, Error> {
        if world_size == 0 {
            return Err(Error::NoRanks);
        }
        let state = State { rounds: BTreeMap::new(), is_gone: vec![false; world_size], turns: (0, 0) };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let rank = |rank| Self { rank, world_size, deadline, round: Mutex::new(0), shared: Arc::clone(&shared) };
        Ok((0..world_size).map(rank).collect())
    }

    /// A thread that panicked while it held the lock left the state whole: it is only ever changed by single steps.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leaves a contribution and returns everybody's, in the order of the ranks.
    fn exchange(&self, operation: &'static str, bytes: Vec<u8>) -> Result<Vec<Arc<Contribution>>, Error> {
        let mut next = self.round.lock().unwrap_or_else(PoisonError::into_inner);
        let number = *next;
        *next += 1;
        let own = Arc::new(Contribution { operation, bytes });
        let until = Instant::now() + self.deadline;
        let mut state = self.lock();
        let empty = || Round { contributions: vec![None; self.world_size], readers: 0 };
        let round = state.rounds.entry(number).or_insert_with(empty);
        round.contributions[self.rank] = Some(Arc::clone(&own));
        self.shared.changed.notify_all();
        loop {
            // The round stays until all ranks have read it, and this rank has not.
            let round = state.rounds.entry(number).or_insert_with(empty);
            let missing: Vec<usize> =
                (0..self.world_size).filter(|&rank| round.contributions[rank].is_none()).collect();
            if missing.is_empty() {
                let all: Vec<_> = round.contributions.iter().flatten().cloned().collect();
                round.readers += 1;
                if round.readers == self.world_size {
                    state.rounds.remove(&number);
                }
                drop(state);
                return self.agree(&own, all);
            }
            if let Some(&peer) = missing.iter().find(|&&rank| state.is_gone[rank]) {
                self.leave(state);
                return Err(Error::PeerLost { rank: self.rank, peer, host: String::new(), operation });
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.leave(state);
                let secs = self.deadline.as_secs();
                return Err(Error::Timeout { rank: self.rank, operation, secs, missing, hosts: Vec::new() });
            }
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Takes this rank out of the group: its rounds would not be those of the others any more.
    fn leave(&self, mut state: MutexGuard<'_, State>) {
        state.is_gone[self.rank] = true;
        self.shared.changed.notify_all();
    }

    /// Everybody must be in the same collective.
    fn agree(&self, own: &Contribution, all: Vec<Arc<Contribution>>) -> Result<Vec<Arc<Contribution>>, Error> {
        match all.iter().position(|other| other.operation != own.operation) {
            None => Ok(all),
            Some(peer) => Err(Error::Mismatch {
                rank: self.rank,
                operation: own.operation,
                got: format!("{} bytes", own.bytes.len()),
                peer,
                peer_operation: all[peer].operation,
                expected: format!("{} bytes", all[peer].bytes.len()),
            }),
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.leave(self.lock());
    }
}

impl Ranks for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn broadcast(&self, bytes: &mut Vec<u8>, root: usize) -> Result<(), Error> {
        check_root(self.world_size, root)?;
        let own = if self.rank == root { bytes.clone() } else { Vec::new() };
        let all = self.exchange("broadcast", own)?;
        bytes.clear();
        bytes.extend_from_slice(&all[root].bytes);
        Ok(())
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        let all = self.exchange("all_gather_bytes", bytes.to_vec())?;
        Ok(all.iter().map(|contribution| contribution.bytes.clone()).collect())
    }

    fn all_to_all_bytes(&self, parts: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>, Error> {
        check_count("all_to_all_bytes", self.world_size, parts.len())?;
        let mut contribution = Vec::new();
        for part in &parts {
            contribution.extend((part.len() as u64).to_le_bytes());
            contribution.extend(part);
        }
        let all = self.exchange("all_to_all_bytes", contribution)?;
        let own = |other: &Arc<Contribution>| {
            let mut rest = other.bytes.as_slice();
            for rank in 0..=self.rank {
                let (length, after) = rest.split_first_chunk::<8>()?;
                let (part, after) = after.split_at_checked(u64::from_le_bytes(*length) as usize)?;
                if rank == self.rank {
                    return Some(part.to_vec());
                }
                rest = after;
            }
            None
        };
        Ok(all.iter().map(|other| own(other).unwrap_or_default()).collect())
    }

    fn barrier(&self) -> Result<(), Error> {
        self.exchange("barrier", Vec::new()).map(drop)
    }

    /// Threads of one process get one signal; there is no work that only some of them leave.
    fn start_over(&self) -> Result<(), Error> {
        self.barrier()
    }

    fn next_turn(&self, _taken: u64) -> Result<u64, Error> {
        let round = *self.round.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.lock();
        if round > state.turns.0 {
            state.turns = (round, 0);
        }
        let (_, next) = &mut state.turns;
        *next += 1;
        Ok(*next - 1)
    }

    fn abandon(&self, _reason: &str) {
        self.leave(self.lock());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEADLINE: Duration = Duration::from_secs(20);

    /// Runs `work` on every rank of a group and returns the results in their order.
    fn on_ranks<T: Send>(world_size: usize, deadline: Duration, work: impl Fn(&Threads) -> T + Sync) -> Vec<T> {
        let group = Threads::group(world_size, deadline).unwrap();
        let work = &work;
        std::thread::scope(|scope| {
            let handles: Vec<_> = group.into_iter().map(|rank| scope.spawn(move || work(&rank))).collect();
            handles.into_iter().map(|handle| handle.join().unwrap()).collect()
        })
    }

    #[test]
    fn bytes_and_f64_sums_keep_the_order_of_the_ranks() {
        let results = on_ranks(3, DEADLINE, |rank| {
            let mine = vec![rank.rank() as u8; rank.rank()];
            let all = rank.all_gather_bytes(&mine).unwrap();
            let mut message = if rank.rank() == 1 { b"from one".to_vec() } else { b"?".to_vec() };
            rank.broadcast(&mut message, 1).unwrap();
            let mut sums = [10f64.powi(rank.rank() as i32), 0.1];
            rank.all_reduce_sum_f64(&mut sums).unwrap();
            rank.barrier().unwrap();
            (all, message, sums)
        });
        for (all, message, sums) in results {
            assert_eq!(all, [vec![], vec![1], vec![2, 2]]);
            assert_eq!(message, b"from one");
            assert_eq!(sums, [111.0, 0.1 + 0.1 + 0.1]);
        }
    }

    #[test]
    fn many_rounds_in_a_row_do_not_mix() {
        let sums = on_ranks(4, DEADLINE, |rank| {
            (0..500).map(|round| rank.sum_of_counts(round * (rank.rank() + 1)).unwrap()).collect::<Vec<_>>()
        });
        assert!(sums.iter().all(|sums| sums.iter().enumerate().all(|(round, &sum)| sum == round * 10)));
    }

    #[test]
    fn each_turn_goes_to_one_rank_and_they_begin_anew_after_a_collective() {
        for _ in 0..20 {
            let taken = on_ranks(3, DEADLINE, |rank| {
                let take = |count: u64| (0..count).map(|n| rank.next_turn(n).unwrap()).collect::<Vec<_>>();
                let first = take(rank.rank() as u64);
                rank.barrier().unwrap();
                (first, take(2))
            });
            let mut first: Vec<u64> = taken.iter().flat_map(|(first, _)| first.clone()).collect();
            let mut second: Vec<u64> = taken.iter().flat_map(|(_, second)| second.clone()).collect();
            first.sort_unstable();
            second.sort_unstable();
            assert_eq!((first, second), (vec![0, 1, 2], vec![0, 1, 2, 3, 4, 5]));
        }
    }

    #[test]
    fn a_rank_that_does_not_come_is_named_at_the_deadline() {
        let group = Threads::group(3, Duration::from_millis(50)).unwrap();
        let started = Instant::now();
        let error = group[1].barrier().unwrap_err();
        assert_eq!(
            error,
            Error::Timeout { rank: 1, operation: "barrier", secs: 0, missing: vec![0, 2], hosts: vec![] }
        );
        assert!(started.elapsed() >= Duration::from_millis(50));
        assert!(error.to_string().contains("ranks 0, 2"), "{error}");
        // Rank 1 had come to this round; the next one it will not come to, and nobody waits for it there.
        assert!(matches!(group[0].barrier(), Err(Error::Timeout { missing, .. }) if missing == [2]));
        group[2].barrier().unwrap();
        assert_eq!(
            group[2].barrier(),
            Err(Error::PeerLost { rank: 2, peer: 0, host: String::new(), operation: "barrier" })
        );
    }

    #[test]
    fn a_rank_that_ends_is_lost_to_the_others_at_once() {
        let results = on_ranks(3, Duration::from_secs(600), |rank| {
            rank.barrier().unwrap();
            if rank.rank() == 2 { Ok(()) } else { rank.all_gather_bytes(b"x").map(drop) }
        });
        assert!(results[2].is_ok());
        for (rank, result) in results[..2].iter().enumerate() {
            assert_eq!(
                *result,
                Err(Error::PeerLost { rank, peer: 2, host: String::new(), operation: "all_gather_bytes" })
            );
        }
    }

    #[test]
    fn ranks_in_different_collectives_find_out() {
        let results = on_ranks(2, DEADLINE, |rank| {
            if rank.rank() == 0 { rank.barrier() } else { rank.all_gather_bytes(b"xy").map(drop) }
        });
        let error = results[0].clone().unwrap_err();
        assert!(error.to_string().contains("`all_gather_bytes` with 2 bytes"), "{error}");
        assert!(matches!(results[1], Err(Error::Mismatch { rank: 1, peer: 0, .. })));
        let sizes = on_ranks(2, DEADLINE, |rank| rank.all_reduce_sum_f64(&mut vec![0.0; 1 + rank.rank()]));
        assert!(sizes.iter().all(|r| matches!(r, Err(Error::Mismatch { .. }))));
    }

    #[test]
    fn roots_are_checked_before_anybody_waits() {
        let group = Threads::group(2, DEADLINE).unwrap();
        assert!(matches!(group[0].broadcast(&mut vec![], 2), Err(Error::Root { .. })));
        assert_eq!(Threads::group(0, DEADLINE).unwrap_err(), Error::NoRanks);
    }
}
