//! Every built-in through `build` and `score`, and every complaint about a wrong spec.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use trainer::config::settings::{RewardSettings, RewardSpec};
use trainer::reward::{Error, Reward, Rewards, Sample, build, builtin_names, check};

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        other => panic!("not an object: {other}"),
    }
}

fn spec(name: &str, parameters: Value) -> RewardSpec {
    RewardSpec::Builtin { name: name.to_owned(), parameters: object(parameters) }
}

fn make(name: &str, parameters: Value) -> Box<dyn Reward> {
    build(&spec(name, parameters)).unwrap_or_else(|e| panic!("{e}"))
}

fn complaint(name: &str, parameters: Value) -> String {
    match build(&spec(name, parameters.clone())) {
        Ok(_) => panic!("`{name}` was made"),
        Err(error) => {
            assert_eq!(check(&spec(name, parameters)), Err(error.to_string()), "checked without building");
            error.to_string()
        }
    }
}

/// Scores one completion for a row; `tokens` of at most 100.
fn score_with(
    reward: &mut dyn Reward,
    prompt: &str,
    completion: &str,
    tokens: usize,
    row: Value,
) -> Result<Option<f64>, Error> {
    let row = object(row);
    let sample = Sample {
        prompt: &json!("p"),
        prompt_text: prompt,
        completion,
        completion_ids: &[],
        completion_tokens: tokens,
        max_completion_length: 100,
        is_truncated: false,
        row: &row,
    };
    reward.score(&[sample]).map(|scores| scores[0])
}

fn score(name: &str, parameters: Value, completion: &str, row: Value) -> Option<f64> {
    score_with(&mut *make(name, parameters), "p", completion, 10, row).unwrap_or_else(|e| panic!("{e}"))
}

#[test]
fn accuracy_is_one_zero_or_none() {
    let of = |completion: &str, row: Value| score("accuracy", json!({}), completion, row);
    assert_eq!(of(r"so \boxed{\frac{1}{2}}", json!({"answer": "0.5"})), Some(1.0));
    assert_eq!(of(r"so \boxed{\frac{1}{3}}", json!({"solution": "$\\frac12$"})), Some(0.0));
    assert_eq!(of("68", json!({"answer": 68})), Some(1.0));
    assert_eq!(of("", json!({"answer": 68})), Some(0.0));
    assert_eq!(of("The answer is 1,234.", json!({"answer": "He sold 600 and 634.\n#### 1234"})), Some(1.0));
    assert_eq!(of("4", json!({"solution": r"We get $2+2$, hence $\boxed{4}$."})), Some(1.0));
    assert_eq!(of("it is 3", json!({"answer": ["2", "3"]})), Some(1.0));
    assert_eq!(of("it is 12", json!({"answer": "He has 12 left"})), Some(1.0));
    assert_eq!(of("Tuesday", json!({"answer": "on a Tuesday"})), Some(0.0));
    assert_eq!(of("4", json!({"answer": null})), None);
    assert_eq!(of("4", json!({"answer": ""})), None);
    assert_eq!(of("4", json!({"answer": "it depends very much on who you ask about it today"})), None);
    // TRL's name is understood and kept as the metric's name.
    assert_eq!(make("accuracy_reward", json!({})).name(), "accuracy_reward");
    assert_eq!(score("accuracy", json!({"require_boxed": true}), "4", json!({"answer": "4"})), Some(0.0));
    assert_eq!(score("accuracy", json!({"column": "gold"}), "4", json!({"answer": "5", "gold": "4"})), Some(1.0));
}

#[test]
fn reasoning_accuracy_looks_behind_the_reasoning() {
    let row = || json!({"solution": r"\frac{1}{3}"});
    let of = |completion: &str| score("reasoning_accuracy", json!({}), completion, row());
    assert_eq!(of(r"<think>hm</think> It is \boxed{\frac{1}{3}}"), Some(1.0));
    assert_eq!(of(r"<think>hm</think> It is \boxed{\frac{1}{2}}"), Some(0.0));
    assert_eq!(of(r"<think>maybe \boxed{\frac{1}{3}}"), Some(0.0));
    let parameters = json!({"reasoning_delimiters": ["<end>", "</think>"]});
    assert_eq!(score("reasoning_accuracy", parameters, r"1/2 <end> \boxed{1/3}", row()), Some(1.0));
}

