//! What attention's blocks work on: tiles of queries and keys, the heaviest first, and how heavy tiles of keys are split.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::iter;

use crate::device::{Error, argument};

/// Queries of a tile and keys of a tile; `attention.cuh` has the same numbers.
const QUERY_TILE: usize = 128;
pub(super) const KEY_TILE: usize = 128;

/// The least steps worth a part of a key tile: each part writes its sums and has them read again.
const MIN_PART_STEPS: u64 = 4;

/// Queries that the kernel for `dk` and `dv` takes at a time: the unit of a key tile's cost.
const QUERY_STEP: usize = 64;

/// The mean cost of a key tile from which one kernel for all gradients is chosen; see [`has_long_key_tiles`].
const MIN_FUSED_STEPS: usize = 8;

/// One sequence of the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentRange {
    /// Its first token.
    pub start: usize,
    /// The token after its last one.
    pub end: usize,
    /// Tokens (first, after the last) that stand before it: the beginning of another segment that has no prefix.
    pub prefix: Option<(usize, usize)>,
}

/// The work lists on the host.
#[derive(Debug, Default)]
pub(super) struct WorkLists {
    /// `start, end, own_start, prefix_start, prefix_end, 0, 0, 0`
    pub(super) query_tiles: Vec<[i32; 8]>,
    /// `start, end, first_view, end_view`
    pub(super) key_tiles: Vec<[i32; 4]>,
    /// `start, end, key_end, is_causal`
    pub(super) views: Vec<[i32; 4]>,
    /// Running sums of the key tiles' costs, from 0 on.
    pub(super) work: Vec<i32>,
    pub(super) num_tokens: usize,
}

impl WorkLists {
    pub(super) fn new(segments: &[SegmentRange]) -> Result<Self, Error> {
        let users = prefix_users(segments)?;
        let mut query_tiles: Vec<(usize, [i32; 8])> = Vec::new();
        let mut key_tiles: Vec<(usize, [i32; 4])> = Vec::new();
        let mut views: Vec<[i32; 4]> = Vec::new();
        let int = |x: usize| x as i32;
        for (segment, users) in segments.iter().zip(&users) {
            let (prefix_start, prefix_end) = segment.prefix.unwrap_or((0, 0));
            for start in (segment.start..segment.end).step_by(QUERY_TILE) {
                let end = (start + QUERY_TILE).min(segment.end);
                let tile = [start, end, segment.start, prefix_start, prefix_end, 0, 0, 0];
                query_tiles.push((prefix_end - prefix_start + end - segment.start, tile.map(int)));
            }
            for start in (segment.start..segment.end).step_by(KEY_TILE) {
                let end = (start + KEY_TILE).min(segment.end);
                let first_view = views.len();
                views.push([start, segment.end, end, 1].map(int));
                for user in users.iter().map(|&user| segments[user]) {
                    let prefix_end = user.prefix.map_or(0, |(_, end)| end).min(end);
                    if prefix_end <= start {
                        continue;
                    }
                    // Neighbours that share the prefix are one range of queries.
                    let is_same = |last: &&mut [i32; 4]| last[1] == int(user.start) && last[2] == int(prefix_end);
                    if let Some(last) = views[first_view + 1..].last_mut().filter(is_same) {
                        last[1] = int(user.end);
                    } else {
                        views.push([user.start, user.end, prefix_end, 0].map(int));
                    }
                }
                let steps = |view: &[i32; 4]| (view[1] - view[0]) as usize / QUERY_STEP + 1;
                let cost: usize = views[first_view..].iter().map(steps).sum();
                key_tiles.push((cost, [start, end, first_view, views.len()].map(int)));
            }
        }
        // Heaviest first, so that the light ones fill the gaps at the end.
        query_tiles.sort_by_key(|&(cost, _)| Reverse(cost));
        key_tiles.sort_by_key(|&(cost, _)| Reverse(cost));
        let sums = key_tiles.iter().scan(0, |sum, &(cost, _)| {
            *sum += cost;
            Some(int(*sum))
        });
        Ok(Self {
            work: iter::once(0).chain(sums).collect(),
            query_tiles: query_tiles.into_iter().map(|(_, tile)| tile).collect(),
            key_tiles: key_tiles.into_iter().map(|(_, tile)| tile).collect(),
            views,
            num_tokens: segments.last().map_or(0, |s| s.end),
        })
    }
}

/// How the tiles of keys are split into parts; `attention.cuh` says which tile has which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct KeySplit {
    /// Steps of all query heads of a key-value head for each part; 0: every tile is one part.
    pub(super) part_steps: u64,
    pub(super) num_parts: u64,
    /// The first tiles, which have more than one part.
    pub(super) num_split_tiles: usize,
    /// Parts of these tiles.
    pub(super) num_sums: u64,
}

