//! Attention against plain loops in f64.

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use trainer::device::{Matrix, array, empty, matrix, synchronize};
use trainer::kernels::cuda::{
    AttentionPlan, AttentionVariant, SegmentRange, attention_backward_with, attention_forward_with,
};

use crate::support::{assert_close, device, download, random, upload};

/// Relative errors of `o`, of the log-sum-exp and of the gradients: one rounding of the probabilities and one of the
/// result (two more for gradients: `o` in `delta`, and the gradients of the scores).
fn tolerances(dtype: DType) -> [f32; 3] {
    match dtype {
        DType::F32 => [1e-5, 1e-6, 3e-5],
        DType::F16 => [1e-3, 1e-5, 2e-3],
        _ => [6e-3, 1e-5, 1.2e-2],
    }
}

#[derive(Clone, Copy, Debug)]
struct Sizes {
    heads: usize,
    kv_heads: usize,
    d: usize,
}

/// Packed sequences of awkward lengths, then prompts with answers; a prefix may end before its owner does. Their few
/// tiles of keys are split over blocks. Last, short sequences enough to fill a device without that.
fn layouts() -> Vec<Vec<SegmentRange>> {
    let mut packed = Vec::new();
    let mut start = 0;
    for length in [1, 5, 63, 0, 64, 65, 129, 200] {
        packed.push(SegmentRange { start, end: start + length, prefix: None });
        start += length;
    }
    let segment = |start, end, prefix| SegmentRange { start, end, prefix };
    let shared = vec![
        segment(0, 150, None),
        segment(150, 155, Some((0, 150))),
        segment(155, 290, Some((0, 150))),
        segment(290, 291, None),
        segment(291, 300, Some((290, 291))),
        segment(300, 370, Some((0, 70))),
        segment(370, 371, Some((0, 64))),
    ];
    let lengths = (0..600).map(|i| 1 + i % 7);
    let many = lengths
        .scan(0, |end, length| {
            *end += length;
            Some(segment(*end - length, *end, None))
        })
        .collect();
    vec![packed, shared, many]
}

struct Expected {
    o: Vec<f32>,
    lse: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

/// Attention and its gradients by their definitions.
fn reference(sizes: Sizes, segments: &[SegmentRange], q: &[f32], k: &[f32], v: &[f32], d_out: &[f32]) -> Expected {
    let Sizes { heads, kv_heads, d } = sizes;
    let n = q.len() / (heads * d);
    let scale = 1.0 / (d as f64).sqrt();
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
    let add = |to: &mut [f64], weight: f64, x: &[f32]| {
        to.iter_mut().zip(x).for_each(|(to, &x)| *to += weight * f64::from(x));
    };
    let (mut o, mut lse, mut dq) = (vec![0.0; n * heads * d], vec![0.0; heads * n], vec![0.0; n * heads * d]);
    let (mut dk, mut dv) = (vec![0.0; n * kv_heads * d], vec![0.0; n * kv_heads * d]);
    for segment in segments {
        let (first, last) = segment.prefix.unwrap_or((0, 0));
        for (token, head) in (segment.start..segment.end).flat_map(|token| (0..heads).map(move |head| (token, head))) {
            let keys: Vec<usize> = (first..last).chain(segment.start..=token).collect();
            let wide = (token * heads + head) * d;
            let narrow = |key: usize| (key * kv_heads + head / (heads / kv_heads)) * d;
            let (query, dy) = (&q[wide..wide + d], &d_out[wide..wide + d]);
            let scores: Vec<f64> = keys.iter().map(|&key| scale * dot(query, &k[narrow(key)..][..d])).collect();
            let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|s| (s - top).exp()).sum();
            lse[head * n + token] = top + sum.ln();
            let p: Vec<f64> = scores.iter().map(|s| (s - top).exp() / sum).collect();
            let dp: Vec<f64> = keys.iter().map(|&key| dot(dy, &v[narrow(key)..][..d])).collect();
            let delta: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
            for ((&key, p), dp) in keys.iter().zip(&p).zip(&dp) {
                let ds = scale * p * (dp - delta);
                add(&mut o[wide..wide + d], *p, &v[narrow(key)..][..d]);
                add(&mut dv[narrow(key)..][..d], *p, dy);
                add(&mut dk[narrow(key)..][..d], ds, query);
                add(&mut dq[wide..wide + d], ds, &k[narrow(key)..][..d]);
            }
        }
    }
    let floats = |x: Vec<f64>| x.into_iter().map(|x| x as f32).collect();
    Expected { o: floats(o), lse: floats(lse), dq: floats(dq), dk: floats(dk), dv: floats(dv) }
}

