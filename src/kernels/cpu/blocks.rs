//! Storage formats of matrix rows and their exact dequantisation.
//!
//! A row is a whole number of blocks. The layouts are ggml's (`ggml-common.h`, `ggml-quants.c`); the values are
//! computed with the same f32 operations in the same order, so they are equal to ggml's to the last bit. The loops are
//! written so that the compiler vectorises them, and are compiled once per [`Level`].

use super::half_float::{bf16_to_f32, f16_at, f16_to_f32};
use super::{Level, k_blocks};

/// How the values of a row are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockFormat {
    /// 32-bit floats.
    F32,
    /// IEEE half floats.
    F16,
    /// Brain floats.
    Bf16,
    /// 4 bits, one scale for 32.
    Q4_0,
    /// 4 bits, scale and minimum for 32.
    Q4_1,
    /// 5 bits, one scale for 32.
    Q5_0,
    /// 5 bits, scale and minimum for 32.
    Q5_1,
    /// 8 bits, one scale for 32.
    Q8_0,
    /// 2 bits, 4-bit scales and minima for 16, in blocks of 256.
    Q2K,
    /// 3 bits, 6-bit scales for 16, in blocks of 256.
    Q3K,
    /// 4 bits, 6-bit scales and minima for 32, in blocks of 256.
    Q4K,
    /// 5 bits, 6-bit scales and minima for 32, in blocks of 256.
    Q5K,
    /// 6 bits, 8-bit scales for 16, in blocks of 256.
    Q6K,
}

impl BlockFormat {
    /// All formats.
    pub const ALL: [Self; 13] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    /// Values in one block.
    pub const fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q2K | Self::Q3K | Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2K => 84,
            Self::Q3K => 110,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// Bytes of `len` values; `None` where `len` is no whole number of blocks.
    pub const fn bytes_of(self, len: usize) -> Option<usize> {
        if len.is_multiple_of(self.block_len()) {
            (len / self.block_len()).checked_mul(self.block_bytes())
        } else {
            None
        }
    }
}

/// Dequantises whole blocks into `out`.
///
/// # Panics
/// If `bytes` are not exactly the blocks of `out.len()` values.
pub fn dequantize(level: Level, format: BlockFormat, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(format.bytes_of(out.len()), Some(bytes.len()), "{format:?} blocks of {} values", out.len());
    dequantize_rows(level, format, bytes, bytes.len(), out.len(), out);
}

