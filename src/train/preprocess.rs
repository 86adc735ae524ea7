//! The data half of a run, once: reads, renders, tokenises and packs the rows of a configuration, and keeps the result in a
//! folder that `preprocessed` of later runs names.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use super::material::Making;
use super::session;
use super::{Outcome, plan, turns};
use crate::config;
use crate::config::settings::{DataSettings, GrpoSettings, ModelSettings, SftSettings, TrainingSettings};
use crate::data::prepared::{FileEntry, Fingerprint, FolderWriter, Manifest, SourceFile, SplitEntry, Summary};
use crate::data::{self, ChatTemplate, Dataset, Prompts, RowsFingerprint, Sequences, Splits, Tokenizer};
use crate::engine::IsInterrupted;
use crate::telemetry::{Console, Section, Terminal, units};

/// Columns of the longest bar of a histogram.
const BAR: usize = 40;
/// Rows between two updates of a progress bar.
const ROWS_A_TICK: usize = 64;

/// What preprocessing is given by the command line.
pub struct Context<'a> {
    /// Where to print.
    pub terminal: Terminal,
    /// The folder to write; `None` leaves it to the configuration.
    pub output: Option<PathBuf>,
    /// Leave out examples that an earlier one equals.
    pub removes_duplicates: bool,
    /// Called before something is written: from here on a signal is to be asked for.
    pub ready: &'a dyn Fn(),
    /// Whether a signal asked to stop.
    pub is_interrupted: IsInterrupted,
    /// Warnings of the configuration.
    pub warnings: &'a [String],
}

/// Prepares the rows of an SFT run.
///
/// # Errors
/// If a row, the model's tokenizer or the folder to write is unusable.
pub fn sft(settings: &SftSettings, context: &Context<'_>) -> anyhow::Result<Outcome> {
    let job = Job::begin("sft", &settings.model, &settings.data, &settings.training, context)?;
    let make = |split: &str, rows: &Dataset, packing: bool| {
        job.make(split, rows, |making| making.sequences(settings, rows, packing))
    };
    let train = make("training", &job.splits.train, settings.packing)?;
    let eval = job.splits.eval.as_ref().map(|rows| make("evaluation", rows, settings.eval_packing)).transpose()?;
    let describe = |summary: &Summary, is_evaluation: bool, section: &mut Section| {
        let packing = if is_evaluation { settings.eval_packing } else { settings.packing };
        describe_sft(summary, settings.max_length.filter(|_| packing), section);
    };
    job.finish(&config::sft_texts(settings), (&train, eval.as_ref()), describe)
}

/// Prepares the prompts of a GRPO run.
///
/// # Errors
/// If a row, the model's tokenizer or the folder to write is unusable.
pub fn grpo(settings: &GrpoSettings, context: &Context<'_>) -> anyhow::Result<Outcome> {
    let job = Job::begin("grpo", &settings.model, &settings.data, &settings.training, context)?;
    let make = |split: &str, rows: &Dataset| job.make(split, rows, |making| making.prompts(settings, rows));
    let train = make("training", &job.splits.train)?;
    let eval = job.splits.eval.as_ref().map(|rows| make("evaluation", rows)).transpose()?;
    let describe = |summary: &Summary, _: bool, section: &mut Section| {
        if summary.truncated > 0 {
            let truncated = units::count(summary.truncated as u64);
            section.push("cut", format!("{truncated} prompts on the left at `max_prompt_length`"));
        }
    };
    job.finish(&config::grpo_texts(settings), (&train, eval.as_ref()), describe)
}

/// A split that is made and not yet written.
struct Made<T> {
    items: T,
    rows: RowsFingerprint,
}

/// Whether writing goes on, by the number of records so far.
type GoesOn<'a> = &'a dyn Fn(usize) -> bool;

/// What a split is made of.
trait Items {
    fn summary(&self) -> &Summary;
    fn write(
        &self,
        writer: &FolderWriter,
        is_evaluation: bool,
        goes_on: GoesOn<'_>,
    ) -> Result<Option<FileEntry>, data::Error>;
}

impl Items for Sequences {
    fn summary(&self) -> &Summary {
        self.summary()
    }

    fn write(
        &self,
        writer: &FolderWriter,
        is_evaluation: bool,
        goes_on: GoesOn<'_>,
    ) -> Result<Option<FileEntry>, data::Error> {
        writer.sequences(self, is_evaluation, goes_on)
    }
}

impl Items for Prompts {
    fn summary(&self) -> &Summary {
        self.summary()
    }

    fn write(
        &self,
        writer: &FolderWriter,
        is_evaluation: bool,
        goes_on: GoesOn<'_>,
    ) -> Result<Option<FileEntry>, data::Error> {
        writer.prompts(self, is_evaluation, goes_on)
    }
}

