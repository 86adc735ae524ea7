//! AdamW over what this rank keeps of the store's flat buffers: clipping by the global norm, one step, its state.
//!
//! Moments are f32, one pair of buffers for each block, beside the values they belong to. All ranks make a step together, and
//! none does where a gradient of any is not finite.

use candle_core::{DType, Tensor};

use super::{Error, FlatBlock, ParamStore};
use crate::config::settings::OptimizerSettings;
use crate::ops::buffer;
use crate::optim::{AdamWStep, ParamGroup, adamw_step_groups, clip_coefficient, norm_of_parts, sums_of_squares};

/// Optimizer state of this rank.
#[derive(Debug)]
pub struct ShardedAdamW {
    settings: OptimizerSettings,
    /// Steps taken.
    step: u64,
    moments: Vec<Moments>,
}

/// Moments of one block.
#[derive(Debug)]
enum Moments {
    Host { first: Vec<f32>, second: Vec<f32> },
    Device { first: Tensor, second: Tensor },
}

impl Moments {
    fn zeros(flat: &FlatBlock) -> Result<Self, Error> {
        let (count, device) = (flat.own().len(), flat.values().device());
        if device.is_cpu() {
            return Ok(Self::Host { first: vec![0.0; count], second: vec![0.0; count] });
        }
        let zeros = || Tensor::zeros(count, DType::F32, device);
        Ok(Self::Device { first: zeros()?, second: zeros()? })
    }

    fn to_vecs(&self) -> Result<[Vec<f32>; 2], Error> {
        Ok(match self {
            Self::Host { first, second } => [first.clone(), second.clone()],
            Self::Device { first, second } => [buffer::to_vec(first)?, buffer::to_vec(second)?],
        })
    }
}

/// What one step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// L2 norm of all gradients before clipping, without the loss scale.
    pub grad_norm: f32,
    /// Whether the step was left out because a gradient was not finite.
    pub is_skipped: bool,
}

impl ShardedAdamW {
    /// Fresh state for the store's parameters.
    ///
    /// # Errors
    /// If memory runs out.
    pub fn new(settings: OptimizerSettings, store: &ParamStore) -> Result<Self, Error> {
        Ok(Self { settings, step: 0, moments: store.flats().map(Moments::zeros).collect::<Result<_, _>>()? })
    }

    /// Bytes of the moments.
    pub fn size_bytes(&self) -> usize {
        let count = |moments: &Moments| match moments {
            Moments::Host { first, .. } => first.len(),
            Moments::Device { first, .. } => first.elem_count(),
        };
        self.moments.iter().map(|m| 8 * count(m)).sum()
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// Divides the gradients by `loss_scale`, clips them to `max_grad_norm` (0: not at all) and moves the parameters.
    ///
    /// # Errors
    /// If a buffer is not where this optimizer works, or a setting is outside its range.
    pub fn step(
        &mut self,
        store: &ParamStore,
        lr: f64,
        max_grad_norm: f64,
        loss_scale: f64,
    ) -> Result<StepReport, Error> {
        let grad_norm = (norm_of_parts(&gradient_parts(store)?) / loss_scale) as f32;
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
            grad_scale: (f64::from(clip_coefficient(grad_norm, max_grad_norm)) / loss_scale) as f32,
        };
        for (flat, moments) in store.flats().zip(&mut self.moments) {
            if flat.is_empty() {
                continue;
            }
            let decay = |has_decay: bool| if has_decay { weight_decay } else { 0.0 };
            let groups: Vec<ParamGroup> = flat
                .own_pieces()
                .map(|piece| ParamGroup { weight_decay: decay(piece.has_decay), range: piece.range })
                .collect();
            if groups.is_empty() {
                continue;
            }
            let (values, grads) = (flat.own_values()?, flat.own_grads()?);
            match moments {
                Moments::Host { first, second } => {
                    let result = std::sync::Mutex::new(Ok(()));
                    buffer::update(&values, &grads, first, second, |values, grads, first, second| {
                        if let (Err(error), Ok(mut result)) =
                            (adamw_step_groups(values, grads, first, second, &groups, &hyper), result.lock())
                        {
                            *result = Err(error);
                        }
                    })?;
                    result.into_inner().unwrap_or(Ok(()))?;
                }
                Moments::Device { first, second } => {
                    super::device_optimizer::step(&values, &grads, first, second, &groups, &hyper)?;
                }
            }
        }
        store.share_values()?;
        Ok(StepReport { grad_norm, is_skipped: false })
    }

