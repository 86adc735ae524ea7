//! The many-row product of dequantised panels: register tiles of 6 rows by 16 columns, with AVX-512 of 12 by 32.
//!
//! `c[i, j] = keep * c[i, j] + sum_p a[i, p] b[p, j]`, with `a` read as it lies and `b` packed into strips of 16 columns. A tile's
//! sums stay in 12 (24) registers over the whole depth, each in the order of `p`, so a row of the result does not depend on
//! how many rows there are. Bound: two multiply-adds of 8 (16) floats a cycle; each step of 12 (24) of them loads 2 registers of `b`
//! and broadcasts 6 (12) values of `a`.

use super::{Level, Operand, TileMut, gemm};

/// Columns of a strip of packed weights.
pub const STRIP: usize = 16;

/// Rows of a register tile.
const TILE_ROWS: usize = 6;

/// Rows of `a` that are multiplied with every strip before the next ones are: with a depth of 1024 they are 192 KiB.
const BAND_ROWS: usize = 8 * TILE_ROWS;

/// Turns up to 16 rows of `columns` values into a strip `[columns, 16]`; missing rows become zeros.
///
/// # Panics
/// If `rows` holds more than 16 rows, or `strip` is not `columns * 16` long.
pub fn pack_strip(level: Level, rows: &[f32], columns: usize, strip: &mut [f32]) {
    assert!(rows.len() <= STRIP * columns && strip.len() == STRIP * columns, "a strip of {columns} columns");
    #[cfg(target_arch = "x86_64")]
    if level.supported() >= Level::Avx2 && rows.len() == STRIP * columns {
        // SAFETY: `supported` yields a level only where `Level::best` found its instructions; lengths as just checked.
        return unsafe { pack_strip_avx2(rows, columns, strip) };
    }
    let _ = level;
    let height = rows.len().checked_div(columns).unwrap_or(0);
    for (column, values) in strip.as_chunks_mut::<STRIP>().0.iter_mut().enumerate() {
        for (row, value) in values.iter_mut().enumerate() {
            *value = if row < height { rows[row * columns + column] } else { 0.0 };
        }
    }
}

