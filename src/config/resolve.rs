//! From what a file says to settings: checks across keys, then the typed result.
//!
//! `check_*` looks at every pair of keys that can clash and reports all of them; `build_*` runs only when nothing was
//! reported, so it cannot fail. This file holds what SFT and GRPO share.

use std::path::{Path, PathBuf};

use super::best;
use super::diagnose::Problems;
use super::emit;
use super::field::Named;
use super::home;
use super::keys::RawConfig;
use super::schedule;
use super::services::{self, check_environment, check_services};
use super::settings::{
    DataSettings, DeviceChoice, HubSettings, Interval, LoraSettings, MixturePart, MixtureSettings, ModelSettings,
    OptimizerSettings, PackingStrategy, Precision, Quantization, RankSettings, RewardSpec, SftLossType, SftSettings,
    TrainingSettings,
};
use super::special::{Cadence, Recurrence, Saving};
use super::world;

/// Says what is wrong with the name or the parameters of a built-in reward.
pub type RewardCheck = fn(&RewardSpec) -> Result<(), String>;

/// What resolving needs to know about the run besides the file.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// Ranks that a launcher (srun, torchrun, mpirun) started; `None` where none did and the file decides.
    pub launched: Option<usize>,
    /// GPUs that this process sees: as many ranks are there where nobody says how many, with `device: auto`.
    pub visible_gpus: usize,
    /// Whether the device that `device: auto` takes has bfloat16 arithmetic.
    pub has_bf16: bool,
    /// Says what is wrong with a built-in reward's name or parameters, which the `reward` room knows; programs are not
    /// given to it. Without it, built-ins are taken as they are.
    pub check_reward: Option<RewardCheck>,
    /// The commit this program was built from, for the header of the resolved config.
    pub git_commit: Option<&'a str>,
    /// The folder of the file.
    pub config_folder: Option<&'a Path>,
}

impl Default for Context<'_> {
    /// One rank on the CPU.
    fn default() -> Self {
        Self {
            launched: None,
            visible_gpus: 0,
            has_bf16: false,
            check_reward: None,
            git_commit: None,
            config_folder: None,
        }
    }
}

/// Warns that a key is set although what it belongs to is off.
pub(super) fn warn_idle(problems: &mut Problems, field: &dyn Named, is_idle: bool, reason: &str, help: &str) {
    if is_idle {
        problems.caution(&[(field, String::new())], format!("`{}` has no effect: {reason}", field.name()), help);
    }
}

/// Most sequences of one optimizer step.
const MOST_SEQUENCES: usize = 1 << 24;