/// `q`, `k` and `v` (or their gradients) side by side in one matrix, `before` other columns on their left.
struct Fused {
    tensor: Tensor,
    widths: [usize; 3],
    before: usize,
}

impl Fused {
    fn new(device: &Device, values: &[f32], n: usize, sizes: Sizes, before: usize, dtype: DType) -> Self {
        let widths = [sizes.heads * sizes.d, sizes.kv_heads * sizes.d, sizes.kv_heads * sizes.d];
        let width = before + widths.iter().sum::<usize>();
        Self { tensor: upload(device, &values[..n * width], (n, width), dtype), widths, before }
    }

    fn first(&self, part: usize) -> usize {
        self.before + self.widths[..part].iter().sum::<usize>()
    }

    fn views(&self) -> [Matrix<'_>; 3] {
        let all = matrix(&self.tensor).unwrap();
        [0, 1, 2].map(|part| all.columns(self.first(part), self.widths[part]))
    }

    fn values(&self) -> [Vec<f32>; 3] {
        let part = |part| self.tensor.narrow(1, self.first(part), self.widths[part]).unwrap().contiguous().unwrap();
        [0, 1, 2].map(|i| download(&part(i)))
    }
}

fn check(sizes: Sizes, segments: &[SegmentRange], before: usize, dtype: DType, variants: &[AttentionVariant]) {
    let device = device();
    let Sizes { heads, kv_heads, d } = sizes;
    let n = segments.last().unwrap().end;
    let mut plan = AttentionPlan::new(&device, segments).unwrap();
    let wide = before + (heads + 2 * kv_heads) * d;
    let qkv = Fused::new(&device, &random("qkv", n * wide), n, sizes, before, dtype);
    let d_out = upload(&device, &random("d_out", n * heads * d), (n, heads * d), dtype);
    let [q, k, v] = qkv.values();
    let want = reference(sizes, segments, &q, &k, &v, &download(&d_out));
    let [o_error, lse_error, gradient_error] = tolerances(dtype);
    for &variant in variants {
        let poison = vec![f32::NAN; n * wide];
        let o = upload(&device, &poison[..n * heads * d], (n, heads * d), dtype);
        let lse = upload(&device, &poison[..heads * n], (heads, n), DType::F32);
        let delta = upload(&device, &poison[..heads * n], (heads, n), DType::F32);
        // Twice with an order of all sums that is fixed, then twice without.
        let gradients = [0; 4].map(|_| Fused::new(&device, &poison, n, sizes, before, dtype));
        let ([q, k, v], o_view) = (qkv.views(), matrix(&o).unwrap());
        let (lse_view, delta_view) = (array(&lse).unwrap(), array(&delta).unwrap());
        attention_forward_with(variant, &device, &plan, o_view, lse_view, q, k, v, heads, kv_heads).unwrap();
        let dy = matrix(&d_out).unwrap();
        for (i, gradients) in gradients.iter().enumerate() {
            plan.set_deterministic(i < 2);
            let [dq, dk, dv] = gradients.views();
            attention_backward_with(
                variant, &device, &plan, dq, dk, dv, dy, q, k, v, o_view, lse_view, delta_view, heads, kv_heads,
            )
            .unwrap();
        }
        let what =
            |name: &str| format!("{name} of {sizes:?}, {dtype:?}, {variant:?}, {n} tokens, {before} columns before");
        assert_close(&what("o"), &download(&o), &want.o, o_error);
        assert_close(&what("lse"), &download(&lse), &want.lse, lse_error);
        for gradients in &gradients {
            let [dq, dk, dv] = gradients.values();
            assert_close(&what("dq"), &dq, &want.dq, gradient_error);
            assert_close(&what("dk"), &dk, &want.dk, gradient_error);
            assert_close(&what("dv"), &dv, &want.dv, gradient_error);
        }
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let [first, second, third, fourth] = gradients.each_ref().map(|x| x.values().map(|x| bits(&x)));
        assert!(first == second, "{}", what("a second time"));
        assert!(third[1..] == fourth[1..], "{}", what("dk and dv a second time"));
    }
}

const SIXTEEN_BIT: [DType; 2] = [DType::F16, DType::BF16];
const ALL: [AttentionVariant; 4] =
    [AttentionVariant::Automatic, AttentionVariant::TensorCores, AttentionVariant::WarpGroups, AttentionVariant::Plain];

