//! `trainer grpo`: reinforcement learning from verifiable rewards.

use super::{Context, Exit, TrainingArgs, training};
use crate::config::load_grpo;
use crate::train;

const EXAMPLES: &str = "\
Examples:
  trainer grpo configs/quickstart/grpo.yaml
  trainer grpo config.yaml --set num_generations=8 --set 'reward_funcs=[accuracy, format]'
  trainer grpo --config config.yaml --num_generations 8 --reward_funcs accuracy format
  trainer grpo config.yaml --resume out/checkpoint-200";

/// Train a model with rewards on its own completions (GRPO and its relatives)
///
/// Leaves in `output_dir`: the trained adapter or model, checkpoints, metrics.jsonl, completions.jsonl,
/// config.resolved.yaml, curves.svg.
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    training: TrainingArgs,
}

/// Trains.
///
/// # Errors
/// If the configuration is wrong or the run fails.
pub fn run(args: &Args, context: &Context) -> anyhow::Result<Exit> {
    training::run(&args.training, context, load_grpo, |settings| &settings.training, train::grpo::run)
}
