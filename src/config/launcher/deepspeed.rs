//! A DeepSpeed configuration, by the keys of DeepSpeed 0.19 (`DeepSpeedConfig`, `DeepSpeedZeroConfig`).

use serde_json::{Map, Value};

use super::{Asked, Fate, Fates, is_auto, is_on};
use crate::config::settings::LrSchedulerType;

use Fate::{Fine, Missing, Off, Read};

/// As many values as no parameter has: DeepSpeed's own largest threshold means all of them.
const MOST_VALUES: usize = 1_000_000_000_000;

/// The outermost map.
const KEYS: &Fates = &[
    ("train_micro_batch_size_per_gpu", Read),
    ("train_batch_size", Read),
    ("gradient_accumulation_steps", Read),
    ("gradient_clipping", Read),
    ("bf16", Read),
    ("bfloat16", Read),
    ("fp16", Read),
    ("optimizer", Read),
    ("scheduler", Read),
    ("zero_optimization", Read),
    // Printing, communication, and memory of its own.
    ("steps_per_print", Fine),
    ("wall_clock_breakdown", Fine),
    ("dump_state", Fine),
    ("memory_breakdown", Fine),
    ("zero_allow_untested_optimizer", Fine),
    ("zero_force_ds_cpu_optimizer", Fine),
    ("prescale_gradients", Fine),
    ("gradient_predivide_factor", Fine),
    ("sparse_gradients", Fine),
    ("communication_data_type", Fine),
    ("seq_parallel_communication_data_type", Fine),
    ("disable_allgather", Fine),
    ("data_types", Fine),
    ("activation_checkpointing", Fine),
    ("flops_profiler", Fine),
    ("autotuning", Fine),
    ("tensorboard", Fine),
    ("wandb", Fine),
    ("comet", Fine),
    ("csv_monitor", Fine),
    ("comms_logger", Fine),
    ("aio", Read),
    ("checkpoint", Fine),
    ("hybrid_engine", Fine),
    ("nebula", Fine),
    ("compile", Fine),
    ("timers", Fine),
    ("local_rank", Fine),
    ("use_node_local_storage", Fine),
    // Another result, or ranks that share no data.
    ("amp", Off),
    ("compression_training", Off),
    ("data_efficiency", Off),
    ("curriculum_learning", Off),
    ("sparse_attention", Off),
    ("progressive_layer_drop", Off),
    ("eigenvalue", Off),
    ("quantize_training", Off),
    ("elasticity", Off),
    ("pipeline", Off),
    ("tensor_parallel", Off),
    ("dataloader_drop_last", Off),
    ("autotp_size", Off),
    ("sequence_parallel_size", Off),
];

/// `zero_optimization`.
pub(super) const ZERO: &Fates = &[
    ("stage", Read),
    ("stage3_param_persistence_threshold", Read),
    ("param_persistence_threshold", Read),
    ("stage3_max_live_parameters", Read),
    ("max_live_parameters", Read),
    ("offload_optimizer", Read),
    ("offload_param", Read),
    ("cpu_offload", Read),
    ("cpu_offload_param", Read),
    // How much travels at a time, and when: each of its buckets is a block of the model here.
    ("overlap_comm", Fine),
    ("contiguous_gradients", Fine),
    ("reduce_scatter", Fine),
    ("reduce_bucket_size", Fine),
    ("use_multi_rank_bucket_allreduce", Fine),
    ("allgather_partitions", Fine),
    ("allgather_bucket_size", Fine),
    ("round_robin_gradients", Fine),
    ("sub_group_size", Fine),
    ("stage3_prefetch_bucket_size", Fine),
    ("prefetch_bucket_size", Fine),
    ("stage3_max_reuse_distance", Fine),
    ("max_reuse_distance", Fine),
    ("stage3_model_persistence_threshold", Fine),
    ("model_persistence_threshold", Fine),
    ("stage3_module_granularity_threshold", Fine),
    ("module_granularity_threshold", Fine),
    ("stage3_use_all_reduce_for_fetch_params", Fine),
    ("use_all_reduce_for_fetch_params", Fine),
    ("stage3_allgather_sequential", Fine),
    ("allgather_sequential", Fine),
    ("stage3_partition_stream_chunk_size", Fine),
    ("partition_stream_chunk_size", Fine),
    ("cpu_offload_use_pin_memory", Fine),
    ("mics_hierarchical_params_gather", Fine),
    ("leaf_module", Fine),
    // A saved model is always whole, a checkpoint fits every number of ranks, and masters are float32.
    ("stage3_gather_16bit_weights_on_model_save", Fine),
    ("gather_16bit_weights_on_model_save", Fine),
    ("stage3_gather_fp16_weights_on_model_save", Fine),
    ("elastic_checkpoint", Fine),
    ("load_from_fp32_weights", Fine),
    ("pipeline_loading_checkpoint", Fine),
    // Of its implementation.
    ("ignore_unused_parameters", Fine),
    ("legacy_stage1", Fine),
    ("memory_efficient_linear", Fine),
    ("override_module_apply", Fine),
    ("log_trace_cache_warnings", Fine),
    ("enable_sanity_checks", Fine),
    ("save_muon_momentum_buffer_in_memory", Fine),
    // Less to send, or second copies that save sending.
    ("zero_hpz_partition_size", Missing),
    ("mics_shard_size", Missing),
    ("zero_quantized_weights", Missing),
    ("zero_quantized_nontrainable_weights", Missing),
    ("zero_quantized_gradients", Missing),
    ("zeropp_loco_param", Missing),
    // Updates of the optimizer that come late.
    ("zenflow", Off),
];

