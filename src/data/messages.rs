//! Messages of a row in the form chat templates know: `role`, `content`, `tool_calls`, `reasoning_content`.
//!
//! Data sets name roles in many ways; those that the template does not know itself are read as the four that it does.
//! One thought written in three ways (`<think>` and `</think>`, the closing tag only, a field) becomes one.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::findings::Finding;
use super::rows::kind;

/// Names of roles by the role that they mean.
const ROLES: [(&str, &[&str]); 5] = [
    ("user", &["human", "user_message", "usr", "prompter", "customer", "instruction"]),
    (
        "assistant",
        &["gpt", "chatgpt", "bot", "chatbot", "model", "ai", "assistant_message", "bing", "bard", "claude", "llm"],
    ),
    (
        "tool",
        &[
            "observation",
            "function",
            "function_response",
            "function_result",
            "tool_response",
            "tool_result",
            "tool_output",
            "ipython",
            "environment",
        ],
    ),
    ("system", &["developer", "system_prompt", "sys"]),
    (FUNCTION_CALL, &["function_call", "tool_call", "function_calls", "tool_calls"]),
];
/// An assistant's turn whose content is the call.
const FUNCTION_CALL: &str = "assistant with a tool call";

/// Fields that hold a thought; the first is what chat templates read, as in transformers.
pub(super) const THOUGHT_FIELDS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

/// How to read messages for one template.
#[derive(Clone, Copy)]
pub(super) struct Reading<'a> {
    /// Whether the template knows a role by name.
    pub(super) knows_role: &'a dyn Fn(&str) -> bool,
    /// The template opens thoughts itself.
    pub(super) opens_thoughts: bool,
}

/// A message in the form of chat templates.
///
/// # Errors
/// What is wrong with the message, as the end of a sentence.
pub(super) fn turn(message: &Value, reading: Reading<'_>, findings: &mut BTreeSet<Finding>) -> Result<Value, String> {
    let Value::Object(fields) = message else {
        return Err(format!("is {}, expected an object with `role` and `content`", kind(message)));
    };
    let mut turn = Map::new();
    for (name, value) in fields {
        match (name.as_str(), value) {
            ("content" | "value", Value::Array(parts)) => {
                turn.insert("content".into(), Value::String(join_parts(parts)?));
            }
            ("content" | "value", Value::String(_) | Value::Null) => {
                turn.insert("content".into(), value.clone());
            }
            ("content" | "value", other) => return Err(format!("has {} as content, expected a string", kind(other))),
            (_, Value::Null) => {}
            ("role" | "from", Value::String(role)) => {
                turn.insert("role".into(), Value::String(role.clone()));
            }
            ("tool_calls", Value::String(text)) => {
                let calls = serde_json::from_str(text).ok().filter(Value::is_array);
                turn.insert("tool_calls".into(), calls.unwrap_or_else(|| value.clone()));
            }
            // Writers of Arrow files put an empty list where there is none.
            ("tool_calls", Value::Array(calls)) if calls.is_empty() => {}
            _ => {
                turn.insert(name.clone(), value.clone());
            }
        }
    }
    let Some(role) = turn.get("role").and_then(Value::as_str).map(str::to_string) else {
        let names: Vec<String> = fields.keys().map(|name| format!("`{name}`")).collect();
        return Err(format!("has no `role`; its fields are {}", names.join(", ")));
    };
    if let Some(known) = standard(&role, reading) {
        findings.insert(Finding::Role { from: role, to: known });
        let known = if known == FUNCTION_CALL {
            take_call(&mut turn);
            "assistant"
        } else {
            known
        };
        turn.insert("role".into(), json!(known));
    }
    if turn["role"] == "assistant" {
        open_thought(&mut turn, reading.opens_thoughts);
    }
    Ok(Value::Object(turn))
}

