//! The optimizer over what this rank keeps of the store's flat buffers: clipping by the global norm, one step, its state.
//!
//! `optim` has the rules; state lies beside the values it belongs to, cut as they are. All ranks make a step together, and none
//! does where a gradient of any is not finite.

use std::collections::VecDeque;
use std::sync::Arc;

use rayon::prelude::*;

use super::files::Reading;
use super::state::{Kept, Loaded, Spare};
use super::store::Errand;
use super::values::Staged;
use super::{Entry, Error, FlatBlock, ParamStore, Piece};
use crate::config::settings::OptimizerSettings;
use crate::ops::buffer;
use crate::optim::{AdamWStep, ParamGroup, State, clip_coefficient, norm_of_parts, sums_of_squares};

/// Optimizer state of this rank.
#[derive(Debug)]
pub struct ShardedOptimizer {
    settings: OptimizerSettings,
    /// Steps taken.
    step: u64,
    states: Vec<Kept>,
}

/// What another thread is to do for a block, and with which state and pieces of it.
type Errands = (Errand, Kept, Vec<Piece>);

/// What comes from files for the step on a block.
#[derive(Default)]
struct Begun {
    states: Option<Reading<Loaded>>,
    values: Option<Reading<Staged>>,
}

impl Begun {
    fn new(flat: &FlatBlock, kept: &Kept) -> Result<Self, Error> {
        Ok(Self { states: kept.start(), values: flat.stored().start(false)? })
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

impl ShardedOptimizer {
    /// Fresh state for the store's parameters.
    ///
    /// # Errors
    /// If memory runs out.
    pub fn new(settings: OptimizerSettings, store: &ParamStore) -> Result<Self, Error> {
        let spare = Arc::new(Spare::new(store.offload().files.buffer_count));
        let file = store.optimizer_file().map(|shelf| (shelf, &spare));
        let states = store.flats().map(|flat| Kept::new(flat, settings.kind, file)).collect::<Result<_, _>>()?;
        Ok(Self { settings, step: 0, states })
    }

    /// Bytes of the state in a file.
    pub fn bytes_in_file(&self) -> usize {
        self.states.iter().map(Kept::bytes_in_file).sum()
    }

    /// Bytes of the largest block's state in a file.
    pub fn largest_read_bytes(&self) -> usize {
        self.states.iter().map(Kept::bytes_in_file).max().unwrap_or(0)
    }

    /// Bytes of the state.
    pub fn size_bytes(&self) -> usize {
        self.states.iter().map(Kept::size_bytes).sum()
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
        let OptimizerSettings { weight_decay, adam_beta1, adam_beta2, adam_epsilon, .. } = self.settings;
        let hyper = AdamWStep {
            lr,
            beta1: adam_beta1,
            beta2: adam_beta2,
            eps: adam_epsilon,
            weight_decay,
            step: self.step,
            grad_scale: (f64::from(clip_coefficient(grad_norm, max_grad_norm)) / loss_scale) as f32,
        };
        let (runs_errands, ahead) = (store.may_run_errands(), blocks_ahead(store));
        let mut errands = Vec::new();
        let all: Vec<(usize, &FlatBlock, &Kept)> =
            store.flats().zip(&self.states).enumerate().map(|(block, (flat, kept))| (block, flat, kept)).collect();
        let mut begun: VecDeque<Begun> = VecDeque::new();
        for (at, &(block, flat, kept)) in all.iter().enumerate() {
            let pieces: Vec<Piece> = flat.own_pieces().collect();
            match kept {
                Kept::Host(_) | Kept::File(_) if runs_errands => {
                    let errand = store.errand(block)?;
                    errands.extend(errand.map(|errand| (errand, kept.clone(), pieces)));
                    continue;
                }
                _ if pieces.is_empty() => {}
                Kept::Host(_) | Kept::File(_) => {
                    let coming = all[at..].iter().filter(|(_, flat, _)| !flat.own().is_empty());
                    begin(&mut begun, ahead, coming.map(|(_, flat, kept)| (*flat, *kept)))?;
                    move_pieces(flat, kept, begun.pop_front().unwrap_or_default(), &pieces, &hyper)?;
                }
                Kept::Device { first, second } => {
                    let (values, grads) = (flat.own_values()?, flat.own_grads()?);
                    let group = |piece: &Piece| {
                        let AdamWStep { weight_decay, .. } = hyper_of(piece, &hyper);
                        ParamGroup { weight_decay, range: piece.range.clone() }
                    };
                    let groups: Vec<ParamGroup> = pieces.iter().map(group).collect();
                    super::device_optimizer::step(&values, &grads, first, second, &groups, &hyper)?;
                }
            }
            store.share_values(block)?;
            flat.stored().unload()?;
        }
        if !errands.is_empty() {
            run(errands, hyper, ahead)?;
        }
        Ok(StepReport { grad_norm, is_skipped: false })
    }

    /// The state of this rank's part of a block, copied to the host: two arrays like [`FlatBlock::own`], of which the second has zeros
    /// where a rule keeps one. [`Self::state_names`] says which arrays there are.
    ///
    /// # Errors
    /// If there is no such block, or the device failed.
    pub fn own_state(&self, store: &ParamStore, block: usize) -> Result<[Vec<f32>; 2], Error> {
        let kept = store.flats().nth(block).zip(self.states.get(block));
        let (flat, kept) = kept.ok_or(Error::NoBlock { block, blocks: self.states.len() })?;
        kept.to_vecs(flat)
    }

    /// What the arrays that a parameter has in the state are called.
    pub fn state_names(&self, entry: &Entry) -> &'static [&'static str] {
        State::names(self.settings.kind, entry.matrix().is_some())
    }

    /// Takes saved state of this rank's part back, block after block; `read` is asked for each array of each parameter in it: it
    /// gets the parameter, the array's name, the first value wanted and the place for the values.
    ///
    /// # Errors
    /// What `read` returns, or if a device failed.
    pub fn load_state<E: From<Error>>(
        &mut self,
        store: &ParamStore,
        step: u64,
        mut read: impl FnMut(&Entry, &str, usize, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        store.settle()?;
        let kind = self.settings.kind;
        for (flat, kept) in store.flats().zip(&mut self.states) {
            let own = flat.own();
            let mut loaded = [vec![0.0; own.len()], vec![0.0; own.len()]];
            for (entry, range) in flat.entries_in(&own) {
                let place = range.start - own.start..range.end - own.start;
                for (array, target) in State::names(kind, entry.matrix().is_some()).iter().zip(&mut loaded) {
                    read(entry, array, range.start - entry.range.start, &mut target[place.clone()])?;
                }
            }
            kept.load(flat, &loaded)?;
        }
        self.step = step;
        Ok(())
    }
}

/// Has another thread move values, block after block in the order of the walk, while the next step begins: a GPU computes with
/// the first block while the host moves the second. What lies in files is read as many blocks `ahead`.
fn run(errands: Vec<Errands>, hyper: AdamWStep, ahead: usize) -> Result<(), Error> {
    let all = move || {
        let mut begun: VecDeque<Begun> = VecDeque::new();
        let order: Vec<(FlatBlock, Kept)> =
            errands.iter().map(|(errand, kept, _)| (errand.flat().clone(), kept.clone())).collect();
        for (at, (errand, kept, pieces)) in errands.into_iter().enumerate() {
            let step = |flat: &FlatBlock| {
                begin(&mut begun, ahead, order[at..].iter().map(|(flat, kept)| (flat, kept)))?;
                move_pieces(flat, &kept, begun.pop_front().unwrap_or_default(), &pieces, &hyper)
            };
            // Values after one that could not be moved are not to be had either.
            if !errand.run(step) {
                return;
            }
        }
    };
    let thread = std::thread::Builder::new().name("optimizer".into()).spawn(all);
    thread.map(drop).map_err(Error::Thread)
}

/// The numbers of a step for one piece.
fn hyper_of(piece: &Piece, hyper: &AdamWStep) -> AdamWStep {
    AdamWStep { weight_decay: if piece.has_decay { hyper.weight_decay } else { 0.0 }, ..*hyper }
}

/// Blocks that are read ahead of the optimizer: half of what may be on its way, and the other half is written.
fn blocks_ahead(store: &ParamStore) -> usize {
    store.blocks_ahead().div_ceil(2)
}

/// Starts to read what lies in files of the first of the blocks and of so many after it.
fn begin<'a>(
    begun: &mut VecDeque<Begun>,
    ahead: usize,
    blocks: impl Iterator<Item = (&'a FlatBlock, &'a Kept)>,
) -> Result<(), Error> {
    for (flat, kept) in blocks.take(1 + ahead).skip(begun.len()) {
        begun.push_back(Begun::new(flat, kept)?);
    }
    Ok(())
}

/// One step on this rank's part of a block in host memory, of what comes from files. The values stay loaded.
fn move_pieces(flat: &FlatBlock, kept: &Kept, begun: Begun, pieces: &[Piece], hyper: &AdamWStep) -> Result<(), Error> {
    flat.stored().load(begun.values)?;
    kept.step(begun.states, |states| step_pieces(flat, pieces, states, hyper))
}

/// One step on each piece of this rank's part of a block in host memory.
fn step_pieces(flat: &FlatBlock, pieces: &[Piece], states: &mut [State], hyper: &AdamWStep) -> Result<(), Error> {
    let (values, grads) = (flat.own_values()?, flat.own_grads()?);
    let mut result = Ok(());
    buffer::update(&values, &grads, |mut values, grads| {
        let mut parts = Vec::with_capacity(pieces.len());
        for piece in pieces {
            // They lie one behind the other.
            let (own, rest) = std::mem::take(&mut values).split_at_mut(piece.range.len());
            values = rest;
            parts.push(own);
        }
        let all = parts.into_par_iter().zip(pieces).zip(states.par_iter_mut());
        result = all.try_for_each(|((values, piece), state)| {
            state.step(values, &grads[piece.range.clone()], &hyper_of(piece, hyper))
        });
    })?;
    Ok(result?)
}

/// The gradients' parts of their norm, in the order of the store, over all ranks.
fn gradient_parts(store: &ParamStore) -> Result<Vec<f64>, Error> {
    store.settle()?;
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
    if store.home().is_cuda() {
        return super::device_optimizer::gradient_parts(store);
    }
    let mut parts = Vec::new();
    for flat in store.flats().filter(|flat| !flat.is_empty()) {
        let grads = flat.own_grads()?;
        let pieces: Vec<Piece> = flat.own_pieces().collect();
        parts.push(buffer::read(&grads, |grads| {
            let of_piece = |piece: &Piece| sums_of_squares(&grads[piece.range.clone()]);
            pieces.par_iter().map(of_piece).collect::<Vec<_>>().concat()
        })?);
    }
    Ok(parts)
}
