//! Rows of conversations to text, with an eye on what the template does not print.
//!
//! A [`Renderer`] is a chat template with its settings. Templates are made for chatting: many cut the assistant's
//! reasoning out of all turns (DeepSeek-R1-Distill) or out of earlier ones (Qwen3), know four roles, and print some fields
//! of a message. For training that loses what is to be learnt. [`Renderer::draw`] holds the text against the messages
//! ([`super::probe`]); where a thought to be learnt is missing it renders again: with the family's training variant, with
//! the thought moved from its field into the content, and with its tags hidden from the template. What is missing after
//! that is a [`Finding`].

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::Error;
use super::conversation::{messages, tools, wrong};
use super::findings::Finding;
use super::messages::{Reading, turn, with_all_thought_fields, with_hidden_tags, with_thought_in_content};
use super::probe::{Seen, What, probe};
use super::rows::Row;
use super::template::{ChatTemplate, RenderOptions, Rendered};

/// Characters that stand for the tags of a thought while the template is rendered.
const HIDDEN_TAGS: [(char, &str); 2] = [('\u{10FF00}', "<think>"), ('\u{10FF01}', "</think>")];

/// A chat template with the settings that go with it, and how they apply to a row.
pub(super) struct Renderer<'a> {
    template: ChatTemplate,
    /// The family's variant for training, where the family is known.
    variant: Option<ChatTemplate>,
    system_prompt: Option<&'a str>,
    variables: &'a Map<String, Value>,
    opens_thoughts: bool,
}

/// Messages of a row, ready for the template.
#[derive(Clone, Debug)]
pub(super) struct Conversation {
    pub(super) turns: Vec<Value>,
    tools: Option<Value>,
    variables: Map<String, Value>,
}

impl Conversation {
    /// Its first `count` turns.
    pub(super) fn first_turns(&self, count: usize) -> Self {
        Self { turns: self.turns[..count].to_vec(), ..self.clone() }
    }
}

/// A rendered conversation and what is to be said about it.
#[derive(Clone, Debug)]
pub(super) struct Drawn {
    pub(super) rendered: Rendered,
    /// Of each turn where its content ends, in characters, if that is known.
    pub(super) ends: Vec<Option<usize>>,
    pub(super) findings: BTreeSet<Finding>,
}

impl<'a> Renderer<'a> {
    /// # Errors
    /// If the variant for training does not parse.
    pub(super) fn new(
        template: ChatTemplate,
        system_prompt: Option<&'a str>,
        variables: &'a Map<String, Value>,
    ) -> Result<Self, Error> {
        let variant = if template.is_marked() { None } else { template.for_training()? };
        let opens_thoughts = template.opens_thoughts();
        Ok(Self { template, variant, system_prompt, variables, opens_thoughts })
    }

