//! Supervised examples: rows to tokens and to the mask of tokens to learn.
//!
//! Follows TRL's `SFTTrainer._prepare_dataset` (trl 1.16): the end-of-sequence token is appended to plain text and plain
//! completions; conversations go through the chat template; prompt and prompt + completion are tokenised each, and the
//! completion is what follows the prompt's tokens; masks are combined; examples are cut at the end, or at the start with
//! `truncation_mode: keep_end`; what has nothing left to learn is dropped.

use std::collections::{BTreeSet, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;
use serde_json::{Map, Value};

use super::Error;
use super::conversation::{Layout, Shape, text};
use super::encoder::Encoder;
use super::findings::{Finding, Findings};
use super::rendering::{Drawn, Renderer};
use super::rows::{Dataset, Row};
use super::template::{ChatTemplate, Rendered, assistant_mask};
use super::tokenizer::Tokenizer;
use crate::config::settings::{SftSettings, TruncationMode};

/// One example: tokens, and which of them are learnt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SftExample {
    /// Token ids.
    pub input_ids: Vec<u32>,
    /// Per token: whether predicting it counts in the loss.
    pub labels_mask: Vec<bool>,
}

/// All examples of a split, and what happened on the way.
#[derive(Clone, Debug, Default)]
pub struct SftData {
    /// Examples in the order of the rows.
    pub examples: Vec<SftExample>,
    /// The row of each.
    pub rows: Vec<usize>,
    /// Rows there were.
    pub num_rows: usize,
    /// Rows whose examples [`SftData::remove_duplicates`] took out.
    pub duplicates: Vec<usize>,
    /// Rows left out because no token of theirs is learnt.
    pub dropped: usize,
    /// Those of them whose tokens to learn all lie beyond the length limit.
    pub beyond_limit: usize,
    /// Examples cut to the length limit.
    pub truncated: usize,
    /// Whether the rows went through the chat template.
    pub is_conversational: bool,
    /// What was lost, guessed or adapted.
    pub findings: Findings,
}

impl SftData {
    /// Takes out every example that an earlier one equals.
    pub fn remove_duplicates(&mut self) {
        let mut seen = HashSet::new();
        let kept: Vec<bool> = self.examples.iter().map(|example| seen.insert(example.checksum())).collect();
        let pairs = self.rows.iter().zip(&kept);
        self.duplicates.extend(pairs.filter(|(_, is_kept)| !**is_kept).map(|(&row, _)| row));
        let mut is_kept = kept.iter().copied();
        self.examples.retain(|_| is_kept.next() == Some(true));
        let mut is_kept = kept.iter().copied();
        self.rows.retain(|_| is_kept.next() == Some(true));
    }
}

impl SftExample {
    fn checksum(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        for (id, is_learnt) in self.input_ids.iter().zip(&self.labels_mask) {
            hasher.update(&id.to_le_bytes()).update(&[u8::from(*is_learnt)]);
        }
        *hasher.finalize().as_bytes()
    }
}

/// How rows become examples.
#[derive(Clone, Debug, Default)]
pub struct SftOptions {
    /// Column of plain text.
    pub text_field: String,
    /// Learn the completion only; `None`: yes for prompt-completion data.
    pub completion_only_loss: Option<bool>,
    /// Learn the assistant's turns only.
    pub assistant_only_loss: bool,
    /// Cut examples after this many tokens; `None` keeps them whole (also before packing, which cuts itself).
    pub max_length: Option<usize>,
    /// Of a longer example keep the last tokens instead of the first.
    pub keeps_end: bool,
    /// System message for conversations that have none.
    pub system_prompt: Option<String>,
    /// Variables for the chat template; a row's own `chat_template_kwargs` come on top.
    pub chat_template_kwargs: Map<String, Value>,
}

