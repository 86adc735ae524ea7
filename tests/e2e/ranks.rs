//! Several ranks on one machine: the same bits as one, whatever they share; what happens when one of them is lost or stopped.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::test_run::{TestRun, names, start};

/// Micro-batches of a step over all ranks, so that 1, 2, 3, 4 and 6 ranks have as many each.
const MICRO_STEPS: usize = 12;

fn over(run: TestRun, ranks: usize, stage: usize) -> TestRun {
    run.set("num_processes", ranks)
        .set("zero_stage", stage)
        .set("per_device_train_batch_size", 2)
        .set("gradient_accumulation_steps", MICRO_STEPS / ranks)
        // Small parameters are cut as well, but not all.
        .set("stage3_param_persistence_threshold", 200)
}

fn rank_logs(run: &TestRun) -> Vec<String> {
    let folder = run.output().join("logs");
    names(&folder).iter().map(|name| fs::read_to_string(folder.join(name)).unwrap()).collect()
}

/// Every number of ranks and every stage leave what one rank leaves, to the last bit.
fn assert_all_same(run: &dyn Fn() -> TestRun) {
    let alone = over(run(), 1, 0).done();
    for (ranks, stage) in [(2, 0), (4, 0), (3, 1), (4, 1), (2, 2), (3, 2), (2, 3), (3, 3), (4, 3)] {
        let shared = over(run(), ranks, stage).done();
        shared.assert_same(&alone);
        assert_eq!(shared.checkpoints(), alone.checkpoints(), "{ranks} ranks, stage {stage}");
        let logs = rank_logs(&shared);
        assert_eq!(logs.len(), ranks - 1);
        assert!(logs.iter().all(|log| log.starts_with("rank ") && !log.contains("error")), "{logs:?}");
    }
}

#[test]
fn sft_of_an_adapter_is_the_same_on_any_number_of_ranks_in_every_stage() {
    assert_all_same(&TestRun::sft);
}

#[test]
fn sft_of_all_weights_is_the_same_on_any_number_of_ranks_in_every_stage() {
    assert_all_same(&|| {
        TestRun::full().set("max_train_samples", 48).set("max_steps", 5).set("gradient_checkpointing", true)
    });
}

#[test]
fn grpo_is_the_same_on_any_number_of_ranks_in_every_stage() {
    // A step takes more than one generation batch, of which each is seen twice, and there is a reference.
    let run = || TestRun::grpo().set("beta", 0.04).set("num_iterations", 2).set("num_generations", 3);
    assert_all_same(&run);
}

#[test]
fn grpo_of_all_weights_with_a_reference_that_moves_is_the_same_on_ranks_that_share_all() {
    let run = |ranks, stage| {
        let run = TestRun::grpo().set("use_peft", false).set("load_in_4bit", false).set("beta", 0.04);
        over(run.set("sync_ref_model", true).set("ref_model_sync_steps", 2), ranks, stage).done()
    };
    let alone = run(1, 0);
    run(2, 3).assert_same(&alone);
    run(3, 1).assert_same(&alone);
}

#[test]
fn every_optimizer_is_the_same_over_shards_and_after_a_resume() {
    for optim in ["adamw_8bit", "lion_32bit", "muon"] {
        let run = |ranks, stage| {
            let run = TestRun::full().set("max_train_samples", 48).set("max_steps", 4).set("optim", optim);
            over(run.set("lr_scheduler_type", "constant").set("learning_rate", 1e-3), ranks, stage)
        };
        let alone = run(1, 0).done();
        run(3, 1).done().assert_same(&alone);
        run(2, 3).done().assert_same(&alone);
        let resumed = run(4, 2);
        resumed.run(&["--set", "max_steps=2"]).expect(0);
        let more = ["--resume", "--set", "num_processes=1", "--set", "gradient_accumulation_steps=12"];
        resumed.run(&more).expect(0);
        resumed.assert_same(&alone);
        // State of another rule is not taken for this one's.
        let other = resumed.run(&["--resume", "--set", "optim=adamw_torch", "--set", "max_steps=6"]);
        other.expect_error(1, &["`optim` was"]);
    }
}

