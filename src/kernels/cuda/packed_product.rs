//! Products of few rows straight from packed weights.

use candle_core::{DType, Device};

use super::checks::expect_array;
use super::gguf::GgufKind;
use super::launch::{RawMatrix, RawStream, address_or_none, kernels, launched, stream};
use super::nf4::{MAP_LEN, NESTED_BLOCK, Nf4Absmax, Nf4View};
use super::packed_gguf;
use super::row_layout::{CHUNK, ProductCard, RowLayout, Rows, WeightKind};
use crate::device::{Error, Matrix, Pointer, argument};
use crate::kernels::cpu::codebook::BLOCK_LEN;

/// Matrices that one launch multiplies.
const MOST_MATRICES: usize = 3;
/// Ranks of an adapter are a multiple of this; what is missing is zeros.
pub const RANK_STEP: usize = 16;
/// Parts into which a sum is cut.
const MOST_SPLITS: usize = 16;
/// Chunks whose maxima a block of a warp group holds.
const MOST_GROUP_CHUNKS: usize = 30;
/// Columns from which a warp has enough of a sum for more rows.
const LONG_SUM: usize = 8192;
/// Chunks that a part of a sum has at least, on warp groups.
const LEAST_CHUNKS: usize = 4;

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
    low_parts: i32,
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

/// Low-rank products `x Aᵀ` in parts that are yet to be added: f32 `[parts, M, cols]`.
#[derive(Clone, Copy, Debug)]
pub struct LowRank<'b> {
    /// The values.
    pub values: Pointer<'b>,
    /// How many parts.
    pub parts: usize,
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

/// How a product is cut: see `packed_product.cu`, `packed_codes.cu` and those for warp groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProductForm {
    /// The kernel's form.
    pub form: usize,
    /// Parts of the sum.
    pub splits: usize,
    /// Tiles from the first whose sum is not cut nevertheless.
    pub whole: usize,
}

/// The kernel for warp groups.
pub(super) const GROUPS: usize = 6;
/// The kernel's forms for 4-bit codes begin with this one; these two are for blocks of one and two warp groups.
const CODES: usize = 10;
const CODES_GROUPS: [usize; 2] = [17, 18];

impl ProductForm {
    /// Outputs of each matrix and rows of `x` that a block has, its rows of `W`, and its warps along the sum.
    fn tile(self, is_swiglu: bool, layout: RowLayout) -> Block {
        let (rows, cols, warps) = match self.form {
            0 => (if is_swiglu { 32 } else { 16 }, 8, 8),
            1 => (32, 8, 8),
            2 => (64, 16, 4),
            3 => (128, 32, 2),
            4 => (128, 64, 2),
            10 => (16, 8, 8),
            11 => (64, 8, 4),
            12 => (64, 16, 4),
            13 => (128, 32, 2),
            14 => (128, 64, 2),
            15 => (32, 8, 8),
            18 => (128, layout.rows(64), 1),
            _ => (64, layout.rows(64), 1),
        };
        Block { outputs: if is_swiglu { rows / 2 } else { rows }, rows, cols, warps }
    }

    /// The form for `m` rows of `x` in a layout: enough blocks for all multiprocessors, no more reading than needed.
    pub fn choose(
        m: usize,
        rows: &[usize],
        cols: usize,
        (kind, weights): (ProductKind, WeightKind),
        layout: RowLayout,
        card: ProductCard,
    ) -> Self {
        let (is_swiglu, is_codes) = (kind == ProductKind::Swiglu, weights == WeightKind::Codes);
        let all: usize = rows.iter().sum();
        let is_large = is_codes && is_swiglu || all.div_ceil(32) >= 4 * card.multiprocessors;
        let form = match (layout, m) {
            _ if weights == WeightKind::Blocks => packed_gguf::form(m, layout, card),
            (RowLayout::Tiles(_), _) if is_codes => return Self::of_groups(m, rows, cols, is_swiglu, layout, card),
            (RowLayout::Tiles(_), _) => GROUPS,
            (_, 0..=8) if is_codes && !is_large && cols >= LONG_SUM => 5,
            (_, 0..=8) => usize::from(is_large),
            (_, 9..=16) => 2,
            (_, 17..=32) => 3,
            _ if card.has_large_blocks => 4,
            _ => 3,
        };
        let form = if is_codes { CODES + form } else { form };
        Self::cut(form, (m, rows, cols), kind, layout, card)
    }

