//! Causal grouped-query attention over a ragged batch: work lists, made once for a batch, and the launchers.
//!
//! A query attends to the tokens of its own segment up to itself and, if the segment has a prefix, to all of that
//! prefix, which begins another segment. Legend: `N` tokens, `H` query heads, `K` key-value heads, `d` head size.

mod work;

use candle_core::{DType, Device, Tensor};

use super::launch::{RawMatrix, RawStream, address_or_none, kernels, launched, stream};
use crate::device::{Error, Matrix, Pointer, argument, array, empty, multiprocessors, upload_i32};
pub use work::SegmentRange;
use work::{KEY_TILE, KeySplit, WorkLists, has_long_key_tiles};

/// `KeySplit` of `attention.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct RawKeySplit {
    work: u64,
    sums: u64,
    num_tiles: i32,
    part_steps: i32,
    num_parts: i32,
    num_split_tiles: i32,
}

kernels! {
    // Of `attention_forward.cu` and `attention_backward.cu`.
    fn trainer_attention_forward(
        o: RawMatrix,
        lse: u64,
        q: RawMatrix,
        k: RawMatrix,
        v: RawMatrix,
        tiles: u64,
        num_tiles: i32,
        heads: i32,
        kv_heads: i32,
        variant: i32,
        stream: RawStream,
    ) -> i32;
    fn trainer_attention_delta(
        delta: u64,
        d_out: RawMatrix,
        o: RawMatrix,
        heads: i32,
        variant: i32,
        stream: RawStream,
    ) -> i32;
    fn trainer_attention_backward_queries(
        dq: RawMatrix,
        d_out: RawMatrix,
        q: RawMatrix,
        k: RawMatrix,
        v: RawMatrix,
        lse: u64,
        delta: u64,
        tiles: u64,
        num_tiles: i32,
        heads: i32,
        kv_heads: i32,
        variant: i32,
        stream: RawStream,
    ) -> i32;
    fn trainer_attention_backward_keys(
        dk: RawMatrix,
        dv: RawMatrix,
        d_out: RawMatrix,
        q: RawMatrix,
        k: RawMatrix,
        v: RawMatrix,
        lse: u64,
        delta: u64,
        tiles: u64,
        views: u64,
        split: RawKeySplit,
        heads: i32,
        kv_heads: i32,
        variant: i32,
        stream: RawStream,
    ) -> i32;
    fn trainer_attention_backward_sums(
        dq: RawMatrix,
        dk: RawMatrix,
        dv: RawMatrix,
        d_out: RawMatrix,
        q: RawMatrix,
        k: RawMatrix,
        v: RawMatrix,
        heads: i32,
        kv_heads: i32,
        variant: i32,
    ) -> i64;
    fn trainer_attention_backward(
        dq: RawMatrix,
        dk: RawMatrix,
        dv: RawMatrix,
        d_out: RawMatrix,
        q: RawMatrix,
        k: RawMatrix,
        v: RawMatrix,
        lse: u64,
        delta: u64,
        sums: u64,
        query_tiles: u64,
        num_query_tiles: i32,
        key_tiles: u64,
        views: u64,
        split: RawKeySplit,
        heads: i32,
        kv_heads: i32,
        stream: RawStream,
    ) -> i32;
}

/// Which kernels do the work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AttentionVariant {
    /// The fastest known for the device, types and shapes.
    #[default]
    Automatic,
    /// `mma.sync`, where types and shapes allow it.
    TensorCores,
    /// `wgmma`, where the device, types and shapes allow it.
    WarpGroups,
    /// f32 arithmetic.
    Plain,
}

impl AttentionVariant {
    /// Its number in the kernels' interface.
    fn code(self) -> i32 {
        match self {
            Self::Automatic => 0,
            Self::TensorCores => 1,
            Self::WarpGroups => 2,
            Self::Plain => 3,
        }
    }
}

/// Which tokens attend to which, as lists of tiles on the device.
#[derive(Clone, Debug)]
pub struct AttentionPlan {
    /// i32: the tiles of queries, the tiles of keys, the views, the running sums of work.
    words: Tensor,
    /// The running sums of the key tiles' work.
    work: Vec<i32>,
    num_query_tiles: usize,
    num_key_tiles: usize,
    num_views: usize,
    num_tokens: usize,
    multiprocessors: u64,
    is_deterministic: bool,
}

