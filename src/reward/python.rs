//! Reward functions written in Python, called as TRL calls them.
//!
//! One Python for all functions of a run, started before the model is loaded, so that an import that fails is known at
//! once. It runs `helper.py` (part of this binary, sent through standard input), whose head describes the messages. The
//! functions are called once per generation batch, in the order of `reward_funcs`; those that are `async` come last and
//! run side by side, as in TRL. Each call has a limit of time. A failure of whatever kind ends the run: the message has
//! the traceback, without frames that are not the user's.

mod error;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::command::limit;
use super::command::process::{Process, Received};
use super::error::excerpt;
use super::{Error, Progress, Sample};
pub use error::PythonError;

const HELPER: &str = include_str!("python/helper.py");
/// Reads the helper from standard input: as an argument it would fill the process table's lines.
const START: &str = "import os,sys\nn=int(sys.argv.pop())\nb=b''\nwhile len(b)<n:b+=os.read(0,n-len(b)) or sys.exit(1)\n\
    exec(compile(b,'<reward helper>','exec'))";
/// How long imports may take.
const LOAD: Duration = Duration::from_mins(5);

/// A function of the configuration.
#[derive(Clone, Debug)]
pub(super) struct Wanted<'a> {
    /// `rewards.py:score`, `package.module.score` or `package.module:score`.
    pub(super) target: &'a str,
    /// The name in the metrics, if the file gives one.
    pub(super) name: Option<&'a str>,
    /// Keyword arguments of every call.
    pub(super) arguments: &'a Map<String, Value>,
    pub(super) timeout_secs: f64,
}

struct Function {
    target: String,
    name: String,
    /// Whether the configuration gives the name.
    is_named: bool,
    is_async: bool,
    timeout_secs: f64,
}

/// The Python with the functions of a run.
pub(super) struct Python {
    interpreter: String,
    version: String,
    process: Option<Process>,
    functions: Vec<Function>,
    next_id: u64,
    has_printed: bool,
}

/// What the functions gave for one batch.
#[derive(Debug, Default)]
pub(super) struct Given {
    /// Scores by function, in their order.
    pub(super) scores: Vec<Vec<Option<f64>>>,
    /// What `log_metric` was called with, averaged.
    pub(super) metrics: BTreeMap<String, f64>,
    /// What `log_extra` was called with, one value per sample.
    pub(super) columns: BTreeMap<String, Vec<Value>>,
}

#[derive(Deserialize)]
struct Loaded {
    python: String,
    functions: Vec<LoadedFunction>,
}

#[derive(Deserialize)]
struct LoadedFunction {
    name: String,
    is_async: bool,
}

#[derive(Deserialize)]
struct Answer {
    id: u64,
    #[serde(default)]
    scores: Vec<Vec<Option<f64>>>,
    #[serde(default)]
    metrics: BTreeMap<String, Vec<Option<f64>>>,
    #[serde(default)]
    columns: BTreeMap<String, Vec<Value>>,
    error: Option<Map<String, Value>>,
    #[serde(default)]
    printed: u64,
}

/// The Python to start: the one asked for, that of an active virtual environment, or the first on `PATH`.
pub(super) fn interpreter(asked: Option<&Path>) -> PathBuf {
    let of_environment = || {
        let path = Path::new(&std::env::var_os("VIRTUAL_ENV")?).join("bin/python3");
        path.exists().then_some(path)
    };
    asked.map(Path::to_path_buf).or_else(of_environment).unwrap_or_else(|| PathBuf::from("python3"))
}

