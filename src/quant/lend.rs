//! Copies of weights into memory that is lent for a while, and the end of such a loan.

use candle_core::{DType, Device, Tensor};

use super::double_quant::{Maxima, Nested};
use super::{Error, GgufMatrix, Nf4Matrix, Weight};
use crate::fs::Bytes;

impl Weight {
    /// The same matrix in memory of `device` that nothing else shares.
    ///
    /// # Errors
    /// If memory runs out.
    pub fn copy_to(&self, device: &Device) -> Result<Self, Error> {
        let is_there = match self {
            Self::Dense(tensor) => tensor.device().same_device(device),
            Self::Device(_) => true,
            Self::Nf4(_) | Self::Gguf(_) => device.is_cpu(),
        };
        if is_there { self.copy() } else { self.clone().to_device(device) }
    }

    fn copy(&self) -> Result<Self, Error> {
        let bytes = |bytes: &Bytes| Bytes::from(bytes.to_vec());
        Ok(match self {
            Self::Dense(tensor) => Self::Dense(tensor.force_contiguous()?),
            Self::Nf4(matrix) => {
                let maxima = match &matrix.maxima {
                    Maxima::Plain(values) => Maxima::Plain(values.to_vec().into()),
                    Maxima::Nested(nested) => Maxima::Nested(Nested { codes: bytes(&nested.codes), ..nested.clone() }),
                };
                Self::Nf4(Nf4Matrix { packed: bytes(&matrix.packed), maxima, ..matrix.clone() })
            }
            Self::Gguf(matrix) => {
                Self::Gguf(GgufMatrix::new(matrix.kind(), self.rows(), self.cols(), bytes(matrix.data()))?)
            }
            Self::Device(matrix) => Self::Device(matrix.copy()?),
        })
    }

    /// Ends the use of a copy: its floats become NaN for whoever still reads them.
    ///
    /// # Errors
    /// If packed bytes are still held elsewhere.
    pub fn spoil(self) -> Result<(), Error> {
        let kind = self.kind_name();
        let is_shared = match self {
            Self::Dense(tensor) => return fill(&tensor, f64::NAN),
            Self::Nf4(matrix) => matrix.packed.is_shared(),
            Self::Gguf(matrix) => matrix.data().is_shared(),
            Self::Device(matrix) => return matrix.spoil(),
        };
        if is_shared { Err(Error::Shared { kind }) } else { Ok(()) }
    }
}

/// Sets every value of a contiguous tensor.
pub(super) fn fill(tensor: &Tensor, value: f64) -> Result<(), Error> {
    if tensor.elem_count() == 0 {
        return Ok(());
    }
    let values = match tensor.dtype() {
        DType::U8 => Tensor::full(u8::MAX, tensor.shape(), tensor.device())?,
        dtype => Tensor::full(value as f32, tensor.shape(), tensor.device())?.to_dtype(dtype)?,
    };
    Ok(tensor.slice_set(&values, 0, 0)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::settings::QuantType;

    #[test]
    fn a_copy_shares_nothing_and_its_end_is_seen() {
        let values: Vec<f32> = (0..256).map(|i| (i as f32).sin()).collect();
        let dense = Weight::Dense(Tensor::from_vec(values.clone(), (4, 64), &Device::Cpu).unwrap());
        let packed = |nested| Weight::Nf4(Nf4Matrix::quantize(&values, 4, 64, QuantType::Nf4, nested));
        for weight in [dense, packed(false), packed(true)] {
            let before = weight.dequantize().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let copy = weight.copy_to(&Device::Cpu).unwrap();
            let late = copy.clone();
            let ended = copy.spoil();
            match &late {
                Weight::Dense(tensor) => {
                    let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                    assert!(ended.is_ok() && values.iter().all(|v| v.is_nan()));
                }
                _ => assert!(ended.unwrap_err().to_string().contains("still held")),
            }
            drop(late);
            let alone = weight.copy_to(&Device::Cpu).unwrap();
            alone.spoil().unwrap();
            assert_eq!(weight.dequantize().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap(), before);
        }
    }
}
