//! Paged attention and its cache against plain loops, and how fast they are.

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use trainer::device::{Queue, array, empty, matrix, synchronize};
use trainer::kernels::cuda::{
    Lane, Lanes, LanesSize, NO_SLOT, PageSharing, PageStores, PagedCache, PagedLists, PagedSize, PagedStep, Rows,
    copy_pages, decode_attention, decode_attention_workspace, decode_combine, page_sharing, paged_attention,
    paged_attention_workspace, write_pages,
};

use crate::support::{assert_close, device, download, random, upload};

/// Relative error: softmax weights and results are rounded to the narrower of the two types.
fn tolerance(types: (DType, DType)) -> f32 {
    if types.0 == DType::BF16 || types.1 == DType::BF16 {
        1e-2
    } else if types.0 == DType::F16 || types.1 == DType::F16 {
        2e-3
    } else {
        1e-5
    }
}

/// The cache of a layer, poisoned.
struct Cache {
    keys: Tensor,
    values: Tensor,
    shape: Shape,
}

impl Cache {
    fn view(&self) -> PagedCache<'_> {
        let Shape { kv_heads, head_dim, page_tokens, .. } = self.shape;
        let (keys, values) = (array(&self.keys).unwrap(), array(&self.values).unwrap());
        PagedCache { keys, values, dtype: self.keys.dtype(), kv_heads, head_dim, page_tokens }
    }
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    page_tokens: usize,
}

fn cache(device: &Device, shape: Shape, pages: usize, dtype: DType) -> Cache {
    let Shape { kv_heads, head_dim, page_tokens, .. } = shape;
    let dims = (pages, page_tokens, kv_heads, head_dim);
    let poison = vec![f32::NAN; pages * page_tokens * kv_heads * head_dim];
    let (keys, values) = (upload(device, &poison, dims, dtype), upload(device, &poison, dims, dtype));
    Cache { keys, values, shape }
}

/// Sequences with their pages in a random order, two pages more than needed.
struct Sequences {
    /// Keys before the first query row, query rows.
    lengths: Vec<(usize, usize)>,
    pages: Vec<Vec<u32>>,
    num_pages: usize,
}

impl Sequences {
    fn new(lengths: &[(usize, usize)], page_tokens: usize) -> Self {
        let counts = lengths.iter().map(|(context, rows)| (context + rows).div_ceil(page_tokens));
        let num_pages = counts.clone().sum::<usize>() + 2;
        let draws = random("page order", num_pages);
        let mut order: Vec<u32> = (0..num_pages as u32).collect();
        order.sort_by(|&i, &j| draws[i as usize].total_cmp(&draws[j as usize]));
        let mut rest = order.into_iter();
        let pages = counts.map(|count| rest.by_ref().take(count).collect()).collect();
        Self { lengths: lengths.to_vec(), pages, num_pages }
    }

    fn slots(&self, page_tokens: usize) -> Vec<u32> {
        let tokens = self.lengths.iter().zip(&self.pages);
        tokens
            .flat_map(|((context, rows), pages)| {
                (0..context + rows).map(move |i| pages[i / page_tokens] * page_tokens as u32 + (i % page_tokens) as u32)
            })
            .collect()
    }

    /// Every token's slot, page lists of all sequences, each query row's place in them with the number of keys it sees.
    fn lists(&self, page_tokens: usize) -> PagedLists {
        let (mut tables, mut rows) = (vec![u32::MAX], Vec::new());
        for ((context, count), pages) in self.lengths.iter().zip(&self.pages) {
            for row in 0..*count {
                rows.push([tables.len() as u32, (context + row + 1) as u32]);
            }
            tables.extend(pages);
        }
        PagedLists { slots: self.slots(page_tokens), rows, tables }
    }

    fn size(&self, page_tokens: usize) -> PagedSize {
        PagedSize { pages: self.num_pages, page_tokens }
    }
}

