//! The gradients of the gated activation together with the thin products of the adapters around it.
//!
//! Beside [`super::swiglu_backward`], which works for all types and shapes, this reads every large operand once: the
//! adapter's share of `dy`, the gradients of gate and up, and the sums over rows that the adapters' own gradients are.

use candle_core::{DType, Device};

use super::checks::{expect_array, expect_shape, expect_type};
use super::launch::{RawMatrix, RawStream, kernels, launched, stream};
use crate::device::{Error, Matrix, Pointer, argument, compute_capability};

kernels! {
    // Of `swiglu_adapters.cu`.
    fn trainer_swiglu_backward_adapters(
        d_gate: RawMatrix,
        d_up: RawMatrix,
        dy: RawMatrix,
        gate: RawMatrix,
        up: RawMatrix,
        d_low: RawMatrix,
        a: RawMatrix,
        grad_a: RawMatrix,
        low_gate: RawMatrix,
        grad_b_gate: RawMatrix,
        gate_factor: f32,
        low_up: RawMatrix,
        grad_b_up: RawMatrix,
        up_factor: f32,
        workspace: u64,
        share: i32,
        stream: RawStream,
    ) -> i32;
}

/// Most ranks of an adapter that [`swiglu_backward_adapters`] takes.
pub const MOST_SWIGLU_RANKS: usize = 32;

/// The adapter of the projection that takes the activation `y`.
#[derive(Clone, Copy, Debug)]
pub struct DownAdapter<'b> {
    /// `[N, R]`: the gradient of its low-rank product `y A^T`.
    pub d_low: Matrix<'b>,
    /// `[R, I]`: `d_low A` is its share of the gradient of `y`.
    pub a: Matrix<'b>,
    /// f32 `[r, I]`, r at most R: `d_low^T y` is added, without the ranks from r on.
    pub grad_a: Option<Matrix<'b>>,
}

/// The adapter of the projection that gives gate or up.
#[derive(Clone, Copy, Debug)]
pub struct OutAdapter<'b> {
    /// `[N, R]`: its low-rank product.
    pub low: Matrix<'b>,
    /// f32 `[I, r]`, r at most R: `factor d^T low` is added, where `d` is the gradient of gate or up.
    pub grad_b: Matrix<'b>,
    /// The factor of the adapter.
    pub factor: f32,
}

/// The adapters around the activation that there are.
#[derive(Clone, Copy, Debug, Default)]
pub struct MlpAdapters<'b> {
    /// Behind the activation.
    pub down: Option<DownAdapter<'b>>,
    /// Before the gate.
    pub gate: Option<OutAdapter<'b>>,
    /// Before up.
    pub up: Option<OutAdapter<'b>>,
}

impl<'b> MlpAdapters<'b> {
    fn lows(&self) -> impl Iterator<Item = Matrix<'b>> + use<'b> {
        let lows = [self.down.map(|a| a.d_low), self.gate.map(|a| a.low), self.up.map(|a| a.low)];
        lows.into_iter().flatten()
    }

    /// The ranks of the adapter with the most.
    pub fn most_ranks(&self) -> usize {
        self.lows().map(|low| low.cols).max().unwrap_or(0)
    }
}

/// Whether [`swiglu_backward_adapters`] takes these operands: 16-bit values that the GPU's tensor cores multiply, rows
/// at multiples of 16 bytes, and ranks that are multiples of 8 up to [`MOST_SWIGLU_RANKS`]. For all others there are
/// [`super::swiglu_backward`] and separate products.
pub fn swiglu_adapters_fit(
    device: &Device,
    d_gate: &Matrix,
    d_up: &Matrix,
    dy: &Matrix,
    gate: &Matrix,
    up: &Matrix,
    adapters: &MlpAdapters,
) -> bool {
    let is_aligned =
        |m: &Matrix| m.address.is_multiple_of(16) && m.stride.is_multiple_of(8) && m.cols.is_multiple_of(8);
    let mut lows = adapters.lows();
    has_tensor_cores(device, gate.dtype())
        && [d_gate, d_up, dy, gate, up].into_iter().all(is_aligned)
        && adapters.down.is_none_or(|down| is_aligned(&down.a))
        && lows.all(|low| is_aligned(&low) && (1..=MOST_SWIGLU_RANKS).contains(&low.cols))
}

