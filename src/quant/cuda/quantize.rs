//! Quantising on a GPU, for a model on its way from its files to that GPU: the bits are the CPU's.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};

use super::{DeviceMatrix, DeviceMaxima, Storage};
use crate::config::settings::{QuantType, Quantization};
use crate::device::{Buffer, Queue, Ticket, array, download, download_u32, empty, matrix, upload_f32};
use crate::kernels::cpu::codebook::BLOCK_LEN;
use crate::kernels::cuda::{count_non_finite, quantize_maxima, quantize_nf4};
use crate::quant::double_quant::{NESTED_BLOCK, dynamic_map, mean};
use crate::quant::nf4::codebook_of;
use crate::quant::{Error, Weight};

/// Quantises matrices on one GPU, where they stay. All cores copy a matrix to page-locked memory, from which it goes on at
/// the full speed of the bus; of the device it takes one unpacked matrix at a time.
#[derive(Debug)]
pub struct Quantizer {
    device: Device,
    /// As large as the largest matrix so far.
    staging: Mutex<Option<Arc<Buffer>>>,
}

impl Quantizer {
    /// A quantiser on `device`, which is a GPU.
    pub fn new(device: &Device) -> Self {
        Self { device: device.clone(), staging: Mutex::new(None) }
    }

    /// The matrix in 4 bits on the device, from little-endian values as they are stored; `None` if some are not finite.
    ///
    /// # Shapes
    /// `bytes`: row-major `[rows, cols]` of `dtype`, f32, f16 or bf16.
    ///
    /// # Errors
    /// If there are not as many bytes, or the device fails.
    pub fn quantize(
        &self,
        bytes: &[u8],
        dtype: DType,
        (rows, cols): (usize, usize),
        quantization: Quantization,
    ) -> Result<Option<Weight>, Error> {
        let Quantization { quant_type, double_quant } = quantization;
        let (device, count) = (&self.device, rows * cols);
        if bytes.len() != count * dtype.size_in_bytes() {
            let kind = dtype.as_str().into();
            return Err(Error::ByteLength {
                kind,
                rows,
                cols,
                expected: count * dtype.size_in_bytes(),
                got: bytes.len(),
            });
        }
        let values = empty(device, (rows, cols), dtype)?;
        self.upload(bytes, &values)?;
        let bad = Tensor::zeros(1, DType::U32, device)?;
        count_non_finite(device, array(&bad)?, matrix(&values)?)?;
        let packed = empty(device, count.div_ceil(2), DType::U8)?;
        let maxima = empty(device, count.div_ceil(BLOCK_LEN), DType::F32)?;
        let is_fp4 = quant_type == QuantType::Fp4;
        quantize_nf4(device, array(&packed)?, array(&maxima)?, array(&values)?, dtype, count, is_fp4)?;
        if download_u32(&bad)?.iter().any(|&n| n > 0) {
            return Ok(None);
        }
        let maxima = if double_quant { nested(device, &maxima)? } else { DeviceMaxima::Plain(maxima) };
        let name = if quant_type == QuantType::Nf4 { "nf4" } else { "fp4" };
        let matrix = DeviceMatrix {
            rows,
            cols,
            kind_name: if double_quant { format!("{name} double quantised") } else { name.into() },
            size_bytes: packed.elem_count() + maxima.size_bytes(),
            storage: Storage::Nf4 {
                quant_type,
                packed,
                maxima,
                values: upload_f32(device, &codebook_of(quant_type).values)?,
            },
        };
        Ok(Some(Weight::Device(matrix)))
    }
}

impl Quantizer {
    /// Starts the copy of bytes to a tensor of that size.
    fn upload(&self, bytes: &[u8], to: &Tensor) -> Result<(), Error> {
        let queue = Queue::of(&self.device)?;
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        let staging = match staging.take().filter(|staging| staging.len() >= bytes.len()) {
            Some(known) => staging.insert(known),
            None => staging.insert(Arc::new(Buffer::pinned(&queue, bytes.len())?)),
        };
        // Nothing but a copy that failed to be asked for would still share it.
        let memory = Arc::get_mut(staging).ok_or(crate::device::Error::GivenUp)?;
        memory.write(0, bytes)?;
        let to = Arc::new(Buffer::of_tensor(to.clone())?);
        queue.copy(&staging.part(0..bytes.len())?, &to.whole(), &Ticket::done())?;
        Ok(())
    }
}

fn nested(device: &Device, maxima: &Tensor) -> Result<DeviceMaxima, Error> {
    let count = maxima.elem_count();
    let offset = mean(&download(maxima)?);
    let codes = empty(device, count, DType::U8)?;
    let absmax = empty(device, count.div_ceil(NESTED_BLOCK), DType::F32)?;
    let map = upload_f32(device, &dynamic_map())?;
    quantize_maxima(device, array(&codes)?, array(&absmax)?, array(maxima)?, array(&map)?, offset, count)?;
    Ok(DeviceMaxima::Nested { codes, absmax, map, offset })
}

impl DeviceMaxima {
    fn size_bytes(&self) -> usize {
        let bytes = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        match self {
            Self::Plain(values) => bytes(values),
            Self::Nested { codes, absmax, map, .. } => bytes(codes) + bytes(absmax) + bytes(map) + 4,
        }
    }
}
