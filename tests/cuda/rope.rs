//! Rotations against plain loops in f64.

use candle_core::{DType, Device, Tensor};
use trainer::device::{array, empty, matrix, upload_f32, upload_u32};
use trainer::kernels::cuda::{fill, rope, rope_table};

use crate::padded::{MARGINS, Padded, TYPES, print_bandwidth, tolerance};
use crate::support::{assert_close, device, download, random, upload};

fn frequencies(d: usize) -> Vec<f32> {
    (0..d / 2).map(|i| 1e6f64.powf(-2.0 * i as f64 / d as f64) as f32).collect()
}

/// Small, repeated and large positions.
fn positions(rows: usize) -> Vec<u32> {
    (0..rows as u32).map(|i| if i % 3 == 2 { 131_071 - i } else { i / 2 }).collect()
}

fn made_table(device: &Device, positions: &[u32], frequencies: &[f32], scale: f32) -> Tensor {
    let length = positions.len() * frequencies.len() * 2;
    let table = upload(device, &vec![f32::NAN; length], length, DType::F32);
    let positions = upload_u32(device, positions).unwrap();
    let frequencies = upload_f32(device, frequencies).unwrap();
    let (positions, frequencies) = (array(&positions).unwrap(), array(&frequencies).unwrap());
    rope_table(device, array(&table).unwrap(), positions, frequencies, scale).unwrap();
    table
}

fn wanted_table(positions: &[u32], frequencies: &[f32], scale: f32) -> Vec<f64> {
    let angles = positions.iter().flat_map(|&p| frequencies.iter().map(move |&f| f64::from(p as f32 * f)));
    angles.flat_map(|a| [a.cos() * f64::from(scale), a.sin() * f64::from(scale)]).collect()
}

fn turned(x: &[f32], table: &[f64], heads: usize, d: usize, sign: f64) -> Vec<f32> {
    let half = d / 2;
    let mut out = Vec::with_capacity(x.len());
    for (row, x) in x.chunks_exact(heads * d).enumerate() {
        let turns = &table[row * d..(row + 1) * d];
        for x in x.chunks_exact(d) {
            let pair = |i: usize| (f64::from(x[i]), f64::from(x[i + half]), turns[2 * i], sign * turns[2 * i + 1]);
            out.extend((0..half).map(pair).map(|(a, b, c, s)| (a * c - b * s) as f32));
            out.extend((0..half).map(pair).map(|(a, b, c, s)| (b * c + a * s) as f32));
        }
    }
    out
}

#[test]
#[ignore = "gpu"]
fn the_table_is_exact_for_large_positions() {
    let device = device();
    for (d, scale) in [(128, 1.0), (64, 0.7), (6, 1.0)] {
        let (positions, frequencies) = (positions(50), frequencies(d));
        let got = download(&made_table(&device, &positions, &frequencies, scale));
        let want: Vec<f32> = wanted_table(&positions, &frequencies, scale).iter().map(|&v| v as f32).collect();
        assert_close(&format!("{d}"), &got, &want, 2e-7);
    }
}

#[test]
#[ignore = "gpu"]
fn rotations_of_all_types_shapes_and_strides_and_back() {
    let device = device();
    for dtype in TYPES {
        for (rows, heads, d) in
            [(5, 1, 128), (3, 14, 64), (7, 9, 128), (4, 5, 256), (33, 2, 16), (6, 3, 6), (2, 70, 128)]
        {
            for margins in MARGINS {
                let what = format!("{dtype:?} {rows} {heads} {d} {margins:?}");
                let (positions, frequencies) = (positions(rows), frequencies(d));
                let table = made_table(&device, &positions, &frequencies, 1.0);
                let wanted = wanted_table(&positions, &frequencies, 1.0);
                for (is_backward, sign) in [(false, 1.0), (true, -1.0)] {
                    let values = random("x", rows * heads * d);
                    let x = Padded::new(&device, &values, (rows, heads * d), margins, dtype);
                    let want = turned(&x.values, &wanted, heads, d, sign);
                    rope(&device, x.matrix(), array(&table).unwrap(), heads, d, is_backward).unwrap();
                    assert_close(&what, &x.read(), &want, tolerance(dtype));
                    rope(&device, x.matrix(), array(&table).unwrap(), heads, d, !is_backward).unwrap();
                    assert_close(&format!("back {what}"), &x.read(), &x.values, 2.0 * tolerance(dtype));
                }
            }
        }
    }
}

#[test]
#[ignore = "gpu"]
fn bench_rope() {
    let device = device();
    for (rows, heads, d) in [(8192, 32, 128), (8192, 40, 128), (8192, 16, 64)] {
        let x = empty(&device, (rows, heads * d), DType::BF16).unwrap();
        let x = matrix(&x).unwrap();
        fill(&device, x, 0.5).unwrap();
        let table = made_table(&device, &positions(rows), &frequencies(d), 1.0);
        let table = array(&table).unwrap();
        let bytes = rows * heads * d * 4 + rows * d * 4;
        print_bandwidth(&device, &format!("rope [{rows}, {heads} x {d}]"), bytes, || {
            rope(&device, x, table, heads, d, false).unwrap();
        });
    }
}
