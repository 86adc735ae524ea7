//! Decoding steps of few rows: products straight from packed weights.

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use trainer::config::settings::QuantType;
use trainer::device::{Buffer, Queue, array, empty, matrix, synchronize, upload_f32};
use trainer::kernels::cuda::{
    LowRank, Nf4Absmax, Nf4View, PackedOperand, PackedWeights, ProductCard, ProductForm, ProductKind, ProductOutput,
    ProductWorkspace, RowLayout, Rows, WeightKind, decode_low_rank, decode_norm, dequantize_nf4, packed_product,
};
use trainer::quant::Nf4Matrix;

use crate::nf4::Parts;
use crate::support::{assert_close, device, download, random, upload};

/// A 4-bit matrix on the device.
struct Codes {
    parts: Parts,
    rows: usize,
    cols: usize,
}

impl Codes {
    fn new(device: &Device, matrix: &Nf4Matrix, (rows, cols): (usize, usize)) -> Self {
        Self { parts: Parts::new(device, matrix), rows, cols }
    }

    fn weights(&self) -> PackedWeights<'_> {
        PackedWeights::Nf4 { view: self.parts.view(), rows: self.rows, cols: self.cols }
    }

    /// The values as products see them, f32 on the host.
    fn dense(&self, device: &Device, dtype: DType) -> Vec<f32> {
        let out = empty(device, (self.rows, self.cols), dtype).unwrap();
        dequantize_nf4(device, matrix(&out).unwrap(), &self.parts.view(), 0, self.cols).unwrap();
        download(&out)
    }
}

pub(crate) fn product(x: &[f32], w: &[f32], m: usize, k: usize) -> Vec<f32> {
    let x = Tensor::from_slice(x, (m, k), &Device::Cpu).unwrap();
    let w = Tensor::from_slice(w, (w.len() / k, k), &Device::Cpu).unwrap();
    x.matmul(&w.t().unwrap()).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Rows in the order of a layout, and their values: what the norm of random rows writes, or where they are scaled for codes what
/// it is to be.
pub(crate) struct Input {
    memory: Tensor,
    stream: Tensor,
    pub(crate) values: Vec<f32>,
    m: usize,
    layout: RowLayout,
    is_scaled: bool,
}

impl Input {
    pub(crate) fn new(device: &Device, m: usize, k: usize, dtype: DType, layout: (RowLayout, bool)) -> Self {
        Self::of(device, &random("x", m * k), m, dtype, (layout, 1e-6))
    }

    /// The norm of these rows, scaled for codes or not.
    pub(crate) fn of(
        device: &Device,
        host: &[f32],
        m: usize,
        dtype: DType,
        ((layout, is_scaled), eps): ((RowLayout, bool), f32),
    ) -> Self {
        let k = host.len() / m;
        let stream = upload(device, host, (m, k), DType::F32);
        let weight = upload_f32(device, &vec![1.0; k]).unwrap();
        // What is missing to a tile's rows may be anything.
        let memory = upload(device, &vec![f32::NAN; layout.rows(m) * k], (layout.rows(m), k), dtype);
        let plain = empty(device, (m, k), dtype).unwrap();
        let input = Self { memory, stream, values: Vec::new(), m, layout, is_scaled };
        let (from, weight) = (matrix(&input.stream).unwrap(), array(&weight).unwrap());
        decode_norm(device, input.rows(), from, weight, eps).unwrap();
        decode_norm(device, Rows::plain(matrix(&plain).unwrap()), from, weight, eps).unwrap();
        let exact = |row: &[f32]| {
            let mean = row.iter().map(|x| x * x).sum::<f32>() / k as f32;
            row.iter().map(|x| x / (mean + eps).sqrt()).collect::<Vec<_>>()
        };
        let values = if is_scaled { host.chunks(k).flat_map(exact).collect() } else { download(&plain) };
        Self { values, ..input }
    }

    pub(crate) fn rows(&self) -> Rows<'_> {
        let rows = Rows::new(matrix(&self.memory).unwrap(), self.m, self.layout).unwrap();
        if self.is_scaled { rows.scaled() } else { rows }
    }
}

