//! `trainer config`: what the keys of a configuration mean.

use clap::ArgGroup;

use super::{Context, Exit, UsageError};
use crate::config;

const EXAMPLES: &str = "\
Examples:
  trainer config --explain num_generations
  trainer config --reference | less";

/// Explain the keys of a configuration file
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = EXAMPLES, group(ArgGroup::new("what").required(true).args(["explain", "reference"])))]
pub struct Args {
    /// Print what one key means: its type, range, unit and default
    #[arg(long, value_name = "KEY")]
    explain: Option<String>,

    /// Print the reference of all keys as Markdown
    #[arg(long)]
    reference: bool,
}

/// Prints the explanation.
///
/// # Errors
/// If there is no such key.
pub fn run(args: &Args, context: &Context) -> anyhow::Result<Exit> {
    match &args.explain {
        Some(name) => context.print(&config::explain(name).map_err(UsageError)?)?,
        None => context.print(&config::reference())?,
    }
    Ok(Exit::Done)
}
