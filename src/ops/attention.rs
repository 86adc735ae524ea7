//! Causal grouped-query attention over a ragged batch, in tiles, without a `T × T` matrix.
//!
//! A query attends to a list of key-value ranges: the tokens of its own segment up to itself and, if the segment has a
//! prefix, all of that prefix. Packed examples are segments without a prefix; the samples of a GRPO group are segments
//! whose prefix is the prompt, which then stands in the batch once and whose key and value gradients are summed over
//! the group.
//!
//! Shapes: `q`, `o`: f32 `[N, H, d]`; `k`, `v`: f32 `[N, K, d]`; the log-sum-exp of the scaled scores: f32 `[H, N]`.
//! Method: `FlashAttention` (Dao et al., 2205.14135): the log-sum-exp is kept, probabilities are made anew in backward.

use std::ops::Range;

use candle_core::Tensor;
use rayon::prelude::*;

use super::view::{tensor, view};
use super::{Error, Wide, shape_error};
use crate::kernels::cpu::matmul::{Matrix, Threads, multiply};
use crate::kernels::cpu::vector;

/// Query rows of one tile: scores of a tile stay in cache for contexts of a few thousand tokens.
const TILE: usize = 64;

/// One sequence of the batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its tokens.
    pub tokens: Range<usize>,
    /// Tokens that stand before it, shared with other segments: the beginning of an earlier segment without a prefix.
    pub prefix: Option<Range<usize>>,
}

/// Which tokens attend to which.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    segments: Vec<Segment>,
    /// Segments that share keys, by the segment that holds them; each group's gradients are independent of the others'.
    groups: Vec<Vec<usize>>,
    /// The work lists of the GPU's kernels, made when they are first needed.
    pub(super) plan: std::sync::OnceLock<std::sync::Arc<crate::kernels::cuda::AttentionPlan>>,
}

impl Layout {
    /// Checks that the segments follow one another and that each prefix begins an earlier segment.
    ///
    /// # Errors
    /// If they do not.
    pub fn new(segments: Vec<Segment>) -> Result<Self, Error> {
        const OP: &str = "attention layout";
        let mut groups: Vec<Vec<usize>> = Vec::new();
        let mut end = 0;
        for (index, segment) in segments.iter().enumerate() {
            if segment.tokens.start != end || segment.tokens.end < end {
                return Err(shape_error(OP, "tokens", &segment.tokens, format!("a range from {end}")));
            }
            end = segment.tokens.end;
            let Some(prefix) = &segment.prefix else {
                groups.push(vec![index]);
                continue;
            };
            let is_owner = |&owner: &usize| {
                let owner: &Segment = &segments[owner];
                owner.prefix.is_none() && owner.tokens.start == prefix.start && prefix.end <= owner.tokens.end
            };
            // The owner is nearly always the last group made.
            match groups.iter().rposition(|group| is_owner(&group[0])) {
                Some(group) => groups[group].push(index),
                None => return Err(shape_error(OP, "prefix", prefix, "the beginning of an earlier segment")),
            }
        }
        Ok(Self { segments, groups, plan: std::sync::OnceLock::new() })
    }

    /// Sequences without prefixes, given by their cumulative lengths (`cu_seqlens`, from 0 to `N`).
    ///
    /// # Errors
    /// If the lengths decrease or do not start at 0.
    pub fn packed(cu_seqlens: &[usize]) -> Result<Self, Error> {
        Self::new(cu_seqlens.windows(2).map(|w| Segment { tokens: w[0]..w[1], prefix: None }).collect())
    }

    /// Number of tokens.
    pub fn num_tokens(&self) -> usize {
        self.segments.last().map_or(0, |s| s.tokens.end)
    }

    /// The segments in the order of the batch.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Query-key pairs, the unit of attention's cost.
    pub fn num_pairs(&self) -> usize {
        let pairs = |s: &Segment| s.tokens.len() * (s.tokens.len() + 1) / 2 + s.tokens.len() * prefix_len(s);
        self.segments.iter().map(pairs).sum()
    }
}

