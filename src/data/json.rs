//! JSON files as rows: lines, arrays, and the other layouts people have.
//!
//! The usual file has one object per line and is parsed on all cores. Also read: an array of objects (or of texts),
//! objects that follow one another over several lines, one object that wraps the rows (`{"data": [...]}`), and tables by
//! column as pandas and `Dataset.to_dict` write them.

use std::path::Path;

use rayon::prelude::*;
use serde_json::{Map, Value};

use super::Error;
use super::bytes::line_at;
use super::lenient_json::{self, Broken, Found, Loss};
use super::rows::{Fault, ReadRow, Row, kind};

const MARK: &[u8] = b"\xef\xbb\xbf";

/// Keys under which files keep their rows.
const WRAPPERS: [&str; 8] = ["data", "rows", "examples", "instances", "records", "items", "train", "dataset"];

/// Rows of a JSON file, and whether their numbers are lines.
///
/// # Errors
/// If it is no JSON, or its layout is none of those above.
pub(super) fn rows(path: &Path, text: &[u8], is_lines: bool) -> Result<(Vec<ReadRow>, bool), Error> {
    let first = text.iter().find(|b| !b.is_ascii_whitespace());
    if first == Some(&b'[') {
        let listed = list(path, text);
        return match listed {
            Err(_) if is_lines => lines(path, text).map(|rows| (rows, true)),
            listed => listed.map(|rows| (rows, false)),
        };
    }
    if !is_lines && let Ok((Value::Object(object), losses)) = lenient_json::parse(text) {
        let whole = whole_object(path, object, losses)?;
        return Ok((whole, false));
    }
    match lines(path, text) {
        // The message for a file of lines is about its lines.
        Err(error) if starts_with_a_row(text) => Err(error),
        Err(error) => match spread(path, text) {
            Some(rows) => rows.map(|rows| (rows, true)),
            None => Err(error),
        },
        Ok(rows) => Ok((rows, true)),
    }
}

/// One JSON object per line; blank lines are skipped. Lines are parsed on all cores.
fn lines(path: &Path, text: &[u8]) -> Result<Vec<ReadRow>, Error> {
    let lines: Vec<(u32, &[u8])> =
        (1..).zip(text.split(|&b| b == b'\n')).filter(|(_, line)| !line.iter().all(u8::is_ascii_whitespace)).collect();
    // Files that were put together have a mark in the middle.
    let parse = |&(number, line): &(u32, &[u8])| match lenient_json::parse(line.strip_prefix(MARK).unwrap_or(line)) {
        Ok(found) => row(number, found).map_err(|what| (number, format!("{what}, expected one JSON object per line"))),
        Err(Broken { column, reason, .. }) => Err((number, format!("not valid JSON at column {column}: {reason}"))),
    };
    let parsed: Vec<Result<ReadRow, (u32, String)>> = lines.par_iter().map(parse).collect();
    let rows: Result<Vec<ReadRow>, (u32, String)> = parsed.into_iter().collect();
    rows.map_err(|(line, problem)| Error::Line { path: path.into(), line: line as usize, problem })
}

fn starts_with_a_row(text: &[u8]) -> bool {
    let mut lines = text.split(|&b| b == b'\n').filter(|line| !line.iter().all(u8::is_ascii_whitespace));
    lines.next().is_some_and(|line| matches!(lenient_json::parse(line), Ok((Value::Object(_), _))))
}

/// An array with an object per row, or a text per row, which `datasets` calls `text`.
fn list(path: &Path, text: &[u8]) -> Result<Vec<ReadRow>, Error> {
    let entries = lenient_json::parse_list(text).map_err(|e| Error::Line {
        path: path.into(),
        line: e.line,
        problem: format!("not valid JSON at column {}: {}", e.column, e.reason),
    })?;
    let entries = entries.into_iter().enumerate().map(|(index, found)| {
        let number = index as u32 + 1;
        let entry = match found {
            (Value::String(text), losses) => {
                let column = |(_, loss)| ("text".to_string(), loss);
                let row = Map::from_iter([("text".to_string(), Value::String(text))]);
                (Value::Object(row), losses.into_iter().map(column).collect())
            }
            other => other,
        };
        row(number, entry).map_err(|what| Error::Content {
            path: path.into(),
            problem: format!("entry {number} of the array is {what}, expected an object per row"),
        })
    });
    entries.collect()
}

