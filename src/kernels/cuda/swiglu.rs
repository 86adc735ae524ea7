//! The gated activation of the MLP: `silu(gate) * up` (Shazeer, 2002.05202, sec. 2).

use candle_core::Device;
use cudarc::driver::sys::CUstream;

use super::Error;
use super::checks::{expect_shape, expect_type};
use super::launch::{RawMatrix, launched, stream};
use super::memory::Matrix;

// SAFETY: these are the signatures of `swiglu.cu`.
unsafe extern "C" {
    fn trainer_swiglu(y: RawMatrix, gate: RawMatrix, up: RawMatrix, stream: CUstream) -> i32;
    fn trainer_swiglu_backward(
        d_gate: RawMatrix,
        d_up: RawMatrix,
        dy: RawMatrix,
        gate: RawMatrix,
        up: RawMatrix,
        activated: RawMatrix,
        stream: CUstream,
    ) -> i32;
}

fn expect_alike(kernel: &'static str, matrices: &[(&'static str, Matrix)], like: &Matrix) -> Result<(), Error> {
    for (name, m) in matrices {
        expect_shape(kernel, name, m, like.rows, like.cols)?;
        expect_type(kernel, name, m, like.dtype())?;
    }
    Ok(())
}

/// `y = silu(gate) * up`, value by value.
///
/// # Shapes
/// All of one float type and one shape `[N, I]`; `y` may lie on `gate` or `up`.
///
/// # Errors
/// If shapes or types differ.
pub fn swiglu(device: &Device, y: Matrix, gate: Matrix, up: Matrix) -> Result<(), Error> {
    const KERNEL: &str = "swiglu";
    expect_alike(KERNEL, &[("y", y), ("gate", gate), ("up", up)], &gate)?;
    // SAFETY: the arguments are views of live device memory whose shapes were checked above; the work is ordered by the
    // device's one compute stream.
    let code = unsafe { trainer_swiglu(y.into(), gate.into(), up.into(), stream(device)?) };
    launched(KERNEL, code)
}

/// The gradients of [`swiglu`] with respect to `gate` and `up`, and its result again where `activated` is given.
///
/// # Shapes
/// All of one float type and one shape `[N, I]`; any of the results may lie on any of `dy`, `gate` and `up`.
///
/// # Errors
/// If shapes or types differ.
///
/// # Equation
/// With `s = 1 / (1 + exp(-gate))`: `d_up = dy gate s`, `d_gate = dy up s (1 + gate (1 - s))`.
pub fn swiglu_backward(
    device: &Device,
    d_gate: Matrix,
    d_up: Matrix,
    dy: Matrix,
    gate: Matrix,
    up: Matrix,
    activated: Option<Matrix>,
) -> Result<(), Error> {
    const KERNEL: &str = "swiglu_backward";
    expect_alike(KERNEL, &[("d_gate", d_gate), ("d_up", d_up), ("dy", dy), ("gate", gate), ("up", up)], &gate)?;
    if let Some(activated) = activated {
        expect_alike(KERNEL, &[("activated", activated)], &gate)?;
    }
    // SAFETY: as in `swiglu`.
    let code = unsafe {
        trainer_swiglu_backward(
            d_gate.into(),
            d_up.into(),
            dy.into(),
            gate.into(),
            up.into(),
            RawMatrix::or_none(activated),
            stream(device)?,
        )
    };
    launched(KERNEL, code)
}
