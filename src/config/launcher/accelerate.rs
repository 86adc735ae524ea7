//! accelerate's launch file, by the keys of accelerate 1.15 (`ClusterConfig`, `DeepSpeedPlugin`,
//! `FullyShardedDataParallelPlugin`), and TRL's presets of one.

use std::path::Path;

use serde_json::{Map, Value};

use super::deepspeed::ZERO;
use super::{Asked, Fate, Fates, MOST_PROCESSES, home, is_on, read};

use Fate::{Fine, Off, Read};

/// Presets of TRL's `--accelerate_config`: processes, and the stage that they come to.
const PRESETS: &[(&str, usize, Option<usize>)] = &[
    ("zero1", 8, Some(1)),
    ("zero2", 8, Some(2)),
    ("zero3", 8, Some(3)),
    ("fsdp1", 8, Some(3)),
    ("fsdp2", 8, Some(3)),
    ("multi_gpu", 8, None),
    ("single_gpu", 1, None),
];

/// The outermost map.
const KEYS: &Fates = &[
    // Looked at before the others.
    ("distributed_type", Fine),
    ("compute_environment", Read),
    ("num_processes", Read),
    ("num_machines", Read),
    ("mixed_precision", Read),
    ("fp16", Read),
    ("deepspeed_config", Read),
    ("fsdp_config", Read),
    ("parallelism_config", Read),
    ("use_cpu", Read),
    ("gpu_ids", Read),
    // Where ranks find each other: in the variables of srun, torchrun and mpirun, or started by this program.
    ("machine_rank", Fine),
    ("main_process_ip", Fine),
    ("main_process_port", Fine),
    ("rdzv_backend", Fine),
    ("rdzv_conf", Fine),
    ("same_network", Fine),
    ("main_training_function", Fine),
    ("deepspeed_multinode_launcher", Fine),
    ("deepspeed_hostfile", Fine),
    ("deepspeed_exclusion_filter", Fine),
    ("deepspeed_inclusion_filter", Fine),
    ("mpirun_config", Fine),
    ("max_restarts", Fine),
    ("monitor_interval", Fine),
    // Of other devices, and of what torch does.
    ("debug", Fine),
    ("enable_cpu_affinity", Fine),
    ("downcast_bf16", Fine),
    ("dynamo_backend", Fine),
    ("dynamo_config", Fine),
    ("ipex_config", Fine),
    ("fp8_config", Fine),
    ("tpu_name", Fine),
    ("tpu_zone", Fine),
    ("tpu_use_cluster", Fine),
    ("tpu_use_sudo", Fine),
    ("tpu_vm", Fine),
    ("tpu_env", Fine),
    ("commands", Fine),
    ("command_file", Fine),
    // Ranks that share a model instead of the data.
    ("tp_config", Off),
    ("megatron_lm_config", Off),
];

/// `deepspeed_config`, beside the keys of `zero_optimization` that people write there as well.
const OF_DEEPSPEED: &Fates = &[
    ("zero_stage", Read),
    ("deepspeed_config_file", Read),
    ("offload_optimizer_device", Read),
    ("offload_param_device", Read),
    ("gradient_accumulation_steps", Read),
    ("gradient_clipping", Read),
    ("offload_optimizer_nvme_path", Read),
    ("offload_param_nvme_path", Read),
    // Weights are always read shard by shard, and a saved model is always whole.
    ("zero3_init_flag", Fine),
    ("zero3_save_16bit_model", Fine),
    ("deepspeed_multinode_launcher", Fine),
    ("deepspeed_hostfile", Fine),
    ("deepspeed_exclusion_filter", Fine),
    ("deepspeed_inclusion_filter", Fine),
    ("deepspeed_moe_layer_cls_names", Fine),
    ("transformer_moe_cls_names", Fine),
    ("seq_parallel_communication_data_type", Fine),
    ("enable_msamp", Off),
    ("msamp_opt_level", Fine),
];

/// `fsdp_config`; the names with and without `fsdp_` are the same.
const OF_FSDP: &Fates = &[
    ("sharding_strategy", Read),
    ("reshard_after_forward", Read),
    ("version", Fine),
    ("offload_params", Read),
    ("cpu_offload", Read),
    ("activation_checkpointing", Read),
    ("auto_wrap_policy", Fine),
    ("transformer_layer_cls_to_wrap", Fine),
    ("min_num_params", Fine),
    ("backward_prefetch", Fine),
    ("backward_prefetch_policy", Fine),
    ("forward_prefetch", Fine),
    ("limit_all_gathers", Fine),
    ("state_dict_type", Fine),
    ("use_orig_params", Fine),
    ("sync_module_states", Fine),
    ("cpu_ram_efficient_loading", Fine),
    ("ignored_modules", Fine),
    ("mixed_precision_policy", Fine),
];

