//! The resolved settings of a run: typed, checked, with every default filled in.
//!
//! `Config::resolve` makes these from what a file says; everything above `config` reads these and never a key name.
//! Field names are TRL's and Hugging Face's wherever they have one. Units stand on the fields.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

mod mixture;
mod ranks;
mod rewards;

pub use mixture::{MixturePart, MixtureSettings, Share};
pub use ranks::{OffloadSettings, RankBackend, RankSettings, ZeroStage};
pub use rewards::{CodeSettings, RewardSettings, RewardSpec};

pub use super::choices::{
    CodeSandbox, CodeScoring, GrpoLossType, ImportanceSamplingLevel, LrSchedulerType, OffloadDevice, PackingStrategy,
    Precision, QuantType, ReportTo, RewardAggregation, RolloutCorrectionMode, ScaleRewards, SftLossType,
    TruncationMode, WeightDtype,
};

/// Settings of `trainer sft`.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "one field a key")]
pub struct SftSettings {
    /// The base model and its adapter.
    pub model: ModelSettings,
    /// Where the examples come from.
    pub data: DataSettings,
    /// What SFT and GRPO share: batches, optimizer, schedule, logging, saving.
    pub training: TrainingSettings,
    /// Longest example in tokens; `None` keeps every length.
    pub max_length: Option<usize>,
    /// What is kept of a longer one; packing cuts in its own ways.
    pub truncation_mode: TruncationMode,
    /// Put several examples into one sequence of `max_length` tokens.
    pub packing: bool,
    /// How examples are packed.
    pub packing_strategy: PackingStrategy,
    /// As `packing`, for the evaluation split.
    pub eval_packing: bool,
    /// Leave out what does not fill a batch at the end of an epoch.
    pub dataloader_drop_last: bool,
    /// Train on the completion only; `None`: on the completion for prompt-completion data, on everything otherwise.
    pub completion_only_loss: Option<bool>,
    /// Train on assistant turns only (conversational data).
    pub assistant_only_loss: bool,
    /// Which loss.
    pub loss_type: SftLossType,
    /// Share of a target's probability that is spread over the vocabulary, in [0, 1].
    pub label_smoothing_factor: f64,
}

/// Settings of `trainer grpo`.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a key of the file")]
pub struct GrpoSettings {
    /// The base model and its adapter.
    pub model: ModelSettings,
    /// Where the prompts come from.
    pub data: DataSettings,
    /// What SFT and GRPO share: batches, optimizer, schedule, logging, saving.
    pub training: TrainingSettings,
    /// Completions sampled per prompt: the group size, at least 2.
    pub num_generations: usize,
    /// The same for evaluation.
    pub num_generations_eval: usize,
    /// Longest prompt in tokens; `None` takes every length the model can hold. A longer prompt is an error that names
    /// its row, unless `truncate_prompts` is set.
    pub max_prompt_length: Option<usize>,
    /// Cut prompts longer than `max_prompt_length` on the left instead of refusing them.
    pub truncate_prompts: bool,
    /// Longest completion in tokens; `None` takes every length that the model can hold after the longest prompt.
    pub max_completion_length: Option<usize>,
    /// How completions are sampled.
    pub sampling: SamplingSettings,
    /// Reward functions, in the order of their weights.
    pub reward_funcs: Vec<RewardSpec>,
    /// Where functions run that are not built in.
    pub rewards: RewardSettings,
    /// One weight per reward function.
    pub reward_weights: Vec<f64>,
    /// How rewards are scaled into advantages.
    pub scale_rewards: ScaleRewards,
    /// How several rewards become one advantage.
    pub multi_objective_aggregation: RewardAggregation,
    /// Which policy loss.
    pub loss_type: GrpoLossType,
    /// Weight of the KL term against the reference policy; 0 switches the reference off.
    pub beta: f64,
    /// Multiply the KL estimate by the importance ratio (DeepSeek-V3.2's unbiased form).
    pub use_bias_correction_kl: bool,
    /// Lower clip range.
    pub epsilon: f64,
    /// Upper clip range (for `cispo` the cap itself).
    pub epsilon_high: f64,
    /// Two-sided clipping bound of the importance ratio.
    pub delta: Option<f64>,
    /// Whether the importance ratio is taken per token or per sequence (GSPO).
    pub importance_sampling_level: ImportanceSamplingLevel,
    /// Optimizer passes over each generation batch (TRL's mu).
    pub num_iterations: usize,
    /// Micro-batches per rank cut from one generation batch.
    pub steps_per_generation: usize,
    /// Completions generated at once over all ranks.
    pub generation_batch_size: usize,
    /// Leave completions that ran into the length limit out of the loss.
    pub mask_truncated_completions: bool,
    /// Share of tokens, by entropy from the top, that the policy loss looks at.
    pub top_entropy_quantile: f64,
    /// Weight of the entropy bonus, at the start where it adapts.
    pub entropy_coef: f64,
    /// How the weight of the entropy bonus follows the policy's entropy; `None` keeps it.
    pub adaptive_entropy: Option<AdaptiveEntropy>,
    /// Off-policy sequence mask threshold (DeepSeek-V3.2).
    pub off_policy_mask_threshold: Option<f64>,
    /// SAPO's temperatures for negative and positive advantages.
    pub sapo_temperature_neg: f64,
    /// See `sapo_temperature_neg`.
    pub sapo_temperature_pos: f64,
    /// VESPO's shape parameters.
    pub vespo: VespoSettings,
    /// Correct for the difference between rollout and trainer log-probabilities.
    pub rollout_importance_sampling: Option<RolloutCorrection>,
    /// Move the reference policy towards the policy while training.
    pub sync_ref_model: bool,
    /// Share of the policy in the mixed reference.
    pub ref_model_mixup_alpha: f64,
    /// Optimizer steps between two synchronisations of the reference.
    pub ref_model_sync_steps: usize,
    /// Shuffle the prompts.
    pub shuffle_dataset: bool,
    /// Show sample completions in the console.
    pub log_completions: bool,
    /// How many of them; `None`: all.
    pub num_completions_to_print: Option<usize>,
    /// Most sequences decoded at the same time; bounds the KV cache.
    pub max_num_seqs: usize,
}

