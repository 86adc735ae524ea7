//! TRL's data formats: what a row's columns mean.
//!
//! A data set has one [`Layout`], read off its first row: conversations (`messages`), prompt and completion, prompts
//! only, or plain text. Prompts and completions are strings or lists of messages. Nothing is guessed: other columns give
//! an error that says what to rename.

use serde_json::Value;

use super::Error;
use super::rows::{Dataset, Row, kind};

/// Which of TRL's formats a data set has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `messages` (or `conversations`): whole conversations.
    Messages {
        /// The column.
        column: String,
    },
    /// `prompt` and `completion`.
    PromptCompletion(Shape),
    /// `prompt` alone, for GRPO.
    Prompt(Shape),
    /// A column of plain text.
    Text {
        /// The column.
        column: String,
    },
}

/// Whether prompts and completions are text or messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Strings, used as they are.
    Plain,
    /// Lists of messages, rendered by the chat template.
    Conversational,
}

/// Columns of other formats, and what to rename them to.
const RENAMES: [(&str, &str); 12] = [
    ("question", "prompt"),
    ("problem", "prompt"),
    ("instruction", "prompt"),
    ("query", "prompt"),
    ("input", "prompt"),
    ("answer", "completion"),
    ("solution", "completion"),
    ("output", "completion"),
    ("response", "completion"),
    ("chosen", "completion"),
    ("content", "text"),
    ("dialog", "messages"),
];

impl Layout {
    /// The layout of data to learn from as it stands (SFT).
    ///
    /// # Errors
    /// If no column fits; the message lists the columns and what to rename.
    pub fn of_examples(dataset: &Dataset, text_field: &str) -> Result<Self, Error> {
        if dataset.has("prompt") && dataset.has("completion") {
            return Ok(Self::PromptCompletion(shape(dataset, "prompt")?));
        }
        for column in ["messages", "conversations"] {
            if dataset.has(column) {
                return Ok(Self::Messages { column: column.into() });
            }
        }
        if dataset.has(text_field) {
            return Ok(Self::Text { column: text_field.into() });
        }
        let wanted = format!("`messages`, `prompt` with `completion`, or `{text_field}` (`dataset_text_field`)");
        Err(missing(dataset, &wanted, &["prompt", "completion", "text", "messages"]))
    }

    /// The layout of prompts to answer (GRPO).
    ///
    /// # Errors
    /// If there is no `prompt` column.
    pub fn of_prompts(dataset: &Dataset) -> Result<Self, Error> {
        if dataset.has("prompt") {
            return Ok(Self::Prompt(shape(dataset, "prompt")?));
        }
        Err(missing(dataset, "`prompt`", &["prompt"]))
    }

    /// The columns that are read.
    pub(super) fn columns(&self) -> Vec<&str> {
        let own: &[&str] = match self {
            Self::Messages { column } | Self::Text { column } => &[column.as_str()],
            Self::PromptCompletion(_) => &["prompt", "completion"],
            Self::Prompt(_) => &["prompt"],
        };
        own.iter().copied().chain(["tools", "chat_template_kwargs"]).collect()
    }

    /// Whether the chat template is used.
    pub fn is_conversational(&self) -> bool {
        match self {
            Self::Messages { .. } => true,
            Self::PromptCompletion(shape) | Self::Prompt(shape) => *shape == Shape::Conversational,
            Self::Text { .. } => false,
        }
    }
}

/// A string column.
pub(super) fn text<'a>(row: &'a Row, column: &str, place: &dyn Fn() -> String) -> Result<&'a str, Error> {
    match row.get(column) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(wrong(place, column, other, "a string, as in the first row")),
        None => Err(absent(row, column, place)),
    }
}

/// A column of messages: a list, or the same as JSON text.
pub(super) fn messages<'a>(
    row: &'a Row,
    column: &str,
    place: &dyn Fn() -> String,
) -> Result<std::borrow::Cow<'a, [Value]>, Error> {
    match row.get(column) {
        Some(Value::Array(messages)) => Ok(messages.as_slice().into()),
        Some(Value::String(text)) => match serde_json::from_str::<Vec<Value>>(text) {
            Ok(messages) => Ok(messages.into()),
            Err(_) => Err(wrong(place, column, &row[column], "a list of messages, as in the first row")),
        },
        Some(other) => Err(wrong(place, column, other, "a list of messages, as in the first row")),
        None => Err(absent(row, column, place)),
    }
}

