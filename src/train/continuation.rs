//! What a resumed run has in common with the run that it continues.
//!
//! A checkpoint keeps the values of the settings that its run depended on. A resumed run with other values is refused
//! where the state would mean something else, and warned where its course changes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::bail;

use crate::checkpoint::Checkpoint;

/// Settings that give the state its meaning: what the trained values belong to, which rows the place in the data counts,
/// what a step and a generation batch consist of, and the random numbers.
const MEANING: &[&str] = &[
    "model_name_or_path",
    "model_revision",
    "tokenizer_name_or_path",
    "chat_template",
    "chat_template_path",
    "eos_token",
    "init_random",
    "load_in_4bit",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
    "use_peft",
    "lora_r",
    "lora_alpha",
    "lora_target_modules",
    "lora_modules_to_save",
    "use_rslora",
    "use_dora",
    "adapter_name_or_path",
    "dataset_name",
    "dataset_config",
    "dataset_revision",
    "dataset_train_split",
    "dataset_text_field",
    "dataset_mixture",
    "datasets",
    "test_split_size",
    "dataset_prompt_column",
    "dataset_columns",
    "eval_fraction",
    "max_train_samples",
    "chat_template_kwargs",
    "system_prompt",
    "max_length",
    "truncation_mode",
    "packing",
    "packing_strategy",
    "dataloader_drop_last",
    "completion_only_loss",
    "assistant_only_loss",
    "max_prompt_length",
    "truncate_prompts",
    "seed",
    "data_seed",
    "shuffle_dataset",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_generations",
    "steps_per_generation",
    "num_iterations",
    "optim",
];

/// Settings that change where the run goes from here, which people do on purpose.
const COURSE: &[&str] = &[
    "dtype",
    "bf16",
    "fp16",
    "lora_dropout",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "warmup_ratio",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "neftune_noise_alpha",
    "logging_strategy",
    "logging_steps",
    "logging_first_step",
    "eval_strategy",
    "eval_steps",
    "eval_delay",
    "save_strategy",
    "save_steps",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
    "early_stopping_patience",
    "early_stopping_threshold",
    "dataset_test_split",
    "max_eval_samples",
    "eval_packing",
    "num_generations_eval",
    "loss_type",
    "label_smoothing_factor",
    "max_completion_length",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "stop_strings",
    "reward_funcs",
    "reward_weights",
    "scale_rewards",
    "multi_objective_aggregation",
    "beta",
    "use_bias_correction_kl",
    "epsilon",
    "epsilon_high",
    "delta",
    "importance_sampling_level",
    "mask_truncated_completions",
    "top_entropy_quantile",
    "entropy_coef",
    "use_adaptive_entropy",
    "entropy_coef_min",
    "entropy_coef_max",
    "entropy_coef_delta",
    "entropy_target",
    "off_policy_mask_threshold",
    "sapo_temperature_neg",
    "sapo_temperature_pos",
    "vespo_k_pos",
    "vespo_lambda_pos",
    "vespo_k_neg",
    "vespo_lambda_neg",
    "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
    "sync_ref_model",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "code_language",
    "code_eval_test_batch_size",
    "code_eval_scoring_mode",
    "cosine_min_value_wrong",
    "cosine_max_value_wrong",
    "cosine_min_value_correct",
    "cosine_max_value_correct",
    "cosine_max_len",
    "repetition_n_grams",
    "repetition_max_penalty",
    "max_completion_len",
    "soft_punish_cache",
];

/// Those of `MEANING` that name a file or folder, which may have moved since.
const PLACES: &[&str] =
    &["model_name_or_path", "tokenizer_name_or_path", "chat_template_path", "adapter_name_or_path", "dataset_name"];

/// Those of `MEANING` of which every rank has its own: what counts is what they come to over all ranks.
const PER_RANK: &[&str] = &["gradient_accumulation_steps", "steps_per_generation"];

/// The number of ranks, which is noted for those.
const RANKS: &str = "num_processes";

/// Name and value, as YAML, of settings.
pub(super) type Values = BTreeMap<String, String>;

/// What a run is, as far as its checkpoints depend on it.
pub(super) struct Continuation {
    /// `sft` or `grpo`.
    pub(super) task: &'static str,
    /// The values of this run.
    pub(super) values: Values,
}

