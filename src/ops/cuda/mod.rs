//! The operations on a GPU: the same equations as on the CPU, over the launchers of `kernels::cuda`.
//!
//! Activations are f16, bf16 or f32; sums are f32. Nothing here waits for the device but what returns numbers to the host:
//! the head's log-probabilities, and the checks of [`buffer`].

pub(crate) mod attention;
pub(crate) mod buffer;
pub(crate) mod head;
pub(crate) mod lanes;
pub(crate) mod linear;
pub(crate) mod norm;
pub(crate) mod paged_attention;
pub(crate) mod rope;
pub(crate) mod rows;
pub(crate) mod swiglu;

use candle_core::Tensor;

use super::{Error, shape_error};
use crate::device::{Matrix, matrix};

/// A vector as a single row.
fn row(x: &Tensor) -> Result<Matrix<'_>, Error> {
    let row = matrix(x)?;
    if row.rows != 1 {
        return Err(shape_error("a row", "x", x.dims(), "a vector"));
    }
    Ok(row)
}
