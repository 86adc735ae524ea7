//! From what a file says to settings: checks across keys, then the typed result.
//!
//! `check_*` looks at every pair of keys that can clash and reports all of them; `build_*` runs only when nothing was
//! reported, so it cannot fail. This file holds what SFT and GRPO share.

use std::path::Path;

use super::best;
use super::diagnose::Problems;
use super::field::Named;
use super::keys::RawConfig;
use super::schedule;
use super::settings::{
    DataSettings, DeviceChoice, Interval, LoraSettings, ModelSettings, OptimizerSettings, Precision, Quantization,
    RewardSpec, SftSettings, TrainingSettings,
};
use super::special::{Recurrence, Saving};

/// Says what is wrong with the name or the parameters of a built-in reward.
pub type RewardCheck = fn(&RewardSpec) -> Result<(), String>;

/// What resolving needs to know about the run besides the file.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// Ranks of the run.
    pub world_size: usize,
    /// Whether the device that `device: auto` takes has bfloat16 arithmetic.
    pub has_bf16: bool,
    /// Says what is wrong with a built-in reward's name or parameters, which the `reward` room knows; programs are not
    /// given to it. Without it, built-ins are taken as they are.
    pub check_reward: Option<RewardCheck>,
    /// The commit this program was built from, for the header of the resolved config.
    pub git_commit: Option<&'a str>,
}

impl Default for Context<'_> {
    /// One rank on the CPU.
    fn default() -> Self {
        Self { world_size: 1, has_bf16: false, check_reward: None, git_commit: None }
    }
}

/// Warns that a key is set although what it belongs to is off.
pub(super) fn warn_idle(problems: &mut Problems, field: &dyn Named, is_idle: bool, reason: &str, help: &str) {
    if is_idle {
        problems.caution(&[(field, String::new())], format!("`{}` has no effect: {reason}", field.name()), help);
    }
}

pub(super) fn check_shared(raw: &RawConfig, problems: &mut Problems) {
    check_model(raw, problems);
    check_training(raw, problems);
    schedule::check(raw, problems);
}

fn check_model(raw: &RawConfig, problems: &mut Problems) {
    let (has_adapter, is_4bit) = (*raw.use_peft.value(), *raw.load_in_4bit.value());
    if is_4bit && !has_adapter {
        problems.clash(
            &[(&raw.load_in_4bit, "frozen 4-bit weights".into()), (&raw.use_peft, "nothing else to train".into())],
            "`load_in_4bit: true` needs `use_peft: true`: 4-bit weights cannot be trained, only an adapter on them",
            "add `use_peft: true`, or remove `load_in_4bit` to train every weight",
        );
    }
    if !has_adapter && raw.adapter_name_or_path.value().is_some() {
        problems.clash(
            &[(&raw.adapter_name_or_path, "an adapter".into()), (&raw.use_peft, "no adapter".into())],
            "`adapter_name_or_path` names an adapter, but `use_peft` is false",
            "add `use_peft: true`",
        );
    }
    let add_peft = "add `use_peft: true` to train an adapter";
    let fields: [(&dyn Named, bool); 5] = [
        (&raw.lora_r, raw.lora_r.is_changed()),
        (&raw.lora_alpha, raw.lora_alpha.is_changed()),
        (&raw.lora_dropout, raw.lora_dropout.is_changed()),
        (&raw.lora_target_modules, raw.lora_target_modules.is_changed()),
        (&raw.use_rslora, raw.use_rslora.is_changed()),
    ];
    for (field, is_changed) in fields {
        warn_idle(problems, field, !has_adapter && is_changed, "`use_peft` is false", add_peft);
    }
    let add_4bit = "add `load_in_4bit: true`";
    let quant_type: &dyn Named = &raw.bnb_4bit_quant_type;
    warn_idle(
        problems,
        quant_type,
        !is_4bit && raw.bnb_4bit_quant_type.is_changed(),
        "`load_in_4bit` is false",
        add_4bit,
    );
    let nested: &dyn Named = &raw.use_bnb_nested_quant;
    warn_idle(problems, nested, !is_4bit && raw.use_bnb_nested_quant.is_changed(), "`load_in_4bit` is false", add_4bit);
    let is_gguf = raw.model_name_or_path.known().is_some_and(|path| {
        Path::new(path).extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
    });
    if is_gguf && *raw.init_random.value() {
        problems.clash(
            &[(&raw.init_random, "random weights".into()), (&raw.model_name_or_path, "stored weights".into())],
            "`init_random: true` needs a folder with config.json, and `model_name_or_path` is a GGUF file",
            "name the model's folder, or remove `init_random`",
        );
    }
    let reason = "tensors of a GGUF file stay as they are stored";
    warn_idle(problems, &raw.load_in_4bit, is_gguf && is_4bit, reason, "remove it, or name a folder with safetensors");
}

