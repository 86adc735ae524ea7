//! Lion: the sign of an average of gradients.

use rayon::prelude::*;

use super::{AdamWStep, Error};

const CHUNK: usize = 16 * 1024;

/// Moves `params` by one step and updates the average in place.
///
/// # Shapes
/// All: f32 `[N]`.
/// # Errors
/// If lengths differ, `step` is 0, or a hyperparameter is outside its range.
/// # Equation
/// Chen et al. (2302.06675), program 1: `u = sign(b1 m + (1-b1) g); p *= 1 - lr wd; p -= lr u; m = b2 m + (1-b2) g`.
pub(super) fn step(params: &mut [f32], grads: &[f32], average: &mut [f32], hyper: &AdamWStep) -> Result<(), Error> {
    super::adamw::check(params.len(), grads.len(), average.len(), average.len(), hyper)?;
    let AdamWStep { lr, beta1, beta2, weight_decay, grad_scale, .. } = *hyper;
    let (keep, rate) = ((1.0 - lr * weight_decay) as f32, lr as f32);
    let (beta1, beta2, rest1, rest2) = (beta1 as f32, beta2 as f32, (1.0 - beta1) as f32, (1.0 - beta2) as f32);
    let chunks = params.par_chunks_mut(CHUNK).zip(grads.par_chunks(CHUNK)).zip(average.par_chunks_mut(CHUNK));
    chunks.for_each(|((params, grads), average)| {
        for ((param, &grad), m) in params.iter_mut().zip(grads).zip(average) {
            let grad = grad * grad_scale;
            let direction = beta1 * *m + rest1 * grad;
            // Not `signum`, which is 1 for 0.
            let sign = if direction > 0.0 {
                1.0
            } else if direction < 0.0 {
                -1.0
            } else {
                0.0
            };
            *param = *param * keep - rate * sign;
            *m = beta2 * *m + rest2 * grad;
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_as_long_as_the_rate_whatever_the_gradient() {
        let hyper =
            AdamWStep { lr: 0.1, beta1: 0.9, beta2: 0.99, eps: 0.0, weight_decay: 0.5, step: 1, grad_scale: 2.0 };
        let (mut params, mut average) = (vec![1.0, -2.0, 3.0, 0.5], vec![0.0; 4]);
        step(&mut params, &[1e-6, 5.0, -7.0, 0.0], &mut average, &hyper).unwrap();
        let expected = [0.85f32, -2.0, 2.95, 0.475];
        assert!(params.iter().zip(expected).all(|(got, want)| (got - want).abs() < 1e-6), "{params:?}");
        // The average has the sign now, against a small gradient of the other.
        step(&mut params, &[1e-9, -0.1, 0.1, 0.0], &mut average, &AdamWStep { step: 2, ..hyper }).unwrap();
        assert!(params[1] < -2.0 + 0.2 && params[2] > 2.9 - 0.1, "{params:?}");
        assert!((average[1] - (0.1 * 0.99 - 0.002)).abs() < 1e-6, "{average:?}");
    }
}
