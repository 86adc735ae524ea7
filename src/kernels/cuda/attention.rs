//! Causal grouped-query attention over a ragged batch: work lists, made once for a batch, and the launchers.
//!
//! A query attends to the tokens of its own segment up to itself and, if the segment has a prefix, to all of that
//! prefix, which begins another segment. Legend: `N` tokens, `H` query heads, `K` key-value heads, `d` head size.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::iter;

use candle_core::{DType, Device, Tensor};
use cudarc::driver::sys::{CUdevice_attribute, CUstream};

use super::launch::{RawMatrix, address_or_none, launched, stream};
use super::memory::{Matrix, Pointer, array, cuda, empty, upload_i32};
use super::{Error, argument};

/// Queries of a tile and keys of a tile; `attention.cuh` has the same numbers.
const QUERY_TILE: usize = 128;
const KEY_TILE: usize = 128;

/// The least steps worth a part of a key tile: each part writes its sums and has them read again.
const MIN_PART_STEPS: u64 = 4;

/// Queries that the kernel for `dk` and `dv` takes at a time: the unit of a key tile's cost.
const QUERY_STEP: usize = 64;

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

// SAFETY: these are the signatures of `attention_forward.cu` and `attention_backward.cu`.
unsafe extern "C" {
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
        stream: CUstream,
    ) -> i32;
    fn trainer_attention_delta(
        delta: u64,
        d_out: RawMatrix,
        o: RawMatrix,
        heads: i32,
        variant: i32,
        stream: CUstream,
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
        stream: CUstream,
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
        stream: CUstream,
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
        stream: CUstream,
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

/// One sequence of the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentRange {
    /// Its first token.
    pub start: usize,
    /// The token after its last one.
    pub end: usize,
    /// Tokens (first, after the last) that stand before it: the beginning of another segment that has no prefix.
    pub prefix: Option<(usize, usize)>,
}

/// The work lists on the host.
#[derive(Debug, Default)]
struct WorkLists {
    /// `start, end, own_start, prefix_start, prefix_end, 0, 0, 0`
    query_tiles: Vec<[i32; 8]>,
    /// `start, end, first_view, end_view`
    key_tiles: Vec<[i32; 4]>,
    /// `start, end, key_end, is_causal`
    views: Vec<[i32; 4]>,
    /// Running sums of the key tiles' costs, from 0 on.
    work: Vec<i32>,
    num_tokens: usize,
}

impl WorkLists {
    fn new(segments: &[SegmentRange]) -> Result<Self, Error> {
        let users = prefix_users(segments)?;
        let mut query_tiles: Vec<(usize, [i32; 8])> = Vec::new();
        let mut key_tiles: Vec<(usize, [i32; 4])> = Vec::new();
        let mut views: Vec<[i32; 4]> = Vec::new();
        let int = |x: usize| x as i32;
        for (segment, users) in segments.iter().zip(&users) {
            let (prefix_start, prefix_end) = segment.prefix.unwrap_or((0, 0));
            for start in (segment.start..segment.end).step_by(QUERY_TILE) {
                let end = (start + QUERY_TILE).min(segment.end);
                let tile = [start, end, segment.start, prefix_start, prefix_end, 0, 0, 0];
                query_tiles.push((prefix_end - prefix_start + end - segment.start, tile.map(int)));
            }
            for start in (segment.start..segment.end).step_by(KEY_TILE) {
                let end = (start + KEY_TILE).min(segment.end);
                let first_view = views.len();
                views.push([start, segment.end, end, 1].map(int));
                for user in users.iter().map(|&user| segments[user]) {
                    let prefix_end = user.prefix.map_or(0, |(_, end)| end).min(end);
                    if prefix_end <= start {
                        continue;
                    }
                    // Neighbours that share the prefix are one range of queries.
                    let is_same = |last: &&mut [i32; 4]| last[1] == int(user.start) && last[2] == int(prefix_end);
                    if let Some(last) = views[first_view + 1..].last_mut().filter(is_same) {
                        last[1] = int(user.end);
                    } else {
                        views.push([user.start, user.end, prefix_end, 0].map(int));
                    }
                }
                let steps = |view: &[i32; 4]| (view[1] - view[0]) as usize / QUERY_STEP + 1;
                let cost: usize = views[first_view..].iter().map(steps).sum();
                key_tiles.push((cost, [start, end, first_view, views.len()].map(int)));
            }
        }
        // Heaviest first, so that the light ones fill the gaps at the end.
        query_tiles.sort_by_key(|&(cost, _)| Reverse(cost));
        key_tiles.sort_by_key(|&(cost, _)| Reverse(cost));
        let sums = key_tiles.iter().scan(0, |sum, &(cost, _)| {
            *sum += cost;
            Some(int(*sum))
        });
        Ok(Self {
            work: iter::once(0).chain(sums).collect(),
            query_tiles: query_tiles.into_iter().map(|(_, tile)| tile).collect(),
            key_tiles: key_tiles.into_iter().map(|(_, tile)| tile).collect(),
            views,
            num_tokens: segments.last().map_or(0, |s| s.end),
        })
    }
}

