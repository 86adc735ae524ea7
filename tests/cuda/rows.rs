//! Picked rows and their sums against plain loops.

use candle_core::{DType, Device, Tensor};
use trainer::device::{Matrix, array, empty, matrix, upload_u32};
use trainer::kernels::cuda::{RowGroups, fill, gather_rows, group_rows, sum_rows};
use trainer::rng::Stream;

use crate::padded::{MARGINS, Padded, TYPES, print_bandwidth, rounded, tolerance};
use crate::support::{assert_close, device, random};

/// `count` rows below `rows`, many of them more than once.
fn picks(count: usize, rows: usize) -> Vec<u32> {
    let mut stream = Stream::new(23, "picked rows", count as u64, rows as u64);
    (0..count).map(|i| if i % 3 == 0 { rows as u32 - 1 } else { stream.below(rows as u64) as u32 }).collect()
}

#[test]
#[ignore = "gpu"]
fn picked_rows_of_all_types_shapes_and_strides() {
    let device = device();
    for to in TYPES {
        for from in TYPES {
            for (count, rows, cols) in [(9, 40, 896), (50, 3, 100), (3, 7, 24), (70, 1, 7), (1, 5, 1), (2, 2, 5000)] {
                for margins in MARGINS {
                    let what = format!("{from:?} to {to:?} {count} of {rows} {cols} {margins:?}");
                    let table = Padded::new(&device, &random("table", rows * cols), (rows, cols), margins, from);
                    let y = Padded::poisoned(&device, (count, cols), margins, to);
                    let picks = picks(count, rows);
                    let on_device = upload_u32(&device, &picks).unwrap();
                    gather_rows(&device, y.matrix(), table.matrix(), array(&on_device).unwrap()).unwrap();
                    let picked = |&row: &u32| table.values[row as usize * cols..][..cols].to_vec();
                    let want: Vec<f32> = picks.iter().flat_map(picked).collect();
                    assert_eq!(y.read(), rounded(&device, &want, to), "{what}");
                }
            }
        }
    }
}

#[test]
#[ignore = "gpu"]
fn a_row_outside_of_the_table_is_no_number() {
    let device = device();
    for margins in MARGINS {
        let table = Padded::new(&device, &[1.0; 4 * 16], (4, 16), margins, DType::F16);
        let y = Padded::new(&device, &[0.0; 3 * 16], (3, 16), margins, DType::F32);
        let picks = upload_u32(&device, &[3, 4, u32::MAX]).unwrap();
        gather_rows(&device, y.matrix(), table.matrix(), array(&picks).unwrap()).unwrap();
        let got = y.read();
        assert!(got[..16].iter().all(|&v| v == 1.0) && got[16..].iter().all(|v| v.is_nan()));
    }
}

fn sum(device: &Device, grad: Matrix, dy: Matrix, groups: &RowGroups, is_added: bool) {
    let arrays = [&groups.targets, &groups.offsets, &groups.sources].map(|values| upload_u32(device, values).unwrap());
    let [targets, offsets, sources] = [0, 1, 2].map(|i| array(&arrays[i]).unwrap());
    sum_rows(device, grad, dy, targets, offsets, sources, is_added).unwrap();
}

