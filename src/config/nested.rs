//! Keys whose value holds settings that have keys of their own here: maps of arguments, `optim_args`, `mixed_precision`.
//!
//! Each has a table of what its entries mean, in the rules of the foreign keys; [`expand`] turns a value into entries of
//! the keys they stand for. What a table does not list is an error that names it: TRL hands such maps on to other
//! programs, so nothing in them can be passed over.

use std::ops::Range;

use super::diagnose::{Place, Problem, Problems};
use super::foreign::{ForeignKey, Rule, alias, is_empty, is_off, lacking, no_effect};
use super::value::{Mismatch, describe, listed, nearest};
use super::yaml::{self, Entry, Node, Value};

/// What the value of such a key holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entries {
    form: Form,
    /// Its entries, by the rules of foreign keys.
    pub(super) keys: &'static [ForeignKey],
    /// Whether an entry counts more than the key it stands for, should the file have both.
    pub(super) is_stronger: bool,
}

/// How it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// A map, or its JSON text.
    Map,
    /// A map, or `name=value, name=value`.
    Assignments,
    /// accelerate's word for the precision.
    Precision,
}

pub(super) const NO_SPLIT: &str = "batches are counted per process; divide `per_device_train_batch_size` instead";
const NOT_ADAMW: &str = "it belongs to another implementation of AdamW";
const LOADING: &str = "weights are read straight to where they are used";
const DECODING: &str = "a completion's text is always decoded whole";
const ALWAYS_LOGPROBS: &str = "log-probabilities are always computed";
const SAMPLING: &str = "the sampler has `temperature`, `top_k`, `top_p`, `min_p` and `repetition_penalty`";
const DATA_ONLY: &str = "ranks share the data and what `zero_stage` says, not layers or sequences";
const BY_STAGE: &str = "set `num_processes` and `zero_stage`";
const HUB_FOLDER: &str = "set the environment variable HF_HOME";

/// `generation_kwargs`: arguments of vLLM's `SamplingParams` and of transformers' `GenerationConfig`.
pub(super) static GENERATION: Entries = Entries {
    form: Form::Map,
    is_stronger: true,
    keys: &[
        alias("temperature", "temperature"),
        alias("top_p", "top_p"),
        alias("top_k", "top_k"),
        alias("min_p", "min_p"),
        alias("repetition_penalty", "repetition_penalty"),
        alias("max_tokens", "max_completion_length"),
        alias("max_new_tokens", "max_completion_length"),
        alias("stop", "stop_strings"),
        alias("stop_strings", "stop_strings"),
        no_effect("seed", "`seed` seeds the draws of every completion"),
        no_effect("use_cache", "the rollout has its own KV cache"),
        no_effect("cache_implementation", "the rollout has its own KV cache"),
        no_effect("disable_compile", "there is no graph compiler"),
        no_effect("pad_token_id", "batches are ragged: nothing is ever padded"),
        no_effect("bos_token_id", "a completion follows its prompt"),
        no_effect("logprobs", ALWAYS_LOGPROBS),
        no_effect("prompt_logprobs", ALWAYS_LOGPROBS),
        no_effect("skip_special_tokens", DECODING),
        no_effect("spaces_between_special_tokens", DECODING),
        no_effect("detokenize", DECODING),
        no_effect("include_stop_str_in_output", DECODING),
        no_effect("output_kind", DECODING),
        lacking("do_sample", &["true"], "completions of a group must differ; lower `temperature` instead"),
        lacking("eos_token_id", &[], "the tokenizer's end tokens end a completion; see `stop_strings`"),
        lacking("stop_token_ids", &["[]"], "name them as texts in `stop_strings`"),
        lacking("ignore_eos", &["false"], "an end token always ends a completion"),
        lacking("min_tokens", &["0"], "an end token always ends a completion"),
        lacking("min_new_tokens", &["0"], "an end token always ends a completion"),
        lacking("min_length", &["0"], "an end token always ends a completion"),
        lacking("max_length", &[], "it counts the prompt as well; set `max_completion_length`"),
        lacking("n", &["1"], "set `num_generations`"),
        lacking("best_of", &["1"], "set `num_generations`"),
        lacking("num_return_sequences", &["1"], "set `num_generations`"),
        lacking("num_beams", &["1"], "completions are sampled one by one"),
        lacking("presence_penalty", &["0"], SAMPLING),
        lacking("frequency_penalty", &["0"], SAMPLING),
        lacking("typical_p", &["1"], SAMPLING),
        lacking("epsilon_cutoff", &["0"], SAMPLING),
        lacking("eta_cutoff", &["0"], SAMPLING),
        lacking("penalty_alpha", &[], SAMPLING),
        lacking("length_penalty", &["1"], SAMPLING),
        lacking("no_repeat_ngram_size", &["0"], SAMPLING),
        lacking("bad_words", &["[]"], SAMPLING),
        lacking("bad_words_ids", &["[]"], SAMPLING),
        lacking("suppress_tokens", &["[]"], SAMPLING),
        lacking("logit_bias", &["{}"], SAMPLING),
        lacking("allowed_token_ids", &[], SAMPLING),
        lacking("structured_outputs", &[], "guided decoding is not supported"),
        lacking("guided_decoding", &[], "guided decoding is not supported"),
        lacking("truncate_prompt_tokens", &[], "set `max_prompt_length` and `truncate_prompts`"),
    ],
};