#[test]
fn a_run_goes_on_with_another_number_of_ranks_and_in_another_stage() {
    for run in [TestRun::sft, TestRun::grpo, || TestRun::full().set("save_strategy", "steps").set("save_steps", 1)] {
        let run = || run().set("lr_scheduler_type", "constant").set("eval_strategy", "no");
        let straight = over(run(), 1, 0).set("max_steps", 4).done();
        let moved = over(run(), 4, 3).set("max_steps", 1).done();
        // Each rank has written its part, and nobody all of them.
        let checkpoint = moved.output().join("checkpoint-1");
        let written = names(&checkpoint).into_iter().filter(|name| name.starts_with("trainer_state"));
        let parts: Vec<String> = written.filter(|name| name.ends_with(".safetensors")).collect();
        let expected: Vec<String> =
            (1..5).map(|rank| format!("trainer_state-{rank:05}-of-00004.safetensors")).collect();
        assert_eq!(parts, expected);
        let sizes: Vec<u64> = parts.iter().map(|part| fs::metadata(checkpoint.join(part)).unwrap().len()).collect();
        assert!(sizes.iter().all(|size| 3 * size < sizes.iter().sum()), "{sizes:?}");
        for (steps, ranks, stage) in [(2, 2, 2), (3, 3, 1), (4, 1, 0)] {
            let more = [
                format!("max_steps={steps}"),
                format!("num_processes={ranks}"),
                format!("zero_stage={stage}"),
                format!("gradient_accumulation_steps={}", MICRO_STEPS / ranks),
            ];
            let mut arguments = vec!["--resume"];
            arguments.extend(more.iter().flat_map(|more| ["--set", more]));
            moved.run(&arguments).expect(0);
        }
        assert!(moved.weights() == straight.weights(), "the final weights differ");
        // Another number of micro-batches in all is another run.
        let other = moved.run(&["--resume", "--set", "num_processes=2", "--set", "max_steps=6"]);
        other.expect_error(1, &["`gradient_accumulation_steps` was 12 over all ranks, is 6"]);
    }
}

#[test]
fn the_best_model_and_models_alone_are_those_of_one_rank() {
    let best = |ranks, stage| {
        let run = TestRun::sft().set("metric_for_best_model", "eval_loss").set("load_best_model_at_end", true);
        // The loss falls, so the best is not the last.
        over(run.set("max_steps", 6).set("greater_is_better", true).set("save_total_limit", 1), ranks, stage)
    };
    let alone = best(1, 0).done();
    let losses = alone.metric("eval_loss");
    assert!(losses.iter().any(|loss| loss > losses.last().unwrap()), "the last model is the best: {losses:?}");
    let shared = best(3, 3).done();
    shared.assert_same(&alone);
    assert_eq!(shared.checkpoints(), alone.checkpoints());
    let only = |ranks, stage| {
        let run = TestRun::full().set("max_train_samples", 48).set("max_steps", 4).set("save_only_model", true);
        over(run.set("save_strategy", "steps").set("save_steps", 2).set("eval_strategy", "no"), ranks, stage)
    };
    let alone = only(1, 0).done();
    let shared = only(3, 3).done();
    shared.assert_same(&alone);
    let files = |run: &TestRun, step| names(&run.output().join(format!("checkpoint-{step}")));
    assert_eq!(files(&shared, 2), files(&alone, 2));
    let weights = |run: &TestRun| fs::read(run.output().join("checkpoint-2/model.safetensors")).unwrap();
    assert!(weights(&shared) == weights(&alone));
}

/// The process of a rank of the run in `output`, by what it says of itself in its log, or the first rank by its lock.
fn process_of(output: &Path, rank: usize) -> Option<u32> {
    if rank == 0 {
        return fs::read_to_string(output.join("run.lock")).ok()?.trim().parse().ok();
    }
    let log = fs::read_to_string(output.join("logs").join(format!("rank-{rank}.log"))).ok()?;
    let last = log.lines().filter(|line| line.starts_with("rank ")).next_back()?;
    last.split("process ").nth(1)?.split(',').next()?.parse().ok()
}