/// How the tiles of keys are split into parts; `attention.cuh` says which tile has which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct KeySplit {
    /// Steps of all query heads of a key-value head for each part; 0: every tile is one part.
    part_steps: u64,
    num_parts: u64,
    /// The first tiles, which have more than one part.
    num_split_tiles: usize,
    /// Parts of these tiles.
    num_sums: u64,
}

impl KeySplit {
    /// Every tile is one part.
    fn none(work: &[i32]) -> Self {
        Self { part_steps: 0, num_parts: work.len() as u64 - 1, num_split_tiles: 0, num_sums: 0 }
    }

    /// A split for which no part keeps a device of `multiprocessors` waiting; `work`: running sums of costs, the
    /// greatest first.
    ///
    /// The device works on about one tile per multiprocessor at a time. It is done when the heaviest tile is, or after
    /// its share of all the work. Where the tile takes longer, parts are of two thirds of that share: smaller ones fill
    /// the device more evenly, but their sums take time too.
    fn new(work: &[i32], multiprocessors: u64, heads: usize, kv_heads: usize) -> Self {
        let group = (heads / kv_heads) as u64;
        let steps = |tiles: usize| u64::from(work[tiles].cast_unsigned()) * group;
        let num_tiles = work.len() - 1;
        let (longest, all) = (steps(num_tiles.min(1)), steps(num_tiles) * kv_heads as u64);
        let part_steps = (2 * all / (3 * multiprocessors)).max(MIN_PART_STEPS);
        let is_even = 7 * longest * multiprocessors <= 8 * all;
        if is_even || longest <= part_steps || i32::try_from(steps(num_tiles)).is_err() {
            return Self::none(work);
        }
        let tiles: Vec<usize> = (0..num_tiles).collect();
        let num_split_tiles = tiles.partition_point(|&tile| steps(tile + 1) - steps(tile) > part_steps);
        let first_part = |tile: usize| steps(tile) / part_steps + tile as u64;
        let (num_parts, num_sums) = (first_part(num_tiles), first_part(num_split_tiles));
        Self { part_steps, num_parts, num_split_tiles, num_sums }
    }
}

