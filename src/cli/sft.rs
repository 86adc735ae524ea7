//! `trainer sft`: supervised fine-tuning.

use super::{Context, Exit, TrainingArgs, training};
use crate::config::load_sft;
use crate::train;

const EXAMPLES: &str = "\
Examples:
  trainer sft configs/quickstart/sft.yaml
  trainer sft config.yaml --set model_name_or_path=models/qwen --set num_train_epochs=2
  trainer sft --config config.yaml --learning_rate 1e-5 --lora_target_modules q_proj v_proj --report_to none
  trainer sft config.yaml --resume";

/// Fine-tune a model on texts, prompts with completions, or conversations
///
/// Leaves in `output_dir`: the trained adapter or model, checkpoints, metrics.jsonl, config.resolved.yaml, curves.svg.
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
    training::run(&args.training, context, load_sft, |settings| &settings.training, train::sft::run)
}
