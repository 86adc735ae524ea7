//! Which of the library's algorithms makes a product: its first choice, or the fastest in a trial.

use std::mem::MaybeUninit;
use std::sync::Arc;

use candle_core::{DType, Device};
use cudarc::cublaslt::{result, sys};
use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaStream, DevicePtr};

use super::descriptors::{Descriptors, Preference};
use super::{FULL_ALIGNMENT, Kind, Library, Product, Side, alignment, is_refusal};
use crate::kernels::cuda::Error;
use crate::kernels::cuda::memory::{Matrix, cuda};

/// Algorithms that a trial compares.
pub(super) const MAX_CANDIDATES: usize = 8;

/// Runs of an algorithm before it is timed, and runs that are timed together, in each of some rounds: the clock of a GPU
/// changes under load, so that all must be timed under all of it.
const WARM_UP_RUNS: usize = 1;
const TIMED_RUNS: usize = 3;
const ROUNDS: usize = 3;

/// The part of the first algorithm's time that another must stay below to be taken.
const CLEARLY_FASTER: f32 = 0.98;

/// Most bytes of a result that goes elsewhere for a trial.
const MOST_TRIAL_BYTES: usize = 256 << 20;

/// What an algorithm is chosen by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) sizes: [usize; 3],
    pub(super) types: [DType; 2],
    pub(super) sides: [Side; 2],
    pub(super) strides: [usize; 4],
    pub(super) alignments: [u32; 4],
    pub(super) kind: Kind,
    pub(super) has_bias: bool,
}

impl Key {
    /// The same for all products of like sizes: those of ragged batches differ a little each time, and one trial is to do for
    /// them.
    pub(super) fn of_like_sizes(self) -> Self {
        // Two classes for each doubling: the upper two bits.
        let class = |size: usize| {
            let lower = size.max(1).ilog2().saturating_sub(1);
            size >> lower << lower
        };
        Self { sizes: self.sizes.map(class), ..self }
    }
}

impl Library {
    /// Algorithms for a product, the one expected to be fastest first; none if there are none.
    pub(super) fn candidates(
        &self,
        product: &Product,
        descriptors: &Descriptors,
        count: usize,
    ) -> Result<Vec<sys::cublasLtMatmulAlgo_t>, result::CublasError> {
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
        let mut found = MaybeUninit::<[sys::cublasLtMatmulHeuristicResult_t; MAX_CANDIDATES]>::zeroed();
        let mut num_found = 0;
        // SAFETY: handle and descriptors are live; there is room for `MAX_CANDIDATES` results, and zeros are a valid
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
                count.min(MAX_CANDIDATES) as i32,
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
                Ok(usable.map(|f| f.algo).collect())
            }
        }
    }

    /// Whether an algorithm that was chosen for other sizes takes these.
    pub(super) fn takes(&self, descriptors: &Descriptors, algorithm: &sys::cublasLtMatmulAlgo_t) -> bool {
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
        status.result().is_ok() && result.state.result().is_ok() && result.workspaceSize <= self.workspace.len()
    }

    /// The fastest of some algorithms, timed in turns on the product's own operands: the first, which the library expects to
    /// be it, unless another is clearly faster. A result that is added to goes elsewhere meanwhile; others are just made
    /// several times.
    pub(super) fn fastest(
        &self,
        product: &Product,
        descriptors: &Descriptors,
        candidates: &[sys::cublasLtMatmulAlgo_t],
        device: &Device,
        stream: &Arc<CudaStream>,
    ) -> Result<Option<sys::cublasLtMatmulAlgo_t>, Error> {
        let driver = |source| Error::Driver { what: "timing a matrix product", source };
        let d = product.d;
        let bytes = ((d.rows - 1) * d.stride + d.cols) * d.dtype().size_in_bytes();
        let slack = (d.address % u64::from(FULL_ALIGNMENT)) as usize;
        let mut trial = *product;
        let scratch;
        if product.kind == Kind::Into {
            if bytes > MOST_TRIAL_BYTES {
                return Ok(candidates.first().copied());
            }
            // SAFETY: bytes, for which any bits are a value; nobody looks at the result.
            let Ok(memory) = (unsafe { cuda(device)?.alloc::<u8>(bytes + slack) }) else {
                return Ok(candidates.first().copied());
            };
            scratch = memory;
            let elsewhere = Matrix { address: scratch.device_ptr(stream).0 + slack as u64, ..d };
            trial = Product { d: elsewhere, c: elsewhere, ..trial };
        }
        let run = |algorithm, times| (0..times).try_for_each(|_| self.launch(&trial, descriptors, algorithm, stream));
        let mut usable = Vec::with_capacity(candidates.len());
        for algorithm in candidates {
            match run(algorithm, WARM_UP_RUNS) {
                Err(error) if is_refusal(error) => {}
                done => {
                    done.map_err(|error| product.failed(error))?;
                    usable.push((f32::INFINITY, algorithm));
                }
            }
        }
        for _ in 0..ROUNDS {
            for (least, algorithm) in &mut usable {
                let event = || stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).map_err(driver);
                let start = event()?;
                run(algorithm, TIMED_RUNS).map_err(|error| product.failed(error))?;
                *least = least.min(start.elapsed_ms(&event()?).map_err(driver)?);
            }
        }
        let Some(&first) = usable.first() else { return Ok(None) };
        let best = usable.into_iter().fold(first, |best, other| if other.0 < best.0 { other } else { best });
        Ok(Some(*if best.0 < CLEARLY_FASTER * first.0 { best.1 } else { first.1 }))
    }
}
