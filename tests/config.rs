//! Config files through the public door: what they become, what is said about wrong ones, and that nothing is lost.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use trainer::config::settings::{
    AdaptiveEntropy, DataSettings, DeviceChoice, GrpoLossType, GrpoSettings, HubSettings, Interval, LrSchedulerType,
    MixturePart, ModelSettings, ModuleSet, OptimizerKind, OptimizerSettings, PackingStrategy, Precision, QuantType,
    Quantization, RankSettings, ReportTo, Resume, RewardSpec, RolloutCorrection, RolloutCorrectionMode,
    SamplingSettings, ScaleRewards, SftLossType, SftSettings, Share, TrainingSettings, TruncationMode, VespoSettings,
    Warmup, WeightDtype,
};
use trainer::config::{self, Command, ConfigError, Context, DefaultValue, FOREIGN_KEYS, Loaded, Rule, Source};

#[path = "config_cases/ranks.rs"]
mod ranks;

const SFT: &str = "model_name_or_path: data/tiny-qwen\ndataset_name: data/arithmetic/sft.jsonl\n";
const GRPO: &str =
    "model_name_or_path: data/tiny-qwen\ndataset_name: data/arithmetic/train.jsonl\nreward_funcs: [accuracy]\n";

fn sft_with(lines: &str, overrides: &[&str]) -> Result<Loaded<SftSettings>, ConfigError> {
    let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
    config::load_sft(&Source::new("sft.yaml", format!("{SFT}{lines}")), &overrides, &Context::default())
}

fn grpo_with(lines: &str, overrides: &[&str]) -> Result<Loaded<GrpoSettings>, ConfigError> {
    let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
    config::load_grpo(&Source::new("grpo.yaml", format!("{GRPO}{lines}")), &overrides, &Context::default())
}

fn sft(lines: &str) -> SftSettings {
    sft_with(lines, &[]).unwrap_or_else(|error| panic!("{error}")).settings
}

fn grpo(lines: &str) -> GrpoSettings {
    grpo_with(lines, &[]).unwrap_or_else(|error| panic!("{error}")).settings
}

/// The messages about a GRPO config that is wrong.
fn grpo_errors(lines: &str) -> Vec<String> {
    let error = grpo_with(lines, &[]).expect_err(lines);
    error.messages().map(str::to_owned).collect()
}

fn sft_errors(lines: &str) -> Vec<String> {
    let error = sft_with(lines, &[]).expect_err(lines);
    error.messages().map(str::to_owned).collect()
}

fn assert_one(messages: &[String], part: &str) {
    assert!(messages.len() == 1 && messages[0].contains(part), "expected one message with {part:?}, got {messages:#?}");
}

// ---- what a file becomes ----

#[test]
fn sft_defaults_are_those_of_trl() {
    let settings = sft("");
    let expected = SftSettings {
        model: ModelSettings {
            model_name_or_path: "data/tiny-qwen".into(),
            model_revision: "main".into(),
            tokenizer_name_or_path: None,
            chat_template: None,
            chat_template_path: None,
            eos_token: None,
            init_random: false,
            dtype: WeightDtype::Auto, // TRL: float32
            quantization: None,
            lora: None,
            adapter_name_or_path: None,
        },
        data: DataSettings {
            dataset_name: "data/arithmetic/sft.jsonl".into(),
            mixture: None,
            dataset_config: None,
            dataset_revision: "main".into(),
            dataset_train_split: "train".into(),
            dataset_test_split: "test".into(),
            dataset_text_field: "text".into(),
            dataset_prompt_column: None,
            dataset_columns: Vec::new(),
            eval_fraction: None,
            max_train_samples: None,
            max_eval_samples: None,
            preprocessed: None,
            chat_template_kwargs: serde_json::Map::new(),
            system_prompt: None,
        },
        training: TrainingSettings {
            output_dir: "trainer_output".into(),
            resume_from_checkpoint: Resume::No,
            overwrite_output_dir: false,
            seed: 42,
            data_seed: 42,
            device: DeviceChoice::Auto,
            device_memory_limit: None,
            precision: Precision::No, // TRL: bf16, which the default context does not have
            per_device_train_batch_size: 8,
            per_device_eval_batch_size: 8,
            gradient_accumulation_steps: 1,
            num_train_epochs: 3.0,
            max_steps: None,
            gradient_checkpointing: true,
            activation_offloading: false,
            full_determinism: false,
            gradient_checkpointing_layers: None,
            learning_rate: 2e-5,
            lr_scheduler_type: LrSchedulerType::Linear,
            lr_scheduler_kwargs: serde_json::Map::new(),
            warmup: Warmup::Steps(0),
            optimizer: OptimizerSettings {
                kind: OptimizerKind::AdamW,
                weight_decay: 0.0,
                adam_beta1: 0.9,
                adam_beta2: 0.999,
                adam_epsilon: 1e-8,
            },
            max_grad_norm: 1.0,
            neftune_noise_alpha: None,
            logging_strategy: Interval::Steps(10),
            logging_first_step: false,
            eval_strategy: Interval::No,
            eval_on_start: false,
            eval_delay: 0.0,
            save_strategy: Interval::Steps(500),
            save_total_limit: None,
            save_only_model: false,
            best: None,
            resume_with_changed_inputs: false,
            report_to: vec![],
            disable_tqdm: false,
            hub: HubSettings::default(),
            ranks: RankSettings::default(),
        },
        max_length: Some(1024),
        truncation_mode: TruncationMode::KeepStart,
        packing: false,
        packing_strategy: PackingStrategy::Bfd,
        eval_packing: false,
        dataloader_drop_last: false,
        completion_only_loss: None,
        assistant_only_loss: false,
        loss_type: SftLossType::Nll,
        label_smoothing_factor: 0.0,
    };
    assert_eq!(settings, expected);
}

#[test]
fn grpo_defaults_are_those_of_trl() {
    let settings = grpo("");
    assert_eq!(settings.training.learning_rate.to_bits(), 1e-6f64.to_bits());
    assert_eq!(settings.num_generations, 8);
    assert_eq!(settings.num_generations_eval, 8);
    assert_eq!(settings.max_completion_length, Some(512));
    assert_eq!(settings.loss_type, GrpoLossType::Dapo);
    assert_eq!((settings.beta, settings.epsilon, settings.epsilon_high, settings.delta), (0.0, 0.2, 0.2, None));
    assert!(settings.use_bias_correction_kl);
    assert_eq!(settings.scale_rewards, ScaleRewards::Group);
    assert_eq!((settings.steps_per_generation, settings.generation_batch_size, settings.num_iterations), (1, 8, 1));
    assert_eq!(settings.sampling, SamplingSettings::default());
    assert_eq!((settings.sapo_temperature_neg, settings.sapo_temperature_pos), (1.05, 1.0));
    assert_eq!(settings.vespo, VespoSettings { k_pos: 2.0, lambda_pos: 3.0, k_neg: 3.0, lambda_neg: 2.0 });
    assert_eq!(settings.rollout_importance_sampling, None);
    assert_eq!((settings.ref_model_mixup_alpha, settings.ref_model_sync_steps), (0.6, 512));
    assert!(settings.shuffle_dataset);
    assert_eq!(settings.reward_weights, [1.0]);
}

#[test]
fn a_qlora_file_in_trl_style_is_understood() {
    let settings =
        sft("torch_dtype: bfloat16\nload_in_4bit: true\nbnb_4bit_quant_type: nf4\nbnb_4bit_use_double_quant: yes\n\
         use_peft: true\n\
         lora_r: \"8\"\nlora_alpha: 16\nlora_target_modules: all-linear\nlearning_rate: 1e-5\nwarmup_ratio: 0.1\n\
         eval_strategy: no\nsave_strategy: epoch\nreport_to: none\nfp16: true\nmax_length: null\n\
         optim: adamw_torch_fused\n");
    assert_eq!(settings.model.dtype, WeightDtype::Bfloat16);
    assert_eq!(settings.model.quantization, Some(Quantization { quant_type: QuantType::Nf4, double_quant: true }));
    let lora = settings.model.lora.expect("use_peft is true");
    assert_eq!((lora.r, lora.alpha, lora.dropout), (8, 16.0, 0.05));
    assert!(matches!(lora.target_modules, ModuleSet::Names(names) if names.len() == 7));
    assert_eq!(settings.training.learning_rate.to_bits(), 1e-5f64.to_bits());
    assert_eq!(settings.training.warmup, Warmup::Ratio(0.1));
    assert_eq!(settings.training.eval_strategy, Interval::No);
    assert_eq!(settings.training.save_strategy, Interval::Epoch);
    assert_eq!(settings.training.precision, Precision::Fp16);
    assert_eq!(settings.max_length, None);
}

#[test]
fn what_is_not_given_is_worked_out() {
    let settings = grpo(
        "per_device_train_batch_size: 4\ngradient_accumulation_steps: 6\nnum_generations: 4\nepsilon: 0.3\nseed: 7\n\
         eval_strategy: steps\nlogging_steps: 3\nwarmup_steps: 0.25\n",
    );
    assert_eq!((settings.steps_per_generation, settings.generation_batch_size), (6, 24));
    assert_eq!(settings.epsilon_high.to_bits(), 0.3f64.to_bits());
    assert_eq!(settings.training.data_seed, 7);
    assert_eq!(settings.training.eval_strategy, Interval::Steps(3));
    assert_eq!(settings.training.warmup, Warmup::Ratio(0.25));
    let settings = grpo("generation_batch_size: 32\n");
    assert_eq!((settings.steps_per_generation, settings.generation_batch_size), (4, 32));
    assert!(sft("packing: true\n").eval_packing);
}

