//! Which rank makes which completions of a generation batch.
//!
//! Groups of completions of one prompt are dealt by what they are expected to cost, from the lengths that the same run has seen: the
//! costliest first, each to the rank that has the least. Where ranks need not make the same in every run, the last quarter is not
//! dealt: who has room takes the next of them. What a completion is does not depend on who makes it, nor on what is expected.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::ops::Range;

use crate::rollout::Completion;

/// Of the work, in hundredths, what is dealt before the rest waits for who has room.
const DEALT_PERCENT: usize = 75;

/// Lengths of completions that a run has seen.
#[derive(Debug, Default)]
pub(super) struct Lengths {
    /// Moving mean over batches.
    of_all: Option<f64>,
    /// The same by prompt.
    of_prompt: HashMap<u64, f64>,
}

impl Lengths {
    /// Tokens that a completion of a prompt is expected to have; `unknown` where none was seen yet.
    pub(super) fn expected(&self, prompt_ids: &[u32], unknown: usize) -> usize {
        let known = self.of_prompt.get(&key(prompt_ids)).copied().or(self.of_all);
        known.map_or(unknown, |length| length.ceil() as usize)
    }

    /// Takes note of the completions of a batch, with the prompt of each.
    pub(super) fn see<'a>(&mut self, seen: impl Iterator<Item = (&'a [u32], &'a Completion)>) {
        let mut groups: HashMap<u64, (f64, f64)> = HashMap::new();
        let (mut total, mut count) = (0.0, 0.0);
        for (prompt_ids, completion) in seen {
            let length = completion.token_ids.len() as f64;
            let (of_group, in_group) = groups.entry(key(prompt_ids)).or_default();
            (*of_group, *in_group) = (*of_group + length, *in_group + 1.0);
            (total, count) = (total + length, count + 1.0);
        }
        if count > 0.0 {
            self.of_all = Some(moved(self.of_all, total / count));
        }
        for (key, (total, count)) in groups {
            let before = self.of_prompt.get(&key).copied();
            self.of_prompt.insert(key, moved(before, total / count));
        }
    }
}

/// A moving mean after the next value: policies change, and old lengths with them.
fn moved(before: Option<f64>, next: f64) -> f64 {
    const NEXT: f64 = 0.25;
    before.map_or(next, |before| before + NEXT * (next - before))
}

fn key(prompt_ids: &[u32]) -> u64 {
    let mut hasher = DefaultHasher::new();
    prompt_ids.hash(&mut hasher);
    hasher.finish()
}

/// Samples of one prompt, which are made by one rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Group {
    /// Their places in the batch.
    pub(super) samples: Range<usize>,
    /// Tokens that they are expected to take.
    pub(super) cost: usize,
}

/// What each rank makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Dealt {
    /// Of each rank, what it makes anyway.
    pub(super) own: Vec<Vec<Range<usize>>>,
    /// What goes to who has room, in this order.
    pub(super) rest: Vec<Range<usize>>,
}

/// The groups of a batch: neighbours of one prompt. `cost` gives that of some samples of a prompt.
pub(super) fn groups(prompts: &[usize], mut cost: impl FnMut(usize, usize) -> usize) -> Vec<Group> {
    let mut groups = Vec::new();
    let mut start = 0;
    for samples in prompts.chunk_by(|one, other| one == other) {
        groups.push(Group { samples: start..start + samples.len(), cost: cost(samples[0], samples.len()) });
        start += samples.len();
    }
    groups
}

