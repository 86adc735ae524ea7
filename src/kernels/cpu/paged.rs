//! One page of keys and values against the query heads of one row: the inner loop of paged attention.
//!
//! Called by `ops::paged_attention`. A head's scores, weights and sums are computed in one order that depends on its own
//! inputs only, so that a row has the same bits in whatever company it is computed.

use super::Level;

/// Running maximum and sum of a softmax (Milakov and Gimelshein, 1805.02867, alg. 3).
#[derive(Clone, Copy, Debug)]
pub struct RunningSoftmax {
    /// Largest score so far.
    pub largest: f32,
    /// Sum of `exp(score - largest)` so far.
    pub sum: f32,
}

impl RunningSoftmax {
    /// Nothing seen yet.
    pub const EMPTY: Self = Self { largest: f32::NEG_INFINITY, sum: 0.0 };

    /// Takes scores of up to `largest` in; returns what earlier weighted sums are to be multiplied by.
    fn raise(&mut self, largest: f32) -> Option<f32> {
        if largest > self.largest {
            let correction = (self.largest - largest).exp();
            *self = Self { largest, sum: self.sum * correction };
            Some(correction)
        } else {
            None
        }
    }
}

/// Where one head's keys and values lie in a page: `stride` numbers from a token to the next, the first `offset` in.
#[derive(Clone, Copy, Debug)]
pub struct PageHead<'a> {
    /// The page's keys.
    pub keys: &'a [f32],
    /// The page's values.
    pub values: &'a [f32],
    /// Numbers from one token to the next.
    pub stride: usize,
    /// Start of the head within a token.
    pub offset: usize,
}

/// Adds the first `scores.len()` tokens of a page to the attention of several query heads.
///
/// # Shapes
/// `queries`, `out`: `[G, D]`, `G` being `states.len()`; `out` holds the weighted sum so far, not yet divided by
/// [`RunningSoftmax::sum`]. `scores` is scratch, one for each visible token.
/// # Panics
/// If a slice is too short.
pub fn attend_page(
    level: Level,
    scale: f32,
    queries: &[f32],
    page: PageHead<'_>,
    scores: &mut [f32],
    states: &mut [RunningSoftmax],
    out: &mut [f32],
) {
    if states.is_empty() || scores.is_empty() {
        return;
    }
    let head_dim = queries.len() / states.len();
    assert_eq!(head_dim * states.len(), queries.len(), "queries are whole heads");
    assert_eq!(out.len(), queries.len(), "as many outputs as queries");
    let end = (scores.len() - 1) * page.stride + page.offset + head_dim;
    assert!(page.keys.len() >= end && page.values.len() >= end, "the page ends before the last visible token");
    #[cfg(target_arch = "x86_64")]
    if level.supported() >= Level::Avx2 {
        for (head, state) in states.iter_mut().enumerate() {
            let range = head * head_dim..(head + 1) * head_dim;
            // SAFETY: `supported` yields a level only where `Level::best` found its instructions. The lengths that
            // `attend_head` relies on were checked above.
            unsafe { avx2::attend_head(scale, &queries[range.clone()], page, scores, state, &mut out[range]) };
        }
        return;
    }
    let _ = level;
    for (head, state) in states.iter_mut().enumerate() {
        let range = head * head_dim..(head + 1) * head_dim;
        attend_head(scale, &queries[range.clone()], page, scores, state, &mut out[range]);
    }
}

/// The portable path.
fn attend_head(
    scale: f32,
    query: &[f32],
    page: PageHead<'_>,
    scores: &mut [f32],
    state: &mut RunningSoftmax,
    out: &mut [f32],
) {
    let mut largest = state.largest;
    for (score, key) in scores.iter_mut().zip(page.keys[page.offset..].chunks(page.stride)) {
        *score = scale * dot(query, &key[..query.len()]);
        largest = largest.max(*score);
    }
    if let Some(correction) = state.raise(largest) {
        out.iter_mut().for_each(|x| *x *= correction);
    }
    for (score, value) in scores.iter().zip(page.values[page.offset..].chunks(page.stride)) {
        let weight = (score - state.largest).exp();
        state.sum += weight;
        for (x, v) in out.iter_mut().zip(value) {
            *x += weight * v;
        }
    }
}

