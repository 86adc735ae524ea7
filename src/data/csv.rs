//! CSV and TSV files as rows.
//!
//! The first record names the columns. Quotes as in RFC 4180, with line breaks inside them; an empty cell is null. A
//! column whose cells are all integers, numbers or booleans holds such values, as pandas reads it for `datasets`;
//! columns that a trainer takes as text stay text. Written by hand because a quote that is never closed, which swallows
//! the rest of a file, must be an error.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use serde_json::Value;

use super::Error;
use super::bytes::line_at;
use super::rows::ReadRow;

/// Columns that stay text whatever they hold: `4` is a completion.
const TEXT: [&str; 4] = ["prompt", "completion", "text", "messages"];

/// Rows of a file with the line each starts at.
///
/// # Errors
/// If it is not UTF-8, a quote is not closed, or a record has another number of cells than the header.
pub(super) fn rows(path: &Path, bytes: &[u8], delimiter: u8) -> Result<Vec<ReadRow>, Error> {
    let fail = |line: usize, problem: String| Error::Line { path: path.into(), line, problem };
    let text = std::str::from_utf8(bytes).map_err(|e| {
        fail(line_at(bytes, e.valid_up_to()), "bytes that are not UTF-8; save the file as UTF-8".into())
    })?;
    let mut records = records(text, char::from(delimiter)).map_err(|(line, problem)| fail(line, problem))?.into_iter();
    let Some((_, header)) = records.next() else { return Ok(Vec::new()) };
    let names = unique(header);
    let mut rows = Vec::new();
    for (line, cells) in records {
        if cells.len() != names.len() {
            return Err(fail(line, format!("{} cells, expected {} as in the header", cells.len(), names.len())));
        }
        rows.push((line, cells));
    }
    let kinds: Vec<Kind> = (0..names.len())
        .map(|column| Kind::of(&names[column], &rows.iter().map(|(_, cells)| cells[column].as_str())))
        .collect();
    let row = |(line, cells): Record| {
        let values = cells.into_iter().zip(&kinds).map(|(cell, kind)| kind.value(cell));
        ReadRow::sound(line as u32, names.iter().cloned().zip(values).collect())
    };
    Ok(rows.into_iter().map(row).collect())
}

/// Names of columns; one that comes again gets a number, as pandas does it.
fn unique(header: Vec<String>) -> Vec<String> {
    let mut counts: HashMap<String, usize> = HashMap::new();
    let taken: HashSet<String> = header.iter().cloned().collect();
    let mut own_name = |name: String| {
        let count = counts.entry(name.clone()).or_insert(0);
        *count += 1;
        if *count == 1 {
            return name;
        }
        let mut own = format!("{name}.{}", *count - 1);
        while taken.contains(&own) {
            own.push('_');
        }
        own
    };
    header.into_iter().map(&mut own_name).collect()
}

/// The line a record starts at, and its cells.
type Record = (usize, Vec<String>);

/// Records of cells; empty lines are none. An error is a line and what is wrong with it.
fn records(text: &str, delimiter: char) -> Result<Vec<Record>, (usize, String)> {
    let mut records = Vec::new();
    let (mut cells, mut cell) = (Vec::new(), String::new());
    let (mut line, mut start, mut is_cell_open) = (1, 1, false);
    let mut rest = text.chars().peekable();
    while let Some(character) = rest.next() {
        match character {
            '"' if !is_cell_open => {
                let opened = line;
                is_cell_open = true;
                loop {
                    match rest.next() {
                        Some('"') if rest.peek() == Some(&'"') => {
                            rest.next();
                            cell.push('"');
                        }
                        Some('"') => break,
                        Some(inside) => {
                            line += usize::from(inside == '\n');
                            cell.push(inside);
                        }
                        None => return Err((opened, "a quote that is opened here is never closed".into())),
                    }
                }
            }
            c if c == delimiter => {
                cells.push(std::mem::take(&mut cell));
                is_cell_open = false;
            }
            '\n' | '\r' => {
                // Both together, or either alone as old and foreign programs write it.
                if character == '\r' && rest.peek() == Some(&'\n') {
                    rest.next();
                }
                if !(cells.is_empty() && cell.is_empty() && !is_cell_open) {
                    cells.push(std::mem::take(&mut cell));
                    records.push((start, std::mem::take(&mut cells)));
                }
                is_cell_open = false;
                line += 1;
                start = line;
            }
            other => {
                is_cell_open = true;
                cell.push(other);
            }
        }
    }
    if !(cells.is_empty() && cell.is_empty() && !is_cell_open) {
        cells.push(cell);
        records.push((start, cells));
    }
    Ok(records)
}