    /// A form with its sum cut into as many parts as take the least time.
    fn cut(
        form: usize,
        (m, rows, cols): (usize, &[usize], usize),
        kind: ProductKind,
        layout: RowLayout,
        card: ProductCard,
    ) -> Self {
        let is_swiglu = kind == ProductKind::Swiglu;
        let chunks = cols / CHUNK;
        let block = Self::whole(form).tile(is_swiglu, layout);
        let blocks = Self::whole(form).tiles(rows, is_swiglu, layout) * m.div_ceil(block.cols);
        // Half steps: those that the busiest multiprocessor makes one after the other, or, where its blocks are too few to hide a
        // step's latency, those of a block alone, for each round of blocks; and what adding the sums of several takes.
        let Pace { resident, latency, end } = Pace::of(form, block.cols);
        let cost = |splits: usize| {
            let of_card = (blocks * splits).div_ceil(card.multiprocessors);
            let steps = chunks.div_ceil(splits).div_ceil(block.warps);
            let busy = (2 * of_card * steps).max(of_card.div_ceil(resident) * steps * latency);
            busy + if splits > 1 { of_card * end } else { 0 }
        };
        let most = (chunks / block.warps).clamp(1, MOST_SPLITS);
        let least = if form == GROUPS { chunks.div_ceil(MOST_GROUP_CHUNKS) } else { 1 };
        let splits = (least..=most.max(least)).min_by_key(|&splits| cost(splits)).unwrap_or(1);
        Self { splits, ..Self::whole(form) }
    }

    /// A form that cuts no sum.
    fn whole(form: usize) -> Self {
        Self { form, splits: 1, whole: 0 }
    }

    /// The form of the kernel for warp groups and 4-bit codes: whole tiles for as many rounds of all multiprocessors as they fill, and
    /// the rest cut so that one more round, shorter by as much, is full too.
    fn of_groups(m: usize, rows: &[usize], cols: usize, is_swiglu: bool, layout: RowLayout, card: ProductCard) -> Self {
        // Blocks at a time, in halves of a multiprocessor; as measured on an H200 with matrices of a 7B model.
        let places = |groups: usize| {
            let halves = match layout.rows(m) {
                ..=16 => 8 / groups,
                17..=32 => 6 - groups,
                33..=64 => 4,
                _ => 2,
            };
            card.multiprocessors * halves / 2
        };
        let tiles = |form| Self::whole(form).tiles(rows, is_swiglu, layout);
        // Two groups share what is read of `x`; where that leaves multiprocessors without a tile, one has its own.
        let [one, two] = CODES_GROUPS;
        let is_small = layout.rows(m) <= 64 && tiles(two) < card.multiprocessors;
        let (form, places) = if is_small { (one, places(1)) } else { (two, places(2)) };
        let (tiles, chunks) = (tiles(form), cols / CHUNK);
        let whole = tiles / places * places;
        let parts = if tiles == whole { 1 } else { places / (tiles - whole) };
        // A part is worth its sums' way through memory if it has a few chunks.
        Self { form, splits: parts.clamp(1, (chunks / LEAST_CHUNKS).clamp(1, MOST_SPLITS)), whole }
    }

    fn tiles(self, rows: &[usize], is_swiglu: bool, layout: RowLayout) -> usize {
        let Block { outputs, .. } = self.tile(is_swiglu, layout);
        if is_swiglu {
            rows.first().map_or(0, |rows| rows.div_ceil(outputs))
        } else {
            rows.iter().map(|rows| rows.div_ceil(outputs)).sum()
        }
    }

    /// Floats and counters of the workspace for `m` rows of `x`.
    pub fn workspace(self, m: usize, rows: &[usize], is_swiglu: bool, layout: RowLayout) -> (usize, usize) {
        if self.splits == 1 {
            return (0, 0);
        }
        let block = self.tile(is_swiglu, layout);
        let places = (self.tiles(rows, is_swiglu, layout) - self.whole) * m.div_ceil(block.cols);
        (self.splits * places * block.rows * block.cols, places)
    }
}

/// How blocks of a form share a multiprocessor, as measured on an H200 with matrices of a 7B model: how many there are at a time,
/// and, in half steps, how long a step takes by itself and what adding the sums of several blocks takes for each.
#[derive(Clone, Copy, Debug)]
struct Pace {
    resident: usize,
    latency: usize,
    end: usize,
}