#[test]
fn ranks_and_the_device_take_part() {
    let source = Source::new("grpo.yaml", GRPO);
    let two = Context { launched: Some(2), has_bf16: true, ..Context::default() };
    let settings = config::load_grpo(&source, &[], &two).unwrap_or_else(|error| panic!("{error}")).settings;
    assert_eq!(settings.generation_batch_size, 16);
    assert_eq!(settings.training.precision, Precision::Bf16);
    let on_cpu = config::load_grpo(&source, &["device=cpu".into()], &two).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(on_cpu.settings.training.precision, Precision::No);
    assert_eq!(sft("bf16: true\n").training.precision, Precision::Bf16);
    assert_eq!(sft("use_cpu: true\n").training.device, DeviceChoice::Cpu);
}

#[test]
fn what_changes_a_training_pass_is_read_and_clashes_are_named() {
    let settings = sft("use_peft: true\nlora_dropout: 0.0\nlora_modules_to_save: lm_head\n\
         lora_target_modules: null\nuse_dora: true\nneftune_noise_alpha: 5\nlabel_smoothing_factor: 0.1\n\
         truncation_mode: keep_end\n");
    let lora = settings.model.lora.expect("use_peft is true");
    assert_eq!((lora.dropout, lora.modules_to_save, lora.use_dora), (0.0, vec!["lm_head".to_owned()], true));
    assert_eq!(lora.target_modules, ModuleSet::Names(vec!["q_proj".into(), "v_proj".into()]));
    assert_eq!(settings.training.neftune_noise_alpha, Some(5.0));
    assert_eq!((settings.label_smoothing_factor, settings.truncation_mode), (0.1, TruncationMode::KeepEnd));
    assert_eq!(sft("neftune_noise_alpha: 0\n").training.neftune_noise_alpha, None);
    assert_one(&sft_errors("label_smoothing_factor: 0.1\nloss_type: dft\n"), "`loss_type: dft`");
    let warned = |lines: &str| sft_with(lines, &[]).unwrap_or_else(|error| panic!("{error}")).warnings;
    assert_one(&warned("truncation_mode: keep_end\npacking: true\n"), "truncation_mode");
    assert_one(&warned("lora_modules_to_save: [lm_head]\n"), "use_peft");

    let settings = grpo(
        "top_entropy_quantile: 0\nuse_adaptive_entropy: true\nentropy_target: 0.3\nuse_vllm: true\n\
         vllm_importance_sampling_clip_max: null\nlabel_smoothing_factor: 0.0\n",
    );
    assert_eq!(settings.top_entropy_quantile.to_bits(), 0f64.to_bits());
    let adaptive = AdaptiveEntropy { coef_min: 0.0, coef_max: 1.0, coef_delta: 0.005, target: 0.3 };
    assert_eq!(settings.adaptive_entropy, Some(adaptive));
    assert_eq!(settings.rollout_importance_sampling.expect("use_vllm").clip_max, None);
    assert_eq!(grpo("entropy_coef: 0.1\n").adaptive_entropy, None);
    assert_one(&grpo_errors("use_adaptive_entropy: true\nentropy_coef_min: 2\n"), "`entropy_coef_max`");
    assert_one(
        &grpo_errors(
            "use_vllm: true\nvllm_importance_sampling_mode: token_truncate\n\
             vllm_importance_sampling_clip_max: null\n",
        ),
        "vllm_importance_sampling_mode",
    );
    let warned = grpo_with("label_smoothing_factor: 0.1\nentropy_target: 0.5\n", &[]).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(warned.warnings.len(), 2, "{:?}", warned.warnings);
}

#[test]
fn vllm_decides_the_default_of_the_correction() {
    let sequence_mask =
        RolloutCorrection { mode: RolloutCorrectionMode::SequenceMask, clip_max: Some(3.0), clip_min: None };
    assert_eq!(grpo("use_vllm: true\n").rollout_importance_sampling, Some(sequence_mask));
    assert_eq!(grpo("use_vllm: false\n").rollout_importance_sampling, None);
    // As TRL writes it down when it was never asked for.
    let dumped = grpo_with("use_vllm: false\nvllm_importance_sampling_correction: true\n", &[]);
    let dumped = dumped.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(dumped.settings.rollout_importance_sampling, None);
    assert!(dumped.warnings.iter().any(|warning| warning.contains("TRL makes no correction")), "{:?}", dumped.warnings);
    assert_eq!(grpo("vllm_importance_sampling_correction: true\n").rollout_importance_sampling, Some(sequence_mask));
    let off = grpo("use_vllm: true\nvllm_importance_sampling_correction: false\n");
    assert_eq!(off.rollout_importance_sampling, None);
}

#[test]
fn rewards_keep_their_order_and_weights() {
    let settings = sft_free_grpo(
        "reward_funcs:\n  - accuracy\n  - command: python3 style.py\n  - {kind: length_penalty, soft: 10}\n\
         reward_weights: [1, 0.5, 2e-1]\n",
    );
    assert_eq!(settings.reward_weights, [1.0, 0.5, 0.2]);
    assert!(
        matches!(&settings.reward_funcs[1], RewardSpec::Command { name, timeout_secs: 60.0, .. } if name == "style")
    );
    assert!(matches!(&settings.reward_funcs[2], RewardSpec::Builtin { parameters, .. } if parameters["soft"] == 10));
}

fn sft_free_grpo(rewards: &str) -> GrpoSettings {
    let text = format!("model_name_or_path: m\ndataset_name: d\n{rewards}");
    config::load_grpo(&Source::new("grpo.yaml", text), &[], &Context::default())
        .unwrap_or_else(|error| panic!("{error}"))
        .settings
}

// ---- overrides ----

#[test]
fn overrides_replace_what_the_file_says() {
    let loaded = sft_with(
        "torch_dtype: nonsense\nlearning_rate: x\n",
        &["dtype=float16", "learning_rate = 2e-6", "seed=1", "seed=2"],
    )
    .unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(loaded.settings.model.dtype, WeightDtype::Float16);
    assert_eq!(loaded.settings.training.learning_rate.to_bits(), 2e-6f64.to_bits());
    assert_eq!(loaded.settings.training.seed, 2);
    assert!(loaded.resolved_yaml.contains("# --set seed=2\n"));
    let loaded = grpo_with(
        "",
        &[
            "reward_funcs=[{kind: command, command: [a, b]}]",
            "lr_scheduler_type=cosine_with_min_lr",
            "lr_scheduler_kwargs={min_lr_rate: 0.1}",
        ],
    )
    .unwrap_or_else(|error| panic!("{error}"));
    assert!(matches!(&loaded.settings.reward_funcs[0], RewardSpec::Command { .. }));
}

#[test]
fn wrong_overrides_show_their_own_text() {
    let error = sft_with(
        "packing: true\n",
        &[
            "max_length=null",
            "seed",
            "learning_rte=1",
            "lora_r=[",
            "warmup_steps=-1",
            "a.b=1",
            "lr_scheduler_kwargs.x=1",
        ],
    )
    .expect_err("seven mistakes");
    insta::assert_snapshot!(error);
}

// ---- what is said about wrong files ----

#[test]
fn everything_is_reported_at_once() {
    let error = config::load_grpo(
        &Source::new(
            "configs/wrong.yaml",
            "model_name_or_path: data/tiny-qwen
dataset_nme: data/arithmetic/train.jsonl
reward_funcs: [rewards.py, accuracy]

num_generations: 3
per_device_train_batch_size: 4
learning_rate: fast
learning_rate: 1e-5
lora_r: 0
use_peft: maybe
max_seq_length: 512
top_p: 1.5
loss_type: dappo
load_in_8bit: true
bf16: true
fp16: true
lora_target_modules: [q_proj, qkv_proj]
packing: true
",
        ),
        &[],
        &Context::default(),
    )
    .expect_err("a dozen mistakes");
    insta::assert_snapshot!(error);
}

#[test]
fn clashes_show_both_values() {
    let error = grpo_with(
        "load_in_4bit: true
warmup_ratio: 0.1
warmup_steps: 10
steps_per_generation: 2
generation_batch_size: 16
eval_strategy: steps
per_device_eval_batch_size: 6
reward_weights: [1, 2]
sync_ref_model: true
vllm_importance_sampling_correction: true
vllm_importance_sampling_clip_min: 4
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr: 1e-7, min_lr_rate: 0.1, minimum: 3}
device: cuda:0
use_cpu: true
",
        &[],
    )
    .expect_err("clashes");
    insta::assert_snapshot!(error);
}

#[test]
fn batches_say_which_numbers_work() {
    let error = grpo_with("num_generations: 8\nper_device_train_batch_size: 3\ngradient_accumulation_steps: 5\n", &[]);
    insta::assert_snapshot!("batch_from_accumulation", error.expect_err("15 is no multiple of 8"));
    let error = grpo_with("num_generations: 8\nper_device_train_batch_size: 4\ngeneration_batch_size: 36\n", &[]);
    insta::assert_snapshot!("batch_in_groups", error.expect_err("36 is no multiple of 8"));
    let error = grpo_with("num_generations: 8\nper_device_train_batch_size: 4\ngeneration_batch_size: 42\n", &[]);
    insta::assert_snapshot!("batch_in_micro_batches", error.expect_err("42 is no multiple of 4"));
}

