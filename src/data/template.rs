//! Chat templates: a conversation to the model's text.
//!
//! [`ChatTemplate`] renders Hugging Face chat templates as transformers does (the engine is [`super::jinja`]), with
//! `{% generation %}` blocks, whose character ranges tell which tokens the assistant wrote. SFT and GRPO preparation,
//! `generate` and the rollout's tools call it.
//!
//! How the ranges are found: a noncharacter of Unicode that the conversation does not contain is printed before and
//! after the block's text; the marks are taken out of the rendered text.

use std::ops::Range;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::Error;
use super::jinja;
use super::tokenizer::{SpecialTokens, Tokenizer};
use super::training_template;

/// A parsed chat template with the special tokens it may print.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: String,
    parsed: jinja::Template,
    special: SpecialTokens,
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

impl ChatTemplate {
    /// Parses a template.
    ///
    /// # Errors
    /// If it is not a Jinja template; the message has the line.
    pub fn new(source: &str, special: &SpecialTokens) -> Result<Self, Error> {
        let parsed = jinja::Template::parse(source).map_err(|e| Error::Template(format!("cannot parse: it {e}")))?;
        Ok(Self { source: source.to_string(), parsed, special: special.clone() })
    }

    /// Reads a template file.
    ///
    /// # Errors
    /// If the file cannot be read, or as [`ChatTemplate::new`].
    pub fn from_file(path: &Path, special: &SpecialTokens) -> Result<Self, Error> {
        let bytes = std::fs::read(path).map_err(crate::fs::io_error("read", path))?;
        let problem = |problem: String| Error::Content { path: path.into(), problem };
        let source = std::str::from_utf8(&bytes)
            .map_err(|e| problem(format!("not a template: byte {} is not UTF-8", e.valid_up_to())))?;
        let source = source.strip_prefix('\u{feff}').unwrap_or(source);
        Self::new(source, special).map_err(|error| problem(error.to_string()))
    }

    /// The template of a folder: its `chat_template.jinja` (or `chat_template.json`), else the one in its
    /// `tokenizer_config.json` (`default` where there are several). `None` where it has none.
    ///
    /// # Errors
    /// If the template cannot be read or parsed.
    pub fn from_folder(folder: &Path, special: &SpecialTokens) -> Result<Option<Self>, Error> {
        let file = folder.join("chat_template.jinja");
        if file.is_file() {
            return Self::from_file(&file, special).map(Some);
        }
        for name in ["chat_template.json", "tokenizer_config.json"] {
            let file = folder.join(name);
            if !file.is_file() {
                continue;
            }
            let bytes = std::fs::read(&file).map_err(crate::fs::io_error("read", &file))?;
            let object: Map<String, Value> = serde_json::from_slice(&bytes)
                .map_err(|e| Error::Content { path: file.clone(), problem: format!("not a JSON object: {e}") })?;
            if let Some(source) = config_template(&object) {
                return Self::new(source, special).map(Some);
            }
        }
        Ok(None)
    }

    /// The template of a model: `path` if given, else that of the model folder, else the one in the tokenizer's
    /// configuration or GGUF metadata. `None` where the model has none.
    ///
    /// # Errors
    /// If the template cannot be read or parsed.
    pub fn find(path: Option<&Path>, folder: Option<&Path>, tokenizer: &Tokenizer) -> Result<Option<Self>, Error> {
        let special = tokenizer.special();
        if let Some(path) = path {
            return Self::from_file(path, special).map(Some);
        }
        if let Some(template) = folder.map(|folder| Self::from_folder(folder, special)).transpose()?.flatten() {
            return Ok(Some(template));
        }
        config_template(tokenizer.config()).map(|source| Self::new(source, special)).transpose()
    }

    /// The template's text, as it is to be saved with the model.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether the template says itself, by `{% generation %}` blocks, what the assistant writes.
    pub fn is_marked(&self) -> bool {
        self.parsed.has_generation()
    }

