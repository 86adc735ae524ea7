//! Reward programs that die, hang or talk nonsense in the middle of a run.

use std::fs;
use std::time::{Duration, Instant};

use crate::test_run::TestRun;

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

    let cases: [(&str, &[&str]); 4] = [
        ("echo out of memory >&2; exit 7", &["exit status: 7", "run it by hand", "out of memory"]),
        ("sleep 60", &["did not answer request 4 (8 samples) within 1 seconds", "raise `timeout_secs`"]),
        ("echo hello", &["not an answer to request 4", "starts with `hello`", "expected {\"id\": 4"]),
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