/// `types`: of queries and results, and of the cache.
fn check(device: &Device, shape: Shape, types: (DType, DType), lengths: &[(usize, usize)]) {
    let Shape { heads, kv_heads, head_dim, page_tokens } = shape;
    let scale = 1.3 / (head_dim as f32).sqrt();
    let sequences = Sequences::new(lengths, page_tokens);
    let cache = cache(device, shape, sequences.num_pages, types.1);
    let lists = sequences.lists(page_tokens);
    let step = PagedStep::new(device, sequences.size(page_tokens), &lists).unwrap();
    let (tokens, width) = (lists.slots.len(), kv_heads * head_dim);
    // Keys and values side by side with something between, as a projection leaves them.
    let fused = upload(device, &random("keys and values", tokens * (2 * width + 8)), (tokens, 2 * width + 8), types.0);
    let (k, v) = (fused.narrow(1, 0, width).unwrap(), fused.narrow(1, width + 8, width).unwrap());
    write_pages(device, cache.view(), matrix(&k).unwrap(), matrix(&v).unwrap(), &step).unwrap();
    let rounded = |x: &Tensor| download(&x.contiguous().unwrap().to_dtype(types.1).unwrap());
    let (k, v) = (rounded(&k), rounded(&v));

    let (num_rows, max_context) = (lists.rows.len(), lists.max_context());
    let row_width = heads * head_dim;
    let queries = upload(device, &random("queries", num_rows * (row_width + 24)), (num_rows, row_width + 24), types.0);
    let q = queries.narrow(1, 16, row_width).unwrap();
    let out = upload(device, &vec![f32::NAN; num_rows * (row_width + 8)], (num_rows, row_width + 8), types.0);
    let out_view = out.narrow(1, 8, row_width).unwrap();
    let floats = paged_attention_workspace(num_rows, heads, kv_heads, head_dim, max_context);
    let workspace = upload(device, &vec![f32::NAN; floats.max(1)], floats.max(1), DType::F32);
    let run = || {
        let workspace = Some(array(&workspace).unwrap());
        let (out, q) = (matrix(&out_view).unwrap(), matrix(&q).unwrap());
        paged_attention(device, out, q, cache.view(), &step, scale, workspace).unwrap();
        download(&out_view.contiguous().unwrap())
    };
    let got = run();
    assert_eq!(got, run(), "{shape:?} {types:?}: the same call has other bits");
    assert!(download(&out.narrow(1, 0, 8).unwrap().contiguous().unwrap()).iter().all(|x| x.is_nan()));

    let q = download(&q.contiguous().unwrap());
    let mut want = Vec::with_capacity(got.len());
    let (mut row, mut first_token) = (0, 0);
    for (context, count) in lengths {
        for seen in context + 1..=context + count {
            for head in 0..heads {
                let query = &q[row * row_width + head * head_dim..][..head_dim];
                let at = |token: usize| ((first_token + token) * kv_heads + head / (heads / kv_heads)) * head_dim;
                let dot = |token: usize| -> f64 {
                    let key = &k[at(token)..][..head_dim];
                    query.iter().zip(key).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
                };
                let scores: Vec<f64> = (0..seen).map(|token| f64::from(scale) * dot(token)).collect();
                let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - top).exp()).collect();
                let sum: f64 = weights.iter().sum();
                let mut result = vec![0.0_f64; head_dim];
                for (token, weight) in weights.iter().enumerate() {
                    for (x, value) in result.iter_mut().zip(&v[at(token)..][..head_dim]) {
                        *x += weight / sum * f64::from(*value);
                    }
                }
                want.extend(result.iter().map(|x| *x as f32));
            }
            row += 1;
        }
        first_token += context + count;
    }
    assert_close(&format!("{shape:?} {types:?} {lengths:?}"), &got, &want, tolerance(types));
}

const TYPES: [(DType, DType); 6] = [
    (DType::F32, DType::F32),
    (DType::F16, DType::F16),
    (DType::BF16, DType::BF16),
    (DType::BF16, DType::F32),
    (DType::F32, DType::BF16),
    (DType::BF16, DType::F16),
];

