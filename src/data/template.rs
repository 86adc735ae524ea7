//! Chat templates: a conversation to the model's text.
//!
//! [`ChatTemplate`] renders Hugging Face chat templates as transformers does: Jinja with `trim_blocks` and
//! `lstrip_blocks`, Python's string methods, `tojson` as `json.dumps(ensure_ascii=False)`, `raise_exception`,
//! `strftime_now`, and `{% generation %}` blocks, whose character ranges tell which tokens the assistant wrote. SFT and
//! GRPO preparation, `generate` and the rollout's tools call it.
//!
//! How the ranges are found: `{% generation %}` becomes a filter block whose filter puts a noncharacter of Unicode that
//! the conversation does not contain before and after the block's text; the marks are taken out of the rendered text.

use std::ops::Range;
use std::path::Path;
use std::sync::LazyLock;

use fancy_regex::Regex;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{Environment, State, Value as TemplateValue};
use serde_json::{Map, Value};

use super::Error;
use super::python_json::{JsonStyle, to_python_json};
use super::template_value::{from_json, to_json};
use super::tokenizer::{SpecialTokens, Tokenizer};
use super::training_template;

/// A parsed chat template with the special tokens it may print.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: String,
    environment: Environment<'static>,
    special: SpecialTokens,
    is_marked: bool,
}

/// What a template sees besides the messages.
#[derive(Clone, Copy, Debug, Default)]
pub struct RenderOptions<'a> {
    /// End with the header of the assistant's next turn.
    pub add_generation_prompt: bool,
    /// Tool schemas, a JSON array; `None` where there are none.
    pub tools: Option<&'a Value>,
    /// Extra variables, e.g. `enable_thinking`.
    pub variables: Option<&'a Map<String, Value>>,
}

/// A rendered conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// The assistant's parts, in characters (not bytes), in order.
    pub assistant: Vec<Range<usize>>,
}

const TEMPLATE: &str = "chat_template";
const MARK_FILTER: &str = "mark_generation";
const MARK_OPEN: &str = "generation_mark_open";
const MARK_CLOSE: &str = "generation_mark_close";

static GENERATION_TAG: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").expect("the pattern is a constant that a test compiles")
});

