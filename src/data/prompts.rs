//! Prompts for sampling: rows to rendered, tokenised prompts.
//!
//! As TRL's `GRPOTrainer`: conversations go through the chat template with the header of the next assistant turn; plain
//! prompts are tokenised as they are. All other columns travel along for the reward functions.

use std::collections::{BTreeSet, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;
use serde_json::{Map, Value};

use super::Error;
use super::conversation::{Layout, Shape, text};
use super::encoder::Encoder;
use super::findings::{Finding, Findings};
use super::rendering::Renderer;
use super::rows::{Dataset, Row};
use super::sft::{no_template, require_no_system_prompt};
use super::template::ChatTemplate;
use super::tokenizer::Tokenizer;
use crate::config::settings::GrpoSettings;

/// One prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptExample {
    /// Row of the data set.
    pub index: usize,
    /// The prompt as the row has it: a string or a list of messages.
    pub prompt: Value,
    /// The text the model sees.
    pub prompt_text: String,
    /// Its tokens, at least one.
    pub prompt_ids: Vec<u32>,
    /// The whole row, for reward functions.
    pub row: Row,
}

/// How rows become prompts.
#[derive(Clone, Debug, Default)]
pub struct PromptOptions {
    /// System message for conversations that have none.
    pub system_prompt: Option<String>,
    /// Variables for the chat template; a row's own `chat_template_kwargs` come on top.
    pub chat_template_kwargs: Map<String, Value>,
    /// Longest prompt in tokens.
    pub max_prompt_length: Option<usize>,
    /// Cut longer prompts on the left instead of refusing them.
    pub truncate_prompts: bool,
}

impl PromptOptions {
    /// The options of a run's settings.
    pub fn from_settings(settings: &GrpoSettings) -> Self {
        Self {
            system_prompt: settings.data.system_prompt.clone(),
            chat_template_kwargs: settings.data.chat_template_kwargs.clone(),
            max_prompt_length: settings.max_prompt_length,
            truncate_prompts: settings.truncate_prompts,
        }
    }
}

/// All prompts of a split, and what was lost or adapted on the way.
#[derive(Clone, Debug, Default)]
pub struct PromptData {
    /// Prompts in the order of the rows.
    pub prompts: Vec<PromptExample>,
    /// Rows there were.
    pub num_rows: usize,
    /// Rows whose prompts [`PromptData::remove_duplicates`] took out.
    pub duplicates: Vec<usize>,
    /// Prompts cut to the length limit.
    pub truncated: usize,
    /// Whether the rows went through the chat template.
    pub is_conversational: bool,
    /// What was lost, guessed or adapted.
    pub findings: Findings,
}

impl PromptData {
    /// Takes out every prompt that an earlier one equals in its tokens and in all columns of its row.
    pub fn remove_duplicates(&mut self) {
        let mut seen = HashSet::new();
        let duplicates = &mut self.duplicates;
        self.prompts.retain(|prompt| {
            let is_new = seen.insert(prompt.checksum());
            duplicates.extend((!is_new).then_some(prompt.index));
            is_new
        });
    }
}

impl PromptExample {
    fn checksum(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&(self.prompt_ids.len() as u64).to_le_bytes());
        self.prompt_ids.iter().for_each(|id| _ = hasher.update(&id.to_le_bytes()));
        // A map of JSON values always has a JSON form, and a hasher takes everything.
        let _ = serde_json::to_writer(&mut hasher, &self.row);
        *hasher.finalize().as_bytes()
    }
}

