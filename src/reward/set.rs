//! All reward functions of a run, in the order of `reward_funcs`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::thread;

use serde_json::Value;

use super::code::{self, CodeReward, Workshop};
use super::python::{self, Python, Wanted};
use super::{Error, Reward, Sample, registry};
use crate::config::settings::{CodeSettings, RewardSettings, RewardSpec};

/// How far a run is: what functions in Python find in `trainer_state`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Progress {
    /// Optimizer steps taken.
    pub step: u64,
    /// Optimizer steps to take.
    pub max_steps: u64,
    /// Passes over the data asked for.
    pub num_train_epochs: f64,
    /// Completions per rank and micro-step.
    pub train_batch_size: usize,
}

impl Progress {
    /// Passes over the data so far, by the share of steps taken.
    pub(super) fn epoch(&self) -> f64 {
        self.num_train_epochs * self.step as f64 / self.max_steps.max(1) as f64
    }
}

/// The scores of a batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scores {
    /// By function in the order of `reward_funcs`, then by sample; `None` where a reward does not apply.
    pub by_function: Vec<Vec<Option<f64>>>,
    /// Metrics that functions in Python logged.
    pub metrics: BTreeMap<String, f64>,
    /// Columns that functions in Python logged, one value per sample.
    pub columns: BTreeMap<String, Vec<Value>>,
}

/// The reward functions of a run.
pub struct Rewards {
    functions: Vec<Function>,
    python: Option<Python>,
    /// Where code of completions runs.
    workshop: Option<Arc<Workshop>>,
    names: Vec<String>,
    progress: Progress,
}

enum Function {
    Own(Box<dyn Reward>),
    /// The next one of the functions in Python.
    Python,
}

impl Rewards {
    /// Makes the rewards: starts programs, and Python with its functions. `is_interrupted` is asked while it waits.
    ///
    /// # Errors
    /// If a reward is unknown or has wrong parameters, a program does not start, or a function cannot be imported.
    pub fn start(
        specs: &[RewardSpec],
        settings: &RewardSettings,
        is_interrupted: &dyn Fn() -> bool,
    ) -> Result<Self, Error> {
        let specs: Vec<RewardSpec> =
            specs.iter().map(registry::own_for_known).map(|spec| with_language(spec, &settings.code)).collect();
        let mut workshop: Option<Arc<Workshop>> = None;
        let mut wanted = Vec::new();
        let mut functions = Vec::new();
        for spec in &specs {
            if let RewardSpec::Python { target, name, parameters, timeout_secs } = spec {
                wanted.push(Wanted {
                    target,
                    name: name.as_deref(),
                    arguments: parameters,
                    timeout_secs: *timeout_secs,
                });
                functions.push(Function::Python);
            } else if let RewardSpec::Builtin { name, parameters } = spec
                && code::is_code(name)
            {
                let shared = match &workshop {
                    Some(shared) => Arc::clone(shared),
                    None => Arc::clone(workshop.insert(Arc::new(Workshop::open(name, settings)?))),
                };
                functions.push(Function::Own(Box::new(CodeReward::new(name, parameters, settings, shared)?)));
            } else {
                functions.push(Function::Own(registry::build(spec)?));
            }
        }
        let python = if wanted.is_empty() {
            None
        } else {
            let interpreter = python::interpreter(settings.python.as_deref());
            Some(Python::start(&interpreter, &settings.search_path(), &wanted, is_interrupted)?)
        };
        let mut rewards = Self { functions, python, workshop, names: Vec::new(), progress: Progress::default() };
        rewards.names = rewards.list_names();
        let distinct: BTreeSet<&String> = rewards.names.iter().collect();
        if distinct.len() < rewards.names.len()
            && let Some(python) = &mut rewards.python
        {
            // Two lambdas, or one function with two sets of arguments: the names in the file differ.
            python.name_by_attribute();
            rewards.names = rewards.list_names();
        }
        Ok(rewards)
    }

    fn list_names(&self) -> Vec<String> {
        let mut of_python = self.python.iter().flat_map(Python::names);
        let name = |function: &Function| match function {
            Function::Own(reward) => reward.name().to_owned(),
            Function::Python => of_python.next().unwrap_or_default().to_owned(),
        };
        self.functions.iter().map(name).collect()
    }

