//! Hugging Face's `config.json`, in and out.
//!
//! Two spellings are read: the published one (`rope_theta`, `rope_scaling`, `torch_dtype` at top level) and the one
//! transformers 5 writes (`rope_parameters`, `dtype`). Written is the published one, which every release reads.
//! Defaults of absent keys are those of transformers' `Qwen2Config` and `Qwen3Config`.

use std::path::Path;

use candle_core::DType;
use serde_json::{Value, json};

use super::{Architecture, ModelConfig, RopeScaling, RopeSettings, Yarn};
use crate::model::Error;
use crate::model::fields::Fields;

impl ModelConfig {
    /// Reads the content of a `config.json`; `path` is what messages call it.
    ///
    /// # Errors
    /// If a key is absent, of the wrong type or impossible, or if the model needs something that is not computed here:
    /// another architecture, sliding windows, another rotary scaling, another activation.
    pub fn from_hf(path: &Path, content: &Value) -> Result<Self, Error> {
        let fields = Fields::of_file(path, content)?;
        let architecture = fields.architecture()?;
        fields.refuse_other_models()?;
        let hidden_size = fields.size("hidden_size")?;
        let num_attention_heads = fields.size("num_attention_heads")?;
        let max_position_embeddings = fields.optional_size("max_position_embeddings")?.unwrap_or(32_768);
        let head_dim = match (fields.optional_size("head_dim")?, architecture) {
            (Some(head_dim), _) => head_dim,
            (None, Architecture::Qwen3) => 128,
            (None, Architecture::Qwen2)
                if num_attention_heads > 0 && hidden_size.is_multiple_of(num_attention_heads) =>
            {
                hidden_size / num_attention_heads
            }
            (None, Architecture::Qwen2) => {
                return Err(fields.wrong("num_attention_heads", &format!("a divisor of hidden_size ({hidden_size})")));
            }
        };
        Self {
            architecture,
            hidden_size,
            intermediate_size: fields.size("intermediate_size")?,
            num_hidden_layers: fields.size("num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads: fields.optional_size("num_key_value_heads")?.unwrap_or(num_attention_heads),
            head_dim,
            vocab_size: fields.size("vocab_size")?,
            rms_norm_eps: fields.number("rms_norm_eps")?.unwrap_or(1e-6),
            rope: fields.rope(max_position_embeddings)?,
            max_position_embeddings,
            tie_word_embeddings: fields.boolean("tie_word_embeddings")?.unwrap_or(false),
            attention_bias: architecture == Architecture::Qwen2,
            has_qk_norm: architecture == Architecture::Qwen3,
            bos_token_id: fields.token_ids("bos_token_id")?.first().copied(),
            eos_token_ids: fields.token_ids("eos_token_id")?,
            generation_eos_token_ids: vec![],
            pad_token_id: fields.token_ids("pad_token_id")?.first().copied(),
            initializer_range: fields.number("initializer_range")?.unwrap_or(0.02),
            torch_dtype: fields.dtype()?,
        }
        .check(path)
    }

    /// Adds what a `generation_config.json` says about the end of a text.
    ///
    /// # Errors
    /// If it is no object, or its `eos_token_id` is neither a token id nor a list of them.
    pub fn with_generation_config(mut self, path: &Path, content: &Value) -> Result<Self, Error> {
        self.generation_eos_token_ids = Fields::of_file(path, content)?.token_ids("eos_token_id")?;
        Ok(self)
    }

    /// The content of a `config.json` in the published spelling, for weights saved as `dtype`.
    pub fn to_hf(&self, dtype: DType) -> Value {
        let mut content = json!({
            "architectures": [self.architecture.class()],
            "model_type": self.architecture.model_type(),
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_dropout": 0.0,
            "use_sliding_window": false,
            "sliding_window": null,
            "max_window_layers": self.num_hidden_layers,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": match self.eos_token_ids.as_slice() {
                [] => Value::Null,
                [one] => json!(one),
                several => json!(several),
            },
            "pad_token_id": self.pad_token_id,
            "initializer_range": self.initializer_range,
            "use_cache": true,
            "rope_theta": self.rope.theta,
            "rope_scaling": self.rope.scaling.to_hf(),
            "torch_dtype": dtype_name(dtype),
        });
        if let (Architecture::Qwen3, Some(object)) = (self.architecture, content.as_object_mut()) {
            object.insert("attention_bias".into(), Value::Bool(false));
        }
        content
    }
}

impl RopeScaling {
    fn to_hf(&self) -> Value {
        match self {
            Self::None => Value::Null,
            Self::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
            Self::Yarn(yarn) => {
                let mut content = json!({
                    "rope_type": "yarn",
                    "factor": yarn.factor,
                    "original_max_position_embeddings": yarn.original_max_position_embeddings,
                    "beta_fast": yarn.beta_fast,
                    "beta_slow": yarn.beta_slow,
                    "truncate": yarn.truncate,
                });
                let optional = [
                    ("attention_factor", yarn.attention_factor),
                    ("mscale", yarn.mscale),
                    ("mscale_all_dim", yarn.mscale_all_dim),
                ];
                if let Some(object) = content.as_object_mut() {
                    object.extend(optional.into_iter().filter_map(|(key, value)| Some((key.into(), json!(value?)))));
                }
                content
            }
        }
    }
}

/// The name of a weight type in config.json.
pub(crate) fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        _ => "float32",
    }
}

