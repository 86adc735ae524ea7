//! Makes `data/arithmetic/*.jsonl` and the tokenizer and config of `data/tiny-qwen`, always the same bytes.
//!
//! Run in the repository root: `cargo run --release --example make_arithmetic [FOLDER]`; FOLDER is `data` by default.
//! `tests/reward.rs` checks that the files in `data/` are what this makes.
//!
//! The task: sums and differences of two numbers below 50 with results from 0 to 98, as in `23+45=`. All 3,775 of
//! them are split once, so that no problem is in two of the parts:
//!
//! | part | problems | where |
//! | --- | --- | --- |
//! | test | 200 | `test.jsonl` only: no other file has them in any form |
//! | train | 2,000 | `train.jsonl` (prompt, answer) for GRPO, `sft.jsonl` (prompt, completion) for SFT |
//! | noise | 800 | wrong answers in `pretrain.jsonl` |
//! | rest | 775 | `pretrain.jsonl` only |
//!
//! `pretrain.jsonl` makes a base model that knows arithmetic but does not show it: every problem outside the test part
//! stands there once in the wording `23+45 is`, answered rightly; and the noise problems stand there three times as
//! `23+45=`, where each digit of the answer is replaced by another one so often that only three in ten answers are
//! right. A model trained on it answers `23+45=` rightly in about a third of its samples, and reinforcement learning
//! has to bring out what it knows. (Trained on wrong answers alone, a model this small learns the noise by heart
//! instead of the sums.)
#![expect(clippy::print_stdout, reason = "a program for the command line")]

use std::fmt::Write;
use std::path::Path;
use std::process::ExitCode;

use trainer::rng::Stream;

const SEED: u64 = 20_251;
const BELOW: u64 = 50;
const TEST: usize = 200;
const TRAIN: usize = 2_000;
const NOISE: usize = 800;
/// Rows with noise per noise problem.
const NOISY_ROWS: u64 = 3;
/// Share of noisy rows that are right.
const RIGHT: f64 = 0.3;

/// The vocabulary of the tiny model: five special tokens, then one character each, 64 in all.
const SPECIAL: [&str; 5] = ["<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"];
const CHARACTERS: &str = "0123456789+-*/=()., :;?!'\"<>_|%#\nabcdefghijklmnopqrstuvwxyz";

#[derive(Clone, Copy)]
struct Problem {
    left: u64,
    right: u64,
    is_sum: bool,
}

impl Problem {
    fn text(self) -> String {
        format!("{}{}{}", self.left, if self.is_sum { '+' } else { '-' }, self.right)
    }

    fn answer(self) -> u64 {
        if self.is_sum { self.left + self.right } else { self.left - self.right }
    }
}

/// Every file, by its path under the data folder.
pub(crate) fn files() -> Vec<(&'static str, String)> {
    let mut problems = Vec::new();
    for left in 0..BELOW {
        for right in 0..BELOW {
            problems.push(Problem { left, right, is_sum: true });
            if left >= right {
                problems.push(Problem { left, right, is_sum: false });
            }
        }
    }
    Stream::new(SEED, "problems", 0, 0).shuffle(&mut problems);
    let (test, known) = problems.split_at(TEST);
    let (train, noise) = (&known[..TRAIN], &known[TRAIN..TRAIN + NOISE]);
    vec![
        ("arithmetic/train.jsonl", lines(train.iter().map(|p| ask(*p, "answer")))),
        ("arithmetic/test.jsonl", lines(test.iter().map(|p| ask(*p, "answer")))),
        ("arithmetic/sft.jsonl", lines(train.iter().map(|p| ask(*p, "completion")))),
        ("arithmetic/pretrain.jsonl", pretrain(known, noise)),
        ("tiny-qwen/tokenizer.json", tokenizer()),
        ("tiny-qwen/tokenizer_config.json", TOKENIZER_CONFIG.to_owned()),
        ("tiny-qwen/config.json", CONFIG.to_owned()),
        ("tiny-qwen/generation_config.json", GENERATION_CONFIG.to_owned()),
    ]
}

fn lines(rows: impl Iterator<Item = String>) -> String {
    rows.map(|row| row + "\n").collect()
}

