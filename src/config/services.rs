//! What a file asks of others than this program: trackers, the hub, other optimizers, the environment.

use serde_json::Value;

use super::diagnose::Problems;
use super::field::Named;
use super::keys::RawConfig;
use super::load::is_secret;
use super::resolve::{Context, warn_idle};
use super::settings::OptimizerKind;
use super::value::listed;
use super::world;

/// The optimizer that `optim` names. 8-bit moments are the CPU's.
pub(super) fn optimizer(raw: &RawConfig, context: &Context<'_>) -> OptimizerKind {
    let optim = *raw.optim.value();
    match optim.kind() {
        OptimizerKind::AdamW8bit if works_on_gpu(raw, context) => OptimizerKind::AdamW,
        kind => kind,
    }
}

/// Whether the optimizer works on a GPU.
fn works_on_gpu(raw: &RawConfig, context: &Context<'_>) -> bool {
    world::is_on_gpu(raw, context) && !world::offloads_optimizer(raw)
}

/// Says what the optimizer's name asks for beside what it gives.
fn check_optimizer(raw: &RawConfig, context: &Context<'_>, problems: &mut Problems) {
    let (optim, is_on_gpu) = (*raw.optim.value(), works_on_gpu(raw, context));
    if is_on_gpu && [OptimizerKind::Lion, OptimizerKind::Muon].contains(&optim.kind()) {
        problems.clash(
            &[(&raw.optim, String::new())],
            format!("`optim: {}` is computed on the CPU only", optim.0),
            "use an AdamW, `offload_optimizer_device: cpu`, or `device: cpu`",
        );
        return;
    }
    if optimizer(raw, context) == OptimizerKind::AdamW8bit || (!is_on_gpu && optim.promised_bytes().is_none()) {
        // Moments are what was asked for, and in host memory anyway.
        return;
    }
    let held = if *raw.use_peft.value() {
        "the adapter's moments are kept in float32 on the device, 8 bytes for each of its parameters".to_owned()
    } else {
        let more =
            optim.promised_bytes().map_or_else(String::new, |bytes| format!(", {} more than asked for", 8 - bytes));
        format!("moments are kept in float32 on the device, 8 bytes for each parameter{more}")
    };
    if optim.promised_bytes().is_some() || optim.is_paged() {
        let help = if *raw.use_peft.value() {
            "beside the base they are small"
        } else {
            "with `use_peft: true` they are small"
        };
        problems.caution(&[(&raw.optim, String::new())], format!("`optim: {}` is AdamW here; {held}", optim.0), help);
    }
}

/// Says what a name asks for beside what it gives: an optimizer with smaller moments, a tracker, an upload.
pub(super) fn check_services(raw: &RawConfig, context: &Context<'_>, problems: &mut Problems) {
    check_optimizer(raw, context, problems);
    let trackers = &raw.report_to.value().trackers;
    if !trackers.is_empty() {
        let help = if trackers.contains(&"wandb") {
            "`wandb sync --sync-tensorboard` on its folder `runs` sends them to Weights & Biases"
        } else {
            "give these files to the tracker after the run"
        };
        problems.caution(
            &[(&raw.report_to, String::new())],
            format!(
                "`report_to` names {}, and nothing is sent to a tracker: metrics are in `output_dir/metrics.jsonl` and in \
                 TensorBoard's files in `output_dir/runs`",
                listed(trackers)
            ),
            help,
        );
    }
    let is_pushed = *raw.push_to_hub.value();
    let hub: [(&dyn Named, bool); 3] = [
        (&raw.hub_model_id, raw.hub_model_id.is_changed()),
        (&raw.hub_revision, raw.hub_revision.is_changed()),
        (&raw.hub_private_repo, raw.hub_private_repo.is_changed()),
    ];
    for (field, is_changed) in hub {
        warn_idle(problems, field, is_changed && !is_pushed, "`push_to_hub` is false", "add `push_to_hub: true`");
    }
    if is_pushed {
        problems.caution(
            &[(&raw.push_to_hub, String::new())],
            "`push_to_hub: true`: nothing is uploaded by itself",
            "the `hf upload` line to run is printed at the end",
        );
    }
}

/// Variables of the environment that change what this program does.
const VARIABLES: &[&str] = &[
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_TOKEN",
    "HOME",
    "NO_COLOR",
    "PATH",
    "RAYON_NUM_THREADS",
    "TRAINER_LOG",
];

/// Says which variables of `env` the program was not started with.
pub(super) fn check_environment(raw: &RawConfig, problems: &mut Problems) {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let differs = |(name, value): &(&String, &Value)| std::env::var(name.as_str()).ok() != Some(text(value));
    let (read, other): (Vec<_>, Vec<_>) = raw
        .env
        .value()
        .iter()
        .filter(differs)
        .map(|(name, value)| {
            let value = if is_secret(name) { "...".into() } else { text(value) };
            (name.as_str(), format!("{name}={value}"))
        })
        .partition(|(name, _)| VARIABLES.contains(name));
    let line = |found: &[(&str, String)]| found.iter().map(|(_, set)| set.as_str()).collect::<Vec<_>>().join(" ");
    if !read.is_empty() {
        problems.clash(
            &[(&raw.env, String::new())],
            format!("`env` asks for {}, and the program was not started with it", line(&read)),
            format!("start it as `{} trainer ...`, or remove the entry", line(&read)),
        );
    }
    if !other.is_empty() {
        problems.caution(
            &[(&raw.env, String::new())],
            format!("`env` asks for {}, which is not set: nothing of this program reads it", line(&other)),
            "if a reward program does, set it where the program is started",
        );
    }
}
