//! What ranks agree on beside their tensors, and the one rank that is alone.

use std::sync::Arc;
use std::time::Duration;

use super::launch::Place;
use super::{Error, tcp};

/// Meets the ranks that a launcher has started; one is alone where none did. `deadline` bounds every wait for the others.
///
/// # Errors
/// If the launcher does not say where the ranks meet, or they do not.
pub fn join(place: Option<Place>, deadline: Duration) -> Result<Arc<dyn Ranks>, Error> {
    let Some(place) = place.filter(|place| place.world_size > 1) else { return Ok(Arc::new(Alone)) };
    let Place { launcher, rank, world_size, rendezvous, .. } = place;
    let address = rendezvous.ok_or(Error::NoPlace { launcher, rank, world_size })?;
    let meeting = tcp::Meeting { rank, world_size, address, host: host_name(), deadline };
    Ok(Arc::new(tcp::connect(&meeting)?))
}

/// The name of this machine; empty where it has none.
pub fn host_name() -> String {
    nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// The ranks of a run as one of them sees them: for what is small and lies on the host.
///
/// All ranks must make the same calls in the same order, but for [`Ranks::next_turn`]. Every call waits for the others, no longer
/// than the group's deadline. After an error the group is not usable any more: the ranks may be at different calls.
pub trait Ranks: Send + Sync {
    /// This rank, in `0..world_size`.
    fn rank(&self) -> usize;

    /// Number of ranks, at least 1.
    fn world_size(&self) -> usize;

    /// Replaces `bytes` by those of rank `root`; their number may differ before.
    ///
    /// # Errors
    /// If a rank is lost or late, or `root` does not exist.
    fn broadcast(&self, bytes: &mut Vec<u8>, root: usize) -> Result<(), Error>;

    /// Every rank's bytes, in the order of the ranks; their lengths may differ.
    ///
    /// # Errors
    /// If a rank is lost or late.
    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, Error>;

    /// Sends the part with each rank's number to that rank and returns what the ranks sent to this one, in their order; lengths
    /// may differ.
    ///
    /// # Errors
    /// If a rank is lost or late, or there are not as many parts as ranks.
    fn all_to_all_bytes(&self, parts: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>, Error>;

    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// If a rank is lost or late.
    fn barrier(&self) -> Result<(), Error>;

    /// Leaves the collectives that are under way, and returns when every rank has left them: what follows begins anew. Ranks
    /// that wait in one meanwhile get [`Error::StartOver`] and are to call this too. Must not be called by a rank that may
    /// have ended a collective which others need it for.
    ///
    /// # Errors
    /// If a rank is lost or late.
    fn start_over(&self) -> Result<(), Error>;

    /// The next of the numbers 0, 1, 2, ... which ranks share until their next collective: each goes to the rank that asks first, and
    /// to no other. No collective: a rank asks when it likes, and whatever the others do meanwhile. `taken` is how many numbers this
    /// rank has got since the last collective.
    ///
    /// # Errors
    /// If the first rank is lost or late, or [`Error::StartOver`] if a rank has left the work at hand.
    fn next_turn(&self, taken: u64) -> Result<u64, Error>;

    /// Tells the others why this rank ends, so that they end with that reason.
    fn abandon(&self, reason: &str);

    /// Why this rank cannot count on another any more, if it knows; asked beside the calls, from any thread.
    fn lost(&self) -> Option<Error> {
        None
    }

    /// Whether any rank says so.
    ///
    /// # Errors
    /// If a rank is lost or late.
    fn any(&self, own: bool) -> Result<bool, Error> {
        Ok(self.all_gather_bytes(&[u8::from(own)])?.concat().contains(&1))
    }

    /// Whether this is the rank that prints and writes.
    fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Replaces `values` by their sum over ranks in f64, added in the order of the ranks: for losses and metrics.
    ///
    /// # Errors
    /// As [`Self::all_gather_bytes`], or if a rank has another length.
    fn all_reduce_sum_f64(&self, values: &mut [f64]) -> Result<(), Error> {
        let own: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let all = self.all_gather_bytes(&own)?;
        values.fill(0.0);
        for (peer, bytes) in all.iter().enumerate() {
            let (numbers, _) = bytes.as_chunks::<8>();
            if bytes.len() != own.len() {
                return Err(Error::Mismatch {
                    rank: self.rank(),
                    operation: "all_reduce_sum_f64",
                    got: format!("{} elements", values.len()),
                    peer,
                    peer_operation: "all_reduce_sum_f64",
                    expected: format!("{} elements", numbers.len()),
                });
            }
            for (value, number) in values.iter_mut().zip(numbers) {
                *value += f64::from_le_bytes(*number);
            }
        }
        Ok(())
    }

    /// The sum of a count over ranks, each of them below 2^53.
    ///
    /// # Errors
    /// As [`Self::all_gather_bytes`].
    fn sum_of_counts(&self, count: usize) -> Result<usize, Error> {
        let mut sum = [count as f64];
        self.all_reduce_sum_f64(&mut sum)?;
        Ok(sum[0] as usize)
    }
}

/// Checks the root of [`Ranks::broadcast`].
pub(super) fn check_root(world_size: usize, root: usize) -> Result<(), Error> {
    if root < world_size { Ok(()) } else { Err(Error::Root { operation: "broadcast", root, world_size }) }
}

/// Checks the parts of [`Ranks::all_to_all_bytes`].
pub(super) fn check_count(operation: &'static str, world_size: usize, got: usize) -> Result<(), Error> {
    if got == world_size { Ok(()) } else { Err(Error::Parts { operation, world_size, got }) }
}

/// One rank alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Alone;

impl Ranks for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn broadcast(&self, _bytes: &mut Vec<u8>, root: usize) -> Result<(), Error> {
        check_root(1, root)
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        Ok(vec![bytes.to_vec()])
    }

    fn all_to_all_bytes(&self, parts: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>, Error> {
        check_count("all_to_all_bytes", 1, parts.len())?;
        Ok(parts)
    }

    fn barrier(&self) -> Result<(), Error> {
        Ok(())
    }

    fn start_over(&self) -> Result<(), Error> {
        Ok(())
    }

    fn next_turn(&self, taken: u64) -> Result<u64, Error> {
        Ok(taken)
    }

    fn abandon(&self, _reason: &str) {}
}

#[cfg(test)]
mod tests {
    use super::super::launch;
    use super::*;

    #[test]
    fn one_rank_is_alone_whoever_started_it() {
        let joined = |variables: &[(&str, &str)]| {
            let variables = variables.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
            let place = launch::place(&variables).map_err(Error::from)?;
            join(place, Duration::from_millis(10)).map(|ranks| (ranks.rank(), ranks.world_size()))
        };
        assert_eq!(joined(&[]), Ok((0, 1)));
        assert_eq!(joined(&[("RANK", "0"), ("WORLD_SIZE", "1")]), Ok((0, 1)));
        // An sbatch script has the job's variables, and is one process.
        assert_eq!(joined(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4")]), Ok((0, 1)));
        assert!(matches!(joined(&[("RANK", "0")]), Err(Error::Launch(_))));
        let nowhere = joined(&[("RANK", "1"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")]).unwrap_err().to_string();
        assert!(nowhere.contains("torchrun") && nowhere.contains("MASTER_ADDR"), "{nowhere}");
    }

    #[test]
    fn one_rank_hears_itself() {
        let mut sums = [0.1f64, 2.0];
        Alone.all_reduce_sum_f64(&mut sums).unwrap();
        assert_eq!(sums, [0.1, 2.0]);
        assert_eq!(Alone.sum_of_counts(7), Ok(7));
        assert_eq!((Alone.next_turn(0), Alone.next_turn(1)), (Ok(0), Ok(1)));
        assert_eq!(Alone.all_gather_bytes(b"ab"), Ok(vec![b"ab".to_vec()]));
        assert!(matches!(Alone.broadcast(&mut vec![], 1), Err(Error::Root { root: 1, .. })));
    }
}
