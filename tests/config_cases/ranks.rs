//! How many ranks there are, what they share, and what the files of launchers say about it.

use std::path::{Path, PathBuf};

use trainer::config::settings::{
    OffloadDevice, OffloadSettings, RankBackend, RankSettings, TrainingSettings, ZeroStage,
};
use trainer::config::{self, ConfigError, Context, Source};

use super::{GRPO, SFT, assert_one, assert_same};

/// A machine: ranks that a launcher started, and visible GPUs.
fn machine(launched: Option<usize>, visible_gpus: usize) -> Context<'static> {
    Context { launched, visible_gpus, ..Context::default() }
}

/// A workstation without GPUs.
fn cpu() -> Context<'static> {
    machine(None, 0)
}

fn load(lines: &str, context: &Context<'_>) -> Result<(TrainingSettings, Vec<String>), ConfigError> {
    let source = Source::new("sft.yaml", format!("{SFT}{lines}"));
    config::load_sft(&source, &[], context).map(|loaded| (loaded.settings.training, loaded.warnings))
}

/// The ranks that a configuration comes to, and what is said about it.
fn ranks(lines: &str, context: &Context<'_>) -> (RankSettings, Vec<String>) {
    let (training, warnings) = load(lines, context).unwrap_or_else(|error| panic!("{lines}{error}"));
    (training.ranks, warnings)
}

/// The ranks of a configuration about which there is nothing to say.
fn silent(lines: &str, context: &Context<'_>) -> RankSettings {
    let (ranks, warnings) = ranks(lines, context);
    assert_eq!(warnings, Vec::<String>::new(), "{lines}");
    ranks
}

/// What is wrong with a configuration.
fn errors(lines: &str, context: &Context<'_>) -> Vec<String> {
    let error = load(lines, context).map(|(training, _)| training.ranks).expect_err(lines);
    error.messages().map(str::to_owned).collect()
}

fn of(stage: ZeroStage, world_size: usize) -> RankSettings {
    RankSettings { stage, world_size, ..RankSettings::default() }
}

/// The same with DeepSpeed's own number of parameters that may be on a GPU at a time.
fn with_live(settings: RankSettings) -> RankSettings {
    let offload = OffloadSettings { max_live_parameters: Some(1_000_000_000), ..settings.offload };
    RankSettings { offload, ..settings }
}

/// The same with what is named in host memory.
fn offloading(settings: RankSettings, optimizer: bool, params: bool) -> RankSettings {
    let place = |waits| if waits { OffloadDevice::Cpu } else { OffloadDevice::None };
    let offload = OffloadSettings { optimizer: place(optimizer), params: place(params), ..settings.offload };
    RankSettings { offload, ..settings }
}

/// Files in a folder of their own.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    /// The lines that name a file of accelerate with this text.
    fn accelerate(&self, text: &str) -> String {
        format!("accelerate_config: {}\n", self.write("launch.yaml", text).display())
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, text).expect("a file in it");
        path
    }
}

/// A file of accelerate in the form that `accelerate config` writes and TRL has.
fn accelerate_file(kind: &str, processes: usize, inner: &str) -> String {
    format!(
        "compute_environment: LOCAL_MACHINE\ndebug: false\ndistributed_type: {kind}\ndowncast_bf16: 'no'\n\
         enable_cpu_affinity: false\nmachine_rank: 0\nmain_training_function: main\nmixed_precision: bf16\n\
         num_machines: 1\nnum_processes: {processes}\nrdzv_backend: static\nsame_network: true\ntpu_env: []\n\
         tpu_use_cluster: false\ntpu_use_sudo: false\nuse_cpu: false\n{inner}"
    )
}

const ZERO1: &str = "deepspeed_config: {deepspeed_multinode_launcher: standard, gradient_accumulation_steps: auto, \
                     zero3_init_flag: false, zero_stage: 1}\n";
const ZERO2: &str = "deepspeed_config: {deepspeed_multinode_launcher: standard, offload_optimizer_device: none, \
                     offload_param_device: none, zero3_init_flag: false, zero_stage: 2}\n";
const ZERO3: &str = "deepspeed_config: {deepspeed_multinode_launcher: standard, offload_optimizer_device: none, \
                     offload_param_device: none, zero3_init_flag: true, zero3_save_16bit_model: true, zero_stage: 3}\n";
const FSDP1: &str = "fsdp_config: {fsdp_activation_checkpointing: false, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP, \
                     fsdp_backward_prefetch: BACKWARD_PRE, fsdp_cpu_ram_efficient_loading: true, \
                     fsdp_forward_prefetch: true, fsdp_offload_params: false, fsdp_reshard_after_forward: FULL_SHARD, \
                     fsdp_state_dict_type: FULL_STATE_DICT, fsdp_sync_module_states: true, fsdp_use_orig_params: true, \
                     fsdp_version: 1}\n";
const FSDP2: &str = "fsdp_config: {fsdp_activation_checkpointing: false, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP, \
                     fsdp_cpu_ram_efficient_loading: true, fsdp_offload_params: false, \
                     fsdp_reshard_after_forward: true, fsdp_state_dict_type: FULL_STATE_DICT, fsdp_version: 2}\n";

