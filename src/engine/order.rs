//! The order in which a step's micro-batches pass through the blocks.
//!
//! Ranks that share blocks or gradients go through the blocks together, so the order follows from what all of them have of a step,
//! which they tell each other before it.

use super::{Activations, Engine, Error};
use crate::model::batch::Batch;
use crate::ranks;
use crate::zero;

/// The order in which a step's micro-batches pass through the blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// One micro-batch after the other: the least activations.
    DepthFirst,
    /// So many micro-batches at a time, one block after the other: every block is asked for twice a group, whose activations are
    /// there.
    Grouped(usize),
    /// One block after the other, each with all micro-batches: every block is asked for twice a step instead of twice a
    /// micro-batch, and its gradients are final at once.
    BreadthFirst,
}

impl Order {
    /// What it is, whatever the size of groups.
    pub fn name(self) -> &'static str {
        match self {
            Self::DepthFirst => "depth first",
            Self::Grouped(_) => "in groups",
            Self::BreadthFirst => "breadth first",
        }
    }

    /// Micro-batches that pass together, of so many.
    pub fn at_a_time(self, micro_steps: usize) -> usize {
        match self {
            Self::DepthFirst => 1,
            Self::Grouped(count) => count.clamp(1, micro_steps.max(1)),
            Self::BreadthFirst => micro_steps.max(1),
        }
    }
}

impl std::fmt::Display for Order {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Grouped(count) => write!(f, "in groups of {count}"),
            order => f.write_str(order.name()),
        }
    }
}

/// A step as all ranks go through it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Course {
    pub(super) order: Order,
    /// Micro-batches of a rank, at least 1; one that has fewer goes through the blocks with nothing for those that it lacks.
    pub(super) micro_steps: usize,
    /// Of these, those that pass together.
    pub(super) at_a_time: usize,
}

/// What a rank has of a step, as far as the order depends on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Share {
    micro_steps: usize,
    /// Of all micro-batches together.
    tokens: usize,
    /// Micro-batches at a time that hide the way of the blocks; `None` if there is nothing to learn in any.
    group: Option<usize>,
}

impl Share {
    const NUM_BYTES: usize = 3 * size_of::<u64>();

    fn to_bytes(self) -> Vec<u8> {
        let numbers = [self.micro_steps, self.tokens, self.group.unwrap_or(0)];
        numbers.iter().flat_map(|&number| (number as u64).to_le_bytes()).collect()
    }

    /// What [`Self::to_bytes`] made; `None` of anything else.
    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (numbers, []) = bytes.as_chunks::<8>() else { return None };
        let [micro_steps, tokens, group] = *numbers else { return None };
        let number = |bytes| usize::try_from(u64::from_le_bytes(bytes)).ok();
        let group = number(group)?;
        Some(Self { micro_steps: number(micro_steps)?, tokens: number(tokens)?, group: (group > 0).then_some(group) })
    }

    /// What it comes to over all ranks: those with fewer micro-batches follow the others, inputs have room where there are most, and
    /// a group is as large as hides the way on the rank that computes longest, since the others wait for it at every block.
    fn of_all(shares: &[Self]) -> Self {
        Self {
            micro_steps: shares.iter().map(|share| share.micro_steps).max().unwrap_or(0),
            tokens: shares.iter().map(|share| share.tokens).max().unwrap_or(0),
            group: shares.iter().filter_map(|share| share.group).min(),
        }
    }
}

/// What is the same on every rank.
#[derive(Clone, Copy, Debug)]
struct Common {
    /// Whether all blocks are where they compute.
    holds_all: bool,
    /// Whether those that are not come while others compute.
    comes_ahead: bool,
    /// Whether the inputs of all layers take less memory than gradients that wait or are laid aside otherwise.
    is_less: bool,
}

impl Common {
    /// Breadth first where blocks come one at a time, and where it takes less memory; in groups where blocks come while others
    /// compute, and one micro-batch does not hide it; else depth first.
    fn order(self, all: Share) -> Order {
        if self.is_less || (!self.holds_all && !self.comes_ahead) {
            return Order::BreadthFirst;
        }
        match all.group {
            Some(count) if !self.holds_all && count > 1 => {
                if count >= all.micro_steps {
                    Order::BreadthFirst
                } else {
                    Order::Grouped(count)
                }
            }
            _ => Order::DepthFirst,
        }
    }
}

impl Engine {
    /// The order of a step of which this rank has these micro-batches. All ranks ask together.
    ///
    /// # Errors
    /// If a rank is lost.
    pub fn order_of(&self, step: &[Batch]) -> Result<Order, Error> {
        Ok(self.course(step)?.order)
    }

    /// How all ranks go through a step of which this one has these micro-batches.
    pub(super) fn course(&self, step: &[Batch]) -> Result<Course, Error> {
        let tokens = step.iter().map(|batch| batch.tokens.len()).sum();
        let own = Share { micro_steps: step.len(), tokens, group: self.group_size(step) };
        let all = Share::of_all(&self.shares(own)?);
        let micro_steps = all.micro_steps.max(1);
        let order = self.forced_order.unwrap_or_else(|| {
            let (holds_all, comes_ahead) = (self.store.holds_all(), self.store.comes_ahead());
            let is_less = self.activations != Activations::Keep
                && self.waiting_gradient_bytes(micro_steps) > self.input_bytes(all.tokens);
            Common { holds_all, comes_ahead, is_less }.order(all)
        });
        Ok(Course { order, micro_steps, at_a_time: order.at_a_time(micro_steps) })
    }

