//! Products of few rows straight from GGUF blocks: every value of every type by its bits, sums in every form, and how fast they are.

use std::fmt::Write as _;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use trainer::device::{Buffer, Queue, array, empty, matrix, synchronize, upload_f32, upload_u8};
use trainer::kernels::cuda::{
    GgufKind, LowRank, PackedOperand, PackedWeights, ProductCard, ProductForm, ProductKind, ProductOutput, RowLayout,
    Rows, WeightKind, dequantize_gguf, packed_product, swiglu_rows,
};

use crate::gguf::{KINDS, random_blocks};
use crate::lanes::{Input, Work, product};
use crate::support::{device, download, random, seed, upload};

/// A matrix of blocks on the device.
struct Blocks {
    kind: GgufKind,
    stored: Tensor,
    rows: usize,
    cols: usize,
}

impl Blocks {
    /// Random blocks with values of about 1.
    fn new(device: &Device, kind: GgufKind, rows: usize, cols: usize) -> Self {
        let size = match kind {
            GgufKind::Q8_0 => 0.015,
            GgufKind::Q2K => 0.05,
            GgufKind::Q3K => 0.02,
            GgufKind::Q4K => 0.004,
            GgufKind::Q5K => 0.002,
            GgufKind::Q6K => 0.0008,
            _ => 0.15,
        };
        let bytes = random_blocks(kind, rows * cols / kind.block_len(), size);
        Self { kind, stored: upload_u8(device, &bytes).unwrap(), rows, cols }
    }

    fn weights(&self) -> PackedWeights<'_> {
        let blocks = array(&self.stored).unwrap();
        PackedWeights::Gguf { kind: self.kind, blocks, rows: self.rows, cols: self.cols }
    }

    /// The values as training unpacks them, f32 on the host.
    fn dense(&self, device: &Device, dtype: DType) -> Vec<f32> {
        let out = empty(device, (self.rows, self.cols), dtype).unwrap();
        let blocks = array(&self.stored).unwrap();
        dequantize_gguf(device, matrix(&out).unwrap(), self.kind, blocks, 0, self.cols).unwrap();
        download(&out)
    }
}

fn is_k(kind: GgufKind) -> bool {
    kind.block_len() == 256
}

/// The layouts in which `m` rows are multiplied on this card.
fn layouts(m: usize, card: ProductCard) -> Vec<RowLayout> {
    let mut all = vec![RowLayout::Fragments];
    if card.has_groups && m > 16 {
        all.push(RowLayout::Tiles(m.next_power_of_two()));
    }
    all
}

/// Rows of the unit matrix as inputs: every product is a value of the weights, whose bits are training's.
#[test]
#[ignore = "gpu"]
fn products_with_the_unit_matrix_are_the_unpacked_values() {
    let device = device();
    let (work, card) = (Work::new(&device), ProductCard::of(&device).unwrap());
    let rows = 200;
    let mut wrong = Vec::new();
    for (_, kind) in KINDS {
        // The norm of a unit row is the root of its length, a power of two.
        for (k, dtype) in [(1024, DType::BF16), (1024, DType::F16), (256, DType::BF16)] {
            let weights = Blocks::new(&device, kind, rows, k);
            let want = weights.dense(&device, dtype);
            let factor = (k as f32).sqrt();
            for (m, layout) in
                [8, 32, 64, 128, 256].into_iter().flat_map(|m| layouts(m, card).into_iter().map(move |l| (m, l)))
            {
                for first in (0..k).step_by(m) {
                    let unit: Vec<f32> =
                        (0..m * k).map(|at| if at % k == first + at / k { 1.0 } else { 0.0 }).collect();
                    let input = Input::of(&device, &unit, m, dtype, ((layout, false), 0.0));
                    let form = ProductForm::choose(m, &[rows], k, (ProductKind::Sum, WeightKind::Blocks), layout, card);
                    let out = empty(&device, (m, rows), DType::F32).unwrap();
                    let to = ProductOutput::Sum { out: matrix(&out).unwrap(), onto: None };
                    let operand = PackedOperand { weights: weights.weights(), bias: None, adapter: None };
                    packed_product(&device, &[operand], input.rows(), None, to, form, work.room()).unwrap();
                    for (at, got) in download(&out).into_iter().enumerate() {
                        let (col, row) = (first + at / rows, at % rows);
                        let want = want[row * k + col];
                        // Zeros of either sign are equal.
                        if got != want * factor {
                            wrong.push(format!(
                                "{kind:?} {dtype:?} [{rows}, {k}], {m} rows in {layout:?}, {form:?}: row {row}, column {col} is {}, \
                                 expected {want}",
                                got / factor
                            ));
                        }
                    }
                }
            }
        }
    }
    let first = wrong.iter().take(40).cloned().collect::<Vec<_>>().join("\n");
    assert!(wrong.is_empty(), "TRAINER_TEST_SEED={}, {} values differ:\n{first}", seed(), wrong.len());
}

