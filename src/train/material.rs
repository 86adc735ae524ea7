//! What a run learns from: rows that it reads, or what `trainer preprocess` made of them before.
//!
//! Both give the same batches to the last bit. Of prepared rows nothing is read at the start but what says that they are
//! those which this run would make.

use std::collections::BTreeMap;

use super::plan;
use super::session::Text;
use crate::config;
use crate::config::settings::{DataSettings, GrpoSettings, SftSettings, TrainingSettings};
use crate::data::prepared::{Fingerprint, Folder};
use crate::data::{
    self, ChatTemplate, Dataset, Part, PromptOptions, Prompts, Rows, Sequences, SftOptions, Splits, Tokenizer, hub,
};

/// The training and evaluation rows of a run.
pub(super) enum Material {
    /// Read now.
    Read(Box<Splits>),
    /// Prepared; `evaluates` says whether the run wants the evaluation rows.
    Prepared { folder: Box<Folder>, evaluates: bool },
}

/// What turns rows into tokens, and whether examples that come again are left out.
#[derive(Clone, Copy)]
pub(super) struct Making<'a> {
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) template: Option<&'a ChatTemplate>,
    pub(super) removes_duplicates: bool,
    /// Gets the number of rows done so far.
    pub(super) progress: &'a (dyn Fn(usize) + Sync),
}

impl Material {
    /// The rows of an SFT run.
    ///
    /// # Errors
    /// If they cannot be read, or are prepared otherwise than this run would make them.
    pub(super) fn of_sft(
        settings: &SftSettings,
        text: Text<'_>,
        progress: &mut hub::Progress<'_>,
    ) -> anyhow::Result<Self> {
        let texts = || config::sft_texts(settings);
        Self::open("sft", texts, &settings.data, &settings.training, text, progress)
    }

    /// The rows of a GRPO run.
    ///
    /// # Errors
    /// If they cannot be read, or are prepared otherwise than this run would make them.
    pub(super) fn of_grpo(
        settings: &GrpoSettings,
        text: Text<'_>,
        progress: &mut hub::Progress<'_>,
    ) -> anyhow::Result<Self> {
        let texts = || config::grpo_texts(settings);
        Self::open("grpo", texts, &settings.data, &settings.training, text, progress)
    }

    fn open(
        task: &str,
        texts: impl Fn() -> BTreeMap<&'static str, String>,
        data: &DataSettings,
        training: &TrainingSettings,
        text: Text<'_>,
        progress: &mut hub::Progress<'_>,
    ) -> anyhow::Result<Self> {
        let asked_by = plan::evaluation_key(training);
        let Some(path) = &data.preprocessed else {
            return Ok(Self::Read(Box::new(data::load(data, training.seed, asked_by, progress)?)));
        };
        let evaluates = asked_by.is_some();
        let folder = Box::new(Folder::open(path)?);
        folder.check(&Fingerprint::of(task, &texts(), evaluates, text.tokenizer, text.template)?)?;
        let changed = folder.changed_sources();
        if !changed.is_empty() {
            tracing::warn!(
                "the raw data of `preprocessed: {}` changed since and is not read: {}; run `trainer preprocess` again to train \
                 on what it is now",
                path.display(),
                changed.join("; ")
            );
        }
        Ok(Self::Prepared { folder, evaluates })
    }

    /// The training and evaluation rows, to be compared with those of an earlier run.
    pub(super) fn rows(&self) -> (Rows<'_>, Option<Rows<'_>>) {
        match self {
            Self::Read(splits) => (Rows::Read(&splits.train), splits.eval.as_ref().map(Rows::Read)),
            Self::Prepared { folder, evaluates } => {
                let eval = folder.manifest().eval.as_ref().filter(|_| *evaluates);
                (Rows::Known(&folder.manifest().train.rows), eval.map(|eval| Rows::Known(&eval.rows)))
            }
        }
    }

    /// What was taken of which data set, if there are several.
    pub(super) fn parts(&self) -> &[Part] {
        match self {
            Self::Read(splits) => &splits.parts,
            Self::Prepared { folder, .. } => &folder.manifest().parts,
        }
    }

    /// The training and evaluation sequences of SFT.
    ///
    /// # Errors
    /// If a row is broken, or nothing is to be learnt of them; or if a prepared file is damaged.
    pub(super) fn sequences(
        &self,
        settings: &SftSettings,
        text: Text<'_>,
    ) -> anyhow::Result<(Sequences, Option<Sequences>)> {
        let make = |rows: &Dataset, packing: bool| Ok(Making::of(text).sequences(settings, rows, packing)?.0);
        match self {
            Self::Read(splits) => {
                let train = make(&splits.train, settings.packing)?;
                let eval = splits.eval.as_ref().map(|rows| make(rows, settings.eval_packing)).transpose();
                eval.map(|eval| (train, eval))
            }
            Self::Prepared { folder, evaluates } => {
                let (train, eval) = folder.sequences()?;
                Ok((train, eval.filter(|_| *evaluates)))
            }
        }
    }

    /// The training and evaluation prompts of GRPO.
    ///
    /// # Errors
    /// If a row is broken or a prompt too long; or if a prepared file is damaged.
    pub(super) fn prompts(
        &self,
        settings: &GrpoSettings,
        text: Text<'_>,
    ) -> anyhow::Result<(Prompts, Option<Prompts>)> {
        let make = |rows: &Dataset| Ok(Making::of(text).prompts(settings, rows)?.0);
        match self {
            Self::Read(splits) => {
                let train = make(&splits.train)?;
                splits.eval.as_ref().map(make).transpose().map(|eval| (train, eval))
            }
            Self::Prepared { folder, evaluates } => {
                let (train, eval) = folder.prompts()?;
                Ok((train, eval.filter(|_| *evaluates)))
            }
        }
    }
}

impl<'a> Making<'a> {
    /// As a run makes them.
    pub(super) fn of(Text { tokenizer, template }: Text<'a>) -> Self {
        Self { tokenizer, template, removes_duplicates: false, progress: &|_| () }
    }

    /// Sequences of `rows`, and the rows that were left out as duplicates.
    pub(super) fn sequences(
        self,
        settings: &SftSettings,
        rows: &Dataset,
        packing: bool,
    ) -> Result<(Sequences, Vec<usize>), data::Error> {
        let options = SftOptions::from_settings(settings, packing);
        let mut made = data::prepare_sft(rows, self.tokenizer, self.template, &options, self.progress)?;
        if self.removes_duplicates {
            made.remove_duplicates();
        }
        let duplicates = made.duplicates.clone();
        let length = settings.max_length.filter(|_| packing);
        let sequences = Sequences::new(made, length.map(|length| (length, settings.packing_strategy)))?;
        Ok((sequences, duplicates))
    }

    /// Prompts of `rows`, and the rows that were left out as duplicates.
    pub(super) fn prompts(self, settings: &GrpoSettings, rows: &Dataset) -> Result<(Prompts, Vec<usize>), data::Error> {
        let options = PromptOptions::from_settings(settings);
        let mut made = data::prepare_prompts(rows, self.tokenizer, self.template, &options, self.progress)?;
        if self.removes_duplicates {
            made.remove_duplicates();
        }
        let duplicates = made.duplicates.clone();
        Ok((Prompts::new(made), duplicates))
    }
}