impl AttentionPlan {
    /// Lists the work of a batch, for all layers and for both directions.
    ///
    /// # Errors
    /// If the segments do not follow one another, or a prefix does not begin a segment that has no prefix.
    pub fn new(device: &Device, segments: &[SegmentRange]) -> Result<Self, Error> {
        let lists = WorkLists::new(segments)?;
        let tiles = lists.key_tiles.iter().chain(&lists.views).flatten().chain(&lists.work);
        let words: Vec<i32> = lists.query_tiles.iter().flatten().chain(tiles).copied().collect();
        let multiprocessors = multiprocessors(device)?;
        Ok(Self {
            words: upload_i32(device, &words)?,
            work: lists.work,
            num_query_tiles: lists.query_tiles.len(),
            num_key_tiles: lists.key_tiles.len(),
            num_views: lists.views.len(),
            num_tokens: lists.num_tokens,
            multiprocessors: multiprocessors.into(),
            is_deterministic: false,
        })
    }

    /// Whether gradients are to have the same bits every time: without it [`attention_backward`] may take kernels that
    /// add up `dq` in an order that varies. Off at first.
    pub fn set_deterministic(&mut self, is_deterministic: bool) {
        self.is_deterministic = is_deterministic;
    }

    /// Whether no token attends to anything.
    pub fn is_empty(&self) -> bool {
        self.num_query_tiles == 0
    }

    /// The token after the last one of the last segment.
    pub fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    /// Addresses of the tiles of queries, the tiles of keys, the views and the running sums of work.
    fn addresses(&self) -> Result<[u64; 4], Error> {
        let first = array(&self.words)?.address;
        let key_tiles = first + (self.num_query_tiles * size_of::<[i32; 8]>()) as u64;
        let views = key_tiles + (self.num_key_tiles * size_of::<[i32; 4]>()) as u64;
        Ok([first, key_tiles, views, views + (self.num_views * size_of::<[i32; 4]>()) as u64])
    }
}

