//! Settings back to the YAML text that gives them: `output_dir/config.resolved.yaml`, and the values by which a checkpoint
//! knows the run it belongs to.
//!
//! Every key of the command is spelled out, in the order of the table. The settings are taken apart field by field, so
//! a field added to them does not compile until it is written here. Feeding the text back gives equal settings, but that
//! a run which went on from its own checkpoint starts anew.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::Value;

use super::emit::{
    entries, float, is_inside, map, optional, optional_float, optional_path, optional_string, quoted, string,
};
use super::field::Command;
use super::keys::KEYS;
use super::settings::{
    AdaptiveEntropy, BestSettings, DataSettings, DeviceChoice, GrpoSettings, HubSettings, Interval, LoraSettings,
    MixtureSettings, ModelSettings, ModuleSet, OptimizerKind, OptimizerSettings, Precision, QuantType, Quantization,
    RankBackend, RankSettings, Resume, RewardSettings, RewardSpec, RolloutCorrection, RolloutCorrectionMode,
    SamplingSettings, SftSettings, TrainingSettings, VespoSettings, Warmup,
};

/// Key to YAML text.
type Texts = BTreeMap<&'static str, String>;

/// The text for the settings of `trainer sft`, below `header` (lines of comment without their `#`).
#[must_use]
pub fn sft_yaml(settings: &SftSettings, header: &[String]) -> String {
    document(Command::Sft, header, &sft_texts(settings))
}

/// Every key of `trainer sft` with its value as YAML.
#[must_use]
pub fn sft_texts(settings: &SftSettings) -> BTreeMap<&'static str, String> {
    let SftSettings {
        model,
        data,
        training,
        max_length,
        truncation_mode,
        packing,
        packing_strategy,
        eval_packing,
        dataloader_drop_last,
        completion_only_loss,
        assistant_only_loss,
        loss_type,
        label_smoothing_factor,
    } = settings;
    let mut texts = Texts::new();
    write_model(model, &mut texts);
    write_data(data, Command::Sft, &mut texts);
    write_training(training, &mut texts);
    texts.extend([
        ("max_length", optional(*max_length)),
        ("truncation_mode", truncation_mode.to_string()),
        ("packing", packing.to_string()),
        ("packing_strategy", packing_strategy.to_string()),
        ("eval_packing", eval_packing.to_string()),
        ("dataloader_drop_last", dataloader_drop_last.to_string()),
        ("completion_only_loss", optional(*completion_only_loss)),
        ("assistant_only_loss", assistant_only_loss.to_string()),
        ("loss_type", loss_type.to_string()),
        ("label_smoothing_factor", float(*label_smoothing_factor)),
    ]);
    texts
}

/// The text for the settings of `trainer grpo`, below `header` (lines of comment without their `#`).
#[must_use]
pub fn grpo_yaml(settings: &GrpoSettings, header: &[String]) -> String {
    document(Command::Grpo, header, &grpo_texts(settings))
}

