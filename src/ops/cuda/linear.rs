//! Projections of one input with their adapters in one product: `y = [x | x Aᵀ] [W | s B]ᵀ + b`.
//!
//! The weights of a group are unpacked one below the other into a buffer with `R` more columns, where the scaled `B`s stand
//! block by block; the room behind each row of `x` takes `x Aᵀ`. The adapters then cost `R` of `I + R` columns instead of
//! passes over `y`, and backward gives `dx` and the gradient of `x Aᵀ` in one product as well.
//!
//! Shapes: `N` tokens, `I` inputs, `O` outputs of all projections together, `R` their ranks, rounded up to 8.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use crate::device::timers::{Phase, span};
use crate::device::{Matrix, array, empty, matrix, upload_u64};
use crate::kernels::cuda::{
    Accumulate, Part, Side, assemble, axpby, column_sums, column_sums_workspace, dropout, fill, gemm,
};
use crate::ops::linear::{
    Adapter, CarriedGroup, Dropout, InputGradient, Linear, Mode, Outputs, SavedGroup, TokenKeys, room,
};
use crate::ops::{Error, Wide, shape_error};

use super::row;

const OP: &str = "linear";

/// Most bytes of weights that are unpacked at a time: with few tokens the activations are small, and so should this be; with
/// many, passing over the result once more costs more than the memory is worth.
pub(crate) fn most_unpacked_bytes(tokens: usize) -> usize {
    (tokens * (24 << 10)).clamp(48 << 20, 192 << 20)
}

/// Most bytes of unpacked weights that wait for a backward that follows at once: little beside the activations.
fn most_waiting_bytes(tokens: usize) -> usize {
    tokens * (40 << 10)
}

/// What a group keeps for backward, besides its input.
#[derive(Clone, Debug)]
pub(crate) struct Saved {
    /// `x Aᵀ`: `[N, R]`, where an adapter takes part.
    pub(crate) low_rank: Option<Tensor>,
    /// Type of the activations. The gradient of a residual sum may come in another, and is multiplied in this one.
    dtype: DType,
    /// The unpacked weights of each panel, where backward follows so soon that they are not unpacked again.
    weights: Vec<Tensor>,
}

/// What the weights' gradients need from the input's.
#[derive(Debug)]
pub(crate) struct Carried {
    dys: SideBySide,
    /// The gradient of `x Aᵀ`: `[N, R]`, columns of a wider buffer.
    d_low_rank: Option<Tensor>,
}

/// The outputs' gradients as columns of one buffer: of their own, or tensors that lie side by side.
#[derive(Debug)]
struct SideBySide(Vec<Tensor>);

impl SideBySide {
    /// `[N, O]`.
    fn matrix(&self) -> Result<Matrix<'_>, Error> {
        let parts: Vec<Matrix<'_>> = self.0.iter().map(matrix).collect::<Result<_, _>>()?;
        Matrix::joined(&parts).ok_or_else(|| shape_error(OP, "dys", self.0.len(), "columns of one buffer"))
    }
}

/// A group of projections and where each one's outputs and ranks begin.
struct Group<'a> {
    linears: &'a [&'a Linear],
    mode: Mode<'a>,
    device: &'a Device,
    inputs: usize,
    outputs: usize,
    /// `R`; 0 where no adapter takes part.
    ranks: usize,
}

