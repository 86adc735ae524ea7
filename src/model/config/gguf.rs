//! A model's configuration out of GGUF metadata (`qwen2.*`, `qwen3.*`).

use std::path::Path;

use super::{Architecture, ModelConfig, RopeScaling, RopeSettings, Yarn};
use crate::model::Error;
use crate::model::source::gguf_header::{Header, Scalar};

impl ModelConfig {
    /// Reads the metadata; the vocabulary's size and whether the head is tied come from the tensors, because the
    /// embedding has padding rows that the tokenizer does not know and a quantised head may stand beside it.
    ///
    /// # Errors
    /// As [`ModelConfig::from_hf`].
    pub(crate) fn from_gguf(path: &Path, header: &Header) -> Result<Self, Error> {
        let unsupported = |found: String, supported: &str| Error::Unsupported {
            path: path.into(),
            found,
            supported: supported.into(),
        };
        let architecture = match header.metadata.get("general.architecture") {
            Some(Scalar::Text(name)) => [Architecture::Qwen2, Architecture::Qwen3]
                .into_iter()
                .find(|a| a.model_type() == name)
                .ok_or_else(|| unsupported(format!("the architecture `{name}`"), "qwen2 and qwen3"))?,
            _ => return Err(wrong(path, header, "general.architecture", "qwen2 or qwen3")),
        };
        let keys = Keys { path, header, prefix: architecture.model_type() };
        if let Some(Scalar::Unsigned(2..)) = header.metadata.get("split.count") {
            return Err(unsupported(
                "a model in several GGUF files".into(),
                "one file; join them with `llama-gguf-split --merge`",
            ));
        }
        let embedding = header.tensors.get("token_embd.weight").ok_or_else(|| Error::MissingTensor {
            path: path.into(),
            name: "token_embd.weight".into(),
            nearest: None,
            others: 0,
        })?;
        let hidden_size = keys.size("embedding_length")?;
        let num_attention_heads = keys.size("attention.head_count")?;
        let head_dim = match keys.optional_size("attention.key_length")? {
            Some(head_dim) => head_dim,
            None if num_attention_heads > 0 && hidden_size.is_multiple_of(num_attention_heads) => {
                hidden_size / num_attention_heads
            }
            None => return Err(keys.wrong("attention.head_count", "a divisor of the embedding length")),
        };
        for key in ["attention.value_length", "rope.dimension_count"] {
            if keys.optional_size(key)?.is_some_and(|size| size != head_dim) {
                return Err(keys.wrong(key, &format!("the width of a head, {head_dim}")));
            }
        }
        let max_position_embeddings = keys.size("context_length")?;
        let token = |key: &str| match header.metadata.get(key) {
            None => Ok(None),
            Some(Scalar::Unsigned(id)) if u32::try_from(*id).is_ok() => Ok(Some(*id as u32)),
            Some(_) => Err(wrong(path, header, key, "a token id")),
        };
        Self {
            architecture,
            hidden_size,
            intermediate_size: keys.size("feed_forward_length")?,
            num_hidden_layers: keys.size("block_count")?,
            num_attention_heads,
            num_key_value_heads: keys.optional_size("attention.head_count_kv")?.unwrap_or(num_attention_heads),
            head_dim,
            vocab_size: embedding.shape.first().copied().unwrap_or(0),
            rms_norm_eps: keys
                .number("attention.layer_norm_rms_epsilon")?
                .ok_or_else(|| keys.wrong("attention.layer_norm_rms_epsilon", "a number"))?,
            rope: keys.rope(max_position_embeddings)?,
            max_position_embeddings,
            tie_word_embeddings: !header.tensors.contains_key("output.weight"),
            attention_bias: architecture == Architecture::Qwen2,
            has_qk_norm: architecture == Architecture::Qwen3,
            bos_token_id: token("tokenizer.ggml.bos_token_id")?,
            eos_token_ids: token("tokenizer.ggml.eos_token_id")?.into_iter().collect(),
            generation_eos_token_ids: token("tokenizer.ggml.eot_token_id")?.into_iter().collect(),
            pad_token_id: token("tokenizer.ggml.padding_token_id")?,
            initializer_range: 0.02,
            torch_dtype: None,
        }
        .check(path)
    }
}

fn wrong(path: &Path, header: &Header, key: &str, expected: &str) -> Error {
    let found = match header.metadata.get(key) {
        None => "absent".into(),
        Some(Scalar::Unsigned(value)) => value.to_string(),
        Some(Scalar::Signed(value)) => value.to_string(),
        Some(Scalar::Float(value)) => value.to_string(),
        Some(Scalar::Bool(value)) => value.to_string(),
        Some(Scalar::Text(value)) => format!("{value:?}"),
    };
    Error::Key { path: path.into(), key: key.into(), found, expected: expected.into() }
}

/// The keys of one architecture.
struct Keys<'a> {
    path: &'a Path,
    header: &'a Header,
    prefix: &'static str,
}

impl Keys<'_> {
    fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    fn wrong(&self, key: &str, expected: &str) -> Error {
        wrong(self.path, self.header, &self.full(key), expected)
    }

    fn size(&self, key: &str) -> Result<usize, Error> {
        self.optional_size(key)?.ok_or_else(|| self.wrong(key, "a whole number"))
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>, Error> {
        match self.header.metadata.get(&self.full(key)) {
            None => Ok(None),
            Some(Scalar::Unsigned(value)) => Ok(Some(*value as usize)),
            Some(Scalar::Signed(value)) if *value >= 0 => Ok(Some(*value as usize)),
            Some(_) => Err(self.wrong(key, "a whole number")),
        }
    }

    fn number(&self, key: &str) -> Result<Option<f64>, Error> {
        match self.header.metadata.get(&self.full(key)) {
            None => Ok(None),
            Some(Scalar::Float(value)) => Ok(Some(*value)),
            Some(_) => Err(self.wrong(key, "a number")),
        }
    }

    fn rope(&self, max_position_embeddings: usize) -> Result<RopeSettings, Error> {
        let theta = self.number("rope.freq_base")?.unwrap_or(10_000.0);
        let kind = match self.header.metadata.get(&self.full("rope.scaling.type")) {
            None => "none",
            Some(Scalar::Text(kind)) => kind,
            Some(_) => return Err(self.wrong("rope.scaling.type", "a string")),
        };
        let factor = || {
            self.number("rope.scaling.factor")?
                .ok_or_else(|| self.wrong("rope.scaling.factor", "a number of at least 1"))
        };
        let scaling = match kind {
            "none" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: factor()? },
            "yarn" => {
                let factor = factor()?;
                let trained = self.optional_size("rope.scaling.original_context_length")?;
                // llama.cpp multiplies this into the attention factor that it derives from `factor`.
                let extra = self.number("rope.scaling.attn_factor")?.filter(|extra| extra.to_bits() != 1f64.to_bits());
                RopeScaling::Yarn(Yarn {
                    factor,
                    original_max_position_embeddings: trained.unwrap_or(max_position_embeddings),
                    beta_fast: self.number("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                    beta_slow: self.number("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
                    attention_factor: extra.map(|extra| extra * (0.1 * factor.ln() + 1.0)),
                    mscale: None,
                    mscale_all_dim: None,
                    truncate: true,
                })
            }
            other => {
                return Err(Error::Unsupported {
                    path: self.path.into(),
                    found: format!("the rotary scaling `{other}`"),
                    supported: "none, linear and yarn".into(),
                });
            }
        };
        Ok(RopeSettings { theta, scaling })
    }
}
