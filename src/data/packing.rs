//! Packing: several examples in one sequence of the model.
//!
//! [`pack`] makes the same bins as TRL's `pack_dataset` over one batch: best fit decreasing (Ding et al., 2404.10830,
//! "Fewer Truncations Improve Language Modeling") or wrapping. TRL packs 1,000 rows at a time; here all rows are packed
//! together, which fills bins better.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use super::Error;
use crate::config::settings::PackingStrategy;

/// A stretch of an example.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Which example.
    pub example: usize,
    /// Which of its tokens.
    pub range: Range<usize>,
}

/// Pieces that share one row of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bin {
    /// In order.
    pub pieces: Vec<Piece>,
    /// Whether each piece is a sequence of its own; `false` joins all pieces into one (`wrapped`).
    pub keeps_boundaries: bool,
}

impl Bin {
    /// Number of tokens.
    pub fn num_tokens(&self) -> usize {
        self.pieces.iter().map(|piece| piece.range.len()).sum()
    }
}

/// One bin per example: no packing.
pub fn whole(lengths: &[usize]) -> Vec<Bin> {
    let bin = |(example, &length)| Bin { pieces: vec![Piece { example, range: 0..length }], keeps_boundaries: true };
    lengths.iter().enumerate().map(bin).collect()
}

/// Packs examples of the given lengths into bins of at most `seq_length` tokens. Empty examples are left out.
///
/// `bfd`: examples are cut to `seq_length`, taken from the longest to the shortest (equal ones in their order), and each
/// is put into the open bin with the least room that still holds it, the one opened first where several have that room.
/// `bfd_split`: as `bfd`, but what is longer is split and all pieces are kept. `wrapped`: all tokens one after another,
/// a new bin every `seq_length`. Takes O(n log n).
///
/// # Errors
/// If `seq_length` is 0.
pub fn pack(lengths: &[usize], seq_length: usize, strategy: PackingStrategy) -> Result<Vec<Bin>, Error> {
    if seq_length == 0 {
        return Err(Error::Setting("packing into bins of `max_length: 0` tokens; expected at least 1".into()));
    }
    Ok(match strategy {
        PackingStrategy::Bfd => {
            let cut = |(example, &length): (usize, &usize)| Piece { example, range: 0..length.min(seq_length) };
            best_fit(lengths.iter().enumerate().map(cut).collect(), seq_length)
        }
        PackingStrategy::BfdSplit => {
            let split = |(example, &length): (usize, &usize)| {
                let end = move |start: usize| (start + seq_length).min(length);
                (0..length).step_by(seq_length).map(move |start| Piece { example, range: start..end(start) })
            };
            best_fit(lengths.iter().enumerate().flat_map(split).collect(), seq_length)
        }
        PackingStrategy::Wrapped => wrap(lengths, seq_length),
    })
}

fn best_fit(mut pieces: Vec<Piece>, seq_length: usize) -> Vec<Bin> {
    pieces.retain(|piece| !piece.range.is_empty());
    // Stable: equal lengths keep their order, as Arrow's sort does.
    pieces.sort_by_key(|piece| std::cmp::Reverse(piece.range.len()));
    let mut bins: Vec<Bin> = Vec::new();
    // Bins by the room they have left, oldest first.
    let mut by_room: BTreeMap<usize, VecDeque<usize>> = BTreeMap::new();
    for piece in pieces {
        let length = piece.range.len();
        let fit = by_room.range(length..).next().map(|(&room, _)| room);
        let taken = fit.and_then(|room| {
            let queue = by_room.get_mut(&room)?;
            let bin = queue.pop_front()?;
            if queue.is_empty() {
                by_room.remove(&room);
            }
            Some((room, bin))
        });
        let (room, bin) = taken.unwrap_or_else(|| {
            bins.push(Bin { pieces: Vec::new(), keeps_boundaries: true });
            (seq_length, bins.len() - 1)
        });
        bins[bin].pieces.push(piece);
        if room > length {
            by_room.entry(room - length).or_default().push_back(bin);
        }
    }
    bins
}