/// Checks what SFT and GRPO share, and gives the ranks of the run, which the other checks take part in.
pub(super) fn check_shared(raw: &RawConfig, context: &Context<'_>, problems: &mut Problems) -> RankSettings {
    check_data(raw, problems);
    check_model(raw, problems);
    check_training(raw, problems);
    check_services(raw, context, problems);
    check_environment(raw, problems);
    schedule::check(raw, problems);
    let ranks = world::resolve(raw, context, problems);
    check_sizes(raw, ranks.world_size, problems);
    ranks
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
    if raw.chat_template.value().is_some() && raw.chat_template_path.value().is_some() {
        problems.clash(
            &[(&raw.chat_template, "one template".into()), (&raw.chat_template_path, "another".into())],
            "`chat_template` and `chat_template_path` both give the chat template",
            "remove one of them",
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
    let fields: [(&dyn Named, bool); 7] = [
        (&raw.lora_r, raw.lora_r.is_changed()),
        (&raw.lora_alpha, raw.lora_alpha.is_changed()),
        (&raw.lora_dropout, raw.lora_dropout.is_changed()),
        (&raw.lora_target_modules, raw.lora_target_modules.is_changed()),
        (&raw.lora_modules_to_save, raw.lora_modules_to_save.is_changed()),
        (&raw.use_rslora, raw.use_rslora.is_changed()),
        (&raw.use_dora, raw.use_dora.is_changed()),
    ];
    for (field, is_changed) in fields {
        warn_idle(problems, field, !has_adapter && is_changed, "`use_peft` is false", add_peft);
    }
    let is_idle = *raw.disable_dropout.value() && raw.lora_dropout.is_changed();
    warn_idle(problems, &raw.lora_dropout, is_idle, "`disable_dropout` is true", "remove one of the two");
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
    warn_idle(
        problems,
        &raw.eval_delay,
        *raw.eval_strategy.value() == Recurrence::No && *raw.eval_delay.value() > 0.0,
        "`eval_strategy` is `no`",
        "add `eval_strategy: steps` or `epoch`",
    );
    best::check(raw, problems);
    let logs_by_steps = *raw.logging_strategy.value() == Recurrence::Steps;
    let is_used = logs_by_steps || (evaluates_by_steps && raw.eval_steps.value().0.is_none());
    let reason = "`logging_strategy` is not `steps`";
    warn_idle(
        problems,
        &raw.logging_steps,
        !is_used && raw.logging_steps.is_changed(),
        reason,
        "add `logging_strategy: steps`",
    );
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

/// Batches whose size, or whose tokens, no machine holds: each number is in its range and their product is not.
fn check_sizes(raw: &RawConfig, world_size: usize, problems: &mut Problems) {
    let per_device = *raw.per_device_train_batch_size.value();
    let accumulation = *raw.gradient_accumulation_steps.value();
    let sequences = per_device.saturating_mul(accumulation).saturating_mul(world_size);
    if sequences > MOST_SEQUENCES {
        problems.clash(
            &[(&raw.per_device_train_batch_size, String::new()), (&raw.gradient_accumulation_steps, String::new())],
            format!(
                "an optimizer step of {per_device} x {accumulation} sequences on {world_size} ranks is more than \
                 {MOST_SEQUENCES}"
            ),
            "lower one of them",
        );
    }
}

pub(super) fn build_model(raw: &RawConfig) -> ModelSettings {
    // What is no template's text is where to find one.
    let (chat_template, named) = match raw.chat_template.value() {
        Some(text) if text.contains(['{', '\n']) => (Some(text.clone()), None),
        named => (None, named.as_ref().map(PathBuf::from)),
    };
    let chat_template_path = raw.chat_template_path.value().clone().or(named);
    ModelSettings {
        model_name_or_path: home::expand(raw.model_name_or_path.value()),
        model_revision: raw.model_revision.value().clone(),
        tokenizer_name_or_path: raw.tokenizer_name_or_path.value().as_deref().map(home::expand),
        chat_template,
        chat_template_path,
        eos_token: raw.eos_token.value().clone(),
        init_random: *raw.init_random.value(),
        dtype: *raw.dtype.value(),
        quantization: raw.load_in_4bit.value().then(|| Quantization {
            quant_type: *raw.bnb_4bit_quant_type.value(),
            double_quant: *raw.use_bnb_nested_quant.value(),
        }),
        lora: raw.use_peft.value().then(|| LoraSettings {
            r: *raw.lora_r.value(),
            alpha: *raw.lora_alpha.value(),
            dropout: if *raw.disable_dropout.value() { 0.0 } else { *raw.lora_dropout.value() },
            target_modules: raw.lora_target_modules.value().0.clone(),
            modules_to_save: raw.lora_modules_to_save.value().0.clone(),
            use_rslora: *raw.use_rslora.value(),
            use_dora: *raw.use_dora.value(),
        }),
        adapter_name_or_path: raw.adapter_name_or_path.value().clone(),
    }
}

/// `text_field` is the one data key that GRPO lacks: it reads prompts.
pub(super) fn build_data(raw: &RawConfig) -> DataSettings {
    DataSettings {
        dataset_name: raw.dataset_name.known().and_then(Option::as_deref).map(home::expand).unwrap_or_default(),
        mixture: build_mixture(raw),
        dataset_config: raw.dataset_config.value().clone(),
        dataset_revision: raw.dataset_revision.value().clone(),
        dataset_train_split: raw.dataset_train_split.value().clone(),
        dataset_test_split: raw.dataset_test_split.value().clone(),
        dataset_text_field: raw.dataset_text_field.value().clone(),
        dataset_prompt_column: raw.dataset_prompt_column.value().clone(),
        dataset_columns: columns(raw),
        eval_fraction: *raw.eval_fraction.value(),
        max_train_samples: *raw.max_train_samples.value(),
        max_eval_samples: *raw.max_eval_samples.value(),
        preprocessed: raw.preprocessed.value().clone(),
        chat_template_kwargs: raw.chat_template_kwargs.value().clone(),
        system_prompt: raw.system_prompt.value().clone(),
    }
}

/// Columns to rename, old to new; a value that is no name was reported.
fn columns(raw: &RawConfig) -> Vec<(String, String)> {
    let names = raw.dataset_columns.value().iter();
    names.filter_map(|(old, new)| Some((old.clone(), new.as_str()?.to_string()))).collect()
}

/// Parts with `~` in their paths spelled out.
fn at_home(parts: &[MixturePart]) -> Vec<MixturePart> {
    parts.iter().map(|part| MixturePart { path: home::expand(&part.path), ..part.clone() }).collect()
}

fn build_mixture(raw: &RawConfig) -> Option<MixtureSettings> {
    let (mixture, datasets) = (raw.dataset_mixture.value(), raw.datasets.value());
    if !mixture.parts.is_empty() {
        return Some(MixtureSettings {
            parts: at_home(&mixture.parts),
            seed: mixture.seed,
            is_shuffled: true,
            test_split_size: mixture.test_split_size,
            text: ("dataset_mixture", emit::json(&mixture.text.clone().into())),
        });
    }
    (!datasets.parts.is_empty()).then(|| MixtureSettings {
        parts: at_home(&datasets.parts),
        seed: *raw.seed.value(),
        is_shuffled: false,
        test_split_size: *raw.test_split_size.value(),
        text: ("datasets", emit::json(&datasets.text.clone().into())),
    })
}

/// Which of the keys that name data are given together and should not be.
fn check_data(raw: &RawConfig, problems: &mut Problems) {
    let (mixture, datasets) = (&raw.dataset_mixture, &raw.datasets);
    let has_mixture = mixture.known().is_some_and(|m| !m.parts.is_empty());
    let has_datasets = datasets.known().is_some_and(|d| !d.parts.is_empty());
    let (key, field): (&str, &dyn Named) =
        if has_mixture { ("dataset_mixture", mixture) } else { ("datasets", datasets) };
    if has_mixture && has_datasets {
        problems.clash(
            &[(mixture, "one mixture".into()), (datasets, "another".into())],
            "`dataset_mixture` and `datasets` both name a mixture",
            "remove one of the two",
        );
    }
    let has_name = raw.dataset_name.known().is_some_and(Option::is_some);
    if !has_mixture && !has_datasets && !has_name && raw.dataset_name.is_given() {
        problems.clash(
            &[(&raw.dataset_name, "no data set".into())],
            "`dataset_name` is null, and there is no mixture",
            "name a file, a folder or a hub id, or several in `datasets`",
        );
    }
    if (has_mixture || has_datasets) && has_name {
        problems.clash(
            &[(&raw.dataset_name, "one data set".into()), (field, "a mixture".into())],
            format!("`dataset_name` and `{key}` both say what to train on"),
            format!("remove `{key}`, or make `dataset_name` one of its data sets"),
        );
    }
    if (has_mixture || has_datasets) && raw.dataset_config.is_given() && raw.dataset_config.is_changed() {
        problems.clash(
            &[(&raw.dataset_config, "for `dataset_name`".into()), (field, "a mixture".into())],
            format!("`dataset_config` belongs to `dataset_name`, and `{key}` says what to train on"),
            "give the data set of the mixture its own `config`",
        );
    }
    warn_idle(
        problems,
        &raw.test_split_size,
        raw.test_split_size.is_changed() && !has_datasets,
        if has_mixture { "it belongs into `dataset_mixture`" } else { "there is no mixture (`datasets`)" },
        "use `eval_fraction`",
    );
    for field in [&raw.dataset_train_split, &raw.dataset_test_split, &raw.dataset_revision] {
        let is_idle = (has_mixture || has_datasets) && field.is_changed();
        let reason = format!("`{key}` says what to read");
        warn_idle(problems, field, is_idle, &reason, "give the data sets of the mixture their own");
    }
    let sizes = [raw.test_split_size.known().copied().flatten(), mixture.known().and_then(|m| m.test_split_size)];
    for size in sizes.into_iter().flatten().filter(|size| *size >= 1.0 && size.fract() != 0.0 || *size <= 0.0) {
        problems.clash(
            &[(field, "of this".into())],
            format!("`test_split_size: {size}` is neither a share of rows nor a number of them"),
            "give a share between 0 and 1, or a whole number",
        );
    }
    if let Some(columns) = raw.dataset_columns.known() {
        for (old, new) in columns.iter().filter(|(_, new)| new.as_str().is_none_or(str::is_empty)) {
            problems.clash(
                &[(&raw.dataset_columns, String::new())],
                format!("`dataset_columns` gives `{old}` the name {new}, which is none"),
                "write `{old: new}`",
            );
        }
    }
}

pub(super) fn build_training(raw: &RawConfig, context: &Context<'_>, ranks: RankSettings) -> TrainingSettings {
    let device = if *raw.use_cpu.value() { DeviceChoice::Cpu } else { *raw.device.value() };
    let (has_bf16, is_fp16) = (context.has_bf16 && device != DeviceChoice::Cpu, *raw.fp16.value());
    let precision = match raw.bf16.value() {
        _ if is_fp16 => Precision::Fp16,
        Some(true) => Precision::Bf16,
        None if has_bf16 => Precision::Bf16,
        _ => Precision::No,
    };
    let logging_steps = *raw.logging_steps.value();
    let eval_steps = raw.eval_steps.value().0.unwrap_or(logging_steps);
    let output_dir = raw.output_dir.value().clone().unwrap_or_else(|| "trainer_output".into());
    let seed = *raw.seed.value();
    TrainingSettings {
        output_dir,
        resume_from_checkpoint: raw.resume_from_checkpoint.value().clone(),
        overwrite_output_dir: *raw.overwrite_output_dir.value(),
        seed,
        data_seed: raw.data_seed.value().unwrap_or(seed),
        device,
        device_memory_limit: raw.device_memory_limit.value().map(|limit| limit.0),
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
            kind: services::optimizer(raw, context),
            weight_decay: *raw.weight_decay.value(),
            adam_beta1: *raw.adam_beta1.value(),
            adam_beta2: *raw.adam_beta2.value(),
            adam_epsilon: *raw.adam_epsilon.value(),
        },
        max_grad_norm: *raw.max_grad_norm.value(),
        neftune_noise_alpha: raw.neftune_noise_alpha.value().filter(|&alpha| alpha > 0.0),
        logging_strategy: interval(*raw.logging_strategy.value(), logging_steps),
        logging_first_step: *raw.logging_first_step.value(),
        eval_strategy: interval(*raw.eval_strategy.value(), eval_steps),
        eval_on_start: *raw.eval_on_start.value(),
        eval_delay: *raw.eval_delay.value(),
        save_strategy: match *raw.save_strategy.value() {
            Saving::At(recurrence) => interval(recurrence, *raw.save_steps.value()),
            Saving::Best => Interval::Best,
        },
        save_total_limit: raw.save_total_limit.value().0,
        save_only_model: *raw.save_only_model.value(),
        best: best::build(raw),
        resume_with_changed_inputs: *raw.resume_with_changed_inputs.value(),
        report_to: raw.report_to.value().sinks.clone(),
        disable_tqdm: raw.disable_tqdm.value().unwrap_or(false),
        hub: HubSettings {
            push_to_hub: *raw.push_to_hub.value(),
            model_id: raw.hub_model_id.value().clone(),
            revision: raw.hub_revision.value().clone(),
            is_private: *raw.hub_private_repo.value(),
        },
        ranks,
    }
}

fn interval(recurrence: Recurrence, cadence: Cadence) -> Interval {
    match (recurrence, cadence) {
        (Recurrence::No, _) => Interval::No,
        (Recurrence::Steps, Cadence::Steps(steps)) => Interval::Steps(steps),
        (Recurrence::Steps, Cadence::Share(share)) => Interval::Share(share),
        (Recurrence::Epoch, _) => Interval::Epoch,
    }
}

/// Checks and builds the settings of `trainer sft`; `None` if anything was reported.
pub(super) fn sft(raw: &RawConfig, context: &Context<'_>, problems: &mut Problems) -> Option<SftSettings> {
    let ranks = check_shared(raw, context, problems);
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
    let is_idle = !packing && !eval_packing && raw.packing_strategy.value().strategy != PackingStrategy::Bfd;
    warn_idle(problems, &raw.packing_strategy, is_idle, "`packing` is false", "add `packing: true`");
    if raw.packing_strategy.value().is_old_name {
        problems.caution(
            &[(&raw.packing_strategy, String::new())],
            "`packing_strategy: ffd` is called `bfd` and is read as that",
            "TRL renamed it in 0.19",
        );
    }
    let reason = if packing { "under `packing` the strategy says what is cut" } else { "`max_length` is null" };
    let is_idle = raw.truncation_mode.is_changed() && (packing || max_length.is_none());
    warn_idle(problems, &raw.truncation_mode, is_idle, reason, "remove it");
    let smoothing = *raw.label_smoothing_factor.value();
    if smoothing > 0.0 && *raw.sft_loss_type.value() == SftLossType::Dft {
        problems.clash(
            &[(&raw.label_smoothing_factor, "smooths".into()), (&raw.sft_loss_type, "has its own weights".into())],
            "`label_smoothing_factor` does not go with `loss_type: dft`, which weights each target by its probability",
            "use `loss_type: nll`, or remove `label_smoothing_factor`",
        );
    }
    problems.is_clean().then(|| SftSettings {
        model: build_model(raw),
        data: build_data(raw),
        training: build_training(raw, context, ranks),
        max_length,
        truncation_mode: *raw.truncation_mode.value(),
        packing,
        packing_strategy: raw.packing_strategy.value().strategy,
        eval_packing,
        dataloader_drop_last: *raw.dataloader_drop_last.value(),
        completion_only_loss: *raw.completion_only_loss.value(),
        assistant_only_loss: *raw.assistant_only_loss.value(),
        loss_type: *raw.sft_loss_type.value(),
        label_smoothing_factor: smoothing,
    })
}
