//! Rewards computed by a program of the user.
//!
//! The program is started once, when the run starts, and kept alive between batches, so that it can load what it needs
//! once. For each batch it reads one line from standard input and writes one line to standard output:
//!
//! ```text
//! -> {"id": 1, "samples": [{"prompt": ..., "prompt_text": "...", "completion": "...", "completion_tokens": 17,
//!     "max_completion_length": 256, "is_truncated": false, "row": {"answer": "42", ...}}, ...]}
//! <- {"id": 1, "scores": [1.0, null, ...]}
//! ```
//!
//! - One score per sample, in order: a finite number, or null where the reward does not apply. The answer is one line
//!   and must be flushed. `{"id": 1, "error": "why"}` instead of scores ends the run with that message.
//! - `prompt` is what the data set has (a text or messages), `row` has all its columns. Unknown fields are to be
//!   ignored.
//! - Standard error is free for messages; its last lines are shown if something fails.
//! - When the run ends, or the trainer dies in whatever way, standard input ends: the program must exit then. One that
//!   has not done so a second after the run ended is killed.
//! - It runs in its own process group, so Ctrl-C reaches only the trainer, and on a time-out the whole group is killed,
//!   children included. `PYTHONUNBUFFERED=1` is set for it. With several ranks each starts its own.
//!
//! `scripts/rewards/brevity.py` is an example.

mod process;

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::error::{Error, ProgramError, excerpt};
use super::{Reward, Sample};
use process::{Process, Received};

/// A reward program and the state of the conversation with it.
pub(super) struct CommandReward {
    name: String,
    command: Vec<String>,
    timeout_secs: f64,
    process: Option<Process>,
    next_id: u64,
}

impl CommandReward {
    /// Starts the program.
    ///
    /// # Errors
    /// If the command is empty, the time limit is not above 0, or the system cannot start the program.
    pub(super) fn start(name: &str, command: &[String], timeout_secs: f64) -> Result<Self, Error> {
        let failed = |problem| failure(name, command, problem, Vec::new());
        check(name, command, timeout_secs)?;
        let (program, arguments) = command.split_first().ok_or_else(|| failed(ProgramError::Empty))?;
        let process = Process::start(program, arguments).map_err(|e| failed(ProgramError::Start(e)))?;
        let (name, command) = (name.to_owned(), command.to_vec());
        Ok(Self { name, command, timeout_secs, process: Some(process), next_id: 1 })
    }

    fn exchange(
        &mut self,
        samples: &[Sample<'_>],
        is_interrupted: &dyn Fn() -> bool,
    ) -> Result<Vec<Option<f64>>, ProgramError> {
        let id = self.next_id;
        self.next_id += 1;
        let process = self.process.as_mut().ok_or(ProgramError::Stopped)?;
        // A limit of years overflows an Instant; 30 days are as good as none.
        let limit = Duration::from_secs_f64(self.timeout_secs.min(30.0 * 86_400.0));
        let deadline = Instant::now() + limit;
        process.send(request(id, samples));
        match process.receive(deadline, is_interrupted) {
            Received::Line(line) => scores(id, &line, samples.len()),
            Received::TooLong(start) => Err(ProgramError::NotAnAnswer {
                id,
                reason: "it is longer than 64 MiB".to_owned(),
                line: excerpt(&start),
            }),
            Received::Nothing => Err(ProgramError::TimedOut { id, samples: samples.len(), seconds: self.timeout_secs }),
            Received::Interrupted => Err(ProgramError::Interrupted),
            Received::End => Err(ProgramError::Died { id, status: process.wait(Duration::from_secs(1)) }),
        }
    }
}

/// Checks what can be checked without starting the program.
///
/// # Errors
/// If the command is empty or the time limit is not above 0.
pub(super) fn check(name: &str, command: &[String], timeout_secs: f64) -> Result<(), Error> {
    if command.is_empty() {
        return Err(failure(name, command, ProgramError::Empty, Vec::new()));
    }
    if timeout_secs.is_nan() || timeout_secs <= 0.0 {
        return Err(failure(name, command, ProgramError::Limit(timeout_secs), Vec::new()));
    }
    Ok(())
}

fn failure(name: &str, command: &[String], problem: ProgramError, stderr: Vec<String>) -> Error {
    Error::Program { name: name.to_owned(), command: command.join(" "), problem: Box::new(problem), stderr }
}

impl Reward for CommandReward {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&mut self, samples: &[Sample<'_>]) -> Result<Vec<Option<f64>>, Error> {
        self.score_unless(samples, &|| false)
    }

    fn score_unless(
        &mut self,
        samples: &[Sample<'_>],
        is_interrupted: &dyn Fn() -> bool,
    ) -> Result<Vec<Option<f64>>, Error> {
        if samples.is_empty() {
            return Ok(Vec::new());
        }
        self.exchange(samples, is_interrupted).map_err(|problem| {
            // After any failure the conversation is out of step: stop the program and keep its last words.
            let stderr = self.process.take().map_or_else(Vec::new, Process::kill);
            match problem {
                ProgramError::Interrupted => Error::Interrupted { name: self.name.clone() },
                problem => failure(&self.name, &self.command, problem, stderr),
            }
        })
    }
}

fn request(id: u64, samples: &[Sample<'_>]) -> Vec<u8> {
    let samples: Vec<Value> = samples
        .iter()
        .map(|s| {
            json!({
                "prompt": s.prompt,
                "prompt_text": s.prompt_text,
                "completion": s.completion,
                "completion_tokens": s.completion_tokens,
                "max_completion_length": s.max_completion_length,
                "is_truncated": s.is_truncated,
                "row": s.row,
            })
        })
        .collect();
    let mut line = json!({ "id": id, "samples": samples }).to_string().into_bytes();
    line.push(b'\n');
    line
}

fn scores(id: u64, line: &str, expected: usize) -> Result<Vec<Option<f64>>, ProgramError> {
    let not_an_answer = |reason: String| ProgramError::NotAnAnswer { id, reason, line: excerpt(line) };
    let answer: Value = serde_json::from_str(line).map_err(|error| {
        let names = ["NaN", "Infinity"];
        match names.iter().find(|name| line.contains(**name)) {
            Some(name) => not_an_answer(format!("{name} is not JSON; write null where the reward does not apply")),
            None => not_an_answer(format!("it is not JSON ({error})")),
        }
    })?;
    let Some(answer) = answer.as_object() else { return Err(not_an_answer("it is not a JSON object".to_owned())) };
    match answer.get("id") {
        Some(given) if given.as_u64() == Some(id) => {}
        Some(given) => return Err(not_an_answer(format!("its `id` is {}", excerpt(&given.to_string())))),
        None => return Err(not_an_answer("it has no `id`".to_owned())),
    }
    if let Some(message) = answer.get("error").filter(|e| !e.is_null()) {
        let message = message.as_str().map_or_else(|| message.to_string(), str::to_owned);
        return Err(ProgramError::Refused { id, message });
    }
    let Some(scores) = answer.get("scores").and_then(Value::as_array) else {
        return Err(not_an_answer("it has no list `scores`".to_owned()));
    };
    if scores.len() != expected {
        return Err(ProgramError::Count { id, got: scores.len(), expected });
    }
    let score = |(index, score): (usize, &Value)| match score {
        Value::Null => Ok(None),
        other => match other.as_f64().filter(|s| s.is_finite()) {
            Some(score) => Ok(Some(score)),
            None => Err(ProgramError::Score { id, index, got: excerpt(&other.to_string()) }),
        },
    };
    scores.iter().enumerate().map(score).collect()
}
