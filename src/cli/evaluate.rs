//! `trainer evaluate`: how good a model is on the data of a run, alone or beside another one.

use std::path::PathBuf;
use std::sync::Arc;

use super::training::{self, parse_override};
use super::{Context, Diagnostics, Exit, Interrupt, UsageError};
use crate::config::{self, ConfigError, Source, command_of, load_grpo, load_sft};
use crate::ranks;
use crate::train::evaluate::{self, Request, SplitChoice};
use crate::train::{self, Outcome};

const EXAMPLES: &str = "\
Examples:
  trainer evaluate config.yaml                                   # the run's result on its evaluation rows
  trainer evaluate config.yaml --against base                    # beside the model that it started from
  trainer evaluate config.yaml --model_path out/grpo/checkpoint-100 --against out/grpo/checkpoint-50
  trainer evaluate config.yaml --num_samples 16 --k 1,4,16 --max_samples 100 --set temperature=0.6

Leaves evaluation.json, evaluation.md and, with GRPO's configurations, completions.jsonl in `output_dir`/evaluation.";

/// What a configuration is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Task {
    /// Texts: loss, perplexity, token accuracy
    Sft,
    /// Completions: rewards, pass@k, majority votes
    Grpo,
}

/// Which rows of the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum SplitArg {
    /// Those that the run trains on
    Train,
    /// Those that it evaluates on
    Test,
}

impl From<SplitArg> for SplitChoice {
    fn from(arg: SplitArg) -> Self {
        match arg {
            SplitArg::Train => Self::Train,
            SplitArg::Test => Self::Test,
        }
    }
}

/// Measure a model, an adapter or a checkpoint with the data and the rewards or the loss of a run
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// The configuration of `trainer grpo` or `trainer sft`
    #[arg(value_name = "CONFIG", value_parser = super::path)]
    config: PathBuf,

    /// Whose configuration it is [default: GRPO's if it has `reward_funcs`, else SFT's]
    #[arg(long, value_name = "TASK", value_enum)]
    task: Option<Task>,

    /// The model: a folder with an adapter, a `checkpoint-N`, a model folder, a `.gguf` file, a hub id, or `base`, which is the
    /// configuration's model without an adapter [default: what the run left in `output_dir`, else the configuration's model]
    #[arg(long = "model_path", alias = "model-path", value_name = "MODEL", value_parser = super::location)]
    model_path: Option<String>,

    /// A second model, on the same rows with the same random numbers: adds the differences and whether they are seen
    #[arg(long, value_name = "MODEL", value_parser = super::location)]
    against: Option<String>,

    /// Which rows [default: those for evaluation, else those for training]
    #[arg(long, value_name = "SPLIT", value_enum)]
    split: Option<SplitArg>,

    /// Completions of each prompt [default: `num_generations_eval`]
    #[arg(long = "num_samples", alias = "num-samples", value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    num_samples: Option<u32>,

    /// The k of pass@k and majority@k, with commas between several [default: 1 and the number of samples]
    #[arg(long, value_name = "K", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..))]
    k: Vec<u32>,

    /// At most so many of the rows, from the first on
    #[arg(long = "max_samples", alias = "max-samples", value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    max_samples: Option<u32>,

    /// Folder of the results [default: `evaluation` in `output_dir`]
    #[arg(long, value_name = "FOLDER", value_parser = super::path)]
    output: Option<PathBuf>,

    /// Replace a key of the configuration, e.g. `--set temperature=0.6`; may be given several times, the last one wins
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = parse_override)]
    overrides: Vec<(String, String)>,
}

/// Evaluates.
///
/// # Errors
/// If the configuration is wrong, a model or the rows are not there, or the evaluation fails.
pub fn run(args: &Args, context: &Context) -> anyhow::Result<Exit> {
    refuse_ranks()?;
    let has_colours = context.terminal.is_interactive();
    let in_colour = |error: ConfigError| Diagnostics(error.render(has_colours));
    let source = Source::read(&args.config).map_err(in_colour)?;
    let overrides: Vec<String> = args.overrides.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let folder = training::folder_of(&args.config);
    let surroundings = training::surroundings(None, folder.as_deref());
    let task = args.task.unwrap_or_else(|| match command_of(&source, &overrides) {
        config::Command::Grpo => Task::Grpo,
        config::Command::Sft => Task::Sft,
    });
    let outcome = match task {
        Task::Grpo => {
            let mut loaded = load_grpo(&source, &overrides, &surroundings).map_err(in_colour)?;
            let samples = args.num_samples.map_or(loaded.settings.num_generations_eval, |count| count as usize);
            loaded.settings.num_generations_eval = samples;
            let request = args.request(args.ks(samples)?);
            with_context(context, &loaded.warnings, |context| evaluate::grpo(&loaded.settings, &request, context))?
        }
        Task::Sft => {
            args.refuse_sampling()?;
            let loaded = load_sft(&source, &overrides, &surroundings).map_err(in_colour)?;
            let request = args.request(Vec::new());
            with_context(context, &loaded.warnings, |context| evaluate::sft(&loaded.settings, &request, context))?
        }
    };
    Ok(match outcome {
        Outcome::Finished => Exit::Done,
        Outcome::Interrupted => Exit::Interrupted,
    })
}

