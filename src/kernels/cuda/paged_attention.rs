//! A paged key-value cache on the device: writing tokens, copying pages, attention over pages.
//!
//! The cache of a layer is two arrays `[P, T, K, D]`; what lies in which page is the host's business.

use std::f32::consts::LOG2_E;

use candle_core::{DType, Device, Tensor};
use cudarc::driver::sys::CUstream;

use super::launch::{RawMatrix, launched, stream, type_code};
use crate::device::{Error, Matrix, Pointer, argument, upload_u64};

// SAFETY: these are the signatures of `paged_attention.cu`.
unsafe extern "C" {
    fn paged_write(keys: u64, values: u64, dtype: i32, k: RawMatrix, v: RawMatrix, slots: u64, stream: CUstream)
    -> i32;
    fn paged_copy(stores: u64, num_stores: i32, pairs: u64, num_pairs: i32, page_bytes: i64, stream: CUstream) -> i32;
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
        stream: CUstream,
    ) -> i32;
}

/// The slot of a token that is not stored.
pub const NO_SLOT: u32 = u32::MAX;

/// Largest head size.
const MAX_HEAD_DIM: usize = 256;

/// The cache of one layer.
#[derive(Clone, Copy, Debug)]
pub struct PagedCache {
    /// `[P, T, K, D]` of `dtype`.
    pub keys: Pointer,
    /// `[P, T, K, D]` of `dtype`.
    pub values: Pointer,
    /// f32, f16 or bf16.
    pub dtype: DType,
    /// `K`.
    pub kv_heads: usize,
    /// `D`, at most 256.
    pub head_dim: usize,
    /// `T`.
    pub page_tokens: usize,
}

impl PagedCache {
    fn check(&self, kernel: &'static str) -> Result<(), Error> {
        let Self { keys, values, dtype, kv_heads, head_dim, page_tokens } = *self;
        if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
            return Err(argument(kernel, "cache", dtype, "f32, f16 or bf16"));
        }
        if kv_heads == 0 || head_dim == 0 || page_tokens == 0 || head_dim > MAX_HEAD_DIM {
            let expected = format!("at least 1, and a head size of at most {MAX_HEAD_DIM}");
            return Err(argument(kernel, "cache", [kv_heads, head_dim, page_tokens], expected));
        }
        if keys.len != values.len || !keys.len.is_multiple_of(page_tokens * kv_heads * head_dim) {
            return Err(argument(kernel, "cache", [keys.len, values.len], "whole pages, as many values as keys"));
        }
        Ok(())
    }

    /// Bytes of a page of keys, and of a page of values.
    pub fn page_bytes(&self) -> usize {
        self.page_tokens * self.kv_heads * self.head_dim * self.dtype.size_in_bytes()
    }
}

/// The query rows of a step and the pages of their sequences.
#[derive(Clone, Copy, Debug)]
pub struct PagedRows {
    /// u32: the page lists of all sequences, each in order of position.
    pub tables: Pointer,
    /// u32 `[N, 2]`: where the row's page list starts in `tables`, and how many keys the row sees. Neighbouring rows of
    /// a prompt, each of which sees one key more, share their loads.
    pub rows: Pointer,
    /// The most keys that a row sees.
    pub max_context: usize,
}

/// Stores new tokens; values are rounded to the cache's type.
///
/// # Shapes
/// `k`, `v`: `[N, K * D]` of any float type; `slots`: u32 `[N]`, `page * T + place` of each token, all different, or
/// [`NO_SLOT`]. Slots inside the cache are the caller's promise.
///
/// # Errors
/// If shapes or types do not fit, or the launch fails.
pub fn write_pages(device: &Device, cache: PagedCache, k: Matrix, v: Matrix, slots: Pointer) -> Result<(), Error> {
    cache.check("paged write")?;
    let width = cache.kv_heads * cache.head_dim;
    for (name, x) in [("k", k), ("v", v)] {
        if (x.rows, x.cols) != (slots.len, width) {
            return Err(argument("paged write", name, [x.rows, x.cols], [slots.len, width]));
        }
    }
    // SAFETY: views of live device memory whose shapes were checked; the stream orders the accesses. That slots lie in
    // the cache is the caller's promise.
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
    launched("paged write", code)
}

/// The addresses of a cache's arrays, keys and values of all layers in any order, for [`copy_pages`]; i64 bits
/// `[stores]`. Good as long as those arrays live.
///
/// # Errors
/// If an array does not start at a multiple of 16 bytes, `device` is no GPU or memory runs out.
pub fn page_stores(device: &Device, stores: &[Pointer]) -> Result<Tensor, Error> {
    if let Some(odd) = stores.iter().find(|store| !store.address.is_multiple_of(16)) {
        return Err(argument("page copy", "stores", odd, "arrays at multiples of 16 bytes"));
    }
    let addresses: Vec<u64> = stores.iter().map(|store| store.address).collect();
    upload_u64(device, &addresses)
}

