//! Fast encoding for the tokenizers of the Qwen family.
//!
//! [`Plan`] recognises a byte-level BPE with Qwen2's split; [`Encoder`] then finds added tokens, splits, and looks pieces
//! up in its own cache, asking the `tokenizers` crate's BPE only for pieces not seen before. Any other tokenizer goes
//! through the crate as it is. Both ways give the same tokens (property test). An encoder belongs to one thread; bulk
//! work makes one per thread and keeps it.

use std::borrow::Cow;
use std::collections::HashMap;

use serde_json::{Value, json};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::{Model, NormalizedString, Normalizer};

use super::Error;
use super::split::{QWEN2_SPLIT, pieces};
use super::tokenizer::{OffsetEncoding, Tokenizer, byte_level_letters, failed};
use super::tokenizer_guard::guarded;

/// Most pieces an encoder remembers, and the longest of them in bytes.
const CACHE_PIECES: usize = 1 << 17;
const CACHE_PIECE_BYTES: usize = 48;

/// What is needed to encode without the crate's pipeline.
#[derive(Debug)]
pub(super) struct Plan {
    /// Added tokens by their first byte (256 entries), longest first.
    added: Vec<Vec<(String, u32)>>,
    /// Whether text is brought into NFC first.
    has_nfc: bool,
    /// Whether the crate puts nothing around a document.
    is_bare: bool,
    /// The byte-level alphabet.
    letters: [char; 256],
}

impl Plan {
    /// The plan for a tokenizer; `None` where it is not of the family's kind.
    pub(super) fn of(inner: &tokenizers::Tokenizer) -> Option<Self> {
        let as_json = |part: Option<Value>| part.unwrap_or(Value::Null);
        let normalizer = as_json(inner.get_normalizer().and_then(|n| serde_json::to_value(n).ok()));
        let mut split = as_json(inner.get_pre_tokenizer().and_then(|p| serde_json::to_value(p).ok()));
        let post = as_json(inner.get_post_processor().and_then(|p| serde_json::to_value(p).ok()));
        // Which offsets the split reports is up to the post-processor, checked below.
        split.pointer_mut("/pretokenizers/1")?.as_object_mut()?.remove("trim_offsets");
        let expected = json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false},
        ]});
        let has_nfc = normalizer == json!({"type": "NFC"});
        let is_known = split == expected
            && (has_nfc || normalizer.is_null())
            && matches!(inner.get_model(), tokenizers::ModelWrapper::BPE(bpe) if bpe.dropout.is_none())
            && !post.to_string().contains("\"trim_offsets\":true")
            && !inner.get_encode_special_tokens();
        let mut added: Vec<Vec<(String, u32)>> = vec![Vec::new(); 256];
        for (id, token) in inner.get_added_tokens_decoder() {
            let is_plain = !(token.single_word || token.lstrip || token.rstrip || token.normalized);
            let first = token.content.bytes().next().filter(|_| is_plain)?;
            added[usize::from(first)].push((token.content, id));
        }
        for tokens in &mut added {
            tokens.sort_by(|left, right| right.0.len().cmp(&left.0.len()).then_with(|| left.0.cmp(&right.0)));
        }
        let is_bare = post.is_null() || post["type"] == "ByteLevel";
        is_known.then(|| Self { added, has_nfc, is_bare, letters: byte_level_letters() })
    }

    /// The next added token of `text`: its start, its end and its id.
    fn next_added(&self, text: &str) -> Option<(usize, usize, u32)> {
        text.bytes().enumerate().find_map(|(start, byte)| {
            let tokens = &self.added[usize::from(byte)];
            let (token, id) = tokens.iter().find(|(token, _)| text[start..].starts_with(token.as_str()))?;
            Some((start, start + token.len(), *id))
        })
    }

    fn normalised<'t>(&self, text: &'t str) -> Result<Cow<'t, str>, Error> {
        if !self.has_nfc || text.chars().all(is_stable) {
            return Ok(Cow::Borrowed(text));
        }
        let mut normalised = NormalizedString::from(text);
        NFC.normalize(&mut normalised).map_err(failed("normalise"))?;
        Ok(match normalised.get() {
            same if same == text => Cow::Borrowed(text),
            other => Cow::Owned(other.to_string()),
        })
    }
}

/// Whether a character is in NFC whatever stands around it; says no where a table would be needed. Everything below the
/// combining marks is, and so are the unified ideographs (Unicode, `NFC_Quick_Check`).
fn is_stable(character: char) -> bool {
    matches!(character, '\0'..='\u{2FF}' | '\u{4E00}'..='\u{9FFF}')
}

/// Encodes texts one after another, remembering pieces.
#[derive(Debug)]
pub struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    cache: HashMap<Box<str>, Box<[u32]>>,
}