impl Fields<'_> {
    /// A token id, a list of them, or nothing.
    fn token_ids(&self, key: &str) -> Result<Vec<u32>, Error> {
        let id = |value: &Value| {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| self.wrong(key, "a token id or a list of token ids"))
        };
        match self.get(key) {
            None => Ok(vec![]),
            Some(Value::Array(ids)) => ids.iter().map(id).collect(),
            Some(one) => Ok(vec![id(one)?]),
        }
    }

    fn architecture(&self) -> Result<Architecture, Error> {
        let known = [Architecture::Qwen2, Architecture::Qwen3];
        let class = self.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str);
        let model_type = self.text("model_type")?;
        let (found, architecture) = match (class, model_type) {
            (Some(class), _) => (class, known.into_iter().find(|a| a.class() == class)),
            (None, Some(model_type)) => (model_type, known.into_iter().find(|a| a.model_type() == model_type)),
            (None, None) => return Err(self.wrong("architectures", "a list with a class name")),
        };
        match (architecture, model_type) {
            (Some(architecture), Some(model_type)) if architecture.model_type() != model_type => {
                Err(self.wrong("model_type", &format!("\"{}\", as `architectures` says", architecture.model_type())))
            }
            (Some(architecture), _) => Ok(architecture),
            (None, _) => Err(self.unsupported(format!("the architecture `{found}`"), Architecture::SUPPORTED)),
        }
    }

    fn refuse_other_models(&self) -> Result<(), Error> {
        if self.boolean("use_sliding_window")? == Some(true) {
            return Err(self.unsupported(
                "`use_sliding_window: true`".into(),
                "full attention in every layer; set `use_sliding_window` to false if texts are no longer than the window",
            ));
        }
        if let Some(layers) = self.get("layer_types") {
            let layers = layers.as_array().ok_or_else(|| self.wrong("layer_types", "a list of strings"))?;
            if let Some(other) = layers.iter().find(|l| l.as_str() != Some("full_attention")) {
                return Err(self.unsupported(format!("the layer type {other}"), "\"full_attention\" in every layer"));
            }
        }
        if let Some(activation) = self.text("hidden_act")?.filter(|a| *a != "silu") {
            return Err(self.unsupported(format!("`hidden_act: {activation}`"), "silu"));
        }
        let is_qwen3 = matches!(self.architecture()?, Architecture::Qwen3);
        if is_qwen3 && self.boolean("attention_bias")? == Some(true) {
            return Err(self.unsupported("`attention_bias: true` in a Qwen3 model".into(), "attention_bias: false"));
        }
        Ok(())
    }

    fn dtype(&self) -> Result<Option<DType>, Error> {
        let key = if self.get("torch_dtype").is_some() { "torch_dtype" } else { "dtype" };
        match self.text(key)?.map(|name| name.trim_start_matches("torch.")) {
            None | Some("auto") => Ok(None),
            Some("float32") => Ok(Some(DType::F32)),
            Some("bfloat16") => Ok(Some(DType::BF16)),
            Some("float16") => Ok(Some(DType::F16)),
            Some(_) => Err(self.wrong(key, "float32, bfloat16 or float16")),
        }
    }

    fn rope(&self, max_position_embeddings: usize) -> Result<RopeSettings, Error> {
        let (key, prefix) = if self.get("rope_parameters").is_some() {
            ("rope_parameters", "rope_parameters.")
        } else {
            ("rope_scaling", "rope_scaling.")
        };
        let Some(value) = self.get(key) else {
            return Ok(RopeSettings {
                theta: self.number("rope_theta")?.unwrap_or(10_000.0),
                scaling: RopeScaling::None,
            });
        };
        let object = value.as_object().ok_or_else(|| self.wrong(key, "an object or null"))?;
        let inner = Fields { path: self.path, object, prefix };
        let theta = match inner.number("rope_theta")? {
            Some(theta) => theta,
            None => self.number("rope_theta")?.unwrap_or(10_000.0),
        };
        for fields in [&inner, self] {
            if fields.number("partial_rotary_factor")?.is_some_and(|share| (share - 1.0).abs() > 0.0) {
                return Err(self.unsupported("a `partial_rotary_factor` other than 1".into(), "1"));
            }
        }
        let kind = match inner.text("rope_type")? {
            Some(kind) => kind,
            None => inner.text("type")?.unwrap_or("default"),
        };
        let factor = || inner.number("factor")?.ok_or_else(|| inner.wrong("factor", "a number of at least 1"));
        let scaling = match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: factor()? },
            "yarn" => {
                let trained = inner.optional_size("original_max_position_embeddings")?;
                let original_max_position_embeddings = trained.unwrap_or(max_position_embeddings);
                // As transformers: without a factor, the ratio of the two contexts.
                let factor = match (inner.number("factor")?, trained) {
                    (None, Some(trained)) if trained > 0 => max_position_embeddings as f64 / trained as f64,
                    _ => factor()?,
                };
                RopeScaling::Yarn(Yarn {
                    factor,
                    original_max_position_embeddings,
                    beta_fast: inner.number("beta_fast")?.unwrap_or(32.0),
                    beta_slow: inner.number("beta_slow")?.unwrap_or(1.0),
                    attention_factor: inner.number("attention_factor")?,
                    mscale: inner.number("mscale")?,
                    mscale_all_dim: inner.number("mscale_all_dim")?,
                    truncate: inner.boolean("truncate")?.unwrap_or(true),
                })
            }
            other => {
                return Err(self.unsupported(format!("the rotary scaling `{other}`"), "default, linear and yarn"));
            }
        };
        Ok(RopeSettings { theta, scaling })
    }
}