impl<'a> Group<'a> {
    fn new(linears: &'a [&'a Linear], mode: Mode<'a>, device: &'a Device) -> Result<Self, Error> {
        let Some(first) = linears.first() else { return Err(shape_error(OP, "linears", 0, "at least one")) };
        let inputs = first.weight.cols();
        for linear in linears {
            if linear.weight.cols() != inputs {
                return Err(shape_error(OP, "weight", linear.weight.cols(), inputs));
            }
            if linear.adapter.as_ref().is_some_and(|a| a.magnitude.is_some()) {
                return Err(Error::Unsupported {
                    op: OP,
                    what: "a weight-decomposed adapter (DoRA)".into(),
                    instead: "set `use_dora: false`, or `device: cpu`",
                });
            }
        }
        let outputs = linears.iter().map(|l| l.weight.rows()).sum();
        let ranks = if mode.use_adapter { room(linears) } else { 0 };
        Ok(Self { linears, mode, device, inputs, outputs, ranks })
    }

    /// Each projection with the rows of its outputs.
    fn outputs(&self) -> impl Iterator<Item = (usize, &'a Linear, Range<usize>)> {
        let mut start = 0;
        self.linears.iter().enumerate().map(move |(index, linear)| {
            let rows = start..start + linear.weight.rows();
            start = rows.end;
            (index, *linear, rows)
        })
    }

    /// Each adapter with the rows of its projection's outputs and its own columns.
    fn adapters(&self) -> impl Iterator<Item = (usize, &'a Adapter, Range<usize>, Range<usize>)> {
        let mut start = 0;
        let is_used = self.ranks > 0;
        self.outputs().filter_map(move |(index, linear, rows)| {
            let adapter = linear.adapter.as_ref().filter(|_| is_used)?;
            let ranks = start..start + adapter.a.value.dims()[0];
            start = ranks.end;
            Some((index, adapter, rows, ranks))
        })
    }

    /// The outputs whose weights are unpacked together: all, or equal parts where all would take too much memory.
    fn panels(&self, dtype: DType, tokens: usize) -> Vec<Range<usize>> {
        let bytes = self.outputs * (self.inputs + self.ranks) * dtype.size_in_bytes();
        let parts = bytes.div_ceil(most_unpacked_bytes(tokens)).max(1);
        // Starts are multiples of 64: whole quantisation blocks of every type, and aligned columns.
        let height = self.outputs.div_ceil(parts).next_multiple_of(64);
        (0..self.outputs).step_by(height).map(|start| start..self.outputs.min(start + height)).collect()
    }

    /// `[W | s B]` of the projections that make the outputs `panel`: `[panel, I + R]`.
    fn weight(&self, panel: &Range<usize>, dtype: DType) -> Result<Tensor, Error> {
        let _span = span(self.device, Phase::Dequantize)?;
        if let ([one], 0) = (self.linears, self.ranks)
            && panel.len() == self.outputs
        {
            return Ok(one.weight.unpack(self.device, dtype)?);
        }
        let out = empty(self.device, (panel.len(), self.inputs + self.ranks), dtype)?;
        let all = matrix(&out)?;
        // The part of a projection's outputs that lies in the panel: its first row there, and rows of the projection.
        let inside = |rows: &Range<usize>| {
            let (start, end) = (rows.start.max(panel.start), rows.end.min(panel.end));
            (start < end).then(|| (start - panel.start, start - rows.start..end - rows.start))
        };
        for (_, linear, rows) in self.outputs() {
            if let Some((first, own)) = inside(&rows) {
                let part = all.rows(first, own.len()).columns(0, self.inputs);
                linear.weight.unpack_into(self.device, part, own.start)?;
            }
        }
        if self.ranks > 0 {
            let mut parts = Vec::with_capacity(self.linears.len());
            for (_, adapter, rows, ranks) in self.adapters() {
                if let Some((first, own)) = inside(&rows) {
                    let source = matrix(&adapter.b.value)?.rows(own.start, own.len());
                    parts.push(Part { rows: first, cols: ranks.start, source, factor: adapter.scaling.into() });
                }
            }
            assemble(self.device, all.columns(self.inputs, self.ranks), &parts)?;
        }
        Ok(out)
    }

    /// The `A`s one below the other, zero rows up to `R`: `[R, I]`.
    fn a(&self, dtype: DType) -> Result<Tensor, Error> {
        let out = empty(self.device, (self.ranks, self.inputs), dtype)?;
        let parts = self.adapters().map(|(_, adapter, _, ranks)| {
            Ok(Part { rows: ranks.start, cols: 0, source: matrix(&adapter.a.value)?, factor: 1.0 })
        });
        assemble(self.device, matrix(&out)?, &parts.collect::<Result<Vec<_>, Error>>()?)?;
        Ok(out)
    }

    /// `x` with room for `R` columns, copied if it has none.
    fn with_room(&self, x: &Wide) -> Result<Wide, Error> {
        if x.cols() != self.inputs {
            return Err(shape_error(OP, "x", x.cols(), self.inputs));
        }
        if x.buffer().dims()[1] >= self.inputs + self.ranks {
            return Ok(x.clone());
        }
        let wide = Wide::empty(self.device, (x.rows(), self.inputs), self.ranks, x.buffer().dtype())?;
        let from = matrix(x.buffer())?.columns(0, self.inputs);
        axpby(self.device, matrix(wide.buffer())?.columns(0, self.inputs), 1.0, from, 0.0)?;
        Ok(wide)
    }

    /// Puts `drop(x) Aᵀ` into the room of `x` and returns a copy of it: `[N, R]`.
    fn low_rank(&self, x: &Wide) -> Result<Option<Tensor>, Error> {
        if self.ranks == 0 {
            return Ok(None);
        }
        let _span = span(self.device, Phase::LowRank)?;
        let all = matrix(x.buffer())?;
        let (values, columns) = (all.columns(0, self.inputs), all.columns(self.inputs, self.ranks));
        let a = self.a(values.dtype())?;
        let product = |out: Matrix, x: Matrix, a: Matrix| {
            gemm(self.device, out, (x, Side::Plain), (a, Side::Transposed), 1.0, Accumulate::No, None)
        };
        if self.mode.dropouts.is_empty() {
            product(columns, values, matrix(&a)?)?;
        } else {
            fill(self.device, columns, 0.0)?;
            let scratch = empty(self.device, (values.rows, self.inputs), values.dtype())?;
            let dropped = matrix(&scratch)?;
            for (index, _, _, ranks) in self.adapters() {
                self.drop(index, dropped, values, false)?;
                let a = matrix(&a)?.rows(ranks.start, ranks.len());
                product(columns.columns(ranks.start, ranks.len()), dropped, a)?;
            }
        }
        let copy = empty(self.device, (values.rows, self.ranks), values.dtype())?;
        axpby(self.device, matrix(&copy)?, 1.0, columns, 0.0)?;
        Ok(Some(copy))
    }

    /// Puts `drop(x) Aᵀ`, computed before, into the room of `x`.
    fn known_low_rank(&self, x: &Wide, low_rank: &Tensor) -> Result<Tensor, Error> {
        if low_rank.dims() != [x.rows(), self.ranks] {
            return Err(shape_error(OP, "low_rank", low_rank.dims(), [x.rows(), self.ranks]));
        }
        let _span = span(self.device, Phase::LowRank)?;
        let columns = matrix(x.buffer())?.columns(self.inputs, self.ranks);
        axpby(self.device, columns, 1.0, matrix(low_rank)?, 0.0)?;
        Ok(low_rank.clone())
    }

    /// `out (=|+=) drop(x)` with the mask of projection `index`.
    fn drop(&self, index: usize, out: Matrix, x: Matrix, is_added: bool) -> Result<(), Error> {
        let Some(Dropout { probability, key, token_keys }) = self.mode.dropouts.get(index).copied() else {
            return Err(shape_error(OP, "dropouts", self.mode.dropouts.len(), self.linears.len()));
        };
        let keys = token_keys.on(self.device)?;
        Ok(dropout(self.device, out, x, array(keys)?, key, probability, is_added)?)
    }

    /// The biases one behind the other, zeros where there is none; `None` if there is none at all.
    fn bias(&self, dtype: DType) -> Result<Option<Tensor>, Error> {
        if self.linears.iter().all(|l| l.bias.is_none()) {
            return Ok(None);
        }
        let out = empty(self.device, self.outputs, dtype)?;
        let mut parts = Vec::with_capacity(self.linears.len());
        for (_, linear, rows) in self.outputs() {
            let Some(bias) = &linear.bias else { continue };
            if bias.value.elem_count() != rows.len() {
                return Err(shape_error(OP, "bias", bias.value.dims(), rows.len()));
            }
            parts.push(Part { rows: 0, cols: rows.start, source: row(&bias.value)?, factor: 1.0 });
        }
        assemble(self.device, row(&out)?, &parts)?;
        Ok(Some(out))
    }
}

