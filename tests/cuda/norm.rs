//! Norms of rows and heads against plain loops in f64.

use candle_core::{DType, Device, Tensor};
use trainer::device::{array, empty, matrix};
use trainer::kernels::cuda::{fill, rms_norm, rms_norm_backward, rms_norm_weight_gradient, rms_norm_workspace};

use crate::padded::{MARGINS, Padded, RESIDUALS, print_bandwidth, tolerance};
use crate::support::{assert_close, device, download, random, upload};

const EPS: f32 = 1e-5;

/// Rows, heads and columns of a head: every kernel, at its ends; columns that 8 do not divide; more than registers hold.
const SHAPES: [(usize, usize, usize); 14] = [
    (5, 1, 896),
    (3, 1, 2048),
    (2, 1, 2056),
    (2, 1, 3584),
    (2, 1, 8192),
    (1, 1, 16384),
    (2, 1, 16392),
    (9, 1, 8),
    (7, 1, 100),
    (4, 6, 128),
    (3, 2, 64),
    (3, 3, 256),
    (2, 2, 264),
    (5, 3, 7),
];

struct Reference {
    y: Vec<f32>,
    reciprocals: Vec<f32>,
    dx: Vec<f32>,
    d_weight: Vec<f32>,
}

/// Forward, gradient plus `add`, and the weight's gradient plus 1.
fn reference(x: &[f32], weight: &[f32], dy: &[f32], add: &[f32]) -> Reference {
    let d = weight.len();
    let mut out = Reference { y: Vec::new(), reciprocals: Vec::new(), dx: Vec::new(), d_weight: Vec::new() };
    let mut d_weight = vec![1.0f64; d];
    for ((x, dy), add) in x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(add.chunks_exact(d)) {
        let wide = |values: &[f32]| -> Vec<f64> { values.iter().map(|&v| f64::from(v)).collect() };
        let (x, dy, add, w) = (wide(x), wide(dy), wide(add), wide(weight));
        let r = (x.iter().map(|v| v * v).sum::<f64>() / d as f64 + f64::from(EPS)).sqrt().recip();
        let projection = (0..d).map(|i| w[i] * dy[i] * x[i]).sum::<f64>() / d as f64;
        out.reciprocals.push(r as f32);
        for i in 0..d {
            out.y.push((x[i] * r * w[i]) as f32);
            out.dx.push((r * (w[i] * dy[i] - x[i] * r * r * projection) + add[i]) as f32);
            d_weight[i] += dy[i] * x[i] * r;
        }
    }
    out.d_weight = d_weight.into_iter().map(|v| v as f32).collect();
    out
}

struct Case {
    x: Padded,
    dy: Padded,
    add: Padded,
    weight: Tensor,
    want: Reference,
}

impl Case {
    fn new(
        device: &Device,
        (rows, heads, d): (usize, usize, usize),
        margins: (usize, usize),
        (residual, activation): (DType, DType),
    ) -> Self {
        let shape = (rows, heads * d);
        let padded = |name: &str, dtype| Padded::new(device, &random(name, rows * heads * d), shape, margins, dtype);
        let (x, dy, add) = (padded("x", residual), padded("dy", activation), padded("add", residual));
        let weights = random("weight", d);
        let want = reference(&x.values, &weights, &dy.values, &add.values);
        Self { x, dy, add, weight: upload(device, &weights, d, DType::F32), want }
    }
}

#[test]
#[ignore = "gpu"]
fn norms_and_their_gradients_of_all_types_shapes_and_strides() {
    let device = device();
    for types in RESIDUALS {
        for shape in SHAPES {
            for margins in MARGINS {
                let (rows, heads, d) = shape;
                let what = format!("{types:?} {shape:?} {margins:?}");
                let case = Case::new(&device, shape, margins, types);
                let (x, weight) = (case.x.matrix(), matrix(&case.weight).unwrap());
                let y = Padded::poisoned(&device, (rows, heads * d), margins, types.1);
                let roots = upload(&device, &vec![f32::NAN; rows * heads], rows * heads, DType::F32);
                let roots_array = array(&roots).unwrap();
                rms_norm(&device, y.matrix(), roots_array, x, weight, heads, EPS).unwrap();
                assert_close(&format!("y {what}"), &y.read(), &case.want.y, tolerance(types.1));
                assert_close(&format!("roots {what}"), &download(&roots), &case.want.reciprocals, 2e-6);

                let dx = Padded::poisoned(&device, (rows, heads * d), margins, types.0);
                let (dy, add) = (case.dy.matrix(), case.add.matrix());
                rms_norm_backward(&device, dx.matrix(), dy, x, weight, roots_array, Some(add), heads).unwrap();
                assert_close(&format!("dx {what}"), &dx.read(), &case.want.dx, tolerance(types.0));
                // In the place of what is added.
                rms_norm_backward(&device, add, dy, x, weight, roots_array, Some(add), heads).unwrap();
                assert_eq!(case.add.read(), dx.read(), "{what}");
            }
        }
    }
}

