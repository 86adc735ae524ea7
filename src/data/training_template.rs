//! Marks on what the assistant writes, for templates that have none.
//!
//! For the families whose templates are known here (Qwen2.5, Qwen3, DeepSeek-R1-Distill), [`mark_turns`] rewrites the
//! template's text: `{% generation %}` blocks go around the statements that print an assistant turn. Where the original
//! leaves out earlier reasoning (Qwen3 in turns before the last question, R1 everywhere), the rewritten template prints
//! it, because what is trained on must be what the model writes, and every turn must be a prefix of the next. The masks
//! equal those of TRL's training templates (golden group `chat`). Only training reads the rewritten text; the original
//! is what gets saved.

/// The template with `{% generation %}` blocks, or `None` if it is not of a known family.
pub(super) fn mark_turns(source: &str) -> Option<String> {
    mark_qwen2(source).or_else(|| mark_qwen3(source)).or_else(|| mark_r1_distill(source))
}

/// Qwen2.5: a turn without tool calls is printed by the statement that also prints the user's; a turn with tool calls
/// has a branch of its own. The header `<|im_start|>assistant` stays outside.
fn mark_qwen2(source: &str) -> Option<String> {
    const PLAIN: &str = r"{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}";
    const BRANCH: &str = r#"{%- elif message.role == "assistant" %}"#;
    const NEXT: &str = r#"{%- elif message.role == "tool" %}"#;
    const OPEN: &str = r#"{%- generation "<|im_start|>assistant" %}"#;
    let at = source.find(PLAIN)?;
    let (head, rest) = (&source[..at], &source[at + PLAIN.len()..]);
    let branch = rest.find(BRANCH)? + BRANCH.len();
    let next = branch + rest[branch..].find(NEXT)?;
    let (between, body, tail) = (&rest[..branch], &rest[branch..next], &rest[next..]);
    Some(format!(
        "{head}{{%- if message.role == \"assistant\" %}}{OPEN}{PLAIN}{{%- endgeneration %}}{{%- else %}}{PLAIN}{{%- endif %}}\
         {between}{OPEN}{body}{{%- endgeneration %}}{tail}"
    ))
}

/// Qwen3: one branch prints every assistant turn; the header `<|im_start|>assistant` and its newline stay outside.
/// The reasoning block is printed in every turn.
fn mark_qwen3(source: &str) -> Option<String> {
    const BRANCH: &str = r#"{%- elif message.role == "assistant" %}"#;
    const NEXT: &str = r#"{%- elif message.role == "tool" %}"#;
    const HEADER: &str = "'<|im_start|>' + message.role + '\\n";
    const OPEN: &str = r#"{%- generation "<|im_start|>assistant\n" %}"#;
    const REASONING_CONDITIONS: [&str; 3] = [
        "{%- if loop.index0 > ns.last_query_index %}",
        "{%- if loop.last or (not loop.last and reasoning_content) %}",
        "{%- if reasoning_content %}",
    ];
    let branch = source.find(BRANCH)? + BRANCH.len();
    let next = branch + source[branch..].find(NEXT)?;
    let mut body = source[branch..next].to_string();
    if !body.contains(HEADER) {
        return None;
    }
    for condition in REASONING_CONDITIONS {
        body = body.replace(condition, "{%- if true %}");
    }
    Some(format!("{}{OPEN}{body}{{%- endgeneration %}}{}", &source[..branch], &source[next..]))
}

/// DeepSeek's distills: two branches, with and without tool calls; everything they print is marked, the header too, as
/// TRL does. The statement that cuts the reasoning off is left out.
fn mark_r1_distill(source: &str) -> Option<String> {
    const CALLS: &str = "{%- if message['role'] == 'assistant' and message['content'] is none %}";
    const PLAIN: &str = "{%- if message['role'] == 'assistant' and message['content'] is not none %}";
    const NEXT: &str = "{%- if message['role'] == 'tool' %}";
    const END: &str = "{%- endif %}";
    const CUT: &str = "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}";
    let calls = source.find(CALLS)? + CALLS.len();
    let plain = calls + source[calls..].find(PLAIN)?;
    let next = plain + source[plain..].find(NEXT)?;
    // Both branches end with `endif`, directly before the next one starts.
    let calls_body = source[calls..plain].strip_suffix(END)?;
    let plain_body = source[plain + PLAIN.len()..next].strip_suffix(END)?;
    let wrap = |body: &str| format!("{{%- generation %}}{body}{{%- endgeneration %}}");
    Some(format!(
        "{}{}{END}{PLAIN}{}{END}{}",
        &source[..calls],
        wrap(calls_body),
        wrap(&plain_body.replace(CUT, "")),
        &source[next..]
    ))
}

#[cfg(test)]
mod tests {
    use super::mark_turns;
    use crate::data::{ChatTemplate, SpecialTokens};

    #[test]
    fn a_relative_whose_answers_are_printed_elsewhere_is_not_of_the_family() {
        // In the manner of QwQ: Qwen2.5's statement prints the user's turns, another one the assistant's.
        let source = r"{%- for message in messages %}{%- if message.role == 'user' %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- elif message.role == 'assistant' and not message.tool_calls %}{{- message.content.split('</think>')[-1] }}" .to_string()
            + r#"{%- elif message.role == "assistant" %}{{- 'calls' }}{%- elif message.role == "tool" %}{{- message.content }}{%- endif %}{%- endfor %}"#;
        assert!(mark_turns(&source).is_some(), "its text looks like the family's");
        let template = ChatTemplate::new(&source, &SpecialTokens::default()).unwrap();
        assert!(template.for_training().unwrap().is_none());
        assert!(template.for_assistant_masks().unwrap_err().to_string().contains("not of a family known"));
    }

    #[test]
    fn an_unknown_template_is_not_rewritten() {
        assert_eq!(mark_turns("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"), None);
        // A template that only looks like a known one in parts.
        assert_eq!(mark_turns(r#"{%- elif message.role == "assistant" %}x{%- elif message.role == "tool" %}"#), None);
    }
}