#[test]
fn text_that_is_not_a_map_of_keys() {
    let read = |text: &str| {
        let source = Source::new("broken.yaml", text);
        config::load_sft(&source, &[], &Context::default()).expect_err("not a config")
    };
    insta::assert_snapshot!("not_yaml", read("model_name_or_path: a\ndataset_name: [1, 2\nseed: 3\n"));
    insta::assert_snapshot!("not_a_map", read("- a\n- b\n"));
    insta::assert_snapshot!("empty", read(""));
    insta::assert_snapshot!("tabs", read("model_name_or_path: a\n\tdataset_name: b\n"));
}

#[test]
fn line_ends_and_byte_order_marks_do_not_move_the_caret() {
    for text in ["seed: 1\r\nné: 2\r\n", "\u{feff}seed: 1\nné: 2\n", "seed: 1\nné: 2"] {
        let error = config::load_sft(&Source::new("a.yaml", text), &[], &Context::default()).expect_err(text);
        let report = error.to_string();
        assert!(report.contains("[a.yaml:2:1]") && report.contains("2 │ né: 2\n   · ─┬"), "{report}");
    }
}

#[test]
fn files_that_cannot_be_read() {
    let error = Source::read(Path::new("configs/no-such-file.yaml")).expect_err("no such file");
    insta::assert_snapshot!("no_such_file", error);
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("latin1.yaml");
    std::fs::write(&path, b"a: \xe9\n").expect("a file in it");
    let error = Source::read(&path).expect_err("not UTF-8");
    assert!(error.to_string().contains("byte 3"), "{error}");
}

#[test]
fn colours_are_a_choice() {
    let error = sft_with("sed: 1\n", &[]).expect_err("unknown key");
    assert!(error.render(true).contains('\u{1b}'));
    assert!(!error.render(false).contains('\u{1b}'));
    assert_eq!(error.count(), 1);
}

#[test]
fn a_broken_value_is_reported_once() {
    // The batch does not divide by the default group size, but the group size is what is broken.
    assert_one(&grpo_errors("num_generations: many\nper_device_train_batch_size: 3\n"), "expects an integer");
    assert_one(&grpo_errors("num_generations: 1\n"), "at least 2");
    assert_one(&grpo_errors("fp16: maybe\nbf16: true\n"), "true or false");
    assert_eq!(grpo_errors("reward_weights: [1, 2]\nnum_iterations: 0\n").len(), 2);
}

#[test]
fn each_check_across_keys() {
    for (lines, part) in [
        ("load_in_4bit: true\n", "needs `use_peft: true`"),
        ("adapter_name_or_path: out\n", "`use_peft` is false"),
        ("bf16: true\nfp16: true\n", "exclude each other"),
        ("use_cpu: true\ndevice: cuda\n", "two devices"),
        ("warmup_steps: 2.5\n", "whole number of steps"),
        ("warmup_steps: 5\nwarmup_ratio: 0.1\n", "how long the warm-up"),
        ("lr_scheduler_kwargs: {x: 1}\n", "does not take"),
        ("lr_scheduler_type: polynomial\nlearning_rate: 1e-8\n", "lr_end"),
        ("lr_scheduler_type: polynomial\nlr_scheduler_kwargs: {power: two}\n", "power"),
        ("lr_scheduler_type: cosine_with_min_lr\n", "neither"),
        ("lr_scheduler_type: warmup_stable_decay\n", "num_decay_steps"),
        ("packing: true\nmax_length: ~\n", "needs `max_length`"),
        ("eval_packing: true\nmax_length: ~\n", "needs `max_length`"),
        ("dtype: float32\ntorch_dtype: float16\n", "same key"),
        ("max_length: 512\nmax_seq_length: 256\n", "same key"),
        ("max_seq_length: 512\nmax_seq_len: 256\n", "same key"),
        ("seed: 1\nseed: 1\n", "twice"),
        ("num_generations: 4\n", "`trainer grpo`"),
        ("use_vllm: true\n", "`trainer grpo`"),
        ("load_in_8bit: true\n", "not supported"),
        ("deepspeed: no-such-file.json\n", "cannot be read"),
        ("batch_size: 5\n", "called `per_device_train_batch_size`"),
        ("max_seq_length: x\n", "expects an integer"),
        ("max_new_tokens: 5\n", "called `max_completion_length`, a key of `trainer grpo`"),
        ("optim: sgd\n", "does not know `sgd`"),
        ("max_steps: 0\n", "at least 1"),
        ("logging_steps: 0\n", "at least 1"),
        ("logging_steps: 1.5\n", "a share below 1"),
        ("save_steps: 0\n", "at least 1"),
        ("max_grad_norm: -1\n", "at least 0"),
        ("num_train_epochs: 0\n", "greater than 0"),
        ("lora_dropout: 1\nuse_peft: true\n", "less than 1"),
        ("eval_fraction: 1\n", "less than 1"),
        ("adam_beta1: 1.0\n", "less than 1"),
    ] {
        assert_one(&sft_errors(lines), part);
    }
    for (lines, part) in [
        ("steps_per_generation: 1\ngeneration_batch_size: 8\n", "both say"),
        ("per_device_train_batch_size: 6\n", "does not divide into groups"),
        ("generation_batch_size: 12\n", "micro-batches"),
        ("eval_strategy: steps\nper_device_eval_batch_size: 3\n", "evaluation batch"),
        ("eval_strategy: steps\nnum_generations_eval: 3\n", "evaluation batch"),
        ("reward_weights: [1, 2]\n", "2 weights for 1 reward function"),
        ("sync_ref_model: true\n", "nothing to move"),
        ("sync_ref_model: true\nbeta: 0.1\nuse_peft: true\n", "never moves"),
        ("vllm_importance_sampling_correction: true\nloss_type: vespo\n", "does not go with"),
        ("temperature: 0\n", "greater than 0"),
        ("top_p: 0\n", "greater than 0 and at most 1"),
        ("max_completion_length: null\nloss_type: dr_grpo\n", "there is none"),
        (
            "vllm_importance_sampling_correction: true\nvllm_importance_sampling_mode: token_truncate\n\
             vllm_importance_sampling_clip_max: null\n",
            "needs a bound",
        ),
        ("generation_kwargs: {num_beam: 2}\n", "holds `num_beam`"),
        ("generation_kwargs: {num_beams: 2}\n", "`generation_kwargs.num_beams`"),
        ("generation_kwargs: greedy\n", "expects a map"),
        ("generation_kwargs: {top_p: 7}\n", "`top_p` must be"),
        ("epsilon: 1.5\n", "at most 1"),
        ("beta: -0.1\n", "at least 0"),
        ("top_k: -2\n", "must be a count"),
        ("packing: true\n", "`trainer sft`"),
        ("max_length: 5\n", "`trainer sft`"),
    ] {
        assert_one(&grpo_errors(lines), part);
    }
}

#[test]
fn the_reward_room_checks_built_ins() {
    fn check(spec: &RewardSpec) -> Result<(), String> {
        match spec {
            RewardSpec::Builtin { name, parameters } if name == "accuracy" => match parameters.keys().next() {
                Some(key) => Err(format!("`accuracy` has no parameter `{key}`")),
                None => Ok(()),
            },
            RewardSpec::Builtin { name, .. } => Err(format!("there is no built-in reward `{name}`")),
            RewardSpec::Python { .. } => Ok(()),
            RewardSpec::Command { .. } => Err("programs are not given to the check".into()),
        }
    }
    let context = Context { check_reward: Some(check), ..Context::default() };
    let text = "model_name_or_path: m\ndataset_name: d\nreward_funcs:\n  - {kind: accuracy, strict: true}\n\
                \x20 - acuracy\n\x20 - command: ./grade\n";
    let error = config::load_grpo(&Source::new("grpo.yaml", text), &[], &context).expect_err("two wrong rewards");
    insta::assert_snapshot!(error);
}

// ---- warnings ----

#[test]
fn warnings_name_the_key_and_the_reason() {
    let loaded = grpo_with(
        "use_vllm: true
vllm_gpu_memory_utilization: 0.3
dataloader_num_workers: 4
attn_implementation: flash_attention_2
lora_r: 8
bnb_4bit_compute_dtype: float16
gradient_checkpointing_kwargs: {use_reentrant: false}
loss_type: cispo
max_steps: 5
num_train_epochs: 2
push_to_hub: false
use_dora: no
lora_bias: none
eval_steps: 5
",
        &["save_strategy=epoch", "save_steps=3"],
    )
    .unwrap_or_else(|error| panic!("{error}"));
    insta::assert_snapshot!(loaded.warnings.join("\n"));
}

