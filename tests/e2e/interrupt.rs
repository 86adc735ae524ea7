//! A signal in any phase: the run saves what it has, leaves in seconds, and the run that goes on equals the straight one.
//! `-- --nocapture interrupt` shows how many seconds each phase took to leave.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::test_run::{Ended, TestRun, names};

/// What people wait for after a signal, beside the write.
const MOST: Duration = Duration::from_secs(5);

/// Whether metrics.jsonl has at least so many rows.
fn rows(count: usize) -> impl Fn(&Path) -> bool {
    move |output| fs::read_to_string(output.join("metrics.jsonl")).is_ok_and(|text| text.lines().count() >= count)
}

/// As `condition`, held for `time`.
fn for_time(time: Duration, condition: impl Fn(&Path) -> bool) -> impl Fn(&Path) -> bool {
    let since = std::cell::Cell::new(None);
    move |output| {
        if since.get().is_none() && condition(output) {
            since.set(Some(Instant::now()));
        }
        since.get().is_some_and(|since| since.elapsed() >= time)
    }
}

/// Asserts a clean save in time, and that the run which goes on leaves what `straight` left.
#[track_caller]
#[expect(clippy::print_stdout, reason = "the times are asked for by `--nocapture`")]
fn resumed_equals(straight: &TestRun, run: &TestRun, (ended, took): (Ended, Duration), phase: &str) {
    let ended = ended.expect(130);
    println!("{phase}: {:.2} s from the signal until the exit", took.as_secs_f64());
    assert!(took < MOST, "{phase}: it took {took:?}");
    let step = *run.checkpoints().last().unwrap_or_else(|| panic!("{phase}: nothing was saved: {}", ended.out));
    let note = format!("interrupted after step {step} of ");
    assert!(ended.out.contains(&note), "{phase}: {}", ended.out);
    run.assert_checkpoint(step);
    run.run(&["--resume"]).expect(0);
    run.assert_same(straight);
}

