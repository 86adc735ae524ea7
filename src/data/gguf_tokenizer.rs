//! The tokenizer inside a GGUF file.
//!
//! GGUF keeps vocabulary, merges, token types and special ids as metadata (`tokenizer.ggml.*`). [`GgufTokenizer`] holds
//! what is needed of that and builds a byte-level BPE without a normaliser: llama.cpp has none, and transformers builds
//! none from a GGUF either.

use candle_core::quantized::gguf_file::{Content, Value};
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;
use tokenizers::{AddedToken, Tokenizer};

use super::Error;
use super::split::QWEN2_SPLIT;

/// Values of `tokenizer.ggml.pre` that mean Qwen2's split.
const QWEN2_NAMES: [&str; 2] = ["qwen2", "deepseek-r1-qwen"];

/// Token types of llama.cpp (`llama_token_type`) that matter here.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// Texts of control tokens that end a turn or a document in the Qwen family.
const END_TOKENS: [&str; 3] = ["<|im_end|>", "<|endoftext|>", "<｜end▁of▁sentence｜>"];

/// What a GGUF file says about its tokenizer.
#[derive(Clone, Debug, Default)]
pub struct GgufTokenizer {
    /// All tokens, written in the byte-level alphabet; the index is the id.
    pub tokens: Vec<String>,
    /// llama.cpp's type of each token: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte.
    pub token_types: Vec<i64>,
    /// Merges in the order of their rank, two tokens separated by a space.
    pub merges: Vec<String>,
    /// Beginning-of-sequence token.
    pub bos: Option<u32>,
    /// End-of-sequence token.
    pub eos: Option<u32>,
    /// Padding token.
    pub pad: Option<u32>,
    /// Name of the split before BPE.
    pub pre: String,
    /// Whether llama.cpp would put the beginning-of-sequence token in front. Kept for reference: nothing here does,
    /// as transformers does not; chat templates write the token themselves.
    pub add_bos: bool,
    /// The chat template.
    pub chat_template: Option<String>,
    /// Longest sequence the model was made for, in tokens.
    pub context_length: Option<u64>,
}

impl GgufTokenizer {
    /// Reads the `tokenizer.*` keys of a GGUF file's metadata.
    ///
    /// # Errors
    /// If there is no tokenizer, or not a byte-level BPE with Qwen2's split.
    pub fn read(content: &Content) -> Result<Self, Error> {
        let get = |key: &str| content.metadata.get(key);
        let text = |key: &str| get(key).and_then(|v| v.to_string().ok().cloned());
        let model = text("tokenizer.ggml.model").ok_or_else(|| missing("tokenizer.ggml.model"))?;
        if model != "gpt2" {
            return Err(broken(&format!(
                "`tokenizer.ggml.model` is `{model}`, expected `gpt2` (byte-level BPE), which all Qwen models have"
            )));
        }
        let architecture = text("general.architecture").unwrap_or_default();
        // Files from before llama.cpp knew `pre` do not have the key.
        let pre = text("tokenizer.ggml.pre")
            .or_else(|| architecture.starts_with("qwen").then(|| "qwen2".to_string()))
            .ok_or_else(|| missing("tokenizer.ggml.pre"))?;
        let token_types = match get("tokenizer.ggml.token_type") {
            Some(value) => list(value, "tokenizer.ggml.token_type", integer)?,
            None => Vec::new(),
        };
        let id = |key: &str| get(key).and_then(integer).and_then(|v| u32::try_from(v).ok());
        let strings =
            |key: &str| list(get(key).ok_or_else(|| missing(key))?, key, |value| value.to_string().ok().cloned());
        Ok(Self {
            tokens: strings("tokenizer.ggml.tokens")?,
            token_types,
            merges: strings("tokenizer.ggml.merges")?,
            bos: id("tokenizer.ggml.bos_token_id"),
            eos: id("tokenizer.ggml.eos_token_id"),
            pad: id("tokenizer.ggml.padding_token_id"),
            pre,
            add_bos: get("tokenizer.ggml.add_bos_token").and_then(|v| v.to_bool().ok()).unwrap_or(false),
            chat_template: text("tokenizer.chat_template"),
            context_length: get(&format!("{architecture}.context_length")).and_then(integer).map(|v| v as u64),
        })
    }