fn prefix_len(segment: &Segment) -> usize {
    segment.prefix.as_ref().map_or(0, Range::len)
}

/// The log-sum-exp of each query's scaled scores, kept for backward.
#[derive(Clone, Debug)]
pub struct Saved {
    /// f32 `[H, N]`
    pub(super) log_sums: Tensor,
}

impl Saved {
    /// The log-sum-exps alone: f32 `[H, N]`.
    pub fn into_log_sums(self) -> Tensor {
        self.log_sums
    }

    /// What [`Self::into_log_sums`] came from.
    pub fn from_log_sums(log_sums: Tensor) -> Self {
        Self { log_sums }
    }
}

/// Query heads and key-value heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// `H`
    pub query: usize,
    /// `K`
    pub kv: usize,
}

/// [`forward`] over rows of heads, with `room` more columns behind the result (on a GPU).
///
/// # Shapes
/// `q`: `[N, H · d]`; `k`, `v`: `[N, K · d]`; returns `[N, H · d]`.
///
/// # Errors
/// If the shapes do not fit.
pub fn forward_rows(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    layout: &Layout,
    heads: Heads,
    room: usize,
) -> Result<(Wide, Saved), Error> {
    if q.device().is_cuda() {
        return super::cuda::attention::forward(q, k, v, layout, heads, room);
    }
    let [q, k, v] = split_heads(q, k, v, heads)?;
    let (o, saved) = forward(&q, &k, &v, layout)?;
    let (n, heads, d) = o.dims3()?;
    Ok((Wide::plain(o.reshape((n, heads * d))?)?, saved))
}

/// The gradients of [`forward_rows`]; on a GPU they are columns of one buffer `[N, (H + 2 K) d]`.
///
/// # Shapes
/// `dy`, `q`, `o`: `[N, H · d]`; `k`, `v`: `[N, K · d]`; returns the shapes of `q`, `k` and `v`.
///
/// # Errors
/// If the shapes do not fit.
#[expect(clippy::too_many_arguments, reason = "the operands of attention's backward")]
pub fn backward_rows(
    dy: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    o: &Wide,
    layout: &Layout,
    heads: Heads,
    saved: &Saved,
) -> Result<[Tensor; 3], Error> {
    if q.device().is_cuda() {
        return super::cuda::attention::backward(dy, q, k, v, o, layout, heads, saved);
    }
    let [q, k, v] = split_heads(q, k, v, heads)?;
    let shape = q.shape();
    let (dy, o) = (dy.reshape(shape)?, o.values()?.reshape(shape)?);
    let (dq, dk, dv) = backward(&dy, &q, &k, &v, &o, layout, saved)?;
    let join = |x: Tensor| -> Result<Tensor, Error> {
        let (n, heads, d) = x.dims3()?;
        Ok(x.reshape((n, heads * d))?)
    };
    Ok([join(dq)?, join(dk)?, join(dv)?])
}

fn split_heads(q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads) -> Result<[Tensor; 3], Error> {
    let split = |x: &Tensor, heads: usize| -> Result<Tensor, Error> {
        let (n, width) = super::view::dims2("attention", "heads", x)?;
        if heads == 0 || width % heads != 0 {
            return Err(shape_error("attention", "heads", x.dims(), format!("[N, a multiple of {heads}]")));
        }
        Ok(x.reshape((n, heads, width / heads))?)
    };
    Ok([split(q, heads.query)?, split(k, heads.kv)?, split(v, heads.kv)?])
}

#[derive(Clone, Copy)]
struct Sizes {
    n: usize,
    heads: usize,
    kv_heads: usize,
    d: usize,
    scale: f32,
}