/// `model_init_kwargs`: arguments of transformers' `from_pretrained`.
pub(super) static MODEL_INIT: Entries = Entries {
    form: Form::Map,
    is_stronger: false,
    keys: &[
        alias("dtype", "dtype"),
        alias("torch_dtype", "dtype"),
        alias("revision", "model_revision"),
        alias("load_in_4bit", "load_in_4bit"),
        no_effect("attn_implementation", "attention is this program's own, for every device"),
        no_effect("experts_implementation", "models here are dense"),
        no_effect("trust_remote_code", "no code of a model folder is ever run"),
        no_effect("use_cache", "the rollout has its own KV cache, training needs none"),
        no_effect("low_cpu_mem_usage", LOADING),
        no_effect("device_map", "`device` says where to compute"),
        no_effect("max_memory", LOADING),
        no_effect("offload_folder", LOADING),
        no_effect("offload_state_dict", LOADING),
        no_effect("use_safetensors", "weights are always read from safetensors or GGUF"),
        lacking("token", &["false"], "set the environment variable HF_TOKEN"),
        lacking("cache_dir", &[], HUB_FOLDER),
        lacking("local_files_only", &["false"], "name the model's folder instead of a hub id"),
        lacking("force_download", &["false"], "empty the hub's cache folder"),
        lacking("subfolder", &[""], "name the model's folder instead of a hub id"),
        lacking("variant", &[], "name the model's folder instead of a hub id"),
        lacking("load_in_8bit", &["false"], "use `load_in_4bit: true` or a GGUF file with Q8_0"),
        lacking("quantization_config", &[], "use `load_in_4bit`, `bnb_4bit_quant_type` and `use_bnb_nested_quant`"),
        lacking("attention_dropout", &["0"], "the only dropout is the adapter's, `lora_dropout`"),
        lacking("rope_scaling", &[], "change it in the model's config.json"),
        lacking("rope_parameters", &[], "change it in the model's config.json"),
        lacking("max_position_embeddings", &[], "change it in the model's config.json"),
    ],
};

/// `dataset_kwargs`: how TRL, and TRL before 0.13, prepares the data of SFT.
pub(super) static DATASET: Entries = Entries {
    form: Form::Map,
    is_stronger: false,
    keys: &[
        no_effect(
            "add_special_tokens",
            "as in TRL 1.16, a chat template writes its own special tokens and a plain text gets the tokenizer's",
        ),
        no_effect("append_concat_token", "as in TRL 1.16, every plain text ends with the end-of-sequence token"),
        lacking(
            "skip_prepare_dataset",
            &["false"],
            "rows of token ids are not read; give the texts or messages they were made from",
        ),
    ],
};

/// `accelerator_config`: transformers' `AcceleratorConfig`.
pub(super) static ACCELERATOR: Entries = Entries {
    form: Form::Map,
    is_stronger: false,
    keys: &[
        lacking("split_batches", &["false"], NO_SPLIT),
        no_effect("dispatch_batches", "rows are read where they are used"),
        no_effect("even_batches", "the last batch of an epoch is as large as what is left"),
        no_effect("use_seedable_sampler", "the order of the data always follows `data_seed`"),
        no_effect("non_blocking", "there are no loader processes"),
        no_effect("use_configured_state", "there is no accelerator state to share"),
        lacking("gradient_accumulation_kwargs", &["{}"], "set `gradient_accumulation_steps`"),
    ],
};

