//! The command line: one file per subcommand, each an argument struct and a `run` that hands over to the rooms below.
//!
//! `main` calls [`main`] on a thread with a large stack and turns the returned [`Exit`] into the process's exit code.
//! Errors are printed here and nowhere else, as `error: what`, followed by the causes, one indented line each.

pub mod bench;
pub mod config;
mod devices;
pub mod estimate;
pub mod evaluate;
mod exit;
pub mod generate;
pub mod grpo;
mod interrupt;
mod keys;
mod launch;
pub mod preprocess;
pub mod sft;
mod training;

pub use exit::{Diagnostics, Exit, OutputClosed, UsageError};
pub use interrupt::Interrupt;
pub use training::TrainingArgs;

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::{Parser, Subcommand};

use crate::telemetry::{self, Terminal};

const EXAMPLES: &str = "\
Examples:
  # GRPO and SFT from the embedded examples: no download, a few minutes on a laptop
  trainer grpo configs/quickstart/grpo.yaml
  trainer sft configs/quickstart/sft.yaml

  # The same with other settings, in this way or TRL's, then going on from the newest checkpoint
  trainer grpo config.yaml --set learning_rate=2e-6 --set output_dir=out/b
  trainer grpo --config config.yaml --learning_rate 2e-6 --output_dir out/b --overwrite_output_dir
  trainer grpo config.yaml --set output_dir=out/b --resume

  # The data half first, once, on any machine
  trainer preprocess config.yaml --output data/ready
  trainer sft config.yaml --set preprocessed=data/ready

  # How good the run's result is, beside the model that it started from
  trainer evaluate config.yaml --against base

  # Ask a model, with or without an adapter
  trainer generate --model Qwen/Qwen2.5-0.5B-Instruct --prompt 'What is 12 * 7?'
  trainer generate --model model.gguf --adapter out/b --prompt 'What is 12 * 7?'
  trainer generate --model model.gguf --interactive

  # What a setting means
  trainer config --explain num_generations

Exit codes:
  0 done   1 failed   2 bad usage or configuration   3 another process of the run was lost
  130 interrupted (SIGINT, SIGTERM or SIGUSR1) after a clean save

Environment:
  TRAINER_LOG   level of log events on standard error, e.g. `info` or `warn,trainer=debug` [default: warn]
  NO_COLOR      no colours";

/// Fine-tuning (SFT) and reinforcement learning (GRPO) of Qwen-family language models in one binary.
#[derive(Debug, Parser)]
#[command(name = "trainer", version, after_long_help = EXAMPLES, max_term_width = 110)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Sft(sft::Args),
    Grpo(grpo::Args),
    Evaluate(evaluate::Args),
    Generate(generate::Args),
    Preprocess(preprocess::Args),
    Estimate(estimate::Args),
    Config(config::Args),
    Bench(bench::Args),
}

/// What every subcommand gets besides its arguments.
#[derive(Debug)]
pub struct Context {
    /// The console.
    pub terminal: Terminal,
}

impl Context {
    /// Prints text to standard output.
    ///
    /// # Errors
    /// [`OutputClosed`] if the reader went away, which ends the command quietly; else what the system says.
    pub fn print(&self, text: &str) -> anyhow::Result<()> {
        self.terminal.print(text).map_err(exit::output_error)
    }
}

/// Parses the arguments of this process, runs the subcommand and reports what went wrong.
pub fn main() -> Exit {
    let cli = match Cli::try_parse_from(keys::as_overrides(std::env::args_os())) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version go to standard output, mistakes to standard error; a closed pipe is nobody's mistake.
            let _ = error.print();
            return if error.use_stderr() { Exit::Usage } else { Exit::Done };
        }
    };
    let context = Context { terminal: Terminal::detect() };
    ignore_file_size_signal();
    let result = telemetry::init_logs(&context.terminal)
        .map_err(|error| UsageError(error.to_string()).into())
        .and_then(|()| run(&cli, &context));
    match result {
        Ok(exit) => exit,
        Err(error) => {
            let exit = exit::code_of(&error);
            if exit != Exit::Done {
                // With standard error gone there is nobody left to tell; the exit code still says it.
                let _ = std::io::stderr().lock().write_all(exit::render(&error).as_bytes());
            }
            exit
        }
    }
}

/// Makes a write beyond the file size limit (`ulimit -f`) an error of the write, with its message, instead of the sudden
/// death that SIGXFSZ is by default. Where the handler is refused that default stays.
fn ignore_file_size_signal() {
    let _ = signal_hook::flag::register(libc::SIGXFSZ, Arc::new(AtomicBool::new(false)));
}

/// A path, or a hub id, with its `~` undone, which a shell does not do in `--model=~/x`.
#[expect(clippy::unnecessary_wraps, reason = "the form of clap's parsers")]
fn location(text: &str) -> Result<String, std::convert::Infallible> {
    Ok(crate::config::expand_home(text))
}

/// A path with its `~` undone.
fn path(text: &str) -> Result<PathBuf, std::convert::Infallible> {
    location(text).map(PathBuf::from)
}

fn run(cli: &Cli, context: &Context) -> anyhow::Result<Exit> {
    devices::put_right(&training::environment())?;
    match &cli.command {
        Command::Sft(args) => sft::run(args, context),
        Command::Grpo(args) => grpo::run(args, context),
        Command::Evaluate(args) => evaluate::run(args, context),
        Command::Generate(args) => generate::run(args, context),
        Command::Preprocess(args) => preprocess::run(args, context),
        Command::Estimate(args) => estimate::run(args, context),
        Command::Config(args) => config::run(args, context),
        Command::Bench(args) => bench::run(args, context),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_tree_is_consistent_and_every_argument_has_help() {
        let mut command = Cli::command();
        command.build();
        command.clone().debug_assert();
        for subcommand in command.get_subcommands() {
            assert!(subcommand.get_about().is_some(), "{}", subcommand.get_name());
            for argument in subcommand.get_arguments() {
                assert!(argument.get_help().is_some(), "{} {}", subcommand.get_name(), argument.get_id());
            }
        }
    }
}