/// Every key of `trainer grpo` with its value as YAML.
#[must_use]
pub fn grpo_texts(settings: &GrpoSettings) -> BTreeMap<&'static str, String> {
    let GrpoSettings {
        model,
        data,
        training,
        num_generations,
        num_generations_eval,
        max_prompt_length,
        truncate_prompts,
        max_completion_length,
        sampling,
        reward_funcs,
        rewards: RewardSettings { python, path, code },
        reward_weights,
        scale_rewards,
        multi_objective_aggregation,
        loss_type,
        beta,
        use_bias_correction_kl,
        epsilon,
        epsilon_high,
        delta,
        importance_sampling_level,
        num_iterations,
        steps_per_generation,
        generation_batch_size,
        mask_truncated_completions,
        top_entropy_quantile,
        entropy_coef,
        adaptive_entropy,
        off_policy_mask_threshold,
        sapo_temperature_neg,
        sapo_temperature_pos,
        vespo,
        rollout_importance_sampling,
        sync_ref_model,
        ref_model_mixup_alpha,
        ref_model_sync_steps,
        shuffle_dataset,
        log_completions,
        num_completions_to_print,
        max_num_seqs,
    } = settings;
    let mut texts = Texts::new();
    write_model(model, &mut texts);
    write_data(data, Command::Grpo, &mut texts);
    write_training(training, &mut texts);
    write_sampling(sampling, &mut texts);
    write_vespo(vespo, &mut texts);
    write_adaptive_entropy(adaptive_entropy.as_ref(), &mut texts);
    write_correction(rollout_importance_sampling.as_ref(), &mut texts);
    texts.extend([
        ("num_generations", num_generations.to_string()),
        ("num_generations_eval", num_generations_eval.to_string()),
        ("max_prompt_length", optional(*max_prompt_length)),
        ("truncate_prompts", truncate_prompts.to_string()),
        ("max_completion_length", optional(*max_completion_length)),
        ("reward_funcs", rewards(reward_funcs)),
        ("code_sandbox", code.sandbox.to_string()),
        ("parallel_code_exec_per_proc", optional(code.parallel)),
        ("code_language", string(&code.language)),
        ("code_eval_test_batch_size", code.test_batch_size.map_or_else(|| "-1".into(), |size| size.to_string())),
        ("code_eval_scoring_mode", code.scoring.to_string()),
        ("reward_python", optional_path(python.as_deref())),
        (
            "reward_path",
            format!("[{}]", path.iter().map(|p| quoted(&p.to_string_lossy())).collect::<Vec<_>>().join(", ")),
        ),
        (
            "reward_weights",
            format!("[{}]", reward_weights.iter().map(|weight| float(*weight)).collect::<Vec<_>>().join(", ")),
        ),
        ("scale_rewards", scale_rewards.to_string()),
        ("multi_objective_aggregation", multi_objective_aggregation.to_string()),
        ("loss_type", loss_type.to_string()),
        ("beta", float(*beta)),
        ("use_bias_correction_kl", use_bias_correction_kl.to_string()),
        ("epsilon", float(*epsilon)),
        ("epsilon_high", float(*epsilon_high)),
        ("delta", optional_float(*delta)),
        ("importance_sampling_level", importance_sampling_level.to_string()),
        ("num_iterations", num_iterations.to_string()),
        ("steps_per_generation", steps_per_generation.to_string()),
        // The two exclude each other in a file.
        ("generation_batch_size", format!("null  # {generation_batch_size} from steps_per_generation")),
        ("mask_truncated_completions", mask_truncated_completions.to_string()),
        ("top_entropy_quantile", float(*top_entropy_quantile)),
        ("entropy_coef", float(*entropy_coef)),
        ("off_policy_mask_threshold", optional_float(*off_policy_mask_threshold)),
        ("sapo_temperature_neg", float(*sapo_temperature_neg)),
        ("sapo_temperature_pos", float(*sapo_temperature_pos)),
        // What it does stands in `lora_dropout`.
        ("disable_dropout", "false".into()),
        ("sync_ref_model", sync_ref_model.to_string()),
        ("ref_model_mixup_alpha", float(*ref_model_mixup_alpha)),
        ("ref_model_sync_steps", ref_model_sync_steps.to_string()),
        ("shuffle_dataset", shuffle_dataset.to_string()),
        ("log_completions", log_completions.to_string()),
        ("num_completions_to_print", optional(*num_completions_to_print)),
        ("max_num_seqs", max_num_seqs.to_string()),
    ]);
    texts
}

fn document(command: Command, header: &[String], texts: &Texts) -> String {
    let mut text = String::new();
    for line in header {
        let _ = writeln!(text, "# {line}");
    }
    let mut group = "";
    for key in KEYS.iter().filter(|key| key.commands.include(command)) {
        if key.group != group {
            group = key.group;
            let _ = write!(text, "\n# {group}\n");
        }
        // Every key has a text: the test `every_key_is_written` holds the two lists together.
        let value = texts.get(key.name).map_or("null", String::as_str);
        let separator = if value.starts_with('\n') { "" } else { " " };
        let _ = writeln!(text, "{}:{separator}{value}", key.name);
    }
    text
}

