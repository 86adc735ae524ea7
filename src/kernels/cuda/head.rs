//! Log-probability, entropy and gradient of tokens from pieces of their logits; rows of 8-bit codes.
//!
//! The logits of a vocabulary are never held at once: [`head_start`], [`head_forward_chunk`] for each piece,
//! [`head_finish`]; then [`head_backward_chunk`] for each piece, made again. Legend: `R` rows that predict a token,
//! `V` vocabulary.

use candle_core::{DType, Device};

use super::checks::expect_array;
use super::launch::{RawMatrix, RawStream, address_or_none, kernels, launched, stream};
use crate::device::{Error, Matrix, Pointer, argument};

kernels! {
    // Of `head.cu`.
    fn trainer_head_start(state: u64, rows: i64, stream: RawStream) -> i32;
    fn trainer_head_forward_chunk(state: u64, logits: RawMatrix, first: i64, targets: u64, stream: RawStream) -> i32;
    fn trainer_head_finish(
        state: u64,
        rows: i64,
        logprobs: u64,
        entropies: u64,
        log_sums: u64,
        is_argmax: u64,
        stream: RawStream,
    ) -> i32;
    fn trainer_head_backward_chunk(
        d_logits: RawMatrix,
        logits: RawMatrix,
        first: i64,
        targets: u64,
        log_sums: u64,
        entropies: u64,
        d_logprobs: u64,
        d_entropies: u64,
        scale: f32,
        stream: RawStream,
    ) -> i32;
}

/// The running sums of all rows over the pieces of the vocabulary.
#[derive(Clone, Copy, Debug)]
pub struct HeadState<'b> {
    buffer: Pointer<'b>,
    rows: usize,
}

impl<'b> HeadState<'b> {
    /// Length of the buffer for `rows` rows, in f64.
    pub const fn buffer_len(rows: usize) -> usize {
        3 * rows
    }

    /// The state of `rows` rows in a buffer.
    ///
    /// # Shapes
    /// `buffer`: f64 `[3 R]`.
    ///
    /// # Errors
    /// If the buffer is too short.
    pub fn new(buffer: Pointer<'b>, rows: usize) -> Result<Self, Error> {
        expect_array("head state", "buffer", buffer, DType::F64, Self::buffer_len(rows))?;
        Ok(Self { buffer, rows })
    }
}

fn expect_logits(kernel: &'static str, logits: &Matrix, rows: usize, cols: usize) -> Result<(), Error> {
    if logits.dtype() == DType::F32 && (logits.rows, logits.cols) == (rows, cols) {
        return Ok(());
    }
    let got = format!("{:?} [{}, {}]", logits.dtype(), logits.rows, logits.cols);
    Err(argument(kernel, "logits", got, format!("F32 [{rows}, {cols}]")))
}

/// Sets all rows to an empty vocabulary.
///
/// # Errors
/// If the launch fails.
pub fn head_start(device: &Device, state: HeadState) -> Result<(), Error> {
    // SAFETY: the buffer is a view of live device memory whose length `HeadState::new` checked; the work is ordered by
    // the device's one compute stream.
    let code = unsafe { trainer_head_start(state.buffer.address, state.rows as i64, stream(device)?) };
    launched("head_start", code)
}

/// Adds the logits of tokens `first .. first + width` to the running sums.
///
/// # Shapes
/// `logits`: f32 `[R, width]`, divided by the temperature; `targets`: u32 `[R]`.
///
/// # Errors
/// If the shapes do not fit.
pub fn head_forward_chunk(
    device: &Device,
    state: HeadState,
    logits: Matrix,
    first: usize,
    targets: Pointer,
) -> Result<(), Error> {
    const KERNEL: &str = "head_forward_chunk";
    expect_logits(KERNEL, &logits, state.rows, logits.cols)?;
    expect_array(KERNEL, "targets", targets, DType::U32, state.rows)?;
    // SAFETY: all addresses are views of live device memory of the lengths checked above and in `HeadState::new`; the
    // work is ordered by the device's one compute stream.
    let code = unsafe {
        trainer_head_forward_chunk(state.buffer.address, logits.into(), first as i64, targets.address, stream(device)?)
    };
    launched(KERNEL, code)
}