impl KeySplit {
    /// Every tile is one part.
    pub(super) fn none(work: &[i32]) -> Self {
        Self { part_steps: 0, num_parts: work.len() as u64 - 1, num_split_tiles: 0, num_sums: 0 }
    }

    /// A split for which no part keeps a device of `multiprocessors` waiting; `work`: running sums of costs, the
    /// greatest first.
    ///
    /// The device works on about one tile per multiprocessor at a time. It is done when the heaviest tile is, or after
    /// its share of all the work. Where the tile takes longer, parts are of two thirds of that share: smaller ones fill
    /// the device more evenly, but their sums take time too.
    pub(super) fn new(work: &[i32], multiprocessors: u64, heads: usize, kv_heads: usize) -> Self {
        let group = (heads / kv_heads) as u64;
        let steps = |tiles: usize| u64::from(work[tiles].cast_unsigned()) * group;
        let num_tiles = work.len() - 1;
        let (longest, all) = (steps(num_tiles.min(1)), steps(num_tiles) * kv_heads as u64);
        let part_steps = (2 * all / (3 * multiprocessors)).max(MIN_PART_STEPS);
        let is_even = 7 * longest * multiprocessors <= 8 * all;
        if is_even || longest <= part_steps || i32::try_from(steps(num_tiles)).is_err() {
            return Self::none(work);
        }
        let tiles: Vec<usize> = (0..num_tiles).collect();
        let num_split_tiles = tiles.partition_point(|&tile| steps(tile + 1) - steps(tile) > part_steps);
        let first_part = |tile: usize| steps(tile) / part_steps + tile as u64;
        let (num_parts, num_sums) = (first_part(num_tiles), first_part(num_split_tiles));
        Self { part_steps, num_parts, num_split_tiles, num_sums }
    }
}

/// Whether one kernel for all gradients is faster than two; `work`: running sums of the key tiles' costs.
///
/// It saves two of seven products for each step of a key tile, but for each token it clears, adds to and rounds an f32
/// sum of `dq`. On an H200, at 28 query heads of size 128, it takes 69% of the time at a mean of 65 steps (one sequence of
/// 8,192 tokens), 84% at 18 (four of 2,048), and 102% at 5 (answers of 255 tokens, eight behind each prompt of 128).
pub(super) fn has_long_key_tiles(work: &[i32]) -> bool {
    let num_tiles = work.len() - 1;
    work[num_tiles].cast_unsigned() as usize >= MIN_FUSED_STEPS * num_tiles
}