#[test]
fn the_number_of_ranks_is_the_launchers_else_the_keys_else_the_files_else_that_of_the_gpus() {
    let files = Files::new();
    let eight = files.accelerate(&accelerate_file("MULTI_GPU", 8, ""));
    let one = "accelerate_config: {distributed_type: NO, num_processes: 8}\n";
    let open = "accelerate_config: {distributed_type: MULTI_GPU, num_processes: -1}\n";
    for (lines, launched, gpus, expected) in [
        ("", None, 0, 1),
        ("", None, 1, 1),
        ("", None, 4, 4),
        ("device: cpu\n", None, 4, 1),
        ("use_cpu: true\n", None, 4, 1),
        ("device: cuda:1\n", None, 4, 1),
        ("", Some(3), 4, 3),
        ("num_processes: 2\n", None, 4, 2),
        ("num_processes: 2\ndevice: cpu\n", None, 0, 2),
        ("num_processes: 3\n", Some(3), 1, 3),
        (eight.as_str(), None, 4, 8),
        (eight.as_str(), Some(8), 1, 8),
        ("accelerate_config: zero2\n", None, 2, 8),
        ("accelerate_config: zero2\n", Some(2), 2, 2),
        ("accelerate_config: multi_gpu\nnum_processes: 2\n", None, 4, 2),
        ("accelerate_config: single_gpu\n", None, 4, 1),
        (one, None, 4, 1),
        (open, None, 4, 4),
        ("deepspeed: {zero_optimization: {stage: 1}}\n", None, 4, 4),
    ] {
        assert_eq!(silent(lines, &machine(launched, gpus)).world_size, expected, "{lines} {launched:?} {gpus}");
    }
}

#[test]
fn those_who_say_another_number_are_named() {
    let files = Files::new();
    let eight = files.accelerate(&accelerate_file("MULTI_GPU", 8, ""));
    let wrong = errors("num_processes: 4\n", &machine(Some(2), 0));
    assert_one(&wrong, "`num_processes` is 4, and the launcher started 2");
    // The key is what the launcher contradicts, whatever the file says.
    assert_one(&errors(&format!("{eight}num_processes: 4\n"), &machine(Some(2), 0)), "`num_processes` is 4");
    let (found, warnings) = ranks(&eight, &machine(Some(2), 0));
    assert_eq!(found.world_size, 2);
    assert_one(&warnings, "says 8 for `num_processes`, and the launcher says 2, which counts");
    let (found, warnings) = ranks(&format!("{eight}num_processes: 4\ngradient_accumulation_steps: 3\n"), &cpu());
    assert_eq!(found.world_size, 4);
    assert_one(&warnings, "says 8 for `num_processes`, and the configuration says 4, which counts");
    assert!(warnings[0].contains("a step has 96 sequences"), "{warnings:?}");
    for (text, part) in [
        ("num_processes: 0", "has `num_processes: 0`"),
        ("num_processes: two", "has `num_processes: \"two\"`"),
        ("num_processes: 2.5", "has `num_processes: 2.5`"),
        ("num_machines: 2, num_processes: 16", "is for 2 machines, and no launcher started this process"),
    ] {
        let lines = format!("accelerate_config: {{distributed_type: MULTI_GPU, {text}}}\n");
        assert_one(&errors(&lines, &cpu()), part);
    }
    let nodes =
        "accelerate_config: {distributed_type: MULTI_GPU, num_machines: 2, num_processes: 16, machine_rank: 1}\n";
    assert_eq!(silent(nodes, &machine(Some(16), 8)).world_size, 16);
    assert_one(&errors("num_processes: 0\n", &cpu()), "at least 1");
    assert_one(&errors("num_machines: 2\n", &cpu()), "srun");
    assert_one(&errors("distributed_type: DEEPSPEED\n", &cpu()), "`accelerate_config`");
}

#[test]
fn ranks_take_part_in_the_batches() {
    let source = Source::new("grpo.yaml", format!("{GRPO}num_processes: 3\nper_device_train_batch_size: 2\n"));
    let settings = |sets: &[String]| {
        config::load_grpo(&source, sets, &cpu()).map(|loaded| loaded.settings).map_err(|error| error.to_string())
    };
    assert!(settings(&[]).unwrap_err().contains("x 3 ranks"));
    let settings = settings(&["num_generations=6".into()]).unwrap();
    assert_eq!((settings.generation_batch_size, settings.training.ranks.world_size), (6, 3));
    let most =
        errors("per_device_train_batch_size: 1024\ngradient_accumulation_steps: 1024\nnum_processes: 17\n", &cpu());
    assert_one(&most, "on 17 ranks is more than");
    let whole = |ranks: usize| format!("num_processes: {ranks}\ndeepspeed: {{train_batch_size: 32}}\n");
    assert_eq!(silent(&whole(4), &cpu()).world_size, 4);
    assert_one(&errors(&whole(2), &cpu()), "has `train_batch_size: 32`");
}

/// A configuration of the repository with a launch file of it, as `--config-file` names it.
fn with_file(task: &str, file: &Path, context: &Context<'_>) -> Result<(TrainingSettings, Vec<String>), ConfigError> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let source = Source::read(&root.join(format!("{task}_config_deepseek.yaml"))).expect("a file of the repository");
    let sets = [format!("accelerate_config='{}'", file.display())];
    if task == "grpo" {
        config::load_grpo(&source, &sets, context).map(|loaded| (loaded.settings.training, loaded.warnings))
    } else {
        config::load_sft(&source, &sets, context).map(|loaded| (loaded.settings.training, loaded.warnings))
    }
}

