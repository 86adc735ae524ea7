//! Which parts of their contexts lanes have in common: a list for attention, made on the host for a few steps at a time.
//!
//! A part is of [`LANE_SPLIT_KEYS`] tokens. Lanes that were given the same pages for all of one, as samples of one prompt are, have
//! the same keys and values there; a piece names them all, so that they are read once.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::lanes::{Lane, PageSharing};
use super::paged_attention::LANE_SPLIT_KEYS;

/// The list, as `paged_attention.cu` reads it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct LanePieces {
    /// Where the page list begins, the lane, where the piece's members begin, the part with the number of members above it.
    pub(super) pieces: Vec<[u32; 4]>,
    /// The lanes of pieces that have more than one, their first among them.
    pub(super) members: Vec<u32>,
}

/// Bits of a word that are the part.
const PART_BITS: u32 = 24;

/// Lanes that a piece has at most.
pub(super) const MOST_SHARING: usize = 64;

/// Pieces that lanes with so many pages together have at most.
pub(super) fn most_pieces(lanes: usize, pages: usize, page_tokens: usize) -> usize {
    lanes + (pages * page_tokens).div_ceil(LANE_SPLIT_KEYS)
}

impl LanePieces {
    /// The pieces of lanes for the next `steps`. `tables`: where each lane's page list begins. Those that are whole come first, in the
    /// order of their parts.
    pub(super) fn of(
        lanes: &[Lane<'_>],
        tables: &[u32],
        steps: usize,
        page_tokens: usize,
        sharing: PageSharing,
    ) -> Self {
        let parts = |tokens: usize| tokens.div_ceil(LANE_SPLIT_KEYS);
        let whole_parts = |lane: &Lane<'_>| lane.context / LANE_SPLIT_KEYS;
        let pages = LANE_SPLIT_KEYS / page_tokens;
        let all: usize = lanes.iter().map(|lane| parts(lane.context + steps)).sum();
        let can_share = sharing.lanes > 1 && all >= sharing.from && LANE_SPLIT_KEYS.is_multiple_of(page_tokens);
        let mut list = Self::default();
        let mut groups: Vec<Vec<usize>> = Vec::new();
        for part in 0..lanes.iter().map(whole_parts).max().unwrap_or(0) {
            groups.clear();
            let mut known: HashMap<&[u32], usize> = HashMap::new();
            for (index, lane) in lanes.iter().enumerate().filter(|(_, lane)| whole_parts(lane) > part) {
                if !can_share {
                    list.push(tables, &[index], part);
                    continue;
                }
                match known.entry(&lane.pages[part * pages..(part + 1) * pages]) {
                    Entry::Occupied(group) => groups[*group.get()].push(index),
                    Entry::Vacant(place) => {
                        place.insert(groups.len());
                        groups.push(vec![index]);
                    }
                }
            }
            for group in &groups {
                // In as many pieces as it takes, of equal size.
                let pieces = group.len().div_ceil(sharing.lanes.clamp(1, MOST_SHARING));
                group.chunks(group.len().div_ceil(pieces)).for_each(|members| list.push(tables, members, part));
            }
        }
        for (index, lane) in lanes.iter().enumerate() {
            (whole_parts(lane)..parts(lane.context + steps)).for_each(|part| list.push(tables, &[index], part));
        }
        list
    }

    fn push(&mut self, tables: &[u32], members: &[usize], part: usize) {
        let Some(&first) = members.first() else { return };
        let part_and_count = part as u32 | (members.len() as u32) << PART_BITS;
        self.pieces.push([tables[first], first as u32, self.members.len() as u32, part_and_count]);
        if members.len() > 1 {
            self.members.extend(members.iter().map(|&lane| lane as u32));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::{LanePieces, PART_BITS, most_pieces};
    use crate::kernels::cuda::{Lane, PageSharing};
    use crate::rng::Stream;

    /// The lanes of each piece, and its part.
    fn named(list: &LanePieces) -> Vec<(Vec<u32>, u32)> {
        let members = |&[_, lane, first, word]: &[u32; 4]| match (word >> PART_BITS) as usize {
            1 => vec![lane],
            count => list.members[first as usize..][..count].to_vec(),
        };
        list.pieces.iter().map(|piece| (members(piece), piece[3] & ((1 << PART_BITS) - 1))).collect()
    }

    fn always(lanes: usize) -> PageSharing {
        PageSharing { lanes, from: 0 }
    }

    fn lane(context: usize, pages: &[u32]) -> Lane<'_> {
        Lane { token: 0, context, pages, seen: &[] }
    }

    #[test]
    fn lanes_with_the_same_pages_share_whole_parts_alone() {
        let prompt: Vec<u32> = (0..10).collect();
        let pages = |own: u32| prompt.iter().copied().chain([own, own + 1]).collect::<Vec<_>>();
        let (a, b, c) = (pages(20), pages(30), (40..52).collect::<Vec<u32>>());
        let lanes = [lane(140, &a), lane(150, &c), lane(170, &b)];
        let list = LanePieces::of(&lanes, &[0, 12, 24], 16, 16, always(8));
        assert_eq!(
            named(&list),
            [(vec![0, 2], 0), (vec![1], 0), (vec![0], 1), (vec![1], 1), (vec![2], 1)],
            "the second part is not whole"
        );
        assert_eq!(list.pieces[1], [12, 1, 2, 1 << PART_BITS]);
        // Steps that go on beyond a part have the next one too.
        let list = LanePieces::of(&[lane(250, &a)], &[7], 8, 16, always(8));
        assert_eq!(named(&list), [(vec![0], 0), (vec![0], 1), (vec![0], 2)]);
        assert_eq!(LanePieces::of(&[], &[], 16, 16, always(8)), LanePieces::default());
    }

    #[test]
    fn large_groups_are_cut_evenly_and_pages_that_do_not_fill_a_part_are_not_shared() {
        let pages: Vec<u32> = (0..20).collect();
        let lanes = vec![lane(129, &pages); 10];
        let sizes = |sharing: PageSharing, page_tokens| {
            let list = LanePieces::of(&lanes, &[0; 10], 1, page_tokens, sharing);
            named(&list).iter().filter(|(_, part)| *part == 0).map(|(lanes, _)| lanes.len()).collect::<Vec<_>>()
        };
        assert_eq!(sizes(always(9), 16), [5, 5]);
        assert_eq!(sizes(always(4), 16), [4, 4, 2]);
        assert_eq!(sizes(always(1), 16), [1; 10]);
        assert_eq!(sizes(always(9), 12), [1; 10]);
        // Each lane has two parts.
        assert_eq!(sizes(PageSharing { lanes: 9, from: 21 }, 16), [1; 10]);
        assert_eq!(sizes(PageSharing { lanes: 9, from: 20 }, 16), [5, 5]);
    }

    #[test]
    fn every_lane_has_every_part_of_its_context_once_and_there_is_room() {
        let mut stream = Stream::new(3, "pieces", 0, 0);
        for _ in 0..200 {
            let count = 1 + stream.below(40) as usize;
            let steps = 1 + stream.below(16) as usize;
            let contexts: Vec<usize> = (0..count).map(|_| stream.below(700) as usize).collect();
            // Lanes of a few prompts, whose first parts they share.
            let pages: Vec<Vec<u32>> = contexts
                .iter()
                .enumerate()
                .map(|(index, context)| {
                    let (prompt, common) = (stream.below(3) as u32, stream.below(30) as usize);
                    let needed = (context + steps).div_ceil(16);
                    (0..needed)
                        .map(|at| if at < common { prompt * 100 + at as u32 } else { (1000 + index * 100 + at) as u32 })
                        .collect()
                })
                .collect();
            let lanes: Vec<Lane<'_>> =
                contexts.iter().zip(&pages).map(|(&context, pages)| lane(context, pages)).collect();
            let tables: Vec<u32> = (0..count as u32).collect();
            let list = LanePieces::of(&lanes, &tables, steps, 16, always(7));
            let mut seen: BTreeMap<(u32, u32), usize> = BTreeMap::new();
            for (members, part) in named(&list) {
                assert!((1..=7).contains(&members.len()));
                let part_pages = |lane: u32| &pages[lane as usize][part as usize * 8..];
                for &member in &members {
                    *seen.entry((member, part)).or_default() += 1;
                    assert!(members.len() == 1 || part_pages(member)[..8] == part_pages(members[0])[..8]);
                }
            }
            let parts = |context: &usize| (context + steps).div_ceil(128);
            assert_eq!(seen.len(), contexts.iter().map(parts).sum::<usize>());
            assert!(seen.values().all(|&times| times == 1));
            let most = most_pieces(count, pages.iter().map(Vec::len).sum(), 16);
            assert!(list.pieces.len() <= most && list.members.len() <= most, "{} of {most}", list.pieces.len());
        }
    }
}
