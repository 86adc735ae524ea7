//! A run that was stopped and resumed is the run that was never stopped.

use std::fs;

use crate::test_run::TestRun;

/// Settings under which a generation batch lives over several optimizer steps, so that checkpoints fall inside of it.
fn with_long_batches(run: TestRun) -> TestRun {
    run.set("num_iterations", 2)
        .set("gradient_accumulation_steps", 1)
        .set("steps_per_generation", 2)
        .set("beta", 0.04)
        .set("lora_dropout", 0.1)
        .set("learning_rate", "5e-3")
}

/// Stops a run by a signal after some steps, resumes it, and compares it with `straight`.
fn stop_and_resume(straight: &TestRun, stopped: &TestRun, total: u64) {
    let ended = stopped.run_until(3, "TERM").expect(130);
    let step = *ended.steps().last().unwrap();
    assert!(step < total, "the signal came after the end of the run");
    let note = format!("interrupted after step {step} of {total}; go on with `--resume` (checkpoint-{step} in ");
    assert!(ended.out.contains(&note), "{}", ended.out);
    assert_eq!(stopped.checkpoints().last(), Some(&step));
    stopped.assert_checkpoint(step);
    assert!(!stopped.has("adapter_model.safetensors") && !stopped.has("model.safetensors"));

    let ended = stopped.run(&["--resume"]).expect(0);
    assert_eq!(ended.steps(), (step + 1..=total).collect::<Vec<_>>());
    stopped.assert_same(straight);
}

#[test]
fn sft_stopped_by_a_signal_and_resumed_equals_the_straight_run() {
    let run = || TestRun::sft().set("max_steps", 40).set("lora_dropout", 0.1);
    stop_and_resume(&run().done(), &run(), 40);
}

#[test]
fn grpo_stopped_by_a_signal_and_resumed_equals_the_straight_run() {
    let run = || with_long_batches(TestRun::grpo()).set("max_steps", 40);
    stop_and_resume(&run().done(), &run(), 40);
}

#[test]
fn grpo_of_all_weights_with_a_moving_reference_is_resumed() {
    let run = || {
        TestRun::grpo()
            .set("use_peft", "false")
            .set("load_in_4bit", "false")
            .set("beta", 0.04)
            .set("sync_ref_model", "true")
            .set("ref_model_sync_steps", 3)
            .set("max_steps", 30)
    };
    stop_and_resume(&run().done(), &run(), 30);
}

/// Every checkpoint of a run leads to the same end, also those inside of a generation batch (of 4 micro-batches, seen
/// twice, 3 of which make a step).
#[test]
fn grpo_resumed_from_any_checkpoint_ends_the_same() {
    let run = || {
        TestRun::grpo()
            .set("num_iterations", 2)
            .set("gradient_accumulation_steps", 3)
            .set("steps_per_generation", 4)
            .set("save_steps", 1)
            .set("logging_steps", 2)
            .set("max_steps", 6)
            .set("eval_strategy", "steps")
            .set("eval_steps", 3)
            .set("eval_fraction", 0.25)
    };
    let straight = run().done();
    assert_eq!(straight.checkpoints(), [1, 2, 3, 4, 5, 6]);
    for step in 1..6 {
        let again = run().done();
        let checkpoint = again.output().join(format!("checkpoint-{step}"));
        again.run(&["--resume", checkpoint.to_str().unwrap()]).expect(0);
        again.assert_same(&straight);
    }
}

#[test]
fn a_killed_run_goes_on_from_its_last_checkpoint() {
    let run = || TestRun::sft().set("max_steps", 40).set("save_steps", 3);
    let (straight, killed) = (run().done(), run());
    let ended = killed.run_until(7, "KILL");
    assert_eq!(ended.code, None, "{}", ended.out);
    let ended = killed.run(&["--resume"]).expect(0);
    let first = ended.steps()[0];
    assert!(first >= 7 && first % 3 == 1, "went on with step {first}");
    killed.assert_same(&straight);
    // What the kill left of a save is gone.
    killed.checkpoints();
}

#[test]
fn a_damaged_checkpoint_is_passed_over_and_named() {
    let straight = TestRun::sft().set("max_steps", 6).done();
    let run = TestRun::sft().set("max_steps", 6).done();
    let state = run.output().join("checkpoint-6/trainer_state.safetensors");
    let mut bytes = fs::read(&state).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&state, bytes).unwrap();
    let damaged = run.output().join("checkpoint-6");

    let asked = run.run(&["--resume", damaged.to_str().unwrap()]);
    asked.expect_error(1, &["checkpoint-6` is damaged", "trainer_state.safetensors", "resume from another checkpoint"]);
    let ended = run.run(&["--resume"]).expect(0);
    assert!(
        ended.err.contains("warning: passed over") && ended.err.contains("checkpoint-6` is damaged"),
        "{}",
        ended.err
    );
    assert_eq!(ended.steps(), [5, 6]);
    run.assert_checkpoint(6);
    run.assert_same(&straight);
}

#[test]
fn what_does_not_belong_to_the_checkpoint_is_refused_and_changes_nothing() {
    let run = TestRun::sft().done();
    let (rows, weights) = (run.rows(), run.weights());
    let cases: [(&[&str], &[&str]); 4] = [
        (&["seed=2"], &["`seed: 1`", "this run has 2"]),
        (&["lora_r=8"], &["no fitting", "lora_A.weight", "adapter settings of that run"]),
        (&["use_peft=false", "load_in_4bit=false"], &["no fitting", "adapter settings of that run"]),
        (&["max_train_samples=16"], &["item 5", "this data has 3", "sample limits of the first run"]),
    ];
    for (sets, parts) in cases {
        let mut arguments = vec!["--resume", "--set", "max_steps=6"];
        for set in sets {
            arguments.extend(["--set", set]);
        }
        run.run(&arguments).expect_error(1, parts);
        assert!(run.rows() == rows && run.weights() == weights && run.checkpoints() == [2, 4], "{sets:?}");
    }
    let checkpoint = run.output().join("checkpoint-4");
    let grpo = TestRun::grpo();
    let ended = grpo.run(&["--resume", checkpoint.to_str().unwrap()]);
    ended.expect_error(1, &["checkpoint-4` holds state of `trainer sft`", "not of `trainer grpo`"]);
    grpo.run(&["--resume"]).expect_error(1, &["holds no whole checkpoint", grpo.output().to_str().unwrap()]);
    let missing = grpo.beside("missing");
    grpo.run(&["--resume", missing.to_str().unwrap()]).expect_error(1, &[missing.to_str().unwrap()]);
}

/// Fewer projections than were trained: going on would throw the others' adapters away.
#[test]
fn a_checkpoint_with_more_adapters_than_the_run_is_refused() {
    let run = TestRun::sft().done();
    let weights = run.weights();
    let ended = run.run(&["--resume", "--set", "max_steps=6", "--set", "lora_target_modules=[q_proj]"]);
    ended.expect_error(1, &["checkpoint-4", "adapter settings of that run"]);
    assert!(run.weights() == weights && run.checkpoints() == [2, 4]);
}