    /// What every rank has of a step, in their order.
    fn shares(&self, own: Share) -> Result<Vec<Share>, Error> {
        let all = self.store.sharing().ranks().all_gather_bytes(&own.to_bytes()).map_err(zero::Error::from)?;
        let share = |(peer, bytes): (usize, &Vec<u8>)| {
            Share::from_bytes(bytes).ok_or_else(|| {
                let problem = format!("{} bytes, expected {}", bytes.len(), Share::NUM_BYTES);
                zero::Error::from(ranks::Error::Message { peer, what: "what it has of a step", problem }).into()
            })
        };
        all.iter().enumerate().map(share).collect()
    }

    /// Bytes of gradients that wait or are laid aside unless a step is done with one block before it takes the next, on the rank where
    /// they are most.
    fn waiting_gradient_bytes(&self, micro_steps: usize) -> usize {
        let (sums, ranks) = (self.sums(micro_steps), self.store.sharing().world_size());
        let aside = (0..ranks).map(|rank| self.store.bytes_aside(sums.on_rank(rank))).max().unwrap_or(0);
        let passing = self.store.passing_gradient_bytes().filter(|_| micro_steps > 1).unwrap_or(0);
        aside.max(passing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(micro_steps: usize, tokens: usize, group: usize) -> Share {
        Share { micro_steps, tokens, group: (group > 0).then_some(group) }
    }

    /// Blocks that come while others compute.
    const AHEAD: Common = Common { holds_all: false, comes_ahead: true, is_less: false };

    fn order(common: Common, shares: &[Share]) -> Order {
        common.order(Share::of_all(shares))
    }

    #[test]
    fn a_share_is_read_as_it_was_told() {
        for share in [share(0, 0, 0), share(32, 65_536, 2), share(1, 7, 1)] {
            let bytes = share.to_bytes();
            assert_eq!((bytes.len(), Share::from_bytes(&bytes)), (Share::NUM_BYTES, Some(share)));
            assert_eq!(Share::from_bytes(&bytes[1..]), None);
            assert_eq!(Share::from_bytes(&bytes[8..]), None);
            assert_eq!(Share::from_bytes(&[bytes.as_slice(), &[0; 8]].concat()), None);
        }
    }

    #[test]
    fn the_rank_that_computes_longest_says_how_many_go_together() {
        assert_eq!(order(AHEAD, &[share(32, 65_536, 2), share(32, 60_000, 3)]), Order::Grouped(2));
        assert_eq!(order(AHEAD, &[share(32, 65_536, 5)]), Order::Grouped(5));
        // One micro-batch of the first hides all.
        assert_eq!(order(AHEAD, &[share(32, 400_000, 1), share(32, 60_000, 3)]), Order::DepthFirst);
    }

    #[test]
    fn a_rank_with_fewer_micro_batches_or_none_follows_the_others() {
        let all = Share::of_all(&[share(3, 300, 2), share(8, 900, 3), share(0, 0, 0)]);
        assert_eq!(all, share(8, 900, 2));
        assert_eq!(AHEAD.order(all), Order::Grouped(2));
        assert_eq!(order(AHEAD, &[share(0, 0, 0), share(4, 400, 7)]), Order::BreadthFirst);
        assert_eq!(order(AHEAD, &[share(0, 0, 0), share(8, 400, 8)]), Order::BreadthFirst);
        // Nobody has anything to learn.
        assert_eq!(order(AHEAD, &[share(2, 0, 0), share(0, 0, 0)]), Order::DepthFirst);
        assert_eq!(Share::of_all(&[]), Share::default());
    }

    #[test]
    fn blocks_that_are_there_need_no_groups_and_blocks_that_come_alone_go_once() {
        let shares = [share(8, 900, 4), share(8, 900, 4)];
        assert_eq!(order(Common { holds_all: true, ..AHEAD }, &shares), Order::DepthFirst);
        assert_eq!(order(Common { comes_ahead: false, ..AHEAD }, &shares), Order::BreadthFirst);
        assert_eq!(order(Common { holds_all: true, is_less: true, ..AHEAD }, &shares), Order::BreadthFirst);
        assert_eq!(order(Common { comes_ahead: false, ..AHEAD }, &[share(0, 0, 0); 2]), Order::BreadthFirst);
    }

    #[test]
    fn every_micro_batch_is_in_one_group() {
        for (order, of, want) in [
            (Order::DepthFirst, 5, 1),
            (Order::Grouped(2), 5, 2),
            (Order::Grouped(0), 5, 1),
            (Order::Grouped(9), 5, 5),
            (Order::BreadthFirst, 5, 5),
            (Order::BreadthFirst, 0, 1),
        ] {
            assert_eq!(order.at_a_time(of), want, "{order:?} of {of}");
        }
    }
}
