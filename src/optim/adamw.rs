//! AdamW over flat slices.
//!
//! Called once per optimizer step for the shard of parameters that this rank owns. Every element is updated from its
//! own four numbers only, so the result does not depend on how the slice is cut over threads or ranks.

use std::ops::Range;

use rayon::prelude::*;

use super::Error;
use crate::kernels::AdamWFactors;
use crate::kernels::cpu::vector;

/// Elements that one task updates; small enough to stay in the second-level cache (4 slices of 64 KiB).
const CHUNK: usize = 16 * 1024;

/// The numbers of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// Learning rate of this step, from the schedule.
    pub lr: f64,
    /// Decay of the first moment, in [0, 1).
    pub beta1: f64,
    /// Decay of the second moment, in [0, 1).
    pub beta2: f64,
    /// Added to the root of the bias-corrected second moment.
    pub eps: f64,
    /// Decoupled weight decay, per unit of learning rate.
    pub weight_decay: f64,
    /// Number of this step, counted from 1. Steps skipped for an overflow do not count.
    pub step: u64,
    /// Factor on every gradient before it is used: the clipping coefficient over the loss scale; 1 leaves them.
    pub grad_scale: f32,
}

/// A stretch of the flat parameters with a weight decay of its own (0 for biases and norm weights).
#[derive(Clone, Debug, PartialEq)]
pub struct ParamGroup {
    /// Which elements.
    pub range: Range<usize>,
    /// Weight decay of these elements.
    pub weight_decay: f64,
}

/// Moves `params` by one step of AdamW and updates both moments in place.
///
/// # Shapes
/// All four slices: f32 `[N]`, the same shard.
/// # Errors
/// If lengths differ, `step` is 0, or a hyperparameter is outside its range.
/// # Equation
/// Loshchilov and Hutter (1711.05101), algorithm 2 with a schedule multiplier of `lr`, in the form of `torch.optim.AdamW`:
/// `p *= 1 - lr*wd; m += (g-m)(1-b1); v = v*b2 + g*g*(1-b2); p -= lr/(1-b1^t) * m / (sqrt(v)/sqrt(1-b2^t) + eps)`.
/// The decay is applied before the gradient step and `eps` after the bias correction of `v`.
pub fn adamw_step(
    params: &mut [f32],
    grads: &[f32],
    first_moment: &mut [f32],
    second_moment: &mut [f32],
    hyper: &AdamWStep,
) -> Result<(), Error> {
    check(params.len(), grads.len(), first_moment.len(), second_moment.len(), hyper)?;
    update(params, grads, first_moment, second_moment, &AdamWFactors::new(hyper));
    Ok(())
}

/// As [`adamw_step`], with the weight decay of each group in place of `hyper.weight_decay`.
///
/// # Errors
/// As [`adamw_step`], or if the groups do not cover the parameters in order.
pub fn adamw_step_groups(
    params: &mut [f32],
    grads: &[f32],
    first_moment: &mut [f32],
    second_moment: &mut [f32],
    groups: &[ParamGroup],
    hyper: &AdamWStep,
) -> Result<(), Error> {
    check(params.len(), grads.len(), first_moment.len(), second_moment.len(), hyper)?;
    let total = params.len();
    let gap = |index, range: &Range<usize>, expected| Error::Groups {
        index,
        start: range.start,
        end: range.end,
        expected,
        total,
    };
    let mut covered = 0;
    for (index, group) in groups.iter().enumerate() {
        let Range { start, end } = group.range;
        if start != covered || end < start || end > total {
            return Err(gap(index, &group.range, covered));
        }
        check_range("weight_decay", group.weight_decay, group.weight_decay >= 0.0, "0 or more")?;
        covered = end;
    }
    if covered != total {
        return Err(gap(groups.len(), &(total..total), covered));
    }
    for group in groups {
        let factors = AdamWFactors::new(&AdamWStep { weight_decay: group.weight_decay, ..*hyper });
        let range = group.range.clone();
        update(
            &mut params[range.clone()],
            &grads[range.clone()],
            &mut first_moment[range.clone()],
            &mut second_moment[range],
            &factors,
        );
    }
    Ok(())
}

