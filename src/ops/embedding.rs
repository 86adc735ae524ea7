//! The input embedding: a row of the table for each token.

use candle_core::{DType, Device, Tensor};

use super::view::{change, dims2, view};
use super::{Error, shape_error};
use crate::kernels::cpu::vector;
use crate::quant::Weight;

/// The rows `tokens` of the table, on `device` and of type `dtype` (on the CPU always f32).
///
/// # Shapes
/// `tokens`: `[N]`; `table`: `[V, D]`, on the device or in host memory; returns `[N, D]`.
///
/// # Errors
/// If a token is outside the table.
#[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "device and type are for the GPU"))]
pub fn forward(tokens: &[u32], table: &Weight, device: &Device, dtype: DType) -> Result<Tensor, Error> {
    if let Some(&id) = tokens.iter().find(|&&id| id as usize >= table.rows()) {
        return Err(Error::Token { op: "embedding", id, vocabulary: table.rows() });
    }
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return super::cuda::rows::embed(tokens, table, device, dtype);
    }
    Ok(table.gather_rows(tokens)?)
}

/// Adds the gradient of [`forward`] to the table's gradient, token by token in the order of the batch.
///
/// # Shapes
/// `dy`: f32 `[N, D]`; `tokens`: `[N]`; `table_grad`: f32 `[V, D]`.
///
/// # Errors
/// If the shapes do not fit.
pub fn backward(dy: &Tensor, tokens: &[u32], table_grad: &Tensor) -> Result<(), Error> {
    const OP: &str = "embedding backward";
    let (n, d) = dims2(OP, "dy", dy)?;
    let (rows, cols) = dims2(OP, "table_grad", table_grad)?;
    if n != tokens.len() || cols != d {
        return Err(shape_error(OP, "dy", dy.dims(), [tokens.len(), cols]));
    }
    if let Some(&id) = tokens.iter().find(|&&id| id as usize >= rows) {
        return Err(Error::Token { op: OP, id, vocabulary: rows });
    }
    #[cfg(feature = "cuda")]
    if dy.device().is_cuda() {
        return super::cuda::rows::embed_backward(dy, tokens, table_grad);
    }
    let dy = dy.contiguous()?;
    let dy = view(OP, &dy)?;
    change(OP, table_grad, |grad| {
        for (&token, dy) in tokens.iter().zip(dy.chunks_exact(d)) {
            let row = token as usize * d;
            vector::add_scaled(&mut grad[row..row + d], 1.0, dy);
        }
    })
}
