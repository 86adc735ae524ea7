//! A paged key-value cache on the device: writing tokens, copying pages, attention over pages.
//!
//! The cache of a layer is two arrays `[P, T, K, D]`; what lies in which page is the host's business.

use std::f32::consts::LOG2_E;

use candle_core::{DType, Device};

use super::checks::expect_array;
use super::decode::check_cache;
use super::lanes::{LanesView, PageSharing};
use super::launch::{RawMatrix, RawStream, kernels, launched, stream, type_code};
use super::paged_step::{PageStores, PagedSize, PagedStep};
use crate::device::{Error, Matrix, Pointer, argument, array, compute_capability, multiprocessors, upload_u32};

kernels! {
    // Of `paged_write.cu` and `paged_attention.cu`.
    fn paged_write(keys: u64, values: u64, dtype: i32, k: RawMatrix, v: RawMatrix, slots: u64, stream: RawStream)
    -> i32;
    fn paged_copy(stores: u64, num_stores: i32, pairs: u64, num_pairs: i32, page_bytes: i64, stream: RawStream) -> i32;
    fn paged_attend(
        out: RawMatrix,
        q: RawMatrix,
        keys: u64,
        values: u64,
        dtype: i32,
        tables: u64,
        rows: u64,
        partial: u64,
        scale_log2: f32,
        kv_heads: i32,
        head_dim: i32,
        page_tokens: i32,
        splits: i32,
        split_keys: i32,
        stream: RawStream,
    ) -> i32;
    fn paged_attend_pieces(
        q: RawMatrix,
        keys: u64,
        values: u64,
        tables: u64,
        rows: u64,
        pieces: u64,
        members: u64,
        most_pieces: i32,
        partial: u64,
        scale_log2: f32,
        kv_heads: i32,
        head_dim: i32,
        page_tokens: i32,
        splits: i32,
        split_keys: i32,
        stream: RawStream,
    ) -> i32;
}

/// Largest head size.
const MAX_HEAD_DIM: usize = 256;

/// The cache of one layer.
#[derive(Clone, Copy, Debug)]
pub struct PagedCache<'b> {
    /// `[P, T, K, D]` of `dtype`.
    pub keys: Pointer<'b>,
    /// `[P, T, K, D]` of `dtype`.
    pub values: Pointer<'b>,
    /// f32, f16 or bf16.
    pub dtype: DType,
    /// `K`.
    pub kv_heads: usize,
    /// `D`, at most 256.
    pub head_dim: usize,
    /// `T`.
    pub page_tokens: usize,
}

impl PagedCache<'_> {
    fn check(&self, kernel: &'static str, step: &PagedStep) -> Result<(), Error> {
        let Self { keys, values, dtype, kv_heads, head_dim, page_tokens } = *self;
        if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
            return Err(argument(kernel, "cache", dtype, "f32, f16 or bf16"));
        }
        if kv_heads == 0 || head_dim == 0 || page_tokens == 0 || head_dim > MAX_HEAD_DIM {
            let expected = format!("at least 1, and a head size of at most {MAX_HEAD_DIM}");
            return Err(argument(kernel, "cache", [kv_heads, head_dim, page_tokens], expected));
        }
        if keys.dtype() != dtype || values.dtype() != dtype {
            return Err(argument(kernel, "cache", [keys.dtype(), values.dtype()], dtype));
        }
        if keys.len != values.len || !keys.len.is_multiple_of(page_tokens * kv_heads * head_dim) {
            return Err(argument(kernel, "cache", [keys.len, values.len], "whole pages, as many values as keys"));
        }
        let size = PagedSize { pages: keys.len / (page_tokens * kv_heads * head_dim), page_tokens };
        if step.size().page_tokens != page_tokens || step.size().pages > size.pages {
            return Err(argument(kernel, "step", step.size(), size));
        }
        Ok(())
    }
}

