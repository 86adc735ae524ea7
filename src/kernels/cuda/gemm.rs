//! Matrix products through cuBLASLt.
//!
//! Each compute stream has one library handle, one workspace and one table of chosen algorithms, made on first use and
//! kept for the life of the process. A process has one compute stream per GPU, so products never share a workspace
//! while they run. For one choice of algorithm the result has the same bits every time: sums that are split over
//! blocks go through the workspace in f32 and are added in a fixed order. Which algorithm is chosen depends on the
//! sizes, types and alignments; with [`tune`] also on timings, so that two runs may then differ in the last bits.

mod choice;
mod descriptors;

use std::collections::{BTreeMap, HashMap};
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Tensor};
use cudarc::cublas::{result as blas_result, sys as blas};
use cudarc::cublaslt::{result, sys};
use cudarc::driver::sys::{CUDA_MEMCPY2D, CUmemorytype, cuMemcpy2DAsync_v2, cuMemsetD2D8Async};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

use self::choice::{Key, MAX_CANDIDATES, SUMMANDS, Tuned};
use self::descriptors::Descriptors;
use crate::device::{Error, Matrix, Pointer, argument, cuda, failed, matrix};

/// How an operand stands in a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// As stored.
    Plain,
    /// Transposed.
    Transposed,
}

/// What a product is added to.
#[derive(Clone, Copy, Debug)]
pub enum Accumulate {
    /// Nothing: the result is written over.
    No,
    /// The result's own old values.
    Into,
    /// That matrix, which has the shape and type of the result and lies elsewhere.
    Onto(Matrix),
}

/// `d = alpha * op(a) op(b) + beta * c + bias`, summed in f32; `accumulate` says what `c` is and whether `beta` is 0 or
/// 1. `d` may be of a wider type than `a` and `b`.
///
/// # Shapes
/// `op(a)`: `[M, K]`, `op(b)`: `[K, N]`, both f32, f16 or bf16; `d` and `c`: `[M, N]` of that type or f32; `bias`:
/// `[N]` of `d`'s type, added to each row.
///
/// # Errors
/// If the shapes or types do not fit, or the library fails.
pub fn gemm(
    device: &Device,
    d: Matrix,
    (a, a_side): (Matrix, Side),
    (b, b_side): (Matrix, Side),
    alpha: f32,
    accumulate: Accumulate,
    bias: Option<Pointer>,
) -> Result<(), Error> {
    let sizes = |x: &Matrix, side| if side == Side::Plain { (x.rows, x.cols) } else { (x.cols, x.rows) };
    let ((m, k), (b_k, n)) = (sizes(&a, a_side), sizes(&b, b_side));
    if b_k != k || (d.rows, d.cols) != (m, n) {
        return Err(argument("gemm", "d", [d.rows, d.cols], format!("[{m}, {n}] from inner sizes {k} and {b_k}")));
    }
    if a.dtype() != b.dtype() || (d.dtype() != a.dtype() && d.dtype() != DType::F32) {
        return Err(argument("gemm", "types", [a.dtype(), b.dtype(), d.dtype()], "one type, or an f32 result"));
    }
    let (kind, c) = match accumulate {
        Accumulate::No => (Kind::No, d),
        Accumulate::Into => (Kind::Into, d),
        Accumulate::Onto(c) if c.address == d.address && c.stride == d.stride => (Kind::Into, c),
        Accumulate::Onto(c) => (Kind::Onto, c),
    };
    if (c.rows, c.cols, c.dtype()) != (m, n, d.dtype()) {
        return Err(argument("gemm", "c", (c.rows, c.cols, c.dtype()), (m, n, d.dtype())));
    }
    for (name, x) in [("a", a), ("b", b), ("c", c), ("d", d)] {
        if x.rows > 1 && x.stride < x.cols {
            return Err(argument("gemm", name, x, "rows that do not overlap"));
        }
    }
    if let Some(bias) = bias.filter(|bias| bias.len != n) {
        return Err(argument("gemm", "bias", bias.len, n));
    }
    if m == 0 || n == 0 {
        return Ok(());
    }
    let stream = cuda(device)?.cuda_stream();
    stream.context().bind_to_thread().map_err(failed("using the device"))?;
    if k == 0 {
        return match (bias, kind) {
            (Some(bias), _) => add_to_rows(device, d, bias, accumulate),
            (None, Kind::No) => zero(&stream, d),
            (None, Kind::Into) => Ok(()),
            (None, Kind::Onto) => copy(&stream, d, c),
        };
    }
    let product = Product { m, n, k, d, c, a, b, a_side, b_side, alpha, kind, bias: None };
    match bias {
        // The library reads a bias 16 bytes at a time.
        Some(bias) if alignment(bias.address) < FULL_ALIGNMENT => {
            product.run(device, &stream)?;
            add_to_rows(device, d, bias, Accumulate::Into)
        }
        Some(bias) => {
            let fused = Product { bias: Some(bias), ..product };
            if fused.run_fused(device, &stream)? {
                return Ok(());
            }
            product.run(device, &stream)?;
            add_to_rows(device, d, bias, Accumulate::Into)
        }
        None => product.run(device, &stream),
    }
}

