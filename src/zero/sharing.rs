//! What the ranks of a run share of a store, and how it comes together: gradients to the rank that keeps them, values to all.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::{Error, Sums};
use crate::config::settings::{OptimizerKind, RankSettings, ZeroStage};
use crate::device::{Buffer, Queue};
use crate::ops::buffer;
use crate::ranks::{Alone, Exchange, Ranks};

/// The ranks of a run and what each of them keeps.
#[derive(Clone)]
pub struct Sharing {
    ranks: Arc<dyn Ranks>,
    /// Between the memories of the ranks' GPUs; `None`: through host memory.
    exchange: Option<Arc<Mutex<dyn Exchange>>>,
    stage: ZeroStage,
    persistence_threshold: usize,
    keeps_whole: bool,
}

impl std::fmt::Debug for Sharing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {} of {}, {:?}", self.rank(), self.world_size(), self.stage)
    }
}

impl Sharing {
    /// One rank, which has everything.
    pub fn alone() -> Self {
        Self {
            ranks: Arc::new(Alone),
            exchange: None,
            stage: ZeroStage::Replicated,
            persistence_threshold: 0,
            keeps_whole: false,
        }
    }

    /// `ranks` that share what `settings` say, for an optimizer of this kind. One rank alone has everything.
    ///
    /// With an `exchange` what lies in the memory of GPUs goes through it, and else through host memory.
    pub fn new(
        ranks: Arc<dyn Ranks>,
        exchange: Option<Arc<Mutex<dyn Exchange>>>,
        settings: &RankSettings,
        optimizer: OptimizerKind,
    ) -> Self {
        let is_shared = ranks.world_size() > 1 || exchange.is_some();
        let stage = if is_shared { settings.stage } else { ZeroStage::Replicated };
        let keeps_whole = optimizer == OptimizerKind::Muon;
        let persistence_threshold = settings.param_persistence_threshold;
        Self { ranks, exchange, stage, persistence_threshold, keeps_whole }
    }

    /// Whether what ranks exchange stays in the memory of their GPUs.
    pub fn exchanges_on_device(&self) -> bool {
        self.exchange.is_some()
    }

    /// What kept the exchange between GPUs from its work, if anything has: what came through it since is worth nothing.
    ///
    /// # Errors
    /// That.
    pub fn check_exchange(&self) -> Result<(), Error> {
        self.exchange().map_or(Ok(()), |exchange| Ok(exchange.check()?))
    }