impl Python {
    /// Starts Python and imports the functions; relative files and modules are looked for in `search`.
    ///
    /// # Errors
    /// If it cannot be started or a function cannot be imported.
    pub(super) fn start(
        interpreter: &Path,
        search: &[PathBuf],
        wanted: &[Wanted<'_>],
        is_interrupted: &dyn Fn() -> bool,
    ) -> Result<Self, Error> {
        let functions: Vec<Function> = wanted
            .iter()
            .map(|one| Function {
                target: one.target.to_owned(),
                name: one.name.unwrap_or_else(|| attribute(one.target)).to_owned(),
                is_named: one.name.is_some(),
                is_async: false,
                timeout_secs: one.timeout_secs,
            })
            .collect();
        let interpreter = interpreter.display().to_string();
        let arguments = ["-c".to_owned(), START.to_owned(), HELPER.len().to_string()];
        let started = Process::start("python", &interpreter, &arguments);
        let mut python =
            Self { interpreter, version: String::new(), process: None, functions, next_id: 1, has_printed: false };
        match started {
            Ok(process) => python.process = Some(process),
            Err(error) => return Err(python.failed(0, PythonError::Start(error))),
        }
        python.load(search, wanted, is_interrupted)?;
        Ok(python)
    }

    fn load(
        &mut self,
        search: &[PathBuf],
        wanted: &[Wanted<'_>],
        is_interrupted: &dyn Fn() -> bool,
    ) -> Result<(), Error> {
        let functions: Vec<Value> =
            wanted.iter().map(|one| json!({"target": one.target, "arguments": one.arguments})).collect();
        let search: Vec<_> = search.iter().map(|path| path.to_string_lossy()).collect();
        let mut message = HELPER.as_bytes().to_vec();
        message.extend(line(&json!({"search": search, "functions": functions})));
        self.send(message);
        let value = self.receive(0, LOAD, is_interrupted)?;
        if let Some(Value::Object(error)) = value.get("error") {
            let (function, problem) = PythonError::read(error);
            return Err(self.failed(function, problem));
        }
        let loaded: Loaded = self.parse(0, value)?;
        self.version = loaded.python;
        for (function, loaded) in self.functions.iter_mut().zip(loaded.functions) {
            function.is_async = loaded.is_async;
            if !function.is_named {
                function.name = loaded.name;
            }
        }
        Ok(())
    }

    /// What runs the functions, for the plan.
    pub(super) fn described(&self) -> String {
        format!("{} (Python {})", self.interpreter, self.version)
    }

    /// Names in the metrics: TRL's (`__name__` of the function), unless the file gives one.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.functions.iter().map(|function| function.name.as_str())
    }

    /// Names the functions by the names that the configuration imports them by.
    pub(super) fn name_by_attribute(&mut self) {
        for function in self.functions.iter_mut().filter(|function| !function.is_named) {
            attribute(&function.target).clone_into(&mut function.name);
        }
    }

    /// Calls every function on a batch.
    ///
    /// # Errors
    /// If one fails, takes too long, or gives what are no scores; [`Error::Interrupted`].
    pub(super) fn score(
        &mut self,
        samples: &[Sample<'_>],
        progress: &Progress,
        is_interrupted: &dyn Fn() -> bool,
    ) -> Result<Given, Error> {
        let mut given = Given { scores: vec![Vec::new(); self.functions.len()], ..Given::default() };
        if samples.is_empty() {
            return Ok(given);
        }
        self.send(line(&json!({"batch": batch(samples, progress)})));
        let (asynchronous, one_by_one): (Vec<usize>, Vec<usize>) =
            (0..self.functions.len()).partition(|&index| self.functions[index].is_async);
        let calls = one_by_one.into_iter().map(|index| vec![index]).chain([asynchronous]).filter(|c| !c.is_empty());
        let mut metrics: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        for call in calls {
            let answer = self.call(&call, is_interrupted)?;
            for (&index, scores) in call.iter().zip(answer.scores) {
                given.scores[index] = scores;
            }
            for (name, values) in answer.metrics {
                metrics.entry(name).or_default().extend(values.into_iter().flatten());
            }
            for (name, values) in answer.columns {
                if values.len() == samples.len() {
                    given.columns.insert(name, values);
                } else {
                    let name_of_call = &self.functions[call[0]].name;
                    tracing::warn!(
                        "reward function `{name_of_call}`: `log_extra` got {} values of `{name}` for {} completions; \
                         they are left out",
                        values.len(),
                        samples.len()
                    );
                }
            }
        }
        let mean = |(name, values): (String, Vec<f64>)| {
            (!values.is_empty()).then(|| (name, values.iter().sum::<f64>() / values.len() as f64))
        };
        given.metrics = metrics.into_iter().filter_map(mean).collect();
        Ok(given)
    }

    fn call(&mut self, call: &[usize], is_interrupted: &dyn Fn() -> bool) -> Result<Answer, Error> {
        let id = self.next_id;
        self.next_id += 1;
        let seconds = call.iter().map(|&index| self.functions[index].timeout_secs).fold(0.0, f64::max);
        let limit = limit(seconds);
        self.send(line(&json!({"id": id, "call": call, "seconds": limit.as_secs_f64()})));
        let value = self.receive(call[0], limit, is_interrupted)?;
        let answer: Answer = self.parse(call[0], value)?;
        if answer.printed > 0 && !std::mem::replace(&mut self.has_printed, true) {
            tracing::warn!("reward functions print; what they print is shown with `TRAINER_LOG=info`");
        }
        if let Some(error) = &answer.error {
            let (function, problem) = PythonError::read(error);
            return Err(self.failed(function, problem));
        }
        if answer.id != id || answer.scores.len() != call.len() {
            let problem = PythonError::Protocol(format!("answer {} to request {id}", answer.id));
            return Err(self.failed(call[0], problem));
        }
        Ok(answer)
    }

    fn send(&self, message: Vec<u8>) {
        if let Some(process) = &self.process {
            process.send(message);
        }
    }

    fn receive(&mut self, function: usize, limit: Duration, is_interrupted: &dyn Fn() -> bool) -> Result<Value, Error> {
        let Some(process) = &mut self.process else { return Err(self.failed(function, PythonError::Stopped)) };
        let problem = match process.receive(Instant::now() + limit, is_interrupted) {
            Received::Line(text) => match serde_json::from_str(&text) {
                Ok(value) => return Ok(value),
                Err(error) => PythonError::Protocol(format!("`{}` ({error})", excerpt(&text))),
            },
            Received::TooLong(start) => PythonError::Protocol(format!("a line without end: `{}`", excerpt(&start))),
            Received::Nothing => PythonError::TimedOut { seconds: limit.as_secs_f64() },
            Received::Interrupted => {
                let name = self.functions[function].name.clone();
                self.process.take().map(Process::kill);
                return Err(Error::Interrupted { name });
            }
            Received::End => PythonError::Died { status: process.wait(Duration::from_secs(1)) },
        };
        Err(self.failed(function, problem))
    }

    fn parse<T: for<'de> Deserialize<'de>>(&mut self, function: usize, value: Value) -> Result<T, Error> {
        serde_json::from_value(value).map_err(|error| self.failed(function, PythonError::Protocol(error.to_string())))
    }

    /// The error of a function; Python is stopped, since the conversation is out of step.
    fn failed(&mut self, function: usize, problem: PythonError) -> Error {
        let stderr = self.process.take().map_or_else(Vec::new, Process::kill);
        let function = &self.functions[function.min(self.functions.len() - 1)];
        Error::Python {
            name: function.name.clone(),
            target: function.target.clone(),
            interpreter: self.interpreter.clone(),
            problem: Box::new(problem),
            stderr,
        }
    }
}

/// The last part of a target: the name of the function.
fn attribute(target: &str) -> &str {
    target.rsplit([':', '.']).next().unwrap_or(target)
}

fn line(message: &Value) -> Vec<u8> {
    let mut line = message.to_string().into_bytes();
    line.push(b'\n');
    line
}

/// A batch by columns, as TRL's functions take it: conversational where the prompt is a list of messages.
fn batch(samples: &[Sample<'_>], progress: &Progress) -> Value {
    /// Columns that TRL does not pass on as they are.
    const OWN: [&str; 3] = ["prompt", "completion", "completion_ids"];
    let completion = |sample: &Sample<'_>| {
        if sample.prompt.is_array() {
            json!([{"role": "assistant", "content": sample.completion}])
        } else {
            json!(sample.completion)
        }
    };
    let mut names: Vec<&String> = Vec::new();
    for sample in samples {
        for name in sample.row.keys().filter(|name| !OWN.contains(&name.as_str())) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
    }
    let column = |name: &String| samples.iter().map(|s| s.row.get(name).cloned().unwrap_or_default()).collect();
    let columns: Map<String, Value> =
        names.into_iter().map(|name| (name.clone(), Value::Array(column(name)))).collect();
    json!({
        "prompts": samples.iter().map(|s| s.prompt).collect::<Vec<_>>(),
        "completions": samples.iter().map(completion).collect::<Vec<_>>(),
        "completion_ids": samples.iter().map(|s| s.completion_ids).collect::<Vec<_>>(),
        "columns": columns,
        "state": {
            "global_step": progress.step,
            "max_steps": progress.max_steps,
            "epoch": progress.epoch(),
            "num_train_epochs": progress.num_train_epochs,
            "train_batch_size": progress.train_batch_size,
            "is_local_process_zero": true,
            "is_world_process_zero": true,
        },
    })
}