/// Turns rows into prompts, on all cores. `progress` gets the number of rows done so far.
///
/// # Errors
/// If there is no `prompt` column, a row is broken, or a prompt is empty or too long.
pub fn prepare_prompts(
    dataset: &Dataset,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    options: &PromptOptions,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<PromptData, Error> {
    let layout = Layout::of_prompts(dataset)?;
    dataset.require_sound(&layout.columns())?;
    require_no_system_prompt(layout.is_conversational(), options.system_prompt.as_deref())?;
    let renderer = template.filter(|_| layout.is_conversational()).map(|template| {
        Renderer::new(template.clone(), options.system_prompt.as_deref(), &options.chat_template_kwargs)
    });
    let renderer = renderer.transpose()?;
    let done = AtomicUsize::new(0);
    let prepare = |encoder: &mut Encoder<'_>, (index, row): (usize, &Row)| {
        let place = || dataset.place(index);
        let mut findings = BTreeSet::new();
        let (prompt_text, prompt_ids) = if layout == Layout::Prompt(Shape::Plain) {
            let prompt = text(row, "prompt", &place)?;
            (prompt.to_string(), encoder.encode_document(prompt)?)
        } else {
            let renderer = renderer.as_ref().ok_or_else(no_template)?;
            let (conversation, _) = renderer.read(row, &["prompt"], &mut findings, &place)?;
            let drawn = renderer.draw_prompt(&conversation, &place)?;
            findings.extend(drawn.findings);
            let prompt_text = drawn.rendered.text;
            let prompt_ids = encoder.encode(&prompt_text)?;
            (prompt_text, prompt_ids)
        };
        if prompt_ids.is_empty() {
            return Err(Error::Row {
                place: place(),
                problem: "the prompt is empty; expected at least one token".into(),
            });
        }
        progress(done.fetch_add(1, Ordering::Relaxed) + 1);
        let prompt = row.get("prompt").cloned().unwrap_or_default();
        Ok((PromptExample { index, prompt, prompt_text, prompt_ids, row: row.clone() }, findings))
    };
    let rows = dataset.rows().par_iter().enumerate();
    let prepared: Vec<Result<(PromptExample, BTreeSet<Finding>), Error>> =
        rows.map_init(|| tokenizer.encoder(), prepare).collect();
    let is_conversational = layout.is_conversational();
    let mut data = PromptData { is_conversational, num_rows: dataset.len(), ..PromptData::default() };
    for (index, prepared) in prepared.into_iter().enumerate() {
        let (prompt, findings) = prepared?;
        data.findings.add(findings, || dataset.place(index));
        data.prompts.push(prompt);
    }
    if let Some(limit) = options.max_prompt_length {
        data.truncated = limit_lengths(&mut data.prompts, limit, dataset, tokenizer, options.truncate_prompts)?;
    }
    Ok(data)
}

