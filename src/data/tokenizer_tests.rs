//! Tokenizers of folders and of GGUF files: text to tokens and back, special tokens, saving.

use std::path::PathBuf;

use proptest::prelude::*;

use super::super::{ChatTemplate, StreamDecoder};
use super::fixture::{parts, tokenizer};
use super::*;

const SAMPLES: [&str; 5] =
    ["", "the thethe  the\n", "naïve 你好 🌍", "<|im_start|>the<|im_end|>\n<tag>", "a<|im_en|>d \r\n\t 12'LL"];

#[test]
fn text_comes_back_and_special_tokens_inside_it_are_parsed() {
    let tokenizer = tokenizer();
    for text in SAMPLES {
        let ids = tokenizer.encode(text).unwrap();
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        assert_eq!(tokenizer.encode_document(text).unwrap(), ids, "nothing is added");
        let offsets = tokenizer.encode_with_offsets(text).unwrap();
        assert_eq!(offsets.ids, ids);
        assert_eq!(offsets.chars.last().map_or(0, |&(_, end)| end), text.chars().count());
    }
    assert_eq!(tokenizer.encode("<|im_start|> the<|im_end|><tag>").unwrap(), [260, 258, 261, 262]);
    assert_eq!(tokenizer.decode(&[260, 258, 261, 262], true).unwrap(), " the<tag>");
    assert_eq!(tokenizer.decode(&[258, 100_000], false).unwrap(), " the", "an unknown id has no text");
    assert_eq!(tokenizer.encode_all(&SAMPLES).unwrap().len(), SAMPLES.len());
    assert_eq!(tokenizer.vocab_size(), 263);
}

#[test]
fn special_tokens_of_a_gguf_file_are_known() {
    let tokenizer = tokenizer();
    // The named end token first, then the family's other one.
    assert_eq!(tokenizer.eos_ids(), [261, 259]);
    assert_eq!((tokenizer.eos_id().unwrap(), tokenizer.eos_text().unwrap().as_str()), (261, "<|im_end|>"));
    assert_eq!(tokenizer.pad_id(), Some(259));
    assert_eq!(tokenizer.special().strings["bos_token"], "<|endoftext|>");
    let mut without = parts();
    (without.eos, without.pad, without.token_types) = (None, None, vec![1; 263]);
    let without = Tokenizer::from_gguf_parts(&without).unwrap();
    assert!(without.eos_id().unwrap_err().to_string().contains("no end-of-sequence token"));
    assert_eq!(without.pad_id(), None);
}

#[test]
fn broken_parts_are_named() {
    let mut parts = parts();
    parts.pre = "llama3".into();
    let text = Tokenizer::from_gguf_parts(&parts).unwrap_err().to_string();
    assert!(text.contains("`tokenizer.ggml.pre` is `llama3`, known are qwen2"), "{text}");
    parts.pre = "qwen2".into();
    parts.merges.push("nospace".into());
    let text = Tokenizer::from_gguf_parts(&parts).unwrap_err().to_string();
    assert!(text.contains("merge `nospace` is not two tokens"), "{text}");
    parts.merges = vec!["zz zz".into()];
    assert!(Tokenizer::from_gguf_parts(&parts).is_err());
    parts.merges.clear();
    parts.tokens[3] = parts.tokens[4].clone();
    let text = Tokenizer::from_gguf_parts(&parts).unwrap_err().to_string();
    assert!(text.contains("has 263 tokens, 262 of them different"), "{text}");
}

#[test]
fn a_saved_tokenizer_is_the_same_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer();
    tokenizer.save(folder.path(), Some("{{ messages }}")).unwrap();
    std::fs::write(folder.path().join("generation_config.json"), r#"{"eos_token_id": [261, 259]}"#).unwrap();
    let again = Tokenizer::from_folder(folder.path()).unwrap();
    for text in SAMPLES {
        assert_eq!(again.encode(text).unwrap(), tokenizer.encode(text).unwrap());
    }
    assert_eq!(again.special(), tokenizer.special());
    assert_eq!(again.added_tokens(), tokenizer.added_tokens());
    let template = ChatTemplate::find(None, Some(folder.path()), &again).unwrap().unwrap();
    assert_eq!(template.source(), "{{ messages }}");
    let config: Value =
        serde_json::from_slice(&std::fs::read(folder.path().join("tokenizer_config.json")).unwrap()).unwrap();
    assert_eq!(config["tokenizer_class"], "PreTrainedTokenizerFast");
    assert_eq!((&config["eos_token"], &config["model_max_length"]), (&json!("<|im_end|>"), &json!(512)));
    assert_eq!(config["chat_template"], "{{ messages }}");
}

#[test]
fn a_folder_s_special_tokens_and_templates_are_found_in_all_their_forms() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, value: Value| std::fs::write(folder.path().join(name), value.to_string()).unwrap();
    tokenizer().save(folder.path(), None).unwrap();
    let templates = json!([{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]);
    write("tokenizer_config.json", json!({"eos_token": {"content": "<|endoftext|>"}, "chat_template": templates}));
    write("special_tokens_map.json", json!({"pad_token": "<|im_start|>"}));
    write("config.json", json!({"eos_token_id": 261}));
    let found = Tokenizer::from_folder(folder.path()).unwrap();
    assert_eq!((found.eos_ids(), found.pad_id(), found.special().bos), (&[259, 261][..], Some(260), None));
    let source = |path: Option<&Path>| {
        ChatTemplate::find(path, Some(folder.path()), &found).unwrap().unwrap().source().to_string()
    };
    assert_eq!(source(None), "D");
    write("chat_template.json", json!({"chat_template": "J"}));
    assert_eq!(source(None), "J");
    std::fs::write(folder.path().join("chat_template.jinja"), "F").unwrap();
    assert_eq!(source(None), "F");
    let own = folder.path().join("own.jinja");
    std::fs::write(&own, "O").unwrap();
    assert_eq!(source(Some(&own)), "O");
    // Saving keeps the small files beside the tokenizer.
    let copy = tempfile::tempdir().unwrap();
    found.save(copy.path(), None).unwrap();
    assert_eq!(Tokenizer::from_folder(copy.path()).unwrap().special().pad, Some(260));
}

