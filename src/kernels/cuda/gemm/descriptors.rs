//! What cuBLASLt is told about a product, each part destroyed with its owner.

use candle_core::DType;
use cudarc::cublaslt::{result, sys};

use super::product::Product;
use crate::device::Matrix;
use crate::kernels::cuda::products::Side;

/// What the library is told about a product. It counts by columns: the rows of a row-major matrix are its columns, so
/// the product is asked for as `dᵀ = op(b)ᵀ op(a)ᵀ`, `b` being its first operand, and row strides are its leading
/// dimensions.
pub(super) struct Descriptors {
    pub(super) product: Description,
    pub(super) b: Layout,
    pub(super) a: Layout,
    pub(super) c: Layout,
    pub(super) d: Layout,
}

pub(super) struct Description(pub(super) sys::cublasLtMatmulDesc_t);

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: made by the library and destroyed only here. A failure would leak a few host bytes.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

pub(super) struct Layout(pub(super) sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(x: &Matrix) -> Result<Self, result::CublasError> {
        let stride = x.stride.max(x.cols) as i64;
        result::create_matrix_layout(data_type(x.dtype()), x.cols as u64, x.rows as u64, stride).map(Self)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: as for a description.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

pub(super) struct Preference(pub(super) sys::cublasLtMatmulPreference_t);

impl Preference {
    pub(super) fn set<T: Copy>(
        &self,
        attribute: sys::cublasLtMatmulPreferenceAttributes_t,
        value: T,
    ) -> Result<(), result::CublasError> {
        // SAFETY: the preference is live; the library copies the value, whose size it checks.
        unsafe { result::set_matmul_pref_attribute(self.0, attribute, (&raw const value).cast(), size_of::<T>()) }
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: as for a description.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

fn data_type(dtype: DType) -> sys::cudaDataType {
    match dtype {
        DType::F16 => sys::cudaDataType::CUDA_R_16F,
        DType::BF16 => sys::cudaDataType::CUDA_R_16BF,
        _ => sys::cudaDataType::CUDA_R_32F,
    }
}

impl Descriptors {
    pub(super) fn new(product: &Product) -> Result<Self, result::CublasError> {
        use sys::cublasLtMatmulDescAttributes_t::{
            CUBLASLT_MATMUL_DESC_BIAS_POINTER, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_MATMUL_DESC_TRANSA,
            CUBLASLT_MATMUL_DESC_TRANSB,
        };
        let description = Description(result::create_matmul_desc(
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cudaDataType::CUDA_R_32F,
        )?);
        // `CUBLAS_OP_N` and `CUBLAS_OP_T`.
        let operation = |side| i32::from(side == Side::Transposed);
        description.set(CUBLASLT_MATMUL_DESC_TRANSA, operation(product.b_side))?;
        description.set(CUBLASLT_MATMUL_DESC_TRANSB, operation(product.a_side))?;
        if let Some(bias) = product.bias {
            // It acts on the rows of the library's result, which are our columns, and has the result's type by default.
            description.set(CUBLASLT_MATMUL_DESC_EPILOGUE, sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS)?;
            description.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias.address)?;
        }
        Ok(Self {
            product: description,
            b: Layout::new(&product.b)?,
            a: Layout::new(&product.a)?,
            c: Layout::new(&product.c)?,
            d: Layout::new(&product.d)?,
        })
    }
}

impl Description {
    fn set<T: Copy>(
        &self,
        attribute: sys::cublasLtMatmulDescAttributes_t,
        value: T,
    ) -> Result<(), result::CublasError> {
        // SAFETY: the description is live; the library copies the value, whose size it checks.
        unsafe { result::set_matmul_desc_attribute(self.0, attribute, (&raw const value).cast(), size_of::<T>()) }
    }
}
