//! Files of launchers: accelerate's YAML and DeepSpeed's JSON.
//!
//! Given in place of a configuration they are recognised and named. Named in one (`deepspeed`, `accelerate_config`, or
//! `--config-file`) they say how many ranks there are and what these share, which `world` takes up. The rest is held against
//! the configuration. Each of their keys is one of: acted on; what is done anyway, or a matter of time alone; memory or time
//! that is not saved, which is a warning; another result, which is an error. `"auto"` stands for what the configuration says,
//! as in transformers' `HfTrainerDeepSpeedConfig.fill_match`.

mod accelerate;
mod deepspeed;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::diagnose::Problems;
use super::field::{Command, Named};
use super::home;
use super::keys::RawConfig;
use super::settings::OffloadDevice;
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
/// Largest launch file that is read.
const MOST_BYTES: u64 = 1 << 20;
/// Most processes of a file: as many as `num_processes` takes.
const MOST_PROCESSES: usize = 1_000_000;

/// Whose file it is.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Accelerate,
    DeepSpeed,
}

impl Kind {
    /// Tells it by its keys.
    fn of(names: &[&str]) -> Option<Self> {
        if names.iter().any(|name| CONFIGURATION.contains(name)) {
            return None;
        }
        let count = |known: &[&str]| names.iter().filter(|name| known.contains(name)).count();
        match (count(ACCELERATE), count(DEEPSPEED)) {
            (2.., _) => Some(Self::Accelerate),
            (_, 2..) => Some(Self::DeepSpeed),
            (_, 1) if names.contains(&"zero_optimization") => Some(Self::DeepSpeed),
            _ => None,
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Accelerate => "accelerate's launch file",
            Self::DeepSpeed => "a DeepSpeed configuration",
        }
    }

    fn key(self) -> &'static str {
        match self {
            Self::Accelerate => "accelerate_config",
            Self::DeepSpeed => "deepspeed",
        }
    }
}