    /// Tokens that end a sequence: `eos`, then the family's other end tokens that this vocabulary has as control tokens.
    pub fn end_tokens(&self) -> Vec<u32> {
        let mut ends: Vec<u32> = self.eos.into_iter().collect();
        let controls = self.tokens.iter().zip(&self.token_types).enumerate().filter(|(_, (_, kind))| **kind == CONTROL);
        for (id, (token, _)) in controls {
            if END_TOKENS.contains(&token.as_str()) && !ends.contains(&(id as u32)) {
                ends.push(id as u32);
            }
        }
        ends
    }

    /// Builds the tokenizer: split, byte-level BPE, added tokens.
    ///
    /// # Errors
    /// If a merge is not two tokens of the vocabulary, or the split is not Qwen2's.
    pub fn build(&self) -> Result<Tokenizer, Error> {
        if !QWEN2_NAMES.contains(&self.pre.as_str()) {
            return Err(broken(&format!(
                "`tokenizer.ggml.pre` is `{}`, known are {}; give `tokenizer_name_or_path` with a tokenizer.json",
                self.pre,
                QWEN2_NAMES.join(", ")
            )));
        }
        let vocab: Vocab = self.tokens.iter().enumerate().map(|(id, token)| (token.clone(), id as u32)).collect();
        if vocab.len() != self.tokens.len() {
            return Err(broken(&format!(
                "`tokenizer.ggml.tokens` has {} tokens, {} of them different; expected no token twice",
                self.tokens.len(),
                vocab.len()
            )));
        }
        let mut merges = Vec::with_capacity(self.merges.len());
        for merge in &self.merges {
            let (left, right) = merge
                .split_once(' ')
                .ok_or_else(|| broken(&format!("merge `{merge}` is not two tokens with a space between")))?;
            merges.push((left.to_string(), right.to_string()));
        }
        let model = BPE::builder().vocab_and_merges(vocab, merges).build().map_err(|e| broken(&e.to_string()))?;
        let split = Split::new(SplitPattern::Regex(QWEN2_SPLIT.into()), SplitDelimiterBehavior::Isolated, false)
            .map_err(|e| broken(&e.to_string()))?;
        let bytes = ByteLevel::new(false, false, false);
        let mut tokenizer = Tokenizer::new(model);
        tokenizer.with_pre_tokenizer(Some(PreTokenizerWrapper::from(Sequence::new(vec![split.into(), bytes.into()]))));
        tokenizer.with_decoder(Some(bytes));
        tokenizer.with_post_processor(Some(bytes));
        let added = self.tokens.iter().zip(&self.token_types).filter_map(|(token, &kind)| match kind {
            CONTROL => Some(AddedToken::from(token.clone(), true)),
            USER_DEFINED => Some(AddedToken::from(token.clone(), false).normalized(false)),
            _ => None,
        });
        tokenizer.add_tokens(added).map_err(|e| broken(&e.to_string()))?;
        Ok(tokenizer)
    }
}

fn integer(value: &Value) -> Option<i64> {
    Some(match *value {
        Value::U8(v) => v.into(),
        Value::I8(v) => v.into(),
        Value::U16(v) => v.into(),
        Value::I16(v) => v.into(),
        Value::U32(v) => v.into(),
        Value::I32(v) => v.into(),
        Value::U64(v) => i64::try_from(v).ok()?,
        Value::I64(v) => v,
        _ => return None,
    })
}

fn list<T>(value: &Value, key: &str, item: impl Fn(&Value) -> Option<T>) -> Result<Vec<T>, Error> {
    let values = value.to_vec().map_err(|_| broken(&format!("`{key}` is not a list")))?;
    let items: Option<Vec<T>> = values.iter().map(item).collect();
    items.ok_or_else(|| broken(&format!("`{key}` has an entry of the wrong type")))
}

fn missing(key: &str) -> Error {
    broken(&format!("the metadata has no `{key}`; give `tokenizer_name_or_path` with a tokenizer.json"))
}

fn broken(problem: &str) -> Error {
    Error::Tokenizer { what: "of the GGUF file".into(), problem: problem.into() }
}
