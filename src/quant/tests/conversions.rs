//! Dequantisation, lookup, checkpoint parts, and what is refused.

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;

use super::super::multiply::RowSource;
use super::{GGUF_KINDS, bits, four_bit, gguf, half_offsets, normals, random_blocks};
use crate::config::settings::QuantType;
use crate::fs::Bytes;
use crate::kernels::cpu::codebook::{self, Codebook};
use crate::kernels::cpu::{BlockFormat, Level, blocks};
use crate::quant::{Error, GgufMatrix, Nf4Matrix, Weight};

fn values_of(weight: &Weight) -> Vec<f32> {
    weight.dequantize().unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn every_gguf_type_dequantizes_as_candle_does() {
    for kind in GGUF_KINDS {
        let (rows, cols) = (5, 512);
        let storage = QStorage::from_data(random_blocks(kind, rows, cols).into(), &Device::Cpu, kind).unwrap();
        let reference = QTensor::new(storage, (rows, cols)).unwrap().dequantize(&Device::Cpu).unwrap();
        let reference: Vec<f32> = reference.flatten_all().unwrap().to_vec1().unwrap();
        assert!(half_offsets(kind).is_empty() || reference.iter().any(|v| *v != 0.0));
        let ours = values_of(&Weight::Gguf(gguf(kind, rows, cols)));
        assert_eq!(bits(&ours), bits(&reference), "{kind:?}");
    }
}

#[test]
fn every_level_dequantizes_to_the_same_bits() {
    for (kind, format) in GGUF_KINDS.into_iter().zip(BlockFormat::ALL) {
        let bytes = random_blocks(kind, 3, 512);
        let at = |level| {
            let mut out = vec![0f32; 3 * 512];
            blocks::dequantize(level, format, &bytes, &mut out);
            bits(&out)
        };
        for level in Level::available() {
            assert_eq!(at(level), at(Level::Portable), "{kind:?} at {level:?}");
        }
    }
    let book = Codebook::new(std::array::from_fn(|i| i as f32 - 7.5));
    let values = normals("levels", 1000);
    let quantized = |level| {
        let (mut packed, mut absmax) = (vec![0u8; 500], vec![0f32; 16]);
        codebook::quantize(level, &book, &values, &mut packed, &mut absmax);
        (packed, absmax)
    };
    let (packed, absmax) = quantized(Level::Portable);
    for level in Level::available() {
        assert_eq!(quantized(level), (packed.clone(), absmax.clone()), "{level:?}");
        for (start, length) in [(0, 1000), (64, 64), (3, 700), (129, 1), (999, 1), (5, 0)] {
            let mut out = vec![0f32; length];
            codebook::dequantize(level, &book.values, &packed, &absmax[start / 64..], start, &mut out);
            let expected = (start..start + length).map(|i| {
                let code = if i % 2 == 0 { packed[i / 2] >> 4 } else { packed[i / 2] & 15 };
                book.values[usize::from(code)] * absmax[i / 64]
            });
            assert_eq!(bits(&out), bits(&expected.collect::<Vec<_>>()), "{level:?}, {length} from {start}");
        }
    }
}

#[test]
fn pieces_of_rows_and_columns_are_those_of_the_whole() {
    let mut weights: Vec<Weight> = GGUF_KINDS.into_iter().map(|kind| Weight::Gguf(gguf(kind, 7, 512))).collect();
    for cols in [128, 100, 63] {
        weights.push(four_bit(QuantType::Nf4, true, 7, cols));
        weights.push(four_bit(QuantType::Fp4, false, 7, cols));
    }
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let values = Tensor::from_vec(normals("dense", 7 * 96), (7, 96), &Device::Cpu).unwrap();
        weights.push(Weight::dense(&values.to_dtype(dtype).unwrap()).unwrap());
    }
    for weight in &weights {
        let (name, whole, k) = (weight.kind_name(), values_of(weight), weight.cols());
        let mut rows = vec![0f32; 3 * k];
        weight.dequantize_rows_into(2..5, &mut rows).unwrap();
        assert_eq!(bits(&rows), bits(&whole[2 * k..5 * k]), "{name}");
        let gathered: Vec<Vec<f32>> = weight.gather_rows(&[6, 0, 6, 3]).unwrap().to_vec2().unwrap();
        for (row, id) in gathered.iter().zip([6, 0, 6, 3]) {
            assert_eq!(bits(row), bits(&whole[id * k..(id + 1) * k]), "{name}");
        }
        let source: &dyn RowSource = match weight {
            Weight::Nf4(matrix) => matrix,
            Weight::Gguf(matrix) => matrix,
            Weight::Dense(_) => continue,
            Weight::Device(_) => panic!("every weight here was made in host memory"),
        };
        let step = source.column_step();
        if k > step {
            let mut piece = vec![0f32; 2 * (k - step)];
            source.dequantize(4..6, step..k, &mut piece);
            for (piece, row) in piece.chunks(k - step).zip(4..) {
                assert_eq!(bits(piece), bits(&whole[row * k + step..(row + 1) * k]), "{name}");
            }
        }
    }
}

