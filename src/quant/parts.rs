//! A weight as one run of bytes, and what it takes to make the weight of them again: how ranks share what none of them changes.

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};

use super::double_quant::{Maxima, Nested};
use super::{Error, GgufMatrix, Nf4Matrix, Weight};
use crate::config::settings::QuantType;
use crate::fs::Bytes;

/// The form of a weight: all of it but its large arrays.
#[derive(Clone, Debug)]
pub struct Form(Kind);

#[derive(Clone, Debug)]
enum Kind {
    Dense { dtype: DType, shape: Vec<usize> },
    FourBit { rows: usize, cols: usize, quant_type: QuantType, values: [f32; 16], maxima: MaximaForm },
    Gguf { kind: GgmlDType, rows: usize, cols: usize, bytes: usize },
}

#[derive(Clone, Debug)]
enum MaximaForm {
    /// So many.
    Plain(usize),
    /// All but the codes, which are so many.
    Nested { codes: usize, small: Nested },
}

impl Weight {
    /// The form and the bytes of a weight in host memory; [`Form::weight`] makes the weight of them again.
    ///
    /// # Errors
    /// If it lies on a GPU.
    pub fn take_apart(&self) -> Result<(Form, Vec<u8>), Error> {
        Ok(match self {
            Self::Dense(tensor) => {
                let form = Kind::Dense { dtype: tensor.dtype(), shape: tensor.dims().to_vec() };
                (Form(form), dense_bytes(tensor)?)
            }
            Self::Nf4(matrix) => {
                let mut bytes = matrix.packed.to_vec();
                let maxima = match &matrix.maxima {
                    Maxima::Plain(values) => {
                        bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
                        MaximaForm::Plain(values.len())
                    }
                    Maxima::Nested(nested) => {
                        bytes.extend_from_slice(&nested.codes);
                        let small = Nested { codes: Vec::new().into(), ..nested.clone() };
                        MaximaForm::Nested { codes: nested.codes.len(), small }
                    }
                };
                let Nf4Matrix { rows, cols, quant_type, values, .. } = *matrix;
                (Form(Kind::FourBit { rows, cols, quant_type, values, maxima }), bytes)
            }
            Self::Gguf(matrix) => {
                let (kind, bytes) = (matrix.kind(), matrix.data().to_vec());
                (Form(Kind::Gguf { kind, rows: self.rows(), cols: self.cols(), bytes: bytes.len() }), bytes)
            }
            Self::Device(_) => {
                return Err(Error::NoKernel {
                    operation: "take_apart",
                    kind: self.kind_name(),
                    device: "the CPU: it lies where a GPU reads it".into(),
                });
            }
        })
    }
}

