//! A decoding step of some lanes: products of few rows straight from packed weights, with their adapters.
//!
//! Everything here works on memory that is lent and asks for none, so that a step can be recorded and repeated. What an adapter
//! needs in the type of the activations is made once, when a rollout begins: the `A`s of a group one below the other, and each
//! `B` scaled, with zeros up to whole steps of ranks.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use super::row;
use crate::device::{Matrix, Pointer, array, empty, matrix, upload_u32};
use crate::kernels::cuda::{
    LowRank, PackedOperand, PackedWeights, Part, ProductCard, ProductForm, ProductKind, ProductOutput,
    ProductWorkspace, RANK_STEP, RowLayout, Rows, WeightKind, assemble, decode_low_rank, decode_low_workspace,
    packed_product, swiglu_rows,
};
use crate::ops::linear::Linear;
use crate::ops::{Error, shape_error};
use crate::quant::Weight;

/// Floats to a multiple of which what lies in one workspace begins.
const WORKSPACE_STEP: usize = 64;

/// Projections of one input as lanes apply them.
#[derive(Debug)]
pub(crate) struct Projections {
    each: Vec<Projection>,
    /// The adapters' `A`s, `[R, K]`, in each order in which products read rows; none without adapters.
    ordered: Vec<(RowLayout, Tensor)>,
    rows: Vec<usize>,
    /// Neighbours of one format, which a launch multiplies together.
    runs: Vec<Run>,
    cols: usize,
    kind: WeightKind,
    card: ProductCard,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Run {
    which: Range<usize>,
    is_gguf: bool,
}

#[derive(Debug)]
struct Projection {
    weight: Weight,
    bias: Option<Tensor>,
    /// The scaled `B`: `[O, r]`, and the first of its ranks.
    b: Option<(Tensor, usize)>,
}

/// Memory that products need beside their inputs and results, for one at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Room {
    /// Low-rank products, of the activations' type.
    pub(crate) low: usize,
    /// Floats of partial sums.
    pub(crate) partial: usize,
    /// Counters, u32.
    pub(crate) arrived: usize,
}

impl Room {
    /// Enough for either.
    pub(crate) fn or(self, other: Self) -> Self {
        Self {
            low: self.low.max(other.low),
            partial: self.partial.max(other.partial),
            arrived: self.arrived.max(other.arrived),
        }
    }
}

/// That memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scratch<'b> {
    /// Of the activations' type.
    pub(crate) low: Pointer<'b>,
    /// f32.
    pub(crate) partial: Pointer<'b>,
    /// u32, zeros.
    pub(crate) arrived: Pointer<'b>,
}

impl Projection {
    fn operand(&self) -> Result<PackedOperand<'_>, Error> {
        let Self { weight, bias, b } = self;
        let Some(weights) = weight.packed()? else {
            return Err(shape_error("lanes", "weight", weight.kind_name(), "a packed weight"));
        };
        let bias = bias.as_ref().map(array).transpose()?;
        let adapter = match b {
            Some((b, first)) => Some((matrix(b)?, *first)),
            None => None,
        };
        Ok(PackedOperand { weights, bias, adapter })
    }
}

