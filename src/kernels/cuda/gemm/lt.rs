//! cuBLASLt on a compute stream: its handle, its workspace, what it is asked.
//!
//! The main queue of a device has one, made on first use and kept with it. So products never share a workspace while they run.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::Device;
use cudarc::cublaslt::{result, sys};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

use super::choose::{Choices, SUMMANDS};
use super::descriptors::{Descriptors, Preference};
use super::product::{Product, alignment};
use crate::device::{Error, Queue, cuda, failed};

/// One of the library's algorithms: plain numbers, of a meaning that one version of the library has.
pub(super) type Algorithm = sys::cublasLtMatmulAlgo_t;

/// Algorithms that are asked for where several are wanted. The library's order is of little use at the power limit: of 8 none
/// may be among the best.
const MOST_CANDIDATES: usize = 24;

/// The library on one compute stream.
pub(super) struct Library {
    handle: Handle,
    workspace: CudaSlice<u8>,
    choices: Mutex<Choices>,
    is_deterministic: AtomicBool,
}

/// Whether all sums of `device` have one order, so that the same work has the same bits; true at first. Products always do;
/// it is for kernels that have a faster way without.
///
/// # Errors
/// If `device` is no GPU, or memory for the workspace runs out.
pub fn is_deterministic(device: &Device) -> Result<bool, Error> {
    Ok(library(device)?.is_deterministic.load(Ordering::Relaxed))
}

/// Sets what [`is_deterministic`] says.
///
/// # Errors
/// As [`is_deterministic`].
pub fn set_deterministic(device: &Device, is_deterministic: bool) -> Result<(), Error> {
    library(device)?.is_deterministic.store(is_deterministic, Ordering::Relaxed);
    Ok(())
}

struct Handle(sys::cublasLtHandle_t);

// SAFETY: the library's documentation allows a handle to be used from several threads at the same time.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is guarded is changed by single insertions, so a panic elsewhere leaves it whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn library(device: &Device) -> Result<Arc<Library>, Error> {
    Queue::of(device)?.attached(|queue| Library::new(queue.device()))
}

/// Whether the library has no kernel for what it was asked.
pub(super) fn is_refusal(error: result::CublasError) -> bool {
    use sys::cublasStatus_t::{CUBLAS_STATUS_ARCH_MISMATCH, CUBLAS_STATUS_INVALID_VALUE, CUBLAS_STATUS_NOT_SUPPORTED};
    matches!(error.0, CUBLAS_STATUS_ARCH_MISMATCH | CUBLAS_STATUS_INVALID_VALUE | CUBLAS_STATUS_NOT_SUPPORTED)
}

/// Whether an algorithm adds up all summands of a product. Of those that share them among blocks (split K) some leave out what
/// is left over after whole vectors: of 27,648 + 8 summands in 9 shares the last 8, which are an adapter's, and that is the
/// library's own first choice (16-bit types, up to some hundred rows, cuBLASLt 13.0 on compute capability 9.0).
fn has_all_summands(product: &Product, algorithm: &Algorithm) -> bool {
    let mut shares = 0u32;
    // SAFETY: the algorithm is a plain value of the library's own making, and the attribute a 32-bit number.
    let status = unsafe {
        sys::cublasLtMatmulAlgoConfigGetAttribute(
            algorithm,
            sys::cublasLtMatmulAlgoConfigAttributes_t::CUBLASLT_ALGO_CONFIG_SPLITK_NUM,
            (&raw mut shares).cast(),
            size_of::<u32>(),
            std::ptr::null_mut(),
        )
    };
    status.result().is_ok() && (shares <= 1 || product.k.is_multiple_of(SUMMANDS))
}

impl Library {
    fn new(device: &Device) -> Result<Self, Error> {
        let cuda = cuda(device)?;
        let context = cuda.cuda_stream().context().clone();
        let driver = failed("preparing matrix products");
        context.bind_to_thread().map_err(driver)?;
        let (major, _) = context.compute_capability().map_err(driver)?;
        let workspace_mib = if major >= 9 { 32 } else { 8 };
        // SAFETY: bytes, for which any bits are a value; the library writes what it reads.
        let workspace = unsafe { cuda.alloc::<u8>(workspace_mib << 20)? };
        let handle = result::create_handle().map_err(|source| {
            let status = source.0;
            candle_core::Error::wrap(format!("cuBLASLt cannot start on GPU {}: {status:?}", context.ordinal()))
        })?;
        Ok(Self {
            handle: Handle(handle),
            workspace,
            choices: Mutex::new(Choices::default()),
            is_deterministic: AtomicBool::new(true),
        })
    }