#[test]
fn values_that_ask_for_nothing_are_accepted() {
    for key in FOREIGN_KEYS {
        let load = |text: &str| {
            let line = [format!("{}={text}", key.name)];
            if key.commands.include(Command::Sft) {
                config::load_sft(&Source::new("sft.yaml", SFT), &line, &Context::default())
                    .map(|loaded| loaded.warnings)
            } else {
                config::load_grpo(&Source::new("grpo.yaml", GRPO), &line, &Context::default())
                    .map(|loaded| loaded.warnings)
            }
        };
        match key.rule {
            Rule::NoEffect(_) => {
                let warnings = load("true").unwrap_or_else(|error| panic!("{error}"));
                assert!(warnings.len() == 1 && warnings[0].contains(key.name), "{}: {warnings:?}", key.name);
            }
            Rule::Lacking { off, .. } => {
                for text in off.iter().chain(&["null"]) {
                    assert_eq!(
                        load(text).unwrap_or_else(|error| panic!("{error}")),
                        Vec::<String>::new(),
                        "{}",
                        key.name
                    );
                }
                let error = load("[something, else]").expect_err(key.name);
                assert_eq!(error.count(), 1, "{error}");
            }
            Rule::Ambiguous(_) => assert_eq!(load("1").expect_err(key.name).count(), 1),
            Rule::Renamed(_) | Rule::Alias(_) => {
                assert!(load("[{}]").expect_err(key.name).messages().all(|m| !m.contains("no key")));
                assert_eq!(
                    load("null").unwrap_or_else(|error| panic!("{error}")),
                    Vec::<String>::new(),
                    "{}",
                    key.name
                );
            }
            Rule::Entries(_) => {
                assert_eq!(
                    load("null").unwrap_or_else(|error| panic!("{error}")),
                    Vec::<String>::new(),
                    "{}",
                    key.name
                );
                let error = load("{no_such_entry: 1}").expect_err(key.name);
                assert_eq!(error.count(), 1, "{error}");
            }
        }
    }
}

#[test]
fn the_best_checkpoint_goes_by_the_rules_of_transformers() {
    let evaluated = "eval_strategy: steps\neval_steps: 10\nsave_steps: 20\n";
    for (lines, metric, greater_is_better) in [
        ("load_best_model_at_end: true\n", "eval_loss", false),
        ("load_best_model_at_end: true\nmetric_for_best_model: eval_entropy\n", "eval_entropy", true),
        ("metric_for_best_model: mean_token_accuracy\ngreater_is_better: false\n", "eval_mean_token_accuracy", false),
        ("metric_for_best_model: some_loss\nsave_strategy: best\n", "eval_some_loss", false),
    ] {
        let best = sft(&format!("{evaluated}{lines}")).training.best.expect(lines);
        assert_eq!((best.metric.as_str(), best.greater_is_better), (metric, greater_is_better), "{lines}");
        assert_eq!(best.load_at_end, lines.contains("load_best"), "{lines}");
        assert_eq!(best.early_stopping, None);
    }
    assert_eq!(sft(evaluated).training.best, None);
    let lines = "load_best_model_at_end: true\nearly_stopping_patience: 3\nearly_stopping_threshold: 0.1\n";
    let best = sft(&format!("{evaluated}{lines}")).training.best.expect("a best checkpoint");
    assert_eq!(best.early_stopping.map(|stopping| (stopping.patience, stopping.threshold)), Some((3, 0.1)));

    for (lines, part) in [
        ("load_best_model_at_end: true\n", "there are none (`eval_strategy: no`)"),
        ("save_strategy: best\nmetric_for_best_model: loss\n", "there are none (`eval_strategy: no`)"),
        ("save_strategy: best\neval_strategy: epoch\n", "needs `metric_for_best_model`"),
        ("early_stopping_patience: 2\neval_strategy: epoch\n", "needs `metric_for_best_model`"),
        ("early_stopping_patience: 2\nmetric_for_best_model: loss\n", "there are none (`eval_strategy: no`)"),
        ("load_best_model_at_end: true\neval_strategy: epoch\n", "to be the same"),
        ("load_best_model_at_end: true\neval_strategy: steps\nsave_strategy: epoch\n", "to be the same"),
        (
            "load_best_model_at_end: true\neval_strategy: steps\neval_steps: 20\nsave_steps: 50\n",
            "needs `save_steps` 50 to be a multiple of `eval_steps` 20",
        ),
        ("early_stopping_patience: 0\n", "at least 1"),
        ("save_strategy: better\n", "does not know `better`"),
    ] {
        assert_one(&sft_errors(lines), part);
    }
    for (lines, part) in [
        ("greater_is_better: true\n", "`greater_is_better` has no effect"),
        ("metric_for_best_model: loss\n", "`metric_for_best_model` has no effect"),
        ("early_stopping_threshold: 0.5\n", "`early_stopping_threshold` has no effect"),
        ("eval_strategy: epoch\nmetric_for_best_model: loss\nearly_stopping_patience: 2\n", "leaves its last model"),
    ] {
        assert_one(&sft_with(lines, &[]).expect(lines).warnings, part);
    }
}

/// The keys of transformers 5.24 (`TrainingArguments`) and TRL 1.16 (`ModelConfig`, `ScriptArguments`).
const SHARED_KEYS: &str = "
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules gradient_accumulation_steps average_tokens_across_devices max_grad_norm
    label_smoothing_factor bf16 fp16 bf16_full_eval fp16_full_eval tf32 activation_checkpointing
    activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile
    torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config use_cache neftune_noise_alpha
    torch_empty_cache_steps auto_find_batch_size logging_strategy logging_steps logging_first_step
    log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level log_level_replica
    disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
    eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only eval_on_start
    eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics
    save_only_model save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
    restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu accelerator_config
    parallelism_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
    dataloader_in_order remove_unused_columns label_names train_sampling_strategy length_column_name
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    fsdp fsdp_config deepspeed debug skip_memory_metrics do_train do_eval do_predict resume_from_checkpoint
    local_rank model_name_or_path model_revision dtype attn_implementation use_peft lora_r lora_alpha
    lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save lora_task_type use_rslora
    use_dora load_in_8bit load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage
    dataset_name dataset_config dataset_train_split dataset_test_split dataset_streaming ignore_bias_buffers
    datasets streaming test_split_size
";

/// The further keys of TRL 1.16's `SFTConfig`.
const SFT_KEYS: &str = "
    model_init_kwargs trust_remote_code router_aux_loss_coef chat_template_path dataset_text_field
    dataset_kwargs dataset_num_proc eos_token max_length truncation_mode shuffle_dataset packing
    packing_strategy padding_free pad_to_multiple_of eval_packing completion_only_loss assistant_only_loss
    loss_type activation_offloading pad_token
";

/// The further keys of TRL 1.16's `GRPOConfig` and of its command.
const GRPO_KEYS: &str = "
    model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout cast_lm_head_to_fp32
    num_generations num_generations_eval max_completion_length ds3_gather_for_generation shuffle_dataset
    pad_to_multiple_of generation_batch_size steps_per_generation temperature top_p top_k min_p
    generation_kwargs chat_template_kwargs repetition_penalty cache_implementation use_vllm vllm_mode
    vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url vllm_server_host
    vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length
    vllm_tensor_parallel_size beta num_iterations epsilon delta epsilon_high sapo_temperature_neg
    sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg importance_sampling_level
    reward_weights multi_objective_aggregation scale_rewards loss_type mask_truncated_completions sync_ref_model
    ref_model_mixup_alpha ref_model_sync_steps top_entropy_quantile entropy_coef use_adaptive_entropy
    entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target max_tool_calling_iterations
    vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max
    vllm_importance_sampling_clip_min off_policy_mask_threshold use_bias_correction_kl log_completions
    log_multimodal num_completions_to_print log_unique_prompts log_completions_hub_repo
    use_transformers_continuous_batching transformers_continuous_batching_config use_transformers_paged
    vllm_importance_sampling_cap reward_model_name_or_path reward_funcs
";

#[test]
fn every_key_of_trl_is_known() {
    for (command, more) in [(Command::Sft, SFT_KEYS), (Command::Grpo, GRPO_KEYS)] {
        let ours = config::keys().iter().filter(|key| key.commands.include(command)).map(|key| key.name);
        let foreign = FOREIGN_KEYS.iter().filter(|key| key.commands.include(command)).map(|key| key.name);
        let known: Vec<&str> = ours.chain(foreign).collect();
        let unknown: Vec<&str> = SHARED_KEYS
            .split_whitespace()
            .chain(more.split_whitespace())
            .filter(|name| !known.contains(name))
            .collect();
        assert_eq!(unknown, Vec::<&str>::new(), "unknown to `{command}`");
    }
}

/// A config of `command` from `tests/trl`, with the keys that have no default in TRL put in.
fn dumped(command: Command) -> String {
    let name = if command == Command::Sft { "sft" } else { "grpo" };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/trl/{name}.yaml"));
    let text = std::fs::read_to_string(path).expect("a file of the tests");
    text.replace("\nmodel_name_or_path: null", "\nmodel_name_or_path: m")
        .replace("\ndataset_name: null", "\ndataset_name: d")
        .replace("\nreward_funcs: null", "\nreward_funcs: [accuracy]")
}

#[test]
fn trls_own_defaults_are_ours() {
    for (command, more) in [(Command::Sft, SFT_KEYS), (Command::Grpo, GRPO_KEYS)] {
        let text = dumped(command);
        for name in SHARED_KEYS.split_whitespace().chain(more.split_whitespace()) {
            assert!(text.contains(&format!("\n{name}: ")), "{name} is not in the dump of {command}");
        }
    }
    // Where ours differ, the key's text says why.
    let float32 = ["dtype=float32".to_owned()];
    let (source, plain) = (
        Source::new("a.yaml", dumped(Command::Sft)),
        Source::new("b.yaml", "model_name_or_path: m\ndataset_name: d\n"),
    );
    let dump = config::load_sft(&source, &[], &Context::default()).unwrap_or_else(|error| panic!("{error}"));
    let ours = config::load_sft(&plain, &float32, &Context::default()).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(dump.settings, ours.settings);
    let plain = Source::new("b.yaml", "model_name_or_path: m\ndataset_name: d\nreward_funcs: [accuracy]\n");
    let source = Source::new("a.yaml", dumped(Command::Grpo));
    let dump = config::load_grpo(&source, &[], &Context::default()).unwrap_or_else(|error| panic!("{error}"));
    let ours = config::load_grpo(&plain, &float32, &Context::default()).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(dump.settings, ours.settings);
}

