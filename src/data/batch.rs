//! Ragged batches: sequences one after another, without padding.

use super::packing::Bin;
use super::sft::SftExample;

/// The label of a token that is not learnt (PyTorch's `ignore_index`).
pub const IGNORE: i64 = -100;

/// Sequences one after another. `N` tokens, `S` sequences.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token ids, `[N]`.
    pub tokens: Vec<u32>,
    /// Position of each token in its sequence, `[N]`.
    pub positions: Vec<u32>,
    /// Where sequences start, and the end: `[S + 1]`.
    pub cu_seqlens: Vec<u32>,
    /// Per token its id if it is learnt, else [`IGNORE`]; always [`IGNORE`] at the start of a sequence, `[N]`.
    pub labels: Vec<i64>,
}

impl Batch {
    /// What each token's logits predict: the label of the next token of its sequence, `[N]`.
    pub fn targets(&self) -> Vec<i64> {
        // The first label of a sequence is IGNORE, so shifting never reaches into the next sequence.
        self.labels.iter().skip(1).copied().chain(std::iter::once(IGNORE)).take(self.labels.len()).collect()
    }

    /// Number of labels that count in the loss.
    pub fn num_targets(&self) -> usize {
        self.labels.iter().filter(|&&label| label != IGNORE).count()
    }

    /// Number of sequences.
    pub fn num_sequences(&self) -> usize {
        self.cu_seqlens.len().saturating_sub(1)
    }

    /// Length of the longest sequence.
    pub fn max_seqlen(&self) -> usize {
        self.cu_seqlens.windows(2).map(|pair| (pair[1] - pair[0]) as usize).max().unwrap_or(0)
    }
}

/// Joins bins into one batch, as TRL's collator does without padding: positions restart at every sequence, and the first
/// label of a sequence is ignored.
///
/// # Panics
/// If a piece lies outside its example.
pub fn collate<'a>(examples: &[SftExample], bins: impl IntoIterator<Item = &'a Bin>) -> Batch {
    let mut batch = Batch { cu_seqlens: vec![0], ..Batch::default() };
    for bin in bins {
        let mut position = 0;
        for piece in &bin.pieces {
            if bin.keeps_boundaries {
                position = 0;
            }
            let example = &examples[piece.example];
            for (&id, &is_learnt) in
                example.input_ids[piece.range.clone()].iter().zip(&example.labels_mask[piece.range.clone()])
            {
                batch.tokens.push(id);
                batch.positions.push(position);
                batch.labels.push(if is_learnt && position > 0 { i64::from(id) } else { IGNORE });
                position += 1;
            }
            if bin.keeps_boundaries {
                batch.end_sequence();
            }
        }
        batch.end_sequence();
    }
    batch
}

impl Batch {
    /// Closes the sequence that ends here, if it has tokens.
    fn end_sequence(&mut self) {
        let end = self.tokens.len() as u32;
        if self.cu_seqlens.last() != Some(&end) {
            self.cu_seqlens.push(end);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::packing::{Piece, whole};

    fn examples() -> Vec<SftExample> {
        let example = |ids: &[u32], mask: &[u8]| SftExample {
            input_ids: ids.to_vec(),
            labels_mask: mask.iter().map(|&m| m == 1).collect(),
        };
        vec![example(&[5, 6, 7], &[1, 1, 1]), example(&[8, 9], &[0, 1]), example(&[4], &[1])]
    }

    #[test]
    fn sequences_restart_positions_and_never_predict_across_a_border() {
        let examples = examples();
        let batch = collate(&examples, &whole(&[3, 2, 1]));
        assert_eq!(batch.tokens, [5, 6, 7, 8, 9, 4]);
        assert_eq!(batch.positions, [0, 1, 2, 0, 1, 0]);
        assert_eq!(batch.cu_seqlens, [0, 3, 5, 6]);
        assert_eq!(batch.labels, [IGNORE, 6, 7, IGNORE, 9, IGNORE]);
        assert_eq!(batch.targets(), [6, 7, IGNORE, 9, IGNORE, IGNORE]);
        assert_eq!((batch.num_targets(), batch.num_sequences(), batch.max_seqlen()), (3, 3, 3));
        assert_eq!(collate(&examples, &[]).targets(), Vec::<i64>::new());
    }

    #[test]
    fn a_wrapped_bin_is_one_sequence() {
        let pieces = vec![Piece { example: 0, range: 1..3 }, Piece { example: 1, range: 0..2 }];
        let batch = collate(&examples(), &[Bin { pieces, keeps_boundaries: false }]);
        assert_eq!(batch.positions, [0, 1, 2, 3]);
        assert_eq!(batch.cu_seqlens, [0, 4]);
        assert_eq!(batch.labels, [IGNORE, 7, IGNORE, 9]);
    }
}
