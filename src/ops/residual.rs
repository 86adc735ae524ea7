//! The residual stream: f32 sums, made in place.

use candle_core::Tensor;
use rayon::prelude::*;

use super::view::{change, view};
use super::{Error, shape_error};
use crate::kernels::cpu::vector;

/// Values one task works on.
const CHUNK: usize = 1 << 14;

/// `branch + stream`, in the memory of `branch`. Its own gradient is the identity for both.
///
/// # Shapes
/// Both f32 of one shape, which is returned.
///
/// # Errors
/// If the shapes differ.
pub fn add(branch: Tensor, stream: &Tensor) -> Result<Tensor, Error> {
    const OP: &str = "residual add";
    if branch.dims() != stream.dims() {
        return Err(shape_error(OP, "stream", stream.dims(), branch.dims()));
    }
    let values = view(OP, stream)?;
    change(OP, &branch, |branch| {
        branch.par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK)).for_each(|(b, s)| vector::add_scaled(b, 1.0, s));
    })?;
    Ok(branch)
}
