//! This rank's part of a block's trained values as blocks read them, where it waits for visits: beside the f32 values, in host
//! memory or in the file that those lie in.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Tensor;

use super::files::{Extent, Reading};
use super::read::ReadLayout;
use super::values::{Stage, Values};
use super::{Error, FlatBlock};
use crate::device::Buffer;
use crate::ops::buffer;

/// Bytes that [`ReadLayout::pack`] made.
#[derive(Debug)]
pub(super) struct Packed {
    place: Place,
    stage: Arc<Stage>,
}

#[derive(Debug)]
enum Place {
    /// Replaced as a whole: copies out of what was there before may still be on their way.
    Memory(Mutex<Arc<Buffer>>),
    File(Extent),
}

/// A rank's part on its way.
#[derive(Debug)]
pub(super) enum Held {
    /// Where it waits.
    Kept(Arc<Buffer>),
    /// In memory that is to be given back.
    Read(Arc<Buffer>),
}

impl Held {
    pub(super) fn buffer(&self) -> &Arc<Buffer> {
        match self {
            Self::Kept(buffer) | Self::Read(buffer) => buffer,
        }
    }
}

/// The bytes of a rank's part, in memory from which copies are made: `own` is f32 `[own]` on the host.
///
/// # Errors
/// If memory runs out.
pub(super) fn pack(layout: &ReadLayout, own: &Tensor, stage: &Stage) -> Result<Buffer, Error> {
    if layout.own_bytes() == 0 {
        return Ok(Buffer::host(0));
    }
    let mut packed = stage.take_buffer(layout.own_bytes())?;
    if own.elem_count() > 0 {
        let bytes = packed.bytes_mut()?;
        buffer::read(own, |values| layout.pack(values, bytes))?;
    }
    Ok(packed)
}

impl Packed {
    /// Those of `values`, like the flat buffer's, in a place of the same kind.
    ///
    /// # Errors
    /// If memory runs out, or a file fails.
    pub(super) fn new(flat: &FlatBlock, values: &Values, stage: &Arc<Stage>) -> Result<Self, Error> {
        let packed = pack(flat.layout(), &flat.own_part(&values.tensor()?)?, stage)?;
        let place = match values.shelf() {
            Some(shelf) => Place::File(shelf.put(packed)?),
            None => Place::Memory(Mutex::new(Arc::new(packed))),
        };
        Ok(Self { place, stage: stage.clone() })
    }

    /// Takes other values: `own` is f32 `[own]` on the host.
    ///
    /// # Errors
    /// If memory runs out, or a file failed.
    pub(super) fn replace(&self, layout: &ReadLayout, own: &Tensor) -> Result<(), Error> {
        let packed = pack(layout, own, &self.stage)?;
        let stage = self.stage.clone();
        match &self.place {
            Place::Memory(place) => {
                let mut place = place.lock().unwrap_or_else(PoisonError::into_inner);
                stage.give_shared(std::mem::replace(&mut place, Arc::new(packed)));
                Ok(())
            }
            Place::File(extent) => extent.write(packed, move |packed| stage.give_buffer(packed)),
        }
    }

    /// Starts to read them if they lie in a file.
    ///
    /// # Errors
    /// If memory runs out.
    pub(super) fn start(&self) -> Result<Option<Reading<Buffer>>, Error> {
        match &self.place {
            Place::Memory(_) => Ok(None),
            Place::File(extent) => Ok(Some(extent.read(self.stage.take_buffer(extent.len())?))),
        }
    }

    /// The bytes, of which `reading` may have begun.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub(super) fn held(&self, reading: Option<Reading<Buffer>>) -> Result<Held, Error> {
        match &self.place {
            Place::Memory(place) => Ok(Held::Kept(Arc::clone(&place.lock().unwrap_or_else(PoisonError::into_inner)))),
            Place::File(extent) => {
                let reading = match reading {
                    Some(reading) => reading,
                    None => extent.read(self.stage.take_buffer(extent.len())?),
                };
                Ok(Held::Read(Arc::new(reading.wait()?)))
            }
        }
    }

    /// Takes memory back that was read into, once the copies out of it were asked for.
    pub(super) fn give(&self, held: Held) {
        if let Held::Read(buffer) = held {
            self.stage.give_shared(buffer);
        }
    }

    /// Bytes in memory.
    pub(super) fn bytes_in_memory(&self) -> usize {
        match &self.place {
            Place::Memory(place) => place.lock().unwrap_or_else(PoisonError::into_inner).len(),
            Place::File(_) => 0,
        }
    }

    /// Bytes in a file.
    pub(super) fn bytes_in_file(&self) -> usize {
        match &self.place {
            Place::Memory(_) => 0,
            Place::File(extent) => extent.len(),
        }
    }
}
