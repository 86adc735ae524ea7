//! The gated activation against plain loops in f64.

use candle_core::{DType, Tensor};
use trainer::device::{empty, matrix};
use trainer::kernels::cuda::{fill, swiglu, swiglu_backward};

use crate::padded::{MARGINS, Padded, TYPES, print_bandwidth, tolerance};
use crate::support::{assert_close, device, random};

const SHAPES: [(usize, usize); 8] = [(5, 4864), (3, 1000), (17, 24), (4, 8), (3, 7), (1, 1), (300, 33), (1, 20_003)];

/// Random gates, some of them where the exponential leaves the range of f32.
fn gates(count: usize) -> Vec<f32> {
    let mut values = random("gate", count);
    for (i, value) in values.iter_mut().enumerate() {
        match i % 61 {
            13 => *value = 100.0,
            29 => *value = -100.0,
            _ => *value *= 3.0,
        }
    }
    values
}

/// The activation and the gradients of `gate` and `up`.
fn reference(dy: &[f32], gate: &[f32], up: &[f32]) -> [Vec<f32>; 3] {
    let [mut y, mut d_gate, mut d_up] = [Vec::new(), Vec::new(), Vec::new()];
    for ((&dy, &gate), &up) in dy.iter().zip(gate).zip(up) {
        let (dy, gate, up) = (f64::from(dy), f64::from(gate), f64::from(up));
        let s = 1.0 / (1.0 + (-gate).exp());
        y.push((gate * s * up) as f32);
        d_gate.push((dy * up * s * (1.0 + gate * (1.0 - s))) as f32);
        d_up.push((dy * gate * s) as f32);
    }
    [y, d_gate, d_up]
}

/// Of values that sums of products went into: those of one value alone may cancel.
fn summed(dtype: DType, count: usize) -> f32 {
    tolerance(dtype).max(if count == 1 { 1e-2 } else { 2e-5 })
}

#[test]
#[ignore = "gpu"]
fn activations_and_their_gradients_of_all_types_shapes_and_strides() {
    let device = device();
    for dtype in TYPES {
        for shape in SHAPES {
            for margins in MARGINS {
                let what = format!("{dtype:?} {shape:?} {margins:?}");
                let count = shape.0 * shape.1;
                let padded = |values: &[f32]| Padded::new(&device, values, shape, margins, dtype);
                let (gate, up) = (padded(&gates(count)), padded(&random("up", count)));
                let dy = padded(&random("dy", count));
                let [y, d_gate, d_up] = reference(&dy.values, &gate.values, &up.values);
                let results = [(); 4].map(|()| Padded::poisoned(&device, shape, margins, dtype));
                let [to_y, to_gate, to_up, again] = [0, 1, 2, 3].map(|i| results[i].matrix());
                swiglu(&device, to_y, gate.matrix(), up.matrix()).unwrap();
                assert_close(&format!("y {what}"), &results[0].read(), &y, tolerance(dtype));
                let (g, u, d) = (gate.matrix(), up.matrix(), dy.matrix());
                swiglu_backward(&device, to_gate, to_up, d, g, u, None, None).unwrap();
                assert_close(&format!("d_gate {what}"), &results[1].read(), &d_gate, tolerance(dtype));
                assert_close(&format!("d_up {what}"), &results[2].read(), &d_up, tolerance(dtype));
                swiglu_backward(&device, to_gate, to_up, d, g, u, Some(again), None).unwrap();
                assert_close(&format!("again {what}"), &results[3].read(), &y, tolerance(dtype));
                // Each result in the place of an operand.
                swiglu_backward(&device, g, u, d, g, u, Some(d), None).unwrap();
                assert_eq!(gate.read(), results[1].read(), "{what}");
                assert_eq!(up.read(), results[2].read(), "{what}");
                assert_eq!(dy.read(), results[3].read(), "{what}");
            }
        }
    }
}

