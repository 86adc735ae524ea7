//! Unpacking stored blocks into groups of 32 signed bytes (AVX2), the first half of every few-row kernel.
//!
//! A value of a group is `scale * byte + offset`, with one scale and offset for the 16 values of each half.
//! Layouts: `ggml-common.h`. All loads are unaligned, since the bytes may lie anywhere in a mapped file.

use std::arch::x86_64::{
    __m256, __m256i, _mm_cvtsi32_si128, _mm_cvtsi64_si128, _mm_loadl_epi64, _mm_loadu_si128, _mm_set1_epi16,
    _mm256_add_epi8, _mm256_and_si256, _mm256_andnot_si256, _mm256_blend_ps, _mm256_broadcast_ss,
    _mm256_broadcastsi128_si256, _mm256_castsi256_ps, _mm256_cmpeq_epi8, _mm256_cvtepi8_epi32, _mm256_cvtepi32_ps,
    _mm256_cvtepu8_epi32, _mm256_cvtepu16_epi32, _mm256_cvtph_ps, _mm256_loadu_si256, _mm256_mul_ps, _mm256_or_si256,
    _mm256_set1_epi8, _mm256_set1_epi32, _mm256_set1_epi64x, _mm256_set1_ps, _mm256_setr_epi8, _mm256_setr_epi32,
    _mm256_setzero_ps, _mm256_shuffle_epi8, _mm256_slli_epi16, _mm256_slli_epi32, _mm256_srl_epi16, _mm256_srli_epi16,
    _mm256_srlv_epi32, _mm256_storeu_ps, _mm256_sub_epi8,
};

/// What takes the groups of a block. A trait and not a closure, because its function must be inlined into a kernel to be
/// compiled with the kernel's instructions.
pub(crate) trait Sink {
    /// Takes group `group` of the block: 32 bytes, their scale and offset.
    ///
    /// # Safety
    /// The machine has what the kernel behind this sink needs.
    unsafe fn group(&mut self, group: usize, bytes: __m256i, scale: __m256, offset: __m256);

    /// Takes a block of one group of 32 floats.
    ///
    /// # Safety
    /// The machine has what the kernel behind this sink needs.
    unsafe fn floats(&mut self, values: [__m256; 4]);
}

/// A storage format whose blocks unpack into groups.
pub(crate) trait Unpack {
    /// Groups of 32 values in a block.
    const GROUPS: usize;
    /// Bytes of a block.
    const BYTES: usize;
    /// Whether values have an offset.
    const HAS_MINIMUM: bool = false;
    /// Whether the bytes are codes to look up, not numbers.
    const IS_CODE: bool = false;
    /// Whether the two halves of a group have scales of their own.
    const HALVES: bool = false;

    /// Calls `each(group, bytes, scale, offset)` for the groups of a block in their order. `absmax` points at the
    /// block's maximum where the format keeps maxima apart.
    ///
    /// # Safety
    /// The machine has AVX2 and F16C, `block` points at [`Unpack::BYTES`] readable bytes, and `absmax`, for such a format,
    /// at a float.
    unsafe fn unpack(block: *const u8, absmax: *const f32, sink: &mut impl Sink);
}

/// An f16 in all lanes.
#[inline(always)]
unsafe fn half(at: *const u8) -> __m256 {
    // SAFETY: callers point at two readable bytes; the machine has F16C.
    unsafe { _mm256_cvtph_ps(_mm_set1_epi16(at.cast::<i16>().read_unaligned())) }
}

/// The 32 nibbles of 16 bytes: the low ones, then the high ones.
#[inline(always)]
unsafe fn nibbles(at: *const u8) -> __m256i {
    // SAFETY: callers point at 16 readable bytes; the machine has AVX2.
    unsafe {
        let twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(at.cast()));
        let shifted = _mm256_srlv_epi32(twice, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
        _mm256_and_si256(shifted, _mm256_set1_epi8(15))
    }
}

/// The 32 bits of 4 bytes, as bytes of all ones or all zeros.
#[inline(always)]
unsafe fn spread_bits(at: *const u8) -> __m256i {
    // SAFETY: callers point at 4 readable bytes; the machine has AVX2.
    unsafe {
        let bits = _mm256_set1_epi32(at.cast::<i32>().read_unaligned());
        let replicate = _mm256_setr_epi8(
            0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3,
        );
        let others = _mm256_set1_epi64x(0x7fbf_dfef_f7fb_fdfe);
        let filled = _mm256_or_si256(_mm256_shuffle_epi8(bits, replicate), others);
        _mm256_cmpeq_epi8(filled, _mm256_set1_epi8(-1))
    }
}

