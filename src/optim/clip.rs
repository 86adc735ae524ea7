//! Gradient norms and clipping, as torch's `clip_grad_norm_`.
//!
//! A norm is a sum over chunks of a fixed size, counted from each tensor's start, that are added in order in f64. So it does
//! not depend on the number of threads, nor on how the chunks are shared among ranks.

use rayon::prelude::*;

use crate::kernels::cpu::vector;

/// Elements of one partial sum of a norm. The parts are what ranks tell each other, and shards may end where chunks do:
/// 128 KiB are work enough for a block of a GPU's threads, a model of 7 billion weights trained whole has 1.8 MB of parts,
/// and shards of whole chunks are as large as each other to a part in thousands.
pub const NORM_CHUNK: usize = 32 * 1024;

/// Added to the norm before dividing by it, as torch does.
const NORM_EPS: f32 = 1e-6;

/// Sums of squares of a tensor's chunks, accumulated in f64: its parts of the norm.
pub fn sums_of_squares(values: &[f32]) -> Vec<f64> {
    values.par_chunks(NORM_CHUNK).map(vector::sum_of_squares).collect()
}

/// The L2 norm of tensors whose parts stand one behind the other; rounded once, by whoever needs it in f32.
pub fn norm_of_parts(parts: &[f64]) -> f64 {
    parts.iter().sum::<f64>().sqrt()
}

/// Norm of all tensors together. `f64::INFINITY` gives the largest absolute value. NaN if any gradient is NaN; infinite if
/// any is infinite and none NaN (order 2 and infinity). torch takes the norm of the tensors' norms, each rounded to f32,
/// which may differ in the last bit.
#[expect(
    clippy::float_cmp,
    reason = "orders 1 and 2 are special cases of the general formula, not a comparison of results"
)]
pub fn global_norm<'a>(tensors: impl IntoIterator<Item = &'a [f32]>, norm_type: f64) -> f32 {
    let tensors = tensors.into_iter();
    if norm_type == f64::INFINITY {
        return tensors.map(largest).fold(0.0, worse);
    }
    let all: Vec<f64> = if norm_type == 2.0 {
        tensors.flat_map(sums_of_squares).collect()
    } else if norm_type == 1.0 {
        tensors.flat_map(|tensor| parts(tensor, f64::abs)).collect()
    } else {
        tensors.flat_map(|tensor| parts(tensor, |v| v.abs().powf(norm_type))).collect()
    };
    if norm_type == 2.0 { norm_of_parts(&all) as f32 } else { all.iter().sum::<f64>().powf(1.0 / norm_type) as f32 }
}

/// Factor that brings gradients of norm `total_norm` down to `max_norm`: `min(1, max_norm / (total_norm + 1e-6))`.
/// 0 for an infinite norm and NaN for a NaN, as torch. A `max_norm` of 0 switches clipping off and gives 1.
pub fn clip_coefficient(total_norm: f32, max_norm: f64) -> f32 {
    if max_norm == 0.0 {
        return 1.0;
    }
    let coefficient = max_norm as f32 / (total_norm + NORM_EPS);
    // Not `f32::min`, which would turn a NaN into 1.
    if coefficient > 1.0 { 1.0 } else { coefficient }
}

/// Multiplies every gradient by `factor`, also when it is 1 or not finite.
pub fn scale_gradients(values: &mut [f32], factor: f32) {
    values.par_chunks_mut(NORM_CHUNK).for_each(|chunk| chunk.iter_mut().for_each(|v| *v *= factor));
}

/// Clips gradients in place and returns their norm before clipping.
///
/// # Equation
/// Pascanu et al. (1211.5063), algorithm 1, with torch's epsilon. With an infinite gradient the finite ones become 0 and
/// the infinite ones NaN; with a NaN all become NaN. Check the returned norm with `is_finite` before the step.
pub fn clip_gradients(tensors: &mut [&mut [f32]], max_norm: f64, norm_type: f64) -> f32 {
    let total_norm = global_norm(tensors.iter().map(|t| &**t), norm_type);
    let coefficient = clip_coefficient(total_norm, max_norm);
    for tensor in tensors.iter_mut() {
        scale_gradients(tensor, coefficient);
    }
    total_norm
}

/// The larger of two absolute values; NaN if one is.
fn worse(left: f32, right: f32) -> f32 {
    if left.is_nan() || left >= right { left } else { right }
}

