//! What a decoding step does beside its products and attention: norms and heads. Everything reads where the
//! lanes stand from [`LanesView`], so that a step can be recorded and repeated.

use candle_core::{DType, Device};

use super::checks::{expect_array, expect_shape};
use super::lanes::LanesView;
use super::launch::{RawMatrix, RawStream, address_or_none, kernels, launched, stream};
use super::packed_product::ProductWorkspace;
use super::paged_attention::{LANE_SPLIT_KEYS, PagedCache, decode_attention_workspace, lane_splits};
use super::row_layout::Rows;
use crate::device::{Error, Matrix, Pointer, argument};

/// Columns of a row that a norm holds.
const MOST_COLUMNS: usize = 16_384;

kernels! {
    // Of `decode.cu`.
    fn trainer_decode_norm(
        y: RawMatrix,
        x: RawMatrix,
        weight: u64,
        eps: f32,
        stream: RawStream,
    ) -> i32;
    fn trainer_decode_low(x: RawMatrix, low: *const RawLowRank, stream: RawStream) -> i32;
    fn trainer_decode_combine(combine: *const RawCombine, stream: RawStream) -> i32;
    fn trainer_decode_heads(heads: *const RawHeads, stream: RawStream) -> i32;
}

/// `LowRank` of `decode.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct RawLowRank {
    a: u64,
    low: u64,
    partial: u64,
    arrived: u64,
    ranks: i32,
    cols: i32,
    parts: i32,
    unused: i32,
}

/// `Combine` of `decode.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct RawCombine {
    out: RawMatrix,
    partial: u64,
    rows: u64,
    heads: i32,
    d: i32,
    splits: i32,
    split_keys: i32,
}

/// `Heads` of `decode.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct RawHeads {
    qkv: RawMatrix,
    q_norm: u64,
    k_norm: u64,
    table: u64,
    keys: u64,
    values: u64,
    tables: u64,
    rows: u64,
    eps: f32,
    heads: i32,
    kv_heads: i32,
    d: i32,
    page_tokens: i32,
    unused: i32,
}

/// Norms rows: `x / sqrt(mean(x²) + eps) · w`.
///
/// # Shapes
/// `x`, `to`: `[M, D]`, D a multiple of 8 up to 16,384, `to` f16 or bf16, `x` of its type or f32; `weight`: f32 `[D]`.
///
/// # Errors
/// If shapes or types do not fit or the launch fails.
pub fn decode_norm(device: &Device, to: Rows<'_>, x: Matrix<'_>, weight: Pointer<'_>, eps: f32) -> Result<(), Error> {
    const KERNEL: &str = "decode norm";
    let y = to.memory();
    expect_shape(KERNEL, "y", &y, x.rows, x.cols)?;
    expect_array(KERNEL, "weight", weight, DType::F32, x.cols)?;
    let bytes = |m: &Matrix| m.dtype().size_in_bytes();
    let is_aligned = |m: &Matrix| {
        let pack = (8 * bytes(m)) as u64;
        m.address.is_multiple_of(pack) && (m.stride * bytes(m)).is_multiple_of(8 * bytes(m))
    };
    let fits = x.cols.is_multiple_of(8) && x.cols <= MOST_COLUMNS && weight.address.is_multiple_of(32);
    if !fits || !is_aligned(&x) || !is_aligned(&y) {
        return Err(argument(KERNEL, "x", (x, y), format!("aligned rows of a multiple of 8, at most {MOST_COLUMNS}")));
    }
    // SAFETY: views of live device memory whose shapes were checked; the stream orders the accesses.
    launched(KERNEL, unsafe { trainer_decode_norm(to.raw(), x.into(), weight.address, eps, stream(device)?) })
}

/// Columns of a part of [`decode_low_rank`], about, and how many parts there are at most.
const LOW_PART: usize = 4096;
const MOST_LOW_PARTS: usize = 4;
/// Rows and ranks of a block of it, at least.
const LOW_ROWS: usize = 8;
const LOW_RANKS: usize = 16;

fn low_parts(cols: usize) -> usize {
    (cols / LOW_PART).clamp(1, MOST_LOW_PARTS)
}

/// Floats and counters of the workspace of [`decode_low_rank`] for `rows` rows of `cols` columns and so many `ranks`.
pub fn decode_low_workspace(rows: usize, cols: usize, ranks: usize) -> (usize, usize) {
    match low_parts(cols) {
        1 => (0, 0),
        parts => (parts * rows * ranks, rows.div_ceil(LOW_ROWS) * ranks.div_ceil(LOW_RANKS)),
    }
}

/// Low-rank products `x Aᵀ` of rows in any order of columns, with the `A`s in the same order.
///
/// # Shapes
/// `a`: `[R, K]` without gaps, of the type of the rows as they lie, f16 where those are scaled; `values`: `[M, R]` of the activations'
/// type; `workspace`: [`decode_low_workspace`].
///
/// # Errors
/// If shapes or types do not fit or the launch fails.
pub fn decode_low_rank(
    device: &Device,
    x: Rows<'_>,
    a: Matrix<'_>,
    values: Pointer<'_>,
    workspace: ProductWorkspace<'_>,
) -> Result<(), Error> {
    const KERNEL: &str = "decode low-rank products";
    let ((m, k), dtype) = (x.shape(), if x.is_scaled() { DType::F16 } else { x.dtype() });
    let fits = a.cols == k && a.stride == k && a.dtype() == dtype && a.address.is_multiple_of(16);
    if !fits || !k.is_multiple_of(8) || a.rows == 0 {
        return Err(argument(KERNEL, "a", a, format!("[R, {k}] of {dtype:?}, aligned")));
    }
    expect_array(KERNEL, "values", values, x.dtype(), m * a.rows)?;
    let (floats, counters) = decode_low_workspace(m, k, a.rows);
    expect_array(KERNEL, "workspace", workspace.partial, DType::F32, floats)?;
    expect_array(KERNEL, "counters", workspace.arrived, DType::U32, counters)?;
    let low = RawLowRank {
        a: a.address,
        low: values.address,
        partial: workspace.partial.address,
        arrived: workspace.arrived.address,
        ranks: a.rows as i32,
        cols: k as i32,
        parts: low_parts(k) as i32,
        unused: 0,
    };
    // SAFETY: views of live device memory whose shapes were checked; what is pointed to is copied before the call returns; the
    // stream orders the accesses.
    launched(KERNEL, unsafe { trainer_decode_low(x.raw(), &raw const low, stream(device)?) })
}

