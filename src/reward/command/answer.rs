//! What a reward program wrote, read as generously as its meaning is certain.
//!
//! Programs print: progress, debug lines, warnings of a library. A line that is no answer is passed over and counted. A
//! line that means to be an answer and is not a right one is an error.

use std::borrow::Cow;

use serde_json::{Map, Value};

use crate::reward::error::{ProgramError, excerpt};

/// Words for numbers that are none in JSON, as Python's `json`, C and others write them.
const NOT_JSON: &[&str] = &["NaN", "nan", "-nan", "Infinity", "-Infinity", "inf", "-inf"];
/// How many places of a line are tried as the start of an answer.
const MOST_STARTS: usize = 64;

/// What was taken with a grain of salt while answers were read.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Leniency {
    /// Lines of standard output, or parts of them, that were no answer.
    pub(super) ignored: u64,
    /// The last of them.
    pub(super) last_ignored: String,
    /// Scores that were NaN.
    pub(super) nans: u64,
    /// Scores that were texts.
    pub(super) texts: u64,
}

impl Leniency {
    fn ignore(&mut self, text: &str) {
        self.ignored += 1;
        self.last_ignored = excerpt(text.trim());
    }
}

/// The scores in a line, `None` if the line is no answer.
///
/// # Errors
/// If it is an answer, but not one to request `id` with `expected` scores.
pub(super) fn scores(
    id: u64,
    line: &str,
    expected: usize,
    leniency: &mut Leniency,
) -> Result<Option<Vec<Option<f64>>>, ProgramError> {
    let not_an_answer = |reason: String| ProgramError::NotAnAnswer { id, reason, line: excerpt(line) };
    let Answer { fields: answer, around } = match find(line) {
        Ok(Some(found)) => found,
        Ok(None) => {
            leniency.ignore(line);
            return Ok(None);
        }
        Err(error) => return Err(not_an_answer(format!("it is not JSON ({error})"))),
    };
    match answer.get("id") {
        Some(given) if is_id(given, id) => {}
        Some(given) => {
            let given_id = given.as_u64();
            let late = if given_id.is_some_and(|given| given < id) { ", an answer to an earlier request" } else { "" };
            return Err(not_an_answer(format!("its `id` is {}{late}", excerpt(&given.to_string()))));
        }
        None => return Err(not_an_answer("it has no `id`".to_owned())),
    }
    if let Some(message) = answer.get("error").filter(|e| !e.is_null()) {
        let message = message.as_str().map_or_else(|| message.to_string(), str::to_owned);
        return Err(ProgramError::Refused { id, message });
    }
    let Some(scores) = answer.get("scores").and_then(Value::as_array) else {
        return Err(not_an_answer("it has no list `scores`".to_owned()));
    };
    if scores.len() != expected {
        return Err(ProgramError::Count { id, got: scores.len(), expected });
    }
    if !around.is_empty() {
        leniency.ignore(&around);
    }
    let read =
        |(index, score)| read_score(score, leniency).ok_or_else(|| ProgramError::Score { id, index, got: show(score) });
    scores.iter().enumerate().map(read).collect::<Result<_, _>>().map(Some)
}

/// Whether an answer's `id` is that of the request; languages without integers write 1 as 1.0 or as a text.
fn is_id(given: &Value, id: u64) -> bool {
    given.as_f64() == Some(id as f64) || given.as_str().is_some_and(|text| text.trim().parse() == Ok(id))
}