#[test]
#[ignore = "gpu"]
fn halves_of_one_matrix_and_operands_of_unlike_strides() {
    let device = device();
    for dtype in TYPES {
        for (rows, cols) in [(9, 4864), (5, 44), (3, 5)] {
            let both = [gates(rows * cols), random("up", rows * cols)];
            let mut values = Vec::new();
            for row in 0..rows {
                both.iter().for_each(|half| values.extend_from_slice(&half[row * cols..(row + 1) * cols]));
            }
            let wide = Padded::new(&device, &values, (rows, 2 * cols), (0, 0), dtype);
            let half = |first: usize| -> Vec<f32> {
                wide.values.chunks_exact(2 * cols).flat_map(|row| row[first..first + cols].to_vec()).collect()
            };
            let y = Padded::poisoned(&device, (rows, cols), (0, 24), dtype);
            let (gate, up) = (wide.matrix().columns(0, cols), wide.matrix().columns(cols, cols));
            swiglu(&device, y.matrix(), gate, up).unwrap();
            let (gates, ups) = (half(0), half(cols));
            let [want, d_gate, d_up] = reference(&vec![0.5; rows * cols], &gates, &ups);
            assert_close(&format!("{dtype:?} {rows} {cols}"), &y.read(), &want, tolerance(dtype));
            let dy = Padded::new(&device, &vec![0.5; rows * cols], (rows, cols), (16, 0), dtype);
            swiglu_backward(&device, gate, up, dy.matrix(), gate, up, Some(dy.matrix()), None).unwrap();
            let got = wide.read();
            let got_half = |first: usize| -> Vec<f32> {
                got.chunks_exact(2 * cols).flat_map(|row| row[first..first + cols].to_vec()).collect()
            };
            assert_close("d_gate", &got_half(0), &d_gate, tolerance(dtype));
            assert_close("d_up", &got_half(cols), &d_up, tolerance(dtype));
            assert_close("again", &dy.read(), &want, tolerance(dtype));
        }
    }
}

/// `dy + d_low a`.
fn with_low_rank(dy: &[f32], d_low: &[f32], a: &[f32], ranks: usize) -> Vec<f32> {
    let cols = a.len() / ranks;
    let mut out = Vec::new();
    for (dy, d_low) in dy.chunks_exact(cols).zip(d_low.chunks_exact(ranks)) {
        let mut sums: Vec<f64> = dy.iter().map(|&v| f64::from(v)).collect();
        for (&factor, a) in d_low.iter().zip(a.chunks_exact(cols)) {
            sums.iter_mut().zip(a).for_each(|(sum, &a)| *sum += f64::from(factor) * f64::from(a));
        }
        out.extend(sums.into_iter().map(|v| v as f32));
    }
    out
}

#[test]
#[ignore = "gpu"]
fn gradients_take_the_share_of_an_adapter_along() {
    let device = device();
    let shapes = [(5, 4864), (3, 1000), (17, 24), (4, 8), (3, 7), (1, 1), (300, 33), (131, 72), (64, 136), (1, 2056)];
    for dtype in TYPES {
        for (rows, cols) in shapes {
            for (ranks, margins) in [8, 16, 24, 40, 48, 64].into_iter().zip(MARGINS.into_iter().cycle()) {
                let what = format!("{dtype:?} [{rows}, {cols}] rank {ranks} {margins:?}");
                let count = rows * cols;
                let shape = (rows, cols);
                let padded = |values: &[f32]| Padded::new(&device, values, shape, margins, dtype);
                let (gate, up) = (padded(&gates(count)), padded(&random("up", count)));
                // The gradient of the low-rank product lies behind `dy`, and what is no number behind that.
                let wide = random("dy", rows * (cols + ranks));
                let wide = Padded::new(&device, &wide, (rows, cols + ranks), margins, dtype);
                let (dy, d_low) = (wide.matrix().columns(0, cols), wide.matrix().columns(cols, ranks));
                let a = Padded::new(&device, &random("a", ranks * cols), (ranks, cols), margins, dtype);
                let split = |values: &[f32]| -> [Vec<f32>; 2] {
                    let rows = || values.chunks_exact(cols + ranks);
                    [
                        rows().flat_map(|r| r[..cols].to_vec()).collect(),
                        rows().flat_map(|r| r[cols..].to_vec()).collect(),
                    ]
                };
                let [dy_values, d_low_values] = split(&wide.values);
                let sums = with_low_rank(&dy_values, &d_low_values, &a.values, ranks);
                let [y, d_gate, d_up] = reference(&sums, &gate.values, &up.values);
                let results = [(); 2].map(|()| Padded::poisoned(&device, shape, margins, dtype));
                let [to_gate, to_up] = [0, 1].map(|i| results[i].matrix());
                let (g, u, low) = (gate.matrix(), up.matrix(), Some((d_low, a.matrix())));
                swiglu_backward(&device, to_gate, to_up, dy, g, u, None, low).unwrap();
                assert_close(&format!("d_gate {what}"), &results[0].read(), &d_gate, summed(dtype, count));
                assert_close(&format!("d_up {what}"), &results[1].read(), &d_up, summed(dtype, count));
                // Each result in the place of an operand.
                swiglu_backward(&device, g, u, dy, g, u, Some(dy), low).unwrap();
                assert_eq!(gate.read(), results[0].read(), "{what}");
                assert_eq!(up.read(), results[1].read(), "{what}");
                let [again, d_low_after] = split(&wide.read());
                assert_close(&format!("again {what}"), &again, &y, tolerance(dtype));
                assert_eq!(d_low_after, d_low_values, "{what}");
            }
        }
    }
}

