//! What stays of a layer until its backward when the rest is computed again.

use candle_core::Tensor;

use super::AfterAttention;
use crate::ops::{Wide, attention, linear};

/// What stays of a layer by halves, beside its input and the low-rank products, which always do. What stays is not made again, and
/// what is made again is made by the same operations from the same values; gradients are the same, but for one thing: where rows of
/// gate and up stay, a GPU makes the others by a product of fewer rows, which may be summed in another order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retaining {
    /// Of the mixer.
    pub mixer: OfMixer,
    /// Of the feed-forward half: gate and up of so many of the first rows, on a GPU.
    pub gate_up_rows: usize,
}

/// What stays of a layer's mixer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum OfMixer {
    /// Nothing.
    #[default]
    Nothing,
    /// The results of attention and of the product after it.
    Attention,
    /// And the products before it, on a GPU.
    Products,
}

/// The low-rank products of a group whose outputs are computed again. `T` is where large tensors are.
#[derive(Debug)]
pub(super) struct LowRank<T> {
    group: linear::SavedGroup,
    /// The products, where they are a tensor of a GPU.
    products: Option<T>,
}

impl LowRank<Tensor> {
    /// `None` where more than the products would have to be kept.
    fn of(mut group: linear::SavedGroup) -> Option<Self> {
        let products = group.is_low_rank().then(|| group.take_low_rank());
        products.map(|products| Self { group, products })
    }

    pub(super) fn into_group(self) -> linear::SavedGroup {
        let Self { mut group, products } = self;
        if let Some(products) = products {
            group.put_low_rank(products);
        }
        group
    }
}

impl<T> LowRank<T> {
    fn map<U, E>(self, place: &mut impl FnMut(T) -> Result<U, E>) -> Result<LowRank<U>, E> {
        Ok(LowRank { group: self.group, products: self.products.map(place).transpose()? })
    }
}

/// The low-rank products of a layer's groups.
#[derive(Debug)]
pub(super) struct LowRanks<T> {
    pub(super) qkv: Option<LowRank<T>>,
    pub(super) o: Option<LowRank<T>>,
    pub(super) gate_up: Option<LowRank<T>>,
    pub(super) down: Option<LowRank<T>>,
}

/// What stays of a layer until its backward when the rest is computed again. `T` is where the large tensors are.
#[derive(Debug)]
pub struct Retained<T = Tensor> {
    /// The layer's input: `[N, D]`.
    pub(super) input: T,
    pub(super) low_ranks: LowRanks<T>,
    /// The results of attention and of the product after it, where they are kept.
    pub(super) middle: Option<Middle<T>>,
    /// The outputs of the projections before attention, where they are kept.
    products: Option<T>,
    /// Gate and up of the first rows, where they are kept.
    mlp_outputs: Option<T>,
}

/// Attention's results and the residual stream after it.
#[derive(Debug)]
pub(super) struct Middle<T> {
    pub(super) attended: T,
    pub(super) cols: usize,
    pub(super) log_sums: T,
    pub(super) stream: T,
}

impl Retained {
    /// What stays: `middle` with the results of attention, `products` with those of the projections before.
    pub(super) fn new(
        input: Tensor,
        qkv: linear::SavedGroup,
        rest: AfterAttention,
        middle: Option<(Wide, attention::Saved)>,
        products: Option<Tensor>,
    ) -> Self {
        let AfterAttention { o, stream, gate_up, mlp_outputs, down } = rest;
        let low_ranks = LowRanks {
            qkv: LowRank::of(qkv),
            o: LowRank::of(o),
            gate_up: LowRank::of(gate_up),
            down: LowRank::of(down),
        };
        let middle = middle.filter(|_| low_ranks.o.is_some()).map(|(attended, attention)| Middle {
            cols: attended.cols(),
            attended: attended.into_buffer(),
            log_sums: attention.into_log_sums(),
            stream,
        });
        let products = products.filter(|_| middle.is_some() && low_ranks.qkv.is_some());
        let mlp_outputs = mlp_outputs.filter(|_| low_ranks.gate_up.is_some());
        Self { input, low_ranks, middle, products, mlp_outputs }
    }
}

impl<T> Retained<T> {
    /// Takes out the products before attention, which backward needs later than the rest.
    pub fn take_products(&mut self) -> Option<T> {
        self.products.take()
    }

    /// Takes out gate and up of the first rows, which backward needs first of all and which are large.
    pub fn take_mlp_outputs(&mut self) -> Option<T> {
        self.mlp_outputs.take()
    }

    /// The same with every tensor moved by `place`.
    ///
    /// # Errors
    /// If `place` fails.
    pub fn map<U, E>(self, mut place: impl FnMut(T) -> Result<U, E>) -> Result<Retained<U>, E> {
        let input = place(self.input)?;
        let LowRanks { qkv, o, gate_up, down } = self.low_ranks;
        let mut low_rank = |x: Option<LowRank<T>>| x.map(|x| x.map(&mut place)).transpose();
        let low_ranks =
            LowRanks { gate_up: low_rank(gate_up)?, down: low_rank(down)?, o: low_rank(o)?, qkv: low_rank(qkv)? };
        let middle = match self.middle {
            None => None,
            Some(Middle { attended, cols, log_sums, stream }) => {
                let (stream, attended) = (place(stream)?, place(attended)?);
                Some(Middle { attended, cols, log_sums: place(log_sums)?, stream })
            }
        };
        let products = self.products.map(&mut place).transpose()?;
        let mlp_outputs = self.mlp_outputs.map(&mut place).transpose()?;
        Ok(Retained { input, low_ranks, middle, products, mlp_outputs })
    }
}
