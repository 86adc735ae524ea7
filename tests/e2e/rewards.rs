//! Reward programs that die, hang or talk nonsense in the middle of a run.

use std::fs;
use std::time::{Duration, Instant};

use crate::test_run::{TestRun, end, start, trainer};

/// Answers batches of 8 and does `$2` (a shell command) at request number `$1`; needs nothing but a shell.
const PROGRAM: &str = r#"
n=0
while read -r line; do
  n=$((n + 1))
  if [ "$n" -eq "$1" ]; then eval "$2"; fi
  echo "{\"id\": $n, \"scores\": [0, 1, 0, 1, 1, 1, 0, null]}"
done
"#;

/// A run with the program above as its reward.
struct Rewarded {
    run: TestRun,
    script: String,
}

impl Rewarded {
    fn new() -> Self {
        let run = TestRun::grpo().set("max_steps", 6);
        let script = run.beside("reward.sh").display().to_string();
        fs::write(&script, PROGRAM).unwrap();
        Self { run, script }
    }

    /// The setting of a program that does `trouble` at its request `number`.
    fn reward(&self, number: usize, trouble: &str) -> String {
        let command = format!("[sh, '{}', '{number}', '{trouble}']", self.script);
        format!("reward_funcs=[{{kind: command, name: judge, timeout_secs: 1, command: {command}}}]")
    }