#[test]
#[ignore = "gpu"]
fn ranks_that_do_not_fit_are_named() {
    let device = device();
    let zeros = |shape: (usize, usize), dtype| Tensor::zeros(shape, dtype, &device).unwrap();
    let run = |d_low: (usize, usize), a: (usize, usize), dtype: DType| {
        let [m, d_low, a] = [zeros((4, 16), DType::F16), zeros(d_low, dtype), zeros(a, dtype)];
        let [m, d_low, a] = [&m, &d_low, &a].map(|tensor| matrix(tensor).unwrap());
        swiglu_backward(&device, m, m, m, m, m, None, Some((d_low, a))).unwrap_err().to_string()
    };
    assert!(run((4, 12), (12, 16), DType::F16).contains("64 columns"));
    assert!(run((4, 72), (72, 16), DType::F16).contains("64 columns"));
    assert!(run((3, 8), (8, 16), DType::F16).contains("`d_low`"));
    assert!(run((4, 8), (8, 24), DType::F16).contains("`a`"));
    assert!(run((4, 8), (8, 16), DType::BF16).contains("`d_low`"));
}

#[test]
#[ignore = "gpu"]
fn bench_swiglu() {
    let device = device();
    for (rows, cols, room) in [(8192, 4864, 0), (8192, 18_944, 0), (8192, 18_944, 16)] {
        let both = empty(&device, (rows, 2 * cols), DType::BF16).unwrap();
        let dy = empty(&device, (rows, cols + room), DType::BF16).unwrap();
        fill(&device, matrix(&both).unwrap(), 0.5).unwrap();
        fill(&device, matrix(&dy).unwrap(), 0.5).unwrap();
        let (both, dy) = (matrix(&both).unwrap(), matrix(&dy).unwrap().columns(0, cols));
        let (gate, up) = (both.columns(0, cols), both.columns(cols, cols));
        let bytes = rows * cols * 2;
        print_bandwidth(&device, &format!("swiglu [{rows}, {cols} + {room}]"), 3 * bytes, || {
            swiglu(&device, dy, gate, up).unwrap();
        });
        print_bandwidth(&device, &format!("backward [{rows}, {cols} + {room}]"), 6 * bytes, || {
            swiglu_backward(&device, gate, up, dy, gate, up, Some(dy), None).unwrap();
        });
    }
    let (rows, cols) = (8192, 18_944);
    for ranks in [16, 32, 48, 64] {
        let both = empty(&device, (rows, 2 * cols), DType::BF16).unwrap();
        let wide = empty(&device, (rows, cols + ranks), DType::BF16).unwrap();
        let a = empty(&device, (ranks, cols), DType::BF16).unwrap();
        let [both, wide, a] = [&both, &wide, &a].map(|tensor| matrix(tensor).unwrap());
        for m in [both, wide, a] {
            fill(&device, m, 0.5).unwrap();
        }
        let (dy, d_low) = (wide.columns(0, cols), wide.columns(cols, ranks));
        let (gate, up) = (both.columns(0, cols), both.columns(cols, cols));
        for (activated, passes) in [(None, 5), (Some(dy), 6)] {
            let what = format!("backward of rank {ranks} [{rows}, {cols}] {passes} passes");
            print_bandwidth(&device, &what, passes * rows * cols * 2, || {
                swiglu_backward(&device, gate, up, dy, gate, up, activated, Some((d_low, a))).unwrap();
            });
        }
    }
}