/// `bytes >> count`, then the bits in `mask`.
#[inline(always)]
unsafe fn shift_and_mask(bytes: __m256i, count: usize, mask: i8) -> __m256i {
    // SAFETY: the machine has AVX2.
    unsafe { _mm256_and_si256(_mm256_srl_epi16(bytes, _mm_cvtsi32_si128(count as i32)), _mm256_set1_epi8(mask)) }
}

/// Two floats, each in one half of a register.
#[inline(always)]
unsafe fn halves(first: &f32, second: &f32) -> __m256 {
    // SAFETY: the machine has AVX.
    unsafe { _mm256_blend_ps::<0b1111_0000>(_mm256_broadcast_ss(first), _mm256_broadcast_ss(second)) }
}

/// 8 floats `factor * bytes`, on the stack.
#[inline(always)]
unsafe fn scaled(bytes: __m256i, factor: __m256) -> [f32; 8] {
    let mut out = [0.0; 8];
    // SAFETY: `out` holds 8 floats; the machine has AVX2.
    unsafe { _mm256_storeu_ps(out.as_mut_ptr(), _mm256_mul_ps(factor, _mm256_cvtepi32_ps(bytes))) };
    out
}

pub(crate) struct F32;
impl Unpack for F32 {
    const GROUPS: usize = 1;
    const BYTES: usize = 128;
    #[inline(always)]
    unsafe fn unpack(block: *const u8, _: *const f32, sink: &mut impl Sink) {
        // SAFETY: the caller's promises; every offset stays inside the block.
        unsafe {
            let part = |i: usize| _mm256_castsi256_ps(_mm256_loadu_si256(block.add(32 * i).cast()));
            sink.floats([part(0), part(1), part(2), part(3)]);
        }
    }
}

pub(crate) struct F16;
impl Unpack for F16 {
    const GROUPS: usize = 1;
    const BYTES: usize = 64;
    #[inline(always)]
    unsafe fn unpack(block: *const u8, _: *const f32, sink: &mut impl Sink) {
        // SAFETY: the caller's promises; every offset stays inside the block.
        unsafe {
            let part = |i: usize| _mm256_cvtph_ps(_mm_loadu_si128(block.add(16 * i).cast()));
            sink.floats([part(0), part(1), part(2), part(3)]);
        }
    }
}