fn write_model(model: &ModelSettings, texts: &mut Texts) {
    let ModelSettings {
        model_name_or_path,
        model_revision,
        tokenizer_name_or_path,
        chat_template,
        chat_template_path,
        eos_token,
        init_random,
        dtype,
        quantization,
        lora,
        adapter_name_or_path,
    } = model;
    // What a switched-off group would be has no trace in the settings: the defaults stand for it.
    let Quantization { quant_type, double_quant } =
        quantization.unwrap_or(Quantization { quant_type: QuantType::Nf4, double_quant: false });
    let plain = LoraSettings {
        r: 16,
        alpha: 32.0,
        dropout: 0.05,
        target_modules: ModuleSet::of_qwen(),
        modules_to_save: vec![],
        use_rslora: false,
        use_dora: false,
    };
    let LoraSettings { r, alpha, dropout, target_modules, modules_to_save, use_rslora, use_dora } =
        lora.as_ref().unwrap_or(&plain);
    let names =
        |names: &[String]| format!("[{}]", names.iter().map(|name| string(name)).collect::<Vec<_>>().join(", "));
    texts.extend([
        ("model_name_or_path", string(model_name_or_path)),
        ("model_revision", string(model_revision)),
        ("tokenizer_name_or_path", optional_string(tokenizer_name_or_path.as_deref())),
        ("chat_template", optional_string(chat_template.as_deref())),
        ("eos_token", optional_string(eos_token.as_deref())),
        ("chat_template_path", optional_path(chat_template_path.as_deref())),
        ("init_random", init_random.to_string()),
        ("dtype", dtype.to_string()),
        ("load_in_4bit", quantization.is_some().to_string()),
        ("bnb_4bit_quant_type", quant_type.to_string()),
        ("use_bnb_nested_quant", double_quant.to_string()),
        ("use_peft", lora.is_some().to_string()),
        ("lora_r", r.to_string()),
        ("lora_alpha", float(*alpha)),
        ("lora_dropout", float(*dropout)),
        (
            "lora_target_modules",
            match target_modules {
                ModuleSet::Names(list) => names(list),
                ModuleSet::Pattern(pattern) => string(pattern),
                ModuleSet::AllLinear => "all-linear".into(),
            },
        ),
        ("lora_modules_to_save", names(modules_to_save)),
        ("use_rslora", use_rslora.to_string()),
        ("use_dora", use_dora.to_string()),
        ("adapter_name_or_path", optional_path(adapter_name_or_path.as_deref())),
    ]);
}

fn write_data(data: &DataSettings, command: Command, texts: &mut Texts) {
    let DataSettings {
        dataset_name,
        mixture,
        dataset_config,
        dataset_revision,
        dataset_train_split,
        dataset_test_split,
        dataset_text_field,
        dataset_prompt_column,
        dataset_columns,
        eval_fraction,
        max_train_samples,
        max_eval_samples,
        preprocessed,
        chat_template_kwargs,
        system_prompt,
    } = data;
    if command == Command::Sft {
        texts.insert("dataset_text_field", string(dataset_text_field));
    } else {
        texts.insert("dataset_prompt_column", optional_string(dataset_prompt_column.as_deref()));
    }
    let name = mixture.is_none().then_some(dataset_name.as_str());
    let [mut open_r1, mut trl, mut size] = ["null", "[]", "null"].map(str::to_string);
    match mixture {
        Some(MixtureSettings { text: ("datasets", text), test_split_size, .. }) => {
            (trl, size) = (text.clone(), optional_float(*test_split_size));
        }
        Some(MixtureSettings { text: (_, text), .. }) => open_r1.clone_from(text),
        None => {}
    }
    let columns = dataset_columns.iter().map(|(old, new)| (old.clone(), Value::from(new.as_str()))).collect();
    texts.extend([
        ("dataset_name", optional_string(name)),
        ("dataset_mixture", open_r1),
        ("datasets", trl),
        ("test_split_size", size),
        ("dataset_columns", map(&columns)),
        ("dataset_config", optional_string(dataset_config.as_deref())),
        ("dataset_revision", string(dataset_revision)),
        ("dataset_train_split", string(dataset_train_split)),
        ("dataset_test_split", string(dataset_test_split)),
        ("eval_fraction", optional_float(*eval_fraction)),
        ("max_train_samples", optional(*max_train_samples)),
        ("max_eval_samples", optional(*max_eval_samples)),
        ("preprocessed", optional_path(preprocessed.as_deref())),
        ("chat_template_kwargs", map(chat_template_kwargs)),
        ("system_prompt", optional_string(system_prompt.as_deref())),
    ]);
}

