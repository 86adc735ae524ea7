//! Elementwise and row kernels on f32 slices, compiled for AVX-512, AVX2 and the portable baseline and chosen at run
//! time.
//!
//! Sums use sixteen running sums that are folded in one fixed order, and products and sums are never contracted, so
//! every instruction set gives the same bits.
#![expect(unsafe_code, reason = "calls functions compiled for instruction sets that were detected first")]

use crate::kernels::AdamWFactors;

/// Compiles a function for several instruction sets and calls the widest one the machine has.
macro_rules! for_each_instruction_set {
    ($(#[$meta:meta])* pub fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block) => {
        $(#[$meta])*
        pub fn $name($($arg: $type),*) $(-> $result)? {
            #[inline(always)]
            fn portable($($arg: $type),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw")]
                fn avx512($($arg: $type),*) $(-> $result)? { portable($($arg),*) }
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $type),*) $(-> $result)? { portable($($arg),*) }
                if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq") && is_x86_feature_detected!("avx512bw")
                {
                    // SAFETY: the instruction sets that the function needs were just detected.
                    return unsafe { avx512($($arg),*) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: the instruction set that the function needs was just detected.
                    return unsafe { avx2($($arg),*) };
                }
            }
            portable($($arg),*)
        }
    };
}

/// Running sums; a power of two that fills one AVX-512 register.
const LANES: usize = 16;

#[inline(always)]
fn fold(sums: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    let mut sums = sums;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    sums[0]
}

/// e^x with a relative error below 2e-7; 0 below -87.3 and infinite above 88.7. The polynomial is the one of Cephes'
/// `expf` (Moshier, 1992), after reduction to [-ln 2 / 2, ln 2 / 2].
#[inline(always)]
#[expect(clippy::excessive_precision, reason = "the constants as published")]
fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let power = shifted - ROUND;
    let r = x - power * 0.693_359_375 - power * -2.121_944_40e-4;
    let mut polynomial = 1.987_569_150_0e-4_f32;
    for coefficient in
        [1.398_199_950_7e-3, 8.333_451_907_3e-3, 4.166_579_589_4e-2, 1.666_666_545_9e-1, 5.000_000_120_1e-1]
    {
        polynomial = polynomial * r + coefficient;
    }
    let fraction = polynomial * r * r + r + 1.0;
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    let value = fraction * f32::from_bits(exponent);
    let value = if x < -87.3 { 0.0 } else { value };
    if x > 88.7 { f32::INFINITY } else { value }
}

for_each_instruction_set! {
    /// The sum of `left[i] * right[i]`.
    pub fn dot(left: &[f32], right: &[f32]) -> f32 {
        let mut sums = [0.0; LANES];
        let (left, right) = (&left[..left.len().min(right.len())], &right[..right.len().min(left.len())]);
        let (l_chunks, r_chunks) = (left.chunks_exact(LANES), right.chunks_exact(LANES));
        let tail: f32 = l_chunks.remainder().iter().zip(r_chunks.remainder()).map(|(l, r)| l * r).sum();
        for (l, r) in l_chunks.zip(r_chunks) {
            for lane in 0..LANES {
                sums[lane] += l[lane] * r[lane];
            }
        }
        fold(sums) + tail
    }
}

for_each_instruction_set! {
    /// `out[i] += scale * x[i]`.
    pub fn add_scaled(out: &mut [f32], scale: f32, x: &[f32]) {
        for (o, &v) in out.iter_mut().zip(x) {
            *o += scale * v;
        }
    }
}