pub(crate) struct Bf16;
impl Unpack for Bf16 {
    const GROUPS: usize = 1;
    const BYTES: usize = 64;
    #[inline(always)]
    unsafe fn unpack(block: *const u8, _: *const f32, sink: &mut impl Sink) {
        // SAFETY: the caller's promises; every offset stays inside the block.
        unsafe {
            let part = |i: usize| {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(block.add(16 * i).cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            };
            sink.floats([part(0), part(1), part(2), part(3)]);
        }
    }
}

pub(crate) struct Q4_0;
impl Unpack for Q4_0 {
    const GROUPS: usize = 1;
    const BYTES: usize = 18;
    #[inline(always)]
    unsafe fn unpack(block: *const u8, _: *const f32, sink: &mut impl Sink) {
        // SAFETY: the caller's promises; every offset stays inside the block.
        unsafe {
            let bytes = _mm256_sub_epi8(nibbles(block.add(2)), _mm256_set1_epi8(8));
            sink.group(0, bytes, half(block), _mm256_setzero_ps());
        }
    }
}

pub(crate) struct Q4_1;
impl Unpack for Q4_1 {
    const GROUPS: usize = 1;
    const BYTES: usize = 20;
    const HAS_MINIMUM: bool = true;
    #[inline(always)]
    unsafe fn unpack(block: *const u8, _: *const f32, sink: &mut impl Sink) {
        // SAFETY: the caller's promises; every offset stays inside the block.
        unsafe { sink.group(0, nibbles(block.add(4)), half(block), half(block.add(2))) }
    }
}

pub(crate) struct Q5_0;
impl Unpack for Q5_0 {
    const GROUPS: usize = 1;
    const BYTES: usize = 22;
    #[inline(always)]
    unsafe fn unpack(block: *const u8, _: *const f32, sink: &mut impl Sink) {
        // SAFETY: the caller's promises; every offset stays inside the block.
        unsafe {
            // Without its fifth bit a value is 16 less: the upper nibble of a negative byte.
            let upper = _mm256_andnot_si256(spread_bits(block.add(2)), _mm256_set1_epi8(-16));
            sink.group(0, _mm256_or_si256(nibbles(block.add(6)), upper), half(block), _mm256_setzero_ps());
        }
    }
}

pub(crate) struct Q5_1;
impl Unpack for Q5_1 {
    const GROUPS: usize = 1;
    const BYTES: usize = 24;
    const HAS_MINIMUM: bool = true;
    #[inline(always)]
    unsafe fn unpack(block: *const u8, _: *const f32, sink: &mut impl Sink) {
        // SAFETY: the caller's promises; every offset stays inside the block.
        unsafe {
            let upper = _mm256_and_si256(spread_bits(block.add(4)), _mm256_set1_epi8(16));
            sink.group(0, _mm256_or_si256(nibbles(block.add(8)), upper), half(block), half(block.add(2)));
        }
    }
}

pub(crate) struct Q8_0;
impl Unpack for Q8_0 {
    const GROUPS: usize = 1;
    const BYTES: usize = 34;
    #[inline(always)]
    unsafe fn unpack(block: *const u8, _: *const f32, sink: &mut impl Sink) {
        // SAFETY: the caller's promises; every offset stays inside the block.
        unsafe { sink.group(0, _mm256_loadu_si256(block.add(2).cast()), half(block), _mm256_setzero_ps()) }
    }
}

pub(crate) struct Q2K;
impl Unpack for Q2K {
    const GROUPS: usize = 8;
    const BYTES: usize = 84;
    const HAS_MINIMUM: bool = true;
    const HALVES: bool = true;
    #[inline(always)]
    unsafe fn unpack(block: *const u8, _: *const f32, sink: &mut impl Sink) {
        // SAFETY: the caller's promises; every offset stays inside the block.
        unsafe {
            let (scale, minimum) = (half(block.add(80)), _mm256_mul_ps(half(block.add(82)), _mm256_set1_ps(-1.0)));
            for part in 0..2 {
                let packed = _mm256_cvtepu8_epi32(_mm_loadl_epi64(block.add(8 * part).cast()));
                let scales = scaled(_mm256_and_si256(packed, _mm256_set1_epi32(15)), scale);
                let offsets = scaled(_mm256_srlv_epi32(packed, _mm256_set1_epi32(4)), minimum);
                let codes = _mm256_loadu_si256(block.add(16 + 32 * part).cast());
                for pair in 0..4 {
                    let bytes = shift_and_mask(codes, 2 * pair, 3);
                    let scale = halves(&scales[2 * pair], &scales[2 * pair + 1]);
                    sink.group(4 * part + pair, bytes, scale, halves(&offsets[2 * pair], &offsets[2 * pair + 1]));
                }
            }
        }
    }
}

pub(crate) struct Q3K;
impl Unpack for Q3K {
    const GROUPS: usize = 8;
    const BYTES: usize = 110;
    const HALVES: bool = true;
    #[inline(always)]
    unsafe fn unpack(block: *const u8, _: *const f32, sink: &mut impl Sink) {
        // SAFETY: the caller's promises; every offset stays inside the block.
        unsafe {
            let scale = half(block.add(108));
            let scales = super::k_blocks::q3_scales(std::slice::from_raw_parts(block.add(96), 12));
            let mask = _mm256_loadu_si256(block.cast());
            for part in 0..2 {
                let scales = scaled(_mm256_cvtepi8_epi32(_mm_loadl_epi64(scales.as_ptr().add(8 * part).cast())), scale);
                let codes = _mm256_loadu_si256(block.add(32 + 32 * part).cast());
                for pair in 0..4 {
                    let low = shift_and_mask(codes, 2 * pair, 3);
                    let bit = _mm256_set1_epi8((1u8 << (4 * part + pair)) as i8);
                    // A value without its third bit is 4 less.
                    let missing =
                        _mm256_andnot_si256(_mm256_cmpeq_epi8(_mm256_and_si256(mask, bit), bit), _mm256_set1_epi8(-4));
                    let scale = halves(&scales[2 * pair], &scales[2 * pair + 1]);
                    sink.group(4 * part + pair, _mm256_add_epi8(low, missing), scale, _mm256_setzero_ps());
                }
            }
        }
    }
}

/// Scales and negated minima of the 8 groups of a `Q4_K` or `Q5_K` block.
#[inline(always)]
unsafe fn scales_and_offsets(block: *const u8) -> ([f32; 8], [f32; 8]) {
    // SAFETY: callers point at a block, whose first 16 bytes are two f16 and 12 bytes of scales.
    unsafe {
        let word = |i: usize| block.add(4 + 4 * i).cast::<u32>().read_unaligned();
        let (first, second, third) = (word(0), word(1), word(2));
        let (six, four, two) = (0x3f3f_3f3f, 0x0f0f_0f0f, 0x0303_0303);
        let wide = |low: u32, high: u32| {
            let bytes = (u64::from(low) | (u64::from(high) << 32)) as i64;
            _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes))
        };
        let scales = wide(first & six, (third & four) | (((first >> 6) & two) << 4));
        let minima = wide(second & six, ((third >> 4) & four) | (((second >> 6) & two) << 4));
        let negated = _mm256_mul_ps(half(block.add(2)), _mm256_set1_ps(-1.0));
        (scaled(scales, half(block)), scaled(minima, negated))
    }
}

