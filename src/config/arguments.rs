//! Keys as options of a command line, `--key value`, as TRL's commands take them: how many words a key takes, and the text
//! that `--set` would be given for them.
//!
//! Words are read as transformers' `HfArgumentParser` reads them: a truth value may be left out, a list is several words,
//! a map is JSON, and everything else is one word that the key's type makes sense of, never YAML.

use super::emit;
use super::field::{Command, Key};
use super::foreign;
use super::keys;
use super::value::{Parse, as_bool};
use super::yaml::{self, Value};

/// The words that follow a key on a command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Words {
    /// One truth value, or none for true.
    Switch,
    /// One.
    One,
    /// One or more.
    Several,
    /// As many as there are: the key is not ours.
    Any,
}

/// The key of a command that a name stands for.
fn key_of(command: Command, name: &str) -> Option<&'static Key> {
    let other = foreign::find(name, command).and_then(|key| key.rule.stands_for());
    keys::find(other.unwrap_or(name), command)
}

/// What follows a key; `None` if nobody knows it.
#[must_use]
pub fn words_of(command: Command, name: &str) -> Option<Words> {
    let Some(key) = key_of(command, name) else {
        return foreign::find(name, command).map(|_| Words::Any);
    };
    Some(match key.kind {
        kind if kind == bool::KIND => Words::Switch,
        kind if kind.contains("a list of") => Words::Several,
        _ => Words::One,
    })
}

/// The truth value that a word of a command line means.
#[must_use]
pub fn truth(word: &str) -> Option<bool> {
    as_bool(word).or(match word.to_lowercase().as_str() {
        "t" | "y" | "1" | "true" | "yes" => Some(true),
        "f" | "n" | "0" | "false" | "no" => Some(false),
        _ => None,
    })
}

/// The `key=value` of `--set` for a key and the words that follow it.
#[must_use]
pub fn as_override(command: Command, name: &str, words: &[String]) -> String {
    let key = key_of(command, name);
    let value = match words {
        [] => "true".into(),
        [word] => value(key, word),
        _ => format!("[{}]", words.iter().map(|word| value(key, word)).collect::<Vec<_>>().join(", ")),
    };
    format!("{name}={value}")
}

/// One word as YAML that every key reads as that word.
fn value(key: Option<&Key>, word: &str) -> String {
    let is_text = key.is_some_and(|key| key.kind == String::KIND);
    let has_word = |word: &str| key.is_some_and(|key| key.values.contains(&word));
    if word == "null" || word == "None" || (word.eq_ignore_ascii_case("none") && !is_text && !has_word("none")) {
        return "null".into();
    }
    if is_text {
        return emit::quoted(word);
    }
    if key.is_some_and(|key| key.kind == bool::KIND)
        && let Some(truth) = truth(word)
    {
        return truth.to_string();
    }
    let is_collection = word.starts_with(['[', '{'])
        && yaml::parse(word).is_ok_and(|node| matches!(node.value, Value::List(_) | Value::Map(_)));
    let is_plain = as_bool(word).is_some() || super::value::as_float(word).is_some();
    if is_collection || is_plain { word.to_owned() } else { emit::quoted(word) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_become_values() {
        for (name, words, expected) in [
            ("bf16", vec![], "bf16=true"),
            ("bf16", vec!["n"], "bf16=false"),
            ("max_steps", vec!["-1"], "max_steps=-1"),
            ("learning_rate", vec!["1e-5"], "learning_rate=1e-5"),
            ("max_length", vec!["None"], "max_length=null"),
            ("max_length", vec!["none"], "max_length=null"),
            ("report_to", vec!["none"], "report_to=\"none\""),
            ("lora_target_modules", vec!["q_proj", "v_proj"], "lora_target_modules=[\"q_proj\", \"v_proj\"]"),
            ("lr_scheduler_kwargs", vec!["{\"min_lr_rate\": 0.1}"], "lr_scheduler_kwargs={\"min_lr_rate\": 0.1}"),
            ("system_prompt", vec!["a: b # {c}"], "system_prompt=\"a: b # {c}\""),
            ("system_prompt", vec!["{a: b}"], "system_prompt=\"{a: b}\""),
            ("output_dir", vec!["{% x %}"], "output_dir=\"{% x %}\""),
            ("torch_dtype", vec!["bfloat16"], "torch_dtype=\"bfloat16\""),
            ("eval_strategy", vec!["no"], "eval_strategy=no"),
        ] {
            let words: Vec<_> = words.into_iter().map(str::to_owned).collect();
            assert_eq!(as_override(Command::Sft, name, &words), expected);
        }
    }

    #[test]
    fn keys_take_as_many_words_as_their_type() {
        for (name, words) in [
            ("bf16", Some(Words::Switch)),
            ("eval_packing", Some(Words::Switch)),
            ("activation_checkpointing", Some(Words::Switch)),
            ("learning_rate", Some(Words::One)),
            ("lr", Some(Words::One)),
            ("report_to", Some(Words::Several)),
            ("hub_token", Some(Words::Any)),
            ("learning_rte", None),
            ("reward_weights", None),
        ] {
            assert_eq!(words_of(Command::Sft, name), words, "{name}");
        }
        assert_eq!(words_of(Command::Grpo, "reward_weights"), Some(Words::Several));
        assert_eq!(words_of(Command::Grpo, "reward_funcs"), Some(Words::Several));
    }
}