/// Stores new tokens; values are rounded to the cache's type.
///
/// # Shapes
/// `k`, `v`: `[N, K * D]` of any float type, a row for each slot of `step`.
///
/// # Errors
/// If shapes or types do not fit, the step is for another cache, or the launch fails.
pub fn write_pages(
    device: &Device,
    cache: PagedCache<'_>,
    k: Matrix<'_>,
    v: Matrix<'_>,
    step: &PagedStep,
) -> Result<(), Error> {
    const KERNEL: &str = "paged write";
    cache.check(KERNEL, step)?;
    let (slots, width) = (step.slots()?, cache.kv_heads * cache.head_dim);
    for (name, x) in [("k", k), ("v", v)] {
        if (x.rows, x.cols) != (slots.len, width) {
            return Err(argument(KERNEL, name, [x.rows, x.cols], [slots.len, width]));
        }
    }
    // SAFETY: views of live device memory whose shapes were checked; the step's slots lie in caches of this size; the stream
    // orders the accesses.
    let code = unsafe {
        paged_write(
            cache.keys.address,
            cache.values.address,
            type_code(cache.dtype),
            k.into(),
            v.into(),
            slots.address,
            stream(device)?,
        )
    };
    launched(KERNEL, code)
}

/// Copies pages in all of a cache's arrays at once.
///
/// # Shapes
/// `pairs`: source and destination of each copy. No destination is another copy's source or destination.
///
/// # Errors
/// If a page is not in the cache, memory runs out, or the launch fails.
pub fn copy_pages(device: &Device, stores: &PageStores, pairs: &[[u32; 2]]) -> Result<(), Error> {
    const KERNEL: &str = "page copy";
    if let Some(pair) = pairs.iter().find(|pair| pair.iter().any(|&page| page as usize >= stores.pages())) {
        return Err(argument(KERNEL, "pairs", pair, format!("pages below {}", stores.pages())));
    }
    for pairs in pairs.chunks(MAX_GRID_ROWS) {
        let on_device = upload_u32(device, pairs.as_flattened())?;
        let (addresses, page_bytes) = (stores.addresses()?, stores.page_bytes() as i64);
        let (num_stores, num_pairs, stream) = (stores.len() as i32, pairs.len() as i32, stream(device)?);
        // SAFETY: the addresses are of live arrays, which `stores` keeps, of as many pages as was checked; the stream orders the
        // accesses, and the freeing of the list of pairs.
        let code = unsafe {
            paged_copy(addresses.address, num_stores, array(&on_device)?.address, num_pairs, page_bytes, stream)
        };
        launched(KERNEL, code)?;
    }
    Ok(())
}

/// Blocks that a grid may have in its second dimension.
const MAX_GRID_ROWS: usize = 65_535;

/// Keys of a block when the context is split, at least and at first.
const MIN_SPLIT_KEYS: usize = 128;
const SPLIT_KEYS: usize = 512;

/// Blocks below which contexts are cut finer: twice the multiprocessors of a large GPU.
const FEW_BLOCKS: usize = 264;

/// Most floats of partial results: 32 MiB.
const MAX_PARTIAL: usize = 8 << 20;

/// Into how many blocks a context is split, and how many keys each has. Depends on the sizes alone, so that a step has
/// the same bits every time.
fn split(rows: usize, heads: usize, kv_heads: usize, head_dim: usize, max_context: usize) -> (usize, usize) {
    let mut keys = SPLIT_KEYS;
    while keys > MIN_SPLIT_KEYS && rows * kv_heads * max_context.div_ceil(keys) < FEW_BLOCKS {
        keys /= 2;
    }
    let most = (MAX_PARTIAL / (rows * heads * (head_dim + 2)).max(1)).clamp(1, MAX_GRID_ROWS);
    let splits = max_context.div_ceil(keys).clamp(1, most);
    let keys = max_context.div_ceil(splits).next_multiple_of(MIN_SPLIT_KEYS).max(keys);
    (max_context.div_ceil(keys).max(1), keys)
}

/// Floats of workspace that [`paged_attention`] needs for `rows` query rows; may be 0.
pub fn paged_attention_workspace(
    rows: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    max_context: usize,
) -> usize {
    let (splits, _) = split(rows, heads, kv_heads, head_dim, max_context);
    if splits == 1 { 0 } else { rows * heads * splits * (head_dim + 2) + 1 }
}

