//! 4-bit codes into a table of 16 values, one f32 maximum for each block of 64: the storage of NF4 and FP4.
//!
//! Two codes a byte, the first in the high nibble; blocks run over the flattened matrix. A value is
//! `table[code] * absmax[block]`, one f32 multiplication, as bitsandbytes computes it.

use super::Level;

/// Values that share one maximum.
pub const BLOCK_LEN: usize = 64;

/// The smallest maximum that bitsandbytes divides by.
const TINY: f32 = 1e-38;

/// The 16 values of a 4-bit code, and what quantising into them needs.
#[derive(Clone, Debug, PartialEq)]
pub struct Codebook {
    /// Value of each code.
    pub values: [f32; 16],
    /// Codes in the order of their values; equal values in the order of their codes.
    ascending: [u8; 16],
    /// Midpoints of neighbours in that order.
    midpoints: [f32; 15],
}

impl Codebook {
    /// A code book of these values.
    pub fn new(values: [f32; 16]) -> Self {
        let mut ascending: [u8; 16] = std::array::from_fn(|i| i as u8);
        ascending.sort_by(|&a, &b| values[usize::from(a)].total_cmp(&values[usize::from(b)]));
        let value = |rank: usize| values[usize::from(ascending[rank])];
        let midpoints = std::array::from_fn(|i| f32::midpoint(value(i), value(i + 1)));
        Self { values, ascending, midpoints }
    }

    /// The code nearest to `value`; at a midpoint the lower one.
    #[inline(always)]
    fn nearest(&self, value: f32) -> u8 {
        let rank: u8 = self.midpoints.iter().map(|&m| u8::from(value > m)).sum();
        self.ascending[usize::from(rank)]
    }
}

