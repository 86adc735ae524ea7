//! The ranks of a run: how many there are, and what of its state they share.
//!
//! A launcher that started the process knows their number. Where none did, the configuration says it, else a launch file,
//! else the GPUs that are visible. What the configuration says itself counts more than a file that it names.

use std::path::PathBuf;

use super::diagnose::Problems;
use super::field::Named;
use super::keys::RawConfig;
use super::launcher::{self, Asked};
use super::resolve::Context;
use super::settings::{DeviceChoice, OffloadDevice, OffloadSettings, RankBackend, RankSettings, ZeroStage};
use super::value::{Mismatch, Parse, describe, parse_integer, valid_values};
use super::yaml::{Node, Value};

/// `zero_stage`: a number, or `auto`, which leaves it to the launch file and to the program.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Stage {
    Auto,
    Number(usize),
}

impl Parse for Stage {
    const KIND: &'static str = "one of";
    const VALUES: &'static [&'static str] = &["0", "1", "2", "3", "auto"];

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        let Value::Scalar { text, .. } = &node.value else {
            return Err(vec![Mismatch::expected(node, "a stage of ZeRO").help(valid_values("", Self::VALUES))]);
        };
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let number = parse_integer(node, Self::KIND).ok().and_then(|number| usize::try_from(number).ok());
        number.filter(|number| ZeroStage::of_number(*number).is_some()).map(Self::Number).ok_or_else(|| {
            let what = format!("does not know {}", describe(node));
            vec![Mismatch::new(node, what).help(valid_values("", Self::VALUES))]
        })
    }
}

/// `ddp_backend`: what ranks speak with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Backend(RankBackend);

impl Parse for Backend {
    const KIND: &'static str = "one of";
    const VALUES: &'static [&'static str] = &["gloo", "nccl"];

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        let text = match &node.value {
            Value::Scalar { text, .. } => text.as_str(),
            _ => return Err(vec![Mismatch::expected(node, "one word")]),
        };
        match text.to_lowercase().as_str() {
            "gloo" => Ok(Self(RankBackend::Gloo)),
            "nccl" => Ok(Self(RankBackend::Nccl)),
            _ => {
                let what = format!("does not know {}", describe(node));
                Err(vec![Mismatch::new(node, what).help("GPUs speak `nccl`, and through host memory `gloo`")])
            }
        }
    }
}

/// `offload_optimizer_device` and `offload_param_device`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Offload(pub(super) OffloadDevice);

impl Parse for Offload {
    const KIND: &'static str = "one of";
    const VALUES: &'static [&'static str] = OffloadDevice::NAMES;

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        let Value::Scalar { text, .. } = &node.value else {
            return Err(vec![Mismatch::expected(node, "one word").help(valid_values("", Self::VALUES))]);
        };
        text.to_lowercase().parse().map(Self).map_err(|()| {
            let what = format!("does not know {}", describe(node));
            vec![Mismatch::new(node, what).help(valid_values("", Self::VALUES))]
        })
    }
}

/// What ranks speak with; on CPUs that is host memory.
fn backend(raw: &RawConfig, context: &Context<'_>, problems: &mut Problems) -> RankBackend {
    let key = &raw.ddp_backend;
    match *key.value() {
        None => RankBackend::Auto,
        Some(Backend(RankBackend::Nccl)) if !is_on_gpu(raw, context) => {
            let message = "`ddp_backend: nccl` is for GPUs, and the ranks of this run compute on CPUs";
            problems.caution(&[(key, String::new())], message, "they speak through host memory, as with `gloo`");
            RankBackend::Auto
        }
        Some(Backend(backend)) => backend,
    }
}

/// Whether the optimizer works in host memory.
pub(super) fn offloads_optimizer(raw: &RawConfig) -> bool {
    let said = raw.offload_optimizer_device.value().map(|Offload(place)| place);
    let of_files = || launcher::asked(raw, true).iter().find_map(|file| file.offload_optimizer);
    said.or_else(of_files).unwrap_or(OffloadDevice::None) != OffloadDevice::None
}

