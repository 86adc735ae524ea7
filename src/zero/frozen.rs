//! A block's weights that are not trained: where blocks compute, or away from there until they are asked for.
//!
//! What is away lies in runs of bytes, one for each type of number, of which each rank has an equal part: in the memory that it
//! is computed with where ranks share it, in host memory or a file where it is offloaded. It comes as it is: nothing is unpacked.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::files::Reading;
use super::link::Waiting;
use super::{Coming, Error, Link, Sharing};
use crate::device::{Buffer, Place, Ticket, empty};
use crate::fs::Bytes;
use crate::quant::{self, DeviceForm, Form, Weight};

/// Bytes at a multiple of which an array begins in a run, and the part of a rank.
const ALIGNMENT: usize = 64;

/// Weights by name.
#[derive(Debug)]
pub(super) struct Frozen {
    /// Those that are there.
    here: BTreeMap<String, Weight>,
    away: Option<Away>,
}

/// The others.
#[derive(Debug)]
struct Away {
    weights: BTreeMap<String, Placed>,
    runs: Vec<Run>,
}

#[derive(Debug)]
struct Placed {
    form: Form,
    /// What stays on the GPU that computes with it.
    on_device: Option<DeviceForm>,
    /// Its arrays: which run, and which of its values.
    arrays: Vec<(usize, Range<usize>)>,
    /// Its values.
    count: usize,
    kind_name: String,
}

/// Arrays of one type, one behind the other.
#[derive(Debug)]
struct Run {
    dtype: DType,
    /// Bytes over all ranks.
    len: usize,
    /// This rank's part.
    own: Waiting,
}

/// Bytes of a run that come from a file.
#[derive(Debug)]
enum Ahead {
    /// To be computed with by the host.
    Host(Reading<Vec<u8>>),
    /// To be copied to a GPU.
    Staged(Reading<Buffer>),
}

/// The runs of a block that were asked for before its visit; those in memory need not be.
#[derive(Debug, Default)]
pub(super) struct RunsAhead(Vec<Option<Ahead>>);

/// Weights that have been asked for, and what they come in.
#[derive(Debug, Default)]
pub(super) struct Arriving {
    weights: BTreeMap<String, Weight>,
    /// On a GPU, where all lie.
    runs: Vec<Tensor>,
    coming: Vec<Coming>,
}

impl Arriving {
    /// Has what computes wait until they are there.
    pub(super) fn arrive(&self) -> Result<(), Error> {
        self.coming.iter().try_for_each(Coming::arrive)
    }

    /// The weights, which are there after [`Self::arrive`].
    pub(super) fn weights(&self) -> &BTreeMap<String, Weight> {
        &self.weights
    }

    /// Overwrites the weights for whoever still reads them.
    pub(super) fn spoil(self) -> Result<(), (String, quant::Error)> {
        let Self { weights, runs, .. } = self;
        if runs.is_empty() {
            return weights.into_iter().try_for_each(|(name, weight)| weight.spoil().map_err(|error| (name, error)));
        }
        let spoiled = runs.into_iter().try_for_each(|run| Weight::Dense(run).spoil());
        spoiled.map_err(|error| (weights.into_keys().next().unwrap_or_default(), error))
    }

    /// The weights, of which nobody else knows.
    pub(super) fn into_weights(self) -> Result<BTreeMap<String, Weight>, Error> {
        self.arrive()?;
        Ok(self.weights)
    }
}

impl Frozen {
    /// Weights where they were loaded.
    pub(super) fn new(weights: BTreeMap<String, Weight>) -> Self {
        Self { here: weights, away: None }
    }

    /// Moves all to where they are computed with, one after the other.
    pub(super) fn move_to(&mut self, stays_on_host: &BTreeSet<String>, device: &Device) -> Result<(), Error> {
        for (name, weight) in std::mem::take(&mut self.here) {
            let weight = placed(&name, weight, stays_on_host, device)?;
            self.here.insert(name, weight);
        }
        Ok(())
    }

