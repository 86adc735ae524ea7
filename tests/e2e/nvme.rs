//! Parameters and the optimizer's state in files: the same bits as in memory, files that go with their run, and errors that name
//! what to do.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::test_run::{TestRun, end, names, start};

/// Micro-batches of a step over all ranks, more than an epoch has: the last step of each is as long for any number of ranks.
const MICRO_STEPS: usize = 12;

/// The folder of a run's files.
fn folder(run: &TestRun) -> PathBuf {
    let folder = run.beside("nvme");
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// A run of which `optimizer` and `params` lie in files.
fn in_files(run: TestRun, optimizer: bool, params: bool) -> TestRun {
    let folder = folder(&run);
    in_folder(run, &folder, optimizer, params)
}

fn in_folder(run: TestRun, folder: &Path, optimizer: bool, params: bool) -> TestRun {
    let place = |is_there: bool| if is_there { "nvme" } else { "none" };
    let key = if params { "offload_param_nvme_path" } else { "offload_optimizer_nvme_path" };
    run.set("offload_optimizer_device", place(optimizer))
        .set("offload_param_device", place(params))
        .set(key, folder.display())
        // All parameters wait.
        .set("stage3_param_persistence_threshold", 0)
}

fn over(run: TestRun, ranks: usize, stage: usize) -> TestRun {
    run.set("num_processes", ranks)
        .set("zero_stage", stage)
        .set("per_device_train_batch_size", 2)
        .set("gradient_accumulation_steps", MICRO_STEPS / ranks)
}

const PLACES: [(bool, bool); 3] = [(true, false), (false, true), (true, true)];

/// All that can wait in files, on one rank and on two, leaves what memory leaves, to the last bit, and no file.
fn assert_all_same(run: &dyn Fn() -> TestRun) {
    let resident = over(run(), 1, 0).done();
    for (optimizer, params) in PLACES {
        for (ranks, stage) in [(1, 0), (2, 0), (2, 2), (2, 3)] {
            let other = over(in_files(run(), optimizer, params), ranks, stage).done();
            other.assert_same(&resident);
            assert_eq!(other.checkpoints(), resident.checkpoints());
            assert!(names(&folder(&other)).is_empty(), "{:?}", names(&folder(&other)));
        }
    }
    let cpu = over(run(), 1, 0).set("offload_optimizer_device", "cpu").set("offload_param_device", "cpu").done();
    cpu.assert_same(&resident);
}

#[test]
fn sft_of_an_adapter_is_the_same_from_files() {
    assert_all_same(&TestRun::sft);
}

#[test]
fn sft_of_all_weights_is_the_same_from_files() {
    assert_all_same(&|| {
        TestRun::full().set("max_train_samples", 32).set("max_steps", 4).set("gradient_checkpointing", true)
    });
}

#[test]
fn grpo_is_the_same_from_files() {
    let run = || TestRun::grpo().set("beta", 0.04).set("num_iterations", 2).set("num_generations", 2);
    assert_all_same(&run);
}

#[test]
fn grpo_with_a_reference_that_moves_is_the_same_from_files() {
    let run = || {
        let run = TestRun::grpo().set("use_peft", false).set("load_in_4bit", false).set("beta", 0.04);
        run.set("sync_ref_model", true).set("ref_model_sync_steps", 2).set("num_generations", 2)
    };
    let resident = over(run(), 1, 0).done();
    over(in_files(run(), true, true), 1, 0).done().assert_same(&resident);
    over(in_files(run(), true, true), 2, 3).done().assert_same(&resident);
}

#[test]
fn every_optimizer_and_every_number_of_buffers_is_the_same_from_files() {
    for (optim, buffers) in [("adamw_8bit", 1), ("lion_32bit", 2), ("muon", 5), ("adamw_torch", 64)] {
        let run = || TestRun::full().set("max_train_samples", 32).set("max_steps", 3).set("optim", optim);
        let resident = over(run(), 1, 0).done();
        let files = |run| in_files(run, true, true).set("offload_buffer_count", buffers);
        over(files(run()), 1, 0).done().assert_same(&resident);
        over(files(run()), 2, 1).done().assert_same(&resident);
    }
}

#[test]
fn a_run_from_files_goes_on_where_it_was_stopped() {
    for (ranks, stage) in [(1, 0), (2, 3)] {
        let run =
            || over(TestRun::sft(), 1, 0).set("max_steps", 60).set("eval_strategy", "no").set("save_strategy", "no");
        let straight = run().done();
        let stopped = over(in_files(run(), true, true), ranks, stage);
        stopped.run_until(3, "TERM").expect(130);
        assert!(names(&folder(&stopped)).is_empty());
        assert_eq!(stopped.checkpoints().len(), 1);
        // With other things in files, and without.
        let more: &[&str] = if ranks == 1 { &[] } else { &["--set", "offload_optimizer_device=none"] };
        let mut arguments = vec!["--resume"];
        arguments.extend(more);
        stopped.run(&arguments).expect(0);
        stopped.assert_same(&straight);
    }
}

#[test]
fn the_plan_says_where_things_lie() {
    let run = in_files(TestRun::sft(), true, true);
    let out = run.run(&[]).expect(0).out;
    let lines: Vec<&str> =
        out.lines().filter(|line| line.contains(".trainer-waiting") || line.contains("in host")).collect();
    assert!(out.contains("in files"), "{out}");
    for part in [
        "out-",
        "-rank-0-parameters.trainer-waiting`",
        "-rank-0-optimizer.trainer-waiting`",
        "at most 3 blocks of each",
    ] {
        assert!(lines.iter().any(|line| line.contains(part)), "`{part}` is missing in {lines:?}");
    }
}

/// Waits until the run has logged a step.
fn wait_for_step(output: &Path) {
    let started = Instant::now();
    while !fs::read_to_string(output.join("metrics.jsonl")).is_ok_and(|text| text.contains("\"step\"")) {
        assert!(started.elapsed() < Duration::from_mins(1), "no step came");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn two_runs_share_a_folder_and_the_next_removes_what_a_killed_one_left() {
    let resident = TestRun::sft().set("max_steps", 100).set("eval_strategy", "no").done();
    let long = || TestRun::sft().set("max_steps", 100).set("eval_strategy", "no");
    let first = long();
    let shared = folder(&first);
    let first = in_folder(first, &shared, true, true);
    let running = start(&mut first.command(&[]));
    wait_for_step(&first.output());
    let killed = in_folder(long(), &shared, true, true);
    let (ended, _) = killed.signal_when(&[], "KILL", |output| {
        fs::read_to_string(output.join("metrics.jsonl")).is_ok_and(|text| text.contains("\"step\""))
    });
    assert_eq!(ended.code, None, "{ended:?}");
    // A name of nobody's run, and a file of somebody else.
    fs::write(shared.join("old-rank-7-optimizer.trainer-waiting"), "left").unwrap();
    fs::write(shared.join("notes.txt"), "mine").unwrap();
    let next = in_folder(TestRun::sft(), &shared, true, true);
    let ended = next.run(&[]).expect(0);
    let removed = ended.err.lines().filter(|line| line.contains("which a run that was killed had left")).count();
    assert_eq!(removed, 3, "{}", ended.err);
    end(running).expect(0);
    first.assert_same(&resident);
    assert_eq!(names(&shared).into_iter().collect::<Vec<_>>(), ["notes.txt"]);
}

#[test]
fn a_folder_that_cannot_be_used_is_named_with_what_to_do() {
    let run = TestRun::sft();
    let missing = run.beside("nowhere");
    let missing = in_folder(run, &missing, false, true);
    missing
        .run(&[])
        .expect_error(1, &["cannot use the folder", "nowhere`", "make the folder", "`offload_param_nvme_path`"]);
    // Nobody makes files there.
    let forbidden = in_folder(TestRun::sft(), Path::new("/sys"), true, false);
    let parts = ["cannot create", "/sys/out-", "let this user write there", "`offload_optimizer_nvme_path`"];
    forbidden.run(&[]).expect_error(1, &parts);
    let none = TestRun::sft().set("offload_param_device", "nvme");
    none.run(&[])
        .expect_error(2, &["`offload_param_device: nvme` needs a folder", "offload_param_nvme_path: /local_nvme"]);
}

#[test]
fn a_disk_that_is_full_is_found_before_the_first_step() {
    for (optimizer, params, key) in
        [(false, true, "`offload_param_nvme_path`"), (true, false, "`offload_optimizer_nvme_path`")]
    {
        let run = in_files(TestRun::sft(), optimizer, params);
        let ended = run.run_limited("ulimit -f 8", &[]);
        let ended = ended.expect_error(1, &["cannot write", ".trainer-waiting`", "File too large", "ulimit -f", key]);
        assert_eq!(ended.steps(), Vec::<u64>::new());
        assert!(names(&folder(&run)).is_empty(), "{:?}", names(&folder(&run)));
    }
}

#[test]
fn a_stage_that_is_left_open_is_the_first_that_fits() {
    let resident = over(TestRun::sft(), 1, 0).done();
    let open = over(TestRun::sft(), 2, 0).set("zero_stage", "auto");
    let out = open.run(&[]).expect(0).out;
    open.assert_same(&resident);
    assert!(out.contains("auto: 0, everything fits on every rank"), "{out}");
    assert!(out.contains("each with everything (ZeRO stage 0)"), "{out}");
    let out = over(TestRun::sft(), 2, 3).run(&[]).expect(0).out;
    assert!(out.contains("stage 0 is faster and fits too"), "{out}");
    // More than any machine has.
    let large = over(TestRun::sft(), 2, 0).set("zero_stage", "auto").set("max_length", 4_000_000);
    let large = large.set("per_device_train_batch_size", 1_000_000);
    let parts = ["`zero_stage: auto` finds no stage that fits", "host memory", "`zero_stage: 3` tries it all the same"];
    let ended = large.run(&[]);
    assert_eq!(ended.code, Some(1), "{}", ended.err);
    assert!(parts.iter().all(|part| ended.err.contains(part)), "{}", ended.err);
}