/// Adds the parts that [`super::decode_attention`] left for contexts up to `max_context`, in their order.
///
/// # Shapes
/// `out`: `[M, H D]`; `parts`: its workspace.
///
/// # Errors
/// If shapes or types do not fit or the launch fails.
pub fn decode_combine(
    device: &Device,
    out: Rows<'_>,
    parts: Pointer<'_>,
    lanes: &LanesView<'_>,
    (head_dim, max_context): (usize, usize),
) -> Result<(), Error> {
    const KERNEL: &str = "decode combine";
    let (m, k) = out.shape();
    if m != lanes.lanes || head_dim == 0 || !k.is_multiple_of(head_dim) {
        return Err(argument(KERNEL, "out", out.shape(), format!("[{}, H · {head_dim}]", lanes.lanes)));
    }
    let (heads, splits) = (k / head_dim, lane_splits(max_context));
    expect_array(KERNEL, "parts", parts, DType::F32, decode_attention_workspace(m, heads, head_dim, max_context))?;
    let raw = RawCombine {
        out: out.raw(),
        partial: parts.address,
        rows: lanes.rows.address,
        heads: heads as i32,
        d: head_dim as i32,
        splits: splits as i32,
        split_keys: LANE_SPLIT_KEYS as i32,
    };
    // SAFETY: as in `decode_norm`.
    launched(KERNEL, unsafe { trainer_decode_combine(&raw const raw, stream(device)?) })
}

/// Heads of queries, keys and values: their norms (Qwen3), their turns, and the cache's pages.
#[derive(Clone, Copy, Debug)]
pub struct DecodeHeads<'b> {
    /// `[M, (H + 2 K) D]`: queries are changed in place, keys and values go to the cache.
    pub qkv: Matrix<'b>,
    /// f32 `[D]` each, of queries and keys.
    pub norms: Option<[Pointer<'b>; 2]>,
    /// In the norms.
    pub eps: f32,
    /// f32 `[M, D / 2, 2]`: cosines and sines of the lanes' positions.
    pub table: Pointer<'b>,
}

pub(super) fn check_cache(
    kernel: &'static str,
    cache: &PagedCache<'_>,
    lanes: &LanesView<'_>,
    dtype: DType,
) -> Result<(), Error> {
    let PagedCache { keys, values, kv_heads, head_dim, page_tokens, .. } = *cache;
    let token = kv_heads * head_dim;
    let fits = cache.dtype == dtype
        && matches!(dtype, DType::BF16 | DType::F16)
        && matches!(head_dim, 64 | 128 | 192 | 256)
        && keys.dtype() == dtype
        && values.dtype() == dtype
        && keys.len == values.len
        && page_tokens == lanes.cache.page_tokens
        && keys.len >= lanes.cache.pages * page_tokens * token;
    if fits { Ok(()) } else { Err(argument(kernel, "cache", cache, format!("{:?} of {dtype:?}", lanes.cache))) }
}

/// See [`DecodeHeads`].
///
/// # Errors
/// If shapes or types do not fit, the lanes are over another cache, or the launch fails.
pub fn decode_heads(
    device: &Device,
    heads: &DecodeHeads<'_>,
    cache: PagedCache<'_>,
    lanes: &LanesView<'_>,
) -> Result<(), Error> {
    const KERNEL: &str = "decode heads";
    let DecodeHeads { qkv, norms, eps, table } = *heads;
    check_cache(KERNEL, &cache, lanes, qkv.dtype())?;
    let PagedCache { kv_heads, head_dim: d, page_tokens, .. } = cache;
    let all = qkv.cols / d;
    if qkv.rows != lanes.lanes || !qkv.cols.is_multiple_of(d) || all <= 2 * kv_heads {
        return Err(argument(KERNEL, "qkv", qkv.shape(), format!("[{}, (H + 2 · {kv_heads}) {d}]", lanes.lanes)));
    }
    expect_array(KERNEL, "table", table, DType::F32, qkv.rows * d)?;
    for norm in norms.iter().flatten() {
        expect_array(KERNEL, "norm", *norm, DType::F32, d)?;
    }
    let raw = RawHeads {
        qkv: qkv.into(),
        q_norm: address_or_none(norms.map(|[q, _]| q)),
        k_norm: address_or_none(norms.map(|[_, k]| k)),
        table: table.address,
        keys: cache.keys.address,
        values: cache.values.address,
        tables: lanes.tables.address,
        rows: lanes.rows.address,
        eps,
        heads: (all - 2 * kv_heads) as i32,
        kv_heads: kv_heads as i32,
        d: d as i32,
        page_tokens: page_tokens as i32,
        unused: 0,
    };
    // SAFETY: views of live device memory whose shapes were checked; lanes stand in pages of this cache, as `Lanes` sees to; the
    // description is copied before the call returns; the stream orders the accesses.
    launched(KERNEL, unsafe { trainer_decode_heads(&raw const raw, stream(device)?) })
}