impl ChatTemplate {
    /// Parses a template.
    ///
    /// # Errors
    /// If it is not a Jinja template; the message has the line.
    pub fn new(source: &str, special: &SpecialTokens) -> Result<Self, Error> {
        let is_marked = GENERATION_TAG.is_match(source).unwrap_or(false) || source.contains(MARK_FILTER);
        let mut environment = environment();
        let text = GENERATION_TAG.replace_all(source, |tag: &fancy_regex::Captures<'_>| {
            let part = |index| tag.get(index).map_or("", |m| m.as_str());
            match part(2) {
                "end" => format!("{{%{} endfilter {}%}}", part(1), part(3)),
                _ => format!("{{%{} filter {MARK_FILTER} {}%}}", part(1), part(3)),
            }
        });
        environment
            .add_template_owned(TEMPLATE, text.into_owned())
            .map_err(|e| Error::Template(format!("cannot parse: {e:#}")))?;
        Ok(Self { source: source.to_string(), environment, special: special.clone(), is_marked })
    }

    /// Reads a template file.
    ///
    /// # Errors
    /// If the file cannot be read, or as [`ChatTemplate::new`].
    pub fn from_file(path: &Path, special: &SpecialTokens) -> Result<Self, Error> {
        let source = std::fs::read_to_string(path).map_err(crate::fs::io_error("read", path))?;
        Self::new(&source, special)
    }

    /// The template of a model: `path` if given, else `chat_template.jinja` (or `chat_template.json`) of the model
    /// folder, else the one in its `tokenizer_config.json` (`default` where there are several) or GGUF metadata.
    /// `None` where the model has none.
    ///
    /// # Errors
    /// If the template cannot be read or parsed.
    pub fn find(path: Option<&Path>, folder: Option<&Path>, tokenizer: &Tokenizer) -> Result<Option<Self>, Error> {
        let special = tokenizer.special();
        if let Some(path) = path {
            return Self::from_file(path, special).map(Some);
        }
        if let Some(folder) = folder {
            let file = folder.join("chat_template.jinja");
            if file.is_file() {
                return Self::from_file(&file, special).map(Some);
            }
            let file = folder.join("chat_template.json");
            if file.is_file() {
                let bytes = std::fs::read(&file).map_err(crate::fs::io_error("read", &file))?;
                let object: Value = serde_json::from_slice(&bytes)
                    .map_err(|e| Error::Content { path: file.clone(), problem: format!("not JSON: {e}") })?;
                if let Some(source) = object.get("chat_template").and_then(Value::as_str) {
                    return Self::new(source, special).map(Some);
                }
            }
        }
        tokenizer.config_template("default").map(|source| Self::new(source, special)).transpose()
    }

    /// The template's text, as it is to be saved with the model.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether the template says itself, by `{% generation %}` blocks, what the assistant writes.
    pub fn is_marked(&self) -> bool {
        self.is_marked
    }

    /// A template that marks the assistant's turns: this one if it does so itself, else the variant for training of a
    /// known family (Qwen2.5, Qwen3, DeepSeek-R1-Distill), which prints reasoning wherever the assistant wrote some.
    ///
    /// # Errors
    /// If the family is not known.
    pub fn for_assistant_masks(&self) -> Result<Self, Error> {
        if self.is_marked {
            return Self::new(&self.source, &self.special);
        }
        let source = training_template::mark_turns(&self.source).ok_or_else(|| {
            Error::Template(
                "`assistant_only_loss` needs to know what the assistant wrote, but this template has no `{% generation \
                 %}` blocks and is not of a family known here (Qwen2.5, Qwen3, DeepSeek-R1-Distill); give \
                 `chat_template_path` with a template that has them"
                    .into(),
            )
        })?;
        Self::new(&source, &self.special)
    }

    /// Renders a conversation.
    ///
    /// # Errors
    /// If the template raises an exception or meets something it cannot print.
    pub fn render(&self, messages: &Value, options: RenderOptions<'_>) -> Result<String, Error> {
        Ok(self.render_marked(messages, options)?.text)
    }

    /// Renders a conversation and finds the assistant's parts.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render_marked(&self, messages: &Value, options: RenderOptions<'_>) -> Result<Rendered, Error> {
        let marks = if self.is_marked { Some(unused_marks(messages, options)?) } else { None };
        let mut context: Map<String, Value> = Map::new();
        for (name, text) in &self.special.strings {
            context.insert(name.clone(), Value::String(text.clone()));
        }
        context.insert("tools".into(), Value::Null);
        context.insert("documents".into(), Value::Null);
        for (name, value) in options.variables.into_iter().flatten() {
            context.insert(name.clone(), value.clone());
        }
        context.insert("messages".into(), messages.clone());
        if let Some(tools) = options.tools {
            context.insert("tools".into(), tools.clone());
        }
        context.insert("add_generation_prompt".into(), Value::Bool(options.add_generation_prompt));
        if let Some((open, close)) = marks {
            context.insert(MARK_OPEN.into(), Value::String(open.into()));
            context.insert(MARK_CLOSE.into(), Value::String(close.into()));
        }
        let template = self.environment.get_template(TEMPLATE).map_err(|e| Error::Template(e.to_string()))?;
        let text = template.render(from_json(&Value::Object(context))).map_err(|e| Error::Template(explain(&e)))?;
        Ok(match marks {
            Some((open, close)) => take_marks(&text, open, close),
            None => Rendered { text, assistant: Vec::new() },
        })
    }
}

/// Which tokens come from the assistant's characters: as transformers' `return_assistant_tokens_mask`, a token counts
/// from the one that holds a range's first character to the first one that holds its last.
///
/// # Shapes
/// `chars`: per token its first character and the one after its last. Returns one entry per token.
pub fn assistant_mask(chars: &[(usize, usize)], assistant: &[Range<usize>]) -> Vec<bool> {
    let mut mask = vec![false; chars.len()];
    let token_at = |position: usize| chars.iter().position(|&(start, end)| (start..end).contains(&position));
    for range in assistant {
        let Some(first) = token_at(range.start) else { break };
        let Some(last_char) = range.end.checked_sub(1) else { continue };
        // transformers reads a missing end, and an end at token 0, as "to the end".
        let end = match token_at(last_char) {
            Some(last) if last > 0 => last + 1,
            _ => chars.len(),
        };
        mask[first.min(end)..end].fill(true);
    }
    mask
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("only whitespace differs from the default syntax"));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", tojson);
    environment.add_filter(MARK_FILTER, mark_generation);
    environment.add_function("raise_exception", |message: String| -> Result<TemplateValue, minijinja::Error> {
        Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: String| jiff::Zoned::now().strftime(&format).to_string());
    environment
}

