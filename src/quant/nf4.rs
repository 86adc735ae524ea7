//! NF4 and FP4 as bitsandbytes defines them.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use rayon::prelude::*;

use super::dense;
use super::double_quant::{Maxima, Nested};
use super::multiply::RowSource;
use crate::config::settings::QuantType;
use crate::fs::Bytes;
use crate::kernels::cpu::activations::Order;
use crate::kernels::cpu::codebook::{self, BLOCK_LEN, Codebook};
use crate::kernels::cpu::packed_dot::{self, PackedRows};
use crate::kernels::cpu::{Activations, Level, TileMut};

/// Blocks that one task quantises: 4096 values each.
const BLOCKS_PER_TASK: usize = 64;

/// NF4 (2305.14314, appendix E), the values of bitsandbytes.
#[expect(clippy::excessive_precision, clippy::unreadable_literal, reason = "the digits as published")]
const NF4: [f32; 16] = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
];

/// FP4: a sign and 3 bits whose values are twelfths of the largest, 12.
const FP4_TWELFTHS: [f32; 8] = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0];

/// The code book of a type.
pub(crate) fn codebook_of(quant_type: QuantType) -> &'static Codebook {
    static BOOKS: OnceLock<[Codebook; 2]> = OnceLock::new();
    let books = BOOKS.get_or_init(|| {
        let fp4 = std::array::from_fn(|code| {
            let value = FP4_TWELFTHS[code % 8] / 12.0;
            if code > 8 { -value } else { value }
        });
        [Codebook::new(NF4), Codebook::new(fp4)]
    });
    match quant_type {
        QuantType::Nf4 => &books[0],
        QuantType::Fp4 => &books[1],
    }
}

/// A matrix `[rows, cols]` in blocks of 64 4-bit codes over its flattened values.
#[derive(Clone, Debug)]
pub struct Nf4Matrix {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) quant_type: QuantType,
    /// Value of each code.
    pub(super) values: [f32; 16],
    /// Two codes a byte, the first in the high nibble.
    pub(super) packed: Bytes,
    pub(super) maxima: Maxima,
}

impl Nf4Matrix {
    /// Quantises row-major f32 values; bitwise what bitsandbytes makes of them.
    ///
    /// # Panics
    /// If `values` are not `rows * cols` many.
    pub fn quantize(values: &[f32], rows: usize, cols: usize, quant_type: QuantType, double_quant: bool) -> Self {
        Self::quantize_from(values, rows, cols, quant_type, double_quant, |v| v)
    }

    /// As [`Nf4Matrix::quantize`], from any float type that widens to f32, such as `half::bf16::to_f32`.
    ///
    /// # Panics
    /// If `values` are not `rows * cols` many.
    pub fn quantize_from<T: Copy + Sync>(
        values: &[T],
        rows: usize,
        cols: usize,
        quant_type: QuantType,
        double_quant: bool,
        to_f32: impl Fn(T) -> f32 + Sync,
    ) -> Self {
        assert_eq!(values.len(), rows * cols, "values of a matrix [{rows}, {cols}]");
        let book = codebook_of(quant_type);
        let mut packed = vec![0u8; values.len().div_ceil(2)];
        let mut maxima = vec![0f32; values.len().div_ceil(BLOCK_LEN)];
        packed
            .par_chunks_mut(BLOCKS_PER_TASK * BLOCK_LEN / 2)
            .zip(maxima.par_chunks_mut(BLOCKS_PER_TASK))
            .zip(values.par_chunks(BLOCKS_PER_TASK * BLOCK_LEN))
            .for_each(|((packed, maxima), values)| {
                let mut widened = [0f32; BLOCKS_PER_TASK * BLOCK_LEN];
                for (wide, &value) in widened.iter_mut().zip(values) {
                    *wide = to_f32(value);
                }
                codebook::quantize(Level::best(), book, &widened[..values.len()], packed, maxima);
            });
        let maxima =
            if double_quant { Maxima::Nested(Nested::quantize(&maxima)) } else { Maxima::Plain(maxima.into()) };
        Self { rows, cols, quant_type, values: book.values, packed: Bytes::from(packed), maxima }
    }

