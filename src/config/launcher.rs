//! Files of launchers: accelerate's YAML and DeepSpeed's JSON.
//!
//! Given in place of a configuration they are recognised and named. Named in one (`deepspeed`, `accelerate_config`) they are
//! held against it: what one process does anyway is accepted, what only saves memory or time is a warning, and what would
//! change the result is an error. `"auto"` stands for what the configuration says, as in transformers'
//! `HfTrainerDeepSpeedConfig.fill_match`.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::diagnose::Problems;
use super::field::{Command, Named};
use super::home;
use super::keys::RawConfig;
use super::resolve::Context;
use super::settings::LrSchedulerType;
use super::value::{self, Mismatch, Parse, nearest};
use super::yaml::{self, Node};

/// Names that only accelerate's files have.
const ACCELERATE: &[&str] = &[
    "compute_environment",
    "distributed_type",
    "machine_rank",
    "main_training_function",
    "rdzv_backend",
    "same_network",
    "num_machines",
    "num_processes",
    "downcast_bf16",
    "deepspeed_config",
    "fsdp_config",
    "tpu_env",
    "gpu_ids",
    "dynamo_config",
    "mixed_precision",
];
/// Names that only DeepSpeed's files have.
const DEEPSPEED: &[&str] = &[
    "zero_optimization",
    "train_micro_batch_size_per_gpu",
    "train_batch_size",
    "gradient_clipping",
    "steps_per_print",
];
/// Names without which nothing is a configuration.
const CONFIGURATION: &[&str] = &["model_name_or_path", "dataset_name", "output_dir", "learning_rate"];
/// Presets of TRL's `--accelerate_config`; all but the last are for 8 processes.
const PRESETS: &[&str] = &["zero1", "zero2", "zero3", "fsdp1", "fsdp2", "multi_gpu", "single_gpu"];
/// Largest launch file that is read.
const MOST_BYTES: u64 = 1 << 20;

/// What a file is that was given as the configuration, and what to do instead, if its keys are a launcher's.
pub(super) fn recognise(names: &[&str], command: Command) -> Option<(String, String)> {
    if names.iter().any(|name| CONFIGURATION.contains(name)) {
        return None;
    }
    let count = |known: &[&str]| names.iter().filter(|name| known.contains(name)).count();
    let (kind, key) = match (count(ACCELERATE), count(DEEPSPEED)) {
        (2.., _) => ("accelerate's launch file", "accelerate_config"),
        (_, 2..) => ("a DeepSpeed configuration", "deepspeed"),
        (_, 1) if names.contains(&"zero_optimization") => ("a DeepSpeed configuration", "deepspeed"),
        _ => return None,
    };
    Some((
        format!("this is {kind}, not the configuration of a training run"),
        format!(
            "give the training file: `{command} TRAINING.yaml`. No launcher is needed, one process is started; a training \
             file may name this one as `{key}`"
        ),
    ))
}

/// A launcher's settings: in a file, or written out.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum LaunchFile {
    Path(PathBuf),
    Map(Map<String, Value>),
}

impl Parse for LaunchFile {
    const KIND: &'static str = "a path or a map";

    fn parse(node: &Node) -> Result<Self, Vec<Mismatch>> {
        match &node.value {
            yaml::Value::Scalar { text, .. } if !text.is_empty() && !text.trim_start().starts_with('{') => {
                Ok(Self::Path(home::expand(text).into()))
            }
            yaml::Value::Map(_) | yaml::Value::Scalar { .. } => Map::parse(node).map(Self::Map),
            _ => Err(vec![Mismatch::expected(node, Self::KIND)]),
        }
    }
}

impl LaunchFile {
    fn name(&self) -> String {
        match self {
            Self::Path(path) => path.display().to_string(),
            Self::Map(_) => "the map".into(),
        }
    }

    fn read(&self) -> Result<Map<String, Value>, String> {
        match self {
            Self::Map(map) => Ok(map.clone()),
            Self::Path(path) => read(path),
        }
    }
}

fn read(path: &Path) -> Result<Map<String, Value>, String> {
    let failed = |error: std::io::Error| format!("cannot be read: {error}");
    if std::fs::metadata(path).map_err(failed)?.len() > MOST_BYTES {
        return Err("is larger than 1 MiB, which no launch file is".into());
    }
    let text = std::fs::read_to_string(path).map_err(failed)?;
    if let Ok(map) = serde_json::from_str(&text) {
        return Ok(map);
    }
    let node = yaml::parse(&text).map_err(|error| format!("is neither JSON nor YAML: {}", error.message))?;
    match value::json(&node) {
        Ok(Value::Object(map)) => Ok(map),
        _ => Err("is no map of keys".into()),
    }
}

