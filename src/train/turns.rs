//! Chat template and end of turn: which template a run uses, which tokens end a sequence, and what is said of it.
//!
//! A base model's end-of-sequence token ends a document; a chat template ends the assistant's turns with a token of its
//! own. A model trained on turns writes that one, so it must end generation: here, and wherever the saved model runs.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use super::session::{self, Session};
use crate::config::settings::ModelSettings;
use crate::data::{ChatTemplate, Note, Tokenizer, hub};
use crate::telemetry::Section;

/// The chat template that `settings` name, or the model's own. Sets the tokens that end a sequence by `eos_token`, by the
/// place the template comes from, and by the template.
///
/// # Errors
/// If the template cannot be read, or the tokenizer lacks `eos_token`.
pub(super) fn open_template(
    settings: &ModelSettings,
    tokenizer_place: &Path,
    tokenizer: &mut Tokenizer,
    progress: &mut hub::Progress<'_>,
) -> anyhow::Result<Option<ChatTemplate>> {
    if let Some(token) = &settings.eos_token {
        tokenizer.set_eos(token)?;
    }
    let own_folder = tokenizer_place.is_dir().then_some(tokenizer_place);
    let template = match (&settings.chat_template, &settings.chat_template_path) {
        (Some(text), _) => Some(ChatTemplate::new(text, tokenizer.special()).context("`chat_template`")?),
        (None, Some(path)) => Some(template_at(path, settings.eos_token.is_some(), tokenizer, progress)?),
        (None, None) => ChatTemplate::find(None, own_folder, tokenizer)?,
    };
    if let Some(end) = template.as_ref().and_then(|template| end_of_turn(template, tokenizer)) {
        tokenizer.add_stop(end);
    }
    Ok(template)
}

/// A template file, or the template of a folder or hub id with a tokenizer, whose end-of-sequence token comes with it.
fn template_at(
    path: &Path,
    has_eos: bool,
    tokenizer: &mut Tokenizer,
    progress: &mut hub::Progress<'_>,
) -> anyhow::Result<ChatTemplate> {
    if path.is_file() {
        return Ok(ChatTemplate::from_file(path, tokenizer.special())?);
    }
    let name = path.to_string_lossy();
    let folder: PathBuf = if path.is_dir() || !hub::is_repo_id(&name) {
        path.to_path_buf()
    } else {
        session::local_path(&name, "main", progress)
            .with_context(|| format!("cannot get the chat template of `{name}`"))?
    };
    if !folder.is_dir() {
        // The error of a missing file says what there is not.
        return Ok(ChatTemplate::from_file(path, tokenizer.special())?);
    }
    let other = session::open_tokenizer(&folder).ok();
    let eos = other.as_ref().and_then(|other| other.special().strings.get("eos_token").cloned());
    if let Some(eos) = eos.filter(|_| !has_eos) {
        if tokenizer.token_to_id(&eos).is_some() {
            tokenizer.set_eos(&eos)?;
        } else {
            tracing::warn!(
                "the tokenizer in `{}` ends sequences with `{eos}`, which this model's tokenizer lacks; its own \
                 end-of-sequence token stays",
                folder.display()
            );
        }
    }
    let found = ChatTemplate::from_folder(&folder, tokenizer.special())?;
    let found = match (found, &other) {
        (None, Some(other)) => ChatTemplate::find(None, None, other)?,
        (found, _) => found,
    };
    match found {
        Some(template) => Ok(ChatTemplate::new(template.source(), tokenizer.special())?),
        None => {
            bail!("`chat_template_path: {name}` has no chat template; give a Jinja file or a tokenizer that has one")
        }
    }
}

/// The token with which the template ends the assistant's turns. A template that renders no plain question and answer
/// tells nothing.
fn end_of_turn(template: &ChatTemplate, tokenizer: &Tokenizer) -> Option<u32> {
    let after = template.after_answer().ok()?;
    tokenizer.end_of_turn(&after).ok().flatten()
}

impl Session {
    /// For data that go through the chat template: makes the token that ends the assistant's turns the one that is saved
    /// as the end of a sequence, and says so where it was another. A template without such a token is warned of.
    ///
    /// # Errors
    /// If the token is not in the vocabulary.
    pub(super) fn adopt_end_of_turn(&mut self, has_eos_token: bool) -> anyhow::Result<()> {
        let Some(template) = &self.template else { return Ok(()) };
        let Ok(after) = template.after_answer() else { return Ok(()) };
        match self.tokenizer.end_of_turn(&after)? {
            Some(end) if self.tokenizer.eos_ids().first() == Some(&end) => {}
            Some(end) => {
                let name = self.tokenizer.id_to_token(end).unwrap_or_default();
                let before = self.tokenizer.special().strings.get("eos_token").cloned().unwrap_or_default();
                if has_eos_token {
                    tracing::warn!(
                        "the chat template ends turns with `{name}`, not with `eos_token: {before}`; both end generation"
                    );
                } else {
                    self.tokenizer.set_eos(&name)?;
                    self.end_of_turn = Some(format!(
                        "`{name}` ends the chat template's turns, not the tokenizer's `{before}`: it ends generation, and is \
                         saved as the end-of-sequence token"
                    ));
                }
            }
            None => tracing::warn!(
                "the chat template never prints a token that ends a sequence: behind an answer it prints {after:?}; \
                 completions will run to the length limit. Set `eos_token`, or take a template that ends turns with a \
                 special token"
            ),
        }
        Ok(())
    }
}

/// Warns of what preparing a split lost or guessed.
pub(super) fn warn(split: &str, notes: &[Note]) {
    for note in notes.iter().filter(|note| note.is_warning) {
        tracing::warn!("{split} data: {}", note.text);
    }
}

/// Adds what preparing a split adapted to the plan.
pub(super) fn show_adapted(section: &mut Section, notes: &[Note]) {
    for note in notes.iter().filter(|note| !note.is_warning) {
        section.push("note", &note.text);
    }
}
