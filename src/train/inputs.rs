//! What a run reads, as far as a continuation depends on it: rows, weights, tokenizer, chat template, adapter, rewards.
//!
//! Settings only name these things. A checkpoint also keeps what was in them, so that a resumed run is refused where
//! something else now has the same name.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::bail;
use serde::{Deserialize, Serialize};

use super::material::Material;
use super::session::Session;
use crate::checkpoint::Checkpoint;
use crate::config::settings::ModelSettings;
use crate::data::{Rows, RowsFingerprint};
use crate::fs;
use crate::model::source;

/// Files of an adapter that a run starts from.
const ADAPTER: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];
/// The key that allows a continuation with other content.
pub(super) const OVERRIDE: &str = "resume_with_changed_inputs";
/// A file that a reward names counts as its program if it is a text of at most this size.
const MOST_PROGRAM_BYTES: u64 = 16 << 20;

/// The content of something that settings name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Content {
    bytes: u64,
    blake3: String,
}

/// What a run read.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Inputs {
    train: RowsFingerprint,
    eval: Option<RowsFingerprint>,
    /// By key of the configuration and, behind a blank, the file's name.
    contents: BTreeMap<String, Content>,
}

/// How what is read now differs from what a checkpoint was made with.
#[derive(Debug, Default, PartialEq, Eq)]
struct Differences {
    rows: Option<String>,
    /// Of other things that the state depends on.
    others: Vec<String>,
    /// Of what only measures.
    evaluation: Option<String>,
}

impl Inputs {
    /// Looks at everything that is read. `rewards` is the value of `reward_funcs`.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub(super) fn of(
        model: &ModelSettings,
        session: &Session,
        material: &Material,
        rewards: Option<&str>,
    ) -> anyhow::Result<Self> {
        let mut contents = BTreeMap::new();
        let mut add_file = |key: &str, path: &Path| -> anyhow::Result<()> {
            let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
            let (blake3, bytes) = fs::sampled_checksum(path)?;
            contents.insert(format!("{key} {name}"), Content { bytes, blake3 });
            Ok(())
        };
        for file in source::files_of(&session.folder, model.init_random)? {
            add_file("model_name_or_path", &file)?;
        }
        if let Some(folder) = &model.adapter_name_or_path {
            ADAPTER.iter().try_for_each(|name| add_file("adapter_name_or_path", &folder.join(name)))?;
        }
        for program in programs(rewards.unwrap_or_default()) {
            add_file("reward_funcs", Path::new(&program))?;
        }
        let tokenizer = session.tokenizer.fingerprint()?;
        contents.insert("tokenizer".into(), Content { bytes: 0, blake3: tokenizer });
        let template = session.template.as_ref().map_or("", |template| template.source());
        let (bytes, blake3) = (template.len() as u64, blake3::hash(template.as_bytes()).to_hex().to_string());
        contents.insert("chat template".into(), Content { bytes, blake3 });
        let (train, eval) = material.rows();
        Ok(Self { train: train.fingerprint(), eval: eval.map(Rows::fingerprint), contents })
    }

    fn differences(&self, then: &Self, (train, eval): (Rows<'_>, Option<Rows<'_>>)) -> Differences {
        let mut others = Vec::new();
        for (name, before) in &then.contents {
            let label = match name.split_once(' ') {
                Some((key, file)) if key != "chat" => format!("`{file}` (`{key}`)"),
                _ => format!("the {name}"),
            };
            match self.contents.get(name) {
                Some(now) if now == before => {}
                Some(now) if now.bytes != before.bytes => {
                    others.push(format!("{label} had {} bytes, has {}", before.bytes, now.bytes));
                }
                Some(_) => others.push(format!("{label} has other content")),
                // Which rewards there are is a setting, which was compared.
                None if name.starts_with("reward_funcs ") => {}
                None => others.push(format!("{label} is not read any more")),
            }
        }
        for name in self.contents.keys().filter(|name| !then.contents.contains_key(*name)) {
            if let Some((key, file)) = name.split_once(' ').filter(|(key, _)| *key != "reward_funcs") {
                others.push(format!("`{file}` (`{key}`) was not read then"));
            }
        }
        let evaluation = then.eval.as_ref().zip(eval).and_then(|(then, eval)| then.difference_from(eval));
        Differences { rows: then.train.difference_from(train), others, evaluation }
    }

    /// Compares with what a checkpoint was made with; whether the rows differ, where that is allowed.
    ///
    /// # Errors
    /// If something differs and `may_differ` is not set; all of it is named.
    pub(super) fn check(
        &self,
        checkpoint: &Checkpoint,
        then: Option<&Self>,
        material: &Material,
        may_differ: bool,
    ) -> anyhow::Result<bool> {
        let place = checkpoint.path().display();
        let Some(then) = then else {
            tracing::warn!(
                "`{place}` does not say what was in the data and the model that it was made with; that they are the same is \
                 not checked"
            );
            return Ok(false);
        };
        let Differences { rows, others, evaluation } = self.differences(then, material.rows());
        if let Some(evaluation) = evaluation {
            tracing::warn!("`{place}` was made with other evaluation rows: {evaluation}; its results do not compare");
        }
        let is_changed = rows.is_some();
        let changed: Vec<String> =
            rows.map(|rows| format!("the training rows: {rows}")).into_iter().chain(others).collect();
        if changed.is_empty() {
            return Ok(false);
        }
        if !may_differ {
            bail!(
                "`{place}` was made with other content than there is now under the same names:\n  {}\nrestore it, or start a \
                 new run; `{OVERRIDE}: true` goes on all the same",
                changed.join("\n  ")
            );
        }
        tracing::warn!("`{place}` goes on with changed content (`{OVERRIDE}`): {}", changed.join("; "));
        Ok(is_changed)
    }
}

