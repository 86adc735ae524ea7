//! Projections of one input, applied together: on a GPU in one product.

use candle_core::Tensor;

use super::super::view::{dims2, view};
use super::super::{Error, Wide, residual, shape_error};
use super::{Carried, Dropout, Linear, OP, OP_BACKWARD, Saved};

/// How the projections of a group are applied in one pass.
#[derive(Clone, Copy, Debug)]
pub struct Mode<'a> {
    /// Whether adapters take part.
    pub use_adapter: bool,
    /// Dropout of each projection's adapter; empty for none.
    pub dropouts: &'a [Dropout<'a>],
}

impl<'a> Mode<'a> {
    fn dropout(&self, index: usize) -> Option<Dropout<'a>> {
        self.dropouts.get(index).copied()
    }
}

/// What a group of projections keeps for backward, besides its input.
#[derive(Clone, Debug, Default)]
pub struct SavedGroup {
    /// On the CPU: of each projection.
    each: Vec<Saved>,
    /// On a GPU: of all together.
    pub(in crate::ops) on_device: Option<crate::ops::cuda::linear::Saved>,
}

impl SavedGroup {
    /// Whether the low-rank products are all there is, so that keeping them costs little and [`forward_again`] needs no more:
    /// all but `DoRA`.
    pub fn is_low_rank(&self) -> bool {
        self.each.iter().all(|saved| saved.decomposed.is_none())
    }

    /// Takes the low-rank products out, where they are a tensor of a GPU.
    pub fn take_low_rank(&mut self) -> Option<Tensor> {
        self.on_device.as_mut().and_then(|saved| saved.low_rank.take())
    }

    /// Puts back what [`Self::take_low_rank`] took.
    pub fn put_low_rank(&mut self, low_rank: Tensor) {
        if let Some(saved) = &mut self.on_device {
            saved.low_rank = Some(low_rank);
        }
    }
}

/// The outputs of a group.
#[derive(Clone, Debug)]
pub struct Outputs {
    each: Vec<Tensor>,
    whole: Option<Tensor>,
}

impl Outputs {
    /// Outputs of their own memory.
    fn separate(each: Vec<Tensor>) -> Self {
        Self { each, whole: None }
    }

    /// The outputs of a group as columns of one buffer: `[N, O]` of all its projections.
    ///
    /// # Errors
    /// If the buffer has other columns.
    pub fn of_whole(linears: &[&Linear], whole: Tensor) -> Result<Self, Error> {
        let all: usize = linears.iter().map(|l| l.weight.rows()).sum();
        if whole.dims().len() != 2 || whole.dims()[1] != all {
            return Err(shape_error(OP, "outputs", whole.dims(), format!("[N, {all}]")));
        }
        let mut start = 0;
        let mut each = Vec::with_capacity(linears.len());
        for linear in linears {
            let cols = linear.weight.rows();
            each.push(if linears.len() == 1 { whole.clone() } else { whole.narrow(1, start, cols)? });
            start += cols;
        }
        Ok(Self { each, whole: Some(whole) })
    }

    /// The buffer whose columns they are, on a GPU.
    pub fn whole(&self) -> Option<&Tensor> {
        self.whole.as_ref()
    }

    /// One for each projection.
    ///
    /// # Panics
    /// If the group has another number of projections.
    pub fn into_each<const G: usize>(self) -> [Tensor; G] {
        self.each.try_into().unwrap_or_else(|_| unreachable!("a group has one output for each of its projections"))
    }
}

/// The gradient of a group's input. On a GPU the adapters' share of it may still have to be added, which an operation that
/// reads it next can do on the way.
#[derive(Debug)]
#[must_use]
pub struct InputGradient {
    values: Tensor,
    /// The gradient of the low-rank product and the `A`s: `[N, R]`, `[R, I]`.
    share: Option<(Tensor, Tensor)>,
}

impl InputGradient {
    /// A gradient that is whole.
    pub fn whole(values: Tensor) -> Self {
        Self { values, share: None }
    }