#[test]
fn matches_compare_text_and_numbers() {
    let row = || json!({"answer": "Paris"});
    assert_eq!(score("exact_match", json!({}), " Paris\n", row()), Some(1.0));
    assert_eq!(score("exact_match", json!({}), "paris", row()), Some(0.0));
    assert_eq!(score("exact_match", json!({"ignore_case": true}), "paris", row()), Some(1.0));
    assert_eq!(score("exact_match", json!({"extract": true}), "<answer>Paris</answer>", row()), Some(1.0));
    assert_eq!(score("exact_match", json!({}), "x", json!({"answer": null})), None);
    let number = |completion, parameters| score("numeric_match", parameters, completion, json!({"answer": "3.14"}));
    assert_eq!(number("about 3.14", json!({})), Some(1.0));
    assert_eq!(number(r"\boxed{\pi}", json!({})), Some(0.0));
    assert_eq!(number(r"\boxed{\pi}", json!({"tolerance": 0.01})), Some(1.0));
    assert_eq!(number("3.2", json!({"relative_tolerance": 0.05})), Some(1.0));
    assert_eq!(number("no idea", json!({})), Some(0.0));
    assert_eq!(score("numeric_match", json!({}), "3", json!({"answer": "blue"})), None);
    assert_eq!(score("contains", json!({"text": ["a", "b"]}), "xbx", json!({})), Some(1.0));
    assert_eq!(score("contains", json!({}), "in Paris now", row()), Some(1.0));
    assert_eq!(score("contains", json!({"ignore_case": true, "text": "PARIS"}), "paris", json!({})), Some(1.0));
    assert_eq!(score("contains", json!({"text": "x"}), "y", json!({})), Some(0.0));
    assert_eq!(score("regex", json!({"pattern": r"\d{3}"}), "ab123", json!({})), Some(1.0));
    assert_eq!(score("regex", json!({"pattern": r"\d{3}", "full_match": true}), "ab123", json!({})), Some(0.0));
    assert_eq!(score("regex", json!({"pattern": r"(a+)+$"}), &("a".repeat(60) + "b"), json!({})), Some(0.0));
}

#[test]
fn formats_follow_trl_and_open_r1() {
    let think = |completion: &str| score("think_format_reward", json!({}), completion, json!({}));
    assert_eq!(think("<think>\nThis is my reasoning.\n</think>\nThis is my answer."), Some(1.0));
    assert_eq!(think("<think>\nThis is my reasoning.\nThis is my answer."), Some(0.0));
    assert_eq!(think("<think>a<think>b</think>"), Some(0.0));
    assert_eq!(think("x<think>a</think>"), Some(0.0));
    assert_eq!(think("</think><think>"), Some(0.0));
    assert_eq!(think("<think></think>"), Some(1.0));
    assert_eq!(score("tag_format", json!({}), "<think>a</think> <answer>b</answer>", json!({})), Some(1.0));
    assert_eq!(score("format", json!({}), "<think>a</think> <answer>b</answer>", json!({})), Some(0.0));
    assert_eq!(score("format", json!({}), "<think>\na\n</think>\n<answer>\nb\n</answer>", json!({})), Some(1.0));
    let tags = |completion: &str| score("tag_count", json!({}), completion, json!({}));
    assert_eq!(tags("<think>\na\n</think>\n<answer>\nb\n</answer>"), Some(1.0));
    assert_eq!(tags("<think>\na\n</think>\n<answer>b</answer>"), Some(0.5));
    assert_eq!(tags("<think>\n"), Some(0.25));
    assert_eq!(tags(""), Some(0.0));
}

#[test]
fn a_tag_opened_by_the_prompt_counts_unless_switched_off() {
    let prompt = "<|Assistant|><think>\n";
    for (parameters, expected) in [(json!({}), 1.0), (json!({"count_prompt": false}), 0.0)] {
        let mut reward = make("think_format", parameters);
        let score = score_with(&mut *reward, prompt, "so\n</think>\n4", 5, json!({})).expect("scores");
        assert_eq!(score, Some(expected));
    }
    let mut reward = make("think_format", json!({}));
    let twice = score_with(&mut *reward, prompt, "<think>so</think>4", 5, json!({})).expect("scores");
    assert_eq!(twice, Some(1.0), "a completion that repeats the tag is taken as it is");
}

#[test]
fn lengths_and_repetitions_are_penalised() {
    // TRL's example: longest 100, cache 20, 90 tokens: -0.5.
    let mut reward = make("get_soft_overlong_punishment", json!({"max_completion_len": 100, "soft_punish_cache": 20}));
    for (tokens, expected) in [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (101, -1.0)] {
        let score = score_with(&mut *reward, "p", "", tokens, json!({})).expect("scores").expect("applies");
        assert!((score - expected).abs() < 1e-12, "{tokens} tokens: {score}");
    }
    let mut reward = make("length_penalty", json!({}));
    assert_eq!(score_with(&mut *reward, "p", "", 90, json!({})).expect("scores"), Some(-0.5), "a fifth by default");
    let mut reward = make("length_penalty", json!({"soft_punish_cache": 0}));
    assert_eq!(score_with(&mut *reward, "p", "", 100, json!({})).expect("scores"), Some(0.0));
    let repetition = |text: &str| {
        score("repetition_penalty", json!({"ngram_size": 2, "max_penalty": -1.0}), text, json!({})).expect("applies")
    };
    assert!((repetition("5 5 5 5 5") + 0.75).abs() < 1e-12);
    assert!(repetition("a b c d").abs() < 1e-12);
    assert!(repetition("A b a B") < 0.0, "case does not count");
    assert!(repetition("").abs() < 1e-12 && repetition("one").abs() < 1e-12);
}

