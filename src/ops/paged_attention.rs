//! Attention of a few query rows against a paged key-value cache (`PagedAttention`, Kwon et al., 2309.06180).
//!
//! The rollout calls it once per layer and step, for prefill chunks and for decoding alike. Forward only: nothing is
//! trained through a cache. A query row's result is computed from its own context in one fixed order, so it has the
//! same bits whatever else is in the step, however a prompt is cut into chunks, and on any number of threads.
//!
//! Shapes: `N` query rows of the step, `H` query heads, `K` key-value heads, `D` head size, `P` pages in the cache,
//! `T` tokens in a page.

use std::ops::Range;

use rayon::prelude::*;

use crate::kernels::cpu::Level;
use crate::kernels::cpu::paged::{PageHead, RunningSoftmax, attend_page};

/// Query rows of one sequence that a task works on at once: enough to use a page of keys several times while it is in
/// the first-level cache, few enough to give short chunks to several threads.
const ROW_BLOCK: usize = 8;

/// What is wrong with the arguments of [`paged_attention`].
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The heads do not divide.
    #[error(
        "paged attention: {heads} query heads cannot share {kv_heads} key-value heads; the first must be a multiple of the second"
    )]
    Heads {
        /// Query heads.
        heads: usize,
        /// Key-value heads.
        kv_heads: usize,
    },
    /// A slice has the wrong length.
    #[error("paged attention: `{name}` holds {got} numbers, expected {expected}")]
    Length {
        /// Which argument.
        name: &'static str,
        /// Its length.
        got: usize,
        /// The length that the shape asks for.
        expected: usize,
    },
    /// The sequences' rows do not follow one another.
    #[error("paged attention: sequence {sequence} has query rows {}..{}, expected them to start at {expected}; list the sequences in row order without gaps", rows.start, rows.end)]
    Rows {
        /// Which sequence.
        sequence: usize,
        /// Its rows.
        rows: Range<usize>,
        /// Where they should start.
        expected: usize,
    },
    /// A sequence has too few pages, or one that does not exist.
    #[error(
        "paged attention: sequence {sequence} has {tokens} tokens in {pages} pages, the largest page id is {largest}; the cache has {cache_pages} pages of {page_tokens} tokens"
    )]
    Pages {
        /// Which sequence.
        sequence: usize,
        /// Cached and new tokens.
        tokens: usize,
        /// Pages given.
        pages: usize,
        /// Largest page id given.
        largest: u32,
        /// Pages in the cache.
        cache_pages: usize,
        /// Tokens a page holds.
        page_tokens: usize,
    },
}

/// Sizes of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagedShape {
    /// `H`.
    pub heads: usize,
    /// `K`; divides `H`.
    pub kv_heads: usize,
    /// `D`.
    pub head_dim: usize,
    /// `T`.
    pub page_tokens: usize,
}

/// One sequence of a step.
#[derive(Clone, Debug)]
pub struct PagedSequence<'a> {
    /// Its query rows, the newest tokens of the sequence.
    pub rows: Range<usize>,
    /// Its pages in order of position.
    pub pages: &'a [u32],
    /// Tokens before the first query row; row `i` sees `context + i + 1` keys.
    pub context: usize,
}

/// Keys and values of one layer.
#[derive(Clone, Copy, Debug)]
pub struct PagedKv<'a> {
    /// `[P, T, K, D]`.
    pub keys: &'a [f32],
    /// `[P, T, K, D]`.
    pub values: &'a [f32],
}