fn wrap(lengths: &[usize], seq_length: usize) -> Vec<Bin> {
    let mut bins: Vec<Bin> = Vec::new();
    let mut room = 0;
    for (example, &length) in lengths.iter().enumerate() {
        let mut start = 0;
        while start < length {
            if room == 0 {
                bins.push(Bin { pieces: Vec::new(), keeps_boundaries: false });
                room = seq_length;
            }
            let end = length.min(start + room);
            room -= end - start;
            if let Some(bin) = bins.last_mut() {
                bin.pieces.push(Piece { example, range: start..end });
            }
            start = end;
        }
    }
    bins
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lengths_of(bins: &[Bin]) -> Vec<Vec<usize>> {
        bins.iter().map(|bin| bin.pieces.iter().map(|piece| piece.range.len()).collect()).collect()
    }

    #[test]
    fn the_best_fitting_bin_is_taken_and_what_is_too_long_is_cut_or_split() {
        let lengths = [5, 2, 3, 1];
        assert_eq!(lengths_of(&pack(&lengths, 4, PackingStrategy::Bfd).unwrap()), [vec![4], vec![3, 1], vec![2]]);
        let split = pack(&lengths, 4, PackingStrategy::BfdSplit).unwrap();
        assert_eq!(lengths_of(&split), [vec![4], vec![3, 1], vec![2, 1]]);
        assert_eq!(split[1].pieces[1], Piece { example: 0, range: 4..5 });
        assert_eq!(
            lengths_of(&pack(&lengths, 4, PackingStrategy::Wrapped).unwrap()),
            [vec![4], vec![1, 2, 1], vec![2, 1]]
        );
        assert!(pack(&lengths, 0, PackingStrategy::Bfd).is_err());
        assert!(pack(&[], 4, PackingStrategy::Bfd).unwrap().is_empty());
        assert!(pack(&[0, 0], 4, PackingStrategy::Wrapped).unwrap().is_empty());
    }

    #[test]
    fn a_million_examples_are_packed_in_seconds() {
        let lengths: Vec<usize> =
            (0..1_000_000u64).map(|i| (i.wrapping_mul(2_654_435_761) % 4096) as usize + 1).collect();
        let start = std::time::Instant::now();
        let bins = pack(&lengths, 4096, PackingStrategy::Bfd).unwrap();
        assert!(start.elapsed().as_secs_f64() < 10.0, "took {:?}", start.elapsed());
        let fill = lengths.iter().sum::<usize>() as f64 / (bins.len() * 4096) as f64;
        assert!(fill > 0.99, "bins are filled to {fill}");
    }

    proptest! {
        #[test]
        fn every_token_is_kept_once_and_no_bin_overflows(
            lengths in prop::collection::vec(0usize..50, 0..60),
            seq_length in 1usize..40,
            strategy in prop::sample::select(vec![
                PackingStrategy::Bfd, PackingStrategy::BfdSplit, PackingStrategy::Wrapped,
            ]),
        ) {
            let bins = pack(&lengths, seq_length, strategy).unwrap();
            let mut seen: Vec<Vec<bool>> = lengths.iter().map(|&length| vec![false; length]).collect();
            for bin in &bins {
                prop_assert!((1..=seq_length).contains(&bin.num_tokens()));
                for piece in &bin.pieces {
                    prop_assert!(!piece.range.is_empty());
                    for token in piece.range.clone() {
                        prop_assert!(!seen[piece.example][token], "token twice");
                        seen[piece.example][token] = true;
                    }
                }
            }
            for (example, tokens) in seen.iter().enumerate() {
                let kept = if strategy == PackingStrategy::Bfd { lengths[example].min(seq_length) } else { lengths[example] };
                prop_assert!(tokens[..kept].iter().all(|&t| t), "token lost");
                prop_assert!(!tokens[kept..].contains(&true), "token beyond the cut");
            }
        }
    }
}
