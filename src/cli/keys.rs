//! TRL's way of calling: `trainer sft --config FILE --learning_rate 1e-5 --bf16`, where every key is an option.
//!
//! The words are rewritten before they are parsed: what is no option of the command becomes `--set key=value`. Keys may be
//! written with dashes, with `=`, as `--no_key`, and with as many words as their type takes.

use std::ffi::OsString;

use crate::config::{self, Command, Words};

/// The options of `sft` and `grpo` themselves.
const OWN: &[&str] = &["set", "resume", "config", "config-file", "config_file", "help", "version"];

/// The words of a command line with `--key value` as `--set key=value`.
pub(super) fn as_overrides(words: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let words: Vec<OsString> = words.into_iter().collect();
    let command = match words.get(1).and_then(|word| word.to_str()) {
        Some("sft") => Command::Sft,
        Some("grpo") => Command::Grpo,
        _ => return words,
    };
    let mut rewritten = words[..2].to_vec();
    let mut rest = &words[2..];
    while let Some((word, after)) = rest.split_first() {
        if word == "--" {
            break;
        }
        rest = after;
        let text = word.to_str().and_then(|word| word.strip_prefix("--"));
        let Some((name, value)) = text.map(|text| text.split_once('=').map_or((text, None), |(n, v)| (n, Some(v))))
        else {
            rewritten.push(word.clone());
            continue;
        };
        if OWN.contains(&name) {
            rewritten.push(word.clone());
            // Its value is no key, whatever it looks like.
            if name == "set"
                && value.is_none()
                && let Some((value, after)) = rest.split_first()
            {
                rewritten.push(value.clone());
                rest = after;
            }
            continue;
        }
        let name = name.replace('-', "_");
        let (name, given) = match (negated(command, &name), value) {
            (Some(key), None) => (key, vec!["false".to_owned()]),
            (_, Some(value)) => (name, vec![value.to_owned()]),
            (_, None) => {
                let taken = taken(command, &name, rest);
                rest = &rest[taken.len()..];
                (name, taken)
            }
        };
        rewritten.push("--set".into());
        rewritten.push(config::as_override(command, &name, &given).into());
    }
    rewritten.extend_from_slice(rest);
    rewritten
}

/// The key that `no_key` switches off.
fn negated(command: Command, name: &str) -> Option<String> {
    let key = name.strip_prefix("no_")?;
    let is_switch = config::words_of(command, key) == Some(Words::Switch);
    (config::words_of(command, name).is_none() && is_switch).then(|| key.to_owned())
}

/// The words after a key that are its value.
fn taken(command: Command, name: &str, rest: &[OsString]) -> Vec<String> {
    let values = rest.iter().map_while(|word| word.to_str().filter(|word| !is_option(word)));
    let is_file =
        |word: &&str| std::path::Path::new(word).extension().is_some_and(|ending| ending == "yaml" || ending == "yml");
    let taken: Vec<&str> = match config::words_of(command, name) {
        Some(Words::Switch) => values.take(1).filter(|word| config::truth(word).is_some()).collect(),
        Some(Words::One) => values.take(1).collect(),
        // A configuration may stand after the list.
        Some(Words::Several | Words::Any) | None => values.take_while(|word| !is_file(word)).collect(),
    };
    taken.into_iter().map(str::to_owned).collect()
}

/// Whether a word begins an option; a negative number does not.
fn is_option(word: &str) -> bool {
    word.strip_prefix('-').is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_digit() || c == '.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(line: &str) -> String {
        let words = line.split(' ').map(OsString::from);
        let words: Vec<_> = as_overrides(words).into_iter().map(|word| word.into_string().expect("UTF-8")).collect();
        words.join(" ")
    }

    #[test]
    fn keys_become_overrides() {
        for (line, expected) in [
            ("trainer sft --config c.yaml --max_steps 1", "trainer sft --config c.yaml --set max_steps=1"),
            ("trainer sft c.yaml --learning-rate=1e-5", "trainer sft c.yaml --set learning_rate=1e-5"),
            ("trainer sft --bf16 c.yaml", "trainer sft --set bf16=true c.yaml"),
            ("trainer sft --bf16 False c.yaml", "trainer sft --set bf16=false c.yaml"),
            (
                "trainer sft --lora_target_modules q_proj v_proj --report_to none --max_steps -1 c.yaml",
                "trainer sft --set lora_target_modules=[\"q_proj\", \"v_proj\"] --set report_to=\"none\" \
                 --set max_steps=-1 c.yaml",
            ),
            ("trainer sft c.yaml --no_gradient_checkpointing", "trainer sft c.yaml --set gradient_checkpointing=false"),
            ("trainer sft c.yaml --no_cuda", "trainer sft c.yaml --set no_cuda=true"),
            ("trainer sft c.yaml --set seed=1 --resume x --help", "trainer sft c.yaml --set seed=1 --resume x --help"),
            (
                "trainer grpo --config_file zero3.yaml c.yaml --zero_stage 2 --config-file=zero2.yaml",
                "trainer grpo --config_file zero3.yaml c.yaml --set zero_stage=2 --config-file=zero2.yaml",
            ),
            (
                "trainer grpo --reward_funcs accuracy format c.yml",
                "trainer grpo --set reward_funcs=[\"accuracy\", \"format\"] c.yml",
            ),
            ("trainer sft c.yaml --learning_rte 1", "trainer sft c.yaml --set learning_rte=1"),
            ("trainer generate --model m --seed 1", "trainer generate --model m --seed 1"),
            ("trainer sft -- --seed 1", "trainer sft -- --seed 1"),
            ("trainer", "trainer"),
        ] {
            assert_eq!(rewritten(line), expected);
        }
    }
}