fn check_training(raw: &RawConfig, problems: &mut Problems) {
    if *raw.bf16.value() == Some(true) && *raw.fp16.value() {
        problems.clash(
            &[(&raw.bf16, "one".into()), (&raw.fp16, "the other".into())],
            "`bf16: true` and `fp16: true` exclude each other",
            "keep `bf16` on a GPU of compute capability 8.0 or more, `fp16` on an older one",
        );
    }
    if *raw.use_cpu.value() && matches!(raw.device.value(), DeviceChoice::Cuda(_)) {
        problems.clash(
            &[(&raw.use_cpu, "the CPU".into()), (&raw.device, "a GPU".into())],
            "`use_cpu: true` and `device: cuda` name two devices",
            "keep one of the two",
        );
    }
    if *raw.activation_offloading.value() && !*raw.gradient_checkpointing.value() {
        problems.clash(
            &[(&raw.activation_offloading, "offloads".into()), (&raw.gradient_checkpointing, "keeps all".into())],
            "`activation_offloading: true` offloads what recomputation starts from, and nothing is recomputed",
            "set `gradient_checkpointing: true`, or remove `activation_offloading`",
        );
    }
    if raw.gradient_checkpointing_layers.value().is_some() && !*raw.gradient_checkpointing.value() {
        problems.clash(
            &[
                (&raw.gradient_checkpointing_layers, "recomputes".into()),
                (&raw.gradient_checkpointing, "keeps all".into()),
            ],
            "`gradient_checkpointing_layers` says which layers are recomputed, and none is",
            "set `gradient_checkpointing: true`, or remove `gradient_checkpointing_layers`",
        );
    }
    let has_steps = raw.max_steps.value().0.is_some();
    warn_idle(
        problems,
        &raw.num_train_epochs,
        has_steps && raw.num_train_epochs.is_changed(),
        "`max_steps` sets the length of the run",
        "remove one of the two",
    );
    let evaluates_by_steps = *raw.eval_strategy.value() == Recurrence::Steps;
    let reason = "`eval_strategy` is not `steps`";
    warn_idle(
        problems,
        &raw.eval_steps,
        !evaluates_by_steps && raw.eval_steps.is_changed(),
        reason,
        "add `eval_strategy: steps`",
    );
    best::check(raw, problems);
    let saves_by_steps = *raw.save_strategy.value() == Saving::At(Recurrence::Steps);
    let reason = "`save_strategy` is not `steps`";
    warn_idle(
        problems,
        &raw.save_steps,
        !saves_by_steps && raw.save_steps.is_changed(),
        reason,
        "add `save_strategy: steps`",
    );
}

pub(super) fn build_model(raw: &RawConfig) -> ModelSettings {
    ModelSettings {
        model_name_or_path: raw.model_name_or_path.value().clone(),
        model_revision: raw.model_revision.value().clone(),
        tokenizer_name_or_path: raw.tokenizer_name_or_path.value().clone(),
        chat_template_path: raw.chat_template_path.value().clone(),
        init_random: *raw.init_random.value(),
        dtype: *raw.dtype.value(),
        quantization: raw.load_in_4bit.value().then(|| Quantization {
            quant_type: *raw.bnb_4bit_quant_type.value(),
            double_quant: *raw.use_bnb_nested_quant.value(),
        }),
        lora: raw.use_peft.value().then(|| LoraSettings {
            r: *raw.lora_r.value(),
            alpha: *raw.lora_alpha.value(),
            dropout: *raw.lora_dropout.value(),
            target_modules: raw.lora_target_modules.value().0.clone(),
            use_rslora: *raw.use_rslora.value(),
        }),
        adapter_name_or_path: raw.adapter_name_or_path.value().clone(),
    }
}

/// `text_field` is the one data key that GRPO lacks: it reads prompts.
pub(super) fn build_data(raw: &RawConfig) -> DataSettings {
    DataSettings {
        dataset_name: raw.dataset_name.value().clone(),
        dataset_config: raw.dataset_config.value().clone(),
        dataset_revision: raw.dataset_revision.value().clone(),
        dataset_train_split: raw.dataset_train_split.value().clone(),
        dataset_test_split: raw.dataset_test_split.value().clone(),
        dataset_text_field: raw.dataset_text_field.value().clone(),
        eval_fraction: *raw.eval_fraction.value(),
        max_train_samples: *raw.max_train_samples.value(),
        max_eval_samples: *raw.max_eval_samples.value(),
        chat_template_kwargs: raw.chat_template_kwargs.value().clone(),
        system_prompt: raw.system_prompt.value().clone(),
    }
}

