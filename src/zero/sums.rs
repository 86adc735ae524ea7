//! The order in which the gradients of a step's micro-batches are added.
//!
//! Sums of floats depend on their order. Where runs are to agree to the last bit however many ranks share a step, the order is
//! a fixed tree: the step's micro-batches, counted over all ranks, are cut into runs of equal length (leaves), each added from
//! left to right; leaf 0 and 1 are added, 2 and 3, then these two, and so on, as in a binary counter; what is left over at the
//! end is added from right to left. Each rank has neighbouring micro-batches, adds what it has of the tree, and the ranks' parts
//! are put together in the same order. Micro-batches that are missing at the end change nothing.

/// Most leaves of a step: each doubling costs one more set of gradients.
const MOST_LEAVES: usize = 16;

/// How the micro-batches of one step are added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sums {
    /// Of this rank.
    micro_steps: usize,
    rank: usize,
    world_size: usize,
    /// Micro-batches of a leaf; `None`: one after the other on each rank.
    leaf: Option<usize>,
}

/// What follows when a micro-batch's gradients are in the bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The next micro-batch is added to the same bucket.
    Add,
    /// So many of the sums laid aside last are added to the bucket; then it is laid aside and emptied, or, after the last
    /// micro-batch, is the last of this rank's sums.
    Merge {
        /// How many.
        count: usize,
        /// Whether this was the last micro-batch.
        is_last: bool,
    },
}

/// A part of the tree: the leaves `index << level .. (index + 1) << level`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    level: u32,
    index: usize,
    /// Whether no other rank has a piece of it.
    is_whole: bool,
}

impl Node {
    fn leaf(index: usize, is_whole: bool) -> Self {
        Self { level: 0, index, is_whole }
    }

    /// What this and the one after it add up to, if they are neighbours in the tree.
    fn with(self, right: Self) -> Option<Self> {
        let are_halves = self.level == right.level && self.index.is_multiple_of(2) && right.index == self.index + 1;
        let parent = Self { level: self.level + 1, index: self.index / 2, is_whole: true };
        (are_halves && self.is_whole && right.is_whole).then_some(parent)
    }
}

impl Sums {
    /// One after the other on each of the ranks, which have as many each: the least memory.
    pub fn running(micro_steps: usize, rank: usize, world_size: usize) -> Self {
        Self { micro_steps, rank, world_size, leaf: None }
    }

    /// By the tree that does not depend on ranks.
    pub fn tree(micro_steps: usize, rank: usize, world_size: usize) -> Self {
        let most = (micro_steps * world_size).next_power_of_two();
        Self { micro_steps, rank, world_size, leaf: Some((most / MOST_LEAVES).max(1)) }
    }

    /// The same sums on another rank.
    #[must_use]
    pub fn on_rank(self, rank: usize) -> Self {
        Self { rank, ..self }
    }

    /// Micro-batches of this rank.
    pub fn micro_steps(self) -> usize {
        self.micro_steps
    }

    /// Sets of gradients that are laid aside at most.
    pub fn most_aside(self) -> usize {
        // The last sum stays in the bucket.
        let aside = |index| self.nodes_after(index).0.len() - usize::from(index + 1 == self.micro_steps);
        (0..self.micro_steps).filter(|&index| self.ends_leaf(index)).map(aside).max().unwrap_or(0)
    }

    /// What follows after micro-batch `index` of this rank.
    pub fn after(self, index: usize) -> Next {
        let is_last = index + 1 == self.micro_steps;
        if self.ends_leaf(index) { Next::Merge { count: self.nodes_after(index).1, is_last } } else { Next::Add }
    }

    /// This rank's sums at the end of a step.
    pub fn nodes(self) -> Vec<Node> {
        self.micro_steps.checked_sub(1).map_or_else(Vec::new, |last| self.nodes_after(last).0)
    }

    /// The sum of all ranks' sums, in their order, each rank's in its own.
    pub fn total<T>(sums: impl IntoIterator<Item = (Node, T)>, add: impl Fn(T, T) -> T) -> Option<T> {
        let mut stack: Vec<(Node, T)> = Vec::new();
        let mut sums = sums.into_iter().peekable();
        while let Some((mut node, mut sum)) = sums.next() {
            // A leaf that ranks have pieces of.
            while let Some((_, piece)) =
                sums.next_if(|(other, _)| !node.is_whole && other.index == node.index && other.level == 0)
            {
                sum = add(sum, piece);
            }
            node.is_whole = true;
            stack.push((node, sum));
            while let [.., (left, _), (right, _)] = stack.as_slice()
                && let Some(parent) = left.with(*right)
                && let (Some((_, right)), Some((_, left))) = (stack.pop(), stack.pop())
            {
                stack.push((parent, add(left, right)));
            }
        }
        stack.into_iter().map(|(_, sum)| sum).rev().reduce(|right, left| add(left, right))
    }

    fn first(self) -> usize {
        self.rank * self.micro_steps
    }

    fn ends_leaf(self, index: usize) -> bool {
        let is_last = index + 1 == self.micro_steps;
        is_last || self.leaf.is_some_and(|leaf| (self.first() + index + 1).is_multiple_of(leaf))
    }

