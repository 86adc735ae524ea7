//! The head against double precision: log-probabilities, entropies, gradients; rows of 8-bit codes; how fast they are.

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use trainer::device::{Matrix, array, empty, matrix, synchronize, upload_f32, upload_u8, upload_u32};
use trainer::kernels::cuda::{HeadState, head_backward_chunk, head_finish, head_forward_chunk, head_start};

use crate::support::{device, download, random, upload};

const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
/// Rows, vocabulary, logits at a time.
const CASES: [(usize, usize, usize); 6] =
    [(1, 1, 1), (3, 40, 16), (5, 1003, 250), (4, 8192, 8192), (7, 10000, 4104), (2, 21000, 6000)];

/// Relative error of a gradient rounded to a type.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 6e-4,
        DType::BF16 => 4.5e-3,
        _ => 1e-5,
    }
}

/// Logits, targets and what the head says about them, in double precision.
struct Case {
    rows: usize,
    vocabulary: usize,
    logits: Vec<f32>,
    targets: Vec<u32>,
    log_sums: Vec<f64>,
    logprobs: Vec<f64>,
    entropies: Vec<f64>,
    is_argmax: Vec<u8>,
}

impl Case {
    fn new(rows: usize, vocabulary: usize) -> Self {
        let mut logits = random("head logits", rows * vocabulary);
        let draws = random("head targets", rows);
        let (mut targets, mut is_argmax) = (Vec::new(), Vec::new());
        let (mut log_sums, mut logprobs, mut entropies) = (Vec::new(), Vec::new(), Vec::new());
        for (row, logits) in logits.chunks_exact_mut(vocabulary).enumerate() {
            // From flat to peaked, each with an offset of its own.
            let (slope, offset) = ([1.0, 4.0, 12.0][row % 3], 20.0 * (row % 4) as f32 - 30.0);
            logits.iter_mut().for_each(|z| *z = *z * slope + offset);
            let best = (0..vocabulary).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
            let target = if row % 2 == 0 { best } else { draws[row].to_bits() as usize % vocabulary };
            let max = f64::from(logits[best]);
            let sum: f64 = logits.iter().map(|&z| (f64::from(z) - max).exp()).sum();
            let log_sum = max + sum.ln();
            let mean: f64 = logits.iter().map(|&z| (f64::from(z) - log_sum).exp() * f64::from(z)).sum();
            targets.push(target as u32);
            is_argmax.push(u8::from(logits[target] >= logits[best]));
            log_sums.push(log_sum);
            logprobs.push(f64::from(logits[target]) - log_sum);
            entropies.push(log_sum - mean);
        }
        Self { rows, vocabulary, logits, targets, log_sums, logprobs, entropies, is_argmax }
    }

    /// The logits of some tokens on the device, in rows that lie `margin` values apart.
    fn chunk(&self, device: &Device, first: usize, width: usize, margin: usize) -> Tensor {
        let mut values = vec![f32::NAN; self.rows * (width + margin)];
        for (to, from) in values.chunks_exact_mut(width + margin).zip(self.logits.chunks_exact(self.vocabulary)) {
            to[..width].copy_from_slice(&from[first..first + width]);
        }
        let wide = upload(device, &values, (self.rows, width + margin), DType::F32);
        wide.narrow(1, 0, width).unwrap()
    }

    fn pieces(&self, size: usize) -> impl Iterator<Item = (usize, usize)> {
        (0..self.vocabulary).step_by(size).map(move |first| (first, size.min(self.vocabulary - first)))
    }
}

fn narrowed(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&v| v as f32).collect()
}

/// Absolute differences in nats: a relative measure would divide by entropies near 0.
#[track_caller]
fn assert_near(what: &str, got: &[f32], want: &[f64], bound: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (row, (&got, &want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(got) - want).abs();
        assert!(error <= bound * want.abs().max(1.0), "{what}: row {row} is {got}, expected {want}");
    }
}

