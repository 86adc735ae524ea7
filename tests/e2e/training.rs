//! Runs that go well: what they learn and what they leave.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader};

use crate::test_run::{TestRun, names, start};

/// Mean of the first and of the last `count` values.
fn ends(values: &[f64], count: usize) -> (f64, f64) {
    assert!(values.len() >= 2 * count, "only {} values", values.len());
    let mean = |part: &[f64]| part.iter().sum::<f64>() / count as f64;
    (mean(&values[..count]), mean(&values[values.len() - count..]))
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(ToString::to_string).collect()
}

#[test]
fn sft_of_an_adapter_lowers_the_loss_and_logs_it() {
    let run = TestRun::sft().set("max_steps", 12).set("learning_rate", "5e-3");
    let ended = run.run(&[]).expect(0);
    assert_eq!(ended.steps(), (1..=12).collect::<Vec<_>>());
    assert_eq!(ended.err, "");
    let (first, last) = ends(&run.metric("loss"), 2);
    assert!(last < 0.8 * first, "the loss went from {first:.3} to {last:.3}");
    let (first, last) = ends(&run.metric("eval_loss"), 1);
    assert!(last < 0.8 * first, "the evaluation loss went from {first:.3} to {last:.3}");

    let rows = run.rows();
    let is_eval = |row: &&trainer::telemetry::Row| row.contains_key("eval_loss");
    let keys =
        ["loss", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy", "num_tokens", "epoch", "step_time"];
    for row in rows.iter().filter(|row| !is_eval(row)) {
        assert!(row.keys().next().is_some_and(|key| key == "step"), "{row:?}");
        for key in keys {
            assert!(row.get(key).is_some_and(serde_json::Value::is_number), "`{key}` is missing in {row:?}");
        }
    }
    let keys = [
        "step",
        "epoch",
        "eval_loss",
        "eval_entropy",
        "eval_mean_token_accuracy",
        "eval_runtime",
        "eval_samples_per_second",
    ];
    assert_eq!(rows.iter().filter(is_eval).count(), 6);
    for row in rows.iter().filter(is_eval) {
        assert_eq!(row.keys().map(String::as_str).collect::<Vec<_>>(), keys);
    }
}

#[test]
fn a_tokenizer_is_a_folder_or_its_file() {
    let weights = ["data/tiny-qwen", "data/tiny-qwen/tokenizer.json"]
        .map(|place| TestRun::sft().set("max_steps", 1).set("tokenizer_name_or_path", place).done().weights());
    assert!(weights[0] == weights[1]);
}

#[test]
fn sft_leaves_its_files_and_no_others() {
    let run = TestRun::sft().done();
    // completions.jsonl belongs to GRPO.
    let expected = [
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoint-2",
        "checkpoint-4",
        "config.resolved.yaml",
        "curves.svg",
        "generation_config.json",
        "metrics.jsonl",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(names(&run.output()), set(&expected));
    let expected = [
        "adapter_config.json",
        "adapter_model.safetensors",
        "generation_config.json",
        "manifest.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer_state.json",
        "trainer_state.safetensors",
    ];
    assert_eq!(names(&run.output().join("checkpoint-4")), set(&expected));
    let last = fs::read(run.output().join("checkpoint-4/adapter_model.safetensors")).unwrap();
    assert!(last == run.weights(), "the final adapter is not that of the last checkpoint");
}

#[test]
fn grpo_of_all_weights_raises_the_reward() {
    let run = TestRun::grpo()
        .set("use_peft", "false")
        .set("load_in_4bit", "false")
        .set("learning_rate", "2e-3")
        .set("reward_funcs", r#"[{kind: regex, pattern: "^[0-9]"}]"#)
        .set("per_device_train_batch_size", 32)
        .set("num_generations", 8)
        .set("max_completion_length", 4)
        .set("max_steps", 30)
        .done();
    let (first, last) = ends(&run.metric("reward"), 3);
    assert!(first < 0.5 && last > 0.8, "the reward went from {first:.3} to {last:.3}");
    assert!(run.has("model.safetensors") && run.has("config.json") && !run.has("adapter_model.safetensors"));
}

#[test]
fn grpo_leaves_metrics_with_the_names_of_trl_and_every_completion() {
    let run = TestRun::grpo().set("beta", 0.04).set("log_completions", "true").set("num_completions_to_print", 2);
    let ended = run.run(&[]).expect(0);
    assert_eq!(ended.steps(), [1, 2, 3]);
    let rows = run.rows();
    assert_eq!(rows.len(), 3);
    let keys = [
        "step",
        "epoch",
        "loss",
        "grad_norm",
        "learning_rate",
        "num_tokens",
        "step_time",
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "rewards/regex/mean",
        "rewards/regex/std",
        "rewards/length_penalty/mean",
        "rewards/length_penalty/std",
        "rewards/accuracy/mean",
        "rewards/accuracy/std",
        "kl",
        "entropy",
        "completions/mean_length",
        "completions/min_length",
        "completions/max_length",
        "completions/clipped_ratio",
        "completions/mean_terminated_length",
        "completions/min_terminated_length",
        "completions/max_terminated_length",
        "clip_ratio/region_mean",
        "clip_ratio/low_mean",
        "clip_ratio/low_min",
        "clip_ratio/high_mean",
        "clip_ratio/high_max",
    ];
    for row in &rows {
        for key in keys {
            assert!(row.get(key).is_some_and(serde_json::Value::is_number), "`{key}` is missing in {row:?}");
        }
    }
    // The policy starts as the reference and then leaves it.
    let kl = run.metric("kl");
    assert!(kl[0].abs() < 1e-9 && kl[2] > 0.0, "{kl:?}");

    let completions = run.completions();
    assert_eq!(completions.len(), 3 * 8);
    for (index, completion) in completions.iter().enumerate() {
        assert_eq!(completion["step"].as_u64(), Some(index as u64 / 8 + 1));
        assert!(completion["prompt"].as_str().is_some_and(|text| text.ends_with('=')), "{completion}");
        let text = completion["completion"].as_str().unwrap();
        let has_digit = f64::from(u8::from(text.contains(|c: char| c.is_ascii_digit())));
        assert_eq!(completion["rewards"]["regex"].as_f64(), Some(has_digit), "{completion}");
        let rewards = completion["rewards"].as_object().unwrap();
        assert_eq!(rewards.keys().collect::<Vec<_>>(), ["regex", "length_penalty", "accuracy"]);
        let sum: f64 = rewards.values().map(|value| value.as_f64().unwrap()).sum();
        assert!((completion["reward"].as_f64().unwrap() - sum).abs() < 1e-9, "{completion}");
    }
    let mean = completions[16..].iter().map(|c| c["reward"].as_f64().unwrap()).sum::<f64>() / 8.0;
    assert!((run.metric("reward")[2] - mean).abs() < 1e-6);
    for group in completions.chunks(4) {
        assert!(group.iter().all(|completion| completion["prompt"] == group[0]["prompt"]));
        let sum: f64 = group.iter().map(|completion| completion["advantage"].as_f64().unwrap()).sum();
        assert!(sum.abs() < 1e-4, "the advantages of a group sum to {sum}");
    }
    for name in ["checkpoint-2", "checkpoint-3", "config.resolved.yaml", "curves.svg", "adapter_model.safetensors"] {
        assert!(run.has(name), "{name} is missing");
    }
    let shown = completions[0]["completion"].as_str().unwrap().split_whitespace().next().unwrap().to_string();
    assert!(ended.out.contains(&shown), "`{shown}` is not shown in\n{}", ended.out);
}

#[test]
fn the_stored_weights_of_the_repository_answer_and_train() {
    let run = TestRun::grpo().set("init_random", "false").set("reward_funcs", "[accuracy]").set("max_steps", 8);
    let run = run.set("per_device_train_batch_size", 16).done();
    // The model was trained until a part of its answers is right.
    let right: f64 = run.metric("rewards/accuracy/mean").iter().sum::<f64>() / 8.0;
    assert!(right > 0.1 && right < 0.9, "{right:.3} of the answers are right");
    assert!(run.metric("grad_norm").iter().any(|&norm| norm > 0.0));
    let sft = TestRun::sft().set("init_random", "false").set("adapter_name_or_path", run.output().display()).done();
    assert!(sft.metric("loss")[0] < 0.8 * TestRun::sft().done().metric("loss")[0]);
}

#[test]
fn the_resolved_config_gives_the_same_run() {
    let first = TestRun::sft().done();
    let again = TestRun::of("sft", first.output().join("config.resolved.yaml")).done();
    again.assert_same(&first);
    let first = TestRun::grpo().done();
    let again = TestRun::of("grpo", first.output().join("config.resolved.yaml")).done();
    again.assert_same(&first);
    // Another seed is another run: the comparison above can fail.
    assert!(TestRun::grpo().set("seed", 2).done().weights() != first.weights());
}

#[test]
fn a_folder_that_holds_a_run_is_not_overwritten_unasked() {
    let run = TestRun::sft().done();
    let (rows, weights) = (run.rows(), run.weights());
    let place = format!("`output_dir: {}` already holds a run", run.output().display());
    run.run(&["--set", "seed=2"]).expect_error(1, &[&place, "--resume", "overwrite_output_dir: true"]);
    assert!(run.rows() == rows && run.weights() == weights);
    run.run(&["--set", "seed=2", "--set", "overwrite_output_dir=true"]).expect(0);
    assert_eq!(run.rows().len(), rows.len());
    assert!(run.weights() != weights);
}

/// Two runs in one folder would mix their files. A run that is killed leaves nothing that stands in the way.
#[test]
fn a_folder_belongs_to_one_run_at_a_time() {
    let run = TestRun::sft().set("save_strategy", "no").set("eval_strategy", "no");
    let mut first = start(&mut run.command(&["--set", "max_steps=20000"]));
    let mut lines = BufReader::new(first.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().starts_with("step ")), "the first run does not train");
    let process = format!("another run (process {})", first.id());
    let place = format!("`output_dir: {}`", run.output().display());
    for more in [&[][..], &["--resume"], &["--set", "overwrite_output_dir=true"]] {
        let ended = run.run(more).expect_error(1, &[&process, &place, "wait until it ends", "choose another folder"]);
        assert_eq!(ended.out, "");
    }
    assert!(first.try_wait().unwrap().is_none(), "the first run ended");

    first.kill().unwrap();
    first.wait().unwrap();
    let ended = run.run(&["--set", "overwrite_output_dir=true"]).expect(0);
    assert_eq!((ended.steps(), ended.err.as_str()), (vec![1, 2, 3, 4], ""));
    assert!(!run.has("run.lock"));
}

#[test]
fn a_run_that_starts_anew_is_not_mixed_with_the_old_one() {
    let run = TestRun::sft().set("save_total_limit", "null").set("max_steps", 6).done();
    let anew = ["--set", "overwrite_output_dir=true", "--set", "max_steps=4"];
    run.run(&anew).expect(0);
    // The newest checkpoint of the new run is that of step 4; the old run's step 6 is none of it.
    let ended = run.run(&["--resume", "--set", "max_steps=8"]).expect(0);
    assert_eq!(ended.steps(), [5, 6, 7, 8]);
    let steps: Vec<f64> =
        run.rows().iter().filter(|r| r.contains_key("loss")).map(|r| r["step"].as_f64().unwrap()).collect();
    assert_eq!(steps, (1..=8).map(f64::from).collect::<Vec<_>>());
}

#[test]
fn only_the_newest_checkpoints_are_kept() {
    let run = TestRun::sft().set("save_steps", 1).set("save_total_limit", 3).set("max_steps", 6).done();
    assert_eq!(run.checkpoints(), [4, 5, 6]);
    run.checkpoints().into_iter().for_each(|step| run.assert_checkpoint(step));
    // The end of a run is always saved.
    assert_eq!(TestRun::sft().set("save_strategy", "no").done().checkpoints(), [4]);
}

#[test]
fn grpo_goes_on_from_the_adapter_of_sft() {
    let sft = TestRun::sft().done();
    let grpo = TestRun::grpo().set("adapter_name_or_path", sft.output().display()).set("learning_rate", 0.0).done();
    // Without a step the adapter is the one it started from; with steps it moves.
    assert!(grpo.weights() == sft.weights());
    let moved = TestRun::grpo().set("adapter_name_or_path", sft.output().display()).done();
    assert!(moved.weights() != sft.weights() && moved.weights().len() == sft.weights().len());
    // SFT goes on from an adapter as well.
    let again = TestRun::sft().set("adapter_name_or_path", moved.output().display()).set("learning_rate", 0.0).done();
    assert!(again.weights() == moved.weights());
}

#[test]
fn an_adapter_keeps_its_own_rank_and_the_run_says_so() {
    let sft = TestRun::sft().set("lora_r", 8).done();
    let grpo = TestRun::grpo().set("adapter_name_or_path", sft.output().display()).set("lora_r", 4);
    let ended = grpo.run(&[]);
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    assert!(ended.err.contains("`lora_r: 4`") && ended.err.contains("no effect"), "{}", ended.err);
    assert!(ended.out.contains("LoRA r=8"), "{}", ended.out);
}

#[test]
fn full_fine_tuning_from_a_model_folder_goes_on_where_it_ended() {
    let first = TestRun::full().done();
    let (start, end) = ends(&first.metric("loss"), 2);
    assert!(end < 0.5 * start, "the loss went from {start:.3} to {end:.3}");
    let still = TestRun::full().model(&first.output()).set("learning_rate", 0.0).set("max_steps", 1).done();
    assert!(still.weights() == first.weights());
    assert!(still.metric("loss")[0] < 0.5 * start);
}
