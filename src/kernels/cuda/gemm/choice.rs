//! Which of the library's algorithms makes a product: its first choice, or the fastest in a trial.
//!
//! There are two trials. The first, at first use, times a few runs of each algorithm and leaves those that come close to the
//! fastest. A GPU that multiplies without a pause comes to its power limit and lowers its clock, and then the algorithm that
//! takes the least energy is the fastest, often another one. So a product that is used for long has a second trial: each
//! algorithm that was left runs for so long that the clock follows.

use std::mem::MaybeUninit;
use std::sync::Arc;

use candle_core::{DType, Device};
use cudarc::cublaslt::{result, sys};
use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

use super::descriptors::{Descriptors, Preference};
use super::{FULL_ALIGNMENT, Kind, Library, Product, Side, alignment, is_refusal};
use crate::device::{Error, Matrix, cuda, failed};

/// Algorithms that a trial compares. The library's order is of little use at the power limit: of 8 none may be among the best.
pub(super) const MAX_CANDIDATES: usize = 24;

/// Runs that are timed together, in each of some rounds: the clock of a GPU changes under load, so that all must be timed
/// under all of it. One that is so much slower in a round is left out of the next.
const TIMED_RUNS: usize = 3;
const ROUNDS: usize = 3;
const CLEARLY_SLOWER: f32 = 1.1;

/// The part of the time of the algorithm in use that another must stay below to take its place.
const CLEARLY_FASTER: f32 = 0.98;

/// Algorithms that the second trial compares: at most so many whose time was at most so many times the least.
const MAX_FINALISTS: usize = 6;
const FINALIST: f32 = 1.05;

/// Milliseconds that products of a kind have taken when their second trial comes, and that one of them takes at least; and
/// least rows, columns and summands: memory bounds what is smaller, not power.
const USED_MS: f32 = 20.0;
const LONG_MS: f32 = 0.1;
const LEAST_SIZE: usize = 512;

/// Milliseconds that an algorithm runs before it is timed in the second trial, and while it is.
const LOADED_MS: f32 = 40.0;
/// What takes the place of [`CLEARLY_FASTER`] there: the times are of many runs.
const FASTER_UNDER_LOAD: f32 = 0.995;

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

/// Summands that algorithms take at a time, or a multiple of it.
pub(super) const SUMMANDS: usize = 128;

/// Whether an algorithm adds up all summands of a product. Of those that share them among blocks (split K) some leave out what
/// is left over after whole vectors: of 27,648 + 8 summands in 9 shares the last 8, which are an adapter's, and that is the
/// library's own first choice (16-bit types, up to some hundred rows, cuBLASLt 13.0 on compute capability 9.0).
fn has_all_summands(product: &Product, algorithm: &sys::cublasLtMatmulAlgo_t) -> bool {
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
                MAX_CANDIDATES as i32,
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
                Ok(usable
                    .map(|f| f.algo)
                    .filter(|algorithm| has_all_summands(product, algorithm))
                    .take(count)
                    .collect())
            }
        }
    }

    /// Whether an algorithm that was chosen for other sizes takes these.
    pub(super) fn takes(
        &self,
        product: &Product,
        descriptors: &Descriptors,
        algorithm: &sys::cublasLtMatmulAlgo_t,
    ) -> bool {
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

    /// The fastest of some algorithms, timed in turns on the product's own operands: the first, which the library expects to
    /// be it, unless another is clearly faster.
    pub(super) fn first_trial(
        &self,
        product: &Product,
        descriptors: &Descriptors,
        candidates: &[sys::cublasLtMatmulAlgo_t],
        device: &Device,
        stream: &Arc<CudaStream>,
    ) -> Result<Option<Tuned>, Error> {
        let Some(trial) = Trial::new(self, product, descriptors, device, stream)? else {
            return Ok(candidates.first().map(|&algorithm| Tuned::untried(algorithm)));
        };
        let mut usable = Vec::with_capacity(candidates.len());
        for algorithm in candidates {
            if trial.can_run(algorithm)? {
                usable.push((f32::INFINITY, algorithm));
            }
        }
        let mut fastest = f32::INFINITY;
        for _ in 0..ROUNDS {
            for (least, algorithm) in usable.iter_mut().filter(|one| one.0 <= CLEARLY_SLOWER * fastest) {
                *least = least.min(trial.time(algorithm, TIMED_RUNS)?);
            }
            fastest = usable.iter().fold(fastest, |least, one| least.min(one.0));
        }
        let Some(&first) = usable.first() else { return Ok(None) };
        usable.sort_by(|a, b| a.0.total_cmp(&b.0));
        let best = if usable[0].0 < CLEARLY_FASTER * first.0 { usable[0] } else { first };
        let is_large = [product.m, product.n, product.k].iter().all(|&size| size >= LEAST_SIZE);
        let ms = best.0;
        let near = usable.iter().filter(|one| one.0 <= FINALIST * fastest && ms >= LONG_MS && is_large);
        let finalists = near.map(|one| *one.1).take(MAX_FINALISTS).collect();
        Ok(Some(Tuned { algorithm: *best.1, ms, used_ms: 0.0, finalists }))
    }

    /// Of the algorithms that the first trial left, the one that is fastest when it runs without a pause.
    pub(super) fn second_trial(
        &self,
        product: &Product,
        descriptors: &Descriptors,
        tuned: &Tuned,
        device: &Device,
        stream: &Arc<CudaStream>,
    ) -> Result<sys::cublasLtMatmulAlgo_t, Error> {
        let mut best = (f32::INFINITY, tuned.algorithm);
        let Some(trial) = Trial::new(self, product, descriptors, device, stream)? else { return Ok(best.1) };
        let runs = (LOADED_MS / tuned.ms).ceil() as usize;
        let others = tuned.finalists.iter().filter(|one| one.data != tuned.algorithm.data);
        for algorithm in std::iter::once(&tuned.algorithm).chain(others) {
            if !self.takes(product, descriptors, algorithm) || !trial.can_run(algorithm)? {
                continue;
            }
            trial.run(algorithm, runs)?;
            let ms = trial.time(algorithm, runs)?;
            let margin = if best.0.is_finite() { FASTER_UNDER_LOAD } else { 1.0 };
            if ms < margin * best.0 {
                best = (ms, *algorithm);
            }
        }
        Ok(best.1)
    }
}

