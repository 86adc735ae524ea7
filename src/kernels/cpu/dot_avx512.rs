//! Few-row products with AVX-512: 16 floats a register.
//!
//! Groups are unpacked by the AVX2 code; their 32 bytes become 2 registers of floats in natural order, by sign extension,
//! or by one look-up in a register that holds a whole code book.

use std::arch::x86_64::{
    __m256, __m256i, __m512, _mm256_castps256_ps128, _mm256_castsi256_si128, _mm256_extractf128_ps,
    _mm256_extracti128_si256, _mm512_add_ps, _mm512_broadcastss_ps, _mm512_cvtepi8_epi32, _mm512_cvtepi32_ps,
    _mm512_cvtepu8_epi32, _mm512_fmadd_ps, _mm512_load_ps, _mm512_loadu_ps, _mm512_mask_blend_ps, _mm512_mul_ps,
    _mm512_permutexvar_ps, _mm512_reduce_add_ps, _mm512_setzero_ps,
};

use std::marker::PhantomData;

use super::BlockFormat;
use super::activations::{GROUP, SUMS};
use super::packed_dot::Job;
use super::unpack::{Codes, Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0, Sink, Unpack};

/// Weight rows whose partial sums are kept while a piece of the activations stays in the first-level cache.
const BAND: usize = 16;

/// Floats of activations in a piece: 16 KiB, at most half of a first-level cache.
const PIECE: usize = 4096;

/// Runs the kernel of a format (`None`: 4-bit codes) for a tile of `height` rows.
///
/// # Safety
/// The machine has AVX-512 F, BW and VL, AVX2, FMA and F16C, and the job's pointers cover its rows, blocks and tile as
/// [`super::packed_dot::dot`] says.
pub(crate) unsafe fn run(format: Option<BlockFormat>, height: usize, job: &Job) {
    // SAFETY: the caller's promises.
    unsafe {
        match format {
            None => heights::<Codes>(height, job),
            Some(BlockFormat::Q4_0) => heights::<Q4_0>(height, job),
            Some(BlockFormat::Q4_1) => heights::<Q4_1>(height, job),
            Some(BlockFormat::Q5_0) => heights::<Q5_0>(height, job),
            Some(BlockFormat::Q5_1) => heights::<Q5_1>(height, job),
            Some(BlockFormat::Q8_0) => heights::<Q8_0>(height, job),
            Some(BlockFormat::Q2K) => heights::<Q2K>(height, job),
            Some(BlockFormat::Q3K) => heights::<Q3K>(height, job),
            Some(BlockFormat::Q4K) => heights::<Q4K>(height, job),
            Some(BlockFormat::Q5K) => heights::<Q5K>(height, job),
            Some(BlockFormat::Q6K) => heights::<Q6K>(height, job),
            Some(BlockFormat::F32 | BlockFormat::F16 | BlockFormat::Bf16) => {
                unreachable!("floats take the AVX2 kernel")
            }
        }
    }
}