    /// Puts this rank's part of all weights away but of those with few values, which go to where they are computed with.
    pub(super) fn put_away(
        &mut self,
        sharing: &Sharing,
        stays_on_host: &BTreeSet<String>,
        link: &Link,
    ) -> Result<(), Error> {
        let (world_size, rank) = (sharing.world_size(), sharing.rank());
        let mut weights = BTreeMap::new();
        let mut runs: Vec<(DType, Vec<u8>)> = Vec::new();
        for (name, weight) in std::mem::take(&mut self.here) {
            let count = match &weight {
                Weight::Dense(tensor) => tensor.elem_count(),
                weight => weight.rows() * weight.cols(),
            };
            let is_small = if sharing.cuts_parameters() {
                !sharing.cuts_values(count)
            } else {
                count <= link.offload().persistence_threshold
            };
            if is_small || stays_on_host.contains(&name) {
                self.here.insert(name.clone(), placed(&name, weight, stays_on_host, link.device())?);
                continue;
            }
            let (form, bytes) = weight.take_apart()?;
            let kind_name = weight.kind_name();
            drop(weight);
            let mut arrays = Vec::new();
            for (array, bytes) in form.arrays().into_iter().zip(bytes) {
                let index = runs.iter().position(|(dtype, _)| *dtype == array.dtype).unwrap_or_else(|| {
                    runs.push((array.dtype, Vec::new()));
                    runs.len() - 1
                });
                let run = &mut runs[index].1;
                let start = run.len().next_multiple_of(ALIGNMENT);
                run.resize(start, 0);
                run.extend_from_slice(&bytes);
                let first = start / array.dtype.size_in_bytes();
                arrays.push((index, first..first + array.count));
            }
            let on_device = link.device().is_cuda().then(|| form.on_device(link.device())).transpose()?;
            let on_device = on_device.map(|form| form.named(kind_name.clone()));
            weights.insert(name, Placed { form, on_device, arrays, count, kind_name });
        }
        if weights.is_empty() {
            return Ok(());
        }
        let run = |(dtype, mut bytes): (DType, Vec<u8>)| {
            let part = bytes.len().div_ceil(world_size).next_multiple_of(ALIGNMENT);
            bytes.resize(part * world_size, 0);
            bytes.truncate(part * (rank + 1));
            let own = link.put_away(if rank == 0 { bytes } else { bytes.split_off(part * rank) })?;
            Ok::<_, Error>(Run { dtype, len: part * world_size, own })
        };
        let runs = runs.into_iter().map(run).collect::<Result<_, _>>()?;
        self.away = Some(Away { weights, runs });
        Ok(())
    }

    /// Whether some have to come before a visit.
    pub(super) fn is_away(&self) -> bool {
        self.away.is_some()
    }

    /// Bytes that they come in.
    pub(super) fn away_bytes(&self) -> usize {
        self.away.iter().flat_map(|away| &away.runs).map(|run| run.len).sum()
    }

    /// Those of them that other ranks have.
    pub(super) fn bytes_of_others(&self) -> usize {
        self.away.iter().flat_map(|away| &away.runs).map(|run| run.len - run.own.len()).sum()
    }

    /// Values of the weights that come for a visit.
    pub(super) fn values_away(&self) -> usize {
        self.away.iter().flat_map(|away| away.weights.values()).map(|weight| weight.count).sum()
    }

    /// Those that are there.
    pub(super) fn here(&self) -> &BTreeMap<String, Weight> {
        &self.here
    }

    /// Starts to read those that lie in files, on the way to `device`.
    pub(super) fn read_ahead(&self, sharing: &Sharing, (link, device): (&Link, &Device)) -> Result<RunsAhead, Error> {
        let is_gathered_on_host = sharing.world_size() > 1 && !sharing.exchanges_on_device();
        let is_staged = device.is_cuda() && !is_gathered_on_host;
        let read = |run: &Run| match &run.own {
            Waiting::Memory(_) => Ok(None),
            Waiting::File(extent) if is_staged => Ok(Some(Ahead::Staged(link.read(extent)?))),
            Waiting::File(extent) => Ok(Some(Ahead::Host(extent.read(vec![0; extent.len()])))),
        };
        let runs: Result<Vec<_>, Error> = self.away.iter().flat_map(|away| &away.runs).map(read).collect();
        Ok(RunsAhead(runs?))
    }

