//! Test cases as data sets have them.
//!
//! open-r1's form (`verification_info`, from `PrimeIntellect`'s data): `{"language": "python", "test_cases": [{"input":
//! ..., "output": ..., "type": "stdin_stdout"}, {"fn_name": ..., "input": [...], "output": ..., "type":
//! "function_call"}]}`; APPS' and TACO's: `{"inputs": [...], "outputs": [...], "fn_name": ...}`. Either may be a text that
//! holds JSON, as may be the list inside it.

use serde_json::{Map, Value};

/// One test.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Case {
    /// A text on standard input, and what is to appear on standard output.
    Streams { input: String, output: String },
    /// A call, and what it is to return.
    Call { name: String, arguments: Vec<Value>, output: Value },
}

/// The tests of one row and the language they are for.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Tests {
    pub(super) language: Option<String>,
    pub(super) cases: Vec<Case>,
}

impl Tests {
    /// Reads a column; `None` if it is none of the forms above.
    pub(super) fn read(value: &Value) -> Option<Self> {
        let value = unpacked(value)?;
        let Value::Object(info) = &value else {
            return value.is_array().then(|| cases_of(&value)).flatten().map(|cases| Self { language: None, cases });
        };
        let language = info.get("language").and_then(Value::as_str).map(str::to_owned);
        let cases = match (info.get("test_cases"), info.get("inputs"), info.get("outputs")) {
            (Some(cases), ..) if cases.is_null() => Vec::new(),
            (Some(cases), ..) => cases_of(&unpacked(cases)?)?,
            (None, Some(inputs), Some(outputs)) => pairs(info, inputs.as_array()?, outputs.as_array()?)?,
            _ => return None,
        };
        Some(Self { language, cases })
    }
}

/// JSON in a text, however often it was packed.
fn unpacked(value: &Value) -> Option<Value> {
    let mut value = value.clone();
    while let Value::String(text) = &value {
        value = serde_json::from_str(text).ok()?;
    }
    Some(value)
}

fn cases_of(list: &Value) -> Option<Vec<Case>> {
    list.as_array()?.iter().map(|case| case_of(case.as_object()?)).collect()
}

fn case_of(case: &Map<String, Value>) -> Option<Case> {
    let (input, output) = (case.get("input")?, case.get("output")?);
    let name = case.get("fn_name").and_then(Value::as_str).filter(|name| !name.is_empty());
    match case.get("type").and_then(Value::as_str) {
        Some("function_call" | "functional") => Some(call(name?, input, output)),
        None if name.is_some() => Some(call(name?, input, output)),
        Some("stdin_stdout" | "stdin") | None => streams(input, output),
        Some(_) => None,
    }
}

fn pairs(info: &Map<String, Value>, inputs: &[Value], outputs: &[Value]) -> Option<Vec<Case>> {
    let name = info.get("fn_name").and_then(Value::as_str).filter(|name| !name.is_empty());
    if inputs.len() != outputs.len() {
        return None;
    }
    let read = |(input, output)| name.map_or_else(|| streams(input, output), |name| Some(call(name, input, output)));
    inputs.iter().zip(outputs).map(read).collect()
}

fn streams(input: &Value, output: &Value) -> Option<Case> {
    Some(Case::Streams { input: text(input)?, output: text(output)? })
}

/// A text, or a list of its lines.
fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Array(lines) => Some(lines.iter().map(text).collect::<Option<Vec<_>>>()?.join("\n")),
        Value::Number(number) => Some(number.to_string()),
        Value::Null => Some(String::new()),
        _ => None,
    }
}

fn call(name: &str, input: &Value, output: &Value) -> Case {
    let arguments = match input {
        Value::Array(arguments) => arguments.clone(),
        // LiveCodeBench's form: an argument a line, as JSON.
        Value::String(lines) => {
            let parsed: Result<Vec<Value>, _> = lines.trim().lines().map(serde_json::from_str).collect();
            parsed.unwrap_or_else(|_| vec![input.clone()])
        }
        other => vec![other.clone()],
    };
    Case::Call { name: name.to_owned(), arguments, output: output.clone() }
}

/// Whether standard output is what it should be: the same lines, but for blanks at their ends and empty lines around.
///
/// open-r1's script compares as many lines as the shorter of the two has, so that the first line alone passes; here all
/// count.
pub(super) fn same_text(got: &str, expected: &str) -> bool {
    got.trim().lines().map(str::trim).eq(expected.trim().lines().map(str::trim))
}

/// Whether a call returned what it should. Numbers are compared as Python compares them, floats to 9 digits; a list of one
/// value may stand for the value, and a text for the JSON in it, as data sets have it.
pub(super) fn same_value(got: &Value, expected: &Value) -> bool {
    let is_only = |one: &Value| expected.as_array().is_some_and(|list| list.len() == 1 && equal(one, &list[0]));
    let is_packed = |text: &str| serde_json::from_str(text).is_ok_and(|inside: Value| equal(got, &inside));
    equal(got, expected) || is_only(got) || expected.as_str().is_some_and(is_packed)
}

