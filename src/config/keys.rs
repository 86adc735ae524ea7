//! The table of keys: the single place that knows their names, types, defaults, ranges, units and texts.
//!
//! The table makes three things: [`KEYS`] for the reference page and for "did you mean", the `RawConfig` that mirrors a
//! file, and its reader. Defaults are those of TRL 1.16 (`SFTConfig`, `GRPOConfig`, `ModelConfig`, `ScriptArguments`)
//! and of transformers 5.24 (`TrainingArguments`); the text of a key says where ours differs, and why.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::diagnose::Problems;
use super::field::{Bounds, Command, Commands, DefaultValue, Field, Key};
use super::launcher::LaunchFile;
use super::mixture::{Datasets, Mixture};
use super::ranges::{ANY, BATCH, FROM_0, FROM_1, GROUP, GROUP_OF_2, POSITIVE, ROWS, SHARE, TOKENS};
use super::rewards::RewardList;
use super::settings::{
    CodeSandbox, CodeScoring, DeviceChoice, GrpoLossType, ImportanceSamplingLevel, LrSchedulerType, QuantType, Resume,
    RewardAggregation, RolloutCorrectionMode, ScaleRewards, SftLossType, TruncationMode, WeightDtype,
};
use super::special::{
    AdamW, ByteCount, Cadence, EvalCadence, Limit, MaxSteps, ModuleNames, Packing, Recurrence, Saving, Sinks,
    TargetModules, TestBatch, TopK,
};
use super::value::Parse;
use super::world::{Backend, Offload, Stage};
use super::yaml::Entry;

use DefaultValue::{Derived, PerCommand, Required, Text};

macro_rules! name {
    ($field:ident) => {
        stringify!($field)
    };
    ($field:ident $name:literal) => {
        $name
    };
}

