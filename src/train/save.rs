//! Writing models: the adapter in PEFT's format or the whole model in Hugging Face's, and back into a run's state.
//!
//! The first rank writes. Parameters that are cut into shards come to it one after the other, so that no rank ever has more than
//! one of a model's whole; an adapter is put together there.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use anyhow::bail;
use candle_core::{DType, Device, Tensor};

use super::session::Session;
use crate::model::save::{save_generation_config, save_model};
use crate::model::{self};
use crate::ops::buffer;
use crate::ranks::{self, Ranks};
use crate::zero::{Entry, FlatBlock, ParamStore};

/// Size up to which one safetensors file holds the whole model, as Hugging Face's default.
const SHARD_BYTES: usize = 5_000_000_000;

/// Trained parameters on their way to the first rank, in an order that all ranks know.
struct Parameters<'a> {
    store: &'a ParamStore,
    rest: std::vec::IntoIter<(&'a FlatBlock, &'a Entry)>,
    /// The values of the block that was asked for last, which may have come from a file.
    last: Option<(&'a FlatBlock, Tensor)>,
    /// Whether the others were told on the first rank that it does not go on.
    is_over: bool,
}

/// What a rank sends in place of its part of a parameter that it cannot read: no part is one byte long.
const FAILED: &[u8] = &[0];

impl<'a> Parameters<'a> {
    /// Those of an adapter as blocks have them, those of a whole model as a file has them.
    fn of(session: &'a Session) -> anyhow::Result<Self> {
        let store = session.engine.store();
        store.settle()?;
        let all = store.flats().flat_map(|flat| flat.entries().iter().map(move |entry| (flat, entry)));
        let order: Vec<_> = if session.adapter_spec.is_some() {
            all.collect()
        } else {
            let by_name: BTreeMap<&str, _> = all.map(|(flat, entry)| (entry.name.as_str(), (flat, entry))).collect();
            let find =
                |name: String| by_name.get(name.as_str()).copied().ok_or(model::Error::MissingParameter { name });
            session.engine.config().tensors().into_iter().map(|tensor| find(tensor.name)).collect::<Result<_, _>>()?
        };
        Ok(Self { store, rest: order.into_iter(), last: None, is_over: false })
    }

    fn ranks(&self) -> &'a dyn Ranks {
        self.store.sharing().ranks()
    }

    /// What this rank has of a parameter.
    fn kept(&mut self, flat: &'a FlatBlock, entry: &Entry) -> anyhow::Result<Vec<f32>> {
        let own = if flat.has_all_values() { 0..flat.len() } else { flat.own() };
        let kept = inside(entry, &own);
        if kept.is_empty() {
            return Ok(Vec::new());
        }
        let values = match self.last.take() {
            Some((last, values)) if std::ptr::eq(last, flat) => values,
            _ => flat.values()?,
        };
        let (_, values) = self.last.insert((flat, values));
        Ok(buffer::to_vec(&values.narrow(0, kept.start - own.start, kept.len())?)?)
    }

    /// On the first rank: the next parameter with all its values.
    fn next(&mut self) -> anyhow::Result<Option<(&'a Entry, Vec<f32>)>> {
        let Some((flat, entry)) = self.rest.next() else { return Ok(None) };
        let own = self.kept(flat, entry);
        if flat.has_all_values() {
            return Ok(Some((entry, own?)));
        }
        let own = match own {
            Ok(own) => bytes_of(own),
            Err(error) => {
                // The others send this one in any case.
                self.is_over = true;
                self.exchange(Vec::new(), false)?;
                return Err(error);
            }
        };
        let mut parts = self.exchange(own, true)?;
        if let Some(peer) = parts.iter().position(|part| part == FAILED) {
            bail!("rank {peer} could not read its part of `{}`; its own message says why", entry.name);
        }
        for ((peer, part), shard) in parts.iter_mut().enumerate().zip(flat.shards()) {
            let (got, expected) = (part.len(), size_of::<f32>() * inside(entry, shard).len());
            if got != expected {
                let problem = format!("{got} bytes of `{}`, expected {expected}", entry.name);
                return Err(ranks::Error::Message { peer, what: "values", problem }.into());
            }
        }
        let parts = parts.concat();
        Ok(Some((entry, parts.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect())))
    }

    /// On the first rank, which writes no more: the others need not send the rest.
    fn end(mut self) -> anyhow::Result<()> {
        match self.rest.find(|(flat, _)| !flat.has_all_values()) {
            Some(_) if !self.is_over => self.exchange(Vec::new(), false).map(drop),
            _ => Ok(()),
        }
    }

    /// On the other ranks: sends what the first does not have, for as long as it writes. One that cannot says so, and goes on until
    /// all are told to end.
    fn send(mut self) -> anyhow::Result<()> {
        let mut problem = None;
        while let Some((flat, entry)) = self.rest.find(|(flat, _)| !flat.has_all_values()) {
            let own = match self.kept(flat, entry) {
                Ok(own) if problem.is_none() => bytes_of(own),
                Ok(_) => FAILED.to_vec(),
                Err(error) => {
                    problem.get_or_insert(error);
                    FAILED.to_vec()
                }
            };
            let heard = self.exchange(own, true)?;
            if heard.first().is_none_or(|word| *word != [1]) {
                break;
            }
        }
        problem.map_or(Ok(()), Err)
    }

    /// One parameter's parts go to the first rank, and its word whether it goes on to the others.
    fn exchange(&self, own: Vec<u8>, goes_on: bool) -> anyhow::Result<Vec<Vec<u8>>> {
        let ranks = self.ranks();
        let word = if ranks.is_first() { vec![u8::from(goes_on)] } else { Vec::new() };
        let mut messages = vec![word; ranks.world_size()];
        messages[0] = own;
        Ok(ranks.all_to_all_bytes(messages)?)
    }
}

