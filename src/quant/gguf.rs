//! GGUF tensor types as stored.

use std::ops::Range;

use candle_core::quantized::GgmlDType;
use half::f16;
use rayon::prelude::*;

use super::multiply::RowSource;
use super::{Error, dense};
use crate::fs::Bytes;
use crate::kernels::cpu::activations::Order;
use crate::kernels::cpu::packed_dot::{self, PackedRows};
use crate::kernels::cpu::{Activations, BlockFormat, Level, TileMut, blocks};

/// A matrix `[rows, cols]` in a GGUF block format, its bytes as they lie in the file (no alignment is assumed).
#[derive(Clone, Debug)]
pub struct GgufMatrix {
    kind: GgmlDType,
    format: BlockFormat,
    rows: usize,
    cols: usize,
    data: Bytes,
}

impl GgufMatrix {
    /// Takes the bytes as stored in the file.
    ///
    /// # Errors
    /// If `kind` holds no weights, a row is no whole number of blocks, or `data` has not the length of the shape.
    pub fn new(kind: GgmlDType, rows: usize, cols: usize, data: Bytes) -> Result<Self, Error> {
        let format = block_format(kind)?;
        let row = format.bytes_of(cols).ok_or(Error::RowBlocks { kind, cols, block: format.block_len() })?;
        if row.checked_mul(rows) != Some(data.len()) {
            let expected = row.saturating_mul(rows);
            return Err(Error::ByteLength { kind: format!("{kind:?}"), rows, cols, expected, got: data.len() });
        }
        Ok(Self { kind, format, rows, cols, data })
    }

    /// A matrix of random codes, spread evenly, whose values have a deviation of about `deviation` and a mean of about 0; a pure
    /// function of its arguments. For measuring: it takes no quantising.
    ///
    /// # Errors
    /// If `kind` is no type of packed blocks, or a row is no whole number of them.
    pub fn noise(kind: GgmlDType, rows: usize, cols: usize, deviation: f32, seed: u64) -> Result<Self, Error> {
        /// Blocks from which the deviation is taken.
        const SAMPLE: usize = 64;
        let format = block_format(kind)?;
        let Some((at, minimum)) = scales_of(format) else { return Err(Error::UnsupportedType { kind }) };
        let row = format.bytes_of(cols).ok_or(Error::RowBlocks { kind, cols, block: format.block_len() })?;
        let fill = |bytes: &mut [u8], scale: f32| {
            bytes.par_chunks_mut(8).enumerate().for_each(|(index, out)| {
                let drawn = crate::rng::mix(seed ^ (index as u64)).to_le_bytes();
                out.copy_from_slice(&drawn[..out.len()]);
            });
            bytes.par_chunks_mut(format.block_bytes()).enumerate().for_each(|(index, block)| {
                // Where codes are not symmetric, the signs of scales are.
                let is_turned = crate::rng::mix(!seed ^ index as u64) & 1 == 1;
                let scale = if is_turned { -scale } else { scale };
                block[at..at + 2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
                if let Some((at, factor)) = minimum {
                    block[at..at + 2].copy_from_slice(&f16::from_f32(factor * scale).to_le_bytes());
                }
            });
        };
        let mut sample = vec![0u8; SAMPLE * format.block_bytes()];
        let mut values = vec![0f32; SAMPLE * format.block_len()];
        fill(&mut sample, 1.0);
        blocks::dequantize(Level::best(), format, &sample, &mut values);
        let square = values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32;
        let mut data = vec![0u8; row * rows];
        fill(&mut data, deviation / square.sqrt());
        Self::new(kind, rows, cols, data.into())
    }

    /// Its GGUF type.
    pub fn kind(&self) -> GgmlDType {
        self.kind
    }

    /// Its bytes.
    pub fn data(&self) -> &Bytes {
        &self.data
    }

    fn row_bytes(&self) -> usize {
        self.cols / self.format.block_len() * self.format.block_bytes()
    }
}

fn block_format(kind: GgmlDType) -> Result<BlockFormat, Error> {
    Ok(match kind {
        GgmlDType::F32 => BlockFormat::F32,
        GgmlDType::F16 => BlockFormat::F16,
        GgmlDType::BF16 => BlockFormat::Bf16,
        GgmlDType::Q4_0 => BlockFormat::Q4_0,
        GgmlDType::Q4_1 => BlockFormat::Q4_1,
        GgmlDType::Q5_0 => BlockFormat::Q5_0,
        GgmlDType::Q5_1 => BlockFormat::Q5_1,
        GgmlDType::Q8_0 => BlockFormat::Q8_0,
        GgmlDType::Q2K => BlockFormat::Q2K,
        GgmlDType::Q3K => BlockFormat::Q3K,
        GgmlDType::Q4K => BlockFormat::Q4K,
        GgmlDType::Q5K => BlockFormat::Q5K,
        GgmlDType::Q6K => BlockFormat::Q6K,
        GgmlDType::Q8_1 | GgmlDType::Q8K => return Err(Error::UnsupportedType { kind }),
    })
}

/// Where a block has its f16 scale, and where its f16 minimum and how many times the scale that is for a mean of 0.
fn scales_of(format: BlockFormat) -> Option<(usize, Option<(usize, f32)>)> {
    Some(match format {
        BlockFormat::F32 | BlockFormat::F16 | BlockFormat::Bf16 => return None,
        BlockFormat::Q4_0 | BlockFormat::Q5_0 | BlockFormat::Q8_0 => (0, None),
        BlockFormat::Q4_1 => (0, Some((2, -7.5))),
        BlockFormat::Q5_1 => (0, Some((2, -15.5))),
        BlockFormat::Q2K => (80, Some((82, 1.5))),
        BlockFormat::Q3K => (108, None),
        BlockFormat::Q4K => (0, Some((2, 7.5))),
        BlockFormat::Q5K => (0, Some((2, 15.5))),
        BlockFormat::Q6K => (208, None),
    })
}

impl RowSource for GgufMatrix {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn column_step(&self) -> usize {
        self.format.block_len()
    }