    /// Moments of each block, all of them, copied to the host of the first rank: first and second. The others help to gather
    /// them and get nothing.
    ///
    /// # Errors
    /// If the device failed or a rank is lost.
    pub fn collect(&self, store: &ParamStore) -> Result<Option<Vec<[Vec<f32>; 2]>>, Error> {
        let is_first = store.sharing().ranks().is_first();
        let mut all = Vec::new();
        for (flat, moments) in store.flats().zip(&self.moments) {
            if flat.is_whole() {
                all.extend(is_first.then(|| moments.to_vecs()).transpose()?);
                continue;
            }
            let [first, second] = moments.to_vecs()?.map(|own| store.sharing().collect(&own, flat.shards()));
            all.extend(first?.zip(second?).map(|(first, second)| [first, second]));
        }
        Ok(is_first.then_some(all))
    }

    /// Moments by parameter name with `exp_avg` and `exp_avg_sq` appended, for a checkpoint; `moments` as [`Self::collect`]
    /// gave them.
    pub fn state<'a>(
        store: &'a ParamStore,
        moments: &'a [[Vec<f32>; 2]],
    ) -> impl Iterator<Item = (String, &'a [f32], Vec<usize>)> {
        store.flats().zip(moments).flat_map(|(flat, [first, second])| {
            flat.entries().iter().flat_map(move |e| {
                [("exp_avg", first), ("exp_avg_sq", second)]
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
            let mut loaded = [vec![0.0; flat.len()], vec![0.0; flat.len()]];
            for e in flat.entries() {
                for (kind, target) in ["exp_avg", "exp_avg_sq"].into_iter().zip(&mut loaded) {
                    let name = format!("{}.{kind}", e.name);
                    match lookup(&name) {
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
            let own = flat.own();
            let [new_first, new_second] = loaded.map(|all| all[own.clone()].to_vec());
            match moments {
                Moments::Host { first, second } => (*first, *second) = (new_first, new_second),
                Moments::Device { first, second } => {
                    buffer::write(first, &new_first)?;
                    buffer::write(second, &new_second)?;
                }
            }
        }
        self.step = step;
        Ok(())
    }
}

/// The gradients' parts of their norm, in the order of the store, over all ranks.
fn gradient_parts(store: &ParamStore) -> Result<Vec<f64>, Error> {
    let own = own_parts(store)?;
    // Each rank has the parts of its shard of every block; where every rank has all, that is what they are.
    if store.flats().all(|flat| flat.is_empty() || flat.is_whole()) {
        return Ok(own.concat());
    }
    let counts: Vec<u8> = own.iter().flat_map(|parts| (parts.len() as u64).to_le_bytes()).collect();
    let values: Vec<u8> = own.iter().flatten().flat_map(|part| part.to_le_bytes()).collect();
    let ranks = store.sharing().ranks();
    let (counts, values) = (ranks.all_gather_bytes(&counts)?, ranks.all_gather_bytes(&values)?);
    let mut rests: Vec<&[u8]> = values.iter().map(Vec::as_slice).collect();
    let mut parts = Vec::new();
    for block in 0..own.len() {
        for (rest, counts) in rests.iter_mut().zip(&counts) {
            let count = counts.as_chunks::<8>().0.get(block).map_or(0, |count| u64::from_le_bytes(*count) as usize);
            let (now, later) = rest.split_at(rest.len().min(8 * count));
            parts.extend(now.as_chunks::<8>().0.iter().map(|part| f64::from_le_bytes(*part)));
            *rest = later;
        }
    }
    Ok(parts)
}

/// The same of this rank's gradients, by block.
fn own_parts(store: &ParamStore) -> Result<Vec<Vec<f64>>, Error> {
    if store.device().is_cuda() {
        return super::device_optimizer::gradient_parts(store);
    }
    let mut parts = Vec::new();
    for flat in store.flats().filter(|flat| !flat.is_empty()) {
        let grads = flat.own_grads()?;
        parts.push(buffer::read(&grads, |grads| {
            flat.own_pieces().flat_map(|piece| sums_of_squares(&grads[piece.range])).collect()
        })?);
    }
    Ok(parts)
}