#[test]
#[ignore = "gpu"]
fn decoding_equals_plain_attention() {
    let device = device();
    for types in TYPES {
        for (heads, kv_heads, head_dim) in [(14, 2, 64), (7, 1, 128), (16, 8, 128), (4, 4, 64), (20, 1, 64)] {
            let shape = Shape { heads, kv_heads, head_dim, page_tokens: 16 };
            check(&device, shape, types, &[(0, 1), (15, 1), (16, 1), (63, 1), (200, 1), (77, 1)]);
        }
    }
}

#[test]
#[ignore = "gpu"]
fn long_contexts_are_split_and_joined() {
    let device = device();
    for types in TYPES {
        for (heads, kv_heads, head_dim) in [(4, 2, 128), (7, 1, 64), (3, 1, 20)] {
            let shape = Shape { heads, kv_heads, head_dim, page_tokens: 16 };
            check(&device, shape, types, &[(2100, 1), (3, 1), (127, 1), (128, 1), (520, 2), (1023, 1)]);
        }
    }
}

#[test]
#[ignore = "gpu"]
fn prompts_and_decoding_share_a_step() {
    let device = device();
    for types in TYPES {
        for (heads, kv_heads, head_dim) in [(14, 2, 64), (8, 1, 128), (3, 3, 64), (5, 1, 128)] {
            let shape = Shape { heads, kv_heads, head_dim, page_tokens: 16 };
            check(&device, shape, types, &[(40, 1), (0, 75), (33, 50), (9, 1), (10, 1), (0, 0), (130, 3)]);
        }
    }
}

/// Lanes of a few prompts, whose pages they share, between some that share nothing and an empty one: as plain loops, and each as when
/// nobody reads pages together.
#[test]
#[ignore = "gpu"]
fn lanes_that_share_pages_attend_as_alone() {
    let device = device();
    for (heads, kv_heads, head_dim, dtype) in [
        (14, 2, 64, DType::BF16),
        (28, 4, 128, DType::BF16),
        (40, 8, 128, DType::F16),
        (32, 8, 128, DType::BF16),
        (16, 2, 128, DType::BF16),
        (64, 1, 64, DType::F16),
        (8, 4, 192, DType::BF16),
    ] {
        let shape = Shape { heads, kv_heads, head_dim, page_tokens: 16 };
        for prompts in [
            vec![(16, 1024), (1, 300), (16, 1024)],
            vec![(4, 128), (3, 127), (9, 129)],
            vec![(2, 640), (1, 0), (40, 256)],
            vec![(1, 2000)],
        ] {
            check_lanes(&device, shape, dtype, &prompts);
        }
    }
}