/// Quantises `values`, which start at a block border, into codes and block maxima.
///
/// A full block is scaled by the reciprocal of its maximum and clamped; the last block, where it is shorter, is divided by
/// its maximum; this is what bitsandbytes does. An odd last value is paired with the code of 0.
///
/// # Panics
/// If `packed` or `absmax` have not the length of so many values.
pub fn quantize(level: Level, book: &Codebook, values: &[f32], packed: &mut [u8], absmax: &mut [f32]) {
    assert_eq!(packed.len(), values.len().div_ceil(2), "packed bytes of {} values", values.len());
    assert_eq!(absmax.len(), values.len().div_ceil(BLOCK_LEN), "maxima of {} values", values.len());
    #[cfg(target_arch = "x86_64")]
    if level.supported() >= Level::Avx2 {
        // SAFETY: `supported` yields a level only where `Level::best` found its instructions.
        return unsafe { quantize_avx2(book, values, packed, absmax) };
    }
    let _ = level;
    quantize_portable(book, values, packed, absmax);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn quantize_avx2(book: &Codebook, values: &[f32], packed: &mut [u8], absmax: &mut [f32]) {
    quantize_portable(book, values, packed, absmax);
}

#[inline(always)]
fn quantize_portable(book: &Codebook, values: &[f32], packed: &mut [u8], absmax: &mut [f32]) {
    for ((block, bytes), maximum) in values.chunks(BLOCK_LEN).zip(packed.chunks_mut(BLOCK_LEN / 2)).zip(absmax) {
        let largest = block.iter().fold(0.0f32, |m, v| if v.abs() > m { v.abs() } else { m });
        let mut codes = [book.nearest(0.0); BLOCK_LEN];
        if let Ok(block) = <&[f32; BLOCK_LEN]>::try_from(block) {
            *maximum = largest;
            let reciprocal = 1.0 / if largest > TINY { largest } else { TINY };
            let mut ranks = [0u8; BLOCK_LEN];
            for (rank, &value) in ranks.iter_mut().zip(block) {
                let scaled = (value * reciprocal).clamp(-1.0, 1.0);
                *rank = book.midpoints.iter().map(|&m| u8::from(scaled > m)).sum();
            }
            for (code, &rank) in codes.iter_mut().zip(&ranks) {
                *code = book.ascending[usize::from(rank)];
            }
        } else {
            *maximum = if largest > TINY { largest } else { TINY };
            for (code, &value) in codes.iter_mut().zip(block) {
                *code = book.nearest(value / *maximum);
            }
        }
        for (byte, pair) in bytes.iter_mut().zip(codes.as_chunks::<2>().0) {
            *byte = (pair[0] << 4) | pair[1];
        }
    }
}

/// Dequantises the values `start..start + out.len()` of the flattened matrix.
///
/// `packed` is the whole matrix; `absmax` begins with the maximum of the block that holds `start`.
///
/// # Panics
/// If `packed` or `absmax` end before the range does.
pub fn dequantize(level: Level, values: &[f32; 16], packed: &[u8], absmax: &[f32], start: usize, out: &mut [f32]) {
    let end = start + out.len();
    assert!(end.div_ceil(2) <= packed.len(), "codes {start}..{end} of {} bytes", packed.len());
    let last_block = if out.is_empty() { start / BLOCK_LEN } else { end.div_ceil(BLOCK_LEN) };
    assert!(last_block - start / BLOCK_LEN <= absmax.len(), "maxima of codes {start}..{end}");
    #[cfg(target_arch = "x86_64")]
    if level.supported() >= Level::Avx2 {
        // SAFETY: `supported` yields a level only where `Level::best` found its instructions.
        return unsafe { dequantize_avx2(values, packed, absmax, start, out) };
    }
    let _ = level;
    dequantize_by(values, packed, absmax, start, out, |bytes, maximum, out| {
        for (pair, &byte) in out.as_chunks_mut::<2>().0.iter_mut().zip(bytes) {
            pair[0] = values[usize::from(byte >> 4)] * maximum;
            pair[1] = values[usize::from(byte & 15)] * maximum;
        }
    });
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn dequantize_avx2(values: &[f32; 16], packed: &[u8], absmax: &[f32], start: usize, out: &mut [f32]) {
    dequantize_by(values, packed, absmax, start, out, |bytes, maximum, out| {
        dequantize_block_avx2(values, bytes, maximum, out);
    });
}

/// Whole blocks go to `block`, pieces at the ends value by value.
#[inline(always)]
fn dequantize_by(
    values: &[f32; 16],
    packed: &[u8],
    absmax: &[f32],
    start: usize,
    out: &mut [f32],
    block: impl Fn(&[u8; BLOCK_LEN / 2], f32, &mut [f32; BLOCK_LEN]),
) {
    let piece = |at: usize, maximum: f32, out: &mut [f32]| {
        for (i, value) in out.iter_mut().enumerate() {
            let byte = packed[(at + i) >> 1];
            let code = if (at + i).is_multiple_of(2) { byte >> 4 } else { byte & 15 };
            *value = values[usize::from(code)] * maximum;
        }
    };
    let first_block = start / BLOCK_LEN;
    let head_len = (start.next_multiple_of(BLOCK_LEN) - start).min(out.len());
    let (head, rest) = out.split_at_mut(head_len);
    let mut maxima = absmax.iter();
    if !head.is_empty() {
        piece(start, *maxima.next().expect("a maximum for each block"), head);
    }
    let start = start + head_len;
    let (blocks, tail) = rest.as_chunks_mut::<BLOCK_LEN>();
    let bytes = packed[(start / 2).min(packed.len())..].as_chunks::<{ BLOCK_LEN / 2 }>().0;
    let tail_start = start + blocks.len() * BLOCK_LEN;
    for ((out, bytes), &maximum) in blocks.iter_mut().zip(bytes).zip(&mut maxima) {
        block(bytes, maximum, out);
    }
    if !tail.is_empty() {
        piece(tail_start, absmax[tail_start / BLOCK_LEN - first_block], tail);
    }
}

/// The table lies in two registers; the low 3 bits of a code pick a lane of each, its high bit picks the register.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[inline]
fn dequantize_block_avx2(values: &[f32; 16], bytes: &[u8; 32], maximum: f32, out: &mut [f32; 64]) {
    use std::arch::x86_64::{
        _mm256_blendv_ps, _mm256_castsi256_ps, _mm256_loadu_ps, _mm256_mul_ps, _mm256_permutevar8x32_ps,
        _mm256_set1_epi32, _mm256_set1_ps, _mm256_setr_epi32, _mm256_slli_epi32, _mm256_srlv_epi32, _mm256_storeu_ps,
    };
    // SAFETY: the table has 16 values, so both halves are readable.
    let (low, high) = unsafe { (_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values.as_ptr().add(8))) };
    let maximum = _mm256_set1_ps(maximum);
    let shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    for (word, out) in bytes.as_chunks::<4>().0.iter().zip(out.as_chunks_mut::<8>().0) {
        let codes = _mm256_srlv_epi32(_mm256_set1_epi32(i32::from_le_bytes(*word)), shifts);
        let choice = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
        let looked_up =
            _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes), choice);
        // SAFETY: `out` is a chunk of 8 floats.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), _mm256_mul_ps(looked_up, maximum)) };
    }
}
