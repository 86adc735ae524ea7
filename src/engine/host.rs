//! Where retained activations wait for their backward: where they are, or in page-locked host memory.

use candle_core::{Device, Tensor};

use super::Error;
use crate::device::{Parked, Parking, Returning};

/// A retained tensor.
#[derive(Debug)]
pub(super) enum Held {
    /// Where it was made.
    Here(Tensor),
    /// In host memory.
    Parked(Parked),
    /// On its way back to the device.
    Returning(Returning),
}

/// The host memory of an engine's passes, if they use any.
#[derive(Debug)]
pub(super) struct Host {
    parking: Option<Parking>,
}

impl Host {
    /// Host memory, if it `is_wanted` and the device is a GPU.
    pub(super) fn new(device: &Device, is_wanted: bool) -> Result<Self, Error> {
        let parking = (is_wanted && device.is_cuda()).then(|| Parking::new(device)).transpose();
        Ok(Self { parking: parking.map_err(crate::ops::Error::from)? })
    }

    /// Lets go of a tensor until [`Self::take`].
    pub(super) fn park(&self, tensor: Tensor) -> Result<Held, Error> {
        match &self.parking {
            Some(parking) => Ok(Held::Parked(parking.park(tensor).map_err(crate::ops::Error::from)?)),
            None => Ok(Held::Here(tensor)),
        }
    }

    /// Tells that what was parked since the last call is all of a layer: copies out of the layer before are waited for.
    pub(super) fn end_layer(&self) -> Result<(), Error> {
        match &self.parking {
            Some(parking) => Ok(parking.end_layer().map_err(crate::ops::Error::from)?),
            None => Ok(()),
        }
    }

    /// Waits, on the device, for the copies out.
    pub(super) fn settle(&self) -> Result<(), Error> {
        match &self.parking {
            Some(parking) => Ok(parking.settle().map_err(crate::ops::Error::from)?),
            None => Ok(()),
        }
    }

    /// Starts the way back.
    pub(super) fn bring_back(&self, held: Held) -> Result<Held, Error> {
        match (&self.parking, held) {
            (Some(parking), Held::Parked(parked)) => {
                Ok(Held::Returning(parking.bring_back(parked).map_err(crate::ops::Error::from)?))
            }
            (_, held) => Ok(held),
        }
    }

    /// The tensor, ready to compute with.
    pub(super) fn take(&self, held: Held) -> Result<Tensor, Error> {
        match (&self.parking, self.bring_back(held)?) {
            (_, Held::Here(tensor)) => Ok(tensor),
            (Some(parking), Held::Returning(returning)) => {
                Ok(parking.take(returning).map_err(crate::ops::Error::from)?)
            }
            (_, Held::Parked(_) | Held::Returning(_)) => {
                unreachable!("only a parking parks, and `bring_back` starts the way of everything that is parked")
            }
        }
    }
}