#[test]
fn sizes_and_names_are_reported() {
    let nf4 = four_bit(QuantType::Nf4, false, 128, 256);
    assert_eq!((nf4.rows(), nf4.cols(), nf4.kind_name().as_str()), (128, 256, "nf4"));
    assert_eq!(nf4.size_bytes(), 128 * 256 / 2 + 4 * 512);
    let double = four_bit(QuantType::Fp4, true, 128, 256);
    assert_eq!(double.kind_name(), "fp4 double quantised");
    assert_eq!(double.size_bytes(), 128 * 256 / 2 + 512 + 4 * 2 + 4 * 257);
    assert_eq!(Weight::Gguf(gguf(GgmlDType::Q5_0, 3, 64)).size_bytes(), 3 * 2 * 22);
}

#[test]
fn what_does_not_fit_is_refused_with_its_numbers() {
    let data = |length: usize| Bytes::from(vec![0u8; length]);
    let text = GgufMatrix::new(GgmlDType::Q4K, 3, 512, data(100)).unwrap_err().to_string();
    assert!(text.contains("[3, 512] takes 864 bytes, got 100"), "{text}");
    let text = GgufMatrix::new(GgmlDType::Q6K, 3, 896, data(100)).unwrap_err().to_string();
    assert!(text.contains("896 columns") && text.contains("multiple of 256"), "{text}");
    assert!(matches!(
        GgufMatrix::new(GgmlDType::Q8K, 1, 256, data(292)),
        Err(Error::UnsupportedType { kind: GgmlDType::Q8K })
    ));
    let weight = four_bit(QuantType::Nf4, false, 6, 64);
    let wide = Tensor::zeros((2, 65), DType::F32, &Device::Cpu).unwrap();
    let text = weight.forward(&wide).unwrap_err().to_string();
    assert_eq!(text, "forward: got shape [2, 65], expected [M, 64]");
    assert!(weight.backward_input(&wide).is_err());
    let numbers = Tensor::zeros((2, 64), DType::U8, &Device::Cpu).unwrap();
    assert!(matches!(weight.forward(&numbers), Err(Error::NotFloat { got: DType::U8, .. })));
    assert!(matches!(weight.gather_rows(&[5, 6]), Err(Error::RowOutOfRange { id: 6, rows: 6, .. })));
    assert!(weight.dequantize_rows_into(5..7, &mut [0.0; 128]).is_err());
    assert!(weight.dequantize_rows_into(0..1, &mut [0.0; 63]).is_err());
    assert!(weight.forward_slice(&[0.0; 64], 1, &mut [0.0; 7]).is_err());
    assert!(Weight::dense(&Tensor::zeros(5, DType::F32, &Device::Cpu).unwrap()).is_err());
}

