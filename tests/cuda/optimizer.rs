//! AdamW against the CPU's, to the bit, and sums of squares in f64.

use candle_core::{DType, Device, Tensor};
use trainer::device::{array, download_f64, empty, matrix, upload_u32};
use trainer::kernels::AdamWFactors;
use trainer::kernels::cuda::{adamw, fill, sums_of_squares};
use trainer::optim::{AdamWStep, adamw_step};

use crate::padded::print_bandwidth;
use crate::support::{device, download, random, upload};

fn factors(hyper: &AdamWStep) -> AdamWFactors {
    AdamWFactors::checked(hyper).unwrap()
}

/// Gradients of all sizes, down to where their squares are denormal or nothing.
fn gradients(count: usize) -> Vec<f32> {
    let mut values = random("gradients", count);
    for (i, value) in values.iter_mut().enumerate() {
        match i % 7 {
            0 => *value = 0.0,
            1 => *value *= 1e-20,
            2 => *value *= 1e-23,
            3 => *value *= 1e6,
            4 => *value *= 1e-40,
            _ => {}
        }
    }
    values
}

#[test]
#[ignore = "gpu"]
fn steps_agree_with_the_cpu_to_the_bit() {
    let device = device();
    let count = 10_007;
    for range in [0..count, 0..1, 3..4099, 8..9000, 5..5, 4096..count] {
        let (mut values, mut first, mut second) = (random("values", count), vec![0.0; count], vec![0.0; count]);
        let tensors = [&values, &first, &second].map(|v| upload(&device, v, count, DType::F32));
        for step in 1..6 {
            let grads = gradients(count);
            let weight_decay = if step % 2 == 0 { 0.0 } else { 0.1 };
            let hyper =
                AdamWStep { lr: 3e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay, step, grad_scale: 0.37 };
            let [v, m, s] = [&mut values, &mut first, &mut second].map(|x| &mut x[range.clone()]);
            adamw_step(v, &grads[range.clone()], m, s, &hyper).unwrap();
            let grads = upload(&device, &grads, count, DType::F32);
            let [v, m, s] = [0, 1, 2].map(|i| array(&tensors[i]).unwrap());
            adamw(&device, v, array(&grads).unwrap(), m, s, range.clone(), factors(&hyper)).unwrap();
            for (what, tensor, want) in
                [("values", &tensors[0], &values), ("first", &tensors[1], &first), ("second", &tensors[2], &second)]
            {
                let got = download(tensor);
                let unlike = got.iter().zip(want).position(|(got, want)| got.to_bits() != want.to_bits());
                let pair = unlike.map(|i| (i, got[i], want[i]));
                assert_eq!(pair, None, "{what} of step {step} in {range:?}");
            }
        }
    }
}

#[test]
#[ignore = "gpu"]
fn infinities_and_what_is_no_number_stay_what_they_are() {
    let device = device();
    let grads = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30, -1e30, 0.0, -0.0, 1.0];
    let hyper = AdamWStep { lr: 0.1, beta1: 0.9, beta2: 0.99, eps: 0.0, weight_decay: 0.1, step: 3, grad_scale: 1.0 };
    let (mut values, mut first, mut second) = (vec![1.0; 8], vec![0.5; 8], vec![0.25; 8]);
    let tensors = [&values, &first, &second].map(|v| upload(&device, v, 8, DType::F32));
    let on_device = upload(&device, &grads, 8, DType::F32);
    adamw_step(&mut values, &grads, &mut first, &mut second, &hyper).unwrap();
    let [v, m, s] = [0, 1, 2].map(|i| array(&tensors[i]).unwrap());
    adamw(&device, v, array(&on_device).unwrap(), m, s, 0..8, factors(&hyper)).unwrap();
    for (tensor, want) in tensors.iter().zip([values, first, second]) {
        let got = download(tensor);
        let is_same = |(g, w): (&f32, &f32)| g.to_bits() == w.to_bits() || (g.is_nan() && w.is_nan());
        assert!(got.iter().zip(&want).all(is_same), "{got:?} {want:?}");
    }
}

fn sums(device: &Device, values: &Tensor, offsets: &[u32]) -> Vec<f64> {
    let entries = offsets.len() - 1;
    let sums = Tensor::from_vec(vec![f64::NAN; entries], entries, device).unwrap();
    let offsets = upload_u32(device, offsets).unwrap();
    let [sums_array, values, offsets] = [&sums, values, &offsets].map(|t| array(t).unwrap());
    sums_of_squares(device, sums_array, values, offsets).unwrap();
    download_f64(&sums).unwrap()
}

