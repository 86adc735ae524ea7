//! `forward`, `backward_input` and the dense products against f64.

use candle_core::{DType, Device, Tensor};

use super::{GGUF_KINDS, bits, four_bit, gguf, normals};
use crate::config::settings::QuantType;
use crate::kernels::cpu::packed_dot::{self, PackedRows};
use crate::kernels::cpu::tile::{STRIP, multiply_strips, pack_strip};
use crate::kernels::cpu::{Activations, BlockFormat, Level, Operand, TileMut};
use crate::quant::{Weight, dense};

/// Rounding of an f32 sum, as a share of the sum of the products' sizes. Formats with a minimum round its share apart.
const ROUNDING: f64 = 2e-6;

/// All storages, with `cols` columns where the format allows it.
fn storages(rows: usize, cols: usize) -> Vec<Weight> {
    let mut weights = vec![
        four_bit(QuantType::Nf4, false, rows, cols),
        four_bit(QuantType::Nf4, true, rows, cols),
        four_bit(QuantType::Fp4, true, rows, cols),
    ];
    let values = Tensor::from_vec(normals("dense", rows * cols), (rows, cols), &Device::Cpu).unwrap();
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        weights.push(Weight::dense(&values.to_dtype(dtype).unwrap()).unwrap());
    }
    for kind in GGUF_KINDS {
        if cols.is_multiple_of(kind.block_size()) {
            weights.push(Weight::Gguf(gguf(kind, rows, cols)));
        }
    }
    weights
}

/// Asserts `got[m, n] = sum_i left(m, i) right(n, i)` up to rounding.
fn assert_products(
    what: &str,
    got: &[f32],
    (m, n, depth): (usize, usize, usize),
    left: impl Fn(usize, usize) -> f32,
    right: impl Fn(usize, usize) -> f32,
) {
    assert_eq!(got.len(), m * n, "{what}");
    for row in 0..m {
        for column in 0..n {
            let (mut sum, mut size) = (0f64, 0f64);
            for i in 0..depth {
                let product = f64::from(left(row, i)) * f64::from(right(column, i));
                sum += product;
                size += product.abs();
            }
            let error = (f64::from(got[row * n + column]) - sum).abs();
            assert!(error <= ROUNDING * size, "{what}: [{row}, {column}] is off by {error:e} of {size:e}");
        }
    }
}

fn check_both_products(weight: &Weight, m: usize) {
    let (n, k) = (weight.rows(), weight.cols());
    let what = format!("{} [{n}, {k}], {m} rows", weight.kind_name());
    let mut values = vec![0f32; n * k];
    weight.dequantize_rows_into(0..n, &mut values).unwrap();
    let x = normals("x", m * k);
    let mut y = vec![f32::NAN; m * n];
    weight.forward_slice(&x, m, &mut y).unwrap();
    assert_products(&what, &y, (m, n, k), |r, i| x[r * k + i], |c, i| values[c * k + i]);
    let dy = normals("dy", m * n);
    let mut dx = vec![f32::NAN; m * k];
    weight.backward_input_slice(&dy, m, &mut dx).unwrap();
    assert_products(&what, &dx, (m, k, n), |r, i| dy[r * n + i], |c, i| values[i * k + c]);
}

#[test]
fn products_of_every_storage_are_right_for_odd_shapes() {
    for (rows, cols) in [(1, 1), (5, 50), (37, 96), (131, 63), (33, 64), (7, 256), (259, 512)] {
        for weight in storages(rows, cols) {
            for m in [0, 1, 2, 3, 4, 5, 7, 8, 9, 17] {
                check_both_products(&weight, m);
            }
        }
    }
}

#[test]
fn long_rows_are_summed_in_pieces() {
    for weight in storages(19, 256 * 23) {
        for m in [1, 3, 4, 8] {
            check_both_products(&weight, m);
        }
    }
}

