//! Keys that TRL, transformers, open-r1 and accelerate know and this program does not act on, and names that mean
//! another key.
//!
//! What changes nothing here is accepted with a warning that says why; what would change the result is an error unless
//! it is switched off; an older or other name of a key is read as that key, with a word about it. Everything else is
//! unknown.

use super::field::{Command, Commands};
use super::nested::{self, Entries};
use super::value::{as_bool, as_float};
use super::yaml::{Node, Value};

/// What happens to a key that is not ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Accepted with a warning, unless it holds nothing: it has no effect, for this reason.
    NoEffect(&'static str),
    /// An error, unless it has one of these values (or null), which ask for nothing.
    Lacking {
        /// Values that are accepted.
        off: &'static [&'static str],
        /// What is missing, and what to do instead.
        why: &'static str,
    },
    /// An older name of a key, or another program's: read as that key, with a warning that names it.
    Renamed(&'static str),
    /// An error that names the key to use: elsewhere the name stands for another kind of value.
    Ambiguous(&'static str),
    /// Another spelling of a key, accepted.
    Alias(&'static str),
    /// A map whose entries are keys of their own.
    Entries(&'static Entries),
}

impl Rule {
    /// The key that a name of this rule is read as.
    pub(super) const fn stands_for(self) -> Option<&'static str> {
        match self {
            Self::Alias(of) | Self::Renamed(of) => Some(of),
            _ => None,
        }
    }
}

/// A key that is not ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForeignKey {
    /// Its name.
    pub name: &'static str,
    /// The commands whose TRL counterpart knows it.
    pub commands: Commands,
    /// What happens to it.
    pub rule: Rule,
}

pub(super) const fn no_effect(name: &'static str, why: &'static str) -> ForeignKey {
    ForeignKey { name, commands: Commands::Both, rule: Rule::NoEffect(why) }
}

pub(super) const fn lacking(name: &'static str, off: &'static [&'static str], why: &'static str) -> ForeignKey {
    ForeignKey { name, commands: Commands::Both, rule: Rule::Lacking { off, why } }
}

const fn ambiguous(name: &'static str, to: &'static str) -> ForeignKey {
    ForeignKey { name, commands: Commands::Both, rule: Rule::Ambiguous(to) }
}

const fn entries(name: &'static str, entries: &'static Entries) -> ForeignKey {
    ForeignKey { name, commands: Commands::Both, rule: Rule::Entries(entries) }
}

const fn renamed(name: &'static str, to: &'static str) -> ForeignKey {
    ForeignKey { name, commands: Commands::Both, rule: Rule::Renamed(to) }
}

pub(super) const fn alias(name: &'static str, of: &'static str) -> ForeignKey {
    ForeignKey { name, commands: Commands::Both, rule: Rule::Alias(of) }
}

const fn only(commands: Commands, key: ForeignKey) -> ForeignKey {
    ForeignKey { commands, ..key }
}

const NO_UPLOAD: &str = "nothing is uploaded; see `push_to_hub`";
const NO_LOADER: &str = "rows are tokenised once and read from memory; there are no loader processes";
const NO_FSDP: &str = "`zero_stage` says what is sharded: 3 is FULL_SHARD, 2 is SHARD_GRAD_OP";
const ONE_RECOMPUTATION: &str = "recomputation is done block by block, there is one way";
const FUSED: &str = "fused kernels are built in";
const ONE_FP16: &str = "there is one float16, that of `fp16`";
const NO_DDP: &str = "gradients are reduced by this program's own collectives";
const NO_VLLM: &str = "the rollout engine is built in and uses the weights being trained";
const KV_CACHE: &str = "the KV cache holds what prompts and completions need";
const ROLLOUT_CACHE: &str = "the rollout has its own KV cache";
const COMPLETIONS: &str = "`output_dir/completions.jsonl` holds every completion";
const NO_COMPILE: &str = "there is no graph compiler; kernels are compiled into the program";
const NO_LOG: &str = "the console and `output_dir/metrics.jsonl` have one form";
const RAGGED: &str = "batches are ragged: nothing is ever padded";
const NO_OPTIM: &str = "`optim` names AdamW, Lion or Muon";
const LAUNCHER: &str = "it belongs to a launch file (`accelerate_config`); ranks find each other without it";
const NO_TRACKER: &str = "nothing is sent to a tracker; see `report_to`";
const NO_TPU: &str = "there is no TPU back end";
const SANDBOX: &str = "code runs in this program's own sandbox, on this machine";
const NO_CALLBACKS: &str = "there are no callbacks";
const NO_SHARED_METRICS: &str = "evaluation has a fixed set of metrics";

/// Every key of that kind.
pub static FOREIGN_KEYS: &[ForeignKey] = &[
    // Other spellings.
    alias("torch_dtype", "dtype"),
    alias("bnb_4bit_use_double_quant", "use_bnb_nested_quant"),
    alias("activation_checkpointing", "gradient_checkpointing"),
    // Model.
    no_effect("trust_remote_code", "no code of a model folder is ever run"),
    no_effect("attn_implementation", "attention is this program's own, for every device"),
    no_effect("bnb_4bit_compute_dtype", "4-bit weights are multiplied in the precision of `bf16`/`fp16`"),
    no_effect("bnb_4bit_quant_storage", "packed weights are bytes; sharding does not depend on a storage type"),
    no_effect("use_cache", "the rollout has its own KV cache, training needs none"),
    no_effect("router_aux_loss_coef", "models here are dense and have no router"),
    no_effect("lora_task_type", "models here are causal language models"),
    no_effect("cast_lm_head_to_fp32", "the head accumulates in float32 in any case"),
    no_effect("ignore_bias_buffers", NO_DDP),
    lacking(
        "load_in_8bit",
        &["false"],
        "8-bit weights are not supported; use `load_in_4bit: true` or a GGUF file with Q8_0",
    ),
    entries("model_init_kwargs", &nested::MODEL_INIT),
    lacking("lora_bias", &["none"], "biases are not trained beside an adapter"),
    lacking("lora_target_parameters", &["[]"], "adapters go on whole projections; see `lora_target_modules`"),
    no_effect("pad_token", RAGGED),
    // Data.
    no_effect("dataset_num_proc", "rows are tokenised on all cores"),
    no_effect("dataset_streaming", "files are read once, and their rows are kept in memory"),
    no_effect("streaming", "files are read once, and their rows are kept in memory"),
    no_effect("remove_unused_columns", "columns are read by name, the others do no harm"),
    no_effect("label_names", "labels are made from the tokens"),
    no_effect("length_column_name", "lengths are known from the tokens"),
    no_effect("pad_to_multiple_of", RAGGED),
    no_effect("padding_free", RAGGED),
    no_effect("dataloader_num_workers", NO_LOADER),
    no_effect("dataloader_pin_memory", NO_LOADER),
    no_effect("dataloader_persistent_workers", NO_LOADER),
    no_effect("dataloader_prefetch_factor", NO_LOADER),
    no_effect("dataloader_multiprocessing_context", NO_LOADER),
    no_effect("dataloader_in_order", NO_LOADER),
    only(
        Commands::Grpo,
        no_effect(
            "dataloader_drop_last",
            "prompts that do not fill a generation batch are left out in any case, as in TRL",
        ),
    ),
    only(Commands::Sft, entries("dataset_kwargs", &nested::DATASET)),
    no_effect("dataset_batch_size", "rows are tokenised on all cores"),
    no_effect("num_of_sequences", "rows are tokenised before they are packed"),
    no_effect("chars_per_token", "rows are tokenised before they are packed"),
    only(
        Commands::Sft,
        no_effect("dataset_prompt_column", "prompts of SFT are in the column `prompt`; see `dataset_columns`"),
    ),
    no_effect("group_by_length", "batches are ragged, so grouping by length saves nothing"),
    lacking(
        "train_sampling_strategy",
        &["random", "group_by_length"],
        "the order of the data is a fresh shuffle per epoch, from `data_seed`",
    ),
    only(Commands::Grpo, no_effect("code_provider", SANDBOX)),
    only(Commands::Grpo, no_effect("ioi_provider", SANDBOX)),
    only(Commands::Grpo, no_effect("provider_type", SANDBOX)),
    only(Commands::Grpo, no_effect("enforce_same_language", "each row's tests say their language")),
    only(
        Commands::Sft,
        no_effect("shuffle_dataset", "the order of the data is a fresh shuffle per epoch, from `data_seed`"),
    ),
    // Training.
    no_effect("gradient_checkpointing_kwargs", ONE_RECOMPUTATION),
    no_effect("activation_checkpointing_kwargs", ONE_RECOMPUTATION),
    no_effect("gradient_checkpointing_use_reentrant", ONE_RECOMPUTATION),
    no_effect("use_liger_kernel", FUSED),
    no_effect("liger_kernel_config", FUSED),
    no_effect("use_liger", FUSED),
    no_effect("use_liger_loss", FUSED),
    no_effect("torch_compile", NO_COMPILE),
    no_effect("torchdynamo", NO_COMPILE),
    no_effect("jit_mode_eval", NO_COMPILE),
    no_effect("use_ipex", NO_COMPILE),
    no_effect("torch_compile_backend", NO_COMPILE),
    no_effect("torch_compile_mode", NO_COMPILE),
    no_effect("torch_empty_cache_steps", "the memory pool keeps what it frees"),
    no_effect("half_precision_backend", ONE_FP16),
    no_effect("fp16_backend", ONE_FP16),
    no_effect("fp16_opt_level", ONE_FP16),
    no_effect("use_mps_device", "`device` says where to compute"),
    no_effect("_n_gpu", "`device` says where to compute"),
    no_effect("xpu_backend", NO_DDP),
    no_effect("tpu_num_cores", NO_TPU),
    no_effect("tpu_metrics_debug", NO_TPU),
    no_effect("mp_parameters", LAUNCHER),
    no_effect("ray_scope", "there is no search for hyperparameters"),
    lacking("past_index", &["-1"], "hidden states are not carried from step to step"),
    no_effect("tf32", "multiplies accumulate in float32; `bf16` chooses the faster units"),
    no_effect("bf16_full_eval", "evaluation runs in the precision of training"),
    no_effect("fp16_full_eval", "evaluation runs in the precision of training"),
    no_effect("average_tokens_across_devices", "losses are always averaged over the tokens of all ranks"),
    no_effect("restore_callback_states_from_checkpoint", NO_CALLBACKS),
    no_effect("callbacks", NO_CALLBACKS),
    no_effect("benchmarks", "no benchmark is run after training; `output_dir` holds the model for one"),
    no_effect("skip_memory_metrics", NO_LOG),
    no_effect("debug", "there is no debug mode"),
    no_effect("do_train", "the command trains"),
    no_effect("do_eval", "`eval_strategy` says when to evaluate"),
    no_effect("do_predict", "use `trainer generate`"),
    no_effect("local_rank", "ranks come from the launcher's environment"),
    entries("optim_args", &nested::OPTIM_ARGS),
    lacking("adafactor", &["false"], NO_OPTIM),
    lacking("optim_target_modules", &[], NO_OPTIM),
    only(
        Commands::Grpo,
        no_effect("label_smoothing_factor", "a policy loss has no labels to smooth; TRL's has no use for it either"),
    ),
    no_effect(
        "auto_find_batch_size",
        "a batch that does not fit is an error; then lower `per_device_train_batch_size` and raise \
         `gradient_accumulation_steps`",
    ),
    lacking("ignore_data_skip", &["false"], "a resumed run goes on where the data stood"),
    no_effect("fsdp", NO_FSDP),
    no_effect("fsdp_config", NO_FSDP),
    no_effect("fsdp_min_num_params", NO_FSDP),
    no_effect("fsdp_transformer_layer_cls_to_wrap", NO_FSDP),
    entries("accelerator_config", &nested::ACCELERATOR),
    lacking("split_batches", &["false"], nested::NO_SPLIT),
    no_effect("dispatch_batches", NO_LOADER),
    entries("parallelism_config", &nested::PARALLELISM),
    lacking("deepspeed_config", &[], "name accelerate's file in `accelerate_config`, or a JSON in `deepspeed`"),
    lacking(
        "distributed_type",
        &["NO", "no"],
        "set `num_processes` and `zero_stage`, or name accelerate's file in `accelerate_config`",
    ),
    entries("mixed_precision", &nested::PRECISION),
    lacking("num_machines", &["1"], "start the run under srun, or with torchrun on each machine"),
    no_effect("compute_environment", LAUNCHER),
    no_effect("machine_rank", LAUNCHER),
    no_effect("main_process_ip", LAUNCHER),
    no_effect("main_process_port", LAUNCHER),
    no_effect("main_training_function", LAUNCHER),
    no_effect("rdzv_backend", LAUNCHER),
    no_effect("same_network", LAUNCHER),
    no_effect("gpu_ids", LAUNCHER),
    no_effect("downcast_bf16", NO_TPU),
    no_effect("tpu_env", NO_TPU),
    no_effect("tpu_use_cluster", NO_TPU),
    no_effect("tpu_use_sudo", NO_TPU),
    no_effect("enable_cpu_affinity", LAUNCHER),
    no_effect("dynamo_backend", NO_COMPILE),
    no_effect("dynamo_config", NO_COMPILE),
    no_effect("ddp_find_unused_parameters", NO_DDP),
    no_effect("ddp_bucket_cap_mb", NO_DDP),
    no_effect("ddp_broadcast_buffers", NO_DDP),
    no_effect("ddp_static_graph", NO_DDP),
    // Logging, evaluation, saving.
    no_effect("logging_dir", "TensorBoard files go to `output_dir`"),
    no_effect("logging_nan_inf_filter", "a loss that is not finite is an error"),
    no_effect("log_on_each_node", NO_LOG),
    no_effect("log_level", NO_LOG),
    no_effect("log_level_replica", NO_LOG),
    no_effect("include_num_input_tokens_seen", "`num_tokens` is always logged"),
    no_effect("include_tokens_per_second", "tokens per second are always logged"),
    no_effect("run_name", "a run is named by its `output_dir`"),
    no_effect("project", NO_TRACKER),
    no_effect("trackio_space_id", NO_TRACKER),
    no_effect("trackio_bucket_id", NO_TRACKER),
    no_effect("trackio_static_space_id", NO_TRACKER),
    no_effect("wandb_project", NO_TRACKER),
    no_effect("wandb_entity", NO_TRACKER),
    no_effect("wandb_run_group", NO_TRACKER),
    no_effect("prediction_loss_only", NO_SHARED_METRICS),
    no_effect("use_legacy_prediction_loop", NO_SHARED_METRICS),
    no_effect("include_inputs_for_metrics", NO_SHARED_METRICS),
    no_effect("eval_do_concat_batches", NO_SHARED_METRICS),
    no_effect("eval_use_gather_object", NO_SHARED_METRICS),
    no_effect("eval_accumulation_steps", NO_SHARED_METRICS),
    no_effect("batch_eval_metrics", NO_SHARED_METRICS),
    no_effect("include_for_metrics", NO_SHARED_METRICS),
    no_effect("save_safetensors", "weights are always written as safetensors"),
    no_effect("save_on_each_node", "a checkpoint is one folder, written once"),
    no_effect("enable_jit_checkpoint", "a signal always saves before the run ends"),
    no_effect("hub_token", NO_UPLOAD),
    no_effect("hub_strategy", NO_UPLOAD),
    no_effect("hub_always_push", NO_UPLOAD),
    no_effect("push_to_hub_token", NO_UPLOAD),
    no_effect("push_to_hub_organization", NO_UPLOAD),
    no_effect("push_to_hub_revision", NO_UPLOAD),
    no_effect("overwrite_hub_revision", NO_UPLOAD),
    // GRPO only.
    only(Commands::Grpo, no_effect("use_vllm", NO_VLLM)),
    only(Commands::Grpo, no_effect("vllm_mode", NO_VLLM)),
    only(Commands::Grpo, no_effect("vllm_model_impl", NO_VLLM)),
    only(Commands::Grpo, no_effect("vllm_enable_sleep_mode", NO_VLLM)),
    only(Commands::Grpo, no_effect("vllm_server_base_url", NO_VLLM)),
    only(Commands::Grpo, no_effect("vllm_server_host", NO_VLLM)),
    only(Commands::Grpo, no_effect("vllm_server_port", NO_VLLM)),
    only(Commands::Grpo, no_effect("vllm_server_timeout", NO_VLLM)),
    only(Commands::Grpo, no_effect("vllm_group_port", NO_VLLM)),
    only(Commands::Grpo, no_effect("vllm_gpu_memory_utilization", "the KV cache is bounded by `max_num_seqs`")),
    only(Commands::Grpo, no_effect("vllm_max_model_length", KV_CACHE)),
    only(Commands::Grpo, no_effect("vllm_max_model_len", KV_CACHE)),
    only(Commands::Grpo, no_effect("vllm_enable_prefix_caching", "prompts of one group share their cache")),
    only(Commands::Grpo, no_effect("vllm_device", NO_VLLM)),
    only(Commands::Grpo, no_effect("vllm_dtype", NO_VLLM)),
    only(Commands::Grpo, no_effect("vllm_quantization", NO_VLLM)),
    only(Commands::Grpo, no_effect("vllm_tensor_parallel_size", NO_VLLM)),
    only(Commands::Grpo, lacking("vllm_structured_outputs_regex", &[], "guided decoding is not supported")),
    only(Commands::Grpo, lacking("vllm_guided_decoding_regex", &[], "guided decoding is not supported")),
    only(Commands::Grpo, no_effect("use_transformers_continuous_batching", "the rollout always batches continuously")),
    only(
        Commands::Grpo,
        no_effect("transformers_continuous_batching_config", "the rollout always batches continuously"),
    ),
    only(Commands::Grpo, no_effect("use_transformers_paged", ROLLOUT_CACHE)),
    only(Commands::Grpo, no_effect("cache_implementation", ROLLOUT_CACHE)),
    only(
        Commands::Grpo,
        no_effect("ds3_gather_for_generation", "weights are gathered once per rollout where they are sharded"),
    ),
    only(Commands::Grpo, no_effect("log_multimodal", "models here read text only")),
    only(Commands::Grpo, no_effect("log_unique_prompts", COMPLETIONS)),
    only(Commands::Grpo, no_effect("wandb_log_unique_prompts", COMPLETIONS)),
    only(Commands::Grpo, no_effect("log_completions_hub_repo", NO_UPLOAD)),
    only(Commands::Grpo, entries("generation_kwargs", &nested::GENERATION)),
    only(Commands::Grpo, no_effect("e2b_router_url", SANDBOX)),
    only(Commands::Grpo, no_effect("morph_router_url", SANDBOX)),
    only(Commands::Grpo, lacking("max_tool_calling_iterations", &[], "tools are not supported")),
    only(
        Commands::Grpo,
        lacking(
            "reward_model_name_or_path",
            &[],
            "reward models are not supported; score with a program, see `reward_funcs`",
        ),
    ),
    // Names of other versions and of other programs.
    renamed("max_seq_length", "max_length"),
    renamed("max_seq_len", "max_length"),
    renamed("evaluation_strategy", "eval_strategy"),
    renamed("no_cuda", "use_cpu"),
    renamed("tokenizer", "tokenizer_name_or_path"),
    renamed("tokenizer_name", "tokenizer_name_or_path"),
    renamed("processing_class", "tokenizer_name_or_path"),
    renamed("per_gpu_train_batch_size", "per_device_train_batch_size"),
    renamed("per_gpu_eval_batch_size", "per_device_eval_batch_size"),
    renamed("micro_batch_size", "per_device_train_batch_size"),
    ambiguous("batch_size", "per_device_train_batch_size"),
    renamed("model", "model_name_or_path"),
    renamed("model_name", "model_name_or_path"),
    renamed("model_path", "model_name_or_path"),
    renamed("model_id", "model_name_or_path"),
    renamed("dataset", "dataset_name"),
    renamed("dataset_path", "dataset_name"),
    renamed("data_path", "dataset_name"),
    renamed("dataset_split", "dataset_train_split"),
    renamed("dataset_text_column", "dataset_text_field"),
    renamed("lr", "learning_rate"),
    renamed("lr_scheduler", "lr_scheduler_type"),
    renamed("optimizer", "optim"),
    renamed("epochs", "num_train_epochs"),
    renamed("num_epochs", "num_train_epochs"),
    renamed("gradient_clipping", "max_grad_norm"),
    renamed("lora_rank", "lora_r"),
    renamed("target_modules", "lora_target_modules"),
    renamed("quant_type", "bnb_4bit_quant_type"),
    renamed("bnb_4bit_use_nested_quant", "use_bnb_nested_quant"),
    renamed("max_new_tokens", "max_completion_length"),
    renamed("epsilon_low", "epsilon"),
    renamed("kl_coef", "beta"),
    renamed("group_size", "num_generations"),
    renamed("stop", "stop_strings"),
    renamed("stop_sequences", "stop_strings"),
    renamed("reward_functions", "reward_funcs"),
    renamed("vllm_importance_sampling_cap", "vllm_importance_sampling_clip_max"),
    renamed("push_to_hub_model_id", "hub_model_id"),
    renamed("hub_model_revision", "hub_revision"),
];

/// The foreign key of that name for a command.
pub(super) fn find(name: &str, command: Command) -> Option<&'static ForeignKey> {
    FOREIGN_KEYS.iter().find(|key| key.name == name && key.commands.include(command))
}

/// Beginnings of keys that only set up a program which is not called here, and why they change nothing. Keys come and go
/// there from version to version.
const FAMILIES: &[(&str, Commands, &str)] = &[
    ("vllm_", Commands::Grpo, NO_VLLM),
    ("wandb_", Commands::Both, NO_TRACKER),
    ("trackio_", Commands::Both, NO_TRACKER),
    ("mlflow_", Commands::Both, NO_TRACKER),
    ("swanlab_", Commands::Both, NO_TRACKER),
    ("comet_", Commands::Both, NO_TRACKER),
    ("clearml_", Commands::Both, NO_TRACKER),
];
/// What such keys are about where they do change the result.
const WEIGHTY: &[&str] = &["importance", "structured", "guided", "logits", "speculative"];

/// Why a key that is not listed has no effect, if its name says whose it is.
pub(super) fn family(name: &str, command: Command) -> Option<&'static str> {
    let is_weighty = WEIGHTY.iter().any(|word| name.contains(word));
    let found = FAMILIES.iter().find(|(start, commands, _)| name.starts_with(start) && commands.include(command));
    found.filter(|_| !is_weighty).map(|(_, _, why)| *why)
}