#[test]
#[ignore = "gpu"]
fn sums_of_squares_of_short_long_and_empty_entries() {
    let device = device();
    let chunk = 32 * 1024;
    let lengths: [&[usize]; 6] = [
        &[1],
        &[3, 0, 5, 0, 0, 7],
        &[chunk, chunk, 1],
        &[chunk - 1, 2, chunk, 0, 3 * chunk + 5, 1],
        &[7; 300],
        &[100_000, 13, 0, 250_001],
    ];
    for lengths in lengths {
        let mut offsets = vec![0u32];
        let mut end = 0;
        for &length in lengths {
            end += length;
            offsets.push(end as u32);
        }
        let values = random("values", end);
        let tensor = upload(&device, &values, end, DType::F32);
        let got = sums(&device, &tensor, &offsets);
        for (entry, (&got, bounds)) in got.iter().zip(offsets.windows(2)).enumerate() {
            let inside = &values[bounds[0] as usize..bounds[1] as usize];
            let want: f64 = inside.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
            assert!((got - want).abs() <= 1e-12 * want, "entry {entry} of {lengths:?}: {got}, expected {want}");
        }
        assert_eq!(got, sums(&device, &tensor, &offsets));
        // The same from an odd address.
        if end > 1 {
            let shifted = tensor.narrow(0, 1, end - 1).unwrap();
            let got = sums(&device, &shifted, &[0, (end - 1) as u32]);
            let want: f64 = values[1..].iter().map(|&v| f64::from(v) * f64::from(v)).sum();
            assert!((got[0] - want).abs() <= 1e-12 * want, "{lengths:?} from 1: {got:?}, expected {want}");
            // The bits of a sum are those of its values alone: shards of several ranks begin elsewhere.
            let alone = upload(&device, &values[1..], end - 1, DType::F32);
            assert_eq!(got, sums(&device, &alone, &[0, (end - 1) as u32]), "{lengths:?} from 1");
        }
    }
}

#[test]
#[ignore = "gpu"]
fn a_gradient_that_is_no_number_spoils_its_entry_alone() {
    let device = device();
    let mut values = vec![1.0; 100];
    (values[10], values[60]) = (f32::NAN, f32::INFINITY);
    let got = sums(&device, &upload(&device, &values, 100, DType::F32), &[0, 10, 50, 100]);
    assert!(got[0] == 10.0 && got[1].is_nan() && got[2] == f64::INFINITY, "{got:?}");
}

#[test]
#[ignore = "gpu"]
fn arguments_that_do_not_fit_are_named() {
    let device = device();
    let tensors = [8, 8, 8, 7].map(|n| Tensor::zeros(n, DType::F32, &device).unwrap());
    let [v, g, m, s] = [0, 1, 2, 3].map(|i| array(&tensors[i]).unwrap());
    let hyper = AdamWStep { lr: 0.1, beta1: 0.9, beta2: 0.99, eps: 0.1, weight_decay: 0.1, step: 3, grad_scale: 1.0 };
    let refused = adamw(&device, v, g, m, s, 0..8, factors(&hyper)).unwrap_err();
    assert!(refused.to_string().contains("`second`"), "{refused}");
}

#[test]
#[ignore = "gpu"]
fn bench_optimizer() {
    let device = device();
    let count = 1 << 28;
    let tensors = [(); 4].map(|()| empty(&device, count, DType::F32).unwrap());
    for tensor in &tensors {
        fill(&device, matrix(tensor).unwrap(), 0.5).unwrap();
    }
    let [v, g, m, s] = [0, 1, 2, 3].map(|i| array(&tensors[i]).unwrap());
    let hyper = AdamWStep { lr: 1e-4, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1, step: 3, grad_scale: 1.0 };
    print_bandwidth(&device, "adamw", 28 * count, || adamw(&device, v, g, m, s, 0..count, factors(&hyper)).unwrap());
    for length in [32 * 1024, 1000] {
        let offsets: Vec<u32> = (0..=count / length).map(|i| (i * length) as u32).collect();
        let sums = empty(&device, offsets.len() - 1, DType::F64).unwrap();
        let offsets = upload_u32(&device, &offsets).unwrap();
        let [sums, offsets] = [&sums, &offsets].map(|t| array(t).unwrap());
        print_bandwidth(&device, &format!("sums_of_squares of {length}"), 4 * count, || {
            sums_of_squares(&device, sums, g, offsets).unwrap();
        });
    }
}