fn has_tensor_cores(device: &Device, dtype: DType) -> bool {
    let least = match dtype {
        DType::F16 => (7, 5),
        DType::BF16 => (8, 0),
        _ => return false,
    };
    let capability = compute_capability(device).ok();
    capability.is_some_and(|capability| capability >= least)
}

/// Blocks across the columns: of four warps that have 32 columns each.
fn blocks_across(cols: usize) -> usize {
    cols.div_ceil(128)
}

/// Ranks as the kernels take them.
fn rounded_ranks(most_ranks: usize) -> usize {
    if most_ranks <= 16 { 16 } else { MOST_SWIGLU_RANKS }
}

/// Rows that a block sums, a multiple of 8: such that the blocks are few, as each leaves sums to be added, and that no
/// multiprocessor has more to do than the others. Depends on the shape alone, so that a sum's order does.
fn share_rows(rows: usize, across: usize) -> usize {
    /// Multiprocessors that share the blocks.
    const MULTIPROCESSORS: usize = 132;
    /// What writing and adding the sums of a block takes, in rows.
    const SUMS: usize = 40;
    /// The least that is worth a block of its own.
    const ROWS: usize = 64;
    let rows = rows.max(1);
    let cost = |&share: &usize| (across * rows.div_ceil(share)).div_ceil(MULTIPROCESSORS) * (share + SUMS);
    let counts = 1..=rows.div_ceil(ROWS).min(4 * MULTIPROCESSORS);
    let shares = counts.map(|count| rows.div_ceil(count).next_multiple_of(8));
    shares.min_by_key(cost).unwrap_or(rows.next_multiple_of(8))
}

/// Length of the workspace, in f32, of [`swiglu_backward_adapters`] for `[rows, cols]` values and adapters of at most
/// `most_ranks` ranks.
pub fn swiglu_backward_adapters_workspace(rows: usize, cols: usize, most_ranks: usize) -> usize {
    // Three parts of the sums of a warp.
    let warp = 3 * 32 * rounded_ranks(most_ranks);
    let across = blocks_across(cols);
    rows.div_ceil(share_rows(rows, across)) * across * 4 * warp
}

fn expect_adapters(kernel: &'static str, adapters: &MlpAdapters, gate: &Matrix) -> Result<(), Error> {
    let expect_low = |name, low: &Matrix| {
        expect_shape(kernel, name, low, gate.rows, low.cols)?;
        expect_type(kernel, name, low, gate.dtype())
    };
    if let Some(down) = &adapters.down {
        expect_low("d_low", &down.d_low)?;
        expect_shape(kernel, "a", &down.a, down.d_low.cols, gate.cols)?;
        expect_type(kernel, "a", &down.a, gate.dtype())?;
        if let Some(grad) = &down.grad_a {
            expect_shape(kernel, "grad_a", grad, grad.rows.min(down.d_low.cols), gate.cols)?;
            expect_type(kernel, "grad_a", grad, DType::F32)?;
        }
    }
    for (low_name, grad_name, adapter) in
        [("gate.low", "gate.grad_b", adapters.gate), ("up.low", "up.grad_b", adapters.up)]
    {
        let Some(OutAdapter { low, grad_b, .. }) = &adapter else { continue };
        expect_low(low_name, low)?;
        expect_shape(kernel, grad_name, grad_b, gate.cols, grad_b.cols.min(low.cols))?;
        expect_type(kernel, grad_name, grad_b, DType::F32)?;
    }
    Ok(())
}