impl<'a> Encoder<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, cache: HashMap::new() }
    }

    /// As [`Tokenizer::encode`].
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode(&mut self, text: &str) -> Result<Vec<u32>, Error> {
        match self.tokenizer.plan() {
            Some(plan) => self.encode_planned(plan, text).map(|(ids, _)| ids),
            None => self.tokenizer.encode_by_crate(text, false),
        }
    }

    /// As [`Tokenizer::encode_document`].
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_document(&mut self, text: &str) -> Result<Vec<u32>, Error> {
        match self.tokenizer.plan().filter(|plan| plan.is_bare) {
            Some(plan) => self.encode_planned(plan, text).map(|(ids, _)| ids),
            None => self.tokenizer.encode_by_crate(text, true),
        }
    }

    /// As [`Tokenizer::encode_with_offsets`].
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_with_offsets(&mut self, text: &str) -> Result<OffsetEncoding, Error> {
        if let Some(plan) = self.tokenizer.plan() {
            let (ids, is_changed) = self.encode_planned(plan, text)?;
            if !is_changed && let Some(chars) = self.offsets(&ids, text) {
                return Ok(OffsetEncoding { ids, chars });
            }
        }
        self.tokenizer.offsets_by_crate(text)
    }

    /// Tokens of a text, and whether normalising changed the text.
    fn encode_planned(&mut self, plan: &Plan, text: &str) -> Result<(Vec<u32>, bool), Error> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 1);
        let (mut rest, mut is_changed) = (text, false);
        loop {
            let added = plan.next_added(rest);
            let segment = plan.normalised(&rest[..added.map_or(rest.len(), |(start, _, _)| start)])?;
            is_changed |= matches!(segment, Cow::Owned(_));
            for piece in pieces(&segment) {
                self.encode_piece(plan, piece, &mut ids)?;
            }
            let Some((_, end, id)) = added else { return Ok((ids, is_changed)) };
            ids.push(id);
            rest = &rest[end..];
        }
    }

    fn encode_piece(&mut self, plan: &Plan, piece: &str, ids: &mut Vec<u32>) -> Result<(), Error> {
        if let Some(known) = self.cache.get(piece) {
            ids.extend_from_slice(known);
            return Ok(());
        }
        let letters: String = piece.bytes().map(|byte| plan.letters[byte as usize]).collect();
        let tokens = guarded("of this model", || self.tokenizer.model().tokenize(&letters).map_err(failed("encode")))?;
        let start = ids.len();
        ids.extend(tokens.iter().map(|token| token.id));
        if self.cache.len() < CACHE_PIECES && piece.len() <= CACHE_PIECE_BYTES {
            self.cache.insert(piece.into(), ids[start..].into());
        }
        Ok(())
    }

    /// Characters of each token, from the bytes of the tokens, which are the bytes of the text. A token that ends inside
    /// a character counts as holding it. `None` if the bytes do not add up (a byte without a token).
    fn offsets(&self, ids: &[u32], text: &str) -> Option<Vec<(usize, usize)>> {
        let mut chars = Vec::with_capacity(ids.len());
        let bytes = text.as_bytes();
        let is_start = |at: usize| at == bytes.len() || text.is_char_boundary(at);
        // `at`: the byte reached; `count`: characters that begin before it.
        let (mut at, mut count) = (0, 0);
        for &id in ids {
            let token = self.tokenizer.bytes_of(id, false)?;
            if token.is_empty() || !bytes[at..].starts_with(token) {
                return None;
            }
            let start = if is_start(at) { count } else { count - 1 };
            count += (at..at + token.len()).filter(|&byte| text.is_char_boundary(byte)).count();
            at += token.len();
            chars.push((start, count));
        }
        (at == bytes.len()).then_some(chars)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokenizers::normalizers::NormalizerWrapper;

    use super::super::tokenizer::fixture;
    use super::*;

    fn check(tokenizer: &Tokenizer, texts: &[String]) {
        assert!(tokenizer.plan().is_some(), "the fast way is what is tested");
        let mut encoder = tokenizer.encoder();
        for text in texts {
            let ids = tokenizer.encode_by_crate(text, false).unwrap();
            assert_eq!(encoder.encode(text).unwrap(), ids, "{text:?}");
            assert_eq!(encoder.encode(text).unwrap(), ids, "{text:?} from the cache");
            assert_eq!(encoder.encode_document(text).unwrap(), tokenizer.encode_by_crate(text, true).unwrap());
            let (fast, slow) = (encoder.encode_with_offsets(text).unwrap(), tokenizer.offsets_by_crate(text).unwrap());
            assert_eq!((fast.ids, fast.chars), (slow.ids, slow.chars), "{text:?}");
        }
    }

    fn with_nfc() -> Tokenizer {
        let mut inner = fixture::parts().build().unwrap();
        inner.with_normalizer(Some(NormalizerWrapper::from(NFC))).unwrap();
        let special = super::super::SpecialTokens::default();
        Tokenizer::new(inner, special, serde_json::Map::new(), std::collections::BTreeMap::new()).unwrap()
    }

    #[test]
    fn a_tokenizer_of_another_kind_has_no_plan() {
        let inner = fixture::parts().build().unwrap();
        assert!(Plan::of(&inner).is_some());
        let mut other = inner.clone();
        other.with_pre_tokenizer(None::<tokenizers::PreTokenizerWrapper>);
        assert!(Plan::of(&other).is_none());
        let mut other = inner.clone();
        other.add_tokens([tokenizers::AddedToken::from("<x>", false).lstrip(true)]).unwrap();
        assert!(Plan::of(&other).is_none());
        let mut other = inner;
        other.with_normalizer(Some(NormalizerWrapper::from(tokenizers::normalizers::unicode::NFKC))).unwrap();
        assert!(Plan::of(&other).is_none());
    }

    proptest! {
        #[test]
        fn the_fast_way_gives_the_crate_s_tokens_and_offsets(
            texts in prop::collection::vec(
                prop_oneof![
                    "(the| the|th|<\\|im_end\\|>|<\\|im_start\\|>|<tag>|<|>|é|e\u{301}|你好|🌍|가|\u{2000}|[ \n'sx1.])*",
                    "\\PC{0,20}",
                ],
                1..4,
            )
        ) {
            check(&fixture::tokenizer(), &texts);
            check(&with_nfc(), &texts);
        }
    }
}