impl Continuation {
    /// For a run with these settings, each with its value as YAML.
    pub(super) fn new(task: &'static str, texts: BTreeMap<&'static str, String>) -> Self {
        let is_kept = |name: &str| MEANING.contains(&name) || COURSE.contains(&name) || name == RANKS;
        let kept = texts.into_iter().filter(|(name, _)| is_kept(name));
        Self { task, values: kept.map(|(name, text)| (name.to_string(), text)).collect() }
    }

    /// The value of one setting as YAML.
    pub(super) fn value(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str)
    }

    /// Compares with the values that a checkpoint holds; settings that only one of the two knows are left out. Warns of
    /// those that change the run's course, and says whether there are some.
    ///
    /// # Errors
    /// If one of those that give the state its meaning differs; all of them are named.
    pub(super) fn check(&self, checkpoint: &Checkpoint, saved: &Values) -> anyhow::Result<bool> {
        let place = checkpoint.path().display();
        let (refused, changed) = self.differences(saved);
        if !refused.is_empty() {
            let is_adapter = checkpoint.contains("adapter_config.json");
            let key = if is_adapter { "adapter_name_or_path" } else { "model_name_or_path" };
            bail!(
                "`{place}` cannot go on with other settings than those it was made with:\n  {}\nset them as they were; or \
                 start a new run from what was trained, with `{key}: {place}` and another `output_dir`",
                refused.join("\n  ")
            );
        }
        if !changed.is_empty() {
            tracing::warn!("`{place}` goes on with changed settings: {}", changed.join("; "));
        }
        Ok(!changed.is_empty())
    }

    /// What a number that each rank has comes to over all ranks of the saved run and of this one, if either has several.
    fn over_ranks(&self, name: &str, saved: &Values) -> Option<(usize, usize)> {
        let over_ranks = |values: &Values| Some(values.get(name)?.parse::<usize>().ok()? * ranks_of(values));
        let both = over_ranks(saved).zip(over_ranks(&self.values));
        both.filter(|_| ranks_of(saved) > 1 || ranks_of(&self.values) > 1)
    }

    /// The differences that are refused, and those that are allowed.
    fn differences(&self, saved: &Values) -> (Vec<String>, Vec<String>) {
        let (mut refused, mut changed) = (Vec::new(), Vec::new());
        // In the order of the lists, which puts what belongs together side by side.
        for name in MEANING.iter().chain(COURSE) {
            let (Some(then), Some(now)) = (saved.get(*name), self.values.get(*name)) else { continue };
            if PER_RANK.contains(name)
                && let Some((then, now)) = self.over_ranks(name, saved)
            {
                if then != now {
                    refused.push(format!("`{name}` was {then} over all ranks, is {now}"));
                }
                continue;
            }
            let kind = match then == now {
                true => Difference::None,
                false if PLACES.contains(name) => compare_places(then, now),
                false if MEANING.contains(name) => Difference::Other,
                false => Difference::Allowed,
            };
            let line = || format!("`{name}` was {}, is {}", one_line(then), one_line(now));
            match kind {
                Difference::None => {}
                Difference::Allowed => changed.push(line()),
                Difference::Other => refused.push(line()),
            }
        }
        (refused, changed)
    }
}