impl Form {
    /// Number of bytes.
    pub fn len(&self) -> usize {
        match &self.0 {
            Kind::Dense { dtype, shape } => shape.iter().product::<usize>() * dtype.size_in_bytes(),
            Kind::FourBit { rows, cols, maxima, .. } => {
                let maxima = match maxima {
                    MaximaForm::Plain(count) => 4 * count,
                    MaximaForm::Nested { codes, .. } => *codes,
                };
                (rows * cols).div_ceil(2) + maxima
            }
            Kind::Gguf { bytes, .. } => *bytes,
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The weight of this form with these bytes, whose memory it shares as far as it is packed.
    ///
    /// # Errors
    /// If there are more or fewer than [`Self::len`].
    pub fn weight(&self, bytes: &Bytes) -> Result<Weight, Error> {
        let length = || Error::Shape {
            operation: "Form::weight",
            got: vec![bytes.len()],
            expected: format!("{} bytes", self.len()),
        };
        if bytes.len() != self.len() {
            return Err(length());
        }
        let part = |range| bytes.slice(range).ok_or_else(length);
        Ok(match &self.0 {
            Kind::Dense { dtype, shape } => Weight::Dense(dense_tensor(bytes, *dtype, shape)?),
            Kind::FourBit { rows, cols, quant_type, values, maxima } => {
                let (rows, cols, quant_type, values) = (*rows, *cols, *quant_type, *values);
                let packed = (rows * cols).div_ceil(2);
                let rest = part(packed..bytes.len())?;
                let maxima = match maxima {
                    MaximaForm::Plain(_) => {
                        Maxima::Plain(rest.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
                    }
                    MaximaForm::Nested { small, .. } => Maxima::Nested(Nested { codes: rest, ..small.clone() }),
                };
                Weight::Nf4(Nf4Matrix { rows, cols, quant_type, values, packed: part(0..packed)?, maxima })
            }
            Kind::Gguf { kind, rows, cols, .. } => Weight::Gguf(GgufMatrix::new(*kind, *rows, *cols, bytes.clone())?),
        })
    }
}

fn dense_bytes(tensor: &Tensor) -> Result<Vec<u8>, Error> {
    let flat = tensor.flatten_all()?.to_device(&Device::Cpu)?;
    Ok(match tensor.dtype() {
        DType::F32 => flat.to_vec1::<f32>()?.into_iter().flat_map(f32::to_le_bytes).collect(),
        DType::BF16 => flat.to_vec1::<bf16>()?.into_iter().flat_map(bf16::to_le_bytes).collect(),
        DType::F16 => flat.to_vec1::<f16>()?.into_iter().flat_map(f16::to_le_bytes).collect(),
        got => return Err(Error::NotFloat { operation: "take_apart", got }),
    })
}

fn dense_tensor(bytes: &[u8], dtype: DType, shape: &[usize]) -> Result<Tensor, Error> {
    let (pairs, quads) = (|| bytes.as_chunks::<2>().0.iter(), bytes.as_chunks::<4>().0.iter());
    Ok(match dtype {
        DType::F32 => Tensor::from_vec(quads.map(|b| f32::from_le_bytes(*b)).collect(), shape, &Device::Cpu)?,
        DType::BF16 => Tensor::from_vec(pairs().map(|b| bf16::from_le_bytes(*b)).collect(), shape, &Device::Cpu)?,
        DType::F16 => Tensor::from_vec(pairs().map(|b| f16::from_le_bytes(*b)).collect(), shape, &Device::Cpu)?,
        got => return Err(Error::NotFloat { operation: "Form::weight", got }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_taken_apart_is_the_same_weight_again() {
        let values: Vec<f32> = (0..512).map(|i| (i as f32 * 0.37).sin()).collect();
        let dense =
            |dtype| Weight::Dense(Tensor::from_slice(&values, (8, 64), &Device::Cpu).unwrap().to_dtype(dtype).unwrap());
        let packed = |kind, nested| Weight::Nf4(Nf4Matrix::quantize(&values, 8, 64, kind, nested));
        let blocks: Vec<u8> = (0..8 * 2 * 18).map(|i| (i % 61) as u8).collect();
        let gguf = Weight::Gguf(GgufMatrix::new(GgmlDType::Q4_0, 8, 64, blocks.into()).unwrap());
        let all = [
            dense(DType::F32),
            dense(DType::BF16),
            dense(DType::F16),
            packed(QuantType::Nf4, false),
            packed(QuantType::Nf4, true),
            packed(QuantType::Fp4, false),
            gguf,
        ];
        let bits = |weight: &Weight| -> Vec<u32> {
            let values = weight.dequantize().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            values.into_iter().map(f32::to_bits).collect()
        };
        for weight in all {
            let (form, bytes) = weight.take_apart().unwrap();
            assert_eq!((form.len(), form.is_empty()), (bytes.len(), false), "{}", weight.kind_name());
            let again = form.weight(&bytes.clone().into()).unwrap();
            assert_eq!((again.kind_name(), bits(&again)), (weight.kind_name(), bits(&weight)));
            assert_eq!(again.size_bytes(), weight.size_bytes());
            assert!(form.weight(&bytes[1..].to_vec().into()).is_err());
        }
        let vector = Weight::Dense(Tensor::from_slice(&values[..7], 7, &Device::Cpu).unwrap());
        let (form, bytes) = vector.take_apart().unwrap();
        let Weight::Dense(again) = form.weight(&bytes.into()).unwrap() else { panic!("a vector stays dense") };
        assert_eq!(again.dims(), [7]);
    }
}
