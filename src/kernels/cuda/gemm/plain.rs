//! Products through cuBLAS, which has kernels for every alignment.

use std::ffi::c_void;
use std::sync::Arc;

use candle_core::{DType, Device};
use cudarc::cublas::{result as blas_result, sys as blas};
use cudarc::driver::CudaStream;

use super::product::{Kind, Product, copy};
use crate::device::{Error, argument, cuda};
use crate::kernels::cuda::products::Side;

impl Product<'_> {
    /// Runs through cuBLAS, without the bias.
    pub(super) fn run_plain(&self, device: &Device, stream: &Arc<CudaStream>) -> Result<(), Error> {
        let Self { m, n, k, a, b, c, d, .. } = *self;
        let small = |size: usize| i32::try_from(size).map_err(|_| argument("gemm", "sizes", size, "below 2^31"));
        let (rows, cols, inner) = (small(m)?, small(n)?, small(k)?);
        let (a_stride, b_stride, d_stride) = (small(a.stride)?, small(b.stride)?, small(d.stride)?);
        if self.kind == Kind::Onto {
            copy(stream, d, c)?;
        }
        let operation = |side| match side {
            Side::Plain => blas::cublasOperation_t::CUBLAS_OP_N,
            Side::Transposed => blas::cublasOperation_t::CUBLAS_OP_T,
        };
        let data_type = |dtype| match dtype {
            DType::F16 => blas::cudaDataType::CUDA_R_16F,
            DType::BF16 => blas::cudaDataType::CUDA_R_16BF,
            _ => blas::cudaDataType::CUDA_R_32F,
        };
        let handle = cuda(device)?.cublas_handle();
        let (alpha, beta) = (self.alpha, self.beta());
        // SAFETY: the three matrices are views of live device tensors whose sizes and strides were checked; the scalars
        // outlive the call, which reads them before it returns (host pointer mode is the handle's default). The handle
        // works on the device's one compute stream.
        let done = unsafe {
            blas_result::gemm_ex(
                *handle.handle(),
                operation(self.b_side),
                operation(self.a_side),
                cols,
                rows,
                inner,
                (&raw const alpha).cast(),
                b.address as *const c_void,
                data_type(b.dtype()),
                b_stride,
                a.address as *const c_void,
                data_type(a.dtype()),
                a_stride,
                (&raw const beta).cast(),
                d.address as *mut c_void,
                data_type(d.dtype()),
                d_stride,
                blas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                blas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        done.map_err(|source| Error::Product { m, n, k, reason: source.to_string() })
    }
}