#[expect(clippy::too_many_lines, reason = "a line for each key")]
fn write_training(training: &TrainingSettings, texts: &mut Texts) {
    let TrainingSettings {
        output_dir,
        resume_from_checkpoint,
        overwrite_output_dir,
        seed,
        data_seed,
        device,
        device_memory_limit,
        precision,
        per_device_train_batch_size,
        per_device_eval_batch_size,
        gradient_accumulation_steps,
        num_train_epochs,
        max_steps,
        gradient_checkpointing,
        gradient_checkpointing_layers,
        activation_offloading,
        full_determinism,
        learning_rate,
        lr_scheduler_type,
        lr_scheduler_kwargs,
        warmup,
        optimizer: OptimizerSettings { kind, weight_decay, adam_beta1, adam_beta2, adam_epsilon },
        max_grad_norm,
        neftune_noise_alpha,
        logging_strategy,
        logging_first_step,
        eval_strategy,
        eval_on_start,
        eval_delay,
        save_strategy,
        save_total_limit,
        save_only_model,
        best,
        resume_with_changed_inputs,
        report_to,
        disable_tqdm,
        hub,
        ranks:
            RankSettings { world_size, stage, is_stage_auto, param_persistence_threshold, timeout_secs, backend, offload },
    } = training;
    write_hub(hub, texts);
    write_best(best.as_ref(), texts);
    // A run that went on from its own checkpoint is the run from its start; one that went on from another run's
    // checkpoint is not.
    let resume = match resume_from_checkpoint {
        Resume::Path(path) if !is_inside(path, output_dir) => string(&path.to_string_lossy()),
        Resume::No | Resume::Latest | Resume::Auto | Resume::Path(_) => "false".into(),
    };
    let (warmup_steps, warmup_ratio) = match warmup {
        Warmup::Steps(steps) => (steps.to_string(), "null".into()),
        Warmup::Ratio(ratio) => ("0".into(), float(*ratio)),
    };
    let (log_word, log_steps) = interval(*logging_strategy, "10");
    let (eval_word, eval_steps) = interval(*eval_strategy, "null");
    let (save_word, save_steps) = interval(*save_strategy, "500");
    let sinks: Vec<_> = report_to.iter().map(|sink| sink.as_str()).collect();
    texts.extend([
        ("output_dir", string(&output_dir.to_string_lossy())),
        ("resume_from_checkpoint", resume),
        ("overwrite_output_dir", overwrite_output_dir.to_string()),
        ("seed", seed.to_string()),
        ("data_seed", data_seed.to_string()),
        ("device", device_text(*device)),
        ("device_memory_limit", device_memory_limit.map_or_else(|| "null".into(), |bytes| bytes.to_string())),
        ("use_cpu", "false".into()),
        ("bf16", (*precision == Precision::Bf16).to_string()),
        ("fp16", (*precision == Precision::Fp16).to_string()),
        ("per_device_train_batch_size", per_device_train_batch_size.to_string()),
        ("per_device_eval_batch_size", per_device_eval_batch_size.to_string()),
        ("gradient_accumulation_steps", gradient_accumulation_steps.to_string()),
        ("num_train_epochs", float(*num_train_epochs)),
        ("max_steps", max_steps.map_or_else(|| "-1".into(), |steps| steps.to_string())),
        ("gradient_checkpointing", gradient_checkpointing.to_string()),
        ("gradient_checkpointing_layers", optional(*gradient_checkpointing_layers)),
        ("activation_offloading", activation_offloading.to_string()),
        ("full_determinism", full_determinism.to_string()),
        ("learning_rate", float(*learning_rate)),
        ("lr_scheduler_type", lr_scheduler_type.to_string()),
        ("lr_scheduler_kwargs", map(lr_scheduler_kwargs)),
        ("warmup_steps", warmup_steps),
        ("warmup_ratio", warmup_ratio),
        ("optim", optim_name(*kind).into()),
        ("weight_decay", float(*weight_decay)),
        ("adam_beta1", float(*adam_beta1)),
        ("adam_beta2", float(*adam_beta2)),
        ("adam_epsilon", float(*adam_epsilon)),
        ("max_grad_norm", float(*max_grad_norm)),
        ("neftune_noise_alpha", optional_float(*neftune_noise_alpha)),
        ("logging_strategy", log_word.into()),
        ("logging_steps", log_steps),
        ("logging_first_step", logging_first_step.to_string()),
        ("eval_strategy", eval_word.into()),
        ("eval_steps", eval_steps),
        ("eval_on_start", eval_on_start.to_string()),
        ("eval_delay", float(*eval_delay)),
        ("save_strategy", save_word.into()),
        ("save_steps", save_steps),
        ("save_total_limit", optional(*save_total_limit)),
        ("save_only_model", save_only_model.to_string()),
        ("resume_with_changed_inputs", resume_with_changed_inputs.to_string()),
        ("report_to", if sinks.is_empty() { "none".into() } else { format!("[{}]", sinks.join(", ")) }),
        ("disable_tqdm", disable_tqdm.to_string()),
        // The environment and files of launchers were held against the settings, which say all there is.
        ("env", "{}".into()),
        ("deepspeed", "null".into()),
        ("accelerate_config", "null".into()),
        ("ddp_backend", backend_text(*backend).into()),
        ("num_processes", world_size.to_string()),
        ("zero_stage", if *is_stage_auto { "auto".into() } else { stage.number().to_string() }),
        ("stage3_param_persistence_threshold", param_persistence_threshold.to_string()),
        ("offload_optimizer_device", offload.optimizer.to_string()),
        ("offload_param_device", offload.params.to_string()),
        ("offload_optimizer_nvme_path", optional_path(offload.optimizer_path.as_deref())),
        ("offload_param_nvme_path", optional_path(offload.params_path.as_deref())),
        ("offload_buffer_count", offload.buffer_count.to_string()),
        ("pin_memory", offload.pin_memory.to_string()),
        ("stage3_max_live_parameters", optional(offload.max_live_parameters)),
        ("ddp_timeout", timeout_secs.to_string()),
    ]);
}