/// The gradients of [`super::swiglu`] with respect to `gate` and `up`, where the gradient of its result `y` is `dy` and
/// the share of an adapter behind it, and the gradients of the adapters around it, for which `y`, `d_gate` and `d_up`
/// are summed as they are rounded. The order of the sums depends on the shapes alone.
///
/// # Shapes
/// `d_gate`, `d_up`, `dy`, `gate`, `up`: T `[N, I]`; `d_gate` and `d_up` may lie on any of the other three. The
/// adapters' operands are of type T, no result lies on them; their gradients are f32. `workspace`: f32 of
/// [`swiglu_backward_adapters_workspace`], at a multiple of 16 bytes.
///
/// # Errors
/// If shapes or types differ, or [`swiglu_adapters_fit`] does not hold.
///
/// # Equation
/// With `s = 1 / (1 + exp(-gate))` and `g = dy + d_low A`: `d_up = g gate s`, `d_gate = g up s (1 + gate (1 - s))`;
/// `grad_a += d_low^T (gate s up)`, `grad_b += factor d_gate^T low` and the same of up.
#[expect(clippy::too_many_arguments, reason = "the operands of one kernel")]
pub fn swiglu_backward_adapters(
    device: &Device,
    d_gate: Matrix,
    d_up: Matrix,
    dy: Matrix,
    gate: Matrix,
    up: Matrix,
    adapters: MlpAdapters,
    workspace: Pointer,
) -> Result<(), Error> {
    const KERNEL: &str = "swiglu_backward_adapters";
    for (name, m) in [("d_gate", d_gate), ("d_up", d_up), ("dy", dy), ("gate", gate), ("up", up)] {
        expect_shape(KERNEL, name, &m, gate.rows, gate.cols)?;
        expect_type(KERNEL, name, &m, gate.dtype())?;
    }
    expect_adapters(KERNEL, &adapters, &gate)?;
    let ranks = adapters.most_ranks();
    if !swiglu_adapters_fit(device, &d_gate, &d_up, &dy, &gate, &up, &adapters) {
        let expected = "operands for which `swiglu_adapters_fit` holds; take `swiglu_backward` for others";
        return Err(argument(KERNEL, "adapters", (gate.dtype(), [gate.rows, gate.cols, ranks]), expected));
    }
    let needed = swiglu_backward_adapters_workspace(gate.rows, gate.cols, ranks);
    expect_array(KERNEL, "workspace", workspace, DType::F32, needed)?;
    let MlpAdapters { down, gate: of_gate, up: of_up } = adapters;
    // SAFETY: the arguments are views of live device memory whose shapes were checked above; the work is ordered by the
    // device's one compute stream.
    let code = unsafe {
        trainer_swiglu_backward_adapters(
            d_gate.into(),
            d_up.into(),
            dy.into(),
            gate.into(),
            up.into(),
            RawMatrix::or_none(down.map(|a| a.d_low)),
            RawMatrix::or_none(down.map(|a| a.a)),
            RawMatrix::or_none(down.and_then(|a| a.grad_a)),
            RawMatrix::or_none(of_gate.map(|a| a.low)),
            RawMatrix::or_none(of_gate.map(|a| a.grad_b)),
            of_gate.map_or(0.0, |a| a.factor),
            RawMatrix::or_none(of_up.map(|a| a.low)),
            RawMatrix::or_none(of_up.map(|a| a.grad_b)),
            of_up.map_or(0.0, |a| a.factor),
            workspace.address,
            share_rows(gate.rows, blocks_across(gate.cols)) as i32,
            stream(device)?,
        )
    };
    launched(KERNEL, code)
}

#[cfg(test)]
mod tests {
    use super::{blocks_across, share_rows, swiglu_backward_adapters_workspace};

    #[test]
    fn shares_are_multiples_of_8_and_fill_the_device() {
        for (rows, cols, blocks) in [(8192, 18_944, 1184), (8192, 4864, 380), (2048, 18_944, 1184)] {
            let across = blocks_across(cols);
            let share = share_rows(rows, across);
            assert!(share.is_multiple_of(8));
            assert_eq!(rows.div_ceil(share) * across, blocks, "[{rows}, {cols}] in shares of {share} rows");
        }
        for rows in [0, 1, 7, 63, 64, 65, 5000] {
            for across in [1, 3, 200, 300] {
                let share = share_rows(rows, across);
                assert!(
                    share >= 8 && share.is_multiple_of(8) && share < rows.max(1) + 8,
                    "{rows} rows, {across} across: {share}"
                );
            }
        }
    }

    #[test]
    fn the_workspace_has_the_sums_of_all_warps() {
        assert_eq!(swiglu_backward_adapters_workspace(0, 256, 16), 0);
        assert_eq!(swiglu_backward_adapters_workspace(1, 8, 16), 4 * 1536);
        assert_eq!(swiglu_backward_adapters_workspace(1, 256, 24), 8 * 3072);
    }
}