pub(crate) struct Q4K;
impl Unpack for Q4K {
    const GROUPS: usize = 8;
    const BYTES: usize = 144;
    const HAS_MINIMUM: bool = true;
    #[inline(always)]
    unsafe fn unpack(block: *const u8, _: *const f32, sink: &mut impl Sink) {
        // SAFETY: the caller's promises; every offset stays inside the block.
        unsafe {
            let (scales, offsets) = scales_and_offsets(block);
            for pair in 0..4 {
                let codes = _mm256_loadu_si256(block.add(16 + 32 * pair).cast());
                for part in 0..2 {
                    let group = 2 * pair + part;
                    let bytes = shift_and_mask(codes, 4 * part, 15);
                    sink.group(group, bytes, _mm256_broadcast_ss(&scales[group]), _mm256_broadcast_ss(&offsets[group]));
                }
            }
        }
    }
}

pub(crate) struct Q5K;
impl Unpack for Q5K {
    const GROUPS: usize = 8;
    const BYTES: usize = 176;
    const HAS_MINIMUM: bool = true;
    #[inline(always)]
    unsafe fn unpack(block: *const u8, _: *const f32, sink: &mut impl Sink) {
        // SAFETY: the caller's promises; every offset stays inside the block.
        unsafe {
            let (scales, offsets) = scales_and_offsets(block);
            let high = _mm256_loadu_si256(block.add(16).cast());
            for pair in 0..4 {
                let codes = _mm256_loadu_si256(block.add(48 + 32 * pair).cast());
                for part in 0..2 {
                    let group = 2 * pair + part;
                    let fifth = _mm256_slli_epi16::<4>(shift_and_mask(high, group, 1));
                    let bytes = _mm256_or_si256(shift_and_mask(codes, 4 * part, 15), fifth);
                    sink.group(group, bytes, _mm256_broadcast_ss(&scales[group]), _mm256_broadcast_ss(&offsets[group]));
                }
            }
        }
    }
}

pub(crate) struct Q6K;
impl Unpack for Q6K {
    const GROUPS: usize = 8;
    const BYTES: usize = 210;
    const HALVES: bool = true;
    #[inline(always)]
    unsafe fn unpack(block: *const u8, _: *const f32, sink: &mut impl Sink) {
        // SAFETY: the caller's promises; every offset stays inside the block.
        unsafe {
            let scale = half(block.add(208));
            for part in 0..2 {
                let scales = scaled(_mm256_cvtepi8_epi32(_mm_loadl_epi64(block.add(192 + 8 * part).cast())), scale);
                let first = _mm256_loadu_si256(block.add(64 * part).cast());
                let second = _mm256_loadu_si256(block.add(64 * part + 32).cast());
                let high = _mm256_loadu_si256(block.add(128 + 32 * part).cast());
                for quarter in 0..4 {
                    let codes = if quarter % 2 == 0 { first } else { second };
                    let low = shift_and_mask(codes, 4 * (quarter / 2), 15);
                    let top = _mm256_slli_epi16::<4>(shift_and_mask(high, 2 * quarter, 3));
                    let bytes = _mm256_sub_epi8(_mm256_or_si256(low, top), _mm256_set1_epi8(32));
                    let scale = halves(&scales[2 * quarter], &scales[2 * quarter + 1]);
                    sink.group(4 * part + quarter, bytes, scale, _mm256_setzero_ps());
                }
            }
        }
    }
}

/// NF4 and FP4.
pub(crate) struct Codes;
impl Unpack for Codes {
    const GROUPS: usize = 2;
    const BYTES: usize = 32;
    const IS_CODE: bool = true;
    #[inline(always)]
    unsafe fn unpack(block: *const u8, absmax: *const f32, sink: &mut impl Sink) {
        // SAFETY: the caller's promises.
        unsafe {
            let codes = _mm256_loadu_si256(block.cast());
            let scale = _mm256_broadcast_ss(&*absmax);
            let mask = _mm256_set1_epi8(15);
            sink.group(0, _mm256_and_si256(_mm256_srli_epi16::<4>(codes), mask), scale, _mm256_setzero_ps());
            sink.group(1, _mm256_and_si256(codes, mask), scale, _mm256_setzero_ps());
        }
    }
}
