//! GGUF tensor types as stored.

use candle_core::quantized::GgmlDType;

use crate::fs::Bytes;

/// A matrix `[rows, cols]` in a GGUF block format.
#[derive(Clone, Debug)]
pub struct GgufMatrix {
    kind: GgmlDType,
    rows: usize,
    cols: usize,
    data: Bytes,
}

impl GgufMatrix {
    /// Takes the bytes as stored in the file.
    pub fn new(kind: GgmlDType, rows: usize, cols: usize, data: Bytes) -> Self {
        Self { kind, rows, cols, data }
    }
}