impl Pace {
    fn of(form: usize, cols: usize) -> Self {
        let (resident, latency, end) = match (form, cols) {
            (0, _) => (8, 6, 2),
            (1, _) => (3, 6, 2),
            (2..=4, _) => (2, 6, 6),
            (10, _) => (3, 6, 2),
            (11 | 15, _) => (3, 6, 2),
            (12..=14, _) => (2, 6, 6),
            (_, 0..=32) => (4, 7, 4),
            (_, 33..=64) => (4, 5, 8),
            (_, 65..=128) => (3, 4, 16),
            _ => (2, 3, 32),
        };
        Self { resident, latency, end }
    }
}

/// What a block of a form has.
#[derive(Clone, Copy, Debug)]
struct Block {
    outputs: usize,
    rows: usize,
    cols: usize,
    warps: usize,
}

/// What a product makes, as far as its form depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProductKind {
    /// [`ProductOutput::Sum`]
    Sum,
    /// [`ProductOutput::Swiglu`]
    Swiglu,
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
    let all: usize = rows.iter().sum();
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
        expect_array(KERNEL, "low", low.values, DType::F32, low.parts * m * low.cols)?;
    }
    let is_swiglu = matches!(to, ProductOutput::Swiglu(_));
    let (out, residual) = match to {
        ProductOutput::Sum { out, onto } => {
            let fits = |matrix: Matrix<'_>| {
                let size = matrix.dtype().size_in_bytes();
                let is_aligned = matrix.stride.is_multiple_of(8) && matrix.address.is_multiple_of(8 * size as u64);
                matrix.shape() == (m, all) && is_aligned
            };
            if !fits(out) || !onto.is_none_or(fits) {
                return Err(argument(KERNEL, "out", (out, onto), format!("[{m}, {all}], eight values aligned")));
            }
            (out.into(), RawMatrix::or_none(onto))
        }
        ProductOutput::Swiglu(out) => {
            if group.len() != 2 || rows[0] != rows[1] || out.shape() != (m, rows[0]) || out.dtype() != x.dtype() {
                return Err(refuse("out", out.shape(), format!("[{m}, {}] of two matrices of one shape", rows[0])));
            }
            (out.raw(), RawMatrix::NONE)
        }
    };
    if matches!(first.weights, PackedWeights::Gguf { .. }) && !packed_gguf::has_form(form.form, x.layout()) {
        return Err(argument(KERNEL, "form", form.form, "one that multiplies GGUF blocks, with rows in its order"));
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
        low_parts: low.map_or(0, |low| low.parts as i32),
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

#[cfg(test)]
mod tests {
    use super::{CHUNK, ProductCard, ProductForm, ProductKind, RowLayout, WeightKind};

    fn cards() -> [ProductCard; 3] {
        [(132, true, true), (68, false, true), (36, false, false)].map(
            |(multiprocessors, has_groups, has_large_blocks)| ProductCard {
                multiprocessors,
                has_groups,
                has_large_blocks,
            },
        )
    }

    #[test]
    fn every_shape_of_the_family_has_a_form_whose_parts_cover_the_sum() {
        let shapes = [896, 1024, 1536, 2048, 2560, 3584, 4096, 5120, 8192];
        let inner = [3072, 4864, 8960, 9728, 11_008, 12_288, 13_824, 17_408, 18_944, 25_600, 27_648, 29_568];
        for card in cards() {
            for (hidden, m) in shapes.into_iter().chain(inner).flat_map(|k| [1, 8, 17, 64, 256].map(|m| (k, m))) {
                for (rows, kind) in
                    [(vec![hidden, 512, 512], ProductKind::Sum), (vec![hidden, hidden], ProductKind::Swiglu)]
                {
                    for weights in [WeightKind::Dense, WeightKind::Codes] {
                        let layout = RowLayout::choose(m, rows.iter().sum(), weights, card);
                        assert!(layout.rows(m) >= m);
                        let form = ProductForm::choose(m, &rows, hidden, (kind, weights), layout, card);
                        assert!((1..=hidden / CHUNK).contains(&form.splits), "{form:?} for {hidden}, {m} rows");
                        let (floats, places) = form.workspace(m, &rows, kind == ProductKind::Swiglu, layout);
                        assert_eq!(floats == 0, places == 0);
                        let tiles = form.tiles(&rows, kind == ProductKind::Swiglu, layout);
                        assert!(form.whole <= tiles && (form.whole < tiles || form.splits == 1), "{form:?} of {tiles}");
                    }
                }
            }
        }
    }
}