    pub(in crate::ops) fn of(values: Tensor, share: Option<(Tensor, Tensor)>) -> Self {
        Self { values, share }
    }

    /// The values without the share, and the share.
    pub(in crate::ops) fn parts(&self) -> (&Tensor, Option<(&Tensor, &Tensor)>) {
        (&self.values, self.share.as_ref().map(|(d_low, a)| (d_low, a)))
    }

    /// The whole gradient. On a GPU it may be columns of a wider buffer.
    ///
    /// # Shapes
    /// `[N, I]`.
    ///
    /// # Errors
    /// If the device fails.
    pub fn into_values(self) -> Result<Tensor, Error> {
        if let Some((d_low, a)) = &self.share {
            crate::ops::cuda::linear::add_share(&self.values, (d_low, a))?;
        }
        Ok(self.values)
    }
}

/// What [`backward_weights`] needs from [`backward_input`].
#[derive(Debug)]
pub struct CarriedGroup {
    each: Vec<Carried>,
    pub(in crate::ops) on_device: Option<crate::ops::cuda::linear::Carried>,
}

impl SavedGroup {
    pub(in crate::ops) fn on_device(saved: crate::ops::cuda::linear::Saved) -> Self {
        Self { each: vec![], on_device: Some(saved) }
    }
}

impl CarriedGroup {
    pub(in crate::ops) fn on_device(carried: crate::ops::cuda::linear::Carried) -> Self {
        Self { each: vec![], on_device: Some(carried) }
    }
}

/// Columns that the low-rank products of a group take behind its input: the sum of the ranks, a multiple of 8.
pub fn room(linears: &[&Linear]) -> usize {
    let rank = |linear: &&Linear| linear.adapter.as_ref().map_or(0, |a| a.a.value.dims()[0]);
    linears.iter().map(rank).sum::<usize>().next_multiple_of(8)
}

/// Projects one input by several projections. With `residual`, to which a group of one is added, the output is of its
/// type, else of the input's.
///
/// # Shapes
/// `x`: `[N, I]`; `residual`: `[N, O]`; returns `[N, O]` for each projection.
///
/// # Errors
/// If the shapes do not fit.
pub fn forward(
    linears: &[&Linear],
    x: &Wide,
    mode: Mode<'_>,
    residual: Option<&Tensor>,
) -> Result<(Outputs, SavedGroup), Error> {
    forward_with(linears, x, mode, residual, None, None)
}

/// [`forward`] of the same input in the same mode again, with the low-rank products that the first one saved. On a GPU the
/// outputs of the first rows, as many as `known` has, are taken from there.
///
/// # Shapes
/// As [`forward`]; `known`: `[M, O]` of all projections, M at most N.
///
/// # Errors
/// If the shapes do not fit.
pub fn forward_again(
    linears: &[&Linear],
    x: &Wide,
    mode: Mode<'_>,
    residual: Option<&Tensor>,
    saved: &SavedGroup,
    known: Option<&Tensor>,
) -> Result<(Outputs, SavedGroup), Error> {
    forward_with(linears, x, mode, residual, Some(saved), known)
}

fn forward_with(
    linears: &[&Linear],
    x: &Wide,
    mode: Mode<'_>,
    residual: Option<&Tensor>,
    first: Option<&SavedGroup>,
    known: Option<&Tensor>,
) -> Result<(Outputs, SavedGroup), Error> {
    if x.buffer().device().is_cuda() {
        return crate::ops::cuda::linear::forward(linears, x, mode, residual, first, known);
    }
    debug_assert!(known.is_none(), "outputs are kept for a GPU only");
    let values = x.values()?;
    let (mut outputs, mut saved) = (Vec::with_capacity(linears.len()), SavedGroup::default());
    for (index, linear) in linears.iter().enumerate() {
        let known = first.and_then(|first| first.each.get(index)).and_then(|own| own.low_rank.clone());
        let (mut y, own) = match known {
            Some(low_rank) => linear.forward_from(&values, Some(low_rank))?,
            None => linear.forward(&values, mode.use_adapter, mode.dropout(index))?,
        };
        if let Some(residual) = residual {
            y = residual::add(y, residual)?;
        }
        outputs.push(y);
        saved.each.push(own);
    }
    Ok((Outputs::separate(outputs), saved))
}