/// Whether a value holds nothing at all, or switches something off that is not there.
pub(super) fn is_empty(node: &Node) -> bool {
    match &node.value {
        Value::Null => true,
        Value::Scalar { text, .. } => text.is_empty() || as_bool(text) == Some(false),
        Value::List(items) => items.is_empty(),
        Value::Map(entries) => entries.is_empty(),
    }
}

/// Whether a value asks for nothing: null, or one of the listed texts in any spelling.
pub(super) fn is_off(node: &Node, off: &[&str]) -> bool {
    match &node.value {
        Value::Null => true,
        Value::Scalar { text, .. } => off.iter().any(|off| {
            off == text
                || as_bool(text).is_some_and(|value| as_bool(off) == Some(value))
                || as_float(text).is_some_and(|value| as_float(off) == Some(value))
        }),
        Value::List(items) => items.is_empty() && off.contains(&"[]"),
        Value::Map(entries) => entries.is_empty() && off.contains(&"{}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{keys, yaml};
    use super::*;

    #[test]
    fn no_name_is_both_ours_and_foreign() {
        for command in [Command::Sft, Command::Grpo] {
            let mut names = Vec::new();
            for key in FOREIGN_KEYS.iter().filter(|key| key.commands.include(command)) {
                assert!(keys::find(key.name, command).is_none(), "`{}` is a key of `{command}`", key.name);
                assert!(!names.contains(&key.name), "`{}` is listed twice", key.name);
                names.push(key.name);
            }
        }
    }

    #[test]
    fn renamed_keys_lead_to_a_key() {
        for key in FOREIGN_KEYS {
            if let Rule::Renamed(to) | Rule::Ambiguous(to) | Rule::Alias(to) = key.rule {
                let exists = [Command::Sft, Command::Grpo].into_iter().any(|command| keys::find(to, command).is_some());
                assert!(exists, "`{}` leads to `{to}`, which is no key", key.name);
            }
        }
    }

    #[test]
    fn off_is_off_in_every_spelling() {
        let node = |text: &str| yaml::parse(text).expect("valid YAML");
        for text in ["false", "no", "False", "null", "~"] {
            assert!(is_off(&node(text), &["false"]), "{text}");
        }
        assert!(is_off(&node("{}"), &["{}"]));
        assert!(is_off(&node("[]"), &["[]"]));
        assert!(is_off(&node("0.0"), &["0", "0.0"]));
        for text in ["true", "[a]", "{a: 1}", "0.1"] {
            assert!(!is_off(&node(text), &["false", "[]", "{}", "0"]), "{text}");
        }
    }
}
