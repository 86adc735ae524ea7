//! Writing models: the adapter in PEFT's format or the whole model in Hugging Face's, and back into a run's state.

use std::path::Path;

use candle_core::DType;

use super::session::Session;
use crate::model::params::{BlockParams, Slot};
use crate::model::save::{save_generation_config, save_model};
use crate::model::{self};
use crate::quant::Weight;

/// Size up to which one safetensors file holds the whole model, as Hugging Face's default.
const SHARD_BYTES: usize = 5_000_000_000;

/// What is saved of a model, on the rank that writes.
pub(super) enum Collected {
    /// The trained values of each block, beside a base model that stays as it is.
    Adapter(Vec<Vec<f32>>),
    /// The parameters of all blocks.
    Whole(Vec<BlockParams>),
}

/// Gathers what was trained on the first rank; the others help and get nothing.
///
/// # Errors
/// If a rank is lost or the device failed.
pub(super) fn collect(session: &Session) -> anyhow::Result<Option<Collected>> {
    let store = session.engine.store();
    Ok(match session.adapter_spec {
        Some(_) => store.collect_values()?.map(Collected::Adapter),
        None => store.collect_params()?.map(Collected::Whole),
    })
}

/// Writes what was trained into `folder`, with the tokenizer beside it: an adapter that PEFT loads, or a model folder
/// that transformers loads.
///
/// # Errors
/// If a file cannot be written.
pub(super) fn write_model(folder: &Path, session: &Session, collected: &Collected) -> anyhow::Result<()> {
    match collected {
        Collected::Adapter(values) => write_adapter(folder, session, values)?,
        Collected::Whole(blocks) => write_whole_model(folder, session, blocks)?,
    }
    session.tokenizer.save(folder, session.template.as_ref().map(crate::data::ChatTemplate::source))?;
    let special = session.tokenizer.special();
    save_generation_config(folder, &session.folder, &special.eos, special.pad)?;
    Ok(())
}

fn write_adapter(folder: &Path, session: &Session, values: &[Vec<f32>]) -> anyhow::Result<()> {
    let Some(mut spec) = session.adapter_spec.clone() else { return Ok(()) };
    for (flat, values) in session.engine.store().flats().zip(values) {
        for entry in flat.entries() {
            spec.set(&entry.name, &entry.shape, &values[entry.range.clone()])?;
        }
    }
    Ok(spec.save(folder)?)
}

fn write_whole_model(folder: &Path, session: &Session, blocks: &[BlockParams]) -> anyhow::Result<()> {
    let engine = &session.engine;
    // As transformers aligns them: the configuration names the tokenizer's end-of-sequence token.
    let mut config = engine.config().clone();
    let special = session.tokenizer.special();
    if special.strings.contains_key("eos_token") {
        config.eos_token_ids = special.eos.iter().take(1).copied().collect();
    }
    let config = &config;
    let dtype = config.torch_dtype.unwrap_or(DType::F32);
    save_model(folder, config, dtype, SHARD_BYTES, |name| {
        let slot: Option<&Slot> = blocks.iter().find_map(|block| block.get(name));
        match slot.map(|slot| &slot.weight) {
            Some(Weight::Dense(tensor)) => Ok(tensor.clone()),
            Some(packed) => Ok(packed.dequantize().map_err(crate::ops::Error::from)?),
            None => Err(model::Error::MissingParameter { name: name.into() }),
        }
    })?;
    Ok(())
}