impl Sizes {
    fn new(op: &'static str, q: &Tensor, k: &Tensor, v: &Tensor, layout: &Layout) -> Result<Self, Error> {
        let (n, heads, d) = q.dims3().map_err(|_| shape_error(op, "q", q.dims(), ["N", "H", "d"]))?;
        let (rows, kv_heads, kv_d) = k.dims3().map_err(|_| shape_error(op, "k", k.dims(), ["N", "K", "d"]))?;
        if rows != n || kv_d != d || kv_heads == 0 || heads % kv_heads != 0 {
            return Err(shape_error(op, "k", k.dims(), format!("[{n}, a divisor of {heads}, {d}]")));
        }
        if v.dims() != k.dims() {
            return Err(shape_error(op, "v", v.dims(), k.dims()));
        }
        if layout.num_tokens() != n {
            return Err(shape_error(op, "layout", layout.num_tokens(), n));
        }
        Ok(Self { n, heads, kv_heads, d, scale: (d as f32).sqrt().recip() })
    }

    /// Rows `tokens` of head `head` of a `[N, heads, d]` tensor.
    fn rows<'a>(&self, x: &'a [f32], heads: usize, head: usize, tokens: &Range<usize>) -> Matrix<'a> {
        let stride = heads * self.d;
        let start = if tokens.is_empty() { 0 } else { tokens.start * stride + head * self.d };
        Matrix::strided(&x[start..], tokens.len(), self.d, stride)
    }
}

/// The key ranges of a tile of queries, with the column each starts at in the tile's scores.
fn key_ranges(segment: &Segment, tile_end: usize) -> impl Iterator<Item = (usize, Range<usize>)> + Clone {
    let prefix = segment.prefix.clone().unwrap_or(0..0);
    let own = segment.tokens.start..tile_end;
    [(0, prefix.clone()), (prefix.len(), own)].into_iter().filter(|(_, range)| !range.is_empty())
}

/// The query tiles of a segment.
fn tiles(segment: &Segment) -> impl Iterator<Item = Range<usize>> {
    let end = segment.tokens.end;
    segment.tokens.clone().step_by(TILE).map(move |start| start..(start + TILE).min(end))
}

/// `softmax(q kᵀ / sqrt(d)) v` with each query's keys as the layout says.
///
/// # Shapes
/// See the module; returns `o`: f32 `[N, H, d]`.
///
/// # Errors
/// If the shapes do not fit.
pub fn forward(q: &Tensor, k: &Tensor, v: &Tensor, layout: &Layout) -> Result<(Tensor, Saved), Error> {
    const OP: &str = "attention";
    let sizes = Sizes::new(OP, q, k, v, layout)?;
    let Sizes { n, heads, kv_heads, d, scale } = sizes;
    let (q, k, v) = (q.contiguous()?, k.contiguous()?, v.contiguous()?);
    let (q, k, v) = (view(OP, &q)?, view(OP, &k)?, view(OP, &v)?);
    let jobs: Vec<(usize, usize)> = (0..layout.segments.len()).flat_map(|s| (0..heads).map(move |h| (s, h))).collect();
    let parts: Vec<(Vec<f32>, Vec<f32>)> = jobs
        .par_iter()
        .map(|&(segment, head)| {
            let segment = &layout.segments[segment];
            let kv_head = head / (heads / kv_heads);
            let mut out = vec![0.0; segment.tokens.len() * d];
            let mut log_sums = Vec::with_capacity(segment.tokens.len());
            let mut scores = vec![0.0; TILE * (prefix_len(segment) + segment.tokens.len())];
            for tile in tiles(segment) {
                let width = prefix_len(segment) + tile.end - segment.tokens.start;
                let scores = &mut scores[..tile.len() * width];
                let queries = sizes.rows(&q, heads, head, &tile);
                for (column, range) in key_ranges(segment, tile.end) {
                    let keys = sizes.rows(&k, kv_heads, kv_head, &range).t();
                    multiply(&mut scores[column..], width, 0.0, 1.0, queries, keys, Threads::One);
                }
                let mut sums = [1.0; TILE];
                for ((row, token), sum) in scores.chunks_exact_mut(width).zip(tile.clone()).zip(&mut sums) {
                    let (seen, unseen) = row.split_at_mut(prefix_len(segment) + token + 1 - segment.tokens.start);
                    let shift = vector::max(seen) * scale;
                    *sum = vector::exp_in_place(seen, scale, shift);
                    unseen.fill(0.0);
                    log_sums.push(shift + sum.ln());
                }
                let start = tile.start - segment.tokens.start;
                let out = &mut out[start * d..(start + tile.len()) * d];
                for (column, range) in key_ranges(segment, tile.end) {
                    let weights = Matrix::strided(&scores[column..], tile.len(), range.len(), width);
                    let values = sizes.rows(&v, kv_heads, kv_head, &range);
                    multiply(out, d, 1.0, 1.0, weights, values, Threads::One);
                }
                for (out, sum) in out.chunks_exact_mut(d).zip(sums) {
                    out.iter_mut().for_each(|o| *o /= sum);
                }
            }
            (out, log_sums)
        })
        .collect();
    let mut out = vec![0.0; n * heads * d];
    let mut log_sums = vec![0.0; heads * n];
    for (&(segment, head), (part, part_log_sums)) in jobs.iter().zip(&parts) {
        let tokens = layout.segments[segment].tokens.clone();
        log_sums[head * n..][tokens.clone()].copy_from_slice(part_log_sums);
        for (token, row) in tokens.zip(part.chunks_exact(d)) {
            out[(token * heads + head) * d..][..d].copy_from_slice(row);
        }
    }
    Ok((tensor(out, (n, heads, d))?, Saved { log_sums: tensor(log_sums, (heads, n))? }))
}