impl SftOptions {
    /// The options of a run's settings; `packing` says whether this split is packed.
    pub fn from_settings(settings: &SftSettings, packing: bool) -> Self {
        Self {
            text_field: settings.data.dataset_text_field.clone(),
            completion_only_loss: settings.completion_only_loss,
            assistant_only_loss: settings.assistant_only_loss,
            max_length: if packing { None } else { settings.max_length },
            keeps_end: settings.truncation_mode == TruncationMode::KeepEnd,
            system_prompt: settings.data.system_prompt.clone(),
            chat_template_kwargs: settings.data.chat_template_kwargs.clone(),
        }
    }
}

/// Turns rows into examples, on all cores. `progress` gets the number of rows done so far.
///
/// # Errors
/// If the columns fit no format, a row is broken, an option does not go with the format, or nothing is left to learn.
pub fn prepare_sft(
    dataset: &Dataset,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    options: &SftOptions,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<SftData, Error> {
    let layout = Layout::of_examples(dataset, &options.text_field)?;
    dataset.require_sound(&layout.columns())?;
    let preparation = Preparation::new(&layout, tokenizer, template, options)?;
    let renderer = preparation.renderer()?;
    let done = AtomicUsize::new(0);
    let prepared: Vec<Result<Prepared, Error>> = dataset
        .rows()
        .par_iter()
        .enumerate()
        .map_init(
            || tokenizer.encoder(),
            |encoder, (index, row)| {
                let prepared = preparation.prepare(row, renderer.as_ref(), encoder, &|| dataset.place(index));
                progress(done.fetch_add(1, Ordering::Relaxed) + 1);
                prepared
            },
        )
        .collect();
    let is_conversational = layout.is_conversational();
    let mut data = SftData { is_conversational, num_rows: dataset.len(), ..SftData::default() };
    for (index, prepared) in prepared.into_iter().enumerate() {
        let Prepared { mut example, findings } = prepared?;
        data.findings.add(findings, || dataset.place(index));
        let limit = options.max_length.unwrap_or(usize::MAX);
        let is_cut = example.input_ids.len() > limit;
        let has_learnt = example.labels_mask.contains(&true);
        if options.keeps_end && is_cut {
            let first = example.input_ids.len() - limit;
            example.input_ids.drain(..first);
            example.labels_mask.drain(..first);
        }
        example.input_ids.truncate(limit);
        example.labels_mask.truncate(limit);
        if example.labels_mask.contains(&true) {
            data.truncated += usize::from(is_cut);
            data.examples.push(example);
            data.rows.push(index);
        } else {
            data.dropped += 1;
            data.beyond_limit += usize::from(has_learnt);
        }
    }
    if data.examples.is_empty() {
        let limit =
            options.max_length.map_or_else(String::new, |limit| format!(" within `max_length: {limit}` tokens"));
        return Err(Error::Setting(format!(
            "none of the {} rows has a token to learn{limit}; check the length limit and the masks \
             (`completion_only_loss`, `assistant_only_loss`)",
            dataset.len()
        )));
    }
    Ok(data)
}

struct Prepared {
    example: SftExample,
    findings: BTreeSet<Finding>,
}

/// What is the same for all rows.
struct Preparation<'a> {
    layout: &'a Layout,
    template: Option<ChatTemplate>,
    options: &'a SftOptions,
    completion_only: bool,
    eos: String,
}

