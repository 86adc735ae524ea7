//! One run of the real binary on a tiny model from random weights, with its output in a folder that goes away.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use trainer::telemetry::{Row, read_rows};

/// How long one run may take before it counts as hung.
const LONGEST: Duration = Duration::from_mins(1);

/// Metrics that measure time: the only ones in which two equal runs differ.
const TIMINGS: [&str; 7] = [
    "step_time",
    "rollout/time",
    "rollout/rewards_time",
    "rollout/rewards_beside_time",
    "rollout/tokens_per_second",
    "eval_runtime",
    "eval_samples_per_second",
];

/// Rewards that differ within a group of random completions, so that every step has a gradient.
const REWARDS: &str = r#"[{kind: regex, pattern: "[0-9]"}, {kind: length_penalty, soft_punish_cache: 6}, accuracy]"#;

/// A command line of `trainer sft` or `trainer grpo`, and the folder it writes to.
pub(crate) struct TestRun {
    folder: TempDir,
    task: &'static str,
    config: PathBuf,
    sets: Vec<String>,
}

/// How a process ended and what it said.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// The binary, started in the root of the repository and without the tester's settings.
pub(crate) fn trainer() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trainer"));
    command.current_dir(env!("CARGO_MANIFEST_DIR")).env_remove("TRAINER_LOG").env_remove("NO_COLOR");
    command
}

/// Runs `trainer generate` and returns how it ended.
pub(crate) fn generate(model: &Path, arguments: &[&str]) -> Ended {
    let mut command = trainer();
    command.arg("generate").arg("--model").arg(model).args(arguments);
    end(start(&mut command))
}

/// Starts a command with both outputs piped.
pub(crate) fn start(command: &mut Command) -> Child {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Waits for a process while reading what it says.
pub(crate) fn end(child: Child) -> Ended {
    end_watching(child, |_, _| ())
}

/// As [`end`]; `watch` sees every line of standard output together with the process's id.
fn end_watching(mut child: Child, mut watch: impl FnMut(u32, &str) + Send + 'static) -> Ended {
    let id = child.id();
    let lines = BufReader::new(child.stdout.take().unwrap());
    let mut errors = child.stderr.take().unwrap();
    let out = thread::spawn(move || {
        let mut text = String::new();
        for line in lines.lines() {
            let line = line.unwrap();
            watch(id, &line);
            text += &line;
            text.push('\n');
        }
        text
    });
    let err = thread::spawn(move || {
        let mut text = String::new();
        errors.read_to_string(&mut text).unwrap();
        text
    });
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if started.elapsed() > LONGEST {
            child.kill().unwrap();
            panic!("still running after {LONGEST:?}: {}\n{}", out.join().unwrap(), err.join().unwrap());
        }
        thread::sleep(Duration::from_millis(2));
    };
    Ended { code: status.code(), out: out.join().unwrap(), err: err.join().unwrap() }
}

impl Ended {
    /// Asserts the exit code.
    #[track_caller]
    pub(crate) fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{}\n{}", self.out, self.err);
        self
    }

    /// Asserts a failure with exactly one message, which contains all of `parts`: what, where and what to do.
    #[track_caller]
    pub(crate) fn expect_error(self, code: i32, parts: &[&str]) -> Self {
        let ended = self.expect(code);
        let count = ended.err.lines().filter(|line| line.starts_with("error: ") || line.ends_with(" problem")).count();
        assert_eq!(count, 1, "expected one message, got\n{}", ended.err);
        for part in parts.iter().chain(&[""]) {
            assert!(ended.err.contains(part), "`{part}` is missing in\n{}", ended.err);
        }
        for wrong in ["panicked", "RUST_BACKTRACE", "\u{1b}["] {
            assert!(!ended.err.contains(wrong), "`{wrong}` is in\n{}", ended.err);
        }
        ended
    }

    /// The optimizer steps shown on the console.
    pub(crate) fn steps(&self) -> Vec<u64> {
        self.out.lines().filter_map(step_of).collect()
    }
}

/// The step of a console line `step  7/40  loss ...`.
fn step_of(line: &str) -> Option<u64> {
    line.strip_prefix("step ")?.split('/').next()?.trim().parse().ok()
}