fn equal(got: &Value, expected: &Value) -> bool {
    match (got, expected) {
        (Value::Array(got), Value::Array(expected)) => {
            got.len() == expected.len() && got.iter().zip(expected).all(|(got, expected)| equal(got, expected))
        }
        (Value::Object(got), Value::Object(expected)) => {
            got.len() == expected.len()
                && got.iter().all(|(key, got)| expected.get(key).is_some_and(|expected| equal(got, expected)))
        }
        (Value::Number(one), Value::Number(other)) if one.is_f64() || other.is_f64() => {
            matches!((one.as_f64(), other.as_f64()), (Some(one), Some(other)) if is_near(one, other))
        }
        (Value::Bool(flag), Value::Number(number)) | (Value::Number(number), Value::Bool(flag)) => {
            number.as_f64() == Some(f64::from(u8::from(*flag)))
        }
        _ => got == expected,
    }
}

fn is_near(one: f64, other: f64) -> bool {
    (one - other).abs() <= 1e-9 * one.abs().max(other.abs()).max(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn streams(input: &str, output: &str) -> Case {
        Case::Streams { input: input.into(), output: output.into() }
    }

    #[test]
    fn every_form_of_tests_is_read() {
        let case = json!({"input": "1\n", "output": "2\n", "type": "stdin_stdout"});
        let info = json!({"language": "python", "test_cases": [case]});
        let expected = Tests { language: Some("python".into()), cases: vec![streams("1\n", "2\n")] };
        for value in [
            info.clone(),
            Value::String(info.to_string()),
            Value::String(Value::String(info.to_string()).to_string()),
            json!({"language": "python", "test_cases": json!([case]).to_string()}),
            json!({"language": "python", "inputs": ["1\n"], "outputs": ["2\n"]}),
        ] {
            assert_eq!(Tests::read(&value), Some(expected.clone()), "{value}");
        }
        let call = |arguments: Value, output: Value| Case::Call {
            name: "f".into(),
            arguments: arguments.as_array().expect("a list").clone(),
            output,
        };
        for (value, case) in [
            (
                json!([{"fn_name": "f", "input": [1, [2]], "output": 3, "type": "function_call"}]),
                call(json!([1, [2]]), json!(3)),
            ),
            (json!([{"fn_name": "f", "input": "1\n[2]", "output": "3"}]), call(json!([1, [2]]), json!("3"))),
            (json!([{"fn_name": "f", "input": "a b", "output": "3"}]), call(json!(["a b"]), json!("3"))),
            (json!({"fn_name": "f", "inputs": [[1]], "outputs": [[3]]}), call(json!([1]), json!([3]))),
            (json!([{"input": ["1", "2"], "output": 3}]), streams("1\n2", "3")),
        ] {
            assert_eq!(Tests::read(&value), Some(Tests { language: None, cases: vec![case] }), "{value}");
        }
        assert_eq!(Tests::read(&json!({"test_cases": []})), Some(Tests::default()));
        for value in [
            json!(3),
            json!("text"),
            json!({}),
            json!({"test_cases": 3}),
            json!([{"input": "1"}]),
            json!([{"input": "1", "output": "2", "type": "interactive"}]),
            json!([{"input": "1", "output": "2", "type": "function_call"}]),
            json!({"inputs": ["1"], "outputs": []}),
        ] {
            assert_eq!(Tests::read(&value), None, "{value}");
        }
    }

    #[test]
    fn outputs_are_compared_line_by_line_to_the_end() {
        for (got, expected) in [("1\n2\n", "1\n2"), (" 1 \r\n2", "1\n2\n\n"), ("\n1", "1\n"), ("", "\n")] {
            assert!(same_text(got, expected), "{got:?}");
        }
        for (got, expected) in [("1", "1\n2"), ("1\n2\n3", "1\n2"), ("", "1"), ("1 2", "1  2"), ("1\n\n2", "1\n2")] {
            assert!(!same_text(got, expected), "{got:?}");
        }
    }

    #[test]
    fn results_are_compared_as_python_would() {
        for (got, expected) in [
            (json!(3), json!(3)),
            (json!(3), json!([3])),
            (json!([3]), json!([[3]])),
            (json!([3]), json!([3])),
            (json!(true), json!(1)),
            (json!(0.1 + 0.2), json!(0.3)),
            (json!(2.0), json!(2)),
            (json!({"a": [1]}), json!({"a": [1.0]})),
            (json!([1, 2]), json!("[1, 2]")),
            (json!("a"), json!("a")),
            (json!(null), json!(null)),
        ] {
            assert!(same_value(&got, &expected), "{got} {expected}");
        }
        for (got, expected) in [
            (json!(3), json!(4)),
            (json!("3"), json!(3)),
            (json!([1, 2]), json!([2, 1])),
            (json!([1]), json!([1, 1])),
            (json!(null), json!([])),
            (json!(9_007_199_254_740_993_u64), json!(9_007_199_254_740_992_u64)),
        ] {
            assert!(!same_value(&got, &expected), "{got} {expected}");
        }
    }
}