    /// The exchange between the memories of the ranks' GPUs.
    pub(super) fn exchange(&self) -> Option<MutexGuard<'_, dyn Exchange + 'static>> {
        self.exchange.as_ref().map(|exchange| exchange.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Seconds of a gather of about `bytes` in all from the memories of the ranks' GPUs, each with a part of them, the mean of
    /// `repeats` after one that is not timed; `None` where ranks exchange nothing there. All ranks call it together.
    ///
    /// # Errors
    /// If the device refuses or a rank is lost.
    pub fn time_gather(&self, device: &Device, bytes: usize, repeats: u32) -> Result<Option<f64>, Error> {
        let (Some(exchange), true) = (self.exchange(), self.world_size() > 1) else { return Ok(None) };
        let main = Queue::of(device)?;
        let part = (bytes / self.world_size()).next_multiple_of(256);
        let shard = Arc::new(Buffer::device(&main, part)?);
        let full = Arc::new(Buffer::device(&main, part * self.world_size())?);
        let gather =
            || Ok::<_, Error>(exchange.all_gather(&shard.whole(), &full.whole(), &main.ticket()?)?.wait(None)?);
        let timed = |repeats: u32| {
            self.ranks.barrier()?;
            let started = Instant::now();
            (0..repeats).try_for_each(|_| gather())?;
            Ok::<_, Error>(started.elapsed().as_secs_f64() / f64::from(repeats.max(1)))
        };
        timed(1)?;
        let secs = timed(repeats)?;
        exchange.check()?;
        Ok(Some(secs))
    }

    /// Whether a parameter is in one shard as a whole.
    pub(super) fn keeps_whole(&self) -> bool {
        self.keeps_whole
    }

    /// The ranks.
    pub fn ranks(&self) -> &dyn Ranks {
        self.ranks.as_ref()
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.ranks.rank()
    }

    /// How many there are.
    pub fn world_size(&self) -> usize {
        self.ranks.world_size()
    }

    /// What is cut into shards.
    pub fn stage(&self) -> ZeroStage {
        self.stage
    }

    /// Whether every rank has a part of the parameters.
    pub(super) fn cuts_parameters(&self) -> bool {
        self.stage == ZeroStage::Parameters
    }

    /// Whether so many values of a parameter, or of a block's trained parameters, are cut into shards.
    pub(super) fn cuts_values(&self, count: usize) -> bool {
        self.stage == ZeroStage::Parameters && count > self.persistence_threshold
    }

    /// Each rank's part of the sum over ranks of what all ranks have: `parts` are the step's sums of a bucket, in the order of
    /// [`Sums::nodes`], and `shards` each rank's range of it. Returns this rank's.
    pub(super) fn reduce(&self, sums: Sums, parts: &[Tensor], shards: &[Range<usize>]) -> Result<Vec<f32>, Error> {
        let own: Vec<Vec<f32>> = parts.iter().map(buffer::to_vec).collect::<Result<_, _>>()?;
        let for_rank = |shard: &Range<usize>| {
            own.iter()
                .flat_map(|sum| sum[shard.clone()].iter().flat_map(|value| value.to_le_bytes()))
                .collect::<Vec<u8>>()
        };
        let messages: Vec<Vec<u8>> = shards.par_iter().map(for_rank).collect();
        drop(own);
        let received = self.ranks.all_to_all_bytes(messages)?;
        let length = shards[self.rank()].len();
        let mut all = Vec::new();
        for (rank, bytes) in received.iter().enumerate() {
            let nodes = sums.on_rank(rank).nodes();
            expect_length(rank, "gradients", bytes.len(), 4 * length * nodes.len())?;
            for (index, node) in nodes.into_iter().enumerate() {
                all.push((node, floats(&bytes[4 * length * index..4 * length * (index + 1)])));
            }
        }
        let add = |mut left: Vec<f32>, right: Vec<f32>| {
            left.iter_mut().zip(right).for_each(|(left, right)| *left += right);
            left
        };
        Ok(Sums::total(all, add).unwrap_or_default())
    }

    /// All ranks' values, one behind the other, on every rank; `shards` say how many each has.
    pub(super) fn gather(&self, own: &[f32], shards: &[Range<usize>]) -> Result<Vec<f32>, Error> {
        let bytes: Vec<u8> = own.iter().flat_map(|value| value.to_le_bytes()).collect();
        let all = self.gather_bytes(&bytes, shards.iter().map(|shard| 4 * shard.len()))?;
        Ok(floats(&all))
    }

    /// All ranks' bytes, one behind the other.
    pub(super) fn gather_bytes(&self, own: &[u8], lengths: impl Iterator<Item = usize>) -> Result<Vec<u8>, Error> {
        let all = self.ranks.all_gather_bytes(own)?;
        for ((rank, bytes), length) in all.iter().enumerate().zip(lengths) {
            expect_length(rank, "values", bytes.len(), length)?;
        }
        Ok(all.concat())
    }

    /// As [`Self::gather`], but for the first rank alone; the others get nothing.
    pub(super) fn collect(&self, own: &[f32], shards: &[Range<usize>]) -> Result<Option<Vec<f32>>, Error> {
        let mut messages = vec![Vec::new(); self.world_size()];
        messages[0] = own.iter().flat_map(|value| value.to_le_bytes()).collect();
        let all = self.ranks.all_to_all_bytes(messages)?;
        if !self.ranks.is_first() {
            return Ok(None);
        }
        for ((rank, bytes), shard) in all.iter().enumerate().zip(shards) {
            expect_length(rank, "values", bytes.len(), 4 * shard.len())?;
        }
        Ok(Some(floats(&all.concat())))
    }
}

/// How many of the ranks, which all ask, are at the place that this one names: a machine, or a GPU.
///
/// # Errors
/// If a rank is lost.
pub fn ranks_at(ranks: &dyn Ranks, place: &str) -> Result<u64, crate::ranks::Error> {
    let all = ranks.all_gather_bytes(place.as_bytes())?;
    Ok(all.iter().filter(|other| other.as_slice() == place.as_bytes()).count().max(1) as u64)
}

fn expect_length(peer: usize, what: &'static str, got: usize, expected: usize) -> Result<(), Error> {
    if got == expected {
        return Ok(());
    }
    let problem = format!("{got} bytes, expected {expected}");
    Err(Error::Ranks(crate::ranks::Error::Message { peer, what, problem }))
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}
