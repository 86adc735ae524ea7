//! Weight matrices in a GPU's memory, packed as on the host, or in host memory that the GPU reads.
//!
//! A multiply unpacks a matrix into a buffer that is used once ([`Weight::unpack_into`]); nothing but that buffer is ever
//! unpacked.

mod form;
mod quantize;

use std::sync::Arc;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};

use super::dense::DenseValues;
use super::double_quant::Maxima;
use super::lend::fill;
use super::multiply::RowSource as _;
use super::parts::dense_type;
use super::weight::with_dense;
use super::{Error, GgufMatrix, Nf4Matrix, Weight};
use crate::config::settings::QuantType;
use crate::device::{Buffer, Matrix, Queue, array, empty, matrix, upload_f32, upload_u8};
use crate::kernels::cuda::{GgufKind, Nf4Absmax, Nf4View, PackedWeights, axpby, dequantize_gguf, dequantize_nf4};
pub use form::DeviceForm;
pub use quantize::Quantizer;

/// A matrix `[N, K]` where a GPU can read it.
#[derive(Clone, Debug)]
pub struct DeviceMatrix {
    rows: usize,
    cols: usize,
    kind_name: String,
    size_bytes: usize,
    storage: Storage,
}

#[derive(Clone, Debug)]
enum Storage {
    Nf4 {
        quant_type: QuantType,
        packed: Tensor,
        maxima: DeviceMaxima,
        values: Tensor,
    },
    Gguf {
        kind: GgufKind,
        blocks: Tensor,
    },
    /// In page-locked host memory, dense.
    Pinned(Arc<Buffer>, DType),
}

#[derive(Clone, Debug)]
enum DeviceMaxima {
    Plain(Tensor),
    Nested { codes: Tensor, absmax: Tensor, map: Tensor, offset: f32 },
}

impl DeviceMatrix {
    /// `N`.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// `K`.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The storage's name.
    pub fn kind_name(&self) -> &str {
        &self.kind_name
    }

    /// Bytes on the device; 0 for a matrix in host memory.
    pub fn size_bytes(&self) -> usize {
        self.size_bytes
    }

    fn from_nf4(host: &Nf4Matrix, device: &Device) -> Result<Self, Error> {
        let maxima = match &host.maxima {
            Maxima::Plain(values) => DeviceMaxima::Plain(upload_f32(device, values)?),
            Maxima::Nested(nested) => DeviceMaxima::Nested {
                codes: upload_u8(device, &nested.codes)?,
                absmax: upload_f32(device, &nested.absmax)?,
                map: upload_f32(device, &nested.map)?,
                offset: nested.offset,
            },
        };
        let storage = Storage::Nf4 {
            quant_type: host.quant_type(),
            packed: upload_u8(device, &host.packed)?,
            maxima,
            values: upload_f32(device, &host.values)?,
        };
        Ok(Self {
            rows: host.rows(),
            cols: host.cols(),
            kind_name: String::new(),
            size_bytes: host.size_bytes(),
            storage,
        })
    }

    fn from_gguf(host: &GgufMatrix, device: &Device) -> Result<Self, Error> {
        let kind = kernel_kind(host.kind())?;
        let blocks = upload_u8(device, host.data())?;
        let size_bytes = host.data().len();
        let storage = Storage::Gguf { kind, blocks };
        Ok(Self { rows: host.rows(), cols: host.cols(), kind_name: String::new(), size_bytes, storage })
    }

