//! The prompts that GRPO draws from: made now, or read from a prepared file when they are first used.
//!
//! Body of a record: the row's number `u32`, the number of tokens `u32`, the tokens, and two texts, each behind its length
//! `u32`: what the model sees, and the whole row as JSON, whose columns travel to the reward functions.

use std::path::Path;
use std::sync::OnceLock;

use super::bytes::{Body, put_numbers, put_text};
use super::records::{FileEntry, Kind, RecordFile};
use super::summary::Summary;
use crate::data::Error;
use crate::data::prompts::{PromptData, PromptExample};
use crate::data::rows::Row;
use crate::data::statistics::TokenStatistics;

/// Prompts of one split.
#[derive(Debug)]
pub struct Prompts {
    kept: Kept,
    summary: Summary,
}

#[derive(Debug)]
enum Kept {
    Memory(Vec<PromptExample>),
    File { file: RecordFile, read: Vec<OnceLock<Box<PromptExample>>> },
}

impl Prompts {
    /// Prompts that were just made.
    pub fn new(data: PromptData) -> Self {
        let lengths = data.prompts.iter().map(|prompt| prompt.prompt_ids.len());
        let statistics = TokenStatistics::of(lengths);
        let summary = Summary {
            rows: data.num_rows,
            duplicates: data.duplicates.len(),
            truncated: data.truncated,
            is_conversational: data.is_conversational,
            sequences: data.prompts.len(),
            tokens: statistics.total,
            statistics,
            notes: data.findings.notes(),
            ..Summary::default()
        };
        Self { kept: Kept::Memory(data.prompts), summary }
    }

    /// Opens a prepared file.
    ///
    /// # Errors
    /// If it is damaged or another one.
    pub(super) fn open(folder: &Path, entry: &FileEntry, summary: Summary) -> Result<Self, Error> {
        let file = RecordFile::open_entry(folder, entry, Kind::Prompts)?;
        let read = std::iter::repeat_with(OnceLock::new).take(file.len()).collect();
        Ok(Self { kept: Kept::File { file, read }, summary })
    }

    /// What became of the rows.
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    /// Number of prompts.
    pub fn len(&self) -> usize {
        match &self.kept {
            Kept::Memory(prompts) => prompts.len(),
            Kept::File { file, .. } => file.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens of the longest.
    pub fn longest(&self) -> usize {
        self.summary.statistics.max
    }

    /// A prompt by its place.
    ///
    /// # Errors
    /// If its record cannot be read or is damaged.
    ///
    /// # Panics
    /// If there is none at this place.
    pub fn get(&self, index: usize) -> Result<&PromptExample, Error> {
        let (file, cell) = match &self.kept {
            Kept::Memory(prompts) => return Ok(&prompts[index]),
            Kept::File { file, read } => (file, &read[index]),
        };
        if let Some(prompt) = cell.get() {
            return Ok(prompt);
        }
        let prompt = decode(&file.read(index)?).ok_or_else(|| file.damaged(index))?;
        if prompt.prompt_ids.len() > self.longest() {
            return Err(file.damaged(index));
        }
        Ok(cell.get_or_init(|| Box::new(prompt)))
    }

    /// Puts the record of a prompt into `body`.
    ///
    /// # Errors
    /// If it has to be read, and cannot be.
    pub(super) fn put(&self, index: usize, body: &mut Vec<u8>) -> Result<(), Error> {
        encode(self.get(index)?, body);
        Ok(())
    }
}

fn encode(prompt: &PromptExample, body: &mut Vec<u8>) {
    put_numbers(body, &[prompt.index as u32, prompt.prompt_ids.len() as u32]);
    put_numbers(body, &prompt.prompt_ids);
    put_text(body, &prompt.prompt_text);
    // A map of JSON values always has a JSON form.
    put_text(body, &serde_json::to_string(&prompt.row).unwrap_or_default());
}

/// The prompt of a record; `None` if it is no such record.
fn decode(body: &[u8]) -> Option<PromptExample> {
    let mut body = Body(body);
    let (index, count) = (body.number()? as usize, body.number()? as usize);
    let prompt_ids = body.numbers(count)?;
    let prompt_text = body.text()?.to_string();
    let row: Row = serde_json::from_str(body.text()?).ok()?;
    let prompt = row.get("prompt").cloned().unwrap_or_default();
    (body.0.is_empty() && count > 0).then_some(PromptExample { index, prompt, prompt_text, prompt_ids, row })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;

    fn value() -> impl Strategy<Value = Value> {
        let finite = any::<f64>().prop_filter("finite", |x| x.is_finite());
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            finite.prop_map(Value::from),
            "\\PC{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 12, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[a-z\"]{1,3}", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn prompts_come_back_with_every_column(
            prompt_ids in prop::collection::vec(any::<u32>(), 1..20),
            prompt_text in "\\PC{0,20}",
            columns in prop::collection::vec(("[a-z]{1,6}", value()), 0..5),
            prompt in value(),
            index in 0usize..1000,
        ) {
            let mut row: Row = columns.into_iter().collect();
            row.insert("prompt".into(), prompt.clone());
            let whole = PromptExample { index, prompt, prompt_text, prompt_ids, row };
            let mut body = Vec::new();
            encode(&whole, &mut body);
            prop_assert!(decode(&body[..body.len() - 1]).is_none());
            prop_assert_eq!(decode(&body), Some(whole));
        }

        #[test]
        fn no_body_makes_a_panic_or_a_large_allocation(body in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = decode(&body);
        }
    }
}