/// As `assert_close`, and says where the largest differences are.
fn compare(case: &str, got: &[f32], want: &[f32], cols: usize, tolerance: f64, wrong: &mut Vec<String>) {
    assert_eq!(got.len(), want.len(), "{case}: lengths");
    let square = |x: f64| x * x;
    // Of f16 a value may be beyond what it holds.
    let is_f16 = case.contains("F16");
    let both = got.iter().zip(want).filter(|&(&g, &w)| !(is_f16 && w.abs() > 65_000.0 && g.abs() >= 65_000.0));
    let norm: f64 = want.iter().map(|&w| square(f64::from(w))).sum();
    let difference: f64 = both.map(|(&g, &w)| square(f64::from(g) - f64::from(w))).sum();
    let error = (difference / norm.max(1e-30)).sqrt();
    if error <= tolerance {
        return;
    }
    let mut places: Vec<usize> = (0..got.len()).collect();
    let of = |at: usize| {
        let apart = (got[at] - want[at]).abs();
        if apart.is_nan() { f32::INFINITY } else { apart }
    };
    places.sort_by(|&a, &b| of(b).total_cmp(&of(a)));
    let worst: Vec<String> = places
        .iter()
        .take(4)
        .map(|&at| format!("[{}, {}] {} for {}", at / cols, at % cols, got[at], want[at]))
        .collect();
    wrong.push(format!("{case}: error {error:.2e}; {}", worst.join(", ")));
}