/// One score: `Some(None)` where the reward does not apply, `None` if it is no score.
#[expect(clippy::option_option, reason = "a score may be absent, and a value may be no score")]
fn read_score(value: &Value, leniency: &mut Leniency) -> Option<Option<f64>> {
    // Trained on in f32: what is infinite there would make every advantage of its group NaN.
    let finite = |number: f64| (number.abs() <= f64::from(f32::MAX)).then_some(Some(number));
    match value {
        Value::Null => Some(None),
        Value::Bool(flag) => Some(Some(f64::from(u8::from(*flag)))),
        Value::Number(number) => finite(number.as_f64()?),
        Value::String(text) => {
            let word = unwrapped(text.trim());
            let score = match word.to_ascii_lowercase().as_str() {
                "nan" | "-nan" => {
                    leniency.nans += 1;
                    return Some(None);
                }
                "none" | "null" => Some(None),
                "true" => Some(Some(1.0)),
                "false" => Some(Some(0.0)),
                _ => finite(word.parse().ok()?),
            };
            leniency.texts += u64::from(score.is_some());
            score
        }
        _ => None,
    }
}

/// `0.5` of `np.float64(0.5)`, `tensor(0.5)` and `array(0.5, dtype=float32)`: a number as Python libraries show it.
fn unwrapped(text: &str) -> &str {
    let Some((name, inside)) = text.strip_suffix(')').and_then(|text| text.split_once('(')) else { return text };
    let is_name = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.');
    if is_name { inside.split(',').next().unwrap_or(inside).trim() } else { text }
}

fn show(score: &Value) -> String {
    match score {
        Value::String(word) if word.parse::<f64>().is_ok_and(f64::is_infinite) => word.clone(),
        other => excerpt(&other.to_string()),
    }
}

/// An object that means to be an answer, and the text around it on its line.
struct Answer {
    fields: Map<String, Value>,
    around: String,
}

/// The object in a line that means to be an answer, and the text around it.
///
/// # Errors
/// If the line speaks of scores and is not JSON.
fn find(line: &str) -> Result<Option<Answer>, serde_json::Error> {
    let line = line.trim();
    let is_answer = |object: &Map<String, Value>| object.contains_key("scores") || object.contains_key("error");
    let (mut broken, mut passed) = (None, 0);
    for (start, _) in line.match_indices('{').take(MOST_STARTS) {
        if start < passed {
            continue;
        }
        let text = with_quoted_words(&line[start..]);
        let mut values = serde_json::Deserializer::from_str(&text).into_iter::<Value>();
        match values.next() {
            Some(Ok(Value::Object(object))) if is_answer(&object) || (start == 0 && object.contains_key("id")) => {
                let after = text[values.byte_offset()..].trim().to_owned();
                let around = format!("{}{after}", line[..start].trim());
                return Ok(Some(Answer { fields: object, around }));
            }
            // A JSON object of another kind is a message, with all that is inside it.
            Some(Ok(_)) => passed = start + values.byte_offset(),
            Some(Err(error)) if start == 0 && line.contains("scores") => broken = Some(error),
            _ => {}
        }
    }
    broken.map_or(Ok(None), Err)
}

