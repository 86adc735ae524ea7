//! What prepared rows depend on besides the raw files: settings, tokenizer, chat template. And the raw files.
//!
//! A run with another tokenizer, template or setting would have made other tokens, so it is refused with all that differs.
//! Raw files are not read any more: what changed in them is only said.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};

use crate::data::Error;
use crate::data::template::ChatTemplate;
use crate::data::tokenizer::Tokenizer;
use crate::fs;

/// Settings that say which rows there are and what becomes of them.
const SETTINGS: &[&str] = &[
    "dataset_name",
    "dataset_config",
    "dataset_revision",
    "dataset_train_split",
    "dataset_text_field",
    "dataset_prompt_column",
    "dataset_mixture",
    "datasets",
    "test_split_size",
    "dataset_columns",
    "eval_fraction",
    "max_train_samples",
    "chat_template_kwargs",
    "system_prompt",
    "max_length",
    "truncation_mode",
    "packing",
    "packing_strategy",
    "completion_only_loss",
    "assistant_only_loss",
    "max_prompt_length",
    "truncate_prompts",
];
/// Those that matter where both evaluate.
const OF_EVALUATION: &[&str] = &["dataset_test_split", "max_eval_samples", "eval_packing"];
/// What draws the rows that are held out.
const SEED: &str = "seed";
/// Keys that hold rows out of the training rows.
const HOLD_OUT: &[&str] = &["eval_fraction", "test_split_size"];
/// Keys whose values are places, which have several spellings.
const PLACES: &[&str] = &["dataset_name"];
const NONE: &str = "null";

/// The content of a text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Content {
    bytes: u64,
    blake3: String,
}

/// What prepared rows depend on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// `sft` or `grpo`.
    task: String,
    /// Settings by key, as YAML.
    settings: BTreeMap<String, String>,
    /// Whether there are rows to evaluate on.
    evaluates: bool,
    /// Checksum of the tokenizer with its special tokens.
    tokenizer: String,
    template: Option<Content>,
}

impl Fingerprint {
    /// Of `task` with these settings (every key with its value as YAML); `evaluates` says whether evaluation rows are wanted.
    ///
    /// # Errors
    /// If the tokenizer cannot be serialised.
    pub fn of(
        task: &str,
        texts: &BTreeMap<&'static str, String>,
        evaluates: bool,
        tokenizer: &Tokenizer,
        template: Option<&ChatTemplate>,
    ) -> Result<Self, Error> {
        let names = SETTINGS.iter().chain(OF_EVALUATION).chain([&SEED]);
        let settings = names.filter_map(|name| Some(((*name).to_string(), texts.get(name)?.clone()))).collect();
        let template = template.map(|template| {
            let text = template.source().as_bytes();
            Content { bytes: text.len() as u64, blake3: blake3::hash(text).to_hex().to_string() }
        });
        Ok(Self { task: task.into(), settings, evaluates, tokenizer: tokenizer.fingerprint()?, template })
    }

    /// How a run with `now` differs: what, then, now; one line each.
    pub fn differences(&self, now: &Self) -> Vec<String> {
        if self.task != now.task {
            return vec![format!("they are for `trainer {}`, this is `trainer {}`", self.task, now.task)];
        }
        let mut lines = Vec::new();
        let holds_out = HOLD_OUT.iter().any(|name| self.value(name) != NONE);
        let has_both = self.evaluates && now.evaluates;
        let names = SETTINGS.iter().copied().chain(OF_EVALUATION.iter().copied().filter(|_| has_both));
        for name in names.chain(holds_out.then_some(SEED)) {
            let (then, now) = (self.value(name), now.value(name));
            if then != now && !(PLACES.contains(&name) && is_same_place(then, now)) {
                lines.push(format!("`{name}` was {}, is {}", one_line(then), one_line(now)));
            }
        }
        match (self.evaluates, now.evaluates) {
            (false, true) => lines.push(
                "there was no evaluation, and so there are no evaluation rows; now `eval_strategy` or `eval_on_start` asks \
                 for it"
                    .into(),
            ),
            (true, false) if self.value("eval_fraction") != NONE => {
                lines.push("there was an evaluation, which `eval_fraction` holds rows out for; now there is none".into());
            }
            _ => {}
        }
        if self.tokenizer != now.tokenizer {
            let (then, now) = (short(&self.tokenizer), short(&now.tokenizer));
            lines.push(format!("the tokenizer (with its special tokens) was {then}, is {now}"));
        }
        if self.template != now.template {
            let said = |content: &Option<Content>| match content {
                Some(Content { bytes, blake3 }) => format!("{} of {bytes} bytes", short(blake3)),
                None => "none".into(),
            };
            lines.push(format!("the chat template was {}, is {}", said(&self.template), said(&now.template)));
        }
        lines
    }

    fn value(&self, name: &str) -> &str {
        self.settings.get(name).map_or(NONE, String::as_str)
    }
}

/// The beginning of a checksum, enough to tell two apart.
fn short(blake3: &str) -> String {
    format!("blake3 {}", blake3.get(..12).unwrap_or(blake3))
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn is_same_place(then: &str, now: &str) -> bool {
    let find = |text: &str| {
        let path = PathBuf::from(serde_json::from_str(text).unwrap_or_else(|_| text.to_string()));
        path.canonicalize().ok()
    };
    matches!((find(then), find(now)), (Some(then), Some(now)) if then == now)
}

/// A raw file as it was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceFile {
    path: PathBuf,
    bytes: u64,
    /// Of all of a small file, of samples of a large one.
    blake3: String,
    /// Nanoseconds since 1970.
    modified: u64,
}