/// Softmax attention of every query row over the keys at its own and earlier positions.
///
/// The softmax runs online, page by page, with f32 accumulators.
///
/// # Shapes
/// `queries`, `out`: f32 `[N, H, D]`; `kv`: f32 `[P, T, K, D]`. The keys of the query rows are already in the cache.
/// # Errors
/// If lengths, heads, rows or pages do not fit together.
/// # Equation
/// `softmax(scale * q k^T) v` (Vaswani et al., 1706.03762, eq. 1), query head `h` with key-value head `h / (H / K)`
/// (Ainslie et al., 2305.13245), softmax as in Milakov and Gimelshein, 1805.02867, alg. 3.
pub fn paged_attention(
    shape: PagedShape,
    scale: f32,
    queries: &[f32],
    kv: PagedKv<'_>,
    sequences: &[PagedSequence<'_>],
    out: &mut [f32],
) -> Result<(), Error> {
    check(shape, queries, kv, sequences, out.len())?;
    let group_dim = shape.heads / shape.kv_heads * shape.head_dim;
    if group_dim == 0 || queries.is_empty() {
        return Ok(());
    }
    let mut tasks = split(shape, sequences, out.chunks_exact_mut(group_dim));
    tasks.par_iter_mut().for_each(|task| attend(shape, scale, queries, kv, task));
    Ok(())
}

fn check(
    shape: PagedShape,
    queries: &[f32],
    kv: PagedKv<'_>,
    sequences: &[PagedSequence<'_>],
    out: usize,
) -> Result<(), Error> {
    let PagedShape { heads, kv_heads, head_dim, page_tokens } = shape;
    if kv_heads == 0 || heads % kv_heads != 0 {
        return Err(Error::Heads { heads, kv_heads });
    }
    let page = page_tokens * kv_heads * head_dim;
    let cache_pages = kv.keys.len().checked_div(page).unwrap_or(0);
    let rows = check_sequences(sequences, page_tokens, cache_pages)?;
    let expected = rows * heads * head_dim;
    for (name, got) in [("queries", queries.len()), ("out", out)] {
        if got != expected {
            return Err(Error::Length { name, got, expected });
        }
    }
    for (name, got) in [("keys", kv.keys.len()), ("values", kv.values.len())] {
        if got != cache_pages * page {
            return Err(Error::Length { name, got, expected: cache_pages * page });
        }
    }
    Ok(())
}

/// Checks that the sequences' rows follow one another and that their pages are in the cache; returns how many rows there
/// are.
pub(crate) fn check_sequences(
    sequences: &[PagedSequence<'_>],
    page_tokens: usize,
    cache_pages: usize,
) -> Result<usize, Error> {
    let mut rows = 0;
    for (index, sequence) in sequences.iter().enumerate() {
        if sequence.rows.start != rows || sequence.rows.end < rows {
            return Err(Error::Rows { sequence: index, rows: sequence.rows.clone(), expected: rows });
        }
        rows = sequence.rows.end;
        let tokens = sequence.context + sequence.rows.len();
        let largest = sequence.pages.iter().copied().max().unwrap_or(0);
        if sequence.pages.len() * page_tokens < tokens || (tokens > 0 && largest as usize >= cache_pages) {
            let pages = sequence.pages.len();
            return Err(Error::Pages { sequence: index, tokens, pages, largest, cache_pages, page_tokens });
        }
    }
    Ok(rows)
}

/// Up to [`ROW_BLOCK`] rows of one sequence with the query heads of one key-value head.
struct Task<'a, 'o> {
    sequence: &'a PagedSequence<'a>,
    first_row: usize,
    kv_head: usize,
    /// Per row `[H / K, D]`.
    out: Vec<&'o mut [f32]>,
}

/// Hands each `[H / K, D]` piece of the output to the task that computes it.
fn split<'a, 'o>(
    shape: PagedShape,
    sequences: &'a [PagedSequence<'a>],
    mut pieces: impl Iterator<Item = &'o mut [f32]>,
) -> Vec<Task<'a, 'o>> {
    let mut tasks = Vec::new();
    for sequence in sequences {
        for first_row in sequence.rows.clone().step_by(ROW_BLOCK) {
            let rows = (sequence.rows.end - first_row).min(ROW_BLOCK);
            let first_task = tasks.len();
            tasks.extend((0..shape.kv_heads).map(|kv_head| Task {
                sequence,
                first_row,
                kv_head,
                out: Vec::with_capacity(rows),
            }));
            for _ in 0..rows {
                for (task, piece) in tasks[first_task..].iter_mut().zip(&mut pieces) {
                    task.out.push(piece);
                }
            }
        }
    }
    tasks
}

fn attend(shape: PagedShape, scale: f32, queries: &[f32], kv: PagedKv<'_>, task: &mut Task<'_, '_>) {
    let PagedShape { heads, kv_heads, head_dim, page_tokens } = shape;
    let level = Level::best();
    let group = heads / kv_heads;
    let mut states = vec![RunningSoftmax::EMPTY; task.out.len() * group];
    let mut scores = vec![0.0_f32; page_tokens];
    for out in &mut task.out {
        out.fill(0.0);
    }
    let sequence = task.sequence;
    let first_limit = sequence.context + (task.first_row - sequence.rows.start) + 1;
    let last_limit = first_limit + task.out.len() - 1;
    let stride = kv_heads * head_dim;
    for (page_index, &page) in sequence.pages.iter().take(last_limit.div_ceil(page_tokens)).enumerate() {
        let numbers = page as usize * page_tokens * stride..(page as usize + 1) * page_tokens * stride;
        let page = PageHead {
            keys: &kv.keys[numbers.clone()],
            values: &kv.values[numbers],
            stride,
            offset: task.kv_head * head_dim,
        };
        for (row, (out, states)) in task.out.iter_mut().zip(states.chunks_exact_mut(group)).enumerate() {
            let visible = (first_limit + row).saturating_sub(page_index * page_tokens).min(page_tokens);
            let query = ((task.first_row + row) * heads + task.kv_head * group) * head_dim;
            let query = &queries[query..query + group * head_dim];
            attend_page(level, scale, query, page, &mut scores[..visible], states, out);
        }
    }
    for (out, states) in task.out.iter_mut().zip(states.chunks_exact(group)) {
        for (out, state) in out.chunks_exact_mut(head_dim).zip(states) {
            let inverse = 1.0 / state.sum;
            out.iter_mut().for_each(|x| *x *= inverse);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    /// A cache with shuffled pages, three sequences in different states, and the plain f64 result.
    struct Case {
        shape: PagedShape,
        queries: Vec<f32>,
        keys: Vec<f32>,
        values: Vec<f32>,
        /// Rows and context per sequence.
        sequences: Vec<(Range<usize>, usize, Vec<u32>)>,
    }

    impl Case {
        fn new(shape: PagedShape, lengths: &[(usize, usize)]) -> Self {
            let mut stream = Stream::new(11, "paged attention test", shape.head_dim as u64, shape.heads as u64);
            let mut total_pages = 0;
            let mut sequences = Vec::new();
            let mut row = 0;
            for &(context, rows) in lengths {
                let pages = (context + rows).div_ceil(shape.page_tokens);
                sequences.push((
                    row..row + rows,
                    context,
                    (total_pages..total_pages + pages as u32).collect::<Vec<_>>(),
                ));
                total_pages += pages as u32;
                row += rows;
            }
            let mut order: Vec<u32> = (0..total_pages + 2).collect();
            stream.shuffle(&mut order);
            for (_, _, pages) in &mut sequences {
                pages.iter_mut().for_each(|page| *page = order[*page as usize]);
            }
            let mut normals = |count: usize| (0..count).map(|_| stream.normal() as f32).collect::<Vec<_>>();
            let cache = order.len() * shape.page_tokens * shape.kv_heads * shape.head_dim;
            let queries = normals(row * shape.heads * shape.head_dim);
            Self { shape, queries, keys: normals(cache), values: normals(cache), sequences }
        }

        fn run(&self) -> Vec<f32> {
            let mut out = vec![f32::NAN; self.queries.len()];
            let sequences: Vec<_> = self
                .sequences
                .iter()
                .map(|(rows, context, pages)| PagedSequence { rows: rows.clone(), pages, context: *context })
                .collect();
            let kv = PagedKv { keys: &self.keys, values: &self.values };
            paged_attention(self.shape, 0.3, &self.queries, kv, &sequences, &mut out).unwrap();
            out
        }

        fn expected(&self) -> Vec<f64> {
            let PagedShape { heads, kv_heads, head_dim, page_tokens } = self.shape;
            let mut out = Vec::new();
            for (rows, context, pages) in &self.sequences {
                for (index, row) in rows.clone().enumerate() {
                    for head in 0..heads {
                        let at = |token: usize, dim: usize| {
                            let page = pages[token / page_tokens] as usize;
                            let head = head / (heads / kv_heads);
                            ((page * page_tokens + token % page_tokens) * kv_heads + head) * head_dim + dim
                        };
                        let query = &self.queries[(row * heads + head) * head_dim..][..head_dim];
                        let weights: Vec<f64> = (0..=context + index)
                            .map(|token| {
                                let score: f64 = (0..head_dim)
                                    .map(|dim| f64::from(query[dim]) * f64::from(self.keys[at(token, dim)]))
                                    .sum();
                                (0.3 * score).exp()
                            })
                            .collect();
                        let sum: f64 = weights.iter().sum();
                        out.extend((0..head_dim).map(|dim| {
                            weights
                                .iter()
                                .enumerate()
                                .map(|(token, weight)| weight / sum * f64::from(self.values[at(token, dim)]))
                                .sum::<f64>()
                        }));
                    }
                }
            }
            out
        }
    }

    #[test]
    fn equals_plain_attention_for_odd_shapes_and_mixed_steps() {
        for (heads, kv_heads, head_dim, page_tokens) in [(4, 2, 8, 16), (7, 1, 64, 16), (3, 3, 13, 4), (6, 2, 5, 1)] {
            let shape = PagedShape { heads, kv_heads, head_dim, page_tokens };
            let case = Case::new(shape, &[(0, 1), (0, 37), (50, 1), (15, 1), (16, 9), (31, 2), (0, 0)]);
            for (got, expected) in case.run().iter().zip(case.expected()) {
                assert!((f64::from(*got) - expected).abs() < 2e-6, "{shape:?}: {got}, expected {expected}");
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_in_a_chunk_and_alone() {
        let shape = PagedShape { heads: 4, kv_heads: 2, head_dim: 24, page_tokens: 16 };
        let mut case = Case::new(shape, &[(3, 70)]);
        let whole = case.run();
        let (_, _, pages) = case.sequences[0].clone();
        case.sequences = (0..70).map(|row| (row..row + 1, 3 + row, pages.clone())).collect();
        assert_eq!(whole, case.run());
    }

    #[test]
    fn arguments_that_do_not_fit_are_named() {
        let shape = PagedShape { heads: 4, kv_heads: 2, head_dim: 8, page_tokens: 16 };
        let kv = PagedKv { keys: &[0.0; 512], values: &[0.0; 512] }; // two pages
        let run = |shape, rows: Range<usize>, pages: &[u32], context, queries: usize| {
            let sequence = PagedSequence { rows, pages, context };
            let mut out = vec![0.0; queries];
            paged_attention(shape, 1.0, &vec![0.0; queries], kv, &[sequence], &mut out).unwrap_err().to_string()
        };
        assert!(run(PagedShape { heads: 5, ..shape }, 0..1, &[0], 0, 40).contains("5 query heads"));
        assert!(run(shape, 1..2, &[0], 0, 32).contains("start at 0"));
        assert!(run(shape, 0..1, &[0], 16, 32).contains("17 tokens in 1 pages"));
        assert!(run(shape, 0..1, &[2], 0, 32).contains("largest page id is 2"));
        assert!(run(shape, 0..1, &[0], 0, 31).contains("31 numbers, expected 32"));
    }
}