pub(crate) struct Work {
    partial: Tensor,
    arrived: Tensor,
}

impl Work {
    pub(crate) fn new(device: &Device) -> Self {
        Self {
            partial: empty(device, 64 << 20, DType::F32).unwrap(),
            arrived: Tensor::zeros(1 << 20, DType::U32, device).unwrap(),
        }
    }

    pub(crate) fn room(&self) -> ProductWorkspace<'_> {
        ProductWorkspace { partial: array(&self.partial).unwrap(), arrived: array(&self.arrived).unwrap() }
    }
}

#[test]
#[ignore = "gpu"]
fn products_of_every_form_are_those_of_the_unpacked_weights() {
    let device = device();
    let work = Work::new(&device);
    for dtype in [DType::BF16, DType::F16] {
        for (rows, k, is_nested, is_packed) in [
            ([48, 16, 16], 256, true, true),
            ([144, 32, 32], 896, false, true),
            ([80, 48, 16], 1024, true, true),
            ([64, 16, 16], 384, true, false),
            // A sum that goes round the ring of `x` more than once.
            ([80, 16, 16], 1152, true, false),
        ] {
            let packed: Vec<Codes> = rows
                .iter()
                .map(|&rows| {
                    let values = random("weights", rows * k);
                    Codes::new(&device, &Nf4Matrix::quantize(&values, rows, k, QuantType::Nf4, is_nested), (rows, k))
                })
                .collect();
            // Codes become operands nearer to their exact values than those of training.
            let of = if is_packed { DType::F32 } else { dtype };
            let plain: Vec<Vec<f32>> = packed.iter().map(|codes| codes.dense(&device, of)).collect();
            let dense: Vec<Tensor> =
                plain.iter().zip(rows).map(|(values, rows)| upload(&device, values, (rows, k), dtype)).collect();
            let ranks = 32;
            let b: Vec<Tensor> = rows
                .iter()
                .map(|&rows| {
                    upload(
                        &device,
                        &random("b", rows * 16).iter().map(|b| b * 0.05).collect::<Vec<_>>(),
                        (rows, 16),
                        dtype,
                    )
                })
                .collect();
            let bias: Vec<Tensor> =
                rows.iter().map(|&rows| upload_f32(&device, &random("bias", rows)).unwrap()).collect();
            let operand = |index: usize, has_adapter: bool| PackedOperand {
                weights: match is_packed {
                    true => packed[index].weights(),
                    false => PackedWeights::Dense(matrix(&dense[index]).unwrap()),
                },
                bias: Some(array(&bias[index]).unwrap()),
                adapter: has_adapter.then(|| (matrix(&b[index]).unwrap(), if index == 1 { 16 } else { 0 })),
            };
            let card = ProductCard::of(&device).unwrap();
            // Every number of rows in the layout that is chosen, many of them in the one of other cards too.
            let outputs = rows.iter().sum();
            let of_weights = if is_packed { WeightKind::Codes } else { WeightKind::Dense };
            let ms = [1, 2, 7, 8, 9, 16, 17, 32, 40, 64, 65, 130, 256];
            let layouts = ms.map(|m| (m, RowLayout::choose(m, outputs, of_weights, card)));
            for (m, layout) in layouts.into_iter().chain(
                [20, 30, 65, 130]
                    .map(|m| (m, RowLayout::Fragments))
                    .into_iter()
                    .chain([1, 8, 13].map(|m| (m, RowLayout::Tiles(if m > 8 || is_packed { 16 } else { 8 }))))
                    .chain([17, 24, 40, 130].map(|m: usize| (m, RowLayout::Tiles(m.next_power_of_two())))),
            ) {
                let input = Input::new(&device, m, k, dtype, (layout, is_packed));
                let (x, host_x) = (input.rows(), input.values.clone());
                // The low-rank products of the rows as they lie.
                let a = upload(&device, &random("a", ranks * k), (ranks, k), dtype);
                let values = empty(&device, m * ranks, dtype).unwrap();
                let order: Vec<u32> = (0..k).map(|place| layout.column(place) as u32).collect();
                let ordered = a.index_select(&Tensor::new(order, &device).unwrap(), 1).unwrap();
                let ordered = if is_packed { ordered.to_dtype(DType::F16).unwrap() } else { ordered };
                let make_low = || {
                    decode_low_rank(&device, x, matrix(&ordered).unwrap(), array(&values).unwrap(), work.room())
                        .unwrap()
                };
                make_low();
                let low = LowRank { values: array(&values).unwrap(), cols: ranks, is_fresh: false };
                let want_low = product(&host_x, &download(&a), m, k);
                // As the adapter multiplies them.
                let low_t = download(&values);
                let case =
                    format!("{dtype:?} {rows:?} x {k}, {m} rows in {layout:?}, packed {is_packed}, nested {is_nested}");
                let bound = if dtype == DType::BF16 { 4e-3 } else { 1e-3 };
                assert_close(&format!("{case}: low-rank products"), &low_t, &want_low, bound);

                let all: usize = rows.iter().sum();
                let residual = upload(&device, &random("residual", m * all), (m, all), DType::F32);
                let mut want = vec![0f32; m * all];
                let mut first = 0;
                for index in 0..3 {
                    let own = product(&host_x, &plain[index], m, k);
                    let start = if index == 1 { 16 } else { 0 };
                    let columns: Vec<f32> =
                        (0..m).flat_map(|row| low_t[row * ranks + start..row * ranks + start + 16].to_vec()).collect();
                    let update = product(&columns, &download(&b[index]), m, 16);
                    let (bias, base) = (download(&bias[index]), download(&residual));
                    for row in 0..m {
                        for col in 0..rows[index] {
                            let (at, to) = (row * rows[index] + col, row * all + first + col);
                            want[to] = own[at] + update[at] + bias[col] + base[to];
                        }
                    }
                    first += rows[index];
                }
                let group: Vec<PackedOperand<'_>> = (0..3).map(|index| operand(index, true)).collect();
                let chosen = ProductForm::choose(m, &rows, k, (ProductKind::Sum, of_weights), layout, card);
                // Cut in parts and not, and where the kernel can with some tiles whole and others cut.
                let mut cuts = vec![(1, 0), (2, 0), (chosen.splits, chosen.whole)];
                if chosen.form >= 17 {
                    cuts.push((2, 1));
                }
                for (splits, whole) in cuts {
                    let form = ProductForm { splits, whole, ..chosen };
                    let out = empty(&device, (m, all), DType::F32).unwrap();
                    let to = ProductOutput::Sum { out: matrix(&out).unwrap(), onto: Some(matrix(&residual).unwrap()) };
                    packed_product(&device, &group, x, Some(low), to, form, work.room()).unwrap();
                    let bound = if is_packed { 8e-4 } else { 1e-4 };
                    assert_close(&format!("{case}, {form:?}"), &download(&out), &want, bound);
                    // Behind the launch that makes the low-rank products, for which it waits at its end alone.
                    make_low();
                    let (again, fresh) =
                        (empty(&device, (m, all), DType::F32).unwrap(), LowRank { is_fresh: true, ..low });
                    let to =
                        ProductOutput::Sum { out: matrix(&again).unwrap(), onto: Some(matrix(&residual).unwrap()) };
                    packed_product(&device, &group, x, Some(fresh), to, form, work.room()).unwrap();
                    assert_eq!(download(&again), download(&out), "{case}, {form:?} beside the low-rank products");
                }

                // The second matrix again as the half of a SwiGLU.
                let pair = [operand(1, false), operand(1, true)];
                let height = rows[1];
                let gate = product(&host_x, &plain[1], m, k);
                let columns: Vec<f32> =
                    (0..m).flat_map(|row| low_t[row * ranks + 16..row * ranks + 32].to_vec()).collect();
                let update = product(&columns, &download(&b[1]), m, 16);
                let bias = download(&bias[1]);
                let rounded = |values: Vec<f32>| download(&upload(&device, &values, (m, height), dtype));
                let gate = rounded((0..m * height).map(|at| gate[at] + bias[at % height]).collect());
                let up = rounded(
                    (0..m * height)
                        .map(|at| product_at(&host_x, &plain[1], at, height, k) + update[at] + bias[at % height])
                        .collect(),
                );
                let want: Vec<f32> =
                    gate.iter().zip(&up).map(|(&gate, &up)| up * gate / (1.0 + (-gate).exp())).collect();
                let form =
                    ProductForm::choose(m, &[height, height], k, (ProductKind::Swiglu, of_weights), layout, card);
                let out = empty(&device, (m, height), dtype).unwrap();
                let to = ProductOutput::Swiglu(Rows::plain(matrix(&out).unwrap()));
                packed_product(&device, &pair, x, Some(low), to, form, work.room()).unwrap();
                assert_close(&format!("{case}, SwiGLU {form:?}"), &download(&out), &want, 1.5e-2);
            }
        }
    }
}