#[test]
#[ignore = "gpu"]
fn the_head_s_sums_match_double_precision() {
    let device = device();
    for (rows, vocabulary, size) in CASES {
        for margin in [0, 4, 3] {
            let case = Case::new(rows, vocabulary);
            let targets = upload_u32(&device, &case.targets).unwrap();
            let buffer = empty(&device, HeadState::buffer_len(rows), DType::F64).unwrap();
            let state = HeadState::new(array(&buffer).unwrap(), rows).unwrap();
            head_start(&device, state).unwrap();
            for (first, width) in case.pieces(size) {
                let logits = case.chunk(&device, first, width, margin);
                let logits = matrix(&logits).unwrap();
                head_forward_chunk(&device, state, logits, first, array(&targets).unwrap()).unwrap();
                synchronize(&device).unwrap();
            }
            let poisoned = || upload_f32(&device, &vec![f32::NAN; rows]).unwrap();
            let (logprobs, entropies, log_sums) = (poisoned(), poisoned(), poisoned());
            let is_argmax = upload_u8(&device, &vec![7; rows]).unwrap();
            let [to_logprobs, to_entropies, to_log_sums, to_argmax] =
                [&logprobs, &entropies, &log_sums, &is_argmax].map(|t| array(t).unwrap());
            head_finish(&device, state, to_logprobs, to_entropies, to_log_sums, to_argmax).unwrap();
            let what = format!("[{rows}, {vocabulary}] by {size}, margin {margin}");
            assert_near(&format!("{what}: log sums"), &download(&log_sums), &case.log_sums, 3e-6);
            assert_near(&format!("{what}: logprobs"), &download(&logprobs), &case.logprobs, 3e-6);
            // The difference of two sums as large as the logits, up to 60.
            assert_near(&format!("{what}: entropies"), &download(&entropies), &case.entropies, 5e-5);
            let argmax: Vec<u8> = is_argmax.to_device(&Device::Cpu).unwrap().to_vec1().unwrap();
            assert_eq!(argmax, case.is_argmax, "{what}: is_argmax");
        }
    }
}

#[test]
#[ignore = "gpu"]
fn the_head_s_gradient_matches_double_precision() {
    const SCALE: f64 = 0.7;
    let device = device();
    for (rows, vocabulary, size) in CASES {
        let case = Case::new(rows, vocabulary);
        let (d_logprobs, d_entropies) = (random("head d_logprobs", rows), random("head d_entropies", rows));
        let targets = upload_u32(&device, &case.targets).unwrap();
        let row_values = [
            upload_f32(&device, &narrowed(&case.log_sums)).unwrap(),
            upload_f32(&device, &narrowed(&case.entropies)).unwrap(),
            upload_f32(&device, &d_logprobs).unwrap(),
            upload_f32(&device, &d_entropies).unwrap(),
        ];
        let targets_at = array(&targets).unwrap();
        let [log_sums, entropies, to_logprobs, to_entropies] = [0, 1, 2, 3].map(|i| array(&row_values[i]).unwrap());
        for (dtype, has_entropy, margin) in
            TYPES.into_iter().flat_map(|t| [(t, true, 0), (t, false, 0), (t, true, 8), (t, true, 3)])
        {
            for (first, width) in case.pieces(size) {
                let (mut want, mut bounds) = (Vec::new(), Vec::new());
                for row in 0..rows {
                    let d_logprob = f64::from(d_logprobs[row]);
                    let d_entropy = if has_entropy { f64::from(d_entropies[row]) } else { 0.0 };
                    for token in first..first + width {
                        let log_p = f64::from(case.logits[row * vocabulary + token]) - case.log_sums[row];
                        let is_target = f64::from(u8::from(case.targets[row] as usize == token));
                        let gradient = d_logprob * (is_target - log_p.exp())
                            - d_entropy * log_p.exp() * (log_p + case.entropies[row]);
                        want.push(SCALE * gradient);
                        // Log sums up to 80 in f32 leave a p of 1 with an error of 4e-6; f16 ends at 6e-8.
                        let absolute = 1e-5 * (d_logprob.abs() + 10.0 * d_entropy.abs()) + 1e-7;
                        bounds.push(tolerance(dtype) * (SCALE * gradient).abs() + absolute);
                    }
                }
                let logits = case.chunk(&device, first, width, margin);
                let poison = vec![f32::NAN; rows * (width + margin)];
                let wide = upload(&device, &poison, (rows, width + margin), dtype);
                let out = wide.narrow(1, 0, width).unwrap();
                let d_entropies = has_entropy.then_some(to_entropies);
                let gradient_into = |to: Matrix| {
                    let from = matrix(&logits).unwrap();
                    head_backward_chunk(
                        &device,
                        to,
                        from,
                        first,
                        targets_at,
                        log_sums,
                        entropies,
                        to_logprobs,
                        d_entropies,
                        SCALE as f32,
                    )
                    .unwrap();
                };
                gradient_into(matrix(&out).unwrap());
                let what = format!("[{rows}, {vocabulary}] {dtype:?} {has_entropy} margin {margin} from {first}");
                let got = download(&out.contiguous().unwrap());
                for (at, ((&got, want), bound)) in got.iter().zip(&want).zip(&bounds).enumerate() {
                    let error = (f64::from(got) - want).abs();
                    assert!(error <= *bound, "{what}: value {at} is {got:e}, expected {want:e} within {bound:e}");
                }
                if dtype == DType::F32 {
                    gradient_into(matrix(&logits).unwrap());
                    assert_eq!(download(&logits.contiguous().unwrap()), got, "{what}, in place");
                }
            }
        }
    }
}