fn kill(signal: &str, process: u32) {
    Command::new("sh").args(["-c", &format!("kill -{signal} {process}")]).status().unwrap();
}

/// Waits until the run has logged a step.
fn wait_for_step(output: &Path) {
    let started = Instant::now();
    while !fs::read_to_string(output.join("metrics.jsonl")).is_ok_and(|text| text.contains("\"step\"")) {
        assert!(started.elapsed() < Duration::from_mins(1), "no step came");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Waits until something has this name.
fn wait_for(path: &Path) {
    let started = Instant::now();
    while !path.exists() {
        assert!(started.elapsed() < Duration::from_mins(1), "`{}` did not come", path.display());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A run long enough to be disturbed.
fn long() -> TestRun {
    over(TestRun::sft(), 3, 2).set("max_steps", 300).set("eval_strategy", "no").set("save_steps", 3)
}

#[test]
fn a_rank_that_is_killed_ends_the_job_and_the_run_goes_on_from_its_checkpoint() {
    let steps = |run: TestRun| run.set("lr_scheduler_type", "constant");
    let straight = steps(long()).set("max_steps", 9).done();
    for victim in 0..3 {
        let run = steps(long());
        let child = start(&mut run.command(&[]));
        wait_for_step(&run.output());
        let begun = Instant::now();
        kill("KILL", process_of(&run.output(), victim).unwrap());
        let ended = crate::test_run::end(child).expect(3);
        assert!(begun.elapsed() < Duration::from_secs(20), "rank {victim}: {:?}", begun.elapsed());
        assert!(ended.err.contains(&format!("rank {victim} was ended by SIGKILL")), "{}", ended.err);
        if victim > 0 {
            assert!(ended.err.contains(&format!("lost rank {victim}")), "{}", ended.err);
        }
        let last = *run.checkpoints().last().unwrap_or(&0);
        if (1..9).contains(&last) {
            run.run(&["--resume", "--set", "max_steps=9"]).expect(0);
            assert!(run.weights() == straight.weights(), "the final weights differ");
        }
    }
}

#[test]
fn a_rank_that_is_stopped_is_named_within_the_deadline() {
    let run = long().set("ddp_timeout", 4);
    let child = start(&mut run.command(&[]));
    wait_for_step(&run.output());
    let victim = process_of(&run.output(), 1).unwrap();
    kill("STOP", victim);
    let begun = Instant::now();
    let ended = crate::test_run::end(child);
    assert!(begun.elapsed() < Duration::from_secs(50), "{:?}", begun.elapsed());
    assert!(ended.code == Some(3), "{ended:?}");
    assert!(ended.err.contains("rank 1") && ended.err.contains("heard nothing"), "{}", ended.err);
}

#[test]
fn a_signal_to_one_rank_or_to_all_saves_and_the_run_goes_on_as_if_it_had_not_come() {
    let run = || over(TestRun::sft(), 3, 3).set("max_steps", 100).set("eval_strategy", "no").set("save_strategy", "no");
    let straight = run().done();
    for whom in ["one", "all"] {
        let stopped = run();
        let child = start(&mut stopped.command(&[]));
        wait_for_step(&stopped.output());
        let process = if whom == "one" { process_of(&stopped.output(), 2).unwrap() } else { child.id() };
        kill("TERM", process);
        crate::test_run::end(child).expect(130);
        let saved = stopped.checkpoints();
        assert_eq!(saved.len(), 1, "{whom}");
        stopped.run(&["--resume"]).expect(0);
        stopped.assert_same(&straight);
    }
}

#[test]
fn an_error_of_one_rank_is_the_error_of_the_run() {
    // The reward fails on the second rank alone.
    let program = "import json, os, sys\n\
                   for line in sys.stdin:\n    request = json.loads(line)\n    \
                   if os.environ.get('TRAINER_RANK') == '1': sys.exit('no room left in here')\n    \
                   print(json.dumps({'id': request['id'], 'scores': [0.5] * len(request['samples'])}), flush=True)\n";
    let run = over(TestRun::grpo(), 2, 0);
    let script = run.beside("reward.py");
    fs::write(&script, program).unwrap();
    let rewards = format!("[{{kind: command, name: picky, command: [python3, {}]}}]", script.display());
    let ended = run.set("reward_funcs", rewards).run(&[]);
    assert!(ended.err.contains("rank 1") && ended.err.contains("picky"), "{}", ended.err);
    assert_eq!(ended.code, Some(1), "{}", ended.err);
}

/// The rank that writes everything finds the disk full while the others wait for it.
#[test]
fn a_full_disk_of_the_first_rank_ends_the_run_and_loses_nothing() {
    let run = |ranks| over(TestRun::sft().set("save_total_limit", 1).set("lr_scheduler_type", "constant"), ranks, 0);
    let straight = run(1).done();
    let stopped = run(2);
    stopped.run(&["--set", "max_steps=2"]).expect(0);
    // Files of at most 200 KiB, which the state of training is not.
    let ended = stopped.run_limited("ulimit -f 200", &["--resume"]);
    assert_eq!(ended.code, Some(1), "{}", ended.err);
    for part in ["cannot write", "trainer_state.safetensors`", "ulimit -f", "earlier checkpoints are untouched"] {
        assert!(ended.err.contains(part), "`{part}` is missing in\n{}", ended.err);
    }
    assert_eq!(stopped.checkpoints(), [2]);
    stopped.run(&["--resume"]).expect(0);
    assert!(stopped.weights() == straight.weights());
}

/// Goes on from the newest checkpoint to step 9, where a run that nobody disturbed stands with `straight`.
#[track_caller]
fn assert_goes_on(run: &TestRun, straight: &TestRun) {
    let written = names(&run.output()).into_iter().filter_map(|name| name.strip_prefix("checkpoint-")?.parse().ok());
    let steps: Vec<u64> = written.collect();
    steps.iter().for_each(|&step| run.assert_checkpoint(step));
    if steps.iter().all(|step| *step < 9) {
        run.run(&["--resume", "--set", "max_steps=9"]).expect(0);
        assert!(run.weights() == straight.weights(), "the final weights differ");
        // What was left of a save is gone.
        run.checkpoints();
    }
}

#[test]
fn a_full_disk_of_any_rank_ends_the_run_and_loses_nothing() {
    let steps = |run: TestRun| run.set("lr_scheduler_type", "constant");
    let straight = steps(long()).set("max_steps", 9).done();
    for (victim, stage) in [(1, 2), (2, 3)] {
        let run = steps(long()).set("zero_stage", stage);
        let child = start(&mut run.command(&[]));
        wait_for(&run.output().join("checkpoint-3"));
        // One rank's files may not grow beyond 20 KiB, which its part of the state does.
        let process = process_of(&run.output(), victim).unwrap();
        let limited = Command::new("prlimit").args([format!("--pid={process}"), "--fsize=20480".into()]).status();
        assert!(limited.unwrap().success());
        let ended = crate::test_run::end(child);
        assert_eq!(ended.code, Some(1), "{}", ended.err);
        let file = format!("trainer_state-{:05}-of-00003.safetensors`", victim + 1);
        for part in [&format!("rank {victim}"), "cannot write", &file, "ulimit -f", "earlier checkpoints are untouched"]
        {
            assert!(ended.err.contains(part), "`{part}` is missing in\n{}", ended.err);
        }
        // Nothing of the half checkpoint is left.
        run.checkpoints();
        assert_goes_on(&run, &straight);
    }
}

/// The first rank fails in the middle of the model, of which the others send it a parameter after the other.
#[test]
fn a_full_disk_while_the_model_is_gathered_ends_the_run_and_loses_nothing() {
    let run = |steps| {
        let run = TestRun::full().set("max_steps", steps).set("save_strategy", "steps").set("save_steps", 3);
        over(run.set("lr_scheduler_type", "constant").set("max_train_samples", 48).set("eval_strategy", "no"), 3, 3)
    };
    let straight = run(9).done();
    let stopped = run(300);
    let child = start(&mut stopped.command(&[]));
    wait_for(&stopped.output().join("checkpoint-3"));
    let process = process_of(&stopped.output(), 0).unwrap();
    let limited = Command::new("prlimit").args([format!("--pid={process}"), "--fsize=100000".into()]).status();
    assert!(limited.unwrap().success());
    let ended = crate::test_run::end(child).expect(1);
    for part in ["cannot write", "model.safetensors`", "ulimit -f", "earlier checkpoints are untouched"] {
        assert!(ended.err.contains(part), "`{part}` is missing in\n{}", ended.err);
    }
    assert!(rank_logs(&stopped).iter().all(|log| log.contains("rank 0") && log.contains("cannot write")));
    stopped.checkpoints();
    assert_goes_on(&stopped, &straight);
}

#[test]
fn a_rank_that_is_killed_while_all_write_leaves_no_half_checkpoint() {
    let steps = |run: TestRun| run.set("lr_scheduler_type", "constant");
    let straight = steps(long()).set("max_steps", 9).done();
    for victim in 0..3 {
        let run = steps(long());
        let child = start(&mut run.command(&[]));
        wait_for(&run.output().join("checkpoint-3"));
        let process = process_of(&run.output(), victim).unwrap();
        let begun = Instant::now();
        let is_saving = || names(&run.output()).iter().any(|name| name.contains(".partial-"));
        while !is_saving() {
            assert!(begun.elapsed() < Duration::from_mins(1), "nothing is saved");
        }
        kill("KILL", process);
        crate::test_run::end(child).expect(3);
        assert_goes_on(&run, &straight);
    }
}

#[test]
fn a_checkpoint_in_one_file_of_an_older_program_is_read_by_any_ranks() {
    let run = |ranks, stage| over(TestRun::sft().set("lr_scheduler_type", "constant"), ranks, stage);
    let straight = run(1, 0).done();
    let older = run(1, 0);
    older.run(&["--set", "max_steps=2"]).expect(0);
    // It did not say which files hold tensors.
    let checkpoint = older.output().join("checkpoint-2");
    let edit = |name: &str, change: &dyn Fn(&mut serde_json::Value)| {
        let path = checkpoint.join(name);
        let mut value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut value);
        fs::write(path, value.to_string()).unwrap();
    };
    edit("trainer_state.json", &|state| {
        assert_eq!(state["version"], 1);
        assert_eq!(state["tensor_files"], serde_json::json!(["trainer_state.safetensors"]));
        state.as_object_mut().unwrap().remove("tensor_files");
    });
    let (blake3, bytes) = trainer::fs::checksum(&checkpoint.join("trainer_state.json")).unwrap();
    edit("manifest.json", &|manifest| {
        manifest["files"]["trainer_state.json"] = serde_json::json!({"bytes": bytes, "blake3": blake3});
    });
    let more = ["num_processes=3", "zero_stage=3", "gradient_accumulation_steps=4"];
    let mut arguments = vec!["--resume"];
    arguments.extend(more.iter().flat_map(|more| ["--set", more]));
    older.run(&arguments).expect(0);
    older.assert_same(&straight);
}

/// Completions that a rank was dealt and that it took of those that were not, over all batches, by what it says of them.
fn made_by(log: &str) -> [usize; 2] {
    let mut sums = [0; 2];
    for line in log.lines().filter(|line| line.contains("were dealt to this rank")) {
        let said = line.split("completions: ").nth(1).unwrap();
        let numbers: Vec<usize> = said.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        sums.iter_mut().zip(&numbers).for_each(|(sum, number)| *sum += number);
    }
    sums
}

#[test]
fn completions_of_a_slow_rank_are_made_by_the_others_and_are_the_same() {
    let run = |ranks| {
        let run = TestRun::grpo().set("num_generations", 2).set("max_completion_length", 48).set("max_steps", 5);
        over(run, ranks, 0)
    };
    let alone = run(1).done();
    let shared = run(2);
    let mut command = shared.command(&[]);
    command.env("TRAINER_LOG", "warn,trainer=debug");
    let child = start(&mut command);
    wait_for_step(&shared.output());
    let slow = process_of(&shared.output(), 1).unwrap();
    let is_over = AtomicBool::new(false);
    // The number of a process that has ended may be another's.
    let runs = || fs::read_to_string(format!("/proc/{slow}/cmdline")).is_ok_and(|line| line.contains("output_dir"));
    let ended = std::thread::scope(|scope| {
        // The second rank runs a tenth of the time.
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) && runs() {
                kill("STOP", slow);
                std::thread::sleep(Duration::from_millis(45));
                kill("CONT", slow);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let ended = crate::test_run::end(child);
        is_over.store(true, Ordering::Relaxed);
        ended
    });
    let ended = ended.expect(0);
    let [dealt, taken] = made_by(&ended.err);
    let [dealt_to_slow, taken_by_slow] = made_by(&rank_logs(&shared).concat());
    assert_eq!(dealt + taken + dealt_to_slow + taken_by_slow, alone.completions().len());
    assert!(taken > 2 * taken_by_slow && dealt.abs_diff(dealt_to_slow) < dealt, "{taken} and {taken_by_slow}");
    shared.assert_same(&alone);
}

#[test]
fn a_signal_while_ranks_take_from_each_other_is_a_step_that_was_not_begun() {
    let run = || {
        let run = TestRun::grpo().set("num_generations", 2).set("max_completion_length", 48).set("max_steps", 40);
        over(run, 3, 0).set("save_strategy", "no")
    };
    let straight = run().done();
    for whom in [0, 2] {
        let stopped = run();
        let child = start(&mut stopped.command(&[]));
        wait_for_step(&stopped.output());
        kill("TERM", process_of(&stopped.output(), whom).unwrap());
        crate::test_run::end(child).expect(130);
        stopped.run(&["--resume"]).expect(0);
        stopped.assert_same(&straight);
    }
}

/// Ranks on machines whose `output_dir` is not one folder: the first writes what it has by itself, and parts are refused at once.
#[test]
fn ranks_without_a_shared_folder_write_no_parts_and_say_what_is_needed() {
    let run = |stage| {
        let run = over(TestRun::sft(), 2, stage).set("max_steps", 2).set("eval_strategy", "no");
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let elsewhere = format!("output_dir={}", run.beside("elsewhere").display());
        let rank = |rank: usize, more: &[&str]| {
            let mut command = run.command(more);
            command.env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string()).env("WORLD_SIZE", "2");
            start(command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string()))
        };
        let (first, second) = (rank(0, &[]), rank(1, &["--set", &elsewhere]));
        let second = std::thread::spawn(move || crate::test_run::end(second));
        let first = crate::test_run::end(first);
        (first, second.join().unwrap(), run)
    };
    let (first, second, done) = run(0);
    assert_eq!((first.code, second.code), (Some(0), Some(0)), "{}\n{}", first.err, second.err);
    assert_eq!(done.checkpoints(), [2]);
    done.assert_checkpoint(2);
    let (first, _, stopped) = run(2);
    first.expect_error(1, &["of rank 0 (on ", "is not what rank 1 (on ", "that all nodes share", "zero_stage: 0"]);
    assert!(stopped.checkpoints().is_empty() && !stopped.has("metrics.jsonl"));
}

#[test]
fn more_ranks_than_rows_have_nothing_to_learn_and_do_no_harm() {
    let run = |ranks, stage| {
        let run = TestRun::sft().set("packing", "false").set("max_train_samples", 3).set("eval_strategy", "no");
        over(run.set("eval_fraction", "null"), ranks, stage).set("per_device_train_batch_size", 1)
    };
    let alone = run(1, 0).done();
    for stage in [2, 3] {
        run(4, stage).done().assert_same(&alone);
    }
}