/// Copies pages in all of a cache's arrays at once.
///
/// # Shapes
/// `stores`: i64 bits, from [`page_stores`]; `pairs`: u32 `[C, 2]`, source and destination of each copy. No destination
/// is another copy's source or destination. Pages inside the cache are the caller's promise.
///
/// # Errors
/// If shapes do not fit, or the launch fails.
pub fn copy_pages(device: &Device, stores: Pointer, pairs: Pointer, page_bytes: usize) -> Result<(), Error> {
    if !pairs.len.is_multiple_of(2) || !pairs.address.is_multiple_of(8) {
        return Err(argument("page copy", "pairs", pairs, "pairs of pages at a multiple of 8 bytes"));
    }
    if pairs.len / 2 > MAX_GRID_ROWS {
        return Err(argument("page copy", "pairs", pairs.len / 2, format!("at most {MAX_GRID_ROWS}")));
    }
    if !page_bytes.is_multiple_of(2) {
        return Err(argument("page copy", "page_bytes", page_bytes, "an even number"));
    }
    let (num_stores, num_pairs) = (stores.len as i32, (pairs.len / 2) as i32);
    let stream = stream(device)?;
    // SAFETY: `stores` holds addresses of live arrays, which their maker keeps alive; the stream orders the accesses.
    // That pages lie in the cache is the caller's promise.
    let code = unsafe { paged_copy(stores.address, num_stores, pairs.address, num_pairs, page_bytes as i64, stream) };
    launched("page copy", code)
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
/// [`paged_attention_workspace`] elements, `None` for none. Pages inside the cache, page lists as long as contexts and
/// contexts of at most `max_context` are the caller's promise.
///
/// # Errors
/// If shapes or types do not fit, or the launch fails.
///
/// # Equation
/// `softmax(scale * q k^T) v` (Vaswani et al., 1706.03762, eq. 1), query head `h` with key-value head `h / (H / K)`
/// (Ainslie et al., 2305.13245), parts of a context as in Flash-Decoding (Dao et al., 2023).
pub fn paged_attention(
    device: &Device,
    out: Matrix,
    q: Matrix,
    cache: PagedCache,
    step: PagedRows,
    scale: f32,
    workspace: Option<Pointer>,
) -> Result<(), Error> {
    const KERNEL: &str = "paged attention";
    cache.check(KERNEL)?;
    let PagedCache { kv_heads, head_dim, page_tokens, .. } = cache;
    if !q.cols.is_multiple_of(kv_heads * head_dim) {
        let expected = format!("a multiple of {kv_heads} heads of {head_dim}");
        return Err(argument(KERNEL, "q", [q.rows, q.cols], expected));
    }
    if (out.rows, out.cols) != (q.rows, q.cols) {
        return Err(argument(KERNEL, "out", [out.rows, out.cols], [q.rows, q.cols]));
    }
    if step.rows.len != 2 * q.rows || !step.rows.address.is_multiple_of(8) {
        return Err(argument(KERNEL, "rows", step.rows, format!("{} pairs at a multiple of 8 bytes", q.rows)));
    }
    if step.max_context > i32::MAX as usize - 2 * SPLIT_KEYS {
        return Err(argument(KERNEL, "max_context", step.max_context, "well below 2^31"));
    }
    let heads = q.cols / head_dim;
    if q.rows.saturating_mul(heads) > i32::MAX as usize {
        return Err(argument(KERNEL, "q", [q.rows, q.cols], "below 2^31 rows times heads"));
    }
    let (splits, split_keys) = split(q.rows, heads, kv_heads, head_dim, step.max_context);
    let needed = paged_attention_workspace(q.rows, heads, kv_heads, head_dim, step.max_context);
    let (address, len) = workspace.map_or((0, 0), |w| (w.address, w.len));
    if len < needed || !address.is_multiple_of(8) {
        return Err(argument(KERNEL, "workspace", workspace, format!("{needed} floats at a multiple of 8 bytes")));
    }
    // SAFETY: views of live device memory whose shapes were checked; the stream orders the accesses. What is in
    // `tables` and `rows` is the caller's promise.
    let code = unsafe {
        paged_attend(
            out.into(),
            q.into(),
            cache.keys.address,
            cache.values.address,
            type_code(cache.dtype),
            step.tables.address,
            step.rows.address,
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
