//! `trainer preprocess`: the data half of a run, once and before it.

use std::path::PathBuf;
use std::sync::Arc;

use clap::ValueEnum;

use super::{Context, Diagnostics, Exit, Interrupt, UsageError, path, training};
use crate::config::{self, Command, ConfigError, Source};
use crate::engine::IsInterrupted;
use crate::reward;
use crate::train::{self, Outcome, preprocess};

const EXAMPLES: &str = "\
Examples:
  trainer preprocess config.yaml
  trainer preprocess config.yaml --output data/ready --dedup --jobs 16
  trainer sft config.yaml --set preprocessed=data/ready

  # With `preprocessed: data/ready` in the file, both commands take it as it is
  trainer preprocess config.yaml && trainer sft config.yaml";

/// GPUs that a machine may be without where its training has them: with fewer ranks the sizes of GRPO's batches may not
/// divide, and rows do not depend on them.
const OTHER_GPUS: [usize; 2] = [8, 64];

/// What is trained on the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Task {
    /// `trainer sft`
    Sft,
    /// `trainer grpo`
    Grpo,
}

/// Make the data of a configuration ready for training: read, render, tokenise, pack and keep it
///
/// Leaves a folder that the key `preprocessed` of `trainer sft` and `trainer grpo` takes; they then start without the data set
/// and train to the same bits. The folder is whole or absent.
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// The configuration of the training: a YAML file with the keys that TRL uses
    #[arg(value_name = "CONFIG", value_parser = path, required_unless_present = "named_config")]
    config: Option<PathBuf>,

    /// The same, as TRL's commands take it
    #[arg(long = "config", value_name = "CONFIG", value_parser = path, conflicts_with = "config")]
    named_config: Option<PathBuf>,

    /// What is trained on the rows; without it GRPO if the configuration has `reward_funcs`, else SFT
    #[arg(long, value_name = "TASK")]
    task: Option<Task>,

    /// The folder to write; without it that of `preprocessed`, else `preprocessed` in `output_dir`
    ///
    /// An earlier folder of this kind is replaced once the new one is whole.
    #[arg(long, short, value_name = "FOLDER", value_parser = path)]
    output: Option<PathBuf>,

    /// Replace a key of the file, e.g. `--set max_length=2048`; may be given several times, the last one wins
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = training::parse_override)]
    overrides: Vec<(String, String)>,

    /// Threads; without it as many as there are cores
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    jobs: Option<u16>,

    /// Leave out rows whose tokens, or prompts with all columns, are those of an earlier row
    #[arg(long)]
    dedup: bool,
}

/// Prepares the rows.
///
/// # Errors
/// If the configuration is wrong, or the rows cannot be prepared.
pub fn run(args: &Args, context: &Context) -> anyhow::Result<Exit> {
    if let Some(jobs) = args.jobs {
        // The pool of the process is made here or, later, by whoever needs it first.
        let pool = rayon::ThreadPoolBuilder::new().num_threads(usize::from(jobs)).build_global();
        pool.map_err(|error| UsageError(format!("`--jobs {jobs}`: {error}")))?;
    }
    let file = args.config.as_ref().or(args.named_config.as_ref());
    let has_colours = context.terminal.is_interactive();
    let in_colour = |error: ConfigError| Diagnostics(error.render(has_colours));
    let source =
        file.map_or_else(|| Ok(Source::new("command line", "")), |file| Source::read(file)).map_err(in_colour)?;
    let overrides: Vec<String> = args.overrides.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let folder = file.and_then(|file| training::folder_of(file));
    let surroundings = |visible_gpus: usize| config::Context {
        launched: None,
        visible_gpus,
        config_folder: folder.as_deref(),
        git_commit: None,
        check_reward: Some(reward::check),
        has_bf16: false,
    };
    let interrupt = Interrupt::listen()?;
    let asked = interrupt.clone();
    let is_interrupted: IsInterrupted = Arc::new(move || asked.requested());
    let ready = || interrupt.ready();
    let job = |warnings| preprocess::Context {
        terminal: context.terminal.clone(),
        output: args.output.clone(),
        removes_duplicates: args.dedup,
        ready: &ready,
        is_interrupted: is_interrupted.clone(),
        warnings,
    };
    let task = args.task.map(|task| if task == Task::Sft { Command::Sft } else { Command::Grpo });
    let outcome = match task.unwrap_or_else(|| config::command_of(&source, &overrides)) {
        Command::Sft => {
            let loaded =
                anywhere(|gpus| config::load_sft(&source, &overrides, &surroundings(gpus))).map_err(in_colour)?;
            preprocess::sft(&loaded.settings, &job(&loaded.warnings))?
        }
        Command::Grpo => {
            let loaded =
                anywhere(|gpus| config::load_grpo(&source, &overrides, &surroundings(gpus))).map_err(in_colour)?;
            preprocess::grpo(&loaded.settings, &job(&loaded.warnings))?
        }
    };
    Ok(match outcome {
        Outcome::Finished => Exit::Done,
        Outcome::Interrupted => Exit::Interrupted,
    })
}

/// Loads a configuration with the GPUs of this machine or, if that is not possible, with those that its training may have.
/// What is wrong with either is said of this one.
fn anywhere<T>(load: impl Fn(usize) -> Result<T, ConfigError>) -> Result<T, ConfigError> {
    let error = match load(train::visible_gpus()) {
        Err(error) => error,
        loaded => return loaded,
    };
    OTHER_GPUS.into_iter().find_map(|gpus| load(gpus).ok()).ok_or(error)
}