    /// A matrix of random codes, spread about as those of normal weights are, with maxima of about 2.4 `deviation`s; a pure
    /// function of its arguments. For measuring: it takes no quantising.
    pub fn noise(rows: usize, cols: usize, deviation: f32, seed: u64) -> Self {
        // The levels are not symmetric: with all codes alike every weight had a mean of a fortieth of the maximum, which
        // products of thousands of inputs blow up until nothing else is left. One level for another makes it a thousandth.
        let centred = |code: u8| if code == 12 { 8 } else { code };
        let bytes = (rows * cols).div_ceil(2);
        let mut packed = vec![0u8; bytes];
        packed.par_chunks_mut(8).enumerate().for_each(|(index, out)| {
            let drawn = crate::rng::mix(seed ^ (index as u64)).to_le_bytes();
            for (out, drawn) in out.iter_mut().zip(drawn) {
                *out = centred(drawn >> 4) << 4 | centred(drawn & 15);
            }
        });
        let maximum = |block: u64| {
            let bits = crate::rng::mix(!seed ^ block);
            deviation * (2.0 + 0.8 * (bits >> 40) as f32 / (1u64 << 24) as f32)
        };
        let maxima: Vec<f32> = (0..(rows * cols).div_ceil(BLOCK_LEN) as u64).map(maximum).collect();
        let book = codebook_of(QuantType::Nf4);
        let maxima = Maxima::Nested(Nested::quantize(&maxima));
        Self { rows, cols, quant_type: QuantType::Nf4, values: book.values, packed: Bytes::from(packed), maxima }
    }

    /// NF4 or FP4.
    pub fn quant_type(&self) -> QuantType {
        self.quant_type
    }

    /// Whether the block maxima are quantised as well.
    pub fn is_double_quantized(&self) -> bool {
        matches!(self.maxima, Maxima::Nested(_))
    }

    /// The codes, two a byte, the first in the high nibble.
    pub fn packed(&self) -> &Bytes {
        &self.packed
    }

    /// The block maxima as floats, `[ceil(rows * cols / 64)]`, restored where they are quantised.
    pub fn absmax(&self) -> Arc<[f32]> {
        match &self.maxima {
            Maxima::Plain(values) => values.clone(),
            Maxima::Nested(_) => self.maxima.with(0..self.maxima.len(), |values| values.into()),
        }
    }

    /// Bytes of codes and maxima.
    pub fn size_bytes(&self) -> usize {
        self.packed.len() + self.maxima.size_bytes()
    }

    fn dequantize_flat(&self, start: usize, out: &mut [f32]) {
        let blocks = start / BLOCK_LEN..(start + out.len()).div_ceil(BLOCK_LEN);
        self.maxima.with(blocks, |absmax| {
            codebook::dequantize(Level::best(), &self.values, &self.packed, absmax, start, out);
        });
    }
}

impl RowSource for Nf4Matrix {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn column_step(&self) -> usize {
        BLOCK_LEN
    }

    fn stored_bytes(&self) -> usize {
        self.size_bytes()
    }

    fn dequantize(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        if columns.len() == self.cols {
            return self.dequantize_flat(rows.start * self.cols, out);
        }
        for (row, out) in rows.zip(out.chunks_exact_mut(columns.len())) {
            self.dequantize_flat(row * self.cols + columns.start, out);
        }
    }

    fn dot(&self, rows: Range<usize>, activations: &Activations, tile: &mut TileMut<'_>) {
        if activations.order() == Order::Plain {
            return dense::dot_dequantized(self, rows, activations, tile);
        }
        // An order exists only where rows end with a block.
        let values = rows.start * self.cols..rows.end * self.cols;
        let packed = &self.packed[values.start / 2..values.end / 2];
        self.maxima.with(values.start / BLOCK_LEN..values.end / BLOCK_LEN, |absmax| {
            let rows = PackedRows::Codes { packed, absmax, values: &self.values };
            packed_dot::dot(Level::best(), rows, activations, tile);
        });
    }

    fn activations(&self, x: &[f32], m: usize) -> Activations {
        match packed_dot::order_of_codes(Level::best(), self.cols) {
            Some(order) => Activations::ordered(Level::best(), order, false, x, m, self.cols),
            None => Activations::plain(x, m, self.cols),
        }
    }
}
