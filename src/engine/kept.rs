//! What the layers of a step leave for backward, and its way back in the order in which backward needs it.

use candle_core::Tensor;

use super::host::{Held, Host};
use super::retention::Plan;
use super::{Activations, Engine, Error, in_layer};
use crate::model::layer::{self, DecoderLayer, Pass, Retained};

/// What a layer leaves for backward.
pub(super) enum Kept {
    Everything(Box<layer::Saved>),
    Retained(Box<KeptRetained>),
}

/// What was retained of a layer, in the order in which backward needs it.
pub(super) struct KeptRetained {
    /// Gate and up of the first rows. Large, they come back once the layer after has given back its own.
    mlp_outputs: Option<Held>,
    most: Retained<Held>,
    /// The products before attention, which come back in the middle of the layer's own MLP.
    products: Option<Held>,
}

/// How a micro-batch's layers are kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct Keeping {
    /// What stays of a layer.
    pub(super) plan: Plan,
    /// Whether that waits in host memory.
    pub(super) is_parked: bool,
    /// Whether the backward of the last layer follows its forward, so that it needs no place to wait.
    pub(super) is_last_next: bool,
}

impl Engine {
    /// The output of layer `index`, and what it leaves for backward.
    pub(super) fn forward_keeping(
        &self,
        layer: &DecoderLayer<'_>,
        index: usize,
        hidden: &Tensor,
        keeping: Keeping,
        pass: &Pass<'_>,
        host: &Host,
    ) -> Result<(Tensor, Kept), Error> {
        let is_next = keeping.is_last_next && index + 1 == self.config.num_hidden_layers;
        let is_asked_to = self.activations == Activations::Keep || index >= self.recomputed_layers;
        let Some(retaining) = keeping.plan.retaining(is_next).filter(|_| !is_asked_to) else {
            let (output, saved) = layer.forward(hidden, pass).map_err(in_layer(index))?;
            return Ok((output, Kept::Everything(Box::new(saved))));
        };
        let (output, mut retained) = layer.forward_retaining(hidden, retaining, pass).map_err(in_layer(index))?;
        let stays = is_next || !keeping.is_parked;
        let place = |tensor| if stays { Ok(Held::Here(tensor)) } else { host.park(tensor) };
        let (products, mlp_outputs) = (retained.take_products(), retained.take_mlp_outputs());
        let kept = KeptRetained {
            mlp_outputs: mlp_outputs.map(place).transpose()?,
            most: retained.map(place)?,
            products: products.map(place).transpose()?,
        };
        host.end_layer()?;
        Ok((output, Kept::Retained(Box::new(kept))))
    }
}

/// What was kept, in the order of backward: layers from the last to the first, of each layer the micro-batches in their order.
pub(super) struct Queue<'h> {
    host: &'h Host,
    /// Of each micro-batch, from the first layer to the last.
    rest: Vec<Vec<Kept>>,
    /// The micro-batch of which the next is taken.
    turn: usize,
    next: Option<Kept>,
}

impl<'h> Queue<'h> {
    /// Starts the way back of the first.
    pub(super) fn new(rest: Vec<Vec<Kept>>, host: &'h Host) -> Result<Self, Error> {
        let mut queue = Self { host, rest, turn: 0, next: None };
        queue.start()?;
        Ok(queue)
    }

    /// The gradient of the input of layer `index` from that of its output and the next of what was kept. The layer before comes back
    /// while this one computes: from the start, or, where it `comes_late`, once the MLP has given back its memory.
    pub(super) fn backward(
        &mut self,
        layer: &DecoderLayer<'_>,
        index: usize,
        gradient: &Tensor,
        comes_late: bool,
        pass: &Pass<'_>,
    ) -> Result<Tensor, Error> {
        let host = self.host;
        let (inside, products) = match self.take()? {
            Kept::Everything(saved) => {
                if !comes_late {
                    self.start()?;
                }
                (layer.backward_down_of_whole(gradient, *saved, pass).map_err(in_layer(index))?, None)
            }
            Kept::Retained(retained) => {
                let KeptRetained { mlp_outputs, most, products } = *retained;
                let most = most.map(|held| host.take(held))?;
                let mlp_outputs = mlp_outputs.map(|held| host.take(held)).transpose()?;
                if !comes_late {
                    self.start()?;
                }
                let inside = layer.backward_down(gradient, most, mlp_outputs, pass).map_err(in_layer(index))?;
                (inside, products.map(|held| host.bring_back(held)).transpose()?)
            }
        };
        let halfway = layer.backward_mlp(gradient, inside, pass).map_err(in_layer(index))?;
        let products = products.map(|held| host.take(held)).transpose()?;
        if comes_late {
            self.start()?;
        }
        self.start_mlp()?;
        layer.backward_attention(halfway, products, pass).map_err(in_layer(index))
    }

    /// The next, which has been started.
    fn take(&mut self) -> Result<Kept, Error> {
        self.next.take().ok_or(Error::NothingKept)
    }

    /// Starts the way back of most of the one after.
    fn start(&mut self) -> Result<(), Error> {
        let count = self.rest.len().max(1);
        let kept = self.rest.get_mut(self.turn).and_then(Vec::pop);
        self.turn = (self.turn + 1) % count;
        self.next = kept.map(|kept| kept.bring_back(self.host)).transpose()?;
        Ok(())
    }

    /// Starts the way back of its gate and up.
    fn start_mlp(&mut self) -> Result<(), Error> {
        self.next = self.next.take().map(|kept| kept.bring_back_mlp(self.host)).transpose()?;
        Ok(())
    }
}

impl Kept {
    /// Starts the way back of most that was retained.
    fn bring_back(self, host: &Host) -> Result<Self, Error> {
        self.change(|KeptRetained { mlp_outputs, most, products }| {
            Ok(KeptRetained { mlp_outputs, most: most.map(|held| host.bring_back(held))?, products })
        })
    }

    /// Starts the way back of gate and up.
    fn bring_back_mlp(self, host: &Host) -> Result<Self, Error> {
        self.change(|KeptRetained { mlp_outputs, most, products }| {
            let mlp_outputs = mlp_outputs.map(|held| host.bring_back(held)).transpose()?;
            Ok(KeptRetained { mlp_outputs, most, products })
        })
    }

    fn change(self, change: impl FnOnce(KeptRetained) -> Result<KeptRetained, Error>) -> Result<Self, Error> {
        match self {
            Self::Retained(retained) => Ok(Self::Retained(Box::new(change(*retained)?))),
            everything @ Self::Everything(_) => Ok(everything),
        }
    }
}