/// Objects that follow one another without regard to lines; `None` if the text is something else.
fn spread(path: &Path, text: &[u8]) -> Option<Result<Vec<ReadRow>, Error>> {
    let texts = lenient_json::parse_stream(text)?;
    let (mut line, mut at) = (1, 0);
    let rows = texts.into_iter().map(|(start, found)| {
        line += line_at(&text[at..start], start - at) - 1;
        at = start;
        row(line as u32, found).map_err(|what| Error::Line {
            path: path.into(),
            line,
            problem: format!("{what}, expected an object per row"),
        })
    });
    Some(rows.collect())
}

fn row(number: u32, (value, losses): Found) -> Result<ReadRow, &'static str> {
    let Value::Object(row) = value else { return Err(kind(&value)) };
    let mut read = ReadRow::sound(number, row);
    for (column, loss) in losses {
        match loss {
            Loss::Fault(problem) => read.faults.push(Fault { column, problem }),
            Loss::NullFields => read.null_fields = Some(column),
        }
    }
    Ok(read)
}

/// A file that is one object: the rows it wraps, a table by column, or a single row.
fn whole_object(path: &Path, mut object: Row, losses: Vec<(String, Loss)>) -> Result<Vec<ReadRow>, Error> {
    let is_rows = |value: &Value| match value {
        Value::Array(items) => !items.is_empty() && items.iter().all(Value::is_object) && !items.iter().all(is_message),
        _ => false,
    };
    let wrapped: Vec<String> =
        WRAPPERS.iter().filter(|key| object.get(**key).is_some_and(is_rows)).map(ToString::to_string).collect();
    let sound = |rows: Vec<Row>| -> Result<Vec<ReadRow>, Error> {
        let fault = losses.iter().find_map(|(column, loss)| match loss {
            Loss::Fault(fault) => Some((column, fault)),
            Loss::NullFields => None,
        });
        if let Some((column, fault)) = fault {
            return Err(Error::Content {
                path: path.into(),
                problem: format!("`{column}` holds a value that {fault}"),
            });
        }
        Ok((1..).zip(rows).map(|(number, row)| ReadRow::sound(number, row)).collect())
    };
    match wrapped.as_slice() {
        [key] => {
            let Some(Value::Array(entries)) = object.remove(key) else { return Ok(Vec::new()) };
            tracing::info!("`{}`: rows are read from its `{key}`", path.display());
            let rows = entries.into_iter().filter_map(|entry| match entry {
                Value::Object(row) => Some(row),
                _ => None,
            });
            return sound(rows.collect());
        }
        [] => {}
        several => {
            return Err(Error::Content {
                path: path.into(),
                problem: format!(
                    "one JSON object with rows under {}; write the wanted ones as one object per line (.jsonl)",
                    several.iter().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(" and ")
                ),
            });
        }
    }
    if let Some(rows) =
        split_table(&object).or_else(|| by_column(&object)).or_else(|| by_row(&object)).or_else(|| by_index(&object))
    {
        tracing::info!("`{}`: a table by column, {} rows", path.display(), rows.len());
        return sound(rows);
    }
    row(1, (Value::Object(object), losses))
        .map(|row| vec![row])
        .map_err(|what| Error::Content { path: path.into(), problem: format!("{what}, expected an object") })
}

/// Whether a value is a turn of a conversation: a list of those is one cell, not a column.
fn is_message(value: &Value) -> bool {
    ["role", "from"].iter().any(|key| value.get(key).is_some())
}

/// `{"prompt": ["a", "b"], "completion": ["c", "d"]}`.
fn by_column(object: &Row) -> Option<Vec<Row>> {
    let columns: Option<Vec<(&String, &Vec<Value>)>> =
        object.iter().map(|(name, value)| Some((name, value.as_array()?))).collect();
    let columns = columns?;
    let count = columns.first()?.1.len();
    let is_table = columns.iter().all(|(_, cells)| cells.len() == count && !cells.iter().any(is_message));
    let row = |index: usize| columns.iter().map(|(name, cells)| ((*name).clone(), cells[index].clone())).collect();
    is_table.then(|| (0..count).map(row).collect())
}

