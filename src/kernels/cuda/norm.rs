//! Root-mean-square norms of rows and of heads.
//!
//! Legend: `N` tokens, `H` heads (1 for the norms of a layer), `d` columns of a head; R is the type of the residual
//! stream, T that of the activations: R is T or f32.

use candle_core::{DType, Device};

use super::checks::{column_splits, expect_array, expect_shape, expect_type};
use super::launch::{RawMatrix, RawStream, kernels, launched, stream};
use crate::device::{Error, Matrix, Pointer, argument};

kernels! {
    // Of `norm.cu`.
    fn trainer_rms_norm(
        y: RawMatrix,
        reciprocals: u64,
        x: RawMatrix,
        weight: u64,
        heads: i32,
        eps: f32,
        stream: RawStream,
    ) -> i32;
    fn trainer_rms_norm_backward(
        dx: RawMatrix,
        dy: RawMatrix,
        x: RawMatrix,
        weight: u64,
        reciprocals: u64,
        add: RawMatrix,
        heads: i32,
        stream: RawStream,
    ) -> i32;
    fn trainer_rms_norm_weight_gradient(
        grad: u64,
        dy: RawMatrix,
        x: RawMatrix,
        reciprocals: u64,
        workspace: u64,
        splits: i32,
        heads: i32,
        stream: RawStream,
    ) -> i32;
}

/// Checks what the three kernels have in common; `activation` is `y` or `dy`. Returns the columns of a head.
fn check(
    kernel: &'static str,
    name: &'static str,
    activation: &Matrix,
    x: &Matrix,
    reciprocals: Pointer,
    heads: usize,
) -> Result<usize, Error> {
    if heads == 0 || !x.cols.is_multiple_of(heads) || u32::try_from(x.rows * heads).is_err() {
        let fits = "heads that divide the columns, and less than 2^32 of them over all rows";
        return Err(argument(kernel, "heads", (x.rows, x.cols, heads), fits));
    }
    expect_shape(kernel, name, activation, x.rows, x.cols)?;
    if x.dtype() != activation.dtype() && x.dtype() != DType::F32 {
        return Err(argument(kernel, "x", x.dtype(), format!("F32 or {:?}", activation.dtype())));
    }
    expect_array(kernel, "reciprocals", reciprocals, DType::F32, x.rows * heads)?;
    Ok(x.cols / heads)
}

fn check_weight(kernel: &'static str, weight: &Matrix, d: usize) -> Result<(), Error> {
    expect_shape(kernel, "weight", weight, 1, d)?;
    expect_type(kernel, "weight", weight, DType::F32)
}

/// `y = x / sqrt(mean(x²) + eps) * weight` for each head of each row, and the reciprocal roots for backward.
///
/// # Shapes
/// `x`: R `[N, H d]`; `weight`: f32 `[1, d]`; `y`: T `[N, H d]`, which may lie on `x`; `reciprocals`: f32 `[N, H]`.
///
/// # Errors
/// If the shapes or types do not fit.
///
/// # Equation
/// Zhang and Sennrich (1910.07467), eq. 4.
pub fn rms_norm(
    device: &Device,
    y: Matrix,
    reciprocals: Pointer,
    x: Matrix,
    weight: Matrix,
    heads: usize,
    eps: f32,
) -> Result<(), Error> {
    const KERNEL: &str = "rms_norm";
    let d = check(KERNEL, "y", &y, &x, reciprocals, heads)?;
    check_weight(KERNEL, &weight, d)?;
    // SAFETY: the arguments are views of live device memory whose shapes were checked above; the work is ordered by the
    // device's one compute stream.
    let code = unsafe {
        trainer_rms_norm(y.into(), reciprocals.address, x.into(), weight.address, heads as i32, eps, stream(device)?)
    };
    launched(KERNEL, code)
}

/// The gradient of [`rms_norm`] with respect to `x`, plus `add`.
///
/// # Shapes
/// `dy`: T `[N, H d]`; `x`, `add`: R `[N, H d]`; `weight`: f32 `[1, d]`; `reciprocals`: f32 `[N, H]`; `dx`: R `[N, H
/// d]`, which may lie on `add`, on `x`, or, of one type, on `dy`.
///
/// # Errors
/// If the shapes or types do not fit.
///
/// # Equation
/// With `r` the reciprocal root: `dx = r (w dy - x r² mean(w dy x)) + add`.
#[expect(clippy::too_many_arguments, reason = "the operands of one kernel")]
pub fn rms_norm_backward(
    device: &Device,
    dx: Matrix,
    dy: Matrix,
    x: Matrix,
    weight: Matrix,
    reciprocals: Pointer,
    add: Option<Matrix>,
    heads: usize,
) -> Result<(), Error> {
    const KERNEL: &str = "rms_norm_backward";
    let d = check(KERNEL, "dy", &dy, &x, reciprocals, heads)?;
    check_weight(KERNEL, &weight, d)?;
    for (name, m) in [("dx", Some(dx)), ("add", add)] {
        let Some(m) = m else { continue };
        expect_shape(KERNEL, name, &m, x.rows, x.cols)?;
        expect_type(KERNEL, name, &m, x.dtype())?;
    }
    // SAFETY: as in `rms_norm`.
    let code = unsafe {
        trainer_rms_norm_backward(
            dx.into(),
            dy.into(),
            x.into(),
            weight.address,
            reciprocals.address,
            RawMatrix::or_none(add),
            heads as i32,
            stream(device)?,
        )
    };
    launched(KERNEL, code)
}

/// Length of the workspace, in f32, of [`rms_norm_weight_gradient`] for `x` of `rows` rows and `cols` columns.
pub fn rms_norm_workspace(rows: usize, cols: usize, heads: usize) -> usize {
    let d = cols / heads.max(1);
    column_splits(rows * heads, d) * d
}

/// Adds the gradient of [`rms_norm`] with respect to the weight. The order of the sums depends on the shapes alone.
///
/// # Shapes
/// `grad`: f32 `[d]`; `dy`: T `[N, H d]`; `x`: R `[N, H d]`; `reciprocals`: f32 `[N, H]`; `workspace`: f32 of
/// [`rms_norm_workspace`].
///
/// # Errors
/// If the shapes or types do not fit.
///
/// # Equation
/// With `r` the reciprocal roots: `dw += Σ dy x r` over rows and heads.
pub fn rms_norm_weight_gradient(
    device: &Device,
    grad: Pointer,
    dy: Matrix,
    x: Matrix,
    reciprocals: Pointer,
    workspace: Pointer,
    heads: usize,
) -> Result<(), Error> {
    const KERNEL: &str = "rms_norm_weight_gradient";
    let d = check(KERNEL, "dy", &dy, &x, reciprocals, heads)?;
    expect_array(KERNEL, "grad", grad, DType::F32, d)?;
    expect_array(KERNEL, "workspace", workspace, DType::F32, rms_norm_workspace(x.rows, x.cols, heads))?;
    let splits = column_splits(x.rows * heads, d);
    // SAFETY: as in `rms_norm`.
    let code = unsafe {
        trainer_rms_norm_weight_gradient(
            grad.address,
            dy.into(),
            x.into(),
            reciprocals.address,
            workspace.address,
            splits as i32,
            heads as i32,
            stream(device)?,
        )
    };
    launched(KERNEL, code)
}
