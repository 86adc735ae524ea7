//! Packing, collation and SFT preparation against TRL.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};
use trainer::config::settings::PackingStrategy;
use trainer::data::{
    Batch, Bin, Dataset, SftExample, SftOptions, SpecialTokens, Tokenizer, collate, pack, prepare_sft, whole,
};

use crate::report::Report;

const IGNORE: i64 = -100;

pub(crate) fn run(folder: &Path, report: &mut Report) -> Result<()> {
    let path = folder.join("packing.json");
    let file: Value = serde_json::from_slice(&std::fs::read(&path).with_context(|| path.display().to_string())?)?;
    let list = |name: &str| file[name].as_array().cloned().unwrap_or_default();
    let mut packed = BTreeMap::new();
    for case in list("packs") {
        let name = format!("{}/{}/{}", case["set"], case["strategy"], case["seq_length"]);
        let examples = examples_of(&case)?;
        let bins = pack(&lengths(&examples), size(&case["seq_length"])?, strategy(&case["strategy"])?)?;
        compare_rows(report, &format!("packs/{name}"), &examples, &bins, &case["packed"])?;
        packed.insert(name, (examples, bins));
    }
    for case in list("collated") {
        let key = format!("{}/{}/{}", case["set"], case["strategy"], case["seq_length"]);
        let (examples, bins) = packed.get(&key).with_context(|| format!("no pack {key}"))?;
        let count = size(&case["examples"])?.min(bins.len());
        let name = format!("collated/{key}/padding_free {}", case["padding_free"]);
        compare_batch(report, &name, &collate(examples, &bins[..count]), &case["out"])?;
    }
    for case in list("sft") {
        check_sft(report, &case)?;
    }
    Ok(())
}

/// TRL's preparation of prompt-completion rows with a word tokenizer (<pad> = 0, <eos> = 1, wN = N).
fn check_sft(report: &mut Report, case: &Value) -> Result<()> {
    let config = &case["config"];
    let name = format!("sft/{config}");
    let rows: Vec<Map<String, Value>> = serde_json::from_value(case["prompt_completion"].clone())?;
    let is_packed = config["packing"].as_bool().unwrap_or(false);
    let max_length = config["max_length"].as_u64().map(|length| length as usize);
    let options = SftOptions {
        text_field: "text".into(),
        completion_only_loss: config["completion_only_loss"].as_bool(),
        assistant_only_loss: config["assistant_only_loss"].as_bool().unwrap_or(false),
        max_length: max_length.filter(|_| !is_packed),
        ..SftOptions::default()
    };
    let tokenizer = word_tokenizer(case)?;
    let total = rows.len();
    let data = prepare_sft(&Dataset::from_rows("golden", rows), &tokenizer, None, &options, &|_| {})?;
    let bins = match (is_packed, max_length) {
        (true, Some(length)) => pack(&lengths(&data.examples), length, strategy(&config["packing_strategy"])?)?,
        _ => whole(&lengths(&data.examples)),
    };
    let prepared = case["prepared"].as_array().context("prepared")?;
    let column = |column: &str| -> Vec<Value> { prepared.iter().map(|row| row[column].clone()).collect() };
    let mut columns = json!({"input_ids": column("input_ids"), "labels": column("labels")});
    if prepared.iter().all(|row| row.get("seq_lengths").is_some()) {
        columns["seq_lengths"] = json!(column("seq_lengths"));
    }
    compare_rows(report, &format!("{name}/prepared"), &data.examples, &bins, &columns)?;
    if !is_packed {
        let dropped = total - prepared.len();
        report.expect(&format!("{name}/dropped"), data.dropped == dropped, || {
            format!("{} rows dropped, expected {dropped}", data.dropped)
        });
    }
    let first = &bins[..bins.len().min(4)];
    compare_batch(report, &format!("{name}/collated"), &collate(&data.examples, first), &case["collated_first4"])
}

