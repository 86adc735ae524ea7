//! What a Qwen2 or Qwen3 model looks like: sizes, options, and the name and shape of every weight.
//!
//! Read from Hugging Face's `config.json` ([`ModelConfig::from_hf`], both spellings) or from GGUF metadata, and written
//! back by [`ModelConfig::to_hf`]. A value of this type has passed every check: its sizes fit together, it asks for
//! nothing the blocks do not compute, and [`ModelConfig::tensors`] is the complete list of its weights.

use std::path::Path;

use candle_core::DType;

use crate::config::settings::Projection;
use crate::model::Error;

mod gguf;
mod hf;
mod rope;

pub use rope::{RopeScaling, RopeSettings, Yarn};

/// The largest size of one dimension or count that is believed; larger values come from damaged files.
const LARGEST_SIZE: usize = 1 << 28;
/// The largest number of decoder layers that is believed.
const MOST_LAYERS: usize = 1 << 12;
/// The largest number of weights that is believed.
const MOST_PARAMETERS: f64 = 1e12;

/// The families of models.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// Qwen2, Qwen2.5 and what is distilled into them: bias on q, k and v.
    Qwen2,
    /// Qwen3 (dense): no bias, RMS norm over each head of q and k.
    Qwen3,
}

impl Architecture {
    /// What messages list as supported.
    pub const SUPPORTED: &'static str = "Qwen2ForCausalLM (model_type qwen2) and Qwen3ForCausalLM (model_type qwen3)";

    /// `model_type` in config.json, `general.architecture` in GGUF.
    pub const fn model_type(self) -> &'static str {
        match self {
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    /// The class name in config.json's `architectures`.
    pub const fn class(self) -> &'static str {
        match self {
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
        }
    }
}

/// The resolved, checked configuration of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The family.
    pub architecture: Architecture,
    /// Width of the residual stream (`D`).
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads (`H`).
    pub num_attention_heads: usize,
    /// Key and value heads (`K`); divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Width of one head; even. Not always `hidden_size / num_attention_heads` in Qwen3.
    pub head_dim: usize,
    /// Rows of the embedding and of the head (`V`), padding rows included.
    pub vocab_size: usize,
    /// Added to the mean square in every RMS norm.
    pub rms_norm_eps: f64,
    /// Rotary positions.
    pub rope: RopeSettings,
    /// Longest context in tokens.
    pub max_position_embeddings: usize,
    /// The head multiplies with the embedding matrix instead of its own.
    pub tie_word_embeddings: bool,
    /// q, k and v projections have a bias (Qwen2).
    pub attention_bias: bool,
    /// q and k are normalised per head before rotation (Qwen3).
    pub has_qk_norm: bool,
    /// Token that begins a text, where there is one.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text, as the model's configuration names them.
    pub eos_token_ids: Vec<u32>,
    /// Tokens that end a text, as `generation_config.json` names them; empty without that file.
    pub generation_eos_token_ids: Vec<u32>,
    /// Token that fills batches.
    pub pad_token_id: Option<u32>,
    /// Standard deviation of fresh weights.
    pub initializer_range: f64,
    /// The type the weights were saved in, if the configuration says so: f32, bf16 or f16.
    pub torch_dtype: Option<DType>,
}

/// What a weight is, which decides how it is stored and initialised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorRole {
    /// The token embedding `[V, D]`.
    Embedding,
    /// One of the seven projections of a layer, `[out, in]`.
    Linear,
    /// The bias of a projection.
    Bias,
    /// The weight of an RMS norm.
    Norm,
    /// The untied head `[V, D]`.
    Head,
}

/// Name, shape and role of one weight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorShape {
    /// Hugging Face's name, e.g. `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// `[out, in]` of a matrix, `[length]` of a vector.
    pub shape: Vec<usize>,
    /// What it is.
    pub role: TensorRole,
}

impl ModelConfig {
    /// Every weight of the model, in the order of the forward pass.
    pub fn tensors(&self) -> Vec<TensorShape> {
        let mut tensors =
            vec![tensor("model.embed_tokens.weight", &[self.vocab_size, self.hidden_size], TensorRole::Embedding)];
        for layer in 0..self.num_hidden_layers {
            let prefix = format!("model.layers.{layer}");
            let mut add =
                |name: &str, shape: &[usize], role| tensors.push(tensor(&format!("{prefix}.{name}"), shape, role));
            add("input_layernorm.weight", &[self.hidden_size], TensorRole::Norm);
            for projection in Projection::ALL {
                if projection == Projection::GateProj {
                    add("post_attention_layernorm.weight", &[self.hidden_size], TensorRole::Norm);
                }
                let (rows, cols) = self.projection_shape(projection);
                add(&format!("{}.weight", projection.path()), &[rows, cols], TensorRole::Linear);
                if self.projection_has_bias(projection) {
                    add(&format!("{}.bias", projection.path()), &[rows], TensorRole::Bias);
                }
                if self.has_qk_norm && projection == Projection::QProj {
                    add("self_attn.q_norm.weight", &[self.head_dim], TensorRole::Norm);
                }
                if self.has_qk_norm && projection == Projection::KProj {
                    add("self_attn.k_norm.weight", &[self.head_dim], TensorRole::Norm);
                }
            }
        }
        tensors.push(tensor("model.norm.weight", &[self.hidden_size], TensorRole::Norm));
        if !self.tie_word_embeddings {
            tensors.push(tensor("lm_head.weight", &[self.vocab_size, self.hidden_size], TensorRole::Head));
        }
        tensors
    }