impl Projections {
    /// The projections for activations of type `dtype`; `None` where the kernels do not read their weights, or an adapter is
    /// weight-decomposed.
    ///
    /// # Errors
    /// If the device has too little memory for the adapters.
    pub(crate) fn new(
        linears: &[&Linear],
        use_adapter: bool,
        dtype: DType,
        device: &Device,
        card: ProductCard,
    ) -> Result<Option<Self>, Error> {
        let (mut formats, mut codes) = (Vec::with_capacity(linears.len()), 0);
        for linear in linears {
            let is_decomposed = linear.adapter.as_ref().is_some_and(|adapter| adapter.magnitude.is_some());
            let Some(weights) = linear.weight.packed()?.filter(|weights| weights.fits(dtype)) else { return Ok(None) };
            if is_decomposed && use_adapter {
                return Ok(None);
            }
            formats.push((weights.format(dtype), matches!(weights, PackedWeights::Gguf { .. })));
            codes += usize::from(matches!(weights, PackedWeights::Nf4 { .. }));
        }
        // Rows are scaled for codes, and for nothing else.
        if codes != 0 && codes != linears.len() {
            return Ok(None);
        }
        let Some(cols) = linears.first().map(|linear| linear.weight.cols()) else { return Ok(None) };
        let is_dense = linears.iter().all(|linear| matches!(linear.weight, Weight::Dense(_)));
        let kind = match codes {
            0 if is_dense => WeightKind::Dense,
            0 => WeightKind::Blocks,
            _ => WeightKind::Codes,
        };
        let (mut each, mut parts, mut ranks) = (Vec::with_capacity(linears.len()), Vec::new(), 0);
        for linear in linears {
            let mut b = None;
            if let Some(adapter) = linear.adapter.as_ref().filter(|_| use_adapter) {
                let rank = adapter.a.value.dims()[0].next_multiple_of(RANK_STEP);
                let scaled = empty(device, (linear.weight.rows(), rank), dtype)?;
                let source = matrix(&adapter.b.value)?;
                let part = Part { rows: 0, cols: 0, source, factor: adapter.scaling.into() };
                assemble(device, matrix(&scaled)?, &[part])?;
                b = Some((scaled, ranks));
                parts.push((ranks, &adapter.a.value));
                ranks += rank;
            }
            let bias = linear.bias.as_ref().map(|bias| bias.value.clone());
            each.push(Projection { weight: linear.weight.clone(), bias, b });
        }
        let a = if ranks == 0 {
            None
        } else {
            let all = empty(device, (ranks, cols), dtype)?;
            let parts =
                parts.iter().map(|(first, a)| Ok(Part { rows: *first, cols: 0, source: matrix(a)?, factor: 1.0 }));
            assemble(device, matrix(&all)?, &parts.collect::<Result<Vec<_>, Error>>()?)?;
            Some(all)
        };
        let order = |layout: RowLayout, a: &Tensor| {
            let columns: Vec<u32> = (0..cols).map(|place| layout.column(place) as u32).collect();
            let a = a.index_select(&upload_u32(device, &columns)?, 1)?;
            // Of the type of the rows as they lie: those for codes are f16.
            Ok::<_, Error>((layout, if kind == WeightKind::Codes { a.to_dtype(DType::F16)? } else { a }))
        };
        let mut ordered = Vec::new();
        if let Some(a) = &a {
            ordered.push(order(RowLayout::Fragments, a)?);
            if card.has_groups {
                ordered.push(order(RowLayout::Tiles(0), a)?);
            }
        }
        let rows = linears.iter().map(|linear| linear.weight.rows()).collect();
        Ok(Some(Self { each, ordered, rows, runs: runs_of(&formats), cols, kind, card }))
    }

    /// Projections without values, which tell what products of such would need: each has `rows` outputs and an adapter of so many
    /// `ranks`, 0 for none. They cannot be applied.
    ///
    /// # Errors
    /// Never.
    pub(crate) fn sizes(
        (rows, ranks): (&[usize], &[usize]),
        cols: usize,
        kind: WeightKind,
        card: ProductCard,
    ) -> Result<Self, Error> {
        let ranks: usize = ranks.iter().map(|rank| rank.next_multiple_of(RANK_STEP)).sum();
        let a = (ranks > 0).then(|| Tensor::zeros((ranks, 0), DType::F32, &Device::Cpu)).transpose()?;
        let ordered = a.iter().map(|a| (RowLayout::Fragments, a.clone())).collect();
        let (each, rows) = (Vec::new(), rows.to_vec());
        let runs = vec![Run { which: 0..rows.len(), is_gguf: kind == WeightKind::Blocks }];
        Ok(Self { each, ordered, rows, runs, cols, kind, card })
    }

    /// Values that adapters take in the form in which steps read them, as [`Self::new`] makes it: each has an adapter of so many
    /// `ranks`.
    pub(crate) fn adapter_values(&self, ranks: &[usize]) -> usize {
        let padded = ranks.iter().map(|rank| rank.next_multiple_of(RANK_STEP));
        let b: usize = self.rows.iter().zip(padded.clone()).map(|(rows, rank)| rows * rank).sum();
        let orders = 1 + usize::from(self.card.has_groups);
        b + orders * padded.sum::<usize>() * self.cols
    }