/// What trials found for products of a kind.
#[derive(Clone, Debug)]
pub(super) struct Tuned {
    pub(super) algorithm: sys::cublasLtMatmulAlgo_t,
    /// Milliseconds of a product in the first trial.
    ms: f32,
    /// Milliseconds that products have taken since, at that rate.
    used_ms: f32,
    /// What the second trial is to compare. Empty if there was one or will be none.
    finalists: Vec<sys::cublasLtMatmulAlgo_t>,
}

impl Tuned {
    fn untried(algorithm: sys::cublasLtMatmulAlgo_t) -> Self {
        Self { algorithm, ms: 0.0, used_ms: 0.0, finalists: Vec::new() }
    }

    /// Counts one product; true when it is time for the second trial.
    pub(super) fn is_due(&mut self) -> bool {
        self.used_ms += self.ms;
        self.used_ms >= USED_MS && self.finalists.len() > 1
    }

    pub(super) fn decide(&mut self, algorithm: sys::cublasLtMatmulAlgo_t) {
        self.algorithm = algorithm;
        self.finalists = Vec::new();
    }
}

/// Runs of a product for the sake of their time. A result that is added to goes elsewhere meanwhile; others are just made
/// several times.
struct Trial<'a> {
    library: &'a Library,
    product: Product,
    descriptors: &'a Descriptors,
    stream: &'a Arc<CudaStream>,
    /// Where the result goes.
    _elsewhere: Option<CudaSlice<u8>>,
}

impl<'a> Trial<'a> {
    /// `None` if there is no room for the result.
    fn new(
        library: &'a Library,
        product: &Product,
        descriptors: &'a Descriptors,
        device: &Device,
        stream: &'a Arc<CudaStream>,
    ) -> Result<Option<Self>, Error> {
        let mut product = *product;
        let mut room = None;
        if product.kind == Kind::Into {
            let d = product.d;
            let bytes = ((d.rows - 1) * d.stride + d.cols) * d.dtype().size_in_bytes();
            let slack = (d.address % u64::from(FULL_ALIGNMENT)) as usize;
            if bytes > MOST_TRIAL_BYTES {
                return Ok(None);
            }
            // SAFETY: bytes, for which any bits are a value; nobody looks at the result.
            let Ok(memory) = (unsafe { cuda(device)?.alloc::<u8>(bytes + slack) }) else { return Ok(None) };
            let elsewhere = Matrix { address: memory.device_ptr(stream).0 + slack as u64, ..d };
            product = Product { d: elsewhere, c: elsewhere, ..product };
            room = Some(memory);
        }
        Ok(Some(Self { library, product, descriptors, stream, _elsewhere: room }))
    }

    /// Runs once; false if the library refuses.
    fn can_run(&self, algorithm: &sys::cublasLtMatmulAlgo_t) -> Result<bool, Error> {
        match self.library.launch(&self.product, self.descriptors, algorithm, self.stream) {
            Err(error) if is_refusal(error) => Ok(false),
            done => done.map(|()| true).map_err(|error| self.product.failed(error)),
        }
    }

    fn run(&self, algorithm: &sys::cublasLtMatmulAlgo_t, times: usize) -> Result<(), Error> {
        let run = |_| self.library.launch(&self.product, self.descriptors, algorithm, self.stream);
        (0..times).try_for_each(run).map_err(|error| self.product.failed(error))
    }

    /// Milliseconds of one of some runs; waits for them.
    fn time(&self, algorithm: &sys::cublasLtMatmulAlgo_t, times: usize) -> Result<f32, Error> {
        let driver = failed("timing a matrix product");
        let event = || self.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).map_err(driver);
        let start = event()?;
        self.run(algorithm, times)?;
        Ok(start.elapsed_ms(&event()?).map_err(driver)? / times as f32)
    }
}
