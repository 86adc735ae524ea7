//! A run that was stopped and resumed is the run that was never stopped.

use std::fs;
use std::path::Path;

use crate::changed::edit_state;
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

/// Resumes `run` with other settings, which is refused with one message of `parts` and changes nothing.
#[track_caller]
fn refused(run: &TestRun, sets: &[&str], parts: &[&str]) {
    let (rows, weights, checkpoints) = (run.rows(), run.weights(), run.checkpoints());
    let mut arguments = vec!["--resume"];
    arguments.extend(sets.iter().flat_map(|set| ["--set", set]));
    let ended = run.run(&arguments).expect_error(1, parts);
    assert_eq!(ended.out, "", "something was loaded");
    assert!(run.rows() == rows && run.weights() == weights && run.checkpoints() == checkpoints, "{sets:?}");
}

#[test]
fn settings_that_the_state_depends_on_are_compared_and_all_differences_named() {
    let run = TestRun::sft().done();
    let sets = [
        "max_steps=6",
        "seed=2",
        "per_device_train_batch_size=2",
        "gradient_accumulation_steps=4",
        "lora_r=8",
        "lora_alpha=16",
        "lora_target_modules=[q_proj]",
        "max_train_samples=16",
        "packing=false",
        "dataset_name=data/arithmetic/train.jsonl",
    ];
    let parts = [
        "checkpoint-4` cannot go on with other settings",
        "`seed` was 1, is 2",
        "`data_seed` was 1, is 2",
        "`per_device_train_batch_size` was 4, is 2",
        "`gradient_accumulation_steps` was 2, is 4",
        "`lora_r` was 4, is 8",
        "`lora_alpha` was 8.0, is 16.0",
        "`lora_target_modules` was [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj], is [q_proj]",
        "`max_train_samples` was 64, is 16",
        "`packing` was true, is false",
        "`dataset_name` was data/arithmetic/sft.jsonl, is data/arithmetic/train.jsonl",
        "set them as they were",
        "with `adapter_name_or_path: ",
    ];
    refused(&run, &sets, &parts);
    // One alone is enough, also the scale of the adapter, which has no shape that could fail to fit.
    refused(&run, &["lora_alpha=16"], &["`lora_alpha` was 8.0, is 16.0"]);
    refused(&run, &["use_peft=false", "load_in_4bit=false"], &["`use_peft` was true, is false", "`load_in_4bit` was"]);

    let grpo = TestRun::grpo().done();
    let parts =
        ["`num_generations` was 4, is 2", "`num_iterations` was 1, is 2", "`shuffle_dataset` was true, is false"];
    refused(&grpo, &["num_generations=2", "num_iterations=2", "shuffle_dataset=false"], &parts);
}

#[test]
fn settings_that_people_change_on_the_way_are_a_warning() {
    let run = TestRun::sft().done();
    let sets = ["max_steps=6", "learning_rate=2e-3", "lr_scheduler_type=cosine", "save_steps=1", "disable_tqdm=false"];
    let mut arguments = vec!["--resume"];
    arguments.extend(sets.iter().flat_map(|set| ["--set", set]));
    let ended = run.run(&arguments).expect(0);
    assert_eq!(ended.steps(), [5, 6]);
    let warnings: Vec<&str> = ended.err.lines().filter(|line| line.contains("warning")).collect();
    let [warning] = warnings[..] else { panic!("{}", ended.err) };
    let place = run.output().join("checkpoint-4").display().to_string();
    for part in [
        &format!("`{place}` goes on with changed settings: "),
        "`max_steps` was 4, is 6",
        "`learning_rate` was 0.001, is 0.002",
        "`lr_scheduler_type` was linear, is cosine",
        "`save_steps` was 2, is 1",
    ] {
        assert!(warning.contains(part), "`{part}` is missing in {warning}");
    }
    assert!(!warning.contains("disable_tqdm"), "{warning}");

    // The same settings say nothing, whichever way they are written.
    let again = ["max_steps=6", "learning_rate=0.002", "lr_scheduler_type=cosine", "save_steps=1"];
    let mut arguments = vec!["--resume", "--set", "dataset_name=./data/../data/arithmetic/sft.jsonl"];
    arguments.extend(again.iter().flat_map(|set| ["--set", set]));
    let ended = run.run(&arguments).expect(0);
    assert_eq!((ended.steps(), ended.err.as_str()), (vec![], ""));
}