#[test]
fn countdown_uses_each_number_once() {
    let of = |completion: &str| score("countdown", json!({}), completion, json!({"nums": [3, 3, 8, 8], "target": 24}));
    assert_eq!(of("<answer>8 / (3 - 8/3)</answer>"), Some(1.0), "needs exact fractions");
    assert_eq!(of("<answer>8 / (3 - 8/3) = 24</answer>"), Some(1.0));
    assert_eq!(of("<answer>3 * 8</answer>"), Some(0.1));
    assert_eq!(of("<answer>3 * 8 + 3 - 3</answer>"), Some(0.1));
    assert_eq!(of("<answer>24</answer>"), Some(0.1));
    assert_eq!(of("<answer>eight</answer>"), Some(0.0));
    assert_eq!(of("no"), Some(0.0));
    let row = || json!({"numbers": [3.0, "8", 5], "target": "24"});
    assert_eq!(score("countdown", json!({}), "<answer>3*8</answer>", row()), Some(0.1));
    assert_eq!(score("countdown", json!({"use_all": false}), "<answer>3*8</answer>", row()), Some(1.0));
    assert_eq!(score("countdown", json!({"format_score": 0}), "<answer>3+8</answer>", row()), Some(0.0));
}

#[test]
fn a_batch_keeps_its_order_and_an_empty_one_is_empty() {
    let rows: Vec<Map<String, Value>> = (0..200).map(|i| object(json!({"answer": i % 3}))).collect();
    let prompt = json!("p");
    let samples: Vec<Sample<'_>> = rows
        .iter()
        .map(|row| Sample {
            prompt: &prompt,
            prompt_text: "p",
            completion: "1",
            completion_ids: &[],
            completion_tokens: 1,
            max_completion_length: 4,
            is_truncated: false,
            row,
        })
        .collect();
    let mut reward = make("accuracy", json!({}));
    let scores = reward.score(&samples).expect("scores");
    assert!(scores.iter().enumerate().all(|(i, s)| *s == Some(if i % 3 == 1 { 1.0 } else { 0.0 })));
    assert_eq!(reward.score(&[]).expect("scores"), []);
}