    /// `(out, in)` of a projection's weight.
    pub const fn projection_shape(&self, projection: Projection) -> (usize, usize) {
        let (hidden, queries) = (self.hidden_size, self.num_attention_heads * self.head_dim);
        let keys = self.num_key_value_heads * self.head_dim;
        match projection {
            Projection::QProj => (queries, hidden),
            Projection::KProj | Projection::VProj => (keys, hidden),
            Projection::OProj => (hidden, queries),
            Projection::GateProj | Projection::UpProj => (self.intermediate_size, hidden),
            Projection::DownProj => (hidden, self.intermediate_size),
        }
    }

    /// Whether a projection has a bias.
    pub const fn projection_has_bias(&self, projection: Projection) -> bool {
        self.attention_bias && matches!(projection, Projection::QProj | Projection::KProj | Projection::VProj)
    }

    /// Number of weights.
    pub fn num_parameters(&self) -> usize {
        self.tensors().iter().map(|t| t.shape.iter().product::<usize>()).sum()
    }

    /// About as many weights, for sizes that nobody has checked yet.
    fn estimated_parameters(&self) -> f64 {
        let [hidden, intermediate, vocabulary, layers, heads, kv_heads, head_dim] = [
            self.hidden_size,
            self.intermediate_size,
            self.vocab_size,
            self.num_hidden_layers,
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
        ]
        .map(|size| size as f64);
        2.0 * vocabulary * hidden + layers * hidden * (3.0 * intermediate + 2.0 * head_dim * (heads + kv_heads))
    }

    /// The rotary frequencies of this model and the factor of cos and sin; see [`RopeSettings::inv_freq`].
    ///
    /// # Shapes
    /// f32 `[head_dim / 2]`.
    pub fn inv_freq(&self) -> (Vec<f32>, f32) {
        self.rope.inv_freq(self.head_dim)
    }

    /// Every token that ends a completion: the configuration's and the generation configuration's, sorted.
    pub fn stop_token_ids(&self) -> Vec<u32> {
        let mut ids = [self.eos_token_ids.as_slice(), &self.generation_eos_token_ids].concat();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// Refuses sizes that do not fit together.
    fn check(self, path: &Path) -> Result<Self, Error> {
        let refuse = |key: &str, found: String, expected: &str| {
            Err(Error::Key { path: path.into(), key: key.into(), found, expected: expected.into() })
        };
        for (key, size) in [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("vocab_size", self.vocab_size),
            ("max_position_embeddings", self.max_position_embeddings),
        ] {
            if size == 0 || size > LARGEST_SIZE {
                return refuse(key, size.to_string(), "a number from 1 to 268435456");
            }
        }
        if self.num_hidden_layers == 0 || self.num_hidden_layers > MOST_LAYERS {
            return refuse("num_hidden_layers", self.num_hidden_layers.to_string(), "a number from 1 to 4096");
        }
        let weights = self.estimated_parameters();
        if weights > MOST_PARAMETERS {
            let found = format!("{}, which makes {weights:.1e} weights in all", self.hidden_size);
            return refuse("hidden_size", found, "sizes of at most 1e12 weights together");
        }
        if self.num_attention_heads * self.head_dim > LARGEST_SIZE {
            let found = format!("{} of width {}", self.num_attention_heads, self.head_dim);
            return refuse("num_attention_heads", found, "at most 268435456 numbers in all heads together");
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            let expected = format!("a divisor of num_attention_heads ({})", self.num_attention_heads);
            return refuse("num_key_value_heads", self.num_key_value_heads.to_string(), &expected);
        }
        if !self.head_dim.is_multiple_of(2) {
            return refuse("head_dim", self.head_dim.to_string(), "an even number: rotary positions turn pairs");
        }
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps < 1.0) {
            return refuse("rms_norm_eps", self.rms_norm_eps.to_string(), "a number between 0 and 1");
        }
        if !(self.rope.theta > 1.0 && self.rope.theta.is_finite()) {
            return refuse("rope_theta", self.rope.theta.to_string(), "a number above 1");
        }
        if !(self.initializer_range >= 0.0 && self.initializer_range.is_finite()) {
            return refuse("initializer_range", self.initializer_range.to_string(), "a number of at least 0");
        }
        match &self.rope.scaling {
            RopeScaling::Linear { factor } | RopeScaling::Yarn(Yarn { factor, .. })
                if !(*factor >= 1.0 && factor.is_finite()) =>
            {
                refuse("rope_scaling.factor", factor.to_string(), "a number of at least 1")
            }
            RopeScaling::Yarn(yarn) if !(yarn.beta_fast > yarn.beta_slow && yarn.beta_slow > 0.0) => {
                let found = format!("{} with beta_slow {}", yarn.beta_fast, yarn.beta_slow);
                refuse("rope_scaling.beta_fast", found, "a number above beta_slow, and both above 0")
            }
            RopeScaling::Yarn(yarn) if yarn.original_max_position_embeddings == 0 => {
                refuse("rope_scaling.original_max_position_embeddings", "0".into(), "a number of at least 1")
            }
            _ => Ok(self),
        }
    }
}

fn tensor(name: &str, shape: &[usize], role: TensorRole) -> TensorShape {
    TensorShape { name: name.into(), shape: shape.into(), role }
}