/// Whether products of a new kind try several algorithms and keep the fastest. Off at first. Products whose sizes are alike
/// are of one kind.
///
/// A trial takes some milliseconds and, where a result is added to, memory for another one of up to 256 MiB. Kinds that take
/// long have a second trial of up to half a second when they have been used some times. A change forgets earlier choices.
///
/// # Errors
/// If `device` is no GPU, or memory for the workspace runs out.
pub fn tune(device: &Device, on: bool) -> Result<(), Error> {
    let library = library(device)?;
    let mut choices = locked(&library.choices);
    if choices.is_tuning != on {
        *choices = Choices { is_tuning: on, algorithms: HashMap::new(), tuned: HashMap::new() };
    }
    Ok(())
}

/// Whether [`tune`] is on: results may then differ in their last bits from one run to the next.
///
/// # Errors
/// If `device` is no GPU, or memory for the workspace runs out.
pub fn is_tuned(device: &Device) -> Result<bool, Error> {
    Ok(locked(&library(device)?.choices).is_tuning)
}

/// Alignment in bytes from which on kernels do not differ.
const FULL_ALIGNMENT: u32 = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    No,
    Into,
    Onto,
}

/// A product with at least one row, column and summand whose arguments fit.
#[derive(Clone, Copy, Debug)]
struct Product {
    m: usize,
    n: usize,
    k: usize,
    d: Matrix,
    /// `d` itself unless the kind is `Onto`.
    c: Matrix,
    a: Matrix,
    b: Matrix,
    a_side: Side,
    b_side: Side,
    alpha: f32,
    kind: Kind,
    bias: Option<Pointer>,
}

/// The library on one compute stream.
struct Library {
    handle: Handle,
    workspace: CudaSlice<u8>,
    choices: Mutex<Choices>,
}

struct Choices {
    is_tuning: bool,
    /// `None`: the library has no algorithm for it.
    algorithms: HashMap<Key, Option<sys::cublasLtMatmulAlgo_t>>,
    /// The fastest ones, by sizes alike.
    tuned: HashMap<Key, Tuned>,
}

/// By GPU and stream.
static LIBRARIES: Mutex<BTreeMap<(usize, usize), Arc<Library>>> = Mutex::new(BTreeMap::new());

struct Handle(sys::cublasLtHandle_t);

// SAFETY: the library's documentation allows a handle to be used from several threads at the same time.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is guarded is changed by single insertions, so a panic elsewhere leaves it whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn library(device: &Device) -> Result<Arc<Library>, Error> {
    let cuda = cuda(device)?;
    let stream = cuda.cuda_stream();
    let context = stream.context();
    let key = (context.ordinal(), stream.cu_stream().addr());
    let mut libraries = locked(&LIBRARIES);
    if let Some(library) = libraries.get(&key) {
        return Ok(Arc::clone(library));
    }
    let driver = failed("preparing matrix products");
    context.bind_to_thread().map_err(driver)?;
    let (major, _) = context.compute_capability().map_err(driver)?;
    let workspace_mib = if major >= 9 { 32 } else { 8 };
    // SAFETY: bytes, for which any bits are a value; the library writes what it reads. The slice keeps its stream
    // alive, so that no other stream gets the same address.
    let workspace = unsafe { cuda.alloc::<u8>(workspace_mib << 20)? };
    let handle = result::create_handle().map_err(|source| {
        let status = source.0;
        candle_core::Error::wrap(format!("cuBLASLt cannot start on GPU {}: {status:?}", context.ordinal()))
    })?;
    let choices = Mutex::new(Choices { is_tuning: false, algorithms: HashMap::new(), tuned: HashMap::new() });
    let library = Arc::new(Library { handle: Handle(handle), workspace, choices });
    libraries.insert(key, Arc::clone(&library));
    Ok(library)
}