#[test]
#[ignore = "gpu"]
fn a_gradient_takes_the_place_of_the_one_it_comes_from() {
    let device = device();
    for types in RESIDUALS.into_iter().filter(|(residual, activation)| residual == activation) {
        for shape in [(6, 4, 128), (3, 1, 1536), (3, 1, 5120), (3, 2, 9)] {
            let (rows, heads, d) = shape;
            let case = Case::new(&device, shape, (8, 8), types);
            let weight = matrix(&case.weight).unwrap();
            let roots = upload(&device, &case.want.reciprocals, rows * heads, DType::F32);
            let (x, dy, roots) = (case.x.matrix(), case.dy.matrix(), array(&roots).unwrap());
            let apart = Padded::poisoned(&device, (rows, heads * d), (8, 8), types.0);
            rms_norm_backward(&device, apart.matrix(), dy, x, weight, roots, None, heads).unwrap();
            rms_norm_backward(&device, dy, dy, x, weight, roots, None, heads).unwrap();
            assert_eq!(case.dy.read(), apart.read(), "{types:?} {shape:?}");
            let want: Vec<f32> = case.want.dx.iter().zip(&case.add.values).map(|(dx, add)| dx - add).collect();
            assert_close(&format!("{types:?} {shape:?}"), &apart.read(), &want, tolerance(types.0));
        }
    }
}

#[test]
#[ignore = "gpu"]
fn the_weights_gradient_is_added_and_repeats_its_bits() {
    let device = device();
    for types in RESIDUALS {
        for shape in [(300, 1, 896), (1, 1, 2048), (130, 1, 100), (77, 12, 128), (65, 3, 64), (70, 2, 7)] {
            for margins in MARGINS {
                let (rows, heads, d) = shape;
                let case = Case::new(&device, shape, margins, types);
                let roots = upload(&device, &case.want.reciprocals, rows * heads, DType::F32);
                let run = || {
                    let grad = upload(&device, &vec![1.0; d], d, DType::F32);
                    let length = rms_norm_workspace(rows, heads * d, heads);
                    let workspace = upload(&device, &vec![f32::NAN; length], length, DType::F32);
                    let (grad_array, roots, workspace) =
                        (array(&grad).unwrap(), array(&roots).unwrap(), array(&workspace).unwrap());
                    let (dy, x) = (case.dy.matrix(), case.x.matrix());
                    rms_norm_weight_gradient(&device, grad_array, dy, x, roots, workspace, heads).unwrap();
                    download(&grad)
                };
                let got = run();
                assert_close(&format!("{types:?} {shape:?} {margins:?}"), &got, &case.want.d_weight, 2e-5);
                assert_eq!(got, run());
            }
        }
    }
}

#[test]
#[ignore = "gpu"]
fn arguments_that_do_not_fit_are_named() {
    let device = device();
    let tensor = |shape: (usize, usize), dtype| Tensor::zeros(shape, dtype, &device).unwrap();
    let roots = Tensor::zeros(4, DType::F32, &device).unwrap();
    let roots = array(&roots).unwrap();
    let run = |y: (usize, usize), types: (DType, DType), weight: usize, heads: usize| {
        let tensors = [tensor(y, types.1), tensor((4, 16), types.0), tensor((1, weight), DType::F32)];
        let [y, x, weight] = [0, 1, 2].map(|i| matrix(&tensors[i]).unwrap());
        rms_norm(&device, y, roots, x, weight, heads, EPS).unwrap_err().to_string()
    };
    assert!(run((4, 8), (DType::F32, DType::F32), 16, 1).contains("`y`"));
    assert!(run((4, 16), (DType::BF16, DType::F16), 16, 1).contains("`x`"));
    assert!(run((4, 16), (DType::F32, DType::F16), 8, 1).contains("`weight`"));
    assert!(run((4, 16), (DType::F32, DType::F16), 8, 2).contains("`reciprocals`"));
    assert!(run((4, 16), (DType::F32, DType::F16), 8, 3).contains("`heads`"));
}

#[test]
#[ignore = "gpu"]
fn bench_norm() {
    let device = device();
    let shapes = [(8192, 1, 896), (8192, 1, 3584), (8192, 1, 4096), (8192, 1, 8192), (8192, 40, 128)];
    for (rows, heads, d) in shapes {
        for (residual, activation) in [(DType::BF16, DType::BF16), (DType::F32, DType::F16)] {
            let filled = |dtype| {
                let tensor = empty(&device, (rows, heads * d), dtype).unwrap();
                fill(&device, matrix(&tensor).unwrap(), 0.5).unwrap();
                tensor
            };
            let tensors = [residual, residual, activation, activation].map(filled);
            let [x, dx, y, dy] = [0, 1, 2, 3].map(|i| matrix(&tensors[i]).unwrap());
            let weight = upload(&device, &vec![1.0; d], d, DType::F32);
            let roots = empty(&device, rows * heads, DType::F32).unwrap();
            let grad = upload(&device, &vec![0.0; d], d, DType::F32);
            let workspace = empty(&device, rms_norm_workspace(rows, heads * d, heads), DType::F32).unwrap();
            let (weight, roots) = (matrix(&weight).unwrap(), array(&roots).unwrap());
            let (grad, workspace) = (array(&grad).unwrap(), array(&workspace).unwrap());
            let what = |name: &str| format!("{name} [{rows}, {heads} x {d}] {residual:?} {activation:?}");
            let (r, t) = (residual.size_in_bytes(), activation.size_in_bytes());
            let values = rows * heads * d;
            print_bandwidth(&device, &what("norm"), values * (r + t), || {
                rms_norm(&device, y, roots, x, weight, heads, EPS).unwrap();
            });
            print_bandwidth(&device, &what("backward"), values * (3 * r + t), || {
                rms_norm_backward(&device, dx, dy, x, weight, roots, Some(dx), heads).unwrap();
            });
            print_bandwidth(&device, &what("weight"), values * (r + t), || {
                rms_norm_weight_gradient(&device, grad, dy, x, roots, workspace, heads).unwrap();
            });
        }
    }
}
