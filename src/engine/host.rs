//! Where retained activations wait for their backward: where they are, or in page-locked host memory.

use candle_core::{Device, Tensor};

use super::Error;
#[cfg(feature = "cuda")]
use crate::device::{Parked, Parking, Returning};

/// A retained tensor.
#[derive(Debug)]
pub(super) enum Held {
    /// Where it was made.
    Here(Tensor),
    /// In host memory.
    #[cfg(feature = "cuda")]
    Parked(Parked),
    /// On its way back to the device.
    #[cfg(feature = "cuda")]
    Returning(Returning),
}

/// The host memory of an engine's passes, if they use any.
#[derive(Debug)]
pub(super) struct Host {
    #[cfg(feature = "cuda")]
    parking: Option<Parking>,
}

impl Host {
    /// Host memory, if it `is_wanted` and the device is a GPU.
    #[cfg_attr(not(feature = "cuda"), expect(clippy::unnecessary_wraps, reason = "a GPU may refuse"))]
    pub(super) fn new(device: &Device, is_wanted: bool) -> Result<Self, Error> {
        #[cfg(feature = "cuda")]
        {
            let parking = (is_wanted && device.is_cuda()).then(|| Parking::new(device)).transpose();
            Ok(Self { parking: parking.map_err(crate::ops::Error::from)? })
        }
        #[cfg(not(feature = "cuda"))]
        {
            debug_assert!(device.is_cpu(), "without the feature every device is the CPU: {is_wanted}");
            Ok(Self {})
        }
    }

    /// Lets go of a tensor until [`Self::take`].
    #[cfg_attr(
        not(feature = "cuda"),
        expect(clippy::unused_self, clippy::unnecessary_wraps, reason = "a GPU copies and may fail")
    )]
    pub(super) fn park(&self, tensor: Tensor) -> Result<Held, Error> {
        #[cfg(feature = "cuda")]
        if let Some(parking) = &self.parking {
            return Ok(Held::Parked(parking.park(tensor).map_err(crate::ops::Error::from)?));
        }
        Ok(Held::Here(tensor))
    }

    /// Tells that what was parked since the last call is all of a layer: copies out of the layer before are waited for.
    #[cfg_attr(
        not(feature = "cuda"),
        expect(clippy::unused_self, clippy::unnecessary_wraps, reason = "a GPU waits and may fail")
    )]
    pub(super) fn end_layer(&self) -> Result<(), Error> {
        #[cfg(feature = "cuda")]
        if let Some(parking) = &self.parking {
            parking.end_layer().map_err(crate::ops::Error::from)?;
        }
        Ok(())
    }

    /// Waits, on the device, for the copies out.
    #[cfg_attr(
        not(feature = "cuda"),
        expect(clippy::unused_self, clippy::unnecessary_wraps, reason = "a GPU waits and may fail")
    )]
    pub(super) fn settle(&self) -> Result<(), Error> {
        #[cfg(feature = "cuda")]
        if let Some(parking) = &self.parking {
            parking.settle().map_err(crate::ops::Error::from)?;
        }
        Ok(())
    }

    /// Starts the way back.
    #[cfg_attr(
        not(feature = "cuda"),
        expect(clippy::unused_self, clippy::unnecessary_wraps, reason = "a GPU copies and may fail")
    )]
    pub(super) fn bring_back(&self, held: Held) -> Result<Held, Error> {
        #[cfg(feature = "cuda")]
        if let (Some(parking), Held::Parked(_)) = (&self.parking, &held) {
            let Held::Parked(parked) = held else { return Ok(held) };
            return Ok(Held::Returning(parking.bring_back(parked).map_err(crate::ops::Error::from)?));
        }
        Ok(held)
    }

    /// The tensor, ready to compute with.
    #[cfg_attr(
        not(feature = "cuda"),
        expect(clippy::unused_self, clippy::unnecessary_wraps, reason = "a GPU waits and may fail")
    )]
    pub(super) fn take(&self, held: Held) -> Result<Tensor, Error> {
        #[cfg(feature = "cuda")]
        if let Some(parking) = &self.parking {
            return match self.bring_back(held)? {
                Held::Returning(returning) => Ok(parking.take(returning).map_err(crate::ops::Error::from)?),
                Held::Here(tensor) => Ok(tensor),
                Held::Parked(_) => unreachable!("`bring_back` starts the way of every parked tensor"),
            };
        }
        match held {
            Held::Here(tensor) => Ok(tensor),
            #[cfg(feature = "cuda")]
            Held::Parked(_) | Held::Returning(_) => unreachable!("only a parking parks"),
        }
    }
}
