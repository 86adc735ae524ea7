//! Few-row products with AVX2 and FMA: 8 floats a register.
//!
//! A group of 32 bytes becomes 4 registers of floats, multiplied with each row of activations of the tile; the group's scale
//! is applied to the sum of the 4 products. Per 8 weights that is a shift or mask, a conversion and one multiply-add
//! for each row of activations.

use std::arch::x86_64::{
    __m256, __m256i, _mm_add_ps, _mm_add_ss, _mm_cvtss_f32, _mm_loadu_si128, _mm_movehdup_ps, _mm_movehl_ps,
    _mm256_add_ps, _mm256_and_si256, _mm256_broadcastsi128_si256, _mm256_castps256_ps128, _mm256_castsi256_ps,
    _mm256_cvtepi32_ps, _mm256_extractf128_ps, _mm256_fmadd_ps, _mm256_load_ps, _mm256_mul_ps, _mm256_set1_epi32,
    _mm256_setzero_ps, _mm256_setzero_si256, _mm256_shuffle_epi8, _mm256_slli_epi32, _mm256_unpackhi_epi8,
    _mm256_unpackhi_epi16, _mm256_unpacklo_epi8, _mm256_unpacklo_epi16,
};

use std::marker::PhantomData;

use super::BlockFormat;
use super::activations::{GROUP, SUMS};
use super::packed_dot::Job;
use super::unpack::{Bf16, Codes, F16, F32, Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0, Sink, Unpack};

/// Weight rows whose partial sums are kept while a piece of the activations stays in the first-level cache.
const BAND: usize = 16;

/// Floats of activations in a piece: 16 KiB, half of a first-level cache.
const PIECE: usize = 4096;

