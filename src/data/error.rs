//! What can go wrong with data, tokenizers and templates.

use std::path::PathBuf;

/// An error of the `data` room.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be opened, read or written.
    #[error(transparent)]
    File(#[from] crate::fs::Error),
    /// A line of a data file is not a row.
    #[error("`{}`, line {line}: {problem}", path.display())]
    Line {
        /// Which file.
        path: PathBuf,
        /// Which line, counted from 1.
        line: usize,
        /// What is wrong with it and what was expected.
        problem: String,
    },
    /// A file as a whole is not what its name says.
    #[error("`{}`: {problem}", path.display())]
    Content {
        /// Which file or folder.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A data set has no rows.
    #[error("{what} has no rows; check `dataset_name`, the split and the files it names")]
    Empty {
        /// The data set or the file.
        what: String,
    },
    /// A column is not there.
    #[error("{place}: {wanted} not found; the columns are {}{hint}", list(columns))]
    MissingColumn {
        /// Where: file and line.
        place: String,
        /// What was looked for.
        wanted: String,
        /// What is there.
        columns: Vec<String>,
        /// What to rename, or empty.
        hint: String,
    },
    /// A row has the wrong content.
    #[error("{place}: {problem}")]
    Row {
        /// Where: file and line.
        place: String,
        /// What is wrong and what was expected.
        problem: String,
    },
    /// A prompt is too long.
    #[error(
        "{place}: the prompt has {tokens} tokens, the limit (`max_prompt_length`) is {limit}{}; shorten it, raise the \
         limit, or set `truncate_prompts: true` to cut prompts on the left", and_others(*others)
    )]
    PromptTooLong {
        /// Where: file and line.
        place: String,
        /// Its length.
        tokens: usize,
        /// The limit.
        limit: usize,
        /// How many other prompts are too long.
        others: usize,
    },
    /// Two settings, or a setting and the data, clash.
    #[error("{0}")]
    Setting(String),
    /// A tokenizer cannot be read or used.
    #[error("tokenizer {what}: {problem}")]
    Tokenizer {
        /// File or operation.
        what: String,
        /// What the tokenizer says and what to do.
        problem: String,
    },
    /// A chat template cannot be parsed or rendered.
    #[error("chat template: {0}")]
    Template(String),
    /// The hub, or its cache, does not give what was asked for.
    #[error("hub {kind} `{repo}` at `{revision}`: {problem}")]
    Hub {
        /// `model` or `dataset`.
        kind: &'static str,
        /// Which repository.
        repo: String,
        /// Which branch, tag or commit.
        revision: String,
        /// What happened and what to do.
        problem: String,
    },
}

fn list(columns: &[String]) -> String {
    columns.iter().map(|c| format!("`{c}`")).collect::<Vec<_>>().join(", ")
}

fn and_others(others: usize) -> String {
    match others {
        0 => String::new(),
        1 => " (and 1 other prompt is too long)".into(),
        _ => format!(" (and {others} other prompts are too long)"),
    }
}