impl AdamWFactors {
    /// The scalars of a step whose settings are within their ranges.
    ///
    /// # Errors
    /// If one is not.
    pub fn checked(hyper: &AdamWStep) -> Result<Self, Error> {
        check(0, 0, 0, 0, hyper)?;
        Ok(Self::new(hyper))
    }

    fn new(hyper: &AdamWStep) -> Self {
        let step = hyper.step as f64;
        Self {
            grad_scale: hyper.grad_scale,
            keep: (1.0 - hyper.lr * hyper.weight_decay) as f32,
            first_weight: (1.0 - hyper.beta1) as f32,
            second_decay: hyper.beta2 as f32,
            second_weight: (1.0 - hyper.beta2) as f32,
            step_size: (hyper.lr / (1.0 - hyper.beta1.powf(step))) as f32,
            root_correction: (1.0 - hyper.beta2.powf(step)).sqrt() as f32,
            eps: hyper.eps as f32,
        }
    }
}

fn update(params: &mut [f32], grads: &[f32], first: &mut [f32], second: &mut [f32], factors: &AdamWFactors) {
    params
        .par_chunks_mut(CHUNK)
        .zip(grads.par_chunks(CHUNK))
        .zip(first.par_chunks_mut(CHUNK))
        .zip(second.par_chunks_mut(CHUNK))
        .for_each(|(((params, grads), first), second)| update_chunk(params, grads, first, second, factors));
}

/// One chunk.
pub(super) fn update_chunk(
    params: &mut [f32],
    grads: &[f32],
    first: &mut [f32],
    second: &mut [f32],
    factors: &AdamWFactors,
) {
    vector::adamw(params, grads, first, second, *factors);
}

pub(super) fn check(params: usize, grads: usize, first: usize, second: usize, hyper: &AdamWStep) -> Result<(), Error> {
    for (what, got) in [("grads", grads), ("first_moment", first), ("second_moment", second)] {
        if got != params {
            return Err(Error::Length { what, got, expected: params });
        }
    }
    if hyper.step == 0 {
        return Err(Error::StepZero);
    }
    check_range("learning_rate", hyper.lr, hyper.lr >= 0.0 && hyper.lr.is_finite(), "0 or more and finite")?;
    check_range("adam_beta1", hyper.beta1, (0.0..1.0).contains(&hyper.beta1), "in [0, 1)")?;
    check_range("adam_beta2", hyper.beta2, (0.0..1.0).contains(&hyper.beta2), "in [0, 1)")?;
    check_range("adam_epsilon", hyper.eps, hyper.eps >= 0.0, "0 or more")?;
    check_range("weight_decay", hyper.weight_decay, hyper.weight_decay >= 0.0, "0 or more")
}

