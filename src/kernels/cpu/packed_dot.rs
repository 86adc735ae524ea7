//! Products of a few rows of activations with packed rows, straight from the bytes (decode).
//!
//! Bound: the packed bytes, read once. A row of activations is summed in the same order however many rows there are
//! and however the weight rows are shared out, so a sequence's result depends neither on its batch nor on threads.

use super::activations::{Activations, GROUP, Order, TILE};
use super::codebook::BLOCK_LEN;
use super::matrix::TileMut;
use super::{BlockFormat, Level};

/// Packed weight rows, one after another.
#[derive(Clone, Copy)]
pub enum PackedRows<'a> {
    /// Blocks of a storage format.
    Blocks(BlockFormat, &'a [u8]),
    /// f32 values.
    F32(&'a [f32]),
    /// The bits of f16 values.
    F16(&'a [u16]),
    /// The bits of bf16 values.
    Bf16(&'a [u16]),
    /// 4-bit codes in blocks of 64 that end with each row.
    Codes {
        /// Two codes a byte.
        packed: &'a [u8],
        /// A maximum for each block.
        absmax: &'a [f32],
        /// The value of each code.
        values: &'a [f32; 16],
    },
}

/// What a kernel reads and writes; the pointers are checked by [`dot`].
pub(crate) struct Job {
    pub(crate) weights: *const u8,
    pub(crate) absmax: *const f32,
    pub(crate) values: *const f32,
    pub(crate) rows: usize,
    /// Blocks of a row.
    pub(crate) blocks: usize,
    pub(crate) activations: *const f32,
    pub(crate) sums: *const f32,
    pub(crate) out: *mut f32,
    /// Floats between two rows of activations' results.
    pub(crate) out_stride: usize,
}

/// The order in which [`dot`] takes activations for rows of this format and `columns`; `None` where no kernel reads them.
pub fn order_of_blocks(level: Level, format: BlockFormat, columns: usize) -> Option<Order> {
    match (level.supported(), format) {
        _ if !columns.is_multiple_of(GROUP) || columns == 0 => None,
        (Level::Portable, _) => None,
        (_, BlockFormat::F32 | BlockFormat::F16 | BlockFormat::Bf16) | (Level::Avx512, _) => Some(Order::Natural),
        (Level::Avx2, _) => Some(Order::Avx2Bytes),
    }
}

/// As [`order_of_blocks`], for 4-bit codes with `columns` in a row.
pub fn order_of_codes(level: Level, columns: usize) -> Option<Order> {
    match level.supported() {
        _ if !columns.is_multiple_of(BLOCK_LEN) || columns == 0 => None,
        Level::Portable => None,
        Level::Avx2 => Some(Order::Avx2Codes),
        Level::Avx512 => Some(Order::Avx512Codes),
    }
}

/// Whether values of this format have an offset, so that activations need their sums.
pub fn has_minimum(format: BlockFormat) -> bool {
    matches!(format, BlockFormat::Q4_1 | BlockFormat::Q5_1 | BlockFormat::Q2K | BlockFormat::Q4K | BlockFormat::Q5K)
}

/// `tile[m, i] = activations[m] . rows[i]`.
///
/// # Panics
/// If the activations are in another order than the format's, or lengths do not agree.
pub fn dot(level: Level, rows: PackedRows<'_>, activations: &Activations, tile: &mut TileMut<'_>) {
    let columns = activations.columns();
    let (m, n) = (activations.rows(), tile.columns());
    assert_eq!(tile.rows(), m, "rows of the result");
    let whole = n * columns;
    let no_values: (*const f32, *const f32) = (std::ptr::null(), std::ptr::null());
    let (format, weights, (absmax, values)) = match rows {
        PackedRows::Blocks(format, bytes) => {
            assert_eq!(Some(bytes.len()), format.bytes_of(columns).map(|row| n * row), "bytes of {n} rows");
            (Some(format), bytes.as_ptr(), no_values)
        }
        PackedRows::F32(values) => {
            assert_eq!(values.len(), whole, "values of {n} rows");
            (Some(BlockFormat::F32), values.as_ptr().cast(), no_values)
        }
        PackedRows::F16(bits) | PackedRows::Bf16(bits) => {
            assert_eq!(bits.len(), whole, "values of {n} rows");
            let format = if matches!(rows, PackedRows::F16(_)) { BlockFormat::F16 } else { BlockFormat::Bf16 };
            (Some(format), bits.as_ptr().cast(), no_values)
        }
        PackedRows::Codes { packed, absmax, values } => {
            assert_eq!((packed.len(), absmax.len()), (whole / 2, whole / BLOCK_LEN), "codes of {n} rows");
            (None, packed.as_ptr(), (absmax.as_ptr(), values.as_ptr()))
        }
    };
    let expected_order = match format {
        Some(format) => order_of_blocks(level, format, columns),
        None => order_of_codes(level, columns),
    };
    let needs_sums = format.is_some_and(has_minimum);
    let block_len = format.map_or(BLOCK_LEN, |format| format.block_len().max(GROUP));
    assert!(expected_order == Some(activations.order()), "order {:?}, not {expected_order:?}", activations.order());
    assert!(!needs_sums || activations.has_sums(), "sums of the activations");
    if n == 0 || m == 0 {
        return;
    }
    for first in (0..m).step_by(TILE) {
        let height = TILE.min(m - first);
        let (tile_values, sums) = activations.tile(first);
        let (out, out_stride) = tile.row_pointer(first);
        let job = Job {
            weights,
            absmax,
            values,
            rows: n,
            blocks: columns / block_len,
            activations: tile_values,
            sums,
            out,
            out_stride,
        };
        // SAFETY: the lengths of `rows` were checked above against `n` rows of `columns`; the activations hold tiles of
        // `height` rows in the order that the kernel of this level reads; the tile has rows `first..first + height`
        // of `n` columns at its stride; `level` is supported, because an order exists only for supported levels.
        unsafe { run(level.supported(), format, height, &job) };
    }
}

#[cfg(target_arch = "x86_64")]
unsafe fn run(level: Level, format: Option<BlockFormat>, height: usize, job: &Job) {
    // SAFETY: the caller's promises are those of the kernels.
    unsafe {
        let is_float = matches!(format, Some(BlockFormat::F32 | BlockFormat::F16 | BlockFormat::Bf16));
        if level == Level::Avx512 && !is_float {
            super::dot_avx512::run(format, height, job);
        } else {
            super::dot_avx2::run(format, height, job);
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
unsafe fn run(_: Level, _: Option<BlockFormat>, _: usize, _: &Job) {
    unreachable!("no order exists on this architecture")
}