/// Refuses or cuts long prompts; returns how many were cut.
fn limit_lengths(
    prompts: &mut [PromptExample],
    limit: usize,
    dataset: &Dataset,
    tokenizer: &Tokenizer,
    truncate: bool,
) -> Result<usize, Error> {
    let is_long = |prompt: &PromptExample| prompt.prompt_ids.len() > limit;
    let count = prompts.iter().filter(|prompt| is_long(prompt)).count();
    let others = count.saturating_sub(1);
    for prompt in prompts.iter_mut().filter(|prompt| is_long(prompt)) {
        let tokens = prompt.prompt_ids.len();
        if !truncate {
            return Err(Error::PromptTooLong { place: dataset.place(prompt.index), tokens, limit, others });
        }
        prompt.prompt_ids.drain(..tokens - limit);
        prompt.prompt_text = tokenizer.decode(&prompt.prompt_ids, false)?;
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::super::tokenizer::fixture::tokenizer;
    use super::*;
    use crate::data::SpecialTokens;
    use serde_json::json;

    const CHAT: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{{ extra }}";

    fn prepare(values: &[Value], options: &PromptOptions) -> Result<Vec<PromptExample>, Error> {
        let rows = values.iter().map(|v| v.as_object().unwrap().clone()).collect();
        let template = ChatTemplate::new(CHAT, &SpecialTokens::default()).unwrap();
        let rows = Dataset::from_rows("memory", rows);
        prepare_prompts(&rows, &tokenizer(), Some(&template), options, &|_| {}).map(|data| data.prompts)
    }

    #[test]
    fn conversations_end_with_the_assistant_s_header_and_carry_their_row() {
        let turns = json!([{"role": "user", "content": "2+2"}]);
        let row = json!({"prompt": turns, "answer": "4", "chat_template_kwargs": {"extra": "!"}});
        let options = PromptOptions { system_prompt: Some("S".into()), ..PromptOptions::default() };
        let found = prepare(std::slice::from_ref(&row), &options).unwrap().remove(0);
        let text = "<|im_start|>system\nS<|im_end|><|im_start|>user\n2+2<|im_end|><|im_start|>assistant\n!";
        assert_eq!((found.index, found.prompt_text.as_str()), (0, text));
        assert_eq!(found.prompt_ids, tokenizer().encode(text).unwrap());
        assert_eq!((found.prompt, found.row["answer"].as_str()), (turns.clone(), Some("4")));
        // Tables hold the variables as JSON text.
        let as_text = |text: &str| json!({"prompt": turns, "answer": "4", "chat_template_kwargs": text});
        let found = prepare(&[as_text(" {\"extra\": \"!\"}")], &options).unwrap().remove(0);
        assert_eq!(found.prompt_text, text);
        let error = prepare(&[as_text("{'extra': 1}")], &options).unwrap_err().to_string();
        assert!(error.contains("row 1") && error.contains("`chat_template_kwargs` is text, but not a JSON"), "{error}");
    }

    #[test]
    fn plain_prompts_are_taken_as_they_are() {
        let found = prepare(&[json!({"prompt": "the x"}), json!({"prompt": "y"})], &PromptOptions::default()).unwrap();
        assert_eq!(found[0].prompt_text, "the x");
        assert_eq!(tokenizer().decode(&found[1].prompt_ids, false).unwrap(), "y");
        let options = PromptOptions { system_prompt: Some("S".into()), ..PromptOptions::default() };
        assert!(prepare(&[json!({"prompt": "x"})], &options).unwrap_err().to_string().contains("`system_prompt`"));
    }

    #[test]
    fn a_long_prompt_is_refused_by_name_or_cut_on_the_left() {
        let values = [json!({"prompt": "ab"}), json!({"prompt": "abcdef"}), json!({"prompt": "ghijk"})];
        let mut options = PromptOptions { max_prompt_length: Some(4), ..PromptOptions::default() };
        let text = prepare(&values, &options).unwrap_err().to_string();
        assert!(
            text.starts_with("row 1 (`memory`, row 2): the prompt has 6 tokens, the limit (`max_prompt_length`) is 4 (and 1 other prompt is too long)"),
            "{text}"
        );
        options.truncate_prompts = true;
        let texts: Vec<String> = prepare(&values, &options).unwrap().into_iter().map(|p| p.prompt_text).collect();
        assert_eq!(texts, ["ab", "cdef", "hijk"]);
    }

    #[test]
    fn of_equal_prompts_the_first_stays_unless_a_column_differs() {
        let values = [json!({"prompt": "a", "x": 1}), json!({"prompt": "a", "x": 2}), json!({"prompt": "a", "x": 1})];
        let rows = values.iter().map(|v| v.as_object().unwrap().clone()).collect();
        let rows = Dataset::from_rows("memory", rows);
        let mut data = prepare_prompts(&rows, &tokenizer(), None, &PromptOptions::default(), &|_| {}).unwrap();
        data.remove_duplicates();
        assert_eq!((data.prompts.len(), data.duplicates, data.num_rows), (2, vec![2], 3));
    }

    #[test]
    fn missing_empty_and_mixed_prompts_are_errors() {
        let message = |values: &[Value]| prepare(values, &PromptOptions::default()).unwrap_err().to_string();
        assert!(message(&[json!({"question": "x", "answer": "y"})]).contains("rename `question` to `prompt`"));
        assert!(message(&[json!({"prompt": "x"}), json!({"prompt": ""})]).contains("row 2): the prompt is empty"));
        let text = message(&[json!({"prompt": "x"}), json!({"prompt": []})]);
        assert!(text.contains("row 2): `prompt` is an array, expected a string"), "{text}");
        let text = message(&[json!({"prompt": [{"role": "user", "content": "x"}]}), json!({"prompt": "y"})]);
        assert!(text.contains("`prompt` is a string, expected a list of messages"), "{text}");
    }
}
