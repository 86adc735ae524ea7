//! Sums, casts, copies, dropout, sums of columns and the check for infinities against plain loops.

use candle_core::{DType, Tensor};
use trainer::device::{array, download_u32, empty, matrix, upload_u64};
use trainer::kernels::cuda::{axpby, column_sums, column_sums_workspace, count_non_finite, dropout, fill};
use trainer::rng::{Stream, is_kept, mix};

use crate::padded::{MARGINS, Padded, TYPES, print_bandwidth, rounded, tolerance};
use crate::support::{assert_close, device, download, random, upload};

const SHAPES: [(usize, usize); 8] = [(5, 896), (3, 1000), (17, 24), (4, 8), (3, 7), (1, 1), (300, 33), (1, 20_003)];

#[test]
#[ignore = "gpu"]
fn sums_of_all_types_shapes_and_strides() {
    let device = device();
    for to in TYPES {
        for from in TYPES {
            for shape in SHAPES {
                for margins in MARGINS {
                    let what = format!("{from:?} to {to:?} {shape:?} {margins:?}");
                    let count = shape.0 * shape.1;
                    let x = Padded::new(&device, &random("x", count), shape, margins, from);
                    let y = Padded::new(&device, &random("y", count), shape, (0, 8), to);
                    let want: Vec<f32> = x.values.iter().zip(&y.values).map(|(x, y)| 0.5 * x - 2.0 * y).collect();
                    axpby(&device, y.matrix(), 0.5, x.matrix(), -2.0).unwrap();
                    assert_close(&what, &y.read(), &want, tolerance(to));
                    // A cast reads nothing of what it replaces.
                    let y = Padded::poisoned(&device, shape, margins, to);
                    axpby(&device, y.matrix(), 1.0, x.matrix(), 0.0).unwrap();
                    assert_eq!(y.read(), rounded(&device, &x.values, to), "{what}");
                    // In place.
                    axpby(&device, y.matrix(), 1.0, y.matrix(), 1.0).unwrap();
                    let twice: Vec<f32> = rounded(&device, &x.values, to).iter().map(|v| 2.0 * v).collect();
                    assert_eq!(y.read(), twice, "{what}");
                }
            }
        }
    }
}

#[test]
#[ignore = "gpu"]
fn fills_of_all_shapes_and_strides() {
    let device = device();
    for dtype in TYPES {
        for shape in SHAPES {
            for margins in MARGINS {
                let what = format!("{dtype:?} {shape:?} {margins:?}");
                let y = Padded::poisoned(&device, shape, margins, dtype);
                fill(&device, y.matrix(), -1.5).unwrap();
                assert!(y.read().iter().all(|&v| v == -1.5), "{what}");
            }
        }
    }
}

#[test]
#[ignore = "gpu"]
fn more_rows_than_a_grid_is_high() {
    let device = device();
    let (rows, cols) = (1_200_000, 9);
    let y = empty(&device, (rows, 2 * cols), DType::BF16).unwrap();
    let y = matrix(&y).unwrap();
    let grid_rows = |first: usize| y.columns(first, cols);
    fill(&device, grid_rows(0), 2.0).unwrap();
    axpby(&device, grid_rows(cols), 0.5, grid_rows(0), 0.0).unwrap();
    let sums = upload(&device, &vec![1.0; 2 * cols], 2 * cols, DType::F32);
    let workspace = empty(&device, column_sums_workspace(rows, 2 * cols), DType::F32).unwrap();
    column_sums(&device, array(&sums).unwrap(), y, array(&workspace).unwrap()).unwrap();
    let total = rows as f32;
    let want: Vec<f32> = (0..2 * cols).map(|col| if col < cols { 2.0 * total + 1.0 } else { total + 1.0 }).collect();
    assert_close("sums", &download(&sums), &want, 1e-6);
}

