//! The rewards that TRL and open-r1 have, against the values of their formulas in `formulas.json`, which
//! `scripts/golden/reward_formulas.py` computes.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};
use trainer::config::settings::RewardSpec;
use trainer::reward::{Sample, build};

/// Rounding of a cosine and a few operations in another order.
const TOLERANCE: f64 = 1e-12;

#[test]
fn every_formula_gives_the_values_of_its_source() {
    let runs: Vec<Value> = serde_json::from_str(include_str!("formulas.json")).expect("a list of runs");
    let mut names = BTreeSet::new();
    let mut wrong = Vec::new();
    for run in &runs {
        let name = run["reward"].as_str().expect("a name");
        names.insert(name);
        let parameters = run["parameters"].as_object().expect("parameters").clone();
        let spec = RewardSpec::Builtin { name: name.to_owned(), parameters: parameters.clone() };
        let mut reward = build(&spec).unwrap_or_else(|e| panic!("{e}"));
        let completions: Vec<&str> = texts(&run["completions"]);
        let rows: Vec<Map<String, Value>> = (0..completions.len())
            .map(|i| match run["solutions"].get(i) {
                Some(solution) => Map::from_iter([("solution".to_owned(), solution.clone())]),
                None => Map::new(),
            })
            .collect();
        let ids: Vec<Vec<u32>> = (0..completions.len())
            .map(|i| match run["tokens"].get(i) {
                Some(tokens) => {
                    tokens.as_array().expect("ids").iter().map(|t| t.as_u64().expect("id") as u32).collect()
                }
                None => vec![0],
            })
            .collect();
        let prompt = json!("p");
        let samples: Vec<Sample<'_>> = (0..completions.len())
            .map(|i| Sample {
                prompt: &prompt,
                prompt_text: "p",
                completion: completions[i],
                completion_ids: &ids[i],
                completion_tokens: ids[i].len(),
                max_completion_length: 100,
                is_truncated: false,
                row: &rows[i],
            })
            .collect();
        let scores = reward.score(&samples).unwrap_or_else(|e| panic!("{name}: {e}"));
        for (i, score) in scores.iter().enumerate() {
            let expected = run["scores"][i].as_f64();
            let is_same = match (score, expected) {
                (Some(score), Some(expected)) => (score - expected).abs() <= TOLERANCE,
                (score, expected) => *score == expected,
            };
            if !is_same {
                wrong.push(format!("{name} {parameters:?} {:?}: {score:?}, expected {expected:?}", completions[i]));
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
    assert!(names.len() >= 13, "{names:?}");
}

fn texts(value: &Value) -> Vec<&str> {
    value.as_array().expect("a list").iter().map(|t| t.as_str().expect("a text")).collect()
}

#[test]
fn a_length_is_compared_within_its_batch_and_a_key_has_one_name() {
    let make = |name: &str, parameters: Value| {
        let Value::Object(parameters) = parameters else { panic!("parameters") };
        build(&RewardSpec::Builtin { name: name.to_owned(), parameters })
    };
    let mut length = make("length", json!({})).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(length.score(&[]).expect("scores"), []);
    let message = make("cosine", json!({"cosine_max_len": 5, "max_len": 6})).err().expect("a complaint").to_string();
    assert!(message.contains("`max_len`") && message.contains("`cosine_max_len` is given too"), "{message}");
    let message = make("cosine", json!({"cosine_max_length": 5})).err().expect("a complaint").to_string();
    assert!(message.contains("did you mean `cosine_max_len`?"), "{message}");
}