/// Softmax attention of every query row over the first keys of its sequence, which are in the cache.
///
/// Sums are f32; with a 16-bit cache and a head size of 64 or 128 the products run on tensor cores, with queries and
/// softmax weights rounded to the cache's type. The same call has the same bits every time; a row's last bits depend
/// on how many rows and keys are in the step. A row without keys becomes zero.
///
/// # Shapes
/// `out`, `q`: `[N, H * D]` of any float type, `H` a multiple of `K`; `workspace`: f32, at least
/// [`paged_attention_workspace`] elements, `None` for none. `step` has a row for each of `q`.
///
/// # Errors
/// If shapes or types do not fit, the step is for another cache, or the launch fails.
///
/// # Equation
/// `softmax(scale * q k^T) v` (Vaswani et al., 1706.03762, eq. 1), query head `h` with key-value head `h / (H / K)`
/// (Ainslie et al., 2305.13245), parts of a context as in Flash-Decoding (Dao et al., 2023).
pub fn paged_attention(
    device: &Device,
    out: Matrix,
    q: Matrix,
    cache: PagedCache<'_>,
    step: &PagedStep,
    scale: f32,
    workspace: Option<Pointer>,
) -> Result<(), Error> {
    const KERNEL: &str = "paged attention";
    cache.check(KERNEL, step)?;
    let (rows, max_context) = (step.rows()?, step.max_context());
    let PagedCache { kv_heads, head_dim, page_tokens, .. } = cache;
    if !q.cols.is_multiple_of(kv_heads * head_dim) {
        let expected = format!("a multiple of {kv_heads} heads of {head_dim}");
        return Err(argument(KERNEL, "q", [q.rows, q.cols], expected));
    }
    if (out.rows, out.cols) != (q.rows, q.cols) {
        return Err(argument(KERNEL, "out", [out.rows, out.cols], [q.rows, q.cols]));
    }
    if rows.len != 2 * q.rows || !rows.address.is_multiple_of(8) {
        return Err(argument(KERNEL, "step", rows, format!("{} pairs at a multiple of 8 bytes", q.rows)));
    }
    if max_context > i32::MAX as usize - 2 * SPLIT_KEYS {
        return Err(argument(KERNEL, "max_context", max_context, "well below 2^31"));
    }
    let heads = q.cols / head_dim;
    if q.rows.saturating_mul(heads) > i32::MAX as usize {
        return Err(argument(KERNEL, "q", [q.rows, q.cols], "below 2^31 rows times heads"));
    }
    let (splits, split_keys) = split(q.rows, heads, kv_heads, head_dim, max_context);
    let needed = paged_attention_workspace(q.rows, heads, kv_heads, head_dim, max_context);
    let (address, len) = workspace.map_or((0, 0), |w| (w.address, w.len));
    let is_f32 = workspace.is_none_or(|w| w.dtype() == DType::F32);
    if !is_f32 || len < needed || !address.is_multiple_of(16) {
        return Err(argument(KERNEL, "workspace", workspace, format!("{needed} floats at a multiple of 16 bytes")));
    }
    // SAFETY: views of live device memory whose shapes were checked; the step's rows see keys of pages in caches of this size;
    // the stream orders the accesses.
    let code = unsafe {
        paged_attend(
            out.into(),
            q.into(),
            cache.keys.address,
            cache.values.address,
            type_code(cache.dtype),
            step.tables()?.address,
            rows.address,
            address,
            scale * LOG2_E,
            kv_heads as i32,
            head_dim as i32,
            page_tokens as i32,
            splits as i32,
            split_keys as i32,
            stream(device)?,
        )
    };
    launched(KERNEL, code)
}

/// Keys of a block of [`decode_attention`]: as many for every number of lanes and keys, so that sums do not depend on them.
pub(super) const LANE_SPLIT_KEYS: usize = 128;

/// Parts of contexts up to `max_context`.
pub(super) fn lane_splits(max_context: usize) -> usize {
    max_context.div_ceil(LANE_SPLIT_KEYS).max(1)
}

/// Floats of the workspace of [`decode_attention`] for contexts up to `max_context`.
pub fn decode_attention_workspace(lanes: usize, heads: usize, head_dim: usize, max_context: usize) -> usize {
    lanes * heads * lane_splits(max_context) * (head_dim + 2) + 1
}

