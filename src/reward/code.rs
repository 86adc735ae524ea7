//! Rewards that run the code in a completion (`code`, `binary_code`, `cf_code`, `ioi_code`), and one for its form
//! (`code_format`).
//!
//! Names, columns and scores are open-r1's (`src/open_r1/rewards.py` and `utils/competitive_programming/`). The code runs in
//! a sandbox on this machine, where open-r1 asks a service. What it should answer never comes near it: outputs are compared
//! here, in the trainer's process.

mod cases;
mod languages;
mod tasks;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, ScopedJoinHandle};
use std::time::Duration;

use serde_json::{Map, Value};

use super::error::Error;
use super::parameters::Parameters;
use super::sandbox::{Sandbox, SandboxError};
use super::{Reward, Sample};
use crate::config::settings::{CodeSandbox, CodeScoring, RewardSettings};
use languages::Toolbox;
use tasks::{Budget, Form, Task, Untestable, Verdict};

/// The rewards of this module with a line for each.
pub(super) const NAMES: &[(&str, &str)] = &[
    ("code", "the share of the tests in `verification_info` that the completion's code passes, run in a sandbox"),
    ("binary_code", "1 if the completion's code passes all tests in `verification_info`, else 0"),
    ("cf_code", "Codeforces problems: tests in `official_tests`, checkers in `generated_checker`"),
    ("ioi_code", "olympiad problems in C++: 1 if all tests in `test_cases` pass, else 0"),
];
/// A share of passed tests above this is all of them (open-r1's `BINARY_THRESHOLD`).
const ALL: f64 = 0.99;
/// open-r1's scores of `cf_code` for code that does not compile, and for a completion without code.
const NOT_COMPILED: f64 = -0.1;
const NO_CODE: f64 = -1.0;
/// What passing tests add in `weighted_sum`.
const PARTIAL_WEIGHT: f64 = 0.1;

/// Whether a reward runs code.
pub(super) fn is_code(name: &str) -> bool {
    NAMES.iter().any(|(known, _)| *known == plain(name))
}

fn plain(name: &str) -> &str {
    name.strip_suffix("_reward").unwrap_or(name)
}

/// The sandbox and the languages in it, for all rewards of a run that execute code.
pub(super) struct Workshop {
    sandbox: Sandbox,
    toolbox: Toolbox,
    parallel: usize,
}

impl Workshop {
    /// Finds out what there is on this machine.
    ///
    /// # Errors
    /// If no Python runs in a sandbox, or full protection is asked for and not to be had.
    pub(super) fn open(name: &str, settings: &RewardSettings) -> Result<Self, Error> {
        let failed = |problem: String| Error::Sandbox { name: name.to_owned(), problem };
        let toolbox = Toolbox::find(settings.python.as_deref()).map_err(failed)?;
        let mut hidden = settings.code.hidden.clone();
        hidden.extend(std::env::var_os("HOME").map(PathBuf::from));
        let sandbox = toolbox.open(&hidden).map_err(|error| failed(error.to_string()))?;
        if settings.code.sandbox == CodeSandbox::Required && !sandbox.is_full() {
            return Err(failed(format!(
                "`code_sandbox: required`, but on this machine {}; allow user namespaces (`sysctl \
                 kernel.unprivileged_userns_clone=1`, in a container `--security-opt seccomp=unconfined`), or accept less \
                 with `code_sandbox: best_effort`",
                sandbox.gaps().join("; ")
            )));
        }
        let gaps = sandbox.gaps();
        if !gaps.is_empty() {
            tracing::warn!(
                "code of completions runs with less protection than it should: {}; `code_sandbox: required` refuses that",
                gaps.join("; ")
            );
        }
        let parallel = settings.code.parallel.unwrap_or_else(|| thread::available_parallelism().map_or(1, Into::into));
        Ok(Self { sandbox, toolbox, parallel })
    }

    /// The protection and the limits, for the plan.
    pub(super) fn described(&self) -> String {
        format!("{}; {} at once", self.sandbox.protection(), self.parallel)
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Share,
    Binary,
    Codeforces(CodeScoring),
    Olympiad,
}

/// The settings of one reward.
#[derive(Clone, Debug)]
struct Settings {
    kind: Kind,
    form: Form,
    budget: Budget,
    stop_after: Option<usize>,
}

fn read(name: &str, values: &Map<String, Value>, settings: &RewardSettings) -> Result<Settings, Error> {
    let mut parameters = Parameters::new(name, values);
    let kind = match plain(name) {
        "binary_code" => Kind::Binary,
        "cf_code" => Kind::Codeforces(settings.code.scoring),
        "ioi_code" => Kind::Olympiad,
        _ => Kind::Share,
    };
    let column = parameters.text("column")?;
    let positive = |number: f64| number > 0.0;
    let budget = Budget {
        case_secs: parameters.number("timeout_secs", 5.0, "a number of seconds above 0", positive)?,
        total_secs: parameters.number("total_timeout_secs", 30.0, "a number of seconds above 0", positive)?,
        memory_bytes: (parameters.number("memory_mb", 1024.0, "a number of MiB of at least 64", |n| n >= 64.0)?
            * f64::from(1 << 20)) as u64,
    };
    parameters.finish()?;
    let form = match kind {
        Kind::Share | Kind::Binary => Form::Verification { column },
        Kind::Codeforces(_) => Form::Codeforces { column },
        Kind::Olympiad => Form::Olympiad { column },
    };
    // How many tests are done before it is looked whether one of them has failed; only where one failure is all.
    let stops = matches!(kind, Kind::Binary | Kind::Olympiad | Kind::Codeforces(CodeScoring::PassFail));
    let stop_after = stops.then_some(settings.code.test_batch_size).flatten();
    Ok(Settings { kind, form, budget, stop_after })
}

/// Checks the parameters.
///
/// # Errors
/// If one is unknown or wrong.
pub(super) fn check(name: &str, values: &Map<String, Value>) -> Result<(), Error> {
    read(name, values, &RewardSettings::default()).map(drop)
}

/// A reward that runs code.
pub(super) struct CodeReward {
    name: String,
    settings: Settings,
    workshop: Arc<Workshop>,
    /// Samples without a score, by the reason.
    untested: BTreeMap<Untestable, u64>,
}

impl CodeReward {
    /// # Errors
    /// If a parameter is unknown or wrong.
    pub(super) fn new(
        name: &str,
        values: &Map<String, Value>,
        settings: &RewardSettings,
        workshop: Arc<Workshop>,
    ) -> Result<Self, Error> {
        let settings = read(name, values, settings)?;
        Ok(Self { name: name.to_owned(), settings, workshop, untested: BTreeMap::new() })
    }

