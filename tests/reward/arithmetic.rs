//! The embedded data set: made anew it is the same, its parts are disjoint, and the tiny model's tokenizer reads it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::Value;
use tokenizers::Tokenizer;
use trainer::reward::math::is_equal;

#[path = "../../examples/make_arithmetic.rs"]
#[expect(dead_code, reason = "its `main` is not called here")]
mod make_arithmetic;

fn content(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("data").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn rows(name: &str) -> Vec<BTreeMap<String, String>> {
    content(name).lines().map(|line| serde_json::from_str(line).expect("a row of texts")).collect()
}

/// The right answer of `23+45=` or `23+45 is`.
fn solve(prompt: &str) -> i64 {
    let problem = prompt.trim_end_matches('=').trim_end_matches(" is");
    let at = problem.find(['+', '-']).expect("an operation");
    let (left, right): (i64, i64) = (problem[..at].parse().expect("left"), problem[at + 1..].parse().expect("right"));
    if problem[at..].starts_with('+') { left + right } else { left - right }
}

#[test]
fn the_files_are_what_the_example_makes_and_small() {
    for (name, made) in make_arithmetic::files() {
        assert!(content(name) == made, "data/{name} differs; run `cargo run --release --example make_arithmetic`");
        assert!(made.len() < 400_000, "data/{name} has {} bytes", made.len());
    }
}

#[test]
fn answers_are_right_and_the_test_problems_are_nowhere_else() {
    let problems = |name: &str| -> BTreeSet<String> {
        rows(name).iter().map(|r| r["prompt"].trim_end_matches('=').trim_end_matches(" is").to_owned()).collect()
    };
    for (name, column, count) in [
        ("arithmetic/train.jsonl", "answer", 2000),
        ("arithmetic/test.jsonl", "answer", 200),
        ("arithmetic/sft.jsonl", "completion", 2000),
    ] {
        let rows = rows(name);
        assert_eq!(rows.len(), count, "{name}");
        for row in &rows {
            let right = solve(&row["prompt"]);
            assert!((0..100).contains(&right), "{row:?}");
            assert!(is_equal(&row[column], &right.to_string()), "{row:?}");
        }
        assert_eq!(problems(name).len(), count, "{name} repeats a problem");
    }
    let test = problems("arithmetic/test.jsonl");
    for name in ["arithmetic/train.jsonl", "arithmetic/sft.jsonl", "arithmetic/pretrain.jsonl"] {
        assert!(test.is_disjoint(&problems(name)), "{name} holds a test problem");
    }
}

#[test]
fn the_pretraining_answers_are_right_in_one_wording_and_in_a_third_of_the_other() {
    let train: BTreeSet<String> =
        rows("arithmetic/train.jsonl").into_iter().map(|mut r| r.remove("prompt").expect("prompt")).collect();
    let mut answers: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for row in rows("arithmetic/pretrain.jsonl") {
        let solution = solve(&row["prompt"]).to_string();
        assert_eq!(row["completion"].len(), solution.len(), "{row:?}");
        if row["prompt"].ends_with('=') {
            answers.entry(row["prompt"].clone()).or_default().insert(row["completion"].clone());
        } else {
            assert_eq!(row["completion"], solution, "{row:?}");
        }
    }
    assert_eq!(answers.keys().cloned().collect::<BTreeSet<_>>(), train);
    for (prompt, answers) in answers {
        assert_eq!(answers.len(), 3, "{prompt} {answers:?}");
        assert!(answers.contains(&solve(&prompt).to_string()), "{prompt} {answers:?}");
    }
}

#[test]
fn the_tokenizer_gives_one_token_per_character_and_knows_its_specials() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/tiny-qwen/tokenizer.json");
    let tokenizer = Tokenizer::from_file(path).expect("loads");
    let config: Value = serde_json::from_str(&content("tiny-qwen/config.json")).expect("config");
    assert_eq!(config["vocab_size"], tokenizer.get_vocab_size(true));
    assert_eq!(config["eos_token_id"], tokenizer.token_to_id("<|endoftext|>").expect("eos"));
    assert_eq!(config["pad_token_id"], tokenizer.token_to_id("<pad>").expect("pad"));
    for name in ["train", "test", "sft", "pretrain"] {
        for row in rows(&format!("arithmetic/{name}.jsonl")) {
            for text in row.values() {
                let encoding = tokenizer.encode(text.as_str(), true).expect("encodes");
                assert_eq!(encoding.get_ids().len(), text.chars().count(), "{text}");
                assert!(!encoding.get_tokens().iter().any(|t| t == "<unk>"), "{text}");
                assert_eq!(tokenizer.decode(encoding.get_ids(), true).expect("decodes"), *text);
            }
        }
    }
    let encoding = tokenizer.encode("<|im_start|>user\n1+1=<|im_end|>\n2<|endoftext|>Ä", true).expect("encodes");
    assert_eq!(encoding.get_ids()[0], 2);
    assert_eq!(encoding.get_tokens().last().map(String::as_str), Some("<unk>"));
    assert_eq!(encoding.get_ids().iter().filter(|id| **id == 3 || **id == 1).count(), 2);
    assert_eq!(tokenizer.decode(encoding.get_ids(), true).expect("decodes"), "user\n1+1=\n2");
}
