//! What a rule of the optimizer keeps for this rank's part of a block: on a GPU, in host memory, or in a file.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Tensor};

use super::files::{Extent, Memory, Reading, Shelf};
use super::{Error, FlatBlock};
use crate::config::settings::OptimizerKind;
use crate::ops::buffer;
use crate::optim::{Layout, State};

/// State of this rank's part of one block.
#[derive(Clone, Debug)]
pub(super) enum Kept {
    /// Of each piece.
    Host(Arc<Mutex<Vec<State>>>),
    /// Of each piece.
    File(Arc<Filed>),
    /// AdamW's moments of all of it.
    Device { first: Tensor, second: Tensor },
}

/// State in a file.
#[derive(Debug)]
pub(super) struct Filed {
    extent: Extent,
    kind: OptimizerKind,
    layouts: Vec<Layout>,
    spare: Arc<Spare>,
}

/// Host memory that state from a file passes through; it is used again.
#[derive(Debug)]
pub(super) struct Spare {
    most: usize,
    states: Mutex<Vec<Loaded>>,
}

/// The state of a block's pieces in host memory.
#[derive(Debug)]
pub(super) struct Loaded {
    layouts: Vec<Layout>,
    states: Vec<State>,
}

impl Loaded {
    fn fresh(kind: OptimizerKind, layouts: &[Layout]) -> Self {
        let states = layouts.iter().map(|layout| State::new(kind, *layout)).collect();
        Self { layouts: layouts.to_vec(), states }
    }
}

impl Memory for Loaded {
    fn with_bytes(&mut self, visit: &mut dyn FnMut(Vec<&mut [u8]>) -> io::Result<()>) -> Result<io::Result<()>, Error> {
        Ok(visit(self.states.iter_mut().flat_map(State::bytes_mut).collect()))
    }
}

impl Spare {
    /// Memory of which up to `most` blocks' is kept for the next use.
    pub(super) fn new(most: usize) -> Self {
        Self { most, states: Mutex::default() }
    }

    fn take(&self, kind: OptimizerKind, layouts: &[Layout]) -> Loaded {
        let mut all = lock(&self.states);
        let place = all.iter().position(|loaded| loaded.layouts == layouts);
        place.map_or_else(|| Loaded::fresh(kind, layouts), |place| all.swap_remove(place))
    }

    fn give(&self, loaded: Loaded) {
        let mut all = lock(&self.states);
        if all.len() >= self.most && !all.is_empty() {
            all.remove(0);
        }
        all.push(loaded);
    }
}

impl Kept {
    /// Nothing learnt yet, in the file if there is one.
    pub(super) fn new(
        flat: &FlatBlock,
        kind: OptimizerKind,
        file: Option<(&Arc<Shelf>, &Arc<Spare>)>,
    ) -> Result<Self, Error> {
        let (count, device) = (flat.own().len(), flat.stored().device());
        if !device.is_cpu() {
            let zeros = || Tensor::zeros(count, DType::F32, device);
            return Ok(Self::Device { first: zeros()?, second: zeros()? });
        }
        let layouts: Vec<Layout> = flat.own_pieces().map(|piece| piece.layout).collect();
        let Some((shelf, spare)) = file.filter(|_| !layouts.is_empty()) else {
            return Ok(Self::Host(Arc::new(Mutex::new(Loaded::fresh(kind, &layouts).states))));
        };
        let extent = shelf.put(Loaded::fresh(kind, &layouts))?;
        Ok(Self::File(Arc::new(Filed { extent, kind, layouts, spare: spare.clone() })))
    }

    /// Starts to read it, if it lies in a file.
    pub(super) fn start(&self) -> Option<Reading<Loaded>> {
        match self {
            Self::File(filed) => Some(filed.start()),
            Self::Host(_) | Self::Device { .. } => None,
        }
    }

    /// Runs `step` on the state of each piece in host memory, as `reading` brings it; what lies in a file is written there.
    pub(super) fn step(
        &self,
        reading: Option<Reading<Loaded>>,
        step: impl FnOnce(&mut [State]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        match self {
            Self::Host(states) => step(&mut lock(states)),
            Self::File(filed) => filed.change(reading, step),
            Self::Device { .. } => Ok(()),
        }
    }

    /// Two arrays of this rank's part; the second has zeros where a rule keeps one.
    pub(super) fn to_vecs(&self, flat: &FlatBlock) -> Result<[Vec<f32>; 2], Error> {
        let mut all = [vec![0.0; flat.own().len()], vec![0.0; flat.own().len()]];
        let mut copy = |states: &[State]| {
            for (piece, state) in flat.own_pieces().zip(states) {
                for (all, own) in all.iter_mut().zip(state.to_vecs()) {
                    all[piece.range.clone()].copy_from_slice(&own);
                }
            }
        };
        match self {
            Self::Host(states) => copy(&lock(states)),
            Self::File(filed) => {
                let loaded = filed.start().wait()?;
                copy(&loaded.states);
                filed.spare.give(loaded);
            }
            Self::Device { first, second } => return Ok([buffer::to_vec(first)?, buffer::to_vec(second)?]),
        }
        Ok(all)
    }

    /// Takes arrays of [`Self::to_vecs`] back.
    pub(super) fn load(&self, flat: &FlatBlock, arrays: &[Vec<f32>; 2]) -> Result<(), Error> {
        if let Self::Device { first, second } = self {
            buffer::write(first, &arrays[0])?;
            return Ok(buffer::write(second, &arrays[1])?);
        }
        let load = |states: &mut [State]| {
            for (piece, state) in flat.own_pieces().zip(states) {
                state.load(&arrays.each_ref().map(|all| all[piece.range.clone()].to_vec()))?;
            }
            Ok(())
        };
        match self {
            Self::File(filed) => filed.replace(load),
            Self::Host(_) | Self::Device { .. } => self.step(None, load),
        }
    }

    /// Its bytes, wherever they lie.
    pub(super) fn size_bytes(&self) -> usize {
        match self {
            Self::Host(states) => lock(states).iter().map(State::size_bytes).sum(),
            Self::File(filed) => filed.extent.len(),
            Self::Device { first, .. } => 8 * first.elem_count(),
        }
    }

    /// Those of them in a file.
    pub(super) fn bytes_in_file(&self) -> usize {
        if matches!(self, Self::File(_)) { self.size_bytes() } else { 0 }
    }
}

impl Filed {
    fn start(&self) -> Reading<Loaded> {
        self.extent.read(self.spare.take(self.kind, &self.layouts))
    }

    fn change(
        &self,
        reading: Option<Reading<Loaded>>,
        change: impl FnOnce(&mut [State]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut loaded = reading.unwrap_or_else(|| self.start()).wait()?;
        change(&mut loaded.states)?;
        self.write(loaded)
    }

    /// Writes state that `fill` replaces as a whole: what lies there is not read.
    fn replace(&self, fill: impl FnOnce(&mut [State]) -> Result<(), Error>) -> Result<(), Error> {
        let mut loaded = self.spare.take(self.kind, &self.layouts);
        fill(&mut loaded.states)?;
        self.write(loaded)
    }

    fn write(&self, loaded: Loaded) -> Result<(), Error> {
        let spare = self.spare.clone();
        self.extent.write(loaded, move |loaded| spare.give(loaded))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
