//! TRL's way of calling, and what a configuration asks for beside training: logs, trackers, uploads, places.

use std::fs;

use serde_json::json;

use crate::test_run::{TestRun, end, names, start, trainer};

/// The steps of metrics.jsonl's rows of training.
fn logged(run: &TestRun) -> Vec<u64> {
    let rows = run.rows();
    let rows = rows.iter().filter(|row| row.contains_key("loss"));
    rows.map(|row| row["step"].as_u64().unwrap()).collect()
}

#[test]
fn keys_are_options() {
    let run = TestRun::sft();
    let output = run.output().display().to_string();
    let mut command = trainer();
    command.args(["sft", "--config", "configs/ci/sft.yaml", "--max_steps", "1", "--learning-rate=1e-5"]);
    command.args(["--lora_target_modules", "q_proj", "v_proj", "--report_to", "none", "--output_dir", &output]);
    command.args(["--init_random", "--no_packing", "--set", "eval_strategy=no"]);
    end(start(&mut command)).expect(0);
    assert_eq!(logged(&run), [1]);
    let resolved = fs::read_to_string(run.output().join("config.resolved.yaml")).unwrap();
    for line in
        ["learning_rate: 1.0e-5", "lora_target_modules: [q_proj, v_proj]", "packing: false", "init_random: true"]
    {
        assert!(resolved.contains(&format!("\n{line}\n")), "{line} is missing in\n{resolved}");
    }
}

#[test]
fn a_run_needs_no_file() {
    let run = TestRun::sft();
    let output = run.output().display().to_string();
    let mut command = trainer();
    command.args(["sft", "--model_name_or_path", "data/tiny-qwen", "--dataset_name", "data/arithmetic/sft.jsonl"]);
    command.args(["--max_steps", "1", "--max_train_samples", "8", "--output_dir", &output, "--bf16", "false"]);
    end(start(&mut command)).expect(0);
    assert_eq!(logged(&run), [1]);
}

#[test]
fn a_misspelt_option_gets_the_nearest_key() {
    let run = TestRun::sft();
    run.run(&["--learning_rte", "1"]).expect_error(2, &["no key of `trainer sft`", "did you mean `learning_rate`"]);
    run.run(&["--reward_funcs", "accuracy"]).expect_error(2, &["a key of `trainer grpo`"]);
}

#[test]
fn uploads_and_trackers_are_said_and_stop_nothing() {
    let run = TestRun::sft().set("push_to_hub", "true").set("hub_model_id", "me/tiny").set("report_to", "[wandb]");
    let ended = run.run(&[]).expect(0);
    let line = format!("hf upload me/tiny {} --exclude 'checkpoint-*'", run.output().display());
    assert!(ended.out.contains(&line), "{line} is missing in\n{}", ended.out);
    assert!(ended.out.contains("nothing is sent to a tracker"), "{}", ended.out);
    assert_eq!(names(&run.output().join("runs")).len(), 1, "{}", ended.out);
    // A run that a signal stopped has nothing to upload yet.
    let run = TestRun::sft().set("push_to_hub", "true").set("max_steps", 400);
    let ended = run.run_until(1, "TERM").expect(130);
    assert!(!ended.out.contains("hf upload me"), "{}", ended.out);
}

#[test]
fn rows_are_logged_when_they_are_asked_for() {
    let with = |key: &str, value: &str| TestRun::full().set("max_steps", 12).set(key, value);
    // 64 rows in batches of 16: four steps an epoch.
    assert_eq!(logged(&with("logging_strategy", "epoch").done()), [4, 8, 12]);
    assert_eq!(logged(&with("logging_strategy", "no").done()), [12]);
    assert_eq!(logged(&with("logging_steps", "0.4").done()), [5, 10, 12]);
    assert_eq!(logged(&with("logging_steps", "5").set("logging_first_step", "true").done()), [1, 5, 10, 12]);
}

#[test]
fn shares_of_the_steps_save_and_evaluate() {
    let run =
        TestRun::sft().set("max_steps", 5).set("save_steps", "0.4").set("eval_steps", "0.5").set("save_total_limit", 0);
    let run = run.done();
    assert_eq!(run.checkpoints(), [2, 4, 5]);
    let evaluated: Vec<_> =
        run.rows().iter().filter(|row| row.contains_key("eval_loss")).map(|row| row["step"].clone()).collect();
    assert_eq!(evaluated, [json!(3), json!(5)]);
}

#[test]
fn a_tilde_is_the_home_folder() {
    let run = TestRun::sft();
    let home = run.beside("home");
    fs::create_dir_all(&home).unwrap();
    fs::copy("configs/ci/sft.yaml", home.join("c.yaml")).unwrap();
    let mut command = trainer();
    command.env("HOME", &home).args(["sft", "--config=~/c.yaml", "--max_steps=1", "--init_random"]);
    command.args(["--set", "output_dir=~/runs/x", "--set", "eval_strategy=no"]);
    end(start(&mut command)).expect(0);
    assert!(home.join("runs/x/metrics.jsonl").is_file());
}

#[test]
fn a_completion_may_be_as_long_as_the_model_holds() {
    let run = TestRun::grpo().set("max_completion_length", "null").set("max_steps", 1).done();
    let longest = run.metric("completions/max_length");
    assert!(longest[0] > 8.0 && longest[0] < 256.0, "{longest:?}");
}

#[test]
fn memory_is_estimated_before_anything_is_loaded() {
    let estimate = |arguments: &[&str]| {
        let mut command = trainer();
        command.arg("estimate").args(arguments);
        end(start(&mut command))
    };
    // The model itself is not there, its shape is.
    let shape = ["--set", "model_name_or_path=configs/bench/qwen2-7b"];
    let guide = ["configs/grpo_config_deepseek.yaml", "--gpus", "2", "--card", "8GB"];
    let ended = estimate(&[&guide[..], &shape].concat()).expect(0);
    for part in
        ["7,615,616,512 parameters", "2 ranks", "at its most", "in host memory", "the fastest that does", "both"]
    {
        assert!(ended.out.contains(part), "{part} is missing in\n{}", ended.out);
    }
    assert_eq!(ended.out.matches("the fastest that does").count(), 1, "{}", ended.out);
    assert!(ended.out.contains("too much"), "{}", ended.out);
    let ended = estimate(&["configs/ci/sft.yaml"]).expect(0);
    assert!(!ended.out.contains("fits"), "without a card nothing is said about one\n{}", ended.out);
    // Files take what host memory would, and a stage that is left open is that of the card.
    let nvme =
        ["--set", "offload_param_device=nvme", "--set", "offload_param_nvme_path=/nvme", "--set", "zero_stage=auto"];
    let ended = estimate(&[&guide[..], &shape, &nvme].concat()).expect(0);
    for part in ["in files", "both, in files", "`zero_stage: auto` takes 1 on a card of 7.45 GiB"] {
        assert!(ended.out.contains(part), "{part} is missing in\n{}", ended.out);
    }
    let small = ["configs/grpo_config_deepseek.yaml", "--gpus", "2", "--card", "3GB"];
    let ended = estimate(&[&small[..], &shape, &nvme[4..]].concat()).expect(0);
    assert!(ended.out.contains("`zero_stage: auto` finds none that fits"), "{}", ended.out);
    estimate(&["configs/ci/sft.yaml", "--card", "big"]).expect_error(2, &["11GB"]);
    estimate(&["configs/ci/sft.yaml", "--set", "model_name_or_path=/nowhere"]).expect_error(1, &["/nowhere"]);
}
