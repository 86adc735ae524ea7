//! GGUF tensor types as stored.

use std::ops::Range;

use candle_core::quantized::GgmlDType;

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
