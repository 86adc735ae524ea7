//! Completions of `trainer generate` as JSON lines: the columns of the prompt, then those of the completion.

use std::path::Path;

use serde_json::json;

use crate::cli::UsageError;
use crate::fs;
use crate::rollout::{Completion, Finish};

/// The columns of a completion.
pub(super) const COLUMNS: [&str; 3] = ["completion", "completion_tokens", "finish_reason"];

/// A line: the prompt's own columns as they were written in `object`, and the completion.
pub(super) fn line(object: &str, text: &str, completion: &Completion) -> String {
    let finish_reason = match completion.finish {
        Finish::Eos | Finish::StopString => "stop",
        Finish::Length => "length",
    };
    let [of_text, of_tokens, of_reason] = COLUMNS;
    let own = json!({of_text: text, of_tokens: completion.token_ids.len(), of_reason: finish_reason}).to_string();
    // Both are JSON objects, and that of a prompt has a column.
    let columns = object.strip_suffix('}').unwrap_or(object);
    format!("{columns},{}\n", own.strip_prefix('{').unwrap_or(&own))
}

/// Finds out before the work whether a file can be written in the end.
///
/// # Errors
/// If it is a folder or the file of prompts, or its folder cannot be written to.
pub(super) fn check(path: &Path, prompts: Option<&Path>) -> anyhow::Result<()> {
    let refused = |what: &str| UsageError(format!("`--output {}` is {what}; name another file", path.display()));
    if path.is_dir() {
        anyhow::bail!(refused("a folder"));
    }
    let real = |path: &Path| path.canonicalize().ok();
    if prompts.is_some_and(|prompts| real(path).is_some_and(|path| real(prompts) == Some(path))) {
        anyhow::bail!(refused("the file of prompts"));
    }
    Ok(fs::check_folder_of(path)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_the_prompt_s_columns_as_written_and_those_of_the_completion() {
        let completion = |finish| Completion {
            sample_id: 0,
            group: 0,
            token_ids: vec![1, 2],
            logprobs: vec![0.0; 2],
            sampling_logprobs: vec![0.0; 2],
            finish,
        };
        let object = r#"{"prompt": "a}", "id": 123456789012345678901234567890, "of": {"x": null}}"#;
        let added =
            |reason: &str| format!(r#","completion":"\"b\"\n","completion_tokens":2,"finish_reason":"{reason}"}}"#);
        let begin = object.strip_suffix('}').unwrap();
        for (finish, reason) in [(Finish::Eos, "stop"), (Finish::StopString, "stop"), (Finish::Length, "length")] {
            assert_eq!(line(object, "\"b\"\n", &completion(finish)), format!("{begin}{}\n", added(reason)));
        }
    }

    #[test]
    fn a_file_that_cannot_be_written_is_found_before_the_work() {
        let folder = tempfile::tempdir().unwrap();
        let prompts = folder.path().join("prompts.jsonl");
        std::fs::write(&prompts, "x").unwrap();
        let refused = |path: &Path| check(path, Some(&prompts)).unwrap_err().to_string();
        assert!(refused(folder.path()).contains("is a folder"));
        assert!(refused(&folder.path().join(".").join("prompts.jsonl")).contains("is the file of prompts"));
        let below = refused(&prompts.join("out.jsonl"));
        assert!(below.contains("cannot create the folder") && below.contains("prompts.jsonl"), "{below}");
        check(&folder.path().join("new/out.jsonl"), Some(&prompts)).unwrap();
        assert_eq!(std::fs::read_dir(folder.path().join("new")).unwrap().count(), 0);
        assert_eq!(std::fs::read(&prompts).unwrap(), b"x");
    }
}
