//! The prompts of `trainer generate`: where they come from, what stands beside them, and their tokens.
//!
//! Each prompt is a row whose column `prompt` is a text or a list of messages, as TRL has them. A row of a JSONL file keeps its
//! text besides, so that its columns come out as they went in.

use std::path::Path;

use serde_json::{Value, json};

use super::PromptForm;
use super::output::COLUMNS;
use crate::cli::UsageError;
use crate::data::{self, Dataset, Error, PromptOptions, Row};
use crate::fs::io_error;
use crate::train::session::Text;

/// A mark that some editors put in front of a text.
const MARK: &[u8] = b"\xef\xbb\xbf";

/// What is to be completed.
#[derive(Debug)]
pub(super) struct Prompts {
    rows: Dataset,
    /// Whether they were read from a file.
    are_read: bool,
    /// Of a JSONL file, the object of each row as it was written.
    objects: Option<Vec<String>>,
}

impl Prompts {
    /// One prompt, a text or a list of messages, that a flag gives.
    pub(super) fn given(flag: &str, prompt: Value) -> Self {
        let rows = Dataset::from_rows(flag, vec![Row::from_iter([("prompt".to_string(), prompt)])]);
        Self { rows, are_read: false, objects: None }
    }

    /// The prompts of a file: a row per line of a `.jsonl` file, of any other a text per line. Empty lines are left out.
    ///
    /// # Errors
    /// If the file cannot be read or holds no prompt, or a line is none.
    pub(super) fn read(path: &Path) -> anyhow::Result<Self> {
        let bytes = std::fs::read(path).map_err(io_error("read", path))?;
        let is_jsonl = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("jsonl"));
        let (mut rows, mut objects) = (Vec::new(), Vec::new());
        for (line, bytes) in (1..).zip(bytes.strip_prefix(MARK).unwrap_or(&bytes).split(|&byte| byte == b'\n')) {
            let at_line = |problem: String| Error::Line { path: path.into(), line: line as usize, problem };
            let text = std::str::from_utf8(bytes).map_err(|error| at_line(format!("not UTF-8: {error}")))?;
            let text = text.strip_suffix('\r').unwrap_or(text);
            if text.trim().is_empty() {
                continue;
            }
            let row = if is_jsonl {
                objects.push(text.trim().to_string());
                row(text).map_err(at_line)?
            } else {
                Row::from_iter([("prompt".to_string(), text.into())])
            };
            rows.push((line, row));
        }
        if rows.is_empty() {
            let form = if is_jsonl { "an object with `prompt` or `messages`" } else { "one" };
            anyhow::bail!(UsageError(format!("`{}` holds no prompt; write {form} per line", path.display())));
        }
        let rows = Dataset::from_lines(path, rows);
        Ok(Self { rows, are_read: true, objects: is_jsonl.then_some(objects) })
    }

    /// Whether they have columns.
    pub(super) fn are_objects(&self) -> bool {
        self.objects.is_some()
    }

    /// A prompt for people: its text.
    pub(super) fn text(&self, index: usize) -> &str {
        self.rows.rows()[index].get("prompt").and_then(Value::as_str).unwrap_or_default()
    }

    /// The JSON object of a prompt, as it was written.
    pub(super) fn object(&self, index: usize) -> String {
        match &self.objects {
            Some(objects) => objects[index].clone(),
            None => json!({"prompt": self.text(index)}).to_string(),
        }
    }

    /// Where a prompt stands, for messages.
    pub(super) fn place(&self, index: usize) -> String {
        if self.are_read { self.rows.place(index) } else { format!("`{}`", self.rows.files()[0].display()) }
    }

    /// The tokens of each prompt, in the chat template where that is asked for and possible; `system` is in front of conversations
    /// that have no system message, `model` is for messages.
    ///
    /// # Errors
    /// If there is no chat template and one is needed, or a prompt cannot be rendered or has no tokens.
    pub(super) fn tokens(
        &self,
        (form, system): (PromptForm, Option<&str>),
        model: &str,
        text: Text<'_>,
    ) -> anyhow::Result<Vec<Vec<u32>>> {
        let template = match (form, text.template) {
            (PromptForm::Raw, _) | (PromptForm::ChatIfPossible, None) => return self.raw_tokens(form, model, text),
            (PromptForm::Chat, None) => {
                anyhow::bail!(UsageError(format!(
                    "`{model}` has no chat template; leave out --chat, --system and --interactive, or name a model that has one"
                )))
            }
            (_, template) => template,
        };
        let options = PromptOptions { system_prompt: system.map(Into::into), ..PromptOptions::default() };
        let mut rows = self.rows.clone();
        rows.prompt_from("prompt")?;
        let made = data::prepare_prompts(&rows, text.tokenizer, template, &options, &|_| ())?;
        for note in made.findings.notes().into_iter().filter(|note| note.is_warning) {
            tracing::warn!("prompts: {}", note.text);
        }
        Ok(made.prompts.into_iter().map(|prompt| prompt.prompt_ids).collect())
    }

    /// The tokens of prompts that are texts.
    fn raw_tokens(&self, form: PromptForm, model: &str, text: Text<'_>) -> anyhow::Result<Vec<Vec<u32>>> {
        let tokens = |(index, row): (usize, &Row)| {
            let Some(Value::String(prompt)) = row.get("prompt") else {
                let reason = if form == PromptForm::Raw {
                    "--raw gives prompts to the model as they are; leave it out".into()
                } else {
                    format!("`{model}` has no chat template; give prompts as text")
                };
                anyhow::bail!(UsageError(format!("{}: the prompt is a conversation, and {reason}", self.place(index))));
            };
            let prompt_ids = text.tokenizer.encode_document(prompt)?;
            if prompt_ids.is_empty() {
                anyhow::bail!("{}: the prompt has no tokens; a prompt needs at least one", self.place(index));
            }
            Ok(prompt_ids)
        };
        self.rows.rows().iter().enumerate().map(tokens).collect()
    }
}