    /// Whether a process with the program's path in its command line is alive (on Linux).
    fn is_alive(&self) -> bool {
        fs::read_dir("/proc").unwrap().any(|entry| {
            // Not every entry is a process, and a process may end while it is looked at.
            let command = fs::read(entry.unwrap().path().join("cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&command).contains(&self.script)
        })
    }
}

#[test]
fn a_program_that_fails_late_costs_no_checkpoint_and_the_run_goes_on_when_it_is_mended() {
    let straight = Rewarded::new();
    straight.run.run(&["--set", &straight.reward(100, ":")]).expect(0);

    let cases: [(&str, &[&str]); 5] = [
        ("echo out of memory >&2; exit 7", &["exit status: 7", "run it by hand", "out of memory"]),
        ("sleep 60", &["did not answer request 4 (8 samples) within 1 seconds", "raise `timeout_secs`"]),
        ("echo hello; sleep 60", &["did not answer request 4", "standard output is `hello`", "expected a whole line"]),
        ("echo {\\\"id\\\": 3, \\\"scores\\\": []}", &["not an answer to request 4", "its `id` is 3"]),
        ("kill -9 $$", &["signal: 9", "run it by hand"]),
    ];
    for (trouble, parts) in cases {
        let broken = Rewarded::new();
        let started = Instant::now();
        let ended = broken.run.run(&["--set", &broken.reward(4, trouble)]);
        assert!(started.elapsed() < Duration::from_secs(30), "{trouble}: {:?}", started.elapsed());
        let ended = ended.expect_error(1, &[parts, &["reward `judge` failed at step 4", &broken.script]].concat());
        assert_eq!(ended.steps(), [1, 2, 3], "{trouble}");
        assert_eq!(broken.run.checkpoints(), [2], "{trouble}");
        broken.run.assert_checkpoint(2);
        assert!(!broken.is_alive(), "{trouble}: the program outlived the run");

        // The program counts its requests, so a fresh one numbers them from 1 again.
        let ended = broken.run.run(&["--resume", "--set", &broken.reward(100, ":")]).expect(0);
        assert_eq!(ended.steps(), [3, 4, 5, 6], "{trouble}");
        broken.run.assert_same(&straight.run);
    }
}

#[test]
fn a_program_that_fails_at_once_leaves_no_run_in_the_way() {
    let rewarded = Rewarded::new();
    rewarded.run.run(&["--set", &rewarded.reward(1, "exit 3")]).expect_error(1, &["exit status: 3", "step 1"]);
    // Nothing was trained, so the same command starts.
    rewarded.run.run(&["--set", &rewarded.reward(100, ":")]).expect(0);
}

#[test]
fn a_program_that_cannot_be_started_is_said_before_training() {
    let run = TestRun::grpo().set("reward_funcs", "[{command: /nonexistent/judge}]");
    let ended = run.run(&[]);
    assert!(matches!(ended.code, Some(1 | 2)), "{}", ended.err);
    for part in ["`/nonexistent/judge`", "No such file", "check that"] {
        assert!(ended.err.contains(part), "`{part}` is missing in\n{}", ended.err);
    }
    assert_eq!(ended.out, "");
    assert!(!run.has("metrics.jsonl"));
}

#[test]
fn habits_of_programs_cost_no_run_and_are_said_once_with_their_counts() {
    let straight = Rewarded::new();
    straight.run.run(&["--set", &straight.reward(100, ":")]).expect(0);
    let printing = Rewarded::new();
    fs::write(
        &printing.script,
        PROGRAM.replace("  if [", "  echo looking at $n\n  if [").replace("0, null", "false, NaN"),
    )
    .unwrap();
    let ended = printing.run.run(&["--set", &printing.reward(100, ":")]).expect(0);
    for (part, times) in [
        ("warning: reward program `judge` writes to standard output what is no answer, e.g. `looking at 1`", 1),
        ("warning: reward program `judge` gives NaN as a score", 1),
        ("warning: reward program `judge`: 6 lines were passed over, 6 scores were NaN in all", 1),
        ("looking at 2", 0),
    ] {
        assert_eq!(ended.err.matches(part).count(), times, "`{part}` in\n{}", ended.err);
    }
    printing.run.assert_same(&straight.run);
}

#[test]
fn a_killed_trainer_takes_programs_and_all_they_started_along() {
    let rewarded = Rewarded::new();
    let pids = rewarded.run.beside("pids");
    let leave = format!("(setsid sleep 61 & echo $! > {0}); sleep 61 & echo $! >> {0}; wait", pids.display());
    let set = rewarded.reward(2, &leave).replace("timeout_secs: 1", "timeout_secs: 50");
    let mut child = start(&mut rewarded.run.command(&["--set", &set]));
    let written = wait_for(|| fs::read_to_string(&pids).ok().filter(|text| text.lines().count() == 2));
    // SIGKILL: nothing of the trainer's own runs after it.
    child.kill().unwrap();
    child.wait().unwrap();
    wait_for(|| (!rewarded.is_alive()).then_some(()));
    let is_running = |pid: &str| fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| !s.contains(") Z"));
    wait_for(|| (!written.split_whitespace().any(is_running)).then_some(()));
}

/// Waits up to 10 seconds for something to be there.
#[track_caller]
fn wait_for<T>(look: impl Fn() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(started.elapsed() < Duration::from_secs(10), "waited in vain");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Functions as a TRL user has them, beside the configuration.
const FUNCTIONS: &str = "
import asyncio

def brevity(completions, **kwargs):
    kwargs['log_metric']('longest', max(len(c) for c in completions))
    kwargs['log_extra']('length', [len(c) for c in completions])
    return [-len(c) / 100 for c in completions]

async def digits(prompts, completions, completion_ids, answer, trainer_state, **kwargs):
    await asyncio.sleep(0)
    assert len(answer) == len(prompts) == len(completion_ids) and trainer_state.max_steps == 3
    print('judging', len(completions))
    return [any(c.isdigit() for c in text) for text in completions]
";

/// A run whose configuration lies in a folder of its own, with `my_rewards.py` beside it.
fn run_with_functions(rewards: &str) -> TestRun {
    let run = TestRun::grpo();
    let folder = run.beside("project");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("my_rewards.py"), FUNCTIONS).unwrap();
    fs::copy("configs/ci/grpo.yaml", folder.join("grpo.yaml")).unwrap();
    run.config(folder.join("grpo.yaml")).set("reward_funcs", rewards)
}

#[test]
fn functions_beside_the_configuration_reward_a_run_and_a_resumed_one() {
    let run = run_with_functions("[accuracy, my_rewards.py:brevity, my_rewards.digits]");
    let ended = run.run(&[]).expect(0);
    assert_eq!(ended.err.matches("reward functions print").count(), 1, "{}", ended.err);
    assert!(!ended.err.contains("judging"), "{}", ended.err);
    assert!(ended.out.contains("accuracy x 1, brevity x 1, digits x 1"), "{}", ended.out);
    let row = run.rows().pop().unwrap();
    for key in ["rewards/brevity/mean", "rewards/digits/mean", "rewards/digits/std", "longest"] {
        assert!(row.contains_key(key), "{key} is missing in {row:?}");
    }
    assert!(fs::read_to_string(run.output().join("completions.jsonl")).unwrap().contains("\"length\":"));

    // The resolved configuration lies elsewhere and still finds them.
    let resolved = run.beside("resolved.yaml");
    fs::copy(run.output().join("config.resolved.yaml"), &resolved).unwrap();
    let again = run_with_functions("[accuracy]");
    let mut command = trainer();
    command.arg("grpo").arg(&resolved).args(["--set", &format!("output_dir={}", again.output().display())]);
    end(start(&mut command)).expect(0);
    run.assert_same(&again);
}

#[test]
fn a_function_that_cannot_be_imported_is_said_before_the_model_is_read() {
    for (source, parts) in [
        ("import numpie\ndef f(completions, **kw): pass", ["imports `numpie`", "my_rewards.py\", line 1"]),
        ("def g(completions, **kw): pass", ["has no `f`", "`g`"]),
    ] {
        let run = run_with_functions("[my_rewards.py:f]").set("model_name_or_path", "/no/such/model");
        fs::write(run.beside("project").join("my_rewards.py"), source).unwrap();
        let ended = run.run(&[]).expect_error(1, &parts);
        assert_eq!(ended.out, "", "nothing was begun");
        assert!(!run.has("metrics.jsonl"));
    }
}

#[test]
fn a_killed_trainer_takes_its_python_along() {
    let run = run_with_functions("[my_rewards.py:brevity]");
    let pids = run.beside("pids");
    let source = format!(
        "import os, subprocess, time\ndef brevity(completions, **kw):\n    child = subprocess.Popen(['sleep', '61'], \
         start_new_session=True)\n    open({:?}, 'w').write(f'{{os.getpid()}} {{child.pid}}\\n')\n    time.sleep(61)",
        pids.display().to_string()
    );
    fs::write(run.beside("project").join("my_rewards.py"), source).unwrap();
    let mut child = start(&mut run.command(&[]));
    let written = wait_for(|| fs::read_to_string(&pids).ok().filter(|text| text.ends_with('\n')));
    child.kill().unwrap();
    child.wait().unwrap();
    let is_running = |pid: &str| fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| !s.contains(") Z"));
    wait_for(|| (!written.split_whitespace().any(is_running)).then_some(()));
}