#[test]
fn parts_of_a_checkpoint_are_checked_before_they_are_used() {
    let matrix = Nf4Matrix::quantize(&normals("parts", 10 * 50), 10, 50, QuantType::Nf4, true);
    let parts = matrix.to_bitsandbytes("float32");
    let read = parts.read().unwrap();
    assert_eq!(bits(&values_of(&Weight::Nf4(read))), bits(&values_of(&Weight::Nf4(matrix))));
    let short = Bytes::from(vec![0u8; 3]);
    let refused = |change: &dyn Fn(&mut crate::quant::BitsandbytesParts)| {
        let mut broken = parts.clone();
        change(&mut broken);
        broken.read().unwrap_err().to_string()
    };
    assert!(refused(&|p| p.weight = short.clone()).contains("`weight` has 3 bytes, its shape needs 250"));
    assert!(refused(&|p| p.absmax = short.clone()).contains("`absmax` has 3 bytes"));
    assert!(refused(&|p| p.quant_map = short.clone()).contains("`quant_map`"));
    assert!(refused(&|p| p.nested_absmax = Some(short.clone())).contains("`nested_absmax`"));
    assert!(refused(&|p| p.nested_quant_map = None).contains("`nested_quant_map` is missing"));
    assert!(refused(&|p| p.quant_state = short.clone()).contains("is not the JSON object expected"));
    let state = String::from_utf8(parts.quant_state.to_vec()).unwrap();
    let changed = |from: &str, to: &str| {
        assert!(state.contains(from), "{state}");
        let text = state.replace(from, to);
        refused(&|p| p.quant_state = Bytes::from(text.clone().into_bytes()))
    };
    assert!(changed("\"blocksize\":64", "\"blocksize\":128").contains("blocksize 128, expected 64"));
    assert!(changed("\"nested_blocksize\":256", "\"nested_blocksize\":64").contains("nested_blocksize"));
    assert!(changed("\"quant_type\":\"nf4\"", "\"quant_type\":\"int4\"").contains("`int4`"));
}

proptest! {
    #[test]
    fn a_quantized_value_is_the_nearest_of_its_block(
        rows in 1usize..6, cols in 1usize..150, seed in any::<u64>(), is_fp4 in any::<bool>(),
    ) {
        let mut stream = crate::rng::Stream::new(seed, "nearest", 0, 0);
        let values: Vec<f32> = (0..rows * cols).map(|_| stream.normal() as f32).collect();
        let kind = if is_fp4 { QuantType::Fp4 } else { QuantType::Nf4 };
        let matrix = Nf4Matrix::quantize(&values, rows, cols, kind, false);
        let absmax = matrix.absmax();
        let restored = values_of(&Weight::Nf4(matrix.clone()));
        for (i, (&value, &got)) in values.iter().zip(&restored).enumerate() {
            let largest = values[i / 64 * 64..values.len().min(i / 64 * 64 + 64)].iter().fold(0f32, |m, v| m.max(v.abs()));
            prop_assert_eq!(absmax[i / 64], largest);
            let best = matrix.values.iter().map(|c| (c * largest - value).abs()).fold(f32::MAX, f32::min);
            prop_assert!((got - value).abs() <= best * (1.0 + 1e-4) + 1e-6 * largest, "{} became {}", value, got);
        }
        let again = Nf4Matrix::quantize(&restored, rows, cols, kind, false);
        // FP4 has two codes for 0, so values are compared.
        prop_assert_eq!(bits(&values_of(&Weight::Nf4(again))), bits(&restored));
        let parts = matrix.to_bitsandbytes("bfloat16").read().unwrap();
        prop_assert_eq!(&**parts.packed(), &**matrix.packed());
        prop_assert_eq!(bits(&parts.absmax()), bits(&absmax));
    }
}

#[test]
fn weights_for_measuring_have_no_mean() {
    let matrix = Nf4Matrix::noise(512, 512, 1.0, 7);
    let values = Weight::Nf4(matrix).dequantize().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let mean = values.iter().sum::<f32>() / values.len() as f32;
    let deviation = (values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32).sqrt();
    assert!(mean.abs() < 0.01 && (1.0..1.6).contains(&deviation), "mean {mean}, deviation {deviation}");
}