/// Rows of one to many tiles a block, halves of tiles, one to three stages a tile with odd numbers of chunks, rows of `x` that have room
/// in shared memory and that have not, low-rank products that are there and that are made meanwhile, and more than there is room for.
#[test]
#[ignore = "gpu"]
#[expect(clippy::print_stdout, reason = "what was not tested is said")]
fn gate_and_up_in_a_stream_are_those_of_the_unpacked_weights() {
    let device = device();
    let work = Work::new(&device);
    if !ProductCard::of(&device).unwrap().has_groups {
        println!("not tested: the kernel is for compute capability 9.0");
        return;
    }
    for (height, k, is_nested, ranks, dtype) in [
        (16, 128, true, 16, DType::BF16),
        (40, 896, true, 16, DType::F16),
        (24, 2176, false, 48, DType::BF16),
        (10_568, 256, true, 16, DType::BF16),
        (2_120, 4_736, true, 16, DType::F16),
        (24, 14_336, true, 16, DType::BF16),
        (48, 384, true, 768, DType::F16),
    ] {
        let [gate, up] = ["gate", "up"].map(|name| {
            let values = random(name, height * k);
            Codes::new(&device, &Nf4Matrix::quantize(&values, height, k, QuantType::Nf4, is_nested), (height, k))
        });
        let plain = [&gate, &up].map(|codes| codes.dense(&device, DType::F32));
        let small = |name: &str, count: usize| random(name, count).iter().map(|b| b * 0.05).collect::<Vec<_>>();
        let b =
            ["b of gate", "b of up"].map(|name| upload(&device, &small(name, height * ranks), (height, ranks), dtype));
        let bias = upload_f32(&device, &random("bias", height)).unwrap();
        let a = upload(&device, &random("a", 2 * ranks * k), (2 * ranks, k), dtype);
        let order: Vec<u32> = (0..k).map(|place| RowLayout::Fragments.column(place) as u32).collect();
        let ordered = a.index_select(&Tensor::new(order, &device).unwrap(), 1).unwrap().to_dtype(DType::F16).unwrap();
        let (lines, mut alone) = (random("x", 8 * k), Vec::new());
        for m in [1, 2, 3, 5, 8] {
            let input = Input::of(&device, &lines[..m * k], m, dtype, ((RowLayout::Fragments, true), 1e-6));
            let values = empty(&device, m * 2 * ranks, dtype).unwrap();
            let make_low = || {
                decode_low_rank(&device, input.rows(), matrix(&ordered).unwrap(), array(&values).unwrap(), work.room())
                    .unwrap()
            };
            make_low();
            let low = download(&values);
            let of = |index: usize| {
                let columns: Vec<f32> =
                    low.chunks(2 * ranks).flat_map(|row| row[index * ranks..][..ranks].to_vec()).collect();
                let (own, update) =
                    (product(&input.values, &plain[index], m, k), product(&columns, &download(&b[index]), m, ranks));
                let bias = download(&bias);
                let sum = own.iter().zip(update).enumerate().map(|(at, (x, y))| x + y + bias[at % height]);
                download(&upload(&device, &sum.collect::<Vec<_>>(), (m, height), dtype))
            };
            let want: Vec<f32> = of(0).iter().zip(of(1)).map(|(&gate, up)| up * gate / (1.0 + (-gate).exp())).collect();
            let group = [(&gate, 0), (&up, 1)].map(|(codes, index)| PackedOperand {
                weights: codes.weights(),
                bias: Some(array(&bias).unwrap()),
                adapter: Some((matrix(&b[index]).unwrap(), index * ranks)),
            });
            let run = |is_fresh: bool| {
                let out = empty(&device, (m, height), dtype).unwrap();
                let to = ProductOutput::Swiglu(Rows::plain(matrix(&out).unwrap()));
                let low = LowRank { values: array(&values).unwrap(), cols: 2 * ranks, is_fresh };
                let form = ProductForm::stream();
                packed_product(&device, &group, input.rows(), Some(low), to, form, work.room()).unwrap();
                download(&out)
            };
            let case = format!("{dtype:?} {height} x {k}, {m} rows, nested {is_nested}, {ranks} ranks");
            let there = run(false);
            assert_close(&case, &there, &want, if dtype == DType::F16 { 3e-3 } else { 1.5e-2 });
            make_low();
            assert_eq!(run(true), there, "{case}, beside the low-rank products");
            if m == 1 {
                alone.clone_from(&there);
            }
            assert_eq!(there[..height], alone, "{case}: the first row is what it is alone");
        }
    }
}