/// What the head says about each row's target, once all pieces were added.
///
/// # Shapes
/// `logprobs`, `entropies`, `log_sums`: f32 `[R]`, in nats; `is_argmax`: u8 `[R]`.
///
/// # Errors
/// If an array is too short.
pub fn head_finish(
    device: &Device,
    state: HeadState,
    logprobs: Pointer,
    entropies: Pointer,
    log_sums: Pointer,
    is_argmax: Pointer,
) -> Result<(), Error> {
    const KERNEL: &str = "head_finish";
    let rows = state.rows;
    expect_array(KERNEL, "logprobs", logprobs, DType::F32, rows)?;
    expect_array(KERNEL, "entropies", entropies, DType::F32, rows)?;
    expect_array(KERNEL, "log_sums", log_sums, DType::F32, rows)?;
    expect_array(KERNEL, "is_argmax", is_argmax, DType::U8, rows)?;
    // SAFETY: all addresses are views of live device memory of the lengths checked above and in `HeadState::new`; the
    // work is ordered by the device's one compute stream.
    let code = unsafe {
        trainer_head_finish(
            state.buffer.address,
            rows as i64,
            logprobs.address,
            entropies.address,
            log_sums.address,
            is_argmax.address,
            stream(device)?,
        )
    };
    launched(KERNEL, code)
}

/// The gradient with respect to the logits of tokens `first .. first + width`, times `scale`.
///
/// # Shapes
/// `logits`: f32 `[R, width]`, divided by the temperature; `d_logits`: f32, f16 or bf16 `[R, width]`, in f32 also
/// `logits` itself; `targets`: u32 `[R]`; `log_sums`, `entropies`: f32 `[R]`, of [`head_finish`]; `d_logprobs`,
/// `d_entropies` (left out: zeros): f32 `[R]`.
///
/// # Errors
/// If the shapes do not fit.
///
/// # Equation
/// `d_logits = scale * (d_logprob * (1[target] - p) - d_entropy * p * (log p + entropy))`.
#[expect(clippy::too_many_arguments, reason = "the operands of the head's backward")]
pub fn head_backward_chunk(
    device: &Device,
    d_logits: Matrix,
    logits: Matrix,
    first: usize,
    targets: Pointer,
    log_sums: Pointer,
    entropies: Pointer,
    d_logprobs: Pointer,
    d_entropies: Option<Pointer>,
    scale: f32,
) -> Result<(), Error> {
    const KERNEL: &str = "head_backward_chunk";
    let rows = d_logits.rows;
    expect_logits(KERNEL, &logits, rows, d_logits.cols)?;
    expect_array(KERNEL, "targets", targets, DType::U32, rows)?;
    expect_array(KERNEL, "log_sums", log_sums, DType::F32, rows)?;
    expect_array(KERNEL, "entropies", entropies, DType::F32, rows)?;
    expect_array(KERNEL, "d_logprobs", d_logprobs, DType::F32, rows)?;
    if let Some(d_entropies) = d_entropies {
        expect_array(KERNEL, "d_entropies", d_entropies, DType::F32, rows)?;
    }
    // SAFETY: all addresses are views of live device memory of the shapes and lengths checked above; where `d_logits`
    // is `logits` each thread writes only what it alone has read. The device's one compute stream orders the work.
    let code = unsafe {
        trainer_head_backward_chunk(
            d_logits.into(),
            logits.into(),
            first as i64,
            targets.address,
            log_sums.address,
            entropies.address,
            d_logprobs.address,
            address_or_none(d_entropies),
            scale,
            stream(device)?,
        )
    };
    launched(KERNEL, code)
}
