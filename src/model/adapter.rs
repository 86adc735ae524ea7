//! Low-rank adapters on projections: which module has one, how it is scaled, how it starts.

use std::collections::BTreeMap;

use super::Error;
use super::params::BlockParams;
use crate::ops::Param;
use crate::ops::linear::{Adapter, Linear};

/// Adapters of a model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AdapterSettings {
    /// `alpha / r` (or `alpha / sqrt(r)`) by module, e.g. `model.layers.0.self_attn.q_proj`.
    pub scaling: BTreeMap<String, f64>,
    /// Probability of dropping an element of an adapter's input while training.
    pub dropout: f64,
}

/// The projection `module` with its bias and adapter, as far as the block has them.
pub(super) fn bind_linear(
    params: &BlockParams,
    module: &str,
    settings: Option<&AdapterSettings>,
) -> Result<Linear, Error> {
    let slot = params.slot(&format!("{module}.weight"))?;
    let optional = |name: &str| {
        let name = format!("{module}.{name}");
        params.get(&name).is_some().then(|| params.dense(&name)).transpose()
    };
    let adapter = match settings.and_then(|s| s.scaling.get(module)) {
        None => None,
        Some(&scaling) => Some(Adapter {
            a: params.dense(&format!("{module}.lora_A.weight"))?,
            b: params.dense(&format!("{module}.lora_B.weight"))?,
            scaling: scaling as f32,
            magnitude: optional("lora_magnitude_vector")?,
        }),
    };
    let bias: Option<Param> = optional("bias")?;
    Ok(Linear { weight: slot.weight.clone(), weight_grad: slot.grad.clone(), bias, adapter })
}