#[test]
#[ignore = "gpu"]
fn sums_of_columns_are_added_and_repeat_their_bits() {
    let device = device();
    for dtype in TYPES {
        for shape in [(300, 896), (1, 1000), (130, 24), (4, 8), (65, 7), (1, 1), (2000, 3), (64, 20_003)] {
            for margins in MARGINS {
                let (rows, cols) = shape;
                let x = Padded::new(&device, &random("x", rows * cols), shape, margins, dtype);
                let before = random("sums", cols);
                let mut want: Vec<f64> = before.iter().map(|&v| f64::from(v)).collect();
                for row in x.values.chunks_exact(cols) {
                    want.iter_mut().zip(row).for_each(|(sum, &v)| *sum += f64::from(v));
                }
                let want: Vec<f32> = want.into_iter().map(|v| v as f32).collect();
                let run = || {
                    let sums = upload(&device, &before, cols, DType::F32);
                    let length = column_sums_workspace(rows, cols);
                    let workspace = upload(&device, &vec![f32::NAN; length], length, DType::F32);
                    column_sums(&device, array(&sums).unwrap(), x.matrix(), array(&workspace).unwrap()).unwrap();
                    download(&sums)
                };
                let got = run();
                assert_close(&format!("{dtype:?} {shape:?} {margins:?}"), &got, &want, 1e-5);
                assert_eq!(got, run());
            }
        }
    }
}

#[test]
#[ignore = "gpu"]
fn dropout_drops_what_the_cpu_drops() {
    let device = device();
    let mut stream = Stream::new(19, "dropout test", 0, 0);
    for (from, to) in [
        (DType::F32, DType::F32),
        (DType::F16, DType::F16),
        (DType::BF16, DType::BF16),
        (DType::BF16, DType::F32),
        (DType::F32, DType::BF16),
    ] {
        for shape in SHAPES {
            for (margins, probability) in MARGINS.into_iter().zip([0.1, 0.5, 0.037]) {
                let (rows, cols) = shape;
                let what = format!("{from:?} to {to:?} {shape:?} {margins:?} {probability}");
                let keys: Vec<u64> = (0..rows).map(|_| stream.bits()).collect();
                let key = stream.bits();
                let x = Padded::new(&device, &random("x", rows * cols), shape, margins, from);
                let scale = (1.0 / (1.0 - probability)) as f32;
                let dropped: Vec<f32> = x
                    .values
                    .iter()
                    .enumerate()
                    .map(|(i, x)| {
                        let row_key = mix(key ^ keys[i / cols]);
                        if is_kept(row_key, (i % cols) as u64, probability) { x * scale } else { 0.0 }
                    })
                    .collect();
                let keys = upload_u64(&device, &keys).unwrap();
                let keys = array(&keys).unwrap();
                let y = Padded::poisoned(&device, shape, margins, to);
                dropout(&device, y.matrix(), x.matrix(), keys, key, probability, false).unwrap();
                assert_eq!(y.read(), rounded(&device, &dropped, to), "{what}");

                let y = Padded::new(&device, &random("y", rows * cols), shape, margins, to);
                let sums: Vec<f32> = y.values.iter().zip(&dropped).map(|(y, d)| y + d).collect();
                dropout(&device, y.matrix(), x.matrix(), keys, key, probability, true).unwrap();
                assert_eq!(y.read(), rounded(&device, &sums, to), "{what}");
            }
        }
    }
}

#[test]
#[ignore = "gpu"]
fn infinities_and_what_is_no_number_are_counted() {
    let device = device();
    for dtype in TYPES {
        for shape in SHAPES {
            for margins in MARGINS {
                let count = shape.0 * shape.1;
                let mut values = random("x", count);
                // The largest finite number of the type is no infinity.
                values[0] = if dtype == DType::F16 { 65504.0 } else { 3.0e38 };
                let counted = Tensor::zeros(1, DType::U32, &device).unwrap();
                let x = Padded::new(&device, &values, shape, margins, dtype);
                count_non_finite(&device, array(&counted).unwrap(), x.matrix()).unwrap();
                assert_eq!(download_u32(&counted).unwrap(), [0], "{dtype:?} {shape:?} {margins:?}");
                let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
                let mut expected = 0;
                for (i, value) in values.iter_mut().enumerate().skip(count / 2).step_by(37) {
                    *value = bad[i % 3];
                    expected += 1;
                }
                values[count - 1] = f32::NAN;
                expected += u32::from((count - 1 - count / 2) % 37 != 0);
                let x = Padded::new(&device, &values, shape, margins, dtype);
                (0..2).for_each(|_| count_non_finite(&device, array(&counted).unwrap(), x.matrix()).unwrap());
                assert_eq!(download_u32(&counted).unwrap(), [2 * expected], "{dtype:?} {shape:?} {margins:?}");
            }
        }
    }
}

