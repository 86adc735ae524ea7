//! Multiplication by weights in every storage, against the machine's bounds.
//!
//! First a table: for each storage the few-row product (bound: packed
//! bytes read once), the many-row product and its gradient (bound: plain f32 `gemm` of the same shape on all cores).
//! Then criterion's statistics of the same calls. `cargo bench --bench linear`; a word after `--` selects storages.
#![expect(clippy::print_stdout, reason = "a benchmark reports on standard output")]
#![expect(missing_docs, reason = "criterion's macros define undocumented functions")]

use std::hint::black_box;
use std::time::Instant;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use criterion::{Criterion, Throughput};
use rayon::prelude::*;
use trainer::config::settings::QuantType;
use trainer::fs::Bytes;
use trainer::quant::{GgufMatrix, Nf4Matrix, Weight, dense};
use trainer::rng::Stream;

/// The MLP of Qwen2.5-0.5B.
const ROWS: usize = 4864;
const COLS: usize = 896;
/// The same, as whole blocks of 256.
const WIDE_COLS: usize = 1024;
/// Rows of activations of the many-row products.
const MANY: usize = 256;
/// Matrices multiplied in turn, so that packed bytes come from memory as they do in a model.
const COPIES: usize = 24;

fn values(count: usize) -> Vec<f32> {
    let mut stream = Stream::new(1, "bench", 0, 0);
    (0..count).map(|_| stream.uniform() as f32 - 0.5).collect()
}

fn gguf(kind: GgmlDType) -> Weight {
    let cols = if kind.block_size() == 256 { WIDE_COLS } else { COLS };
    let mut stream = Stream::new(2, "bench blocks", 0, 0);
    let length = ROWS * cols / kind.block_size() * kind.type_size();
    // Bytes below 32 keep every factor that they happen to be part of small and finite.
    let bytes: Vec<u8> = (0..length).map(|_| (stream.bits() & 31) as u8).collect();
    Weight::Gguf(GgufMatrix::new(kind, ROWS, cols, Bytes::from(bytes)).expect("the bytes of the shape"))
}

fn four_bit(kind: QuantType) -> Weight {
    Weight::Nf4(Nf4Matrix::quantize(&values(ROWS * COLS), ROWS, COLS, kind, true))
}

fn floats(dtype: DType) -> Weight {
    let tensor = Tensor::from_vec(values(ROWS * COLS), (ROWS, COLS), &Device::Cpu).expect("the values of the shape");
    Weight::dense(&tensor.to_dtype(dtype).expect("a float type")).expect("a matrix")
}

