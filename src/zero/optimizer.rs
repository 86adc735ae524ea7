//! AdamW over the store's flat buffers: clipping by the global norm, one step, its state.
//!
//! Moments are f32, one pair of buffers for each block. A step with a non-finite gradient changes nothing and says so.

use super::{Error, ParamStore};
use crate::config::settings::OptimizerSettings;
use crate::ops::buffer;
use crate::optim::{AdamWStep, ParamGroup, adamw_step_groups, clip_coefficient, global_norm, tensor_norm};

/// Optimizer state of this rank.
#[derive(Clone, Debug)]
pub struct ShardedAdamW {
    settings: OptimizerSettings,
    /// Steps taken.
    step: u64,
    moments: Vec<Moments>,
}

#[derive(Clone, Debug, Default)]
struct Moments {
    first: Vec<f32>,
    second: Vec<f32>,
}

/// What one step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// L2 norm of all gradients before clipping.
    pub grad_norm: f32,
    /// Whether the step was left out because a gradient was not finite.
    pub is_skipped: bool,
}

impl ShardedAdamW {
    /// Fresh state for the store's parameters.
    pub fn new(settings: OptimizerSettings, store: &ParamStore) -> Self {
        let zeros = |n| Moments { first: vec![0.0; n], second: vec![0.0; n] };
        Self { settings, step: 0, moments: store.flats().map(|flat| zeros(flat.len())).collect() }
    }

    /// Bytes of the moments.
    pub fn size_bytes(&self) -> usize {
        self.moments.iter().map(|m| 4 * (m.first.len() + m.second.len())).sum()
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// Clips the gradients to `max_grad_norm` (0: not at all) and moves the parameters.
    ///
    /// # Errors
    /// If a buffer is not where this optimizer works.
    ///
    /// # Panics
    /// Never: the groups cover their buffers.
    pub fn step(&mut self, store: &ParamStore, lr: f64, max_grad_norm: f64) -> Result<StepReport, Error> {
        let mut norms = Vec::new();
        for flat in store.flats().filter(|f| !f.is_empty()) {
            buffer::read(flat.grads(), |grads| {
                norms.extend(flat.entries().iter().map(|e| tensor_norm(&grads[e.range.clone()], 2.0)));
            })?;
        }
        let grad_norm = global_norm([norms.as_slice()], 2.0);
        if !grad_norm.is_finite() {
            return Ok(StepReport { grad_norm, is_skipped: true });
        }
        self.step += 1;
        let OptimizerSettings { weight_decay, adam_beta1, adam_beta2, adam_epsilon } = self.settings;
        let hyper = AdamWStep {
            lr,
            beta1: adam_beta1,
            beta2: adam_beta2,
            eps: adam_epsilon,
            weight_decay,
            step: self.step,
            grad_scale: clip_coefficient(grad_norm, max_grad_norm),
        };
        for (flat, Moments { first, second }) in store.flats().zip(&mut self.moments) {
            if flat.is_empty() {
                continue;
            }
            let groups: Vec<ParamGroup> = flat
                .entries()
                .iter()
                .map(|e| ParamGroup {
                    range: e.range.clone(),
                    weight_decay: if e.has_decay { weight_decay } else { 0.0 },
                })
                .collect();
            buffer::update(flat.values(), flat.grads(), first, second, |values, grads, first, second| {
                adamw_step_groups(values, grads, first, second, &groups, &hyper)
                    .expect("the groups cover one buffer, the four buffers have one length");
            })?;
        }
        Ok(StepReport { grad_norm, is_skipped: false })
    }

    /// Moments by parameter name with `exp_avg` and `exp_avg_sq` appended, for a checkpoint.
    pub fn state<'a>(&'a self, store: &'a ParamStore) -> impl Iterator<Item = (String, &'a [f32], Vec<usize>)> {
        store.flats().zip(&self.moments).flat_map(|(flat, moments)| {
            flat.entries().iter().flat_map(move |e| {
                [("exp_avg", &moments.first), ("exp_avg_sq", &moments.second)]
                    .map(|(kind, values)| (format!("{}.{kind}", e.name), &values[e.range.clone()], e.shape.clone()))
            })
        })
    }

    /// Takes saved moments back; `lookup` gives the values saved under a name.
    ///
    /// # Errors
    /// If a parameter's moments are missing or of another size.
    pub fn load_state<'a>(
        &mut self,
        store: &ParamStore,
        step: u64,
        lookup: impl Fn(&str) -> Option<Vec<f32>> + 'a,
    ) -> Result<(), Error> {
        for (flat, moments) in store.flats().zip(&mut self.moments) {
            for e in flat.entries() {
                for (kind, target) in [("exp_avg", &mut moments.first), ("exp_avg_sq", &mut moments.second)] {
                    let name = format!("{}.{kind}", e.name);
                    let found = lookup(&name);
                    match found {
                        Some(values) if values.len() == e.range.len() => {
                            target[e.range.clone()].copy_from_slice(&values);
                        }
                        other => {
                            let found = other.map_or_else(|| "nothing".into(), |v| format!("{} values", v.len()));
                            return Err(Error::State { name, found, expected: format!("{} values", e.range.len()) });
                        }
                    }
                }
            }
        }
        self.step = step;
        Ok(())
    }
}
