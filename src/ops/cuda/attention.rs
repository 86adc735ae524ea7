//! Attention over rows of heads.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use crate::device::timers::{Phase, span};
use crate::device::{array, empty, matrix};
use crate::kernels::cuda::{AttentionPlan, SegmentRange, attention_backward, attention_forward, is_deterministic};
use crate::ops::attention::{Heads, Layout, Saved};
use crate::ops::{Error, Wide, shape_error};

impl Layout {
    /// The kernels' work lists, made once.
    fn plan(&self, device: &Device) -> Result<Arc<AttentionPlan>, Error> {
        if let Some(plan) = self.plan.get() {
            return Ok(plan.clone());
        }
        let ranges: Vec<SegmentRange> = self
            .segments()
            .iter()
            .map(|s| SegmentRange {
                start: s.tokens.start,
                end: s.tokens.end,
                prefix: s.prefix.as_ref().map(|p| (p.start, p.end)),
            })
            .collect();
        let mut plan = AttentionPlan::new(device, &ranges)?;
        plan.set_deterministic(is_deterministic(device)?);
        Ok(self.plan.get_or_init(|| Arc::new(plan)).clone())
    }
}

pub(crate) fn forward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    layout: &Layout,
    heads: Heads,
    room: usize,
) -> Result<(Wide, Saved), Error> {
    let device = q.device();
    let plan = layout.plan(device)?;
    let _span = span(device, Phase::Attention)?;
    let (q, k, v) = (matrix(q)?, matrix(k)?, matrix(v)?);
    if layout.num_tokens() != q.rows {
        return Err(shape_error("attention", "layout", layout.num_tokens(), q.rows));
    }
    let o = Wide::empty(device, (q.rows, q.cols), room, q.dtype())?;
    let log_sums = empty(device, (heads.query, q.rows), DType::F32)?;
    let to = matrix(o.buffer())?.columns(0, q.cols);
    attention_forward(device, &plan, to, array(&log_sums)?, q, k, v, heads.query, heads.kv)?;
    Ok((o, Saved { log_sums }))
}

#[expect(clippy::too_many_arguments, reason = "the operands of attention's backward")]
pub(crate) fn backward(
    dy: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    o: &Wide,
    layout: &Layout,
    heads: Heads,
    saved: &Saved,
) -> Result<[Tensor; 3], Error> {
    let device = q.device();
    let plan = layout.plan(device)?;
    let _span = span(device, Phase::Attention)?;
    let (q, k, v) = (matrix(q)?, matrix(k)?, matrix(v)?);
    let all = empty(device, (q.rows, q.cols + k.cols + v.cols), q.dtype())?;
    let out = matrix(&all)?;
    let (dq, dk) = (out.columns(0, q.cols), out.columns(q.cols, k.cols));
    let dv = out.columns(q.cols + k.cols, v.cols);
    let delta = empty(device, (heads.query, q.rows), DType::F32)?;
    let o = matrix(o.buffer())?.columns(0, q.cols);
    let (log_sums, delta) = (array(&saved.log_sums)?, array(&delta)?);
    attention_backward(device, &plan, dq, dk, dv, matrix(dy)?, q, k, v, o, log_sums, delta, heads.query, heads.kv)?;
    let columns = |first, count| all.narrow(1, first, count);
    Ok([columns(0, q.cols)?, columns(q.cols, k.cols)?, columns(q.cols + k.cols, v.cols)?])
}