/// The row of a line: `prompt` is a text or a list of messages, taken from `messages` where there is no `prompt`.
fn row(line: &str) -> Result<Row, String> {
    let value: Value = serde_json::from_str(line).map_err(|error| {
        let text = error.to_string();
        let reason = text.split(" at line ").next().unwrap_or(&text);
        format!("not valid JSON at column {}: {reason}", error.column())
    })?;
    let Value::Object(mut row) = value else { return Err("expected one JSON object per line".into()) };
    if let Some(column) = COLUMNS.iter().find(|column| row.contains_key(**column)) {
        return Err(format!(
            "the column `{column}` would be written over by that of the completion; rename or remove it"
        ));
    }
    let column =
        ["prompt", "messages"].into_iter().find(|column| row.get(*column).is_some_and(|value| !value.is_null()));
    let Some(column) = column else {
        let columns: Vec<String> = row.keys().map(|column| format!("`{column}`")).collect();
        return Err(format!("no `prompt` and no `messages`; the columns are {}", columns.join(", ")));
    };
    let prompt = row[column].clone();
    let is_right = match &prompt {
        Value::String(_) => column == "prompt",
        Value::Array(messages) => {
            if messages.last().and_then(|message| message.get("role")).is_some_and(|role| role == "assistant") {
                return Err(format!(
                    "`{column}` ends with an answer of the assistant, and an answer is to be generated; remove it, or keep it \
                     in a column of another name"
                ));
            }
            !messages.is_empty() && messages.iter().all(Value::is_object)
        }
        _ => false,
    };
    if !is_right {
        let text = if column == "prompt" { "a text or " } else { "" };
        return Err(format!("`{column}` is not {text}a list of one or more messages with `role` and `content`"));
    }
    row.insert("prompt".into(), prompt);
    Ok(row)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, text: &[u8]) -> Result<Prompts, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        Prompts::read(&path).map_err(|error| error.to_string())
    }

    #[test]
    fn text_files_hold_a_prompt_a_line_as_it_stands() {
        let prompts = read("prompts.txt", b"\xef\xbb\xbfone\n\n two\r\n{\"prompt\": 1}").unwrap();
        let texts: Vec<&str> = (0..prompts.rows.len()).map(|index| prompts.text(index)).collect();
        assert_eq!((texts, prompts.are_objects()), (vec!["one", " two", "{\"prompt\": 1}"], false));
        assert_eq!(prompts.object(1), r#"{"prompt":" two"}"#);
        assert!(prompts.place(1).ends_with("prompts.txt`, line 3)"), "{}", prompts.place(1));
        assert!(read("prompts.txt", b" \n").unwrap_err().contains("holds no prompt; write one per line"));
        assert!(read("prompts.txt", b"a\n\xff\n").unwrap_err().contains("prompts.txt`, line 2: not UTF-8"));
        let missing = Prompts::read(Path::new("no/such/file.jsonl")).unwrap_err().to_string();
        assert!(missing.contains("cannot read `no/such/file.jsonl`"), "{missing}");
    }

    #[test]
    fn rows_of_jsonl_keep_their_text_and_have_a_prompt_of_either_kind() {
        let turns = r#"[{"role": "user", "content": "x"}]"#;
        let lines = [
            r#"{"id": 123456789012345678901234567890, "prompt": "a",  "note": null}"#.to_string(),
            format!(r#"{{"messages": {turns}, "x": -0}}"#),
            format!(r#"{{"prompt": {turns}, "messages": "unused"}}"#),
            format!(r#"{{"prompt": null, "messages": {turns}}}"#),
        ];
        let prompts = read("prompts.JSONL", format!(" {}\r\n\n", lines.join("\n")).as_bytes()).unwrap();
        assert_eq!((prompts.rows.len(), prompts.are_objects(), prompts.text(0)), (4, true, "a"));
        let turns: Value = serde_json::from_str(turns).unwrap();
        for (index, line) in lines.iter().enumerate() {
            assert_eq!(&prompts.object(index), line);
            assert!(index == 0 || prompts.rows.rows()[index]["prompt"] == turns, "{line}");
        }
    }

    #[test]
    fn a_line_that_is_no_prompt_is_named() {
        let cases = [
            (r#"{"prompt": "x""#, "not valid JSON at column"),
            (r#"["x"]"#, "expected one JSON object per line"),
            (
                r#"{"question": "x", "answer": "y"}"#,
                "no `prompt` and no `messages`; the columns are `question`, `answer`",
            ),
            (r#"{"prompt": 3}"#, "`prompt` is not a text or a list of one or more messages"),
            (r#"{"prompt": ["x"]}"#, "`prompt` is not a text or a list"),
            (r#"{"messages": []}"#, "`messages` is not a list of one or more messages"),
            (r#"{"messages": "x"}"#, "`messages` is not a list of one or more messages"),
            (
                r#"{"messages": [{"role": "assistant", "content": "x"}]}"#,
                "`messages` ends with an answer of the assistant",
            ),
            (r#"{"prompt": "x", "completion": "y"}"#, "the column `completion` would be written over"),
            (r#"{"prompt": "x", "finish_reason": null}"#, "the column `finish_reason` would be written over"),
        ];
        for (line, problem) in cases {
            let message = read("p.jsonl", format!("\n{{\"prompt\": \"good\"}}\n{line}\n").as_bytes()).unwrap_err();
            assert!(message.contains(&format!("p.jsonl`, line 3: {problem}")), "{line}: {message}");
        }
        assert!(read("p.jsonl", b"\n").unwrap_err().contains("an object with `prompt` or `messages` per line"));
    }
}