    /// Reads columns of messages of a row, one after the other, with the row's `system`, `tools` and
    /// `chat_template_kwargs`. Returns how many turns each column has, counting a system message to the first.
    pub(super) fn read(
        &self,
        row: &Row,
        columns: &[&str],
        findings: &mut BTreeSet<Finding>,
        place: &dyn Fn() -> String,
    ) -> Result<(Conversation, Vec<usize>), Error> {
        let knows_role = |role: &str| self.template.names_role(role);
        let reading = Reading { knows_role: &knows_role, opens_thoughts: self.opens_thoughts };
        let (mut turns, mut counts) = (Vec::new(), Vec::new());
        for column in columns {
            let found = messages(row, column, place)?;
            for (index, message) in found.iter().enumerate() {
                let turn = turn(message, reading, findings).map_err(|problem| Error::Row {
                    place: place(),
                    problem: format!("message {} of `{column}` {problem}", index + 1),
                })?;
                turns.push(turn);
            }
            counts.push(found.len());
        }
        let system = match row.get("system") {
            Some(Value::String(text)) if !text.trim().is_empty() => Some(text.as_str()),
            None | Some(Value::Null | Value::String(_)) => None,
            Some(_) => {
                findings.insert(Finding::UnusedColumn { column: "system", why: "it is not a string" });
                None
            }
        };
        let first_system = turns.first().filter(|turn| turn["role"] == "system").map(|turn| turn["content"].clone());
        let system = match (first_system, system) {
            (Some(own), Some(column)) => {
                if own.as_str().map(str::trim) != Some(column.trim()) {
                    let why = "the messages begin with a system message of their own";
                    findings.insert(Finding::UnusedColumn { column: "system", why });
                }
                None
            }
            (Some(_), None) => None,
            (None, Some(column)) => {
                findings.insert(Finding::SystemColumn);
                Some(column)
            }
            (None, None) => self.system_prompt,
        };
        if let Some(system) = system {
            turns.insert(0, json!({"role": "system", "content": system}));
            counts.iter_mut().take(1).for_each(|count| *count += 1);
        }
        let mut variables = self.variables.clone();
        match row.get("chat_template_kwargs") {
            None | Some(Value::Null) => {}
            Some(Value::Object(own)) => variables.extend(own.clone()),
            // Tables hold objects as JSON text.
            Some(Value::String(text)) if text.trim_start().starts_with('{') => {
                let own: Map<String, Value> = serde_json::from_str(text).map_err(|error| Error::Row {
                    place: place(),
                    problem: format!("`chat_template_kwargs` is text, but not a JSON object: {error}"),
                })?;
                variables.extend(own);
            }
            Some(other) => return Err(wrong(place, "chat_template_kwargs", other, "an object")),
        }
        Ok((Conversation { turns, tools: tools(row, place)?, variables }, counts))
    }

    /// Renders a prompt, with the header of the assistant's turn behind it.
    pub(super) fn draw_prompt(&self, conversation: &Conversation, place: &dyn Fn() -> String) -> Result<Drawn, Error> {
        let attempt = Self::attempt(&self.template, &conversation.turns, conversation, true, place)?;
        let findings = Self::findings(&attempt, conversation, &|_| false);
        Ok(Drawn { rendered: attempt.rendered, ends: attempt.seen.ends, findings })
    }

    /// Renders a conversation of which the turns from `first_learnt` on are learnt.
    ///
    /// # Errors
    /// If the template raises an exception, or prints nothing of what is to be learnt.
    pub(super) fn draw(
        &self,
        conversation: &Conversation,
        first_learnt: usize,
        place: &dyn Fn() -> String,
    ) -> Result<Drawn, Error> {
        let turns = &conversation.turns;
        let is_learnt = |turn: usize| turn >= first_learnt;
        let mut best = Self::attempt(&self.template, turns, conversation, false, place)?;
        let mut lost = lost_thoughts(&best, &is_learnt);
        let mut is_kept = false;
        if !lost.is_empty() {
            for (template, turns) in self.other_ways(turns, &lost, first_learnt) {
                // A variant may not render what the template itself does; the first text then stands.
                let Ok(attempt) = Self::attempt(template, &turns, conversation, false, place) else { continue };
                let still_lost = lost_thoughts(&attempt, &is_learnt);
                if still_lost.len() < lost.len() {
                    (best, lost, is_kept) = (attempt, still_lost, true);
                }
                if lost.is_empty() {
                    break;
                }
            }
        }
        require_content(&best, turns, &is_learnt, place)?;
        let mut findings = Self::findings(&best, conversation, &is_learnt);
        if is_kept {
            findings.insert(Finding::KeptThought);
        }
        Ok(Drawn { rendered: best.rendered, ends: best.seen.ends, findings })
    }