impl<'a> Preparation<'a> {
    fn new(
        layout: &'a Layout,
        tokenizer: &Tokenizer,
        template: Option<&ChatTemplate>,
        options: &'a SftOptions,
    ) -> Result<Self, Error> {
        let is_conversational = layout.is_conversational();
        let has_completion = matches!(layout, Layout::PromptCompletion(_));
        if options.completion_only_loss == Some(true) && !has_completion {
            return Err(Error::Setting(
                "`completion_only_loss: true` needs `prompt` and `completion` columns; for conversations use \
                 `assistant_only_loss`"
                    .into(),
            ));
        }
        if options.assistant_only_loss && !is_conversational {
            return Err(Error::Setting(
                "`assistant_only_loss: true` needs conversations (`messages`, or `prompt` and `completion` as lists of \
                 messages); this data set is plain text"
                    .into(),
            ));
        }
        require_no_system_prompt(is_conversational, options.system_prompt.as_deref())?;
        let template = match (is_conversational, template) {
            (false, _) => None,
            (true, Some(template)) if options.assistant_only_loss => Some(template.for_assistant_masks()?),
            (true, Some(template)) => Some(template.clone()),
            (true, None) => return Err(no_template()),
        };
        let eos = if is_conversational { String::new() } else { tokenizer.eos_text()? };
        let completion_only = options.completion_only_loss.unwrap_or(has_completion);
        Ok(Self { layout, template, options, completion_only, eos })
    }

    fn renderer(&self) -> Result<Option<Renderer<'_>>, Error> {
        let renderer = |template: &ChatTemplate| {
            let system_prompt = self.options.system_prompt.as_deref();
            Renderer::new(template.clone(), system_prompt, &self.options.chat_template_kwargs)
        };
        self.template.as_ref().map(renderer).transpose()
    }

    fn prepare(
        &self,
        row: &Row,
        renderer: Option<&Renderer<'_>>,
        encoder: &mut Encoder<'_>,
        place: &dyn Fn() -> String,
    ) -> Result<Prepared, Error> {
        let renderer = || renderer.ok_or_else(no_template);
        let mut findings = BTreeSet::new();
        let example = match self.layout {
            Layout::Messages { column } => {
                let (conversation, _) = renderer()?.read(row, &[column], &mut findings, place)?;
                let drawn = renderer()?.draw(&conversation, 0, place)?;
                let example = self.encode_conversation(&drawn.rendered, encoder)?;
                findings.extend(drawn.findings);
                example
            }
            Layout::Text { column } => {
                let input_ids = encoder.encode_document(&self.with_eos(text(row, column, place)?))?;
                let labels_mask = vec![true; input_ids.len()];
                SftExample { input_ids, labels_mask }
            }
            Layout::PromptCompletion(Shape::Plain) => {
                let prompt = text(row, "prompt", place)?;
                let whole = format!("{prompt}{}", self.with_eos(text(row, "completion", place)?));
                let input_ids = encoder.encode_document(&whole)?;
                let labels_mask = vec![true; input_ids.len()];
                let prompt_ids = encoder.encode_document(prompt)?;
                let example = SftExample { input_ids, labels_mask };
                let border = common_beginning(&prompt_ids, &example.input_ids);
                if border < prompt_ids.len() {
                    findings.insert(Finding::Boundary);
                }
                self.after_prompt(border, example)
            }
            Layout::PromptCompletion(Shape::Conversational) => {
                self.prepare_completion(row, renderer()?, encoder, &mut findings, place)?
            }
            Layout::Prompt(_) => {
                return Err(Error::Row { place: place(), problem: "a prompt alone is nothing to learn".into() });
            }
        };
        Ok(Prepared { example, findings })
    }

    /// A row whose prompt and completion are messages. The prompt ends where the text of both together stops being that
    /// of the prompt with the header of the assistant's turn.
    fn prepare_completion(
        &self,
        row: &Row,
        renderer: &Renderer<'_>,
        encoder: &mut Encoder<'_>,
        findings: &mut BTreeSet<Finding>,
        place: &dyn Fn() -> String,
    ) -> Result<SftExample, Error> {
        let (whole, counts) = renderer.read(row, &["prompt", "completion"], findings, place)?;
        let prompt_turns = counts.first().copied().unwrap_or(0);
        let prompt = renderer.draw_prompt(&whole.first_turns(prompt_turns), place)?;
        let first_learnt = if self.completion_only { prompt_turns } else { 0 };
        let drawn = renderer.draw(&whole, first_learnt, place)?;
        let example = self.encode_conversation(&drawn.rendered, encoder)?;
        let prompt_ids = encoder.encode(&prompt.rendered.text)?;
        let mut border = common_beginning(&prompt_ids, &example.input_ids);
        if border < prompt_ids.len() {
            let end = end_of_prompt(&prompt, &drawn, prompt_turns);
            let encoding = encoder.encode_with_offsets(&drawn.rendered.text)?;
            let within = encoding.chars.iter().take_while(|(_, last)| *last <= end).count();
            border = border.max(within);
            let is_opened = prompt.rendered.text.trim_end().ends_with("<think>");
            findings.insert(if is_opened { Finding::UnopenedThought } else { Finding::Boundary });
        }
        findings.extend(drawn.findings);
        Ok(self.after_prompt(border, example))
    }

    fn with_eos(&self, text: &str) -> String {
        if text.ends_with(&self.eos) { text.to_string() } else { format!("{text}{}", self.eos) }
    }

    fn encode_conversation(&self, rendered: &Rendered, encoder: &mut Encoder<'_>) -> Result<SftExample, Error> {
        if self.options.assistant_only_loss {
            let encoding = encoder.encode_with_offsets(&rendered.text)?;
            let labels_mask = assistant_mask(&encoding.chars, &rendered.assistant);
            return Ok(SftExample { input_ids: encoding.ids, labels_mask });
        }
        let input_ids = encoder.encode(&rendered.text)?;
        let labels_mask = vec![true; input_ids.len()];
        Ok(SftExample { input_ids, labels_mask })
    }

    /// Takes the prompt's tokens out of the mask.
    fn after_prompt(&self, border: usize, mut example: SftExample) -> SftExample {
        if self.completion_only {
            example.labels_mask[..border].fill(false);
        }
        example
    }
}

