//! The best checkpoint: found, kept, loaded at the end; runs that stop early; checkpoints of the model alone.

use std::fs;

use serde_json::{Value, json};

use crate::test_run::TestRun;

/// A run whose evaluations get worse after a while: a learning rate that is far too high, by its accuracy.
fn evaluated() -> TestRun {
    TestRun::sft()
        .set("max_steps", 16)
        .set("save_total_limit", "null")
        .set("learning_rate", "0.2")
        .set("lr_scheduler_type", "constant")
        .set("load_best_model_at_end", "true")
}

/// The steps and values of a metric of evaluations.
fn values(run: &TestRun, metric: &str) -> Vec<(u64, f64)> {
    let of = |row: &trainer::telemetry::Row| Some((row["step"].as_u64()?, row.get(metric)?.as_f64()?));
    run.rows().iter().filter_map(of).collect()
}

/// The step with the first smallest value.
fn best_step(values: &[(u64, f64)]) -> u64 {
    values.iter().fold((0, f64::INFINITY), |best, &now| if now.1 < best.1 { now } else { best }).0
}

fn adapter(run: &TestRun, step: u64) -> Vec<u8> {
    fs::read(run.output().join(format!("checkpoint-{step}/adapter_model.safetensors"))).unwrap()
}

#[test]
fn the_model_at_the_end_is_that_of_the_best_checkpoint() {
    // One of these rates is so high that the last evaluation is not the best.
    let (rate, run, ended, best) = ["0.2", "0.05", "0.1", "0.5", "0.02"]
        .into_iter()
        .find_map(|rate| {
            let run = evaluated().set("learning_rate", rate);
            let ended = run.run(&[]).expect(0);
            let best = best_step(&values(&run, "eval_loss"));
            (best < 16).then_some((rate, run, ended, best))
        })
        .expect("the last evaluation is the best whatever the rate");
    let evaluated = || evaluated().set("learning_rate", rate);
    assert!(run.weights() == adapter(&run, best) && run.weights() != adapter(&run, 16));
    let summary = format!("checkpoint-{best} (eval_loss ");
    assert!(ended.out.contains(&summary) && ended.out.contains("(of the best checkpoint)"), "{}", ended.out);
    assert!(!run.has("trainer_state.json") && !run.has("manifest.json"));
    // Without it the last one is left, and the metric's name with its prefix is the same metric.
    let last = evaluated().set("load_best_model_at_end", "false").set("metric_for_best_model", "eval_loss").done();
    assert!(last.weights() == adapter(&run, 16));
    // Greater is better unless the name ends in `loss`: the other end of the same values.
    let worst = evaluated().set("greater_is_better", "true").done();
    let negated: Vec<_> = values(&worst, "eval_loss").into_iter().map(|(step, value)| (step, -value)).collect();
    assert!(worst.weights() == adapter(&run, best_step(&negated)));
}

#[test]
fn no_limit_on_their_number_deletes_the_best_checkpoint() {
    // By what goes down, one of the first evaluations is the best.
    let evaluated = || evaluated().set("greater_is_better", "true");
    let all = evaluated().done();
    let negated: Vec<_> = values(&all, "eval_loss").into_iter().map(|(step, value)| (step, -value)).collect();
    let best = best_step(&negated);
    assert!(best < 12, "one of the last: {negated:?}");
    let run = evaluated().set("save_total_limit", 2).done();
    assert_eq!(run.checkpoints(), [best, 16]);
    assert!(run.weights() == all.weights());
    // As transformers: with a limit of one only the best is left at the end.
    let run = evaluated().set("save_total_limit", 1).done();
    assert_eq!(run.checkpoints(), [best]);
    assert!(run.weights() == all.weights());
}

#[test]
fn saving_the_best_saves_whenever_there_is_a_new_one() {
    let run = evaluated().set("save_strategy", "best").done();
    let mut expected = Vec::new();
    let mut best = f64::INFINITY;
    for (step, value) in values(&run, "eval_loss") {
        if value < best {
            best = value;
            expected.push(step);
        }
    }
    // The end of a run is always saved.
    if expected.last() != Some(&16) {
        expected.push(16);
    }
    assert_eq!(run.checkpoints(), expected);
    assert!(run.weights() == evaluated().done().weights());
}