/// Gradients of one group of segments and one key-value head.
struct Part {
    /// `[tokens of the group, H / K, d]`
    dq: Vec<f32>,
    /// `[tokens of the group, d]`
    dk: Vec<f32>,
    dv: Vec<f32>,
}

/// The gradients of [`forward`] with respect to `q`, `k` and `v`.
///
/// # Shapes
/// See the module; `dy`: f32 `[N, H, d]`, `o`: the output of [`forward`].
///
/// # Errors
/// If the shapes do not fit.
///
/// # Equation
/// `FlashAttention` (2205.14135), appendix B.2: `dS = P ∘ (dP - rowsum(dO ∘ O))`.
pub fn backward(
    dy: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    o: &Tensor,
    layout: &Layout,
    saved: &Saved,
) -> Result<(Tensor, Tensor, Tensor), Error> {
    const OP: &str = "attention backward";
    let sizes = Sizes::new(OP, q, k, v, layout)?;
    let Sizes { n, heads, kv_heads, d, .. } = sizes;
    if dy.dims() != q.dims() {
        return Err(shape_error(OP, "dy", dy.dims(), q.dims()));
    }
    let dy = dy.contiguous()?;
    let (dy, q, k, v, o) = (view(OP, &dy)?, view(OP, q)?, view(OP, k)?, view(OP, v)?, view(OP, o)?);
    let log_sums = view(OP, &saved.log_sums)?;
    let repeat = heads / kv_heads;
    let jobs: Vec<(usize, usize)> = (0..layout.groups.len()).flat_map(|g| (0..kv_heads).map(move |h| (g, h))).collect();
    let parts: Vec<Part> = jobs
        .par_iter()
        .map(|&(group, kv_head)| {
            let segments: Vec<&Segment> = layout.groups[group].iter().map(|&s| &layout.segments[s]).collect();
            group_backward(&sizes, &segments, kv_head, &dy, &q, &k, &v, &o, &log_sums)
        })
        .collect();
    let mut dq = vec![0.0; n * heads * d];
    let (mut dk, mut dv) = (vec![0.0; n * kv_heads * d], vec![0.0; n * kv_heads * d]);
    for (&(group, kv_head), part) in jobs.iter().zip(&parts) {
        let tokens = layout.groups[group].iter().flat_map(|&s| layout.segments[s].tokens.clone());
        for (local, token) in tokens.enumerate() {
            let query = (token * heads + kv_head * repeat) * d;
            dq[query..query + repeat * d].copy_from_slice(&part.dq[local * repeat * d..][..repeat * d]);
            let key = (token * kv_heads + kv_head) * d;
            dk[key..key + d].copy_from_slice(&part.dk[local * d..][..d]);
            dv[key..key + d].copy_from_slice(&part.dv[local * d..][..d]);
        }
    }
    Ok((tensor(dq, (n, heads, d))?, tensor(dk, (n, kv_heads, d))?, tensor(dv, (n, kv_heads, d))?))
}

