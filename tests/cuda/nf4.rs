//! 4-bit matrices: every bit as on the CPU, and how fast they are unpacked.

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use trainer::config::settings::{QuantType, Quantization, WeightDtype};
use trainer::device::{array, empty, matrix, synchronize, upload_f32, upload_u8};
use trainer::kernels::cuda::{Nf4Absmax, Nf4View, dequantize_nf4, quantize_maxima, quantize_nf4};
use trainer::model::config::TensorRole;
use trainer::model::source::{LinearStorage, WeightSource};
use trainer::ops::Wide;
use trainer::ops::linear::{self, Linear, Mode};
use trainer::quant::{BitsandbytesParts, Nf4Matrix, Quantizer, Weight};

use crate::support::{device, download, random, upload};

const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
const QUANT_TYPES: [QuantType; 2] = [QuantType::Nf4, QuantType::Fp4];
const SHAPES: [(usize, usize); 7] = [(1, 1), (3, 64), (7, 96), (5, 33), (37, 1000), (2, 2112), (128, 3584)];

/// What a value becomes in a type.
fn rounded(value: f32, dtype: DType) -> f32 {
    match dtype {
        DType::F16 => f16::from_f32(value).to_f32(),
        DType::BF16 => bf16::from_f32(value).to_f32(),
        _ => value,
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

fn bytes_of(tensor: &Tensor) -> Vec<u8> {
    tensor.to_device(&Device::Cpu).unwrap().to_vec1().unwrap()
}

#[track_caller]
fn assert_same_bits(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (at, (g, w)) in got.iter().zip(want).enumerate() {
        assert!(g.to_bits() == w.to_bits(), "{what}: value {at} is {g:e} ({:08x}), expected {w:e}", g.to_bits());
    }
}

/// Values whose blocks are ordinary, zero, subnormal, at the midpoints between codes, huge, constant or nearly zero.
fn hard_values(name: &str, count: usize, quant_type: QuantType) -> Vec<f32> {
    let empty = Nf4Matrix::quantize(&[0.0], 1, 1, quant_type, false).to_bitsandbytes("float32");
    let mut codes = floats(&empty.quant_map);
    codes.sort_by(f32::total_cmp);
    let mut values = random(name, count);
    for (index, block) in values.chunks_mut(64).enumerate() {
        for (at, value) in block.iter_mut().enumerate() {
            let midpoint = f32::midpoint(codes[at % 15], codes[at % 15 + 1]);
            *value = match index % 8 {
                0 => 0.0,
                1 => *value * 1e-39,
                2 if at == 0 => -1.0,
                2 => midpoint,
                3 => *value * 1e34,
                4 => -0.25,
                5 => *value * 1e-37,
                6 if at == 0 => 0.75,
                6 => 0.75 * f32::from_bits(midpoint.to_bits() + at as u32 % 3),
                _ => *value,
            };
        }
    }
    values
}

/// The parts of a matrix on the device.
pub(crate) struct Parts {
    packed: Tensor,
    values: Tensor,
    absmax: Vec<Tensor>,
    offset: f32,
}

impl Parts {
    pub(crate) fn new(device: &Device, matrix: &Nf4Matrix) -> Self {
        let parts = matrix.to_bitsandbytes("float32");
        let absmax = match (&parts.nested_absmax, &parts.nested_quant_map) {
            (Some(nested), Some(map)) => vec![
                upload_u8(device, &parts.absmax).unwrap(),
                upload_f32(device, &floats(nested)).unwrap(),
                upload_f32(device, &floats(map)).unwrap(),
            ],
            _ => vec![upload_f32(device, &floats(&parts.absmax)).unwrap()],
        };
        Self {
            packed: upload_u8(device, &parts.weight).unwrap(),
            values: upload_f32(device, &floats(&parts.quant_map)).unwrap(),
            absmax,
            offset: offset_of(&parts),
        }
    }

    pub(crate) fn view(&self) -> Nf4View<'_> {
        let absmax = match &self.absmax[..] {
            [codes, absmax, map] => Nf4Absmax::Nested {
                codes: array(codes).unwrap(),
                absmax: array(absmax).unwrap(),
                map: array(map).unwrap(),
                offset: self.offset,
            },
            plain => Nf4Absmax::Plain(array(&plain[0]).unwrap()),
        };
        Nf4View { packed: array(&self.packed).unwrap(), absmax, values: array(&self.values).unwrap() }
    }
}

fn offset_of(parts: &BitsandbytesParts) -> f32 {
    let state: serde_json::Value = serde_json::from_slice(&parts.quant_state).unwrap();
    state["nested_offset"].as_f64().unwrap_or(0.0) as f32
}

#[test]
#[ignore = "gpu"]
fn nf4_rows_have_the_cpu_s_bits() {
    let device = device();
    for (quant_type, is_double) in QUANT_TYPES.into_iter().flat_map(|t| [(t, false), (t, true)]) {
        for (rows, cols) in SHAPES {
            let values = hard_values("nf4 dequantize", rows * cols, quant_type);
            let host = Nf4Matrix::quantize(&values, rows, cols, quant_type, is_double);
            let parts = Parts::new(&device, &host);
            let host = Weight::from(host);
            for dtype in TYPES {
                for (first, left, right) in [(0, 0, 0), (rows / 3, 0, 0), (rows / 2, 16, 8), (rows / 3, 1, 2)] {
                    let count = rows - first;
                    let mut want = vec![0.0; count * cols];
                    host.dequantize_rows_into(first..rows, &mut want).unwrap();
                    want.iter_mut().for_each(|v| *v = rounded(*v, dtype));
                    let width = left + cols + right;
                    let wide = upload(&device, &vec![f32::NAN; count * width], (count, width), dtype);
                    let view = wide.narrow(1, left, cols).unwrap();
                    dequantize_nf4(&device, matrix(&view).unwrap(), &parts.view(), first, cols).unwrap();
                    let what = format!("{quant_type:?} {is_double} [{rows}, {cols}] {dtype:?} from {first} at {left}");
                    assert_same_bits(&what, &download(&view.contiguous().unwrap()), &want);
                    let untouched = download(&wide).iter().filter(|v| v.is_nan()).count();
                    assert_eq!(untouched, count * (left + right), "{what}: values beside the matrix");
                }
            }
        }
    }
}

#[test]
#[ignore = "gpu"]
fn quantising_to_4_bits_gives_the_cpu_s_codes_and_maxima() {
    let device = device();
    for quant_type in QUANT_TYPES {
        for (rows, cols) in SHAPES {
            for dtype in TYPES {
                let count = rows * cols;
                let values: Vec<f32> =
                    hard_values("nf4 quantize", count, quant_type).into_iter().map(|v| rounded(v, dtype)).collect();
                let want = Nf4Matrix::quantize(&values, rows, cols, quant_type, false);
                let x = upload(&device, &values, count, dtype);
                let packed = upload_u8(&device, &vec![0xa5; count.div_ceil(2)]).unwrap();
                let absmax = upload_f32(&device, &vec![f32::NAN; count.div_ceil(64)]).unwrap();
                let (to, maxima, from) = (array(&packed).unwrap(), array(&absmax).unwrap(), array(&x).unwrap());
                quantize_nf4(&device, to, maxima, from, dtype, count, quant_type == QuantType::Fp4).unwrap();
                let what = format!("{quant_type:?} [{rows}, {cols}] {dtype:?}");
                assert_same_bits(&what, &download(&absmax), &want.absmax());
                let codes = bytes_of(&packed);
                let wrong = codes.iter().zip(&want.packed()[..]).position(|(g, w)| g != w);
                assert_eq!(wrong, None, "{what}: bytes differ");
                assert_eq!(codes.len(), want.packed().len(), "{what}");
            }
        }
    }
}

#[test]
#[ignore = "gpu"]
fn quantising_maxima_gives_the_cpu_s_codes() {
    let device = device();
    for (rows, cols) in SHAPES {
        let values = if cols == 3584 {
            random("nf4 maxima", rows * cols)
        } else {
            hard_values("nf4 maxima", rows * cols, QuantType::Nf4)
        };
        let maxima = Nf4Matrix::quantize(&values, rows, cols, QuantType::Nf4, false).absmax();
        let want = Nf4Matrix::quantize(&values, rows, cols, QuantType::Nf4, true).to_bitsandbytes("float32");
        let count = maxima.len();
        let from = upload_f32(&device, &maxima).unwrap();
        let map = upload_f32(&device, &floats(want.nested_quant_map.as_ref().unwrap())).unwrap();
        let codes = upload_u8(&device, &vec![0xa5; count]).unwrap();
        let nested = upload_f32(&device, &vec![f32::NAN; count.div_ceil(256)]).unwrap();
        quantize_maxima(
            &device,
            array(&codes).unwrap(),
            array(&nested).unwrap(),
            array(&from).unwrap(),
            array(&map).unwrap(),
            offset_of(&want),
            count,
        )
        .unwrap();
        let what = format!("maxima of [{rows}, {cols}]");
        assert_same_bits(&what, &download(&nested), &floats(want.nested_absmax.as_ref().unwrap()));
        assert_eq!(bytes_of(&codes), want.absmax[..], "{what}");
    }
}

#[test]
#[ignore = "gpu"]
fn a_model_s_weights_get_the_same_bits_from_the_gpu_as_from_the_cpu() {
    let device = device();
    let mut compared = 0;
    for folder in std::fs::read_dir("tests/golden/qlora_step").unwrap().map(|entry| entry.unwrap().path()) {
        if !folder.join("base").is_dir() {
            continue;
        }
        let open = || WeightSource::open(&folder.join("base"), None).unwrap();
        let ((config, by_cpu), (_, by_gpu)) = (open(), open());
        let by_gpu = by_gpu.quantizing_on(&device);
        for tensor in config.tensors().iter().filter(|tensor| tensor.role == TensorRole::Linear) {
            for (quant_type, double_quant) in QUANT_TYPES.into_iter().flat_map(|t| [(t, false), (t, true)]) {
                let quantization = Some(Quantization { quant_type, double_quant });
                let storage = LinearStorage { quantization, dtype: WeightDtype::Auto };
                let (rows, cols) = (tensor.shape[0], tensor.shape[1]);
                let weight = |source: &WeightSource| source.linear(&tensor.name, (rows, cols), storage).unwrap();
                let (want, got) = (weight(&by_cpu), weight(&by_gpu));
                assert_eq!(got.kind_name(), want.kind_name());
                assert_eq!(got.size_bytes(), want.size_bytes());
                // The products with the rows of an identity are the columns.
                let identity = Wide::plain(Tensor::eye(cols, DType::F32, &device).unwrap()).unwrap();
                let linear = Linear::frozen(got);
                let mode = Mode { use_adapter: false, dropouts: &[] };
                let [columns] = linear::forward(&[&linear], &identity, mode, None).unwrap().0.into_each();
                let got = download(&columns.t().unwrap().contiguous().unwrap());
                let want = want.dequantize().unwrap().flatten_all().unwrap().to_vec1().unwrap();
                let what = format!("{}: {quant_type:?}, double {double_quant}", tensor.name);
                assert_same_bits(&what, &got, &want);
                compared += 1;
            }
        }
    }
    assert!(compared > 0, "no model in tests/golden/qlora_step");
}

#[test]
#[ignore = "gpu"]
fn values_that_are_not_finite_are_not_quantised() {
    let quantizer = Quantizer::new(&device());
    let quantization = Quantization { quant_type: QuantType::Nf4, double_quant: true };
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut values = random("finite", 37 * 64);
        let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let quantize = |values: &[f32]| quantizer.quantize(&bytes(values), DType::F32, (37, 64), quantization).unwrap();
        assert!(quantize(&values).is_some());
        values[1000] = bad;
        assert!(quantize(&values).is_none(), "{bad}");
    }
    assert!(quantizer.quantize(&[0; 12], DType::F32, (2, 2), quantization).is_err());
}