/// `prompts`: lanes of each, and its tokens.
fn check_lanes(device: &Device, shape: Shape, dtype: DType, prompts: &[(usize, usize)]) {
    let Shape { heads, kv_heads, head_dim, page_tokens } = shape;
    let (width, scale) = (kv_heads * head_dim, 1.3 / (head_dim as f32).sqrt());
    // Whole pages of a prompt are shared, what comes after them is a lane's own.
    let (mut contexts, mut pages, mut next) = (Vec::new(), Vec::new(), 0);
    let mut take = |count: usize| {
        next += count as u32;
        (next - count as u32..next).collect::<Vec<_>>()
    };
    for (lanes, tokens) in prompts {
        let common = take(tokens / page_tokens);
        for lane in 0..*lanes {
            let context = tokens + 37 * lane;
            let own = take((context + 1).div_ceil(page_tokens) - common.len());
            contexts.push(context);
            pages.push([common.clone(), own].concat());
        }
    }
    let (count, num_pages) = (contexts.len(), next as usize);
    let store = |name| {
        let dims = (num_pages, page_tokens, kv_heads, head_dim);
        upload(device, &random(name, num_pages * page_tokens * width), dims, dtype)
    };
    let cache = Cache { keys: store("keys"), values: store("values"), shape };
    let q = upload(device, &random("queries", (count + 1) * heads * head_dim), (count + 1, heads * head_dim), dtype);
    let max_context = contexts.iter().max().unwrap() + 5;
    let queue = Queue::of(device).unwrap();
    let run = |sharing: PageSharing| {
        // One more than there are, which is empty.
        let size = LanesSize { lanes: count + 1, steps: 1, pages: pages.iter().map(Vec::len).sum(), sharing };
        let mut lanes = Lanes::new(&queue, size, PagedSize { pages: num_pages, page_tokens }, 10).unwrap();
        let each: Vec<Lane<'_>> =
            contexts.iter().zip(&pages).map(|(&context, pages)| Lane { token: 1, context, pages, seen: &[] }).collect();
        lanes.begin(&each, count + 1, 1, &vec![0.5; count]).unwrap();
        let view = lanes.view(count + 1).unwrap();
        let floats = decode_attention_workspace(count + 1, heads, head_dim, max_context);
        let parts = upload(device, &vec![f32::NAN; floats], floats, DType::F32);
        let out = upload(device, &vec![f32::NAN; (count + 1) * heads * head_dim], (count + 1, heads * head_dim), dtype);
        decode_attention(device, array(&parts).unwrap(), matrix(&q).unwrap(), cache.view(), &view, max_context, scale)
            .unwrap();
        let rows = Rows::plain(matrix(&out).unwrap());
        decode_combine(device, rows, array(&parts).unwrap(), &view, (head_dim, max_context)).unwrap();
        download(&out)
    };
    let (keys, values, queries) = (download(&cache.keys), download(&cache.values), download(&q));
    let mut want = Vec::new();
    for (lane, (context, pages)) in contexts.iter().zip(&pages).enumerate() {
        let place = |key: usize| (pages[key / page_tokens] as usize * page_tokens + key % page_tokens) * width;
        for head in 0..heads {
            let (query, own) =
                (&queries[(lane * heads + head) * head_dim..][..head_dim], head * kv_heads / heads * head_dim);
            let scores: Vec<f32> = (0..=*context)
                .map(|key| scale * query.iter().zip(&keys[place(key) + own..]).map(|(q, k)| q * k).sum::<f32>())
                .collect();
            let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let weights: Vec<f32> = scores.iter().map(|score| (score - top).exp()).collect();
            let sum: f32 = weights.iter().sum();
            let mut row = vec![0f32; head_dim];
            for (key, weight) in weights.iter().enumerate() {
                row.iter_mut().zip(&values[place(key) + own..]).for_each(|(x, value)| *x += weight * value);
            }
            want.extend(row.iter().map(|x| x / sum));
        }
    }
    want.resize((count + 1) * heads * head_dim, 0.0);
    let sharing = PageSharing { from: 0, ..page_sharing(device, heads, kv_heads, head_dim).unwrap() };
    let case = format!("{shape:?} {dtype:?} {prompts:?}");
    let (alone, together) = (run(PageSharing::NONE), run(sharing));
    assert_close(&format!("{case}, alone"), &alone, &want, tolerance((dtype, dtype)));
    assert_close(&format!("{case}, {} together", sharing.lanes), &together, &want, tolerance((dtype, dtype)));
    assert_eq!(run(sharing), together, "{case}: the same call has other bits");
}

#[test]
#[ignore = "gpu"]
fn odd_shapes_and_pages() {
    let device = device();
    for types in TYPES {
        for (heads, kv_heads, head_dim, page_tokens) in [
            (4, 2, 8, 16),
            (3, 3, 13, 4),
            (6, 2, 5, 1),
            (18, 2, 96, 16),
            (2, 1, 256, 16),
            (6, 3, 129, 7),
            (5, 1, 64, 7),
        ] {
            let shape = Shape { heads, kv_heads, head_dim, page_tokens };
            check(&device, shape, types, &[(0, 1), (0, 37), (50, 1), (15, 1), (16, 9), (31, 2)]);
        }
    }
}