#[test]
fn a_run_without_improvement_stops_early_and_a_resumed_one_counts_on() {
    let run = || evaluated().set("max_steps", 40).set("early_stopping_patience", 3);
    let straight = run();
    let ended = straight.run(&[]).expect(0);
    let evaluations = values(&straight, "eval_loss");
    let best = best_step(&evaluations);
    let last = evaluations.last().unwrap().0;
    assert_eq!(last, best + 6, "three evaluations, two steps apart, after the best: {evaluations:?}");
    assert!(
        last < 40
            && ended.out.contains(&format!("stopped early after step {last} of 40: `eval_loss` has not improved"))
    );
    assert!(straight.weights() == adapter(&straight, best));
    // From any checkpoint on, before and after the best, the run ends the same.
    for step in [best - 2, best, best + 2, best + 4] {
        if step == 0 {
            continue;
        }
        let again = run().done();
        let from = again.output().join(format!("checkpoint-{step}"));
        again.run(&["--resume", from.to_str().unwrap()]).expect(0);
        again.assert_same(&straight);
        assert_eq!(again.checkpoints(), straight.checkpoints());
    }
    // At its end there is nothing left to do, and with more patience there is.
    let ended = straight.run(&["--resume"]).expect(0);
    assert!(ended.steps().is_empty() && ended.out.contains("stopped early"), "{}", ended.out);
    let more = straight.run(&["--resume", "--set", "early_stopping_patience=4"]).expect(0);
    assert_eq!(more.steps()[0], last + 1);
    // An improvement by less than the threshold is none.
    let run = run().set("early_stopping_threshold", 100).done();
    assert_eq!(values(&run, "eval_loss").last().unwrap().0, 8);
}

#[test]
fn a_metric_that_is_not_there_is_said_once_the_step_is_saved() {
    let run = evaluated().set("metric_for_best_model", "accuracy").set("save_steps", 4);
    let names = ["`metric_for_best_model` is `eval_accuracy`", "eval_loss, eval_entropy, eval_mean_token_accuracy"];
    run.run(&[]).expect_error(1, &names);
    assert_eq!(run.checkpoints(), [2]);
    let right = ["--resume", "--set", "metric_for_best_model=mean_token_accuracy"];
    assert_eq!(run.run(&right).expect(0).steps()[0], 3);
}

#[test]
fn grpo_goes_by_rewards_of_the_evaluation() {
    let run = || {
        TestRun::grpo()
            .set("eval_strategy", "steps")
            .set("eval_steps", 2)
            .set("eval_fraction", 0.25)
            .set("max_steps", 8)
            .set("learning_rate", "2e-2")
            .set("save_total_limit", "null")
            .set("load_best_model_at_end", "true")
            .set("metric_for_best_model", "reward")
    };
    let straight = run().done();
    let negated: Vec<_> = values(&straight, "eval_reward").into_iter().map(|(step, value)| (step, -value)).collect();
    let best = best_step(&negated);
    assert!(straight.weights() == adapter(&straight, best));
    let resumed = run();
    resumed.run_until(5, "TERM").expect(130);
    resumed.run(&["--resume"]).expect(0);
    assert!(resumed.weights() == straight.weights());
    let early = run().set("early_stopping_patience", 1).set("early_stopping_threshold", 100).done();
    assert_eq!(values(&early, "eval_reward").len(), 2);
    run().set("metric_for_best_model", "rewards/regex/mean").run(&[]).expect(0);
}

#[test]
fn checkpoints_of_the_model_alone_hold_no_state_and_say_so() {
    let whole = TestRun::sft().done();
    let run = TestRun::sft().set("save_only_model", "true").done();
    assert_eq!(run.checkpoints(), whole.checkpoints());
    let checkpoint = run.output().join("checkpoint-4");
    assert!(!checkpoint.join("trainer_state.safetensors").exists());
    assert!(adapter(&run, 4) == adapter(&whole, 4) && run.weights() == whole.weights());
    let parts = ["checkpoint-4` was saved with `save_only_model: true`", "adapter_name_or_path: ", "start a new run"];
    run.run(&["--resume"]).expect_error(1, &parts);
    run.run(&["--resume", checkpoint.to_str().unwrap()]).expect_error(1, &parts);

    let stopped = TestRun::sft().set("save_only_model", "true").set("max_steps", 60).run_until(3, "TERM").expect(130);
    assert!(
        stopped.out.contains("from which no run can go on") && !stopped.out.contains("go on with"),
        "{}",
        stopped.out
    );
    // The best of them can still be left at the end.
    let best = evaluated().set("save_only_model", "true").done();
    assert!(best.weights() == evaluated().done().weights());
}

/// A best checkpoint that was damaged is not left as the result.
#[test]
fn a_damaged_best_checkpoint_is_an_error_at_the_end() {
    let run =
        evaluated().set("greater_is_better", "true").set("save_steps", 4).set("eval_steps", 4).set("max_steps", 8);
    run.run(&["--set", "max_steps=4"]).expect(0);
    let state: Value =
        serde_json::from_slice(&fs::read(run.output().join("checkpoint-4/trainer_state.json")).unwrap()).unwrap();
    assert_eq!((&state["best_global_step"], &state["best_model_checkpoint"]), (&json!(4), &json!("checkpoint-4")));
    assert_eq!(state["best_metric"].as_f64(), Some(values(&run, "eval_loss")[0].1));
    let ended = run.run(&["--resume", "--set", "lora_dropout=0.1"]).expect(0);
    assert!(ended.out.contains("checkpoint-4 (eval_loss "), "{}", ended.out);
    let model = run.output().join("checkpoint-4/adapter_model.safetensors");
    let mut bytes = fs::read(&model).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(model, bytes).unwrap();
    run.run(&["--resume", "--set", "lora_dropout=0.1"])
        .expect_error(1, &["the best model", "checkpoint-4` is damaged"]);
}
