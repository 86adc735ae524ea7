//! Supervised examples: rows to tokens and to the mask of tokens to learn.
//!
//! Follows TRL's `SFTTrainer._prepare_dataset` (trl 1.16): the end-of-sequence token is appended to plain text and plain
//! completions; conversations go through the chat template; prompt and prompt + completion are tokenised each, and the
//! completion is what follows the prompt's tokens; masks are combined; examples are cut at the end; what has nothing
//! left to learn is dropped.

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;
use serde_json::{Map, Value};

use super::Error;
use super::conversation::{Layout, Renderer, Shape, text, turns};
use super::rows::{Dataset, Row};
use super::template::{ChatTemplate, Rendered, assistant_mask};
use super::tokenizer::Tokenizer;
use crate::config::settings::SftSettings;

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
    /// Rows left out because no token of theirs is learnt.
    pub dropped: usize,
    /// Examples cut to the length limit.
    pub truncated: usize,
    /// Rows whose prompt's tokens are not the first tokens of prompt + completion, so that the mask is off by the
    /// difference; the place of the first one.
    pub prefix_mismatches: usize,
    /// See `prefix_mismatches`.
    pub first_mismatch: Option<String>,
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
    let preparation = Preparation::new(&layout, tokenizer, template, options)?;
    let renderer = preparation.renderer();
    let done = AtomicUsize::new(0);
    let prepared: Vec<Result<Prepared, Error>> = dataset
        .rows()
        .par_iter()
        .enumerate()
        .map(|(index, row)| {
            let prepared = preparation.prepare(row, renderer.as_ref(), &|| dataset.place(index));
            progress(done.fetch_add(1, Ordering::Relaxed) + 1);
            prepared
        })
        .collect();
    let mut data = SftData::default();
    for (index, prepared) in prepared.into_iter().enumerate() {
        let Prepared { mut example, is_prefix } = prepared?;
        if !is_prefix {
            data.prefix_mismatches += 1;
            data.first_mismatch.get_or_insert_with(|| dataset.place(index));
        }
        let limit = options.max_length.unwrap_or(usize::MAX);
        let is_cut = example.input_ids.len() > limit;
        example.input_ids.truncate(limit);
        example.labels_mask.truncate(limit);
        if example.labels_mask.contains(&true) {
            data.truncated += usize::from(is_cut);
            data.examples.push(example);
        } else {
            data.dropped += 1;
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
    /// Whether the prompt's tokens begin the example, as they should.
    is_prefix: bool,
}

/// What is the same for all rows.
struct Preparation<'a> {
    layout: &'a Layout,
    tokenizer: &'a Tokenizer,
    template: Option<ChatTemplate>,
    options: &'a SftOptions,
    completion_only: bool,
    eos: String,
}

impl<'a> Preparation<'a> {
    fn new(
        layout: &'a Layout,
        tokenizer: &'a Tokenizer,
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
        Ok(Self { layout, tokenizer, template, options, completion_only, eos })
    }

    fn renderer(&self) -> Option<Renderer<'_>> {
        self.template.as_ref().map(|template| Renderer {
            template,
            system_prompt: self.options.system_prompt.as_deref(),
            variables: &self.options.chat_template_kwargs,
        })
    }

    fn prepare(
        &self,
        row: &Row,
        renderer: Option<&Renderer<'_>>,
        place: &dyn Fn() -> String,
    ) -> Result<Prepared, Error> {
        let renderer = || renderer.ok_or_else(no_template);
        match self.layout {
            Layout::Messages { column } => {
                let rendered = renderer()?.render(turns(row, column, place)?, row, false, place)?;
                let example = self.encode_conversation(&rendered)?;
                Ok(Prepared { example, is_prefix: true })
            }
            Layout::Text { column } => {
                let input_ids = self.tokenizer.encode_document(&self.with_eos(text(row, column, place)?))?;
                let labels_mask = vec![true; input_ids.len()];
                Ok(Prepared { example: SftExample { input_ids, labels_mask }, is_prefix: true })
            }
            Layout::PromptCompletion(Shape::Plain) => {
                let prompt = text(row, "prompt", place)?;
                let whole = format!("{prompt}{}", self.with_eos(text(row, "completion", place)?));
                let input_ids = self.tokenizer.encode_document(&whole)?;
                let labels_mask = vec![true; input_ids.len()];
                let prompt_ids = self.tokenizer.encode_document(prompt)?;
                Ok(self.after_prompt(&prompt_ids, SftExample { input_ids, labels_mask }))
            }
            Layout::PromptCompletion(Shape::Conversational) => {
                let prompt = turns(row, "prompt", place)?;
                let whole = [prompt.clone(), turns(row, "completion", place)?].concat();
                let rendered = renderer()?.render(prompt, row, true, place)?;
                let prompt_ids = self.tokenizer.encode(&rendered.text)?;
                let example = self.encode_conversation(&renderer()?.render(whole, row, false, place)?)?;
                Ok(self.after_prompt(&prompt_ids, example))
            }
            Layout::Prompt(_) => {
                Err(Error::Row { place: place(), problem: "a prompt alone is nothing to learn".into() })
            }
        }
    }

    fn with_eos(&self, text: &str) -> String {
        if text.ends_with(&self.eos) { text.to_string() } else { format!("{text}{}", self.eos) }
    }

    fn encode_conversation(&self, rendered: &Rendered) -> Result<SftExample, Error> {
        if self.options.assistant_only_loss {
            let encoding = self.tokenizer.encode_with_offsets(&rendered.text)?;
            let labels_mask = assistant_mask(&encoding.chars, &rendered.assistant);
            return Ok(SftExample { input_ids: encoding.ids, labels_mask });
        }
        let input_ids = self.tokenizer.encode(&rendered.text)?;
        let labels_mask = vec![true; input_ids.len()];
        Ok(SftExample { input_ids, labels_mask })
    }

    /// Takes the prompt out of the mask.
    fn after_prompt(&self, prompt_ids: &[u32], mut example: SftExample) -> Prepared {
        if self.completion_only {
            let count = prompt_ids.len().min(example.labels_mask.len());
            example.labels_mask[..count].fill(false);
        }
        let is_prefix = example.input_ids.starts_with(prompt_ids);
        Prepared { example, is_prefix }
    }
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