#[test]
fn a_null_is_the_default_wherever_it_can_be() {
    let required = ["model_name_or_path", "dataset_name", "reward_funcs"];
    for key in config::keys() {
        let set = [format!("{}=null", key.name)];
        let outcome = if key.commands.include(Command::Sft) {
            let loaded = config::load_sft(&Source::new("sft.yaml", SFT), &set, &Context::default());
            loaded.map(|loaded| loaded.warnings).map_err(|error| error.to_string())
        } else {
            let loaded = config::load_grpo(&Source::new("grpo.yaml", GRPO), &set, &Context::default());
            loaded.map(|loaded| loaded.warnings).map_err(|error| error.to_string())
        };
        assert_eq!(outcome.is_err(), required.contains(&key.name), "{}: {outcome:?}", key.name);
    }
    let loaded = sft_with("learning_rate: null\n", &[]).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(loaded.settings.training.learning_rate.to_bits(), 2e-5f64.to_bits());
    assert!(loaded.warnings[0].contains("its default 2.0e-5 is taken"), "{:?}", loaded.warnings);
}

/// Keys of TRL 0.12 to 1.16, of transformers 4.46 to 5.24, of open-r1 and of alignment-handbook that are in no dump of the
/// newest two.
const OLDER_KEYS: &str = "
    use_mps_device jit_mode_eval use_ipex fp16_opt_level half_precision_backend tpu_num_cores tpu_metrics_debug
    past_index fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap adafactor use_legacy_prediction_loop
    include_inputs_for_metrics fp16_backend push_to_hub_model_id push_to_hub_organization push_to_hub_token _n_gpu
    mp_parameters torchdynamo ray_scope dispatch_batches split_batches no_cuda evaluation_strategy overwrite_output_dir
    warmup_ratio group_by_length logging_dir save_safetensors include_tokens_per_second per_gpu_train_batch_size
    per_gpu_eval_batch_size gradient_checkpointing_use_reentrant torch_dtype bnb_4bit_use_double_quant
    benchmarks callbacks hub_model_revision overwrite_hub_revision push_to_hub_revision system_prompt wandb_entity
    wandb_project wandb_run_group
";
const OLDER_SFT_KEYS: &str = "max_seq_length dataset_batch_size num_of_sequences chars_per_token use_liger";
const OLDER_GRPO_KEYS: &str = "
    vllm_device vllm_dtype vllm_max_model_len vllm_enable_prefix_caching vllm_guided_decoding_regex use_liger_loss
    wandb_log_unique_prompts max_prompt_length e2b_router_url morph_router_url
";

#[test]
fn every_key_that_trl_had_is_answered() {
    for (command, more) in [(Command::Sft, OLDER_SFT_KEYS), (Command::Grpo, OLDER_GRPO_KEYS)] {
        for name in OLDER_KEYS.split_whitespace().chain(more.split_whitespace()) {
            let key = config::keys().iter().any(|key| key.name == name && key.commands.include(command));
            let foreign = FOREIGN_KEYS.iter().any(|key| key.name == name && key.commands.include(command));
            assert!(key || foreign, "`{name}` is unknown to `{command}`");
        }
    }
}

#[test]
fn keys_of_programs_that_are_not_called_are_passed_over() {
    let loaded = grpo_with("vllm_new_option: 3\nwandb_mode: offline\n", &[]).unwrap_or_else(|error| panic!("{error}"));
    assert!(loaded.warnings.len() == 2 && loaded.warnings[0].contains("`vllm_new_option` is not known"));
    assert_one(&grpo_errors("vllm_importance_sampling_new: 3\n"), "no key of `trainer grpo`");
    assert_one(&sft_errors("vllm_new_option: 3\n"), "no key of `trainer sft`");
}

#[test]
fn other_names_are_read_as_the_key() {
    for (lines, warnings) in [
        ("max_seq_length: 77\n", 1),
        ("max_length: 77\n", 0),
        ("max_length: 77\nmax_seq_length: 77.0\n", 1),
        ("max_seq_length: 77\nmax_seq_len: '77'\n", 2),
        ("max_length: 77\nmax_seq_length: null\n", 0),
    ] {
        let loaded = sft_with(lines, &[]).unwrap_or_else(|error| panic!("{lines}{error}"));
        assert_eq!((loaded.settings.max_length, loaded.warnings.len()), (Some(77), warnings), "{lines}");
    }
    let loaded = sft_with("max_length: 5\n", &["max_seq_length=77"]).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(loaded.settings.max_length, Some(77));
    assert!(loaded.warnings[0].contains("`max_seq_length` is called `max_length`"), "{:?}", loaded.warnings);
    let settings = sft("evaluation_strategy: epoch\nno_cuda: true\nlr: 0.5\n");
    assert_eq!(settings.training.eval_strategy, Interval::Epoch);
    assert_eq!(settings.training.device, DeviceChoice::Cpu);
    assert_eq!(settings.training.learning_rate.to_bits(), 0.5f64.to_bits());
    let settings = grpo("use_vllm: true\nvllm_importance_sampling_cap: 2.0\n");
    assert_eq!(settings.rollout_importance_sampling.and_then(|correction| correction.clip_max), Some(2.0));
}

#[test]
fn shares_and_strategies_say_when() {
    let settings =
        sft("save_steps: 0.05\neval_strategy: steps\neval_steps: 0.25\nlogging_steps: 0.5\nlogging_first_step: true\n");
    let training = settings.training;
    assert_eq!(training.save_strategy, Interval::Share(0.05));
    assert_eq!(training.eval_strategy, Interval::Share(0.25));
    assert_eq!((training.logging_strategy, training.logging_first_step), (Interval::Share(0.5), true));
    for (total, steps) in [(1, 1), (20, 1), (21, 2), (100, 5), (101, 6)] {
        assert_eq!(Interval::Share(0.05).in_steps(total), Interval::Steps(steps), "{total}");
    }
    assert_eq!(sft("logging_strategy: epoch\n").training.logging_strategy, Interval::Epoch);
    assert_eq!(sft("logging_strategy: no\n").training.logging_strategy, Interval::No);
    // `eval_steps` falls back on `logging_steps`, also where that is no cadence of logging.
    let settings = sft("logging_strategy: no\nlogging_steps: 7\neval_strategy: steps\neval_steps: 0\n");
    assert_eq!(settings.training.eval_strategy, Interval::Steps(7));
}

#[test]
fn maps_of_arguments_set_the_keys_they_stand_for() {
    let loaded = grpo_with(
        "top_p: 0.5\ngeneration_kwargs: {top_p: 0.9, top_k: -1, max_new_tokens: 99, stop: [\"x\"], seed: 3, do_sample: true}\n\
         model_init_kwargs: '{\"torch_dtype\": \"float16\", \"attn_implementation\": \"sdpa\", \"revision\": \"v1\"}'\n\
         optim_args: beta1=0.8, eps=1e-6, fused=True\naccelerator_config: {split_batches: false, non_blocking: true}\n\
         mixed_precision: fp16\n",
        &[],
    )
    .unwrap_or_else(|error| panic!("{error}"));
    let (settings, warnings) = (loaded.settings, loaded.warnings.join("\n"));
    assert_eq!(settings.sampling.top_p.to_bits(), 0.9f64.to_bits());
    assert_eq!((settings.sampling.top_k, settings.max_completion_length), (0, Some(99)));
    assert_eq!(settings.sampling.stop_strings, ["x"]);
    assert_eq!((settings.model.dtype, settings.model.model_revision.as_str()), (WeightDtype::Float16, "v1"));
    assert_eq!(settings.training.optimizer.adam_beta1.to_bits(), 0.8f64.to_bits());
    assert_eq!(settings.training.optimizer.adam_epsilon.to_bits(), 1e-6f64.to_bits());
    assert_eq!(settings.training.precision, Precision::Fp16);
    for part in [
        "`generation_kwargs.top_p` is `0.9`, which counts more than the `0.5` of `top_p`",
        "`generation_kwargs.seed` has no effect",
        "`model_init_kwargs.attn_implementation` has no effect",
        "`optim_args.fused` has no effect",
        "`accelerator_config.non_blocking` has no effect",
    ] {
        assert!(warnings.contains(part), "{part} is missing in\n{warnings}");
    }
    let set = grpo_with("generation_kwargs: {top_p: 0.9}\n", &["top_p=0.7"]).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(set.settings.sampling.top_p.to_bits(), 0.7f64.to_bits());
    assert_one(&grpo_errors("dtype: float32\nmodel_init_kwargs: {dtype: float16}\n"), "two values");
    assert_one(&sft_errors("adam_beta1: 0.5\noptim_args: beta1=0.9\n"), "two values");
    assert_one(&sft_errors("mixed_precision: fp8\n"), "8-bit arithmetic");
    assert_one(&sft_errors("accelerator_config: {split_batches: true}\n"), "not supported");
    assert_one(&sft_errors("dataset_kwargs: {skip_prepare_dataset: true}\n"), "not supported");
    assert_one(&sft_errors("parallelism_config: {tp_size: 2}\n"), "not layers or sequences");
    assert!(sft_with("dataset_kwargs: {add_special_tokens: false}\nparallelism_config: {tp_size: 1}\n", &[]).is_ok());
}