#[test]
#[ignore = "gpu"]
fn products_of_gguf_blocks_in_every_form_are_those_of_the_unpacked_weights() {
    let device = device();
    let (work, card) = (Work::new(&device), ProductCard::of(&device).unwrap());
    let mut wrong = Vec::new();
    for (_, kind) in KINDS {
        let shapes: &[([usize; 3], usize)] =
            if is_k(kind) { &[([144, 32, 24], 1280)] } else { &[([144, 32, 24], 896), ([80, 48, 16], 384)] };
        for (&(rows, k), dtype) in shapes.iter().flat_map(|shape| [DType::BF16, DType::F16].map(|dtype| (shape, dtype)))
        {
            let each = rows.map(|rows| Blocks::new(&device, kind, rows, k));
            let plain: Vec<Vec<f32>> = each.iter().map(|blocks| blocks.dense(&device, dtype)).collect();
            let b = rows.map(|rows| upload(&device, &random("b", rows * 16), (rows, 16), dtype));
            let bias = rows.map(|rows| upload_f32(&device, &random("bias", rows)).unwrap());
            let operand = |index: usize, has_adapter: bool| PackedOperand {
                weights: each[index].weights(),
                bias: Some(array(&bias[index]).unwrap()),
                adapter: has_adapter.then(|| (matrix(&b[index]).unwrap(), if index == 1 { 16 } else { 0 })),
            };
            let ms = [1, 2, 7, 8, 9, 16, 17, 32, 40, 64, 65, 130, 256];
            for (m, layout) in ms.into_iter().flat_map(|m| layouts(m, card).into_iter().map(move |l| (m, l))) {
                let input = Input::new(&device, m, k, dtype, (layout, false));
                let (x, host_x, ranks) = (input.rows(), input.values.clone(), 32);
                let low_values = random("low", m * ranks);
                let low_t = upload(&device, &low_values, m * ranks, dtype);
                let low = LowRank { values: array(&low_t).unwrap(), cols: ranks, is_fresh: false };
                // Rounded as the adapter multiplies them.
                let rounded_low = download(&low_t);
                let own = |index: usize, has_adapter: bool| {
                    let start = if index == 1 { 16 } else { 0 };
                    let columns: Vec<f32> =
                        (0..m).flat_map(|row| rounded_low[row * ranks + start..][..16].to_vec()).collect();
                    let base = product(&host_x, &plain[index], m, k);
                    let update = product(&columns, &download(&b[index]), m, 16);
                    let bias = download(&bias[index]);
                    let sum =
                        |at: usize| base[at] + if has_adapter { update[at] } else { 0.0 } + bias[at % rows[index]];
                    (0..m * rows[index]).map(sum).collect::<Vec<f32>>()
                };
                let all: usize = rows.iter().sum();
                let residual = random("residual", m * all);
                let mut want = residual.clone();
                let mut first = 0;
                for index in 0..3 {
                    for (at, value) in own(index, true).into_iter().enumerate() {
                        want[at / rows[index] * all + first + at % rows[index]] += value;
                    }
                    first += rows[index];
                }
                let residual = upload(&device, &residual, (m, all), DType::F32);
                let case = format!("{kind:?} {dtype:?} {rows:?} x {k}, {m} rows in {layout:?}");
                let group: Vec<PackedOperand<'_>> = (0..3).map(|index| operand(index, true)).collect();
                let chosen = ProductForm::choose(m, &rows, k, (ProductKind::Sum, WeightKind::Blocks), layout, card);
                for splits in [1, 2, 3, chosen.splits] {
                    let form = ProductForm { splits, ..chosen };
                    let out = empty(&device, (m, all), DType::F32).unwrap();
                    let to = ProductOutput::Sum { out: matrix(&out).unwrap(), onto: Some(matrix(&residual).unwrap()) };
                    packed_product(&device, &group, x, Some(low), to, form, work.room()).unwrap();
                    compare(&format!("{case}, {form:?}"), &download(&out), &want, all, 1e-4, &mut wrong);
                }

                // The second matrix as both halves of a SwiGLU, one of them with an adapter.
                let height = rows[1];
                let rounded = |values: Vec<f32>| download(&upload(&device, &values, (m, height), dtype));
                let (gate, up) = (rounded(own(1, false)), rounded(own(1, true)));
                let want: Vec<f32> =
                    gate.iter().zip(&up).map(|(&gate, &up)| up * gate / (1.0 + (-gate).exp())).collect();
                let form = ProductForm::choose(
                    m,
                    &[height, height],
                    k,
                    (ProductKind::Swiglu, WeightKind::Blocks),
                    layout,
                    card,
                );
                let out = empty(&device, (m, height), dtype).unwrap();
                let to = ProductOutput::Swiglu(Rows::plain(matrix(&out).unwrap()));
                let pair = [operand(1, false), operand(1, true)];
                packed_product(&device, &pair, x, Some(low), to, form, work.room()).unwrap();
                compare(&format!("{case}, SwiGLU {form:?}"), &download(&out), &want, height, 1.5e-2, &mut wrong);
            }
        }
    }
    assert!(wrong.is_empty(), "TRAINER_TEST_SEED={}, {} differ:\n{}", seed(), wrong.len(), wrong.join("\n"));
}

#[test]
#[ignore = "gpu"]
fn activations_of_sums_lie_in_the_order_that_products_read() {
    let device = device();
    for dtype in [DType::BF16, DType::F16] {
        for (m, cols) in [(1, 128), (5, 4864), (40, 384)] {
            let values = [random("gate", m * cols), random("up", m * cols)];
            let [gate, up] = [0, 1].map(|i| upload(&device, &values[i], (m, cols), DType::F32));
            let [gates, ups] = [0, 1].map(|i| download(&upload(&device, &values[i], (m, cols), dtype)));
            let want: Vec<f32> = gates.iter().zip(&ups).map(|(&gate, &up)| up * gate / (1.0 + (-gate).exp())).collect();
            for layout in [RowLayout::Plain, RowLayout::Fragments] {
                let memory = upload(&device, &vec![f32::NAN; m * cols], (m, cols), dtype);
                let rows = Rows::new(matrix(&memory).unwrap(), m, layout).unwrap();
                swiglu_rows(&device, rows, matrix(&gate).unwrap(), matrix(&up).unwrap()).unwrap();
                let got = download(&memory);
                let mut plain = vec![f32::NAN; m * cols];
                for at in 0..m * cols {
                    plain[at / cols * cols + layout.column(at % cols)] = got[at];
                }
                let mut wrong = Vec::new();
                compare(&format!("{dtype:?} [{m}, {cols}] in {layout:?}"), &plain, &want, cols, 1e-2, &mut wrong);
                assert!(wrong.is_empty(), "TRAINER_TEST_SEED={}\n{}", seed(), wrong.join("\n"));
            }
        }
    }
}