#[test]
fn every_level_multiplies_every_packed_format() {
    let (n, k) = (21, 256 * 5);
    for (kind, format) in GGUF_KINDS.into_iter().zip(BlockFormat::ALL) {
        let matrix = gguf(kind, n, k);
        let bytes = matrix.data().clone();
        let mut values = vec![0f32; n * k];
        Weight::Gguf(matrix).dequantize_rows_into(0..n, &mut values).unwrap();
        for level in Level::available() {
            let Some(order) = packed_dot::order_of_blocks(level, format, k) else { continue };
            for m in 1..=6 {
                let x = normals("level", m * k);
                let laid_out = Activations::ordered(level, order, packed_dot::has_minimum(format), &x, m, k);
                let mut y = vec![f32::NAN; m * n];
                packed_dot::dot(level, PackedRows::Blocks(format, &bytes), &laid_out, &mut TileMut::new(&mut y, m, n));
                let what = format!("{kind:?} at {level:?}");
                assert_products(&what, &y, (m, n, k), |r, i| x[r * k + i], |c, i| values[c * k + i]);
            }
        }
    }
    let weight = four_bit(QuantType::Nf4, false, n, k);
    let Weight::Nf4(matrix) = &weight else { unreachable!("made as such") };
    let mut values = vec![0f32; n * k];
    weight.dequantize_rows_into(0..n, &mut values).unwrap();
    for level in Level::available() {
        let Some(order) = packed_dot::order_of_codes(level, k) else { continue };
        for m in 1..=6 {
            let x = normals("level", m * k);
            let laid_out = Activations::ordered(level, order, false, &x, m, k);
            let rows = PackedRows::Codes { packed: matrix.packed(), absmax: &matrix.absmax(), values: &matrix.values };
            let mut y = vec![f32::NAN; m * n];
            packed_dot::dot(level, rows, &laid_out, &mut TileMut::new(&mut y, m, n));
            assert_products(&format!("nf4 at {level:?}"), &y, (m, n, k), |r, i| x[r * k + i], |c, i| values[c * k + i]);
        }
    }
}

#[test]
fn every_level_multiplies_packed_strips() {
    for (m, n, k) in [(1, 1, 1), (5, 16, 40), (13, 33, 7), (61, 47, 130)] {
        let (x, w) = (normals("x", m * k), normals("w", n * k));
        for level in Level::available() {
            let mut strips = vec![f32::NAN; n.next_multiple_of(STRIP) * k];
            for (rows, strip) in w.chunks(STRIP * k).zip(strips.chunks_mut(STRIP * k)) {
                pack_strip(level, rows, k, strip);
            }
            let mut y = vec![f32::NAN; m * n];
            let left = Operand::row_major(&x, k);
            multiply_strips(level, left, &strips, k, 0.0, &mut TileMut::new(&mut y, m, n));
            let what = format!("strips of {n} at {level:?}");
            assert_products(&what, &y, (m, n, k), |r, i| x[r * k + i], |c, i| w[c * k + i]);
            // Once more on top, less the first time.
            multiply_strips(level, left, &strips, k, -1.0, &mut TileMut::new(&mut y, m, n));
            assert!(y.iter().all(|v| v.abs() < 1e-4), "{what}: {y:?}");
        }
    }
}

#[test]
fn no_result_depends_on_the_number_of_threads() {
    let pools = [1, 2, 3, 5].map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap());
    for weight in storages(300, 1024) {
        for m in [1, 5, 8, 40] {
            let (x, dy) = (normals("x", m * 1024), normals("dy", m * 300));
            let run = || {
                let (mut y, mut dx, mut dw) = (vec![0f32; m * 300], vec![0f32; m * 1024], vec![1f32; 300 * 1024]);
                weight.forward_slice(&x, m, &mut y).unwrap();
                weight.backward_input_slice(&dy, m, &mut dx).unwrap();
                dense::accumulate_weight_grad(&dy, &x, m, 300, 1024, &mut dw).unwrap();
                (bits(&y), bits(&dx), bits(&dw))
            };
            let first = pools[0].install(run);
            for pool in &pools[1..] {
                assert!(
                    pool.install(run) == first,
                    "{} with {} threads",
                    weight.kind_name(),
                    pool.current_num_threads()
                );
            }
        }
    }
}

#[test]
fn a_row_of_a_small_batch_does_not_depend_on_the_other_rows() {
    for weight in storages(65, 768) {
        let x = normals("batch", 8 * 768);
        let mut together = vec![0f32; 8 * 65];
        weight.forward_slice(&x, 8, &mut together).unwrap();
        for m in 1..8 {
            let mut some = vec![0f32; m * 65];
            weight.forward_slice(&x[(8 - m) * 768..], m, &mut some).unwrap();
            assert_eq!(bits(&some), bits(&together[(8 - m) * 65..]), "{} with {m} rows", weight.kind_name());
        }
    }
}

