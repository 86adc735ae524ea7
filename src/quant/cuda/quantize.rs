//! Quantising on a GPU, for a model on its way from its files: the bits are the CPU's.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use crate::config::settings::QuantType;
use crate::fs::Bytes;
use crate::kernels::cpu::codebook::BLOCK_LEN;
use crate::kernels::cuda::{array, download, empty, quantize_maxima, quantize_nf4, upload_f32, upload_u8};
use crate::quant::double_quant::{Maxima, NESTED_BLOCK, Nested, dynamic_map, mean};
use crate::quant::nf4::codebook_of;
use crate::quant::{Error, Nf4Matrix};

impl Nf4Matrix {
    /// As [`Nf4Matrix::quantize_from`], by the kernels of `device`, from little-endian values as they are stored. The result
    /// is in host memory; of the device it takes the unpacked matrix for that time.
    ///
    /// # Errors
    /// If `dtype` is no float type of at most 32 bits, there are not `rows * cols` values, or the device fails.
    pub(crate) fn quantize_on(
        device: &Device,
        bytes: &[u8],
        dtype: DType,
        (rows, cols): (usize, usize),
        quant_type: QuantType,
        double_quant: bool,
    ) -> Result<Self, Error> {
        let count = rows * cols;
        let values = upload_u8(device, bytes)?;
        let values = array(&values)?.as_elements(dtype.size_in_bytes());
        let packed = empty(device, count.div_ceil(2), DType::U8)?;
        let maxima = empty(device, count.div_ceil(BLOCK_LEN), DType::F32)?;
        let is_fp4 = quant_type == QuantType::Fp4;
        quantize_nf4(device, array(&packed)?, array(&maxima)?, values, dtype, count, is_fp4)?;
        let host_maxima = download(&maxima)?;
        let maxima = if double_quant {
            Maxima::Nested(nested(device, &maxima, &host_maxima)?)
        } else {
            Maxima::Plain(host_maxima.into())
        };
        Ok(Self { rows, cols, quant_type, values: codebook_of(quant_type).values, packed: bytes_of(&packed)?, maxima })
    }
}

/// Quantises the maxima, which are on the device and on the host.
fn nested(device: &Device, maxima: &Tensor, host: &[f32]) -> Result<Nested, Error> {
    let (offset, map) = (mean(host), dynamic_map());
    let codes = empty(device, host.len(), DType::U8)?;
    let absmax = empty(device, host.len().div_ceil(NESTED_BLOCK), DType::F32)?;
    let to_map = upload_f32(device, &map)?;
    quantize_maxima(device, array(&codes)?, array(&absmax)?, array(maxima)?, array(&to_map)?, offset, host.len())?;
    let absmax: Arc<[f32]> = download(&absmax)?.into();
    Ok(Nested { codes: bytes_of(&codes)?, absmax, map, offset })
}

fn bytes_of(tensor: &Tensor) -> Result<Bytes, Error> {
    let bytes: Vec<u8> = tensor.to_vec1()?;
    Ok(Bytes::from(bytes))
}