fn row(prompt: &str, column: &str, answer: &str) -> String {
    format!(r#"{{"prompt":"{prompt}","{column}":"{answer}"}}"#)
}

fn ask(problem: Problem, column: &str) -> String {
    row(&format!("{}=", problem.text()), column, &problem.answer().to_string())
}

fn pretrain(known: &[Problem], noise: &[Problem]) -> String {
    let mut rows: Vec<String> =
        known.iter().map(|p| row(&format!("{} is", p.text()), "completion", &p.answer().to_string())).collect();
    for (index, problem) in noise.iter().enumerate() {
        for repetition in 0..NOISY_ROWS {
            let mut stream = Stream::new(SEED, "noise", repetition, index as u64);
            let answer = noisy(&problem.answer().to_string(), &mut stream);
            rows.push(row(&format!("{}=", problem.text()), "completion", &answer));
        }
    }
    Stream::new(SEED, "rows", 0, 0).shuffle(&mut rows);
    lines(rows.into_iter())
}

/// Replaces each digit by another one, with the probability that leaves the share [`RIGHT`] of all answers as they are.
/// The first of two digits never becomes 0.
fn noisy(answer: &str, stream: &mut Stream) -> String {
    let kept = if answer.len() == 1 { RIGHT } else { RIGHT.sqrt() };
    let mut result = String::new();
    for (place, digit) in answer.bytes().enumerate() {
        let lowest = u8::from(answer.len() == 2 && place == 0);
        let mut value = digit - b'0';
        if stream.uniform() >= kept {
            // One of the digits from `lowest` to 9 except this one.
            let other = lowest + stream.below(u64::from(9 - lowest)) as u8;
            value = if other >= value { other + 1 } else { other };
        }
        result.push(char::from(b'0' + value));
    }
    result
}

/// A tokenizer of one token per character: BPE without merges, as Hugging Face's `tokenizers` reads it.
fn tokenizer() -> String {
    let added: Vec<String> = SPECIAL
        .iter()
        .enumerate()
        .map(|(id, token)| {
            format!(
                r#"    {{"id": {id}, "content": "{token}", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}}"#
            )
        })
        .collect();
    let mut vocabulary = String::new();
    let tokens = SPECIAL.iter().map(|t| (*t).to_owned()).chain(CHARACTERS.chars().map(|c| c.to_string()));
    for (id, token) in tokens.enumerate() {
        let separator = if id == 0 { "" } else { ",\n" };
        let escaped = token.replace('"', "\\\"").replace('\n', "\\n");
        let _ = write!(vocabulary, "{separator}      \"{escaped}\": {id}");
    }
    format!(
        r#"{{
  "version": "1.0",
  "truncation": null,
  "padding": null,
  "added_tokens": [
{}
  ],
  "normalizer": null,
  "pre_tokenizer": null,
  "post_processor": null,
  "decoder": {{"type": "Fuse"}},
  "model": {{
    "type": "BPE",
    "dropout": null,
    "unk_token": "<unk>",
    "continuing_subword_prefix": null,
    "end_of_word_suffix": null,
    "fuse_unk": false,
    "byte_fallback": false,
    "ignore_merges": false,
    "vocab": {{
{vocabulary}
    }},
    "merges": []
  }}
}}
"#,
        added.join(",\n")
    )
}

const TOKENIZER_CONFIG: &str = r#"{
  "tokenizer_class": "PreTrainedTokenizerFast",
  "bos_token": null,
  "eos_token": "<|endoftext|>",
  "pad_token": "<pad>",
  "unk_token": "<unk>",
  "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
  "add_bos_token": false,
  "clean_up_tokenization_spaces": false,
  "model_max_length": 256
}
"#;

/// 0.46 million parameters; every dimension is a multiple of 64, so that blocks of 4-bit weights fill the rows.
const CONFIG: &str = r#"{
  "architectures": ["Qwen2ForCausalLM"],
  "model_type": "qwen2",
  "hidden_size": 128,
  "intermediate_size": 256,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 32,
  "vocab_size": 64,
  "hidden_act": "silu",
  "max_position_embeddings": 256,
  "max_window_layers": 3,
  "use_sliding_window": false,
  "sliding_window": null,
  "rms_norm_eps": 1e-06,
  "rope_theta": 10000.0,
  "attention_dropout": 0.0,
  "initializer_range": 0.05,
  "tie_word_embeddings": true,
  "bos_token_id": null,
  "eos_token_id": 1,
  "pad_token_id": 0,
  "torch_dtype": "float32",
  "use_cache": true
}
"#;

const GENERATION_CONFIG: &str = r#"{
  "do_sample": true,
  "eos_token_id": [1, 3],
  "pad_token_id": 0
}
"#;

fn main() -> ExitCode {
    let folder = std::env::args().nth(1).unwrap_or_else(|| "data".to_owned());
    for (name, content) in files() {
        let path = Path::new(&folder).join(name);
        if let Err(error) = trainer::fs::write_atomic(&path, content.as_bytes()) {
            println!("{error}");
            return ExitCode::FAILURE;
        }
        println!("{}: {} bytes, {} lines", path.display(), content.len(), content.lines().count());
    }
    ExitCode::SUCCESS
}