impl TestRun {
    /// SFT of an adapter on a 4-bit base: packing, accumulation, evaluation and saving every 2 steps, 4 steps.
    pub(crate) fn sft() -> Self {
        Self::of("sft", "configs/ci/sft.yaml")
    }

    /// GRPO of an adapter on a 4-bit base: saving every 2 steps, 3 steps.
    pub(crate) fn grpo() -> Self {
        Self::of("grpo", "configs/ci/grpo.yaml").set("reward_funcs", REWARDS)
    }

    /// SFT of all weights, saving at the end only, 30 steps.
    pub(crate) fn full() -> Self {
        Self::of("sft", "configs/ci/full.yaml")
    }

    /// A run of the configuration in `path`, from random weights.
    pub(crate) fn of(task: &'static str, path: impl Into<PathBuf>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let sets = vec![format!("output_dir={}", folder.path().join("out").display())];
        Self { folder, task, config: path.into(), sets }.set("init_random", "true")
    }

    /// With another value for a key.
    pub(crate) fn set(mut self, key: &str, value: impl std::fmt::Display) -> Self {
        self.sets.push(format!("{key}={value}"));
        self
    }

    /// With the weights of a folder or file instead of random ones.
    pub(crate) fn model(self, path: &Path) -> Self {
        self.set("init_random", "false").set("model_name_or_path", path.display())
    }

    /// With the configuration in another file.
    pub(crate) fn config(mut self, path: impl Into<PathBuf>) -> Self {
        self.config = path.into();
        self
    }

    /// The run's `output_dir`.
    pub(crate) fn output(&self) -> PathBuf {
        self.folder.path().join("out")
    }

    /// A place beside `output_dir` for what a test needs besides.
    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The command line.
    pub(crate) fn command(&self, more: &[&str]) -> Command {
        let mut command = trainer();
        command.arg(self.task).arg(&self.config);
        for set in &self.sets {
            command.args(["--set", set]);
        }
        command.args(more);
        command
    }

    /// Makes the run's rows ready with `trainer preprocess`.
    pub(crate) fn preprocess(&self, more: &[&str]) -> Ended {
        let mut command = trainer();
        command.arg("preprocess").arg(&self.config);
        for set in &self.sets {
            command.args(["--set", set]);
        }
        end(start(command.args(more)))
    }

    /// Runs to the end.
    pub(crate) fn run(&self, more: &[&str]) -> Ended {
        end(start(&mut self.command(more)))
    }

    /// Evaluates with the configuration of the run.
    pub(crate) fn evaluate(&self, more: &[&str]) -> Ended {
        end(start(&mut self.evaluation(more)))
    }

    /// Evaluates, sends a signal a second after the console shows the line `after`, and returns how it ended.
    pub(crate) fn evaluate_until(&self, more: &[&str], after: &'static str, signal: &'static str) -> Ended {
        end_watching(start(&mut self.evaluation(more)), move |id, line| {
            if line == after {
                thread::sleep(Duration::from_secs(1));
                Command::new("sh").args(["-c", &format!("kill -{signal} {id}")]).status().unwrap();
            }
        })
    }

    fn evaluation(&self, more: &[&str]) -> Command {
        let mut command = trainer();
        command.arg("evaluate").arg(&self.config);
        for set in &self.sets {
            command.args(["--set", set]);
        }
        command.args(more);
        command
    }

    /// Runs to the end and resumes nothing: the usual start of a test.
    #[track_caller]
    pub(crate) fn done(self) -> Self {
        self.run(&[]).expect(0);
        self
    }

    /// Runs and sends a signal once the console shows `step`.
    pub(crate) fn run_until(&self, step: u64, signal: &'static str) -> Ended {
        let mut is_sent = false;
        end_watching(start(&mut self.command(&[])), move |id, line| {
            if !is_sent && step_of(line).is_some_and(|shown| shown >= step) {
                is_sent = true;
                Command::new("sh").args(["-c", &format!("kill -{signal} {id}")]).status().unwrap();
            }
        })
    }

