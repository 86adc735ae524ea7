//! Chat templates, tokens and assistant masks against transformers.
//!
//! Token ids need the tokenizer inside Qwen2.5-Coder-0.5B-Instruct's GGUF: `TRAINER_QWEN05B_GGUF` names the file. Without
//! it the texts and the character ranges are still checked, and the ids are skipped.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Map, Value};
use trainer::data::{ChatTemplate, RenderOptions, SpecialTokens, StreamDecoder, Tokenizer, assistant_mask};

use crate::report::Report;

const GGUF_VARIABLE: &str = "TRAINER_QWEN05B_GGUF";

pub(crate) fn run(folder: &Path, report: &mut Report) -> Result<()> {
    let tokenizer = match std::env::var_os(GGUF_VARIABLE).map(PathBuf::from) {
        Some(path) => Some(read_tokenizer(&path).with_context(|| path.display().to_string())?),
        None => None,
    };
    if tokenizer.is_none() {
        report.skip("token ids", &format!("{GGUF_VARIABLE} does not name qwen2.5-coder-0.5b-instruct.gguf"));
    }
    let rendered = read(&folder.join("rendered.json"))?;
    let masks = read(&folder.join("assistant_masks.json"))?;
    let mut bos = BTreeMap::new();
    for case in cases(&rendered) {
        if let (Some(template), Some(token)) = (case["template"].as_str(), case["bos_token"].as_str()) {
            bos.insert(template.to_string(), token.to_string());
        }
        check_rendered(folder, case, tokenizer.as_ref(), report)?;
    }
    for case in cases(&masks) {
        let name = case["template"].as_str().context("template")?;
        let base = name.strip_suffix("_training").unwrap_or(name);
        check_mask(folder, case, name, bos.get(base), tokenizer.as_ref(), report)?;
        // The variant that is derived here from the family's own template must give the same text and the same mask.
        if base != name && folder.join(format!("templates/{base}.jinja")).is_file() {
            check_mask(folder, case, base, bos.get(base), tokenizer.as_ref(), report)?;
        }
    }
    if let Some(tokenizer) = &tokenizer {
        check_tokens(&read(&folder.join("tokens.json"))?, tokenizer, report)?;
    }
    Ok(())
}

fn check_rendered(folder: &Path, case: &Value, tokenizer: Option<&Tokenizer>, report: &mut Report) -> Result<()> {
    let template = case["template"].as_str().context("template")?;
    let name = format!(
        "rendered/{template}/{}/generation {}/thinking {}",
        case["conversation"], case["add_generation_prompt"], case["enable_thinking"]
    );
    let mut variables = Map::new();
    if let Some(flag) = case["enable_thinking"].as_bool() {
        variables.insert("enable_thinking".into(), flag.into());
    }
    let template = template_of(folder, template, case["bos_token"].as_str())?;
    let options = RenderOptions {
        add_generation_prompt: case["add_generation_prompt"].as_bool().unwrap_or(false),
        tools: Some(&case["tools"]).filter(|tools| !tools.is_null()),
        variables: Some(&variables),
    };
    let found = template.render(&case["messages"], options);
    if let Some(expected) = case.get("error").filter(|error| !error.is_null()) {
        report.expect(&name, found.is_err(), || format!("gave {found:?}, expected the error {expected}"));
        return Ok(());
    }
    let found = match found {
        Ok(text) => text,
        Err(error) => {
            report.fail(&name, &error.to_string());
            return Ok(());
        }
    };
    let expected = case["text"].as_str().context("text")?;
    report.expect(&name, found == expected, || first_difference(&found, expected));
    if let (Some(tokenizer), true) = (tokenizer, case.get("ids").is_some()) {
        let (found, expected) = (tokenizer.encode(expected)?, ids(&case["ids"])?);
        report.expect(&format!("{name}/ids"), found == expected, || format!("{found:?}, expected {expected:?}"));
    }
    Ok(())
}

fn check_mask(
    folder: &Path,
    case: &Value,
    template: &str,
    bos: Option<&String>,
    tokenizer: Option<&Tokenizer>,
    report: &mut Report,
) -> Result<()> {
    let name = format!("masks/{template}/{}", case["conversation"]);
    let template = template_of(folder, template, bos.map(String::as_str))?.for_assistant_masks()?;
    let options =
        RenderOptions { tools: Some(&case["tools"]).filter(|tools| !tools.is_null()), ..RenderOptions::default() };
    let rendered = template.render_marked(&case["messages"], options)?;
    let expected = case["text"].as_str().context("text")?;
    report.expect(&name, rendered.text == expected, || first_difference(&rendered.text, expected));
    let masked_text: String =
        case["masked_text"].as_array().context("masked_text")?.iter().filter_map(Value::as_str).collect();
    let Some(tokenizer) = tokenizer else {
        report.expect(&format!("{name}/text"), ranges_fit(&rendered.text, &rendered.assistant, &masked_text), || {
            format!("{:?} do not give {masked_text:?}", rendered.assistant)
        });
        return Ok(());
    };
    let encoding = tokenizer.encode_with_offsets(&rendered.text)?;
    let expected = ids(&case["ids"])?;
    report.expect(&format!("{name}/ids"), encoding.ids == expected, || {
        format!("{:?}, expected {expected:?}", encoding.ids)
    });
    let found = assistant_mask(&encoding.chars, &rendered.assistant);
    let expected: Vec<bool> = ids(&case["assistant_mask"])?.iter().map(|&m| m == 1).collect();
    report.expect(&format!("{name}/mask"), found == expected, || format!("{found:?}, expected {expected:?}"));
    let masked: Vec<u32> = encoding.ids.iter().zip(&found).filter(|(_, m)| **m).map(|(id, _)| *id).collect();
    let found = tokenizer.decode(&masked, false)?;
    report.expect(&format!("{name}/text"), found == masked_text, || first_difference(&found, &masked_text));
    Ok(())
}