pub(super) fn build_training(raw: &RawConfig, context: &Context<'_>) -> TrainingSettings {
    let device = if *raw.use_cpu.value() { DeviceChoice::Cpu } else { *raw.device.value() };
    let (has_bf16, is_fp16) = (context.has_bf16 && device != DeviceChoice::Cpu, *raw.fp16.value());
    let precision = match raw.bf16.value() {
        _ if is_fp16 => Precision::Fp16,
        Some(true) => Precision::Bf16,
        None if has_bf16 => Precision::Bf16,
        _ => Precision::No,
    };
    let logging_steps = *raw.logging_steps.value();
    let seed = *raw.seed.value();
    TrainingSettings {
        output_dir: raw.output_dir.value().clone(),
        resume_from_checkpoint: raw.resume_from_checkpoint.value().clone(),
        overwrite_output_dir: *raw.overwrite_output_dir.value(),
        seed,
        data_seed: raw.data_seed.value().unwrap_or(seed),
        device,
        precision,
        per_device_train_batch_size: *raw.per_device_train_batch_size.value(),
        per_device_eval_batch_size: *raw.per_device_eval_batch_size.value(),
        gradient_accumulation_steps: *raw.gradient_accumulation_steps.value(),
        num_train_epochs: *raw.num_train_epochs.value(),
        max_steps: raw.max_steps.value().0,
        gradient_checkpointing: *raw.gradient_checkpointing.value(),
        gradient_checkpointing_layers: *raw.gradient_checkpointing_layers.value(),
        activation_offloading: *raw.activation_offloading.value(),
        full_determinism: *raw.full_determinism.value(),
        learning_rate: *raw.learning_rate.value(),
        lr_scheduler_type: *raw.lr_scheduler_type.value(),
        lr_scheduler_kwargs: raw.lr_scheduler_kwargs.value().clone(),
        warmup: schedule::warmup(raw),
        optimizer: OptimizerSettings {
            weight_decay: *raw.weight_decay.value(),
            adam_beta1: *raw.adam_beta1.value(),
            adam_beta2: *raw.adam_beta2.value(),
            adam_epsilon: *raw.adam_epsilon.value(),
        },
        max_grad_norm: *raw.max_grad_norm.value(),
        logging_steps,
        eval_strategy: interval(*raw.eval_strategy.value(), raw.eval_steps.value().unwrap_or(logging_steps)),
        save_strategy: match *raw.save_strategy.value() {
            Saving::At(recurrence) => interval(recurrence, *raw.save_steps.value()),
            Saving::Best => Interval::Best,
        },
        save_total_limit: *raw.save_total_limit.value(),
        save_only_model: *raw.save_only_model.value(),
        best: best::build(raw),
        resume_with_changed_inputs: *raw.resume_with_changed_inputs.value(),
        report_to: raw.report_to.value().0.clone(),
        disable_tqdm: *raw.disable_tqdm.value(),
    }
}

fn interval(recurrence: Recurrence, steps: usize) -> Interval {
    match recurrence {
        Recurrence::No => Interval::No,
        Recurrence::Steps => Interval::Steps(steps),
        Recurrence::Epoch => Interval::Epoch,
    }
}

/// Checks and builds the settings of `trainer sft`; `None` if anything was reported.
pub(super) fn sft(raw: &RawConfig, context: &Context<'_>, problems: &mut Problems) -> Option<SftSettings> {
    check_shared(raw, problems);
    let (packing, max_length) = (*raw.packing.value(), *raw.max_length.value());
    let eval_packing = raw.eval_packing.value().unwrap_or(packing);
    for (field, is_packed) in [(&raw.packing as &dyn Named, packing), (&raw.eval_packing, eval_packing)] {
        if is_packed && max_length.is_none() && (field.is_given() || field.name() == "packing") {
            problems.clash(
                &[(field, "packs into `max_length` tokens".into()), (&raw.max_length, "no length".into())],
                format!("`{}: true` needs `max_length`: it is the length that examples are packed into", field.name()),
                "set `max_length`, e.g. 1024",
            );
        }
    }
    let is_idle = !packing && !eval_packing && raw.packing_strategy.is_changed();
    warn_idle(problems, &raw.packing_strategy, is_idle, "`packing` is false", "add `packing: true`");
    problems.is_clean().then(|| SftSettings {
        model: build_model(raw),
        data: build_data(raw),
        training: build_training(raw, context),
        max_length,
        packing,
        packing_strategy: *raw.packing_strategy.value(),
        eval_packing,
        completion_only_loss: *raw.completion_only_loss.value(),
        assistant_only_loss: *raw.assistant_only_loss.value(),
        loss_type: *raw.sft_loss_type.value(),
    })
}