#[test]
#[expect(clippy::print_stdout, reason = "the times are asked for by `--nocapture`")]
fn preparing_is_left_at_once() {
    let run = TestRun::sft().set("max_train_samples", "null").set("packing", "false");
    // Minutes of tokenising.
    let data = run.beside("rows.jsonl");
    let mut file = std::io::BufWriter::new(fs::File::create(&data).unwrap());
    let text = "12+34=46 ".repeat(400);
    for row in 0..30_000 {
        writeln!(file, r#"{{"prompt": "{row}=", "completion": "{text}"}}"#).unwrap();
    }
    drop(file);
    let run = run.set("dataset_name", data.display());
    for signal in ["TERM", "INT", "HUP", "USR1"] {
        let (ended, took) = run.signal_when(&[], signal, for_time(Duration::from_secs(1), |output| output.exists()));
        let ended = ended.expect(130);
        println!("preparing, SIG{signal}: {:.2} s from the signal until the exit", took.as_secs_f64());
        assert!(took < MOST, "{took:?}");
        assert!(ended.err.contains(&format!("interrupted by SIG{signal} while preparing")), "{}", ended.err);
        assert!(run.checkpoints().is_empty() && ended.steps().is_empty());
    }
    // Nothing stands in the way of the next run.
    run.run(&["--set", "max_train_samples=64", "--set", "max_steps=1"]).expect(0);
}

#[test]
fn a_rollout_is_given_up() {
    let run = || {
        TestRun::grpo()
            .set("per_device_train_batch_size", 128)
            .set("max_num_seqs", 2)
            .set("max_completion_length", 200)
            .set("max_steps", 2)
            .set("temperature", 3.0)
    };
    let straight = run().done();
    // In the second rollout, and in the first, before there is a step.
    for count in [1, 0] {
        let stopped = run();
        let wait = Duration::from_millis(100);
        let begun = move |output: &Path| rows(count)(output) && output.join("config.resolved.yaml").exists();
        let ended = stopped.signal_when(&[], "TERM", for_time(wait, begun));
        assert_eq!(stopped.checkpoints().last(), Some(&(count as u64)));
        resumed_equals(&straight, &stopped, ended, "rollout");
    }
}

#[test]
fn a_reward_program_is_not_waited_for() {
    let program = r#"import json, os, sys, time
gate, marker, n = sys.argv[1], sys.argv[2], 0
for line in sys.stdin:
    request = json.loads(line); n += 1
    if n == 2 and not os.path.exists(gate):
        open(marker, "w").write(str(os.getpid()))
        time.sleep(600)
    scores = [float(len(s["completion"]) % 3) for s in request["samples"]]
    print(json.dumps({"id": request["id"], "scores": scores}), flush=True)
"#;
    let straight = TestRun::grpo();
    let script = straight.beside("slow.py");
    fs::write(&script, program).unwrap();
    let (gate, marker) = (straight.beside("gate"), straight.beside("marker"));
    let command = format!("[python3, {}, {}, {}]", script.display(), gate.display(), marker.display());
    let rewards = format!("[{{kind: command, name: slow, command: {command}, timeout_secs: 900}}]");
    let run = |run: TestRun| run.set("reward_funcs", &rewards).set("max_steps", 4);
    let stopped = run(TestRun::grpo());
    let ended = stopped.signal_when(&[], "TERM", |_| marker.exists());
    // Its keeper ends it once the trainer is gone.
    let (pid, gone) = (fs::read_to_string(&marker).unwrap(), Instant::now());
    while Path::new(&format!("/proc/{pid}")).exists() {
        assert!(gone.elapsed() < MOST, "the reward program is still there");
        std::thread::sleep(Duration::from_millis(5));
    }
    fs::write(&gate, "").unwrap();
    let straight = run(straight).done();
    resumed_equals(&straight, &stopped, ended, "reward");
}

/// Slurm signals every process of a job: a reward program may be gone before the trainer looks.
#[test]
fn a_reward_program_that_dies_of_the_same_signal_is_no_failure() {
    let program = r#"import json, os, signal, sys, time
gate, n = sys.argv[1], 0
for line in sys.stdin:
    request = json.loads(line); n += 1
    if n == 2 and not os.path.exists(gate):
        open(gate, "w").close()
        # The parent keeps this process; its parent is the trainer.
        os.kill(int(open(f"/proc/{os.getppid()}/stat").read().split()[3]), signal.SIGTERM)
        sys.exit(1)
    print(json.dumps({"id": request["id"], "scores": [1.0 * (i % 2) for i, _ in enumerate(request["samples"])]}), flush=True)
"#;
    let run = TestRun::grpo();
    let (script, gate) = (run.beside("dies.py"), run.beside("gate"));
    fs::write(&script, program).unwrap();
    let command = format!("[python3, {}, {}]", script.display(), gate.display());
    let run = run.set("reward_funcs", format!("[{{kind: command, name: dies, command: {command}}}]"));
    let ended = run.run(&[]).expect(130);
    assert!(ended.out.contains("interrupted after step 1 of 3"), "{}\n{}", ended.out, ended.err);
    assert_eq!(run.run(&["--resume"]).expect(0).steps(), [2, 3]);
}

#[test]
fn a_step_of_training_is_given_up_between_micro_batches_and_layers() {
    let run =
        || TestRun::sft().set("gradient_accumulation_steps", 1).set("max_steps", 6).set("max_train_samples", "null");
    // Many micro-batches, and one large one.
    let many = |run: TestRun| run.set("gradient_accumulation_steps", 400).set("per_device_train_batch_size", 1);
    let large = |run: TestRun| run.set("per_device_train_batch_size", 400);
    for shape in [&many as &dyn Fn(TestRun) -> TestRun, &large] {
        let straight = shape(run()).done();
        let stopped = shape(run());
        let ended = stopped.signal_when(&[], "TERM", for_time(Duration::from_millis(150), rows(1)));
        resumed_equals(&straight, &stopped, ended, "training");
    }
}

#[test]
fn an_evaluation_is_given_up_and_made_by_the_run_that_goes_on() {
    let sft = || {
        TestRun::sft()
            .set("max_train_samples", "null")
            .set("eval_fraction", 0.5)
            .set("max_eval_samples", "null")
            .set("eval_packing", "false")
            .set("per_device_eval_batch_size", 1)
            .set("save_strategy", "no")
    };
    let grpo = || {
        TestRun::grpo()
            .set("max_train_samples", "null")
            .set("eval_fraction", 0.3)
            .set("per_device_eval_batch_size", 8)
            .set("num_generations_eval", 2)
            .set("eval_strategy", "steps")
            .set("eval_steps", 2)
            .set("max_completion_length", 64)
    };
    let cases: [(&str, &dyn Fn() -> TestRun); 4] = [
        ("sft", &sft),
        ("sft at the start", &|| sft().set("eval_on_start", "true")),
        ("sft at the end", &|| sft().set("max_steps", 2)),
        ("grpo", &grpo),
    ];
    for (name, run) in cases {
        let straight = run().done();
        let evaluations = straight.rows().iter().filter(|row| row.contains_key("eval_runtime")).count();
        let stopped = run();
        // Rows are written before the evaluation that is due after them.
        let count = if name.ends_with("start") { 0 } else { 2 };
        let wait = Duration::from_millis(if name == "grpo" { 30 } else { 60 });
        let begun = move |output: &Path| rows(count)(output) && output.join("config.resolved.yaml").exists();
        let ended = stopped.signal_when(&[], "TERM", for_time(wait, begun));
        let is_evaluated = stopped.rows().iter().any(|row| row.contains_key("eval_runtime"));
        assert!(!is_evaluated, "{name}: the signal came after the evaluation");
        resumed_equals(&straight, &stopped, ended, name);
        let again = stopped.rows().iter().filter(|row| row.contains_key("eval_runtime")).count();
        assert_eq!(again, evaluations, "{name}");
        // The checkpoint no longer waits for its evaluation: going on from it again makes it only once.
        if name == "sft" {
            let checkpoint = stopped.output().join("checkpoint-2");
            stopped.run(&["--resume", checkpoint.to_str().unwrap()]).expect(0);
            stopped.assert_same(&straight);
        }
    }
}

#[test]
fn a_save_is_finished() {
    let run = || {
        TestRun::sft().set("max_steps", 30).set("save_steps", 1).set("use_peft", "false").set("load_in_4bit", "false")
    };
    let straight = run().done();
    let stopped = run();
    let is_partial = |name: &String| name.starts_with(".checkpoint-") && name.contains(".partial-");
    let is_saving = |output: &Path| rows(3)(output) && names(output).iter().any(is_partial);
    let ended = stopped.signal_when(&[], "TERM", is_saving);
    assert!(*stopped.checkpoints().last().unwrap() < 30);
    resumed_equals(&straight, &stopped, ended, "saving");
}

#[test]
fn a_hangup_saves_unless_it_is_ignored() {
    let run = || TestRun::sft().set("max_steps", 40);
    let straight = run().done();
    let stopped = run();
    let ended = stopped.signal_when(&[], "HUP", rows(4));
    resumed_equals(&straight, &stopped, ended, "hangup");

    // As nohup starts it.
    let ignoring = run();
    let inner = ignoring.command(&[]);
    let mut shell = std::process::Command::new("sh");
    shell.current_dir(env!("CARGO_MANIFEST_DIR")).args(["-c", "trap '' HUP; exec \"$0\" \"$@\""]);
    shell.arg(inner.get_program()).args(inner.get_args());
    let child = crate::test_run::start(&mut shell);
    let id = child.id();
    let waiting = std::thread::spawn(move || crate::test_run::end(child));
    while !rows(4)(&ignoring.output()) {
        assert!(!waiting.is_finished());
        std::thread::sleep(Duration::from_millis(1));
    }
    std::process::Command::new("sh").args(["-c", &format!("kill -HUP {id}")]).status().unwrap();
    waiting.join().unwrap().expect(0);
    ignoring.assert_same(&straight);
}
