//! Sums and gathers of f32 values between ranks.

use super::{Alone, Error};

/// What ranks do with values that each of them holds. Buffers are host memory.
///
/// All ranks must make the same calls in the same order. Sums are f32 in an order that is the same on every rank, so all
/// hold the same bits: rank 0's values first and the last rank's last on the CPU, an order of NCCL's own on GPUs.
pub trait Collective: Send {
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

impl Collective for Alone {
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_rank_keeps_its_own_values() {
        let mut values = [1.0f32, -2.0];
        Alone.all_reduce_sum(&mut values).unwrap();
        let mut full = [0.0f32; 2];
        Alone.all_gather(&values, &mut full).unwrap();
        let mut shard = [0.0f32; 2];
        Alone.reduce_scatter_sum(&full, &mut shard).unwrap();
        assert_eq!((values, full, shard), ([1.0, -2.0], [1.0, -2.0], [1.0, -2.0]));
        assert!(matches!(Alone.all_gather(&values, &mut [0.0; 3]), Err(Error::Length { got: 3, expected: 2, .. })));
    }
}
