//! What can go wrong with rewards, as sentences for the person who wrote the config file.

use std::process::ExitStatus;

use super::python::PythonError;

/// A reward could not be made or could not score.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No built-in has this name.
    #[error("there is no reward `{name}`{}; the built-in rewards are {}; a function in Python is given as \
        `file.py:function` or `package.module.function`, a program as `command`",
        suggestion(nearest.as_deref()), names.join(", "))]
    UnknownReward {
        /// What the file says.
        name: String,
        /// The most similar name, if one is similar.
        nearest: Option<String>,
        /// Every name, most similar first.
        names: Vec<&'static str>,
    },
    /// The built-in has no such parameter.
    #[error("reward `{reward}` has no parameter `{key}`{}; {}", suggestion(nearest.as_deref()),
        if known.is_empty() { "it takes none".to_owned() } else { format!("it takes {}", known.join(", ")) })]
    UnknownParameter {
        /// Name of the reward.
        reward: String,
        /// What the file says.
        key: String,
        /// The most similar parameter, if one is similar.
        nearest: Option<String>,
        /// Every parameter of this reward.
        known: Vec<&'static str>,
    },
    /// A parameter has a wrong type or value.
    #[error("parameter `{key}` of reward `{reward}` is {got}, expected {expected}")]
    Parameter {
        /// Name of the reward.
        reward: String,
        /// Which parameter.
        key: &'static str,
        /// What the file says, as JSON, or `missing`.
        got: String,
        /// What it should be.
        expected: String,
    },
    /// The data set lacks a column.
    #[error("reward `{reward}` needs the column {}, sample {index} has {}; rename the column in the data set{}",
        quoted(wanted, " or "), if present.is_empty() { "none".to_owned() } else { quoted(present, ", ") }, hint)]
    MissingColumn {
        /// Name of the reward.
        reward: String,
        /// Any of these would do.
        wanted: Vec<String>,
        /// The columns the row has.
        present: Vec<String>,
        /// Position of the sample in the batch.
        index: usize,
        /// What else could be done, after a comma or semicolon; may be empty.
        hint: &'static str,
    },
    /// A column holds something of another type.
    #[error("reward `{reward}` reads the column `{column}`, which is {got} in sample {index}, expected {expected}")]
    ColumnType {
        /// Name of the reward.
        reward: String,
        /// Which column.
        column: String,
        /// Start of the value as JSON.
        got: String,
        /// What it should be.
        expected: &'static str,
        /// Position of the sample in the batch.
        index: usize,
    },
    /// A reward program failed.
    #[error("reward program `{name}` (`{command}`) {problem}{}", last_words(problem, stderr))]
    Program {
        /// Name of the reward.
        name: String,
        /// Program and arguments.
        command: String,
        /// What happened.
        problem: Box<ProgramError>,
        /// The last lines it wrote to standard error, oldest first.
        stderr: Vec<String>,
    },
    /// A reward function in Python failed.
    #[error("reward function `{name}` (`{target}`, run by `{interpreter}`) {problem}{}",
        if problem.needs_last_words() { last_lines(stderr) } else { String::new() })]
    Python {
        /// Name of the reward.
        name: String,
        /// What the configuration names.
        target: String,
        /// The Python.
        interpreter: String,
        /// What happened.
        problem: Box<PythonError>,
        /// The last lines it wrote to standard error, oldest first.
        stderr: Vec<String>,
    },
    /// Code of completions cannot be run.
    #[error("reward `{name}` runs code, and {problem}")]
    Sandbox {
        /// Name of the reward.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// The run was asked to stop while a reward was at work in another process, which was killed.
    #[error("reward `{name}` was stopped with the run")]
    Interrupted {
        /// Name of the reward.
        name: String,
    },
}