impl TokenKeys {
    fn on(&self, device: &Device) -> Result<&Tensor, Error> {
        if let Some(keys) = self.on_device.get() {
            return Ok(keys);
        }
        let keys = upload_u64(device, self.host())?;
        Ok(self.on_device.get_or_init(|| keys))
    }
}

pub(crate) fn forward(
    linears: &[&Linear],
    x: &Wide,
    mode: Mode<'_>,
    residual: Option<&Tensor>,
    first: Option<&SavedGroup>,
    known: Option<&Tensor>,
) -> Result<(Outputs, SavedGroup), Error> {
    let group = Group::new(linears, mode, x.buffer().device())?;
    let (device, dtype) = (group.device, x.buffer().dtype());
    let x = group.with_room(x)?;
    let known_low_rank = first.and_then(|saved| saved.on_device.as_ref()).and_then(|saved| saved.low_rank.as_ref());
    let low_rank = match known_low_rank {
        Some(low_rank) => Some(group.known_low_rank(&x, low_rank)?),
        None => group.low_rank(&x)?,
    };
    let out_dtype = residual.map_or(dtype, Tensor::dtype);
    let y = empty(device, (x.rows(), group.outputs), out_dtype)?;
    let bias = group.bias(out_dtype)?;
    let onto = match residual {
        Some(residual) => Accumulate::Onto(matrix(residual)?),
        None => Accumulate::No,
    };
    let known_rows = known.map_or(0, |known| known.dims()[0]);
    if let Some(known) = known {
        if known.dims() != [known_rows, group.outputs] || known_rows > x.rows() || residual.is_some() {
            return Err(shape_error(OP, "known", known.dims(), [x.rows(), group.outputs]));
        }
        let _span = span(device, Phase::Pointwise)?;
        axpby(device, matrix(&y)?.rows(0, known_rows), 1.0, matrix(known)?, 0.0)?;
    }
    // What is computed again is computed for its backward. (That of queries, keys and values comes after the MLP's.)
    let bytes = group.outputs * (group.inputs + group.ranks) * dtype.size_in_bytes();
    let is_soon_backward = first.is_some() && residual.is_none() && bytes <= most_waiting_bytes(x.rows());
    let mut weights = Vec::new();
    for panel in group.panels(dtype, x.rows()) {
        let weight = group.weight(&panel, dtype)?;
        if is_soon_backward {
            weights.push(weight.clone());
        }
        let _span = span(device, Phase::Multiply)?;
        let x = below(matrix(x.buffer())?.columns(0, group.inputs + group.ranks), known_rows);
        let columns = |m| below(m, known_rows).columns(panel.start, panel.len());
        let onto = match onto {
            Accumulate::Onto(residual) => Accumulate::Onto(columns(residual)),
            other => other,
        };
        let bias = bias.as_ref().map(array).transpose()?.map(|b| b.elements(panel.clone()));
        let weight = (matrix(&weight)?, Side::Transposed);
        gemm(device, columns(matrix(&y)?), (x, Side::Plain), weight, 1.0, onto, bias)?;
    }
    Ok((Outputs::of_whole(linears, y)?, SavedGroup::on_device(Saved { low_rank, dtype, weights })))
}