#[test]
fn wrong_specs_are_explained() {
    let message = complaint("acuracy", json!({}));
    assert!(message.contains("no reward `acuracy`, did you mean `accuracy`?"), "{message}");
    assert!(message.contains("countdown") && message.contains("`command`"), "{message}");
    let message = complaint("accuracy", json!({"require_box": true}));
    assert!(message.contains("no parameter `require_box`, did you mean `require_boxed`?"), "{message}");
    let message = complaint("accuracy", json!({"require_boxed": "yes"}));
    assert_eq!(message, "parameter `require_boxed` of reward `accuracy` is \"yes\", expected true or false");
    for (name, parameters, part) in [
        ("numeric_match", json!({"tolerance": -1}), "is -1, expected a number of at least 0"),
        ("length_penalty", json!({"max_completion_len": 10, "soft_punish_cache": 11}), "is 11, expected at most"),
        ("length_penalty", json!({"max_completion_len": 1.5}), "is 1.5, expected a whole number of at least 1"),
        ("repetition_penalty", json!({"ngram_size": 0}), "is 0, expected a whole number of at least 1"),
        ("repetition_penalty", json!({"max_penalty": 1}), "is 1, expected a number of at most 0"),
        ("countdown", json!({"format_score": 2}), "is 2, expected a number between 0 and 1"),
        ("contains", json!({"text": []}), "is [], expected a text or a list of texts"),
        ("accuracy", json!({"column": 3}), "is 3, expected a text"),
        ("regex", json!({}), "is missing, expected a regular expression"),
        ("regex", json!({"pattern": "("}), "expected a regular expression ("),
    ] {
        let message = complaint(name, parameters);
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn wrong_rows_are_explained() {
    let complain = |name: &str, row: Value| {
        score_with(&mut *make(name, json!({})), "p", "1", 1, row).expect_err("a complaint").to_string()
    };
    let message = complain("accuracy", json!({"question": "?", "result": 3}));
    assert!(
        message.contains("needs the column `answer` or `solution`, sample 0 has `question`, `result`"),
        "{message}"
    );
    let message = complain("accuracy", json!({"answer": {"value": 3}}));
    assert!(message.contains("`answer`, which is {\"value\":3} in sample 0, expected a text"), "{message}");
    let message = complain("countdown", json!({"nums": [1, 2]}));
    assert!(message.contains("needs the column `target`"), "{message}");
    let message = complain("countdown", json!({"nums": "1 2", "target": 3}));
    assert!(message.contains("expected a list of whole numbers"), "{message}");
}

#[test]
fn every_builtin_has_a_description_and_its_name_makes_it() {
    let page = trainer::config::reference();
    for (name, doc) in builtin_names() {
        assert!(page.contains(&format!("\n| `{name}` | ")), "{name} is not on the reference page");
        let explained = trainer::config::explain(name).expect("an explanation");
        assert!(explained.contains("a built-in of `reward_funcs`"), "{explained}");
        assert!(doc.len() > 20 && !doc.contains('\n'), "{name}: {doc}");
        let parameters = if name == "regex" { json!({"pattern": "x"}) } else { json!({}) };
        assert_eq!(check(&spec(name, parameters.clone())), Ok(()));
        assert_eq!(make(name, parameters).name(), name);
    }
}

/// What looks at one sample at a time may be asked before the batch is there, what compares them may not.
#[test]
fn scores_that_were_made_before_are_those_of_the_batch() {
    let specs = [
        spec("accuracy", json!({})),
        spec("length", json!({})),
        spec("length_penalty", json!({"soft_punish_cache": 50, "max_completion_len": 60})),
        RewardSpec::Command {
            name: "judge".into(),
            command: ["sh", "-c", "while read -r line; do echo '{\"id\": 1, \"scores\": [1, 2, 3, 4, 5]}'; done"]
                .map(Into::into)
                .into(),
            timeout_secs: 30.0,
        },
    ];
    let row = object(json!({"answer": "4"}));
    let texts = ["\\boxed{4}", "it is \\boxed{5}", "4", "\\boxed{2+2}", ""];
    let prompt = json!("2+2=");
    let samples: Vec<Sample<'_>> = (0..)
        .zip(texts)
        .map(|(place, completion)| Sample {
            prompt: &prompt,
            prompt_text: "2+2=",
            completion,
            completion_ids: &[],
            completion_tokens: 10 + 13 * place,
            max_completion_length: 100,
            is_truncated: false,
            row: &row,
        })
        .collect();
    let start = || Rewards::start(&specs, &RewardSettings::default(), &|| false).unwrap_or_else(|e| panic!("{e}"));
    let want = start().score(&samples, &|| false).expect("scores");
    assert_eq!(want.by_function[3], [1.0, 2.0, 3.0, 4.0, 5.0].map(Some));

    let mut rewards = start();
    let mut early = rewards.of_each();
    let mut known: BTreeMap<usize, Vec<Option<f64>>> = BTreeMap::new();
    for part in [0..2, 2..3, 3..5] {
        for (function, scores) in early.score(&samples[part], &|| false) {
            known.entry(function).or_default().extend(scores);
        }
    }
    assert!(!early.is_empty());
    assert_eq!(known.keys().copied().collect::<Vec<_>>(), [0, 2]);
    // Known scores are taken as they are.
    known.get_mut(&2).expect("known")[4] = Some(7.5);
    let got = rewards.score_rest(&samples, known, &|| false).expect("scores").by_function;
    assert_eq!((&got[0], &got[1], &got[3]), (&want.by_function[0], &want.by_function[1], &want.by_function[3]));
    assert_eq!(got[2][..4], want.by_function[2][..4]);
    assert_eq!(got[2][4], Some(7.5));
}

#[test]
fn a_function_that_fails_early_is_left_out_and_says_why_for_the_batch() {
    let specs = [spec("accuracy", json!({})), spec("length_penalty", json!({}))];
    let mut rewards = Rewards::start(&specs, &RewardSettings::default(), &|| false).unwrap_or_else(|e| panic!("{e}"));
    let (right, wrong) = (object(json!({"answer": "4"})), object(json!({"other": "4"})));
    let sample = |row| Sample {
        prompt: &Value::Null,
        prompt_text: "",
        completion: "4",
        completion_ids: &[],
        completion_tokens: 1,
        max_completion_length: 100,
        is_truncated: false,
        row,
    };
    let samples = [sample(&right), sample(&right), sample(&wrong)];
    let want = rewards.score(&samples, &|| false).expect_err("a column is missing").to_string();
    let mut early = rewards.of_each();
    assert_eq!(early.score(&samples[2..], &|| false).keys().copied().collect::<Vec<_>>(), [1]);
    assert_eq!(early.score(&samples[..1], &|| false).keys().copied().collect::<Vec<_>>(), [1]);
    let known = BTreeMap::from([(1, vec![Some(0.0); 3])]);
    assert_eq!(rewards.score_rest(&samples, known, &|| false).expect_err("a column is missing").to_string(), want);
}
