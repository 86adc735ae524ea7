//! Products of few rows straight from packed weights.

use candle_core::{DType, Device};

use super::checks::expect_array;
use super::gguf::GgufKind;
use super::launch::{RawMatrix, RawStream, address_or_none, kernels, launched, stream};
use super::nf4::{MAP_LEN, NESTED_BLOCK, Nf4Absmax, Nf4View};
use super::packed_gguf;
use super::product_form::{CODES, CODES_GROUPS, CODES_STREAM, GROUPS, ProductForm, STREAM_ROWS};
use super::row_layout::{CHUNK, RowLayout, Rows};
use crate::device::{Error, Matrix, Pointer, argument, multiprocessors};
use crate::kernels::cpu::codebook::BLOCK_LEN;

/// Matrices that one launch multiplies.
const MOST_MATRICES: usize = 3;
/// Ranks of an adapter are a multiple of this; what is missing is zeros.
pub const RANK_STEP: usize = 16;

kernels! {
    // Of `packed_product.cu`.
    fn trainer_packed_product(
        product: *const RawProduct,
        format: i32,
        form: i32,
        is_swiglu: i32,
        tiles: i32,
        stream: RawStream,
    ) -> i32;
    // Of `packed_codes.cu`.
    fn trainer_packed_codes(
        product: *const RawProduct,
        form: i32,
        is_swiglu: i32,
        tiles: i32,
        stream: RawStream,
    ) -> i32;
    // Of `packed_codes_sm90.cu`.
    fn trainer_packed_codes_sm90(
        product: *const RawProduct,
        groups: i32,
        is_swiglu: i32,
        tiles: i32,
        stream: RawStream,
    ) -> i32;
    // Of `packed_codes_stream_sm90.cu`.
    fn trainer_packed_codes_stream_sm90(product: *const RawProduct, blocks: i32, stream: RawStream) -> i32;
    // Of `packed_product_sm90.cu`.
    fn trainer_packed_product_sm90(
        product: *const RawProduct,
        format: i32,
        is_swiglu: i32,
        tiles: i32,
        stream: RawStream,
    ) -> i32;
}

/// `Packed` of `packed_product.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RawPacked {
    data: u64,
    absmax: u64,
    codes: u64,
    nested: u64,
    map: u64,
    values: u64,
    b: u64,
    bias: u64,
    offset: f32,
    rows: i32,
    rank: i32,
    first_low: i32,
}

/// `Product` of `packed_product.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct RawProduct {
    w: [RawPacked; MOST_MATRICES],
    x: RawMatrix,
    residual: RawMatrix,
    out: RawMatrix,
    low: u64,
    partial: u64,
    arrived: u64,
    count: i32,
    low_cols: i32,
    splits: i32,
    whole: i32,
    waits_late: i32,
}

/// Weights as they lie.
#[derive(Clone, Copy, Debug)]
pub enum PackedWeights<'b> {
    /// 4-bit codes of `[rows, cols]`.
    Nf4 {
        /// Codes and maxima.
        view: Nf4View<'b>,
        /// `O`.
        rows: usize,
        /// `K`.
        cols: usize,
    },
    /// 16-bit values `[O, K]`, without gaps between rows.
    Dense(Matrix<'b>),
    /// Blocks of a GGUF format, as they are stored.
    Gguf {
        /// The format.
        kind: GgufKind,
        /// u8, all rows.
        blocks: Pointer<'b>,
        /// `O`.
        rows: usize,
        /// `K`.
        cols: usize,
    },
}

/// One matrix of a product, with what belongs to its outputs.
#[derive(Clone, Copy, Debug)]
pub struct PackedOperand<'b> {
    /// `[O, K]`.
    pub weights: PackedWeights<'b>,
    /// f32 `[O]`.
    pub bias: Option<Pointer<'b>>,
    /// The scaled `B` of an adapter: `[O, r]` of the type of `x`, `r` a multiple of [`RANK_STEP`], and the first of its columns
    /// among the low-rank products.
    pub adapter: Option<(Matrix<'b>, usize)>,
}

/// Low-rank products `x Aᵀ`: `[M, cols]` of the type of `x`.
#[derive(Clone, Copy, Debug)]
pub struct LowRank<'b> {
    /// The values.
    pub values: Pointer<'b>,
    /// Low-rank products of a row.
    pub cols: usize,
    /// Whether the launch just before this one makes them, from the same rows.
    pub is_fresh: bool,
}