/// `tile = keep * tile + a S`, where `S` are packed strips `[ceil(tile.columns() / 16), depth, 16]`.
///
/// # Panics
/// If `a` `[tile.rows(), depth]` or the strips are too short.
pub fn multiply_strips(level: Level, a: Operand<'_>, strips: &[f32], depth: usize, keep: f32, tile: &mut TileMut<'_>) {
    let (rows, columns) = (tile.rows(), tile.columns());
    assert!(strips.len() >= columns.div_ceil(STRIP) * STRIP * depth, "strips of {columns} columns");
    a.check(rows, depth, "the left operand");
    if rows == 0 || columns == 0 {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if level.supported() >= Level::Avx2 {
        let is_wide = level.supported() == Level::Avx512;
        let (height, across) = if is_wide { (2 * TILE_ROWS, 2) } else { (TILE_ROWS, 1) };
        for band in (0..rows).step_by(BAND_ROWS) {
            for first_column in (0..columns).step_by(across * STRIP) {
                for first_row in (band..rows.min(band + BAND_ROWS)).step_by(height) {
                    let (c, c_row) = tile.row_pointer(first_row);
                    let (a, a_row, a_depth) = a.at_row(first_row);
                    let b = strips[first_column * depth..].as_ptr();
                    // SAFETY: `first_column` is a column of the tile.
                    let c = unsafe { c.add(first_column) };
                    let job = Job { a, a_row, a_depth, b, c, c_row, depth, keep };
                    let (rows, width) = (height.min(rows - first_row), (across * STRIP).min(columns - first_column));
                    // SAFETY: `supported` yields a level only where `Level::best` found its instructions. The left
                    // operand and the strips were checked for all rows, columns and the depth; the rows and columns
                    // written lie in the tile, which is borrowed exclusively.
                    unsafe { if is_wide { job.run_avx512(rows, width) } else { job.run_avx2(rows, width) } };
                }
            }
        }
        return;
    }
    let _ = level;
    for (index, mut column) in tile.reborrow().split_columns(STRIP).into_iter().enumerate() {
        let strip = Operand::row_major(&strips[index * STRIP * depth..], STRIP);
        gemm(&mut column, depth, a, strip, 1.0, keep);
    }
}

/// One register tile.
#[cfg(target_arch = "x86_64")]
struct Job {
    a: *const f32,
    a_row: usize,
    a_depth: usize,
    b: *const f32,
    c: *mut f32,
    c_row: usize,
    depth: usize,
    keep: f32,
}

#[cfg(target_arch = "x86_64")]
impl Job {
    /// # Safety
    /// The machine has AVX2 and FMA; `a` has `rows` (1 to 6) rows and `b` 16 columns for the depth; `c` has the
    /// rows and `width` (1 to 16) columns.
    unsafe fn run_avx2(&self, rows: usize, width: usize) {
        // SAFETY: the caller's promises.
        unsafe {
            match rows {
                1 => self.avx2::<1>(width),
                2 => self.avx2::<2>(width),
                3 => self.avx2::<3>(width),
                4 => self.avx2::<4>(width),
                5 => self.avx2::<5>(width),
                _ => self.avx2::<6>(width),
            }
        }
    }

    /// # Safety
    /// As [`Job::run_avx2`], with AVX-512 F, up to 12 rows and up to 32 columns, of as many strips as they take.
    unsafe fn run_avx512(&self, rows: usize, width: usize) {
        // SAFETY: the caller's promises.
        unsafe {
            if width > STRIP { self.strips_avx512::<2>(rows, width) } else { self.strips_avx512::<1>(rows, width) }
        }
    }

    /// # Safety
    /// As [`Job::run_avx512`], of so many strips.
    unsafe fn strips_avx512<const STRIPS: usize>(&self, rows: usize, width: usize) {
        // SAFETY: the caller's promises.
        unsafe {
            match rows {
                1 => self.avx512::<1, STRIPS>(width),
                2 => self.avx512::<2, STRIPS>(width),
                3 => self.avx512::<3, STRIPS>(width),
                4 => self.avx512::<4, STRIPS>(width),
                5 => self.avx512::<5, STRIPS>(width),
                6 => self.avx512::<6, STRIPS>(width),
                7 => self.avx512::<7, STRIPS>(width),
                8 => self.avx512::<8, STRIPS>(width),
                9 => self.avx512::<9, STRIPS>(width),
                10 => self.avx512::<10, STRIPS>(width),
                11 => self.avx512::<11, STRIPS>(width),
                _ => self.avx512::<12, STRIPS>(width),
            }
        }
    }

    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2<const ROWS: usize>(&self, width: usize) {
        use std::arch::x86_64::{
            _mm256_broadcast_ss, _mm256_cmpgt_epi32, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_maskload_ps,
            _mm256_maskstore_ps, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setr_epi32, _mm256_setzero_ps,
            _mm256_storeu_ps,
        };
        let count = _mm256_set1_epi32(width as i32);
        let low_mask = _mm256_cmpgt_epi32(count, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
        let high_mask = _mm256_cmpgt_epi32(count, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15));
        let mut sums = [[_mm256_setzero_ps(); 2]; ROWS];
        let (mut a, mut b) = (self.a, self.b);
        // SAFETY: the caller's promises; masked lanes are neither read nor written.
        unsafe {
            for _ in 0..self.depth {
                let (low, high) = (_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8)));
                for (row, sums) in sums.iter_mut().enumerate() {
                    let value = _mm256_broadcast_ss(&*a.add(row * self.a_row));
                    sums[0] = _mm256_fmadd_ps(value, low, sums[0]);
                    sums[1] = _mm256_fmadd_ps(value, high, sums[1]);
                }
                a = a.wrapping_add(self.a_depth);
                b = b.wrapping_add(STRIP);
            }
            let keep = _mm256_set1_ps(self.keep);
            for (row, [low, high]) in sums.into_iter().enumerate() {
                let c = self.c.add(row * self.c_row);
                let (mut low, mut high) = (low, high);
                if self.keep != 0.0 {
                    low = _mm256_fmadd_ps(keep, _mm256_maskload_ps(c, low_mask), low);
                    high = _mm256_fmadd_ps(keep, _mm256_maskload_ps(c.wrapping_add(8), high_mask), high);
                }
                if width == STRIP {
                    _mm256_storeu_ps(c, low);
                    _mm256_storeu_ps(c.add(8), high);
                } else {
                    _mm256_maskstore_ps(c, low_mask, low);
                    _mm256_maskstore_ps(c.wrapping_add(8), high_mask, high);
                }
            }
        }
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn avx512<const ROWS: usize, const STRIPS: usize>(&self, width: usize) {
        use std::arch::x86_64::{
            _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_set1_ps,
            _mm512_setzero_ps,
        };
        let last = width - (STRIPS - 1) * STRIP;
        let mask = if last == STRIP { u16::MAX } else { (1u16 << last) - 1 };
        let mut sums = [[_mm512_setzero_ps(); STRIPS]; ROWS];
        let (mut a, mut b) = (self.a, self.b);
        // SAFETY: the caller's promises; masked lanes are neither read nor written.
        unsafe {
            for _ in 0..self.depth {
                let mut values = [_mm512_setzero_ps(); STRIPS];
                for (strip, values) in values.iter_mut().enumerate() {
                    *values = _mm512_loadu_ps(b.add(strip * STRIP * self.depth));
                }
                for (row, sums) in sums.iter_mut().enumerate() {
                    let value = _mm512_set1_ps(*a.add(row * self.a_row));
                    for (sum, values) in sums.iter_mut().zip(values) {
                        *sum = _mm512_fmadd_ps(value, values, *sum);
                    }
                }
                a = a.wrapping_add(self.a_depth);
                b = b.wrapping_add(STRIP);
            }
            for (row, sums) in sums.into_iter().enumerate() {
                for (strip, mut sum) in sums.into_iter().enumerate() {
                    let c = self.c.add(row * self.c_row + strip * STRIP);
                    let mask = if strip + 1 < STRIPS { u16::MAX } else { mask };
                    if self.keep != 0.0 {
                        sum = _mm512_fmadd_ps(_mm512_set1_ps(self.keep), _mm512_maskz_loadu_ps(mask, c), sum);
                    }
                    _mm512_mask_storeu_ps(c, mask, sum);
                }
            }
        }
    }
}