#[test]
fn dropout_is_off_where_it_is_to_be() {
    let dropout = |lines: &str| grpo(&format!("use_peft: true\n{lines}")).model.lora.map(|lora| lora.dropout);
    assert_eq!(dropout(""), Some(0.05));
    assert_eq!(dropout("disable_dropout: true\n"), Some(0.0));
    assert_eq!(dropout("disable_dropout: false\nlora_dropout: 0.1\n"), Some(0.1));
}

#[test]
fn every_optimizer_is_there_on_the_cpu() {
    use OptimizerKind::{AdamW, AdamW8bit, Lion, Muon};
    for (name, kind) in [
        ("adamw_torch_fused", AdamW),
        ("paged_adamw_32bit", AdamW),
        ("adamw_8bit", AdamW8bit),
        ("paged_adamw_8bit", AdamW8bit),
        ("lion_32bit", Lion),
        ("muon", Muon),
    ] {
        let loaded = sft_with(&format!("optim: {name}\n"), &[]).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!((loaded.settings.training.optimizer.kind, loaded.warnings), (kind, vec![]), "{name}");
        // On a GPU there is AdamW.
        let on_gpu = sft_with(&format!("optim: {name}\ndevice: cuda:0\n"), &[]);
        match kind {
            AdamW | AdamW8bit => assert_eq!(on_gpu.unwrap().settings.training.optimizer.kind, AdamW),
            Lion | Muon => assert!(on_gpu.unwrap_err().to_string().contains("on the CPU only")),
        }
    }
}

#[test]
fn what_a_name_asks_for_beside_what_it_gives_is_said() {
    for (lines, parts) in [
        ("device: cuda:0\noptim: paged_adamw_8bit\n", vec!["8 bytes for each parameter, 6 more than asked for"]),
        ("device: cuda:0\noptim: adamw_bnb_8bit\nuse_peft: true\n", vec!["the adapter's moments are kept in float32"]),
        ("device: cuda:0\noptim: paged_adamw_32bit\n", vec!["on the device"]),
        ("report_to: wandb\n", vec!["nothing is sent to a tracker", "wandb sync"]),
        ("report_to: [mlflow, tensorboard]\n", vec!["`mlflow`", "TensorBoard's files"]),
        ("report_to: all\n", vec!["`all`"]),
        ("push_to_hub: true\n", vec!["nothing is uploaded", "`hf upload`"]),
        ("hub_model_id: me/x\n", vec!["`push_to_hub` is false"]),
        ("packing: true\npacking_strategy: ffd\n", vec!["is called `bfd`"]),
    ] {
        let loaded = sft_with(lines, &[]).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(loaded.warnings.len(), 1, "{lines}{:?}", loaded.warnings);
        assert!(parts.iter().all(|part| loaded.warnings[0].contains(part)), "{lines}{:?}", loaded.warnings);
    }
    assert_eq!(sft("report_to: [wandb]\n").training.report_to, [ReportTo::Tensorboard]);
    for lines in ["optim: adamw_torch_fused\n", "report_to: tensorboard\n", "report_to: []\n", "push_to_hub: false\n"] {
        assert_eq!(sft_with(lines, &[]).expect(lines).warnings, Vec::<String>::new(), "{lines}");
    }
}

#[test]
fn secrets_are_not_written_down() {
    let sets = ["hub_token=hf_abc", "env={WANDB_API_KEY: wb_abc, OMP_NUM_THREADS_OF_TEST: 3}", "seed=5"];
    let loaded = sft_with("", &sets).unwrap_or_else(|error| panic!("{error}"));
    for text in [&loaded.resolved_yaml, &loaded.warnings.join("\n")] {
        assert!(!text.contains("_abc"), "{text}");
    }
    assert!(loaded.resolved_yaml.contains("# --set hub_token=...\n# --set env=...\n# --set seed=5\n"));
    assert!(
        loaded.warnings.iter().any(|warning| warning.contains("OMP_NUM_THREADS_OF_TEST=3")),
        "{:?}",
        loaded.warnings
    );
    let error = sft_with("env: {CUDA_VISIBLE_DEVICES: '7,8'}\n", &[]).expect_err("another environment");
    assert!(error.to_string().contains("CUDA_VISIBLE_DEVICES=7,8 trainer"), "{error}");
}

#[test]
fn the_upload_is_a_line_to_type() {
    let command = |lines: &str| sft(lines).training.upload_command();
    assert_eq!(command(""), None);
    assert_eq!(command("hub_model_id: me/x\n"), None);
    let expected = "hf upload me/x runs/a --exclude 'checkpoint-*'";
    assert_eq!(command("push_to_hub: true\nhub_model_id: me/x\noutput_dir: runs/a\n").as_deref(), Some(expected));
    let expected = "hf upload a 'runs/b c/a' --exclude 'checkpoint-*' --revision v1 --private";
    let lines = "push_to_hub: true\noutput_dir: runs/b c/a\nhub_model_revision: v1\nhub_private_repo: true\n";
    assert_eq!(command(lines).as_deref(), Some(expected));
}

#[test]
fn absurd_sizes_are_errors_at_once() {
    for key in config::keys() {
        let is_number = key.kind.starts_with("an integer") || key.kind == "a number" || key.kind == "a list of numbers";
        // Seeds are bit patterns; a rate that is too high ends in a loss that is no number, which is said.
        if !is_number || key.name.ends_with("seed") || key.name == "learning_rate" {
            continue;
        }
        let set = [format!("{}=1e15", key.name)];
        let error = if key.commands.include(Command::Sft) {
            config::load_sft(&Source::new("sft.yaml", SFT), &set, &Context::default()).err()
        } else {
            config::load_grpo(&Source::new("grpo.yaml", GRPO), &set, &Context::default()).err()
        };
        let error = error.unwrap_or_else(|| panic!("`{}` takes 1e15", key.name));
        assert!(error.messages().any(|message| message.contains(key.name)), "{error}");
    }
    for lines in [
        "num_generations: 1e9\n",
        "lora_r: 1000000\n",
        "per_device_train_batch_size: 1000000000\n",
        "max_completion_length: 1000000000\n",
        "num_train_epochs: 1e9\n",
        "save_total_limit: 1e12\n",
        "per_device_train_batch_size: 1048576\ngradient_accumulation_steps: 1048576\n",
        "per_device_train_batch_size: 8\nsteps_per_generation: 1048576\nmax_completion_length: 4194304\n",
    ] {
        // A batch may be too large for the step and for its completions.
        assert!((1..=2).contains(&grpo_errors(lines).len()), "{lines}");
    }
}