/// The rows from `first` on.
fn below(m: Matrix<'_>, first: usize) -> Matrix<'_> {
    m.rows(first, m.rows - first)
}

pub(crate) fn saved_only(linears: &[&Linear], x: &Wide, mode: Mode<'_>) -> Result<SavedGroup, Error> {
    let group = Group::new(linears, mode, x.buffer().device())?;
    let x = group.with_room(x)?;
    let saved = Saved { low_rank: group.low_rank(&x)?, dtype: x.buffer().dtype(), weights: Vec::new() };
    Ok(SavedGroup::on_device(saved))
}

pub(crate) fn backward_input(
    linears: &[&Linear],
    dys: &[Tensor],
    saved: &SavedGroup,
    mode: Mode<'_>,
) -> Result<(InputGradient, CarriedGroup), Error> {
    let Some(first) = dys.first() else { return Err(shape_error(OP, "dys", 0, linears.len())) };
    let device = first.device().clone();
    let Some(&Saved { ref low_rank, dtype, ref weights }) = saved.on_device.as_ref() else {
        return Err(shape_error(OP, "saved", "what the CPU kept", "what the GPU kept"));
    };
    let mode = Mode { use_adapter: low_rank.is_some(), ..mode };
    let group = Group::new(linears, mode, &device)?;
    let dys = side_by_side(&group, dys, dtype)?;
    let dy = dys.matrix()?;
    for (_, linear, rows) in group.outputs() {
        if let Some(grad) = linear.bias.as_ref().and_then(|b| b.grad.as_ref()) {
            let part = dy.columns(rows.start, rows.len());
            let workspace = empty(&device, column_sums_workspace(part.rows, part.cols), DType::F32)?;
            column_sums(&device, array(grad)?, part, array(&workspace)?)?;
        }
    }
    let dx = empty(&device, (dy.rows, group.inputs + group.ranks), dtype)?;
    let dx_matrix = matrix(&dx)?;
    for (index, panel) in group.panels(dtype, dy.rows).into_iter().enumerate() {
        let weight = match weights.get(index) {
            Some(weight) => weight.clone(),
            None => group.weight(&panel, dtype)?,
        };
        let _span = span(&device, Phase::Multiply)?;
        let weight = (matrix(&weight)?, Side::Plain);
        let onto = if index == 0 { Accumulate::No } else { Accumulate::Into };
        let dy = dy.columns(panel.start, panel.len());
        gemm(&device, dx_matrix, (dy, Side::Plain), weight, 1.0, onto, None)?;
    }
    let (values, d_low) = (dx_matrix.columns(0, group.inputs), dx_matrix.columns(group.inputs, group.ranks));
    let mut share = None;
    if group.ranks > 0 {
        let _span = span(&device, Phase::LowRank)?;
        let a = group.a(dtype)?;
        if group.mode.dropouts.is_empty() {
            share = Some((dx.narrow(1, group.inputs, group.ranks)?, a));
        } else {
            let scratch = empty(&device, (values.rows, group.inputs), dtype)?;
            let through = matrix(&scratch)?;
            let a = matrix(&a)?;
            for (index, _, _, ranks) in group.adapters() {
                let d_low = d_low.columns(ranks.start, ranks.len());
                let a = a.rows(ranks.start, ranks.len());
                gemm(&device, through, (d_low, Side::Plain), (a, Side::Plain), 1.0, Accumulate::No, None)?;
                group.drop(index, values, through, true)?;
            }
        }
    }
    let d_low_rank = match group.ranks {
        0 => None,
        ranks => Some(dx.narrow(1, group.inputs, ranks)?),
    };
    let values = if group.ranks == 0 { dx } else { dx.narrow(1, 0, group.inputs)? };
    Ok((InputGradient::of(values, share), CarriedGroup::on_device(Carried { dys, d_low_rank })))
}

/// Adds `d_low A` to the gradient of the input.
pub(crate) fn add_share(values: &Tensor, (d_low, a): (&Tensor, &Tensor)) -> Result<(), Error> {
    let device = values.device();
    let _span = span(device, Phase::LowRank)?;
    let (d_low, a) = ((matrix(d_low)?, Side::Plain), (matrix(a)?, Side::Plain));
    Ok(gemm(device, matrix(values)?, d_low, a, 1.0, Accumulate::Into, None)?)
}

/// The outputs' gradients as columns of one buffer of type `dtype`; they are copied only if they are not that already.
fn side_by_side(group: &Group<'_>, dys: &[Tensor], dtype: DType) -> Result<SideBySide, Error> {
    let parts: Vec<Matrix<'_>> = dys.iter().map(matrix).collect::<Result<_, _>>()?;
    if parts.len() != group.linears.len() {
        return Err(shape_error(OP, "dys", parts.len(), group.linears.len()));
    }
    for ((_, linear, rows), part) in group.outputs().zip(&parts) {
        if part.cols != rows.len() || part.rows != parts[0].rows {
            return Err(shape_error(OP, "dy", [part.rows, part.cols], [parts[0].rows, linear.weight.rows()]));
        }
    }
    if parts[0].dtype() == dtype && Matrix::joined(&parts).is_some() {
        return Ok(SideBySide(dys.to_vec()));
    }
    let out = empty(group.device, (parts[0].rows, group.outputs), dtype)?;
    let all = matrix(&out)?;
    for ((_, _, rows), part) in group.outputs().zip(&parts) {
        axpby(group.device, all.columns(rows.start, rows.len()), 1.0, *part, 0.0)?;
    }
    Ok(SideBySide(vec![out]))
}

pub(crate) fn backward_weights(
    linears: &[&Linear],
    carried: &Carried,
    x: Option<&Wide>,
    saved: Option<&SavedGroup>,
    mode: Mode<'_>,
) -> Result<(), Error> {
    let Some(device) = carried.dys.0.first().map(Tensor::device) else {
        return Err(shape_error(OP, "dys", 0, linears.len()));
    };
    let all_dy = carried.dys.matrix()?;
    let mode = Mode { use_adapter: carried.d_low_rank.is_some(), ..mode };
    let group = Group::new(linears, mode, device)?;
    let _span = span(device, Phase::LowRank)?;
    let low_rank = saved.and_then(|saved| saved.on_device.as_ref()).and_then(|saved| saved.low_rank.as_ref());
    if let Some(low_rank) = low_rank {
        let low_rank = matrix(low_rank)?;
        for (_, adapter, rows, ranks) in group.adapters() {
            if let Some(grad) = &adapter.b.grad {
                let dy = (all_dy.columns(rows.start, rows.len()), Side::Transposed);
                let low = (low_rank.columns(ranks.start, ranks.len()), Side::Plain);
                gemm(device, matrix(grad)?, dy, low, adapter.scaling, Accumulate::Into, None)?;
            }
        }
    }
    match x {
        Some(x) => backward_from_input(&group, carried, matrix(x.buffer())?.columns(0, group.inputs)),
        None => Ok(()),
    }
}

/// The gradients of the weights and of the `A`s.
fn backward_from_input(group: &Group<'_>, carried: &Carried, x: Matrix) -> Result<(), Error> {
    let (device, all_dy) = (group.device, carried.dys.matrix()?);
    for (_, linear, rows) in group.outputs() {
        if let Some(grad) = &linear.weight_grad {
            let dy = (all_dy.columns(rows.start, rows.len()), Side::Transposed);
            gemm(device, matrix(grad)?, dy, (x, Side::Plain), 1.0, Accumulate::Into, None)?;
        }
    }
    let Some(d_low) = &carried.d_low_rank else { return Ok(()) };
    let d_low = matrix(d_low)?;
    if !group.mode.dropouts.is_empty() {
        let scratch = empty(device, (x.rows, group.inputs), x.dtype())?;
        let dropped = matrix(&scratch)?;
        for (index, adapter, _, ranks) in group.adapters() {
            if let Some(grad) = &adapter.a.grad {
                group.drop(index, dropped, x, false)?;
                let d_low = (d_low.columns(ranks.start, ranks.len()), Side::Transposed);
                gemm(device, matrix(grad)?, d_low, (dropped, Side::Plain), 1.0, Accumulate::Into, None)?;
            }
        }
        return Ok(());
    }
    let grads: Vec<_> =
        group.adapters().filter_map(|(_, adapter, _, ranks)| Some((adapter.a.grad.as_ref()?, ranks))).collect();
    if let [(grad, ranks)] = grads.as_slice() {
        let d_low = (d_low.columns(ranks.start, ranks.len()), Side::Transposed);
        gemm(device, matrix(grad)?, d_low, (x, Side::Plain), 1.0, Accumulate::Into, None)?;
    } else if !grads.is_empty() {
        // One product reads `x` once for all adapters of the group.
        let sums = empty(device, (group.ranks, group.inputs), DType::F32)?;
        let all = matrix(&sums)?;
        gemm(device, all, (d_low, Side::Transposed), (x, Side::Plain), 1.0, Accumulate::No, None)?;
        for (grad, ranks) in grads {
            axpby(device, matrix(grad)?, 1.0, all.rows(ranks.start, ranks.len()), 1.0)?;
        }
    }
    Ok(())
}