impl GrpoSettings {
    /// Longest completion in tokens; without one, as many as there can be.
    #[must_use]
    pub fn longest_completion(&self) -> usize {
        self.max_completion_length.unwrap_or(usize::MAX)
    }
}

/// How the weight of the entropy bonus follows the policy's entropy (Skywork-OR1, 2505.22312).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdaptiveEntropy {
    /// Lowest weight.
    pub coef_min: f64,
    /// Highest weight.
    pub coef_max: f64,
    /// How far the weight moves in an optimizer step.
    pub coef_delta: f64,
    /// Mean entropy per token in nats up to which the bonus acts and its weight grows.
    pub target: f64,
}

/// VESPO's shape parameters for positive and negative advantages.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct VespoSettings {
    /// Exponent for non-negative advantages.
    pub k_pos: f64,
    /// Rate for non-negative advantages.
    pub lambda_pos: f64,
    /// Exponent for negative advantages.
    pub k_neg: f64,
    /// Rate for negative advantages.
    pub lambda_neg: f64,
}

/// Truncated or masked importance sampling between rollout and trainer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RolloutCorrection {
    /// Which correction.
    pub mode: RolloutCorrectionMode,
    /// Upper bound of the ratio.
    pub clip_max: Option<f64>,
    /// Lower bound of the ratio (mask modes).
    pub clip_min: Option<f64>,
}

/// The base model and what is trained on it.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSettings {
    /// A local folder (config.json, safetensors), a `.gguf` file, or a hub id.
    pub model_name_or_path: String,
    /// Branch, tag or commit of a hub id.
    pub model_revision: String,
    /// A tokenizer elsewhere than in the model folder.
    pub tokenizer_name_or_path: Option<String>,
    /// The text of a chat template that replaces the model's.
    pub chat_template: Option<String>,
    /// A Jinja file, a folder or a hub id whose chat template replaces the model's.
    pub chat_template_path: Option<PathBuf>,
    /// The token that ends a sequence, in place of the tokenizer's.
    pub eos_token: Option<String>,
    /// Take random weights of the shape in `config.json` instead of stored ones.
    pub init_random: bool,
    /// Storage of base weights that are not quantised.
    pub dtype: WeightDtype,
    /// Quantise the linear weights of the decoder layers while loading. GGUF tensors stay as they are stored.
    pub quantization: Option<Quantization>,
    /// The adapter; `None` trains every weight.
    pub lora: Option<LoraSettings>,
    /// Start from this PEFT adapter instead of a fresh one.
    pub adapter_name_or_path: Option<PathBuf>,
}