    /// The sums there are after micro-batch `index`, and how many were added to the last.
    fn nodes_after(self, index: usize) -> (Vec<Node>, usize) {
        let Some(leaf) = self.leaf else { return (vec![Node::leaf(self.rank, true)], 0) };
        let (first, all) = (self.first(), self.micro_steps * self.world_size);
        let mut nodes: Vec<Node> = Vec::new();
        let mut merged = 0;
        for index in (0..=index).filter(|&index| self.ends_leaf(index)) {
            let end = first + index + 1;
            let number = (end - 1) / leaf;
            let is_whole = number * leaf >= first && (end == (number + 1) * leaf || end == all);
            let mut node = Node::leaf(number, is_whole);
            merged = 0;
            while let Some(parent) = nodes.last().and_then(|left| left.with(node)) {
                nodes.pop();
                (node, merged) = (parent, merged + 1);
            }
            nodes.push(node);
        }
        // A rank that is alone has the sum of all at the end.
        if self.world_size == 1 && index + 1 == self.micro_steps {
            merged += nodes.len() - 1;
            nodes.drain(1..);
        }
        (nodes, merged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// This rank's sums as text, by the rule of [`Sums::after`].
    fn parts(sums: Sums) -> Vec<(Node, String)> {
        let (mut bucket, mut aside) = (String::new(), Vec::<String>::new());
        let mut most = 0;
        for index in 0..sums.micro_steps() {
            let number = (sums.first() + index).to_string();
            bucket = if bucket.is_empty() { number } else { format!("({bucket}+{number})") };
            if let Next::Merge { count, is_last } = sums.after(index) {
                for _ in 0..count {
                    bucket = format!("({}+{bucket})", aside.pop().unwrap());
                }
                assert_eq!(is_last, index + 1 == sums.micro_steps());
                if !is_last {
                    aside.push(std::mem::take(&mut bucket));
                }
                most = most.max(aside.len());
            }
        }
        assert!(most <= sums.most_aside());
        let nodes = sums.nodes();
        assert_eq!(nodes.len(), aside.len() + usize::from(!bucket.is_empty()));
        nodes.into_iter().zip(aside.into_iter().chain([bucket])).collect()
    }

    fn shape(sums: Sums) -> String {
        let all = (0..sums.world_size).flat_map(|rank| parts(sums.on_rank(rank)));
        Sums::total(all, |left, right| format!("({left}+{right})")).unwrap()
    }

    #[test]
    fn sums_are_halves_of_runs() {
        let alone = |count| shape(Sums::tree(count, 0, 1));
        assert_eq!(alone(1), "0");
        assert_eq!(alone(3), "((0+1)+2)");
        assert_eq!(alone(4), "((0+1)+(2+3))");
        assert_eq!(alone(6), "(((0+1)+(2+3))+(4+5))");
        assert_eq!(alone(7), "(((0+1)+(2+3))+((4+5)+6))");
        assert!(alone(32).starts_with("(((((0+1)+(2+3))+"));
        assert!(alone(64).starts_with("(((((((0+1)+2)+3)+(((4+5)+6)+7))+"), "{}", alone(64));
        assert_eq!(alone(64).matches('+').count(), 63);
        assert_eq!(shape(Sums::running(4, 0, 1)), "(((0+1)+2)+3)");
        assert_eq!(shape(Sums::running(2, 0, 4)), "(((0+1)+(2+3))+((4+5)+(6+7)))");
    }

    #[test]
    fn the_sum_does_not_depend_on_the_number_of_ranks() {
        for micro_steps in 1..=48usize {
            let alone = shape(Sums::tree(micro_steps, 0, 1));
            let leaf = (micro_steps.next_power_of_two() / MOST_LEAVES).max(1);
            for ranks in (1..=micro_steps).filter(|&ranks| micro_steps.is_multiple_of(ranks)) {
                let own = micro_steps / ranks;
                let shared = shape(Sums::tree(own, 0, ranks));
                if own.is_multiple_of(leaf) || ranks == 1 {
                    assert_eq!(shared, alone, "{micro_steps} over {ranks}");
                } else {
                    // A leaf that two ranks have pieces of: each micro-batch is there once all the same.
                    assert_eq!(shared.matches('+').count() + 1, micro_steps, "{micro_steps} over {ranks}: {shared}");
                }
            }
        }
    }

    #[test]
    fn micro_batches_that_are_missing_at_the_end_change_nothing() {
        /// Sums where zeros leave what they are added to.
        fn with_zeros(sums: Sums, real: usize) -> String {
            let all = (0..sums.world_size).flat_map(|rank| {
                parts(sums.on_rank(rank)).into_iter().map(move |(node, text)| {
                    let numbers = text.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse::<usize>().ok());
                    let count = numbers.filter(|&n| n < real).count();
                    (node, if count == 0 { String::new() } else { text })
                })
            });
            let add = |left: String, right: String| match (left.is_empty(), right.is_empty()) {
                (_, true) => left,
                (true, false) => right,
                (false, false) => format!("({left}+{right})"),
            };
            Sums::total(all, add).unwrap()
        }
        for (real, ranks) in [(5usize, 2), (3, 2), (5, 4), (7, 4), (9, 4), (13, 2)] {
            let own = real.div_ceil(ranks);
            let shared = with_zeros(Sums::tree(own, 0, ranks), real);
            let alone = shape(Sums::tree(real, 0, 1));
            // Zeros within one rank's own sum stand in the text and not in the value.
            let mut cleaned = shared;
            for missing in real..own * ranks {
                cleaned = cleaned.replace(&format!("+{missing})"), ")");
            }
            let plain = |text: &str| text.replace(['(', ')'], "");
            assert_eq!(plain(&cleaned), plain(&alone), "{real} over {ranks}");
        }
    }
}