#[test]
fn files_that_unfold_without_end_are_refused() {
    let deep = |open: &str, close: &str| format!("seed: {}1{}", open.repeat(100_000), close.repeat(100_000));
    let joined = |count: usize, line: &dyn Fn(usize) -> String| (0..count).map(line).collect::<Vec<_>>().join("\n");
    let bomb = joined(12, &|level| {
        let inner = if level == 0 { "x".to_owned() } else { format!("*a{}", level - 1) };
        format!("a{level}: &a{level} [{}]", vec![inner; 10].join(", "))
    });
    let indented = joined(5000, &|depth| format!("{}a:", " ".repeat(depth)));
    for (name, text) in [
        ("lists", deep("[", "]")),
        ("maps", deep("{a: ", "}")),
        ("aliases", bomb),
        ("indents", indented),
        ("itself", "a: &a [*a]\n".into()),
        ("keys", joined(300_000, &|n| format!("k{n}: 1"))),
    ] {
        let started = std::time::Instant::now();
        let error = config::load_sft(&Source::new("a.yaml", text), &[], &Context::default()).expect_err(name);
        assert!(error.count() < 100, "{name}: {} problems", error.count());
        assert!(started.elapsed().as_secs() < 10, "{name} took {:?}", started.elapsed());
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("large.yaml");
    std::fs::write(&path, "# ".repeat(3 << 20)).expect("a file in it");
    assert!(Source::read(&path).expect_err("6 MiB").to_string().contains("larger than"));
    assert!(Source::read(Path::new("/dev/zero")).expect_err("endless").to_string().contains("larger than"));
}

#[test]
fn launch_files_are_recognised() {
    let accelerate = "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nmixed_precision: bf16\n\
                      num_machines: 1\nnum_processes: 8\nuse_cpu: false\nfsdp_config: {fsdp_version: 2}\n";
    let deepspeed = r#"{"train_batch_size": "auto", "zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}}"#;
    for (text, part) in [(accelerate, "accelerate's launch file"), (deepspeed, "a DeepSpeed configuration")] {
        for set in [vec![], vec!["learning_rate=1e-5".to_owned()]] {
            let source = Source::new("zero.yaml", text);
            let error = config::load_sft(&source, &set, &Context::default()).expect_err(part);
            assert_one(&error.messages().map(str::to_owned).collect::<Vec<_>>(), part);
            assert!(error.to_string().contains("trainer sft TRAINING.yaml"), "{error}");
        }
    }
    // A training file that holds such keys is still one.
    assert!(sft_with("num_machines: 1\nmixed_precision: bf16\nmachine_rank: 0\n", &[]).is_ok());
}

#[test]
fn launch_files_are_held_against_the_configuration() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).expect("a file in it");
        path.display().to_string()
    };
    let auto = r#"{"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "loss_scale": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}, "overlap_comm": true},
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": false}"#;
    let accepted = |lines: &str, parts: &[&str]| {
        let warnings = sft_with(lines, &[]).unwrap_or_else(|error| panic!("{error}")).warnings.join("\n");
        assert!(parts.iter().all(|part| warnings.contains(part)), "{parts:?} are not in {warnings}");
        assert_eq!(warnings.is_empty(), parts.is_empty(), "{warnings}");
    };
    let json = file("ds.json", auto);
    accepted(&format!("deepspeed: {json}\n"), &["stage 2 of ZeRO shares state between ranks, and this run has one"]);
    accepted(&format!("deepspeed: {auto}\nnum_processes: 2\n"), &[]);
    accepted("deepspeed: {train_micro_batch_size_per_gpu: 8, gradient_clipping: 1.0}\n", &[]);
    for (map, part) in [
        ("{train_micro_batch_size_per_gpu: 4}", "`per_device_train_batch_size` is 8"),
        ("{train_batch_size: 64}", "is 8"),
        ("{gradient_accumulation_steps: 2}", "`gradient_accumulation_steps` is 1"),
        ("{gradient_clipping: 0.5}", "`max_grad_norm` is 1"),
        ("{optimizer: {type: Lion}}", "optimizer"),
        ("{optimizer: {type: AdamW, params: {lr: 0.1}}}", "`learning_rate` is"),
        ("{optimizer: {type: AdamW, params: {betas: [0.9, 0.95]}}}", "`adam_beta2` is"),
        ("{scheduler: {type: WarmupLR}}", "`lr_scheduler_type` is linear"),
        ("{scheduler: {type: OneCycle}}", "OneCycle"),
        ("{fp16: {enabled: true}}", "`fp16` is false"),
        ("{curriculum_learning: {enabled: true}}", "curriculum_learning"),
        ("{train_micro_batch_size_per_gpus: 8}", "not known"),
        ("[1]", "a path or a map"),
    ] {
        assert_one(&sft_errors(&format!("deepspeed: {map}\n")), part);
    }
    assert_one(&sft_errors("bf16: true\ndeepspeed: {bf16: {enabled: false}}\n"), "`bf16` is true");
    assert_one(&sft_errors("fp16: true\ndeepspeed: {bf16: {enabled: true}}\n"), "`fp16` is true");
    let zero3 = "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nmixed_precision: bf16\nnum_machines: 1\n\
                 deepspeed_config: {zero_stage: 3, offload_optimizer_device: cpu, zero3_init_flag: true}\n";
    let one = file("one.yaml", &format!("{zero3}num_processes: 1\n"));
    accepted(&format!("accelerate_config: {one}\n"), &["stage 3 of ZeRO shares state between ranks"]);
    let eight = file("eight.yaml", &format!("{zero3}num_processes: 8\n"));
    accepted(&format!("accelerate_config: {eight}\n"), &[]);
    accepted("accelerate_config: single_gpu\n", &[]);
    assert_one(&sft_errors("accelerate_config: no-such.yaml\n"), "cannot be read");
}

// ---- the resolved config ----

#[test]
fn the_resolved_config_is_complete() {
    let context = Context { git_commit: Some("0123abc"), ..Context::default() };
    let loaded = config::load_grpo(&Source::new("grpo.yaml", GRPO), &["seed=5".into()], &context);
    let text = loaded.unwrap_or_else(|error| panic!("{error}")).resolved_yaml;
    for key in config::keys().iter().filter(|key| key.commands.include(Command::Grpo)) {
        let lines = text.lines().filter(|line| line.starts_with(&format!("{}:", key.name))).count();
        assert_eq!(lines, 1, "`{}` stands {lines} times in\n{text}", key.name);
    }
    let text = text.replace(concat!("trainer ", env!("CARGO_PKG_VERSION")), "trainer [version]");
    insta::assert_snapshot!("resolved_grpo", text);
}

/// Those of the drawn overrides with which the config still loads, taken one by one.
fn acceptable(drawn: Vec<String>, loads: impl Fn(&[String]) -> bool) -> Vec<String> {
    let mut kept = Vec::new();
    for set in drawn {
        kept.push(set);
        if !loads(&kept) {
            kept.pop();
        }
    }
    kept
}

/// Holds a config against what its own resolved text gives: the same settings, no new warnings, the same text.
fn assert_same<S: PartialEq + std::fmt::Debug>(
    first: &Loaded<S>,
    again: Result<Loaded<S>, ConfigError>,
) -> Result<(), TestCaseError> {
    let again = again.map_err(|error| TestCaseError::fail(format!("{error}\n{}", first.resolved_yaml)))?;
    prop_assert_eq!(&again.settings, &first.settings);
    let is_new = |warning: &&String| !first.warnings.iter().any(|known| tail(known) == tail(warning));
    prop_assert_eq!(again.warnings.iter().find(is_new), None);
    prop_assert_eq!(body(&again.resolved_yaml), body(&first.resolved_yaml));
    Ok(())
}

fn round_trip_sft(lines: &str, overrides: &[String]) -> Result<(), TestCaseError> {
    let first = config::load_sft(&Source::new("a.yaml", format!("{SFT}{lines}")), overrides, &Context::default());
    let first = first.map_err(|error| TestCaseError::fail(error.to_string()))?;
    let resolved = Source::new("b.yaml", first.resolved_yaml.as_str());
    assert_same(&first, config::load_sft(&resolved, &[], &Context::default()))
}

fn round_trip_grpo(lines: &str, overrides: &[String]) -> Result<(), TestCaseError> {
    let first = config::load_grpo(&Source::new("a.yaml", format!("{GRPO}{lines}")), overrides, &Context::default());
    let first = first.map_err(|error| TestCaseError::fail(error.to_string()))?;
    let resolved = Source::new("b.yaml", first.resolved_yaml.as_str());
    assert_same(&first, config::load_grpo(&resolved, &[], &Context::default()))
}

/// A warning without its place.
fn tail(warning: &str) -> &str {
    warning.split_once(": ").map_or(warning, |(_, tail)| tail)
}

/// A resolved config without its header.
fn body(text: &str) -> &str {
    &text[text.find("\n\n").expect("a blank line ends the header")..]
}

/// A value that the key might take: one of its words, a number in or near its range, text, a map, null.
fn value_for(key: &'static config::Key) -> BoxedStrategy<String> {
    let words: Vec<String> = key.values.iter().map(ToString::to_string).collect();
    let default = match key.default {
        DefaultValue::Text(text) => text.to_owned(),
        _ => "null".to_owned(),
    };
    let number = prop_oneof![
        (0u32..70).prop_map(|n| n.to_string()),
        (0.0f64..1.0).prop_map(|x| format!("{x:?}")),
        (1e-9f64..1e-3).prop_map(|x| format!("{x:e}")),
    ];
    let text = any::<String>().prop_map(|text| serde_json::Value::from(text).to_string());
    match key.kind {
        "one of" | "one or a list of" if !words.is_empty() => proptest::sample::select(words).boxed(),
        "true or false" => any::<bool>().prop_map(|b| b.to_string()).boxed(),
        "text" | "a path" => prop_oneof![text, Just("null".to_owned()), Just("plain".to_owned())].boxed(),
        "an integer" | "a number" => prop_oneof![3 => number, 1 => Just(default)].boxed(),
        "a list of strings" => {
            proptest::collection::vec(text, 0..3).prop_map(|items| format!("[{}]", items.join(", "))).boxed()
        }
        "a map" => (text.clone(), number, text)
            .prop_map(|(key, n, value)| format!("{{{key}: {n}, other: [{value}, true, null]}}"))
            .boxed(),
        _ => Just(default).boxed(),
    }
}

