//! 4-bit weights as bitsandbytes writes them into checkpoints.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Error;
use super::double_quant::{Maxima, NESTED_BLOCK, Nested, dynamic_map};
use super::nf4::{Nf4Matrix, codebook_of};
use crate::config::settings::QuantType;
use crate::fs::Bytes;
use crate::kernels::cpu::codebook::BLOCK_LEN;

/// The tensors of one weight, little-endian as in safetensors. For a weight named `w` they are `w`, `w.absmax`,
/// `w.quant_map`, `w.nested_absmax`, `w.nested_quant_map` and `w.quant_state.bitsandbytes__<nf4 or fp4>`.
#[derive(Clone, Debug)]
pub struct BitsandbytesParts {
    /// u8 `[ceil(rows * cols / 2), 1]`: codes.
    pub weight: Bytes,
    /// f32 `[blocks]`, or u8 `[blocks]` where double quantised.
    pub absmax: Bytes,
    /// f32 `[16]`: value of each code.
    pub quant_map: Bytes,
    /// f32 `[ceil(blocks / 256)]`: maxima of the maxima.
    pub nested_absmax: Option<Bytes>,
    /// f32 `[256]`: value of each 8-bit code.
    pub nested_quant_map: Option<Bytes>,
    /// The JSON text of the quantisation state.
    pub quant_state: Bytes,
}

/// The JSON object in `quant_state`.
#[derive(Deserialize, Serialize)]
struct State {
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: [usize; 2],
    #[serde(skip_serializing_if = "Option::is_none")]
    nested_blocksize: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    nested_dtype: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    nested_offset: Option<f64>,
}

impl BitsandbytesParts {
    /// Reads the matrix out of its parts, keeping the codes where they are.
    ///
    /// # Errors
    /// If a part is missing, has another length than its state says, or uses other block lengths than 64 and 256.
    pub fn read(&self) -> Result<Nf4Matrix, Error> {
        let problem = |part, problem: String| Error::Checkpoint { part, problem };
        let state: State = serde_json::from_slice(&self.quant_state)
            .map_err(|e| problem("quant_state", format!("is not the JSON object expected: {e}")))?;
        let quant_type = match state.quant_type.as_str() {
            "nf4" => QuantType::Nf4,
            "fp4" => QuantType::Fp4,
            other => return Err(problem("quant_state", format!("has quant_type `{other}`, expected `nf4` or `fp4`"))),
        };
        if state.blocksize != BLOCK_LEN {
            let text = format!("has blocksize {}, expected {BLOCK_LEN}; quantise the model again", state.blocksize);
            return Err(problem("quant_state", text));
        }
        let [rows, cols] = state.shape;
        let length = rows
            .checked_mul(cols)
            .ok_or_else(|| problem("quant_state", format!("has the impossible shape [{rows}, {cols}]")))?;
        let blocks = length.div_ceil(BLOCK_LEN);
        expect_length("weight", self.weight.len(), length.div_ceil(2))?;
        let mut values = [0f32; 16];
        values.copy_from_slice(&floats("quant_map", &self.quant_map, 16)?);
        let maxima = match &self.nested_absmax {
            None => Maxima::Plain(floats("absmax", &self.absmax, blocks)?.into()),
            Some(nested_absmax) => {
                if state.nested_blocksize != Some(NESTED_BLOCK) {
                    let text = format!("has nested_blocksize {:?}, expected {NESTED_BLOCK}", state.nested_blocksize);
                    return Err(problem("quant_state", text));
                }
                let offset = state
                    .nested_offset
                    .ok_or_else(|| problem("quant_state", "has no nested_offset, which nested_absmax needs".into()))?;
                let map = self
                    .nested_quant_map
                    .as_ref()
                    .ok_or_else(|| problem("nested_quant_map", "is missing, nested_absmax needs it".into()))?;
                expect_length("absmax", self.absmax.len(), blocks)?;
                Maxima::Nested(Nested {
                    codes: self.absmax.clone(),
                    absmax: floats("nested_absmax", nested_absmax, blocks.div_ceil(NESTED_BLOCK))?.into(),
                    map: shared_map(floats("nested_quant_map", map, 256)?),
                    offset: offset as f32,
                })
            }
        };
        Ok(Nf4Matrix { rows, cols, quant_type, values, packed: self.weight.clone(), maxima })
    }
}

impl Nf4Matrix {
    /// The parts that bitsandbytes writes for this matrix. `dtype` is the type that it says the values had and get
    /// back, for example `bfloat16`.
    ///
    /// # Panics
    /// Never: a struct of strings and numbers is always JSON.
    pub fn to_bitsandbytes(&self, dtype: &str) -> BitsandbytesParts {
        let mut state = State {
            quant_type: if self.quant_type == QuantType::Nf4 { "nf4" } else { "fp4" }.into(),
            blocksize: BLOCK_LEN,
            dtype: dtype.into(),
            shape: [self.rows, self.cols],
            nested_blocksize: None,
            nested_dtype: None,
            nested_offset: None,
        };
        let (absmax, nested_absmax, nested_quant_map) = match &self.maxima {
            Maxima::Plain(values) => (bytes_of(values), None, None),
            Maxima::Nested(nested) => {
                state.nested_blocksize = Some(NESTED_BLOCK);
                state.nested_dtype = Some("float32".into());
                state.nested_offset = Some(f64::from(nested.offset));
                (nested.codes.clone(), Some(bytes_of(&nested.absmax)), Some(bytes_of(&nested.map)))
            }
        };
        let quant_state = serde_json::to_vec(&state).expect("strings and numbers are always JSON");
        BitsandbytesParts {
            weight: self.packed.clone(),
            absmax,
            quant_map: bytes_of(&self.values),
            nested_absmax,
            nested_quant_map,
            quant_state: Bytes::from(quant_state),
        }
    }

    /// Suffix of the tensor that carries the state: `quant_state.bitsandbytes__nf4` or `...__fp4`.
    pub fn state_suffix(&self) -> &'static str {
        match self.quant_type {
            QuantType::Nf4 => "quant_state.bitsandbytes__nf4",
            QuantType::Fp4 => "quant_state.bitsandbytes__fp4",
        }
    }

    /// Whether the values of its codes are the usual ones of its type.
    pub fn has_usual_values(&self) -> bool {
        bytes_of(&self.values)[..] == bytes_of(&codebook_of(self.quant_type).values)[..]
    }
}

/// One shared copy of the usual map, since every matrix of a model carries it.
fn shared_map(values: Vec<f32>) -> Arc<[f32]> {
    let usual = dynamic_map();
    if values == usual[..] { usual } else { values.into() }
}

fn expect_length(part: &'static str, got: usize, expected: usize) -> Result<(), Error> {
    if got == expected {
        return Ok(());
    }
    let problem = format!("has {got} bytes, its shape needs {expected}; copy or download the checkpoint again");
    Err(Error::Checkpoint { part, problem })
}

fn floats(part: &'static str, bytes: &[u8], count: usize) -> Result<Vec<f32>, Error> {
    expect_length(part, bytes.len(), 4 * count)?;
    Ok(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
}

fn bytes_of(values: &[f32]) -> Bytes {
    Bytes::from(values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())
}