#[test]
fn the_launch_files_of_the_repository_go_with_its_configurations() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let files = Files::new();
    for (task, number, stage) in [("sft", 2, ZeroStage::Gradients), ("grpo", 3, ZeroStage::Parameters)] {
        let path = root.join(format!("accelerate_deepspeed_zero{number}.yaml"));
        let load = |context: &Context<'_>| with_file(task, &path, context).unwrap_or_else(|error| panic!("{error}"));
        for context in [cpu(), machine(Some(2), 0), machine(None, 2)] {
            let (training, warnings) = load(&context);
            assert_eq!((training.ranks, warnings), (offloading(of(stage, 2), true, number == 3), vec![]), "{task}");
        }
        // The file, with one thing changed.
        let text = std::fs::read_to_string(&path).expect("a file of the repository");
        let with = |old: &str, new: &str| {
            assert!(text.contains(old), "{old:?} is not in {}", path.display());
            with_file(task, &files.write("changed.yaml", &text.replace(old, new)), &cpu())
        };
        let stage_line = format!("zero_stage: {number}");
        let steps = if task == "sft" { "gradient_accumulation_steps: 16" } else { "gradient_accumulation_steps: 32" };
        for (old, new, part) in [
            (steps, "gradient_accumulation_steps: 8", "has `deepspeed_config.gradient_accumulation_steps: 8`"),
            ("gradient_clipping: 1.0", "gradient_clipping: 0.5", "`max_grad_norm` is 1"),
            ("mixed_precision: fp16", "mixed_precision: bf16", "has `mixed_precision: bf16`, and `fp16` is true"),
            ("mixed_precision: fp16", "mixed_precision: fp8", "has `mixed_precision: fp8`"),
            (&stage_line, "zero_stage: 4", "has `deepspeed_config.zero_stage: 4`"),
            (&stage_line, "zero_stages: 2", "has `deepspeed_config.zero_stages`, which is not known"),
            ("offload_optimizer_device: cpu", "offload_optimizer_device: disk", "`offload_optimizer_device: \"disk\"`"),
            ("num_processes: 2", "num_process: 2", "has `num_process`, which is not known"),
            ("num_processes: 2", "num_machines: 2", "is for 2 machines"),
            ("distributed_type: DEEPSPEED", "distributed_type: TPU", "has `distributed_type: TPU`"),
            (
                "distributed_type: DEEPSPEED",
                "megatron_lm_config: {a: 1}",
                "`megatron_lm_config`, which is not supported",
            ),
        ] {
            let error = with(old, new).expect_err(new);
            assert_one(&error.messages().map(str::to_owned).collect::<Vec<_>>(), part);
        }
        let suggestion = with(&stage_line, "zero_stages: 2").expect_err("no such key").to_string();
        assert!(suggestion.contains("did you mean `zero_stage`"), "{suggestion}");
        for (old, new, world_size, stage) in [
            (steps, "gradient_accumulation_steps: auto", 2, stage),
            (&stage_line, "zero_stage: \"1\"", 2, ZeroStage::Optimizer),
            // accelerate's default.
            (&stage_line, "offload_param_nvme_path: x", 2, ZeroStage::Gradients),
            ("num_processes: 2", "num_processes: 4", 4, stage),
            ("distributed_type: DEEPSPEED", "gpu_ids: all", 2, stage),
            ("mixed_precision: fp16", "mixed_precision: 'no'", 2, stage),
            ("deepspeed_config:", "deepspeed_multinode_launcher: pdsh\ndeepspeed_config:", 2, stage),
            // Keys that people put there beside accelerate's.
            (&stage_line, &format!("{stage_line}\n  stage3_max_live_parameters: 5e8\n  overlap_comm: true"), 2, stage),
        ] {
            let (training, warnings) = with(old, new).unwrap_or_else(|error| panic!("{error}"));
            let ranks = RankSettings { offload: OffloadSettings::default(), ..training.ranks };
            assert_eq!((ranks, warnings), (of(stage, world_size), vec![]), "{new}");
        }
        let nvme = "offload_optimizer_device: nvme\n  offload_optimizer_nvme_path: /local_nvme";
        let (training, warnings) = with("offload_optimizer_device: cpu", nvme).unwrap();
        assert_eq!((training.ranks.offload.optimizer, warnings), (OffloadDevice::Nvme, vec![]));
        assert_eq!(training.ranks.offload.optimizer_path.as_deref(), Some(Path::new("/local_nvme")));
        let error = with("offload_optimizer_device: cpu", "offload_optimizer_device: nvme").unwrap_err();
        assert_one(&error.messages().map(str::to_owned).collect::<Vec<_>>(), "needs a folder for its files");
    }
}