#[test]
#[ignore = "gpu"]
fn nothing_is_done_with_nothing_and_arguments_that_do_not_fit_are_named() {
    let device = device();
    let tensor = |shape: (usize, usize)| Tensor::zeros(shape, DType::F32, &device).unwrap();
    let (small, other) = (tensor((4, 8)), tensor((4, 9)));
    let (small, other) = (matrix(&small).unwrap(), matrix(&other).unwrap());
    for none in [small.rows(0, 0), small.columns(0, 0)] {
        axpby(&device, none, 1.0, none, 1.0).unwrap();
        fill(&device, none, 1.0).unwrap();
    }
    assert!(axpby(&device, small, 1.0, other, 0.0).unwrap_err().to_string().contains("[4, 8]"));
    let short = upload(&device, &[0.0; 8], 8, DType::F32);
    let short = array(&short).unwrap();
    assert!(column_sums(&device, short, other, short).unwrap_err().to_string().contains("`sums`"));
    assert!(dropout(&device, small, small, short, 1, 1.0, false).unwrap_err().to_string().contains("`probability`"));
}

#[test]
#[ignore = "gpu"]
fn bench_pointwise() {
    let device = device();
    let (rows, cols) = (8192, 18_944);
    let made = [DType::BF16, DType::BF16, DType::F32].map(|t| empty(&device, (rows, cols), t).unwrap());
    let [x, y, wide] = [0, 1, 2].map(|i| matrix(&made[i]).unwrap());
    for m in [x, y, wide] {
        fill(&device, m, 0.5).unwrap();
    }
    let values = rows * cols;
    print_bandwidth(&device, "fill bf16", 2 * values, || fill(&device, x, 0.5).unwrap());
    print_bandwidth(&device, "copy bf16", 4 * values, || axpby(&device, y, 1.0, x, 0.0).unwrap());
    print_bandwidth(&device, "copy of columns bf16", 4 * rows * 9000, || {
        axpby(&device, y.columns(8, 9000), 1.0, x.columns(0, 9000), 0.0).unwrap();
    });
    print_bandwidth(&device, "cast f32 to bf16", 6 * values, || axpby(&device, y, 1.0, wide, 0.0).unwrap());
    print_bandwidth(&device, "add bf16", 6 * values, || axpby(&device, y, 0.5, x, 0.5).unwrap());
    print_bandwidth(&device, "add f32 += bf16", 10 * values, || axpby(&device, wide, 1.0, x, 0.5).unwrap());
    let row = empty(&device, cols, DType::F32).unwrap();
    fill(&device, matrix(&row).unwrap(), 0.0).unwrap();
    let sums = array(&row).unwrap();
    let workspace = empty(&device, column_sums_workspace(rows, cols), DType::F32).unwrap();
    let workspace = array(&workspace).unwrap();
    print_bandwidth(&device, "column_sums bf16", 2 * values, || column_sums(&device, sums, x, workspace).unwrap());
    let narrow = x.columns(0, 896);
    print_bandwidth(&device, "column_sums of 896 bf16", 2 * rows * 896, || {
        column_sums(&device, sums, narrow, workspace).unwrap();
    });
    let keys = upload_u64(&device, &vec![7; rows]).unwrap();
    let keys = array(&keys).unwrap();
    print_bandwidth(&device, "dropout bf16", 4 * values, || {
        dropout(&device, y, x, keys, 3, 0.05, false).unwrap();
    });
    let count = Tensor::zeros(1, DType::U32, &device).unwrap();
    let count = array(&count).unwrap();
    print_bandwidth(&device, "count_non_finite bf16", 2 * values, || count_non_finite(&device, count, x).unwrap());
    print_bandwidth(&device, "count_non_finite f32", 4 * values, || count_non_finite(&device, count, wide).unwrap());
}