    /// Ways to render that keep thoughts, the likeliest first.
    fn other_ways(
        &self,
        turns: &[Value],
        lost: &BTreeSet<usize>,
        first_learnt: usize,
    ) -> Vec<(&ChatTemplate, Vec<Value>)> {
        let changed = |change: &dyn Fn(&Value) -> Value| -> Vec<Value> {
            let one = |(index, turn): (usize, &Value)| if lost.contains(&index) { change(turn) } else { turn.clone() };
            turns.iter().enumerate().map(one).collect()
        };
        let moved = changed(&|turn| with_thought_in_content(turn, self.opens_thoughts));
        let [(open, _), (close, _)] = HIDDEN_TAGS;
        let hidden =
            changed(&|turn| with_hidden_tags(&with_thought_in_content(turn, self.opens_thoughts), open, close));
        let plain = (&self.template, moved.clone());
        let hidden = (&self.template, hidden);
        let variant = self.variant.as_ref().map(|variant| (variant, moved));
        // The variant prints the thoughts of all turns, which a prompt does not have when the model is used.
        if first_learnt == 0 {
            variant.into_iter().chain([plain, hidden]).collect()
        } else {
            [plain, hidden].into_iter().chain(variant).collect()
        }
    }

    fn attempt(
        template: &ChatTemplate,
        turns: &[Value],
        conversation: &Conversation,
        add_generation_prompt: bool,
        place: &dyn Fn() -> String,
    ) -> Result<Attempt, Error> {
        let options = RenderOptions {
            add_generation_prompt,
            tools: conversation.tools.as_ref(),
            variables: Some(&conversation.variables),
        };
        let render = |turns: &[Value]| {
            let turns = turns.iter().map(with_all_thought_fields).collect();
            template.render_marked(&Value::Array(turns), options).map(show_tags)
        };
        let rendered = render(turns).map_err(|e| Error::Row { place: place(), problem: e.to_string() })?;
        let probed = probe(turns);
        let marked = if probed.pieces.is_empty() { None } else { render(&probed.turns).ok() };
        let seen = probed.see(&rendered.text, marked.as_ref().map(|marked| marked.text.as_str()));
        let has_content = probed.pieces.iter().map(|piece| piece.turn).collect();
        Ok(Attempt { rendered, seen, pieces: probed.pieces.len(), has_content })
    }

    /// What is missing in a text.
    fn findings(
        attempt: &Attempt,
        conversation: &Conversation,
        is_learnt: &dyn Fn(usize) -> bool,
    ) -> BTreeSet<Finding> {
        let mut findings = BTreeSet::new();
        for (index, what) in &attempt.seen.missing {
            let turn = &conversation.turns[*index];
            let role = turn["role"].as_str().unwrap_or_default().to_string();
            let is_known = ["system", "user", "assistant", "tool"].contains(&role.as_str());
            let is_whole = *what == What::Content && attempt.seen.ends.get(*index).is_none_or(Option::is_none);
            findings.insert(match what {
                What::Thought(_) if !is_learnt(*index) => Finding::EarlierThought,
                What::Thought(field) => Finding::LostThought { field },
                What::Content if is_whole && !is_known => Finding::LostRole { role },
                What::Content => Finding::LostField { role, field: "content".into() },
                What::ToolCalls => Finding::LostField { role, field: "tool_calls".into() },
                What::Field(field) => Finding::LostField { role, field: field.clone() },
            });
        }
        let tools = conversation.tools.as_ref().and_then(Value::as_array);
        let names = tools.into_iter().flatten().filter_map(|tool| {
            tool["function"]["name"].as_str().or_else(|| tool["name"].as_str()).filter(|name| !name.is_empty())
        });
        if names.into_iter().any(|name| !attempt.rendered.text.contains(name)) {
            findings.insert(Finding::LostTools);
        }
        findings
    }
}

/// One rendering.
struct Attempt {
    rendered: Rendered,
    seen: Seen,
    /// Texts that the conversation has.
    pieces: usize,
    /// Turns that have any text.
    has_content: BTreeSet<usize>,
}

/// Learnt turns whose thought is missing.
fn lost_thoughts(attempt: &Attempt, is_learnt: &dyn Fn(usize) -> bool) -> BTreeSet<usize> {
    let is_thought = |(turn, what): &&(usize, What)| matches!(what, What::Thought(_)) && is_learnt(*turn);
    attempt.seen.missing.iter().filter(is_thought).map(|(turn, _)| *turn).collect()
}