fn check_range(name: &'static str, value: f64, is_inside: bool, expected: &'static str) -> Result<(), Error> {
    if is_inside { Ok(()) } else { Err(Error::Hyperparameter { name, value, expected }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    const HYPER: AdamWStep =
        AdamWStep { lr: 1e-2, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1, step: 1, grad_scale: 1.0 };

    fn noise(name: &str, count: usize) -> Vec<f32> {
        let mut stream = Stream::new(11, name, 0, 0);
        (0..count).map(|_| stream.normal() as f32).collect()
    }

    #[test]
    fn the_first_step_moves_each_element_by_the_learning_rate_against_its_gradient() {
        let (mut params, mut m, mut v) = (vec![1.0f32, -1.0, 0.5], vec![0.0; 3], vec![0.0; 3]);
        let hyper = AdamWStep { weight_decay: 0.0, ..HYPER };
        adamw_step(&mut params, &[3.0, -0.25, 0.0], &mut m, &mut v, &hyper).unwrap();
        for (got, expected) in params.iter().zip([0.99, -0.99, 0.5]) {
            assert!((got - expected).abs() < 1e-6, "{got} {expected}");
        }
    }

    #[test]
    fn the_result_is_the_same_to_the_bit_for_any_number_of_threads() {
        let count = 3 * CHUNK + 77;
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let (mut params, grads) = (noise("params", count), noise("grads", count));
                let (mut m, mut v) = (vec![0.0; count], vec![0.0; count]);
                for step in 1..4 {
                    adamw_step(&mut params, &grads, &mut m, &mut v, &AdamWStep { step, ..HYPER }).unwrap();
                }
                (params, m, v)
            })
        };
        let one = run(1);
        assert_eq!(one, run(2));
        assert_eq!(one, run(7));
    }

    #[test]
    fn cutting_the_slice_into_shards_changes_nothing() {
        let (mut whole, grads) = (noise("params", 100), noise("grads", 100));
        let mut parts = whole.clone();
        let (mut m, mut v, mut pm, mut pv) = (vec![0.0; 100], vec![0.0; 100], vec![0.0; 100], vec![0.0; 100]);
        adamw_step(&mut whole, &grads, &mut m, &mut v, &HYPER).unwrap();
        for range in [0..33, 33..34, 34..100] {
            adamw_step(
                &mut parts[range.clone()],
                &grads[range.clone()],
                &mut pm[range.clone()],
                &mut pv[range],
                &HYPER,
            )
            .unwrap();
        }
        assert_eq!((whole, m, v), (parts, pm, pv));
    }

    #[test]
    fn each_group_has_its_own_decay() {
        let (mut params, grads) = (vec![2.0f32; 4], vec![0.0f32; 4]);
        let (mut m, mut v) = (vec![0.0; 4], vec![0.0; 4]);
        let groups = [ParamGroup { range: 0..3, weight_decay: 0.5 }, ParamGroup { range: 3..4, weight_decay: 0.0 }];
        adamw_step_groups(&mut params, &grads, &mut m, &mut v, &groups, &HYPER).unwrap();
        assert_eq!(params, [1.99, 1.99, 1.99, 2.0]);
        let short = adamw_step_groups(&mut params, &grads, &mut m, &mut v, &groups[..1], &HYPER);
        assert_eq!(short, Err(Error::Groups { index: 1, start: 4, end: 4, expected: 3, total: 4 }));
        let overlap = [ParamGroup { range: 0..3, weight_decay: 0.5 }, ParamGroup { range: 2..4, weight_decay: 0.0 }];
        let refused = adamw_step_groups(&mut params, &grads, &mut m, &mut v, &overlap, &HYPER);
        assert_eq!(refused, Err(Error::Groups { index: 1, start: 2, end: 4, expected: 3, total: 4 }));
    }

    #[test]
    fn grad_scale_is_the_same_as_scaled_gradients() {
        let (mut left, grads) = (noise("params", 50), noise("grads", 50));
        let mut right = left.clone();
        let halved: Vec<f32> = grads.iter().map(|g| g * 0.5).collect();
        let (mut m, mut v, mut rm, mut rv) = (vec![0.0; 50], vec![0.0; 50], vec![0.0; 50], vec![0.0; 50]);
        adamw_step(&mut left, &grads, &mut m, &mut v, &AdamWStep { grad_scale: 0.5, ..HYPER }).unwrap();
        adamw_step(&mut right, &halved, &mut rm, &mut rv, &HYPER).unwrap();
        assert_eq!((left, m, v), (right, rm, rv));
    }

    #[test]
    fn wrong_lengths_and_values_are_refused_and_change_nothing() {
        let (mut params, mut m, mut v) = (vec![1.0f32; 2], vec![0.0; 2], vec![0.0; 2]);
        let length = adamw_step(&mut params, &[1.0], &mut m, &mut v, &HYPER);
        assert_eq!(length, Err(Error::Length { what: "grads", got: 1, expected: 2 }));
        let zero = adamw_step(&mut params, &[1.0; 2], &mut m, &mut v, &AdamWStep { step: 0, ..HYPER });
        assert_eq!(zero, Err(Error::StepZero));
        for hyper in [
            AdamWStep { lr: f64::NAN, ..HYPER },
            AdamWStep { beta1: 1.0, ..HYPER },
            AdamWStep { beta2: -0.1, ..HYPER },
            AdamWStep { weight_decay: -1.0, ..HYPER },
        ] {
            let refused = adamw_step(&mut params, &[1.0; 2], &mut m, &mut v, &hyper);
            assert!(matches!(refused, Err(Error::Hyperparameter { .. })), "{hyper:?}");
        }
        assert_eq!(params, [1.0; 2]);
    }
}
