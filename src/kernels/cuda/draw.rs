//! Drawing the next tokens of decoding steps. Where the lanes stand is read from [`LanesView`], so that a step can be recorded and
//! repeated.

use candle_core::{DType, Device};

use super::checks::expect_array;
use super::lanes::LanesView;
use super::launch::{RawStream, kernels, launched, stream};
use crate::device::{Error, Matrix, Pointer, argument};

/// Logits of a chunk of the distribution.
const DRAW_CHUNK: usize = 512;

kernels! {
    // Of `draw.cu`.
    fn trainer_decode_draw(draw: *const RawDraw, stream: RawStream) -> i32;
}

/// `Draw` of `draw.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct RawDraw {
    logits: u64,
    chunks: u64,
    uniforms: u64,
    tokens: u64,
    positions: u64,
    rows: u64,
    steps: u64,
    drawn: u64,
    logprobs: u64,
    temperature: f32,
    lanes: i32,
    vocabulary: i32,
    most_steps: i32,
}

/// Floats of the workspace of [`decode_draw`].
pub fn decode_draw_workspace(lanes: usize, vocabulary: usize) -> usize {
    2 * lanes * vocabulary.div_ceil(DRAW_CHUNK)
}

/// Draws each lane's next token from its logits divided by `temperature` (0: the first of the largest) by its uniform number of
/// this step, notes it with its log-probability, and moves the lanes on by one.
///
/// # Shapes
/// `logits`: f32 `[M, V]` without gaps; `workspace`: f32, [`decode_draw_workspace`] elements.
///
/// # Errors
/// If shapes or types do not fit or the launch fails.
pub fn decode_draw(
    device: &Device,
    logits: Matrix<'_>,
    lanes: &LanesView<'_>,
    temperature: f32,
    workspace: Pointer<'_>,
) -> Result<(), Error> {
    const KERNEL: &str = "decode draw";
    let vocabulary = lanes.vocabulary;
    if logits.shape() != (lanes.lanes, vocabulary) || logits.stride != vocabulary || logits.dtype() != DType::F32 {
        return Err(argument(KERNEL, "logits", logits, format!("f32 [{}, {vocabulary}]", lanes.lanes)));
    }
    expect_array(KERNEL, "workspace", workspace, DType::F32, decode_draw_workspace(lanes.lanes, vocabulary))?;
    let raw = RawDraw {
        logits: logits.address,
        chunks: workspace.address,
        uniforms: lanes.uniforms.address,
        tokens: lanes.tokens.address,
        positions: lanes.positions.address,
        rows: lanes.rows.address,
        steps: lanes.steps.address,
        drawn: lanes.drawn.address,
        logprobs: lanes.logprobs.address,
        temperature,
        lanes: lanes.lanes as i32,
        vocabulary: vocabulary as i32,
        most_steps: lanes.most_steps as i32,
    };
    // SAFETY: views of live device memory whose shapes were checked; the description is copied before the call returns; the
    // stream orders the accesses.
    launched(KERNEL, unsafe { trainer_decode_draw(&raw const raw, stream(device)?) })
}
