//! What a checkpoint keeps of trained values and of the optimizer's state: each rank writes what its own optimizer moves, block after
//! block, into a file of its own, and reads what this run gives it, from the files of however many ranks.
//!
//! What every rank has (one rank, or `zero_stage: 0`) the first writes alone.

use std::collections::BTreeSet;
use std::ops::Range;

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

use super::session::Session;
use crate::checkpoint::{self, Checkpoint, Part, PartsWriter, Place, Tensors, Written};
use crate::ops::buffer;
use crate::ranks::{self, Ranks};
use crate::zero::{Entry, FlatBlock, ParamStore, ShardedOptimizer};

/// File of a checkpoint with all trained values and optimizer moments, f32, where one rank writes them.
pub(super) const TENSORS_FILE: &str = "trainer_state.safetensors";
/// What follows a parameter's name for the reference policy's values.
const REFERENCE_SUFFIX: &str = ".reference";
/// What may follow a parameter's name.
const SUFFIXES: [&str; 4] = [REFERENCE_SUFFIX, ".exp_avg", ".exp_avg_sq", ".momentum_buffer"];

/// The file of a rank among `world_size` that write one each.
fn shard_name(rank: usize, world_size: usize) -> String {
    format!("trainer_state-{:05}-of-{world_size:05}.safetensors", rank + 1)
}

/// Whether a file of a checkpoint is one of those that are written here.
pub(super) fn is_tensors_file(name: &str) -> bool {
    let numbers = name.strip_prefix("trainer_state-").and_then(|rest| rest.strip_suffix(".safetensors"));
    name == TENSORS_FILE || numbers.is_some_and(|numbers| numbers.contains("-of-"))
}

/// The values of a block that this rank writes.
fn written_range(flat: &FlatBlock, ranks: &dyn Ranks) -> Range<usize> {
    match flat.is_whole() {
        true if ranks.is_first() => 0..flat.len(),
        true => 0..0,
        false => flat.own(),
    }
}

/// An array of a parameter: its values, those of the reference, or one of the optimizer's.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Array {
    Values,
    Reference,
    Moment(usize),
}

/// The arrays there are, in the order in which they are written of a block.
fn arrays(store: &ParamStore) -> impl Iterator<Item = Array> + use<> {
    let reference = store.has_reference().then_some(Array::Reference);
    std::iter::once(Array::Values).chain(reference).chain([Array::Moment(0), Array::Moment(1)])
}

/// The name under which an array of a parameter is saved; `None` if its rule keeps none.
fn saved_name(optimizer: &ShardedOptimizer, entry: &Entry, array: Array) -> Option<String> {
    match array {
        Array::Values => Some(entry.name.clone()),
        Array::Reference => Some(format!("{}{REFERENCE_SUFFIX}", entry.name)),
        Array::Moment(index) => {
            optimizer.state_names(entry).get(index).map(|moment| format!("{}.{moment}", entry.name))
        }
    }
}

/// Bytes that all ranks write of trained values and the optimizer's state.
pub(super) fn all_bytes(store: &ParamStore, optimizer: &ShardedOptimizer) -> u64 {
    let of_entry = |entry: &Entry| {
        arrays(store).filter(|&array| saved_name(optimizer, entry, array).is_some()).count() * entry.range.len()
    };
    (size_of::<f32>() * store.flats().flat_map(FlatBlock::entries).map(of_entry).sum::<usize>()) as u64
}

/// Writes this rank's part into its file of the checkpoint in the making, whose `place` is asked for if it has one. No rank waits for
/// another.
///
/// # Errors
/// If the device failed, or the file cannot be written.
pub(super) fn write(
    place: impl FnOnce() -> Result<Place, checkpoint::Error>,
    session: &Session,
    optimizer: &ShardedOptimizer,
) -> anyhow::Result<Option<Written>> {
    let store = session.engine.store();
    let ranks = store.sharing().ranks();
    let mut parts = Vec::new();
    for flat in store.flats() {
        let range = written_range(flat, ranks);
        for array in arrays(store) {
            for (entry, inside) in flat.entries_in(&range) {
                let place = inside.start - entry.range.start..inside.end - entry.range.start;
                let name = saved_name(optimizer, entry, array);
                parts.extend(name.map(|name| Part { name, shape: entry.shape.clone(), range: place }));
            }
        }
    }
    if parts.is_empty() {
        return Ok(None);
    }
    let is_shared = store.flats().any(|flat| !flat.is_whole());
    let name = if is_shared { shard_name(ranks.rank(), ranks.world_size()) } else { TENSORS_FILE.into() };
    let mut file = PartsWriter::create(&place()?, &name, &parts)?;
    store.settle()?;
    let mut references = store.references();
    for (block, flat) in store.flats().enumerate() {
        let range = written_range(flat, ranks);
        let reference = references.next();
        if range.is_empty() {
            continue;
        }
        let mut put = |array: Array, values: &[f32]| {
            flat.entries_in(&range)
                .filter(|(entry, _)| saved_name(optimizer, entry, array).is_some())
                .try_for_each(|(_, inside)| file.write(&values[inside.start - range.start..inside.end - range.start]))
        };
        put(Array::Values, &buffer::to_vec(&flat.own_values()?)?)?;
        if let Some(reference) = reference {
            put(Array::Reference, &buffer::to_vec(&flat.own_part(&reference.tensor()?)?)?)?;
        }
        for (index, moment) in optimizer.own_state(store, block)?.iter().enumerate() {
            put(Array::Moment(index), moment)?;
        }
    }
    Ok(Some(file.finish()?))
}