    /// The matrix as a GPU reads it where it lies dense in host memory.
    ///
    /// # Errors
    /// Never.
    pub(crate) fn pinned(&self) -> Result<Option<Matrix<'_>>, Error> {
        match &self.storage {
            Storage::Pinned(memory, dtype) => Ok(Some(memory.matrix(0, (self.rows, self.cols), *dtype)?)),
            _ => Ok(None),
        }
    }

    /// The same matrix in device memory of its own; page-locked memory is not lent, and stays shared.
    pub(super) fn copy(&self) -> Result<Self, Error> {
        let storage = match &self.storage {
            Storage::Nf4 { quant_type, packed, maxima, values } => {
                let maxima = match maxima {
                    DeviceMaxima::Plain(maxima) => DeviceMaxima::Plain(maxima.copy()?),
                    DeviceMaxima::Nested { codes, absmax, map, offset } => DeviceMaxima::Nested {
                        codes: codes.copy()?,
                        absmax: absmax.copy()?,
                        map: map.clone(),
                        offset: *offset,
                    },
                };
                Storage::Nf4 { quant_type: *quant_type, packed: packed.copy()?, maxima, values: values.clone() }
            }
            Storage::Gguf { kind, blocks } => Storage::Gguf { kind: *kind, blocks: blocks.copy()? },
            pinned @ Storage::Pinned(..) => pinned.clone(),
        };
        Ok(Self { storage, ..self.clone() })
    }

    /// Makes its values NaN for whoever still reads them; page-locked memory is not lent.
    pub(super) fn spoil(self) -> Result<(), Error> {
        match &self.storage {
            Storage::Nf4 { maxima: DeviceMaxima::Plain(maxima), .. } => fill(maxima, f64::NAN),
            Storage::Nf4 { maxima: DeviceMaxima::Nested { absmax, .. }, .. } => fill(absmax, f64::NAN),
            Storage::Gguf { blocks, .. } => fill(blocks, f64::NAN),
            Storage::Pinned(..) => Ok(()),
        }
    }

    /// The codes and maxima of a 4-bit matrix.
    fn nf4(&self) -> Result<Option<Nf4View<'_>>, Error> {
        let Storage::Nf4 { packed, maxima, values, .. } = &self.storage else { return Ok(None) };
        let absmax = match maxima {
            DeviceMaxima::Plain(values) => Nf4Absmax::Plain(array(values)?),
            DeviceMaxima::Nested { codes, absmax, map, offset } => {
                Nf4Absmax::Nested { codes: array(codes)?, absmax: array(absmax)?, map: array(map)?, offset: *offset }
            }
        };
        Ok(Some(Nf4View { packed: array(packed)?, absmax, values: array(values)? }))
    }

    fn packed(&self) -> Result<Option<PackedWeights<'_>>, Error> {
        let (rows, cols) = (self.rows, self.cols);
        Ok(match &self.storage {
            Storage::Gguf { kind, blocks } => {
                Some(PackedWeights::Gguf { kind: *kind, blocks: array(blocks)?, rows, cols })
            }
            _ => self.nf4()?.map(|view| PackedWeights::Nf4 { view, rows, cols }),
        })
    }

    fn unpack_into(&self, device: &Device, out: Matrix, first_row: usize) -> Result<(), Error> {
        match &self.storage {
            Storage::Nf4 { .. } => {
                if let Some(view) = self.nf4()? {
                    dequantize_nf4(device, out, &view, first_row, self.cols)?;
                }
            }
            Storage::Gguf { kind, blocks } => {
                dequantize_gguf(device, out, *kind, array(blocks)?, first_row, self.cols)?;
            }
            Storage::Pinned(memory, dtype) => {
                let all = memory.matrix(0, (self.rows, self.cols), *dtype)?;
                axpby(device, out, 1.0, all.rows(first_row, out.rows), 0.0)?;
            }
        }
        Ok(())
    }
}

/// The kernels' name of a packed type.
fn kernel_kind(kind: GgmlDType) -> Result<GgufKind, Error> {
    Ok(match kind {
        GgmlDType::Q4_0 => GgufKind::Q4_0,
        GgmlDType::Q4_1 => GgufKind::Q4_1,
        GgmlDType::Q5_0 => GgufKind::Q5_0,
        GgmlDType::Q5_1 => GgufKind::Q5_1,
        GgmlDType::Q8_0 => GgufKind::Q8_0,
        GgmlDType::Q2K => GgufKind::Q2K,
        GgmlDType::Q3K => GgufKind::Q3K,
        GgmlDType::Q4K => GgufKind::Q4K,
        GgmlDType::Q5K => GgufKind::Q5K,
        GgmlDType::Q6K => GgufKind::Q6K,
        kind => return Err(Error::UnsupportedType { kind }),
    })
}

impl Weight {
    /// The same matrix in the memory of `device`; nothing to do for the CPU.
    ///
    /// # Errors
    /// If memory runs out, or the type has no kernel.
    pub fn to_device(self, device: &Device) -> Result<Self, Error> {
        if device.is_cpu() {
            return Ok(self);
        }
        let kind_name = self.kind_name();
        let matrix = match &self {
            Self::Dense(tensor) => return Ok(Self::Dense(tensor.to_device(device)?)),
            Self::Nf4(matrix) => DeviceMatrix::from_nf4(matrix, device)?,
            Self::Gguf(matrix) => match dense_type(matrix.kind()) {
                Some(dtype) => {
                    let shape = [matrix.rows(), matrix.cols()];
                    return Ok(Self::Dense(Tensor::from_raw_buffer(matrix.data(), dtype, &shape, device)?));
                }
                None => DeviceMatrix::from_gguf(matrix, device)?,
            },
            Self::Device(_) => return Ok(self),
        };
        Ok(Self::Device(DeviceMatrix { kind_name, ..matrix }))
    }