    /// Whether some lie in files.
    pub(super) fn is_in_file(&self) -> bool {
        self.bytes_in_file() > 0
    }

    /// Starts the way of all that are away to `device`, of what was read ahead or is read now; ranks that share them ask for them
    /// together.
    pub(super) fn fetch(
        &self,
        ahead: Option<RunsAhead>,
        sharing: &Sharing,
        (link, device): (&Link, &Device),
    ) -> Result<Arriving, Error> {
        let Some(away) = &self.away else { return Ok(Arriving::default()) };
        let ahead = ahead.map_or_else(|| self.read_ahead(sharing, (link, device)), Ok)?;
        let mut arriving = Arriving::default();
        if device.is_cuda() {
            for (run, ahead) in away.runs.iter().zip(ahead.0) {
                let all = empty(device, run.len / run.dtype.size_in_bytes(), run.dtype)?;
                let target = Arc::new(Buffer::of_tensor(all.clone())?);
                let ticket = run.come_to(&target, ahead, sharing, link)?;
                arriving.coming.push(Coming::new(target, ticket));
                arriving.runs.push(all);
            }
            for (name, Placed { on_device, arrays, .. }) in &away.weights {
                let Some(form) = on_device else { continue };
                let runs = &arriving.runs;
                let array = |(run, range): &(usize, Range<usize>)| runs[*run].narrow(0, range.start, range.len());
                let arrays: Vec<Tensor> = arrays.iter().map(array).collect::<Result<_, _>>()?;
                arriving.weights.insert(name.clone(), form.weight(&arrays)?);
            }
            return Ok(arriving);
        }
        let runs = away.on_host(ahead, sharing)?;
        for (name, at) in &away.weights {
            let shares_memory = sharing.world_size() > 1 || self.is_in_file();
            arriving.weights.insert(name.clone(), at.weight(&runs, &away.runs, shares_memory)?);
        }
        Ok(arriving)
    }

    /// How the weight `name` is stored, if it is one of them.
    pub(super) fn kind_name(&self, name: &str) -> Option<String> {
        let away = || self.away.as_ref()?.weights.get(name).map(|at| at.kind_name.clone());
        self.here.get(name).map(Weight::kind_name).or_else(away)
    }

    /// Bytes on this rank, wherever they lie.
    pub(super) fn size_bytes(&self) -> usize {
        let away = self.away.iter().flat_map(|away| &away.runs).map(|run| run.own.len());
        self.here.values().map(Weight::size_bytes).sum::<usize>() + away.sum::<usize>()
    }

    /// Those of them that lie in host memory for as long as they are not asked for.
    pub(super) fn offloaded_bytes(&self) -> usize {
        let in_host_memory =
            |run: &&Run| matches!(&run.own, Waiting::Memory(buffer) if buffer.place() != Place::Device);
        self.away.iter().flat_map(|away| &away.runs).filter(in_host_memory).map(|run| run.own.len()).sum()
    }

    /// Those of them that lie in a file.
    pub(super) fn bytes_in_file(&self) -> usize {
        let in_file = |run: &&Run| matches!(run.own, Waiting::File(_));
        self.away.iter().flat_map(|away| &away.runs).filter(in_file).map(|run| run.own.len()).sum()
    }
}

impl Away {
    /// All runs in host memory.
    fn on_host(&self, ahead: RunsAhead, sharing: &Sharing) -> Result<Vec<Bytes>, Error> {
        let whole = |(run, ahead): (&Run, Option<Ahead>)| Ok(run.gathered(ahead, sharing)?.into());
        self.runs.iter().zip(ahead.0).map(whole).collect()
    }
}

