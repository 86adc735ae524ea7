//! The input embedding: a row of the table for each token.

use candle_core::{DType, Device, Tensor};

use super::linear::Adapter;
use super::view::{change, dims2, view};
use super::{Error, shape_error};
use crate::kernels::cpu::matmul::{Matrix, Threads, multiply};
use crate::kernels::cpu::vector;
use crate::quant::Weight;

/// The rows `tokens` of the table, on `device` and of type `dtype` (on the CPU always f32).
///
/// # Shapes
/// `tokens`: `[N]`; `table`: `[V, D]`, on the device or in host memory; returns `[N, D]`.
///
/// # Errors
/// If a token is outside the table.
pub fn forward(tokens: &[u32], table: &Weight, device: &Device, dtype: DType) -> Result<Tensor, Error> {
    if let Some(&id) = tokens.iter().find(|&&id| id as usize >= table.rows()) {
        return Err(Error::Token { op: "embedding", id, vocabulary: table.rows() });
    }
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

/// Adds a low-rank update of the table to the rows that [`forward`] picked: `y += s · A[:, tokens]ᵀ Bᵀ`, as PEFT's
/// `lora.Embedding`, which has no dropout. On the CPU only.
///
/// # Shapes
/// `y`: f32 `[N, D]`; `tokens`: `[N]`; the update's `A`: `[r, V]`, `B`: `[D, r]`.
///
/// # Errors
/// If the shapes do not fit, or `y` is not on the CPU.
pub fn add_update(y: &Tensor, tokens: &[u32], update: &Adapter) -> Result<(), Error> {
    const OP: &str = "embedding";
    let (n, d) = dims2(OP, "y", y)?;
    let (low_rank, rank) = low_rank(OP, tokens, n, d, update)?;
    let b = view(OP, &update.b.value)?;
    let (low_rank, b) = (Matrix::new(&low_rank, n, rank), Matrix::new(&b, d, rank));
    change(OP, y, |y| multiply(y, d, 1.0, update.scaling, low_rank, b.t(), Threads::All))
}

/// Adds the gradients of [`add_update`]'s `A` and `B` to their buckets.
///
/// # Shapes
/// `dy`: f32 `[N, D]`; the others as in [`add_update`].
///
/// # Errors
/// If the shapes do not fit, or `dy` is not on the CPU.
pub fn backward_update(dy: &Tensor, tokens: &[u32], update: &Adapter) -> Result<(), Error> {
    const OP: &str = "embedding backward";
    let (n, d) = dims2(OP, "dy", dy)?;
    let (low_rank, rank) = low_rank(OP, tokens, n, d, update)?;
    let dy = dy.contiguous()?;
    let dy = view(OP, &dy)?;
    let dy = Matrix::new(&dy, n, d);
    if let Some(grad) = &update.b.grad {
        let low_rank = Matrix::new(&low_rank, n, rank);
        change(OP, grad, |grad| multiply(grad, rank, 1.0, update.scaling, dy.t(), low_rank, Threads::All))?;
    }
    let Some(grad) = &update.a.grad else { return Ok(()) };
    let mut d_low_rank = vec![0.0; n * rank];
    {
        let b = view(OP, &update.b.value)?;
        multiply(&mut d_low_rank, rank, 0.0, update.scaling, dy, Matrix::new(&b, d, rank), Threads::All);
    }
    let vocabulary = update.a.value.dims()[1];
    change(OP, grad, |grad| {
        for (&token, d_low_rank) in tokens.iter().zip(d_low_rank.chunks_exact(rank)) {
            for (k, d) in d_low_rank.iter().enumerate() {
                grad[k * vocabulary + token as usize] += d;
            }
        }
    })
}

/// The columns of `A` that the tokens pick, as rows: `[N, r]`, and `r`.
fn low_rank(
    op: &'static str,
    tokens: &[u32],
    n: usize,
    d: usize,
    update: &Adapter,
) -> Result<(Vec<f32>, usize), Error> {
    let (rank, vocabulary) = dims2(op, "lora_a", &update.a.value)?;
    if update.b.value.dims() != [d, rank] || n != tokens.len() {
        return Err(shape_error(op, "lora_b", update.b.value.dims(), [d, rank]));
    }
    if let Some(&id) = tokens.iter().find(|&&id| id as usize >= vocabulary) {
        return Err(Error::Token { op, id, vocabulary });
    }
    let a = view(op, &update.a.value)?;
    let columns = tokens.iter().flat_map(|&token| (0..rank).map(move |k| (k, token as usize)));
    Ok((columns.map(|(k, token)| a[k * vocabulary + token]).collect(), rank))
}