for_each_instruction_set! {
    /// The largest value; negative infinity of an empty slice.
    pub fn max(x: &[f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let chunks = x.chunks_exact(LANES);
        let tail = chunks.remainder().iter().copied().fold(f32::NEG_INFINITY, f32::max);
        for chunk in chunks {
            for lane in 0..LANES {
                lanes[lane] = if chunk[lane] > lanes[lane] { chunk[lane] } else { lanes[lane] };
            }
        }
        lanes.into_iter().fold(tail, f32::max)
    }
}

for_each_instruction_set! {
    /// Replaces `x[i]` by `exp(scale * x[i] - shift)` and returns the sum.
    pub fn exp_in_place(x: &mut [f32], scale: f32, shift: f32) -> f32 {
        let mut sums = [0.0; LANES];
        let mut chunks = x.chunks_exact_mut(LANES);
        for chunk in &mut chunks {
            for lane in 0..LANES {
                let value = exp(scale * chunk[lane] - shift);
                chunk[lane] = value;
                sums[lane] += value;
            }
        }
        let mut tail = 0.0;
        for v in chunks.into_remainder() {
            *v = exp(scale * *v - shift);
            tail += *v;
        }
        fold(sums) + tail
    }
}

for_each_instruction_set! {
    /// The sums of `exp(x[i] - shift)` and of `exp(x[i] - shift) * x[i]`.
    pub fn exp_sums(x: &[f32], shift: f32) -> (f32, f32) {
        let (mut sums, mut weighted) = ([0.0; LANES], [0.0; LANES]);
        let chunks = x.chunks_exact(LANES);
        let (mut tail, mut weighted_tail) = (0.0, 0.0);
        for &v in chunks.remainder() {
            let e = exp(v - shift);
            tail += e;
            weighted_tail += e * v;
        }
        for chunk in chunks {
            for lane in 0..LANES {
                let e = exp(chunk[lane] - shift);
                sums[lane] += e;
                weighted[lane] += e * chunk[lane];
            }
        }
        (fold(sums) + tail, fold(weighted) + weighted_tail)
    }
}

for_each_instruction_set! {
    /// Replaces a logit `z` by the gradient of `a * log p(target) + h * entropy` with respect to it, without the part
    /// of the target: `-a p - h p (log p + entropy)`, where `p = exp(z - lse)`.
    pub fn head_gradient(z: &mut [f32], lse: f32, d_logprob: f32, d_entropy: f32, entropy: f32) {
        for v in z.iter_mut() {
            let log_p = *v - lse;
            *v = -exp(log_p) * (d_logprob + d_entropy * (log_p + entropy));
        }
    }
}

for_each_instruction_set! {
    /// `out[i] = silu(gate[i]) * up[i]`.
    pub fn swiglu(out: &mut [f32], gate: &[f32], up: &[f32]) {
        for ((o, &g), &u) in out.iter_mut().zip(gate).zip(up) {
            *o = g / (1.0 + exp(-g)) * u;
        }
    }
}

for_each_instruction_set! {
    /// The gradients of [`swiglu`]: `d_gate` and `d_up` from `d_out`.
    pub fn swiglu_backward(d_gate: &mut [f32], d_up: &mut [f32], d_out: &[f32], gate: &[f32], up: &[f32]) {
        for ((((dg, du), &d), &g), &u) in d_gate.iter_mut().zip(d_up).zip(d_out).zip(gate).zip(up) {
            let sigmoid = 1.0 / (1.0 + exp(-g));
            *du = d * g * sigmoid;
            *dg = d * u * sigmoid * (1.0 + g * (1.0 - sigmoid));
        }
    }
}

for_each_instruction_set! {
    /// `p[i] = p[i] * (dp[i] - delta)`: the gradient of a softmax row.
    pub fn softmax_backward(p: &mut [f32], dp: &[f32], delta: f32) {
        for (p, &dp) in p.iter_mut().zip(dp) {
            *p *= dp - delta;
        }
    }
}

for_each_instruction_set! {
    /// `out[i] = x[i] * scale * weight[i]`.
    pub fn scale_by_weight(out: &mut [f32], x: &[f32], scale: f32, weight: &[f32]) {
        for ((o, &v), &w) in out.iter_mut().zip(x).zip(weight) {
            *o = v * scale * w;
        }
    }
}

for_each_instruction_set! {
    /// `out[i] = x[i] * cos[i] - y[i] * sin[i]`: one half of a rotation.
    pub fn rotate(out: &mut [f32], x: &[f32], cos: &[f32], y: &[f32], sin: &[f32]) {
        for ((((o, &x), &c), &y), &s) in out.iter_mut().zip(x).zip(cos).zip(y).zip(sin) {
            *o = x * c - y * s;
        }
    }
}

for_each_instruction_set! {
    /// One step of AdamW on each value.
    pub fn adamw(params: &mut [f32], grads: &[f32], first: &mut [f32], second: &mut [f32], factors: AdamWFactors) {
        let f = factors;
        for (((param, &grad), m), v) in params.iter_mut().zip(grads).zip(first).zip(second) {
            let grad = grad * f.grad_scale;
            *m += (grad - *m) * f.first_weight;
            // The order of the products is torch's (`addcmul`, `addcdiv`), so that results agree to the last bits.
            *v = *v * f.second_decay + f.second_weight * grad * grad;
            let denominator = v.sqrt() / f.root_correction + f.eps;
            *param = *param * f.keep - f.step_size * *m / denominator;
        }
    }
}

for_each_instruction_set! {
    /// The sum of squares in f64: eight running sums.
    pub fn sum_of_squares(values: &[f32]) -> f64 {
        let mut lanes = [0.0f64; 8];
        let (blocks, rest) = values.as_chunks::<8>();
        for block in blocks {
            for (lane, &value) in lanes.iter_mut().zip(block) {
                *lane += f64::from(value) * f64::from(value);
            }
        }
        lanes.iter().sum::<f64>() + rest.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>()
    }
}

#[cfg(test)]
mod tests {
    use super::{dot, exp_in_place, exp_sums, max, swiglu};
    use crate::rng::Stream;

    #[test]
    fn exp_is_within_two_ulp_over_its_range_and_right_at_its_ends() {
        let mut worst: f64 = 0.0;
        for i in 0..200_000 {
            let x = -87.0 + 175.0 * (f64::from(i) / 200_000.0);
            let mut value = [x as f32];
            exp_in_place(&mut value, 1.0, 0.0);
            let expected = f64::from(x as f32).exp();
            worst = worst.max((f64::from(value[0]) - expected).abs() / expected);
        }
        assert!(worst < 2.4e-7, "relative error {worst}");
        let mut ends = [f32::NEG_INFINITY, -1e30, -88.0, 0.0, 89.0];
        exp_in_place(&mut ends, 1.0, 0.0);
        assert_eq!(ends, [0.0, 0.0, 0.0, 1.0, f32::INFINITY]);
    }

    #[test]
    fn row_kernels_match_double_precision_for_lengths_off_the_lane_width() {
        for length in [1, 5, 16, 31, 100, 1000] {
            let mut stream = Stream::new(1, "vector test", 0, length);
            let x: Vec<f32> = (0..length).map(|_| stream.normal() as f32).collect();
            let y: Vec<f32> = (0..length).map(|_| stream.normal() as f32).collect();
            let sum: f64 = x.iter().zip(&y).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
            assert!((f64::from(dot(&x, &y)) - sum).abs() < 1e-4);
            assert!((max(&x) - x.iter().copied().fold(f32::NEG_INFINITY, f32::max)).abs() < f32::EPSILON);
            let (sums, weighted) = exp_sums(&x, 0.5);
            let expected: f64 = x.iter().map(|&v| (f64::from(v) - 0.5).exp()).sum();
            let expected_weighted: f64 = x.iter().map(|&v| (f64::from(v) - 0.5).exp() * f64::from(v)).sum();
            assert!((f64::from(sums) - expected).abs() < 1e-5 * expected.abs().max(1.0));
            assert!((f64::from(weighted) - expected_weighted).abs() < 1e-4 * expected_weighted.abs().max(1.0));
            let mut out = vec![0.0; length as usize];
            swiglu(&mut out, &x, &y);
            for ((o, &g), &u) in out.iter().zip(&x).zip(&y) {
                let expected = f64::from(g) / (1.0 + (-f64::from(g)).exp()) * f64::from(u);
                assert!((f64::from(*o) - expected).abs() < 1e-6);
            }
        }
    }
}