/// pandas' `to_json()`: `{"prompt": {"0": "a", "1": "b"}}`.
fn by_index(object: &Row) -> Option<Vec<Row>> {
    let columns: Option<Vec<(&String, &Row)>> =
        object.iter().map(|(name, value)| Some((name, value.as_object()?))).collect();
    let columns = columns?;
    let index: Vec<&String> = columns.first()?.1.keys().collect();
    let is_number = |name: &&String| !name.is_empty() && name.bytes().all(|b| b.is_ascii_digit());
    let is_table = !index.is_empty() && index.iter().all(is_number);
    // A null cell was left out as the null field that it also is.
    let is_known = |cells: &Row| cells.keys().all(|name| is_number(&name));
    let mut names: Vec<&String> = columns.iter().flat_map(|(_, cells)| cells.keys()).collect();
    if !is_table || !columns.iter().all(|(_, cells)| is_known(cells)) {
        return None;
    }
    names.sort_by_key(|name| (name.len(), *name));
    names.dedup();
    let cell = |cells: &Row, name: &String| cells.get(name).cloned().unwrap_or(Value::Null);
    let row = |name: &String| columns.iter().map(|(column, cells)| ((*column).clone(), cell(cells, name))).collect();
    Some(names.into_iter().map(row).collect())
}

/// pandas' `to_json(orient="index")`: `{"0": {"prompt": "a"}, "1": {"prompt": "b"}}`.
fn by_row(object: &Row) -> Option<Vec<Row>> {
    let is_number = |name: &String| !name.is_empty() && name.bytes().all(|b| b.is_ascii_digit());
    let row = |(name, value): (&String, &Value)| is_number(name).then(|| value.as_object().cloned()).flatten();
    if object.is_empty() { None } else { object.iter().map(row).collect() }
}

/// pandas' `to_json(orient="split")`: `{"columns": [...], "index": [...], "data": [[...]]}`.
fn split_table(object: &Row) -> Option<Vec<Row>> {
    let columns: Option<Vec<&str>> = object.get("columns")?.as_array()?.iter().map(Value::as_str).collect();
    let columns = columns?;
    let row = |cells: &Value| -> Option<Row> {
        let cells = cells.as_array().filter(|cells| cells.len() == columns.len())?;
        Some(columns.iter().map(ToString::to_string).zip(cells.iter().cloned()).collect())
    };
    object.get("data")?.as_array()?.iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(text: &str, is_lines: bool) -> Result<(Vec<Value>, Vec<u32>), String> {
        let (rows, _) = rows(Path::new("x.json"), text.as_bytes(), is_lines).map_err(|e| e.to_string())?;
        Ok(rows.into_iter().map(|row| (Value::Object(row.row), row.number)).unzip())
    }

    #[test]
    fn other_layouts_are_read_as_the_rows_they_hold() {
        let rows = vec![json!({"prompt": "a", "completion": "b"}), json!({"prompt": "c", "completion": "d"})];
        for text in [
            r#"[{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]"#,
            "{\"prompt\": \"a\",\n \"completion\": \"b\"}\n{\"prompt\": \"c\",\n \"completion\": \"d\"}\n",
            r#"{"version": 1, "data": [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]}"#,
            r#"{"prompt": ["a", "c"], "completion": ["b", "d"]}"#,
            r#"{"prompt": {"0": "a", "1": "c"}, "completion": {"0": "b", "1": "d"}}"#,
            r#"{"0": {"prompt": "a", "completion": "b"}, "1": {"prompt": "c", "completion": "d"}}"#,
            r#"{"columns": ["prompt", "completion"], "index": [0, 1], "data": [["a", "b"], ["c", "d"]]}"#,
        ] {
            assert_eq!(read(text, false).unwrap().0, rows, "{text}");
        }
        let spread = "\n{\"x\":\n 1}\n\n{\"x\": 2}";
        assert_eq!(read(spread, true).unwrap(), (vec![json!({"x": 1}), json!({"x": 2})], vec![2, 5]));
        assert_eq!(read(r#"["a", "b"]"#, true).unwrap().0, [json!({"text": "a"}), json!({"text": "b"})]);
        let one = json!({"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]});
        assert_eq!(read(&one.to_string(), false).unwrap().0, [one]);
        let by_index = r#"{"a": {"10": 1, "9": null}, "b": {"9": 3, "10": 4}}"#;
        assert_eq!(read(by_index, false).unwrap().0, [json!({"a": null, "b": 3}), json!({"a": 1, "b": 4})]);
        let several = read(r#"{"train": [{"x": 1}], "data": [{"x": 2}]}"#, false).unwrap_err();
        assert!(several.contains("rows under `data` and `train`"), "{several}");
    }
}
