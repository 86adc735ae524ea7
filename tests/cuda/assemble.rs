//! Matrices put together from parts against plain loops.

use candle_core::{DType, Device};
use trainer::device::{Matrix, empty, matrix};
use trainer::kernels::cuda::{Part, assemble, axpby, fill};

use crate::padded::{MARGINS, Padded, TYPES, print_bandwidth, rounded};
use crate::support::{device, random};

/// First row, first column, rows, columns.
type Place = (usize, usize, usize, usize);

const FACTORS: [f64; 3] = [1.0, 2.0, 0.3];

/// Random parts at places of a matrix of `shape`, and the whole as it should be.
struct Case {
    sources: Vec<Padded>,
    want: Vec<f32>,
}

impl Case {
    fn new(
        device: &Device,
        shape: (usize, usize),
        places: &[Place],
        margins: (usize, usize),
        (to, from): (DType, DType),
    ) -> Self {
        let mut whole = vec![0.0; shape.0 * shape.1];
        let mut sources = vec![];
        for (index, &(first_row, first_col, rows, cols)) in places.iter().enumerate() {
            let values = random(&format!("part {index}"), rows * cols);
            let source = Padded::new(device, &values, (rows, cols), margins, from);
            for (row, values) in source.values.chunks_exact(cols).enumerate() {
                let start = (first_row + row) * shape.1 + first_col;
                let scaled = values.iter().map(|v| v * FACTORS[index % 3] as f32);
                whole[start..start + cols].iter_mut().zip(scaled).for_each(|(to, v)| *to = v);
            }
            sources.push(source);
        }
        Self { sources, want: rounded(device, &whole, to) }
    }

    fn parts(&self, places: &[Place]) -> Vec<Part<'_>> {
        let parts = places.iter().zip(&self.sources).enumerate();
        parts
            .map(|(index, (&(rows, cols, ..), source))| Part {
                rows,
                cols,
                source: source.matrix(),
                factor: FACTORS[index % 3],
            })
            .collect()
    }
}

#[test]
#[ignore = "gpu"]
fn parts_of_all_types_at_all_places() {
    let device = device();
    let cases: [((usize, usize), &[Place]); 9] = [
        // Blocks on the diagonal, their columns multiples of 8, of 4, odd; rows below them.
        ((600, 48), &[(0, 0, 300, 16), (300, 16, 100, 16), (400, 32, 130, 16)]),
        ((70, 16), &[(0, 0, 30, 4), (30, 4, 20, 4), (50, 8, 20, 4)]),
        ((9, 21), &[(0, 1, 3, 7), (2, 8, 5, 5), (8, 20, 1, 1)]),
        // One below the other, rows left over.
        ((24, 1000), &[(0, 0, 8, 1000), (8, 0, 12, 1000)]),
        // A row, with gaps and without.
        ((1, 4608), &[(0, 0, 1, 3584), (0, 4096, 1, 512)]),
        ((1, 20_003), &[(0, 0, 1, 7), (0, 7, 1, 19_996)]),
        // As many parts as there may be; one over another.
        ((8, 64), &[0, 1, 2, 3, 4, 5, 6, 7].map(|i| (i, i * 8, 1, 8))),
        ((16, 16), &[(0, 0, 16, 16), (4, 3, 8, 8)]),
        ((5, 9), &[]),
    ];
    for to in TYPES {
        for from in TYPES {
            for (shape, places) in cases {
                for margins in MARGINS {
                    let case = Case::new(&device, shape, places, margins, (to, from));
                    for out_margins in MARGINS {
                        let out = Padded::poisoned(&device, shape, out_margins, to);
                        assemble(&device, out.matrix(), &case.parts(places)).unwrap();
                        assert_eq!(out.read(), case.want, "{from:?} to {to:?} {shape:?} {margins:?} {out_margins:?}");
                    }
                }
            }
        }
    }
}

#[test]
#[ignore = "gpu"]
fn parts_that_do_not_fit_are_named_and_nothing_is_done_with_nothing() {
    let device = device();
    let tensors = [(4, 8), (2, 8)].map(|shape: (usize, usize)| empty(&device, shape, DType::F16).unwrap());
    let [out, source] = [0, 1].map(|i| matrix(&tensors[i]).unwrap());
    let part = |rows, cols, source| Part { rows, cols, source, factor: 1.0 };
    let run = |parts: &[Part]| assemble(&device, out, parts).unwrap_err().to_string();
    assert!(run(&[part(3, 0, source)]).contains("[3 + 2, 0 + 8]"));
    assert!(run(&[part(0, 1, source)]).contains("[0 + 2, 1 + 8]"));
    assert!(run(&[part(0, 0, source); 9]).contains("at most 8 parts"));
    assemble(&device, out, &[part(4, 0, source.rows(0, 0)), part(0, 8, source.columns(0, 0))]).unwrap();
    assemble(&device, out.rows(0, 0), &[]).unwrap();
    assemble(&device, out.columns(0, 0), &[]).unwrap();
}

#[test]
#[ignore = "gpu"]
fn bench_assemble() {
    let device = device();
    // The scaled B's of gate and up and of q, k and v, the A's of q, k and v, their biases.
    let cases: [(&str, (usize, usize), &[Place]); 4] = [
        ("B of gate and up", (37_888, 32), &[(0, 0, 18_944, 16), (18_944, 16, 18_944, 16)]),
        ("B of q, k and v", (4608, 48), &[(0, 0, 3584, 16), (3584, 16, 512, 16), (4096, 32, 512, 16)]),
        ("A of q, k and v", (48, 3584), &[(0, 0, 16, 3584), (16, 0, 16, 3584), (32, 0, 16, 3584)]),
        ("bias of q, k and v", (1, 4608), &[(0, 0, 1, 3584), (0, 3584, 1, 512), (0, 4096, 1, 512)]),
    ];
    for (what, (rows, cols), places) in cases {
        // Columns of the weight's buffer, where they stand behind it.
        let room = if rows == 1 || rows == 48 { 0 } else { 3584 };
        let wide = empty(&device, (rows, room + cols), DType::BF16).unwrap();
        let out = matrix(&wide).unwrap().columns(room, cols);
        let tensors: Vec<_> =
            places.iter().map(|&(.., rows, cols)| empty(&device, (rows, cols), DType::F32).unwrap()).collect();
        let sources: Vec<Matrix> = tensors.iter().map(|tensor| matrix(tensor).unwrap()).collect();
        for source in &sources {
            fill(&device, *source, 0.5).unwrap();
        }
        let parts: Vec<Part> = places
            .iter()
            .zip(&sources)
            .map(|(&(rows, cols, ..), &source)| Part { rows, cols, source, factor: 2.0 })
            .collect();
        let bytes = 2 * rows * cols + sources.iter().map(|s| 4 * s.shape().0 * s.shape().1).sum::<usize>();
        print_bandwidth(&device, &format!("{what} [{rows}, {cols}]"), bytes, || {
            assemble(&device, out, &parts).unwrap();
        });
        print_bandwidth(&device, &format!("{what} one by one"), bytes, || {
            fill(&device, out, 0.0).unwrap();
            for part in &parts {
                let to = out.rows(part.rows, part.source.shape().0).columns(part.cols, part.source.shape().1);
                axpby(&device, to, 2.0, part.source, 0.0).unwrap();
            }
        });
    }
}