#[test]
#[ignore = "gpu"]
fn sums_of_rows_of_all_types_shapes_and_strides() {
    let device = device();
    for to in TYPES {
        for from in TYPES {
            for (count, rows, cols) in [(90, 40, 896), (50, 3, 100), (3, 700, 24), (70, 1, 7), (1, 5, 1), (40, 2, 5000)]
            {
                for margins in MARGINS {
                    let what = format!("{from:?} to {to:?} {count} into {rows} {cols} {margins:?}");
                    let dy = Padded::new(&device, &random("dy", count * cols), (count, cols), margins, from);
                    let picks = picks(count, rows);
                    let mut sums = vec![0.0f64; rows * cols];
                    for (&row, dy) in picks.iter().zip(dy.values.chunks_exact(cols)) {
                        let sum = &mut sums[row as usize * cols..][..cols];
                        sum.iter_mut().zip(dy).for_each(|(sum, &v)| *sum += f64::from(v));
                    }
                    let groups = group_rows(&picks);
                    let grad = Padded::new(&device, &random("grad", rows * cols), (rows, cols), margins, to);
                    let want: Vec<f32> =
                        grad.values.iter().zip(&sums).map(|(g, s)| (f64::from(*g) + s) as f32).collect();
                    sum(&device, grad.matrix(), dy.matrix(), &groups, true);
                    assert_close(&what, &grad.read(), &want, tolerance(to));
                    // Put in the place of what was there, where there is a target; the rest is left.
                    let grad = Padded::poisoned(&device, (rows, cols), margins, to);
                    sum(&device, grad.matrix(), dy.matrix(), &groups, false);
                    let got = grad.read();
                    let is_target = |i: usize| groups.targets.binary_search(&((i / cols) as u32)).is_ok();
                    assert!((0..got.len()).all(|i| is_target(i) != got[i].is_nan()), "{what}");
                    let of_targets = |i: &usize| is_target(*i);
                    let got: Vec<f32> = (0..got.len()).filter(of_targets).map(|i| got[i]).collect();
                    let want: Vec<f32> = (0..sums.len()).filter(of_targets).map(|i| sums[i] as f32).collect();
                    assert_close(&what, &got, &want, tolerance(to));
                }
            }
        }
    }
}

#[test]
#[ignore = "gpu"]
fn no_rows_and_targets_outside_change_nothing() {
    let device = device();
    let grad = Padded::new(&device, &[2.0; 32], (4, 8), (0, 0), DType::F32);
    let dy = Padded::new(&device, &[1.0; 16], (2, 8), (0, 0), DType::F32);
    sum(&device, grad.matrix(), dy.matrix(), &group_rows(&[]), false);
    sum(&device, grad.matrix(), dy.matrix(), &group_rows(&[4, 9]), false);
    assert_eq!(grad.read(), [2.0; 32]);
    let none = Tensor::zeros(0, DType::U32, &device).unwrap();
    gather_rows(&device, grad.matrix().rows(0, 0), dy.matrix(), array(&none).unwrap()).unwrap();
    assert_eq!(grad.read(), [2.0; 32]);
}

#[test]
#[ignore = "gpu"]
fn bench_rows() {
    let device = device();
    for (count, rows, cols) in [(8192, 151_936, 896), (8192, 151_936, 3584)] {
        let table = empty(&device, (rows, cols), DType::BF16).unwrap();
        let grad = empty(&device, (rows, cols), DType::F32).unwrap();
        let y = empty(&device, (count, cols), DType::BF16).unwrap();
        let [table, grad, y] = [&table, &grad, &y].map(|tensor| matrix(tensor).unwrap());
        for m in [table, grad, y] {
            fill(&device, m, 0.0).unwrap();
        }
        let mut stream = Stream::new(29, "picked rows", 0, 0);
        let picks: Vec<u32> = (0..count).map(|_| stream.below(rows as u64) as u32).collect();
        let groups = group_rows(&picks);
        let on_device =
            [&picks, &groups.targets, &groups.offsets, &groups.sources].map(|v| upload_u32(&device, v).unwrap());
        let [picks, targets, offsets, sources] = [0, 1, 2, 3].map(|i| array(&on_device[i]).unwrap());
        print_bandwidth(&device, &format!("gather_rows [{count}, {cols}]"), 4 * count * cols, || {
            gather_rows(&device, y, table, picks).unwrap();
        });
        let bytes = 2 * count * cols + 8 * groups.targets.len() * cols;
        print_bandwidth(&device, &format!("sum_rows [{count}, {cols}]"), bytes, || {
            sum_rows(&device, grad, y, targets, offsets, sources, true).unwrap();
        });
    }
}
