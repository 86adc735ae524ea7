//! Matrix products against plain loops, and how fast they are.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use trainer::device::{Matrix, array, empty, matrix, synchronize};
use trainer::kernels::cuda::{Accumulate, Side, gemm, start_choices, try_noted};

use crate::support::{assert_close, device, download, random, upload};

const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Held by tests that turn tuning on or need it not to change.
static TUNING: Mutex<()> = Mutex::new(());

/// Relative error of a result that was summed in f32, by tensor cores for 16-bit operands, and rounded once to its
/// type, or twice with a separate bias.
fn tolerance((from, to): (DType, DType)) -> f32 {
    match (from, to) {
        (_, DType::F16) => 1e-3,
        (_, DType::BF16) => 8e-3,
        (DType::F32, _) => 1e-5,
        _ => 1e-4,
    }
}

/// The values of a view, which may be empty.
fn values(view: &Tensor) -> Vec<f32> {
    if view.elem_count() == 0 { Vec::new() } else { download(&view.contiguous().unwrap()) }
}

/// A matrix on the device inside a wider, poisoned one, and its values after rounding, row by row.
struct Operand {
    wide: Tensor,
    view: Tensor,
    values: Vec<f32>,
}

impl Operand {
    /// `rows` x `cols` values, `before` columns of others on the left and `after` on the right.
    fn new(device: &Device, name: &str, shape: (usize, usize), margins: (usize, usize), dtype: DType) -> Self {
        Self::with(device, &random(name, shape.0 * shape.1), shape, margins, dtype)
    }

    fn poisoned(device: &Device, shape: (usize, usize), margins: (usize, usize), dtype: DType) -> Self {
        Self::with(device, &vec![f32::NAN; shape.0 * shape.1], shape, margins, dtype)
    }

    fn with(
        device: &Device,
        inner: &[f32],
        (rows, cols): (usize, usize),
        (before, after): (usize, usize),
        dtype: DType,
    ) -> Self {
        // A row and a column at least: nothing is uploaded for none.
        let (height, width) = (rows.max(1), (before + cols + after).max(1));
        let mut all = vec![f32::NAN; height * width];
        for row in 0..rows {
            all[row * width + before..][..cols].copy_from_slice(&inner[row * cols..][..cols]);
        }
        let wide = upload(device, &all, (height, width), dtype);
        let view = wide.narrow(0, 0, rows).unwrap().narrow(1, before, cols).unwrap();
        let values = values(&view);
        Self { wide, view, values }
    }

    fn matrix(&self) -> Matrix<'_> {
        matrix(&self.view).unwrap()
    }
}

