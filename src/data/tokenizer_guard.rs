//! A tokenizer file is a stranger's: what the `tokenizers` crate would panic, hang or fill memory on is refused or caught
//! here, and named.

use serde_json::Value;

use super::Error;
use super::guard::caught;

/// Token ids are below this. The largest vocabularies have a few hundred thousand; tables are kept for every id.
const MOST_IDS: usize = 1 << 23;
/// Deepest nesting of a tokenizer.json; published ones have about seven levels.
const MOST_DEPTH: usize = 24;
/// Product of the repetition counts of a pattern, and its longest text.
const MOST_REPEATS: u64 = 10_000;
const MOST_PATTERN: usize = 1 << 16;

/// Runs code of the crate; a panic in it becomes an error.
pub(super) fn guarded<T>(what: &str, run: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    caught(run).unwrap_or_else(|reason| {
        let problem = format!("it is broken, and the `tokenizers` crate fails on it: {reason}");
        Err(Error::Tokenizer { what: what.into(), problem })
    })
}

/// Refuses a tokenizer.json that is nested absurdly, or has patterns or ids that would take all time or memory.
///
/// # Errors
/// What is wrong, as a sentence.
pub(super) fn check_file(bytes: &[u8]) -> Result<(), String> {
    let (mut depth, mut in_string, mut is_escaped) = (0usize, false, false);
    for &byte in bytes {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' if in_string => is_escaped = true,
            b'"' => in_string = !in_string,
            b'[' | b'{' if !in_string => depth += 1,
            b']' | b'}' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > MOST_DEPTH {
            return Err(format!("it is nested more than {MOST_DEPTH} levels deep"));
        }
    }
    let file: Value = serde_json::from_slice(bytes).map_err(|e| format!("not JSON: {e}"))?;
    let Some(fields) = file.as_object() else { return Err("not a JSON object".into()) };
    let added = fields.get("added_tokens").and_then(Value::as_array).into_iter().flatten();
    let mut ids: Box<dyn Iterator<Item = &Value>> = Box::new(added.filter_map(|token| token.get("id")));
    if let Some(vocabulary) = fields.get("model").and_then(|model| model.get("vocab")).and_then(Value::as_object) {
        ids = Box::new(ids.chain(vocabulary.values()));
    }
    if let Some(id) = ids.find(|id| id.as_u64().is_none_or(|id| id >= MOST_IDS as u64)) {
        return Err(format!("it has the token id {id}; ids are whole numbers below {MOST_IDS}"));
    }
    fields.iter().filter(|(name, _)| *name != "model").try_for_each(|(_, part)| check_patterns(part))
}

fn check_patterns(value: &Value) -> Result<(), String> {
    match value {
        Value::Object(fields) => {
            if let Some(Value::String(pattern)) = fields.get("Regex") {
                check_pattern(pattern)?;
            }
            fields.values().try_for_each(check_patterns)
        }
        Value::Array(items) => items.iter().try_for_each(check_patterns),
        _ => Ok(()),
    }
}

fn check_pattern(pattern: &str) -> Result<(), String> {
    let counts = pattern.split('{').skip(1).filter_map(|rest| rest.split_once('}'));
    let largest = |inner: &str| inner.split(',').filter_map(|count| count.trim().parse::<u64>().ok()).max();
    let product = counts
        .filter_map(|(inner, _)| {
            // Digits that do not fit a number are too many in any case.
            let is_count = !inner.is_empty() && inner.bytes().all(|b| b.is_ascii_digit() || b == b',' || b == b' ');
            is_count.then(|| largest(inner).unwrap_or(u64::MAX).max(1))
        })
        .fold(1u64, u64::saturating_mul);
    if product > MOST_REPEATS || pattern.len() > MOST_PATTERN {
        let shown: String = pattern.chars().take(60).collect();
        return Err(format!("its pattern `{shown}` repeats more than {MOST_REPEATS} times or is too long"));
    }
    Ok(())
}

/// Refuses a vocabulary whose largest id is absurd.
pub(super) fn check_ids(largest: Option<u32>) -> Result<(), Error> {
    match largest {
        Some(id) if id as usize >= MOST_IDS => Err(Error::Tokenizer {
            what: "vocabulary".into(),
            problem: format!("it has the token id {id}; ids are below {MOST_IDS}"),
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_would_take_all_memory_or_time_are_refused() {
        let message = |text: &str| check_file(text.as_bytes()).unwrap_err();
        assert!(message(&"[".repeat(5000)).contains("levels deep"));
        assert!(message(r#"{"added_tokens": [{"id": 4000000000, "content": "x"}]}"#).contains("token id 4000000000"));
        assert!(message(r#"{"model": {"vocab": {"a": -1}}}"#).contains("token id -1"));
        assert!(message(r#"{"pre_tokenizer": {"pattern": {"Regex": "(?:(?=a)a){100000000}"}}}"#).contains("repeats"));
        assert!(message(r#"{"x": [{"Regex": "((a{1000}){1000}){1000}"}]}"#).contains("repeats"));
        assert!(message("[]").contains("not a JSON object"));
        assert!(message("{").contains("not JSON"));
        check_file(r#"{"x": {"Regex": "\\p{N}{1,3}|\\s{2}"}, "model": {"vocab": {"[{[{[{": 1}}}"#.as_bytes()).unwrap();
    }

    #[test]
    fn a_panic_is_an_error_with_its_text() {
        let caught = guarded("tokenizer", || -> Result<(), Error> { panic!("boom {}", 1) });
        assert!(caught.unwrap_err().to_string().contains("(boom 1)"));
        assert_eq!(guarded("tokenizer", || Ok(3)).unwrap(), 3);
    }
}