/// How a reward program failed.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// `command` is an empty list.
    #[error("has no program to start: `command` is empty, expected for example [python3, reward.py]")]
    Empty,
    /// The time limit is not a positive number of seconds.
    #[error("has a time limit of {0} seconds, expected a number above 0")]
    Limit(f64),
    /// The system could not start it.
    #[error(
        "could not be started: {0}; check that the file exists and is executable, and give its full path if it is \
        not on PATH"
    )]
    Start(std::io::Error),
    /// It did not answer in time and was killed with its process group.
    #[error(
        "did not answer request {id} ({samples} samples) within {seconds} seconds and was killed; raise \
        `timeout_secs`, score fewer samples at once, or find out where it hangs{}", last_output(*id, wrote.as_deref())
    )]
    TimedOut {
        /// Number of the request.
        id: u64,
        /// Samples in the request.
        samples: usize,
        /// The limit.
        seconds: f64,
        /// The last of what it wrote to standard output since the request.
        wrote: Option<String>,
    },
    /// It ended while an answer was due.
    #[error("ended ({}) before it answered request {id}; it must answer one line per request until its standard input \
        ends: run it by hand with one request line to see why{}", describe(status.as_ref()),
        last_output(*id, wrote.as_deref()))]
    Died {
        /// Number of the request.
        id: u64,
        /// How it ended, if the system said so.
        status: Option<ExitStatus>,
        /// The last of what it wrote to standard output since the request.
        wrote: Option<String>,
    },
    /// The run was asked to stop while an answer was due.
    #[error("was stopped with the run")]
    Interrupted,
    /// An earlier call failed, and the program was stopped then.
    #[error("is not running any more: it failed in an earlier batch")]
    Stopped,
    /// A line on standard output is not an answer.
    #[error(
        "wrote a line to standard output that is not an answer to request {id}: {reason}; the line starts with \
        `{line}`; expected {{\"id\": {id}, \"scores\": [...]}}, and anything else goes to standard error"
    )]
    NotAnAnswer {
        /// Number of the request.
        id: u64,
        /// What is wrong with it.
        reason: String,
        /// Its start.
        line: String,
    },
    /// Another number of scores than samples.
    #[error(
        "answered request {id} with {got} scores for {expected} samples; write one score per sample, in order, \
        null where the reward does not apply"
    )]
    Count {
        /// Number of the request.
        id: u64,
        /// Scores in the answer.
        got: usize,
        /// Samples in the request.
        expected: usize,
    },
    /// A score is not a finite number.
    #[error(
        "gave sample {index} of request {id} the score {got}, expected a number that is finite in 32 bits, true or \
        false, or null where the reward does not apply"
    )]
    Score {
        /// Number of the request.
        id: u64,
        /// Position of the sample in the request.
        index: usize,
        /// The score as written.
        got: String,
    },
    /// The program said itself that it failed.
    #[error("refused request {id}: {message}")]
    Refused {
        /// Number of the request.
        id: u64,
        /// Its `error` field.
        message: String,
    },
}

impl Error {
    /// The name of the reward it is about.
    pub fn reward(&self) -> &str {
        match self {
            Self::UnknownReward { name, .. }
            | Self::Program { name, .. }
            | Self::Python { name, .. }
            | Self::Sandbox { name, .. }
            | Self::Interrupted { name } => name,
            Self::UnknownParameter { reward, .. }
            | Self::Parameter { reward, .. }
            | Self::MissingColumn { reward, .. }
            | Self::ColumnType { reward, .. } => reward,
        }
    }
}

impl ProgramError {
    /// With the last of what the program wrote to standard output, where that may explain the failure.
    pub(super) fn after(self, output: Option<String>) -> Self {
        match self {
            Self::TimedOut { id, samples, seconds, .. } => Self::TimedOut { id, samples, seconds, wrote: output },
            Self::Died { id, status, .. } => Self::Died { id, status, wrote: output },
            other => other,
        }
    }
}

fn last_output(id: u64, wrote: Option<&str>) -> String {
    wrote.map_or_else(String::new, |line| {
        format!(
            "; the last it wrote to standard output is `{line}`, expected a whole line {{\"id\": {id}, \"scores\": [...]}}"
        )
    })
}

fn suggestion(nearest: Option<&str>) -> String {
    nearest.map_or_else(String::new, |name| format!(", did you mean `{name}`?"))
}

fn quoted(names: &[String], separator: &str) -> String {
    names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(separator)
}

fn describe(status: Option<&ExitStatus>) -> String {
    status.map_or_else(|| "it closed its standard output".to_owned(), ToString::to_string)
}

fn last_words(problem: &ProgramError, stderr: &[String]) -> String {
    if matches!(problem, ProgramError::Empty | ProgramError::Limit(_) | ProgramError::Start(_) | ProgramError::Stopped)
    {
        return String::new();
    }
    last_lines(stderr)
}

fn last_lines(stderr: &[String]) -> String {
    if stderr.is_empty() {
        return "; it wrote nothing to standard error".to_owned();
    }
    format!("; its last lines on standard error:\n  {}", stderr.join("\n  "))
}

/// The name in `known` most similar to `name`, if it is similar at all.
pub(super) fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<String> {
    known
        .map(|k| (strsim::jaro_winkler(name, k), k))
        .filter(|(similarity, _)| *similarity > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, k)| k.to_owned())
}

/// The start of `text`, on one line, for a message.
pub(super) fn excerpt(text: &str) -> String {
    const LONGEST: usize = 120;
    let line: String = text.chars().take(LONGEST).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().nth(LONGEST).is_some() { format!("{line}...") } else { line }
}