/// `op(x)` in plain order.
fn plain(x: &Operand, (rows, cols): (usize, usize), side: Side) -> Vec<f64> {
    let at = |row: usize, col: usize| match side {
        Side::Plain => x.values[row * cols + col],
        Side::Transposed => x.values[col * rows + row],
    };
    (0..rows * cols).map(|i| f64::from(at(i / cols, i % cols))).collect()
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Target {
    No,
    Into,
    Onto,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    sizes: (usize, usize, usize),
    sides: (Side, Side),
    types: (DType, DType),
    /// Columns before and after each operand.
    margins: (usize, usize),
    target: Target,
    has_bias: bool,
}

fn check(device: &Device, case: Case) {
    let Case { sizes: (m, n, k), sides: (a_side, b_side), types: (from, to), margins, target, has_bias } = case;
    let stored = |rows, cols, side| if side == Side::Plain { (rows, cols) } else { (cols, rows) };
    let a = Operand::new(device, "gemm a", stored(m, k, a_side), margins, from);
    let b = Operand::new(device, "gemm b", stored(k, n, b_side), margins, from);
    let c = Operand::new(device, "gemm c", (m, n), margins, to);
    let bias = Operand::new(device, "gemm bias", (1, n), (0, 0), to);
    let d = if target == Target::Into {
        Operand { wide: c.wide.clone(), view: c.view.clone(), values: Vec::new() }
    } else {
        Operand::poisoned(device, (m, n), margins, to)
    };
    let accumulate = match target {
        Target::No => Accumulate::No,
        Target::Into => Accumulate::Into,
        Target::Onto => Accumulate::Onto(c.matrix()),
    };
    let bias_pointer = has_bias.then(|| array(&bias.view).unwrap());
    let (a_view, b_view) = ((a.matrix(), a_side), (b.matrix(), b_side));
    gemm(device, d.matrix(), a_view, b_view, 0.5, accumulate, bias_pointer).unwrap();
    let got = values(&d.view);

    let (left, right) = (plain(&a, (m, k), a_side), plain(&b, (k, n), b_side));
    let mut want = Vec::with_capacity(m * n);
    for row in 0..m {
        for col in 0..n {
            let sum: f64 = (0..k).map(|i| left[row * k + i] * right[i * n + col]).sum();
            let old = if target == Target::No { 0.0 } else { f64::from(c.values[row * n + col]) };
            let offset = if has_bias { f64::from(bias.values[col]) } else { 0.0 };
            want.push((0.5 * sum + old + offset) as f32);
        }
    }
    if !want.is_empty() {
        assert_close(&format!("{case:?}"), &got, &want, tolerance(case.types));
    }
    // What lies around the result is untouched.
    let around = download(&d.wide);
    let width = (margins.0 + n + margins.1).max(1);
    let outside = |i: usize| !(margins.0..margins.0 + n).contains(&(i % width));
    assert!(around.iter().enumerate().all(|(i, x)| !outside(i) || x.is_nan()), "{case:?} wrote outside");
}

fn type_pairs() -> impl Iterator<Item = (DType, DType)> {
    TYPES.into_iter().map(|t| (t, t)).chain([(DType::F16, DType::F32), (DType::BF16, DType::F32)])
}

#[test]
#[ignore = "gpu"]
fn products_of_all_types_sides_and_targets() {
    let device = device();
    for types in type_pairs() {
        for sides in [
            (Side::Plain, Side::Plain),
            (Side::Plain, Side::Transposed),
            (Side::Transposed, Side::Plain),
            (Side::Transposed, Side::Transposed),
        ] {
            for target in [Target::No, Target::Into, Target::Onto] {
                for has_bias in [false, true] {
                    let sizes = (40, 56, 72);
                    check(&device, Case { sizes, sides, types, margins: (0, 0), target, has_bias });
                    check(&device, Case { sizes, sides, types, margins: (8, 16), target, has_bias });
                }
            }
        }
    }
}

#[test]
#[ignore = "gpu"]
fn products_of_odd_shapes_and_alignments() {
    let device = device();
    for types in type_pairs() {
        for sizes in [(1, 1, 1), (5, 1, 33), (1, 7, 9), (17, 13, 3), (33, 130, 65), (3, 48, 1)] {
            for (target, has_bias) in [(Target::No, true), (Target::Into, false), (Target::Onto, true)] {
                for margins in [(0, 0), (1, 2), (3, 0)] {
                    let sides = (Side::Plain, Side::Transposed);
                    check(&device, Case { sizes, sides, types, margins, target, has_bias });
                    let sides = (Side::Transposed, Side::Plain);
                    check(&device, Case { sizes, sides, types, margins, target, has_bias });
                }
            }
        }
    }
}

#[test]
#[ignore = "gpu"]
fn products_without_rows_columns_or_summands() {
    let device = device();
    for types in type_pairs() {
        for sizes in [(6, 10, 0), (0, 10, 4), (6, 0, 4)] {
            for target in [Target::No, Target::Into, Target::Onto] {
                for has_bias in [false, true] {
                    let sides = (Side::Plain, Side::Plain);
                    check(&device, Case { sizes, sides, types, margins: (2, 1), target, has_bias });
                }
            }
        }
    }
}

#[test]
#[ignore = "gpu"]
fn a_bias_at_an_odd_address() {
    let device = device();
    for types in type_pairs() {
        let (m, n, k) = (24, 40, 16);
        let a = Operand::new(&device, "gemm a", (m, k), (0, 0), types.0);
        let b = Operand::new(&device, "gemm b", (n, k), (0, 0), types.0);
        let bias = upload(&device, &random("gemm bias", n + 1), n + 1, types.1).narrow(0, 1, n).unwrap();
        let d = upload(&device, &vec![f32::NAN; m * n], (m, n), types.1);
        let operands = ((a.matrix(), Side::Plain), (b.matrix(), Side::Transposed));
        let bias_pointer = Some(array(&bias).unwrap());
        gemm(&device, matrix(&d).unwrap(), operands.0, operands.1, 1.0, Accumulate::No, bias_pointer).unwrap();
        let biases = download(&bias);
        let dot = |row: usize, col: usize| -> f32 {
            (0..k).map(|i| a.values[row * k + i] * b.values[col * k + i]).sum::<f32>() + biases[col]
        };
        let want: Vec<f32> = (0..m * n).map(|i| dot(i / n, i % n)).collect();
        assert_close(&format!("{types:?}"), &download(&d), &want, 2.0 * tolerance(types));
    }
}

#[test]
#[ignore = "gpu"]
fn a_long_sum_is_exact_enough_and_repeats_its_bits() {
    let _held = TUNING.lock().unwrap_or_else(PoisonError::into_inner);
    let device = device();
    for (types, target) in [((DType::BF16, DType::F32), Target::Into), ((DType::F32, DType::F32), Target::No)] {
        let case = Case {
            sizes: (48, 96, 8192),
            sides: (Side::Transposed, Side::Plain),
            types,
            margins: (0, 0),
            target,
            has_bias: false,
        };
        check(&device, case);
    }
    let a = upload(&device, &random("gemm a", 8192 * 48), (8192, 48), DType::BF16);
    let b = upload(&device, &random("gemm b", 8192 * 512), (8192, 512), DType::BF16);
    let run = || {
        let d = empty(&device, (48, 512), DType::F32).unwrap();
        let (a, b) = ((matrix(&a).unwrap(), Side::Transposed), (matrix(&b).unwrap(), Side::Plain));
        gemm(&device, matrix(&d).unwrap(), a, b, 1.0, Accumulate::No, None).unwrap();
        download(&d)
    };
    let first = run();
    for _ in 0..5 {
        assert_eq!(first, run());
    }
}

#[test]
#[ignore = "gpu"]
fn tuning_changes_no_result_but_rounding() {
    let _held = TUNING.lock().unwrap_or_else(PoisonError::into_inner);
    let device = device();
    start_choices(&device, true).unwrap();
    let cases = [(Target::No, true), (Target::Into, false), (Target::Onto, false)].map(|(target, has_bias)| {
        [(0, 0), (1, 0)].map(|margins| {
            let sides = (Side::Plain, Side::Transposed);
            Case { sizes: (64, 96, 128), sides, types: (DType::BF16, DType::BF16), margins, target, has_bias }
        })
    });
    cases.iter().flatten().for_each(|case| check(&device, *case));
    assert!(try_noted(&device, 0, &|| false).unwrap().products > 0);
    cases.iter().flatten().for_each(|case| check(&device, *case));
    start_choices(&device, false).unwrap();
}

#[test]
#[ignore = "gpu"]
fn large_products_have_a_second_trial_and_stay_the_same() {
    let _held = TUNING.lock().unwrap_or_else(PoisonError::into_inner);
    let device = device();
    // Long enough for a second trial, and used often enough.
    let (size, uses) = (4096, 50);
    let (a, b) = (noise(&device, size, size), noise(&device, size, size));
    let run = |d: &Tensor, accumulate| {
        let (a, b) = ((matrix(&a).unwrap(), Side::Plain), (matrix(&b).unwrap(), Side::Transposed));
        gemm(&device, matrix(d).unwrap(), a, b, 1.0, accumulate, None).unwrap();
    };
    let result = || Tensor::zeros((size, size), DType::F32, &device).unwrap();
    let want = result();
    run(&want, Accumulate::No);
    let want = download(&want);
    start_choices(&device, true).unwrap();
    let (plain, sum) = (result(), result());
    for pass in 0..2 {
        for _ in 0..uses {
            run(&plain, Accumulate::No);
            run(&sum, Accumulate::Into);
        }
        // Nothing is left to try after the first.
        assert_eq!(try_noted(&device, 0, &|| false).unwrap().products, 2 - 2 * pass);
    }
    let mean: Vec<f32> = download(&sum).into_iter().map(|x| x / (2 * uses) as f32).collect();
    assert_close("made again and again", &download(&plain), &want, 1e-3);
    assert_close("added up", &mean, &want, 1e-3);
    start_choices(&device, false).unwrap();
}

#[test]
#[ignore = "gpu"]
fn arguments_that_do_not_fit_are_named() {
    let device = device();
    let tensor = |shape, dtype| Tensor::zeros(shape, dtype, &device).unwrap();
    let (a, b) = (tensor((4, 8), DType::F16), tensor((8, 6), DType::F16));
    let run = |d: &Tensor, a: &Tensor, b: &Tensor| {
        let (a, b) = ((matrix(a).unwrap(), Side::Plain), (matrix(b).unwrap(), Side::Plain));
        gemm(&device, matrix(d).unwrap(), a, b, 1.0, Accumulate::No, None).unwrap_err().to_string()
    };
    assert!(run(&tensor((4, 7), DType::F16), &a, &b).contains("[4, 6]"));
    assert!(run(&tensor((4, 6), DType::BF16), &a, &b).contains("BF16"));
    assert!(run(&tensor((4, 6), DType::F16), &a, &tensor((8, 6), DType::F32)).contains("F32"));
    let d = tensor((4, 6), DType::F16);
    let (left, right) = ((matrix(&a).unwrap(), Side::Plain), (matrix(&b).unwrap(), Side::Plain));
    let bias = tensor((1, 5), DType::F16);
    let bias = array(&bias).unwrap();
    let short = gemm(&device, matrix(&d).unwrap(), left, right, 1.0, Accumulate::No, Some(bias)).unwrap_err();
    assert!(short.to_string().contains("bias"));
}

/// Normal-like values of any size without a large upload: a product of two thin random matrices.
fn noise(device: &Device, rows: usize, cols: usize) -> Tensor {
    let thin = 64;
    let left = upload(device, &random("bench left", rows * thin), (rows, thin), DType::BF16);
    let right = upload(device, &random("bench right", cols * thin), (cols, thin), DType::BF16);
    let d = empty(device, (rows, cols), DType::BF16).unwrap();
    let operands = ((matrix(&left).unwrap(), Side::Plain), (matrix(&right).unwrap(), Side::Transposed));
    gemm(device, matrix(&d).unwrap(), operands.0, operands.1, 0.125, Accumulate::No, None).unwrap();
    d
}

/// The last summands are an adapter's: with nothing else in the operands they are the whole result.
#[test]
#[ignore = "gpu"]
fn no_summand_is_left_out() {
    let _held = TUNING.lock().unwrap_or_else(PoisonError::into_inner);
    let device = device();
    let inputs = [
        896, 1536, 2048, 2560, 3072, 3584, 4096, 4864, 5120, 6144, 8192, 8960, 9728, 11_008, 12_288, 13_824, 17_408,
        18_944, 24_576, 25_600, 27_648, 29_568,
    ];
    let mut wrong = Vec::new();
    for (inputs, ranks) in inputs.into_iter().flat_map(|inputs| [8, 16, 24, 72].map(|ranks| (inputs, ranks))) {
        let k = inputs + ranks;
        for n in [896, 3584] {
            let b = noise(&device, n, k);
            for dtype in [DType::BF16, DType::F16] {
                let b = b.to_dtype(dtype).unwrap();
                for m in [1, 4, 16, 33, 76, 128, 300] {
                    let last = Tensor::randn(0f32, 1f32, (m, ranks), &device).unwrap().to_dtype(dtype).unwrap();
                    let zeros = Tensor::zeros((m, inputs), dtype, &device).unwrap();
                    let a = Tensor::cat(&[&zeros, &last], 1).unwrap();
                    let d = empty(&device, (m, n), dtype).unwrap();
                    let [exact, f32_last] = [&b.narrow(1, inputs, ranks).unwrap(), &last]
                        .map(|x| x.to_dtype(DType::F32).unwrap().contiguous().unwrap());
                    let want = f32_last.matmul(&exact.t().unwrap()).unwrap();
                    for is_tuned in [false, true] {
                        // A trial takes long; what it chooses from is the same for all rows.
                        if is_tuned && (m != 76 || dtype == DType::F16) {
                            continue;
                        }
                        start_choices(&device, is_tuned).unwrap();
                        let multiply = || {
                            let (a, b) = ((matrix(&a).unwrap(), Side::Plain), (matrix(&b).unwrap(), Side::Transposed));
                            gemm(&device, matrix(&d).unwrap(), a, b, 1.0, Accumulate::No, None).unwrap();
                        };
                        multiply();
                        if is_tuned {
                            try_noted(&device, 0, &|| false).unwrap();
                            multiply();
                        }
                        let sum = |x: Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
                        let error = sum((d.to_dtype(DType::F32).unwrap() - &want).unwrap()) / sum(want.clone());
                        if error.is_nan() || error > 1e-4 {
                            wrong.push(format!("[{m}, {k}] x [{k}, {n}] in {dtype:?}, tuned: {is_tuned}: {error}"));
                        }
                    }
                }
            }
        }
    }
    start_choices(&device, false).unwrap();
    assert!(wrong.is_empty(), "{} products:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
#[ignore = "gpu"]
#[expect(clippy::print_stdout, reason = "a table for the reader")]
fn bench_gemm() {
    use Side::{Plain, Transposed};
    let _held = TUNING.lock().unwrap_or_else(PoisonError::into_inner);
    let device = device();
    let shapes = [
        ((8192, 37888, 3616), (Plain, Transposed), DType::BF16, Accumulate::No),
        ((8192, 3616, 37888), (Plain, Plain), DType::BF16, Accumulate::No),
        ((8192, 3584, 18960), (Plain, Transposed), DType::BF16, Accumulate::No),
        ((8192, 4608, 3632), (Plain, Transposed), DType::BF16, Accumulate::No),
        ((8192, 16, 3584), (Plain, Transposed), DType::BF16, Accumulate::No),
        ((8192, 32, 3584), (Plain, Transposed), DType::BF16, Accumulate::No),
        ((8192, 48, 3584), (Plain, Transposed), DType::BF16, Accumulate::No),
        ((8192, 16, 18944), (Plain, Transposed), DType::BF16, Accumulate::No),
        ((8192, 3584, 32), (Plain, Plain), DType::BF16, Accumulate::Into),
        ((8192, 18944, 16), (Plain, Plain), DType::BF16, Accumulate::Into),
        ((16, 18944, 8192), (Transposed, Plain), DType::F32, Accumulate::Into),
        ((32, 3584, 8192), (Transposed, Plain), DType::F32, Accumulate::No),
        ((48, 3584, 8192), (Transposed, Plain), DType::F32, Accumulate::Into),
        ((18944, 16, 8192), (Transposed, Plain), DType::F32, Accumulate::Into),
        ((3584, 16, 8192), (Transposed, Plain), DType::F32, Accumulate::Into),
        ((512, 16, 8192), (Transposed, Plain), DType::F32, Accumulate::Into),
    ];
    println!("     m      n      k  a b  result |     us  TFLOP/s   GB/s |  tuned: us  TFLOP/s   GB/s");
    for ((m, n, k), (a_side, b_side), to, accumulate) in shapes {
        let stored = |rows, cols, side| if side == Plain { (rows, cols) } else { (cols, rows) };
        let ((a_rows, a_cols), (b_rows, b_cols)) = (stored(m, k, a_side), stored(k, n, b_side));
        let (a, b) = (noise(&device, a_rows, a_cols), noise(&device, b_rows, b_cols));
        let d = Tensor::zeros((m, n), to, &device).unwrap();
        let run = |times: usize| {
            for _ in 0..times {
                let (a, b) = ((matrix(&a).unwrap(), a_side), (matrix(&b).unwrap(), b_side));
                gemm(&device, matrix(&d).unwrap(), a, b, 1.0, accumulate, None).unwrap();
            }
            synchronize(&device).unwrap();
        };
        let writes = if matches!(accumulate, Accumulate::No) { 1 } else { 2 };
        let bytes = 2 * (m * k + k * n) + writes * m * n * to.size_in_bytes();
        let measured = [false, true].map(|on| {
            start_choices(&device, on).unwrap();
            run(5);
            try_noted(&device, 0, &|| false).unwrap();
            let times = 20;
            let start = Instant::now();
            run(times);
            let secs = start.elapsed().as_secs_f64() / times as f64;
            let flops = 2.0 * m as f64 * n as f64 * k as f64;
            format!("{:6.0} {:8.1} {:6.0}", secs * 1e6, flops / secs * 1e-12, bytes as f64 / secs * 1e-9)
        });
        let letter = |side| if side == Plain { 'n' } else { 't' };
        let (left, right, to) = (letter(a_side), letter(b_side), format!("{to:?}"));
        println!("{m:6} {n:6} {k:6}  {left} {right}  {to:>6} | {} |     {}", measured[0], measured[1]);
    }
    start_choices(&device, false).unwrap();
}