/// Evaluation is one process; several would write the same files.
fn refuse_ranks() -> anyhow::Result<()> {
    let place = training::place().map_err(|error| UsageError(error.to_string()))?;
    if let Some(place) = place.filter(|place| place.world_size > 1) {
        anyhow::bail!(UsageError(format!(
            "evaluation is one process, and a launcher started {}; start it without `srun`, `torchrun` or `mpirun`, or with \
             one task",
            place.world_size
        )));
    }
    Ok(())
}

/// Evaluates with the console and the signals of this process.
fn with_context(
    context: &Context,
    warnings: &[String],
    evaluate: impl FnOnce(&train::Context<'_>) -> anyhow::Result<Outcome>,
) -> anyhow::Result<Outcome> {
    let interrupt = Interrupt::listen()?;
    let asked = interrupt.clone();
    evaluate(&train::Context {
        terminal: context.terminal.clone(),
        ranks: Arc::new(ranks::Alone),
        local_rank: 0,
        visible_devices: None,
        ready: &|| interrupt.ready(),
        is_interrupted: Arc::new(move || asked.requested()),
        resolved_yaml: "",
        warnings,
    })
}

impl Args {
    fn request(&self, ks: Vec<usize>) -> Request {
        Request {
            config: self.config.display().to_string(),
            model_path: self.model_path.clone(),
            against: self.against.clone(),
            split: self.split.map(Into::into),
            ks,
            max_samples: self.max_samples.map(|count| count as usize),
            output: self.output.clone(),
        }
    }

    /// The k of pass@k, ascending.
    fn ks(&self, samples: usize) -> Result<Vec<usize>, UsageError> {
        let mut ks: Vec<usize> = self.k.iter().map(|&k| k as usize).collect();
        if ks.is_empty() {
            ks = vec![1, samples];
        }
        ks.sort_unstable();
        ks.dedup();
        match ks.last().filter(|&&k| k > samples) {
            Some(k) => Err(UsageError(format!(
                "`--k {k}` is more than the {samples} samples of each prompt; raise `--num_samples`, or lower `--k`"
            ))),
            None => Ok(ks),
        }
    }

    /// Texts are not sampled.
    fn refuse_sampling(&self) -> Result<(), UsageError> {
        let given = [("--num_samples", self.num_samples.is_some()), ("--k", !self.k.is_empty())];
        match given.iter().find(|(_, is_given)| *is_given) {
            Some((flag, _)) => Err(UsageError(format!(
                "`{flag}` is for configurations of `trainer grpo`, and `{}` is one of `trainer sft` (it has no \
                 `reward_funcs`); leave it out",
                self.config.display()
            ))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn parse(arguments: &[&str]) -> Result<Args, String> {
        let all = ["trainer", "c.yaml"].iter().chain(arguments);
        Cli::try_parse_from(all).map(|cli| cli.args).map_err(|error| error.to_string())
    }

    #[test]
    fn the_ks_are_sorted_and_at_most_the_samples() {
        assert_eq!(parse(&[]).unwrap().ks(8).unwrap(), [1, 8]);
        assert_eq!(parse(&[]).unwrap().ks(1).unwrap(), [1]);
        assert_eq!(parse(&["--k", "8,1,4,4"]).unwrap().ks(8).unwrap(), [1, 4, 8]);
        let error = parse(&["--k", "1,16"]).unwrap().ks(8).unwrap_err().to_string();
        assert!(error.contains("`--k 16` is more than the 8 samples"), "{error}");
        for wrong in [["--k", "0"], ["--num_samples", "0"], ["--max_samples", "0"], ["--split", "dev"]] {
            assert!(parse(&wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn options_are_written_with_underscores_or_dashes() {
        let args = parse(&["--model-path", "m", "--num-samples", "2", "--max_samples", "3"]).unwrap();
        assert_eq!((args.model_path.as_deref(), args.num_samples, args.max_samples), (Some("m"), Some(2), Some(3)));
        assert!(args.refuse_sampling().is_err() && parse(&["--split", "train"]).unwrap().refuse_sampling().is_ok());
    }
}