/// The files that the value of `reward_funcs` names: in commands, before the colon of `file.py:function`, and as the module
/// of `package.module.function`.
fn programs(rewards: &str) -> Vec<String> {
    let is_border = |c: char| c.is_whitespace() || "[]{},\"'".contains(c);
    let words = rewards.split(is_border).filter(|word| !word.is_empty());
    let module = |word: &str| word.rsplit_once('.').map(|(module, _)| format!("{}.py", module.replace('.', "/")));
    let file = |word: &str| word.rsplit_once(':').map(|(file, _)| file.to_string());
    let candidates = words.flat_map(|word| [Some(word.to_string()), file(word), module(word)]).flatten();
    let mut found: Vec<String> = candidates.filter(|word| is_text_file(Path::new(word))).collect();
    found.sort();
    found.dedup();
    found
}

/// Interpreters and other binaries are not what a user wrote.
fn is_text_file(path: &Path) -> bool {
    let is_small = path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.len() <= MOST_PROGRAM_BYTES);
    is_small && std::fs::read(path).is_ok_and(|bytes| !bytes.contains(&0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Dataset;

    #[test]
    fn programs_are_the_text_files_that_rewards_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        std::fs::write(path("score.py"), "print(1)").unwrap();
        std::fs::write(path("other.py"), "print(2)").unwrap();
        std::fs::write(path("binary"), b"\x7fELF\0\0").unwrap();
        let text = format!(
            "[accuracy, {{kind: command, command: [python3, \"{}\", {}]}}, {}:brevity, {}]",
            path("score.py"),
            path("binary"),
            path("other.py"),
            path("missing.py")
        );
        assert_eq!(programs(&text), [path("other.py"), path("score.py")]);
    }

    #[test]
    fn every_kind_of_change_is_named() {
        let rows = |texts: &[&str]| {
            let row = |text: &&str| serde_json::json!({ "text": text }).as_object().unwrap().clone();
            Dataset::from_rows("memory", texts.iter().map(row).collect())
        };
        let inputs = |train: &Dataset, contents: &[(&str, u64, &str)]| Inputs {
            train: RowsFingerprint::of(train),
            eval: Some(RowsFingerprint::of(&rows(&["e"]))),
            contents: contents
                .iter()
                .map(|(name, bytes, blake3)| (name.to_string(), Content { bytes: *bytes, blake3: blake3.to_string() }))
                .collect(),
        };
        let train = rows(&["a", "b"]);
        let then = inputs(
            &train,
            &[
                ("model_name_or_path config.json", 9, "c"),
                ("model_name_or_path model.safetensors", 4, "w"),
                ("reward_funcs gone.py", 1, "g"),
                ("reward_funcs score.py", 1, "s"),
                ("tokenizer", 0, "t"),
                ("chat template", 3, "j"),
            ],
        );
        let same = then.differences(&then, (Rows::Read(&train), Some(Rows::Read(&rows(&["e"])))));
        assert_eq!(same, Differences::default());
        let other = rows(&["b", "a"]);
        let now = inputs(
            &other,
            &[
                ("model_name_or_path config.json", 9, "c"),
                ("model_name_or_path model-00001-of-00002.safetensors", 4, "w"),
                ("reward_funcs score.py", 1, "S"),
                ("tokenizer", 0, "T"),
                ("chat template", 4, "J"),
            ],
        );
        let Differences { rows: train, others, evaluation } =
            now.differences(&then, (Rows::Read(&other), Some(Rows::Read(&rows(&["f"])))));
        assert!(train.is_some_and(|text| text.contains("another order")));
        assert!(evaluation.is_some_and(|text| text.contains("edited")));
        assert_eq!(
            others,
            [
                "the chat template had 3 bytes, has 4",
                "`model.safetensors` (`model_name_or_path`) is not read any more",
                "`score.py` (`reward_funcs`) has other content",
                "the tokenizer has other content",
                "`model-00001-of-00002.safetensors` (`model_name_or_path`) was not read then",
            ]
        );
    }
}