/// For each segment, those whose prefix it begins with.
fn prefix_users(segments: &[SegmentRange]) -> Result<Vec<Vec<usize>>, Error> {
    const KERNEL: &str = "attention plan";
    let mut end = 0;
    for segment in segments {
        if segment.start < end || segment.end < segment.start || i32::try_from(segment.end + QUERY_TILE).is_err() {
            return Err(argument(KERNEL, "segment", segment, format!("a range from {end} on")));
        }
        end = segment.end;
    }
    let owners: BTreeMap<usize, usize> = segments
        .iter()
        .enumerate()
        .filter(|(_, s)| s.prefix.is_none() && s.start < s.end)
        .map(|(index, s)| (s.start, index))
        .collect();
    let mut users = vec![Vec::new(); segments.len()];
    for (index, segment) in segments.iter().enumerate() {
        let Some((start, end)) = segment.prefix else { continue };
        if start == end || segment.start == segment.end {
            continue;
        }
        match owners.get(&start).filter(|&&owner| start < end && end <= segments[owner].end) {
            Some(&owner) => users[owner].push(index),
            None => return Err(argument(KERNEL, "prefix", segment, "the beginning of a segment without a prefix")),
        }
    }
    Ok(users)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segments() -> Vec<SegmentRange> {
        let segment = |start, end, prefix| SegmentRange { start, end, prefix };
        vec![
            segment(0, 300, None),
            segment(300, 305, Some((0, 200))),
            segment(305, 600, Some((0, 200))),
            segment(600, 600, None),
            segment(600, 601, None),
            segment(601, 700, Some((0, 130))),
            segment(700, 701, Some((600, 601))),
            segment(701, 990, None),
        ]
    }

    /// How often each key is met by each query.
    fn wanted(segments: &[SegmentRange], n: usize) -> Vec<u32> {
        let mut counts = vec![0; n * n];
        for segment in segments {
            for q in segment.start..segment.end {
                let (start, end) = segment.prefix.unwrap_or((0, 0));
                (start..end).chain(segment.start..=q).for_each(|k| counts[q * n + k] += 1);
            }
        }
        counts
    }

    #[test]
    fn tiles_of_queries_and_of_keys_hold_every_pair_once() {
        let segments = segments();
        let lists = WorkLists::new(&segments).unwrap();
        let n = lists.num_tokens;
        let wanted = wanted(&segments, n);
        let mut by_queries = vec![0; n * n];
        for &[start, end, own_start, prefix_start, prefix_end, ..] in &lists.query_tiles {
            for q in start..end {
                (prefix_start..prefix_end)
                    .chain(own_start..=q)
                    .for_each(|k| by_queries[q as usize * n + k as usize] += 1);
            }
        }
        assert!(by_queries == wanted);
        let mut by_keys = vec![0; n * n];
        for &[start, end, first_view, end_view] in &lists.key_tiles {
            for &[first, last, key_end, is_causal] in &lists.views[first_view as usize..end_view as usize] {
                for (q, k) in (first..last).flat_map(|q| (start..end.min(key_end)).map(move |k| (q, k))) {
                    by_keys[q as usize * n + k as usize] += u32::from(is_causal == 0 || k <= q);
                }
            }
        }
        assert!(by_keys == wanted);
    }

    /// The parts of each tile, as the kernels number them.
    fn parts(work: &[i32], split: KeySplit, group: u64) -> Vec<(u64, u64)> {
        let steps = |tile: usize| work[tile] as u64 * group;
        let part = |tile: usize| match split.part_steps {
            0 => (tile as u64, 1),
            n => (steps(tile) / n + tile as u64, (steps(tile + 1) - steps(tile)).div_ceil(n).max(1)),
        };
        (0..work.len() - 1).map(part).collect()
    }

    #[test]
    fn heavy_tiles_of_keys_are_split_and_many_equal_ones_are_not() {
        let lists = |lengths: &[usize]| {
            let mut start = 0;
            let ranges = lengths.iter().map(|length| {
                start += length;
                SegmentRange { start: start - length, end: start, prefix: None }
            });
            WorkLists::new(&ranges.collect::<Vec<_>>()).unwrap().work
        };
        for (lengths, heads, kv_heads, is_split) in [
            (&[2048][..], 28, 4, true),
            (&[100], 4, 4, false), // less than a part
            (&[500, 1, 700, 3, 129], 14, 2, true),
            (&[2048; 4], 28, 4, false),
            (&[32768], 28, 4, false),
            (&[20; 500], 7, 1, false),
        ] {
            let work = lists(lengths);
            let split = KeySplit::new(&work, 132, heads, kv_heads);
            assert_eq!(split.part_steps > 0, is_split, "{lengths:?}: {split:?}");
            let parts = parts(&work, split, (heads / kv_heads) as u64);
            let ends = parts.iter().skip(1).map(|part| part.0).chain([split.num_parts]);
            assert!(parts.iter().zip(ends).all(|(&(first, count), end)| first + count <= end), "{split:?}: {parts:?}");
            assert!(parts.iter().enumerate().all(|(tile, part)| (part.1 > 1) == (tile < split.num_split_tiles)));
            let last = parts[..split.num_split_tiles].last();
            assert!(last.map_or(0, |(first, count)| first + count) <= split.num_sums);
        }
        assert_eq!(KeySplit::new(&lists(&[]), 132, 4, 4), KeySplit::none(&[0]));
    }

    #[test]
    fn one_backward_kernel_is_chosen_for_long_sequences() {
        let is_chosen = |lengths: &[usize], has_prefix: bool| {
            let mut end = 0;
            let ranges = lengths.iter().enumerate().map(|(i, length)| {
                end += length;
                let prefix = (has_prefix && i > 0).then_some((0, lengths[0]));
                SegmentRange { start: end - length, end, prefix }
            });
            has_long_key_tiles(&WorkLists::new(&ranges.collect::<Vec<_>>()).unwrap().work)
        };
        assert!(is_chosen(&[8192], false));
        assert!(is_chosen(&[2048; 4], false));
        assert!(!is_chosen(&[128, 255, 255, 255, 255, 255, 255, 255, 255], true));
        assert!(!is_chosen(&[20; 500], false));
    }

    #[test]
    fn neighbours_that_share_a_prefix_are_one_view() {
        let lists = WorkLists::new(&segments()).unwrap();
        let tile = lists.key_tiles.iter().find(|tile| tile[0] == 128).unwrap();
        let views = &lists.views[tile[2] as usize..tile[3] as usize];
        assert_eq!(views, [[128, 300, 256, 1], [300, 600, 200, 0], [601, 700, 130, 0]]);
    }

    #[test]
    fn segments_that_overlap_and_prefixes_that_begin_no_segment_are_refused() {
        let segment = |start, end, prefix| SegmentRange { start, end, prefix };
        for segments in [
            vec![segment(0, 4, None), segment(3, 6, None)],
            vec![segment(0, 4, None), segment(4, 6, Some((1, 4)))],
            vec![segment(0, 4, None), segment(4, 6, Some((0, 5)))],
            vec![segment(0, 4, None), segment(4, 6, Some((0, 4))), segment(6, 8, Some((4, 6)))],
        ] {
            assert!(WorkLists::new(&segments).is_err(), "{segments:?}");
        }
        assert!(WorkLists::new(&[]).unwrap().query_tiles.is_empty());
    }
}