/// Dequantises `columns` values of each row; rows begin `row_bytes` apart, and `out` is `[rows, columns]`.
///
/// # Panics
/// If `columns` are no whole number of blocks or a row lacks bytes.
pub fn dequantize_rows(
    level: Level,
    format: BlockFormat,
    bytes: &[u8],
    row_bytes: usize,
    columns: usize,
    out: &mut [f32],
) {
    if out.is_empty() {
        return;
    }
    let used = format.bytes_of(columns).expect("rows of whole blocks");
    assert!(out.len().is_multiple_of(columns), "{} values in rows of {columns}", out.len());
    let needed = (out.len() / columns - 1) * row_bytes + used;
    assert!(bytes.len() >= needed, "{} bytes, {needed} needed", bytes.len());
    #[cfg(target_arch = "x86_64")]
    match level.supported() {
        // SAFETY: `supported` yields a level only where `Level::best` found its instructions.
        Level::Avx512 => unsafe { dequantize_avx512(format, bytes, row_bytes, columns, out) },
        // SAFETY: as above.
        Level::Avx2 => unsafe { dequantize_avx2(format, bytes, row_bytes, columns, out) },
        Level::Portable => dequantize_portable(format, bytes, row_bytes, columns, out),
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = level;
        dequantize_portable(format, bytes, row_bytes, columns, out);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,f16c")]
fn dequantize_avx512(format: BlockFormat, bytes: &[u8], row_bytes: usize, columns: usize, out: &mut [f32]) {
    dequantize_portable(format, bytes, row_bytes, columns, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
fn dequantize_avx2(format: BlockFormat, bytes: &[u8], row_bytes: usize, columns: usize, out: &mut [f32]) {
    dequantize_portable(format, bytes, row_bytes, columns, out);
}

#[inline(always)]
fn dequantize_portable(format: BlockFormat, bytes: &[u8], row_bytes: usize, columns: usize, out: &mut [f32]) {
    // Functions are called by name: through a reference to one the compiler would leave a large one as it is for any processor.
    macro_rules! each_block {
        ($bytes:literal, $len:literal, $block:expr) => {
            for (row, out) in out.chunks_exact_mut(columns).enumerate() {
                let bytes = bytes[row * row_bytes..].as_chunks::<$bytes>().0;
                for (bytes, out) in bytes.iter().zip(out.as_chunks_mut::<$len>().0) {
                    $block(bytes, out);
                }
            }
        };
    }
    match format {
        BlockFormat::F32 => each_block!(4, 1, f32_of),
        BlockFormat::F16 => each_block!(2, 1, f16_of),
        BlockFormat::Bf16 => each_block!(2, 1, bf16_of),
        BlockFormat::Q4_0 => each_block!(18, 32, q4_0),
        BlockFormat::Q4_1 => each_block!(20, 32, q4_1),
        BlockFormat::Q5_0 => each_block!(22, 32, q5_0),
        BlockFormat::Q5_1 => each_block!(24, 32, q5_1),
        BlockFormat::Q8_0 => each_block!(34, 32, q8_0),
        BlockFormat::Q2K => each_block!(84, 256, k_blocks::q2_k),
        BlockFormat::Q3K => each_block!(110, 256, k_blocks::q3_k),
        BlockFormat::Q4K => each_block!(144, 256, k_blocks::q4_k),
        BlockFormat::Q5K => each_block!(176, 256, k_blocks::q5_k),
        BlockFormat::Q6K => each_block!(210, 256, k_blocks::q6_k),
    }
}

#[inline(always)]
fn f32_of(block: &[u8; 4], out: &mut [f32; 1]) {
    out[0] = f32::from_le_bytes(*block);
}

#[inline(always)]
fn f16_of(block: &[u8; 2], out: &mut [f32; 1]) {
    out[0] = f16_to_f32(u16::from_le_bytes(*block));
}

#[inline(always)]
fn bf16_of(block: &[u8; 2], out: &mut [f32; 1]) {
    out[0] = bf16_to_f32(u16::from_le_bytes(*block));
}

#[inline(always)]
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let scale = f16_at(block, 0);
    for i in 0..16 {
        let byte = block[2 + i];
        out[i] = f32::from((byte & 15) as i8 - 8) * scale;
        out[i + 16] = f32::from((byte >> 4) as i8 - 8) * scale;
    }
}

#[inline(always)]
fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (scale, minimum) = (f16_at(block, 0), f16_at(block, 2));
    for i in 0..16 {
        let byte = block[4 + i];
        out[i] = f32::from(byte & 15) * scale + minimum;
        out[i + 16] = f32::from(byte >> 4) * scale + minimum;
    }
}

#[inline(always)]
fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let scale = f16_at(block, 0);
    let high = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    for i in 0..16 {
        let byte = i32::from(block[6 + i]);
        let low_value = (byte & 15) | ((high >> i << 4) & 16) as i32;
        let high_value = (byte >> 4) | ((high >> (i + 12)) & 16) as i32;
        out[i] = (low_value - 16) as f32 * scale;
        out[i + 16] = (high_value - 16) as f32 * scale;
    }
}

#[inline(always)]
fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (scale, minimum) = (f16_at(block, 0), f16_at(block, 2));
    let high = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    for i in 0..16 {
        let byte = i32::from(block[8 + i]);
        let low_value = (byte & 15) | ((high >> i << 4) & 16) as i32;
        let high_value = (byte >> 4) | ((high >> (i + 12)) & 16) as i32;
        out[i] = low_value as f32 * scale + minimum;
        out[i + 16] = high_value as f32 * scale + minimum;
    }
}

#[inline(always)]
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let scale = f16_at(block, 0);
    for i in 0..32 {
        out[i] = f32::from(block[2 + i] as i8) * scale;
    }
}