    fn stored_bytes(&self) -> usize {
        self.data.len()
    }

    fn dequantize(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        if rows.is_empty() || columns.is_empty() {
            return;
        }
        let first = columns.start / self.format.block_len() * self.format.block_bytes();
        let stored = &self.data[rows.start * self.row_bytes() + first..];
        blocks::dequantize_rows(Level::best(), self.format, stored, self.row_bytes(), columns.len(), out);
    }

    fn dot(&self, rows: Range<usize>, activations: &Activations, tile: &mut TileMut<'_>) {
        if activations.order() == Order::Plain {
            return dense::dot_dequantized(self, rows, activations, tile);
        }
        let stored = &self.data[rows.start * self.row_bytes()..rows.end * self.row_bytes()];
        packed_dot::dot(Level::best(), PackedRows::Blocks(self.format, stored), activations, tile);
    }

    fn activations(&self, x: &[f32], m: usize) -> Activations {
        match packed_dot::order_of_blocks(Level::best(), self.format, self.cols) {
            Some(order) => {
                let has_minimum = packed_dot::has_minimum(self.format);
                Activations::ordered(Level::best(), order, has_minimum, x, m, self.cols)
            }
            None => Activations::plain(x, m, self.cols),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::Weight;

    #[test]
    fn random_blocks_have_the_deviation_that_was_asked_for() {
        for kind in [
            GgmlDType::Q4_0,
            GgmlDType::Q4_1,
            GgmlDType::Q5_0,
            GgmlDType::Q5_1,
            GgmlDType::Q8_0,
            GgmlDType::Q2K,
            GgmlDType::Q3K,
            GgmlDType::Q4K,
            GgmlDType::Q5K,
            GgmlDType::Q6K,
        ] {
            let matrix = GgufMatrix::noise(kind, 64, 1024, 0.02, 3).unwrap();
            assert_eq!(matrix.data()[..], GgufMatrix::noise(kind, 64, 1024, 0.02, 3).unwrap().data()[..]);
            assert_ne!(matrix.data()[..], GgufMatrix::noise(kind, 64, 1024, 0.02, 4).unwrap().data()[..]);
            let values = Weight::from(matrix).dequantize().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let count = values.len() as f32;
            let mean = values.iter().sum::<f32>() / count;
            let deviation = (values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / count).sqrt();
            assert!((0.017..0.023).contains(&deviation) && mean.abs() < 1e-3, "{kind:?}: {mean} +- {deviation}");
        }
        assert!(GgufMatrix::noise(GgmlDType::F16, 2, 64, 1.0, 0).is_err());
        assert!(GgufMatrix::noise(GgmlDType::Q4K, 2, 128, 1.0, 0).is_err());
    }
}