/// `parallelism_config`: accelerate's `ParallelismConfig`.
pub(super) static PARALLELISM: Entries = Entries {
    form: Form::Map,
    is_stronger: false,
    keys: &[
        lacking("dp_replicate_size", &["1"], BY_STAGE),
        lacking("dp_shard_size", &["1"], BY_STAGE),
        lacking("tp_size", &["1"], DATA_ONLY),
        lacking("cp_size", &["1"], DATA_ONLY),
        lacking("sp_size", &["1"], DATA_ONLY),
        no_effect("cp_backend", DATA_ONLY),
        no_effect("sp_backend", DATA_ONLY),
        no_effect("tp_handler", DATA_ONLY),
        no_effect("cp_handler", DATA_ONLY),
        no_effect("sp_handler", DATA_ONLY),
    ],
};

/// `optim_args`: arguments of the AdamW classes that `optim` names in transformers.
pub(super) static OPTIM_ARGS: Entries = Entries {
    form: Form::Assignments,
    is_stronger: false,
    keys: &[
        alias("beta1", "adam_beta1"),
        alias("adam_beta1", "adam_beta1"),
        alias("beta2", "adam_beta2"),
        alias("adam_beta2", "adam_beta2"),
        alias("eps", "adam_epsilon"),
        alias("adam_epsilon", "adam_epsilon"),
        alias("weight_decay", "weight_decay"),
        alias("lr", "learning_rate"),
        lacking("amsgrad", &["false"], "AdamW is used as published"),
        lacking("maximize", &["false"], "a loss is minimised"),
        no_effect("fused", NOT_ADAMW),
        no_effect("foreach", NOT_ADAMW),
        no_effect("capturable", NOT_ADAMW),
        no_effect("differentiable", NOT_ADAMW),
        no_effect("use_kahan_summation", NOT_ADAMW),
        no_effect("momentum_dtype", NOT_ADAMW),
        no_effect("variance_dtype", NOT_ADAMW),
        no_effect("compensation_buffer_dtype", NOT_ADAMW),
        no_effect("min_8bit_size", NOT_ADAMW),
        no_effect("block_wise", NOT_ADAMW),
        no_effect("block_size", NOT_ADAMW),
        no_effect("is_paged", NOT_ADAMW),
        lacking("percentile_clipping", &["100"], "set `max_grad_norm`"),
    ],
};

/// `mixed_precision`: accelerate's word for what `bf16` and `fp16` say.
pub(super) static PRECISION: Entries = Entries {
    form: Form::Precision,
    is_stronger: false,
    keys: &[
        alias("bf16", "bf16"),
        alias("fp16", "fp16"),
        lacking("fp8", &["false"], "8-bit arithmetic is not supported; use `bf16: true`"),
    ],
};

/// The entries that the value of such a key gives, by the names of the keys they stand for. Reports what has no effect and
/// what is not supported.
pub(super) fn expand(outer: &Entry, table: &Entries, source: usize, problems: &mut Problems) -> Vec<Entry> {
    let inner = match inner_entries(&outer.node, table.form) {
        Ok(inner) => inner,
        Err(wrong) => {
            let place = Place::new(source, if wrong.span.is_empty() { &outer.key_span } else { &wrong.span });
            let mut problem = Problem::new(format!("`{}` {}", outer.key, wrong.what)).at(place, "");
            problem.help = wrong.help;
            problems.error(problem);
            return Vec::new();
        }
    };
    let mut found = Vec::new();
    for entry in inner {
        let at_key = Place::new(source, &entry.key_span);
        let name = if table.form == Form::Precision {
            format!("{}: {}", outer.key, entry.key)
        } else {
            format!("{}.{}", outer.key, entry.key)
        };
        let Some(key) = table.keys.iter().find(|key| key.name == entry.key) else {
            let names: Vec<_> = table.keys.iter().map(|key| key.name).collect();
            let help = match nearest(&entry.key, names.iter().copied()) {
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("it may hold {}", listed(&names)),
            };
            let problem = Problem::new(format!("`{}` holds `{}`, which is not known", outer.key, entry.key));
            problems.error(problem.at(at_key, "").help(help));
            continue;
        };
        match key.rule {
            Rule::NoEffect(why) if !is_empty(&entry.node) => {
                problems.warn(Problem::new(format!("`{name}` has no effect: {why}")).at(at_key, ""));
            }
            Rule::Lacking { off, why } if !is_off(&entry.node, off) => {
                let problem = Problem::new(format!("`{name}` asks for something that is not supported: {why}"));
                problems.error(problem.at(at_key, "not supported").help("remove it"));
            }
            Rule::Alias(to) if entry.node.value != Value::Null => found.push(Entry { key: to.into(), ..entry }),
            // Asks for nothing.
            _ => {}
        }
    }
    found
}

