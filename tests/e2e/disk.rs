//! Disks that are full, and limits on files: what was saved before stays, and the run goes on once there is room.

use std::fs;
use std::process::Command;

use crate::test_run::{Ended, TestRun, end, start};

/// A run with a checkpoint at step 2.
fn begun() -> TestRun {
    let run = TestRun::sft().set("save_total_limit", 1);
    run.run(&["--set", "max_steps=2"]).expect(0);
    assert_eq!(run.checkpoints(), [2]);
    run
}

/// After a save at step 4 that failed: checkpoint-2 is whole, nothing else is left, and the run goes on from it.
fn assert_nothing_lost(run: &TestRun) {
    assert_eq!(run.checkpoints(), [2]);
    run.assert_checkpoint(2);
    let ended = run.run(&["--resume"]).expect(0);
    assert_eq!(ended.steps(), [3, 4]);
    assert_eq!(run.checkpoints(), [4]);
}

#[test]
fn a_checkpoint_that_does_not_fit_loses_no_earlier_one() {
    // Files of at most 50 KiB stop the adapter, of at most 200 KiB the training state.
    for (limit, file) in [(50, "adapter_model.safetensors"), (200, "trainer_state.safetensors")] {
        let run = begun();
        let ended = run.run_limited(&format!("trap '' XFSZ; ulimit -f {limit}"), &["--resume"]);
        let place = format!("{file}`");
        let parts = [
            "cannot write",
            &place,
            "checkpoint-4",
            "File too large",
            "ulimit -f",
            "earlier checkpoints are untouched",
        ];
        let ended = ended.expect_error(1, &parts);
        assert_eq!(ended.steps(), [3, 4]);
        assert_nothing_lost(&run);
    }
}

/// The same without the shell's help: the signal that a limit on file sizes sends must not end the run without a word.
#[test]
fn a_limit_on_file_sizes_is_an_error_and_no_sudden_death() {
    let run = begun();
    let ended = run.run_limited("ulimit -f 200", &["--resume"]);
    ended.expect_error(1, &["cannot write", "trainer_state.safetensors`", "ulimit -f"]);
    assert_nothing_lost(&run);
}

/// Rows grow until files may not be larger; nothing else that is written before the end is as large.
#[test]
fn a_log_that_cannot_grow_ends_the_run_and_says_where() {
    let sft = TestRun::sft().set("eval_strategy", "no").set("max_steps", 400);
    let grpo = TestRun::grpo().set("max_steps", 40);
    for (run, log) in [(sft, "metrics.jsonl"), (grpo, "completions.jsonl")] {
        let place = run.output().join(log).display().to_string();
        let parts = ["cannot append to", &place, "File too large", "ulimit -f"];
        let ended = run.run_limited("ulimit -f 12", &["--set", "save_strategy=no"]).expect_error(1, &parts);
        assert!(!ended.steps().is_empty(), "{}", ended.out);
    }
}

/// On a real file system that really fills up, where this system lets a test mount one.
#[test]
fn a_full_disk_at_a_save_loses_nothing_and_the_run_goes_on_when_there_is_room() {
    let can_mount = Command::new("unshare").args(["-rm", "mount", "-t", "tmpfs", "none", "/mnt"]).output();
    if !can_mount.is_ok_and(|output| output.status.success()) {
        return;
    }
    let run = TestRun::sft().set("save_total_limit", "null").set("max_steps", 6);
    fs::create_dir(run.output()).unwrap();
    // Room for two checkpoints of about 430 KiB and half of a third; then room for all.
    let script = r#"
        mount -t tmpfs -o size=1100k none "$1" || exit 99
        out=$1; shift
        "$@" | grep 'warning:'; echo "code ${PIPESTATUS[0]}"
        ls -A "$out"
        mount -o remount,size=8m "$out"
        "$@" --resume; echo "code $?"
        ls -A "$out"
    "#;
    let inner = run.command(&[]);
    let mut command = Command::new("unshare");
    command.current_dir(env!("CARGO_MANIFEST_DIR")).args(["-rm", "bash", "-c", script, "bash"]).arg(run.output());
    command.arg(inner.get_program()).args(inner.get_args());
    let ended: Ended = end(start(&mut command));
    let parts =
        ["cannot write", "No space left on device", "free some space there", "earlier checkpoints are untouched"];
    let ended = ended.expect_error(0, &parts);
    let (full, resumed) = ended.out.split_once("[Run]").unwrap();
    let lines: Vec<&str> = full.lines().collect();
    for part in ["warning: what this run saves takes up to", " MiB free: free some, lower `save_total_limit`"] {
        assert!(lines[0].contains(part), "{full}");
    }
    assert_eq!(lines[1], "code 1", "{full}");
    let expected = ["checkpoint-2", "checkpoint-4", "config.resolved.yaml", "metrics.jsonl"];
    assert_eq!(lines[2..].iter().filter(|name| **name != "completions.jsonl").copied().collect::<Vec<_>>(), expected);
    assert!(resumed.contains("step 5/6") && !resumed.contains("step 4/6"), "{resumed}");
    assert!(resumed.contains("code 0") && resumed.contains("\ncheckpoint-6\n"), "{resumed}");
    assert!(resumed.contains("\nadapter_model.safetensors\n"), "{resumed}");
}

/// What a plan says a checkpoint takes, in bytes.
fn said(ended: &Ended) -> f64 {
    let (_, rest) = ended.out.split_once(" at a time, ").unwrap();
    let (number, unit) = rest.split_once(" each").unwrap().0.split_once(' ').unwrap();
    let factor = match unit {
        "KiB" => 1024.0,
        "MiB" => 1024.0 * 1024.0,
        _ => panic!("{unit}"),
    };
    number.parse::<f64>().unwrap() * factor
}

/// An adapter, all weights, the model alone, and ranks that write shards: what is said of a checkpoint is what it takes, but for
/// files of text.
#[test]
fn checkpoints_are_as_large_as_the_plan_says() {
    let saved = |run: TestRun| run.set("max_steps", 2).set("save_steps", 2);
    for (run, name) in [
        (saved(TestRun::sft()), "an adapter"),
        (saved(TestRun::grpo()), "an adapter of GRPO"),
        (saved(TestRun::full()), "all weights"),
        (saved(TestRun::sft()).set("save_only_model", true), "the adapter alone"),
        (saved(TestRun::sft()).set("num_processes", 2).set("zero_stage", 2), "shards"),
    ] {
        let ended = run.run(&[]).expect(0);
        let folder = run.output().join("checkpoint-2");
        let tensors = fs::read_dir(&folder)
            .unwrap()
            .map(|file| file.unwrap())
            .filter(|file| file.path().extension().is_some_and(|extension| extension == "safetensors"));
        let written: u64 = tensors.map(|file| file.metadata().unwrap().len()).sum();
        let (said, written) = (said(&ended), written as f64);
        // Headers of the files, and three digits.
        assert!((said * 0.98..said * 1.1).contains(&written), "{name}: {said} said, {written} written");
    }
}