/// The `tools` column: a list of schemas, or the same as JSON text.
pub(super) fn tools(row: &Row, place: &dyn Fn() -> String) -> Result<Option<Value>, Error> {
    match row.get("tools") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Array(tools)) if tools.is_empty() => Ok(None),
        Some(tools @ Value::Array(_)) => Ok(Some(tools.clone())),
        Some(Value::String(text)) if text.trim().is_empty() => Ok(None),
        Some(Value::String(text)) => serde_json::from_str(text)
            .map(|tools: Vec<Value>| (!tools.is_empty()).then_some(Value::Array(tools)))
            .map_err(|e| Error::Row { place: place(), problem: format!("`tools` is not a JSON list: {e}") }),
        Some(other) => Err(wrong(place, "tools", other, "a list of tool schemas, or one as JSON text")),
    }
}

fn shape(dataset: &Dataset, column: &str) -> Result<Shape, Error> {
    match dataset.rows().first().and_then(|row| row.get(column)) {
        Some(Value::String(_)) => Ok(Shape::Plain),
        Some(Value::Array(_)) => Ok(Shape::Conversational),
        other => {
            let found = other.map_or("nothing", kind);
            let problem = format!("`{column}` is {found}, expected a string or a list of messages");
            Err(Error::Row { place: dataset.place(0), problem })
        }
    }
}

fn missing(dataset: &Dataset, wanted: &str, useful: &[&str]) -> Error {
    let columns = dataset.columns();
    let mut renames: Vec<String> = Vec::new();
    let mut taken: Vec<&str> = Vec::new();
    for (from, to) in RENAMES {
        let is_there = columns.iter().any(|c| c == from);
        if is_there && useful.contains(&to) && !taken.contains(&to) && !dataset.has(to) {
            renames.push(format!("`{from}` to `{to}`"));
            taken.push(to);
        }
    }
    let hint =
        if renames.is_empty() { String::new() } else { format!("; rename {} in the file", renames.join(" and ")) };
    Error::MissingColumn { place: dataset.place(0), wanted: format!("column {wanted}"), columns, hint }
}

fn absent(row: &Row, column: &str, place: &dyn Fn() -> String) -> Error {
    let columns = row.keys().cloned().collect();
    Error::MissingColumn { place: place(), wanted: format!("column `{column}`"), columns, hint: String::new() }
}

pub(super) fn wrong(place: &dyn Fn() -> String, column: &str, value: &Value, expected: &str) -> Error {
    Error::Row { place: place(), problem: format!("`{column}` is {}, expected {expected}", kind(value)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn dataset(row: &Value) -> Dataset {
        Dataset::from_rows("memory", vec![row.as_object().unwrap().clone()])
    }

    #[test]
    fn layouts_are_read_off_the_columns() {
        let example = |row: Value| Layout::of_examples(&dataset(&row), "text").unwrap();
        let turns = json!([{"role": "user", "content": "x"}]);
        assert_eq!(example(json!({"prompt": "a", "completion": "b"})), Layout::PromptCompletion(Shape::Plain));
        assert_eq!(
            example(json!({"prompt": turns, "completion": turns, "text": "t"})),
            Layout::PromptCompletion(Shape::Conversational)
        );
        assert_eq!(example(json!({"messages": turns, "text": "t"})), Layout::Messages { column: "messages".into() });
        assert_eq!(example(json!({"text": "t", "messages": null})), Layout::Text { column: "text".into() });
        assert_eq!(Layout::of_prompts(&dataset(&json!({"prompt": "a"}))).unwrap(), Layout::Prompt(Shape::Plain));
    }

    #[test]
    fn other_columns_give_an_error_that_says_what_to_rename() {
        let rows = dataset(&json!({"question": "1+1?", "answer": "2"}));
        let text = Layout::of_examples(&rows, "text").unwrap_err().to_string();
        assert!(text.contains("the columns are `question`, `answer`"), "{text}");
        assert!(text.ends_with("rename `question` to `prompt` and `answer` to `completion` in the file"), "{text}");
        let text = Layout::of_prompts(&rows).unwrap_err().to_string();
        assert!(text.ends_with("rename `question` to `prompt` in the file"), "{text}");
        let text = Layout::of_examples(&dataset(&json!({"prompt": "x"})), "text").unwrap_err().to_string();
        assert!(text.contains("`prompt` with `completion`") && text.ends_with("the columns are `prompt`"), "{text}");
        let text = Layout::of_prompts(&dataset(&json!({"prompt": 3}))).unwrap_err().to_string();
        assert!(text.contains("`prompt` is a number, expected a string or a list of messages"), "{text}");
    }
}