/// Runs the kernel of a format (`None`: 4-bit codes) for a tile of `height` rows.
///
/// # Safety
/// The machine has AVX2, FMA and F16C, and the job's pointers cover its rows, blocks and tile as [`super::packed_dot::dot`] says.
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
            Some(BlockFormat::F32) => heights::<F32>(height, job),
            Some(BlockFormat::F16) => heights::<F16>(height, job),
            Some(BlockFormat::Bf16) => heights::<Bf16>(height, job),
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

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn rows<U: Unpack, const M: usize>(job: &Job) {
    // SAFETY: a job of codes points at 16 values.
    let tables = if U::IS_CODE { unsafe { byte_planes(job.values) } } else { [_mm256_setzero_si256(); 4] };
    let piece = (PIECE / (M * U::GROUPS * GROUP)).max(1);
    for first in (0..job.rows).step_by(BAND) {
        let band = BAND.min(job.rows - first);
        let mut partial = [[_mm256_setzero_ps(); M]; BAND];
        for block in (0..job.blocks).step_by(piece) {
            let blocks = piece.min(job.blocks - block);
            for (row, partial) in partial[..band].iter_mut().enumerate() {
                // SAFETY: the row and its blocks lie inside the job.
                unsafe { blocks_of_row::<U, M>(job, first + row, block, blocks, &tables, partial) };
            }
        }
        for (row, partial) in partial[..band].iter().enumerate() {
            for (m, &sums) in partial.iter().enumerate() {
                // SAFETY: row `m` of the result has a float for each weight row.
                unsafe { *job.out.add(m * job.out_stride + first + row) = horizontal_sum(sums) };
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
    tables: &[__m256i; 4],
    partial: &mut [__m256; M],
) {
    // SAFETY: the caller's row and blocks lie inside the job; activations and sums are cache-line aligned.
    unsafe {
        let mut weights = job.weights.add((row * job.blocks + first) * U::BYTES);
        let mut absmax = job.absmax.wrapping_add(row * job.blocks + first);
        let mut sink = Accumulate::<U, M> {
            activations: job.activations.add(first * U::GROUPS * M * GROUP),
            sums: job.sums.wrapping_add(first * U::GROUPS * M * SUMS),
            tables,
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
struct Accumulate<'a, U, const M: usize> {
    activations: *const f32,
    sums: *const f32,
    tables: &'a [__m256i; 4],
    totals: [__m256; M],
    format: PhantomData<U>,
}

impl<U: Unpack, const M: usize> Sink for Accumulate<'_, U, M> {
    #[inline(always)]
    unsafe fn group(&mut self, group: usize, bytes: __m256i, scale: __m256, offset: __m256) {
        // SAFETY: `blocks_of_row` keeps the pointers at the block that is unpacked, which has `U::GROUPS` groups.
        unsafe {
            let [w0, w1, w2, w3] = if U::IS_CODE { look_up(bytes, self.tables) } else { widen(bytes) };
            for (m, total) in self.totals.iter_mut().enumerate() {
                let x = self.activations.add((group * M + m) * GROUP);
                let product = _mm256_mul_ps(w0, _mm256_load_ps(x));
                let product = _mm256_fmadd_ps(w1, _mm256_load_ps(x.add(8)), product);
                let product = _mm256_fmadd_ps(w2, _mm256_load_ps(x.add(16)), product);
                let product = _mm256_fmadd_ps(w3, _mm256_load_ps(x.add(24)), product);
                if U::HAS_MINIMUM {
                    let minimum = _mm256_mul_ps(offset, _mm256_load_ps(self.sums.add((group * M + m) * SUMS)));
                    *total = _mm256_add_ps(*total, _mm256_fmadd_ps(scale, product, minimum));
                } else {
                    *total = _mm256_fmadd_ps(scale, product, *total);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn floats(&mut self, values: [__m256; 4]) {
        // SAFETY: as above.
        unsafe {
            for (m, total) in self.totals.iter_mut().enumerate() {
                let x = self.activations.add(m * GROUP);
                let product = _mm256_mul_ps(values[0], _mm256_load_ps(x));
                let product = _mm256_fmadd_ps(values[1], _mm256_load_ps(x.add(8)), product);
                let product = _mm256_fmadd_ps(values[2], _mm256_load_ps(x.add(16)), product);
                let product = _mm256_fmadd_ps(values[3], _mm256_load_ps(x.add(24)), product);
                *total = _mm256_add_ps(*total, product);
            }
        }
    }
}

/// 32 signed bytes as floats, 2^24 times too large: register `j` takes byte `j` of each 4 as the top of an integer.
#[inline(always)]
unsafe fn widen(bytes: __m256i) -> [__m256; 4] {
    // SAFETY: the machine has AVX2.
    unsafe {
        let top = _mm256_set1_epi32(0xff00_0000_u32 as i32);
        [
            _mm256_cvtepi32_ps(_mm256_slli_epi32::<24>(bytes)),
            _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_slli_epi32::<16>(bytes), top)),
            _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_slli_epi32::<8>(bytes), top)),
            _mm256_cvtepi32_ps(_mm256_and_si256(bytes, top)),
        ]
    }
}

/// The 16 values of a code book as 4 tables of their first, second, third and fourth bytes.
#[inline(always)]
unsafe fn byte_planes(values: *const f32) -> [__m256i; 4] {
    let mut planes = [[0u8; 16]; 4];
    for code in 0..16 {
        // SAFETY: the caller points at 16 values.
        let bytes = unsafe { *values.add(code) }.to_le_bytes();
        for (plane, byte) in planes.iter_mut().zip(bytes) {
            plane[code] = byte;
        }
    }
    // SAFETY: each plane is 16 bytes; the machine has AVX2.
    unsafe {
        let table = |plane: &[u8; 16]| _mm256_broadcastsi128_si256(_mm_loadu_si128(plane.as_ptr().cast()));
        [table(&planes[0]), table(&planes[1]), table(&planes[2]), table(&planes[3])]
    }
}

/// The values of 32 codes: looks up each of their 4 bytes and zips them together.
#[inline(always)]
unsafe fn look_up(codes: __m256i, planes: &[__m256i; 4]) -> [__m256; 4] {
    // SAFETY: the machine has AVX2.
    unsafe {
        let (b0, b1) = (_mm256_shuffle_epi8(planes[0], codes), _mm256_shuffle_epi8(planes[1], codes));
        let (b2, b3) = (_mm256_shuffle_epi8(planes[2], codes), _mm256_shuffle_epi8(planes[3], codes));
        let (low_a, high_a) = (_mm256_unpacklo_epi8(b0, b1), _mm256_unpackhi_epi8(b0, b1));
        let (low_b, high_b) = (_mm256_unpacklo_epi8(b2, b3), _mm256_unpackhi_epi8(b2, b3));
        [
            _mm256_castsi256_ps(_mm256_unpacklo_epi16(low_a, low_b)),
            _mm256_castsi256_ps(_mm256_unpackhi_epi16(low_a, low_b)),
            _mm256_castsi256_ps(_mm256_unpacklo_epi16(high_a, high_b)),
            _mm256_castsi256_ps(_mm256_unpackhi_epi16(high_a, high_b)),
        ]
    }
}

#[inline(always)]
fn horizontal_sum(lanes: __m256) -> f32 {
    // SAFETY: only kernels that run with AVX2 call this.
    unsafe {
        let four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps::<1>(lanes));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }
}
