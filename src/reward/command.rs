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
//! - One score per sample, in order: a finite number, a truth value (1 or 0), or null or NaN where the reward does not
//!   apply; a text that is one of these is taken for it. The answer is one line and must be flushed.
//!   `{"id": 1, "error": "why"}` instead of scores ends the run with that message.
//! - Other lines on standard output, as programs print them, are passed over; the run says so once, and how many there
//!   were at its end. Standard error is free for messages: its last lines are shown if something fails, all of them with
//!   `TRAINER_LOG=info`.
//! - `prompt` is what the data set has (a text or messages), `row` has all its columns. Unknown fields are to be
//!   ignored.
//! - A program that answers wrongly, too late or not at all ends the run; it is not started again before the run is.
//! - When the run ends, standard input ends: the program must exit then. One that has not done so within a second is
//!   killed. It and all processes it started are killed at once on a time-out, when the program ends, and when the
//!   trainer dies in whatever way.
//! - It runs in its own process group, so Ctrl-C reaches only the trainer. `PYTHONUNBUFFERED=1` is set for it. With
//!   several ranks each starts its own.
//!
//! `scripts/rewards/brevity.py` is an example.

mod answer;
pub(super) mod process;

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::error::{Error, ProgramError, excerpt};
use super::{Reward, Sample};
use answer::Leniency;
use process::{Process, Received};

/// A reward program and the state of the conversation with it.
pub(super) struct CommandReward {
    name: String,
    command: Vec<String>,
    timeout_secs: f64,
    process: Option<Process>,
    next_id: u64,
    leniency: Leniency,
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
        let process = Process::start(name, program, arguments).map_err(|e| failed(ProgramError::Start(e)))?;
        let (name, command) = (name.to_owned(), command.to_vec());
        Ok(Self { name, command, timeout_secs, process: Some(process), next_id: 1, leniency: Leniency::default() })
    }

    fn exchange(
        &mut self,
        samples: &[Sample<'_>],
        is_interrupted: &dyn Fn() -> bool,
    ) -> Result<Vec<Option<f64>>, ProgramError> {
        let id = self.next_id;
        self.next_id += 1;
        let process = self.process.as_mut().ok_or(ProgramError::Stopped)?;
        let deadline = Instant::now() + limit(self.timeout_secs);
        process.send(request(id, samples));
        let before = self.leniency.clone();
        loop {
            let problem = match process.receive(deadline, is_interrupted) {
                Received::Line(line) => match answer::scores(id, &line, samples.len(), &mut self.leniency)? {
                    Some(scores) => {
                        remark(&self.name, &before, &self.leniency);
                        return Ok(scores);
                    }
                    None if is_interrupted() => ProgramError::Interrupted,
                    None => continue,
                },
                Received::TooLong(start) => ProgramError::NotAnAnswer {
                    id,
                    reason: "it is longer than 64 MiB".to_owned(),
                    line: excerpt(&start),
                },
                Received::Nothing => {
                    ProgramError::TimedOut { id, samples: samples.len(), seconds: self.timeout_secs, wrote: None }
                }
                Received::Interrupted => ProgramError::Interrupted,
                Received::End => ProgramError::Died { id, status: process.wait(Duration::from_secs(1)), wrote: None },
            };
            let ignored = (self.leniency.ignored > before.ignored).then(|| self.leniency.last_ignored.clone());
            return Err(problem.after(process.unfinished().or(ignored)));
        }
    }
}

/// Says once what is taken with a grain of salt.
fn remark(name: &str, before: &Leniency, now: &Leniency) {
    if before.ignored == 0 && now.ignored > 0 {
        tracing::warn!(
            "reward program `{name}` writes to standard output what is no answer, e.g. `{}`: such lines are passed over; \
             messages belong on standard error",
            now.last_ignored
        );
    }
    if before.nans == 0 && now.nans > 0 {
        tracing::warn!("reward program `{name}` gives NaN as a score: taken for null, the reward does not apply");
    }
    if before.texts == 0 && now.texts > 0 {
        tracing::warn!("reward program `{name}` gives texts as scores: those that are numbers are taken for them");
    }
}

impl Drop for CommandReward {
    fn drop(&mut self) {
        let Leniency { ignored, nans, texts, .. } = self.leniency;
        let counts = [(ignored, "lines were passed over"), (nans, "scores were NaN"), (texts, "scores were texts")];
        let counts: Vec<_> = counts.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}")).collect();
        if !counts.is_empty() {
            tracing::warn!("reward program `{}`: {} in all", self.name, counts.join(", "));
        }
    }
}

/// A limit of years overflows an Instant; 30 days are as good as none.
pub(super) fn limit(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds.clamp(0.0, 30.0 * 86_400.0))
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