/// A low-rank adapter (Hu et al., 2106.09685), in PEFT's names.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraSettings {
    /// Rank.
    pub r: usize,
    /// Scale numerator: the update is multiplied by `alpha / r`, or `alpha / sqrt(r)` with rsLoRA.
    pub alpha: f64,
    /// Probability of dropping an input element of the adapter, in [0, 1).
    pub dropout: f64,
    /// Modules that get an adapter.
    pub target_modules: ModuleSet,
    /// Modules trained whole beside the adapter, by the ends of their paths.
    pub modules_to_save: Vec<String>,
    /// Rank-stabilised scale (2312.03732).
    pub use_rslora: bool,
    /// Weight-decomposed (2402.09353).
    pub use_dora: bool,
}

/// Which modules an adapter is on, in PEFT's forms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModuleSet {
    /// Modules of these paths, or whose path ends with `.` and one of them.
    Names(Vec<String>),
    /// Modules whose whole path matches this regular expression.
    Pattern(String),
    /// Every linear module but the head, as adapters of others say it.
    AllLinear,
}

impl ModuleSet {
    /// PEFT's choice for Qwen2 and Qwen3 (`TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING`).
    #[must_use]
    pub fn of_qwen() -> Self {
        Self::Names(vec!["q_proj".into(), "v_proj".into()])
    }
}

/// One of the seven projections of a decoder layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Projection {
    /// Query projection of attention.
    QProj,
    /// Key projection of attention.
    KProj,
    /// Value projection of attention.
    VProj,
    /// Output projection of attention.
    OProj,
    /// Gate projection of the MLP.
    GateProj,
    /// Up projection of the MLP.
    UpProj,
    /// Down projection of the MLP.
    DownProj,
}

impl Projection {
    /// All seven, in the order of the layer.
    pub const ALL: [Self; 7] =
        [Self::QProj, Self::KProj, Self::VProj, Self::OProj, Self::GateProj, Self::UpProj, Self::DownProj];

    /// Hugging Face's module name, e.g. `q_proj`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::QProj => "q_proj",
            Self::KProj => "k_proj",
            Self::VProj => "v_proj",
            Self::OProj => "o_proj",
            Self::GateProj => "gate_proj",
            Self::UpProj => "up_proj",
            Self::DownProj => "down_proj",
        }
    }

    /// Hugging Face's module path inside a decoder layer, e.g. `self_attn.q_proj`.
    #[must_use]
    pub const fn path(self) -> &'static str {
        match self {
            Self::QProj => "self_attn.q_proj",
            Self::KProj => "self_attn.k_proj",
            Self::VProj => "self_attn.v_proj",
            Self::OProj => "self_attn.o_proj",
            Self::GateProj => "mlp.gate_proj",
            Self::UpProj => "mlp.up_proj",
            Self::DownProj => "mlp.down_proj",
        }
    }
}

/// 4-bit quantisation of the frozen weights while loading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantization {
    /// Code book.
    pub quant_type: QuantType,
    /// Quantise the block maxima to 8 bits as well.
    pub double_quant: bool,
}

/// Where rows come from.
#[derive(Clone, Debug, PartialEq)]
pub struct DataSettings {
    /// A data file, a folder of them, or a hub id; empty with a mixture.
    pub dataset_name: String,
    /// Several data sets instead of one.
    pub mixture: Option<MixtureSettings>,
    /// Sub-folder or configuration of a hub data set.
    pub dataset_config: Option<String>,
    /// Branch, tag or commit of a hub id.
    pub dataset_revision: String,
    /// Split to train on (`train`): files of a folder whose name carries the split's name.
    pub dataset_train_split: String,
    /// Split to evaluate on (`test`).
    pub dataset_test_split: String,
    /// Column with plain text.
    pub dataset_text_field: String,
    /// Column that becomes `prompt`: a text in it is one turn of a user.
    pub dataset_prompt_column: Option<String>,
    /// Columns that get other names, old to new.
    pub dataset_columns: Vec<(String, String)>,
    /// Hold out this share of the training rows (0, 1) for evaluation when there is no test split.
    pub eval_fraction: Option<f64>,
    /// Use at most this many rows.
    pub max_train_samples: Option<usize>,
    /// Use at most this many evaluation rows.
    pub max_eval_samples: Option<usize>,
    /// The folder that `trainer preprocess` wrote; its rows are taken instead of those of the data set.
    pub preprocessed: Option<PathBuf>,
    /// Extra variables for the chat template, e.g. `enable_thinking: false`.
    pub chat_template_kwargs: serde_json::Map<String, serde_json::Value>,
    /// A system message put in front of conversational prompts that have none.
    pub system_prompt: Option<String>,
}

