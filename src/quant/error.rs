//! What can go wrong with a weight matrix.

use candle_core::quantized::GgmlDType;

/// An operation on a weight matrix that cannot be done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tensor or a slice of another shape than the operation takes.
    #[error("{operation}: got shape {got:?}, expected {expected}")]
    Shape {
        /// What was asked for, e.g. `forward`.
        operation: &'static str,
        /// The shape given.
        got: Vec<usize>,
        /// The shape that fits.
        expected: String,
    },
    /// Bytes of another length than the shape needs.
    #[error(
        "{kind} matrix [{rows}, {cols}] takes {expected} bytes, got {got}; the file is damaged or its shape is wrong"
    )]
    ByteLength {
        /// The type of the matrix.
        kind: String,
        /// Its rows.
        rows: usize,
        /// Its columns.
        cols: usize,
        /// Bytes that the shape needs.
        expected: usize,
        /// Bytes given.
        got: usize,
    },
    /// Rows that are no whole number of blocks.
    #[error("{kind:?} matrix with {cols} columns: a row must be a multiple of {block} values; store it as F16 or Q8_0")]
    RowBlocks {
        /// The GGUF type.
        kind: GgmlDType,
        /// Columns given.
        cols: usize,
        /// Values in a block.
        block: usize,
    },
    /// A GGUF type that holds no weights.
    #[error("GGUF type {kind:?} is no weight type; convert the tensor to F16, Q8_0 or Q4_K")]
    UnsupportedType {
        /// The GGUF type.
        kind: GgmlDType,
    },
    /// A row number beyond the matrix.
    #[error(
        "{operation}: row {id} was asked for, the matrix has {rows}; check that tokenizer and model belong together"
    )]
    RowOutOfRange {
        /// What was asked for.
        operation: &'static str,
        /// The row.
        id: usize,
        /// Rows that there are.
        rows: usize,
    },
    /// No kernel for the device of an argument.
    #[error(
        "{operation} of a {kind} weight has no kernel for {device}; run on the CPU, or build with `--features cuda`"
    )]
    NoKernel {
        /// What was asked for.
        operation: &'static str,
        /// The weight's kind.
        kind: String,
        /// The device of the argument.
        device: String,
    },
    /// A tensor of a type that is no float.
    #[error("{operation}: got a tensor of {got:?}, expected f32, bf16 or f16")]
    NotFloat {
        /// What was asked for.
        operation: &'static str,
        /// The type given.
        got: candle_core::DType,
    },
    /// A part of a bitsandbytes checkpoint that is missing or does not fit.
    #[error("bitsandbytes weight: `{part}` {problem}")]
    Checkpoint {
        /// Suffix of the tensor's name.
        part: &'static str,
        /// What is wrong with it, and what to do.
        problem: String,
    },
    /// Lent bytes that are still held after their loan.
    #[error("the bytes of a {kind} matrix are still held")]
    Shared {
        /// The storage's name.
        kind: String,
    },
    /// A kernel of the GPU failed.
    #[error(transparent)]
    Cuda(#[from] crate::device::Error),
    /// The tensor library failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}