    /// Names in the metrics (`rewards/<name>/mean`), in the order of `reward_funcs`.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Sets what functions in Python find in `trainer_state` from now on.
    pub fn show_progress(&mut self, progress: Progress) {
        self.progress = progress;
    }

    /// What runs the rewards that this program does not compute itself, for the plan: what, and how.
    pub fn surroundings(&self) -> Vec<(&'static str, String)> {
        let python = self.python.iter().map(|python| ("reward functions", python.described()));
        let code = self.workshop.iter().map(|workshop| ("code", workshop.described()));
        python.chain(code).collect()
    }

    /// The functions that look at one sample at a time.
    pub fn of_each(&mut self) -> OfEach<'_> {
        let of_each = |(index, function)| match function {
            &mut Function::Own(ref mut reward) if reward.is_of_each() => Some((index, reward)),
            _ => None,
        };
        OfEach { functions: self.functions.iter_mut().enumerate().filter_map(of_each).collect() }
    }

    /// Scores a batch by every function. Functions in Python come after the others.
    ///
    /// # Errors
    /// If a reward fails; [`Error::Interrupted`] as soon as `is_interrupted`, for rewards that wait for another process.
    pub fn score(&mut self, samples: &[Sample<'_>], is_interrupted: &dyn Fn() -> bool) -> Result<Scores, Error> {
        self.score_rest(samples, BTreeMap::new(), is_interrupted)
    }

    /// As [`Self::score`], but for the functions of which `known` has the scores: [`OfEach`] made them.
    ///
    /// # Errors
    /// As [`Self::score`].
    pub fn score_rest(
        &mut self,
        samples: &[Sample<'_>],
        mut known: BTreeMap<usize, Vec<Option<f64>>>,
        is_interrupted: &dyn Fn() -> bool,
    ) -> Result<Scores, Error> {
        let mut by_function = vec![Vec::new(); self.functions.len()];
        let mut of_python = Vec::new();
        for (index, function) in self.functions.iter_mut().enumerate() {
            match function {
                Function::Own(reward) => {
                    by_function[index] = match known.remove(&index) {
                        Some(scores) => scores,
                        None => reward.score_unless(samples, is_interrupted)?,
                    };
                }
                Function::Python => of_python.push(index),
            }
        }
        let Some(python) = &mut self.python else { return Ok(Scores { by_function, ..Scores::default() }) };
        let given = python.score(samples, &self.progress, is_interrupted)?;
        for (index, scores) in of_python.into_iter().zip(given.scores) {
            by_function[index] = scores;
        }
        Ok(Scores { by_function, metrics: given.metrics, columns: given.columns })
    }
}

/// Functions of a set that look at one sample at a time: samples may come to them in any parts and order.
pub struct OfEach<'r> {
    /// By their place in the set.
    functions: Vec<(usize, &'r mut Box<dyn Reward>)>,
}

impl OfEach<'_> {
    /// Whether there is none, or none any more.
    pub fn is_empty(&self) -> bool {
        self.functions.is_empty()
    }

    /// Scores some samples: by function, then by sample. A function that fails is left out from then on; scoring the whole batch
    /// says why.
    pub fn score(
        &mut self,
        samples: &[Sample<'_>],
        is_interrupted: &dyn Fn() -> bool,
    ) -> BTreeMap<usize, Vec<Option<f64>>> {
        let mut scores = BTreeMap::new();
        self.functions.retain_mut(|(index, reward)| match reward.score_unless(samples, is_interrupted) {
            Ok(own) => scores.insert(*index, own).is_none(),
            Err(_) => false,
        });
        scores
    }
}

impl Drop for Rewards {
    /// Each reward program may take a second to exit; all have the same second.
    fn drop(&mut self) {
        let python = self.python.take();
        thread::scope(|scope| {
            scope.spawn(|| drop(python));
            for function in self.functions.drain(..) {
                scope.spawn(|| drop(function));
            }
        });
    }
}

/// `code_format` looks for the configuration's language unless it names another.
fn with_language(spec: RewardSpec, settings: &CodeSettings) -> RewardSpec {
    match spec {
        RewardSpec::Builtin { name, mut parameters } if name.contains("code_format") => {
            parameters.entry("language").or_insert_with(|| settings.language.clone().into());
            RewardSpec::Builtin { name, parameters }
        }
        other => other,
    }
}
