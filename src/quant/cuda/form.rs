//! Weights made of arrays that come to a GPU's memory as they are.

use candle_core::{Device, Tensor};

use super::{DeviceMatrix, DeviceMaxima, Storage, kernel_kind};
use crate::config::settings::QuantType;
use crate::device::{download, download_u8, upload_f32};
use crate::fs::Bytes;
use crate::kernels::cuda::GgufKind;
use crate::quant::double_quant::{self, Maxima};
use crate::quant::parts::{Kind, MaximaForm, dense_type};
use crate::quant::{Error, Form, Nf4Matrix, Weight};

/// A weight on a GPU without its large arrays, which come and go: their shape, and what is small and stays.
#[derive(Clone, Debug)]
pub struct DeviceForm {
    rows: usize,
    cols: usize,
    kind_name: String,
    parts: Parts,
}

#[derive(Clone, Debug)]
enum Parts {
    Dense(Vec<usize>),
    FourBit { quant_type: QuantType, values: Tensor, maxima: Option<Nested> },
    Gguf(GgufKind),
}

/// What stays of maxima that are themselves quantised.
#[derive(Clone, Debug)]
struct Nested {
    absmax: Tensor,
    map: Tensor,
    offset: f32,
}

impl DeviceForm {
    pub(in crate::quant) fn new(form: &Form, device: &Device) -> Result<Self, Error> {
        let (rows, cols, parts) = match &form.0 {
            Kind::Dense { shape, .. } => (0, 0, Parts::Dense(shape.clone())),
            Kind::FourBit { rows, cols, quant_type, values, maxima } => {
                let maxima = match maxima {
                    MaximaForm::Plain(_) => None,
                    MaximaForm::Nested { small, .. } => Some(Nested {
                        absmax: upload_f32(device, &small.absmax)?,
                        map: upload_f32(device, &small.map)?,
                        offset: small.offset,
                    }),
                };
                let values = upload_f32(device, values)?;
                (*rows, *cols, Parts::FourBit { quant_type: *quant_type, values, maxima })
            }
            Kind::Gguf { kind, rows, cols, .. } => match dense_type(*kind) {
                Some(_) => (*rows, *cols, Parts::Dense(vec![*rows, *cols])),
                None => (*rows, *cols, Parts::Gguf(kernel_kind(*kind)?)),
            },
        };
        Ok(Self { rows, cols, kind_name: String::new(), parts })
    }

    /// With the name of how the weight is stored.
    #[must_use]
    pub fn named(self, kind_name: String) -> Self {
        Self { kind_name, ..self }
    }

    /// The weight of these arrays, which are those of [`Form::arrays`] and lie on the GPU; it shares their memory.
    ///
    /// # Errors
    /// If there are more or fewer.
    pub fn weight(&self, arrays: &[Tensor]) -> Result<Weight, Error> {
        let storage = match (&self.parts, arrays) {
            (Parts::Dense(shape), [values]) => return Ok(Weight::Dense(values.reshape(shape.as_slice())?)),
            (Parts::FourBit { quant_type, values, maxima }, [packed, rest]) => {
                let maxima = match maxima {
                    None => DeviceMaxima::Plain(rest.clone()),
                    Some(Nested { absmax, map, offset }) => DeviceMaxima::Nested {
                        codes: rest.clone(),
                        absmax: absmax.clone(),
                        map: map.clone(),
                        offset: *offset,
                    },
                };
                Storage::Nf4 { quant_type: *quant_type, packed: packed.clone(), maxima, values: values.clone() }
            }
            (Parts::Gguf(kind), [blocks]) => Storage::Gguf { kind: *kind, blocks: blocks.clone() },
            _ => {
                return Err(Error::Shape {
                    operation: "DeviceForm::weight",
                    got: arrays.iter().map(Tensor::elem_count).collect(),
                    expected: format!("the arrays of `{}`", self.kind_name),
                });
            }
        };
        let size_bytes = arrays.iter().map(|a| a.elem_count() * a.dtype().size_in_bytes()).sum();
        let (rows, cols, kind_name) = (self.rows, self.cols, self.kind_name.clone());
        Ok(Weight::Device(DeviceMatrix { rows, cols, kind_name, size_bytes, storage }))
    }
}

impl DeviceMatrix {
    /// The form and the bytes of a matrix that was packed on the GPU.
    pub(in crate::quant) fn take_apart(&self) -> Result<(Form, Vec<Bytes>), Error> {
        let Storage::Nf4 { quant_type, packed, maxima, values } = &self.storage else {
            return Err(Error::NoKernel {
                operation: "take_apart",
                kind: self.kind_name.clone(),
                device: "the CPU: it lies where a GPU reads it".into(),
            });
        };
        let maxima = match maxima {
            DeviceMaxima::Plain(maxima) => Maxima::Plain(download(maxima)?.into()),
            DeviceMaxima::Nested { codes, absmax, map, offset } => Maxima::Nested(double_quant::Nested {
                codes: download_u8(codes)?.into(),
                absmax: download(absmax)?.into(),
                map: download(map)?.into(),
                offset: *offset,
            }),
        };
        let expected = || Error::Shape {
            operation: "take_apart",
            got: values.dims().to_vec(),
            expected: "the 16 values of 4-bit codes".into(),
        };
        let values: [f32; 16] = download(values)?.try_into().map_err(|_| expected())?;
        let (rows, cols, quant_type, packed) = (self.rows, self.cols, *quant_type, download_u8(packed)?.into());
        Weight::Nf4(Nf4Matrix { rows, cols, quant_type, values, packed, maxima }).take_apart()
    }
}