/// Deals the groups of a batch, all of them or, if some may go to `who_has_room`, most.
///
/// No rank is dealt more groups than its equal part, which is what it has room for, and each at least one if there are enough. One
/// rank alone makes them in their order.
pub(super) fn deal(mut groups: Vec<Group>, world_size: usize, who_has_room: bool) -> Dealt {
    if world_size == 1 {
        return Dealt { own: vec![groups.into_iter().map(|group| group.samples).collect()], rest: Vec::new() };
    }
    groups.sort_by_key(|group| (std::cmp::Reverse(group.cost), group.samples.start));
    let all: usize = groups.iter().map(|group| group.cost).sum();
    let most = groups.len().div_ceil(world_size);
    let mut dealt = Dealt { own: vec![Vec::new(); world_size], rest: Vec::new() };
    let mut costs = vec![0; world_size];
    for (index, Group { samples, cost }) in groups.into_iter().enumerate() {
        let would_be = costs.iter().sum::<usize>() + cost;
        if who_has_room && index >= world_size && (100 * would_be > DEALT_PERCENT * all || !dealt.rest.is_empty()) {
            dealt.rest.push(samples);
            continue;
        }
        let free = (0..world_size).filter(|&rank| dealt.own[rank].len() < most);
        if let Some(rank) = free.min_by_key(|&rank| (costs[rank], rank)) {
            costs[rank] += cost;
            dealt.own[rank].push(samples);
        }
    }
    dealt
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::Duration;

    use super::*;
    use crate::ranks::Ranks as _;
    use crate::ranks::local::Threads;
    use crate::rollout::Finish;

    fn of(costs: &[usize]) -> Vec<Group> {
        (0..).zip(costs).map(|(start, &cost)| Group { samples: 2 * start..2 * start + 2, cost }).collect()
    }

    #[test]
    fn neighbours_of_one_prompt_are_a_group() {
        let found = groups(&[7, 7, 3, 9, 9, 9, 7], |prompt, count| 10 * prompt + count);
        let expected = [(0..2, 72), (2..3, 31), (3..6, 93), (6..7, 71)];
        assert_eq!(found, expected.map(|(samples, cost)| Group { samples, cost }));
        assert!(groups(&[], |_, _| 0).is_empty());
    }

    #[test]
    fn ranks_are_dealt_about_as_much_and_the_rest_waits_for_who_has_room() {
        let all = deal(of(&[10, 40, 20, 30]), 2, false);
        assert_eq!(all, Dealt { own: vec![vec![2..4, 0..2], vec![6..8, 4..6]], rest: vec![] });
        // 100 tokens are 75 of the hundred and more.
        let most = deal(of(&[10, 40, 20, 30]), 2, true);
        assert_eq!(most, Dealt { own: vec![vec![2..4], vec![6..8]], rest: vec![4..6, 0..2] });
        let alone = deal(of(&[10, 40, 20]), 1, true);
        assert_eq!(alone, Dealt { own: vec![vec![0..2, 2..4, 4..6]], rest: vec![] });
        // One each, however much that is.
        let few = deal(of(&[10, 10]), 3, true);
        assert_eq!(few, Dealt { own: vec![vec![0..2], vec![2..4], vec![]], rest: vec![] });
        assert_eq!(deal(vec![], 3, true), Dealt { own: vec![vec![]; 3], rest: vec![] });
        // A rank with cheap groups has room for its part of them and no more.
        let uneven = deal(of(&[100, 1, 1, 1, 1, 1]), 2, false);
        assert_eq!(uneven.own.iter().map(Vec::len).collect::<Vec<_>>(), [3, 3]);
    }

    #[test]
    fn every_group_goes_to_one_rank_whatever_the_costs() {
        for world_size in [1, 2, 3, 5] {
            for count in 0..14 {
                let costs: Vec<usize> = (0..count).map(|group| (group * 7919) % 13).collect();
                for who_has_room in [false, true] {
                    let Dealt { own, rest } = deal(of(&costs), world_size, who_has_room);
                    assert!(rest.is_empty() || who_has_room);
                    assert!(count < world_size || own.iter().all(|own| !own.is_empty()));
                    let mut all: Vec<usize> = own.into_iter().flatten().chain(rest).flatten().collect();
                    all.sort_unstable();
                    assert_eq!(all, (0..2 * count).collect::<Vec<_>>());
                }
            }
        }
    }

    #[test]
    fn expected_lengths_follow_those_that_were_seen() {
        let completion = |length: usize| Completion {
            sample_id: 0,
            group: 0,
            token_ids: vec![1; length],
            logprobs: vec![],
            sampling_logprobs: vec![],
            finish: Finish::Eos,
        };
        let mut lengths = Lengths::default();
        assert_eq!(lengths.expected(&[1], 100), 100);
        let batch = [completion(10), completion(20), completion(60)];
        let prompts: [&[u32]; 3] = [&[1], &[1], &[2]];
        lengths.see(prompts.into_iter().zip(&batch));
        assert_eq!([[1], [2], [3]].map(|ids| lengths.expected(&ids, 100)), [15, 60, 30]);
        lengths.see([(&[1][..], &completion(55))].into_iter());
        // A quarter of the way.
        assert_eq!([[1], [2], [3]].map(|ids| lengths.expected(&ids, 100)), [25, 60, 37]);
        lengths.see(std::iter::empty());
        assert_eq!(lengths.expected(&[3], 100), 37);
    }

    #[test]
    fn groups_of_a_slow_rank_are_taken_by_the_others() {
        let costs = vec![10; 24];
        let made = Mutex::new(vec![Vec::new(); 3]);
        let group = Threads::group(3, Duration::from_mins(1)).unwrap();
        std::thread::scope(|scope| {
            for ranks in group {
                let (costs, made) = (&costs, &made);
                scope.spawn(move || {
                    let rank = ranks.rank();
                    let Dealt { own, rest } = deal(of(costs), 3, true);
                    let mut make = |group: &Range<usize>| {
                        std::thread::sleep(Duration::from_millis(if rank == 1 { 60 } else { 2 }));
                        made.lock().unwrap()[rank].extend(group.clone());
                    };
                    own[rank].iter().for_each(&mut make);
                    for taken in 0.. {
                        let Some(group) = rest.get(ranks.next_turn(taken).unwrap() as usize) else { break };
                        make(group);
                    }
                    ranks.barrier().unwrap();
                });
            }
        });
        let made = made.into_inner().unwrap();
        // Six groups were dealt to each, and the slow one has not had time for one more.
        assert_eq!(made[1].len(), 12);
        let mut all = made.concat();
        all.sort_unstable();
        assert_eq!(all, (0..48).collect::<Vec<_>>());
    }
}