#[test]
#[ignore = "gpu"]
fn arrays_that_end_early_are_refused() {
    let device = device();
    let host = Nf4Matrix::quantize(&[1.0; 128], 2, 64, QuantType::Nf4, false);
    let parts = Parts::new(&device, &host);
    let out = empty(&device, (2, 64), DType::BF16).unwrap();
    assert!(dequantize_nf4(&device, matrix(&out).unwrap(), &parts.view(), 1, 64).is_err());
    assert!(dequantize_nf4(&device, matrix(&out).unwrap(), &parts.view(), 0, 32).is_err());
}

#[test]
#[ignore = "gpu"]
#[expect(clippy::print_stdout, reason = "a table for the reader")]
fn bench_nf4() {
    let device = device();
    println!("  rows   cols  type  double |     us   GB/s");
    for (rows, cols) in [(18944, 3584), (3584, 18944), (3584, 3584), (512, 3584)] {
        for (dtype, is_double) in [(DType::BF16, true), (DType::BF16, false), (DType::F16, true), (DType::F32, true)] {
            let blocks = rows * cols / 64;
            let packed = Tensor::zeros(rows * cols / 2, DType::U8, &device).unwrap();
            let values = upload_f32(&device, &[0.5; 16]).unwrap();
            let (map, ones) = (upload_f32(&device, &[0.5; 256]).unwrap(), vec![1.0; blocks]);
            let codes = Tensor::zeros(blocks, DType::U8, &device).unwrap();
            let maxima = upload_f32(&device, &ones).unwrap();
            let absmax = if is_double {
                Nf4Absmax::Nested {
                    codes: array(&codes).unwrap(),
                    absmax: array(&maxima).unwrap(),
                    map: array(&map).unwrap(),
                    offset: 0.5,
                }
            } else {
                Nf4Absmax::Plain(array(&maxima).unwrap())
            };
            let view = Nf4View { packed: array(&packed).unwrap(), absmax, values: array(&values).unwrap() };
            let out = empty(&device, (rows, cols), dtype).unwrap();
            let run = |times: usize| {
                let start = Instant::now();
                for _ in 0..times {
                    dequantize_nf4(&device, matrix(&out).unwrap(), &view, 0, cols).unwrap();
                }
                synchronize(&device).unwrap();
                start.elapsed().as_secs_f64() / times as f64
            };
            run(5);
            let secs = run(50);
            let bytes = rows * cols * dtype.size_in_bytes() + rows * cols / 2 + blocks * if is_double { 1 } else { 4 };
            let (micros, rate) = (secs * 1e6, bytes as f64 / secs * 1e-9);
            println!("{rows:6} {cols:6}  {dtype:?}  {is_double:6} | {micros:6.1} {rate:6.0}");
        }
    }
}
