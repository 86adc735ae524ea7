//! Which tokens have high entropy.
//!
//! "Beyond the 80/20 Rule" (2506.01939): the policy loss looks at the tokens with the highest entropy only. The
//! threshold is a quantile over the tokens of all ranks, so the loop may gather the entropies first and hand the
//! threshold to the loss.

/// The entropy from which on a token belongs to the top share `top_quantile` of `entropies` (masked tokens left out).
/// `None` without any token. The order of `entropies` does not matter.
///
/// Linear interpolation between neighbours in f32, as `torch.quantile(entropies, 1 - top_quantile)`: a token exactly
/// at the threshold must fall on the same side.
pub fn entropy_threshold(entropies: impl IntoIterator<Item = f32>, top_quantile: f64) -> Option<f32> {
    let mut sorted: Vec<f32> = entropies.into_iter().collect();
    if sorted.is_empty() {
        return None;
    }
    sorted.sort_unstable_by(f32::total_cmp);
    let rank = (1.0 - top_quantile) as f32 * (sorted.len() - 1) as f32;
    let below = (rank.max(0.0) as usize).min(sorted.len() - 1);
    let above = (rank.ceil().max(0.0) as usize).min(sorted.len() - 1);
    let weight = rank - below as f32;
    let (start, end) = (sorted[below], sorted[above]);
    Some(if weight < 0.5 { start + weight * (end - start) } else { end - (end - start) * (1.0 - weight) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_threshold_interpolates_between_neighbours() {
        let values = [3.0f32, 0.0, 1.0, 2.0, 4.0];
        for (top, expected) in [(1.0, 0.0), (0.2, 3.2), (0.5, 2.0), (0.1, 3.6), (0.0, 4.0)] {
            let threshold = entropy_threshold(values, top).unwrap();
            assert!((threshold - expected).abs() < 1e-6, "{top}: {threshold}");
        }
        assert_eq!(entropy_threshold([], 0.5), None);
        assert_eq!(entropy_threshold([7.0], 0.5), Some(7.0));
    }
}