    /// The verdicts on all tasks, on as many threads as may be used.
    fn judge(
        &self,
        tasks: &[Result<Task, Untestable>],
        is_interrupted: &dyn Fn() -> bool,
    ) -> Result<Vec<Option<Verdict>>, Error> {
        let (next, finished, stop) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicBool::new(false));
        let workers = self.workshop.parallel.min(tasks.len()).max(1);
        let work = || {
            let mut verdicts = Vec::new();
            let result = loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(task) = tasks.get(index) else { break Ok(()) };
                if let Ok(task) = task {
                    let verdict = task.run(
                        &self.workshop.sandbox,
                        &self.workshop.toolbox,
                        &self.settings.budget,
                        self.settings.stop_after,
                        &|| stop.load(Ordering::Relaxed),
                    );
                    match verdict {
                        Ok(verdict) => verdicts.push((index, verdict)),
                        Err(error) => break Err(error),
                    }
                }
            };
            if result.is_err() {
                stop.store(true, Ordering::Relaxed);
            }
            finished.fetch_add(1, Ordering::Relaxed);
            result.map(|()| verdicts)
        };
        let results: Vec<Result<Vec<(usize, Verdict)>, SandboxError>> = thread::scope(|scope| {
            let handles: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
            while finished.load(Ordering::Relaxed) < workers && !handles.iter().all(ScopedJoinHandle::is_finished) {
                if is_interrupted() {
                    stop.store(true, Ordering::Relaxed);
                }
                thread::sleep(Duration::from_millis(5));
            }
            let panicked = || Err(SandboxError::Setup("a thread of it panicked".into()));
            handles.into_iter().map(|handle| handle.join().unwrap_or_else(|_| panicked())).collect()
        });
        let mut verdicts = vec![None; tasks.len()];
        let mut interrupted = false;
        for result in results {
            match result {
                Ok(done) => done.into_iter().for_each(|(index, verdict)| verdicts[index] = Some(verdict)),
                // One that failed stops the others, which then were stopped.
                Err(SandboxError::Interrupted) => interrupted = true,
                Err(error) => {
                    return Err(Error::Sandbox { name: self.name.clone(), problem: error.to_string() });
                }
            }
        }
        if interrupted { Err(Error::Interrupted { name: self.name.clone() }) } else { Ok(verdicts) }
    }

    fn score_of(&self, verdict: Verdict) -> f64 {
        let share = verdict.passed as f64 / verdict.tests.max(1) as f64;
        let all = f64::from(u8::from(share > ALL));
        match self.settings.kind {
            Kind::Codeforces(_) if !verdict.has_code => NO_CODE,
            Kind::Codeforces(_) if !verdict.compiles => NOT_COMPILED,
            Kind::Share | Kind::Codeforces(CodeScoring::Partial) => share,
            Kind::Binary | Kind::Olympiad | Kind::Codeforces(CodeScoring::PassFail) => all,
            Kind::Codeforces(CodeScoring::WeightedSum) => all + PARTIAL_WEIGHT * share,
        }
    }
}

impl Reward for CodeReward {
    fn name(&self) -> &str {
        &self.name
    }

    fn is_of_each(&self) -> bool {
        true
    }

    fn score(&mut self, samples: &[Sample<'_>]) -> Result<Vec<Option<f64>>, Error> {
        self.score_unless(samples, &|| false)
    }

    fn score_unless(
        &mut self,
        samples: &[Sample<'_>],
        is_interrupted: &dyn Fn() -> bool,
    ) -> Result<Vec<Option<f64>>, Error> {
        let read = |(index, sample)| Task::of(&self.name, &self.settings.form, index, sample, &self.workshop.toolbox);
        let tasks: Vec<Result<Task, Untestable>> =
            samples.iter().enumerate().map(read).collect::<Result<_, Error>>()?;
        for reason in tasks.iter().filter_map(|task| task.as_ref().err()) {
            let count = self.untested.entry(reason.clone()).or_default();
            if *count == 0 {
                tracing::warn!("reward `{}` does not apply to some completions: {reason}", self.name);
            }
            *count += 1;
        }
        let verdicts = self.judge(&tasks, is_interrupted)?;
        Ok(verdicts.into_iter().map(|verdict| verdict.map(|verdict| self.score_of(verdict))).collect())
    }
}

impl Drop for CodeReward {
    fn drop(&mut self) {
        for (reason, count) in &self.untested {
            tracing::warn!("reward `{}` did not apply to {count} completions: {reason}", self.name);
        }
    }
}
