//! The gradients of the gated activation with the products of the adapters around it, against plain loops in f64.

use candle_core::{DType, Device, Tensor};
use trainer::device::{Matrix, array, empty, matrix};
use trainer::kernels::cuda::{
    DownAdapter, MlpAdapters, OutAdapter, fill, swiglu_adapters_fit, swiglu_backward, swiglu_backward_adapters,
    swiglu_backward_adapters_workspace,
};

use crate::padded::{Padded, print_bandwidth, rounded, tolerance};
use crate::support::{assert_close, device, random};

const TYPES: [DType; 2] = [DType::F16, DType::BF16];

/// The last two are summed in several shares of their rows.
const SHAPES: [(usize, usize); 9] =
    [(1, 8), (5, 64), (77, 136), (300, 1000), (1, 1000), (77, 8), (5, 136), (1201, 264), (700, 64)];

/// The ranks of an operand, and those of them that the gradient has.
type Ranks = Option<(usize, usize)>;

/// Down, gate, up.
const RANKS: [[Ranks; 3]; 8] = [
    [Some((8, 8)), Some((8, 8)), Some((8, 8))],
    [Some((16, 16)), Some((16, 16)), Some((16, 16))],
    [Some((32, 32)), Some((32, 32)), Some((32, 32))],
    [Some((8, 4)), Some((16, 13)), None],
    [Some((24, 20)), None, Some((8, 3))],
    [None, Some((32, 30)), Some((16, 16))],
    [Some((16, 0)), None, None],
    [None, None, None],
];

const FACTORS: [f32; 2] = [0.5, 2.0];

/// Columns before and after a matrix, such that rows stay at multiples of 16 bytes.
const MARGINS: [(usize, usize); 3] = [(0, 0), (8, 16), (16, 8)];

/// Sums of exact products in f32, in another order than the reference's.
const SUMS: f32 = 2e-5;

/// Operands and results of one call, in wider matrices of "not a number".
struct Case {
    device: Device,
    shape: (usize, usize),
    ranks: [Ranks; 3],
    /// Gate, then up.
    both: Padded,
    /// `dy`, then the gradient of the low-rank product.
    dy: Padded,
    a: Padded,
    /// Of gate and of up.
    lows: [Padded; 2],
    /// Of A, of gate's and of up's B; one row or column where there is no gradient.
    grads: [Padded; 3],
}

impl Case {
    fn new(device: &Device, shape: (usize, usize), ranks: [Ranks; 3], margins: (usize, usize), dtype: DType) -> Self {
        let (rows, cols) = shape;
        let counts = ranks.map(|ranks| ranks.unwrap_or((0, 0)));
        let padded = |name: &str, shape: (usize, usize), dtype| {
            Padded::new(device, &random(name, shape.0 * shape.1), shape, margins, dtype)
        };
        let mut gates = random("gate and up", rows * 2 * cols);
        for (i, value) in gates.iter_mut().enumerate() {
            // Some gates are where the exponential leaves the range of f32.
            match i % 61 {
                13 if i % (2 * cols) < cols => *value = 100.0,
                29 if i % (2 * cols) < cols => *value = -100.0,
                _ => *value *= 1.5,
            }
        }
        let grad = |name: &str, shape: (usize, usize)| {
            Padded::new(device, &random(name, shape.0 * shape.1), shape, (1, 2), DType::F32)
        };
        Self {
            device: device.clone(),
            shape,
            ranks,
            both: Padded::new(device, &gates, (rows, 2 * cols), margins, dtype),
            dy: padded("dy", (rows, cols + counts[0].0), dtype),
            a: padded("a", (counts[0].0.max(1), cols), dtype),
            lows: [1, 2].map(|i| padded(["", "low of gate", "low of up"][i], (rows, counts[i].0.max(8)), dtype)),
            grads: [
                grad("grad a", (counts[0].1.max(1), cols)),
                grad("grad b of gate", (cols, counts[1].1.max(1))),
                grad("grad b of up", (cols, counts[2].1.max(1))),
            ],
        }
    }