/// What a rank tells the others of its part of a checkpoint.
#[derive(Serialize, Deserialize)]
enum Told {
    Written(Vec<Written>),
    Failed(String),
}

/// What all ranks have written, once all have said that it is complete.
///
/// # Errors
/// This rank's own, or that of the first rank that has one.
pub(super) fn agree(own: anyhow::Result<Option<Written>>, ranks: &dyn Ranks) -> anyhow::Result<Vec<Written>> {
    let told = match &own {
        Ok(written) => Told::Written(written.iter().cloned().collect()),
        Err(error) => Told::Failed(format!("{error:#}")),
    };
    let messages = match (ranks.all_gather_bytes(&serde_json::to_vec(&told)?), &own) {
        // The others may be gone, or elsewhere, because of what failed here, unless the folder went with them.
        (Err(error), Err(problem)) if !(error.is_of_peer() && is_of_missing(problem)) => {
            tracing::debug!("{error}");
            return own.map(|_| Vec::new());
        }
        (messages, _) => messages?,
    };
    let told: Vec<Told> = messages
        .iter()
        .enumerate()
        .map(|(peer, message)| {
            let told = serde_json::from_slice(message);
            told.with_context(|| format!("what rank {peer} says of its part of the checkpoint cannot be read"))
        })
        .collect::<Result<_, _>>()?;
    if told.iter().any(|told| matches!(told, Told::Failed(_))) {
        // Who ends before all know the reason is taken for it. If somebody has, there is a reason to give all the same.
        let _ = ranks.barrier();
    }
    own?;
    let mut all = Vec::new();
    for (peer, told) in told.into_iter().enumerate() {
        match told {
            Told::Written(written) => all.extend(written),
            Told::Failed(reason) => {
                let operation = "saving a checkpoint";
                let (rank, host) = (ranks.rank(), String::new());
                return Err(ranks::Error::PeerFailed { rank, peer, host, operation, reason }.into());
            }
        }
    }
    Ok(all)
}

/// Whether something was not where it was to be.
fn is_of_missing(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let is_missing = |error: &std::io::Error| error.kind() == std::io::ErrorKind::NotFound;
        matches!(cause.downcast_ref(), Some(checkpoint::Error::NotShared { .. }))
            || cause.downcast_ref().is_some_and(is_missing)
    })
}

/// Takes what this rank needs of the tensors in `files` into the store and the optimizer, which made `steps` steps.
///
/// # Errors
/// If a parameter is missing, has another shape, or is none of this run's; if a rank is lost or the device failed.
pub(super) fn read(
    checkpoint: &Checkpoint,
    files: &[String],
    session: &Session,
    optimizer: &mut ShardedOptimizer,
    steps: u64,
) -> anyhow::Result<()> {
    let place = checkpoint.path().display();
    let tensors = checkpoint.tensors(files)?;
    let store = session.engine.store();
    if let Some(name) = foreign(&tensors, store) {
        bail!(
            "`{place}` holds `{name}`, which this run does not train; resume with the model and adapter settings of that run"
        );
    }
    let take = |entry: &Entry, name: &str, start: usize, target: &mut [f32]| -> anyhow::Result<()> {
        let fits = tensors.shape(name) == Some(&entry.shape) && tensors.read(name, start, target)?;
        if !fits {
            let hint = if name.ends_with(REFERENCE_SUFFIX) { " (was it saved without a reference?)" } else { "" };
            bail!("`{place}` has no fitting `{name}`{hint}; resume with the model and adapter settings of that run");
        }
        Ok(())
    };
    for (block, flat) in store.flats().enumerate().filter(|(_, flat)| !flat.is_empty()) {
        // What is another rank's comes from there, or is not kept here.
        let fill = |range: Range<usize>, suffix: &str| {
            let mut all = vec![0.0; flat.len()];
            for (entry, inside) in flat.entries_in(&range) {
                let name = format!("{}{suffix}", entry.name);
                take(entry, &name, inside.start - entry.range.start, &mut all[inside])?;
            }
            Ok::<_, anyhow::Error>(all)
        };
        store.write_values(block, &fill(flat.own(), "")?)?;
        if store.has_reference() {
            let kept = if flat.has_all_values() { 0..flat.len() } else { flat.own() };
            store.write_reference(block, &fill(kept, REFERENCE_SUFFIX)?)?;
        }
    }
    optimizer.load_state(store, steps, |entry, array, start, target| {
        take(entry, &format!("{}.{array}", entry.name), start, target)
    })
}

/// A tensor of a parameter that this run does not train, if there is one.
fn foreign<'a>(tensors: &'a Tensors, store: &ParamStore) -> Option<&'a str> {
    let own: BTreeSet<&str> = store.flats().flat_map(FlatBlock::entries).map(|entry| entry.name.as_str()).collect();
    let is_known = |name: &str| {
        SUFFIXES.iter().find_map(|s| name.strip_suffix(s)).map_or_else(|| own.contains(name), |n| own.contains(n))
    };
    tensors.names().find(|name| !is_known(name))
}
