//! Tokenizers and chat templates.

use std::path::Path;

use serde_json::{Value, json};
use trainer::data::{ChatTemplate, RenderOptions, SpecialTokens, Tokenizer};
use trainer::model::load::Purpose;

use super::models;
use super::mutate::{Reader, Seeds, no_files};

pub(crate) const TOKENIZER: Reader =
    Reader { name: "tokenizer", prepare: models::prepare, seeds: tokenizers, read: read_tokenizer, cost: 1 };
pub(crate) const TEMPLATE: Reader =
    Reader { name: "template", prepare: no_files, seeds: templates, read: read_template, cost: 1 };

/// The tokenizer of the models, one of the family's kind, and the files beside it.
fn tokenizers(good: &Path) -> Seeds {
    let plain = std::fs::read(good.join("qwen2/tokenizer.json")).unwrap();
    let mut family: Value = serde_json::from_slice(&plain).unwrap();
    let split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|\s+(?!\S)|\s+";
    family["normalizer"] = json!({"type": "NFC"});
    family["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
    ]});
    family["decoder"] =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    family["post_processor"] = json!({
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [1], "tokens": ["<|endoftext|>"]}},
    });
    let map = json!({"eos_token": {"content": "<|im_end|>", "lstrip": false}, "pad_token": "<pad>"});
    vec![
        ("tokenizer.json".into(), plain),
        ("tokenizer.json".into(), family.to_string().into()),
        ("tokenizer_config.json".into(), std::fs::read(good.join("qwen2/tokenizer_config.json")).unwrap()),
        ("special_tokens_map.json".into(), map.to_string().into()),
        ("generation_config.json".into(), std::fs::read(good.join("qwen2/generation_config.json")).unwrap()),
    ]
}

fn read_tokenizer(path: &Path, good: &Path) -> Result<(), String> {
    models::complete(path, &good.join("qwen2"));
    let folder = path.parent().unwrap();
    let tokenizer = Tokenizer::from_folder(folder).map_err(|e| e.to_string())?;
    let text = "1+2=<|im_start|> it's\u{e4}\u{1f600}\r\n 12 <|im_end|>";
    let ids = tokenizer.encode(text).map_err(|e| e.to_string());
    let document = tokenizer.encode_document(text).map_err(|e| e.to_string());
    let offsets = tokenizer.encode_with_offsets(text).map_err(|e| e.to_string());
    let _ = tokenizer.encode_all(&[text, "", "1"]);
    let some: Vec<u32> = (0..80).chain([u32::MAX]).collect();
    for skip_special in [false, true] {
        let _ = tokenizer.decode(&some, skip_special);
    }
    let _ = (tokenizer.eos_text(), tokenizer.pad_id(), tokenizer.vocab_size(), tokenizer.fingerprint());
    let again = folder.join("again");
    std::fs::create_dir_all(&again).unwrap();
    let _ = tokenizer.save(&again, Some("{{ messages }}"));
    // As the tokenizer of a model.
    let model = good.join("qwen2");
    let lines = format!("model_name_or_path: {}\ntokenizer_name_or_path: {}\n", model.display(), folder.display());
    models::open(&lines, Purpose::Inference)?;
    ids.and(document)?;
    offsets.map(|_| ())
}

/// Templates of the family, and the engine's constructs in a row.
fn templates(_: &Path) -> Seeds {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chat/templates");
    let mut files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let mut seeds: Seeds =
        files.iter().map(|file| ("chat_template.jinja".to_string(), std::fs::read(file).unwrap())).collect();
    let constructs = "\
{%- macro show(x, n=3) -%}{{ '%5.2f' % n }}{{ '{:>8}|{:,}'.format(x, 12345) }}{%- endmacro -%}
{%- set ns = namespace(i=0, s='') -%}
{%- for m in messages | selectattr('role', 'ne', 'system') -%}
{%- set ns.i = ns.i + 1 -%}{%- set ns.s = ns.s ~ m.content[:9] -%}
{{- show(m.role, loop.index) }}{{ m | tojson(indent=2) }}{{ 'x' * 3 }}{{ range(2, 9, 3) | list }}
{%- if loop.last and not add_generation_prompt %}{{ ns.s | replace('a', 'bb') | center(20) | indent(2) }}{% endif -%}
{%- generation %}{{ m.content | trim }}{% endgeneration -%}
{%- endfor -%}
{{ ns.i ** 2 // 3 % 7 }}{{ [3, 1, 2] | sort | join(',') }}{{ messages | groupby('role') | length }}
{{ 'a,b'.split(',') | map('upper') | list }}{{ strftime_now('%Y') | length }}{{ tools is none }}
{{ messages[-1].content | default('none') | wordwrap(5) | truncate(12) }}{{ 7 | float | round(1) }}
";
    seeds.push(("chat_template.jinja".into(), constructs.into()));
    seeds
}

fn read_template(path: &Path, _: &Path) -> Result<(), String> {
    let strings = [("eos_token", "<|im_end|>"), ("bos_token", "<|endoftext|>")];
    let strings = strings.map(|(name, text)| (name.to_string(), text.to_string())).into();
    let special = SpecialTokens { strings, ..SpecialTokens::default() };
    let template = ChatTemplate::from_file(path, &special).map_err(|e| e.to_string())?;
    let messages = json!([
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "2 + 3? \u{e4}"},
        {"role": "assistant", "content": "<think>\nadd\n</think>\n\n5", "reasoning_content": "add"},
        {"role": "tool", "name": "calc", "content": "5"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "6"},
    ]);
    let tools = json!([{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]);
    let variables = json!({"enable_thinking": false});
    let mut outcome = Ok(());
    for options in [
        RenderOptions::default(),
        RenderOptions { add_generation_prompt: true, tools: Some(&tools), variables: variables.as_object() },
    ] {
        outcome = outcome.and(template.render_marked(&messages, options).map(|_| ()).map_err(|e| e.to_string()));
    }
    let _ = template.after_answer();
    if let Ok(variant) = template.for_assistant_masks() {
        let _ = variant.render_marked(&messages, RenderOptions::default());
    }
    outcome
}
