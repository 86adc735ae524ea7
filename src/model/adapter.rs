//! Low-rank adapters on projections: which module has one, how it is scaled, how it starts.

use std::collections::BTreeMap;

use super::Error;
use super::params::BlockParams;
use super::peft::factor_names;
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
    let adapter = bind_adapter(params, module, settings)?;
    let bias: Option<Param> = optional("bias")?;
    Ok(Linear { weight: slot.weight.clone(), weight_grad: slot.grad.clone(), bias, adapter })
}

/// The adapter of `module`, if it has one.
pub(super) fn bind_adapter(
    params: &BlockParams,
    module: &str,
    settings: Option<&AdapterSettings>,
) -> Result<Option<Adapter>, Error> {
    let Some(&scaling) = settings.and_then(|s| s.scaling.get(module)) else { return Ok(None) };
    let [a, b] = factor_names(module);
    let magnitude = format!("{module}.lora_magnitude_vector");
    let magnitude = params.get(&magnitude).is_some().then(|| params.dense(&magnitude)).transpose()?;
    Ok(Some(Adapter { a: params.dense(&a)?, b: params.dense(&b)?, scaling: scaling as f32, magnitude }))
}
