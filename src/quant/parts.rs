//! A weight as a few arrays of plain numbers, and what it takes to make the weight of them again, on the host or on a GPU: how
//! ranks share what none of them changes, and how it comes to a GPU for a visit.

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};

use super::double_quant::{Maxima, Nested};
use super::{DeviceForm, Error, GgufMatrix, Nf4Matrix, Weight};
use crate::config::settings::QuantType;
use crate::fs::Bytes;

/// The form of a weight: all of it but its large arrays.
#[derive(Clone, Debug)]
pub struct Form(pub(super) Kind);

#[derive(Clone, Debug)]
pub(super) enum Kind {
    Dense { dtype: DType, shape: Vec<usize> },
    FourBit { rows: usize, cols: usize, quant_type: QuantType, values: [f32; 16], maxima: MaximaForm },
    Gguf { kind: GgmlDType, rows: usize, cols: usize, bytes: usize },
}

#[derive(Clone, Debug)]
pub(super) enum MaximaForm {
    /// So many.
    Plain(usize),
    /// All but the codes, which are so many.
    Nested { codes: usize, small: Nested },
}

/// Numbers of one type that a weight is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Array {
    /// Their type; packed bytes are u8.
    pub dtype: DType,
    /// How many.
    pub count: usize,
}

impl Array {
    /// Bytes that they take.
    pub fn size_bytes(self) -> usize {
        self.count * self.dtype.size_in_bytes()
    }
}

/// The type of a GGUF matrix that is not packed.
pub(super) fn dense_type(kind: GgmlDType) -> Option<DType> {
    match kind {
        GgmlDType::F32 => Some(DType::F32),
        GgmlDType::F16 => Some(DType::F16),
        GgmlDType::BF16 => Some(DType::BF16),
        _ => None,
    }
}

impl Weight {
    /// The form of a weight and the bytes of [`Form::arrays`], copied to the host if it was packed on a GPU; [`Form::weight`]
    /// makes the weight of them again.
    ///
    /// # Errors
    /// If it lies on a GPU in another form.
    pub fn take_apart(&self) -> Result<(Form, Vec<Bytes>), Error> {
        Ok(match self {
            Self::Dense(tensor) => {
                let form = Kind::Dense { dtype: tensor.dtype(), shape: tensor.dims().to_vec() };
                (Form(form), vec![dense_bytes(tensor)?.into()])
            }
            Self::Nf4(matrix) => {
                let (maxima, bytes) = match &matrix.maxima {
                    Maxima::Plain(values) => {
                        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                        (MaximaForm::Plain(values.len()), bytes.into())
                    }
                    Maxima::Nested(nested) => {
                        let small = Nested { codes: Vec::new().into(), ..nested.clone() };
                        (MaximaForm::Nested { codes: nested.codes.len(), small }, nested.codes.clone())
                    }
                };
                let Nf4Matrix { rows, cols, quant_type, values, .. } = *matrix;
                let form = Kind::FourBit { rows, cols, quant_type, values, maxima };
                (Form(form), vec![matrix.packed.clone(), bytes])
            }
            Self::Gguf(matrix) => {
                let (kind, bytes) = (matrix.kind(), matrix.data().clone());
                (Form(Kind::Gguf { kind, rows: self.rows(), cols: self.cols(), bytes: bytes.len() }), vec![bytes])
            }
            Self::Device(matrix) => return matrix.take_apart(),
        })
    }
}

impl Form {
    /// The arrays that the weight is made of, in their order.
    pub fn arrays(&self) -> Vec<Array> {
        let array = |dtype: DType, count| Array { dtype, count };
        match &self.0 {
            Kind::Dense { dtype, shape } => vec![array(*dtype, shape.iter().product())],
            Kind::FourBit { rows, cols, maxima, .. } => {
                let maxima = match maxima {
                    MaximaForm::Plain(count) => array(DType::F32, *count),
                    MaximaForm::Nested { codes, .. } => array(DType::U8, *codes),
                };
                vec![array(DType::U8, (rows * cols).div_ceil(2)), maxima]
            }
            Kind::Gguf { kind, bytes, .. } => {
                let dtype = dense_type(*kind).unwrap_or(DType::U8);
                vec![array(dtype, bytes / dtype.size_in_bytes())]
            }
        }
    }

    /// The weight of this form in host memory with these bytes, one for each of [`Self::arrays`], whose memory it shares as far
    /// as it is packed.
    ///
    /// # Errors
    /// If there are more or fewer.
    pub fn weight(&self, bytes: &[Bytes]) -> Result<Weight, Error> {
        let arrays = self.arrays();
        let is_right = bytes.len() == arrays.len() && bytes.iter().zip(&arrays).all(|(b, a)| b.len() == a.size_bytes());
        if !is_right {
            return Err(Error::Shape {
                operation: "Form::weight",
                got: bytes.iter().map(|bytes| bytes.len()).collect(),
                expected: format!("{:?} bytes", arrays.iter().map(|array| array.size_bytes()).collect::<Vec<_>>()),
            });
        }
        Ok(match &self.0 {
            Kind::Dense { dtype, shape } => Weight::Dense(dense_tensor(&bytes[0], *dtype, shape)?),
            Kind::FourBit { rows, cols, quant_type, values, maxima } => {
                let (rows, cols, quant_type, values) = (*rows, *cols, *quant_type, *values);
                let (packed, rest) = (bytes[0].clone(), bytes[1].clone());
                let maxima = match maxima {
                    MaximaForm::Plain(_) => {
                        Maxima::Plain(rest.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
                    }
                    MaximaForm::Nested { small, .. } => Maxima::Nested(Nested { codes: rest, ..small.clone() }),
                };
                Weight::Nf4(Nf4Matrix { rows, cols, quant_type, values, packed, maxima })
            }
            Kind::Gguf { kind, rows, cols, .. } => {
                Weight::Gguf(GgufMatrix::new(*kind, *rows, *cols, bytes[0].clone())?)
            }
        })
    }

    /// What a GPU needs of the weight beside its arrays.
    ///
    /// # Errors
    /// If memory runs out, or the type has no kernel.
    pub fn on_device(&self, device: &Device) -> Result<DeviceForm, Error> {
        DeviceForm::new(self, device)
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
            let lengths: Vec<usize> = form.arrays().into_iter().map(Array::size_bytes).collect();
            assert_eq!(lengths, bytes.iter().map(|b| b.len()).collect::<Vec<_>>(), "{}", weight.kind_name());
            let again = form.weight(&bytes).unwrap();
            assert_eq!((again.kind_name(), bits(&again)), (weight.kind_name(), bits(&weight)));
            assert_eq!(again.size_bytes(), weight.size_bytes());
            assert!(form.weight(&bytes[1..]).is_err());
            let short = bytes[0][1..].to_vec().into();
            assert!(form.weight(&[std::slice::from_ref(&short), &bytes[1..]].concat()).is_err());
        }
        let vector = Weight::Dense(Tensor::from_slice(&values[..7], 7, &Device::Cpu).unwrap());
        let (form, bytes) = vector.take_apart().unwrap();
        let Weight::Dense(again) = form.weight(&bytes).unwrap() else { panic!("a vector stays dense") };
        assert_eq!(again.dims(), [7]);
    }
}