/// Fails if the template prints nothing of the answers that are to be learnt.
fn require_content(
    attempt: &Attempt,
    turns: &[Value],
    is_learnt: &dyn Fn(usize) -> bool,
    place: &dyn Fn() -> String,
) -> Result<(), Error> {
    let answers = |all: bool| -> Vec<usize> {
        let is_answer =
            |turn: &Value| all || !["system", "user", "tool"].contains(&turn["role"].as_str().unwrap_or(""));
        (0..turns.len())
            .filter(|&index| is_learnt(index) && is_answer(&turns[index]) && attempt.has_content.contains(&index))
            .collect()
    };
    let mut wanted = answers(false);
    if wanted.is_empty() {
        wanted = answers(true);
    }
    let is_lost = |index: &usize| {
        let missing = attempt.seen.missing.iter().filter(|(turn, _)| turn == index);
        let has = |what: &What| missing.clone().any(|(_, missing)| missing == what);
        // A turn is lost with its content, or with its calls where it has no content.
        let content = turns[*index]["content"].as_str().unwrap_or_default().trim();
        if content.is_empty() {
            missing.clone().next().is_some()
        } else {
            has(&What::Content) && attempt.seen.ends[*index].is_none()
        }
    };
    if attempt.pieces > 0 && !wanted.is_empty() && wanted.iter().all(is_lost) {
        let mut roles: Vec<&str> = wanted.iter().filter_map(|&index| turns[index]["role"].as_str()).collect();
        roles.dedup();
        return Err(Error::Row {
            place: place(),
            problem: format!(
                "the chat template prints nothing of what is to be learnt (messages with the role `{}`); rename the role, \
                 or give `chat_template_path` with a template that knows it",
                roles.join("`, `")
            ),
        });
    }
    Ok(())
}

