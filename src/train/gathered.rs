//! What the ranks of a run have, put together in the order in which one rank would have it.

use anyhow::Context as _;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::ranks::Ranks;

/// All ranks' items: those of the first rank, then those of the next, on every rank.
pub(super) fn in_order<T: Serialize + DeserializeOwned>(own: Vec<T>, ranks: &dyn Ranks) -> anyhow::Result<Vec<T>> {
    Ok(all(own, ranks)?.into_iter().flatten().collect())
}

/// All ranks' items: the first of each rank, then the second of each, on every rank.
pub(super) fn in_turns<T: Serialize + DeserializeOwned>(own: Vec<T>, ranks: &dyn Ranks) -> anyhow::Result<Vec<T>> {
    let mut all: Vec<_> = all(own, ranks)?.into_iter().map(Vec::into_iter).collect();
    let mut items = Vec::new();
    loop {
        let before = items.len();
        items.extend(all.iter_mut().filter_map(Iterator::next));
        if items.len() == before {
            return Ok(items);
        }
    }
}

fn all<T: Serialize + DeserializeOwned>(own: Vec<T>, ranks: &dyn Ranks) -> anyhow::Result<Vec<Vec<T>>> {
    if ranks.world_size() == 1 {
        return Ok(vec![own]);
    }
    let messages = ranks.all_gather_bytes(&serde_json::to_vec(&own)?)?;
    let read = |(rank, bytes): (usize, &Vec<u8>)| {
        serde_json::from_slice(bytes).with_context(|| format!("what rank {rank} sent cannot be read"))
    };
    messages.iter().enumerate().map(read).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::ranks::local::Threads;

    #[test]
    fn items_come_in_the_order_of_one_rank() {
        let group = Threads::group(3, Duration::from_secs(20)).unwrap();
        let of_rank = [vec![0, 3, 6], vec![1, 4], vec![2, 5]];
        std::thread::scope(|scope| {
            for (ranks, own) in group.into_iter().zip(of_rank) {
                scope.spawn(move || {
                    assert_eq!(in_turns(own.clone(), &ranks).unwrap(), [0, 1, 2, 3, 4, 5, 6]);
                    assert_eq!(in_order(own, &ranks).unwrap(), [0, 3, 6, 1, 4, 2, 5]);
                });
            }
        });
    }
}