/// What both tasks do around making and writing their splits.
struct Job<'a> {
    task: &'static str,
    context: &'a Context<'a>,
    console: Console,
    target: PathBuf,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    splits: Splits,
    evaluates: bool,
}

impl<'a> Job<'a> {
    /// Opens the tokenizer and reads the rows.
    fn begin(
        task: &'static str,
        model: &ModelSettings,
        data: &DataSettings,
        training: &TrainingSettings,
        context: &'a Context<'a>,
    ) -> anyhow::Result<Self> {
        let console = Console::new(context.terminal.clone(), training.disable_tqdm);
        for warning in context.warnings {
            console.note(&format!("warning: {warning}"));
        }
        let of_config = || data.preprocessed.clone().unwrap_or_else(|| training.output_dir.join("preprocessed"));
        let target = context.output.clone().unwrap_or_else(of_config);
        // Before the rows, which may take long.
        FolderWriter::require_free(&target)?;
        let mut progress = plan::downloads(&context.terminal);
        let (tokenizer, template) = session::open_text(model, &mut progress)?;
        let asked_by = plan::evaluation_key(training);
        let splits = data::load(data, training.seed, asked_by, &mut progress)?;
        drop(progress);
        console.sections(&[Section::new("Preprocess")
            .row("task", task)
            .row("tokenizer", model.tokenizer_name_or_path.as_ref().unwrap_or(&model.model_name_or_path))
            .row("threads", rayon::current_num_threads())
            .row("output", target.display())]);
        Ok(Self { task, context, console, target, tokenizer, template, splits, evaluates: asked_by.is_some() })
    }