/// Checks shapes and types; `wide` have a column for each query head, `narrow` for each key-value head.
fn check(
    kernel: &'static str,
    plan: &AttentionPlan,
    wide: &[(&'static str, Matrix)],
    narrow: &[(&'static str, Matrix)],
    floats: &[(&'static str, Pointer)],
    (heads, kv_heads): (usize, usize),
) -> Result<(), Error> {
    let (_, q) = wide[0];
    if kv_heads == 0 || heads % kv_heads != 0 || heads == 0 || q.cols % heads != 0 {
        return Err(argument(
            kernel,
            "heads",
            [heads, kv_heads, q.cols],
            "heads in equal groups that divide the columns",
        ));
    }
    let d = q.cols / heads;
    if d == 0 || d > 256 {
        return Err(argument(kernel, "head size", d, "1 to 256"));
    }
    if i32::try_from(q.rows).is_err() {
        return Err(argument(kernel, "q", q.rows, "fewer than 2^31 rows"));
    }
    if plan.num_tokens > q.rows {
        return Err(argument(kernel, "plan", plan.num_tokens, format!("at most {} tokens", q.rows)));
    }
    let sizes = wide.iter().map(|x| (x, heads)).chain(narrow.iter().map(|x| (x, kv_heads)));
    for (&(name, matrix), heads) in sizes {
        if (matrix.dtype(), matrix.rows, matrix.cols) != (q.dtype(), q.rows, heads * d) {
            let got = format!("{:?} [{}, {}]", matrix.dtype(), matrix.rows, matrix.cols);
            return Err(argument(kernel, name, got, format!("{:?} [{}, {}]", q.dtype(), q.rows, heads * d)));
        }
    }
    if !matches!(q.dtype(), DType::F32 | DType::F16 | DType::BF16) {
        return Err(argument(kernel, "q", q.dtype(), "f32, f16 or bf16"));
    }
    match floats.iter().find(|(_, x)| x.len < heads * q.rows || x.dtype() != DType::F32) {
        Some((name, x)) => Err(argument(kernel, name, x.len, format!("at least {heads} x {} floats", q.rows))),
        None => Ok(()),
    }
}

/// `o = softmax(q kᵀ / sqrt(d)) v` with each query's keys as the plan says, and the log-sum-exp of the scaled scores.
///
/// # Shapes
/// `q`, `o`: f32, f16 or bf16 `[N, H d]`; `k`, `v`: the same type, `[N, K d]`, any stride; `lse`: f32 `[H, N]`. Rows
/// that belong to no segment are left as they are. Tensor cores where `d` is a multiple of 8 up to 128 and rows lie at
/// multiples of 16 bytes, in 16-bit types.
///
/// # Errors
/// If the shapes do not fit, `d` is above 256, or the device has no bf16.
///
/// # Equation
/// `FlashAttention-2` (2307.08691), algorithm 1.
#[expect(clippy::too_many_arguments, reason = "the operands of attention")]
pub fn attention_forward(
    device: &Device,
    plan: &AttentionPlan,
    o: Matrix,
    lse: Pointer,
    q: Matrix,
    k: Matrix,
    v: Matrix,
    heads: usize,
    kv_heads: usize,
) -> Result<(), Error> {
    attention_forward_with(AttentionVariant::Automatic, device, plan, o, lse, q, k, v, heads, kv_heads)
}

/// [`attention_forward`] with kernels of choice.
///
/// # Errors
/// As [`attention_forward`].
#[expect(clippy::too_many_arguments, reason = "the operands of attention")]
pub fn attention_forward_with(
    variant: AttentionVariant,
    device: &Device,
    plan: &AttentionPlan,
    o: Matrix,
    lse: Pointer,
    q: Matrix,
    k: Matrix,
    v: Matrix,
    heads: usize,
    kv_heads: usize,
) -> Result<(), Error> {
    const KERNEL: &str = "attention_forward";
    check(KERNEL, plan, &[("q", q), ("o", o)], &[("k", k), ("v", v)], &[("lse", lse)], (heads, kv_heads))?;
    if plan.is_empty() {
        return Ok(());
    }
    let [tiles, ..] = plan.addresses()?;
    // SAFETY: all addresses are views of live device memory whose sizes were checked above; the plan's tiles lie within
    // its tokens, which are rows of the matrices; the work is ordered by the device's one compute stream.
    let code = unsafe {
        trainer_attention_forward(
            o.into(),
            lse.address,
            q.into(),
            k.into(),
            v.into(),
            tiles,
            plan.num_query_tiles as i32,
            heads as i32,
            kv_heads as i32,
            variant.code(),
            stream(device)?,
        )
    };
    launched(KERNEL, code)
}

/// The gradients of [`attention_forward`]: `dq`, `dk`, `dv` from `d_out`.
///
/// `dk` and `dv` have the same bits every time. So has `dq` if the plan is deterministic; else its last bits may vary
/// on devices of compute capability 9.0, where one kernel makes all three with 5 matrix products instead of 7 if `d`
/// is above 64 and most keys are seen by many queries. It takes workspace: f32 `[H, N, 128]`.
///
/// # Shapes
/// `dq`, `d_out`, `q`, `o`: f32, f16 or bf16 `[N, H d]`; `dk`, `dv`, `k`, `v`: the same type, `[N, K d]`, any stride;
/// `lse`: f32 `[H, N]` as [`attention_forward`] left it; `delta`: f32 `[H, N]`, workspace. Rows that belong to no
/// segment are left as they are.
///
/// # Errors
/// If the shapes do not fit, `d` is above 256, or the device has no bf16.
///
/// # Equation
/// `FlashAttention-2` (2307.08691), algorithm 2, with one kernel for `dq` and one for `dk` and `dv`, or one for all.
#[expect(clippy::too_many_arguments, reason = "the operands of attention's backward")]
pub fn attention_backward(
    device: &Device,
    plan: &AttentionPlan,
    dq: Matrix,
    dk: Matrix,
    dv: Matrix,
    d_out: Matrix,
    q: Matrix,
    k: Matrix,
    v: Matrix,
    o: Matrix,
    lse: Pointer,
    delta: Pointer,
    heads: usize,
    kv_heads: usize,
) -> Result<(), Error> {
    let variant = AttentionVariant::Automatic;
    attention_backward_with(variant, device, plan, dq, dk, dv, d_out, q, k, v, o, lse, delta, heads, kv_heads)
}

/// [`attention_backward`] with kernels of choice.
///
/// # Errors
/// As [`attention_backward`].
#[expect(clippy::too_many_arguments, reason = "the operands of attention's backward")]
pub fn attention_backward_with(
    variant: AttentionVariant,
    device: &Device,
    plan: &AttentionPlan,
    dq: Matrix,
    dk: Matrix,
    dv: Matrix,
    d_out: Matrix,
    q: Matrix,
    k: Matrix,
    v: Matrix,
    o: Matrix,
    lse: Pointer,
    delta: Pointer,
    heads: usize,
    kv_heads: usize,
) -> Result<(), Error> {
    const KERNEL: &str = "attention_backward";
    let wide = [("q", q), ("dq", dq), ("d_out", d_out), ("o", o)];
    let narrow = [("k", k), ("v", v), ("dk", dk), ("dv", dv)];
    check(KERNEL, plan, &wide, &narrow, &[("lse", lse), ("delta", delta)], (heads, kv_heads))?;
    if plan.is_empty() {
        return Ok(());
    }
    let [query_tiles, key_tiles, views, work] = plan.addresses()?;
    let split = match variant {
        _ if q.dtype() == DType::F32 => KeySplit::none(&plan.work),
        AttentionVariant::Plain => KeySplit::none(&plan.work),
        _ => KeySplit::new(&plan.work, plan.multiprocessors, heads, kv_heads),
    };
    let num_floats = split.num_sums as usize * kv_heads * 2 * KEY_TILE * (q.cols / heads);
    let sums = (num_floats > 0).then(|| empty(device, num_floats, DType::F32)).transpose()?;
    let split = RawKeySplit {
        work,
        sums: address_or_none(sums.as_ref().map(array).transpose()?),
        num_tiles: plan.num_key_tiles as i32,
        part_steps: split.part_steps as i32,
        num_parts: split.num_parts as i32,
        num_split_tiles: split.num_split_tiles as i32,
    };
    let raw: [RawMatrix; 7] = [dq, dk, dv, d_out, q, k, v].map(Into::into);
    let [dq, dk, dv, d_out, q, k, v] = raw;
    let (lse, delta, num_query_tiles) = (lse.address, delta.address, plan.num_query_tiles as i32);
    let is_fused_chosen =
        !plan.is_deterministic && (variant == AttentionVariant::WarpGroups || has_long_key_tiles(&plan.work));
    let (heads, kv_heads, variant, stream) = (heads as i32, kv_heads as i32, variant.code(), stream(device)?);
    // SAFETY: both matrices are views of live device memory of one shape, and `delta` has a float for each head and
    // row, as checked above; the work is ordered by the device's one compute stream.
    let code = unsafe { trainer_attention_delta(delta, d_out, o.into(), heads, variant, stream) };
    launched("attention_delta", code)?;
    let num_sums = if is_fused_chosen {
        // SAFETY: the call uses nothing but its arguments and the device's properties.
        unsafe { trainer_attention_backward_sums(dq, dk, dv, d_out, q, k, v, heads, kv_heads, variant) }
    } else {
        0
    };
    if num_sums > 0 {
        let dq_sums = empty(device, num_sums as usize, DType::F32)?;
        let dq_sums = array(&dq_sums)?.address;
        // SAFETY: all addresses are views of live device memory whose sizes were checked above, the workspace is as
        // large as was asked for, and `sums` has a place for every part of a split tile; the plan's tiles and views lie
        // within its tokens, which are rows of the matrices; the work is ordered by the device's one compute stream.
        let code = unsafe {
            trainer_attention_backward(
                dq,
                dk,
                dv,
                d_out,
                q,
                k,
                v,
                lse,
                delta,
                dq_sums,
                query_tiles,
                num_query_tiles,
                key_tiles,
                views,
                split,
                heads,
                kv_heads,
                stream,
            )
        };
        return launched(KERNEL, code);
    }
    // SAFETY: all addresses are views of live device memory whose sizes were checked above; the plan's tiles lie within
    // its tokens, which are rows of the matrices; the work is ordered by the device's one compute stream.
    let code = unsafe {
        trainer_attention_backward_queries(
            dq,
            d_out,
            q,
            k,
            v,
            lse,
            delta,
            query_tiles,
            num_query_tiles,
            heads,
            kv_heads,
            variant,
            stream,
        )
    };
    launched("attention_backward_queries", code)?;
    // SAFETY: as above; the views that the tiles of keys name lie behind them in the plan, and `sums` has a place for
    // every part of a split tile.
    let code = unsafe {
        trainer_attention_backward_keys(
            dk, dv, d_out, q, k, v, lse, delta, key_tiles, views, split, heads, kv_heads, variant, stream,
        )
    };
    launched("attention_backward_keys", code)
}