/// The entries as they are written, their values where the outer value stands.
fn inner_entries(node: &Node, form: Form) -> Result<Vec<Entry>, Mismatch> {
    match (&node.value, form) {
        (Value::Null, _) => Ok(Vec::new()),
        (Value::Map(entries), Form::Map | Form::Assignments) => Ok(entries.clone()),
        (Value::Scalar { text, .. }, Form::Map | Form::Assignments) if text.trim_start().starts_with('{') => {
            let inner =
                yaml::parse(text).map_err(|error| Mismatch::new(node, format!("is not a map: {}", error.message)))?;
            match inner.value {
                Value::Map(entries) => Ok(entries.into_iter().map(|entry| moved(entry, node)).collect()),
                _ => Err(Mismatch::expected(node, "a map")),
            }
        }
        (Value::Scalar { text, .. }, Form::Assignments) => assignments(text, node),
        (Value::Scalar { text, .. }, Form::Precision) => precision(text, node),
        (_, Form::Map) => Err(Mismatch::expected(node, "a map")),
        (_, Form::Assignments) => Err(Mismatch::expected(node, "`name=value, name=value` or a map")),
        (_, Form::Precision) => Err(Mismatch::expected(node, "one word")),
    }
}

/// An entry of a text inside a value, placed where that value stands.
fn moved(mut entry: Entry, node: &Node) -> Entry {
    entry.key_span = node.span.clone();
    place_at(&mut entry.node, &node.span);
    entry
}

fn place_at(node: &mut Node, span: &Range<usize>) {
    node.span = span.clone();
    match &mut node.value {
        Value::List(items) => items.iter_mut().for_each(|item| place_at(item, span)),
        Value::Map(entries) => {
            for entry in entries {
                entry.key_span = span.clone();
                place_at(&mut entry.node, span);
            }
        }
        Value::Null | Value::Scalar { .. } => {}
    }
}

fn scalar(text: &str, node: &Node) -> Node {
    Node { value: Value::Scalar { text: text.into(), is_quoted: false }, span: node.span.clone() }
}

fn assignments(text: &str, node: &Node) -> Result<Vec<Entry>, Mismatch> {
    text.split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .map(|part| {
            let (name, value) = part.split_once('=').ok_or_else(|| {
                Mismatch::new(node, format!("expects `name=value, name=value`, got {}", describe(node)))
            })?;
            Ok(Entry { key: name.trim().into(), key_span: node.span.clone(), node: scalar(value.trim(), node) })
        })
        .collect()
}

/// `no`, `bf16`, `fp16` as the two keys that say it; the other of the two stays as it is.
fn precision(text: &str, node: &Node) -> Result<Vec<Entry>, Mismatch> {
    let entry =
        |key: &str, value: &str| Entry { key: key.into(), key_span: node.span.clone(), node: scalar(value, node) };
    match text.to_lowercase().as_str() {
        "no" | "false" | "off" => Ok(vec![entry("bf16", "false"), entry("fp16", "false")]),
        word @ ("bf16" | "fp16" | "fp8") => Ok(vec![entry(word, "true")]),
        _ => {
            Err(Mismatch::new(node, format!("does not know {}", describe(node)))
                .help("valid values: `no`, `bf16`, `fp16`"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::field::Command;
    use super::super::keys;
    use super::*;

    #[test]
    fn tables_lead_to_keys_and_hold_each_name_once() {
        for table in [&GENERATION, &MODEL_INIT, &DATASET, &ACCELERATOR, &PARALLELISM, &OPTIM_ARGS, &PRECISION] {
            let mut names: Vec<_> = table.keys.iter().map(|key| key.name).collect();
            names.sort_unstable();
            assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "{names:?}");
            for key in table.keys {
                match key.rule {
                    Rule::Alias(to) => assert!(keys::find(to, Command::Grpo).is_some(), "{} leads to {to}", key.name),
                    Rule::NoEffect(_) | Rule::Lacking { .. } => {}
                    other => panic!("{}: {other:?} is no rule of an entry", key.name),
                }
            }
        }
    }

    #[test]
    fn texts_of_arguments_are_split() {
        let node = yaml::parse("beta1=0.9, eps = 1e-8,").expect("valid YAML");
        let entries = inner_entries(&node, Form::Assignments).expect("two assignments");
        let pairs: Vec<_> = entries.iter().map(|entry| (entry.key.as_str(), describe(&entry.node))).collect();
        assert_eq!(pairs, [("beta1", "`0.9`".to_owned()), ("eps", "`1e-8`".to_owned())]);
        let node = yaml::parse("fused").expect("valid YAML");
        assert!(inner_entries(&node, Form::Assignments).is_err());
    }
}