/// What every training run shares.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a key of the configuration")]
pub struct TrainingSettings {
    /// Folder for everything a run leaves.
    pub output_dir: PathBuf,
    /// Go on from a checkpoint.
    pub resume_from_checkpoint: Resume,
    /// Allow an `output_dir` that already holds a run.
    pub overwrite_output_dir: bool,
    /// Seed of every random stream.
    pub seed: u64,
    /// Seed of the order of the data; `seed` unless the file says otherwise.
    pub data_seed: u64,
    /// Where to compute.
    pub device: DeviceChoice,
    /// Most bytes that a rank takes of its GPU's memory; `None`: all there are.
    pub device_memory_limit: Option<u64>,
    /// Compute precision.
    pub precision: Precision,
    /// Sequences per rank and micro-step.
    pub per_device_train_batch_size: usize,
    /// Sequences per rank and evaluation step.
    pub per_device_eval_batch_size: usize,
    /// Micro-steps per optimizer step.
    pub gradient_accumulation_steps: usize,
    /// Passes over the data; ignored when `max_steps` is set.
    pub num_train_epochs: f64,
    /// Optimizer steps; `None`: from `num_train_epochs`.
    pub max_steps: Option<usize>,
    /// Recompute activations in backward instead of keeping them.
    pub gradient_checkpointing: bool,
    /// Recompute only this many of the first layers; `None`: all.
    pub gradient_checkpointing_layers: Option<usize>,
    /// Keep what recomputation starts from, and attention's results, in host memory.
    pub activation_offloading: bool,
    /// Choose a GPU's products not by timing, and add up in fixed orders.
    pub full_determinism: bool,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Its course.
    pub lr_scheduler_type: LrSchedulerType,
    /// Extra arguments of the schedule, as transformers' `lr_scheduler_kwargs`.
    pub lr_scheduler_kwargs: serde_json::Map<String, serde_json::Value>,
    /// Warm-up in optimizer steps, or as a share of all steps.
    pub warmup: Warmup,
    /// AdamW's settings.
    pub optimizer: OptimizerSettings,
    /// Largest L2 norm of all gradients; 0 switches clipping off.
    pub max_grad_norm: f64,
    /// Size of the noise on embeddings in training passes (NEFTune, 2310.05914), more than 0.
    pub neftune_noise_alpha: Option<f64>,
    /// When to log; the last step is always logged.
    pub logging_strategy: Interval,
    /// Log the first step as well.
    pub logging_first_step: bool,
    /// When to evaluate.
    pub eval_strategy: Interval,
    /// Evaluate before the first step.
    pub eval_on_start: bool,
    /// Optimizer steps, or with evaluation by epochs epochs, before the first evaluation.
    pub eval_delay: f64,
    /// When to save.
    pub save_strategy: Interval,
    /// Keep at most this many checkpoints, the newest ones and the best one.
    pub save_total_limit: Option<usize>,
    /// Leave the optimizer's state out of checkpoints.
    pub save_only_model: bool,
    /// What decides which checkpoint is the best, and what follows from it.
    pub best: Option<BestSettings>,
    /// Go on from a checkpoint although what the run reads has changed since.
    pub resume_with_changed_inputs: bool,
    /// Metric sinks besides metrics.jsonl.
    pub report_to: Vec<ReportTo>,
    /// Hide progress bars.
    pub disable_tqdm: bool,
    /// The repository that the model is meant for: the command that uploads it is printed at the end.
    pub hub: HubSettings,
    /// The processes of the run, and how they share its state.
    pub ranks: RankSettings,
}