/// What waits in host memory or in files.
fn offload(raw: &RawConfig, files: &[Asked<'_>], problems: &mut Problems) -> OffloadSettings {
    let mut place = |key: &dyn Named, said: Option<Offload>, wish: &dyn Fn(&Asked<'_>) -> Option<OffloadDevice>| {
        let mut chosen = said.map(|Offload(device)| (device, "the configuration"));
        for file in files {
            match (chosen, wish(file)) {
                (None, Some(device)) => chosen = Some((device, file.key.name())),
                (Some((device, source)), Some(other)) if device != other => problems.caution(
                    &[(file.key, String::new())],
                    format!(
                        "{} says {other} for `{}`, and {source} says {device}, which counts",
                        file.place(),
                        key.name()
                    ),
                    "results are the same, memory and time are not",
                ),
                _ => {}
            }
        }
        chosen.map_or(OffloadDevice::None, |(device, _)| device)
    };
    let (optimizer, params) = (&raw.offload_optimizer_device, &raw.offload_param_device);
    let optimizer = place(optimizer, *optimizer.value(), &|file| file.offload_optimizer);
    let params = place(params, *params.value(), &|file| file.offload_params);
    let key = &raw.stage3_max_live_parameters;
    let help = "results are the same, memory and time are not";
    let max_live_parameters = Chosen::new(key, *key.value()).among(files, |file| file.max_live, help, problems);
    let pin_memory = pin_memory(raw, files, problems);
    let key = &raw.offload_buffer_count;
    let buffer_count = Chosen::new(key, *key.value()).among(files, |file| file.buffer_count, help, problems);
    let has_files = [optimizer, params].contains(&OffloadDevice::Nvme);
    // The default may be written down.
    if !has_files && key.value().is_some_and(|count| count != OffloadSettings::default().buffer_count) {
        problems.caution(
            &[(key, String::new())],
            "`offload_buffer_count` has no effect: nothing waits in files",
            "write `offload_optimizer_device: nvme` or `offload_param_device: nvme`, or remove it",
        );
    }
    let mut offload =
        OffloadSettings { optimizer, params, pin_memory, max_live_parameters, ..OffloadSettings::default() };
    if has_files {
        offload.buffer_count = buffer_count.unwrap_or(offload.buffer_count).max(1);
    }
    name_folders(raw, files, &mut offload, problems);
    offload
}

/// Whether the pages of what waits in host memory are locked: as the configuration says, else the first of the files.
fn pin_memory(raw: &RawConfig, files: &[Asked<'_>], problems: &mut Problems) -> bool {
    let key = &raw.pin_memory;
    let mut chosen = key.is_given().then(|| (*key.value(), "the configuration"));
    for file in files {
        match (chosen, file.pin_memory) {
            (None, Some(is_pinned)) => chosen = Some((is_pinned, file.key.name())),
            (Some((is_pinned, source)), Some(other)) if is_pinned != other => problems.caution(
                &[(file.key, String::new())],
                format!(
                    "{} says {other} for `{}`, and {source} says {is_pinned}, which counts",
                    file.place(),
                    key.name()
                ),
                "results are the same, memory and time are not",
            ),
            _ => {}
        }
    }
    chosen.map_or(*key.value(), |(is_pinned, _)| is_pinned)
}

/// The folders of what waits in files.
fn name_folders(raw: &RawConfig, files: &[Asked<'_>], offload: &mut OffloadSettings, problems: &mut Problems) {
    let of_files = |path: &dyn Fn(&Asked<'_>) -> Option<PathBuf>| files.iter().find_map(path);
    let (of_optimizer, of_params) = (&raw.offload_optimizer_nvme_path, &raw.offload_param_nvme_path);
    let optimizer = of_optimizer.value().clone().or_else(|| of_files(&|file| file.optimizer_path.clone()));
    let params = of_params.value().clone().or_else(|| of_files(&|file| file.params_path.clone()));
    let (is_optimizers, is_params) = (offload.optimizer == OffloadDevice::Nvme, offload.params == OffloadDevice::Nvme);
    let either = optimizer.clone().or_else(|| params.clone());
    let is_named = [optimizer.is_some(), params.is_some()];
    for (key, device, is_asked, other) in [
        (of_optimizer, &raw.offload_optimizer_device, is_optimizers, (is_params, is_named[1])),
        (of_params, &raw.offload_param_device, is_params, (is_optimizers, is_named[0])),
    ] {
        // What waits in files without a folder of its own takes this one.
        let acts = is_asked || (other.0 && !other.1);
        if is_asked && either.is_none() {
            problems.clash(
                &[(device, String::new())],
                format!("`{}: nvme` needs a folder for its files, and none is named", device.name()),
                format!("name one on a fast disk of this machine: `{}: /local_nvme`", key.name()),
            );
        } else if key.value().is_some() && !acts {
            let why = if other.0 { "what waits in files has a folder of its own" } else { "nothing waits in files" };
            problems.caution(
                &[(key, String::new())],
                format!("`{}` has no effect: {why}", key.name()),
                format!("write `{}: nvme`, or remove it", device.name()),
            );
        }
    }
    offload.params_path = params.or_else(|| either.clone()).filter(|_| is_params);
    offload.optimizer_path = optimizer.or(either).filter(|_| is_optimizers);
}

fn device(raw: &RawConfig) -> DeviceChoice {
    if *raw.use_cpu.value() { DeviceChoice::Cpu } else { *raw.device.value() }
}

/// Whether the run computes on GPUs.
pub(super) fn is_on_gpu(raw: &RawConfig, context: &Context<'_>) -> bool {
    match device(raw) {
        DeviceChoice::Auto => context.visible_gpus > 0,
        DeviceChoice::Cpu => false,
        DeviceChoice::Cuda(_) => true,
    }
}

/// The ranks of the run. Reports what the launcher, the configuration and its launch files do not agree about.
pub(super) fn resolve(raw: &RawConfig, context: &Context<'_>, problems: &mut Problems) -> RankSettings {
    let gpus = if device(raw) == DeviceChoice::Auto { context.visible_gpus.max(1) } else { 1 };
    let mut asked = launcher::asked(raw, is_on_gpu(raw, context));
    let world_size = world_size(raw, context, gpus, &mut asked, problems);
    let stage = match raw.zero_stage.value() {
        Some(Stage::Number(number)) => Some(*number),
        Some(Stage::Auto) | None => None,
    };
    let help = "results are the same, memory and time are not";
    let stage = Chosen::new(&raw.zero_stage, stage).among(&asked, |file| file.stage, help, problems);
    let key = &raw.stage3_param_persistence_threshold;
    let threshold = Chosen::new(key, *key.value()).among(&asked, |file| file.persistence_threshold, help, problems);
    if let Some(stage) = stage.filter(|stage| *stage > 0 && world_size == 1) {
        let file = asked.iter().find(|file| file.stage == Some(stage)).map(|file| file.key);
        let place: &dyn Named =
            if raw.zero_stage.is_given() { &raw.zero_stage } else { file.unwrap_or(&raw.zero_stage) };
        problems.caution(
            &[(place, String::new())],
            format!("stage {stage} of ZeRO shares state between ranks, and this run has one, which holds all of it"),
            "`num_processes` says how many there are",
        );
    }
    let offload = offload(raw, &asked, problems);
    for file in asked {
        file.report(world_size, problems);
    }
    let default = RankSettings::default();
    RankSettings {
        world_size,
        stage: stage.and_then(ZeroStage::of_number).unwrap_or_default(),
        is_stage_auto: stage.is_none() && *raw.zero_stage.value() == Some(Stage::Auto),
        param_persistence_threshold: threshold.unwrap_or(default.param_persistence_threshold),
        timeout_secs: *raw.ddp_timeout.value(),
        backend: backend(raw, context, problems),
        offload,
    }
}

/// Number of ranks, of which `gpus` are there where nobody says it.
fn world_size(
    raw: &RawConfig,
    context: &Context<'_>,
    gpus: usize,
    asked: &mut [Asked<'_>],
    problems: &mut Problems,
) -> usize {
    let (key, launched) = (&raw.num_processes, context.launched);
    // Zero is out of range, which was reported where it was read.
    let said = key.value().map(|processes| processes.max(1));
    if let (Some(launched), Some(said)) = (launched, said)
        && launched != said
    {
        problems.clash(
            &[(key, String::new())],
            format!("`num_processes` is {said}, and the launcher started {launched}"),
            format!("remove it, or start {said} (`srun -n {said}`, `torchrun --nproc-per-node {said}`)"),
        );
        return launched;
    }
    if launched.is_none() {
        for file in asked.iter_mut().filter(|file| file.machines > 1) {
            let machines = file.machines;
            file.error(
                format!("is for {machines} machines, and no launcher started this process"),
                format!("start the run under srun, or with torchrun on each of the {machines} machines"),
            );
        }
    }
    let sequences = |ranks: usize| {
        let per_rank = raw.per_device_train_batch_size.value().saturating_mul(*raw.gradient_accumulation_steps.value());
        per_rank.saturating_mul(ranks)
    };
    let chosen = match launched {
        Some(launched) => Chosen { key, source: "the launcher", number: Some(launched) },
        None => Chosen::new(key, said),
    };
    let help = chosen.number.map_or_else(String::new, |ranks| {
        format!("a step has {} sequences; `gradient_accumulation_steps` makes them more or fewer", sequences(ranks))
    });
    // A preset's number is nobody's wish.
    let wish = |file: &Asked<'_>| file.processes.filter(|_| !file.is_preset);
    let preset = asked.iter().find_map(|file| file.processes.filter(|_| file.is_preset));
    chosen.among(asked, wish, &help, problems).or(preset).unwrap_or(gpus)
}

/// A number, and who said it.
struct Chosen<'a> {
    key: &'a dyn Named,
    source: &'static str,
    number: Option<usize>,
}

impl<'a> Chosen<'a> {
    /// What the configuration says itself.
    fn new(key: &'a dyn Named, number: Option<usize>) -> Self {
        Self { key, source: "the configuration", number }
    }

    /// It, or else what the first of the files says. Where one says something else, that is said.
    fn among(
        mut self,
        files: &[Asked<'_>],
        wish: impl Fn(&Asked<'_>) -> Option<usize>,
        help: &str,
        problems: &mut Problems,
    ) -> Option<usize> {
        for file in files {
            match (self.number, wish(file)) {
                (None, Some(number)) => (self.number, self.source) = (Some(number), file.key.name()),
                (Some(chosen), Some(number)) if chosen != number => {
                    let (name, source) = (self.key.name(), self.source);
                    problems.caution(
                        &[(file.key, String::new())],
                        format!(
                            "{} says {number} for `{name}`, and {source} says {chosen}, which counts",
                            file.place()
                        ),
                        help,
                    );
                }
                _ => {}
            }
        }
        self.number
    }
}