fn storages() -> Vec<Weight> {
    let kinds = [
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
    let mut weights = vec![floats(DType::F32), floats(DType::BF16), floats(DType::F16)];
    weights.extend([four_bit(QuantType::Nf4), four_bit(QuantType::Fp4)]);
    weights.extend(kinds.map(gguf));
    weights
}

/// A copy with memory of its own.
fn copy(weight: &Weight) -> Weight {
    match weight {
        Weight::Gguf(matrix) => {
            let bytes = Bytes::from(matrix.data().to_vec());
            Weight::Gguf(GgufMatrix::new(matrix.kind(), weight.rows(), weight.cols(), bytes).expect("a copy"))
        }
        Weight::Dense(tensor) => Weight::Dense(tensor.copy().expect("a copy")),
        Weight::Nf4(matrix) => {
            let mut parts = matrix.to_bitsandbytes("float32");
            parts.weight = Bytes::from(parts.weight.to_vec());
            Weight::Nf4(parts.read().expect("a copy"))
        }
        #[cfg(feature = "cuda")]
        Weight::Device(_) => weight.clone(),
    }
}

/// The shortest of several runs, in seconds; other work on the machine only ever adds time.
fn shortest(runs: usize, mut work: impl FnMut()) -> f64 {
    work();
    let time = |work: &mut dyn FnMut()| {
        let start = Instant::now();
        work();
        start.elapsed().as_secs_f64()
    };
    (0..runs).map(|_| time(&mut work)).fold(f64::INFINITY, f64::min)
}

/// Bytes per second that all cores read together from memory.
fn bandwidth() -> f64 {
    let data = vec![1f32; 64 << 20];
    let sum = |part: &[f32]| {
        let mut lanes = [0f32; 64];
        for chunk in part.as_chunks::<64>().0 {
            lanes.iter_mut().zip(chunk).for_each(|(lane, v)| *lane += v);
        }
        lanes.iter().sum::<f32>()
    };
    let seconds = shortest(8, || {
        black_box(data.par_chunks(data.len() / rayon::current_num_threads()).map(sum).sum::<f32>());
    });
    4.0 * data.len() as f64 / seconds
}

/// Floating point operations per second of plain f32 `gemm` on all cores, for `y = x W^T`.
fn plain_gemm(rows: usize, cols: usize) -> f64 {
    let (x, w) = (values(MANY * cols), values(rows * cols));
    let mut y = vec![0f32; MANY * rows];
    let seconds = shortest(8, || {
        // SAFETY: the three matrices are as long as their shapes and strides say.
        #[expect(unsafe_code, reason = "the bound is the gemm crate called directly")]
        unsafe {
            gemm::gemm(
                MANY,
                rows,
                cols,
                y.as_mut_ptr(),
                1,
                rows as isize,
                false,
                x.as_ptr(),
                1,
                cols as isize,
                w.as_ptr(),
                cols as isize,
                1,
                0.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::Rayon(0),
            );
        }
    });
    2.0 * (MANY * rows * cols) as f64 / seconds
}

fn table(weights: &[Weight]) {
    println!("{} threads, {:?}", rayon::current_num_threads(), trainer::kernels::cpu::Level::best());
    println!(
        "weight [{ROWS}, {COLS}] (blocks of 256: {WIDE_COLS}); percentages are of bounds measured beside each row:"
    );
    println!("the bandwidth of reading memory, and plain f32 gemm of the same shape on all cores\n");
    println!(
        "{:<22} {:>9} {:>16} {:>12} {:>12} {:>12} {:>20} {:>20} {:>12} {:>10} {:>14}",
        "storage",
        "bits each",
        "1 row",
        "2 rows",
        "4 rows",
        "8 rows",
        "256 rows",
        "gradient, 256",
        "dequantise",
        "memory",
        "gemm"
    );
    for weight in weights {
        let (n, k) = (weight.rows(), weight.cols());
        // Beside each row, so that other work on the machine slows the bound and what is held against it alike.
        let (bandwidth, bound) = (bandwidth(), plain_gemm(n, k));
        let copies: Vec<Weight> = (0..COPIES).map(|_| copy(weight)).collect();
        let few = [1, 2, 4, 8].map(|m| {
            let (x, mut y) = (values(m * k), vec![0f32; m * n]);
            let seconds = shortest(10, || {
                for weight in &copies {
                    weight.forward_slice(&x, m, &mut y).expect("shapes agree");
                }
            });
            (COPIES * weight.size_bytes()) as f64 / seconds
        });
        let operations = 2.0 * (MANY * n * k) as f64;
        let (x, mut y) = (values(MANY * k), vec![0f32; MANY * n]);
        let forward = operations / shortest(8, || weight.forward_slice(&x, MANY, &mut y).expect("shapes agree"));
        let (dy, mut dx) = (values(MANY * n), vec![0f32; MANY * k]);
        let backward =
            operations / shortest(8, || weight.backward_input_slice(&dy, MANY, &mut dx).expect("shapes agree"));
        let mut all = vec![0f32; n * k];
        let dequantise = shortest(8, || weight.dequantize_rows_into(0..n, &mut all).expect("shapes agree"));
        let share = |rate: f64| format!("{:.1} GFLOP/s {:>3.0}%", rate / 1e9, 100.0 * rate / bound);
        println!(
            "{:<22} {:>9.2} {:>16} {:>12} {:>12} {:>12} {:>20} {:>20} {:>12} {:>10} {:>14}",
            weight.kind_name(),
            8.0 * weight.size_bytes() as f64 / (n * k) as f64,
            format!("{:.1} GB/s {:>3.0}%", few[0] / 1e9, 100.0 * few[0] / bandwidth),
            format!("{:.1} GB/s", few[1] / 1e9),
            format!("{:.1} GB/s", few[2] / 1e9),
            format!("{:.1} GB/s", few[3] / 1e9),
            share(forward),
            share(backward),
            format!("{:.2} Gval/s", (n * k) as f64 / dequantise / 1e9),
            format!("{:.1} GB/s", bandwidth / 1e9),
            format!("{:.1} GFLOP/s", bound / 1e9),
        );
    }
}

/// Adapter shapes: rank 16 on the same matrix.
fn adapters() {
    let rank = 16;
    println!("\nLoRA of rank {rank}, {MANY} rows");
    let (x, a, b) = (values(MANY * COLS), values(rank * COLS), values(ROWS * rank));
    let (mut h, mut y, mut da) = (vec![0f32; MANY * rank], vec![0f32; MANY * ROWS], vec![0f32; rank * COLS]);
    let report = |name: &str, work: usize, seconds: f64| {
        println!("{name:<22} {:>7.1} us {:>7.1} GFLOP/s", seconds * 1e6, 2.0 * work as f64 / seconds / 1e9);
    };
    let seconds = shortest(20, || dense::matmul_nt(&x, &a, MANY, rank, COLS, &mut h).expect("shapes agree"));
    report("h = x A^T", MANY * rank * COLS, seconds);
    let seconds =
        shortest(20, || dense::accumulate_nt(&h, &b, MANY, ROWS, rank, 2.0, 1.0, &mut y).expect("shapes agree"));
    report("y += s h B^T", MANY * rank * ROWS, seconds);
    let seconds = shortest(20, || dense::matmul_nn(&y, &b, MANY, ROWS, rank, &mut h).expect("shapes agree"));
    report("dh = dy B", MANY * rank * ROWS, seconds);
    let seconds =
        shortest(20, || dense::accumulate_weight_grad(&h, &x, MANY, rank, COLS, &mut da).expect("shapes agree"));
    report("dA += dh^T x", MANY * rank * COLS, seconds);
}

fn statistics(weights: &[Weight]) {
    let mut criterion = Criterion::default().sample_size(10).configure_from_args();
    for weight in weights {
        let (n, k) = (weight.rows(), weight.cols());
        let mut group = criterion.benchmark_group(weight.kind_name());
        group.throughput(Throughput::Bytes(weight.size_bytes() as u64));
        for m in [1usize, MANY] {
            let (x, mut y) = (values(m * k), vec![0f32; m * n]);
            group.bench_function(format!("forward {m}"), |bencher| {
                bencher.iter(|| weight.forward_slice(&x, m, &mut y).expect("shapes agree"));
            });
        }
        group.finish();
    }
    criterion.final_summary();
}

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let is_wanted = |w: &Weight| wanted.is_empty() || wanted.iter().any(|text| w.kind_name().contains(text.as_str()));
    let weights: Vec<Weight> = storages().into_iter().filter(is_wanted).collect();
    table(&weights);
    adapters();
    if std::env::args().any(|a| a == "--bench") && std::env::var_os("TRAINER_BENCH_TABLE_ONLY").is_none() {
        statistics(&weights);
    }
}