impl SourceFile {
    /// Looks at a file.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn of(path: &Path) -> Result<Self, Error> {
        let (blake3, bytes) = fs::sampled_checksum(path)?;
        let path = path.canonicalize().map_err(fs::io_error("find", path))?;
        let modified = modified(&path);
        Ok(Self { path, bytes, blake3, modified })
    }

    /// What is different about the file now; `None` if nothing is, or if it is not there any more.
    pub fn change(&self) -> Option<String> {
        let place = self.path.display();
        let bytes = self.path.metadata().ok()?.len();
        if bytes != self.bytes {
            return Some(format!("`{place}` had {} bytes, has {bytes}", self.bytes));
        }
        // A file of the same length and time is taken for the same, so that nothing is read.
        let is_same = modified(&self.path) == self.modified
            || fs::sampled_checksum(&self.path).is_ok_and(|(blake3, _)| blake3 == self.blake3);
        (!is_same).then(|| format!("`{place}` has other content"))
    }
}

fn modified(path: &Path) -> u64 {
    let time = path.metadata().and_then(|metadata| metadata.modified()).ok();
    let since = time.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    since.map_or(0, |since| since.as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fingerprint(pairs: &[(&str, &str)], evaluates: bool) -> Fingerprint {
        let pairs = pairs.iter().map(|(name, text)| ((*name).to_string(), (*text).to_string()));
        let template = Some(Content { bytes: 3, blake3: "c".repeat(64) });
        Fingerprint { task: "sft".into(), settings: pairs.collect(), evaluates, tokenizer: "t".repeat(64), template }
    }

    #[test]
    fn every_key_about_data_is_one_that_rows_depend_on() {
        // The folder itself, batches, the loss.
        let others = ["preprocessed", "dataloader_drop_last", "loss_type", "label_smoothing_factor"];
        let listed: Vec<&str> = SETTINGS.iter().chain(OF_EVALUATION).copied().collect();
        let of_data =
            crate::config::keys().iter().filter(|key| ["Data", "Supervised fine-tuning"].contains(&key.group));
        let unknown: Vec<&str> = of_data.map(|key| key.name).filter(|name| !listed.contains(name)).collect();
        assert_eq!(unknown, others);
        let is_key = |name: &&&str| crate::config::keys().iter().any(|key| key.name == **name);
        let names = listed.iter().chain(HOLD_OUT).chain(PLACES).chain([&SEED]);
        assert_eq!(names.copied().find(|name| !is_key(&name)), None);
    }

    #[test]
    fn every_difference_is_named_with_then_and_now() {
        let then = fingerprint(&[("max_length", "64"), ("packing", "true"), ("seed", "1")], false);
        assert!(then.differences(&then).is_empty());
        let mut now = fingerprint(&[("max_length", "32"), ("system_prompt", "a\n b"), ("packing", "true")], true);
        now.tokenizer = "u".repeat(64);
        now.template = None;
        assert_eq!(
            then.differences(&now),
            [
                "`system_prompt` was null, is a b",
                "`max_length` was 64, is 32",
                "there was no evaluation, and so there are no evaluation rows; now `eval_strategy` or `eval_on_start` asks for it",
                "the tokenizer (with its special tokens) was blake3 tttttttttttt, is blake3 uuuuuuuuuuuu",
                "the chat template was blake3 cccccccccccc of 3 bytes, is none",
            ]
        );
        now.task = "grpo".into();
        assert_eq!(then.differences(&now), ["they are for `trainer sft`, this is `trainer grpo`"]);
    }

    #[test]
    fn what_only_evaluation_or_a_draw_depends_on_counts_where_there_is_one() {
        let of = |fraction: &'static str, seed: &'static str, test: &'static str, evaluates: bool| {
            fingerprint(&[("eval_fraction", fraction), ("seed", seed), ("dataset_test_split", test)], evaluates)
        };
        let differ = |then: &Fingerprint, now: &Fingerprint| then.differences(now).len();
        assert_eq!(differ(&of("null", "1", "a", false), &of("null", "2", "b", false)), 0);
        assert_eq!(differ(&of("null", "1", "a", true), &of("null", "2", "b", false)), 0);
        assert_eq!(differ(&of("null", "1", "a", true), &of("null", "2", "b", true)), 1);
        assert_eq!(differ(&of("0.1", "1", "a", true), &of("0.1", "2", "b", true)), 2);
        assert_eq!(differ(&of("0.1", "1", "a", true), &of("0.1", "1", "a", false)), 1);
    }

    #[test]
    fn a_place_has_several_spellings_and_a_changed_file_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a b.jsonl");
        std::fs::write(&path, "{}").unwrap();
        let text = |place: &str| format!("\"{}\"", folder.path().join(place).display());
        assert!(is_same_place(&text("a b.jsonl"), &text("./a b.jsonl")));
        assert!(!is_same_place(&text("a b.jsonl"), &text("c.jsonl")) && !is_same_place("null", &text("a b.jsonl")));

        let source = SourceFile::of(&path).unwrap();
        assert_eq!(source.change(), None);
        let later = std::time::SystemTime::now() + std::time::Duration::from_secs(9);
        std::fs::File::open(&path).unwrap().set_modified(later).unwrap();
        assert_eq!(source.change(), None, "the same content at another time");
        std::fs::write(&path, "[]").unwrap();
        assert!(source.change().unwrap().ends_with("has other content"));
        std::fs::write(&path, "{} ").unwrap();
        assert!(source.change().unwrap().ends_with("had 2 bytes, has 3"));
        std::fs::remove_file(&path).unwrap();
        assert_eq!(source.change(), None, "it is not read any more");
    }
}