/// Whether the ranges' texts stand in the masked text in order, with no more between them than the tokens at their ends
/// may hold besides (masks are of whole tokens).
fn ranges_fit(text: &str, ranges: &[std::ops::Range<usize>], masked: &str) -> bool {
    const MOST_CHARACTERS_OF_A_BORDER_TOKEN: usize = 8;
    let characters: Vec<char> = text.chars().collect();
    let mut rest = masked;
    let mut between = 0;
    for range in ranges {
        let part: String = characters[range.clone()].iter().collect();
        let Some(at) = rest.find(&part) else { return false };
        between += rest[..at].chars().count();
        rest = &rest[at + part.len()..];
    }
    between + rest.chars().count() <= 2 * MOST_CHARACTERS_OF_A_BORDER_TOKEN * ranges.len()
}

fn check_tokens(tokens: &Value, tokenizer: &Tokenizer, report: &mut Report) -> Result<()> {
    let special = tokenizer.special();
    let number = |name: &str| tokens[name].as_u64();
    let mut same = |name: &str, found: String, expected: String| {
        report.expect(&format!("tokens/{name}"), found == expected, || format!("{found}, expected {expected}"));
    };
    same("vocab_len", tokenizer.vocab_size().to_string(), tokens["vocab_len"].to_string());
    same(
        "eos_token_id",
        format!("{:?}", special.eos.first().map(|&id| u64::from(id))),
        format!("{:?}", number("eos_token_id")),
    );
    same("pad_token_id", format!("{:?}", special.pad.map(u64::from)), format!("{:?}", number("pad_token_id")));
    for name in ["eos_token", "pad_token", "bos_token", "unk_token"] {
        let expected = tokens[name].as_str().map(str::to_string);
        same(name, format!("{:?}", special.strings.get(name)), format!("{:?}", expected.as_ref()));
    }
    let mut added: Vec<String> = Vec::new();
    for (text, id) in tokens["added_tokens"].as_object().into_iter().flatten() {
        added.push(format!("{id} {text} {}", tokens["added_tokens_special"][text]));
    }
    let mut found: Vec<String> =
        tokenizer.added_tokens().iter().map(|(id, (text, special))| format!("{id} {text} {special}")).collect();
    added.sort();
    found.sort();
    same("added_tokens", found.join(", "), added.join(", "));
    for (index, case) in tokens["strings"].as_array().into_iter().flatten().enumerate() {
        let name = format!("tokens/string {index}");
        let text = case["text"].as_str().context("text")?;
        let expected = ids(&case["ids"])?;
        let found = tokenizer.encode(text)?;
        report.expect(&name, found == expected, || format!("{text:?}: {found:?}, expected {expected:?}"));
        for (field, skip_special) in [("decoded", false), ("decoded_skip_special", true)] {
            let decoded = case[field].as_str().context(field.to_string())?;
            let found = tokenizer.decode(&expected, skip_special)?;
            report.expect(&format!("{name}/{field}"), found == decoded, || first_difference(&found, decoded));
            let mut stream = StreamDecoder::new(skip_special);
            let mut found = String::new();
            for &id in &expected {
                found.push_str(&stream.push(tokenizer, id)?);
            }
            found.push_str(&stream.finish());
            report.expect(&format!("{name}/{field} streamed"), found == decoded, || first_difference(&found, decoded));
        }
    }
    Ok(())
}

fn template_of(folder: &Path, name: &str, bos: Option<&str>) -> Result<ChatTemplate> {
    let mut special = SpecialTokens::default();
    special.strings.extend(bos.map(|token| ("bos_token".to_string(), token.to_string())));
    Ok(ChatTemplate::from_file(&folder.join(format!("templates/{name}.jinja")), &special)?)
}

fn read_tokenizer(path: &Path) -> Result<Tokenizer> {
    let mut file = std::io::BufReader::new(std::fs::File::open(path)?);
    let content = candle_core::quantized::gguf_file::Content::read(&mut file)?;
    Ok(Tokenizer::from_gguf(&content)?)
}

fn read(path: &Path) -> Result<Value> {
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    serde_json::from_slice(&bytes).with_context(|| path.display().to_string())
}

fn cases(file: &Value) -> impl Iterator<Item = &Value> {
    file["cases"].as_array().into_iter().flatten()
}

fn ids(value: &Value) -> Result<Vec<u32>> {
    Ok(serde_json::from_value(value.clone())?)
}

fn first_difference(found: &str, expected: &str) -> String {
    let at = found.chars().zip(expected.chars()).take_while(|(f, e)| f == e).count();
    let tail = |text: &str| text.chars().skip(at.saturating_sub(10)).take(60).collect::<String>();
    format!("differs at character {at}: {:?}, expected {:?}", tail(found), tail(expected))
}
