//! The optimizer in host memory against the machine's bound: a step reads parameter, gradient and two moments and writes three of
//! them, 28 bytes a value, which a copy of as many bytes takes as long for.
//!
//! `cargo bench --bench optimizer`; a number after `--` is the count of values.
#![expect(clippy::print_stdout, reason = "a benchmark reports on standard output")]

use std::hint::black_box;
use std::time::Instant;

use rayon::prelude::*;
use trainer::optim::{AdamWStep, adamw_step, sums_of_squares};

const REPEATS: usize = 12;
/// Values that one core copies at a time.
const CHUNK: usize = 1 << 16;

/// The shortest of several.
fn secs(mut work: impl FnMut()) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..REPEATS {
        let started = Instant::now();
        work();
        best = best.min(started.elapsed().as_secs_f64());
    }
    best
}

fn main() {
    let count = std::env::args().skip(1).find_map(|word| word.parse().ok()).unwrap_or(40_000_000usize);
    let noise = |factor: f32| -> Vec<f32> { (0..count).map(|i| factor * ((i * 7919 % 1009) as f32 - 504.0)).collect() };
    let (mut params, grads) = (noise(1e-3), noise(1e-5));
    let (mut first, mut second) = (vec![0.0; count], vec![0.0; count]);
    let mut step = 0;
    let adamw = secs(|| {
        step += 1;
        let hyper =
            AdamWStep { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, step, grad_scale: 0.5 };
        adamw_step(&mut params, &grads, &mut first, &mut second, &hyper).expect("all slices have one length");
    });
    let norm = secs(|| {
        black_box(sums_of_squares(&grads));
    });
    let copy = secs(|| {
        first.par_chunks_mut(CHUNK).zip(second.par_chunks(CHUNK)).for_each(|(to, from)| to.copy_from_slice(from));
    });
    let rate = |bytes: usize, secs: f64| (bytes * count) as f64 / secs / 1e9;
    println!("{count} values, {} threads", rayon::current_num_threads());
    println!("AdamW            {:7.1} ms  {:6.1} GB/s of 28 bytes a value", 1e3 * adamw, rate(28, adamw));
    println!("norm             {:7.1} ms  {:6.1} GB/s of 4 bytes a value", 1e3 * norm, rate(4, norm));
    println!("copy             {:7.1} ms  {:6.1} GB/s of 8 bytes a value", 1e3 * copy, rate(8, copy));
}
