//! What ranks exchange where it lies: values gathered and gradients summed, without a wait of the host.

use std::cell::RefCell;
use std::ops::Range;

use super::{Alone, Error};
use crate::device::{Part, Queue, Ticket};

/// What sums are made of. They are made in f32 and rounded once on the host; NCCL rounds 16-bit ones as it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sum {
    /// f32.
    F32,
    /// bf16.
    Bf16,
    /// f16.
    F16,
}

impl Sum {
    /// Bytes of a value.
    pub fn size_in_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }
}

/// The ranks of a run, for what is large and stays where it lies.
///
/// All ranks must ask for the same work in the same order. It is done in that order, each piece after `after`, and until its
/// ticket has come nobody else may write to its parts or read what it writes. If it cannot be done its ticket is given up,
/// [`Self::check`] says why, and the group is not usable any more. Sums are made in an order that is the same on every rank, so
/// that all hold the same bits: rank 0's values first and the last rank's last on the host, an order of NCCL's own on GPUs.
pub trait Exchange: Send {
    /// Puts every rank's `shard` into `full`, in the order of the ranks. `shard` may be this rank's place in `full`.
    ///
    /// # Errors
    /// If `full` is not `world_size` shards long, or earlier work has failed.
    fn all_gather(&self, shard: &Part, full: &Part, after: &Ticket) -> Result<Ticket, Error>;

    /// Puts this rank's stretch of the sum of `full` over ranks into `shard`, which may be that stretch of `full`.
    ///
    /// # Errors
    /// As [`Self::all_gather`], or if `shard` is not made of whole values.
    fn reduce_scatter(&self, full: &Part, shard: &Part, sum: Sum, after: &Ticket) -> Result<Ticket, Error>;

    /// Puts what each rank has of `full` there on every rank: `ranges` are the bytes of `full` that each has, of any lengths.
    ///
    /// # Errors
    /// If there are not as many ranges as ranks, one leaves `full`, or earlier work has failed.
    fn all_gather_ranges(&self, full: &Part, ranges: &[Range<usize>], after: &Ticket) -> Result<Ticket, Error>;

    /// Sends `to[r]` to each rank `r`, which has as many parts of the same lengths for this one in its `from`. What is of this
    /// rank itself stays.
    ///
    /// # Errors
    /// If there are not as many as ranks, or earlier work has failed.
    fn all_to_all(&self, to: &[Vec<Part>], from: &[Vec<Part>], after: &Ticket) -> Result<Ticket, Error>;

    /// Does what `work` asks for together; the tickets of its pieces mean nothing, that of the group is returned.
    ///
    /// # Errors
    /// What `work` returns, or if earlier work has failed.
    fn grouped(&self, work: &mut dyn FnMut(&dyn Exchange) -> Result<(), Error>) -> Result<Ticket, Error>;

    /// The error of work that was asked for, if it has failed.
    ///
    /// # Errors
    /// That one.
    fn check(&self) -> Result<(), Error>;
}

/// Checks the lengths of what an exchange is asked for.
pub(super) fn check_parts(operation: &'static str, world_size: usize, shard: &Part, full: &Part) -> Result<(), Error> {
    let expected = shard.len() * world_size;
    if full.len() == expected {
        Ok(())
    } else {
        Err(Error::Length { operation, world_size, what: "full", got: full.len(), expected })
    }
}

/// Checks that bytes are whole values of a sum.
pub(super) fn check_values(operation: &'static str, world_size: usize, shard: &Part, sum: Sum) -> Result<(), Error> {
    let size = sum.size_in_bytes();
    if shard.len().is_multiple_of(size) {
        Ok(())
    } else {
        let expected = shard.len().next_multiple_of(size);
        Err(Error::Length { operation, world_size, what: "shard", got: shard.len(), expected })
    }
}

/// Checks that there is something for each rank.
pub(super) fn check_ranks(operation: &'static str, world_size: usize, count: usize) -> Result<(), Error> {
    if count == world_size {
        return Ok(());
    }
    Err(Error::Length { operation, world_size, what: "ranks", got: count, expected: world_size })
}

/// The ranges of a part.
pub(super) fn ranges_of(
    operation: &'static str,
    world_size: usize,
    full: &Part,
    ranges: &[Range<usize>],
) -> Result<Vec<Part>, Error> {
    check_ranks(operation, world_size, ranges.len())?;
    let start = full.bytes().start;
    let part = |range: &Range<usize>| {
        if range.start > range.end || range.end > full.len() {
            let (got, expected) = (range.end, full.len());
            return Err(Error::Length { operation, world_size, what: "range", got, expected });
        }
        let part = full.buffer().part(start + range.start..start + range.end);
        part.map_err(|error| device_error(0, operation, error))
    };
    ranges.iter().map(part).collect()
}

pub(super) fn device_error(rank: usize, operation: &'static str, problem: impl std::fmt::Display) -> Error {
    Error::Device { rank, operation, problem: problem.to_string() }
}

impl Alone {
    /// One rank has its shard where the whole is, or it is copied there.
    fn pass(operation: &'static str, from: &Part, to: &Part, after: &Ticket) -> Result<Ticket, Error> {
        if std::sync::Arc::ptr_eq(from.buffer(), to.buffer()) && from.bytes() == to.bytes() {
            return Ok(after.clone());
        }
        let queue = Queue::of(to.buffer().of_device());
        queue.and_then(|queue| queue.copy(from, to, after)).map_err(|error| device_error(0, operation, error))
    }
}

impl Exchange for Alone {
    fn all_gather(&self, shard: &Part, full: &Part, after: &Ticket) -> Result<Ticket, Error> {
        check_parts("all_gather", 1, shard, full)?;
        Self::pass("all_gather", shard, full, after)
    }