/// `parallelism_config`; the names with and without `parallelism_config_` are the same.
const OF_PARALLELISM: &Fates = &[
    ("dp_replicate_size", Fine),
    ("dp_shard_size", Fine),
    ("tp_size", Off),
    ("cp_size", Off),
    ("sp_size", Off),
    ("cp_backend", Fine),
    ("cp_comm_strategy", Fine),
    ("cp_seq_length_is_variable", Fine),
    ("cp_attn_implementation", Fine),
    ("sp_backend", Fine),
    ("sp_seq_length", Fine),
    ("sp_seq_length_is_variable", Fine),
    ("sp_attn_implementation", Fine),
    ("tp_handler", Fine),
    ("cp_handler", Fine),
    ("sp_handler", Fine),
];

impl Asked<'_> {
    /// Takes one of TRL's presets; false if the path is none.
    pub(super) fn preset(&mut self, path: &Path) -> bool {
        let Some((_, processes, stage)) = PRESETS.iter().find(|(name, ..)| Path::new(name) == path) else {
            return false;
        };
        (self.processes, self.is_preset, self.stage) = (Some(*processes), true, *stage);
        true
    }

    pub(super) fn accelerate(&mut self, map: &Map<String, Value>) {
        let raw = self.raw;
        let kind = distributed_type(map);
        if !["NO", "MULTI_GPU", "MULTI_CPU", "DEEPSPEED", "FSDP"].contains(&kind) {
            self.error(format!("has `distributed_type: {kind}`"), "write MULTI_GPU, MULTI_CPU, DEEPSPEED or FSDP");
        }
        self.walk("", map, KEYS, |asked, name, path, value| match name {
            "compute_environment" => {
                if is_on(value) && value != "LOCAL_MACHINE" {
                    asked.error(format!("has `{path}: {value}`"), "start the run on the machine, or under srun");
                }
            }
            "num_processes" => {
                // -1 is accelerate's "not given".
                if kind != "NO" && super::number(value) != Some(-1.0) {
                    asked.processes = asked.count(path, value, (1, MOST_PROCESSES));
                }
            }
            "num_machines" => asked.machines = asked.count(path, value, (1, MOST_PROCESSES)).unwrap_or(1),
            "mixed_precision" => asked.mixed_precision(path, value.as_str().unwrap_or("no")),
            "fp16" => asked.mixed_precision(path, if is_on(value) { "fp16" } else { "no" }),
            "deepspeed_config" if kind == "DEEPSPEED" => {
                if let Some(map) = asked.map(path, value) {
                    asked.accelerate_deepspeed(path, map);
                }
            }
            "fsdp_config" if kind == "FSDP" => {
                if let Some(map) = asked.map(path, value) {
                    asked.fsdp(path, map);
                }
            }
            "parallelism_config" => {
                if let Some(map) = asked.map(path, value) {
                    let map = without_prefix(map, "parallelism_config_");
                    asked.walk(path, &map, OF_PARALLELISM, |_, _, _, _| {});
                }
            }
            "gpu_ids" => {
                if !value.is_null() && value != "all" && asked.is_on_gpu {
                    asked.missing.push(format!("`{path}: {value}` (`CUDA_VISIBLE_DEVICES` says which GPUs)"));
                }
            }
            "use_cpu" => {
                if is_on(value) && asked.is_on_gpu {
                    asked.missing.push("`use_cpu` (the configuration's `use_cpu` and `device` decide)".into());
                }
            }
            // `deepspeed_config` or `fsdp_config`, which accelerate passes over too.
            _ => {
                if is_on(value) {
                    asked.missing.push(format!("`{path}` (with `distributed_type: {kind}`)"));
                }
            }
        });
        match kind {
            "NO" => self.processes = Some(1),
            // Its defaults.
            "DEEPSPEED" if self.stage.is_none() && raw.deepspeed.value().is_none() => self.stage = Some(2),
            "FSDP" if self.stage.is_none() => self.stage = Some(3),
            _ => {}
        }
    }

    fn mixed_precision(&mut self, path: &str, word: &str) {
        let (bf16, is_fp16) = (*self.raw.bf16.value(), *self.raw.fp16.value());
        let clash = match word {
            "bf16" if is_fp16 => "`fp16` is true",
            "bf16" if bf16 == Some(false) => "`bf16` is false",
            "fp16" if !is_fp16 => "`fp16` is false",
            "no" | "bf16" | "fp16" => return,
            other => return self.error(format!("has `{path}: {other}`"), "use `bf16: true` or `fp16: true`"),
        };
        self.error(
            format!("has `{path}: {word}`, and {clash}"),
            format!("write `{word}: true` in the configuration, or change the file"),
        );
    }

    /// accelerate's own words for a DeepSpeed configuration, or the file that holds one.
    fn accelerate_deepspeed(&mut self, place: &str, map: &Map<String, Value>) {
        let fates: Vec<_> = OF_DEEPSPEED.iter().chain(ZERO).copied().filter(|(name, _)| *name != "stage").collect();
        self.walk(place, map, &fates, |asked, name, path, value| match (name, value) {
            ("zero_stage", _) => asked.stage(path, value),
            ("deepspeed_config_file", Value::String(file)) => match read(Path::new(&home::expand(file))) {
                Ok(inner) => {
                    asked.deepspeed(&inner);
                    // DeepSpeed's own default, where accelerate's does not count.
                    asked.stage.get_or_insert(0);
                }
                Err(why) => asked.error(format!("names `{file}`, which {why}"), "check the path"),
            },
            ("deepspeed_config_file", _) => {}
            ("offload_optimizer_device" | "offload_param_device", _) => asked.offload(name, value),
            ("offload_optimizer_nvme_path" | "offload_param_nvme_path", _) => asked.nvme_path(path, value),
            ("gradient_accumulation_steps", _) => asked.accumulation(path, value),
            ("gradient_clipping", _) => asked.clipping(path, value),
            _ => asked.zero_key(name, path, value),
        });
    }

    /// torch's names of what is sharded.
    fn fsdp(&mut self, place: &str, map: &Map<String, Value>) {
        let has_checkpoints = *self.raw.gradient_checkpointing.value();
        let map = without_prefix(map, "fsdp_");
        self.walk(place, &map, OF_FSDP, |asked, name, path, value| match name {
            "sharding_strategy" | "reshard_after_forward" => asked.strategy(path, value),
            "activation_checkpointing" => {
                if is_on(value) && !has_checkpoints {
                    asked.missing.push(format!("`{path}` (`gradient_checkpointing` is false)"));
                }
            }
            // `offload_params` and `cpu_offload`.
            _ => asked.offload(path, &if is_on(value) { "cpu" } else { "none" }.into()),
        });
    }

    fn strategy(&mut self, path: &str, value: &Value) {
        let word = match value {
            Value::Null => return,
            Value::String(text) => text.to_uppercase(),
            other => other.to_string().to_uppercase(),
        };
        let stage = match word.as_str() {
            "FULL_SHARD" | "1" | "HYBRID_SHARD" | "4" | "TRUE" => 3,
            "SHARD_GRAD_OP" | "2" | "HYBRID_SHARD_ZERO2" | "5" | "FALSE" => 2,
            "NO_SHARD" | "3" => 0,
            _ => {
                let help = "write FULL_SHARD, SHARD_GRAD_OP, NO_SHARD or HYBRID_SHARD, or with FSDP 2 true or false";
                return self.error(format!("has `{path}: {value}`"), help);
            }
        };
        if word.starts_with("HYBRID") || ["4", "5"].contains(&word.as_str()) {
            self.missing.push(format!("`{path}: {word}` (state is sharded over the ranks of all nodes)"));
        }
        self.stage(path, &stage.into());
    }
}

/// What the file is for. accelerate asks for the word; without it the rest says it.
fn distributed_type(map: &Map<String, Value>) -> &str {
    let has = |name: &str| map.get(name).is_some_and(is_on);
    match map.get("distributed_type") {
        Some(Value::String(kind)) => kind,
        // `NO` without quotes.
        Some(Value::Bool(false)) => "NO",
        _ if has("deepspeed_config") => "DEEPSPEED",
        _ if has("fsdp_config") => "FSDP",
        _ => "MULTI_GPU",
    }
}

/// The entries by the short forms of their names.
fn without_prefix(map: &Map<String, Value>, prefix: &str) -> Map<String, Value> {
    map.iter().map(|(name, value)| (name.strip_prefix(prefix).unwrap_or(name).to_owned(), value.clone())).collect()
}