#[expect(clippy::too_many_arguments, reason = "the operands of attention's backward")]
fn group_backward(
    sizes: &Sizes,
    segments: &[&Segment],
    kv_head: usize,
    dy: &[f32],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    o: &[f32],
    log_sums: &[f32],
) -> Part {
    let Sizes { n, heads, kv_heads, d, scale } = *sizes;
    let repeat = heads / kv_heads;
    let total: usize = segments.iter().map(|s| s.tokens.len()).sum();
    let longest = segments.iter().map(|s| prefix_len(s) + s.tokens.len()).max().unwrap_or(0);
    let mut part = Part { dq: vec![0.0; total * repeat * d], dk: vec![0.0; total * d], dv: vec![0.0; total * d] };
    let (mut p, mut dp) = (vec![0.0; TILE * longest], vec![0.0; TILE * longest]);
    let mut first_local = 0;
    for segment in segments {
        // Local rows of the keys: a prefix is the beginning of the group's first segment.
        let local_of = |range: &Range<usize>| if range.start < segment.tokens.start { 0 } else { first_local };
        for head in kv_head * repeat..(kv_head + 1) * repeat {
            for tile in tiles(segment) {
                let width = prefix_len(segment) + tile.end - segment.tokens.start;
                let (p, dp) = (&mut p[..tile.len() * width], &mut dp[..tile.len() * width]);
                let queries = sizes.rows(q, heads, head, &tile);
                let d_out = sizes.rows(dy, heads, head, &tile);
                for (column, range) in key_ranges(segment, tile.end) {
                    let keys = sizes.rows(k, kv_heads, kv_head, &range).t();
                    multiply(&mut p[column..], width, 0.0, 1.0, queries, keys, Threads::One);
                    let values = sizes.rows(v, kv_heads, kv_head, &range).t();
                    multiply(&mut dp[column..], width, 0.0, 1.0, d_out, values, Threads::One);
                }
                for (row, token) in p.chunks_exact_mut(width).zip(tile.clone()) {
                    let (seen, unseen) = row.split_at_mut(prefix_len(segment) + token + 1 - segment.tokens.start);
                    vector::exp_in_place(seen, scale, log_sums[head * n + token]);
                    unseen.fill(0.0);
                }
                for (column, range) in key_ranges(segment, tile.end) {
                    let local = local_of(&range);
                    let weights = Matrix::strided(&p[column..], tile.len(), range.len(), width).t();
                    multiply(&mut part.dv[local * d..], d, 1.0, 1.0, weights, d_out, Threads::One);
                }
                for ((row, dp), token) in p.chunks_exact_mut(width).zip(dp.chunks_exact(width)).zip(tile.clone()) {
                    let at = (token * heads + head) * d;
                    let delta = vector::dot(&dy[at..at + d], &o[at..at + d]);
                    vector::softmax_backward(row, dp, delta);
                }
                let local_query = first_local + tile.start - segment.tokens.start;
                for (column, range) in key_ranges(segment, tile.end) {
                    let local = local_of(&range);
                    let d_scores = Matrix::strided(&p[column..], tile.len(), range.len(), width);
                    let keys = sizes.rows(k, kv_heads, kv_head, &range);
                    let dq = &mut part.dq[(local_query * repeat + head - kv_head * repeat) * d..];
                    multiply(dq, repeat * d, 1.0, scale, d_scores, keys, Threads::One);
                    multiply(&mut part.dk[local * d..], d, 1.0, scale, d_scores.t(), queries, Threads::One);
                }
            }
        }
        first_local += segment.tokens.len();
    }
    part
}
