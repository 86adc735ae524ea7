//! The optimizer over what this rank keeps of the store's flat buffers: clipping by the global norm, one step, its state.
//!
//! `optim` has the rules; state lies beside the values it belongs to, cut as they are. All ranks make a step together, and none
//! does where a gradient of any is not finite.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rayon::prelude::*;

use super::files::Reading;
use super::state::{Kept, Loaded, Spare};
use super::store::Errand;
use super::values::Staged;
use super::{Error, FlatBlock, ParamStore, Piece};
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
    /// What kept another thread from moving values.
    problem: Arc<Mutex<Option<Error>>>,
}

/// What another thread is to do for a block, and with which state and pieces of it.
type Errands = (Errand, FlatBlock, Kept, Vec<Piece>);

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
        Ok(Self { settings, step: 0, states, problem: store.unmoved().clone() })
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
        let parts = gradient_parts(store);
        // What kept an errand from its end says more than that it was given up.
        lock(&self.problem).take().map_or(Ok(()), Err)?;
        let grad_norm = (norm_of_parts(&parts?) / loss_scale) as f32;
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
        let runs_errands = store.may_run_errands();
        let mut errands = Vec::new();
        let all: Vec<(usize, &FlatBlock, &Kept)> =
            store.flats().zip(&self.states).enumerate().map(|(block, (flat, kept))| (block, flat, kept)).collect();
        let mut begun: VecDeque<Begun> = VecDeque::new();
        for (at, &(block, flat, kept)) in all.iter().enumerate() {
            let pieces: Vec<Piece> = flat.own_pieces().collect();
            match kept {
                _ if pieces.is_empty() => {}
                Kept::Host(_) | Kept::File(_) if runs_errands => {
                    let errand = store.errand(block)?;
                    errands.extend(errand.map(|errand| (errand, flat.clone(), kept.clone(), pieces)));
                    continue;
                }
                Kept::Host(_) | Kept::File(_) => {
                    let coming = all[at..].iter().filter(|(_, flat, _)| !flat.own().is_empty());
                    begin(&mut begun, store, coming.map(|(_, flat, kept)| (*flat, *kept)))?;
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
            self.run(errands, hyper, blocks_ahead(store))?;
        }
        Ok(StepReport { grad_norm, is_skipped: false })
    }

    /// Has another thread move values, block after block in the order of the walk, while the next step begins: a GPU computes with
    /// the first block while the host moves the second.
    fn run(&self, errands: Vec<Errands>, hyper: AdamWStep, ahead: usize) -> Result<(), Error> {
        let problem = self.problem.clone();
        let all = move || {
            let mut begun: VecDeque<Begun> = VecDeque::new();
            let order: Vec<(FlatBlock, Kept)> =
                errands.iter().map(|(_, flat, kept, _)| (flat.clone(), kept.clone())).collect();
            for (at, (errand, _, kept, pieces)) in errands.into_iter().enumerate() {
                let coming = order[at..].iter().map(|(flat, kept)| (flat, kept));
                let done = begin_ahead(&mut begun, ahead, coming).and_then(|()| {
                    let first = begun.pop_front().unwrap_or_default();
                    errand.run(|flat| move_pieces(flat, &kept, first, &pieces, &hyper))
                });
                if let Err(error) = done {
                    tracing::error!("the optimizer in host memory failed: {error}");
                    // Before the errand is dropped: who waits for it asks why.
                    *lock(&problem) = Some(error);
                    return;
                }
                errand.done();
            }
        };
        let thread = std::thread::Builder::new().name("optimizer".into()).spawn(all);
        thread.map(drop).map_err(Error::Thread)
    }

    /// The state of each block, all of it, copied to the host of the first rank: two arrays like the values. The others help to
    /// gather them and get nothing.
    ///
    /// # Errors
    /// If the device failed or a rank is lost.
    pub fn collect(&self, store: &ParamStore) -> Result<Option<Vec<[Vec<f32>; 2]>>, Error> {
        store.settle()?;
        let is_first = store.sharing().ranks().is_first();
        let mut all = Vec::new();
        for (flat, kept) in store.flats().zip(&self.states) {
            if flat.is_whole() {
                all.extend(is_first.then(|| kept.to_vecs(flat)).transpose()?);
                continue;
            }
            let [first, second] = kept.to_vecs(flat)?.map(|own| store.sharing().collect(&own, flat.shards()));
            all.extend(first?.zip(second?).map(|(first, second)| [first, second]));
        }
        Ok(is_first.then_some(all))
    }

    /// State by parameter name with that of the array appended (`exp_avg`, ...), for a checkpoint; `arrays` as
    /// [`Self::collect`] gave them.
    pub fn state<'a>(
        &self,
        store: &'a ParamStore,
        arrays: &'a [[Vec<f32>; 2]],
    ) -> impl Iterator<Item = (String, &'a [f32], Vec<usize>)> + use<'a> {
        let kind = self.settings.kind;
        store.flats().zip(arrays).flat_map(move |(flat, arrays)| {
            flat.entries().iter().flat_map(move |e| {
                let named = State::names(kind, e.matrix().is_some()).iter().zip(arrays);
                named.map(|(name, values)| (format!("{}.{name}", e.name), &values[e.range.clone()], e.shape.clone()))
            })
        })
    }

    /// Takes saved state back; `lookup` gives the values saved under a name.
    ///
    /// # Errors
    /// If a parameter's state is missing or of another size.
    pub fn load_state<'a>(
        &mut self,
        store: &ParamStore,
        step: u64,
        lookup: impl Fn(&str) -> Option<Vec<f32>> + 'a,
    ) -> Result<(), Error> {
        store.settle()?;
        let kind = self.settings.kind;
        for (flat, kept) in store.flats().zip(&mut self.states) {
            let mut loaded = [vec![0.0; flat.len()], vec![0.0; flat.len()]];
            for e in flat.entries() {
                for (array, target) in State::names(kind, e.matrix().is_some()).iter().zip(&mut loaded) {
                    let name = format!("{}.{array}", e.name);
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
            kept.load(flat, &loaded.map(|all| all[own.clone()].to_vec()))?;
        }
        self.step = step;
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The numbers of a step for one piece.
fn hyper_of(piece: &Piece, hyper: &AdamWStep) -> AdamWStep {
    AdamWStep { weight_decay: if piece.has_decay { hyper.weight_decay } else { 0.0 }, ..*hyper }
}

/// Blocks that are read ahead of the optimizer: half of what may be on its way, and the other half is written.
fn blocks_ahead(store: &ParamStore) -> usize {
    store.blocks_ahead().div_ceil(2)
}

/// Starts to read what lies in files of the first of the blocks and those after it.
fn begin<'a>(
    begun: &mut VecDeque<Begun>,
    store: &ParamStore,
    blocks: impl Iterator<Item = (&'a FlatBlock, &'a Kept)>,
) -> Result<(), Error> {
    begin_ahead(begun, blocks_ahead(store), blocks)
}

fn begin_ahead<'a>(
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