/// Reports what the launchers' files ask for beside what the configuration says.
pub(super) fn check(raw: &RawConfig, context: &Context<'_>, problems: &mut Problems) {
    let processes = *raw.num_processes.value();
    if processes.is_some_and(|processes| processes != context.world_size) {
        problems.clash(
            &[(&raw.num_processes, String::new())],
            format!("`num_processes` is {}, and this run has {}", processes.unwrap_or(0), context.world_size),
            "remove it; for the same batch, multiply `gradient_accumulation_steps` by the number of processes",
        );
    }
    if let Some(file) = raw.deepspeed.value() {
        let mut asked = Asked::new(raw, context, file.name(), &raw.deepspeed);
        match file.read() {
            Ok(map) => asked.deepspeed(&map),
            Err(why) => asked.error(why, "check the path; it is relative to the working directory"),
        }
        asked.report(problems);
    }
    if let Some(file) = raw.accelerate_config.value() {
        let mut asked = Asked::new(raw, context, file.name(), &raw.accelerate_config);
        match file {
            LaunchFile::Path(path) if !path.exists() && is_preset(path) => asked.preset(path),
            _ => match file.read() {
                Ok(map) => asked.accelerate(&map),
                Err(why) => asked.error(why, "name a file, or one of TRL's: zero1, zero2, zero3, fsdp1, fsdp2, ..."),
            },
        }
        asked.report(problems);
    }
}

fn is_preset(path: &Path) -> bool {
    path.to_str().is_some_and(|name| PRESETS.contains(&name))
}

/// What one file asks for.
struct Asked<'a> {
    raw: &'a RawConfig,
    world_size: usize,
    name: String,
    key: &'a dyn Named,
    /// What is wrong, and what to do.
    errors: Vec<(String, String)>,
    /// What is not there and changes nothing but memory and time.
    missing: Vec<String>,
    /// Stages of sharding that are asked for.
    sharding: Option<String>,
}

impl<'a> Asked<'a> {
    fn new(raw: &'a RawConfig, context: &Context<'_>, name: String, key: &'a dyn Named) -> Self {
        let (errors, missing) = (Vec::new(), Vec::new());
        Self { raw, world_size: context.world_size, name, key, errors, missing, sharding: None }
    }

    fn error(&mut self, message: impl Into<String>, help: impl Into<String>) {
        self.errors.push((message.into(), help.into()));
    }

    fn report(self, problems: &mut Problems) {
        let Self { name, key, errors, missing, sharding, .. } = self;
        let place = [(key, String::new())];
        let is_accepted = errors.is_empty();
        for (message, help) in errors {
            problems.clash(&place, format!("`{}`: {name} {message}", key.name()), help);
        }
        if !is_accepted {
            return;
        }
        let sharding = sharding.map_or_else(String::new, |what| format!("; {what} has nothing to shard"));
        let message = format!("`{}`: {name} was read, one process does what it asks for{sharding}", key.name());
        problems.caution(&place, message, "the file has no other effect");
        if !missing.is_empty() {
            let message = format!("`{}`: {name} asks for {}, which is not done", key.name(), missing.join(", "));
            problems.caution(&place, message, "results are the same, memory and time are not");
        }
    }

    /// A number that must be what a key says.
    fn number(&mut self, path: &str, value: &Value, key: &str, ours: f64) {
        let given = match value {
            Value::Number(number) => number.as_f64(),
            Value::String(text) if text != "auto" => value::as_float(text),
            _ if is_auto(value) => return,
            _ => None,
        };
        if given != Some(ours) {
            self.error(
                format!("has `{path}: {value}`, and `{key}` is {ours}"),
                format!("write \"auto\" there, or change `{key}`"),
            );
        }
    }

    /// Something that must be off: absent, false, empty, or a map that is not enabled.
    fn off(&mut self, path: &str, value: &Value) {
        let is_off = match value {
            Value::Null | Value::Bool(false) => true,
            Value::Object(map) => map.is_empty() || map.get("enabled").is_some_and(|on| on == &Value::Bool(false)),
            _ => is_auto(value),
        };
        if !is_off {
            self.error(format!("asks for `{path}`, which is not supported"), "remove it from the file");
        }
    }

