//! `trainer evaluate` on what training left: its numbers are those of the run, and wrong input is said.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::test_run::{Ended, TestRun, copy_files, names};

/// Sums in another order differ in the last bits.
const NEAR: f64 = 1e-6;

#[track_caller]
fn assert_near(found: f64, expected: f64, what: &str) {
    assert!((found - expected).abs() < NEAR, "{what}: {found}, expected {expected}");
}

/// The results in a folder.
fn results(folder: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(folder.join("evaluation.json")).unwrap()).unwrap()
}

/// The results without what measures time.
fn without_speed(mut results: Value) -> Value {
    for model in ["model", "against"] {
        if let Some(model) = results.get_mut(model).and_then(Value::as_object_mut) {
            model.remove("speed").unwrap();
        }
    }
    results
}

fn completions(folder: &Path) -> Vec<Value> {
    let text = fs::read_to_string(folder.join("completions.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[track_caller]
fn estimate(results: &Value, model: &str, metric: &str) -> f64 {
    let found = &results[model]["metrics"][metric]["estimate"];
    found.as_f64().unwrap_or_else(|| panic!("no `{metric}` of `{model}` in {results:#}"))
}

#[track_caller]
fn said_nothing(ended: Ended) -> String {
    let ended = ended.expect(0);
    assert_eq!(ended.err, "");
    ended.out
}

/// GRPO with some rows to evaluate on, of which the tiny model gets some right.
fn grpo() -> TestRun {
    TestRun::grpo().set("init_random", "false").set("eval_fraction", "0.1").set("max_eval_samples", 6)
}

#[test]
fn the_loss_of_a_run_is_found_again_for_its_result_its_checkpoints_and_its_base() {
    let run = TestRun::sft().set("eval_on_start", "true").set("learning_rate", "5e-3").done();
    let of_run = |key: &str| run.metric(key);
    let out = said_nothing(run.evaluate(&["--against", "base"]));
    let folder = run.output().join("evaluation");
    assert_eq!(names(&folder).into_iter().collect::<Vec<_>>(), ["evaluation.json", "evaluation.md"]);
    let found = results(&folder);
    for (key, metric) in
        [("eval_loss", "loss"), ("eval_mean_token_accuracy", "mean_token_accuracy"), ("eval_entropy", "entropy")]
    {
        let values = of_run(key);
        assert_eq!(values.len(), 3, "{key} after steps 0, 2 and 4");
        assert_near(estimate(&found, "model", metric), values[2], metric);
        assert_near(estimate(&found, "against", metric), values[0], metric);
        let difference = found["difference"][metric]["difference"].as_f64().unwrap();
        assert_near(difference, values[2] - values[0], metric);
    }
    assert_near(estimate(&found, "model", "perplexity"), of_run("eval_loss")[2].exp(), "perplexity");
    for metric in ["loss", "perplexity", "mean_token_accuracy"] {
        let own = &found["model"]["metrics"][metric];
        let [low, high] = ["low", "high"].map(|end| own[end].as_f64().unwrap());
        assert!(low < own["estimate"].as_f64().unwrap() && own["estimate"].as_f64().unwrap() < high, "{own}");
    }
    // 4 steps at this rate are seen over 8 rows.
    assert_eq!(found["difference"]["loss"]["is_seen"], true, "{}", found["difference"]);
    assert_eq!((found["task"].as_str(), found["data"]["split"].as_str()), (Some("sft"), Some("evaluation")));
    let sequences = found["model"]["per_sequence"].as_array().unwrap();
    let sum =
        |key: &str| sequences.iter().map(|s| s[key].as_f64().unwrap() * s["targets"].as_f64().unwrap()).sum::<f64>();
    let targets: f64 = sequences.iter().map(|s| s["targets"].as_f64().unwrap()).sum();
    assert_eq!(sequences.len(), 8);
    assert_near(sum("loss") / targets, estimate(&found, "model", "loss"), "the sum over sequences");
    for part in ["[Evaluation]", "the run's result", "of the evaluation split", "perplexity", "paired by sequence"] {
        assert!(out.contains(part), "`{part}` is missing in\n{out}");
    }
    let text = fs::read_to_string(folder.join("evaluation.md")).unwrap();
    assert!(text.contains("| metric | model | against |") && text.contains("| loss | "), "{text}");

    let checkpoint = run.output().join("checkpoint-2");
    let other = run.beside("of-checkpoint");
    let (checkpoint, other_name) = (checkpoint.to_str().unwrap(), other.to_str().unwrap());
    said_nothing(run.evaluate(&["--model_path", checkpoint, "--output", other_name]));
    let found = results(&other);
    assert_near(estimate(&found, "model", "loss"), of_run("eval_loss")[1], "checkpoint-2");
    assert_eq!((&found["model"]["step"], found.get("difference")), (&Value::from(2), None));
}

#[test]
fn a_whole_model_is_evaluated_where_it_lies() {
    let run = TestRun::full();
    // Before the run there is nothing but what it starts from.
    let out = said_nothing(run.evaluate(&[]));
    assert!(out.contains("has no result of a run") && out.contains("for want of rows for evaluation"), "{out}");
    let run = run.done();
    let folder = run.output().join("evaluation");
    let start = estimate(&results(&folder), "model", "loss");
    let checkpoint = run.output().join("checkpoint-30");
    let out = said_nothing(run.evaluate(&["--against", checkpoint.to_str().unwrap(), "--split", "train"]));
    assert!(out.contains("no difference seen"), "{out}");
    let found = results(&folder);
    assert!(estimate(&found, "model", "loss") < 0.8 * start);
    assert_eq!(estimate(&found, "model", "loss"), estimate(&found, "against", "loss"));
    assert_eq!(found["data"]["rows"], 64);
    let base = run.beside("base");
    said_nothing(run.evaluate(&["--model_path", "base", "--output", base.to_str().unwrap()]));
    assert_near(estimate(&results(&base), "model", "loss"), start, "the base");
}

#[test]
fn the_rewards_of_a_run_are_found_again_where_nothing_is_drawn() {
    let first = grpo().set("learning_rate", "1e-2").done();
    // A run that starts from the first one's result and evaluates it greedily.
    let second = grpo()
        .set("adapter_name_or_path", first.output().display())
        .set("top_k", 1)
        .set("eval_on_start", "true")
        .set("max_steps", 1)
        .done();
    let folder = second.beside("evaluation");
    let arguments =
        ["--model_path", first.output().to_str().unwrap(), "--output", folder.to_str().unwrap()].map(String::from);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let out = second.evaluate(&arguments).expect(0).out;
    assert!(out.contains("which makes them all alike"), "{out}");
    let found = results(&folder);
    let names = [
        "reward",
        "rewards/accuracy/mean",
        "rewards/regex/mean",
        "completions/mean_length",
        "completions/clipped_ratio",
    ];
    for name in names {
        let of_run = second.metric(&format!("eval_{name}"));
        assert_near(estimate(&found, "model", name), of_run[0], name);
    }
    assert!(estimate(&found, "model", "completions/mean_length") > 0.0);
}

/// pass@k by counting all choices, majority@k by counting votes, from completions.jsonl.
fn of_prompts(completions: &[Value], model: &str) -> (BTreeMap<u64, Vec<f64>>, f64) {
    let mut scores: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
    for record in completions.iter().filter(|record| record["model"] == model) {
        let score = record["rewards"]["accuracy"].as_f64().unwrap();
        scores.entry(record["prompt_index"].as_u64().unwrap()).or_default().push(score);
    }
    let passed = |of: &Vec<f64>| {
        let wrong = of.iter().filter(|&&score| score == 0.0).count() as f64;
        let (n, pairs) = (of.len() as f64, wrong * (wrong - 1.0));
        1.0 - pairs / (n * (n - 1.0))
    };
    let pass = scores.values().map(passed).sum::<f64>() / scores.len() as f64;
    (scores, pass)
}

#[test]
fn completions_are_the_same_for_every_model_count_and_batch() {
    let run = grpo().set("learning_rate", "1e-2").done();
    let evaluate = |name: &str, more: &[&str]| {
        let folder = run.beside(name);
        let all = [&["--output", folder.to_str().unwrap()], more].concat();
        (said_nothing(run.evaluate(&all)), folder)
    };
    let (out, folder) = evaluate("first", &["--against", "base", "--num_samples", "8", "--k", "1,2,8"]);
    let found = results(&folder);
    let all = completions(&folder);
    assert_eq!(all.len(), 2 * 6 * 8);
    for model in ["model", "against"] {
        let (scores, pass) = of_prompts(&all, model);
        let mean = scores.values().flatten().sum::<f64>() / 48.0;
        assert_near(estimate(&found, model, "rewards/accuracy/mean"), mean, "accuracy");
        assert_near(estimate(&found, model, "rewards/accuracy/pass@1"), mean, "pass@1");
        assert_near(estimate(&found, model, "rewards/accuracy/pass@2"), pass, "pass@2");
        let any = scores.values().filter(|of| of.contains(&1.0)).count() as f64 / 6.0;
        assert_near(estimate(&found, model, "rewards/accuracy/pass@8"), any, "pass@8");
        let majority = estimate(&found, model, "rewards/accuracy/majority@8");
        assert!((0.0..=any).contains(&majority), "{majority}");
        assert_eq!(found[model]["per_prompt"].as_array().unwrap().len(), 6);
    }
    // `regex` is 0 or 1 as well, and nobody knows its answers.
    assert!(found["model"]["metrics"].get("rewards/regex/pass@8").is_some());
    assert!(found["model"]["metrics"].get("rewards/regex/majority@8").is_none());
    assert!(found["model"]["metrics"].get("rewards/length_penalty/pass@8").is_none());
    assert_eq!(found["model"]["metrics"]["rewards/accuracy/pass@8"]["interval"], "wilson");
    assert!(out.contains("rewards/accuracy/majority@8") && out.contains("model less against"), "{out}");

    // The same again, with another number of sequences at a time.
    let again = ["--against", "base", "--num_samples", "8", "--k", "8,2,1", "--set", "max_num_seqs=3"];
    let (_, same) = evaluate("again", &again);
    assert_eq!(without_speed(results(&same)), without_speed(found));
    assert!(completions(&same) == all);

    // Fewer samples of fewer prompts are some of these.
    let (_, fewer) = evaluate("fewer", &["--num_samples", "2", "--max_samples", "3"]);
    let is_in = |record: &&Value| {
        record["model"] == "model" && record["prompt_index"].as_u64() < Some(3) && record["sample"].as_u64() < Some(2)
    };
    let expected: Vec<&Value> = all.iter().filter(is_in).collect();
    assert!(completions(&fewer).iter().collect::<Vec<_>>() == expected);

    // A model does not differ from itself.
    let (out, itself) = evaluate("itself", &["--model_path", "base", "--against", "base"]);
    let found = results(&itself);
    for (name, difference) in found["difference"].as_object().unwrap() {
        assert_eq!(
            (difference["difference"].as_f64(), &difference["is_seen"]),
            (Some(0.0), &Value::from(false)),
            "{name}"
        );
    }
    assert!(out.contains("no difference seen") && !out.contains(" p 0"), "{out}");
}

#[test]
fn several_processes_are_for_training_alone() {
    let run = TestRun::sft().set("num_processes", 2);
    let out = said_nothing(run.evaluate(&["--max_samples", "2"]));
    assert!(out.contains("evaluation is one process; the 2 of the configuration are for training"), "{out}");
    assert_eq!(results(&run.output().join("evaluation"))["data"]["rows"], 2);
}

#[test]
fn a_signal_leaves_nothing() {
    let run = grpo().set("max_completion_length", 128).set("max_eval_samples", 64);
    let ended = run.evaluate_until(&["--num_samples", "512"], "[Evaluation]", "INT").expect(130);
    // On a busy machine the model may still be on its way.
    let is_said = ended.out.contains("interrupted: nothing was written") || ended.err.contains("nothing is saved");
    assert!(is_said, "{}\n{}", ended.out, ended.err);
    assert!(!run.output().exists());
}

/// Asserts one message, and that nothing was written.
#[track_caller]
fn refused(run: &TestRun, arguments: &[&str], code: i32, parts: &[&str]) {
    run.evaluate(arguments).expect_error(code, parts);
    assert!(!run.has("evaluation"), "results were written");
}

#[test]
fn what_cannot_be_evaluated_is_said() {
    let run = grpo().done();
    let place = |name: &str| run.beside(name).to_str().unwrap().to_string();
    let missing = place("missing");
    refused(
        &run,
        &["--model_path", &missing],
        1,
        &["`--model_path", &missing, "nothing of this name", "`checkpoint-N`"],
    );
    refused(&run, &["--against", &missing], 1, &["`--against", &missing, "nothing of this name"]);
    refused(&run, &["--num_samples", "4", "--k", "1,8"], 2, &["`--k 8`", "4 samples", "raise `--num_samples`"]);
    refused(&run, &["--split", "test", "--set", "eval_fraction=null"], 1, &["`--split test`", "eval_fraction"]);

    let adapter = run.beside("adapter");
    copy_files(&run.output(), &adapter);
    let config = adapter.join("adapter_config.json");
    let text = fs::read_to_string(&config).unwrap().replace("data/tiny-qwen", "Qwen/Qwen2.5-7B");
    fs::write(&config, text).unwrap();
    let parts =
        ["made for `Qwen/Qwen2.5-7B`", "the configuration's model is `data/tiny-qwen`", "--set model_name_or_path="];
    refused(&run, &["--model_path", adapter.to_str().unwrap()], 1, &parts);
    let other = fs::read_to_string(&config)
        .unwrap()
        .replace("Qwen/Qwen2.5-7B", "data/tiny-qwen")
        .replace("\"r\": 4", "\"r\": 8");
    fs::write(&config, other).unwrap();
    refused(&run, &["--model_path", adapter.to_str().unwrap()], 1, &["adapter_model.safetensors", "shape"]);

    let damaged: PathBuf = run.beside("checkpoint-2");
    copy_files(&run.output().join("checkpoint-2"), &damaged);
    fs::write(damaged.join("adapter_model.safetensors"), "x").unwrap();
    refused(&run, &["--model_path", damaged.to_str().unwrap()], 1, &["checkpoint-2", "adapter_model.safetensors"]);

    fs::create_dir(run.beside("empty")).unwrap();
    refused(&run, &["--model_path", &place("empty")], 1, &["holds no model", "config.json"]);
    fs::write(run.beside("none.jsonl"), "").unwrap();
    refused(&run, &["--set", &format!("dataset_name={}", place("none.jsonl"))], 1, &["none.jsonl"]);
    fs::write(run.beside("file"), "").unwrap();
    refused(&run, &["--output", &place("file")], 1, &["is no folder", "`--output`"]);
    refused(&TestRun::sft(), &["--k", "1"], 2, &["`--k` is for configurations of `trainer grpo`", "leave it out"]);
    // Everything that is wrong with a configuration is said at once.
    let neither = TestRun::sft().config("configs/accelerate_deepspeed_zero2.yaml");
    for (run, arguments, part) in [
        (&run, &["--task", "sft"][..], "`reward_funcs` is a key of `trainer grpo`, not of `trainer sft`"),
        (&neither, &[], "accelerate_deepspeed_zero2.yaml"),
    ] {
        let ended = run.evaluate(arguments).expect(2);
        assert!(ended.err.contains(part) && ended.out.is_empty(), "{}", ended.err);
        assert!(!run.has("evaluation"), "results were written");
    }
}