    pub(super) fn choices(&self) -> MutexGuard<'_, Choices> {
        locked(&self.choices)
    }

    /// Version of the library, as it counts.
    pub(super) fn version() -> usize {
        // SAFETY: a function of no arguments that returns a number.
        unsafe { sys::cublasLtGetVersion() }
    }

    /// Algorithms for a product that leave no summand out, the one expected to be fastest first; none if there are none.
    pub(super) fn candidates(
        &self,
        product: &Product,
        descriptors: &Descriptors,
    ) -> Result<Vec<Algorithm>, result::CublasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t::{
            CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
        };
        let preference = Preference(result::create_matmul_pref()?);
        preference.set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, self.workspace.len() as u64)?;
        // Partial sums stay f32 and are added in one order.
        let reduction = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        preference.set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reduction)?;
        preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(product.b.address))?;
        preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(product.a.address))?;
        preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment(product.c.address))?;
        preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(product.d.address))?;
        let mut found = MaybeUninit::<[sys::cublasLtMatmulHeuristicResult_t; MOST_CANDIDATES]>::zeroed();
        let mut num_found = 0;
        // SAFETY: handle and descriptors are live; there is room for `MOST_CANDIDATES` results, and zeros are a valid
        // result (its only enum counts from 0), so those that the library does not write may be read.
        let (status, found) = unsafe {
            let status = sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle.0,
                descriptors.product.0,
                descriptors.b.0,
                descriptors.a.0,
                descriptors.c.0,
                descriptors.d.0,
                preference.0,
                MOST_CANDIDATES as i32,
                found.as_mut_ptr().cast(),
                &raw mut num_found,
            );
            (status.result(), found.assume_init())
        };
        match status {
            Err(error) if is_refusal(error) => Ok(Vec::new()),
            Err(error) => Err(error),
            Ok(()) => {
                let found = found.iter().take(num_found.max(0) as usize);
                let usable = found.filter(|f| f.state.result().is_ok() && f.workspaceSize <= self.workspace.len());
                Ok(usable.map(|f| f.algo).filter(|algorithm| has_all_summands(product, algorithm)).collect())
            }
        }
    }

    /// Whether an algorithm that was chosen for other sizes takes these.
    pub(super) fn takes(&self, product: &Product, descriptors: &Descriptors, algorithm: &Algorithm) -> bool {
        let mut result = MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::zeroed();
        // SAFETY: handle, descriptors and algorithm are live, and there is room for the result, of which zeros are a valid
        // value (its only enum counts from 0).
        let (status, result) = unsafe {
            let status = sys::cublasLtMatmulAlgoCheck(
                self.handle.0,
                descriptors.product.0,
                descriptors.b.0,
                descriptors.a.0,
                descriptors.c.0,
                descriptors.d.0,
                algorithm,
                result.as_mut_ptr(),
            );
            (status, result.assume_init())
        };
        let is_taken = status.result().is_ok() && result.state.result().is_ok();
        is_taken && result.workspaceSize <= self.workspace.len() && has_all_summands(product, algorithm)
    }

    /// Puts a product on the stream.
    pub(super) fn launch(
        &self,
        product: &Product,
        descriptors: &Descriptors,
        algorithm: &Algorithm,
        stream: &Arc<CudaStream>,
    ) -> Result<(), result::CublasError> {
        let (alpha, beta) = (product.alpha, product.beta());
        let (workspace, _order) = self.workspace.device_ptr(stream);
        // SAFETY: handle, descriptors and algorithm are live, the matrices are views of live device memory of the
        // described sizes; the scalars are read before the call returns. The workspace lives as long as the process,
        // and only work of this one stream uses it.
        unsafe {
            result::matmul(
                self.handle.0,
                descriptors.product.0,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                product.b.address as *const c_void,
                descriptors.b.0,
                product.a.address as *const c_void,
                descriptors.a.0,
                product.c.address as *const c_void,
                descriptors.c.0,
                product.d.address as *mut c_void,
                descriptors.d.0,
                algorithm,
                workspace as *mut c_void,
                self.workspace.len(),
                stream.cu_stream().cast(),
            )
        }
    }
}
