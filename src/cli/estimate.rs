//! `trainer estimate`: what a run takes of a GPU's memory and of the host's, and which settings fit a card.

use std::fmt::Write as _;
use std::path::PathBuf;

use super::training::{self, parse_override};
use super::{Context, Diagnostics, Exit};
use crate::config::settings::{
    ModelSettings, OffloadDevice, OffloadSettings, Precision, RankSettings, TrainingSettings, ZeroStage,
};
use crate::config::{self, ConfigError, Source, command_of, load_grpo, load_sft};
use crate::engine::{Activations, Rates, Types};
use crate::telemetry::units;
use crate::train::estimate::{Estimate, Shape, Work};
use crate::train::session;

const EXAMPLES: &str = "\
Examples:
  trainer estimate configs/grpo_config_deepseek.yaml
  trainer estimate config.yaml --gpus 2 --card 11GB              # which stages and offloads fit two cards of 11 GB
  trainer estimate config.yaml --set max_length=8192 --set gradient_checkpointing=false";

/// Estimate the memory that a run takes, for every stage of ZeRO and offload; nothing is loaded and no GPU is needed
#[derive(Clone, Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// The configuration of `trainer sft` or `trainer grpo`
    #[arg(value_name = "CONFIG", value_parser = super::path)]
    config: PathBuf,

    /// GPUs of the run, a rank each [default: what the configuration says]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    gpus: Option<u32>,

    /// Memory of a card, e.g. 11GB or 24GiB: says what fits, and the fastest of it [default: `device_memory_limit`]
    #[arg(long, value_name = "MEMORY", value_parser = parse_bytes)]
    card: Option<u64>,

    /// The launch file, as `trainer sft` and `trainer grpo` take it
    #[arg(long = "config-file", alias = "config_file", value_name = "FILE")]
    launch_file: Option<PathBuf>,

    /// Replace a key of the configuration; may be given several times, the last one wins
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = parse_override)]
    overrides: Vec<(String, String)>,
}

fn parse_bytes(text: &str) -> Result<u64, String> {
    config::parse_bytes(text).ok_or_else(|| "write e.g. 11GB, 24GiB or 8589934592".into())
}

/// Estimates.
///
/// # Errors
/// If the configuration is wrong, or the model's own is not there.
pub fn run(args: &Args, context: &Context) -> anyhow::Result<Exit> {
    let in_colour = |error: ConfigError| Diagnostics(error.render(context.terminal.is_interactive()));
    let source = Source::read(&args.config).map_err(in_colour)?;
    let mut overrides: Vec<String> = args.overrides.iter().map(|(key, value)| format!("{key}={value}")).collect();
    overrides.extend(args.gpus.map(|gpus| format!("num_processes={gpus}")));
    overrides.extend(args.launch_file.iter().map(|file| format!("accelerate_config={}", training::quoted(file))));
    let folder = training::folder_of(&args.config);
    // As on a machine with GPUs that have bf16.
    let mut surroundings = training::surroundings(None, folder.as_deref());
    surroundings.visible_gpus = args.gpus.map_or_else(|| surroundings.visible_gpus.max(1), |gpus| gpus as usize);
    surroundings.has_bf16 = true;
    let (text, warnings) = match command_of(&source, &overrides) {
        config::Command::Grpo => {
            let loaded = load_grpo(&source, &overrides, &surroundings).map_err(in_colour)?;
            let settings = &loaded.settings;
            (describe(args, &settings.model, &settings.training, Work::of_grpo(settings))?, loaded.warnings)
        }
        config::Command::Sft => {
            let loaded = load_sft(&source, &overrides, &surroundings).map_err(in_colour)?;
            let settings = &loaded.settings;
            (describe(args, &settings.model, &settings.training, Work::of_sft(settings))?, loaded.warnings)
        }
    };
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    context.print(&text)?;
    Ok(Exit::Done)
}

fn describe(args: &Args, model: &ModelSettings, training: &TrainingSettings, work: Work) -> anyhow::Result<String> {
    let types = match training.precision {
        Precision::No => Types::F32,
        Precision::Fp16 => Types::F16,
        Precision::Bf16 => Types::BF16,
    };
    let (config, stored) = session::model_sizes(model, &mut |_| {})?;
    let parameters = config.num_parameters();
    let shape = Shape::new(config, &stored, model, types)?;
    let activations = session::activations(training);
    let of = |ranks: &RankSettings| shape.estimate(work, activations, ranks, training.optimizer.kind);
    let ranks = &training.ranks;
    let card = args.card.or(training.device_memory_limit);
    let mut text = format!(
        "{}: {} parameters, {} trained; {} tokens a micro-batch, {} micro-batches a step, {} rank{}\n\n",
        model.model_name_or_path,
        units::count(parameters as u64),
        units::count(shape.num_trained()),
        units::count(work.tokens as u64),
        work.micro_batches,
        ranks.world_size,
        if ranks.world_size == 1 { "" } else { "s" }
    );
    let least = |stage: &ZeroStage| {
        let estimate = of(&RankSettings { stage: *stage, ..ranks.clone() });
        estimate.at_least().device()
    };
    let stages = stages(ranks.world_size);
    // A run takes what is free instead of a card that is not named.
    let chosen = card.filter(|_| ranks.is_stage_auto).and_then(|card| stages.iter().find(|stage| least(stage) <= card));
    let ranks = &RankSettings { stage: chosen.copied().unwrap_or(ranks.stage), ..ranks.clone() };
    if ranks.is_stage_auto && ranks.world_size > 1 {
        let _ = match (chosen, card) {
            (Some(stage), Some(card)) => {
                writeln!(text, "`zero_stage: auto` takes {} on a card of {}:\n", stage.number(), units::bytes(card))
            }
            (None, Some(card)) => {
                writeln!(text, "`zero_stage: auto` finds none that fits a card of {}; stage 0:\n", units::bytes(card))
            }
            (_, None) => {
                text.write_str("`zero_stage: auto` takes the first that fits (`--card` says what); stage 0:\n\n")
            }
        };
    }
    write_parts(&mut text, &of(ranks), ranks, &shape);
    text.push_str("\nActivations of a micro-batch, on a card as fast as an H200:\n");
    for (what, how) in shape.plan(work, activations, 1, &Rates::H200).describe() {
        let _ = writeln!(text, "{what:<24}{how}");
    }
    text.push('\n');
    write_alternatives(&mut text, ranks, card, activations.0, &of);
    Ok(text)
}