fn overrides_for(command: Command) -> impl Strategy<Value = Vec<String>> {
    // Keys whose values are tied to those of others would make almost every draw invalid.
    let tied = ["reward_funcs", "reward_weights", "lr_scheduler_kwargs", "generation_batch_size", "num_generations"];
    let keys: Vec<&'static config::Key> =
        config::keys().iter().filter(|key| key.commands.include(command) && !tied.contains(&key.name)).collect();
    proptest::collection::vec(proptest::sample::select(keys), 1..12).prop_flat_map(|keys| {
        keys.into_iter()
            .map(|key| value_for(key).prop_map(move |value| format!("{}={value}", key.name)))
            .collect::<Vec<_>>()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_resolved_sft_config_gives_the_same_settings(drawn in overrides_for(Command::Sft)) {
        let source = Source::new("a.yaml", SFT);
        let overrides = acceptable(drawn, |set| config::load_sft(&source, set, &Context::default()).is_ok());
        round_trip_sft("", &overrides)?;
    }

    #[test]
    fn a_resolved_grpo_config_gives_the_same_settings(drawn in overrides_for(Command::Grpo)) {
        let source = Source::new("a.yaml", GRPO);
        let overrides = acceptable(drawn, |set| config::load_grpo(&source, set, &Context::default()).is_ok());
        round_trip_grpo("", &overrides)?;
    }

    #[test]
    fn no_text_makes_the_reader_panic(
        text in "[a-z_:\\- \\[\\]{}\"'#&*!|>%@0-9.\\n\\t]{0,80}",
        value in any::<String>(),
    ) {
        let source = Source::new("any.yaml", text);
        let set = [format!("seed={value}"), value];
        for overrides in [&[][..], &set[..]] {
            for error in [
                config::load_sft(&source, overrides, &Context::default()).err(),
                config::load_grpo(&source, overrides, &Context::default()).err(),
            ].into_iter().flatten() {
                prop_assert!(error.count() > 0 && !error.render(true).is_empty());
            }
        }
    }
}

#[test]
fn every_single_key_survives_the_round_trip() {
    let extremes = [
        "learning_rate=9.999999999999998",
        "learning_rate=5e-324",
        "seed=18446744073709551615",
        "max_steps=7",
        "resume_from_checkpoint=runs/a b/checkpoint-5",
        "device=cuda:3",
        "lora_target_modules=[v_proj]",
        "system_prompt=\"line\\nwith \\\"quotes\\\" # and: more\\u0085 \\u2028 \\ufeff\"",
        "system_prompt=|\n  block\n  of text\n",
        "chat_template_kwargs={enable_thinking: no, depth: {a: [1, 1.0, 1e-7, \"1\", null]}}",
        "model_revision=1e5",
        "output_dir=~/x",
        "report_to=[tensorboard]",
        "warmup_ratio=0.03",
        "save_steps=0.05",
        "logging_strategy=epoch",
        "logging_steps=0.1",
        "hub_model_id=me/a b",
        "optim=paged_adamw_8bit",
        "save_total_limit=-1",
        "dataset_columns={question: prompt, \"a b\": completion}",
    ];
    for set in extremes {
        round_trip_sft("use_peft: true\n", &[set.to_owned()]).unwrap_or_else(|error| panic!("{set}: {error}"));
    }
    for set in [
        "reward_funcs=[accuracy, {kind: tag_count, a: [1, x], b: {c: 1.5}}]",
        "reward_funcs=[{command: [sh, -c, \"echo 'a b' \\\\ \\\"\"], name: \"é: #\", timeout_secs: 0.5}]",
        "stop_strings=[\"</answer>\", \"\\n\\n\", \"no\"]",
        "reward_weights=[0.1]",
        "vllm_importance_sampling_correction=true",
        "generation_batch_size=32",
        "scale_rewards=false",
        "max_completion_length=null",
        "vllm_importance_sampling_clip_max=null",
        "top_k=-1",
        "dataset_prompt_column=problem",
    ] {
        round_trip_grpo("", &[set.to_owned()]).unwrap_or_else(|error| panic!("{set}: {error}"));
    }
}

const OPEN_R1: &str = "model_name_or_path: m
dataset_mixture:
  datasets:
    - id: a/one
      config: all
      split: train[:10%]
      columns: [messages]
      weight: 0.5
    - id: two.jsonl
  seed: 7
  test_split_size: 0.1
";

const TRL: &str = "model_name_or_path: m
datasets:
  - path: json
    data_files: {train: [a.jsonl, b/*.jsonl]}
    fraction: 3
  - path: a/two
    name: main
    data_dir: sub
    data_files: x.csv
    split: test
    fraction: 1.0
test_split_size: 100
";

#[test]
fn mixtures_are_read_in_both_forms_and_survive_the_round_trip() {
    let load = |text: &str| config::load_sft(&Source::new("a.yaml", text), &[], &Context::default());
    let mixture = |text: &str| load(text).unwrap_or_else(|error| panic!("{error}")).settings.data.mixture.unwrap();
    let open_r1 = mixture(OPEN_R1);
    assert_eq!((open_r1.seed, open_r1.is_shuffled, open_r1.test_split_size), (7, true, Some(0.1)));
    let part = |part: &MixturePart| (part.path.clone(), part.config.clone(), part.split.clone(), part.share);
    assert_eq!(part(&open_r1.parts[0]), ("a/one".into(), Some("all".into()), "train[:10%]".into(), Share::Weight(0.5)));
    assert_eq!(part(&open_r1.parts[1]), ("two.jsonl".into(), None, "train".into(), Share::All));
    assert_eq!(open_r1.parts[0].columns, Some(vec!["messages".to_string()]));
    let trl = mixture(TRL);
    assert_eq!((trl.is_shuffled, trl.test_split_size), (false, Some(100.0)));
    assert_eq!(trl.parts[0].data_files, [("train".to_string(), vec!["a.jsonl".to_string(), "b/*.jsonl".to_string()])]);
    assert_eq!(part(&trl.parts[1]), ("a/two".into(), Some("main".into()), "test".into(), Share::Fraction(1.0)));
    assert_eq!((trl.parts[1].data_dir.as_deref(), trl.parts[1].data_files.len()), (Some("sub"), 1));
    let idle = load(&format!("{TRL}dataset_train_split: train_sft\n")).unwrap_or_else(|error| panic!("{error}"));
    assert!(idle.warnings[0].contains("`dataset_train_split` has no effect: `datasets` says"), "{:?}", idle.warnings);
    for text in [OPEN_R1, TRL] {
        let first = load(text).unwrap_or_else(|error| panic!("{error}"));
        assert_same(&first, load(&first.resolved_yaml)).unwrap();
    }
}

#[test]
fn mixtures_that_make_no_sense_are_errors() {
    let messages = |text: &str| -> String {
        let text = format!("model_name_or_path: m\n{text}");
        let error = config::load_sft(&Source::new("a.yaml", text), &[], &Context::default()).unwrap_err();
        error.messages().collect::<Vec<_>>().join("\n")
    };
    for (text, words) in [
        ("dataset_name: a\ndatasets: [{path: b}]\n", "`dataset_name` and `datasets` both say what to train on"),
        ("dataset_mixture: {datasets: [{id: a}]}\ndatasets: [{path: b}]\n", "both name a mixture"),
        ("dataset_config: x\ndatasets: [{path: b}]\n", "`dataset_config` belongs to `dataset_name`"),
        ("datasets: []\n", "`dataset_name` is missing"),
        ("dataset_name: null\n", "`dataset_name` is null"),
        ("dataset_mixture: {seed: 1}\n", "names no data set"),
        ("dataset_mixture: {datasets: [{split: train}]}\n", "a data set without a name"),
        ("dataset_mixture: {datasets: [{id: a, weigth: 0.5}]}\n", "does not know `weigth`"),
        ("dataset_mixture: {datasets: [{id: a, weight: 1.5}]}\n", "no more than all of its rows"),
        ("datasets: [{path: a, fraction: 0.5}, {path: b}]\n", "gives `fraction` for some data sets only"),
        ("datasets: [{path: a}]\ntest_split_size: 1.5\n", "neither a share of rows nor a number"),
        ("datasets: [a]\n", "expects a map with `path` or `id`"),
        ("dataset_name: a\ndataset_columns: {x: 1}\n", "gives `x` the name 1"),
    ] {
        let found = messages(text);
        assert!(found.contains(words), "{text}: {found}");
    }
}

#[test]
fn a_resolved_config_does_not_go_on_from_the_runs_own_checkpoint() {
    let own = Path::new("runs/a/checkpoint-5");
    let absolute = std::path::absolute(own).expect("a working directory");
    for place in [Path::new("true"), Path::new("runs/a/checkpoint-5"), &absolute] {
        let sets = ["output_dir=runs/a/".to_owned(), format!("resume_from_checkpoint={}", place.display())];
        let first = config::load_sft(&Source::new("a.yaml", SFT), &sets, &Context::default());
        let first = first.unwrap_or_else(|error| panic!("{error}"));
        assert_ne!(first.settings.training.resume_from_checkpoint, Resume::No);
        let resolved = Source::new("b.yaml", first.resolved_yaml.as_str());
        let mut again =
            config::load_sft(&resolved, &[], &Context::default()).unwrap_or_else(|error| panic!("{error}")).settings;
        assert_eq!(again.training.resume_from_checkpoint, Resume::No, "{}", place.display());
        again.training.resume_from_checkpoint = first.settings.training.resume_from_checkpoint.clone();
        assert_eq!(again, first.settings);
    }
}

// ---- files of the repository ----

fn config_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).expect("configs/ is there") {
        let path = entry.expect("a readable folder").path();
        if path.is_dir() {
            files.extend(config_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "yaml") {
            files.push(path);
        }
    }
    files.sort();
    files
}

#[test]
fn every_config_of_the_repository_is_right() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let files = config_files(&root);
    assert!(files.len() >= 7, "{files:?}");
    for path in files {
        let source = Source::read(&path).unwrap_or_else(|error| panic!("{error}"));
        assert!(
            source.text().starts_with("# ") && source.text().contains("# Hardware:"),
            "{}: no header comment",
            path.display()
        );
        let is_named = |part: &str| path.file_name().is_some_and(|name| name.to_string_lossy().contains(part));
        let is_grpo = is_named("grpo");
        if is_named("accelerate") {
            // A launch file, which goes with a configuration.
            continue;
        }
        for launched in [None, Some(2)] {
            let context = Context { launched, ..Context::default() };
            let warnings = if is_grpo {
                config::load_grpo(&source, &[], &context).map(|loaded| loaded.warnings)
            } else {
                config::load_sft(&source, &[], &context).map(|loaded| loaded.warnings)
            };
            assert_eq!(warnings.unwrap_or_else(|error| panic!("{error}")), Vec::<String>::new(), "{}", path.display());
        }
    }
}

#[test]
fn the_reference_page_is_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/config.md");
    let page = config::reference();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, &page).expect("docs/ can be written");
    }
    let stored = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(stored == page, "docs/config.md is out of date: run `UPDATE_DOCS=1 cargo test --release --test config`");
}
