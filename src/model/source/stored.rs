//! One weight as it lies in a file, and its ways into memory.

use std::path::Path;
use std::sync::Arc;

use candle_core::DType;
use candle_core::quantized::GgmlDType;
use half::{bf16, f16};
use rayon::prelude::*;

use super::bnb::QuantState;
use crate::config::settings::Quantization;
use crate::fs::Region;
use crate::model::Error;
use crate::quant::Quantizer;
use crate::quant::{GgufMatrix, Nf4Matrix, Weight};

/// Values converted by one task.
const CHUNK: usize = 1 << 16;

/// One weight in a file.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    /// The file that holds it.
    pub(super) file: Arc<Path>,
    /// The file's own name for it, for messages.
    pub(super) name: String,
    /// `[out, in]` or `[length]`, of the values and not of their packing.
    pub(super) shape: Vec<usize>,
    /// Where the values lie, packed as `packing` says.
    pub(super) region: Region,
    /// How they are packed.
    pub(super) packing: Packing,
}

/// How values are packed.
#[derive(Clone, Debug)]
pub(super) enum Packing {
    /// F32, F16 or BF16, little-endian.
    Dense(DType),
    /// A GGUF block type.
    Gguf(GgmlDType),
    /// 4 bits as bitsandbytes saves them.
    Bnb(Box<QuantState>),
}

impl Stored {
    /// Bytes in the file.
    pub(super) fn num_bytes(&self) -> usize {
        self.region.len()
            + match &self.packing {
                Packing::Bnb(state) => state.num_bytes(),
                _ => 0,
            }
    }

    /// The type of the values where they are not packed.
    pub(super) fn dense_dtype(&self) -> Option<DType> {
        match self.packing {
            Packing::Dense(dtype) => Some(dtype),
            _ => None,
        }
    }

    /// The matrix as stored, where it is packed.
    pub(super) fn packed(&self) -> Option<Result<Weight, Error>> {
        let (&rows, &cols) = (self.shape.first()?, self.shape.get(1)?);
        match &self.packing {
            Packing::Dense(_) => None,
            Packing::Gguf(kind) => Some(self.region.read().map_err(Error::from).and_then(|bytes| {
                let matrix = GgufMatrix::new(*kind, rows, cols, bytes);
                matrix.map(Weight::Gguf).map_err(|source| self.packing_error(source))
            })),
            Packing::Bnb(state) => Some(state.read(&self.region).and_then(|parts| {
                let matrix = parts.and_then(|parts| parts.read());
                matrix.map(Weight::Nf4).map_err(|source| self.packing_error(source))
            })),
        }
    }

    /// All values in f32.
    pub(super) fn values(&self) -> Result<Vec<f32>, Error> {
        if let Packing::Dense(dtype) = self.packing {
            return Ok(dense_to_f32(&self.region.read()?, dtype));
        }
        let mut values = vec![0f32; self.shape.iter().product()];
        if let Some(weight) = self.packed() {
            let rows = self.shape.first().copied().unwrap_or(0);
            weight?.dequantize_rows_into(0..rows, &mut values).map_err(|source| self.packing_error(source))?;
        }
        Ok(values)
    }

    /// [`Self::quantize`] by a GPU, on which the matrix stays.
    pub(super) fn quantize_on(
        &self,
        quantizer: &Quantizer,
        quantization: Quantization,
    ) -> Option<Result<Weight, Error>> {
        let (&rows, &cols) = (self.shape.first()?, self.shape.get(1)?);
        let dtype = self.dense_dtype()?;
        let bytes = match self.region.read() {
            Ok(bytes) => bytes,
            Err(error) => return Some(Err(error.into())),
        };
        Some(match quantizer.quantize(&bytes, dtype, (rows, cols), quantization) {
            Ok(Some(weight)) => Ok(weight),
            Ok(None) => Err(self.not_finite()),
            Err(source) => Err(self.packing_error(source)),
        })
    }

    fn not_finite(&self) -> Error {
        let reason = format!("tensor `{}` holds values that are not finite", self.name);
        Error::Damaged { path: self.file.to_path_buf(), reason }
    }

    /// Refuses values that are not finite: in 4 bits they would vanish without a trace.
    fn check_finite(&self, bytes: &[u8]) -> Result<(), Error> {
        let halves = bytes.as_chunks::<2>().0;
        let is_finite = match self.dense_dtype() {
            Some(DType::BF16) => halves.par_iter().all(|bytes| bf16::from_le_bytes(*bytes).is_finite()),
            Some(DType::F16) => halves.par_iter().all(|bytes| f16::from_le_bytes(*bytes).is_finite()),
            Some(_) => bytes.as_chunks::<4>().0.par_iter().all(|bytes| f32::from_le_bytes(*bytes).is_finite()),
            None => true,
        };
        if is_finite { Ok(()) } else { Err(self.not_finite()) }
    }

    /// The matrix in 4 bits, straight from the stored values; `None` where it is packed already or no matrix. Values that are
    /// not finite are refused.
    pub(super) fn quantize(&self, quantization: Quantization) -> Option<Result<Nf4Matrix, Error>> {
        let (&rows, &cols) = (self.shape.first()?, self.shape.get(1)?);
        let Quantization { quant_type, double_quant } = quantization;
        let dtype = self.dense_dtype()?;
        let checked = self.region.read().map_err(Error::from).and_then(|bytes| {
            self.check_finite(&bytes)?;
            Ok(bytes)
        });
        let bytes = match checked {
            Ok(bytes) => bytes,
            Err(error) => return Some(Err(error)),
        };
        let halves = bytes.as_chunks::<2>().0;
        Some(Ok(match dtype {
            DType::BF16 => Nf4Matrix::quantize_from(halves, rows, cols, quant_type, double_quant, |bytes| {
                bf16::from_le_bytes(bytes).to_f32()
            }),
            DType::F16 => Nf4Matrix::quantize_from(halves, rows, cols, quant_type, double_quant, |bytes| {
                f16::from_le_bytes(bytes).to_f32()
            }),
            _ => {
                let values = bytes.as_chunks::<4>().0;
                Nf4Matrix::quantize_from(values, rows, cols, quant_type, double_quant, f32::from_le_bytes)
            }
        }))
    }

    fn packing_error(&self, source: crate::quant::Error) -> Error {
        Error::Packing { path: self.file.to_path_buf(), name: self.name.clone(), source: Box::new(source) }
    }
}

/// Converts little-endian values of a dense type to f32, on all cores.
pub(crate) fn dense_to_f32(bytes: &[u8], dtype: DType) -> Vec<f32> {
    let size = dtype.size_in_bytes();
    let mut values = vec![0f32; bytes.len() / size];
    values.par_chunks_mut(CHUNK).zip(bytes.par_chunks(CHUNK * size)).for_each(|(values, bytes)| match dtype {
        DType::BF16 => {
            for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *value = bf16::from_le_bytes(*bytes).to_f32();
            }
        }
        DType::F16 => {
            for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *value = f16::from_le_bytes(*bytes).to_f32();
            }
        }
        _ => {
            for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *value = f32::from_le_bytes(*bytes);
            }
        }
    });
    values
}