#[test]
#[ignore = "gpu"]
fn a_masked_token_has_no_gradient() {
    let device = device();
    let (rows, width) = (2, 24);
    let mut values = vec![0.0f32; rows * width];
    values[3] = f32::NEG_INFINITY;
    let logits = upload(&device, &values, (rows, width), DType::F32);
    let (zeros, ones) = (upload_f32(&device, &[0.0; 2]).unwrap(), upload_f32(&device, &[1.0; 2]).unwrap());
    let log_sums = upload_f32(&device, &[23f32.ln(), 24f32.ln()]).unwrap();
    let targets = upload_u32(&device, &[0, 1]).unwrap();
    let out = upload(&device, &vec![f32::NAN; rows * width], (rows, width), DType::BF16);
    let [targets, log_sums, entropies, ones] = [&targets, &log_sums, &zeros, &ones].map(|t| array(t).unwrap());
    let (to, from) = (matrix(&out).unwrap(), matrix(&logits).unwrap());
    head_backward_chunk(&device, to, from, 0, targets, log_sums, entropies, ones, Some(ones), 1.0).unwrap();
    let got = download(&out);
    assert!(got.iter().all(|v| v.is_finite()), "{got:?}");
    assert_eq!(got[3], 0.0);
}

#[test]
#[ignore = "gpu"]
#[expect(clippy::print_stdout, reason = "a table for the reader")]
fn bench_head() {
    let device = device();
    println!("  rows  width  kernel           |     us   GB/s");
    for (rows, width) in [(4096, 16384), (1024, 151_936), (8192, 8192), (64, 16384)] {
        let logits = Tensor::zeros((rows, width), DType::F32, &device).unwrap();
        let ones = Tensor::ones(rows, DType::F32, &device).unwrap();
        let targets = upload_u32(&device, &vec![1; rows]).unwrap();
        let buffer = empty(&device, HeadState::buffer_len(rows), DType::F64).unwrap();
        let state = HeadState::new(array(&buffer).unwrap(), rows).unwrap();
        let (targets, ones) = (array(&targets).unwrap(), array(&ones).unwrap());
        let from = matrix(&logits).unwrap();
        let report = |kernel: &str, bytes: usize, work: &dyn Fn()| {
            let run = |times: usize| {
                let start = Instant::now();
                (0..times).for_each(|_| work());
                synchronize(&device).unwrap();
                start.elapsed().as_secs_f64() / times as f64
            };
            run(3);
            let secs = run(20);
            let rate = (rows * width * bytes) as f64 / secs * 1e-9;
            println!("{rows:6} {width:6}  {kernel:16} | {:6.1} {rate:6.0}", secs * 1e6);
        };
        head_start(&device, state).unwrap();
        report("forward", 4, &|| head_forward_chunk(&device, state, from, 0, targets).unwrap());
        for dtype in [DType::BF16, DType::F32] {
            let out = empty(&device, (rows, width), dtype).unwrap();
            let to = matrix(&out).unwrap();
            report(&format!("backward {dtype:?}"), 4 + dtype.size_in_bytes(), &|| {
                head_backward_chunk(&device, to, from, 0, targets, ones, ones, ones, Some(ones), 1.0).unwrap();
            });
        }
    }
}
