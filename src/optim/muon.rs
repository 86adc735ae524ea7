//! Muon: the momentum of a matrix, made orthogonal.

use super::{AdamWStep, Error};
use crate::kernels::cpu::matmul::{Matrix, Threads, multiply};

const MOMENTUM: f32 = 0.95;
const ITERATIONS: usize = 5;
/// Coefficients of the quintic iteration (Jordan 2024).
const COEFFICIENTS: (f32, f32, f32) = (3.4445, -4.7750, 2.0315);
const EPS: f32 = 1e-7;

/// Moves a matrix by one step and updates the momentum in place.
///
/// # Shapes
/// All: f32 `[rows, cols]`, row-major.
/// # Errors
/// If lengths differ, `step` is 0, or a hyperparameter is outside its range.
/// # Equation
/// Jordan (2024), in the form of `torch.optim.Muon` with Nesterov's momentum 0.95 and `adjust_lr_fn="match_rms_adamw"`:
/// `m += (g - m)(1-0.95); u = g + 0.95 (m - g); p *= 1 - lr wd; p -= lr 0.2 sqrt(max(rows, cols)) O(u)`, where `O` are five
/// Newton-Schulz steps `X = a X + (b A + c A A) X`, `A = X X^T`, from `u / |u|`. With the factor (Liu et al., 2502.16982, eq. 4)
/// learning rate and decay are those of AdamW. torch iterates in bf16, this in f32.
pub(super) fn step(
    params: &mut [f32],
    grads: &[f32],
    momentum: &mut [f32],
    (rows, cols): (usize, usize),
    hyper: &AdamWStep,
) -> Result<(), Error> {
    super::adamw::check(params.len(), grads.len(), momentum.len(), rows * cols, hyper)?;
    let mut update = Vec::with_capacity(grads.len());
    for (m, &grad) in momentum.iter_mut().zip(grads) {
        let grad = grad * hyper.grad_scale;
        *m += (grad - *m) * (1.0 - MOMENTUM);
        update.push(grad + (*m - grad) * MOMENTUM);
    }
    let direction = orthogonal(update, rows, cols);
    let keep = (1.0 - hyper.lr * hyper.weight_decay) as f32;
    let rate = (hyper.lr * 0.2 * (rows.max(cols) as f64).sqrt()) as f32;
    params.iter_mut().zip(direction).for_each(|(param, direction)| *param = *param * keep - rate * direction);
    Ok(())
}

/// The matrix with its singular values brought near 1.
fn orthogonal(mut x: Vec<f32>, rows: usize, cols: usize) -> Vec<f32> {
    let is_tall = rows > cols;
    // Products of the smaller side with itself.
    let (side, other) = (rows.min(cols), rows.max(cols));
    if is_tall {
        x = transposed(&x, rows, cols);
    }
    let norm = (x.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt() as f32).max(EPS);
    x.iter_mut().for_each(|v| *v /= norm);
    let (a, b, c) = COEFFICIENTS;
    let (mut gram, mut poly, mut next) = (vec![0.0; side * side], vec![0.0; side * side], vec![0.0; side * other]);
    for _ in 0..ITERATIONS {
        let wide = Matrix::new(&x, side, other);
        multiply(&mut gram, side, 0.0, 1.0, wide, wide.t(), Threads::All);
        poly.copy_from_slice(&gram);
        let square = Matrix::new(&gram, side, side);
        multiply(&mut poly, side, b, c, square, square, Threads::All);
        next.copy_from_slice(&x);
        multiply(&mut next, other, a, 1.0, Matrix::new(&poly, side, side), wide, Threads::All);
        std::mem::swap(&mut x, &mut next);
    }
    if is_tall { transposed(&x, cols, rows) } else { x }
}

fn transposed(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..cols).flat_map(|col| (0..rows).map(move |row| x[row * cols + col])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    #[test]
    fn singular_values_come_near_one_whatever_they_were() {
        let mut stream = Stream::new(9, "muon", 0, 0);
        for (rows, cols) in [(8, 24), (24, 8), (16, 16), (1, 10)] {
            let x: Vec<f32> = (0..rows * cols).map(|_| stream.normal() as f32 * 1e-3).collect();
            let y = orthogonal(x.clone(), rows, cols);
            // The trace of the Gram matrix is the sum of the squared singular values.
            let mean = y.iter().map(|v| v * v).sum::<f32>() / rows.min(cols) as f32;
            assert!((0.45..1.45).contains(&mean), "{rows}x{cols}: {mean}");
            let along: f32 = x.iter().zip(&y).map(|(x, y)| x * y).sum();
            assert!(along > 0.0);
            // The scale of what comes in does not count.
            let larger = orthogonal(x.iter().map(|v| v * 1024.0).collect(), rows, cols);
            assert!(y.iter().zip(&larger).all(|(y, z)| (y - z).abs() < 1e-4));
        }
        assert!(orthogonal(vec![0.0; 12], 3, 4).iter().all(|v| *v == 0.0));
    }

    #[test]
    fn two_steps_are_those_of_the_equation_in_f64() {
        let first = [0.3f32, -1.2, 0.5, 2.0, 1.0, 0.1, -0.7, 0.4, -0.2, 0.9, 1.5, -1.1];
        let second: Vec<f32> =
            [2, 1, 0].iter().flat_map(|row| first[4 * row..4 * row + 4].iter().map(|g| -0.5 * g)).collect();
        let hyper =
            AdamWStep { lr: 0.1, beta1: 0.9, beta2: 0.99, eps: 0.0, weight_decay: 0.01, step: 1, grad_scale: 1.0 };
        let (mut params, mut momentum) = (vec![1.0; 12], vec![0.0; 12]);
        step(&mut params, &first, &mut momentum, (3, 4), &hyper).unwrap();
        step(&mut params, &second, &mut momentum, (3, 4), &AdamWStep { step: 2, ..hyper }).unwrap();
        // By NumPy in f64; `torch.optim.Muon` 2.15 differs by up to 1.7e-3 (it iterates in bf16).
        let expected = [
            0.996_109_1,
            1.028_559_9,
            1.013_522,
            0.956_770_9,
            1.004_335_1,
            1.005_101_1,
            1.001_600_9,
            0.993_053_5,
            1.004_580_8,
            0.972_246_3,
            0.986_506_9,
            1.036_483_3f32,
        ];
        assert!(params.iter().zip(expected).all(|(got, want)| (got - want).abs() < 2e-6), "{params:?}");
    }

    #[test]
    fn a_step_has_the_size_that_adamw_has() {
        let hyper =
            AdamWStep { lr: 0.1, beta1: 0.9, beta2: 0.99, eps: 0.0, weight_decay: 0.0, step: 1, grad_scale: 1.0 };
        let mut stream = Stream::new(10, "muon", 0, 0);
        let grads: Vec<f32> = (0..64 * 256).map(|_| stream.normal() as f32).collect();
        let (mut params, mut momentum) = (vec![0.0; grads.len()], vec![0.0; grads.len()]);
        step(&mut params, &grads, &mut momentum, (64, 256), &hyper).unwrap();
        let rms = (params.iter().map(|p| p * p).sum::<f32>() / params.len() as f32).sqrt();
        assert!((0.012..0.028).contains(&rms), "{rms}: AdamW moves by 0.2 to 0.4 of the rate");
        assert!(step(&mut params, &grads, &mut momentum, (64, 255), &hyper).is_err());
    }
}