/// Where a product goes.
#[derive(Clone, Copy, Debug)]
pub enum ProductOutput<'b> {
    /// `[M, O]` of all matrices side by side; with a residual stream it is added.
    Sum {
        /// The result.
        out: Matrix<'b>,
        /// What it is added to; may be `out`.
        onto: Option<Matrix<'b>>,
    },
    /// `silu(x W0ᵀ) · x W1ᵀ` of two matrices: `[M, O]`.
    Swiglu(Rows<'b>),
}

/// Memory that products use while they run: one product at a time.
#[derive(Clone, Copy, Debug)]
pub struct ProductWorkspace<'b> {
    /// f32.
    pub partial: Pointer<'b>,
    /// u32, zeros.
    pub arrived: Pointer<'b>,
}

impl PackedWeights<'_> {
    /// `(O, K)`.
    pub fn shape(&self) -> (usize, usize) {
        match self {
            Self::Nf4 { rows, cols, .. } | Self::Gguf { rows, cols, .. } => (*rows, *cols),
            Self::Dense(matrix) => matrix.shape(),
        }
    }

    /// Weights of one format are multiplied together. Numbered as in `packed_product.cuh`; -1: a GGUF type that is plain floats.
    pub fn format(&self, dtype: DType) -> i32 {
        match self {
            Self::Gguf { kind, .. } => packed_gguf::format(*kind).unwrap_or(-1),
            Self::Nf4 { view: Nf4View { absmax: Nf4Absmax::Plain(_), .. }, .. } => 0,
            Self::Nf4 { .. } => 1,
            Self::Dense(matrix) => {
                if matrix.dtype() == dtype {
                    2
                } else {
                    3
                }
            }
        }
    }

    /// Whether the kernels can read them for products of activations of type `dtype`.
    pub fn fits(&self, dtype: DType) -> bool {
        let (rows, cols) = self.shape();
        let is_aligned = match self {
            Self::Nf4 { view, .. } => view.packed.address.is_multiple_of(16),
            Self::Gguf { kind, blocks, .. } => {
                blocks.address.is_multiple_of(16)
                    && packed_gguf::format(*kind).is_some()
                    && kind.bytes_of(cols).is_some()
            }
            Self::Dense(matrix) => {
                matches!(matrix.dtype(), DType::BF16 | DType::F16)
                    && matrix.stride == cols
                    && matrix.address.is_multiple_of(16)
            }
        };
        is_aligned
            && rows > 0
            && rows.is_multiple_of(8)
            && cols.is_multiple_of(CHUNK)
            && matches!(dtype, DType::BF16 | DType::F16)
    }

    fn raw(&self) -> Result<RawPacked, Error> {
        const KERNEL: &str = "packed product";
        let (rows, cols) = self.shape();
        let raw = RawPacked { rows: rows as i32, ..RawPacked::default() };
        match self {
            Self::Dense(matrix) => Ok(RawPacked { data: matrix.address, ..raw }),
            Self::Gguf { kind, blocks, .. } => {
                expect_array(KERNEL, "blocks", *blocks, DType::U8, rows * kind.bytes_of(cols).unwrap_or(0))?;
                Ok(RawPacked { data: blocks.address, ..raw })
            }
            Self::Nf4 { view, .. } => {
                let blocks = rows * cols / BLOCK_LEN;
                expect_array(KERNEL, "packed", view.packed, DType::U8, rows * cols / 2)?;
                expect_array(KERNEL, "values", view.values, DType::F32, 16)?;
                let raw = RawPacked { data: view.packed.address, values: view.values.address, ..raw };
                match view.absmax {
                    Nf4Absmax::Plain(absmax) => {
                        expect_array(KERNEL, "absmax", absmax, DType::F32, blocks)?;
                        Ok(RawPacked { absmax: absmax.address, ..raw })
                    }
                    Nf4Absmax::Nested { codes, absmax, map, offset } => {
                        expect_array(KERNEL, "codes", codes, DType::U8, blocks)?;
                        expect_array(KERNEL, "nested absmax", absmax, DType::F32, blocks.div_ceil(NESTED_BLOCK))?;
                        expect_array(KERNEL, "map", map, DType::F32, MAP_LEN)?;
                        let (codes, nested, map) = (codes.address, absmax.address, map.address);
                        Ok(RawPacked { codes, nested, map, offset, ..raw })
                    }
                }
            }
        }
    }
}