/// `offload_optimizer` and `offload_param`.
const OFFLOAD: &Fates = &[
    ("device", Read),
    ("nvme_path", Read),
    ("buffer_count", Read),
    ("buffer_size", Read),
    ("max_in_cpu", Read),
    ("pin_memory", Read),
    ("pipeline", Fine),
    ("pipeline_read", Fine),
    ("pipeline_write", Fine),
    ("fast_init", Fine),
    ("ratio", Fine),
    ("super_offload", Fine),
    ("convert_grad_on_cpu", Fine),
    ("cpuadam_cores_perc", Fine),
];

/// `aio`: how DeepSpeed reads and writes files.
const AIO: &Fates = &[
    ("block_size", Read),
    ("queue_depth", Read),
    ("thread_count", Read),
    ("intra_op_parallelism", Read),
    ("single_submit", Read),
    ("overlap_events", Read),
    ("use_gds", Read),
];

/// `bf16`.
const BF16: &Fates = &[
    ("enabled", Fine),
    ("auto_cast", Fine),
    ("immediate_grad_update", Fine),
    ("check_grad_overflow", Fine),
    ("bf16_master_weights_and_grads", Missing),
    ("bf16_optimizer_states", Missing),
];

/// `fp16`: loss scaling here is DeepSpeed's own, with its defaults.
const FP16: &Fates = &[
    ("enabled", Fine),
    ("auto_cast", Fine),
    ("loss_scale", Read),
    ("initial_scale_power", Read),
    ("loss_scale_window", Read),
    ("hysteresis", Read),
    ("min_loss_scale", Read),
    ("consecutive_hysteresis", Off),
    ("fp16_master_weights_and_grads", Missing),
];

impl Asked<'_> {
    pub(super) fn deepspeed(&mut self, map: &Map<String, Value>) {
        let raw = self.raw;
        self.walk("", map, KEYS, |asked, name, path, value| match name {
            "train_micro_batch_size_per_gpu" => {
                let ours = *raw.per_device_train_batch_size.value() as f64;
                asked.number(path, value, "per_device_train_batch_size", ours);
            }
            "train_batch_size" => asked.whole_batch = Some(value.clone()),
            "gradient_accumulation_steps" => asked.accumulation(path, value),
            "gradient_clipping" => asked.clipping(path, value),
            "fp16" => {
                asked.precision(path, value, "fp16", Some(*raw.fp16.value()));
                let Value::Object(map) = value else { return };
                asked.walk(path, map, FP16, Self::loss_scale);
            }
            "optimizer" => asked.optimizer(value),
            "scheduler" => asked.scheduler(value),
            "zero_optimization" => asked.zero(path, value),
            "aio" => {
                let Some(map) = asked.map(path, value) else { return };
                asked.walk(path, map, AIO, |asked, _, own, _| asked.of_reading.push(format!("`{own}`")));
            }
            _ => {
                asked.precision(path, value, "bf16", *raw.bf16.value());
                let Value::Object(map) = value else { return };
                asked.walk(path, map, BF16, |_, _, _, _| {});
            }
        });
    }

    pub(super) fn accumulation(&mut self, path: &str, value: &Value) {
        let ours = *self.raw.gradient_accumulation_steps.value() as f64;
        self.number(path, value, "gradient_accumulation_steps", ours);
    }

    pub(super) fn clipping(&mut self, path: &str, value: &Value) {
        self.number(path, value, "max_grad_norm", *self.raw.max_grad_norm.value());
    }

    fn loss_scale(&mut self, name: &str, path: &str, value: &Value) {
        let default = match name {
            "loss_scale" => 0.0,
            "initial_scale_power" => 16.0,
            "loss_scale_window" => 1000.0,
            "hysteresis" => 2.0,
            _ => 1.0,
        };
        if *self.raw.fp16.value() && !is_auto(value) && super::number(value) != Some(default) {
            self.error(format!("has `{path}: {value}`; loss scaling is dynamic here"), format!("write {default}"));
        }
    }

    fn zero(&mut self, path: &str, value: &Value) {
        if let Value::Bool(is_on) = value {
            // As it was written long ago.
            self.stage = Some(usize::from(*is_on));
        } else if let Some(map) = self.map(path, value) {
            self.walk(path, map, ZERO, Self::zero_key);
        }
    }

    /// A key of `zero_optimization` that is read.
    pub(super) fn zero_key(&mut self, name: &str, path: &str, value: &Value) {
        match name {
            "stage" => self.stage(path, value),
            "stage3_param_persistence_threshold" | "param_persistence_threshold" => {
                if let Some(threshold) = self.count(path, value, (0, i64::MAX as usize)) {
                    self.persistence_threshold = Some(threshold.min(MOST_VALUES));
                }
            }
            "stage3_max_live_parameters" | "max_live_parameters" => {
                self.max_live = self.count(path, value, (0, i64::MAX as usize)).map(|count| count.min(MOST_VALUES));
            }
            "offload_optimizer" | "offload_param" => {
                let Some(map) = self.map(path, value) else { return };
                self.walk(path, map, OFFLOAD, |asked, name, own, value| match name {
                    "pin_memory" => asked.pin(own, value),
                    "nvme_path" => asked.nvme_path(own, value),
                    "buffer_count" => {
                        let count = asked.count(own, value, (1, 1024));
                        asked.buffer_count = asked.buffer_count.max(count);
                    }
                    "buffer_size" | "max_in_cpu" => {
                        if is_on(value) {
                            asked.of_reading.push(format!("`{own}`"));
                        }
                    }
                    _ => asked.offload(path, value),
                });
            }
            // `cpu_offload` and `cpu_offload_param`, as they were written long ago.
            _ if value == &Value::Bool(true) => self.offload(path, &"cpu".into()),
            _ => {}
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
}
