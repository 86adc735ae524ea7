//! Conversations that stand in their column as JSON text.
//!
//! CSV files and some tables hold lists of messages as text. TRL reads `tools` so; here the columns that hold
//! conversations are read alike, if the first row's text is a JSON list of messages.

use rayon::prelude::*;
use serde_json::Value;

use super::Error;
use super::lenient_json::{self, Loss};
use super::rows::Dataset;

/// Columns that may hold conversations.
const COLUMNS: [&str; 4] = ["messages", "conversations", "prompt", "completion"];

/// Puts the messages in the place of their text.
///
/// # Errors
/// If the first row has a list of messages as text and another row does not, or the text is Python's and not JSON.
pub(super) fn parse(dataset: &mut Dataset) -> Result<(), Error> {
    for column in COLUMNS {
        let first = dataset.rows().first().and_then(|row| row.get(column)).and_then(Value::as_str);
        let Some(first) = first else { continue };
        if looks_like_python(first) {
            return Err(Error::Row {
                place: dataset.place(0),
                problem: format!(
                    "`{column}` is a list as Python prints it, not JSON; write the column with `json.dumps`, or the rows \
                     as .jsonl"
                ),
            });
        }
        if messages(first).is_none() {
            continue;
        }
        let parsed: Vec<Option<Value>> = dataset
            .rows()
            .par_iter()
            .map(|row| match row.get(column) {
                Some(Value::String(text)) => messages(text),
                other => Some(other.cloned().unwrap_or_default()),
            })
            .collect();
        if let Some(index) = parsed.iter().position(Option::is_none) {
            return Err(Error::Row {
                place: dataset.place(index),
                problem: format!("`{column}` is text, but not a JSON list of messages as in the first row"),
            });
        }
        tracing::info!("`{column}` holds JSON text; it is read as the messages in it");
        dataset.replace_column(column, parsed.into_iter().flatten());
    }
    Ok(())
}

/// The messages of a text, if it is a JSON list of objects with roles.
fn messages(text: &str) -> Option<Value> {
    let text = text.trim();
    if !text.starts_with('[') {
        return None;
    }
    let entries = lenient_json::parse_list(text.as_bytes()).ok()?;
    let is_message = |value: &Value| ["role", "from"].iter().any(|key| value.get(key).is_some_and(Value::is_string));
    let is_sound = !entries.is_empty()
        && entries
            .iter()
            .all(|(value, losses)| is_message(value) && !losses.iter().any(|(_, loss)| *loss != Loss::NullFields));
    is_sound.then(|| entries.into_iter().map(|(value, _)| lenient_json::without_nulls(value)).collect())
}

fn looks_like_python(text: &str) -> bool {
    let inside = text.trim_start().strip_prefix('[').and_then(|text| text.trim_start().strip_prefix('{'));
    inside.is_some_and(|text| {
        ["'role'", "'content'", "'from'", "'value'"].iter().any(|key| text.trim_start().starts_with(key))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn dataset(rows: &[Value]) -> Dataset {
        Dataset::from_rows("memory", rows.iter().map(|row| row.as_object().unwrap().clone()).collect())
    }

    #[test]
    fn lists_of_messages_are_read_and_other_text_is_left_alone() {
        let turns = json!([{"role": "user", "content": "[x]", "name": null}]);
        let clean = json!([{"role": "user", "content": "[x]"}]);
        let mut rows = dataset(&[
            json!({"messages": turns.to_string(), "prompt": "[1, 2]"}),
            json!({"messages": null, "prompt": "b"}),
        ]);
        parse(&mut rows).unwrap();
        assert_eq!(Value::Object(rows.rows()[0].clone()), json!({"messages": clean, "prompt": "[1, 2]"}));
        assert_eq!(rows.rows()[1]["messages"], Value::Null);
        let mut rows = dataset(&[json!({"prompt": "[{\"role\": 1}]"})]);
        parse(&mut rows).unwrap();
        assert_eq!(rows.rows()[0]["prompt"], "[{\"role\": 1}]");
    }

    #[test]
    fn a_row_without_messages_and_python_s_own_form_are_errors() {
        let turns = json!([{"role": "user", "content": "x"}]).to_string();
        let text =
            parse(&mut dataset(&[json!({"prompt": turns}), json!({"prompt": "plain"})])).unwrap_err().to_string();
        assert!(text.contains("row 1 (`memory`, row 2): `prompt` is text, but not a JSON list"), "{text}");
        let text = parse(&mut dataset(&[json!({"messages": "[{'role': 'user'}]"})])).unwrap_err().to_string();
        assert!(text.contains("as Python prints it"), "{text}");
    }
}
