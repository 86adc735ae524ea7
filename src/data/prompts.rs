//! Prompts for sampling: rows to rendered, tokenised prompts.
//!
//! As TRL's `GRPOTrainer`: conversations go through the chat template with the header of the next assistant turn; plain
//! prompts are tokenised as they are. All other columns travel along for the reward functions.

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;
use serde_json::{Map, Value};

use super::Error;
use super::conversation::{Layout, Renderer, Shape, text, turns};
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
) -> Result<Vec<PromptExample>, Error> {
    let layout = Layout::of_prompts(dataset)?;
    require_no_system_prompt(layout.is_conversational(), options.system_prompt.as_deref())?;
    let renderer = template.map(|template| Renderer {
        template,
        system_prompt: options.system_prompt.as_deref(),
        variables: &options.chat_template_kwargs,
    });
    let done = AtomicUsize::new(0);
    let prepare = |(index, row): (usize, &Row)| {
        let place = || dataset.place(index);
        let (prompt_text, prompt_ids) = if layout == Layout::Prompt(Shape::Plain) {
            let prompt = text(row, "prompt", &place)?;
            (prompt.to_string(), tokenizer.encode_document(prompt)?)
        } else {
            let renderer = renderer.as_ref().ok_or_else(no_template)?;
            let prompt_text = renderer.render(turns(row, "prompt", &place)?, row, true, &place)?.text;
            let prompt_ids = tokenizer.encode(&prompt_text)?;
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
        Ok(PromptExample { index, prompt, prompt_text, prompt_ids, row: row.clone() })
    };
    let prepared: Vec<Result<PromptExample, Error>> = dataset.rows().par_iter().enumerate().map(prepare).collect();
    let mut prompts = prepared.into_iter().collect::<Result<Vec<_>, _>>()?;
    if let Some(limit) = options.max_prompt_length {
        limit_lengths(&mut prompts, limit, dataset, tokenizer, options.truncate_prompts)?;
    }
    Ok(prompts)
}

fn limit_lengths(
    prompts: &mut [PromptExample],
    limit: usize,
    dataset: &Dataset,
    tokenizer: &Tokenizer,
    truncate: bool,
) -> Result<(), Error> {
    let is_long = |prompt: &PromptExample| prompt.prompt_ids.len() > limit;
    let others = prompts.iter().filter(|prompt| is_long(prompt)).count().saturating_sub(1);
    for prompt in prompts.iter_mut().filter(|prompt| is_long(prompt)) {
        let tokens = prompt.prompt_ids.len();
        if !truncate {
            return Err(Error::PromptTooLong { place: dataset.place(prompt.index), tokens, limit, others });
        }
        prompt.prompt_ids.drain(..tokens - limit);
        prompt.prompt_text = tokenizer.decode(&prompt.prompt_ids, false)?;
    }
    Ok(())
}