#[test]
#[ignore = "gpu"]
fn attention_on_tensor_cores_matches_its_definition() {
    for segments in layouts() {
        for dtype in SIXTEEN_BIT {
            for (heads, kv_heads, d) in [(4, 2, 64), (3, 1, 128), (2, 2, 96), (7, 1, 40)] {
                check(Sizes { heads, kv_heads, d }, &segments, 16, dtype, &ALL);
            }
        }
    }
}

/// A long segment, the beginning of which some of many shorter ones see: blocks that go round their buffers many times, and
/// that take several tiles of unlike work.
#[test]
#[ignore = "gpu"]
fn attention_of_long_and_many_segments_matches_its_definition() {
    let mut segments = vec![SegmentRange { start: 0, end: 1300, prefix: None }];
    for i in 0..30 {
        let start = segments.last().unwrap().end;
        let prefix = (i % 3 == 0).then_some((0, 700 + 9 * i));
        segments.push(SegmentRange { start, end: start + 1 + i * 37 % 190, prefix });
    }
    for (dtype, d) in [(DType::BF16, 128), (DType::F16, 72), (DType::BF16, 64)] {
        let sizes = Sizes { heads: 7, kv_heads: 1, d };
        check(sizes, &segments, 8, dtype, &[AttentionVariant::Automatic, AttentionVariant::WarpGroups]);
    }
}

#[test]
#[ignore = "gpu"]
fn attention_in_f32_matches_its_definition() {
    for segments in layouts() {
        for (heads, kv_heads, d) in [(4, 2, 64), (3, 1, 128), (2, 1, 5), (1, 1, 256)] {
            check(Sizes { heads, kv_heads, d }, &segments, 3, DType::F32, &[AttentionVariant::Automatic]);
        }
    }
}

#[test]
#[ignore = "gpu"]
fn attention_of_16_bit_values_that_tensor_cores_do_not_take_matches_its_definition() {
    for segments in layouts() {
        for dtype in SIXTEEN_BIT {
            // Odd head sizes, rows at odd addresses, heads above 128.
            for (d, before) in [(20, 0), (64, 1), (136, 8)] {
                check(Sizes { heads: 2, kv_heads: 1, d }, &segments, before, dtype, &ALL[..1]);
            }
        }
    }
}

#[test]
#[ignore = "gpu"]
fn attention_leaves_rows_of_no_segment_alone() {
    let device = device();
    let segments = [SegmentRange { start: 3, end: 80, prefix: None }];
    let plan = AttentionPlan::new(&device, &segments).unwrap();
    let (n, d) = (100, 64);
    let qkv = upload(&device, &random("qkv", n * 3 * d), (n, 3 * d), DType::F16);
    let o = upload(&device, &vec![7.0; n * d], (n, d), DType::F16);
    let lse = upload(&device, &vec![7.0; n], n, DType::F32);
    let [q, k, v] = [0, 1, 2].map(|part| matrix(&qkv).unwrap().columns(part * d, d));
    let variant = AttentionVariant::Automatic;
    attention_forward_with(variant, &device, &plan, matrix(&o).unwrap(), array(&lse).unwrap(), q, k, v, 1, 1).unwrap();
    let (o, lse) = (download(&o), download(&lse));
    assert!(o[..3 * d].iter().chain(&o[80 * d..]).all(|&x| x == 7.0));
    assert!(lse[..3].iter().chain(&lse[80..]).all(|&x| x == 7.0));
    assert!(o[3 * d..80 * d].iter().all(|&x| x != 7.0));
}

#[test]
#[ignore = "gpu"]
fn attention_of_no_tokens_does_nothing_and_wrong_shapes_are_refused() {
    let device = device();
    let empty = AttentionPlan::new(&device, &[]).unwrap();
    assert!(empty.is_empty());
    let plan = AttentionPlan::new(&device, &[SegmentRange { start: 0, end: 9, prefix: None }]).unwrap();
    let x = upload(&device, &[0.0; 8 * 64], (8, 64), DType::BF16);
    let lse = upload(&device, &[0.0; 8], 8, DType::F32);
    let (x, lse) = (matrix(&x).unwrap(), array(&lse).unwrap());
    let run = |plan, k, heads, kv_heads| {
        attention_forward_with(AttentionVariant::Automatic, &device, plan, x, lse, x, k, x, heads, kv_heads)
    };
    run(&empty, x, 1, 1).unwrap();
    run(&plan, x, 1, 1).unwrap_err(); // more tokens than rows
    run(&empty, x.columns(0, 32), 1, 1).unwrap_err();
    run(&empty, x, 2, 2).unwrap_err(); // lse is too short
    run(&empty, x, 3, 1).unwrap_err();
}