/// What all cells of a column are.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Text,
    Integer,
    Float,
    Boolean,
}

impl Kind {
    fn of<'a>(name: &str, cells: &(impl Iterator<Item = &'a str> + Clone)) -> Self {
        let all = |kind: Self| cells.clone().filter(|cell| !cell.is_empty()).all(|cell| kind.read(cell).is_some());
        let is_empty = cells.clone().all(str::is_empty);
        let kinds = [Self::Integer, Self::Float, Self::Boolean];
        let found = kinds.into_iter().find(|&kind| !is_empty && !TEXT.contains(&name) && all(kind));
        found.unwrap_or(Self::Text)
    }

    fn read(self, cell: &str) -> Option<Value> {
        let digits = cell.strip_prefix('-').unwrap_or(cell);
        // `007` and `1e5` as an identifier would not come back as they stand.
        let is_plain = digits.starts_with(|c: char| c.is_ascii_digit())
            && (digits == "0" || digits.starts_with("0.") || !digits.starts_with('0'))
            && digits.chars().all(|c| c.is_ascii_digit() || c == '.');
        match self {
            Self::Text => Some(Value::String(cell.into())),
            Self::Integer => cell.parse::<i64>().ok().filter(|_| is_plain).map(Value::from),
            Self::Float => {
                let number = cell.parse::<f64>().ok().filter(|_| is_plain)?;
                serde_json::Number::from_f64(number).map(Value::Number)
            }
            Self::Boolean => match cell {
                "True" | "true" | "TRUE" => Some(Value::Bool(true)),
                "False" | "false" | "FALSE" => Some(Value::Bool(false)),
                _ => None,
            },
        }
    }

    fn value(self, cell: String) -> Value {
        match self {
            _ if cell.is_empty() => Value::Null,
            Self::Text => Value::String(cell),
            kind => kind.read(&cell).unwrap_or(Value::String(cell)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(text: &str, delimiter: u8) -> Result<Vec<(u32, Value)>, String> {
        let rows = rows(Path::new("x.csv"), text.as_bytes(), delimiter).map_err(|e| e.to_string())?;
        Ok(rows.into_iter().map(|row| (row.number, Value::Object(row.row))).collect())
    }

    #[test]
    fn quotes_line_breaks_empty_cells_and_kinds_are_read() {
        let text = "prompt,n,x,ok,id,a\r\n\"say \"\"hi\"\",\r\nplease\",1,0.5,True,007,\"\"\n\n4,,2,false,8,5\" pipe";
        assert_eq!(
            read(text, b',').unwrap(),
            [
                (2, json!({"prompt": "say \"hi\",\r\nplease", "n": 1, "x": 0.5, "ok": true, "id": "007", "a": null})),
                (5, json!({"prompt": "4", "n": null, "x": 2.0, "ok": false, "id": "8", "a": "5\" pipe"})),
            ]
        );
        assert_eq!(read("a\ta\n1,5\t\n", b'\t').unwrap(), [(2, json!({"a": "1,5", "a.1": null}))]);
        let old = "a,b\r1,2\r\r3,\"x\ry\"\r";
        assert_eq!(read(old, b',').unwrap(), [(2, json!({"a": 1, "b": "2"})), (4, json!({"a": 3, "b": "x\ry"}))]);
        assert_eq!(read("a,b\n", b',').unwrap(), []);
        assert_eq!(read("", b',').unwrap(), []);
    }

    #[test]
    fn broken_records_are_named_by_line() {
        let text = read("a,b\n1,2\n\"x\n\n", b',').unwrap_err();
        assert!(text.ends_with("line 3: a quote that is opened here is never closed"), "{text}");
        let text = read("a,b\n1,2\n1,2,3\n", b',').unwrap_err();
        assert!(text.ends_with("line 3: 3 cells, expected 2 as in the header"), "{text}");
        let text = rows(Path::new("x.csv"), b"a\n1\n\xff\n", b',').unwrap_err().to_string();
        assert!(text.contains("line 3: bytes that are not UTF-8"), "{text}");
    }
}