    fn deepspeed(&mut self, map: &Map<String, Value>) {
        let raw = self.raw;
        let (per_device, accumulation) =
            (*raw.per_device_train_batch_size.value(), *raw.gradient_accumulation_steps.value());
        for (name, value) in map {
            match name.as_str() {
                "train_micro_batch_size_per_gpu" => {
                    self.number(name, value, "per_device_train_batch_size", per_device as f64);
                }
                "gradient_accumulation_steps" => self.number(name, value, name, accumulation as f64),
                "train_batch_size" => {
                    let all = per_device as f64 * accumulation as f64 * self.world_size as f64;
                    let key = "per_device_train_batch_size` x `gradient_accumulation_steps";
                    self.number(name, value, key, all);
                }
                "gradient_clipping" => self.number(name, value, "max_grad_norm", *raw.max_grad_norm.value()),
                "bf16" | "bfloat16" => self.precision(name, value, "bf16", *raw.bf16.value()),
                "fp16" => {
                    self.precision(name, value, "fp16", Some(*raw.fp16.value()));
                    self.loss_scale(value);
                }
                "optimizer" => self.optimizer(value),
                "scheduler" => self.scheduler(value),
                "zero_optimization" => self.zero(value),
                _ if QUIET.contains(&name.as_str()) => {}
                _ if OFF.contains(&name.as_str()) => self.off(name, value),
                "autotp_size" | "sequence_parallel_size" => self.number(name, value, "num_processes", 1.0),
                _ => {
                    let known = QUIET.iter().chain(OFF).chain(READ).copied();
                    let help = nearest(name, known)
                        .map_or_else(|| "remove it".into(), |near| format!("did you mean `{near}`? Else remove it"));
                    self.error(format!("has `{name}`, which is not known"), help);
                }
            }
        }
    }

    /// A precision that is on or off; ours may be left to the device.
    fn precision(&mut self, path: &str, value: &Value, key: &str, ours: Option<bool>) {
        let enabled = match value {
            Value::Object(map) => map.get("enabled").unwrap_or(&Value::Null),
            other => other,
        };
        let wants = match enabled {
            Value::Bool(wants) => *wants,
            Value::Null => false,
            other if is_auto(other) => return,
            other => return self.error(format!("has `{path}.enabled: {other}`"), "write true, false or \"auto\""),
        };
        let is_other = key == "bf16" && wants && *self.raw.fp16.value();
        if is_other || ours.is_some_and(|ours| ours != wants) {
            let says = if is_other { "`fp16` is true".into() } else { format!("`{key}` is {}", !wants) };
            self.error(
                format!("has `{path}.enabled: {wants}`, and {says}"),
                format!("write \"auto\" there, or `{key}: {wants}` in the configuration"),
            );
        }
    }

    /// Loss scaling is DeepSpeed's own, with its defaults.
    fn loss_scale(&mut self, value: &Value) {
        let Value::Object(map) = value else { return };
        if !*self.raw.fp16.value() {
            return;
        }
        for (name, default) in [
            ("loss_scale", 0.0),
            ("initial_scale_power", 16.0),
            ("loss_scale_window", 1000.0),
            ("hysteresis", 2.0),
            ("min_loss_scale", 1.0),
        ] {
            if let Some(value) = map.get(name)
                && !is_auto(value)
                && value.as_f64() != Some(default)
            {
                self.error(
                    format!("has `fp16.{name}: {value}`; loss scaling is dynamic here"),
                    format!("write {default}"),
                );
            }
        }
    }

    fn optimizer(&mut self, value: &Value) {
        let raw = self.raw;
        let kind = value.get("type").and_then(Value::as_str).unwrap_or("").to_lowercase();
        if !["adam", "adamw", "fusedadam", "deepspeedcpuadam"].contains(&kind.as_str()) {
            return self.error(
                format!("has the optimizer {}", value.get("type").unwrap_or(&Value::Null)),
                "AdamW is the only optimizer",
            );
        }
        let (beta1, beta2) = (*raw.adam_beta1.value(), *raw.adam_beta2.value());
        for (name, value) in value.get("params").and_then(Value::as_object).into_iter().flatten() {
            let path = format!("optimizer.params.{name}");
            match name.as_str() {
                "lr" => self.number(&path, value, "learning_rate", *raw.learning_rate.value()),
                "eps" => self.number(&path, value, "adam_epsilon", *raw.adam_epsilon.value()),
                "weight_decay" => self.number(&path, value, name, *raw.weight_decay.value()),
                "betas" => match value.as_array().map(Vec::as_slice) {
                    Some([first, second]) => {
                        self.number(&path, first, "adam_beta1", beta1);
                        self.number(&path, second, "adam_beta2", beta2);
                    }
                    _ if is_auto(value) => {}
                    _ => self.error(format!("has `{path}: {value}`"), "write two numbers or \"auto\""),
                },
                "adam_w_mode" | "bias_correction" if value == &Value::Bool(true) => {}
                "amsgrad" if value == &Value::Bool(false) => {}
                "torch_adam" | "fused" | "freeze_step" => {}
                _ => self.error(format!("has `{path}: {value}`"), "remove it; AdamW is used as published"),
            }
        }
    }