fn product_at(x: &[f32], w: &[f32], at: usize, height: usize, k: usize) -> f32 {
    let (row, col) = (at / height, at % height);
    x[row * k..(row + 1) * k].iter().zip(&w[col * k..(col + 1) * k]).map(|(x, w)| x * w).sum()
}

/// Microseconds and bytes a second of each form on the projections of a 7B model.
#[test]
#[ignore = "bench"]
#[expect(clippy::print_stdout, reason = "a table for the reader")]
fn bench_packed_product() {
    let device = device();
    let card = ProductCard::of(&device).unwrap();
    let work = Work::new(&device);
    for (name, rows, k, kind) in [
        ("qkv", vec![3584, 512, 512], 3584, ProductKind::Sum),
        ("o", vec![3584], 3584, ProductKind::Sum),
        ("gate_up", vec![18_944, 18_944], 3584, ProductKind::Swiglu),
        ("down", vec![3584], 18_944, ProductKind::Sum),
        ("head", vec![152_064], 3584, ProductKind::Sum),
    ] {
        let all: usize = rows.iter().sum();
        let (is_packed, outputs) = (name != "head", all);
        let of_weights = if is_packed { WeightKind::Codes } else { WeightKind::Dense };
        // Several copies, so that none stays in the cache between two calls.
        let copies = if is_packed { (400 << 20) / (all * k / 2) + 1 } else { 1 };
        let queue = Queue::of(&device).unwrap();
        let bytes = if is_packed { all * k / 2 } else { 2 * all * k };
        let codes: Vec<Buffer> = (0..copies).map(|_| Buffer::device(&queue, bytes).unwrap()).collect();
        let blocks = all * k / 64;
        let units = Tensor::zeros(blocks, DType::U8, &device).unwrap();
        let nested = upload_f32(&device, &vec![0.01; blocks / 256 + 1]).unwrap();
        let map = upload_f32(&device, &vec![0.5; 256]).unwrap();
        let values = upload_f32(&device, &[0.1; 16]).unwrap();
        let mut line = format!("{name:8}");
        let works = [1, 8, 16, 32, 64, 128, 256].map(|m| (m, RowLayout::choose(m, outputs, of_weights, card)));
        // Others than are chosen, too.
        let others = [(16, RowLayout::Tiles(16)), (32, RowLayout::Fragments)];
        for (m, layout) in works.into_iter().chain(others) {
            if !is_packed && m > 32 || layout != RowLayout::choose(m, outputs, of_weights, card) && !is_packed {
                continue;
            }
            let memory = upload(&device, &vec![0.5; layout.rows(m) * k], (layout.rows(m), k), DType::BF16);
            let x = Rows::new(matrix(&memory).unwrap(), m, layout).unwrap();
            let x = if is_packed { x.scaled() } else { x };
            let is_swiglu = kind == ProductKind::Swiglu;
            let out = empty(&device, (m, if is_swiglu { rows[0] } else { all }), DType::BF16).unwrap();
            let chosen = ProductForm::choose(m, &rows, k, (kind, of_weights), layout, card);
            line += &format!("\n  {m:4} f{} s{} w{}:", chosen.form, chosen.splits, chosen.whole);
            // The one that is chosen first, then other cuts of it, and for few rows the other forms.
            let cuts = [1, 2, 3, 4, 6, 8].map(|splits| ProductForm { splits, whole: 0, ..chosen });
            let forms = if is_swiglu { &[11][..] } else { &[10, 11, 15] };
            let is_few = is_packed && layout == RowLayout::Fragments && m <= 8;
            let other = |&form: &usize| [1, 2, 3, 4].map(|splits| ProductForm { form, splits, whole: 0 });
            let others = forms.iter().filter(|&&form| is_few && form != chosen.form).flat_map(other);
            let is_stream = chosen == ProductForm::stream();
            let cuts = cuts.into_iter().filter(|_| !is_stream);
            for form in [chosen].into_iter().chain(cuts).chain(others) {
                let splits = form.splits;
                let floats = form.workspace(m, &rows, is_swiglu, layout).0;
                if floats > 64 << 20 || form.form == 6 && k / 128 / form.splits > 40 {
                    continue;
                }
                let run = |copy: usize| {
                    let mut first = 0;
                    let group: Vec<PackedOperand<'_>> = rows
                        .iter()
                        .map(|&rows| {
                            let weights = if is_packed {
                                let packed = codes[copy].array(first * k / 2, rows * k / 2, DType::U8).unwrap();
                                let absmax = Nf4Absmax::Nested {
                                    codes: array(&units).unwrap(),
                                    absmax: array(&nested).unwrap(),
                                    map: array(&map).unwrap(),
                                    offset: 0.0,
                                };
                                let view = Nf4View { packed, absmax, values: array(&values).unwrap() };
                                PackedWeights::Nf4 { view, rows, cols: k }
                            } else {
                                PackedWeights::Dense(codes[copy].matrix(0, (rows, k), DType::BF16).unwrap())
                            };
                            first += rows;
                            PackedOperand { weights, bias: None, adapter: None }
                        })
                        .collect();
                    let out = matrix(&out).unwrap();
                    let to = match kind {
                        ProductKind::Swiglu => ProductOutput::Swiglu(Rows::plain(out)),
                        _ => ProductOutput::Sum { out, onto: None },
                    };
                    packed_product(&device, &group, x, None, to, form, work.room()).unwrap();
                };
                (0..copies).for_each(run);
                synchronize(&device).unwrap();
                let started = Instant::now();
                (0..40).for_each(|round| run(round % copies));
                synchronize(&device).unwrap();
                let secs = started.elapsed().as_secs_f64() / 40.0;
                let name = if form.form == chosen.form { String::new() } else { format!("f{} ", form.form) };
                line += &format!("  {name}s{splits} {:.1} us {:.0} GB/s", secs * 1e6, bytes as f64 / secs / 1e9);
            }
        }
        println!("{line}");
    }
}
