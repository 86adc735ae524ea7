//! Drawing the next tokens of decoding steps. Where the lanes stand is read from [`LanesView`], so that a step can be recorded and
//! repeated.

use candle_core::{DType, Device};

use super::checks::expect_array;
use super::lanes::LanesView;
use super::launch::{RawStream, kernels, launched, stream};
use crate::device::{Error, Matrix, Pointer, argument};

/// Logits of a chunk of the distribution.
const DRAW_CHUNK: usize = 512;
/// Most tokens of a vocabulary that is filtered: sums over it are counted in integers.
pub const MOST_DRAW_VOCABULARY: usize = 1 << 20;

/// How tokens are drawn, in the order in which it is done.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DrawSettings {
    /// Divides positive logits of tokens seen before, multiplies the others; above 0, and 1 for none.
    pub repetition_penalty: f32,
    /// Divides the logits; 0 takes the first of the largest, without filters.
    pub temperature: f32,
    /// So many of the largest are kept, with those that tie; 0 for all.
    pub top_k: usize,
    /// The smallest set of at least this probability is kept; above 0, and 1 for all.
    pub top_p: f64,
    /// What has at least this part of the largest probability is kept; 0 for all, at most 1.
    pub min_p: f64,
}

impl Default for DrawSettings {
    fn default() -> Self {
        Self { repetition_penalty: 1.0, temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 }
    }
}

impl DrawSettings {
    /// Whether tokens of a vocabulary may be removed.
    pub fn is_filtered(&self, vocabulary: usize) -> bool {
        let is_top_k = self.top_k > 0 && self.top_k < vocabulary;
        self.temperature != 0.0 && (is_top_k || self.top_p < 1.0 || self.min_p > 0.0)
    }
}

kernels! {
    // Of `draw.cu` and `draw_filtered.cu`.
    fn trainer_draw_chunks(draw: *const RawDraw, stream: RawStream) -> i32;
    fn trainer_draw(draw: *const RawDraw, stream: RawStream) -> i32;
    fn trainer_draw_filtered(draw: *const RawDraw, stream: RawStream) -> i32;
}

/// `Draw` of `draw.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct RawDraw {
    logits: u64,
    chunks: u64,
    plain: u64,
    found: u64,
    seen: u64,
    uniforms: u64,
    tokens: u64,
    positions: u64,
    rows: u64,
    steps: u64,
    drawn: u64,
    logprobs: u64,
    top_p: f64,
    min_p: f64,
    temperature: f32,
    penalty: f32,
    top_k: i32,
    lanes: i32,
    vocabulary: i32,
    most_steps: i32,
}

/// Floats of the workspace of [`decode_draw`].
pub fn decode_draw_workspace(lanes: usize, vocabulary: usize) -> usize {
    lanes * (4 + 4 * vocabulary.div_ceil(DRAW_CHUNK))
}

/// Draws each lane's next token from its logits by its uniform number of this step, notes it with its log-probabilities, and moves
/// the lanes on by one. With a penalty the token is seen from then on.
///
/// # Shapes
/// `logits`: f32 `[M, V]` without gaps; `workspace`: f32, [`decode_draw_workspace`] elements. Of a filtered draw the latter begins
/// with `[M, 2]` integers of 64 bits: the least (value, id) that top-k and top-p keep, the value in the upper half with its bits in
/// the order of values; and the weight of all that was kept, the largest having 2^43.
///
/// # Errors
/// If shapes or types do not fit, the vocabulary is too large to be filtered, or the launch fails.
///
/// # Equation
/// As `rollout/sampler.rs`. Cumulative probabilities are the host's up to 4e-7 of themselves and 1e-7, so that a token at such a
/// distance from the border of top-p, or a number at such a distance from the end of a token's share, may fall to the other side;
/// tokens below 2^-44 of the largest probability are not drawn where there are filters.
pub fn decode_draw(
    device: &Device,
    logits: Matrix<'_>,
    lanes: &LanesView<'_>,
    settings: &DrawSettings,
    workspace: Pointer<'_>,
) -> Result<(), Error> {
    const KERNEL: &str = "decode draw";
    let vocabulary = lanes.vocabulary;
    if logits.shape() != (lanes.lanes, vocabulary) || logits.stride != vocabulary || logits.dtype() != DType::F32 {
        return Err(argument(KERNEL, "logits", logits, format!("f32 [{}, {vocabulary}]", lanes.lanes)));
    }
    let is_filtered = settings.is_filtered(vocabulary);
    if is_filtered && vocabulary > MOST_DRAW_VOCABULARY {
        return Err(argument(KERNEL, "vocabulary", vocabulary, format!("at most {MOST_DRAW_VOCABULARY}")));
    }
    expect_array(KERNEL, "workspace", workspace, DType::F32, decode_draw_workspace(lanes.lanes, vocabulary))?;
    let chunks = workspace.address + 16 * lanes.lanes as u64;
    let raw = RawDraw {
        logits: logits.address,
        chunks,
        plain: chunks + 8 * (lanes.lanes * vocabulary.div_ceil(DRAW_CHUNK)) as u64,
        found: workspace.address,
        seen: lanes.seen.address,
        uniforms: lanes.uniforms.address,
        tokens: lanes.tokens.address,
        positions: lanes.positions.address,
        rows: lanes.rows.address,
        steps: lanes.steps.address,
        drawn: lanes.drawn.address,
        logprobs: lanes.logprobs.address,
        top_p: settings.top_p,
        min_p: settings.min_p,
        temperature: settings.temperature,
        penalty: settings.repetition_penalty,
        top_k: i32::try_from(settings.top_k).unwrap_or(i32::MAX),
        lanes: lanes.lanes as i32,
        vocabulary: vocabulary as i32,
        most_steps: lanes.most_steps as i32,
    };
    let stream = stream(device)?;
    // SAFETY: views of live device memory whose shapes were checked; the description is copied before each call returns; the
    // stream orders the accesses.
    launched(KERNEL, unsafe { trainer_draw_chunks(&raw const raw, stream) })?;
    let draw = if is_filtered { trainer_draw_filtered } else { trainer_draw };
    // SAFETY: as above.
    launched(KERNEL, unsafe { draw(&raw const raw, stream) })
}
