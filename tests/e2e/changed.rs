//! Content that changed under the same name between a run and its continuation.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::test_run::{TestRun, copy_files};

/// A run on its own copies of the model and the rows.
fn own(run: impl Fn() -> TestRun, rows: &str) -> (TestRun, PathBuf, PathBuf) {
    let run = run();
    let (model, data) = (run.beside("model"), run.beside("rows.jsonl"));
    copy_files(Path::new("data/tiny-qwen"), &model);
    fs::copy(rows, &data).unwrap();
    let place = data.display().to_string();
    (run.model(&model).set("dataset_name", place), model, data)
}

fn edit_lines(data: &Path, edit: impl Fn(&mut Vec<String>)) {
    let mut lines: Vec<String> = fs::read_to_string(data).unwrap().lines().map(String::from).collect();
    edit(&mut lines);
    fs::write(data, lines.join("\n") + "\n").unwrap();
}

/// Resumes with changed content, which is refused with one message of `parts` and changes nothing; then all the same.
#[track_caller]
fn refused_and_allowed(run: &TestRun, parts: &[&str]) {
    let (rows, weights, checkpoints) = (run.rows(), run.weights(), run.checkpoints());
    let resume = ["--resume", "--set", "max_steps=5"];
    let all = [&["was made with other content", "`resume_with_changed_inputs: true`"], parts].concat();
    run.run(&resume).expect_error(1, &all);
    assert!(run.rows() == rows && run.weights() == weights && run.checkpoints() == checkpoints);
    let ended = run.run(&[&resume[..], &["--set", "resume_with_changed_inputs=true"]].concat()).expect(0);
    assert!(parts.iter().all(|part| ended.err.contains(part)), "{}", ended.err);
    assert_eq!(ended.steps(), [5]);
}

#[test]
fn rows_that_were_removed_reordered_or_edited_are_noticed() {
    let rows = "data/arithmetic/sft.jsonl";
    type Edit = fn(&mut Vec<String>);
    let cases: [(Edit, &[&str]); 4] = [
        (|lines| lines.truncate(40), &["there were 60 rows, there are 40", "the rows after number 40 are gone"]),
        (|lines| lines.swap(10, 11), &["the same 60 rows stand in another order", "line 11"]),
        (
            |lines| lines[20] = lines[20].replace("}", ", \"note\": 1}"),
            &["still 60 rows, and some were edited", "line 21"],
        ),
        (|lines| drop(lines.remove(0)), &["still 60 rows, and some were edited", "line 1"]),
    ];
    for (edit, parts) in cases {
        let (run, _, data) = own(TestRun::sft, rows);
        let run = run.set("eval_fraction", "null").set("eval_strategy", "no").set("max_train_samples", 60).done();
        edit_lines(&data, edit);
        refused_and_allowed(&run, parts);
    }
}

#[test]
fn rows_beyond_those_that_are_used_may_change() {
    let (run, _, data) = own(TestRun::sft, "data/arithmetic/sft.jsonl");
    let run = run.set("eval_fraction", "null").set("eval_strategy", "no").set("max_train_samples", 60).done();
    edit_lines(&data, |lines| lines.truncate(61));
    let ended = run.run(&["--resume", "--set", "max_steps=5"]).expect(0);
    assert_eq!(ended.steps(), [5]);
    assert!(!ended.err.contains("content"), "{}", ended.err);
}