#[test]
fn a_missing_or_broken_tokenizer_json_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let message = || Tokenizer::from_folder(folder.path()).unwrap_err().to_string();
    assert!(message().contains("tokenizer.json`: no such file"), "{}", message());
    std::fs::write(folder.path().join("tokenizer.json"), "{").unwrap();
    assert!(message().contains("tokenizer.json`:"), "{}", message());
    tokenizer().save(folder.path(), None).unwrap();
    std::fs::write(folder.path().join("tokenizer_config.json"), "[]").unwrap();
    assert!(message().contains("tokenizer_config.json`: not a JSON object"), "{}", message());
}

#[test]
fn a_tokenizer_that_is_not_byte_level_streams_words_with_their_spaces() {
    let text = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": false},
        "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "one": 1, "two": 2, "##s": 3}, "unk_token": "[UNK]"},
    });
    let inner = tokenizers::Tokenizer::from_bytes(text.to_string()).unwrap();
    let tokenizer = Tokenizer::new(inner, SpecialTokens::default(), Map::new(), BTreeMap::new()).unwrap();
    let ids = [1, 2, 3, 1];
    let mut stream = StreamDecoder::new(false);
    let pieces: Vec<String> = ids.iter().map(|&id| stream.push(&tokenizer, id).unwrap()).collect();
    assert_eq!(pieces.concat() + &stream.finish(), tokenizer.decode(&ids, false).unwrap());
    assert_eq!(pieces.concat(), "one twos one");
    assert_eq!(tokenizer.vocab_size(), 4);
}

/// Tokens per second of the real vocabulary; `TRAINER_QWEN05B_GGUF` names the file.
#[test]
#[ignore = "measures speed on a real GGUF file"]
#[expect(clippy::print_stdout, reason = "a measurement is for reading")]
fn speed_of_the_real_vocabulary() {
    let path = PathBuf::from(std::env::var_os("TRAINER_QWEN05B_GGUF").expect("TRAINER_QWEN05B_GGUF is set"));
    let mut file = std::io::BufReader::new(std::fs::File::open(&path).unwrap());
    let content = candle_core::quantized::gguf_file::Content::read(&mut file).unwrap();
    let start = std::time::Instant::now();
    let tokenizer = Tokenizer::from_gguf(&content).unwrap();
    println!("built in {:?}", start.elapsed());
    let words = [
        "the",
        "sum",
        "of",
        "Natalia's",
        "clips",
        "48",
        "=",
        "$2",
        "half",
        "as",
        "many,",
        "```python",
        "résumé",
        "你好",
        "x_1",
    ];
    let text = |row: usize| -> String {
        (0..80).map(|i| words[(row * 31 + i * i * 7 + i) % words.len()]).collect::<Vec<_>>().join(" ")
    };
    let texts: Vec<String> = (0..100_000).map(text).collect();
    let bytes: usize = texts.iter().map(String::len).sum();
    let start = std::time::Instant::now();
    let ids = tokenizer.encode_all(&texts).unwrap();
    let (seconds, tokens) = (start.elapsed().as_secs_f64(), ids.iter().map(Vec::len).sum::<usize>());
    println!(
        "100,000 rows, {:.1} MB, {tokens} tokens in {seconds:.2} s: {:.2} MB/s, {:.0} tokens/s",
        bytes as f64 / 1e6,
        bytes as f64 / 1e6 / seconds,
        tokens as f64 / seconds
    );
}

proptest! {
    #[test]
    fn any_text_survives_and_streams_in_whole_characters(text in "\\PC{0,40}|[\\x00-\\x7f<|>imend_ ]{0,40}") {
        let tokenizer = tokenizer();
        let ids = tokenizer.encode(&text).unwrap();
        prop_assert_eq!(&tokenizer.decode(&ids, false).unwrap(), &text);
        let mut stream = StreamDecoder::new(false);
        let mut streamed = String::new();
        for id in ids {
            let piece = stream.push(&tokenizer, id).unwrap();
            let is_broken = piece.contains(char::REPLACEMENT_CHARACTER) && !text.contains(char::REPLACEMENT_CHARACTER);
            prop_assert!(!is_broken);
            streamed.push_str(&piece);
        }
        prop_assert_eq!(streamed + &stream.finish(), text);
    }

    #[test]
    fn any_tokens_stream_to_the_text_they_decode_to(ids in prop::collection::vec(0u32..270, 0..30), skip: bool) {
        let tokenizer = tokenizer();
        let mut stream = StreamDecoder::new(skip);
        let mut streamed = String::new();
        for &id in &ids {
            streamed.push_str(&stream.push(&tokenizer, id).unwrap());
        }
        prop_assert_eq!(streamed + &stream.finish(), tokenizer.decode(&ids, skip).unwrap());
    }
}