/// Ranks of a run with these settings; one where that was not noted.
pub(super) fn ranks_of(values: &Values) -> usize {
    values.get(RANKS).and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// How two values of a setting differ.
#[derive(Debug, PartialEq)]
enum Difference {
    None,
    Allowed,
    Other,
}

/// Two texts may be one place; and what is gone from where it was and has its name elsewhere was moved there.
fn compare_places(then: &str, now: &str) -> Difference {
    let path = |text: &str| PathBuf::from(serde_json::from_str(text).unwrap_or_else(|_| text.to_string()));
    let (then, now) = (path(then), path(now));
    let find = |path: &Path| path.canonicalize().ok();
    match (find(&then), find(&now)) {
        (Some(then), Some(now)) if then == now => Difference::None,
        (None, Some(_)) if then.file_name() == now.file_name() => Difference::Allowed,
        _ => Difference::Other,
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    /// Settings that change neither what the state means nor where the run goes.
    const FREE: &[&str] = &[
        "output_dir",
        "overwrite_output_dir",
        "resume_from_checkpoint",
        "save_total_limit",
        "save_only_model",
        "eval_on_start",
        "resume_with_changed_inputs",
        "report_to",
        "disable_tqdm",
        "env",
        "num_processes",
        "zero_stage",
        "stage3_param_persistence_threshold",
        "device_memory_limit",
        "offload_buffer_count",
        "offload_optimizer_device",
        "offload_optimizer_nvme_path",
        "offload_param_device",
        "offload_param_nvme_path",
        "pin_memory",
        "stage3_max_live_parameters",
        "deepspeed",
        "accelerate_config",
        "ddp_timeout",
        "ddp_backend",
        "push_to_hub",
        "hub_model_id",
        "hub_revision",
        "hub_private_repo",
        "log_completions",
        "num_completions_to_print",
        "device",
        "use_cpu",
        "full_determinism",
        "gradient_checkpointing_layers",
        "gradient_checkpointing",
        "activation_offloading",
        "per_device_eval_batch_size",
        "max_num_seqs",
        // The rows themselves are compared, wherever they come from.
        "preprocessed",
        // That other keys decide.
        "generation_batch_size",
        "disable_dropout",
        "reward_python",
        "reward_path",
        "code_sandbox",
        "parallel_code_exec_per_proc",
    ];

    #[test]
    fn every_key_is_in_one_of_the_lists() {
        let lists = [MEANING, COURSE, FREE];
        for key in config::keys() {
            let count = lists.iter().flat_map(|list| list.iter()).filter(|name| **name == key.name).count();
            assert_eq!(count, 1, "`{}` stands {count} times in MEANING, COURSE and FREE", key.name);
        }
        let is_key = |name: &&&str| config::keys().iter().any(|key| key.name == **name);
        assert_eq!(lists.iter().flat_map(|list| list.iter()).find(|name| !is_key(name)), None);
        assert!(PLACES.iter().all(|name| MEANING.contains(name)));
    }

    #[test]
    fn differences_are_sorted_by_what_they_do() {
        let values = |pairs: &[(&'static str, &str)]| -> BTreeMap<&'static str, String> {
            pairs.iter().map(|(name, text)| (*name, (*text).to_string())).collect()
        };
        let now = [("seed", "2"), ("lora_r", "4"), ("learning_rate", "0.1"), ("output_dir", "b"), ("beta", "0.0")];
        let then = [("seed", "1"), ("lora_r", "4"), ("learning_rate", "0.2"), ("output_dir", "a"), ("lora_alpha", "8")];
        let then = Continuation::new("sft", values(&then)).values;
        let (refused, changed) = Continuation::new("sft", values(&now)).differences(&then);
        assert_eq!(refused, ["`seed` was 1, is 2"]);
        assert_eq!(changed, ["`learning_rate` was 0.2, is 0.1"]);
    }

    #[test]
    fn a_step_may_be_shared_by_another_number_of_ranks() {
        let values = |accumulation: &str, ranks: &str| -> BTreeMap<&'static str, String> {
            [("gradient_accumulation_steps", accumulation), ("num_processes", ranks)].map(|(n, v)| (n, v.into())).into()
        };
        let refused = |then: (&str, &str), now: (&str, &str)| {
            let then = Continuation::new("sft", values(then.0, then.1)).values;
            Continuation::new("sft", values(now.0, now.1)).differences(&then).0
        };
        assert!(refused(("4", "3"), ("12", "1")).is_empty() && refused(("4", "null"), ("2", "2")).is_empty());
        let differ =
            |then: usize, now: usize| [format!("`gradient_accumulation_steps` was {then} over all ranks, is {now}")];
        assert_eq!(refused(("4", "3"), ("4", "1")), differ(12, 4));
        assert_eq!(refused(("4", "1"), ("4", "2")), differ(4, 8));
        assert_eq!(refused(("4", "1"), ("3", "1")), ["`gradient_accumulation_steps` was 4, is 3"]);
    }

    #[test]
    fn a_place_is_known_again_by_what_is_there() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["here", "there"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
            std::fs::write(folder.path().join(name).join("a b.jsonl"), "").unwrap();
        }
        let text = |place: &str| format!("\"{}\"", folder.path().join(place).display());
        let compare = |then: &str, now: &str| compare_places(&text(then), &text(now));
        assert_eq!(compare("here/a b.jsonl", "here/../here/a b.jsonl"), Difference::None);
        assert_eq!(compare("gone/a b.jsonl", "here/a b.jsonl"), Difference::Allowed);
        assert_eq!(compare("here/a b.jsonl", "there/a b.jsonl"), Difference::Other);
        assert_eq!(compare("gone/other.jsonl", "here/a b.jsonl"), Difference::Other);
        assert_eq!(compare_places("null", &text("here")), Difference::Other);
    }
}
