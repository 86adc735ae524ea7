//! One type over all storages of a weight matrix.

use std::ops::Range;

use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use rayon::prelude::*;

use super::dense::{DenseRows, DenseValues};
use super::multiply::{self, RowSource};
use super::{Error, GgufMatrix, Nf4Matrix};
use crate::config::settings::QuantType;

/// Values that one task dequantises.
const VALUES_PER_TASK: usize = 1 << 16;

/// A weight matrix `[N, K]`.
#[derive(Clone, Debug)]
pub enum Weight {
    /// f32, bf16 or f16.
    Dense(Tensor),
    /// 4 bits, bitsandbytes' layout.
    Nf4(Nf4Matrix),
    /// A GGUF tensor as stored.
    Gguf(GgufMatrix),
    /// Where a GPU can read it.
    Device(super::DeviceMatrix),
}

impl From<Nf4Matrix> for Weight {
    fn from(matrix: Nf4Matrix) -> Self {
        Self::Nf4(matrix)
    }
}

impl From<GgufMatrix> for Weight {
    fn from(matrix: GgufMatrix) -> Self {
        Self::Gguf(matrix)
    }
}

impl Weight {
    /// A dense weight.
    ///
    /// # Errors
    /// If `tensor` is no matrix of f32, bf16 or f16.
    pub fn dense(tensor: &Tensor) -> Result<Self, Error> {
        if tensor.rank() != 2 {
            return Err(Error::Shape {
                operation: "Weight::dense",
                got: tensor.dims().to_vec(),
                expected: "a matrix [N, K]".into(),
            });
        }
        float_type("Weight::dense", tensor)?;
        Ok(Self::Dense(tensor.contiguous()?))
    }

    /// Rows (outputs), `N`.
    pub fn rows(&self) -> usize {
        match self {
            Self::Dense(tensor) => tensor.dims()[0],
            Self::Nf4(matrix) => matrix.rows(),
            Self::Gguf(matrix) => matrix.rows(),
            Self::Device(matrix) => matrix.rows(),
        }
    }

    /// Columns (inputs), `K`.
    pub fn cols(&self) -> usize {
        match self {
            Self::Dense(tensor) => tensor.dims()[1],
            Self::Nf4(matrix) => matrix.cols(),
            Self::Gguf(matrix) => matrix.cols(),
            Self::Device(matrix) => matrix.cols(),
        }
    }

    /// Bytes that the stored matrix takes.
    pub fn size_bytes(&self) -> usize {
        match self {
            Self::Dense(tensor) => tensor.elem_count() * tensor.dtype().size_in_bytes(),
            Self::Nf4(matrix) => matrix.size_bytes(),
            Self::Gguf(matrix) => matrix.stored_bytes(),
            Self::Device(matrix) => matrix.size_bytes(),
        }
    }

    /// The storage's name: `f32`, `bf16`, `f16`, `nf4`, `nf4 double quantised`, `fp4`, ..., `Q4_K`.
    pub fn kind_name(&self) -> String {
        match self {
            Self::Dense(tensor) => tensor.dtype().as_str().into(),
            Self::Nf4(matrix) => {
                let name = if matrix.quant_type() == QuantType::Nf4 { "nf4" } else { "fp4" };
                if matrix.is_double_quantized() { format!("{name} double quantised") } else { name.into() }
            }
            Self::Gguf(matrix) => format!("{:?}", matrix.kind()),
            Self::Device(matrix) => matrix.kind_name().into(),
        }
    }

    /// All values.
    ///
    /// # Shapes
    /// Returns f32 `[N, K]` on the CPU.
    ///
    /// # Errors
    /// If the weight is not on the CPU.
    pub fn dequantize(&self) -> Result<Tensor, Error> {
        let mut values = vec![0f32; self.rows() * self.cols()];
        self.dequantize_rows_into(0..self.rows(), &mut values)?;
        Ok(Tensor::from_vec(values, (self.rows(), self.cols()), &Device::Cpu)?)
    }

    /// The values of some rows, row-major.
    ///
    /// # Shapes
    /// `out`: f32 `[rows.len(), K]`.
    ///
    /// # Errors
    /// If a row does not exist, `out` has another length, or the weight is not on the CPU.
    pub fn dequantize_rows_into(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), Error> {
        let (n, k) = (self.rows(), self.cols());
        if rows.end > n {
            return Err(Error::RowOutOfRange { operation: "dequantize_rows_into", id: rows.end - 1, rows: n });
        }
        expect_values("dequantize_rows_into", out.len(), rows.len(), k)?;
        let height = (VALUES_PER_TASK / k.max(1)).max(1);
        self.with_rows("dequantize_rows_into", |source| {
            out.par_chunks_mut((height * k).max(1)).enumerate().for_each(|(index, out)| {
                let first = rows.start + index * height;
                source.dequantize(first..rows.end.min(first + height), 0..k, out);
            });
        })
    }