/// The text with words and numbers that JSON does not have (`NaN`, `1e999`) in quotes.
fn with_quoted_words(text: &str) -> Cow<'_, str> {
    let is_in_word = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'+' | b'.');
    let bytes = text.as_bytes();
    let (mut out, mut copied, mut at, mut is_in_string) = (String::new(), 0, 0, false);
    while at < bytes.len() {
        match bytes[at] {
            b'\\' if is_in_string => at += 2,
            b'"' => {
                is_in_string = !is_in_string;
                at += 1;
            }
            byte if !is_in_string && is_in_word(&byte) => {
                let end = bytes[at..].iter().position(|b| !is_in_word(b)).map_or(bytes.len(), |length| at + length);
                let word = &text[at..end];
                let is_infinite = || word.parse::<f64>().is_ok_and(f64::is_infinite);
                if NOT_JSON.contains(&word) || is_infinite() {
                    out.push_str(&text[copied..at]);
                    out.extend(["\"", word, "\""]);
                    copied = end;
                }
                at = end;
            }
            _ => at += 1,
        }
    }
    if out.is_empty() {
        return Cow::Borrowed(text);
    }
    out.push_str(&text[copied..]);
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str, count: usize) -> (Result<Option<Vec<Option<f64>>>, String>, Leniency) {
        let mut leniency = Leniency::default();
        let scores = scores(3, line, count, &mut leniency).map_err(|error| error.to_string());
        (scores, leniency)
    }

    #[test]
    fn numbers_of_every_kind_are_scores() {
        for (text, score) in [
            ("true", Some(1.0)),
            ("false", Some(0.0)),
            ("1", Some(1.0)),
            ("-3e-2", Some(-0.03)),
            ("null", None),
            ("NaN", None),
            ("nan", None),
            ("-nan", None),
            ("\"nan\"", None),
            ("\"None\"", None),
            ("\"0.25\"", Some(0.25)),
            ("\" True \"", Some(1.0)),
            ("\"np.float64(0.5)\"", Some(0.5)),
            ("\"tensor(-1.)\"", Some(-1.0)),
            ("\"array(0.5, dtype=float32)\"", Some(0.5)),
            ("3.4e38", Some(3.4e38)),
        ] {
            let (scores, _) = read(&format!("{{\"id\": 3, \"scores\": [{text}]}}"), 1);
            assert_eq!(scores, Ok(Some(vec![score])), "{text}");
        }
    }

    #[test]
    fn what_is_no_finite_number_is_named() {
        for (text, got) in [
            ("Infinity", "the score Infinity"),
            ("-Infinity", "the score -Infinity"),
            ("inf", "the score inf"),
            ("1e999", "the score 1e999"),
            ("1e39", "the score 1e+39"),
            ("\"high\"", "the score \"high\""),
            ("\"\"", "the score \"\""),
            ("\"inf\"", "the score inf"),
            ("[0.5]", "the score [0.5]"),
            ("{}", "the score {}"),
        ] {
            let (scores, _) = read(&format!("{{\"id\": 3, \"scores\": [0, {text}]}}"), 2);
            let message = scores.expect_err(text);
            assert!(message.contains("gave sample 1 of request 3") && message.contains(got), "{text}: {message}");
        }
    }

    #[test]
    fn lines_that_are_no_answer_are_counted_and_passed_over() {
        for line in [
            "",
            "hello",
            "[1, 2]",
            "{",
            "{not json}",
            "{\"loss\": 0.5}",
            "{\"loss\": {\"scores\": [1, 2]}}",
            "\u{fffd}\u{fffd}\0\u{1}",
            "100%|##########| 3/3 {it}",
            "12",
            "NaN",
        ] {
            let (scores, leniency) = read(line, 2);
            assert_eq!((scores, leniency.ignored), (Ok(None), 1), "{line}");
        }
    }

    #[test]
    fn an_answer_is_found_beside_what_was_printed_on_its_line() {
        for (line, ignored) in [
            ("{\"id\": 3, \"scores\": [1, 2]}", 0),
            ("  {\"scores\": [1, 2.0], \"id\": 3}  ", 0),
            ("{\"id\": 3.0, \"scores\": [1, 2]}", 0),
            ("{\"id\": \"3\", \"scores\": [1, 2]}", 0),
            ("seen {2}: {\"id\": 3, \"scores\": [1, 2]}", 1),
            ("seen {\"a\": {\"scores\": [0]}} {\"id\": 3, \"scores\": [1, 2]}", 1),
            ("{'a': 1}{\"id\": 3, \"scores\": [1, 2]}done", 1),
            ("\"open {\"id\": 3, \"scores\": [1, 2]}", 1),
        ] {
            let (scores, leniency) = read(line, 2);
            assert_eq!(scores, Ok(Some(vec![Some(1.0), Some(2.0)])), "{line}");
            assert_eq!(leniency.ignored, ignored, "{line}");
        }
    }

    #[test]
    fn words_inside_texts_stay() {
        let text = r#"{"a": "NaN \" inf", "b": NaN, "c": -1.5e3, "d": true}"#;
        assert_eq!(with_quoted_words(text), r#"{"a": "NaN \" inf", "b": "NaN", "c": -1.5e3, "d": true}"#);
        assert_eq!(with_quoted_words("\"ends in \\"), "\"ends in \\");
    }
}