    fn scheduler(&mut self, value: &Value) {
        let raw = self.raw;
        let kind = value.get("type").and_then(Value::as_str).unwrap_or("");
        let same = match kind {
            "WarmupLR" => LrSchedulerType::ConstantWithWarmup,
            "WarmupDecayLR" => LrSchedulerType::Linear,
            "WarmupCosineLR" => LrSchedulerType::Cosine,
            _ => {
                return self
                    .error(format!("has the scheduler {kind:?}"), "remove it; `lr_scheduler_type` says the course");
            }
        };
        let ours = *raw.lr_scheduler_type.value();
        if ours != same {
            self.error(
                format!("has the scheduler {kind:?}, and `lr_scheduler_type` is {ours}"),
                format!("write `lr_scheduler_type: {same}`, or remove the scheduler from the file"),
            );
        }
        let warmup = *raw.warmup_steps.value();
        for (name, value) in value.get("params").and_then(Value::as_object).into_iter().flatten() {
            let path = format!("scheduler.params.{name}");
            match name.as_str() {
                "warmup_max_lr" => self.number(&path, value, "learning_rate", *raw.learning_rate.value()),
                "warmup_num_steps" => self.number(&path, value, "warmup_steps", warmup),
                "total_num_steps" => match raw.max_steps.value().0 {
                    Some(steps) => self.number(&path, value, "max_steps", steps as f64),
                    None if is_auto(value) => {}
                    None => self.error(format!("has `{path}: {value}`"), "write \"auto\" there, or set `max_steps`"),
                },
                "warmup_min_lr" | "warmup_min_ratio" if is_auto(value) || value.as_f64() == Some(0.0) => {}
                "warmup_type" if is_auto(value) || value == "linear" => {}
                _ => self.error(format!("has `{path}: {value}`"), "remove it; `lr_scheduler_type` says the course"),
            }
        }
        let is_linear = value.pointer("/params/warmup_type").is_some_and(|kind| kind == "linear");
        if !is_linear && (warmup > 0.0 || raw.warmup_ratio.value().is_some_and(|ratio| ratio > 0.0)) {
            self.missing.push("a logarithmic warm-up (DeepSpeed's default; here it is linear)".into());
        }
    }

    fn zero(&mut self, value: &Value) {
        let stage = value.get("stage").and_then(Value::as_u64).unwrap_or(0);
        self.shards(format!("ZeRO stage {stage}"), stage > 0);
        for name in ["offload_optimizer", "offload_param"] {
            let device = value.pointer(&format!("/{name}/device")).and_then(Value::as_str).unwrap_or("none");
            self.offload(name, device);
        }
        if value.get("cpu_offload").is_some_and(|on| on == &Value::Bool(true)) {
            self.offload("cpu_offload", "cpu");
        }
    }

    fn offload(&mut self, what: &str, device: &str) {
        if !["none", "auto", ""].contains(&device) {
            self.missing.push(format!("`{what}` to {device}"));
        }
    }

    fn shards(&mut self, what: String, is_on: bool) {
        if is_on && self.world_size > 1 {
            self.error(format!("asks for {what} over {} processes", self.world_size), "start one process");
        } else if is_on {
            self.sharding = Some(what);
        }
    }

    fn preset(&mut self, path: &Path) {
        let name = path.to_string_lossy().into_owned();
        if name != "single_gpu" {
            self.processes(8);
            self.shards(format!("`{name}`"), true);
        }
    }

    /// The number of processes of a launch file, unless the configuration has one itself.
    fn processes(&mut self, processes: u64) {
        if processes != self.world_size as u64 && self.raw.num_processes.value().is_none() {
            self.error(
                format!("is for {processes} processes, and this run has {}: its batches would be smaller", self.world_size),
                format!(
                    "set `num_processes: {}`; for the same batch, multiply `gradient_accumulation_steps` by {processes}",
                    self.world_size
                ),
            );
        }
    }