/// `tojson` as transformers defines it: `json.dumps` with its arguments, without HTML escapes.
#[expect(clippy::needless_pass_by_value, reason = "the signature of a template filter")]
fn tojson(value: &TemplateValue, arguments: Kwargs) -> Result<String, minijinja::Error> {
    let invalid = |message: String| minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, message);
    let json = to_json(value)?;
    let separators: Option<Vec<String>> = arguments.get("separators")?;
    let style = JsonStyle {
        ensure_ascii: arguments.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        indent: arguments.get("indent")?,
        separators: match separators.as_deref() {
            Some([item, key]) => Some((item.clone(), key.clone())),
            Some(other) => return Err(invalid(format!("tojson: separators has {} parts, expected 2", other.len()))),
            None => None,
        },
        sort_keys: arguments.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    arguments.assert_all_used()?;
    Ok(to_python_json(&json, &style))
}

/// Puts marks around the text of a `{% generation %}` block; with `after`, a header at its start stays outside.
#[expect(clippy::needless_pass_by_value, reason = "the signature of a template filter")]
fn mark_generation(state: &State<'_, '_>, text: String, arguments: Kwargs) -> Result<String, minijinja::Error> {
    let header: Option<String> = arguments.get("after")?;
    arguments.assert_all_used()?;
    let mark = |name| state.lookup(name).and_then(|m| m.as_str().map(str::to_string)).unwrap_or_default();
    let (head, body) = match header.as_deref().and_then(|header| Some((header, text.strip_prefix(header)?))) {
        Some((head, body)) => (head, body),
        None => ("", text.as_str()),
    };
    Ok(format!("{head}{}{body}{}", mark(MARK_OPEN), mark(MARK_CLOSE)))
}

/// Two noncharacters (U+FDD0 to U+FDEF) that occur nowhere in what is rendered.
fn unused_marks(messages: &Value, options: RenderOptions<'_>) -> Result<(char, char), Error> {
    let mut used = [false; 32];
    let mut note = |value: &Value| {
        visit_strings(value, &mut |text| {
            // All of them start with these two bytes in UTF-8.
            if text.as_bytes().windows(2).any(|pair| pair == [0xEF, 0xB7]) {
                for character in text.chars() {
                    if let Some(slot) = (character as usize).checked_sub(0xFDD0).filter(|&s| s < 32) {
                        used[slot] = true;
                    }
                }
            }
        });
    };
    note(messages);
    options.tools.into_iter().for_each(&mut note);
    options.variables.into_iter().flat_map(|v| v.values()).for_each(&mut note);
    let mut free = (0u32..32).filter(|&slot| !used[slot as usize]).filter_map(|slot| char::from_u32(0xFDD0 + slot));
    match (free.next(), free.next()) {
        (Some(open), Some(close)) => Ok((open, close)),
        _ => Err(Error::Template(
            "the conversation uses all of Unicode's noncharacters U+FDD0 to U+FDEF, two of which are needed to mark the \
             assistant's turns; remove them from the data"
                .into(),
        )),
    }
}