fn backend_text(backend: RankBackend) -> &'static str {
    match backend {
        RankBackend::Auto => "null",
        RankBackend::Gloo => "gloo",
        RankBackend::Nccl => "nccl",
    }
}

fn device_text(device: DeviceChoice) -> String {
    match device {
        DeviceChoice::Auto => "auto".into(),
        DeviceChoice::Cpu => "cpu".into(),
        DeviceChoice::Cuda(ordinal) => format!("cuda:{ordinal}"),
    }
}

/// The name in the field that gives the optimizer.
fn optim_name(kind: OptimizerKind) -> &'static str {
    match kind {
        OptimizerKind::AdamW => "adamw_torch",
        OptimizerKind::AdamW8bit => "adamw_8bit",
        OptimizerKind::Lion => "lion_32bit",
        OptimizerKind::Muon => "muon",
    }
}

fn write_hub(hub: &HubSettings, texts: &mut Texts) {
    let HubSettings { push_to_hub, model_id, revision, is_private } = hub;
    texts.extend([
        ("push_to_hub", push_to_hub.to_string()),
        ("hub_model_id", optional_string(model_id.as_deref())),
        ("hub_revision", optional_string(revision.as_deref())),
        ("hub_private_repo", optional(*is_private)),
    ]);
}

fn write_best(best: Option<&BestSettings>, texts: &mut Texts) {
    let early_stopping = best.and_then(|best| best.early_stopping);
    texts.extend([
        ("load_best_model_at_end", best.is_some_and(|best| best.load_at_end).to_string()),
        ("metric_for_best_model", optional_string(best.map(|best| best.metric.as_str()))),
        ("greater_is_better", optional(best.map(|best| best.greater_is_better))),
        ("early_stopping_patience", optional(early_stopping.map(|stopping| stopping.patience))),
        ("early_stopping_threshold", float(early_stopping.map_or(0.0, |stopping| stopping.threshold))),
    ]);
}

fn write_sampling(sampling: &SamplingSettings, texts: &mut Texts) {
    let SamplingSettings { repetition_penalty, temperature, top_k, top_p, min_p, stop_strings } = sampling;
    let stops: Vec<_> = stop_strings.iter().map(|stop| quoted(stop)).collect();
    texts.extend([
        ("repetition_penalty", float(*repetition_penalty)),
        ("temperature", float(*temperature)),
        ("top_k", top_k.to_string()),
        ("top_p", float(*top_p)),
        ("min_p", float(*min_p)),
        ("stop_strings", format!("[{}]", stops.join(", "))),
    ]);
}