    fn adapters(&self) -> MlpAdapters<'_> {
        let out = |i: usize| {
            let grad_b = self.grads[i].matrix();
            self.ranks[i].map(|_| OutAdapter { low: self.lows[i - 1].matrix(), grad_b, factor: FACTORS[i - 1] })
        };
        let down = self.ranks[0].map(|(ranks, own)| DownAdapter {
            d_low: self.dy.matrix().columns(self.shape.1, ranks),
            a: self.a.matrix(),
            grad_a: (own > 0).then(|| self.grads[0].matrix()),
        });
        MlpAdapters { down, gate: out(1), up: out(2) }
    }

    /// Writes `d_gate` and `d_up` beside each other.
    fn run(&self, to: Matrix) {
        let ((rows, cols), both, adapters) = (self.shape, self.both.matrix(), self.adapters());
        let [(d_gate, d_up), (gate, up)] = [to, both].map(|m| (m.columns(0, cols), m.columns(cols, cols)));
        let dy = self.dy.matrix().columns(0, cols);
        assert!(swiglu_adapters_fit(&self.device, &d_gate, &d_up, &dy, &gate, &up, &adapters));
        let count = swiglu_backward_adapters_workspace(rows, cols, adapters.most_ranks());
        let workspace = Tensor::full(f32::NAN, count, &self.device).unwrap();
        let workspace = array(&workspace).unwrap();
        swiglu_backward_adapters(&self.device, d_gate, d_up, dy, gate, up, adapters, workspace).unwrap();
    }

    /// `[y, d_gate, d_up]`, not yet rounded.
    fn reference(&self) -> [Vec<f32>; 3] {
        let (rows, cols) = self.shape;
        let ranks = self.ranks[0].map_or(0, |(ranks, _)| ranks);
        let mut results = [(); 3].map(|()| Vec::with_capacity(rows * cols));
        for (both, dy) in self.both.values.chunks_exact(2 * cols).zip(self.dy.values.chunks_exact(cols + ranks)) {
            for col in 0..cols {
                let share = (0..ranks).map(|k| f64::from(dy[cols + k]) * f64::from(self.a.values[k * cols + col]));
                let d = f64::from(dy[col]) + share.sum::<f64>();
                let (gate, up) = (f64::from(both[col]), f64::from(both[cols + col]));
                let s = 1.0 / (1.0 + (-gate).exp());
                let values = [gate * s * up, d * up * s * (1.0 + gate * (1.0 - s)), d * gate * s];
                results.iter_mut().zip(values).for_each(|(to, value)| to.push(value as f32));
            }
        }
        results
    }

    /// The gradients before, `[own ranks, I]` or `[I, own ranks]`, plus the sums over rows of `x` with the ranks.
    fn gradient(&self, part: usize, x: &[f32]) -> Vec<f32> {
        let (rows, cols) = self.shape;
        let (ranks, own) = self.ranks[part].unwrap();
        let (low, width, first) = match part {
            0 => (&self.dy.values, cols + ranks, cols),
            _ => (&self.lows[part - 1].values, ranks, 0),
        };
        let factor = if part == 0 { 1.0 } else { f64::from(FACTORS[part - 1]) };
        let mut sums = vec![0f64; cols * own];
        for row in 0..rows {
            for col in 0..cols {
                for k in 0..own {
                    let place = if part == 0 { k * cols + col } else { col * own + k };
                    sums[place] += f64::from(x[row * cols + col]) * f64::from(low[row * width + first + k]);
                }
            }
        }
        let before = self.grads[part].values.iter();
        before.zip(sums).map(|(&before, sum)| (f64::from(before) + factor * sum) as f32).collect()
    }
}

/// The two halves of the columns.
fn halves(values: &[f32], cols: usize) -> [Vec<f32>; 2] {
    [0, cols].map(|first| values.chunks_exact(2 * cols).flat_map(|row| row[first..first + cols].to_vec()).collect())
}

#[test]
#[ignore = "gpu"]
fn gradients_of_all_types_shapes_and_ranks() {
    let device = device();
    for dtype in TYPES {
        for shape @ (rows, cols) in SHAPES {
            for (ranks, margins) in RANKS.into_iter().zip(MARGINS.into_iter().cycle()) {
                let what = format!("{dtype:?} [{rows}, {cols}] {ranks:?} {margins:?}");
                let case = Case::new(&device, shape, ranks, margins, dtype);
                let results = Padded::poisoned(&device, (rows, 2 * cols), margins, dtype);
                case.run(results.matrix());
                let [y, want_gate, want_up] = case.reference();
                let [d_gate, d_up] = halves(&results.read(), cols);
                assert_close(&format!("d_gate {what}"), &d_gate, &want_gate, tolerance(dtype));
                assert_close(&format!("d_up {what}"), &d_up, &want_up, tolerance(dtype));
                // The sums are those of the rounded values; `y` may have been rounded to a neighbour here.
                let x = [rounded(&device, &y, dtype), d_gate, d_up];
                for (part, x) in x.iter().enumerate() {
                    let name = ["grad_a", "grad_b of gate", "grad_b of up"][part];
                    match ranks[part] {
                        Some((_, own)) if own > 0 => {
                            let tolerance = if part == 0 { tolerance(dtype) } else { SUMS };
                            let want = case.gradient(part, x);
                            assert_close(&format!("{name} {what}"), &case.grads[part].read(), &want, tolerance);
                        }
                        _ => assert_eq!(case.grads[part].read(), case.grads[part].values, "{name} {what}"),
                    }
                }
                // Again, in the place of gate and up.
                let again = Case::new(&device, shape, ranks, margins, dtype);
                again.run(again.both.matrix());
                assert_eq!(again.both.read(), results.read(), "{what}");
                for (again, grad) in again.grads.iter().zip(&case.grads) {
                    assert_eq!(again.read(), grad.read(), "{what}");
                }
                assert_eq!(again.dy.read(), case.dy.values, "{what}");
            }
        }
    }
}