fn largest(values: &[f32]) -> f32 {
    let chunks = values.par_chunks(NORM_CHUNK).map(|chunk| chunk.iter().fold(0.0, |best, v| worse(best, v.abs())));
    chunks.collect::<Vec<f32>>().into_iter().fold(0.0, worse)
}

fn parts(values: &[f32], term: impl Fn(f64) -> f64 + Sync) -> Vec<f64> {
    values.par_chunks(NORM_CHUNK).map(|chunk| lane_sum(chunk, &term)).collect()
}

/// Eight running sums, so that the compiler may use vector instructions; their order is fixed.
fn lane_sum(chunk: &[f32], term: &impl Fn(f64) -> f64) -> f64 {
    let mut lanes = [0.0f64; 8];
    let (blocks, rest) = chunk.as_chunks::<8>();
    for block in blocks {
        for (lane, &value) in lanes.iter_mut().zip(block) {
            *lane += term(f64::from(value));
        }
    }
    lanes.iter().sum::<f64>() + rest.iter().map(|&v| term(f64::from(v))).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    #[test]
    fn a_norm_above_the_limit_is_brought_down_to_it_and_one_below_is_left() {
        let (mut left, mut right) = (vec![3.0f32, 0.0], vec![4.0f32]);
        assert!((clip_gradients(&mut [&mut left, &mut right], 1.0, 2.0) - 5.0).abs() < 1e-6);
        assert!((global_norm([&left[..], &right[..]], 2.0) - 1.0).abs() < 1e-6);
        let before = left.clone();
        clip_gradients(&mut [&mut left, &mut right], 10.0, 2.0);
        assert_eq!(left, before);
    }

    #[test]
    fn infinities_and_nans_spread_as_in_torch() {
        let mut values = vec![1.0f32, f32::INFINITY];
        assert!(clip_gradients(&mut [&mut values], 1.0, 2.0).is_infinite());
        assert!(values[0].abs() < 1e-30 && values[1].is_nan());
        for norm_type in [1.0, 2.0, 3.0, f64::INFINITY] {
            let mut values = vec![1.0f32, f32::NAN, 7.0];
            assert!(clip_gradients(&mut [&mut values], 1.0, norm_type).is_nan(), "order {norm_type}");
            assert!(values.iter().all(|v| v.is_nan()));
        }
    }

    #[test]
    fn a_limit_of_zero_switches_clipping_off() {
        assert!((clip_coefficient(1e9, 0.0) - 1.0).abs() < 1e-9);
        assert!(clip_coefficient(f32::INFINITY, 1.0).abs() < 1e-30);
        assert!(clip_coefficient(f32::NAN, 1.0).is_nan());
    }

    #[test]
    fn the_norm_is_the_same_to_the_bit_for_any_number_of_threads() {
        let mut stream = Stream::new(5, "norm", 0, 0);
        let values: Vec<f32> = (0..9 * NORM_CHUNK + 13).map(|_| stream.normal() as f32).collect();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| norm_of_parts(&sums_of_squares(&values)).to_bits())
        };
        assert_eq!(run(1), run(2));
        assert_eq!(run(1), run(5));
        let plain: f64 = values.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
        assert!((f64::from_bits(run(1)) / plain.sqrt() - 1.0).abs() < 1e-12);
    }

    #[test]
    fn parts_of_shards_that_end_at_chunks_are_the_parts_of_the_whole() {
        let mut stream = Stream::new(6, "norm", 0, 0);
        let tensors = [3 * NORM_CHUNK + 5, 7, NORM_CHUNK].map(|count| {
            (0..count).map(|_| (stream.normal() * 10f64.powf(stream.uniform() * 8.0 - 4.0)) as f32).collect::<Vec<_>>()
        });
        let whole: Vec<f64> = tensors.iter().flat_map(|tensor| sums_of_squares(tensor)).collect();
        assert_eq!(whole.len(), 4 + 1 + 1);
        for cut in [1, 2, 3] {
            let (left, right) = tensors[0].split_at(cut * NORM_CHUNK);
            let shards = [left, right, &tensors[1], &tensors[2]];
            let parts: Vec<f64> = shards.iter().flat_map(|shard| sums_of_squares(shard)).collect();
            assert_eq!(parts, whole, "cut behind chunk {cut}");
        }
        let all = global_norm(tensors.iter().map(Vec::as_slice), 2.0);
        assert_eq!(all.to_bits(), (norm_of_parts(&whole) as f32).to_bits());
    }
}
