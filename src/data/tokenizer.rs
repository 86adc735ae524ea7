//! Text to tokens and back.
//!
//! [`Tokenizer`] wraps the `tokenizers` crate, made from a folder with `tokenizer.json` or from the metadata of a GGUF
//! file, and knows the special tokens of the model: which tokens end a sequence, which one pads, which strings the chat
//! template sees. Data preparation, the rollout and `generate` call it. Invariant: `encode` adds no token of its own;
//! special tokens written out in the text are parsed.

use std::collections::BTreeMap;
use std::path::Path;

use rayon::prelude::*;
use serde_json::{Map, Value, json};
use tokenizers::decoders::DecoderWrapper;

use super::Error;
use super::encoder::{Encoder, Plan};
use super::gguf_tokenizer::GgufTokenizer;
use super::tokenizer_guard::{check_file, check_ids, guarded};

/// A tokenizer with the model's special tokens.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Bytes of each token where the tokenizer is byte-level.
    token_bytes: Option<TokenBytes>,
    /// The fast way to encode, where the tokenizer is of the family's kind.
    plan: Option<Plan>,
    special: SpecialTokens,
    /// `tokenizer_config.json`, kept for saving.
    config: Map<String, Value>,
    /// Small files beside it (`special_tokens_map.json`, ...), kept for saving.
    companions: BTreeMap<String, String>,
}

/// Special tokens as older versions of transformers write them, beside `tokenizer_config.json`.
const SPECIAL_MAP: &str = "special_tokens_map.json";

/// Ids and strings of the special tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Tokens that end a sequence; the first is the one appended to training text.
    pub eos: Vec<u32>,
    /// Padding token.
    pub pad: Option<u32>,
    /// Beginning-of-sequence token; never added by [`Tokenizer::encode`].
    pub bos: Option<u32>,
    /// Strings by the names that chat templates use: `bos_token`, `eos_token`, `pad_token`, `unk_token`.
    pub strings: BTreeMap<String, String>,
}

/// A text's tokens with the characters they come from.
#[derive(Clone, Debug)]
pub struct OffsetEncoding {
    /// Token ids.
    pub ids: Vec<u32>,
    /// For each token its first character and the one after its last, counted in characters.
    pub chars: Vec<(usize, usize)>,
}