#[test]
fn presets_and_files_of_trl_say_what_is_shared() {
    let files = Files::new();
    let multi = String::new();
    for (name, kind, inner, stage) in [
        ("zero1", "DEEPSPEED", ZERO1, ZeroStage::Optimizer),
        ("zero2", "DEEPSPEED", ZERO2, ZeroStage::Gradients),
        ("zero3", "DEEPSPEED", ZERO3, ZeroStage::Parameters),
        ("fsdp1", "FSDP", FSDP1, ZeroStage::Parameters),
        ("fsdp2", "FSDP", FSDP2, ZeroStage::Parameters),
        ("multi_gpu", "MULTI_GPU", &multi, ZeroStage::Replicated),
    ] {
        assert_eq!(silent(&format!("accelerate_config: {name}\n"), &cpu()), of(stage, 8), "{name}");
        assert_eq!(silent(&files.accelerate(&accelerate_file(kind, 8, inner)), &cpu()), of(stage, 8), "{name}");
        let written = format!("accelerate_config: {{distributed_type: {kind}, num_processes: 2, {}}}\n", inner.trim());
        assert_eq!(silent(&written, &machine(None, 4)), of(stage, 2), "{name}");
    }
    for (from, to, stage) in [
        ("FULL_SHARD", "SHARD_GRAD_OP", ZeroStage::Gradients),
        ("FULL_SHARD", "NO_SHARD", ZeroStage::Replicated),
        ("FULL_SHARD", "1", ZeroStage::Parameters),
        ("reshard_after_forward: FULL_SHARD", "sharding_strategy: full_shard", ZeroStage::Parameters),
        ("fsdp_reshard_after_forward: FULL_SHARD, ", "", ZeroStage::Parameters),
        ("fsdp_", "", ZeroStage::Parameters),
    ] {
        // Of the text only the entries, whose names are the same with and without their beginning.
        let (head, entries) = FSDP1.split_at("fsdp_config: ".len());
        let file = accelerate_file("FSDP", 8, &format!("{head}{}", entries.replace(from, to)));
        assert_eq!(silent(&files.accelerate(&file), &cpu()).stage, stage, "{to}");
    }
    let not = accelerate_file("FSDP", 8, &FSDP2.replace("forward: true", "forward: false"));
    assert_eq!(silent(&files.accelerate(&not), &cpu()).stage, ZeroStage::Gradients);
    let hybrid = files.accelerate(&accelerate_file("FSDP", 8, &FSDP1.replace("FULL_SHARD", "HYBRID_SHARD")));
    let (found, warnings) = ranks(&hybrid, &cpu());
    assert_eq!(found.stage, ZeroStage::Parameters);
    assert_one(&warnings, "sharded over the ranks of all nodes");
    let offload = files.accelerate(&accelerate_file("FSDP", 8, &FSDP2.replace("params: false", "params: true")));
    assert_eq!(silent(&offload, &cpu()).stage, ZeroStage::Parameters);
    assert_eq!(silent(&offload, &machine(None, 8)), offloading(of(ZeroStage::Parameters, 8), true, true));
    for (old, new, part) in [
        ("FULL_SHARD", "HALF_SHARD", "has `fsdp_config.reshard_after_forward: \"HALF_SHARD\"`"),
        ("fsdp_version", "fsdp_versions", "has `fsdp_config.versions`, which is not known"),
    ] {
        let file = files.accelerate(&accelerate_file("FSDP", 8, &FSDP1.replace(old, new)));
        assert_one(&errors(&file, &cpu()), part);
    }
    // What accelerate passes over is said.
    let idle = files.accelerate(&accelerate_file("MULTI_GPU", 8, ZERO3));
    let (found, warnings) = ranks(&idle, &cpu());
    assert_eq!(found, of(ZeroStage::Replicated, 8));
    assert_one(&warnings, "`deepspeed_config` (with `distributed_type: MULTI_GPU`)");
    let sliced = "parallelism_config: {parallelism_config_dp_shard_size: 8, parallelism_config_cp_size: 1}\n";
    let file = |text: &str| files.accelerate(&accelerate_file("FSDP", 8, &format!("{FSDP2}{text}")));
    silent(&file(sliced), &cpu());
    let error = errors(&file(&sliced.replace("cp_size: 1", "cp_size: 2")), &cpu());
    assert_one(&error, "asks for `parallelism_config.cp_size`, which is not supported");
}

/// A configuration of DeepSpeed with every number left to the training file.
const AUTO: &str = r#"{
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "none", "pin_memory": true},
        "offload_param": {"device": "none", "pin_memory": true},
        "overlap_comm": true,
        "contiguous_gradients": true,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": true
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": false
}"#;