/// Puts the tags of thoughts back in place of the characters that stood for them.
fn show_tags(mut rendered: Rendered) -> Rendered {
    let tag = |character: char| HIDDEN_TAGS.iter().find(|(hidden, _)| *hidden == character).map(|(_, tag)| *tag);
    if !rendered.text.contains(|character| tag(character).is_some()) {
        return rendered;
    }
    let mut text = String::new();
    // Where each character of the old text begins in the new one.
    let mut moved = Vec::new();
    let mut position = 0;
    for character in rendered.text.chars() {
        moved.push(position);
        if let Some(tag) = tag(character) {
            text.push_str(tag);
            position += tag.len();
        } else {
            text.push(character);
            position += 1;
        }
    }
    moved.push(position);
    for range in &mut rendered.assistant {
        *range = moved[range.start]..moved[range.end];
    }
    Rendered { text, assistant: rendered.assistant }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::SpecialTokens;

    /// In the manner of DeepSeek-R1-Distill, in words that the known family does not have.
    const CUTS_ALL: &str = "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% endif %}\
        {% if m.role == 'assistant' %}{% set c = m.content %}{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}\
        {% endif %}<A>{{ c }}<E>{% endif %}{% endfor %}{% if add_generation_prompt %}<A><think>\n{% endif %}";
    const PRINTS_ALL: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}";
    /// In the manner of Qwen3: a thought is printed in the last turn only, from the field or the content.
    const CUTS_EARLIER: &str = "{% for m in messages %}{% if m.role == 'assistant' %}{% set r = m.reasoning_content or '' %}\
        {% set c = m.content %}{% if '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\\n') %}\
        {% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}<A>{% if loop.last %}<think>\n{{ r }}\n</think>\n\n\
        {% endif %}{{ c }}<E>{% else %}<U>{{ m.content }}{% endif %}{% endfor %}";
    /// Prints `<think>` itself.
    const OPENS: &str = "{% for m in messages %}{% if m.role == 'assistant' %}<A><think>\n{{ m.content }}{% else %}<U>\
        {{ m.content }}{% endif %}{% endfor %}";

    fn draw(template: &str, row: &Value, columns: &[&str]) -> Result<(String, Vec<Finding>), Error> {
        let template = ChatTemplate::new(template, &SpecialTokens::default()).unwrap();
        let variables = Map::new();
        let renderer = Renderer::new(template, None, &variables)?;
        let place = || "row 0".to_string();
        let mut findings = BTreeSet::new();
        let (conversation, counts) = renderer.read(row.as_object().unwrap(), columns, &mut findings, &place)?;
        let first_learnt = if columns.len() > 1 { counts[0] } else { 0 };
        let drawn = renderer.draw(&conversation, first_learnt, &place)?;
        findings.extend(drawn.findings);
        Ok((drawn.rendered.text, findings.into_iter().collect()))
    }

    fn turns(answer: impl Into<Value>) -> Value {
        json!({"messages": [{"role": "user", "content": "q"}, answer.into()]})
    }

    /// One thought in its three ways, each of the three fields counted.
    fn thoughts(thought: &str, answer: &str) -> Vec<Value> {
        let field = |name: &str| json!({"role": "assistant", "content": answer, name: thought});
        vec![
            json!({"role": "assistant", "content": format!("<think>\n{thought}\n</think>\n\n{answer}")}),
            json!({"role": "assistant", "content": format!("{thought}\n</think>\n\n{answer}")}),
            field("reasoning_content"),
            field("reasoning"),
            field("thinking"),
        ]
    }

    #[test]
    fn one_thought_in_any_form_is_one_text_under_templates_that_cut_it_print_it_or_open_it() {
        // A thought so short that it is found anywhere, one that ends like a tag, and a long one.
        for thought in ["A", "a<b", "two and three are five,\n\nand é 你好"] {
            for (template, expected) in [
                (CUTS_ALL, format!("<U>q<A><think>\n{thought}\n</think>\n\n5<E>")),
                (PRINTS_ALL, format!("<user>q<assistant><think>\n{thought}\n</think>\n\n5")),
                (CUTS_EARLIER, format!("<U>q<A><think>\n{thought}\n</think>\n\n5<E>")),
                (OPENS, format!("<U>q<A><think>\n{thought}\n</think>\n\n5")),
            ] {
                for turn in thoughts(thought, "5") {
                    let (text, findings) = draw(template, &turns(turn.clone()), &["messages"]).unwrap();
                    assert_eq!(text, expected, "{turn}");
                    let only_kept = findings.iter().all(|finding| *finding == Finding::KeptThought);
                    assert!(only_kept, "{turn}: {findings:?}");
                }
            }
        }
    }

    #[test]
    fn earlier_turns_keep_their_thoughts_where_they_are_learnt_and_not_in_a_prompt() {
        for (first, second) in thoughts("one", "1").into_iter().zip(thoughts("two", "2")) {
            let user = json!({"role": "user", "content": "q"});
            let row = json!({"messages": [user, first, user, second]});
            let (text, findings) = draw(CUTS_EARLIER, &row, &["messages"]).unwrap();
            let expected = "<U>q<A><think>\none\n</think>\n\n1<E><U>q<A><think>\ntwo\n</think>\n\n2<E>";
            assert_eq!((text.as_str(), findings), (expected, vec![Finding::KeptThought]));
            let row = json!({"prompt": [user, first, user], "completion": [second]});
            let (text, findings) = draw(CUTS_EARLIER, &row, &["prompt", "completion"]).unwrap();
            let expected = "<U>q<A>1<E><U>q<A><think>\ntwo\n</think>\n\n2<E>";
            assert_eq!((text.as_str(), findings), (expected, vec![Finding::EarlierThought]));
        }
    }

    #[test]
    fn what_a_template_does_not_print_is_found_by_role_and_field() {
        let row = json!({"messages": [
            {"role": "user", "content": "q", "name": "Ann"},
            {"role": "critic", "content": "hm"},
            {"role": "assistant", "content": "5", "tool_calls": [{"type": "function", "id": "1",
                "function": {"name": "add", "arguments": {"a": "x"}}}]},
            {"role": "system", "content": "late"},
        ], "tools": [{"type": "function", "function": {"name": "add"}}]});
        let (text, findings) = draw(CUTS_ALL, &row, &["messages"]).unwrap();
        assert_eq!(text, "<U>q<A>5<E>");
        let lost = |role: &str, field: &str| Finding::LostField { role: role.into(), field: field.into() };
        let expected = [
            Finding::LostRole { role: "critic".into() },
            lost("assistant", "tool_calls"),
            lost("system", "content"),
            lost("user", "name"),
            Finding::LostTools,
        ];
        assert_eq!(findings, expected);
        let (_, findings) = draw("{{ messages }}{{ tools }}", &row, &["messages"]).unwrap();
        assert_eq!(findings, [], "a template that prints everything");
    }

    #[test]
    fn a_row_of_which_nothing_learnt_is_printed_is_an_error() {
        let message = |row: Value, columns: &[&str]| draw(CUTS_ALL, &row, columns).unwrap_err().to_string();
        let text = message(turns(json!({"role": "narrator", "content": "5"})), &["messages"]);
        assert!(text.starts_with("row 0: the chat template prints nothing of what is to be learnt"), "{text}");
        assert!(text.contains("`narrator`"), "{text}");
        let row = json!({"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "x", "content": "5"}]});
        assert!(message(row, &["prompt", "completion"]).contains("prints nothing"));
        // One answer of two is not everything.
        let row = json!({"messages": [{"role": "assistant", "content": "a"}, {"role": "narrator", "content": "b"}]});
        assert_eq!(draw(CUTS_ALL, &row, &["messages"]).unwrap().1, [Finding::LostRole { role: "narrator".into() }]);
    }

    #[test]
    fn a_system_column_is_the_first_message_unless_there_is_one() {
        let user = json!({"from": "human", "value": "q"});
        let human = Finding::Role { from: "human".into(), to: "user" };
        let row = json!({"conversations": [user], "system": "S"});
        let (text, findings) = draw(PRINTS_ALL, &row, &["conversations"]).unwrap();
        assert_eq!((text.as_str(), findings), ("<system>S<user>q", vec![human.clone(), Finding::SystemColumn]));
        let row = json!({"conversations": [{"from": "system", "value": "T"}, user], "system": "S"});
        let (text, findings) = draw(PRINTS_ALL, &row, &["conversations"]).unwrap();
        assert_eq!(text, "<system>T<user>q");
        assert!(matches!(&findings[..], [_, Finding::UnusedColumn { column: "system", .. }]), "{findings:?}");
        for system in [json!(null), json!(""), json!("T")] {
            let row = json!({"conversations": [{"from": "system", "value": "T"}, user], "system": system});
            assert_eq!(draw(PRINTS_ALL, &row, &["conversations"]).unwrap().1, std::slice::from_ref(&human));
        }
        let row = json!({"conversations": [user], "system": "S"});
        let (_, findings) = draw(CUTS_ALL, &row, &["conversations"]).unwrap();
        assert!(findings.contains(&Finding::LostField { role: "system".into(), field: "content".into() }));
    }

    #[test]
    fn texts_that_the_template_looks_at_are_searched_for_instead() {
        // A mark inside a content changes what this template prints.
        let template = "{% for m in messages %}{{ m.content if m.content in ['q', 'five'] else '?' }}{% endfor %}";
        let (text, findings) =
            draw(template, &turns(json!({"role": "assistant", "content": "five"})), &["messages"]).unwrap();
        assert_eq!((text.as_str(), findings.len()), ("qfive", 0));
        let lost = draw(template, &turns(json!({"role": "assistant", "content": "six"})), &["messages"]).unwrap_err();
        assert!(lost.to_string().contains("prints nothing"), "{lost}");
    }
}
