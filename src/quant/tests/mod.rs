//! Products and conversions of every storage against plain loops in f64 and against candle.

mod conversions;
mod products;

use candle_core::quantized::GgmlDType;

use super::{GgufMatrix, Nf4Matrix, Weight};
use crate::config::settings::QuantType;
use crate::fs::Bytes;
use crate::rng::Stream;

/// Every GGUF type that holds weights.
const GGUF_KINDS: [GgmlDType; 13] = [
    GgmlDType::F32,
    GgmlDType::F16,
    GgmlDType::BF16,
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
    GgmlDType::Q2K,
    GgmlDType::Q3K,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
];

fn normals(name: &str, count: usize) -> Vec<f32> {
    let mut stream = Stream::new(11, name, count as u64, 0);
    (0..count).map(|_| stream.normal() as f32).collect()
}

/// Where the f16 factors of a block lie.
fn half_offsets(kind: GgmlDType) -> &'static [usize] {
    match kind {
        GgmlDType::Q4_0 | GgmlDType::Q5_0 | GgmlDType::Q8_0 => &[0],
        GgmlDType::Q4_1 | GgmlDType::Q5_1 | GgmlDType::Q4K | GgmlDType::Q5K => &[0, 2],
        GgmlDType::Q2K => &[80, 82],
        GgmlDType::Q3K => &[108],
        GgmlDType::Q6K => &[208],
        _ => &[],
    }
}

/// Random blocks of `rows` rows; every code and every packed scale occurs, f16 factors are moderate.
fn random_blocks(kind: GgmlDType, rows: usize, cols: usize) -> Vec<u8> {
    let count = rows * cols;
    let values = normals("blocks", count);
    match kind {
        GgmlDType::F32 => return values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        GgmlDType::F16 => return values.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect(),
        GgmlDType::BF16 => return values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect(),
        _ => {}
    }
    let mut stream = Stream::new(12, "bytes", count as u64, kind.type_size() as u64);
    let mut bytes: Vec<u8> = (0..count / kind.block_size() * kind.type_size()).map(|_| stream.bits() as u8).collect();
    for block in bytes.chunks_exact_mut(kind.type_size()) {
        for &at in half_offsets(kind) {
            let factor = half::f16::from_f64(0.05 * (stream.uniform() - 0.3));
            block[at..at + 2].copy_from_slice(&factor.to_le_bytes());
        }
    }
    bytes
}

/// A GGUF matrix whose bytes begin at an odd address.
fn gguf(kind: GgmlDType, rows: usize, cols: usize) -> GgufMatrix {
    let mut bytes = vec![0u8; 1];
    bytes.extend(random_blocks(kind, rows, cols));
    let bytes = Bytes::from(bytes);
    let unaligned = bytes.slice(1..bytes.len()).expect("inside");
    GgufMatrix::new(kind, rows, cols, unaligned).expect("random_blocks makes as many bytes as the shape takes")
}

fn four_bit(quant_type: QuantType, double_quant: bool, rows: usize, cols: usize) -> Weight {
    Weight::Nf4(Nf4Matrix::quantize(&normals("four bit", rows * cols), rows, cols, quant_type, double_quant))
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}