/// What [`forward`] keeps, without its outputs: a block that is computed again for its backward has no use for its last
/// product.
///
/// # Errors
/// If the shapes do not fit.
pub fn saved_only(linears: &[&Linear], x: &Wide, mode: Mode<'_>) -> Result<SavedGroup, Error> {
    if x.buffer().device().is_cuda() {
        return crate::ops::cuda::linear::saved_only(linears, x, mode);
    }
    let has_magnitude = |linear: &&Linear| linear.adapter.as_ref().is_some_and(|a| a.magnitude.is_some());
    if mode.use_adapter && linears.iter().any(has_magnitude) {
        return Ok(forward(linears, x, mode, None)?.1);
    }
    let values = x.values()?;
    let (n, inputs) = dims2(OP, "x", &values)?;
    let values = view(OP, &values)?;
    let each = linears.iter().enumerate().map(|(index, linear)| {
        let adapter = linear.adapter.as_ref().filter(|_| mode.use_adapter);
        let low_rank = adapter.map(|a| a.low_rank(&values, (n, inputs), linear.weight.rows(), mode.dropout(index)));
        Ok(Saved { low_rank: low_rank.transpose()?, decomposed: None })
    });
    Ok(SavedGroup { each: each.collect::<Result<_, Error>>()?, on_device: None })
}

/// The gradient of a group's input; gradients of biases go to their buckets.
///
/// # Shapes
/// `dys`: `[N, O]` for each projection.
///
/// # Errors
/// If the shapes do not fit.
pub fn backward_input(
    linears: &[&Linear],
    dys: &[Tensor],
    saved: &SavedGroup,
    mode: Mode<'_>,
) -> Result<(InputGradient, CarriedGroup), Error> {
    if dys.first().is_some_and(|dy| dy.device().is_cuda()) {
        return crate::ops::cuda::linear::backward_input(linears, dys, saved, mode);
    }
    if dys.len() != linears.len() || saved.each.len() != linears.len() {
        return Err(shape_error(OP_BACKWARD, "dys", [dys.len(), saved.each.len()], linears.len()));
    }
    let (mut sum, mut each): (Option<Tensor>, _) = (None, Vec::with_capacity(linears.len()));
    for (index, (linear, dy)) in linears.iter().zip(dys).enumerate() {
        let (dx, carried) = linear.backward_input(dy, &saved.each[index], mode.dropout(index))?;
        sum = Some(match sum {
            Some(sum) => residual::add(sum, &dx)?,
            None => dx,
        });
        each.push(carried);
    }
    let Some(dx) = sum else { return Err(shape_error(OP_BACKWARD, "linears", 0, "at least one")) };
    let carried = CarriedGroup { each, on_device: None };
    Ok((InputGradient::whole(dx), carried))
}

/// Adds the gradients of a group's weights and adapters to their buckets: those of the weights and of the `A`s from the input
/// `x`, those of the `B`s from the low-rank products in `saved`. Without one of the two the gradients that come of it are left
/// out: they are there already.
///
/// # Shapes
/// `x`: `[N, I]`, as given to [`forward`].
///
/// # Errors
/// If the shapes do not fit.
pub fn backward_weights(
    linears: &[&Linear],
    carried: &CarriedGroup,
    x: Option<&Wide>,
    saved: Option<&SavedGroup>,
    mode: Mode<'_>,
) -> Result<(), Error> {
    if let Some(on_device) = &carried.on_device {
        return crate::ops::cuda::linear::backward_weights(linears, on_device, x, saved, mode);
    }
    let values = x.map(Wide::values).transpose()?;
    for (index, (linear, carried)) in linears.iter().zip(&carried.each).enumerate() {
        let own = saved.map(|saved| &saved.each[index]);
        linear.backward_weights(carried, values.as_ref(), own, mode.dropout(index))?;
    }
    Ok(())
}