/// Packed rows column by column.
fn compare_rows(
    report: &mut Report,
    name: &str,
    examples: &[SftExample],
    bins: &[Bin],
    expected: &Value,
) -> Result<()> {
    let mut ids: Vec<Vec<i64>> = Vec::new();
    let mut labels: Vec<Vec<i64>> = Vec::new();
    let mut seq_lengths: Vec<Vec<usize>> = Vec::new();
    for bin in bins {
        let tokens =
            || bin.pieces.iter().flat_map(|piece| piece.range.clone().map(|at| (&examples[piece.example], at)));
        ids.push(tokens().map(|(example, at)| i64::from(example.input_ids[at])).collect());
        let label = |(example, at): (&SftExample, usize)| {
            if example.labels_mask[at] { i64::from(example.input_ids[at]) } else { IGNORE }
        };
        labels.push(tokens().map(label).collect());
        seq_lengths.push(bin.pieces.iter().map(|piece| piece.range.len()).collect());
    }
    let mut columns = vec![("input_ids", json!(ids)), ("labels", json!(labels))];
    if expected.get("seq_lengths").is_some() {
        columns.push(("seq_lengths", json!(seq_lengths)));
    }
    for (column, found) in columns {
        let expected = &expected[column];
        report.expect(&format!("{name}/{column}"), found == *expected, || format!("{found}, expected {expected}"));
    }
    Ok(())
}

/// Our ragged batch against TRL's: flat (`cu_seq_lens_q` is there), or padded rows, which are compared without padding.
fn compare_batch(report: &mut Report, name: &str, batch: &Batch, expected: &Value) -> Result<()> {
    let matrix = |field: &str| -> Result<Vec<Vec<i64>>> { Ok(serde_json::from_value(expected[field].clone())?) };
    let is_flat = expected.get("cu_seq_lens_q").is_some();
    let mask = if is_flat { None } else { Some(matrix("attention_mask")?) };
    let flat = |field: &str| -> Result<Vec<i64>> {
        let rows = matrix(field)?;
        Ok(match &mask {
            None => rows.concat(),
            Some(mask) => {
                rows.concat().into_iter().zip(mask.concat()).filter(|(_, m)| *m == 1).map(|(value, _)| value).collect()
            }
        })
    };
    let mut same = |field: &str, found: Value, expected: Value| {
        report.expect(&format!("{name}/{field}"), found == expected, || format!("{found}, expected {expected}"));
    };
    same("input_ids", json!(batch.tokens), json!(flat("input_ids")?));
    if expected.get("position_ids").is_some() {
        same("position_ids", json!(batch.positions), json!(flat("position_ids")?));
    }
    let mut labels = flat("labels")?;
    if is_flat {
        same("cu_seq_lens_q", json!(batch.cu_seqlens), expected["cu_seq_lens_q"].clone());
        same("max_length_q", json!(batch.max_seqlen()), expected["max_length_q"].clone());
    } else {
        // Padded rows keep the first label of a sequence, which nothing predicts.
        for (label, _) in labels.iter_mut().zip(&batch.positions).filter(|(_, position)| **position == 0) {
            *label = IGNORE;
        }
    }
    same("labels", json!(batch.labels), json!(labels));
    Ok(())
}

fn word_tokenizer(case: &Value) -> Result<Tokenizer> {
    let text = case["prompt_completion"].to_string();
    let numbers =
        text.split(|c: char| !c.is_alphanumeric()).filter_map(|word| word.strip_prefix('w')?.parse::<u32>().ok());
    let largest = numbers.max().unwrap_or(2).max(2);
    let mut vocabulary = json!({"<pad>": 0, "<eos>": 1});
    for id in 2..=largest {
        vocabulary[format!("w{id}")] = json!(id);
    }
    let added = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let text = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null, "decoder": null,
        "added_tokens": [added(0, "<pad>"), added(1, "<eos>")],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<pad>"},
    });
    let inner = tokenizers::Tokenizer::from_bytes(text.to_string()).map_err(|e| anyhow::anyhow!("{e}"))?;
    let special = SpecialTokens { eos: vec![1], pad: Some(0), ..SpecialTokens::default() };
    Ok(Tokenizer::new(inner, special, Map::new(), BTreeMap::new())?)
}

fn examples_of(case: &Value) -> Result<Vec<SftExample>> {
    let ids: Vec<Vec<u32>> = serde_json::from_value(case["input_ids"].clone())?;
    let labels: Vec<Vec<i64>> = serde_json::from_value(case["labels"].clone())?;
    let example = |(input_ids, labels): (Vec<u32>, Vec<i64>)| SftExample {
        input_ids,
        labels_mask: labels.iter().map(|&label| label != IGNORE).collect(),
    };
    Ok(ids.into_iter().zip(labels).map(example).collect())
}

fn lengths(examples: &[SftExample]) -> Vec<usize> {
    examples.iter().map(|example| example.input_ids.len()).collect()
}

fn size(value: &Value) -> Result<usize> {
    Ok(value.as_u64().context("expected a count")? as usize)
}

fn strategy(value: &Value) -> Result<PackingStrategy> {
    let name = value.as_str().context("strategy")?;
    name.parse().map_err(|()| anyhow::anyhow!("unknown packing strategy {name}"))
}