impl ProductOutput<'_> {
    /// The result, and what it is added to, of the rows `x` and matrices of so many `rows`.
    fn raw(self, rows: &[usize], x: &Rows<'_>) -> Result<(RawMatrix, RawMatrix), Error> {
        const KERNEL: &str = "packed product";
        let (m, all) = (x.shape().0, rows.iter().sum());
        match self {
            ProductOutput::Sum { out, onto } => {
                let fits = |matrix: Matrix<'_>| {
                    let size = matrix.dtype().size_in_bytes();
                    let is_aligned = matrix.stride.is_multiple_of(8) && matrix.address.is_multiple_of(8 * size as u64);
                    matrix.shape() == (m, all) && is_aligned
                };
                if !fits(out) || !onto.is_none_or(fits) {
                    return Err(argument(KERNEL, "out", (out, onto), format!("[{m}, {all}], eight values aligned")));
                }
                Ok((out.into(), RawMatrix::or_none(onto)))
            }
            ProductOutput::Swiglu(out) => {
                if rows.len() != 2 || rows[0] != rows[1] || out.shape() != (m, rows[0]) || out.dtype() != x.dtype() {
                    let expected = format!("[{m}, {}] of two matrices of one shape", rows[0]);
                    return Err(argument(KERNEL, "out", out.shape(), expected));
                }
                Ok((out.raw(), RawMatrix::NONE))
            }
        }
    }
}