#[test]
fn weights_tokenizer_and_template_are_compared() {
    let flip = |path: &Path| {
        let mut bytes = fs::read(path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(path, bytes).unwrap();
    };
    let edit = |path: &Path, change: &dyn Fn(&mut Value)| {
        let mut value: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        change(&mut value);
        fs::write(path, value.to_string()).unwrap();
    };
    type Change<'a> = &'a dyn Fn(&Path);
    let cases: [(Change<'_>, &str); 4] = [
        (
            &|model| flip(&model.join("model.safetensors")),
            "`model.safetensors` (`model_name_or_path`) has other content",
        ),
        (
            &|model| edit(&model.join("config.json"), &|config| config["rms_norm_eps"] = json!(1e-5)),
            "`config.json` (`model_name_or_path`) ha",
        ),
        (
            &|model| {
                edit(&model.join("tokenizer_config.json"), &|config| {
                    config["chat_template"] = json!("{{ messages }}!")
                });
            },
            "the chat template ha",
        ),
        (
            &|model| {
                edit(&model.join("tokenizer.json"), &|tokenizer| {
                    let added = tokenizer["added_tokens"].as_array_mut().unwrap();
                    added[0]["lstrip"] = json!(true);
                });
            },
            "the tokenizer has other content",
        ),
    ];
    for (change, part) in cases {
        let (run, model, _) = own(TestRun::sft, "data/arithmetic/sft.jsonl");
        let run = run.done();
        change(&model);
        refused_and_allowed(&run, &[part]);
    }
}

#[test]
fn the_adapter_that_a_run_starts_from_is_compared() {
    let first = TestRun::sft().set("max_steps", 1).done();
    let second = TestRun::sft().set("max_steps", 1).set("seed", 2).done();
    let run = TestRun::sft();
    let adapter = run.beside("adapter");
    copy_files(&first.output(), &adapter);
    let run = run.set("adapter_name_or_path", adapter.display()).done();
    copy_files(&second.output(), &adapter);
    refused_and_allowed(&run, &["`adapter_model.safetensors` (`adapter_name_or_path`) has other content"]);
}

#[test]
fn evaluation_rows_are_a_warning() {
    let run = TestRun::sft();
    let data = run.beside("data");
    fs::create_dir(&data).unwrap();
    fs::copy("data/arithmetic/sft.jsonl", data.join("train.jsonl")).unwrap();
    fs::copy("data/arithmetic/sft.jsonl", data.join("test.jsonl")).unwrap();
    let run = run.set("dataset_name", data.display()).set("eval_fraction", "null").done();
    edit_lines(&data.join("test.jsonl"), |lines| lines.swap(0, 1));
    let ended = run.run(&["--resume", "--set", "max_steps=5"]).expect(0);
    assert!(ended.err.contains("with other evaluation rows: the same 8 rows stand in another order"), "{}", ended.err);
}

#[cfg(unix)]
#[test]
fn a_reward_program_is_compared_by_its_text() {
    let run = TestRun::grpo();
    let program = run.beside("judge.sh");
    let text = "n=0\nwhile read -r line; do\n  n=$((n + 1))\n  echo \"{\\\"id\\\": $n, \\\"scores\\\": [1, 0, 1, 0, 0, 1, 0, 1]}\"\ndone\n";
    fs::write(&program, text).unwrap();
    let rewards = format!("[{{kind: command, name: judge, command: [sh, '{}']}}]", program.display());
    let run = run.set("reward_funcs", rewards).set("max_steps", 4).done();
    fs::write(&program, text.replace("0, 1]", "1, 1]")).unwrap();
    refused_and_allowed(&run, &["`judge.sh` (`reward_funcs`) has other content"]);
}

/// A generation batch that lives over several steps names its prompts by their place.
#[test]
fn in_the_middle_of_a_generation_batch_fewer_rows_are_an_error_and_no_panic() {
    let (run, _, data) = own(TestRun::grpo, "data/arithmetic/train.jsonl");
    let run = run.set("num_iterations", 4).set("max_steps", 2).set("save_steps", 1).done();
    edit_lines(&data, |lines| lines.truncate(2));
    let resume = ["--resume", "--set", "max_steps=4"];
    run.run(&resume).expect_error(1, &["there were 32 rows, there are 2"]);
    let ended = run.run(&[&resume[..], &["--set", "resume_with_changed_inputs=true"]].concat()).expect(0);
    assert!(ended.err.contains("the generation batch in") && ended.err.contains("is thrown away"), "{}", ended.err);
    assert_eq!(ended.steps(), [3, 4]);
}

/// Edits the state of a checkpoint and makes the manifest fit.
pub(crate) fn edit_state(checkpoint: &Path, change: &dyn Fn(&mut Value)) {
    let edit = |name: &str, change: &dyn Fn(&mut Value)| {
        let path = checkpoint.join(name);
        let mut value: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut value);
        fs::write(&path, value.to_string()).unwrap();
    };
    let name = "trainer_state.json";
    edit(name, change);
    let (blake3, bytes) = trainer::fs::checksum(&checkpoint.join(name)).unwrap();
    edit("manifest.json", &|manifest| manifest["files"][name] = json!({"bytes": bytes, "blake3": blake3}));
}

#[test]
fn a_checkpoint_that_does_not_say_what_was_read_is_continued_with_a_warning() {
    let run = TestRun::sft().done();
    edit_state(&run.output().join("checkpoint-4"), &|state| {
        assert!(state.as_object_mut().unwrap().remove("inputs").is_some());
    });
    let ended = run.run(&["--resume", "--set", "max_steps=5"]).expect(0);
    assert!(ended.err.contains("does not say what was in the data"), "{}", ended.err);
    assert_eq!(ended.steps(), [5]);
}

/// Counts and indices of a state that is well formed and not true.
#[test]
fn a_state_that_no_run_comes_to_is_refused() {
    const HUGE: u64 = u64::MAX;
    let grpo = TestRun::grpo().set("num_iterations", 4).set("max_steps", 2).set("save_steps", 2).done();
    type Change = fn(&mut Value);
    let cases: [(Change, &str); 14] = [
        (|state| state["step"] = json!(HUGE), "`step`"),
        (|state| state["step"] = json!(1), "`step`"),
        (|state| state["optimizer_steps"] = json!(HUGE), "`optimizer_steps`"),
        (|state| state["sampler"]["epoch"] = json!(HUGE), "`sampler.epoch`"),
        (|state| state["sampler"]["position"] = json!(HUGE), "stands at item"),
        (|state| state["num_tokens"] = json!(HUGE), "`num_tokens`"),
        (
            |state| {
                state["accumulator"]["entries"] = json!([["x", {"Mean": {"sum": 1, "count": HUGE, "has_nan": false}}]])
            },
            "accumulator",
        ),
        (
            |state| {
                state["loss_scaler"] = json!({
                    "settings": {
                        "initial_scale": 1.0, "loss_scale_window": 1, "min_loss_scale": 1.0, "hysteresis": 1,
                        "consecutive_hysteresis": false, "raise_error_at_min_scale": true,
                    },
                    "is_dynamic": true, "scale": 1.0, "tolerance": 0, "iteration": 1, "clean_since": 2,
                });
            },
            "loss scaler",
        ),
        (|state| state["buffer"]["micro_steps"] = json!(HUGE), "micro-step"),
        (|state| drop(state["buffer"]["samples"].as_array_mut().unwrap().pop()), "completions, this run makes"),
        (|state| state["buffer"]["samples"][3]["prompt"] = json!(1000), "number 3"),
        (|state| state["buffer"]["samples"][0]["completion_ids"][0] = json!(u32::MAX), "number 0"),
        (|state| state["buffer"]["samples"][1]["sampling_logprobs"] = json!([]), "number 1"),
        (|state| state["inputs"]["train"]["rows_per_checksum"] = json!(HUGE), "rows"),
    ];
    for (change, part) in cases {
        let run = TestRun::grpo().set("num_iterations", 4).set("max_steps", 4);
        let checkpoint = run.beside("checkpoint-2");
        copy_files(&grpo.output().join("checkpoint-2"), &checkpoint);
        edit_state(&checkpoint, &change);
        let ended = run.run(&["--resume", checkpoint.to_str().unwrap()]).expect_error(1, &[part]);
        assert!(!ended.err.contains("panicked"), "{}", ended.err);
    }
}
