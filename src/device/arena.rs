//! Memory at fixed addresses: what is taken in the same order lies at the same places, so that recorded work can be repeated.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::DType;

use super::{Buffer, Error, Matrix, Pointer, Queue, argument};

/// What is taken begins at multiples of so many bytes, as what a GPU allocates does.
const ALIGNMENT: usize = 256;

/// One buffer, handed out from its beginning to its end. What is taken is lent until [`Self::reset`].
#[derive(Debug)]
pub struct Arena {
    buffer: Buffer,
    used: AtomicUsize,
}

impl Arena {
    /// An arena in the memory of a queue's device.
    ///
    /// # Errors
    /// If memory runs out.
    pub fn new(queue: &Queue, bytes: usize) -> Result<Self, Error> {
        Ok(Self { buffer: Buffer::device(queue, bytes)?, used: AtomicUsize::new(0) })
    }

    /// Bytes that are handed out.
    pub fn used_bytes(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// All its bytes.
    pub fn len(&self) -> usize {
        self.buffer.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// A matrix of no defined value.
    ///
    /// # Errors
    /// If the arena is used up, or does not lie on a GPU.
    pub fn take(&self, (rows, cols): (usize, usize), dtype: DType) -> Result<Matrix<'_>, Error> {
        let bytes = self.reserve(rows.saturating_mul(cols), dtype)?;
        self.buffer.matrix(bytes.start, (rows, cols), dtype)
    }

    /// An array of no defined value.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub fn take_array(&self, len: usize, dtype: DType) -> Result<Pointer<'_>, Error> {
        let bytes = self.reserve(len, dtype)?;
        self.buffer.array(bytes.start, len, dtype)
    }

    /// The bytes that the next `count` values take.
    fn reserve(&self, count: usize, dtype: DType) -> Result<Range<usize>, Error> {
        let bytes = count.saturating_mul(dtype.size_in_bytes());
        let place = |used: usize| {
            let start = used.next_multiple_of(ALIGNMENT);
            start.checked_add(bytes).filter(|&end| end <= self.buffer.len()).map(|end| start..end)
        };
        let taken = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| Some(place(used)?.end));
        let used = taken.map_err(|used| {
            let left = self.buffer.len().saturating_sub(used);
            argument("arena", "bytes", bytes, format!("at most the {left} of {} that are left", self.buffer.len()))
        })?;
        place(used).ok_or_else(|| argument("arena", "bytes", bytes, self.buffer.len()))
    }

    /// Takes everything back: the next views are those of the beginning again.
    pub fn reset(&mut self) {
        *self.used.get_mut() = 0;
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::Arena;
    use crate::device::Queue;

    #[test]
    fn what_is_taken_in_one_order_lies_at_the_same_places() {
        let mut arena = Arena::new(&Queue::of(&Device::Cpu).unwrap(), 2048).unwrap();
        let take = |arena: &Arena| {
            [(3, DType::F32), (0, DType::U8), (130, DType::BF16), (256, DType::U8)]
                .map(|(count, dtype)| arena.reserve(count, dtype).unwrap())
        };
        let first = take(&arena);
        assert_eq!(first, [0..12, 256..256, 256..516, 768..1024]);
        arena.reset();
        assert_eq!(arena.used_bytes(), 0);
        assert_eq!(take(&arena), first);
    }

    #[test]
    fn an_arena_that_is_used_up_says_what_is_left_and_stays_as_it_was() {
        let arena = Arena::new(&Queue::of(&Device::Cpu).unwrap(), 1000).unwrap();
        arena.reserve(500, DType::U8).unwrap();
        let error = arena.reserve(200, DType::F32).unwrap_err().to_string();
        assert!(error.contains("500 of 1000"), "{error}");
        assert!(arena.reserve(usize::MAX, DType::F64).is_err());
        assert_eq!(arena.reserve(61, DType::F64).unwrap(), 512..1000);
        assert!(arena.take((1, 1), DType::F32).is_err(), "kernels do not reach the host's memory");
    }
}