#[test]
fn data_that_moved_are_the_same_data() {
    let run = TestRun::sft();
    let place = |name: &str| run.beside(name).join("rows.jsonl");
    for name in ["first", "second"] {
        fs::create_dir(run.beside(name)).unwrap();
    }
    fs::copy("data/arithmetic/sft.jsonl", place("first")).unwrap();
    let set = |name: &str| format!("dataset_name={}", place(name).display());
    run.run(&["--set", &set("first"), "--set", "max_steps=2"]).expect(0);
    // As long as the first is there, the second is another one.
    fs::copy(place("first"), place("second")).unwrap();
    let (first, second) = (place("first").display().to_string(), place("second").display().to_string());
    let difference = format!("`dataset_name` was {first}, is {second}");
    refused(&run, &[&set("second")], &[&difference]);
    fs::remove_file(place("first")).unwrap();
    let ended = run.run(&["--resume", "--set", &set("second")]).expect(0);
    assert!(ended.err.contains(&difference) && ended.steps() == [3, 4], "{}", ended.err);
}

/// Makes a checkpoint one of a program that noted neither its settings nor what it read.
fn forget_settings(checkpoint: &Path) {
    edit_state(checkpoint, &|state| {
        for name in ["settings", "inputs"] {
            assert!(state.as_object_mut().unwrap().remove(name).is_some());
        }
    });
}

#[test]
fn a_checkpoint_without_settings_is_still_read_and_checked_by_what_it_holds() {
    let run = TestRun::sft().done();
    forget_settings(&run.output().join("checkpoint-4"));
    let cases: [(&str, &[&str]); 4] = [
        ("seed=2", &["`seed` was 1, is 2"]),
        ("lora_r=8", &["no fitting", "lora_A.weight", "adapter settings of that run"]),
        // Fewer projections than were trained: going on would throw the others' adapters away.
        ("lora_target_modules=[q_proj]", &["checkpoint-4", "adapter settings of that run"]),
        (
            "max_train_samples=16",
            &["checkpoint-4` stands at item", "which has 3 items", "sample limits of the first run"],
        ),
    ];
    for (set, parts) in cases {
        refused(&run, &["max_steps=6", set], parts);
    }
    assert_eq!(run.run(&["--resume", "--set", "max_steps=6"]).expect(0).steps(), [5, 6]);
    let other = TestRun::sft().done();
    other.run(&["--resume", "--set", "max_steps=6"]).expect(0);
    run.assert_same(&other);
}

#[test]
fn a_checkpoint_of_another_task_or_none_is_refused() {
    let run = TestRun::sft().done();
    let checkpoint = run.output().join("checkpoint-4");
    let grpo = TestRun::grpo();
    let ended = grpo.run(&["--resume", checkpoint.to_str().unwrap()]);
    ended.expect_error(1, &["checkpoint-4` holds state of `trainer sft`", "not of `trainer grpo`"]);
    grpo.run(&["--resume"]).expect_error(1, &["holds no whole checkpoint", grpo.output().to_str().unwrap()]);
    let missing = grpo.beside("missing");
    grpo.run(&["--resume", missing.to_str().unwrap()]).expect_error(1, &[missing.to_str().unwrap()]);
}

/// `config.resolved.yaml` of a run that went on from its own checkpoint gives the whole run; that of a run which went on
/// from another run's checkpoint goes on from there again.
#[test]
fn the_resolved_config_of_a_resumed_run_gives_the_same_run() {
    let straight = TestRun::sft().set("max_steps", 6).set("lr_scheduler_type", "constant").done();
    let resumed = TestRun::sft().set("lr_scheduler_type", "constant");
    resumed.run(&["--set", "max_steps=4"]).expect(0);
    resumed.run(&["--resume", "--set", "max_steps=6"]).expect(0);
    resumed.assert_same(&straight);
    let again = TestRun::of("sft", resumed.output().join("config.resolved.yaml"));
    assert_eq!(again.run(&[]).expect(0).steps(), [1, 2, 3, 4, 5, 6]);
    again.assert_same(&straight);

    let checkpoint = straight.output().join("checkpoint-4");
    let branch = TestRun::sft().set("max_steps", 6).set("learning_rate", "5e-3");
    branch.run(&["--resume", checkpoint.to_str().unwrap()]).expect(0);
    let again = TestRun::of("sft", branch.output().join("config.resolved.yaml"));
    assert_eq!(again.run(&[]).expect(0).steps(), [5, 6]);
    again.assert_same(&branch);
    assert!(again.weights() != straight.weights());
}