#[test]
fn every_key_of_zero_optimization_has_its_answer() {
    let files = Files::new();
    let text = |old: &str, new: &str| {
        assert!(AUTO.contains(old), "{old}");
        let path = files.write("ds.json", &AUTO.replace(old, new));
        format!("deepspeed: {}\nnum_processes: 2\n", path.display())
    };
    let plain = || with_live(of(ZeroStage::Parameters, 2));
    assert_eq!(silent(&text("", ""), &cpu()), plain());
    assert_eq!(silent(&text("", ""), &machine(None, 2)), plain());
    let inside = |entry: &str| text("\"stage\": 3,", &format!("\"stage\": 3, {entry},"));
    for fine in [
        r#""contiguous_gradients": false"#,
        r#""reduce_scatter": true, "use_multi_rank_bucket_allreduce": true, "allgather_partitions": true"#,
        r#""allgather_bucket_size": 5e8, "round_robin_gradients": true, "cpu_offload_use_pin_memory": true"#,
        r#""load_from_fp32_weights": true, "elastic_checkpoint": false, "ignore_unused_parameters": true"#,
        r#""stage3_model_persistence_threshold": 9223372036854775807, "stage3_module_granularity_threshold": 0"#,
        r#""stage3_use_all_reduce_for_fetch_params": false, "stage3_allgather_sequential": false"#,
        r#""zero_hpz_partition_size": 1, "zero_quantized_weights": false, "mics_shard_size": -1, "zenflow": null"#,
        r#""memory_efficient_linear": true, "pipeline_loading_checkpoint": false, "override_module_apply": true"#,
        r#""log_trace_cache_warnings": false, "enable_sanity_checks": false, "legacy_stage1": false"#,
        r#""save_muon_momentum_buffer_in_memory": false, "leaf_module": {}, "prefetch_bucket_size": 5e7"#,
        r#""cpu_offload": false, "cpu_offload_param": false, "mics_hierarchical_params_gather": false"#,
    ] {
        assert_eq!(silent(&inside(fine), &machine(None, 2)), plain(), "{fine}");
    }
    for (entry, part) in [
        (r#""zero_hpz_partition_size": 8"#, "`zero_optimization.zero_hpz_partition_size`"),
        (r#""zero_quantized_weights": true"#, "`zero_optimization.zero_quantized_weights`"),
        (r#""zero_quantized_nontrainable_weights": true"#, "`zero_optimization.zero_quantized_nontrainable_weights`"),
        (r#""zero_quantized_gradients": true"#, "`zero_optimization.zero_quantized_gradients`"),
        (r#""zeropp_loco_param": {"err_beta": 0.8}"#, "`zero_optimization.zeropp_loco_param`"),
        (r#""mics_shard_size": 4"#, "`zero_optimization.mics_shard_size`"),
    ] {
        assert_one(&ranks(&inside(entry), &machine(None, 2)).1, part);
    }
    // As they were written long ago.
    for (entry, optimizer) in [(r#""cpu_offload": true"#, true), (r#""cpu_offload_param": true"#, false)] {
        let other = text("\"offload_optimizer\": {\"device\": \"none\", \"pin_memory\": true},", &format!("{entry},"));
        let other = if optimizer {
            other
        } else {
            text("\"offload_param\": {\"device\": \"none\", \"pin_memory\": true},", &format!("{entry},"))
        };
        assert_eq!(silent(&other, &machine(None, 2)), offloading(plain(), optimizer, !optimizer), "{entry}");
    }
    for (entry, part) in [
        (r#""zenflow": {"topk_ratio": 0.1}"#, "asks for `zero_optimization.zenflow`, which is not supported"),
        (r#""overlap_com": true"#, "has `zero_optimization.overlap_com`, which is not known"),
        (r#""stage3_max_live_parameter": 1"#, "has `zero_optimization.stage3_max_live_parameter`, which is not known"),
        (r#""cpu_offload_params": true"#, "which is not known"),
    ] {
        assert_one(&errors(&inside(entry), &cpu()), part);
    }
    let near = load(&inside(r#""overlap_com": true"#), &cpu()).expect_err("no such key").to_string();
    assert!(near.contains("did you mean `overlap_comm`"), "{near}");
    for (old, new, part) in [
        ("\"stage\": 3", "\"stage\": 5", "has `zero_optimization.stage: 5`"),
        ("\"stage\": 3", "\"stage\": true", "has `zero_optimization.stage: true`"),
        ("\"pin_memory\": true}", "\"pinned\": true}", "offload_optimizer.pinned`, which is not known"),
        ("{\"device\": \"none\"", "{\"device\": \"gpu\"", "has `zero_optimization.offload_optimizer: \"gpu\"`"),
        ("\"hysteresis\": 2", "\"hysteresys\": 2", "has `fp16.hysteresys`, which is not known"),
        ("_threshold\": \"auto\"", "_threshold\": -1", "stage3_param_persistence_threshold: -1`"),
        ("\"steps_per_print\"", "\"autotp_size\": 2, \"steps_per_print\"", "asks for `autotp_size`"),
        ("\"steps_per_print\"", "\"steps_per_prin\"", "has `steps_per_prin`, which is not known"),
    ] {
        let found = errors(&text(old, new), &cpu());
        assert!(found[0].contains(part), "{new}: {found:?}");
    }
    let cpu_offload = text("\"none\"", "\"cpu\"");
    silent(&cpu_offload, &cpu());
    silent(&format!("{cpu_offload}use_cpu: true\n"), &machine(None, 2));
    let plain = with_live(of(ZeroStage::Parameters, 2));
    assert_eq!(silent(&cpu_offload, &machine(None, 2)), offloading(plain, true, true));
    let OffloadSettings { optimizer, params, optimizer_path, params_path, .. } =
        silent(&text("\"none\"", "\"nvme\", \"nvme_path\": \"/x\""), &cpu()).offload;
    assert_eq!([optimizer, params], [OffloadDevice::Nvme; 2]);
    assert_eq!([optimizer_path, params_path], [Some("/x".into()), Some("/x".into())]);
    // As it was written long ago.
    assert_eq!(silent("deepspeed: {zero_optimization: true}\nnum_processes: 2\n", &cpu()).stage, ZeroStage::Optimizer);
}

#[test]
fn what_stands_in_the_configuration_counts_more_than_the_file() {
    let zero3 = "accelerate_config: zero3\nnum_processes: 2\n";
    let (found, warnings) = ranks(&format!("{zero3}zero_stage: 1\n"), &cpu());
    assert_eq!(found, of(ZeroStage::Optimizer, 2));
    assert_one(&warnings, "zero3 says 3 for `zero_stage`, and the configuration says 1, which counts");
    assert_eq!(silent(&format!("{zero3}zero_stage: 3\n"), &cpu()).stage, ZeroStage::Parameters);
    assert_eq!(silent(&format!("{zero3}zero_stage: auto\n"), &cpu()).stage, ZeroStage::Parameters);
    assert!(!silent(&format!("{zero3}zero_stage: auto\n"), &cpu()).is_stage_auto);
    let open = silent("zero_stage: auto\nnum_processes: 2\n", &cpu());
    assert_eq!((open.stage, open.is_stage_auto), (ZeroStage::Replicated, true));
    assert!(!silent("num_processes: 2\n", &cpu()).is_stage_auto);
    for (text, stage) in [("0", 0), ("1", 1), ("\"2\"", 2), ("3.0", 3)] {
        assert_eq!(silent(&format!("num_processes: 2\nzero_stage: {text}\n"), &cpu()).stage.number(), stage, "{text}");
    }
    for text in ["4", "-1", "two", "1.5", "[1]"] {
        assert_one(&errors(&format!("zero_stage: {text}\n"), &cpu()), "`zero_stage` ");
    }
    // DeepSpeed's own file counts more than accelerate's, and its silence is no wish.
    let both = "deepspeed: {zero_optimization: {stage: 1}}\naccelerate_config: zero3\n";
    let (found, warnings) = ranks(both, &cpu());
    assert_eq!(found.stage, ZeroStage::Optimizer);
    assert_one(&warnings, "zero3 says 3 for `zero_stage`, and deepspeed says 1");
    let both = "deepspeed: {}\naccelerate_config: {distributed_type: DEEPSPEED, num_processes: 2}\n";
    assert_eq!(silent(both, &cpu()), of(ZeroStage::Replicated, 2));

    let threshold = |lines: &str| silent(lines, &cpu()).param_persistence_threshold;
    assert_eq!(threshold(""), 100_000);
    for (text, number) in [("1e5", 100_000), ("0", 0), ("10_000", 10_000), ("1000000000000", 1_000_000_000_000)] {
        assert_eq!(threshold(&format!("stage3_param_persistence_threshold: {text}\n")), number, "{text}");
        let map = format!("deepspeed: {{zero_optimization: {{stage3_param_persistence_threshold: {text}}}}}\n");
        assert_eq!(threshold(&map), number, "{text}");
    }
    let all = "deepspeed: {zero_optimization: {stage3_param_persistence_threshold: 9223372036854775807}}\n";
    assert_eq!(threshold(all), 1_000_000_000_000);
    assert_one(&errors("stage3_param_persistence_threshold: -1\n", &cpu()), "must not be negative");
    let both = "stage3_param_persistence_threshold: 5\n\
                deepspeed: {zero_optimization: {param_persistence_threshold: 6}}\n";
    let (found, warnings) = ranks(both, &cpu());
    assert_eq!(found.param_persistence_threshold, 5);
    assert_one(&warnings, "says 6 for `stage3_param_persistence_threshold`, and the configuration says 5");

    let (found, warnings) = ranks("zero_stage: 2\n", &cpu());
    assert_eq!(found, of(ZeroStage::Gradients, 1));
    assert_one(&warnings, "this run has one, which holds all of it");
    assert_one(&ranks("accelerate_config: zero2\nnum_processes: 1\n", &cpu()).1, "this run has one");
}

#[test]
fn a_file_within_a_file_says_it_once() {
    let files = Files::new();
    let json = files.write("ds.json", AUTO);
    let outer = |more: &str| {
        let inner =
            format!("deepspeed_config: {{deepspeed_config_file: {}, zero3_init_flag: true{more}}}\n", json.display());
        files.accelerate(&accelerate_file("DEEPSPEED", 4, &inner))
    };
    assert_eq!(silent(&outer(""), &cpu()), with_live(of(ZeroStage::Parameters, 4)));
    assert_eq!(silent(&outer(", zero_stage: 3"), &cpu()), with_live(of(ZeroStage::Parameters, 4)));
    assert_one(&errors(&outer(", zero_stage: 2"), &cpu()), "asks for ZeRO stage 3");
    std::fs::write(&json, r#"{"train_micro_batch_size_per_gpu": "auto"}"#).expect("the file again");
    assert_eq!(silent(&outer(""), &cpu()), of(ZeroStage::Replicated, 4));
    std::fs::remove_file(&json).expect("the file is there");
    assert_one(&errors(&outer(""), &cpu()), "which cannot be read");
}

#[test]
fn files_under_the_others_key_are_recognised() {
    let files = Files::new();
    let json = files.write("ds.json", AUTO);
    let wrong = errors(&format!("accelerate_config: {}\n", json.display()), &cpu());
    assert_one(&wrong, "is a DeepSpeed configuration");
    let yaml = files.write("zero3.yaml", &accelerate_file("DEEPSPEED", 8, ZERO3));
    assert_one(&errors(&format!("deepspeed: {}\n", yaml.display()), &cpu()), "is accelerate's launch file");
}

#[test]
fn ranks_speak_through_host_memory() {
    for text in ["null", "gloo", "GLOO"] {
        silent(&format!("ddp_backend: {text}\n"), &cpu());
    }
    let (found, warnings) = ranks("ddp_backend: nccl\n", &cpu());
    assert_eq!(found.backend, RankBackend::Auto);
    assert_one(&warnings, "`ddp_backend: nccl` is for GPUs");
    assert_eq!(silent("ddp_backend: NCCL\n", &machine(None, 2)).backend, RankBackend::Nccl);
    assert!(silent("ddp_backend: gloo\n", &machine(None, 2)).backend.may_share_gpus());
    for text in ["mpi", "ccl", "hccl", "[gloo]"] {
        assert_one(&errors(&format!("ddp_backend: {text}\n"), &cpu()), "`ddp_backend` ");
    }
    assert_eq!(silent("", &cpu()).timeout_secs, 1800);
    assert_eq!(silent("ddp_timeout: 18000\n", &cpu()).timeout_secs, 18_000);
    assert_one(&errors("ddp_timeout: 0\n", &cpu()), "at least 1 and at most 1e9 (seconds)");
}

#[test]
fn what_waits_in_host_memory_is_said_by_keys_and_files() {
    let gpu = machine(None, 2);
    let both = "offload_optimizer_device: cpu\noffload_param_device: CPU\n";
    assert_eq!(silent(both, &gpu), offloading(of(ZeroStage::Replicated, 2), true, true));
    let live = "stage3_max_live_parameters: 5e8\npin_memory: false\noffload_param_device: cpu\n";
    let OffloadSettings { max_live_parameters, pin_memory, .. } = silent(live, &gpu).offload;
    assert_eq!((max_live_parameters, pin_memory), (Some(500_000_000), false));
    let file = "accelerate_config: {distributed_type: DEEPSPEED, num_processes: 2, deepspeed_config: \
                {zero_stage: 3, offload_param_device: cpu}}\n";
    assert_eq!(silent(file, &gpu), offloading(of(ZeroStage::Parameters, 2), false, true));
    let (found, warnings) = ranks(&format!("{file}offload_param_device: none\n"), &gpu);
    assert_eq!(found, of(ZeroStage::Parameters, 2));
    assert_one(&warnings, "says cpu for `offload_param_device`, and the configuration says none, which counts");
    let pinned = |outer: &str, inner: &str| {
        let map = format!("{{zero_optimization: {{stage: 2, offload_optimizer: {{device: cpu{inner}}}}}}}");
        silent(&format!("deepspeed: {map}\n{outer}"), &gpu).offload.pin_memory
    };
    assert_eq!(
        [pinned("", ""), pinned("", ", pin_memory: true"), pinned("", ", pin_memory: false")],
        [true, true, false]
    );
    assert!(!pinned("pin_memory: false\n", ", pin_memory: false"), "nothing to say where both agree");
    let file = "deepspeed: {zero_optimization: {offload_optimizer: {device: cpu, pin_memory: false}}}\n";
    let (found, warnings) = ranks(&format!("{file}pin_memory: true\n"), &gpu);
    assert!(found.offload.pin_memory, "the configuration counts more");
    assert_one(&warnings, "says false for `pin_memory`, and the configuration says true, which counts");
    assert_one(&errors("offload_optimizer_device: disk\n", &gpu), "`offload_optimizer_device` ");
}

#[test]
fn what_waits_in_files_is_said_by_keys_and_files() {
    let nvme = |lines: &str| silent(lines, &cpu()).offload;
    let both = "offload_optimizer_device: nvme\noffload_param_device: NVMe\n";
    let one = nvme(&format!("{both}offload_param_nvme_path: /a\n"));
    assert_eq!([&one.optimizer_path, &one.params_path], [&Some("/a".into()), &Some("/a".into())]);
    assert_eq!(one.buffer_count, 3);
    let two =
        nvme(&format!("{both}offload_param_nvme_path: /a\noffload_optimizer_nvme_path: /b\noffload_buffer_count: 7\n"));
    assert_eq!((two.optimizer_path, two.params_path, two.buffer_count), (Some("/b".into()), Some("/a".into()), 7));
    // What does not wait in files has no folder.
    let half = nvme("offload_param_device: nvme\noffload_optimizer_nvme_path: /b\n");
    assert_eq!((half.optimizer_path, half.params_path), (None, Some("/b".into())));
    let wrong = errors(both, &cpu());
    assert_eq!(wrong.len(), 2, "{wrong:?}");
    assert!(wrong.iter().all(|text| text.contains("needs a folder for its files")), "{wrong:?}");
    assert_one(&ranks("offload_param_nvme_path: /a\n", &cpu()).1, "`offload_param_nvme_path` has no effect");
    assert_one(&errors("offload_buffer_count: 0\n", &cpu()), "at least 1");
    // What acts on nothing is said, a default that is written down is not.
    let (found, warnings) = ranks("offload_buffer_count: 7\noffload_param_device: cpu\n", &cpu());
    assert_one(&warnings, "`offload_buffer_count` has no effect: nothing waits in files");
    assert_eq!(found.offload.buffer_count, 3);
    silent("offload_buffer_count: 3\n", &cpu());
    let apart = "offload_param_device: nvme\noffload_param_nvme_path: /a\noffload_optimizer_nvme_path: /b\n";
    let (found, warnings) = ranks(apart, &cpu());
    assert_one(&warnings, "`offload_optimizer_nvme_path` has no effect: what waits in files has a folder of its own");
    assert_eq!((found.offload.optimizer_path, found.offload.params_path), (None, Some("/a".into())));

    let deepspeed = |inner: &str, outer: &str| {
        let offload = format!("{{device: nvme, nvme_path: /x{inner}}}");
        format!("deepspeed: {{zero_optimization: {{offload_param: {offload}}}{outer}}}\n")
    };
    let found = nvme(&deepspeed(", buffer_count: 5, pin_memory: true, pipeline_read: true", ""));
    assert_eq!((found.params, found.buffer_count), (OffloadDevice::Nvme, 5));
    assert_eq!(found.params_path.as_deref(), Some(Path::new("/x")));
    // The larger count of the two acts, and the configuration's before it.
    let two = "deepspeed: {zero_optimization: {offload_param: {device: nvme, nvme_path: /x, buffer_count: 5}, \
               offload_optimizer: {device: nvme, nvme_path: /y, buffer_count: 4}}}\n";
    let found = nvme(two);
    assert_eq!((found.buffer_count, found.optimizer_path.as_deref()), (5, Some(Path::new("/y"))));
    let (found, warnings) = ranks(&format!("{two}offload_buffer_count: 2\n"), &cpu());
    assert_eq!(found.offload.buffer_count, 2);
    assert_one(&warnings, "says 5 for `offload_buffer_count`, and the configuration says 2, which counts");
    // How DeepSpeed reads is taken, and what is done is said.
    let aio =
        ", aio: {block_size: 1048576, queue_depth: 8, thread_count: 1, single_submit: false, overlap_events: true}";
    let (_, warnings) = ranks(&deepspeed("", aio), &cpu());
    assert_one(&warnings, "four threads do");
    assert!(warnings[0].contains("`aio.block_size`"), "{warnings:?}");
    let (_, warnings) = ranks(&deepspeed(", buffer_size: 1e8, max_in_cpu: 1e9", ""), &cpu());
    assert_one(&warnings, "`zero_optimization.offload_param.max_in_cpu`");
    silent("deepspeed: {aio: {block_size: 1048576}}\n", &cpu());
    assert_one(&errors(&deepspeed("", ", aio: {block_sise: 1}"), &cpu()), "has `aio.block_sise`, which is not known");
    assert_one(&errors(&deepspeed(", buffer_count: 0", ""), &cpu()), "buffer_count: 0`");
    let odd = deepspeed("", "").replace("/x", "[x]");
    assert!(errors(&odd, &cpu())[0].contains("nvme_path: [\"x\"]`"));
}

#[test]
fn ranks_survive_the_round_trip() {
    let files = Files::new();
    let eight = files.accelerate(&accelerate_file("DEEPSPEED", 8, ZERO3));
    for (lines, context) in [
        ("", machine(None, 4)),
        ("", machine(Some(3), 1)),
        ("num_processes: 2\nzero_stage: 2\nddp_timeout: 60\nddp_backend: gloo\n", cpu()),
        ("offload_optimizer_device: cpu\npin_memory: false\nstage3_max_live_parameters: 7\n", machine(None, 2)),
        ("offload_param_device: cpu\n", machine(None, 2)),
        ("offload_param_device: nvme\noffload_param_nvme_path: /a b\noffload_buffer_count: 9\n", cpu()),
        ("num_processes: 2\nzero_stage: auto\n", cpu()),
        ("zero_stage: 3\nstage3_param_persistence_threshold: 1000000000000\n", cpu()),
        (eight.as_str(), cpu()),
        (eight.as_str(), machine(Some(8), 0)),
    ] {
        let source = Source::new("a.yaml", format!("{SFT}{lines}"));
        let first = config::load_sft(&source, &[], &context).unwrap_or_else(|error| panic!("{error}"));
        let header = format!("# ranks: {}\n", first.settings.training.ranks.world_size);
        assert!(first.resolved_yaml.contains(&header), "{}", first.resolved_yaml);
        let resolved = Source::new("b.yaml", first.resolved_yaml.as_str());
        for elsewhere in [context, cpu(), machine(None, 2)] {
            if elsewhere.visible_gpus == 0 || context.visible_gpus > 0 {
                assert_same(&first, config::load_sft(&resolved, &[], &elsewhere))
                    .unwrap_or_else(|e| panic!("{lines}{e}"));
            }
        }
    }
    let nccl = Source::new("a.yaml", format!("{SFT}ddp_backend: nccl\n"));
    let first = config::load_sft(&nccl, &[], &machine(None, 2)).unwrap_or_else(|error| panic!("{error}"));
    let again = config::load_sft(&Source::new("b.yaml", first.resolved_yaml.as_str()), &[], &machine(None, 2));
    assert_same(&first, again).unwrap_or_else(|error| panic!("{error}"));
}