/// The role that a name means, where the template does not know the name itself.
fn standard(role: &str, reading: Reading<'_>) -> Option<&'static str> {
    let lower = role.to_lowercase().replace('-', "_");
    let known = ROLES.iter().find(|(known, names)| *known == lower || names.contains(&lower.as_str()))?.0;
    (known != role && !(reading.knows_role)(role)).then_some(known)
}

/// Turns a content that is a call written as JSON (`ShareGPT`'s `function_call`) into a tool call.
fn take_call(turn: &mut Map<String, Value>) {
    let content = turn.get("content").and_then(Value::as_str).unwrap_or_default();
    let calls = match serde_json::from_str::<Value>(content) {
        Ok(call @ Value::Object(_)) => vec![call],
        Ok(Value::Array(calls)) => calls,
        _ => return,
    };
    if calls.is_empty() || calls.iter().any(|call| !call["name"].is_string()) {
        return;
    }
    let calls: Vec<Value> = calls.into_iter().map(|call| json!({"type": "function", "function": call})).collect();
    turn.insert("content".into(), json!(""));
    turn.insert("tool_calls".into(), Value::Array(calls));
}

/// Gives a thought that has its closing tag only the opening one; takes it away where the template writes it.
fn open_thought(turn: &mut Map<String, Value>, template_opens: bool) {
    let Some(Value::String(content)) = turn.get_mut("content") else { return };
    let Some(close) = content.find(CLOSE) else { return };
    let thought = &content[..close];
    match (thought.find(OPEN), template_opens) {
        (None, false) => {
            let line = if thought.starts_with('\n') { "" } else { "\n" };
            *content = format!("{OPEN}{line}{content}");
        }
        (Some(_), true) if content.starts_with(OPEN) => {
            let rest = content[OPEN.len()..].trim_start_matches('\n').to_string();
            *content = rest;
        }
        _ => {}
    }
}

/// The thought that a turn has in a field: the field and its text.
pub(super) fn field_thought(turn: &Value) -> Option<(&'static str, &str)> {
    let text = |name: &&'static str| turn.get(*name).and_then(Value::as_str).map(|text| (*name, text));
    THOUGHT_FIELDS.iter().find_map(text).filter(|(_, text)| !text.trim().is_empty())
}

/// Whether a turn's content has a thought in tags.
pub(super) fn has_tagged_thought(turn: &Value) -> bool {
    turn.get("content").and_then(Value::as_str).is_some_and(|content| content.contains(CLOSE))
}

/// A turn whose thought stands in its content instead of a field.
pub(super) fn with_thought_in_content(turn: &Value, template_opens: bool) -> Value {
    let (Some((_, thought)), false) = (field_thought(turn), has_tagged_thought(turn)) else { return turn.clone() };
    let answer = turn.get("content").and_then(Value::as_str).unwrap_or_default();
    let open = if template_opens { String::new() } else { format!("{OPEN}\n") };
    let content = format!("{open}{}\n{CLOSE}\n\n{}", thought.trim_matches('\n'), answer.trim_start_matches('\n'));
    let mut turn = turn.clone();
    if let Value::Object(fields) = &mut turn {
        THOUGHT_FIELDS.iter().for_each(|name| drop(fields.shift_remove(*name)));
        fields.insert("content".into(), Value::String(content));
    }
    turn
}

/// A turn whose tags in the content are single characters that no template looks for.
pub(super) fn with_hidden_tags(turn: &Value, open: char, close: char) -> Value {
    let mut turn = turn.clone();
    if let Some(Value::String(content)) = turn.get_mut("content") {
        *content = content.replace(CLOSE, &close.to_string()).replace(OPEN, &open.to_string());
    }
    turn
}

/// Fills the fields that templates read a thought from, as transformers does (`_alias_reasoning_fields`).
pub(super) fn with_all_thought_fields(turn: &Value) -> Value {
    let thought = THOUGHT_FIELDS.iter().find_map(|name| turn.get(*name).filter(|thought| !thought.is_null()));
    let (Some(thought), Value::Object(fields)) = (thought, turn) else { return turn.clone() };
    let mut fields = fields.clone();
    fields.insert("reasoning_content".into(), thought.clone());
    fields.entry("thinking").or_insert_with(|| thought.clone());
    Value::Object(fields)
}

fn join_parts(parts: &[Value]) -> Result<String, String> {
    let text = |part: &Value| {
        let text = part.get("text").and_then(Value::as_str).or_else(|| part.as_str());
        text.map(str::to_string).ok_or_else(|| {
            let name = part.get("type").and_then(Value::as_str).unwrap_or("unknown");
            format!("has a part of type `{name}`; only text can be trained on")
        })
    };
    parts.iter().map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(message: impl Into<Value>, known: &[&str]) -> (Value, Vec<Finding>) {
        let mut findings = BTreeSet::new();
        let reading = Reading { knows_role: &|role| known.contains(&role), opens_thoughts: false };
        let turn = turn(&message.into(), reading, &mut findings).unwrap();
        (turn, findings.into_iter().collect())
    }

    #[test]
    fn roles_of_other_conventions_are_those_that_templates_know() {
        let cases = [
            ("human", "user"),
            ("Human", "user"),
            ("gpt", "assistant"),
            ("chatgpt", "assistant"),
            ("bot", "assistant"),
            ("model", "assistant"),
            ("observation", "tool"),
            ("function-response", "tool"),
            ("tool_response", "tool"),
            ("ipython", "tool"),
            ("developer", "system"),
            ("System", "system"),
        ];
        for (from, to) in cases {
            let (turn, findings) = read(json!({"from": from, "value": "x"}), &[]);
            assert_eq!(turn, json!({"role": to, "content": "x"}), "{from}");
            assert_eq!(findings, [Finding::Role { from: from.into(), to }], "{from}");
            let (turn, findings) = read(json!({"role": from, "content": "x"}), &[from]);
            assert_eq!((turn["role"].as_str(), findings.len()), (Some(from), 0), "{from} is the template's own");
        }
        for role in ["user", "assistant", "system", "tool", "critic"] {
            assert_eq!(read(json!({"role": role, "content": "x"}), &[]).1, [], "{role}");
        }
    }

    #[test]
    fn a_call_written_as_content_is_a_tool_call() {
        let call = r#"{"name": "add", "arguments": {"a": 1}}"#;
        let (turn, _) = read(json!({"from": "function_call", "value": call}), &[]);
        let function = json!({"name": "add", "arguments": {"a": 1}});
        assert_eq!(turn["tool_calls"], json!([{"type": "function", "function": function}]));
        assert_eq!(turn["role"], "assistant");
        let (turn, _) = read(json!({"from": "function_call", "value": "add(1)"}), &[]);
        assert_eq!(turn, json!({"role": "assistant", "content": "add(1)"}));
    }

    #[test]
    fn a_thought_without_its_opening_tag_gets_it_and_fields_become_content() {
        let whole = "<think>\nadd\n</think>\n\n5";
        let (turn, _) = read(json!({"role": "assistant", "content": "add\n</think>\n\n5"}), &[]);
        assert_eq!(turn["content"], whole);
        for field in THOUGHT_FIELDS {
            let (turn, _) = read(json!({"role": "assistant", "content": "5", field: "add"}), &[]);
            assert_eq!(field_thought(&turn), Some((field, "add")));
            let moved = with_thought_in_content(&turn, false);
            assert_eq!(moved, json!({"role": "assistant", "content": whole}));
            let aliased = with_all_thought_fields(&turn);
            assert_eq!((&aliased["reasoning_content"], &aliased["thinking"]), (&json!("add"), &json!("add")));
        }
        let hidden = with_hidden_tags(&json!({"content": whole}), '1', '2');
        assert_eq!(hidden["content"], "1\nadd\n2\n\n5");
    }
}