/// For each segment, those whose prefix it begins with.
fn prefix_users(segments: &[SegmentRange]) -> Result<Vec<Vec<usize>>, Error> {
    const KERNEL: &str = "attention plan";
    let mut end = 0;
    for segment in segments {
        if segment.start < end || segment.end < segment.start || i32::try_from(segment.end + QUERY_TILE).is_err() {
            return Err(argument(KERNEL, "segment", segment, format!("a range from {end} on")));
        }
        end = segment.end;
    }
    let owners: BTreeMap<usize, usize> = segments
        .iter()
        .enumerate()
        .filter(|(_, s)| s.prefix.is_none() && s.start < s.end)
        .map(|(index, s)| (s.start, index))
        .collect();
    let mut users = vec![Vec::new(); segments.len()];
    for (index, segment) in segments.iter().enumerate() {
        let Some((start, end)) = segment.prefix else { continue };
        if start == end || segment.start == segment.end {
            continue;
        }
        match owners.get(&start).filter(|&&owner| start < end && end <= segments[owner].end) {
            Some(&owner) => users[owner].push(index),
            None => return Err(argument(KERNEL, "prefix", segment, "the beginning of a segment without a prefix")),
        }
    }
    Ok(users)
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
        let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors = cuda(device)?.cuda_stream().context().attribute(attribute);
        let asked = |source| Error::Driver { what: "asking for the number of multiprocessors", source };
        Ok(Self {
            words: upload_i32(device, &words)?,
            work: lists.work,
            num_query_tiles: lists.query_tiles.len(),
            num_key_tiles: lists.key_tiles.len(),
            num_views: lists.views.len(),
            num_tokens: lists.num_tokens,
            multiprocessors: u64::from(multiprocessors.map_err(asked)?.cast_unsigned()),
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
    match floats.iter().find(|(_, x)| x.len < heads * q.rows) {
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
/// is above 64. It takes workspace: f32 `[H, N, 128]`.
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
    let (heads, kv_heads, variant, stream) = (heads as i32, kv_heads as i32, variant.code(), stream(device)?);
    // SAFETY: both matrices are views of live device memory of one shape, and `delta` has a float for each head and
    // row, as checked above; the work is ordered by the device's one compute stream.
    let code = unsafe { trainer_attention_delta(delta, d_out, o.into(), heads, variant, stream) };
    launched("attention_delta", code)?;
    // SAFETY: the call uses nothing but its arguments and the device's properties.
    let num_sums = unsafe { trainer_attention_backward_sums(dq, dk, dv, d_out, q, k, v, heads, kv_heads, variant) };
    if num_sums > 0 && !plan.is_deterministic {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn segments() -> Vec<SegmentRange> {
        let segment = |start, end, prefix| SegmentRange { start, end, prefix };
        vec![
            segment(0, 300, None),
            segment(300, 305, Some((0, 200))),
            segment(305, 600, Some((0, 200))),
            segment(600, 600, None),
            segment(600, 601, None),
            segment(601, 700, Some((0, 130))),
            segment(700, 701, Some((600, 601))),
            segment(701, 990, None),
        ]
    }

    /// How often each key is met by each query.
    fn wanted(segments: &[SegmentRange], n: usize) -> Vec<u32> {
        let mut counts = vec![0; n * n];
        for segment in segments {
            for q in segment.start..segment.end {
                let (start, end) = segment.prefix.unwrap_or((0, 0));
                (start..end).chain(segment.start..=q).for_each(|k| counts[q * n + k] += 1);
            }
        }
        counts
    }

    #[test]
    fn tiles_of_queries_and_of_keys_hold_every_pair_once() {
        let segments = segments();
        let lists = WorkLists::new(&segments).unwrap();
        let n = lists.num_tokens;
        let wanted = wanted(&segments, n);
        let mut by_queries = vec![0; n * n];
        for &[start, end, own_start, prefix_start, prefix_end, ..] in &lists.query_tiles {
            for q in start..end {
                (prefix_start..prefix_end)
                    .chain(own_start..=q)
                    .for_each(|k| by_queries[q as usize * n + k as usize] += 1);
            }
        }
        assert!(by_queries == wanted);
        let mut by_keys = vec![0; n * n];
        for &[start, end, first_view, end_view] in &lists.key_tiles {
            for &[first, last, key_end, is_causal] in &lists.views[first_view as usize..end_view as usize] {
                for (q, k) in (first..last).flat_map(|q| (start..end.min(key_end)).map(move |k| (q, k))) {
                    by_keys[q as usize * n + k as usize] += u32::from(is_causal == 0 || k <= q);
                }
            }
        }
        assert!(by_keys == wanted);
    }

    /// The parts of each tile, as the kernels number them.
    fn parts(work: &[i32], split: KeySplit, group: u64) -> Vec<(u64, u64)> {
        let steps = |tile: usize| work[tile] as u64 * group;
        let part = |tile: usize| match split.part_steps {
            0 => (tile as u64, 1),
            n => (steps(tile) / n + tile as u64, (steps(tile + 1) - steps(tile)).div_ceil(n).max(1)),
        };
        (0..work.len() - 1).map(part).collect()
    }

    #[test]
    fn heavy_tiles_of_keys_are_split_and_many_equal_ones_are_not() {
        let lists = |lengths: &[usize]| {
            let mut start = 0;
            let ranges = lengths.iter().map(|length| {
                start += length;
                SegmentRange { start: start - length, end: start, prefix: None }
            });
            WorkLists::new(&ranges.collect::<Vec<_>>()).unwrap().work
        };
        for (lengths, heads, kv_heads, is_split) in [
            (&[2048][..], 28, 4, true),
            (&[100], 4, 4, false), // less than a part
            (&[500, 1, 700, 3, 129], 14, 2, true),
            (&[2048; 4], 28, 4, false),
            (&[32768], 28, 4, false),
            (&[20; 500], 7, 1, false),
        ] {
            let work = lists(lengths);
            let split = KeySplit::new(&work, 132, heads, kv_heads);
            assert_eq!(split.part_steps > 0, is_split, "{lengths:?}: {split:?}");
            let parts = parts(&work, split, (heads / kv_heads) as u64);
            let ends = parts.iter().skip(1).map(|part| part.0).chain([split.num_parts]);
            assert!(parts.iter().zip(ends).all(|(&(first, count), end)| first + count <= end), "{split:?}: {parts:?}");
            assert!(parts.iter().enumerate().all(|(tile, part)| (part.1 > 1) == (tile < split.num_split_tiles)));
            let last = parts[..split.num_split_tiles].last();
            assert!(last.map_or(0, |(first, count)| first + count) <= split.num_sums);
        }
        assert_eq!(KeySplit::new(&lists(&[]), 132, 4, 4), KeySplit::none(&[0]));
    }

    #[test]
    fn neighbours_that_share_a_prefix_are_one_view() {
        let lists = WorkLists::new(&segments()).unwrap();
        let tile = lists.key_tiles.iter().find(|tile| tile[0] == 128).unwrap();
        let views = &lists.views[tile[2] as usize..tile[3] as usize];
        assert_eq!(views, [[128, 300, 256, 1], [300, 600, 200, 0], [601, 700, 130, 0]]);
    }

    #[test]
    fn segments_that_overlap_and_prefixes_that_begin_no_segment_are_refused() {
        let segment = |start, end, prefix| SegmentRange { start, end, prefix };
        for segments in [
            vec![segment(0, 4, None), segment(3, 6, None)],
            vec![segment(0, 4, None), segment(4, 6, Some((1, 4)))],
            vec![segment(0, 4, None), segment(4, 6, Some((0, 5)))],
            vec![segment(0, 4, None), segment(4, 6, Some((0, 4))), segment(6, 8, Some((4, 6)))],
        ] {
            assert!(WorkLists::new(&segments).is_err(), "{segments:?}");
        }
        assert!(WorkLists::new(&[]).unwrap().query_tiles.is_empty());
    }
}