/// Bytes of all tokens, one after another.
#[derive(Debug)]
struct TokenBytes {
    bytes: Vec<u8>,
    /// Token `i` has the bytes `starts[i]..starts[i + 1]`.
    starts: Vec<u32>,
    is_special: Vec<bool>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` and, where they are there, `tokenizer_config.json`, `special_tokens_map.json`,
    /// `generation_config.json` and `config.json` of a model folder.
    ///
    /// # Errors
    /// If `tokenizer.json` is missing or broken, or one of the others is not JSON.
    pub fn from_folder(folder: &Path) -> Result<Self, Error> {
        let path = folder.join("tokenizer.json");
        if !path.is_file() {
            return Err(Error::Tokenizer {
                what: format!("`{}`", path.display()),
                problem: "no such file; give `tokenizer_name_or_path`, a model folder that has one, or a GGUF file"
                    .into(),
            });
        }
        let bytes = crate::fs::read(&path)?;
        let what = format!("`{}`", path.display());
        let refuse = |problem: String| Error::Tokenizer { what: what.clone(), problem };
        check_file(&bytes).map_err(refuse)?;
        let inner = guarded(&what, || tokenizers::Tokenizer::from_bytes(&*bytes).map_err(|e| refuse(e.to_string())))?;
        let config = read_object(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
        let special_map = read_object(&folder.join("special_tokens_map.json"))?.unwrap_or_default();
        let mut strings = BTreeMap::new();
        for name in ["bos_token", "eos_token", "pad_token", "unk_token"] {
            if let Some(text) = config.get(name).or_else(|| special_map.get(name)).and_then(token_text) {
                strings.insert(name.to_string(), text.to_string());
            }
        }
        let id_of = |name: &str| strings.get(name).and_then(|text| inner.token_to_id(text));
        let mut eos: Vec<u32> = id_of("eos_token").into_iter().collect();
        let generation = read_object(&folder.join("generation_config.json"))?;
        let model = read_object(&folder.join("config.json"))?;
        let listed = [&generation, &model].into_iter().flatten().find_map(|c| c.get("eos_token_id").map(ids_in));
        for id in listed.unwrap_or_default() {
            if !eos.contains(&id) {
                eos.push(id);
            }
        }
        let special = SpecialTokens { pad: id_of("pad_token"), bos: id_of("bos_token"), eos, strings };
        let mut companions = BTreeMap::new();
        for name in [SPECIAL_MAP, "added_tokens.json"] {
            let path = folder.join(name);
            if path.is_file() {
                let text = std::fs::read_to_string(&path).map_err(crate::fs::io_error("read", &path))?;
                companions.insert(name.to_string(), text);
            }
        }
        Self::new(inner, special, config, companions)
    }

    /// Builds the tokenizer that a GGUF file describes.
    ///
    /// # Errors
    /// If the metadata has no tokenizer, or one of a kind that Qwen models do not use.
    pub fn from_gguf(content: &candle_core::quantized::gguf_file::Content) -> Result<Self, Error> {
        Self::from_gguf_parts(&GgufTokenizer::read(content)?)
    }

    /// As [`Tokenizer::from_gguf`], from parts already read.
    ///
    /// # Errors
    /// If a merge or an id does not fit the vocabulary.
    pub fn from_gguf_parts(parts: &GgufTokenizer) -> Result<Self, Error> {
        let inner = guarded("of the GGUF file", || parts.build())?;
        let mut strings = BTreeMap::new();
        for (name, id) in [("bos_token", parts.bos), ("eos_token", parts.eos), ("pad_token", parts.pad)] {
            if let Some(text) = id.and_then(|id| parts.tokens.get(id as usize)) {
                strings.insert(name.to_string(), text.clone());
            }
        }
        let special = SpecialTokens { eos: parts.end_tokens(), pad: parts.pad, bos: parts.bos, strings };
        let mut config = Map::new();
        for (name, text) in &special.strings {
            config.insert(name.clone(), json!(text));
        }
        config.insert("add_bos_token".into(), json!(false));
        config.insert("clean_up_tokenization_spaces".into(), json!(false));
        // The class that takes tokenizer.json as it is; Qwen2's own class would add a normaliser.
        config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
        if let Some(length) = parts.context_length {
            config.insert("model_max_length".into(), json!(length));
        }
        if let Some(template) = &parts.chat_template {
            config.insert("chat_template".into(), json!(template));
        }
        Self::new(inner, special, config, BTreeMap::new())
    }

    /// Wraps a tokenizer made elsewhere.
    ///
    /// # Errors
    /// If it cannot drop its own truncation and padding.
    pub fn new(
        mut inner: tokenizers::Tokenizer,
        special: SpecialTokens,
        config: Map<String, Value>,
        companions: BTreeMap<String, String>,
    ) -> Result<Self, Error> {
        guarded("of this model", || {
            inner.with_truncation(None).map_err(failed("set up"))?;
            inner.with_padding(None);
            check_ids(inner.get_vocab(true).into_values().max())?;
            let token_bytes = match inner.get_decoder() {
                Some(DecoderWrapper::ByteLevel(_)) => Some(TokenBytes::of(&inner)),
                _ => None,
            };
            let plan = Plan::of(&inner);
            Ok(Self { inner, token_bytes, plan, special, config, companions })
        })
    }

    /// An encoder that remembers pieces of text; bulk work keeps one per thread.
    pub fn encoder(&self) -> Encoder<'_> {
        Encoder::new(self)
    }

    /// The tokens of `text`. Adds none; special tokens inside the text are parsed.
    ///
    /// # Errors
    /// If the tokenizer has no token for a part of the text and no unknown token.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        self.encoder().encode(text)
    }

    /// The tokens of a text that went through no chat template: as [`Tokenizer::encode`], plus the tokens that
    /// `tokenizer.json` itself wants around a text (the beginning-of-sequence token of DeepSeek's distills; Qwen's own
    /// tokenizers add none). This is what `tokenizer(text)` gives in transformers.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_document(&self, text: &str) -> Result<Vec<u32>, Error> {
        self.encoder().encode_document(text)
    }

    /// As [`Tokenizer::encode`], with the characters of each token.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_with_offsets(&self, text: &str) -> Result<OffsetEncoding, Error> {
        self.encoder().encode_with_offsets(text)
    }

    /// Encodes many texts on all cores, in order.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_all<T: AsRef<str> + Sync>(&self, texts: &[T]) -> Result<Vec<Vec<u32>>, Error> {
        texts.par_iter().map_init(|| self.encoder(), |encoder, text| encoder.encode(text.as_ref())).collect()
    }

    pub(super) fn plan(&self) -> Option<&Plan> {
        self.plan.as_ref()
    }

    pub(super) fn model(&self) -> &tokenizers::ModelWrapper {
        self.inner.get_model()
    }

    /// Encodes with the crate's own pipeline.
    pub(super) fn encode_by_crate(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, Error> {
        guarded("of this model", || {
            let encoding = self.inner.encode_fast(text, add_special_tokens).map_err(failed("encode"))?;
            Ok(encoding.get_ids().to_vec())
        })
    }

    /// Encodes with the crate's own pipeline, with offsets.
    pub(super) fn offsets_by_crate(&self, text: &str) -> Result<OffsetEncoding, Error> {
        guarded("of this model", || {
            let encoding = self.inner.encode_char_offsets(text, false).map_err(failed("encode"))?;
            Ok(OffsetEncoding { ids: encoding.get_ids().to_vec(), chars: encoding.get_offsets().to_vec() })
        })
    }

    /// The text of `ids`, with or without special tokens. Broken UTF-8 becomes U+FFFD; unknown ids give no text.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails (never for byte-level tokenizers).
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, Error> {
        match &self.token_bytes {
            Some(table) => {
                let bytes: Vec<u8> = ids.iter().flat_map(|&id| table.get(id, skip_special)).copied().collect();
                Ok(match String::from_utf8(bytes) {
                    Ok(text) => text,
                    Err(error) => String::from_utf8_lossy(error.as_bytes()).into_owned(),
                })
            }
            None => guarded("of this model", || self.inner.decode(ids, skip_special).map_err(failed("decode"))),
        }
    }

    /// The bytes of one token; `None` where the tokenizer is not byte-level and a token alone has no text.
    pub(super) fn bytes_of(&self, id: u32, skip_special: bool) -> Option<&[u8]> {
        self.token_bytes.as_ref().map(|table| table.get(id, skip_special))
    }

    /// The special tokens.
    pub fn special(&self) -> &SpecialTokens {
        &self.special
    }

    /// All tokens that end a sequence.
    pub fn eos_ids(&self) -> &[u32] {
        &self.special.eos
    }

    /// The token appended to training text.
    ///
    /// # Errors
    /// If the model names none.
    pub fn eos_id(&self) -> Result<u32, Error> {
        self.special.eos.first().copied().ok_or_else(|| Error::Tokenizer {
            what: "special tokens".into(),
            problem: "no end-of-sequence token; give `eos_token` in tokenizer_config.json".into(),
        })
    }

    /// The text of the token appended to training text.
    ///
    /// # Errors
    /// As [`Tokenizer::eos_id`].
    pub fn eos_text(&self) -> Result<String, Error> {
        let id = self.eos_id()?;
        self.id_to_token(id).ok_or_else(|| Error::Tokenizer {
            what: "special tokens".into(),
            problem: format!("the end-of-sequence token {id} is not in the vocabulary of {}", self.vocab_size()),
        })
    }

    /// The padding token, or the end-of-sequence token where there is none.
    pub fn pad_id(&self) -> Option<u32> {
        self.special.pad.or_else(|| self.special.eos.first().copied())
    }

    /// One more than the largest token id.
    pub fn vocab_size(&self) -> usize {
        match &self.token_bytes {
            Some(table) => table.is_special.len(),
            None => self.inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1),
        }
    }

    /// The id of a token written as in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// A token as written in the vocabulary.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Tokens added to the vocabulary, by id: text, and whether decoding may skip it.
    pub fn added_tokens(&self) -> BTreeMap<u32, (String, bool)> {
        let decoder = self.inner.get_added_tokens_decoder();
        decoder.into_iter().map(|(id, token)| (id, (token.content, token.special))).collect()
    }

    /// `tokenizer_config.json`, or what stands for it in a GGUF file.
    pub(super) fn config(&self) -> &Map<String, Value> {
        &self.config
    }

    /// Makes `token` the end-of-sequence token: the one appended to training text, which ends generation, which templates
    /// see, and which is saved. The tokens that ended sequences before still do.
    ///
    /// # Errors
    /// If the vocabulary lacks it; the message names near ones.
    pub fn set_eos(&mut self, token: &str) -> Result<(), Error> {
        let id = self.token_to_id(token).ok_or_else(|| {
            let near = self.added_tokens().into_values().map(|(text, _)| text);
            let mut near: Vec<(f64, String)> = near.map(|text| (strsim::jaro_winkler(token, &text), text)).collect();
            near.sort_by(|left, right| right.0.total_cmp(&left.0));
            let near: Vec<String> = near.into_iter().take(3).map(|(_, text)| format!("`{text}`")).collect();
            let near = if near.is_empty() { String::new() } else { format!("; near ones are {}", near.join(", ")) };
            Error::Setting(format!("`eos_token: {token}` is not a token of the tokenizer{near}"))
        })?;
        self.special.eos.retain(|&known| known != id);
        self.special.eos.insert(0, id);
        self.special.strings.insert("eos_token".into(), token.into());
        Ok(())
    }

    /// Lets `id` end generation too.
    pub fn add_stop(&mut self, id: u32) {
        if !self.special.eos.contains(&id) {
            self.special.eos.push(id);
        }
    }

    /// A checksum of everything that decides about tokens: the vocabulary and its rules, and the special tokens.
    ///
    /// # Errors
    /// If the tokenizer cannot be serialised.
    pub fn fingerprint(&self) -> Result<String, Error> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.inner.to_string(false).map_err(failed("serialise"))?.as_bytes());
        hasher.update(format!("{:?}", self.special).as_bytes());
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// The token with which a chat template ends the assistant's turns: the first added token in `after_answer`, which is
    /// what the template prints behind an answer.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn end_of_turn(&self, after_answer: &str) -> Result<Option<u32>, Error> {
        let added = self.inner.get_added_tokens_decoder();
        let is_end = |id: &u32| added.contains_key(id) || self.special.eos.contains(id);
        Ok(self.encode(after_answer)?.into_iter().find(is_end))
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json`, the special-token files and `chat_template.jinja` into
    /// `folder`, so that transformers loads the same tokenizer from there.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn save(&self, folder: &Path, chat_template: Option<&str>) -> Result<(), Error> {
        let text = self.inner.to_string(true).map_err(failed("serialise"))?;
        crate::fs::write_atomic(&folder.join("tokenizer.json"), text.as_bytes())?;
        let mut config = self.config.clone();
        let eos = self.special.strings.get("eos_token").cloned();
        set_token(&mut config, "eos_token", eos.as_deref());
        if let Some(template) = chat_template {
            config.insert("chat_template".into(), json!(template));
            crate::fs::write_atomic(&folder.join("chat_template.jinja"), template.as_bytes())?;
        }
        let text = format!("{:#}\n", Value::Object(config));
        crate::fs::write_atomic(&folder.join("tokenizer_config.json"), text.as_bytes())?;
        for (name, text) in &self.companions {
            let changed = match serde_json::from_str::<Map<String, Value>>(text) {
                Ok(mut map) if name == SPECIAL_MAP && map.get("eos_token").and_then(token_text) != eos.as_deref() => {
                    set_token(&mut map, "eos_token", eos.as_deref());
                    format!("{:#}\n", Value::Object(map))
                }
                _ => text.clone(),
            };
            crate::fs::write_atomic(&folder.join(name), changed.as_bytes())?;
        }
        Ok(())
    }
}

