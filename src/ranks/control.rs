//! What ranks agree on beside their tensors, and the one rank that is alone.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Error, launch};

/// The ranks that whatever started this process has started, by its environment's variables: one alone where nothing did.
///
/// # Errors
/// If the variables cannot be read or contradict each other, or there is more than one rank: ranks of several processes
/// have no way to talk yet.
pub fn join(environment: &BTreeMap<String, String>) -> Result<Arc<dyn Ranks>, Error> {
    match launch::place(environment)? {
        Some(place) if place.world_size > 1 => {
            Err(Error::Several { launcher: place.launcher, rank: place.rank, world_size: place.world_size })
        }
        _ => Ok(Arc::new(Alone)),
    }
}

/// The ranks of a run as one of them sees them: for what is small and lies on the host.
///
/// All ranks must make the same calls in the same order. Every call waits for the others, no longer than the group's
/// deadline. After an error the group is not usable any more: the ranks may be at different calls.
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

    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// If a rank is lost or late.
    fn barrier(&self) -> Result<(), Error>;

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

    fn barrier(&self) -> Result<(), Error> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_rank_is_alone_and_several_are_refused_whoever_started_them() {
        let joined = |variables: &[(&str, &str)]| {
            join(&variables.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect())
                .map(|ranks| (ranks.rank(), ranks.world_size()))
        };
        assert_eq!(joined(&[]), Ok((0, 1)));
        assert_eq!(joined(&[("RANK", "0"), ("WORLD_SIZE", "1")]), Ok((0, 1)));
        // An sbatch script has the job's variables, and is one process.
        assert_eq!(joined(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4")]), Ok((0, 1)));
        let torchrun = joined(&[("RANK", "1"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")]).unwrap_err().to_string();
        assert!(torchrun.contains("torchrun") && torchrun.contains("rank 1 of 4"), "{torchrun}");
        assert!(torchrun.contains("`gradient_accumulation_steps` by 4"), "{torchrun}");
        let step = [("SLURM_STEP_ID", "0"), ("SLURM_PROCID", "0"), ("SLURM_NTASKS", "2"), ("SLURM_LOCALID", "0")];
        assert!(joined(&step).unwrap_err().to_string().contains("srun"));
        assert!(matches!(joined(&[("RANK", "0")]), Err(Error::Launch(_))));
    }

    #[test]
    fn one_rank_hears_itself() {
        let mut sums = [0.1f64, 2.0];
        Alone.all_reduce_sum_f64(&mut sums).unwrap();
        assert_eq!(sums, [0.1, 2.0]);
        assert_eq!(Alone.sum_of_counts(7), Ok(7));
        assert_eq!(Alone.all_gather_bytes(b"ab"), Ok(vec![b"ab".to_vec()]));
        assert!(matches!(Alone.broadcast(&mut vec![], 1), Err(Error::Root { root: 1, .. })));
    }
}