    /// The same matrix, dense, in page-locked host memory that `device` reads; nothing to do for the CPU. Packed types
    /// become f16.
    ///
    /// # Errors
    /// If memory cannot be locked.
    pub fn to_pinned(self, device: &Device) -> Result<Self, Error> {
        if device.is_cpu() || matches!(self, Self::Device(_)) {
            return Ok(self);
        }
        let (rows, cols) = (self.rows(), self.cols());
        let dense = match &self {
            Self::Dense(tensor) => tensor.to_device(&Device::Cpu)?.contiguous()?,
            packed => packed.dequantize()?.to_dtype(DType::F16)?,
        };
        let dtype = dense.dtype();
        let mut memory = Buffer::pinned(&Queue::of(device)?, rows * cols * dtype.size_in_bytes())?;
        with_dense(&dense, |values| match values {
            DenseValues::F32(values) => memory.write(0, values),
            DenseValues::Bf16(values) => memory.write(0, values),
            DenseValues::F16(values) => memory.write(0, values),
        })??;
        let kind_name = format!("{} in host memory", dtype.as_str());
        let storage = Storage::Pinned(Arc::new(memory), dtype);
        Ok(Self::Device(DeviceMatrix { rows, cols, kind_name, size_bytes: 0, storage }))
    }

    /// The weights as products of few rows read them, where such products can: 4-bit codes, GGUF blocks, and dense values on the
    /// device.
    ///
    /// # Errors
    /// Never.
    pub(crate) fn packed(&self) -> Result<Option<PackedWeights<'_>>, Error> {
        Ok(match self {
            Self::Dense(tensor) if tensor.device().is_cuda() => Some(PackedWeights::Dense(matrix(tensor)?)),
            Self::Device(matrix) => matrix.packed()?,
            _ => None,
        })
    }

    /// The rows of the table from which a GPU picks some: dense, on the device or in page-locked host memory.
    ///
    /// # Errors
    /// Never.
    pub(crate) fn table(&self) -> Result<Option<Matrix<'_>>, Error> {
        match self {
            Self::Dense(tensor) if tensor.device().is_cuda() => Ok(Some(matrix(tensor)?)),
            Self::Device(matrix) => matrix.pinned(),
            _ => Ok(None),
        }
    }

    /// Unpacks rows from `first_row` on into `out`, as many as it has.
    ///
    /// # Shapes
    /// `out`: f32, f16 or bf16 `[rows, K]`.
    ///
    /// # Errors
    /// If the weight is not where the GPU can read it.
    pub(crate) fn unpack_into(&self, device: &Device, out: Matrix, first_row: usize) -> Result<(), Error> {
        if first_row + out.rows > self.rows() || out.cols != self.cols() {
            return Err(Error::Shape {
                operation: "unpack",
                got: vec![first_row + out.rows, out.cols],
                expected: format!("at most [{}, {}]", self.rows(), self.cols()),
            });
        }
        match self {
            Self::Dense(tensor) if tensor.device().is_cuda() => {
                Ok(axpby(device, out, 1.0, matrix(tensor)?.rows(first_row, out.rows), 0.0)?)
            }
            Self::Device(matrix) => matrix.unpack_into(device, out, first_row),
            _ => Err(Error::NoKernel {
                operation: "unpack",
                kind: self.kind_name(),
                device: format!("{:?}", device.location()),
            }),
        }
    }

    /// All values on the device.
    ///
    /// # Errors
    /// If the weight is not where the GPU can read it.
    pub(crate) fn unpack(&self, device: &Device, dtype: DType) -> Result<Tensor, Error> {
        if let Self::Dense(tensor) = self
            && tensor.device().is_cuda()
            && tensor.dtype() == dtype
        {
            return Ok(tensor.clone());
        }
        let out = empty(device, (self.rows(), self.cols()), dtype)?;
        self.unpack_into(device, matrix(&out)?, 0)?;
        Ok(out)
    }
}