/// Transposes 16 rows in squares of 8 by 8.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn pack_strip_avx2(rows: &[f32], columns: usize, strip: &mut [f32]) {
    use std::arch::x86_64::{
        _mm256_loadu_ps, _mm256_permute2f128_ps, _mm256_shuffle_ps, _mm256_storeu_ps, _mm256_unpackhi_ps,
        _mm256_unpacklo_ps,
    };
    let whole = columns / 8 * 8;
    for first in (0..whole).step_by(8) {
        for half in 0..2 {
            // SAFETY: 8 columns from `first` lie in each of the 16 rows, and 8 lines of the strip from `first` exist.
            unsafe {
                let row = |i: usize| _mm256_loadu_ps(rows.as_ptr().add((8 * half + i) * columns + first));
                let (r0, r1, r2, r3) = (row(0), row(1), row(2), row(3));
                let (r4, r5, r6, r7) = (row(4), row(5), row(6), row(7));
                let (a0, a1) = (_mm256_unpacklo_ps(r0, r1), _mm256_unpackhi_ps(r0, r1));
                let (a2, a3) = (_mm256_unpacklo_ps(r2, r3), _mm256_unpackhi_ps(r2, r3));
                let (a4, a5) = (_mm256_unpacklo_ps(r4, r5), _mm256_unpackhi_ps(r4, r5));
                let (a6, a7) = (_mm256_unpacklo_ps(r6, r7), _mm256_unpackhi_ps(r6, r7));
                let (b0, b1) = (_mm256_shuffle_ps::<0x44>(a0, a2), _mm256_shuffle_ps::<0xee>(a0, a2));
                let (b2, b3) = (_mm256_shuffle_ps::<0x44>(a1, a3), _mm256_shuffle_ps::<0xee>(a1, a3));
                let (b4, b5) = (_mm256_shuffle_ps::<0x44>(a4, a6), _mm256_shuffle_ps::<0xee>(a4, a6));
                let (b6, b7) = (_mm256_shuffle_ps::<0x44>(a5, a7), _mm256_shuffle_ps::<0xee>(a5, a7));
                let out = strip.as_mut_ptr().add(first * STRIP + 8 * half);
                _mm256_storeu_ps(out, _mm256_permute2f128_ps::<0x20>(b0, b4));
                _mm256_storeu_ps(out.add(STRIP), _mm256_permute2f128_ps::<0x20>(b1, b5));
                _mm256_storeu_ps(out.add(2 * STRIP), _mm256_permute2f128_ps::<0x20>(b2, b6));
                _mm256_storeu_ps(out.add(3 * STRIP), _mm256_permute2f128_ps::<0x20>(b3, b7));
                _mm256_storeu_ps(out.add(4 * STRIP), _mm256_permute2f128_ps::<0x31>(b0, b4));
                _mm256_storeu_ps(out.add(5 * STRIP), _mm256_permute2f128_ps::<0x31>(b1, b5));
                _mm256_storeu_ps(out.add(6 * STRIP), _mm256_permute2f128_ps::<0x31>(b2, b6));
                _mm256_storeu_ps(out.add(7 * STRIP), _mm256_permute2f128_ps::<0x31>(b3, b7));
            }
        }
    }
    for column in whole..columns {
        for row in 0..STRIP {
            strip[column * STRIP + row] = rows[row * columns + column];
        }
    }
}