    /// Embedding lookup.
    ///
    /// # Shapes
    /// `ids`: `[T]`; returns f32 `[T, K]`.
    ///
    /// # Errors
    /// If an id is not below `N`, or the weight is not on the CPU.
    pub fn gather_rows(&self, ids: &[u32]) -> Result<Tensor, Error> {
        let (n, k) = (self.rows(), self.cols());
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= n) {
            return Err(Error::RowOutOfRange { operation: "gather_rows", id: id as usize, rows: n });
        }
        let mut values = vec![0f32; ids.len() * k];
        self.with_rows("gather_rows", |source| {
            for (&id, out) in ids.iter().zip(values.chunks_exact_mut(k.max(1))) {
                source.dequantize(id as usize..id as usize + 1, 0..k, out);
            }
        })?;
        Ok(Tensor::from_vec(values, (ids.len(), k), &Device::Cpu)?)
    }

    /// `y = x W^T`, computed and summed in f32.
    ///
    /// # Shapes
    /// `x`: f32, bf16 or f16 `[M, K]`, any strides; returns `[M, N]` of the same type.
    ///
    /// # Errors
    /// If `x` has another shape or type, or no kernel exists for its device.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor, Error> {
        self.product("forward", x, self.cols(), self.rows(), Self::forward_slice)
    }

    /// The gradient of the input, `dx = dy W`, computed and summed in f32.
    ///
    /// # Shapes
    /// `dy`: f32, bf16 or f16 `[M, N]`, any strides; returns `[M, K]` of the same type.
    ///
    /// # Errors
    /// If `dy` has another shape or type, or no kernel exists for its device.
    pub fn backward_input(&self, dy: &Tensor) -> Result<Tensor, Error> {
        self.product("backward_input", dy, self.rows(), self.cols(), Self::backward_input_slice)
    }

    /// `y = x W^T` on the CPU.
    ///
    /// # Shapes
    /// `x`: `[m, K]`; `y`: `[m, N]`, overwritten.
    ///
    /// # Errors
    /// If a slice has another length, or the weight is not on the CPU.
    pub fn forward_slice(&self, x: &[f32], m: usize, y: &mut [f32]) -> Result<(), Error> {
        expect_values("forward x", x.len(), m, self.cols())?;
        expect_values("forward y", y.len(), m, self.rows())?;
        self.with_rows("forward", |source| multiply::forward(source, x, m, y))
    }

    /// `dx = dy W` on the CPU.
    ///
    /// # Shapes
    /// `dy`: `[m, N]`; `dx`: `[m, K]`, overwritten.
    ///
    /// # Errors
    /// If a slice has another length, or the weight is not on the CPU.
    pub fn backward_input_slice(&self, dy: &[f32], m: usize, dx: &mut [f32]) -> Result<(), Error> {
        expect_values("backward_input dy", dy.len(), m, self.rows())?;
        expect_values("backward_input dx", dx.len(), m, self.cols())?;
        self.with_rows("backward_input", |source| multiply::backward_input(source, dy, m, dx))
    }

    fn product(
        &self,
        operation: &'static str,
        input: &Tensor,
        inner: usize,
        outer: usize,
        multiply: impl FnOnce(&Self, &[f32], usize, &mut [f32]) -> Result<(), Error>,
    ) -> Result<Tensor, Error> {
        let m = match input.dims() {
            &[m, got] if got == inner => m,
            got => return Err(Error::Shape { operation, got: got.to_vec(), expected: format!("[M, {inner}]") }),
        };
        let dtype = float_type(operation, input)?;
        match input.device() {
            Device::Cpu => {}
            device => return Err(self.no_kernel(operation, device)),
        }
        let input = input.to_dtype(DType::F32)?.contiguous()?;
        let mut output = vec![0f32; m * outer];
        with_dense(&input, |values| match values {
            DenseValues::F32(values) => multiply(self, values, m, &mut output),
            DenseValues::Bf16(_) | DenseValues::F16(_) => unreachable!("converted to f32 above"),
        })??;
        Ok(Tensor::from_vec(output, (m, outer), &Device::Cpu)?.to_dtype(dtype)?)
    }

    fn with_rows<R>(&self, operation: &'static str, work: impl FnOnce(&dyn RowSource) -> R) -> Result<R, Error> {
        match self {
            Self::Dense(tensor) => match tensor.device() {
                Device::Cpu => {
                    let tensor = tensor.contiguous()?;
                    with_dense(&tensor, |values| work(&DenseRows { values, rows: self.rows(), cols: self.cols() }))
                }
                device => Err(self.no_kernel(operation, device)),
            },
            Self::Nf4(matrix) => Ok(work(matrix)),
            Self::Gguf(matrix) => Ok(work(matrix)),
            Self::Device(_) => Err(Error::NoKernel {
                operation,
                kind: self.kind_name(),
                device: "the CPU: it lies where a GPU reads it".into(),
            }),
        }
    }

    fn no_kernel(&self, operation: &'static str, device: &Device) -> Error {
        Error::NoKernel { operation, kind: self.kind_name(), device: format!("{:?}", device.location()) }
    }
}

fn float_type(operation: &'static str, tensor: &Tensor) -> Result<DType, Error> {
    match tensor.dtype() {
        dtype @ (DType::F32 | DType::BF16 | DType::F16) => Ok(dtype),
        got => Err(Error::NotFloat { operation, got }),
    }
}

fn expect_values(operation: &'static str, got: usize, rows: usize, cols: usize) -> Result<(), Error> {
    if got == rows * cols {
        return Ok(());
    }
    let expected = format!("{} values for [{rows}, {cols}]", rows * cols);
    Err(Error::Shape { operation, got: vec![got], expected })
}

/// Calls `work` with the values of a contiguous tensor on the CPU.
pub(super) fn with_dense<R>(tensor: &Tensor, work: impl FnOnce(DenseValues<'_>) -> R) -> Result<R, Error> {
    let (storage, layout) = tensor.storage_and_layout();
    let (start, end) = layout.contiguous_offsets().expect("callers pass contiguous tensors");
    match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) => Ok(work(DenseValues::F32(&values[start..end]))),
        Storage::Cpu(CpuStorage::BF16(values)) => Ok(work(DenseValues::Bf16(&values[start..end]))),
        Storage::Cpu(CpuStorage::F16(values)) => Ok(work(DenseValues::F16(&values[start..end]))),
        _ => Err(Error::NotFloat { operation: "reading a dense matrix", got: tensor.dtype() }),
    }
}