/// One after the other; `answers`: behind each of them, which then is their prompt.
fn packed(lengths: &[usize], answers: &[usize]) -> Vec<SegmentRange> {
    let mut segments: Vec<SegmentRange> = Vec::new();
    let mut push = |length: usize, prefix| {
        let start = segments.last().map_or(0, |last| last.end);
        segments.push(SegmentRange { start, end: start + length, prefix });
        (start, start + length)
    };
    for &length in lengths {
        let prompt = push(length, None);
        for &answer in answers {
            push(answer, Some(prompt));
        }
    }
    segments
}

#[test]
#[ignore = "gpu"]
#[expect(clippy::print_stdout, reason = "a table for the reader")]
fn bench_attention() {
    use AttentionVariant::{Automatic, TensorCores};
    let device = device();
    let batches = [
        ("1 x 2048", packed(&[2048], &[]), (28, 4, 128)),
        ("4 x 2048", packed(&[2048; 4], &[]), (28, 4, 128)),
        ("1 x 8192", packed(&[8192], &[]), (28, 4, 128)),
        ("4 x (128 + 8 x 255)", packed(&[128; 4], &[255; 8]), (28, 4, 128)),
        ("400 x 20", packed(&[20; 400], &[]), (28, 4, 128)),
        ("4 x 2048", packed(&[2048; 4], &[]), (14, 2, 64)),
    ];
    println!("batch, heads, kv, d | kernels | forward: ms  TFLOP/s | backward: ms  TFLOP/s");
    for (name, segments, (heads, kv_heads, d)) in batches {
        let n = segments.last().unwrap().end;
        let seen = |s: &SegmentRange| {
            let (own, prefix) = (s.end - s.start, s.prefix.map_or(0, |(start, end)| end - start));
            own * (own + 1) / 2 + own * prefix
        };
        let flops = (segments.iter().map(seen).sum::<usize>() * heads * d) as f64;
        let values = |name, width: usize| upload(&device, &random(name, n * width), (n, width), DType::BF16);
        let (qkv, d_out) = (values("qkv", (heads + 2 * kv_heads) * d), values("d_out", heads * d));
        let qkv = matrix(&qkv).unwrap();
        let [q, k, v] = [(0, heads), (heads, kv_heads), (heads + kv_heads, kv_heads)]
            .map(|(first, count)| qkv.columns(first * d, count * d));
        let narrow = || empty(&device, (n, kv_heads * d), DType::BF16).unwrap();
        let (o, dq) = (values("o", heads * d), values("dq", heads * d));
        let (dk, dv) = (narrow(), narrow());
        let [o, dq, dk, dv, d_out] = [&o, &dq, &dk, &dv, &d_out].map(|tensor| matrix(tensor).unwrap());
        let floats = [(); 2].map(|()| empty(&device, heads * n, DType::F32).unwrap());
        let [lse, delta] = [0, 1].map(|i| array(&floats[i]).unwrap());
        for (kernels, variant, is_deterministic) in
            [("automatic", Automatic, false), ("fixed order", Automatic, true), ("mma.sync", TensorCores, true)]
        {
            let mut plan = AttentionPlan::new(&device, &segments).unwrap();
            plan.set_deterministic(is_deterministic);
            let millis = |run: &dyn Fn()| {
                let times = |count: u32| {
                    let start = Instant::now();
                    (0..count).for_each(|_| run());
                    synchronize(&device).unwrap();
                    1e3 * start.elapsed().as_secs_f64() / f64::from(count)
                };
                times(3);
                times(20)
            };
            let forward = millis(&|| {
                attention_forward_with(variant, &device, &plan, o, lse, q, k, v, heads, kv_heads).unwrap();
            });
            let backward = millis(&|| {
                attention_backward_with(
                    variant, &device, &plan, dq, dk, dv, d_out, q, k, v, o, lse, delta, heads, kv_heads,
                )
                .unwrap();
            });
            let rate = |passes: f64, millis: f64| passes * flops / millis * 1e-9;
            println!(
                "{name:20} {heads:2} {kv_heads} {d:3} | {kernels:11} | {forward:8.3} {:7.0} | {backward:8.3} {:7.0}",
                rate(4.0, forward),
                rate(10.0, backward)
            );
        }
    }
}
