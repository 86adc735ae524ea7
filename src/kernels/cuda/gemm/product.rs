//! A matrix product: what is asked for, checked, and how it is made.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use cudarc::cublaslt::result;
use cudarc::driver::CudaStream;
use cudarc::driver::sys::{CUDA_MEMCPY2D, CUmemorytype, cuMemcpy2DAsync_v2, cuMemsetD2D8Async};

use super::choose::{Key, SUMMANDS};
use super::descriptors::Descriptors;
use super::lt::{is_refusal, library};
use crate::device::{Error, Matrix, Pointer, argument, cuda, failed, matrix};
use crate::kernels::cuda::products::{Accumulate, Side};

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
    if let Some(bias) = bias.filter(|bias| bias.len != n || bias.dtype() != d.dtype()) {
        return Err(argument("gemm", "bias", bias, (n, d.dtype())));
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

/// Alignment in bytes from which on kernels do not differ.
pub(super) const FULL_ALIGNMENT: u32 = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    No,
    Into,
    Onto,
}

/// A product with at least one row, column and summand whose arguments fit.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product<'b> {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) d: Matrix<'b>,
    /// `d` itself unless the kind is `Onto`.
    pub(super) c: Matrix<'b>,
    pub(super) a: Matrix<'b>,
    pub(super) b: Matrix<'b>,
    pub(super) a_side: Side,
    pub(super) b_side: Side,
    pub(super) alpha: f32,
    pub(super) kind: Kind,
    pub(super) bias: Option<Pointer<'b>>,
}

/// Largest power of two that divides an address, up to what matters.
pub(super) fn alignment(address: u64) -> u32 {
    1 << address.trailing_zeros().min(FULL_ALIGNMENT.trailing_zeros())
}

impl Product<'_> {
    pub(super) fn key(&self) -> Key {
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

    pub(super) fn beta(&self) -> f32 {
        if self.kind == Kind::No { 0.0 } else { 1.0 }
    }

    pub(super) fn failed(&self, source: result::CublasError) -> Error {
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
        let Some(algorithm) = library.algorithm_of(self, key, &descriptors)? else {
            return Ok(false);
        };
        match library.launch(self, &descriptors, &algorithm, stream) {
            Ok(()) => Ok(true),
            Err(error) if is_refusal(error) => {
                library.has_none(key);
                Ok(false)
            }
            Err(error) => Err(self.failed(error)),
        }
    }
}

/// Adds `bias` to each row of what `accumulate` names, as a product with a column of ones.
fn add_to_rows(device: &Device, d: Matrix, bias: Pointer, accumulate: Accumulate) -> Result<(), Error> {
    let ones = Tensor::ones((d.rows, 1), d.dtype(), device)?;
    let bias =
        Matrix { address: bias.address, dtype: d.dtype(), rows: 1, cols: d.cols, stride: d.cols, lent: bias.lent };
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
pub(super) fn copy(stream: &Arc<CudaStream>, to: Matrix, from: Matrix) -> Result<(), Error> {
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