fn visit_strings(value: &Value, visit: &mut impl FnMut(&str)) {
    match value {
        Value::String(text) => visit(text),
        Value::Array(items) => items.iter().for_each(|item| visit_strings(item, visit)),
        Value::Object(fields) => {
            for (name, field) in fields {
                visit(name);
                visit_strings(field, visit);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// Takes the marks out of a rendered text and returns where they were.
fn take_marks(marked: &str, open: char, close: char) -> Rendered {
    let mut text = String::with_capacity(marked.len());
    let (mut position, mut starts, mut assistant) = (0, Vec::new(), Vec::new());
    for character in marked.chars() {
        if character == open {
            starts.push(position);
        } else if character == close {
            assistant.extend(starts.pop().map(|start| start..position));
        } else {
            text.push(character);
            position += 1;
        }
    }
    Rendered { text, assistant }
}

/// The message of a template error with its line and cause.
fn explain(error: &minijinja::Error) -> String {
    let line = error.line().map(|line| format!(" (line {line} of the template)")).unwrap_or_default();
    let reason = error.detail().map_or_else(|| error.kind().to_string(), str::to_string);
    format!("{reason}{line}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new(source, &SpecialTokens::default()).unwrap()
    }

    fn render(source: &str, messages: &Value) -> String {
        template(source).render(messages, RenderOptions::default()).unwrap()
    }

    #[test]
    fn tojson_is_python_s_json_dumps() {
        let value = json!([{"b": "é<>&'\"", "a": [1, 2.0, 1e20, true, null, {}], "c": []}]);
        assert_eq!(
            render("{{ messages | tojson }}", &value),
            r#"[{"b": "é<>&'\"", "a": [1, 2.0, 1e+20, true, null, {}], "c": []}]"#
        );
        assert_eq!(
            render(
                "{{ messages[0].a[:2] | tojson(indent=2) }}|{{ messages[0] | tojson(sort_keys=true, ensure_ascii=true, separators=[',', ':']) }}",
                &value
            ),
            "[\n  1,\n  2.0\n]|{\"a\":[1,2.0,1e+20,true,null,{}],\"b\":\"\\u00e9<>&'\\\"\",\"c\":[]}"
        );
    }

    #[test]
    fn a_template_that_raises_gives_its_message_and_line() {
        let source = "{% if messages|length > 1 %}\n{{ raise_exception('roles must alternate') }}{% endif %}";
        let error = template(source).render(&json!([1, 2]), RenderOptions::default()).unwrap_err().to_string();
        assert_eq!(error, "chat template: roles must alternate (line 2 of the template)");
    }

    #[test]
    fn variables_tools_and_special_tokens_reach_the_template() {
        let mut special = SpecialTokens::default();
        special.strings.insert("bos_token".into(), "<s>".into());
        let template = ChatTemplate::new(
            "{{ bos_token }}{{ flag }}{{ tools is none }}{{ documents is none }}{{ missing }}{{ add_generation_prompt }}",
            &special,
        )
        .unwrap();
        let variables = json!({"flag": false}).as_object().unwrap().clone();
        let options = RenderOptions { variables: Some(&variables), add_generation_prompt: true, tools: None };
        assert_eq!(template.render(&json!([]), options).unwrap(), "<s>FalseTrueTrueTrue");
    }

    #[test]
    fn generation_blocks_give_character_ranges_and_leave_no_trace() {
        let template = template(
            "{% for m in messages %}é{% generation %}{{ m.content }}{% endgeneration %}\n{%- generation -%} x {%- endgeneration %}{% endfor %}",
        );
        let messages = json!([{"content": "ab\u{FDD0}"}, {"content": ""}]);
        let rendered = template.render_marked(&messages, RenderOptions::default()).unwrap();
        assert_eq!(rendered.text, "éab\u{FDD0}xéx");
        assert_eq!(rendered.assistant, [1..4, 4..5, 6..6, 6..7]);
        assert!(template.is_marked());
    }

    #[test]
    fn masks_cover_whole_tokens_and_start_at_the_first_token_of_a_split_character() {
        // Tokens: "ab", a character in two byte tokens, "cd".
        let chars = [(0, 2), (2, 3), (2, 3), (3, 5)];
        assert_eq!(assistant_mask(&chars, &[1..4]), [true, true, true, true]);
        assert_eq!(assistant_mask(&chars, &[2..3]), [false, true, false, false]);
        assert_eq!(assistant_mask(&chars, &[3..5]), [false, false, false, true]);
        assert_eq!(assistant_mask(&chars, &[5..6]), [false; 4]);
        assert_eq!(assistant_mask(&chars, &[]), [false; 4]);
    }
}