impl Run {
    /// The bytes of all ranks, gathered through host memory.
    fn gathered(&self, ahead: Option<Ahead>, sharing: &Sharing) -> Result<Vec<u8>, Error> {
        let own = match (&self.own, ahead) {
            (_, Some(Ahead::Host(reading))) => reading.wait()?,
            (_, Some(Ahead::Staged(reading))) => reading.wait()?.with_bytes(<[u8]>::to_vec)?,
            (Waiting::File(extent), None) => extent.read(vec![0; extent.len()]).wait()?,
            (Waiting::Memory(own), None) if own.place() == Place::Device => {
                let host = Arc::new(Buffer::host(own.len()));
                let queue = crate::device::Queue::of(own.of_device())?;
                queue.copy(&own.whole(), &host.whole(), &Ticket::done())?.wait(None)?;
                host.with_bytes(<[u8]>::to_vec)?
            }
            (Waiting::Memory(own), None) => own.with_bytes(<[u8]>::to_vec)?,
        };
        if sharing.world_size() == 1 {
            return Ok(own);
        }
        sharing.gather_bytes(&own, std::iter::repeat_n(own.len(), sharing.world_size()))
    }

    /// Starts the way of all ranks' parts to `target` on a GPU.
    fn come_to(
        &self,
        target: &Arc<Buffer>,
        ahead: Option<Ahead>,
        sharing: &Sharing,
        link: &Link,
    ) -> Result<Ticket, Error> {
        if sharing.exchange().is_none() && sharing.world_size() > 1 {
            let mut host = Buffer::host(self.len);
            host.write(0, &self.gathered(ahead, sharing)?)?;
            return Ok(link.copies().copy(&Arc::new(host).whole(), &target.whole(), &Ticket::done())?);
        }
        let read = |reading: Reading<Buffer>| Ok::<_, Error>(Arc::new(reading.wait()?));
        let (own, is_lent) = match (&self.own, ahead) {
            (Waiting::Memory(own), _) => (own.clone(), false),
            (Waiting::File(_), Some(Ahead::Staged(reading))) => (read(reading)?, true),
            (Waiting::File(extent), _) => (read(link.read(extent)?)?, true),
        };
        let ticket = match sharing.exchange() {
            None => link.copies().copy(&own.whole(), &target.whole(), &Ticket::done())?,
            Some(exchange) if own.place() == Place::Device => {
                exchange.all_gather(&own.whole(), &target.whole(), &Ticket::done())?
            }
            Some(exchange) => {
                let part = own.len();
                let place = target.part(part * sharing.rank()..part * (sharing.rank() + 1))?;
                let copied = link.copies().copy(&own.whole(), &place, &Ticket::done())?;
                exchange.all_gather(&place, &target.whole(), &copied)?
            }
        };
        if is_lent {
            link.give(own);
        }
        Ok(ticket)
    }
}

impl Placed {
    /// The weight in host memory, of all runs there. If it does not share their memory, whether it is still read is seen by whether
    /// its own is shared.
    fn weight(&self, runs: &[Bytes], types: &[Run], shares_memory: bool) -> Result<Weight, Error> {
        let array = |(run, range): &(usize, Range<usize>)| {
            let size = types[*run].dtype.size_in_bytes();
            let bytes = runs[*run].slice(size * range.start..size * range.end).unwrap_or_else(|| Vec::new().into());
            if shares_memory { bytes } else { bytes.to_vec().into() }
        };
        Ok(self.form.weight(&self.arrays.iter().map(array).collect::<Vec<_>>())?)
    }
}

/// The weight where it is computed with.
fn placed(name: &str, weight: Weight, stays_on_host: &BTreeSet<String>, device: &Device) -> Result<Weight, Error> {
    Ok(if stays_on_host.contains(name) { weight.to_pinned(device)? } else { weight.to_device(device)? })
}