    /// Runs, sends a signal as soon as `when` holds for `output_dir`, and returns how it ended and how long that took.
    pub(crate) fn signal_when(&self, more: &[&str], signal: &str, when: impl Fn(&Path) -> bool) -> (Ended, Duration) {
        let child = start(&mut self.command(more));
        let (id, started) = (child.id(), Instant::now());
        let waiting = thread::spawn(move || end(child));
        while !when(&self.output()) {
            assert!(!waiting.is_finished(), "it ended before the signal: {:?}", waiting.join());
            assert!(started.elapsed() < LONGEST, "nothing to signal came in {LONGEST:?}");
            thread::sleep(Duration::from_millis(1));
        }
        Command::new("sh").args(["-c", &format!("kill -{signal} {id}")]).status().unwrap();
        let sent = Instant::now();
        let ended = waiting.join().unwrap();
        (ended, sent.elapsed())
    }

    /// Runs under bash with `limit` set up before, e.g. a limit on file sizes.
    pub(crate) fn run_limited(&self, limit: &str, more: &[&str]) -> Ended {
        let inner = self.command(more);
        let mut command = Command::new("bash");
        command.current_dir(env!("CARGO_MANIFEST_DIR")).args(["-c", &format!("{limit}; exec \"$0\" \"$@\"")]);
        command.arg(inner.get_program()).args(inner.get_args());
        end(start(&mut command))
    }

    /// The rows of metrics.jsonl.
    pub(crate) fn rows(&self) -> Vec<Row> {
        read_rows(&self.output().join("metrics.jsonl")).unwrap()
    }

    /// The rows of metrics.jsonl without what measures time.
    pub(crate) fn rows_without_timings(&self) -> Vec<Row> {
        let mut rows = self.rows();
        for row in &mut rows {
            row.retain(|key, _| !TIMINGS.contains(&key.as_str()));
        }
        rows
    }

    /// The values of one metric, in order.
    pub(crate) fn metric(&self, key: &str) -> Vec<f64> {
        self.rows().iter().filter_map(|row| row.get(key)?.as_f64()).collect()
    }

    /// The lines of completions.jsonl.
    pub(crate) fn completions(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.output().join("completions.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The bytes of the final weights: the adapter's, else the model's.
    pub(crate) fn weights(&self) -> Vec<u8> {
        let adapter = self.output().join("adapter_model.safetensors");
        fs::read(&adapter).or_else(|_| fs::read(self.output().join("model.safetensors"))).unwrap()
    }

    /// Whether `output_dir` has something of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.output().join(name).exists()
    }

    /// The steps of the checkpoints, ascending. Fails on leftovers of a save that did not end.
    #[track_caller]
    pub(crate) fn checkpoints(&self) -> Vec<u64> {
        let names = names(&self.output());
        assert!(names.iter().all(|name| !name.starts_with('.')), "leftovers in {names:?}");
        let mut steps: Vec<u64> =
            names.iter().filter_map(|name| name.strip_prefix("checkpoint-")?.parse().ok()).collect();
        steps.sort_unstable();
        steps
    }

    /// Asserts that the checkpoint of `step` is whole.
    #[track_caller]
    pub(crate) fn assert_checkpoint(&self, step: u64) {
        let opened = trainer::checkpoint::open(&self.output().join(format!("checkpoint-{step}"))).unwrap();
        assert_eq!(opened.step(), step);
    }

    /// Asserts that two runs left the same weights, rows and completions.
    #[track_caller]
    pub(crate) fn assert_same(&self, other: &Self) {
        let (own, others) = (self.rows_without_timings(), other.rows_without_timings());
        for (row, expected) in own.iter().zip(&others) {
            assert_eq!(row, expected);
        }
        assert_eq!(own.len(), others.len());
        if self.task == "grpo" {
            assert_eq!(self.completions(), other.completions());
        }
        assert!(self.weights() == other.weights(), "the final weights differ");
    }
}

/// The names in a folder.
pub(crate) fn names(folder: &Path) -> BTreeSet<String> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Copies the files of a folder, not its folders.
pub(crate) fn copy_files(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for name in names(from) {
        if from.join(&name).is_file() {
            fs::copy(from.join(&name), to.join(&name)).unwrap();
        }
    }
}
