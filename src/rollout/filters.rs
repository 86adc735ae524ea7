//! Which tokens top-k, top-p and min-p keep, by transformers' rules and without sorting the vocabulary.
//!
//! The sampler calls them in transformers' order: top-k, top-p, min-p, each on what the one before left. Candidates
//! are token ids in ascending order; `logits` are those of the whole vocabulary, already divided by the temperature.
//! Invariant: at least one candidate is left. Rules: transformers 5, `generation/logits_process.py`.

/// Smallest logit that top-k keeps: the k-th largest one. Tokens that tie with it are all kept, as transformers does.
/// `O(V)`; `buffer` is scratch.
pub(super) fn top_k_threshold(logits: &[f32], k: usize, buffer: &mut Vec<f32>) -> f32 {
    debug_assert!(k > 0);
    if k >= logits.len() {
        return f32::NEG_INFINITY;
    }
    // Holds the k largest so far among up to 2k + 64 numbers, so that it is pruned rarely.
    let room = 2 * k + 64;
    buffer.clear();
    let mut threshold = f32::NEG_INFINITY;
    for &logit in logits {
        // `>=` would collect every tie of a flat distribution; those equal to the threshold cannot move it.
        if logit > threshold || buffer.len() < k {
            buffer.push(logit);
            if buffer.len() == room {
                threshold = keep_largest(buffer, k);
            }
        }
    }
    keep_largest(buffer, k)
}

/// Cuts `numbers` to its k largest and returns the smallest of them.
fn keep_largest(numbers: &mut Vec<f32>, k: usize) -> f32 {
    let (_, &mut smallest, _) = numbers.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
    numbers.truncate(k);
    smallest
}

/// Orders tokens as top-p drops them: by logit, ties by id (transformers' stable ascending sort). The id is in the low
/// half.
fn sort_key(logits: &[f32], id: u32) -> u64 {
    // Adding 0 turns -0 into 0, which ties with it. Then the bits of positive floats order as integers do, and those of
    // negative ones the other way round.
    let bits = (logits[id as usize] + 0.0).to_bits();
    let ordered = if bits >> 31 == 0 { bits | 1 << 31 } else { !bits };
    u64::from(ordered) << 32 | u64::from(id)
}

/// Removes the least probable candidates whose cumulative probability, from the smallest, is at most `1 - top_p`.
///
/// A candidate's probability is its weight divided by `sum`, in f32; as in torch the running sum is f64, rounded to f32
/// before the comparison. Expected `O(V)`: instead of sorting, halves the candidates around a median and goes on in the
/// half that holds the border. `keys` is scratch.
pub(super) fn top_p(
    candidates: &mut Vec<u32>,
    logits: &[f32],
    top_p: f64,
    weights: &[f32],
    sum: f64,
    keys: &mut Vec<u64>,
) {
    let probability = |key: u64| f64::from((f64::from(weights[key as u32 as usize]) / sum) as f32);
    let limit = (1.0 - top_p) as f32;
    // All tokens below limit / n together stay below the limit, so they go without being ordered. Halved, to stay
    // clear of rounding in the sum.
    let negligible = (f64::from(limit) * sum / (2.0 * candidates.len() as f64)) as f32;
    let mut dropped = 0.0_f64;
    keys.clear();
    for &id in candidates.iter() {
        let weight = weights[id as usize];
        if weight < negligible {
            dropped += f64::from(weight);
        } else {
            keys.push(sort_key(logits, id));
        }
    }
    dropped /= sum;
    let Some(&largest) = keys.iter().max() else { return };
    // The border lies in `rest`; everything below it is dropped, everything above it is kept.
    let mut rest = keys.as_mut_slice();
    while rest.len() > 1 {
        let half = rest.len() / 2;
        rest.select_nth_unstable(half);
        let (lower, upper) = std::mem::take(&mut rest).split_at_mut(half);
        let below = lower.iter().fold(dropped, |below, &key| below + probability(key));
        if (below as f32) <= limit {
            dropped = below;
            rest = upper;
        } else {
            rest = lower;
        }
    }
    // One is left: the first that is kept, or, where rounding lets even the largest under the limit, the largest.
    let border = rest.first().copied().unwrap_or(largest);
    let is_dropped = (dropped + probability(border)) as f32 <= limit && border != largest;
    candidates.retain(|&id| {
        let key = sort_key(logits, id);
        key > border || (key == border && !is_dropped)
    });
}