/// The tokenizer of a GGUF file's metadata.
///
/// # Errors
/// As [`Tokenizer::from_gguf`].
pub fn from_gguf(content: &candle_core::quantized::gguf_file::Content) -> Result<Tokenizer, Error> {
    Tokenizer::from_gguf(content)
}

impl TokenBytes {
    fn of(inner: &tokenizers::Tokenizer) -> Self {
        let count = inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        let byte_of: BTreeMap<char, u8> = byte_level_letters().into_iter().zip(0..=u8::MAX).collect();
        let added = inner.get_added_tokens_decoder();
        let mut table = Self { bytes: Vec::new(), starts: vec![0], is_special: Vec::with_capacity(count) };
        for id in 0..count as u32 {
            if let Some(token) = inner.id_to_token(id) {
                let before = table.bytes.len();
                for character in token.chars() {
                    if let Some(&byte) = byte_of.get(&character) {
                        table.bytes.push(byte);
                    } else {
                        // A token with a character outside the alphabet (an added one) stands for its own text.
                        table.bytes.truncate(before);
                        table.bytes.extend_from_slice(token.as_bytes());
                        break;
                    }
                }
            }
            table.starts.push(table.bytes.len() as u32);
            table.is_special.push(added.get(&id).is_some_and(|token| token.special));
        }
        table
    }