/// What a file is that was given as the configuration, and what to do instead, if its keys are a launcher's.
pub(super) fn recognise(names: &[&str], command: Command) -> Option<(String, String)> {
    let kind = Kind::of(names)?;
    let option = match kind {
        Kind::Accelerate => "--config-file",
        Kind::DeepSpeed => "--deepspeed",
    };
    Some((
        format!("this is {}, not the configuration of a training run", kind.words()),
        format!(
            "give the training file, and this one beside it: `{command} TRAINING.yaml {option} FILE`; a training file may \
             also name it as `{}`",
            kind.key()
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

/// What the files that a configuration names ask for, that of `deepspeed` first: it counts more, as in transformers.
pub(super) fn asked(raw: &RawConfig, is_on_gpu: bool) -> Vec<Asked<'_>> {
    let mut all = Vec::new();
    if let Some(file) = raw.deepspeed.value() {
        let mut asked = Asked::new(raw, is_on_gpu, file.name(), &raw.deepspeed);
        match file.read() {
            Ok(map) => asked.file(Kind::DeepSpeed, &map),
            Err(why) => asked.error(why, "check the path; it is relative to the working directory"),
        }
        all.push(asked);
    }
    if let Some(file) = raw.accelerate_config.value() {
        let mut asked = Asked::new(raw, is_on_gpu, file.name(), &raw.accelerate_config);
        match file {
            LaunchFile::Path(path) if !path.exists() && asked.preset(path) => {}
            _ => match file.read() {
                Ok(map) => asked.file(Kind::Accelerate, &map),
                Err(why) => asked.error(why, "name a file, or one of TRL's: zero1, zero2, zero3, fsdp1, fsdp2, ..."),
            },
        }
        all.push(asked);
    }
    all
}

/// What becomes of a key of a file.
#[derive(Clone, Copy, PartialEq)]
enum Fate {
    /// It is acted on, or held against the configuration.
    Read,
    /// It is so here anyway, or a matter of time alone.
    Fine,
    /// Memory or time that is not saved; said where it is on.
    Missing,
    /// Another result; an error where it is on.
    Off,
}

/// The keys of a map, with what becomes of each.
type Fates = [(&'static str, Fate)];

/// What one file asks for.
pub(super) struct Asked<'a> {
    raw: &'a RawConfig,
    is_on_gpu: bool,
    name: String,
    /// The key that names the file.
    pub(super) key: &'a dyn Named,
    /// Number of processes.
    pub(super) processes: Option<usize>,
    /// Whether that number is none that the user wrote: one of TRL's presets.
    pub(super) is_preset: bool,
    /// Number of machines.
    pub(super) machines: usize,
    /// Stage of ZeRO.
    pub(super) stage: Option<usize>,
    /// Values of a parameter up to which it is not sharded.
    pub(super) persistence_threshold: Option<usize>,
    /// Where the optimizer's state waits.
    pub(super) offload_optimizer: Option<OffloadDevice>,
    /// Where parameters wait.
    pub(super) offload_params: Option<OffloadDevice>,
    /// The folders of what waits in files.
    pub(super) optimizer_path: Option<PathBuf>,
    pub(super) params_path: Option<PathBuf>,
    /// Blocks that are on their way from or to files at a time.
    pub(super) buffer_count: Option<usize>,
    /// Keys that say how DeepSpeed reads and writes files.
    of_reading: Vec<String>,
    /// Whether what waits in host memory is page-locked.
    pub(super) pin_memory: Option<bool>,
    /// Values of parameters that may be on a GPU at a time.
    pub(super) max_live: Option<usize>,
    /// The batch of a step, to be held against that of all ranks.
    whole_batch: Option<Value>,
    /// What is wrong, and what to do.
    errors: Vec<(String, String)>,
    /// What is not there and changes nothing but memory and time.
    missing: Vec<String>,
}

impl<'a> Asked<'a> {
    fn new(raw: &'a RawConfig, is_on_gpu: bool, name: String, key: &'a dyn Named) -> Self {
        Self {
            raw,
            is_on_gpu,
            name,
            key,
            processes: None,
            is_preset: false,
            machines: 1,
            stage: None,
            persistence_threshold: None,
            offload_optimizer: None,
            offload_params: None,
            optimizer_path: None,
            params_path: None,
            buffer_count: None,
            of_reading: Vec::new(),
            pin_memory: None,
            max_live: None,
            whole_batch: None,
            errors: Vec::new(),
            missing: Vec::new(),
        }
    }

    /// The key and the file, for messages.
    pub(super) fn place(&self) -> String {
        format!("`{}`: {}", self.key.name(), self.name)
    }

    pub(super) fn error(&mut self, message: impl Into<String>, help: impl Into<String>) {
        self.errors.push((message.into(), help.into()));
    }

    fn file(&mut self, expected: Kind, map: &Map<String, Value>) {
        let names: Vec<_> = map.keys().map(String::as_str).collect();
        match (expected, Kind::of(&names)) {
            (_, Some(kind)) if kind != expected => {
                self.error(format!("is {}", kind.words()), format!("name it as `{}`", kind.key()));
            }
            (Kind::DeepSpeed, _) => self.deepspeed(map),
            (Kind::Accelerate, _) => self.accelerate(map),
        }
    }

    /// Reports what is wrong, and what is not done.
    pub(super) fn report(mut self, world_size: usize, problems: &mut Problems) {
        if let Some(value) = self.whole_batch.take() {
            let per_rank = *self.raw.per_device_train_batch_size.value() as f64
                * *self.raw.gradient_accumulation_steps.value() as f64;
            let key = "per_device_train_batch_size` x `gradient_accumulation_steps` x `num_processes";
            self.number("train_batch_size", &value, key, per_rank * world_size as f64);
        }
        let file = self.place();
        let place = [(self.key, String::new())];
        let waits = [self.offload_optimizer, self.offload_params].contains(&Some(OffloadDevice::Nvme));
        if self.errors.is_empty() && waits && !self.of_reading.is_empty() {
            let message = format!(
                "{file} says in {} how DeepSpeed reads and writes: here four threads do, pieces of 8 MiB at their places, and a \
                 buffer is as large as a block",
                self.of_reading.join(", ")
            );
            problems.caution(&place, message, "results are the same; `offload_buffer_count` says how many blocks");
        }
        if self.errors.is_empty() && !self.missing.is_empty() {
            let message = format!("{file} asks for {}, which is not done", self.missing.join(", "));
            problems.caution(&place, message, "results are the same, memory and time are not");
        }
        for (message, help) in self.errors {
            problems.clash(&place, format!("{file} {message}"), help);
        }
    }

    /// Deals with each key of a map; those that are read are given to `read` by name, path and value.
    fn walk(
        &mut self,
        place: &str,
        map: &Map<String, Value>,
        fates: &Fates,
        mut read: impl FnMut(&mut Self, &str, &str, &Value),
    ) {
        for (name, value) in map {
            let path = if place.is_empty() { name.clone() } else { format!("{place}.{name}") };
            match fates.iter().find(|(known, _)| known == name) {
                Some((_, Fate::Read)) => read(self, name, &path, value),
                Some((_, Fate::Missing)) if is_on(value) => self.missing.push(format!("`{path}`")),
                Some((_, Fate::Off)) if is_on(value) => {
                    self.error(format!("asks for `{path}`, which is not supported"), "remove it from the file");
                }
                Some((_, Fate::Fine | Fate::Missing | Fate::Off)) => {}
                None => {
                    let help = nearest(name, fates.iter().map(|(known, _)| *known))
                        .map_or_else(|| "remove it".into(), |near| format!("did you mean `{near}`? Else remove it"));
                    self.error(format!("has `{path}`, which is not known"), help);
                }
            }
        }
    }

    /// The map under a key; nothing if it is null, false or "auto".
    fn map<'v>(&mut self, path: &str, value: &'v Value) -> Option<&'v Map<String, Value>> {
        match value {
            Value::Object(map) => Some(map),
            _ if !is_on(value) => None,
            _ => {
                self.error(format!("has `{path}: {value}`"), "write a map");
                None
            }
        }
    }

    /// A number that must be what a key says.
    fn number(&mut self, path: &str, value: &Value, key: &str, ours: f64) {
        if !is_auto(value) && number(value) != Some(ours) {
            self.error(
                format!("has `{path}: {value}`, and `{key}` is {ours}"),
                format!("write \"auto\" there, or change `{key}`"),
            );
        }
    }

    /// A count up to `most`; nothing where the file leaves it open.
    fn count(&mut self, path: &str, value: &Value, (least, most): (usize, usize)) -> Option<usize> {
        if value.is_null() || is_auto(value) {
            return None;
        }
        let count = value.as_u64().and_then(|count| usize::try_from(count).ok()).or_else(|| {
            let number = number(value).filter(|number| number.fract() == 0.0 && (0.0..1e15).contains(number))?;
            Some(number as usize)
        });
        let count = count.filter(|count| (least..=most).contains(count));
        if count.is_none() {
            self.error(format!("has `{path}: {value}`"), format!("write a whole number from {least} to {most}"));
        }
        count
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

    /// A stage of ZeRO; two of one file must be one.
    fn stage(&mut self, path: &str, value: &Value) {
        let Some(stage) = self.count(path, value, (0, 3)) else { return };
        match self.stage {
            Some(other) if other != stage => {
                self.error(format!("asks for ZeRO stage {other}, and has `{path}: {stage}`"), "keep one of the two");
            }
            _ => self.stage = Some(stage),
        }
    }

    /// Whether host memory is page-locked; it is where nothing is said.
    fn pin(&mut self, path: &str, value: &Value) {
        match value {
            Value::Bool(is_pinned) => self.pin_memory = Some(self.pin_memory.unwrap_or(true) && *is_pinned),
            Value::Null => {}
            other if is_auto(other) => {}
            other => self.error(format!("has `{path}: {other}`"), "write true or false"),
        }
    }

    /// A folder of the files of what is under `path`.
    fn nvme_path(&mut self, path: &str, value: &Value) {
        let folder = match value {
            Value::String(text) if !["", "none", "auto"].contains(&text.to_lowercase().as_str()) => home::expand(text),
            Value::Null | Value::String(_) => return,
            other => return self.error(format!("has `{path}: {other}`"), "write the path of a folder"),
        };
        let target = if path.contains("optimizer") { &mut self.optimizer_path } else { &mut self.params_path };
        *target = Some(folder.into());
    }

    /// A place for state that is not the GPU's memory. Where the CPU computes, its memory holds what does not lie in files.
    fn offload(&mut self, path: &str, device: &Value) {
        let place = match device.as_str().unwrap_or(if is_on(device) { "?" } else { "none" }) {
            "auto" | "" => return,
            "none" => OffloadDevice::None,
            "cpu" => OffloadDevice::Cpu,
            "nvme" => OffloadDevice::Nvme,
            _ => return self.error(format!("has `{path}: {device}`"), "write none, cpu or nvme"),
        };
        let is_optimizer = path.contains("optimizer");
        let is_params = path.contains("param") && !is_optimizer;
        // `cpu_offload` was the optimizer's in DeepSpeed, and is both in torch.
        if !is_params {
            self.offload_optimizer = Some(place);
        }
        if is_params || path.contains("fsdp") {
            self.offload_params = Some(place);
        }
        if path.contains("fsdp") {
            self.offload_optimizer = Some(place);
        }
    }
}

fn is_auto(value: &Value) -> bool {
    value == "auto"
}

/// The number that a value of a file means.
fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => value::as_float(text),
        _ => None,
    }
}

/// Whether a value asks for something: null, false, "auto", no more than 1 and what is not enabled do not.
fn is_on(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(is_on) => *is_on,
        Value::Number(_) => number(value).is_some_and(|number| number > 1.0),
        Value::String(text) => {
            !["", "auto", "none"].contains(&text.as_str())
                && value::as_bool(text).or_else(|| value::as_float(text).map(|number| number > 1.0)) != Some(false)
        }
        Value::Array(items) => !items.is_empty(),
        Value::Object(map) => !map.is_empty() && map.get("enabled") != Some(&Value::Bool(false)),
    }
}
