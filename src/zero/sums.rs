//! The order in which the gradients of a step's micro-batches are added.
//!
//! Sums of floats depend on their order. Where runs are to agree to the last bit however many ranks share a step, the order is
//! a fixed tree over the step's micro-batches: they are cut into [`Sums::parts`] equal runs, each added from left to right, and
//! the runs are added by halves. A number of ranks that divides the number of runs, and is a power of two, has whole subtrees
//! of it, each on one rank.

/// Most runs of a step's micro-batches: as many ranks get the same sums. Each doubling costs one more set of gradients.
const MOST_PARTS: usize = 8;

/// How the micro-batches of one step are added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sums {
    micro_steps: usize,
    parts: usize,
}

/// What follows when a micro-batch's gradients are in the bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The next micro-batch is added to the same bucket.
    Add,
    /// So many of the sums laid aside last are added to the bucket; then it is laid aside and emptied, or, after the last
    /// micro-batch, has the sum of all.
    Merge {
        /// How many.
        count: usize,
        /// Whether this was the last micro-batch.
        is_last: bool,
    },
}

impl Sums {
    /// One after the other: the least memory.
    pub fn running(micro_steps: usize) -> Self {
        Self { micro_steps, parts: 1 }
    }

    /// By the tree that does not depend on ranks.
    pub fn tree(micro_steps: usize) -> Self {
        // The largest power of two that divides the count.
        let parts = (1 << micro_steps.trailing_zeros().min(MOST_PARTS.trailing_zeros())).min(micro_steps.max(1));
        Self { micro_steps, parts }
    }

    /// Micro-batches of the step.
    pub fn micro_steps(self) -> usize {
        self.micro_steps
    }

    /// Runs that are added from left to right before they are added by halves.
    pub fn parts(self) -> usize {
        self.parts
    }

    /// Sets of gradients that are laid aside at most.
    pub fn most_aside(self) -> usize {
        self.parts.trailing_zeros() as usize
    }

    /// What follows after micro-batch `index`.
    pub fn after(self, index: usize) -> Next {
        let length = self.micro_steps / self.parts;
        if !(index + 1).is_multiple_of(length) {
            return Next::Add;
        }
        let part = (index + 1) / length - 1;
        Next::Merge { count: part.trailing_ones() as usize, is_last: index + 1 == self.micro_steps }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sum as text, by the rule of [`Sums::after`].
    fn shape(sums: Sums) -> String {
        let (mut bucket, mut aside) = (String::new(), Vec::<String>::new());
        let mut most = 0;
        for index in 0..sums.micro_steps() {
            bucket = if bucket.is_empty() { index.to_string() } else { format!("({bucket}+{index})") };
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
        assert!(aside.is_empty());
        assert_eq!(most, sums.most_aside());
        bucket
    }

    #[test]
    fn sums_are_halves_of_runs() {
        assert_eq!(shape(Sums::tree(1)), "0");
        assert_eq!(shape(Sums::tree(3)), "((0+1)+2)");
        assert_eq!(shape(Sums::tree(4)), "((0+1)+(2+3))");
        assert_eq!(shape(Sums::tree(6)), "(((0+1)+2)+((3+4)+5))");
        assert_eq!(shape(Sums::tree(16)).matches('+').count(), 15);
        assert_eq!(shape(Sums::running(4)), "(((0+1)+2)+3)");
    }

    #[test]
    fn ranks_hold_whole_subtrees() {
        for micro_steps in [4, 8, 12, 16, 24, 32] {
            let whole = shape(Sums::tree(micro_steps));
            for ranks in [2, 4] {
                let own = micro_steps / ranks;
                // Each rank's parts are those of the whole step that fall to it.
                let sums = Sums { micro_steps: own, parts: Sums::tree(micro_steps).parts() / ranks };
                let of_rank = |rank: usize| {
                    let text = shape(sums);
                    let numbers = text.split(|c: char| !c.is_ascii_digit()).filter(|n| !n.is_empty());
                    let mut numbers = numbers.map(|n| (n.parse::<usize>().unwrap() + rank * own).to_string());
                    let mut out = String::new();
                    let mut in_number = false;
                    for c in text.chars() {
                        if !c.is_ascii_digit() {
                            in_number = false;
                            out.push(c);
                        } else if !in_number {
                            in_number = true;
                            out.push_str(&numbers.next().unwrap());
                        }
                    }
                    out
                };
                let mut sums: Vec<String> = (0..ranks).map(of_rank).collect();
                while sums.len() > 1 {
                    sums = sums.chunks(2).map(|pair| format!("({}+{})", pair[0], pair[1])).collect();
                }
                assert_eq!(sums[0], whole, "{micro_steps} over {ranks}");
            }
        }
    }
}
