//! Products of a few rows of activations with f32 rows: the part of the few-row path that every format shares.

use super::Level;

/// Lanes of a partial sum; fixed, so that a level's sums do not depend on anything but their operands.
const LANES: usize = 32;

/// `sums[m] += weights . activations[m]` for each row `m` of activations, `stride` apart.
///
/// # Panics
/// If the rows of activations end before the weights do.
pub fn accumulate(level: Level, weights: &[f32], activations: &[f32], stride: usize, sums: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    match level.supported() {
        // SAFETY: `supported` yields a level only where `Level::best` found its instructions.
        Level::Avx512 => return unsafe { accumulate_avx512(weights, activations, stride, sums) },
        // SAFETY: as above.
        Level::Avx2 => return unsafe { accumulate_avx2(weights, activations, stride, sums) },
        Level::Portable => {}
    }
    let _ = level;
    accumulate_with::<false>(weights, activations, stride, sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
fn accumulate_avx512(weights: &[f32], activations: &[f32], stride: usize, sums: &mut [f32]) {
    accumulate_with::<true>(weights, activations, stride, sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn accumulate_avx2(weights: &[f32], activations: &[f32], stride: usize, sums: &mut [f32]) {
    accumulate_with::<true>(weights, activations, stride, sums);
}

#[inline(always)]
fn accumulate_with<const FUSED: bool>(weights: &[f32], activations: &[f32], stride: usize, sums: &mut [f32]) {
    let (chunks, tail) = weights.as_chunks::<LANES>();
    for (row, sum) in sums.iter_mut().enumerate() {
        let activations = &activations[row * stride..][..weights.len()];
        let (activation_chunks, activation_tail) = activations.as_chunks::<LANES>();
        let mut lanes = [0.0f32; LANES];
        for (w, x) in chunks.iter().zip(activation_chunks) {
            for lane in 0..LANES {
                lanes[lane] =
                    if FUSED { w[lane].mul_add(x[lane], lanes[lane]) } else { w[lane] * x[lane] + lanes[lane] };
            }
        }
        for ((lane, w), x) in lanes.iter_mut().zip(tail).zip(activation_tail) {
            *lane += w * x;
        }
        let mut width = LANES;
        while width > 1 {
            width /= 2;
            for lane in 0..width {
                lanes[lane] += lanes[lane + width];
            }
        }
        *sum += lanes[0];
    }
}