    /// Whether the template speaks of `role` by name.
    pub(super) fn names_role(&self, role: &str) -> bool {
        [format!("'{role}'"), format!("\"{role}\"")].iter().any(|literal| self.source.contains(literal.as_str()))
    }

    /// A template that marks the assistant's turns: this one if it does so itself, else the variant for training of a
    /// known family (Qwen2.5, Qwen3, DeepSeek-R1-Distill), which prints reasoning wherever the assistant wrote some.
    ///
    /// # Errors
    /// If the family is not known.
    pub fn for_assistant_masks(&self) -> Result<Self, Error> {
        if self.is_marked() {
            return Ok(self.clone());
        }
        self.for_training()?.ok_or_else(|| {
            Error::Template(
                "`assistant_only_loss` needs to know what the assistant wrote, but this template has no `{% generation \
                 %}` blocks and is not of a family known here (Qwen2.5, Qwen3, DeepSeek-R1-Distill); give \
                 `chat_template_path` with a template that has them"
                    .into(),
            )
        })
    }

    /// The variant for training of a known family; `None` if the family is not known.
    ///
    /// # Errors
    /// If the variant does not parse.
    pub(super) fn for_training(&self) -> Result<Option<Self>, Error> {
        let Some(source) = training_template::mark_turns(&self.source) else { return Ok(None) };
        let variant = Self::new(&source, &self.special)?;
        Ok(variant.marks_answers().then_some(variant))
    }

    /// Whether an answer stands in what the template marks: a relative of a known family may print it elsewhere (`QwQ`).
    fn marks_answers(&self) -> bool {
        let Ok(rendered) = self.render_marked(&question_and_answer(), RenderOptions::default()) else { return false };
        let Some(at) = rendered.text.rfind(ANSWER) else { return false };
        let start = rendered.text[..at].chars().count();
        rendered.assistant.iter().any(|range| range.start <= start && start + ANSWER.len() <= range.end)
    }

    /// What the template prints behind an answer of the assistant, at the end of a conversation.
    ///
    /// # Errors
    /// If the template does not render a question and an answer, or prints no answer.
    pub fn after_answer(&self) -> Result<String, Error> {
        let text = self.render(&question_and_answer(), RenderOptions::default())?;
        match text.rsplit_once(ANSWER) {
            Some((_, after)) => Ok(after.to_string()),
            None => Err(Error::Template("it does not print what the assistant says".into())),
        }
    }

    /// Whether the template writes `<think>` in front of an answer and leaves it open.
    pub(super) fn opens_thoughts(&self) -> bool {
        let Ok(text) = self.render(&question_and_answer(), RenderOptions::default()) else { return false };
        let before = text.rsplit_once(ANSWER).map_or("", |(before, _)| before);
        before.rfind("<think>") > before.rfind("</think>")
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
        let marks = if self.is_marked() { Some(unused_marks(messages, options)?) } else { None };
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
        let now = |format: &str| jiff::Zoned::now().strftime(format).to_string();
        let text = self.parsed.render(&context, marks, &now).map_err(|e| Error::Template(e.to_string()))?;
        Ok(match marks {
            Some((open, close)) => take_marks(&text, open, close),
            None => Rendered { text, assistant: Vec::new() },
        })
    }
}

/// An answer that no template prints of itself.
const ANSWER: &str = "zqAnswerOfTheAssistantqz";

/// The smallest conversation, for looking at how a template prints an answer.
fn question_and_answer() -> Value {
    json!([{"role": "user", "content": "zqQuestionqz"}, {"role": "assistant", "content": ANSWER}])
}

/// The template in a tokenizer's configuration: its text, or the one named `default` where there are several.
fn config_template(config: &Map<String, Value>) -> Option<&str> {
    match config.get("chat_template")? {
        Value::String(text) => Some(text),
        Value::Array(entries) => {
            let is_default = |entry: &&Value| entry.get("name").and_then(Value::as_str) == Some("default");
            entries.iter().find(is_default).and_then(|entry| entry.get("template")?.as_str())
        }
        _ => None,
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

#[cfg(test)]
mod tests {
    use super::*;

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