#[test]
#[ignore = "gpu"]
fn forms_that_are_not_compiled_and_rows_of_part_blocks_are_refused() {
    let device = device();
    let (work, card) = (Work::new(&device), ProductCard::of(&device).unwrap());
    let weights = Blocks::new(&device, GgufKind::Q8_0, 32, 256);
    let input = Input::new(&device, 4, 256, DType::BF16, (RowLayout::Fragments, false));
    let out = empty(&device, (4, 32), DType::F32).unwrap();
    let chosen = ProductForm::choose(4, &[32], 256, (ProductKind::Sum, WeightKind::Blocks), RowLayout::Fragments, card);
    let run = |weights: PackedWeights<'_>, form: ProductForm| {
        let to = ProductOutput::Sum { out: matrix(&out).unwrap(), onto: None };
        let operand = PackedOperand { weights, bias: None, adapter: None };
        packed_product(&device, &[operand], input.rows(), None, to, form, work.room())
    };
    assert!(run(weights.weights(), chosen).is_ok());
    assert!(run(weights.weights(), ProductForm { form: 0, ..chosen }).is_err());
    let PackedWeights::Gguf { blocks, .. } = weights.weights() else { panic!("blocks are GGUF") };
    // More rows than there are bytes; floats; rows that are no whole block.
    assert!(run(PackedWeights::Gguf { kind: GgufKind::Q8_0, blocks, rows: 40, cols: 256 }, chosen).is_err());
    assert!(run(PackedWeights::Gguf { kind: GgufKind::F16, blocks, rows: 8, cols: 256 }, chosen).is_err());
    assert!(!PackedWeights::Gguf { kind: GgufKind::Q4K, blocks, rows: 8, cols: 384 }.fits(DType::BF16));
    synchronize(&device).unwrap();
}

/// Microseconds and bytes a second on the MLP of a 7B model.
#[test]
#[ignore = "bench"]
#[expect(clippy::print_stdout, reason = "a table for the reader")]
fn bench_packed_gguf() {
    let device = device();
    let (work, card) = (Work::new(&device), ProductCard::of(&device).unwrap());
    for (_, kind) in KINDS {
        for (name, rows, k, shape) in [
            ("gate_up", vec![18_944, 18_944], 3584, ProductKind::Swiglu),
            ("down", vec![3584], 18_944, ProductKind::Sum),
        ] {
            let bytes = kind.bytes_of(k).unwrap() * rows.iter().sum::<usize>();
            // Several copies, so that none stays in the cache between two calls.
            let copies = (400 << 20) / bytes + 1;
            let queue = Queue::of(&device).unwrap();
            let memory: Vec<Buffer> = (0..copies).map(|_| Buffer::device(&queue, bytes).unwrap()).collect();
            let mut line = format!("{kind:?} {name:8}");
            for m in [1, 8, 16, 32, 64, 128, 256] {
                let layout = RowLayout::choose(m, 0, WeightKind::Blocks, card);
                let input = upload(&device, &vec![0.5; layout.rows(m) * k], (layout.rows(m), k), DType::BF16);
                let x = Rows::new(matrix(&input).unwrap(), m, layout).unwrap();
                let form = ProductForm::choose(m, &rows, k, (shape, WeightKind::Blocks), layout, card);
                let out = empty(&device, (m, rows[0]), DType::BF16).unwrap();
                let run = |copy: usize| {
                    let own = bytes / rows.len();
                    let group: Vec<PackedOperand<'_>> = (0..rows.len())
                        .map(|index| {
                            let blocks = memory[copy].array(index * own, own, DType::U8).unwrap();
                            let weights = PackedWeights::Gguf { kind, blocks, rows: rows[index], cols: k };
                            PackedOperand { weights, bias: None, adapter: None }
                        })
                        .collect();
                    let out = matrix(&out).unwrap();
                    let to = match shape {
                        ProductKind::Swiglu => ProductOutput::Swiglu(Rows::plain(out)),
                        ProductKind::Sum => ProductOutput::Sum { out, onto: None },
                    };
                    packed_product(&device, &group, x, None, to, form, work.room()).unwrap();
                };
                (0..copies).for_each(run);
                synchronize(&device).unwrap();
                let started = Instant::now();
                (0..40).for_each(|round| run(round % copies));
                synchronize(&device).unwrap();
                let secs = started.elapsed().as_secs_f64() / 40.0;
                let rate = bytes as f64 / secs / 1e9;
                write!(line, "  {m}: f{} s{} {:.1} us {rate:.0} GB/s", form.form, form.splits, secs * 1e6).unwrap();
            }
            println!("{line}");
        }
    }
}