    fn get(&self, id: u32, skip_special: bool) -> &[u8] {
        let id = id as usize;
        match self.is_special.get(id) {
            Some(&special) if !(special && skip_special) => {
                &self.bytes[self.starts[id] as usize..self.starts[id + 1] as usize]
            }
            _ => &[],
        }
    }
}

/// GPT-2's alphabet of 256 printable characters, one per byte: printable Latin-1 stands for itself, the other bytes
/// for U+0100 and up in order (`bytes_to_unicode` in the `encoder.py` of GPT-2).
pub(super) fn byte_level_letters() -> [char; 256] {
    let mut shifted = '\u{100}'..;
    std::array::from_fn(|byte| {
        let letter = char::from(byte as u8);
        match byte as u8 {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => letter,
            _ => shifted.next().unwrap_or(letter),
        }
    })
}

pub(super) fn failed(action: &'static str) -> impl Fn(tokenizers::Error) -> Error {
    move |error| Error::Tokenizer { what: format!("cannot {action}"), problem: error.to_string() }
}

/// A token in a config: its text, or an object with `content`.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// Writes a token's text, into the object that describes it where there is one.
fn set_token(config: &mut Map<String, Value>, name: &str, text: Option<&str>) {
    match (config.get_mut(name).and_then(|token| token.get_mut("content")), text) {
        (Some(content), Some(text)) => *content = json!(text),
        (None, Some(text)) => drop(config.insert(name.into(), json!(text))),
        (_, None) => {}
    }
}