/// What the configuration takes, by kind.
fn write_parts(text: &mut String, estimate: &Estimate, ranks: &RankSettings, shape: &Shape) {
    let trained = if shape.has_adapter() { "adapters" } else { "trained weights" };
    let rows = [
        ("weights", estimate.weights),
        (trained, estimate.trained),
        ("gradients", estimate.gradients),
        ("optimizer", estimate.optimizer),
        ("activations", estimate.activations),
        ("rollout's cache", estimate.kv_cache),
        ("rollout's steps", estimate.rollout),
        ("context and libraries", estimate.context),
    ];
    let _ = writeln!(text, "{:<24}{:>12}{:>16}", "", "each GPU", format!("{} in all", ranks.world_size));
    for (name, bytes) in rows.into_iter().filter(|(_, bytes)| *bytes > 0) {
        let _ = writeln!(
            text,
            "{name:<24}{:>12}{:>16}",
            units::bytes(bytes),
            units::bytes(bytes * ranks.world_size as u64)
        );
    }
    let device = estimate.device();
    let total = device * ranks.world_size as u64;
    if estimate.generating() > 0 {
        for (phase, bytes) in [("while it generates", estimate.generating()), ("while it trains", estimate.training())]
        {
            let _ = writeln!(
                text,
                "{phase:<24}{:>12}{:>16}",
                units::bytes(bytes),
                units::bytes(bytes * ranks.world_size as u64)
            );
        }
    }
    let _ = writeln!(text, "{:<24}{:>12}{:>16}", "at its most", units::bytes(device), units::bytes(total));
    let host = estimate.host;
    let _ = writeln!(
        text,
        "{:<24}{:>12}{:>16}",
        "in host memory",
        units::bytes(host),
        units::bytes(host * ranks.world_size as u64)
    );
    if estimate.files > 0 {
        let files = estimate.files;
        let _ = writeln!(
            text,
            "{:<24}{:>12}{:>16}",
            "in files",
            units::bytes(files),
            units::bytes(files * ranks.world_size as u64)
        );
    }
    if estimate.kv_cache + estimate.rollout > 0 {
        text.push_str("The rollout is in the place of activations; with less memory its cache is smaller.\n");
    }
}

/// The stages that there are to choose from.
fn stages(world_size: usize) -> &'static [ZeroStage] {
    if world_size == 1 {
        &[ZeroStage::Replicated]
    } else {
        &[ZeroStage::Replicated, ZeroStage::Optimizer, ZeroStage::Gradients, ZeroStage::Parameters]
    }
}

/// Every stage with every offload, the fastest first.
fn write_alternatives(
    text: &mut String,
    ranks: &RankSettings,
    card: Option<u64>,
    activations: Activations,
    of: &dyn Fn(&RankSettings) -> Estimate,
) {
    let stages = stages(ranks.world_size);
    let (none, cpu, nvme) = (OffloadDevice::None, OffloadDevice::Cpu, OffloadDevice::Nvme);
    let _ = writeln!(
        text,
        "{:<12}{:<22}{:>12}{:>17}{:>18}{}",
        "ZeRO stage",
        "waits elsewhere",
        "each GPU",
        "host, each rank",
        "files, each rank",
        card.map_or_else(String::new, |card| format!("   on a card of {}", units::bytes(card)))
    );
    let mut is_first = true;
    for (optimizer, params, name) in [
        (none, none, "-"),
        (cpu, none, "optimizer"),
        (none, cpu, "parameters"),
        (cpu, cpu, "both"),
        (nvme, none, "optimizer, in files"),
        (none, nvme, "parameters, in files"),
        (nvme, nvme, "both, in files"),
    ] {
        for &stage in stages {
            let offload = OffloadSettings { optimizer, params, ..ranks.offload.clone() };
            let estimate = of(&RankSettings { stage, offload, ..ranks.clone() });
            let device = estimate.device();
            // A rollout's cache gives way.
            let least = estimate.at_least().device();
            let verdict = card.map_or("", |card| match () {
                () if least > card => "   too much",
                () if is_first => {
                    is_first = false;
                    "   fits: the fastest that does"
                }
                () if device > card => "   fits with a smaller cache",
                () => "   fits",
            });
            let _ = writeln!(
                text,
                "{:<12}{name:<22}{:>12}{:>17}{:>18}{verdict}",
                stage.number(),
                units::bytes(device),
                units::bytes(estimate.host),
                units::bytes(estimate.files)
            );
        }
    }
    if activations == Activations::Keep {
        text.push_str("With `gradient_checkpointing: true` activations are a fraction of these.\n");
    }
}