/// Multiplies a few rows by packed weights of one format: `y = x Wᵀ + low sBᵀ + bias (+ onto)`.
///
/// A 16-bit value of the weights is as it is, one of GGUF blocks has the bits that [`super::dequantize_gguf`] gives it in the type of
/// `x` (a zero may have the other sign); of codes, see `packed_codes.cuh`: f16 operands, nearer to the exact values than training's
/// bf16. Sums are f32, in an order that depends on the form and on the shape of `W`, not on the number of rows.
///
/// # Shapes
/// `x`: f16 or bf16 `[M, K]`, K a multiple of 128, in the layout of the form, for codes scaled ([`Rows::scaled`]); `group`: one to three `[O, K]`.
///
/// # Errors
/// If shapes or types do not fit, the workspace is smaller than [`ProductForm::workspace`] says, or the launch fails.
pub fn packed_product(
    device: &Device,
    group: &[PackedOperand<'_>],
    x: Rows<'_>,
    low: Option<LowRank<'_>>,
    to: ProductOutput<'_>,
    form: ProductForm,
    workspace: ProductWorkspace<'_>,
) -> Result<(), Error> {
    const KERNEL: &str = "packed product";
    let refuse = |what, got: (usize, usize), expected: String| argument(KERNEL, what, got, expected);
    let (m, k) = x.shape();
    let form = form.with_ranks(low.map_or(0, |low| low.cols));
    let Some(first) = group.first().filter(|_| group.len() <= MOST_MATRICES) else {
        return Err(argument(KERNEL, "group", group.len(), format!("1 to {MOST_MATRICES} matrices")));
    };
    let is_codes = matches!(first.weights, PackedWeights::Nf4 { .. });
    let is_grouped = form.form == GROUPS || CODES_GROUPS.contains(&form.form);
    let is_read = is_grouped == matches!(x.layout(), RowLayout::Tiles(_)) && is_codes == (form.form >= CODES);
    if x.layout() == RowLayout::Plain || !is_read || is_codes != x.is_scaled() {
        return Err(argument(KERNEL, "x", x, format!("rows in the order that form {} reads", form.form)));
    }
    let rows: Vec<usize> = group.iter().map(|operand| operand.weights.shape().0).collect();
    let mut w = [RawPacked::default(); MOST_MATRICES];
    for (raw, operand) in w.iter_mut().zip(group) {
        let (rows, cols) = operand.weights.shape();
        if cols != k
            || !operand.weights.fits(x.dtype())
            || operand.weights.format(x.dtype()) != first.weights.format(x.dtype())
        {
            let expected = format!("aligned weights of one format with {k} columns, a multiple of {CHUNK}");
            return Err(refuse("weights", (rows, cols), expected));
        }
        *raw = operand.weights.raw()?;
        if let Some(bias) = operand.bias {
            expect_array(KERNEL, "bias", bias, DType::F32, rows)?;
        }
        raw.bias = address_or_none(operand.bias);
        if let Some((b, first_low)) = operand.adapter {
            let cols = low.map_or(0, |low| low.cols);
            let is_packed = b.stride == b.cols && b.address.is_multiple_of(16) && b.dtype() == x.dtype();
            if b.rows != rows || !b.cols.is_multiple_of(RANK_STEP) || first_low + b.cols > cols || !is_packed {
                let expected = format!("[{rows}, r], r a multiple of {RANK_STEP}, its low-rank products among {cols}");
                return Err(refuse("adapter", b.shape(), expected));
            }
            (raw.b, raw.rank, raw.first_low) = (b.address, b.cols as i32, first_low as i32);
        }
    }
    if let Some(low) = low {
        expect_array(KERNEL, "low", low.values, x.dtype(), m * low.cols)?;
    }
    let is_swiglu = matches!(to, ProductOutput::Swiglu(_));
    let (out, residual) = to.raw(&rows, &x)?;
    if matches!(first.weights, PackedWeights::Gguf { .. }) && !packed_gguf::has_form(form.form, x.layout()) {
        return Err(argument(KERNEL, "form", form.form, "one that multiplies GGUF blocks, with rows in its order"));
    }
    if form.form == CODES_STREAM && (!is_swiglu || m > STREAM_ROWS) {
        return Err(argument(
            KERNEL,
            "form",
            form,
            format!("one for this product: this is SwiGLU of up to {STREAM_ROWS} rows"),
        ));
    }
    let tiles = form.tiles(&rows, is_swiglu, x.layout());
    if form.splits == 0 || form.splits > k / CHUNK || form.whole > tiles {
        return Err(argument(KERNEL, "form", form, format!("1 to {} parts of up to {tiles} tiles", k / CHUNK)));
    }
    let (floats, counters) = form.workspace(m, &rows, is_swiglu, x.layout());
    expect_array(KERNEL, "workspace", workspace.partial, DType::F32, floats)?;
    expect_array(KERNEL, "counters", workspace.arrived, DType::U32, counters)?;
    let raw = RawProduct {
        w,
        x: x.raw(),
        residual,
        out,
        low: low.map_or(0, |low| low.values.address),
        partial: workspace.partial.address,
        arrived: workspace.arrived.address,
        count: group.len() as i32,
        low_cols: low.map_or(0, |low| low.cols as i32),
        splits: form.splits as i32,
        whole: form.whole as i32,
        waits_late: i32::from(low.is_some_and(|low| low.is_fresh)),
    };
    // SAFETY: all addresses are views of live device memory whose lengths and shapes were checked; the description is copied
    // before the call returns; the stream orders the accesses.
    let code = unsafe {
        let (format, is_swiglu, tiles, stream) =
            (first.weights.format(x.dtype()), i32::from(is_swiglu), tiles as i32, stream(device)?);
        match (first.weights, form.form) {
            (PackedWeights::Gguf { kind, .. }, form) => packed_gguf::launch(&raw, kind, form, is_swiglu, tiles, stream),
            (_, GROUPS) => trainer_packed_product_sm90(&raw const raw, format, is_swiglu, tiles, stream),
            (_, CODES_STREAM) => {
                trainer_packed_codes_stream_sm90(&raw const raw, multiprocessors(device)? as i32, stream)
            }
            (_, form) if is_grouped => {
                let groups = (form - CODES_GROUPS[0] + 1) as i32;
                trainer_packed_codes_sm90(&raw const raw, groups, is_swiglu, tiles, stream)
            }
            (_, form) if is_codes => {
                trainer_packed_codes(&raw const raw, (form - CODES) as i32, is_swiglu, tiles, stream)
            }
            (_, form) => trainer_packed_product(&raw const raw, format, form as i32, is_swiglu, tiles, stream),
        }
    };
    launched(KERNEL, code)
}