/// Dot product in eight running sums, which the compiler keeps in vector registers.
fn dot(left: &[f32], right: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; 8];
    let (left_chunks, right_chunks) = (left.chunks_exact(8), right.chunks_exact(8));
    let rest: f32 = left_chunks.remainder().iter().zip(right_chunks.remainder()).map(|(l, r)| l * r).sum();
    for (l, r) in left_chunks.zip(right_chunks) {
        for ((lane, l), r) in lanes.iter_mut().zip(l).zip(r) {
            *lane += l * r;
        }
    }
    let pairs = [lanes[0] + lanes[4], lanes[1] + lanes[5], lanes[2] + lanes[6], lanes[3] + lanes[7]];
    (pairs[0] + pairs[2]) + (pairs[1] + pairs[3]) + rest
}

/// AVX2 with fused multiply-add. Written with intrinsics: the compiler transposes the portable loops instead of keeping
/// one key's sums in a register, which is several times slower.
#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        __m256, _CMP_NLT_UQ, _mm_add_ps, _mm_storeu_ps, _mm256_add_epi32, _mm256_add_ps, _mm256_and_ps,
        _mm256_castps_si256, _mm256_castps256_ps128, _mm256_castsi256_ps, _mm256_cmp_ps, _mm256_extractf128_ps,
        _mm256_fmadd_ps, _mm256_fnmadd_ps, _mm256_hadd_ps, _mm256_loadu_ps, _mm256_mul_ps, _mm256_set1_epi32,
        _mm256_set1_ps, _mm256_setzero_ps, _mm256_slli_epi32, _mm256_storeu_ps, _mm256_sub_ps,
    };

    use super::{PageHead, RunningSoftmax};

    /// Numbers in a register.
    const WIDTH: usize = 8;
    /// Keys whose dot products run side by side: a query's numbers are loaded once for all of them.
    const KEYS: usize = 4;
    /// Registers of weighted sums of values that run side by side, to hide the latency of an addition.
    const SUMS: usize = 4;

    /// One query head.
    ///
    /// # Safety
    /// AVX2 and FMA are there; `out` is as long as `query`; keys and values reach to the end of the last visible token,
    /// `(scores.len() - 1) * stride + offset + query.len()`.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn attend_head(
        scale: f32,
        query: &[f32],
        page: PageHead<'_>,
        scores: &mut [f32],
        state: &mut RunningSoftmax,
        out: &mut [f32],
    ) {
        let last = scores.len() - 1;
        let mut largest = state.largest;
        for (group, scores) in scores.chunks_mut(KEYS).enumerate() {
            // The last group may repeat the last key; a key's product does not depend on its neighbours.
            let mut keys: [&[f32]; KEYS] = [&[]; KEYS];
            for (index, key) in keys.iter_mut().enumerate() {
                let token = (group * KEYS + index).min(last);
                *key = &page.keys[token * page.stride + page.offset..][..query.len()];
            }
            // SAFETY: the keys are as long as the query.
            let products = unsafe { dots(query, keys) };
            for (score, product) in scores.iter_mut().zip(products) {
                *score = scale * product;
                largest = if *score > largest { *score } else { largest };
            }
        }
        if let Some(correction) = state.raise(largest) {
            out.iter_mut().for_each(|x| *x *= correction);
        }
        for scores in scores.chunks_mut(WIDTH) {
            let mut padded = [f32::NEG_INFINITY; WIDTH];
            padded[..scores.len()].copy_from_slice(scores);
            // SAFETY: `padded` is one register long.
            unsafe {
                let weights = exp(_mm256_sub_ps(_mm256_loadu_ps(padded.as_ptr()), _mm256_set1_ps(state.largest)));
                _mm256_storeu_ps(padded.as_mut_ptr(), weights);
            }
            scores.copy_from_slice(&padded[..scores.len()]);
            // Padding weighs 0.
            let halves = [padded[0] + padded[4], padded[1] + padded[5], padded[2] + padded[6], padded[3] + padded[7]];
            state.sum += (halves[0] + halves[2]) + (halves[1] + halves[3]);
        }
        // SAFETY: as asked of the caller.
        unsafe { add_weighted(out, scores, page) };
    }

    /// The query's dot products with four keys.
    ///
    /// # Safety
    /// The keys are at least as long as the query.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn dots(query: &[f32], keys: [&[f32]; KEYS]) -> [f32; KEYS] {
        let whole = query.len() / WIDTH * WIDTH;
        let keys_at = [keys[0].as_ptr(), keys[1].as_ptr(), keys[2].as_ptr(), keys[3].as_ptr()];
        let mut sums = [_mm256_setzero_ps(); KEYS];
        let mut dim = 0;
        while dim < whole {
            // SAFETY: `dim + 8` is within the query and so within the keys.
            unsafe {
                let q = _mm256_loadu_ps(query.as_ptr().add(dim));
                sums[0] = _mm256_fmadd_ps(q, _mm256_loadu_ps(keys_at[0].add(dim)), sums[0]);
                sums[1] = _mm256_fmadd_ps(q, _mm256_loadu_ps(keys_at[1].add(dim)), sums[1]);
                sums[2] = _mm256_fmadd_ps(q, _mm256_loadu_ps(keys_at[2].add(dim)), sums[2]);
                sums[3] = _mm256_fmadd_ps(q, _mm256_loadu_ps(keys_at[3].add(dim)), sums[3]);
            }
            dim += WIDTH;
        }
        // Adds up four registers at once: [sum 0, sum 1, sum 2, sum 3] of the lower and of the upper halves.
        let halves = _mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]), _mm256_hadd_ps(sums[2], sums[3]));
        let total = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves));
        let mut products = [0.0; KEYS];
        // SAFETY: four numbers are stored into four.
        unsafe { _mm_storeu_ps(products.as_mut_ptr(), total) };
        for (product, key) in products.iter_mut().zip(keys) {
            for (q, k) in query[whole..].iter().zip(&key[whole..]) {
                *product = q.mul_add(*k, *product);
            }
        }
        products
    }

    /// `out += sum over tokens of weight * value`.
    ///
    /// # Safety
    /// As for [`attend_head`].
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn add_weighted(out: &mut [f32], weights: &[f32], page: PageHead<'_>) {
        let mut dim = 0;
        while dim + SUMS * WIDTH <= out.len() {
            // SAFETY: `dim + 32` is within the outputs and so within each token's values.
            unsafe { add_weighted_registers::<SUMS>(&mut out[dim..], weights, page, page.offset + dim) };
            dim += SUMS * WIDTH;
        }
        while dim + WIDTH <= out.len() {
            // SAFETY: as above, with 8.
            unsafe { add_weighted_registers::<1>(&mut out[dim..], weights, page, page.offset + dim) };
            dim += WIDTH;
        }
        for (token, weight) in weights.iter().enumerate() {
            let values = &page.values[token * page.stride + page.offset + dim..];
            for (x, v) in out[dim..].iter_mut().zip(values) {
                *x = weight.mul_add(*v, *x);
            }
        }
    }

    /// `COUNT` registers of [`add_weighted`].
    ///
    /// # Safety
    /// `out` has `8 * COUNT` numbers, and so has each token at `offset`.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn add_weighted_registers<const COUNT: usize>(
        out: &mut [f32],
        weights: &[f32],
        page: PageHead<'_>,
        offset: usize,
    ) {
        let mut sums = [_mm256_setzero_ps(); COUNT];
        for (register, sum) in sums.iter_mut().enumerate() {
            // SAFETY: `out` has that many numbers.
            *sum = unsafe { _mm256_loadu_ps(out.as_ptr().add(register * WIDTH)) };
        }
        // SAFETY: the first visible token's values begin there.
        let mut values = unsafe { page.values.as_ptr().add(offset) };
        for &weight in weights {
            let weight = _mm256_set1_ps(weight);
            for (register, sum) in sums.iter_mut().enumerate() {
                // SAFETY: each visible token has `8 * COUNT` values from here.
                *sum = unsafe { _mm256_fmadd_ps(weight, _mm256_loadu_ps(values.add(register * WIDTH)), *sum) };
            }
            // Past the last token this may point behind the page, where nothing is read.
            values = values.wrapping_add(page.stride);
        }
        for (register, sum) in sums.iter().enumerate() {
            // SAFETY: `out` has that many numbers.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(register * WIDTH), *sum) };
        }
    }

    /// e^x for x up to 0, with a relative error below 2e-7; 0 below -87.3. The polynomial of Cephes' `expf` (Moshier,
    /// 1992) after reduction to [-ln 2 / 2, ln 2 / 2].
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    #[expect(clippy::excessive_precision, reason = "the constants as published")]
    pub(super) fn exp(x: __m256) -> __m256 {
        // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
        const ROUND: f32 = 12_582_912.0;
        let round = _mm256_set1_ps(ROUND);
        let shifted = _mm256_fmadd_ps(x, _mm256_set1_ps(std::f32::consts::LOG2_E), round);
        let power = _mm256_sub_ps(shifted, round);
        let r = _mm256_fnmadd_ps(power, _mm256_set1_ps(0.693_359_375), x);
        let r = _mm256_fnmadd_ps(power, _mm256_set1_ps(-2.121_944_40e-4), r);
        let mut polynomial = _mm256_set1_ps(1.987_569_150_0e-4);
        for coefficient in
            [1.398_199_950_7e-3, 8.333_451_907_3e-3, 4.166_579_589_4e-2, 1.666_666_545_9e-1, 5.000_000_120_1e-1]
        {
            polynomial = _mm256_fmadd_ps(polynomial, r, _mm256_set1_ps(coefficient));
        }
        let fraction = _mm256_add_ps(_mm256_fmadd_ps(_mm256_mul_ps(polynomial, r), r, r), _mm256_set1_ps(1.0));
        let bias = _mm256_set1_epi32(127_i32.wrapping_sub(ROUND.to_bits() as i32));
        let exponent = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_castps_si256(shifted), bias));
        let value = _mm256_mul_ps(fraction, _mm256_castsi256_ps(exponent));
        // Not below the limit, NaN included.
        _mm256_and_ps(value, _mm256_cmp_ps::<_CMP_NLT_UQ>(x, _mm256_set1_ps(-87.3)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    /// Attention over one page in f64, without running sums.
    fn plain(scale: f32, query: &[f32], page: PageHead<'_>, tokens: usize) -> Vec<f64> {
        let at = |data: &[f32], token: usize, dim: usize| f64::from(data[token * page.stride + page.offset + dim]);
        let weights: Vec<f64> = (0..tokens)
            .map(|token| {
                let score: f64 = query.iter().zip(0..).map(|(q, dim)| f64::from(*q) * at(page.keys, token, dim)).sum();
                (f64::from(scale) * score).exp()
            })
            .collect();
        let sum: f64 = weights.iter().sum();
        (0..query.len())
            .map(|dim| weights.iter().zip(0..).map(|(w, token)| w / sum * at(page.values, token, dim)).sum())
            .collect()
    }

    #[test]
    fn every_level_gives_plain_attention_for_odd_sizes() {
        let mut stream = Stream::new(1, "page kernel test", 0, 0);
        for (head_dim, group, tokens) in [(64, 7, 16), (128, 1, 3), (13, 2, 5), (8, 3, 1), (40, 1, 16), (1, 1, 9)] {
            let stride = 2 * head_dim + 3;
            let mut normals = |count: usize| (0..count).map(|_| stream.normal() as f32).collect::<Vec<_>>();
            let (queries, keys, values) = (normals(group * head_dim), normals(16 * stride), normals(16 * stride));
            let page = PageHead { keys: &keys, values: &values, stride, offset: head_dim };
            for level in Level::available() {
                let mut out = vec![0.0; queries.len()];
                let mut states = vec![RunningSoftmax::EMPTY; group];
                attend_page(level, 0.4, &queries, page, &mut vec![0.0; tokens], &mut states, &mut out);
                for head in 0..group {
                    let range = head * head_dim..(head + 1) * head_dim;
                    let expected = plain(0.4, &queries[range.clone()], page, tokens);
                    for (got, expected) in out[range].iter().zip(expected) {
                        let got = f64::from(got / states[head].sum);
                        assert!((got - expected).abs() < 3e-6, "{level:?} {head_dim} {tokens}: {got}, {expected}");
                    }
                }
            }
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn vector_exp_is_within_two_units_and_handles_the_ends() {
        use std::arch::x86_64::{_mm256_loadu_ps, _mm256_storeu_ps};
        if Level::best() < Level::Avx2 {
            return;
        }
        let exp = |x: [f32; 8]| {
            let mut values = [0.0_f32; 8];
            // SAFETY: AVX2 and FMA are there, and both arrays are one register long.
            unsafe { _mm256_storeu_ps(values.as_mut_ptr(), avx2::exp(_mm256_loadu_ps(x.as_ptr()))) };
            values
        };
        let ends = exp([0.0, f32::NEG_INFINITY, -200.0, -87.31, f32::NAN, -0.0, f32::MIN, -1e-30]);
        assert_eq!(ends[..4], [1.0, 0.0, 0.0, 0.0]);
        assert_eq!(ends[5..], [1.0, 0.0, 1.0]);
        assert!(ends[4].is_nan());
        for step in -10_900..=0 {
            let x: [f32; 8] = std::array::from_fn(|lane| (step * 8 + lane as i32).min(0) as f32 * 1e-3);
            for (x, got) in x.into_iter().zip(exp(x)) {
                let expected = f64::from(x).exp();
                assert!((f64::from(got) - expected).abs() < 2.5e-7 * expected, "{x}: {got}");
            }
        }
    }
}