macro_rules! keys {
    ($($group:literal for $commands:ident {
        $(
            $(#[doc = $doc:literal])+
            $field:ident $(named $name:literal)? : $type:ty = $default:expr, $range:expr, $unit:literal;
        )+
    })+) => {
        /// Every key, in the order of the reference page.
        pub(super) static KEYS: &[Key] = &[$($(Key {
            name: name!($field $($name)?),
            group: $group,
            commands: Commands::$commands,
            kind: <$type as Parse>::KIND,
            values: <$type as Parse>::VALUES,
            default: $default,
            range: $range,
            unit: $unit,
            doc: concat!($($doc),+).trim_ascii(),
        }),+),+];

        /// Places of the fields in [`KEYS`].
        #[expect(non_camel_case_types, reason = "one variant a field, named as the field")]
        enum At { $($($field),+),+ }

        /// What the file says, key by key, before any check across keys.
        pub(super) struct RawConfig {
            $($( $(#[doc = $doc])+ pub(super) $field: Field<$type>, )+)+
        }

        impl RawConfig {
            /// Every field with its default.
            pub(super) fn new(command: Command) -> Self {
                Self { $($($field: Field::new(&KEYS[At::$field as usize], command)),+),+ }
            }

            /// Takes one entry of the file; false if the command has no such key.
            pub(super) fn read(
                &mut self,
                command: Command,
                entry: &Entry,
                source: usize,
                problems: &mut Problems,
            ) -> bool {
                $($(
                    if entry.key == name!($field $($name)?) && Commands::$commands.include(command) {
                        self.$field.read(entry, source, problems);
                        return true;
                    }
                )+)+
                false
            }

            /// Reports required keys that the file lacks, but not those that it misspells: that is reported already.
            pub(super) fn require(&mut self, command: Command, misspelt: &[&str], problems: &mut Problems) {
                $($(
                    if Commands::$commands.include(command) && !misspelt.contains(&name!($field $($name)?)) {
                        self.$field.require(command, problems);
                    }
                )+)+
            }
        }
    };
}

keys! {
    "Model" for Both {
        /// The base model: a folder with config.json and safetensors files, a `.gguf` file, or a hub id.
        /// A path is relative to the working directory.
        model_name_or_path: String = Required, ANY, "";
        /// Branch, tag or commit, if the model is a hub id.
        model_revision: String = Text("main"), ANY, "";
        /// A tokenizer elsewhere than in the model folder: a folder, a tokenizer.json or a hub id. Not in TRL.
        tokenizer_name_or_path: Option<String> = Text("null"), ANY, "";
        /// A chat template in place of the model's: its text, or what `chat_template_path` takes. Not in TRL.
        chat_template: Option<String> = Text("null"), ANY, "";
        /// Where to take a chat template from in place of the model's: a Jinja file, a folder with a tokenizer, or a hub id.
        /// Of a folder or a hub id the end-of-sequence token is taken too, as in TRL. For GRPO not in TRL.
        chat_template_path: Option<PathBuf> = Text("null"), ANY, "";
        /// The token that ends a sequence, in place of the tokenizer's: appended to plain text, ends generation, and saved
        /// with the model. For GRPO not in TRL.
        eos_token: Option<String> = Text("null"), ANY, "";
        /// Start from random weights of the shape in the model folder's config.json instead of stored ones. Not in TRL.
        init_random: bool = Text("false"), ANY, "";
        /// Storage type of base weights that are not quantised; `auto` keeps the type of the file. TRL's default is
        /// float32, which doubles the memory of a 16-bit model and adds nothing: trained weights have float32
        /// masters in any case. `torch_dtype` is the same key.
        dtype: WeightDtype = Text("auto"), ANY, "";
        /// Quantise the linear weights of the decoder layers to 4 bits while loading; needs `use_peft: true`.
        /// Tensors of a GGUF file stay as they are stored.
        load_in_4bit: bool = Text("false"), ANY, "";
        /// Code book of `load_in_4bit`.
        bnb_4bit_quant_type: QuantType = Text("nf4"), ANY, "";
        /// Quantise the block maxima of `load_in_4bit` as well: 4.13 instead of 4.5 bits per weight.
        /// `bnb_4bit_use_double_quant` is the same key.
        use_bnb_nested_quant: bool = Text("false"), ANY, "";
    }
    "Adapter" for Both {
        /// Train a LoRA adapter and keep the base frozen; without it every weight is trained.
        use_peft: bool = Text("false"), ANY, "";
        /// Rank of the adapter.
        lora_r: usize = Text("16"), Bounds::between(1.0, 16_384.0), "";
        /// Numerator of the adapter's scale: its update is multiplied by `lora_alpha / lora_r`.
        lora_alpha: f64 = Text("32"), POSITIVE, "";
        /// Probability of dropping an input element of the adapter.
        lora_dropout: f64 = Text("0.05"), SHARE.below_high(), "";
        /// Modules that get an adapter: names (a list, or one text with commas), `all-linear` for the seven projections, or a
        /// regular expression that the whole module path matches, e.g. `model\.layers\.1\d\..*(q|v)_proj`. A name is a
        /// module's path or its end, e.g. `q_proj`, `layers.3.mlp.up_proj`, `lm_head`, `embed_tokens`; the last two only on the
        /// CPU. null is PEFT's choice for Qwen models, the default.
        lora_target_modules: TargetModules = Text("[q_proj, v_proj]"), ANY, "";
        /// Modules trained whole beside the adapter, as copies that are saved with it: `embed_tokens`, `lm_head`, norms, or
        /// any module whose path ends so, with all that is in it. Every weight of them has a float32 master and moments. With
        /// a tied head, the embedding and the head become two matrices, as in PEFT.
        lora_modules_to_save: ModuleNames = Text("[]"), ANY, "";
        /// Scale the adapter's update by `lora_alpha / sqrt(lora_r)` (rsLoRA, 2312.03732).
        use_rslora: bool = Text("false"), ANY, "";
        /// Train the length of each row of an adapted weight apart from its direction (DoRA, 2402.09353). Only on the CPU.
        use_dora: bool = Text("false"), ANY, "";
        /// Go on training this PEFT adapter (a folder) instead of a fresh one; needs `use_peft: true`. Not in TRL.
        adapter_name_or_path: Option<PathBuf> = Text("null"), ANY, "";
    }
    "Data" for Both {
        /// A data file (`.jsonl`, `.json`, `.parquet`, `.arrow`, `.csv`, `.tsv`, `.txt`, also `.jsonl.gz` and the like), a
        /// folder of them or one that `save_to_disk` wrote, or a hub id. A path is relative to the working directory.
        dataset_name: Option<String> = Required, ANY, "";
        /// Configuration: one that the data set's README names, or a sub-folder.
        dataset_config: Option<String> = Text("null"), ANY, "";
        /// Branch, tag or commit, if the data set is a hub id. Not in TRL.
        dataset_revision: String = Text("main"), ANY, "";
        /// Split to train on: of a folder, the files whose names carry it. As in `datasets` also slices and sums:
        /// `train[:1000]`, `train[10%:20%]`, `train_sft+train_gen`.
        dataset_train_split: String = Text("train"), ANY, "";
        /// Split to evaluate on, if `eval_strategy` or `eval_on_start` asks for it.
        dataset_test_split: String = Text("test"), ANY, "";
        /// Several data sets instead of `dataset_name`, in open-r1's form: `datasets` (a list of `id`, `config`, `split`,
        /// `columns`, `weight`), `seed` and `test_split_size`. Of a data set with `weight` that share of its rows is drawn;
        /// all rows are shuffled by `seed`. `test_split_size` holds rows out for evaluation.
        dataset_mixture: Mixture = Text("null"), ANY, "";
        /// Several data sets instead of `dataset_name`, in TRL's form: a list of `path`, `name`, `data_dir`, `data_files`,
        /// `split`, `columns`, `fraction`. They follow one another; with `fraction` the first rows of each are taken, so
        /// many that the shares are right and no row comes twice.
        datasets: Datasets = Text("[]"), ANY, "";
        /// With `datasets`: hold out this share of the rows (below 1), or this number of them, for evaluation.
        test_split_size: Option<f64> = Text("null"), POSITIVE, "share of rows, or rows";
        /// Rename columns: `{question: prompt, answer: completion}`. Not in TRL.
        dataset_columns: Map<String, Value> = Text("{}"), ANY, "";
        /// Hold out this share of the training rows for evaluation when there is no test split. Not in TRL.
        eval_fraction: Option<f64> = Text("null"), SHARE.above_low().below_high(), "share of rows";
        /// Use at most this many training rows. Not in TRL.
        max_train_samples: Option<usize> = Text("null"), ROWS, "rows";
        /// Use at most this many evaluation rows. Not in TRL.
        max_eval_samples: Option<usize> = Text("null"), ROWS, "rows";
        /// A folder that `trainer preprocess` wrote for this configuration: its tokens are trained on, and no data set is read.
        /// The keys that say what the data are stay as they are and are compared, as are tokenizer and chat template. Not in
        /// TRL.
        preprocessed: Option<PathBuf> = Text("null"), ANY, "";
        /// Extra variables for the chat template, e.g. `{enable_thinking: false}`.
        chat_template_kwargs: Map<String, Value> = Text("{}"), ANY, "";
        /// A system message put in front of conversational prompts that have none. Not in TRL.
        system_prompt: Option<String> = Text("null"), ANY, "";
    }
    "Length of the run and batches" for Both {
        /// Passes over the training data; without effect when `max_steps` is set.
        num_train_epochs: f64 = Text("3.0"), Bounds::between(0.0, 1e5).above_low(), "epochs";
        /// Optimizer steps of the run; -1 leaves its length to `num_train_epochs`.
        max_steps: MaxSteps = Text("-1"), FROM_1, "optimizer steps";
        /// Sequences per rank and micro-step.
        per_device_train_batch_size: usize = Text("8"), BATCH, "sequences";
        /// Sequences per rank and evaluation step.
        per_device_eval_batch_size: usize = Text("8"), BATCH, "sequences";
        /// Micro-steps per optimizer step.
        gradient_accumulation_steps: usize = Text("1"), BATCH, "micro-steps";
        /// Environment variables, which TRL sets. Here they are set where the program is started: a warning names those
        /// that differ, and an error those that this program reads.
        env: Map<String, Value> = Text("{}"), ANY, "";
        /// Seed of every random stream.
        seed: u64 = Text("42"), ANY, "";
        /// Seed of the order of the data.
        data_seed: Option<u64> = Derived("`seed`"), ANY, "";
    }
    "Ranks and memory" for Both {
        /// Ranks of the run, each a process with a GPU or CPU cores of its own. They are started by this program, all on this
        /// machine. Under srun, torchrun or mpirun their number is what that started, and another one here is an error.
        num_processes: Option<usize> = Derived(
            "what a launch file says, else with `device: auto` the number of visible GPUs, else 1"
        ), Bounds::between(1.0, 1e6), "ranks";
        /// Stage of ZeRO: 0 keeps everything on every rank (data parallelism), 1 shards the optimizer's state, 2 gradients as
        /// well, 3 parameters as well, frozen and 4-bit ones too. `auto` is what a launch file says, else the first of them with
        /// which the run fits its devices by the estimate of `trainer estimate`; the plan says why. Results are the same. Not in
        /// TRL.
        zero_stage: Option<Stage> = Derived("what a launch file says, else 0"), ANY, "";
        /// With stage 3: parameters of at most so many values stay on every rank. Not in TRL; DeepSpeed's key and default.
        stage3_param_persistence_threshold: Option<usize> = Derived("what a launch file says, else 100000"),
            Bounds::between(0.0, 1e12), "values";
        /// Where the optimizer's state, the gradients and the f32 values that it moves wait beside a GPU: `cpu` is host memory,
        /// where the optimizer then works, on all cores; with `nvme` state and values lie in a file of
        /// `offload_optimizer_nvme_path`, also where the CPU computes, and gradients in host memory. Results are the same, but
        /// that GRPO of all weights in 16 bits draws in recorded steps then; an optimizer of 8 bits has them there, and 32 on a
        /// GPU. Not in TRL; accelerate's key.
        offload_optimizer_device: Option<Offload> = Derived("what a launch file says, else `none`"), ANY, "";
        /// Where parameters wait beside a GPU: `cpu` is host memory, from which each block comes for as long as it is computed
        /// with, packed as it is, while the one before computes; `nvme` is a file of `offload_param_nvme_path`, also where the
        /// CPU computes. With one rank too. Not in TRL; accelerate's key.
        offload_param_device: Option<Offload> = Derived("what a launch file says, else `none`"), ANY, "";
        /// A folder on a fast disk of this machine for `offload_optimizer_device: nvme`. Each rank has a file of its own there,
        /// named by run and rank, which goes with the run; one that a killed run left is removed by the next that uses the
        /// folder. Not in TRL; accelerate's key.
        offload_optimizer_nvme_path: Option<PathBuf> = Derived("what a launch file says, else the other one's"), ANY, "";
        /// The same for `offload_param_device: nvme`. Not in TRL; accelerate's key.
        offload_param_nvme_path: Option<PathBuf> = Derived("what a launch file says, else the other one's"), ANY, "";
        /// Blocks of which something may be on its way from or to files at a time, with the one that is used: so many take host
        /// memory. 1 reads nothing ahead. Not in TRL; DeepSpeed's `buffer_count`, of which the larger one acts.
        offload_buffer_count: Option<usize> = Derived("what a launch file says, else 3"), Bounds::between(1.0, 1024.0), "blocks";
        /// Lock the pages of what waits in host memory, so that the GPU copies it by itself. Not in TRL; DeepSpeed's key.
        pin_memory: bool = Text("true"), ANY, "";
        /// Values of parameters that may be on a GPU at a time where blocks come from other ranks or from host memory: a block
        /// that is needed again soon stays. Two blocks always may. Not in TRL; DeepSpeed's key.
        stage3_max_live_parameters: Option<usize> = Derived("what a launch file says, else two blocks"),
            Bounds::between(0.0, 1e12), "values";
        /// A DeepSpeed configuration, as a JSON file or a map. Its stage of ZeRO and what it offloads act, `auto` is what this file
        /// says, what is not done and only saves memory is a warning, and what would change the result an error.
        deepspeed: Option<LaunchFile> = Text("null"), ANY, "";
        /// accelerate's launch file, or TRL's name of one (`zero2`), taken in the same way; its number of processes acts too.
        /// `--config-file FILE` is the same. Keys of this group that stand here count more than the file.
        accelerate_config: Option<LaunchFile> = Text("null"), ANY, "";
        /// How long a rank waits for another before the run ends.
        ddp_timeout: u64 = Text("1800"), FROM_1, "seconds";
        /// What ranks exchange the memory of GPUs with: `nccl`, which they do where each has its own, or `gloo`, through host
        /// memory, which allows two ranks on one GPU. On CPUs it is host memory.
        ddp_backend: Option<Backend> = Text("null"), ANY, "";
    }
    "Optimizer and schedule" for Both {
        /// Peak learning rate.
        learning_rate: f64 = PerCommand { sft: "2.0e-5", grpo: "1.0e-6" }, Bounds::between(0.0, f64::INFINITY), "";
        /// Course of the learning rate after the warm-up.
        lr_scheduler_type: LrSchedulerType = Text("linear"), ANY, "";
        /// Arguments of the schedule, by transformers' names, e.g. `{min_lr_rate: 0.1}` for `cosine_with_min_lr`.
        lr_scheduler_kwargs: Map<String, Value> = Text("{}"), ANY, "";
        /// Linear warm-up in optimizer steps; below 1, the share of all optimizer steps.
        warmup_steps: f64 = Text("0"), Bounds::between(0.0, 1e9), "optimizer steps";
        /// Linear warm-up as a share of all optimizer steps, rounded up. transformers 5 says it with a fraction in
        /// `warmup_steps`.
        warmup_ratio: Option<f64> = Text("null"), SHARE, "share of steps";
        /// The optimizer: every name of an AdamW means that of this program, with moments in float32, and in blocks of 8 bits for
        /// names with `8bit` on the CPU; Lion with AdamW's betas; Muon for matrices, with AdamW's rate, and AdamW for the rest.
        /// Lion and Muon are computed on the CPU only.
        optim: AdamW = Text("adamw_torch"), ANY, "";
        /// Decoupled weight decay of AdamW; biases and norm weights have none.
        weight_decay: f64 = Text("0.0"), Bounds::between(0.0, 1000.0), "";
        /// Decay of AdamW's first moment.
        adam_beta1: f64 = Text("0.9"), SHARE.below_high(), "";
        /// Decay of AdamW's second moment.
        adam_beta2: f64 = Text("0.999"), SHARE.below_high(), "";
        /// Added to the root of AdamW's second moment.
        adam_epsilon: f64 = Text("1.0e-8"), Bounds::between(0.0, 1.0).above_low(), "";
        /// Largest L2 norm of all gradients together; 0 switches clipping off.
        max_grad_norm: f64 = Text("1.0"), Bounds::between(0.0, 1e12), "";
        /// Add uniform noise of at most `alpha / sqrt(L * D)` to the embeddings of `L` tokens of width `D` in training passes
        /// (NEFTune, 2310.05914). `L` is the length of the token's own sequence: of the example, also where several are packed,
        /// and of the whole row only with `packing_strategy: wrapped`. null or 0 is off.
        neftune_noise_alpha: Option<f64> = Text("null"), FROM_0, "";
    }
    "Precision and device" for Both {
        /// Compute in bfloat16 with float32 accumulation. TRL's default is true unless `fp16` is set; here it also
        /// takes a device that has bfloat16 arithmetic, otherwise float32 is computed in.
        bf16: Option<bool> = Derived("true on a GPU with bfloat16 (compute capability 8.0) unless `fp16`"), ANY, "";
        /// Compute in float16 with float32 accumulation and dynamic loss scaling.
        fp16: bool = Text("false"), ANY, "";
        /// Recompute activations in the backward pass instead of keeping them: less memory, a third more compute.
        /// `activation_checkpointing` is the same key.
        gradient_checkpointing: bool = Text("true"), ANY, "";
        /// Recompute only the first so many decoder layers and keep the activations of the others: each layer that is kept
        /// saves its second forward pass and costs its activations. Not in TRL.
        gradient_checkpointing_layers: Option<usize> = Derived("all of them"), Bounds::between(0.0, 10_000.0), "layers";
        /// Keep what recomputation starts from and, as far as the copies hide behind products, attention's results and inputs in
        /// page-locked host memory while they are not needed: less device memory, and less to recompute. Small models park less,
        /// which is said. Only on a GPU, with `gradient_checkpointing`.
        activation_offloading: bool = Text("false"), ANY, "";
        /// On a GPU, take the library's first choice for each product instead of timing several, or what `choices.json` of an
        /// earlier run in `output_dir` says, and add up attention's gradients in a fixed order: repeated runs then have the same
        /// bits, and are a few percent slower. On the CPU they always have.
        full_determinism: bool = Text("false"), ANY, "";
        /// Where to compute: `auto` takes a GPU if there is one and the build can use it. Not in TRL.
        device: DeviceChoice = Text("auto"), ANY, "";
        /// Most memory that a rank takes of its GPU, all in all, e.g. `11GB` or `8GiB`: a run that needs more ends as on a smaller card.
        /// null is all there is. Not in TRL.
        device_memory_limit: Option<ByteCount> = Text("null"), ANY, "";
        /// Compute on the CPU: the same as `device: cpu`.
        use_cpu: bool = Text("false"), ANY, "";
    }
    "Output, logging, evaluation, saving" for Both {
        /// Folder for everything the run leaves.
        output_dir: Option<PathBuf> = Text("trainer_output"), ANY, "";
        /// Allow an `output_dir` that already holds a run.
        overwrite_output_dir: bool = Text("false"), ANY, "";
        /// Go on from a checkpoint: true takes the newest whole one of `output_dir`, a path that one, and `auto` the newest one
        /// or a start where there is none, for jobs that are put back into a queue.
        resume_from_checkpoint: Resume = Text("false"), ANY, "";
        /// When to log: every `logging_steps`, at the end of each epoch, or not at all; the last step is always logged.
        logging_strategy: Recurrence = Text("steps"), ANY, "";
        /// Optimizer steps between two log lines, for `logging_strategy: steps`; below 1, the share of all steps, rounded
        /// up.
        logging_steps: Cadence = Text("10"), FROM_1, "optimizer steps";
        /// Log the first step as well.
        logging_first_step: bool = Text("false"), ANY, "";
        /// Metric sinks besides `output_dir/metrics.jsonl`. Nothing is sent to a tracker: a tracker's name (`wandb`,
        /// `trackio`, `mlflow`, `swanlab`, `all`, ...) writes TensorBoard's files, with a warning.
        report_to: Sinks = Text("none"), ANY, "";
        /// Hide progress bars.
        disable_tqdm: Option<bool> = Text("false"), ANY, "";
        /// When to evaluate.
        eval_strategy: Recurrence = Text("no"), ANY, "";
        /// Evaluate before the first step as well.
        eval_on_start: bool = Text("false"), ANY, "";
        /// Optimizer steps, or with `eval_strategy: epoch` epochs, before the first evaluation of that strategy.
        eval_delay: f64 = Text("0"), Bounds::between(0.0, 1e9), "optimizer steps or epochs";
        /// Optimizer steps between two evaluations, for `eval_strategy: steps`; below 1, the share of all steps, rounded up.
        eval_steps: EvalCadence = Derived("`logging_steps`"), FROM_1, "optimizer steps";
        /// When to save a checkpoint; the end of the run is always saved.
        /// `best` saves whenever an evaluation found a new best value of `metric_for_best_model`.
        save_strategy: Saving = Text("steps"), ANY, "";
        /// Optimizer steps between two checkpoints, for `save_strategy: steps`; below 1, the share of all steps, rounded up.
        save_steps: Cadence = Text("500"), FROM_1, "optimizer steps";
        /// Keep at most this many checkpoints, the newest ones, and beside the newest always the best one by
        /// `metric_for_best_model`. With 1 only the best one is left at the end. null, 0 and -1 keep all.
        save_total_limit: Limit = Text("null"), Bounds::between(1.0, 1e6), "checkpoints";
        /// Save the model without the optimizer's state: smaller checkpoints, from which no run can go on.
        save_only_model: bool = Text("false"), ANY, "";
        /// Leave the best checkpoint's model in `output_dir` at the end, not the last one. `eval_strategy` and `save_strategy`
        /// must then be the same and `save_steps` a multiple of `eval_steps`, or `save_strategy` be `best`.
        load_best_model_at_end: bool = Text("false"), ANY, "";
        /// The metric of evaluations that decides which checkpoint is the best, with or without `eval_` in front.
        metric_for_best_model: Option<String> = Derived("`loss` with `load_best_model_at_end`, otherwise none"), ANY, "";
        /// Whether a larger value of that metric is better.
        greater_is_better: Option<bool> = Derived("true unless the metric's name ends in `loss`"), ANY, "";
        /// Stop the run when this many evaluations in a row did not improve on the best value of `metric_for_best_model`; as
        /// transformers' `EarlyStoppingCallback`, which has no key there.
        early_stopping_patience: Option<usize> = Text("null"), FROM_1, "evaluations";
        /// What counts as an improvement for `early_stopping_patience`: more than this. Not a key in transformers.
        early_stopping_threshold: f64 = Text("0.0"), FROM_0, "";
        /// Go on from a checkpoint although the rows, the weights, the tokenizer, the chat template or a reward program are not
        /// what they were when it was saved. Without it such a run is refused. Not in TRL.
        resume_with_changed_inputs: bool = Text("false"), ANY, "";
        /// Print, at the end of the run, the command that uploads `output_dir` to the hub. Nothing is uploaded by itself.
        push_to_hub: bool = Text("false"), ANY, "";
        /// The repository of that command. `push_to_hub_model_id` is the same key.
        hub_model_id: Option<String> = Derived("the name of `output_dir`"), ANY, "";
        /// The branch of that command. `hub_model_revision` is the same key.
        hub_revision: Option<String> = Text("null"), ANY, "";
        /// Whether that command makes a private repository.
        hub_private_repo: Option<bool> = Text("null"), ANY, "";
    }
    "Supervised fine-tuning" for Sft {
        /// Column with plain text.
        dataset_text_field: String = Text("text"), ANY, "";
        /// Longest example; what is longer is cut, see `truncation_mode`. null keeps every length.
        max_length: Option<usize> = Text("1024"), Bounds::between(2.0, 4_194_304.0), "tokens";
        /// What is kept of an example longer than `max_length`: its start, or its end. Without effect under packing, which
        /// has ways of its own to cut.
        truncation_mode: TruncationMode = Text("keep_start"), ANY, "";
        /// Put several examples into one sequence of `max_length` tokens.
        packing: bool = Text("false"), ANY, "";
        /// How examples are packed: `bfd` fits whole examples and cuts what is too long, `bfd_split` splits what is too
        /// long, `wrapped` cuts the stream of all tokens every `max_length` tokens.
        packing_strategy: Packing = Text("bfd"), ANY, "";
        /// As `packing`, for the evaluation split.
        eval_packing: Option<bool> = Derived("`packing`"), ANY, "";
        /// Leave out the sequences of an epoch that do not fill a batch, instead of taking them as a smaller last batch.
        /// Evaluation takes every sequence in any case.
        dataloader_drop_last: bool = Text("false"), ANY, "";
        /// Train on the completion only; null does so for rows with `prompt` and `completion`.
        completion_only_loss: Option<bool> = Text("null"), ANY, "";
        /// Train on the assistant's turns only; needs rows with `messages`.
        assistant_only_loss: bool = Text("false"), ANY, "";
        /// `nll` is cross-entropy, `dft` weights it by the token's own probability (2508.05629), `chunked_nll` is
        /// TRL's old name for `nll`.
        sft_loss_type named "loss_type": SftLossType = Text("nll"), ANY, "";
        /// Share of each target's probability that is spread evenly over the vocabulary (label smoothing, 1512.00567), in
        /// training and in `eval_loss`; 0 is off. Only on the CPU.
        label_smoothing_factor: f64 = Text("0.0"), SHARE, "share";
    }
    "Groups and rollout" for Grpo {
        /// Column with the prompts, as in open-r1: a text in it becomes one message of a user, so that the chat template
        /// applies. null reads the column `prompt` as it stands. Not in TRL.
        dataset_prompt_column: Option<String> = Text("null"), ANY, "";
        /// Completions sampled per prompt: the group size.
        num_generations: usize = Text("8"), GROUP_OF_2, "completions";
        /// The same for evaluation.
        num_generations_eval: Option<usize> = Derived("`num_generations`"), GROUP, "completions";
        /// Longest prompt; a longer one is an error that names its row, unless `truncate_prompts` is set. null takes
        /// every length the model can hold. Removed from TRL, kept here.
        max_prompt_length: Option<usize> = Text("null"), TOKENS, "tokens";
        /// Cut longer prompts on the left instead of refusing them. Not in TRL.
        truncate_prompts: bool = Text("false"), ANY, "";
        /// Longest completion; null takes every length that the model can hold after the longest prompt.
        max_completion_length: Option<usize> = Text("512"), TOKENS, "tokens";
        /// Micro-batches per rank that one generation batch is cut into.
        steps_per_generation: Option<usize> = Derived("`gradient_accumulation_steps`"), BATCH, "micro-batches";
        /// Completions generated at once over all ranks; the other way to give `steps_per_generation`.
        generation_batch_size: Option<usize> = Derived(
            "`per_device_train_batch_size` x ranks x `steps_per_generation`"
        ), Bounds::between(2.0, 16_777_216.0), "completions";
        /// Optimizer passes over each generation batch (the paper's mu).
        num_iterations: usize = Text("1"), Bounds::between(1.0, 10_000.0), "passes";
        /// Shuffle the prompts before every epoch.
        shuffle_dataset: bool = Text("true"), ANY, "";
        /// Most sequences decoded at the same time; bounds the memory of the KV cache. Not in TRL.
        max_num_seqs: usize = Text("64"), GROUP, "sequences";
        /// Show sample completions in the console at every log line; they are always in
        /// `output_dir/completions.jsonl`.
        log_completions: bool = Text("false"), ANY, "";
        /// How many of them; null shows all, 0 none.
        num_completions_to_print: Option<usize> = Text("null"), Bounds::between(0.0, 16_777_216.0), "completions";
    }
    "Sampling" for Grpo {
        /// Divides the logits, in sampling and in training.
        temperature: f64 = Text("1.0"), Bounds::between(0.0, 1000.0).above_low(), "";
        /// Keep the smallest set of tokens with at least this probability; 1 is off.
        top_p: f64 = Text("1.0"), SHARE.above_low(), "probability";
        /// Keep the k largest logits; 0, -1 and null are off.
        top_k: TopK = Text("0"), Bounds::between(0.0, 1e9), "tokens";
        /// Keep tokens with at least this share of the largest probability; null is off.
        min_p: Option<f64> = Text("null"), SHARE, "share";
        /// Divides the positive logits of tokens seen before and multiplies the negative ones; 1 is off.
        repetition_penalty: f64 = Text("1.0"), Bounds::between(0.0, 1000.0).above_low(), "";
        /// Strings that end a completion, besides the end-of-sequence token. Not in TRL.
        stop_strings: Vec<String> = Text("[]"), ANY, "";
    }
    "Rewards" for Grpo {
        /// Reward functions: built-ins by name, functions in Python by file or module, programs by command line; see
        /// "Reward functions" below.
        reward_funcs: RewardList = Required, ANY, "";
        /// The Python that runs reward functions in Python; the default is that of an active virtual environment, else
        /// `python3`. Not in TRL.
        reward_python: Option<PathBuf> = Text("null"), ANY, "";
        /// Folders where it looks for their files and modules, besides the working directory and this file's folder.
        /// Not in TRL.
        reward_path: Vec<String> = Text("[]"), ANY, "";
        /// What rewards that run the code of completions (`code` and the like) need of this machine: `required` refuses to
        /// run any where its files, network and processes cannot be kept out of reach; `best_effort` takes what there is
        /// and says what is missing. Not in TRL.
        code_sandbox: CodeSandbox = Text("best_effort"), ANY, "";
        /// Completions whose code runs at a time. open-r1's key; its default is 2.
        parallel_code_exec_per_proc: Option<usize> = Derived("number of cores"), GROUP, "completions";
        /// Language that `code_format` looks for in rows without a column `language`. open-r1's key.
        code_language: String = Text("python"), ANY, "";
        /// Tests of a completion after which it is looked whether one has failed, where one failure decides the score
        /// (`binary_code`, `ioi_code`, and `cf_code` with `pass_fail`); -1 runs all. open-r1's key.
        code_eval_test_batch_size: TestBatch = Text("1"), GROUP, "tests";
        /// How `cf_code` turns passed tests into a score: 1 or 0, the share that passes, or the first plus a tenth of the
        /// second. open-r1's key.
        code_eval_scoring_mode: CodeScoring = Text("weighted_sum"), ANY, "";
        /// One weight per reward function.
        reward_weights: Option<Vec<f64>> = Derived("1 for each"), Bounds::between(-1e6, 1e6), "";
        /// How rewards are scaled into advantages: by the standard deviation of the `group`, of the whole generation
        /// `batch`, or not at all (`none`, Dr. GRPO). true means `group`, false `none`.
        scale_rewards: ScaleRewards = Text("group"), ANY, "";
        /// How several rewards become one advantage: weighted sum, then normalised; or each normalised, then summed
        /// (GDPO).
        multi_objective_aggregation: RewardAggregation = Text("sum_then_normalize"), ANY, "";
        /// `cosine`: what a wrong answer of no length is worth. This key and the next eight are open-r1's, for the
        /// rewards that have a parameter of that name; a parameter given with the reward itself goes first.
        cosine_min_value_wrong: Option<f64> = Text("null"), Bounds::between(-1e6, 1e6), "";
        /// `cosine`: what a wrong answer of `cosine_max_len` is worth.
        cosine_max_value_wrong: Option<f64> = Text("null"), Bounds::between(-1e6, 1e6), "";
        /// `cosine`: what a right answer of `cosine_max_len` is worth.
        cosine_min_value_correct: Option<f64> = Text("null"), Bounds::between(-1e6, 1e6), "";
        /// `cosine`: what a right answer of no length is worth.
        cosine_max_value_correct: Option<f64> = Text("null"), Bounds::between(-1e6, 1e6), "";
        /// `cosine`: the length at which the curve ends; in tokens for `cosine_scaled`.
        cosine_max_len: Option<usize> = Text("null"), FROM_1, "characters";
        /// `repetition_penalty`: words of an n-gram; tokens for `token_repetition_penalty`.
        repetition_n_grams: Option<usize> = Text("null"), FROM_1, "words";
        /// `repetition_penalty`: what a completion that only repeats itself is worth.
        repetition_max_penalty: Option<f64> = Text("null"), Bounds::between(-1e6, 1e6), "";
        /// `soft_overlong_punishment`: the length beyond which a completion is worth -1.
        max_completion_len: Option<usize> = Text("null"), FROM_1, "tokens";
        /// `soft_overlong_punishment`: tokens before that length over which the worth falls from 0.
        soft_punish_cache: Option<usize> = Text("null"), FROM_0, "tokens";
    }
    "Policy loss" for Grpo {
        /// Which policy loss.
        grpo_loss_type named "loss_type": GrpoLossType = Text("dapo"), ANY, "";
        /// Weight of the KL term against the reference policy; 0 does without a reference.
        beta: f64 = Text("0.0"), FROM_0, "";
        /// Train without dropout, the adapter's included.
        disable_dropout: bool = Text("false"), ANY, "";
        /// Multiply the KL estimate by the importance ratio (DeepSeek-V3.2's unbiased form).
        use_bias_correction_kl: bool = Text("true"), ANY, "";
        /// Lower clip range: ratios below `1 - epsilon` are clipped.
        epsilon: f64 = Text("0.2"), SHARE.above_low(), "";
        /// Upper clip range: ratios above `1 + epsilon_high` are clipped. For `cispo` it is the cap itself.
        epsilon_high: Option<f64> = Derived("`epsilon`"), POSITIVE, "";
        /// Bound of the ratio for negative advantages (two-sided clipping, INTELLECT-2).
        delta: Option<f64> = Text("null"), POSITIVE, "";
        /// One importance ratio per token, or one per sequence (GSPO, 2507.18071).
        importance_sampling_level: ImportanceSamplingLevel = Text("token"), ANY, "";
        /// Leave completions that ran into the length limit out of the loss.
        mask_truncated_completions: bool = Text("false"), ANY, "";
        /// Share of tokens, those of highest entropy, that the policy loss looks at; 1 is all, 0 the highest alone.
        top_entropy_quantile: f64 = Text("1.0"), SHARE, "share of tokens";
        /// Weight of the entropy bonus; 0 is off. With `use_adaptive_entropy` the weight at the start.
        entropy_coef: f64 = Text("0.0"), FROM_0, "";
        /// Let the weight of the entropy bonus follow the policy's entropy (Skywork-OR1, 2505.22312): up by
        /// `entropy_coef_delta` after a step of at most `entropy_target`, else down. It acts only after such a step.
        use_adaptive_entropy: bool = Text("false"), ANY, "";
        /// Lowest weight that `use_adaptive_entropy` goes down to.
        entropy_coef_min: f64 = Text("0.0"), FROM_0, "";
        /// Highest weight that `use_adaptive_entropy` goes up to.
        entropy_coef_max: f64 = Text("1.0"), FROM_0, "";
        /// By how much `use_adaptive_entropy` moves the weight in a step.
        entropy_coef_delta: f64 = Text("0.005"), FROM_0, "";
        /// Mean entropy of a step's tokens that `use_adaptive_entropy` steers to.
        entropy_target: f64 = Text("0.2"), FROM_0, "nats per token";
        /// Drop sequences of negative advantage whose mean log-ratio exceeds this (DeepSeek-V3.2); null is off.
        off_policy_mask_threshold: Option<f64> = Text("null"), POSITIVE, "nats per token";
        /// Temperature of `sapo` for negative advantages.
        sapo_temperature_neg: f64 = Text("1.05"), POSITIVE, "";
        /// Temperature of `sapo` for positive advantages.
        sapo_temperature_pos: f64 = Text("1.0"), POSITIVE, "";
        /// Exponent of `vespo` for non-negative advantages.
        vespo_k_pos: f64 = Text("2.0"), FROM_0, "";
        /// Rate of `vespo` for non-negative advantages.
        vespo_lambda_pos: f64 = Text("3.0"), FROM_0, "";
        /// Exponent of `vespo` for negative advantages.
        vespo_k_neg: f64 = Text("3.0"), FROM_0, "";
        /// Rate of `vespo` for negative advantages.
        vespo_lambda_neg: f64 = Text("2.0"), FROM_0, "";
        /// Correct for the difference between the log-probabilities of rollout and trainer. In TRL it only acts with
        /// `use_vllm: true`, so that is the default here too; written out it acts on the built-in rollout.
        vllm_importance_sampling_correction: Option<bool> = Derived("true if `use_vllm` is true, else false"), ANY, "";
        /// Which correction.
        vllm_importance_sampling_mode: RolloutCorrectionMode = Text("sequence_mask"), ANY, "";
        /// Upper bound of the correction's ratio; null is none.
        vllm_importance_sampling_clip_max: Option<f64> = Text("3.0"), POSITIVE, "";
        /// Lower bound of the correction's ratio.
        vllm_importance_sampling_clip_min: Option<f64> = Text("null"), FROM_0, "";
    }
    "Reference policy" for Grpo {
        /// Move the reference policy towards the policy while training; needs `beta` above 0 and no adapter.
        sync_ref_model: bool = Text("false"), ANY, "";
        /// Share of the policy in the mixed reference.
        ref_model_mixup_alpha: f64 = Text("0.6"), SHARE, "share";
        /// Optimizer steps between two synchronisations of the reference.
        ref_model_sync_steps: usize = Text("512"), FROM_1, "optimizer steps";
    }
}

/// The key of that name for a command.
pub(super) fn find(name: &str, command: Command) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name && key.commands.include(command))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_can_be_read_and_is_in_range() {
        for command in [Command::Sft, Command::Grpo] {
            let raw = RawConfig::new(command);
            assert_eq!(
                raw.learning_rate.value().to_bits(),
                if command == Command::Sft { 2e-5f64 } else { 1e-6 }.to_bits()
            );
        }
    }

    #[test]
    fn keys_are_unique_for_each_command_and_documented() {
        for command in [Command::Sft, Command::Grpo] {
            let mut names: Vec<_> =
                KEYS.iter().filter(|key| key.commands.include(command)).map(|key| key.name).collect();
            let count = names.len();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), count);
        }
        for key in KEYS {
            assert!(key.doc.ends_with('.'), "{}: {:?}", key.name, key.doc);
        }
    }
}