    fn accelerate(&mut self, map: &Map<String, Value>) {
        let kind = map.get("distributed_type").and_then(Value::as_str).unwrap_or("NO");
        if !["NO", "MULTI_GPU", "MULTI_CPU", "DEEPSPEED", "FSDP"].contains(&kind) {
            self.error(format!("has `distributed_type: {kind}`"), "there are CPUs and NVIDIA GPUs");
        }
        if kind != "NO"
            && let Some(processes) = map.get("num_processes").and_then(Value::as_u64)
        {
            self.processes(processes);
        }
        match map.get("mixed_precision").and_then(Value::as_str).unwrap_or("no") {
            "bf16" => {
                let refused = self.raw.bf16.value().filter(|on| !on);
                self.precision("mixed_precision", &Value::Bool(true), "bf16", refused);
            }
            "fp16" => self.precision("mixed_precision", &Value::Bool(true), "fp16", Some(*self.raw.fp16.value())),
            "no" => {}
            other => self.error(format!("has `mixed_precision: {other}`"), "use `bf16: true` or `fp16: true`"),
        }
        if let Some(Value::Object(inner)) = map.get("deepspeed_config") {
            self.accelerate_deepspeed(inner);
        }
        if let Some(inner) = map.get("fsdp_config").filter(|_| kind == "FSDP") {
            self.shards("FSDP".into(), true);
            if inner.get("fsdp_offload_params").is_some_and(|on| on == &Value::Bool(true)) {
                self.offload("fsdp_offload_params", "cpu");
            }
        }
        if map.get("use_cpu") == Some(&Value::Bool(true)) && !*self.raw.use_cpu.value() {
            self.missing.push("`use_cpu` (the configuration's `use_cpu` and `device` decide)".into());
        }
        if let Some(name) = map.keys().find(|name| !is_of_accelerate(name)) {
            self.error(format!("has `{name}`, which is not known"), "remove it");
        }
    }

    /// accelerate's own words for a DeepSpeed configuration, or the file that holds one.
    fn accelerate_deepspeed(&mut self, map: &Map<String, Value>) {
        if let Some(file) = map.get("deepspeed_config_file").and_then(Value::as_str) {
            match read(Path::new(&home::expand(file))) {
                Ok(inner) => self.deepspeed(&inner),
                Err(why) => self.error(format!("names `{file}`, which {why}"), "check the path"),
            }
        }
        let stage = map.get("zero_stage").and_then(Value::as_u64).unwrap_or(0);
        self.shards(format!("ZeRO stage {stage}"), stage > 0);
        for name in ["offload_optimizer_device", "offload_param_device"] {
            self.offload(name, map.get(name).and_then(Value::as_str).unwrap_or("none"));
        }
        if let Some(value) = map.get("gradient_accumulation_steps") {
            let ours = *self.raw.gradient_accumulation_steps.value() as f64;
            self.number("deepspeed_config.gradient_accumulation_steps", value, "gradient_accumulation_steps", ours);
        }
        if let Some(value) = map.get("gradient_clipping") {
            let ours = *self.raw.max_grad_norm.value();
            self.number("deepspeed_config.gradient_clipping", value, "max_grad_norm", ours);
        }
    }
}

fn is_auto(value: &Value) -> bool {
    value == "auto"
}

fn is_of_accelerate(name: &str) -> bool {
    ACCELERATE.contains(&name)
        || ["debug", "use_cpu", "enable_cpu_affinity", "main_process_ip", "main_process_port"].contains(&name)
        || [
            "tpu_",
            "dynamo_",
            "fsdp_",
            "deepspeed_",
            "megatron_",
            "ipex_",
            "mpirun_",
            "fp8_",
            "commands",
            "command_file",
        ]
        .iter()
        .any(|start| name.starts_with(start))
}

/// Keys of DeepSpeed that are read.
const READ: &[&str] = &[
    "train_micro_batch_size_per_gpu",
    "train_batch_size",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_optimization",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
];

/// Keys of DeepSpeed that concern its printing, its communication and its own memory.
const QUIET: &[&str] = &[
    "steps_per_print",
    "wall_clock_breakdown",
    "dump_state",
    "memory_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "prescale_gradients",
    "gradient_predivide_factor",
    "sparse_gradients",
    "communication_data_type",
    "seq_parallel_communication_data_type",
    "disable_allgather",
    "data_types",
    "activation_checkpointing",
    "flops_profiler",
    "autotuning",
    "tensorboard",
    "wandb",
    "comet",
    "csv_monitor",
    "comms_logger",
    "aio",
    "checkpoint",
    "hybrid_engine",
    "nebula",
    "compile",
    "timers",
    "local_rank",
    "use_node_local_storage",
];

/// Keys of DeepSpeed that would change the result.
const OFF: &[&str] = &[
    "amp",
    "compression_training",
    "data_efficiency",
    "curriculum_learning",
    "sparse_attention",
    "progressive_layer_drop",
    "eigenvalue",
    "quantize_training",
    "elasticity",
    "pipeline",
    "tensor_parallel",
    "dataloader_drop_last",
];