#[test]
#[ignore = "gpu"]
fn rows_without_keys_are_zero() {
    let device = device();
    for head_dim in [64, 40] {
        let shape = Shape { heads: 4, kv_heads: 2, head_dim, page_tokens: 16 };
        let cache = cache(&device, shape, 1, DType::F16);
        let q = upload(&device, &random("queries", 2 * 4 * head_dim), (2, 4 * head_dim), DType::F16);
        let out = upload(&device, &vec![f32::NAN; 2 * 4 * head_dim], (2, 4 * head_dim), DType::F16);
        let lists = PagedLists { rows: vec![[0; 2]; 2], ..PagedLists::default() };
        let step = PagedStep::new(&device, PagedSize { pages: 1, page_tokens: 16 }, &lists).unwrap();
        paged_attention(&device, matrix(&out).unwrap(), matrix(&q).unwrap(), cache.view(), &step, 1.0, None).unwrap();
        assert!(download(&out).iter().all(|x| *x == 0.0));
    }
}

#[test]
#[ignore = "gpu"]
fn tokens_land_in_their_slots() {
    let device = device();
    for (head_dim, dtype) in [(64, DType::BF16), (5, DType::F16), (12, DType::F32)] {
        let shape = Shape { heads: 2, kv_heads: 2, head_dim, page_tokens: 4 };
        let cache = cache(&device, shape, 3, dtype);
        let width = 2 * head_dim;
        let tensors = ["keys", "values"].map(|name| upload(&device, &random(name, 4 * width), (4, width), DType::F32));
        let slots = [7, NO_SLOT, 0, 11];
        let lists = PagedLists { slots: slots.to_vec(), ..PagedLists::default() };
        let step = PagedStep::new(&device, PagedSize { pages: 3, page_tokens: 4 }, &lists).unwrap();
        let [k, v] = [&tensors[0], &tensors[1]].map(|x| matrix(x).unwrap());
        write_pages(&device, cache.view(), k, v, &step).unwrap();
        for (store, written) in [(&cache.keys, &tensors[0]), (&cache.values, &tensors[1])] {
            let (store, written) = (download(store), download(&written.to_dtype(dtype).unwrap()));
            for slot in 0..12 {
                let got = &store[slot as usize * width..][..width];
                match slots.iter().position(|s| *s == slot) {
                    Some(token) => assert_eq!(got, &written[token * width..][..width]),
                    None => assert!(got.iter().all(|x| x.is_nan())),
                }
            }
        }
    }
}

#[test]
#[ignore = "gpu"]
fn pages_are_copied_in_all_stores() {
    let device = device();
    for (page, dtype) in [(4 * 2 * 64, DType::BF16), (3 * 5, DType::F16), (4 * 3, DType::F32)] {
        let pages = 7;
        let stores: Vec<Tensor> =
            (0..4).map(|_| upload(&device, &random("store", pages * page), (pages, page), dtype)).collect();
        let before: Vec<Vec<f32>> = stores.iter().map(download).collect();
        let all = PageStores::new(&device, &stores, pages).unwrap();
        copy_pages(&device, &all, &[[6, 0], [2, 3], [6, 5]]).unwrap();
        assert!(copy_pages(&device, &all, &[[6, 7]]).unwrap_err().to_string().contains("pages below 7"));
        for (store, before) in stores.iter().zip(&before) {
            let after = download(store);
            for (to, from) in [6, 1, 2, 2, 4, 6, 6].into_iter().enumerate() {
                assert_eq!(after[to * page..][..page], before[from * page..][..page], "page {to}");
            }
        }
    }
}

#[test]
#[ignore = "gpu"]
fn arguments_that_do_not_fit_are_named() {
    let device = device();
    let shape = Shape { heads: 4, kv_heads: 2, head_dim: 8, page_tokens: 16 };
    let cache = cache(&device, shape, 2, DType::F32);
    let step = |pages: usize, context: u32| {
        let lists = PagedLists { slots: vec![0], rows: vec![[0, context]], tables: vec![0; 400] };
        PagedStep::new(&device, PagedSize { pages, page_tokens: 16 }, &lists).unwrap()
    };
    let run = |rows: usize, cols: usize, step: &PagedStep| {
        let (q, out) = (empty(&device, (rows, cols), DType::F32), empty(&device, (rows, cols), DType::F32));
        let (q, out) = (q.unwrap(), out.unwrap());
        let (q, out) = (matrix(&q).unwrap(), matrix(&out).unwrap());
        paged_attention(&device, out, q, cache.view(), step, 1.0, None).map_err(|error| error.to_string())
    };
    let fitting = step(2, 1);
    assert!(run(1, 40, &fitting).unwrap_err().contains("2 heads of 8"));
    assert!(run(2, 32, &fitting).unwrap_err().contains("`step`"));
    assert!(run(1, 32, &step(3, 1)).unwrap_err().contains("`step`"), "a step for a larger cache");
    assert!(run(1, 32, &step(2, 5000)).unwrap_err().contains("workspace"));
    let k = empty(&device, (1, 15), DType::F32).unwrap();
    let k = matrix(&k).unwrap();
    assert!(write_pages(&device, cache.view(), k, k, &fitting).unwrap_err().to_string().contains("`k`"));
}

