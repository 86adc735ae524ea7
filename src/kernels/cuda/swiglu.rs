//! The gated activation of the MLP: `silu(gate) * up` (Shazeer, 2002.05202, sec. 2).

use candle_core::Device;

use super::checks::{expect_shape, expect_type};
use super::launch::{RawMatrix, RawStream, kernels, launched, stream};
use crate::device::{Error, Matrix, argument};

kernels! {
    // Of `swiglu.cu`.
    fn trainer_swiglu(y: RawMatrix, gate: RawMatrix, up: RawMatrix, stream: RawStream) -> i32;
    fn trainer_swiglu_backward(
        d_gate: RawMatrix,
        d_up: RawMatrix,
        dy: RawMatrix,
        gate: RawMatrix,
        up: RawMatrix,
        activated: RawMatrix,
        d_low: RawMatrix,
        a: RawMatrix,
        stream: RawStream,
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

/// Most ranks of [`swiglu_backward`]'s `low`.
pub const MOST_SHARE_RANKS: usize = 64;

/// The gradients of [`swiglu`] with respect to `gate` and `up`, and its result again where `activated` is given. With
/// `low = (d_low, a)` the gradient of `y` is `dy + d_low a`, summed in f32: an adapter's share of it.
///
/// # Shapes
/// All of one float type and one shape `[N, I]`; any of the results may lie on any of `dy`, `gate` and `up`. `d_low`:
/// `[N, R]`, `a`: `[R, I]`, of the same type, R a multiple of 8 up to 64; no result lies on them.
///
/// # Errors
/// If shapes or types differ, or R is not such a number.
///
/// # Equation
/// With `s = 1 / (1 + exp(-gate))`: `d_up = dy gate s`, `d_gate = dy up s (1 + gate (1 - s))`.
#[expect(clippy::too_many_arguments, reason = "the operands of one kernel")]
pub fn swiglu_backward(
    device: &Device,
    d_gate: Matrix,
    d_up: Matrix,
    dy: Matrix,
    gate: Matrix,
    up: Matrix,
    activated: Option<Matrix>,
    low: Option<(Matrix, Matrix)>,
) -> Result<(), Error> {
    const KERNEL: &str = "swiglu_backward";
    expect_alike(KERNEL, &[("d_gate", d_gate), ("d_up", d_up), ("dy", dy), ("gate", gate), ("up", up)], &gate)?;
    if let Some(activated) = activated {
        expect_alike(KERNEL, &[("activated", activated)], &gate)?;
    }
    if let Some((d_low, a)) = low {
        let ranks = d_low.cols;
        if ranks == 0 || ranks > MOST_SHARE_RANKS || !ranks.is_multiple_of(8) {
            return Err(argument(
                KERNEL,
                "d_low",
                [d_low.rows, ranks],
                format!("8, 16, .. {MOST_SHARE_RANKS} columns"),
            ));
        }
        expect_shape(KERNEL, "d_low", &d_low, gate.rows, ranks)?;
        expect_shape(KERNEL, "a", &a, ranks, gate.cols)?;
        expect_type(KERNEL, "d_low", &d_low, gate.dtype())?;
        expect_type(KERNEL, "a", &a, gate.dtype())?;
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
            RawMatrix::or_none(low.map(|(d_low, _)| d_low)),
            RawMatrix::or_none(low.map(|(_, a)| a)),
            stream(device)?,
        )
    };
    launched(KERNEL, code)
}