    /// Makes one split with a progress bar.
    fn make<T: Items>(
        &self,
        split: &str,
        rows: &Dataset,
        make: impl FnOnce(Making<'_>) -> Result<(T, Vec<usize>), data::Error>,
    ) -> anyhow::Result<Made<T>> {
        let bar = self.console.progress("tokenise", rows.len() as u64, "rows");
        let progress = |done: usize| {
            if done.is_multiple_of(ROWS_A_TICK) || done == rows.len() {
                bar.set(done as u64, 0);
            }
        };
        let making = Making {
            tokenizer: &self.tokenizer,
            template: self.template.as_ref(),
            removes_duplicates: self.context.removes_duplicates,
            progress: &progress,
        };
        let (items, duplicates) = make(making)?;
        drop(bar);
        turns::warn(split, &items.summary().notes);
        Ok(Made { items, rows: RowsFingerprint::without(rows, &duplicates) })
    }

    /// Writes the splits and the manifest, and says what is in them.
    fn finish<T: Items>(
        &self,
        texts: &BTreeMap<&'static str, String>,
        (train, eval): (&Made<T>, Option<&Made<T>>),
        describe: impl Fn(&Summary, bool, &mut Section),
    ) -> anyhow::Result<Outcome> {
        let (tokenizer, template) = (&self.tokenizer, self.template.as_ref());
        let fingerprint = Fingerprint::of(self.task, texts, self.evaluates, tokenizer, template)?;
        let sources = self.sources()?;
        // What is written beside its place is taken away again.
        (self.context.ready)();
        let writer = FolderWriter::begin(&self.target)?;
        let Some(train) = self.write(&writer, train, false)? else { return Ok(self.stop()) };
        let eval = match eval.map(|eval| self.write(&writer, eval, true)).transpose()? {
            Some(None) => return Ok(self.stop()),
            eval => eval.flatten(),
        };
        let sections: Vec<Section> = std::iter::once((&train, false))
            .chain(eval.iter().map(|eval| (eval, true)))
            .map(|(split, is_evaluation)| self.section(split, is_evaluation, &describe))
            .collect();
        writer.finish(&Manifest::new(fingerprint, sources, self.splits.parts.clone(), train, eval))?;
        self.console.sections(&sections);
        let (task, target) = (self.task, self.target.display());
        self.console.note(&format!("train on them with `trainer {task} CONFIG --set preprocessed={target}`"));
        Ok(Outcome::Finished)
    }

    /// Writes one split; `None` if a signal asked to stop.
    fn write<T: Items>(
        &self,
        writer: &FolderWriter,
        made: &Made<T>,
        is_evaluation: bool,
    ) -> anyhow::Result<Option<SplitEntry>> {
        let summary = made.items.summary();
        let bar = self.console.progress("write", summary.sequences as u64, "records");
        let goes_on = |done: usize| {
            if done.is_multiple_of(ROWS_A_TICK) {
                bar.set(done as u64, 0);
            }
            !(self.context.is_interrupted)()
        };
        let file = made.items.write(writer, is_evaluation, &goes_on)?;
        Ok(file.map(|file| SplitEntry { file, summary: summary.clone(), rows: made.rows.clone() }))
    }

    fn stop(&self) -> Outcome {
        self.console.note("interrupted; nothing was written");
        Outcome::Interrupted
    }

    /// The raw files, each once.
    fn sources(&self) -> anyhow::Result<Vec<SourceFile>> {
        let splits = std::iter::once(&self.splits.train).chain(&self.splits.eval);
        let files: BTreeSet<&PathBuf> = splits.flat_map(Dataset::files).collect();
        Ok(files.into_iter().map(|path| SourceFile::of(path)).collect::<Result<_, _>>()?)
    }

    /// What became of the rows of a split, and which file they are in.
    fn section(
        &self,
        SplitEntry { summary, file, .. }: &SplitEntry,
        is_evaluation: bool,
        describe: impl Fn(&Summary, bool, &mut Section),
    ) -> Section {
        let count = |count: usize| units::count(count as u64);
        let title = if is_evaluation { "Evaluation rows" } else { "Training rows" };
        let mut section = Section::new(title).row("rows", format!("{} read", count(summary.rows)));
        turns::show_adapted(&mut section, &summary.notes);
        if self.context.removes_duplicates {
            section.push("duplicates", format!("{} left out", count(summary.duplicates)));
        }
        if summary.dropped > 0 {
            let (dropped, beyond) = (count(summary.dropped), count(summary.beyond_limit));
            section.push(
                "left out",
                format!("{dropped} without a token to learn ({beyond} of them have some, beyond `max_length`)"),
            );
        }
        describe(summary, is_evaluation, &mut section);
        show_lengths(summary, &mut section);
        let (name, bytes) = (&file.name, units::bytes(file.bytes));
        section.row("file", format!("{name}, {bytes}, blake3 {}", file.blake3.get(..12).unwrap_or_default()))
    }
}

/// Cuts and packing; `packed_to` is the length that examples were packed into.
fn describe_sft(summary: &Summary, packed_to: Option<usize>, section: &mut Section) {
    let count = |count: usize| units::count(count as u64);
    if summary.truncated > 0 {
        section.push("cut", format!("{} examples at `max_length`", count(summary.truncated)));
    }
    if let Some(length) = packed_to {
        let full = 100.0 * summary.tokens as f64 / (summary.sequences * length) as f64;
        section.push("packing", format!("{} sequences, {full:.1}% full", count(summary.sequences)));
    }
}

/// Percentiles and a histogram of lengths.
fn show_lengths(summary: &Summary, section: &mut Section) {
    let lengths = &summary.statistics;
    let count = |count: usize| units::count(count as u64);
    section
        .push("kept", format!("{} of {} tokens, {:.1} each", count(lengths.count), count(lengths.total), lengths.mean));
    let percentiles = [
        ("shortest", lengths.min),
        ("5%", lengths.p5),
        ("25%", lengths.p25),
        ("50%", lengths.median),
        ("75%", lengths.p75),
        ("95%", lengths.p95),
        ("99%", lengths.p99),
        ("longest", lengths.max),
    ];
    let percentiles = percentiles.map(|(name, length)| format!("{name} {}", count(length)));
    section.push("lengths", format!("{} tokens", percentiles.join(", ")));
    let most = lengths.buckets.iter().map(|bucket| bucket.count).max().unwrap_or(0).max(1);
    for bucket in &lengths.buckets {
        section.push(
            format!("to {}", count(bucket.up_to)),
            format!("{} {}", bar(bucket.count, most), count(bucket.count)),
        );
    }
}

/// A bar for `count`, the longest for `most`; something is seen of every count but 0.
fn bar(count: usize, most: usize) -> String {
    let columns = (count * BAR).div_ceil(most);
    format!("{}{}", "━".repeat(columns), "·".repeat(BAR - columns))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::TokenStatistics;

    #[test]
    fn lengths_are_shown_as_bars_with_percentiles() {
        let statistics = TokenStatistics::of((0..40).map(|i| if i < 30 { 7 } else { 60 }));
        let summary = Summary { rows: 40, statistics, ..Summary::default() };
        let mut section = Section::new("Rows");
        show_lengths(&summary, &mut section);
        let terminal = Terminal::memory(100);
        Console::new(terminal.clone(), true).sections(&[section]);
        let text = terminal.collected();
        assert!(text.contains("40 of 810 tokens, 20.2 each"), "{text}");
        assert!(text.contains("shortest 7, 5% 7, 25% 7, 50% 7, 75% 7, 95% 60, 99% 60, longest 60 tokens"), "{text}");
        assert!(text.contains(&format!("to 8     {} 30", "━".repeat(BAR))), "{text}");
        assert!(text.contains(&format!("to 32    {} 0", "·".repeat(BAR))), "{text}");
        assert!(text.contains(&format!("to 64    {}{} 10", "━".repeat(14), "·".repeat(26))), "{text}");
    }
}