    fn reduce_scatter(&self, full: &Part, shard: &Part, sum: Sum, after: &Ticket) -> Result<Ticket, Error> {
        check_parts("reduce_scatter", 1, shard, full)?;
        check_values("reduce_scatter", 1, shard, sum)?;
        Self::pass("reduce_scatter", full, shard, after)
    }

    fn all_gather_ranges(&self, full: &Part, ranges: &[Range<usize>], after: &Ticket) -> Result<Ticket, Error> {
        ranges_of("all_gather_ranges", 1, full, ranges)?;
        Ok(after.clone())
    }

    fn all_to_all(&self, to: &[Vec<Part>], from: &[Vec<Part>], after: &Ticket) -> Result<Ticket, Error> {
        check_ranks("all_to_all", 1, to.len())?;
        check_ranks("all_to_all", 1, from.len())?;
        Ok(after.clone())
    }

    fn grouped(&self, work: &mut dyn FnMut(&dyn Exchange) -> Result<(), Error>) -> Result<Ticket, Error> {
        let group = Group { last: RefCell::new(None) };
        work(&group)?;
        group.ticket()
    }

    fn check(&self) -> Result<(), Error> {
        Ok(())
    }
}

/// Work of one rank alone whose tickets become one.
struct Group {
    /// The queue that has been told to come after all pieces so far.
    last: RefCell<Option<Queue>>,
}

impl Group {
    fn add(&self, to: &Part, ticket: &Ticket) -> Result<(), Error> {
        let failed = |error| device_error(0, "grouped", error);
        let queue = Queue::of(to.buffer().of_device()).map_err(failed)?;
        let mut last = self.last.borrow_mut();
        if let Some(before) = last.as_ref().filter(|before| !before.is_same(&queue)) {
            queue.after(&before.ticket().map_err(failed)?).map_err(failed)?;
        }
        queue.after(ticket).map_err(failed)?;
        *last = Some(queue);
        Ok(())
    }

    fn ticket(&self) -> Result<Ticket, Error> {
        let ticket = self.last.borrow().as_ref().map_or_else(|| Ok(Ticket::done()), Queue::ticket);
        ticket.map_err(|error| device_error(0, "grouped", error))
    }
}

impl Exchange for Group {
    fn all_gather(&self, shard: &Part, full: &Part, after: &Ticket) -> Result<Ticket, Error> {
        let ticket = Alone.all_gather(shard, full, after)?;
        self.add(full, &ticket)?;
        Ok(ticket)
    }

    fn reduce_scatter(&self, full: &Part, shard: &Part, sum: Sum, after: &Ticket) -> Result<Ticket, Error> {
        let ticket = Alone.reduce_scatter(full, shard, sum, after)?;
        self.add(shard, &ticket)?;
        Ok(ticket)
    }

    fn all_gather_ranges(&self, full: &Part, ranges: &[Range<usize>], after: &Ticket) -> Result<Ticket, Error> {
        let ticket = Alone.all_gather_ranges(full, ranges, after)?;
        self.add(full, &ticket)?;
        Ok(ticket)
    }

    fn all_to_all(&self, to: &[Vec<Part>], from: &[Vec<Part>], after: &Ticket) -> Result<Ticket, Error> {
        Alone.all_to_all(to, from, after)
    }

    fn grouped(&self, work: &mut dyn FnMut(&dyn Exchange) -> Result<(), Error>) -> Result<Ticket, Error> {
        work(self)?;
        self.ticket()
    }

    fn check(&self) -> Result<(), Error> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::device::Buffer;

    fn buffer(values: &[f32]) -> Arc<Buffer> {
        let mut buffer = Buffer::host(4 * values.len());
        buffer.write(0, values).unwrap();
        Arc::new(buffer)
    }

    fn values(buffer: &Buffer) -> Vec<f32> {
        buffer.with_bytes(|bytes| bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()).unwrap()
    }

    #[test]
    fn one_rank_keeps_its_own_values() {
        let (shard, full) = (buffer(&[1.0, -2.0]), buffer(&[0.0; 2]));
        let ticket = Alone
            .grouped(&mut |group| {
                let gathered = group.all_gather(&shard.whole(), &full.whole(), &Ticket::done())?;
                group.reduce_scatter(&full.whole(), &full.whole(), Sum::F32, &gathered).map(drop)
            })
            .unwrap();
        assert!(ticket.is_done().unwrap());
        assert_eq!(values(&full), [1.0, -2.0]);
    }

    #[test]
    fn what_lies_where_it_belongs_is_there_when_it_is_made() {
        let full = buffer(&[1.0; 4]);
        let (work, made) = Ticket::promise();
        let gathered = Alone.all_gather(&full.whole(), &full.whole(), &made).unwrap();
        assert!(!gathered.is_done().unwrap());
        work.done();
        assert!(gathered.is_done().unwrap());
    }

    #[test]
    fn lengths_are_checked() {
        let (two, three) = (buffer(&[0.0; 2]), buffer(&[0.0; 3]));
        let wrong = Alone.all_gather(&two.whole(), &three.whole(), &Ticket::done()).unwrap_err();
        assert!(matches!(wrong, Error::Length { got: 12, expected: 8, what: "full", .. }), "{wrong}");
        let odd = two.part(0..7).unwrap();
        let wrong = Alone.reduce_scatter(&odd, &odd, Sum::Bf16, &Ticket::done()).unwrap_err();
        assert!(matches!(wrong, Error::Length { got: 7, expected: 8, what: "shard", .. }), "{wrong}");
    }
}
