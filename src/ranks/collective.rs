//! The collective operations that the rooms above use, and the one-rank implementation.

use super::Error;

/// A group of ranks as one of them sees it.
///
/// All ranks must make the same calls in the same order. Buffers are host memory. After an error the group is not
/// usable any more: the ranks may be at different calls. Sums are f32 in an order that is the same on every rank, so all
/// hold the same bits: rank 0's values first and the last rank's last on the CPU, an order of NCCL's own on GPUs.
pub trait Collective: Send {
    /// This rank, in `0..world_size`.
    fn rank(&self) -> usize;

    /// Number of ranks, at least 1.
    fn world_size(&self) -> usize;

    /// Replaces `values` by their sum over ranks; the same bits on every rank.
    ///
    /// # Errors
    /// If a rank is lost, late, or has another length.
    fn all_reduce_sum(&self, values: &mut [f32]) -> Result<(), Error>;

    /// Puts every rank's `shard` into `full`, in the order of the ranks.
    ///
    /// # Errors
    /// As [`Self::all_reduce_sum`], or if `full` is not `world_size` shards long.
    fn all_gather(&self, shard: &[f32], full: &mut [f32]) -> Result<(), Error>;

    /// Puts this rank's stretch of the sum of `full` over ranks into `shard`: the bits [`Self::all_reduce_sum`] would give.
    ///
    /// # Errors
    /// As [`Self::all_gather`].
    fn reduce_scatter_sum(&self, full: &[f32], shard: &mut [f32]) -> Result<(), Error>;

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

    /// Replaces `values` by their sum over ranks in f64, added in the order of the ranks: for norms, losses and metrics.
    ///
    /// # Errors
    /// As [`Self::all_reduce_sum`].
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
}

/// Checks the buffers of [`Collective::all_gather`] and [`Collective::reduce_scatter_sum`].
pub(super) fn check_shards(operation: &'static str, world_size: usize, shard: usize, full: usize) -> Result<(), Error> {
    let expected = shard * world_size;
    if full == expected {
        Ok(())
    } else {
        Err(Error::Length { operation, world_size, what: "full", got: full, expected })
    }
}

/// Checks the root of [`Collective::broadcast`].
pub(super) fn check_root(world_size: usize, root: usize) -> Result<(), Error> {
    if root < world_size { Ok(()) } else { Err(Error::Root { operation: "broadcast", root, world_size }) }
}

/// One rank alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Solo;

impl Collective for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn all_reduce_sum(&self, _values: &mut [f32]) -> Result<(), Error> {
        Ok(())
    }

    fn all_gather(&self, shard: &[f32], full: &mut [f32]) -> Result<(), Error> {
        check_shards("all_gather", 1, shard.len(), full.len())?;
        full.copy_from_slice(shard);
        Ok(())
    }

    fn reduce_scatter_sum(&self, full: &[f32], shard: &mut [f32]) -> Result<(), Error> {
        check_shards("reduce_scatter_sum", 1, shard.len(), full.len())?;
        shard.copy_from_slice(full);
        Ok(())
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
    fn one_rank_keeps_its_own_values() {
        let mut values = [1.0f32, -2.0];
        Solo.all_reduce_sum(&mut values).unwrap();
        let mut full = [0.0f32; 2];
        Solo.all_gather(&values, &mut full).unwrap();
        let mut shard = [0.0f32; 2];
        Solo.reduce_scatter_sum(&full, &mut shard).unwrap();
        assert_eq!((values, full, shard), ([1.0, -2.0], [1.0, -2.0], [1.0, -2.0]));
        let mut sums = [0.1f64, 2.0];
        Solo.all_reduce_sum_f64(&mut sums).unwrap();
        assert_eq!(sums, [0.1, 2.0]);
        assert!(matches!(Solo.all_gather(&values, &mut [0.0; 3]), Err(Error::Length { got: 3, expected: 2, .. })));
        assert!(matches!(Solo.broadcast(&mut vec![], 1), Err(Error::Root { root: 1, .. })));
    }
}