/// How many tokens two lists have in common at their beginning.
fn common_beginning(left: &[u32], right: &[u32]) -> usize {
    left.iter().zip(right).take_while(|(l, r)| l == r).count()
}

/// Where the prompt ends in the text of the whole conversation, in characters: behind its last message, and behind what
/// then stands there in both texts (the end of the turn, the header of the next). 0 if that is not known.
fn end_of_prompt(prompt: &Drawn, whole: &Drawn, prompt_turns: usize) -> usize {
    let end = |drawn: &Drawn| drawn.ends.get(prompt_turns.checked_sub(1)?).copied().flatten();
    let (Some(in_prompt), Some(in_whole)) = (end(prompt), end(whole)) else { return 0 };
    let left = prompt.rendered.text.chars().skip(in_prompt);
    let right = whole.rendered.text.chars().skip(in_whole);
    in_whole + left.zip(right).take_while(|(l, r)| l == r).count()
}

pub(super) fn no_template() -> Error {
    Error::Template(
        "the data set has conversations, but the model has no chat template; give `chat_template_path`, or data with \
         plain text"
            .into(),
    )
}

pub(super) fn require_no_system_prompt(is_conversational: bool, system_prompt: Option<&str>) -> Result<(), Error> {
    if system_prompt.is_some() && !is_conversational {
        return Err(Error::Setting(
            "`system_prompt` is put in front of conversations, but this data set is plain text; give the prompts as \
             lists of messages, or leave it out"
                .into(),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tokenizer::fixture::tokenizer;
    use super::*;
    use crate::data::SpecialTokens;
    use serde_json::json;

    const CHAT: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{{ extra }}";

    fn rows(values: &[Value]) -> Dataset {
        Dataset::from_rows("memory", values.iter().map(|v| v.as_object().unwrap().clone()).collect())
    }

    fn options() -> SftOptions {
        SftOptions { text_field: "text".into(), ..SftOptions::default() }
    }

    fn prepare(values: &[Value], options: &SftOptions) -> Result<SftData, Error> {
        let template = ChatTemplate::new(CHAT, &SpecialTokens::default()).unwrap();
        prepare_sft(&rows(values), &tokenizer(), Some(&template), options, &|_| {})
    }

    /// The whole text of an example, and the part that is learnt.
    fn texts(example: &SftExample) -> (String, String) {
        let learnt: Vec<u32> =
            example.input_ids.iter().zip(&example.labels_mask).filter(|(_, m)| **m).map(|(id, _)| *id).collect();
        let tokenizer = tokenizer();
        (tokenizer.decode(&example.input_ids, false).unwrap(), tokenizer.decode(&learnt, false).unwrap())
    }

    fn both(values: &[Value], options: &SftOptions) -> Vec<(String, String)> {
        prepare(values, options).unwrap().examples.iter().map(texts).collect()
    }

    fn pair(whole: &str, learnt: &str) -> (String, String) {
        (whole.into(), learnt.into())
    }

    #[test]
    fn plain_text_ends_with_the_end_token_once_and_is_learnt_whole() {
        let found = both(&[json!({"text": "the x"}), json!({"text": "y<|im_end|>"})], &options());
        assert_eq!(found, [pair("the x<|im_end|>", "the x<|im_end|>"), pair("y<|im_end|>", "y<|im_end|>")]);
    }

    #[test]
    fn of_prompt_and_completion_the_completion_is_learnt_unless_told_otherwise() {
        let row = [json!({"prompt": "a ", "completion": "b"})];
        assert_eq!(both(&row, &options()), [pair("a b<|im_end|>", "b<|im_end|>")]);
        let all = SftOptions { completion_only_loss: Some(false), ..options() };
        assert_eq!(both(&row, &all), [pair("a b<|im_end|>", "a b<|im_end|>")]);
    }

    #[test]
    fn conversations_go_through_the_template_with_tools_variables_and_system_prompt() {
        let turns = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]);
        let row = json!({"messages": turns, "tools": "[{\"n\": 1}]", "chat_template_kwargs": {"extra": "!"}});
        let mut own = options();
        own.system_prompt = Some("S".into());
        own.chat_template_kwargs.insert("extra".into(), json!("?"));
        let whole = "<|im_start|>system\nS<|im_end|><|im_start|>user\nq<|im_end|><|im_start|>assistant\nr<|im_end|>[{\"n\": 1}]!";
        assert_eq!(both(std::slice::from_ref(&row), &own), [pair(whole, whole)]);
        own.assistant_only_loss = true;
        assert_eq!(both(&[row], &own), [pair(whole, "r<|im_end|>")]);
        own.chat_template_kwargs.clear();
        let with_system =
            json!({"messages": [{"role": "system", "content": "T"}, {"role": "assistant", "content": "r"}]});
        let whole = "<|im_start|>system\nT<|im_end|><|im_start|>assistant\nr<|im_end|>";
        assert_eq!(both(&[with_system], &own), [pair(whole, "r<|im_end|>")]);
    }

    #[test]
    fn both_masks_together_learn_the_assistant_s_part_of_the_completion() {
        let turn = |role: &str, content: &str| json!({"role": role, "content": content});
        let row = json!({
            "prompt": [turn("user", "1"), turn("assistant", "2"), turn("user", "3")],
            "completion": [turn("assistant", "4"), turn("user", "5"), turn("assistant", "6")],
        });
        let found = both(std::slice::from_ref(&row), &options());
        assert_eq!(found[0].1, "4<|im_end|><|im_start|>user\n5<|im_end|><|im_start|>assistant\n6<|im_end|>");
        let own = SftOptions { assistant_only_loss: true, ..options() };
        assert_eq!(both(std::slice::from_ref(&row), &own)[0].1, "4<|im_end|>6<|im_end|>");
        let own = SftOptions { completion_only_loss: Some(false), ..own };
        assert_eq!(both(&[row], &own)[0].1, "2<|im_end|>4<|im_end|>6<|im_end|>");
    }

    #[test]
    fn long_examples_are_cut_and_those_with_nothing_left_are_dropped_and_counted() {
        let values = [
            json!({"prompt": "abc", "completion": "d"}),
            json!({"prompt": "ab", "completion": "cde"}),
            json!({"prompt": "a", "completion": "b"}),
        ];
        let data = prepare(&values, &SftOptions { max_length: Some(3), ..options() }).unwrap();
        assert_eq!(
            data.examples.iter().map(texts).collect::<Vec<_>>(),
            [pair("abc", "c"), pair("ab<|im_end|>", "b<|im_end|>")]
        );
        assert_eq!((data.dropped, data.truncated, data.findings.notes().len()), (1, 1, 0));
        let data = prepare(&values, &SftOptions { max_length: Some(3), keeps_end: true, ..options() }).unwrap();
        assert_eq!(
            data.examples.iter().map(texts).collect::<Vec<_>>(),
            [
                pair("cd<|im_end|>", "d<|im_end|>"),
                pair("de<|im_end|>", "de<|im_end|>"),
                pair("ab<|im_end|>", "b<|im_end|>")
            ]
        );
        assert_eq!((data.dropped, data.truncated), (0, 2));
        let text = prepare(&values, &SftOptions { max_length: Some(1), ..options() }).unwrap_err().to_string();
        assert!(text.contains("none of the 3 rows has a token to learn within `max_length: 1` tokens"), "{text}");
    }

    #[test]
    fn of_equal_examples_the_first_stays_and_why_rows_are_left_out_is_counted() {
        let pair = |prompt: &str, completion: &str| json!({"prompt": prompt, "completion": completion});
        let values = [pair("a", "b"), pair("abc", "d"), pair("a", "b"), pair("", "ab"), pair("a", "b")];
        let mut data = prepare(&values, &SftOptions { max_length: Some(3), ..options() }).unwrap();
        assert_eq!((data.num_rows, data.dropped, data.beyond_limit, data.examples.len()), (5, 1, 1, 4));
        data.remove_duplicates();
        // The same tokens of which others are learnt are another example.
        assert_eq!((data.examples.len(), &data.rows[..], &data.duplicates[..]), (2, &[0, 3][..], &[2, 4][..]));
    }

    #[test]
    fn a_prompt_whose_tokens_change_before_its_completion_is_counted() {
        let data = prepare(
            &[json!({"prompt": "x", "completion": "y"}), json!({"prompt": "t", "completion": "he"})],
            &options(),
        );
        let data = data.unwrap();
        assert_eq!(data.findings.count(&Finding::Boundary), 1);
        let note = data.findings.notes().remove(0);
        assert!(note.is_warning && note.text.contains("(first: row 1 ("), "{}", note.text);
        assert_eq!(texts(&data.examples[1]), pair("the<|im_end|>", "the<|im_end|>"));
    }

    #[test]
    fn options_that_do_not_fit_the_data_and_broken_rows_are_errors() {
        let text = [json!({"text": "x"})];
        let turns = json!([{"role": "user", "content": "x"}]);
        let message = |values: &[Value], options: &SftOptions| prepare(values, options).unwrap_err().to_string();
        let own = SftOptions { completion_only_loss: Some(true), ..options() };
        assert!(message(&text, &own).contains("needs `prompt` and `completion` columns"));
        let own = SftOptions { assistant_only_loss: true, ..options() };
        assert!(message(&text, &own).contains("this data set is plain text"));
        let own = SftOptions { system_prompt: Some("s".into()), ..options() };
        assert!(message(&text, &own).contains("`system_prompt` is put in front of conversations"));
        let broken = [json!({"text": "x"}), json!({"text": 3})];
        assert_eq!(
            message(&broken, &options()),
            "row 1 (`memory`, row 2): `text` is a number, expected a string, as in the first row"
        );
        let broken = [json!({"text": "x"}), json!({"txt": "y"})];
        assert!(message(&broken, &options()).contains("row 2): column `text` not found; the columns are `txt`"));
        let dataset = rows(&[json!({ "messages": turns })]);
        let text = prepare_sft(&dataset, &tokenizer(), None, &options(), &|_| {}).unwrap_err().to_string();
        assert!(text.contains("the model has no chat template; give `chat_template_path`"), "{text}");
        let template = ChatTemplate::new("{{ messages }}", &SpecialTokens::default()).unwrap();
        let own = SftOptions { assistant_only_loss: true, ..options() };
        let text = prepare_sft(&dataset, &tokenizer(), Some(&template), &own, &|_| {}).unwrap_err().to_string();
        assert!(text.contains("this template has no `{% generation %}` blocks"), "{text}");
        let raising = ChatTemplate::new("{{ raise_exception('no') }}", &SpecialTokens::default()).unwrap();
        let text = prepare_sft(&dataset, &tokenizer(), Some(&raising), &options(), &|_| {}).unwrap_err().to_string();
        assert!(text.starts_with("row 0 (`memory`, row 1): chat template: no"), "{text}");
    }

    #[test]
    fn progress_counts_every_row_once() {
        let values: Vec<Value> = (0..500).map(|i| json!({"text": format!("{i}")})).collect();
        let (calls, largest) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let note = |done: usize| {
            calls.fetch_add(1, Ordering::Relaxed);
            largest.fetch_max(done, Ordering::Relaxed);
        };
        let data = prepare_sft(&rows(&values), &tokenizer(), None, &options(), &note).unwrap();
        assert_eq!((calls.into_inner(), largest.into_inner(), data.examples.len()), (500, 500, 500));
        assert_eq!(texts(&data.examples[321]).0, "321<|im_end|>");
    }

    /// In the manner of R1: the generation prompt opens a thought that answers may not have.
    const OPENING: &str = "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}<tag>{{ m.content }}<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<tag><think>\n{% endif %}";

    fn completions(template: &str, prompt: &Value, answers: &[&str]) -> SftData {
        let row = |answer: &&str| json!({"prompt": prompt, "completion": [{"role": "assistant", "content": answer}]});
        let template = ChatTemplate::new(template, &SpecialTokens::default()).unwrap();
        let rows = rows(&answers.iter().map(row).collect::<Vec<_>>());
        prepare_sft(&rows, &tokenizer(), Some(&template), &options(), &|_| {}).unwrap()
    }

    #[test]
    fn a_completion_without_the_thought_that_the_prompt_opens_is_learnt_whole_and_said() {
        let prompt = json!([{"role": "user", "content": "q"}]);
        let data = completions(OPENING, &prompt, &["5", "It is 5.", "<think>\nx\n</think>\n\n5", "x\n</think>\n\n5"]);
        let found: Vec<_> = data.examples.iter().map(texts).collect();
        let thought = "x\n</think>\n\n5<|im_end|>";
        assert_eq!(found[0], pair("<|im_start|>q<tag>5<|im_end|>", "5<|im_end|>"));
        assert_eq!(found[1].1, "It is 5.<|im_end|>");
        assert_eq!(found[2], pair(&format!("<|im_start|>q<tag><think>\n{thought}"), thought));
        assert_eq!(found[3], found[2]);
        assert_eq!((data.dropped, data.findings.count(&Finding::UnopenedThought)), (0, 2));
    }

    #[test]
    fn a_prompt_that_reads_otherwise_in_the_whole_conversation_ends_behind_its_last_message() {
        // An answer is printed with a mark while it is the last one.
        let template = "{% for m in messages %}<|im_start|>{{ '!' if loop.last }}{{ m.content }}<|im_end|>{% endfor %}";
        let prompt = json!([{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]);
        let data = completions(template, &prompt, &["three"]);
        let whole = "<|im_start|>one<|im_end|><|im_start|>two<|im_end|><|im_start|>!three<|im_end|>";
        assert_eq!(texts(&data.examples[0]), pair(whole, "<|im_start|>!three<|im_end|>"));
        assert_eq!(data.findings.count(&Finding::Boundary), 1);
    }
}