/// Removes candidates with less than `min_p` times the largest probability.
pub(super) fn min_p(candidates: &mut Vec<u32>, min_p: f64, probability: impl Fn(u32) -> f32) {
    let largest = candidates.iter().map(|&id| probability(id)).fold(0.0, f32::max);
    let least = min_p as f32 * largest;
    candidates.retain(|&id| probability(id) >= least);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    fn softmax(logits: &[f32]) -> Vec<f32> {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|l| f64::from((l - largest).exp())).sum();
        logits.iter().map(|l| (f64::from((l - largest).exp()) / sum) as f32).collect()
    }

    /// The rule as transformers writes it: sort, cumulate, compare.
    fn top_p_by_sorting(logits: &[f32], top_p: f64) -> Vec<u32> {
        let shares = softmax(logits);
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        // 0 and -0 tie.
        order.sort_by(|&a, &b| logits[a as usize].partial_cmp(&logits[b as usize]).unwrap());
        let (mut sum, last) = (0.0_f64, order.len() - 1);
        let mut kept: Vec<u32> = order
            .iter()
            .enumerate()
            .filter(|&(rank, &id)| {
                sum += f64::from(shares[id as usize]);
                (sum as f32) > (1.0 - top_p) as f32 || rank == last
            })
            .map(|(_, &id)| id)
            .collect();
        kept.sort_unstable();
        kept
    }

    /// Logits of many kinds: spread, peaked, with ties, with removed tokens.
    fn many_logits(mut check: impl FnMut(&[f32])) {
        let mut stream = Stream::new(1, "filter test", 0, 0);
        for case in 0..400 {
            let len = 1 + stream.below(300) as usize;
            let scale = [0.1, 1.0, 5.0, 40.0][case % 4];
            let mut logits: Vec<f32> = (0..len).map(|_| (scale * stream.normal()) as f32).collect();
            if case % 3 == 0 {
                logits.iter_mut().for_each(|l| *l = (*l * 2.0).round() / 2.0);
            }
            if case % 5 == 0 && len > 3 {
                logits[1] = f32::NEG_INFINITY;
            }
            check(&logits);
        }
    }

    #[test]
    fn top_p_keeps_what_sorting_keeps() {
        many_logits(|logits| {
            let shares = softmax(logits);
            for p in [1e-6, 0.1, 0.5, 0.9, 0.95, 0.999_999] {
                let mut kept: Vec<u32> = (0..logits.len() as u32).collect();
                top_p(&mut kept, logits, p, &shares, 1.0, &mut Vec::new());
                assert_eq!(kept, top_p_by_sorting(logits, p), "{p} {logits:?}");
            }
        });
    }

    #[test]
    fn top_k_threshold_is_the_kth_largest() {
        many_logits(|logits| {
            let mut sorted = logits.to_vec();
            sorted.sort_by(|a, b| b.total_cmp(a));
            for k in [1, 2, 5, 40, 200, 299] {
                let expected = if k < logits.len() { sorted[k - 1] } else { f32::NEG_INFINITY };
                let got = top_k_threshold(logits, k, &mut Vec::new());
                assert!(
                    got.partial_cmp(&expected).is_some_and(std::cmp::Ordering::is_eq),
                    "{k}: {got}, expected {expected}"
                );
            }
        });
    }

    #[test]
    fn min_p_keeps_the_largest_and_its_ties() {
        let shares = [0.4, 0.1, 0.4, 0.04, 0.06];
        for (p, expected) in
            [(1.0, vec![0, 2]), (0.25, vec![0, 1, 2]), (0.14, vec![0, 1, 2, 4]), (0.0, vec![0, 1, 2, 3, 4])]
        {
            let mut kept = vec![0, 1, 2, 3, 4];
            min_p(&mut kept, p, |id| shares[id as usize]);
            assert_eq!(kept, expected);
        }
    }
}