/// Where on the hub a run's result is meant to go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HubSettings {
    /// Whether the file asks for an upload.
    pub push_to_hub: bool,
    /// The repository; `None`: the name of `output_dir`.
    pub model_id: Option<String>,
    /// The branch.
    pub revision: Option<String>,
    /// Whether a new repository is private.
    pub is_private: Option<bool>,
}

/// The rule by which a step moves parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OptimizerKind {
    /// AdamW (Loshchilov and Hutter, 1711.05101), moments in f32.
    #[default]
    AdamW,
    /// AdamW with moments in blocks of 8 bits (Dettmers et al., 2110.02861).
    AdamW8bit,
    /// Lion (Chen et al., 2302.06675).
    Lion,
    /// Muon (Jordan 2024) for matrices, AdamW for the rest.
    Muon,
}

impl OptimizerKind {
    /// Its name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::AdamW => "AdamW",
            Self::AdamW8bit => "AdamW in 8 bits",
            Self::Lion => "Lion",
            Self::Muon => "Muon",
        }
    }
}

/// The optimizer's settings; the names are AdamW's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OptimizerSettings {
    /// By which rule parameters are moved.
    pub kind: OptimizerKind,
    /// Decoupled weight decay; not applied to biases and norm weights.
    pub weight_decay: f64,
    /// Decay of the first moment.
    pub adam_beta1: f64,
    /// Decay of the second moment.
    pub adam_beta2: f64,
    /// Added to the root of the second moment.
    pub adam_epsilon: f64,
}

/// How completions are sampled. The filters apply in the order of the fields.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingSettings {
    /// Divides the logit of tokens seen before (multiplies a negative one); 1 is off.
    pub repetition_penalty: f64,
    /// Divides the logits; 0 takes the largest logit.
    pub temperature: f64,
    /// Keep the k largest logits; 0 is off.
    pub top_k: usize,
    /// Keep the smallest set of tokens with at least this probability; 1 is off.
    pub top_p: f64,
    /// Keep tokens with at least this share of the largest probability; 0 is off.
    pub min_p: f64,
    /// Strings that end a completion, besides the end-of-sequence token.
    pub stop_strings: Vec<String>,
}

impl Default for SamplingSettings {
    fn default() -> Self {
        Self { repetition_penalty: 1.0, temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, stop_strings: Vec::new() }
    }
}

/// Where a run goes on from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resume {
    /// Start anew.
    No,
    /// The newest whole checkpoint of `output_dir`; an error if there is none.
    Latest,
    /// The same, or a start if there is none: for jobs that are put back into a queue.
    Auto,
    /// This one.
    Path(PathBuf),
}

/// Warm-up of the learning rate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Warmup {
    /// Optimizer steps.
    Steps(usize),
    /// Share of all optimizer steps in [0, 1]; rounded up.
    Ratio(f64),
}

/// When something recurring happens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Interval {
    /// Never (saving, logging: only at the end).
    No,
    /// Every so many optimizer steps.
    Steps(usize),
    /// Every time this share of all optimizer steps, in (0, 1), is done.
    Share(f64),
    /// At the end of each epoch.
    Epoch,
    /// When an evaluation found a new best value (saving).
    Best,
}

/// How the best checkpoint is found.
#[derive(Clone, Debug, PartialEq)]
pub struct BestSettings {
    /// The metric that decides, as evaluations name it: `eval_loss`.
    pub metric: String,
    /// Whether a larger value is better.
    pub greater_is_better: bool,
    /// Leave its model in `output_dir` at the end.
    pub load_at_end: bool,
    /// When to stop early.
    pub early_stopping: Option<EarlyStopping>,
}

/// transformers' `EarlyStoppingCallback`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EarlyStopping {
    /// Evaluations in a row without an improvement after which the run stops.
    pub patience: usize,
    /// An improvement is more than this.
    pub threshold: f64,
}

impl Interval {
    /// The same for a run of `total` optimizer steps: a share becomes steps, rounded up (transformers'
    /// `TrainerState.compute_steps`).
    #[must_use]
    pub fn in_steps(self, total: u64) -> Self {
        match self {
            Self::Share(share) => Self::Steps((share * total as f64).ceil().max(1.0) as usize),
            other => other,
        }
    }
}

/// Where to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// A GPU if this build and machine have one, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU with this ordinal.
    Cuda(usize),
}