fn write_vespo(vespo: &VespoSettings, texts: &mut Texts) {
    let VespoSettings { k_pos, lambda_pos, k_neg, lambda_neg } = vespo;
    texts.extend([
        ("vespo_k_pos", float(*k_pos)),
        ("vespo_lambda_pos", float(*lambda_pos)),
        ("vespo_k_neg", float(*k_neg)),
        ("vespo_lambda_neg", float(*lambda_neg)),
    ]);
}

fn write_adaptive_entropy(adaptive: Option<&AdaptiveEntropy>, texts: &mut Texts) {
    let off = AdaptiveEntropy { coef_min: 0.0, coef_max: 1.0, coef_delta: 0.005, target: 0.2 };
    let AdaptiveEntropy { coef_min, coef_max, coef_delta, target } = adaptive.unwrap_or(&off);
    texts.extend([
        ("use_adaptive_entropy", adaptive.is_some().to_string()),
        ("entropy_coef_min", float(*coef_min)),
        ("entropy_coef_max", float(*coef_max)),
        ("entropy_coef_delta", float(*coef_delta)),
        ("entropy_target", float(*target)),
    ]);
}

fn write_correction(correction: Option<&RolloutCorrection>, texts: &mut Texts) {
    let off = RolloutCorrection { mode: RolloutCorrectionMode::SequenceMask, clip_max: Some(3.0), clip_min: None };
    let RolloutCorrection { mode, clip_max, clip_min } = correction.unwrap_or(&off);
    texts.extend([
        ("vllm_importance_sampling_correction", correction.is_some().to_string()),
        ("vllm_importance_sampling_mode", mode.to_string()),
        ("vllm_importance_sampling_clip_max", optional_float(*clip_max)),
        ("vllm_importance_sampling_clip_min", optional_float(*clip_min)),
    ]);
}

fn rewards(specs: &[RewardSpec]) -> String {
    let mut text = String::new();
    for spec in specs {
        match spec {
            RewardSpec::Builtin { name, parameters } if parameters.is_empty() => {
                let _ = write!(text, "\n  - {}", string(name));
            }
            RewardSpec::Builtin { name, parameters } => {
                let _ = write!(text, "\n  - {{kind: {}, {}}}", string(name), entries(parameters));
            }
            RewardSpec::Command { name, command, timeout_secs } => {
                let words: Vec<_> = command.iter().map(|word| quoted(word)).collect();
                let _ = write!(
                    text,
                    "\n  - {{kind: command, name: {}, command: [{}], timeout_secs: {}}}",
                    quoted(name),
                    words.join(", "),
                    float(*timeout_secs),
                );
            }
            RewardSpec::Python { target, name, parameters, timeout_secs } => {
                let name = name.as_ref().map(|name| format!(", name: {}", quoted(name))).unwrap_or_default();
                let _ = write!(text, "\n  - {{kind: {}{name}, timeout_secs: {}", quoted(target), float(*timeout_secs));
                if !parameters.is_empty() {
                    let _ = write!(text, ", {}", entries(parameters));
                }
                text.push('}');
            }
        }
    }
    text
}

fn interval(interval: Interval, idle_steps: &str) -> (&'static str, String) {
    match interval {
        Interval::No => ("\"no\"", idle_steps.into()),
        Interval::Steps(steps) => ("steps", steps.to_string()),
        Interval::Share(share) => ("steps", float(share)),
        Interval::Epoch => ("epoch", idle_steps.into()),
        Interval::Best => ("best", idle_steps.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_words_read_the_same_in_every_yaml() {
        for (value, text) in [(1e-6, "1.0e-6"), (2.5e-7, "2.5e-7"), (1e300, "1.0e+300"), (0.05, "0.05"), (32.0, "32.0")]
        {
            assert_eq!(float(value), text);
        }
        for (value, text) in [
            ("data/tiny-qwen", "data/tiny-qwen"),
            ("main", "main"),
            ("no", "\"no\""),
            ("1e5", "\"1e5\""),
            ("a b", "\"a b\""),
            ("null", "\"null\""),
            ("Yes", "\"Yes\""),
            ("é\u{7}\u{1F600}", "\"é\\u0007\\U0001F600\""),
        ] {
            assert_eq!(string(value), text);
        }
    }
}