unsafe fn heights<U: Unpack>(height: usize, job: &Job) {
    // SAFETY: the caller's promises.
    unsafe {
        match height {
            1 => rows::<U, 1>(job),
            2 => rows::<U, 2>(job),
            3 => rows::<U, 3>(job),
            _ => rows::<U, 4>(job),
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
unsafe fn rows<U: Unpack, const M: usize>(job: &Job) {
    let piece = (PIECE / (M * U::GROUPS * GROUP)).max(1);
    for first in (0..job.rows).step_by(BAND) {
        let band = BAND.min(job.rows - first);
        let mut partial = [[_mm512_setzero_ps(); M]; BAND];
        for block in (0..job.blocks).step_by(piece) {
            let blocks = piece.min(job.blocks - block);
            for (row, partial) in partial[..band].iter_mut().enumerate() {
                // SAFETY: the row and its blocks lie inside the job.
                unsafe { blocks_of_row::<U, M>(job, first + row, block, blocks, partial) };
            }
        }
        for (row, partial) in partial[..band].iter().enumerate() {
            for (m, &sums) in partial.iter().enumerate() {
                // SAFETY: row `m` of the result has a float for each weight row.
                unsafe { *job.out.add(m * job.out_stride + first + row) = _mm512_reduce_add_ps(sums) };
            }
        }
    }
}

#[inline(always)]
unsafe fn blocks_of_row<U: Unpack, const M: usize>(
    job: &Job,
    row: usize,
    first: usize,
    blocks: usize,
    partial: &mut [__m512; M],
) {
    // SAFETY: the caller's row and blocks lie inside the job; activations and sums are cache-line aligned.
    unsafe {
        let mut weights = job.weights.add((row * job.blocks + first) * U::BYTES);
        let mut absmax = job.absmax.wrapping_add(row * job.blocks + first);
        let mut sink = Accumulate::<U, M> {
            activations: job.activations.add(first * U::GROUPS * M * GROUP),
            sums: job.sums.wrapping_add(first * U::GROUPS * M * SUMS),
            table: if U::IS_CODE { _mm512_loadu_ps(job.values) } else { _mm512_setzero_ps() },
            totals: *partial,
            format: PhantomData,
        };
        for _ in 0..blocks {
            U::unpack(weights, absmax, &mut sink);
            weights = weights.add(U::BYTES);
            absmax = absmax.wrapping_add(1);
            sink.activations = sink.activations.add(U::GROUPS * M * GROUP);
            sink.sums = sink.sums.wrapping_add(U::GROUPS * M * SUMS);
        }
        *partial = sink.totals;
    }
}

/// Sums of one weight row with each row of activations of a tile.
struct Accumulate<U, const M: usize> {
    activations: *const f32,
    sums: *const f32,
    table: __m512,
    totals: [__m512; M],
    format: PhantomData<U>,
}

impl<U: Unpack, const M: usize> Sink for Accumulate<U, M> {
    #[inline(always)]
    unsafe fn group(&mut self, group: usize, bytes: __m256i, scale: __m256, offset: __m256) {
        // SAFETY: `blocks_of_row` keeps the pointers at the block that is unpacked, which has `U::GROUPS` groups.
        unsafe {
            let [w0, w1] = if U::IS_CODE { look_up(bytes, self.table) } else { widen(bytes) };
            let low_scale = low_half(scale);
            for (m, total) in self.totals.iter_mut().enumerate() {
                let x = self.activations.add((group * M + m) * GROUP);
                let low = _mm512_mul_ps(w0, _mm512_load_ps(x));
                if U::HALVES {
                    let high = _mm512_mul_ps(w1, _mm512_load_ps(x.add(16)));
                    *total = _mm512_fmadd_ps(low_scale, low, *total);
                    *total = _mm512_fmadd_ps(high_half(scale), high, *total);
                } else {
                    let both = _mm512_fmadd_ps(w1, _mm512_load_ps(x.add(16)), low);
                    *total = _mm512_fmadd_ps(low_scale, both, *total);
                }
                if U::HAS_MINIMUM {
                    let offset = _mm512_mask_blend_ps(0xff00, low_half(offset), high_half(offset));
                    let sum = _mm512_load_ps(self.sums.add((group * M + m) * SUMS));
                    *total = _mm512_add_ps(*total, _mm512_mul_ps(offset, sum));
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn floats(&mut self, _: [__m256; 4]) {
        unreachable!("floats take the AVX2 kernel")
    }
}

#[inline(always)]
unsafe fn low_half(pair: __m256) -> __m512 {
    // SAFETY: the machine has AVX-512 F.
    unsafe { _mm512_broadcastss_ps(_mm256_castps256_ps128(pair)) }
}

#[inline(always)]
unsafe fn high_half(pair: __m256) -> __m512 {
    // SAFETY: the machine has AVX-512 F.
    unsafe { _mm512_broadcastss_ps(_mm256_extractf128_ps::<1>(pair)) }
}

#[inline(always)]
unsafe fn widen(bytes: __m256i) -> [__m512; 2] {
    // SAFETY: the machine has AVX-512 F.
    unsafe {
        [
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes))),
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256::<1>(bytes))),
        ]
    }
}

#[inline(always)]
unsafe fn look_up(codes: __m256i, table: __m512) -> [__m512; 2] {
    // SAFETY: the machine has AVX-512 F.
    unsafe {
        [
            _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm256_castsi256_si128(codes)), table),
            _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm256_extracti128_si256::<1>(codes)), table),
        ]
    }
}