/// One id or a list of them.
fn ids_in(value: &Value) -> Vec<u32> {
    let id = |v: &Value| v.as_u64().and_then(|v| u32::try_from(v).ok());
    match value {
        Value::Array(list) => list.iter().filter_map(id).collect(),
        other => id(other).into_iter().collect(),
    }
}

fn read_object(path: &Path) -> Result<Option<Map<String, Value>>, Error> {
    if !path.is_file() {
        return Ok(None);
    }
    let bytes = std::fs::read(path).map_err(crate::fs::io_error("read", path))?;
    let object = serde_json::from_slice(&bytes)
        .map_err(|e| Error::Content { path: path.into(), problem: format!("not a JSON object: {e}") })?;
    Ok(Some(object))
}

#[cfg(test)]
pub(super) mod fixture {
    use super::super::GgufTokenizer;
    use super::{Tokenizer, byte_level_letters};

    /// A byte-level tokenizer of 256 bytes, three merges (`th`, `the`, ` the`) and three special tokens; `<tag>` is an
    /// added token that decoding never skips.
    pub(crate) fn parts() -> GgufTokenizer {
        let mut tokens: Vec<String> = byte_level_letters().iter().map(char::to_string).collect();
        let merges = ["t h", "th e", "Ġ the"].map(String::from).to_vec();
        tokens.extend(["th", "the", "Ġthe"].map(String::from));
        let mut token_types = vec![1; tokens.len()];
        tokens.extend(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tag>"].map(String::from));
        token_types.extend([3, 3, 3, 4]);
        GgufTokenizer {
            tokens,
            token_types,
            merges,
            bos: Some(259),
            eos: Some(261),
            pad: Some(259),
            pre: "qwen2".into(),
            add_bos: false,
            chat_template: Some("{% for m in messages %}{{ m.content }}{% endfor %}".into()),
            context_length: Some(512),
        }
    }

    pub(crate) fn tokenizer() -> Tokenizer {
        Tokenizer::from_gguf_parts(&parts()).unwrap()
    }
}

#[cfg(test)]
#[path = "tokenizer_tests.rs"]
mod tests;