/// Rows of queries, of all heads of a key-value head, that a block of the kernels for 16-bit caches has.
const TILE_ROWS: usize = 64;

/// Blocks of those kernels that a multiprocessor has at a time.
const RESIDENT: usize = 3;

/// When [`decode_attention`] best reads pages that lanes share for several at once: if its blocks would else not all have a place at
/// a time. As measured on an H200 with a 7B model: steps of 8 and 16 lanes with 128 to 256 tokens became 9% and 3% longer by it.
///
/// # Errors
/// If the device is no GPU.
pub fn page_sharing(device: &Device, heads: usize, kv_heads: usize, head_dim: usize) -> Result<PageSharing, Error> {
    let (major, _) = compute_capability(device)?;
    if major < 8 || !matches!(head_dim, 64 | 128) {
        return Ok(PageSharing::NONE);
    }
    let kv_heads = kv_heads.max(1);
    let lanes = TILE_ROWS / (heads / kv_heads).clamp(1, TILE_ROWS);
    Ok(PageSharing { lanes, from: RESIDENT * multiprocessors(device)? as usize / kv_heads + 1 })
}

/// Attention of each lane's query over its tokens in the cache, this step's included: parts for each 128 keys, which
/// [`super::decode_combine`] adds. Lanes whose pages of a part are the same read them together, up to as many as the lanes were made
/// for; the order of a lane's sums depends on whether there are enough of them for products of more than 16 rows, and on nothing else
/// of the others. A lane whose context is longer than `max_context` is cut off there.
///
/// # Shapes
/// `q`: `[M, H D]` of the cache's type; `parts`: f32, [`decode_attention_workspace`] elements.
///
/// # Errors
/// If shapes or types do not fit, the lanes are over another cache, or the launch fails.
pub fn decode_attention(
    device: &Device,
    parts: Pointer<'_>,
    q: Matrix<'_>,
    cache: PagedCache<'_>,
    lanes: &LanesView<'_>,
    max_context: usize,
    scale: f32,
) -> Result<(), Error> {
    const KERNEL: &str = "decode attention";
    check_cache(KERNEL, &cache, lanes, q.dtype())?;
    let PagedCache { kv_heads, head_dim, page_tokens, .. } = cache;
    if q.rows != lanes.lanes || !q.cols.is_multiple_of(kv_heads * head_dim) {
        return Err(argument(KERNEL, "q", q.shape(), format!("[{}, H · {head_dim}]", lanes.lanes)));
    }
    let (splits, group) = (lane_splits(max_context), q.cols / head_dim / kv_heads);
    let sharing = lanes.sharing.lanes;
    if sharing > 1 && sharing * group.min(TILE_ROWS) > TILE_ROWS {
        return Err(argument(KERNEL, "sharing", sharing, format!("1 or {TILE_ROWS} rows of {group} heads")));
    }
    let needed = decode_attention_workspace(q.rows, q.cols / head_dim, head_dim, max_context);
    expect_array(KERNEL, "parts", parts, DType::F32, needed)?;
    if !parts.address.is_multiple_of(16) || splits > MAX_GRID_ROWS {
        return Err(argument(KERNEL, "parts", (parts, splits), "a multiple of 16 bytes, at most 65,535 parts"));
    }
    if !q.address.is_multiple_of(4) || !q.stride.is_multiple_of(2) {
        return Err(argument(KERNEL, "q", q, "rows at multiples of 4 bytes"));
    }
    // SAFETY: views of live device memory whose shapes were checked; lanes stand in pages of this cache, as `Lanes` sees to, and
    // pieces name lanes; the stream orders the accesses.
    let code = unsafe {
        paged_attend_pieces(
            q.into(),
            cache.keys.address,
            cache.values.address,
            lanes.tables.address,
            lanes.rows.address,
            lanes.pieces.address,
            lanes.members.address,
            (q.rows * splits) as i32,
            parts.address,
            scale * LOG2_E,
            kv_heads as i32,
            head_dim as i32,
            page_tokens as i32,
            splits as i32,
            LANE_SPLIT_KEYS as i32,
            stream(device)?,
        )
    };
    launched(KERNEL, code)
}