#[test]
fn a_run_tests_code_in_a_sandbox_and_says_what_protects_the_machine() {
    let run = TestRun::grpo();
    let data = run.beside("problems.jsonl");
    let tests = serde_json::json!({"language": "python", "test_cases": [{"input": "1", "output": "1", "type": "stdin_stdout"}]});
    // As open-r1's data has it, and as text.
    let rows: Vec<String> = (0..8)
        .map(|i| {
            let info = if i % 2 == 0 { tests.clone() } else { tests.to_string().into() };
            serde_json::json!({"prompt": format!("{i}="), "verification_info": info}).to_string()
        })
        .collect();
    fs::write(&data, rows.join("\n")).unwrap();
    let run = run
        .set("dataset_name", data.display())
        .set("reward_funcs", "[code, binary_code, code_format, {kind: length_penalty, soft_punish_cache: 6}]")
        .set("code_provider", "e2b")
        .set("parallel_code_exec_per_proc", 2);
    let ended = run.run(&[]).expect(0);
    assert!(ended.out.contains("code ") && ended.out.contains("files: "), "{}", ended.out);
    assert!(ended.err.contains("`code_provider` has no effect") || ended.out.contains("`code_provider` has no effect"));
    let row = run.rows().pop().unwrap();
    for key in ["rewards/code/mean", "rewards/binary_code/mean", "rewards/code_format/mean"] {
        assert_eq!(row[key], 0.0, "{key}: a random model writes no code");
    }
    let wrong = TestRun::grpo().set("reward_funcs", "[{kind: code, timeout: 3}]").run(&[]);
    wrong.expect_error(2, &["`code` has no parameter `timeout`", "timeout_secs"]);
}