#[test]
fn tensors_of_any_stride_and_float_type_are_taken() {
    let weight = four_bit(QuantType::Nf4, true, 24, 128);
    let wide = Tensor::from_vec(normals("wide", 128 * 22), (128, 22), &Device::Cpu).unwrap();
    let x = wide.t().unwrap().narrow(0, 3, 12).unwrap();
    assert!(!x.is_contiguous());
    let expected = weight.forward(&x.contiguous().unwrap()).unwrap();
    let got = weight.forward(&x).unwrap();
    assert_eq!(got.dims(), [12, 24]);
    let as_bits = |t: &Tensor| bits(&t.flatten_all().unwrap().to_vec1::<f32>().unwrap());
    assert_eq!(as_bits(&got), as_bits(&expected));
    let narrow = weight.forward(&x.to_dtype(DType::BF16).unwrap()).unwrap();
    assert_eq!(narrow.dtype(), DType::BF16);
    let dy = Tensor::from_vec(normals("dy", 24 * 12), (24, 12), &Device::Cpu).unwrap().t().unwrap();
    let got = weight.backward_input(&dy).unwrap();
    assert_eq!(as_bits(&got), as_bits(&weight.backward_input(&dy.contiguous().unwrap()).unwrap()));
    let strided = Weight::Dense(wide.narrow(1, 2, 16).unwrap());
    let copied = Weight::Dense(wide.narrow(1, 2, 16).unwrap().contiguous().unwrap());
    let x = Tensor::from_vec(normals("x", 16 * 10), (10, 16), &Device::Cpu).unwrap();
    assert_eq!(as_bits(&strided.forward(&x).unwrap()), as_bits(&copied.forward(&x).unwrap()));
}

#[test]
fn dense_products_are_right_for_adapter_and_odd_shapes() {
    for (m, n, k) in
        [(1, 1, 1), (3, 5, 7), (64, 16, 896), (70, 4, 33), (70, 896, 16), (257, 64, 130), (9, 300, 65), (33, 17, 0)]
    {
        let what = format!("dense {m} x {n} x {k}");
        let (x, w, dy) = (normals("x", m * k), normals("w", n * k), normals("dy", m * n));
        let mut y = vec![f32::NAN; m * n];
        dense::matmul_nt(&x, &w, m, n, k, &mut y).unwrap();
        assert_products(&what, &y, (m, n, k), |r, i| x[r * k + i], |c, i| w[c * k + i]);
        let mut dx = vec![f32::NAN; m * k];
        dense::matmul_nn(&dy, &w, m, n, k, &mut dx).unwrap();
        assert_products(&what, &dx, (m, k, n), |r, i| dy[r * n + i], |c, i| w[i * k + c]);
        let mut dw = vec![0f32; n * k];
        dense::accumulate_weight_grad(&dy, &x, m, n, k, &mut dw).unwrap();
        assert_products(&what, &dw, (n, k, m), |r, i| dy[i * n + r], |c, i| x[i * k + c]);
        // With a factor and the old value: three times the product less two of it.
        let once = y.clone();
        dense::accumulate_nt(&x, &w, m, n, k, 3.0, -2.0, &mut y).unwrap();
        for (y, once) in y.iter().zip(&once) {
            assert!((y - once).abs() <= 1e-4 * (1.0 + once.abs()) * (1.0 + k as f32).sqrt(), "{what}: {y} and {once}");
        }
        let once = dx.clone();
        dense::accumulate_nn(&dy, &w, m, n, k, 0.5, 0.5, &mut dx).unwrap();
        for (dx, once) in dx.iter().zip(&once) {
            assert!(
                (dx - once).abs() <= 1e-4 * (1.0 + once.abs()) * (1.0 + n as f32).sqrt(),
                "{what}: {dx} and {once}"
            );
        }
    }
    assert!(dense::matmul_nt(&[0.0; 6], &[0.0; 6], 2, 2, 3, &mut [0.0; 5]).is_err());
    assert!(dense::accumulate_weight_grad(&[0.0; 3], &[0.0; 6], 2, 2, 3, &mut [0.0; 6]).is_err());
}