    /// `K`.
    pub(crate) fn inputs(&self) -> usize {
        self.cols
    }

    /// The order in which they read rows of so many lanes.
    pub(crate) fn layout(&self, lanes: usize) -> RowLayout {
        RowLayout::choose(lanes, self.outputs(), self.kind, self.card)
    }

    /// `memory` as the rows of so many lanes that they read.
    ///
    /// # Errors
    /// If it is too small.
    pub(crate) fn rows<'b>(&self, memory: Matrix<'b>, lanes: usize) -> Result<Rows<'b>, Error> {
        let rows = Rows::new(memory, lanes, self.layout(lanes))?;
        Ok(if self.kind == WeightKind::Codes { rows.scaled() } else { rows })
    }

    /// Outputs of all together.
    pub(crate) fn outputs(&self) -> usize {
        self.rows.iter().sum()
    }

    /// Bytes of weights and adapters that one application reads.
    pub(crate) fn bytes(&self) -> usize {
        let own = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        let of = |one: &Projection| one.weight.size_bytes() + one.b.as_ref().map_or(0, |(b, _)| own(b));
        self.each.iter().map(of).sum::<usize>() + self.ordered.first().map_or(0, |(_, a)| own(a))
    }

    fn form(&self, run: &Run, lanes: usize, kind: ProductKind) -> ProductForm {
        let (rows, layout) = (&self.rows[run.which.clone()], self.layout(lanes));
        let weights = match self.kind {
            WeightKind::Codes => WeightKind::Codes,
            _ if run.is_gguf => WeightKind::Blocks,
            _ => WeightKind::Dense,
        };
        ProductForm::choose(lanes, rows, self.cols, (kind, weights), layout, self.card)
    }

    /// Floats and counters of the products of so many lanes, without sums that wait for an activation.
    fn workspace(&self, lanes: usize, kind: ProductKind) -> (usize, usize) {
        self.runs.iter().fold((0, 0), |(floats, counters), run| {
            let rows = &self.rows[run.which.clone()];
            let form = self.form(run, lanes, kind);
            let own = form.workspace(lanes, rows, kind == ProductKind::Swiglu, self.layout(lanes));
            (floats.max(own.0), counters.max(own.1))
        })
    }

    /// How the products of a SwiGLU end: in it, if gate and up are of one format.
    fn kind(&self, is_swiglu: bool) -> ProductKind {
        if is_swiglu && self.runs.len() == 1 { ProductKind::Swiglu } else { ProductKind::Sum }
    }

    /// What [`Self::apply`] needs for so many lanes.
    pub(crate) fn room(&self, lanes: usize, is_swiglu: bool) -> Room {
        let kind = self.kind(is_swiglu);
        let (partial, arrived) = self.workspace(lanes, kind);
        let of_low = decode_low_workspace(lanes, self.cols, self.ranks());
        let (mut partial, arrived) = (partial.max(of_low.0), arrived.max(of_low.1));
        if is_swiglu && kind == ProductKind::Sum {
            partial = partial.next_multiple_of(WORKSPACE_STEP) + lanes * self.outputs();
        }
        let low = lanes * self.ranks();
        Room { low, partial, arrived }
    }

    fn ranks(&self) -> usize {
        self.ordered.first().map_or(0, |(_, a)| a.dims()[0])
    }

    fn operands(&self) -> Result<Vec<PackedOperand<'_>>, Error> {
        self.each.iter().map(Projection::operand).collect()
    }

    /// Applies the projections to the rows of `x`.
    ///
    /// # Shapes
    /// `x`: `[M, K]`.
    ///
    /// # Errors
    /// If shapes or types do not fit, or the device fails.
    pub(crate) fn apply(
        &self,
        device: &Device,
        x: Rows<'_>,
        to: ProductOutput<'_>,
        scratch: &Scratch<'_>,
    ) -> Result<(), Error> {
        let workspace = ProductWorkspace { partial: scratch.partial, arrived: scratch.arrived };
        let lanes = x.shape().0;
        let ranks = self.ranks();
        let low = (ranks > 0).then_some(LowRank { values: scratch.low, cols: ranks, is_fresh: true });
        if low.is_some() {
            let is_tiles = |layout: &RowLayout| matches!(layout, RowLayout::Tiles(_));
            let wanted = is_tiles(&self.layout(lanes));
            let Some((_, a)) = self.ordered.iter().find(|(layout, _)| is_tiles(layout) == wanted) else {
                return Err(shape_error("lanes", "layout", lanes, "rows in an order that the adapters have"));
            };
            decode_low_rank(device, x, matrix(a)?, scratch.low, workspace)?;
        }
        let operands = self.operands()?;
        let multiply = |run: &Run, to: ProductOutput<'_>, kind: ProductKind| {
            let form = self.form(run, lanes, kind);
            // Later launches follow one that may begin before the rows are there.
            let low = low.map(|low| LowRank { is_fresh: low.is_fresh && run.which.start == 0, ..low });
            packed_product(device, &operands[run.which.clone()], x, low, to, form, workspace)
        };
        match (to, self.runs.as_slice()) {
            (ProductOutput::Swiglu(_), [all]) => multiply(all, to, ProductKind::Swiglu)?,
            (ProductOutput::Swiglu(activated), [gate, up]) => {
                // Of unlike formats: no block of a product has the rows of both.
                let height = self.rows[0];
                if self.rows[1] != height {
                    return Err(shape_error("lanes", "up", self.rows[1], height));
                }
                let used = self.workspace(lanes, ProductKind::Sum).0.next_multiple_of(WORKSPACE_STEP);
                let sums = scratch.partial.from_element(used).as_matrix((2 * lanes, height));
                let [gates, ups] = [0, lanes].map(|first| sums.rows(first, lanes));
                multiply(gate, ProductOutput::Sum { out: gates, onto: None }, ProductKind::Sum)?;
                multiply(up, ProductOutput::Sum { out: ups, onto: None }, ProductKind::Sum)?;
                swiglu_rows(device, activated, gates, ups)?;
            }
            (ProductOutput::Swiglu(_), _) => {
                return Err(shape_error("lanes", "SwiGLU", self.rows.len(), "two matrices"));
            }
            (ProductOutput::Sum { out, onto }, runs) => {
                let mut first = 0;
                for run in runs {
                    let outputs = self.rows[run.which.clone()].iter().sum();
                    let onto = onto.map(|stream| stream.columns(first, outputs));
                    let to = ProductOutput::Sum { out: out.columns(first, outputs), onto };
                    multiply(run, to, ProductKind::Sum)?;
                    first += outputs;
                }
            }
        }
        Ok(())
    }

    /// The dense matrix where that is all there is, and it is of this type.
    pub(crate) fn as_dense(&self, dtype: DType) -> Result<Option<Matrix<'_>>, Error> {
        match (self.operands()?.as_slice(), self.ordered.first()) {
            ([PackedOperand { weights: PackedWeights::Dense(matrix), bias: None, adapter: None }], None) => {
                Ok((matrix.dtype() == dtype).then_some(*matrix))
            }
            _ => Ok(None),
        }
    }
}

/// Neighbours of one format, by each one's format and whether it is one of GGUF.
fn runs_of(formats: &[(i32, bool)]) -> Vec<Run> {
    let mut end = 0;
    let runs = formats.chunk_by(|left, right| left == right).map(|run| {
        end += run.len();
        Run { which: end - run.len()..end, is_gguf: run[0].1 }
    });
    runs.collect()
}

/// A vector of f32 as kernels for lanes read it.
pub(crate) fn vector(values: &Tensor) -> Result<Pointer<'_>, Error> {
    row(values)?;
    Ok(array(values)?)
}

#[cfg(test)]
mod tests {
    use super::{Run, runs_of};

    #[test]
    fn neighbours_of_one_format_are_multiplied_together() {
        let run = |which, is_gguf| Run { which, is_gguf };
        assert_eq!(runs_of(&[(1, false); 3]), [run(0..3, false)]);
        assert_eq!(runs_of(&[(11, true), (11, true), (13, true)]), [run(0..2, true), run(2..3, true)]);
        assert_eq!(
            runs_of(&[(11, true), (2, false), (11, true)]),
            [run(0..1, true), run(1..2, false), run(2..3, true)]
        );
    }
}