#[test]
#[ignore = "gpu"]
fn operands_that_do_not_fit_are_refused() {
    let device = device();
    let fits = |cols: usize, stride: usize, ranks: usize, dtype: DType| {
        let wide = Tensor::zeros((4, stride), dtype, &device).unwrap();
        let (low, a) = (Tensor::zeros((4, ranks), dtype, &device), Tensor::zeros((ranks, cols), dtype, &device));
        let (low, a) = (low.unwrap(), a.unwrap());
        let [m, d_low, a] = [&wide, &low, &a].map(|tensor| matrix(tensor).unwrap());
        let m = m.columns(0, cols);
        let adapters = MlpAdapters { down: Some(DownAdapter { d_low, a, grad_a: None }), ..MlpAdapters::default() };
        let fits = swiglu_adapters_fit(&device, &m, &m, &m, &m, &m, &adapters);
        let count = swiglu_backward_adapters_workspace(4, cols, ranks);
        let workspace = empty(&device, count, DType::F32).unwrap();
        let workspace = array(&workspace).unwrap();
        let result = swiglu_backward_adapters(&device, m, m, m, m, m, adapters, workspace);
        assert_eq!(result.is_ok(), fits, "{cols} of {stride} columns, rank {ranks}, {dtype:?}");
        fits
    };
    assert!(fits(16, 16, 8, DType::F16));
    assert!(fits(16, 24, 32, DType::F16));
    assert!(!fits(16, 16, 8, DType::F32));
    assert!(!fits(12, 16, 8, DType::F16));
    assert!(!fits(16, 20, 8, DType::F16));
    assert!(!fits(16, 16, 12, DType::F16));
    assert!(!fits(16, 16, 40, DType::F16));
}

#[test]
#[ignore = "gpu"]
fn bench_swiglu_adapters() {
    let device = device();
    let (rows, cols) = (8192, 18_944);
    for ranks in [8, 16, 32] {
        let tensor = |shape: (usize, usize), dtype| {
            let tensor = empty(&device, shape, dtype).unwrap();
            fill(&device, matrix(&tensor).unwrap(), 0.5).unwrap();
            tensor
        };
        let (both, wide) = (tensor((rows, 2 * cols), DType::BF16), tensor((rows, cols + ranks), DType::BF16));
        let (a, low) = (tensor((ranks, cols), DType::BF16), tensor((rows, ranks), DType::BF16));
        let (grad_a, grad_b) = (tensor((ranks, cols), DType::F32), tensor((cols, ranks), DType::F32));
        let [both, wide, a, low, grad_a, grad_b] =
            [&both, &wide, &a, &low, &grad_a, &grad_b].map(|tensor| matrix(tensor).unwrap());
        let (gate, up, dy) = (both.columns(0, cols), both.columns(cols, cols), wide.columns(0, cols));
        let out = Some(OutAdapter { low, grad_b, factor: 1.0 });
        let down = Some(DownAdapter { d_low: wide.columns(cols, ranks), a, grad_a: Some(grad_a) });
        let count = swiglu_backward_adapters_workspace(rows, cols, ranks);
        let workspace = empty(&device, count, DType::F32).unwrap();
        let workspace = array(&workspace).unwrap();
        let bytes = 5 * rows * cols * 2;
        for (what, adapters) in [
            ("all", MlpAdapters { down, gate: out, up: out }),
            ("down", MlpAdapters { down, ..MlpAdapters::default() }),
        ] {
            print_bandwidth(&device, &format!("backward, rank {ranks}, {what} [{rows}, {cols}]"), bytes, || {
                swiglu_backward_adapters(&device, gate, up, dy, gate, up, adapters, workspace).unwrap();
            });
        }
        print_bandwidth(&device, &format!("without gradients of rank {ranks} [{rows}, {cols}]"), bytes, || {
            let share = down.map(|down| (down.d_low, down.a));
            swiglu_backward(&device, gate, up, dy, gate, up, None, share).unwrap();
        });
    }
}