/// Largest power of two that divides an address, up to what matters.
fn alignment(address: u64) -> u32 {
    1 << address.trailing_zeros().min(FULL_ALIGNMENT.trailing_zeros())
}

/// Whether the library has no kernel for what it was asked.
fn is_refusal(error: result::CublasError) -> bool {
    use sys::cublasStatus_t::{CUBLAS_STATUS_ARCH_MISMATCH, CUBLAS_STATUS_INVALID_VALUE, CUBLAS_STATUS_NOT_SUPPORTED};
    matches!(error.0, CUBLAS_STATUS_ARCH_MISMATCH | CUBLAS_STATUS_INVALID_VALUE | CUBLAS_STATUS_NOT_SUPPORTED)
}

impl Product {
    fn key(&self) -> Key {
        Key {
            sizes: [self.m, self.n, self.k],
            types: [self.a.dtype(), self.d.dtype()],
            sides: [self.a_side, self.b_side],
            strides: [self.a, self.b, self.c, self.d].map(|x| x.stride),
            alignments: [self.a, self.b, self.c, self.d].map(|x| alignment(x.address)),
            kind: self.kind,
            has_bias: self.bias.is_some(),
        }
    }

    fn beta(&self) -> f32 {
        if self.kind == Kind::No { 0.0 } else { 1.0 }
    }

    fn failed(&self, source: result::CublasError) -> Error {
        let Self { m, n, k, .. } = self;
        let (from, to, status) = (self.a.dtype(), self.d.dtype(), source.0);
        let sizes = format!("[{m}, {k}] x [{k}, {n}]");
        candle_core::Error::wrap(format!("matrix product {sizes} of {from:?} into {to:?}: cuBLASLt: {status:?}")).into()
    }

    /// Runs a product without a bias.
    fn run(&self, device: &Device, stream: &Arc<CudaStream>) -> Result<(), Error> {
        if self.run_fused(device, stream)? {
            return Ok(());
        }
        // Where only algorithms that may leave summands out were found, others are for the part without a rest, and for that.
        let Some(parts) = self.cut() else { return self.run_plain(device, stream) };
        for part in parts {
            if !part.run_fused(device, stream)? {
                part.run_plain(device, stream)?;
            }
        }
        Ok(())
    }

    /// The product of the first summands, a multiple of what algorithms take at a time, and that of the rest, which is added to
    /// it; `None` if there are no two such parts.
    fn cut(&self) -> Option<[Self; 2]> {
        let whole = self.k / SUMMANDS * SUMMANDS;
        let part = |first: usize, k: usize| Self {
            k,
            a: if self.a_side == Side::Plain { self.a.columns(first, k) } else { self.a.rows(first, k) },
            b: if self.b_side == Side::Plain { self.b.rows(first, k) } else { self.b.columns(first, k) },
            ..*self
        };
        let rest = Self { kind: Kind::Into, c: self.d, ..part(whole, self.k - whole) };
        (whole > 0 && whole < self.k).then(|| [part(0, whole), rest])
    }

    /// Runs through cuBLASLt; false if it has no kernel for this product, and nothing was done.
    fn run_fused(&self, device: &Device, stream: &Arc<CudaStream>) -> Result<bool, Error> {
        let library = library(device)?;
        let descriptors = match Descriptors::new(self) {
            Err(error) if is_refusal(error) => return Ok(false),
            descriptors => descriptors.map_err(|error| self.failed(error))?,
        };
        let key = self.key();
        let mut choices = locked(&library.choices);
        let chosen = match choices.algorithms.get(&key) {
            Some(chosen) => *chosen,
            None => library.choose(self, key, &descriptors, &mut choices, device, stream)?,
        };
        let Some(algorithm) = chosen else {
            return Ok(false);
        };
        let algorithm = library.used(self, key, &descriptors, algorithm, &mut choices, device, stream)?;
        match library.launch(self, &descriptors, &algorithm, stream) {
            Ok(()) => Ok(true),
            Err(error) if is_refusal(error) => {
                choices.algorithms.insert(key, None);
                Ok(false)
            }
            Err(error) => Err(self.failed(error)),
        }
    }

