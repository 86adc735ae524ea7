//! Activations with room behind each row.
//!
//! On a GPU an adapter rides in the base multiply: `y = [x | x Aᵀ] [W | s B]ᵀ`. The operation that makes `x` leaves room
//! for the columns `x Aᵀ`, so that nothing is copied. On the CPU there is no room and no difference.

use candle_core::Tensor;

use super::Error;
use super::view::dims2;

/// `[N, D]` inside a buffer `[N, D + room]`.
#[derive(Clone, Debug)]
pub struct Wide {
    buffer: Tensor,
    cols: usize,
}

impl Wide {
    /// Activations without room.
    ///
    /// # Shapes
    /// `x`: `[N, D]`.
    ///
    /// # Errors
    /// If `x` is no matrix.
    pub fn plain(x: Tensor) -> Result<Self, Error> {
        let (_, cols) = dims2("activations", "x", &x)?;
        Ok(Self { buffer: x, cols })
    }

    /// Undefined values on a GPU with `room` more columns.
    pub(super) fn empty(
        device: &candle_core::Device,
        (rows, cols): (usize, usize),
        room: usize,
        dtype: candle_core::DType,
    ) -> Result<Self, Error> {
        Ok(Self { buffer: crate::device::empty(device, (rows, cols + room), dtype)?, cols })
    }

    /// The first `cols` columns of a buffer.
    ///
    /// # Errors
    /// If it is no matrix of as many columns.
    pub fn with_cols(buffer: Tensor, cols: usize) -> Result<Self, Error> {
        match buffer.dims() {
            &[_, all] if all >= cols => Ok(Self { buffer, cols }),
            dims => Err(super::shape_error("activations", "buffer", dims, format!("[N, at least {cols}]"))),
        }
    }

    /// The whole buffer.
    pub fn into_buffer(self) -> Tensor {
        self.buffer
    }

    /// `N`.
    pub fn rows(&self) -> usize {
        self.buffer.dims()[0]
    }

    /// `D`.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The whole buffer: `[N, D + room]`.
    pub fn buffer(&self) -> &Tensor {
        &self.buffer
    }

    /// The activations alone, sharing the buffer's memory: `[N, D]`.
    ///
    /// # Errors
    /// Never, unless the tensor library fails.
    pub fn values(&self) -> Result<Tensor, Error> {
        if self.buffer.dims()[1] == self.cols {
            return Ok(self.buffer.clone());
        }
        Ok(self.buffer.narrow(1, 0, self.cols)?)
    }
}