#[test]
#[ignore = "gpu"]
#[expect(clippy::print_stdout, reason = "a table for the reader")]
fn bench_paged_attention() {
    let device = device();
    println!("heads kv dim  sequences context rows |      us   GB/s of keys and values  TFLOP/s");
    for (heads, kv_heads, head_dim) in [(28, 4, 128), (14, 2, 64), (32, 8, 128)] {
        for (count, context, rows) in
            [(1, 4096, 1), (8, 4096, 1), (64, 1024, 1), (64, 4096, 1), (256, 2048, 1), (1, 0, 2048), (1, 8192, 2048)]
        {
            let shape = Shape { heads, kv_heads, head_dim, page_tokens: 16 };
            let sequences = Sequences::new(&vec![(context, rows); count], 16);
            let dims = (sequences.num_pages, 16, kv_heads, head_dim);
            let thin =
                upload(&device, &random("bench cache", 16 * kv_heads * head_dim), dims_of_page(dims), DType::BF16);
            let store = || thin.broadcast_as(dims).unwrap().contiguous().unwrap();
            let (keys, values) = (store(), store());
            let cache = PagedCache {
                keys: array(&keys).unwrap(),
                values: array(&values).unwrap(),
                dtype: DType::BF16,
                kv_heads,
                head_dim,
                page_tokens: shape.page_tokens,
            };
            let lists = sequences.lists(16);
            let step = PagedStep::new(&device, sequences.size(16), &lists).unwrap();
            let (num_rows, max_context) = (lists.rows.len(), lists.max_context());
            let width = heads * head_dim;
            let q = upload(&device, &random("bench queries", num_rows * width), (num_rows, width), DType::BF16);
            let out = empty(&device, (num_rows, width), DType::BF16).unwrap();
            let floats = paged_attention_workspace(num_rows, heads, kv_heads, head_dim, max_context);
            let workspace = empty(&device, floats.max(1), DType::F32).unwrap();
            let run = |times: usize| {
                for _ in 0..times {
                    let (out, q) = (matrix(&out).unwrap(), matrix(&q).unwrap());
                    let workspace = Some(array(&workspace).unwrap());
                    paged_attention(&device, out, q, cache, &step, 0.1, workspace).unwrap();
                }
                synchronize(&device).unwrap();
            };
            run(5);
            let times = 20;
            let start = Instant::now();
            run(times);
            let secs = start.elapsed().as_secs_f64() / f64::from(times as u32);
            let bytes = (count * (context + rows) * 2 * kv_heads * head_dim * 2) as f64;
            let seen: f64 = (1..=rows).map(|row| (context + row) as f64).sum::<f64>() * count as f64;
            let flops = 4.0 * seen * width as f64;
            println!(
                "{heads:5} {kv_heads:2} {head_dim:3} {count:10} {context:7} {rows:4} | {:7.1} {:6.0} {:26.1}",
                secs * 1e6,
                bytes / secs * 1e-9,
                flops / secs * 1e-12
            );
        }
    }
}

/// The shape of one page among those of a cache.
fn dims_of_page((_, tokens, kv_heads, head_dim): (usize, usize, usize, usize)) -> (usize, usize, usize, usize) {
    (1, tokens, kv_heads, head_dim)
}