    /// Runs through cuBLAS, which has kernels for every alignment; without the bias.
    fn run_plain(&self, device: &Device, stream: &Arc<CudaStream>) -> Result<(), Error> {
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

impl Library {
    /// Chooses an algorithm for a product that has not been made yet; `None` if there is none.
    fn choose(
        &self,
        product: &Product,
        key: Key,
        descriptors: &Descriptors,
        choices: &mut Choices,
        device: &Device,
        stream: &Arc<CudaStream>,
    ) -> Result<Option<sys::cublasLtMatmulAlgo_t>, Error> {
        let like = key.of_like_sizes();
        let known = choices.tuned.get(&like).map(|tuned| tuned.algorithm);
        let chosen = if let Some(known) = known.filter(|known| self.takes(product, descriptors, known)) {
            Some(known)
        } else {
            let is_trial = choices.is_tuning && known.is_none();
            let count = if is_trial { MAX_CANDIDATES } else { 1 };
            let found = self.candidates(product, descriptors, count).map_err(|error| product.failed(error))?;
            if let [_, _, ..] = found[..] {
                let tuned = self.first_trial(product, descriptors, &found, device, stream)?;
                let chosen = tuned.as_ref().map(|tuned| tuned.algorithm);
                choices.tuned.extend(tuned.map(|tuned| (like, tuned)));
                chosen
            } else {
                found.first().copied()
            }
        };
        choices.algorithms.insert(key, chosen);
        Ok(chosen)
    }

    /// Counts a product that is about to be made and returns its algorithm, which may be another when that has been used for
    /// some time.
    #[expect(clippy::too_many_arguments, reason = "a product and all that it runs on")]
    fn used(
        &self,
        product: &Product,
        key: Key,
        descriptors: &Descriptors,
        algorithm: sys::cublasLtMatmulAlgo_t,
        choices: &mut Choices,
        device: &Device,
        stream: &Arc<CudaStream>,
    ) -> Result<sys::cublasLtMatmulAlgo_t, Error> {
        let like = key.of_like_sizes();
        let Some(tuned) = choices.tuned.get_mut(&like).filter(|tuned| tuned.algorithm.data == algorithm.data) else {
            return Ok(algorithm);
        };
        if !tuned.is_due() {
            return Ok(algorithm);
        }
        tuned.decide(self.second_trial(product, descriptors, tuned, device, stream)?);
        let chosen = tuned.algorithm;
        choices.algorithms.retain(|key, _| key.of_like_sizes() != like);
        choices.algorithms.insert(key, Some(chosen));
        Ok(chosen)
    }

    fn launch(
        &self,
        product: &Product,
        descriptors: &Descriptors,
        algorithm: &sys::cublasLtMatmulAlgo_t,
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

/// Adds `bias` to each row of what `accumulate` names, as a product with a column of ones.
fn add_to_rows(device: &Device, d: Matrix, bias: Pointer, accumulate: Accumulate) -> Result<(), Error> {
    let ones = Tensor::ones((d.rows, 1), d.dtype(), device)?;
    let bias = Matrix { address: bias.address, dtype: d.dtype(), rows: 1, cols: d.cols, stride: d.cols };
    gemm(device, d, (matrix(&ones)?, Side::Plain), (bias, Side::Plain), 1.0, accumulate, None)
}

fn zero(stream: &Arc<CudaStream>, d: Matrix) -> Result<(), Error> {
    let size = d.dtype().size_in_bytes();
    let pitch = d.stride.max(d.cols) * size;
    // SAFETY: the rows of a live device tensor; the stream orders the writes.
    let done = unsafe { cuMemsetD2D8Async(d.address, pitch, 0, d.cols * size, d.rows, stream.cu_stream()) };
    done.result().map_err(failed("clearing a matrix"))
}

/// Copies `from` to `to`; both have one shape and type.
fn copy(stream: &Arc<CudaStream>, to: Matrix, from: Matrix) -> Result<(), Error> {
    let size = to.dtype().size_in_bytes();
    let rows = CUDA_MEMCPY2D {
        srcXInBytes: 0,
        srcY: 0,
        srcMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
        srcHost: std::ptr::null(),
        srcDevice: from.address,
        srcArray: std::ptr::null_mut(),
        srcPitch: from.stride.max(from.cols) * size,
        dstXInBytes: 0,
        dstY: 0,
        dstMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
        dstHost: std::ptr::null_mut(),
        dstDevice: to.address,
        dstArray: std::ptr::null_mut(),
        dstPitch: to.stride.max(to.cols) * size,
        WidthInBytes: to.cols * size,
        Height: to.rows,
    };
    // SAFETY: the rows of two live device tensors; the stream orders reads and writes.
    let done = unsafe { cuMemcpy2DAsync_v2(&raw const rows, stream.cu_stream()) };
    done.result().map_err(failed("copying a matrix"))
}