/// Values as they travel.
fn bytes_of(values: Vec<f32>) -> Vec<u8> {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}

/// The values of a parameter that are in a range of its block's.
fn inside(entry: &Entry, range: &Range<usize>) -> Range<usize> {
    let start = entry.range.start.max(range.start);
    start..entry.range.end.min(range.end).max(start)
}

/// What the other ranks do while the first is in [`write_model`].
///
/// # Errors
/// If a rank is lost or the device failed.
pub(super) fn help_to_write(session: &Session) -> anyhow::Result<()> {
    Parameters::of(session)?.send()
}

/// Writes what was trained into `folder`, with the tokenizer beside it: an adapter that PEFT loads, or a model folder
/// that transformers loads. The first rank does; the others are in [`help_to_write`] meanwhile, and have left it if this fails for
/// a reason that is the first rank's own.
///
/// # Errors
/// If a file cannot be written, a rank is lost or the device failed.
pub(super) fn write_model(folder: &Path, session: &Session) -> anyhow::Result<()> {
    let mut parameters = Parameters::of(session)?;
    let written = match session.adapter_spec {
        Some(_) => write_adapter(folder, session, &mut parameters),
        None => write_whole_model(folder, session, &mut parameters),
    };
    let is_of_ranks = |error: &anyhow::Error| error.chain().any(|cause| cause.downcast_ref::<ranks::Error>().is_some());
    if !written.as_ref().is_err_and(is_of_ranks) {
        parameters.end()?;
    }
    written?;
    session.tokenizer.save(folder, session.template.as_ref().map(crate::data::ChatTemplate::source))?;
    let special = session.tokenizer.special();
    save_generation_config(folder, &session.folder, &special.eos, special.pad)?;
    Ok(())
}

fn write_adapter(folder: &Path, session: &Session, parameters: &mut Parameters<'_>) -> anyhow::Result<()> {
    let Some(mut spec) = session.adapter_spec.clone() else { return Ok(()) };
    while let Some((entry, values)) = parameters.next()? {
        spec.set(&entry.name, &entry.shape, &values)?;
    }
    Ok(spec.save(folder)?)
}

fn write_whole_model(folder: &Path, session: &Session, parameters: &mut Parameters<'_>) -> anyhow::Result<()> {
    let engine = &session.engine;
    // As transformers aligns them: the configuration names the tokenizer's end-of-sequence token.
    let mut config = engine.config().clone();
    let special = session.tokenizer.special();
    if special.strings.contains_key("eos_token") {
        config.eos_token_ids = special.eos.iter().take(1).copied().collect();
    }
    let dtype = config.torch_dtype.unwrap_or(DType::F32);
    save_model(folder, &config, dtype, SHARD_BYTES, |name| match parameters.next()? {
        // They are asked for in the order of the configuration.
        Some((entry, values)) if entry.name == name => {
            Ok(Tensor::from_vec(values, entry.shape.as_slice(), &Device::Cpu)?)
        }
        _ => Err(anyhow::Error::from(model::Error::MissingParameter { name: name.into() })),
    })?;
    Ok(())
}
