//! Pairs of right answers and completions, with what `accuracy` and math-verify give for each and why they differ where
//! they do: `math_answers.jsonl`, judged by `scripts/golden/math_answers.py`.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use trainer::config::settings::RewardSpec;
use trainer::reward::{Sample, build};

fn pairs() -> Vec<Value> {
    include_str!("math_answers.jsonl").lines().map(|line| serde_json::from_str(line).expect("a pair")).collect()
}

#[test]
fn every_pair_is_scored_as_recorded() {
    let pairs = pairs();
    let mut accuracy = build(&RewardSpec::Builtin { name: "accuracy".to_owned(), parameters: Map::new() })
        .unwrap_or_else(|e| panic!("{e}"));
    let prompt = json!("p");
    let mut wrong = Vec::new();
    for pair in &pairs {
        let row = Map::from_iter([("solution".to_owned(), pair["gold"].clone())]);
        let sample = Sample {
            prompt: &prompt,
            prompt_text: "p",
            completion: pair["completion"].as_str().expect("a completion"),
            completion_ids: &[0],
            completion_tokens: 1,
            max_completion_length: 100,
            is_truncated: false,
            row: &row,
        };
        let score = accuracy.score(&[sample]).unwrap_or_else(|e| panic!("{pair}: {e}"))[0];
        if score != pair["want"].as_f64() {
            wrong.push(format!("{score:?} {pair}"));
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn the_table_is_large_names_its_sources_and_explains_every_difference() {
    let pairs = pairs();
    let mut sources: BTreeMap<&str, usize> = BTreeMap::new();
    for pair in &pairs {
        *sources.entry(pair["from"].as_str().expect("a source")).or_default() += 1;
        let differs = pair["judge"] != pair["want"];
        assert!(pair.get("judge").is_some(), "not judged: {pair}");
        assert_eq!(differs, pair.get("why").is_some_and(|w| w.as_str().is_some_and(|w| w.len() > 10)), "{pair}");
    }
    assert!(pairs.len() >= 500 && sources.len() >= 20, "{} pairs, {sources:?}", pairs.len());
    let wrong = pairs.iter().filter(|p| p["want"] == 0).count();
    assert!(wrong >= 150 && pairs.len() - wrong >= 150, "both kinds of answers are there");
}
