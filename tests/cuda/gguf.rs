//! GGUF blocks: every bit as on the CPU, and how fast they are unpacked.

use std::time::Instant;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Tensor};
use half::{bf16, f16};
use trainer::device::{array, empty, matrix, synchronize, upload_u8};
use trainer::fs::Bytes;
use trainer::kernels::cuda::{GgufKind, dequantize_gguf};
use trainer::quant::{GgufMatrix, Weight};
use trainer::rng::Stream;

use crate::support::{device, download, random, upload};

const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
pub(crate) const KINDS: [(GgmlDType, GgufKind); 10] = [
    (GgmlDType::Q4_0, GgufKind::Q4_0),
    (GgmlDType::Q4_1, GgufKind::Q4_1),
    (GgmlDType::Q5_0, GgufKind::Q5_0),
    (GgmlDType::Q5_1, GgufKind::Q5_1),
    (GgmlDType::Q8_0, GgufKind::Q8_0),
    (GgmlDType::Q2K, GgufKind::Q2K),
    (GgmlDType::Q3K, GgufKind::Q3K),
    (GgmlDType::Q4K, GgufKind::Q4K),
    (GgmlDType::Q5K, GgufKind::Q5K),
    (GgmlDType::Q6K, GgufKind::Q6K),
];

/// Where a block has its f16 scales.
fn scales_of(kind: GgufKind) -> &'static [usize] {
    match kind {
        GgufKind::Q4_1 | GgufKind::Q5_1 | GgufKind::Q4K | GgufKind::Q5K => &[0, 2],
        GgufKind::Q2K => &[80, 82],
        GgufKind::Q3K => &[108],
        GgufKind::Q6K => &[208],
        _ => &[0],
    }
}

/// Blocks of random bytes with finite scales of about `size`; every fourth scale is 0 or subnormal.
pub(crate) fn random_blocks(kind: GgufKind, count: usize, size: f32) -> Vec<u8> {
    let scales = random("gguf scales", 2 * count);
    let mut stream = Stream::new(u64::from(scales[0].to_bits()), "gguf bytes", 0, 0);
    let mut bytes: Vec<u8> = (0..count * kind.block_bytes()).map(|_| stream.bits() as u8).collect();
    for (index, block) in bytes.chunks_mut(kind.block_bytes()).enumerate() {
        for (i, &at) in scales_of(kind).iter().enumerate() {
            let scale = scales[2 * index + i]
                * match index % 8 {
                    3 => 0.0,
                    7 => 1e-6,
                    _ => size,
                };
            block[at..at + 2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
        }
    }
    bytes
}

#[test]
#[ignore = "gpu"]
fn gguf_rows_have_the_cpu_s_bits() {
    let device = device();
    for (ggml, kind) in KINDS {
        let block = kind.block_len();
        for (rows, blocks) in [(1, 1), (7, 3), (5, 9), (130, 14)] {
            let cols = blocks * block;
            let bytes = random_blocks(kind, rows * blocks, 0.1);
            let stored = upload_u8(&device, &bytes).unwrap();
            let host = Weight::from(GgufMatrix::new(ggml, rows, cols, Bytes::from(bytes)).unwrap());
            for dtype in TYPES {
                for (first, left, right) in [(0, 0, 0), (rows / 3, 0, 0), (rows / 2, 16, 8), (rows / 3, 1, 2)] {
                    let count = rows - first;
                    let mut want = vec![0.0; count * cols];
                    host.dequantize_rows_into(first..rows, &mut want).unwrap();
                    let width = left + cols + right;
                    let wide = upload(&device, &vec![f32::NAN; count * width], (count, width), dtype);
                    let view = wide.narrow(1, left, cols).unwrap();
                    dequantize_gguf(&device, matrix(&view).unwrap(), kind, array(&stored).unwrap(), first, cols)
                        .unwrap();
                    let what = format!("{kind:?} [{rows}, {cols}] {dtype:?} from {first} at {left}");
                    for (at, (got, want)) in download(&view.contiguous().unwrap()).iter().zip(&want).enumerate() {
                        let want = match dtype {
                            DType::F16 => f16::from_f32(*want).to_f32(),
                            DType::BF16 => bf16::from_f32(*want).to_f32(),
                            _ => *want,
                        };
                        assert!(got.to_bits() == want.to_bits(), "{what}: value {at} is {got:e}, expected {want:e}");
                    }
                    let untouched = download(&wide).iter().filter(|v| v.is_nan()).count();
                    assert_eq!(untouched, count * (left + right), "{what}: values beside the matrix");
                }
            }
        }
    }
}

#[test]
#[ignore = "gpu"]
fn rows_of_part_blocks_and_short_arrays_are_refused() {
    let device = device();
    let stored = upload_u8(&device, &vec![0; 2 * 144]).unwrap();
    let out = empty(&device, (2, 256), DType::BF16).unwrap();
    let (out, blocks) = (matrix(&out).unwrap(), array(&stored).unwrap());
    assert!(dequantize_gguf(&device, out, GgufKind::Q4K, blocks, 0, 256).is_ok());
    assert!(dequantize_gguf(&device, out, GgufKind::Q4K, blocks, 1, 256).is_err());
    assert!(dequantize_gguf(&device, out, GgufKind::Q4K, blocks, 0, 512).is_err());
    assert!(dequantize_gguf(&device, out.columns(0, 128), GgufKind::Q4K, blocks, 0, 128).is_err());
    assert!(dequantize_gguf(&device, out, GgufKind::F16, blocks, 0, 256).is_err());
    synchronize(&device).unwrap();
}

#[test]
#[ignore = "gpu"]
#[expect(clippy::print_stdout, reason = "a table for the reader")]
fn bench_gguf() {
    let device = device();
    let (rows, cols) = (18944, 3584);
    println!("[{rows}, {cols}] to bf16");
    println!("kind  |     us   GB/s");
    for (_, kind) in KINDS {
        let stored = kind.bytes_of(rows * cols).unwrap();
        let blocks = Tensor::zeros(stored, DType::U8, &device).unwrap();
        let out = empty(&device, (rows, cols), DType::BF16).unwrap();
        let run = |times: usize| {
            let start = Instant::now();
            for _ in 0..times {
                dequantize_gguf(&device, matrix(&out).unwrap(), kind, array(&blocks).unwrap(), 0, cols).unwrap();
            }
            synchronize(&device).unwrap();
            start.elapsed().as_secs_f64() / times as f64
        };
        run(5);
        let secs = run(50);
        let rate = (stored + 2 * rows * cols) as f64 / secs * 1e-9;
        println!("{:5} | {:6.1} {rate:6.0}", format!("{kind:?}"), secs * 1e6);
    }
}
