//! How a run counts: epochs, steps, evaluations and checkpoints, and steps in which there is nothing to learn.
//!
//! That the counts are transformers' and TRL's is a golden group (`steps`); here the binary is seen to follow them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::test_run::TestRun;

/// Sums as prompts with their answers.
fn write_rows(path: &Path, rows: impl IntoIterator<Item = String>) {
    fs::write(path, rows.into_iter().map(|row| row + "\n").collect::<String>()).unwrap();
}

fn sums(count: usize) -> impl Iterator<Item = String> {
    (0..count).map(|n| format!(r#"{{"prompt": "{n}+1=", "completion": "{}", "answer": "{}"}}"#, n + 1, n + 1))
}

/// SFT of so many rows without packing, evaluation and checkpoints, for one epoch.
fn sft(rows: usize) -> TestRun {
    let run = TestRun::sft().set("packing", "false").set("eval_fraction", "null").set("eval_strategy", "no");
    let data = run.beside("rows.jsonl");
    write_rows(&data, sums(rows));
    run.set("dataset_name", data.display())
        .set("max_steps", -1)
        .set("num_train_epochs", 1)
        .set("save_strategy", "no")
        .set("save_total_limit", "null")
}

/// GRPO on so many prompts, two completions each, two prompts in a generation batch, for one epoch.
fn grpo(prompts: usize) -> TestRun {
    let run = TestRun::grpo();
    let data = run.beside("rows.jsonl");
    write_rows(&data, sums(prompts));
    run.set("dataset_name", data.display())
        .set("max_steps", -1)
        .set("num_train_epochs", 1)
        .set("num_generations", 2)
        .set("per_device_train_batch_size", 4)
        .set("save_strategy", "no")
}

#[track_caller]
fn assert_near(found: &[f64], expected: &[f64]) {
    let is_near = found.len() == expected.len() && found.iter().zip(expected).all(|(f, e)| (f - e).abs() < 1e-12);
    assert!(is_near, "{found:?}, expected {expected:?}");
}

#[test]
fn an_epoch_is_one_pass_and_its_last_step_takes_what_is_left() {
    // 10 rows in batches of 3, two to a step: 6 rows, then 3 and 1. `epoch` counts batches, as transformers does.
    let run = sft(10).set("per_device_train_batch_size", 3).set("num_train_epochs", 2).set("warmup_steps", 0.5);
    let ended = run.run(&[]).expect(0);
    assert!(ended.out.contains("4, 2 an epoch"), "{}", ended.out);
    assert_near(&run.metric("epoch"), &[0.5, 1.0, 1.5, 2.0]);
    assert_near(&run.metric("learning_rate"), &[0.0, 5e-4, 1e-3, 5e-4]);
    let tokens = run.metric("num_tokens");
    assert!(tokens[0] < tokens[1] && (tokens[3] - 2.0 * tokens[1]).abs() < 0.5, "{tokens:?}");

    // A batch larger than the data is the data.
    let whole = sft(10).set("per_device_train_batch_size", 64).set("num_train_epochs", 3).done();
    assert_near(&whole.metric("epoch"), &[1.0, 2.0, 3.0]);
    assert_near(&[whole.metric("num_tokens")[0]], &[tokens[1]]);

    let dropped = sft(10).set("per_device_train_batch_size", 3).set("dataloader_drop_last", "true");
    let ended = dropped.run(&[]).expect(0);
    assert!(ended.out.contains("1 sequences of each epoch"), "{}", ended.out);
    assert_near(&dropped.metric("epoch"), &[2.0 / 3.0, 1.0]);
    let none = sft(2).set("per_device_train_batch_size", 3).set("dataloader_drop_last", "true");
    none.run(&[]).expect_error(1, &["`dataloader_drop_last: true`", "2 sequences", "a batch of 3"]);
}

/// The loss of the smaller last step is the mean over its own tokens.
#[test]
fn a_smaller_step_weighs_its_own_targets() {
    let rates = |run: TestRun| run.set("learning_rate", 0.0).set("gradient_accumulation_steps", 4);
    // 9 rows in batches of 2: a step of 8 rows, one of 1.
    let run = rates(sft(9)).set("per_device_train_batch_size", 2).done();
    let alone = rates(sft(9)).set("per_device_train_batch_size", 1).set("gradient_accumulation_steps", 1).done();
    let (steps, rows) = (run.metric("loss"), alone.metric("loss"));
    assert_eq!((steps.len(), rows.len()), (2, 9));
    assert!((steps[1] - rows[8]).abs() < 1e-6, "{steps:?}, {rows:?}");
}

#[test]
fn evaluations_logs_and_checkpoints_come_by_epochs() {
    let run = sft(10)
        .set("per_device_train_batch_size", 3)
        .set("gradient_accumulation_steps", 1)
        .set("num_train_epochs", 2.3)
        .set("eval_fraction", 0.2)
        .set("eval_strategy", "epoch")
        .set("eval_on_start", "true")
        .set("eval_delay", 1.5)
        .set("save_strategy", "epoch")
        .done();
    // 8 rows to train on, 3 steps an epoch, 7 steps: the run ends inside the third epoch.
    assert_near(
        &run.metric("epoch"),
        &[0.0, 1.0 / 3.0, 2.0 / 3.0, 1.0, 4.0 / 3.0, 5.0 / 3.0, 2.0, 2.0, 7.0 / 3.0, 7.0 / 3.0],
    );
    let rows = run.rows();
    let evaluated: Vec<u64> =
        rows.iter().filter(|row| row.contains_key("eval_loss")).map(|row| row["step"].as_u64().unwrap()).collect();
    assert_eq!(evaluated, [0, 6, 7]);
    assert_eq!(run.checkpoints(), [3, 6, 7]);
}

#[test]
fn a_run_resumed_inside_of_an_epoch_ends_the_same() {
    let sft_run = || {
        sft(11)
            .set("per_device_train_batch_size", 2)
            .set("num_train_epochs", 2)
            .set("save_strategy", "steps")
            .set("save_steps", 1)
    };
    // 7 prompts, 3 generation batches an epoch, each seen twice in halves, 3 micro-batches to a step.
    let grpo_run = || {
        grpo(7)
            .set("per_device_train_batch_size", 2)
            .set("steps_per_generation", 2)
            .set("num_iterations", 2)
            .set("gradient_accumulation_steps", 3)
            .set("num_train_epochs", 2)
            .set("save_strategy", "steps")
            .set("save_steps", 1)
    };
    for run in [&sft_run as &dyn Fn() -> TestRun, &grpo_run] {
        let straight = run().done();
        let steps = straight.checkpoints();
        assert_eq!(steps.last(), Some(&(straight.metric("loss").len() as u64)));
        for step in &steps[..steps.len() - 1] {
            let again = run().done();
            let checkpoint = again.output().join(format!("checkpoint-{step}"));
            again.run(&["--resume", checkpoint.to_str().unwrap()]).expect(0);
            again.assert_same(&straight);
        }
    }
}

#[test]
fn prompts_that_fill_no_generation_batch_are_left_out_and_that_is_said() {
    let run = grpo(5).set("num_train_epochs", 4);
    let ended = run.run(&[]).expect(0);
    assert_eq!(ended.steps(), (1..=8).collect::<Vec<_>>());
    assert_eq!(ended.err.matches("leaves out 1 of 5 prompts").count(), 1, "{}", ended.err);
    assert_near(&run.metric("epoch"), &[0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]);
    let mut seen: Vec<BTreeMap<u64, usize>> = vec![BTreeMap::new(); 4];
    for completion in run.completions() {
        let epoch = (completion["step"].as_u64().unwrap() - 1) / 2;
        *seen[epoch as usize].entry(completion["prompt_index"].as_u64().unwrap()).or_default() += 1;
    }
    // Four of the five in each epoch, none twice, and not always the same four.
    assert!(seen.iter().all(|epoch| epoch.len() == 4 && epoch.values().all(|&count| count == 2)), "{seen:?}");
    assert!(seen.iter().any(|epoch| epoch.keys().ne(seen[0].keys())), "{seen:?}");

    let few = grpo(3).set("per_device_train_batch_size", 16).set("num_train_epochs", 2);
    let ended = few.run(&[]).expect(0);
    assert!(ended.err.contains("takes 8 prompts") && ended.err.contains("there are 3"), "{}", ended.err);
    assert_eq!((ended.steps(), few.completions().len()), (vec![1, 2], 12));
    assert!(few.metric("grad_norm").iter().any(|&norm| norm > 0.0));
}

#[test]
fn a_step_without_a_token_to_learn_is_counted_and_changes_nothing() {
    let texts = |texts: &[&str]| {
        let run = TestRun::sft().set("packing", "false").set("eval_fraction", "null").set("eval_strategy", "no");
        let data = run.beside("texts.jsonl");
        write_rows(&data, texts.iter().map(|text| format!(r#"{{"text": "{text}"}}"#)));
        run.set("dataset_name", data.display())
            .set("per_device_train_batch_size", 1)
            .set("gradient_accumulation_steps", 1)
            .set("max_steps", -1)
            .set("num_train_epochs", 1)
            .set("save_steps", 1)
            .set("save_total_limit", "null")
    };
    let run = texts(&["1+1=2", "", "2+2=4", "", "3+3=6"]);
    let ended = run.run(&[]).expect(0);
    assert_eq!(ended.steps(), [1, 2, 3, 4, 5]);
    assert_eq!(ended.err.matches("has no token to learn").count(), 2, "{}", ended.err);
    assert!(ended.out.contains("2 of 5 sequences") && ended.out.contains("2 steps"), "{}", ended.out);
    let rows = run.rows();
    assert_eq!(rows.len(), 5);
    let empty: Vec<u64> =
        rows.iter().filter(|row| !row.contains_key("loss")).map(|row| row["step"].as_u64().unwrap()).collect();
    assert_eq!(empty.len(), 2);
    for step in &empty {
        let weights =
            |step: u64| fs::read(run.output().join(format!("checkpoint-{step}/adapter_model.safetensors"))).unwrap();
        assert!(*step == 1 || weights(*step) == weights(step - 1), "step {step} moved the adapter");
    }
    // The run that goes on takes such steps too.
    for step in 1..5 {
        let again = texts(&["1+1=2", "", "2+2=4", "", "3+3=6"]).done();
        let checkpoint = again.output().join(format!("checkpoint-{step}"));
        again.run(&["--resume", checkpoint.to_str().unwrap()]).expect(0);
        assert!(again.weights() == run.weights(), "resumed from step {step}");
    }
    // Beside others in a batch it takes part with nothing.
    let both = texts(&["1+1=2", ""]).set("per_device_train_batch_size", 2).done();
    let one = texts(&["1+1=2"]).set("per_device_train_batch_size", 2).done();
    assert!(both.weights() == one.weights());
    let nothing = texts(&["", ""]);
    nothing.run(&[]).expect_error(1, &["none of the 2 rows has a token to learn"]);

    // Under packing a prompt may fill its sequence alone.
    let run = sft(3).set("packing", "true").set("max_length", 8).set("packing_strategy", "bfd");
    let data = run.beside("long.jsonl");
    let long = format!(r#"{{"prompt": "{}=", "completion": "1"}}"#, "1+".repeat(20));
    write_rows(&data, [long.clone(), r#"{"prompt": "1+1=", "completion": "2"}"#.into(), long.clone()]);
    let run = run
        .set("dataset_name", data.display())
        .set("per_device_train_batch_size", 1)
        .set("gradient_accumulation_steps", 1);
    let ended = run.run(&[]).expect(0);
    assert!(ended.err.contains("has no token to learn") && ended.steps().len() == 3, "{}\n{}", ended.out, ended.err);
    write_rows(&data, [long]);
    let alone = run.set("overwrite_output_dir", "true");
    alone.run(&[]).expect_error(1, &["none of the 1 rows has a token to learn"]);
}

#[test]
fn what_was_asked_for_and_teaches_or_measures_nothing_is_said() {
    // Every completion is cut off and masked.
    let run =
        grpo(8).set("max_completion_length", 1).set("mask_truncated_completions", "true").set("num_train_epochs", 2);
    let run = run.set("temperature", 3.0).set("reward_funcs", r#"[{kind: regex, pattern: "[0-9]"}]"#);
    let ended = run.run(&[]).expect(0);
    let said = ended.err.matches("`mask_truncated_completions: true` leaves them out").count();
    assert!((1..=3).contains(&said), "{}", ended.err);
    assert!(ended.out.contains("all truncated"), "{}", ended.out);
    // Rewards that are always equal.
    let flat = grpo(8).set("num_train_epochs", 6).set("reward_funcs", r#"[{kind: regex, pattern: "never"}]"#);
    let ended = flat.run(&[]).expect(0);
    assert_eq!(ended.err.matches("in 10 generation batches in a row").count(), 1, "{}", ended.err);
    assert!(ended.out.contains("24 of 24 generation batches"), "{}", ended.out);

    for set in ["eval_strategy=steps", "eval_strategy=epoch", "eval_on_start=true"] {
        sft(4).run(&["--set", set]).expect_error(1, &["asks for evaluation", "`eval_fraction: 0.05`"]);
    }
    // Data that nobody asks for are fine.
    assert_eq!(sft(10).set("eval_fraction", 0.2).run(&[]).expect(0).err, "");
}
